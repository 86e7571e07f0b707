//! Keeps the registry of one database equal to the Devices of one namespace.

use std::collections::HashSet;
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::{broadcast, watch};
use tokio::time::{Instant, sleep, sleep_until, timeout};
use tokio_util::sync::CancellationToken;
use tracing::{info, warn};

use super::connection::{DatabaseConnection, RegistryState, SessionGuard};
use crate::api::condition::Cause;
use crate::api::reason::Reason;
use crate::operator::device::index::SharedDeviceIndex;
use crate::operator::device::key::DeviceKey;
use crate::runtime::backoff::Backoff;
use crate::runtime::error::chain;
use crate::state::registry::DeviceRow;
use crate::state::registry::fill::{FillError, change, sync};

/// Changes are collected for this long: one statement for a file of Devices, and still well before the broker has loaded them.
const GATHERING: Duration = Duration::from_millis(50);

/// Interval between full comparisons of the registry, which correct manual changes of rows. A comparison of 100,000 devices takes the
/// database less than a second.
const COMPARISON_INTERVAL: Duration = Duration::from_mins(5);

/// The delay after the first failure; it doubles up to [`MAX_RETRY_DELAY`].
const INITIAL_RETRY_DELAY: Duration = Duration::from_secs(1);

/// The longest delay after a failure.
const MAX_RETRY_DELAY: Duration = Duration::from_secs(15);

/// The Devices and their changes.
#[derive(Clone)]
pub struct Devices {
    /// All Devices.
    pub fleet: SharedDeviceIndex,
    /// Devices whose row may have changed.
    pub changes: broadcast::Sender<DeviceKey>,
    /// Cancelled once all Devices have been listed; before that a row without a Device is not an error.
    pub listed: CancellationToken,
}

/// Fills the registry when its table exists, and then follows the Devices. Never ends.
pub async fn keep(connection: Arc<DatabaseConnection>, devices: Devices) {
    let namespace = connection.namespace().namespace.clone();
    devices.listed.cancelled().await;
    let mut wanted = connection.wanted_fill();
    let mut backoff = Backoff::new(INITIAL_RETRY_DELAY, MAX_RETRY_DELAY);
    loop {
        // The connection owns the sender.
        if wanted.wait_for(|number| *number > 0).await.is_err() {
            return;
        }
        wanted.mark_unchanged();
        let mut changes = devices.changes.subscribe();
        let outcome = match fill(&connection, &devices).await {
            Ok(()) => {
                backoff.reset();
                connection.set_registry(RegistryState::Filled);
                follow(&connection, &devices, &mut changes, &mut wanted).await
            }
            Err(cause) => Err(cause),
        };
        if let Err(cause) = outcome {
            warn!(namespace, reason = %cause.reason, message = cause.message, "failed to write a device registry, retrying");
            connection.set_registry(RegistryState::Failed(cause));
            // A new connection, or the creation of the missing table, ends the delay early.
            let _ = timeout(backoff.next_delay(), wanted.changed()).await;
        }
    }
}

async fn fill(connection: &DatabaseConnection, devices: &Devices) -> Result<(), Cause> {
    let namespace = connection.namespace();
    let mut session = connection.session().await?;
    // The list is read while the connection is locked: an older list must not overwrite a newer one.
    let rows = devices.fleet.lock().registry(&namespace.namespace);
    let changed = settle(sync(session.client()?, namespace, &rows).await, session)?;
    if changed > 0 {
        info!(namespace = namespace.namespace, devices = rows.len(), changed, "filled the device registry");
    }
    Ok(())
}

/// Writes changes until the registry needs a full comparison again.
async fn follow(
    connection: &DatabaseConnection,
    devices: &Devices,
    changes: &mut broadcast::Receiver<DeviceKey>,
    wanted: &mut watch::Receiver<u64>,
) -> Result<(), Cause> {
    let comparison = Instant::now() + COMPARISON_INTERVAL;
    let namespace = connection.namespace();
    loop {
        let key = tokio::select! {
            change = changes.recv() => match change {
                Ok(key) => key,
                Err(_) => return Ok(()),
            },
            _ = wanted.changed() => return Ok(()),
            () = sleep_until(comparison) => return Ok(()),
        };
        if *key.gateway.namespace != *namespace.namespace {
            continue;
        }
        sleep(GATHERING).await;
        let mut keys = HashSet::from([key]);
        loop {
            match changes.try_recv() {
                Ok(key) if *key.gateway.namespace == *namespace.namespace => drop(keys.insert(key)),
                Ok(_) => {}
                Err(broadcast::error::TryRecvError::Empty) => break,
                Err(_) => return Ok(()),
            }
        }
        let mut session = connection.session().await?;
        let (rows, gone) = rows(devices, keys);
        settle(change(session.client()?, namespace, &rows, &gone).await, session)?;
    }
}

/// The rows of these Devices, and name and Gateway of the deleted ones.
fn rows(devices: &Devices, keys: HashSet<DeviceKey>) -> (Vec<DeviceRow>, Vec<(String, String)>) {
    let fleet = devices.fleet.lock();
    let (mut rows, mut gone) = (Vec::new(), Vec::new());
    for key in keys {
        match fleet.registry_device(&key) {
            Some(row) => rows.push(row),
            None => gone.push((key.name.to_string(), key.gateway.name.to_string())),
        }
    }
    (rows, gone)
}

/// Converts an error into a cause; closes a connection that does not answer.
fn settle(result: Result<u64, FillError>, session: SessionGuard<'_>) -> Result<u64, Cause> {
    result.map_err(|error| {
        if matches!(error, FillError::AwaitAnswer) {
            session.discard();
        }
        Cause::new(Reason::RegistryNotWritten, chain(&error))
    })
}
