//! `bench train`: tokens per second of training and generation, where a step's time goes, and how near its products come to
//! what this machine can do.

use std::collections::BTreeMap;

use bevy_app::prelude::*;
use bevy_ecs::prelude::*;
use engine::prelude::*;
use kernels::{
    clock::now_nanos,
    cost::Cost,
    ops::gemm::{Mat, Threads, gemm},
};

use crate::{
    api::{BenchReport, BenchRequest, KindReport},
    generate::{Generation, run_to_rest},
    hf::config::{ConfigDocument, HfConfig},
    params::{num_activated_params, num_params},
    scene::Compute,
    serve::{Params, Server},
    session::SessionError,
    setup::{Options, set_up},
    train::Training,
    work::{Work, turn_of},
};

/// Steps before the measured ones.
const WARM_UP_STEPS: u64 = 2;
/// Tokens of the prompt before the generated ones.
const PROMPT: &str = "It was the whiteness of the whale that above all things appalled me.";

#[derive(Resource, Default)]
struct Measured {
    step_secs: Vec<f64>,
    overhead_share: Vec<f64>,
    kinds: BTreeMap<&'static str, Vec<f64>>,
    counts: BTreeMap<&'static str, u64>,
}

fn median(values: &mut [f64]) -> f64 {
    values.sort_by(f64::total_cmp);
    values.get(values.len() / 2).copied().unwrap_or(0.0)
}

fn measure(mut measured: ResMut<Measured>, telemetry: Res<Telemetry>, training: Res<Training>, mut work: ResMut<Work>) {
    if training.step > WARM_UP_STEPS {
        let times = telemetry.times();
        measured.step_secs.push(times.step_secs);
        measured.overhead_share.push(times.overhead_secs / times.step_secs);
        for (kind, secs) in &times.busy_secs_by_kind {
            measured.kinds.entry(kind.0).or_default().push(*secs);
        }
        measured.counts.clear();
        for span in telemetry.last().iter().flat_map(|snapshot| snapshot.spans.iter()) {
            *measured.counts.entry(span.kind.0).or_default() += 1;
        }
    }
    if training.stop_at.is_some_and(|stop| training.step >= stop) {
        *work = Work::Rest;
    }
}

/// Runs the benchmark.
///
/// # Errors
/// If the scene cannot be set up or a step fails.
pub fn bench(request: BenchRequest) -> Result<BenchReport, SessionError> {
    let options = Options { with_mtp: !request.no_mtp, progress: request.progress.clone() };
    let mut setup = set_up(&request.loaded, options)?;
    let app = &mut setup.app;
    app.init_resource::<Measured>().insert_resource(Work::Train);
    app.add_systems(Step, measure.in_set(StepSystems::Keep).run_if(turn_of(Work::Train)));
    app.world_mut().resource_mut::<Training>().stop_at = Some(WARM_UP_STEPS + request.num_steps.max(1));
    run_to_rest(app)?;
    let tokens_per_step = {
        let training = app.world().resource::<Training>();
        let inputs = &training.microbatches[0];
        (inputs.num_tokens() * training.scene.batch.num_microbatches_at(0)) as u64
    };
    let costs = kind_costs(app);

    let f32_tokens_per_sec = generation_speed(app, request.num_generated_tokens)?;
    // Weights in half the bytes are read in half the time, and one token reads each of its weights once.
    let mut narrow = request.loaded.clone();
    narrow.scene.precision.compute = Compute::Bf16;
    let options = Options { with_mtp: !request.no_mtp, progress: request.progress.clone() };
    let mut narrow = set_up(&narrow, options)?;
    let bf16_tokens_per_sec = generation_speed(&mut narrow.app, request.num_generated_tokens)?;
    drop(narrow);

    let mut measured = app.world_mut().remove_resource::<Measured>().unwrap_or_default();
    let step_secs = median(&mut measured.step_secs);
    let gflops = |cost: Option<&Cost>, secs: f64| cost.map_or(0.0, |c| c.flops() as f64 / secs.max(1e-9) * 1e-9);
    let mut kinds: Vec<KindReport> = measured
        .kinds
        .iter_mut()
        .map(|(kind, secs)| {
            let secs = median(secs);
            let (kind, num_tasks) = (*kind, measured.counts.get(kind).copied().unwrap_or(0));
            let gflops_per_sec = gflops(costs.get(kind), secs);
            KindReport { kind: kind.to_owned(), num_tasks, secs, share: secs / step_secs, gflops_per_sec }
        })
        .collect();
    kinds.sort_by(|a, b| b.secs.total_cmp(&a.secs));
    let config = &setup.config;
    let document = ConfigDocument::from_config(HfConfig::from_model(config)).map_err(SessionError::runtime)?;
    let total: Cost = costs.values().copied().sum();
    let without_mtp = config.without_mtp();
    Ok(BenchReport {
        config: serde_json::from_str(document.text()).map_err(SessionError::runtime)?,
        num_params: num_params(config),
        num_activated_params: num_activated_params(&without_mtp),
        tokens_per_step,
        seq_len: setup.scene.data.as_ref().map_or(0, |d| d.seq_len) as u64,
        num_threads: rayon::current_num_threads(),
        train_tokens_per_sec: tokens_per_step as f64 / step_secs,
        step_secs,
        overhead_share: median(&mut measured.overhead_share),
        kinds,
        train_gflops_per_sec: total.flops() as f64 / step_secs * 1e-9,
        peak_gemm_gflops_per_sec: peak_gemm(),
        generate_tokens_per_sec: f32_tokens_per_sec.max(bf16_tokens_per_sec),
        generate_f32_tokens_per_sec: f32_tokens_per_sec,
        generate_bf16_tokens_per_sec: bf16_tokens_per_sec,
        generate_num_tokens: request.num_generated_tokens,
        peak_rss_bytes: peak_rss_bytes(),
    })
}

/// Tokens over the median time of one, batch 1, greedy.
fn generation_speed(app: &mut App, num_tokens: usize) -> Result<f64, SessionError> {
    app.world_mut().resource_mut::<Server>().then = Some(Work::Rest);
    let params = Params { max_tokens: num_tokens, temperature: 0.0, ignore_eos: true, ..Params::default() };
    app.world_mut().resource_mut::<Generation>().ask(PROMPT, params, None)?;
    app.insert_resource(Work::Serve).insert_resource(Exit::default());
    run_to_rest(app)?;
    let mut token_secs = app.world().resource::<Generation>().answer().token_secs();
    Ok(1.0 / median(&mut token_secs).max(1e-9))
}

/// Sum of the costs of the active graph's tasks, by kind.
fn kind_costs(app: &mut App) -> BTreeMap<&'static str, Cost> {
    let world = app.world_mut();
    let order = match world.resource::<Plans>().active_graph() {
        Ok(Some(graph)) => graph.order.clone(),
        _ => Vec::new(),
    };
    let mut costs: BTreeMap<&'static str, Cost> = BTreeMap::new();
    for task in order.iter().filter_map(|&id| world.get::<Task>(id)) {
        *costs.entry(task.kind.0).or_default() += task.cost;
    }
    costs
}

/// Best rate of a large f32 product on all threads.
fn peak_gemm() -> f64 {
    const N: usize = 1024;
    let (a, b, mut c) = (vec![1f32; N * N], vec![1f32; N * N], vec![0f32; N * N]);
    let flops = 2.0 * (N * N * N) as f64;
    let mut best = 0f64;
    for _ in 0..12 {
        let begin = now_nanos();
        gemm(Mat::new(&a, N, N), Mat::new(&b, N, N), 0.0, &mut c, N, Threads::All);
        best = best.max(flops / (now_nanos() - begin) as f64);
    }
    best
}

/// Most resident memory of this process, where the system tells.
fn peak_rss_bytes() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:"));
    line.and_then(|l| l.trim().trim_end_matches(" kB").trim().parse::<u64>().ok()).unwrap_or(0) * 1024
}
