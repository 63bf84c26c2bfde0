//! A token in an FP8 latent cache: a row of bytes.
//!
//! Parts of a row, in this order, each aligned as its type needs:
//! - c codes E4M3 of the normalized latent
//! - from the next multiple of 4 bytes on, a scale f32 for each 128 of them, little-endian; the last tile may be shorter
//! - the rotated key part, r numbers in bf16
//!
//! A row is a multiple of 4 bytes long. What lies between the parts is never written nor read.
//!
//! DeepSeek-V3's rows are 512 + 16 + 128 = 656 bytes, laid out as DeepSeek's FlashMLA reads them; bf16 takes 1,152. Codes and scales follow
//! [`crate::fp8`], with powers of two as scales: then a code times its scale is exact in bf16 too, and all that is lost is lost in
//! `Fp8Row::encode`. The key part stays in bf16, since its error would be that of every head's score.

use crate::{
    dtype::{Float, Real},
    fp8::{Scaling, TILE, decode_e4m3},
    ops::quantize::encode_tile,
};

/// What a row holds: the widths of the latent and of the rotated key part.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Fp8Row {
    /// Numbers of the latent.
    pub c: usize,
    /// Numbers of the rotated key part.
    pub r: usize,
}

impl Fp8Row {
    /// First byte of the scales.
    pub const fn scales_at(self) -> usize {
        self.c.next_multiple_of(4)
    }

    /// First byte of the key part.
    pub const fn key_at(self) -> usize {
        self.scales_at() + 4 * self.c.div_ceil(TILE)
    }

    /// Bytes of a row.
    pub const fn bytes(self) -> usize {
        (self.key_at() + 2 * self.r).next_multiple_of(4)
    }

    /// Assigns a row.
    #[inline(always)]
    pub(crate) fn encode<T: Float>(self, latent: &[T], key: &[T], row: &mut [u8]) {
        let (codes, rest) = row.split_at_mut(self.scales_at());
        let (scales, rest) = rest.split_at_mut(self.key_at() - self.scales_at());
        let tiles = latent.chunks(TILE).zip(codes[..self.c].chunks_mut(TILE));
        for ((x, codes), scale) in tiles.zip(scales.as_chunks_mut::<4>().0) {
            *scale = encode_tile(x, codes, Scaling::PowerOfTwo).to_le_bytes();
        }
        for (bytes, x) in rest.as_chunks_mut::<2>().0.iter_mut().zip(key) {
            *bytes = half::bf16::from_f64(x.as_f64()).to_le_bytes();
        }
    }

    /// Assigns the c + r numbers of a row to `out`.
    #[inline(always)]
    pub(crate) fn decode<A: Real>(self, row: &[u8], out: &mut [A]) {
        let (latent, key) = out.split_at_mut(self.c);
        let scales = row[self.scales_at()..self.key_at()].as_chunks::<4>().0;
        for ((codes, out), scale) in row[..self.c].chunks(TILE).zip(latent.chunks_mut(TILE)).zip(scales) {
            let scale = f32::from_le_bytes(*scale);
            for (out, code) in out.iter_mut().zip(codes) {
                *out = A::of_f64(f64::from(decode_e4m3(*code) * scale));
            }
        }
        for (out, bytes) in key.iter_mut().zip(row[self.key_at()..].as_chunks::<2>().0) {
            *out = A::of_f64(f64::from(half::bf16::from_le_bytes(*bytes).to_f32()));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{fp8::definition, ops::testing::random};

    #[test]
    fn deepseeks_rows_are_flashmlas() {
        let row = Fp8Row { c: 512, r: 64 };
        assert_eq!((row.scales_at(), row.key_at(), row.bytes()), (512, 528, 656));
        assert_eq!((61 * row.bytes(), 61 * 2 * (512 + 64)), (40_016, 70_272));
        // A last tile of 2, and bytes between the parts.
        let row = Fp8Row { c: 130, r: 3 };
        assert_eq!((row.scales_at(), row.key_at(), row.bytes()), (132, 140, 148));
    }

    /// Against the recipe's definitions, by their own way to the bytes.
    #[test]
    fn a_row_holds_what_the_recipe_says() {
        for (c, r) in [(1, 2), (64, 16), (130, 3), (512, 64)] {
            let layout = Fp8Row { c, r };
            let numbers = |n, seed| random(n, seed).into_iter().map(|x| (x * 3.0) as f32).collect::<Vec<f32>>();
            let (latent, key) = (numbers(c, 1), numbers(r, 2));
            let mut want = Vec::new();
            let scales: Vec<f64> = latent.chunks(128).map(|x| definition::scale(x, Scaling::PowerOfTwo)).collect();
            want.extend(latent.iter().enumerate().map(|(i, x)| definition::code(*x, scales[i / 128])));
            want.resize(c.div_ceil(4) * 4, 0xa5);
            want.extend(scales.iter().flat_map(|scale| (*scale as f32).to_le_bytes()));
            want.extend(key.iter().flat_map(|x| half::bf16::from_f32(*x).to_le_bytes()));
            want.resize(want.len().div_ceil(4) * 4, 0xa5);
            let mut row = vec![0xa5; layout.bytes()];
            layout.encode(&latent, &key, &mut row);
            assert_eq!(row, want, "{layout:?}");
            let mut got = vec![f64::NAN; c + r];
            layout.decode(&row, &mut got);
            let back = row[..c].iter().enumerate().map(|(i, code)| definition::value(*code) * scales[i / 128]);
            let want: Vec<f64> = back.chain(key.iter().map(|x| half::bf16::from_f32(*x).to_f64())).collect();
            assert_eq!(got, want, "{layout:?}");
            assert!(got.iter().all(|x| half::bf16::from_f64(*x).to_f64() == *x), "bf16 holds it exactly");
        }
    }
}
