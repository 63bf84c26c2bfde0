//! The graph of a serving step: the model's forward over so many tokens, and what is made of which rows of it.

use bevy_app::prelude::*;
use bevy_ecs::prelude::*;
use engine::prelude::*;
use kernels::{
    dtype::DType,
    memory::Memory,
    ops::{
        elementwise, embedding,
        logits::{self, Logprobs},
        sampling::{self, Sampling},
    },
    tensor::Tensor,
};

use super::{Server, StepAtHand};
use crate::{
    head, lower::Lowering, microbatch::Inputs, model::Model, pipeline::stage::Stages, ranks::Ranks,
    serve::cache::Caches,
};

/// Picks the rows of hidden states that something is wanted of.
pub const PICK_ROWS: TaskKind = TaskKind("pick_rows");
/// Chooses tokens.
pub const SAMPLE: TaskKind = TaskKind("sample");
/// Tells an MTP module which tokens were chosen.
pub const TELL_CHOSEN: TaskKind = TaskKind("tell_chosen");
/// Proposes the tokens after those.
pub const DRAFT: TaskKind = TaskKind("draft");

/// What a graph is for.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Shape {
    /// Tokens.
    pub tokens: usize,
    /// Rows that a token is chosen from.
    pub chosen: usize,
    /// Rows whose hidden state is wanted.
    pub embedded: usize,
    /// Whether logits are changed before a token is chosen.
    pub adjusts: bool,
    /// Whether log-probabilities are told.
    pub tells: bool,
}

/// Likeliest tokens that are told of at most.
pub const MAX_LOGPROBS: usize = 20;

/// What goes into a step and comes out.
#[derive(Clone, Copy)]
pub(super) struct StepTensors {
    pub inputs: Inputs,
    pub chosen_rows: Tensor,
    pub tokens: Tensor,
    pub embedded_rows: Tensor,
    pub hidden: Tensor,
    /// The token after each, as far as it is known before the step, and what the MTP module proposes.
    pub next_tokens: Tensor,
    pub drafts: Tensor,
    pub logprobs: Logprobs,
}

impl Shape {
    /// Name of the graph.
    pub fn key(self) -> PlanKey {
        let Shape { tokens, chosen, embedded, adjusts, tells } = self;
        let also = [(adjusts, ", adjusted"), (tells, ", told")].map(|(is_so, name)| if is_so { name } else { "" });
        PlanKey(format!("serve {tokens} tokens, {chosen} chosen, {embedded} embedded{}", also.concat()))
    }
}

impl StepTensors {
    /// Those of a step of this shape.
    pub fn allocate(model: &Model, memory: &Memory, shape: Shape) -> Self {
        let rows = |n: usize| memory.alloc(DType::U32, &[n]);
        let wide = if model.compute == DType::F64 { DType::F64 } else { DType::F32 };
        let told = if shape.tells { shape.chosen } else { 0 };
        StepTensors {
            inputs: Inputs::allocate(memory, 1, shape.tokens, 0),
            chosen_rows: rows(shape.chosen),
            tokens: rows(shape.chosen),
            embedded_rows: rows(shape.embedded),
            hidden: memory.alloc(model.compute, &[shape.embedded, model.config.hidden_size]),
            next_tokens: rows(shape.tokens),
            drafts: rows(shape.chosen),
            logprobs: Logprobs {
                token: memory.alloc(wide, &[told]),
                top_ids: memory.alloc(DType::U32, &[told, MAX_LOGPROBS]),
                top: memory.alloc(wide, &[told, MAX_LOGPROBS]),
            },
        }
    }

    /// Gives them back.
    pub fn release(self, memory: &Memory) {
        let Inputs { tokens, targets, positions, doc_offsets, .. } = self.inputs;
        let inputs = [tokens, targets, positions, doc_offsets];
        let others = [self.chosen_rows, self.tokens, self.embedded_rows, self.hidden, self.next_tokens, self.drafts];
        let Logprobs { token, top_ids, top } = self.logprobs;
        inputs.into_iter().chain(others).chain([token, top_ids, top]).for_each(|tensor| memory.release(tensor));
    }
}

/// Who runs the tasks of this file.
pub(super) fn add_handlers(app: &mut App) {
    app.on_task(PICK_ROWS, pick_rows).on_task(SAMPLE, sample);
    app.on_task(TELL_CHOSEN, tell_chosen).on_task(DRAFT, draft);
}

/// Makes the graph for the step at hand the active one.
pub(super) fn plan(world: &mut World) -> Result {
    let server = world.resource::<Server>();
    let (shape, speculates) = (server.step.shape, server.capacity.speculate);
    if shape.tokens == 0 {
        world.resource_mut::<Plans>().active = None;
        return Ok(());
    }
    let tensors = server.plans[&shape];
    let key = shape.key();
    if world.resource_mut::<Plans>().activate(&key) {
        return Ok(());
    }
    let model = world.resource::<Model>().clone();
    let caches = world.resource::<Caches>().clone();
    let layout = world.resource::<Ranks>().layout.clone();
    let head_weight = model.head;
    let mut l = Lowering::for_session(world, tensors.inputs, false)?;
    l.caches = Some(caches);
    let stages = Stages::whole(model, layout);
    let h = stages.lower_inference(&mut l, tensors.inputs)?;
    let (Some(h), Some(head_weight)) = (h, head_weight) else { return Err("only a whole model serves".into()) };
    if shape.embedded > 0 {
        l.task(PICK_ROWS, Pass::Forward, PickTask { x: h, rows: tensors.embedded_rows, out: tensors.hidden })?;
    }
    if shape.chosen > 0 {
        let out = l.alloc("last hidden states", &[shape.chosen, h.dim(1)]);
        l.task(PICK_ROWS, Pass::Forward, PickTask { x: h, rows: tensors.chosen_rows, out })?;
        let logits = head::lower_logits(&mut l, head_weight, out)?;
        // What is told of is as it was.
        let adjusted = match (shape.adjusts, shape.tells) {
            (false, _) => None,
            (true, false) => Some(logits),
            (true, true) => Some(l.alloc_like("logits, adjusted", logits)),
        };
        let logprobs = shape.tells.then_some(tensors.logprobs);
        l.task(SAMPLE, Pass::Forward, SampleTask { logits, adjusted, tokens: tensors.tokens, logprobs })?;
    }
    if speculates {
        let StepTensors { chosen_rows, tokens, next_tokens, drafts, .. } = tensors;
        if shape.chosen > 0 {
            l.task(TELL_CHOSEN, Pass::Forward, TellTask { tokens, rows: chosen_rows, into: next_tokens })?;
        }
        let h = stages.lower_module_inference(&mut l, 0, next_tokens, h)?;
        if shape.chosen > 0 {
            let out = l.alloc("last hidden states of the module", &[shape.chosen, h.dim(1)]);
            l.task(PICK_ROWS, Pass::Forward, PickTask { x: h, rows: chosen_rows, out })?;
            let logits = head::lower_logits(&mut l, head_weight, out)?;
            l.task(DRAFT, Pass::Forward, DraftTask { logits, tokens: drafts })?;
        }
    }
    let rest = l.take_scope();
    l.release_scope(rest, None);
    let graph = l.finish()?;
    world.resource_mut::<Plans>().insert(key, graph);
    Ok(())
}

#[derive(Component, Clone, Copy)]
struct PickTask {
    x: Tensor,
    rows: Tensor,
    out: Tensor,
}

fn pick_rows(In(id): In<Entity>, mut launch: Launch<PickTask>) -> Result {
    let (_, &PickTask { x, rows, out }, s) = launch.get(id)?;
    Ok(embedding::forward(s, rows, x, out)?)
}

#[derive(Component, Clone, Copy)]
struct SampleTask {
    logits: Tensor,
    adjusted: Option<Tensor>,
    tokens: Tensor,
    logprobs: Option<Logprobs>,
}

fn sample(In(id): In<Entity>, mut launch: Launch<SampleTask>, server: Res<Server>) -> Result {
    let (_, &SampleTask { logits, adjusted, tokens, logprobs }, s) = launch.get(id)?;
    // Rows of the step that the graph was planned in, whichever it is: they are as many.
    let StepAtHand { rows, adjusts, told, .. } = &server.step;
    if let Some(adjusted) = adjusted {
        logits::adjust(s, logits, adjusts, adjusted)?;
    }
    sampling::forward(s, adjusted.unwrap_or(logits), rows, tokens)?;
    logprobs.map_or(Ok(()), |out| Ok(logits::logprobs(s, logits, tokens, told, out)?))
}

#[derive(Component, Clone, Copy)]
struct DraftTask {
    logits: Tensor,
    tokens: Tensor,
}

/// The likeliest token, whatever the request's way of choosing: where little is left to chance it is the one that will be chosen.
fn draft(In(id): In<Entity>, mut launch: Launch<DraftTask>) -> Result {
    let (_, &DraftTask { logits, tokens }, s) = launch.get(id)?;
    Ok(sampling::forward(s, logits, &vec![Sampling::GREEDY; tokens.len()], tokens)?)
}

#[derive(Component, Clone, Copy)]
struct TellTask {
    tokens: Tensor,
    rows: Tensor,
    into: Tensor,
}

fn tell_chosen(In(id): In<Entity>, mut launch: Launch<TellTask>) -> Result {
    let (_, &TellTask { tokens, rows, into }, s) = launch.get(id)?;
    Ok(elementwise::scatter(s, tokens, rows, into)?)
}
