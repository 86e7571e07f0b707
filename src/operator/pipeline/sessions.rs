//! Ends the sessions of a Pipeline with external brokers that no worker reads any more, so that no queue grows there without a consumer.
//! A session with a broker of a Gateway ends with its user.

use std::collections::BTreeMap;
use std::sync::Arc;

use kube::ResourceExt;
use tracing::info;

use super::connection::DatabaseConnection;
use super::observe::owner;
use crate::api::condition::Cause;
use crate::api::reason::Reason;
use crate::api::{Pipeline, name};
use crate::mqtt::login::Login;
use crate::operator::twin_sync::external::{SharedExternals, cause};
use crate::operator::twin_sync::session::discard;
use crate::operator::twin_sync::session_loop::SyncError;
use crate::runtime::error::chain;
use crate::state::assignment::{Sessions, forget_sessions, gateway_of, read_sessions};

/// Maximum of Gateways whose client identifiers a note lists: an Event's note has at most 1,024 characters.
const MAX_NAMED_GATEWAYS: usize = 4;

/// A session that no worker reads any more.
#[derive(Debug)]
pub struct Unread {
    name: String,
    login: Login,
}

/// The sessions with external brokers, without those of the Gateways that are still `read`.
///
/// # Errors
/// If the query fails.
pub async fn unread(
    database: &DatabaseConnection,
    externals: &SharedExternals,
    pipeline: &Pipeline,
    read: &[String],
) -> Result<Vec<Unread>, Cause> {
    let owner = owner(&database.namespace().cluster, pipeline);
    let logins = externals.logins(&owner.namespace);
    if logins.is_empty() {
        return Ok(Vec::new());
    }
    let refused = |error| Cause::new(Reason::SessionsNotRead, chain(&error));
    let sessions = database.ask(async |client| read_sessions(client, &owner).await, refused).await?;
    Ok(choose(&sessions, &logins, &pipeline.uid().unwrap_or_default(), read))
}

fn choose(sessions: &Sessions, logins: &BTreeMap<Arc<str>, Arc<Login>>, uid: &str, read: &[String]) -> Vec<Unread> {
    let unread = sessions.keys().filter_map(|session| {
        let (gateway, number) = gateway_of(session);
        let login = logins.get(gateway).filter(|_| !read.iter().any(|read| read == gateway))?;
        let client_id = name::external_session_client(&name::external_ingest_client(uid, gateway), number);
        Some(Unread { name: session.clone(), login: Login { client_id, ..Login::clone(login) } })
    });
    unread.collect()
}

/// Ends sessions at their brokers, and deletes their rows in the database.
///
/// # Errors
/// The cause why some sessions are not ended.
pub async fn end(database: &DatabaseConnection, pipeline: &Pipeline, unread: Vec<Unread>) -> Result<(), Cause> {
    let mut ended = Vec::new();
    let mut failed = BTreeMap::new();
    for Unread { name, login } in unread {
        let gateway = gateway_of(&name).0;
        if failed.contains_key(gateway) {
            continue;
        }
        match discard(&login).await {
            Ok(()) => {
                info!(pipeline = pipeline.name_any(), session = name, client = login.client_id, "ended a session that no worker reads");
                ended.push(name);
            }
            Err(error) => {
                failed.insert(gateway.to_owned(), cause(&login, &SyncError::Session(error)));
            }
        }
    }
    if !ended.is_empty() {
        let owner = owner(&database.namespace().cluster, pipeline);
        let refused = |error| Cause::new(Reason::SessionsNotForgotten, chain(&error));
        database.ask(async |client| forget_sessions(client, &owner, &ended).await, refused).await?;
    }
    failed.into_values().next().map_or(Ok(()), Err)
}

/// The note for a deleted Pipeline whose sessions with the brokers of these Gateways could not be ended.
pub fn left_behind<'a>(pipeline: &Pipeline, gateways: impl Iterator<Item = &'a Arc<str>>, cause: &Cause) -> String {
    let uid = pipeline.uid().unwrap_or_default();
    let client = |gateway: &Arc<str>| format!("{} at the broker of Gateway {gateway}", name::external_ingest_client(&uid, gateway));
    let clients: Vec<String> = gateways.take(MAX_NAMED_GATEWAYS).map(client).collect();
    format!(
        "expected to end all sessions of this Pipeline at external brokers, found: {}. Each broker keeps the session and its queue for seven \
         days after the last connection, unless you end it there: the client is {}",
        cause.message,
        clients.join(", ")
    )
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    #[test]
    fn sessions_at_external_brokers_end_when_no_worker_reads_them() {
        let login = |host: &str| {
            let login = Login {
                host: host.to_owned(),
                port: 1883,
                client_id: "fwo0".to_owned(),
                username: "fleet".to_owned(),
                password: "secret".into(),
                tls: None,
                addresses: None,
            };
            (Arc::from(host), Arc::new(login))
        };
        let logins = [login("far"), login("further")].into();
        let sessions = ["far", "far/1", "further", "ours"].map(|name| (name.to_owned(), vec![])).into();
        let found = |read: &[&str]| -> Vec<(String, String)> {
            let read: Vec<String> = read.iter().map(|name| (*name).to_owned()).collect();
            choose(&sessions, &logins, "uid", &read).into_iter().map(|unread| (unread.name, unread.login.client_id)).collect()
        };
        let first = name::external_ingest_client("uid", "far");
        let of_far = [("far".to_owned(), first.clone()), ("far/1".to_owned(), name::external_session_client(&first, 1))];
        assert_eq!(found(&["further", "ours"]), of_far);
        assert_eq!(found(&["far"]), [("further".to_owned(), name::external_ingest_client("uid", "further"))]);
        assert_eq!(found(&[]).len(), 3);
        let clients: BTreeSet<String> = found(&[]).into_iter().map(|(_, client)| client).collect();
        assert!(clients.len() == 3 && clients.iter().all(|client| client.len() == 19), "{clients:?}");
    }

    #[test]
    fn the_note_about_remaining_sessions_has_the_cause_and_the_client_identifiers() {
        let pipeline = crate::operator::pipeline::validate::tests::pipeline(serde_json::json!({}));
        let gateways: Vec<Arc<str>> = ["far", "further", "c", "d", "e"].map(Arc::from).into();
        let cause = Cause::new(Reason::DatabaseUnavailable, "connection refused");
        let note = left_behind(&pipeline, gateways.iter(), &cause);
        let client = |gateway: &str| name::external_ingest_client(&pipeline.uid().unwrap_or_default(), gateway);
        for (part, expected) in
            [("found: connection refused.", true), (&*client("far"), true), (&*client("d"), true), (&*client("e"), false)]
        {
            assert_eq!(note.contains(part), expected, "{part}: {note}");
        }
        assert!(note.len() < 1024, "the limit of an Event's note: {note}");
    }
}
