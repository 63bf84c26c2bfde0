//! Rotary position embedding, with YaRN's frequencies for contexts beyond those trained on.
//!
//! Pair i of a head's rotary part turns by `position * f_i`. Two layouts of the pairs exist: interleaved (2i, 2i + 1;
//! DeepSeek's weights) and half-split (i, i + dim/2; Llama's and Qwen's). Attention sees dot products only, which a common
//! permutation of q and k leaves alone, so interleaved heads are rotated in place and never permuted to half-split.
//!
//! Frequencies and the scale of the softmax: YaRN (arXiv 2309.00071) as DeepSeek-V3 and transformers' `rope_type = "yarn"` do it.
//! A rotation is orthogonal: the gradient is the inverse rotation (times the same factor).

use std::f64::consts::PI;

use crate::{
    cost::Cost,
    device::Target,
    dtype::{DType, Float},
    error::{Error, Result},
    memory::Memory,
    ops::{expect_shape, is_fast, parallel::for_row_chunks},
    ptx,
    stream::Stream,
    tensor::Tensor,
    with_float,
};

/// YaRN's settings, named as in Hugging Face configs.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Yarn {
    /// How many times longer the context is than it was in training.
    pub factor: f64,
    /// Context length in training, tokens.
    pub original_max_position_embeddings: usize,
    /// Pairs that turn more often than this over the original context keep their frequency (32).
    pub beta_fast: f64,
    /// Pairs that turn less often than this are slowed by `factor` (1).
    pub beta_slow: f64,
    /// With `mscale_all_dim`: factor on cos and sin is the ratio of the two.
    pub mscale: Option<f64>,
    /// Also scales the softmax.
    pub mscale_all_dim: Option<f64>,
}

impl Yarn {
    fn magnitude(&self, mscale: f64) -> f64 {
        if self.factor <= 1.0 { 1.0 } else { 0.1 * mscale * self.factor.ln() + 1.0 }
    }

    /// First and last pair of the ramp between kept and slowed frequencies.
    fn ramp(&self, theta: f64, dim: usize) -> (f64, f64) {
        let pair = |turns: f64| {
            let context = self.original_max_position_embeddings as f64;
            dim as f64 * (context / (turns * 2.0 * PI)).ln() / (2.0 * theta.ln())
        };
        (pair(self.beta_fast).floor().max(0.0), pair(self.beta_slow).ceil().min(dim as f64 - 1.0))
    }
}

/// What the rotation of a head is made of; a pure description.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Rope {
    /// Base of the frequencies.
    pub theta: f64,
    /// Rotated elements of a head; even.
    pub dim: usize,
    /// Longer contexts.
    pub yarn: Option<Yarn>,
}

impl Rope {
    /// Radians per position of each of the `dim / 2` pairs.
    pub fn inv_freq(&self) -> Vec<f64> {
        let plain = (0..self.dim / 2).map(|i| self.theta.powf(-2.0 * i as f64 / self.dim as f64));
        let Some(yarn) = &self.yarn else { return plain.collect() };
        let (low, high) = yarn.ramp(self.theta, self.dim);
        let width = if low == high { 0.001 } else { high - low };
        let slowed = |i: usize| ((i as f64 - low) / width).clamp(0.0, 1.0);
        plain.enumerate().map(|(i, f)| f / yarn.factor * slowed(i) + f * (1.0 - slowed(i))).collect()
    }

    /// Factor on cos and sin.
    pub fn attention_factor(&self) -> f64 {
        match &self.yarn {
            None => 1.0,
            Some(yarn) => match (yarn.mscale, yarn.mscale_all_dim) {
                (Some(m), Some(all)) if m != 0.0 && all != 0.0 => yarn.magnitude(m) / yarn.magnitude(all),
                _ => yarn.magnitude(1.0),
            },
        }
    }

    /// Scale of the scores before the softmax, for heads of `qk_head_dim` elements.
    pub fn softmax_scale(&self, qk_head_dim: usize) -> f64 {
        let magnitude = match &self.yarn {
            Some(yarn) => yarn.mscale_all_dim.filter(|&m| m != 0.0).map_or(1.0, |m| yarn.magnitude(m)),
            None => 1.0,
        };
        magnitude * magnitude / (qk_head_dim as f64).sqrt()
    }

    /// Uploads cos and sin of positions `0..max_positions`, computed in f64, for tensors of `dtype`.
    pub fn table(&self, memory: &Memory, dtype: DType, max_positions: usize, pairs: Pairs) -> RopeTable {
        let (freq, factor) = (self.inv_freq(), self.attention_factor());
        let angles = (0..max_positions).flat_map(|p| freq.iter().map(move |f| p as f64 * f));
        let (sin, cos): (Vec<f64>, Vec<f64>) =
            angles.map(|a| a.sin_cos()).map(|(s, c)| (s * factor, c * factor)).unzip();
        let upload = |x: &[f64]| {
            let dims = [max_positions, self.dim / 2];
            with_float!(dtype, T => {
                let x: Vec<<T as Float>::Acc> = x.iter().map(|&x| Float::of_f64(x)).collect();
                memory.from_slice(&dims, &x)
            })
        };
        RopeTable { cos: upload(&cos), sin: upload(&sin), pairs }
    }
}

/// Which elements turn together.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Pairs {
    /// 2i with 2i + 1.
    Interleaved,
    /// i with i + dim/2.
    HalfSplit,
}

/// Cosines and sines [max_positions, dim / 2] on a device: f32, or f64 for f64 tensors.
#[derive(Clone, Copy, Debug)]
pub struct RopeTable {
    pub(crate) cos: Tensor,
    pub(crate) sin: Tensor,
    pub(crate) pairs: Pairs,
}

impl RopeTable {
    /// Rotated elements of a head.
    pub fn dim(&self) -> usize {
        2 * self.cos.cols()
    }

    /// Positions it reaches.
    pub fn max_positions(&self) -> usize {
        self.cos.dim(0)
    }

    /// `Err` unless the table serves tensors of `x`'s type.
    pub(crate) fn check(&self, op: &'static str, x: Tensor) -> Result<()> {
        let dtype = acc_dtype(x.dtype);
        if self.cos.dtype == dtype {
            return Ok(());
        }
        let expected = format!("{dtype:?}, for {:?} heads", x.dtype);
        Err(Error::Shape { op, role: "table", expected, found: self.cos })
    }
}

/// The type sums over `dtype` are kept in.
pub(crate) fn acc_dtype(dtype: DType) -> DType {
    if dtype == DType::F64 { DType::F64 } else { DType::F32 }
}

/// One row of a table.
#[derive(Clone, Copy)]
pub(crate) struct Turn<'a, A> {
    cos: &'a [A],
    sin: &'a [A],
    sign: A,
    pairs: Pairs,
}

impl<'a, A: num_traits::Float> Turn<'a, A> {
    /// The rotation at `position`, or its inverse.
    #[inline(always)]
    pub(crate) fn new(cos: &'a [A], sin: &'a [A], pairs: Pairs, dim: usize, position: usize, inverse: bool) -> Self {
        let half = dim / 2;
        let row = position * half..(position + 1) * half;
        assert!(row.end <= cos.len(), "{}", past_the_table(position));
        let sign = if inverse { -A::one() } else { A::one() };
        Turn { cos: &cos[row.clone()], sin: &sin[row], sign, pairs }
    }

    /// Rotates `x` in place.
    #[inline(always)]
    pub(crate) fn apply<T: Float<Acc = A>>(&self, x: &mut [T]) {
        let table = self.cos.iter().zip(self.sin);
        match self.pairs {
            Pairs::Interleaved => {
                for ([a, b], (&cos, &sin)) in x.as_chunks_mut::<2>().0.iter_mut().zip(table) {
                    turn(a, b, cos, self.sign * sin);
                }
            }
            Pairs::HalfSplit => {
                let (a, b) = x.split_at_mut(self.cos.len());
                for ((a, b), (&cos, &sin)) in a.iter_mut().zip(b).zip(table) {
                    turn(a, b, cos, self.sign * sin);
                }
            }
        }
    }
}

/// What is said of a position without a row.
#[cold]
pub(crate) fn past_the_table(position: usize) -> String {
    format!("position {position} is past the rope table; build it with more positions")
}

#[inline(always)]
fn turn<T: Float>(a: &mut T, b: &mut T, cos: T::Acc, sin: T::Acc) {
    let (x, y) = (a.to_acc(), b.to_acc());
    *a = T::from_acc(x * cos - y * sin);
    *b = T::from_acc(x * sin + y * cos);
}

/// F: turns `x[.., offset .. offset + dim]` of x [t, h, head] or [t, head] in place by `positions` (u32, one a token).
pub fn forward(s: &mut Stream, x: Tensor, offset: usize, positions: Tensor, table: &RopeTable) -> Result<()> {
    rotate(s, x, offset, positions, *table, false)
}

/// I: turns the gradient back, in place.
pub fn input_grad(s: &mut Stream, dx: Tensor, offset: usize, positions: Tensor, table: &RopeTable) -> Result<()> {
    rotate(s, dx, offset, positions, *table, true)
}

fn rotate(s: &mut Stream, x: Tensor, offset: usize, positions: Tensor, table: RopeTable, inverse: bool) -> Result<()> {
    let (t, head, dim) = (x.dim(0), x.cols(), table.dim());
    expect_shape("rope", "positions", positions, &[t])?;
    table.check("rope", x)?;
    if offset + dim > head {
        let expected = format!("heads of at least {offset} + {dim} elements");
        return Err(Error::Shape { op: "rope", role: "x", expected, found: x });
    }
    if x.is_empty() {
        return Ok(());
    }
    let width = x.len() / t;
    s.account(cost(t, x.len() / (t * head), dim, x.dtype.size_bytes()));
    let kernels = |_: &Target| {
        is_fast(x).then(|| {
            let turn = if inverse { ptx::rope::input_grad } else { ptx::rope::forward };
            turn(x, offset, positions, &table)
        })
    };
    s.launch_kernel(&[x, positions, table.cos, table.sin], &[x], kernels, move |m| {
        with_float!(x.dtype, T => {
            type A = <T as Float>::Acc;
            let (cos, sin, positions) = (m.read::<A>(table.cos), m.read::<A>(table.sin), m.read::<u32>(positions));
            let (cos, sin, positions): (&[A], &[A], &[u32]) = (&cos, &sin, &positions);
            for_row_chunks(&mut m.write::<T>(x), width, #[inline(always)] |first, rows| {
                for (row, &position) in rows.chunks_exact_mut(width).zip(&positions[first..]) {
                    let turn = Turn::new(cos, sin, table.pairs, dim, position as usize, inverse);
                    for head in row.chunks_exact_mut(head) {
                        turn.apply(&mut head[offset..offset + dim]);
                    }
                }
            });
        });
    });
    Ok(())
}

/// Cost of turning `heads` heads of `dim` rotated elements for `t` tokens.
pub fn cost(t: usize, heads: usize, dim: usize, elem_bytes: usize) -> Cost {
    let len = t * heads * dim;
    Cost::stream(3 * len as u64, (len * elem_bytes) as u64, (len * elem_bytes) as u64)
}

#[cfg(test)]
mod tests {
    #![expect(clippy::unwrap_used, reason = "tests")]
    use super::*;
    use crate::ops::testing::*;

    fn deepseek_v3() -> Rope {
        let yarn = Yarn {
            factor: 40.0,
            original_max_position_embeddings: 4096,
            beta_fast: 32.0,
            beta_slow: 1.0,
            mscale: Some(1.0),
            mscale_all_dim: Some(1.0),
        };
        Rope { theta: 1e4, dim: 64, yarn: Some(yarn) }
    }

    #[test]
    fn yarn_reproduces_the_published_numbers_of_deepseek_v3() {
        let rope = deepseek_v3();
        assert_eq!(rope.yarn.unwrap().ramp(rope.theta, rope.dim), (10.0, 23.0));
        assert!((rope.softmax_scale(192) - 0.13523).abs() < 5e-6, "{}", rope.softmax_scale(192));
        assert_eq!(rope.attention_factor(), 1.0);
        let (freq, plain) = (rope.inv_freq(), Rope { yarn: None, ..rope }.inv_freq());
        assert_eq!(freq[..=10], plain[..=10], "fast pairs keep their frequency");
        for i in 23..32 {
            assert!((freq[i] * 40.0 - plain[i]).abs() < 1e-15, "slow pairs are slowed by the factor");
        }
        let half = plain[16] * (7.0 / 13.0 + 6.0 / 13.0 / 40.0);
        assert!((freq[16] - half).abs() < 1e-15, "the ramp between is linear in the pair");
    }

    #[test]
    fn without_mscale_the_factor_is_on_cos_and_sin() {
        let mut rope = deepseek_v3();
        let yarn = Yarn { mscale: None, mscale_all_dim: None, ..rope.yarn.unwrap() };
        rope.yarn = Some(yarn);
        assert!((rope.attention_factor() - (0.1 * 40f64.ln() + 1.0)).abs() < 1e-15);
        assert_eq!(rope.softmax_scale(64), 0.125);
        rope.yarn = Some(Yarn { factor: 1.0, ..yarn });
        assert_eq!(rope.attention_factor(), 1.0);
        assert_close(&rope.inv_freq(), &Rope { yarn: None, ..rope }.inv_freq(), 1e-15);
    }

    const RANDOM_HEADS: [usize; 3] = [3, 2, 11];

    fn turned(pairs: Pairs, positions: &[u32]) -> (Vec<f64>, Vec<f64>) {
        let mut s = stream();
        let m = s.memory().clone();
        let x = random(66, 5);
        let table = Rope { theta: 100.0, dim: 6, yarn: None }.table(&m, DType::F64, 50, pairs);
        let (y, at) = (m.from_slice(&RANDOM_HEADS, &x), m.from_slice(&[3], positions));
        forward(&mut s, y, 3, at, &table).unwrap();
        s.synchronize().unwrap();
        (x, m.download(y))
    }

    #[test]
    fn pairs_turn_by_position_times_frequency_and_the_rest_stays() {
        let positions = [0, 7, 49];
        for pairs in [Pairs::Interleaved, Pairs::HalfSplit] {
            let (x, got) = turned(pairs, &positions);
            let mut want = x.clone();
            for (j, head) in want.chunks_mut(11).enumerate() {
                for i in 0..3 {
                    let (a, b) = if pairs == Pairs::Interleaved { (3 + 2 * i, 4 + 2 * i) } else { (3 + i, 6 + i) };
                    let (sin, cos) = (f64::from(positions[j / 2]) * 100f64.powf(-(i as f64) / 3.0)).sin_cos();
                    (head[a], head[b]) = (head[a] * cos - head[b] * sin, head[a] * sin + head[b] * cos);
                }
            }
            assert_close(&got, &want, 1e-14);
        }
    }

    #[test]
    fn scores_depend_on_the_distance_only() {
        let score = |a: u32, b: u32| {
            let (_, x) = turned(Pairs::Interleaved, &[a, b, 0]);
            x[3..9].iter().zip(&x[25..31]).map(|(p, q)| p * q).sum::<f64>()
        };
        assert!((score(3, 10) - score(33, 40)).abs() < 1e-13);
        assert!((score(3, 10) - score(3, 11)).abs() > 1e-3);
    }

    #[test]
    fn gradients_match_finite_differences() {
        for pairs in [Pairs::Interleaved, Pairs::HalfSplit] {
            let yarn = Yarn { mscale: None, ..deepseek_v3().yarn.unwrap() };
            let rope = Rope { theta: 1e4, dim: 4, yarn: Some(yarn) };
            let at = |s: &Stream| {
                (s.memory().from_slice(&[3], &[5u32, 0, 9]), rope.table(s.memory(), DType::F64, 10, pairs))
            };
            let copy = |s: &mut Stream, x: Tensor, y: Tensor| crate::ops::elementwise::copy(s, x, y);
            check_gradients(
                &[(&[3, 2, 6], 1)],
                &[3, 2, 6],
                |s, x| {
                    let y = s.memory().alloc(DType::F64, &[3, 2, 6]);
                    copy(s, x[0], y)?;
                    let (positions, table) = at(s);
                    forward(s, y, 1, positions, &table)?;
                    Ok(y)
                },
                |s, _, dy, dx| {
                    copy(s, dy, dx[0])?;
                    let (positions, table) = at(s);
                    input_grad(s, dx[0], 1, positions, &table)
                },
            );
        }
    }

    #[test]
    fn wrong_calls_say_what_is_wrong() {
        let mut s = stream();
        let m = s.memory().clone();
        let table = Rope { theta: 1e4, dim: 4, yarn: None }.table(&m, DType::Bf16, 8, Pairs::HalfSplit);
        let (x, at) = (m.alloc(DType::F32, &[2, 6]), m.from_slice(&[2], &[0u32, 8]));
        let error = forward(&mut s, x, 4, at, &table).unwrap_err().to_string();
        assert!(error.contains("heads of at least 4 + 4 elements"), "{error}");
        forward(&mut s, x, 2, at, &table).unwrap();
        let error = s.synchronize().unwrap_err().to_string();
        assert!(error.contains("position 8 is past the rope table"), "{error}");
    }
}
