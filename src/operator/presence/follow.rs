//! Follows the agent of one Gateway, page by page.

use std::sync::Arc;
use std::time::Duration;

use jiff::Timestamp;
use tokio::sync::{Notify, mpsc};
use tokio::time::{Instant, sleep};
use tracing::{debug, info};

use super::agent::AgentClient;
use crate::api::name::{self, HTTP_PORT};
use crate::broker::log::wire::{Page, Query};
use crate::operator::device::connection::CompactConnection;
use crate::operator::device::key::GatewayKey;
use crate::runtime::error::chain;

/// The pause after an answer: what changes in it comes in one page, and an agent that answers all the time, whatever its
/// reason, does not keep the operator busy.
const PAGE_PAUSE: Duration = Duration::from_millis(50);

/// The pauses after a failure: each twice the one before, and half of it by chance.
const FIRST_PAUSE: Duration = Duration::from_millis(250);
const LONGEST_PAUSE: Duration = Duration::from_secs(10);

/// Without an answer for this long it is not known any more how many devices are connected: a pod that is replaced is back
/// before.
const UNREACHABLE_AFTER: Duration = Duration::from_mins(1);

/// And after this long the devices' status says so too: that is a write for each of them, and another when the agent is back.
const UNKNOWN_AFTER: Duration = Duration::from_mins(5);

/// What is told of a Gateway's clients.
#[derive(Debug)]
pub enum PresenceUpdate {
    /// What its agent says.
    Page(GatewayKey, Box<Page>),

    /// What the devices of an external broker say of themselves.
    Heard {
        /// The Gateway.
        gateway: GatewayKey,
        /// Whether that is all there is: of the others nothing is known.
        all: bool,
        /// The devices.
        devices: Vec<(Arc<str>, CompactConnection)>,
    },

    /// Nothing has been heard for a while.
    Silent(GatewayKey),

    /// Nothing has been heard for so long (since then, in seconds since 1970) that what was heard is worth nothing.
    Unknown(GatewayKey, i64),
}

/// Follows until dropped. Asks for all clients anew when `anew` is notified.
pub async fn follow(agents: AgentClient, gateway: GatewayKey, resync: Arc<Notify>, updates: mpsc::Sender<PresenceUpdate>) {
    let authority = format!("{}:{HTTP_PORT}", name::service_host(&name::agent_service(&gateway.name), &gateway.namespace));
    let mut query = Query::default();
    let mut pause = FIRST_PAUSE;
    let mut heard = (Instant::now(), Timestamp::now().as_second());
    let (mut silent, mut unknown) = (false, false);
    loop {
        sleep(PAGE_PAUSE).await;
        let answer = tokio::select! {
            answer = agents.page(&authority, &query) => answer,
            () = resync.notified() => {
                query = Query::default();
                continue;
            }
        };
        let told = match answer {
            Ok(page) => {
                if silent {
                    info!(gateway = %gateway.name, namespace = %gateway.namespace, "the agent answers again");
                }
                pause = FIRST_PAUSE;
                heard = (Instant::now(), Timestamp::now().as_second());
                (silent, unknown) = (false, false);
                query = Query { epoch: page.epoch.clone(), after: page.next };
                Some(PresenceUpdate::Page(gateway.clone(), Box::new(page)))
            }
            Err(error) => {
                debug!(gateway = %gateway.name, namespace = %gateway.namespace, "{}", chain(&error));
                sleep(pause / 2 + (pause / 2).mul_f64(rand::random())).await;
                pause = (pause * 2).min(LONGEST_PAUSE);
                if heard.0.elapsed() >= UNKNOWN_AFTER && !unknown {
                    unknown = true;
                    // What was heard is given up, so that it has to be heard again.
                    query = Query::default();
                    Some(PresenceUpdate::Unknown(gateway.clone(), heard.1))
                } else if heard.0.elapsed() >= UNREACHABLE_AFTER && !silent {
                    silent = true;
                    info!(gateway = %gateway.name, namespace = %gateway.namespace, error = chain(&error), "the agent does not answer");
                    Some(PresenceUpdate::Silent(gateway.clone()))
                } else {
                    None
                }
            }
        };
        if let Some(told) = told
            && updates.send(told).await.is_err()
        {
            return;
        }
    }
}
