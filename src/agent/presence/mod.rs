//! Who is connected: the broker's log in ([`follow`]), what `presence` makes of it out ([`endpoint`]).

pub mod endpoint;
pub mod follow;
pub mod metrics;

use std::net::SocketAddr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use jiff::Timestamp;
use tokio::sync::watch;

use crate::broker::log::tracker::Tracker;

/// What is known of the broker's clients, shared by the follower and the endpoint.
#[derive(Clone, Debug)]
pub struct Presence {
    tracker: Arc<Mutex<Tracker>>,
    /// Number of the last change; `None` until the log has been read to its end for the first time.
    number: watch::Sender<Option<u64>>,
}

impl Presence {
    /// Nothing is known yet.
    #[must_use]
    pub fn new() -> Self {
        Self { tracker: Arc::new(Mutex::new(Tracker::new(epoch()))), number: watch::Sender::new(None) }
    }

    /// The agent itself is about to try out at the broker, from this address, what may be refused.
    pub fn expect_own(&self, address: SocketAddr) {
        // As Mosquitto writes it, without brackets.
        self.lock().expect_own(&format!("{}:{}", address.ip(), address.port()));
    }

    fn lock(&self) -> MutexGuard<'_, Tracker> {
        // A panic elsewhere ends the agent, which then reads the log anew.
        self.tracker.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Tells those who wait that the log has been read to its end.
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

/// Tells this life of the agent from every other.
fn epoch() -> String {
    format!("{:016x}", rand::random::<u64>())
}

fn now() -> i64 {
    Timestamp::now().as_second()
}
