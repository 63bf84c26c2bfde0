//! Where a stream that holds tasks back, so that they are handed over as one and may be launched as one, is handed them.
//!
//! After a task that another stream waits for, or another rank; before one that waits for another stream; after the last; and after as
//! many as [`MOST_HELD`], so that a device does not wait long for its first. So nobody waits for a task that is held back while the host
//! goes on, and a graph's tasks need nothing from outside after it has begun.

use std::collections::BTreeMap;

use kernels::stream::Rendezvous;

/// Tasks that a stream holds back at most before they are handed over as one.
const MOST_HELD: usize = 64;

/// For each task, whether its stream is handed what it holds back once the task is launched.
pub(crate) fn hand_overs(deps: &[Vec<u32>], stream_of: &[u32], rendezvous: &[(u32, Rendezvous)]) -> Vec<bool> {
    let mut ends = vec![false; deps.len()];
    for &dep in deps.iter().flatten() {
        ends[dep as usize] = true;
    }
    for (task, _) in rendezvous {
        ends[*task as usize] = true;
    }
    // Of each stream, its last task so far and how many it holds back.
    let mut held: BTreeMap<u32, (usize, usize)> = BTreeMap::new();
    for (task, stream) in stream_of.iter().enumerate() {
        let (last, num) = held.entry(*stream).or_insert((task, 0));
        if !deps[task].is_empty() && *num > 0 {
            ends[*last] = true;
            *num = 0;
        }
        (*last, *num) = (task, *num + 1);
        ends[task] |= *num == MOST_HELD;
        if ends[task] {
            *num = 0;
        }
    }
    held.into_values().for_each(|(last, _)| ends[last] = true);
    ends
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Tasks by stream and what they wait for; those after which streams are handed what they hold.
    fn check(tasks: &[(u32, &[u32])], meets: &[u32], want: &[usize]) {
        let deps: Vec<Vec<u32>> = tasks.iter().map(|(_, deps)| deps.to_vec()).collect();
        let stream_of: Vec<u32> = tasks.iter().map(|(stream, _)| *stream).collect();
        let meets: Vec<_> = meets.iter().map(|task| (*task, Rendezvous::Send { to: 1, tag: 0 })).collect();
        let ends = hand_overs(&deps, &stream_of, &meets);
        let got: Vec<usize> = (0..ends.len()).filter(|task| ends[*task]).collect();
        assert_eq!(got, want, "{tasks:?}");
    }

    #[test]
    fn nobody_waits_for_what_is_held_back() {
        check(&[], &[], &[]);
        check(&[(0, &[]), (0, &[]), (0, &[])], &[], &[2]);
        // Another stream waits for task 1; task 5 waits for another stream, so 4 ends what is held.
        check(&[(0, &[]), (0, &[]), (0, &[]), (1, &[1]), (0, &[]), (0, &[3]), (0, &[])], &[], &[1, 3, 4, 6]);
        check(&[(0, &[]), (1, &[]), (0, &[]), (1, &[])], &[1], &[1, 2, 3]);
        check(&vec![(0, &[][..]); 2 * MOST_HELD + 3], &[], &[MOST_HELD - 1, 2 * MOST_HELD - 1, 2 * MOST_HELD + 2]);
    }
}
