//! Reads the state of a database from its catalog.

use tokio_postgres::types::Type;
use tokio_postgres::{Error, GenericClient};

use super::schema::TIME;
use crate::state::owner::{Owner, Parameter};
use crate::state::system;

/// The state of a database for one table.
#[derive(Clone, Debug, Default, Eq, PartialEq)]
pub struct ObservedSchema {
    /// TimescaleDB, if the extension is installed.
    pub extension: Option<Extension>,
    /// Version of the tables of Fleetwright, if all of them exist.
    pub system_version: Option<i32>,
    /// The owner of the table.
    pub claim: Option<Claim>,
    /// Retention of the dead letters of the owner of the table, in microseconds.
    pub dead_letter_retention: Option<i64>,
    /// The relation with the name of the table in the schema `public`.
    pub table: Option<ObservedTable>,
}

/// An installed TimescaleDB.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Extension {
    /// Schema of its functions.
    pub schema: String,
    /// Version, for instance `2.19.3`.
    pub version: String,
}

/// A row of `fleetwright.pipeline_table`.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Claim {
    /// Identity of the cluster; `None` in a database of a version without clusters, which the cluster that upgrades it adopts.
    pub cluster: Option<String>,
    /// Namespace of the Pipeline.
    pub namespace: String,
    /// Name of the Pipeline; `None` after it was deleted and its table kept.
    pub pipeline: Option<String>,
}

impl Claim {
    /// Whether the table belongs to a Pipeline of the same namespace.
    #[must_use]
    pub fn is_of_namespace(&self, owner: &Owner) -> bool {
        self.namespace == owner.namespace && self.cluster.as_ref().is_none_or(|cluster| *cluster == owner.cluster)
    }
}

/// A relation.
#[derive(Clone, Debug, Default, Eq, PartialEq)]
pub struct ObservedTable {
    /// How much time one chunk covers, in microseconds; `None` if it is not a hypertable partitioned by time.
    pub chunk_interval: Option<i64>,
    /// Columns.
    pub columns: Vec<ObservedColumn>,
    /// The valid unique indexes.
    pub unique: Vec<UniqueIndex>,
}

/// A unique index without a condition.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct UniqueIndex {
    /// Name.
    pub name: String,
    /// Its columns, in order.
    pub columns: Vec<String>,
}

/// A column of a relation.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct ObservedColumn {
    /// Name.
    pub name: String,
    /// Type, as `format_type` writes it.
    pub type_: String,
    /// Comment.
    pub comment: Option<String>,
}

/// Reads the state of the database for `public.<table>`. Writes nothing, and takes no lock that blocks others.
pub async fn observe(client: &impl GenericClient, table: &str) -> Result<ObservedSchema, Error> {
    let row = client
        .query_typed_one(
            "SELECT
                (SELECT nspname FROM pg_extension JOIN pg_namespace n ON n.oid = extnamespace WHERE extname = 'timescaledb'),
                (SELECT extversion FROM pg_extension WHERE extname = 'timescaledb'),
                (SELECT obj_description(n.oid, 'pg_namespace') FROM pg_namespace n WHERE nspname = $1),
                (SELECT count(*) FROM pg_class c JOIN pg_namespace n ON n.oid = relnamespace WHERE nspname = $1 AND relname = ANY($2)),
                EXISTS (SELECT FROM pg_class c JOIN pg_namespace n ON n.oid = relnamespace WHERE nspname = $1 AND relname = 'pipeline_table'),
                (SELECT c.oid FROM pg_class c JOIN pg_namespace n ON n.oid = relnamespace WHERE nspname = 'public' AND relname = $3),
                EXISTS (SELECT FROM pg_class c JOIN pg_namespace n ON n.oid = relnamespace WHERE nspname = $1 AND relname = 'dead_letter_retention'),
                EXISTS (SELECT FROM pg_attribute WHERE attrelid = to_regclass('fleetwright.pipeline_table') AND attname = 'cluster' AND NOT attisdropped),
                EXISTS (SELECT FROM pg_attribute WHERE attrelid = to_regclass('fleetwright.dead_letter_retention') AND attname = 'cluster' AND NOT attisdropped)",
            &[(&system::SCHEMA, Type::TEXT), (&system::TABLES.as_slice(), Type::TEXT_ARRAY), (&table, Type::TEXT)],
        )
        .await?;
    let schema: Option<String> = row.try_get(0)?;
    let version: Option<String> = row.try_get(1)?;
    let extension = schema.zip(version).map(|(schema, version)| Extension { schema, version });
    let system_version: Option<String> = row.try_get(2)?;
    let is_complete = usize::try_from(row.try_get::<_, i64>(3)?).is_ok_and(|count| count == system::TABLES.len());
    let claim = if row.try_get(4)? { claim(client, table, row.try_get(7)?).await? } else { None };
    let dead_letter_retention = match &claim {
        Some(claim) if row.try_get(6)? => retention(client, claim, row.try_get(8)?).await?,
        _ => None,
    };
    let table = match row.try_get::<_, Option<u32>>(5)? {
        Some(oid) => Some(observe_table(client, table, oid, extension.is_some()).await?),
        None => None,
    };
    let system_version = system_version.and_then(|text| text.parse().ok()).filter(|_| is_complete);
    Ok(ObservedSchema { extension, system_version, claim, dead_letter_retention, table })
}

async fn claim(client: &impl GenericClient, table: &str, has_clusters: bool) -> Result<Option<Claim>, Error> {
    let cluster = if has_clusters { "cluster" } else { "NULL::text" };
    let statement = format!("SELECT {cluster}, namespace, pipeline FROM fleetwright.pipeline_table WHERE table_name = $1");
    let row = client.query_typed_opt(&statement, &[(&table, Type::TEXT)]).await?;
    row.map(|row| Ok(Claim { cluster: row.try_get(0)?, namespace: row.try_get(1)?, pipeline: row.try_get(2)? })).transpose()
}

async fn retention(client: &impl GenericClient, claim: &Claim, has_clusters: bool) -> Result<Option<i64>, Error> {
    let Some(pipeline) = &claim.pipeline else { return Ok(None) };
    let of_cluster = if has_clusters { "cluster = $3" } else { "$3::text IS NULL" };
    let statement = format!(
        "SELECT (extract(epoch FROM retention) * 1000000)::bigint FROM fleetwright.dead_letter_retention
         WHERE namespace = $1 AND pipeline = $2 AND {of_cluster}"
    );
    let parameters: [Parameter<'_>; 3] = [(&claim.namespace, Type::TEXT), (pipeline, Type::TEXT), (&claim.cluster, Type::TEXT)];
    let row = client.query_typed_opt(&statement, &parameters).await?;
    row.map_or(Ok(None), |row| row.try_get(0))
}

async fn observe_table(client: &impl GenericClient, table: &str, oid: u32, has_extension: bool) -> Result<ObservedTable, Error> {
    let columns = client
        .query_typed(
            "SELECT attname::text, format_type(atttypid, atttypmod), col_description(attrelid, attnum)
             FROM pg_attribute WHERE attrelid = $1 AND attnum > 0 AND NOT attisdropped ORDER BY attnum",
            &[(&oid, Type::OID)],
        )
        .await?;
    let columns: Result<Vec<_>, Error> =
        columns.iter().map(|row| Ok(ObservedColumn { name: row.try_get(0)?, type_: row.try_get(1)?, comment: row.try_get(2)? })).collect();
    let unique = client
        .query_typed(
            "SELECT relname::text,
                (SELECT array_agg(attname::text ORDER BY place) FROM unnest(indkey) WITH ORDINALITY AS key (number, place)
                 JOIN pg_attribute ON attrelid = indrelid AND attnum = number)
             FROM pg_index JOIN pg_class ON pg_class.oid = indexrelid
             WHERE indrelid = $1 AND indisunique AND indisvalid AND indpred IS NULL AND indexprs IS NULL ORDER BY relname",
            &[(&oid, Type::OID)],
        )
        .await?;
    let unique: Result<Vec<_>, Error> =
        unique.iter().map(|row| Ok(UniqueIndex { name: row.try_get(0)?, columns: row.try_get(1)? })).collect();
    let chunk_interval = if has_extension { chunk_interval(client, table).await? } else { None };
    Ok(ObservedTable { chunk_interval, columns: columns?, unique: unique? })
}

async fn chunk_interval(client: &impl GenericClient, table: &str) -> Result<Option<i64>, Error> {
    let statement = "SELECT (extract(epoch FROM time_interval) * 1000000)::bigint FROM timescaledb_information.dimensions
         WHERE hypertable_schema = 'public' AND hypertable_name = $1 AND column_name = $2 AND dimension_number = 1";
    let row = client.query_typed_opt(statement, &[(&table, Type::TEXT), (&TIME, Type::TEXT)]).await?;
    row.map_or(Ok(None), |row| row.try_get(0))
}
