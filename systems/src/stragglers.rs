//! Which rank is slow. Ranks of a step end together, whoever was late; what tells them apart is how much of the step each one worked.

use bevy_ecs::prelude::*;
use engine::telemetry::Telemetry;

/// Times the median at which a rank is worth a word.
const EXCESS: f64 = 1.25;
/// Steps in a row until it is said.
const NUM_STEPS: u32 = 10;

/// How long each rank worked in the steps so far.
#[derive(Resource, Clone, Debug, Default)]
pub struct Stragglers {
    slowest: usize,
    num_steps: u32,
}

impl Stragglers {
    /// Takes in the seconds that each rank's compute streams were busy in a step, by rank, and tells of them; a line, if one rank has
    /// stood out for some time. Stages of a pipeline need not have the same work: then a rank that stands out may only have more.
    pub fn take(&mut self, telemetry: &mut Telemetry, busy_secs: &[f64]) -> Option<String> {
        let (slowest, times_median) = slowest(busy_secs)?;
        telemetry.histogram("rank_busy_secs", busy_secs.to_vec());
        telemetry.scalar("slowest_rank", slowest as f64);
        telemetry.scalar("slowest_rank_times_median", times_median);
        if times_median < EXCESS || slowest != self.slowest {
            (self.slowest, self.num_steps) = (slowest, 0);
        }
        self.num_steps += u32::from(times_median >= EXCESS);
        (self.num_steps == NUM_STEPS).then(|| {
            format!(
                "rank {slowest} has worked {times_median:.2} times as long as the median rank for {NUM_STEPS} steps"
            )
        })
    }
}

/// The rank that worked longest, and how many times the median; none of a single rank.
fn slowest(busy_secs: &[f64]) -> Option<(usize, f64)> {
    let mut sorted = busy_secs.to_vec();
    sorted.sort_by(f64::total_cmp);
    // The lower one of two: of two ranks, the faster.
    let median = *sorted.get(sorted.len().checked_sub(1)? / 2)?;
    let (rank, most) = busy_secs.iter().copied().enumerate().max_by(|(_, a), (_, b)| a.total_cmp(b))?;
    (busy_secs.len() > 1 && median > 0.0).then(|| (rank, most / median))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_rank_that_stands_out_for_some_time_is_named_once() {
        let (mut stragglers, mut telemetry) = (Stragglers::default(), Telemetry::default());
        let mut said = Vec::new();
        let mut take = |busy: [f64; 4]| said.extend(stragglers.take(&mut telemetry, &busy));
        (0..9).for_each(|_| take([1.0, 1.1, 1.5, 1.0]));
        take([1.0, 1.0, 1.0, 1.0]);
        (0..25).for_each(|_| take([1.0, 1.0, 1.5, 1.0]));
        assert_eq!(said, ["rank 2 has worked 1.50 times as long as the median rank for 10 steps"]);
        assert_eq!(Stragglers::default().take(&mut telemetry, &[1.0]), None);
        assert_eq!(slowest(&[1.0, 3.0]), Some((1, 3.0)));
    }
}
