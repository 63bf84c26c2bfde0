//! `hadal plan SCENE`: what a layout needs in memory, time, money and energy, before anything is rented. It runs the plugins
//! that a run does, under a computed clock and over tensors that have sizes only.

pub mod compare;
pub mod model;
pub mod search;
pub mod simulate;

use std::collections::BTreeMap;

use engine::{
    bubbles::{Accounting, BubbleCause, RankBubbles},
    hardware::DeviceSpec,
    prelude::*,
};
use serde::Serialize;

use crate::{
    distribute::Distribution,
    lower::ActivationBytes,
    model_config::ModelConfig,
    params::{num_activated_params, num_params},
    placement::{contiguous_imbalance, load::RoutingLoad},
    scene::{Loaded, Scene},
    session::{SessionError, format_of},
};
use simulate::{RankBytes, Simulated, Work, simulate};

const SECS_PER_DAY: f64 = 86_400.0;
/// Tokens of a microbatch that can be planned.
const MAX_MICROBATCH_TOKENS: usize = 1 << 24;
/// Microbatches of a rank that can be planned: their tasks are held in memory.
const MAX_MICROBATCHES: usize = 4096;
const SECS_PER_HOUR: f64 = 3_600.0;

/// A scene to plan.
pub struct PlanRequest<'a> {
    /// The scene, checked.
    pub loaded: &'a Loaded,
    /// Its model.
    pub config: ModelConfig,
    /// What it would run on.
    pub device: DeviceSpec,
    /// How tokens spread over experts.
    pub load: RoutingLoad,
    /// Keep the spans, for a trace.
    pub with_spans: bool,
}

/// Bytes that a rank puts on links in a step: the most of those that stand for a pipeline position each.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct LinkBytes {
    /// To ranks of its node.
    pub intra_node: u64,
    /// To ranks of other nodes.
    pub inter_node: u64,
}

/// What a plan comes to. Time, money and energy are those of all ranks.
#[derive(Clone, Debug, Serialize)]
pub struct PlanReport {
    /// Name of the device.
    pub device: String,
    /// Ranks.
    pub num_ranks: u32,
    /// Microbatches of a step on each rank.
    pub num_microbatches_per_rank: usize,
    /// Parameters without MTP modules.
    pub num_params: u64,
    /// Parameters a token passes through, with embedding and head.
    pub num_activated_params: u64,
    /// Operations to train on a token.
    pub flops_per_token: f64,
    /// Cache bytes that a token leaves.
    pub kv_bytes_per_token: u64,
    /// Memory of each pipeline position at its peak moment.
    pub peak_bytes_per_rank: Vec<RankBytes>,
    /// Memory of a device.
    pub device_memory_bytes: u64,
    /// Whether all positions fit.
    pub fits: bool,
    /// Busiest rank's rows over the mean, in the worst layer.
    pub load_max_over_mean: f64,
    /// An optimizer step.
    pub step_secs: f64,
    /// Tokens of a step.
    pub tokens_per_step: f64,
    /// Tokens over time.
    pub tokens_per_sec: f64,
    /// The same for a day.
    pub tokens_per_day: f64,
    /// Useful operations over the peak of all devices, in the format of the products' high-precision neighbour (bf16 beside fp8).
    pub mfu: f64,
    /// Idle time of a rank in a step, mean over the ranks.
    pub bubble_secs: f64,
    /// The same over the step.
    pub idle_fraction: f64,
    /// The same by cause.
    pub idle_secs_by_cause: BTreeMap<BubbleCause, f64>,
    /// The same for each pipeline position.
    pub idle_secs_by_cause_per_rank: Vec<BTreeMap<BubbleCause, f64>>,
    /// Idle share of each pipeline position.
    pub idle_fraction_per_rank: Vec<f64>,
    /// Bytes that a rank puts on links in a step, the most of any.
    pub link_bytes_per_step: LinkBytes,
    /// Device hours for 10^12 tokens.
    pub gpu_hours_per_trillion_tokens: f64,
    /// Tokens of the run.
    pub num_tokens: Option<f64>,
    /// Time of the run.
    pub run_secs: Option<f64>,
    /// Money of the run.
    pub cost_usd: Option<f64>,
    /// Energy of the run.
    pub energy_kwh: Option<f64>,
    /// What a person should know.
    pub notes: Vec<String>,
    /// Tasks of the simulated positions.
    pub num_tasks: usize,
}

/// A plan with what is not in its report.
pub struct Planned {
    /// The report.
    pub report: PlanReport,
    /// Busy and idle time of each position.
    pub accounting: Accounting,
    /// Spans of each position, if they were asked for.
    pub spans: Vec<Vec<Span>>,
    /// What lives for a part of the step only, for each position and each of its tasks, if spans were asked for.
    pub bytes_by_task: Vec<Vec<ActivationBytes>>,
}

/// Plans a scene.
///
/// # Errors
/// If the scene does not fit together, or a figure is missing. A plan that does not fit the device's memory is no error.
pub fn plan(request: &PlanRequest) -> Result<Planned, SessionError> {
    let scene = &request.loaded.scene.of_one_replica();
    let distribution = Distribution::new(scene, &request.config)
        .map_err(|problems| SessionError::input(request.loaded.errors(&problems)))?;
    plan_on(request, scene, &distribution)
}

/// The same on a given distribution, for a scene that differs from the loaded one in its layout only.
pub(crate) fn plan_on(
    request: &PlanRequest,
    scene: &Scene,
    distribution: &Distribution,
) -> Result<Planned, SessionError> {
    let (config, device) = (&request.config, &request.device);
    let section = scene.plan.as_ref();
    let work = work_of(request, scene)?;
    let (seq_len, load, format) = (work.seq_len, work.load, work.format);
    let mesh = distribution.mesh;
    let microbatches = scene.batch.max_microbatches();
    let per_rank = microbatches / mesh.num_data_ranks() as usize;
    let simulated = simulate(&work, distribution, per_rank, request.with_spans)?;
    let step_secs = simulated.step_secs;
    let tokens = |microbatches: usize| (microbatches * scene.batch.microbatch_sequences * seq_len) as f64;
    let num_ranks = f64::from(mesh.num_ranks());
    let tokens_per_step = tokens(microbatches);
    let flops_per_token = model::flops_per_token(config, seq_len);
    let peak = device.peak_flops_per_sec.high(format);
    let mut notes = Vec::new();
    let mfu = peak.map_or(f64::NAN, |peak| flops_per_token * tokens_per_step / (step_secs * num_ranks * peak));
    let bubble_secs = simulated.accounting.mean_idle_secs();
    let num_tokens = section.and_then(|plan| plan.num_tokens).or_else(|| {
        let train = scene.train.as_ref()?;
        Some((0..train.steps).map(|step| tokens(scene.batch.num_microbatches_at(step))).sum())
    });
    // Small steps at the start cost more for each token; the time of a step is affine in its microbatches.
    let run_secs = match num_tokens {
        None => None,
        Some(num_tokens) => Some(run_secs(&work, distribution, scene, num_tokens, (per_rank, step_secs), tokens)?),
    };
    let busy_share = 1.0 - bubble_secs / step_secs;
    let mut money = |secs: f64| match device.price(secs) {
        Ok(usd) => Some(usd * num_ranks),
        Err(missing) => {
            notes.push(format!("no price: {missing}"));
            None
        }
    };
    let cost_usd = run_secs.and_then(&mut money);
    let energy_kwh = run_secs.and_then(|secs| match device.energy_kwh(secs * busy_share, secs * (1.0 - busy_share)) {
        Ok(kwh) => Some(kwh * num_ranks),
        Err(missing) => {
            notes.push(format!("no energy: {missing}"));
            None
        }
    });
    let main = config.without_mtp();
    let device_memory_bytes = device.memory_bytes.value;
    let fits = simulated.bytes.iter().all(|bytes| bytes.total <= device_memory_bytes);
    notes.extend(advice(&simulated, device, mesh.pp));
    let link = |of: fn(&kernels::cost::Cost) -> u64| simulated.costs.iter().map(of).max().unwrap_or(0);
    let report = PlanReport {
        device: device.name.clone(),
        num_ranks: mesh.num_ranks(),
        num_microbatches_per_rank: per_rank,
        num_params: num_params(&main),
        num_activated_params: num_activated_params(&main),
        flops_per_token,
        kv_bytes_per_token: model::kv_bytes_per_token(config),
        peak_bytes_per_rank: simulated.bytes,
        device_memory_bytes,
        fits,
        load_max_over_mean: load,
        step_secs,
        tokens_per_step,
        tokens_per_sec: tokens_per_step / step_secs,
        tokens_per_day: tokens_per_step / step_secs * SECS_PER_DAY,
        mfu,
        bubble_secs,
        idle_fraction: bubble_secs / step_secs,
        idle_secs_by_cause: BubbleCause::ALL.map(|cause| (cause, simulated.accounting.mean_secs(cause))).into(),
        idle_secs_by_cause_per_rank: simulated.accounting.ranks.iter().map(by_cause).collect(),
        idle_fraction_per_rank: simulated
            .accounting
            .ranks
            .iter()
            .map(|rank| rank.idle_nanos as f64 * 1e-9 / step_secs)
            .collect(),
        link_bytes_per_step: LinkBytes {
            intra_node: link(|cost| cost.intra_node_bytes),
            inter_node: link(|cost| cost.inter_node_bytes),
        },
        gpu_hours_per_trillion_tokens: num_ranks * step_secs / SECS_PER_HOUR * 1e12 / tokens_per_step,
        num_tokens,
        run_secs,
        cost_usd,
        energy_kwh,
        notes,
        num_tasks: simulated.num_tasks,
    };
    let Simulated { accounting, spans, bytes_by_task, .. } = simulated;
    Ok(Planned { report, accounting, spans, bytes_by_task })
}

/// Idle seconds of a rank, every cause, also those that did not occur.
fn by_cause(rank: &RankBubbles) -> BTreeMap<BubbleCause, f64> {
    BubbleCause::ALL.map(|cause| (cause, rank.by_cause.get(&cause).map_or(0.0, |nanos| *nanos as f64 * 1e-9))).into()
}

/// What of a scene is simulated.
pub(crate) fn work_of<'a>(request: &'a PlanRequest, scene: &Scene) -> Result<Work<'a>, SessionError> {
    let config = &request.config;
    let section = scene.plan.as_ref();
    let seq_len = section.and_then(|plan| plan.seq_len).or(scene.data.as_ref().map(|data| data.seq_len));
    let seq_len = seq_len.ok_or_else(|| {
        SessionError::input("a plan needs the length of a sequence: add `plan: (seq_len: 4096)`, or a section `data`")
    })?;
    let (num_tokens, per_rank) = (
        seq_len.saturating_mul(scene.batch.microbatch_sequences),
        scene.batch.max_microbatches() / scene.mesh.num_data_ranks() as usize,
    );
    if num_tokens > MAX_MICROBATCH_TOKENS {
        let message = format!("expected microbatches of {MAX_MICROBATCH_TOKENS} tokens at most, found {num_tokens}");
        return Err(SessionError::input(format!(
            "{message}: batch.microbatch_sequences and plan.seq_len are their factors"
        )));
    }
    if per_rank > MAX_MICROBATCHES {
        let message = format!("expected {MAX_MICROBATCHES} microbatches a rank at most, found {per_rank}");
        return Err(SessionError::input(format!("{message}: a plan runs each of them; a step grows evenly with more")));
    }
    Ok(Work {
        config,
        device: &request.device,
        format: format_of(scene.precision.compute),
        optimizer: scene.optimizer.clone(),
        recompute: scene.recompute.clone(),
        microbatch_sequences: scene.batch.microbatch_sequences,
        seq_len,
        load: imbalance(config, scene.mesh.ep, &request.load)?,
    })
}

/// Max over mean of the ranks' rows, in the worst layer, with experts dealt to `ep` ranks in order.
fn imbalance(config: &ModelConfig, ep: u32, load: &RoutingLoad) -> Result<f64, SessionError> {
    let Some(moe) = &config.moe else { return Ok(1.0) };
    let num_layers = (0..config.num_hidden_layers).filter(|&layer| config.is_moe_layer(layer)).count();
    let num_mtp = config.num_nextn_predict_layers;
    let shares = load.shares(num_layers, num_mtp, moe.n_routed_experts).map_err(SessionError::input)?;
    Ok(shares.iter().map(|layer| contiguous_imbalance(layer, ep as usize)).fold(1.0, f64::max))
}

/// Time of `num_tokens` tokens, with the batch growing as the scene says.
fn run_secs(
    work: &Work,
    distribution: &Distribution,
    scene: &Scene,
    num_tokens: f64,
    (largest, largest_secs): (usize, f64),
    tokens: impl Fn(usize) -> f64,
) -> Result<f64, SessionError> {
    let num_data_ranks = distribution.mesh.num_data_ranks() as usize;
    let batch = &scene.batch;
    let smallest = batch.ramp.iter().map(|ramp| ramp.num_microbatches).fold(batch.num_microbatches, usize::min);
    let smallest = smallest / num_data_ranks;
    let smallest_secs =
        if smallest == largest { largest_secs } else { simulate(work, distribution, smallest, false)?.step_secs };
    let slope = (largest_secs - smallest_secs) / (largest - smallest).max(1) as f64;
    let step_secs =
        |microbatches: usize| smallest_secs + slope * (microbatches / num_data_ranks).saturating_sub(smallest) as f64;
    // Whole stretches of equal steps, up to the tokens asked for.
    let starts = std::iter::once((0, batch.num_microbatches));
    let starts: Vec<(u64, usize)> =
        starts.chain(batch.ramp.iter().map(|ramp| (ramp.step, ramp.num_microbatches))).collect();
    let (mut left, mut secs) = (num_tokens, 0.0);
    for (i, &(start, microbatches)) in starts.iter().enumerate() {
        let steps = starts.get(i + 1).map_or(f64::INFINITY, |(next, _)| (next - start) as f64);
        let steps = steps.min(left / tokens(microbatches));
        secs += steps * step_secs(microbatches);
        left -= steps * tokens(microbatches);
    }
    Ok(secs)
}

/// What stands out.
fn advice(simulated: &Simulated, device: &DeviceSpec, pp: u32) -> Vec<String> {
    let mut notes = Vec::new();
    let launch = simulated.accounting.mean_secs(BubbleCause::Launch);
    let busy = simulated.accounting.mean_busy_secs();
    if launch > 0.25 * busy {
        notes.push(format!(
            "launching takes {:.0}% of the time that tasks do: tasks are too small for this device",
            100.0 * launch / busy.max(1e-12)
        ));
    }
    // What a task computes must be longer than it takes to launch, or splitting work over ranks gains nothing.
    let mean_task = busy * simulated.bytes.len() as f64 / simulated.num_tasks.max(1) as f64;
    if pp > 1 && mean_task < 4.0 * (device.launch_secs() + device.host_launch_secs.value) {
        notes.push(format!(
            "do not pipeline: a task takes {:.1} us and its launch {:.1} us; fewer, larger stages are faster",
            mean_task * 1e6,
            (device.launch_secs() + device.host_launch_secs.value) * 1e6
        ));
    }
    notes
}
