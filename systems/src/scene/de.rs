//! The tree read as typed values, by way of serde. It differs from RON's own reader in what it says: faults carry the
//! path of the value, all of them are found, and paths of files are resolved against the text that names them.
//!
//! It accepts what RON accepts with implicit `Some`, unwrapped newtypes and unwrapped variant newtypes, and one thing
//! more: a variant whose fields all have defaults may be written without parentheses (`optimizer: AdamW`).
use serde::de::{self, DeserializeOwned, IntoDeserializer, Visitor};

use super::access::{Entries, Fields, Items, Variant};
use super::diagnostic::Finding;
use super::fault::{Fault, What, owned};
use super::source::Sources;
use super::tree::{Field, Kind, Node};

/// Name of the newtype whose text is a path.
pub(super) const PATH: &str = "ScenePath";
/// Name of the newtype of a list whose brackets may be left out around a single item.
pub(super) const ONE_OR_MANY: &str = "ScenePaths";

/// More faults than anybody reads.
const MAX_FAULTS: usize = 100;

/// Reads the tree as a `T`.
///
/// # Errors
/// Every fault that was found, up to a limit.
pub(super) fn read<T: DeserializeOwned>(root: &Node, sources: &Sources) -> Result<T, Vec<Finding>> {
    let mut root = root.clone();
    let mut findings = Vec::new();
    // Patches can take several rounds to fill a hole, so rounds are counted apart from findings.
    for _ in 0..10 * MAX_FAULTS {
        match T::deserialize(De { node: &root, sources, mode: Mode::Whole }) {
            Ok(value) if findings.is_empty() => return Ok(value),
            Ok(_) => break,
            Err(fault) => {
                findings.extend(fault.describe(&root));
                if findings.len() == MAX_FAULTS || !fault.patch(&mut root) {
                    break;
                }
            }
        }
    }
    Err(findings)
}

#[derive(Clone, Copy, PartialEq)]
pub(super) enum Mode {
    Whole,
    /// A path, to be resolved.
    Path,
    /// A list, or one item of it.
    OneOrMany,
    /// The contents of a variant; its name is read already.
    Body,
}

#[derive(Clone, Copy)]
pub(super) struct De<'de> {
    pub node: &'de Node,
    pub sources: &'de Sources,
    pub mode: Mode,
}

impl<'de> De<'de> {
    pub fn to(self, node: &'de Node) -> Self {
        De { node, mode: Mode::Whole, ..self }
    }

    pub fn with(self, mode: Mode) -> Self {
        De { mode, ..self }
    }

    pub fn wrong(self, expected: impl Into<String>) -> Fault {
        What::WrongType { expected: expected.into() }.into()
    }

    /// A scalar, read by RON; a hole reads as `hole`.
    fn scalar<T: DeserializeOwned>(self, hole: &str, expected: &str) -> Result<T, Fault> {
        let text = match &self.node.kind {
            Kind::Number(text) | Kind::Text(text) | Kind::Word(text) => text,
            Kind::Hole(_) => hole,
            _ => return Err(self.wrong(expected)),
        };
        ron::from_str(text).map_err(|_| self.wrong(expected))
    }

    fn string(self) -> Result<String, Fault> {
        let text: String = self.scalar("\"\"", "a string")?;
        match self.mode {
            Mode::Path => {
                let path = self.sources.resolve(self.node.at, &text);
                path.into_os_string()
                    .into_string()
                    .map_err(|_| What::Other("the folder's name is not UTF-8".into()).into())
            }
            _ => Ok(text),
        }
    }

    fn seq<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Fault> {
        match &self.node.kind {
            Kind::List(items) => visitor.visit_seq(Items { items, next: 0, parent: self, segs: true }),
            Kind::Tuple { name, items } if name.is_none() || self.mode == Mode::Body => {
                visitor.visit_seq(Items { items, next: 0, parent: self, segs: true })
            }
            Kind::Hole(_) => visitor.visit_seq(Items { items: &[], next: 0, parent: self, segs: true }),
            _ if self.mode == Mode::OneOrMany => {
                let items = std::slice::from_ref(self.node);
                visitor.visit_seq(Items { items, next: 0, parent: self, segs: false })
            }
            _ => Err(self.wrong("a list `[ .. ]`")),
        }
    }

    /// `len` items, no more and no fewer.
    pub fn tuple<V: Visitor<'de>>(self, len: usize, visitor: V) -> Result<V::Value, Fault> {
        match &self.node.kind {
            Kind::List(items) | Kind::Tuple { items, .. } if items.len() == len => {
                visitor.visit_seq(Items { items, next: 0, parent: self, segs: true })
            }
            Kind::Hole(_) => {
                let items = vec![self.node; len];
                visitor.visit_seq(de::value::SeqDeserializer::new(items.into_iter().map(|node| self.to(node))))
            }
            _ => Err(self.wrong(format!("a tuple of {len}"))),
        }
    }

    /// Fields by name. `allowed` is the struct's name and keys; `None` for maps, which take any key.
    pub fn fields<V: Visitor<'de>>(self, allowed: Option<(&str, &[&str])>, visitor: V) -> Result<V::Value, Fault> {
        let fields: &[Field] = match &self.node.kind {
            Kind::Hole(fields) => fields,
            Kind::Struct { name, fields } => {
                let named_wrong = name.as_deref().is_some_and(|name| allowed.is_none_or(|(wanted, _)| name != wanted));
                if named_wrong && self.mode != Mode::Body {
                    return Err(self.wrong("a struct `( .. )` without a name"));
                }
                fields
            }
            Kind::Word(_) if self.mode == Mode::Body => &[],
            Kind::Map(entries) if allowed.is_none() => {
                return visitor.visit_map(Entries { entries, next: 0, parent: self });
            }
            _ => return Err(self.wrong("a struct `( .. )`")),
        };
        if let Some((_, allowed)) = allowed
            && let Some(field) = fields.iter().find(|field| !allowed.contains(&field.key.as_str()))
        {
            return Err(What::UnknownField { key: field.key.clone(), fields: owned(allowed) }.into());
        }
        visitor.visit_map(Fields { fields, next: 0, parent: self })
    }
}

impl<'de> IntoDeserializer<'de, Fault> for De<'de> {
    type Deserializer = Self;

    fn into_deserializer(self) -> Self {
        self
    }
}

macro_rules! integers {
    ($($method:ident $visit:ident $type:ty),* $(,)?) => {$(
        fn $method<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Fault> {
            visitor.$visit(self.scalar("1", &whole_number::<$type>(<$type>::MIN as i64, <$type>::MAX as u64))?)
        }
    )*};
}

fn whole_number<T>(min: i64, max: u64) -> String {
    match (size_of::<T>() < 8, min) {
        (true, _) => format!("a whole number from {min} to {max}"),
        (false, 0) => "a whole number of 0 or more".to_owned(),
        (false, _) => "a whole number".to_owned(),
    }
}

impl<'de> de::Deserializer<'de> for De<'de> {
    type Error = Fault;

    fn deserialize_any<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Fault> {
        match &self.node.kind {
            Kind::Hole(_) => visitor.visit_unit(),
            Kind::Number(text) => match (ron::from_str(text), ron::from_str(text)) {
                (Ok(number), _) => visitor.visit_u64(number),
                (_, Ok(number)) => visitor.visit_i64(number),
                _ => visitor.visit_f64(self.scalar("1", "a number")?),
            },
            Kind::Text(_) => visitor.visit_string(self.string()?),
            Kind::Word(word) => match word.as_str() {
                "true" => visitor.visit_bool(true),
                "false" => visitor.visit_bool(false),
                "None" => visitor.visit_none(),
                "inf" | "NaN" => visitor.visit_f64(self.scalar("1", "a number")?),
                word => visitor.visit_str(word),
            },
            Kind::List(_) | Kind::Tuple { .. } => self.with(Mode::Body).seq(visitor),
            Kind::Struct { .. } | Kind::Map(_) => self.with(Mode::Body).fields(None, visitor),
        }
    }

    integers! {
        deserialize_u8 visit_u8 u8, deserialize_u16 visit_u16 u16, deserialize_u32 visit_u32 u32,
        deserialize_u64 visit_u64 u64, deserialize_i8 visit_i8 i8, deserialize_i16 visit_i16 i16,
        deserialize_i32 visit_i32 i32, deserialize_i64 visit_i64 i64,
    }

    fn deserialize_f32<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Fault> {
        visitor.visit_f32(self.scalar("1", "a number")?)
    }

    fn deserialize_f64<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Fault> {
        visitor.visit_f64(self.scalar("1", "a number")?)
    }

    fn deserialize_bool<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Fault> {
        visitor.visit_bool(self.scalar("false", "`true` or `false`")?)
    }

    fn deserialize_char<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Fault> {
        visitor.visit_char(self.scalar("' '", "a character such as 'c'")?)
    }

    fn deserialize_str<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Fault> {
        visitor.visit_string(self.string()?)
    }

    fn deserialize_string<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Fault> {
        visitor.visit_string(self.string()?)
    }

    fn deserialize_option<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Fault> {
        match &self.node.kind {
            Kind::Word(word) if word == "None" => visitor.visit_none(),
            Kind::Hole(_) => visitor.visit_none(),
            _ => visitor.visit_some(self),
        }
    }

    fn deserialize_unit<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Fault> {
        match &self.node.kind {
            Kind::Struct { name: None, fields } if fields.is_empty() => visitor.visit_unit(),
            Kind::Hole(_) => visitor.visit_unit(),
            _ => Err(self.wrong("`()`")),
        }
    }

    fn deserialize_newtype_struct<V: Visitor<'de>>(self, name: &'static str, visitor: V) -> Result<V::Value, Fault> {
        visitor.visit_newtype_struct(match name {
            PATH => self.with(Mode::Path),
            ONE_OR_MANY => self.with(Mode::OneOrMany),
            _ => self,
        })
    }

    fn deserialize_seq<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Fault> {
        self.seq(visitor)
    }

    fn deserialize_tuple<V: Visitor<'de>>(self, len: usize, visitor: V) -> Result<V::Value, Fault> {
        self.tuple(len, visitor)
    }

    fn deserialize_tuple_struct<V: Visitor<'de>>(
        self,
        _: &'static str,
        len: usize,
        visitor: V,
    ) -> Result<V::Value, Fault> {
        self.tuple(len, visitor)
    }

    fn deserialize_map<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Fault> {
        self.fields(None, visitor)
    }

    fn deserialize_struct<V: Visitor<'de>>(
        self,
        name: &'static str,
        fields: &'static [&'static str],
        visitor: V,
    ) -> Result<V::Value, Fault> {
        self.fields(Some((name, fields)), visitor)
    }

    fn deserialize_enum<V: Visitor<'de>>(
        self,
        _: &'static str,
        variants: &'static [&'static str],
        visitor: V,
    ) -> Result<V::Value, Fault> {
        let name = match (&self.node.kind, variants.first()) {
            (Kind::Hole(_), Some(first)) => first,
            _ => self.node.name().unwrap_or_default(),
        };
        if !variants.contains(&name) {
            return Err(What::UnknownVariant { variants: owned(variants) }.into());
        }
        visitor.visit_enum(Variant { name, body: self.with(Mode::Body) })
    }

    serde::forward_to_deserialize_any! { bytes byte_buf unit_struct identifier ignored_any }
}

#[cfg(test)]
mod tests {
    #![expect(clippy::unwrap_used, reason = "tests")]
    use std::collections::BTreeMap;
    use std::num::NonZeroU32;

    use serde::Deserialize;

    use super::*;
    use crate::scene::source;

    fn read_text<T: DeserializeOwned>(text: &str) -> Result<T, Vec<String>> {
        let mut sources = Sources::default();
        let tree = source::read_str(text, &[], &mut sources).map_err(|findings| format!("{findings:?}")).unwrap();
        let paths = |findings: Vec<Finding>| findings.into_iter().map(|finding| finding.path).collect();
        read(&tree.root, &sources).map_err(paths)
    }

    #[track_caller]
    fn check<T: DeserializeOwned + PartialEq + std::fmt::Debug>(text: &str, expected: T) {
        assert_eq!(read_text::<T>(text), Ok(expected), "{text}");
    }

    #[derive(Debug, PartialEq, Deserialize)]
    #[serde(untagged)]
    enum Untagged {
        Count(u32),
        Name(String),
        Size { width: f32 },
    }

    #[derive(Debug, PartialEq, Deserialize)]
    struct Flat {
        name: char,
        #[serde(flatten)]
        rest: BTreeMap<String, i8>,
    }

    #[derive(Debug, PartialEq, Deserialize)]
    enum Shape {
        Line(f64, f64),
        Dot(()),
    }

    #[derive(Debug, PartialEq, Deserialize)]
    struct Strict {
        count: NonZeroU32,
        size: (u8, bool),
    }

    #[test]
    fn types_that_no_section_has_yet_read_too() {
        check(
            "[1, \"x\", (width: 2)]",
            vec![Untagged::Count(1), Untagged::Name("x".into()), Untagged::Size { width: 2.0 }],
        );
        check("{\"a\": 1, \"b\": -2}", BTreeMap::from([("a".to_owned(), 1_i8), ("b".to_owned(), -2)]));
        check("(name: 'x', a: -128)", Flat { name: 'x', rest: BTreeMap::from([("a".to_owned(), -128)]) });
        check("[Line(1, inf), Dot(())]", vec![Shape::Line(1.0, f64::INFINITY), Shape::Dot(())]);
        check("(1, [true, false], \"\\n\")", (1_u8, (true, false), "\n".to_owned()));
        check("[None, 3, Some(4)]", vec![None, Some(3), Some(4_i64)]);
        check(
            "(a: [1, -2, 0.5, true, None], b: {\"c\": \"d\"})",
            serde_json::json!({"a": [1, -2, 0.5, true, null], "b": {"c": "d"}}),
        );
    }

    #[test]
    fn what_follows_from_a_fault_is_not_told() {
        let faults = read_text::<Vec<Strict>>("[(count: 0, size: (256, 1)), (count: 1), (cuont: 2)]");
        let expected = ["[0].count", "[0].size[0]", "[0].size[1]", "[1].size", "[2].cuont", "[2].count", "[2].size"];
        assert_eq!(faults.unwrap_err(), expected);
        // A hole is no address, so the whole list is given up.
        assert_eq!(read_text::<Vec<std::net::IpAddr>>("[\"x\", \"::1\"]").unwrap_err(), ["[0]"]);
    }
}
