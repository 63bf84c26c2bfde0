//! Numbers in 12 bits, for what only waits for the backward pass: DeepSeek-V3 keeps the input of the linear layer after attention so
//! (technical report, section 3.3.3).
//!
//! Codes are E5M6: 5 exponent bits of bias 15, 6 mantissa bits, subnormals, infinities and NaN as in IEEE 754; largest 65024, least
//! 2^-20. 128 columns of a row have a power of two as their scale: the least that brings their largest magnitude, which is at least
//! 1e-4, to at most 65024. It is stored as its exponent plus 127, and a number is code * scale. Rounding is to nearest, ties to even.
//!
//! Two codes are in three bytes, the first in the low 12 bits, the least significant byte first. In a row of an odd number of columns
//! the last code has a 0 beside it.

use crate::{
    cost::Cost,
    device::Target,
    dtype::{DType, Float},
    error::Result,
    fp8::TILE,
    ops::{
        expect::{expect_float, expect_tensor},
        is_fast,
        parallel::{for_row_chunks, for_row_chunks2},
        quantize::{amax, from_f32, to_f32},
    },
    ptx,
    stream::Stream,
    tensor::Tensor,
    with_float,
};

/// Bytes of `c` columns of a row.
pub const fn packed(c: usize) -> usize {
    3 * c.div_ceil(2)
}

/// The nearest E5M6 code, ties to even.
#[inline(always)]
pub fn encode_e5m6(x: f32) -> u16 {
    let sign = (x.to_bits() >> 20) as u16 & 0x800;
    // Past the largest it would be rounded to is infinity, and no further.
    let magnitude = x.abs().min(65536.0);
    // Normal: round the mantissa to 6 bits, then turn the exponent's bias from 127 to 15.
    let bits = magnitude.to_bits();
    let normal = (bits.wrapping_add(0xffff + ((bits >> 17) & 1)) >> 17).wrapping_sub((127 - 15) << 6) as u16;
    // Subnormal: adding 8 leaves multiples of 2^-20 in the low bits, rounded to nearest even.
    const SHIFT: f32 = 8.0;
    let subnormal = (magnitude + SHIFT).to_bits().wrapping_sub(SHIFT.to_bits()) as u16;
    let code = if magnitude < 1.0 / 16384.0 { subnormal } else { normal };
    sign | if x.is_nan() { 0x7e0 } else { code }
}

/// The value of an E5M6 code.
#[inline(always)]
pub fn decode_e5m6(code: u16) -> f32 {
    let (sign, exponent, mantissa) = (u32::from(code & 0x800) << 20, (code >> 6) & 31, code & 63);
    let special = if mantissa == 0 { f32::INFINITY } else { f32::NAN };
    let normal = f32::from_bits((u32::from(code & 0x7ff) << 17).wrapping_add((127 - 15) << 23));
    let finite = if exponent == 0 { f32::from(mantissa) / (1 << 20) as f32 } else { normal };
    f32::from_bits(if exponent == 31 { special } else { finite }.to_bits() | sign)
}

/// The exponent, plus 127, of a tile whose largest magnitude is `amax`: up by one unless the mantissa is at most that of 65024.
#[inline(always)]
fn scale_byte(amax: f32) -> u8 {
    const LARGEST: f32 = 65024.0;
    let above = (1 << 23) - 1 - (LARGEST.to_bits() & 0x7f_ffff);
    (((amax.to_bits() + above) >> 23) - 15) as u8
}

#[inline(always)]
fn power_of_two(byte: u8) -> f32 {
    f32::from_bits(u32::from(byte) << 23)
}

/// `x` [t, c] into `packed` U8 [t, 3 ceil(c / 2)] and `scales` U8 [t, ceil(c / 128)].
///
/// # Errors
/// Tensors of other shapes or types.
pub fn encode(s: &mut Stream, x: Tensor, packed: Tensor, scales: Tensor) -> Result<()> {
    const OP: &str = "encode in E5M6";
    let (t, c) = check(OP, x, packed, scales)?;
    s.account(encode_cost(t, c, x.dtype.size_bytes()));
    let kernels = |_: &Target| is_fast(x).then(|| ptx::e5m6::encode(x, packed, scales));
    s.launch_kernel(&[x], &[packed, scales], kernels, move |m| {
        let (mut packed, mut scales) = (m.write::<u8>(packed), m.write::<u8>(scales));
        let (bytes, num_tiles) = (self::packed(c), c.div_ceil(TILE));
        with_float!(x.dtype, T => {
            let x = m.read::<T>(x);
            for_row_chunks2((&mut packed, bytes), (&mut scales, num_tiles), #[inline(always)] |first, packed, scales| {
                let rows = packed.chunks_exact_mut(bytes).zip(scales.chunks_exact_mut(num_tiles));
                for ((packed, scales), x) in rows.zip(x[first * c..].chunks_exact(c)) {
                    let tiles = packed.chunks_mut(self::packed(TILE)).zip(x.chunks(TILE)).zip(scales);
                    for ((packed, x), scale) in tiles {
                        *scale = encode_tile(x, packed);
                    }
                }
            });
        });
    });
    Ok(())
}

/// Packed codes of a tile; returns its scale's exponent plus 127.
#[inline(always)]
fn encode_tile<T: Float>(x: &[T], packed: &mut [u8]) -> u8 {
    let byte = scale_byte(amax(x));
    let inverse = power_of_two(byte).recip();
    let mut codes = [0; TILE];
    for (code, x) in codes.iter_mut().zip(x) {
        *code = encode_e5m6(to_f32(*x) * inverse);
    }
    for (out, codes) in packed.as_chunks_mut::<3>().0.iter_mut().zip(codes.as_chunks::<2>().0) {
        let [low, middle, high, _] = (u32::from(codes[0]) | u32::from(codes[1]) << 12).to_le_bytes();
        *out = [low, middle, high];
    }
    byte
}

/// `x` [t, c] from `packed` U8 [t, 3 ceil(c / 2)] and `scales` U8 [t, ceil(c / 128)].
///
/// # Errors
/// Tensors of other shapes or types.
pub fn decode(s: &mut Stream, packed: Tensor, scales: Tensor, x: Tensor) -> Result<()> {
    const OP: &str = "decode from E5M6";
    let (t, c) = check(OP, x, packed, scales)?;
    s.account(decode_cost(t, c, x.dtype.size_bytes()));
    let kernels = |_: &Target| is_fast(x).then(|| ptx::e5m6::decode(packed, scales, x));
    s.launch_kernel(&[packed, scales], &[x], kernels, move |m| {
        let (packed, scales) = (m.read::<u8>(packed), m.read::<u8>(scales));
        let (bytes, num_tiles) = (self::packed(c), c.div_ceil(TILE));
        with_float!(x.dtype, T => {
            for_row_chunks(&mut m.write::<T>(x), c, #[inline(always)] |first, rows| {
                for (row, x) in (first..).zip(rows.chunks_exact_mut(c)) {
                    let (packed, scales) = (&packed[row * bytes..][..bytes], &scales[row * num_tiles..][..num_tiles]);
                    let tiles = packed.chunks(self::packed(TILE)).zip(x.chunks_mut(TILE)).zip(scales);
                    for ((packed, x), scale) in tiles {
                        decode_tile(packed, power_of_two(*scale), x);
                    }
                }
            });
        });
    });
    Ok(())
}

#[inline(always)]
fn decode_tile<T: Float>(packed: &[u8], scale: f32, x: &mut [T]) {
    let mut codes = [0; TILE];
    for (codes, bytes) in codes.as_chunks_mut::<2>().0.iter_mut().zip(packed.as_chunks::<3>().0) {
        let both = u32::from_le_bytes([bytes[0], bytes[1], bytes[2], 0]);
        *codes = [both as u16 & 0xfff, (both >> 12) as u16];
    }
    for (x, code) in x.iter_mut().zip(codes) {
        *x = from_f32(decode_e5m6(code) * scale);
    }
}

fn check(op: &'static str, x: Tensor, packed: Tensor, scales: Tensor) -> Result<(usize, usize)> {
    let (t, c) = (x.rows(), x.cols());
    expect_float(op, "x", x)?;
    expect_tensor(op, "packed", packed, DType::U8, &[t, self::packed(c)])?;
    expect_tensor(op, "scales", scales, DType::U8, &[t, c.div_ceil(TILE)])?;
    Ok((t, c))
}

/// Bytes of codes and scales of [t, c].
pub fn bytes(t: usize, c: usize) -> u64 {
    (t * (packed(c) + c.div_ceil(TILE))) as u64
}

/// Cost of [`encode`] from elements of `elem_bytes`.
pub fn encode_cost(t: usize, c: usize, elem_bytes: usize) -> Cost {
    Cost::stream(4 * (t * c) as u64, (t * c * elem_bytes) as u64, bytes(t, c))
}

/// Cost of [`decode`] to elements of `elem_bytes`.
pub fn decode_cost(t: usize, c: usize, elem_bytes: usize) -> Cost {
    Cost::stream((t * c) as u64, bytes(t, c), (t * c * elem_bytes) as u64)
}

#[cfg(test)]
mod tests;
