//! JSON-RPC 2.0: texts to requests, answers to texts, one at a time or in batches.

use std::time::Duration;

use serde_json::Value;
use tokio::sync::oneshot;

use super::protocol::response;
use crate::control::{ControlHandle, RpcError, RpcResult};

/// Requests in a batch.
const MAX_BATCH: usize = 64;
/// How long a request may wait for the step at hand to end, and for its answer.
pub(super) const ANSWER_PATIENCE: Duration = Duration::from_secs(120);

/// A request as it came.
pub(super) struct Call {
    /// Of whom the answer is to name it; none if no answer is wanted.
    pub(super) id: Option<Value>,
    pub(super) method: String,
    pub(super) params: Value,
}

/// Reads a text as JSON.
pub(super) fn parse(text: &[u8]) -> Result<Value, Value> {
    serde_json::from_slice(text).map_err(|error| {
        let error = RpcError::new(RpcError::PARSE, format!("expected JSON, found: {error}"));
        response(&Value::Null, Err(error))
    })
}

/// Reads one request; the error is its answer.
pub(super) fn call(value: Value) -> Result<Call, Value> {
    let invalid = |id: Option<&Value>, message: &str| {
        Err(response(id.unwrap_or(&Value::Null), Err(RpcError::new(RpcError::INVALID_REQUEST, message))))
    };
    let Value::Object(mut fields) = value else {
        return invalid(None, "expected an object with `jsonrpc`, `method` and `id`");
    };
    let id = fields.remove("id");
    if !matches!(id, None | Some(Value::Null | Value::String(_) | Value::Number(_))) {
        return invalid(None, "expected a string or a number as `id`");
    }
    if fields.get("jsonrpc").and_then(Value::as_str) != Some("2.0") {
        return invalid(id.as_ref(), "expected `\"jsonrpc\": \"2.0\"`");
    }
    let Some(Value::String(method)) = fields.remove("method") else {
        return invalid(id.as_ref(), "expected the name of a method as `method`");
    };
    Ok(Call { id, method, params: fields.remove("params").unwrap_or(Value::Null) })
}

/// Answers a text that is a request or a batch of them; none if no answer is wanted.
pub(super) async fn respond(handle: &ControlHandle, value: Value) -> Option<Value> {
    let batch = match value {
        Value::Array(batch) if batch.is_empty() || batch.len() > MAX_BATCH => {
            let message = format!("expected a batch of 1 to {MAX_BATCH} requests, found {}", batch.len());
            let error = RpcError::new(RpcError::INVALID_REQUEST, message);
            return Some(response(&Value::Null, Err(error)));
        }
        Value::Array(batch) => batch,
        single => return answer(start(handle, single)).await,
    };
    // All are asked before the first is waited for.
    let asked: Vec<_> = batch.into_iter().map(|value| start(handle, value)).collect();
    let mut answers = Vec::new();
    for asked in asked {
        answers.extend(answer(asked).await);
    }
    (!answers.is_empty()).then_some(Value::Array(answers))
}

type Asked = Result<(Option<Value>, oneshot::Receiver<RpcResult>), Value>;

fn start(handle: &ControlHandle, value: Value) -> Asked {
    let Call { id, method, params } = call(value)?;
    let (sender, receiver) = oneshot::channel();
    handle.call_with(method, params, move |result| {
        // Whoever asked may have gone.
        let _ = sender.send(result);
    });
    Ok((id, receiver))
}

/// Asks, and waits for the answer.
pub(super) async fn ask(handle: &ControlHandle, method: &str, params: Value) -> RpcResult {
    let (sender, receiver) = oneshot::channel();
    handle.call_with(method, params, move |result| {
        // Whoever asked may have gone.
        let _ = sender.send(result);
    });
    wait(receiver).await
}

async fn answer(asked: Asked) -> Option<Value> {
    let (id, receiver) = match asked {
        Ok(asked) => asked,
        Err(answer) => return Some(answer),
    };
    let id = id?;
    Some(response(&id, wait(receiver).await))
}

async fn wait(receiver: oneshot::Receiver<RpcResult>) -> RpcResult {
    match tokio::time::timeout(ANSWER_PATIENCE, receiver).await {
        Ok(answered) => answered.unwrap_or_else(|_| Err(RpcError::over())),
        Err(_) => Err(RpcError::new(
            RpcError::BUSY,
            format!(
                "no answer within {} s; what was asked may still be done after the step at hand",
                ANSWER_PATIENCE.as_secs()
            ),
        )),
    }
}

#[cfg(test)]
mod tests {
    #![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

    use serde_json::json;

    use super::*;
    use crate::control;

    /// What a text comes to if nobody answers.
    fn check(text: &str) -> Option<Value> {
        let (handle, inbox) = control::channel();
        drop(inbox);
        let runtime = tokio::runtime::Builder::new_current_thread().enable_time().build().unwrap();
        match parse(text.as_bytes()) {
            Ok(value) => runtime.block_on(respond(&handle, value)),
            Err(answer) => Some(answer),
        }
    }

    fn code(answer: &Value) -> i64 {
        answer["error"]["code"].as_i64().unwrap()
    }

    #[test]
    fn what_is_no_request_is_answered_as_the_standard_says() {
        for (text, want, id) in [
            ("{", RpcError::PARSE, json!(null)),
            ("", RpcError::PARSE, json!(null)),
            ("\u{0}", RpcError::PARSE, json!(null)),
            ("[]", RpcError::INVALID_REQUEST, json!(null)),
            ("7", RpcError::INVALID_REQUEST, json!(null)),
            (r#"{"jsonrpc":"1.0","method":"a","id":1}"#, RpcError::INVALID_REQUEST, json!(1)),
            (r#"{"jsonrpc":"2.0","method":7,"id":"x"}"#, RpcError::INVALID_REQUEST, json!("x")),
            (r#"{"jsonrpc":"2.0","method":"a","id":[1]}"#, RpcError::INVALID_REQUEST, json!(null)),
            (r#"{"jsonrpc":"2.0","method":"run.status","id":3}"#, RpcError::OVER, json!(3)),
        ] {
            let answer = check(text).unwrap();
            assert_eq!((code(&answer), &answer["id"]), (want, &id), "{text}: {answer}");
        }
        assert_eq!(check(r#"{"jsonrpc":"2.0","method":"run.status"}"#), None, "no id, no answer");
        let deep = "[".repeat(100_000);
        assert_eq!(code(&check(&deep).unwrap()), RpcError::PARSE);
    }

    #[test]
    fn a_batch_is_answered_as_one() {
        let answers = check(r#"[1, {"jsonrpc":"2.0","method":"a","id":1}, {"jsonrpc":"2.0","method":"b"}]"#).unwrap();
        let codes: Vec<_> = answers.as_array().unwrap().iter().map(code).collect();
        assert_eq!(codes, [RpcError::INVALID_REQUEST, RpcError::OVER]);
        let many = json!(vec![0; MAX_BATCH + 1]).to_string();
        assert_eq!(code(&check(&many).unwrap()), RpcError::INVALID_REQUEST);
    }
}
