//! Metrics of the operator, agents and workers.

use anyhow::{Context, Result};
use k8s_openapi::api::core::v1::Pod;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

/// Port of the metrics endpoint of all roles.
const PORT: u16 = 9090;

/// Reads all metrics of a pod in the Prometheus text format.
pub async fn scrape(pod: &Pod) -> Result<String> {
    let address = pod.status.as_ref().and_then(|status| status.pod_ip.as_deref()).context("the pod has no address yet")?;
    let mut stream = TcpStream::connect((address, PORT)).await?;
    // HTTP 1.0: the response is not chunked and the server closes the connection.
    stream.write_all(b"GET /metrics HTTP/1.0\r\nHost: fleetwright\r\n\r\n").await?;
    let mut text = String::new();
    stream.read_to_string(&mut text).await?;
    Ok(text)
}
