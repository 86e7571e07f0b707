//! `Pipeline.spec.decode`: how messages are decoded into rows.

use kube::KubeSchema;
use schemars::{JsonSchema, Schema, SchemaGenerator, json_schema};
use serde::{Deserialize, Serialize};

use super::reference::DescriptorReference;

/// How messages are decoded into rows.
#[derive(Clone, Debug, Deserialize, KubeSchema, PartialEq, Serialize)]
#[serde(rename_all = "camelCase")]
#[x_kube(validation = ("self.fields.all(a, self.fields.exists_one(b, a.name == b.name))", "each field name may be used once"))]
#[x_kube(validation = ("(self.format == 'Protobuf') == has(self.protobuf)", "the format Protobuf requires `protobuf`: set it for this format only"))]
#[x_kube(validation = ("!has(self.readings) || self.format in ['Json', 'Cbor', 'Protobuf']", "readings is for the formats Json, Cbor and Protobuf"))]
#[x_kube(validation = ("!has(self.time) || !has(self.time.pointer) || self.format in ['Json', 'Cbor', 'Protobuf']", "time.pointer is for the formats Json, Cbor and Protobuf: the other formats define the time themselves"))]
#[x_kube(validation = ("self.format in ['Json', 'Cbor', 'Protobuf'] || self.fields.all(field, !has(field.pointer))", "pointer is for the formats Json, Cbor and Protobuf: name the value with `metric`"))]
#[x_kube(validation = ("self.format in ['SenMl', 'SenMlCbor', 'SparkplugB'] || self.fields.all(field, !has(field.metric))", "metric is for the formats SenMl, SenMlCbor and SparkplugB: point to the value with `pointer`"))]
#[x_kube(validation = ("self.format in ['Json', 'Cbor'] || self.fields.all(field, field.type != 'Json')", "the type Json is for the formats Json and Cbor"))]
#[x_kube(validation = ("self.format != 'PlainText' || size(self.fields) == 1", "a message of the format PlainText is one value: name exactly one field"))]
#[x_kube(validation = ("self.format != 'SparkplugB' || self.fields.all(field, !field.required)", "Sparkplug B sends only what has changed: no field can be required"))]
pub struct Decode {
    /// Format of the payload.
    #[serde(default)]
    pub format: Format,

    /// The location of a reading's time, and the range of accepted times. Default: the time that the format itself defines (SenML, Sparkplug B),
    /// or the time at which the worker received the message.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub time: Option<TimeField>,

    /// JSON pointer (RFC 6901) to an array of readings in the message. Each element is one reading, and the pointers of fields start at the element.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 1, max = 256), regex(pattern = r"^(/([^/~]|~[01])*)+$"))]
    pub readings: Option<String>,

    /// The message type of the format Protobuf.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub protobuf: Option<Protobuf>,

    /// The fields to store; each is a column of the table. Other members of a message are ignored.
    #[schemars(length(min = 1, max = 100))]
    #[x_kube(merge_strategy = ListMerge::Map(vec!["name".into()]))]
    pub fields: Vec<Field>,
}

impl Decode {
    /// The same with the fields of the key first, as in the rows of a worker.
    #[must_use]
    pub fn with_key_first(mut self) -> Self {
        self.fields.sort_by_key(|field| !field.key);
        self
    }

    /// The number of fields of the key.
    #[must_use]
    pub fn key_fields(&self) -> usize {
        self.fields.iter().filter(|field| field.key).count()
    }
}

/// Format of a payload.
#[derive(Clone, Copy, Debug, Default, Deserialize, Eq, JsonSchema, PartialEq, Serialize)]
pub enum Format {
    /// A JSON object, which is one reading; or an array of objects, each of which is one.
    #[default]
    Json,
    /// SenML as JSON (RFC 8428). Records with the same time are one reading.
    SenMl,
    /// SenML as CBOR (RFC 8428, section 6).
    SenMlCbor,
    /// A CBOR map (RFC 8949), which is one reading; or an array of maps. A key that is a number is treated as its decimal digits.
    Cbor,
    /// Sparkplug B. The topic is `spBv1.0/{group}/+/{node}/{device}` for the metrics of devices, or `spBv1.0/{group}/+/{device}` for those of
    /// nodes. Metrics with the same time are one reading.
    SparkplugB,
    /// Text with one value: a number, `true` or `false` (also `on`, `off`, `1`, `0`), a time, or any text, according to the type of the field.
    PlainText,
    /// A Protocol Buffers message.
    Protobuf,
}

/// The location of a reading's time, and the range of accepted times.
#[derive(Clone, Debug, Deserialize, Eq, JsonSchema, PartialEq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct TimeField {
    /// JSON pointer (RFC 6901) to the time in the object of the reading, for the formats Json, Cbor and Protobuf. Default: the time of arrival.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 1, max = 256), regex(pattern = r"^(/([^/~]|~[01])*)+$"))]
    pub pointer: Option<String>,

    /// Unit of the time. The number may have a fraction.
    #[serde(default)]
    pub unit: TimeUnit,

    /// Maximum age of a reading on arrival: a duration such as `90s`, `1h30m` or `7d`. An older reading is refused (`TimeOutOfRange`), and so is
    /// one from before the year 2000. The default suits devices that store readings while they are offline. For a backfill of older data, set
    /// the age of the oldest reading, for instance `3650d`; each `chunkInterval` with readings becomes a chunk of the table.
    #[serde(default = "default_max_age")]
    #[schemars(length(min = 2, max = 32), regex(pattern = super::duration::PATTERN))]
    pub max_age: String,

    /// Maximum time of a reading in the future on arrival: a duration such as `90s`, `1h30m` or `7d`. A later time is refused
    /// (`TimeOutOfRange`), because the device's clock is wrong.
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

/// Unit of a time.
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

/// The message type of the format Protobuf.
#[derive(Clone, Debug, Deserialize, Eq, JsonSchema, PartialEq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Protobuf {
    /// The compiled description of the messages, a FileDescriptorSet. Create it with
    /// `protoc --include_imports --descriptor_set_out=descriptor.pb` and `kubectl create configmap NAME --from-file=descriptor.pb`. A change
    /// triggers a rolling update of the workers.
    pub config_map_ref: DescriptorReference,

    /// Full name of the message type of a payload, for instance `plant.v1.Reading`.
    #[schemars(length(min = 1, max = 253), regex(pattern = r"^[A-Za-z_][A-Za-z0-9_]*(\.[A-Za-z_][A-Za-z0-9_]*)*$"))]
    pub message: String,
}

/// One field of a reading and its column.
#[derive(Clone, Debug, Deserialize, KubeSchema, PartialEq, Serialize)]
#[serde(rename_all = "camelCase")]
#[x_kube(validation = ("self.type in ['Float64', 'Int64'] || (!has(self.min) && !has(self.max))", "min and max are for Float64 and Int64 only: remove them, or change the type"))]
#[x_kube(validation = ("self.type == 'Float64' || (!has(self.scale) && !has(self.offset))", "scale and offset are for Float64 only: remove them, or change the type"))]
#[x_kube(validation = ("self.type == 'Timestamp' || !has(self.timeUnit)", "timeUnit is for Timestamp only: remove it, or change the type"))]
#[x_kube(validation = ("!has(self.min) || !has(self.max) || self.min <= self.max", "min must not be above max"))]
#[x_kube(validation = ("!has(self.scale) || self.scale != 0.0", "scale must not be 0"))]
#[x_kube(validation = ("!has(self.key) || !self.key || (self.required && self.type in ['Int64', 'Boolean', 'Text', 'Timestamp'])", "a field of the key identifies a row: set required: true, and use the type Int64, Boolean, Text or Timestamp"))]
pub struct Field {
    /// Name of the column: lower case letters, digits and underscores.
    #[schemars(length(min = 1, max = 63), regex(pattern = r"^[a-z_][a-z0-9_]*$"))]
    #[x_kube(validation = ("!(self in ['time', 'device_id', 'tableoid', 'xmin', 'cmin', 'xmax', 'cmax', 'ctid'])", "this name is taken by Fleetwright or by PostgreSQL: choose another, and point to the value with `pointer`"))]
    pub name: String,

    /// Type of the value. A value of another type is refused and never converted, except that an integer is accepted for a Float64.
    #[serde(rename = "type")]
    pub type_: FieldType,

    /// JSON pointer (RFC 6901) to the value in the object of the reading, for the formats Json, Cbor and Protobuf. Default: `/<name>`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 1, max = 256), regex(pattern = r"^(/([^/~]|~[01])*)+$"))]
    pub pointer: Option<String>,

    /// Name of the value in SenML or Sparkplug B. Default: the name of the field. In SenML it is compared with the full name of a record (base
    /// name and name), then with the name of the record, then with the last part of the full name after `/` or `:`. `<name>#sum` selects the sum
    /// of a record (`s`) instead of its value.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 1, max = 256))]
    pub metric: Option<String>,

    /// Unit of the value, for instance `mm/s` (UCUM is a good choice). It becomes the comment of the column. A SenML record with another unit is
    /// refused, unless the field has a scale or an offset, or another field with the same `metric` has that unit.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 1, max = 32))]
    pub unit: Option<String>,

    /// Unit of a Timestamp. Default: text in the format of RFC 3339. Not needed for times of Sparkplug B and google.protobuf.Timestamp.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub time_unit: Option<TimeUnit>,

    /// Factor by which a Float64 is multiplied.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub scale: Option<f64>,

    /// Value that is added to a Float64 after the multiplication by `scale`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub offset: Option<f64>,

    /// Minimum value, after `scale` and `offset`. A reading below it is refused.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub min: Option<f64>,

    /// Maximum value, after `scale` and `offset`. A reading above it is refused.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub max: Option<f64>,

    /// Whether a reading without this field is refused. Otherwise the column has the `default`, or NULL.
    #[serde(default)]
    pub required: bool,

    /// Whether the field is a part of the key, so that readings of a device with the same time and different values of the field are
    /// different rows. Time, device and the captures of the topic are always in the key. Requires `required`. A change rebuilds the unique index
    /// of the table.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub key: bool,

    /// Value of the column for a reading in which the field is absent or null: a JSON value of the field's type. A Timestamp is text in the format of
    /// RFC 3339.
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
    /// A time in the unit `timeUnit`; `timestamp with time zone` in the table.
    Timestamp,
    /// Any JSON value, or a CBOR value that JSON can represent; `jsonb` in the table.
    Json,
}
