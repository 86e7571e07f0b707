//! Acknowledgements of a broker whose clocks are set back.

use std::path::Path;
use std::time::{Duration, Instant, SystemTime};

use bytes::BytesMut;

use super::*;

/// A broker whose clocks [`set`] sets.
fn broker_with_clocks() -> (Mosquitto, Endpoint) {
    let (folder, port) = (tempfile::tempdir().unwrap(), free_port());
    let library = folder.path().join("clocks.so");
    let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/acknowledge/clocks.c");
    // The linker of Rust.
    let compiled = Command::new("cc").args(["-O2", "-fPIC", "-shared", "-o"]).arg(&library).arg(source).status();
    assert!(compiled.unwrap().success());
    let configuration = broker_configuration(folder.path(), port);
    let preload = library.display().to_string();
    (Mosquitto::start_with(folder, &configuration, port, vec![("LD_PRELOAD", preload)]), Endpoint::plain(port))
}

/// Adds seconds to the time of day, and to the time since the boot.
fn set(broker: &Mosquitto, of_day: f64, since_boot: f64) {
    std::fs::write(broker.folder.path().join("clocks"), format!("{of_day} {since_boot}")).unwrap();
}

/// The time of day, in seconds, that the broker has put before its last message.
fn last_logged(broker: &Mosquitto) -> u64 {
    broker.log().lines().filter_map(|line| line.split(':').next()?.parse().ok()).next_back().unwrap()
}

#[test]
fn a_clock_that_is_set_back_does_not_delay_acknowledgements() {
    const HOUR: Duration = Duration::from_hours(1);
    let (broker, endpoint) = broker_with_clocks();
    let reader = Reader::new(&broker, 0, "load", QoS::AtLeastOnce);
    let mut device = Device::new(0, QoS::AtLeastOnce);
    for back in [Duration::ZERO, HOUR] {
        set(&broker, -back.as_secs_f64(), 0.0);
        device.fill("load", &mut BytesMut::new());
        device.work(&endpoint, None, &AtomicU64::new(0)).unwrap();
    }
    let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap();
    assert!(last_logged(&broker) + HOUR.as_secs() / 2 < now.as_secs(), "the broker ignores the clock; its log:\n{}", broker.log());
    let held = reader.take_queue(&broker);
    assert!(device.acknowledged.iter().all(|message| held.contains_key(message)));
}

/// Mosquitto derives identifiers of messages from the time. Two nodes, or two boots of one node, must not assign the same identifiers to
/// queued messages.
#[test]
fn a_broker_that_starts_twice_at_the_same_uptime_keeps_acknowledged_messages() {
    const LOAD: u64 = 10_000;
    let (mut broker, endpoint) = broker_with_clocks();
    let reader = Reader::new(&broker, 0, "load", QoS::AtLeastOnce);
    broker.kill();
    let starting = Instant::now();
    broker.start_again();
    let (starts_in, started) = (starting.elapsed(), Instant::now());
    let mut devices: Vec<Device> = (0..DEVICES).map(|number| Device::new(number, QoS::AtLeastOnce)).collect();
    load_and_kill(&mut broker, &endpoint, &mut devices, "load", LOAD);
    set(&broker, 0.0, -(started.elapsed() + starts_in).as_secs_f64());
    broker.start_again();
    load_and_kill(&mut broker, &endpoint, &mut devices, "load", LOAD);
    broker.start_again();
    let held = reader.take_queue(&broker);
    let acknowledged: BTreeSet<String> = devices.into_iter().flat_map(|device| device.acknowledged).collect();
    let missing: Vec<&String> = acknowledged.iter().filter(|message| !held.contains_key(*message)).collect();
    assert!(missing.is_empty(), "{} of {} acknowledged messages are lost: {missing:?}", missing.len(), acknowledged.len());
}
