//! Who may come in, and for how long: the key, pages from elsewhere, the time of a request.
//!
//! Without a key the server is for whoever reaches it. One on this machine's own address then answers only requests that name this
//! machine, since a page from anywhere can have its own name point here.

use std::sync::Arc;

use axum::{
    extract::{Request, State},
    http::{HeaderMap, HeaderName, HeaderValue, Method, StatusCode, header},
    middleware::Next,
    response::{IntoResponse, Response},
};
use engine::remote::access::{bearer, is_of_this_machine};
use sha2::{Digest, Sha256};
use subtle::ConstantTimeEq;
use tokio::time::Instant;
use tower_http::cors::{AllowOrigin, Any, CorsLayer};

use super::{
    about,
    app::App,
    error::{ApiError, ApiResult},
    server::Connection,
};

/// When a request must have its answer.
#[derive(Clone, Copy)]
pub(super) struct Deadline(pub(super) Instant);

/// The way that needs no key.
const OPEN_PATH: &str = "/health";

/// Lets a request in, and ends it when its time is over.
pub(super) async fn guard(State(app): State<Arc<App>>, mut request: Request, next: Next) -> Response {
    let deadline = Instant::now() + app.config.request_timeout;
    request.extensions_mut().insert(Deadline(deadline));
    let connection = request.extensions().get::<Arc<Connection>>();
    if let Some(connection) = connection {
        connection.begin(deadline);
    }
    let is_loopback = connection.is_some_and(|connection| connection.is_loopback);
    if let Err(error) = admit(&app, is_loopback, &request) {
        let is_person = request.method() == Method::GET && request.uri().path() == "/" && wants_html(request.headers());
        let response = error.clone().into_response();
        return if is_person && response.status() == StatusCode::UNAUTHORIZED { about::key_page() } else { response };
    }
    let limit = app.limit(deadline);
    tokio::select! {
        response = next.run(request) => response,
        error = limit => error.into_response(),
    }
}

fn admit(app: &App, is_loopback: bool, request: &Request) -> ApiResult<()> {
    match &app.config.api_key {
        None if is_loopback => check_host(request.headers()),
        None => Ok(()),
        Some(_) if request.uri().path() == OPEN_PATH => Ok(()),
        Some(key) => check_key(request.headers(), key),
    }
}

fn check_key(headers: &HeaderMap, key: &str) -> ApiResult<()> {
    let refuse = |message: &str| Err(ApiError::new(StatusCode::UNAUTHORIZED, "invalid_api_key", message));
    let Some(given) = headers.get(header::AUTHORIZATION) else {
        return refuse("expected the server's key as `Authorization: Bearer KEY`, found no such header");
    };
    let Some(given) = bearer(given.as_bytes()) else {
        return refuse("expected `Authorization: Bearer KEY`, found another scheme");
    };
    // Digests, so that the time says nothing of the key, nor of its length.
    if Sha256::digest(given).as_slice().ct_eq(Sha256::digest(key).as_slice()).into() {
        Ok(())
    } else {
        refuse("the key is not this server's")
    }
}

fn check_host(headers: &HeaderMap) -> ApiResult<()> {
    let host = headers.get(header::HOST).map_or("", |host| host.to_str().unwrap_or("?"));
    if host.is_empty() || is_of_this_machine(host) {
        return Ok(());
    }
    let message = format!(
        "expected a request to this machine, found one to `{}`; give the server a key to have it reached by other names",
        &host[..host.floor_char_boundary(60)]
    );
    Err(ApiError::new(StatusCode::FORBIDDEN, "wrong_host", message))
}

fn wants_html(headers: &HeaderMap) -> bool {
    headers
        .get(header::ACCEPT)
        .and_then(|accept| accept.to_str().ok())
        .is_some_and(|accept| accept.contains("text/html"))
}

/// What pages of these origins may do; nothing, if there are none.
///
/// # Errors
/// An origin that cannot be one.
pub(super) fn cors(origins: &[String]) -> Result<Option<CorsLayer>, String> {
    let allowed = match origins {
        [] => return Ok(None),
        [all] if all == "*" => AllowOrigin::any(),
        origins => {
            AllowOrigin::list(origins.iter().map(|origin| origin_of(origin)).collect::<Result<Vec<_>, String>>()?)
        }
    };
    let headers: [HeaderName; 2] = [header::AUTHORIZATION, header::CONTENT_TYPE];
    let layer = CorsLayer::new().allow_origin(allowed).allow_methods([Method::GET, Method::POST]);
    Ok(Some(layer.allow_headers(headers).expose_headers(Any)))
}

fn origin_of(origin: &str) -> Result<HeaderValue, String> {
    let is_origin = origin
        .split_once("://")
        .is_some_and(|(scheme, rest)| !scheme.is_empty() && !rest.is_empty() && !rest.contains('/'));
    let value = HeaderValue::from_str(origin).ok().filter(|_| is_origin);
    value.ok_or_else(|| format!("expected an origin such as `https://example.org:8443`, found `{origin}`"))
}

#[cfg(test)]
mod tests {
    #![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

    use super::*;

    fn headers(list: &[(&str, &str)]) -> HeaderMap {
        list.iter().map(|&(name, value)| (HeaderName::try_from(name).unwrap(), value.try_into().unwrap())).collect()
    }

    #[test]
    fn one_key_fits() {
        for (value, fits) in [
            ("Bearer abc", true),
            ("bearer abc", true),
            ("Bearer abcd", false),
            ("Bearer ab", false),
            ("Bearer ", false),
            ("Basic abc", false),
            ("abc", false),
            ("", false),
        ] {
            assert_eq!(check_key(&headers(&[("authorization", value)]), "abc").is_ok(), fits, "{value}");
        }
        assert!(check_key(&headers(&[]), "abc").is_err());
    }

    #[test]
    fn other_names_are_no_way_to_this_machine() {
        for (host, is_let_in) in [
            ("127.0.0.1:8000", true),
            ("localhost", true),
            ("LOCALHOST:1", true),
            ("[::1]:8000", true),
            ("evil.example:8000", false),
            ("127.0.0.1.evil.example", false),
        ] {
            assert_eq!(check_host(&headers(&[("host", host)])).is_ok(), is_let_in, "{host}");
        }
    }

    #[test]
    fn origins_are_origins() {
        assert!(cors(&[]).unwrap().is_none());
        assert!(cors(&["*".into()]).unwrap().is_some());
        assert!(cors(&["https://a.example".into(), "http://localhost:3000".into()]).unwrap().is_some());
        for bad in ["a.example", "https://a.example/x", "https://", "://a", "https://a\n"] {
            assert!(cors(&[bad.into()]).unwrap_err().contains("expected an origin"), "{bad}");
        }
    }
}
