//! One transaction of a replay: decodes some dead letters, stores them, and deletes them or records the new refusal.

use std::collections::HashMap;
use std::sync::Arc;

use bytes::{Bytes, BytesMut};
use tokio_postgres::types::Type;
use tokio_postgres::{Client, Row, Transaction};

use super::filter::FilterCondition;
use super::outcome::ReplayOutcome;
use crate::api::topic::TopicPattern;
use crate::decode::Decoder;
use crate::decode::dead_letter::DeadLetterCause;
use crate::decode::stream::Stream;
use crate::ingest::processor::{InboundMessage, Processor};
use crate::mqtt::frame::Publish;
use crate::mqtt::window::Window;
use crate::sink::batch::{Batch, RowOptions};
use crate::sink::timescale::copy::Timestamptz;
use crate::sink::timescale::statements::Statements;
use crate::sink::timescale::transaction::stage;
use crate::sink::written::Written;
use crate::state::owner::{Owner, Parameter};
use crate::state::registry::follow::Devices;
use crate::state::replay_progress::{ReplayCounts, advance};
use crate::state::system::SCHEMA;

/// The maximum number of dead letters of a transaction. The cost of the commit is small, and the transaction takes less than a second.
const MAX_DEAD_LETTERS: i64 = 1_000;

/// The maximum size of their payloads, in bytes. A single message may be larger.
const MAX_BYTES: i64 = 4 * 1024 * 1024;

/// Replays dead letters.
pub struct Replayer {
    /// A connection with the staging table.
    pub client: Client,
    /// The statements of the Pipeline's table.
    pub statements: Statements,
    /// The Pipeline's topic.
    pub topic: Arc<TopicPattern>,
    /// The Pipeline's decoder.
    pub decoder: Arc<Decoder>,
    /// The rows to make.
    pub rows: RowOptions,
    /// The devices, as they were at the start.
    pub devices: Devices,
    /// The dead letters to replay.
    pub condition: FilterCondition,
    /// Whether everything is rolled back.
    pub dry_run: bool,
    /// The token of a Pipeline's request. Each transaction records its progress.
    pub token: Option<String>,
    /// The processors of the messages, by gateway.
    pub processors: HashMap<String, Processor>,
}
/// Dead letters of a transaction.
#[derive(Default)]
struct DeadLetterPage {
    ids: Vec<i64>,
    batch: Batch,
    partial: u64,
}

impl Replayer {
    /// The number of dead letters, and the highest identifier.
    pub async fn measure(&self) -> Result<(u64, i64), tokio_postgres::Error> {
        let query = format!("SELECT count(*), coalesce(max(id), 0) FROM {SCHEMA}.dead_letter WHERE {}", FilterCondition::SQL);
        let row = self.client.query_typed_one(&query, &self.condition.parameters()).await?;
        Ok((row.try_get::<_, i64>(0)?.unsigned_abs(), row.try_get(1)?))
    }

    /// Replays dead letters with an identifier above `after` and up to `last`, as many as one transaction takes. Returns the last
    /// identifier; `None` if there is none.
    ///
    /// Dead letters that another process replays at the same time are skipped; the replay of a request waits for them. If another process
    /// has continued the same request, this transaction is rolled back, and the record of the request has the progress.
    pub async fn next(&mut self, after: i64, last: i64) -> Result<Option<(i64, ReplayOutcome)>, tokio_postgres::Error> {
        let mut ids = self.choose(after, last).await?;
        if ids.is_empty() {
            return Ok(None);
        }
        let mut transaction = self.client.transaction().await?;
        let mut parameters = self.condition.parameters();
        parameters.push((&ids, Type::INT8_ARRAY));
        let lock = format!(
            "SELECT id, time, gateway, topic, payload, partial FROM {SCHEMA}.dead_letter WHERE {} AND id = ANY($10) ORDER BY id
             FOR UPDATE {}",
            FilterCondition::SQL,
            // A request counts each dead letter, and the transaction of a killed worker may hold its locks for a moment.
            if self.token.is_some() { "" } else { "SKIP LOCKED" }
        );
        let rows = transaction.query_typed(&lock, &parameters).await?;
        let (mut page, options) = (DeadLetterPage::default(), self.rows);
        for row in &rows {
            let gateway: String = row.try_get("gateway")?;
            let stream = || Stream::new(self.topic.clone(), self.decoder.clone());
            let processor =
                self.processors.entry(gateway.clone()).or_insert_with(|| Processor { gateway, stream: stream(), rows: options });
            page.take(row, processor, &self.devices)?;
            if page.batch.is_full() {
                // The next page begins after it.
                let end: i64 = row.try_get("id")?;
                ids.retain(|id| *id <= end);
                break;
            }
        }
        let Some(&end) = ids.last() else { return Ok(None) };
        page.batch.arrange(self.statements.on_conflict);
        let mut written = Written { dead_letters: std::mem::take(&mut page.batch.dead_letters), ..Written::default() };
        stage(&mut transaction, &self.statements, &page.batch.rows, &mut written).await?;
        let mut replayed = settle(&transaction, &self.condition, &page, &written).await?;
        replayed.counts.letters = ids.len() as u64;
        let is_ours = match &self.token {
            Some(token) => advance(&transaction, self.condition.owner(), token, [after, end], &replayed.counts).await?,
            None => true,
        };
        if self.dry_run || !is_ours {
            transaction.rollback().await?;
        } else {
            transaction.commit().await?;
        }
        Ok(Some((end, replayed)))
    }

    async fn choose(&self, after: i64, last: i64) -> Result<Vec<i64>, tokio_postgres::Error> {
        let query = format!(
            "SELECT id FROM (
                SELECT id, sum(length) OVER (ORDER BY id) - length AS before FROM (
                    SELECT id, octet_length(payload) AS length FROM {SCHEMA}.dead_letter
                    WHERE {} AND id > $10 AND id <= $11 ORDER BY id LIMIT {MAX_DEAD_LETTERS}
                ) page
             ) measured WHERE before < {MAX_BYTES} ORDER BY id",
            FilterCondition::SQL
        );
        let mut parameters = self.condition.parameters();
        parameters.extend([(&after as &(dyn tokio_postgres::types::ToSql + Sync), Type::INT8), (&last, Type::INT8)]);
        self.client.query_typed(&query, &parameters).await?.iter().map(|row| row.try_get(0)).collect()
    }
}

impl DeadLetterPage {
    fn take(&mut self, row: &Row, processor: &mut Processor, devices: &Devices) -> Result<(), tokio_postgres::Error> {
        let is_partial: bool = row.try_get("partial")?;
        if is_partial && processor.stream.takes_arrival_time() {
            self.partial += 1;
            return Ok(());
        }
        let (topic, payload): (&str, &[u8]) = (row.try_get("topic")?, row.try_get("payload")?);
        let mut block = BytesMut::with_capacity(topic.len() + payload.len());
        block.extend_from_slice(topic.as_bytes());
        block.extend_from_slice(payload);
        let arrival = row.try_get::<_, Timestamptz>("time")?.0;
        let message = InboundMessage {
            publish: Publish { packet_id: 0, duplicate: false, topic: 0..topic.len(), payload: topic.len()..block.len() },
            block: block.freeze(),
            // A dead letter has no acknowledgement.
            place: Window::default().arrive(0),
            arrival,
            is_observed: false,
        };
        // Each dead letter keeps its time of arrival.
        processor.stream.forget_arrivals();
        self.batch.add_block(Bytes::clone(&message.block), arrival);
        // All devices are loaded, so no lookup is pending.
        if processor.process(&message, devices, &mut self.batch).is_ok() {
            self.ids.push(row.try_get("id")?);
        }
        Ok(())
    }
}

/// Deletes the stored dead letters, and records the new refusals of the others.
async fn settle(
    transaction: &Transaction<'_>,
    condition: &FilterCondition,
    page: &DeadLetterPage,
    written: &Written,
) -> Result<ReplayOutcome, tokio_postgres::Error> {
    let counts = ReplayCounts { partial: page.partial, ..ReplayCounts::default() };
    let mut replayed = ReplayOutcome { counts, rows: written.rows, ..ReplayOutcome::default() };
    let (mut stored, mut refused) = (Vec::new(), Refused::default());
    let partial = written.partial(&page.batch);
    for (number, id) in (0_u32..).zip(&page.ids) {
        match written.dead_letters.get(&number) {
            None => stored.push(*id),
            Some(cause) => {
                refused.add(*id, cause, partial.contains(&number));
                replayed.reasons.entry(cause.reason.name()).or_insert_with(|| (0, cause.detail.clone())).0 += 1;
            }
        }
    }
    let [cluster, namespace, pipeline] = condition.owner().parameters();
    let delete = format!("DELETE FROM {SCHEMA}.dead_letter WHERE {} AND id = ANY($4)", Owner::CONDITION);
    let of_stored: [Parameter<'_>; 4] = [cluster.clone(), namespace.clone(), pipeline.clone(), (&stored, Type::INT8_ARRAY)];
    transaction.execute_typed(&delete, &of_stored).await?;
    let update = format!(
        "UPDATE {SCHEMA}.dead_letter SET reason = now.reason, detail = now.detail, partial = dead_letter.partial OR now.partial
         FROM unnest($4, $5, $6, $7) AS now (id, reason, detail, partial)
         WHERE {} AND dead_letter.id = now.id AND (dead_letter.reason, dead_letter.detail, dead_letter.partial)
            IS DISTINCT FROM (now.reason, now.detail, dead_letter.partial OR now.partial)",
        Owner::CONDITION
    );
    transaction
        .execute_typed(
            &update,
            &[
                cluster,
                namespace,
                pipeline,
                (&refused.ids, Type::INT8_ARRAY),
                (&refused.reasons, Type::TEXT_ARRAY),
                (&refused.details, Type::TEXT_ARRAY),
                (&refused.partial, Type::BOOL_ARRAY),
            ],
        )
        .await?;
    let (stored, refused) = (stored.len() as u64, refused.ids.len() as u64);
    replayed.counts = ReplayCounts { letters: 0, stored, refused, partial: page.partial };
    Ok(replayed)
}

/// The messages that are refused again, as columns.
#[derive(Default)]
struct Refused<'a> {
    ids: Vec<i64>,
    reasons: Vec<&'static str>,
    details: Vec<&'a str>,
    partial: Vec<bool>,
}

impl<'a> Refused<'a> {
    fn add(&mut self, id: i64, cause: &'a DeadLetterCause, partial: bool) {
        self.ids.push(id);
        self.reasons.push(cause.reason.name());
        self.details.push(&cause.detail);
        self.partial.push(partial);
    }
}
