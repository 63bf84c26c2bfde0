//! What the lanes of a warp do together.

use super::Decoder;
use crate::{
    inst::{AtomOp, Op, Ty},
    warp::ops::{Collective, Shfl, Vote},
};

impl Decoder<'_> {
    pub(super) fn warp(&mut self) -> Result<Op, String> {
        if self.name == "activemask" {
            self.take("b32");
            return Ok(Op::Collective(Box::new(Collective::ActiveMask { d: self.dest(0, Some(32))? })));
        }
        if !self.take("sync") {
            return self.fail("expected .sync");
        }
        let op = match self.name {
            "shfl" => self.shfl()?,
            "vote" => {
                let mode =
                    self.need(&[("all", Vote::All), ("any", Vote::Any), ("uni", Vote::Uni), ("ballot", Vote::Ballot)])?;
                let ty = self.take_type()?;
                if ty != if mode == Vote::Ballot { Ty::B32 } else { Ty::Pred } {
                    return self.fail("expected .ballot.b32 or .pred");
                }
                self.count(3, 3)?;
                let d = self.dest(0, Some(ty.bits()))?;
                Collective::Vote { mode, d, a: self.source(1, Ty::Pred)?, mask: self.source(2, Ty::B32)? }
            }
            "match" => {
                let all = self.need(&[("any", false), ("all", true)])?;
                let ty = self.take_type()?;
                self.count(3, 3)?;
                let (d, p) = self.dest_pair(0, 32)?;
                Collective::Match { all, d, p, a: self.source(1, ty)?, mask: self.source(2, Ty::B32)? }
            }
            "redux" => {
                let op = self.atom_op()?;
                let ty = self.take_type()?;
                let logic = matches!(op, AtomOp::And | AtomOp::Or | AtomOp::Xor);
                if !matches!((logic, ty), (true, Ty::B32) | (false, Ty::U32 | Ty::S32)) {
                    return self.fail(format!("there is no {op:?} of {ty:?}"));
                }
                self.count(3, 3)?;
                let d = self.dest(0, Some(32))?;
                Collective::Redux { op, ty, d, a: self.source(1, ty)?, mask: self.source(2, Ty::B32)? }
            }
            "elect" => {
                self.count(2, 2)?;
                let (d, p) = self.dest_pair(0, 32)?;
                Collective::Elect { d, p, mask: self.source(1, Ty::B32)? }
            }
            "setmaxnreg" => {
                self.need(&[("inc", 0), ("dec", 1)])?;
                self.aligned()?;
                self.take("u32");
                let n = self.constant(0)?;
                if n % 8 != 0 || !(24..=256).contains(&n) {
                    return self.fail("expected a multiple of 8 from 24 to 256");
                }
                Collective::SetMaxNReg
            }
            "mma" => self.mma()?,
            _ => self.matrix()?,
        };
        Ok(Op::Collective(Box::new(op)))
    }

    pub(super) fn aligned(&mut self) -> Result<(), String> {
        if self.take("aligned") { Ok(()) } else { self.fail("expected .aligned") }
    }

    fn shfl(&mut self) -> Result<Collective, String> {
        let mode = self.need(&[("up", Shfl::Up), ("down", Shfl::Down), ("bfly", Shfl::Bfly), ("idx", Shfl::Idx)])?;
        if !self.take("b32") {
            return self.fail("expected .b32");
        }
        self.count(5, 5)?;
        let (d, p) = self.dest_pair(0, 32)?;
        Ok(Collective::Shfl {
            mode,
            d,
            p,
            a: self.source(1, Ty::B32)?,
            b: self.source(2, Ty::B32)?,
            c: self.source(3, Ty::B32)?,
            mask: self.source(4, Ty::B32)?,
        })
    }

    fn matrix(&mut self) -> Result<Collective, String> {
        self.aligned()?;
        if !self.take("m8n8") || !self.take("b16") {
            return self.fail("expected .m8n8 and .b16");
        }
        let n = self.need(&[("x1", 1), ("x2", 2), ("x4", 4)])?;
        let trans = self.take("trans");
        self.space();
        self.count(2, 2)?;
        if self.name == "ldmatrix" {
            let d = self.dests(0, n, 32)?;
            Ok(Collective::LdMatrix { trans, d, addr: self.addr(1)? })
        } else {
            let addr = self.addr(0)?;
            Ok(Collective::StMatrix { trans, s: self.sources(1, n, Ty::B32)?, addr })
        }
    }

    fn mma(&mut self) -> Result<Collective, String> {
        self.aligned()?;
        let k = self.need(&[("m16n8k4", 4), ("m16n8k8", 8), ("m16n8k16", 16), ("m16n8k32", 32)])?;
        if !self.take("row") || !self.take("col") {
            return self.fail("expected .row.col");
        }
        let c = self.take_type()?;
        let (tb, ta, d) = (self.take_type()?, self.take_type()?, self.take_type()?);
        if (c, d) != (Ty::F32, Ty::F32) {
            return self.fail("only accumulators of f32 are supported");
        }
        let bits = ta.bits() as usize;
        let fine = match k {
            4 => bits == 32,
            8 => bits == 32 || bits == 16,
            16 => bits == 16,
            _ => bits == 8,
        };
        let known = matches!(ta, Ty::Bf16 | Ty::F16 | Ty::Tf32 | Ty::E4m3 | Ty::E5m2);
        if !fine || !known || tb.bits() != ta.bits() || bits > 8 && ta != tb {
            return self.fail(format!("there is no {ta:?} x {tb:?} of k{k}"));
        }
        // 16 x k and 8 x k elements over 32 lanes.
        let (na, nb) = (16 * k * bits / 1024, 8 * k * bits / 1024);
        self.count(4, 4)?;
        Ok(Collective::Mma {
            k,
            ta,
            tb,
            d: self.dests(0, 4, 32)?,
            a: self.sources(1, na, Ty::B32)?,
            b: self.sources(2, nb, Ty::B32)?,
            c: self.sources(3, 4, Ty::F32)?,
        })
    }
}
