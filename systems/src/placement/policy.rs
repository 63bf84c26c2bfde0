//! Which placement to take. The published ones leave two things open: a rank may hold an expert twice, which wastes a slot and
//! confuses whoever moves weights by expert, and packing whole groups on nodes can leave the nodes uneven. `Best` mends both.

use rayon::prelude::*;
use serde::{Deserialize, Serialize};

use super::{Placement, PlacementError, Sizes, eplb, join, search::Layer};
use crate::problem::Problem;

/// How to place experts. The default is [`Policy::Best`].
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Policy {
    /// As published, with each group of experts on one node: tokens travel to few nodes, loads may be uneven.
    Hierarchical,
    /// As published, without regard to groups and nodes: loads are even, tokens travel to more nodes.
    Global,
    /// Layer by layer: groups on nodes if that is at most [`LOCALITY_WORTH`] less even, else without regard to them; never an expert
    /// twice on a rank; and improved by swaps.
    #[default]
    Best,
}

/// How much more max over mean `Best` accepts for having groups on nodes.
pub const LOCALITY_WORTH: f64 = 0.02;

/// Max over mean that is not worth improving.
const EVEN: f64 = 1.001;

/// Places experts with `load` `[layer][expert]`.
///
/// # Errors
/// All sizes that do not fit, with the nearest that do; loads that are negative, not finite, or of unequal layers.
pub fn place(load: &[Vec<f64>], sizes: Sizes, policy: Policy) -> Result<Placement, PlacementError> {
    let num_experts = sizes.check(load)?;
    let Sizes { num_replicas, num_groups, num_nodes, num_ranks } = sizes;
    match policy {
        Policy::Hierarchical if !sizes.is_hierarchical() => {
            let message = format!("is {num_groups}, but the hierarchical policy has equally many on {num_nodes} nodes");
            let (below, above) = (num_groups / num_nodes * num_nodes, num_groups.next_multiple_of(num_nodes));
            let nearest = if below > 0 { join(below, above) } else { format!("the nearest is {above}") };
            let help = format!("{nearest}; or the policy global or best");
            Err(PlacementError { problems: vec![Problem::new("num_groups", message).help(help)] })
        }
        Policy::Hierarchical => eplb::rebalance(load, num_replicas, num_groups, num_nodes, num_ranks),
        Policy::Global => eplb::rebalance(load, num_replicas, 1, 1, num_ranks),
        Policy::Best if num_replicas > num_experts * num_ranks => {
            let message =
                format!("is {num_replicas}, but {num_experts} experts once on each of {num_ranks} ranks are fewer");
            let help = format!("{} or fewer", num_experts * num_ranks);
            Err(PlacementError { problems: vec![Problem::new("num_replicas", message).help(help)] })
        }
        Policy::Best => {
            let slots = load.par_iter().map(|load| best(load, sizes)).collect();
            Placement::new(slots, num_experts, num_ranks)
        }
    }
}

/// `[slot]` of one layer.
fn best(load: &[f64], sizes: Sizes) -> Vec<usize> {
    // Each expert once on each rank of its node is all that a node can use.
    let has_room = sizes.num_replicas * sizes.num_nodes <= load.len() * sizes.num_ranks;
    let local = (sizes.is_hierarchical() && has_room).then(|| even(load, sizes, &level_groups(load, sizes)));
    let imbalance = |layer: &Layer| if layer.mean() > 0.0 { layer.max() / layer.mean() } else { 1.0 };
    match local {
        Some(local) if imbalance(&local) <= 1.0 + LOCALITY_WORTH => local.slots,
        local => {
            let global = even(load, eplb::global(sizes), &[vec![0]]);
            let limit = imbalance(&global) + LOCALITY_WORTH;
            local.filter(|local| imbalance(local) <= limit).unwrap_or(global).slots
        }
    }
}

/// The published packing of `nodes`' groups, then each expert once on a rank, then swaps within nodes.
fn even<'a>(load: &'a [f64], sizes: Sizes, nodes: &[Vec<usize>]) -> Layer<'a> {
    let ranks_per_node = sizes.num_ranks / sizes.num_nodes;
    let slots = eplb::fill(load, sizes, ranks_per_node, nodes);
    let mut layer = Layer::new(load, slots, sizes.num_ranks, ranks_per_node);
    layer.remove_duplicates();
    layer.level(EVEN);
    layer
}

/// The published packing of groups on nodes, improved by swaps: groups are to nodes as experts are to ranks.
fn level_groups(load: &[f64], sizes: Sizes) -> Vec<Vec<usize>> {
    let groups = eplb::group_loads(load, sizes.num_groups);
    let mut layer = Layer::new(&groups, eplb::groups_of_nodes(load, sizes).concat(), sizes.num_nodes, sizes.num_nodes);
    layer.level(EVEN);
    layer.slots.chunks(sizes.num_groups / sizes.num_nodes).map(<[usize]>::to_vec).collect()
}
