//! Fills `fleetwright.device`: in bulk, and writing only what differs.

use std::time::Duration;

use tokio_postgres::types::Type;
use tokio_postgres::{Client, Error};

use super::DeviceRow;
use crate::state::owner::{ClusterNamespace, Parameter};
use crate::state::system::DEVICE_CHANNEL;

/// How long one call may take. 100,000 new devices take a few seconds, 100,000 unchanged ones less than one.
const TIMEOUT: Duration = Duration::from_mins(1);

/// Why the registry was not written. The call had no effect.
#[derive(Debug, thiserror::Error)]
pub enum FillError {
    /// The statement failed.
    #[error("failed to write the device registry")]
    Write(#[source] Error),

    /// No answer in time.
    #[error("failed to write the device registry: no answer from the database in {} s", TIMEOUT.as_secs())]
    AwaitAnswer,
}

/// Replaces the declared devices of a namespace by these: missing ones are added, changed ones updated, and the others marked as no longer
/// declared (their rows are kept, because readings refer to them). Returns the number of changed rows; if it is 0, nothing is
/// written and no notification is sent. The names of the devices must be distinct.
pub async fn sync(client: &Client, namespace: &ClusterNamespace, devices: &[DeviceRow]) -> Result<u64, FillError> {
    write(client, namespace, devices, &[], "true").await
}

/// Adds or updates these devices of a namespace, and marks the devices in `gone` as no longer declared. Returns the number of changed rows.
///
/// `gone` has names and Gateways: if the row has another Gateway, the device was created again, and is kept.
pub async fn change(
    client: &Client,
    namespace: &ClusterNamespace,
    devices: &[DeviceRow],
    gone: &[(String, String)],
) -> Result<u64, FillError> {
    let retired = "(device.name, device.gateway) IN (SELECT * FROM unnest($6, $7))";
    write(client, namespace, devices, gone, retired).await
}

/// One statement, hence one transaction: all or nothing, and one notification.
///
/// `INSERT … ON CONFLICT DO UPDATE` would be shorter, but takes a value from the sequence for every existing row, and locks
/// the row.
async fn write(
    client: &Client,
    namespace: &ClusterNamespace,
    devices: &[DeviceRow],
    gone: &[(String, String)],
    retired: &str,
) -> Result<u64, FillError> {
    let statement = format!(
        "WITH wanted AS (
            SELECT name, gateway, enabled, attributes::jsonb FROM unnest($2, $3, $4, $5) AS row (name, gateway, enabled, attributes)
        ), changed AS (
            UPDATE fleetwright.device SET gateway = wanted.gateway, enabled = wanted.enabled, attributes = wanted.attributes, declared = true
            FROM wanted WHERE device.cluster = $8 AND device.namespace = $1 AND device.name = wanted.name
            AND (device.gateway, device.enabled, device.attributes, device.declared)
                IS DISTINCT FROM (wanted.gateway, wanted.enabled, wanted.attributes, true)
            RETURNING 1
        ), added AS (
            INSERT INTO fleetwright.device (cluster, namespace, name, gateway, enabled, attributes)
            SELECT $8, $1, name, gateway, enabled, attributes FROM wanted
            WHERE NOT EXISTS (
                SELECT FROM fleetwright.device WHERE device.cluster = $8 AND device.namespace = $1 AND device.name = wanted.name)
            ON CONFLICT DO NOTHING
            RETURNING 1
        ), retired AS (
            UPDATE fleetwright.device SET declared = false WHERE cluster = $8 AND namespace = $1 AND declared AND {retired}
            AND NOT EXISTS (SELECT FROM wanted WHERE wanted.name = device.name)
            RETURNING 1
        ), total AS (
            SELECT (SELECT count(*) FROM changed) + (SELECT count(*) FROM added) + (SELECT count(*) FROM retired) AS count
        )
        SELECT count, CASE WHEN count > 0 THEN pg_notify('{DEVICE_CHANNEL}', $1) END FROM total"
    );
    let names: Vec<&str> = devices.iter().map(|device| device.name.as_str()).collect();
    let gateways: Vec<&str> = devices.iter().map(|device| device.gateway.as_str()).collect();
    let enabled: Vec<bool> = devices.iter().map(|device| device.enabled).collect();
    let attributes: Vec<String> = devices.iter().map(attributes).collect();
    let (gone_names, gone_gateways): (Vec<&str>, Vec<&str>) = gone.iter().map(|(name, gateway)| (name.as_str(), gateway.as_str())).unzip();
    let parameters: [Parameter<'_>; 8] = [
        (&namespace.namespace, Type::TEXT),
        (&names, Type::TEXT_ARRAY),
        (&gateways, Type::TEXT_ARRAY),
        (&enabled, Type::BOOL_ARRAY),
        (&attributes, Type::TEXT_ARRAY),
        (&gone_names, Type::TEXT_ARRAY),
        (&gone_gateways, Type::TEXT_ARRAY),
        (&namespace.cluster, Type::TEXT),
    ];
    let answer = tokio::time::timeout(TIMEOUT, client.query_typed_one(&statement, &parameters)).await;
    let row = answer.map_err(|_| FillError::AwaitAnswer)?.map_err(FillError::Write)?;
    row.try_get::<_, i64>(0).map(i64::unsigned_abs).map_err(FillError::Write)
}

/// The attributes as JSON. PostgreSQL cannot store U+0000 in a text: without replacement one device would fail the whole call.
fn attributes(device: &DeviceRow) -> String {
    let entry =
        |(key, value): (&String, &String)| (key.replace('\0', "\u{fffd}"), serde_json::Value::String(value.replace('\0', "\u{fffd}")));
    serde_json::Value::Object(device.attributes.iter().map(entry).collect()).to_string()
}
