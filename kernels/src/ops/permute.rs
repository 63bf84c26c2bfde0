//! Moving tokens to experts and back: dispatch and combine on one rank.
//!
//! t tokens of k slots each make n = t k rows, sorted by expert and, within an expert, by token and slot: a counting sort, so
//! the order is one and the same everywhere. No token is dropped and n does not depend on the routing, so every shape is known
//! before the counts are.
//! - permute: `rows_nd[row_of_slot[t, j]] = x_td[t]`; its gradient sums the k rows of a token.
//! - combine: `y_td[t] = sum_j weights_tk[t, j] rows_nd[row_of_slot[t, j]]`, in slot order and onto a residual if there is one; its
//!   gradient gathers dy and weighs it.
//!
//! Weights and their gradients have the type that sums over rows are kept in: F32 for F32 and Bf16 rows, F64 for F64.

use crate::{
    cost::Cost,
    device::Target,
    dtype::{DType, Float},
    error::Result,
    fp8::{Scaling, Tiles},
    ops::{
        are_fast,
        expect::{acc_dtype, expect_float, expect_residual, expect_tensor, expect_tiles},
        is_fast,
        parallel::{for_row_chunks, for_row_chunks2},
        quantize::{self, encode_tiles},
    },
    ptx::{self, quantize::Recipe},
    stream::Stream,
    tensor::Tensor,
    with_float,
};

/// Where each slot's row is. All U32.
#[derive(Clone, Copy, Debug)]
pub struct Order {
    /// Expert e has rows `offsets[e]..offsets[e + 1]`; \[e + 1\].
    pub offsets: Tensor,
    /// Row of slot j of token t, at t k + j; [t k].
    pub row_of_slot: Tensor,
    /// Token of each row; [t k].
    pub token_of_row: Tensor,
}

impl Order {
    fn check(self, op: &'static str, rows: usize) -> Result<()> {
        expect_tensor(op, "row_of_slot", self.row_of_slot, DType::U32, &[rows])?;
        expect_tensor(op, "token_of_row", self.token_of_row, DType::U32, &[rows])
    }
}

/// Assigns the order of indices [t, k], as chosen by [`crate::ops::gate::forward`]. An index past the last expert fails the
/// stream.
pub fn sort(s: &mut Stream, indices: Tensor, order: Order) -> Result<()> {
    let (t, k) = (indices.rows(), indices.cols());
    expect_tensor("sort by expert", "indices", indices, DType::U32, &[t, k])?;
    expect_tensor("sort by expert", "offsets", order.offsets, DType::U32, &[order.offsets.len()])?;
    order.check("sort by expert", t * k)?;
    let kernels =
        |_: &Target| (order.offsets.len() <= ptx::permute::MAX_EXPERTS + 1).then(|| ptx::permute::sort(indices, order));
    s.launch_kernel(&[indices], &[order.offsets, order.row_of_slot, order.token_of_row], kernels, move |m| {
        let indices = m.read::<u32>(indices);
        let (mut offsets, mut row_of_slot, mut token_of_row) =
            (m.write::<u32>(order.offsets), m.write::<u32>(order.row_of_slot), m.write::<u32>(order.token_of_row));
        let num_experts = offsets.len() - 1;
        offsets.fill(0);
        for (slot, &i) in indices.iter().enumerate() {
            assert!((i as usize) < num_experts, "{}", no_such_expert(slot / k, i, num_experts));
            offsets[i as usize + 1] += 1;
        }
        for e in 0..num_experts {
            offsets[e + 1] += offsets[e];
        }
        let mut next = offsets[..num_experts].to_vec();
        for (slot, &i) in indices.iter().enumerate() {
            let row = next[i as usize];
            next[i as usize] += 1;
            row_of_slot[slot] = row;
            token_of_row[row as usize] = (slot / k) as u32;
        }
    });
    Ok(())
}

/// What is said of an expert that does not exist.
pub(crate) fn no_such_expert(token: usize, expert: u32, num_experts: usize) -> String {
    format!("token {token} goes to expert {expert} of {num_experts}")
}

/// F: gathers x [t, d] into rows [t k, d].
pub fn permute(s: &mut Stream, x: Tensor, order: Order, rows: Tensor) -> Result<()> {
    let (n, d) = (order.token_of_row.len(), x.cols());
    order.check("permute", n)?;
    expect_tensor("permute", "rows", rows, x.dtype, &[n, d])?;
    s.account(permute_cost(n, d, x.dtype.size_bytes()));
    let kernels = |_: &Target| (are_fast(&[x, rows])).then(|| ptx::permute::permute(x, order, rows));
    s.launch_kernel(&[x, order.token_of_row], &[rows], kernels, move |m| {
        with_float!(x.dtype, T => {
            let (x, tokens, mut rows) = (m.read::<T>(x), m.read::<u32>(order.token_of_row), m.write::<T>(rows));
            for_row_chunks(&mut rows, d, #[inline(always)] |first, chunk| {
                for (row, &t) in chunk.chunks_exact_mut(d).zip(&tokens[first..]) {
                    row.copy_from_slice(&x[t as usize * d..][..d]);
                }
            });
        });
    });
    Ok(())
}

/// F into FP8: as [`permute`], and then quantized, into `q` [t k, d]. Tokens are encoded once and their codes copied.
pub fn permute_tiles(s: &mut Stream, x: Tensor, order: Order, q: Tiles, scaling: Scaling) -> Result<()> {
    const OP: &str = "permute into FP8";
    let (n, t, d) = (order.token_of_row.len(), x.rows(), x.cols());
    order.check(OP, n)?;
    expect_float(OP, "x", x)?;
    expect_tiles(OP, "q", q, n, d)?;
    s.account(permute_tiles_cost(n, d, x.dtype.size_bytes()));
    let kernels = |on: &Target| {
        is_fast(x).then(|| ptx::quantize::permuted_tiles(x, order.token_of_row, q, Recipe::new(on, scaling)))
    };
    s.launch_kernel(&[x, order.token_of_row], &q.tensors(), kernels, move |m| {
        let mut of_tokens = (vec![0; t * d], vec![0.0; Tiles::scale_shape(t, d).iter().product()]);
        with_float!(x.dtype, T => encode_tiles(&m.read::<T>(x), d, scaling, (&mut of_tokens.0, &mut of_tokens.1)));
        let tokens = m.read::<u32>(order.token_of_row);
        for_row_chunks(
            &mut m.write::<u8>(q.codes),
            d,
            #[inline(always)]
            |first, chunk| {
                for (row, &t) in chunk.chunks_exact_mut(d).zip(&tokens[first..]) {
                    row.copy_from_slice(&of_tokens.0[t as usize * d..][..d]);
                }
            },
        );
        let mut scales = m.write::<f32>(q.scales);
        let tiles = scales.chunks_exact_mut(q.scales.dim(1)).zip(of_tokens.1.chunks_exact(t.next_multiple_of(4)));
        for (rows, of_tokens) in tiles {
            rows.iter_mut().zip(tokens.iter()).for_each(|(scale, &t)| *scale = of_tokens[t as usize]);
        }
    });
    Ok(())
}

/// I of permute: `dx_td = sum_j drows[row_of_slot[t, j]]`, or `+=` if `accumulate`.
pub fn permute_grad(s: &mut Stream, drows: Tensor, order: Order, dx: Tensor, accumulate: bool) -> Result<()> {
    gather_sum(s, "permute gradient", drows, None, order, accumulate.then_some(dx), dx)
}

/// F: `y_td = residual_td + sum_j weights[t, j] rows[row_of_slot[t, j]]`, summed from the residual on, if there is one, and rounded
/// once; in place where `residual` is `y`.
///
/// # Errors
/// If shapes or types differ, or `residual` shares a buffer with `y` without being it.
pub fn combine(
    s: &mut Stream,
    rows: Tensor,
    weights: Tensor,
    order: Order,
    residual: Option<Tensor>,
    y: Tensor,
) -> Result<()> {
    gather_sum(s, "combine", rows, Some(weights), order, residual, y)
}

fn gather_sum(
    s: &mut Stream,
    op: &'static str,
    rows: Tensor,
    weights: Option<Tensor>,
    order: Order,
    residual: Option<Tensor>,
    y: Tensor,
) -> Result<()> {
    let (n, t, d) = (rows.rows(), y.rows(), y.cols());
    let k = n / t.max(1);
    order.check(op, n)?;
    expect_tensor(op, "rows", rows, y.dtype, &[t * k, d])?;
    if let Some(weights) = weights {
        expect_tensor(op, "weights", weights, acc_dtype(y.dtype), &[t, k])?;
    }
    if let Some(residual) = residual {
        expect_residual(op, residual, y)?;
    }
    let reads: Vec<Tensor> = [rows, order.row_of_slot].into_iter().chain(weights).chain(residual).collect();
    let added = if residual.is_some() { t * d } else { 0 };
    s.account(combine_cost(t, k, d, y.dtype.size_bytes()).adding(added, y.dtype.size_bytes()));
    let kernels = |_: &Target| {
        (are_fast(&[rows, y])).then(|| match weights {
            Some(weights) => ptx::permute::combine(rows, weights, order, residual, y),
            None => ptx::permute::permute_grad(rows, order, y, residual.is_some()),
        })
    };
    s.launch_kernel(&reads, &[y], kernels, move |m| {
        with_float!(y.dtype, T => {
            type A = <T as Float>::Acc;
            let onto = residual.is_some();
            let residual = residual.filter(|r| *r != y).map(|r| m.read::<T>(r));
            let (rows, slots, mut y) = (m.read::<T>(rows), m.read::<u32>(order.row_of_slot), m.write::<T>(y));
            let weights = weights.map(|w| m.read::<A>(w));
            for_row_chunks(&mut y, d, #[inline(always)] |first, chunk| {
                for (t, y) in (first..).zip(chunk.chunks_exact_mut(d)) {
                    if let Some(residual) = &residual {
                        y.copy_from_slice(&residual[t * d..][..d]);
                    }
                    let weights = weights.as_ref().map(|w| &w[t * k..][..k]);
                    sum_rows(&rows, &slots[t * k..][..k], weights, y, onto);
                }
            });
        });
    });
    Ok(())
}

/// Columns summed at a time, in registers and the first-level cache.
const BLOCK: usize = 64;

#[inline(always)]
fn sum_rows<T: Float>(rows: &[T], slots: &[u32], weights: Option<&[T::Acc]>, y: &mut [T], accumulate: bool) {
    let d = y.len();
    for (b, y) in y.chunks_mut(BLOCK).enumerate() {
        let mut sums = [T::Acc::default(); BLOCK];
        if accumulate {
            sums.iter_mut().zip(&*y).for_each(|(sum, y)| *sum = y.to_acc());
        }
        for (j, &row) in slots.iter().enumerate() {
            let row = &rows[row as usize * d + b * BLOCK..][..y.len()];
            match weights {
                Some(w) => sums.iter_mut().zip(row).for_each(|(sum, x)| *sum += w[j] * x.to_acc()),
                None => sums.iter_mut().zip(row).for_each(|(sum, x)| *sum += x.to_acc()),
            }
        }
        y.iter_mut().zip(sums).for_each(|(y, sum)| *y = T::from_acc(sum));
    }
}

/// I of combine, from dy [t, d]: `drows[r] = weight of r * dy[token of r]` and `dweights[t, j] = <rows of (t, j), dy[t]>`.
pub fn combine_grad(
    s: &mut Stream,
    dy: Tensor,
    rows: Tensor,
    weights: Tensor,
    order: Order,
    drows: Tensor,
    dweights: Tensor,
) -> Result<()> {
    const OP: &str = "combine gradient";
    let (t, d, k) = (dy.rows(), dy.cols(), weights.cols());
    order.check(OP, t * k)?;
    expect_tensor(OP, "rows", rows, dy.dtype, &[t * k, d])?;
    expect_tensor(OP, "drows", drows, dy.dtype, &[t * k, d])?;
    expect_tensor(OP, "weights", weights, acc_dtype(dy.dtype), &[t, k])?;
    expect_tensor(OP, "dweights", dweights, acc_dtype(dy.dtype), &[t, k])?;
    let reads = [dy, rows, weights, order.row_of_slot, order.token_of_row];
    s.account(combine_cost(2 * t, k, d, dy.dtype.size_bytes()));
    let kernels = |_: &Target| {
        (are_fast(&[dy, rows, drows])).then(|| ptx::permute::combine_grad(dy, rows, weights, order, drows, dweights))
    };
    s.launch_kernel(&reads, &[drows, dweights], kernels, move |m| {
        with_float!(dy.dtype, T => {
            type A = <T as Float>::Acc;
            let (dy, rows, mut drows) = (m.read::<T>(dy), m.read::<T>(rows), m.write::<T>(drows));
            let (slots, tokens) = (m.read::<u32>(order.row_of_slot), m.read::<u32>(order.token_of_row));
            let (weights, mut dweights) = (m.read::<A>(weights), m.write::<A>(dweights));
            let mut weight_of_row = vec![A::of_f64(0.0); t * k];
            slots.iter().zip(weights.iter()).for_each(|(&row, &w)| weight_of_row[row as usize] = w);
            let mut dots = vec![A::of_f64(0.0); t * k];
            for_row_chunks2((&mut drows, d), (&mut dots, 1), #[inline(always)] |first, drows, dots| {
                for ((r, drow), out) in (first..).zip(drows.chunks_exact_mut(d)).zip(dots) {
                    let dy = &dy[tokens[r] as usize * d..][..d];
                    let weight = weight_of_row[r];
                    drow.iter_mut().zip(dy).for_each(|(o, g)| *o = T::from_acc(weight * g.to_acc()));
                    *out = dot(&rows[r * d..][..d], dy);
                }
            });
            dweights.iter_mut().zip(slots.iter()).for_each(|(w, &row)| *w = dots[row as usize]);
        });
    });
    Ok(())
}

/// Sixteen partial sums, always: as many as the widest registers hold, and the same result with narrower ones.
#[inline(always)]
fn dot<T: Float>(a: &[T], b: &[T]) -> T::Acc {
    const LANES: usize = 16;
    let mut sums = [T::Acc::default(); LANES];
    let (a_chunks, b_chunks) = (a.chunks_exact(LANES), b.chunks_exact(LANES));
    let rest = a_chunks.remainder().iter().zip(b_chunks.remainder());
    let rest: T::Acc = rest.map(|(a, b)| a.to_acc() * b.to_acc()).sum();
    for (a, b) in a_chunks.zip(b_chunks) {
        for ((sum, a), b) in sums.iter_mut().zip(a).zip(b) {
            *sum += a.to_acc() * b.to_acc();
        }
    }
    rest + sums.into_iter().sum()
}

/// Cost of permute or its gradient over n rows.
pub fn permute_cost(n: usize, d: usize, elem_bytes: usize) -> Cost {
    let bytes = (n * d * elem_bytes) as u64;
    Cost::stream((n * d) as u64, bytes, bytes)
}

/// Cost of permute into FP8, over n rows.
pub fn permute_tiles_cost(n: usize, d: usize, elem_bytes: usize) -> Cost {
    quantize::tiles_cost(n, d, elem_bytes)
}

/// Cost of combine without a residual; its gradient costs twice that.
pub fn combine_cost(t: usize, k: usize, d: usize, elem_bytes: usize) -> Cost {
    Cost::stream(2 * (t * k * d) as u64, (t * k * d * elem_bytes) as u64, (t * d * elem_bytes) as u64)
}

#[cfg(test)]
mod tests {
    #![expect(clippy::unwrap_used, reason = "tests")]
    use super::*;
    use crate::ops::testing::*;

    fn order(s: &Stream, n: usize, e: usize) -> Order {
        let alloc = |n| s.memory().alloc(DType::U32, &[n]);
        Order { offsets: alloc(e + 1), row_of_slot: alloc(n), token_of_row: alloc(n) }
    }

    fn sorted(s: &mut Stream, indices: &[u32], k: usize, e: usize) -> Order {
        let order = order(s, indices.len(), e);
        let indices = s.memory().from_slice(&[indices.len() / k, k], indices);
        sort(s, indices, order).unwrap();
        order
    }

    /// Slots of 6 tokens over 4 experts; expert 1 gets none.
    const INDICES: [u32; 12] = [3, 0, 0, 2, 3, 2, 2, 0, 0, 3, 3, 0];

    #[test]
    fn rows_are_sorted_by_expert_then_token() {
        let mut s = stream();
        let o = sorted(&mut s, &INDICES, 2, 4);
        s.synchronize().unwrap();
        let m = s.memory();
        assert_eq!(m.download::<u32>(o.offsets), [0, 5, 5, 8, 12]);
        assert_eq!(m.download::<u32>(o.token_of_row), [0, 1, 3, 4, 5, 1, 2, 3, 0, 2, 4, 5]);
        assert_eq!(m.download::<u32>(o.row_of_slot), [8, 0, 1, 5, 9, 6, 7, 2, 3, 10, 11, 4]);
    }

    #[test]
    fn one_expert_may_take_everything() {
        let mut s = stream();
        let o = sorted(&mut s, &[1; 5], 1, 3);
        s.synchronize().unwrap();
        assert_eq!(s.memory().download::<u32>(o.offsets), [0, 0, 5, 5]);
        assert_eq!(s.memory().download::<u32>(o.row_of_slot), [0, 1, 2, 3, 4]);
    }

    #[test]
    fn an_expert_that_does_not_exist_is_refused() {
        let mut s = stream();
        sorted(&mut s, &[0, 1, 2, 4], 2, 4);
        assert!(s.synchronize().unwrap_err().to_string().contains("token 1 goes to expert 4 of 4"));
    }

    #[test]
    fn permute_then_combine_is_the_weighted_sum() {
        // 1000 x 70: more than one chunk of the thread pool and a last block of columns that is not full.
        let (t, k, e, d) = (1000, 3, 7, 70);
        let mut s = stream();
        let m = s.memory().clone();
        let indices: Vec<u32> = (0..t * k).map(|i| (i * i % e) as u32).collect();
        let o = sorted(&mut s, &indices, k, e);
        let (x_td, w_tk) = (random(t * d, 1), random(t * k, 2));
        let (x, w) = (m.from_slice(&[t, d], &x_td), m.from_slice(&[t, k], &w_tk));
        let rows = m.alloc(DType::F64, &[t * k, d]);
        permute(&mut s, x, o, rows).unwrap();
        let want: Vec<f64> = (0..t * d).map(|i| 1.0 + x_td[i] * w_tk[i / d * k..][..k].iter().sum::<f64>()).collect();
        for in_place in [true, false] {
            let residual = m.from_slice(&[t, d], &vec![1.0f64; t * d]);
            let y = if in_place { residual } else { m.from_slice(&[t, d], &vec![f64::NAN; t * d]) };
            combine(&mut s, rows, w, o, Some(residual), y).unwrap();
            s.synchronize().unwrap();
            assert_close(&m.download::<f64>(y), &want, 1e-12);
            assert!(in_place || m.download::<f64>(residual).iter().all(|x| *x == 1.0));
        }
        let (rows, offsets) = (m.download::<f64>(rows), m.download::<u32>(o.offsets));
        for i in 0..t * k {
            let (row, expert) = (m.download::<u32>(o.row_of_slot)[i], indices[i] as usize);
            assert!((offsets[expert]..offsets[expert + 1]).contains(&row));
            assert_eq!(rows[row as usize * d], x_td[i / k * d]);
            if i > 50 {
                break;
            }
        }
    }

    #[test]
    fn gradients_match_finite_differences() {
        let (t, k, d) = (6, 2, 5);
        for onto in [false, true] {
            check_gradients(
                &[(&[t, d], 1), (&[t, k], 2), (&[t, d], 3)],
                &[t, d],
                |s, x| {
                    let o = sorted(s, &INDICES, k, 4);
                    let (rows, y) = (s.memory().alloc(DType::F64, &[t * k, d]), s.memory().alloc(DType::F64, &[t, d]));
                    permute(s, x[0], o, rows)?;
                    combine(s, rows, x[1], o, onto.then_some(x[2]), y)?;
                    Ok(y)
                },
                |s, x, dy, dx| {
                    let o = sorted(s, &INDICES, k, 4);
                    let alloc = || s.memory().alloc(DType::F64, &[t * k, d]);
                    let (rows, drows) = (alloc(), alloc());
                    permute(s, x[0], o, rows)?;
                    combine_grad(s, dy, rows, x[1], o, drows, dx[1])?;
                    if onto {
                        crate::ops::elementwise::copy(s, dy, dx[2])?;
                    }
                    permute_grad(s, drows, o, dx[0], onto)
                },
            );
        }
    }

    #[test]
    fn bf16_rows_are_summed_in_f32_and_rounded_once() {
        let mut s = stream();
        let m = s.memory().clone();
        let o = sorted(&mut s, &[1, 0, 2], 3, 3);
        let bf = half::bf16::from_f32;
        let rows = m.from_slice(&[3, 1], &[bf(1.0), bf(256.0), bf(1.0)]);
        let w = m.from_slice(&[1, 3], &[1f32, 1.0, 1.0]);
        let y = m.alloc(DType::Bf16, &[1, 1]);
        combine(&mut s, rows, w, o, None, y).unwrap();
        s.synchronize().unwrap();
        // 256 + 1 rounds to 256 in bf16; 258 is a bf16.
        assert_eq!(m.download::<half::bf16>(y), [bf(258.0)]);
    }

    #[test]
    fn contracts_are_checked() {
        let mut s = stream();
        let m = s.memory().clone();
        let o = order(&s, 6, 4);
        let (x, rows, y) = (m.alloc(DType::F32, &[3, 4]), m.alloc(DType::F32, &[6, 4]), m.alloc(DType::F32, &[3, 4]));
        let wrong = m.alloc(DType::F32, &[5, 4]);
        let error = permute(&mut s, x, o, wrong).unwrap_err().to_string();
        assert!(error.contains("`rows` should be F32 of [6, 4]"), "{error}");
        let weights = m.alloc(DType::Bf16, &[3, 2]);
        let error = combine(&mut s, rows, weights, o, None, y).unwrap_err().to_string();
        assert!(error.contains("`weights` should be F32 of [3, 2]"), "{error}");
        let (weights, both) = (m.alloc(DType::F32, &[3, 2]), m.alloc(DType::F32, &[6, 4]));
        let [upper, lower] = [0, 12].map(|first| both.slice(first, 12).reshape(&[3, 4]));
        let error = combine(&mut s, rows, weights, o, Some(upper), lower).unwrap_err().to_string();
        assert!(
            error.contains("`residual` should be F32 of [3, 4], the output itself or in another buffer"),
            "{error}"
        );
    }

    #[test]
    fn tiles_are_those_of_the_permuted_rows() {
        let (t, k, e, d) = (200, 3, 7, 300);
        let mut s = stream();
        let m = s.memory().clone();
        let indices: Vec<u32> = (0..t * k).map(|i| (i * i % e) as u32).collect();
        let o = sorted(&mut s, &indices, k, e);
        let (x, rows) = (m.from_slice(&[t, d], &random_bf16(t * d, 1)), m.alloc(DType::Bf16, &[t * k, d]));
        permute(&mut s, x, o, rows).unwrap();
        for scaling in [Scaling::Real, Scaling::PowerOfTwo] {
            let [want, got] = [(); 2].map(|()| poisoned_tiles(&m, t * k, d));
            quantize::tiles(&mut s, rows, want, scaling).unwrap();
            permute_tiles(&mut s, x, o, got, scaling).unwrap();
            s.synchronize().unwrap();
            assert_same_tiles(&m, got, want);
        }
    }
}
