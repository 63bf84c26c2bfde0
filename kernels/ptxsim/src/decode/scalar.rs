//! Arithmetic, logic, comparison and conversion.

use super::Decoder;
use crate::{
    inst::{Alu, AluOp, Cmp, Combine, CvtOp, Op, PrmtMode, Round, SetpOp, Src, Testp, Ty},
    text::parser::Operand,
};

/// An instruction of a type without modifiers.
pub(crate) fn plain(kind: Alu, ty: Ty) -> AluOp {
    AluOp { kind, ty, ftz: false, sat: false, nan: false, approx: false }
}

impl Decoder<'_> {
    pub(super) fn scalar(&mut self) -> Result<Op, String> {
        match self.name {
            "mov" => return self.mov(),
            "setp" | "set" => return self.setp(),
            "cvt" => return self.cvt(),
            "prmt" => return self.prmt(),
            "shf" => return self.shf(),
            "lop3" => return self.lop3(),
            "testp" => return self.testp(),
            "selp" | "slct" => return self.select(),
            "shl" | "shr" | "bfe" | "bfi" | "popc" | "clz" | "bfind" => return self.bits(),
            _ => {}
        }
        let ty = self.take_type()?;
        let mut op = plain(Alu::Mov, ty);
        op.ftz = self.take("ftz");
        op.sat = self.take("sat");
        if op.sat && !(ty.float() || ty == Ty::S32) {
            return self.fail("expected .s32 or a float type with .sat");
        }
        op.nan = self.take("NaN");
        let float = ty.float();
        let mut n = 2;
        let mut d_bits = ty.bits();
        let mut third = ty;
        let part = |d: &mut Self, lo, hi, wide| d.need(&[("lo", lo), ("hi", hi), ("wide", wide)]);
        op.kind = match (self.name, float) {
            ("add", _) => Alu::Add,
            ("sub", _) => Alu::Sub,
            ("mul", true) => Alu::MulLo,
            ("mul", false) => part(self, Alu::MulLo, Alu::MulHi, Alu::MulWide)?,
            ("mad", false) => part(self, Alu::MadLo, Alu::MadHi, Alu::MadWide)?,
            ("mad" | "fma", true) => {
                if self.take("relu") {
                    Alu::FmaRelu
                } else {
                    Alu::Fma
                }
            }
            ("mul24", false) => {
                if !self.take("lo") {
                    return self.fail("only .lo is supported");
                }
                Alu::Mul24
            }
            ("div", _) => Alu::Div,
            ("rem", false) => Alu::Rem,
            ("min", _) => Alu::Min,
            ("max", _) => Alu::Max,
            ("abs", _) => Alu::Abs,
            ("neg", _) => Alu::Neg,
            ("and", false) => Alu::And,
            ("or", false) => Alu::Or,
            ("xor", false) => Alu::Xor,
            ("not", false) => Alu::Not,
            ("cnot", false) => Alu::Cnot,
            ("brev", false) => Alu::Brev,
            ("sad", false) => Alu::Sad,
            ("ex2", true) => Alu::Ex2,
            ("lg2", true) => Alu::Lg2,
            ("rcp", true) => Alu::Rcp,
            ("rsqrt", true) => Alu::Rsqrt,
            ("sqrt", true) => Alu::Sqrt,
            ("sin", true) => Alu::Sin,
            ("cos", true) => Alu::Cos,
            ("tanh", true) => Alu::Tanh,
            ("copysign", true) => Alu::Copysign,
            _ => return self.fail("instruction is not known"),
        };
        match op.kind {
            Alu::MulWide | Alu::MadWide => {
                d_bits *= 2;
                third = match ty {
                    Ty::S16 | Ty::U16 => Ty::B32,
                    Ty::S32 | Ty::U32 => Ty::B64,
                    _ => return self.fail("expected a type of 16 or 32 bits with .wide"),
                };
            }
            _ => {}
        }
        if matches!(
            op.kind,
            Alu::Abs
                | Alu::Neg
                | Alu::Not
                | Alu::Cnot
                | Alu::Brev
                | Alu::Ex2
                | Alu::Lg2
                | Alu::Rcp
                | Alu::Rsqrt
                | Alu::Sqrt
                | Alu::Sin
                | Alu::Cos
                | Alu::Tanh
        ) {
            n = 1;
        }
        if matches!(op.kind, Alu::MadLo | Alu::MadHi | Alu::MadWide | Alu::Fma | Alu::FmaRelu | Alu::Sad) {
            n = 3;
        }
        self.arithmetic_mode(&mut op)?;
        self.count(n + 1, n + 1)?;
        let d = self.dest(0, Some(d_bits))?;
        let mut s = [Src::Imm(0); 4];
        for (i, s) in s.iter_mut().enumerate().take(n) {
            *s = self.source(i + 1, if i == 2 { third } else { ty })?;
        }
        Ok(Op::Alu { op, d, s })
    }

    /// Rounding and approximation, which must be said where PTX demands it.
    fn arithmetic_mode(&mut self, op: &mut AluOp) -> Result<(), String> {
        if !op.ty.float() {
            return Ok(());
        }
        let nearest = self.take("rn");
        let approx = self.take("approx") | self.take("full");
        op.approx = approx;
        let wide = matches!(op.ty, Ty::F32 | Ty::F64);
        match op.kind {
            Alu::Fma | Alu::FmaRelu if !nearest && self.name == "fma" => self.fail("expected .rn"),
            Alu::Div | Alu::Rcp | Alu::Sqrt if nearest == approx && wide => self.fail("expected .rn or .approx"),
            Alu::Ex2 | Alu::Lg2 | Alu::Rsqrt | Alu::Sin | Alu::Cos | Alu::Tanh if !approx => {
                self.fail("expected .approx")
            }
            Alu::Min | Alu::Max | Alu::Abs | Alu::Neg if nearest || approx => self.fail("expected no rounding"),
            _ => {
                self.take("noftz");
                Ok(())
            }
        }
    }

    fn mov(&mut self) -> Result<Op, String> {
        let ty = self.take_type()?;
        self.count(2, 2)?;
        let bits = ty.bits();
        match (self.operand(0)?, self.operand(1)?) {
            (Operand::Vector(d), Operand::Reg(_)) if bits == 128 && d.len() == 2 => {
                let Operand::Reg(a) = *self.operand(1)? else { return self.fail("expected a register") };
                self.check_width(a, Some(128))?;
                self.reads.extend([a, a + 1]);
                Ok(Op::Unpack128 { d: [self.dest_or_sink(&d[0], Some(64))?, self.dest_or_sink(&d[1], Some(64))?], a })
            }
            (Operand::Reg(r), Operand::Vector(_)) if bits == 128 => {
                self.check_width(*r, Some(128))?;
                self.writes.push(*r);
                let s = self.sources(1, 2, Ty::B64)?;
                Ok(Op::Pack128 { d: *r, s: [s[0], s[1]] })
            }
            (Operand::Vector(d), _) => {
                let each = bits / d.len().max(1) as u32;
                if d.is_empty() || !matches!(each, 8 | 16 | 32) {
                    return self.fail(format!("expected 2 or 4 parts of {bits} bits, found {}", d.len()));
                }
                let mut all = vec![];
                for o in d {
                    all.push(self.dest_or_sink(o, Some(each))?);
                }
                let a = self.source(1, ty)?;
                Ok(Op::Unpack { d: all, bits: each, a })
            }
            (_, Operand::Vector(s)) => {
                let each = bits / s.len().max(1) as u32;
                let Some(part) = [Ty::B8, Ty::B16, Ty::B32].into_iter().find(|t| t.bits() == each) else {
                    return self.fail(format!("expected 2 or 4 parts of {bits} bits, found {}", s.len()));
                };
                let s = self.sources(1, s.len(), part)?;
                Ok(Op::Pack { d: self.dest(0, Some(bits))?, bits: each, s })
            }
            _ if bits == 128 => self.fail("expected a pair of 64-bit values"),
            _ => {
                let d = self.dest(0, Some(bits))?;
                let s = self.source(1, ty)?;
                Ok(Op::Alu { op: plain(Alu::Mov, ty), d, s: [s; 4] })
            }
        }
    }

    fn setp(&mut self) -> Result<Op, String> {
        let ty = self.take_type()?;
        let ftz = self.take("ftz");
        let yes = if self.name == "setp" {
            1
        } else {
            match self.take_type()? {
                Ty::F32 => u64::from(1f32.to_bits()),
                Ty::U32 | Ty::S32 => 0xffff_ffff,
                _ => return self.fail("expected .u32, .s32 or .f32"),
            }
        };
        let cmp = self.need(&[
            ("eq", Cmp::Eq),
            ("ne", Cmp::Ne),
            ("lt", Cmp::Lt),
            ("le", Cmp::Le),
            ("gt", Cmp::Gt),
            ("ge", Cmp::Ge),
            ("lo", Cmp::Lt),
            ("ls", Cmp::Le),
            ("hi", Cmp::Gt),
            ("hs", Cmp::Ge),
            ("equ", Cmp::Equ),
            ("neu", Cmp::Neu),
            ("ltu", Cmp::Ltu),
            ("leu", Cmp::Leu),
            ("gtu", Cmp::Gtu),
            ("geu", Cmp::Geu),
            ("num", Cmp::Num),
            ("nan", Cmp::Nan),
        ])?;
        if !ty.float() && !matches!(cmp, Cmp::Eq | Cmp::Ne | Cmp::Lt | Cmp::Le | Cmp::Gt | Cmp::Ge) {
            return self.fail("expected a comparison of integers");
        }
        if matches!(ty, Ty::B16 | Ty::B32 | Ty::B64) && !matches!(cmp, Cmp::Eq | Cmp::Ne) {
            return self.fail("expected .eq or .ne for bits");
        }
        let combine = self.take_any(&[("and", Combine::And), ("or", Combine::Or), ("xor", Combine::Xor)]);
        self.count(3 + usize::from(combine.is_some()), 3 + usize::from(combine.is_some()))?;
        let (d, q) = self.dest_pair(0, if self.name == "setp" { 1 } else { 32 })?;
        let (a, b) = (self.source(1, ty)?, self.source(2, ty)?);
        let combine = match combine {
            Some(c) => Some((c, self.source(3, Ty::Pred)?)),
            None => None,
        };
        Ok(Op::Setp(Box::new(SetpOp { cmp, ty, ftz, combine, d, q, yes, a, b })))
    }

    fn cvt(&mut self) -> Result<Op, String> {
        let from = self.take_type()?;
        let to = self.take_type()?;
        let integral = self.take_any(&[
            ("rni", Round::Nearest),
            ("rzi", Round::Zero),
            ("rmi", Round::Minus),
            ("rpi", Round::Plus),
        ]);
        let plain = self.take_any(&[
            ("rn", Round::Nearest),
            ("rna", Round::Away),
            ("rz", Round::Zero),
            ("rm", Round::Minus),
            ("rp", Round::Plus),
        ]);
        let ftz = self.take("ftz");
        let sat = self.take("sat") | self.take("satfinite");
        let relu = self.take("relu");
        let rounds = match (from.float(), to.float()) {
            (true, true) => {
                from.bits() > to.bits() || to == Ty::Tf32 || matches!(to, Ty::Bf16x2 | Ty::F16x2 | Ty::E4m3x2)
            }
            (false, true) => true,
            _ => false,
        };
        if from.float() && to.integer() && integral.is_none() {
            return self.fail("expected .rni, .rzi, .rmi or .rpi");
        }
        if rounds && plain.is_none() && integral.is_none() {
            return self.fail("expected a rounding mode");
        }
        let narrow = matches!(to, Ty::E4m3x2 | Ty::E5m2x2);
        if narrow && !sat {
            return self.fail("expected .satfinite");
        }
        let two = (narrow || matches!(to, Ty::Bf16x2 | Ty::F16x2)) && from == Ty::F32;
        self.count(2 + usize::from(two), 2 + usize::from(two))?;
        let d = self.dest(0, None)?;
        let d_bits = self.width(d);
        if d_bits < to.bits() || to.float() && d_bits != to.bits() {
            self.check_width(d, Some(to.bits()))?;
        }
        let o = self.operand(1)?;
        let a = self.source_of(o, from, from.float())?;
        let b = if two { Some(self.source(2, from)?) } else { None };
        let round = integral.or(plain).unwrap_or(Round::Nearest);
        let integral = integral.is_some() && to.float() && from.float();
        Ok(Op::Cvt(Box::new(CvtOp { to, from, round, integral, ftz, sat, relu, d, d_bits, a, b })))
    }

    fn prmt(&mut self) -> Result<Op, String> {
        if !self.take("b32") {
            return self.fail("expected .b32");
        }
        let mode = self
            .take_any(&[
                ("f4e", PrmtMode::F4e),
                ("b4e", PrmtMode::B4e),
                ("rc8", PrmtMode::Rc8),
                ("ecl", PrmtMode::Ecl),
                ("ecr", PrmtMode::Ecr),
                ("rc16", PrmtMode::Rc16),
            ])
            .unwrap_or(PrmtMode::Index);
        self.simple(Alu::Prmt(mode), Ty::B32, 3)
    }

    fn shf(&mut self) -> Result<Op, String> {
        let left = self.need(&[("l", true), ("r", false)])?;
        let wrap = self.need(&[("wrap", true), ("clamp", false)])?;
        if !self.take("b32") {
            return self.fail("expected .b32");
        }
        self.simple(if left { Alu::ShfL(wrap) } else { Alu::ShfR(wrap) }, Ty::B32, 3)
    }

    fn lop3(&mut self) -> Result<Op, String> {
        if !self.take("b32") {
            return self.fail("expected .b32");
        }
        self.count(5, 5)?;
        let table = self.constant(4)?;
        let d = self.dest(0, Some(32))?;
        let s = [self.source(1, Ty::B32)?, self.source(2, Ty::B32)?, self.source(3, Ty::B32)?, Src::Imm(0)];
        Ok(Op::Alu { op: plain(Alu::Lop3(table as u8), Ty::B32), d, s })
    }

    fn simple(&mut self, kind: Alu, ty: Ty, n: usize) -> Result<Op, String> {
        self.count(n + 1, n + 1)?;
        let d = self.dest(0, Some(ty.bits()))?;
        let mut s = [Src::Imm(0); 4];
        for (i, s) in s.iter_mut().enumerate().take(n) {
            *s = self.source(i + 1, ty)?;
        }
        Ok(Op::Alu { op: plain(kind, ty), d, s })
    }

    fn testp(&mut self) -> Result<Op, String> {
        let ty = self.take_type()?;
        let what = self.need(&[
            ("finite", Testp::Finite),
            ("infinite", Testp::Infinite),
            ("number", Testp::Number),
            ("notanumber", Testp::NotANumber),
            ("normal", Testp::Normal),
            ("subnormal", Testp::Subnormal),
        ])?;
        self.count(2, 2)?;
        let d = self.dest(0, Some(1))?;
        let a = self.source(1, ty)?;
        Ok(Op::Alu { op: plain(Alu::Testp(what), ty), d, s: [a; 4] })
    }

    fn select(&mut self) -> Result<Op, String> {
        let (kind, third) = if self.name == "slct" {
            self.take("ftz");
            match self.take_type()? {
                Ty::F32 => (Alu::Slct(true), Ty::F32),
                Ty::S32 => (Alu::Slct(false), Ty::S32),
                _ => return self.fail("expected .s32 or .f32 as the last type"),
            }
        } else {
            (Alu::Selp, Ty::Pred)
        };
        let ty = self.take_type()?;
        self.count(4, 4)?;
        let d = self.dest(0, Some(ty.bits()))?;
        let s = [self.source(1, ty)?, self.source(2, ty)?, self.source(3, third)?, Src::Imm(0)];
        Ok(Op::Alu { op: plain(kind, ty), d, s })
    }

    /// Those with counts and positions of 32 bits.
    fn bits(&mut self) -> Result<Op, String> {
        let ty = self.take_type()?;
        let n = Ty::U32;
        let (kind, d_bits, types): (Alu, u32, &[Ty]) = match self.name {
            "shl" => (Alu::Shl, ty.bits(), &[ty, n]),
            "shr" => (Alu::Shr, ty.bits(), &[ty, n]),
            "bfe" => (Alu::Bfe, ty.bits(), &[ty, n, n]),
            "bfi" => (Alu::Bfi, ty.bits(), &[ty, ty, n, n]),
            "popc" => (Alu::Popc, 32, &[ty]),
            "clz" => (Alu::Clz, 32, &[ty]),
            _ => (Alu::Bfind(self.take("shiftamt")), 32, &[ty]),
        };
        if ty.float() {
            return self.fail("expected an integer type");
        }
        self.count(types.len() + 1, types.len() + 1)?;
        let d = self.dest(0, Some(d_bits))?;
        let mut s = [Src::Imm(0); 4];
        for (i, t) in types.iter().enumerate() {
            s[i] = self.source(i + 1, *t)?;
        }
        Ok(Op::Alu { op: plain(kind, ty), d, s })
    }
}
