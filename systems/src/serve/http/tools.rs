//! Tool calls in an answer: `<tool_call>{"name": .., "arguments": {..}}</tool_call>`, as Qwen's and Hermes' templates ask for them.
//! Other ways to write them stay text. A call that is no such JSON stays text too.

use serde_json::{Value, json};

use super::random;

const OPEN: &str = "<tool_call>";
const CLOSE: &str = "</tool_call>";

/// Text, or a call.
#[derive(Clone, Debug, PartialEq)]
pub(super) enum Part {
    Text(String),
    Call { name: String, arguments: String },
}

/// Finds calls in a text that comes in pieces. Holds back what may be the beginning of one.
#[derive(Clone, Debug, Default)]
pub(super) struct CallParser {
    held: String,
    /// Whether nothing but white space came since the last call: it is of the form, not of the answer.
    follows_call: bool,
}

impl CallParser {
    /// Takes more text; gives out what is certain.
    pub(super) fn push(&mut self, text: &str) -> Vec<Part> {
        self.held.push_str(text);
        let mut parts = Vec::new();
        while let Some(begin) = self.held.find(OPEN) {
            let inside = begin + OPEN.len();
            let Some(length) = self.held[inside..].find(CLOSE) else {
                self.give(begin, &mut parts);
                return parts;
            };
            let end = inside + length + CLOSE.len();
            match call(&self.held[inside..inside + length]) {
                Some(part) => {
                    self.give(begin, &mut parts);
                    self.held.drain(..end - begin);
                    self.follows_call = true;
                    parts.push(part);
                }
                None => self.give(end, &mut parts),
            }
        }
        let may_begin = (1..OPEN.len()).rev().find(|&length| self.held.ends_with(&OPEN[..length])).unwrap_or(0);
        self.give(self.held.len() - may_begin, &mut parts);
        parts
    }

    /// The answer is at its end: what was held back is text.
    pub(super) fn finish(&mut self) -> Vec<Part> {
        let mut parts = Vec::new();
        self.give(self.held.len(), &mut parts);
        parts
    }

    fn give(&mut self, length: usize, parts: &mut Vec<Part>) {
        let text: String = self.held.drain(..length).collect();
        let text = if self.follows_call { text.trim_start() } else { &text };
        if !text.is_empty() {
            self.follows_call = false;
            parts.push(Part::Text(text.to_owned()));
        }
    }
}

fn call(text: &str) -> Option<Part> {
    let value: Value = serde_json::from_str(text.trim()).ok()?;
    let name = value.get("name")?.as_str()?.to_owned();
    let arguments = match value.get("arguments") {
        None => "{}".to_owned(),
        Some(Value::String(text)) => text.clone(),
        Some(other) => other.to_string(),
    };
    Some(Part::Call { name, arguments })
}

/// A call as OpenAI writes it. In pieces, each call has its place.
pub(super) fn body(name: &str, arguments: &str, place: Option<usize>) -> Value {
    let mut body = json!({
        "id": random::name("call"),
        "type": "function",
        "function": { "name": name, "arguments": arguments },
    });
    if let Some(place) = place {
        body["index"] = place.into();
    }
    body
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Parts of a text, however it is cut; neighbouring texts as one.
    fn parts(text: &str) -> Vec<Part> {
        let whole = |width: usize| {
            let mut parser = CallParser::default();
            let characters: Vec<char> = text.chars().collect();
            let mut parts: Vec<Part> = Vec::new();
            let pieces = characters.chunks(width).map(|piece| piece.iter().collect::<String>());
            let mut found: Vec<Part> = pieces.flat_map(|piece| parser.push(&piece)).collect();
            found.extend(parser.finish());
            for part in found {
                match (parts.last_mut(), part) {
                    (Some(Part::Text(before)), Part::Text(more)) => before.push_str(&more),
                    (_, part) => parts.push(part),
                }
            }
            parts
        };
        let expected = whole(text.len().max(1));
        for width in 1..text.len() {
            assert_eq!(whole(width), expected, "cut every {width} characters");
        }
        expected
    }

    fn text(text: &str) -> Part {
        Part::Text(text.into())
    }

    fn call(name: &str, arguments: &str) -> Part {
        Part::Call { name: name.into(), arguments: arguments.into() }
    }

    #[test]
    fn calls_are_found_however_the_text_comes() {
        let one = r#"<tool_call>{"name": "add", "arguments": {"a": 1}}</tool_call>"#;
        assert_eq!(parts("no call, <tool or so <tool_cal"), [text("no call, <tool or so <tool_cal")]);
        assert_eq!(parts(one), [call("add", r#"{"a":1}"#)]);
        assert_eq!(parts(&format!("{one} a b\n\nc")), [call("add", r#"{"a":1}"#), text("a b\n\nc")]);
        let spaced = format!("I add.\n{}\n{one}\n", one.replace("add", "mul"));
        assert_eq!(parts(&spaced), [text("I add.\n"), call("mul", r#"{"a":1}"#), call("add", r#"{"a":1}"#)]);
        assert_eq!(parts(r#"<tool_call>{"name":"f"}</tool_call>"#), [call("f", "{}")]);
    }

    #[test]
    fn what_is_no_call_stays_text() {
        for bad in
            ["<tool_call>{</tool_call>", r#"<tool_call>{"arguments": {}}</tool_call>x"#, "<tool_call>{\"name\": "]
        {
            assert_eq!(parts(bad), [text(bad)]);
        }
    }
}
