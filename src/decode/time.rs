//! Times of readings: microseconds since 1970-01-01T00:00:00Z.

use std::fmt;
use std::time::{SystemTime, UNIX_EPOCH};

use fleetwright_api::pipeline::TimeUnit;
use jiff::Timestamp;

/// The first time that a reading may carry as a value, in microseconds: 4714-11-24 BC, day 0 of the Julian calendar, before
/// which databases and libraries have no dates. The end of the range is that of 64 bits, in the year 294247.
const MIN_VALUE: i64 = -210_866_803_200_000_000;

/// A time: microseconds since 1970-01-01T00:00:00Z.
#[derive(Clone, Copy, Debug, Default, Eq, Hash, Ord, PartialEq, PartialOrd)]
pub struct Time(pub i64);

impl Time {
    /// 2000-01-01T00:00:00Z, the earliest time that a reading may have.
    pub const YEAR_2000: Self = Self(946_684_800_000_000);

    /// The time of the system clock.
    #[must_use]
    pub fn now() -> Self {
        let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        Self(i64::try_from(since.as_micros()).unwrap_or(i64::MAX))
    }

    /// Milliseconds since 1970-01-01T00:00:00Z; `None` before that.
    #[must_use]
    pub fn to_milliseconds(self) -> Option<u64> {
        u64::try_from(self.0.div_euclid(1_000)).ok()
    }

    /// Whether the value of a field may be this time: not before 4714-11-24 BC.
    #[must_use]
    pub fn is_in_range(self) -> bool {
        self.0 >= MIN_VALUE
    }

    /// The time this many microseconds later.
    #[must_use]
    pub fn after(self, microseconds: i64) -> Self {
        Self(self.0.saturating_add(microseconds))
    }

    /// A whole number of the unit since 1970. `None` when the unit is text, or when the number is beyond 64 bits of microseconds.
    #[must_use]
    pub fn from_integer(number: i128, unit: TimeUnit) -> Option<Self> {
        let microseconds = match unit {
            TimeUnit::Seconds => number.checked_mul(1_000_000)?,
            TimeUnit::Milliseconds => number.checked_mul(1_000)?,
            TimeUnit::Microseconds => number,
            TimeUnit::Nanoseconds => number.div_euclid(1_000),
            TimeUnit::Rfc3339 => return None,
        };
        i64::try_from(microseconds).ok().map(Self)
    }

    /// A number of the unit since 1970, with a fraction; rounded to the microsecond.
    #[must_use]
    pub fn from_float(number: f64, unit: TimeUnit) -> Option<Self> {
        let microseconds = match unit {
            TimeUnit::Seconds => number * 1e6,
            TimeUnit::Milliseconds => number * 1e3,
            TimeUnit::Microseconds => number,
            TimeUnit::Nanoseconds => number / 1e3,
            TimeUnit::Rfc3339 => return None,
        };
        // A thousand times the range of `Time`, and far from where the conversion would saturate.
        if !(-1e21..1e21).contains(&microseconds) {
            return None;
        }
        #[allow(clippy::cast_possible_truncation, reason = "the range was checked, and the number is whole")]
        let microseconds = microseconds.round() as i128;
        Self::from_integer(microseconds, TimeUnit::Microseconds)
    }

    /// A text as in RFC 3339.
    #[must_use]
    pub fn from_text(text: &str) -> Option<Self> {
        let timestamp: Timestamp = text.parse().ok()?;
        Self::from_integer(timestamp.as_nanosecond(), TimeUnit::Nanoseconds)
    }
}

impl fmt::Display for Time {
    /// As in RFC 3339, in UTC.
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        match Timestamp::from_microsecond(self.0) {
            Ok(time) => time.fmt(formatter),
            Err(_) => write!(formatter, "{} µs after 1970", self.0),
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// 2026-05-04T03:02:01.5Z.
    const MICROSECONDS: i64 = 1_777_863_721_500_000;

    #[test]
    fn every_unit_gives_the_same_time() {
        let expected = Some(Time(MICROSECONDS));
        assert_eq!(Time::from_float(1_777_863_721.5, TimeUnit::Seconds), expected);
        assert_eq!(Time::from_integer(1_777_863_721_500, TimeUnit::Milliseconds), expected);
        assert_eq!(Time::from_float(1_777_863_721_500.0, TimeUnit::Milliseconds), expected);
        assert_eq!(Time::from_integer(i128::from(MICROSECONDS), TimeUnit::Microseconds), expected);
        assert_eq!(Time::from_integer(i128::from(MICROSECONDS) * 1000 + 999, TimeUnit::Nanoseconds), expected);
        assert_eq!(Time::from_text("2026-05-04T03:02:01.5Z"), expected);
        assert_eq!(Time::from_text("2026-05-04T05:02:01.500000+02:00"), expected);
    }

    #[test]
    fn other_texts_and_numbers_are_refused() {
        for text in ["", "yesterday", "2026-05-04", "2026-05-04T03:02:01", "2026-13-04T03:02:01Z"] {
            assert_eq!(Time::from_text(text), None, "{text}");
        }
        assert_eq!(Time::from_float(f64::NAN, TimeUnit::Seconds), None);
        assert_eq!(Time::from_float(1e300, TimeUnit::Nanoseconds), None);
        assert_eq!(Time::from_integer(i128::from(u64::MAX), TimeUnit::Seconds), None);
    }

    proptest! {
        #[test]
        fn no_number_or_text_panics(number in any::<f64>(), whole in any::<i64>(), text in ".{0,40}") {
            for unit in [TimeUnit::Seconds, TimeUnit::Milliseconds, TimeUnit::Microseconds, TimeUnit::Nanoseconds, TimeUnit::Rfc3339] {
                let _ = (Time::from_float(number, unit), Time::from_integer(i128::from(whole), unit), Time::from_text(&text));
            }
        }

        /// Milliseconds with a fraction, as devices send them, are exact to the microsecond.
        #[test]
        fn fractions_are_exact(microseconds in 0_i64..4_102_444_800_000_000) {
            #[allow(clippy::cast_precision_loss, reason = "the range is below 2^53")]
            let float = microseconds as f64 / 1e3;
            prop_assert_eq!(Time::from_float(float, TimeUnit::Milliseconds), Some(Time(microseconds)));
        }
    }
}
