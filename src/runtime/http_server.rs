//! An HTTP/1.1 server, with or without TLS, with bounded connections and requests, for ports that any pod of the cluster may reach.
//!
//! `axum::serve` has neither a header timeout nor a limit of connections: 15,000 half-sent requests took a worker from 20 to
//! 270 MB. Here a new connection above the limit closes an old one that has no request in progress, so that probes are answered
//! while others hold connections open.

use std::collections::HashMap;
use std::io;
use std::net::IpAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use axum::Router;
use axum::body::{Body, HttpBody};
use axum::http::header::CONNECTION;
use axum::http::{HeaderValue, Request, StatusCode};
use axum::response::{IntoResponse, Response};
use hyper::body::Incoming;
use hyper::server::conn::http1;
use hyper::service::{Service, service_fn};
use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::service::TowerToHyperService;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpListener, TcpStream};
use tokio::task::{AbortHandle, Id, JoinSet};
use tokio::time::{sleep, timeout};
use tokio_rustls::TlsAcceptor;
use tokio_util::sync::CancellationToken;
use tracing::{debug, warn};

/// Maximum number of open connections. A role has few clients: the kubelet, Prometheus and the operator. With the largest header
/// of each connection these are 4 MiB.
pub const MAX_CONNECTIONS: usize = 256;

/// Maximum time from accepting a connection, or from the previous response, to the last byte of a request's header. The kubelet and
/// the operator send a header at once.
pub const HEADER_TIMEOUT: Duration = Duration::from_secs(5);

/// Maximum size of a request's header in bytes. The longest header of our clients has less than 1 KiB; 8 KiB is the minimum
/// of the library.
const MAX_HEADER_BYTES: usize = 16 << 10;

/// Maximum number of header lines.
const MAX_HEADERS: usize = 64;

/// Maximum time for open requests after the shutdown has begun.
const SHUTDOWN_TIMEOUT: Duration = Duration::from_secs(2);

/// Delay after a failed `accept`, which means that the process has no free file descriptor.
const ACCEPT_RETRY: Duration = Duration::from_millis(100);

/// One open connection.
struct OpenConnection {
    peer: IpAddr,
    /// Order of acceptance.
    number: u64,
    /// Whether a handler works on a request.
    busy: Arc<AtomicBool>,
    task: AbortHandle,
}

/// All open connections.
#[derive(Default)]
struct Connections {
    open: HashMap<Id, OpenConnection>,
    accepted: u64,
}

impl Connections {
    fn add(&mut self, peer: IpAddr, busy: Arc<AtomicBool>, task: AbortHandle) {
        self.accepted += 1;
        self.open.insert(task.id(), OpenConnection { peer, number: self.accepted, busy, task });
    }

    /// Makes room for one more connection. Returns whether there is room.
    fn make_room(&mut self) -> bool {
        if self.open.len() < MAX_CONNECTIONS {
            return true;
        }
        let Some(id) = self.to_close() else { return false };
        if let Some(closed) = self.open.remove(&id) {
            closed.task.abort();
        }
        true
    }

    /// The connection to close: without a request in progress, of the peer with the most connections, the oldest.
    fn to_close(&self) -> Option<Id> {
        let mut of_peer: HashMap<IpAddr, usize> = HashMap::new();
        for connection in self.open.values() {
            *of_peer.entry(connection.peer).or_default() += 1;
        }
        let idle = self.open.iter().filter(|(_, connection)| !connection.busy.load(Ordering::Relaxed));
        let first = |connection: &OpenConnection| (of_peer.get(&connection.peer).copied().unwrap_or(0), u64::MAX - connection.number);
        idle.max_by_key(|(_, connection)| first(connection)).map(|(id, _)| *id)
    }
}

/// Serves `router`, over TLS if `tls` is given, until `shutdown` is cancelled, then gives open requests two seconds. Ends at once when
/// dropped.
pub async fn serve(listener: TcpListener, router: Router, tls: Option<TlsAcceptor>, shutdown: CancellationToken) {
    let mut connections = Connections::default();
    let mut tasks = JoinSet::new();
    loop {
        tokio::select! {
            () = shutdown.cancelled() => break,
            Some(ended) = tasks.join_next_with_id() => {
                let id = match ended {
                    Ok((id, ())) => id,
                    Err(error) => error.id(),
                };
                connections.open.remove(&id);
            }
            accepted = listener.accept() => match accepted {
                Ok((stream, peer)) if connections.make_room() => {
                    let busy = Arc::new(AtomicBool::new(false));
                    let task = tasks.spawn(accept(stream, tls.clone(), router.clone(), Arc::clone(&busy), shutdown.clone()));
                    connections.add(peer.ip(), busy, task);
                }
                Ok((_, peer)) => debug!(%peer, "closed a new connection: every other has a request in progress"),
                Err(error) if is_of_connection(&error) => debug!(%error, "failed to accept a connection"),
                Err(error) => {
                    warn!(%error, "failed to accept connections: retrying");
                    sleep(ACCEPT_RETRY).await;
                }
            },
        }
    }
    drop(listener);
    let drain = async { while tasks.join_next().await.is_some() {} };
    if timeout(SHUTDOWN_TIMEOUT, drain).await.is_err() {
        debug!("closed connections that were still open after the shutdown timeout");
    }
}

/// Whether only the new connection failed, and the listener works.
fn is_of_connection(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::ConnectionAborted | io::ErrorKind::ConnectionRefused | io::ErrorKind::ConnectionReset)
}

async fn accept(stream: TcpStream, tls: Option<TlsAcceptor>, router: Router, busy: Arc<AtomicBool>, shutdown: CancellationToken) {
    if let Err(error) = stream.set_nodelay(true) {
        debug!(%error, "failed to set TCP_NODELAY");
    }
    let Some(tls) = tls else { return serve_connection(stream, router, busy, shutdown).await };
    // The timeout of a header applies to the handshake too.
    match timeout(HEADER_TIMEOUT, tls.accept(stream)).await {
        Ok(Ok(stream)) => serve_connection(stream, router, busy, shutdown).await,
        Ok(Err(error)) => debug!(%error, "a TLS handshake failed"),
        Err(_) => debug!("a TLS handshake took too long"),
    }
}

async fn serve_connection<S>(stream: S, router: Router, busy: Arc<AtomicBool>, shutdown: CancellationToken)
where
    S: AsyncRead + AsyncWrite + Unpin,
{
    let router = TowerToHyperService::new(router);
    let service = service_fn(|request: Request<Incoming>| {
        let (router, busy) = (router.clone(), Arc::clone(&busy));
        async move {
            // No route of a role takes a body. hyper would read one that no handler reads.
            if !request.body().is_end_stream() {
                return Ok(refuse_body());
            }
            busy.store(true, Ordering::Relaxed);
            let response = router.call(request.map(Body::new)).await;
            busy.store(false, Ordering::Relaxed);
            response
        }
    });
    let mut builder = http1::Builder::new();
    builder.timer(TokioTimer::new()).header_read_timeout(HEADER_TIMEOUT).max_buf_size(MAX_HEADER_BYTES).max_headers(MAX_HEADERS);
    let mut connection = std::pin::pin!(builder.serve_connection(TokioIo::new(stream), service));
    let result = tokio::select! {
        result = connection.as_mut() => result,
        () = shutdown.cancelled() => {
            connection.as_mut().graceful_shutdown();
            connection.await
        }
    };
    if let Err(error) = result {
        debug!(%error, "an HTTP connection ended with an error");
    }
}

fn refuse_body() -> Response {
    let mut response = (StatusCode::PAYLOAD_TOO_LARGE, "no request body is accepted\n").into_response();
    response.headers_mut().insert(CONNECTION, HeaderValue::from_static("close"));
    response
}
