//! Reports of agents and the writes that follow, in virtual time.

use k8s_openapi::apimachinery::pkg::apis::meta::v1::OwnerReference;
use serde_json::json;

use super::*;
use crate::api::Device;

const RATE: f64 = 50.0;

/// Start of each test in seconds since 1970.
const EPOCH: i64 = 1_790_000_000;

/// A Gateway with devices, and a simulated API server.
struct Story {
    reporter: PresenceReporter,
    index: SharedDeviceIndex,
    start: Instant,
    second: u64,
    version: u64,
    /// All writes: second, device, state.
    writes: Vec<(u64, String, ConnectionState)>,
}

fn gateway() -> GatewayKey {
    GatewayKey::new("n", "g")
}

fn key(name: &str) -> DeviceKey {
    DeviceKey { gateway: gateway(), name: name.into() }
}

fn device(name: &str, version: u64, connection: Option<CompactConnection>) -> Device {
    serde_json::from_value(json!({
        "apiVersion": "fleetwright.io/v1alpha1", "kind": "Device",
        "metadata": {"name": name, "namespace": "n", "uid": format!("uid-{name}"), "generation": 1, "resourceVersion": version.to_string()},
        "spec": {"gatewayRef": {"name": "g"}},
        "status": {"connection": connection.map(CompactConnection::status)},
    }))
    .unwrap()
}

fn names(count: usize) -> Vec<String> {
    (0..count).map(|number| format!("press-{number}")).collect()
}

impl Story {
    /// All devices have this state in their status, and the agent has reported it.
    fn new(devices: &[String], connection: Option<ConnectionState>) -> Self {
        let start = Instant::now();
        let index = SharedDeviceIndex::default();
        let reporter = PresenceReporter::new(index.clone(), RATE, start);
        let mut story = Self { reporter, index, start, second: 0, version: 1, writes: Vec::new() };
        story.index.lock().gateway_observed(&gateway(), Some(OwnerReference { uid: "g".to_owned(), ..OwnerReference::default() }));
        for name in devices {
            let connection = connection.map(|state| CompactConnection::new(state, EPOCH - 100));
            story.index.lock().device_applied(&device(name, 1, connection));
        }
        let said = match connection {
            Some(ConnectionState::Online) => devices.iter().map(|name| (name.as_str(), State::Online)).collect(),
            _ => Vec::new(),
        };
        story.say_since(true, &said, EPOCH - 100);
        story.pass(1);
        story
    }

    fn now(&self) -> Instant {
        self.start + Duration::from_secs(self.second)
    }

    fn time(&self) -> i64 {
        EPOCH + i64::try_from(self.second).unwrap()
    }

    /// The agent reports this change.
    fn say(&mut self, clients: &[(&str, State)]) {
        self.say_since(false, clients, self.time());
    }

    fn say_since(&mut self, first: bool, clients: &[(&str, State)], since: i64) {
        let clients = clients.iter().map(|(name, state)| ClientState((*name).to_owned(), *state, since)).collect();
        let page = Page {
            epoch: "e".to_owned(),
            first,
            next: 1,
            more: false,
            broker_since: since,
            clients,
            refused: 0,
            recently_refused: Vec::new(),
        };
        self.reporter.page(&gateway(), &page, self.now(), self.time());
    }

    /// Time passes. Writes are executed within the budget.
    fn pass(&mut self, seconds: u64) {
        for _ in 0..seconds {
            while let Some((device, connection)) = self.reporter.next(self.now()) {
                self.writes.push((self.second, device.name.to_string(), connection.state));
                self.version += 1;
                self.index.lock().connection_written(&device, &self::device(&device.name, self.version, Some(connection)));
                self.reporter.written(device, Some(Duration::ZERO), self.now());
            }
            self.second += 1;
        }
    }

    fn states(&self) -> Vec<ConnectionState> {
        self.writes.iter().map(|(_, _, state)| *state).collect()
    }

    /// The largest number of writes in any ten seconds.
    fn peak(&self) -> usize {
        let within = |start: u64| self.writes.iter().filter(|(second, ..)| (start..start + 10).contains(second)).count();
        (0..self.second).map(within).max().unwrap_or_default()
    }
}

#[test]
fn a_connection_change_is_written_at_once() {
    let mut story = Story::new(&names(3), None);
    assert!(story.writes.is_empty(), "who was never connected gets nothing");
    story.say(&[("press-1", State::Online), ("stranger", State::Online)]);
    story.pass(1);
    story.say(&[("press-1", State::Offline)]);
    story.pass(1);
    assert_eq!(story.writes, [(1, "press-1".to_owned(), ConnectionState::Online), (2, "press-1".to_owned(), ConnectionState::Offline)]);
}

#[test]
fn a_restart_of_the_operator_writes_only_missed_changes() {
    let mut story = Story::new(&names(1_000), Some(ConnectionState::Online));
    story.pass(60);
    assert!(story.writes.is_empty());
    // The agent reports all but two devices: press-0 left long ago, and press-1 was never seen.
    let all = names(1_000);
    let mut said: Vec<(&str, State)> = all[2..].iter().map(|name| (name.as_str(), State::Online)).collect();
    said.push((&all[0], State::Offline));
    story.say_since(true, &said, EPOCH - 50);
    story.pass(1);
    let mut written: Vec<&str> = story.writes.iter().map(|(_, name, _)| name.as_str()).collect();
    written.sort_unstable();
    assert_eq!(written, ["press-0", "press-1"]);
    assert_eq!(story.states(), [ConnectionState::Offline; 2]);
}

#[test]
fn a_broker_restart_causes_no_writes() {
    let all = names(15_000);
    let mut story = Story::new(&all, Some(ConnectionState::Online));
    let down: Vec<(&str, State)> = all.iter().map(|name| (name.as_str(), State::BrokerDown)).collect();
    story.say(&down);
    for part in all.chunks(1_000) {
        story.pass(1);
        story.say(&part.iter().map(|name| (name.as_str(), State::Online)).collect::<Vec<_>>());
    }
    story.pass(600);
    assert!(story.writes.is_empty(), "{}", story.writes.len());
    // Devices that stay away are written.
    story.say(&down[..10]);
    story.pass(29);
    assert!(story.writes.is_empty());
    story.pass(3);
    assert_eq!(story.states(), [ConnectionState::Offline; 10]);
}

/// 15,000 devices of a running broker disconnect at once, and reconnect `away` seconds later.
fn storm(away: u64) -> Story {
    let all = names(15_000);
    let mut story = Story::new(&all, Some(ConnectionState::Online));
    story.index.lock().device_applied(&device("lone", 1, None));
    story.say(&all.iter().map(|name| (name.as_str(), State::Offline)).collect::<Vec<_>>());
    story.pass(away / 2);
    let second = story.second;
    story.say(&[("lone", State::Online)]);
    story.pass(away - away / 2);
    assert!(story.writes.contains(&(second, "lone".to_owned(), ConnectionState::Online)), "at once, in the middle of the storm");
    story.say(&all.iter().map(|name| (name.as_str(), State::Online)).collect::<Vec<_>>());
    story.pass(120);
    assert_eq!(story.reporter.backlog(story.now()), (0, 0, Duration::ZERO));
    assert!(story.peak() <= 10 * 50 + 100, "{} writes in ten seconds", story.peak());
    println!("15,000 devices away for {away} s: {} writes, at most {} in ten seconds", story.writes.len(), story.peak());
    story
}

#[test]
fn a_short_storm_causes_few_writes() {
    let writes = storm(20).writes.len();
    // Writes before the storm was detected, and their reversal.
    assert!(writes <= 2 * 100 + 1, "{writes} writes");
}

#[test]
fn a_storm_stays_within_the_budget() {
    let writes = storm(60).writes.len();
    assert!((2_000..=3_700).contains(&writes), "{writes} writes");
}

#[test]
fn a_flapping_device_is_written_rarely() {
    let mut story = Story::new(&names(2), None);
    for cycle in 0..1_800 {
        story.say(&[("press-0", if cycle % 2 == 0 { State::Online } else { State::Offline })]);
        story.pass(2);
    }
    let flapping = story.writes.len();
    assert!((4..=12).contains(&flapping), "{flapping} writes in an hour");
    // Another device is not delayed by it, and it is written once it is stable.
    story.say(&[("press-1", State::Online), ("press-0", State::Online)]);
    story.pass(1);
    assert_eq!(story.writes.last().map(|(_, name, _)| name.as_str()), Some("press-1"));
    story.pass(700);
    assert_eq!(story.index.lock().connection_to_write(&key("press-0")), None);
    story.reporter.forget(story.now());
    assert!(story.reporter.penalties.is_empty());
    println!("a device that comes and goes every two seconds for an hour: {flapping} writes");
}

#[test]
fn states_become_unknown_without_an_agent() {
    let mut story = Story::new(&names(3), Some(ConnectionState::Online));
    story.say(&[("press-2", State::Offline)]);
    story.pass(1);
    assert_eq!(story.reporter.totals(story.now())[0].1.connected, Some(2));
    story.reporter.silent(&gateway());
    story.pass(10);
    assert_eq!(story.reporter.totals(story.now())[0].1.connected, None);
    assert!(story.reporter.totals(story.now()).is_empty(), "it has been said");
    assert_eq!(story.writes.len(), 1, "a minute is no reason for writes");
    story.reporter.unknown(&gateway(), story.time(), story.now());
    story.pass(1);
    assert_eq!(story.states()[1..], [ConnectionState::Unknown; 2]);
    story.say_since(true, &[("press-0", State::Online), ("press-1", State::Online), ("press-2", State::Offline)], EPOCH);
    story.pass(20);
    assert_eq!(story.states()[3..], [ConnectionState::Online; 2]);
    assert_eq!(story.reporter.totals(story.now())[0].1.connected, Some(2));
}

#[test]
fn states_become_unknown_when_an_agent_never_responds() {
    let mut story = Story::new(&names(3), Some(ConnectionState::Online));
    story.reporter = PresenceReporter::new(story.index.clone(), RATE, story.now());
    story.index.lock().forget_connections(&gateway());
    assert!(story.reporter.totals(story.now()).is_empty(), "what the status says stays");
    story.reporter.silent(&gateway());
    assert_eq!(story.reporter.totals(story.now()), [(gateway(), GatewayTotals { connected: None, clients: None })]);
    story.reporter.unknown(&gateway(), story.time(), story.now());
    story.pass(1);
    assert_eq!(story.states(), [ConnectionState::Unknown; 3]);
}

#[test]
fn a_paused_device_is_not_written_and_a_new_one_is_relisted() {
    let mut story = Story::new(&names(1), None);
    let mut paused = device("paused", 1, None);
    paused.metadata.annotations = Some([("fleetwright.io/pause-reconciliation".to_owned(), "true".to_owned())].into());
    story.index.lock().device_applied(&paused);
    story.say(&[("paused", State::Online)]);
    story.pass(1);
    assert!(story.writes.is_empty());
    story.index.lock().device_applied(&device("paused", 2, None));
    story.reporter.repair(Duration::from_secs(5), story.now());
    story.pass(6);
    assert_eq!(story.states(), [ConnectionState::Online], "it is no longer paused");
    story.index.lock().device_applied(&device("paused", 90, None));
    story.version = 90;
    story.reporter.repair(Duration::from_secs(5), story.now());
    story.pass(6);
    assert_eq!(story.states(), [ConnectionState::Online; 2], "someone has emptied its status");
    let after = Duration::from_mins(1);
    story.pass(60);
    assert!(story.reporter.to_list_again(story.now(), after).contains(&gateway()));
    story.say_since(true, &[], EPOCH);
    story.pass(60);
    assert!(story.reporter.to_list_again(story.now(), after).is_empty(), "it has been asked for");
}

#[test]
fn unlisted_devices_of_an_external_broker_become_unknown() {
    let mut story = Story::new(&names(3), Some(ConnectionState::Online));
    let heard = |story: &mut Story, all: bool, devices: &[(&str, ConnectionState)]| {
        let time = story.time();
        let devices = devices.iter().map(|(name, state)| (Arc::from(*name), CompactConnection::new(*state, time))).collect();
        story.reporter.heard(&gateway(), all, devices, story.now(), time);
    };
    heard(&mut story, true, &[("press-1", ConnectionState::Online), ("stranger", ConnectionState::Online)]);
    heard(&mut story, false, &[("press-2", ConnectionState::Offline)]);
    story.pass(1);
    assert_eq!(story.writes, [(1, "press-2".to_owned(), ConnectionState::Offline)]);
    story.pass(STORM_HOLD_SECONDS + 1);
    let told = (story.writes[1].1.as_str(), story.writes[1].2, story.writes.len());
    assert_eq!(told, ("press-0", ConnectionState::Unknown, 2), "once it had time to come back");
    assert_eq!(story.reporter.totals(story.now())[0].1.connected, Some(1));
    heard(&mut story, true, &[("press-1", ConnectionState::Online), ("press-0", ConnectionState::Online)]);
    story.pass(1);
    assert_eq!(story.writes[2].1, "press-0");
}
