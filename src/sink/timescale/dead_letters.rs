//! The dead letters of a batch: which are kept, their data for a binary COPY, and the counts of all of them.

use std::collections::{BTreeMap, BTreeSet};

use bytes::Bytes;
use fleetwright_copy::{HEADER, PIECE_BYTES, TRAILER, encode_time};
use tokio_postgres::Transaction;
use tokio_postgres::types::Type;

use super::dead_letter_quota::{DeadLetterQuota, ROW_BYTES};
use super::target::Target;
use crate::sink::batch::Batch;
use crate::sink::written::Written;
use crate::state::owner::{Owner, Parameter};
use crate::state::system::SCHEMA;

/// The columns: cluster, time, namespace, pipeline, gateway, topic, payload, reason, detail, partial.
const COLUMNS: u16 = 10;

/// The dead letters of one batch, by reason.
#[derive(Debug, Default, Eq, PartialEq)]
pub struct Counts(BTreeMap<&'static str, Count>);

#[derive(Debug, Default, Eq, PartialEq)]
struct Count {
    kept: i64,
    kept_bytes: i64,
    discarded: i64,
}

/// Decides which dead letters of the batch are kept, and sets `written.discarded` to the others.
///
/// Concurrent writers do not see the rows of one another, so that each may exceed the quota by one batch.
pub async fn choose(
    transaction: &Transaction<'_>,
    target: &Target,
    batch: &Batch,
    written: &mut Written,
) -> Result<Counts, tokio_postgres::Error> {
    // The hour of the database's clock, which all workers share.
    let statement = format!(
        "SELECT reason, sum(kept_bytes)::bigint FROM {SCHEMA}.dead_letter_count
         WHERE {} AND hour = date_trunc('hour', now(), 'UTC') GROUP BY reason",
        Owner::CONDITION
    );
    let rows = transaction.query_typed(&statement, &target.owner.parameters()).await?;
    let kept: Result<Vec<(&str, i64)>, _> = rows.iter().map(|row| Ok((row.try_get(0)?, row.try_get(1)?))).collect();
    let (counts, discarded) = classify(&mut DeadLetterQuota::new(target.dead_letter_bytes_per_hour, kept?), batch, written);
    written.discarded = discarded;
    Ok(counts)
}

fn classify(quota: &mut DeadLetterQuota, batch: &Batch, written: &Written) -> (Counts, BTreeSet<u32>) {
    let (mut counts, mut discarded) = (Counts::default(), BTreeSet::new());
    for (number, cause) in &written.dead_letters {
        let Some(message) = batch.message(*number) else { continue };
        let size = ROW_BYTES + message.topic.len() + message.payload.len() + cause.detail.len();
        let count = counts.0.entry(cause.reason.name()).or_default();
        if quota.accept(cause.reason, size) {
            count.kept += 1;
            count.kept_bytes += i64::try_from(size).unwrap_or(i64::MAX);
        } else {
            count.discarded += 1;
            discarded.insert(*number);
        }
    }
    (counts, discarded)
}

/// Adds to the counts of this hour. Must be the last statement of a transaction: other transactions wait for these rows until its commit.
pub async fn count(transaction: &Transaction<'_>, target: &Target, gateway: &str, counts: &Counts) -> Result<(), tokio_postgres::Error> {
    // In the order of their names, so that two transactions with the same reasons do not deadlock.
    let reasons: Vec<&str> = counts.0.keys().copied().collect();
    let of = |column: fn(&Count) -> i64| counts.0.values().map(column).collect::<Vec<i64>>();
    let (kept, kept_bytes, discarded) = (of(|count| count.kept), of(|count| count.kept_bytes), of(|count| count.discarded));
    let [cluster, namespace, pipeline] = target.owner.parameters();
    let values: [Parameter<'_>; 8] = [
        cluster,
        namespace,
        pipeline,
        (&gateway, Type::TEXT),
        (&reasons, Type::TEXT_ARRAY),
        (&kept, Type::INT8_ARRAY),
        (&kept_bytes, Type::INT8_ARRAY),
        (&discarded, Type::INT8_ARRAY),
    ];
    let statement = format!(
        "INSERT INTO {SCHEMA}.dead_letter_count AS counted (hour, cluster, namespace, pipeline, gateway, reason, kept, kept_bytes, discarded)
         SELECT date_trunc('hour', now(), 'UTC'), $1, $2, $3, $4, new.*
         FROM unnest($5, $6, $7, $8) AS new (reason, kept, kept_bytes, discarded) ORDER BY reason
         ON CONFLICT (cluster, namespace, pipeline, hour, gateway, reason) DO UPDATE SET kept = counted.kept + excluded.kept,
            kept_bytes = counted.kept_bytes + excluded.kept_bytes, discarded = counted.discarded + excluded.discarded"
    );
    transaction.execute_typed(&statement, &values).await.map(drop)
}

/// The COPY data of the dead letters that are kept, in pieces. A payload is never cut, so that a piece may be as large as a message.
pub fn copy_data(target: &Target, gateway: &str, batch: &Batch, written: &Written) -> impl Iterator<Item = Bytes> {
    let partial = written.partial(batch);
    let mut dead_letters = written.dead_letters.iter().filter(|(number, _)| !written.discarded.contains(number));
    let mut header = Some(HEADER);
    let mut ended = false;
    std::iter::from_fn(move || {
        if ended {
            return None;
        }
        let mut piece = header.take().unwrap_or_default().to_vec();
        while piece.len() < PIECE_BYTES {
            let Some((number, cause)) = dead_letters.next() else {
                ended = true;
                piece.extend_from_slice(TRAILER);
                break;
            };
            let Some(message) = batch.message(*number) else { continue };
            piece.extend_from_slice(&COLUMNS.to_be_bytes());
            // PostgreSQL cannot store U+0000. MQTT forbids it in a topic (MQTT 5.0, 1.5.4), but a broker may not check that.
            let topic = String::from_utf8_lossy(message.topic).replace('\0', "\u{fffd}");
            for column in [
                target.owner.cluster.as_bytes(),
                &encode_time(message.arrival)[..],
                target.owner.namespace.as_bytes(),
                target.owner.pipeline.as_bytes(),
                gateway.as_bytes(),
                topic.as_bytes(),
                message.payload,
                cause.reason.name().as_bytes(),
                cause.detail.as_bytes(),
                &[u8::from(partial.contains(number))],
            ] {
                piece.extend_from_slice(&u32::try_from(column.len()).unwrap_or(u32::MAX).to_be_bytes());
                piece.extend_from_slice(column);
            }
        }
        Some(Bytes::from(piece))
    })
}
