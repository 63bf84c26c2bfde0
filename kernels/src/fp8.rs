//! 8-bit floating point with a scale for each tile, as DeepSeek-V3 is trained in (technical report, section 3.3).
//!
//! Codes are E4M3: 4 exponent bits of bias 7, 3 mantissa bits, no infinities, NaN at 0x7f and 0xff; largest 448, least 2^-9 (OCP
//! 8-bit floating point specification). A number is `code * scale`. Activations and gradients have a scale for each 128 columns of
//! a row ([`Tiles`]), weights one for each 128 x 128 block ([`Blocks`]).
//!
//! The recipe is defined to the bit, for processors and GPUs alike:
//! - amax is the largest magnitude of the tile in f32, NaN left out, and at least 1e-4
//! - scale = amax / 448, rounded to nearest in f32; with [`Scaling::PowerOfTwo`] the least power of two that is at least that, and
//!   at most 2^120
//! - code = E4M3(x * (1 / scale)), both operations rounded to nearest in f32, then to the nearest code, ties to even, held at 448; its
//!   sign is that of x
//!
//! What is not finite stays so: a NaN is its own code; an infinity makes the real scale infinite, and with it all of its tile not a
//! number. With powers of two it comes back as an infinity.

use crate::{dtype::DType, memory::Memory, tensor::Tensor};

/// Numbers in a row, and for weights in a column, that share a scale.
pub const TILE: usize = 128;

/// The largest E4M3.
pub const MAX: f32 = 448.0;

/// The least magnitude that a scale is made for, so that a tile of zeros has one.
pub const MIN_AMAX: f32 = 1e-4;

/// What numbers scales are.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Scaling {
    /// Any: the tile's largest number becomes 448.
    #[default]
    Real,
    /// Powers of two (UE8M0), so that scaling is exact.
    PowerOfTwo,
}

impl Scaling {
    /// The scale of a tile whose largest magnitude is `amax`, which is at least [`MIN_AMAX`].
    #[inline(always)]
    pub fn scale(self, amax: f32) -> f32 {
        let scale = amax / MAX;
        match self {
            Scaling::Real => scale,
            // Up to the next exponent unless the mantissa is zero.
            Scaling::PowerOfTwo => {
                let exponent = scale.to_bits().wrapping_add((1 << 23) - 1) >> 23;
                f32::from_bits(exponent.min(127 + 120) << 23)
            }
        }
    }
}

/// Columns that `e` ragged groups of `n` rows in all need when they are laid side by side and each begins at a multiple of 128:
/// group g begins at 128 times the tiles that those before it have.
pub const fn padded(n: usize, e: usize) -> usize {
    TILE * (n / TILE + e)
}

/// Rows of numbers with a scale for each 128 columns of a row. Both tensors are contiguous.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Tiles {
    /// E4M3 codes, U8 [r, c].
    pub codes: Tensor,
    /// F32 [ceil(c / 128), p], with r up to a multiple of 4 as the pitch p: a product reads the scales of many rows at once.
    /// What is past the r-th is not read.
    pub scales: Tensor,
}

/// A matrix with a scale for each 128 x 128 block, or several of them. Both tensors are contiguous.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Blocks {
    /// E4M3 codes, U8 [r, c] or [e, r, c].
    pub codes: Tensor,
    /// F32 [ceil(r / 128), ceil(c / 128)], or [e, ..] of that.
    pub scales: Tensor,
}

impl Tiles {
    /// Shape of the scales of `rows` rows of `columns`.
    pub fn scale_shape(rows: usize, columns: usize) -> [usize; 2] {
        [columns.div_ceil(TILE), rows.next_multiple_of(4)]
    }

    /// Allocates both.
    pub fn alloc(memory: &Memory, rows: usize, columns: usize) -> Self {
        Tiles {
            codes: memory.alloc(DType::U8, &[rows, columns]),
            scales: memory.alloc(DType::F32, &Self::scale_shape(rows, columns)),
        }
    }

    /// Codes and scales.
    pub fn tensors(&self) -> [Tensor; 2] {
        [self.codes, self.scales]
    }
}

impl Blocks {
    /// Shape of the scales of a matrix of shape `dims`, or of e of them.
    pub fn scale_shape(dims: &[usize]) -> Vec<usize> {
        let (matrices, matrix) = dims.split_at(dims.len().saturating_sub(2));
        matrices.iter().copied().chain(matrix.iter().map(|d| d.div_ceil(TILE))).collect()
    }

    /// Allocates both; `dims` are [r, c] or [e, r, c].
    pub fn alloc(memory: &Memory, dims: &[usize]) -> Self {
        Blocks { codes: memory.alloc(DType::U8, dims), scales: memory.alloc(DType::F32, &Self::scale_shape(dims)) }
    }

    /// Codes and scales.
    pub fn tensors(&self) -> [Tensor; 2] {
        [self.codes, self.scales]
    }
}

/// The nearest E4M3 code, ties to even, at most 448; NaN is 0x7f with its sign.
#[inline(always)]
pub fn encode_e4m3(x: f32) -> u8 {
    let sign = (x.to_bits() >> 24) as u8 & 0x80;
    let magnitude = x.abs().min(448.0);
    // Normal: round the mantissa to 3 bits, then turn the exponent's bias from 127 to 7.
    let bits = magnitude.to_bits();
    let rounded = bits.wrapping_add(0x7_ffff + ((bits >> 20) & 1));
    let normal = (rounded >> 20).wrapping_sub((127 - 7) << 3) as u8;
    // Subnormal: adding 2^14 leaves multiples of 2^-9 in the low bits, rounded to nearest even.
    const SHIFT: f32 = 16384.0;
    let subnormal = (magnitude + SHIFT).to_bits().wrapping_sub(SHIFT.to_bits()) as u8;
    let code = if magnitude < 1.0 / 64.0 { subnormal } else { normal };
    sign | if x.is_nan() { 0x7f } else { code }
}

/// The code of `x` under a scale, given one over it. Its sign is that of x also where the product is no number, whose sign arithmetic does
/// not say.
#[inline(always)]
pub fn encode_scaled(x: f32, inverse: f32) -> u8 {
    encode_e4m3((x * inverse).copysign(x))
}

/// The value of every E4M3 code: where there are billions of them, 256 answers are looked up.
pub const E4M3: [f32; 256] = {
    let mut table = [0.0; 256];
    let mut code = 0;
    while code < 256 {
        table[code] = decode_e4m3(code as u8);
        code += 1;
    }
    table
};

/// The value of an E4M3 code.
#[inline(always)]
pub const fn decode_e4m3(code: u8) -> f32 {
    let (sign, exponent, mantissa) = (((code & 0x80) as u32) << 24, (code >> 3) & 15, code & 7);
    let magnitude = if code & 0x7f == 0x7f {
        f32::NAN
    } else if exponent == 0 {
        mantissa as f32 / 512.0
    } else {
        f32::from_bits(((exponent as u32) << 23 | (mantissa as u32) << 20).wrapping_add((127 - 7) << 23))
    };
    f32::from_bits(magnitude.to_bits() | sign)
}

/// The recipe by its definitions, slowly.
#[cfg(test)]
pub(crate) mod definition {
    use super::{MIN_AMAX, Scaling};

    /// By the definition of the format.
    pub fn value(code: u8) -> f64 {
        let (e, m) = (i32::from(code >> 3 & 15), f64::from(code & 7));
        let magnitude = if e == 0 { m / 8.0 * 2f64.powi(-6) } else { (1.0 + m / 8.0) * 2f64.powi(e - 7) };
        let magnitude = if code & 0x7f == 0x7f { f64::NAN } else { magnitude };
        if code & 0x80 == 0 { magnitude } else { -magnitude }
    }

    /// By trying all codes.
    pub fn nearest(x: f64) -> u8 {
        let sign = if x.is_sign_negative() { 0x80 } else { 0 };
        if x.is_nan() {
            return 0x7f | sign;
        }
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

    /// The scale of these numbers: quotients of f32 in f64 are exact enough to be rounded once.
    pub fn scale(x: &[f32], scaling: Scaling) -> f64 {
        let amax = x.iter().filter(|x| !x.is_nan()).fold(MIN_AMAX, |amax, x| amax.max(x.abs()));
        let real = f64::from((f64::from(amax) / 448.0) as f32);
        match scaling {
            Scaling::Real => real,
            Scaling::PowerOfTwo => (-30..=120).map(|e| 2f64.powi(e)).find(|s| *s >= real).unwrap_or(2f64.powi(120)),
        }
    }

    /// The code of a number under a scale; so are products.
    pub fn code(x: f32, scale: f64) -> u8 {
        let inverse = (1.0 / scale) as f32;
        nearest(f64::from((f64::from(x) * f64::from(inverse)) as f32).copysign(f64::from(x)))
    }
}

#[cfg(test)]
mod tests {
    use super::{
        definition::{nearest, scale, value},
        *,
    };
    use crate::ops::testing::random;

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

    #[test]
    fn scales_are_the_least_that_hold_the_largest_number() {
        assert_eq!(Scaling::Real.scale(448.0), 1.0);
        assert_eq!(Scaling::Real.scale(f32::INFINITY), f32::INFINITY);
        for amax in [MIN_AMAX, 1.0, 447.9, 448.0, 448.1, 896.0, 1e30, f32::MAX, f32::INFINITY] {
            for scaling in [Scaling::Real, Scaling::PowerOfTwo] {
                assert_eq!(f64::from(scaling.scale(amax)), scale(&[amax], scaling), "{amax}, {scaling:?}");
            }
        }
    }

    #[test]
    fn scales_have_a_pitch_that_copies_are_aligned_with() {
        let memory = Memory::new(crate::device::Device::Cpu);
        let tiles = Tiles::alloc(&memory, 5, 300);
        assert_eq!((tiles.scales.dim(0), tiles.scales.dim(1)), (3, 8));
        let experts = Blocks::alloc(&memory, &[7, 129, 128]);
        assert_eq!(experts.scales.shape, *[7, 2, 1].as_slice());
    }
}
