//! Fill, copy, add and scale: the ops that only move bytes.

use crate::{
    cost::Cost,
    device::Target,
    dtype::{DType, Float},
    error::Result,
    memory::Memory,
    ops::{are_fast, expect::expect_tensor, expect_shape, is_fast, parallel::for_row_chunks},
    ptx,
    stream::Stream,
    tensor::Tensor,
    with_float,
};

/// `y = 0`.
pub fn zero(s: &mut Stream, y: Tensor) {
    let kernels = |_: &Target| Some(ptx::elementwise::zero(y));
    s.launch_kernel(&[], &[y], kernels, move |m| match y.dtype {
        DType::U32 => m.write::<u32>(y).fill(0),
        DType::U8 => m.write::<u8>(y).fill(0),
        dtype => with_float!(dtype, T => m.write::<T>(y).fill(T::of_f64(0.0))),
    });
}

/// `y = x`, rounded or widened to y's type.
pub fn copy(s: &mut Stream, x: Tensor, y: Tensor) -> Result<()> {
    let dims: Vec<usize> = x.shape.dims().collect();
    expect_shape("copy", "y", y.reshape(&dims), &dims)?;
    s.account(cost(x.len(), 1, y.dtype.size_bytes()));
    let has = x.dtype == y.dtype || [x, y].iter().all(|t| is_fast(*t));
    let kernels = |_: &Target| has.then(|| ptx::elementwise::copy(x, y));
    s.launch_kernel(&[x], &[y], kernels, move |m| copy_now(m, x, y));
    Ok(())
}

/// `y[rows[i]] = x[i]`, all u32; rows differ.
///
/// # Errors
/// If shapes or types differ. A row that y does not have fails the task.
pub fn scatter(s: &mut Stream, x: Tensor, rows: Tensor, y: Tensor) -> Result<()> {
    const OP: &str = "scatter";
    expect_tensor(OP, "x", x, DType::U32, &[rows.len()])?;
    expect_tensor(OP, "rows", rows, DType::U32, &[x.len()])?;
    expect_tensor(OP, "y", y, DType::U32, &[y.len()])?;
    s.account(Cost::stream(x.len() as u64, 8 * x.len() as u64, 4 * x.len() as u64));
    let kernels = |_: &Target| Some(ptx::elementwise::scatter(x, rows, y));
    // What stays of y is read, too.
    s.launch_kernel(&[x, rows, y], &[y], kernels, move |m| {
        let (x, rows, mut y) = (m.read::<u32>(x), m.read::<u32>(rows), m.write::<u32>(y));
        let len = y.len();
        for (i, (&x, &row)) in x.iter().zip(rows.iter()).enumerate() {
            match y.get_mut(row as usize) {
                Some(y) => *y = x,
                None => panic!("{}", no_such_row(i, row, len)),
            }
        }
    });
    Ok(())
}

/// What is said of a row that is not there.
pub(crate) fn no_such_row(position: usize, row: u32, len: usize) -> String {
    format!("expected rows below {len}, found {row} at position {position}")
}

/// [`copy`] as a part of another op's work.
pub(super) fn copy_now(m: &Memory, x: Tensor, y: Tensor) {
    if x.dtype == DType::U32 {
        m.write::<u32>(y).copy_from_slice(&m.read::<u32>(x));
        return;
    }
    if x.dtype == y.dtype {
        with_float!(x.dtype, T => {
            let (x, mut y) = (m.read::<T>(x), m.write::<T>(y));
            for_row_chunks(&mut y, 1, |at, chunk| chunk.copy_from_slice(&x[at..at + chunk.len()]));
        });
        return;
    }
    with_float!(x.dtype, T => with_float!(y.dtype, U => {
        let (x, mut y) = (m.read::<T>(x), m.write::<U>(y));
        for_row_chunks(&mut y, 1, #[inline(always)] |at, chunk| {
            for (y, x) in chunk.iter_mut().zip(&x[at..]) {
                *y = U::of_f64(x.as_f64());
            }
        });
    }));
}

/// Columns `from..from + cols` of x [t, c] = columns `to..to + cols` of y [t, e]; other columns of y stay.
pub fn copy_columns(
    s: &mut Stream,
    (x, from): (Tensor, usize),
    (y, to): (Tensor, usize),
    cols: usize,
    accumulate: bool,
) -> Result<()> {
    let (t, c, e) = (x.rows(), x.cols(), y.cols());
    expect_shape("copy columns", "y", y.reshape(&[y.rows(), e]), &[t, e])?;
    assert!(from + cols <= c && to + cols <= e, "columns lie in their rows");
    let kernels =
        |_: &Target| are_fast(&[x, y]).then(|| ptx::elementwise::copy_columns((x, from), (y, to), cols, accumulate));
    s.launch_kernel(&[x], &[y], kernels, move |m| {
        with_float!(x.dtype, T => {
            let (x, mut y) = (m.read::<T>(x), m.write::<T>(y));
            for (x, y) in x.chunks_exact(c).zip(y.chunks_exact_mut(e)) {
                for (y, x) in y[to..to + cols].iter_mut().zip(&x[from..from + cols]) {
                    *y = if accumulate { T::from_acc(y.to_acc() + x.to_acc()) } else { *x };
                }
            }
        });
    });
    Ok(())
}

/// `y += x`; x may have another type, and is rounded once, with the sum.
pub fn add_acc(s: &mut Stream, x: Tensor, y: Tensor) -> Result<()> {
    let dims: Vec<usize> = x.shape.dims().collect();
    expect_shape("add", "y", y, &dims)?;
    s.account(cost(x.len(), 2, y.dtype.size_bytes()));
    let has =
        [x, y].iter().all(|t| is_fast(*t)) || (y.dtype == DType::F64 && matches!(x.dtype, DType::F32 | DType::F64));
    let kernels = |_: &Target| has.then(|| ptx::elementwise::add_acc(x, y));
    s.launch_kernel(&[x, y], &[y], kernels, move |m| {
        with_float!(x.dtype, T => with_float!(y.dtype, U => {
            let (x, mut y) = (m.read::<T>(x), m.write::<U>(y));
            for_row_chunks(&mut y, 1, #[inline(always)] |at, chunk| {
                for (y, x) in chunk.iter_mut().zip(&x[at..]) {
                    *y = U::from_acc(y.to_acc() + <U as Float>::Acc::of_f64(x.as_f64()));
                }
            });
        }));
    });
    Ok(())
}

/// Cost of an op that reads `reads` tensors and writes one, elementwise.
pub fn cost(len: usize, reads: usize, elem_bytes: usize) -> Cost {
    Cost::stream(len as u64, (reads * len * elem_bytes) as u64, (len * elem_bytes) as u64)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::testing::*;

    #[test]
    #[expect(clippy::unwrap_used, reason = "tests")]
    fn copy_rounds_and_add_adds() {
        let mut s = stream();
        let memory = s.memory().clone();
        let x = memory.from_slice(&[3], &[1.0f32, 1.001, -2.0]);
        let y = memory.alloc(DType::Bf16, &[3]);
        copy(&mut s, x, y).unwrap();
        let z = memory.from_slice(&[3], &[half::bf16::ONE; 3]);
        add_acc(&mut s, y, z).unwrap();
        s.synchronize().unwrap();
        assert_eq!(memory.download::<half::bf16>(z).iter().map(|v| v.to_f32()).collect::<Vec<_>>(), [2.0, 2.0, -1.0]);
    }
}
