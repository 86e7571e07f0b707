//! `Pipeline.spec.decode`: how a message becomes rows.

use kube::KubeSchema;
use schemars::{JsonSchema, Schema, SchemaGenerator, json_schema};
use serde::{Deserialize, Serialize};

use super::reference::DescriptorReference;

/// How a message becomes rows.
#[derive(Clone, Debug, Deserialize, KubeSchema, PartialEq, Serialize)]
#[serde(rename_all = "camelCase")]
#[x_kube(validation = ("self.fields.all(a, self.fields.exists_one(b, a.name == b.name))", "each field name may be used once"))]
#[x_kube(validation = ("(self.format == 'Protobuf') == has(self.protobuf)", "the format Protobuf needs `protobuf`, and no other has it"))]
#[x_kube(validation = ("!has(self.readings) || self.format in ['Json', 'Cbor', 'Protobuf']", "readings is for the formats Json, Cbor and Protobuf"))]
#[x_kube(validation = ("!has(self.time) || !has(self.time.pointer) || self.format in ['Json', 'Cbor', 'Protobuf']", "time.pointer is for the formats Json, Cbor and Protobuf: the others say themselves where the time is"))]
#[x_kube(validation = ("self.format in ['Json', 'Cbor', 'Protobuf'] || self.fields.all(field, !has(field.pointer))", "pointer is for the formats Json, Cbor and Protobuf: name the value with `metric`"))]
#[x_kube(validation = ("self.format in ['SenMl', 'SenMlCbor', 'SparkplugB'] || self.fields.all(field, !has(field.metric))", "metric is for the formats SenMl, SenMlCbor and SparkplugB: point to the value with `pointer`"))]
#[x_kube(validation = ("self.format in ['Json', 'Cbor'] || self.fields.all(field, field.type != 'Json')", "the type Json is for the formats Json and Cbor"))]
#[x_kube(validation = ("self.format != 'PlainText' || size(self.fields) == 1", "a message of the format PlainText is one value: name exactly one field"))]
#[x_kube(validation = ("self.format != 'SparkplugB' || self.fields.all(field, !field.required)", "Sparkplug B sends only what has changed: no field can be required"))]
pub struct Decode {
    /// Format of the payload.
    #[serde(default)]
    pub format: Format,

    /// Where the time of a reading stands, and which times are believed. Left out: the time that the format itself gives (SenML, Sparkplug B), else
    /// the time at which the worker received the message.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub time: Option<TimeField>,

    /// JSON pointer (RFC 6901) to an array of readings inside the message: each of its elements is one, and pointers begin there.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 1, max = 256), regex(pattern = r"^(/([^/~]|~[01])*)+$"))]
    pub readings: Option<String>,

    /// What the messages of the format Protobuf look like.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub protobuf: Option<Protobuf>,

    /// The fields to take; each is a column of the table. What else stands in a message is ignored.
    #[schemars(length(min = 1, max = 100))]
    #[x_kube(merge_strategy = ListMerge::Map(vec!["name".into()]))]
    pub fields: Vec<Field>,
}

/// Format of a payload.
#[derive(Clone, Copy, Debug, Default, Deserialize, Eq, JsonSchema, PartialEq, Serialize)]
pub enum Format {
    /// A JSON object, which is one reading; or an array of objects, each of which is one.
    #[default]
    Json,
    /// SenML as JSON (RFC 8428): its records of one time are one reading.
    SenMl,
    /// SenML as CBOR (RFC 8428, section 6).
    SenMlCbor,
    /// A CBOR map (RFC 8949), which is one reading; or an array of maps. A key that is a number counts as its decimal digits.
    Cbor,
    /// Sparkplug B. The topic is `spBv1.0/{group}/+/{node}/{device}` for the metrics of devices, or `spBv1.0/{group}/+/{device}` for those of
    /// nodes. The metrics of one time are one reading.
    SparkplugB,
    /// Text that is one number, `true` or `false` (also `on`, `off`, `1`, `0`), a time, or any text: the one field says which.
    PlainText,
    /// A Protocol Buffers message.
    Protobuf,
}

/// Where the time of a reading stands, and which times are believed.
#[derive(Clone, Debug, Deserialize, Eq, JsonSchema, PartialEq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct TimeField {
    /// JSON pointer (RFC 6901) to the time, from the object of the reading; for the formats Json, Cbor and Protobuf. Left out: the time of arrival.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 1, max = 256), regex(pattern = r"^(/([^/~]|~[01])*)+$"))]
    pub pointer: Option<String>,

    /// What the time is given in. The number may have a fraction.
    #[serde(default)]
    pub unit: TimeUnit,

    /// How old a reading may be when it arrives: a duration such as `90s`, `1h30m` or `7d`. An older one is refused (`TimeOutOfRange`), and so is
    /// one before the year 2000. The default suits devices that store readings while they are offline. For a backfill of older data, set
    /// the age of the oldest reading, for instance `3650d`; each `chunkInterval` with readings becomes a chunk of the table.
    #[serde(default = "default_max_age")]
    #[schemars(length(min = 2, max = 32), regex(pattern = super::duration::PATTERN))]
    pub max_age: String,

    /// How far in the future a reading may be timed when it arrives: a duration such as `90s`, `1h30m` or `7d`. One beyond is refused
    /// (`TimeOutOfRange`): its clock is wrong.
    #[serde(default = "default_max_ahead")]
    #[schemars(length(min = 2, max = 32), regex(pattern = super::duration::PATTERN))]
    pub max_ahead: String,
}

impl Default for TimeField {
    fn default() -> Self {
        Self { pointer: None, unit: TimeUnit::default(), max_age: default_max_age(), max_ahead: default_max_ahead() }
    }
}

/// A month, for devices that were offline. With chunks of a day it creates 31 chunks at most, so that one device with a wrong clock cannot
/// spread its readings over thousands.
#[must_use]
pub fn default_max_age() -> String {
    "30d".to_owned()
}

/// A day, for clocks that were set to local time.
#[must_use]
pub fn default_max_ahead() -> String {
    "1d".to_owned()
}

/// What a time is given in.
#[derive(Clone, Copy, Debug, Default, Deserialize, Eq, JsonSchema, PartialEq, Serialize)]
pub enum TimeUnit {
    /// Seconds since 1970-01-01T00:00:00Z.
    Seconds,
    /// Milliseconds since 1970-01-01T00:00:00Z.
    #[default]
    Milliseconds,
    /// Microseconds since 1970-01-01T00:00:00Z.
    Microseconds,
    /// Nanoseconds since 1970-01-01T00:00:00Z; the table keeps microseconds.
    Nanoseconds,
    /// Text as in RFC 3339, for instance `2026-05-04T03:02:01.5Z`.
    Rfc3339,
}

/// What the messages of the format Protobuf look like.
#[derive(Clone, Debug, Deserialize, Eq, JsonSchema, PartialEq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Protobuf {
    /// The compiled description of the messages: a FileDescriptorSet, as `protoc --include_imports --descriptor_set_out=descriptor.pb` writes it and
    /// `kubectl create configmap NAME --from-file=descriptor.pb` stores it. A change rolls the workers.
    pub config_map_ref: DescriptorReference,

    /// Full name of the message type of a payload, for instance `plant.v1.Reading`.
    #[schemars(length(min = 1, max = 253), regex(pattern = r"^[A-Za-z_][A-Za-z0-9_]*(\.[A-Za-z_][A-Za-z0-9_]*)*$"))]
    pub message: String,
}

/// One field of a reading, and the column it fills.
#[derive(Clone, Debug, Deserialize, KubeSchema, PartialEq, Serialize)]
#[serde(rename_all = "camelCase")]
#[x_kube(validation = ("self.type in ['Float64', 'Int64'] || (!has(self.min) && !has(self.max))", "min and max are for Float64 and Int64 only: remove them, or change the type"))]
#[x_kube(validation = ("self.type == 'Float64' || (!has(self.scale) && !has(self.offset))", "scale and offset are for Float64 only: remove them, or change the type"))]
#[x_kube(validation = ("self.type == 'Timestamp' || !has(self.timeUnit)", "timeUnit is for Timestamp only: remove it, or change the type"))]
#[x_kube(validation = ("!has(self.min) || !has(self.max) || self.min <= self.max", "min must not be above max"))]
#[x_kube(validation = ("!has(self.scale) || self.scale != 0.0", "scale must not be 0"))]
pub struct Field {
    /// Name of the column: lower case letters, digits and underscores.
    #[schemars(length(min = 1, max = 63), regex(pattern = r"^[a-z_][a-z0-9_]*$"))]
    #[x_kube(validation = ("!(self in ['time', 'device_id', 'tableoid', 'xmin', 'cmin', 'xmax', 'cmax', 'ctid'])", "this name is taken by Fleetwright or by PostgreSQL: choose another, and point to the value with `pointer`"))]
    pub name: String,

    /// Type of the value. A value of another type is refused, never converted; an integer may stand for a Float64.
    #[serde(rename = "type")]
    pub type_: FieldType,

    /// JSON pointer (RFC 6901) to the value, from the object of the reading; for the formats Json, Cbor and Protobuf. Left out: `/<name>`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 1, max = 256), regex(pattern = r"^(/([^/~]|~[01])*)+$"))]
    pub pointer: Option<String>,

    /// Name of the value in SenML or Sparkplug B. Left out: the name of the field. In SenML it is compared with the whole name of a record (base
    /// name and name), then with its own name, then with the last part of the whole name after `/` or `:`; `<name>#sum` takes the sum of a
    /// record (`s`) instead of its value.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 1, max = 256))]
    pub metric: Option<String>,

    /// Unit of the value, kept as the comment of the column, for instance `mm/s` (UCUM is a good choice). A SenML record that gives another unit
    /// is refused, unless the field has a scale or an offset, or another field with the same `metric` has that unit.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 1, max = 32))]
    pub unit: Option<String>,

    /// What a Timestamp is given in. Left out: text as in RFC 3339. Times of Sparkplug B, and google.protobuf.Timestamp, need none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub time_unit: Option<TimeUnit>,

    /// What a Float64 is multiplied with.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub scale: Option<f64>,

    /// What is added to a Float64 after it was multiplied with `scale`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub offset: Option<f64>,

    /// The least value, after `scale` and `offset`; a reading below it is refused.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub min: Option<f64>,

    /// The greatest value, after `scale` and `offset`; a reading above it is refused.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub max: Option<f64>,

    /// Whether a reading without it is refused. Otherwise the column is NULL, or has the `default`.
    #[serde(default)]
    pub required: bool,

    /// The value of a reading that has none, or null: a JSON value of the field's type, as the column should have it. A Timestamp is text as in RFC 3339.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(schema_with = "any_value")]
    pub default: Option<serde_json::Value>,
}

fn any_value(_: &mut SchemaGenerator) -> Schema {
    json_schema!({"x-kubernetes-preserve-unknown-fields": true})
}

/// Type of a value.
#[derive(Clone, Copy, Debug, Deserialize, Eq, JsonSchema, PartialEq, Serialize)]
pub enum FieldType {
    /// A number; `double precision` in the table.
    Float64,
    /// A whole number from -9223372036854775808 to 9223372036854775807; `bigint` in the table.
    Int64,
    /// `true` or `false`; `boolean` in the table.
    Boolean,
    /// Text; `text` in the table.
    Text,
    /// A time, as `timeUnit` says; `timestamp with time zone` in the table.
    Timestamp,
    /// Any JSON value, or CBOR that JSON can express; `jsonb` in the table.
    Json,
}
