//! A broker with a full queue reports it, refuses further messages, and recovers when messages are read.

use anyhow::ensure;
use fleetwright_e2e::client::{Listener, Session};
use fleetwright_e2e::fleet::GONE_WITHIN;
use fleetwright_e2e::manifest::{device, gateway, pipeline, with};
use fleetwright_e2e::wait::{seconds, until};
use fleetwright_e2e::{fault, metrics, run};
use serde_json::json;

/// Number of messages published while nothing reads them; the queue has room for only a part of them.
const MESSAGES: i64 = 150;

/// Reason code of MQTT 5: Quota exceeded.
const QUOTA_EXCEEDED: i32 = 0x97;

#[test]
fn a_broker_with_a_full_queue_refuses_messages_and_reports_it() {
    run("full", async |fleet| {
        let database = fleet.database().await?;
        let limited = with(gateway("plant-1"), "/spec/limits", json!({"queuedBytesPerClient": "4000"}));
        fleet.apply_all([limited, device("press-1", "plant-1"), pipeline("readings")]).await?;
        fleet.all_ready(&["Gateway/plant-1", "Device/press-1", "Pipeline/readings"]).await?;
        fleet.change("Pipeline", "readings", json!({"spec": {"paused": true}})).await?;
        fleet.gone("Pod", "readings-ingest-0", GONE_WITHIN).await?;

        let listener = Listener::plain(fleet.address("plant-1").await?);
        let mut session = Session::connect(&listener, "press-1", &fleet.password("press-1").await?).await?;
        let mut taken = 0;
        for number in 0..MESSAGES {
            match session.publish("devices/press-1/telemetry", &reading(number)).await? {
                0 => taken += 1,
                code => ensure!(code == QUOTA_EXCEEDED, "message {number} is answered with {code}"),
            }
        }
        ensure!((1..MESSAGES).contains(&taken), "{taken} of {MESSAGES} messages were taken");
        let full = fleet.condition("Gateway", "plant-1", "BrokerFull", "True", "QueueFull").await?;
        ensure!(full.message.contains("Pipeline readings"), "{}", full.message);
        fleet.ready("Gateway", "plant-1").await?;
        fleet.event("Gateway", "plant-1", "Warning", "QueueFull").await?;
        let counted = format!("fleetwright_broker_messages_refused{{bound=\"queue\"}} {}", MESSAGES - taken);
        until(seconds(20), "the metric counts", async || {
            let text = metrics::scrape(&fault::pod(&fleet.client, &fleet.namespace, "plant-1-broker").await?).await?;
            ensure!(text.lines().any(|line| line == counted), "no line {counted:?} in {text}");
            Ok(())
        })
        .await?;

        fleet.change("Pipeline", "readings", json!({"spec": {"paused": false}})).await?;
        database.reaches(seconds(60), "SELECT count(*) FROM reading", taken).await?;
        ensure!(session.publish("devices/press-1/telemetry", &reading(MESSAGES)).await? == 0, "there is room again");
        database.reaches(seconds(20), "SELECT count(*) FROM reading", taken + 1).await?;
        fleet.condition("Gateway", "plant-1", "BrokerFull", "False", "AcceptingMessages").await?;
        fleet.event("Gateway", "plant-1", "Normal", "AcceptingMessages").await.map(drop)
    });
}

fn reading(number: i64) -> String {
    format!(r#"{{"ts": {}, "value": {number}}}"#, 1_790_000_000_000 + number)
}
