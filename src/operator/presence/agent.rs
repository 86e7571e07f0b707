//! The agent of a Gateway, asked who is connected.

use std::time::Duration;

use bytes::Bytes;
use http_body_util::{BodyExt, Empty, Limited};
use hyper::header::AUTHORIZATION;
use hyper::header::HeaderValue;
use hyper::http::uri::InvalidUri;
use hyper::{Request, StatusCode, Uri};
use hyper_util::client::legacy::Client;
use hyper_util::client::legacy::connect::HttpConnector;
use hyper_util::rt::TokioExecutor;
use thiserror::Error;
use tokio::time::timeout;

use crate::broker::credential::PresenceToken;
use crate::broker::log::wire::{MAX_PAGE_BYTES, MAX_WAIT_SECONDS, PATH, Page, Query};

/// The longest that a connection may take.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);

/// The longest that an answer may take: as long as the agent may hold it back, and a page's time to travel.
const TIMEOUT: Duration = Duration::from_secs(MAX_WAIT_SECONDS + 10);

/// Why an agent did not answer.
#[derive(Debug, Error)]
pub enum AskError {
    /// Not a host and port.
    #[error("{authority:?} is no host and port")]
    Address {
        /// What it is.
        authority: String,
        /// Why.
        #[source]
        source: InvalidUri,
    },

    /// It could not be reached.
    #[error("failed to reach the agent at {authority}")]
    Reach {
        /// Where.
        authority: String,
        /// Why.
        #[source]
        source: hyper_util::client::legacy::Error,
    },

    /// It does not accept the token.
    #[error("the agent at {authority} does not accept the operator's token: it has another password of the operator's broker user")]
    Unauthorized {
        /// Host and port.
        authority: String,
    },

    /// It answered something else.
    #[error("the agent at {authority} answered with {status}")]
    Status {
        /// Where.
        authority: String,
        /// What.
        status: StatusCode,
    },

    /// Its answer did not come whole, or is too long.
    #[error("failed to read the answer of the agent at {authority}: {reason}")]
    Read {
        /// Where.
        authority: String,
        /// Why.
        reason: String,
    },

    /// Its answer is of another version.
    #[error("failed to parse the answer of the agent at {authority}: is it of another version?")]
    Parse {
        /// Where.
        authority: String,
        /// Why.
        #[source]
        source: serde_json::Error,
    },

    /// It took too long.
    #[error("the agent at {authority} did not answer within {} s", TIMEOUT.as_secs())]
    Timeout {
        /// Where.
        authority: String,
    },
}

/// Asks agents, over connections that are kept.
#[derive(Clone, Debug)]
pub struct Agents {
    client: Client<HttpConnector, Empty<Bytes>>,
}

impl Agents {
    /// Must be called inside a tokio runtime.
    #[must_use]
    pub fn new() -> Self {
        let mut connector = HttpConnector::new();
        connector.set_connect_timeout(Some(CONNECT_TIMEOUT));
        connector.set_nodelay(true);
        Self { client: Client::builder(TokioExecutor::new()).build(connector) }
    }

    /// The next page of the agent at `authority` (host and port). Waits for news as long as the agent does.
    ///
    /// # Errors
    /// When there is no answer, or one that cannot be read.
    pub async fn page(&self, authority: &str, token: &PresenceToken, query: &Query) -> Result<Page, AskError> {
        match timeout(TIMEOUT, self.ask(authority, token, query)).await {
            Ok(answer) => answer,
            Err(_) => Err(AskError::Timeout { authority: authority.to_owned() }),
        }
    }

    async fn ask(&self, authority: &str, token: &PresenceToken, query: &Query) -> Result<Page, AskError> {
        let authority = || authority.to_owned();
        // The epoch comes from an agent, which may be anyone's: only what needs no encoding goes back.
        let epoch: String = query.epoch.chars().filter(char::is_ascii_alphanumeric).take(64).collect();
        let uri = format!("http://{}{PATH}?epoch={epoch}&after={}", authority(), query.after);
        let uri: Uri = uri.parse().map_err(|source| AskError::Address { authority: authority(), source })?;
        let mut request = Request::new(Empty::new());
        *request.uri_mut() = uri;
        // The token is of URL-safe base64, so that it is a valid value of a header.
        if let Ok(value) = HeaderValue::from_str(&token.authorization()) {
            request.headers_mut().insert(AUTHORIZATION, value);
        }
        let answer = self.client.request(request).await.map_err(|source| AskError::Reach { authority: authority(), source })?;
        if answer.status() == StatusCode::UNAUTHORIZED {
            return Err(AskError::Unauthorized { authority: authority() });
        }
        if answer.status() != StatusCode::OK {
            return Err(AskError::Status { authority: authority(), status: answer.status() });
        }
        let body = Limited::new(answer.into_body(), MAX_PAGE_BYTES).collect().await;
        let body = body.map_err(|error| AskError::Read { authority: authority(), reason: error.to_string() })?;
        serde_json::from_slice(&body.to_bytes()).map_err(|source| AskError::Parse { authority: authority(), source })
    }
}

impl Default for Agents {
    fn default() -> Self {
        Self::new()
    }
}
