//! Waiting for something to become true, with a deadline and the reason why it did not.

use std::fmt::Display;
use std::time::{Duration, Instant};

use anyhow::{Result, anyhow};

/// How often is looked. Short against what is waited for, long against what a look costs.
const INTERVAL: Duration = Duration::from_millis(100);

/// How long a single look may take: it may hang, for instance on an API server that was stopped.
const LOOK: Duration = Duration::from_secs(20);

/// Looks until `look` succeeds, and returns what it found.
///
/// # Errors
/// After `limit`: what was waited for, and why the last look failed.
pub async fn until<T>(limit: Duration, what: impl Display, mut look: impl AsyncFnMut() -> Result<T>) -> Result<T> {
    let started = Instant::now();
    loop {
        let failure = match tokio::time::timeout(LOOK, look()).await {
            Ok(Ok(found)) => return Ok(found),
            Ok(Err(failure)) => failure,
            Err(_) => anyhow!("the last look did not end within {} s", LOOK.as_secs()),
        };
        if started.elapsed() >= limit {
            return Err(failure.context(format!("not within {} s: {what}", limit.as_secs())));
        }
        tokio::time::sleep(INTERVAL).await;
    }
}

/// Seconds, for deadlines.
#[must_use]
pub const fn seconds(number: u64) -> Duration {
    Duration::from_secs(number)
}
