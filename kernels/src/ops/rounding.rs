//! What rounding to 8 bits did to numbers: how large they were, how many became zero, how many were cut off. For steps that are
//! watched: counted from the numbers and the codes that were made of them, so that it is of the very codes that products took.
//!
//! An op adds to `counts` F64 \[6\]: the largest magnitude, numbers that are not zero, those of them whose code is zero (underflow), those
//! that were cut off (overflow), the least scale (0: none yet) and the largest. NaN is left out; counts are exact to 2^53.
//!
//! A number is cut off if it is more than 464 scales, or infinite: the next code after 448 would be 480, so that up to 464 a number is
//! rounded to 448 as any number is rounded. Scales that are made for the largest number of a tile cut nothing off.
//!
//! There are no kernels for these: on a GPU they run on the host, on copies.

use rayon::prelude::*;

use crate::{
    cost::Cost,
    dtype::DType,
    error::Result,
    fp8::{Blocks, TILE, Tiles, decode_e4m3},
    memory::Memory,
    ops::{
        expect::{expect_blocks, expect_float, expect_tensor, expect_tiles},
        quantize::{check_columns, groups_of, to_f32},
    },
    stream::Stream,
    tensor::Tensor,
    with_float,
};

/// Values of a counts tensor.
pub const LEN: usize = 6;

/// In scales: where numbers begin to be cut off.
const CUT_OFF: f64 = 464.0;

/// What was counted.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Counts {
    /// Largest magnitude.
    pub amax: f64,
    /// Numbers that are not zero.
    pub num_nonzero: f64,
    /// Of them, those that became zero.
    pub num_underflowed: f64,
    /// Of them, those that were cut off.
    pub num_overflowed: f64,
    /// Least scale; 0 if there was none.
    pub min_scale: f64,
    /// Largest scale.
    pub max_scale: f64,
}

impl Counts {
    /// As ops keep them.
    pub fn to_array(self) -> [f64; LEN] {
        let Counts { amax, num_nonzero, num_underflowed, num_overflowed, min_scale, max_scale } = self;
        [amax, num_nonzero, num_underflowed, num_overflowed, min_scale, max_scale]
    }

    /// From what ops keep.
    pub fn from_array(values: [f64; LEN]) -> Self {
        let [amax, num_nonzero, num_underflowed, num_overflowed, min_scale, max_scale] = values;
        Counts { amax, num_nonzero, num_underflowed, num_overflowed, min_scale, max_scale }
    }

    /// Of both.
    #[must_use]
    pub fn and(self, other: Self) -> Self {
        let least = match (self.min_scale, other.min_scale) {
            (0.0, scale) | (scale, 0.0) => scale,
            (a, b) => a.min(b),
        };
        Counts {
            amax: self.amax.max(other.amax),
            num_nonzero: self.num_nonzero + other.num_nonzero,
            num_underflowed: self.num_underflowed + other.num_underflowed,
            num_overflowed: self.num_overflowed + other.num_overflowed,
            min_scale: least,
            max_scale: self.max_scale.max(other.max_scale),
        }
    }

    /// Numbers under one scale.
    fn tile(&mut self, scale: f32, numbers: impl Iterator<Item = (f32, u8)>) {
        let scale = f64::from(scale);
        let mut here = Counts { min_scale: scale, max_scale: scale, ..Counts::default() };
        for (x, code) in numbers {
            let x = f64::from(x.abs());
            if x > 0.0 {
                here.num_nonzero += 1.0;
                here.num_underflowed += f64::from(u8::from(code & 0x7f == 0));
                here.num_overflowed += f64::from(u8::from(x > CUT_OFF * scale || x.is_infinite()));
                here.amax = here.amax.max(x);
            }
        }
        *self = self.and(here);
    }
}

/// Numbers that were rounded.
#[derive(Clone, Copy, Debug)]
pub enum Numbers {
    /// In a floating-point format [t, c].
    Float(Tensor),
    /// In 8 bits before, with other tiles [t, c].
    Tiles(Tiles),
}

impl Numbers {
    fn dims(self) -> (usize, usize) {
        match self {
            Numbers::Float(x) => (x.rows(), x.cols()),
            Numbers::Tiles(x) => (x.codes.rows(), x.codes.cols()),
        }
    }

    fn check(self, op: &'static str) -> Result<()> {
        let (t, c) = self.dims();
        match self {
            Numbers::Float(x) => expect_float(op, "x", x),
            Numbers::Tiles(x) => expect_tiles(op, "x", x, t, c),
        }
    }

    fn tensors(self) -> [Option<Tensor>; 2] {
        match self {
            Numbers::Float(x) => [Some(x), None],
            Numbers::Tiles(x) => x.tensors().map(Some),
        }
    }

    /// Calls `f` with what reads the number at row and column.
    fn with(self, m: &Memory, count: &(dyn Fn(&Reader) -> Counts + Sync)) -> Counts {
        let c = self.dims().1;
        match self {
            Numbers::Float(x) => with_float!(x.dtype, T => {
                let x = m.read::<T>(x);
                count(&|row, column| to_f32(x[row * c + column]))
            }),
            Numbers::Tiles(x) => {
                let (codes, scales, pitch) = (m.read::<u8>(x.codes), m.read::<f32>(x.scales), x.scales.dim(1));
                count(&|row, column| decode_e4m3(codes[row * c + column]) * scales[column / TILE * pitch + row])
            }
        }
    }
}

/// Reads the number at row and column.
type Reader<'a> = dyn Fn(usize, usize) -> f32 + Sync + 'a;

/// Counts of `n` parts, in parallel: sums are of whole numbers, so their order does not matter.
fn sum(n: usize, part: impl Fn(usize) -> Counts + Send + Sync) -> Counts {
    (0..n).into_par_iter().with_min_len(16).map(part).reduce(Counts::default, Counts::and)
}

fn add(m: &Memory, counts: Tensor, more: Counts) {
    let mut kept = m.write::<f64>(counts);
    let mut before = [0.0; LEN];
    before.copy_from_slice(&kept);
    kept.copy_from_slice(&Counts::from_array(before).and(more).to_array());
}

fn launch(
    s: &mut Stream,
    (x, codes, others): (Numbers, [Tensor; 2], &[Tensor]),
    counts: Tensor,
    job: impl FnOnce(&Memory) -> Counts + Send + 'static,
) {
    let reads: Vec<Tensor> =
        x.tensors().into_iter().flatten().chain(codes).chain(others.iter().copied()).chain([counts]).collect();
    let bytes = reads.iter().map(Tensor::size_bytes).sum();
    let (t, c) = x.dims();
    s.account(Cost::stream(4 * (t * c) as u64, bytes, counts.size_bytes()));
    s.launch(&reads, &[counts], move |m| add(m, counts, job(m)));
}

/// Of `x` [t, c], as [`crate::ops::quantize::tiles`] rounds it to `q`; with `offsets` U32 \[e + 1\] only of the rows that groups have.
///
/// # Errors
/// Tensors of other shapes or types.
pub fn tiles(s: &mut Stream, x: Numbers, q: Tiles, offsets: Option<Tensor>, counts: Tensor) -> Result<()> {
    const OP: &str = "count rounding of tiles";
    let (t, c) = x.dims();
    x.check(OP)?;
    expect_tiles(OP, "q", q, t, c)?;
    check_rest(OP, offsets, counts)?;
    let others: Vec<Tensor> = offsets.into_iter().collect();
    launch(s, (x, q.tensors(), &others), counts, move |m| {
        let (codes, scales, pitch) = (m.read::<u8>(q.codes), m.read::<f32>(q.scales), q.scales.dim(1));
        let rows = offsets.map_or(t, |offsets| m.read::<u32>(offsets).last().map_or(0, |&n| n as usize)).min(t);
        x.with(m, &|x| {
            sum(rows, |row| {
                let mut counts = Counts::default();
                for tile in 0..c.div_ceil(TILE) {
                    let numbers = (tile * TILE..c.min((tile + 1) * TILE)).map(|at| (x(row, at), codes[row * c + at]));
                    counts.tile(scales[tile * pitch + row], numbers);
                }
                counts
            })
        })
    });
    Ok(())
}

/// Of `x` [t, c], as [`crate::ops::quantize::columns`] and `retile` round it to `q` \[c, ..\].
///
/// # Errors
/// Tensors of other shapes or types.
pub fn columns(s: &mut Stream, x: Numbers, offsets: Option<Tensor>, q: Tiles, counts: Tensor) -> Result<()> {
    const OP: &str = "count rounding of columns";
    let (t, c) = x.dims();
    x.check(OP)?;
    check_columns(OP, (t, c), offsets, q)?;
    expect_tensor(OP, "counts", counts, DType::F64, &[LEN])?;
    let columns = q.codes.cols();
    let others: Vec<Tensor> = offsets.into_iter().collect();
    launch(s, (x, q.tensors(), &others), counts, move |m| {
        let (codes, scales, pitch) = (m.read::<u8>(q.codes), m.read::<f32>(q.scales), q.scales.dim(1));
        let groups = groups_of(m, offsets, t);
        x.with(m, &|x| {
            sum(c, |column| {
                let mut counts = Counts::default();
                for group in &groups {
                    for first in group.rows.clone().step_by(TILE) {
                        let at = group.start + first - group.rows.start;
                        let rows = first..group.rows.end.min(first + TILE);
                        let codes = &codes[column * columns + at..][..rows.len()];
                        let numbers = rows.map(|row| x(row, column)).zip(codes.iter().copied());
                        counts.tile(scales[at / TILE * pitch + column], numbers);
                    }
                }
                counts
            })
        })
    });
    Ok(())
}

/// Of weights `w` [o, i] or [e, o, i], as [`crate::ops::quantize::blocks`] rounds them to `q`.
///
/// # Errors
/// Tensors of other shapes or types.
pub fn blocks(s: &mut Stream, w: Tensor, q: Blocks, counts: Tensor) -> Result<()> {
    const OP: &str = "count rounding of blocks";
    let dims: Vec<usize> = w.shape.dims().collect();
    expect_float(OP, "w", w)?;
    expect_blocks(OP, "q", q, &dims)?;
    expect_tensor(OP, "counts", counts, DType::F64, &[LEN])?;
    let (o, i) = (dims[dims.len() - 2], w.cols());
    let rows = w.len() / i.max(1);
    let flat = w.reshape(&[rows, i]);
    launch(s, (Numbers::Float(flat), q.tensors(), &[]), counts, move |m| {
        let (codes, scales) = (m.read::<u8>(q.codes), m.read::<f32>(q.scales));
        let (down, across) = (o.div_ceil(TILE), i.div_ceil(TILE));
        Numbers::Float(flat).with(m, &|x| {
            sum(rows, |row| {
                let of_row = &scales[(row / o * down + row % o / TILE) * across..][..across];
                let mut counts = Counts::default();
                for (block, scale) in of_row.iter().enumerate() {
                    let numbers = (block * TILE..i.min((block + 1) * TILE)).map(|at| (x(row, at), codes[row * i + at]));
                    counts.tile(*scale, numbers);
                }
                counts
            })
        })
    });
    Ok(())
}

fn check_rest(op: &'static str, offsets: Option<Tensor>, counts: Tensor) -> Result<()> {
    if let Some(offsets) = offsets {
        expect_tensor(op, "offsets", offsets, DType::U32, &[offsets.len().max(1)])?;
    }
    expect_tensor(op, "counts", counts, DType::F64, &[LEN])
}

#[cfg(test)]
mod tests;
