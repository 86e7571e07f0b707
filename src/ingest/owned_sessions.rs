//! Which sessions a worker owns, and which of them it drains: pure.
//!
//! A gateway with a shared subscription has several sessions. If a broker had a shared and an unshared subscription at the same time, it
//! would deliver each message twice. So the first session changes to the shared subscription before any other session begins, and
//! changes back after all other sessions have ended.

use crate::configuration::ingest::{IngestGateway, SHARED};
use crate::state::assignment::{Assigned, gateway_of, session_name, worker_of};

/// A session of this worker.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct OwnedSession<'a> {
    /// Its name.
    pub name: String,
    /// The gateway of its broker.
    pub gateway: &'a IngestGateway,
    /// Its number among the sessions with that broker.
    pub number: i32,
    /// Whether it is no longer configured: it is drained and ended.
    pub drains: bool,
}

/// The sessions that this worker runs now. A session that waits for another session is not included and does not affect readiness: the
/// other session may belong to a worker that is replaced only when this worker is ready.
#[must_use]
pub fn owned_sessions<'a>(gateways: &'a [IngestGateway], assigned: &Assigned, ordinal: i32) -> Vec<OwnedSession<'a>> {
    let is_owned = |name: &str| worker_of(&assigned.workers, name) == ordinal;
    let mut owned = Vec::new();
    for gateway in gateways {
        let wanted = gateway.sessions();
        let begun = assigned.sessions.keys().map(|name| gateway_of(name)).filter(|(of, _)| *of == gateway.name);
        let surplus: Vec<i32> = begun.map(|(_, number)| number).filter(|number| *number >= wanted).collect();
        let shares = assigned.sessions.get(&gateway.name).is_some_and(|filters| filters.iter().all(|filter| filter.starts_with(SHARED)));
        for number in 0..wanted {
            let name = session_name(&gateway.name, number);
            let may_begin = match number {
                0 => wanted > 1 || surplus.is_empty(),
                _ => shares,
            };
            if may_begin && is_owned(&name) {
                owned.push(OwnedSession { name, gateway, number, drains: false });
            }
        }
        for number in surplus {
            let name = session_name(&gateway.name, number);
            if is_owned(&name) {
                owned.push(OwnedSession { name, gateway, number, drains: true });
            }
        }
    }
    owned
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use proptest::prelude::*;
    use serde_json::json;

    use super::*;
    use crate::state::assignment::{Assignment, assign};

    const PLAIN: &str = "devices/+/telemetry";

    fn gateway(shared_by: Option<i32>) -> IngestGateway {
        let mut gateway = json!({
            "name": "plant-1", "host": "broker", "port": 1883, "tls": false,
            "external": {"clientId": "fwi0", "authorities": false},
        });
        if let Some(sessions) = shared_by {
            gateway["external"]["sharedBy"] = sessions.into();
        }
        serde_json::from_value(gateway).unwrap()
    }

    fn shared() -> String {
        gateway(Some(2)).subscription(PLAIN)
    }

    /// The sessions of a worker. A session that is drained has a minus before its name.
    fn runs(shared_by: Option<i32>, sessions: &[(&str, &[&str])], workers: &[(&str, i32)], ordinal: i32) -> Vec<String> {
        let assigned = Assigned {
            workers: workers.iter().map(|(name, worker)| ((*name).to_owned(), *worker)).collect(),
            sessions: sessions
                .iter()
                .map(|(name, filters)| ((*name).to_owned(), filters.iter().map(|f| (*f).to_owned()).collect()))
                .collect(),
        };
        let gateways = [gateway(shared_by)];
        let owned = owned_sessions(&gateways, &assigned, ordinal);
        owned.into_iter().map(|session| format!("{}{}", if session.drains { "-" } else { "" }, session.name)).collect()
    }

    #[test]
    fn the_group_name_is_independent_of_the_number_of_sessions() {
        assert_eq!(gateway(Some(2)).subscription(PLAIN), "$share/fwi0/devices/+/telemetry");
        assert_eq!(gateway(Some(2)).subscription(PLAIN), gateway(Some(9)).subscription(PLAIN));
        assert_eq!(gateway(None).subscription(PLAIN), PLAIN);
    }

    #[test]
    fn other_sessions_begin_after_the_first_session_shares() {
        let shared = shared();
        assert_eq!(runs(Some(3), &[], &[], 0), ["plant-1"]);
        assert_eq!(runs(Some(3), &[("plant-1", &[PLAIN, &shared])], &[], 0), ["plant-1"], "the broker may still hold both subscriptions");
        assert_eq!(runs(Some(3), &[("plant-1", &[&shared])], &[], 0), ["plant-1", "plant-1/1", "plant-1/2"]);
        assert_eq!(runs(Some(3), &[("plant-1", &[&shared, "$share/fwi0/other"])], &[], 0).len(), 3, "another topic of the same group");
    }

    #[test]
    fn the_first_session_stops_sharing_after_the_others_end() {
        let shared = shared();
        let before: &[(&str, &[&str])] = &[("plant-1", &[&shared]), ("plant-1/1", &[&shared])];
        assert_eq!(runs(None, before, &[], 0), ["-plant-1/1"]);
        assert_eq!(runs(None, &before[..1], &[], 0), ["plant-1"]);
    }

    #[test]
    fn surplus_sessions_drain_while_the_others_continue() {
        let shared = shared();
        let sessions: &[(&str, &[&str])] = &[("plant-1", &[&shared]), ("plant-1/1", &[&shared]), ("plant-1/2", &[&shared])];
        assert_eq!(runs(Some(2), sessions, &[("plant-1", 0), ("plant-1/1", 1)], 1), ["plant-1/1"]);
        assert_eq!(runs(Some(2), sessions, &[("plant-1", 0), ("plant-1/1", 1)], 0), ["plant-1", "-plant-1/2"]);
        assert_eq!(runs(None, &[("plant-2/1", &[&shared])], &[], 0), ["plant-1"], "a session of another gateway");
    }

    proptest! {
        /// For every number of sessions before and after, and of workers, each session has one worker.
        #[test]
        fn every_session_is_run_by_one_worker(before in 1_i32..6, wanted in 1_i32..6, workers in 1_i32..5) {
            let gateways = [gateway((wanted > 1).then_some(wanted))];
            let names: Vec<String> = (0..wanted).map(|number| session_name("plant-1", number)).collect();
            let filters = vec![if before > 1 { shared() } else { PLAIN.to_owned() }];
            let sessions = (0..before).map(|number| (session_name("plant-1", number), filters.clone())).collect();
            let assigned = Assigned { workers: assign(&Assignment::new(), &names, workers), sessions };
            let runs: Vec<(String, bool)> = (0..workers)
                .flat_map(|ordinal| {
                    let owned = owned_sessions(&gateways, &assigned, ordinal);
                    owned.into_iter().map(|session| (session.name, session.drains)).collect::<Vec<_>>()
                })
                .collect();
            let distinct: BTreeSet<&String> = runs.iter().map(|(name, _)| name).collect();
            prop_assert_eq!(distinct.len(), runs.len());
            let expected = match (before, wanted) {
                (1, _) => vec![("plant-1".to_owned(), false)],
                (before, 1) => (1..before).map(|number| (session_name("plant-1", number), true)).collect(),
                (before, wanted) => (0..before.max(wanted)).map(|number| (session_name("plant-1", number), number >= wanted)).collect(),
            };
            prop_assert_eq!(runs.into_iter().collect::<BTreeSet<_>>(), expected.into_iter().collect::<BTreeSet<_>>());
        }
    }
}
