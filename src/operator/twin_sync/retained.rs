//! Compares the messages that a broker retains at `devices/+/desired` with the desired states. Pure.

use std::collections::HashMap;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::sync::Arc;

use crate::operator::device::twin::Wanted;

/// The retained messages by device, as digests of the payloads.
#[derive(Debug, Default)]
pub struct RetainedStates {
    known: HashMap<Arc<str>, u64>,
}

/// The message to publish for a device.
#[derive(Clone, Debug, Eq, PartialEq)]
pub enum RetainedAction {
    /// A state with its generation.
    Publish(i64, Box<str>),
    /// An empty message, which clears the retained one.
    Clear,
    /// None: the broker retains the desired message, with this generation if there is one.
    Keep(Option<i64>),
}

impl RetainedStates {
    /// The broker retains this message. An empty payload means none.
    pub fn observe(&mut self, device: &str, payload: &[u8]) {
        if payload.is_empty() {
            self.known.remove(device);
        } else {
            self.known.insert(device.into(), digest(payload));
        }
    }

    /// Devices with a retained message.
    pub fn devices(&self) -> impl Iterator<Item = &Arc<str>> {
        self.known.keys()
    }

    /// What to publish so that the broker retains the desired message.
    #[must_use]
    pub fn action(&self, device: &str, wanted: Wanted) -> RetainedAction {
        match (wanted, self.known.get(device)) {
            (Wanted::State { generation, payload }, known) if known == Some(&digest(payload.as_bytes())) => {
                RetainedAction::Keep(Some(generation))
            }
            (Wanted::State { generation, payload }, _) => RetainedAction::Publish(generation, payload),
            (Wanted::Nothing, Some(_)) => RetainedAction::Clear,
            (Wanted::Nothing, None) | (Wanted::LeaveAlone, _) => RetainedAction::Keep(None),
        }
    }
}

fn digest(payload: &[u8]) -> u64 {
    let mut hasher = DefaultHasher::new();
    payload.hash(&mut hasher);
    hasher.finish()
}

/// The device and the last level of `devices/<device>/<leaf>`.
#[must_use]
pub fn device_and_leaf(topic: &[u8]) -> Option<(&str, &str)> {
    let rest = std::str::from_utf8(topic).ok()?.strip_prefix("devices/")?;
    rest.split_once('/').filter(|(device, leaf)| !device.is_empty() && !leaf.contains('/'))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn state(generation: i64, payload: &str) -> Wanted {
        Wanted::State { generation, payload: payload.into() }
    }

    #[test]
    fn differences_determine_what_is_published() {
        for (name, kept, wanted, expected) in [
            ("new", None, state(1, "a"), RetainedAction::Publish(1, "a".into())),
            ("kept", Some("a"), state(1, "a"), RetainedAction::Keep(Some(1))),
            ("changed, or overwritten by somebody", Some("b"), state(2, "a"), RetainedAction::Publish(2, "a".into())),
            ("no longer declared, or gone", Some("a"), Wanted::Nothing, RetainedAction::Clear),
            ("never declared", None, Wanted::Nothing, RetainedAction::Keep(None)),
            ("paused", Some("b"), Wanted::LeaveAlone, RetainedAction::Keep(None)),
            ("cleared by somebody", Some(""), state(1, "a"), RetainedAction::Publish(1, "a".into())),
        ] {
            let mut retained = RetainedStates::default();
            if let Some(kept) = kept {
                retained.observe("d", b"before");
                retained.observe("d", kept.as_bytes());
            }
            assert_eq!(retained.action("d", wanted), expected, "{name}");
        }
    }

    #[test]
    fn topics_are_split_into_device_and_leaf() {
        for (topic, expected) in [
            ("devices/press-1/desired", Some(("press-1", "desired"))),
            ("devices/press-1/reported", Some(("press-1", "reported"))),
            ("devices//desired", None),
            ("devices/press-1", None),
            ("devices/press-1/reported/x", None),
            ("fleet/press-1/desired", None),
        ] {
            assert_eq!(device_and_leaf(topic.as_bytes()), expected, "{topic}");
        }
        assert_eq!(device_and_leaf(b"devices/\xff/desired"), None);
    }
}
