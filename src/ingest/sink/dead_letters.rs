//! Dead letters as the data of a binary COPY.

use bytes::Bytes;

use super::Target;
use super::transaction::Written;
use crate::ingest::batch::Batch;
use crate::ingest::batch::rows::{HEADER, PIECE, TRAILER};

/// The columns: time, namespace, pipeline, gateway, topic, payload, reason, detail, partial.
const COLUMNS: u16 = 9;

/// The data, in pieces; a payload is never cut, so that a piece may be as large as a message.
pub fn copy_data(target: &Target, gateway: &str, batch: &Batch, written: &Written) -> impl Iterator<Item = Bytes> {
    let partial = written.partial(batch);
    let mut letters = written.dead_letters.iter();
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
