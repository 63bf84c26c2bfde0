//! Training: one optimizer step per `Step`. Admit fills the microbatches and sets what changes from step to step, Plan lowers
//! the pipeline's actions once per number of microbatches, Record reads the losses and loads back, Keep logs and decides whose
//! turn it is next.

use std::sync::Arc;

use bevy_app::prelude::*;
use bevy_ecs::prelude::*;
use engine::prelude::*;

use crate::{
    api::StepReport,
    data::cursor::Loader,
    expert::{ExpertKey, ExpertLoad},
    head::{LossScale, LossSums},
    lower::Lowering,
    microbatch::Inputs,
    model::Model,
    optimizer::{self, OptimizerState, UpdateScalars},
    pipeline::{action::Action, one_f_one_b::one_f_one_b, stage::Stage},
    routing::{self, ExpertCounts, RoutingState},
    scene::{self as sections, Scene},
    session::Session,
    work::{Turn, Work, turn_of},
};

/// Steps without a token after which an expert counts as dead.
pub const DEAD_AFTER_STEPS: u64 = 10;

/// Trains when it is its turn.
pub struct TrainPlugin;

/// Where training is.
#[derive(Resource)]
pub struct Training {
    /// What to do.
    pub scene: Arc<Scene>,
    /// Length and limits.
    pub train: sections::Train,
    /// Learning rate over steps.
    pub schedule: sections::Schedule,
    /// Source of batches.
    pub loader: Loader,
    /// Tensors of the microbatches; as many as the largest step has.
    pub microbatches: Vec<Inputs>,
    /// Steps done.
    pub step: u64,
    /// Targets trained on.
    pub num_tokens: u64,
    /// Time in steps.
    pub train_secs: f64,
    /// The last step.
    pub last: Option<StepReport>,
    /// Mean share of step time that no stream was busy.
    pub overhead: Mean,
    /// For each layer with experts, the last step in which each expert had a token.
    pub last_seen: Vec<Vec<u64>>,
    /// A benchmark ends after this step.
    pub stop_at: Option<u64>,
    begin_nanos: u64,
    num_targets: u64,
}

/// A running mean.
#[derive(Clone, Copy, Debug, Default)]
pub struct Mean {
    sum: f64,
    count: u64,
}

impl Mean {
    fn add(&mut self, x: f64) {
        self.sum += x;
        self.count += 1;
    }

    /// The mean; 0 of nothing.
    pub fn get(&self) -> f64 {
        self.sum / self.count.max(1) as f64
    }
}

impl Training {
    /// Training from its first step.
    pub fn new(
        scene: Arc<Scene>,
        train: sections::Train,
        schedule: sections::Schedule,
        loader: Loader,
        microbatches: Vec<Inputs>,
        moe_layers: (usize, usize),
    ) -> Self {
        Training {
            scene,
            train,
            schedule,
            loader,
            microbatches,
            step: 0,
            num_tokens: 0,
            train_secs: 0.0,
            last: None,
            overhead: Mean::default(),
            last_seen: vec![vec![0; moe_layers.1]; moe_layers.0],
            stop_at: None,
            begin_nanos: 0,
            num_targets: 0,
        }
    }

    /// Experts that had no token for [`DEAD_AFTER_STEPS`] steps.
    pub fn num_dead_experts(&self) -> u64 {
        let dead = |&&seen: &&u64| self.step >= DEAD_AFTER_STEPS && self.step - seen >= DEAD_AFTER_STEPS;
        self.last_seen.iter().flatten().filter(dead).count() as u64
    }

    fn num_microbatches(&self) -> usize {
        self.scene.batch.num_microbatches_at(self.step)
    }
}

impl Plugin for TrainPlugin {
    fn build(&self, app: &mut App) {
        app.init_resource::<LossScale>().init_resource::<UpdateScalars>().add_systems(
            Step,
            (
                admit.in_set(StepSystems::Admit).run_if(turn_of(Work::Train)),
                plan.in_set(StepSystems::Plan).run_if(turn_of(Work::Train).or_else(turn_of(Work::LocateNotFinite))),
                record.in_set(StepSystems::Record).run_if(turn_of(Work::Train)),
                nothing_found.in_set(StepSystems::Record).run_if(turn_of(Work::LocateNotFinite)),
            ),
        );
    }
}

fn admit(
    mut training: ResMut<Training>,
    tensors: Res<Tensors>,
    model: Res<Model>,
    (mut scale, mut scalars, mut routing): (ResMut<LossScale>, ResMut<UpdateScalars>, ResMut<RoutingState>),
) {
    training.begin_nanos = kernels::clock::now_nanos();
    let (step, total) = (training.step, training.train.steps);
    let (num_microbatches, num_sequences) = (training.num_microbatches(), training.scene.batch.microbatch_sequences);
    let (mut num_targets, mut num_mtp) = (0, 0);
    for m in 0..num_microbatches {
        let batch = training.loader.next_batch(num_sequences);
        training.microbatches[m].upload(tensors.memory(), &batch);
        num_targets += batch.num_targets() as u64;
        let count = |k| batch.mtp_targets(k).iter().filter(|&&x| x != crate::data::packing::IGNORE).count() as u64;
        num_mtp += if model.mtp.is_empty() { 0 } else { count(1) };
    }
    training.num_targets = num_targets;
    let mtp_weight = training.scene.mtp.as_ref().map_or(0.0, |mtp| mtp.loss_weight);
    *scale = LossScale {
        main: 1.0 / num_targets.max(1) as f64,
        mtp: mtp_weight / model.mtp.len().max(1) as f64 / num_mtp.max(1) as f64,
    };
    *scalars = UpdateScalars {
        lr: training.schedule.lr_at(step, total),
        update: step + 1,
        max_grad_norm: training.train.max_grad_norm.unwrap_or(f64::INFINITY),
    };
    if let Some(section) = &training.scene.routing {
        routing.bias_speed = section.bias_speed_at(step, total);
    }
    (routing.step, routing.num_microbatches) = (step, num_microbatches);
}

fn plan(world: &mut World) -> Result {
    let training = world.resource::<Training>();
    let num_microbatches = training.num_microbatches();
    let checking = world.resource::<Turn>().0 == Work::LocateNotFinite;
    let checked = if checking { ", checked" } else { "" };
    let key = PlanKey(format!("train 1F1B, {num_microbatches} microbatches{checked}"));
    if world.resource::<Plans>().contains(&key) {
        world.resource_mut::<Plans>().active = Some(key);
        return Ok(());
    }
    let inputs = training.microbatches[..num_microbatches].to_vec();
    let model = world.resource::<Model>().clone();
    let layers: Vec<Entity> = model.layers.iter().copied().chain(model.mtp.iter().map(|m| m.layer)).collect();
    let mut stage = Stage::new(model, inputs.clone());
    let mut l = Lowering::for_session(world, inputs[0], true)?;
    l.checking = checking;
    optimizer::lower_zero(&mut l)?;
    for cell in one_f_one_b(1, num_microbatches as u32).ranks.concat().into_iter().flat_map(Action::cells) {
        stage.lower(&mut l, cell)?;
    }
    if l.world.contains_resource::<OptimizerState>() && !checking {
        optimizer::lower_update(&mut l)?;
        routing::lower_bias_updates(&mut l, &layers)?;
    }
    let graph = l.finish()?;
    world.resource_mut::<Plans>().insert(key, graph);
    Ok(())
}

/// The repeated step was all finite: what was not came from the losses' or the gradient's sum itself.
fn nothing_found() -> Result {
    Err(ExitReason::Diverged("the loss or the gradient's norm overflowed; lower the learning rate".into()).into())
}

/// Loads of one layer: max over mean minus 1, and how many experts had none.
fn load_summary(counts: &[u32]) -> (f64, u64) {
    (kernels::ops::balance::max_vio(counts), counts.iter().filter(|&&c| c == 0).count() as u64)
}

fn record(
    mut training: ResMut<Training>,
    tensors: Res<Tensors>,
    mut telemetry: ResMut<Telemetry>,
    (sums, counts, optimizer, scalars): (Res<LossSums>, Res<ExpertCounts>, Res<OptimizerState>, Res<UpdateScalars>),
    mut loads: Query<(&ExpertKey, &mut ExpertLoad)>,
    (session, mut work): (Res<Session>, ResMut<Work>),
) {
    let memory = tensors.memory();
    let loss = memory.read::<f64>(sums.main)[0] / training.num_targets.max(1) as f64;
    let grad_norm = memory.read::<f64>(optimizer.sum_squares)[0].sqrt();
    if !(loss.is_finite() && grad_norm.is_finite()) {
        let step = training.step + 1;
        session.progress.note(&format!(
            "step {step}: loss {loss} and gradient norm {grad_norm} are not finite; running the step again to find where"
        ));
        *work = Work::LocateNotFinite;
        return;
    }
    let mtp_targets = training.num_targets.max(1) as f64;
    let mtp: Vec<f64> = sums.mtp.iter().map(|&s| memory.read::<f64>(s)[0] / mtp_targets).collect();
    let (mut max_vio, mut num_idle) = (0f64, 0);
    training.step += 1;
    let step = training.step;
    let mut rows = Vec::new();
    for (i, (layer, tensor)) in counts.0.iter().enumerate() {
        let layer_counts = memory.read::<u32>(*tensor);
        let (vio, idle) = load_summary(&layer_counts);
        (max_vio, num_idle) = (max_vio.max(vio), num_idle + idle);
        for (seen, &count) in training.last_seen[i].iter_mut().zip(layer_counts.iter()) {
            if count > 0 {
                *seen = step;
            }
        }
        telemetry.histogram(format!("load/layer {layer}"), layer_counts.iter().map(|&c| f64::from(c)).collect());
        rows.push((*layer as u16, layer_counts.to_vec()));
    }
    for (key, mut load) in &mut loads {
        if let Some((_, row)) = rows.iter().find(|(layer, _)| *layer == key.layer) {
            load.0 = row[usize::from(key.expert)];
        }
    }
    let step_secs = (kernels::clock::now_nanos() - training.begin_nanos) as f64 * 1e-9;
    let overhead_share = telemetry.times().overhead_secs / step_secs.max(1e-9);
    training.overhead.add(overhead_share);
    training.train_secs += step_secs;
    training.num_tokens += training.num_targets;
    let report = StepReport {
        step,
        num_steps: training.train.steps,
        loss_nats_per_token: loss,
        mtp_loss_nats_per_token: mtp,
        grad_norm,
        lr: scalars.lr,
        num_tokens: training.num_targets,
        total_tokens: training.num_tokens,
        step_secs,
        tokens_per_sec: training.num_targets as f64 / step_secs.max(1e-9),
        max_vio,
        num_idle_experts: num_idle,
        overhead_share,
    };
    for (name, value) in [
        ("loss_nats_per_token", loss),
        ("grad_norm", grad_norm),
        ("lr", report.lr),
        ("tokens_per_sec", report.tokens_per_sec),
        ("step_secs", step_secs),
        ("max_vio", max_vio),
        ("num_idle_experts", num_idle as f64),
        ("num_tokens", training.num_tokens as f64),
        ("overhead_share", overhead_share),
    ] {
        telemetry.scalar(name, value);
    }
    for (k, loss) in report.mtp_loss_nats_per_token.iter().enumerate() {
        telemetry.scalar(format!("mtp_loss_nats_per_token/{k}"), *loss);
    }
    session.progress.step(&report);
    training.last = Some(report);
}
