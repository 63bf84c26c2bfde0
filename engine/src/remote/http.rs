//! What the server answers over HTTP: `POST /rpc`, `GET /rpc` and `GET /telemetry` as WebSockets, `GET /metrics`, `GET /health`.

use std::{
    sync::{Arc, PoisonError},
    time::Duration,
};

use axum::{
    Extension, Router,
    body::{Body, to_bytes},
    extract::{Request, State, ws::WebSocketUpgrade},
    http::{HeaderValue, StatusCode, header},
    middleware::{self, Next},
    response::{IntoResponse, Response},
    routing::get,
};
use serde_json::Value;
use tokio::time::timeout;

use super::{
    access, metrics,
    protocol::{self, MAX_MESSAGE_BYTES},
    rpc,
    server::{Connection, Shared},
    session::{self, Format},
};
use crate::control::{ControlHandle, RpcError};

/// How long a request's body may take to arrive.
const BODY_PATIENCE: Duration = Duration::from_secs(10);
/// How long `GET /metrics` waits for the step at hand to end.
const METRICS_PATIENCE: Duration = Duration::from_secs(1);

/// The way to the run that a request may use.
#[derive(Clone)]
pub(super) struct Granted(pub(super) ControlHandle);

pub(super) fn router(shared: &Arc<Shared>) -> Router {
    let rpc = get(|upgrade, shared, granted, connection| open(upgrade, shared, granted, connection, None)).post(post);
    let telemetry =
        get(|upgrade, shared, granted, connection| open(upgrade, shared, granted, connection, Some(Format::Binary)));
    Router::new()
        .route("/rpc", rpc)
        .route("/telemetry", telemetry)
        .route("/metrics", get(metrics))
        .route("/health", get(|| async { "ok\n" }))
        .fallback(|| async {
            (StatusCode::NOT_FOUND, "there are: POST /rpc, GET /rpc, GET /telemetry, GET /metrics, GET /health\n")
        })
        .layer(middleware::from_fn_with_state(shared.clone(), guard))
        .with_state(shared.clone())
}

/// Refuses who may not come in, and says what the others may do.
async fn guard(State(shared): State<Arc<Shared>>, mut request: Request, next: Next) -> Response {
    let connection = request.extensions().get::<Arc<Connection>>().cloned();
    let mut response = match access::refusal(request.headers(), shared.is_loopback) {
        Some(why) => refuse(StatusCode::FORBIDDEN, why),
        None => match shared.token.in_headers(request.headers()) {
            Some(false) => {
                let why = "the token is not this run's; it is in `remote.token` in the run's folder";
                refuse(StatusCode::UNAUTHORIZED, why)
            }
            None if !shared.is_loopback => {
                let why = "a run that other machines reach wants its token for everything: `Authorization: Bearer ..`";
                refuse(StatusCode::UNAUTHORIZED, why)
            }
            known => {
                let handle = if known.is_some() { shared.handle.clone() } else { shared.handle.read_only() };
                request.extensions_mut().insert(Granted(handle));
                next.run(request).await
            }
        },
    };
    if response.status() != StatusCode::SWITCHING_PROTOCOLS {
        // One request, one connection: none is held in reserve.
        response.headers_mut().insert(header::CONNECTION, HeaderValue::from_static("close"));
    }
    if let Some(connection) = connection {
        connection.answered.notify_one();
    }
    response
}

fn refuse(status: StatusCode, why: impl Into<String>) -> Response {
    let error = RpcError::new(RpcError::NO_TOKEN, why);
    (status, json_of(&protocol::response(&Value::Null, Err(error)))).into_response()
}

fn json_of(value: &Value) -> Response {
    ([(header::CONTENT_TYPE, "application/json")], format!("{value}\n")).into_response()
}

/// `POST /rpc`.
async fn post(Extension(Granted(handle)): Extension<Granted>, body: Body) -> Response {
    let body = match timeout(BODY_PATIENCE, to_bytes(body, MAX_MESSAGE_BYTES)).await {
        Ok(Ok(body)) => body,
        Ok(Err(_)) => {
            let why = format!("expected a body of {MAX_MESSAGE_BYTES} bytes at most\n");
            return (StatusCode::PAYLOAD_TOO_LARGE, why).into_response();
        }
        Err(_) => return (StatusCode::REQUEST_TIMEOUT, "the body did not arrive\n").into_response(),
    };
    let answer = match rpc::parse(&body) {
        Ok(value) => rpc::respond(&handle, value).await,
        Err(answer) => Some(answer),
    };
    let Some(answer) = answer else { return StatusCode::NO_CONTENT.into_response() };
    let needs_token = |answer: &Value| answer["error"]["code"].as_i64() == Some(RpcError::NO_TOKEN);
    let refused = answer.as_array().map_or_else(|| needs_token(&answer), |batch| batch.iter().all(needs_token));
    let status = if refused { StatusCode::UNAUTHORIZED } else { StatusCode::OK };
    (status, json_of(&answer)).into_response()
}

/// `GET /metrics`. Scrapers do not wait for a step that takes long: they get what the run said last, and what they asked for is what the
/// next ones get.
async fn metrics(State(shared): State<Arc<Shared>>, Extension(Granted(handle)): Extension<Granted>) -> Response {
    let asked = tokio::spawn({
        let shared = shared.clone();
        async move {
            let [status, last] = ["run.status", "run.last"].map(|method| rpc::ask(&handle, method, Value::Null));
            let text = match (status.await, last.await) {
                (Ok(status), Ok(last)) => metrics::text(&status, &last).map_err(|error| error.to_string()),
                (Err(error), _) | (_, Err(error)) => Err(error.to_string()),
            };
            *shared.metrics.lock().unwrap_or_else(PoisonError::into_inner) = text.clone().ok();
            text
        }
    });
    let known = || shared.metrics.lock().unwrap_or_else(PoisonError::into_inner).clone();
    let text = match timeout(METRICS_PATIENCE, asked).await {
        Ok(text) => text.unwrap_or_else(|error| Err(error.to_string())),
        Err(_) => known().ok_or_else(|| "the step at hand takes long, and nobody asked before it".to_owned()),
    };
    match text {
        Ok(text) => ([(header::CONTENT_TYPE, "application/openmetrics-text; version=1.0.0")], text).into_response(),
        Err(why) => (StatusCode::SERVICE_UNAVAILABLE, why + "\n").into_response(),
    }
}

/// `GET /rpc` and `GET /telemetry`.
async fn open(
    upgrade: WebSocketUpgrade,
    State(shared): State<Arc<Shared>>,
    Extension(Granted(handle)): Extension<Granted>,
    Extension(connection): Extension<Arc<Connection>>,
    format: Option<Format>,
) -> Response {
    upgrade
        .max_message_size(MAX_MESSAGE_BYTES)
        .max_frame_size(MAX_MESSAGE_BYTES)
        .on_upgrade(move |socket| session::run(socket, shared, handle, connection, format))
}
