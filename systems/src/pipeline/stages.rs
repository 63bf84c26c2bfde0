//! Which layers are on which stage: balanced by cost, or as a user says.
//!
//! 61 layers do not divide by 16, and the first and the last stage have more to do than layers (embedding; head and MTP): the
//! slowest stage sets the pace, so it is what is made small.

use std::ops::Range;

/// What two sums of the same costs may differ by and still be the same.
const ROUNDING: f64 = 1e-9;

/// The layers of each stage, in order, such that the largest cost of a stage is as small as it can be. `weights` are the costs of
/// the layers, `first_extra` and `last_extra` what the first and the last stage have besides; any unit.
///
/// Found by dynamic programming over all partitions into runs of one layer or more. Among equally good ones the counts
/// are as equal as they can be, and then the earlier stages have fewer layers, since in most schedules they hold more activations.
///
/// # Panics
/// If there are fewer layers than stages, or no stages; [`explicit`] and [`check`] say so without a panic.
pub fn balance(weights: &[f64], first_extra: f64, last_extra: f64, num_stages: usize) -> Vec<Range<usize>> {
    let num_layers = weights.len();
    if let Err(error) = check(num_layers, num_stages) {
        panic!("{error}");
    }
    let mut sums = vec![0.0];
    sums.extend(weights.iter().scan(0.0, |sum, weight| {
        *sum += weight;
        Some(*sum)
    }));
    let cost = |stage: usize, layers: Range<usize>| {
        let first = if stage == 0 { first_extra } else { 0.0 };
        let last = if stage + 1 == num_stages { last_extra } else { 0.0 };
        sums[layers.end] - sums[layers.start] + first + last
    };
    // The least largest cost of the stages from `stage` on, over the layers from `layer` on.
    let largest = solve(num_layers, num_stages, |stage, layers, rest: f64| Some(cost(stage, layers).max(rest)));
    let Some((limit, _)) = largest else { return Vec::new() };
    let limit = limit + ROUNDING * limit.abs();
    // Among those within it, the least sum of squared counts.
    let even = solve(num_layers, num_stages, |stage, layers, rest: f64| {
        let count = layers.len() as f64;
        (cost(stage, layers) <= limit).then_some(count * count + rest)
    });
    even.map_or_else(Vec::new, |(_, ranges)| ranges)
}

/// The partition of least value, the first of them when fewer layers come first. `value` is that of a stage with
/// the layers given, followed by stages whose value is known; None where it must not be.
fn solve(
    num_layers: usize,
    num_stages: usize,
    value: impl Fn(usize, Range<usize>, f64) -> Option<f64>,
) -> Option<(f64, Vec<Range<usize>>)> {
    // best[layer]: of the stages after the one at hand, over the layers from `layer` on.
    let mut best: Vec<Option<f64>> = vec![None; num_layers + 1];
    best[num_layers] = Some(0.0);
    let mut ends = vec![vec![0; num_layers + 1]; num_stages];
    for stage in (0..num_stages).rev() {
        let mut here = vec![None; num_layers + 1];
        for layer in 0..num_layers {
            for (end, rest) in best.iter().enumerate().skip(layer + 1) {
                let Some(found) = rest.and_then(|rest| value(stage, layer..end, rest)) else { continue };
                if here[layer].is_none_or(|known| found < known) {
                    here[layer] = Some(found);
                    ends[stage][layer] = end;
                }
            }
        }
        best = here;
    }
    let mut layer = 0;
    let ranges = ends.iter().map(|ends| {
        let range = layer..ends[layer];
        layer = range.end;
        range
    });
    best[0].map(|value| (value, ranges.collect()))
}

/// Why layers cannot be on stages as asked.
#[derive(Clone, Debug, thiserror::Error, PartialEq, Eq)]
pub enum StagesError {
    /// No stages.
    #[error("expected 1 or more stages, found 0")]
    NoStages,
    /// A stage would be empty.
    #[error("{num_layers} layers are too few for {num_stages} stages; expected {num_layers} stages or fewer")]
    TooFewLayers {
        /// Layers of the model.
        num_layers: usize,
        /// Stages of the pipeline.
        num_stages: usize,
    },
    /// A user's counts.
    #[error(
        "expected {num_stages} counts, one a stage, of 1 or more, with the sum {num_layers}; \
         found {} counts with the sum {}{}: {counts:?}; valid would be {example:?}",
        counts.len(),
        counts.iter().fold(0, |sum: usize, count| sum.saturating_add(*count)),
        if counts.contains(&0) { ", one of them 0" } else { "" }
    )]
    Counts {
        /// As found.
        counts: Vec<usize>,
        /// Layers of the model.
        num_layers: usize,
        /// Stages of the pipeline.
        num_stages: usize,
        /// Counts that would do.
        example: Vec<usize>,
    },
}

/// Whether each of `num_stages` stages can have a layer.
///
/// # Errors
/// If not.
pub fn check(num_layers: usize, num_stages: usize) -> Result<(), StagesError> {
    match num_stages {
        0 => Err(StagesError::NoStages),
        _ if num_layers < num_stages => Err(StagesError::TooFewLayers { num_layers, num_stages }),
        _ => Ok(()),
    }
}

/// The layers of each stage by a user's counts.
///
/// # Errors
/// If they are not one count a stage, each 1 or more, with the number of layers as their sum.
pub fn explicit(counts: &[usize], num_layers: usize, num_stages: usize) -> Result<Vec<Range<usize>>, StagesError> {
    check(num_layers, num_stages)?;
    let sum = counts.iter().try_fold(0usize, |sum, count| sum.checked_add(*count));
    if counts.len() != num_stages || sum != Some(num_layers) || counts.contains(&0) {
        let (each, more) = (num_layers / num_stages, num_layers % num_stages);
        let example = (0..num_stages).map(|stage| each + usize::from(num_stages - stage <= more)).collect();
        return Err(StagesError::Counts { counts: counts.to_vec(), num_layers, num_stages, example });
    }
    Ok(counts
        .iter()
        .scan(0, |layer, count| {
            *layer += count;
            Some(*layer - count..*layer)
        })
        .collect())
}

#[cfg(test)]
mod tests {
    #![expect(clippy::unwrap_used, reason = "tests")]
    use super::*;

    fn counts(ranges: &[Range<usize>]) -> Vec<usize> {
        ranges.iter().map(Range::len).collect()
    }

    fn largest(weights: &[f64], extra: (f64, f64), ranges: &[Range<usize>]) -> f64 {
        let cost = |(stage, range): (usize, &Range<usize>)| {
            let first = if stage == 0 { extra.0 } else { 0.0 };
            let last = if stage + 1 == ranges.len() { extra.1 } else { 0.0 };
            weights[range.clone()].iter().sum::<f64>() + first + last
        };
        ranges.iter().enumerate().map(cost).fold(0.0, f64::max)
    }

    /// All partitions into `num_stages` runs, by trying.
    fn all(num_layers: usize, num_stages: usize) -> Vec<Vec<usize>> {
        if num_stages == 1 {
            return vec![vec![num_layers]];
        }
        let with_first = |first: usize| {
            all(num_layers - first, num_stages - 1).into_iter().map(move |rest| [vec![first], rest].concat())
        };
        (1..=num_layers + 1 - num_stages).flat_map(with_first).collect()
    }

    #[test]
    fn sixty_one_layers_on_sixteen_stages() {
        let ranges = balance(&[1.0; 61], 0.0, 0.0, 16);
        assert_eq!(counts(&ranges), [3, 3, 3, 4, 4, 4, 4, 4, 4, 4, 4, 4, 4, 4, 4, 4]);
        // A head that costs as much as a layer and a half, and MTP, a layer more, take layers off the last stage.
        let ranges = balance(&[1.0; 61], 0.1, 2.5, 16);
        assert_eq!(counts(&ranges), [4, 4, 4, 4, 4, 4, 4, 4, 4, 4, 4, 4, 4, 4, 4, 1]);
        assert_eq!(largest(&[1.0; 61], (0.1, 2.5), &ranges), 4.1);
        assert_eq!((ranges[0].clone(), ranges[15].clone()), (0..4, 60..61));
    }

    #[test]
    fn cheap_layers_share_a_stage() {
        // Three dense layers at half the cost of the others.
        let weights = [[0.5; 3].as_slice(), &[1.0; 9]].concat();
        assert_eq!(counts(&balance(&weights, 0.0, 0.0, 4)), [3, 3, 3, 3]);
        assert_eq!(counts(&balance(&weights, 0.0, 1.0, 4)), [4, 3, 3, 2]);
    }

    #[test]
    fn no_partition_is_better() {
        let mut state = 1u32;
        let mut random = || {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            f64::from(state >> 28) + 1.0
        };
        for case in 0..200 {
            let (num_layers, num_stages) = (5 + case % 5, 1 + case % 5);
            let weights: Vec<f64> = (0..num_layers).map(|_| random()).collect();
            let extra = (random(), random());
            let found = balance(&weights, extra.0, extra.1, num_stages);
            let quality = |ranges: &[Range<usize>]| {
                (largest(&weights, extra, ranges), counts(ranges).iter().map(|n| n * n).sum::<usize>(), counts(ranges))
            };
            let tried = all(num_layers, num_stages).into_iter();
            let tried = tried.map(|counts| quality(&explicit(&counts, num_layers, num_stages).unwrap()));
            let best = tried.min_by(|a, b| a.partial_cmp(b).unwrap()).unwrap();
            assert_eq!(quality(&found), best, "{weights:?} {extra:?}");
        }
    }

    #[test]
    fn rounding_does_not_decide() {
        let ranges = balance(&[0.1; 12], 0.0, 0.0, 5);
        assert_eq!(counts(&ranges), [2, 2, 2, 3, 3]);
    }

    #[test]
    fn counts_of_a_user_must_fit() {
        assert_eq!(explicit(&[2, 3], 5, 2), Ok(vec![0..2, 2..5]));
        for (bad, said) in [
            (vec![2, 2], "found 2 counts with the sum 4: [2, 2]; valid would be [2, 3]"),
            (vec![5], "found 1 counts with the sum 5: [5]; valid would be [2, 3]"),
            (vec![5, 0], "found 2 counts with the sum 5, one of them 0: [5, 0]; valid would be [2, 3]"),
            (vec![usize::MAX, 6], "valid would be [2, 3]"),
        ] {
            let error = explicit(&bad, 5, 2).unwrap_err().to_string();
            assert!(error.starts_with("expected 2 counts, one a stage, of 1 or more, with the sum 5"), "{error}");
            assert!(error.ends_with(said), "{error}");
        }
        let too_few = "3 layers are too few for 4 stages; expected 3 stages or fewer";
        assert_eq!(explicit(&[1, 1, 1, 1], 3, 4).unwrap_err().to_string(), too_few);
        assert_eq!(check(3, 0), Err(StagesError::NoStages));
    }
}
