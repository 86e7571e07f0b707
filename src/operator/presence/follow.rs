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
use crate::api::name::{self, PRESENCE_PORT};
use crate::broker::credential::PresenceToken;
use crate::broker::log::wire::{Page, Query};
use crate::configuration::agent::TLS_AUTHORITIES;
use crate::operator::device::connection::CompactConnection;
use crate::operator::device::key::GatewayKey;
use crate::operator::device::secret::read_link;
use crate::operator::gateway::internal::trusted;
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

    /// There has been no update since this time (in seconds since 1970), so the earlier updates are outdated.
    Unknown(GatewayKey, i64),
}

/// What the operator needs to read from an agent.
struct AgentAccess {
    agent: AgentClient,
    token: PresenceToken,
}

/// The next page. Reads the access from the Secret of the operator's broker user if `access` is empty, and again after the agent rejected
/// the token or the connection failed, because the password or the authority of the agent's certificate may have changed.
async fn page(
    client: &Client,
    gateway: &GatewayKey,
    authority: &str,
    access: &mut Option<AgentAccess>,
    query: &Query,
) -> Result<Page, String> {
    let known = match access.take() {
        Some(known) => known,
        None => read_access(client, gateway).await?,
    };
    let answer = known.agent.page(authority, &known.token, query).await;
    if !matches!(answer, Err(AgentError::Unauthorized { .. } | AgentError::Reach { .. })) {
        *access = Some(known);
    }
    answer.map_err(|error| chain(&error))
}

async fn read_access(client: &Client, gateway: &GatewayKey) -> Result<AgentAccess, String> {
    let name = name::link_credentials(&gateway.name);
    let found = timeout(READ_TIMEOUT, read::<Secret>(client, &gateway.namespace, &name)).await;
    let found = found.map_err(|_| format!("the API server did not answer within {} s", READ_TIMEOUT.as_secs()))?;
    let secret = found.map_err(|error| chain(&error))?.ok_or_else(|| format!("Secret {name} does not exist yet"))?;
    let operator = read_link(&secret).map_err(|error| format!("failed to read Secret {name}: {error}"))?;
    let token = PresenceToken::of(&operator).next().ok_or_else(|| format!("Secret {name} has no password"))?;
    let authorities = trusted(&secret).ok_or_else(|| format!("Secret {name} has no key {TLS_AUTHORITIES} yet"))?;
    let agent = AgentClient::verified_by(&authorities).map_err(|error| format!("failed to read Secret {name}: {}", chain(&error)))?;
    Ok(AgentAccess { agent, token })
}

/// Follows an agent until dropped. Requests all clients again when `resync` is notified.
pub async fn follow(client: Client, gateway: GatewayKey, resync: Arc<Notify>, updates: mpsc::Sender<PresenceUpdate>) {
    let authority = format!("{}:{PRESENCE_PORT}", name::service_host(&name::agent_service(&gateway.name), &gateway.namespace));
    let mut query = Query::default();
    let mut access = None;
    let mut backoff = Backoff::new(INITIAL_RETRY_DELAY, MAX_RETRY_DELAY);
    let mut heard = (Instant::now(), Timestamp::now().as_second());
    let (mut silent, mut unknown) = (false, false);
    loop {
        sleep(PAGE_DELAY).await;
        let answer = tokio::select! {
            answer = page(&client, &gateway, &authority, &mut access, &query) => answer,
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
                    // The earlier updates are outdated: request all clients again.
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
