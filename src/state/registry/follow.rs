//! The read side of the registry: the devices of one namespace, held in memory and followed by notifications.

use std::collections::{HashMap, HashSet};
use std::sync::{Arc, Mutex, PoisonError, RwLock, RwLockReadGuard};
use std::time::{Duration, Instant};

use tokio::sync::{Notify, watch};
use tokio::task::JoinSet;
use tokio::time::{sleep, timeout};
use tokio_postgres::{AsyncMessage, Client};
use tokio_util::sync::CancellationToken;
use tracing::{info, warn};

use crate::database::connect::{ConnectError, DatabaseConnection, connect};
use crate::database::uri::ConnectionUri;
use crate::runtime::backoff::Backoff;
use crate::runtime::error::chain;
use crate::state::owner::ClusterNamespace;
use crate::state::system::{DEVICE_CHANNEL, SCHEMA};

/// How long a name stays unknown without a notification from the database. A notification about the namespace ends this earlier; the
/// limit is for a lost notification.
const UNKNOWN_FOR: Duration = Duration::from_mins(1);

/// The most unknown names that are kept, about 100 bytes each. Beyond it all are removed.
const MAX_UNKNOWN_NAMES: usize = 10_000;

/// How long a query may take before the connection is considered lost.
const QUERY_TIMEOUT: Duration = Duration::from_secs(30);

/// The first delay before another attempt to connect.
const INITIAL_BACKOFF: Duration = Duration::from_millis(100);

/// The longest delay before another attempt to connect. Known devices keep working meanwhile.
const MAX_BACKOFF: Duration = Duration::from_secs(5);

/// The shortest time for which notifications are collected before the devices are loaded again. A load takes about a microsecond per
/// device. The wait is ten times the duration of the last load, so that many declarations cost a tenth of a processor.
const MIN_GATHER: Duration = Duration::from_millis(50);

/// The shortest time between two queries for the names of messages that wait. With a thousand names in each, they cost the database a
/// hundredth of a processor.
const MIN_QUERY_INTERVAL: Duration = Duration::from_millis(100);

/// A device in the registry.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Device {
    /// Its id: `device_id` in the tables.
    pub id: i32,
    /// Name of its Gateway.
    pub gateway: Box<str>,
    /// Whether its readings are stored.
    pub enabled: bool,
}

/// The answer of the registry to a name.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Lookup<'a> {
    /// The name of a device.
    Known(&'a Device),
    /// Not the name of a device, according to two queries.
    Unknown,
    /// The database has not answered yet.
    Pending,
}

/// The devices in memory.
#[derive(Debug, Default)]
pub struct Devices {
    known: HashMap<Box<str>, Device>,
    unknown: HashMap<Box<str>, Instant>,
    /// Whether `known` has all devices: other names are unknown.
    is_complete: bool,
}

impl Devices {
    /// The devices of a namespace as they are now. Later changes are not followed, and every other name is unknown.
    ///
    /// # Errors
    /// When the query fails.
    pub async fn load(client: &Client, namespace: &ClusterNamespace) -> Result<Self, tokio_postgres::Error> {
        Ok(Self { known: read(client, namespace).await?, is_complete: true, ..Self::default() })
    }

    /// Looks a name up.
    #[must_use]
    pub fn look_up(&self, name: &str) -> Lookup<'_> {
        if let Some(device) = self.known.get(name) {
            return Lookup::Known(device);
        }
        match self.unknown.get(name) {
            Some(since) if since.elapsed() < UNKNOWN_FOR => Lookup::Unknown,
            _ if self.is_complete => Lookup::Unknown,
            _ => Lookup::Pending,
        }
    }

    fn set_unknown(&mut self, names: Vec<Box<str>>) {
        if self.unknown.len() + names.len() > MAX_UNKNOWN_NAMES {
            self.unknown.clear();
        }
        self.unknown.extend(names.into_iter().map(|name| (name, Instant::now())));
    }
}

/// A registry that [`follow`] keeps current.
#[derive(Debug)]
pub struct DeviceRegistry {
    devices: RwLock<Devices>,
    wanted: Mutex<HashSet<Box<str>>>,
    asked: Notify,
    changes: watch::Sender<Follower>,
    grace: Duration,
}

/// The state of [`follow`].
#[derive(Clone, Debug, Default, Eq, PartialEq)]
pub struct Follower {
    /// Raised with every answer and every change. 0 before the devices are loaded.
    pub version: u64,
    /// Why the devices are not current; `None` when they are.
    pub failure: Option<String>,
}

impl DeviceRegistry {
    /// An empty registry. `grace` is the time between the first query for an unknown name and the second, after which the name is
    /// unknown: a device may publish immediately after it was declared, and the operator writes its row within the next second.
    #[must_use]
    pub fn new(grace: Duration) -> Self {
        let starting = Follower { version: 0, failure: Some("the devices are not loaded yet".to_owned()) };
        let changes = watch::Sender::new(starting);
        Self { devices: RwLock::default(), wanted: Mutex::default(), asked: Notify::new(), changes, grace }
    }

    /// The devices. The guard must be held for a short time only.
    pub fn read(&self) -> RwLockReadGuard<'_, Devices> {
        // No writer panics.
        self.devices.read().unwrap_or_else(PoisonError::into_inner)
    }

    /// Requests a query for a name whose [`Lookup`] is pending. The answer raises the version.
    pub fn ask(&self, name: &str) {
        self.wanted.lock().unwrap_or_else(PoisonError::into_inner).insert(name.into());
        self.asked.notify_one();
    }

    /// Watches the state of the follower.
    #[must_use]
    pub fn watch(&self) -> watch::Receiver<Follower> {
        self.changes.subscribe()
    }

    fn write(&self, change: impl FnOnce(&mut Devices)) {
        change(&mut self.devices.write().unwrap_or_else(PoisonError::into_inner));
        self.changes.send_modify(|follower| {
            follower.version += 1;
            follower.failure = None;
        });
    }

    /// Simulates an answer of the database.
    #[cfg(test)]
    pub fn answer(&self, name: &str, device: Option<Device>) {
        self.write(|devices| match device {
            Some(device) => drop(devices.known.insert(name.into(), device)),
            None => devices.set_unknown(vec![name.into()]),
        });
    }

    /// Whether the devices are loaded and their changes are followed.
    #[must_use]
    pub fn is_current(&self) -> bool {
        let follower = self.changes.borrow();
        follower.version > 0 && follower.failure.is_none()
    }

    fn take_wanted(&self) -> HashSet<Box<str>> {
        std::mem::take(&mut *self.wanted.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

#[derive(Debug, thiserror::Error)]
enum FollowError {
    #[error(transparent)]
    Connect(#[from] ConnectError),
    #[error("failed to read the registry of devices")]
    Query(#[from] tokio_postgres::Error),
    #[error("failed to get an answer from the database in {} s", QUERY_TIMEOUT.as_secs())]
    Await,
    #[error("the connection to the database ended")]
    End,
}

/// Keeps the registry current until `shutdown`: loads the devices, and follows their changes. Connects again whenever the
/// connection is lost.
pub async fn follow(registry: Arc<DeviceRegistry>, uri: ConnectionUri, namespace: ClusterNamespace, shutdown: CancellationToken) {
    let mut backoff = Backoff::new(INITIAL_BACKOFF, MAX_BACKOFF);
    loop {
        let failure = tokio::select! {
            () = shutdown.cancelled() => return,
            Err(failure) = follow_once(&registry, &uri, &namespace, &mut backoff) => failure,
        };
        let failure = chain(&failure);
        warn!(failure, "failed to follow the registry of devices");
        registry.changes.send_modify(|follower| follower.failure = Some(failure));
        tokio::select! {
            () = shutdown.cancelled() => return,
            () = backoff.wait() => {}
        }
    }
}

/// Never returns `Ok`.
async fn follow_once(
    registry: &DeviceRegistry,
    uri: &ConnectionUri,
    namespace: &ClusterNamespace,
    backoff: &mut Backoff,
) -> Result<(), FollowError> {
    let (client, connection) = connect(uri, "fleetwright registry").await?;
    let changed = Arc::new(Notify::new());
    // Ends with this function.
    let mut driver = JoinSet::new();
    driver.spawn(drive(connection, namespace.namespace.clone(), changed.clone()));
    bounded(client.batch_execute(&format!("LISTEN {DEVICE_CHANNEL}"))).await?;
    let mut gather = load(registry, &client, namespace).await?;
    backoff.reset();
    let mut second_queries: Vec<(Instant, HashSet<Box<str>>)> = Vec::new();
    let (mut is_asked, mut next_answer) = (false, Instant::now());
    loop {
        let next_query = second_queries.first().map(|(at, _)| *at);
        tokio::select! {
            () = changed.notified() => {
                // Notifications that arrive meanwhile are covered by the next load.
                sleep(gather).await;
                gather = load(registry, &client, namespace).await?;
            }
            () = registry.asked.notified() => is_asked = true,
            () = tokio::time::sleep_until(next_answer.into()), if is_asked => {
                is_asked = false;
                let mut names = registry.take_wanted();
                // A name whose second query is due later is not queried again.
                names.retain(|name| !second_queries.iter().any(|(_, waiting)| waiting.contains(name)));
                if names.is_empty() {
                    continue;
                }
                next_answer = Instant::now() + MIN_QUERY_INTERVAL;
                let missing = find(registry, &client, namespace, names).await?;
                if !missing.is_empty() {
                    second_queries.push((Instant::now() + registry.grace, missing));
                }
            }
            () = tokio::time::sleep_until(next_query.unwrap_or_else(Instant::now).into()), if next_query.is_some() => {
                let (_, names) = second_queries.remove(0);
                let missing = find(registry, &client, namespace, names).await?;
                registry.write(|devices| devices.set_unknown(missing.into_iter().collect()));
            }
            _ = driver.join_next() => return Err(FollowError::End),
        }
    }
}

/// Loads all devices of the namespace. Returns how long to collect notifications before the next load.
async fn load(registry: &DeviceRegistry, client: &Client, namespace: &ClusterNamespace) -> Result<Duration, FollowError> {
    let started = Instant::now();
    let known = bounded(read(client, namespace)).await?;
    info!(devices = known.len(), "the devices are loaded");
    registry.write(|devices| {
        devices.unknown.retain(|name, _| !known.contains_key(name));
        devices.known = known;
    });
    Ok((started.elapsed() * 10).max(MIN_GATHER))
}

async fn read(client: &Client, namespace: &ClusterNamespace) -> Result<HashMap<Box<str>, Device>, tokio_postgres::Error> {
    let query = format!("SELECT name, id, gateway, enabled FROM {SCHEMA}.device WHERE cluster = $1 AND namespace = $2 AND declared");
    Ok(client.query(&query, &[&namespace.cluster, &namespace.namespace]).await?.iter().map(device).collect())
}

/// Queries names; returns those that do not exist.
async fn find(
    registry: &DeviceRegistry,
    client: &Client,
    namespace: &ClusterNamespace,
    mut names: HashSet<Box<str>>,
) -> Result<HashSet<Box<str>>, FollowError> {
    let query = format!(
        "SELECT name, id, gateway, enabled FROM {SCHEMA}.device WHERE cluster = $1 AND namespace = $2 AND name = ANY($3) AND declared"
    );
    let asked: Vec<&str> = names.iter().map(AsRef::as_ref).collect();
    let found: Vec<(Box<str>, Device)> =
        bounded(client.query(&query, &[&namespace.cluster, &namespace.namespace, &asked])).await?.iter().map(device).collect();
    for (name, _) in &found {
        names.remove(name);
    }
    registry.write(|devices| devices.known.extend(found));
    Ok(names)
}

fn device(row: &tokio_postgres::Row) -> (Box<str>, Device) {
    (row.get(0), Device { id: row.get(1), gateway: row.get(2), enabled: row.get(3) })
}

async fn bounded<T>(query: impl Future<Output = Result<T, tokio_postgres::Error>>) -> Result<T, FollowError> {
    Ok(timeout(QUERY_TIMEOUT, query).await.map_err(|_| FollowError::Await)??)
}

/// Drives the connection, and reports notifications about the namespace.
async fn drive(mut connection: DatabaseConnection, namespace: String, changed: Arc<Notify>) {
    while let Some(message) = std::future::poll_fn(|context| connection.poll_message(context)).await {
        match message {
            Ok(AsyncMessage::Notification(notification)) if notification.payload() == namespace => changed.notify_one(),
            Ok(_) => {}
            Err(error) => {
                warn!(failure = chain(&error), "the connection to the registry ended");
                return;
            }
        }
    }
}
