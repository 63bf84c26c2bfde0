//! Choosing the next token from logits, row by row.
//!
//! The steps are those of Hugging Face's generation, in its order: divide by the temperature, keep the `top_k` most likely,
//! renormalize, keep the smallest set of most likely tokens whose probability reaches `top_p`, keep of these what has at least
//! `min_p` of the most likely one's probability, draw. Equal logits rank by token id, so exactly `top_k` remain.
//!
//! Where `min_p` stands matters little: what it keeps depends on the most likely token alone, which the other filters leave. vLLM
//! has it before them, so that there `top_p` is a share of what `min_p` left, and here of what `top_k` left.
//!
//! One uniform number a row decides, and it depends on the row's seed and position only: a request gets the same tokens alone
//! and in any batch, and again after it was preempted.

use num_traits::Float as _;
use rand::RngExt as _;
use rayon::prelude::*;

use crate::{
    cost::Cost,
    device::Target,
    dtype::{DType, Float, Real},
    error::{Error, Result},
    ops::{
        expect::{expect_tensor, expect_that},
        gate::counter_rng,
        is_fast,
        parallel::MIN_PARALLEL_ELEMENTS,
    },
    ptx,
    simd::vectorize,
    stream::Stream,
    tensor::Tensor,
    with_float,
};

/// How one row is sampled.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Sampling {
    /// Divides the logits; 0, as good as 0 or less takes the most likely token, whatever the other fields say.
    pub temperature: f64,
    /// Most likely tokens to keep; 0 keeps all.
    pub top_k: usize,
    /// Probability to keep; 1 or more keeps all, 0 or less the most likely token.
    pub top_p: f64,
    /// Least probability to keep, as a share of the most likely token's; 0 or less keeps all, 1 or more those as likely as that one.
    pub min_p: f64,
    /// Seed of the request.
    pub seed: u64,
    /// Position in the sequence of the token that is chosen.
    pub position: u64,
}

impl Sampling {
    /// The most likely token.
    pub const GREEDY: Sampling = Sampling { temperature: 0.0, top_k: 0, top_p: 1.0, min_p: 0.0, seed: 0, position: 0 };

    /// 1 / temperature, a finite factor above 0 in any float, so that a logit of minus infinity has weight 0; `None` for the most
    /// likely token.
    pub(crate) fn inverse(&self) -> Option<f64> {
        let least = f64::from(f32::MIN_POSITIVE);
        let greedy = self.temperature < least || self.top_k == 1 || self.top_p <= 0.0;
        (!greedy).then(|| (1.0 / self.temperature).max(least))
    }

    /// The least (x - max) / temperature of a token that [`Sampling::min_p`] keeps: its logarithm, minus infinity for all.
    pub(crate) fn floor(&self) -> f64 {
        self.min_p.clamp(0.0, 1.0).ln()
    }
}

/// Assigns to tokens, U32 `[n]`, a choice from each row of logits [n, v]. A row with NaN, with infinity, or with nothing above
/// minus infinity fails the stream with [`Error::NotFinite`].
///
/// # Errors
/// If shapes differ, `rows` are not n, or a temperature, `top_p` or `min_p` is NaN.
pub fn forward(s: &mut Stream, logits: Tensor, rows: &[Sampling], tokens: Tensor) -> Result<()> {
    const OP: &str = "sampling";
    let (n, v) = (logits.rows(), logits.cols());
    expect_tensor(OP, "tokens", tokens, DType::U32, &[n])?;
    expect_that(OP, "logits", logits, rows.len() == n && v > 0, || format!("{} rows of tokens", rows.len()))?;
    for (row, sampling) in rows.iter().enumerate() {
        if [sampling.temperature, sampling.top_p, sampling.min_p].iter().any(|x| x.is_nan()) {
            return Err(not_finite(format!("temperature, top_p or min_p of row {row}"), f64::NAN));
        }
    }
    let kernels = |_: &Target| is_fast(logits).then(|| ptx::sampling::forward(logits, rows, tokens));
    let rows = rows.to_vec();
    s.launch_kernel(&[logits], &[tokens], kernels, move |m| {
        with_float!(logits.dtype, T => {
            let (logits, mut tokens) = (m.read::<T>(logits), m.write::<u32>(tokens));
            let choose = |(row, token): (usize, &mut u32)| *token = sample(&logits[row * v..][..v], row, rows[row]);
            if n * v <= MIN_PARALLEL_ELEMENTS {
                tokens.iter_mut().enumerate().for_each(choose);
            } else {
                tokens.par_iter_mut().enumerate().for_each(choose);
            }
        });
    });
    Ok(())
}

fn not_finite(tensor: String, value: f64) -> Error {
    Error::NotFinite { task: "sampling".into(), tensor, value }
}

/// What is said of a row that nothing can be drawn from.
pub(crate) fn unusable_logits(row: usize, value: f64) -> Error {
    not_finite(format!("logits of row {row}"), value)
}

fn sample<T: Float>(logits: &[T], row: usize, sampling: Sampling) -> u32 {
    let (best, max) = argmax(logits, row);
    let Some(inverse) = sampling.inverse() else { return best as u32 };
    let inverse = T::Acc::of_f64(inverse);
    let below = |x: T| (x.to_acc() - max) * inverse;
    let floor = T::Acc::of_f64(sampling.floor());
    let u: f64 = counter_rng(sampling.seed, 0, sampling.position).random();
    let unlimited = sampling.top_k == 0 || sampling.top_k >= logits.len();
    if unlimited && sampling.top_p >= 1.0 && sampling.min_p <= 0.0 {
        let weights: Vec<T::Acc> = vectorize(
            #[inline(always)]
            || logits.iter().map(|&x| below(x).exp_fast()).collect(),
        );
        return draw(&weights, u).map_or(best, |at| at) as u32;
    }
    let top_k = if unlimited { logits.len() } else { sampling.top_k };
    let (order, weights) = most_likely(logits, below, (top_k, sampling.top_p, floor));
    draw(&weights, u).map_or(best as u32, |at| order[at])
}

/// The largest logit and the first place it is at.
pub(super) fn argmax<T: Float>(logits: &[T], row: usize) -> (usize, T::Acc) {
    const LANES: usize = 16;
    let (max, nan) = vectorize(
        #[inline(always)]
        || {
            let (mut max, mut nan) = ([T::Acc::of_f64(f64::NEG_INFINITY); LANES], [false; LANES]);
            for chunk in logits.chunks(LANES) {
                for ((max, nan), x) in max.iter_mut().zip(&mut nan).zip(chunk) {
                    let x = x.to_acc();
                    *max = if x > *max { x } else { *max };
                    *nan |= x.is_nan();
                }
            }
            (max.into_iter().fold(max[0], |a, b| if b > a { b } else { a }), nan.contains(&true))
        },
    );
    match logits.iter().position(|x| x.to_acc() == max) {
        Some(best) if !nan && max.is_finite() => (best, max),
        _ => unusable_logits(row, if nan { f64::NAN } else { max.as_f64() }).raise(),
    }
}

/// Tokens that may be drawn, most likely first, and their weights: `top_k`, of these the share `top_p`, and of these what is not
/// `below` the floor. Only as much of the vocabulary is sorted as is needed.
fn most_likely<T: Float>(
    logits: &[T],
    below: impl Fn(T) -> T::Acc,
    (top_k, top_p, floor): (usize, f64, T::Acc),
) -> (Vec<u32>, Vec<T::Acc>) {
    let weight = |x: T| below(x).exp_fast();
    let ranks = |&a: &u32, &b: &u32| {
        let (x, y) = (logits[a as usize].to_acc(), logits[b as usize].to_acc());
        y.partial_cmp(&x).unwrap_or(std::cmp::Ordering::Equal).then(a.cmp(&b))
    };
    let mut order: Vec<u32> = (0..logits.len() as u32).collect();
    if top_k < order.len() {
        order.select_nth_unstable_by(top_k, ranks);
        order.truncate(top_k);
    }
    let sum = |tokens: &[u32]| tokens.iter().map(|&t| weight(logits[t as usize]).as_f64()).sum::<f64>();
    let wanted = if top_p < 1.0 { top_p * sum(&order) } else { f64::INFINITY };
    // Sort ever longer heads until one holds the wanted mass, or what is below the floor.
    let (mut sorted, mut mass) = (0, 0.0);
    while sorted < order.len() {
        let head = (sorted * 8).max(64).min(order.len());
        if head < order.len() {
            order[sorted..].select_nth_unstable_by(head - sorted, ranks);
        }
        order[sorted..head].sort_unstable_by(ranks);
        let ends = |&token: &u32| {
            let below = below(logits[token as usize]);
            let enough = mass >= wanted || below < floor;
            mass += below.exp_fast().as_f64();
            enough
        };
        match order[sorted..head].iter().position(ends) {
            Some(enough) => {
                order.truncate(sorted + enough);
                break;
            }
            None => sorted = head,
        }
    }
    let weights = order.iter().map(|&t| weight(logits[t as usize])).collect();
    (order, weights)
}

/// The first place where the running sum of weights passes `u` of the whole; never one of weight 0.
fn draw<A: Real>(weights: &[A], u: f64) -> Option<usize> {
    let total: f64 = weights.iter().map(|w| w.as_f64()).sum();
    let mut left = u * total;
    for (i, w) in weights.iter().enumerate() {
        left -= w.as_f64();
        if left < 0.0 {
            return Some(i);
        }
    }
    weights.iter().rposition(|&w| w > A::zero())
}

/// Cost over n rows of v logits; sorting is not counted.
pub fn cost(n: usize, v: usize, elem_bytes: usize) -> Cost {
    Cost::stream(4 * (n * v) as u64, (n * v * elem_bytes) as u64, 4 * n as u64)
}

#[cfg(test)]
mod tests {
    #![expect(clippy::unwrap_used, reason = "tests")]
    use super::*;
    use crate::ops::testing::*;

    const FREE: Sampling = Sampling { temperature: 1.0, top_k: 0, top_p: 1.0, min_p: 0.0, seed: 7, position: 0 };

    fn sample_all(logits: &[f32], v: usize, rows: &[Sampling]) -> Result<Vec<u32>> {
        let mut s = stream();
        let x = s.memory().from_slice(&[rows.len(), v], logits);
        let tokens = s.memory().alloc(DType::U32, &[rows.len()]);
        forward(&mut s, x, rows, tokens)?;
        s.synchronize()?;
        Ok(s.memory().download(tokens))
    }

    /// How often each token comes in `draws` positions of one row.
    fn frequencies(logits: &[f32], sampling: Sampling, draws: usize) -> Vec<f64> {
        let rows: Vec<Sampling> = (0..draws).map(|p| Sampling { position: p as u64, ..sampling }).collect();
        let mut counts = vec![0.0; logits.len()];
        let all: Vec<f32> = (0..draws).flat_map(|_| logits.iter().copied()).collect();
        for token in sample_all(&all, logits.len(), &rows).unwrap() {
            counts[token as usize] += 1.0;
        }
        counts.iter().map(|c| c / draws as f64).collect()
    }

    #[test]
    fn tokens_come_as_often_as_their_probability() {
        // Probabilities 0.4, 0.3, 0.2, 0.1 at temperature 1, in an order that is not theirs.
        let p = [0.2, 0.4, 0.1, 0.3f64];
        let logits: Vec<f32> = p.iter().map(|p| p.ln() as f32 + 3.0).collect();
        let hot: Vec<f64> = p.iter().map(|p| p.sqrt()).collect();
        let total: f64 = hot.iter().sum();
        for (name, sampling, want) in [
            ("temperature 1", FREE, p),
            ("temperature 2", Sampling { temperature: 2.0, ..FREE }, [0, 1, 2, 3].map(|i| hot[i] / total)),
            ("top-k 2", Sampling { top_k: 2, ..FREE }, [0.0, 4.0 / 7.0, 0.0, 3.0 / 7.0]),
            ("top-k beyond the vocabulary", Sampling { top_k: 9, ..FREE }, p),
            ("top-p 0.65 needs two", Sampling { top_p: 0.65, ..FREE }, [0.0, 4.0 / 7.0, 0.0, 3.0 / 7.0]),
            ("top-p 0.75 needs three", Sampling { top_p: 0.75, ..FREE }, [2.0 / 9.0, 4.0 / 9.0, 0.0, 3.0 / 9.0]),
            ("top-p is of what top-k left", Sampling { top_k: 2, top_p: 0.5, ..FREE }, [0.0, 1.0, 0.0, 0.0]),
            ("top-p 0", Sampling { top_p: 0.0, ..FREE }, [0.0, 1.0, 0.0, 0.0]),
            ("top-k 1", Sampling { top_k: 1, ..FREE }, [0.0, 1.0, 0.0, 0.0]),
            ("min-p 0.6 is of the likeliest", Sampling { min_p: 0.6, ..FREE }, [0.0, 4.0 / 7.0, 0.0, 3.0 / 7.0]),
            ("min-p 0.3 keeps three", Sampling { min_p: 0.3, ..FREE }, [2.0 / 9.0, 4.0 / 9.0, 0.0, 3.0 / 9.0]),
            ("min-p 0.2 keeps all", Sampling { min_p: 0.2, ..FREE }, p),
            ("min-p 1", Sampling { min_p: 1.0, ..FREE }, [0.0, 1.0, 0.0, 0.0]),
            ("min-p beyond 1", Sampling { min_p: 7.0, ..FREE }, [0.0, 1.0, 0.0, 0.0]),
            // Top-p keeps three; were it a share of what min-p leaves, two would do.
            ("min-p after top-p", Sampling { min_p: 0.4, top_p: 0.75, ..FREE }, [2.0 / 9.0, 4.0 / 9.0, 0.0, 3.0 / 9.0]),
            (
                "min-p is after temperature",
                Sampling { temperature: 2.0, min_p: 0.6, ..FREE },
                [hot[0] / (total - hot[2]), hot[1] / (total - hot[2]), 0.0, hot[3] / (total - hot[2])],
            ),
            ("almost cold", Sampling { temperature: 1e-9, ..FREE }, [0.0, 1.0, 0.0, 0.0]),
        ] {
            let got = frequencies(&logits, sampling, 20_000);
            for (i, (got, want)) in got.iter().zip(want).enumerate() {
                // Five standard deviations.
                let tolerance = 5.0 * (want * (1.0 - want) / 20_000.0).sqrt();
                assert!((got - want).abs() <= tolerance, "{name}: token {i} came {got}, expected {want}");
            }
        }
    }

    #[test]
    fn no_temperature_lets_in_what_is_forbidden() {
        let logits = [f32::NEG_INFINITY, 1.0, 2.0, f32::NEG_INFINITY, -40.0];
        for (temperature, want) in [(f64::INFINITY, 1.0 / 3.0), (1e300, 1.0 / 3.0), (1e-300, 0.0), (1e-46, 0.0)] {
            for (top_k, min_p) in [(0, 0.0), (4, 0.0), (0, 1e-9)] {
                let got = frequencies(&logits, Sampling { temperature, top_k, min_p, ..FREE }, 2000);
                let sampling = format!("temperature {temperature}, top_k {top_k}, min_p {min_p}: {got:?}");
                assert_eq!((got[0], got[3]), (0.0, 0.0), "{sampling}");
                assert!((got[1] - want).abs() < 0.06 && (got[4] - want).abs() < 0.06, "{sampling}");
            }
        }
    }

    #[test]
    fn greedy_takes_the_first_of_the_largest() {
        let logits = [1.0, 3.0, 3.0, f32::NEG_INFINITY, -5.0, -4.0, -4.5, -9.0];
        assert_eq!(sample_all(&logits, 4, &[Sampling::GREEDY; 2]).unwrap(), [1, 1]);
    }

    #[test]
    fn a_row_does_not_depend_on_its_batch() {
        let v = 5000;
        let logits: Vec<f32> = random(8 * v, 3).iter().map(|&x| 4.0 * x as f32).collect();
        let rows: Vec<Sampling> = (0..8)
            .map(|i| Sampling {
                seed: 5,
                position: i,
                top_p: [1.0, 0.9][i as usize % 2],
                top_k: [0, 40][i as usize / 4],
                min_p: [0.0, 0.02][i as usize / 2 % 2],
                ..FREE
            })
            .collect();
        let together = sample_all(&logits, v, &rows).unwrap();
        for (i, &token) in together.iter().enumerate() {
            assert_eq!(sample_all(&logits[i * v..][..v], v, &rows[i..=i]).unwrap(), [token], "row {i}");
        }
        let other: Vec<Sampling> = rows.iter().map(|r| Sampling { seed: 6, ..*r }).collect();
        assert_ne!(sample_all(&logits, v, &other).unwrap(), together);
    }

    #[test]
    fn the_nucleus_is_the_smallest_set_that_reaches_top_p() {
        // Flat enough that several rounds of sorting are needed.
        let logits = random(3000, 4);
        for (top_k, top_p, floor) in [
            (3000, 0.5, f64::NEG_INFINITY),
            (3000, 0.999, f64::NEG_INFINITY),
            (1000, 0.9, f64::NEG_INFINITY),
            (3000, 0.01, f64::NEG_INFINITY),
            (17, 1.0, f64::NEG_INFINITY),
            (3000, 1.0, 0.3),
            (3000, 0.6, 0.1),
            (3000, 0.1, -0.9),
        ] {
            let (order, weights) = most_likely(&logits, |x: f64| x, (top_k, top_p, floor));
            let mut want: Vec<u32> = (0..3000).collect();
            want.sort_by(|&a, &b| logits[b as usize].total_cmp(&logits[a as usize]));
            want.truncate(top_k);
            let total: f64 = want.iter().map(|&t| logits[t as usize].exp()).sum();
            let mut mass = 0.0;
            let enough = want.iter().position(|&t| {
                mass += logits[t as usize].exp();
                mass >= top_p * total
            });
            want.truncate(enough.map_or(top_k, |i| i + 1));
            want.retain(|&t| logits[t as usize] >= floor);
            assert_eq!(order, want, "top_k {top_k}, top_p {top_p}, floor {floor}");
            assert!(order.iter().zip(&weights).all(|(&t, &w)| w == logits[t as usize].exp_fast()));
        }
    }

    #[test]
    fn what_has_no_probability_is_never_drawn() {
        assert_eq!(draw(&[0.0, 1.0, 0.0], 0.0), Some(1));
        assert_eq!(draw(&[0.0, 1.0, 0.0], 1.0 - 1e-16), Some(1));
        assert_eq!(draw::<f64>(&[], 0.5), None);
    }

    #[test]
    fn logits_that_are_no_numbers_are_refused_with_their_row() {
        for (bad, fill) in [(f32::NAN, 0.0), (f32::INFINITY, 0.0), (f32::NEG_INFINITY, f32::NEG_INFINITY)] {
            let logits = [0.0, 1.0, 2.0, fill, bad, fill];
            for sampling in [FREE, Sampling::GREEDY] {
                let error = sample_all(&logits, 3, &[sampling; 2]).unwrap_err();
                assert!(matches!(&error, Error::NotFinite { tensor, .. } if tensor == "logits of row 1"), "{error}");
            }
        }
        for bad in [Sampling { temperature: f64::NAN, ..FREE }, Sampling { min_p: f64::NAN, ..FREE }] {
            let error = sample_all(&[0.0], 1, &[bad]).unwrap_err().to_string();
            assert!(error.contains("temperature, top_p or min_p of row 0"), "{error}");
        }
    }

    #[test]
    fn each_row_has_its_sampling() {
        let mut s = stream();
        let x = s.memory().alloc(DType::F32, &[2, 3]);
        let tokens = s.memory().alloc(DType::U32, &[2]);
        assert!(forward(&mut s, x, &[FREE], tokens).unwrap_err().to_string().contains("1 rows"));
    }
}
