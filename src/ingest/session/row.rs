//! The session's row in the database: it is there from before the broker is told of the session until after it has forgotten it.

use tracing::{info, warn};

use super::backoff::Backoff;
use super::{End, Running, Session};
use crate::runtime::error::chain;
use crate::state::session;

impl Session {
    /// Takes the session over in the database, however long that takes.
    pub(super) async fn open(&self) -> Result<session::OpenedSession, End> {
        let mut backoff = Backoff::default();
        loop {
            let attempt = session::open(&self.uri, &self.name, &self.gateway.name, self.filter.as_deref());
            tokio::select! {
                () = self.shutdown.cancelled() => return Err(End::Stopped),
                opened = attempt => match opened {
                    Ok(opened) => return opened.ok_or(End::Left),
                    Err(failure) => {
                        let failure = chain(&failure);
                        warn!(session = self.name, failure, "the session cannot begin yet");
                        self.readiness.fails(&self.check, format!("waits for the database: {failure}"));
                    }
                }
            }
            if !backoff.wait(&self.shutdown).await {
                return Err(End::Stopped);
            }
        }
    }
}

impl Running {
    /// The broker holds no other filter than the wanted one any more.
    pub(super) fn forget_stale(&mut self) {
        info!(gateway = self.gateway.name, filters = ?self.stale, "unsubscribed");
        self.stale.clear();
        let (uri, key, filter, shutdown) = (self.uri.clone(), self.store.key().clone(), self.filter.clone(), self.shutdown.clone());
        tokio::spawn(async move {
            // Other sessions may wait to read it there. What is never written down the next start does again, which does no harm.
            let mut backoff = Backoff::default();
            while let Err(failure) = session::set_filter(&uri, &key, &filter).await {
                warn!(session = key.name, failure = chain(&failure), "the ended subscriptions stay written down for now");
                if !backoff.wait(&shutdown).await {
                    return;
                }
            }
        });
    }

    /// Forgets in the database that there was this session, however long that takes.
    pub(super) async fn forget(&self) -> End {
        let mut backoff = Backoff::default();
        while let Err(failure) = session::delete(&self.uri, self.store.key()).await {
            warn!(session = self.store.key().name, failure = chain(&failure), "the ended session stays written down for now");
            if !backoff.wait(&self.shutdown).await {
                return End::Stopped;
            }
        }
        info!(session = self.store.key().name, "read what it still held, and ended");
        End::Left
    }

    /// Whoever has taken the session over has ended this connection, and logging in again would end theirs.
    pub(super) async fn look_for_another(&self) {
        match session::is_held(&self.uri, self.store.key()).await {
            Ok(true) => {}
            Ok(false) => self.lost.cancel(),
            // Nobody has taken it over through a database that is away, and nobody commits twice in any case.
            Err(failure) => warn!(session = self.store.key().name, failure = chain(&failure), "nobody tells whose the session is"),
        }
    }
}
