//! Schema, plan and execution against a real TimescaleDB.

#![allow(clippy::unwrap_used, reason = "helpers of tests fail by panicking")]

mod common;

use common::postgres::{Fixture, Postgres};
use fleetwright::api::PipelineSpec;
use fleetwright::api::pipeline::DeletionPolicy;
use fleetwright::configuration::pipeline::compile;
use fleetwright::database::connect::{connect, drive};
use fleetwright::sink::timescale::execute::{apply, observe_schema, release};
use fleetwright::sink::timescale::plan::plan;
use fleetwright::sink::timescale::schema::Desired;
use fleetwright::state::dead_letter::{self, DeadLetters};
use fleetwright::state::dead_letter_retention::{Swept, sweep};
use fleetwright::state::owner::Owner;
use proptest::prelude::Strategy;
use proptest::sample::{select, subsequence};
use proptest::strategy::ValueTree;
use proptest::test_runner::TestRunner;
use serde_json::{Value, json};
use tokio_postgres::Client;

impl Fixture {
    async fn apply(&mut self, desired: &Desired) -> usize {
        apply(&mut self.client, desired).await.unwrap().steps.len()
    }

    async fn steps_left(&self, desired: &Desired) -> usize {
        plan(desired, &observe_schema(&self.client, &desired.table.name).await.unwrap()).unwrap().steps.len()
    }

    async fn refusal(&mut self, desired: &Desired) -> &'static str {
        apply(&mut self.client, desired).await.unwrap_err().reason().as_str()
    }

    async fn execute(&self, statement: &str) {
        self.client.batch_execute(statement).await.unwrap();
    }

    async fn text(&self, query: &str) -> Option<String> {
        self.client.query_one(query, &[]).await.unwrap().get(0)
    }
}

fn owner(pipeline: &str) -> Owner {
    Owner { cluster: "here".to_owned(), namespace: "plant".to_owned(), pipeline: pipeline.to_owned() }
}

fn wanted(fields: &Value, chunk_interval: &str) -> Desired {
    let spec: PipelineSpec = serde_json::from_value(json!({
        "source": {"topic": "{site}/{device}/telemetry"},
        "decode": {"fields": fields},
        "sink": {"timescale": {"connectionSecret": {"name": "db"}, "table": "vibration", "chunkInterval": chunk_interval}},
    }))
    .unwrap();
    compile(owner("vibration"), &spec, Ok(None)).unwrap().desired
}

fn every_type() -> Value {
    json!([
        {"name": "rms", "type": "Float64", "unit": "mm/s"},
        {"name": "count", "type": "Int64"},
        {"name": "select", "type": "Boolean"},
        {"name": "note", "type": "Text", "unit": "it's \\ \"x\""},
    ])
}

#[tokio::test]
async fn an_empty_database_gets_a_hypertable_and_the_next_plan_is_empty() {
    let mut fixture = Fixture::new().await;
    let desired = wanted(&every_type(), "1d");
    assert!(fixture.apply(&desired).await > 0);
    assert_eq!(fixture.steps_left(&desired).await, 0);
    assert_eq!(fixture.apply(&desired).await, 0);

    fixture.execute("INSERT INTO vibration (time, device_id, rms, \"select\") VALUES (now(), 1, 0.5, true)").await;
    let indexes = fixture.text("SELECT string_agg(indexdef, ';') FROM pg_indexes WHERE tablename = 'vibration'").await.unwrap();
    assert!(
        indexes.starts_with("CREATE UNIQUE INDEX") && indexes.ends_with("(\"time\", device_id, site)") && !indexes.contains(';'),
        "{indexes}"
    );
    let interval = "SELECT time_interval::text FROM timescaledb_information.dimensions WHERE hypertable_name = 'vibration'";
    assert_eq!(fixture.text(interval).await.unwrap(), "1 day");
    let comment =
        "SELECT col_description('vibration'::regclass, attnum) FROM pg_attribute WHERE attrelid = 'vibration'::regclass AND attname = ";
    assert_eq!(fixture.text(&format!("{comment}'rms'")).await.unwrap(), "mm/s");
    assert_eq!(fixture.text(&format!("{comment}'note'")).await.unwrap(), "it's \\ \"x\"");
}

#[tokio::test]
async fn drift_is_repaired() {
    let mut fixture = Fixture::new().await;
    let desired = wanted(&every_type(), "1d");
    fixture.apply(&desired).await;
    for damage in [
        "DROP TABLE vibration",
        "DROP INDEX vibration_time_device_id_site_idx",
        "ALTER TABLE vibration DROP COLUMN rms",
        "COMMENT ON COLUMN vibration.rms IS NULL",
        "COMMENT ON COLUMN vibration.count IS 'wrong'",
        "SELECT set_chunk_time_interval('vibration', INTERVAL '2 hours')",
        "DROP TABLE fleetwright.dead_letter",
        "DROP TABLE vibration; DROP SCHEMA fleetwright CASCADE",
        "DROP EXTENSION timescaledb CASCADE; DROP TABLE IF EXISTS vibration, fleetwright.dead_letter",
    ] {
        fixture.execute(damage).await;
        assert!(fixture.steps_left(&desired).await > 0, "{damage} is not seen");
        assert!(fixture.apply(&desired).await > 0, "{damage}");
        assert_eq!(fixture.steps_left(&desired).await, 0, "{damage}");
    }
}

#[tokio::test]
async fn a_changed_spec_adds_columns_and_removes_none() {
    let mut fixture = Fixture::new().await;
    fixture.apply(&wanted(&json!([{"name": "rms", "type": "Float64"}]), "1d")).await;
    fixture.execute("INSERT INTO vibration (time, device_id, rms) VALUES ('2026-01-01Z', 1, 0.5)").await;

    let changed = wanted(&json!([{"name": "peak", "type": "Float64", "unit": "g"}]), "12h");
    let applied = apply(&mut fixture.client, &changed).await.unwrap();
    assert_eq!(applied.kept, ["rms"]);
    assert_eq!(fixture.steps_left(&changed).await, 0);
    assert_eq!(fixture.text("SELECT rms::text FROM vibration WHERE peak IS NULL").await.unwrap(), "0.5");

    let retyped = wanted(&json!([{"name": "rms", "type": "Text"}, {"name": "new", "type": "Text"}]), "12h");
    assert_eq!(fixture.refusal(&retyped).await, "TypeConflict");
    assert_eq!(
        observe_schema(&fixture.client, "vibration").await.unwrap().table.unwrap().columns.len(),
        5,
        "nothing of a refused plan is done"
    );
}

#[tokio::test]
async fn a_table_of_another_owner_is_refused() {
    let mut fixture = Fixture::new().await;
    fixture.execute("CREATE TABLE vibration (time timestamptz NOT NULL, device_id integer NOT NULL, mine text)").await;
    let desired = wanted(&every_type(), "1d");
    assert_eq!(fixture.refusal(&desired).await, "TableNotOurs");
    release(&mut fixture.client, &owner("vibration"), "vibration", DeletionPolicy::Delete).await.unwrap();
    fixture.execute("SELECT mine FROM vibration").await;

    fixture.execute("DROP TABLE vibration").await;
    fixture.apply(&desired).await;
    let other = Desired { owner: owner("other"), ..desired };
    assert_eq!(fixture.refusal(&other).await, "TableTaken");
    release(&mut fixture.client, &other.owner, "vibration", DeletionPolicy::Delete).await.unwrap();
    fixture.execute("SELECT rms FROM vibration").await;
}

#[tokio::test]
async fn a_deleted_pipeline_leaves_or_drops_its_table() {
    let mut fixture = Fixture::new().await;
    let desired = wanted(&every_type(), "1d");
    fixture.apply(&desired).await;
    fixture.execute("INSERT INTO vibration (time, device_id) VALUES (now(), 1)").await;
    for (table, columns) in [("session", "(session, generation, topic_filters)"), ("acknowledgement", "(session, batch, entries)")] {
        let value = if table == "session" { "1, '{}'" } else { "1, ''" };
        let rows = format!("('plant/vibration/0/a', {value}), ('plant/vibration2/0/a', {value})");
        fixture.execute(&format!("INSERT INTO fleetwright.{table} {columns} VALUES {rows}")).await;
    }
    for _ in 0..2 {
        release(&mut fixture.client, &desired.owner, "vibration", DeletionPolicy::Retain).await.unwrap();
    }
    assert_eq!(fixture.text("SELECT count(*)::text FROM vibration").await.unwrap(), "1");
    for table in ["session", "acknowledgement"] {
        let left = fixture.text(&format!("SELECT string_agg(session, ',') FROM fleetwright.{table}")).await.unwrap();
        assert_eq!(left, "plant/vibration2/0/a");
    }

    let heir = Desired { owner: owner("heir"), ..desired };
    assert_eq!(
        fixture.apply(&heir).await,
        2,
        "a table that was left is claimed, and it is said how long dead letters are kept; nothing else"
    );
    for _ in 0..2 {
        release(&mut fixture.client, &heir.owner, "vibration", DeletionPolicy::Delete).await.unwrap();
    }
    assert_eq!(fixture.text("SELECT to_regclass('vibration')::text").await, None);
    assert_eq!(fixture.text("SELECT string_agg(table_name, ',') FROM fleetwright.pipeline_table").await, None);
}

#[tokio::test]
async fn release_from_an_empty_database_does_nothing() {
    let mut fixture = Fixture::new().await;
    release(&mut fixture.client, &owner("vibration"), "vibration", DeletionPolicy::Delete).await.unwrap();
    assert_eq!(
        observe_schema(&fixture.client, "vibration").await.unwrap(),
        fleetwright::sink::timescale::observe::ObservedSchema::default()
    );
}

#[tokio::test]
async fn missing_permissions_are_reported() {
    let fixture = Fixture::new().await;
    fixture.execute("CREATE ROLE limited_role; GRANT limited_role TO postgres").await;
    let mut limited = Fixture { postgres: fixture.postgres.clone(), database: fixture.database, client: fixture.client };
    limited.execute("SET ROLE limited_role").await;
    let desired = wanted(&every_type(), "1d");
    assert_eq!(limited.refusal(&desired).await, "ExtensionMissing");
    limited.execute("RESET ROLE; CREATE EXTENSION timescaledb; SET ROLE limited_role").await;
    assert_eq!(limited.refusal(&desired).await, "PermissionDenied");
}

#[tokio::test]
async fn a_locked_table_fails_after_a_short_wait() {
    let mut fixture = Fixture::new().await;
    fixture.apply(&wanted(&json!([{"name": "rms", "type": "Float64"}]), "1d")).await;
    let database = fixture.text("SELECT current_database()::text").await.unwrap();
    let other = fixture.postgres.client(&database).await;
    other.batch_execute("BEGIN; LOCK TABLE vibration IN ACCESS SHARE MODE").await.unwrap();
    let desired = wanted(&every_type(), "1d");
    assert_eq!(fixture.refusal(&desired).await, "TableBusy");
    other.batch_execute("COMMIT").await.unwrap();
    assert!(fixture.apply(&desired).await > 0);
}

#[tokio::test]
async fn concurrent_changes_both_succeed() {
    let postgres = Postgres::shared().await;
    let database = postgres.create_database().await;
    let (mut one, mut two) = (postgres.client(&database).await, postgres.client(&database).await);
    let desired = wanted(&every_type(), "1d");
    let (first, second) = tokio::join!(apply(&mut one, &desired), apply(&mut two, &desired));
    let mut counts = [first.unwrap().steps.len(), second.unwrap().steps.len()];
    counts.sort_unstable();
    assert!(counts[0] == 0 && counts[1] > 0, "{counts:?}");
}

#[tokio::test]
async fn after_any_sequence_of_specs_the_next_plan_is_empty() {
    let mut fixture = Fixture::new().await;
    let all = vec![("a", "Float64"), ("b", "Int64"), ("c", "Boolean"), ("d", "Text"), ("order", "Text")];
    let specs = (subsequence(all, 1..=5), select(vec!["1d", "90m", "2w"]), select(vec![None, Some("m/s"), Some("it's")]));
    let mut runner = TestRunner::deterministic();
    for _ in 0..15 {
        let (fields, interval, unit) = specs.new_tree(&mut runner).unwrap().current();
        let field = |(name, type_): &(&str, &str)| json!({"name": name, "type": type_, "unit": unit});
        let desired = wanted(&fields.iter().map(field).collect(), interval);
        fixture.apply(&desired).await;
        assert_eq!(fixture.steps_left(&desired).await, 0, "{fields:?} {interval} {unit:?}");
    }
}

/// Gives the server a self-signed certificate, and a user with a password.
async fn serve_tls(postgres: &Postgres) -> Client {
    let certificate = rcgen::generate_simple_self_signed(["127.0.0.1".to_owned()]).unwrap();
    let client = postgres.client("postgres").await;
    postgres.write("server.crt", &certificate.cert.pem());
    postgres.write("server.key", &certificate.signing_key.serialize_pem());
    postgres.write("pg_hba.conf", "host all limited 127.0.0.1/32 scram-sha-256\nhost all all 127.0.0.1/32 trust\n");
    client.batch_execute("CREATE ROLE limited LOGIN PASSWORD 'right'").await.unwrap();
    client.batch_execute("ALTER SYSTEM SET ssl = on").await.unwrap();
    client.batch_execute("SELECT pg_reload_conf()").await.unwrap();
    client
}

#[tokio::test]
async fn connections_are_encrypted_as_their_uri_requires() {
    let postgres = Postgres::start().await;
    let uri = |user: &str, mode: &str| postgres.uri_text("postgres").replace("postgres@", &format!("{user}@")).replace("disable", mode);
    let refused = connect(&uri("postgres", "require").parse().unwrap(), "test").await.err().unwrap();
    assert_eq!(refused.reason(), "DatabaseUnavailable", "no TLS there yet: {refused:?}");
    let admin = serve_tls(&postgres).await;
    while admin.query_one("SHOW ssl", &[]).await.unwrap().get::<_, String>(0) != "on" {
        tokio::task::yield_now().await;
    }
    for (user, mode, expected) in [
        ("postgres", "disable", Ok(false)),
        ("postgres", "prefer", Ok(true)),
        ("postgres", "require", Ok(true)),
        ("postgres", "verify-full", Err("DatabaseUnavailable")),
        ("limited:right", "require", Ok(true)),
        ("limited:right", "disable", Ok(false)),
        ("limited:wrong", "require", Err("LoginRefused")),
        ("nobody", "require", Err("LoginRefused")),
    ] {
        let found = match connect(&uri(user, mode).parse().unwrap(), "test").await {
            Ok((client, connection)) => {
                drive(connection);
                Ok(client.query_one("SELECT ssl FROM pg_stat_ssl WHERE pid = pg_backend_pid()", &[]).await.unwrap().get(0))
            }
            Err(error) => Err(error.reason().as_str()),
        };
        assert_eq!(found, expected, "{user} {mode}");
    }
}

/// A Pipeline with a table of its name and this retention of dead letters.
fn keeping(pipeline: &str, retention: &str) -> Desired {
    let spec: PipelineSpec = serde_json::from_value(json!({
        "source": {"topic": "{device}/telemetry"},
        "decode": {"fields": [{"name": "rms", "type": "Float64"}]},
        "sink": {"timescale": {"connectionSecret": {"name": "db"}, "table": pipeline}},
        "deadLetters": {"retention": retention},
    }))
    .unwrap();
    compile(owner(pipeline), &spec, Ok(None)).unwrap().desired
}

/// Inserts dead letters of this age, and their count.
async fn refuse(fixture: &Fixture, pipeline: &str, age: &str, count: u64) {
    fixture
        .execute(&format!(
            "INSERT INTO fleetwright.dead_letter (time, namespace, pipeline, gateway, topic, payload, reason, detail, partial)
             SELECT now() - interval '{age}', 'plant', '{pipeline}', 'g', 't', '', 'Malformed', '{age}', false FROM generate_series(1, {count});
             INSERT INTO fleetwright.dead_letter_count SELECT now() - interval '{age}', 'plant', '{pipeline}', 'g', 'Malformed', {count}, 0, 1"
        ))
        .await;
}

async fn ages(fixture: &Fixture, pipeline: &str) -> String {
    let query = format!("SELECT string_agg(detail, ',' ORDER BY id) FROM fleetwright.dead_letter WHERE pipeline = '{pipeline}'");
    fixture.text(&query).await.unwrap_or_default()
}

#[tokio::test]
async fn dead_letters_are_deleted_after_the_retention_of_their_pipeline() {
    let mut fixture = Fixture::new().await;
    fixture.apply(&keeping("month", "30d")).await;
    fixture.apply(&keeping("hour", "1h")).await;
    fixture.apply(&keeping("gone", "1d")).await;
    release(&mut fixture.client, &owner("gone"), "gone", DeletionPolicy::Retain).await.unwrap();
    for pipeline in ["month", "hour", "gone"] {
        for age in ["40d", "2d", "2h", "1m"] {
            refuse(&fixture, pipeline, age, 1).await;
        }
    }
    refuse(&fixture, "hour", "3h", 12_000).await;
    let swept = sweep(&fixture.client).await.unwrap();
    assert!(swept.chunks >= 1);
    assert_eq!(swept.deleted, [(owner("gone"), 1), (owner("hour"), 12_002)]);
    for (pipeline, expected) in [("month", "2d,2h,1m"), ("hour", "1m"), ("gone", "2h,1m")] {
        assert_eq!(ages(&fixture, pipeline).await, expected, "{pipeline}");
    }
    // Locked rows are skipped, and deleted by the next sweep.
    refuse(&fixture, "hour", "2h", 1).await;
    let other = fixture.postgres.client(&fixture.database).await;
    other.batch_execute("BEGIN; SELECT FROM fleetwright.dead_letter WHERE pipeline = 'hour' AND detail = '2h' FOR UPDATE").await.unwrap();
    assert_eq!(sweep(&fixture.client).await.unwrap(), Swept::default());
    other.batch_execute("ROLLBACK").await.unwrap();
    assert_eq!(sweep(&fixture.client).await.unwrap(), Swept { chunks: 0, deleted: vec![(owner("hour"), 1)] });
    assert_eq!(sweep(&fixture.client).await.unwrap(), Swept::default());
    let read = async |pipeline: &str| dead_letter::read(&fixture.client, &owner(pipeline), None).await.unwrap();
    assert_eq!(read("hour").await, DeadLetters { failure: None, refused: 2, discarded: 1, replay: None });
    assert_eq!(read("month").await, DeadLetters { failure: None, refused: 4, discarded: 2, replay: None });
}

#[tokio::test]
async fn dead_letters_are_deleted_with_their_table() {
    let mut fixture = Fixture::new().await;
    for pipeline in ["left", "deleted"] {
        fixture.apply(&keeping(pipeline, "30d")).await;
        refuse(&fixture, pipeline, "1m", 1).await;
    }
    release(&mut fixture.client, &owner("left"), "left", DeletionPolicy::Retain).await.unwrap();
    release(&mut fixture.client, &owner("deleted"), "deleted", DeletionPolicy::Delete).await.unwrap();
    assert_eq!(sweep(&fixture.client).await.unwrap().deleted, [(owner("deleted"), 1)]);
    assert_eq!((ages(&fixture, "left").await.as_str(), ages(&fixture, "deleted").await.as_str()), ("1m", ""));
    let known = "SELECT string_agg(pipeline, ',') FROM fleetwright.dead_letter_retention";
    assert_eq!(fixture.text(known).await.as_deref(), Some("left"));
}

#[tokio::test]
async fn the_tables_of_version_3_are_upgraded() {
    let mut fixture = Fixture::new().await;
    let desired = keeping("month", "30d");
    fixture.apply(&desired).await;
    refuse(&fixture, "gone", "1m", 1).await;
    fixture
        .execute(
            "DROP TABLE fleetwright.dead_letter_retention; DROP TABLE fleetwright.pipeline_replay;
             COMMENT ON SCHEMA fleetwright IS '3'",
        )
        .await;
    fixture.apply(&desired).await;
    assert_eq!(fixture.steps_left(&desired).await, 0);
    let known = "SELECT string_agg(pipeline, ',' ORDER BY pipeline) FROM fleetwright.dead_letter_retention";
    assert_eq!(fixture.text(known).await.as_deref(), Some("gone,month"));
}
