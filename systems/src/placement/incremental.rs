//! Following a load that drifts by moving few experts, since each costs the bytes of its weights on the network, and a
//! placement made anew moves nearly all.
//!
//! Each layer is improved step by step, and where the path stands after so many moves is kept. Which layer may go how far
//! is then exact: of all choices that stay within the moves allowed, the one with the least load to wait for.

use rayon::prelude::*;
use serde::Serialize;

use super::{Placement, PlacementError, search::Layer};
use crate::problem::Problem;

/// Weights of an expert to copy into a slot. All copies read what was there before any of them.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct Move {
    /// Layer, by index.
    pub layer: usize,
    /// Expert to copy.
    pub expert: usize,
    /// Slot to copy from, of the placement before.
    pub from_slot: usize,
    /// Its rank.
    pub from_rank: usize,
    /// Slot to copy to.
    pub to_slot: usize,
    /// Its rank.
    pub to_rank: usize,
}

/// A placement and the way to it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Plan {
    /// Where experts are afterwards.
    pub placement: Placement,
    /// Copies between ranks, by layer and slot; what stays on its rank stays in its slot.
    pub moves: Vec<Move>,
    /// How many copies.
    pub num_moved: usize,
}

impl Plan {
    /// Bytes between ranks, at `expert_bytes` for one expert of one layer.
    pub fn num_bytes(&self, expert_bytes: u64) -> u64 {
        self.num_moved as u64 * expert_bytes
    }
}

/// A layer with at most this max over mean is left alone.
pub const BALANCED: f64 = 1.01;

/// A move that takes less than this share of the mean rank load off a rank is not made.
const WORTH_MOVING: f64 = 0.002;

/// A place that a layer can get to.
struct Place {
    num_moves: usize,
    max: f64,
    slots: Vec<usize>,
}

/// Improves `current` for `load` `[layer][expert]` by at most `max_moves` copies of weights. The greatest rank loads' sum over the
/// layers is never above that of `current`, and more moves never make it greater.
///
/// # Errors
/// If the load is not of the placement's layers and experts.
pub fn improve(current: &Placement, load: &[Vec<f64>], max_moves: usize) -> Result<Plan, PlacementError> {
    current.check_load(load)?;
    let layers: Vec<_> = load.iter().zip(&current.physical_to_expert).collect();
    let paths: Vec<Vec<Place>> =
        layers.into_par_iter().map(|(load, slots)| path(load, slots, current.num_ranks)).collect();
    let slots = choose(&paths, max_moves).into_iter().zip(paths).map(|(i, mut path)| path.swap_remove(i).slots);
    let target = Placement::new(slots.collect(), current.num_experts(), current.num_ranks)?;
    migrate(current, &target)
}

/// The way from `current` to `target`. The plan's placement has each rank's experts as `target` has them, in slots such that what
/// stays on a rank stays in its slot.
///
/// # Errors
/// If the two differ in layers, experts, slots or ranks.
pub fn migrate(current: &Placement, target: &Placement) -> Result<Plan, PlacementError> {
    let sizes = |p: &Placement| [p.num_layers(), p.num_experts(), p.num_slots(), p.num_ranks];
    let mut problems = Vec::new();
    for ((name, is), wanted) in
        ["layers", "experts", "slots", "ranks"].into_iter().zip(sizes(target)).zip(sizes(current))
    {
        if is != wanted {
            problems
                .push(Problem::new("placement", format!("expected {wanted} {name} as in the current one, found {is}")));
        }
    }
    PlacementError::unless_none(problems)?;
    let layers = current.physical_to_expert.iter().zip(&target.physical_to_expert);
    let slots = layers.map(|(before, after)| settle(before, after, current.slots_per_rank())).collect();
    let placement = Placement::new(slots, current.num_experts(), current.num_ranks)?;
    let moves = moves(current, &placement);
    Ok(Plan { num_moved: moves.len(), placement, moves })
}

/// `after`'s experts on each rank, in `before`'s slots if they were on the rank, else in what slots are left, in order.
fn settle(before: &[usize], after: &[usize], slots_per_rank: usize) -> Vec<usize> {
    let mut settled = Vec::with_capacity(before.len());
    for (before, after) in before.chunks(slots_per_rank).zip(after.chunks(slots_per_rank)) {
        let mut coming = after.to_vec();
        let stays = |expert: &usize| {
            let i = coming.iter().position(|other| other == expert)?;
            Some(coming.remove(i))
        };
        let kept: Vec<Option<usize>> = before.iter().map(stays).collect();
        let mut coming = coming.into_iter();
        settled.extend(kept.into_iter().filter_map(|kept| kept.or_else(|| coming.next())));
    }
    settled
}

/// Copies that lead from one placement to another. Of an expert's slots, that of the rank which has sent least in this
/// layer is read.
fn moves(current: &Placement, next: &Placement) -> Vec<Move> {
    let mut moves = Vec::new();
    for (layer, (before, after)) in current.physical_to_expert.iter().zip(&next.physical_to_expert).enumerate() {
        let mut num_sent = vec![0; current.num_ranks];
        for (to_slot, (_, &expert)) in
            before.iter().zip(after).enumerate().filter(|(_, (before, after))| before != after)
        {
            let sources = current.expert_to_physical[layer][expert].iter().copied();
            // Every expert has a slot.
            let Some(from_slot) = sources.min_by_key(|&slot| num_sent[current.rank_of(slot)]) else { continue };
            let (from_rank, to_rank) = (current.rank_of(from_slot), current.rank_of(to_slot));
            num_sent[from_rank] += 1;
            moves.push(Move { layer, expert, from_slot, from_rank, to_slot, to_rank });
        }
    }
    moves
}

/// Where one layer can get to by so many moves, its beginning first; each place has more moves and a lower greatest load than the
/// one before. The path does not depend on how many moves are allowed.
fn path(load: &[f64], current: &[usize], num_ranks: usize) -> Vec<Place> {
    let mut layer = Layer::new(load, current.to_vec(), num_ranks, num_ranks);
    let mean = layer.mean();
    let slots_per_rank = current.len() / num_ranks;
    let mut path = vec![Place { num_moves: 0, max: layer.max(), slots: current.to_vec() }];
    // Steps that undo each other's copies may make many of them; twice as many as slots is more than a new placement needs.
    for _ in 0..2 * current.len() {
        if layer.max() <= BALANCED * mean {
            break;
        }
        let Some(action) = layer.step(WORTH_MOVING * mean) else { break };
        layer.apply(action);
        let settled = settle(current, &layer.slots, slots_per_rank);
        let num_moves = settled.iter().zip(current).filter(|(after, before)| after != before).count();
        let max = layer.max();
        // Steps may bring several ranks down that were equally loaded; only the last of them shows.
        if path.last().is_some_and(|last| max < last.max) {
            path.retain(|place| place.num_moves < num_moves);
            path.push(Place { num_moves, max, slots: settled });
        }
    }
    path
}

/// The place to take on each path: the least sum of greatest loads with at most `max_moves` in all, and of equal ones that with the
/// fewest moves.
fn choose(paths: &[Vec<Place>], max_moves: usize) -> Vec<usize> {
    let most: usize = paths.iter().filter_map(|path| path.last()).map(|place| place.num_moves).sum();
    if most <= max_moves {
        return paths.iter().map(|path| path.len() - 1).collect();
    }
    // least[m]: the least sum over the layers so far with at most m moves; taken[layer][m]: the place that gives it.
    let mut least = vec![0.0; max_moves + 1];
    let mut taken = Vec::with_capacity(paths.len());
    for path in paths {
        let mut next = vec![f64::INFINITY; max_moves + 1];
        let mut taken_here = vec![0; max_moves + 1];
        for (i, place) in path.iter().enumerate() {
            for (num_moves, next) in next.iter_mut().enumerate().skip(place.num_moves) {
                let sum = least[num_moves - place.num_moves] + place.max;
                if sum < *next {
                    *next = sum;
                    taken_here[num_moves] = i;
                }
            }
        }
        least = next;
        taken.push(taken_here);
    }
    let mut left = max_moves;
    let mut chosen: Vec<usize> = Vec::with_capacity(paths.len());
    for (path, taken) in paths.iter().zip(&taken).rev() {
        chosen.push(taken[left]);
        left -= path[taken[left]].num_moves;
    }
    chosen.reverse();
    chosen
}
