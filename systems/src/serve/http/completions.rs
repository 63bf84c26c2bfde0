//! `POST /v1/completions`: texts that go on.

use std::sync::Arc;

use axum::{Extension, body::Body, extract::State, http::HeaderMap, response::Response};
use serde_json::{Value, json};

use super::{
    access::Deadline,
    app::{App, Generation, encode},
    error::{ApiError, ApiResult, json_response},
    fields::Fields,
    frame::Frame,
    grammar,
    logprobs::Offsets,
    sampling::{Common, MAX_LOGPROBS, common, prompts},
    stream::{self, Pieces},
};
use crate::{
    data::tokenizer::Tokenizer,
    serve::{Finish, Params, Task, Token},
};

/// Answers the request.
pub(super) async fn complete(
    State(app): State<Arc<App>>,
    Extension(Deadline(deadline)): Extension<Deadline>,
    headers: HeaderMap,
    body: Body,
) -> ApiResult<Response> {
    let (mut fields, loaded) = app.open(&headers, body).await?;
    let Common { mut params, num_choices, is_stream, includes_usage, priority } =
        common(&mut fields, &loaded, app.config.max_choices)?;
    refuse_unknown_ways(&mut fields)?;
    let max_context_tokens = loaded.service.settings().max_context_tokens;
    let max_tokens = fields.count("max_tokens", 1, max_context_tokens)?;
    params.logprobs = fields.count("logprobs", 0, MAX_LOGPROBS)?;
    params.grammar = grammar::of_request(&mut fields, &loaded).await?;
    let begins = fields.flag("add_special_tokens")?.unwrap_or(true);
    let prompt = fields.take("prompt").ok_or_else(|| ApiError::param("prompt", "expected a prompt; found none"))?;
    let prompts = prompts("prompt", prompt, app.config.max_choices)?;
    if prompts.len() * num_choices > app.config.max_choices {
        let message = format!(
            "expected at most {} answers; found {} prompts with `n` {num_choices}",
            app.config.max_choices,
            prompts.len()
        );
        return Err(ApiError::param("n", message));
    }
    let mut answers: Vec<Generation> = Vec::new();
    for prompt in encode(&loaded, prompts, begins).await? {
        let room = max_context_tokens.saturating_sub(prompt.len()).max(1);
        let max_tokens = max_tokens.unwrap_or(Params::default().max_tokens.min(room));
        for choice in 0..num_choices {
            let seed = params.seed.wrapping_add(choice as u64);
            let task = Task::Generate(Params { max_tokens, seed, ..params.clone() });
            answers.push(app.submit(&loaded, prompt.clone(), task, priority)?);
        }
    }
    let mut form = Form {
        tokenizer: loaded.tokenizer.clone(),
        frame: Frame::new("cmpl", "text_completion", &app.config.model_name, includes_usage),
        num_choices,
        offsets: params.logprobs.map(|_| vec![Offsets::default(); answers.len()]),
    };
    if is_stream {
        return Ok(stream::respond(&app, deadline, answers, form));
    }
    let mut choices = Vec::new();
    for (index, answer) in answers.into_iter().enumerate() {
        let answer = answer.collect().await?;
        let text = answer.text();
        let logprobs = form.logprobs(index, &answer.tokens);
        form.frame.usage.count(&answer.finish, index.is_multiple_of(num_choices));
        choices.push(choice(index, &text, logprobs, Some(&answer.finish)));
    }
    Ok(json_response(&form.frame.whole(choices)))
}

/// What this server does not do is said, and not left out.
fn refuse_unknown_ways(fields: &mut Fields) -> ApiResult<()> {
    if fields.flag("echo")? == Some(true) {
        return Err(ApiError::param("echo", "expected false: prompts are not repeated here; the client has them"));
    }
    if fields.text("suffix")?.is_some_and(|suffix| !suffix.is_empty()) {
        return Err(ApiError::param(
            "suffix",
            "expected none: this model goes on with a text, and does not fill a gap",
        ));
    }
    Ok(())
}

fn choice(index: usize, text: &str, logprobs: Value, finish: Option<&Finish>) -> Value {
    json!({ "index": index, "text": text, "logprobs": logprobs, "finish_reason": finish.map(|finish| finish.reason) })
}

/// How answers are written.
struct Form {
    tokenizer: Arc<Tokenizer>,
    frame: Frame,
    num_choices: usize,
    offsets: Option<Vec<Offsets>>,
}

impl Form {
    fn logprobs<'a>(&mut self, index: usize, tokens: impl IntoIterator<Item = &'a Token>) -> Value {
        match &mut self.offsets {
            Some(offsets) => offsets[index].of_completion(&self.tokenizer, tokens),
            None => Value::Null,
        }
    }
}

impl Pieces for Form {
    fn begin(&mut self) -> Vec<Value> {
        Vec::new()
    }

    fn token(&mut self, index: usize, token: Token) -> Vec<Value> {
        let logprobs = self.logprobs(index, [&token]);
        if token.text.is_empty() && logprobs.is_null() {
            return Vec::new();
        }
        vec![self.frame.piece(json!([choice(index, &token.text, logprobs, None)]))]
    }

    fn finish(&mut self, index: usize, finish: Finish) -> Vec<Value> {
        self.frame.usage.count(&finish, index.is_multiple_of(self.num_choices));
        vec![self.frame.piece(json!([choice(index, &finish.text, Value::Null, Some(&finish))]))]
    }

    fn end(&mut self) -> Vec<Value> {
        self.frame.end()
    }
}
