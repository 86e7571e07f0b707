//! Waits for a condition with a deadline. A failure includes the last reason.

use std::fmt::Display;
use std::time::{Duration, Instant};

use anyhow::{Result, anyhow};

/// Interval between attempts: short compared with the awaited changes, long compared with the cost of an attempt.
const INTERVAL: Duration = Duration::from_millis(100);

/// Maximum time of one attempt: it may hang, for example when the API server is stopped.
const LOOK: Duration = Duration::from_secs(20);

/// Repeats `look` until it succeeds, and returns its result.
///
/// # Errors
/// Fails after `limit` with `what` and the error of the last attempt.
pub async fn until<T>(limit: Duration, what: impl Display, mut look: impl AsyncFnMut() -> Result<T>) -> Result<T> {
    let started = Instant::now();
    loop {
        let failure = match tokio::time::timeout(LOOK, look()).await {
            Ok(Ok(found)) => return Ok(found),
            Ok(Err(failure)) => failure,
            Err(_) => anyhow!("the last attempt did not end within {} s", LOOK.as_secs()),
        };
        if started.elapsed() >= limit {
            return Err(failure.context(format!("not within {} s: {what}", limit.as_secs())));
        }
        tokio::time::sleep(INTERVAL).await;
    }
}

/// A duration in seconds, for deadlines.
#[must_use]
pub const fn seconds(number: u64) -> Duration {
    Duration::from_secs(number)
}
