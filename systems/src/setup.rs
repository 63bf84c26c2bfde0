//! From a scene to an app before its first step: data, model, optimizer and the plugins that take turns. What is read from
//! files is read once for all ranks of a process.

use std::{path::PathBuf, sync::Arc};

use bevy_app::prelude::*;
use engine::{prelude::*, stream::RepeatsTasks};
use kernels::comm::Comm;

use crate::{
    api::Progress,
    data::{
        self, DataSpec, TokenizerSource,
        corpus::Corpus,
        cursor::Loader,
        packing::{Packing, Rows},
        split::HeldOut,
        tokenizer::Tokenizer,
        validation::Validation,
    },
    distribute::Distribution,
    evaluate::{EvaluatePlugin, Evaluation},
    formats::Formats,
    generate::Generation,
    head::LossSums,
    hf::read::HfFolder,
    microbatch::{Inputs, MAX_MTP},
    model::{Parameters, initial_values},
    model_config::ModelConfig,
    on_gpu::OnGpu,
    optimizer::OptimizerState,
    ranks::Ranks,
    rounding::Rounding,
    routing::RoutingState,
    scene::{self, Loaded, Scene},
    session::{ModelSetup, SessionError, app_with_model},
    train::{TrainPlugin, Training},
    weights::Weights,
    work::Work,
};

/// How a scene is set up on one rank.
pub struct Options {
    /// Keep the MTP modules.
    pub with_mtp: bool,
    /// Who is told.
    pub progress: Arc<dyn Progress>,
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

/// What of a scene is read from files, for any number of ranks.
pub struct Prepared {
    /// The model.
    pub config: ModelConfig,
    /// The tokenizer.
    pub tokenizer: Arc<Tokenizer>,
    init: Option<PathBuf>,
    train: Corpus,
    held_out: Corpus,
}

fn missing(section: &str) -> SessionError {
    SessionError::input(format!("the scene has no section `{section}`, which a training run needs"))
}

/// The model of a scene: its own section, or that of the folder it starts from.
fn model_of(loaded: &Loaded) -> Result<(ModelConfig, Option<PathBuf>), SessionError> {
    if let Some(init) = &loaded.scene.init {
        let folder = HfFolder::open(&init.0).map_err(SessionError::input)?;
        let model = folder.model().map_err(SessionError::input)?;
        return Ok((model.config, Some(init.0.clone())));
    }
    let section = loaded.scene.model.as_ref().ok_or_else(|| missing("model"))?;
    let config =
        section.resolve().map_err(|problems| SessionError::input(loaded.errors(&scene::prefix(problems, "model"))))?;
    Ok((config, None))
}

/// Reads what a scene names: text, tokenizer, model.
///
/// # Errors
/// If a section is missing, or a file cannot be read.
pub fn prepare(loaded: &Loaded, with_mtp: bool) -> Result<Prepared, SessionError> {
    let scene = &loaded.scene;
    let (mut config, init) = model_of(loaded)?;
    if !with_mtp || scene.mtp.is_none() {
        config = config.without_mtp();
    }
    if config.num_nextn_predict_layers > MAX_MTP {
        return Err(SessionError::input(format!(
            "expected at most {MAX_MTP} MTP modules, found {}",
            config.num_nextn_predict_layers
        )));
    }
    let data_section = scene.data.as_ref().ok_or_else(|| missing("data"))?;
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
        scene::Validation::HeldOut { .. } => prepared.held_out,
        scene::Validation::File(path) => {
            let documents = data::source::read_documents(std::slice::from_ref(&path.0)).map_err(SessionError::input)?;
            let cache = telemetry.dir.join(".cache");
            let shard = data::cached_shard(&cache, &documents, &prepared.tokenizer).map_err(SessionError::input)?;
            Corpus::new([Arc::new(shard)])
        }
    };
    Ok(Prepared { config, tokenizer: prepared.tokenizer, init, train: prepared.train, held_out })
}

/// The app of a scene that one rank runs alone, whatever its mesh.
///
/// # Errors
/// Those of [`prepare`] and [`set_up_rank`].
pub fn set_up(loaded: &Loaded, options: Options) -> Result<Setup, SessionError> {
    let prepared = prepare(loaded, options.with_mtp)?;
    let alone = Scene { mesh: Default::default(), pipeline: None, diloco: None, ..loaded.scene.clone() };
    let distribution = Distribution::new(&alone, &prepared.config)
        .map_err(|problems| SessionError::input(loaded.errors(&problems)))?;
    let app = set_up_rank(loaded, &prepared, distribution.ranks(Comm::solo()), None, &options.progress)?;
    Ok(Setup { app, scene: Arc::new(loaded.scene.clone()), config: prepared.config })
}

/// The app of one rank of a scene.
///
/// # Errors
/// If a section is missing, or weights cannot be read.
pub fn set_up_rank(
    loaded: &Loaded,
    prepared: &Prepared,
    ranks: Ranks,
    num_threads: Option<usize>,
    progress: &Arc<dyn Progress>,
) -> Result<App, SessionError> {
    let scene = Arc::new(loaded.scene.clone());
    let config = &prepared.config;
    let data_section = scene.data.as_ref().ok_or_else(|| missing("data"))?;
    let train = scene.train.clone().ok_or_else(|| missing("train"))?;
    let schedule = scene.schedule.clone().ok_or_else(|| missing("schedule"))?;
    let optimizer = scene.optimizer.clone().ok_or_else(|| missing("optimizer"))?;
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
    let held_out = prepared.held_out.clone();
    let validation = Validation::new(held_out, Packing { num_mtp: 0, ..packing }).map_err(SessionError::input)?;

    let folder = prepared.init.as_ref().map(HfFolder::open).transpose().map_err(SessionError::input)?;
    let max_positions = config.max_position_embeddings.max(data_section.seq_len);
    let is_alone = ranks.everyone.num_ranks() == 1;
    let num_data_ranks = ranks.num_data_ranks() as usize;
    let layout = ranks.layout.clone();
    let formats = Formats::new(&scene.precision);
    let setup = ModelSetup {
        config,
        formats: formats.clone(),
        max_positions,
        trainable: true,
        recompute: scene.recompute.clone(),
        progress: progress.clone(),
        ranks,
        num_threads,
        device: scene.device.into(),
        on_gpu: OnGpu::of(&scene),
        clock: Clock::Wall,
    };
    let weights = match &folder {
        Some(folder) => Weights::Folder(folder),
        None => Weights::of(|spec| Ok(initial_values(spec, config, scene.seed))),
    };
    let mut app = app_with_model(setup, weights)?;
    let world = app.world_mut();
    world.insert_resource(RepeatsTasks(scene.graphs));
    let memory = world.resource::<Tensors>().memory().clone();
    let state = OptimizerState::allocate(
        (optimizer, formats.moments),
        world.resource::<Parameters>(),
        config,
        &layout,
        &memory,
    );
    world.insert_resource(state);
    let most = scene.batch.max_microbatches() / num_data_ranks;
    let sequences = scene.batch.microbatch_sequences;
    let allocate = |num_mtp| Inputs::allocate(&memory, sequences, data_section.seq_len, num_mtp);
    let microbatches = (0..most).map(|_| allocate(config.num_nextn_predict_layers)).collect();
    world.insert_resource(LossSums::allocate(&memory, most, config.num_nextn_predict_layers));
    let every_steps = scene.precision.watch_every_steps;
    if formats.fp8.is_some() && every_steps > 0 {
        let num_layers = config.num_hidden_layers + config.num_nextn_predict_layers;
        world.insert_resource(Rounding::new(&memory, every_steps, num_layers));
    }
    let num_layers = 0..config.num_hidden_layers + config.num_nextn_predict_layers;
    let num_moe_layers = num_layers.filter(|&layer| config.is_moe_layer(layer)).count();
    let moe_layers = (num_moe_layers, config.moe.as_ref().map_or(0, |moe| moe.n_routed_experts));
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
    app.add_plugins((TrainPlugin, EvaluatePlugin));
    memory.failure().map_err(SessionError::device)?;
    if is_alone {
        Generation::add(&mut app, prepared.tokenizer.clone(), max_positions, Work::Train)?;
    }
    Ok(app)
}
