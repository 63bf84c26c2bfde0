//! Matrix products, by the `gemm` crate: C = alpha C + A B with any strides.
//!
//! A linear layer with weight w_oi maps x_ti to y_to = x_ti w_oi^T. Its passes:
//! - F: y_to = x_ti w_oi^T
//! - I: dx_ti = dy_to w_oi
//! - W: dw_oi += dy_to^T x_ti
//!
//! bf16 operands are widened to f32 once, multiplied in f32 and rounded once, as a tensor core with f32 accumulators does.

use gemm::Parallelism;

use crate::{
    cost::Cost,
    device::Target,
    dtype::Float,
    error::Result,
    ops::{are_fast, elementwise::copy_now, expect::expect_residual, expect_shape, gemv::linear, is_fast},
    ptx,
    stream::Stream,
    tensor::Tensor,
    with_float,
};

/// A matrix in a slice: element (r, c) is at `r * row_stride + c * col_stride`.
#[derive(Clone, Copy)]
pub struct Mat<'a, T> {
    data: &'a [T],
    rows: usize,
    cols: usize,
    row_stride: usize,
    col_stride: usize,
}

impl<'a, T> Mat<'a, T> {
    /// Row-major contiguous `rows` x `cols`.
    pub fn new(data: &'a [T], rows: usize, cols: usize) -> Self {
        Self::strided(data, rows, cols, cols)
    }

    /// Row-major with `row_stride` elements from row to row.
    pub fn strided(data: &'a [T], rows: usize, cols: usize, row_stride: usize) -> Self {
        Mat { data, rows, cols, row_stride, col_stride: 1 }
    }

    /// The transpose, without moving anything.
    #[must_use]
    pub fn t(self) -> Self {
        Mat { rows: self.cols, cols: self.rows, row_stride: self.col_stride, col_stride: self.row_stride, ..self }
    }

    /// Columns from `start` on, `cols` of them.
    fn columns(self, start: usize, cols: usize) -> Self {
        Mat { data: &self.data[start * self.col_stride..], cols, ..self }
    }

    fn check(&self) {
        if self.rows > 0 && self.cols > 0 {
            let last = (self.rows - 1) * self.row_stride + (self.cols - 1) * self.col_stride;
            assert!(last < self.data.len(), "a matrix reaches element {last} of a slice of {}", self.data.len());
        }
    }
}

/// Whether a product uses the thread pool.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Threads {
    /// The calling thread; for products that run beside each other.
    One,
    /// The pool, where the product is large enough.
    All,
}

/// `c = beta c + a b`, where `c` is row-major with `c_stride` elements from row to row.
///
/// # Panics
/// If inner sizes differ or a matrix reaches past its slice.
pub fn gemm<T: Float>(a: Mat<T>, b: Mat<T>, beta: f64, c: &mut [T], c_stride: usize, threads: Threads) {
    let (m, k, n) = (a.rows, a.cols, b.cols);
    if !has_work(a, b, c, c_stride) {
        return;
    }
    // As in generation: bound by reading the weight, so nothing is packed or widened.
    if m == 1 && a.col_stride == 1 && b.row_stride == 1 && b.col_stride == k {
        return linear::<T, T>(&a.data[..k], &b.data[..n * k], k, &mut c[..n], beta, threads);
    }
    match T::DTYPE {
        crate::dtype::DType::Bf16 => widened(a, b, beta, c, c_stride, |a, b, c| native(a, b, 0.0, c, n, threads)),
        _ => native(a, b, beta, c, c_stride, threads),
    }
}

/// Checks a product's sizes; whether there is something to do.
fn has_work<T>(a: Mat<T>, b: Mat<T>, c: &[T], c_stride: usize) -> bool {
    assert_eq!(a.cols, b.rows, "inner sizes of a product agree");
    if a.rows == 0 || b.cols == 0 {
        return false;
    }
    assert!(c_stride >= b.cols && (a.rows - 1) * c_stride + b.cols <= c.len(), "the result fits its slice, row by row");
    a.check();
    b.check();
    true
}

/// [`gemm()`] on the calling thread, where the bits of a row of `c` follow from its row of `a` and from `b` alone, and not from how
/// many rows are beside it: so a token's result is the same on one rank and on many.
///
/// # Panics
/// As [`gemm()`].
pub fn gemm_by_row<T: Float>(a: Mat<T>, b: Mat<T>, beta: f64, c: &mut [T], c_stride: usize) {
    if !has_work(a, b, c, c_stride) {
        return;
    }
    let n = b.cols;
    match T::DTYPE {
        crate::dtype::DType::Bf16 => widened(a, b, beta, c, c_stride, |a, b, c| steady(a, b, 0.0, c, n)),
        _ => steady(a, b, beta, c, c_stride),
    }
}

/// Results of up to so many elements, and of one row, take paths of the `gemm` crate that sum in another order.
const SMALL_RESULT: usize = 16 * 16;
/// Columns of `c` up to which that crate cuts the inner size in two ways, by the number of rows; and the size it cuts from.
const NARROW: usize = 64;
const MAX_INNER: usize = 512;

/// `native` on its common path always: rows of zeros are added where there are too few, and the inner size of narrow results is
/// cut here.
fn steady<T: Float>(a: Mat<T>, b: Mat<T>, beta: f64, c: &mut [T], c_stride: usize) {
    let (m, k, n) = (a.rows, a.cols, b.cols);
    let rows = (SMALL_RESULT / n + 1).max(2);
    if m < rows {
        let (mut a_wide, mut c_wide) = (vec![T::default(); rows * k], vec![T::default(); rows * n]);
        for (r, row) in a_wide.chunks_exact_mut(k.max(1)).take(m).enumerate() {
            for (j, x) in row.iter_mut().enumerate() {
                *x = a.data[r * a.row_stride + j * a.col_stride];
            }
        }
        for (r, row) in c_wide.chunks_exact_mut(n).take(m).enumerate() {
            row.copy_from_slice(&c[r * c_stride..][..n]);
        }
        steady(Mat::new(&a_wide, rows, k), b, beta, &mut c_wide, n);
        for (r, row) in c_wide.chunks_exact(n).take(m).enumerate() {
            c[r * c_stride..][..n].copy_from_slice(row);
        }
        return;
    }
    if n > NARROW || k <= MAX_INNER {
        return native(a, b, beta, c, c_stride, Threads::One);
    }
    for start in (0..k).step_by(MAX_INNER) {
        let len = MAX_INNER.min(k - start);
        let beta = if start == 0 { beta } else { 1.0 };
        native(a.columns(start, len), b.t().columns(start, len).t(), beta, c, c_stride, Threads::One);
    }
}

fn native<T: Float>(a: Mat<T>, b: Mat<T>, beta: f64, c: &mut [T], c_stride: usize, threads: Threads) {
    let (m, k, n) = (a.rows, a.cols, b.cols);
    let parallelism = match threads {
        Threads::All if m * n * k >= 64 * 64 * 64 => Parallelism::Rayon(0),
        _ => Parallelism::None,
    };
    // SAFETY: `gemm` checked that every element reached through these strides lies in its slice, `c` is exclusive and its
    // rows do not overlap (c_stride >= n), and all three have the same plain type.
    unsafe {
        gemm::gemm(
            m,
            n,
            k,
            c.as_mut_ptr(),
            1,
            c_stride as isize,
            beta != 0.0,
            a.data.as_ptr(),
            a.col_stride as isize,
            a.row_stride as isize,
            b.data.as_ptr(),
            b.col_stride as isize,
            b.row_stride as isize,
            T::of_f64(beta),
            T::of_f64(1.0),
            false,
            false,
            false,
            parallelism,
        );
    }
}

/// By `product`, of f32, which assigns a contiguous result.
fn widened<T: Float>(
    a: Mat<T>,
    b: Mat<T>,
    beta: f64,
    c: &mut [T],
    c_stride: usize,
    product: impl FnOnce(Mat<f32>, Mat<f32>, &mut [f32]),
) {
    let (m, n) = (a.rows, b.cols);
    let widen = |x: &[T]| x.iter().map(|v| v.as_f64() as f32).collect::<Vec<f32>>();
    let (a_f32, b_f32) = (widen(a.data), widen(b.data));
    let mut c_f32 = vec![0f32; m * n];
    fn cast<'a, T>(m: Mat<'_, T>, data: &'a [f32]) -> Mat<'a, f32> {
        Mat { data, rows: m.rows, cols: m.cols, row_stride: m.row_stride, col_stride: m.col_stride }
    }
    product(cast(a, &a_f32), cast(b, &b_f32), &mut c_f32);
    for (r, row) in c_f32.chunks_exact(n).enumerate() {
        for (out, &x) in c[r * c_stride..r * c_stride + n].iter_mut().zip(row) {
            let old = if beta == 0.0 { 0.0 } else { beta * out.as_f64() };
            *out = T::of_f64(old + f64::from(x));
        }
    }
}

/// `y_to = beta y_to + x_ti w_oi^T`; `by_row` as [`Stream::set_batch_invariant`] says.
fn by_weight<T: Float>(by_row: bool, x: &[T], w: &[T], [t, o, i]: [usize; 3], beta: f64, y: &mut [T]) {
    if by_row {
        linear::<T, T>(x, w, i, y, beta, Threads::All);
    } else {
        gemm(Mat::new(x, t, i), Mat::new(w, o, i).t(), beta, y, o, Threads::All);
    }
}

/// F: `y_to = x_ti w_oi^T`, plus `bias_o` if given.
pub fn forward(s: &mut Stream, x: Tensor, w: Tensor, bias: Option<Tensor>, y: Tensor) -> Result<()> {
    let (o, i) = (w.dim(0), w.dim(1));
    let t = x.len() / i.max(1);
    expect_shape("linear", "x", x.reshape(&[t, i]), &[t, i])?;
    expect_shape("linear", "y", y, &[t, o]).or_else(|e| if y.len() == t * o { Ok(()) } else { Err(e) })?;
    s.account(forward_cost(t, o, i, x.dtype.size_bytes()));
    let reads: Vec<Tensor> = [x, w].into_iter().chain(bias).collect();
    let kernels =
        |on: &Target| (are_fast(&reads) && y.dtype == x.dtype).then(|| ptx::gemm::forward(on.into(), x, w, bias, y));
    let by_row = s.is_batch_invariant();
    s.launch_kernel(&reads, &[y], kernels, move |m| {
        with_float!(x.dtype, T => {
            let (x, w, mut y) = (m.read::<T>(x), m.read::<T>(w), m.write::<T>(y));
            let mut beta = 0.0;
            if let Some(bias) = bias {
                let bias = m.read::<T>(bias);
                y.chunks_exact_mut(o).for_each(|row| row.copy_from_slice(&bias));
                beta = 1.0;
            }
            by_weight(by_row, &x, &w, [t, o, i], beta, &mut y);
        });
    });
    Ok(())
}

/// F onto a residual stream: `y_to = residual_to + x_ti w_oi^T`, rounded once; in place where `residual` is `y`.
///
/// # Errors
/// If shapes or types differ, or `residual` shares a buffer with `y` without being it.
pub fn forward_onto(s: &mut Stream, x: Tensor, w: Tensor, residual: Tensor, y: Tensor) -> Result<()> {
    const OP: &str = "linear onto a residual";
    let (o, i) = (w.dim(0), w.dim(1));
    let t = x.len() / i.max(1);
    expect_shape(OP, "y", y, &[t, o])?;
    expect_residual(OP, residual, y)?;
    s.account(forward_onto_cost(t, o, i, x.dtype.size_bytes()));
    let reads = [x, w, residual];
    let kernels = |on: &Target| are_fast(&[x, w, y]).then(|| ptx::gemm::forward_onto(on.into(), x, w, residual, y));
    let by_row = s.is_batch_invariant();
    s.launch_kernel(&reads, &[y], kernels, move |m| {
        if residual != y {
            copy_now(m, residual, y);
        }
        with_float!(x.dtype, T => {
            let (x, w, mut y) = (m.read::<T>(x), m.read::<T>(w), m.write::<T>(y));
            by_weight(by_row, &x, &w, [t, o, i], 1.0, &mut y);
        });
    });
    Ok(())
}

/// I: `dx_ti = dy_to w_oi`, or `+=` if `accumulate`.
pub fn input_grad(s: &mut Stream, dy: Tensor, w: Tensor, dx: Tensor, accumulate: bool) -> Result<()> {
    let (o, i) = (w.dim(0), w.dim(1));
    let t = dx.len() / i.max(1);
    if dy.len() != t * o {
        expect_shape("linear input gradient", "dy", dy, &[t, o])?;
    }
    s.account(input_grad_cost(t, o, i, dy.dtype.size_bytes()));
    let kernels = |on: &Target| are_fast(&[dy, w, dx]).then(|| ptx::gemm::input_grad(on.into(), dy, w, dx, accumulate));
    s.launch_kernel(&[dy, w], &[dx], kernels, move |m| {
        with_float!(dy.dtype, T => {
            let (dy, w, mut dx) = (m.read::<T>(dy), m.read::<T>(w), m.write::<T>(dx));
            let beta = if accumulate { 1.0 } else { 0.0 };
            gemm(Mat::new(&dy, t, o), Mat::new(&w, o, i), beta, &mut dx, i, Threads::All);
        });
    });
    Ok(())
}

/// W: `dw_oi += dy_to^T x_ti`, and `dbias_o += sum_t dy_to` if given.
pub fn weight_grad(s: &mut Stream, dy: Tensor, x: Tensor, dw: Tensor, dbias: Option<Tensor>) -> Result<()> {
    let (o, i) = (dw.dim(0), dw.dim(1));
    let t = x.len() / i.max(1);
    if dy.len() != t * o {
        expect_shape("linear weight gradient", "dy", dy, &[t, o])?;
    }
    s.account(weight_grad_cost(t, o, i, dy.dtype.size_bytes()));
    let writes: Vec<Tensor> = std::iter::once(dw).chain(dbias).collect();
    let kernels = |on: &Target| {
        let has = are_fast(&[dy, x]) && writes.iter().all(|t| is_fast(*t));
        has.then(|| ptx::gemm::weight_grad(on.into(), dy, x, dw, dbias))
    };
    s.launch_kernel(&[dy, x], &writes, kernels, move |m| {
        with_float!(dy.dtype, T => {
            let (dy, x, mut dw) = (m.read::<T>(dy), m.read::<T>(x), m.write::<T>(dw));
            gemm(Mat::new(&dy, t, o).t(), Mat::new(&x, t, i), 1.0, &mut dw, i, Threads::All);
            if let Some(dbias) = dbias {
                let mut dbias = m.write::<T>(dbias);
                for row in dy.chunks_exact(o) {
                    for (sum, &v) in dbias.iter_mut().zip(row) {
                        *sum = T::from_acc(sum.to_acc() + v.to_acc());
                    }
                }
            }
        });
    });
    Ok(())
}

/// Cost of F over `t` tokens, which converts x.
pub fn forward_cost(t: usize, o: usize, i: usize, elem_bytes: usize) -> Cost {
    Cost::gemm(t, o, i, elem_bytes).casting(t * i)
}

/// Cost of F onto a residual, which is read in place of a copy of it.
pub fn forward_onto_cost(t: usize, o: usize, i: usize, elem_bytes: usize) -> Cost {
    forward_cost(t, o, i, elem_bytes).adding(t * o, elem_bytes)
}

/// Cost of I over `t` tokens, which converts dy.
pub fn input_grad_cost(t: usize, o: usize, i: usize, elem_bytes: usize) -> Cost {
    Cost::gemm(t, i, o, elem_bytes).casting(t * o)
}

/// Cost of W over `t` tokens. It converts both: scales of blocks run along the summed dimension, which is another one
/// than in F and I, so what those converted cannot be used.
pub fn weight_grad_cost(t: usize, o: usize, i: usize, elem_bytes: usize) -> Cost {
    let product = Cost::gemm(o, i, t, elem_bytes).casting(t * (o + i));
    Cost { read_bytes: product.read_bytes + product.written_bytes, ..product }
}

#[cfg(test)]
mod tests;
