//! What rounding to 8 bits loses, in the steps that a scene asks for (`precision.watch_every_steps`): for each layer and each kind of
//! operand, counted from the codes that products took ([`kernels::ops::rounding`]). Other steps have none of these tasks, and
//! a watched step has the same bits as it would have had.
//!
//! A layer whose numbers vanish goes wrong slowly; one that makes a NaN is found by [`crate::work::Work::LocateNotFinite`].

use bevy_ecs::prelude::*;
use engine::{prelude::*, telemetry::Telemetry};
use kernels::{
    dtype::DType,
    memory::Memory,
    ops::rounding::{self, Counts, LEN},
    tensor::Tensor,
};
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use crate::{
    lower::Lowering,
    model::{Model, Parameters},
};

/// Counts what rounding the weights of a layer lost.
pub const COUNT: TaskKind = TaskKind("count_rounding");

/// Distributions over layers, which the log has as `fp8` already.
pub const HISTOGRAMS: &str = "fp8_layers/";

/// What is rounded.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Operand {
    /// Weights after their update, in blocks of 128 x 128.
    Weights,
    /// Inputs of layers, with scales along their width: for F.
    Activations,
    /// The same with scales along tokens: for W.
    ActivationsByToken,
    /// Gradients of layers' outputs, with scales along their width: for I.
    Gradients,
    /// The same with scales along tokens: for W.
    GradientsByToken,
}

impl Operand {
    /// All of them.
    pub const ALL: [Operand; 5] = [
        Operand::Weights,
        Operand::Activations,
        Operand::ActivationsByToken,
        Operand::Gradients,
        Operand::GradientsByToken,
    ];

    /// As logs call it.
    pub fn name(self) -> &'static str {
        match self {
            Operand::Weights => "weights",
            Operand::Activations => "activations",
            Operand::ActivationsByToken => "activations_by_token",
            Operand::Gradients => "gradients",
            Operand::GradientsByToken => "gradients_by_token",
        }
    }
}

/// Where a layer's roundings are counted: F64 [operands, values].
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Counter(Tensor);

impl Counter {
    /// The counts of one kind of operand, for [`kernels::ops::rounding`].
    pub fn of(self, operand: Operand) -> Tensor {
        self.0.slice(operand as usize * LEN, LEN)
    }
}

/// Where all layers' roundings are counted: F64 [layers, operands, values].
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Counters(Tensor);

impl Counters {
    const LEN: usize = Operand::ALL.len() * LEN;

    /// Allocates those of `num_layers`, MTP modules included.
    pub fn allocate(memory: &Memory, num_layers: usize) -> Self {
        Counters(memory.alloc(DType::F64, &[num_layers * Self::LEN]))
    }

    /// Those of one layer.
    pub fn layer(self, layer: u32) -> Counter {
        Counter(self.0.slice(layer as usize * Self::LEN, Self::LEN))
    }
}

/// What was lost, of one kind of operand in one layer.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Lost {
    /// Layer, MTP modules counting on.
    pub layer: usize,
    /// What was rounded.
    pub tensor: Operand,
    /// Largest magnitude.
    pub amax: f64,
    /// Of the numbers that were not zero, those that became zero.
    pub underflow_share: f64,
    /// Of the numbers that were not zero, those that were cut off.
    pub overflow_share: f64,
    /// Least scale.
    pub min_scale: f64,
    /// Largest scale.
    pub max_scale: f64,
}

/// A figure's name, and the figure.
type Figure = (&'static str, fn(&Lost) -> f64);

/// What rounding lost in a step.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct RoundingReport {
    /// The step.
    pub step: u64,
    /// By layer and operand, all ranks together.
    pub lost: Vec<Lost>,
}

impl RoundingReport {
    /// The `n` from which most was lost: cut off first, then vanished.
    pub fn worst(&self, n: usize) -> Vec<Lost> {
        let mut worst = self.lost.clone();
        let key = |lost: &Lost| (lost.overflow_share, lost.underflow_share);
        worst.sort_by(|a, b| key(b).partial_cmp(&key(a)).unwrap_or(std::cmp::Ordering::Equal));
        worst.truncate(n);
        worst
    }

    /// Fields of the step's line in the log.
    pub fn log_fields(&self) -> Map<String, Value> {
        let rows = self.lost.iter().filter_map(|lost| serde_json::to_value(lost).ok()).collect();
        Map::from_iter([("fp8".to_owned(), Value::Array(rows))])
    }

    /// Adds the largest over layers to the step's scalars, and the shares of all layers to its distributions.
    pub fn tell(&self, telemetry: &mut Telemetry) {
        for operand in Operand::ALL {
            let of_layers: Vec<&Lost> = self.lost.iter().filter(|lost| lost.tensor == operand).collect();
            if of_layers.is_empty() {
                continue;
            }
            let name = operand.name();
            let values = |of: fn(&Lost) -> f64| of_layers.iter().map(|lost| of(lost)).collect::<Vec<f64>>();
            let figures: [Figure; 3] = [
                ("amax", |lost| lost.amax),
                ("underflow_share", |lost| lost.underflow_share),
                ("overflow_share", |lost| lost.overflow_share),
            ];
            for (figure, of) in figures {
                let values = values(of);
                let most = values.iter().copied().fold(0.0, f64::max);
                telemetry.scalar(format!("fp8/{figure}/{name}"), most);
                telemetry.histogram(format!("{HISTOGRAMS}{figure}/{name}"), values);
            }
        }
    }
}

/// What a rank tells the others: layer, operand, and counts as bits, since JSON has no infinity.
pub type RankCounts = Vec<(usize, Operand, [u64; LEN])>;

/// The watching of a run.
#[derive(Resource, Debug)]
pub struct Rounding {
    every_steps: u64,
    counters: Counters,
    num_layers: usize,
    /// The step at hand is watched.
    pub is_watching: bool,
    /// The last step that was.
    pub last: Option<RoundingReport>,
}

impl Rounding {
    /// Watching of every `every_steps`-th step, at least 1, of a model with so many layers.
    pub fn new(memory: &Memory, every_steps: u64, num_layers: usize) -> Self {
        let counters = Counters::allocate(memory, num_layers);
        Rounding { every_steps, counters, num_layers, is_watching: false, last: None }
    }

    /// Begins step `step`, counted from 1: if it is watched, counts are zero, and where they are is returned.
    pub fn begin(&mut self, memory: &Memory, step: u64) -> Option<Counters> {
        self.is_watching = step.is_multiple_of(self.every_steps.max(1));
        self.is_watching.then(|| {
            memory.upload(self.counters.0, &vec![0f64; self.counters.0.len()]);
            self.counters
        })
    }

    /// What this rank counted in the step at hand; nothing if it was not watched.
    pub fn counts(&self, memory: &Memory) -> RankCounts {
        if !self.is_watching {
            return Vec::new();
        }
        let all = memory.read::<f64>(self.counters.0);
        let places = (0..self.num_layers).flat_map(|layer| Operand::ALL.map(|operand| (layer, operand)));
        let counts = places.zip(all.as_chunks::<LEN>().0).filter(|(_, counts)| counts[1] > 0.0 || counts[4] > 0.0);
        counts.map(|((layer, operand), counts)| (layer, operand, counts.map(f64::to_bits))).collect()
    }

    /// Takes what all ranks counted in a watched step.
    pub fn take<'a>(&mut self, step: u64, ranks: impl IntoIterator<Item = &'a RankCounts>) {
        let mut sums = std::collections::BTreeMap::<(usize, Operand), Counts>::new();
        for (layer, operand, bits) in ranks.into_iter().flatten() {
            let sum = sums.entry((*layer, *operand)).or_default();
            *sum = sum.and(Counts::from_array(bits.map(f64::from_bits)));
        }
        let lost = |((layer, tensor), counts): ((usize, Operand), Counts)| Lost {
            layer,
            tensor,
            amax: counts.amax,
            underflow_share: counts.num_underflowed / counts.num_nonzero.max(1.0),
            overflow_share: counts.num_overflowed / counts.num_nonzero.max(1.0),
            min_scale: counts.min_scale,
            max_scale: counts.max_scale,
        };
        self.last = Some(RoundingReport { step, lost: sums.into_iter().map(lost).collect() });
    }
}

#[derive(Component, Clone)]
pub(crate) struct CountTask {
    weights: Vec<usize>,
    counter: Counter,
}

/// Emits the count of what rounding a layer's weights lost, if the step is watched: of those that this rank speaks for.
pub fn lower_count(l: &mut Lowering, weights: &[usize]) -> Result<()> {
    let Some(counter) = l.counter() else { return Ok(()) };
    let (model, parameters) = (l.world.resource::<Model>(), l.world.resource::<Parameters>());
    let speaks_for = |&index: &usize| l.layout.speaker(&model.config, &parameters.specs[index]) == l.layout.rank;
    let weights: Vec<usize> = weights.iter().copied().filter(speaks_for).collect();
    if weights.is_empty() { Ok(()) } else { l.task(COUNT, None, CountTask { weights, counter }) }
}

pub(crate) fn count_weights(In(id): In<Entity>, mut launch: Launch<CountTask>, parameters: Res<Parameters>) -> Result {
    let (_, task, s) = launch.get(id)?;
    for &index in &task.weights {
        let weight = parameters.weights[index];
        if let Some(fp8) = weight.fp8 {
            rounding::blocks(s, weight.value, fp8.blocks, task.counter.of(Operand::Weights))?;
        }
    }
    Ok(())
}
