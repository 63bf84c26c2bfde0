//! What the typed reading of a scene can find wrong, how it is told, and how the tree is patched so that the reading
//! can go on: an unknown field is taken out, a faulty value becomes a hole, and a hole reads as anything. So one fault
//! is one message, and all of them are found.
use std::fmt;

use super::diagnostic::Finding;
use super::tree::{At, Field, Kind, Node, Seg, dotted};

/// Below this Jaro-Winkler similarity a name is no suggestion.
const SIMILAR: f64 = 0.75;

/// One fault and the steps from the root to the value that has it.
#[derive(Debug)]
pub(super) struct Fault {
    pub path: Vec<Seg>,
    pub what: What,
}

#[derive(Debug)]
pub(super) enum What {
    UnknownField { key: String, fields: Vec<String> },
    MissingField { key: String },
    UnknownVariant { variants: Vec<String> },
    WrongType { expected: String },
    Other(String),
}

impl From<What> for Fault {
    fn from(what: What) -> Self {
        Fault { path: Vec::new(), what }
    }
}

impl Fault {
    /// The same fault, seen from the parent.
    pub fn within(mut self, seg: Seg) -> Self {
        self.path.insert(0, seg);
        self
    }

    /// The message, or `None` where the value is a hole, whose cause is told already.
    pub fn describe(&self, root: &Node) -> Option<Finding> {
        let found = root.find(&self.path);
        let node = found.node;
        if matches!(node.kind, Kind::Hole(_)) {
            return None;
        }
        let path = dotted(&self.path);
        let subject = if path.is_empty() { "the scene".to_owned() } else { format!("`{path}`") };
        let below = |key: &str| {
            if path.is_empty() { key.to_owned() } else { format!("{path}.{key}") }
        };
        let mut finding = match &self.what {
            What::UnknownField { key, fields } => {
                let at = match &node.kind {
                    Kind::Struct { fields, .. } => fields.iter().find(|field| &field.key == key).map(|f| f.key_at),
                    _ => None,
                };
                let finding =
                    Finding::new(at.unwrap_or(node.at), format!("{subject} has no field `{key}`"), "unknown field");
                Finding { path: below(key), help: nearest(key, fields).or_else(|| list(fields)), ..finding }
            }
            What::MissingField { key } => {
                let at = found.key_at.unwrap_or(At { end: node.at.start + 1, ..node.at });
                let finding =
                    Finding::new(at, format!("{subject} lacks the field `{key}`"), format!("`{key}` is not given"));
                Finding { path: below(key), ..finding }
            }
            What::UnknownVariant { variants } => {
                let name = node.name().unwrap_or_default();
                let at = match name {
                    "" => node.at,
                    name => At { end: node.at.start + name.len(), ..node.at },
                };
                let message = format!("{subject} must be {}, but is {}", one_of(variants), node.describe());
                let help = if name.is_empty() { None } else { nearest(name, variants) };
                Finding { help, ..Finding::new(at, message, format!("expected {}", one_of(variants))) }
            }
            What::WrongType { expected } => {
                let message = format!("{subject} must be {expected}, but is {}", node.describe());
                let finding = Finding::new(node.at, message, format!("expected {expected}"));
                Finding { help: rewrite(node, expected), ..finding }
            }
            What::Other(message) => Finding::new(node.at, format!("{subject}: {message}"), "here"),
        };
        if finding.path.is_empty() {
            finding.path = path;
        }
        Some(finding)
    }

    /// Changes the tree so that this fault does not come again. False if nothing is left to change.
    pub fn patch(&self, root: &mut Node) -> bool {
        let is_hole = |path: &[Seg]| matches!(root.find(path).node.kind, Kind::Hole(_));
        let mut path = self.path.as_slice();
        if !matches!(self.what, What::UnknownField { .. } | What::MissingField { .. }) {
            // Where not even a hole will do, the value around it has to go.
            while is_hole(path) {
                let Some((_, parent)) = path.split_last() else {
                    return false;
                };
                path = parent;
            }
        }
        let Some(node) = path.iter().try_fold(root, |node, seg| node.child_mut(seg)) else {
            return false;
        };
        match &self.what {
            What::UnknownField { key, .. } => return node.take_field(key).is_some(),
            What::MissingField { key } => {
                let value = Node { at: node.at, kind: Kind::Hole(Vec::new()) };
                let field = Field { key: key.clone(), key_at: node.at, value };
                match &mut node.kind {
                    Kind::Struct { fields, .. } | Kind::Hole(fields) => fields.push(field),
                    Kind::Word(name) => {
                        node.kind = Kind::Struct { name: Some(std::mem::take(name)), fields: vec![field] };
                    }
                    _ => node.kind = Kind::Hole(vec![field]),
                }
            }
            _ => node.kind = Kind::Hole(Vec::new()),
        }
        true
    }
}

impl std::error::Error for Fault {}

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {:?}", dotted(&self.path), self.what)
    }
}

impl serde::de::Error for Fault {
    fn custom<T: fmt::Display>(message: T) -> Self {
        What::Other(message.to_string()).into()
    }

    fn invalid_type(_: serde::de::Unexpected<'_>, expected: &dyn serde::de::Expected) -> Self {
        What::WrongType { expected: expected.to_string() }.into()
    }

    fn invalid_value(_: serde::de::Unexpected<'_>, expected: &dyn serde::de::Expected) -> Self {
        What::WrongType { expected: expected.to_string() }.into()
    }

    fn unknown_variant(_: &str, variants: &'static [&'static str]) -> Self {
        What::UnknownVariant { variants: owned(variants) }.into()
    }

    fn unknown_field(key: &str, fields: &'static [&'static str]) -> Self {
        What::UnknownField { key: key.to_owned(), fields: owned(fields) }.into()
    }

    fn missing_field(key: &'static str) -> Self {
        What::MissingField { key: key.to_owned() }.into()
    }
}

/// Names for a message.
pub(super) fn owned(names: &[&str]) -> Vec<String> {
    names.iter().map(|name| (*name).to_owned()).collect()
}

fn one_of(names: &[String]) -> String {
    let quoted: Vec<_> = names.iter().map(|name| format!("`{name}`")).collect();
    match quoted.split_last() {
        Some((last, rest)) if !rest.is_empty() => format!("{} or {last}", rest.join(", ")),
        _ => quoted.concat(),
    }
}

/// A question after the most similar of `names`, if one is similar at all.
fn nearest(name: &str, names: &[String]) -> Option<String> {
    let similarity = |other: &str| strsim::jaro_winkler(&other.to_lowercase(), &name.to_lowercase());
    let scored = names.iter().map(|other| (similarity(other), other));
    let (score, nearest) = scored.max_by(|a, b| a.0.total_cmp(&b.0))?;
    (score >= SIMILAR).then(|| format!("did you mean `{nearest}`?"))
}

/// All of `names`, in an order that can be searched.
fn list(names: &[String]) -> Option<String> {
    let mut names = names.to_vec();
    names.sort();
    Some(format!("its fields are {}", names.join(", ")))
}

/// How the same value is written so that it is read as meant.
fn rewrite(node: &Node, expected: &str) -> Option<String> {
    match &node.kind {
        Kind::Text(text) if expected.contains("number") => {
            let number = text.trim_matches('"');
            ron::from_str::<f64>(number).ok().map(|_| format!("write {number} without quotes"))
        }
        Kind::Number(text) if expected.contains("whole number") => {
            let value: f64 = ron::from_str(text).ok()?;
            (value.fract() == 0.0 && (0.0..1e15).contains(&value)).then(|| format!("write {value:.0}"))
        }
        Kind::Word(word) if expected.contains("string") => Some(format!("write \"{word}\"")),
        Kind::Number(number) if expected.contains("string") => Some(format!("write \"{number}\"")),
        Kind::Map(_) if expected.contains("struct") => {
            Some("write `(key: value)`, without quotes and braces".to_owned())
        }
        _ => None,
    }
}
