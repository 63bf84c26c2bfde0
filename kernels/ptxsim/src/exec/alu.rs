//! Integer arithmetic and logic, selection and comparison.

use super::Cx;
use crate::{
    inst::{Alu, AluOp, Cmp, Combine, Lanes, PrmtMode, Reg, SetpOp, Src, Ty},
    state::{Warp, lanes},
};

impl Cx<'_, '_, '_> {
    pub(super) fn alu(&mut self, w: &mut Warp, mask: u32, op: AluOp, d: Reg, s: &[Src; 4]) -> Result<(), String> {
        let mut out = [0; 32];
        {
            let mut buffers = [[0; 32]; 4];
            let [b0, b1, b2, b3] = &mut buffers;
            let (a, b) = (self.value(w, s[0], b0), self.value(w, s[1], b1));
            if op.ty.float() && !matches!(op.kind, Alu::Mov | Alu::Selp | Alu::Slct(_)) {
                let c = self.value(w, s[2], b2);
                super::float::float(op, a, b, c, self.env.numerics, &mut out);
            } else {
                let (c, e) = (self.value(w, s[2], b2), self.value(w, s[3], b3));
                integer(op, a, b, c, e, mask, &mut out)?;
            }
        }
        w.set(d, mask, &out);
        Ok(())
    }

    pub(super) fn setp(&mut self, w: &mut Warp, mask: u32, op: &SetpOp) {
        let (a, b) = (self.values(w, op.a), self.values(w, op.b));
        let mut yes: Lanes = std::array::from_fn(|l| u64::from(compare(op, a[l], b[l])));
        let mut no = yes.map(|x| x ^ 1);
        if let Some((how, c)) = op.combine {
            let c = self.values(w, c);
            let join = |x: u64, c: u64| match how {
                Combine::And => x & c,
                Combine::Or => x | c,
                Combine::Xor => x ^ c,
            };
            yes = std::array::from_fn(|l| join(yes[l], c[l]));
            no = std::array::from_fn(|l| join(no[l], c[l]));
        }
        if let Some(d) = op.d {
            w.set(d, mask, &yes.map(|x| if x == 1 { op.yes } else { 0 }));
        }
        if let Some(q) = op.q {
            w.set(q, mask, &no);
        }
    }
}

fn compare(op: &SetpOp, a: u64, b: u64) -> bool {
    use Cmp::*;
    if op.ty.float() {
        let flush = |x: f64| if op.ftz && (x as f32).is_subnormal() { 0.0 } else { x };
        let (x, y) = (flush(crate::num::decode(a, op.ty)), flush(crate::num::decode(b, op.ty)));
        let nan = x.is_nan() || y.is_nan();
        return match op.cmp {
            Eq => x == y,
            Ne => !nan && x != y,
            Lt => x < y,
            Le => x <= y,
            Gt => x > y,
            Ge => x >= y,
            Equ => nan || x == y,
            Neu => x != y,
            Ltu => nan || x < y,
            Leu => nan || x <= y,
            Gtu => nan || x > y,
            Geu => nan || x >= y,
            Num => !nan,
            Nan => nan,
        };
    }
    let order = if op.ty.signed() {
        let up = 64 - op.ty.bits();
        ((a << up) as i64).cmp(&((b << up) as i64))
    } else {
        (a & op.ty.mask()).cmp(&(b & op.ty.mask()))
    };
    match op.cmp {
        Eq => order.is_eq(),
        Ne => order.is_ne(),
        Lt => order.is_lt(),
        Le => order.is_le(),
        Gt => order.is_gt(),
        _ => order.is_ge(),
    }
}

fn integer(op: AluOp, a: &Lanes, b: &Lanes, c: &Lanes, e: &Lanes, mask: u32, out: &mut Lanes) -> Result<(), String> {
    let ty = op.ty;
    let (bits, m, signed) = (ty.bits(), ty.mask(), ty.signed());
    let up = 64 - bits.min(64);
    let sx = |x: u64| ((x << up) as i64) >> up;
    macro_rules! each {
        (|$x:ident| $f:expr) => {
            for l in 0..32 {
                let $x = a[l];
                out[l] = $f;
            }
        };
        (|$x:ident, $y:ident| $f:expr) => {
            for l in 0..32 {
                let ($x, $y) = (a[l], b[l]);
                out[l] = $f;
            }
        };
        (|$x:ident, $y:ident, $z:ident| $f:expr) => {
            for l in 0..32 {
                let ($x, $y, $z) = (a[l], b[l], c[l]);
                out[l] = $f;
            }
        };
    }
    let product = |x: u64, y: u64| -> i128 {
        if signed { i128::from(sx(x)) * i128::from(sx(y)) } else { (u128::from(x & m) * u128::from(y & m)) as i128 }
    };
    let wide = |x: u64, y: u64| if signed { sx(x).wrapping_mul(sx(y)) as u64 } else { (x & m).wrapping_mul(y & m) };
    let wide_mask = if bits == 16 { 0xffff_ffff } else { u64::MAX };
    match op.kind {
        Alu::Mov => each!(|x| x & m),
        Alu::Add if op.sat => each!(|x, y| (sx(x) + sx(y)).clamp(i32::MIN.into(), i32::MAX.into()) as u64 & m),
        Alu::Sub if op.sat => each!(|x, y| (sx(x) - sx(y)).clamp(i32::MIN.into(), i32::MAX.into()) as u64 & m),
        Alu::Add => each!(|x, y| x.wrapping_add(y) & m),
        Alu::Sub => each!(|x, y| x.wrapping_sub(y) & m),
        Alu::MulLo => each!(|x, y| x.wrapping_mul(y) & m),
        Alu::MulWide => each!(|x, y| wide(x, y) & wide_mask),
        Alu::MulHi => each!(|x, y| (product(x, y) >> bits) as u64 & m),
        Alu::MadLo => each!(|x, y, z| x.wrapping_mul(y).wrapping_add(z) & m),
        Alu::MadWide => each!(|x, y, z| wide(x, y).wrapping_add(z) & wide_mask),
        Alu::MadHi => each!(|x, y, z| ((product(x, y) >> bits) as u64).wrapping_add(z) & m),
        Alu::Mul24 => each!(|x, y| if signed {
            ((((x << 40) as i64) >> 40) * (((y << 40) as i64) >> 40)) as u64 & m
        } else {
            ((x & 0xff_ffff) * (y & 0xff_ffff)) & m
        }),
        Alu::Div | Alu::Rem => {
            if lanes(mask).any(|l| b[l] & m == 0) {
                return Err("division by zero".to_owned());
            }
            for l in lanes(mask) {
                let (x, y) = (a[l] & m, b[l] & m);
                out[l] = match (signed, op.kind) {
                    (true, Alu::Div) => sx(x).wrapping_div(sx(y)) as u64 & m,
                    (true, _) => sx(x).wrapping_rem(sx(y)) as u64 & m,
                    (false, Alu::Div) => x / y,
                    (false, _) => x % y,
                };
            }
        }
        Alu::Min if signed => each!(|x, y| sx(x).min(sx(y)) as u64 & m),
        Alu::Max if signed => each!(|x, y| sx(x).max(sx(y)) as u64 & m),
        Alu::Min => each!(|x, y| x.min(y)),
        Alu::Max => each!(|x, y| x.max(y)),
        Alu::Abs => each!(|x| sx(x).unsigned_abs() & m),
        Alu::Neg => each!(|x| x.wrapping_neg() & m),
        Alu::And => each!(|x, y| x & y),
        Alu::Or => each!(|x, y| x | y),
        Alu::Xor => each!(|x, y| x ^ y),
        Alu::Not => each!(|x| !x & m),
        Alu::Cnot => each!(|x| u64::from(x == 0)),
        Alu::Shl => each!(|x, s| if s >= u64::from(bits) { 0 } else { x << s & m }),
        Alu::Shr if signed => each!(|x, s| (sx(x) >> s.min(63)) as u64 & m),
        Alu::Shr => each!(|x, s| if s >= u64::from(bits) { 0 } else { (x & m) >> s }),
        Alu::ShfL(wrap) => each!(|lo, hi, s| {
            let s = if wrap { s & 31 } else { s.min(32) };
            ((hi << 32 | lo) << s) >> 32
        }),
        Alu::ShfR(wrap) => each!(|lo, hi, s| {
            let s = if wrap { s & 31 } else { s.min(32) };
            (hi << 32 | lo) >> s & m
        }),
        Alu::Bfe => each!(|x, p, n| bfe(x, p as u32 & 255, n as u32 & 255, bits, signed) & m),
        Alu::Bfi => {
            for l in 0..32 {
                let (pos, len) = (c[l] as u32 & 255, e[l] as u32 & 255);
                let field = if pos >= bits { 0 } else { ones(len) << pos };
                out[l] = (a[l].checked_shl(pos).unwrap_or(0) & field | b[l] & !field) & m;
            }
        }
        Alu::Prmt(mode) => each!(|x, y, z| prmt(mode, y << 32 | x, z)),
        Alu::Popc => each!(|x| u64::from((x & m).count_ones())),
        Alu::Clz => each!(|x| u64::from((x & m).leading_zeros() - up)),
        Alu::Brev => each!(|x| (x & m).reverse_bits() >> up),
        Alu::Bfind(amount) => each!(|x| {
            let x = if signed && sx(x) < 0 { !x & m } else { x & m };
            match x {
                0 => 0xffff_ffff,
                _ if amount => u64::from(x.leading_zeros() - up),
                _ => u64::from(63 - x.leading_zeros()),
            }
        }),
        Alu::Lop3(table) => each!(|x, y, z| {
            let mut r = 0;
            for i in 0..8 {
                if table >> i & 1 == 1 {
                    let pick = |v: u64, bit: u8| if i & bit != 0 { v } else { !v };
                    r |= pick(x, 4) & pick(y, 2) & pick(z, 1);
                }
            }
            r & m
        }),
        Alu::Selp => each!(|x, y, p| if p & 1 == 1 { x } else { y }),
        Alu::Slct(float) => each!(|x, y, z| {
            let first = if float { f32::from_bits(z as u32) >= 0.0 } else { z as u32 as i32 >= 0 };
            if first { x } else { y }
        }),
        Alu::Sad => each!(|x, y, z| {
            let d = if signed { sx(x).abs_diff(sx(y)) } else { x.abs_diff(y) };
            d.wrapping_add(z) & m
        }),
        _ => return Err(format!("no {:?} of {ty:?}", op.kind)),
    }
    if ty == Ty::Pred {
        for x in out {
            *x &= 1;
        }
    }
    Ok(())
}

fn ones(n: u32) -> u64 {
    if n >= 64 { u64::MAX } else { (1 << n) - 1 }
}

fn bfe(x: u64, pos: u32, len: u32, bits: u32, signed: bool) -> u64 {
    let field = if pos >= bits { 0 } else { x >> pos } & ones(len);
    let top = (pos + len).saturating_sub(1).min(bits - 1);
    if signed && len > 0 && x >> top & 1 == 1 {
        let known = len.min(bits.saturating_sub(pos));
        field & ones(known) | !ones(known)
    } else {
        field
    }
}

fn prmt(mode: PrmtMode, x: u64, z: u64) -> u64 {
    let i = z & 3;
    let picks: [u64; 4] = match mode {
        PrmtMode::Index => std::array::from_fn(|k| z >> (4 * k) & 15),
        PrmtMode::F4e => std::array::from_fn(|k| i + k as u64),
        PrmtMode::B4e => std::array::from_fn(|k| (8 + i - k as u64) & 7),
        PrmtMode::Rc8 => [i; 4],
        PrmtMode::Ecl => std::array::from_fn(|k| i.max(k as u64)),
        PrmtMode::Ecr => std::array::from_fn(|k| i.min(k as u64)),
        PrmtMode::Rc16 => std::array::from_fn(|k| (i & 1) * 2 + (k as u64 & 1)),
    };
    picks.iter().enumerate().fold(0, |r, (k, p)| {
        let byte = x >> (8 * (p & 7)) & 255;
        let byte = if p & 8 == 0 { byte } else { 255 * (byte >> 7) };
        r | byte << (8 * k)
    })
}
