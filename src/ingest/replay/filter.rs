//! Selects the dead letters to replay.

use clap::Args;
use clap::builder::PossibleValuesParser;
use jiff::Timestamp;
use tokio_postgres::types::Type;

use crate::api::dead_letter::Replay;
use crate::api::duration;
use crate::decode::dead_letter::Reason;
use crate::decode::time::Time;
use crate::sink::timescale::copy::Timestamptz;
use crate::state::owner::Owner;
use crate::state::replay_progress::Parameter;

/// The conditions of a dead letter to replay. All given conditions must hold.
#[derive(Args, Clone, Debug, Default)]
#[command(next_help_heading = "Selection of dead letters (default: all of the Pipeline)")]
pub struct Filter {
    /// Reason, or several separated by commas
    #[arg(long, value_name = "REASON", value_delimiter = ',', value_parser = PossibleValuesParser::new(Reason::ALL.map(Reason::name)))]
    pub reason: Vec<String>,

    /// Earliest arrival, such as 2026-05-04T06:00:00Z, or a duration before now such as 6h or 1h30m
    #[arg(long, value_name = "TIME", value_parser = read_time)]
    pub since: Option<Time>,

    /// Arrival before this time
    #[arg(long, value_name = "TIME", value_parser = read_time)]
    pub until: Option<Time>,

    /// MQTT filter of the topic, such as 'plants/+/press/#'
    #[arg(long, value_name = "TOPIC")]
    pub topic: Option<String>,

    /// Device, according to the topic of the Pipeline
    #[arg(long, value_name = "NAME")]
    pub device: Option<String>,

    /// Gateway of the message
    #[arg(long, value_name = "NAME")]
    pub gateway: Option<String>,
}

impl Filter {
    /// The filter of a Pipeline's request.
    #[must_use]
    pub fn of(request: &Replay) -> Self {
        // A time outside the range of the column is no bound.
        let time = |time: &k8s_openapi::apimachinery::pkg::apis::meta::v1::Time| of_timestamp(time.0);
        Self {
            reason: request.reasons.iter().map(|reason| reason.name().to_owned()).collect(),
            since: request.since.as_ref().and_then(time),
            until: request.until.as_ref().and_then(time),
            topic: request.topic.clone(),
            ..Self::default()
        }
    }
}

/// A filter as parameters of SQL.
#[derive(Debug)]
pub struct FilterCondition {
    owner: Owner,
    reasons: Option<Vec<String>>,
    since: Option<Timestamptz>,
    until: Option<Timestamptz>,
    topic: Option<String>,
    device: Option<String>,
    gateway: Option<String>,
}

impl FilterCondition {
    /// The condition, in SQL: the first parameters of a statement.
    pub const SQL: &str = "cluster = $1 AND namespace = $2 AND pipeline = $3 AND ($4::text[] IS NULL OR reason = ANY($4))
         AND ($5::timestamptz IS NULL OR time >= $5) AND ($6::timestamptz IS NULL OR time < $6)
         AND ($7::text IS NULL OR topic ~ $7) AND ($8::text IS NULL OR topic ~ $8) AND ($9::text IS NULL OR gateway = $9)";

    /// The filter for a Pipeline with this topic.
    #[must_use]
    pub fn new(filter: &Filter, owner: Owner, topic: &str) -> Self {
        let of_device = |device: &String| {
            let levels = topic.split('/').map(|level| match level {
                "{device}" => escape(device),
                _ if level.starts_with('{') || level == "+" => ANY_LEVEL.to_owned(),
                _ => escape(level),
            });
            format!("^{}$", levels.collect::<Vec<_>>().join("/"))
        };
        Self {
            owner,
            reasons: (!filter.reason.is_empty()).then(|| filter.reason.clone()),
            since: filter.since.map(Timestamptz),
            until: filter.until.map(Timestamptz),
            topic: filter.topic.as_deref().map(expression),
            device: filter.device.as_ref().map(of_device),
            gateway: filter.gateway.clone(),
        }
    }

    /// The Pipeline.
    #[must_use]
    pub fn owner(&self) -> &Owner {
        &self.owner
    }

    /// The parameters of [`Self::SQL`].
    #[must_use]
    pub fn parameters(&self) -> Vec<Parameter<'_>> {
        let [cluster, namespace, pipeline] = self.owner.parameters();
        vec![
            cluster,
            namespace,
            pipeline,
            (&self.reasons, Type::TEXT_ARRAY),
            (&self.since, Type::TIMESTAMPTZ),
            (&self.until, Type::TIMESTAMPTZ),
            (&self.topic, Type::TEXT),
            (&self.device, Type::TEXT),
            (&self.gateway, Type::TEXT),
        ]
    }
}

const ANY_LEVEL: &str = "[^/]*";

/// An MQTT topic filter (MQTT 5.0, 4.7.1) as a regular expression of PostgreSQL.
fn expression(filter: &str) -> String {
    if filter == "#" {
        return String::new();
    }
    // `a/#` matches `a` too.
    let (levels, end) = filter.strip_suffix("/#").map_or((filter, "$"), |levels| (levels, "(/.*)?$"));
    let levels: Vec<String> = levels.split('/').map(|level| if level == "+" { ANY_LEVEL.to_owned() } else { escape(level) }).collect();
    format!("^{}{end}", levels.join("/"))
}

fn escape(text: &str) -> String {
    let mut escaped = String::with_capacity(text.len());
    for character in text.chars() {
        if !character.is_alphanumeric() && character.is_ascii() {
            escaped.push('\\');
        }
        escaped.push(character);
    }
    escaped
}

/// A time of RFC 3339, or a duration before now.
fn read_time(text: &str) -> Result<Time, String> {
    if let Some(ago) = duration::microseconds(text) {
        return Ok(Time::now().after(-ago));
    }
    let expected = "expected a time such as 2026-05-04T06:00:00Z, or a duration before now such as 6h or 1h30m";
    let timestamp: Timestamp = text.parse().map_err(|_| expected.to_owned())?;
    of_timestamp(timestamp).ok_or_else(|| expected.to_owned())
}

fn of_timestamp(timestamp: Timestamp) -> Option<Time> {
    Time::from_integer(i128::from(timestamp.as_microsecond()), crate::api::pipeline::TimeUnit::Microseconds)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn owner() -> Owner {
        Owner { cluster: "c".to_owned(), namespace: "n".to_owned(), pipeline: "p".to_owned() }
    }

    #[test]
    fn topic_filters_become_regular_expressions() {
        for (filter, expected) in
            [("#", ""), ("a/#", "^a(/.*)?$"), ("a/+/b.c", r"^a/[^/]*/b\.c$"), ("+", "^[^/]*$"), ("plant-1/ü", r"^plant\-1/ü$")]
        {
            assert_eq!(expression(filter), expected, "{filter}");
        }
        let filter = Filter { device: Some("press-1".to_owned()), ..Filter::default() };
        assert_eq!(FilterCondition::new(&filter, owner(), "{site}/+/{device}/x").device.unwrap(), r"^[^/]*/[^/]*/press\-1/x$");
    }

    #[test]
    fn the_filter_of_a_request() {
        let request = serde_json::json!({
            "token": "a", "reasons": ["OutOfRange", "UnknownDevice"], "since": "2000-01-01T00:00:01Z", "until": "2000-01-01T01:00:02+01:00",
            "topic": "a/#",
        });
        let filter = Filter::of(&serde_json::from_value(request).unwrap());
        assert_eq!(filter.reason, ["OutOfRange", "UnknownDevice"]);
        assert_eq!(
            (filter.since, filter.until, filter.topic.as_deref()),
            (Some(Time::YEAR_2000.after(1_000_000)), Some(Time::YEAR_2000.after(2_000_000)), Some("a/#"))
        );
        let all = FilterCondition::new(&Filter::of(&serde_json::from_str(r#"{"token": "a"}"#).unwrap()), owner(), "{device}");
        assert!(all.reasons.is_none() && all.since.is_none() && all.until.is_none() && all.topic.is_none());
    }

    #[test]
    fn times_are_parsed() {
        assert_eq!(read_time("2000-01-01T00:00:01Z"), Ok(Time::YEAR_2000.after(1_000_000)));
        let ago = Time::now().0 - read_time("2h").unwrap().0;
        assert!((7_140_000_000..7_260_000_000).contains(&ago), "{ago}");
        assert!(read_time("yesterday").is_err());
    }
}
