//! What a text must be like: a JSON schema, compiled for a tokenizer.
//!
//! The llguidance crate does the work: from a schema it makes a grammar, and from the grammar and the text so far the set of tokens
//! that may come next, as a bit for each token of the vocabulary. Sampling among these cannot leave the schema, whatever the model.
//! What the crate cannot express is an error, and not left out. Schemas come from whoever asks, so their size, what they are compiled to,
//! and the work for each token are bounded; the error says where in the schema the trouble is.

use std::sync::Arc;

use llguidance::{
    Matcher, ParserFactory,
    api::{ParserLimits, TopLevelGrammar},
    earley::SlicedBiasComputer,
    toktrie::{ApproximateTokEnv, InferenceCapabilities, TokEnv, TokRxInfo, TokTrie},
};
use serde_json::{Value, json};

use crate::data::tokenizer::Tokenizer;

mod blame;

/// Bytes of a schema as JSON, at most.
pub const MAX_SCHEMA_BYTES: usize = 128 << 10;

/// Values within values of a schema, at most.
pub const MAX_SCHEMA_DEPTH: usize = 64;

/// White space between two parts of a JSON text: enough to indent, and not without end.
const WHITE_SPACE: &str = r"[\x20\x0A\x0D\x09]{1,32}";

/// What a tokenizer's tokens stand for, arranged for grammars. Made once; grammars are made for it.
pub struct Vocabulary {
    factory: ParserFactory,
}

impl std::fmt::Debug for Vocabulary {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Vocabulary({} tokens)", self.factory.tok_env().tok_trie().vocab_size())
    }
}

impl Vocabulary {
    /// The tokenizer's tokens, of a model with `vocab_size` rows of logits. A text ends with the tokenizer's end-of-text token or one of
    /// `ends`, such as the end of a chat's turn.
    ///
    /// # Errors
    /// An ending token that the model does not have.
    pub fn new(tokenizer: &Tokenizer, vocab_size: usize, ends: &[u32]) -> Result<Vocabulary, String> {
        const SPECIAL: u8 = TokTrie::SPECIAL_TOKEN_MARKER;
        let mut all_ends = vec![tokenizer.end_of_text()];
        all_ends.extend(ends.iter().filter(|end| **end != tokenizer.end_of_text()));
        if let Some(end) = all_ends.iter().find(|end| **end as usize >= vocab_size) {
            return Err(format!("expected ending tokens below {vocab_size}, the size of the vocabulary; found {end}"));
        }
        let word = |id: u32| match tokenizer.bytes_of(id, false) {
            name if tokenizer.is_special(id) || all_ends.contains(&id) => [&[SPECIAL], name].concat(),
            // No text has this byte, and it marks what is special.
            bytes if bytes.contains(&SPECIAL) => Vec::new(),
            bytes => bytes.to_vec(),
        };
        let words: Vec<Vec<u8>> = (0..vocab_size as u32).map(word).collect();
        let info = TokRxInfo::new(vocab_size as u32, tokenizer.end_of_text());
        let trie = TokTrie::from(&info, &words).with_eos_tokens(&all_ends);
        let env: TokEnv = Arc::new(ApproximateTokEnv::new(trie));
        let slices = SlicedBiasComputer::general_slices();
        let mut factory = ParserFactory::new(&env, InferenceCapabilities::default(), &slices).map_err(said)?;
        factory.quiet();
        *factory.limits_mut() = limits();
        Ok(Vocabulary { factory })
    }

    fn compile(&self, schema: &Value) -> Result<Matcher, String> {
        let mut schema = schema.clone();
        let Some(keys) = schema.as_object_mut() else {
            return Err("expected a JSON schema, an object; found another value".into());
        };
        keys.insert("x-guidance".into(), json!({"whitespace_pattern": WHITE_SPACE}));
        let parser = self.factory.create_parser(TopLevelGrammar::from_json_schema(schema)).map_err(said)?;
        Ok(Matcher::new(Ok(parser)))
    }
}

/// What a schema can cost, whoever wrote it: about a second to compile, and tens of milliseconds for a token.
fn limits() -> ParserLimits {
    ParserLimits {
        initial_lexer_fuel: 1_000_000,
        step_lexer_fuel: 200_000,
        step_max_items: 50_000,
        max_items_in_row: 2000,
        max_lexer_states: 50_000,
        max_grammar_size: 200_000,
        precompute_large_lexemes: false,
        verbose_errors: false,
    }
}

/// The compiler goes down with each `$ref` of a chain: room for as long a one as fits into a schema of the allowed size.
const STACK_BYTES: usize = 256 << 20;

/// Runs `f` on a thread with such a stack.
fn with_deep_stack<R: Send>(f: impl FnOnce() -> Result<R, String> + Send) -> Result<R, String> {
    std::thread::scope(|scope| {
        let builder = std::thread::Builder::new().name("json schema".into()).stack_size(STACK_BYTES);
        let thread = builder.spawn_scoped(scope, f).map_err(|e| format!("the operating system gave no thread: {e}"))?;
        thread.join().unwrap_or_else(|_| Err("the compiler of JSON schemas failed".into()))
    })
}

/// The first line of what the crate says: after it comes how it got there.
fn said(error: impl std::fmt::Display) -> String {
    format!("{error:#}").lines().next().unwrap_or_default().to_owned()
}

/// A schema, compiled.
pub struct Grammar {
    start: Matcher,
    vocab_size: usize,
}

impl std::fmt::Debug for Grammar {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Grammar(for {} tokens)", self.vocab_size)
    }
}

impl Grammar {
    /// Texts that are JSON of this schema (draft 2020-12, as far as llguidance has it; `$ref` within the schema only).
    ///
    /// # Errors
    /// A schema that is none, is larger than the limits, says what cannot be guaranteed, or that no text fulfils; with the place in it,
    /// as a JSON pointer.
    pub fn json_schema(schema: &Value, tokens: &Vocabulary) -> Result<Grammar, String> {
        blame::check_limits(schema)?;
        let start = with_deep_stack(|| {
            tokens.compile(schema).map_err(|error| {
                let (place, error) = blame::find(schema, error, |part| tokens.compile(part).err());
                format!("the JSON schema cannot be used: at `{place}`: {error}")
            })
        })?;
        Ok(Grammar { start, vocab_size: tokens.factory.tok_env().tok_trie().vocab_size() })
    }

    /// Texts that are a JSON object.
    ///
    /// # Errors
    /// None that follow from the tokenizer being one.
    pub fn any_json(tokens: &Vocabulary) -> Result<Grammar, String> {
        Grammar::json_schema(&json!({"type": "object"}), tokens)
    }

    /// Before the first token of a text.
    pub fn start(&self) -> Constraint {
        Constraint { matcher: self.start.deep_clone(), num_words: self.vocab_size.div_ceil(32) }
    }
}

/// Where a text is in its grammar.
pub struct Constraint {
    matcher: Matcher,
    num_words: usize,
}

impl std::fmt::Debug for Constraint {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Constraint(finished: {})", self.is_finished())
    }
}

impl Constraint {
    /// The tokens that may come next: bit i of word w is set for token 32 w + i. Ending tokens are among them where the text may end,
    /// and alone where it must.
    ///
    /// # Errors
    /// If the grammar is too ambiguous at this place for the limits; the request cannot go on.
    pub fn mask(&mut self) -> Result<Arc<[u32]>, String> {
        let mask = self
            .matcher
            .compute_mask_or_eos()
            .map_err(|error| format!("the JSON schema is too complex: {}", said(error)))?;
        let mut words = mask.as_slice().to_vec();
        words.resize(self.num_words, 0);
        Ok(words.into())
    }

    /// Takes the next token.
    ///
    /// # Errors
    /// If it may not come here, or the grammar is too ambiguous after it for the limits.
    pub fn accept(&mut self, token: u32) -> Result<(), String> {
        if self.is_finished() {
            return Err(format!("expected no more tokens after a complete text, found token {token}"));
        }
        let refused = |error| format!("the grammar does not take token {token} here: {}", said(error));
        self.matcher.consume_token(token).map_err(refused)
    }

    /// Whether the text is complete and nothing more may come.
    pub fn is_finished(&self) -> bool {
        self.matcher.is_stopped()
    }
}

#[cfg(test)]
mod tests;
