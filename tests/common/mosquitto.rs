//! Mosquitto and its clients as processes.

use std::fs::File;
use std::io::{Read, Write};
use std::net::{Ipv4Addr, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use bytes::BytesMut;
use rumqttc::mqttbytes::v5::{ConnAck, Disconnect, DisconnectProperties, DisconnectReasonCode, Packet};
use tempfile::TempDir;

use super::packets::{hello, login, next_packet};
use super::parts;

/// Maximum time of an operation on two busy cores.
pub const PATIENCE: Duration = Duration::from_secs(30);

/// A broker whose process ends on drop.
pub struct Mosquitto {
    /// Port that accepts connections.
    pub port: u16,
    /// Folder with `mosquitto.conf` and `mosquitto.log`.
    pub folder: TempDir,
    process: Child,
    volume: Option<Volume>,
    environment: Environment,
}

/// Environment variables of a broker's process.
pub type Environment = Vec<(&'static str, String)>;

impl Mosquitto {
    /// Starts a broker with this configuration in `folder` and waits until it answers on `port`.
    pub fn start(folder: TempDir, configuration: &str, port: u16) -> Self {
        Self::start_on(folder, configuration, port, None)
    }

    /// As [`Self::start`]; its folder `data` is a volume of this size, if one is given.
    pub fn start_on(folder: TempDir, configuration: &str, port: u16, size: Option<&str>) -> Self {
        let volume = size.map(|size| Volume::mount(&folder.path().join("data"), size));
        Self::begin(folder, configuration, port, volume, Vec::new())
    }

    /// As [`Self::start`], with these environment variables.
    pub fn start_with(folder: TempDir, configuration: &str, port: u16, environment: Environment) -> Self {
        Self::begin(folder, configuration, port, None, environment)
    }

    fn begin(folder: TempDir, configuration: &str, port: u16, volume: Option<Volume>, environment: Environment) -> Self {
        std::fs::write(folder.path().join("mosquitto.conf"), format!("log_type all\n{configuration}")).unwrap();
        let process = spawn(folder.path(), volume.as_ref(), &environment);
        let mut broker = Self { port, folder, process, volume, environment };
        broker.ready();
        broker
    }

    /// The broker's process.
    pub fn pid(&self) -> u32 {
        self.process.id()
    }

    /// The log since the start.
    pub fn log(&self) -> String {
        std::fs::read_to_string(self.folder.path().join("mosquitto.log")).unwrap_or_default()
    }

    /// Sends SIGHUP.
    pub fn reload(&self) {
        signal(&self.process, "-HUP");
    }

    /// Stops the process (SIGSTOP) until [`Self::resume`].
    pub fn pause(&self) {
        signal(&self.process, "-STOP");
    }

    /// Continues the process (SIGCONT).
    pub fn resume(&self) {
        signal(&self.process, "-CONT");
    }

    /// Kills the process (SIGKILL), as a crash does, and waits for its end.
    pub fn kill(&mut self) {
        self.process.kill().unwrap();
        self.process.wait().unwrap();
    }

    /// Whether the process has ended without a signal of the test.
    pub fn has_ended(&mut self) -> bool {
        self.process.try_wait().unwrap().is_some()
    }

    /// The exit code, after the process has ended or [`Self::stop`].
    pub fn exit_code(&mut self) -> Option<i32> {
        self.process.try_wait().unwrap().and_then(|status| status.code())
    }

    /// Expects that a restart after [`Self::kill`] or [`Self::stop`] fails, and returns the log.
    pub fn fails_to_start(&mut self) -> String {
        let before = self.log().len();
        self.process = spawn(self.folder.path(), self.volume.as_ref(), &self.environment);
        failed_start(&mut self.process, self.folder.path(), before)
    }

    /// Expects that a broker with this configuration fails to start, and returns the log.
    pub fn fails_to_start_in(folder: &Path, configuration: &str) -> String {
        std::fs::write(folder.join("mosquitto.conf"), configuration).unwrap();
        failed_start(&mut spawn(folder, None, &Environment::new()), folder, 0)
    }

    /// The folder `data`, as seen by the test.
    pub fn data(&self) -> PathBuf {
        let folder = self.folder.path().join("data");
        let Some(volume) = &self.volume else { return folder };
        Path::new(&format!("/proc/{}/root", volume.0.id())).join(folder.strip_prefix("/").unwrap())
    }

    /// Sends SIGTERM and waits for the end of the process.
    pub fn stop(&mut self) {
        if self.process.try_wait().unwrap().is_none() {
            signal(&self.process, "-TERM");
            self.process.wait().unwrap();
        }
    }

    /// Starts the broker again after [`Self::kill`] or [`Self::stop`].
    pub fn start_again(&mut self) {
        self.process = spawn(self.folder.path(), self.volume.as_ref(), &self.environment);
        self.ready();
    }

    fn ready(&mut self) {
        let started = Instant::now();
        while TcpStream::connect((Ipv4Addr::LOCALHOST, self.port)).is_err() {
            let ended = self.process.try_wait().unwrap();
            assert!(ended.is_none() && started.elapsed() < PATIENCE, "Mosquitto does not answer ({ended:?}); its log:\n{}", self.log());
            std::thread::sleep(Duration::from_millis(10));
        }
    }

    /// Runs `mosquitto_pub` as this user.
    pub fn publish(&self, login: (&str, &str), arguments: &[&str]) -> Output {
        self.client("mosquitto_pub", login, arguments).output().unwrap()
    }

    /// Runs `mosquitto_pub` as this user with a message for each line, until the broker has acknowledged all.
    pub fn publish_lines(&self, login: (&str, &str), arguments: &[&str], lines: &str) {
        assert!(self.pour(login, arguments, lines).status.success());
    }

    /// As above, until the broker has answered all.
    pub fn pour(&self, login: (&str, &str), arguments: &[&str], lines: &str) -> Output {
        let mut client = self.client("mosquitto_pub", login, arguments);
        let mut process = client.arg("-l").stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
        process.stdin.take().unwrap().write_all(format!("{lines}\n").as_bytes()).unwrap();
        process.wait_with_output().unwrap()
    }

    /// Runs `mosquitto_sub` with only these arguments, which define the client, in the background.
    pub fn subscribe_bare(&self, client: &str, arguments: &[&str]) -> Subscriber {
        self.start_subscriber(client, bare("mosquitto_sub", arguments))
    }

    /// Runs `mosquitto_sub` as this user in the background.
    pub fn subscribe(&self, login: (&str, &str), arguments: &[&str]) -> Subscriber {
        self.start_subscriber(login.0, self.client("mosquitto_sub", login, arguments))
    }

    fn start_subscriber(&self, client: &str, mut command: Command) -> Subscriber {
        let output = tempfile::NamedTempFile::new().unwrap();
        let stream = output.reopen().unwrap();
        // The client reports its subscription late; the log of the broker does not.
        let subscribed = format!("Sending SUBACK to {client}");
        let before = self.log().matches(&subscribed).count();
        let process = command.stdout(stream.try_clone().unwrap()).stderr(stream).spawn().unwrap();
        wait_until("a subscription", || self.log().matches(&subscribed).count() > before);
        Subscriber { process, output }
    }

    /// Publishes increasing numbers from 0 as this user, at most a thousand per second, over one connection.
    pub fn stream(&self, login: (&str, &str), arguments: &[&str]) -> Stream {
        let mut process = self.client("mosquitto_pub", login, arguments).arg("-l").stdin(Stdio::piped()).spawn().unwrap();
        let mut input = process.stdin.take().unwrap();
        let stop = Arc::new(AtomicBool::new(false));
        let stopped = stop.clone();
        let writer = std::thread::spawn(move || {
            let mut sent = 0;
            while !stopped.load(Ordering::Relaxed) {
                writeln!(input, "{sent}").unwrap();
                sent += 1;
                std::thread::sleep(Duration::from_millis(1));
            }
            sent
        });
        Stream { process, stop, writer }
    }

    /// Whether the broker keeps a session of this client. The check ends an existing connection of the client and keeps the session.
    pub fn has_session(&self, user: (&str, &str), client_id: &str) -> bool {
        let mut stream = TcpStream::connect((Ipv4Addr::LOCALHOST, self.port)).unwrap();
        stream.write_all(&hello(client_id, login(user), true)).unwrap();
        let mut input = BytesMut::new();
        let answer = next_packet(&mut stream, &mut input);
        let Some(Packet::ConnAck(ConnAck { session_present: present, .. })) = answer else { unreachable!("{answer:?}") };
        let expiry = (!present).then_some(0);
        let properties =
            DisconnectProperties { session_expiry_interval: expiry, reason_string: None, user_properties: vec![], server_reference: None };
        let mut goodbye = Disconnect::new(DisconnectReasonCode::NormalDisconnection);
        goodbye.properties = Some(properties);
        let mut output = BytesMut::new();
        Packet::Disconnect(goodbye).write(&mut output, None).unwrap();
        stream.write_all(&output).unwrap();
        while next_packet(&mut stream, &mut input).is_some() {}
        present
    }

    fn client(&self, program: &str, (username, password): (&str, &str), arguments: &[&str]) -> Command {
        let mut command = Command::new(parts());
        command.arg(program).args(["-h", "127.0.0.1", "-p", &self.port.to_string(), "-u", username, "-P", password, "-V", "5", "-q", "1"]);
        command.args(arguments).stdin(Stdio::null());
        command
    }
}

/// Runs `mosquitto_pub` with only these arguments, which must include user and broker.
pub fn publish_bare(arguments: &[&str]) -> Output {
    bare("mosquitto_pub", arguments).output().unwrap()
}

fn bare(program: &str, arguments: &[&str]) -> Command {
    let mut command = Command::new(parts());
    command.arg(program).args(["-h", "127.0.0.1", "-V", "5", "-q", "1"]).args(arguments).stdin(Stdio::null());
    command
}

impl Drop for Mosquitto {
    fn drop(&mut self) {
        self.stop();
    }
}

/// A running `mosquitto_sub`.
pub struct Subscriber {
    process: Child,
    output: tempfile::NamedTempFile,
}

impl Subscriber {
    /// The output so far.
    pub fn output(&self) -> String {
        std::fs::read_to_string(self.output.path()).unwrap()
    }

    /// Waits until the output contains this text.
    pub fn wait_for(&self, text: &str) {
        wait_until(&format!("{text:?} in the output of mosquitto_sub"), || self.output().contains(text));
    }

    /// Whether the process runs.
    pub fn is_running(&mut self) -> bool {
        self.process.try_wait().unwrap().is_none()
    }
}

impl Drop for Subscriber {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

/// A `mosquitto_pub` that publishes increasing numbers.
pub struct Stream {
    process: Child,
    stop: Arc<AtomicBool>,
    writer: JoinHandle<usize>,
}

impl Stream {
    /// Ends the publisher when the broker has acknowledged everything, and returns the number of messages.
    pub fn finish(mut self) -> usize {
        self.stop.store(true, Ordering::Relaxed);
        let sent = self.writer.join().unwrap();
        assert!(self.process.wait().unwrap().success());
        sent
    }
}

/// Waits until the condition is true.
pub fn wait_until(what: &str, mut condition: impl FnMut() -> bool) {
    let started = Instant::now();
    while !condition() {
        assert!(started.elapsed() < PATIENCE, "waited in vain for {what}");
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// A small tmpfs in a mount namespace that only its processes see. It is removed with the last process.
struct Volume(Child);

impl Volume {
    fn mount(at: &Path, size: &str) -> Self {
        let script = r#"mount -t tmpfs -o size="$1" tmpfs "$2" && echo && exec sleep infinity"#;
        let mut holder = Command::new("unshare");
        holder.args(["--mount", "--propagation", "private", "sh", "-c", script, "sh", size]).arg(at);
        let mut process = holder.stdin(Stdio::null()).stdout(Stdio::piped()).spawn().unwrap();
        process.stdout.take().unwrap().read_exact(&mut [0]).expect("a mount");
        Self(process)
    }

    /// A command that runs in the mount namespace.
    fn command(&self, program: &Path) -> Command {
        let mut command = Command::new("nsenter");
        command.arg(format!("--mount=/proc/{}/ns/mnt", self.0.id())).arg(program);
        command
    }
}

impl Drop for Volume {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn spawn(folder: &Path, volume: Option<&Volume>, environment: &Environment) -> Child {
    let log = File::options().create(true).append(true).open(folder.join("mosquitto.log")).unwrap();
    let configuration = folder.join("mosquitto.conf");
    volume
        .map_or_else(|| Command::new(parts()), |volume| volume.command(&parts()))
        .args(["mosquitto", "-c", configuration.to_str().unwrap()])
        .envs(environment.iter().map(|(name, value)| (name, value)))
        .current_dir(folder)
        .stdin(Stdio::null())
        .stdout(log.try_clone().unwrap())
        .stderr(log)
        .spawn()
        .expect("e2e/parts.sh runs")
}

/// Waits until the process ends with an error, and returns the log from byte `before`.
fn failed_start(process: &mut Child, folder: &Path, before: usize) -> String {
    let read = || std::fs::read_to_string(folder.join("mosquitto.log")).unwrap().split_off(before);
    let mut status = None;
    wait_until("the end of a broker that cannot start", || {
        status = process.try_wait().unwrap();
        status.is_some() || read().contains(" running\n")
    });
    let _ = process.kill();
    let _ = process.wait();
    assert!(status.is_some_and(|status| !status.success()), "{status:?}: {}", read());
    read()
}

fn signal(process: &Child, signal: &str) {
    assert!(Command::new("kill").args([signal, &process.id().to_string()]).status().unwrap().success());
}
