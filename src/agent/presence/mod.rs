//! Which clients are connected: [`follow`] reads the broker's log, and [`endpoint`] serves the result to the operator.

pub mod endpoint;
pub mod follow;
pub mod metrics;

use std::net::SocketAddr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use jiff::Timestamp;
use tokio::sync::watch;

use crate::broker::credential::PresenceToken;
use crate::broker::log::tracker::Tracker;

/// The state of the broker's clients, shared by the log follower and the endpoint.
#[derive(Clone, Debug)]
pub struct Presence {
    tracker: Arc<Mutex<Tracker>>,
    /// Number of the last change; `None` until the log has been read to its end for the first time.
    number: watch::Sender<Option<u64>>,
    /// Tokens of callers that may read it.
    tokens: Arc<Mutex<Vec<PresenceToken>>>,
}

impl Presence {
    /// An empty state that accepts no caller.
    #[must_use]
    pub fn new() -> Self {
        Self { tracker: Arc::new(Mutex::new(Tracker::new(epoch()))), number: watch::Sender::new(None), tokens: Arc::default() }
    }

    /// Announces a connection of the agent from this address that the broker may refuse. The refusal is not counted.
    pub fn expect_own(&self, address: SocketAddr) {
        // As Mosquitto writes it, without brackets.
        self.lock().expect_own(&format!("{}:{}", address.ip(), address.port()));
    }

    /// Replaces the tokens that the endpoint accepts. Without one it refuses every caller.
    pub fn accept(&self, tokens: Vec<PresenceToken>) {
        *self.tokens.lock().unwrap_or_else(PoisonError::into_inner) = tokens;
    }

    /// Whether a header `Authorization` carries an accepted token.
    fn is_accepted(&self, authorization: &[u8]) -> bool {
        let tokens = self.tokens.lock().unwrap_or_else(PoisonError::into_inner);
        // No early return: the time must not depend on which token matches.
        tokens.iter().fold(false, |accepted, token| accepted | token.matches(authorization))
    }

    fn lock(&self) -> MutexGuard<'_, Tracker> {
        // A panic elsewhere ends the agent. The next one reads the log from its beginning.
        self.tracker.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Wakes waiting requests after the log has been read to its end.
    fn publish(&self) {
        let number = Some(self.lock().number());
        self.number.send_if_modified(|known| std::mem::replace(known, number) != number);
    }
}

impl Default for Presence {
    fn default() -> Self {
        Self::new()
    }
}

/// A random identifier of this run of the agent.
fn epoch() -> String {
    format!("{:016x}", rand::random::<u64>())
}

fn now() -> i64 {
    Timestamp::now().as_second()
}
