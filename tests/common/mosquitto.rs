//! A real Mosquitto, and its own clients.

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

/// How long anything may take on two busy cores.
pub const PATIENCE: Duration = Duration::from_secs(30);

/// A broker whose process ends when this is dropped.
pub struct Mosquitto {
    /// Port that is known to answer.
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
    /// A broker with this configuration in `folder`, ready on `port`.
    pub fn start(folder: TempDir, configuration: &str, port: u16) -> Self {
        Self::start_on(folder, configuration, port, None)
    }

    /// The same, where its folder `data` is a volume of this size, if one is given.
    pub fn start_on(folder: TempDir, configuration: &str, port: u16, size: Option<&str>) -> Self {
        let volume = size.map(|size| Volume::mount(&folder.path().join("data"), size));
        Self::begin(folder, configuration, port, volume, Vec::new())
    }

    /// The same as [`Self::start`], with these environment variables.
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

    /// What it has logged so far.
    pub fn log(&self) -> String {
        std::fs::read_to_string(self.folder.path().join("mosquitto.log")).unwrap_or_default()
    }

    /// SIGHUP.
    pub fn reload(&self) {
        signal(&self.process, "-HUP");
    }

    /// Halts it, until [`Self::resume`].
    pub fn pause(&self) {
        signal(&self.process, "-STOP");
    }

    /// Lets it go on.
    pub fn resume(&self) {
        signal(&self.process, "-CONT");
    }

    /// Kills it as a crash would (SIGKILL), and waits for its end.
    pub fn kill(&mut self) {
        self.process.kill().unwrap();
        self.process.wait().unwrap();
    }

    /// Whether it has ended by itself.
    pub fn has_ended(&mut self) -> bool {
        self.process.try_wait().unwrap().is_some()
    }

    /// Its exit code, once it has ended by itself or by [`Self::stop`].
    pub fn exit_code(&mut self) -> Option<i32> {
        self.process.try_wait().unwrap().and_then(|status| status.code())
    }

    /// Tries to start it again after [`Self::kill`] or [`Self::stop`]: the log of a broker that must not start.
    pub fn fails_to_start(&mut self) -> String {
        let before = self.log().len();
        self.process = spawn(self.folder.path(), self.volume.as_ref(), &self.environment);
        failed_start(&mut self.process, self.folder.path(), before)
    }

    /// The log of a broker with this configuration that must not start.
    pub fn fails_to_start_in(folder: &Path, configuration: &str) -> String {
        std::fs::write(folder.join("mosquitto.conf"), configuration).unwrap();
        failed_start(&mut spawn(folder, None, &Environment::new()), folder, 0)
    }

    /// Its folder `data`, from here.
    pub fn data(&self) -> PathBuf {
        let folder = self.folder.path().join("data");
        let Some(volume) = &self.volume else { return folder };
        Path::new(&format!("/proc/{}/root", volume.0.id())).join(folder.strip_prefix("/").unwrap())
    }

    /// Stops it in order (SIGTERM), and waits for its end.
    pub fn stop(&mut self) {
        if self.process.try_wait().unwrap().is_none() {
            signal(&self.process, "-TERM");
            self.process.wait().unwrap();
        }
    }

    /// Starts it again after [`Self::kill`] or [`Self::stop`].
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

    /// `mosquitto_pub` as this user, to its end.
    pub fn publish(&self, login: (&str, &str), arguments: &[&str]) -> Output {
        self.client("mosquitto_pub", login, arguments).output().unwrap()
    }

    /// `mosquitto_pub` as this user: a message for each line, until the broker has acknowledged them all.
    pub fn publish_lines(&self, login: (&str, &str), arguments: &[&str], lines: &str) {
        assert!(self.pour(login, arguments, lines).status.success());
    }

    /// The same, until the broker has answered them all.
    pub fn pour(&self, login: (&str, &str), arguments: &[&str], lines: &str) -> Output {
        let mut client = self.client("mosquitto_pub", login, arguments);
        let mut process = client.arg("-l").stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
        process.stdin.take().unwrap().write_all(format!("{lines}\n").as_bytes()).unwrap();
        process.wait_with_output().unwrap()
    }

    /// `mosquitto_sub` with these arguments alone, which becomes this client, in the background.
    pub fn subscribe_bare(&self, client: &str, arguments: &[&str]) -> Subscriber {
        self.start_subscriber(client, bare("mosquitto_sub", arguments))
    }

    /// `mosquitto_sub` as this user, in the background.
    pub fn subscribe(&self, login: (&str, &str), arguments: &[&str]) -> Subscriber {
        self.start_subscriber(login.0, self.client("mosquitto_sub", login, arguments))
    }

    fn start_subscriber(&self, client: &str, mut command: Command) -> Subscriber {
        let output = tempfile::NamedTempFile::new().unwrap();
        let stream = output.reopen().unwrap();
        // The client does not say in time that it is subscribed; the broker does.
        let subscribed = format!("Sending SUBACK to {client}");
        let before = self.log().matches(&subscribed).count();
        let process = command.stdout(stream.try_clone().unwrap()).stderr(stream).spawn().unwrap();
        wait_until("a subscription", || self.log().matches(&subscribed).count() > before);
        Subscriber { process, output }
    }

    /// `mosquitto_pub` as this user: numbers from 0 on, a thousand a second at the most, all over one connection.
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

    /// Whether it keeps a session of this client, which stays as it is. That ends the connection of whoever has it.
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

/// `mosquitto_pub` with these arguments alone, to its end: what says who it is, and where the broker is, has to be among them.
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
    /// What it has printed so far.
    pub fn output(&self) -> String {
        std::fs::read_to_string(self.output.path()).unwrap()
    }

    /// Returns once its output has this text.
    pub fn wait_for(&self, text: &str) {
        wait_until(&format!("{text:?} in the output of mosquitto_sub"), || self.output().contains(text));
    }

    /// Whether it is still there.
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

/// A `mosquitto_pub` that publishes number after number.
pub struct Stream {
    process: Child,
    stop: Arc<AtomicBool>,
    writer: JoinHandle<usize>,
}

impl Stream {
    /// Ends it once the broker has acknowledged everything; gives how many there were.
    pub fn finish(mut self) -> usize {
        self.stop.store(true, Ordering::Relaxed);
        let sent = self.writer.join().unwrap();
        assert!(self.process.wait().unwrap().success());
        sent
    }
}

/// Returns once the condition holds.
pub fn wait_until(what: &str, mut condition: impl FnMut() -> bool) {
    let started = Instant::now();
    while !condition() {
        assert!(started.elapsed() < PATIENCE, "waited in vain for {what}");
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// A small file system in memory, which this process alone sees, and whom it lets in; it is gone when that ends.
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

    /// A program that sees it.
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

/// The log, from this byte on, of a process that has to end with an error.
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
