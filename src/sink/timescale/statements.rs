//! The SQL statements for the table of a Pipeline.

use super::schema::{ColumnType, DEVICE_ID, TIME};
use crate::api::pipeline::{Field, OnConflict};
use crate::database::identifier::identifier;
use crate::state::system::SCHEMA;

/// Name of the temporary table for rows whose keys may exist.
const STAGING: &str = "fleetwright_staging";

/// The column of the staging table with the position of a row in its batch. No field can have this name, because of the dot.
const POSITION: &str = "fleetwright.position";

/// The statements for the table of a Pipeline.
#[derive(Clone, Debug)]
pub struct Statements {
    /// COPY into the table.
    pub copy: String,
    /// COPY into the dead letters.
    pub copy_dead_letters: String,
    /// Creates the staging table of a connection.
    pub create_staging: String,
    /// COPY into the staging table. The last column is the position of the row in its batch.
    pub copy_staging: String,
    /// Inserts the staged rows whose keys are new, and adds the values of the others to the stored rows. Returns whether the row is new, for
    /// each row that changed.
    pub merge: String,
    /// The positions of the staged rows that contradict stored rows. The parameters are the first and the last time of the staged rows,
    /// so that few chunks are read.
    pub conflicts: String,
    /// What is done with the rows of `conflicts`.
    pub on_conflict: OnConflict,
    /// Empties the staging table.
    pub clear_staging: String,
    /// Inserts a row of plausible values, for the write probe.
    pub probe: String,
    /// The columns, with their required types.
    pub columns: Vec<(String, &'static str)>,
    /// The table, with its schema.
    pub table: String,
}

impl Statements {
    /// The statements for a table of the schema `public` with these captures and fields. The fields of the key must be the first.
    #[must_use]
    pub fn new(table: &str, captures: &[String], fields: &[Field], on_conflict: OnConflict) -> Self {
        let mut columns = vec![(TIME.to_owned(), "timestamp with time zone"), (DEVICE_ID.to_owned(), "integer")];
        columns.extend(captures.iter().map(|capture| (capture.clone(), "text")));
        columns.extend(fields.iter().map(|field| (field.name.clone(), ColumnType::from(field.type_).as_sql())));
        let names: Vec<String> = columns.iter().map(|(name, _)| identifier(name)).collect();
        let (key, values) = names.split_at(2 + captures.len() + fields.iter().take_while(|field| field.key).count());
        let (list, key) = (names.join(", "), key.join(", "));
        let (qualified, position) = (format!("public.{}", identifier(table)), identifier(POSITION));
        let probes: Vec<&str> = columns[2..].iter().map(|(_, type_)| probe(type_)).collect();
        Self {
            copy: format!("COPY {qualified} ({list}) FROM STDIN (FORMAT binary)"),
            copy_dead_letters: format!(
                "COPY {SCHEMA}.dead_letter (cluster, time, namespace, pipeline, gateway, topic, payload, reason, detail, partial)
                 FROM STDIN (FORMAT binary)"
            ),
            create_staging: format!("CREATE TEMPORARY TABLE {STAGING} AS SELECT {list}, 0 AS {position} FROM {qualified} WITH NO DATA"),
            copy_staging: format!("COPY {STAGING} ({list}, {position}) FROM STDIN (FORMAT binary)"),
            merge: format!(
                "INSERT INTO {qualified} AS stored ({list}) SELECT {list} FROM {STAGING} ORDER BY {key} ON CONFLICT ({key}) {}
                 RETURNING xmax = 0",
                update(values, on_conflict)
            ),
            conflicts: format!(
                "SELECT staged.{position} FROM {STAGING} staged JOIN {qualified} stored USING ({key})
                 WHERE stored.time BETWEEN $1 AND $2 AND ({})",
                contradiction("staged", values)
            ),
            on_conflict,
            clear_staging: format!("TRUNCATE {STAGING}"),
            probe: format!("INSERT INTO {qualified} ({list}) VALUES (now(), 0, {})", probes.join(", ")),
            columns,
            table: format!("public.{table}"),
        }
    }
}

/// What a staged row changes in the stored row with the same key. A row that would not change is not written.
fn update(values: &[String], on_conflict: OnConflict) -> String {
    if values.is_empty() {
        return "DO NOTHING".to_owned();
    }
    let set = |first: &str, second: &str| {
        values.iter().map(|name| format!("{name} = COALESCE({first}.{name}, {second}.{name})")).collect::<Vec<_>>().join(", ")
    };
    let adds = any(values, |name| format!("stored.{name} IS NULL AND excluded.{name} IS NOT NULL"));
    match on_conflict {
        OnConflict::DeadLetter => {
            let contradiction = contradiction("excluded", values);
            format!("DO UPDATE SET {} WHERE ({adds}) AND ({contradiction}) IS NOT TRUE", set("stored", "excluded"))
        }
        OnConflict::Keep => format!("DO UPDATE SET {} WHERE {adds}", set("stored", "excluded")),
        OnConflict::Replace => {
            let changes = any(values, |name| format!("excluded.{name} IS NOT NULL AND stored.{name} IS DISTINCT FROM excluded.{name}"));
            format!("DO UPDATE SET {} WHERE {changes}", set("excluded", "stored"))
        }
    }
}

/// Whether a column has different values in both rows. NULL contradicts nothing.
fn contradiction(other: &str, values: &[String]) -> String {
    if values.is_empty() { "false".to_owned() } else { any(values, |name| format!("stored.{name} <> {other}.{name}")) }
}

fn any(values: &[String], condition: impl Fn(&String) -> String) -> String {
    values.iter().map(condition).collect::<Vec<_>>().join(" OR ")
}

fn probe(type_: &str) -> &'static str {
    match type_ {
        "double precision" | "bigint" => "0",
        "boolean" => "false",
        "timestamp with time zone" => "now()",
        "jsonb" => "'{}'",
        _ => "''",
    }
}

/// The settings of every connection that writes.
///
/// `synchronous_commit`: a database that acknowledges a commit before it is on disk would make the broker delete messages that are not
/// stored. Timeouts: a statement that hangs would hold its locks indefinitely, and so would a COPY whose client has disappeared with
/// its machine. PostgreSQL never ends a statement that waits for its client, and by default checks the client after two hours only
/// (in seconds; the last in milliseconds).
pub const SETTINGS: &str = "
    SELECT set_config('synchronous_commit', 'on', false) WHERE current_setting('synchronous_commit') = 'off';
    SET statement_timeout = '60s'; SET idle_in_transaction_session_timeout = '60s';
    SET tcp_keepalives_idle = 15; SET tcp_keepalives_interval = 5; SET tcp_keepalives_count = 3; SET tcp_user_timeout = 30000;
    SET enable_hashjoin = off; SET enable_mergejoin = off";

/// Reads the columns of a table with their types.
pub const READ_COLUMNS: &str = "SELECT attname, format_type(atttypid, NULL) FROM pg_attribute
    WHERE attrelid = to_regclass($1) AND attnum > 0 AND NOT attisdropped";
