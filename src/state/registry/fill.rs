//! Fills `fleetwright.device`: in bulk, and writing only what differs.

use std::time::Duration;

use tokio_postgres::types::{ToSql, Type};
use tokio_postgres::{Client, Error};

use super::DeviceRow;
use crate::state::system::DEVICE_CHANNEL;

/// How long one call may take. 100,000 devices take a few seconds when all are new, and well below one when none is.
const TIMEOUT: Duration = Duration::from_mins(1);

/// Why the registry was not written. Nothing of that call was.
#[derive(Debug, thiserror::Error)]
pub enum FillError {
    /// The database refused, or the connection is gone.
    #[error("failed to write the device registry")]
    Write(#[source] Error),

    /// No answer in time.
    #[error("failed to write the device registry: no answer from the database in {} s", TIMEOUT.as_secs())]
    AwaitAnswer,
}

/// Makes the devices of a namespace these, and no others: missing ones are added, changed ones changed, and the rest no longer
/// counts as declared (their rows stay, since readings refer to them). Returns how many rows changed; where that is 0 nothing is
/// written and nobody notified. The devices' names are distinct.
pub async fn sync(client: &Client, namespace: &str, devices: &[DeviceRow]) -> Result<u64, FillError> {
    write(client, namespace, devices, &[], "true").await
}

/// Adds or changes these devices of a namespace, and marks those that are gone as no longer declared. Returns how many rows changed.
///
/// One that is gone is given by its name and the Gateway it had: where the row names another Gateway by now, the device was
/// created again, and stays.
pub async fn change(client: &Client, namespace: &str, devices: &[DeviceRow], gone: &[(String, String)]) -> Result<u64, FillError> {
    let retired = "(device.name, device.gateway) IN (SELECT * FROM unnest($6, $7))";
    write(client, namespace, devices, gone, retired).await
}

/// One statement, hence one transaction: all or nothing, and one notification.
///
/// `INSERT … ON CONFLICT DO UPDATE` would be shorter, but takes a number from the sequence for every row that is already there,
/// and locks it.
async fn write(
    client: &Client,
    namespace: &str,
    devices: &[DeviceRow],
    gone: &[(String, String)],
    retired: &str,
) -> Result<u64, FillError> {
    let statement = format!(
        "WITH wanted AS (
            SELECT name, gateway, enabled, attributes::jsonb FROM unnest($2, $3, $4, $5) AS row (name, gateway, enabled, attributes)
        ), changed AS (
            UPDATE fleetwright.device SET gateway = wanted.gateway, enabled = wanted.enabled, attributes = wanted.attributes, declared = true
            FROM wanted WHERE device.namespace = $1 AND device.name = wanted.name
            AND (device.gateway, device.enabled, device.attributes, device.declared)
                IS DISTINCT FROM (wanted.gateway, wanted.enabled, wanted.attributes, true)
            RETURNING 1
        ), added AS (
            INSERT INTO fleetwright.device (namespace, name, gateway, enabled, attributes)
            SELECT $1, name, gateway, enabled, attributes FROM wanted
            WHERE NOT EXISTS (SELECT FROM fleetwright.device WHERE device.namespace = $1 AND device.name = wanted.name)
            ON CONFLICT DO NOTHING
            RETURNING 1
        ), retired AS (
            UPDATE fleetwright.device SET declared = false WHERE namespace = $1 AND declared AND {retired}
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
    let parameters: [(&(dyn ToSql + Sync), Type); 7] = [
        (&namespace, Type::TEXT),
        (&names, Type::TEXT_ARRAY),
        (&gateways, Type::TEXT_ARRAY),
        (&enabled, Type::BOOL_ARRAY),
        (&attributes, Type::TEXT_ARRAY),
        (&gone_names, Type::TEXT_ARRAY),
        (&gone_gateways, Type::TEXT_ARRAY),
    ];
    let answer = tokio::time::timeout(TIMEOUT, client.query_typed_one(&statement, &parameters)).await;
    let row = answer.map_err(|_| FillError::AwaitAnswer)?.map_err(FillError::Write)?;
    row.try_get::<_, i64>(0).map(i64::unsigned_abs).map_err(FillError::Write)
}

/// The attributes as JSON. PostgreSQL's text knows no NUL, which would refuse all devices of a call for one of them.
fn attributes(device: &DeviceRow) -> String {
    let entry =
        |(key, value): (&String, &String)| (key.replace('\0', "\u{fffd}"), serde_json::Value::String(value.replace('\0', "\u{fffd}")));
    serde_json::Value::Object(device.attributes.iter().map(entry).collect()).to_string()
}
