//! Commits the messages that a session holds, before it reconnects or stops.

use std::time::Duration;

use tokio::time::timeout;
use tracing::warn;

use super::RunningSession;
use crate::mqtt::connection::PacketConnection;

/// How long an orderly stop waits for commits. It is less than the termination grace period of a pod (30 s). The broker keeps the
/// messages that are not committed by then.
const MAX_STOP: Duration = Duration::from_secs(20);

impl RunningSession {
    /// Commits everything that was read. `false` if the worker stops before that.
    pub(super) async fn settle(&mut self) -> bool {
        let mut devices = self.registry.watch();
        while !self.in_flight.is_settled() {
            self.in_flight.update_gauges();
            let due = self.in_flight.due().is_some();
            tokio::select! {
                () = self.shutdown.cancelled() => return false,
                Some(finished) = self.finished.recv() => self.in_flight.finished(finished),
                Some(slot) = self.sink.slot(), if due => self.submit(slot),
                Ok(()) = devices.changed() => self.in_flight.take_parked(),
            }
        }
        true
    }

    /// Commits and acknowledges as many messages as possible in a bounded time, and disconnects so that the broker keeps the session.
    pub(super) async fn stop(&mut self, mut connection: PacketConnection) {
        // They are not committed, so the broker keeps them.
        self.in_flight.drop_waiting();
        let commits = async {
            while !self.in_flight.is_settled() {
                let due = self.in_flight.due().is_some();
                tokio::select! {
                    Some(finished) = self.finished.recv() => self.in_flight.finished(finished),
                    Some(slot) = self.sink.slot(), if due => self.submit(slot),
                }
            }
        };
        if timeout(MAX_STOP, commits).await.is_err() {
            warn!(gateway = self.gateway.name, "stopping before everything is committed; the broker keeps the rest");
        }
        if self.acknowledge(&mut connection).is_ok() {
            connection.close().await;
        }
    }
}
