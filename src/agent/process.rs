//! Finds the broker's process by its command line, and sends signals to it.

use std::fs;
use std::path::Path;

use rustix::io::Errno;
use rustix::process::{Pid, Signal, kill_process};
use thiserror::Error;

/// Name of the broker's program.
const PROGRAM: &str = "mosquitto";

/// Why the agent could not signal the broker.
#[derive(Debug, Error)]
pub enum SignalError {
    /// The broker does not run. It will read the files when it starts.
    #[error("no process {PROGRAM} runs with the configuration {configuration:?}")]
    FindProcess {
        /// Path of the configuration in the command line.
        configuration: String,
    },

    /// The operating system refused.
    #[error("failed to signal process {process}: do both containers of the pod run as the same user?")]
    Signal {
        /// Process id.
        process: i32,
        /// The cause.
        #[source]
        source: Errno,
    },
}

/// Sends SIGHUP to the broker that was started with this configuration, so that it reads its files again.
///
/// The signal ends a broker that is still starting: signal only a broker that has answered before.
///
/// # Errors
/// If no such broker runs, or the signal fails.
pub fn reload(configuration: &Path) -> Result<(), SignalError> {
    let missing = || SignalError::FindProcess { configuration: configuration.display().to_string() };
    let process = find(Path::new("/proc"), configuration).ok_or_else(missing)?;
    match Pid::from_raw(process).map(|pid| kill_process(pid, Signal::HUP)) {
        Some(Ok(())) => Ok(()),
        Some(Err(Errno::SRCH)) | None => Err(missing()),
        Some(Err(source)) => Err(SignalError::Signal { process, source }),
    }
}

/// Whether a broker that was started with this configuration runs.
#[must_use]
pub fn runs_with(configuration: &Path) -> bool {
    find(Path::new("/proc"), configuration).is_some()
}

fn find(processes: &Path, configuration: &Path) -> Option<i32> {
    let numbers = fs::read_dir(processes).ok()?.filter_map(|entry| entry.ok()?.file_name().to_str()?.parse::<i32>().ok());
    // A process that has just ended has no command line.
    numbers
        .into_iter()
        .find(|number| fs::read(processes.join(number.to_string()).join("cmdline")).is_ok_and(|line| runs(&line, configuration)))
}

/// Whether a command line (arguments that each end with a NUL) starts the broker with this configuration.
fn runs(command_line: &[u8], configuration: &Path) -> bool {
    let mut arguments = command_line.split(|byte| *byte == 0);
    let program = arguments.next().unwrap_or_default();
    let name = program.rsplit(|byte| *byte == b'/').next().unwrap_or_default();
    name == PROGRAM.as_bytes() && arguments.any(|argument| argument == configuration.as_os_str().as_encoded_bytes())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn command_lines() {
        let path = Path::new("/etc/fleetwright/mosquitto.conf");
        for (line, expected) in [
            ("/usr/sbin/mosquitto\0-c\0/etc/fleetwright/mosquitto.conf\0", true),
            ("mosquitto\0-v\0-c\0/etc/fleetwright/mosquitto.conf\0", true),
            ("mosquitto\0-c\0/etc/other.conf\0", false),
            ("bash\0-c\0/etc/fleetwright/mosquitto.conf\0", false),
            ("", false),
        ] {
            assert_eq!(runs(line.as_bytes(), path), expected, "{line:?}");
        }
    }

    #[test]
    fn nobody_to_signal() {
        assert!(matches!(reload(Path::new("/no/such/configuration")), Err(SignalError::FindProcess { .. })));
    }
}
