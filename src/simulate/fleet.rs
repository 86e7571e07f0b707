//! Starts and stops the simulated devices of a namespace.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use futures::TryStreamExt;
use kube::runtime::WatchStreamExt;
use kube::runtime::watcher::{self, Event, watcher};
use kube::{Api, ResourceExt};
use tokio::sync::watch;
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;
use tracing::{info, warn};

use super::access::DeviceAccess;
use super::device::{DevicePlan, SimulatedDevice};
use super::report::Tally;
use crate::api;
use crate::runtime::error::chain;

/// The publish rate.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum PublishRate {
    /// Messages per second of all devices together.
    Total(f64),
    /// Messages per second of each device.
    PerDevice(f64),
}

impl PublishRate {
    /// The interval between two messages of one device, for this number of devices. At most one day.
    #[must_use]
    pub fn interval(self, devices: usize) -> Duration {
        #[allow(clippy::cast_precision_loss, reason = "a number of devices")]
        let seconds = match self {
            Self::Total(rate) => devices.max(1) as f64 / rate,
            Self::PerDevice(rate) => 1.0 / rate,
        };
        Duration::from_secs_f64(seconds.clamp(1e-6, 86_400.0))
    }
}

/// The running devices.
pub struct SimulatedFleet {
    access: Arc<DeviceAccess>,
    rate: PublishRate,
    readings: u32,
    max_devices: Option<usize>,
    tally: Tally,
    interval: watch::Sender<Duration>,
    /// All Devices, and the token that stops each running one.
    devices: BTreeMap<String, Option<CancellationToken>>,
    running: JoinSet<()>,
}

impl SimulatedFleet {
    /// Creates a fleet without devices.
    #[must_use]
    pub fn new(access: DeviceAccess, rate: PublishRate, readings: u32, max_devices: Option<usize>, tally: Tally) -> Self {
        let interval = watch::Sender::new(rate.interval(1));
        Self { access: Arc::new(access), rate, readings, max_devices, tally, interval, devices: BTreeMap::new(), running: JoinSet::new() }
    }

    /// Simulates every Device that the selector matches, until `stop`.
    pub async fn run(mut self, selector: &str, stop: &CancellationToken) {
        let api: Api<api::Device> = Api::namespaced(self.access.client(), self.access.namespace());
        let events = watcher(api, watcher::Config::default().labels(selector)).default_backoff();
        let mut events = std::pin::pin!(events);
        let mut listed = Vec::new();
        loop {
            let event = tokio::select! {
                () = stop.cancelled() => break,
                event = events.try_next() => event,
                Some(_) = self.running.join_next() => continue,
            };
            match event {
                Ok(Some(Event::Init)) => listed.clear(),
                Ok(Some(Event::InitApply(device))) => listed.push(device.name_any()),
                Ok(Some(Event::InitDone)) => {
                    let gone: Vec<String> = self.devices.keys().filter(|name| !listed.contains(name)).cloned().collect();
                    for name in gone {
                        self.remove(&name);
                    }
                    for name in listed.drain(..) {
                        self.devices.entry(name).or_default();
                    }
                    self.arrange();
                }
                Ok(Some(Event::Apply(device))) => {
                    self.devices.entry(device.name_any()).or_default();
                    self.arrange();
                }
                Ok(Some(Event::Delete(device))) => {
                    self.remove(&device.name_any());
                    self.arrange();
                }
                // The watch retries with its own backoff.
                Err(error) => warn!(failure = chain(&error), "failed to watch the Devices: retrying"),
                Ok(None) => break,
            }
        }
        for stop in self.devices.values().flatten() {
            stop.cancel();
        }
        while self.running.join_next().await.is_some() {}
    }

    fn remove(&mut self, name: &str) {
        if let Some(Some(stop)) = self.devices.remove(name) {
            info!(device = name, "stopped: the Device was deleted");
            stop.cancel();
        }
    }

    /// Starts and stops devices, and distributes the rate.
    fn arrange(&mut self) {
        let max = self.max_devices.unwrap_or(usize::MAX);
        let known = self.devices.len().min(max);
        let interval = self.rate.interval(known);
        self.interval.send_if_modified(|current| std::mem::replace(current, interval) != interval);
        self.tally.set_known(known);
        for (index, (name, running)) in self.devices.iter_mut().enumerate() {
            if index >= max {
                if let Some(stop) = running.take() {
                    stop.cancel();
                }
            } else if running.is_none() {
                let plan = DevicePlan { interval: self.interval.subscribe(), readings: self.readings };
                let device = SimulatedDevice::new(name, plan, self.access.clone(), self.tally.clone());
                let stop = CancellationToken::new();
                self.running.spawn(device.run(stop.clone()));
                *running = Some(stop);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_total_rate_is_divided_among_the_devices() {
        assert_eq!(PublishRate::Total(100.0).interval(20), Duration::from_millis(200));
        assert_eq!(PublishRate::PerDevice(5.0).interval(20), Duration::from_millis(200));
        assert_eq!(PublishRate::Total(0.000_001).interval(20), Duration::from_hours(24));
    }
}
