//! The desired hypertable of a Pipeline: pure.

use std::collections::HashSet;

use crate::api::PipelineSpec;
use crate::api::duration::{self, microseconds};
use crate::api::pipeline::FieldType;
use crate::api::topic::TopicPattern;
use crate::state::owner::Owner;

/// The column with the time of a reading.
pub const TIME: &str = "time";

/// The column with the id of the device in `fleetwright.device`.
pub const DEVICE_ID: &str = "device_id";

/// The most columns of an index of PostgreSQL (`INDEX_MAX_KEYS`).
const MAX_KEY_COLUMNS: usize = 32;

/// The longest retention, in microseconds: a hundred years. A time of PostgreSQL minus a longer one could overflow.
const MAX_RETENTION: i64 = 100 * 365 * 24 * 3600 * 1_000_000;

/// Type of a column.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum ColumnType {
    /// `timestamp with time zone`
    TimestampWithTimeZone,
    /// `integer`
    Integer,
    /// `bigint`
    BigInteger,
    /// `double precision`
    DoublePrecision,
    /// `boolean`
    Boolean,
    /// `text`
    Text,
    /// `jsonb`
    Json,
}

impl ColumnType {
    /// The type as PostgreSQL's `format_type` writes it.
    #[must_use]
    pub const fn as_sql(self) -> &'static str {
        match self {
            Self::TimestampWithTimeZone => "timestamp with time zone",
            Self::Integer => "integer",
            Self::BigInteger => "bigint",
            Self::DoublePrecision => "double precision",
            Self::Boolean => "boolean",
            Self::Text => "text",
            Self::Json => "jsonb",
        }
    }
}

impl From<FieldType> for ColumnType {
    fn from(type_: FieldType) -> Self {
        match type_ {
            FieldType::Float64 => Self::DoublePrecision,
            FieldType::Int64 => Self::BigInteger,
            FieldType::Boolean => Self::Boolean,
            FieldType::Text => Self::Text,
            FieldType::Timestamp => Self::TimestampWithTimeZone,
            FieldType::Json => Self::Json,
        }
    }
}

/// A column.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Column {
    /// Name.
    pub name: String,
    /// Type.
    pub type_: ColumnType,
    /// Whether NULL is refused. Only [`TIME`] and [`DEVICE_ID`] refuse it: the worker checks required fields, so that a change of
    /// `required` needs no change of the table.
    pub not_null: bool,
    /// Unit of a field.
    pub comment: Option<String>,
}

/// A hypertable in the schema `public`, partitioned by [`TIME`], with one unique index.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Table {
    /// Name.
    pub name: String,
    /// Columns: [`TIME`], [`DEVICE_ID`], the captures of the topic, the fields.
    pub columns: Vec<Column>,
    /// The columns of the unique index, in order: [`TIME`], [`DEVICE_ID`], the captures of the topic, the fields of the key.
    pub key: Vec<String>,
    /// How much time one chunk covers, in microseconds.
    pub chunk_interval: i64,
}

/// The desired state of the database for a Pipeline.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Desired {
    /// The Pipeline.
    pub owner: Owner,
    /// Its table.
    pub table: Table,
    /// How long its dead letters are kept, in microseconds.
    pub dead_letter_retention: i64,
}

/// Why a spec has no valid table. A change of the spec corrects it.
#[derive(Clone, Debug, Eq, PartialEq, thiserror::Error)]
pub enum SchemaError {
    /// Two columns would have one name.
    #[error("failed to name the columns: {name} would be two columns; rename the field or the capture of the topic")]
    NameColumns {
        /// The name.
        name: String,
    },

    /// The key is longer than an index can be.
    #[error("failed to index the key: it has {columns} columns, expected at most {MAX_KEY_COLUMNS}; replace captures of the topic by +")]
    IndexKey {
        /// Its number of columns.
        columns: usize,
    },

    /// The chunk interval is not a duration.
    #[error("failed to read chunkInterval: expected {}", duration::EXPECTED)]
    ReadChunkInterval,

    /// The retention of dead letters is not a duration.
    #[error("failed to read deadLetters.retention: expected {}", duration::EXPECTED)]
    ReadRetention,
}

/// The desired state for a spec, with its compiled topic.
pub fn desired(owner: Owner, spec: &PipelineSpec, topic: &TopicPattern) -> Result<Desired, SchemaError> {
    let own = [(TIME, ColumnType::TimestampWithTimeZone), (DEVICE_ID, ColumnType::Integer)];
    let own = own.map(|(name, type_)| Column { name: name.to_owned(), type_, not_null: true, comment: None });
    let tags = topic.tags().iter().map(|name| Column { name: name.clone(), type_: ColumnType::Text, not_null: false, comment: None });
    let key_fields = spec.decode.fields.iter().filter(|field| field.key).map(|field| &field.name);
    let key = own.iter().map(|column| &column.name).chain(topic.tags()).chain(key_fields).cloned().collect::<Vec<_>>();
    if key.len() > MAX_KEY_COLUMNS {
        return Err(SchemaError::IndexKey { columns: key.len() });
    }
    let fields = spec.decode.fields.iter().map(|field| Column {
        name: field.name.clone(),
        type_: field.type_.into(),
        not_null: false,
        comment: field.unit.clone(),
    });
    let columns: Vec<Column> = own.into_iter().chain(tags).chain(fields).collect();
    let mut names = HashSet::new();
    if let Some(twice) = columns.iter().find(|column| !names.insert(column.name.as_str())) {
        return Err(SchemaError::NameColumns { name: twice.name.clone() });
    }
    let sink = &spec.sink.timescale;
    let chunk_interval = microseconds(&sink.chunk_interval).ok_or(SchemaError::ReadChunkInterval)?;
    let retention = microseconds(&spec.dead_letters.retention).ok_or(SchemaError::ReadRetention)?.min(MAX_RETENTION);
    Ok(Desired { owner, dead_letter_retention: retention, table: Table { name: sink.table.clone(), columns, key, chunk_interval } })
}

#[cfg(test)]
pub(crate) mod tests {
    use serde_json::json;

    use super::*;

    /// A spec with this topic, these fields (name and type) and this chunk interval.
    pub(crate) fn spec(topic: &str, fields: &[(&str, &str)], chunk_interval: &str) -> PipelineSpec {
        let fields: Vec<_> = fields.iter().map(|(name, type_)| json!({"name": name, "type": type_})).collect();
        serde_json::from_value(json!({
            "source": {"topic": topic},
            "decode": {"fields": fields},
            "sink": {"timescale": {"connectionSecret": {"name": "timescale"}, "table": "vibration", "chunkInterval": chunk_interval}},
        }))
        .unwrap()
    }

    /// The desired state for a spec with a valid topic.
    pub(crate) fn compile(spec: &PipelineSpec) -> Result<Desired, SchemaError> {
        desired(owner(), spec, &TopicPattern::compile(&spec.source.topic, spec.decode.format).unwrap())
    }

    pub(crate) fn owner() -> Owner {
        Owner { cluster: "here".to_owned(), namespace: "plant".to_owned(), pipeline: "vibration".to_owned() }
    }

    #[test]
    fn columns_are_time_device_captures_fields() {
        let spec = spec("{site}/{device}/+/{line}", &[("rms", "Float64"), ("on", "Boolean")], "1d");
        let table = compile(&spec).unwrap().table;
        let columns: Vec<_> = table.columns.iter().map(|c| (c.name.as_str(), c.type_.as_sql(), c.not_null)).collect();
        assert_eq!(
            columns,
            [
                ("time", "timestamp with time zone", true),
                ("device_id", "integer", true),
                ("site", "text", false),
                ("line", "text", false),
                ("rms", "double precision", false),
                ("on", "boolean", false),
            ]
        );
        assert_eq!(table.key, ["time", "device_id", "site", "line"]);
        assert_eq!(table.chunk_interval, 86_400_000_000);
    }

    #[test]
    fn fields_of_the_key_follow_the_captures() {
        let mut spec = spec("{site}/{device}", &[("rms", "Float64"), ("axis", "Text")], "1d");
        spec.decode.fields[1].key = true;
        assert_eq!(compile(&spec).unwrap().table.key, ["time", "device_id", "site", "axis"]);
        spec.source.topic = format!("{{device}}/{}", (0..30).map(|level| format!("{{level_{level}}}")).collect::<Vec<_>>().join("/"));
        assert_eq!(compile(&spec), Err(SchemaError::IndexKey { columns: 33 }));
    }

    #[test]
    fn invalid_specs() {
        let name = |name: &str| SchemaError::NameColumns { name: name.to_owned() };
        for (topic, fields, chunk_interval, error) in [
            ("a/{device}", [("x", "Text"), ("x", "Int64")], "1d", name("x")),
            ("{x}/{device}", [("x", "Text"), ("y", "Text")], "1d", name("x")),
            ("{time}/{device}", [("x", "Text"), ("z", "Text")], "1d", name("time")),
            ("a/{device}", [("x", "Text"), ("device_id", "Int64")], "1d", name("device_id")),
            ("a/{device}", [("x", "Text"), ("y", "Text")], "", SchemaError::ReadChunkInterval),
            ("a/{device}", [("x", "Text"), ("y", "Text")], "0d", SchemaError::ReadChunkInterval),
            ("a/{device}", [("x", "Text"), ("y", "Text")], "ü", SchemaError::ReadChunkInterval),
            ("a/{device}", [("x", "Text"), ("y", "Text")], "9223372036854775807w", SchemaError::ReadChunkInterval),
        ] {
            assert_eq!(compile(&spec(topic, &fields, chunk_interval)), Err(error), "{topic} {fields:?} {chunk_interval}");
        }
    }

    #[test]
    fn retentions() {
        for (text, expected) in [
            ("1m", Ok(60_000_000)),
            ("30d", Ok(2_592_000_000_000)),
            ("999999w", Ok(MAX_RETENTION)),
            ("0d", Err(SchemaError::ReadRetention)),
            ("month", Err(SchemaError::ReadRetention)),
        ] {
            let mut spec = spec("a/{device}", &[("x", "Text")], "1d");
            spec.dead_letters.retention = text.to_owned();
            assert_eq!(compile(&spec).map(|desired| desired.dead_letter_retention), expected, "{text}");
        }
    }
}
