//! Follows the agent of one Gateway, page by page.

use std::sync::Arc;
use std::time::Duration;

use jiff::Timestamp;
use k8s_openapi::api::core::v1::Secret;
use kube::Client;
use tokio::sync::{Notify, mpsc};
use tokio::time::{Instant, sleep, timeout};
use tracing::{debug, info};

use super::agent::{Agents, AskError};
use crate::api::name::{self, HTTP_PORT};
use crate::broker::credential::PresenceToken;
use crate::broker::log::wire::{Page, Query};
use crate::operator::device::connection::Connection;
use crate::operator::device::key::GatewayKey;
use crate::operator::device::secret::read_link;
use crate::operator::kubernetes::apply::read;
use crate::runtime::error::chain;

/// The pause after an answer: what changes in it comes in one page, and an agent that answers all the time, whatever its
/// reason, does not keep the operator busy.
const PAGE_PAUSE: Duration = Duration::from_millis(50);

/// The pauses after a failure: each twice the one before, and half of it by chance.
const FIRST_PAUSE: Duration = Duration::from_millis(250);
const LONGEST_PAUSE: Duration = Duration::from_secs(10);

/// Maximum time to read the Secret with the password.
const READ_TIMEOUT: Duration = Duration::from_secs(10);

/// Without an answer for this long it is not known any more how many devices are connected: a pod that is replaced is back
/// before.
const UNREACHABLE: Duration = Duration::from_mins(1);

/// And after this long the devices' status says so too: that is a write for each of them, and another when the agent is back.
const UNKNOWN: Duration = Duration::from_mins(5);

/// What is told of a Gateway's clients.
#[derive(Debug)]
pub enum News {
    /// What its agent says.
    Page(GatewayKey, Box<Page>),

    /// What the devices of an external broker say of themselves.
    Heard {
        /// The Gateway.
        gateway: GatewayKey,
        /// Whether that is all there is: of the others nothing is known.
        all: bool,
        /// The devices.
        devices: Vec<(Arc<str>, Connection)>,
    },

    /// Nothing has been heard for a while.
    Silent(GatewayKey),

    /// Nothing has been heard for so long (since then, in seconds since 1970) that what was heard is worth nothing.
    Unknown(GatewayKey, i64),
}

/// The next page. Reads the token from the Secret of the operator's broker user where `token` has none, and again after a refusal:
/// that password may have changed.
async fn page(
    client: &Client,
    agents: &Agents,
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
    if !matches!(answer, Err(AskError::Unauthorized { .. })) {
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

/// Follows until dropped. Asks for all clients anew when `anew` is notified.
pub async fn follow(client: Client, agents: Agents, gateway: GatewayKey, anew: Arc<Notify>, news: mpsc::Sender<News>) {
    let authority = format!("{}:{HTTP_PORT}", name::service_host(&name::agent_service(&gateway.name), &gateway.namespace));
    let mut query = Query::default();
    let mut token = None;
    let mut pause = FIRST_PAUSE;
    let mut heard = (Instant::now(), Timestamp::now().as_second());
    let (mut silent, mut unknown) = (false, false);
    loop {
        sleep(PAGE_PAUSE).await;
        let answer = tokio::select! {
            answer = page(&client, &agents, &gateway, &authority, &mut token, &query) => answer,
            () = anew.notified() => {
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
                Some(News::Page(gateway.clone(), Box::new(page)))
            }
            Err(error) => {
                debug!(gateway = %gateway.name, namespace = %gateway.namespace, error);
                sleep(pause / 2 + (pause / 2).mul_f64(rand::random())).await;
                pause = (pause * 2).min(LONGEST_PAUSE);
                if heard.0.elapsed() >= UNKNOWN && !unknown {
                    unknown = true;
                    // What was heard is given up, so that it has to be heard again.
                    query = Query::default();
                    Some(News::Unknown(gateway.clone(), heard.1))
                } else if heard.0.elapsed() >= UNREACHABLE && !silent {
                    silent = true;
                    info!(gateway = %gateway.name, namespace = %gateway.namespace, error, "the agent does not answer");
                    Some(News::Silent(gateway.clone()))
                } else {
                    None
                }
            }
        };
        if let Some(told) = told
            && news.send(told).await.is_err()
        {
            return;
        }
    }
}
