//! Follows which gateways are this worker's. Since it asks every second, this is also what notices first that an idle worker's
//! database is away.

use std::sync::Arc;
use std::time::Duration;

use tokio::sync::watch;
use tokio::time::{sleep, timeout};
use tokio_postgres::Client;
use tokio_util::sync::CancellationToken;
use tracing::warn;

use crate::database::connect::{ConnectError, connect, drive};
use crate::database::health::DatabaseHealth;
use crate::database::uri::ConnectionUri;
use crate::runtime::error::chain;
use crate::sink::timescale::writers::WRITERS;
use crate::state::assignment::{Assigned, read_assigned};
use crate::state::owner::Owner;

/// How often the database is asked: a gateway that moves to this worker is taken over within this time. One read of a few
/// rows.
const INTERVAL: Duration = Duration::from_secs(1);

/// How long an answer may take.
const TIMEOUT: Duration = Duration::from_secs(10);

/// This connection's number in [`DatabaseHealth`], behind those that write.
const CONNECTION: usize = WRITERS;

/// How many connections say together whether the database is there.
pub const CONNECTIONS: usize = WRITERS + 1;

#[derive(Debug, thiserror::Error)]
enum FollowError {
    #[error(transparent)]
    Connect(#[from] ConnectError),
    #[error("failed to read which gateways are this worker's")]
    Read(#[from] tokio_postgres::Error),
    #[error("failed to read which gateways are this worker's within {} s", TIMEOUT.as_secs())]
    Await,
}

/// Says what is assigned, again with every change, until `shutdown`. While the database is away, what it last said holds.
pub async fn follow(
    uri: ConnectionUri,
    owner: Owner,
    assigned: watch::Sender<Option<Assigned>>,
    health: Arc<DatabaseHealth>,
    shutdown: CancellationToken,
) {
    let mut client = None;
    let mut failing = false;
    while !shutdown.is_cancelled() {
        match ask(&uri, &owner, &mut client).await {
            Ok(found) => {
                failing = false;
                health.answers(CONNECTION);
                assigned.send_if_modified(|known| {
                    let changed = known.as_ref() != Some(&found);
                    *known = Some(found);
                    changed
                });
            }
            Err(failure) => {
                client = None;
                let answered = matches!(&failure, FollowError::Read(error) if error.code().is_some());
                let failure = chain(&failure);
                health.fails(CONNECTION, &failure, answered);
                if !failing {
                    warn!(failure, "nobody tells which gateways are this worker's; what was told last holds");
                }
                failing = true;
            }
        }
        tokio::select! {
            () = shutdown.cancelled() => {}
            () = sleep(INTERVAL) => {}
        }
    }
}

async fn ask(uri: &ConnectionUri, owner: &Owner, known: &mut Option<Client>) -> Result<Assigned, FollowError> {
    let client = match known {
        Some(client) => client,
        None => {
            let (client, connection) = connect(uri, "fleetwright ingest assignment").await?;
            drive(connection);
            known.insert(client)
        }
    };
    Ok(timeout(TIMEOUT, read_assigned(client, owner)).await.map_err(|_| FollowError::Await)??)
}
