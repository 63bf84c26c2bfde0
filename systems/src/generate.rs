//! Generation: a prompt and what follows it, one step per chunk of the prompt and then one per token, over a cache. With latent
//! attention the cache holds latents, and the up-projections are absorbed into queries and outputs.

use std::sync::Arc;

use bevy_app::prelude::*;
use bevy_ecs::prelude::*;
use engine::prelude::*;
use kernels::{
    dtype::DType,
    memory::Memory,
    ops::{attention::cached::KvCache, elementwise, sampling},
    tensor::Tensor,
};

use crate::{
    api::{GenerateReport, GenerateRequest},
    data::{packing::Batch, tokenizer::Tokenizer},
    head,
    lower::Lowering,
    microbatch::Inputs,
    model::Model,
    model_config::{Attention, ModelConfig},
    pipeline::stage::Stages,
    probe::Checkpoint,
    ranks::Ranks,
    session::{Session, SessionError},
    weights::WeightsReport,
    work::{Work, turn_of},
};

/// Takes the last row of hidden states.
pub const LAST_ROW: TaskKind = TaskKind("last_row");
/// Chooses a token.
pub const SAMPLE: TaskKind = TaskKind("sample");

/// Most prompt tokens in a step.
const PROMPT_CHUNK: usize = 64;

/// Generates when it is its turn.
pub struct GeneratePlugin;

/// How tokens are chosen.
#[derive(Clone, Copy, Debug)]
pub struct Sampler {
    /// Divisor of the logits; 0 takes the likeliest token.
    pub temperature: f64,
    /// Share of the probability to choose from.
    pub top_p: f64,
    /// Likeliest tokens to choose from; 0 for all.
    pub top_k: usize,
    /// Seed of the choice.
    pub seed: u64,
}

/// What one layer remembers of the tokens so far.
#[derive(Clone, Copy, Debug)]
pub enum LayerCache {
    /// Normed latents and rotated keys [capacity, c + r].
    Latent(Tensor),
    /// Keys and values of each head.
    Heads(KvCache),
}

/// Caches of all layers.
#[derive(Resource, Clone, Debug)]
pub struct Caches(pub Vec<LayerCache>);

/// Tokens in the caches; read at launch.
#[derive(Resource, Clone, Copy, Debug, Default)]
pub struct CachedTokens(pub usize);

impl Caches {
    fn allocate(config: &ModelConfig, memory: &Memory, compute: DType, capacity: usize) -> Self {
        let cache = |_| match config.attention {
            Attention::Mla { kv_lora_rank, qk_rope_head_dim, .. } => {
                LayerCache::Latent(memory.alloc(compute, &[capacity, kv_lora_rank + qk_rope_head_dim]))
            }
            Attention::Gqa { num_key_value_heads: g, head_dim, .. } => LayerCache::Heads(KvCache {
                k: memory.alloc(compute, &[capacity, g, head_dim]),
                v: memory.alloc(compute, &[capacity, g, head_dim]),
            }),
        };
        Caches((0..config.num_hidden_layers).map(cache).collect())
    }

    fn bytes_per_token(&self, capacity: usize) -> u64 {
        let bytes = |cache: &LayerCache| match cache {
            LayerCache::Latent(t) => t.size_bytes(),
            LayerCache::Heads(c) => c.k.size_bytes() + c.v.size_bytes(),
        };
        self.0.iter().map(bytes).sum::<u64>() / capacity.max(1) as u64
    }
}

/// A generation: what is asked, and how far it is.
#[derive(Resource)]
pub struct Generation {
    /// Turns text to tokens and back.
    pub tokenizer: Arc<Tokenizer>,
    /// Whose turn it is afterwards.
    pub then: Work,
    /// Go on after the end-of-text token.
    pub ignore_eos: bool,
    /// How tokens are chosen.
    pub sampler: Sampler,
    capacity: usize,
    pending: Vec<u32>,
    /// Tokens of the step at hand.
    num_admitted: usize,
    num_prompt_tokens: usize,
    max_new_tokens: usize,
    generated: Vec<u32>,
    text: String,
    unread: Vec<u32>,
    token: Tensor,
    chunks: std::collections::BTreeMap<usize, Inputs>,
    begin_nanos: u64,
    token_nanos: Vec<u64>,
    finish_reason: &'static str,
}

impl Generation {
    /// Allocates caches for `capacity` tokens.
    ///
    /// # Errors
    /// None today.
    pub fn new(
        world: &mut World,
        tokenizer: Arc<Tokenizer>,
        capacity: usize,
        sampler: Sampler,
    ) -> Result<Self, SessionError> {
        let memory = world.resource::<Tensors>().memory().clone();
        let model = world.resource::<Model>();
        let caches = Caches::allocate(&model.config, &memory, model.compute, capacity);
        world.insert_resource(caches);
        world.insert_resource(CachedTokens(0));
        Ok(Generation {
            tokenizer,
            then: Work::Train,
            ignore_eos: false,
            sampler,
            capacity,
            pending: Vec::new(),
            num_admitted: 0,
            num_prompt_tokens: 0,
            max_new_tokens: 0,
            generated: Vec::new(),
            text: String::new(),
            unread: Vec::new(),
            token: memory.alloc(DType::U32, &[1]),
            chunks: std::collections::BTreeMap::new(),
            begin_nanos: 0,
            token_nanos: Vec::new(),
            finish_reason: "length",
        })
    }

    /// Starts on a prompt; an empty one is the start of a document.
    ///
    /// # Errors
    /// If the prompt cannot be tokenized or does not fit.
    pub fn start(&mut self, prompt: &str, max_new_tokens: usize) -> Result<(), SessionError> {
        let mut tokens = vec![self.tokenizer.end_of_text()];
        tokens.extend(self.tokenizer.encode(prompt).map_err(SessionError::input)?);
        self.start_tokens(tokens, max_new_tokens)
    }

    /// Starts on tokens.
    ///
    /// # Errors
    /// If they do not fit.
    pub fn start_tokens(&mut self, tokens: Vec<u32>, max_new_tokens: usize) -> Result<(), SessionError> {
        if tokens.len() >= self.capacity {
            return Err(SessionError::input(format!(
                "the prompt has {} tokens, and the model's context holds {}: shorten it",
                tokens.len(),
                self.capacity
            )));
        }
        self.num_prompt_tokens = tokens.len();
        self.pending = tokens;
        self.max_new_tokens = max_new_tokens;
        self.generated.clear();
        self.text.clear();
        self.unread.clear();
        self.token_nanos.clear();
        self.begin_nanos = kernels::clock::now_nanos();
        self.finish_reason = "length";
        Ok(())
    }

    /// Generated text so far.
    pub fn text(&self) -> &str {
        &self.text
    }

    /// Text of a token, as far as it is whole characters: bytes of an unfinished one wait for the next token.
    fn push_text(&mut self, token: u32) -> String {
        self.unread.push(token);
        let piece = self.tokenizer.decode(&self.unread, true);
        if piece.ends_with('\u{fffd}') && self.unread.len() < 4 {
            return String::new();
        }
        self.unread.clear();
        self.text.push_str(&piece);
        piece
    }

    fn chunk(&self) -> usize {
        self.pending.len().min(PROMPT_CHUNK)
    }

    /// What the generation came to; how the weights were read, whoever did so knows.
    pub fn report(&self, caches: &Caches) -> GenerateReport {
        let secs = |nanos: u64| nanos as f64 * 1e-9;
        let (first, last) = (self.token_nanos.first().copied(), self.token_nanos.last().copied());
        let rest = self.token_nanos.len().saturating_sub(1) as f64;
        let rest_secs = secs(last.unwrap_or(0) - first.unwrap_or(0));
        GenerateReport {
            text: self.text.clone(),
            tokens: self.generated.clone(),
            num_prompt_tokens: self.num_prompt_tokens,
            first_token_secs: secs(first.unwrap_or(self.begin_nanos) - self.begin_nanos),
            tokens_per_sec: if rest_secs > 0.0 { rest / rest_secs } else { 0.0 },
            cache_bytes_per_token: caches.bytes_per_token(self.capacity),
            finish_reason: self.finish_reason.to_owned(),
            weights: WeightsReport::default(),
        }
    }

    /// Time between tokens, in seconds.
    pub fn token_secs(&self) -> Vec<f64> {
        self.token_nanos.windows(2).map(|w| (w[1] - w[0]) as f64 * 1e-9).collect()
    }
}

impl Plugin for GeneratePlugin {
    fn build(&self, app: &mut App) {
        app.on_task(LAST_ROW, last_row).on_task(SAMPLE, sample).add_systems(
            Step,
            (
                admit.in_set(StepSystems::Admit).run_if(turn_of(Work::Generate)),
                plan.in_set(StepSystems::Plan).run_if(turn_of(Work::Generate)),
                record.in_set(StepSystems::Record).run_if(turn_of(Work::Generate)),
            ),
        );
    }
}

fn admit(mut generation: ResMut<Generation>, mut cached: ResMut<CachedTokens>, tensors: Res<Tensors>) {
    if generation.generated.is_empty() && generation.pending.len() == generation.num_prompt_tokens {
        cached.0 = 0;
    }
    let n = generation.chunk();
    let memory = tensors.memory();
    let inputs = *generation.chunks.entry(n).or_insert_with(|| Inputs::allocate(memory, 1, n, 0));
    let tokens: Vec<u32> = generation.pending.drain(..n).collect();
    let mut batch = Batch::of_rows(tokens, n);
    for position in &mut batch.positions {
        *position += cached.0 as u32;
    }
    inputs.upload(memory, &batch);
    generation.num_admitted = n;
}

#[derive(Component, Clone, Copy)]
struct LastRowTask {
    x: Tensor,
    row: Tensor,
}

fn last_row(In(id): In<Entity>, mut launch: Launch<LastRowTask>) -> Result {
    let (_, &LastRowTask { x, row }, s) = launch.get(id)?;
    let (t, d) = (x.dim(0), x.dim(1));
    let (from, to) = (x.reshape(&[1, t * d]), row.reshape(&[1, d]));
    Ok(elementwise::copy_columns(s, (from, (t - 1) * d), (to, 0), d, false)?)
}

#[derive(Component, Clone, Copy)]
struct SampleTask {
    logits: Tensor,
    token: Tensor,
}

fn sample(
    In(id): In<Entity>,
    mut launch: Launch<SampleTask>,
    generation: Res<Generation>,
    cached: Res<CachedTokens>,
) -> Result {
    let (_, &SampleTask { logits, token }, s) = launch.get(id)?;
    let Sampler { temperature, top_p, top_k, seed } = generation.sampler;
    let position = (cached.0 + generation.num_admitted) as u64;
    let row = sampling::Sampling { temperature, top_k, top_p, seed, position };
    Ok(sampling::forward(s, logits, &[row], token)?)
}

fn plan(world: &mut World) -> Result {
    let generation = world.resource::<Generation>();
    let (n, token) = (generation.num_admitted, generation.token);
    let key = PlanKey(format!("generate from {n} tokens"));
    if world.resource_mut::<Plans>().activate(&key) {
        return Ok(());
    }
    let generation = world.resource::<Generation>();
    let inputs = generation.chunks[&n];
    let model = world.resource::<Model>().clone();
    let caches = world.resource::<Caches>().clone();
    let layout = world.resource::<Ranks>().layout.clone();
    let head_weight = model.head;
    let mut l = Lowering::for_session(world, inputs, false)?;
    l.caches = Some(caches);
    let h = Stages::whole(model, layout).lower_inference(&mut l, inputs)?;
    let (Some(h), Some(head_weight)) = (h, head_weight) else { return Err("only a whole model generates".into()) };
    let row = l.alloc("last hidden state", &[1, h.dim(1)]);
    l.task(LAST_ROW, Pass::Forward, LastRowTask { x: h, row })?;
    let logits = head::lower_logits(&mut l, head_weight, row)?;
    l.task(SAMPLE, Pass::Forward, SampleTask { logits, token })?;
    let rest = l.take_scope();
    l.release_scope(rest, None);
    let graph = l.finish()?;
    world.resource_mut::<Plans>().insert(key, graph);
    Ok(())
}

fn record(
    mut generation: ResMut<Generation>,
    mut cached: ResMut<CachedTokens>,
    tensors: Res<Tensors>,
    mut work: ResMut<Work>,
    session: Res<Session>,
) {
    cached.0 += generation.num_admitted;
    if !generation.pending.is_empty() {
        return;
    }
    let token = tensors.memory().read::<u32>(generation.token)[0];
    generation.token_nanos.push(kernels::clock::now_nanos());
    let ended = token == generation.tokenizer.end_of_text() && !generation.ignore_eos;
    if ended {
        generation.finish_reason = "stop";
    } else {
        generation.generated.push(token);
        let piece = generation.push_text(token);
        session.progress.text(&piece);
    }
    let full = cached.0 + 1 >= generation.capacity;
    if ended || full || generation.generated.len() >= generation.max_new_tokens {
        *work = generation.then;
    } else {
        generation.pending.push(token);
    }
}

/// Runs `hadal generate`.
///
/// # Errors
/// If the checkpoint cannot be read, the prompt does not fit, or a step fails.
pub fn generate(request: GenerateRequest) -> Result<GenerateReport, SessionError> {
    let folder = crate::hf::read::HfFolder::open(&request.checkpoint).map_err(SessionError::input)?;
    let longest = folder.model().map_err(SessionError::input)?.config.max_position_embeddings;
    // Room for the prompt (a token is at least a byte) and what follows, and no more than the model was made for.
    let capacity = (request.prompt.len() + 2 + request.max_new_tokens).min(longest);
    let checkpoint =
        Checkpoint::load(&request.checkpoint, (request.compute, request.device), capacity, false, &request.progress)?;
    let tokenizer = Arc::new(checkpoint.tokenizer()?);
    let weights = checkpoint.weights();
    let mut app = checkpoint.app;
    let sampler =
        Sampler { temperature: request.temperature, top_p: request.top_p, top_k: request.top_k, seed: request.seed };
    let mut generation = Generation::new(app.world_mut(), tokenizer, capacity, sampler)?;
    generation.then = Work::Rest;
    generation.ignore_eos = request.ignore_eos;
    generation.start(&request.prompt, request.max_new_tokens)?;
    app.insert_resource(generation).insert_resource(Work::Generate).add_plugins(GeneratePlugin);
    run_to_rest(&mut app)?;
    let world = app.world();
    Ok(GenerateReport { weights, ..world.resource::<Generation>().report(world.resource::<Caches>()) })
}

/// Runs an app until it is nobody's turn.
///
/// # Errors
/// Whatever a step fails with.
pub fn run_to_rest(app: &mut App) -> Result<(), SessionError> {
    fn stop(work: Res<Work>, mut exit: ResMut<Exit>) {
        if *work == Work::Rest {
            exit.stop(ExitReason::Finished);
        }
    }
    #[derive(Resource)]
    struct StopsAtRest;
    if !app.world().contains_resource::<StopsAtRest>() {
        app.insert_resource(StopsAtRest).add_systems(Step, stop.in_set(StepSystems::Keep));
    }
    match engine::app::run(app) {
        ExitReason::Finished => Ok(()),
        reason => Err(SessionError::runtime(reason)),
    }
}
