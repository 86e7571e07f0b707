//! The readiness checks of a process by name, each with the reason while it does not hold.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// The named checks of a process. It is ready when there is at least one and all hold. Clones share the checks.
#[derive(Clone, Debug, Default)]
pub struct Readiness {
    checks: Arc<Mutex<BTreeMap<String, Result<(), String>>>>,
}

impl Readiness {
    /// Checks that do not hold yet, for the reason `starting`.
    #[must_use]
    pub fn awaiting<'a>(names: impl IntoIterator<Item = &'a str>) -> Self {
        let readiness = Self::default();
        for name in names {
            readiness.fails(name, "starting");
        }
        readiness
    }

    /// The check holds.
    pub fn holds(&self, name: &str) {
        self.lock().insert(name.to_owned(), Ok(()));
    }

    /// The check does not hold, for this reason.
    pub fn fails(&self, name: &str, reason: impl Into<String>) {
        self.lock().insert(name.to_owned(), Err(reason.into()));
    }

    /// The check is no longer of interest.
    pub fn remove(&self, name: &str) {
        self.lock().remove(name);
    }

    /// A line for each check that does not hold; `Ok` when the process is ready.
    ///
    /// # Errors
    /// The lines.
    pub fn verdict(&self) -> Result<(), Vec<String>> {
        let checks = self.lock();
        let failures: Vec<String> =
            checks.iter().filter_map(|(name, check)| check.as_ref().err().map(|reason| format!("{name}: {reason}"))).collect();
        match (checks.is_empty(), failures.is_empty()) {
            (true, _) => Err(vec!["starting".to_owned()]),
            (false, true) => Ok(()),
            (false, false) => Err(failures),
        }
    }

    fn lock(&self) -> MutexGuard<'_, BTreeMap<String, Result<(), String>>> {
        // Every update is one insertion, so that a panic elsewhere leaves the map whole.
        self.checks.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ready_when_every_check_holds() {
        let readiness = Readiness::awaiting(["session", "table"]);
        readiness.holds("session");
        assert_eq!(readiness.verdict(), Err(vec!["table: starting".to_owned()]));
        readiness.holds("table");
        assert_eq!(readiness.verdict(), Ok(()));
        readiness.fails("session", "broker is away");
        assert!(readiness.verdict().is_err());
        readiness.remove("session");
        assert_eq!(readiness.verdict(), Ok(()));
    }

    #[test]
    fn not_ready_before_there_is_a_check() {
        assert!(Readiness::default().verdict().is_err());
    }
}
