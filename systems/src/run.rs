//! `run`: a scene from its first step to its last, with logs, checkpoints, validation and a sample at the end.

mod claim;
mod processes;

use std::{
    fs::File,
    io::BufWriter,
    path::{Path, PathBuf},
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use bevy_app::prelude::*;
use bevy_ecs::prelude::*;
pub use claim::{Claim, claim};
use engine::{
    control::{self, ControlPlugin, Inbox},
    log::RunLog,
    prelude::*,
    trace::TraceWriter,
};
use kernels::comm::Comm;
use processes::{Own, lost_process, ranks_here};

use crate::{
    api::{GenerateRequest, Progress, RunReport, RunRequest},
    bill, diloco,
    distribute::Distribution,
    evaluate::Evaluation,
    generate::Generation,
    live,
    local::{self, Silent},
    measure::{Comparison, MeasurePlugin, RankSteps},
    model_config::ModelConfig,
    observe,
    params::{num_activated_params, num_params},
    power,
    ranks::Ranks,
    remote,
    replicas::ReplicasPlugin,
    restore,
    rounding::{Rounding, RoundingReport},
    saving::{self, Saving},
    serve::Params,
    session::{Session, SessionError},
    setup::{Prepared, prepare, set_up_rank},
    train::Training,
    work::{Work, turn_of},
};

/// The run's folder, log and trace.
#[derive(Resource)]
struct RunDir {
    dir: PathBuf,
    /// Of the first rank.
    log: Option<RunLog>,
    trace: Option<SharedTrace>,
    val: Option<crate::evaluate::EvaluationResult>,
    finished: bool,
}

/// The trace of all ranks of this process.
type SharedTrace = Arc<Mutex<TraceWriter<BufWriter<File>>>>;

/// Runs a scene.
///
/// # Errors
/// If the scene cannot be set up. What happens to the run itself is in the report.
pub fn run(mut request: RunRequest) -> Result<RunReport, SessionError> {
    let (handle, inbox) = request.control.take().unwrap_or_else(control::channel);
    let scene = &request.loaded.scene;
    let prepared = prepare(&request.loaded, true)?;
    let distribution = Distribution::new(scene, &prepared.config)
        .map_err(|problems| SessionError::input(request.loaded.errors(&problems)))?;
    let telemetry = scene.telemetry.clone().unwrap_or_default();
    let ranks = ranks_here(&distribution, request.comm.as_ref())?;
    let leads = ranks.iter().any(Ranks::is_first);
    let across = request.comm.clone().filter(Comm::is_across_processes);
    let dir = telemetry.dir.join(&scene.name);
    std::fs::create_dir_all(&dir).map_err(|e| SessionError::runtime(format!("create {}: {e}", dir.display())))?;
    let _claim = if leads { Some(claim(&dir)?) } else { None };
    let trace_file = if leads { "trace.json".into() } else { format!("trace-rank-{}.json", ranks[0].number()) };
    let trace_file = dir.join(trace_file);
    let trace = match &telemetry.trace_steps {
        None => None,
        Some(_) => {
            let cannot = |e| SessionError::runtime(format!("cannot write {}: {e}", trace_file.display()));
            let writer = TraceWriter::create(&trace_file).map_err(cannot)?;
            Some(Arc::new(Mutex::new(writer)))
        }
    };
    let here = across.as_ref().map_or(ranks.len(), |comm| comm.ranks_per_node().min(comm.num_ranks()) as usize);
    let num_threads = local::threads_per_rank(here);
    inbox.feed().set_num_ranks(ranks.len());
    let server = if leads { Some(remote::start(scene, &dir, &handle, &request.progress)?) } else { None };
    let mut outcomes = local::run_ranks(ranks, |ranks| {
        let progress = if ranks.is_first() { request.progress.clone() } else { Arc::new(Silent) };
        let (trace, inbox) = (trace.clone(), inbox.clone());
        run_rank(&request, RankSetup { prepared: &prepared, ranks, num_threads, progress, trace, inbox })
    });
    // In this order: who listens is told of the end, and then left.
    drop((handle, inbox));
    drop(server);
    let trace = trace.and_then(Arc::into_inner).map(|trace| trace.into_inner().unwrap_or_else(PoisonError::into_inner));
    let mut steps: Vec<RankSteps> =
        outcomes.iter_mut().flatten().flatten().filter_map(|((_, steps), _)| steps.take()).collect();
    let peak_of = |outcome: &local::Outcome<Ran>| match outcome {
        Some(Ok(((report, _), _))) => report.peak_tensor_bytes,
        _ => 0,
    };
    let mut peak_tensor_bytes = outcomes.iter().map(peak_of).max().unwrap_or(0);
    let ended_well = matches!(outcomes.first(), Some(Some(Ok((_, reason)))) if !reason.is_failure());
    let whole = match &across {
        None => trace.map_or(Ok(()), |trace| trace.finish().map(drop)),
        Some(comm) => {
            let own = Own { steps: steps.pop(), peak_tensor_bytes, trace, trace_file: &trace_file };
            let gathered = own.gather(comm, ended_well);
            (steps, peak_tensor_bytes) = (gathered.steps, gathered.peak_tensor_bytes);
            gathered.whole
        }
    };
    if let Err(error) = whole {
        request.progress.note(&format!("the trace or the report is not whole: {error}"));
    }
    let own = outcomes.first().and_then(|first| first.as_ref()?.as_ref().ok()).map(|(_, reason)| reason);
    let lost = local::cause(&outcomes).or_else(|| lost_process(across.as_ref()?, own));
    let num_ranks = distribution.num_ranks() as usize;
    let (idle, traffic) = match &steps[..] {
        // Both are about all ranks.
        all if all.len() == num_ranks => {
            (Comparison::of(all)?, all.iter().map(RankSteps::traffic).cloned().reduce(|a, b| a.and(&b)))
        }
        _ => (None, None),
    };
    let first = if outcomes.is_empty() { None } else { outcomes.swap_remove(0) };
    let mut report = match (first, &lost) {
        (Some(Ok(((report, _), _))), None) if leads => {
            return with_sample(RunReport { idle, traffic, peak_tensor_bytes, ..report }, &request);
        }
        (Some(Ok(((report, _), _))), None) => report,
        (Some(Ok(((report, _), _))), Some(_)) => report,
        (Some(Err(error)), _) => return Err(error),
        (None, _) => {
            let reason: String =
                lost.as_ref().map_or_else(|| "the first rank ended without a report".into(), ToString::to_string);
            return Err(SessionError { message: reason, exit_code: 5 });
        }
    };
    if let Some(reason) = lost {
        (report.exit_reason, report.exit_code) = (reason.to_string(), exit_code(&reason));
    }
    Ok(report)
}

/// On several ranks no rank has the whole model: the sample comes from the last checkpoint.
fn with_sample(mut report: RunReport, request: &RunRequest) -> Result<RunReport, SessionError> {
    let scene = &request.loaded.scene;
    let (Some(sample), Some(checkpoint)) = (&scene.sample, &report.checkpoint_dir) else { return Ok(report) };
    if scene.num_ranks() == 1 || report.exit_code != 0 {
        return Ok(report);
    }
    let generated = crate::generate::generate(GenerateRequest {
        checkpoint: checkpoint.clone(),
        prompt: sample.prompt.clone(),
        max_new_tokens: sample.max_new_tokens,
        temperature: sample.temperature,
        top_p: sample.top_p,
        top_k: 0,
        seed: scene.seed,
        ignore_eos: false,
        compute: scene.precision.compute,
        device: scene.device.into(),
        progress: request.progress.clone(),
    })?;
    report.sample = Some(generated.text);
    Ok(report)
}

/// What a rank ends with.
type Ran = (RunReport, Option<RankSteps>);

/// What a rank starts from.
struct RankSetup<'a> {
    prepared: &'a Prepared,
    ranks: Ranks,
    num_threads: Option<usize>,
    progress: Arc<dyn Progress>,
    trace: Option<SharedTrace>,
    inbox: Inbox,
}

fn run_rank(request: &RunRequest, setup: RankSetup) -> Result<(Ran, ExitReason), SessionError> {
    let RankSetup { prepared, ranks, num_threads, progress, trace, inbox } = setup;
    let RunRequest { loaded, resume, stop, .. } = request;
    let mut app = set_up_rank(loaded, prepared, ranks.clone(), num_threads, &progress)?;
    let scene = &loaded.scene;
    if let Some(settings) = &scene.diloco {
        diloco::add(&mut app, settings);
    }
    let telemetry = scene.telemetry.clone().unwrap_or_default();
    let dir = telemetry.dir.join(&scene.name);
    let mut last_step = 0;
    if *resume {
        let found = saving::latest_valid(&ranks, &dir).map_err(SessionError::runtime)?;
        for (path, why) in &found.skipped {
            progress.note(&format!("skipped the damaged checkpoint {}: {why}", path.display()));
        }
        match found.path {
            None => progress.note(&format!("{} has no checkpoint: starting from step 0", dir.display())),
            Some(path) => {
                restore::restore(app.world_mut(), &path).map_err(SessionError::runtime)?;
                diloco::restore(app.world_mut(), &path).map_err(SessionError::runtime)?;
                last_step = found.step;
                progress.note(&format!("resumed from {}", path.display()));
            }
        }
    }
    power::watch(&mut app).iter().for_each(|said| progress.note(said));
    bill::keep(&mut app, loaded, &prepared.config).map_err(SessionError::input)?;
    bill::says(app.world()).iter().for_each(|said| progress.note(said));
    let scene_text = loaded.to_ron().map_err(SessionError::runtime)?;
    let mut log = None;
    if ranks.is_first() {
        log = Some(RunLog::open(&dir, last_step).map_err(SessionError::runtime)?);
        std::fs::write(dir.join("scene.ron"), &scene_text)
            .map_err(|e| SessionError::runtime(format!("write {}: {e}", dir.join("scene.ron").display())))?;
    }
    ranks.comm.watch().expect_faults(&scene.watchdog.faults);
    let about = (prepared.tokenizer.clone(), scene_text);
    let from_step = (last_step > 0).then_some(last_step);
    let saving = Saving::new(app.world(), &dir, scene.checkpoint.as_ref(), about, from_step);
    app.insert_resource(Peers(ranks.everyone.clone()))
        .insert_resource(RunDir { dir, log, trace, val: None, finished: false })
        .insert_resource(saving)
        .insert_resource(Work::Train)
        .add_systems(Step, (saving::advance.run_if(turn_of(Work::Train)), keep).chain().in_set(StepSystems::Keep))
        .add_systems(Finish, last_checkpoint)
        .add_plugins((
            ControlPlugin {
                name: scene.name.clone(),
                comm: ranks.everyone.clone(),
                inbox: Some(inbox.clone()),
                feeds_are_apart: ranks.everyone.is_across_processes(),
                signal: stop.clone(),
                finish_step: Duration::try_from_secs_f64(scene.watchdog.finish_step_secs).unwrap_or(Duration::MAX),
                note: {
                    let progress = progress.clone();
                    Arc::new(move |line| progress.note(line))
                },
            },
            MeasurePlugin,
            live::LivePlugin,
            observe::ObservePlugin,
        ))
        .method(CHECKPOINT)
        .status_field("num_steps", |world| world.resource::<Training>().train.steps.into());
    if let Some(every_steps) = scene.watchdog.compare_weights_every_steps {
        app.add_plugins(ReplicasPlugin { every_steps });
    }
    if app.world().resource::<Training>().step >= app.world().resource::<Training>().train.steps {
        progress.note("all steps of the scene are done already; raise train.steps to go on");
        // Not one step more where nothing follows the last one.
        *app.world_mut().resource_mut::<Work>() = match after_training(app.world()) {
            Work::Train => Work::Rest,
            next => next,
        };
    }
    let reason = engine::app::run(&mut app);
    if !reason.is_failure()
        && let Err(error) = control::tell_last_step(app.world_mut())
    {
        progress.note(&format!("the last step was not told: {error}"));
    }
    for fault in ranks.comm.watch().faults_left() {
        progress.note(&format!(
            "a fault did not come about: rank {} came to no `{}` in step {}",
            fault.rank, fault.at, fault.step
        ));
    }
    // What went wrong later does not make an earlier step's checkpoint worse; with several ranks the others may be gone.
    if ranks.everyone.num_ranks() == 1
        && let Err(error) = saving::finish(app.world_mut())
    {
        progress.note(&format!("the last checkpoint was not saved: {error}"));
    }
    if reason.is_failure() {
        ranks.everyone.abort(ranks.number(), &reason.to_string());
    }
    let report = report(&app, &prepared.config, reason.clone());
    Ok(((report, RankSteps::of(app.world())), reason))
}

/// Whose turn it is when the last step is done.
fn after_training(world: &World) -> Work {
    if world.resource::<Training>().scene.eval.is_some() { Work::Evaluate } else { Work::Train }
}

/// Logs and saves, and decides whose turn it is.
fn keep(world: &mut World) -> Result {
    let work = *world.resource::<Work>();
    let telemetry = world.resource::<Telemetry>().last().cloned();
    let Some(snapshot) = telemetry else { return Ok(()) };
    let was_training = snapshot.scalar("lr").is_some();
    world.resource_scope(|world, mut run: Mut<RunDir>| -> Result {
        let training = world.resource::<Training>();
        let scene = training.scene.clone();
        let (step, total) = (training.step, training.train.steps);
        if was_training {
            let mut line = (*snapshot).clone();
            line.histograms.retain(|(name, _)| observe::is_logged(name));
            let rounding = world.get_resource::<Rounding>().filter(|rounding| rounding.is_watching);
            let fields = rounding.and_then(|rounding| rounding.last.as_ref()).map(RoundingReport::log_fields);
            run.write_with(&line, fields.unwrap_or_default())?;
            if let (Some(range), Some(trace)) =
                (scene.telemetry.as_ref().and_then(|t| t.trace_steps.clone()), &run.trace)
                && (range.start..range.start + range.count).contains(&step)
            {
                trace.lock().unwrap_or_else(PoisonError::into_inner).push(&line)?;
            }
        }
        let just_evaluated = world.resource_mut::<Evaluation>().fresh.take();
        if let Some(result) = just_evaluated {
            run.val = Some(result);
            run.write(&Snapshot { step, scalars: result.scalars(), ..Snapshot::default() })?;
        }
        let training = world.resource::<Training>();
        if was_training && work == Work::Train {
            if let Some(spent) = training.last.as_ref().and_then(|last| last.spent).filter(|spent| spent.share() >= 1.0)
            {
                let reason = ExitReason::Budget(format!("{spent} at step {step} of {total}"));
                world.resource_mut::<Exit>().stop(reason);
                return Ok(());
            }
            if let Some(max_secs) = training.train.max_train_secs
                && training.train_secs >= max_secs
            {
                let reason = ExitReason::Budget(format!("{max_secs} s of training at step {step} of {total}"));
                world.resource_mut::<Exit>().stop(reason);
                return Ok(());
            }
            if scene.checkpoint.as_ref().is_some_and(|c| step % c.every_steps.max(1) == 0) && step < total {
                saving::begin(world)?;
            }
            let due = scene.eval.as_ref().is_some_and(|e| step % e.every_steps.max(1) == 0);
            if step >= total {
                *world.resource_mut::<Work>() = after_training(world);
            } else if due {
                *world.resource_mut::<Work>() = Work::Evaluate;
            }
            world.resource_mut::<Evaluation>().then = Work::Train;
        }
        let training = world.resource::<Training>();
        // What follows the end: validation, then a sample, then nothing.
        if training.step >= total && *world.resource::<Work>() == Work::Train {
            let can_generate = world.contains_resource::<Generation>();
            let next = if scene.sample.is_some() && can_generate && !run.finished { Work::Serve } else { Work::Rest };
            if next == Work::Serve {
                let sample = scene.sample.clone().unwrap_or_default();
                let params = Params {
                    max_tokens: sample.max_new_tokens,
                    temperature: sample.temperature,
                    top_p: sample.top_p,
                    seed: scene.seed,
                    ..Params::default()
                };
                let progress = world.resource::<Session>().progress.clone();
                world.resource_mut::<Generation>().ask(&sample.prompt, params, Some(progress))?;
            }
            run.finished = true;
            *world.resource_mut::<Work>() = next;
        }
        if *world.resource::<Work>() == Work::Rest {
            world.resource_mut::<Exit>().stop(ExitReason::Finished);
        }
        Ok(())
    })
}

impl RunDir {
    fn write(&mut self, line: &Snapshot) -> Result {
        self.write_with(line, Default::default())
    }

    fn write_with(&mut self, line: &Snapshot, fields: serde_json::Map<String, serde_json::Value>) -> Result {
        Ok(self.log.as_mut().map_or(Ok(()), |log| log.write_with(line, fields))?)
    }
}

/// `run.checkpoint`. A rank that fails would be waited for, so then the run ends, unless there are no others.
const CHECKPOINT: Method = Method {
    name: "run.checkpoint",
    about: "{} -> {path}: saves a checkpoint of the steps done so far",
    access: Access::ChangesAllRanks,
    run: |world, params| {
        params_of::<NoParams>(params)?;
        let step = world.resource::<Training>().step;
        if step == 0 {
            return Err(RpcError::failed("no step is done yet, so there is nothing to save"));
        }
        if *world.resource::<Work>() == Work::LocateNotFinite {
            return Err(RpcError::failed("the last step was not finite: its weights are not to be kept"));
        }
        match saving::save(world) {
            Ok(path) => Ok(serde_json::json!({ "path": path, "step": step })),
            Err(error) => {
                if world.resource::<Ranks>().everyone.num_ranks() > 1 {
                    world.resource_mut::<Exit>().stop(ExitReason::Error(error.to_string()));
                }
                Err(RpcError::failed(error))
            }
        }
    },
};

#[derive(serde::Deserialize)]
#[serde(deny_unknown_fields)]
struct NoParams {}

fn last_checkpoint(world: &mut World) -> Result {
    let training = world.resource::<Training>();
    if training.scene.checkpoint.is_some() && training.step > 0 {
        saving::save(world)?;
    }
    saving::finish(world)
}

fn exit_code(reason: &ExitReason) -> u8 {
    match reason {
        ExitReason::Finished | ExitReason::Stopped => 0,
        ExitReason::Error(_) => 1,
        ExitReason::Infeasible(_) => 3,
        ExitReason::Diverged(_) => 4,
        ExitReason::PeerLost(_) => 5,
        ExitReason::Budget(_) => 6,
        ExitReason::Signal(number) => 128u8.wrapping_add(*number as u8),
    }
}

fn report(app: &App, config: &ModelConfig, reason: ExitReason) -> RunReport {
    let world = app.world();
    let (training, run) = (world.resource::<Training>(), world.resource::<RunDir>());
    let without_mtp = config.without_mtp();
    let (energy_kwh, energy_source) = bill::energy(world).unzip();
    let text = world.get_resource::<Generation>().map(|generation| generation.answer().text);
    RunReport {
        num_params: num_params(config),
        num_activated_params: num_activated_params(&without_mtp),
        num_steps: training.step,
        num_tokens: training.num_tokens,
        train_secs: training.train_secs,
        tokens_per_sec: training.num_tokens as f64 / training.train_secs.max(1e-9),
        train_loss_nats_per_token: training.last.as_ref().map(|s| s.loss_nats_per_token),
        val_loss_nats_per_token: run.val.map(|v| v.loss_nats_per_token),
        val_bits_per_byte: run.val.and_then(|v| v.bits_per_byte),
        max_vio: training.last.as_ref().map_or(0.0, |s| s.max_vio),
        num_dead_experts: training.num_dead_experts(),
        overhead_share: training.overhead.get(),
        idle: None,
        traffic: None,
        fp8_rounding: world.get_resource::<Rounding>().and_then(|rounding| rounding.last.clone()),
        energy_kwh,
        energy_source,
        peak_tensor_bytes: world.resource::<Tensors>().memory().peak_bytes(),
        sample: text.filter(|text| !text.is_empty()),
        run_dir: run.dir.clone(),
        checkpoint_dir: world.resource::<Saving>().latest().map(Path::to_owned),
        exit_reason: reason.to_string(),
        exit_code: exit_code(&reason),
    }
}
