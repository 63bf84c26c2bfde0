//! The gate's arithmetic, a token at a time, over slices.
//!
//! Selection is insertion into a list of the k best: one comparison an expert once the list is full, and the order of visits is
//! the order of ties.

use rand::{RngExt as _, SeedableRng};
use rayon::prelude::*;

use super::{Gate, GroupScore, Groups, Mode, Score};
use crate::{dtype::Real, error::Error, ops::parallel::MIN_PARALLEL_ELEMENTS, simd::vectorize};

const EPSILON: f64 = 1e-20;

/// Routes every token of `logits`, [t, e].
pub fn route<A: Real>(row: &Row<A>, logits: &[A], e: usize, scores: &mut [A], indices: &mut [u32], weights: &mut [A]) {
    let k = row.k;
    let rows = (MIN_PARALLEL_ELEMENTS / e).max(1);
    let run = |first: usize, scores: &mut [A], indices: &mut [u32], weights: &mut [A]| {
        vectorize(
            #[inline(always)]
            || {
                let mut scratch = Scratch::new(e, row.groups.num, k);
                let outputs =
                    scores.chunks_exact_mut(e).zip(indices.chunks_exact_mut(k)).zip(weights.chunks_exact_mut(k));
                for (t, ((scores, indices), weights)) in (first..).zip(outputs) {
                    row.route(t, &logits[t * e..][..e], scores, indices, weights, &mut scratch);
                }
            },
        );
    };
    if scores.len() <= MIN_PARALLEL_ELEMENTS {
        return run(0, scores, indices, weights);
    }
    scores
        .par_chunks_mut(rows * e)
        .zip(indices.par_chunks_mut(rows * k))
        .zip(weights.par_chunks_mut(rows * k))
        .enumerate()
        .for_each(|(i, ((scores, indices), weights))| run(i * rows, scores, indices, weights));
}

/// What is the same for every token.
pub struct Row<'a, A> {
    /// The contract.
    pub gate: Gate,
    /// Its groups; one of all experts if it has none.
    pub groups: Groups,
    /// Experts a token.
    pub k: usize,
    /// Empty if there is none.
    pub bias: &'a [A],
}

struct Scratch<A> {
    corrected: Vec<A>,
    kept: Vec<bool>,
    best: Best<A>,
}

impl<A: Real> Scratch<A> {
    fn new(e: usize, num_groups: usize, k: usize) -> Self {
        let best = Best { entries: Vec::with_capacity(k.max(num_groups) + 1), limit: 0 };
        Scratch { corrected: vec![A::zero(); e], kept: vec![false; num_groups], best }
    }
}

/// The `limit` largest values seen, largest first; of equal values the one seen first is ahead.
struct Best<A> {
    entries: Vec<(A, u32)>,
    limit: usize,
}

impl<A: Real> Best<A> {
    #[inline(always)]
    fn reset(&mut self, limit: usize) {
        self.entries.clear();
        self.limit = limit;
    }

    #[inline(always)]
    fn offer(&mut self, value: A, index: usize) {
        if self.entries.len() == self.limit {
            if self.entries.last().is_none_or(|&(last, _)| value <= last) {
                return;
            }
            self.entries.pop();
        }
        let ahead = self.entries.iter().rposition(|&(v, _)| v >= value).map_or(0, |i| i + 1);
        self.entries.insert(ahead, (value, index as u32));
    }
}

impl<A: Real> Row<'_, A> {
    #[inline(always)]
    fn route(
        &self,
        t: usize,
        logits: &[A],
        scores: &mut [A],
        indices: &mut [u32],
        weights: &mut [A],
        scratch: &mut Scratch<A>,
    ) {
        match self.gate.score {
            Score::Sigmoid => {
                for (s, &x) in scores.iter_mut().zip(logits) {
                    *s = A::one() / (A::one() + (-x).exp_fast());
                }
            }
            Score::Softmax => softmax(logits, scores),
        }
        if scores.iter().any(|s| s.is_nan()) {
            not_a_number(t).raise();
        }
        match self.gate.mode {
            Mode::Learned => self.choose(scores, scratch, indices),
            Mode::Forced => round_robin(t, scores.len(), indices),
            Mode::Random { seed, step } => random_distinct(seed, step, t, scores.len(), indices),
        }
        let mut total = A::one();
        if self.gate.norm_topk_prob {
            total = indices.iter().map(|&i| scores[i as usize]).sum::<A>() + A::of_f64(EPSILON);
        }
        let factor = A::of_f64(self.gate.routed_scaling_factor) / total;
        for (w, &i) in weights.iter_mut().zip(indices.iter()) {
            *w = scores[i as usize] * factor;
        }
    }

    #[inline(always)]
    fn choose(&self, scores: &[A], scratch: &mut Scratch<A>, indices: &mut [u32]) {
        let Scratch { corrected, kept, best } = scratch;
        corrected.copy_from_slice(scores);
        for (c, &b) in corrected.iter_mut().zip(self.bias) {
            *c += b;
        }
        let size = corrected.len() / self.groups.num;
        best.reset(self.groups.keep);
        for (g, group) in corrected.chunks_exact(size).enumerate() {
            best.offer(group_score(self.groups.score, group), g);
        }
        kept.fill(false);
        best.entries.iter().for_each(|&(_, g)| kept[g as usize] = true);
        // Experts of the other groups are not masked but absent: no value of the bias can bring them back.
        best.reset(self.k);
        for (g, group) in corrected.chunks_exact(size).enumerate().filter(|(g, _)| kept[*g]) {
            for (i, &c) in group.iter().enumerate() {
                best.offer(c, g * size + i);
            }
        }
        for (index, &(_, i)) in indices.iter_mut().zip(&best.entries) {
            *index = i;
        }
    }
}

/// What is said of a token with a NaN among its logits.
#[cold]
pub(crate) fn not_a_number(t: usize) -> Error {
    Error::NotFinite { task: "gate".into(), tensor: format!("logits of token {t}"), value: f64::NAN }
}

#[inline(always)]
fn group_score<A: Real>(score: GroupScore, group: &[A]) -> A {
    let (mut first, mut second) = (A::neg_infinity(), A::neg_infinity());
    for &c in group {
        second = second.max(first.min(c));
        first = first.max(c);
    }
    if score == GroupScore::Max || group.len() == 1 { first } else { first + second }
}

/// `y = softmax(x)`; NaN if an x is NaN, or all are minus infinity, or one is infinity.
#[inline(always)]
pub fn softmax<A: Real>(x: &[A], y: &mut [A]) {
    let max = x.iter().fold(A::neg_infinity(), |m, &x| m.max(x));
    // Apart from the sum, whose order is fixed, so that this loop is vectorized.
    y.iter_mut().zip(x).for_each(|(y, &x)| *y = (x - max).exp_fast());
    let inverse = A::one() / y.iter().copied().sum::<A>();
    y.iter_mut().for_each(|y| *y *= inverse);
}

fn round_robin(t: usize, e: usize, indices: &mut [u32]) {
    let first = t % e * indices.len();
    for (j, index) in indices.iter_mut().enumerate() {
        *index = ((first + j) % e) as u32;
    }
}

/// k of e without replacement, by Floyd's algorithm over ChaCha8 keyed by (seed, step), one stream a token.
fn random_distinct(seed: u64, step: u64, t: usize, e: usize, indices: &mut [u32]) {
    let mut rng = counter_rng(seed, step, t as u64);
    let k = indices.len();
    for j in 0..k {
        let last = (e - k + j) as u32;
        let drawn = rng.random_range(0..=last);
        indices[j] = if indices[..j].contains(&drawn) { last } else { drawn };
    }
}

/// Random numbers that depend on these three and on nothing drawn before.
pub fn counter_rng(seed: u64, step: u64, stream: u64) -> rand_chacha::ChaCha8Rng {
    let mut key = [0; 32];
    key[..8].copy_from_slice(&seed.to_le_bytes());
    key[8..16].copy_from_slice(&step.to_le_bytes());
    let mut rng = rand_chacha::ChaCha8Rng::from_seed(key);
    rng.set_stream(stream);
    rng
}

/// `dx` holds dscores and becomes dlogits.
#[inline(always)]
pub fn grad_row<A: Real>(gate: Gate, s: &[A], indices: &[u32], dw: &[A], dx: &mut [A]) {
    let factor = A::of_f64(gate.routed_scaling_factor);
    let chosen = || indices.iter().map(|&i| s[i as usize]);
    let (mut scale, mut shared) = (factor, A::zero());
    if gate.norm_topk_prob {
        // w_j = c s_j / z, z = sum s + epsilon: ds_j = c / z (dw_j - sum_l dw_l s_l / z).
        let z = chosen().sum::<A>() + A::of_f64(EPSILON);
        shared = chosen().zip(dw).map(|(s, &g)| s * g).sum::<A>() / z;
        scale = factor / z;
    }
    for (&i, &g) in indices.iter().zip(dw) {
        dx[i as usize] += scale * (g - shared);
    }
    match gate.score {
        Score::Sigmoid => dx.iter_mut().zip(s).for_each(|(d, &s)| *d *= s * (A::one() - s)),
        Score::Softmax => {
            let mean = dx.iter().zip(s).map(|(&d, &s)| d * s).sum::<A>();
            dx.iter_mut().zip(s).for_each(|(d, &s)| *d = s * (*d - mean));
        }
    }
}
