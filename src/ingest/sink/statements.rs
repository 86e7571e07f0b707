//! The statements of a Pipeline, written once.

use crate::api::pipeline::Field;
use crate::database::identifier::identifier;
use crate::sink::timescale::schema::ColumnType;
use crate::state::system::SCHEMA;

/// Name of the temporary table through which batches with duplicates go.
const STAGING: &str = "fleetwright_staging";

/// What is written to a Pipeline's table.
#[derive(Clone, Debug)]
pub struct Statements {
    /// COPY into the table.
    pub copy: String,
    /// COPY into the dead letters.
    pub copy_dead_letters: String,
    /// Makes the staging table of this connection.
    pub create_staging: String,
    /// COPY into the staging table.
    pub copy_staging: String,
    /// Moves the staged rows whose keys are new, and counts them.
    pub merge: String,
    /// The keys of the staged rows that the table has with other values; between two times, so that few chunks are looked at.
    pub conflicts: String,
    /// Empties the staging table.
    pub clear_staging: String,
    /// A row of plausible values, for the proof that rows can be written.
    pub probe: String,
    /// The columns, with the type that each must have.
    pub columns: Vec<(String, &'static str)>,
    /// The table, for messages.
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
                "COPY {SCHEMA}.dead_letter (time, namespace, pipeline, gateway, topic, payload, reason, detail, partial) FROM STDIN (FORMAT binary)"
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

/// What every connection sets. A database that acknowledges commits before they are on its disk would make the broker forget
/// what is not stored; a statement that hangs would hold its locks for good. So would a COPY whose worker has vanished with its
/// machine, and the worker in its place would wait for the same keys: PostgreSQL ends no statement that waits for its client, and
/// asks only after two hours whether that is there, unless told (in seconds; the last in milliseconds).
pub const SET_UP: &str = "
    SELECT set_config('synchronous_commit', 'on', false) WHERE current_setting('synchronous_commit') = 'off';
    SET statement_timeout = '60s'; SET idle_in_transaction_session_timeout = '60s';
    SET tcp_keepalives_idle = 15; SET tcp_keepalives_interval = 5; SET tcp_keepalives_count = 3; SET tcp_user_timeout = 30000;
    SET enable_hashjoin = off; SET enable_mergejoin = off";

/// The columns of a table with their types.
pub const COLUMNS: &str = "SELECT attname, format_type(atttypid, NULL) FROM pg_attribute
    WHERE attrelid = to_regclass($1) AND attnum > 0 AND NOT attisdropped";

/// Stores the entries of a batch; stores nothing when the session belongs to another process by now. The lock makes a process
/// that takes the session over wait for this transaction.
pub fn commit_entries() -> String {
    format!(
        "WITH held AS (SELECT FROM {SCHEMA}.session WHERE session = $1 AND generation = $2 FOR SHARE)
         INSERT INTO {SCHEMA}.acknowledgement (session, batch, entries) SELECT $1, $3, $4 FROM held"
    )
}

/// The bytes of dead letters that this hour's transactions kept, by reason. The hour is that of the database's clock, which all
/// workers share.
pub fn read_kept_bytes() -> String {
    format!(
        "SELECT reason, sum(kept_bytes)::bigint FROM {SCHEMA}.dead_letter_count
         WHERE namespace = $1 AND pipeline = $2 AND hour = date_trunc('hour', now(), 'UTC') GROUP BY reason"
    )
}

/// Counts dead letters of this hour.
pub fn count_dead_letters() -> String {
    format!(
        "INSERT INTO {SCHEMA}.dead_letter_count AS counted (hour, namespace, pipeline, gateway, reason, kept, kept_bytes, discarded)
         SELECT date_trunc('hour', now(), 'UTC'), $1, $2, $3, new.*
         FROM unnest($4, $5, $6, $7) AS new (reason, kept, kept_bytes, discarded) ORDER BY reason
         ON CONFLICT (namespace, pipeline, hour, gateway, reason) DO UPDATE SET kept = counted.kept + excluded.kept,
            kept_bytes = counted.kept_bytes + excluded.kept_bytes, discarded = counted.discarded + excluded.discarded"
    )
}

/// Whether a batch is committed.
pub fn is_committed() -> String {
    format!("SELECT EXISTS (SELECT FROM {SCHEMA}.acknowledgement WHERE session = $1 AND batch = $2)")
}

/// Forgets batches.
pub fn forget_batches() -> String {
    format!("DELETE FROM {SCHEMA}.acknowledgement WHERE session = $1 AND batch = ANY($2)")
}

/// Takes a session over.
pub fn open_session() -> String {
    format!(
        "INSERT INTO {SCHEMA}.session (session, generation, topic_filters) VALUES ($1, 1, $2) ON CONFLICT (session)
         DO UPDATE SET generation = session.generation + 1,
                       topic_filters = (SELECT array_agg(DISTINCT filter) FROM unnest(session.topic_filters || excluded.topic_filters) filter)
         RETURNING generation, topic_filters"
    )
}

/// Takes a session over that has begun.
pub fn reopen_session() -> String {
    format!("UPDATE {SCHEMA}.session SET generation = generation + 1 WHERE session = $1 RETURNING generation, topic_filters")
}

/// Forgets a session, with its entries.
pub fn forget_session() -> String {
    format!(
        "WITH ended AS (DELETE FROM {SCHEMA}.session WHERE session = $1 AND generation = $2 RETURNING session)
         DELETE FROM {SCHEMA}.acknowledgement entry USING ended WHERE entry.session = ended.session"
    )
}

/// Whether a session belongs to this generation. One whose row is gone belongs to nobody else.
pub fn is_session_held() -> String {
    format!("SELECT NOT EXISTS (SELECT FROM {SCHEMA}.session WHERE session = $1 AND generation > $2)")
}

/// The entries of a session.
pub fn read_entries() -> String {
    format!("SELECT batch, entries FROM {SCHEMA}.acknowledgement WHERE session = $1 ORDER BY batch")
}

/// Says which topic filters the broker holds for a session.
pub fn set_filters() -> String {
    format!("UPDATE {SCHEMA}.session SET topic_filters = $3 WHERE session = $1 AND generation = $2")
}
