//! What a process of Fleetwright says of itself.

use anyhow::{Context, Result};
use k8s_openapi::api::core::v1::Pod;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

/// Where all of them tell it.
const PORT: u16 = 9090;

/// All metrics of a pod, as text.
pub async fn scrape(pod: &Pod) -> Result<String> {
    let address = pod.status.as_ref().and_then(|status| status.pod_ip.as_deref()).context("the pod has no address yet")?;
    let mut stream = TcpStream::connect((address, PORT)).await?;
    // Of HTTP 1.0, so that the answer comes in one piece and the connection ends with it.
    stream.write_all(b"GET /metrics HTTP/1.0\r\nHost: fleetwright\r\n\r\n").await?;
    let mut text = String::new();
    stream.read_to_string(&mut text).await?;
    Ok(text)
}
