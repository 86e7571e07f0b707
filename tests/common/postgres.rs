//! PostgreSQL with TimescaleDB as a process.

use std::fs::{File, Permissions};
use std::os::unix::fs::{MetadataExt, PermissionsExt, chown};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex, Weak};
use std::time::{Duration, Instant};

use fleetwright::database::connect::{connect, drive};
use fleetwright::database::uri::ConnectionUri;
use tempfile::TempDir;
use tokio_postgres::Client;

use super::{free_port, parts};

/// Maximum time for an answer of a server, including `initdb`; two busy cores take a few seconds.
const START: Duration = Duration::from_mins(1);

static SHARED: Mutex<Weak<Postgres>> = Mutex::new(Weak::new());
static DATABASES: AtomicU32 = AtomicU32::new(0);

/// A server with its own data folder; both are removed on drop.
pub struct Postgres {
    port: u16,
    process: Mutex<Child>,
    folder: TempDir,
}

impl Postgres {
    /// Starts a server for one test.
    pub async fn start() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let port = free_port();
        let postgres = Self { port, process: Mutex::new(spawn(&folder, port)), folder };
        postgres.ready().await;
        postgres
    }

    /// The shared server of all tests in this process; each test creates its own database.
    pub async fn shared() -> Arc<Self> {
        let postgres = {
            let mut shared = SHARED.lock().unwrap();
            shared.upgrade().unwrap_or_else(|| {
                let folder = tempfile::tempdir().unwrap();
                let port = free_port();
                let postgres = Arc::new(Self { port, process: Mutex::new(spawn(&folder, port)), folder });
                *shared = Arc::downgrade(&postgres);
                postgres
            })
        };
        postgres.ready().await;
        postgres
    }

    /// URI of a database.
    pub fn uri(&self, database: &str) -> ConnectionUri {
        self.uri_text(database).parse().unwrap()
    }

    /// URI of a database, as in a Secret.
    pub fn uri_text(&self, database: &str) -> String {
        Self::uri_at(self.port, database)
    }

    /// URI of a database through another port of this machine.
    pub fn uri_at(port: u16, database: &str) -> String {
        format!("postgresql://postgres@127.0.0.1:{port}/{database}?sslmode=disable")
    }

    /// Port of the server.
    pub fn port(&self) -> u16 {
        self.port
    }

    /// Creates a database as a copy of `template1` and returns its name.
    pub async fn create_database(&self) -> String {
        let name = format!("test_{}", DATABASES.fetch_add(1, Ordering::Relaxed));
        self.client("postgres").await.batch_execute(&format!("CREATE DATABASE {name}")).await.unwrap();
        name
    }

    /// Writes a file to the data folder, readable only by the server.
    pub fn write(&self, name: &str, content: &str) {
        let data = self.folder.path().join("data");
        let owner = data.metadata().unwrap();
        let path = data.join(name);
        std::fs::write(&path, content).unwrap();
        std::fs::set_permissions(&path, Permissions::from_mode(0o600)).unwrap();
        chown(&path, Some(owner.uid()), Some(owner.gid())).unwrap();
    }

    /// Connects to a database.
    pub async fn client(&self, database: &str) -> Client {
        let (client, connection) = connect(&self.uri(database), "test").await.unwrap();
        drive(connection);
        client
    }

    /// Kills the server (SIGKILL), as a crash does.
    pub fn kill(&self) {
        let mut process = self.process.lock().unwrap();
        process.kill().unwrap();
        process.wait().unwrap();
    }

    /// Stops the server.
    pub fn stop(&self) {
        interrupt(&mut self.process.lock().unwrap());
    }

    /// Starts the server again after [`Self::kill`] or [`Self::stop`], on the same port and folder.
    pub async fn start_again(&self) {
        *self.process.lock().unwrap() = spawn(&self.folder, self.port);
        self.ready().await;
    }

    async fn ready(&self) {
        let until = Instant::now() + START;
        while let Err(error) = connect(&self.uri("postgres"), "test").await {
            let log = || std::fs::read_to_string(self.folder.path().join("log")).unwrap_or_default();
            let ended = self.process.lock().unwrap().try_wait().unwrap().is_some();
            // The server does not start while a session of a killed one holds the shared memory. The kernel ends those sessions soon.
            let again = ended && log().lines().rev().take(2).any(|line| line.contains("Terminate any old server processes"));
            assert!((!ended || again) && Instant::now() < until, "PostgreSQL does not answer ({error:?}); its log:\n{}", log());
            tokio::time::sleep(Duration::from_millis(50)).await;
            if again {
                *self.process.lock().unwrap() = spawn(&self.folder, self.port);
            }
        }
    }
}

impl Drop for Postgres {
    fn drop(&mut self) {
        self.stop();
    }
}

fn spawn(folder: &TempDir, port: u16) -> Child {
    let log = File::options().create(true).append(true).open(folder.path().join("log")).unwrap();
    Command::new(parts())
        .arg("postgres")
        .arg(folder.path().join("data"))
        .arg(port.to_string())
        .stdin(Stdio::null())
        .stdout(log.try_clone().unwrap())
        .stderr(log)
        .spawn()
        .expect("e2e/parts.sh runs")
}

/// SIGINT: PostgreSQL ends its sessions and stops ("fast shutdown").
fn interrupt(process: &mut Child) {
    if process.try_wait().is_ok_and(|status| status.is_none()) {
        let _ = Command::new("kill").args(["-INT", &process.id().to_string()]).status();
        let _ = process.wait();
    }
}

/// A new database of the shared server, with a connection.
pub struct Fixture {
    pub postgres: Arc<Postgres>,
    pub database: String,
    pub client: Client,
}

impl Fixture {
    pub async fn new() -> Self {
        let postgres = Postgres::shared().await;
        let database = postgres.create_database().await;
        let client = postgres.client(&database).await;
        Self { postgres, database, client }
    }
}
