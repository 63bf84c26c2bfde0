//! The published placement (DeepSeek's expert-parallelism load balancer, 2025): replicas go one by one to whichever expert
//! has the most load per replica, and items are packed in falling order, each on the least loaded pack that has room.
//!
//! Hierarchical: groups of experts are packed on nodes, experts replicated within each node, replicas packed on its ranks. Then a
//! token that routing limits to few groups is sent to few nodes. It needs as many groups on each node. Global: one
//! group and one node. Ties go to the lowest index; with that the published example comes out to the slot.

use super::{Placement, PlacementError, Sizes};

/// Places experts with `load` `[layer][expert]` on `num_replicas` slots as published: hierarchical if `num_nodes` divides
/// `num_groups`, else global. [`super::policy::place`] has better.
///
/// # Errors
/// All sizes that do not fit, with the nearest that do; loads that are negative, not finite, or of unequal layers.
pub fn rebalance(
    load: &[Vec<f64>],
    num_replicas: usize,
    num_groups: usize,
    num_nodes: usize,
    num_ranks: usize,
) -> Result<Placement, PlacementError> {
    let sizes = Sizes { num_replicas, num_groups, num_nodes, num_ranks };
    let num_experts = sizes.check(load)?;
    let sizes = if sizes.is_hierarchical() { sizes } else { global(sizes) };
    let layer = |load: &Vec<f64>| fill(load, sizes, usize::MAX, &groups_of_nodes(load, sizes));
    let slots = load.iter().map(layer).collect();
    Placement::new(slots, num_experts, num_ranks)
}

/// The same sizes without groups and nodes.
pub(super) fn global(sizes: Sizes) -> Sizes {
    Sizes { num_groups: 1, num_nodes: 1, ..sizes }
}

/// The load of each group of consecutive experts.
pub(super) fn group_loads(load: &[f64], num_groups: usize) -> Vec<f64> {
    load.chunks(load.len() / num_groups).map(|experts| experts.iter().sum()).collect()
}

/// The groups of each node, as published. The sizes are valid and hierarchical.
pub(super) fn groups_of_nodes(load: &[f64], sizes: Sizes) -> Vec<Vec<usize>> {
    pack(&group_loads(load, sizes.num_groups), sizes.num_nodes)
}

/// `[slot]` of one layer with `load` `[expert]`, if each node has the groups of `nodes`. An expert has at most
/// `max_replicas`.
pub(super) fn fill(load: &[f64], sizes: Sizes, max_replicas: usize, nodes: &[Vec<usize>]) -> Vec<usize> {
    let Sizes { num_replicas, num_groups, num_nodes, num_ranks } = sizes;
    let group_size = load.len() / num_groups;
    let mut slots = Vec::with_capacity(num_replicas);
    for groups in nodes {
        let experts: Vec<usize> = groups.iter().flat_map(|g| g * group_size..(g + 1) * group_size).collect();
        let loads: Vec<f64> = experts.iter().map(|&expert| load[expert]).collect();
        let (replicas, counts) = replicate(&loads, num_replicas / num_nodes, max_replicas);
        let shares: Vec<f64> = replicas.iter().map(|&expert| loads[expert] / counts[expert] as f64).collect();
        for rank in pack(&shares, num_ranks / num_nodes) {
            slots.extend(rank.iter().map(|&replica| experts[replicas[replica]]));
        }
    }
    slots
}

/// Deals items with `loads` to packs of equally many, the heaviest first, each to the least loaded pack with room: the
/// items of each pack, in the order they came.
fn pack(loads: &[f64], num_packs: usize) -> Vec<Vec<usize>> {
    let room = loads.len() / num_packs;
    if room == 1 {
        return (0..num_packs).map(|item| vec![item]).collect();
    }
    let mut order: Vec<usize> = (0..loads.len()).collect();
    order.sort_by(|&a, &b| loads[b].total_cmp(&loads[a]));
    let mut packs = vec![Vec::with_capacity(room); num_packs];
    let mut sums = vec![0f64; num_packs];
    for item in order {
        let open = (0..num_packs).filter(|&pack: &usize| packs[pack].len() < room);
        // There are as many places as items.
        let Some(least) = open.min_by(|&a, &b| sums[a].total_cmp(&sums[b])) else { break };
        sums[least] += loads[item];
        packs[least].push(item);
    }
    packs
}

/// Gives each expert a slot, and the slots that are left one by one to the expert with the most load per replica, of those with
/// fewer than `max_replicas`: the expert of each slot, and replicas by expert. No other counts have a lower greatest
/// load per replica.
fn replicate(loads: &[f64], num_slots: usize, max_replicas: usize) -> (Vec<usize>, Vec<usize>) {
    let mut counts = vec![1; loads.len()];
    let mut slots: Vec<usize> = (0..loads.len()).collect();
    for _ in loads.len()..num_slots {
        let share = |expert: usize| loads[expert] / counts[expert] as f64;
        let open = (0..loads.len()).filter(|&expert| counts[expert] < max_replicas);
        // Of equal ones the first, which is the last in reverse.
        let Some(most) = open.rev().max_by(|&a, &b| share(a).total_cmp(&share(b))) else { break };
        counts[most] += 1;
        slots.push(most);
    }
    (slots, counts)
}

#[cfg(test)]
mod tests {
    #![expect(clippy::unwrap_used, reason = "tests")]

    use super::*;

    /// Example in the README of the published program: 16 replicas, 4 groups, 2 nodes, 8 ranks.
    fn published() -> (Vec<Vec<f64>>, [[usize; 16]; 2]) {
        let load = [
            [90, 132, 40, 61, 104, 165, 39, 4, 73, 56, 183, 86],
            [20, 107, 104, 64, 19, 197, 187, 157, 172, 86, 16, 27],
        ];
        let slots =
            [[5, 6, 5, 7, 8, 4, 3, 4, 10, 9, 10, 2, 0, 1, 11, 1], [7, 10, 6, 8, 6, 11, 8, 9, 2, 4, 5, 1, 5, 0, 3, 1]];
        (load.iter().map(|layer| layer.map(f64::from).to_vec()).collect(), slots)
    }

    #[test]
    fn the_published_example_comes_out() {
        let (load, slots) = published();
        let placement = rebalance(&load, 16, 4, 2, 8).unwrap();
        assert_eq!(placement.physical_to_expert, slots);
        assert_eq!(placement.expert_to_physical[0][5], [0, 2]);
        assert_eq!(placement.num_replicas_of[1], [1, 2, 1, 1, 1, 2, 2, 1, 2, 1, 1, 1]);
        let imbalance = |layer: usize| placement.rank_imbalance(layer, &load[layer]);
        // Computed from the published slots by hand.
        assert!((imbalance(0) - 1.208).abs() < 5e-4 && (imbalance(1) - 1.242).abs() < 5e-4);
    }

    #[test]
    fn without_groups_for_each_node_it_is_global() {
        let (load, _) = published();
        assert_eq!(rebalance(&load, 16, 3, 2, 8), rebalance(&load, 16, 1, 1, 8));
    }

    #[test]
    fn groups_stay_on_a_node() {
        let (load, _) = published();
        for slots in rebalance(&load, 16, 4, 2, 8).unwrap().physical_to_expert {
            let nodes_of =
                |group: usize| (0..2).filter(|node| slots[node * 8..][..8].iter().any(|e| e / 3 == group)).count();
            assert_eq!([0, 1, 2, 3].map(nodes_of), [1; 4]);
        }
    }

    #[test]
    fn sizes_that_do_not_fit_are_all_told_at_once() {
        let check = |sizes: (usize, usize, usize, usize), messages: &[&str]| {
            let error = rebalance(&published().0, sizes.0, sizes.1, sizes.2, sizes.3).unwrap_err().to_string();
            assert_eq!(error.lines().collect::<Vec<_>>(), messages);
        };
        check(
            (15, 5, 3, 8),
            &[
                "num_replicas is 15, but 12 experts need a slot each, and 8 ranks have equally many: the nearest is 16",
                "num_ranks is 8, but 3 nodes have equally many ranks: the nearest are 6 and 9",
                "num_groups is 5, but a group has as many of 12 experts as any other: the nearest are 4 and 6",
            ],
        );
        check(
            (21, 1, 2, 4),
            &["num_replicas is 21, but 12 experts need a slot each, and 4 ranks have equally many: \
               the nearest are 20 and 24"],
        );
        check(
            (8, 1, 2, 4),
            &["num_replicas is 8, but 12 experts need a slot each, and 4 ranks have equally many: the nearest is 12"],
        );
        check((12, 0, 0, 0), &["num_groups is 0: 1 or more", "num_nodes is 0: 1 or more", "num_ranks is 0: 1 or more"]);
    }

    #[test]
    fn loads_that_are_none_are_told() {
        let check = |load: &[Vec<f64>], message: &str| {
            assert_eq!(rebalance(load, 2, 1, 1, 2).unwrap_err().to_string(), message);
        };
        check(&[], "load expected layers with the load of each expert, found none");
        check(&[vec![1.0, -1.0]], "load[0][1] expected a load of 0 or more, found -1");
        check(&[vec![1.0, f64::NAN]], "load[0][1] expected a load of 0 or more, found NaN");
        check(&[vec![1.0, 2.0], vec![1.0]], "load[1] expected 2 experts as in layer 0, found 1");
    }
}
