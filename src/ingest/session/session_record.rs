//! The session's record in the database. It exists from before the broker creates the session until after the broker has ended it.

use tracing::{info, warn};

use super::{IngestSession, RunningSession, SessionEnd, retry_backoff};
use crate::runtime::error::chain;
use crate::state::session;

impl IngestSession {
    /// Claims the session in the database. Retries until that succeeds.
    pub(super) async fn open(&self) -> Result<session::OpenedSession, SessionEnd> {
        let mut backoff = retry_backoff();
        loop {
            let attempt = session::open(&self.uri, (&self.cluster, &self.name), &self.gateway.name, self.filter.as_deref());
            tokio::select! {
                () = self.shutdown.cancelled() => return Err(SessionEnd::Stopped),
                opened = attempt => match opened {
                    Ok(opened) => return opened.ok_or(SessionEnd::Drained),
                    Err(failure) => {
                        let failure = chain(&failure);
                        warn!(session = self.name, failure, "failed to claim the session in the database: retrying");
                        self.readiness.fails(&self.check, format!("waits for the database: {failure}"));
                    }
                }
            }
            if self.shutdown.run_until_cancelled(backoff.wait()).await.is_none() {
                return Err(SessionEnd::Stopped);
            }
        }
    }
}

impl RunningSession {
    /// The broker has ended all subscriptions but the configured one: the record follows, in a task.
    pub(super) fn forget_stale(&mut self) {
        info!(gateway = self.gateway.name, filters = ?self.stale, "unsubscribed");
        self.stale.clear();
        let (uri, key, filter, shutdown) = (self.uri.clone(), self.in_flight.key().clone(), self.filter.clone(), self.shutdown.clone());
        tokio::spawn(async move {
            // Other sessions may wait for this record. If it is never written, the next start unsubscribes again, which has no effect.
            let mut backoff = retry_backoff();
            while let Err(failure) = session::set_filter(&uri, &key, &filter).await {
                warn!(session = key.name, failure = chain(&failure), "failed to record the ended subscriptions: retrying");
                if shutdown.run_until_cancelled(backoff.wait()).await.is_none() {
                    return;
                }
            }
        });
    }

    /// Deletes the session's record. Retries until that succeeds.
    pub(super) async fn forget(&self) -> SessionEnd {
        let mut backoff = retry_backoff();
        while let Err(failure) = session::delete(&self.uri, self.in_flight.key()).await {
            warn!(session = self.in_flight.key().name, failure = chain(&failure), "failed to delete the record of the session: retrying");
            if self.shutdown.run_until_cancelled(backoff.wait()).await.is_none() {
                return SessionEnd::Stopped;
            }
        }
        info!(session = self.in_flight.key().name, "drained and ended the session");
        SessionEnd::Drained
    }

    /// Checks whether another worker has claimed the session: that worker's login ended this connection, and another login here would
    /// end that worker's.
    pub(super) async fn check_claim(&self) {
        match session::is_held(&self.uri, self.in_flight.key()).await {
            Ok(true) => {}
            Ok(false) => self.lost.cancel(),
            // A claim needs the database, so no worker can have claimed the session. A commit checks the claim in any case.
            Err(failure) => {
                warn!(session = self.in_flight.key().name, failure = chain(&failure), "failed to check which worker holds the session");
            }
        }
    }
}
