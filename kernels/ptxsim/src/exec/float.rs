//! Arithmetic of f32, f64, and of f16 and bf16 alone and in pairs.

use crate::{
    inst::{Alu, AluOp, Lanes, Round, Testp, Ty},
    num::{approx::approximate, bits32, decode, encode, flush, format, round_to},
};

/// Computes all lanes.
pub(super) fn float(op: AluOp, a: &Lanes, b: &Lanes, c: &Lanes, seed: u64, out: &mut Lanes) {
    if let Alu::Testp(what) = op.kind {
        for l in 0..32 {
            out[l] = u64::from(test(what, a[l], op.ty));
        }
        return;
    }
    match op.ty {
        Ty::F32 => single(op, a, b, c, seed, out),
        Ty::F64 => double(op, a, b, c, out),
        _ => small(op, a, b, c, seed, out),
    }
}

fn test(what: Testp, bits: u64, ty: Ty) -> bool {
    let (f32s, x) = (ty == Ty::F32, decode(bits, ty));
    let subnormal = if f32s { f32::from_bits(bits as u32).is_subnormal() } else { x.is_subnormal() };
    match what {
        Testp::Finite => x.is_finite(),
        Testp::Infinite => x.is_infinite(),
        Testp::Number => !x.is_nan(),
        Testp::NotANumber => x.is_nan(),
        Testp::Normal => x.is_finite() && !subnormal && x != 0.0,
        Testp::Subnormal => subnormal,
    }
}

fn min32(x: f32, y: f32, nan: bool) -> f32 {
    if x.is_nan() || y.is_nan() {
        return if nan { f32::NAN } else { x.min(y) };
    }
    if x == y { if x.is_sign_negative() { x } else { y } } else { x.min(y) }
}

fn max32(x: f32, y: f32, nan: bool) -> f32 {
    if x.is_nan() || y.is_nan() {
        return if nan { f32::NAN } else { x.max(y) };
    }
    if x == y { if x.is_sign_negative() { y } else { x } } else { x.max(y) }
}

fn single(op: AluOp, a: &Lanes, b: &Lanes, c: &Lanes, seed: u64, out: &mut Lanes) {
    let ftz = op.ftz;
    macro_rules! each {
        (|$x:ident, $y:ident, $z:ident| $f:expr) => {
            for l in 0..32 {
                let ($x, $y, $z) =
                    (f32::from_bits(a[l] as u32), f32::from_bits(b[l] as u32), f32::from_bits(c[l] as u32));
                if ftz || op.sat {
                    let ($x, $y, $z) = if ftz { (flush($x), flush($y), flush($z)) } else { ($x, $y, $z) };
                    let _ = ($y, $z);
                    let mut r: f32 = $f;
                    if ftz {
                        r = flush(r);
                    }
                    if op.sat {
                        r = if r.is_nan() { 0.0 } else { r.clamp(0.0, 1.0) };
                    }
                    out[l] = bits32(r);
                } else {
                    let _ = ($y, $z);
                    out[l] = bits32($f);
                }
            }
        };
    }
    match op.kind {
        Alu::Add => each!(|x, y, z| x + y),
        Alu::Sub => each!(|x, y, z| x - y),
        Alu::MulLo => each!(|x, y, z| x * y),
        Alu::Fma => each!(|x, y, z| x.mul_add(y, z)),
        Alu::Min => each!(|x, y, z| min32(x, y, op.nan)),
        Alu::Max => each!(|x, y, z| max32(x, y, op.nan)),
        // Signs alone change, also of NaN.
        Alu::Abs if !ftz => {
            for l in 0..32 {
                out[l] = a[l] & 0x7fff_ffff;
            }
        }
        Alu::Neg if !ftz => {
            for l in 0..32 {
                out[l] = a[l] ^ 0x8000_0000;
            }
        }
        Alu::Abs => each!(|x, y, z| x.abs()),
        Alu::Neg => each!(|x, y, z| -x),
        Alu::Copysign => {
            for l in 0..32 {
                out[l] = b[l] & 0x7fff_ffff | a[l] & 0x8000_0000;
            }
        }
        Alu::Div if !op.approx => each!(|x, y, z| x / y),
        Alu::Rcp if !op.approx => each!(|x, y, z| 1.0 / x),
        Alu::Sqrt if !op.approx => each!(|x, y, z| x.sqrt()),
        kind => each!(|x, y, z| approximate(kind, x, if kind == Alu::Div { y } else { 1.0 }, ftz, seed)),
    }
}

fn double(op: AluOp, a: &Lanes, b: &Lanes, c: &Lanes, out: &mut Lanes) {
    macro_rules! each {
        (|$x:ident, $y:ident, $z:ident| $f:expr) => {
            for l in 0..32 {
                let ($x, $y, $z) = (f64::from_bits(a[l]), f64::from_bits(b[l]), f64::from_bits(c[l]));
                let _ = ($y, $z);
                out[l] = f64::to_bits($f);
            }
        };
    }
    match op.kind {
        Alu::Add => each!(|x, y, z| x + y),
        Alu::Sub => each!(|x, y, z| x - y),
        Alu::MulLo => each!(|x, y, z| x * y),
        Alu::Fma => each!(|x, y, z| x.mul_add(y, z)),
        Alu::Div => each!(|x, y, z| x / y),
        Alu::Min => each!(|x, y, z| if x == y && x.is_sign_negative() { x } else { x.min(y) }),
        Alu::Max => each!(|x, y, z| if x == y && y.is_sign_negative() { x } else { x.max(y) }),
        Alu::Abs => each!(|x, y, z| x.abs()),
        Alu::Neg => each!(|x, y, z| -x),
        Alu::Copysign => each!(|x, y, z| y.copysign(x)),
        Alu::Rcp => each!(|x, y, z| 1.0 / x),
        Alu::Sqrt => each!(|x, y, z| x.sqrt()),
        Alu::Rsqrt => each!(|x, y, z| 1.0 / x.sqrt()),
        _ => out.fill(f64::NAN.to_bits()),
    }
}

/// 16-bit formats: computed exactly enough in f64, rounded once.
fn small(op: AluOp, a: &Lanes, b: &Lanes, c: &Lanes, seed: u64, out: &mut Lanes) {
    let (ty, halves) = match op.ty {
        Ty::F16x2 => (Ty::F16, 2),
        Ty::Bf16x2 => (Ty::Bf16, 2),
        t => (t, 1),
    };
    for l in 0..32 {
        out[l] = 0;
        for h in 0..halves {
            let shift = 16 * h;
            let part = |v: u64| v >> shift & 0xffff;
            let r = match op.kind {
                Alu::Abs => part(a[l]) & 0x7fff,
                Alu::Neg => part(a[l]) ^ 0x8000,
                _ => {
                    let value = |v: u64| {
                        let x = decode(part(v), ty);
                        if op.ftz && x.abs() < 2f64.powi(-14) { 0f64.copysign(x) } else { x }
                    };
                    encode(small_value(op, ty, value(a[l]), value(b[l]), value(c[l]), seed), ty)
                }
            };
            out[l] |= r << shift;
        }
    }
}

fn small_value(op: AluOp, ty: Ty, x: f64, y: f64, z: f64, seed: u64) -> f64 {
    let nan = x.is_nan() || y.is_nan();
    let r = match op.kind {
        Alu::Add => x + y,
        Alu::Sub => x - y,
        Alu::MulLo => x * y,
        Alu::Fma | Alu::FmaRelu => return fused(op.kind, ty, x, y, z),
        Alu::Min if nan && op.nan => f64::NAN,
        Alu::Max if nan && op.nan => f64::NAN,
        Alu::Min => x.min(y),
        Alu::Max => x.max(y),
        kind => f64::from(approximate(kind, x as f32, 1.0, false, seed)),
    };
    let r = round_to(r, format(ty), Round::Nearest);
    if op.sat { if r.is_nan() { 0.0 } else { r.clamp(0.0, 1.0) } } else { r }
}

/// The product is exact in f64; the sum is made odd where it is not, so that it is rounded once.
fn fused(kind: Alu, ty: Ty, x: f64, y: f64, z: f64) -> f64 {
    let p = x * y;
    let s = p + z;
    let mut r = s;
    if s.is_finite() {
        let t = s - p;
        let lost = (p - (s - t)) + (z - t);
        if lost != 0.0 && s.to_bits() & 1 == 0 {
            let away = (lost > 0.0) == (s > 0.0);
            r = f64::from_bits(if away { s.to_bits() | 1 } else { s.to_bits() - 1 });
        }
    }
    let r = round_to(r, format(ty), Round::Nearest);
    if kind == Alu::FmaRelu { if r.is_nan() { f64::NAN } else { r.max(0.0) } } else { r }
}
