//! Training: one optimizer step per `Step`. Admit fills the microbatches and sets what changes from step to step, Plan lowers
//! the pipeline's actions once per number of microbatches, Record reads the losses and loads back, Keep logs and decides whose
//! turn it is next.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
};

use bevy_app::prelude::*;
use bevy_ecs::prelude::*;
use engine::prelude::*;
use kernels::tensor::Tensor;
use serde::{Deserialize, Serialize};

use crate::{
    api::StepReport,
    bill::{self, Charge},
    data::cursor::{Cursor, Loader},
    diloco::{self, Diloco},
    expert::{ExpertKey, ExpertLoad},
    head::{LossScale, LossSums},
    live::Live,
    lower::{Lowered, Lowering},
    microbatch::Inputs,
    model::Model,
    observe::{Figures, PlannedBytes, Sent},
    optimizer::{self, OptimizerState, UpdateScalars},
    pipeline::stage::Stages,
    power::{self, Drawn, Power},
    ranks::Ranks,
    rounding::{Counters, RankCounts, Rounding},
    routing::{self, ExpertCounts, RoutingState},
    scene::{self as sections, Scene},
    session::Session,
    stragglers::Stragglers,
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
    /// Samples drawn before the step at hand.
    began_at: Option<u64>,
    /// Tensors of this rank's microbatches; as many as the largest step has.
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
    /// Main loss of each microbatch of the last step, summed over its targets, in nats.
    pub microbatch_losses: Vec<f64>,
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
            began_at: None,
            microbatches,
            step: 0,
            num_tokens: 0,
            train_secs: 0.0,
            last: None,
            overhead: Mean::default(),
            microbatch_losses: Vec::new(),
            last_seen: vec![vec![0; moe_layers.1]; moe_layers.0],
            stop_at: None,
            begin_nanos: 0,
            num_targets: 0,
        }
    }

    /// What comes after the steps done: a step that is at hand, or was given up, counts for none.
    pub fn cursor(&self) -> Cursor {
        self.loader.cursor_after(self.began_at.unwrap_or_else(|| self.loader.num_drawn()))
    }

    /// Experts that had no token for [`DEAD_AFTER_STEPS`] steps.
    pub fn num_dead_experts(&self) -> u64 {
        let dead = |&&seen: &&u64| self.step >= DEAD_AFTER_STEPS && self.step - seen >= DEAD_AFTER_STEPS;
        self.last_seen.iter().flatten().filter(dead).count() as u64
    }

    /// Microbatches of the step at hand, on all ranks.
    fn num_microbatches(&self) -> usize {
        self.scene.batch.num_microbatches_at(self.step)
    }
}

impl Plugin for TrainPlugin {
    fn build(&self, app: &mut App) {
        app.init_resource::<LossScale>().init_resource::<UpdateScalars>().init_resource::<Live>().add_systems(
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

/// Every rank goes through all of a step's text and keeps its share: so the order of samples, the number of targets and the
/// place to resume from are the same on any layout. A replica that trains apart means its own part of the batch by the loss; the
/// part of one that is away is left out.
pub(crate) fn admit(
    mut training: ResMut<Training>,
    tensors: Res<Tensors>,
    (model, ranks): (Res<Model>, Res<Ranks>),
    (mut scale, mut scalars, mut routing): (ResMut<LossScale>, ResMut<UpdateScalars>, ResMut<RoutingState>),
    (live, diloco, power): (Res<Live>, Option<Res<Diloco>>, Option<ResMut<Power>>),
) {
    training.begin_nanos = kernels::clock::now_nanos();
    power.into_iter().for_each(|mut power| power.begin());
    // What was sent since the last step, to evaluate or to save, is not this step's.
    ranks.comm.take_meter();
    let step = training.step;
    ranks.comm.watch().begin_step(step + 1);
    training.began_at = Some(training.loader.num_drawn());
    let (num_microbatches, num_sequences) = (training.num_microbatches(), training.scene.batch.microbatch_sequences);
    let num_mtp_modules = model.config.num_nextn_predict_layers;
    let (mut num_targets, mut mine, mut num_mtp) = (0, 0, 0);
    let (num_data_ranks, data_rank) = (ranks.num_data_ranks() as usize, ranks.data_rank() as usize);
    let per_replica = ranks.layout.mesh.num_data_ranks() as usize;
    let is_present = |replica: u32| diloco.as_ref().is_none_or(|diloco| diloco.is_present(replica));
    for m in 0..num_microbatches {
        let batch = training.loader.next_batch(num_sequences);
        let replica = (m % num_data_ranks / per_replica) as u32;
        if !is_present(replica) {
            continue;
        }
        if m % num_data_ranks == data_rank {
            training.microbatches[m / num_data_ranks].upload(tensors.memory(), &batch);
        }
        num_targets += batch.num_targets() as u64;
        if replica != ranks.replica() {
            continue;
        }
        mine += batch.num_targets() as u64;
        let count = |k| batch.mtp_targets(k).iter().filter(|&&x| x != crate::data::packing::IGNORE).count() as u64;
        num_mtp += if num_mtp_modules == 0 { 0 } else { count(1) };
    }
    training.num_targets = num_targets;
    let mtp_weight = training.scene.mtp.as_ref().map_or(0.0, |mtp| mtp.loss_weight);
    *scale = LossScale {
        main: 1.0 / mine.max(1) as f64,
        mtp: mtp_weight / num_mtp_modules.max(1) as f64 / num_mtp.max(1) as f64,
    };
    *scalars = UpdateScalars {
        lr: live.lr_at(&training, step),
        update: step + 1,
        max_grad_norm: training.train.max_grad_norm.unwrap_or(f64::INFINITY),
    };
    routing.bias_speed = live.bias_speed_at(&training, step);
    (routing.step, routing.num_microbatches) = (step, num_microbatches / ranks.num_replicas() as usize);
}

fn plan(world: &mut World) -> Result {
    let training = world.resource::<Training>();
    let ranks = world.resource::<Ranks>();
    let replica = ranks.replica();
    let num_microbatches = training.num_microbatches() / ranks.num_data_ranks() as usize;
    let diloco = world.get_resource::<Diloco>();
    let is_away = diloco.is_some_and(|diloco| !diloco.is_present(replica));
    let round = diloco.map_or_else(String::new, |diloco| diloco.name_of_step(replica));
    let checking = world.resource::<Turn>().0 == Work::LocateNotFinite;
    let step = world.resource::<Training>().step + 1;
    let memory = world.resource::<Tensors>().memory().clone();
    let mut rounding = world.get_resource_mut::<Rounding>().filter(|_| !checking);
    let counters = rounding.as_mut().and_then(|rounding| rounding.begin(&memory, step));
    let how = match (checking, counters) {
        (true, _) => ", checked",
        (false, Some(_)) => ", watched",
        (false, None) => "",
    };
    let key = PlanKey(format!("train {num_microbatches} microbatches{how}{round}"));
    if world.resource_mut::<Plans>().activate(&key) {
        return Ok(());
    }
    let inputs = world.resource::<Training>().microbatches[..num_microbatches].to_vec();
    let lowered = if is_away {
        diloco::lower_away(world, inputs[0], checking)?
    } else {
        lower_step(world, inputs, Options { checking, counters, ..Options::default() })?
    };
    PlannedBytes::keep(world, &key, &lowered);
    world.resource_mut::<Plans>().insert(key, lowered.graph);
    Ok(())
}

/// How a step is lowered.
#[derive(Clone, Copy, Debug, Default)]
pub struct Options {
    /// Look for what is not finite behind every task; then nothing is updated.
    pub checking: bool,
    /// As [`Lowering::counters`].
    pub counters: Option<Counters>,
    /// As [`Lowering::expert_load`].
    pub expert_load: Option<f64>,
    /// As [`Lowering::keeps_narrow`].
    pub keeps_narrow: bool,
}

/// The graph of one optimizer step over `inputs`.
///
/// # Errors
/// If the schedule does not take so many microbatches, or an op's contract is not kept.
pub fn lower_step(world: &mut World, inputs: Vec<Inputs>, options: Options) -> Result<Lowered> {
    let ranks = world.resource::<Ranks>().clone();
    let schedule = ranks.schedule.build(ranks.layout.mesh.pp, inputs.len() as u32)?;
    let position = ranks.layout.mesh.coordinates(ranks.layout.rank).pp as usize;
    let model = world.resource::<Model>().clone();
    let Some(&first) = inputs.first() else { return Err("a step has no microbatch".into()) };
    let mut stages = Stages::new(model, ranks.layout.clone(), &schedule, ranks.chunk_order, inputs);
    let mut l = Lowering::for_session(world, first, true)?;
    (l.checking, l.expert_load, l.keeps_narrow) = (options.checking, options.expert_load, options.keeps_narrow);
    l.counters = options.counters;
    l.reduces_on_the_way = ranks.reduces_on_the_way;
    optimizer::lower_zero(&mut l)?;
    for &action in &schedule.ranks[position] {
        stages.lower(&mut l, action)?;
    }
    if l.world.contains_resource::<OptimizerState>() && !options.checking {
        optimizer::lower_update(&mut l)?;
        routing::lower_bias_updates(&mut l)?;
        diloco::lower_round_end(&mut l)?;
    }
    l.finish_step()
}

/// The repeated step was all finite: what was not came from the losses' or the gradient's sum itself.
fn nothing_found() -> Result {
    Err(ExitReason::Diverged("the loss or the gradient's norm overflowed; lower the learning rate".into()).into())
}

/// Loads of one layer: max over mean minus 1, and how many experts had none.
fn load_summary(counts: &[u32]) -> (f64, u64) {
    (kernels::ops::balance::max_vio(counts), counts.iter().filter(|&&c| c == 0).count() as u64)
}

/// What a rank tells the others of a step.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
struct RankStep {
    /// Microbatch of the step, and its losses, main first, as the bits of f64: JSON need not keep them.
    losses: Vec<(u32, Vec<u64>)>,
    /// Layer, and how often each of its experts was chosen on all ranks.
    counts: Vec<(usize, Vec<u32>)>,
    /// Squared norm of the gradient, as bits.
    sum_squares: u64,
    step_secs: f64,
    overhead_share: f64,
    /// Of the time of its compute streams.
    idle_share: f64,
    figures: Figures,
    drawn: Option<Drawn>,
    rounding: RankCounts,
}

impl RankStep {
    fn of(world: &World) -> Self {
        let (ranks, training) = (world.resource::<Ranks>(), world.resource::<Training>());
        let memory = world.resource::<Tensors>().memory();
        let layout = &ranks.layout;
        let position = layout.mesh.coordinates(layout.rank).pp;
        let diloco = world.get_resource::<Diloco>();
        let is_away = diloco.is_some_and(|diloco| !diloco.is_present(ranks.replica()));
        // One that is away has none: no losses are told, and counts are zero.
        let num_microbatches = training.num_microbatches() / ranks.num_data_ranks() as usize;
        let last = layout.num_stages() - 1;
        let schedule = ranks.schedule.build(layout.mesh.pp, num_microbatches as u32);
        let is_mine = |m: u32| schedule.as_ref().is_ok_and(|schedule| schedule.rank_of(last, m) == Some(position));
        let bits = |sum: Tensor| memory.read::<f64>(sum)[0].to_bits();
        let losses = (0..num_microbatches as u32).filter(|&m| !is_away && is_mine(m)).map(|m| {
            let sums = &world.resource::<LossSums>().0[m as usize];
            let all = std::iter::once(sums.main).chain(sums.mtp.iter().copied()).map(bits).collect();
            (ranks.global_microbatch(m), all)
        });
        let speaks_for = |layer: usize| {
            layout.mesh.data_rank(layout.rank) == 0 && layout.first_position(layout.stage_of_layer(layer)) == position
        };
        let counts = world.resource::<ExpertCounts>().0.iter().filter(|(layer, _)| speaks_for(*layer));
        let step_secs = (kernels::clock::now_nanos() - training.begin_nanos) as f64 * 1e-9;
        RankStep {
            losses: losses.collect(),
            counts: counts.map(|(layer, counts)| (*layer, memory.read::<u32>(*counts).to_vec())).collect(),
            sum_squares: bits(world.resource::<OptimizerState>().sum_squares),
            step_secs,
            overhead_share: world.resource::<Telemetry>().times().overhead_secs / step_secs.max(1e-9),
            idle_share: world.resource::<Telemetry>().bubbles().idle_fraction().unwrap_or(0.0),
            figures: Figures::of(world, |layer| ranks.replica() == 0 && speaks_for(layer)),
            drawn: world.get_resource::<Power>().and_then(|power| power.drawn(step_secs)),
            rounding: world.get_resource::<Rounding>().map_or_else(Vec::new, |rounding| rounding.counts(memory)),
        }
    }
}

/// Ops without a kernel for the run's device that were told of.
#[derive(Resource, Default)]
struct ToldHostOps(BTreeSet<&'static str>);

/// Says once of each op that it has no kernel: the run is right without, and slow.
fn tell_host_ops(world: &mut World) {
    let memory = world.resource::<Tensors>().memory().clone();
    let Some(gpu) = memory.gpu() else { return };
    let mut told = world.remove_resource::<ToldHostOps>().unwrap_or_default();
    for op in gpu.host_ops().into_keys().filter(|op| told.0.insert(op)) {
        let note = format!("op `{op}` has no kernel for {}: it runs on the host", memory.device());
        world.resource::<Session>().progress.note(&note);
    }
    world.insert_resource(told);
}

pub(crate) fn record(world: &mut World) -> Result {
    let step = world.resource::<Training>().step + 1;
    world.resource_mut::<Telemetry>().number(step);
    let ranks = world.resource::<Ranks>().clone();
    tell_host_ops(world);
    world.insert_resource(Sent(ranks.comm.take_meter()));
    let mine = RankStep::of(world);
    world.resource::<Tensors>().memory().failure()?;
    let all = ranks.exchange(&mine)?;
    let mut losses: Vec<_> = all.iter().flat_map(|rank| rank.losses.iter().cloned()).collect();
    losses.sort_unstable_by_key(|(microbatch, _)| *microbatch);
    let sum = |k: usize| losses.iter().filter_map(|(_, all)| all.get(k)).map(|&bits| f64::from_bits(bits)).sum::<f64>();
    let num_targets = world.resource::<Training>().num_targets;
    let loss = sum(0) / num_targets.max(1) as f64;
    let grad_norm = f64::from_bits(all[0].sum_squares).sqrt();
    let are_finite = all.iter().all(|rank| f64::from_bits(rank.sum_squares).is_finite());
    if !(loss.is_finite() && are_finite) {
        world.resource::<Session>().progress.note(&format!(
            "step {step}: loss {loss} and gradient norm {grad_norm} are not finite; running the step again to find where"
        ));
        *world.resource_mut::<Work>() = Work::LocateNotFinite;
        return Ok(());
    }
    let num_mtp = world.resource::<Model>().config.num_nextn_predict_layers;
    let mtp: Vec<f64> = (1..=num_mtp).map(|k| sum(k) / num_targets.max(1) as f64).collect();
    // By layer, over all replicas.
    let mut rows: BTreeMap<usize, Vec<u32>> = BTreeMap::new();
    for (layer, counts) in all.iter().flat_map(|rank| &rank.counts) {
        let row = rows.entry(*layer).or_insert_with(|| vec![0; counts.len()]);
        row.iter_mut().zip(counts).for_each(|(sum, count)| *sum += count);
    }
    let lr = world.resource::<UpdateScalars>().lr;
    let bias_speed = world.resource::<RoutingState>().bias_speed;
    let (step_secs, overhead_share) = (all[0].step_secs, all[0].overhead_share);

    let mut training = world.resource_mut::<Training>();
    let (mut max_vio, mut num_idle) = (0f64, 0);
    (training.step, training.began_at) = (step, None);
    for (i, (_, counts)) in rows.iter().enumerate() {
        let (vio, idle) = load_summary(counts);
        (max_vio, num_idle) = (max_vio.max(vio), num_idle + idle);
        for (seen, &count) in training.last_seen[i].iter_mut().zip(counts) {
            if count > 0 {
                *seen = step;
            }
        }
    }
    training.overhead.add(overhead_share);
    training.train_secs += step_secs;
    training.num_tokens += num_targets;
    training.microbatch_losses = losses.iter().map(|(_, all)| f64::from_bits(all[0])).collect();
    let tokens_per_sec = num_targets as f64 / step_secs.max(1e-9);
    let idle_share = all.iter().map(|rank| rank.idle_share).sum::<f64>() / all.len() as f64;
    let drawn: Vec<Option<&Drawn>> = all.iter().map(|rank| rank.drawn.as_ref()).collect();
    let measured = power::tell(&mut world.resource_mut::<Telemetry>(), &drawn);
    let spent = bill::charge(world, Charge { step_secs, idle_share, tokens_per_sec, measured });
    let mut training = world.resource_mut::<Training>();
    let report = StepReport {
        step,
        num_steps: training.train.steps,
        loss_nats_per_token: loss,
        mtp_loss_nats_per_token: mtp,
        grad_norm,
        lr,
        num_tokens: num_targets,
        total_tokens: training.num_tokens,
        step_secs,
        tokens_per_sec,
        max_vio,
        num_idle_experts: num_idle,
        overhead_share,
        spent,
    };
    training.last = Some(report.clone());
    let mut stragglers = world.remove_resource::<Stragglers>().unwrap_or_default();
    let mut telemetry = world.resource_mut::<Telemetry>();
    for (layer, counts) in &rows {
        telemetry.histogram(format!("load/layer {layer}"), counts.iter().map(|&c| f64::from(c)).collect());
    }
    tell(&mut telemetry, &report);
    let busy: Vec<f64> = all.iter().map(|rank| rank.step_secs * (1.0 - rank.idle_share)).collect();
    let slow = stragglers.take(&mut telemetry, &busy);
    telemetry.scalar("bias_speed", bias_speed);
    world.insert_resource(stragglers);
    slow.iter().for_each(|line| world.resource::<Session>().progress.note(line));
    tell_rounding(world, step, &all);
    Figures::tell(world, &all.iter().map(|rank| &rank.figures).collect::<Vec<_>>());
    let mut loads = world.query::<(&ExpertKey, &mut ExpertLoad)>();
    for (key, mut load) in loads.iter_mut(world) {
        if let Some(row) = rows.get(&usize::from(key.layer)) {
            load.0 = row[usize::from(key.expert)];
        }
    }
    world.resource::<Session>().progress.step(&report);
    Ok(())
}

/// Of a watched step: what rounding lost.
fn tell_rounding(world: &mut World, step: u64, all: &[RankStep]) {
    let Some(mut rounding) = world.remove_resource::<Rounding>() else { return };
    if rounding.is_watching {
        rounding.take(step, all.iter().map(|rank| &rank.rounding));
        rounding.last.iter().for_each(|report| report.tell(&mut world.resource_mut::<Telemetry>()));
    }
    world.insert_resource(rounding);
}

fn tell(telemetry: &mut Telemetry, report: &StepReport) {
    for (name, value) in [
        ("loss_nats_per_token", report.loss_nats_per_token),
        ("grad_norm", report.grad_norm),
        ("lr", report.lr),
        ("tokens_per_sec", report.tokens_per_sec),
        ("step_secs", report.step_secs),
        ("max_vio", report.max_vio),
        ("num_idle_experts", report.num_idle_experts as f64),
        ("num_tokens", report.total_tokens as f64),
        ("overhead_share", report.overhead_share),
    ] {
        telemetry.scalar(name, value);
    }
    for (k, loss) in report.mtp_loss_nats_per_token.iter().enumerate() {
        telemetry.scalar(format!("mtp_loss_nats_per_token/{k}"), *loss);
    }
}
