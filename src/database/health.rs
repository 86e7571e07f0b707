//! The health of a process's connections to its database, as readiness checks and metrics.

use std::sync::{Mutex, PoisonError};

use prometheus::{IntCounter, IntGauge};

use crate::runtime::readiness::Readiness;

/// Readiness check: the database answers.
pub const DATABASE: &str = "database";

/// Readiness check: every connection that writes has proven it.
pub const WRITE: &str = "write";

/// The state of each connection, and the two readiness checks that follow from them.
#[derive(Debug)]
pub struct DatabaseHealth {
    readiness: Readiness,
    /// 1 while the database answers on every connection.
    up: IntGauge,
    /// Attempts to connect again after a failure.
    retries: IntCounter,
    connections: Mutex<Vec<ConnectionState>>,
}

#[derive(Clone, Debug)]
enum ConnectionState {
    Unavailable(String),
    Refused(String),
    Writes,
}

impl DatabaseHealth {
    /// The health of so many connections, none of which is open yet.
    #[must_use]
    pub fn new(readiness: Readiness, connections: usize, up: IntGauge, retries: IntCounter) -> Self {
        let health = Self {
            readiness,
            up,
            retries,
            connections: Mutex::new(vec![ConnectionState::Unavailable("starting".to_owned()); connections]),
        };
        health.set(0, ConnectionState::Unavailable("starting".to_owned()));
        health
    }

    /// The connection has proven that it can write.
    pub fn writes(&self, connection: usize) {
        self.set(connection, ConnectionState::Writes);
    }

    /// A connection is opened again after a failure.
    pub fn retried(&self) {
        self.retries.inc();
    }

    /// The connection, which only reads, has received an answer.
    pub fn answers(&self, connection: usize) {
        self.set(connection, ConnectionState::Writes);
    }

    /// The connection cannot write. `connected`: the database answers.
    pub fn fails(&self, connection: usize, failure: &str, connected: bool) {
        let failure = failure.to_owned();
        self.set(connection, if connected { ConnectionState::Refused(failure) } else { ConnectionState::Unavailable(failure) });
    }

    fn set(&self, connection: usize, state: ConnectionState) {
        let mut connections = self.connections.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(known) = connections.get_mut(connection) {
            *known = state;
        }
        let unavailable =
            connections.iter().find_map(|state| if let ConnectionState::Unavailable(failure) = state { Some(failure) } else { None });
        let refused = connections.iter().find_map(|state| if let ConnectionState::Refused(failure) = state { Some(failure) } else { None });
        self.up.set(i64::from(unavailable.is_none()));
        match unavailable {
            Some(failure) => self.readiness.fails(DATABASE, failure.as_str()),
            None => self.readiness.holds(DATABASE),
        }
        match refused.or(unavailable) {
            Some(failure) => self.readiness.fails(WRITE, failure.as_str()),
            None => self.readiness.holds(WRITE),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ready_when_every_connection_writes() {
        let readiness = Readiness::default();
        let up = IntGauge::new("up", "up").unwrap();
        let health = DatabaseHealth::new(readiness.clone(), 2, up.clone(), IntCounter::new("retries", "retries").unwrap());
        health.writes(0);
        assert_eq!(up.get(), 0);
        assert!(readiness.verdict().is_err());
        health.answers(1);
        assert_eq!((readiness.verdict(), up.get()), (Ok(()), 1));
        health.fails(1, "no table", true);
        assert_eq!(readiness.verdict(), Err(vec!["write: no table".to_owned()]));
        assert_eq!(up.get(), 1, "the database answers, and refuses");
        health.fails(1, "gone", false);
        assert_eq!(readiness.verdict(), Err(vec!["database: gone".to_owned(), "write: gone".to_owned()]));
        health.writes(1);
        assert_eq!(readiness.verdict(), Ok(()));
    }
}
