//! How many dead letters are kept: pure. A storm of bad messages must neither fill the disk nor hide a rare one.

use crate::ingest::dead_letter::Reason;

/// What a dead letter takes on the disk beside its texts and its payload: the head of its row, the names of its Pipeline, and its
/// entries in two indexes.
pub const ROW_BYTES: usize = 200;

/// This part of the bound is set aside for each reason: 1 %, which is a thousand messages of a few hundred bytes at the default.
const SHARE: i64 = 100;

const REASONS: usize = Reason::ALL.len();

/// What may still be kept in this hour.
#[derive(Clone, Debug)]
pub struct Allowance {
    limit: i64,
    total: i64,
    kept: [i64; REASONS],
}

impl Allowance {
    /// What is left of `limit` bytes when so many are kept, by the name of the reason.
    #[must_use]
    pub fn new<'a>(limit: i64, kept: impl IntoIterator<Item = (&'a str, i64)>) -> Self {
        let mut allowance = Self { limit, total: 0, kept: [0; REASONS] };
        for (name, bytes) in kept {
            allowance.total = allowance.total.saturating_add(bytes);
            if let Some(index) = Reason::ALL.iter().position(|reason| reason.name() == name) {
                allowance.kept[index] = allowance.kept[index].saturating_add(bytes);
            }
        }
        allowance
    }

    /// Whether a dead letter of this size is kept; if so, it counts.
    ///
    /// The first of each reason are, up to its share; all others as far as the bound allows, the shares of other reasons left free.
    pub fn take(&mut self, reason: Reason, size: usize) -> bool {
        let size = i64::try_from(size).unwrap_or(i64::MAX);
        let share = self.limit / SHARE;
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

    fn taken(allowance: &mut Allowance, reason: Reason, size: usize, times: usize) -> usize {
        (0..times).filter(|_| allowance.take(reason, size)).count()
    }

    #[test]
    fn a_storm_of_one_reason_leaves_room_for_the_others() {
        let mut allowance = Allowance::new(10_000, []);
        let kept = taken(&mut allowance, Reason::Malformed, 10, 10_000);
        assert_eq!(kept, (10_000 - (REASONS - 1) * 100) / 10);
        assert_eq!(taken(&mut allowance, Reason::Conflict, 10, 100), 10);
        assert_eq!(taken(&mut allowance, Reason::Malformed, 10, 1), 0);
    }

    #[test]
    fn what_was_kept_before_counts() {
        for (limit, kept, fits) in [
            (0, vec![], false),
            (10_000, vec![("Malformed", 8_690)], true),
            (10_000, vec![("Malformed", 8_691)], false),
            // More than the bound, as when it was lowered, or by workers that did not see one another.
            (10_000, vec![("Malformed", 20_000)], false),
            (10_000, vec![("Conflict", 20_000)], true),
            (10_000, vec![("Conflict", i64::MAX), ("Malformed", i64::MAX)], false),
            (10_000, vec![("OfAnotherVersion", 9_000)], true),
        ] {
            assert_eq!(Allowance::new(limit, kept.clone()).take(Reason::Malformed, 10), fits, "{limit} {kept:?}");
        }
    }

    proptest! {
        #[test]
        fn the_bound_holds_and_every_reason_has_its_share(
            limit in 0_i64..1_000_000,
            letters in prop::collection::vec((select(&Reason::ALL[..]), 0_usize..5_000), 0..1_000),
        ) {
            let mut allowance = Allowance::new(limit, []);
            let (mut total, mut of_reason) = (0, [0_i64; REASONS]);
            for (reason, size) in letters {
                let size_before = of_reason[reason as usize];
                let bytes = i64::try_from(size).unwrap();
                if allowance.take(reason, size) {
                    total += bytes;
                    of_reason[reason as usize] += bytes;
                } else {
                    prop_assert!(size_before + bytes > limit / SHARE, "{:?} has its share", reason);
                }
            }
            prop_assert!(total <= limit, "{} of {}", total, limit);
        }
    }
}
