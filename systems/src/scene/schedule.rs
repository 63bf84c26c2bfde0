//! Learning rates as pure functions of the step. Steps count from 0 and step `s` uses `lr_at(s)`: the first step of a
//! warm-up is already above 0, the last one has the peak, and the last step of a run has the final rate exactly.
use serde::{Deserialize, Serialize};

/// The `schedule` section.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub enum Schedule {
    /// Linear warm-up, then constant, then a linear decay over the last steps.
    WarmupStableDecay(WarmupStableDecay),
    /// Linear warm-up, then half a cosine down to the last step.
    Cosine(Cosine),
    /// The same in every step.
    Constant(Constant),
}

/// Warm-up, stable, decay.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct WarmupStableDecay {
    /// Highest learning rate.
    pub peak_lr: f64,
    /// First steps, in which it rises.
    #[serde(default)]
    pub warmup_steps: u64,
    /// Last steps, in which it falls.
    pub decay_steps: u64,
    /// Rate of the last step, as a share of the peak.
    #[serde(default = "default_final_lr_ratio")]
    pub final_lr_ratio: f64,
}

/// Warm-up and cosine.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Cosine {
    /// Highest learning rate.
    pub peak_lr: f64,
    /// First steps, in which it rises.
    #[serde(default)]
    pub warmup_steps: u64,
    /// Rate of the last step, as a share of the peak.
    #[serde(default = "default_final_lr_ratio")]
    pub final_lr_ratio: f64,
}

/// No change.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Constant {
    /// Learning rate.
    pub lr: f64,
}

fn default_final_lr_ratio() -> f64 {
    0.1
}

impl Schedule {
    /// Learning rate of step `step` in a run of `total_steps`. From `total_steps` on it stays.
    pub fn lr_at(&self, step: u64, total_steps: u64) -> f64 {
        match self {
            Schedule::Constant(Constant { lr }) => *lr,
            Schedule::WarmupStableDecay(s) => {
                let down = share_done(step, total_steps.saturating_sub(s.decay_steps), total_steps);
                s.peak_lr * warmup(step, s.warmup_steps) * (1.0 - (1.0 - s.final_lr_ratio) * down)
            }
            Schedule::Cosine(s) => {
                let down = (1.0 - (std::f64::consts::PI * share_done(step, s.warmup_steps, total_steps)).cos()) / 2.0;
                s.peak_lr * warmup(step, s.warmup_steps) * (1.0 - (1.0 - s.final_lr_ratio) * down)
            }
        }
    }
}

fn warmup(step: u64, warmup_steps: u64) -> f64 {
    if step < warmup_steps { (step + 1) as f64 / warmup_steps as f64 } else { 1.0 }
}

/// How much of the steps `start..end` is done with step `step`: 0 before, 1 in the last of them and after. Nothing is
/// ever done of no steps.
fn share_done(step: u64, start: u64, end: u64) -> f64 {
    match step {
        step if step < start || start >= end => 0.0,
        step if step + 1 >= end => 1.0,
        step => (step + 1 - start) as f64 / (end - start) as f64,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn wsd(warmup_steps: u64, decay_steps: u64, final_lr_ratio: f64) -> Schedule {
        Schedule::WarmupStableDecay(WarmupStableDecay { peak_lr: 2.0, warmup_steps, decay_steps, final_lr_ratio })
    }

    fn cosine(warmup_steps: u64, final_lr_ratio: f64) -> Schedule {
        Schedule::Cosine(Cosine { peak_lr: 2.0, warmup_steps, final_lr_ratio })
    }

    #[track_caller]
    fn check(schedule: &Schedule, total_steps: u64, expected: &[f64]) {
        for (step, expected) in expected.iter().enumerate() {
            let found = schedule.lr_at(step as u64, total_steps);
            assert!((found - expected).abs() < 1e-12, "{schedule:?} step {step}: {found}, expected {expected}");
        }
    }

    #[test]
    fn constant_never_changes() {
        check(&Schedule::Constant(Constant { lr: 0.5 }), 3, &[0.5, 0.5, 0.5, 0.5]);
    }

    #[test]
    fn warmup_stable_decay_rises_stays_and_falls_to_the_final_rate() {
        check(&wsd(4, 4, 0.0), 10, &[0.5, 1.0, 1.5, 2.0, 2.0, 2.0, 1.5, 1.0, 0.5, 0.0, 0.0]);
        check(&wsd(0, 2, 0.5), 4, &[2.0, 2.0, 1.5, 1.0, 1.0]);
        check(&wsd(0, 0, 0.5), 3, &[2.0, 2.0, 2.0, 2.0]);
        check(&wsd(2, 2, 0.0), 4, &[1.0, 2.0, 1.0, 0.0]);
    }

    #[test]
    fn cosine_passes_half_way_in_the_middle() {
        check(&cosine(0, 0.0), 4, &[1.0 + 0.5_f64.sqrt(), 1.0, 1.0 - 0.5_f64.sqrt(), 0.0, 0.0]);
        check(&cosine(2, 0.5), 4, &[1.0, 2.0, 1.5, 1.0, 1.0]);
    }

    #[test]
    fn a_run_of_no_steps_has_a_rate() {
        for schedule in [wsd(3, 9, 0.1), cosine(3, 0.1)] {
            assert!(schedule.lr_at(0, 0).is_finite());
        }
    }
}
