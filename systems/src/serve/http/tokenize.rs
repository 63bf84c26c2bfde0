//! `POST /tokenize` and `POST /detokenize`, in vLLM's shapes.

use std::sync::Arc;

use axum::{body::Body, extract::State, http::HeaderMap, response::Response};
use serde_json::{Value, json};

use super::{
    app::{App, aside, encode},
    chat_completions,
    error::{ApiError, ApiResult, json_response},
    logprobs,
    messages::Chat,
    sampling::Prompt,
};

/// Tokens of a `prompt` (or `text`), or of `messages` under the chat template.
pub(super) async fn tokenize(State(app): State<Arc<App>>, headers: HeaderMap, body: Body) -> ApiResult<Response> {
    let (mut fields, loaded) = app.open(&headers, body).await?;
    let has_texts = fields.flag("return_token_strs")?.unwrap_or(false);
    let begins = fields.flag("add_special_tokens")?.unwrap_or(true);
    let prompt = fields.text("prompt")?;
    let tokens = match prompt.or(fields.text("text")?) {
        Some(text) => encode(&loaded, vec![Prompt::Text(text)], begins).await?.concat(),
        None if fields.has("messages") => chat_completions::encode(&loaded, Chat::read(&mut fields)?).await?,
        None => return Err(ApiError::param("prompt", "expected a `prompt`, or `messages`; found neither")),
    };
    let texts: Option<Vec<String>> =
        has_texts.then(|| tokens.iter().map(|&id| logprobs::text_of(&loaded.tokenizer, id)).collect());
    Ok(json_response(&json!({
        "count": tokens.len(),
        "max_model_len": loaded.service.settings().max_context_tokens,
        "tokens": tokens,
        "token_strs": texts,
    })))
}

/// The text of `tokens`.
pub(super) async fn detokenize(State(app): State<Arc<App>>, headers: HeaderMap, body: Body) -> ApiResult<Response> {
    let (mut fields, loaded) = app.open(&headers, body).await?;
    let tokens = fields.tokens("tokens")?.ok_or_else(|| ApiError::param("tokens", "expected tokens; found none"))?;
    let vocab_size = loaded.service.settings().vocab_size;
    if let Some(token) = tokens.iter().find(|&&token| token as usize >= vocab_size) {
        return Err(ApiError::param("tokens", format!("expected tokens below {vocab_size}; found {token}")));
    }
    let text = aside(move || Ok(loaded.tokenizer.decode(&tokens, false))).await?;
    Ok(json_response(&json!({ "prompt": Value::from(text) })))
}
