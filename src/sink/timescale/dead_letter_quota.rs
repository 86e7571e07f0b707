//! The quota of dead letters: pure. Many bad messages of one kind must neither fill the disk nor displace a rare one.

use crate::decode::dead_letter::Reason;

/// Disk space of a dead letter beside its texts and its payload, in bytes: the header of the row, the names of the Pipeline, and two
/// index entries.
pub const ROW_BYTES: usize = 200;

/// The share of the quota that is reserved for each reason is one part in this many: 1 %, a thousand messages of a few hundred bytes
/// at the default quota.
const RESERVED_SHARE: i64 = 100;

const REASONS: usize = Reason::ALL.len();

/// The remaining quota of an hour.
#[derive(Clone, Debug)]
pub struct DeadLetterQuota {
    limit: i64,
    total: i64,
    kept: [i64; REASONS],
}

impl DeadLetterQuota {
    /// The quota of `limit` bytes of which `kept` is used, by the name of the reason.
    #[must_use]
    pub fn new<'a>(limit: i64, kept: impl IntoIterator<Item = (&'a str, i64)>) -> Self {
        let mut quota = Self { limit, total: 0, kept: [0; REASONS] };
        for (name, bytes) in kept {
            quota.total = quota.total.saturating_add(bytes);
            if let Some(index) = Reason::ALL.iter().position(|reason| reason.name() == name) {
                quota.kept[index] = quota.kept[index].saturating_add(bytes);
            }
        }
        quota
    }

    /// Whether a dead letter of this size (in bytes) is kept. If so, it is deducted.
    ///
    /// The first of each reason are, up to the reserved share; all others as far as the quota allows without the reserves of other
    /// reasons.
    pub fn accept(&mut self, reason: Reason, size: usize) -> bool {
        let size = i64::try_from(size).unwrap_or(i64::MAX);
        let share = self.limit / RESERVED_SHARE;
        let left = |kept: &i64| share.saturating_sub(*kept).max(0);
        let Some(index) = Reason::ALL.iter().position(|other| *other == reason) else { return false };
        let own = left(&self.kept[index]);
        let others = self.kept.iter().map(left).sum::<i64>() - own;
        let fits = size <= own || self.total.saturating_add(size).saturating_add(others) <= self.limit;
        if fits {
            self.total = self.total.saturating_add(size);
            self.kept[index] = self.kept[index].saturating_add(size);
        }
        fits
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use proptest::sample::select;

    use super::*;

    fn accepted(quota: &mut DeadLetterQuota, reason: Reason, size: usize, times: usize) -> usize {
        (0..times).filter(|_| quota.accept(reason, size)).count()
    }

    #[test]
    fn one_reason_leaves_the_reserves_of_the_others() {
        let mut quota = DeadLetterQuota::new(10_000, []);
        let kept = accepted(&mut quota, Reason::Malformed, 10, 10_000);
        assert_eq!(kept, (10_000 - (REASONS - 1) * 100) / 10);
        assert_eq!(accepted(&mut quota, Reason::Conflict, 10, 100), 10);
        assert_eq!(accepted(&mut quota, Reason::Malformed, 10, 1), 0);
    }

    #[test]
    fn dead_letters_that_were_kept_before_are_deducted() {
        for (limit, kept, fits) in [
            (0, vec![], false),
            (10_000, vec![("Malformed", 8_590)], true),
            (10_000, vec![("Malformed", 8_591)], false),
            // More than the bound, as when it was lowered, or by workers that did not see one another.
            (10_000, vec![("Malformed", 20_000)], false),
            (10_000, vec![("Conflict", 20_000)], true),
            (10_000, vec![("Conflict", i64::MAX), ("Malformed", i64::MAX)], false),
            (10_000, vec![("OfAnotherVersion", 9_000)], true),
        ] {
            assert_eq!(DeadLetterQuota::new(limit, kept.clone()).accept(Reason::Malformed, 10), fits, "{limit} {kept:?}");
        }
    }

    proptest! {
        #[test]
        fn the_quota_holds_and_every_reason_has_its_reserve(
            limit in 0_i64..1_000_000,
            letters in prop::collection::vec((select(&Reason::ALL[..]), 0_usize..5_000), 0..1_000),
        ) {
            let mut quota = DeadLetterQuota::new(limit, []);
            let (mut total, mut of_reason) = (0, [0_i64; REASONS]);
            for (reason, size) in letters {
                let size_before = of_reason[reason as usize];
                let bytes = i64::try_from(size).unwrap();
                if quota.accept(reason, size) {
                    total += bytes;
                    of_reason[reason as usize] += bytes;
                } else {
                    prop_assert!(size_before + bytes > limit / RESERVED_SHARE, "{:?} has its reserve", reason);
                }
            }
            prop_assert!(total <= limit, "{} of {}", total, limit);
        }
    }
}
