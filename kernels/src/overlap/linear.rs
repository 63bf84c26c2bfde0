//! A linear layer in FP8, with the ops and in the order in which a training step launches them.
//!
//! Legend: t tokens (or n rows by expert), i inputs, o outputs, e experts.

use super::filled;
use crate::{
    dtype::DType::{Bf16, F32, U8},
    error::Result,
    fp8::{Blocks, Scaling, TILE, Tiles, padded},
    memory::Memory,
    ops::{fp8_gemm, fp8_grouped_gemm, quantize},
    stream::Stream,
    tensor::Tensor,
};

/// Scales are any numbers.
pub(super) const SCALING: Scaling = Scaling::Real;

/// Room for operands that are rounded in front of a product: the gradient's, then the input's.
#[derive(Clone, Copy)]
pub(super) struct Room {
    codes: [Tensor; 2],
    scales: [Tensor; 2],
}

impl Room {
    /// For operands of so many numbers, and rows or columns.
    pub fn new(memory: &Memory, numbers: usize, most_rows: usize) -> Self {
        let scales = numbers / TILE + 4 * most_rows;
        Room {
            codes: [(); 2].map(|()| memory.alloc(U8, &[numbers])),
            scales: [(); 2].map(|()| memory.alloc(F32, &[scales])),
        }
    }

    fn tiles(&self, which: usize, [rows, columns]: [usize; 2]) -> Tiles {
        let dims = Tiles::scale_shape(rows, columns);
        Tiles {
            codes: self.codes[which].slice(0, rows * columns).reshape(&[rows, columns]),
            scales: self.scales[which].slice(0, dims[0] * dims[1]).reshape(&dims),
        }
    }
}

/// A weight [o, i], or [e, o, i] with the experts' rows.
#[derive(Clone, Copy)]
pub(super) struct Linear {
    w: Blocks,
    across: Blocks,
    dw: Tensor,
    o: usize,
    i: usize,
    experts: Option<(usize, Tensor)>,
}

impl Linear {
    /// [o, i].
    pub fn new(memory: &Memory, o: usize, i: usize) -> Self {
        Self::of(memory, &[], [o, i], None)
    }

    /// [e, o, i], whose rows `offsets` tell.
    pub fn by_experts(memory: &Memory, (e, offsets): (usize, Tensor), o: usize, i: usize) -> Self {
        Self::of(memory, &[e], [o, i], Some((e, offsets)))
    }

    fn of(memory: &Memory, e: &[usize], [o, i]: [usize; 2], experts: Option<(usize, Tensor)>) -> Self {
        let blocks = |dims: &[usize]| Blocks {
            codes: filled(memory, U8, dims),
            scales: filled(memory, F32, &Blocks::scale_shape(dims)),
        };
        let dims = |a: usize, b: usize| [e, &[a, b]].concat();
        Linear {
            w: blocks(&dims(o, i)),
            across: blocks(&dims(i, o)),
            dw: memory.alloc(F32, &dims(o, i)),
            o,
            i,
            experts,
        }
    }

    /// Outputs of so many rows.
    pub fn out(&self, memory: &Memory, t: usize) -> Tensor {
        memory.alloc(Bf16, &[t, self.o])
    }

    fn product(&self, s: &mut Stream, x: Tiles, w: Blocks, residual: Option<Tensor>, y: Tensor) -> Result<()> {
        match self.experts {
            None => fp8_gemm::product(s, x, w, residual, y),
            Some((_, offsets)) => fp8_grouped_gemm::product(s, x, offsets, w, y),
        }
    }

    /// F from rows in 8 bits, onto a residual if one is given.
    pub fn forward(&self, s: &mut Stream, x: Tiles, residual: Option<Tensor>, y: Tensor) -> Result<()> {
        self.product(s, x, self.w, residual, y)
    }

    /// I: rounds dy, and assigns dx, or adds to it.
    pub fn input_grad(&self, s: &mut Stream, dy: Tensor, room: Room, dx: Tensor, accumulate: bool) -> Result<()> {
        let q = room.tiles(0, [dy.rows(), self.o]);
        quantize::tiles(s, dy, q, SCALING)?;
        self.product(s, q, self.across, accumulate.then_some(dx), dx)
    }

    /// W: rounds dy and x along tokens.
    pub fn weight_grad(&self, s: &mut Stream, dy: Tensor, x: Tiles, room: Room) -> Result<()> {
        let t = dy.rows();
        let (columns, offsets) = match self.experts {
            None => (t, None),
            Some((e, offsets)) => (padded(t, e), Some(offsets)),
        };
        let (to_dy, to_x) = (room.tiles(0, [self.o, columns]), room.tiles(1, [self.i, columns]));
        quantize::columns(s, dy, offsets, to_dy, SCALING)?;
        quantize::retile(s, x, offsets, to_x, SCALING)?;
        match offsets {
            None => fp8_gemm::weight_grad(s, to_dy, to_x, self.dw),
            Some(offsets) => fp8_grouped_gemm::weight_grad(s, to_dy, to_x, offsets, self.dw),
        }
    }
}

/// The codes of rows [t, c] that an op rounds to 8 bits.
pub(super) fn tiles(memory: &Memory, t: usize, c: usize) -> Tiles {
    Tiles { codes: filled(memory, U8, &[t, c]), scales: filled(memory, F32, &Tiles::scale_shape(t, c)) }
}
