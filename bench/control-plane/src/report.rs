//! Prints the aligned rows of the table.

use std::time::Duration;

/// A heading of the table.
pub fn heading(text: &str) {
    print(&format!("\n{text}"));
}

/// A row.
pub fn row(what: &str, value: &str) {
    print(&format!("  {what:<58} {value:>22}"));
}

/// A row with a duration for many devices, as time and rate.
pub fn rate_row(what: &str, time: Duration, devices: usize) {
    #[allow(clippy::cast_precision_loss, reason = "a count of devices")]
    let rate = devices as f64 / time.as_secs_f64();
    row(what, &format!("{:.1} s {rate:>8.0} /s", time.as_secs_f64()));
}

/// Rows with median, 99th percentile and maximum of the durations.
pub fn times(what: &str, mut times: Vec<Duration>) {
    times.sort_unstable();
    let at = |percent: usize| times.get((times.len() * percent / 100).min(times.len().saturating_sub(1))).copied().unwrap_or_default();
    let milliseconds = |time: Duration| time.as_secs_f64() * 1e3;
    row(
        &format!("{what}: p50 / p99 / most of {}", times.len()),
        &format!("{:.0} / {:.0} / {:.0} ms", milliseconds(at(50)), milliseconds(at(99)), milliseconds(at(100))),
    );
}

#[allow(clippy::print_stdout, reason = "a benchmark prints")]
fn print(line: &str) {
    println!("{line}");
}

/// Progress of long operations, printed separately from the table.
#[allow(clippy::print_stderr, reason = "a benchmark tells how far it is")]
pub fn progress(text: &str) {
    eprintln!("  … {text}");
}
