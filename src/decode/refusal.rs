//! Why a message, or a reading of it, is not a row.

pub use fleetwright_api::dead_letter::DeadLetterReason as Reason;

/// The most characters of a detail. Enough for the names of a few fields with what was expected and found; a payload may be
/// hundreds of megabytes, and stands in the dead letter anyway.
const DETAIL_CHARACTERS: usize = 500;

/// What is wrong with a message: the reason, and what was expected and found.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Refusal {
    /// Why.
    pub reason: Reason,
    /// What was expected and what was found. Never longer than a few hundred characters, and free of U+0000, which PostgreSQL
    /// does not store.
    pub detail: String,
}

impl Refusal {
    /// A refusal; the detail is cut and cleaned where it must be.
    #[must_use]
    pub fn new(reason: Reason, detail: &str) -> Self {
        let detail =
            detail.chars().take(DETAIL_CHARACTERS).map(|character| if character == '\0' { '\u{fffd}' } else { character }).collect();
        Self { reason, detail }
    }

    /// Adds what else is wrong with the same message: one message is one dead letter. The first reason stays.
    pub fn join(&mut self, other: &Self) {
        *self = Self::new(self.reason, &format!("{}; {}: {}", self.detail, other.reason.name(), other.detail));
    }
}

/// The text, quoted and cut, for a detail.
#[must_use]
pub fn excerpt(text: &str) -> String {
    const CHARACTERS: usize = 40;
    let cut: String = text.chars().take(CHARACTERS).collect();
    if cut.len() < text.len() { format!("{cut:?}…") } else { format!("{cut:?}") }
}
