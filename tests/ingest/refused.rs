//! Batches that the database refuses as a whole.

use serde_json::{Value, json};

use super::common::mosquitto::wait_until;
use super::common::postgres::Postgres;
use super::common::publisher::Publisher;
use super::common::worker::Chain;
use super::{TOPIC, TS};

const REJECTED: &str = "SELECT count(*) FROM fleetwright.dead_letter WHERE reason = 'Rejected'";

fn decode(of_arrival: bool) -> Value {
    let fields = json!([{"name": "rms", "type": "Float64"}]);
    if of_arrival { json!({"fields": fields}) } else { json!({"time": {"pointer": "/ts"}, "fields": fields}) }
}

async fn chain(of_arrival: bool) -> Chain {
    Chain::start(TOPIC, &decode(of_arrival), Postgres::shared().await).await
}

/// Makes the database fail with this code on each reading of 13.
async fn fail_with(chain: &Chain, code: &str) {
    chain
        .execute(&format!(
            "CREATE FUNCTION refuse() RETURNS trigger LANGUAGE plpgsql AS
                $$BEGIN IF NEW.rms = 13 THEN RAISE EXCEPTION 'refused' USING ERRCODE = '{code}'; END IF; RETURN NEW; END$$;
             CREATE TRIGGER refuse BEFORE INSERT ON vibration FOR EACH ROW EXECUTE FUNCTION refuse()"
        ))
        .await;
}

fn reading(number: u64, rms: u64) -> String {
    format!(r#"{{"ts":{},"rms":{rms}}}"#, TS + number)
}

/// Out of memory, with and without keys that identify redelivered rows.
#[tokio::test]
async fn a_message_that_fails_its_batch_is_found_and_refused_alone() {
    for of_arrival in [false, true] {
        let chain = chain(of_arrival).await;
        fail_with(&chain, "53200").await;
        let publisher = Publisher::start(chain.broker.port, "press-1", |number| {
            ("devices/press-1/telemetry".to_owned(), reading(number, if number % 1_000 == 777 { 13 } else { 1 }))
        });
        wait_until("some messages", || publisher.acknowledged() > 3_000);
        let acknowledged = publisher.finish().acknowledged;
        let refused = acknowledged.iter().filter(|number| **number % 1_000 == 777).count();
        chain.wait_for(REJECTED, i64::try_from(refused).unwrap()).await;
        chain.wait_for("SELECT count(*) FROM vibration", i64::try_from(acknowledged.len() - refused).unwrap()).await;
        assert_eq!(
            chain.count("SELECT count(*) FROM fleetwright.dead_letter WHERE detail LIKE '%refused%53200%'").await,
            i64::try_from(refused).unwrap()
        );
        chain.worker.wait_ready();
        // The record of a divided batch is deleted like any other.
        let unacknowledged = r#"fleetwright_ingest_unacknowledged_messages{gateway="plant-1"}"#;
        wait_until("every acknowledgement", || chain.worker.metric(unacknowledged).abs() < f64::EPSILON);
    }
}

/// A message alone in its batch: the database may be the cause, until it stores other messages.
#[tokio::test]
async fn a_single_message_is_refused_once_others_are_stored() {
    let chain = chain(false).await;
    fail_with(&chain, "53200").await;
    chain.publish("devices/press-1/telemetry", &reading(0, 13));
    chain.worker.wait_not_ready("refused");
    chain.wait_for("SELECT count(*) FROM fleetwright.session WHERE failure LIKE '%refused%'", 1).await;
    assert_eq!(chain.count("SELECT count(*) FROM fleetwright.dead_letter").await, 0);
    chain.publish("devices/press-1/telemetry", &reading(1, 1));
    chain.wait_for("SELECT count(*) FROM vibration", 1).await;
    chain.wait_for(REJECTED, 1).await;
    chain.worker.wait_ready();
    chain.wait_for("SELECT count(*) FROM fleetwright.session WHERE failure IS NULL", 1).await;
}

/// Disk full: no message is the cause, however often it fails.
#[tokio::test]
async fn a_fault_of_the_database_refuses_no_message() {
    let chain = chain(false).await;
    fail_with(&chain, "53100").await;
    chain.publish("devices/press-1/telemetry", &reading(0, 13));
    chain.worker.wait_not_ready("refused");
    for number in 1..50 {
        chain.publish("devices/press-1/telemetry", &reading(number, 1));
    }
    chain.wait_for("SELECT count(*) FROM vibration", 49).await;
    assert_eq!(chain.count("SELECT count(*) FROM fleetwright.dead_letter").await, 0);
    chain.execute("DROP TRIGGER refuse ON vibration").await;
    chain.wait_for("SELECT count(*) FROM vibration", 50).await;
    chain.worker.wait_ready();
}
