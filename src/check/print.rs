//! The result for a message as text: pure.

use std::fmt::Write;

use super::dry_run::{MessageResult, Row};
use crate::api::condition::Cause;
use crate::decode::Value;
use crate::sink::timescale::schema::Table;

/// Why the Pipeline is invalid.
pub fn cause(cause: &Cause) -> String {
    format!("the Pipeline is refused: {}: {}\n", cause.reason, clean(&cause.message))
}

/// The result for a message.
pub fn result(topic: &str, table: &Table, result: &MessageResult) -> String {
    let mut text = String::new();
    // Writing to a String cannot fail.
    let _ = match (result.rows.len(), &result.dead_letter) {
        (0, None) => writeln!(text, "{}: no row: it has no readings of devices", clean(topic)),
        (0, Some(_)) => writeln!(text, "{}: no row", clean(topic)),
        (1, _) => writeln!(text, "{}: 1 row of {}", clean(topic), table.name),
        (rows, _) => writeln!(text, "{}: {rows} rows of {}", clean(topic), table.name),
    };
    for row in &result.rows {
        let _ = write!(text, "\n{}", aligned(&lines(table, row)));
    }
    if let Some(cause) = &result.dead_letter {
        let _ = writeln!(text, "\n  refused: {}: {}", cause.reason.name(), clean(&cause.detail));
    }
    text.push('\n');
    text
}

/// Column, type, value and unit of each column.
fn lines(table: &Table, row: &Row) -> Vec<[String; 4]> {
    let time = format!("{}{}", row.time, if row.is_arrival_time { " (arrival)" } else { "" });
    let own = [time, format!("number of {}", clean(&row.device))];
    let values = own.into_iter().chain(row.tags.iter().map(|tag| format!("{tag:?}"))).chain(row.values.iter().map(format_value));
    let heading = ["COLUMN", "TYPE", "VALUE", "UNIT"].map(str::to_owned);
    let columns = table.columns.iter().zip(values).map(|(column, value)| {
        [column.name.clone(), column.type_.as_sql().to_owned(), value, clean(column.comment.as_deref().unwrap_or_default())]
    });
    std::iter::once(heading).chain(columns).collect()
}

fn format_value(value: &Value<'_>) -> String {
    match value {
        Value::Null => "NULL".to_owned(),
        Value::Float64(number) => number.to_string(),
        Value::Int64(number) => number.to_string(),
        Value::Boolean(truth) => truth.to_string(),
        Value::Text(text) => format!("{text:?}"),
        Value::Timestamp(time) => time.to_string(),
        Value::Json(text) => clean(text),
    }
}

fn aligned(lines: &[[String; 4]]) -> String {
    let width = |column: usize| lines.iter().map(|line| line[column].chars().count()).max().unwrap_or_default();
    let [name, type_, value] = [width(0), width(1), width(2)];
    let line = |line: &[String; 4]| {
        let text = format!("  {:name$}  {:type_$}  {:value$}  {}", line[0], line[1], line[2], line[3]);
        format!("{}\n", text.trim_end())
    };
    lines.iter().map(line).collect()
}

/// The text without control characters of terminals.
fn clean(text: &str) -> String {
    text.chars()
        .flat_map(|character| {
            let is_plain = !character.is_control();
            is_plain.then_some(character).into_iter().chain((!is_plain).then(|| character.escape_default()).into_iter().flatten())
        })
        .collect()
}
