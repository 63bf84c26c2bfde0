//! `run`: a scene from its first step to its last, with logs, checkpoints, validation and a sample at the end.

use std::{
    fs::File,
    io::BufWriter,
    path::PathBuf,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
};

use bevy_app::prelude::*;
use bevy_ecs::prelude::*;
use engine::{
    checkpoint::{self, BoxError},
    log::RunLog,
    prelude::*,
    trace::TraceWriter,
};

use crate::{
    api::{RunReport, RunRequest},
    data::{
        self, DataSpec, TokenizerSource,
        cursor::Loader,
        packing::{Packing, Rows},
        split::HeldOut,
        tokenizer::Tokenizer,
        validation::Validation,
    },
    evaluate::{EvaluatePlugin, Evaluation},
    generate::{GeneratePlugin, Generation, Sampler},
    hf::read::HfFolder,
    microbatch::{Inputs, MAX_MTP},
    model::{Parameters, initial_values},
    model_config::ModelConfig,
    optimizer::OptimizerState,
    params::{num_activated_params, num_params},
    routing::{ExpertCounts, RoutingState},
    save,
    scene::{self, Loaded, Scene},
    session::{ModelSetup, Session, SessionError, app_with_model, dtype},
    train::{TrainPlugin, Training},
    work::Work,
};

/// The run's folder, log and trace.
#[derive(Resource)]
struct RunDir {
    dir: PathBuf,
    log: RunLog,
    trace: Option<TraceWriter<BufWriter<File>>>,
    tokenizer: Arc<Tokenizer>,
    scene_text: String,
    saved_step: Option<u64>,
    checkpoint: Option<PathBuf>,
    val: Option<crate::evaluate::EvaluationResult>,
    finished: bool,
}

#[derive(Resource)]
struct StopFlag(Arc<AtomicUsize>);

/// Runs a scene.
///
/// # Errors
/// If the scene cannot be set up. What happens to the run itself is in the report.
pub fn run(request: RunRequest) -> Result<RunReport, SessionError> {
    let RunRequest { loaded, resume, stop, progress } = request;
    let Setup { mut app, scene, config } = set_up(&loaded, Options { with_mtp: true, progress: progress.clone() })?;
    let telemetry = scene.telemetry.clone().unwrap_or_default();
    let dir = telemetry.dir.join(&scene.name);
    let mut last_step = 0;
    if resume {
        let found = checkpoint::latest_valid(&dir).map_err(SessionError::runtime)?;
        for (path, why) in &found.skipped {
            progress.note(&format!("skipped the damaged checkpoint {}: {why}", path.display()));
        }
        match found.path {
            None => progress.note(&format!("{} has no whole checkpoint: starting from step 0", dir.display())),
            Some(path) => {
                save::restore(app.world_mut(), &path).map_err(SessionError::runtime)?;
                last_step = found.step;
                progress.note(&format!("resumed from {}", path.display()));
            }
        }
    }
    let log = RunLog::open(&dir, last_step).map_err(SessionError::runtime)?;
    let scene_text = loaded.to_ron().map_err(SessionError::runtime)?;
    std::fs::write(dir.join("scene.ron"), &scene_text)
        .map_err(|e| SessionError::runtime(format!("write {}: {e}", dir.join("scene.ron").display())))?;
    let trace = match &telemetry.trace_steps {
        None => None,
        Some(_) => Some(TraceWriter::create(&dir.join("trace.json")).map_err(SessionError::runtime)?),
    };
    let tokenizer = app.world().resource::<Generation>().tokenizer.clone();
    app.insert_resource(RunDir {
        dir: dir.clone(),
        log,
        trace,
        tokenizer,
        scene_text,
        saved_step: (last_step > 0).then_some(last_step),
        checkpoint: None,
        val: None,
        finished: false,
    })
    .insert_resource(StopFlag(stop))
    .insert_resource(Work::Train)
    .add_systems(Update, watch_stop)
    .add_systems(Step, keep.in_set(StepSystems::Keep))
    .add_systems(Finish, last_checkpoint);
    let reason = if app.world().resource::<Training>().step >= app.world().resource::<Training>().train.steps {
        progress.note("all steps of the scene are done already; raise train.steps to go on");
        *app.world_mut().resource_mut::<Work>() = after_training(app.world());
        engine::app::run(&mut app)
    } else {
        engine::app::run(&mut app)
    };
    Ok(report(&mut app, &config, reason))
}

/// How a scene is set up.
pub struct Options {
    /// Keep the MTP modules.
    pub with_mtp: bool,
    /// Who is told.
    pub progress: Arc<dyn crate::api::Progress>,
}

/// A scene as an app, before its first step.
pub struct Setup {
    /// The app.
    pub app: App,
    /// What it was made from.
    pub scene: Arc<Scene>,
    /// Its model.
    pub config: ModelConfig,
}

fn missing(section: &str) -> SessionError {
    SessionError::input(format!("the scene has no section `{section}`, which a training run needs"))
}

/// The model of a scene: its own section, or that of the folder it starts from.
fn model_of(loaded: &Loaded) -> Result<(ModelConfig, Option<HfFolder>), SessionError> {
    if let Some(init) = &loaded.scene.init {
        let folder = HfFolder::open(&init.0).map_err(SessionError::input)?;
        let model = folder.model().map_err(SessionError::input)?;
        return Ok((model.config, Some(folder)));
    }
    let section = loaded.scene.model.as_ref().ok_or_else(|| missing("model"))?;
    let config =
        section.resolve().map_err(|problems| SessionError::input(loaded.errors(&scene::prefix(problems, "model"))))?;
    Ok((config, None))
}

/// Builds the app of a scene: data, model, optimizer and the plugins that take turns.
///
/// # Errors
/// If a section is missing, or data or weights cannot be read.
pub fn set_up(loaded: &Loaded, options: Options) -> Result<Setup, SessionError> {
    let scene = Arc::new(loaded.scene.clone());
    let (mut config, folder) = model_of(loaded)?;
    if !options.with_mtp || scene.mtp.is_none() {
        config.num_nextn_predict_layers = 0;
    }
    if config.num_nextn_predict_layers > MAX_MTP {
        return Err(SessionError::input(format!(
            "expected at most {MAX_MTP} MTP modules, found {}",
            config.num_nextn_predict_layers
        )));
    }
    let data_section = scene.data.as_ref().ok_or_else(|| missing("data"))?;
    let train = scene.train.clone().ok_or_else(|| missing("train"))?;
    let schedule = scene.schedule.clone().ok_or_else(|| missing("schedule"))?;
    let optimizer = scene.optimizer.clone().ok_or_else(|| missing("optimizer"))?;
    let telemetry = scene.telemetry.clone().unwrap_or_default();

    let spec = |files: Vec<PathBuf>, held_out, tokenizer| DataSpec {
        files,
        held_out,
        tokenizer,
        cache: telemetry.dir.join(".cache"),
    };
    let tokenizer_source = match &data_section.tokenizer {
        scene::Tokenizer::File(path) => TokenizerSource::File(path.0.clone()),
        scene::Tokenizer::Bpe { vocab_size } => TokenizerSource::Train { vocab_size: *vocab_size },
    };
    let files = data_section.train.0.iter().map(|p| p.0.clone()).collect();
    let held_out = match &data_section.validation {
        scene::Validation::HeldOut { fraction } => Some(HeldOut(*fraction)),
        scene::Validation::File(_) => None,
    };
    let prepared = data::prepare(&spec(files, held_out, tokenizer_source)).map_err(SessionError::input)?;
    prepared.tokenizer.check_model(config.vocab_size).map_err(SessionError::input)?;
    let held_out = match &data_section.validation {
        scene::Validation::HeldOut { .. } => prepared.held_out.clone(),
        scene::Validation::File(path) => {
            let documents = data::source::read_documents(std::slice::from_ref(&path.0)).map_err(SessionError::input)?;
            let cache = telemetry.dir.join(".cache");
            let shard = data::cached_shard(&cache, &documents, &prepared.tokenizer).map_err(SessionError::input)?;
            data::corpus::Corpus::new([Arc::new(shard)])
        }
    };
    let packing = Packing {
        seq_len: data_section.seq_len,
        end_of_text: prepared.tokenizer.end_of_text(),
        num_mtp: config.num_nextn_predict_layers,
        cross_document_attention: data_section.cross_document_attention,
        refuse_long_documents: data_section.refuse_long_documents,
        end_targets: true,
    };
    let rows = Rows::new(prepared.train.clone(), packing).map_err(SessionError::input)?;
    let loader = Loader::new(rows, scene.seed).map_err(SessionError::input)?;
    let validation = Validation::new(held_out, Packing { num_mtp: 0, ..packing }).map_err(SessionError::input)?;

    let max_positions = config.max_position_embeddings.max(data_section.seq_len);
    let setup = ModelSetup {
        config: &config,
        compute: dtype(scene.precision.compute),
        max_positions,
        trainable: true,
        recompute: scene.recompute.clone(),
        progress: options.progress.clone(),
    };
    let mut app = app_with_model(setup, |spec, index| match &folder {
        Some(folder) => folder.read_param(spec).map_err(SessionError::input),
        None => Ok(initial_values(spec, index, &config, scene.seed)),
    })?;
    let world = app.world_mut();
    let memory = world.resource::<Tensors>().memory().clone();
    let state = OptimizerState::allocate(optimizer, world.resource::<Parameters>(), &memory);
    world.insert_resource(state);
    let most = scene.batch.ramp.iter().map(|r| r.num_microbatches).chain([scene.batch.num_microbatches]).max();
    let sequences = scene.batch.microbatch_sequences;
    let allocate = |num_mtp| Inputs::allocate(&memory, sequences, data_section.seq_len, num_mtp);
    let microbatches = (0..most.unwrap_or(1)).map(|_| allocate(config.num_nextn_predict_layers)).collect();
    let counts = world.resource::<ExpertCounts>();
    let moe_layers = (counts.0.len(), counts.0.first().map_or(0, |(_, t)| t.len()));
    let mut batches: Vec<_> = validation.batches(sequences).collect();
    let mut num_bytes = Some(validation.num_bytes());
    if let Some(max_tokens) = scene.eval.as_ref().and_then(|e| e.max_tokens) {
        let keep = max_tokens.div_ceil(sequences * data_section.seq_len).max(1);
        if keep < batches.len() {
            batches.truncate(keep);
            // Bytes of a part of the text: its share of the tokens.
            let tokens: usize = batches.iter().map(|b| b.num_targets()).sum();
            num_bytes = Some((validation.num_bytes() as f64 * tokens as f64 / validation.num_targets() as f64) as u64);
        }
    }
    let inputs = allocate(0);
    world.insert_resource(Evaluation::new(inputs, batches, num_bytes, Work::Train));
    let routing = scene.routing.clone().unwrap_or_default();
    world.insert_resource(RoutingState {
        mode: routing.mode,
        sequence_aux_loss: routing.sequence_aux_loss,
        z_loss: routing.z_loss,
        seed: scene.seed,
        ..RoutingState::default()
    });
    let training = Training::new(scene.clone(), train, schedule, loader, microbatches, moe_layers);
    world.insert_resource(training);
    let sample = scene.sample.clone().unwrap_or_default();
    let sampler = Sampler { temperature: sample.temperature, top_p: sample.top_p, top_k: 0, seed: scene.seed };
    let capacity = max_positions;
    let generation = Generation::new(world, prepared.tokenizer.clone(), capacity, sampler)?;
    world.insert_resource(generation);
    app.add_plugins((TrainPlugin, EvaluatePlugin, GeneratePlugin));
    Ok(Setup { app, scene, config })
}

fn watch_stop(flag: Res<StopFlag>, mut exit: ResMut<Exit>) {
    let signal = flag.0.load(Ordering::Relaxed);
    if signal != 0 {
        exit.stop(ExitReason::Signal(signal as i32));
    }
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
            line.step = step;
            run.log.write(&line)?;
            if let (Some(range), Some(trace)) =
                (scene.telemetry.as_ref().and_then(|t| t.trace_steps.clone()), &mut run.trace)
                && (range.start..range.start + range.count).contains(&step)
            {
                trace.push(&line)?;
            }
        }
        let just_evaluated = world.resource_mut::<Evaluation>().fresh.take();
        if let Some(result) = just_evaluated {
            run.val = Some(result);
            let mut line = Snapshot { step, ..Snapshot::default() };
            line.scalars.push(("val_loss_nats_per_token".into(), result.loss_nats_per_token));
            line.scalars.extend(result.bits_per_byte.map(|b| ("val_bits_per_byte".to_owned(), b)));
            run.log.write(&line)?;
        }
        let training = world.resource::<Training>();
        if was_training && work == Work::Train {
            if let Some(max_secs) = training.train.max_train_secs
                && training.train_secs >= max_secs
            {
                let reason = ExitReason::Budget(format!("{max_secs} s of training at step {step} of {total}"));
                world.resource_mut::<Exit>().stop(reason);
                return Ok(());
            }
            if scene.checkpoint.as_ref().is_some_and(|c| step % c.every_steps.max(1) == 0) && step < total {
                save_checkpoint(world, &mut run)?;
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
            let next = if scene.sample.is_some() && !run.finished { Work::Generate } else { Work::Rest };
            if next == Work::Generate {
                let prompt = scene.sample.clone().unwrap_or_default();
                let mut generation = world.resource_mut::<Generation>();
                generation.start(&prompt.prompt, prompt.max_new_tokens)?;
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

fn save_checkpoint(world: &World, run: &mut RunDir) -> Result {
    let training = world.resource::<Training>();
    let keep_last = training.scene.checkpoint.as_ref().map_or(2, |c| c.keep_last);
    let path = checkpoint::save(&run.dir, training.step, keep_last, |folder| -> Result<(), BoxError> {
        save::write_model(world, Some(&run.tokenizer), folder)?;
        save::write_train_state(world, folder)?;
        std::fs::write(folder.join("train/scene.ron"), &run.scene_text)?;
        Ok(())
    })?;
    run.saved_step = Some(training.step);
    run.checkpoint = Some(path);
    Ok(())
}

fn last_checkpoint(world: &mut World) -> Result {
    let step = world.resource::<Training>().step;
    world.resource_scope(|world, mut run: Mut<RunDir>| {
        if run.saved_step == Some(step) || step == 0 {
            return Ok(());
        }
        save_checkpoint(world, &mut run)
    })
}

fn exit_code(reason: &ExitReason) -> u8 {
    match reason {
        ExitReason::Finished => 0,
        ExitReason::Error(_) => 1,
        ExitReason::Infeasible(_) => 3,
        ExitReason::Diverged(_) => 4,
        ExitReason::PeerLost(_) => 5,
        ExitReason::Budget(_) => 6,
        ExitReason::Signal(number) => 128u8.wrapping_add(*number as u8),
    }
}

fn report(app: &mut App, config: &ModelConfig, reason: ExitReason) -> RunReport {
    let world = app.world_mut();
    // Dropping the writer closes the trace's document.
    let trace = world.resource_mut::<RunDir>().trace.take();
    if let Some(Err(error)) = trace.map(TraceWriter::finish) {
        world.resource::<Session>().progress.note(&format!("the trace is not whole: {error}"));
    }
    let (training, run) = (world.resource::<Training>(), world.resource::<RunDir>());
    let without_mtp = ModelConfig { num_nextn_predict_layers: 0, ..config.clone() };
    let generation = world.resource::<Generation>();
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
        peak_tensor_bytes: world.resource::<Tensors>().memory().peak_bytes(),
        sample: (!generation.text().is_empty()).then(|| generation.text().to_owned()),
        run_dir: run.dir.clone(),
        checkpoint_dir: run.checkpoint.clone().or_else(|| run.saved_step.map(|_| run.dir.join("latest"))),
        exit_reason: reason.to_string(),
        exit_code: exit_code(&reason),
    }
}
