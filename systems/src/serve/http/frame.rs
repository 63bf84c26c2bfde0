//! What every piece of a response, and a response in one piece, has in common.

use serde_json::{Value, json};

use super::{random, usage::Usage};

/// Name, kind, time and model of a response, and the tokens that it took.
pub(super) struct Frame {
    base: Value,
    /// Counted as answers end.
    pub(super) usage: Usage,
    includes_usage: bool,
}

impl Frame {
    /// Of a response whose name begins with `prefix`; `includes_usage` tells the usage in a piece of its own.
    pub(super) fn new(prefix: &str, object: &str, model: &str, includes_usage: bool) -> Self {
        let base = json!({
            "id": random::name(prefix),
            "object": object,
            "created": jiff::Timestamp::now().as_second(),
            "model": model,
        });
        Frame { base, usage: Usage::default(), includes_usage }
    }

    /// A piece of it.
    pub(super) fn piece(&self, choices: Value) -> Value {
        let mut piece = self.base.clone();
        piece["choices"] = choices;
        if self.includes_usage {
            piece["usage"] = Value::Null;
        }
        piece
    }

    /// The last piece.
    pub(super) fn end(&self) -> Vec<Value> {
        if !self.includes_usage {
            return Vec::new();
        }
        let mut piece = self.piece(json!([]));
        piece["usage"] = self.usage.body();
        vec![piece]
    }

    /// All of it.
    pub(super) fn whole(self, choices: Vec<Value>) -> Value {
        let mut whole = self.base;
        whole["choices"] = choices.into();
        whole["usage"] = self.usage.body();
        whole
    }
}
