//! MQTT clients: `mosquitto_pub` and Python's Paho.

use std::collections::VecDeque;
use std::fmt::Display;
use std::path::Path;
use std::process::Stdio;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use serde_json::{Value, json};
use tokio::io::{AsyncBufReadExt, AsyncWriteExt, BufReader, Lines};
use tokio::net::TcpStream;
use tokio::process::{Child, ChildStdin, ChildStdout, Command};

use crate::cluster::{output, root};
use crate::wait::{seconds, until};

/// Maximum time for an answer of the broker.
const ANSWERS_WITHIN: Duration = seconds(20);

/// A listener of a broker, with the settings that a client needs.
#[derive(Clone, Debug)]
pub struct Listener {
    /// Host name.
    pub host: String,

    /// Port.
    pub port: u16,

    /// File with the CA certificate that the client trusts; `None` for a listener without TLS.
    pub authority: Option<std::path::PathBuf>,

    /// Files with the client's certificate and key, if it has them.
    pub identity: Option<(std::path::PathBuf, std::path::PathBuf)>,
}

impl Listener {
    /// A listener without TLS on port 1883.
    #[must_use]
    pub fn plain(host: impl Display) -> Self {
        Self { host: host.to_string(), port: 1883, authority: None, identity: None }
    }

    /// A listener with TLS on port 8883.
    #[must_use]
    pub fn tls(host: impl Display, authority: &Path) -> Self {
        Self { host: host.to_string(), port: 8883, authority: Some(authority.to_owned()), identity: None }
    }

    /// Waits until the listener accepts connections. The Service of a pod that has just become ready may refuse or drop connections
    /// until kube-proxy has updated its rules.
    pub(crate) async fn reach(&self) -> Result<()> {
        let connect = async || tokio::time::timeout(seconds(1), TcpStream::connect((self.host.as_str(), self.port))).await;
        let look = async || Ok(connect().await?.map(drop)?);
        until(seconds(10), format_args!("{}:{} accepts connections", self.host, self.port), look).await
    }

    pub(crate) fn settings(&self) -> Value {
        json!({"host": self.host, "port": self.port, "ca": self.authority, "identity": self.identity})
    }
}

/// Publishes one message at QoS 1 with `mosquitto_pub`, which succeeds when the broker has acknowledged it. An empty user name is not
/// sent.
pub async fn mosquitto_pub(listener: &Listener, username: &str, password: &str, topic: &str, payload: &str) -> Result<()> {
    listener.reach().await?;
    let mut command = Command::new("mosquitto_pub");
    command.args(["-V", "mqttv5", "-q", "1", "-h", &listener.host, "-p", &listener.port.to_string()]);
    command.args(["-t", topic, "-m", payload]);
    if !username.is_empty() {
        command.args(["-u", username, "-P", password]);
    }
    if let Some((certificate, key)) = &listener.identity {
        command.arg("--cert").arg(certificate).arg("--key").arg(key);
    }
    if let Some(authority) = &listener.authority {
        command.arg("--cafile").arg(authority);
    }
    output(&mut command).await.map(drop)
}

/// A program of `e2e/clients` and its output. The program ends when this value is dropped.
pub(crate) struct Program {
    // Killed on drop.
    _child: Child,
    input: Option<ChildStdin>,
    lines: Lines<BufReader<ChildStdout>>,
}

impl Program {
    pub(crate) async fn start(script: &str, settings: &Value) -> Result<Self> {
        let folder = root().join("e2e/clients");
        let mut command = Command::new(folder.join("paho.sh"));
        command.arg(folder.join(script)).stdin(Stdio::piped()).stdout(Stdio::piped()).kill_on_drop(true);
        let mut child = command.spawn().context("failed to start paho.sh")?;
        let output = child.stdout.take().context("no standard output")?;
        let input = child.stdin.take();
        let mut program = Self { _child: child, input, lines: BufReader::new(output).lines() };
        program.write(settings).await?;
        Ok(program)
    }

    pub(crate) async fn write(&mut self, line: &Value) -> Result<()> {
        let input = self.input.as_mut().context("the program's input is closed")?;
        Ok(input.write_all(format!("{line}\n").as_bytes()).await?)
    }

    /// Closes the program's input.
    pub(crate) fn end(&mut self) {
        self.input = None;
    }

    /// Returns the next line, or `None` when the program has ended.
    pub(crate) async fn line(&mut self) -> Result<Option<String>> {
        Ok(self.lines.next_line().await?)
    }
}

/// A session of a Paho client.
pub struct Session {
    program: Program,
    /// Messages that the broker delivered before the awaited answer.
    messages: VecDeque<String>,
}

impl Session {
    /// Connects.
    ///
    /// # Errors
    /// Fails with the reason code when the broker refuses the connection; see [`Session::try_connect`].
    pub async fn connect(listener: &Listener, username: &str, password: &str) -> Result<Self> {
        match Self::try_connect(listener, username, password).await? {
            Ok(session) => Ok(session),
            Err(code) => bail!("the broker refused {username} with reason code {code}"),
        }
    }

    /// Connects, or returns the reason code (MQTT 5, section 3.2.2.2) with which the broker refused.
    pub async fn try_connect(listener: &Listener, username: &str, password: &str) -> Result<Result<Self, i32>> {
        listener.reach().await?;
        let mut settings = listener.settings();
        settings["username"] = username.into();
        settings["password"] = password.into();
        let mut session = Self { program: Program::start("session.py", &settings).await?, messages: VecDeque::new() };
        let code = session.answer("connected").await?;
        Ok(if code == 0 { Ok(session) } else { Err(code) })
    }

    /// Publishes at QoS 1 and returns the reason code of the acknowledgement.
    pub async fn publish(&mut self, topic: &str, payload: &str) -> Result<i32> {
        self.program.write(&json!({"publish": topic, "payload": payload})).await?;
        self.answer("published").await
    }

    /// Subscribes at QoS 1 and returns the reason code.
    pub async fn subscribe(&mut self, filter: &str) -> Result<i32> {
        self.program.write(&json!({"subscribe": filter})).await?;
        self.answer("subscribed").await
    }

    /// Waits until the broker ends the session. Returns the reason code, or -1 if the broker sent none.
    pub async fn ended(&mut self, within: Duration) -> Result<i32> {
        let ended = tokio::time::timeout(within, self.await_line("disconnected")).await;
        let code = ended.with_context(|| format!("the session is still open after {} s", within.as_secs()))??;
        Ok(code.trim().parse()?)
    }

    /// Returns the next message that the broker delivers, as `TOPIC PAYLOAD`.
    pub async fn message(&mut self, within: Duration) -> Result<String> {
        if self.messages.is_empty() {
            let delivered = tokio::time::timeout(within, self.await_line("message")).await;
            delivered.with_context(|| format!("no message arrived within {} s", within.as_secs()))??;
        }
        self.messages.pop_front().context("no message arrived")
    }

    async fn answer(&mut self, what: &str) -> Result<i32> {
        let answered = tokio::time::timeout(ANSWERS_WITHIN, self.await_line(what)).await;
        let answer = answered.with_context(|| format!("the broker did not answer in time ({what})"))??;
        Ok(answer.trim().parse()?)
    }

    /// Returns the rest of the next line that begins with this word. Messages that arrive before it are kept.
    async fn await_line(&mut self, what: &str) -> Result<String> {
        loop {
            let line = self.program.line().await?.with_context(|| format!("the client ended before {what}"))?;
            let (word, rest) = line.split_once(' ').with_context(|| format!("the client printed {line:?}"))?;
            if word == "message" {
                self.messages.push_back(rest.to_owned());
            }
            if word == what {
                return Ok(rest.to_owned());
            }
            ensure!(word != "disconnected", "the session ended with {rest} instead of {what}");
        }
    }
}
