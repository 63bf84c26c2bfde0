//! `POST /v1/chat/completions`: the next message of a chat.

use std::sync::Arc;

use axum::{Extension, body::Body, extract::State, http::HeaderMap, response::Response};
use serde_json::{Value, json};

use super::{
    access::Deadline,
    app::{App, Generation, aside, tokens_of},
    config::Loaded,
    error::{ApiError, ApiResult, json_response},
    fields::Fields,
    frame::Frame,
    grammar, logprobs,
    messages::Chat,
    sampling::{Common, MAX_LOGPROBS, Prompt, common},
    stream::{self, Pieces},
    tools::{self, CallParser, Part},
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
    let max_context_tokens = loaded.service.settings().max_context_tokens;
    let older = fields.count("max_tokens", 1, max_context_tokens)?;
    let max_tokens = fields.count("max_completion_tokens", 1, max_context_tokens)?.or(older);
    params.stop.extend(loaded.chat.stops().iter().map(|&text| text.to_owned()));
    params.logprobs = likeliest(&mut fields)?;
    params.grammar = grammar::of_request(&mut fields, &loaded).await?;
    let chat = Chat::read(&mut fields)?;
    let has_tools = chat.tools.is_some();
    let prompt = encode(&loaded, chat).await?;
    // All that there is room for; a prompt without room is refused with its numbers.
    params.max_tokens = max_tokens.unwrap_or(max_context_tokens.saturating_sub(prompt.len()).max(1));
    let submit = |choice: usize| {
        let seed = params.seed.wrapping_add(choice as u64);
        app.submit(&loaded, prompt.clone(), Task::Generate(Params { seed, ..params.clone() }), priority)
    };
    let answers = (0..num_choices).map(submit).collect::<ApiResult<Vec<Generation>>>()?;
    let object = if is_stream { "chat.completion.chunk" } else { "chat.completion" };
    let mut frame = Frame::new("chatcmpl", object, &app.config.model_name, includes_usage);
    let parser = || has_tools.then(CallParser::default);
    if is_stream {
        let form = Form {
            tokenizer: loaded.tokenizer.clone(),
            frame,
            has_logprobs: params.logprobs.is_some(),
            parsers: (0..num_choices).map(|_| parser()).collect(),
            num_calls: vec![0; num_choices],
        };
        return Ok(stream::respond(&app, deadline, answers, form));
    }
    let mut choices = Vec::new();
    for (index, answer) in answers.into_iter().enumerate() {
        let answer = answer.collect().await?;
        frame.usage.count(&answer.finish, index == 0);
        let (message, has_calls) = message(&answer.text(), parser());
        let logprobs = match params.logprobs {
            Some(_) => logprobs::of_chat(&loaded.tokenizer, &answer.tokens),
            None => Value::Null,
        };
        let finish_reason = finish_reason(&answer.finish, has_calls);
        choices.push(json!({
            "index": index, "message": message, "logprobs": logprobs, "finish_reason": finish_reason
        }));
    }
    Ok(json_response(&frame.whole(choices)))
}

/// How many likeliest tokens are wanted with each.
fn likeliest(fields: &mut Fields) -> ApiResult<Option<usize>> {
    let is_wanted = fields.flag("logprobs")?.unwrap_or(false);
    match fields.count("top_logprobs", 0, MAX_LOGPROBS)? {
        Some(_) if !is_wanted => Err(ApiError::param("top_logprobs", "expected only together with `logprobs: true`")),
        count => Ok(is_wanted.then(|| count.unwrap_or(0))),
    }
}

/// A chat as the model's tokens, by its template.
pub(super) async fn encode(loaded: &Arc<Loaded>, chat: Chat) -> ApiResult<Vec<u32>> {
    let loaded = loaded.clone();
    aside(move || {
        let Chat { messages, tools, options, is_open } = chat;
        let text = loaded.chat.render(&messages, tools.as_deref(), &options, is_open);
        let text = text.map_err(|why| ApiError::param("messages", format!("the chat template refuses them: {why}")))?;
        // The template says what comes first.
        tokens_of(&loaded, Prompt::Text(text), false)
    })
    .await
}

/// An answer as a message, and whether it calls tools.
fn message(text: &str, parser: Option<CallParser>) -> (Value, bool) {
    let Some(mut parser) = parser else { return (json!({ "role": "assistant", "content": text }), false) };
    let mut parts = parser.push(text);
    parts.extend(parser.finish());
    let (mut content, mut calls) = (String::new(), Vec::new());
    for part in parts {
        match part {
            Part::Text(text) => content.push_str(&text),
            Part::Call { name, arguments } => calls.push(tools::body(&name, &arguments, None)),
        }
    }
    let has_calls = !calls.is_empty();
    let mut message = json!({ "role": "assistant", "content": content });
    if has_calls {
        if content.trim().is_empty() {
            message["content"] = Value::Null;
        }
        message["tool_calls"] = calls.into();
    }
    (message, has_calls)
}

fn finish_reason(finish: &Finish, has_calls: bool) -> Value {
    if has_calls { "tool_calls".into() } else { json!(finish.reason) }
}

/// How answers are written in pieces.
struct Form {
    tokenizer: Arc<Tokenizer>,
    frame: Frame,
    has_logprobs: bool,
    /// By answer, if there are tools to call.
    parsers: Vec<Option<CallParser>>,
    num_calls: Vec<usize>,
}

impl Form {
    fn delta(&self, index: usize, delta: Value, logprobs: Value) -> Value {
        self.frame.piece(json!([{ "index": index, "delta": delta, "logprobs": logprobs, "finish_reason": null }]))
    }

    /// Pieces of what is certain; the log-probabilities go with the first.
    fn deltas(&mut self, index: usize, parts: Vec<Part>, mut logprobs: Value) -> Vec<Value> {
        let mut pieces = Vec::new();
        for part in parts {
            let delta = match part {
                Part::Text(text) => json!({ "content": text }),
                Part::Call { name, arguments } => {
                    let place = self.num_calls[index];
                    self.num_calls[index] += 1;
                    json!({ "tool_calls": [tools::body(&name, &arguments, Some(place))] })
                }
            };
            pieces.push(self.delta(index, delta, logprobs.take()));
        }
        if !logprobs.is_null() {
            pieces.push(self.delta(index, json!({ "content": "" }), logprobs));
        }
        pieces
    }

    fn parts(&mut self, index: usize, text: String) -> Vec<Part> {
        match &mut self.parsers[index] {
            Some(parser) => parser.push(&text),
            None if text.is_empty() => Vec::new(),
            None => vec![Part::Text(text)],
        }
    }
}

impl Pieces for Form {
    fn begin(&mut self) -> Vec<Value> {
        let begin = |index| self.delta(index, json!({ "role": "assistant", "content": "" }), Value::Null);
        (0..self.parsers.len()).map(begin).collect()
    }

    fn token(&mut self, index: usize, token: Token) -> Vec<Value> {
        let logprobs = if self.has_logprobs { logprobs::of_chat(&self.tokenizer, [&token]) } else { Value::Null };
        let parts = self.parts(index, token.text);
        self.deltas(index, parts, logprobs)
    }

    fn finish(&mut self, index: usize, finish: Finish) -> Vec<Value> {
        self.frame.usage.count(&finish, index == 0);
        let mut parts = self.parts(index, finish.text.clone());
        parts.extend(self.parsers[index].iter_mut().flat_map(CallParser::finish));
        let mut pieces = self.deltas(index, parts, Value::Null);
        let finish_reason = finish_reason(&finish, self.num_calls[index] > 0);
        pieces.push(self.frame.piece(json!([
            { "index": index, "delta": {}, "logprobs": null, "finish_reason": finish_reason }
        ])));
        pieces
    }

    fn end(&mut self) -> Vec<Value> {
        self.frame.end()
    }
}
