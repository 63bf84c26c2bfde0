//! How rows are encoded between ranks.
//!
//! FP8 is E4M3 (4 exponent bits of bias 7, 3 mantissa bits, no infinities; largest 448, least 2^-9; OCP 8-bit floating point
//! specification) with a scale for each tile of 128 columns of a row, as in the DeepSeek-V3 technical report, section 3.3.2.
//! The scale is a power of two: amax / 448 rounded up to one, where amax is the largest magnitude of the tile and at least 1e-4.
//! Elements are divided by it, which is exact, rounded to the nearest code, ties to even, and held at 448. A scale travels as
//! its exponent plus 127, one byte. NaN stays NaN; an infinity takes the largest scale, 2^120, and comes back as an infinity
//! or, with f64 rows, as the largest that the wire holds.
//!
//! All rows are encoded, those too that stay on their rank: numbers then do not depend on the number of ranks.

use half::bf16;

use crate::{
    dtype::{DType, Float},
    ops::parallel::{for_row_chunks, for_row_chunks2},
};

/// The encoding of rows between ranks.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Wire {
    /// The type of the rows.
    #[default]
    Exact,
    /// Rounded to bf16, to nearest even.
    Bf16,
    /// Rounded to E4M3 with a scale per 128 columns.
    Fp8,
}

/// Columns that share a scale.
pub const TILE: usize = 128;

impl Wire {
    /// Bytes of a row of `d` columns of type `dtype`, scales included.
    pub fn row_bytes(self, dtype: DType, d: usize) -> u64 {
        let bytes = match self {
            Wire::Exact => d * dtype.size_bytes(),
            Wire::Bf16 => 2 * d,
            Wire::Fp8 => d + d.div_ceil(TILE),
        };
        bytes as u64
    }
}

/// Encoded rows.
pub(super) enum Rows<T> {
    Exact(Vec<T>),
    Bf16(Vec<bf16>),
    Fp8 { codes: Vec<u8>, scales: Vec<u8> },
}

impl<T: Float> Rows<T> {
    /// Encodes x, rows of `d` columns.
    pub fn encode(wire: Wire, x: &[T], d: usize) -> Self {
        match wire {
            Wire::Exact => Rows::Exact(x.to_vec()),
            Wire::Bf16 => {
                let mut rows = vec![bf16::ZERO; x.len()];
                for_row_chunks(
                    &mut rows,
                    d,
                    #[inline(always)]
                    |first, chunk| {
                        let x = &x[first * d..];
                        chunk.iter_mut().zip(x).for_each(|(out, x)| *out = bf16::of_f64(x.as_f64()));
                    },
                );
                Rows::Bf16(rows)
            }
            Wire::Fp8 => {
                let tiles = d.div_ceil(TILE);
                let num_rows = x.len() / d.max(1);
                let (mut codes, mut scales) = (vec![0; x.len()], vec![0; num_rows * tiles]);
                for_row_chunks2(
                    (&mut codes, d),
                    (&mut scales, tiles),
                    #[inline(always)]
                    |first, codes, scales| {
                        let rows = x[first * d..].chunks_exact(d).zip(codes.chunks_exact_mut(d));
                        for ((x, codes), scales) in rows.zip(scales.chunks_exact_mut(tiles)) {
                            for ((x, codes), scale) in x.chunks(TILE).zip(codes.chunks_mut(TILE)).zip(scales) {
                                *scale = encode_tile(x, codes);
                            }
                        }
                    },
                );
                Rows::Fp8 { codes, scales }
            }
        }
    }

    /// Decodes a row; `out` is as long.
    #[inline(always)]
    pub fn decode(&self, row: usize, out: &mut [T]) {
        let d = out.len();
        match self {
            Rows::Exact(x) => out.copy_from_slice(&x[row * d..][..d]),
            Rows::Bf16(x) => out.iter_mut().zip(&x[row * d..][..d]).for_each(|(out, x)| *out = T::of_f64(x.as_f64())),
            Rows::Fp8 { codes, scales } => {
                let scales = &scales[row * d.div_ceil(TILE)..];
                for ((out, codes), &scale) in out.chunks_mut(TILE).zip(codes[row * d..][..d].chunks(TILE)).zip(scales) {
                    let scale = power_of_two(scale);
                    for (out, &code) in out.iter_mut().zip(codes) {
                        *out = T::of_f64(f64::from(decode_e4m3(code) * scale));
                    }
                }
            }
        }
    }
}

/// Codes of a tile; returns its scale's exponent plus 127.
#[inline(always)]
fn encode_tile<T: Float>(x: &[T], codes: &mut [u8]) -> u8 {
    let amax = x.iter().fold(1e-4f32, |amax, x| amax.max((x.as_f64() as f32).abs()));
    let scale = scale_byte(amax);
    let inverse = power_of_two(254 - scale);
    codes.iter_mut().zip(x).for_each(|(code, x)| *code = encode_e4m3(x.as_f64() as f32 * inverse));
    scale
}

/// Exponent plus 127 of amax / 448 rounded up to a power of two, at most 2^120. `amax` is normal and positive.
#[inline(always)]
fn scale_byte(amax: f32) -> u8 {
    let bits = (amax / 448.0).to_bits();
    let up = bits.wrapping_add((1 << 23) - 1) >> 23;
    up.min(127 + 120) as u8
}

#[inline(always)]
fn power_of_two(byte: u8) -> f32 {
    f32::from_bits(u32::from(byte) << 23)
}

/// The nearest E4M3 code, ties to even, at most 448; NaN is 0x7f with its sign.
#[inline(always)]
pub fn encode_e4m3(x: f32) -> u8 {
    let sign = (x.to_bits() >> 24) as u8 & 0x80;
    let magnitude = x.abs().min(448.0);
    // Normal: round the mantissa to 3 bits, then turn the exponent's bias from 127 to 7.
    let bits = magnitude.to_bits();
    let rounded = bits + 0x7_ffff + ((bits >> 20) & 1);
    let normal = (rounded >> 20).wrapping_sub((127 - 7) << 3) as u8;
    // Subnormal: adding 2^14 leaves multiples of 2^-9 in the low bits, rounded to nearest even.
    const SHIFT: f32 = 16384.0;
    let subnormal = (magnitude + SHIFT).to_bits().wrapping_sub(SHIFT.to_bits()) as u8;
    let code = if magnitude < 1.0 / 64.0 { subnormal } else { normal };
    sign | if x.is_nan() { 0x7f } else { code }
}

/// The value of an E4M3 code.
#[inline(always)]
pub fn decode_e4m3(code: u8) -> f32 {
    let (sign, exponent, mantissa) = (u32::from(code & 0x80) << 24, (code >> 3) & 15, code & 7);
    let magnitude = if exponent == 0 {
        f32::from(mantissa) / 512.0
    } else {
        f32::from_bits((u32::from(exponent) + 127 - 7) << 23 | u32::from(mantissa) << 20)
    };
    let magnitude = if code & 0x7f == 0x7f { f32::NAN } else { magnitude };
    f32::from_bits(magnitude.to_bits() | sign)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::testing::random;

    /// By the definition of the format.
    fn value(code: u8) -> f64 {
        let (e, m) = (i32::from(code >> 3 & 15), f64::from(code & 7));
        let magnitude = if e == 0 { m / 8.0 * 2f64.powi(-6) } else { (1.0 + m / 8.0) * 2f64.powi(e - 7) };
        let magnitude = if code & 0x7f == 0x7f { f64::NAN } else { magnitude };
        if code & 0x80 == 0 { magnitude } else { -magnitude }
    }

    /// By trying all codes.
    fn nearest(x: f64) -> u8 {
        let sign = if x.is_sign_negative() { 0x80 } else { 0 };
        let x = x.abs().min(448.0);
        let mut best = 0;
        for code in 1..0x7f {
            let (old, new) = ((value(best) - x).abs(), (value(code) - x).abs());
            if new < old || (new == old && code % 2 == 0) {
                best = code;
            }
        }
        best | sign
    }

    #[test]
    fn every_code_is_its_value_and_comes_back() {
        for code in 0..=255u8 {
            let (got, want) = (decode_e4m3(code), value(code));
            if want.is_nan() {
                assert!(got.is_nan() && encode_e4m3(got) == code, "{code:#x}");
            } else {
                assert_eq!((f64::from(got), got.is_sign_negative()), (want, code & 0x80 != 0), "{code:#x}");
                assert_eq!(encode_e4m3(got), code, "{code:#x}");
            }
        }
        assert_eq!((value(0x7e), value(1)), (448.0, 2f64.powi(-9)));
    }

    #[test]
    fn rounding_is_to_the_nearest_code_with_ties_to_even() {
        // Around every code: itself, the tie above it, and one step to either side of both.
        for code in 0..0x7eu8 {
            let tie = ((value(code) + value(code + 1)) / 2.0) as f32;
            assert_eq!(encode_e4m3(tie) % 2, 0, "the tie above {code:#x}");
            for x in [value(code) as f32, tie] {
                for x in [x.next_down(), x, x.next_up(), -x.next_down(), -x, -x.next_up()] {
                    assert_eq!(encode_e4m3(x), nearest(f64::from(x)), "{x:e} beside {code:#x}");
                }
            }
        }
        for x in [448.0, 449.0, 464.0, 480.0, 1e30, f32::INFINITY] {
            assert_eq!((encode_e4m3(x), encode_e4m3(-x)), (0x7e, 0xfe), "{x}");
        }
        for x in [0.0, 1e-45, 1e-38, 1e-5, 1.0 / 1024.0] {
            assert_eq!((encode_e4m3(x), encode_e4m3(-x)), (0, 0x80), "{x}");
        }
        for x in random(20_000, 1) {
            let x = (x.powi(5) * 500.0) as f32;
            assert_eq!(encode_e4m3(x), nearest(f64::from(x)), "{x}");
        }
    }

    /// By the definition: the least power of two at or above amax / 448, and all codes tried.
    fn quantized(tile: &[f64]) -> Vec<f64> {
        let amax = tile.iter().fold(1e-4f32, |a, x| a.max(x.abs() as f32));
        let target = f64::from(amax / 448.0);
        let scale = (-30..=120).map(|e| 2f64.powi(e)).find(|s| *s >= target).unwrap_or(f64::NAN);
        tile.iter().map(|&x| value(nearest(f64::from(x as f32) / scale)) * scale).collect()
    }

    #[test]
    fn rows_are_quantized_tile_by_tile() {
        // Tiles of all magnitudes, one of zeros, one below the floor of amax, amax a power of two times 448, and a short last tile.
        let (rows, d) = (40, 300);
        let mut x = random(rows * d, 2);
        x.iter_mut().enumerate().for_each(|(i, x)| *x *= 2f64.powi((i / 100) as i32 % 60 - 30));
        x[..128].fill(0.0);
        x[128..256].iter_mut().for_each(|x| *x *= 1e-7);
        x[300..428].iter_mut().for_each(|x| *x = x.clamp(-1.0, 1.0) * 400.0);
        x[310] = -448.0 * 4.0;
        let x: Vec<f32> = x.into_iter().map(|x| x as f32).collect();
        let Rows::Fp8 { codes, scales } = Rows::encode(Wire::Fp8, &x, d) else { panic!("expected codes") };
        assert_eq!((codes.len() + scales.len()) as u64, rows as u64 * Wire::Fp8.row_bytes(DType::F32, d));
        let encoded = Rows::Fp8 { codes, scales };
        for (r, row) in x.chunks_exact(d).enumerate() {
            let mut got = vec![0f32; d];
            encoded.decode(r, &mut got);
            let want = row.chunks(TILE).flat_map(|t| quantized(&t.iter().map(|&x| f64::from(x)).collect::<Vec<_>>()));
            for (c, (got, want)) in got.iter().zip(want).enumerate() {
                assert_eq!(f64::from(*got), want, "row {r}, column {c} was {}", row[c]);
            }
        }
    }

    #[test]
    fn what_is_not_finite_stays_so() {
        let x = [1.0f32, f32::NAN, f32::NEG_INFINITY, f32::MAX];
        let mut got = [0f32; 4];
        Rows::encode(Wire::Fp8, &x[..2], 2).decode(0, &mut got[..2]);
        assert!(got[0] == 1.0 && got[1].is_nan(), "{got:?}");
        Rows::encode(Wire::Fp8, &x, 4).decode(0, &mut got);
        assert!(got[1].is_nan() && got[2] == f32::NEG_INFINITY, "{got:?}");
    }

    #[test]
    fn bf16_rounds_once() {
        let x = random(70, 3);
        let mut got = vec![0f64; 35];
        Rows::encode(Wire::Bf16, &x, 35).decode(1, &mut got);
        for (got, x) in got.iter().zip(&x[35..]) {
            assert_eq!(*got, bf16::from_f64(*x).to_f64());
        }
    }
}
