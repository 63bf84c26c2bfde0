//! Conversions.

use super::Cx;
use crate::{
    inst::{CvtOp, Lanes, Round, Ty},
    num::{decode, encode, f32_to_bf16, flush, format, round_integral, round_to},
    state::Warp,
};

impl Cx<'_, '_, '_> {
    pub(super) fn cvt(&mut self, w: &mut Warp, mask: u32, op: &CvtOp) {
        let a = self.values(w, op.a);
        let low = op.b.map(|b| self.values(w, b));
        let mut out: Lanes = [0; 32];
        for l in 0..32 {
            out[l] = match (&low, op.from, op.to) {
                (Some(b), ..) => {
                    let shift = op.to.bits() / 2;
                    scalar(op, a[l]) << shift | scalar(op, b[l])
                }
                // Pairs of e4m3 or e5m2 to pairs of f16: each is exact.
                (None, Ty::E4m3x2 | Ty::E5m2x2, Ty::F16x2) => {
                    let half = |x: u64| encode(decode(x & 255, op.from), Ty::F16);
                    half(a[l] >> 8) << 16 | half(a[l])
                }
                (None, Ty::F16x2, Ty::E4m3x2 | Ty::E5m2x2) => {
                    let part = |x: u64| to_float(op, decode(x & 0xffff, Ty::F16));
                    part(a[l] >> 16) << 8 | part(a[l])
                }
                _ => scalar(op, a[l]),
            };
        }
        w.set(op.d, mask, &out);
    }
}

fn scalar(op: &CvtOp, x: u64) -> u64 {
    if op.from.float() {
        if op.from == Ty::F32 && op.to == Ty::Bf16 || op.to == Ty::Bf16x2 {
            let v = f32::from_bits(x as u32);
            if op.from == Ty::F32 && op.round == Round::Nearest && !op.relu && !op.sat {
                return u64::from(f32_to_bf16(if op.ftz { flush(v) } else { v }));
            }
        }
        let mut v = decode(x, op.from);
        if op.ftz && op.from == Ty::F32 && f32::from_bits(x as u32).is_subnormal() {
            v = 0f64.copysign(v);
        }
        if op.to.float() { to_float(op, v) } else { to_integer(op, v) }
    } else {
        let up = 64 - op.from.bits().min(64);
        let v = if op.from.signed() { i128::from(((x << up) as i64) >> up) } else { i128::from(x & op.from.mask()) };
        if op.to.float() {
            integer_to_float(op, v)
        } else if op.sat {
            let bits = op.to.bits();
            let (lo, hi) = if op.to.signed() {
                (-1i128 << (bits - 1), (1i128 << (bits - 1)) - 1)
            } else {
                (0, (1i128 << bits) - 1)
            };
            extend(op, v.clamp(lo, hi) as u64)
        } else {
            extend(op, v as u64)
        }
    }
}

/// An integer result in a register that may be wider than its type.
fn extend(op: &CvtOp, x: u64) -> u64 {
    let up = 64 - op.to.bits();
    let register = u64::MAX >> (64 - op.d_bits);
    if op.to.signed() { (((x << up) as i64) >> up) as u64 & register } else { x & op.to.mask() & register }
}

fn to_float(op: &CvtOp, v: f64) -> u64 {
    let mut v = if op.integral { round_integral(v, op.round) } else { v };
    if op.relu && v < 0.0 {
        v = 0.0;
    }
    let f = format(op.to);
    let mut r = match (op.to, op.round) {
        (Ty::F64, _) => v,
        (Ty::F32, Round::Nearest) => f64::from(v as f32),
        _ => round_to(v, f, op.round),
    };
    let eight = matches!(op.to, Ty::E4m3x2 | Ty::E5m2x2);
    if eight {
        // Above the largest there is only the largest.
        if r.abs() > f.max {
            r = f.max.copysign(r);
        }
    } else if op.sat {
        r = if r.is_nan() { 0.0 } else { r.clamp(0.0, 1.0) };
    }
    let bits = encode(r, op.to);
    if op.ftz && op.to == Ty::F32 { u64::from(flush(f32::from_bits(bits as u32)).to_bits()) } else { bits }
}

fn to_integer(op: &CvtOp, v: f64) -> u64 {
    let bits = op.to.bits();
    if v.is_nan() {
        let wide = bits == 64 || op.from == Ty::F64;
        return if wide { 1 << (bits - 1) } else { 0 };
    }
    let v = round_integral(v, op.round);
    let (lo, hi) =
        if op.to.signed() { (-1i128 << (bits - 1), (1i128 << (bits - 1)) - 1) } else { (0, (1i128 << bits) - 1) };
    extend(op, (v as i128).clamp(lo, hi) as u64)
}

fn integer_to_float(op: &CvtOp, v: i128) -> u64 {
    if op.round == Round::Nearest {
        match op.to {
            Ty::F32 => return u64::from((v as f32).to_bits()),
            Ty::F64 => return (v as f64).to_bits(),
            _ => {}
        }
    }
    // Truncated to 53 bits with the last made odd, so that it is rounded once.
    let magnitude = v.unsigned_abs();
    let extra = (128 - magnitude.leading_zeros()).saturating_sub(53);
    let mut kept = magnitude >> extra;
    if kept << extra != magnitude {
        kept |= 1;
    }
    let x = (kept as f64) * 2f64.powi(extra as i32);
    let x = if v < 0 { -x } else { x };
    encode(round_to(x, format(op.to), op.round), op.to)
}
