//! Times of readings, as PostgreSQL keeps them: microseconds since 2000-01-01T00:00:00Z (its `timestamptz` on the wire).

use std::fmt;
use std::time::{SystemTime, UNIX_EPOCH};

use bytes::{BufMut, BytesMut};
use jiff::Timestamp;
use tokio_postgres::types::{FromSql, IsNull, ToSql, Type, accepts, to_sql_checked};

use fleetwright_api::pipeline::TimeUnit;

/// 2000-01-01T00:00:00Z in microseconds since 1970: PostgreSQL's epoch.
const EPOCH_MICROSECONDS: i64 = 946_684_800_000_000;

/// What `timestamptz` can hold: from 4714-11-24 BC to the end of 294276 AD (PostgreSQL, datatype/timestamp.h).
const STORABLE: std::ops::Range<i64> = -211_813_488_000_000_000..9_223_371_331_200_000_000;

/// A time: microseconds since 2000-01-01T00:00:00Z.
#[derive(Clone, Copy, Debug, Default, Eq, Hash, Ord, PartialEq, PartialOrd)]
pub struct Time(pub i64);

impl Time {
    /// The time that the system's clock shows.
    #[must_use]
    pub fn now() -> Self {
        let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        Self(i64::try_from(since.as_micros()).unwrap_or(i64::MAX).saturating_sub(EPOCH_MICROSECONDS))
    }

    /// Microseconds since 1970-01-01T00:00:00Z.
    #[must_use]
    pub fn since_1970(self) -> i64 {
        self.0.saturating_add(EPOCH_MICROSECONDS)
    }

    /// Milliseconds since 1970-01-01T00:00:00Z; none before that.
    #[must_use]
    pub fn to_milliseconds(self) -> Option<u64> {
        u64::try_from(self.since_1970().div_euclid(1_000)).ok()
    }

    /// Whether PostgreSQL can hold it.
    #[must_use]
    pub fn is_storable(self) -> bool {
        STORABLE.contains(&self.0)
    }

    /// This much later.
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
        i64::try_from(microseconds - i128::from(EPOCH_MICROSECONDS)).ok().map(Self)
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
        match Timestamp::from_microsecond(self.since_1970()) {
            Ok(time) => time.fmt(formatter),
            Err(_) => write!(formatter, "{} µs after the year 2000", self.0),
        }
    }
}

impl<'a> FromSql<'a> for Time {
    fn from_sql(_: &Type, raw: &'a [u8]) -> Result<Self, Box<dyn std::error::Error + Sync + Send>> {
        Ok(Self(i64::from_be_bytes(raw.try_into()?)))
    }

    accepts!(TIMESTAMPTZ);
}

impl ToSql for Time {
    fn to_sql(&self, _: &Type, out: &mut BytesMut) -> Result<IsNull, Box<dyn std::error::Error + Sync + Send>> {
        out.put_i64(self.0);
        Ok(IsNull::No)
    }

    accepts!(TIMESTAMPTZ);
    to_sql_checked!();
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// 2026-05-04T03:02:01.5Z.
    const MICROSECONDS: i64 = 1_777_863_721_500_000;

    #[test]
    fn every_unit_gives_the_same_time() {
        let expected = Some(Time(MICROSECONDS - EPOCH_MICROSECONDS));
        assert_eq!(Time::from_float(1_777_863_721.5, TimeUnit::Seconds), expected);
        assert_eq!(Time::from_integer(1_777_863_721_500, TimeUnit::Milliseconds), expected);
        assert_eq!(Time::from_float(1_777_863_721_500.0, TimeUnit::Milliseconds), expected);
        assert_eq!(Time::from_integer(i128::from(MICROSECONDS), TimeUnit::Microseconds), expected);
        assert_eq!(Time::from_integer(i128::from(MICROSECONDS) * 1000 + 999, TimeUnit::Nanoseconds), expected);
        assert_eq!(Time::from_text("2026-05-04T03:02:01.5Z"), expected);
        assert_eq!(Time::from_text("2026-05-04T05:02:01.500000+02:00"), expected);
    }

    #[test]
    fn what_is_no_time() {
        for text in ["", "yesterday", "2026-05-04", "2026-05-04T03:02:01", "2026-13-04T03:02:01Z"] {
            assert_eq!(Time::from_text(text), None, "{text}");
        }
        assert_eq!(Time::from_float(f64::NAN, TimeUnit::Seconds), None);
        assert_eq!(Time::from_float(1e300, TimeUnit::Nanoseconds), None);
        assert_eq!(Time::from_integer(i128::from(u64::MAX), TimeUnit::Seconds), None);
    }

    proptest! {
        #[test]
        fn any_number_is_a_time_or_none(number in any::<f64>(), whole in any::<i64>(), text in ".{0,40}") {
            for unit in [TimeUnit::Seconds, TimeUnit::Milliseconds, TimeUnit::Microseconds, TimeUnit::Nanoseconds, TimeUnit::Rfc3339] {
                let _ = (Time::from_float(number, unit), Time::from_integer(i128::from(whole), unit), Time::from_text(&text));
            }
        }

        /// Milliseconds with a fraction, as devices send them, are exact to the microsecond.
        #[test]
        fn fractions_are_exact(microseconds in 0_i64..4_102_444_800_000_000) {
            #[allow(clippy::cast_precision_loss, reason = "the range is below 2^53")]
            let float = microseconds as f64 / 1e3;
            prop_assert_eq!(Time::from_float(float, TimeUnit::Milliseconds), Some(Time(microseconds - EPOCH_MICROSECONDS)));
        }
    }
}
