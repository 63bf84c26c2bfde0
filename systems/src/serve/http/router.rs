//! Which request goes where, and what every request goes through: all that is no answer is an OpenAI error.

use std::{any::Any, sync::Arc};

use axum::{
    Router,
    http::{Method, StatusCode, Uri},
    middleware,
    response::{IntoResponse, Response},
    routing::{get, post},
};
use tower_http::catch_panic::CatchPanicLayer;

use super::{about, access, app::App, chat_completions, completions, embeddings, error::ApiError, tokenize};

/// The ways there are, for who took a wrong one.
const WAYS: &str = "GET /, /health, /metrics, /v1/models, /v1/routing; POST /v1/chat/completions, /v1/completions, \
    /v1/embeddings, /tokenize, /detokenize";

/// All ways.
///
/// # Errors
/// An origin in the configuration that is none.
pub(super) fn router(app: Arc<App>) -> Result<Router, String> {
    let cors = access::cors(&app.config.cors_origins)?;
    let router = Router::new()
        .route("/", get(about::page))
        .route("/health", get(about::health))
        .route("/metrics", get(about::metrics))
        .route("/v1/models", get(about::models))
        .route("/v1/models/{*name}", get(about::model))
        .route("/v1/routing", get(about::routing))
        .route("/v1/chat/completions", post(chat_completions::complete))
        .route("/v1/completions", post(completions::complete))
        .route("/v1/embeddings", post(embeddings::embed))
        .route("/tokenize", post(tokenize::tokenize))
        .route("/detokenize", post(tokenize::detokenize))
        .fallback(no_way)
        .method_not_allowed_fallback(wrong_method)
        .layer(CatchPanicLayer::custom(panicked))
        .layer(middleware::from_fn_with_state(app.clone(), access::guard))
        .with_state(app);
    Ok(match cors {
        Some(cors) => router.layer(cors),
        None => router,
    })
}

async fn no_way(method: Method, uri: Uri) -> ApiError {
    let path = uri.path();
    let message = format!("there is no {method} {}; there are {WAYS}", &path[..path.floor_char_boundary(100)]);
    ApiError::new(StatusCode::NOT_FOUND, "not_found", message)
}

async fn wrong_method(method: Method, uri: Uri) -> ApiError {
    let message = format!("{} cannot be asked with {method}; there are {WAYS}", uri.path());
    ApiError::new(StatusCode::METHOD_NOT_ALLOWED, "method_not_allowed", message)
}

fn panicked(panic: Box<dyn Any + Send>) -> Response {
    let text = panic.downcast_ref::<&str>().map(|text| (*text).to_owned());
    let text = text.or_else(|| panic.downcast_ref::<String>().cloned()).unwrap_or_else(|| "a panic".into());
    ApiError::internal(format!("the server failed: {text}")).into_response()
}
