//! `POST /v1/embeddings`: texts as vectors, the mean of the model's last hidden states.

use std::sync::Arc;

use axum::{body::Body, extract::State, http::HeaderMap, response::Response};
use base64::{Engine, prelude::BASE64_STANDARD};
use serde_json::{Value, json};

use super::{
    app::{App, Generation, encode},
    error::{ApiError, ApiResult, json_response},
    sampling::prompts,
};
use crate::serve::Task;

/// Answers the request.
pub(super) async fn embed(State(app): State<Arc<App>>, headers: HeaderMap, body: Body) -> ApiResult<Response> {
    let (mut fields, loaded) = app.open(&headers, body).await?;
    let width = loaded.service.settings().hidden_size;
    fields.count("dimensions", width, width)?;
    let is_base64 = match fields.text("encoding_format")?.as_deref() {
        None | Some("float") => false,
        Some("base64") => true,
        Some(other) => {
            let message = format!("expected `float` or `base64`; found `{}`", &other[..other.floor_char_boundary(60)]);
            return Err(ApiError::param("encoding_format", message));
        }
    };
    let input = fields.take("input").ok_or_else(|| ApiError::param("input", "expected texts; found none"))?;
    let prompts = prompts("input", input, app.config.max_choices)?;
    let prompts = encode(&loaded, prompts, true).await?;
    let submit = |prompt| app.submit(&loaded, prompt, Task::Embed, 0);
    let answers = prompts.into_iter().map(submit).collect::<ApiResult<Vec<Generation>>>()?;
    let (mut data, mut num_tokens) = (Vec::new(), 0);
    for (index, answer) in answers.into_iter().enumerate() {
        let (embedding, of_text) = answer.embedding().await?;
        num_tokens += of_text;
        let embedding = if is_base64 {
            let bytes: Vec<u8> = embedding.iter().flat_map(|number| number.to_le_bytes()).collect();
            Value::from(BASE64_STANDARD.encode(bytes))
        } else {
            embedding.into()
        };
        data.push(json!({ "object": "embedding", "index": index, "embedding": embedding }));
    }
    Ok(json_response(&json!({
        "object": "list",
        "data": data,
        "model": app.config.model_name,
        "usage": { "prompt_tokens": num_tokens, "total_tokens": num_tokens },
    })))
}
