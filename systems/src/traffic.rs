//! Memory traffic of a step, counted: the sizes of the tensors that its ops read and write, by what they are and how they are kept.
//!
//! A tensor counts once for each op that names it: what an op reads twice, or finds in a cache, is not told apart.

use std::collections::BTreeMap;

use bevy_ecs::prelude::*;
use engine::prelude::*;
use kernels::{
    dtype::DType,
    tensor::{BufferId, Tensor},
};
use serde::{Deserialize, Serialize, Serializer};

use crate::{
    model::Parameters,
    optimizer::{OptimizerState, Slot},
};

/// What tensors are.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Class {
    /// Weights, and their copies in 8 bits.
    Weights,
    /// Gradients of weights.
    Gradients,
    /// Masters and moments.
    Optimizer,
    /// Activations and their gradients, scales included.
    Activations,
    /// Token ids, chosen experts, counts, offsets.
    Indices,
}

/// Bytes of one class in one format.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct Row {
    /// What they are.
    pub class: Class,
    /// `f64`, `f32`, `bf16`, `u32`, or `u8` for 8 bits and what else is packed in bytes.
    pub format: &'static str,
    /// Read in a step.
    pub read_bytes: u64,
    /// Written in a step.
    pub written_bytes: u64,
}

/// Traffic of a step.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Traffic(BTreeMap<(Class, &'static str), (u64, u64)>);

impl Traffic {
    /// Of one run of a graph.
    pub fn of(world: &World, graph: &Graph) -> Self {
        let classes = classes(world);
        let mut traffic = Traffic::default();
        for task in graph.order.iter().filter_map(|&entity| world.get::<Task>(entity)) {
            let mut count = |tensor: &Tensor, read: bool| {
                let activations = if tensor.dtype == DType::U32 { Class::Indices } else { Class::Activations };
                let class = classes.get(&tensor.buffer).copied().unwrap_or(activations);
                let (reads, writes) = traffic.0.entry((class, tensor.dtype.name())).or_default();
                *(if read { reads } else { writes }) += tensor.size_bytes();
            };
            task.reads.iter().for_each(|tensor| count(tensor, true));
            task.writes.iter().for_each(|tensor| count(tensor, false));
        }
        traffic
    }

    /// Of rows that come from elsewhere: class, format, and bytes read and written; none if a format is none.
    pub fn from_rows(rows: impl IntoIterator<Item = (Class, String, (u64, u64))>) -> Option<Self> {
        let formats = [DType::F64, DType::F32, DType::Bf16, DType::U32, DType::U8].map(DType::name);
        let row = |(class, format, bytes): (Class, String, (u64, u64))| {
            Some(((class, formats.into_iter().find(|known| *known == format)?), bytes))
        };
        rows.into_iter().map(row).collect::<Option<_>>().map(Traffic)
    }

    /// Together with another's.
    #[must_use]
    pub fn and(mut self, other: &Self) -> Self {
        for (key, (read, written)) in &other.0 {
            let (reads, writes) = self.0.entry(*key).or_default();
            *reads += read;
            *writes += written;
        }
        self
    }

    /// By class, then format.
    pub fn rows(&self) -> impl Iterator<Item = Row> {
        self.0.iter().map(|(&(class, format), &(read_bytes, written_bytes))| Row {
            class,
            format,
            read_bytes,
            written_bytes,
        })
    }

    /// Bytes read and written, all of them, and by format, the most first.
    pub fn by_format(&self) -> (u64, Vec<(&'static str, u64)>) {
        let mut sums = BTreeMap::new();
        for row in self.rows() {
            *sums.entry(row.format).or_default() += row.read_bytes + row.written_bytes;
        }
        let mut by_format: Vec<(&str, u64)> = sums.into_iter().collect();
        by_format.sort_by_key(|(_, bytes)| std::cmp::Reverse(*bytes));
        (by_format.iter().map(|(_, bytes)| bytes).sum(), by_format)
    }
}

impl Serialize for Traffic {
    fn serialize<S: Serializer>(&self, serializer: S) -> std::result::Result<S::Ok, S::Error> {
        serializer.collect_seq(self.rows())
    }
}

fn classes(world: &World) -> BTreeMap<BufferId, Class> {
    let mut classes = BTreeMap::new();
    for weight in &world.resource::<Parameters>().weights {
        let copies = weight.fp8.iter().flat_map(|fp8| fp8.tensors());
        classes.extend(copies.chain([weight.value]).map(|tensor| (tensor.buffer, Class::Weights)));
        classes.extend(weight.grad.map(|grad| (grad.buffer, Class::Gradients)));
    }
    let shards = world.get_resource::<OptimizerState>().into_iter().flat_map(|state| state.shards.iter().flatten());
    for shard in shards {
        let moments = match &shard.slot {
            Slot::AdamW { m, v } => [Some(*m), Some(*v)],
            Slot::Muon { m, .. } => [Some(*m), None],
        };
        let state = moments.into_iter().flatten().chain(shard.master);
        classes.extend(state.map(|tensor| (tensor.buffer, Class::Optimizer)));
    }
    classes
}
