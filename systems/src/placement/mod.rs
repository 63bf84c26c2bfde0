//! Which rank holds which experts. Experts that many tokens choose make their rank the slowest, and every other rank waits
//! for it; so loaded experts are held by several ranks, and light ones share a rank with loaded ones.
//!
//! All of it is pure functions from loads to plain data. A layer is placed by itself, as all ranks meet after each.
//!
//! Loads are per layer and expert, in any unit (tokens, shares). A *slot* is a place for one expert on a rank; rank `r` of
//! `n` has the slots `r * num_slots / n .. (r + 1) * num_slots / n`. An expert in several slots has *replicas*, and each
//! gets the same share of its tokens.

pub mod eplb;
pub mod incremental;
pub mod load;
pub mod policy;
pub mod report;
mod search;

use std::{collections::BTreeSet, fmt};

use kernels::comm::shares;
use serde::{Deserialize, Serialize};

use crate::problem::Problem;

/// Experts on slots, for each layer.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "Slots")]
pub struct Placement {
    /// `[layer][slot]`: the expert in a slot.
    pub physical_to_expert: Vec<Vec<usize>>,
    /// `[layer][expert]`: the slots of an expert, in rising order.
    pub expert_to_physical: Vec<Vec<Vec<usize>>>,
    /// `[layer][expert]`: how many slots an expert has.
    pub num_replicas_of: Vec<Vec<usize>>,
    /// Ranks that the slots are dealt to.
    pub num_ranks: usize,
}

/// What a [`Placement`] is read from; all else follows.
#[derive(Deserialize)]
struct Slots {
    physical_to_expert: Vec<Vec<usize>>,
    num_ranks: usize,
}

impl TryFrom<Slots> for Placement {
    type Error = PlacementError;

    fn try_from(slots: Slots) -> Result<Self, PlacementError> {
        let num_experts = slots.physical_to_expert.iter().flatten().max().map_or(0, |last| last + 1);
        Placement::new(slots.physical_to_expert, num_experts, slots.num_ranks)
    }
}

impl Placement {
    /// The placement with `physical_to_expert` `[layer][slot]` of `num_experts` on `num_ranks`.
    ///
    /// # Errors
    /// If there are no slots, layers differ in how many they have, ranks would, or an expert has none or is not one.
    pub fn new(
        physical_to_expert: Vec<Vec<usize>>,
        num_experts: usize,
        num_ranks: usize,
    ) -> Result<Self, PlacementError> {
        let num_slots = physical_to_expert.first().map_or(0, Vec::len);
        let mut problems = Vec::new();
        if num_slots == 0 {
            problems.push(Problem::new("physical_to_expert", "expected layers with slots, found none"));
        }
        if num_ranks == 0 || !num_slots.is_multiple_of(num_ranks) {
            let message = format!("is {num_ranks}, but a layer has {num_slots} slots, and all ranks have equally many");
            problems.push(Problem::new("num_ranks", message).help(nearest_divisors(num_slots, num_ranks)));
        }
        let mut expert_to_physical = Vec::with_capacity(physical_to_expert.len());
        for (layer, slots) in physical_to_expert.iter().enumerate() {
            let path = format!("physical_to_expert[{layer}]");
            if slots.len() != num_slots {
                let message = format!("expected {num_slots} slots as in layer 0, found {}", slots.len());
                problems.push(Problem::new(&path, message));
            }
            let mut of_expert = vec![Vec::new(); num_experts];
            for (slot, &expert) in slots.iter().enumerate() {
                match of_expert.get_mut(expert) {
                    Some(of_expert) => of_expert.push(slot),
                    None => problems.push(Problem::new(
                        format!("{path}[{slot}]"),
                        format!("expected one of {num_experts} experts, counted from 0, found {expert}"),
                    )),
                }
            }
            for (expert, _) in of_expert.iter().enumerate().filter(|(_, slots)| slots.is_empty()) {
                problems.push(Problem::new(&path, format!("expected each expert in a slot, found {expert} in none")));
            }
            expert_to_physical.push(of_expert);
        }
        PlacementError::unless_none(problems)?;
        let num_replicas_of = expert_to_physical.iter().map(|layer| layer.iter().map(Vec::len).collect()).collect();
        Ok(Placement { physical_to_expert, expert_to_physical, num_replicas_of, num_ranks })
    }

    /// Layers placed.
    pub fn num_layers(&self) -> usize {
        self.physical_to_expert.len()
    }

    /// Experts of a layer.
    pub fn num_experts(&self) -> usize {
        self.num_replicas_of.first().map_or(0, Vec::len)
    }

    /// Slots of a layer, over all ranks.
    pub fn num_slots(&self) -> usize {
        self.physical_to_expert.first().map_or(0, Vec::len)
    }

    /// Slots of a layer on one rank.
    pub fn slots_per_rank(&self) -> usize {
        self.num_slots() / self.num_ranks
    }

    /// The rank that a slot is on.
    pub fn rank_of(&self, slot: usize) -> usize {
        slot / self.slots_per_rank()
    }

    /// `[rank]`: what comes to each rank in `layer` if its experts have `load` `[expert]`.
    pub fn rank_loads(&self, layer: usize, load: &[f64]) -> Vec<f64> {
        let share = |&expert: &usize| load[expert] / self.num_replicas_of[layer][expert] as f64;
        let ranks = self.physical_to_expert[layer].chunks(self.slots_per_rank());
        ranks.map(|experts| experts.iter().map(share).sum()).collect()
    }

    /// The most loaded rank's load in `layer` over the mean, if its experts have `load` `[expert]`. 1 is balanced.
    pub fn rank_imbalance(&self, layer: usize, load: &[f64]) -> f64 {
        max_over_mean(&self.rank_loads(layer, load))
    }

    /// Slots of `layer` whose expert an earlier slot of the same rank holds too: memory that serves nothing.
    pub fn num_duplicates(&self, layer: usize) -> usize {
        let ranks = self.physical_to_expert[layer].chunks(self.slots_per_rank());
        ranks.map(|experts| experts.len() - experts.iter().collect::<BTreeSet<_>>().len()).sum()
    }

    /// Checks that `load` `[layer][expert]` is of these layers and experts.
    ///
    /// # Errors
    /// All that is wrong with it.
    pub fn check_load(&self, load: &[Vec<f64>]) -> Result<(), PlacementError> {
        let mut problems = check_load(load);
        if load.len() != self.num_layers() {
            let message = format!("expected {} layers as placed, found {}", self.num_layers(), load.len());
            problems.push(Problem::new("load", message));
        }
        if let Some(first) = load.first().filter(|first| first.len() != self.num_experts()) {
            let message = format!("expected {} experts as placed, found {}", self.num_experts(), first.len());
            problems.push(Problem::new("load[0]", message));
        }
        PlacementError::unless_none(problems)
    }
}

/// The greatest over the mean: how many times as long as balanced the ranks of one step take. 1 if there is no load.
pub fn max_over_mean(loads: &[f64]) -> f64 {
    let total: f64 = loads.iter().sum();
    if total > 0.0 { loads.iter().copied().fold(0.0, f64::max) * loads.len() as f64 / total } else { 1.0 }
}

/// Max over mean if `load` `[expert]` lies on `num_ranks` (above 0) as the experts of a run do ([`shares`]): in order, without
/// replicas. If ranks do not divide experts, some have one expert more, and even routing is uneven over ranks.
pub fn contiguous_imbalance(load: &[f64], num_ranks: usize) -> f64 {
    let of_rank = |rank| load[shares::experts_of(rank, num_ranks, load.len())].iter().sum();
    max_over_mean(&(0..num_ranks).map(of_rank).collect::<Vec<f64>>())
}

/// The sizes do not fit, or a load is none. All findings at once.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PlacementError {
    /// By argument, with the nearest valid values.
    pub problems: Vec<Problem>,
}

impl PlacementError {
    fn unless_none(problems: Vec<Problem>) -> Result<(), Self> {
        if problems.is_empty() { Ok(()) } else { Err(PlacementError { problems }) }
    }
}

impl fmt::Display for PlacementError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (i, problem) in self.problems.iter().enumerate() {
            let break_line = if i > 0 { "\n" } else { "" };
            write!(f, "{break_line}{} {}", problem.path, problem.message)?;
            if let Some(help) = &problem.help {
                write!(f, ": {help}")?;
            }
        }
        Ok(())
    }
}

impl std::error::Error for PlacementError {}

/// What an expert placement is to be cut into.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct Sizes {
    /// Slots of a layer over all ranks: experts and their replicas.
    pub num_replicas: usize,
    /// Groups of consecutive experts that routing chooses among first (`n_group`); 1 if it does not.
    pub num_groups: usize,
    /// Nodes, each of equally many consecutive ranks.
    pub num_nodes: usize,
    /// Ranks over all nodes.
    pub num_ranks: usize,
}

impl Sizes {
    /// Whether groups of experts can stay whole on nodes.
    pub fn is_hierarchical(&self) -> bool {
        self.num_groups.is_multiple_of(self.num_nodes)
    }

    /// All that is wrong with these sizes for `num_experts`.
    fn problems(&self, num_experts: usize) -> Vec<Problem> {
        let Sizes { num_replicas, num_groups, num_nodes, num_ranks } = *self;
        let mut problems = Vec::new();
        for (name, value) in [("num_groups", num_groups), ("num_nodes", num_nodes), ("num_ranks", num_ranks)] {
            if value == 0 {
                problems.push(Problem::new(name, "is 0").help("1 or more"));
            }
        }
        if num_replicas < num_experts || !num_replicas.is_multiple_of(num_ranks.max(1)) {
            let why = format!(
                "is {num_replicas}, but {num_experts} experts need a slot each, and {num_ranks} ranks have equally many"
            );
            let ranks = num_ranks.max(1);
            let above = num_replicas.max(num_experts).next_multiple_of(ranks);
            let below = num_replicas / ranks * ranks;
            let nearest = if below >= num_experts { join(below, above) } else { format!("the nearest is {above}") };
            problems.push(Problem::new("num_replicas", why).help(nearest));
        }
        if num_nodes > 0 && !num_ranks.is_multiple_of(num_nodes) {
            let message = format!("is {num_ranks}, but {num_nodes} nodes have equally many ranks");
            let (below, above) = (num_ranks / num_nodes * num_nodes, num_ranks.next_multiple_of(num_nodes));
            let nearest = if below > 0 { join(below, above) } else { format!("the nearest is {above}") };
            problems.push(Problem::new("num_ranks", message).help(nearest));
        }
        if num_groups > 0 && !num_experts.is_multiple_of(num_groups) {
            let message = format!("is {num_groups}, but a group has as many of {num_experts} experts as any other");
            problems.push(Problem::new("num_groups", message).help(nearest_divisors(num_experts, num_groups)));
        }
        problems
    }

    /// Checks these sizes and `load` `[layer][expert]`; gives the number of experts.
    fn check(&self, load: &[Vec<f64>]) -> Result<usize, PlacementError> {
        let num_experts = load.first().map_or(0, Vec::len);
        let mut problems = check_load(load);
        if num_experts > 0 {
            problems.extend(self.problems(num_experts));
        }
        PlacementError::unless_none(problems)?;
        Ok(num_experts)
    }
}

/// All that is wrong with `load` `[layer][expert]`.
fn check_load(load: &[Vec<f64>]) -> Vec<Problem> {
    let num_experts = load.first().map_or(0, Vec::len);
    if num_experts == 0 {
        return vec![Problem::new("load", "expected layers with the load of each expert, found none")];
    }
    let mut problems = Vec::new();
    for (layer, experts) in load.iter().enumerate() {
        if experts.len() != num_experts {
            let message = format!("expected {num_experts} experts as in layer 0, found {}", experts.len());
            problems.push(Problem::new(format!("load[{layer}]"), message));
        }
        for (expert, value) in experts.iter().enumerate().filter(|(_, value)| !(value.is_finite() && **value >= 0.0)) {
            let message = format!("expected a load of 0 or more, found {value}");
            problems.push(Problem::new(format!("load[{layer}][{expert}]"), message));
        }
    }
    problems
}

fn join(below: usize, above: usize) -> String {
    if below == above { format!("the nearest is {below}") } else { format!("the nearest are {below} and {above}") }
}

fn nearest_divisors(n: usize, near: usize) -> String {
    let below = (1..=near.min(n)).rev().find(|k| n.is_multiple_of(*k));
    let above = (near.max(1)..=n).find(|k| n.is_multiple_of(*k));
    match (below, above) {
        (Some(below), Some(above)) => join(below, above),
        (Some(only), None) | (None, Some(only)) => format!("the nearest is {only}"),
        (None, None) => "1".into(),
    }
}

#[cfg(test)]
mod tests;
