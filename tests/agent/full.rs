//! A broker that is full: what it acknowledges it delivers, what it cannot keep it refuses, to clients that are not ours.

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

    /// A device with MQTT 5 that publishes what it is told to, and then stays.
    pub fn modern(broker: &Mosquitto, username: &str) -> Self {
        let client = Self::start(
            "session.py",
            &json!({"host": "127.0.0.1", "port": broker.port, "ca": null, "identity": null, "username": username, "password": PASSWORD}),
        );
        wait_until("a login", || client.count("connected 0") == 1);
        client
    }

    /// A device with MQTT 3.1.1 that publishes numbers on and on, and connects again by itself.
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

    /// Publishes messages of so many bytes, each of which begins with its number; gives the answers.
    pub fn answers(&mut self, topic: &str, numbers: Range<usize>, bytes: usize) -> Vec<String> {
        let (before, messages) = (self.count("published"), numbers.len());
        for number in numbers {
            self.publish(topic, &numbered(number, bytes));
        }
        wait_until("all answers", || self.count("published") == before + messages);
        self.lines().into_iter().filter(|line| line.starts_with("published")).skip(before).collect()
    }

    /// The same; gives the numbers of those that the broker has taken: they come before the first that it refused.
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

    /// Publishes nothing more; returns once all that it has sent is acknowledged.
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

/// The worker comes back, with room for as much at once as a real one has.
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

/// The agent's gauge of messages that were refused because this was full.
fn refused(agent: &Agent, bound: &str) -> usize {
    let families = agent.registry.gather();
    let gauges = families.iter().filter(|family| family.name() == "fleetwright_broker_messages_refused");
    let of_bound = |metric: &&prometheus::proto::Metric| metric.get_label().iter().any(|label| label.value() == bound);
    let values = gauges.flat_map(prometheus::proto::MetricFamily::get_metric).filter(of_bound);
    values.map(|metric| format!("{}", metric.get_gauge().get_value()).parse::<usize>().unwrap()).sum()
}

/// Of these messages those that were taken are there, and none of the others.
pub fn assert_exactly(output: &str, taken: &Range<usize>, messages: Range<usize>) {
    let found: BTreeSet<&str> = output.lines().filter_map(|line| line.get(..6)).collect();
    for number in messages {
        assert_eq!(found.contains(format!("{number:06}").as_str()), taken.contains(&number), "message {number}; taken were {taken:?}");
    }
}

/// Takes everything out of a broker, which is not full any longer then and takes one more message. Gives what came, that included.
pub async fn drain(broker: &Mosquitto, agent: &Agent) -> String {
    let worker = take_queue(broker);
    wait_for_fullness(broker, agent, Fullness::Nothing).await;
    assert!(publish(broker, "press-1", "at the end"));
    worker.wait_for("at the end");
    worker.output()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_full_queue_refuses_what_it_would_get_and_loses_nothing() {
    const MESSAGES: usize = 60;
    let site = Site::new(&json!({"limits": {"queuedBytesPerClient": "20000"}}));
    let internal_port = site.internal_port.to_string();
    let (mut broker, agent) = site.start(&users(), None).await;
    leave_a_queue(&broker);
    let mut modern = Paho::modern(&broker, "press-1");
    let taken = modern.fill("devices/press-1/telemetry", 0..MESSAGES, 1000);
    assert_eq!(taken, 0..20, "six bytes waited before, and the bound is reached with the message that exceeds it");
    wait_for_fullness(&broker, &agent, Fullness::Queue { session: "_ingest_vibration".to_owned() }).await;
    wait_until("a count", || refused(&agent, "queue") == MESSAGES - taken.end);

    // What the worker would not get goes its way: here to nobody, which MQTT 5 tells (16).
    modern.publish("devices/press-1/reported", "1");
    wait_until("an answer", || modern.count("published 16") == 1);
    // The operator and the workers are not held up.
    let trusted = broker.publish(("press-1", PASSWORD), &["-p", &internal_port, "-t", "devices/press-1/telemetry", "-m", "trusted"]);
    assert!(trusted.status.success());
    // One that cannot be told is disconnected, and not acknowledged.
    let mut old = Paho::old(&broker, "press-2");
    let held_up = |broker: &Mosquitto| {
        let log = broker.log();
        log.lines().filter(|line| line.contains("Client press-2 [") && line.ends_with("disconnected: server busy.")).count()
    };
    wait_until("two attempts", || held_up(&broker) >= 2);

    // It remembers what is queued, however it ends.
    broker.kill();
    broker.start_again();
    let before = held_up(&broker);
    wait_until("another attempt", || held_up(&broker) > before);
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
async fn slow_disconnects_those_who_could_be_told_too() {
    let site = Site::new(&json!({"limits": {"queuedBytesPerClient": "100", "whenFull": "Slow"}}));
    let (broker, _agent) = site.start(&users(), None).await;
    leave_a_queue(&broker);
    let mut modern = Paho::modern(&broker, "press-1");
    for _ in 0..2 {
        modern.publish("devices/press-1/telemetry", &numbered(0, 1000));
    }
    wait_until("the end of the connection", || modern.count("disconnected") == 1);
    let answers: Vec<String> = modern.lines().into_iter().filter(|line| line.starts_with("published")).collect();
    assert_eq!(answers, ["published 0"], "the first exceeds the bound and is taken; the second is not");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_full_queue_refuses_messages_of_qos_2() {
    // More than the margin of Mosquitto's own bound are under way at once.
    let (taken, refusals) = (0..20, 40);
    let site = Site::new(&json!({"limits": {"queuedBytesPerClient": "20000"}}));
    let (mut broker, agent) = site.start(&users(), None).await;
    leave_a_queue(&broker);
    // Mosquitto's own client: Paho takes no notice of the reason in a PUBREC. Gives how many were refused.
    let pour = |numbers: Range<usize>| {
        let lines: Vec<String> = numbers.map(|number| numbered(number, 1000)).collect();
        let client = broker.pour(("press-1", PASSWORD), &["-t", "devices/press-1/telemetry", "-q", "2"], &lines.join("\n"));
        String::from_utf8(client.stderr).unwrap().lines().filter(|line| line.ends_with("failed: Quota exceeded.")).count()
    };
    assert_eq!(pour(0..taken.end + refusals), refusals);
    wait_until("a count", || refused(&agent, "queue") == refusals);

    broker.kill();
    broker.start_again();
    // It may go before it has released what was taken: `unreleased` shows that nothing of that is lost.
    assert_exactly(&drain(&broker, &agent).await, &(0..0), taken.end..taken.end + refusals);
}

/// A volume without any room left: what cannot be stored is not acknowledged, and what was acknowledged is not lost.
#[tokio::test(flavor = "multi_thread")]
async fn a_broker_that_cannot_store_ends_before_it_acknowledges() {
    let site = Site::new(&json!({}));
    let internal_port = site.internal_port.to_string();
    let (mut broker, agent) = site.start_on(&users(), None, Some("128m")).await;
    leave_a_queue(&broker);
    assert!(publish(&broker, "press-1", "in time"));
    let other = broker.data().join("other");
    let mut file = std::fs::File::create(&other).unwrap();
    while file.write_all(&[1; 4096]).is_ok() {}
    drop(file);

    // On the internal port, where the bounds refuse nothing.
    let large = numbered(1, 100_000);
    let publisher = broker.publish(("press-1", PASSWORD), &["-p", &internal_port, "-t", "devices/press-1/telemetry", "-m", &large]);
    assert!(!publisher.status.success());
    wait_until("the broker's end", || broker.has_ended());
    assert!(broker.log().contains("The broker stops before it acknowledges"), "{}", broker.log());

    std::fs::remove_file(other).unwrap();
    broker.start_again();
    wait_for_fullness(&broker, &agent, Fullness::Nothing).await;
    let output = drain(&broker, &agent).await;
    assert!(output.contains("in time") && output.contains("queued"), "{output}");
}

/// To end a session takes no more room than its queue leaves, and gives it back.
#[tokio::test(flavor = "multi_thread")]
async fn the_end_of_a_session_frees_the_volume_that_its_queue_fills() {
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
    assert!(publish(&broker, "press-1", "there is room again"));
}

/// SQLite keeps the journal as large as one transaction has needed it: that is no room for messages.
#[tokio::test(flavor = "multi_thread")]
async fn a_journal_that_has_grown_once_does_not_count_as_room() {
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
    let messages = 0..450;
    let taken = Paho::modern(&broker, "press-1").fill("devices/press-1/telemetry", messages.clone(), 500_000);
    wait_for_fullness(&broker, &agent, Fullness::Disk).await;
    broker.kill();
    broker.start_again();
    assert_exactly(&drain(&broker, &agent).await, &taken, messages);
}

/// The queue of a device that is away holds up nobody: what is beyond its bound is dropped, and that is told.
#[tokio::test(flavor = "multi_thread")]
async fn the_queue_of_a_device_that_is_away_stops_nobody() {
    let users = [device("press-1", &[("devices/press-2/desired", Access::Write)]), device("press-2", &[]), worker()];
    let (broker, agent) = Site::new(&json!({"limits": {"queuedBytesPerClient": "100"}})).start(&users, None).await;
    drop(broker.subscribe(("press-2", PASSWORD), &["-i", "replaced", "-c", "-x", "4294967295", "-t", "devices/press-2/#"]));
    wait_until("its leave", || broker.log().lines().any(|line| line.contains("Client press-2 [") && line.contains("disconnected")));
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

/// Fills a broker until it refuses; restarts it; fills it again; takes everything out: what was acknowledged, and nothing else.
async fn fills_and_drains(site: Site, volume: Option<&str>, bytes: usize, messages: usize, expected: Fullness) {
    let orderly = site.configuration.contains("persistence true");
    let (mut broker, agent) = site.start_on(&users(), None, volume).await;
    leave_a_queue(&broker);
    let (first, second) = (0..messages, messages..messages + messages / 2);
    let taken = Paho::modern(&broker, "press-1").fill("devices/press-1/telemetry", first.clone(), bytes);
    wait_for_fullness(&broker, &agent, expected.clone()).await;
    // A snapshot outlives an orderly end alone.
    if orderly {
        broker.stop();
    } else {
        broker.kill();
    }
    broker.start_again();
    // It may have room for some more, for nobody is connected any more.
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
    // The file of the last snapshot takes its room until the next.
    site.configuration = site.configuration.replace("autosave_interval 60", "autosave_interval 1");
    fills_and_drains(site, Some("192m"), 20_000, 6_000, Fullness::Disk).await;
}
