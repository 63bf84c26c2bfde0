//! Evaluation: the loss on text that is not trained on, in nats per token and bits per byte. One step a batch, forward only.

use bevy_app::prelude::*;
use bevy_ecs::prelude::*;
use engine::{prelude::*, telemetry::Telemetry};

use crate::{
    data::packing::Batch,
    diloco::Diloco,
    head::{self, Loss, LossSums},
    lower::Lowering,
    microbatch::Inputs,
    model::Model,
    optimizer::zero_losses,
    pipeline::stage::Stages,
    ranks::Ranks,
    session::Session,
    train::Training,
    work::{Work, turn_of},
};

/// Evaluates when it is its turn, then hands over to `then`.
pub struct EvaluatePlugin;

/// What is being evaluated, and how far that is.
#[derive(Resource)]
pub struct Evaluation {
    /// Tensors of a batch.
    pub inputs: Inputs,
    /// Batches to run.
    pub batches: Vec<Batch>,
    /// UTF-8 bytes that the targets stand for, if the batches are a text.
    pub num_bytes: Option<u64>,
    /// Whose turn it is afterwards.
    pub then: Work,
    /// The last result.
    pub result: Option<EvaluationResult>,
    /// The same, until someone takes it.
    pub fresh: Option<EvaluationResult>,
    next: usize,
    nats: f64,
    num_tokens: u64,
}

/// A loss over a text.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct EvaluationResult {
    /// Mean over the targets.
    pub loss_nats_per_token: f64,
    /// Sum over bytes, if the batches are a text.
    pub bits_per_byte: Option<f64>,
    /// Targets.
    pub num_tokens: u64,
}

impl EvaluationResult {
    /// As logs, curves and whoever watches call it.
    pub fn scalars(&self) -> Vec<(String, f64)> {
        let bits = self.bits_per_byte.map(|bits| ("val_bits_per_byte".to_owned(), bits));
        let loss = ("val_loss_nats_per_token".to_owned(), self.loss_nats_per_token);
        std::iter::once(loss).chain(bits).collect()
    }
}

impl Evaluation {
    /// Evaluation of `batches`, each of the shape of `inputs`.
    pub fn new(inputs: Inputs, batches: Vec<Batch>, num_bytes: Option<u64>, then: Work) -> Self {
        Evaluation { inputs, batches, num_bytes, then, result: None, fresh: None, next: 0, nats: 0.0, num_tokens: 0 }
    }
}

impl Plugin for EvaluatePlugin {
    fn build(&self, app: &mut App) {
        app.add_systems(
            Step,
            (
                admit.in_set(StepSystems::Admit).run_if(turn_of(Work::Evaluate)),
                plan.in_set(StepSystems::Plan).run_if(turn_of(Work::Evaluate)),
                record.in_set(StepSystems::Record).run_if(turn_of(Work::Evaluate)),
            ),
        );
    }
}

/// How many batches are looked at beside each other, and which of them by this rank: ranks with different data take different ones.
/// Of several replicas only those that are there have the weights that are measured.
fn share(ranks: &Ranks, diloco: Option<&Diloco>) -> (usize, Option<usize>) {
    let mesh = &ranks.layout.mesh;
    let mine = mesh.data_rank(ranks.layout.rank);
    let (num_replicas, place) = match diloco {
        None => (1, Some(0)),
        Some(diloco) => (diloco.present().len(), diloco.present().iter().position(|&r| r == ranks.replica())),
    };
    let num_data_ranks = mesh.num_data_ranks() as usize;
    (num_replicas * num_data_ranks, place.map(|place| place * num_data_ranks + mine as usize))
}

/// Which batch this rank looks at; the last round may have none for some.
fn batch_of(evaluation: &Evaluation, share: Option<usize>) -> Option<usize> {
    share.map(|share| evaluation.next + share).filter(|batch| *batch < evaluation.batches.len())
}

fn admit(
    evaluation: Res<Evaluation>,
    tensors: Res<Tensors>,
    sums: Res<LossSums>,
    (ranks, diloco): (Res<Ranks>, Option<Res<Diloco>>),
) {
    zero_losses(tensors.memory(), &sums);
    // A rank that has no batch repeats the last one, since its peers wait for it; it does not count.
    let (_, mine) = share(&ranks, diloco.as_deref());
    let batch = batch_of(&evaluation, mine).unwrap_or(evaluation.batches.len().saturating_sub(1));
    if let Some(batch) = evaluation.batches.get(batch) {
        evaluation.inputs.upload(tensors.memory(), batch);
    }
}

fn plan(world: &mut World) -> Result {
    let inputs = world.resource::<Evaluation>().inputs;
    let key = PlanKey(format!("evaluate {} tokens", inputs.num_tokens()));
    if world.resource_mut::<Plans>().activate(&key) {
        return Ok(());
    }
    let model = world.resource::<Model>().clone();
    let layout = world.resource::<Ranks>().layout.clone();
    let mut l = Lowering::for_session(world, inputs, false)?;
    let head_weight = model.head;
    let h = Stages::whole(model, layout).lower_inference(&mut l, inputs)?;
    if let (Some(h), Some(head_weight)) = (h, head_weight) {
        head::lower_head(&mut l, Loss::Main, head_weight, h, inputs.targets)?;
    }
    let rest = l.take_scope();
    l.release_scope(rest, None);
    let graph = l.finish()?;
    world.resource_mut::<Plans>().insert(key, graph);
    Ok(())
}

fn record(
    mut evaluation: ResMut<Evaluation>,
    tensors: Res<Tensors>,
    sums: Res<LossSums>,
    (mut work, ranks, diloco): (ResMut<Work>, Res<Ranks>, Option<Res<Diloco>>),
    (session, training, mut telemetry): (Res<Session>, Option<Res<Training>>, ResMut<Telemetry>),
) -> Result {
    let nats = tensors.memory().read::<f64>(sums.0[0].main)[0];
    // The sum of a rank without the last stage is 0, and so is the part of one without a batch.
    let (num_shares, mine) = share(&ranks, diloco.as_deref());
    let counts = batch_of(&evaluation, mine).is_some();
    let all = ranks.exchange(&if counts { nats.to_bits() } else { 0 })?;
    let Evaluation { batches, next, nats: total, num_tokens, .. } = &mut *evaluation;
    *total += all.into_iter().map(f64::from_bits).sum::<f64>();
    for batch in batches.iter().skip(*next).take(num_shares) {
        *num_tokens += batch.num_targets() as u64;
    }
    *next += num_shares;
    if evaluation.next < evaluation.batches.len() {
        return Ok(());
    }
    let result = EvaluationResult {
        loss_nats_per_token: evaluation.nats / evaluation.num_tokens.max(1) as f64,
        bits_per_byte: evaluation.num_bytes.map(|bytes| evaluation.nats / std::f64::consts::LN_2 / bytes as f64),
        num_tokens: evaluation.num_tokens,
    };
    session.progress.evaluated(&result);
    if let Some(training) = training {
        telemetry.add_to(training.step, result.scalars());
    }
    (evaluation.result, evaluation.fresh) = (Some(result), Some(result));
    (evaluation.next, evaluation.nats, evaluation.num_tokens) = (0, 0.0, 0);
    *work = evaluation.then;
    Ok(())
}
