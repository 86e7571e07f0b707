//! The client of a Gateway's agent, which reports the clients of its broker.

use std::time::Duration;

use bytes::Bytes;
use http_body_util::{BodyExt, Empty, Limited};
use hyper::header::AUTHORIZATION;
use hyper::header::HeaderValue;
use hyper::http::uri::InvalidUri;
use hyper::{Request, StatusCode, Uri};
use hyper_rustls::{HttpsConnector, HttpsConnectorBuilder};
use hyper_util::client::legacy::Client;
use hyper_util::client::legacy::connect::HttpConnector;
use hyper_util::rt::TokioExecutor;
use thiserror::Error;
use tokio::time::timeout;

use crate::broker::credential::PresenceToken;
use crate::broker::log::wire::{MAX_PAGE_BYTES, MAX_WAIT_SECONDS, PATH, Page, Query};
use crate::runtime::tls::{TlsError, Verification, client_configuration};

/// Upper limit of the time to connect.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);

/// Upper limit of the time for a response: the agent's long poll, and the transfer of a page.
const TIMEOUT: Duration = Duration::from_secs(MAX_WAIT_SECONDS + 10);

/// Why a request to an agent failed.
#[derive(Debug, Error)]
pub enum AgentError {
    /// Not a host and port.
    #[error("{authority:?} is not a host and port")]
    Address {
        /// The text.
        authority: String,
        /// The cause.
        #[source]
        source: InvalidUri,
    },

    /// The agent is not reachable.
    #[error("failed to reach the agent at {authority}")]
    Reach {
        /// Host and port.
        authority: String,
        /// The cause.
        #[source]
        source: hyper_util::client::legacy::Error,
    },

    /// The agent rejected the token.
    #[error("the agent at {authority} rejected the operator's token: the agent holds another password of the broker user of the operator")]
    Unauthorized {
        /// Host and port.
        authority: String,
    },

    /// The agent returned an error status.
    #[error("the agent at {authority} returned {status}")]
    Status {
        /// Host and port.
        authority: String,
        /// The status.
        status: StatusCode,
    },

    /// The response is incomplete or too large.
    #[error("failed to read the response of the agent at {authority}: {reason}")]
    Read {
        /// Host and port.
        authority: String,
        /// The cause.
        reason: String,
    },

    /// The response is malformed.
    #[error("failed to parse the response of the agent at {authority}: it may have another version")]
    Parse {
        /// Host and port.
        authority: String,
        /// The cause.
        #[source]
        source: serde_json::Error,
    },

    /// There was no response in time.
    #[error("the agent at {authority} did not respond within {} s", TIMEOUT.as_secs())]
    Timeout {
        /// Host and port.
        authority: String,
    },
}

/// Requests pages from the agent of one Gateway over TLS. It keeps a connection open.
#[derive(Clone, Debug)]
pub struct AgentClient {
    client: Client<HttpsConnector<HttpConnector>, Empty<Bytes>>,
}

impl AgentClient {
    /// A client that verifies the agent and its name by these authorities (PEM). Must be called inside a tokio runtime.
    ///
    /// # Errors
    /// If the authorities are not certificates.
    pub fn verified_by(authorities: &[u8]) -> Result<Self, TlsError> {
        let mut connector = HttpConnector::new();
        connector.set_connect_timeout(Some(CONNECT_TIMEOUT));
        connector.set_nodelay(true);
        connector.enforce_http(false);
        let tls = client_configuration(Verification::Authorities(authorities))?;
        let connector = HttpsConnectorBuilder::new().with_tls_config(tls).https_only().enable_http1().wrap_connector(connector);
        Ok(Self { client: Client::builder(TokioExecutor::new()).build(connector) })
    }

    /// Requests the next page from the agent at `authority` (host and port). The agent holds the response back until there are
    /// changes.
    ///
    /// # Errors
    /// If there is no valid response.
    pub async fn page(&self, authority: &str, token: &PresenceToken, query: &Query) -> Result<Page, AgentError> {
        match timeout(TIMEOUT, self.ask(authority, token, query)).await {
            Ok(answer) => answer,
            Err(_) => Err(AgentError::Timeout { authority: authority.to_owned() }),
        }
    }

    async fn ask(&self, authority: &str, token: &PresenceToken, query: &Query) -> Result<Page, AgentError> {
        let authority = || authority.to_owned();
        // The epoch comes from an agent, which is not trusted: only characters that need no encoding are sent back.
        let epoch: String = query.epoch.chars().filter(char::is_ascii_alphanumeric).take(64).collect();
        let uri = format!("https://{}{PATH}?epoch={epoch}&after={}", authority(), query.after);
        let uri: Uri = uri.parse().map_err(|source| AgentError::Address { authority: authority(), source })?;
        let mut request = Request::new(Empty::new());
        *request.uri_mut() = uri;
        // The token is URL-safe base64, a valid header value.
        if let Ok(value) = HeaderValue::from_str(&token.authorization()) {
            request.headers_mut().insert(AUTHORIZATION, value);
        }
        let answer = self.client.request(request).await.map_err(|source| AgentError::Reach { authority: authority(), source })?;
        if answer.status() == StatusCode::UNAUTHORIZED {
            return Err(AgentError::Unauthorized { authority: authority() });
        }
        if answer.status() != StatusCode::OK {
            return Err(AgentError::Status { authority: authority(), status: answer.status() });
        }
        let body = Limited::new(answer.into_body(), MAX_PAGE_BYTES).collect().await;
        let body = body.map_err(|error| AgentError::Read { authority: authority(), reason: error.to_string() })?;
        serde_json::from_slice(&body.to_bytes()).map_err(|source| AgentError::Parse { authority: authority(), source })
    }
}
