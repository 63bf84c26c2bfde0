//! Steps of ranks that are processes, as listeners of the first see them: all ranks' spans, fetched between two steps.
//!
//! It is bounded. A fiftieth of a run's time goes into it at most; of steps in between listeners get the figures, and no spans. Of more
//! ranks than fit into a message, those that follow in number are fetched each time. With nobody listening nothing is fetched.

use std::time::Duration;

use bevy_ecs::prelude::*;
use kernels::{clock::now_nanos, comm::ClockOffset};
use serde::{Deserialize, Serialize};

use super::plugin::Control;
use crate::telemetry::{Detail, Telemetry, bytes};

/// Fetching may take one part of so many of a run's time.
const SHARE: u64 = 50;
/// What is fetched at a time, of all ranks together, if they send no more than any did before: half of what a listener elsewhere takes.
const MAX_BYTES: usize = 32 << 20;
/// What a task of a rank takes of it at most, before any was seen.
const BYTES_OF_TASK: usize = 128;
/// Clocks of hosts drift by some microseconds a second: after this long they are compared again.
const COMPARE_CLOCKS_AFTER: Duration = Duration::from_secs(600);

/// What the first rank fetches.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(super) struct Fetch {
    /// The first of so many ranks that follow each other; after the last one comes rank 1.
    first: u32,
    count: u32,
    /// All compare their clocks before.
    compares_clocks: bool,
}

impl Fetch {
    fn wants(&self, rank: u32, num_ranks: u32) -> bool {
        let num_others = num_ranks - 1;
        rank > 0 && (rank + num_others - self.first) % num_others < self.count
    }
}

/// When something was fetched, and what is next.
#[derive(Default)]
pub(super) struct Gather {
    not_before_nanos: u64,
    next_rank: u32,
    /// Of those that were fetched.
    max_bytes_of_rank: Option<usize>,
    clock: Option<(u64, ClockOffset)>,
}

impl Gather {
    /// What becomes of the step that begins, for `num_listeners`.
    pub fn detail(&self, num_listeners: usize) -> Detail {
        if num_listeners > 0 && now_nanos() >= self.not_before_nanos { Detail::Held } else { Detail::Figures }
    }

    /// On the first rank, which has so many tasks itself: what is to be fetched now.
    fn next(&mut self, num_ranks: u32, num_tasks: usize) -> Fetch {
        let num_others = num_ranks - 1;
        let bytes_of_rank = self.max_bytes_of_rank.unwrap_or(num_tasks * BYTES_OF_TASK);
        let count = (MAX_BYTES / bytes_of_rank.max(1)).clamp(1, num_others as usize) as u32;
        let first = self.next_rank.max(1);
        self.next_rank = (first - 1 + count) % num_others + 1;
        let is_old = |at: u64| u128::from(now_nanos() - at) >= COMPARE_CLOCKS_AFTER.as_nanos();
        Fetch { first, count, compares_clocks: self.clock.is_none_or(|(at, _)| is_old(at)) }
    }
}

/// What the first rank is to fetch of the step that it holds, if it holds one.
pub(super) fn next(world: &mut World) -> Option<Fetch> {
    let num_tasks = world.resource::<Telemetry>().held()?.spans.len();
    let mut control = world.resource_mut::<Control>();
    let num_ranks = control.comm.num_ranks();
    Some(control.gather.next(num_ranks, num_tasks))
}

/// Brings the steps that ranks hold to the first, which tells its listeners; all ranks call it.
///
/// # Errors
/// If a rank is lost.
pub(super) fn gather(world: &mut World, fetch: &Fetch) -> Result {
    let began = now_nanos();
    let own = world.resource_mut::<Telemetry>().take_held();
    let mut control = world.resource_mut::<Control>();
    let comm = control.comm.clone();
    if fetch.compares_clocks {
        control.gather.clock = Some((now_nanos(), comm.clock_offset()?));
    }
    let offset = control.gather.clock.map(|(_, offset)| offset).unwrap_or_default();
    let mine = match &own {
        Some(own) if fetch.wants(comm.rank(), comm.num_ranks()) => {
            // Values are those of the first.
            bytes::to_bytes(&own.tasks_by_clock(offset))?
        }
        _ => Vec::new(),
    };
    let all = comm.bytes_to_first(mine)?;
    let Some(own) = own.filter(|_| comm.rank() == 0) else { return Ok(()) };
    let mut parts = vec![own];
    for (rank, bytes) in all.iter().enumerate().filter(|(_, bytes)| !bytes.is_empty()) {
        match bytes::from_bytes(bytes) {
            Ok(snapshot) => parts.push(snapshot.into()),
            Err(error) => (control.note)(&format!("what rank {rank} told of a step cannot be read: {error}")),
        }
    }
    control.gather.max_bytes_of_rank = control.gather.max_bytes_of_rank.max(all.iter().map(Vec::len).max());
    world.resource::<Telemetry>().publish_parts(parts);
    let ended = now_nanos();
    world.resource_mut::<Control>().gather.not_before_nanos = ended + (ended - began) * (SHARE - 1);
    Ok(())
}

/// Brings the last step of a run to listeners, if it is held: nobody gives orders any more. All ranks whose run ended well call it.
///
/// # Errors
/// If a rank is lost.
pub fn tell_last_step(world: &mut World) -> Result {
    let Some(control) = world.get_resource::<Control>() else { return Ok(()) };
    let comm = control.comm.clone();
    let Some(fetch) = next(world) else { return Ok(()) };
    let fetches = comm.all_gather_bytes(serde_json::to_vec(&fetch)?)?;
    gather(world, &serde_json::from_slice(&fetches[0])?)
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    #[test]
    fn of_more_ranks_than_fit_each_has_its_turn() {
        const FIT: usize = MAX_BYTES / BYTES_OF_TASK;
        for (num_ranks, num_tasks, count) in [(5, FIT / 3, 3), (5, 1, 4), (2, 2 * FIT, 1), (9, 0, 8)] {
            let mut gather = Gather::default();
            let mut seen = BTreeSet::new();
            for _ in 0..(num_ranks - 1_u32).div_ceil(count) {
                let fetch = gather.next(num_ranks, num_tasks);
                let wanted: Vec<u32> = (0..num_ranks).filter(|&rank| fetch.wants(rank, num_ranks)).collect();
                assert_eq!(wanted.len(), count as usize, "{fetch:?}");
                seen.extend(wanted);
            }
            assert_eq!(seen, (1..num_ranks).collect(), "all but the first, which has its own");
        }
    }

    #[test]
    fn steps_are_held_for_who_listens_when_it_is_time() {
        let mut gather = Gather::default();
        assert_eq!((gather.detail(0), gather.detail(1)), (Detail::Figures, Detail::Held));
        gather.not_before_nanos = now_nanos() + 1_000_000_000_000;
        assert_eq!(gather.detail(1), Detail::Figures);
    }
}
