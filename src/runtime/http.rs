//! The HTTP endpoint of every role: `/livez`, `/readyz` and `/metrics`. Other routes may be served over TLS.

use std::net::SocketAddr;
use std::sync::Arc;

use axum::Router;
use axum::extract::State;
use axum::http::StatusCode;
use axum::http::header::CONTENT_TYPE;
use axum::response::{IntoResponse, Response};
use axum::routing::get;
use prometheus::{Encoder, Registry, TextEncoder};
use rustls::ServerConfig;
use tokio::net::{TcpListener, TcpSocket};
use tokio_rustls::TlsAcceptor;
use tokio_util::sync::CancellationToken;

use super::http_server;
use super::readiness::Readiness;

/// Connections that the kernel keeps until they are accepted; it drops more, and the client retries after a second. The default of
/// Linux for its own limit (`net.core.somaxconn`).
const BACKLOG: u32 = 4096;

/// The state that the handlers of a role share.
#[derive(Clone)]
struct RoleEndpoint {
    readiness: Readiness,
    metrics: Registry,
}

/// Serves probes and metrics until `shutdown` is cancelled. [`http_server`] bounds connections and requests.
///
/// # Errors
/// If the address cannot be bound.
pub async fn serve(address: SocketAddr, readiness: Readiness, metrics: Registry, shutdown: CancellationToken) -> std::io::Result<()> {
    let endpoints = Router::new()
        .route("/livez", get(|| async { "ok\n" }))
        .route("/readyz", get(ready))
        .route("/metrics", get(expose))
        .with_state(RoleEndpoint { readiness, metrics });
    http_server::serve(bind(address)?, endpoints, None, shutdown).await;
    Ok(())
}

/// Serves `routes` over TLS until `shutdown` is cancelled, without probes and metrics.
///
/// # Errors
/// If the address cannot be bound.
pub async fn serve_encrypted(
    address: SocketAddr,
    tls: Arc<ServerConfig>,
    routes: Router,
    shutdown: CancellationToken,
) -> std::io::Result<()> {
    http_server::serve(bind(address)?, routes, Some(TlsAcceptor::from(tls)), shutdown).await;
    Ok(())
}

fn bind(address: SocketAddr) -> std::io::Result<TcpListener> {
    let socket = if address.is_ipv4() { TcpSocket::new_v4()? } else { TcpSocket::new_v6()? };
    socket.set_reuseaddr(true)?;
    socket.bind(address)?;
    socket.listen(BACKLOG)
}

async fn ready(State(endpoint): State<RoleEndpoint>) -> Response {
    match endpoint.readiness.verdict() {
        Ok(()) => "ok\n".into_response(),
        // The kubelet shows this body in the event of the failed probe.
        Err(failures) => (StatusCode::SERVICE_UNAVAILABLE, failures.join("\n") + "\n").into_response(),
    }
}

async fn expose(State(endpoint): State<RoleEndpoint>) -> Response {
    let encoder = TextEncoder::new();
    let mut body = Vec::new();
    match encoder.encode(&endpoint.metrics.gather(), &mut body) {
        Ok(()) => ([(CONTENT_TYPE, encoder.format_type())], body).into_response(),
        Err(error) => (StatusCode::INTERNAL_SERVER_ERROR, format!("failed to encode the metrics: {error}\n")).into_response(),
    }
}
