//! Number formats of PTX: conversion to and from f64, which holds every value of the others.

pub(crate) mod approx;
#[cfg(test)]
mod tests;

use crate::inst::{Round, Ty};

/// The one NaN that arithmetic of f32 gives.
pub(crate) const NAN32: u32 = 0x7fff_ffff;

/// A binary format with at most 53 significant bits.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Format {
    /// Significant bits with the implicit one.
    pub precision: i32,
    /// Exponent of the smallest normal number.
    pub min_exponent: i32,
    /// The largest finite number.
    pub max: f64,
    /// Bits of the pattern below the sign.
    pub magnitude_bits: u32,
}

/// The format of a scalar float type, of one half of a pair.
pub(crate) fn format(ty: Ty) -> Format {
    let f = |precision, min_exponent, max, magnitude_bits| Format { precision, min_exponent, max, magnitude_bits };
    match ty {
        Ty::F16 | Ty::F16x2 => f(11, -14, 65504.0, 15),
        Ty::Bf16 | Ty::Bf16x2 => f(8, -126, f64::from(f32::from_bits(0x7f7f_0000)), 15),
        Ty::E4m3 | Ty::E4m3x2 => f(4, -6, 448.0, 7),
        Ty::E5m2 | Ty::E5m2x2 => f(3, -14, 57344.0, 7),
        Ty::Tf32 => f(11, -126, f64::from(f32::from_bits(0x7f7f_e000)), 31),
        Ty::F64 => f(53, -1022, f64::MAX, 63),
        _ => f(24, -126, f64::from(f32::MAX), 31),
    }
}

fn exponent(x: f64) -> i32 {
    let e = (x.to_bits() >> 52 & 0x7ff) as i32;
    // A subnormal f64 is below every other format's subnormals.
    if e == 0 { -1022 } else { e - 1023 }
}

/// 2 to an exponent, exact from -1022 to 1023.
fn pow2(e: i32) -> f64 {
    f64::from_bits(((e + 1023) as u64) << 52)
}

/// An integral value as a mode says.
pub(crate) fn round_integral(x: f64, mode: Round) -> f64 {
    match mode {
        Round::Nearest => x.round_ties_even(),
        Round::Away => x.round(),
        Round::Zero => x.trunc(),
        Round::Minus => x.floor(),
        Round::Plus => x.ceil(),
    }
}

/// The value of a format that a mode gives for `x`; infinite where it overflows.
pub(crate) fn round_to(x: f64, f: Format, mode: Round) -> f64 {
    if x == 0.0 || !x.is_finite() || f.precision == 53 {
        return x;
    }
    let quantum = exponent(x).max(f.min_exponent) - (f.precision - 1);
    let unit = pow2(quantum);
    let y = round_integral(x / unit, mode) * unit;
    if y.abs() > f.max {
        let inward = match mode {
            Round::Nearest | Round::Away => false,
            Round::Zero => true,
            Round::Minus => x > 0.0,
            Round::Plus => x < 0.0,
        };
        return if inward { f.max.copysign(x) } else { f64::INFINITY.copysign(x) };
    }
    if y == 0.0 { 0f64.copysign(x) } else { y }
}

/// The pattern of a value that the format has.
pub(crate) fn encode(x: f64, ty: Ty) -> u64 {
    match ty {
        Ty::F64 => return x.to_bits(),
        Ty::F32 | Ty::Tf32 => return u64::from(if x.is_nan() { NAN32 } else { (x as f32).to_bits() }),
        _ => {}
    }
    let f = format(ty);
    let sign = u64::from(x.is_sign_negative()) << f.magnitude_bits;
    if x.is_nan() {
        return (1 << f.magnitude_bits) - 1;
    }
    let fraction_bits = f.precision - 1;
    let magnitude = if x.is_infinite() {
        (((1 << f.magnitude_bits) - 1) >> fraction_bits) << fraction_bits
    } else if x.abs() < pow2(f.min_exponent) {
        (x.abs() / pow2(f.min_exponent - fraction_bits)) as u64
    } else {
        let e = exponent(x);
        let fraction = ((x.abs() / pow2(e) - 1.0) * pow2(fraction_bits)) as u64;
        ((e - f.min_exponent + 1) as u64) << fraction_bits | fraction
    };
    sign | magnitude
}

/// The value of a pattern of 16 bits or fewer.
fn decode_small(bits: u64, ty: Ty) -> f64 {
    let f = format(ty);
    let fraction_bits = f.precision - 1;
    let magnitude = bits & ((1 << f.magnitude_bits) - 1);
    let (e, m) = ((magnitude >> fraction_bits) as i32, magnitude & ((1 << fraction_bits) - 1));
    let top = ((1u64 << f.magnitude_bits) - 1) >> fraction_bits;
    let value = if ty == Ty::E4m3 {
        if magnitude == 0x7f { f64::NAN } else { finite(e, m, f) }
    } else if e as u64 == top {
        if m == 0 { f64::INFINITY } else { f64::NAN }
    } else {
        finite(e, m, f)
    };
    if bits >> f.magnitude_bits & 1 == 1 { -value } else { value }
}

fn finite(e: i32, m: u64, f: Format) -> f64 {
    let fraction_bits = f.precision - 1;
    if e == 0 {
        m as f64 * pow2(f.min_exponent - fraction_bits)
    } else {
        (1.0 + m as f64 / pow2(fraction_bits)) * pow2(e - 1 + f.min_exponent)
    }
}

/// The value of a pattern.
pub(crate) fn decode(bits: u64, ty: Ty) -> f64 {
    match ty {
        Ty::F64 => f64::from_bits(bits),
        Ty::F32 => f64::from(f32::from_bits(bits as u32)),
        Ty::Tf32 => f64::from(f32::from_bits(bits as u32 & 0xffff_e000)),
        Ty::Bf16 | Ty::Bf16x2 => f64::from(bf16_to_f32(bits as u16)),
        Ty::F16x2 => decode_small(bits & 0xffff, Ty::F16),
        Ty::E4m3x2 => decode_small(bits & 0xff, Ty::E4m3),
        Ty::E5m2x2 => decode_small(bits & 0xff, Ty::E5m2),
        _ => decode_small(bits, ty),
    }
}

/// Exact.
pub(crate) fn bf16_to_f32(h: u16) -> f32 {
    f32::from_bits(u32::from(h) << 16)
}

/// To nearest, ties to even; NaN as PTX writes it.
pub(crate) fn f32_to_bf16(x: f32) -> u16 {
    if x.is_nan() {
        return 0x7fff;
    }
    let b = x.to_bits();
    ((u64::from(b) + 0x7fff + u64::from(b >> 16 & 1)) >> 16) as u16
}

/// All 256 patterns of a type of 8 bits.
pub(crate) fn table8(ty: Ty) -> [f32; 256] {
    std::array::from_fn(|i| decode(i as u64, ty) as f32)
}

/// Flushes a subnormal to zero of its sign.
pub(crate) fn flush(x: f32) -> f32 {
    if x.is_subnormal() { 0f32.copysign(x) } else { x }
}

/// The pattern of an f32 result.
pub(crate) fn bits32(x: f32) -> u64 {
    u64::from(if x.is_nan() { NAN32 } else { x.to_bits() })
}
