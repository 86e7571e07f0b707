//! The SQL statements for the table of a Pipeline.

use super::schema::ColumnType;
use crate::api::pipeline::Field;
use crate::database::identifier::identifier;
use crate::state::system::SCHEMA;

/// Name of the temporary table for batches with duplicates.
const STAGING: &str = "fleetwright_staging";

/// The statements for the table of a Pipeline.
#[derive(Clone, Debug)]
pub struct Statements {
    /// COPY into the table.
    pub copy: String,
    /// COPY into the dead letters.
    pub copy_dead_letters: String,
    /// Creates the staging table of a connection.
    pub create_staging: String,
    /// COPY into the staging table.
    pub copy_staging: String,
    /// Inserts the staged rows whose keys are new. Their number is that of the affected rows.
    pub merge: String,
    /// The keys of the staged rows that the table has with other values; between two times, so that few chunks are scanned.
    pub conflicts: String,
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
    /// The statements for a table of the schema `public` with these tags and fields.
    #[must_use]
    pub fn new(table: &str, tags: &[String], fields: &[Field]) -> Self {
        let mut columns = vec![("time".to_owned(), "timestamp with time zone"), ("device_id".to_owned(), "integer")];
        columns.extend(tags.iter().map(|tag| (tag.clone(), "text")));
        columns.extend(fields.iter().map(|field| (field.name.clone(), ColumnType::from(field.type_).as_sql())));
        let names: Vec<String> = columns.iter().map(|(name, _)| identifier(name)).collect();
        let (list, values) = (names.join(", "), &names[2..]);
        let of = |alias: &str| values.iter().map(|name| format!("{alias}.{name}")).collect::<Vec<_>>().join(", ");
        let qualified = format!("public.{}", identifier(table));
        let probes: Vec<&str> = columns[2..].iter().map(|(_, type_)| probe(type_)).collect();
        Self {
            copy: format!("COPY {qualified} ({list}) FROM STDIN (FORMAT binary)"),
            copy_dead_letters: format!(
                "COPY {SCHEMA}.dead_letter (cluster, time, namespace, pipeline, gateway, topic, payload, reason, detail, partial)
                 FROM STDIN (FORMAT binary)"
            ),
            create_staging: format!("CREATE TEMPORARY TABLE {STAGING} AS SELECT {list} FROM {qualified} WITH NO DATA"),
            copy_staging: format!("COPY {STAGING} ({list}) FROM STDIN (FORMAT binary)"),
            merge: format!(
                "INSERT INTO {qualified} ({list}) SELECT {list} FROM {STAGING} ORDER BY time, device_id ON CONFLICT (time, device_id) DO NOTHING"
            ),
            conflicts: format!(
                "SELECT staged.time, staged.device_id FROM {STAGING} staged JOIN {qualified} stored USING (time, device_id)
                 WHERE stored.time BETWEEN $1 AND $2 AND ROW({}) IS DISTINCT FROM ROW({})",
                of("staged"),
                of("stored")
            ),
            clear_staging: format!("TRUNCATE {STAGING}"),
            probe: format!("INSERT INTO {qualified} ({list}) VALUES (now(), 0, {})", probes.join(", ")),
            columns,
            table: format!("public.{table}"),
        }
    }
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
