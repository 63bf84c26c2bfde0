//! Grouped GEMM: every expert's linear layer over its own rows, ragged and without padding.
//!
//! Rows x_ni are sorted by expert; expert e has rows `offsets[e]..offsets[e + 1]` and weight w_eoi. The passes are those of
//! [`crate::ops::gemm`], per expert:
//! - F: y_no = x_ni w_e^T
//! - I: dx_ni = dy_no w_e
//! - W: dw_e += dy_e^T x_e; experts without rows leave theirs untouched
//!
//! Offsets may end before the rows do: buffers that other ranks write to have room for more than comes. Rows past the last
//! expert's are neither read nor written.
//!
//! A row's result has the same bits whatever rows are beside it and however its expert's rows are cut, so it does not depend on
//! the number of ranks that share the experts. One exception: F of x with less than 64 rows in all, where an expert with one row
//! takes the product that generation is fast with. On a stream that is batch-invariant all of F is made by that one.
//!
//! A product of one expert is too small to share between cores (waking them costs as much as it takes), so the cores take whole
//! products, the largest first. An expert with many rows is cut into chunks, of rows (F, I) or of outputs (W), at places that
//! depend on the problem and not on the cores: results are the same on any machine of one instruction set.
//!
//! [`swiglu`] has the same products with the activation done while a chunk is in the cache.

pub mod swiglu;
pub(super) mod tasks;

use tasks::{Task, run, split};

use crate::{
    cost::Cost,
    device::Target,
    dtype::{DType, Float},
    error::Result,
    ops::{
        are_fast,
        expect::expect_tensor,
        gemm::{self as plain, Mat, Threads, gemm, gemm_by_row},
        gemv::linear,
        is_fast,
    },
    ptx::{self, gemm::Matrix, grouped_gemm::Rows},
    stream::Stream,
    tensor::Tensor,
    with_float,
};

/// The sizes of a grouped layer.
#[derive(Clone, Copy, Debug)]
pub(super) struct Sizes {
    pub n: usize,
    pub e: usize,
    pub o: usize,
    pub i: usize,
    /// F by dot products, whatever the number of rows.
    pub by_row: bool,
}

/// Rows of x below which one row of an expert is a product with a vector.
const FEW_ROWS: usize = 64;

impl Task {
    /// The task's rows of y = x w_e^T.
    fn forward<T: Float>(&self, z: Sizes, x: &[T], w: &[T], y: &mut [T]) {
        let x = &x[self.rows.start * z.i..self.rows.end * z.i];
        if z.by_row {
            return linear::<T, T>(x, self.weight(z, w), z.i, y, 0.0, Threads::One);
        }
        let (x, w) = (Mat::new(x, self.rows.len(), z.i), self.matrix(z, w).t());
        if z.n < FEW_ROWS {
            gemm(x, w, 0.0, y, z.o, Threads::One);
        } else {
            gemm_by_row(x, w, 0.0, y, z.o);
        }
    }

    /// The task's rows of dx = dy w_e, `stride` elements from row to row.
    fn input_grad<T: Float>(&self, z: Sizes, dy: &[T], w: &[T], dx: &mut [T], stride: usize) {
        let dy = Mat::new(&dy[self.rows.start * z.o..self.rows.end * z.o], self.rows.len(), z.o);
        gemm_by_row(dy, self.matrix(z, w), 0.0, dx, stride);
    }

    /// The task's outputs of dw_e += dy^T x.
    fn weight_grad<T: Float>(&self, z: Sizes, dy: &[T], x: &[T], dw: &mut [T]) {
        let dy = &dy[self.rows.start * z.o + self.outputs.start..self.rows.end * z.o];
        let dy = Mat::strided(dy, self.rows.len(), self.outputs.len(), z.o);
        let x = Mat::new(&x[self.rows.start * z.i..self.rows.end * z.i], self.rows.len(), z.i);
        gemm_by_row(dy.t(), x, 1.0, dw, z.i);
    }

    fn weight<'a, T>(&self, z: Sizes, w: &'a [T]) -> &'a [T] {
        &w[self.expert * z.o * z.i..][..z.o * z.i]
    }

    fn matrix<'a, T>(&self, z: Sizes, w: &'a [T]) -> Mat<'a, T> {
        Mat::new(self.weight(z, w), z.o, z.i)
    }
}

/// Checks offsets, `w` [e, o, i], `x` [n, i] and `y` [n, o] under their roles.
fn check(
    op: &'static str,
    offsets: Tensor,
    (w_role, w): (&'static str, Tensor),
    (x_role, x): (&'static str, Tensor),
    (y_role, y): (&'static str, Tensor),
) -> Result<Sizes> {
    let (n, e, o, i) = (x.rows(), w.dim(0), w.dim(1), w.dim(2));
    expect_tensor(op, "offsets", offsets, DType::U32, &[e + 1])?;
    expect_tensor(op, w_role, w, x.dtype, &[e, o, i])?;
    expect_tensor(op, x_role, x, x.dtype, &[n, i])?;
    expect_tensor(op, y_role, y, x.dtype, &[n, o])?;
    Ok(Sizes { n, e, o, i, by_row: false })
}

/// F: `y_no = x_ni w_e^T` per expert, from x [n, i], offsets U32 \[e + 1\] and w [e, o, i].
pub fn forward(s: &mut Stream, x: Tensor, offsets: Tensor, w: Tensor, y: Tensor) -> Result<()> {
    let z = check("grouped linear", offsets, ("w", w), ("x", x), ("y", y))?;
    let z = Sizes { by_row: s.is_batch_invariant(), ..z };
    s.account(forward_cost(z.n, z.e, z.o, z.i, x.dtype.size_bytes()));
    let kernels = |on: &Target| {
        are_fast(&[x, w, y]).then(|| ptx::grouped_gemm::forward(on.into(), x, Rows::Offsets(offsets), w, y))
    };
    s.launch_kernel(&[x, offsets, w], &[y], kernels, move |m| {
        with_float!(x.dtype, T => {
            let (x, w, mut y) = (m.read::<T>(x), m.read::<T>(w), m.write::<T>(y));
            let tasks = tasks::by_rows(&m.read::<u32>(offsets), z);
            let outs = split(&tasks, &mut y, z.o, |task| task.rows.clone());
            run(tasks, outs, z.i, |task, y| task.forward(z, &x, &w, y));
        });
    });
    Ok(())
}

/// I: `dx_ni = dy_no w_e` per expert, from dy [n, o], offsets U32 \[e + 1\] and w [e, o, i].
pub fn input_grad(s: &mut Stream, dy: Tensor, offsets: Tensor, w: Tensor, dx: Tensor) -> Result<()> {
    let z = check("grouped linear input gradient", offsets, ("w", w), ("dx", dx), ("dy", dy))?;
    s.account(input_grad_cost(z.n, z.e, z.o, z.i, dy.dtype.size_bytes()));
    let kernels = |on: &Target| {
        are_fast(&[dy, w, dx])
            .then(|| ptx::grouped_gemm::input_grad(on.into(), dy, Rows::Offsets(offsets), w, Matrix::new(dx, z.i)))
    };
    s.launch_kernel(&[dy, offsets, w], &[dx], kernels, move |m| {
        with_float!(dx.dtype, T => {
            let (dy, w, mut dx) = (m.read::<T>(dy), m.read::<T>(w), m.write::<T>(dx));
            let tasks = tasks::by_rows(&m.read::<u32>(offsets), z);
            let outs = split(&tasks, &mut dx, z.i, |task| task.rows.clone());
            run(tasks, outs, z.i, |task, dx| task.input_grad(z, &dy, &w, dx, z.i));
        });
    });
    Ok(())
}

/// W: `dw_eoi += dy_e^T x_e` per expert, from dy [n, o], x [n, i] and offsets U32 \[e + 1\].
pub fn weight_grad(s: &mut Stream, dy: Tensor, x: Tensor, offsets: Tensor, dw: Tensor) -> Result<()> {
    let z = check("grouped linear weight gradient", offsets, ("dw", dw), ("x", x), ("dy", dy))?;
    s.account(weight_grad_cost(z.n, z.e, z.o, z.i, dy.dtype.size_bytes()));
    let kernels = |on: &Target| {
        let has = are_fast(&[dy, x]) && is_fast(dw);
        has.then(|| ptx::grouped_gemm::weight_grad(on.into(), dy, x, Rows::Offsets(offsets), dw))
    };
    s.launch_kernel(&[dy, x, offsets, dw], &[dw], kernels, move |m| {
        with_float!(x.dtype, T => {
            let (dy, x, mut dw) = (m.read::<T>(dy), m.read::<T>(x), m.write::<T>(dw));
            let tasks = tasks::by_outputs(&m.read::<u32>(offsets), z);
            let place = |task: &Task| task.expert * z.o + task.outputs.start..task.expert * z.o + task.outputs.end;
            let outs = split(&tasks, &mut dw, z.i, place);
            run(tasks, outs, z.i, |task, dw| task.weight_grad(z, &dy, &x, dw));
        });
    });
    Ok(())
}

/// Cost of F over n rows, with e experts that all have some.
pub fn forward_cost(n: usize, e: usize, o: usize, i: usize, elem_bytes: usize) -> Cost {
    of_all(e, (o * i * elem_bytes) as u64, plain::forward_cost(n, o, i, elem_bytes))
}

/// Cost of I over n rows, with e experts that all have some.
pub fn input_grad_cost(n: usize, e: usize, o: usize, i: usize, elem_bytes: usize) -> Cost {
    of_all(e, (o * i * elem_bytes) as u64, plain::input_grad_cost(n, o, i, elem_bytes))
}

/// Cost of W over n rows, with e experts that all have some: each reads and writes its gradient.
pub fn weight_grad_cost(n: usize, e: usize, o: usize, i: usize, elem_bytes: usize) -> Cost {
    let bytes = (o * i * elem_bytes) as u64;
    let one = of_all(e, bytes, plain::weight_grad_cost(n, o, i, elem_bytes));
    Cost { written_bytes: e as u64 * bytes, ..one }
}

/// `one` expert's cost with the weights of all `e` read, `weight_bytes` each.
fn of_all(e: usize, weight_bytes: u64, one: Cost) -> Cost {
    Cost { read_bytes: one.read_bytes + e as u64 * weight_bytes - weight_bytes, ..one }
}

#[cfg(test)]
mod tests;
