//! Lengths of time as users write them: `90s`, `1h30m`, `7d`, `2w`. The only parser of them.
//!
//! The units are those of Prometheus (`s`, `m`, `h`, `d`, `w`), each at most once and from the longest to the shortest, which includes what
//! Go and Kubernetes print for whole seconds. A day has 24 hours, a week 7 days.

use std::time::Duration;

/// The pattern of a duration in a CRD, down to seconds.
pub const PATTERN: &str = r"^([1-9][0-9]{0,5}w)?([1-9][0-9]{0,5}d)?([1-9][0-9]{0,5}h)?([1-9][0-9]{0,5}m)?([1-9][0-9]{0,5}s)?$";

/// The pattern of a duration in a CRD, down to minutes, where seconds would be a mistake.
pub const MINUTES_PATTERN: &str = r"^([1-9][0-9]{0,5}w)?([1-9][0-9]{0,5}d)?([1-9][0-9]{0,5}h)?([1-9][0-9]{0,5}m)?$";

/// The units, from the longest, with their seconds.
const UNITS: [(char, u64); 5] = [('w', 604_800), ('d', 86_400), ('h', 3_600), ('m', 60), ('s', 1)];

/// What an error message says was expected.
pub const EXPECTED: &str = "a duration such as 90s, 1h30m or 7d";

/// The duration that a text says. `None` where it says none, where it is zero, and beyond 64 bits of seconds.
#[must_use]
pub fn parse(text: &str) -> Option<Duration> {
    let mut units = UNITS.iter();
    let mut seconds = 0_u64;
    let mut rest = text;
    while !rest.is_empty() {
        let (digits, unit) =
            (rest.find(|character: char| !character.is_ascii_digit())?, rest.trim_start_matches(|c: char| c.is_ascii_digit()));
        let number: u64 = rest[..digits].parse().ok()?;
        let unit = unit.chars().next()?;
        // Continues behind the last unit: each comes once, in order.
        let (_, length) = units.find(|(name, _)| *name == unit)?;
        seconds = seconds.checked_add(number.checked_mul(*length)?)?;
        rest = &rest[digits + unit.len_utf8()..];
    }
    (seconds > 0).then(|| Duration::from_secs(seconds))
}

/// The same, in seconds.
#[must_use]
pub fn seconds(text: &str) -> Option<i64> {
    parse(text).and_then(|duration| i64::try_from(duration.as_secs()).ok())
}

/// The same, in microseconds; `None` also beyond 64 bits of them.
#[must_use]
pub fn microseconds(text: &str) -> Option<i64> {
    parse(text).and_then(|duration| i64::try_from(duration.as_micros()).ok())
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn users_write_what_kubernetes_and_prometheus_take() {
        for (text, expected) in [
            ("90s", 90),
            ("1m", 60),
            ("12h", 43_200),
            ("7d", 604_800),
            ("2w", 1_209_600),
            ("1h30m", 5_400),
            ("1h0m0s", 3_600),
            ("1w2d3h4m5s", 788_645),
            ("999999w", 604_799_395_200),
        ] {
            assert_eq!(seconds(text), Some(expected), "{text}");
        }
    }

    #[test]
    fn everything_else_is_refused() {
        for text in ["", "0d", "0h0m", "5", "d", "1.5h", "-1h", "+1h", "1 h", "30m1h", "1h1h", "1H", "ü", "1ü", "1ms", "month"] {
            assert_eq!(parse(text), None, "{text}");
        }
        assert_eq!(parse("18446744073709551615w"), None);
        assert_eq!((seconds("18446744073709551615s"), microseconds("9223372036854775807s")), (None, None));
    }

    proptest! {
        /// Whatever the numbers: what is written is what is read.
        #[test]
        fn a_written_duration_is_read_back(numbers in prop::array::uniform5(prop::option::of(1_u64..999_999))) {
            let parts = UNITS.iter().zip(numbers).filter_map(|((unit, length), number)| Some((unit, length, number?)));
            let (text, seconds) = parts.fold((String::new(), 0), |(text, total), (unit, length, number)| {
                (format!("{text}{number}{unit}"), total + number * length)
            });
            prop_assert_eq!(parse(&text), (seconds > 0).then(|| Duration::from_secs(seconds)));
        }

        #[test]
        fn no_text_panics(text in "[0-9wdhmsü .+-]{0,12}") {
            let _ = (parse(&text), seconds(&text), microseconds(&text));
        }
    }
}
