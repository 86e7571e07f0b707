//! Clusters that share a database, and the upgrade of a database from a version without clusters.

#![allow(clippy::unwrap_used, reason = "helpers of tests fail by panicking")]

mod common;

use common::postgres::Fixture;
use fleetwright::api::PipelineSpec;
use fleetwright::api::pipeline::DeletionPolicy;
use fleetwright::configuration::pipeline::compile;
use fleetwright::sink::timescale::execute::{apply, observe_schema, release};
use fleetwright::sink::timescale::plan::plan;
use fleetwright::sink::timescale::schema::Desired;
use fleetwright::state::assignment::{forget_all_sessions, read_sessions, spread};
use fleetwright::state::owner::Owner;
use fleetwright::state::registry::DeviceRow;
use fleetwright::state::registry::fill::sync;
use fleetwright::state::registry::follow::{Devices, Lookup};
use fleetwright::state::{dead_letter, session, system};
use serde_json::json;

/// The tables as version 4 created them.
const VERSION_4: &str = include_str!("clusters/version-4.sql");

/// What that version stored for a Pipeline `vibration` of the namespace `plant`, and for one that was deleted.
const ROWS_OF_VERSION_4: &str = "
    CREATE TABLE vibration (time timestamptz NOT NULL, device_id integer NOT NULL, rms double precision);
    SELECT create_hypertable('vibration', by_range('time', INTERVAL '1 day'), create_default_indexes => false);
    CREATE UNIQUE INDEX ON vibration (time, device_id);
    CREATE TABLE kept (LIKE vibration);
    SELECT create_hypertable('kept', by_range('time', INTERVAL '1 day'), create_default_indexes => false);
    INSERT INTO fleetwright.pipeline_table VALUES ('vibration', 'plant', 'vibration'), ('kept', 'plant', NULL);
    INSERT INTO fleetwright.device (namespace, name, gateway, enabled) VALUES ('plant', 'press-1', 'plant-1', true);
    INSERT INTO fleetwright.session VALUES ('plant/vibration/plant-1', 7, '{devices/+/telemetry}');
    INSERT INTO fleetwright.acknowledgement VALUES ('plant/vibration/plant-1', 3, '');
    INSERT INTO fleetwright.assignment VALUES ('plant', 'vibration', 'plant-1', 1);
    INSERT INTO fleetwright.dead_letter_retention VALUES ('plant', 'vibration', INTERVAL '30 days');
    INSERT INTO fleetwright.dead_letter_count VALUES (now(), 'plant', 'vibration', 'plant-1', 'Malformed', 2, 100, 0);
    INSERT INTO fleetwright.dead_letter (time, namespace, pipeline, gateway, topic, payload, reason, detail)
        VALUES (now(), 'plant', 'vibration', 'plant-1', 'devices/press-1/telemetry', 'x', 'Malformed', '')";

impl Fixture {
    async fn number(&self, query: &str) -> i64 {
        self.client.query_one(query, &[]).await.unwrap().get(0)
    }

    async fn refusal(&mut self, desired: &Desired) -> (&'static str, String) {
        let error = apply(&mut self.client, desired).await.unwrap_err();
        (error.reason().as_str(), error.to_string())
    }
}

fn owner(cluster: &str, namespace: &str) -> Owner {
    Owner { cluster: cluster.to_owned(), namespace: namespace.to_owned(), pipeline: "vibration".to_owned() }
}

fn wanted(owner: Owner, table: &str) -> Desired {
    let spec: PipelineSpec = serde_json::from_value(json!({
        "source": {"topic": "devices/{device}/telemetry"},
        "decode": {"fields": [{"name": "rms", "type": "Float64"}]},
        "sink": {"timescale": {"connectionSecret": {"name": "db"}, "table": table}},
    }))
    .unwrap();
    compile(owner, &spec, Ok(None)).unwrap().desired
}

fn device(name: &str) -> DeviceRow {
    DeviceRow { name: name.to_owned(), gateway: "plant-1".to_owned(), enabled: true, attributes: [].into() }
}

#[tokio::test]
async fn the_cluster_that_upgrades_a_database_adopts_its_rows() {
    let mut fixture = Fixture::new().await;
    fixture.client.batch_execute("CREATE EXTENSION timescaledb").await.unwrap();
    fixture.client.batch_execute(VERSION_4).await.unwrap();
    fixture.client.batch_execute(ROWS_OF_VERSION_4).await.unwrap();

    // A namespace of the same name in another cluster has nothing to adopt once the first one was there.
    let (here, there) = (owner("here", "plant"), owner("there", "plant"));
    apply(&mut fixture.client, &wanted(here.clone(), "vibration")).await.unwrap();
    let left = plan(&wanted(here.clone(), "vibration"), &observe_schema(&fixture.client, "vibration").await.unwrap()).unwrap();
    assert_eq!(left.steps, vec![]);
    assert_eq!(fixture.refusal(&wanted(there.clone(), "vibration")).await.0, "TableTaken");
    assert_eq!(fixture.refusal(&wanted(there.clone(), "kept")).await.0, "TableRetained");

    for table in system::TABLES {
        let (all, ours) = (format!("SELECT count(*) FROM fleetwright.{table}"), "WHERE cluster = 'here'");
        let adopted = fixture.number(&format!("{all} {ours}")).await;
        assert_eq!(adopted, fixture.number(&all).await, "{table}");
        assert!(adopted > 0 || table == "pipeline_replay", "{table} is empty");
    }
    let devices = Devices::load(&fixture.client, &here.cluster_namespace()).await.unwrap();
    assert!(matches!(devices.look_up("press-1"), Lookup::Known(device) if device.id == 1), "readings refer to the id");
    let letters = dead_letter::read(&fixture.client, &here, None).await.unwrap();
    assert_eq!(letters.refused, 2);

    // The session continues: a message that was stored and not acknowledged is recognized.
    let uri = fixture.postgres.uri(&fixture.database);
    let opened = session::open(&uri, ("here", "plant/vibration/plant-1"), "plant-1", None).await.unwrap().unwrap();
    assert_eq!((opened.key.generation, opened.entries.len()), (8, 1));

    // A worker of the earlier version, which knows no clusters, may still write a moment longer.
    fixture
        .client
        .batch_execute(
            "INSERT INTO fleetwright.acknowledgement (session, batch, entries) VALUES ('plant/vibration/plant-1', 4, '');
             INSERT INTO fleetwright.dead_letter (time, namespace, pipeline, gateway, topic, payload, reason, detail, partial)
             VALUES (now(), 'plant', 'vibration', 'plant-1', 't', 'x', 'Malformed', '', false)",
        )
        .await
        .unwrap();
    let of_here = "SELECT count(*) FROM fleetwright.dead_letter WHERE cluster = 'here'";
    assert_eq!(fixture.number(of_here).await, 2);
}

#[tokio::test]
async fn a_pipeline_that_is_deleted_before_the_upgrade_releases_its_table() {
    let mut fixture = Fixture::new().await;
    fixture.client.batch_execute("CREATE EXTENSION timescaledb").await.unwrap();
    fixture.client.batch_execute(VERSION_4).await.unwrap();
    fixture.client.batch_execute(ROWS_OF_VERSION_4).await.unwrap();
    release(&mut fixture.client, &owner("here", "plant"), "vibration", DeletionPolicy::Retain).await.unwrap();
    let kept = "SELECT count(*) FROM fleetwright.pipeline_table WHERE table_name = 'vibration' AND cluster = 'here' AND pipeline IS NULL";
    assert_eq!(fixture.number(kept).await, 1);
    assert_eq!(fixture.number("SELECT count(*) FROM fleetwright.session").await, 0);
}

#[tokio::test]
async fn two_clusters_do_not_touch_the_rows_of_one_another() {
    let mut fixture = Fixture::new().await;
    let (here, there) = (owner("here", "plant"), owner("there", "plant"));
    apply(&mut fixture.client, &wanted(here.clone(), "vibration")).await.unwrap();
    apply(&mut fixture.client, &wanted(there.clone(), "another")).await.unwrap();

    // Each declares its own Devices, one of them with the same name.
    sync(&fixture.client, &here.cluster_namespace(), &[device("press-1"), device("press-2")]).await.unwrap();
    sync(&fixture.client, &there.cluster_namespace(), &[device("press-1")]).await.unwrap();
    assert_eq!(sync(&fixture.client, &here.cluster_namespace(), &[device("press-1"), device("press-2")]).await.unwrap(), 0);
    assert_eq!(sync(&fixture.client, &there.cluster_namespace(), &[]).await.unwrap(), 1);
    let declared = "SELECT count(*) FROM fleetwright.device WHERE declared AND cluster = ";
    assert_eq!((fixture.number(&format!("{declared}'here'")).await, fixture.number(&format!("{declared}'there'")).await), (2, 0));

    // Their sessions and assignments have the same names.
    let uri = fixture.postgres.uri(&fixture.database);
    for owner in [&here, &there] {
        let opened = session::open(&uri, (&owner.cluster, "plant/vibration/plant-1"), "plant-1", Some("devices/#")).await.unwrap().unwrap();
        assert_eq!(opened.key.generation, 1, "{owner:?}");
        assert!(spread(&mut fixture.client, owner, &["plant-1".to_owned()], 2).await.unwrap(), "{owner:?}");
    }
    let transaction = fixture.client.transaction().await.unwrap();
    forget_all_sessions(&transaction, &there).await.unwrap();
    transaction.commit().await.unwrap();
    assert_eq!(read_sessions(&fixture.client, &here).await.unwrap().len(), 1);
    assert_eq!(read_sessions(&fixture.client, &there).await.unwrap().len(), 0);

    // Neither drops the table of the other.
    release(&mut fixture.client, &there, "vibration", DeletionPolicy::Delete).await.unwrap();
    assert_eq!(fixture.number("SELECT count(*) FROM pg_class WHERE relname = 'vibration'").await, 1);
    let (reason, message) = fixture.refusal(&wanted(there, "vibration")).await;
    assert_eq!(reason, "TableTaken");
    assert!(message.contains("of the cluster here"), "{message}");
}

#[tokio::test]
async fn a_kept_table_stays_in_its_namespace_until_it_is_handed_over() {
    let mut fixture = Fixture::new().await;
    let here = owner("here", "plant");
    apply(&mut fixture.client, &wanted(here.clone(), "vibration")).await.unwrap();
    release(&mut fixture.client, &here, "vibration", DeletionPolicy::Retain).await.unwrap();

    for stranger in [owner("there", "plant"), owner("here", "elsewhere")] {
        let (reason, message) = fixture.refusal(&wanted(stranger.clone(), "vibration")).await;
        assert_eq!(reason, "TableRetained", "{stranger:?}");
        release(&mut fixture.client, &stranger, "vibration", DeletionPolicy::Delete).await.unwrap();
        assert_eq!(fixture.number("SELECT count(*) FROM pg_class WHERE relname = 'vibration'").await, 1, "{stranger:?} dropped it");

        // The statement in the message hands the table over.
        let statement = &message[message.find("UPDATE").unwrap()..];
        fixture.client.batch_execute(statement).await.unwrap();
        apply(&mut fixture.client, &wanted(stranger.clone(), "vibration")).await.unwrap();
        release(&mut fixture.client, &stranger, "vibration", DeletionPolicy::Retain).await.unwrap();
    }
    // Another Pipeline of the last namespace takes it without help.
    let heir = Owner { pipeline: "heir".to_owned(), ..owner("here", "elsewhere") };
    apply(&mut fixture.client, &wanted(heir, "vibration")).await.unwrap();
}
