//! What the server tells of itself: whether it is ready, which model it has, how its experts are loaded, and the chat page.

use std::sync::{Arc, LazyLock};

use axum::{
    extract::{Path, State},
    http::{StatusCode, header},
    response::{IntoResponse, Response},
};
use base64::{Engine, prelude::BASE64_STANDARD};
use kernels::ops::balance::max_vio;
use serde_json::{Value, json};
use sha2::{Digest, Sha256};

use super::{
    app::App,
    config::Loaded,
    error::{ApiError, ApiResult, json_response},
};
use crate::serve::LayerLoad;

/// The page: one file, with nothing from elsewhere.
const PAGE: &str = include_str!("page.html");
/// What asks for the key when a person opens the page without one, and writes the page over itself.
const KEY_PAGE: &str = include_str!("key.html");

/// What a page may do: run what these two bring, by digest, and ask this server.
static POLICY: LazyLock<String> = LazyLock::new(|| {
    let digests = |tag: &str| {
        let inside = |page: &'static str| page.split_once(&format!("<{tag}>"))?.1.split_once(&format!("</{tag}>"));
        let digest = |(text, _): (&str, &str)| format!("'sha256-{}'", BASE64_STANDARD.encode(Sha256::digest(text)));
        [PAGE, KEY_PAGE].into_iter().filter_map(inside).map(digest).collect::<Vec<_>>().join(" ")
    };
    format!(
        "default-src 'none'; script-src {}; style-src {}; connect-src 'self'; img-src data:; base-uri 'none'; \
         form-action 'none'; frame-ancestors 'none'",
        digests("script"),
        digests("style")
    )
});

/// `GET /health`: 200 if the model answers; 503 and why if not.
pub(super) async fn health(State(app): State<Arc<App>>) -> Response {
    let loaded = app.model.borrow().clone();
    let (status, word) = match loaded {
        None => (StatusCode::SERVICE_UNAVAILABLE, "loading"),
        Some(loaded) if loaded.service.is_closing() => (StatusCode::SERVICE_UNAVAILABLE, "shutting_down"),
        Some(_) => (StatusCode::OK, "ok"),
    };
    (status, json_response(&json!({ "status": word, "model": app.config.model_name }))).into_response()
}

/// `GET /v1/models`.
pub(super) async fn models(State(app): State<Arc<App>>) -> ApiResult<Response> {
    let loaded = app.loaded()?;
    Ok(json_response(&json!({ "object": "list", "data": [model_body(&app, &loaded)] })))
}

/// `GET /v1/models/NAME`.
pub(super) async fn model(State(app): State<Arc<App>>, Path(name): Path<String>) -> ApiResult<Response> {
    let loaded = app.loaded()?;
    app.check_model(Some(&name))?;
    Ok(json_response(&model_body(&app, &loaded)))
}

fn model_body(app: &App, loaded: &Loaded) -> Value {
    let settings = loaded.service.settings();
    json!({
        "id": app.config.model_name,
        "object": "model",
        "created": loaded.created_unix_secs,
        "owned_by": "hadal",
        "root": app.config.model_name,
        "parent": null,
        "max_model_len": settings.max_context_tokens,
        "settings": settings,
    })
}

/// `GET /v1/routing`: tokens by layer and expert, since the model was loaded and in its last step.
pub(super) async fn routing(State(app): State<Arc<App>>) -> ApiResult<Response> {
    let stats = app.loaded()?.service.stats();
    let layer = |layer: &LayerLoad| {
        let mut body = json!(layer);
        body["max_vio"] = max_vio(&layer.total).into();
        body
    };
    Ok(json_response(&json!({
        "model": app.config.model_name,
        "num_steps": stats.counters.num_steps,
        "num_running": stats.num_running,
        "layers": stats.routing.iter().map(layer).collect::<Vec<_>>(),
    })))
}

/// `GET /metrics`.
pub(super) async fn metrics(State(app): State<Arc<App>>) -> ApiResult<Response> {
    let stats = app.model.borrow().clone().map(|loaded| loaded.service.stats());
    let text = app.metrics.text(stats).map_err(|error| ApiError::internal(error.to_string()))?;
    Ok(([(header::CONTENT_TYPE, "text/plain; version=0.0.4; charset=utf-8")], text).into_response())
}

/// `GET /`: the chat page.
pub(super) async fn page() -> Response {
    html(StatusCode::OK, PAGE)
}

/// What a person gets who has not shown the key.
pub(super) fn key_page() -> Response {
    html(StatusCode::UNAUTHORIZED, KEY_PAGE)
}

fn html(status: StatusCode, page: &'static str) -> Response {
    let headers = [
        (header::CONTENT_TYPE, "text/html; charset=utf-8"),
        (header::CONTENT_SECURITY_POLICY, POLICY.as_str()),
        (header::X_CONTENT_TYPE_OPTIONS, "nosniff"),
        (header::CACHE_CONTROL, "no-store"),
    ];
    (status, headers, page).into_response()
}
