//! What an error of the database says about a batch: pure.

use tokio_postgres::error::SqlState;

/// What an error is about.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Fault {
    /// A value: the database accepts other rows.
    Data,
    /// Perhaps the batch: a smaller one may succeed, or one without the message that causes the error.
    Batch,
    /// The database, the table or the login: no message is the cause, and every batch would fail.
    Database,
}

/// What to do with a batch that failed.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Verdict {
    /// Write its halves as batches of their own.
    Split,
    /// Make its only message a dead letter.
    Reject,
    /// Write it again later.
    Retry,
}

/// How often a message must fail alone before it is a dead letter, if the error need not be about the message: a deadlock or a moment
/// without memory does not repeat.
pub const MIN_ATTEMPTS: u32 = 3;

/// Errors about the format of the data of a COPY, which every row would cause.
const FORMAT: [SqlState; 2] = [SqlState::INVALID_BINARY_REPRESENTATION, SqlState::BAD_COPY_FILE_FORMAT];

/// Errors of the classes that are about the database, although a batch can cause them: not enough memory for its locks, and a limit of the
/// configuration (<https://www.postgresql.org/docs/current/errcodes-appendix.html>); a statement that takes longer than its timeout.
const BATCH: [SqlState; 3] = [SqlState::OUT_OF_MEMORY, SqlState::CONFIGURATION_LIMIT_EXCEEDED, SqlState::QUERY_CANCELED];

/// Classes of errors about a value: cardinality, data exceptions, violated constraints, a view's check, limits of rows and columns, exceptions
/// of functions and triggers.
const DATA_CLASSES: [&str; 9] = ["21", "22", "23", "44", "54", "P0", "2F", "38", "39"];

/// Classes of errors about the database: connection, transaction state, authorization, names of the database and the schema, access and
/// definitions, resources, object state, operator intervention, system errors, configuration, foreign data.
const DATABASE_CLASSES: [&str; 20] =
    ["08", "0B", "25", "26", "28", "2B", "2D", "34", "3B", "3D", "3F", "42", "53", "55", "57", "58", "72", "F0", "HV", "0L"];

/// What an error with this code is about. Triggers may raise errors with codes of their own, which are about the row.
#[must_use]
pub fn classify(code: &SqlState) -> Fault {
    let class = code.code().get(..2).unwrap_or_default();
    if FORMAT.contains(code) {
        Fault::Database
    } else if BATCH.contains(code) {
        Fault::Batch
    } else if DATA_CLASSES.contains(&class) {
        Fault::Data
    } else if DATABASE_CLASSES.contains(&class) {
        Fault::Database
    } else if STANDARD_CLASSES.contains(&class) {
        Fault::Batch
    } else {
        Fault::Data
    }
}

/// The other classes of PostgreSQL: features that are not supported, deadlocks and serialization failures, internal errors and others.
const STANDARD_CLASSES: [&str; 16] = ["00", "01", "02", "03", "09", "0A", "0F", "0P", "0Z", "10", "20", "24", "27", "2E", "40", "XX"];

/// What to do with a batch of `messages` that failed for the `attempts`th time. `has_rows`: its messages are not all dead letters.
/// `others_succeed`: the database has stored other batches since it first refused the message, alone or in a larger batch.
#[must_use]
pub fn judge(fault: Fault, messages: usize, has_rows: bool, attempts: u32, others_succeed: bool) -> Verdict {
    match fault {
        Fault::Database => Verdict::Retry,
        Fault::Data | Fault::Batch if messages > 1 => Verdict::Split,
        _ if !has_rows => Verdict::Retry,
        Fault::Data => Verdict::Reject,
        Fault::Batch if attempts >= MIN_ATTEMPTS && others_succeed => Verdict::Reject,
        Fault::Batch => Verdict::Retry,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn codes_by_what_they_are_about() {
        for (expected, codes) in [
            (
                Fault::Data,
                // Null byte, numeric overflow, check, unique, index row too large, RAISE EXCEPTION, assertion, a trigger's own codes.
                &["22021", "22003", "23514", "23505", "44000", "54000", "P0001", "P0004", "38000", "T0001", "99999"][..],
            ),
            (
                Fault::Batch,
                // Memory or locks, statement timeout, deadlock, serialization, internal error, not supported.
                &["53200", "53400", "57014", "40P01", "40001", "XX000", "0A000"],
            ),
            (
                Fault::Database,
                // Disk full, too many connections, read-only, privileges, no table, no column, no function, shutdown, crash,
                // starting, lost connection, login, no database, lock not available, input or output, COPY format.
                &[
                    "53100", "53300", "25006", "42501", "42P01", "42703", "42883", "57P01", "57P02", "57P03", "08006", "28P01", "3D000",
                    "55P03", "58030", "22P03", "22P04",
                ],
            ),
        ] {
            for code in codes {
                assert_eq!(classify(&SqlState::from_code(code)), expected, "{code}");
            }
        }
    }

    #[test]
    fn a_message_is_rejected_only_for_its_own_fault() {
        for (fault, messages, has_rows, attempts, others_succeed, expected) in [
            (Fault::Data, 2, true, 1, false, Verdict::Split),
            (Fault::Data, 1, true, 1, false, Verdict::Reject),
            (Fault::Data, 1, false, 9, true, Verdict::Retry),
            (Fault::Batch, 2, true, 1, false, Verdict::Split),
            (Fault::Batch, 2, false, 1, false, Verdict::Split),
            (Fault::Batch, 1, true, MIN_ATTEMPTS, false, Verdict::Retry),
            (Fault::Batch, 1, true, MIN_ATTEMPTS - 1, true, Verdict::Retry),
            (Fault::Batch, 1, true, MIN_ATTEMPTS, true, Verdict::Reject),
            (Fault::Database, 2, true, 9, true, Verdict::Retry),
            (Fault::Database, 1, true, 9, true, Verdict::Retry),
        ] {
            let found = judge(fault, messages, has_rows, attempts, others_succeed);
            assert_eq!(found, expected, "{fault:?} {messages} {has_rows} {attempts} {others_succeed}");
        }
    }
}
