//! A scene as written: a tree of RON values that remember the file and the bytes they came from. Files are merged
//! here, before any type is known, because `ron::Value` forgets the names of enum variants and where things stood.

/// Bytes `start..end` of one source.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct At {
    pub source: usize,
    pub start: usize,
    pub end: usize,
}

/// One value.
#[derive(Clone, Debug)]
pub(super) struct Node {
    pub at: At,
    pub kind: Kind,
}

/// `key: value` in a struct.
#[derive(Clone, Debug)]
pub(super) struct Field {
    pub key: String,
    pub key_at: At,
    pub value: Node,
}

/// What a value looks like. Scalars keep their text; RON itself reads it once the wanted type is known.
#[derive(Clone, Debug)]
pub(super) enum Kind {
    /// `-1.5e3`, `0xff`
    Number(String),
    /// `"text"`, `r#"text"#`, `'c'`
    Text(String),
    /// `true`, `None`, a variant without fields
    Word(String),
    /// `[a, b]`
    List(Vec<Node>),
    /// `(a, b)` or `Name(a, b)`
    Tuple { name: Option<String>, items: Vec<Node> },
    /// `(key: value)` or `Name(key: value)`; also `()`
    Struct { name: Option<String>, fields: Vec<Field> },
    /// `{ key: value }`
    Map(Vec<(Node, Node)>),
    /// Stands where a faulty value was, and reads as anything, so that one fault does not cause others.
    Hole(Vec<Field>),
}

/// A step from a node to a child.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Seg {
    Field(String),
    Item(usize),
    /// The value in `Variant(value)`; it has no name of its own in a dotted path.
    Inner,
}

/// Where a path led: the deepest value that is written, the key it hangs on (for an item of a list, its first
/// character), and whether the path ended there.
pub(super) struct Found<'a> {
    pub node: &'a Node,
    pub key_at: Option<At>,
    pub complete: bool,
}

impl Node {
    /// How a message calls this value.
    pub fn describe(&self) -> String {
        const SHOWN_CHARS: usize = 40;
        let short = |text: &str| match text.char_indices().nth(SHOWN_CHARS) {
            Some((end, _)) => format!("{}..", &text[..end]),
            None => text.to_owned(),
        };
        match &self.kind {
            Kind::Number(text) => format!("the number {}", short(text)),
            Kind::Text(text) => format!("the string {}", short(text)),
            Kind::Word(text) => format!("the word `{}`", short(text)),
            Kind::List(_) => "a list `[ .. ]`".to_owned(),
            Kind::Map(_) => "a map `{ .. }`".to_owned(),
            Kind::Tuple { name: Some(name), .. } | Kind::Struct { name: Some(name), .. } => format!("`{name}( .. )`"),
            Kind::Tuple { .. } => "a tuple `( .. )`".to_owned(),
            Kind::Struct { .. } => "a struct `( .. )`".to_owned(),
            Kind::Hole(_) => "nothing".to_owned(),
        }
    }

    /// The name before the parentheses, or the word alone.
    pub fn name(&self) -> Option<&str> {
        match &self.kind {
            Kind::Word(name) => Some(name),
            Kind::Tuple { name, .. } | Kind::Struct { name, .. } => name.as_deref(),
            _ => None,
        }
    }

    /// Removes a field of a struct.
    pub fn take_field(&mut self, key: &str) -> Option<Field> {
        match &mut self.kind {
            Kind::Struct { fields, .. } => {
                let index = fields.iter().position(|field| field.key == key)?;
                Some(fields.remove(index))
            }
            _ => None,
        }
    }

    fn child(&self, seg: &Seg) -> Option<(&Node, Option<At>)> {
        match (seg, &self.kind) {
            (Seg::Field(key), Kind::Struct { fields, .. } | Kind::Hole(fields)) => {
                fields.iter().find(|field| &field.key == key).map(|field| (&field.value, Some(field.key_at)))
            }
            (Seg::Item(index), Kind::List(items) | Kind::Tuple { items, .. }) => items.get(*index).map(|n| (n, None)),
            (Seg::Item(index), Kind::Map(entries)) => entries.get(*index).map(|(_, value)| (value, None)),
            // A single path may stand for a list of one.
            (Seg::Item(0), Kind::Text(_)) => Some((self, None)),
            (Seg::Inner, Kind::Tuple { items, .. }) => items.first().map(|node| (node, None)),
            _ => None,
        }
    }

    /// The child node to patch.
    pub fn child_mut(&mut self, seg: &Seg) -> Option<&mut Node> {
        match (seg, &mut self.kind) {
            (Seg::Field(key), Kind::Struct { fields, .. } | Kind::Hole(fields)) => {
                fields.iter_mut().find(|field| &field.key == key).map(|field| &mut field.value)
            }
            (Seg::Item(index), Kind::List(items) | Kind::Tuple { items, .. }) => items.get_mut(*index),
            (Seg::Item(index), Kind::Map(entries)) => entries.get_mut(*index).map(|(_, value)| value),
            (Seg::Inner, Kind::Tuple { items, .. }) => items.first_mut(),
            _ => None,
        }
    }

    /// Walks `path` as far as it is written.
    pub fn find(&self, path: &[Seg]) -> Found<'_> {
        let mut found = Found { node: self, key_at: None, complete: true };
        for seg in path {
            let inner = found.node.child(&Seg::Inner).and_then(|(node, _)| node.child(seg));
            match found.node.child(seg).or(inner) {
                Some((node, key_at)) => {
                    // An item has no key: its first character stands for it.
                    let first = At { end: node.at.start + 1, ..node.at };
                    found = Found { node, key_at: key_at.or(Some(first)), complete: true };
                }
                None => {
                    found.complete = false;
                    break;
                }
            }
        }
        found
    }
}

/// `a.b[0]` to steps.
pub(super) fn segments(path: &str) -> Vec<Seg> {
    path.split(['.', '['])
        .map(|part| part.trim_end_matches(']'))
        .filter(|part| !part.is_empty())
        .map(|part| part.parse().map_or_else(|_| Seg::Field(part.to_owned()), Seg::Item))
        .collect()
}

/// Steps to `a.b[0]`.
pub(super) fn dotted(path: &[Seg]) -> String {
    let mut text = String::new();
    for seg in path {
        match seg {
            Seg::Field(key) => {
                if !text.is_empty() {
                    text.push('.');
                }
                text.push_str(key);
            }
            Seg::Item(index) => text.push_str(&format!("[{index}]")),
            Seg::Inner => {}
        }
    }
    text
}

/// `over` laid on `base`. Structs merge field by field, also when only one of them is named, so that
/// `optimizer.weight_decay=0` refines whichever variant the base chose; variants of different names, lists and
/// scalars replace. A merged struct keeps the place of its base, every other value has the place that won.
pub(super) fn merge(base: Node, over: Node) -> Node {
    match (base.kind, over.kind) {
        (Kind::Struct { name: base_name, mut fields }, Kind::Struct { name, fields: over_fields })
            if name.is_none() || base_name.is_none() || name == base_name =>
        {
            for field in over_fields {
                merge_field(&mut fields, field);
            }
            Node { at: base.at, kind: Kind::Struct { name: name.or(base_name), fields } }
        }
        (Kind::Word(word), Kind::Struct { name: None, fields }) if !matches!(&*word, "None" | "true" | "false") => {
            Node { at: base.at, kind: Kind::Struct { name: Some(word), fields } }
        }
        (_, kind) => Node { at: over.at, kind },
    }
}

fn merge_field(fields: &mut Vec<Field>, over: Field) {
    match fields.iter().position(|field| field.key == over.key) {
        Some(index) => {
            let base = fields.remove(index);
            let value = merge(base.value, over.value.clone());
            let key_at = if value.at == over.value.at { over.key_at } else { base.key_at };
            fields.insert(index, Field { key: over.key, key_at, value });
        }
        None => fields.push(over),
    }
}
