//! Barriers of CTAs and clusters, and mbarriers.

use super::Decoder;
use crate::{
    engines::ops::MbarOp,
    inst::{Op, Src, Ty},
    text::parser::Operand,
    warp::ops::{BarOp, Collective, Vote},
};

impl Decoder<'_> {
    pub(super) fn barrier(&mut self) -> Result<Op, String> {
        if self.take("warp") {
            if !self.take("sync") {
                return self.fail("expected .sync");
            }
            self.count(1, 1)?;
            return Ok(Op::Collective(Box::new(Collective::BarWarp { mask: self.source(0, Ty::B32)? })));
        }
        if self.take("cluster") {
            let wait = self.need(&[("arrive", false), ("wait", true)])?;
            let mut release = !wait;
            if self.take("relaxed") {
                release = false;
            }
            self.take("release");
            self.take("acquire");
            if !self.take("aligned") {
                return self.fail("expected .aligned");
            }
            return Ok(Op::ClusterBar { arrive: !wait, release });
        }
        self.take("cta");
        let aligned = self.take("aligned") | (self.name == "bar");
        match self.need(&[("sync", 0), ("arrive", 1), ("red", 2)])? {
            2 => {
                let mode = self.need(&[("popc", Vote::Popc), ("and", Vote::All), ("or", Vote::Any)])?;
                let ty = self.take_type()?;
                self.count(3, 4)?;
                let d = self.dest(0, Some(ty.bits()))?;
                let id = self.source(1, Ty::U32)?;
                let last = self.s.operands.len() - 1;
                let count = if last == 3 { Some(self.source(2, Ty::U32)?) } else { None };
                let p = self.source(last, Ty::Pred)?;
                Ok(Op::Bar(Box::new(BarOp { id, count, wait: true, aligned, red: Some((mode, d, p)) })))
            }
            kind => {
                self.count(1 + kind, 2)?;
                let (id, count) = (self.source(0, Ty::U32)?, self.optional(1, Ty::U32)?);
                Ok(Op::Bar(Box::new(BarOp { id, count, wait: kind == 0, aligned, red: None })))
            }
        }
    }

    pub(super) fn mbarrier(&mut self) -> Result<Op, String> {
        let name = self.mods.first().copied().unwrap_or_default();
        self.mods.drain(..self.mods.len().min(1));
        self.take_any(&[("release", ()), ("acquire", ()), ("relaxed", ())]);
        self.take_any(&[("cta", ()), ("cluster", ())]);
        if !self.take("b64") && !matches!(name, "expect_tx" | "complete_tx") {
            return self.fail("expected .b64");
        }
        let op = match name {
            "init" => {
                self.space();
                self.count(2, 2)?;
                MbarOp::Init { addr: self.addr(0)?, count: self.source(1, Ty::U32)? }
            }
            "inval" => {
                self.space();
                self.count(1, 1)?;
                MbarOp::Inval { addr: self.addr(0)? }
            }
            "arrive" | "arrive_drop" => {
                let (tx, no_complete) = (self.take("expect_tx"), self.take("noComplete"));
                self.space();
                let drop = name == "arrive_drop";
                self.count(1, 3)?;
                let at = usize::from(!matches!(self.operand(0)?, Operand::Mem { .. }));
                let mut d = None;
                if at == 1 {
                    let o = self.operand(0)?;
                    d = self.dest_or_sink(o, Some(64))?;
                }
                let addr = self.addr(at)?;
                let n = self.optional(at + 1, Ty::U32)?;
                let (count, expect) = if tx { (Src::Imm(1), n) } else { (n.unwrap_or(Src::Imm(1)), None) };
                if tx && expect.is_none() {
                    return self.fail("expected a count of bytes");
                }
                MbarOp::Arrive { addr, d, count, expect, drop, no_complete }
            }
            "expect_tx" | "complete_tx" => {
                self.space();
                self.count(2, 2)?;
                let (addr, bytes) = (self.addr(0)?, self.source(1, Ty::U32)?);
                if name == "expect_tx" { MbarOp::ExpectTx { addr, bytes } } else { MbarOp::CompleteTx { addr, bytes } }
            }
            "try_wait" | "test_wait" => {
                let parity = self.take("parity");
                self.space();
                self.count(3, 4)?;
                let d = self.dest(0, Some(1))?;
                let addr = self.addr(1)?;
                let state = self.source(2, if parity { Ty::U32 } else { Ty::B64 })?;
                self.optional(3, Ty::U32)?;
                MbarOp::Wait { d, addr, state, parity, may_fail: name == "try_wait" }
            }
            "pending_count" => {
                let d = self.dest(0, Some(32))?;
                MbarOp::PendingCount { d, a: self.source(1, Ty::B64)? }
            }
            _ => return self.fail("there is no such operation"),
        };
        Ok(Op::Mbar(Box::new(op)))
    }
}
