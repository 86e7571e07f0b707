//! The tables that all Pipelines of a database share, in the schema `fleetwright`.

use crate::database::identifier::{identifier, literal};

/// Schema of Fleetwright's own tables.
pub const SCHEMA: &str = "fleetwright";

/// Channel on which a change of `fleetwright.device` is notified; the payload is the namespace.
pub const DEVICE_CHANNEL: &str = "fleetwright_device";

/// Version of the tables below, kept as the comment of the schema. Raised with every change of [`statements`].
pub const VERSION: i32 = 5;

/// The tables, each of which [`statements`] creates.
pub const TABLES: [&str; 9] = [
    "device",
    "dead_letter",
    "dead_letter_count",
    "dead_letter_retention",
    "pipeline_replay",
    "session",
    "acknowledgement",
    "assignment",
    "pipeline_table",
];

/// The statements that bring a database to [`VERSION`] from any earlier version or from none, in one transaction.
/// `extension_schema` is the schema of the functions of TimescaleDB. The rows of a version without clusters become those of `cluster`.
#[must_use]
pub fn statements(extension_schema: &str, cluster: &str) -> Vec<String> {
    let letters = dead_letters(&identifier(extension_schema));
    let version = format!("COMMENT ON SCHEMA {SCHEMA} IS '{VERSION}'");
    [registry(), letters, sessions(), clusters(cluster), vec![version]].concat()
}

/// The tables whose key includes the cluster, the name of the key, and its other columns. `pipeline_table` is not one of them: a table has one
/// owner.
const KEYS: [(&str, &str, &str); 7] = [
    ("device", "device_namespace_name_key", "namespace, name"),
    ("dead_letter_count", "dead_letter_count_pkey", "namespace, pipeline, hour, gateway, reason"),
    ("dead_letter_retention", "dead_letter_retention_pkey", "namespace, pipeline"),
    ("pipeline_replay", "pipeline_replay_pkey", "namespace, pipeline, token"),
    ("session", "session_pkey", "session"),
    ("acknowledgement", "acknowledgement_pkey", "session, batch"),
    ("assignment", "assignment_pkey", "namespace, pipeline, gateway"),
];

/// The cluster in every table: clusters that share a database do not touch the rows of one another.
///
/// Earlier versions had no clusters. The default adopts their rows for the cluster that upgrades the database, without rewriting them, and also
/// the rows that workers of the earlier version write until they are replaced. Their batches with dead letters fail, because they count by
/// the former key, and are written by the next worker. All statements of this version name the cluster.
fn clusters(cluster: &str) -> Vec<String> {
    let mut statements = Vec::new();
    for table in TABLES {
        statements
            .push(format!("ALTER TABLE {SCHEMA}.{table} ADD COLUMN IF NOT EXISTS cluster text NOT NULL DEFAULT {}", literal(cluster)));
    }
    for (table, key, columns) in KEYS {
        let kind = if key.ends_with("_pkey") { "PRIMARY KEY" } else { "UNIQUE" };
        statements.push(format!(
            "ALTER TABLE {SCHEMA}.{table} DROP CONSTRAINT IF EXISTS {key}, ADD CONSTRAINT {key} {kind} (cluster, {columns})"
        ));
    }
    // Every Pipeline with dead letters has a row, also if it was deleted.
    statements.push(format!(
        "INSERT INTO {SCHEMA}.dead_letter_retention (cluster, namespace, pipeline, retention)
         SELECT DISTINCT cluster, namespace, pipeline, INTERVAL '30 days' FROM {SCHEMA}.dead_letter ON CONFLICT DO NOTHING"
    ));
    statements.push(format!("COMMENT ON COLUMN {SCHEMA}.pipeline_table.cluster IS 'UID of the namespace kube-system of the cluster'"));
    statements
}

fn registry() -> Vec<String> {
    vec![
        format!("CREATE SCHEMA IF NOT EXISTS {SCHEMA}"),
        // A device keeps its id permanently, also when its object is deleted and created again: rows refer to it.
        format!(
            "CREATE TABLE IF NOT EXISTS {SCHEMA}.device (
                id integer GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
                namespace text NOT NULL,
                name text NOT NULL,
                gateway text NOT NULL,
                attributes jsonb NOT NULL DEFAULT '{{}}',
                enabled boolean NOT NULL,
                declared boolean NOT NULL DEFAULT true,
                UNIQUE (namespace, name))"
        ),
        format!("COMMENT ON COLUMN {SCHEMA}.device.declared IS 'false once the Device object is gone'"),
    ]
}

/// The dead letters of all Pipelines, their counts, their retention and their replays.
fn dead_letters(timescale: &str) -> Vec<String> {
    vec![
        format!(
            "CREATE TABLE IF NOT EXISTS {SCHEMA}.dead_letter (
                time timestamptz NOT NULL,
                namespace text NOT NULL,
                pipeline text NOT NULL,
                gateway text NOT NULL,
                topic text NOT NULL,
                payload bytea NOT NULL,
                reason text NOT NULL,
                detail text NOT NULL)"
        ),
        format!(
            "SELECT {timescale}.create_hypertable('{SCHEMA}.dead_letter', {timescale}.by_range('time', INTERVAL '1 day'), if_not_exists => true)"
        ),
        // After the table, which an earlier version created without it. Replays follow it, in the order of arrival.
        format!("CREATE SEQUENCE IF NOT EXISTS {SCHEMA}.dead_letter_id"),
        format!("ALTER TABLE {SCHEMA}.dead_letter ADD COLUMN IF NOT EXISTS id bigint NOT NULL DEFAULT nextval('{SCHEMA}.dead_letter_id')"),
        format!("COMMENT ON COLUMN {SCHEMA}.dead_letter.id IS 'keeps its value when a replay refuses the message again'"),
        // True if unknown, as for rows of an earlier version.
        format!("ALTER TABLE {SCHEMA}.dead_letter ADD COLUMN IF NOT EXISTS partial boolean NOT NULL DEFAULT true"),
        format!("COMMENT ON COLUMN {SCHEMA}.dead_letter.partial IS 'whether other readings of the message are rows'"),
        format!("CREATE INDEX IF NOT EXISTS dead_letter_pipeline_id ON {SCHEMA}.dead_letter (namespace, pipeline, id)"),
        // Every refused message, including those beyond the quota: one row per hour, gateway and reason.
        format!(
            "CREATE TABLE IF NOT EXISTS {SCHEMA}.dead_letter_count (
                hour timestamptz NOT NULL,
                namespace text NOT NULL,
                pipeline text NOT NULL,
                gateway text NOT NULL,
                reason text NOT NULL,
                kept bigint NOT NULL,
                kept_bytes bigint NOT NULL,
                discarded bigint NOT NULL,
                PRIMARY KEY (namespace, pipeline, hour, gateway, reason))"
        ),
        // The retention of the dead letters of a Pipeline. Kept after the Pipeline is deleted, as long as its dead letters.
        format!(
            "CREATE TABLE IF NOT EXISTS {SCHEMA}.dead_letter_retention (
                namespace text NOT NULL,
                pipeline text NOT NULL,
                retention interval NOT NULL,
                PRIMARY KEY (namespace, pipeline))"
        ),
        // The replays that a Pipeline requested: the last dead letter of each, and the progress.
        format!(
            "CREATE TABLE IF NOT EXISTS {SCHEMA}.pipeline_replay (
                namespace text NOT NULL,
                pipeline text NOT NULL,
                token text NOT NULL,
                done_id bigint NOT NULL,
                last_id bigint NOT NULL,
                stored bigint NOT NULL,
                refused bigint NOT NULL,
                left_alone bigint NOT NULL,
                remaining bigint NOT NULL,
                finished boolean NOT NULL,
                failure text,
                PRIMARY KEY (namespace, pipeline, token))"
        ),
    ]
}

/// The persistent state of workers, and the owners of tables.
fn sessions() -> Vec<String> {
    vec![
        // A session of a Pipeline with a broker, `<namespace>/<pipeline>/<gateway>`, with the suffix `/1` and so on if several share a
        // subscription: the topic filters that the broker may hold for it, and a generation that every process raises when it takes
        // the session over, so that a transaction of an earlier process can no longer commit.
        format!(
            "CREATE TABLE IF NOT EXISTS {SCHEMA}.session (
                session text PRIMARY KEY,
                generation bigint NOT NULL,
                topic_filters text[] NOT NULL)"
        ),
        format!("ALTER TABLE {SCHEMA}.session ADD COLUMN IF NOT EXISTS failure text"),
        format!("COMMENT ON COLUMN {SCHEMA}.session.failure IS 'why a batch of its messages keeps failing'"),
        // The redelivery entries of a session, one row per batch: packet identifiers with hashes. Only for batches with messages that
        // no key identifies (a time of arrival, a dead letter); deleted once the broker has processed the acknowledgements.
        format!(
            "CREATE TABLE IF NOT EXISTS {SCHEMA}.acknowledgement (
                session text NOT NULL,
                batch bigint NOT NULL,
                entries bytea NOT NULL,
                PRIMARY KEY (session, batch))"
        ),
        // The ordinal of the worker that reads a gateway; `gateway` names a session, as above. Without a row, the first worker (0)
        // reads it.
        format!(
            "CREATE TABLE IF NOT EXISTS {SCHEMA}.assignment (
                namespace text NOT NULL,
                pipeline text NOT NULL,
                gateway text NOT NULL,
                worker integer NOT NULL,
                PRIMARY KEY (namespace, pipeline, gateway))"
        ),
        // The owner of a table. After its Pipeline was deleted and the table kept, `pipeline` is NULL.
        format!(
            "CREATE TABLE IF NOT EXISTS {SCHEMA}.pipeline_table (
                table_name text PRIMARY KEY,
                namespace text NOT NULL,
                pipeline text)"
        ),
    ]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_table_has_the_cluster() {
        let statements = statements("public", "it's").join("\n");
        for table in TABLES {
            let adopted = format!("ALTER TABLE {SCHEMA}.{table} ADD COLUMN IF NOT EXISTS cluster text NOT NULL DEFAULT 'it''s'");
            assert!(statements.contains(&adopted), "{table}");
        }
    }
}
