//! The totals of a Gateway's clients, and when a change is written. Pure.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;
use k8s_openapi::jiff::Timestamp;
use tokio::time::Instant;

use crate::api::gateway::{GatewayClients, RefusedClient};
use crate::broker::log::refused::{self, clean};
use crate::operator::device::key::GatewayKey;

/// Lower limit of the time between two writes of the number of connected devices.
const CONNECTED_INTERVAL: Duration = Duration::from_secs(10);

/// Lower limit of the time between two writes of the refused clients.
const REFUSED_INTERVAL: Duration = Duration::from_secs(30);

/// Lower limit of the time between two writes that only update how often the same clients were refused.
const COUNTS_INTERVAL: Duration = Duration::from_mins(10);

/// Upper limit of refused clients in a status.
const MAX_REFUSED_CLIENTS: usize = 10;

/// The totals of a Gateway's clients.
#[derive(Clone, Debug, Default, Eq, PartialEq)]
pub struct GatewayTotals {
    /// Number of connected devices; `None` if it is unknown.
    pub connected: Option<i64>,
    /// Refused clients; `None` before the first report.
    pub clients: Option<GatewayClients>,
}

/// The totals of each Gateway, shared with the reconciler of Gateways. Without an entry, a Gateway keeps its status: a restart of
/// the operator changes nothing.
#[derive(Clone, Debug, Default)]
pub struct SharedTotals(Arc<Mutex<HashMap<GatewayKey, GatewayTotals>>>);

impl SharedTotals {
    /// The totals of a Gateway, if they are known.
    #[must_use]
    pub fn of(&self, gateway: &GatewayKey) -> Option<GatewayTotals> {
        self.lock().get(gateway).cloned()
    }

    pub(super) fn set(&self, gateway: &GatewayKey, totals: GatewayTotals) {
        self.lock().insert(gateway.clone(), totals);
    }

    pub(super) fn remove(&self, gateway: &GatewayKey) {
        self.lock().remove(gateway);
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<GatewayKey, GatewayTotals>> {
        // Each change is one insertion, so the map is consistent after a panic.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The last reported totals of a Gateway, with times.
#[derive(Debug, Default)]
pub struct LastReportedTotals {
    totals: Option<GatewayTotals>,
    connected_at: Option<Instant>,
    refused_at: Option<Instant>,
}

impl LastReportedTotals {
    /// Whether these totals were reported last.
    #[must_use]
    pub fn is_last(&self, totals: &GatewayTotals) -> bool {
        self.totals.as_ref() == Some(totals)
    }

    /// The totals to report now, if a change has to be written.
    pub fn update(&mut self, now: Instant, totals: &GatewayTotals) -> Option<GatewayTotals> {
        let Some(last) = &mut self.totals else {
            (self.connected_at, self.refused_at) = (Some(now), Some(now));
            self.totals = Some(totals.clone());
            return self.totals.clone();
        };
        let passed = |at: Option<Instant>| at.map_or(Duration::MAX, |at| now.saturating_duration_since(at));
        let wait = if same_clients(last.clients.as_ref(), totals.clients.as_ref()) { COUNTS_INTERVAL } else { REFUSED_INTERVAL };
        let connected = last.connected != totals.connected && passed(self.connected_at) >= CONNECTED_INTERVAL;
        let refused = last.clients != totals.clients && passed(self.refused_at) >= wait;
        if connected {
            last.connected = totals.connected;
            self.connected_at = Some(now);
        }
        if refused {
            last.clients.clone_from(&totals.clients);
            self.refused_at = Some(now);
        }
        (connected || refused).then(|| last.clone())
    }
}

fn same_clients(a: Option<&GatewayClients>, b: Option<&GatewayClients>) -> bool {
    let names = |clients: Option<&GatewayClients>| {
        let mut names: Vec<(String, String)> = clients
            .into_iter()
            .flat_map(|clients| &clients.recently_refused)
            // A client without a name is identified by its address.
            .map(|client| (if client.name.is_empty() { client.address.clone() } else { client.name.clone() }, client.reason.clone()))
            .collect();
        names.sort();
        names
    };
    names(a) == names(b)
}

/// The refused clients for a status. Texts from an agent are truncated and cleaned.
#[must_use]
pub fn clients(refused: u64, recently: &[refused::RefusedClient]) -> GatewayClients {
    let count = |number: u64| i64::try_from(number).unwrap_or(i64::MAX);
    let client = |known: &refused::RefusedClient| RefusedClient {
        name: clean(&known.client),
        address: clean(&known.address),
        reason: known.reason.name().to_owned(),
        count: count(known.count),
        last_time: Time(Timestamp::from_second(known.last).unwrap_or_default()),
    };
    GatewayClients { refused: count(refused), recently_refused: recently.iter().take(MAX_REFUSED_CLIENTS).map(client).collect() }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::broker::log::line::Reason;

    fn totals(connected: i64, refused: &[(&str, u64)]) -> GatewayTotals {
        let recently: Vec<refused::RefusedClient> = refused
            .iter()
            .map(|(name, count)| refused::RefusedClient {
                client: (*name).to_owned(),
                address: "10.0.0.1".to_owned(),
                reason: Reason::NotAuthorised,
                count: *count,
                last: 1,
            })
            .collect();
        GatewayTotals { connected: Some(connected), clients: Some(clients(refused.iter().map(|(_, count)| count).sum(), &recently)) }
    }

    #[test]
    fn totals_are_written_at_limited_rates() {
        let start = Instant::now();
        let mut reported = LastReportedTotals::default();
        // Seconds, devices connected, refused clients -> what is written.
        for (second, now, expected) in [
            (0, totals(0, &[]), Some(totals(0, &[]))),
            (1, totals(0, &[]), None),
            (2, totals(5, &[]), None),
            (10, totals(7, &[]), Some(totals(7, &[]))),
            (11, totals(8, &[("ghost", 1)]), None),
            (20, totals(9, &[("ghost", 2)]), Some(totals(9, &[]))),
            (30, totals(9, &[("ghost", 3)]), Some(totals(9, &[("ghost", 3)]))),
            (100, totals(9, &[("ghost", 90)]), None),
            (101, totals(9, &[("ghost", 91), ("other", 1)]), Some(totals(9, &[("ghost", 91), ("other", 1)]))),
            (650, totals(9, &[("other", 600), ("ghost", 500)]), None),
            (701, totals(9, &[("other", 700), ("ghost", 600)]), Some(totals(9, &[("other", 700), ("ghost", 600)]))),
        ] {
            assert_eq!(reported.update(start + Duration::from_secs(second), &now), expected, "after {second} s");
        }
    }

    #[test]
    fn texts_of_an_agent_are_truncated_and_cleaned() {
        let client = refused::RefusedClient {
            client: "\u{202e}".repeat(10_000),
            address: "\n".repeat(10_000),
            reason: Reason::Other,
            count: u64::MAX,
            last: i64::MAX,
        };
        let clients = clients(u64::MAX, &vec![client; 1000]);
        assert_eq!(clients.recently_refused.len(), MAX_REFUSED_CLIENTS);
        assert!(clients.recently_refused.iter().all(|known| known.name.chars().all(|c| c == '\u{fffd}') && known.address.len() < 300));
    }
}
