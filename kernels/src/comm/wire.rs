//! How rows are encoded between ranks.
//!
//! FP8 is E4M3 with a power of two as the scale of each tile ([`crate::fp8`]), which travels as its exponent plus 127, one byte.
//!
//! All rows are encoded, those too that stay on their rank: numbers then do not depend on the number of ranks.

use half::bf16;

use super::pack::{Packed, take};
use crate::{
    dtype::{DType, Float},
    fp8::{Scaling, TILE, decode_e4m3},
    ops::{
        parallel::{for_row_chunks, for_row_chunks2},
        quantize::encode_tile,
    },
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

impl Wire {
    /// By its number.
    pub(super) fn of(number: u32) -> Option<Self> {
        [Wire::Exact, Wire::Bf16, Wire::Fp8].into_iter().find(|&wire| wire as u32 == number)
    }

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
                                *scale = (encode_tile(x, codes, Scaling::PowerOfTwo).to_bits() >> 23) as u8;
                            }
                        }
                    },
                );
                Rows::Fp8 { codes, scales }
            }
        }
    }

    /// Appends these rows alone, in this order; rows have `d` columns.
    pub fn pack(&self, rows: &[u32], d: usize, to: &mut Packed) {
        fn of<T: Copy>(all: &[T], rows: &[u32], width: usize) -> Vec<T> {
            let mut some = Vec::with_capacity(rows.len() * width);
            rows.iter().for_each(|&row| some.extend_from_slice(&all[row as usize * width..][..width]));
            some
        }
        match self {
            Rows::Exact(x) => to.put_payload(&of(x, rows, d)),
            Rows::Bf16(x) => to.put_payload(&of(x, rows, d)),
            Rows::Fp8 { codes, scales } => {
                to.put_payload(&of(codes, rows, d));
                to.put_payload(&of(scales, rows, d.div_ceil(TILE)));
            }
        }
    }

    /// Takes from bytes what [`Rows::pack`] made of rows of this encoding.
    pub fn take(wire: Wire, from: &mut &[u8]) -> Option<Self> {
        Some(match wire {
            Wire::Exact => Rows::Exact(take(from)?),
            Wire::Bf16 => Rows::Bf16(take(from)?),
            Wire::Fp8 => Rows::Fp8 { codes: take(from)?, scales: take(from)? },
        })
    }

    /// How the rows are encoded.
    pub fn wire(&self) -> Wire {
        match self {
            Rows::Exact(_) => Wire::Exact,
            Rows::Bf16(_) => Wire::Bf16,
            Rows::Fp8 { .. } => Wire::Fp8,
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

#[inline(always)]
fn power_of_two(byte: u8) -> f32 {
    f32::from_bits(u32::from(byte) << 23)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{fp8::definition, ops::testing::random};

    /// By the definition of the recipe.
    fn quantized(tile: &[f32]) -> Vec<f64> {
        let scale = definition::scale(tile, Scaling::PowerOfTwo);
        tile.iter().map(|&x| definition::value(definition::code(x, scale)) * scale).collect()
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
            let want = row.chunks(TILE).flat_map(quantized);
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
