//! The endpoint of an agent without a broker: encryption and authorization.

use std::io::{Read, Write};
use std::net::{Ipv4Addr, SocketAddr, TcpStream};
use std::sync::Arc;
use std::time::Duration;

use fleetwright::agent::presence::Presence;
use fleetwright::agent::presence::endpoint::router;
use fleetwright::broker::credential::PresenceToken;
use fleetwright::broker::log::wire::Query;
use fleetwright::operator::presence::agent::{AgentClient, AgentError};
use fleetwright::runtime::error::chain;
use fleetwright::runtime::http;
use rustls::ServerConfig;
use tokio_util::sync::{CancellationToken, DropGuard};

use crate::common::free_port;
use crate::common::mosquitto::wait_until;
use crate::{encryption, token};

/// The endpoint of an agent without a broker, with this certificate.
fn endpoint(tls: Arc<ServerConfig>) -> (SocketAddr, DropGuard) {
    let presence = Presence::new();
    presence.accept(vec![token()]);
    let shutdown = CancellationToken::new();
    let address: SocketAddr = (Ipv4Addr::LOCALHOST, free_port()).into();
    tokio::spawn(http::serve_encrypted(address, tls, router(presence, shutdown.clone()), shutdown.clone()));
    wait_until("the endpoint", || TcpStream::connect(address).is_ok());
    (address, shutdown.drop_guard())
}

#[tokio::test(flavor = "multi_thread")]
async fn presence_requires_tls_a_verified_certificate_and_the_token() {
    let (authorities, tls) = encryption(&["localhost"]);
    let (address, _stop) = endpoint(tls);
    let authority = format!("localhost:{}", address.port());
    let agent = AgentClient::verified_by(&authorities).unwrap();
    let wrong = PresenceToken::derive("another password hash");
    let answer = agent.page(&authority, &wrong, &Query::default()).await;
    assert!(matches!(answer, Err(AgentError::Unauthorized { .. })), "{answer:?}");
    // No log was read yet: the token is accepted, and the request waits for the log.
    let answer = tokio::time::timeout(Duration::from_millis(500), agent.page(&authority, &token(), &Query::default())).await;
    assert!(answer.is_err(), "{answer:?}");

    let refused = |client: AgentClient, authority: String| async move {
        match client.page(&authority, &token(), &Query::default()).await {
            Err(error @ AgentError::Reach { .. }) => chain(&error),
            other => panic!("{other:?}"),
        }
    };
    let (others, _) = encryption(&["localhost"]);
    let text = refused(AgentClient::verified_by(&others).unwrap(), authority.clone()).await;
    assert!(text.contains("invalid peer certificate"), "{text}");
    let text = refused(agent.clone(), address.to_string()).await;
    assert!(text.contains("not valid for name"), "{text}");

    let plain = |request: &str| {
        let mut stream = TcpStream::connect(address).unwrap();
        stream.write_all(request.as_bytes()).unwrap();
        let mut answer = Vec::new();
        // The server may end the connection with a reset.
        let _ = stream.read_to_end(&mut answer);
        String::from_utf8_lossy(&answer).into_owned()
    };
    let text = plain(&format!("GET /presence HTTP/1.1\r\nHost: x\r\nAuthorization: {}\r\n\r\n", token().authorization()));
    assert!(!text.contains("HTTP/1.1"), "{text}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_request_without_a_token_is_refused() {
    let (authorities, tls) = encryption(&["localhost"]);
    let (address, _stop) = endpoint(tls);
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("ca.crt");
    std::fs::write(&file, authorities).unwrap();
    let status = |more: &[&str]| {
        let url = format!("https://localhost:{}/presence", address.port());
        let mut curl = std::process::Command::new("curl");
        curl.args(["--silent", "--max-time", "1", "--write-out", "%{http_code}", "--cacert"]).arg(&file).args(more).arg(url);
        String::from_utf8(curl.output().unwrap().stdout).unwrap()
    };
    let text = status(&[]);
    assert!(text.starts_with("unauthorized: ") && text.ends_with("401"), "{text}");
    assert!(status(&["-H", "Authorization: Bearer wrong"]).ends_with("401"));
    let accepted = format!("Authorization: {}", token().authorization());
    assert_eq!(status(&["-H", &accepted]), "000", "it waits for the log, which nobody reads");
}
