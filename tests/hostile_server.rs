//! Servers that a tenant names, and that try to exhaust the operator or a worker. Everything is on loopback.

#![allow(clippy::unwrap_used, reason = "helpers of tests fail by panicking")]

use std::time::Duration;

use fleetwright::database::connect::{connect, connect_as_operator, drive};
use fleetwright::database::uri::ConnectionUri;
use fleetwright::mqtt::login::Login;
use fleetwright::operator::twin_sync::session::TwinSession;
use fleetwright::runtime::address::AddressPolicy;
use fleetwright::runtime::error::chain;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::Mutex;

/// The announced size of a message.
const GIBIBYTE: u32 = 1 << 30;

/// The most bytes that a server of these tests sends.
const MAX_SENT: usize = 256 << 20;

/// Maximum growth of this process. Without limits it grows by what the server sends.
const MAX_GROWTH: usize = 48 << 20;

/// Maximum time until a connection is given up.
const GIVEN_UP_WITHIN: Duration = Duration::from_secs(15);

/// Only one test at a time measures memory.
static MEASURING: Mutex<()> = Mutex::const_new(());

/// The memory of this process now, and its peak from now on.
struct Memory(usize);

impl Memory {
    fn watch() -> Self {
        // Resets the peak (proc_pid_clear_refs(5)).
        std::fs::write("/proc/self/clear_refs", "5").unwrap();
        Self(kibibytes("VmRSS:"))
    }

    /// By how much the peak exceeds the beginning, in bytes.
    fn growth(&self) -> usize {
        kibibytes("VmHWM:").saturating_sub(self.0) << 10
    }
}

fn kibibytes(key: &str) -> usize {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix(key)).unwrap();
    line.trim().trim_end_matches(" kB").parse().unwrap()
}

fn message(kind: u8, body: &[u8]) -> Vec<u8> {
    let length = u32::try_from(body.len() + 4).unwrap();
    [&[kind][..], &length.to_be_bytes(), body].concat()
}

/// AuthenticationOk, and ReadyForQuery.
fn welcome() -> Vec<u8> {
    [message(b'R', &[0; 4]), message(b'Z', b"I")].concat()
}

/// Accepts connections. On each it sends one of `answers` after each message of the client, and then `again` until the client closes it.
async fn server(answers: Vec<Vec<u8>>, again: Vec<u8>) -> u16 {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let port = listener.local_addr().unwrap().port();
    tokio::spawn(async move {
        while let Ok((stream, _)) = listener.accept().await {
            tokio::spawn(serve(stream, answers.clone(), again.clone()));
        }
    });
    port
}

async fn serve(mut stream: TcpStream, answers: Vec<Vec<u8>>, again: Vec<u8>) {
    let mut input = [0; 1024];
    for answer in answers {
        if stream.read(&mut input).await.is_err() || stream.write_all(&answer).await.is_err() {
            return;
        }
    }
    let mut sent = 0;
    while !again.is_empty() && sent < MAX_SENT && stream.write_all(&again).await.is_ok() {
        sent += again.len();
    }
    let _ = stream.read(&mut input).await;
}

fn uri(port: u16) -> ConnectionUri {
    format!("postgresql://u:p@127.0.0.1:{port}/x?sslmode=disable").parse().unwrap()
}

fn loopback() -> AddressPolicy {
    AddressPolicy::new(&["127.0.0.0/8".parse().unwrap()], &[])
}

/// The failure of connecting to a server and of a query, and the growth of the process meanwhile.
async fn attacked(port: u16, operator: bool) -> (String, usize) {
    let memory = Memory::watch();
    let attempt = async {
        let connected =
            if operator { connect_as_operator(&uri(port), "test", &loopback()).await } else { connect(&uri(port), "test").await };
        match connected {
            Err(error) => chain(&error),
            Ok((client, connection)) => {
                let driver = tokio::spawn(connection);
                let asked = client.simple_query("SELECT 1").await;
                assert!(asked.is_err(), "a query has an answer");
                // The connection has the cause of its end.
                drop(client);
                driver.await.unwrap().map_err(|error| chain(&error)).unwrap_err()
            }
        }
    };
    let failure = tokio::time::timeout(GIVEN_UP_WITHIN, attempt).await.unwrap();
    (failure, memory.growth())
}

#[tokio::test]
async fn a_database_cannot_exhaust_the_memory_of_operator_or_worker() {
    let _alone = MEASURING.lock().await;
    let announced = [&[b'D'][..], &GIBIBYTE.to_be_bytes()].concat();
    let filler = vec![b'x'; 1 << 20];
    let notices = message(b'N', &vec![b'x'; 1000]).repeat(1000);
    let rows = message(b'D', &[0, 0]).repeat(100_000);
    for (name, answers, again, expected, worker_too) in [
        ("a message of 1 GiB instead of a welcome", vec![announced.clone()], filler.clone(), "announced a message", true),
        ("a message of 1 GiB as an answer", vec![welcome(), announced], filler, "announced a message", true),
        ("notices without end", vec![message(b'R', &[0; 4])], notices, "that answer no query", true),
        ("rows without end", vec![welcome(), message(b'T', &[0, 0])], rows, "exceeds", false),
    ] {
        let port = server(answers, again).await;
        for operator in if worker_too { &[true, false][..] } else { &[true][..] } {
            let (failure, growth) = attacked(port, *operator).await;
            println!("{name}: {} KiB more memory; {failure}", growth >> 10);
            assert!(failure.contains(expected), "{name}: {failure}");
            assert!(growth < MAX_GROWTH, "{name}: grew by {} KiB", growth >> 10);
        }
    }
}

#[tokio::test]
async fn a_database_cannot_keep_a_processor_busy_with_a_password() {
    let mechanisms = message(b'R', &[&10_u32.to_be_bytes()[..], b"SCRAM-SHA-256\0\0"].concat());
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let port = listener.local_addr().unwrap().port();
    tokio::spawn(async move {
        let (mut stream, _) = listener.accept().await.unwrap();
        let mut input = [0; 4096];
        assert!(stream.read(&mut input).await.unwrap() > 0);
        stream.write_all(&mechanisms).await.unwrap();
        let length = stream.read(&mut input).await.unwrap();
        let sent = String::from_utf8_lossy(&input[..length]).into_owned();
        let nonce = &sent[sent.find("r=").unwrap()..];
        let challenge = format!("{nonce}server,s=c2FsdA==,i=2000000000");
        stream.write_all(&message(b'R', &[&11_u32.to_be_bytes()[..], challenge.as_bytes()].concat())).await.unwrap();
        let _ = stream.read(&mut input).await;
    });
    let error = connect_as_operator(&uri(port), "test", &loopback()).await.map(drop).unwrap_err();
    assert!(chain(&error).contains("2000000000"), "{}", chain(&error));
}

#[tokio::test]
async fn the_operator_connects_to_no_address_of_the_machine_unless_it_is_allowed() {
    let port = server(vec![welcome()], Vec::new()).await;
    let refused = connect_as_operator(&uri(port), "test", &AddressPolicy::default()).await.map(drop).unwrap_err();
    assert_eq!(refused.reason().as_str(), "AddressNotAllowed");
    assert!(refused.to_string().contains("127.0.0.1") && refused.to_string().contains("allowedAddresses"), "{refused}");
    let (client, connection) = connect_as_operator(&uri(port), "test", &loopback()).await.unwrap();
    drive(connection);
    drop(client);
}

#[tokio::test]
async fn a_broker_cannot_exhaust_the_memory_of_the_operator() {
    let _alone = MEASURING.lock().await;
    // CONNACK: success, no properties.
    let accepted = vec![0x20, 0x03, 0x00, 0x00, 0x00];
    // A PUBLISH of 256 MiB, and small ones without end instead of an answer to the subscription.
    let large = [accepted.clone(), vec![0x30, 0xff, 0xff, 0xff, 0x7f]].concat();
    let topic = b"devices/press-1/desired";
    let mut publish = vec![0x30, u8::try_from(topic.len() + 3 + 50).unwrap(), 0, u8::try_from(topic.len()).unwrap()];
    publish.extend_from_slice(topic);
    publish.extend_from_slice(&[0; 51]);
    for (name, first, again) in [("a packet of 256 MiB", large, vec![b'x'; 1 << 20]), ("a flood", accepted, publish.repeat(10_000))] {
        let login = Login {
            host: "127.0.0.1".to_owned(),
            port: server(vec![first], again).await,
            client_id: "fwo0".to_owned(),
            username: "u".to_owned(),
            password: "p".into(),
            tls: None,
            addresses: Some(loopback()),
        };
        let memory = Memory::watch();
        let begun = tokio::time::timeout(GIVEN_UP_WITHIN, TwinSession::begin(&login, 16, true)).await.unwrap();
        let growth = memory.growth();
        let failure = begun.map(drop).unwrap_err();
        println!("{name}: {} KiB more memory; {}", growth >> 10, chain(&failure));
        assert!(growth < MAX_GROWTH, "{name}: grew by {} KiB", growth >> 10);
    }
}
