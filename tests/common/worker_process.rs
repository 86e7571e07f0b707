//! The process of a worker.

use std::fs::File;
use std::io::{Read, Write};
use std::net::{Ipv4Addr, TcpStream};
use std::path::Path;
use std::process::{Child, Command, Stdio};

use serde_json::Value;
use tempfile::TempDir;

use super::free_port;
use super::memory::MemoryLimit;
use super::mosquitto::wait_until;

/// The process of a worker.
pub struct Worker {
    process: Child,
    pub folder: TempDir,
    http: u16,
}

impl Worker {
    pub fn start(configuration: &Value, uri: &str, ordinal: i32, arguments: &[&str], files: &[(String, String)]) -> Self {
        let folder = tempfile::tempdir().unwrap();
        for (name, content) in files {
            write(folder.path(), name, content);
        }
        Self::start_in(folder, configuration, uri, ordinal, arguments)
    }

    pub fn start_in(folder: TempDir, configuration: &Value, uri: &str, ordinal: i32, arguments: &[&str]) -> Self {
        Self::start_limited(folder, configuration, uri, ordinal, arguments, None)
    }

    pub fn start_limited(
        folder: TempDir,
        configuration: &Value,
        uri: &str,
        ordinal: i32,
        arguments: &[&str],
        limit: Option<&MemoryLimit>,
    ) -> Self {
        let http = free_port();
        for (name, content) in [("ingest.json", configuration.to_string()), ("uri", uri.to_owned()), ("password", "password\n".to_owned())]
        {
            std::fs::write(folder.path().join(name), content).unwrap();
        }
        let process = spawn(folder.path(), http, ordinal, arguments, limit);
        Self { process, folder, http }
    }

    /// Writes one of the worker's files.
    pub fn write(&self, name: &str, content: &str) {
        write(self.folder.path(), name, content);
    }

    /// Kills the worker (SIGKILL), as a crash does.
    pub fn kill(&mut self) {
        self.process.kill().unwrap();
        self.process.wait().unwrap();
    }

    /// Stops the worker (SIGTERM) and returns whether it succeeded.
    pub fn stop(&mut self) -> bool {
        if let Some(status) = self.process.try_wait().unwrap() {
            return status.success();
        }
        assert!(Command::new("kill").arg(self.process.id().to_string()).status().unwrap().success());
        self.process.wait().unwrap().success()
    }

    /// The id of the process.
    pub fn pid(&self) -> u32 {
        self.process.id()
    }

    pub fn log(&self) -> String {
        std::fs::read_to_string(self.folder.path().join("log")).unwrap_or_default()
    }

    /// Status line and body of an HTTP response.
    pub fn get(&self, path: &str) -> (String, String) {
        let mut answer = String::new();
        if let Ok(mut stream) = TcpStream::connect((Ipv4Addr::LOCALHOST, self.http)) {
            let request = format!("GET {path} HTTP/1.1\r\nHost: worker\r\nConnection: close\r\n\r\n");
            let _ = stream.write_all(request.as_bytes()).and_then(|()| stream.read_to_string(&mut answer));
        }
        let (head, body) = answer.split_once("\r\n\r\n").unwrap_or_default();
        (head.lines().next().unwrap_or_default().to_owned(), body.to_owned())
    }

    pub fn wait_ready(&self) {
        wait_until(&format!("the worker's readiness; its log:\n{}", self.log()), || self.get("/readyz").0.contains("200"));
    }

    /// Waits until the worker is not ready for a reason that contains this text.
    pub fn wait_not_ready(&self, reason: &str) {
        wait_until(&format!("unreadiness because of {reason:?}"), || {
            let (status, body) = self.get("/readyz");
            status.contains("503") && body.contains(reason)
        });
    }

    /// The value of a metric, with its labels.
    pub fn metric(&self, name: &str) -> f64 {
        let (_, body) = self.get("/metrics");
        let line = body.lines().find_map(|line| line.strip_prefix(name)).expect("the metric is there");
        line.trim().parse().unwrap()
    }
}

impl Drop for Worker {
    fn drop(&mut self) {
        if self.process.try_wait().is_ok_and(|status| status.is_none()) {
            self.kill();
        }
    }
}

fn write(folder: &Path, name: &str, content: &str) {
    let path = folder.join(name);
    std::fs::create_dir_all(path.parent().unwrap()).unwrap();
    std::fs::write(path, content).unwrap();
}

fn spawn(folder: &Path, http: u16, ordinal: i32, arguments: &[&str], limit: Option<&MemoryLimit>) -> Child {
    let log = File::options().create(true).append(true).open(folder.join("log")).unwrap();
    let binary = env!("CARGO_BIN_EXE_fleetwright");
    let mut command = match limit {
        None => Command::new(binary),
        Some(limit) => {
            let mut shell = Command::new("sh");
            shell.args(["-c", r#"echo $$ >"$0" && exec "$@""#]).arg(limit.processes()).arg(binary);
            shell
        }
    };
    command
        .args(["ingest", "--config", "ingest.json", "--database-uri-file", "uri", "--password-file", "password"])
        .args(["--ordinal", &ordinal.to_string()])
        .args(arguments)
        .args(["--http", &format!("127.0.0.1:{http}")])
        .current_dir(folder)
        .stdin(Stdio::null())
        .stdout(log.try_clone().unwrap())
        .stderr(log)
        .spawn()
        .unwrap()
}
