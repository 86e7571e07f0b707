//! Connected devices: they log in with MQTT 3.1.1 and the passwords of their Secrets, and publish nothing.

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context as _, ensure};
use futures::{StreamExt, TryStreamExt, stream};
use k8s_openapi::api::core::v1::{Secret, Service};
use kube::ResourceExt;
use kube::api::{Api, ListParams};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::sync::{oneshot, watch};
use tokio::task::JoinHandle;
use tokio::time::timeout;

use crate::Arguments;
use crate::fleet::{Fleet, device_name, gateway_of};
use crate::report::{heading, rate_row};

/// Maximum number of concurrent logins; a broker accepts some 5,000 per second.
const LOGINS: usize = 256;

/// Interval of the prober's requests; an answer takes a fraction of a millisecond while the broker is not blocked.
const PROBE_PAUSE: Duration = Duration::from_millis(2);

/// Address and credentials of a device.
#[derive(Clone, Debug)]
struct Login {
    host: String,
    name: String,
    password: String,
}

/// A connected device.
struct Connection {
    closed: watch::Receiver<Option<Instant>>,
    task: JoinHandle<()>,
}

/// All connected devices.
pub struct Clients {
    logins: Vec<Login>,
    connections: Vec<Option<Connection>>,
    hosts: HashMap<String, String>,
    count: Arc<AtomicUsize>,
}

impl Clients {
    /// Connects every device.
    pub async fn connect_all(fleet: &Fleet<'_>, arguments: &Arguments) -> anyhow::Result<Self> {
        heading("connected devices");
        raise_file_limit()?;
        let hosts = hosts(fleet).await?;
        let passwords = passwords(fleet).await?;
        let login = |index: usize| -> anyhow::Result<Login> {
            let (name, gateway) = (device_name(index), gateway_of(index, arguments.gateways));
            let host = hosts.get(&gateway).with_context(|| format!("no Service of Gateway {gateway}"))?.clone();
            let password = passwords.get(&name).with_context(|| format!("no Secret of {name}"))?.clone();
            Ok(Login { host, name, password })
        };
        let logins: Vec<Login> = (0..arguments.devices).map(login).collect::<anyhow::Result<_>>()?;
        let mut clients = Self { logins, connections: Vec::new(), hosts, count: Arc::default() };
        let time = clients.reconnect().await?;
        rate_row("log in", time, arguments.devices);
        Ok(clients)
    }

    /// Connects all enabled devices concurrently.
    pub async fn reconnect(&mut self) -> anyhow::Result<Duration> {
        let begin = Instant::now();
        let closed: Vec<bool> = self.connections.iter().map(Option::is_none).collect();
        let first = closed.is_empty();
        let count = &self.count;
        self.connections = stream::iter(self.logins.iter().cloned().enumerate())
            .map(|(index, login)| {
                let revoked = !first && closed[index];
                async move { if revoked { anyhow::Ok(None) } else { hold(login, Arc::clone(count)).await.map(Some) } }
            })
            .buffered(LOGINS)
            .try_collect()
            .await?;
        Ok(begin.elapsed())
    }

    /// Closes all connections without a DISCONNECT. Devices that the broker has disconnected are not connected again.
    pub fn cut(&mut self) {
        for slot in &mut self.connections {
            if let Some(connection) = slot {
                connection.task.abort();
                if connection.closed.borrow().is_some() {
                    *slot = None;
                }
            }
        }
    }

    /// Number of connected devices.
    pub fn connected(&self) -> usize {
        self.count.load(Ordering::Relaxed)
    }

    /// Time when the broker closed a device's connection.
    pub async fn closed(&self, index: usize, longest: Duration) -> anyhow::Result<Instant> {
        let connection = self.connections.get(index).and_then(Option::as_ref).context("not connected")?;
        let mut closed = connection.closed.clone();
        let at = *timeout(longest, closed.wait_for(Option::is_some)).await??;
        at.context("closed at no time")
    }
}

/// Raises the file limit, because this process has one connection for each device.
fn raise_file_limit() -> anyhow::Result<()> {
    let limits = rustix::process::getrlimit(rustix::process::Resource::Nofile);
    let raised = rustix::process::Rlimit { current: limits.maximum, maximum: limits.maximum };
    rustix::process::setrlimit(rustix::process::Resource::Nofile, raised).context("failed to raise the limit of open files")
}

async fn hosts(fleet: &Fleet<'_>) -> anyhow::Result<HashMap<String, String>> {
    let services = Api::<Service>::namespaced(fleet.cluster.client.clone(), fleet.namespace).list(&ListParams::default()).await?;
    let address = |service: Service| {
        let address = service.spec.as_ref()?.cluster_ip.clone().filter(|address| address != "None")?;
        Some((service.name_any(), format!("{address}:1883")))
    };
    Ok(services.items.into_iter().filter_map(address).collect())
}

async fn passwords(fleet: &Fleet<'_>) -> anyhow::Result<HashMap<String, String>> {
    let api = Api::<Secret>::namespaced(fleet.cluster.client.clone(), fleet.namespace);
    let mut page = ListParams::default().labels("fleetwright.io/role=device-credentials").limit(5_000);
    let mut passwords = HashMap::new();
    loop {
        let listed = api.list(&page).await?;
        for secret in listed.items {
            let text = |key: &str| String::from_utf8(secret.data.as_ref()?.get(key)?.0.clone()).ok();
            if let (Some(name), Some(password)) = (text("username"), text("password")) {
                passwords.insert(name, password);
            }
        }
        match listed.metadata.continue_.filter(|next| !next.is_empty()) {
            Some(next) => page = page.continue_token(&next),
            None => return Ok(passwords),
        }
    }
}

async fn log_in(login: &Login) -> anyhow::Result<TcpStream> {
    let mut body = b"\x00\x04MQTT\x04".to_vec();
    // User name, password, clean session; no keep-alive.
    body.extend_from_slice(&[0b1100_0010, 0, 0]);
    for text in [&login.name, &login.name, &login.password] {
        body.extend_from_slice(&u16::try_from(text.len())?.to_be_bytes());
        body.extend_from_slice(text.as_bytes());
    }
    let mut packet = vec![0x10];
    let mut length = body.len();
    while length > 127 {
        packet.push(u8::try_from(length % 128)? | 0x80);
        length /= 128;
    }
    packet.push(u8::try_from(length)?);
    packet.extend_from_slice(&body);
    let mut stream = TcpStream::connect(&login.host).await.with_context(|| format!("failed to reach {}", login.host))?;
    stream.set_nodelay(true)?;
    // Closed with a reset: connections in TIME_WAIT would use up the local ports.
    stream.set_zero_linger()?;
    stream.write_all(&packet).await?;
    let mut answer = [0_u8; 4];
    stream.read_exact(&mut answer).await.with_context(|| format!("{} was not answered", login.name))?;
    ensure!(answer == [0x20, 2, 0, 0], "{} was refused: {answer:?}", login.name);
    Ok(stream)
}

/// Logs in and waits until the connection ends.
async fn hold(login: Login, count: Arc<AtomicUsize>) -> anyhow::Result<Connection> {
    // Retries, because the broker's accept queue may be full for a moment.
    let mut stream = timeout(Duration::from_mins(1), log_in(&login)).await.context("no answer to a login")??;
    count.fetch_add(1, Ordering::Relaxed);
    let (tell, closed) = watch::channel(None);
    let guard = Counted(count);
    let task = tokio::spawn(async move {
        let _guard = guard;
        let mut byte = [0_u8; 1];
        // The client has no subscription, so any read means the end of the connection.
        let _ = stream.read(&mut byte).await;
        tell.send_replace(Some(Instant::now()));
    });
    Ok(Connection { closed, task })
}

struct Counted(Arc<AtomicUsize>);

impl Drop for Counted {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}

/// A client that sends requests to a broker continuously and records the longest response time. It uses the connection of a
/// separate device.
pub struct Prober {
    stop: oneshot::Sender<()>,
    task: JoinHandle<anyhow::Result<Duration>>,
}

impl Prober {
    /// Starts to send requests to the broker of a Gateway, as its last device.
    pub async fn start(clients: &Clients, gateway: &str) -> anyhow::Result<Self> {
        let host = clients.hosts.get(gateway).with_context(|| format!("no Service of Gateway {gateway}"))?;
        let login = clients.logins.iter().rev().find(|login| login.host == *host).context("no device")?.clone();
        let mut stream = log_in(&login).await?;
        let (stop, mut stopped) = oneshot::channel();
        let task = tokio::spawn(async move {
            let mut longest = Duration::ZERO;
            loop {
                let asked = Instant::now();
                stream.write_all(&[0xC0, 0]).await?;
                let mut answer = [0_u8; 2];
                stream.read_exact(&mut answer).await.context("the broker closed the prober's connection")?;
                longest = longest.max(asked.elapsed());
                if timeout(PROBE_PAUSE, &mut stopped).await.is_ok() {
                    return Ok(longest);
                }
            }
        });
        Ok(Self { stop, task })
    }

    /// Stops the client and returns the longest response time.
    pub async fn stop(self) -> anyhow::Result<Duration> {
        // The reload continues after it has ended sessions.
        tokio::time::sleep(Duration::from_millis(200)).await;
        let _ = self.stop.send(());
        self.task.await?
    }
}
