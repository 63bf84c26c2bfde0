//! Fields of a request, taken one by one: each is checked where it is read, and what is wrong with it is said by its name.
//!
//! Clients send fields that nobody here knows; those are left alone. `null` is as good as missing.

use std::ops::RangeInclusive;

use axum::{
    body::{Body, HttpBody},
    http::{HeaderMap, StatusCode, header},
};
use serde_json::{Map, Value};
use tokio_stream::StreamExt;

use super::error::{ApiError, ApiResult};

/// A request's object, or one within it.
#[derive(Clone, Debug, Default)]
pub(super) struct Fields {
    map: Map<String, Value>,
    /// Before the names of fields, in errors.
    prefix: String,
}

impl Fields {
    /// Reads a body: JSON, an object, of `max_bytes` at most.
    pub(super) async fn read(headers: &HeaderMap, body: Body, max_bytes: usize) -> ApiResult<Self> {
        let is_json = |kind: &str| {
            let kind = kind.split(';').next().unwrap_or_default().trim();
            kind.eq_ignore_ascii_case("application/json")
        };
        let kind = headers.get(header::CONTENT_TYPE).map(|kind| String::from_utf8_lossy(kind.as_bytes()));
        if !kind.as_deref().is_some_and(is_json) {
            let found = kind.map_or("none".into(), |kind| format!("`{}`", shorten(&kind)));
            let message = format!("expected a body of `Content-Type: application/json`, found {found}");
            return Err(ApiError::new(StatusCode::UNSUPPORTED_MEDIA_TYPE, "unsupported_media_type", message));
        }
        let too_large = |found: String| {
            let message = format!("expected a body of {max_bytes} bytes at most, found {found}");
            ApiError::new(StatusCode::PAYLOAD_TOO_LARGE, "body_too_large", message)
        };
        let announced = body.size_hint().lower();
        if announced > max_bytes as u64 {
            return Err(too_large(format!("{announced} bytes")));
        }
        let mut chunks = body.into_data_stream();
        let mut bytes = Vec::new();
        while let Some(chunk) = chunks.next().await {
            let broken = |_| ApiError::new(StatusCode::BAD_REQUEST, "incomplete_body", "the body broke off");
            bytes.extend_from_slice(&chunk.map_err(broken)?);
            if bytes.len() > max_bytes {
                return Err(too_large("more".into()));
            }
        }
        Self::parse(&bytes)
    }

    fn parse(bytes: &[u8]) -> ApiResult<Self> {
        // Nesting is limited to 128 levels by the parser.
        match serde_json::from_slice(bytes) {
            Ok(Value::Object(map)) => Ok(Fields { map, prefix: String::new() }),
            Ok(other) => {
                let message = format!("expected a JSON object, found {}", found(&other));
                Err(ApiError::new(StatusCode::BAD_REQUEST, "invalid_json", message))
            }
            Err(error) => {
                let message = format!("expected a JSON object, found something else: {error}");
                Err(ApiError::new(StatusCode::BAD_REQUEST, "invalid_json", message))
            }
        }
    }

    /// The fields of an object within; none, if it is missing.
    pub(super) fn within(&mut self, name: &str) -> ApiResult<Option<Self>> {
        let prefix = format!("{}{name}.", self.prefix);
        Ok(self.object(name)?.map(|map| Fields { map, prefix }))
    }

    /// That a field is something else.
    pub(super) fn wrong(&self, name: &str, what: &str, value: &Value) -> ApiError {
        expected(&format!("{}{name}", self.prefix), what, value)
    }

    /// The field's value, whatever it is.
    pub(super) fn take(&mut self, name: &str) -> Option<Value> {
        self.map.remove(name).filter(|value| !value.is_null())
    }

    /// Whether it is there.
    pub(super) fn has(&self, name: &str) -> bool {
        self.map.get(name).is_some_and(|value| !value.is_null())
    }

    /// A number.
    pub(super) fn number(&mut self, name: &str, range: RangeInclusive<f64>) -> ApiResult<Option<f64>> {
        let Some(value) = self.take(name) else { return Ok(None) };
        match value.as_f64() {
            Some(number) if range.contains(&number) => Ok(Some(number)),
            _ => Err(self.wrong(name, &format!("a number from {} to {}", range.start(), range.end()), &value)),
        }
    }

    /// A whole number.
    pub(super) fn integer(&mut self, name: &str, range: RangeInclusive<i128>) -> ApiResult<Option<i128>> {
        let Some(value) = self.take(name) else { return Ok(None) };
        match whole(&value) {
            Some(number) if range.contains(&number) => Ok(Some(number)),
            _ => Err(self.wrong(name, &format!("a whole number from {} to {}", range.start(), range.end()), &value)),
        }
    }

    /// A whole number from `least` to `most`.
    pub(super) fn count(&mut self, name: &str, least: usize, most: usize) -> ApiResult<Option<usize>> {
        Ok(self.integer(name, least as i128..=most as i128)?.map(|number| number as usize))
    }

    /// True or false.
    pub(super) fn flag(&mut self, name: &str) -> ApiResult<Option<bool>> {
        let Some(value) = self.take(name) else { return Ok(None) };
        value.as_bool().map(Some).ok_or_else(|| self.wrong(name, "true or false", &value))
    }

    /// A text.
    pub(super) fn text(&mut self, name: &str) -> ApiResult<Option<String>> {
        match self.take(name) {
            None => Ok(None),
            Some(Value::String(text)) => Ok(Some(text)),
            Some(other) => Err(self.wrong(name, "a text", &other)),
        }
    }

    /// An object.
    pub(super) fn object(&mut self, name: &str) -> ApiResult<Option<Map<String, Value>>> {
        match self.take(name) {
            None => Ok(None),
            Some(Value::Object(map)) => Ok(Some(map)),
            Some(other) => Err(self.wrong(name, "an object", &other)),
        }
    }

    /// A list.
    pub(super) fn list(&mut self, name: &str) -> ApiResult<Option<Vec<Value>>> {
        match self.take(name) {
            None => Ok(None),
            Some(Value::Array(items)) => Ok(Some(items)),
            Some(other) => Err(self.wrong(name, "a list", &other)),
        }
    }

    /// A list of tokens.
    pub(super) fn tokens(&mut self, name: &str) -> ApiResult<Option<Vec<u32>>> {
        let Some(items) = self.list(name)? else { return Ok(None) };
        tokens(name, &items).map(Some)
    }
}

/// A list's items as tokens.
pub(super) fn tokens(name: &str, items: &[Value]) -> ApiResult<Vec<u32>> {
    let token = |item: &Value| {
        let token = whole(item).and_then(|number| u32::try_from(number).ok());
        token.ok_or_else(|| expected(name, "tokens, which are whole numbers", item))
    };
    items.iter().map(token).collect()
}

fn whole(value: &Value) -> Option<i128> {
    value.as_i64().map(i128::from).or_else(|| value.as_u64().map(i128::from))
}

/// That a field is something else.
pub(super) fn expected(name: &str, what: &str, value: &Value) -> ApiError {
    ApiError::param(name, format!("expected {what}; found {}", found(value)))
}

/// What a value is, in a few words.
fn found(value: &Value) -> String {
    match value {
        Value::Array(items) => format!("a list of {}", items.len()),
        Value::Object(map) => format!("an object of {} fields", map.len()),
        Value::String(text) => format!("the text {:?}", shorten(text)),
        other => other.to_string(),
    }
}

fn shorten(text: &str) -> &str {
    &text[..text.floor_char_boundary(60)]
}
