//! Loads of experts in a step, and what stands out: which are hot, which are dead, how far the worst layer is from even.

use std::collections::BTreeMap;

use engine::telemetry::{Snapshot, Span};

use crate::overlap::is_communication;

/// Prefix of histograms with how often each expert of a layer was chosen.
pub const LOAD: &str = "load/layer ";
/// Prefix of histograms with the correction bias of each expert of a layer.
pub const BIAS: &str = "bias/layer ";
/// An expert with more than this times the mean is hot.
const HOT: f64 = 2.0;
/// Experts that are named.
const MAX_NAMED: usize = 12;

/// A layer's experts.
#[derive(Clone, Debug, PartialEq)]
pub struct LayerLoads {
    /// Number of the layer in the model.
    pub layer: u32,
    /// Rows of each expert.
    pub loads: Vec<f64>,
    /// Correction bias of each expert, if it is told.
    pub biases: Option<Vec<f64>>,
}

impl LayerLoads {
    /// Rows of an expert over the mean.
    pub fn relative(&self, expert: usize) -> f64 {
        let mean = self.loads.iter().sum::<f64>() / self.loads.len().max(1) as f64;
        if mean > 0.0 { self.loads.get(expert).copied().unwrap_or(0.0) / mean } else { 0.0 }
    }

    /// Largest over mean, minus 1: the MaxVio of DeepSeek's paper on balancing without an auxiliary loss.
    pub fn max_vio(&self) -> f64 {
        (0..self.loads.len()).map(|expert| self.relative(expert)).fold(0.0, f64::max) - 1.0
    }
}

/// Whether the step tells loads.
pub fn has_loads(snapshot: &Snapshot) -> bool {
    snapshot.histograms.iter().any(|(name, _)| name.starts_with(LOAD))
}

/// The layers of a step that have experts, in order.
pub fn layers(snapshot: &Snapshot) -> Vec<LayerLoads> {
    let number = |name: &str, prefix: &str| name.strip_prefix(prefix)?.trim().parse::<u32>().ok();
    let mut layers: BTreeMap<u32, LayerLoads> = BTreeMap::new();
    for (name, loads) in &snapshot.histograms {
        if let Some(layer) = number(name, LOAD) {
            layers.insert(layer, LayerLoads { layer, loads: loads.clone(), biases: None });
        }
    }
    for (name, biases) in &snapshot.histograms {
        if let Some(known) = number(name, BIAS).and_then(|layer| layers.get_mut(&layer)) {
            known.biases = Some(biases.clone());
        }
    }
    layers.into_values().collect()
}

/// `[layer][expert]`: shares of each layer's rows; layers in which nothing was chosen are even.
pub fn shares(layers: &[LayerLoads]) -> Vec<Vec<f64>> {
    let layer = |layer: &LayerLoads| {
        let sum: f64 = layer.loads.iter().sum();
        let even = 1.0 / layer.loads.len().max(1) as f64;
        layer.loads.iter().map(|load| if sum > 0.0 { load / sum } else { even }).collect()
    };
    layers.iter().map(layer).collect()
}

/// Experts that stand out, as `layer 3 expert 17`, with rows over the mean.
pub struct Outliers {
    /// Chosen by nothing.
    pub dead: Vec<(u32, usize)>,
    /// Chosen more than twice as often as the mean, hottest first.
    pub hot: Vec<(u32, usize, f64)>,
}

/// Who stands out in a step.
pub fn outliers(layers: &[LayerLoads]) -> Outliers {
    let mut found = Outliers { dead: Vec::new(), hot: Vec::new() };
    for layer in layers {
        for expert in 0..layer.loads.len() {
            match layer.relative(expert) {
                0.0 => found.dead.push((layer.layer, expert)),
                relative if relative > HOT => found.hot.push((layer.layer, expert, relative)),
                _ => {}
            }
        }
    }
    found.hot.sort_by(|a, b| b.2.total_cmp(&a.2));
    found
}

impl Outliers {
    /// Dead ones by name, as many as fit in a line.
    pub fn dead_names(&self) -> String {
        names(self.dead.len(), self.dead.iter().map(|(layer, expert)| format!("L{layer}.E{expert}")))
    }

    /// Hot ones by name, with their load.
    pub fn hot_names(&self) -> String {
        let name = |(layer, expert, relative): &(u32, usize, f64)| format!("L{layer}.E{expert} ({relative:.1}x)");
        names(self.hot.len(), self.hot.iter().map(name))
    }
}

fn names(count: usize, names: impl Iterator<Item = String>) -> String {
    let shown: Vec<String> = names.take(MAX_NAMED).collect();
    match count.saturating_sub(MAX_NAMED) {
        0 => shown.join(", "),
        more => format!("{} and {more} more", shown.join(", ")),
    }
}

/// What a rank had to do with experts and links.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct RankTraffic {
    /// The rank.
    pub rank: u32,
    /// Rows that its experts got, if transfers told.
    pub rows: u64,
    /// Bytes it put on links inside of its node.
    pub intra_node_bytes: u64,
    /// Bytes it put on links to other nodes.
    pub inter_node_bytes: u64,
}

/// Rows and bytes of each rank, from what transfers say of themselves.
pub fn traffic(spans: &[Span]) -> Vec<RankTraffic> {
    let mut ranks: BTreeMap<u32, RankTraffic> = BTreeMap::new();
    for span in spans {
        let rank = ranks.entry(span.rank).or_insert(RankTraffic { rank: span.rank, ..RankTraffic::default() });
        rank.intra_node_bytes += span.cost.intra_node_bytes;
        rank.inter_node_bytes += span.cost.inter_node_bytes;
        if let Some((mine, _)) = span.load.filter(|_| is_communication(span)) {
            rank.rows += mine;
        }
    }
    ranks.into_values().collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn who_stands_out_is_named() {
        let snapshot = Snapshot {
            histograms: vec![
                ("load/layer 3".into(), vec![0.0, 30.0, 5.0, 5.0]),
                ("bias/layer 3".into(), vec![0.1, -0.1, 0.0, 0.0]),
                ("load/layer 1".into(), vec![10.0; 4]),
            ],
            ..Snapshot::default()
        };
        let layers = layers(&snapshot);
        assert_eq!(layers.iter().map(|layer| layer.layer).collect::<Vec<_>>(), [1, 3]);
        assert_eq!((layers[0].max_vio(), layers[1].max_vio()), (0.0, 2.0));
        let outliers = outliers(&layers);
        assert_eq!((outliers.dead_names(), outliers.hot_names()), ("L3.E0".into(), "L3.E1 (3.0x)".into()));
        assert_eq!(shares(&layers)[1], [0.0, 0.75, 0.125, 0.125]);
        assert!(layers[1].biases.is_some() && layers[0].biases.is_none());
    }
}
