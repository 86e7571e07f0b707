//! A simulated machine: it runs and idles, its bearing wears until the machine fails, and it is repaired.

use rand::rngs::SmallRng;
use rand::{RngExt, SeedableRng};
use serde::Serialize;

/// One reading, as the machine publishes it.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Reading {
    /// Milliseconds since 1970-01-01T00:00:00Z.
    pub ts: i64,
    /// Vibration velocity, root mean square, in mm/s. A good machine of this size stays below 4.5 (ISO 10816-3).
    pub rms: f64,
    /// Temperature of the bearing in degrees Celsius.
    pub temperature: f64,
    /// The state of the machine.
    pub state: MachineState,
}

/// The state of a machine.
#[derive(Clone, Copy, Debug, Eq, PartialEq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum MachineState {
    /// Running.
    Running,
    /// Waiting for work.
    Idle,
    /// Running with a worn bearing.
    Drifting,
    /// Stopped, until it is repaired.
    Failed,
}

/// A machine.
#[derive(Debug)]
pub struct Machine {
    random: SmallRng,
    state: MachineState,
    /// The number of readings until the state changes.
    left: u32,
    /// The wear of the bearing: 0 is new, 1 is broken.
    wear: f64,
    temperature: f64,
    last: i64,
}

impl Machine {
    /// A machine whose readings are determined by its name.
    #[must_use]
    pub fn new(name: &str) -> Self {
        let seed = name.bytes().fold(0xcbf2_9ce4_8422_2325, |hash: u64, byte| (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3));
        let mut machine =
            Self { random: SmallRng::seed_from_u64(seed), state: MachineState::Idle, left: 0, wear: 0.0, temperature: 22.0, last: 0 };
        machine.change();
        machine
    }

    /// The next reading, at `now` (milliseconds since 1970), or one millisecond after the last one if that is later: each reading
    /// has its own time.
    pub fn read(&mut self, now: i64) -> Reading {
        self.left = self.left.saturating_sub(1);
        if self.left == 0 {
            self.change();
        }
        let (rms, target) = match self.state {
            MachineState::Running => (self.around(2.2, 0.25), 48.0),
            MachineState::Idle => (self.around(0.3, 0.05), 26.0),
            MachineState::Drifting => {
                self.wear = (self.wear + 0.01).min(1.0);
                (self.around(2.2 + 14.0 * self.wear * self.wear, 0.3 + self.wear), 48.0 + 45.0 * self.wear)
            }
            MachineState::Failed => (0.0, 22.0),
        };
        // The temperature follows the target slowly.
        self.temperature += (target - self.temperature) * 0.05;
        let temperature = self.temperature + self.random.random_range(-0.2..0.2);
        self.last = now.max(self.last + 1);
        Reading { ts: self.last, rms: round(rms.max(0.0), 1e3), temperature: round(temperature, 1e2), state: self.state }
    }

    fn around(&mut self, mean: f64, spread: f64) -> f64 {
        mean + self.random.random_range(-spread..spread)
    }

    fn change(&mut self) {
        let chance = self.random.random_range(0..10);
        (self.state, self.left) = match (self.state, chance) {
            (MachineState::Drifting, _) => (MachineState::Failed, self.random.random_range(20..60)),
            (MachineState::Running, 0) => (MachineState::Drifting, self.random.random_range(80..140)),
            (MachineState::Running, _) => (MachineState::Idle, self.random.random_range(10..60)),
            (MachineState::Idle | MachineState::Failed, _) => (MachineState::Running, self.random.random_range(60..300)),
        };
        if self.state == MachineState::Running {
            self.wear = 0.0;
        }
    }
}

fn round(number: f64, digits: f64) -> f64 {
    (number * digits).round() / digits
}

/// The payload of a message: an object for one reading, an array for more.
#[must_use]
pub fn payload(readings: &[Reading]) -> Vec<u8> {
    let encoded = if let [reading] = readings { serde_json::to_vec(reading) } else { serde_json::to_vec(readings) };
    // Finite numbers and fixed names always have a JSON form.
    encoded.unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use super::*;

    #[test]
    fn readings_stay_plausible_through_all_states() {
        let mut machine = Machine::new("press-0001");
        let readings: Vec<Reading> = (0..20_000).map(|second| machine.read(1_777_863_721_500 + second * 1000)).collect();
        assert!(readings.iter().all(|reading| (0.0..20.0).contains(&reading.rms) && (15.0..110.0).contains(&reading.temperature)));
        for state in [MachineState::Running, MachineState::Idle, MachineState::Drifting, MachineState::Failed] {
            assert!(readings.iter().any(|reading| reading.state == state), "never {state:?}");
        }
        let worst = readings.iter().map(|reading| reading.rms).fold(0.0, f64::max);
        assert!(worst > 12.0, "the vibration rises before a failure");
    }

    #[test]
    fn each_reading_has_its_own_time() {
        let mut machine = Machine::new("press-0001");
        let times: HashSet<i64> = (0..100).map(|step| machine.read(1_777_863_721_500 + step / 10).ts).collect();
        assert_eq!(times.len(), 100);
    }

    #[test]
    fn one_reading_is_an_object_and_more_are_an_array() {
        let reading = Reading { ts: 1, rms: 0.5, temperature: 20.0, state: MachineState::Idle };
        let text = |readings: &[Reading]| String::from_utf8(payload(readings)).unwrap();
        assert_eq!(text(std::slice::from_ref(&reading)), r#"{"ts":1,"rms":0.5,"temperature":20.0,"state":"idle"}"#);
        assert!(text(&[reading.clone(), reading]).starts_with("[{"));
    }
}
