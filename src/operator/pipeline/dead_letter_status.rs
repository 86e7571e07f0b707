//! Converts the numbers of dead letters in the database into the status: pure, and coarse, so that a single message does not cause a
//! write to the API server.

use crate::api::PipelineStatus;
use crate::api::condition::{Cause, DEAD_LETTERS_DISCARDED, Finding, REPLAYED};
use crate::api::dead_letter::{DeadLetterStatus, ReplayState, ReplayStatus};
use crate::api::reason::Reason;
use crate::state::dead_letter::{DeadLetters, Replay};

/// The dead letters in the status.
#[derive(Clone, Debug, Default, Eq, PartialEq)]
pub struct DeadLetterView {
    /// The number of dead letters; `None` without dead letters.
    pub counts: Option<DeadLetterStatus>,
    /// The progress of the replay in the spec; `None` without a replay.
    pub replay: Option<ReplayStatus>,
    /// Why the replay is blocked.
    pub failure: Option<String>,
    /// Why a batch of a worker keeps failing.
    pub write_failure: Option<String>,
}

impl DeadLetterView {
    /// The view from an existing status.
    #[must_use]
    pub fn of(status: Option<&PipelineStatus>) -> Self {
        let counts = status.and_then(|status| status.dead_letters);
        Self { counts, replay: status.and_then(|status| status.replay.clone()), ..Self::default() }
    }

    /// The new view for a Pipeline whose spec requests the replay of `token`. Without new numbers, the view stays the same.
    #[must_use]
    pub fn after(&self, token: Option<&str>, found: Option<&DeadLetters>) -> Self {
        let replay = token.map(|token| {
            let previous = self.replay.as_ref().filter(|previous| previous.token == token);
            replay(previous, token, found.and_then(|found| found.replay.as_ref()))
        });
        let Some(found) = found else {
            return Self { counts: self.counts, replay, ..Self::default() };
        };
        let before = self.counts.unwrap_or(DeadLetterStatus { last_day: 0, discarded_last_day: 0 });
        let counts = DeadLetterStatus {
            last_day: about(before.last_day, found.refused),
            discarded_last_day: about(before.discarded_last_day, found.discarded),
        };
        let failure = found.replay.as_ref().and_then(|replay| replay.failure.clone());
        Self { counts: (counts.last_day > 0).then_some(counts), replay, failure, write_failure: found.failure.clone() }
    }

    /// Whether the two views differ by more than a number.
    #[must_use]
    pub fn is_significant_change(&self, next: &Self) -> bool {
        let kinds = |view: &Self| view.counts.map(|counts| counts.discarded_last_day > 0);
        kinds(self) != kinds(next)
            || self.replay != next.replay
            || self.failure != next.failure
            || self.write_failure.is_some() != next.write_failure.is_some()
    }

    /// The resulting conditions; `bound` is the Pipeline's limit.
    #[must_use]
    pub fn findings(&self, bound: &str) -> Vec<Finding> {
        let mut findings = Vec::new();
        if self.counts.is_some_and(|counts| counts.discarded_last_day > 0) {
            let message = format!(
                "in the last 24 hours more messages were refused than deadLetters.maxBytesPerHour ({bound}) keeps; messages beyond the limit \
                 are only counted: SELECT * FROM fleetwright.dead_letter_count shows them by time, Gateway and reason"
            );
            findings.push(Finding::holds(DEAD_LETTERS_DISCARDED, Reason::TooManyRefused, message));
        }
        findings.extend(self.replay.as_ref().map(|replay| self.replay_finding(replay)));
        findings
    }

    fn replay_finding(&self, replay: &ReplayStatus) -> Finding {
        let token = &replay.token;
        match (replay.state, &self.failure) {
            (ReplayState::Finished, _) => {
                let (stored, refused, left) = (replay.stored, replay.refused, replay.left_alone);
                let message = format!("{token}: {stored} messages became rows, {refused} were refused again, {left} were skipped");
                Finding::holds(REPLAYED, Reason::Replayed, message)
            }
            (_, Some(failure)) => Finding::fails(
                REPLAYED,
                Cause::new(Reason::ReplayFailing, format!("{token}: the worker retries after a failure: {failure}")),
            ),
            (ReplayState::Running, None) => {
                Finding::fails(REPLAYED, Cause::new(Reason::Replaying, format!("{token}: the replay of dead letters is in progress")))
            }
            (ReplayState::Waiting, None) => {
                Finding::fails(REPLAYED, Cause::new(Reason::AwaitingWorker, format!("{token}: waits for a worker with the current spec")))
            }
        }
    }
}

/// The number for the status: the shown number, while the found number differs by a quarter at most.
fn about(shown: i64, found: i64) -> i64 {
    if shown > 0 && found > 0 && (found - shown).abs() <= shown / 4 { shown } else { found }
}

/// The progress of a replay changes in tenths: about a dozen writes for any number of messages.
fn replay(previous: Option<&ReplayStatus>, token: &str, found: Option<&Replay>) -> ReplayStatus {
    let status = |state, found: &Replay| {
        let Replay { stored, refused, left_alone, remaining, .. } = *found;
        ReplayStatus { token: token.to_owned(), state, stored, refused, left_alone, remaining }
    };
    match (previous, found) {
        (Some(previous), None) => previous.clone(),
        (None, None) => status(ReplayState::Waiting, &Replay::default()),
        (_, Some(found)) if found.finished => status(ReplayState::Finished, found),
        (previous, Some(found)) => {
            let now = status(ReplayState::Running, found);
            let tenth = |status: &ReplayStatus| {
                let done = status.stored + status.refused + status.left_alone;
                (status.state, done * 10 / (done + status.remaining).max(1))
            };
            previous.filter(|previous| tenth(previous) == tenth(&now)).cloned().unwrap_or(now)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn found(refused: i64, discarded: i64) -> DeadLetters {
        DeadLetters { refused, discarded, ..DeadLetters::default() }
    }

    fn shown(view: &DeadLetterView) -> Option<(i64, i64)> {
        view.counts.map(|counts| (counts.last_day, counts.discarded_last_day))
    }

    #[test]
    fn a_number_changes_only_if_it_differs_by_more_than_a_quarter() {
        let mut view = DeadLetterView::default();
        for (refused, discarded, expected, is_significant_change) in [
            (0, 0, None, false),
            (1, 0, Some((1, 0)), true),
            (2, 0, Some((2, 0)), false),
            (100, 0, Some((100, 0)), false),
            (125, 0, Some((100, 0)), false),
            (75, 0, Some((100, 0)), false),
            (126, 0, Some((126, 0)), false),
            (126, 1, Some((126, 1)), true),
            (130, 7, Some((126, 7)), false),
            (60, 0, Some((60, 0)), true),
            (0, 0, None, true),
        ] {
            let next = view.after(None, Some(&found(refused, discarded)));
            assert_eq!((shown(&next), view.is_significant_change(&next)), (expected, is_significant_change), "{refused} {discarded}");
            assert_eq!(next.after(None, None), next, "without new numbers it stays");
            view = next;
        }
    }

    #[test]
    fn the_begin_and_the_end_of_a_failure_are_significant() {
        let failing = |failure: Option<&str>| DeadLetters { failure: failure.map(str::to_owned), ..DeadLetters::default() };
        let mut view = DeadLetterView::default();
        for (failure, is_significant) in [(None, false), (Some("a"), true), (Some("b"), false), (None, true)] {
            let next = view.after(None, Some(&failing(failure)));
            assert_eq!((view.is_significant_change(&next), next.write_failure.as_deref()), (is_significant, failure));
            view = next;
        }
    }

    #[test]
    fn the_progress_of_a_replay_changes_in_tenths() {
        let progress = |done, remaining, finished| DeadLetters {
            replay: Some(Replay { stored: done, remaining, finished, ..Replay::default() }),
            ..DeadLetters::default()
        };
        let mut view = DeadLetterView::default();
        let mut writes = 0;
        let steps = (0..=1_000).map(|done| Some(progress(done, 1_000 - done, false)));
        for found in [None].into_iter().chain(steps).chain((0..2).map(|_| Some(progress(1_000, 0, true)))) {
            let next = view.after(Some("a"), found.as_ref());
            writes += u32::from(view.is_significant_change(&next));
            view = next;
        }
        assert_eq!(writes, 13, "waiting, eleven tenths, finished");
        let replay = view.replay.clone().unwrap();
        assert_eq!((replay.state, replay.stored, replay.remaining), (ReplayState::Finished, 1_000, 0));
        let other = view.after(Some("b"), Some(&found(0, 0))).replay.unwrap();
        assert_eq!((other.state, other.stored), (ReplayState::Waiting, 0));
        assert_eq!(view.after(None, Some(&found(0, 0))).replay, None);
    }

    #[test]
    fn each_state_of_dead_letters_and_replay_has_its_condition() {
        let replay = |state| Some(ReplayStatus { token: "a".to_owned(), state, stored: 1, refused: 2, left_alone: 0, remaining: 3 });
        let counts = |discarded_last_day| Some(DeadLetterStatus { last_day: 9, discarded_last_day });
        for (view, expected) in [
            (DeadLetterView::default(), vec![]),
            (DeadLetterView { counts: counts(0), ..DeadLetterView::default() }, vec![]),
            (
                DeadLetterView { counts: counts(1), ..DeadLetterView::default() },
                vec![("DeadLettersDiscarded", Some(true), "TooManyRefused")],
            ),
            (
                DeadLetterView { replay: replay(ReplayState::Waiting), ..DeadLetterView::default() },
                vec![("Replayed", Some(false), "AwaitingWorker")],
            ),
            (
                DeadLetterView { replay: replay(ReplayState::Running), ..DeadLetterView::default() },
                vec![("Replayed", Some(false), "Replaying")],
            ),
            (
                DeadLetterView { replay: replay(ReplayState::Running), failure: Some("no table".to_owned()), ..DeadLetterView::default() },
                vec![("Replayed", Some(false), "ReplayFailing")],
            ),
            (
                DeadLetterView { replay: replay(ReplayState::Finished), ..DeadLetterView::default() },
                vec![("Replayed", Some(true), "Replayed")],
            ),
        ] {
            let findings = view.findings("32Mi");
            let found: Vec<_> = findings.iter().map(|finding| (finding.condition, finding.holds, finding.cause.reason.as_str())).collect();
            assert_eq!(found, expected, "{view:?}");
        }
    }
}
