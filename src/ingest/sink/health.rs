//! What the connections to the database say together.

use std::sync::{Mutex, PoisonError};

use prometheus::IntGauge;

use crate::runtime::readiness::Readiness;

/// Readiness check: the database answers.
pub const DATABASE: &str = "database";

/// Readiness check: a row was written, and rolled back.
pub const WRITE: &str = "write";

/// The state of each connection, and the two checks that follow from all of them.
#[derive(Debug)]
pub struct Health {
    readiness: Readiness,
    /// 1 while the database answers on every connection.
    up: IntGauge,
    connections: Mutex<Vec<State>>,
}

#[derive(Clone, Debug)]
enum State {
    Away(String),
    Refuses(String),
    Writes,
}

impl Health {
    /// No connection is there yet.
    #[must_use]
    pub fn new(readiness: Readiness, connections: usize, up: IntGauge) -> Self {
        let health = Self { readiness, up, connections: Mutex::new(vec![State::Away("starting".to_owned()); connections]) };
        health.set(0, State::Away("starting".to_owned()));
        health
    }

    /// The connection has proven that it can write.
    pub fn writes(&self, connection: usize) {
        self.set(connection, State::Writes);
    }

    /// The connection, over which nothing is written, has had an answer.
    pub fn answers(&self, connection: usize) {
        self.set(connection, State::Writes);
    }

    /// The connection cannot write; `connected` tells whether the database is there at all.
    pub fn fails(&self, connection: usize, failure: &str, connected: bool) {
        let failure = failure.to_owned();
        self.set(connection, if connected { State::Refuses(failure) } else { State::Away(failure) });
    }

    fn set(&self, connection: usize, state: State) {
        let mut connections = self.connections.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(known) = connections.get_mut(connection) {
            *known = state;
        }
        let away = connections.iter().find_map(|state| if let State::Away(failure) = state { Some(failure) } else { None });
        let refuses = connections.iter().find_map(|state| if let State::Refuses(failure) = state { Some(failure) } else { None });
        self.up.set(i64::from(away.is_none()));
        match away {
            Some(failure) => self.readiness.fails(DATABASE, failure.as_str()),
            None => self.readiness.holds(DATABASE),
        }
        match refuses.or(away) {
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
        let health = Health::new(readiness.clone(), 2, up.clone());
        health.writes(0);
        assert_eq!(up.get(), 0);
        assert!(readiness.verdict().is_err());
        health.answers(1);
        assert_eq!((readiness.verdict(), up.get()), (Ok(()), 1));
        health.fails(1, "no table", true);
        assert_eq!(readiness.verdict(), Err(vec!["write: no table".to_owned()]));
        assert_eq!(up.get(), 1, "it is there, and refuses");
        health.fails(1, "gone", false);
        assert_eq!(readiness.verdict(), Err(vec!["database: gone".to_owned(), "write: gone".to_owned()]));
        health.writes(1);
        assert_eq!(readiness.verdict(), Ok(()));
    }
}
