//! The meeting of replicas as tasks, behind all others of a round's last step: what each brings, the mean, the outer step, and then the way
//! that updated weights go. Who joins is sent what the others have.
//!
//! All means are launched before the first step that waits for one, so that computing goes on beside what crosses.

use std::{collections::BTreeMap, sync::Arc};

use bevy_app::prelude::*;
use bevy_ecs::prelude::*;
use engine::prelude::*;
use kernels::{comm::Coding, ops::outer, tensor::Tensor};

use super::{Diloco, Held};
use crate::{
    lower::{Lowered, Lowering},
    microbatch::Inputs,
    model::Parameters,
    optimizer::{self, lower_show, tag},
    params::{ParamKind, ParamSpec},
    ranks::Ranks,
};

/// What this replica brings, and how far it came.
const BRING: TaskKind = TaskKind("bring_to_outer_step");
/// The mean over the replicas that are there.
const AVERAGE: TaskKind = TaskKind("average_replicas");
/// Theta moves, and weights go there.
const OUTER_STEP: TaskKind = TaskKind("outer_step");
/// What a replica begins with goes to those that join.
const SEND_THETA: TaskKind = TaskKind("send_theta");
/// The same at a replica that joins.
const RECEIVE_THETA: TaskKind = TaskKind("receive_theta");
/// Weights go to theta at a replica that joins.
const FOLLOW: TaskKind = TaskKind("follow_theta");

/// Kinds of tags; the optimizer's are below.
const MEAN: u64 = 8;
const MEAN_OF_BIAS: u64 = 9;
const THETA: u64 = 10;
const MOMENTUM: u64 = 11;
const BIAS: u64 = 12;

pub(super) fn add(app: &mut App) {
    app.on_task(BRING, bring)
        .on_task(AVERAGE, average)
        .on_task(OUTER_STEP, outer_step)
        .on_task(SEND_THETA, send_theta)
        .on_task(RECEIVE_THETA, receive_theta)
        .on_task(FOLLOW, follow);
}

/// Parameters, and the ranks of other replicas that have them in common, by their numbers in the run.
#[derive(Component, Clone)]
pub(crate) struct MeetingTask {
    params: Arc<[usize]>,
    ranks: Arc<[u32]>,
}

/// Parameters by layer.
type Groups = BTreeMap<Option<usize>, Vec<usize>>;

/// Emits something of each layer's parameters.
fn each(l: &mut Lowering, groups: &Groups, emit: impl Fn(&mut Lowering, &Arc<[usize]>) -> Result<()>) -> Result<()> {
    for (layer, params) in groups {
        l.layer = layer.map(|layer| layer as u32);
        emit(l, &Arc::from(params.as_slice()))?;
    }
    l.layer = None;
    Ok(())
}

/// Emits the end of a round, if the step at hand is its last.
///
/// # Errors
/// If an op's contract is not kept.
pub fn lower_round_end(l: &mut Lowering) -> Result<()> {
    let Some(diloco) = l.world.get_resource::<Diloco>() else { return Ok(()) };
    let Some(ending) = diloco.ending.clone() else { return Ok(()) };
    let ranks = l.world.resource::<Ranks>();
    let (replica, place, num) = (ranks.replica(), ranks.layout.rank, ranks.layout.mesh.num_ranks());
    let peers = |replicas: &[u32]| -> Arc<[u32]> { replicas.iter().map(|replica| replica * num + place).collect() };
    // All that others of this replica show their parts of, too: a rank may have none of a small parameter.
    let mut groups = Groups::new();
    for (spec, weight) in l.world.resource::<Parameters>().iter() {
        if weight.grad.is_some() || spec.kind == ParamKind::ExpertBias {
            groups.entry(spec.layer).or_default().push(weight.index);
        }
    }
    let meeting =
        |params: &Arc<[usize]>, ranks: &Arc<[u32]>| MeetingTask { params: params.clone(), ranks: ranks.clone() };
    let joining: Vec<u32> = ending.joining().collect();
    if ending.present.contains(&replica) {
        let all = peers(&ending.present);
        each(l, &groups, |l, params| l.task(BRING, None, meeting(params, &all)))?;
        each(l, &groups, |l, params| l.transfer(AVERAGE, None, meeting(params, &all)))?;
        each(l, &groups, |l, params| {
            l.task(OUTER_STEP, None, meeting(params, &all))?;
            lower_show(l, &trained(l, params)).map(drop)
        })?;
        if replica == 0 && !joining.is_empty() {
            let to = peers(&joining);
            each(l, &groups, |l, params| l.transfer(SEND_THETA, None, meeting(params, &to)))?;
        }
    } else if joining.contains(&replica) {
        let from = peers(&[0]);
        each(l, &groups, |l, params| l.transfer(RECEIVE_THETA, None, meeting(params, &from)))?;
        each(l, &groups, |l, params| {
            l.task(FOLLOW, None, meeting(params, &from))?;
            lower_show(l, &trained(l, params)).map(drop)
        })?;
    }
    Ok(())
}

/// Those that an optimizer updates.
fn trained(l: &Lowering, params: &[usize]) -> Vec<usize> {
    let weights = &l.world.resource::<Parameters>().weights;
    params.iter().copied().filter(|&index| weights[index].grad.is_some()).collect()
}

/// The graph of a step in which this replica is not there: it trains on nothing, and may join at its end.
///
/// # Errors
/// If an op's contract is not kept.
pub fn lower_away(world: &mut World, inputs: Inputs, checking: bool) -> Result<Lowered> {
    let mut l = Lowering::for_session(world, inputs, true)?;
    optimizer::lower_zero(&mut l)?;
    if !checking {
        l.gate();
        lower_round_end(&mut l)?;
    }
    l.finish_step()
}

/// A parameter as those see it that meet.
enum Common<'a> {
    /// This rank's part.
    Trained(&'a Held),
    /// All of a router's biases.
    Bias(Tensor),
}

fn common<'a>(task: &MeetingTask, diloco: &'a Diloco, parameters: &'a Parameters) -> Vec<(&'a ParamSpec, Common<'a>)> {
    let one = |&index: &usize| {
        let spec = &parameters.specs[index];
        let bias = || (spec.kind == ParamKind::ExpertBias).then(|| Common::Bias(parameters.weights[index].value));
        Some((spec, diloco.held[index].as_ref().map(Common::Trained).or_else(bias)?))
    };
    task.params.iter().filter_map(one).collect()
}

fn bring(
    In(id): In<Entity>,
    mut launch: Launch<MeetingTask>,
    diloco: Res<Diloco>,
    parameters: Res<Parameters>,
) -> Result {
    let (_, task, s) = launch.get(id)?;
    for (_, common) in common(task, &diloco, &parameters) {
        if let Common::Trained(held) = common {
            outer::bring(s, held.slots, diloco.crossing().0, &held.pieces[0])?;
        }
    }
    Ok(())
}

fn average(
    In(id): In<Entity>,
    mut launch: Launch<MeetingTask>,
    diloco: Res<Diloco>,
    parameters: Res<Parameters>,
) -> Result {
    let (_, task, s) = launch.get(id)?;
    for (spec, common) in common(task, &diloco, &parameters) {
        let (x, coding, kind) = match common {
            Common::Trained(held) => (held.slots.crossing, diloco.crossing().1, MEAN),
            Common::Bias(bias) => (bias, Coding::F32, MEAN_OF_BIAS),
        };
        diloco.comm.all_reduce_mean(s, &task.ranks, x, coding, tag(kind, spec.index))?;
    }
    Ok(())
}

fn outer_step(
    In(id): In<Entity>,
    mut launch: Launch<MeetingTask>,
    diloco: Res<Diloco>,
    parameters: Res<Parameters>,
) -> Result {
    let (_, task, s) = launch.get(id)?;
    for (_, common) in common(task, &diloco, &parameters) {
        if let Common::Trained(held) = common {
            outer::step(s, diloco.hyper(), held.slots, diloco.crossing().0, &held.pieces[1])?;
        }
    }
    Ok(())
}

/// What a replica is sent that joins, and under which tags.
fn sent(common: &Common) -> Vec<(u64, Tensor)> {
    match common {
        Common::Trained(Held { slots, .. }) => vec![(THETA, slots.theta), (MOMENTUM, slots.v)],
        Common::Bias(bias) => vec![(BIAS, *bias)],
    }
}

fn send_theta(
    In(id): In<Entity>,
    mut launch: Launch<MeetingTask>,
    diloco: Res<Diloco>,
    parameters: Res<Parameters>,
) -> Result {
    let (_, task, s) = launch.get(id)?;
    for (spec, common) in common(task, &diloco, &parameters) {
        for (kind, tensor) in sent(&common) {
            for &to in &*task.ranks {
                diloco.comm.send(s, tensor, to, tag(kind, spec.index))?;
            }
        }
    }
    Ok(())
}

fn receive_theta(
    In(id): In<Entity>,
    mut launch: Launch<MeetingTask>,
    diloco: Res<Diloco>,
    parameters: Res<Parameters>,
) -> Result {
    let (_, task, s) = launch.get(id)?;
    for (spec, common) in common(task, &diloco, &parameters) {
        for (kind, tensor) in sent(&common) {
            diloco.comm.receive(s, tensor, task.ranks[0], tag(kind, spec.index))?;
        }
    }
    Ok(())
}

fn follow(
    In(id): In<Entity>,
    mut launch: Launch<MeetingTask>,
    diloco: Res<Diloco>,
    parameters: Res<Parameters>,
) -> Result {
    let (_, task, s) = launch.get(id)?;
    for (_, common) in common(task, &diloco, &parameters) {
        if let Common::Trained(held) = common {
            outer::follow(s, held.slots)?;
        }
    }
    Ok(())
}
