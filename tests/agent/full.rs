//! A full broker with third-party clients: it delivers every acknowledged message, and refuses messages that it cannot store.

use std::collections::BTreeSet;
use std::io::{BufRead, BufReader, Write};
use std::ops::Range;
use std::process::{Child, ChildStdin, Command, Stdio};
use std::sync::{Arc, Mutex};

use fleetwright::configuration::agent::Fullness;

use super::*;

/// Reason code of MQTT 5: Quota exceeded.
const QUOTA_EXCEEDED: &str = "published 151";

/// A script of `e2e/clients` with Eclipse Paho.
pub struct Paho {
    process: Child,
    input: Option<ChildStdin>,
    lines: Arc<Mutex<Vec<String>>>,
}

impl Paho {
    fn start(script: &str, settings: &Value) -> Self {
        let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("e2e/clients");
        let mut process =
            Command::new(folder.join("paho.sh")).arg(folder.join(script)).stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
        let lines = Arc::new(Mutex::new(Vec::new()));
        let (output, kept) = (BufReader::new(process.stdout.take().unwrap()), Arc::clone(&lines));
        std::thread::spawn(move || output.lines().map_while(Result::ok).for_each(|line| kept.lock().unwrap().push(line)));
        let mut client = Self { input: process.stdin.take(), process, lines };
        client.say(settings);
        client
    }

    /// A device with MQTT 5 that publishes on request and stays connected.
    pub fn modern(broker: &Mosquitto, username: &str) -> Self {
        let client = Self::start(
            "session.py",
            &json!({"host": "127.0.0.1", "port": broker.port, "ca": null, "identity": null, "username": username, "password": PASSWORD}),
        );
        wait_until("a login", || client.count("connected 0") == 1);
        client
    }

    /// A device with MQTT 3.1.1 that publishes numbers continuously, and reconnects automatically.
    fn old(broker: &Mosquitto, username: &str) -> Self {
        Self::start(
            "publisher.py",
            &json!({
                "host": "127.0.0.1", "port": broker.port, "ca": null, "topic": "devices/{device}/telemetry", "rate": 100,
                "devices": {username: PASSWORD},
            }),
        )
    }

    fn say(&mut self, line: &Value) {
        writeln!(self.input.as_mut().unwrap(), "{line}").unwrap();
    }

    fn publish(&mut self, topic: &str, payload: &str) {
        self.say(&json!({"publish": topic, "payload": payload}));
    }

    fn lines(&self) -> Vec<String> {
        self.lines.lock().unwrap().clone()
    }

    fn count(&self, begin: &str) -> usize {
        self.lines.lock().unwrap().iter().filter(|line| line.starts_with(begin)).count()
    }

    /// Publishes messages of this size, each of which begins with its number; returns the responses.
    pub fn answers(&mut self, topic: &str, numbers: Range<usize>, bytes: usize) -> Vec<String> {
        let (before, messages) = (self.count("published"), numbers.len());
        for number in numbers {
            self.publish(topic, &numbered(number, bytes));
        }
        wait_until("all answers", || self.count("published") == before + messages);
        self.lines().into_iter().filter(|line| line.starts_with("published")).skip(before).collect()
    }

    /// The same until the broker is full; returns the numbers of the accepted messages, which precede the refused ones.
    fn fill(&mut self, topic: &str, numbers: Range<usize>, bytes: usize) -> Range<usize> {
        let (messages, first) = (numbers.len(), numbers.start);
        let answers = self.answers(topic, numbers, bytes);
        let taken = answers.iter().take_while(|answer| *answer == "published 0").count();
        assert!(taken < messages, "the broker is not full");
        assert!(answers[taken..].iter().all(|answer| answer == QUOTA_EXCEEDED), "{:?}", &answers[taken..]);
        first..first + taken
    }

    /// The numbers that the broker has acknowledged.
    fn acknowledged(&self) -> Vec<String> {
        let number = |line: String| line.strip_prefix("acknowledged ").and_then(|rest| rest.split(' ').nth(1).map(str::to_owned));
        self.lines().into_iter().filter_map(number).collect()
    }

    /// Stops publishing; returns once all sent messages are acknowledged.
    fn finish(&mut self) {
        drop(self.input.take());
        wait_until("the last acknowledgements", || self.count("outstanding 0") == 1);
    }
}

impl Drop for Paho {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

pub fn numbered(number: usize, bytes: usize) -> String {
    format!("{number:06}-{}", "x".repeat(bytes - 7))
}

pub fn users() -> Vec<Entry> {
    let mut users: Vec<Entry> = (1..=3).map(|number| device(&format!("press-{number}"), &[])).collect();
    users.push(worker());
    users
}

/// The worker reconnects with the Receive Maximum of a real worker.
pub fn take_queue(broker: &Mosquitto) -> common::mosquitto::Subscriber {
    let arguments = [&PERSISTENT[..], &["-D", "connect", "receive-maximum", "65000"]].concat();
    broker.subscribe(("_ingest_vibration", PASSWORD), &arguments)
}

async fn wait_for_fullness(broker: &Mosquitto, agent: &Agent, wanted: Fullness) {
    let mut seen = agent.metrics.fullness();
    let wait = tokio::time::timeout(PATIENCE, seen.wait_for(|seen| *seen == Some(wanted.clone()))).await;
    let said: Vec<String> = broker.log().lines().filter(|line| line.contains(" bounds: ")).map(str::to_owned).collect();
    assert!(wait.is_ok(), "expected {wanted:?}; the plugin said {said:#?}");
}

/// The agent's gauge of messages that were refused because of this limit.
fn refused(agent: &Agent, bound: &str) -> usize {
    let families = agent.registry.gather();
    let gauges = families.iter().filter(|family| family.name() == "fleetwright_broker_messages_refused");
    let of_bound = |metric: &&prometheus::proto::Metric| metric.get_label().iter().any(|label| label.value() == bound);
    let values = gauges.flat_map(prometheus::proto::MetricFamily::get_metric).filter(of_bound);
    values.map(|metric| format!("{}", metric.get_gauge().get_value()).parse::<usize>().unwrap()).sum()
}

/// Checks that the output contains exactly the `taken` ones of these messages.
pub fn assert_exactly(output: &str, taken: &Range<usize>, messages: Range<usize>) {
    let found: BTreeSet<&str> = output.lines().filter_map(|line| line.get(..6)).collect();
    for number in messages {
        assert_eq!(found.contains(format!("{number:06}").as_str()), taken.contains(&number), "message {number}; taken were {taken:?}");
    }
}

/// Drains a full broker, checks that it accepts another message, and returns all delivered messages.
pub async fn drain(broker: &Mosquitto, agent: &Agent) -> String {
    let worker = take_queue(broker);
    wait_for_fullness(broker, agent, Fullness::Nothing).await;
    assert!(publish(broker, "press-1", "at the end"));
    worker.wait_for("at the end");
    worker.output()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_full_queue_refuses_messages_and_loses_none() {
    const MESSAGES: usize = 60;
    let site = Site::new(&json!({"limits": {"queuedBytesPerClient": "20000"}}));
    let internal_port = site.internal_port.to_string();
    let (mut broker, agent) = site.start(&users(), None).await;
    leave_a_queue(&broker);
    let mut modern = Paho::modern(&broker, "press-1");
    let taken = modern.fill("devices/press-1/telemetry", 0..MESSAGES, 1000);
    assert_eq!(taken, 0..20, "six bytes were queued before, and the message that exceeds the limit is accepted");
    wait_for_fullness(&broker, &agent, Fullness::Queue { session: "_ingest_vibration".to_owned() }).await;
    wait_until("a count", || refused(&agent, "queue") == MESSAGES - taken.end);

    // A message for no worker is accepted: here without a subscriber, for which MQTT 5 has a reason code (16).
    modern.publish("devices/press-1/reported", "1");
    wait_until("an answer", || modern.count("published 16") == 1);
    // Messages of the operator and the workers are accepted.
    let trust = internal_trust(&broker);
    let trusted = broker
        .publish(("press-1", PASSWORD), &["-p", &internal_port, "--cafile", &trust, "-t", "devices/press-1/telemetry", "-m", "trusted"]);
    assert!(trusted.status.success());
    // An MQTT 3.1.1 client is disconnected without an acknowledgement.
    let mut old = Paho::old(&broker, "press-2");
    let refusals = |broker: &Mosquitto| {
        let log = broker.log();
        log.lines().filter(|line| line.contains("Client press-2 [") && line.ends_with("disconnected: server busy.")).count()
    };
    wait_until("two attempts", || refusals(&broker) >= 2);

    // The broker restores the size of the queue after a kill.
    broker.kill();
    broker.start_again();
    let before = refusals(&broker);
    wait_until("another attempt", || refusals(&broker) > before);
    assert!(Paho::modern(&broker, "press-3").fill("devices/press-3/telemetry", MESSAGES..MESSAGES + 1, 1000).is_empty());
    assert_eq!(old.acknowledged(), Vec::<String>::new());

    let worker = take_queue(&broker);
    wait_until("acknowledgements", || old.acknowledged().len() > 50);
    old.finish();
    let acknowledged = old.acknowledged();
    wait_until("delivery", || acknowledged.iter().all(|number| worker.output().contains(number)));
    assert_exactly(&worker.output(), &taken, 0..MESSAGES + 1);
    assert!(worker.output().contains("trusted") && worker.output().contains("queued"));
    wait_for_fullness(&broker, &agent, Fullness::Nothing).await;
    assert!(!*agent.metrics.has_dropped().borrow());
}

#[tokio::test(flavor = "multi_thread")]
async fn when_full_slow_also_disconnects_mqtt_5_publishers() {
    let site = Site::new(&json!({"limits": {"queuedBytesPerClient": "100", "whenFull": "Slow"}}));
    let (broker, _agent) = site.start(&users(), None).await;
    leave_a_queue(&broker);
    let mut modern = Paho::modern(&broker, "press-1");
    for _ in 0..2 {
        modern.publish("devices/press-1/telemetry", &numbered(0, 1000));
    }
    wait_until("the end of the connection", || modern.count("disconnected") == 1);
    let answers: Vec<String> = modern.lines().into_iter().filter(|line| line.starts_with("published")).collect();
    assert_eq!(answers, ["published 0"], "the first message exceeds the limit and is accepted; the second is not");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_full_queue_refuses_messages_of_qos_2() {
    // More messages are in flight than the margin of Mosquitto's own limit.
    let (taken, refusals) = (0..20, 40);
    let site = Site::new(&json!({"limits": {"queuedBytesPerClient": "20000"}}));
    let (mut broker, agent) = site.start(&users(), None).await;
    leave_a_queue(&broker);
    // Mosquitto's own client, because Paho ignores the reason in a PUBREC. Returns the number of refused messages.
    let pour = |numbers: Range<usize>| {
        let lines: Vec<String> = numbers.map(|number| numbered(number, 1000)).collect();
        let client = broker.pour(("press-1", PASSWORD), &["-t", "devices/press-1/telemetry", "-q", "2"], &lines.join("\n"));
        String::from_utf8(client.stderr).unwrap().lines().filter(|line| line.ends_with("failed: Quota exceeded.")).count()
    };
    assert_eq!(pour(0..taken.end + refusals), refusals);
    wait_until("a count", || refused(&agent, "queue") == refusals);

    broker.kill();
    broker.start_again();
    // The client may end before it has released the accepted messages: the tests in `unreleased` cover these.
    assert_exactly(&drain(&broker, &agent).await, &(0..0), taken.end..taken.end + refusals);
}

/// On a full volume, a message that cannot be stored is not acknowledged, and no acknowledged message is lost.
#[tokio::test(flavor = "multi_thread")]
async fn a_broker_that_cannot_store_a_message_exits_before_it_acknowledges() {
    let site = Site::new(&json!({}));
    let internal_port = site.internal_port.to_string();
    let (mut broker, agent) = site.start_on(&users(), None, Some("128m")).await;
    leave_a_queue(&broker);
    assert!(publish(&broker, "press-1", "in time"));
    let other = broker.data().join("other");
    let mut file = std::fs::File::create(&other).unwrap();
    while file.write_all(&[1; 4096]).is_ok() {}
    drop(file);

    // On the internal port, where the plugin refuses nothing.
    let large = numbered(1, 100_000);
    let trust = internal_trust(&broker);
    let publish = ["-p", &internal_port, "--cafile", &trust, "-t", "devices/press-1/telemetry", "-m", &large];
    let publisher = broker.publish(("press-1", PASSWORD), &publish);
    assert!(!publisher.status.success());
    wait_until("the broker's end", || broker.has_ended());
    assert!(broker.log().contains("The broker stops before it acknowledges"), "{}", broker.log());

    std::fs::remove_file(other).unwrap();
    broker.start_again();
    wait_for_fullness(&broker, &agent, Fullness::Nothing).await;
    let output = drain(&broker, &agent).await;
    assert!(output.contains("in time") && output.contains("queued"), "{output}");
}

/// Ending a session needs no more space than its queue leaves free, and frees the space of the queue.
#[tokio::test(flavor = "multi_thread")]
async fn the_end_of_a_session_frees_the_space_of_its_queue() {
    let (mut broker, mut agent) = Site::new(&json!({})).start_on(&users(), None, Some("128m")).await;
    leave_a_queue(&broker);
    Paho::modern(&broker, "press-1").fill("devices/press-1/telemetry", 0..3500, 20_000);
    wait_for_fullness(&broker, &agent, Fullness::Disk).await;
    agent.hold(&users()[..3]).await;
    wait_until("the end of its session", || agent.metrics.sessions_ended.get() == 1);
    wait_for_fullness(&broker, &agent, Fullness::Nothing).await;
    broker.kill();
    broker.start_again();
    wait_for_fullness(&broker, &agent, Fullness::Nothing).await;
    assert!(publish(&broker, "press-1", "space is free again"));
}

/// SQLite keeps the journal at the size of its largest transaction. This space is not available for messages.
#[tokio::test(flavor = "multi_thread")]
async fn a_large_journal_does_not_count_as_free_space() {
    const MESSAGES: usize = 90_000;
    let spec = json!({"resources": {"limits": {"memory": "1Gi"}}});
    let (mut broker, mut agent) = Site::new(&spec).start_on(&users(), None, Some("288m")).await;
    leave_a_queue(&broker);
    let lines: Vec<String> = (0..MESSAGES).map(|number| numbered(number, 1000)).collect();
    broker.publish_lines(("press-1", PASSWORD), &["-t", "devices/press-1/telemetry"], &lines.join("\n"));
    agent.hold(&users()[..3]).await;
    wait_until("the end of its session", || agent.metrics.sessions_ended.get() == 1);
    agent.hold(&users()).await;
    leave_a_queue(&broker);
    // More than the volume holds.
    let messages = 0..600;
    let taken = Paho::modern(&broker, "press-1").fill("devices/press-1/telemetry", messages.clone(), 500_000);
    wait_for_fullness(&broker, &agent, Fullness::Disk).await;
    broker.kill();
    broker.start_again();
    assert_exactly(&drain(&broker, &agent).await, &taken, messages);
}

/// Messages beyond the limit of an offline device's queue are dropped, and the drop is reported.
#[tokio::test(flavor = "multi_thread")]
async fn the_queue_of_an_offline_device_does_not_block_publishers() {
    let users = [device("press-1", &[("devices/press-2/desired", Access::Write)]), device("press-2", &[]), worker()];
    let (broker, agent) = Site::new(&json!({"limits": {"queuedBytesPerClient": "100"}})).start(&users, None).await;
    drop(broker.subscribe(("press-2", PASSWORD), &["-i", "replaced", "-c", "-x", "4294967295", "-t", "devices/press-2/#"]));
    wait_until("its disconnect", || broker.log().lines().any(|line| line.contains("Client press-2 [") && line.contains("disconnected")));
    let mut has_dropped = agent.metrics.has_dropped();
    assert!(!*has_dropped.borrow());
    let worker = broker.subscribe(("_ingest_vibration", PASSWORD), &PERSISTENT);
    for _ in 0..2 {
        let command = ["-t", "devices/press-2/desired", "-m", &"x".repeat(200)];
        assert!(broker.publish(("press-1", PASSWORD), &command).status.success());
    }
    assert!(publish(&broker, "press-1", "telemetry"));
    worker.wait_for("telemetry");
    tokio::time::timeout(PATIENCE, has_dropped.wait_for(|has| *has)).await.expect("a drop").unwrap();
}

/// Fills a broker, restarts it, fills it again, and drains it: exactly the acknowledged messages are delivered.
async fn fills_and_drains(site: Site, volume: Option<&str>, bytes: usize, messages: usize, expected: Fullness) {
    let orderly = site.configuration.contains("persistence true");
    let (mut broker, agent) = site.start_on(&users(), None, volume).await;
    leave_a_queue(&broker);
    let (first, second) = (0..messages, messages..messages + messages / 2);
    let taken = Paho::modern(&broker, "press-1").fill("devices/press-1/telemetry", first.clone(), bytes);
    wait_for_fullness(&broker, &agent, expected.clone()).await;
    // A snapshot is only complete after an orderly stop.
    if orderly {
        broker.stop();
    } else {
        broker.kill();
    }
    broker.start_again();
    // It may accept some more messages, because no client is connected.
    let more = Paho::modern(&broker, "press-3").fill("devices/press-3/telemetry", second.clone(), bytes);
    wait_for_fullness(&broker, &agent, expected).await;
    let output = drain(&broker, &agent).await;
    assert_exactly(&output, &taken, first);
    assert_exactly(&output, &more, second);
    assert!(!broker.log().contains("out of memory"), "{}", broker.log());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_broker_without_memory_refuses_and_loses_nothing() {
    let site = Site::new(&json!({"resources": {"limits": {"memory": "64Mi"}}}));
    fills_and_drains(site, None, 1000, 18_000, Fullness::Memory).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_broker_without_memory_and_with_snapshots_refuses_and_loses_nothing() {
    let site = Site::new(&json!({"durability": "Snapshot", "resources": {"limits": {"memory": "64Mi"}}}));
    fills_and_drains(site, None, 1000, 18_000, Fullness::Memory).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_full_volume_refuses_and_loses_nothing() {
    fills_and_drains(Site::new(&json!({})), Some("128m"), 20_000, 5_000, Fullness::Disk).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_full_volume_with_snapshots_refuses_and_loses_nothing() {
    let mut site = Site::new(&json!({"durability": "Snapshot"}));
    // The file of the last snapshot takes space until the next one.
    site.configuration = site.configuration.replace("autosave_interval 60", "autosave_interval 1");
    fills_and_drains(site, Some("192m"), 20_000, 6_000, Fullness::Disk).await;
}
