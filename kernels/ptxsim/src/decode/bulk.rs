//! Asynchronous copies: `cp.async` and bulk copies.

use super::Decoder;
use crate::{
    engines::ops::{BulkOp, CpAsyncOp, Far},
    inst::{Op, Space, Ty},
    text::parser::Operand,
};

impl Decoder<'_> {
    pub(super) fn copy(&mut self) -> Result<Op, String> {
        let reduce = self.take("reduce");
        if !self.take("async") {
            return self.fail("expected .async");
        }
        if self.take("bulk") {
            return self.bulk(reduce);
        }
        if self.take("mbarrier") {
            if !self.take("arrive") || !self.take("b64") {
                return self.fail("expected .mbarrier.arrive and .b64");
            }
            let noinc = self.take("noinc");
            self.space();
            return Ok(Op::CpAsync(Box::new(CpAsyncOp::Arrive { addr: self.addr(0)?, noinc })));
        }
        let op = if self.take("commit_group") {
            CpAsyncOp::Commit
        } else if self.take("wait_group") {
            CpAsyncOp::Wait(self.constant(0)? as usize)
        } else if self.take("wait_all") {
            CpAsyncOp::WaitAll
        } else {
            let cg = self.take("cg");
            if !cg && !self.take("ca") {
                return self.fail("expected .ca or .cg");
            }
            let hint = self.take_cache_hints();
            if !self.take("global") {
                return self.fail("expected .global");
            }
            self.space();
            let bytes = self.constant(2)? as usize;
            if !(bytes == 16 || !cg && matches!(bytes, 4 | 8)) {
                return self.fail(format!("expected 4, 8 or 16 bytes, 16 with .cg, found {bytes}"));
            }
            let (dst, src) = (self.addr(0)?, self.addr(1)?);
            let (mut src_bytes, mut ignore) = (None, None);
            let n = self.s.operands.len() - usize::from(hint);
            if n > 3 {
                let pred = match self.operand(3)? {
                    Operand::Reg(r) => self.width(*r) == 1,
                    o => matches!(o, Operand::Not(_)),
                };
                if pred {
                    ignore = Some(self.source(3, Ty::Pred)?);
                } else {
                    src_bytes = Some(self.source(3, Ty::U32)?);
                }
            }
            self.count(3, 4 + usize::from(hint))?;
            CpAsyncOp::Copy { dst, src, bytes, src_bytes, ignore }
        };
        Ok(Op::CpAsync(Box::new(op)))
    }

    fn bulk(&mut self, reduce: bool) -> Result<Op, String> {
        if self.take("commit_group") {
            return Ok(Op::Bulk(Box::new(BulkOp::Commit)));
        }
        if self.take("wait_group") {
            let read = self.take("read");
            return Ok(Op::Bulk(Box::new(BulkOp::Wait { groups: self.constant(0)? as usize, read })));
        }
        let prefetch = self.take("prefetch");
        let rank = self.take_any(&[("1d", 1), ("2d", 2), ("3d", 3), ("4d", 4), ("5d", 5)]);
        let tensor = self.take("tensor");
        if tensor && rank.is_none() {
            return self.fail("expected .1d to .5d");
        }
        self.take("tile");
        // The destination comes first.
        let spaces: Vec<Space> = self
            .mods
            .iter()
            .filter_map(|m| match *m {
                "global" => Some(Space::Global),
                "shared::cta" | "shared::cluster" | "shared" => Some(Space::Shared),
                _ => None,
            })
            .collect();
        self.mods.retain(|m| !matches!(*m, "global" | "shared::cta" | "shared::cluster" | "shared"));
        let to_bar = self.take("mbarrier::complete_tx::bytes");
        let group = self.take("bulk_group");
        let multicast = self.take("multicast::cluster");
        let hint = self.take("L2::cache_hint");
        let mut op = None;
        if reduce {
            let a = self.atom_op()?;
            self.take("noftz");
            op = Some((a, if tensor { None } else { Some(self.take_type()?) }));
        }
        if prefetch {
            self.take("L2");
            return Ok(Op::Nop);
        }
        let n = self.s.operands.len() - usize::from(hint).min(self.s.operands.len());
        let far = |d: &mut Self, i: usize, bytes: usize| -> Result<Far, String> {
            if let Some(rank) = rank {
                let Operand::Mem { base, offset, more } = d.operand(i)? else {
                    return d.fail(format!("expected `[map, {{coordinates}}]` as operand {}", i + 1));
                };
                let Some(Operand::Vector(c)) = more.first() else {
                    return d.fail(format!("expected `[map, {{coordinates}}]` as operand {}", i + 1));
                };
                if c.len() != rank {
                    return d.fail(format!("expected {rank} coordinates, found {}", c.len()));
                }
                let map = d.addr_of(base, *offset)?;
                let mut coords = vec![];
                for o in c {
                    coords.push(d.source_of(o, Ty::S32, true)?);
                }
                Ok(Far::Tensor { map, coords })
            } else {
                Ok(Far::Flat { at: d.addr(i)?, bytes: d.source(bytes, Ty::U32)? })
            }
        };
        let flat = usize::from(!tensor);
        let op = match spaces[..] {
            [Space::Shared, Space::Global] if to_bar && !reduce => {
                let want = 3 + flat + usize::from(multicast);
                if n != want {
                    return self.fail(format!("expected {want} operands before a cache policy, found {n}"));
                }
                let far = far(self, 1, 2)?;
                let (dst, bar) = (self.addr(0)?, self.addr(2 + flat)?);
                let multicast = if multicast { Some(self.source(3 + flat, Ty::U16)?) } else { None };
                BulkOp::Load { far, dst, bar, multicast }
            }
            [Space::Shared, Space::Shared] if to_bar && !tensor && !reduce => {
                self.count(4, 4)?;
                BulkOp::Send {
                    dst: self.addr(0)?,
                    src: self.addr(1)?,
                    bytes: self.source(2, Ty::U32)?,
                    bar: self.addr(3)?,
                }
            }
            [Space::Global, Space::Shared] if group => {
                if n != 2 + flat {
                    return self.fail(format!("expected {} operands before a cache policy, found {n}", 2 + flat));
                }
                let far = far(self, 0, 2)?;
                BulkOp::Store { far, src: self.addr(1)?, reduce: op }
            }
            _ => return self.fail("expected a destination, a source and how completion is told"),
        };
        if hint {
            self.source(n, Ty::B64)?;
        }
        Ok(Op::Bulk(Box::new(op)))
    }
}
