//! What is done to logits before a token is chosen from them, and what is told of them afterwards, row by row.
//!
//! [`adjust`] changes them as a request asks, in the order of Hugging Face's generation and of vLLM: biases are added; logits of
//! tokens that occurred are divided by the repetition penalty if positive, else multiplied (CTRL, arXiv 1909.05858, section 4.1);
//! penalties for what was generated are taken off; what is not allowed becomes minus infinity. Amounts that lead past the range of
//! floats end at its end. [`logprobs`] reports what the model
//! itself thought, so it reads logits that were not adjusted: give `adjust` another tensor to write to where both are wanted.
//!
//! Both touch a row for those requests only that ask, and each row by itself. Neither has kernels for GPUs yet: there they run on
//! copies, on the host.

use std::sync::Arc;

use rayon::prelude::*;

use crate::{
    cost::Cost,
    dtype::{DType, Float, Real},
    error::{Error, Result},
    ops::{
        expect::{expect_tensor, expect_that},
        sampling::{argmax, unusable_logits},
    },
    simd::vectorize,
    stream::Stream,
    tensor::Tensor,
    with_float,
};

/// What is changed in one row of logits.
#[derive(Clone, Debug, PartialEq)]
pub struct Adjust {
    /// Added, by token. A token that comes twice gets both.
    pub bias: Arc<[(u32, f64)]>,
    /// Divides positive logits of `occurred`, multiplies the others; above 0, 1 for none.
    pub repetition_penalty: f64,
    /// Tokens that occurred, ascending, each once.
    pub occurred: Arc<[u32]>,
    /// Added after that, by token, each once: see [`penalties`].
    pub additions: Arc<[(u32, f64)]>,
    /// Bit i of word w is set where token 32 w + i may come; a word for each 32 tokens of the vocabulary. `None` allows all.
    pub allowed: Option<Arc<[u32]>>,
}

impl Default for Adjust {
    fn default() -> Self {
        let (bias, occurred) = (Arc::default(), Arc::default());
        Adjust { bias, repetition_penalty: 1.0, occurred, additions: Arc::default(), allowed: None }
    }
}

impl Adjust {
    /// Whether the row stays as it is.
    pub fn is_none(&self) -> bool {
        let no_penalty = self.repetition_penalty == 1.0 || self.occurred.is_empty();
        no_penalty && self.bias.is_empty() && self.additions.is_empty() && self.allowed.is_none()
    }

    /// What is wrong with it, for a vocabulary of v.
    fn fault(&self, v: usize) -> Option<String> {
        let penalty = self.repetition_penalty;
        if !(penalty > 0.0 && penalty.is_finite()) {
            return Some(format!("a finite repetition penalty above 0, found {penalty}"));
        }
        for (name, list) in [("bias", &self.bias), ("addition", &self.additions)] {
            if let Some((token, amount)) = list.iter().find(|(_, amount)| !amount.is_finite()) {
                return Some(format!("a finite {name} of token {token}, found {amount}"));
            }
        }
        let named = self.bias.iter().chain(self.additions.iter()).map(|(token, _)| token).chain(self.occurred.iter());
        if let Some(token) = named.copied().find(|&token| token as usize >= v) {
            return Some(format!("tokens below {v}, the size of the vocabulary, found {token}"));
        }
        if !self.occurred.is_sorted_by(|a, b| a < b) {
            return Some("tokens that occurred in ascending order, each once".into());
        }
        let allowed = self.allowed.as_ref()?;
        if allowed.len() != v.div_ceil(32) {
            return Some(format!("{} words of allowed tokens, found {}", v.div_ceil(32), allowed.len()));
        }
        (0..v).all(|token| !is_allowed(allowed, token)).then(|| "at least one allowed token, found none".into())
    }

    fn apply<T: Float>(&self, logits: &mut [T], row: usize) {
        // What is forbidden would hide it.
        if logits.iter().any(|x| x.as_f64().is_nan()) {
            unusable_logits(row, f64::NAN).raise();
        }
        let penalty = self.repetition_penalty;
        add(logits, &self.bias);
        for &token in self.occurred.iter() {
            change(&mut logits[token as usize], |x| if x > 0.0 { x / penalty } else { x * penalty });
        }
        add(logits, &self.additions);
        if let Some(allowed) = &self.allowed {
            for (tokens, word) in logits.chunks_mut(32).zip(allowed.iter()) {
                for (i, x) in tokens.iter_mut().enumerate() {
                    if word >> i & 1 == 0 {
                        *x = T::of_f64(f64::NEG_INFINITY);
                    }
                }
            }
        }
    }
}

fn is_allowed(allowed: &[u32], token: usize) -> bool {
    allowed[token / 32] >> (token % 32) & 1 == 1
}

fn add<T: Float>(logits: &mut [T], additions: &[(u32, f64)]) {
    for &(token, amount) in additions {
        change(&mut logits[token as usize], |x| x + amount);
    }
}

/// Rounds once, and to a finite number: a request's amounts, however large, leave a row that can be chosen from.
fn change<T: Float>(x: &mut T, f: impl FnOnce(f64) -> f64) {
    let most = <T::Acc as num_traits::Float>::max_value().as_f64();
    if x.as_f64().is_finite() {
        *x = T::of_f64(f(x.as_f64()).clamp(-most, most));
    }
}

/// The additions that penalize tokens by how often each was generated (`counts`, in any order, each token once): minus `presence`
/// once and minus `frequency` for each time. Source: OpenAI's API, frequency and presence penalties.
pub fn penalties(counts: impl IntoIterator<Item = (u32, u32)>, presence: f64, frequency: f64) -> Vec<(u32, f64)> {
    if presence == 0.0 && frequency == 0.0 {
        return Vec::new();
    }
    let generated = counts.into_iter().filter(|(_, count)| *count > 0);
    generated.map(|(token, count)| (token, -presence - f64::from(count) * frequency)).collect()
}

/// Assigns to `out` the logits [n, v], F32 or F64, with row i changed by `rows[i]`; `out` is `logits` itself, of which only rows
/// that change are touched, or a tensor like it in another buffer. A row to change that has NaN fails the stream with
/// [`Error::NotFinite`].
///
/// # Errors
/// If shapes or types differ, or a row's changes name unknown tokens, have numbers that are not finite, or allow nothing.
pub fn adjust(s: &mut Stream, logits: Tensor, rows: &[Adjust], out: Tensor) -> Result<()> {
    const OP: &str = "adjusting logits";
    let (n, v) = (logits.rows(), logits.cols());
    expect_logits(OP, logits, rows.len())?;
    let is_alike = (out.dtype, out.shape) == (logits.dtype, logits.shape);
    expect_that(OP, "out", out, is_alike && (out == logits || out.buffer != logits.buffer), || {
        format!("{:?} of {:?}, the logits themselves or in another buffer", logits.dtype, logits.shape)
    })?;
    for (row, adjust) in rows.iter().enumerate() {
        if let Some(fault) = adjust.fault(v) {
            return Err(Error::Shape {
                op: OP,
                role: "logits",
                expected: format!("in row {row} {fault}"),
                found: logits,
            });
        }
    }
    let num_changed = rows.iter().filter(|adjust| !adjust.is_none()).count();
    let in_place = out == logits;
    if in_place && num_changed == 0 {
        return Ok(());
    }
    let touched = if in_place { num_changed } else { n };
    let bytes = (touched * v * logits.dtype.size_bytes()) as u64;
    s.account(Cost::stream((num_changed * v) as u64, bytes, bytes));
    let reads: &[Tensor] = if in_place { &[] } else { &[logits] };
    let rows = rows.to_vec();
    s.launch(reads, &[out], move |m| {
        with_float!(logits.dtype, T => {
            let mut out = m.write::<T>(out);
            if !in_place {
                out.copy_from_slice(&m.read::<T>(logits));
            }
            let changed = out.par_chunks_exact_mut(v).zip(&rows).enumerate().filter(|(_, (_, adjust))| !adjust.is_none());
            changed.for_each(|(row, (logits, adjust))| adjust.apply(logits, row));
        });
    });
    Ok(())
}

/// What [`logprobs`] assigns; where a row asks for less, the rest stays as it was.
#[derive(Clone, Copy, Debug)]
pub struct Logprobs {
    /// Log-probability of the row's own token, in nats, of the logits' type \[n\].
    pub token: Tensor,
    /// The most likely tokens, most likely first, of equal ones the lower first, U32 [n, k].
    pub top_ids: Tensor,
    /// Their log-probabilities, of the logits' type [n, k].
    pub top: Tensor,
}

/// Assigns log-softmax of logits [n, v], F32 or F64, at the tokens, U32 \[n\], and at the `rows[i]` most likely ones of row i, at most
/// k; a row with `None` is left alone. A row with NaN, with infinity, or with nothing above minus infinity fails the stream with
/// [`Error::NotFinite`].
///
/// # Errors
/// If shapes or types differ, or a row asks for more than k or v tokens.
pub fn logprobs(s: &mut Stream, logits: Tensor, tokens: Tensor, rows: &[Option<usize>], out: Logprobs) -> Result<()> {
    const OP: &str = "logprobs";
    let (n, v, k) = (logits.rows(), logits.cols(), out.top.cols());
    expect_logits(OP, logits, rows.len())?;
    expect_tensor(OP, "tokens", tokens, DType::U32, &[n])?;
    expect_tensor(OP, "token", out.token, logits.dtype, &[n])?;
    expect_tensor(OP, "top_ids", out.top_ids, DType::U32, &[n, k])?;
    expect_tensor(OP, "top", out.top, logits.dtype, &[n, k])?;
    let most = rows.iter().copied().flatten().max().unwrap_or(0);
    expect_that(OP, "top", out.top, most <= k, || format!("of at least {most} columns, as many as a row asks for"))?;
    expect_that(OP, "logits", logits, most <= v, || format!("of at least {most} tokens, as many as a row asks for"))?;
    let asking: Vec<(usize, usize)> = rows.iter().enumerate().filter_map(|(row, top)| Some((row, (*top)?))).collect();
    if asking.is_empty() {
        return Ok(());
    }
    let elem_bytes = logits.dtype.size_bytes();
    let read = (asking.len() * v * elem_bytes) as u64;
    let written: usize = asking.iter().map(|(_, top)| elem_bytes + top * (elem_bytes + 4)).sum();
    s.account(Cost::stream(4 * (asking.len() * v) as u64, read, written as u64));
    let writes = [out.token, out.top_ids, out.top];
    s.launch(&[logits, tokens], &writes, move |m| {
        with_float!(logits.dtype, T => {
            let (x, tokens) = (m.read::<T>(logits), m.read::<u32>(tokens));
            let of_row = |&(row, top): &(usize, usize)| log_softmax(&x[row * v..][..v], row, tokens[row], top);
            let told: Vec<(T, Vec<(T, u32)>)> = asking.par_iter().map(of_row).collect();
            let (mut token, mut ids, mut values) =
                (m.write::<T>(out.token), m.write::<u32>(out.top_ids), m.write::<T>(out.top));
            for (&(row, _), (own, top)) in asking.iter().zip(told) {
                token[row] = own;
                for (i, (value, id)) in top.into_iter().enumerate() {
                    (values[row * k + i], ids[row * k + i]) = (value, id);
                }
            }
        });
    });
    Ok(())
}

fn expect_logits(op: &'static str, logits: Tensor, num_rows: usize) -> Result<()> {
    let holds = matches!(logits.dtype, DType::F32 | DType::F64) && logits.rows() == num_rows && logits.cols() > 0;
    expect_that(op, "logits", logits, holds, || format!("F32 or F64 in {num_rows} rows of tokens"))
}

/// Log-probabilities of the row's token, and of the `top` most likely ones with their ids.
fn log_softmax<T: Float>(logits: &[T], row: usize, token: u32, top: usize) -> (T, Vec<(T, u32)>) {
    let log_sum = log_sum_exp(logits, row);
    let value = |x: f64| T::of_f64(x - log_sum);
    let Some(own) = logits.get(token as usize) else {
        panic!("expected tokens below {}, the size of the vocabulary, found {token} in row {row}", logits.len());
    };
    (value(own.as_f64()), largest(logits, top).into_iter().map(|(x, id)| (value(x), id)).collect())
}

/// ln sum exp, summed in f64.
fn log_sum_exp<T: Float>(logits: &[T], row: usize) -> f64 {
    const LANES: usize = 16;
    let (_, shift) = argmax(logits, row);
    let sums = vectorize(
        #[inline(always)]
        || {
            let mut sums = [0.0f64; LANES];
            for chunk in logits.chunks(LANES) {
                for (sum, x) in sums.iter_mut().zip(chunk) {
                    *sum += (x.to_acc() - shift).exp_fast().as_f64();
                }
            }
            sums
        },
    );
    shift.as_f64() + sums.iter().sum::<f64>().ln()
}

/// The `k` largest and where they are, largest first, of equal ones the earlier first.
fn largest<T: Float>(logits: &[T], k: usize) -> Vec<(f64, u32)> {
    let mut best: Vec<(f64, u32)> = Vec::with_capacity(k + 1);
    for (id, x) in (0..).zip(logits) {
        let x = x.as_f64();
        if best.len() < k || best.last().is_some_and(|(least, _)| x > *least) {
            best.insert(best.partition_point(|(y, _)| *y >= x), (x, id));
            best.truncate(k);
        }
    }
    best
}

#[cfg(test)]
mod tests;
