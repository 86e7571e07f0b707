//! Devices that publish continuously during faults, and a record of the acknowledged messages.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use serde_json::json;
use tokio::task::JoinHandle;

use crate::client::{Listener, Program};
use crate::database::Database;
use crate::wait::{seconds, until};

/// Maximum time after the end of the faults until all acknowledged readings are in the table.
const STORED_WITHIN: Duration = seconds(90);

/// A reading: the device, and the time in milliseconds, which is also the value.
pub type Reading = (String, i64);

#[derive(Default)]
struct Seen {
    acknowledged: BTreeSet<Reading>,
    connected: usize,
    outstanding: Option<usize>,
}

/// Publishing devices (`e2e/clients/publisher.py`).
pub struct Publisher {
    seen: Arc<Mutex<Seen>>,
    stop: tokio::sync::oneshot::Sender<()>,
    reader: JoinHandle<Result<()>>,
}

impl Publisher {
    /// Starts devices (name, password) that each publish this number of readings per second to `devices/<name>/telemetry`.
    pub async fn start(listener: &Listener, devices: &BTreeMap<String, String>, rate: f64) -> Result<Self> {
        let mut settings = listener.settings();
        settings["topic"] = "devices/{device}/telemetry".into();
        settings["rate"] = json!(rate);
        settings["devices"] = json!(devices);
        let program = Program::start("publisher.py", &settings).await?;
        let seen = Arc::new(Mutex::new(Seen::default()));
        let (stop, stopped) = tokio::sync::oneshot::channel();
        let reader = tokio::spawn(read(program, Arc::clone(&seen), stopped));
        Ok(Self { seen, stop, reader })
    }

    /// Number of readings that the broker has acknowledged.
    #[must_use]
    pub fn acknowledged(&self) -> usize {
        self.seen().acknowledged.len()
    }

    /// Number of connections of all devices. It exceeds the number of devices when connections were lost.
    #[must_use]
    pub fn connections(&self) -> usize {
        self.seen().connected
    }

    /// Waits until the broker has acknowledged this number of further readings.
    pub async fn more(&self, number: usize) -> Result<()> {
        let wanted = self.acknowledged() + number;
        until(seconds(60), format!("{number} more readings are acknowledged"), async || {
            ensure!(self.acknowledged() >= wanted, "{} of {wanted} are acknowledged", self.acknowledged());
            Ok(())
        })
        .await
    }

    /// Stops the devices and returns all acknowledged readings.
    ///
    /// # Errors
    /// Fails when a reading was never acknowledged, which means that the broker did not recover.
    pub async fn stop(self) -> Result<BTreeSet<Reading>> {
        // The reader ends with the program, whose exit status reports failures.
        let _ = self.stop.send(());
        self.reader.await??;
        let mut seen = self.seen.lock().unwrap_or_else(PoisonError::into_inner);
        let outstanding = seen.outstanding.context("the publisher ended without its last line")?;
        ensure!(outstanding == 0, "{outstanding} readings were never acknowledged");
        Ok(std::mem::take(&mut seen.acknowledged))
    }

    fn seen(&self) -> std::sync::MutexGuard<'_, Seen> {
        self.seen.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

async fn read(mut program: Program, seen: Arc<Mutex<Seen>>, mut stopped: tokio::sync::oneshot::Receiver<()>) -> Result<()> {
    let mut ending = false;
    loop {
        let line = tokio::select! {
            line = program.line() => line?,
            _ = &mut stopped, if !ending => {
                ending = true;
                program.end();
                continue;
            }
        };
        let Some(line) = line else { return Ok(()) };
        let words: Vec<&str> = line.split(' ').collect();
        let mut seen = seen.lock().unwrap_or_else(PoisonError::into_inner);
        match words[..] {
            ["acknowledged", device, time] => drop(seen.acknowledged.insert((device.to_owned(), time.parse()?))),
            ["connected", ..] => seen.connected += 1,
            ["outstanding", number] => seen.outstanding = Some(number.parse()?),
            _ => eprintln!("  publisher: {line}"),
        }
    }
}

/// Waits until every acknowledged reading is in the table. Readings are identified by value.
pub async fn stored(database: &Database, table: &str, acknowledged: &BTreeSet<Reading>) -> Result<()> {
    ensure!(!acknowledged.is_empty(), "no reading was acknowledged, so the check would be empty");
    until(STORED_WITHIN, format!("{} acknowledged readings are in {table}", acknowledged.len()), async || {
        ensure_none_missing(database, table, "value::bigint", acknowledged).await
    })
    .await
}

/// Checks that each reading is stored with the time of its message. For Pipelines that take the time from the message.
pub async fn stored_at_their_times(database: &Database, table: &str, acknowledged: &BTreeSet<Reading>) -> Result<()> {
    ensure_none_missing(database, table, "(extract(epoch FROM time) * 1000)::bigint", acknowledged).await
}

/// Number of readings that are in the table more than once.
pub async fn stored_twice(database: &Database, table: &str) -> Result<i64> {
    let sql = format!("SELECT count(*) FROM (SELECT FROM {table} GROUP BY device_id, value HAVING count(*) > 1) AS twice");
    database.number(&sql).await
}

async fn ensure_none_missing(database: &Database, table: &str, column: &str, acknowledged: &BTreeSet<Reading>) -> Result<()> {
    let sql = format!("SELECT device.name, {column} FROM {table} JOIN fleetwright.device ON device.id = {table}.device_id");
    let there: BTreeSet<Reading> = database.rows(&sql, &[]).await?.iter().map(|row| (row.get(0), row.get(1))).collect();
    let missing: Vec<_> = acknowledged.difference(&there).collect();
    ensure!(missing.is_empty(), "{} are missing, the first {:?}, the last {:?}", missing.len(), missing.first(), missing.last());
    Ok(())
}
