//! What is asked of a serving model, and what it answers, as plain data: no protocol and no tensor.

use std::sync::Arc;

use serde::Serialize;

use super::grammar::Grammar;

/// How a text goes on.
#[derive(Clone, Debug)]
pub struct Params {
    /// Tokens to generate at most.
    pub max_tokens: usize,
    /// Divisor of the logits; 0 takes the likeliest token.
    pub temperature: f64,
    /// Choose among so many likeliest tokens; 0 for all.
    pub top_k: usize,
    /// Choose among the likeliest tokens that together have this probability.
    pub top_p: f64,
    /// Choose among tokens with at least this share of the likeliest one's probability; 0 for all.
    pub min_p: f64,
    /// Divides positive logits of tokens that occurred (prompt included), and multiplies negative ones; 1 for none.
    pub repetition_penalty: f64,
    /// Taken from the logit of each token that was generated; 0 for none.
    pub presence_penalty: f64,
    /// Taken from a token's logit for each time that it was generated; 0 for none.
    pub frequency_penalty: f64,
    /// Added to logits, by token.
    pub logit_bias: Vec<(u32, f64)>,
    /// Seed of the choice: the same seed gives the same text, whatever else the model is asked at the time.
    pub seed: u64,
    /// How many likeliest tokens to report with each generated one, beside that one itself; `None` reports nothing.
    pub logprobs: Option<usize>,
    /// Texts that end the answer, and are not part of it.
    pub stop: Vec<String>,
    /// Tokens that end the answer, beside the end of text.
    pub stop_tokens: Vec<u32>,
    /// Go on after the end-of-text token.
    pub ignore_eos: bool,
    /// What the text must be like.
    pub grammar: Option<Arc<Grammar>>,
}

impl Default for Params {
    fn default() -> Self {
        Params {
            max_tokens: 16,
            temperature: 1.0,
            top_k: 0,
            top_p: 1.0,
            min_p: 0.0,
            repetition_penalty: 1.0,
            presence_penalty: 0.0,
            frequency_penalty: 0.0,
            logit_bias: Vec::new(),
            seed: 0,
            logprobs: None,
            stop: Vec::new(),
            stop_tokens: Vec::new(),
            ignore_eos: false,
            grammar: None,
        }
    }
}

/// What is wanted of a prompt.
#[derive(Clone, Debug)]
pub enum Task {
    /// What comes after it.
    Generate(Params),
    /// Its mean last hidden state, normed, f32 \[d\].
    Embed,
}

/// A request as it comes in.
pub struct Submission {
    /// Tokens; at least one.
    pub prompt: Vec<u32>,
    /// What is wanted.
    pub task: Task,
    /// Requests of higher priority are admitted first; 0 for most.
    pub priority: i32,
    /// Who is told. If it says that nobody listens, the request ends.
    pub sink: Box<dyn Sink>,
}

/// Who is told what happens to a request. Calls come from the model's thread: they must not block.
pub trait Sink: Send + Sync {
    /// Takes an event; false if nobody listens any more.
    fn send(&mut self, event: Event) -> bool;
}

impl<F: FnMut(Event) -> bool + Send + Sync> Sink for F {
    fn send(&mut self, event: Event) -> bool {
        self(event)
    }
}

/// What happens to a request. The last one is `Finished`, `Embedding` or `Failed`.
#[derive(Clone, Debug)]
pub enum Event {
    /// A token was chosen.
    Token(Token),
    /// It is done, and this comes last.
    Finished(Finish),
    /// The embedding that was asked for, with the prompt's number of tokens.
    Embedding(Vec<f32>, usize),
    /// It could not be done: a sentence for whoever asked.
    Failed(String),
}

/// A generated token.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Token {
    /// Which.
    pub id: u32,
    /// Text that is certain from here on: whole characters, and no beginning of a stop text. May be empty.
    pub text: String,
    /// What the model thought of it, if asked.
    pub logprob: Option<Logprob>,
}

/// Log-probabilities, in nats, before temperature, penalties and biases.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Logprob {
    /// Of the token itself.
    pub token: f32,
    /// The likeliest tokens, most likely first.
    pub top: Vec<(u32, f32)>,
}

/// Why an answer ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum FinishReason {
    /// The end of text, a stop text or token, or the end of what a grammar allows.
    Stop,
    /// As long as was asked for, or as the model's context.
    Length,
    /// Nobody listened any more.
    Cancelled,
}

/// How an answer ended.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Finish {
    /// Why.
    pub reason: FinishReason,
    /// Text that was held back as the possible beginning of a stop text, and is none.
    pub text: String,
    /// Tokens of the prompt.
    pub num_prompt_tokens: usize,
    /// Those of them that were found in the cache.
    pub num_cached_tokens: usize,
    /// Generated tokens, an ending one included.
    pub num_generated_tokens: usize,
    /// Tokens that the model proposed to itself, and those of them that were right.
    pub num_drafted_tokens: usize,
    /// See `num_drafted_tokens`.
    pub num_accepted_tokens: usize,
    /// From submission to the first computed token.
    pub queue_secs: f64,
    /// From there to the first generated token.
    pub prefill_secs: f64,
    /// From there to the last.
    pub decode_secs: f64,
}
