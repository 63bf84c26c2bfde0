//! One layout under a computed clock: every pipeline position is lowered as its rank would lower it, in a world of its own whose
//! tensors have sizes and no bytes, and the graphs are run together.
//!
//! Ranks that differ only in their part of the batch or of the experts do the same, so one of each pipeline position stands for
//! all. Where experts are not loaded alike, that one has the mean load, and waits for the busiest. Where `mesh.ep` does not divide
//! the experts it is one of those that have most, in weights and in memory; the rows that it computes are as many as the mean.

use std::{collections::BTreeMap, sync::Arc};

use engine::{
    bubbles::{Accounting, account, is_compute},
    hardware::{DeviceSpec, Format},
    joint::{RankTasks, simulate_ranks},
    prelude::*,
};
use kernels::{comm::shares, cost::Cost, dtype::DType};
use rayon::prelude::*;

use crate::{
    api::Progress,
    dispatch::{RETURN_F, RETURN_I},
    distribute::Distribution,
    expert::{EXPERTS_F, EXPERTS_I},
    formats::Formats,
    head::{HEAD_F, LossSums},
    local::Silent,
    lower::ActivationBytes,
    microbatch::Inputs,
    model::Parameters,
    model_config::ModelConfig,
    on_gpu::OnGpu,
    optimizer::OptimizerState,
    routing::{ROUTE_F, ROUTE_I, ROUTE_W},
    scene::{AdamW, Optimizer, Recompute},
    session::{ModelSetup, SessionError, app_with_model, dtype_of},
    train,
    weights::Weights,
};

/// What is simulated, beside the distribution.
#[derive(Clone)]
pub struct Work<'a> {
    /// The model.
    pub config: &'a ModelConfig,
    /// What it runs on.
    pub device: &'a DeviceSpec,
    /// What products are computed in.
    pub format: Format,
    /// Optimizer; AdamW if none is said.
    pub optimizer: Option<Optimizer>,
    /// What is computed again.
    pub recompute: Recompute,
    /// Sequences in a microbatch.
    pub microbatch_sequences: usize,
    /// Tokens in a sequence.
    pub seq_len: usize,
    /// Rows of the busiest rank's experts over the mean.
    pub load: f64,
}

/// Bytes of a rank at its peak moment.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, serde::Serialize)]
pub struct RankBytes {
    /// The rank that stands for its pipeline position.
    pub rank: u32,
    /// Weights in the type that is computed with.
    pub weights: u64,
    /// Their gradients.
    pub gradients: u64,
    /// Masters and moments.
    pub optimizer: u64,
    /// Activations and gradients of activations.
    pub activations: u64,
    /// Rows and tensors from and to other ranks.
    pub communication: u64,
    /// Sum of all.
    pub total: u64,
}

/// A step of a layout.
pub struct Simulated {
    /// Memory of each pipeline position.
    pub bytes: Vec<RankBytes>,
    /// What lives for a part of the step only, for each position and each of its tasks; empty unless spans were asked for.
    pub bytes_by_task: Vec<Vec<ActivationBytes>>,
    /// From the first task to the last.
    pub step_secs: f64,
    /// Busy and idle time of each pipeline position.
    pub accounting: Accounting,
    /// Spans of each position; empty unless they were asked for.
    pub spans: Vec<Vec<Span>>,
    /// What each position's tasks ask for.
    pub costs: Vec<Cost>,
    /// Tasks of all positions.
    pub num_tasks: usize,
}

/// One position, lowered.
struct Position {
    graph: Graph,
    overlapped: Vec<bool>,
    bytes: RankBytes,
    bytes_by_task: Vec<ActivationBytes>,
}

/// Runs a step of `num_microbatches` microbatches a rank.
///
/// # Errors
/// If the layout does not take so many, or the device lacks a figure that is needed.
pub fn simulate(
    work: &Work,
    distribution: &Distribution,
    num_microbatches: usize,
    with_spans: bool,
) -> Result<Simulated, SessionError> {
    let mesh = distribution.mesh;
    let (stands_in, share) = fullest(work.config, mesh.ep);
    let ranks: Vec<u32> = (0..mesh.pp).map(|pp| mesh.at_stage(stands_in, pp)).collect();
    let positions: Vec<Result<(Position, RankTasks), SessionError>> = ranks
        .par_iter()
        .map(|&rank| {
            let mut position = lower(work, distribution, rank, (num_microbatches, 1.0))?;
            if share > 1.0 {
                let Position { bytes, bytes_by_task, .. } = lower(work, distribution, rank, (num_microbatches, share))?;
                position = Position { bytes, bytes_by_task, ..position };
            }
            let tasks = durations(work, &position, rank)?;
            Ok((position, tasks))
        })
        .collect();
    let (positions, tasks): (Vec<Position>, Vec<RankTasks>) =
        positions.into_iter().collect::<Result<Vec<_>, _>>()?.into_iter().unzip();
    let times = simulate_ranks(&tasks).map_err(SessionError::runtime)?;
    let end = times.iter().flatten().map(|time| time.end_nanos).max().unwrap_or(0);
    let mut accounting: Option<Accounting> = None;
    let mut spans = Vec::new();
    for (position, times) in positions.iter().zip(&times) {
        let mut of_rank = position.graph.spans_at(times);
        if work.load > 1.0 {
            let most = (1000.0 * work.load) as u64;
            let waits = |span: &&mut Span| span.kind == RETURN_F || span.kind == RETURN_I;
            of_rank.iter_mut().filter(waits).for_each(|span| span.load = Some((1000, most)));
        }
        let account = account(&of_rank, is_compute, (0, end));
        match &mut accounting {
            None => accounting = Some(account),
            Some(all) => all.beside(account.ranks),
        }
        if with_spans {
            spans.push(of_rank);
        }
    }
    let bytes_by_task = |position: &Position| position.bytes_by_task.clone();
    Ok(Simulated {
        bytes_by_task: if with_spans { positions.iter().map(bytes_by_task).collect() } else { Vec::new() },
        bytes: positions.iter().map(|position| position.bytes).collect(),
        step_secs: end as f64 * 1e-9,
        accounting: accounting.unwrap_or_default(),
        spans,
        costs: positions.iter().map(|position| position.graph.spans.iter().map(|span| span.cost).sum()).collect(),
        num_tasks: tasks.iter().map(RankTasks::len).sum(),
    })
}

/// The first of `ep` ranks that have most experts, and how many those are over the mean.
fn fullest(config: &ModelConfig, ep: u32) -> (u32, f64) {
    let Some(moe) = &config.moe else { return (0, 1.0) };
    let (n, e) = (ep as usize, moe.n_routed_experts);
    let member = shares::fullest(n, e);
    (member as u32, shares::experts_of(member, n, e).len() as f64 * f64::from(ep) / e as f64)
}

/// A position as its rank would lower it, with `expert_load` times the mean rows at its experts.
fn lower(
    work: &Work,
    distribution: &Distribution,
    rank: u32,
    (num_microbatches, expert_load): (usize, f64),
) -> Result<Position, SessionError> {
    let ranks = distribution.planned(rank);
    let layout = ranks.layout.clone();
    let progress: Arc<dyn Progress> = Arc::new(Silent);
    let setup = ModelSetup {
        config: work.config,
        // What is rounded to 8 bits, and when, is in the tasks' costs.
        formats: Formats { compute: dtype_of(work.format), moments: DType::F32, fp8: None },
        max_positions: work.seq_len,
        trainable: true,
        recompute: work.recompute.clone(),
        progress,
        ranks,
        num_threads: None,
        device: kernels::device::Device::Meta,
        on_gpu: OnGpu::default(),
        clock: Clock::Virtual { device: Box::new(work.device.clone()), format: work.format },
    };
    let mut app = app_with_model(setup, Weights::of(|_| Ok(Vec::new())))?;
    let world = app.world_mut();
    let memory = world.resource::<Tensors>().memory().clone();
    let optimizer = work.optimizer.clone().unwrap_or(Optimizer::AdamW(AdamW::default()));
    let state = OptimizerState::allocate(
        (optimizer, DType::F32),
        world.resource::<Parameters>(),
        work.config,
        &layout,
        &memory,
    );
    let optimizer_bytes = state.num_bytes();
    world.insert_resource(state);
    let num_mtp = work.config.num_nextn_predict_layers;
    world.insert_resource(LossSums::allocate(&memory, num_microbatches, num_mtp));
    world.init_resource::<crate::head::LossScale>();
    world.init_resource::<crate::optimizer::UpdateScalars>();
    let inputs =
        (0..num_microbatches).map(|_| Inputs::allocate(&memory, work.microbatch_sequences, work.seq_len, num_mtp));
    let inputs = inputs.collect();
    let options = train::Options {
        expert_load: Some(expert_load),
        keeps_narrow: work.format == Format::Fp8,
        ..train::Options::default()
    };
    let lowered = train::lower_step(world, inputs, options).map_err(SessionError::input)?;
    let parameters = world.resource::<Parameters>();
    let weights = parameters.weights.iter().map(|w| w.value.size_bytes()).sum();
    let gradients = parameters.weights.iter().filter_map(|w| w.grad).map(|grad| grad.size_bytes()).sum();
    let ActivationBytes { activations, communication } = lowered.peak;
    // The busiest rank's rows need as much more room.
    let more = work.load / expert_load;
    let communication = (communication as f64 * more) as u64;
    let total = weights + gradients + optimizer_bytes + activations + communication;
    let bytes = RankBytes { rank, weights, gradients, optimizer: optimizer_bytes, activations, communication, total };
    let mut bytes_by_task = lowered.bytes_by_task;
    for bytes in &mut bytes_by_task {
        bytes.communication = (bytes.communication as f64 * more) as u64;
    }
    Ok(Position { graph: lowered.graph, overlapped: lowered.overlapped, bytes, bytes_by_task })
}

/// Products that stay in the high-precision format beside 8-bit ones: head and router (DeepSeek-V3 report, section 3.3.1).
fn keeps_high(kind: TaskKind) -> bool {
    [HEAD_F, ROUTE_F, ROUTE_I, ROUTE_W].contains(&kind)
}

/// How long each task takes: beside communication, a device has fewer multiprocessors left.
fn durations(work: &Work, position: &Position, rank: u32) -> Result<RankTasks, SessionError> {
    let beside = work.device.beside_communication();
    let graph = &position.graph;
    let mut nanos = Vec::with_capacity(graph.order.len());
    // Most tasks of a step are alike, but for their tensors.
    let mut known: BTreeMap<(TaskKind, bool), Vec<(Cost, u64)>> = BTreeMap::new();
    for (span, &overlapped) in graph.spans.iter().zip(&position.overlapped) {
        let alike = known.entry((span.kind, overlapped)).or_default();
        let found = alike.iter().find(|(cost, _)| *cost == span.cost).map(|(_, nanos)| *nanos);
        let duration = match found {
            Some(duration) => duration,
            None => {
                let device = if overlapped { &beside } else { work.device };
                let format = if keeps_high(span.kind) { work.format.high() } else { work.format };
                let duration = device.task_nanos(span.kind.0, &span.cost, format).map_err(SessionError::input)?;
                alike.push((span.cost, duration));
                duration
            }
        };
        nanos.push(duration);
    }
    let mut tasks = RankTasks::of(rank, graph, &nanos);
    tasks.host_nanos = (work.device.host_launch_secs.value * 1e9) as u64;
    if work.load > 1.0 {
        // Of the last experts' task before each way back, which waits for those that had more to do.
        let mut last = 0;
        for (i, span) in graph.spans.iter().enumerate() {
            if span.kind == EXPERTS_F || span.kind == EXPERTS_I {
                last = nanos[i];
            } else if span.kind == RETURN_F || span.kind == RETURN_I {
                tasks.wait_longer(i as u32, ((work.load - 1.0) * last as f64) as u64);
            }
        }
    }
    Ok(tasks)
}
