//! Approximate functions: anything within the documented bound of the exact value. What it is depends on the operand and the
//! seed alone, as on a device it depends on the operand alone; so no kernel can rely on a value that the documentation does not
//! promise.

use super::flush;
use crate::inst::Alu;

/// A number in [-1, 1] that depends on everything given.
fn noise(seed: u64, what: u64, bits: u64) -> f64 {
    let mut x = seed ^ what.wrapping_mul(0x9e37_79b9_7f4a_7c15) ^ bits.wrapping_mul(0xd1b5_4a32_d192_ed03);
    x = (x ^ x >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    x = (x ^ x >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
    x ^= x >> 31;
    (x >> 11) as f64 / (1u64 << 52) as f64 - 1.0
}

/// An f32 at most `ulps` from `y`, and at least half of one.
fn within_ulps(y: f64, ulps: f64, u: f64) -> f32 {
    let r = y as f32;
    if !r.is_finite() || r == 0.0 {
        return r;
    }
    let ulp = f64::from(r.next_up().max(r.next_down())) - f64::from(r);
    (y + (ulps - 0.5) * 0.99 * u * ulp.abs()) as f32
}

/// The result for `x`, or for `x / y` of a division.
pub(crate) fn approximate(kind: Alu, x: f32, y: f32, ftz: bool, seed: u64) -> f32 {
    let (x, y) = if ftz { (flush(x), flush(y)) } else { (x, y) };
    let wide = f64::from(x);
    let u = noise(seed, kind_number(kind), u64::from(x.to_bits()) | u64::from(y.to_bits()) << 32);
    let r = match kind {
        Alu::Ex2 if x == 0.0 => 1.0,
        Alu::Ex2 => within_ulps(wide.exp2(), 2.0, u),
        Alu::Lg2 => {
            let exact = wide.log2();
            let near = (0.5..2.0).contains(&x);
            let bound = if near { 2f64.powi(-22) } else { exact.abs() * 2f64.powi(-22) };
            if exact.is_finite() { (exact + u * 0.7 * bound) as f32 } else { exact as f32 }
        }
        Alu::Rcp => within_ulps(1.0 / wide, 1.0, u),
        Alu::Div => within_ulps(wide / f64::from(y), 2.0, u),
        Alu::Rsqrt => within_ulps(1.0 / wide.sqrt(), 1.05, u),
        Alu::Sqrt => within_ulps(wide.sqrt(), 1.0, u),
        Alu::Sin | Alu::Cos => {
            let exact = if kind == Alu::Sin { wide.sin() } else { wide.cos() };
            let outside = (wide.abs() / std::f64::consts::PI).max(1.0);
            if x == 0.0 { exact as f32 } else { (exact + u * 0.9 * outside * 2f64.powf(-20.5)) as f32 }
        }
        Alu::Tanh => (wide.tanh() * (1.0 + u * 0.9 * 2f64.powi(-11))).clamp(-1.0, 1.0) as f32,
        _ => f32::NAN,
    };
    if ftz { flush(r) } else { r }
}

fn kind_number(kind: Alu) -> u64 {
    match kind {
        Alu::Ex2 => 1,
        Alu::Lg2 => 2,
        Alu::Rcp => 3,
        Alu::Div => 4,
        Alu::Rsqrt => 5,
        Alu::Sqrt => 6,
        Alu::Sin => 7,
        Alu::Cos => 8,
        _ => 9,
    }
}
