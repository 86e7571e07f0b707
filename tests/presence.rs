//! Presence with Mosquitto: the agent follows the broker's log, and the test reads presence as the operator does.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "a helper of a test fails by panicking")]

mod common;
#[path = "presence/endpoint.rs"]
mod endpoint;

use std::collections::HashMap;
use std::io::{Read, Write};
use std::net::{Ipv4Addr, Shutdown, SocketAddr, TcpStream};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use common::free_port;
use common::mosquitto::{Mosquitto, PATIENCE};
use fleetwright::agent::presence::endpoint::router;
use fleetwright::agent::presence::follow::LogFollower;
use fleetwright::agent::presence::metrics::PresenceMetrics;
use fleetwright::agent::presence::{Presence, follow};
use fleetwright::broker::credential::file::BrokerFiles;
use fleetwright::broker::credential::{Entry, Password, PresenceToken, hash};
use fleetwright::broker::log::line::Reason;
use fleetwright::broker::log::refused::RefusedClient;
use fleetwright::broker::log::wire::{ClientState, Page, PresenceState, Query};
use fleetwright::certificate::authority::Authority;
use fleetwright::certificate::server::ServerCertificate;
use fleetwright::configuration::agent::LOG_FILE;
use fleetwright::operator::presence::agent::AgentClient;
use fleetwright::runtime::http;
use fleetwright::runtime::tls::ServedCertificate;
use jiff::Timestamp;
use rustls::ServerConfig;
use tokio_util::sync::{CancellationToken, DropGuard};

const PASSWORD: &str = "secret of all";

/// A broker that logs as the operator configures it, with devices `press-0` to `press-<n>`.
fn broker(devices: usize, more: &str) -> (Mosquitto, PathBuf) {
    let folder = tempfile::tempdir().unwrap();
    let password = Password::given(PASSWORD.as_bytes()).unwrap();
    let entry = |number: usize| {
        let name = format!("press-{number}");
        Entry::new(&name, &hash::hash("uid", &name, &password, 1), &[]).unwrap()
    };
    let files = BrokerFiles::new(&(0..devices).map(entry).collect::<Vec<_>>(), &password).unwrap();
    let path = |name: &str| folder.path().join(name);
    std::fs::write(path("passwords"), files.passwords).unwrap();
    std::fs::write(path("acls"), files.acls).unwrap();
    std::fs::create_dir(path("log")).unwrap();
    let port = free_port();
    let configuration = format!(
        "log_dest stderr\nlog_dest file {}\nlog_timestamp_format %Y-%m-%dT%H:%M:%S\nallow_anonymous false\npassword_file {}\nacl_file {}\n\
         listener {port} 127.0.0.1\nuse_username_as_clientid true\n{more}\n",
        path("log").join(LOG_FILE).display(),
        path("passwords").display(),
        path("acls").display()
    );
    let log = path("log");
    // Uses the log configuration of the operator instead of `log_type all`.
    let configuration = format!("log_type none\nlog_type error\nlog_type warning\nlog_type notice\nlog_type information\n{configuration}");
    (Mosquitto::start(folder, &configuration, port), log)
}

/// The shared token of agent and operator.
fn token() -> PresenceToken {
    PresenceToken::derive("the password hash of the operator's user")
}

/// An authority (PEM), and a server with a certificate that it issued for these names.
fn encryption(names: &[&str]) -> (Vec<u8>, Arc<ServerConfig>) {
    let authority = Authority::create("fleet", "plant-1", Timestamp::now()).unwrap();
    let names: Vec<String> = names.iter().map(|name| (*name).to_owned()).collect();
    let data = authority.certify(&names, None, Timestamp::now()).unwrap();
    let served = ServedCertificate::default();
    served.replace(ServerCertificate::parse(&data["tls.crt"].0, &data["tls.key"].0).unwrap().certified_key().unwrap());
    (data["ca.crt"].0.clone(), Arc::new(served.server_configuration().unwrap()))
}

/// The log follower and endpoint of an agent, and the presence that its client has read.
struct Agent {
    metrics: PresenceMetrics,
    authority: String,
    agents: AgentClient,
    query: Query,
    states: HashMap<String, PresenceState>,
    last: Option<Page>,
    _stop: DropGuard,
}

impl Agent {
    fn start(log: &Path, max_log_bytes: Option<u64>) -> Self {
        let registry = prometheus::Registry::new();
        let metrics = PresenceMetrics::register(&registry).unwrap();
        let presence = Presence::new();
        presence.accept(vec![token()]);
        let configuration = log.parent().unwrap().join("mosquitto.conf");
        let follower = LogFollower::new(log, &configuration, presence.clone(), metrics.clone());
        let follower = follower.with_max_log_bytes(max_log_bytes.unwrap_or(follow::MAX_LOG_BYTES));
        let shutdown = CancellationToken::new();
        let address: SocketAddr = (Ipv4Addr::LOCALHOST, free_port()).into();
        tokio::spawn(follower.run(shutdown.clone()));
        let (authorities, tls) = encryption(&["127.0.0.1"]);
        tokio::spawn(http::serve_encrypted(address, tls, router(presence, shutdown.clone()), shutdown.clone()));
        Self {
            metrics,
            authority: address.to_string(),
            agents: AgentClient::verified_by(&authorities).unwrap(),
            query: Query::default(),
            states: HashMap::new(),
            last: None,
            _stop: shutdown.drop_guard(),
        }
    }

    /// Reads until the condition is true and returns the elapsed time.
    async fn until(&mut self, what: &str, mut condition: impl FnMut(&Self) -> bool) -> Duration {
        let started = Instant::now();
        while self.last.is_none() || !condition(self) {
            let left = PATIENCE.saturating_sub(started.elapsed());
            let page = tokio::time::timeout(left, self.agents.page(&self.authority, &token(), &self.query)).await;
            assert!(page.is_ok(), "waited in vain for {what}: {:?}, {:?}", self.states, self.last);
            let Ok(Ok(page)) = page else {
                // The endpoint may not listen yet.
                tokio::time::sleep(Duration::from_millis(10)).await;
                continue;
            };
            if page.first {
                self.states.clear();
            }
            self.query = Query { epoch: page.epoch.clone(), after: page.next };
            self.states.extend(page.clients.iter().map(|ClientState(name, state, _)| (name.clone(), *state)));
            self.last = Some(page);
        }
        started.elapsed()
    }

    async fn until_is(&mut self, name: &str, state: PresenceState) -> Duration {
        self.until(&format!("{name} {state:?}"), |agent| agent.states.get(name) == Some(&state)).await
    }

    /// Reads the complete presence from the beginning, until it has this number of devices.
    async fn everything(&mut self, clients: usize) -> HashMap<String, PresenceState> {
        self.query = Query::default();
        self.last = None;
        self.until("everything", |agent| agent.states.len() >= clients && agent.last.as_ref().is_some_and(|page| !page.more)).await;
        self.states.clone()
    }

    async fn refused(&mut self, count: u64) -> Vec<RefusedClient> {
        // A refusal alone does not end the wait: the next change or the timeout reports it.
        self.until("refusals", |agent| agent.last.as_ref().is_some_and(|page| page.refused >= count)).await;
        self.last.clone().unwrap().recently_refused
    }
}

/// Connects as a device, with packets built by the test (MQTT 5.0 section 3.1).
struct Device(TcpStream);

impl Device {
    fn connect(port: u16, username: &str, password: &str, keep_alive: u16) -> (Self, u8) {
        let text = |text: &str| [&u16::try_from(text.len()).unwrap().to_be_bytes()[..], text.as_bytes()].concat();
        let body =
            [&text("MQTT")[..], &[5, 0xc2], &keep_alive.to_be_bytes(), &[0], &text("mine"), &text(username), &text(password)].concat();
        let mut length = body.len();
        let mut packet = vec![0x10];
        while length > 0x7f {
            packet.push(u8::try_from(length % 0x80).unwrap() | 0x80);
            length /= 0x80;
        }
        packet.push(u8::try_from(length).unwrap());
        packet.extend(body);
        let mut stream = TcpStream::connect((Ipv4Addr::LOCALHOST, port)).unwrap();
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        stream.write_all(&packet).unwrap();
        let mut answer = [0; 4];
        // The fourth byte of CONNACK is the reason code. The broker closes the connection without one after a malformed packet.
        let code = if stream.read_exact(&mut answer).is_ok() { answer[3] } else { u8::MAX };
        (Self(stream), code)
    }

    fn accepted(port: u16, number: usize) -> Self {
        let (device, code) = Self::connect(port, &format!("press-{number}"), PASSWORD, 60);
        assert_eq!(code, 0);
        device
    }

    fn goodbye(mut self) {
        self.0.write_all(&[0xe0, 0]).unwrap();
    }
}

/// A self-signed certificate and its key.
fn certificate() -> (tempfile::NamedTempFile, tempfile::NamedTempFile) {
    let key = rcgen::KeyPair::generate().unwrap();
    let certificate = rcgen::CertificateParams::new(vec!["127.0.0.1".to_owned()]).unwrap().self_signed(&key).unwrap();
    let file = |text: String| {
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), text).unwrap();
        file
    };
    (file(certificate.pem()), file(key.serialize_pem()))
}

#[tokio::test(flavor = "multi_thread")]
async fn all_ways_to_connect_and_disconnect_are_followed() {
    let (broker, log) = broker(5, "");
    let mut agent = Agent::start(&log, None);
    let port = broker.port;
    let device = Device::accepted(port, 0);
    println!("connected: seen after {:?}", agent.until_is("press-0", PresenceState::Online).await);
    device.goodbye();
    println!("said goodbye: seen after {:?}", agent.until_is("press-0", PresenceState::Offline).await);
    // A client whose process is killed.
    drop(Device::accepted(port, 1));
    agent.until_is("press-1", PresenceState::Offline).await;
    // A client that stops sending, with a keep-alive of one second.
    let (silent, code) = Device::connect(port, "press-2", PASSWORD, 1);
    assert_eq!(code, 0);
    agent.until_is("press-2", PresenceState::Online).await;
    agent.until_is("press-2", PresenceState::Offline).await;
    drop(silent);
    // A device whose session is taken over stays connected; the end of the old connection changes nothing.
    let old = Device::accepted(port, 3);
    agent.until_is("press-3", PresenceState::Online).await;
    let new = Device::accepted(port, 3);
    let _ = old.0.shutdown(Shutdown::Both);
    let _other = Device::accepted(port, 4);
    agent.until_is("press-4", PresenceState::Online).await;
    assert_eq!(agent.states["press-3"], PresenceState::Online);
    new.goodbye();
    agent.until_is("press-3", PresenceState::Offline).await;
    assert_eq!(agent.states.len(), 5);
    assert_eq!(agent.metrics.connected.get(), 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn refused_clients_are_reported_and_change_nothing() {
    let (certificate, key) = certificate();
    let tls = free_port();
    let tls_listener =
        format!("max_connections 3\nlistener {tls} 127.0.0.1\ncertfile {}\nkeyfile {}", certificate.path().display(), key.path().display());
    let (broker, log) = broker(2, &tls_listener);
    let mut agent = Agent::start(&log, None);
    let port = broker.port;
    let live = Device::accepted(port, 0);
    agent.until_is("press-0", PresenceState::Online).await;
    let address = live.0.local_addr().unwrap();
    // Two wrong passwords of a connected device, an unknown device, and names that resemble log messages of the broker.
    let hostile = format!("press-0 [{address}] disconnected: not authorised.");
    let overlong = format!("{hostile}{}", "x".repeat(5_000));
    for (name, expected) in [("press-0", 0x87), ("press-0", 0x87), ("ghost", 0x87), (&hostile, 0x87), (&overlong, 0x87), ("a\nb", 0xff)] {
        let (_, code) = Device::connect(port, name, "wrong", 60);
        assert_eq!(code, expected, "{name}");
    }
    // A client with another protocol, and the probe of a load balancer.
    TcpStream::connect((Ipv4Addr::LOCALHOST, port)).unwrap().write_all(b"GET / HTTP/1.1\r\n\r\n").unwrap();
    drop(TcpStream::connect((Ipv4Addr::LOCALHOST, port)).unwrap());
    // The same with TLS.
    let mut plain = TcpStream::connect((Ipv4Addr::LOCALHOST, tls)).unwrap();
    plain.write_all(b"GET / HTTP/1.1\r\n\r\n").unwrap();
    let _ = plain.read(&mut [0; 100]);
    // More connections than the listener allows.
    let many: Vec<TcpStream> = (0..4).map(|_| TcpStream::connect((Ipv4Addr::LOCALHOST, port)).unwrap()).collect();
    let log_file = log.join(LOG_FILE);
    common::mosquitto::wait_until("a refusal", || std::fs::read_to_string(&log_file).unwrap().contains("max_connections exceeded"));
    drop(many);
    let mut second = Device::connect(port, "press-1", PASSWORD, 60);
    while second.1 != 0 {
        second = Device::connect(port, "press-1", PASSWORD, 60);
    }
    agent.until_is("press-1", PresenceState::Online).await;
    let refused = agent.refused(9).await;
    assert_eq!(agent.states, HashMap::from([("press-0".to_owned(), PresenceState::Online), ("press-1".to_owned(), PresenceState::Online)]));
    let seen = |name: &str, reason: Reason| refused.iter().find(|known| known.client == name && known.reason == reason);
    assert_eq!(seen("press-0", Reason::NotAuthorised).map(|known| (known.count, known.address.as_str())), Some((2, "127.0.0.1")));
    assert!(seen("ghost", Reason::NotAuthorised).is_some(), "{refused:?}");
    assert!(seen("", Reason::ProtocolError).is_some_and(|known| known.address == "127.0.0.1"), "{refused:?}");
    assert!(seen("", Reason::TlsHandshakeFailed).is_some(), "{refused:?}");
    assert!(seen("", Reason::ConnectionLimit).is_some(), "{refused:?}");
    assert!(refused.iter().any(|known| known.client.starts_with("press-0 [127.0.0.1:")), "{refused:?}");
    assert!(refused.iter().all(|known| known.client.chars().count() <= 64 && !known.client.contains('\n')));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_restarted_agent_knows_the_connected_devices() {
    let (broker, log) = broker(4, "");
    let before = Device::accepted(broker.port, 0);
    let agent = Agent::start(&log, None);
    let _stays = Device::accepted(broker.port, 1);
    drop(agent);
    // Changes while the agent is down.
    before.goodbye();
    let _new = Device::accepted(broker.port, 2);
    let mut agent = Agent::start(&log, None);
    let expected = HashMap::from(
        [("press-0", PresenceState::Offline), ("press-1", PresenceState::Online), ("press-2", PresenceState::Online)]
            .map(|(name, state)| (name.to_owned(), state)),
    );
    agent.until("what happened meanwhile", |agent| agent.states == expected).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stopped_broker_has_no_connected_devices() {
    let (mut broker, log) = broker(2, "");
    let mut agent = Agent::start(&log, None);
    let _device = Device::accepted(broker.port, 0);
    agent.until_is("press-0", PresenceState::Online).await;
    broker.kill();
    println!("killed: seen after {:?}", agent.until_is("press-0", PresenceState::BrokerDown).await);
    broker.start_again();
    let device = Device::accepted(broker.port, 0);
    agent.until_is("press-0", PresenceState::Online).await;
    broker.stop();
    agent.until_is("press-0", PresenceState::BrokerDown).await;
    drop(device);
    // An agent that starts while the broker is down.
    let mut agent = Agent::start(&log, None);
    agent.until_is("press-0", PresenceState::BrokerDown).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_rotated_log_loses_no_events() {
    let (broker, log) = broker(40, "");
    let mut agent = Agent::start(&log, Some(4_096));
    let mut live: HashMap<usize, Device> = HashMap::new();
    // Continuous connections, each of which writes some 300 bytes to the log, and restarts of the agent.
    for round in 0..400 {
        let number = (round * 7) % 40;
        match live.remove(&number) {
            Some(device) => device.goodbye(),
            None => drop(live.insert(number, Device::accepted(broker.port, number))),
        }
        if round % 100 == 99 {
            common::mosquitto::wait_until("a new log", || agent.metrics.rotations.get() > 0);
            agent = Agent::start(&log, Some(4_096));
        }
    }
    let expected: HashMap<String, PresenceState> = (0..40)
        .map(|number| (format!("press-{number}"), if live.contains_key(&number) { PresenceState::Online } else { PresenceState::Offline }))
        .collect();
    agent.until("the last change", |agent| agent.states == expected).await;
    assert_eq!(agent.everything(40).await, expected);
    assert_eq!(broker.log().matches("New client connected").count(), 200, "the reloads have disconnected no client");
    let left: u64 = std::fs::read_dir(&log).unwrap().map(|entry| entry.unwrap().metadata().unwrap().len()).sum();
    assert!(left < 50_000, "{left} bytes are left of the logs");
}

/// Connects two thousand devices at once, and measures the agent.
#[tokio::test(flavor = "multi_thread")]
async fn two_thousand_connects_at_once_are_followed() {
    const DEVICES: usize = 2_000;
    let (broker, log) = broker(DEVICES, "");
    let mut agent = Agent::start(&log, None);
    let port = broker.port;
    let started = Instant::now();
    let connecting: Vec<_> = (0..4)
        .map(|part| {
            std::thread::spawn(move || {
                (0..DEVICES).filter(|number| number % 4 == part).map(|number| Device::accepted(port, number)).collect::<Vec<_>>()
            })
        })
        .collect();
    let devices: Vec<Device> = connecting.into_iter().flat_map(|thread| thread.join().unwrap()).collect();
    let connected = started.elapsed();
    agent.until("all", |agent| agent.states.len() == DEVICES && agent.states.values().all(|state| *state == PresenceState::Online)).await;
    println!("{DEVICES} devices connected in {connected:?}, and all were seen after {:?}", started.elapsed());
    drop(devices);
    let took = agent.until("none", |agent| agent.states.values().all(|state| *state == PresenceState::Offline)).await;
    println!("all of them gone: seen after {took:?}");
}
