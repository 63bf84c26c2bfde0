//! Grouped GEMM: every expert's linear layer over its own rows, with the contracts of [`crate::ops::grouped_gemm`]; counts are
//! read on the device.
//!
//! Two forms of where an expert's rows are:
//! - contiguous: rows `offsets[e]..offsets[e + 1]`, as the CPU ops have it. Offsets may end before the rows do
//! - masked: the first `counts[e]` of `capacity` rows from `e * capacity` on, as generation and buffers between ranks have it
//!
//! The kernels are those of [`super::gemm`].

use super::{
    Launch,
    gemm::{Groups, Layout, Matrix, Problem, Target, launch},
};
use crate::tensor::Tensor;

/// Where experts' rows are among those of x and y.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Rows {
    /// One after another: U32 \[e + 1\], ascending from 0.
    Offsets(Tensor),
    /// In room for `rows / e` each: how many, U32 \[e\].
    Counts(Tensor),
}

/// F: `y_no = x_ni w_e^T` per expert, from x [n, i] and w [e, o, i].
pub fn forward(on: Target, x: Tensor, rows: Rows, w: Tensor, y: Tensor) -> Vec<Launch> {
    launch(on, &forward_problem(x, rows, w, y))
}

/// The product of [`forward`].
pub fn forward_problem(x: Tensor, rows: Rows, w: Tensor, y: Tensor) -> Problem {
    let [n, e, o, i] = sizes(x, w);
    let operands = (Matrix::new(x, i), Matrix::new(w, i), Matrix::new(y, o));
    Problem { groups: by_rows(rows, n, e), ..Problem::new(Layout::Nt, [n, o, i], operands) }
}

/// I: `dx_ni = dy_no w_e` per expert, from dy [n, o] and w [e, o, i]; `dx` may be columns of a wider matrix.
pub fn input_grad(on: Target, dy: Tensor, rows: Rows, w: Tensor, dx: Matrix) -> Vec<Launch> {
    launch(on, &input_grad_problem(dy, rows, w, dx))
}

/// The product of [`input_grad`].
pub fn input_grad_problem(dy: Tensor, rows: Rows, w: Tensor, dx: Matrix) -> Problem {
    let (n, e, o, i) = (dy.rows(), w.dim(0), w.dim(1), w.dim(2));
    let operands = (Matrix::new(dy, o), Matrix::new(w, i), dx);
    Problem { groups: by_rows(rows, n, e), ..Problem::new(Layout::Nn, [n, i, o], operands) }
}

/// W: `dw_eoi += dy_e^T x_e` per expert, from dy [n, o] and x [n, i]; dw may be f32 where they are bf16.
pub fn weight_grad(on: Target, dy: Tensor, x: Tensor, rows: Rows, dw: Tensor) -> Vec<Launch> {
    launch(on, &weight_grad_problem(dy, x, rows, dw))
}

/// The product of [`weight_grad`].
pub fn weight_grad_problem(dy: Tensor, x: Tensor, rows: Rows, dw: Tensor) -> Problem {
    let [n, e, o, i] = sizes(x, dw);
    let num = e as u32;
    let groups = match rows {
        Rows::Offsets(offsets) => Groups::Inner { offsets, num },
        Rows::Counts(counts) => Groups::MaskedInner { counts, num, capacity: capacity(n, e) },
    };
    let operands = (Matrix::new(dy, o), Matrix::new(x, i), Matrix::new(dw, i));
    Problem { addend: Some(dw), groups, ..Problem::new(Layout::Tn, [o, i, n], operands) }
}

fn sizes(x: Tensor, w: Tensor) -> [usize; 4] {
    [x.rows(), w.dim(0), w.dim(1), w.dim(2)]
}

/// As a product has them, of so many rows and experts.
pub(super) fn by_rows(rows: Rows, n: usize, e: usize) -> Groups {
    let num = e as u32;
    match rows {
        Rows::Offsets(offsets) => Groups::Rows { offsets, num },
        Rows::Counts(counts) => Groups::MaskedRows { counts, num, capacity: capacity(n, e) },
    }
}

fn capacity(n: usize, e: usize) -> u32 {
    (n / e.max(1)) as u32
}
