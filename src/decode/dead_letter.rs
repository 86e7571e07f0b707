//! Why a message, or a reading of it, becomes a dead letter.

pub use fleetwright_api::dead_letter::DeadLetterReason as Reason;

/// The most characters of a detail. Enough for the names of a few fields with their expected and actual values. A payload may have
/// hundreds of megabytes, and is part of the dead letter anyway.
const MAX_DETAIL_CHARACTERS: usize = 500;

/// Why a message is a dead letter: the reason, and what was expected and found.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct DeadLetterCause {
    /// Why.
    pub reason: Reason,
    /// What was expected and what was found. Never longer than a few hundred characters, and free of U+0000, which
    /// databases do not store in a text.
    pub detail: String,
}

impl DeadLetterCause {
    /// A cause. The detail is shortened, and U+0000 is replaced.
    #[must_use]
    pub fn new(reason: Reason, detail: &str) -> Self {
        let detail =
            detail.chars().take(MAX_DETAIL_CHARACTERS).map(|character| if character == '\0' { '\u{fffd}' } else { character }).collect();
        Self { reason, detail }
    }

    /// Adds another cause of the same message, which is one dead letter. The first reason is kept.
    pub fn join(&mut self, other: &Self) {
        *self = Self::new(self.reason, &format!("{}; {}: {}", self.detail, other.reason.name(), other.detail));
    }
}

/// The text, quoted and shortened, for a detail.
#[must_use]
pub fn excerpt(text: &str) -> String {
    const CHARACTERS: usize = 40;
    let cut: String = text.chars().take(CHARACTERS).collect();
    if cut.len() < text.len() { format!("{cut:?}…") } else { format!("{cut:?}") }
}
