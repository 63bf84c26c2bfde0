//! The gate: which experts a token goes to, and with what weight.
//!
//! From logits_te (always F32 or F64; rounding them to bf16 changes the choice):
//! - scores_te = sigmoid or softmax of the logits; corrected_te = scores_te + bias_e.
//! - Group limit: experts form equal groups of neighbours; a group scores the sum of its two best corrected scores
//!   (DeepSeek-V3) or its best (V2), and only the experts of the best groups remain.
//! - indices_tk: the k best remaining by corrected score, best first, ties to the lower index.
//! - weights_tk = scores (never corrected) of the chosen, over their sum + 1e-20 if `norm_topk_prob`, times
//!   `routed_scaling_factor`.
//!
//! Source: DeepSeek-V3 technical report, Eq 12 to 16, and the released inference code, which takes experts outside the chosen
//! groups out of the choice. Masking them with 0 instead, as some ports do, lets them back in when biases push every corrected
//! score below 0.
//!
//! The choice has no gradient; the weights have one to the scores of the chosen.

mod row;

pub(crate) use row::{counter_rng, not_a_number, softmax};

use crate::{
    cost::Cost,
    device::Target,
    dtype::{DType, Float},
    error::Result,
    ops::{
        expect::{expect_tensor, expect_that},
        parallel::for_row_chunks,
    },
    ptx,
    stream::Stream,
    tensor::Tensor,
    with_float,
};

/// How logits become scores.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Score {
    /// exp(x_e) / sum exp(x): DeepSeek-V2 and before.
    Softmax,
    /// 1 / (1 + exp(-x_e)): DeepSeek-V3.
    Sigmoid,
}

/// How the corrected scores of a group become the group's.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum GroupScore {
    /// The best: V2's `group_limited_greedy`.
    Max,
    /// The sum of the two best (of the only one, in groups of one): V3's `noaux_tc`.
    Top2Sum,
}

/// The group limit.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Groups {
    /// Number of groups the experts are in (`n_group`).
    pub num: usize,
    /// Groups a token may go to (`topk_group`).
    pub keep: usize,
    /// How they are ranked.
    pub score: GroupScore,
}

/// Who chooses the experts. The weights always come from the scores of the chosen.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mode {
    /// The scores, as above.
    Learned,
    /// Round robin: slot j of token t goes to expert (t k + j) mod e. Loads differ by one at most, and group limits do not
    /// apply: this is for measuring speed without imbalance.
    Forced,
    /// k distinct experts, uniform among all, group limits not applied: for exercising load that no router has learned.
    /// Token t of the same seed and step always gets the same experts, so a recomputation agrees with the first pass.
    Random {
        /// Seed; make it differ between layers.
        seed: u64,
        /// Counter, such as the microbatch's number over the whole run.
        step: u64,
    },
}

/// What a gate computes.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Gate {
    /// Logits to scores.
    pub score: Score,
    /// Group limit, if any.
    pub groups: Option<Groups>,
    /// Whether the k weights are made to sum to 1 before scaling.
    pub norm_topk_prob: bool,
    /// Factor on the weights.
    pub routed_scaling_factor: f64,
    /// Who chooses.
    pub mode: Mode,
}

/// What `forward` assigns.
#[derive(Clone, Copy, Debug)]
pub struct Outputs {
    /// Scores, [t, e] of the logits' type; kept for the backward pass.
    pub scores: Tensor,
    /// Chosen experts, U32 [t, k], best first.
    pub indices: Tensor,
    /// Their weights, [t, k] of the logits' type.
    pub weights: Tensor,
    /// Slots each expert got, U32 `[e]`; they sum to t k.
    pub counts: Tensor,
}

/// F: routes the tokens of logits [t, e] with an F32 correction bias `[e]`. A NaN logit fails the stream with
/// [`crate::error::Error::NotFinite`].
///
/// # Errors
/// If shapes or types differ from the contract, k exceeds the experts within reach, or groups do not divide the experts.
pub fn forward(s: &mut Stream, gate: Gate, logits: Tensor, bias: Option<Tensor>, out: Outputs) -> Result<()> {
    const OP: &str = "gate";
    let (t, e, k) = (logits.rows(), logits.cols(), out.indices.cols());
    expect_logits(OP, logits)?;
    expect_tensor(OP, "scores", out.scores, logits.dtype, &[t, e])?;
    expect_tensor(OP, "indices", out.indices, DType::U32, &[t, k])?;
    expect_tensor(OP, "weights", out.weights, logits.dtype, &[t, k])?;
    expect_tensor(OP, "counts", out.counts, DType::U32, &[e])?;
    if let Some(bias) = bias {
        expect_tensor(OP, "bias", bias, DType::F32, &[e])?;
    }
    let groups = gate.groups.unwrap_or(Groups { num: 1, keep: 1, score: GroupScore::Max });
    expect_that(OP, "logits", logits, groups.num > 0 && e.is_multiple_of(groups.num), || {
        format!("of a number of experts that {} groups divide", groups.num)
    })?;
    let reach = groups.keep.min(groups.num) * (e / groups.num);
    expect_that(OP, "indices", out.indices, (1..=reach).contains(&k), || {
        format!("of at least one and at most {reach} experts a token, all that the chosen groups have")
    })?;
    let reads: Vec<Tensor> = std::iter::once(logits).chain(bias).collect();
    let writes = [out.scores, out.indices, out.weights, out.counts];
    s.account(cost(t, e, k, logits.dtype.size_bytes()));
    let kernels = |_: &Target| {
        (logits.dtype == DType::F32 && e <= ptx::gate::MAX_EXPERTS && groups.num <= ptx::gate::MAX_GROUPS)
            .then(|| ptx::gate::forward(gate, logits, bias, out))
    };
    s.launch_kernel(&reads, &writes, kernels, move |m| {
        let (mut indices, mut counts) = (m.write::<u32>(out.indices), m.write::<u32>(out.counts));
        with_float!(logits.dtype, T => {
            type A = <T as Float>::Acc;
            let bias: Vec<A> =
                bias.map(|b| m.read::<f32>(b).iter().map(|&b| A::of_f64(b.into())).collect()).unwrap_or_default();
            let row = row::Row { gate, groups, k, bias: &bias };
            let logits = m.read::<A>(logits);
            row::route(&row, &logits, e, &mut m.write::<A>(out.scores), &mut indices, &mut m.write::<A>(out.weights));
        });
        counts.fill(0);
        indices.iter().for_each(|&i| counts[i as usize] += 1);
    });
    Ok(())
}

fn expect_logits(op: &'static str, logits: Tensor) -> Result<()> {
    expect_that(op, "logits", logits, matches!(logits.dtype, DType::F32 | DType::F64), || "F32 or F64".into())
}

/// I: assigns dlogits [t, e] from dweights [t, k] and, if given, the auxiliary losses' gradient dscores [t, e]
/// ([`crate::ops::balance::sequence_loss_grad`]). `scores` and `indices` are `forward`'s. The router z-loss adds its own part
/// to dlogits afterwards.
pub fn input_grad(
    s: &mut Stream,
    gate: Gate,
    scores: Tensor,
    indices: Tensor,
    dweights: Tensor,
    dscores: Option<Tensor>,
    dlogits: Tensor,
) -> Result<()> {
    const OP: &str = "gate input gradient";
    let (t, e, k) = (scores.rows(), scores.cols(), indices.cols());
    expect_logits(OP, scores)?;
    expect_tensor(OP, "indices", indices, DType::U32, &[t, k])?;
    expect_tensor(OP, "dweights", dweights, scores.dtype, &[t, k])?;
    expect_tensor(OP, "dlogits", dlogits, scores.dtype, &[t, e])?;
    if let Some(dscores) = dscores {
        expect_tensor(OP, "dscores", dscores, scores.dtype, &[t, e])?;
    }
    let reads: Vec<Tensor> = [scores, indices, dweights].into_iter().chain(dscores).collect();
    s.account(cost(t, e, k, scores.dtype.size_bytes()));
    let kernels = |_: &Target| {
        (scores.dtype == DType::F32 && e <= ptx::gate::MAX_EXPERTS)
            .then(|| ptx::gate::input_grad(gate, scores, indices, dweights, dscores, dlogits))
    };
    s.launch_kernel(&reads, &[dlogits], kernels, move |m| {
        with_float!(scores.dtype, T => {
            type A = <T as Float>::Acc;
            let (s, dw, ix, mut dx) =
                (m.read::<A>(scores), m.read::<A>(dweights), m.read::<u32>(indices), m.write::<A>(dlogits));
            let ds = dscores.map(|d| m.read::<A>(d));
            for_row_chunks(&mut dx, e, #[inline(always)] |first, chunk| {
                for (t, dx) in (first..).zip(chunk.chunks_exact_mut(e)) {
                    match &ds {
                        Some(ds) => dx.copy_from_slice(&ds[t * e..][..e]),
                        None => dx.fill(A::of_f64(0.0)),
                    }
                    row::grad_row(gate, &s[t * e..][..e], &ix[t * k..][..k], &dw[t * k..][..k], dx);
                }
            });
        });
    });
    Ok(())
}

/// Cost of one pass over t tokens and e experts, k chosen.
pub fn cost(t: usize, e: usize, k: usize, elem_bytes: usize) -> Cost {
    let (scores, slots) = ((t * e * elem_bytes) as u64, (t * k * (elem_bytes + 4)) as u64);
    Cost::stream(8 * (t * e) as u64, scores + slots, scores + slots)
}

#[cfg(test)]
mod tests;
