//! From statements to typed instructions. Every modifier must be understood: one that is not is an error here, not a surprise
//! at run time.

mod barriers;
mod bulk;
mod memory;
mod scalar;
mod tensor;
mod warp;

use crate::{
    engines::ops::WgmmaOp,
    inst::{Addr, AtomOp, Inst, Op, Reg, Space, Special, Src, Ty},
    text::parser::{Entry, Operand, RegInfo, Statement},
};

/// Where generic addresses of the spaces begin.
pub(crate) mod window {
    /// Global memory.
    pub(crate) const GLOBAL: u64 = 0x7f00_0000_0000;
    /// Shared memory.
    pub(crate) const SHARED: u64 = 0x7e00_0000_0000;
    /// Parameters.
    pub(crate) const PARAM: u64 = 0x7d00_0000_0000;
    /// Local memory.
    pub(crate) const LOCAL: u64 = 0x7c00_0000_0000;
    /// Bytes that a window has room for.
    pub(crate) const SIZE: u64 = 0x100_0000_0000;
}

/// An entry, ready to run.
#[derive(Debug)]
pub(crate) struct Func {
    pub name: String,
    pub params: Vec<crate::text::parser::Param>,
    pub code: Vec<Inst>,
    pub regs: Vec<RegInfo>,
    pub dynamic_at: usize,
    pub local_bytes: usize,
    pub max_threads: u32,
    pub cluster: [u32; 3],
    /// Whether it may talk to other CTAs: atomics, volatile and ordered accesses.
    pub communicates: bool,
    /// Whether registers can be in flight.
    pub uses_wgmma: bool,
}

/// Decodes every statement.
pub(crate) fn decode(entry: Entry) -> Result<Func, String> {
    let mut code = Vec::with_capacity(entry.statements.len());
    for s in &entry.statements {
        let mut d = Decoder::new(s, &entry.regs);
        let op = d.op()?;
        d.no_modifiers_left()?;
        let (mut reads, mut writes) = (d.reads, d.writes);
        reads.extend(s.guard.map(|g| g.0));
        reads.sort_unstable();
        reads.dedup();
        writes.sort_unstable();
        code.push(Inst { line: s.pos.line, text: s.text.clone(), guard: s.guard, op, reads, writes });
    }
    use crate::inst::Order;
    let communicates = code.iter().any(|i| match &i.op {
        Op::Atomic(a) => a.space != Space::Shared,
        Op::Ld(m) | Op::St(m) => m.order != Order::Weak && m.space != Space::Shared,
        _ => false,
    });
    let uses_wgmma = code.iter().any(|i| matches!(&i.op, Op::Wgmma(w) if matches!(**w, WgmmaOp::Mma(_))));
    Ok(Func {
        name: entry.name,
        params: entry.params,
        code,
        regs: entry.regs,
        dynamic_at: entry.dynamic_at,
        local_bytes: entry.local_bytes,
        max_threads: entry.max_threads,
        cluster: entry.cluster,
        communicates,
        uses_wgmma,
    })
}

/// Decodes one statement: modifiers are taken one by one, operands by index.
pub(crate) struct Decoder<'a> {
    s: &'a Statement,
    regs: &'a [RegInfo],
    name: &'a str,
    mods: Vec<&'a str>,
    reads: Vec<Reg>,
    writes: Vec<Reg>,
}

impl<'a> Decoder<'a> {
    fn new(s: &'a Statement, regs: &'a [RegInfo]) -> Self {
        let mut parts = s.text.split('.');
        let name = parts.next().unwrap_or_default();
        Decoder { s, regs, name, mods: parts.collect(), reads: vec![], writes: vec![] }
    }

    fn fail<T>(&self, message: impl std::fmt::Display) -> Result<T, String> {
        self.s.pos.error(format!("`{}`: {message}", self.s.text))
    }

    fn op(&mut self) -> Result<Op, String> {
        match self.name {
            "ret" | "exit" => Ok(Op::Exit),
            "trap" | "brkpt" => Ok(Op::Trap),
            "bra" => {
                self.take("uni");
                Ok(Op::Bra(self.s.target))
            }
            "nanosleep" | "prefetch" | "prefetchu" | "griddepcontrol" | "applypriority" | "discard" | "pmevent" => {
                self.mods.clear();
                for i in 0..self.s.operands.len() {
                    if let Operand::Reg(r) = self.s.operands[i] {
                        self.reads.push(r);
                    } else if let Operand::Mem { .. } = self.s.operands[i] {
                        self.addr(i)?;
                    }
                }
                Ok(Op::Nop)
            }
            "ld" | "ldu" | "st" | "atom" | "red" | "cvta" | "isspacep" | "mapa" | "fence" | "membar" | "multimem" => {
                self.memory()
            }
            "createpolicy" => {
                self.mods.clear();
                let d = self.dest(0, Some(64))?;
                Ok(Op::Alu {
                    op: scalar::plain(crate::inst::Alu::Mov, Ty::B64),
                    d,
                    s: [Src::Imm(0x1000_0000_0000_0000); 4],
                })
            }
            "shfl" | "vote" | "match" | "redux" | "elect" | "activemask" | "ldmatrix" | "stmatrix" | "mma"
            | "setmaxnreg" => self.warp(),
            "bar" | "barrier" => self.barrier(),
            "mbarrier" => self.mbarrier(),
            "cp" => self.copy(),
            "wgmma" => self.wgmma(),
            "tensormap" => self.tensormap(),
            _ => self.scalar(),
        }
    }

    /// Whether a modifier is there; it is then understood.
    fn take(&mut self, m: &str) -> bool {
        let found = self.mods.iter().position(|x| *x == m);
        if let Some(i) = found {
            self.mods.remove(i);
        }
        found.is_some()
    }

    /// The one of these modifiers that is there.
    fn take_any<T: Copy>(&mut self, choices: &[(&str, T)]) -> Option<T> {
        choices.iter().find_map(|(m, v)| self.take(m).then_some(*v))
    }

    /// As [`Self::take_any`], where one must be.
    fn need<T: Copy>(&mut self, choices: &[(&str, T)]) -> Result<T, String> {
        match self.take_any(choices) {
            Some(v) => Ok(v),
            None => {
                let names: Vec<&str> = choices.iter().map(|c| c.0).collect();
                self.fail(format!("expected one of .{}", names.join(", .")))
            }
        }
    }

    /// The last type among the modifiers.
    fn take_type(&mut self) -> Result<Ty, String> {
        for i in (0..self.mods.len()).rev() {
            if let Some(t) = Ty::parse(self.mods[i]) {
                self.mods.remove(i);
                return Ok(t);
            }
        }
        self.fail("expected a type")
    }

    /// Cache hints change no value.
    fn take_cache_hints(&mut self) -> bool {
        let hint = self.take("L2::cache_hint");
        self.mods.retain(|m| {
            !(m.starts_with("L1::")
                || m.starts_with("L2::")
                || matches!(*m, "ca" | "cg" | "cs" | "lu" | "cv" | "wb" | "wt"))
        });
        hint
    }

    fn no_modifiers_left(&self) -> Result<(), String> {
        match self.mods.first() {
            Some(m) => self.fail(format!("modifier `.{m}` is not known")),
            None => Ok(()),
        }
    }

    fn operand(&self, i: usize) -> Result<&'a Operand, String> {
        match self.s.operands.get(i) {
            Some(o) => Ok(o),
            None => self.fail(format!("expected at least {} operands, found {}", i + 1, self.s.operands.len())),
        }
    }

    fn count(&self, least: usize, most: usize) -> Result<(), String> {
        let n = self.s.operands.len();
        if (least..=most).contains(&n) {
            Ok(())
        } else if least == most {
            self.fail(format!("expected {least} operands, found {n}"))
        } else {
            self.fail(format!("expected {least} to {most} operands, found {n}"))
        }
    }

    fn width(&self, r: Reg) -> u32 {
        self.regs[r as usize].ty.bits()
    }

    fn check_width(&self, r: Reg, bits: Option<u32>) -> Result<(), String> {
        match bits {
            // Wider than a lane's slot: only mov, ld and st of 128 bits may, and check for themselves.
            None if self.width(r) > 64 => {
                self.fail(format!("expected no register of 128 bits, found `{}`", self.regs[r as usize].name))
            }
            Some(b) if b != self.width(r) => {
                let info = &self.regs[r as usize];
                self.fail(format!("expected a register of {b} bits, found `{}` of {}", info.name, info.ty.bits()))
            }
            _ => Ok(()),
        }
    }

    /// Operand `i` as a destination.
    fn dest(&mut self, i: usize, bits: Option<u32>) -> Result<Reg, String> {
        match self.operand(i)? {
            Operand::Reg(r) => {
                self.check_width(*r, bits)?;
                self.writes.push(*r);
                Ok(*r)
            }
            _ => self.fail(format!("expected a register as operand {}", i + 1)),
        }
    }

    fn dest_or_sink(&mut self, o: &'a Operand, bits: Option<u32>) -> Result<Option<Reg>, String> {
        match o {
            Operand::Reg(r) => {
                self.check_width(*r, bits)?;
                self.writes.push(*r);
                Ok(Some(*r))
            }
            Operand::Sink => Ok(None),
            _ => self.fail("expected a register or `_`"),
        }
    }

    /// `d`, `d|p` or `_|p` as operand `i`.
    fn dest_pair(&mut self, i: usize, bits: u32) -> Result<(Option<Reg>, Option<Reg>), String> {
        match self.operand(i)? {
            Operand::Pair(a, b) => Ok((self.dest_or_sink(a, Some(bits))?, self.dest_or_sink(b, Some(1))?)),
            o => Ok((self.dest_or_sink(o, Some(bits))?, None)),
        }
    }

    fn source_of(&mut self, o: &Operand, ty: Ty, exact: bool) -> Result<Src, String> {
        Ok(match o {
            Operand::Reg(r) => {
                self.check_width(*r, exact.then_some(ty.bits()))?;
                if !exact && self.width(*r) < ty.bits() {
                    self.check_width(*r, Some(ty.bits()))?;
                }
                self.reads.push(*r);
                Src::Reg(*r)
            }
            Operand::Not(r) => {
                self.check_width(*r, Some(1))?;
                self.reads.push(*r);
                Src::Not(*r)
            }
            Operand::Int(n) if !ty.float() || *n == 0 && ty.bits() < 32 => Src::Imm(n & ty.mask()),
            Operand::Float(x, bits) => match (ty.bits(), bits) {
                (32, Some(b)) if *b <= u64::from(u32::MAX) => Src::Imm(*b),
                (32, _) => Src::Imm(u64::from((*x as f32).to_bits())),
                (64, Some(b)) if *b == x.to_bits() => Src::Imm(*b),
                (64, _) => Src::Imm(x.to_bits()),
                _ => return self.fail("expected no float constant for this type"),
            },
            Operand::Special(s) => match Special::parse(s) {
                Some(x) => Src::Special(x),
                None => return self.fail(format!("special register `{s}` is not known")),
            },
            Operand::Shared(at) => Src::Imm(*at),
            Operand::Local(at) => Src::Imm(*at),
            Operand::Param(at) => Src::Imm(*at),
            _ => return self.fail(format!("expected a value of type {ty:?}, found {o:?}")),
        })
    }

    /// Operand `i` as a value of exactly that type.
    fn source(&mut self, i: usize, ty: Ty) -> Result<Src, String> {
        let o = self.operand(i)?;
        self.source_of(o, ty, true)
    }

    /// Operand `i`, if it is there.
    fn optional(&mut self, i: usize, ty: Ty) -> Result<Option<Src>, String> {
        if i < self.s.operands.len() { self.source(i, ty).map(Some) } else { Ok(None) }
    }

    /// Operand `i` as an integer constant.
    fn constant(&mut self, i: usize) -> Result<u64, String> {
        match self.operand(i)? {
            Operand::Int(n) => Ok(*n),
            _ => self.fail(format!("expected a constant as operand {}", i + 1)),
        }
    }

    fn addr_of(&mut self, base: &Operand, offset: i64) -> Result<Addr, String> {
        let base = match base {
            Operand::Reg(r) => {
                if self.width(*r) < 32 {
                    self.check_width(*r, Some(64))?;
                }
                self.reads.push(*r);
                Src::Reg(*r)
            }
            Operand::Shared(at) | Operand::Local(at) | Operand::Param(at) => Src::Imm(*at),
            Operand::Int(n) => Src::Imm(*n),
            _ => return self.fail("expected an address"),
        };
        Ok(Addr { base, offset })
    }

    /// Operand `i` as `[address]`.
    fn addr(&mut self, i: usize) -> Result<Addr, String> {
        match self.operand(i)? {
            Operand::Mem { base, offset, more } if more.is_empty() => self.addr_of(base, *offset),
            _ => self.fail(format!("expected `[address]` as operand {}", i + 1)),
        }
    }

    /// Operand `i` as values: `{a, b}` or one.
    fn vector(&mut self, i: usize) -> Result<&'a [Operand], String> {
        match self.operand(i)? {
            Operand::Vector(v) => Ok(v),
            o => Ok(std::slice::from_ref(o)),
        }
    }

    /// Operand `i` as exactly `n` registers to write.
    fn dests(&mut self, i: usize, n: usize, bits: u32) -> Result<Vec<Reg>, String> {
        let v = self.vector(i)?;
        if v.len() != n {
            return self.fail(format!("expected {n} registers as operand {}, found {}", i + 1, v.len()));
        }
        let mut all = vec![];
        for o in v {
            match self.dest_or_sink(o, Some(bits))? {
                Some(r) => all.push(r),
                None => return self.fail("expected a register, found `_`"),
            }
        }
        Ok(all)
    }

    /// Operand `i` as exactly `n` values.
    fn sources(&mut self, i: usize, n: usize, ty: Ty) -> Result<Vec<Src>, String> {
        let v = self.vector(i)?;
        if v.len() != n {
            return self.fail(format!("expected {n} values as operand {}, found {}", i + 1, v.len()));
        }
        v.iter().map(|o| self.source_of(o, ty, true)).collect()
    }

    /// Names of atomics.
    fn atom_op(&mut self) -> Result<AtomOp, String> {
        self.need(&[
            ("add", AtomOp::Add),
            ("min", AtomOp::Min),
            ("max", AtomOp::Max),
            ("and", AtomOp::And),
            ("or", AtomOp::Or),
            ("xor", AtomOp::Xor),
            ("exch", AtomOp::Exch),
            ("cas", AtomOp::Cas),
            ("inc", AtomOp::Inc),
            ("dec", AtomOp::Dec),
        ])
    }
}
