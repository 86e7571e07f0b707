//! Follows the agent of one Gateway page by page.

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
use crate::runtime::backoff::Backoff;
use crate::runtime::error::chain;

/// Delay after a response: the changes within it come in one page, and an agent that responds without end does not keep the
/// operator busy.
const PAGE_DELAY: Duration = Duration::from_millis(50);

/// Delays after failures.
const INITIAL_RETRY_DELAY: Duration = Duration::from_millis(250);
const MAX_RETRY_DELAY: Duration = Duration::from_secs(10);

/// After this long without a response, the number of connected devices is unknown. A pod that is replaced is back sooner.
const UNREACHABLE_AFTER: Duration = Duration::from_mins(1);

/// After this long the status of each device is unknown: one write for each, and another when the agent is back.
const UNKNOWN_AFTER: Duration = Duration::from_mins(5);

/// An update of the connection states of a Gateway's clients.
#[derive(Debug)]
pub enum PresenceUpdate {
    /// A page of the Gateway's agent.
    Page(GatewayKey, Box<Page>),

    /// Messages of the devices of an external broker.
    Heard {
        /// The Gateway.
        gateway: GatewayKey,
        /// Whether this is the complete list: nothing is known of other devices.
        all: bool,
        /// The devices.
        devices: Vec<(Arc<str>, CompactConnection)>,
    },

    /// There has been no update for some time.
    Silent(GatewayKey),

    /// There has been no update for so long (since this time, in seconds since 1970) that the earlier ones no longer count.
    Unknown(GatewayKey, i64),
}

/// Follows an agent until dropped. Requests all clients again when `resync` is notified.
pub async fn follow(agents: AgentClient, gateway: GatewayKey, resync: Arc<Notify>, updates: mpsc::Sender<PresenceUpdate>) {
    let authority = format!("{}:{HTTP_PORT}", name::service_host(&name::agent_service(&gateway.name), &gateway.namespace));
    let mut query = Query::default();
    let mut backoff = Backoff::new(INITIAL_RETRY_DELAY, MAX_RETRY_DELAY);
    let mut heard = (Instant::now(), Timestamp::now().as_second());
    let (mut silent, mut unknown) = (false, false);
    loop {
        sleep(PAGE_DELAY).await;
        let answer = tokio::select! {
            answer = agents.page(&authority, &query) => answer,
            () = resync.notified() => {
                query = Query::default();
                continue;
            }
        };
        let update = match answer {
            Ok(page) => {
                if silent {
                    info!(gateway = %gateway.name, namespace = %gateway.namespace, "the agent responds again");
                }
                backoff.reset();
                heard = (Instant::now(), Timestamp::now().as_second());
                (silent, unknown) = (false, false);
                query = Query { epoch: page.epoch.clone(), after: page.next };
                Some(PresenceUpdate::Page(gateway.clone(), Box::new(page)))
            }
            Err(error) => {
                debug!(gateway = %gateway.name, namespace = %gateway.namespace, "{}", chain(&error));
                backoff.wait().await;
                if heard.0.elapsed() >= UNKNOWN_AFTER && !unknown {
                    unknown = true;
                    // The earlier updates no longer count, so all must come again.
                    query = Query::default();
                    Some(PresenceUpdate::Unknown(gateway.clone(), heard.1))
                } else if heard.0.elapsed() >= UNREACHABLE_AFTER && !silent {
                    silent = true;
                    info!(gateway = %gateway.name, namespace = %gateway.namespace, error = chain(&error), "the agent does not respond");
                    Some(PresenceUpdate::Silent(gateway.clone()))
                } else {
                    None
                }
            }
        };
        if let Some(update) = update
            && updates.send(update).await.is_err()
        {
            return;
        }
    }
}
