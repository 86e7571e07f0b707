//! The dead letters of a batch: which are kept, their data for a binary COPY, and the counts of all of them.

use std::collections::{BTreeMap, BTreeSet};

use bytes::Bytes;
use tokio_postgres::Transaction;
use tokio_postgres::types::Type;

use super::Target;
use super::allowance::{Allowance, ROW_BYTES};
use super::statements::{count_dead_letters, read_kept_bytes};
use super::transaction::Written;
use crate::ingest::batch::Batch;
use crate::ingest::decode::rows::{HEADER, PIECE, TRAILER};

/// The columns: time, namespace, pipeline, gateway, topic, payload, reason, detail, partial.
const COLUMNS: u16 = 9;

/// What there was of each reason in one batch.
#[derive(Debug, Default, Eq, PartialEq)]
pub struct Counts(BTreeMap<&'static str, Count>);

#[derive(Debug, Default, Eq, PartialEq)]
struct Count {
    kept: i64,
    kept_bytes: i64,
    discarded: i64,
}

/// Says which dead letters of the batch are kept: `written.discarded` are those that are not.
///
/// Writers that do this at the same moment do not see one another, so that each may exceed the bound by one batch.
pub async fn choose(
    transaction: &Transaction<'_>,
    target: &Target,
    batch: &Batch,
    written: &mut Written,
) -> Result<Counts, tokio_postgres::Error> {
    let owner = [(&target.namespace as _, Type::TEXT), (&target.pipeline as _, Type::TEXT)];
    let rows = transaction.query_typed(&read_kept_bytes(), &owner).await?;
    let kept: Result<Vec<(&str, i64)>, _> = rows.iter().map(|row| Ok((row.try_get(0)?, row.try_get(1)?))).collect();
    let (counts, discarded) = judge(&mut Allowance::new(target.dead_letter_bytes_per_hour, kept?), batch, written);
    written.discarded = discarded;
    Ok(counts)
}

fn judge(allowance: &mut Allowance, batch: &Batch, written: &Written) -> (Counts, BTreeSet<u32>) {
    let (mut counts, mut discarded) = (Counts::default(), BTreeSet::new());
    for (number, refusal) in &written.dead_letters {
        let Some(message) = batch.message(*number) else { continue };
        let size = ROW_BYTES + message.topic.len() + message.payload.len() + refusal.detail.len();
        let count = counts.0.entry(refusal.reason.name()).or_default();
        if allowance.take(refusal.reason, size) {
            count.kept += 1;
            count.kept_bytes += i64::try_from(size).unwrap_or(i64::MAX);
        } else {
            count.discarded += 1;
            discarded.insert(*number);
        }
    }
    (counts, discarded)
}

/// Adds to the counts of this hour. The last statement of a transaction: until its commit others wait for these rows.
pub async fn count(transaction: &Transaction<'_>, target: &Target, gateway: &str, counts: &Counts) -> Result<(), tokio_postgres::Error> {
    // In the order of their names, so that two transactions that count the same do not deadlock.
    let reasons: Vec<&str> = counts.0.keys().copied().collect();
    let of = |column: fn(&Count) -> i64| counts.0.values().map(column).collect::<Vec<i64>>();
    let (kept, kept_bytes, discarded) = (of(|count| count.kept), of(|count| count.kept_bytes), of(|count| count.discarded));
    let values: [(&(dyn tokio_postgres::types::ToSql + Sync), Type); 7] = [
        (&target.namespace, Type::TEXT),
        (&target.pipeline, Type::TEXT),
        (&gateway, Type::TEXT),
        (&reasons, Type::TEXT_ARRAY),
        (&kept, Type::INT8_ARRAY),
        (&kept_bytes, Type::INT8_ARRAY),
        (&discarded, Type::INT8_ARRAY),
    ];
    transaction.execute_typed(&count_dead_letters(), &values).await.map(drop)
}

/// The data of those that are kept, in pieces; a payload is never cut, so that a piece may be as large as a message.
pub fn copy_data(target: &Target, gateway: &str, batch: &Batch, written: &Written) -> impl Iterator<Item = Bytes> {
    let partial = written.partial(batch);
    let mut letters = written.dead_letters.iter().filter(|(number, _)| !written.discarded.contains(number));
    let mut header = Some(HEADER);
    let mut ended = false;
    std::iter::from_fn(move || {
        if ended {
            return None;
        }
        let mut piece = header.take().unwrap_or_default().to_vec();
        while piece.len() < PIECE {
            let Some((number, refusal)) = letters.next() else {
                ended = true;
                piece.extend_from_slice(TRAILER);
                break;
            };
            let Some(message) = batch.message(*number) else { continue };
            piece.extend_from_slice(&COLUMNS.to_be_bytes());
            // PostgreSQL stores no U+0000, and MQTT lets none pass in a topic (MQTT 5.0, 1.5.4); a broker that does is no reason to stop.
            let topic = String::from_utf8_lossy(message.topic).replace('\0', "\u{fffd}");
            for column in [
                &message.arrival.0.to_be_bytes()[..],
                target.namespace.as_bytes(),
                target.pipeline.as_bytes(),
                gateway.as_bytes(),
                topic.as_bytes(),
                message.payload,
                refusal.reason.name().as_bytes(),
                refusal.detail.as_bytes(),
                &[u8::from(partial.contains(number))],
            ] {
                piece.extend_from_slice(&u32::try_from(column.len()).unwrap_or(u32::MAX).to_be_bytes());
                piece.extend_from_slice(column);
            }
        }
        Some(Bytes::from(piece))
    })
}
