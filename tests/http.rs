//! The HTTP endpoint of a role under connections that never finish a request.

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a helper of a test fails by panicking")]

use std::io::{Read, Write};
use std::net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream};
use std::time::{Duration, Instant};

use fleetwright::operator::kubernetes::pod::PROBE_TIMEOUT_SECONDS;
use fleetwright::runtime::http;
use fleetwright::runtime::http_server::{HEADER_TIMEOUT, MAX_CONNECTIONS};
use fleetwright::runtime::readiness::Readiness;
use prometheus::Registry;
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use tokio_util::sync::{CancellationToken, DropGuard};

/// Connections of the attack, each with a header that does not end.
const CONNECTIONS: usize = 5_000;

/// Bytes of each header: less than the server accepts.
const HEADER_BYTES: usize = 12_000;

/// Maximum growth of the process: the connections below the cap, twice, and the sockets of the test itself. Without a cap it
/// grows by 90 MB.
const MAX_GROWTH: usize = 24 << 20;

/// Maximum time of a probe: its timeout in the pods of brokers and workers.
const PROBE_TIMEOUT: Duration = Duration::from_secs(PROBE_TIMEOUT_SECONDS.unsigned_abs() as u64);

async fn start() -> (SocketAddr, DropGuard) {
    // The second half of the limit is for the sockets of the server.
    let limit = getrlimit(Resource::Nofile);
    setrlimit(Resource::Nofile, Rlimit { current: limit.maximum, ..limit }).unwrap();
    let address = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap().local_addr().unwrap();
    let shutdown = CancellationToken::new();
    tokio::spawn(http::serve(address, Readiness::default(), Registry::new(), shutdown.clone()));
    while TcpStream::connect(address).is_err() {
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    (address, shutdown.drop_guard())
}

fn half_sent(address: SocketAddr) -> TcpStream {
    let mut stream = TcpStream::connect(address).unwrap();
    // The server may close it meanwhile.
    let _ = stream.write_all(format!("GET /metrics HTTP/1.1\r\nHost: x\r\nX-Filler: {}", "x".repeat(HEADER_BYTES)).as_bytes());
    stream
}

/// The answer to a request on a new connection.
fn send(address: SocketAddr, request: &str) -> std::io::Result<String> {
    let mut stream = TcpStream::connect_timeout(&address, PROBE_TIMEOUT)?;
    stream.set_read_timeout(Some(PROBE_TIMEOUT))?;
    stream.write_all(request.as_bytes())?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer)?;
    Ok(answer)
}

fn probe(address: SocketAddr) -> Duration {
    let started = Instant::now();
    let answer = send(address, "GET /livez HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n").unwrap();
    assert!(answer.starts_with("HTTP/1.1 200 OK\r\n"), "{answer}");
    started.elapsed()
}

fn resident_bytes() -> usize {
    let pages: usize = std::fs::read_to_string("/proc/self/statm").unwrap().split(' ').nth(1).unwrap().parse().unwrap();
    pages * 4096
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn half_sent_requests_neither_fill_memory_nor_delay_a_probe() {
    let (address, _stop) = start().await;
    tokio::task::spawn_blocking(move || probe(address)).await.unwrap();
    let before = resident_bytes();
    let attack = std::thread::spawn(move || (0..CONNECTIONS).map(|_| half_sent(address)).collect::<Vec<_>>());
    let mut slowest = Duration::ZERO;
    let mut probes = 0;
    while !attack.is_finished() || probes < 20 {
        slowest = slowest.max(tokio::task::spawn_blocking(move || probe(address)).await.unwrap());
        probes += 1;
    }
    let held = attack.join().unwrap();
    let growth = resident_bytes().saturating_sub(before);
    println!("{} half-sent requests: {} KiB more memory; slowest of {probes} probes: {slowest:?}", held.len(), growth >> 10);
    assert!(growth < MAX_GROWTH, "grew by {} KiB", growth >> 10);
    assert!(slowest < PROBE_TIMEOUT, "{slowest:?}");
    // The kernel completes the last handshakes before the server accepts or closes those connections.
    let open = || held.iter().filter(|stream| is_open(stream)).count();
    let attacked = Instant::now();
    while open() > MAX_CONNECTIONS {
        assert!(attacked.elapsed() < HEADER_TIMEOUT / 2, "{} are open", open());
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    tokio::time::sleep(HEADER_TIMEOUT + Duration::from_secs(1)).await;
    assert_eq!(open(), 0, "after the header timeout");
}

fn is_open(stream: &TcpStream) -> bool {
    stream.set_nonblocking(true).unwrap();
    matches!((&mut &*stream).read(&mut [0; 512]), Err(error) if error.kind() == std::io::ErrorKind::WouldBlock)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn requests_that_are_too_large_are_refused() {
    let (address, _stop) = start().await;
    for (request, status) in [
        (format!("GET /livez HTTP/1.1\r\nHost: x\r\nX-Filler: {}\r\n\r\n", "x".repeat(64 << 10)), "431"),
        ("GET /livez HTTP/1.1\r\nHost: x\r\nContent-Length: 1000000\r\n\r\n".to_owned(), "413"),
        ("GET /livez HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n".to_owned(), "413"),
    ] {
        let answer = tokio::task::spawn_blocking(move || send(address, &request)).await.unwrap().unwrap();
        assert!(answer.starts_with(&format!("HTTP/1.1 {status} ")), "{answer}");
    }
}
