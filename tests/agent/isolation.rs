//! Attacks of one device against its broker: another device is not affected, and the attacker is named.

use std::io::Read;

use rumqttc::mqttbytes::QoS;
use rumqttc::mqttbytes::v5::{ConnectReturnCode, LastWill, Publish, PublishProperties, SubscribeReasonCode};

use super::attacker::{Attacker, Innocent, attack_beside, check, deep, retained, start};
use super::full::{take_queue, users};
use super::*;

/// Its own topic.
const REPORTED: &str = "devices/press-1/reported/self";

fn message(qos: QoS, bytes: usize) -> Publish {
    let mut message = Publish::new(REPORTED, qos, vec![b'x'; bytes], None);
    message.pkid = 1;
    message
}

#[tokio::test(flavor = "multi_thread")]
async fn retained_messages_on_deep_topics_harm_nobody() {
    check("3,000 retained messages, 150 levels", "topic", |broker| {
        assert_eq!(Attacker::connect(broker).publish_retained((0..3_000).map(|number| deep(number, 150))), 0);
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn many_retained_messages_harm_nobody() {
    check("3,000 retained messages, 16 levels", "retained", |broker| {
        let mut attacker = Attacker::connect(broker);
        assert_eq!(attacker.publish_retained((0..3_000).map(|number| deep(number, 16))), 100);
        // Replacing is possible at the limit.
        assert_eq!(attacker.publish_retained((0..10).map(|number| deep(number, 16))), 10);
    })
    .await;
}

/// Each of them names a topic that nobody has used. The broker must not remember it.
#[tokio::test(flavor = "multi_thread")]
async fn deleting_what_is_not_retained_harms_nobody() {
    let (broker, _agent, mut innocent) = start().await;
    let (memory, _) = attack_beside(&mut innocent, &broker, "30,000 deletions of nothing, 16 levels", |broker| {
        let mut attacker = Attacker::connect(broker);
        attacker.flood((0..30_000).map(|number| retained(&deep(number, 16), QoS::AtMostOnce, "")));
        assert_eq!(attacker.publish_retained(std::iter::once(deep(0, 16))), 1, "after all others");
    });
    assert!(memory < 8 << 10, "{memory} KiB");
}

/// An expired message that is not deleted yet counts, so that its place in the tree is counted too.
#[tokio::test(flavor = "multi_thread")]
async fn expired_retained_messages_harm_nobody() {
    check("retained messages that expire", "retained", |broker| {
        let mut attacker = Attacker::connect(broker);
        let mut accepted = 0;
        for round in 0..3 {
            for number in 0..100 {
                let mut publish = retained(&deep(100 * round + number, 16), QoS::AtLeastOnce, "1");
                let properties = PublishProperties { message_expiry_interval: Some(1), ..PublishProperties::default() };
                publish.properties = Some(properties);
                accepted += usize::from(attacker.publish(publish));
            }
            std::thread::sleep(Duration::from_millis(1_500));
            attacker.subscribe(&["devices/press-1/#".to_owned()]);
        }
        assert_eq!(accepted, 100);
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn many_subscriptions_harm_nobody() {
    check("3,000 subscriptions", "subscriptions", |broker| {
        let mut attacker = Attacker::connect(broker);
        let filters: Vec<String> = (0..3_000).map(|number| deep(number, 16)).collect();
        let answers: Vec<_> = filters.chunks(50).flat_map(|filters| attacker.subscribe(filters)).collect();
        assert_eq!(answers.iter().filter(|answer| matches!(answer, SubscribeReasonCode::Success(_))).count(), 100);
    })
    .await;
}

/// Each message is delivered a hundred times.
#[tokio::test(flavor = "multi_thread")]
async fn overlapping_subscriptions_harm_nobody() {
    const LEVELS: usize = 7;
    check("100 subscriptions that match each of 3,000 messages", "rate", |broker| {
        let mut attacker = Attacker::connect(broker);
        let filter = |mask: usize| {
            let levels = (0..LEVELS).map(|level| if mask & 1 << level == 0 { "/+" } else { "/x" });
            format!("devices/press-1/reported{}", levels.collect::<String>())
        };
        let filters: Vec<String> = (0..100).map(filter).collect();
        assert!(attacker.subscribe(&filters).iter().all(|answer| matches!(answer, SubscribeReasonCode::Success(_))));
        let mut output = attacker.stream.try_clone().unwrap();
        let reader = std::thread::spawn(move || {
            let mut buffer = vec![0; 1 << 16];
            while output.read(&mut buffer).is_ok_and(|read| read > 0) {}
        });
        let topic = format!("devices/press-1/reported{}", "/x".repeat(LEVELS));
        attacker.stream.set_write_timeout(Some(Duration::from_secs(5))).unwrap();
        // The broker reads 4 KiB at once. It logs each delivery in these tests, which takes most of the time.
        attacker.flood((0..3_000).map(|_| Publish::new(&topic, QoS::AtMostOnce, "x".repeat(500), None)));
        // What the broker has not read yet would be lost with the connection.
        let slowed = || broker.log().contains("Client press-1 has exceeded its limit: rate");
        let started = Instant::now();
        while !slowed() && started.elapsed() < PATIENCE {
            std::thread::sleep(Duration::from_millis(200));
        }
        let _ = attacker.stream.shutdown(std::net::Shutdown::Both);
        reader.join().unwrap();
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_device_that_floods_itself_harms_nobody() {
    check("100 MB to itself, not acknowledged", "queue", |broker| {
        let mut attacker = Attacker::connect(broker);
        attacker.subscribe(&["devices/press-1/#".to_owned()]);
        attacker.flood((0..1_000).map(|_| message(QoS::AtLeastOnce, 100_000)));
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_device_that_does_not_read_harms_nobody() {
    check("100 MB of QoS 0 to itself, not read", "queue", |broker| {
        let mut attacker = Attacker::connect(broker);
        attacker.subscribe(&["devices/press-1/#".to_owned()]);
        attacker.flood((0..1_000).map(|_| message(QoS::AtMostOnce, 100_000)));
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn large_retained_wills_harm_nobody() {
    check("2,500 wills of 65 kB", "will", |broker| {
        for number in 0..2_500 {
            let will = LastWill::new(deep(number, 4), vec![b'x'; 65_000], QoS::AtLeastOnce, true, None);
            let (_, answer) = Attacker::try_connect(broker, Some(will));
            assert_ne!(answer.map(|answer| answer.code), Some(ConnectReturnCode::Success));
        }
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn many_retained_wills_harm_nobody() {
    check("2,500 wills of 4 kB", "retained", |broker| {
        for number in 0..2_500 {
            let will = LastWill::new(deep(number, 4), vec![b'x'; 4_000], QoS::AtLeastOnce, true, None);
            let (_, answer) = Attacker::try_connect(broker, Some(will));
            assert_eq!(answer.map(|answer| answer.code), Some(ConnectReturnCode::Success));
        }
    })
    .await;
}

/// A device is deleted, and its name is given to another one, which finds nothing.
#[tokio::test(flavor = "multi_thread")]
async fn the_next_holder_of_a_name_finds_nothing() {
    let mut users = users();
    users.push(device("press-9", &[("devices/press-1/desired", Access::Write)]));
    let (broker, mut agent) = Site::new(&json!({})).start(&users, None).await;
    leave_a_queue(&broker);
    let mut innocent = Innocent::new(&broker, 0);
    let mut former = Attacker::connect(&broker);
    assert_eq!(former.publish_retained(["devices/press-1/reported/secret".to_owned()].into_iter()), 1);
    former.subscribe(&["devices/press-1/#".to_owned()]);
    drop(former);
    wait_until("its leave", || broker.log().lines().any(|line| line.contains("Client press-1 [") && line.contains("disconnected")));
    assert!(broker.publish(("press-9", PASSWORD), &["-t", "devices/press-1/desired", "-m", "queued"]).status.success());
    innocent.publishes(5);
    let without: Vec<Entry> = users[1..].to_vec();
    agent.hold(&without).await;
    wait_until("the end of the session", || broker.log().contains("Ending the session of press-1"));
    innocent.publishes(5);
    agent.hold(&users).await;
    assert!(!broker.has_session(("press-1", PASSWORD), "press-1"), "its session, with its queue and subscriptions");
    let next = broker.subscribe(("press-1", PASSWORD), &["-t", "devices/press-1/#"]);
    assert!(broker.publish(("press-9", PASSWORD), &["-t", "devices/press-1/desired", "-m", "fresh"]).status.success());
    next.wait_for("fresh");
    assert_eq!(next.output().trim(), "fresh", "neither the queue nor what was retained");
    innocent.publishes(5);
    assert!(!broker.log().contains("Ending the session of press-2"), "another device");
    let worker = take_queue(&broker);
    worker.wait_for("000014");
}
