use super::super::line::parse;
use super::*;

fn tracker(lines: &[&str]) -> Tracker {
    let mut tracker = Tracker::new("a".to_owned());
    feed(&mut tracker, lines);
    tracker
}

fn feed(tracker: &mut Tracker, lines: &[&str]) -> Vec<LogOutcome> {
    lines.iter().map(|line| tracker.observe(&parse(line).unwrap(), 7)).collect()
}

fn connect(client: &str, address: &str, time: i64) -> String {
    format!("{time}: New client connected from {address} as {client} (p5, c1, k60, u'{client}').")
}

fn disconnect(client: &str, address: &str, reason: &str, time: i64) -> String {
    format!("{time}: Client {client} [{address}] disconnected: {reason}.")
}

fn states(tracker: &Tracker) -> Vec<(String, PresenceState, i64)> {
    let mut states: Vec<_> =
        tracker.page("", 0, 0).clients.into_iter().map(|ClientState(name, state, since)| (name, state, since)).collect();
    states.sort_by(|a, b| a.0.cmp(&b.0));
    states
}

fn is(name: &str, state: PresenceState, since: i64) -> (String, PresenceState, i64) {
    (name.to_owned(), state, since)
}

#[test]
fn devices_come_and_go() {
    let mut tracker = tracker(&[&connect("press-1", "10.0.0.1:1", 10), &connect("press-2", "10.0.0.2:1", 11)]);
    assert_eq!(
        feed(&mut tracker, &[&disconnect("press-1", "10.0.0.1:1", "exceeded timeout", 12)]),
        [LogOutcome::Disconnected(Reason::KeepAliveTimeout)]
    );
    assert_eq!(states(&tracker), [is("press-1", PresenceState::Offline, 12), is("press-2", PresenceState::Online, 11)]);
    assert_eq!(tracker.connected(), 1);
}

#[test]
fn a_session_that_is_taken_over_stays_online() {
    let lines = [
        connect("press-1", "10.0.0.1:1", 10),
        disconnect("press-1", "10.0.0.1:1", "session taken over", 11),
        connect("press-1", "10.0.0.1:2", 11),
        // Whatever else comes of the old connection.
        disconnect("press-1", "10.0.0.1:1", "connection closed by client", 12),
    ];
    let tracker = tracker(&lines.each_ref().map(String::as_str));
    assert_eq!(states(&tracker), [is("press-1", PresenceState::Online, 11)]);
}

#[test]
fn a_refused_client_changes_nothing_for_the_device_whose_name_it_claims() {
    let mut tracker = tracker(&[&connect("press-1", "10.0.0.1:1", 10)]);
    let lines = [disconnect("press-1", "10.9.9.9:1", "not authorised", 11), disconnect("press-2", "10.9.9.9:2", "not authorised", 12)];
    let before = tracker.number();
    assert_eq!(feed(&mut tracker, &lines.each_ref().map(String::as_str)), [LogOutcome::Refused(Reason::NotAuthorised); 2]);
    assert_eq!((states(&tracker), tracker.number()), (vec![is("press-1", PresenceState::Online, 10)], before));
    let page = tracker.page("", 0, 20);
    assert_eq!(page.refused, 2);
    let seen: Vec<_> = page.recently_refused.iter().map(|known| (known.client.as_str(), known.address.as_str())).collect();
    assert_eq!(seen, [("press-2", "10.9.9.9"), ("press-1", "10.9.9.9")]);
}

#[test]
fn nobody_is_connected_to_a_broker_that_starts() {
    let mut tracker = tracker(&[&connect("press-1", "10.0.0.1:1", 10), &connect("_ingest_a_0", "10.0.0.3:1", 10)]);
    feed(&mut tracker, &[&disconnect("press-1", "10.0.0.1:1", "exceeded timeout", 12), &connect("press-2", "10.0.0.2:1", 13)]);
    feed(&mut tracker, &["20: mosquitto version 2.1.2 starting"]);
    assert_eq!(states(&tracker), [is("press-1", PresenceState::Offline, 12), is("press-2", PresenceState::BrokerDown, 20)]);
    assert_eq!((tracker.connected(), tracker.page("", 0, 0).broker_since), (0, 20));
}

#[test]
fn users_that_are_no_devices() {
    let mut tracker = tracker(&[&connect("_agent", "127.0.0.1:1", 10), &connect("Überwachung", "10.0.0.3:1", 10)]);
    let lines = [
        disconnect("Überwachung", "10.0.0.3:1", "protocol error", 11),
        // The agent itself, before the broker has read its password.
        disconnect("_agent", "127.0.0.1:2", "not authorised", 11),
        disconnect("_agent", "10.9.9.9:2", "not authorised", 11),
        // A probe of a load balancer.
        disconnect("10.0.0.9", "10.0.0.9:2", "connection closed by client", 11),
    ];
    assert_eq!(
        feed(&mut tracker, &lines.each_ref().map(String::as_str)),
        [
            LogOutcome::Disconnected(Reason::ProtocolError),
            LogOutcome::Nothing,
            LogOutcome::Refused(Reason::NotAuthorised),
            LogOutcome::Nothing
        ]
    );
    assert!(states(&tracker).is_empty());
}

/// What someone knows who follows the pages.
#[derive(Default)]
struct Follower {
    epoch: String,
    next: u64,
    states: HashMap<String, (PresenceState, i64)>,
}

impl Follower {
    /// Follows to the end; returns how many clients it was told of.
    fn follow(&mut self, tracker: &Tracker) -> usize {
        let mut told = 0;
        loop {
            // As it crosses the network.
            let page: Page = serde_json::from_str(&serde_json::to_string(&tracker.page(&self.epoch, self.next, 0)).unwrap()).unwrap();
            if page.first {
                self.states.clear();
            }
            told += page.clients.len();
            assert!(page.clients.len() <= MAX_PAGE_CLIENTS);
            self.states.extend(page.clients.into_iter().map(|ClientState(name, state, since)| (name, (state, since))));
            (self.epoch, self.next) = (page.epoch, page.next);
            if !page.more {
                return told;
            }
        }
    }

    fn states(&self) -> Vec<(String, PresenceState, i64)> {
        let mut states: Vec<_> = self.states.iter().map(|(name, (state, since))| (name.clone(), *state, *since)).collect();
        states.sort_by(|a, b| a.0.cmp(&b.0));
        states
    }
}

#[test]
fn pages_tell_everything_once_and_then_what_changed() {
    let mut tracker = Tracker::new("a".to_owned());
    for number in 0..10_000 {
        feed(&mut tracker, &[&connect(&format!("press-{number}"), "10.0.0.1:1", 10)]);
    }
    let mut follower = Follower::default();
    assert_eq!(follower.follow(&tracker), 10_000);
    assert_eq!(follower.follow(&tracker), 0);
    for time in 20..30 {
        feed(&mut tracker, &[&disconnect("press-7", "10.0.0.1:1", "exceeded timeout", time), &connect("press-7", "10.0.0.1:1", time)]);
    }
    assert_eq!(follower.follow(&tracker), 1, "changes of one device are told as one");
    assert_eq!(follower.states(), states_of(&tracker));
    // Another life of the agent.
    let resumed = Tracker::restore("b".to_owned(), tracker.snapshot());
    assert_eq!(follower.follow(&resumed), 10_000);
    assert_eq!(follower.states(), states_of(&tracker));
}

fn states_of(tracker: &Tracker) -> Vec<(String, PresenceState, i64)> {
    let mut all = Follower::default();
    all.follow(tracker);
    all.states()
}

#[test]
fn a_full_page_fits_its_bound() {
    let mut tracker = Tracker::new("a".to_owned());
    for number in 0..MAX_PAGE_CLIENTS {
        feed(&mut tracker, &[&connect(&format!("{number:0>200}"), "10.0.0.1:1", 1_790_000_000)]);
    }
    for number in 0..20 {
        feed(&mut tracker, &[&disconnect(&format!("{number}{}", "\"".repeat(300)), "10.0.0.1:2", "not authorised", 1_790_000_000)]);
    }
    let page = serde_json::to_vec(&tracker.page("", 0, 1_790_000_000)).unwrap();
    assert!(page.len() < super::super::wire::MAX_PAGE_BYTES, "{}", page.len());
}

#[test]
fn what_is_remembered_of_those_that_left_is_bounded() {
    let mut tracker = Tracker::new("a".to_owned());
    feed(&mut tracker, &[&connect("press-1", "10.0.0.1:1", 1)]);
    let mut follower = Follower::default();
    follower.follow(&tracker);
    for number in 0..=MAX_OFFLINE_CLIENTS {
        let name = format!("x-{number}");
        tracker.change(&name, 2, ClientStatus::Offline);
    }
    assert!(tracker.clients.len() < 10);
    follower.follow(&tracker);
    assert_eq!(follower.states(), [is("press-1", PresenceState::Online, 1)]);
}

#[test]
fn memory_survives_a_file() {
    let mut tracker = tracker(&[&connect("press-1", "10.0.0.1:1", 10), &connect("_ingest_a_0", "10.0.0.3:1", 10)]);
    feed(&mut tracker, &[&disconnect("press-2", "10.9.9.9:1", "not authorised", 11)]);
    let file = serde_json::to_vec(&tracker.snapshot()).unwrap();
    let mut resumed = Tracker::restore("b".to_owned(), serde_json::from_slice(&file).unwrap());
    assert_eq!(resumed.snapshot(), tracker.snapshot());
    let lines =
        [disconnect("press-1", "10.0.0.1:1", "exceeded timeout", 12), disconnect("_ingest_a_0", "10.0.0.3:1", "protocol error", 12)];
    let meanings = feed(&mut resumed, &lines.each_ref().map(String::as_str));
    assert_eq!(meanings, [LogOutcome::Disconnected(Reason::KeepAliveTimeout), LogOutcome::Disconnected(Reason::ProtocolError)]);
    assert_eq!(resumed.connected(), 0);
}

#[test]
fn the_probe_of_a_load_balancer_is_not_counted() {
    let end =
        "2026-11-29T00:57:16: OpenSSL Error while trying to get the error[0]: error:0A000126:SSL routines::unexpected eof while reading";
    let goes = |address| disconnect("10.0.0.9", address, "Protocol error", 10);
    let meanings = feed(&mut tracker(&[]), &[end, &goes("10.0.0.9:1"), &goes("10.0.0.9:2")]);
    assert_eq!(meanings, [LogOutcome::Nothing, LogOutcome::Nothing, LogOutcome::Refused(Reason::TlsHandshakeFailed)]);
}

#[test]
fn what_the_agent_tries_out_is_not_counted() {
    let mut tracker = tracker(&[]);
    tracker.expect_own("127.0.0.1:1");
    let refused = |address| disconnect("127.0.0.1", address, "Protocol error", 10);
    let meanings = feed(&mut tracker, &[&refused("127.0.0.1:1"), &refused("127.0.0.1:2"), &refused("127.0.0.1:1")]);
    let counted = LogOutcome::Refused(Reason::TlsHandshakeFailed);
    assert_eq!(meanings, [LogOutcome::Nothing, counted, counted], "an address is another's once it has been seen");
    (0..1000).for_each(|port| tracker.expect_own(&format!("127.0.0.1:{port}")));
    assert!(tracker.own.len() <= MAX_OWN_CONNECTIONS, "those that were not refused are forgotten");
}
