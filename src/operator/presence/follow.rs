//! Follows the agent of one Gateway page by page.

use std::sync::Arc;
use std::time::Duration;

use jiff::Timestamp;
use k8s_openapi::api::core::v1::Secret;
use kube::Client;
use tokio::sync::{Notify, mpsc};
use tokio::time::{Instant, sleep, timeout};
use tracing::{debug, info};

use super::agent::{AgentClient, AgentError};
use crate::api::name::{self, HTTP_PORT};
use crate::broker::credential::PresenceToken;
use crate::broker::log::wire::{Page, Query};
use crate::operator::device::connection::CompactConnection;
use crate::operator::device::key::GatewayKey;
use crate::operator::device::secret::read_link;
use crate::operator::kubernetes::apply::read;
use crate::runtime::backoff::Backoff;
use crate::runtime::error::chain;

/// Delay after a response: the changes within it come in one page, and an agent that responds without end does not keep the
/// operator busy.
const PAGE_DELAY: Duration = Duration::from_millis(50);

/// Delays after failures.
const INITIAL_RETRY_DELAY: Duration = Duration::from_millis(250);
const MAX_RETRY_DELAY: Duration = Duration::from_secs(10);

/// Maximum time to read the Secret with the password.
const READ_TIMEOUT: Duration = Duration::from_secs(10);

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

/// The next page. Reads the token from the Secret of the operator's broker user if `token` is empty, and again after the agent
/// rejected it, because that password may have changed.
async fn page(
    client: &Client,
    agents: &AgentClient,
    gateway: &GatewayKey,
    authority: &str,
    token: &mut Option<PresenceToken>,
    query: &Query,
) -> Result<Page, String> {
    let known = match token.take() {
        Some(known) => known,
        None => read_token(client, gateway).await?,
    };
    let answer = agents.page(authority, &known, query).await;
    if !matches!(answer, Err(AgentError::Unauthorized { .. })) {
        *token = Some(known);
    }
    answer.map_err(|error| chain(&error))
}

async fn read_token(client: &Client, gateway: &GatewayKey) -> Result<PresenceToken, String> {
    let name = name::link_credentials(&gateway.name);
    let found = timeout(READ_TIMEOUT, read::<Secret>(client, &gateway.namespace, &name)).await;
    let found = found.map_err(|_| format!("the API server did not answer within {} s", READ_TIMEOUT.as_secs()))?;
    let secret = found.map_err(|error| chain(&error))?.ok_or_else(|| format!("Secret {name} does not exist yet"))?;
    let operator = read_link(&secret).map_err(|error| format!("failed to read Secret {name}: {error}"))?;
    PresenceToken::of(&operator).next().ok_or_else(|| format!("Secret {name} has no password"))
}

/// Follows an agent until dropped. Requests all clients again when `resync` is notified.
pub async fn follow(client: Client, agents: AgentClient, gateway: GatewayKey, resync: Arc<Notify>, updates: mpsc::Sender<PresenceUpdate>) {
    let authority = format!("{}:{HTTP_PORT}", name::service_host(&name::agent_service(&gateway.name), &gateway.namespace));
    let mut query = Query::default();
    let mut token = None;
    let mut backoff = Backoff::new(INITIAL_RETRY_DELAY, MAX_RETRY_DELAY);
    let mut heard = (Instant::now(), Timestamp::now().as_second());
    let (mut silent, mut unknown) = (false, false);
    loop {
        sleep(PAGE_DELAY).await;
        let answer = tokio::select! {
            answer = page(&client, &agents, &gateway, &authority, &mut token, &query) => answer,
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
                debug!(gateway = %gateway.name, namespace = %gateway.namespace, error);
                backoff.wait().await;
                if heard.0.elapsed() >= UNKNOWN_AFTER && !unknown {
                    unknown = true;
                    // The earlier updates no longer count, so all must come again.
                    query = Query::default();
                    Some(PresenceUpdate::Unknown(gateway.clone(), heard.1))
                } else if heard.0.elapsed() >= UNREACHABLE_AFTER && !silent {
                    silent = true;
                    info!(gateway = %gateway.name, namespace = %gateway.namespace, error, "the agent does not respond");
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
