//! Compares the messages that a broker retains at `devices/+/desired` with the desired states. Pure.

use std::collections::{HashMap, HashSet};
use std::hash::{DefaultHasher, Hash, Hasher};
use std::sync::Arc;

use crate::operator::device::twin::Wanted;

/// The maximum number of retained messages of devices that are not declared, at an external broker, whose clients may invent names. The
/// operator clears such messages; further ones are read again by the next session.
const MAX_UNDECLARED: usize = 1_000;

/// The retained messages by device, as digests of the payloads.
#[derive(Debug, Default)]
pub struct RetainedStates {
    known: HashMap<Arc<str>, u64>,
    /// Those of devices that were not declared when the message arrived.
    undeclared: HashSet<Arc<str>>,
    /// Whether the number of these is limited.
    limited: bool,
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
    /// Without messages; `external`: of an external broker.
    #[must_use]
    pub fn new(external: bool) -> Self {
        Self { limited: external, ..Self::default() }
    }

    /// The broker retains this message of a device, which may be `declared`. An empty payload means none.
    pub fn observe(&mut self, device: &str, payload: &[u8], declared: bool) {
        if payload.is_empty() || declared {
            self.undeclared.remove(device);
        }
        if payload.is_empty() {
            self.known.remove(device);
        } else if declared || !self.limited || self.undeclared.contains(device) || self.undeclared.len() < MAX_UNDECLARED {
            let name: Arc<str> = device.into();
            if self.limited && !declared {
                self.undeclared.insert(Arc::clone(&name));
            }
            self.known.insert(name, digest(payload));
        }
    }

    /// Devices with a retained message.
    pub fn devices(&self) -> impl Iterator<Item = &Arc<str>> {
        self.known.keys()
    }

    /// The message to publish so that the broker retains the desired state.
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
            ("changed, or overwritten by another client", Some("b"), state(2, "a"), RetainedAction::Publish(2, "a".into())),
            ("no longer declared, or gone", Some("a"), Wanted::Nothing, RetainedAction::Clear),
            ("never declared", None, Wanted::Nothing, RetainedAction::Keep(None)),
            ("paused", Some("b"), Wanted::LeaveAlone, RetainedAction::Keep(None)),
            ("cleared by another client", Some(""), state(1, "a"), RetainedAction::Publish(1, "a".into())),
        ] {
            let mut retained = RetainedStates::default();
            if let Some(kept) = kept {
                retained.observe("d", b"before", true);
                retained.observe("d", kept.as_bytes(), true);
            }
            assert_eq!(retained.action("d", wanted), expected, "{name}");
        }
    }

    #[test]
    fn invented_names_at_an_external_broker_are_bounded() {
        let kept = |external: bool| {
            let mut retained = RetainedStates::new(external);
            for number in 0..3 * MAX_UNDECLARED {
                retained.observe(&format!("invented-{number}"), b"x", false);
            }
            retained.observe("declared", b"x", true);
            retained.observe("invented-0", b"", false);
            retained.observe("one-more", b"x", false);
            retained.observe("too-many", b"x", false);
            retained.devices().count()
        };
        assert_eq!(kept(true), MAX_UNDECLARED + 1);
        assert_eq!(kept(false), 3 * MAX_UNDECLARED + 2, "at a broker of the operator every client is a Device");
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
