//! `GET /presence`: the state of the broker's clients for the operator, see [`crate::broker::log::wire`]. Read-only, over TLS. The caller
//! proves its identity with a [`PresenceToken`](crate::broker::credential::PresenceToken).

use std::time::Duration;

use axum::extract::{Query, State};
use axum::http::header::{AUTHORIZATION, WWW_AUTHENTICATE};
use axum::http::{HeaderMap, StatusCode};
use axum::response::{IntoResponse, Response};
use axum::routing::get;
use axum::{Json, Router};
use tokio::time::timeout;
use tokio_util::sync::CancellationToken;

use super::{Presence, now};
use crate::broker::log::wire::{self, MAX_WAIT_SECONDS, Page};

#[derive(Clone)]
struct PresenceEndpoint {
    presence: Presence,
    shutdown: CancellationToken,
}

/// The endpoint. Answers waiting requests at once when `shutdown` is cancelled.
pub fn router(presence: Presence, shutdown: CancellationToken) -> Router {
    Router::new().route(wire::PATH, get(answer)).with_state(PresenceEndpoint { presence, shutdown })
}

/// The body of a 401.
const UNAUTHORIZED: &str =
    "unauthorized: expected the operator's bearer token, derived from the password in the Gateway's Secret of the operator\n";

async fn answer(State(endpoint): State<PresenceEndpoint>, headers: HeaderMap, Query(query): Query<wire::Query>) -> Response {
    let PresenceEndpoint { presence, shutdown } = endpoint;
    if !headers.get(AUTHORIZATION).is_some_and(|value| presence.is_accepted(value.as_bytes())) {
        return (StatusCode::UNAUTHORIZED, [(WWW_AUTHENTICATE, "Bearer")], UNAUTHORIZED).into_response();
    }
    let mut number = presence.number.subscribe();
    let read = number.wait_for(Option::is_some);
    let page = tokio::select! {
        page = timeout(Duration::from_secs(MAX_WAIT_SECONDS), read) => page.is_ok().then(|| presence.page(&query)),
        () = shutdown.cancelled() => None,
    };
    match page {
        None => (StatusCode::SERVICE_UNAVAILABLE, "the broker's log has not been read yet\n").into_response(),
        Some(page) if page.first || !page.clients.is_empty() => Json(page).into_response(),
        Some(_) => {
            let later = number.wait_for(|number| number.is_some_and(|number| number > query.after));
            tokio::select! {
                // A page without clients still carries the count of refusals.
                _ = timeout(Duration::from_secs(MAX_WAIT_SECONDS), later) => {}
                () = shutdown.cancelled() => {}
            }
            Json(presence.page(&query)).into_response()
        }
    }
}

impl Presence {
    fn page(&self, query: &wire::Query) -> Page {
        self.lock().page(&query.epoch, query.after, now())
    }
}
