//! Access control lists in the format of Mosquitto's `acl_file`: patterns for every device, and lines for one user.
//!
//! Access is denied by default. `deny` is not used: in Mosquitto it also denies reading, and a device must be able to read its desired
//! state, which it may not write. The list therefore names each topic that a device may write.

use thiserror::Error;

use crate::api::device::{Access, Acl};

/// The patterns for every user, where `%u` is the user's name: a device's own topics.
///
/// Workers and the agent match these as well, on topics with their own names, which no device has.
pub const PATTERNS: &[&str] = &[
    "pattern read devices/%u/#",
    "pattern write devices/%u/telemetry",
    "pattern write devices/%u/telemetry/#",
    "pattern write devices/%u/reported",
    "pattern write devices/%u/reported/#",
];

/// Maximum size of a topic filter in bytes: four for each of the 256 characters that the CRD allows.
const MAX_TOPIC_BYTES: usize = 1024;

/// Why a topic is invalid in an access control list. The CRD rejects the same topics; this check is for objects that bypassed the
/// schema.
#[derive(Clone, Debug, Eq, Error, PartialEq)]
pub enum AclError {
    /// Not a topic filter of MQTT 5.0 section 4.7, or a filter that is invalid in a line of a file.
    #[error(
        "topic {topic:?} is not a filter that can be granted: expected levels without control characters, `+` only as a whole level, \
         `#` only as the last, no white space at the ends"
    )]
    InvalidFilter {
        /// The given value.
        topic: String,
    },

    /// A topic of the broker, or a shared subscription.
    #[error("topic {topic:?} starts with $, and such topics belong to the broker: name a topic of your own")]
    ReservedTopic {
        /// The given value.
        topic: String,
    },
}

/// The line for one rule of a user.
///
/// # Errors
/// If its topic is invalid in the file.
pub fn line(acl: &Acl) -> Result<String, AclError> {
    let topic = acl.topic.as_str();
    if topic.starts_with('$') {
        return Err(AclError::ReservedTopic { topic: topic.to_owned() });
    }
    if !is_filter(topic) {
        return Err(AclError::InvalidFilter { topic: topic.to_owned() });
    }
    let access = match acl.access {
        Access::Read => "read",
        Access::Write => "write",
        Access::ReadWrite => "readwrite",
    };
    Ok(format!("topic {access} {topic}"))
}

fn is_filter(topic: &str) -> bool {
    let levels = topic.split('/').count();
    let valid_level = |(index, level): (usize, &str)| match level {
        "+" => true,
        "#" => index + 1 == levels,
        level => !level.contains(['+', '#']),
    };
    !topic.is_empty()
        && topic.len() <= MAX_TOPIC_BYTES
        && topic.trim() == topic
        && !topic.contains(char::is_control)
        && topic.split('/').enumerate().all(valid_level)
}

/// Whether the text is a line that [`line`] writes.
#[must_use]
pub fn is_line(text: &str) -> bool {
    let rule = text.strip_prefix("topic ").and_then(|rule| rule.split_once(' '));
    rule.is_some_and(|(access, topic)| matches!(access, "read" | "write" | "readwrite") && !topic.starts_with('$') && is_filter(topic))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn read(topic: &str) -> Acl {
        Acl { topic: topic.to_owned(), access: Access::Read }
    }

    #[test]
    fn rules_are_rendered_as_lines() {
        for (access, expected) in
            [(Access::Read, "topic read a/+/#"), (Access::Write, "topic write a/+/#"), (Access::ReadWrite, "topic readwrite a/+/#")]
        {
            assert_eq!(line(&Acl { topic: "a/+/#".to_owned(), access }).unwrap(), expected);
        }
    }

    #[test]
    fn valid_topics_are_rendered_and_recognized() {
        for topic in ["a", "#", "+", "/", "/a//b", "plant 1/press", "a/%u/b", "größe/°C", "read x"] {
            assert!(is_line(&line(&read(topic)).unwrap()), "{topic:?}");
        }
    }

    #[test]
    fn invalid_and_reserved_topics_are_refused() {
        for topic in ["", " a", "a ", "a\t", "a\nuser _agent", "a\ru", "a\0", "a#", "#/a", "a/+b", "a\u{85}b", &"x".repeat(1025)] {
            assert!(matches!(line(&read(topic)), Err(AclError::InvalidFilter { .. })), "{topic:?}");
        }
        for topic in ["$SYS/#", "$share/g/a", "$CONTROL/#"] {
            assert!(matches!(line(&read(topic)), Err(AclError::ReservedTopic { .. })), "{topic:?}");
        }
    }

    proptest! {
        #[test]
        fn no_topic_makes_a_second_line(topic in any::<String>()) {
            if let Ok(line) = line(&read(&topic)) {
                prop_assert_eq!(line.lines().count(), 1);
                prop_assert!(!line.contains(['\r', '\n', '\0']));
            }
        }
    }
}
