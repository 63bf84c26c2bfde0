//! A serving step: Admit schedules, Plan lowers for so many tokens (`graph`), Record hands out what was chosen (`record`).
//!
//! The model's tasks are those of training; they find the caches in the lowering and the step's sequences at launch. Products are made
//! so that a token's bits do not depend on the tokens beside it ([`kernels::stream::Stream::set_batch_invariant`]): on processors a
//! request's answer is the same in any company.

mod graph;
mod record;

use std::{
    collections::{BTreeMap, VecDeque},
    sync::Arc,
    time::Duration,
};

use bevy_app::prelude::*;
use bevy_ecs::{prelude::*, system::SystemState};
use engine::prelude::*;
use kernels::{
    memory::Memory,
    ops::{
        logits::Adjust,
        mla::latent::Prefill,
        paged::{Sequence, Sequences},
        sampling::Sampling,
    },
};

use self::graph::{Shape, StepTensors};
use super::{
    cache::{self, CacheFormat, Caches, StepSequences},
    pool::Pool,
    request::{Event, FinishReason, Task},
    requests::Request,
    schedule::{Limits, Queues, Share},
    service::{self, Counters, Inbox, LayerLoad, Message, Service, Settings},
};
use crate::{
    data::{packing::Batch, tokenizer::Tokenizer},
    model::Model,
    routing::ExpertCounts,
    session::{Session, SessionError},
    work::{Turn, Work, turn_of},
};

pub use graph::MAX_LOGPROBS;
pub(super) use record::record as record_step;

/// How long an idle model waits for a request before it looks whether it is to end.
const IDLE: Duration = Duration::from_millis(50);
/// Graphs that are kept: one for each number of tokens and rows.
const MAX_PLANS: usize = 128;

/// Serves when it is its turn.
pub struct ServePlugin;

/// How much a model serves at a time.
#[derive(Clone, Debug)]
pub struct Capacity {
    /// Tokens of a prompt and its answer at most.
    pub max_context: usize,
    /// Tokens that the cache has room for, rounded up to blocks; at least `max_context`.
    pub cache_tokens: usize,
    /// Tokens of a block, a power of two.
    pub block_tokens: usize,
    /// What bounds a step.
    pub limits: Limits,
    /// Requests that wait at most.
    pub max_queued: usize,
    /// The first MTP module proposes a token after each one that is chosen, and the next step tries it: answers are the same, and
    /// steps are fewer.
    pub speculate: bool,
    /// What the cache is made of.
    pub cache: CacheFormat,
    /// Which way latent attention takes through prompts. By cost is quicker on processors, and lets bits depend on how prompts are cut, hence
    /// on company; GPUs have no kernels of the other way and go in latent space in any case.
    pub prefill: Prefill,
}

impl Capacity {
    /// For one request of so many tokens at a time.
    pub fn one(max_context: usize) -> Self {
        let limits = Limits { step_tokens: 64, max_running: 1 };
        Capacity {
            max_context,
            cache_tokens: max_context,
            block_tokens: 16,
            limits,
            max_queued: 1,
            speculate: false,
            cache: CacheFormat::Compute,
            prefill: Prefill::Absorbed,
        }
    }
}

/// A model that serves.
#[derive(Resource)]
pub struct Server {
    /// Turns text to tokens and back.
    pub tokenizer: Arc<Tokenizer>,
    /// Whose turn it is when nothing is left to do; `None` waits for more until the service is closed.
    pub then: Option<Work>,
    capacity: Capacity,
    inbox: Inbox,
    pool: Pool,
    counters: Counters,
    routing: Vec<LayerLoad>,
    plans: BTreeMap<Shape, StepTensors>,
    recent: VecDeque<Shape>,
    step: StepAtHand,
    num_step_tokens: usize,
}

#[derive(Default)]
struct StepAtHand {
    shape: Shape,
    shares: Vec<Share>,
    /// Of the rows that a token is chosen from.
    rows: Vec<Sampling>,
    adjusts: Vec<Adjust>,
    told: Vec<Option<usize>>,
}

impl Server {
    /// Allocates caches in `world`, and opens a way in.
    ///
    /// # Errors
    /// If the model has no cache of that format.
    pub fn start(
        world: &mut World,
        tokenizer: Arc<Tokenizer>,
        mut capacity: Capacity,
    ) -> Result<Service, SessionError> {
        let memory = world.resource::<Tensors>().memory().clone();
        let model = world.resource::<Model>();
        capacity.cache.check(&model.config).map_err(SessionError::input)?;
        capacity.speculate &= !model.mtp.is_empty();
        let num_blocks = capacity.cache_tokens.max(capacity.max_context).div_ceil(capacity.block_tokens);
        let num_rows = num_blocks * capacity.block_tokens;
        let caches =
            Caches::allocate(&model.config, &memory, (model.compute, capacity.cache), num_rows, capacity.speculate);
        let num_layers = caches.0.len();
        let settings = Settings {
            max_context_tokens: capacity.max_context,
            max_queued: capacity.max_queued,
            vocab_size: model.config.vocab_size,
            hidden_size: model.config.hidden_size,
            cache_bytes_per_token: cache::bytes_per_token(&model.config, num_layers, model.compute, capacity.cache),
            mha_cache_bytes_per_token: cache::mha_bytes_per_token(&model.config, num_layers, model.compute),
            cache_capacity_tokens: num_rows,
        };
        let (service, inbox) = service::channel(settings);
        // A module that proposes nothing takes no part.
        let num_working = if capacity.speculate { usize::MAX } else { model.config.num_hidden_layers };
        let counts = world.resource::<ExpertCounts>().0.iter().filter(|(layer, _)| *layer < num_working);
        let routing = counts.map(|(layer, counts)| LayerLoad {
            layer: *layer,
            total: vec![0; counts.len()],
            last_step: vec![0; counts.len()],
        });
        let server = Server {
            tokenizer,
            then: None,
            pool: Pool::new(num_blocks, capacity.block_tokens),
            inbox,
            capacity,
            counters: Counters::default(),
            routing: routing.collect(),
            plans: BTreeMap::new(),
            recent: VecDeque::new(),
            step: StepAtHand::default(),
            num_step_tokens: 0,
        };
        world.insert_resource(server);
        world.insert_resource(caches);
        world.init_resource::<Queues>();
        Ok(service)
    }

    /// Blocks of the cache.
    pub fn pool(&self) -> &Pool {
        &self.pool
    }

    /// What was done so far.
    pub fn counters(&self) -> &Counters {
        &self.counters
    }

    /// Tokens that the last step computed, drafts among them; 0 if there was nothing to do.
    pub fn num_step_tokens(&self) -> usize {
        self.num_step_tokens
    }

    /// Which experts they chose.
    pub fn routing(&self) -> &[LayerLoad] {
        &self.routing
    }

    /// Whether no more requests will come.
    pub fn is_closing(&self) -> bool {
        self.inbox.is_closing()
    }

    /// Ends all requests that there are: what was generated of them is their answer.
    pub(super) fn end_all(&mut self, world: &mut World, queues: &mut Queues) {
        for entity in queues.running.iter().chain(&queues.waiting).copied().collect::<Vec<_>>() {
            self.finish(world, queues, entity, FinishReason::Cancelled);
        }
        for Message::Submit(_, mut submission, _) in self.inbox.receive(Duration::ZERO) {
            submission.sink.send(Event::Failed("the server was stopped".into()));
        }
    }
}

impl Plugin for ServePlugin {
    fn build(&self, app: &mut App) {
        graph::add_handlers(app);
        app.add_systems(
            Step,
            (
                keep_company_out.before(StepSystems::Admit).after(crate::work::begin_turn),
                admit.in_set(StepSystems::Admit).run_if(turn_of(Work::Serve)),
                graph::plan.in_set(StepSystems::Plan).run_if(turn_of(Work::Serve)),
                record::record.in_set(StepSystems::Record).run_if(turn_of(Work::Serve)),
            ),
        );
    }
}

/// Products are batch-invariant while a model serves.
fn keep_company_out(turn: Res<Turn>, session: Res<Session>, mut queues: Query<&mut Queue>) {
    if let Ok(mut queue) = queues.get_mut(session.streams.compute) {
        queue.stream.set_batch_invariant(turn.0 == Work::Serve);
    }
}

fn admit(world: &mut World, query: &mut SystemState<Query<&mut Request>>) -> Result {
    world.resource_scope(|world, mut server: Mut<Server>| {
        world.resource_scope(|world, mut queues: Mut<Queues>| server.admit(world, query, &mut queues))
    })
}

impl Server {
    fn admit(
        &mut self,
        world: &mut World,
        query: &mut SystemState<Query<&mut Request>>,
        queues: &mut Queues,
    ) -> Result {
        // Asked before: who was told that there is room is heard.
        let is_closing = self.inbox.is_closing();
        let wait = if queues.is_empty() && self.then.is_none() { IDLE } else { Duration::ZERO };
        for Message::Submit(id, submission, cancelled) in self.inbox.receive(wait) {
            let name = Name::new(format!("request {id}"));
            let entity = world.spawn((Request::new(id, submission, cancelled, &self.tokenizer), name)).id();
            queues.wait(entity, &query.get_mut(world)?);
        }
        for entity in queues.running.iter().chain(&queues.waiting).copied().collect::<Vec<_>>() {
            if world.get::<Request>(entity).is_some_and(Request::is_cancelled) {
                self.finish(world, queues, entity, FinishReason::Cancelled);
            }
        }
        let shares = queues.schedule(&mut query.get_mut(world)?, &mut self.pool, self.capacity.limits);
        for share in &shares {
            let Some(mut request) = world.get_mut::<Request>(share.entity) else { continue };
            if request.leave_queue() {
                self.inbox.admitted(1);
                self.counters.num_prompt_tokens += request.num_prompt as u64;
                self.counters.num_cached_tokens += request.num_cached() as u64;
            }
        }
        self.fill(world, shares);
        if queues.is_empty() {
            match self.then {
                Some(then) => *world.resource_mut::<Work>() = then,
                None if is_closing => *world.resource_mut::<Work>() = Work::Rest,
                None => {}
            }
        }
        Ok(())
    }

    /// Lays the step's tokens out.
    fn fill(&mut self, world: &mut World, shares: Vec<Share>) {
        let mut step = StepAtHand::default();
        let most_told = MAX_LOGPROBS.min(self.inbox.settings().vocab_size);
        let (mut tokens, mut positions, mut sequences) = (Vec::new(), Vec::new(), Vec::new());
        let (mut chosen, mut embedded, mut next) = (Vec::new(), Vec::new(), Vec::new());
        for share in &shares {
            let Some(mut request) = world.get_mut::<Request>(share.entity) else { continue };
            let (first, context) = (tokens.len() as u32, request.num_computed);
            let end = context + share.num_tokens;
            tokens.extend(request.tokens[context..end].iter().copied().chain(share.draft));
            // What is chosen in this step is told then.
            let known = request.tokens.iter().copied().skip(context + 1).take(share.num_tokens);
            next.extend(known);
            next.resize(tokens.len(), 0);
            positions.extend((context..context + share.num_rows()).map(|position| position as u32));
            sequences.push(Sequence { num_new: share.num_rows(), context, pages: request.blocks.as_slice().into() });
            if let Task::Embed = request.task {
                embedded.extend(first..first + share.num_tokens as u32);
            } else if end == request.tokens.len() {
                for (row, (sampling, adjust, told)) in request.next_rows(share.draft).into_iter().enumerate() {
                    chosen.push(first + (share.num_tokens - 1 + row) as u32);
                    step.rows.push(sampling);
                    step.adjusts.push(adjust);
                    step.told.push(told.map(|told| told.min(most_told)));
                }
            }
        }
        step.shape = Shape {
            tokens: tokens.len(),
            chosen: chosen.len(),
            embedded: embedded.len(),
            adjusts: step.adjusts.iter().any(|adjust| !adjust.is_none()),
            tells: step.told.iter().any(Option::is_some),
        };
        step.shares = shares;
        if !tokens.is_empty() {
            let memory = world.resource::<Tensors>().memory().clone();
            let tensors = self.tensors(world, &memory, step.shape);
            let num_tokens = tokens.len();
            let mut batch = Batch::of_rows(tokens, num_tokens);
            batch.positions = positions;
            tensors.inputs.upload(&memory, &batch);
            memory.upload(tensors.chosen_rows, &chosen);
            memory.upload(tensors.embedded_rows, &embedded);
            memory.upload(tensors.next_tokens, &next);
            let all = Sequences::new(sequences, self.capacity.block_tokens);
            world.insert_resource(StepSequences { all, prefill: self.capacity.prefill });
        }
        self.step = step;
    }

    /// The tensors of a step of this shape; the graph that was used longest ago makes room for a new one.
    fn tensors(&mut self, world: &mut World, memory: &Memory, shape: Shape) -> StepTensors {
        self.recent.retain(|other| *other != shape);
        self.recent.push_back(shape);
        if let Some(tensors) = self.plans.get(&shape) {
            return *tensors;
        }
        if self.recent.len() > MAX_PLANS
            && let Some(oldest) = self.recent.pop_front()
            && let Some(tensors) = self.plans.remove(&oldest)
        {
            Plans::despawn(world, &oldest.key());
            tensors.release(memory);
        }
        let tensors = StepTensors::allocate(world.resource::<Model>(), memory, shape);
        self.plans.insert(shape, tensors);
        tensors
    }

    /// Ends a request.
    fn finish(&mut self, world: &mut World, queues: &mut Queues, entity: Entity, reason: FinishReason) {
        queues.remove(entity);
        let Some(mut request) = world.get_mut::<Request>(entity) else { return };
        let is_new = request.leave_queue();
        let secs = request.finish(reason);
        request.release(&mut self.pool);
        world.despawn(entity);
        self.inbox.admitted(usize::from(is_new));
        self.inbox.took(secs);
        self.counters.finished(reason);
    }
}
