//! The children of a value, handed to serde one by one; each fault that comes back is given its step of the path.
use serde::de::value::StrDeserializer;
use serde::de::{self, DeserializeSeed, Visitor};

use super::de::De;
use super::fault::Fault;
use super::tree::{Field, Kind, Node, Seg};

pub(super) struct Items<'a> {
    pub items: &'a [Node],
    pub next: usize,
    pub parent: De<'a>,
    /// Items are steps below the parent; not so where the parent stands for its one item.
    pub segs: bool,
}

impl<'a> de::SeqAccess<'a> for Items<'a> {
    type Error = Fault;

    fn next_element_seed<T: DeserializeSeed<'a>>(&mut self, seed: T) -> Result<Option<T::Value>, Fault> {
        let Some(node) = self.items.get(self.next) else {
            return Ok(None);
        };
        self.next += 1;
        let value = seed.deserialize(self.parent.to(node));
        let seg = Seg::Item(self.next - 1);
        value.map(Some).map_err(|fault| if self.segs { fault.within(seg) } else { fault })
    }
}

pub(super) struct Fields<'a> {
    pub fields: &'a [Field],
    pub next: usize,
    pub parent: De<'a>,
}

impl<'a> de::MapAccess<'a> for Fields<'a> {
    type Error = Fault;

    fn next_key_seed<K: DeserializeSeed<'a>>(&mut self, seed: K) -> Result<Option<K::Value>, Fault> {
        let Some(field) = self.fields.get(self.next) else {
            return Ok(None);
        };
        self.next += 1;
        seed.deserialize(StrDeserializer::<Fault>::new(&field.key)).map(Some)
    }

    fn next_value_seed<T: DeserializeSeed<'a>>(&mut self, seed: T) -> Result<T::Value, Fault> {
        let field = &self.fields[self.next - 1];
        seed.deserialize(self.parent.to(&field.value)).map_err(|fault| fault.within(Seg::Field(field.key.clone())))
    }
}

pub(super) struct Entries<'a> {
    pub entries: &'a [(Node, Node)],
    pub next: usize,
    pub parent: De<'a>,
}

impl<'a> de::MapAccess<'a> for Entries<'a> {
    type Error = Fault;

    fn next_key_seed<K: DeserializeSeed<'a>>(&mut self, seed: K) -> Result<Option<K::Value>, Fault> {
        let Some((key, _)) = self.entries.get(self.next) else {
            return Ok(None);
        };
        self.next += 1;
        seed.deserialize(self.parent.to(key)).map(Some)
    }

    fn next_value_seed<T: DeserializeSeed<'a>>(&mut self, seed: T) -> Result<T::Value, Fault> {
        let index = self.next - 1;
        let value = seed.deserialize(self.parent.to(&self.entries[index].1));
        value.map_err(|fault| fault.within(Seg::Item(index)))
    }
}

pub(super) struct Variant<'a> {
    pub name: &'a str,
    pub body: De<'a>,
}

impl<'a> de::EnumAccess<'a> for Variant<'a> {
    type Error = Fault;
    type Variant = De<'a>;

    fn variant_seed<T: DeserializeSeed<'a>>(self, seed: T) -> Result<(T::Value, De<'a>), Fault> {
        Ok((seed.deserialize(StrDeserializer::<Fault>::new(self.name))?, self.body))
    }
}

impl<'a> de::VariantAccess<'a> for De<'a> {
    type Error = Fault;

    fn unit_variant(self) -> Result<(), Fault> {
        match &self.node.kind {
            Kind::Word(_) | Kind::Hole(_) => Ok(()),
            Kind::Struct { fields, .. } if fields.is_empty() => Ok(()),
            _ => Err(self.wrong(format!("`{}` without fields", self.node.name().unwrap_or_default()))),
        }
    }

    fn newtype_variant_seed<T: DeserializeSeed<'a>>(self, seed: T) -> Result<T::Value, Fault> {
        match &self.node.kind {
            Kind::Tuple { items, .. } if items.len() == 1 => {
                seed.deserialize(self.to(&items[0])).map_err(|fault| fault.within(Seg::Inner))
            }
            _ => seed.deserialize(self),
        }
    }

    fn tuple_variant<V: Visitor<'a>>(self, len: usize, visitor: V) -> Result<V::Value, Fault> {
        self.tuple(len, visitor)
    }

    fn struct_variant<V: Visitor<'a>>(self, fields: &'static [&'static str], visitor: V) -> Result<V::Value, Fault> {
        self.fields(Some(("", fields)), visitor)
    }
}
