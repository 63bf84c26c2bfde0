//! Token embedding: F: y_td = w_vd\[token_t\]; W: dw_vd\[token_t\] += dy_td. Tokens have no gradient, so there is no I.

use rayon::prelude::*;

use crate::{
    cost::Cost,
    device::Target,
    dtype::Float,
    error::Result,
    ops::{are_fast, expect_shape, parallel::for_row_chunks},
    ptx,
    simd::vectorize,
    stream::Stream,
    tensor::Tensor,
    with_float,
};

/// F: rows of `w` [v, d] chosen by `tokens` u32 \[t\] -> `y` [t, d]. A token of v or more fails the task.
pub fn forward(s: &mut Stream, tokens: Tensor, w: Tensor, y: Tensor) -> Result<()> {
    let (t, v, d) = (tokens.len(), w.dim(0), w.dim(1));
    expect_shape("embedding", "y", y, &[t, d])?;
    s.account(cost(t, d, w.dtype.size_bytes()));
    let kernels = |_: &Target| are_fast(&[w, y]).then(|| ptx::embedding::forward(tokens, w, y));
    s.launch_kernel(&[tokens, w], &[y], kernels, move |m| {
        with_float!(w.dtype, T => {
            let (tokens, w, mut y) = (m.read::<u32>(tokens), m.read::<T>(w), m.write::<T>(y));
            expect_tokens(&tokens, v);
            for_row_chunks(&mut y, d, #[inline(always)] |first, rows| {
                for (row, &token) in rows.chunks_exact_mut(d).zip(&tokens[first..]) {
                    let at = token as usize * d;
                    row.copy_from_slice(&w[at..at + d]);
                }
            });
        });
    });
    Ok(())
}

/// W: `dw` [v, d] += `dy` [t, d] at the rows of `tokens`, in token order. A token of v or more fails the task.
pub fn weight_grad(s: &mut Stream, tokens: Tensor, dy: Tensor, dw: Tensor) -> Result<()> {
    let (t, v, d) = (tokens.len(), dw.dim(0), dw.dim(1));
    expect_shape("embedding gradient", "dy", dy, &[t, d])?;
    s.account(cost(t, d, dw.dtype.size_bytes()));
    let kernels = |_: &Target| are_fast(&[dy, dw]).then(|| ptx::embedding::weight_grad(tokens, dy, dw));
    s.launch_kernel(&[tokens, dy], &[dw], kernels, move |m| {
        with_float!(dw.dtype, T => {
            let tokens = m.read::<u32>(tokens);
            expect_tokens(&tokens, v);
            scatter_add::<T>(&tokens, &m.read::<T>(dy), &mut m.write::<T>(dw), d);
        });
    });
    Ok(())
}

fn expect_tokens(tokens: &[u32], v: usize) {
    if let Some(at) = tokens.iter().position(|&token| token as usize >= v) {
        panic!("{}", no_such_token(at, tokens[at], v));
    }
}

/// What is said of a token without a row.
pub(crate) fn no_such_token(position: usize, token: u32, v: usize) -> String {
    format!("expected tokens below the vocabulary of {v}, found {token} at position {position}")
}

fn scatter_add<T: Float>(tokens: &[u32], dy: &[T], dw: &mut [T], d: usize) {
    // Bands of the vocabulary: each band is one thread's, so the order of additions is the order of tokens.
    const BAND: usize = 256;
    dw.par_chunks_mut(BAND * d).enumerate().for_each(|(band, rows)| {
        vectorize(
            #[inline(always)]
            || {
                let first = band * BAND;
                for (&token, dy) in tokens.iter().zip(dy.chunks_exact(d)) {
                    let Some(row) = (token as usize).checked_sub(first).filter(|r| r * d < rows.len()) else {
                        continue;
                    };
                    for (sum, &x) in rows[row * d..(row + 1) * d].iter_mut().zip(dy) {
                        *sum = T::from_acc(sum.to_acc() + x.to_acc());
                    }
                }
            },
        );
    });
}

/// Cost of either pass over `t` tokens.
pub fn cost(t: usize, d: usize, elem_bytes: usize) -> Cost {
    let bytes = (t * d * elem_bytes) as u64;
    Cost::stream(0, bytes, bytes)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{dtype::DType, ops::testing::*};

    #[test]
    fn gradient_matches_finite_differences_with_repeated_tokens() {
        let (v, d) = (600, 2);
        let ids = [3u32, 599, 3, 0];
        check_gradients(
            &[(&[v, d], 1)],
            &[4, d],
            |s, x| {
                let tokens = s.memory().from_slice(&[4], &ids);
                let y = s.memory().alloc(DType::F64, &[4, d]);
                forward(s, tokens, x[0], y)?;
                Ok(y)
            },
            |s, _, dy, dx| {
                let tokens = s.memory().from_slice(&[4], &ids);
                weight_grad(s, tokens, dy, dx[0])
            },
        );
    }
}
