//! `eval`: loss, logits and gradients of a checkpoint, on text or on given tokens.

use std::path::Path;

use bevy_app::prelude::*;
use engine::{prelude::*, tensor_file::TensorFile};
use kernels::{device::Device, tensor::Tensor};

use crate::{
    api::{EvalInput, EvalReport, EvalRequest, Progress},
    data::{
        corpus::Corpus,
        packing::{Batch, Packing},
        shard::Shard,
        source,
        token_file::read_token_file,
        tokenizer::Tokenizer,
        validation::Validation,
    },
    evaluate::{EvaluatePlugin, Evaluation, EvaluationResult},
    formats::Formats,
    generate::run_to_rest,
    head::{self, LossScale, LossSums},
    hf::read::HfFolder,
    lower::Lowering,
    microbatch::Inputs,
    model::Model,
    on_gpu::OnGpu,
    optimizer,
    pipeline::{
        action::{Action, Cell, Schedule, Work as Pass},
        chunk,
        stage::Stages,
    },
    ranks::Ranks,
    save,
    scene::{Compute, Recompute},
    session::{ModelSetup, SessionError, app_with_model, run_plan},
    weights::{Weights, WeightsReport},
    work::Work,
};

/// Rows that are evaluated at a time.
const ROWS_AT_A_TIME: usize = 8;

/// A checkpoint as an app.
pub struct Checkpoint {
    /// The app.
    pub app: App,
    /// The folder.
    pub folder: HfFolder,
}

impl Checkpoint {
    /// Loads a Hugging Face folder.
    ///
    /// # Errors
    /// If the folder is not whole; every finding is in the message.
    pub fn load(
        path: &Path,
        (compute, device): (Compute, Device),
        max_positions: usize,
        trainable: bool,
        progress: &std::sync::Arc<dyn Progress>,
    ) -> Result<Self, SessionError> {
        let folder = HfFolder::open(path).map_err(SessionError::input)?;
        let model = folder.model().map_err(SessionError::input)?;
        for note in &model.notes {
            progress.note(&note.to_string());
        }
        let setup = ModelSetup {
            config: &model.config,
            formats: Formats::of(compute),
            max_positions,
            trainable,
            recompute: Recompute::Off,
            progress: progress.clone(),
            ranks: Ranks::solo(model.config.num_hidden_layers),
            num_threads: None,
            device,
            on_gpu: OnGpu::default(),
            clock: Clock::Wall,
        };
        let app = app_with_model(setup, Weights::Folder(&folder))?;
        Ok(Checkpoint { app, folder })
    }

    /// How its weights were read.
    pub fn weights(&self) -> WeightsReport {
        self.app.world().resource::<WeightsReport>().clone()
    }

    /// The folder's tokenizer, checked against the model.
    ///
    /// # Errors
    /// If there is none, or its vocabulary is larger than the model's.
    pub fn tokenizer(&self) -> Result<Tokenizer, SessionError> {
        let path = self.folder.other_file("tokenizer.json").ok_or_else(|| {
            SessionError::input(
                "the checkpoint has no tokenizer.json: copy the one it was trained with into its folder",
            )
        })?;
        let tokenizer = Tokenizer::load(path).map_err(SessionError::input)?;
        let vocab_size = self.app.world().resource::<Model>().config.vocab_size;
        tokenizer.check_model(vocab_size).map_err(SessionError::input)?;
        Ok(tokenizer)
    }
}

/// Runs `hadal eval`.
///
/// # Errors
/// If an input cannot be read, or a step fails.
pub fn evaluate(request: EvalRequest) -> Result<EvalReport, SessionError> {
    let (result, weights) = match &request.input {
        EvalInput::Data(path) => {
            if request.logits.is_some() || request.grads.is_some() {
                return Err(SessionError::input("--logits and --grads need --tokens: a text has too many of both"));
            }
            on_text(&request, path)?
        }
        EvalInput::Tokens(path) => on_tokens(&request, path)?,
    };
    Ok(EvalReport {
        loss_nats_per_token: result.loss_nats_per_token,
        perplexity: result.loss_nats_per_token.exp(),
        bits_per_byte: result.bits_per_byte,
        num_tokens: result.num_tokens,
        weights,
    })
}

/// The checkpoint that is asked about, for sequences of so many tokens.
fn load(request: &EvalRequest, seq_len: usize, trainable: bool) -> Result<Checkpoint, SessionError> {
    let on = (request.compute, request.device);
    Checkpoint::load(&request.checkpoint, on, seq_len, trainable, &request.progress)
}

fn on_text(request: &EvalRequest, path: &Path) -> Result<(EvaluationResult, WeightsReport), SessionError> {
    let mut checkpoint = load(request, request.seq_len, false)?;
    let tokenizer = checkpoint.tokenizer()?;
    let documents = source::read_documents(&[path.to_path_buf()]).map_err(SessionError::input)?;
    let ids = tokenizer.encode_documents(&documents).map_err(SessionError::input)?;
    let lengths = documents.iter().map(|d| d.len() as u64);
    let corpus = Corpus::new([std::sync::Arc::new(Shard::from_documents(ids.into_iter().zip(lengths)))]);
    let packing = Packing {
        seq_len: request.seq_len,
        end_of_text: tokenizer.end_of_text(),
        num_mtp: 0,
        cross_document_attention: false,
        refuse_long_documents: false,
        end_targets: false,
    };
    let validation = Validation::new(corpus, packing).map_err(SessionError::input)?;
    let batches = validation.batches(ROWS_AT_A_TIME).collect();
    let result = run_batches(&mut checkpoint.app, batches, Some(validation.num_bytes()))?;
    Ok((result, checkpoint.weights()))
}

fn run_batches(app: &mut App, batches: Vec<Batch>, num_bytes: Option<u64>) -> Result<EvaluationResult, SessionError> {
    let memory = app.world().resource::<Tensors>().memory().clone();
    let inputs = Inputs::allocate(&memory, batches[0].num_sequences, batches[0].seq_len, 0);
    app.insert_resource(Evaluation::new(inputs, batches, num_bytes, Work::Rest)).insert_resource(Work::Evaluate);
    app.add_plugins(EvaluatePlugin);
    run_to_rest(app)?;
    app.world().resource::<Evaluation>().result.ok_or_else(|| SessionError::runtime("the evaluation made no result"))
}

/// A graph that is run by hand, on one batch of tokens.
pub struct Probe {
    /// Tensors of the batch.
    pub inputs: Inputs,
    /// Targets in the batch.
    pub num_targets: usize,
}

impl Probe {
    /// Puts `batch` where the model can see it.
    pub fn new(app: &App, batch: &Batch) -> Self {
        let memory = app.world().resource::<Tensors>().memory();
        let inputs = Inputs::allocate(memory, batch.num_sequences, batch.seq_len, 0);
        inputs.upload(memory, batch);
        Probe { inputs, num_targets: batch.num_targets() }
    }

    /// Loss and logits [t, v].
    ///
    /// # Errors
    /// Whatever the step fails with.
    pub fn logits(&self, app: &mut App) -> Result<(f64, Tensor), SessionError> {
        let key = PlanKey("logits".into());
        let world = app.world_mut();
        let lower = |world: &mut World| -> Result<(Graph, Tensor)> {
            let model = world.resource::<Model>().clone();
            let layout = world.resource::<Ranks>().layout.clone();
            let head_weight = model.head;
            let mut l = Lowering::for_session(world, self.inputs, false)?;
            let h = Stages::whole(model, layout).lower_inference(&mut l, self.inputs)?;
            let (Some(h), Some(head_weight)) = (h, head_weight) else { return Err("the model has no head".into()) };
            head::lower_head(&mut l, head::Loss::Main, head_weight, h, self.inputs.targets)?;
            let logits = head::lower_logits(&mut l, head_weight, h)?;
            Ok((l.finish()?, logits))
        };
        let (graph, logits) = lower(world).map_err(SessionError::runtime)?;
        world.resource_mut::<Plans>().insert(key.clone(), graph);
        run_plan(app, &key)?;
        let world = app.world();
        let nats = world.resource::<Tensors>().memory().read::<f64>(world.resource::<LossSums>().0[0].main)[0];
        Ok((nats / self.num_targets as f64, logits))
    }

    /// Plans forward and backward of the mean loss, and the optimizer's update if the world has one; MTP modules are left out.
    ///
    /// # Errors
    /// If the model cannot be lowered.
    pub fn plan_step(&self, app: &mut App) -> Result<PlanKey, SessionError> {
        let key = PlanKey("gradients".into());
        let world = app.world_mut();
        world.insert_resource(LossScale { main: 1.0 / self.num_targets as f64, mtp: 0.0 });
        let lower = |world: &mut World| -> Result<Graph> {
            let mut model = world.resource::<Model>().clone();
            model.mtp.clear();
            let layout = world.resource::<Ranks>().layout.clone();
            let cells = [Pass::F, Pass::I, Pass::W].map(|work| Action::from(Cell::new(0, work, 0)));
            let schedule = Schedule::from_ranks(vec![cells.to_vec()]);
            let mut stages = Stages::new(model, layout, &schedule, chunk::ORDER, vec![self.inputs]);
            let mut l = Lowering::for_session(world, self.inputs, true)?;
            optimizer::lower_zero(&mut l)?;
            for action in cells {
                stages.lower(&mut l, action)?;
            }
            if l.world.contains_resource::<optimizer::OptimizerState>() {
                optimizer::lower_update(&mut l)?;
            }
            l.finish()
        };
        let graph = lower(world).map_err(SessionError::runtime)?;
        world.resource_mut::<Plans>().insert(key.clone(), graph);
        Ok(key)
    }

    /// Mean loss of the last step.
    pub fn loss(&self, app: &App) -> f64 {
        let world = app.world();
        world.resource::<Tensors>().memory().read::<f64>(world.resource::<LossSums>().0[0].main)[0]
            / self.num_targets as f64
    }
}

fn on_tokens(request: &EvalRequest, path: &Path) -> Result<(EvaluationResult, WeightsReport), SessionError> {
    let folder = HfFolder::open(&request.checkpoint).map_err(SessionError::input)?;
    let vocab_size = folder.model().map_err(SessionError::input)?.config.vocab_size;
    let tokens = read_token_file(path, vocab_size).map_err(SessionError::input)?;
    let trainable = request.grads.is_some();
    let mut checkpoint = load(request, tokens.seq_len, trainable)?;
    let app = &mut checkpoint.app;
    let batch = Batch::of_rows(tokens.ids.clone(), tokens.seq_len);
    let probe = Probe::new(app, &batch);
    optimizer::zero_losses(app.world().resource::<Tensors>().memory(), app.world().resource::<LossSums>());
    let (loss, logits) = probe.logits(app)?;
    if let Some(out) = &request.logits {
        let values = crate::model::download(app.world().resource::<Tensors>().memory(), logits);
        let mut file = TensorFile::new();
        file.insert("logits", &[tokens.batch, tokens.seq_len, vocab_size], &values);
        file.write(out).map_err(SessionError::runtime)?;
    }
    if let Some(out) = &request.grads {
        let key = probe.plan_step(app)?;
        run_plan(app, &key)?;
        save::write_gradients(app.world(), out).map_err(SessionError::runtime)?;
    }
    let num_tokens = probe.num_targets as u64;
    Ok((EvaluationResult { loss_nats_per_token: loss, bits_per_byte: None, num_tokens }, checkpoint.weights()))
}
