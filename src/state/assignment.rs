//! The assignment of gateways to the workers of a Pipeline. The operator writes it, and each worker takes over its sessions.
//!
//! The unit of assignment is a session with the broker of a gateway. Usually a gateway has one session, with its name. If several
//! sessions share a subscription, the others have a number as suffix.

use std::collections::BTreeMap;

use tokio_postgres::types::Type;
use tokio_postgres::{Client, Error, GenericClient, Transaction};

use super::owner::{Owner, Parameter};
use super::system::SCHEMA;

/// Workers by session, as ordinals.
pub type Assignment = BTreeMap<String, i32>;

/// The sessions that a broker may hold, with the topic filters that it may hold for each.
pub type Sessions = BTreeMap<String, Vec<String>>;

/// What a worker needs to know about the assignment.
#[derive(Clone, Debug, Default, Eq, PartialEq)]
pub struct Assigned {
    /// The worker of each session.
    pub workers: Assignment,
    /// The sessions that exist.
    pub sessions: Sessions,
}

/// The name of a session of a gateway. The name of a gateway has no slash.
#[must_use]
pub fn session_name(gateway: &str, number: i32) -> String {
    if number == 0 { gateway.to_owned() } else { format!("{gateway}/{number}") }
}

/// The gateway and the number of a session, from its name.
#[must_use]
pub fn gateway_of(session: &str) -> (&str, i32) {
    session.split_once('/').and_then(|(gateway, number)| Some((gateway, number.parse().ok()?))).unwrap_or((session, 0))
}

/// The worker of a session; without an assignment, the first worker.
#[must_use]
pub fn worker_of(assignment: &Assignment, session: &str) -> i32 {
    assignment.get(session).copied().unwrap_or(0)
}

/// The assignment of these gateways to a number of workers: numbers of gateways differ by at most one, and as few as possible are moved.
/// Empty for a single worker.
#[must_use]
pub fn assign(previous: &Assignment, gateways: &[String], workers: i32) -> Assignment {
    let Some(count) = usize::try_from(workers).ok().filter(|count| *count > 1) else { return Assignment::new() };
    let (share, mut with_one_more) = (gateways.len() / count, gateways.len() % count);
    let mut loads = vec![0; count];
    let mut assignment = Assignment::new();
    for gateway in gateways {
        let worker = worker_of(previous, gateway);
        let Some(load) = usize::try_from(worker).ok().and_then(|index| loads.get_mut(index)) else { continue };
        if *load == share && with_one_more > 0 {
            with_one_more -= 1;
        } else if *load >= share {
            continue;
        }
        *load += 1;
        assignment.insert(gateway.clone(), worker);
    }
    for gateway in gateways {
        if !assignment.contains_key(gateway)
            && let Some((index, load)) = loads.iter_mut().enumerate().min_by_key(|(_, load)| **load)
        {
            *load += 1;
            assignment.insert(gateway.clone(), i32::try_from(index).unwrap_or(0));
        }
    }
    assignment
}

/// Reads the assignment of a Pipeline, and its sessions.
///
/// # Errors
/// When the query fails.
pub async fn read_assigned(client: &Client, owner: &Owner) -> Result<Assigned, Error> {
    let (workers, sessions) = tokio::try_join!(read(client, owner), read_sessions(client, owner))?;
    Ok(Assigned { workers, sessions })
}

/// Reads the sessions of a Pipeline.
///
/// # Errors
/// When the query fails.
pub async fn read_sessions(client: &impl GenericClient, owner: &Owner) -> Result<Sessions, Error> {
    let statement = format!(
        "SELECT substr(session, length($1) + 1), topic_filters FROM {SCHEMA}.session WHERE cluster = $2 AND starts_with(session, $1)"
    );
    let rows = client.query_typed(&statement, &[(&owner.sessions(), Type::TEXT), (&owner.cluster, Type::TEXT)]).await?;
    rows.iter().map(|row| Ok((row.try_get(0)?, row.try_get(1)?))).collect()
}

/// Deletes sessions of a Pipeline that have ended.
///
/// # Errors
/// Nothing is deleted then.
pub async fn forget_sessions(client: &mut Client, owner: &Owner, names: &[String]) -> Result<(), Error> {
    let sessions: Vec<String> = names.iter().map(|name| format!("{}{name}", owner.sessions())).collect();
    let transaction = client.transaction().await?;
    delete_sessions(&transaction, owner, "session = ANY($2)", (&sessions, Type::TEXT_ARRAY)).await?;
    transaction.commit().await
}

/// Deletes all sessions of a Pipeline.
///
/// # Errors
/// When a statement fails.
pub async fn forget_all_sessions(transaction: &Transaction<'_>, owner: &Owner) -> Result<(), Error> {
    delete_sessions(transaction, owner, "starts_with(session, $2)", (&owner.sessions(), Type::TEXT)).await
}

/// Deletes sessions with their redelivery entries.
async fn delete_sessions(transaction: &Transaction<'_>, owner: &Owner, condition: &str, sessions: Parameter<'_>) -> Result<(), Error> {
    for of_sessions in ["session", "acknowledgement"] {
        let statement = format!("DELETE FROM {SCHEMA}.{of_sessions} WHERE cluster = $1 AND {condition}");
        transaction.execute_typed(&statement, &[(&owner.cluster, Type::TEXT), sessions.clone()]).await?;
    }
    Ok(())
}

/// Reads the assignment of a Pipeline.
///
/// # Errors
/// When the query fails.
pub async fn read(client: &impl GenericClient, owner: &Owner) -> Result<Assignment, Error> {
    let statement = format!("SELECT gateway, worker FROM {SCHEMA}.assignment WHERE {}", Owner::CONDITION);
    let rows = client.query_typed(&statement, &owner.parameters()).await?;
    rows.iter().map(|row| Ok((row.try_get(0)?, row.try_get(1)?))).collect()
}

/// Assigns the sessions of a Pipeline to its workers. Returns whether that changed the assignment.
///
/// # Errors
/// Nothing is changed then.
pub async fn spread(client: &mut Client, owner: &Owner, sessions: &[String], workers: i32) -> Result<bool, Error> {
    let transaction = client.transaction().await?;
    let previous = read(&transaction, owner).await?;
    let wanted = assign(&previous, sessions, workers);
    if wanted == previous {
        return Ok(false);
    }
    let (names, ordinals): (Vec<&String>, Vec<i32>) = wanted.iter().unzip();
    let delete = format!("DELETE FROM {SCHEMA}.assignment WHERE {}", Owner::CONDITION);
    let insert = format!(
        "INSERT INTO {SCHEMA}.assignment (cluster, namespace, pipeline, gateway, worker)
         SELECT $1, $2, $3, gateway, worker FROM unnest($4, $5) AS new (gateway, worker)"
    );
    transaction.execute_typed(&delete, &owner.parameters()).await?;
    let [cluster, namespace, pipeline] = owner.parameters();
    let columns: [Parameter<'_>; 5] = [cluster, namespace, pipeline, (&names, Type::TEXT_ARRAY), (&ordinals, Type::INT4_ARRAY)];
    transaction.execute_typed(&insert, &columns).await?;
    transaction.commit().await?;
    Ok(true)
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use proptest::prelude::*;

    use super::*;

    fn names(count: usize) -> Vec<String> {
        (0..count).map(|number| format!("plant-{number}")).collect()
    }

    #[test]
    fn a_session_is_named_after_its_gateway() {
        for (gateway, number, name) in [("plant-1", 0, "plant-1"), ("plant-1", 12, "plant-1/12")] {
            assert_eq!(session_name(gateway, number), name);
            assert_eq!(gateway_of(name), (gateway, number));
        }
    }

    proptest! {
        #[test]
        fn every_gateway_has_one_worker_and_every_worker_its_share(
            before in 1_i32..9, after in 1_i32..9, gateways in 0_usize..40, more in 0_usize..5,
        ) {
            let previous = assign(&Assignment::new(), &names(gateways), before);
            let gateways = names(gateways + more);
            let assignment = assign(&previous, &gateways, after);
            prop_assert_eq!(&assign(&assignment, &gateways, after), &assignment, "the second time nothing moves");
            let mut loads = vec![0; usize::try_from(after).unwrap()];
            for gateway in &gateways {
                loads[usize::try_from(worker_of(&assignment, gateway)).unwrap()] += 1;
            }
            prop_assert!(loads.iter().max().unwrap() - loads.iter().min().unwrap() <= 1, "{:?}", loads);
        }

        #[test]
        fn no_more_move_than_the_new_workers_take(before in 1_i32..6, more in 1_i32..6, gateways in 0_usize..40) {
            let gateways = names(gateways);
            let previous = assign(&Assignment::new(), &gateways, before);
            let assignment = assign(&previous, &gateways, before + more);
            let moved: BTreeSet<_> = gateways.iter().filter(|gateway| worker_of(&previous, gateway) != worker_of(&assignment, gateway)).collect();
            let taken = gateways.iter().filter(|gateway| worker_of(&assignment, gateway) >= before).count();
            prop_assert_eq!(moved.len(), taken);
        }
    }
}
