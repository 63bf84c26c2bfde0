//! The step under the cursor lacks what a view shows: which steps have it, and a button that goes to the nearest. A run's trace has
//! the tasks of a few steps only, and its log tells of all.

use egui::Ui;
use engine::telemetry::Snapshot;

use crate::desk::Desk;

/// Ranges of steps that are named; the rest is counted.
const MAX_RANGES: usize = 4;

/// Says that the step under the cursor has none of `what`, which steps have, and goes there if asked. Nothing if it has some.
pub fn ui(ui: &mut Ui, desk: &mut Desk, what: &str, has: impl Fn(&Snapshot) -> bool) -> bool {
    let Some((track, now)) = desk.main().zip(desk.now()).filter(|(_, now)| !has(now)) else { return false };
    let step = now.step;
    let steps: Vec<u64> = track.history.steps().filter(|step| has(step)).map(|snapshot| snapshot.step).collect();
    let mut target = None;
    ui.horizontal_wrapped(|ui| match nearest(&steps, step) {
        Some(at) => {
            let verb = if steps.len() == 1 { "step" } else { "steps" };
            let have = if steps.len() == 1 { "has" } else { "have" };
            ui.label(format!("step {step} has no {what}; {verb} {} {have}", ranges(&steps)));
            if ui.button(format!("Go to step {at}")).clicked() {
                target = Some(at);
            }
        }
        None => {
            ui.label(format!("step {step} has no {what}, and no other step that is kept has any"));
        }
    });
    if target.is_some() {
        desk.cursor.step = target;
    }
    true
}

/// The step nearest to `at`; of two, the later one.
fn nearest(steps: &[u64], at: u64) -> Option<u64> {
    steps.iter().rev().min_by_key(|step| step.abs_diff(at)).copied()
}

/// Steps in order as `3, 20 to 22`.
fn ranges(steps: &[u64]) -> String {
    let mut ranges: Vec<(u64, u64)> = Vec::new();
    for &step in steps {
        match ranges.last_mut() {
            Some((_, last)) if *last + 1 == step => *last = step,
            _ => ranges.push((step, step)),
        }
    }
    let name =
        |(first, last): &(u64, u64)| if first == last { first.to_string() } else { format!("{first} to {last}") };
    let mut names: Vec<String> = ranges.iter().take(MAX_RANGES).map(name).collect();
    let num_named: u64 = ranges.iter().take(MAX_RANGES).map(|(first, last)| last - first + 1).sum();
    let rest = steps.len() as u64 - num_named;
    if rest > 0 {
        names.push(format!("{rest} more"));
    }
    match names.split_last() {
        Some((last, before)) if !before.is_empty() => format!("{} and {last}", before.join(", ")),
        _ => names.concat(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn steps_are_named_in_ranges() {
        let check = |steps: &[u64], text: &str| assert_eq!(ranges(steps), text);
        check(&[7], "7");
        check(&[20, 21, 22], "20 to 22");
        check(&[3, 20, 21], "3 and 20 to 21");
        check(&[1, 3, 5, 7, 9, 11], "1, 3, 5, 7 and 2 more");
    }

    #[test]
    fn the_nearest_step_may_be_before_or_after() {
        let at = |step| nearest(&[3, 20, 22], step);
        assert_eq!([at(1), at(10), at(21), at(300)], [Some(3), Some(3), Some(22), Some(22)]);
        assert_eq!(nearest(&[], 1), None);
    }
}
