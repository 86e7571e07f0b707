//! The topic of a Pipeline, compiled into the topic filter of the subscription and a pattern that parses the topic of a message.

use super::pipeline::Format;

/// The first level of every topic of Sparkplug B.
pub const SPARKPLUG: &str = "spBv1.0";

/// A Pipeline's topic, as in `devices/{device}/telemetry`.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct TopicPattern {
    filter: String,
    commands: Option<String>,
    levels: Vec<Level>,
    tags: Vec<String>,
}

#[derive(Clone, Debug, Eq, PartialEq)]
enum Level {
    Literal(String),
    Any,
    Device,
    Tag,
}

/// An invalid topic of a Pipeline.
#[derive(Clone, Debug, Eq, PartialEq, thiserror::Error)]
pub enum TopicError {
    /// `{device}` does not occur exactly once.
    #[error("failed to find the device in the topic {topic:?}: expected {{device}} exactly once, as in devices/{{device}}/telemetry")]
    FindDevice {
        /// The topic.
        topic: String,
    },

    /// A tag is captured twice.
    #[error("failed to read the topic {topic:?}: expected each capture once, found {{{tag}}} twice")]
    RepeatTag {
        /// The topic.
        topic: String,
        /// The tag.
        tag: String,
    },

    /// A level is neither text, `+` nor a capture.
    #[error("failed to read the level {level:?} of the topic {topic:?}: expected text, + or a capture such as {{line}}")]
    ReadLevel {
        /// The topic.
        topic: String,
        /// The level.
        level: String,
    },

    /// The topic is not one of Sparkplug B.
    #[error(
        "failed to read the topic {topic:?}: expected {SPARKPLUG}/<group>/+/<node>/<device> or {SPARKPLUG}/<group>/+/<node> for the format \
         SparkplugB, with a capture, + or text in each <place>"
    )]
    MatchSparkplug {
        /// The topic.
        topic: String,
    },
}

impl TopicPattern {
    /// Compiles `spec.source.topic` for a format. With Sparkplug B the subscription also includes other topics of the node, because a
    /// node numbers its messages and those of its devices together, and declares its metrics in some of these messages.
    ///
    /// # Errors
    /// If the topic does not have the format that the CRD requires.
    pub fn compile(topic: &str, format: Format) -> Result<Self, TopicError> {
        let mut tags: Vec<String> = Vec::new();
        let mut levels = Vec::new();
        for level in topic.split('/') {
            let capture = level.strip_prefix('{').and_then(|rest| rest.strip_suffix('}'));
            levels.push(match (level, capture) {
                ("+", _) => Level::Any,
                (_, Some("device")) => Level::Device,
                (_, Some(tag)) if tags.iter().any(|known| known == tag) => {
                    return Err(TopicError::RepeatTag { topic: topic.to_owned(), tag: tag.to_owned() });
                }
                (_, Some(tag)) if !tag.is_empty() => {
                    tags.push(tag.to_owned());
                    Level::Tag
                }
                _ if level.contains(['+', '#', '{', '}', '\0']) => {
                    return Err(TopicError::ReadLevel { topic: topic.to_owned(), level: level.to_owned() });
                }
                _ => Level::Literal(level.to_owned()),
            });
        }
        if levels.iter().filter(|level| **level == Level::Device).count() != 1 {
            return Err(TopicError::FindDevice { topic: topic.to_owned() });
        }
        let mut commands = None;
        let mut filter: Vec<&str> = levels.iter().map(|level| if let Level::Literal(text) = level { text } else { "+" }).collect();
        if format == Format::SparkplugB {
            if !matches!(levels.len(), 4 | 5) || levels[0] != Level::Literal(SPARKPLUG.to_owned()) || levels[2] != Level::Any {
                return Err(TopicError::MatchSparkplug { topic: topic.to_owned() });
            }
            commands = Some([SPARKPLUG, filter[1], "NCMD", filter[3]].join("/"));
            // Also matches the level above: the node's own messages.
            filter.truncate(4);
            filter.push("#");
        }
        Ok(Self { filter: filter.join("/"), commands, levels, tags })
    }

    /// The MQTT topic filter that matches exactly the topics of this form; with Sparkplug B, all topics of the nodes.
    #[must_use]
    pub fn filter(&self) -> &str {
        &self.filter
    }

    /// The MQTT topic filter of the commands that go to the nodes; only with Sparkplug B.
    #[must_use]
    pub fn commands(&self) -> Option<&str> {
        self.commands.as_deref()
    }

    /// How many levels a topic of this form has.
    #[must_use]
    pub fn depth(&self) -> usize {
        self.levels.len()
    }

    /// The captures other than the device, in the order of the topic.
    #[must_use]
    pub fn tags(&self) -> &[String] {
        &self.tags
    }

    /// The device that a topic names; `tags` is filled with the other captures. `None` when the topic is not of this form.
    pub fn capture<'t>(&self, topic: &'t str, tags: &mut Vec<&'t str>) -> Option<&'t str> {
        tags.clear();
        let mut device = None;
        let mut parts = topic.split('/');
        for level in &self.levels {
            let part = parts.next()?;
            match level {
                Level::Literal(text) if text != part => return None,
                Level::Literal(_) | Level::Any => {}
                Level::Device => device = Some(part),
                Level::Tag => tags.push(part),
            }
        }
        if parts.next().is_some() { None } else { device }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use rumqttc::mqttbytes::{matches, valid_filter};

    use super::*;

    #[test]
    fn captures_the_device_and_the_tags() {
        let pattern = TopicPattern::compile("plants/{plant}/+/{line}/devices/{device}/telemetry", Format::Json).unwrap();
        assert_eq!(pattern.filter(), "plants/+/+/+/devices/+/telemetry");
        assert_eq!(pattern.tags(), ["plant", "line"]);
        let mut tags = Vec::new();
        assert_eq!(pattern.capture("plants/berlin/x/3/devices/press-1/telemetry", &mut tags), Some("press-1"));
        assert_eq!(tags, ["berlin", "3"]);
        for other in
            ["plants/berlin/x/3/devices/press-1", "plants/berlin/x/3/devices/press-1/telemetry/x", "plant/b/x/3/devices/d/telemetry", ""]
        {
            assert_eq!(pattern.capture(other, &mut tags), None, "{other}");
        }
    }

    #[test]
    fn invalid_topics_are_refused() {
        for topic in ["devices/telemetry", "{device}/{device}", "a/#/{device}", "a{b}/{device}", "{x}/{x}/{device}", "{}/{device}"] {
            assert!(TopicPattern::compile(topic, Format::Json).is_err(), "{topic}");
        }
    }

    #[test]
    fn a_sparkplug_topic_compiles_into_filters_of_the_node_and_its_commands() {
        for (topic, device, filter, commands) in [
            ("spBv1.0/{group}/+/{node}/{device}", "pump", "spBv1.0/+/+/+/#", "spBv1.0/+/NCMD/+"),
            ("spBv1.0/plant/+/{device}", "gw", "spBv1.0/plant/+/+/#", "spBv1.0/plant/NCMD/+"),
        ] {
            let pattern = TopicPattern::compile(topic, Format::SparkplugB).unwrap();
            assert_eq!((pattern.filter(), pattern.commands()), (filter, Some(commands)));
            let found = ["spBv1.0/plant/DDATA/gw/pump", "spBv1.0/plant/NDATA/gw"].map(|topic| pattern.capture(topic, &mut Vec::new()));
            assert!(found.contains(&Some(device)) && found.contains(&None), "{found:?}");
        }
        for topic in ["devices/{device}/+/x", "spBv1.0/{group}/DDATA/{device}", "spBv1.0/{group}/+/{node}/{device}/x", "spBv1.0/a/{device}"]
        {
            assert!(matches!(TopicPattern::compile(topic, Format::SparkplugB), Err(TopicError::MatchSparkplug { .. })), "{topic}");
        }
    }

    proptest! {
        /// The pattern captures exactly the topics that the broker's filter matches.
        #[test]
        fn agrees_with_the_filter(
            levels in prop::collection::vec(prop_oneof!["[a-c]{1,2}", Just("+".to_owned()), Just("{device}".to_owned()), Just("{tag}".to_owned())], 1..6),
            topic in "[a-c]{0,2}(/[a-c]{0,2}){0,5}",
        ) {
            if let Ok(pattern) = TopicPattern::compile(&levels.join("/"), Format::Json) {
                prop_assert!(valid_filter(pattern.filter()));
                let mut tags = Vec::new();
                let captured = pattern.capture(&topic, &mut tags);
                prop_assert_eq!(captured.is_some(), matches(&topic, pattern.filter()), "{} {}", pattern.filter(), topic);
                if captured.is_some() {
                    prop_assert_eq!(tags.len(), pattern.tags().len());
                }
            }
        }
    }
}
