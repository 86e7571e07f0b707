//! `GET /presence`: what the agent tells the operator, see [`crate::broker::log::wire`]. It changes nothing.

use std::time::Duration;

use axum::extract::{Query, State};
use axum::http::StatusCode;
use axum::response::{IntoResponse, Response};
use axum::routing::get;
use axum::{Json, Router};
use tokio::time::timeout;
use tokio_util::sync::CancellationToken;

use super::{Presence, now};
use crate::broker::log::wire::{self, MAX_WAIT_SECONDS, Page};

#[derive(Clone)]
struct Endpoint {
    presence: Presence,
    shutdown: CancellationToken,
}

/// The endpoint. Who waits for news is answered at once when `shutdown` is cancelled.
pub fn router(presence: Presence, shutdown: CancellationToken) -> Router {
    Router::new().route(wire::PATH, get(answer)).with_state(Endpoint { presence, shutdown })
}

async fn answer(State(endpoint): State<Endpoint>, Query(query): Query<wire::Query>) -> Response {
    let Endpoint { presence, shutdown } = endpoint;
    let mut number = presence.number.subscribe();
    let news = number.wait_for(Option::is_some);
    let page = tokio::select! {
        page = timeout(Duration::from_secs(MAX_WAIT_SECONDS), news) => page.is_ok().then(|| presence.page(&query)),
        () = shutdown.cancelled() => None,
    };
    match page {
        None => (StatusCode::SERVICE_UNAVAILABLE, "the broker's log has not been read yet\n").into_response(),
        Some(page) if page.first || !page.clients.is_empty() => Json(page).into_response(),
        Some(_) => {
            let later = number.wait_for(|number| number.is_some_and(|number| number > query.after));
            tokio::select! {
                // That none came is an answer too: the count of refusals is in it.
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
