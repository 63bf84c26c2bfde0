//! `wgmma` and `tensormap.replace`.

use super::Decoder;
use crate::{
    engines::ops::{BulkOp, MapField, OperandA, WgmmaMma, WgmmaOp},
    inst::{Op, Src, Ty},
    text::parser::Operand,
};

impl Decoder<'_> {
    pub(super) fn wgmma(&mut self) -> Result<Op, String> {
        let what = self.need(&[("fence", 0), ("commit_group", 1), ("wait_group", 2), ("mma_async", 3)])?;
        if !self.take("sync") {
            return self.fail("expected .sync");
        }
        self.aligned()?;
        let op = match what {
            0 => WgmmaOp::Fence,
            1 => WgmmaOp::Commit,
            2 => WgmmaOp::Wait(self.constant(0)? as usize),
            _ => self.mma_async()?,
        };
        Ok(Op::Wgmma(Box::new(op)))
    }

    fn mma_async(&mut self) -> Result<WgmmaOp, String> {
        let (tb, ta, td) = (self.take_type()?, self.take_type()?, self.take_type()?);
        if td != Ty::F32 {
            return self.fail("only accumulators of f32 are supported");
        }
        let k = match ta {
            Ty::Bf16 | Ty::F16 if ta == tb => 16,
            Ty::E4m3 | Ty::E5m2 if tb.bits() == 8 && tb.float() => 32,
            Ty::Tf32 if ta == tb => 8,
            _ => return self.fail(format!("there is no {ta:?} x {tb:?}")),
        };
        let shape = self.mods.iter().position(|m| m.starts_with("m64n"));
        let Some(shape) = shape.map(|i| self.mods.remove(i)) else { return self.fail("expected a shape m64n..k..") };
        let n = shape["m64n".len()..].split_once('k').and_then(|(n, kk)| {
            let n: usize = n.parse().ok()?;
            (kk.parse() == Ok(k) && n.is_multiple_of(8) && (8..=256).contains(&n)).then_some(n)
        });
        let Some(n) = n else {
            return self.fail(format!("expected m64n8k{k} to m64n256k{k} in steps of 8, found {shape}"));
        };
        let d = self.dests(0, n / 2, 32)?;
        self.reads.extend(&d);
        let a = match self.operand(1)? {
            Operand::Vector(_) => {
                let s = self.sources(1, 4, Ty::B32)?;
                let regs: Vec<_> = s.iter().filter_map(|s| if let Src::Reg(r) = s { Some(*r) } else { None }).collect();
                if regs.len() != 4 {
                    return self.fail("expected four registers as A");
                }
                OperandA::Regs(regs)
            }
            _ => OperandA::Shared(self.source(1, Ty::B64)?),
        };
        let b = self.source(2, Ty::B64)?;
        let scale_d = match self.operand(3)? {
            Operand::Int(x) if *x <= 1 => Src::Imm(*x),
            _ => self.source(3, Ty::Pred)?,
        };
        let halves = ta.bits() == 16;
        let num_trans = if !halves {
            0
        } else if matches!(a, OperandA::Shared(_)) {
            2
        } else {
            1
        };
        self.count(6 + num_trans, 6 + num_trans)?;
        let sign = |d: &mut Self, i| match d.constant(i)? as i64 {
            1 => Ok(1.0),
            -1 => Ok(-1.0),
            x => d.fail(format!("expected 1 or -1, found {x}")),
        };
        let (sign_a, sign_b) = (sign(self, 4)?, sign(self, 5)?);
        let mut trans = [false; 2];
        for i in 0..num_trans {
            trans[2 - num_trans + i] = match self.constant(6 + i)? {
                0 => false,
                1 => true,
                x => return self.fail(format!("expected 0 or 1, found {x}")),
            };
        }
        let [trans_a, trans_b] = trans;
        Ok(WgmmaOp::Mma(Box::new(WgmmaMma { n, k, ta, tb, d, a, b, scale_d, sign_a, sign_b, trans_a, trans_b })))
    }

    pub(super) fn tensormap(&mut self) -> Result<Op, String> {
        if !self.take("replace") || !self.take("tile") {
            return self.fail("expected .replace.tile");
        }
        let field = self.need(&[("global_address", 0), ("global_dim", 1), ("global_stride", 2), ("box_dim", 3)])?;
        self.space();
        self.take("b1024");
        let ty = self.take_type()?;
        let (index, value) = if field == 0 { (0, 1) } else { (self.constant(1)? as usize, 2) };
        if index > 4 {
            return self.fail("expected an axis from 0 to 4");
        }
        self.count(value + 1, value + 1)?;
        let field = match field {
            0 => MapField::Address,
            1 => MapField::Dim(index),
            2 => MapField::Stride(index),
            _ => MapField::Box(index),
        };
        let addr = self.addr(0)?;
        Ok(Op::Bulk(Box::new(BulkOp::ReplaceMap { addr, field, value: self.source(value, ty)? })))
    }
}
