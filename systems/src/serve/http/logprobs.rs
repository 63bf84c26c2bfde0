//! What the model thought of the tokens it chose, in the shapes of OpenAI's two interfaces.
//!
//! A token that is a part of a character has no text: its bytes are written out, as OpenAI does.

use serde_json::{Map, Value, json};

use crate::{
    data::tokenizer::Tokenizer,
    serve::{Logprob, Token},
};

/// A token's text, or `bytes:\xe2\x80` if it is none.
pub(super) fn text_of(tokenizer: &Tokenizer, id: u32) -> String {
    let bytes = tokenizer.bytes_of(id, false);
    match std::str::from_utf8(bytes) {
        Ok(text) => text.to_owned(),
        Err(_) => bytes.iter().fold("bytes:".to_owned(), |text, byte| format!("{text}\\x{byte:02x}")),
    }
}

/// JSON has no infinities; this is what vLLM writes in their place.
fn finite(logprob: f32) -> f32 {
    if logprob.is_nan() { -9999.0 } else { logprob.clamp(-9999.0, 9999.0) }
}

/// For chats: the entries of `logprobs.content`.
pub(super) fn of_chat<'a>(tokenizer: &Tokenizer, tokens: impl IntoIterator<Item = &'a Token>) -> Value {
    let entry = |id: u32, logprob: f32| json!({ "token": text_of(tokenizer, id), "logprob": finite(logprob), "bytes": tokenizer.bytes_of(id, false) });
    let one = |token: &Token| {
        let Logprob { token: own, top } = token.logprob.clone()?;
        let mut content = entry(token.id, own);
        content["top_logprobs"] = top.iter().map(|&(id, logprob)| entry(id, logprob)).collect();
        Some(content)
    };
    json!({ "content": tokens.into_iter().filter_map(one).collect::<Vec<_>>(), "refusal": null })
}

/// For completions: parallel lists. Knows how long the answer is so far.
#[derive(Clone, Debug, Default)]
pub(super) struct Offsets {
    /// Characters that have begun.
    num_chars: usize,
}

impl Offsets {
    /// The lists for the next tokens of an answer.
    pub(super) fn of_completion<'a>(
        &mut self,
        tokenizer: &Tokenizer,
        tokens: impl IntoIterator<Item = &'a Token>,
    ) -> Value {
        let (mut texts, mut own, mut tops, mut offsets) = (Vec::new(), Vec::new(), Vec::new(), Vec::new());
        for token in tokens {
            let Some(logprob) = &token.logprob else { continue };
            let mut top = Map::new();
            // The chosen token is among them, whether it is likely or not.
            for &(id, logprob) in logprob.top.iter().chain([&(token.id, logprob.token)]) {
                top.entry(text_of(tokenizer, id)).or_insert_with(|| finite(logprob).into());
            }
            texts.push(text_of(tokenizer, token.id));
            own.push(finite(logprob.token));
            tops.push(top);
            offsets.push(self.num_chars);
            let begins = |byte: &&u8| **byte & 0xc0 != 0x80;
            self.num_chars += tokenizer.bytes_of(token.id, false).iter().filter(begins).count();
        }
        json!({ "tokens": texts, "token_logprobs": own, "top_logprobs": tops, "text_offset": offsets })
    }
}
