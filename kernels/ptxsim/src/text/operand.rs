//! Operands: names are looked up in the scopes around them.

use super::{Pos, parser::Parser};
use crate::inst::{Reg, Special, Ty};

/// An operand with its names resolved.
#[derive(Clone, Debug, PartialEq)]
pub(crate) enum Operand {
    Reg(Reg),
    /// A predicate's complement.
    Not(Reg),
    Int(u64),
    /// A float: its value, and its bits if it was written as `0f` or `0d`.
    Float(f64, Option<u64>),
    /// A special register, with its `%`.
    Special(String),
    /// Address of a shared variable.
    Shared(u64),
    /// Address of a local variable.
    Local(u64),
    /// Offset of a parameter.
    Param(u64),
    /// `[base + offset, more...]`.
    Mem {
        base: Box<Operand>,
        offset: i64,
        more: Vec<Operand>,
    },
    Vector(Vec<Operand>),
    /// `a|b`.
    Pair(Box<Operand>, Box<Operand>),
    /// `_`.
    Sink,
}

/// What a name means.
#[derive(Clone)]
pub(super) enum Name {
    Reg(Reg),
    /// Registers `prefix0..prefix(n-1)` starting here.
    Range(Reg, u32),
    Shared(u64),
    Local(u64),
    Dynamic,
}

impl Parser {
    /// What a name means here.
    pub(super) fn find(&self, name: &str) -> Option<Name> {
        let digits = name.len() - name.bytes().rev().take_while(u8::is_ascii_digit).count();
        let (prefix, index) = name.split_at(digits);
        let canonical = index == "0" || !index.starts_with('0');
        let index = index.parse::<u32>().ok().filter(|_| canonical);
        for (_, names) in self.scopes.iter().rev() {
            if let Some(n) = names.get(name) {
                return Some(n.clone());
            }
            if let (Some(i), Some(Name::Range(first, n))) = (index, names.get(&format!("{prefix}<")))
                && i < *n
            {
                let slots = if self.entry.regs[*first as usize].ty == Ty::B128 { 2 } else { 1 };
                return Some(Name::Reg(first + slots * i));
            }
        }
        None
    }

    fn list(&mut self, close: char) -> Result<Vec<Operand>, String> {
        let mut all = vec![];
        while !self.eat(close) {
            all.push(self.operand()?);
            if !self.is(close) {
                self.expect(',')?;
            }
        }
        Ok(all)
    }

    pub(super) fn operand(&mut self) -> Result<Operand, String> {
        let pos = self.pos();
        if self.eat('{') {
            return Ok(Operand::Vector(self.list('}')?));
        }
        if self.eat('[') {
            let base = Box::new(self.operand()?);
            let mut offset = 0i64;
            while self.is('+') || self.is('-') {
                let mut negative = self.eat('-');
                if !negative {
                    self.expect('+')?;
                    negative = self.eat('-');
                }
                let n = self.number("an offset")? as i64;
                offset = offset.wrapping_add(if negative { n.wrapping_neg() } else { n });
            }
            let more = if self.eat(',') { self.list(']')? } else { self.expect(']').map(|()| vec![])? };
            return Ok(Operand::Mem { base, offset, more });
        }
        if self.eat('!') {
            return match self.operand()? {
                Operand::Reg(r) => Ok(Operand::Not(r)),
                _ => pos.error("expected a predicate after `!`"),
            };
        }
        if self.eat('-') {
            return match self.operand()? {
                Operand::Int(n) => Ok(Operand::Int(n.wrapping_neg())),
                Operand::Float(x, None) => Ok(Operand::Float(-x, None)),
                _ => pos.error("expected a number after `-`"),
            };
        }
        let w = self.word("an operand")?;
        let first = self.named(pos, &w)?;
        if self.eat('|') {
            let second = self.operand()?;
            return Ok(Operand::Pair(Box::new(first), Box::new(second)));
        }
        Ok(first)
    }

    fn named(&self, pos: Pos, w: &str) -> Result<Operand, String> {
        if w == "_" {
            return Ok(Operand::Sink);
        }
        match self.find(w) {
            Some(Name::Reg(r)) => return Ok(Operand::Reg(r)),
            Some(Name::Shared(at)) => return Ok(Operand::Shared(at)),
            Some(Name::Local(at)) => return Ok(Operand::Local(at)),
            // Where it is is known at the end; no static variable is so large.
            Some(Name::Dynamic) => return Ok(Operand::Shared(u64::MAX)),
            Some(Name::Range(..)) | None => {}
        }
        if let Some(p) = self.entry.params.iter().find(|p| p.name == w) {
            return Ok(Operand::Param(p.offset as u64));
        }
        if w.starts_with('%') || w == "WARP_SZ" {
            return if w == "WARP_SZ" {
                Ok(Operand::Int(32))
            } else if Special::parse(w).is_some() {
                Ok(Operand::Special(w.to_owned()))
            } else {
                pos.error(format!("register `{w}` is not declared"))
            };
        }
        let bits = |digits: &str, n: usize| (digits.len() == n).then(|| u64::from_str_radix(digits, 16).ok()).flatten();
        if let Some(x) = w.strip_prefix("0f").or(w.strip_prefix("0F")).and_then(|d| bits(d, 8)) {
            return Ok(Operand::Float(f64::from(f32::from_bits(x as u32)), Some(x)));
        }
        if let Some(x) = w.strip_prefix("0d").or(w.strip_prefix("0D")).and_then(|d| bits(d, 16)) {
            return Ok(Operand::Float(f64::from_bits(x), Some(x)));
        }
        if let Some(n) = integer(w) {
            return Ok(Operand::Int(n));
        }
        if w.starts_with(|c: char| c.is_ascii_digit())
            && let Ok(x) = w.parse()
        {
            return Ok(Operand::Float(x, None));
        }
        pos.error(format!("`{w}` is neither declared nor a number"))
    }
}

/// Gives dynamic shared memory its address.
pub(super) fn place(operand: &mut Operand, dynamic: u64) {
    match operand {
        Operand::Shared(at) if *at == u64::MAX => *at = dynamic,
        Operand::Mem { base, more, .. } => {
            place(base, dynamic);
            more.iter_mut().for_each(|o| place(o, dynamic));
        }
        Operand::Vector(all) => all.iter_mut().for_each(|o| place(o, dynamic)),
        _ => {}
    }
}

/// `12`, `0x1F`, `0b101`, with or without `U`.
pub(super) fn integer(w: &str) -> Option<u64> {
    let w = w.trim_end_matches('U');
    if let Some(h) = w.strip_prefix("0x").or(w.strip_prefix("0X")) {
        u64::from_str_radix(h, 16).ok()
    } else if let Some(b) = w.strip_prefix("0b").or(w.strip_prefix("0B")) {
        u64::from_str_radix(b, 2).ok()
    } else {
        w.parse().ok()
    }
}
