//! Loads, stores, atomics, fences and addresses.

use super::Decoder;
use crate::{
    engines::ops::BulkOp,
    inst::{AtomOp, AtomicOp, MemOp, Op, Order, Space, Ty},
    text::parser::Operand,
};

impl Decoder<'_> {
    pub(super) fn memory(&mut self) -> Result<Op, String> {
        if matches!(self.name, "st" | "red") && self.take("async") {
            return self.store_async();
        }
        match self.name {
            "ld" | "ldu" => self.load(),
            "st" => self.store(),
            "atom" | "red" => self.atomic(),
            "multimem" => self.multimem(),
            "cvta" => self.cvta(),
            "isspacep" => {
                let space = self.space();
                let d = self.dest(0, Some(1))?;
                let a = self.source(1, Ty::U64)?;
                Ok(Op::Isspacep { space, d, a })
            }
            "mapa" => {
                let generic = self.space() == Space::Generic;
                let ty = self.take_type()?;
                self.count(3, 3)?;
                let d = self.dest(0, Some(ty.bits()))?;
                Ok(Op::Mapa { d, a: self.source(1, ty)?, rank: self.source(2, Ty::U32)?, generic })
            }
            _ => self.fence(),
        }
    }

    /// The state space, generic if none is said.
    pub(super) fn space(&mut self) -> Space {
        self.take_any(&[
            ("global", Space::Global),
            ("shared", Space::Shared),
            ("shared::cta", Space::Shared),
            ("shared::cluster", Space::Shared),
            ("param", Space::Param),
            ("param::entry", Space::Param),
            ("local", Space::Local),
        ])
        .unwrap_or(Space::Generic)
    }

    fn order(&mut self) -> Order {
        let order = self
            .take_any(&[
                ("weak", Order::Weak),
                ("relaxed", Order::Relaxed),
                ("volatile", Order::Relaxed),
                ("mmio", Order::Relaxed),
                ("acquire", Order::Acquire),
                ("release", Order::Release),
                ("acq_rel", Order::AcqRel),
            ])
            .unwrap_or(Order::Weak);
        self.take_scope();
        order
    }

    fn take_scope(&mut self) -> bool {
        self.take_any(&[("cta", false), ("cluster", false), ("gpu", true), ("sys", true), ("gl", true)])
            .unwrap_or(false)
    }

    fn vector_length(&mut self) -> usize {
        self.take_any(&[("v2", 2), ("v4", 4), ("v8", 8)]).unwrap_or(1)
    }

    fn load(&mut self) -> Result<Op, String> {
        let (order, space) = (self.order(), self.space());
        self.take("nc");
        let hint = self.take_cache_hints();
        let (n, ty) = (self.vector_length(), self.take_type()?);
        if n as u32 * ty.bits() > 128 {
            return self.fail("expected at most 128 bits");
        }
        self.count(2 + usize::from(hint), 2 + usize::from(hint))?;
        let addr = self.addr(1)?;
        let mut d = vec![];
        let v = self.vector(0)?;
        if v.len() != n {
            return self.fail(format!("expected {n} destinations, found {}", v.len()));
        }
        for o in v {
            let exact = ty.bits() > 32 || ty.float();
            let r = self.dest_or_sink(o, exact.then_some(ty.bits()))?;
            if let Some(r) = r
                && self.width(r) < ty.bits()
            {
                self.check_width(r, Some(ty.bits()))?;
            }
            d.push(r.map(|r| (r, self.width(r))));
        }
        if hint {
            self.source(2, Ty::B64)?;
        }
        Ok(Op::Ld(Box::new(self.split_128(MemOp { space, ty, order, addr, d, s: vec![] }))))
    }

    /// An access of 128 bits is one of two times 64.
    fn split_128(&mut self, mut op: MemOp) -> MemOp {
        if op.ty == Ty::B128 {
            op.ty = Ty::B64;
            if let Some(Some((r, _))) = op.d.first().copied() {
                op.d = vec![Some((r, 64)), Some((r + 1, 64))];
                self.writes.push(r + 1);
            }
            if let Some(crate::inst::Src::Reg(r)) = op.s.first().copied() {
                op.s = vec![crate::inst::Src::Reg(r), crate::inst::Src::Reg(r + 1)];
                self.reads.push(r + 1);
            }
        }
        op
    }

    fn store(&mut self) -> Result<Op, String> {
        let (order, space) = (self.order(), self.space());
        let hint = self.take_cache_hints();
        let (n, ty) = (self.vector_length(), self.take_type()?);
        if n as u32 * ty.bits() > 128 {
            return self.fail("expected at most 128 bits");
        }
        self.count(2 + usize::from(hint), 2 + usize::from(hint))?;
        let addr = self.addr(0)?;
        let v = self.vector(1)?;
        if v.len() != n {
            return self.fail(format!("expected {n} values, found {}", v.len()));
        }
        let mut s = vec![];
        for o in v {
            s.push(self.source_of(o, ty, ty.bits() > 32 || ty.float())?);
        }
        if hint {
            self.source(2, Ty::B64)?;
        }
        Ok(Op::St(Box::new(self.split_128(MemOp { space, ty, order, addr, d: vec![], s }))))
    }

    fn store_async(&mut self) -> Result<Op, String> {
        let add = if self.name == "red" { Some(self.atom_op()?) } else { None };
        self.order();
        self.space();
        if !self.take("mbarrier::complete_tx::bytes") {
            return self.fail("expected .mbarrier::complete_tx::bytes");
        }
        let (n, ty) = (self.vector_length(), self.take_type()?);
        self.count(3, 3)?;
        let (dst, bar) = (self.addr(0)?, self.addr(2)?);
        let s = self.sources(1, n, ty)?;
        Ok(Op::Bulk(Box::new(BulkOp::StAsync { dst, s, ty, bar, add })))
    }

    fn atomic(&mut self) -> Result<Op, String> {
        let (order, space) = (self.order(), self.space());
        let hint = self.take_cache_hints();
        let op = self.atom_op()?;
        self.take("noftz");
        let (n, ty) = (self.vector_length(), self.take_type()?);
        let first = usize::from(self.name == "atom");
        let swap = op == AtomOp::Cas;
        let total = first + 2 + usize::from(swap) + usize::from(hint);
        self.count(total, total)?;
        if ty == Ty::B128 {
            return self.fail("atomics of 128 bits are not supported");
        }
        let mut d = vec![];
        if first == 1 {
            for o in self.vector(0)? {
                d.push(self.dest_or_sink(o, Some(ty.bits()))?);
            }
        }
        let addr = self.addr(first)?;
        let s = self.sources(first + 1, n, ty)?;
        let swap = if swap { Some(self.source(first + 2, ty)?) } else { None };
        if hint {
            self.source(total - 1, Ty::B64)?;
        }
        self.check_atomic(op, ty)?;
        let order = if order == Order::Weak { Order::Relaxed } else { order };
        Ok(Op::Atomic(Box::new(AtomicOp { op, ty, space, order, d, s, swap, addr })))
    }

    fn check_atomic(&self, op: AtomOp, ty: Ty) -> Result<(), String> {
        let fine = match op {
            AtomOp::Add => !matches!(ty, Ty::B32 | Ty::B64 | Ty::S64),
            AtomOp::Min | AtomOp::Max => !matches!(ty, Ty::B32 | Ty::B64 | Ty::F32 | Ty::F64),
            AtomOp::And | AtomOp::Or | AtomOp::Xor => matches!(ty, Ty::B32 | Ty::B64),
            AtomOp::Exch | AtomOp::Cas => matches!(ty, Ty::B16 | Ty::B32 | Ty::B64 | Ty::U32 | Ty::U64 | Ty::S32),
            AtomOp::Inc | AtomOp::Dec => ty == Ty::U32,
        };
        if fine { Ok(()) } else { self.fail(format!("there is no {op:?} of {ty:?}")) }
    }

    /// On one device, a multicast address is an address.
    fn multimem(&mut self) -> Result<Op, String> {
        let (order, space) = (self.order(), self.space());
        let what = self.need(&[("ld_reduce", 0), ("st", 1), ("red", 2)])?;
        self.take("acc::f32");
        let op = if what == 1 { AtomOp::Add } else { self.atom_op()? };
        let (n, ty) = (self.vector_length(), self.take_type()?);
        self.count(2, 2)?;
        Ok(match what {
            0 => {
                let d = self.dests(0, n, ty.bits())?.into_iter().map(|r| Some((r, ty.bits()))).collect();
                Op::Ld(Box::new(MemOp { space, ty, order, addr: self.addr(1)?, d, s: vec![] }))
            }
            1 => {
                let addr = self.addr(0)?;
                Op::St(Box::new(MemOp { space, ty, order, addr, d: vec![], s: self.sources(1, n, ty)? }))
            }
            _ => {
                let addr = self.addr(0)?;
                let s = self.sources(1, n, ty)?;
                let order = if order == Order::Weak { Order::Relaxed } else { order };
                Op::Atomic(Box::new(AtomicOp { op, ty, space, order, d: vec![], s, swap: None, addr }))
            }
        })
    }

    fn cvta(&mut self) -> Result<Op, String> {
        let to = self.take("to");
        let space = self.space();
        if space == Space::Generic {
            return self.fail("expected a state space");
        }
        let ty = self.take_type()?;
        if ty.bits() != 64 {
            return self.fail("expected .u64");
        }
        self.count(2, 2)?;
        let d = self.dest(0, Some(64))?;
        let a = self.source(1, ty)?;
        Ok(Op::Cvta { space, to, d, a })
    }

    fn fence(&mut self) -> Result<Op, String> {
        self.count(0, 2)?;
        if self.name == "membar" && self.take("cta") {
            return Ok(Op::Fence { gpu: false });
        }
        if self.take("mbarrier_init") {
            self.take("release");
            self.take("cluster");
            return Ok(Op::FenceMbarrierInit);
        }
        if self.take("proxy") {
            if self.take("async") {
                let global = self.take("global");
                self.space();
                return Ok(if global { Op::Nop } else { Op::FenceAsync });
            }
            // async::generic, alias and tensormap fences order what is in order here.
            if self.need(&[("alias", 0), ("tensormap::generic", 1), ("async::generic", 2)])? != 0 {
                self.order();
            }
            for i in 0..self.s.operands.len() {
                if let Operand::Mem { .. } = self.operand(i)? {
                    self.addr(i)?;
                }
            }
            return Ok(Op::Nop);
        }
        self.take("sc");
        let gpu = self.mods.iter().any(|m| matches!(*m, "gpu" | "gl" | "sys"));
        self.order();
        Ok(Op::Fence { gpu })
    }
}
