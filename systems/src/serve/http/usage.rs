//! How many tokens a request took.

use serde_json::{Value, json};

use crate::serve::Finish;

/// Counts over a request's answers.
#[derive(Clone, Debug, Default)]
pub(super) struct Usage {
    num_prompt_tokens: usize,
    num_cached_tokens: usize,
    num_generated_tokens: usize,
}

impl Usage {
    /// Counts an answer; its prompt only once, however many answers it gets.
    pub(super) fn count(&mut self, finish: &Finish, is_first_of_prompt: bool) {
        self.num_generated_tokens += finish.num_generated_tokens;
        if is_first_of_prompt {
            self.num_prompt_tokens += finish.num_prompt_tokens;
            self.num_cached_tokens += finish.num_cached_tokens;
        }
    }

    /// OpenAI's object.
    pub(super) fn body(&self) -> Value {
        json!({
            "prompt_tokens": self.num_prompt_tokens,
            "completion_tokens": self.num_generated_tokens,
            "total_tokens": self.num_prompt_tokens + self.num_generated_tokens,
            "prompt_tokens_details": { "cached_tokens": self.num_cached_tokens },
        })
    }
}
