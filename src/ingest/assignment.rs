//! Polls the assignment of gateways to this worker. Because it polls every second, it also detects first that the database of an
//! idle worker is unavailable.

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

/// How often the assignment is polled: a gateway that moves to this worker is claimed within this time. A poll reads a few rows.
const INTERVAL: Duration = Duration::from_secs(1);

/// How long a poll may take.
const TIMEOUT: Duration = Duration::from_secs(10);

/// The number of this connection in [`DatabaseHealth`], after the writers.
const CONNECTION: usize = WRITERS;

/// The number of connections in [`Health`].
pub const CONNECTIONS: usize = WRITERS + 1;

#[derive(Debug, thiserror::Error)]
enum FollowError {
    #[error(transparent)]
    Connect(#[from] ConnectError),
    #[error("failed to read the assignment of this worker")]
    Read(#[from] tokio_postgres::Error),
    #[error("failed to read the assignment of this worker within {} s", TIMEOUT.as_secs())]
    Await,
}

/// Sends the assignment at each change, until `shutdown`. While the database is unavailable, the last known assignment applies.
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
        match poll(&uri, &owner, &mut client).await {
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
                    warn!(failure, "failed to poll the assignment; the last known one applies");
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

async fn poll(uri: &ConnectionUri, owner: &Owner, known: &mut Option<Client>) -> Result<Assigned, FollowError> {
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
