//! Idle time as people and programs read it: a table of causes, predicted beside measured, and the same as a document.

use std::collections::BTreeMap;

use serde::Serialize;

use crate::bubbles::{Accounting, BubbleCause};

/// Idle time of compute streams in a step, as in JSON.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct IdleReport {
    /// From begin to end of a step.
    pub step_secs: f64,
    /// Idle time over all time of compute streams.
    pub idle_fraction: f64,
    /// Seconds in a step, the mean over ranks; every cause, also those that did not occur.
    pub idle_secs_by_cause: BTreeMap<BubbleCause, f64>,
}

impl IdleReport {
    /// None if there is no compute stream.
    pub fn of(accounting: &Accounting) -> Option<Self> {
        let by_cause = BubbleCause::ALL.into_iter().map(|cause| (cause, accounting.mean_secs(cause)));
        Some(IdleReport {
            step_secs: accounting.step_secs(),
            idle_fraction: accounting.idle_fraction()?,
            idle_secs_by_cause: by_cause.collect(),
        })
    }
}

/// Causes of idle time by line, with seconds and percent of all time of compute streams for each of `columns`, which have
/// names. A step is the mean step, and a rank the mean rank; the last line names the rank that was idle most in the last column.
///
/// ```
/// # use engine::{bubbles::{Accounting, RankBubbles}, bubbles_table::table};
/// let ranks = vec![RankBubbles { busy_nanos: 1_500_000, idle_nanos: 500_000, ..RankBubbles::default() }];
/// let measured = Accounting { num_steps: 1, total_nanos: 2_000_000, ranks };
/// let text = table(&[("measured", &measured)]);
/// let idle = text.lines().find(|line| line.starts_with("  idle  ")).unwrap();
/// assert!(idle.split_whitespace().eq(["idle", "0.000500", "25.0"]));
/// ```
pub fn table(columns: &[(&str, &Accounting)]) -> String {
    let decimals = decimals(columns.iter().map(|(_, it)| it.step_secs()).fold(f64::INFINITY, f64::min));
    let mut text = format!("  {:18}", "idle time");
    for (name, _) in columns {
        text += &format!("  {:>12}  {:>11}", format!("{name} s"), format!("{name} %"));
    }
    text.push('\n');
    let mut line = |name: &str, secs: &dyn Fn(&Accounting) -> f64| {
        text += &format!("  {name:18}");
        for (_, accounting) in columns {
            let secs = secs(accounting);
            let whole = accounting.mean_idle_secs() + accounting.mean_busy_secs();
            let percent = if whole > 0.0 { 100.0 * secs / whole } else { 0.0 };
            text += &format!("  {secs:>12.decimals$}  {percent:>11.1}");
        }
        text.push('\n');
    };
    for cause in BubbleCause::ALL {
        line(&words(cause), &|accounting| accounting.mean_secs(cause));
    }
    line("idle", &Accounting::mean_idle_secs);
    line("busy", &Accounting::mean_busy_secs);
    text += &format!("  {:18}", "step");
    for (_, accounting) in columns {
        text += &format!("  {:>12.decimals$}  {:11}", accounting.step_secs(), "");
    }
    let mut text = format!("{}\n", text.trim_end());
    let last = columns.last().filter(|(_, accounting)| accounting.ranks.len() > 1);
    if let Some(worst) = last.and_then(|(_, accounting)| accounting.worst_rank()) {
        let (rank, percent) = (worst.rank, 100.0 * worst.idle_fraction());
        text += &format!("  rank {rank} was idle most, {percent:.1}% of its time\n");
    }
    text
}

/// As in a sentence.
fn words(cause: BubbleCause) -> String {
    match cause {
        BubbleCause::WarmUp => "warm-up".into(),
        BubbleCause::CoolDown => "cool-down".into(),
        other => other.name().replace('_', " "),
    }
}

/// Decimals that show a thousandth of `secs`, at least 3 and at most 9.
fn decimals(secs: f64) -> usize {
    if secs > 0.0 && secs.is_finite() { (3.0 - secs.log10().floor()).clamp(3.0, 9.0) as usize } else { 3 }
}

#[cfg(test)]
mod tests {
    #![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

    use super::*;
    use crate::bubbles::RankBubbles;

    fn rank(rank: u32, busy_millis: u64, by_cause: &[(BubbleCause, u64)]) -> RankBubbles {
        let by_cause: BTreeMap<_, _> = by_cause.iter().map(|&(cause, millis)| (cause, millis * 1_000_000)).collect();
        RankBubbles { rank, busy_nanos: busy_millis * 1_000_000, idle_nanos: by_cause.values().sum(), by_cause }
    }

    fn measured() -> Accounting {
        use BubbleCause::{CoolDown, Dependency, Straggler, WarmUp};
        let ranks = vec![
            rank(0, 300, &[(WarmUp, 20), (Dependency, 60), (CoolDown, 20)]),
            rank(1, 200, &[(WarmUp, 80), (Straggler, 120)]),
        ];
        Accounting { num_steps: 2, total_nanos: 400_000_000, ranks }
    }

    #[test]
    fn predicted_stands_beside_measured() {
        let predicted = Accounting {
            num_steps: 1,
            total_nanos: 160_000_000,
            ranks: vec![rank(0, 120, &[(BubbleCause::WarmUp, 40)]), rank(1, 120, &[(BubbleCause::CoolDown, 40)])],
        };
        let expected = "
  idle time            predicted s  predicted %    measured s   measured %
  warm-up                   0.0200         12.5        0.0250         12.5
  cool-down                 0.0200         12.5        0.0050          2.5
  dependency                0.0000          0.0        0.0150          7.5
  communication wait        0.0000          0.0        0.0000          0.0
  communication copy        0.0000          0.0        0.0000          0.0
  load imbalance            0.0000          0.0        0.0000          0.0
  straggler                 0.0000          0.0        0.0300         15.0
  launch                    0.0000          0.0        0.0000          0.0
  idle                      0.0400         25.0        0.0750         37.5
  busy                      0.1200         75.0        0.1250         62.5
  step                      0.1600                     0.2000
  rank 1 was idle most, 50.0% of its time
";
        let found = format!("\n{}", table(&[("predicted", &predicted), ("measured", &measured())]));
        assert_eq!(found, expected, "{found}");
    }

    #[test]
    fn measured_stands_alone() {
        let mut measured = measured();
        measured.ranks.truncate(1);
        let found = table(&[("measured", &measured)]);
        assert!(found.starts_with("  idle time             measured s   measured %\n"), "{found}");
        assert!(found.ends_with("  step                      0.2000\n"), "{found}");
        for secs in [f64::INFINITY, 0.0, 1e-20, 2.0, 1e6] {
            assert!((3..=9).contains(&decimals(secs)));
        }
        assert!(table(&[("measured", &Accounting::default())]).contains("idle"), "nothing ran, nothing breaks");
    }

    #[test]
    fn the_document_has_every_cause() {
        let document = serde_json::to_value(IdleReport::of(&measured()).unwrap()).unwrap();
        assert_eq!((document["step_secs"].as_f64(), document["idle_fraction"].as_f64()), (Some(0.2), Some(0.375)));
        let by_cause = document["idle_secs_by_cause"].as_object().unwrap();
        assert_eq!(by_cause.len(), BubbleCause::ALL.len());
        assert!((by_cause["straggler"].as_f64().unwrap() - 0.03).abs() < 1e-12);
        assert_eq!(IdleReport::of(&Accounting::default()), None);
    }
}
