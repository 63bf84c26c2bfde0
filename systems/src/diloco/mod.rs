//! Low-communication training (DiLoCo, arXiv 2311.08105): replicas of the mesh train apart for a round of steps, then move what they have
//! in common, theta, by the mean of how far each came, and go on from there.
//!
//! A replica is a window on the run's ranks, and all within it is as without: pipeline, experts, ZeRO. The ranks with the same place in
//! their replicas hold the same parts of parameters, so these meet, each for the part that its optimizer updates: an element crosses between
//! replicas once, and within a replica it then goes the way that updated weights go. The meeting is tasks at the end of a round's last step.
//!
//! Rules, where there is a choice:
//! - Moments of the inner optimizer stay with their replica; a master weight follows theta, and the weight is rounded from it.
//! - A router's correction bias has no gradient: it becomes the mean of the replicas'.
//! - Text is dealt to all replicas, present or not, so that its order does not depend on who is there. That of a replica that is away is
//!   not read.
//! - Who is there is settled for a round before it begins. Who leaves brings nothing to later meetings. Who joins is sent theta, the
//!   outer momentum and biases by the first replica as the round before ends; its moments are those that it had when it left, or zero.
//!
//! The first replica never leaves. All processes of a run are there from its begin to its end, whether their replica is or not: a process
//! that is lost ends the run as ever, and it is resumed with as many replicas as there are then.

mod save;
mod tasks;
mod tell;

use std::collections::BTreeMap;

use bevy_app::prelude::*;
use bevy_ecs::prelude::*;
use engine::prelude::*;
use kernels::{
    comm::{Coding, Comm},
    dtype::DType,
    memory::Memory,
    ops::outer::{Crossing, Nesterov, Pieces, Slots},
    tensor::Tensor,
};
use serde::Deserialize;

pub use save::{Part, restore};
pub use tasks::{lower_away, lower_round_end};

use crate::{
    model::{self, Parameters},
    optimizer::{OptimizerState, Shard},
    params::ParamSpec,
    ranks::Ranks,
    scene::diloco::{self as section, Compress, Outer},
    train::{self, Training},
    work::{Work, turn_of},
};

/// What replicas have in common, and who they are.
#[derive(Resource)]
pub struct Diloco {
    /// What to do.
    pub settings: section::Diloco,
    /// The way to other replicas, with a meter of its own.
    comm: Comm,
    /// By parameter; `None` where this rank updates nothing.
    held: Vec<Option<Held>>,
    /// What each of the sums of squares is about.
    subjects: Vec<tell::Subject>,
    /// Squared norms of this replica's pseudo-gradient, and of the mean.
    squares: [Tensor; 2],
    /// Replicas that are there in the round at hand, ascending.
    present: Vec<u32>,
    /// Of replicas that were asked to leave or to join: whether they are to be there, in place of what the scene says.
    asked: BTreeMap<u32, bool>,
    /// The round that ends with the step at hand, if one does.
    ending: Option<Ending>,
}

/// A parameter's part on this rank.
#[derive(Clone, Debug)]
struct Held {
    slots: Slots,
    /// Of this replica's pseudo-gradient, and of the mean.
    pieces: [Pieces; 2],
}

/// The end of a round.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Ending {
    /// Who meets.
    present: Vec<u32>,
    /// Who is there in the round that follows.
    next: Vec<u32>,
}

impl Ending {
    fn joining(&self) -> impl Iterator<Item = u32> {
        self.next.iter().copied().filter(|replica| !self.present.contains(replica))
    }
}

impl Diloco {
    /// State over the weights and the optimizer of `world`, which theta starts from.
    fn allocate(settings: section::Diloco, world: &World) -> Self {
        let memory = world.resource::<Tensors>().memory();
        let (ranks, parameters) = (world.resource::<Ranks>(), world.resource::<Parameters>());
        let shards = &world.resource::<OptimizerState>().shards;
        let updated = |shard: &Option<Shard>| shard.clone().filter(|shard| !shard.mine.is_empty());
        let shards: Vec<Option<Shard>> = shards.iter().map(updated).collect();
        let cut = |(spec, shard): (&ParamSpec, &Option<Shard>)| Some(tell::subjects(spec, &shard.as_ref()?.mine));
        let cuts: Vec<_> = parameters.specs.iter().zip(&shards).map(cut).collect();
        let subjects: Vec<_> = cuts.iter().flatten().flat_map(|(subjects, _)| subjects).copied().collect();
        let squares = [0, 1].map(|_| zeros(memory, DType::F64, subjects.len()));
        let mut at = 0;
        let held = parameters.weights.iter().zip(&shards).zip(cuts).map(|((weight, shard), cut)| {
            let (shard, (_, ranges)) = shard.as_ref().zip(cut)?;
            let part = shard.part_of(weight.value);
            let (local, weight) = shard.master.map_or((part, None), |master| (master, Some(part)));
            let [theta, v, crossing] = [0, 1, 2].map(|_| zeros(memory, DType::F32, local.len()));
            let num = ranges.len();
            let pieces = squares.map(|all| Pieces { ranges: ranges.clone(), squares: all.slice(at, num) });
            at += num;
            Some(Held { slots: Slots { theta, v, crossing, local, weight }, pieces })
        });
        let held = held.collect();
        let comm = ranks.everyone.metered_apart();
        let mut diloco = Diloco {
            settings,
            comm,
            held,
            subjects,
            squares,
            present: Vec::new(),
            asked: BTreeMap::new(),
            ending: None,
        };
        diloco.begin_at(memory);
        diloco.present = diloco.present_in(diloco.settings.round_of(world.resource::<Training>().step));
        diloco
    }

    /// Theta is what this replica holds: it is the same on all when a run begins.
    fn begin_at(&self, memory: &Memory) {
        for slots in self.held.iter().flatten().map(|held| held.slots) {
            model::upload(memory, slots.theta, &model::download(memory, slots.local));
        }
    }

    /// Whether a replica is there in the round at hand.
    pub fn is_present(&self, replica: u32) -> bool {
        self.present.contains(&replica)
    }

    /// Replicas that are there in the round at hand, ascending.
    pub fn present(&self) -> &[u32] {
        &self.present
    }

    /// Whether the step at hand is the last of a round.
    pub fn ends_round(&self) -> bool {
        self.ending.is_some()
    }

    /// What the step at hand does beside training, for the name of its plan.
    pub fn name_of_step(&self, replica: u32) -> String {
        let away = if self.is_present(replica) { "" } else { ", away" };
        let ending = self.ending.as_ref().map_or_else(String::new, |Ending { present, next }| {
            format!(", and the round of {present:?} ends before that of {next:?}")
        });
        format!("{away}{ending}")
    }

    fn present_in(&self, round: u64) -> Vec<u32> {
        let is_there = |replica: &u32| {
            let asked = self.asked.get(replica).copied();
            asked.unwrap_or_else(|| self.settings.is_present(*replica, round))
        };
        (0..self.settings.replicas).filter(is_there).collect()
    }

    fn hyper(&self) -> Nesterov {
        let Outer::Nesterov(section::Nesterov { lr, momentum }) = self.settings.outer;
        Nesterov { lr, momentum }
    }

    fn crossing(&self) -> (Crossing, Coding) {
        match self.settings.compress {
            None => (Crossing::Parameters, Coding::F32),
            Some(Compress::Bf16) => (Crossing::PseudoGradient, Coding::Bf16),
            Some(Compress::Int8) => (Crossing::PseudoGradient, Coding::Int8),
        }
    }
}

fn zeros(memory: &Memory, dtype: DType, len: usize) -> Tensor {
    let tensor = memory.alloc(dtype, &[len]);
    kernels::with_float!(dtype, T => memory.write::<T>(tensor).fill(<T as kernels::dtype::Float>::of_f64(0.0)));
    tensor
}

/// Adds what `settings` say to the app of one rank of a run, which has been set up.
pub fn add(app: &mut App, settings: &section::Diloco) {
    let diloco = Diloco::allocate(settings.clone(), app.world());
    app.insert_resource(diloco)
        .add_systems(
            Step,
            (
                admit.in_set(StepSystems::Admit).before(train::admit).run_if(turn_of(Work::Train)),
                tell::record.in_set(StepSystems::Record).after(train::record).run_if(turn_of(Work::Train)),
            ),
        )
        .method(LEAVE)
        .method(JOIN);
    tasks::add(app);
}

/// Whether the step at hand ends a round, and who is there in the next.
fn admit(mut diloco: ResMut<Diloco>, training: Res<Training>) {
    let (after, inner_steps) = (training.step + 1, diloco.settings.inner_steps.max(1));
    let ends = after.is_multiple_of(inner_steps) || after >= training.train.steps;
    diloco.ending = ends
        .then(|| Ending { present: diloco.present.clone(), next: diloco.present_in(diloco.settings.round_of(after)) });
}

/// `diloco.leave`.
const LEAVE: Method = Method {
    name: "diloco.leave",
    about: "{replica} -> {present}: from the next round on, the replica is not there",
    access: Access::ChangesAllRanks,
    run: |world, params| ask(world, params, false),
};

/// `diloco.join`.
const JOIN: Method = Method {
    name: "diloco.join",
    about: "{replica} -> {present}: from the next round on, the replica is there",
    access: Access::ChangesAllRanks,
    run: |world, params| ask(world, params, true),
};

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Which {
    replica: u32,
}

fn ask(world: &mut World, params: &serde_json::Value, is_there: bool) -> RpcResult {
    let Which { replica } = params_of(params)?;
    let mut diloco = world.resource_mut::<Diloco>();
    if !(1..diloco.settings.replicas).contains(&replica) {
        let most = diloco.settings.replicas - 1;
        let message = format!("expected a replica from 1 to {most}, found {replica}; the first is always there");
        return Err(RpcError::params(message));
    }
    diloco.asked.insert(replica, is_there);
    Ok(serde_json::json!({ "present": diloco.present, "asked": diloco.asked }))
}
