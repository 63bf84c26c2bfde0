//! How even a placement is, and what it costs: by layer, and over all of them.

use serde::Serialize;

use super::{Placement, PlacementError, Sizes, contiguous_imbalance, incremental};

/// A layer of a [`Report`].
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct LayerReport {
    /// The most loaded rank's load over the mean.
    pub max_over_mean: f64,
    /// The same of experts in their order, without replicas.
    pub max_over_mean_contiguous: f64,
    /// The same of the placement before, if there is one.
    pub max_over_mean_before: Option<f64>,
    /// The expert with the most load; of equal ones the first.
    pub hottest_expert: usize,
    /// Slots it has.
    pub hottest_num_replicas: usize,
    /// Slots of the expert that has most.
    pub max_num_replicas: usize,
    /// Slots whose expert is on the rank already.
    pub num_duplicates: usize,
    /// Groups of experts that are on more than one node.
    pub num_split_groups: usize,
    /// Copies from the placement before, if there is one.
    pub num_moves: Option<usize>,
}

/// How even a placement is.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Report {
    /// The greatest rank loads' sum over the layers, over the mean loads' sum: how many times as long as balanced the
    /// experts take, since ranks wait for each other in each layer.
    pub max_over_mean: f64,
    /// That of the worst layer.
    pub worst_max_over_mean: f64,
    /// Over all layers, of experts in their order, without replicas.
    pub max_over_mean_contiguous: f64,
    /// Over all layers, of the placement before, if there is one.
    pub max_over_mean_before: Option<f64>,
    /// Slots of a layer.
    pub num_replicas: usize,
    /// Over all layers.
    pub num_duplicates: usize,
    /// Over all layers.
    pub num_split_groups: usize,
    /// Over all layers, if there is a placement before.
    pub num_moves: Option<usize>,
    /// By layer.
    pub layers: Vec<LayerReport>,
}

/// Reports on `placement` for `load` `[layer][expert]`, on nodes and with groups as in `sizes`, and on the way there from
/// `before`.
///
/// # Errors
/// If the load, the sizes or the placement before are not of the placement's layers, experts, slots and ranks.
pub fn report(
    placement: &Placement,
    load: &[Vec<f64>],
    sizes: Sizes,
    before: Option<&Placement>,
) -> Result<Report, PlacementError> {
    placement.check_load(load)?;
    let sizes = Sizes { num_replicas: placement.num_slots(), num_ranks: placement.num_ranks, ..sizes };
    sizes.check(load)?;
    let moves = before.map(|before| incremental::migrate(before, placement)).transpose()?.map(|plan| plan.moves);
    let layer = |(layer, load): (usize, &Vec<f64>)| {
        let hottest = (0..load.len()).rev().max_by(|&a, &b| load[a].total_cmp(&load[b])).unwrap_or(0);
        let replicas = &placement.num_replicas_of[layer];
        LayerReport {
            max_over_mean: placement.rank_imbalance(layer, load),
            max_over_mean_contiguous: contiguous_imbalance(load, placement.num_ranks),
            max_over_mean_before: before.map(|before| before.rank_imbalance(layer, load)),
            hottest_expert: hottest,
            hottest_num_replicas: replicas[hottest],
            max_num_replicas: replicas.iter().copied().max().unwrap_or(0),
            num_duplicates: placement.num_duplicates(layer),
            num_split_groups: num_split_groups(&placement.physical_to_expert[layer], load.len(), sizes),
            num_moves: moves.as_ref().map(|moves| moves.iter().filter(|moved| moved.layer == layer).count()),
        }
    };
    let layers: Vec<LayerReport> = load.iter().enumerate().map(layer).collect();
    Ok(Report {
        max_over_mean: over_layers(load, layers.iter().map(|layer| layer.max_over_mean)),
        worst_max_over_mean: layers.iter().map(|layer| layer.max_over_mean).fold(1.0, f64::max),
        max_over_mean_contiguous: over_layers(load, layers.iter().map(|layer| layer.max_over_mean_contiguous)),
        max_over_mean_before: before.map(|_| over_layers(load, layers.iter().filter_map(|l| l.max_over_mean_before))),
        num_replicas: placement.num_slots(),
        num_duplicates: layers.iter().map(|layer| layer.num_duplicates).sum(),
        num_split_groups: layers.iter().map(|layer| layer.num_split_groups).sum(),
        num_moves: moves.map(|moves| moves.len()),
        layers,
    })
}

/// Max over mean of layers after each other: each counts by its load. 1 if there is no load.
pub fn over_layers(load: &[Vec<f64>], max_over_mean: impl Iterator<Item = f64>) -> f64 {
    let totals: Vec<f64> = load.iter().map(|experts| experts.iter().sum()).collect();
    let total: f64 = totals.iter().sum();
    let waited: f64 = max_over_mean.zip(&totals).map(|(ratio, total)| ratio * total).sum();
    if total > 0.0 { waited / total } else { 1.0 }
}

fn num_split_groups(slots: &[usize], num_experts: usize, sizes: Sizes) -> usize {
    let (group_size, node_slots) = (num_experts / sizes.num_groups, slots.len() / sizes.num_nodes);
    let is_on = |group: usize, node: &[usize]| node.iter().any(|expert| expert / group_size == group);
    let num_nodes = |group: usize| slots.chunks(node_slots).filter(|node| is_on(group, node)).count();
    (0..sizes.num_groups).filter(|&group| num_nodes(group) > 1).count()
}
