//! Durations of tasks as a run measured them, to be simulated again: a prediction that knows the machine from the run itself.

use crate::telemetry::Span;

/// What each task takes by itself: the median over `steps` of its time less what it waited for other ranks. Of an even number
/// of steps it is the mean of the middle two, rounded down. Steps are of one graph, so that index `i` is one task in all.
///
/// # Panics
/// If the steps do not have the same number of tasks.
pub fn median_durations(steps: &[&[Span]]) -> Vec<u64> {
    let num_tasks = steps.first().map_or(0, |spans| spans.len());
    for spans in steps {
        assert_eq!(spans.len(), num_tasks, "expected steps of one graph, found different numbers of tasks");
    }
    let median = |task: usize| {
        let mut nanos: Vec<u64> = steps.iter().map(|spans| own_nanos(&spans[task])).collect();
        nanos.sort_unstable();
        nanos[(nanos.len() - 1) / 2].midpoint(nanos[nanos.len() / 2])
    };
    (0..num_tasks).map(median).collect()
}

/// Its time less what it waited for other ranks.
fn own_nanos(span: &Span) -> u64 {
    span.nanos().saturating_sub(span.wait_nanos)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::telemetry::tests::span;

    fn step(tasks: &[(u64, u64)]) -> Vec<Span> {
        let with_wait =
            |&(nanos, wait_nanos): &(u64, u64)| Span { wait_nanos, ..span("t", 0, "comm", 100, 100 + nanos) };
        tasks.iter().map(with_wait).collect()
    }

    #[test]
    fn waits_are_left_out_and_one_slow_step_does_not_matter() {
        let steps = [
            step(&[(10, 0), (50, 45)]),
            step(&[(12, 0), (7, 0)]),
            step(&[(900, 0), (900, 891)]),
            step(&[(13, 0), (20, 14)]),
        ];
        let of = |steps: &[Vec<Span>]| median_durations(&steps.iter().map(Vec::as_slice).collect::<Vec<_>>());
        assert_eq!(of(&steps[..1]), [10, 5]);
        assert_eq!(of(&steps[..3]), [12, 7]);
        assert_eq!(of(&steps), [12, 6], "12 and 13, 6 and 7");
        assert_eq!(of(&[]), [0; 0]);
    }

    #[test]
    #[should_panic(expected = "expected steps of one graph")]
    fn steps_of_different_graphs_are_refused() {
        median_durations(&[&step(&[(1, 0)]), &step(&[(1, 0), (1, 0)])]);
    }
}
