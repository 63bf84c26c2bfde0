//! How an answer is to go on: OpenAI's fields, and those that vLLM added to them.

use serde_json::Value;

use super::{
    config::Loaded,
    error::{ApiError, ApiResult},
    fields::{Fields, expected, tokens},
    random,
};
use crate::serve::Params;
pub(super) use crate::serve::step::MAX_LOGPROBS;

/// Stop texts of a request at most.
const MAX_STOPS: usize = 4;

/// What both ways to ask for text have in common.
pub(super) struct Common {
    /// How the text goes on; `max_tokens` and `logprobs` are the caller's.
    pub(super) params: Params,
    /// Answers to each prompt.
    pub(super) num_choices: usize,
    /// Whether the answer comes in pieces.
    pub(super) is_stream: bool,
    /// Whether the last piece says how many tokens there were.
    pub(super) includes_usage: bool,
    /// Requests of higher priority are admitted first.
    pub(super) priority: i32,
}

/// Reads them.
pub(super) fn common(fields: &mut Fields, loaded: &Loaded, max_choices: usize) -> ApiResult<Common> {
    // Of no use here, and refused all the same if it is no text.
    fields.text("user")?;
    let num_choices = fields.count("n", 1, max_choices)?.unwrap_or(1);
    if let Some(best_of) = fields.count("best_of", 1, max_choices)?
        && best_of != num_choices
    {
        let message = format!("expected as many as `n`, which is {num_choices}; found {best_of}");
        return Err(ApiError::param("best_of", message));
    }
    let is_stream = fields.flag("stream")?.unwrap_or(false);
    let options = fields.within("stream_options")?;
    if options.is_some() && !is_stream {
        return Err(ApiError::param("stream_options", "expected only together with `stream: true`"));
    }
    let includes_usage = options.unwrap_or_default().flag("include_usage")?.unwrap_or(false);
    let defaults = Params::default();
    let temperature = fields.number("temperature", 0.0..=2.0)?.unwrap_or(defaults.temperature);
    // 0 leaves the likeliest token, as the least number above it does.
    let top_p = fields.number("top_p", 0.0..=1.0)?.unwrap_or(defaults.top_p).max(1e-9);
    let top_k = fields.integer("top_k", -1..=i128::from(u32::MAX))?.unwrap_or(0).max(0) as usize;
    let mut stop_tokens = loaded.stop_tokens.clone();
    stop_tokens.extend(fields.tokens("stop_token_ids")?.unwrap_or_default());
    let params = Params {
        temperature,
        top_k,
        top_p,
        min_p: fields.number("min_p", 0.0..=1.0)?.unwrap_or(defaults.min_p),
        repetition_penalty: fields.number("repetition_penalty", 0.01..=100.0)?.unwrap_or(defaults.repetition_penalty),
        presence_penalty: fields.number("presence_penalty", -2.0..=2.0)?.unwrap_or(0.0),
        frequency_penalty: fields.number("frequency_penalty", -2.0..=2.0)?.unwrap_or(0.0),
        logit_bias: biases(fields, loaded.service.settings().vocab_size)?,
        seed: seed(fields)?,
        stop: stops(fields)?,
        stop_tokens,
        ignore_eos: fields.flag("ignore_eos")?.unwrap_or(false),
        ..defaults
    };
    let priority = fields.integer("priority", i128::from(i32::MIN)..=i128::from(i32::MAX))?.unwrap_or(0) as i32;
    Ok(Common { params, num_choices, is_stream, includes_usage, priority })
}

/// The seed of the request, or one that nobody had before.
fn seed(fields: &mut Fields) -> ApiResult<u64> {
    let given = fields.integer("seed", i128::from(i64::MIN)..=i128::from(u64::MAX))?;
    // Below 0 there are as many as above the half of what 64 bits hold.
    Ok(given.map_or_else(random::number, |seed| seed as u64))
}

fn stops(fields: &mut Fields) -> ApiResult<Vec<String>> {
    let texts = match fields.take("stop") {
        None => return Ok(Vec::new()),
        Some(Value::Array(items)) => items,
        Some(other) => vec![other],
    };
    if texts.len() > MAX_STOPS {
        return Err(expected("stop", &format!("at most {MAX_STOPS} texts"), &texts.into()));
    }
    let text = |value: Value| match value {
        Value::String(text) if !text.is_empty() => Ok(text),
        other => Err(expected("stop", "a text that is not empty, or a list of such", &other)),
    };
    texts.into_iter().map(text).collect()
}

fn biases(fields: &mut Fields, vocab_size: usize) -> ApiResult<Vec<(u32, f64)>> {
    let Some(map) = fields.object("logit_bias")? else { return Ok(Vec::new()) };
    let bias = |(token, bias): (String, Value)| {
        let id = token.parse::<u32>().ok().filter(|&id| (id as usize) < vocab_size);
        let what = format!("tokens from 0 to {} as names", vocab_size.saturating_sub(1));
        let id = id.ok_or_else(|| expected("logit_bias", &what, &Value::from(token)))?;
        let value = bias.as_f64().filter(|bias| (-100.0..=100.0).contains(bias));
        Ok((id, value.ok_or_else(|| expected("logit_bias", "numbers from -100 to 100", &bias))?))
    };
    map.into_iter().map(bias).collect()
}

/// A prompt as it may be given.
#[derive(Clone, Debug, PartialEq)]
pub(super) enum Prompt {
    /// Text, in which names of special tokens stand for them.
    Text(String),
    /// Tokens, taken as they are.
    Tokens(Vec<u32>),
}

/// A text, a list of texts, a list of tokens, or a list of lists of tokens.
pub(super) fn prompts(name: &str, value: Value, most: usize) -> ApiResult<Vec<Prompt>> {
    let what = "a text, a list of texts, a list of tokens, or a list of lists of tokens";
    let items = match value {
        Value::String(text) => return Ok(vec![Prompt::Text(text)]),
        Value::Array(items) => items,
        other => return Err(expected(name, what, &other)),
    };
    if items.is_empty() {
        return Err(ApiError::param(name, "expected at least one prompt; found an empty list"));
    }
    if items[0].is_number() {
        return Ok(vec![Prompt::Tokens(tokens(name, &items)?)]);
    }
    if items.len() > most {
        return Err(expected(name, &format!("at most {most} prompts"), &items.into()));
    }
    let prompt = |item: Value| match item {
        Value::String(text) => Ok(Prompt::Text(text)),
        Value::Array(ids) => tokens(name, &ids).map(Prompt::Tokens),
        other => Err(expected(name, what, &other)),
    };
    items.into_iter().map(prompt).collect()
}
