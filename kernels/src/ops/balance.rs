//! Keeping experts evenly loaded: two small losses, and the correction bias that does most of the work without one.
//!
//! - Sequence-wise loss (DeepSeek-V3 technical report, Eq 17 to 20), per sequence of T tokens: L = alpha sum_i f_i P_i with
//!   f_i = e / (k T) times the slots that went to expert i, and P_i the mean over tokens of s_i / sum_j s_j. f has no gradient.
//! - Router z-loss (ST-MoE): coef times the mean over tokens of logsumexp(logits)^2.
//! - Bias update (Wang et al., 2408.15664): after a step, b_i += speed if expert i got fewer slots than the mean, -= speed if
//!   more. The load is that of the whole batch, so counts are added over microbatches (and ranks) first.
//!
//! Losses are averages over what a call is given and are added to `loss`; `scale` on the gradients is what the training loss
//! multiplies them with, such as one over the number of microbatches.

use rayon::prelude::*;

use crate::{
    cost::Cost,
    device::Target,
    dtype::{DType, Float, Real},
    error::Result,
    ops::{
        expect::{expect_tensor, expect_that},
        gate::softmax,
        parallel::for_row_chunks,
        permute::no_such_expert,
    },
    ptx,
    stream::Stream,
    tensor::Tensor,
    with_float,
};

const EPSILON: f64 = 1e-20;

/// The sequence-wise loss.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct SequenceLoss {
    /// Factor (V3: 1e-4).
    pub alpha: f64,
    /// Tokens in a sequence; sequences lie one after the other.
    pub row_len: usize,
}

impl SequenceLoss {
    fn check(self, op: &'static str, scores: Tensor, indices: Tensor) -> Result<()> {
        let (t, k) = (scores.rows(), indices.cols());
        expect_real(op, "scores", scores)?;
        expect_tensor(op, "indices", indices, DType::U32, &[t, k])?;
        expect_that(op, "scores", scores, self.row_len > 0 && t.is_multiple_of(self.row_len), || {
            format!("whole sequences of {} tokens", self.row_len)
        })
    }

    /// f_i of one sequence.
    fn load<A: Real>(self, indices: &[u32], k: usize, e: usize) -> Vec<A> {
        let mut counts = vec![0u32; e];
        indices.iter().for_each(|&i| counts[i as usize] += 1);
        let factor = e as f64 / (k * self.row_len) as f64;
        counts.iter().map(|&c| A::of_f64(f64::from(c) * factor)).collect()
    }
}

fn expect_experts(indices: &[u32], k: usize, e: usize) {
    if let Some(slot) = indices.iter().position(|&i| i as usize >= e) {
        panic!("{}", no_such_expert(slot / k, indices[slot], e));
    }
}

fn expect_real(op: &'static str, role: &'static str, tensor: Tensor) -> Result<()> {
    expect_that(op, role, tensor, matches!(tensor.dtype, DType::F32 | DType::F64), || "F32 or F64".into())
}

fn dot<A: Real>(a: &[A], b: &[A]) -> A {
    a.iter().zip(b).map(|(&a, &b)| a * b).sum()
}

fn add_to_loss(m: &crate::memory::Memory, loss: Tensor, value: f64) {
    with_float!(loss.dtype, L => {
        let mut loss = m.write::<L>(loss);
        loss[0] = L::of_f64(loss[0].as_f64() + value);
    });
}

/// F: `loss += mean over sequences of L`, from the gate's scores [t, e] and indices [t, k]; loss is F32 or F64 of one element.
pub fn sequence_loss(s: &mut Stream, l: SequenceLoss, scores: Tensor, indices: Tensor, loss: Tensor) -> Result<()> {
    const OP: &str = "sequence balance loss";
    l.check(OP, scores, indices)?;
    expect_real(OP, "loss", loss)?;
    expect_tensor(OP, "loss", loss, loss.dtype, &[1])?;
    let (e, k) = (scores.cols(), indices.cols());
    let kernels =
        |_: &Target| (scores.dtype == DType::F32).then(|| ptx::balance::sequence_loss(l, scores, indices, loss));
    s.launch_kernel(&[scores, indices, loss], &[loss], kernels, move |m| {
        let value = with_float!(scores.dtype, T => {
            let (s, ix) = (m.read::<<T as Float>::Acc>(scores), m.read::<u32>(indices));
            expect_experts(&ix, k, e);
            // Per sequence, then in order: the sum is the same on any number of threads.
            let sequences: Vec<f64> = s
                .par_chunks(l.row_len * e)
                .zip(ix.par_chunks(l.row_len * k))
                .map(|(s, ix)| {
                    let f = l.load(ix, k, e);
                    s.chunks_exact(e).map(|s| (dot(&f, s) / token_sum(s)).as_f64()).sum::<f64>()
                })
                .collect();
            sequences.iter().sum::<f64>()
        });
        add_to_loss(m, loss, l.alpha * value / scores.rows().max(1) as f64);
    });
    Ok(())
}

fn token_sum<A: Real>(s: &[A]) -> A {
    s.iter().copied().sum::<A>() + A::of_f64(EPSILON)
}

/// I: `dscores = scale * d loss / d scores`, [t, e]; give it to [`crate::ops::gate::input_grad`].
pub fn sequence_loss_grad(
    s: &mut Stream,
    l: SequenceLoss,
    scale: f64,
    scores: Tensor,
    indices: Tensor,
    dscores: Tensor,
) -> Result<()> {
    const OP: &str = "sequence balance loss gradient";
    l.check(OP, scores, indices)?;
    let (t, e, k) = (scores.rows(), scores.cols(), indices.cols());
    expect_tensor(OP, "dscores", dscores, scores.dtype, &[t, e])?;
    let kernels = |_: &Target| {
        (scores.dtype == DType::F32).then(|| ptx::balance::sequence_loss_grad(l, scale, scores, indices, dscores))
    };
    s.launch_kernel(&[scores, indices], &[dscores], kernels, move |m| {
        with_float!(scores.dtype, T => {
            type A = <T as Float>::Acc;
            let (s, ix, mut ds) = (m.read::<A>(scores), m.read::<u32>(indices), m.write::<A>(dscores));
            expect_experts(&ix, k, e);
            let factor = A::of_f64(l.alpha * scale / t.max(1) as f64);
            ds.par_chunks_mut(l.row_len * e)
                .zip(s.par_chunks(l.row_len * e))
                .zip(ix.par_chunks(l.row_len * k))
                .for_each(|((ds, s), ix)| {
                    let f = l.load(ix, k, e);
                    for (ds, s) in ds.chunks_exact_mut(e).zip(s.chunks_exact(e)) {
                        let sum = token_sum(s);
                        let mean = dot(&f, s) / sum;
                        ds.iter_mut().zip(&f).for_each(|(d, &f)| *d = factor * (f - mean) / sum);
                    }
                });
        });
    });
    Ok(())
}

/// logsumexp, and the softmax in `p`.
fn logsumexp<A: Real>(x: &[A], p: &mut [A]) -> A {
    softmax(x, p);
    // At the largest, p = e^(x - lse).
    let (x, p) = x.iter().zip(&*p).fold((A::neg_infinity(), A::one()), |m, (&x, &p)| if x > m.0 { (x, p) } else { m });
    x - p.ln()
}

/// F: `loss += coef * mean over tokens of logsumexp(logits_te)^2`; loss is F32 or F64 of one element.
pub fn z_loss(s: &mut Stream, coef: f64, logits: Tensor, loss: Tensor) -> Result<()> {
    const OP: &str = "router z-loss";
    expect_real(OP, "logits", logits)?;
    expect_real(OP, "loss", loss)?;
    expect_tensor(OP, "loss", loss, loss.dtype, &[1])?;
    let (t, e) = (logits.rows(), logits.cols());
    let kernels = |_: &Target| (logits.dtype == DType::F32).then(|| ptx::balance::z_loss(coef, logits, loss));
    s.launch_kernel(&[logits, loss], &[loss], kernels, move |m| {
        let value = with_float!(logits.dtype, T => {
            let x = m.read::<<T as Float>::Acc>(logits);
            let mut p = vec![<T as Float>::Acc::of_f64(0.0); e];
            x.chunks_exact(e).map(|x| logsumexp(x, &mut p).as_f64().powi(2)).sum::<f64>()
        });
        add_to_loss(m, loss, coef * value / t.max(1) as f64);
    });
    Ok(())
}

/// I: `dlogits += scale * d z-loss / d logits`, [t, e]; after [`crate::ops::gate::input_grad`], which assigns.
pub fn z_loss_grad_acc(s: &mut Stream, coef: f64, scale: f64, logits: Tensor, dlogits: Tensor) -> Result<()> {
    const OP: &str = "router z-loss gradient";
    let (t, e) = (logits.rows(), logits.cols());
    expect_real(OP, "logits", logits)?;
    expect_tensor(OP, "dlogits", dlogits, logits.dtype, &[t, e])?;
    let kernels =
        |_: &Target| (logits.dtype == DType::F32).then(|| ptx::balance::z_loss_grad_acc(coef, scale, logits, dlogits));
    s.launch_kernel(&[logits, dlogits], &[dlogits], kernels, move |m| {
        with_float!(logits.dtype, T => {
            type A = <T as Float>::Acc;
            let (x, mut dx) = (m.read::<A>(logits), m.write::<A>(dlogits));
            let factor = 2.0 * coef * scale / t.max(1) as f64;
            for_row_chunks(&mut dx, e, #[inline(always)] |first, chunk| {
                let mut p = vec![A::of_f64(0.0); e];
                for (t, dx) in (first..).zip(chunk.chunks_exact_mut(e)) {
                    let g = A::of_f64(factor) * logsumexp(&x[t * e..][..e], &mut p);
                    dx.iter_mut().zip(&p).for_each(|(d, &p)| *d += g * p);
                }
            });
        });
    });
    Ok(())
}

/// `total_e += counts_e`, U32; fails the stream where a sum leaves u32.
pub fn accumulate_counts(s: &mut Stream, counts: Tensor, total: Tensor) -> Result<()> {
    let e = counts.len();
    expect_tensor("accumulate counts", "counts", counts, DType::U32, &[e])?;
    expect_tensor("accumulate counts", "total", total, DType::U32, &[e])?;
    let kernels = |_: &Target| Some(ptx::balance::accumulate_counts(counts, total));
    s.launch_kernel(&[counts, total], &[total], kernels, move |m| {
        for (i, (total, &count)) in m.write::<u32>(total).iter_mut().zip(m.read::<u32>(counts).iter()).enumerate() {
            *total = total.checked_add(count).unwrap_or_else(|| panic!("{}", too_many(i)));
        }
    });
    Ok(())
}

/// What is said of a count past u32.
pub(crate) fn too_many(expert: usize) -> String {
    format!("expert {expert} was counted more often than u32 holds: zero the counts after each bias update")
}

/// `bias_e += speed` where counts_e is below the mean, `-= speed` where above, unchanged where equal. U32 and F32.
pub fn bias_update(s: &mut Stream, counts: Tensor, speed: f32, bias: Tensor) -> Result<()> {
    let e = counts.len();
    expect_tensor("bias update", "counts", counts, DType::U32, &[e])?;
    expect_tensor("bias update", "bias", bias, DType::F32, &[e])?;
    let kernels = |_: &Target| Some(ptx::balance::bias_update(counts, speed, bias));
    s.launch_kernel(&[counts, bias], &[bias], kernels, move |m| {
        let counts = m.read::<u32>(counts);
        let total: u64 = counts.iter().map(|&c| u64::from(c)).sum();
        for (bias, &count) in m.write::<f32>(bias).iter_mut().zip(counts.iter()) {
            // count < total / e, without rounding.
            match (u64::from(count) * e as u64).cmp(&total) {
                std::cmp::Ordering::Less => *bias += speed,
                std::cmp::Ordering::Equal => {}
                std::cmp::Ordering::Greater => *bias -= speed,
            }
        }
    });
    Ok(())
}

/// Load violation: how far the busiest expert is above the mean, as a fraction of it; 0 is balance, 0 also for no load.
pub fn max_vio<T: Copy + Into<u64>>(counts: &[T]) -> f64 {
    let counts = counts.iter().map(|&count| count.into());
    let (total, max, len) = (counts.clone().sum::<u64>(), counts.clone().max().unwrap_or(0), counts.len());
    if total == 0 { 0.0 } else { max as f64 * len as f64 / total as f64 - 1.0 }
}

/// Cost of either loss or its gradient over t tokens and e experts.
pub fn cost(t: usize, e: usize, elem_bytes: usize) -> Cost {
    let bytes = (t * e * elem_bytes) as u64;
    Cost::stream(4 * (t * e) as u64, bytes, bytes)
}

#[cfg(test)]
mod tests {
    #![expect(clippy::unwrap_used, reason = "tests")]
    use super::*;
    use crate::ops::testing::*;

    /// Two sequences of 3 tokens, 4 experts, 2 chosen.
    const L: SequenceLoss = SequenceLoss { alpha: 0.3, row_len: 3 };
    const INDICES: [u32; 12] = [0, 1, 0, 2, 0, 1, 3, 2, 3, 1, 0, 3];

    fn positive(x: &[f64]) -> Vec<f64> {
        x.iter().map(|x| x + 1.5).collect()
    }

    #[test]
    fn the_sequence_loss_is_its_definition_and_adds() {
        let mut s = stream();
        let memory = s.memory().clone();
        let s_te = positive(&random(24, 1));
        let scores = memory.from_slice(&[6, 4], &s_te);
        let indices = memory.from_slice(&[6, 2], &INDICES);
        let loss = memory.from_slice(&[1], &[10.0]);
        sequence_loss(&mut s, L, scores, indices, loss).unwrap();
        s.synchronize().unwrap();
        let mut want = 0.0;
        for seq in 0..2 {
            for i in 0..4 {
                let count = INDICES[seq * 6..][..6].iter().filter(|&&j| j == i).count();
                let f = 4.0 / (2.0 * 3.0) * count as f64;
                let p = |t: usize| {
                    let row = &s_te[(seq * 3 + t) * 4..][..4];
                    row[i as usize] / row.iter().sum::<f64>()
                };
                want += L.alpha * f * (0..3).map(p).sum::<f64>() / 3.0 / 2.0;
            }
        }
        assert_close(&memory.download::<f64>(loss), &[10.0 + want], 1e-12);
    }

    #[test]
    fn a_balanced_sequence_costs_alpha() {
        let mut s = stream();
        let memory = s.memory().clone();
        let scores = memory.from_slice(&[2, 4], &[0.5f32; 8]);
        let indices = memory.from_slice(&[2, 2], &[0u32, 1, 2, 3]);
        let loss = memory.from_slice(&[1], &[0f32]);
        sequence_loss(&mut s, SequenceLoss { alpha: 0.25, row_len: 2 }, scores, indices, loss).unwrap();
        s.synchronize().unwrap();
        assert_eq!(memory.download::<f32>(loss), [0.25]);
    }

    #[test]
    fn the_sequence_loss_gradient_matches_finite_differences() {
        // Scores near 1.5, so that no denominator is near 0.
        let indices = |s: &Stream| s.memory().from_slice(&[6, 2], &INDICES);
        let shifted = |s: &mut Stream, x: Tensor| {
            let y = s.memory().alloc(DType::F64, &[6, 4]);
            s.launch(&[x], &[y], move |m| m.write::<f64>(y).copy_from_slice(&positive(&m.read::<f64>(x))));
            y
        };
        check_gradients(
            &[(&[6, 4], 5)],
            &[1],
            |s, x| {
                let (loss, ix) = (s.memory().from_slice(&[1], &[0f64]), indices(s));
                let scores = shifted(s, x[0]);
                sequence_loss(s, L, scores, ix, loss)?;
                Ok(loss)
            },
            |s, x, dy, dx| {
                let (scale, ix) = (s.memory().download::<f64>(dy)[0], indices(s));
                let scores = shifted(s, x[0]);
                sequence_loss_grad(s, L, scale, scores, ix, dx[0])
            },
        );
    }

    #[test]
    fn the_z_loss_gradient_matches_finite_differences_and_adds() {
        check_gradients(
            &[(&[5, 3], 6)],
            &[1],
            |s, x| {
                let loss = s.memory().from_slice(&[1], &[0f64]);
                z_loss(s, 0.7, x[0], loss)?;
                Ok(loss)
            },
            |s, x, dy, dx| {
                let scale = s.memory().download::<f64>(dy)[0];
                z_loss_grad_acc(s, 0.7, scale / 2.0, x[0], dx[0])?;
                z_loss_grad_acc(s, 0.7, scale / 2.0, x[0], dx[0])
            },
        );
    }

    #[test]
    fn the_z_loss_is_its_definition() {
        let mut s = stream();
        let memory = s.memory().clone();
        let x = memory.from_slice(&[2, 2], &[0.0f64, 0.0, 50.0, -50.0]);
        let loss = memory.from_slice(&[1], &[0f64]);
        z_loss(&mut s, 0.5, x, loss).unwrap();
        s.synchronize().unwrap();
        let want = 0.5 * (2f64.ln().powi(2) + 2500.0) / 2.0;
        assert_close(&memory.download::<f64>(loss), &[want], 1e-12);
    }

    #[test]
    fn the_bias_moves_against_the_load_and_rests_at_the_mean() {
        let mut s = stream();
        let memory = s.memory().clone();
        let counts = memory.from_slice(&[4], &[1u32, 2, 3, 0]);
        let total = memory.from_slice(&[4], &[3u32, 1, 3, 3]);
        let bias = memory.from_slice(&[4], &[0f32, 1.0, -1.0, 0.5]);
        accumulate_counts(&mut s, counts, total).unwrap();
        bias_update(&mut s, total, 0.25, bias).unwrap();
        s.synchronize().unwrap();
        assert_eq!(memory.download::<u32>(total), [4, 3, 6, 3]);
        assert_eq!(memory.download::<f32>(bias), [0.0, 1.25, -1.25, 0.75]);
    }

    #[test]
    fn counts_that_overflow_are_refused() {
        let mut s = stream();
        let counts = s.memory().from_slice(&[1], &[u32::MAX]);
        let total = s.memory().from_slice(&[1], &[1u32]);
        accumulate_counts(&mut s, counts, total).unwrap();
        assert!(s.synchronize().unwrap_err().to_string().contains("expert 0 was counted"));
    }

    #[test]
    fn max_vio_is_the_excess_of_the_busiest() {
        for (counts, want) in
            [(&[2u32, 2, 2][..], 0.0), (&[6, 0, 0], 2.0), (&[3, 2, 1], 0.5), (&[0, 0], 0.0), (&[], 0.0)]
        {
            assert_eq!(max_vio(counts), want, "{counts:?}");
        }
    }

    #[test]
    fn sequences_must_be_whole() {
        let mut s = stream();
        let scores = s.memory().alloc(DType::F32, &[5, 4]);
        let indices = s.memory().alloc(DType::U32, &[5, 2]);
        let loss = s.memory().alloc(DType::F32, &[1]);
        let error = sequence_loss(&mut s, L, scores, indices, loss).unwrap_err().to_string();
        assert!(error.contains("whole sequences of 3 tokens"), "{error}");
    }
}
