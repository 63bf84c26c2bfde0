//! What a pipeline action is made of: walks through the stages that a rank holds, and which activations live until when.
//!
//! The same code lowers one rank with the whole model and one of sixteen with two stages: stages differ in where a walk's input
//! comes from and where its output goes.

mod backward;

use std::{collections::BTreeMap, ops::Range, sync::Arc};

use bevy_ecs::prelude::*;
use engine::prelude::*;
use kernels::{ops::elementwise, tensor::Tensor};

use super::{
    action::{Action, Cell, Schedule, Work},
    chunk::{self, Chunk, Side, interleave},
    layer::LayerForward,
    transfer::{self, Direction},
    walk::{BackwardWalk, Deferred, Forward, ForwardWalk, ModuleForward, Step, backward_steps, forward_steps},
};
use crate::{
    embedding,
    head::{self, Loss},
    layout::Layout,
    lower::Lowering,
    microbatch::Inputs,
    model::{Model, Weight},
    routing::Router,
};

/// Adds two gradients that meet.
pub const ADD_GRAD: TaskKind = TaskKind("add_gradient");

#[derive(Component, Clone, Copy)]
pub(crate) struct AddTask {
    from: Tensor,
    into: Tensor,
}

pub(crate) fn add_gradient(In(id): In<Entity>, mut launch: Launch<AddTask>) -> Result {
    let (_, &AddTask { from, into }, s) = launch.get(id)?;
    Ok(elementwise::add_acc(s, from, into)?)
}

/// Lowers the actions of one rank.
pub struct Stages {
    model: Model,
    router: Option<Router>,
    layout: Arc<Layout>,
    /// Pipeline position that runs a stage of a microbatch, at `microbatch * stages + stage`.
    position_of: Vec<Option<u32>>,
    order: [Chunk; 10],
    inputs: Vec<Inputs>,
    forwards: BTreeMap<(u32, u32), Forward>,
    deferred: BTreeMap<(u32, u32), Vec<Deferred>>,
    /// Tensors for another stage of this rank.
    handed: BTreeMap<(Direction, u32, u32), Tensor>,
}

#[expect(clippy::large_enum_variant, reason = "one or two at a time")]
enum Walk {
    Forward(ForwardWalk),
    Backward(BackwardWalk),
}

impl Stages {
    /// The stages of `layout`'s rank over its part of the model, with the tensors of each microbatch.
    pub fn new(
        model: Model,
        layout: Arc<Layout>,
        schedule: &Schedule,
        order: [Chunk; 10],
        inputs: Vec<Inputs>,
    ) -> Self {
        let router = model.config.moe.as_ref().map(Router::new);
        let mut position_of = vec![None; (schedule.num_stages * schedule.num_microbatches) as usize];
        for (position, actions) in (0..).zip(&schedule.ranks) {
            for cell in actions.iter().flat_map(|action| action.cells()) {
                position_of[(cell.microbatch * schedule.num_stages + cell.stage) as usize] = Some(position);
            }
        }
        let (forwards, deferred, handed) = Default::default();
        Stages { model, router, layout, position_of, order, inputs, forwards, deferred, handed }
    }

    /// The whole of a model that is on one rank, for a graph that runs no schedule.
    pub fn whole(model: Model, layout: Arc<Layout>) -> Self {
        Stages::new(model, layout, &Schedule::from_ranks(Vec::new()), chunk::ORDER, Vec::new())
    }

    /// Emits the tasks of one action.
    pub fn lower(&mut self, l: &mut Lowering, action: Action) -> Result<()> {
        match action {
            Action::Single(Cell { work: Work::W, stage, microbatch }) => {
                self.enter_cell(l, stage, microbatch);
                self.weight_grad(l, stage, microbatch)?;
            }
            Action::Single(cell) => {
                let mut walk = self.walk(l, cell)?;
                while self.advance(l, cell, &mut walk)? {}
                self.finish(l, cell, walk);
            }
            Action::Pair { forward, backward } => {
                l.overlapping = true;
                let mut walks = (self.walk(l, forward)?, self.walk(l, backward)?);
                for side in interleave(&walks.0.chunks(), &walks.1.chunks(), &self.order) {
                    match side {
                        Side::Forward => self.advance(l, forward, &mut walks.0)?,
                        Side::Backward => self.advance(l, backward, &mut walks.1)?,
                    };
                }
                self.finish(l, forward, walks.0);
                self.finish(l, backward, walks.1);
                l.overlapping = false;
            }
        }
        (l.layer, l.microbatch) = (None, None);
        Ok(())
    }

    /// Emits the forward without anything for a backward, through all stages that this rank runs of one microbatch; activations
    /// are given back as they are used up. Returns the final norm's output where the last stage is.
    pub fn lower_inference(&self, l: &mut Lowering, inputs: Inputs) -> Result<Option<Tensor>> {
        l.inputs = inputs;
        let mut handed: Option<Tensor> = None;
        let mut out = None;
        let mine = self.layout.mesh.coordinates(self.layout.rank).pp;
        let runs = |stage: u32| self.layout.first_position(stage) == mine;
        for stage in (0..self.layout.num_stages()).filter(|&stage| runs(stage)) {
            l.stage = stage;
            let mut x = match handed.take() {
                Some(x) => x,
                None if stage == 0 => embedding::lower_forward(l, self.weight(self.model.embedding)?, inputs.tokens)?,
                None => {
                    let peer = self.peer(self.layout.first_position(stage - 1));
                    self.receive(l, Direction::Forward, peer, stage)?
                }
            };
            let mut before = l.take_scope();
            for index in self.layers(stage) {
                let (layer, h) = LayerForward::whole(l, self.model.layer(index)?, self.router, x)?;
                x = h;
                l.release_scope(std::mem::replace(&mut before, layer.scope), None);
            }
            l.layer = None;
            if stage + 1 == self.layout.num_stages() {
                out = Some(head::lower_norm(l, self.weight(self.model.norm)?, x)?.out);
                l.release_scope(before, None);
            } else if runs(stage + 1) {
                l.release_scope(before, Some(x));
                handed = Some(x);
            } else {
                let peer = self.peer(self.layout.first_position(stage + 1));
                transfer::lower_send(l, Direction::Forward, x, peer, stage + 1)?;
                l.release_scope(before, None);
            }
        }
        Ok(out)
    }

    /// Emits the forward of MTP module `k` without anything for a backward: from the hidden states `h` [t, d] that it is given and the
    /// tokens \[t\] k + 1 places on, its own hidden states, normed, [t, d].
    pub fn lower_module_inference(&self, l: &mut Lowering, k: usize, tokens: Tensor, h: Tensor) -> Result<Tensor> {
        let Some(module) = self.model.mtp.get(k) else { return Err(format!("there is no MTP module {k}").into()) };
        let embedded = embedding::lower_forward(l, self.weight(self.model.embedding)?, tokens)?;
        let join = module.lower_forward(l, embedded, h)?;
        let before = l.take_scope();
        let (layer, x) = LayerForward::whole(l, module.layer, self.router, join.out)?;
        l.release_scope(before, None);
        l.release_scope(layer.scope, Some(x));
        let out = head::lower_norm(l, module.norm, x)?.out;
        l.layer = None;
        Ok(out)
    }

    fn layers(&self, stage: u32) -> Range<usize> {
        self.layout.stages[stage as usize].clone()
    }

    /// Rank with this one's part of the batch at another pipeline position.
    fn peer(&self, pp: u32) -> u32 {
        self.layout.mesh.at_stage(self.layout.rank, pp)
    }

    /// The rank that runs `stage` of `microbatch`, unless it is this one.
    fn neighbour(&self, stage: u32, microbatch: u32) -> Result<Option<u32>> {
        let position = self.position_of[(microbatch * self.layout.num_stages() + stage) as usize];
        let position = position.ok_or_else(|| format!("no rank runs stage {stage} of microbatch {microbatch}"))?;
        Ok((position != self.layout.mesh.coordinates(self.layout.rank).pp).then(|| self.peer(position)))
    }

    fn weight(&self, weight: Option<Weight>) -> Result<Weight> {
        weight.ok_or_else(|| "a stage needs a weight that its rank does not hold".into())
    }

    fn receive(&self, l: &mut Lowering, direction: Direction, peer: u32, stage: u32) -> Result<Tensor> {
        let dims = (l.inputs.num_tokens(), self.model.config.hidden_size);
        transfer::lower_receive(l, direction, dims, peer, stage)
    }

    fn enter_cell(&self, l: &mut Lowering, stage: u32, microbatch: u32) {
        (l.stage, l.microbatch, l.layer) = (stage, Some(microbatch), None);
        l.inputs = self.inputs[microbatch as usize];
    }

    fn walk(&mut self, l: &Lowering, cell: Cell) -> Result<Walk> {
        let is_last = cell.stage + 1 == self.layout.num_stages();
        let is_moe = |entity| LayerForward::is_moe(l.world, entity);
        let layers = self.layers(cell.stage).map(|i| self.model.layer(i).map(is_moe)).collect::<Result<Vec<bool>>>()?;
        let with_inputs = self.inputs[cell.microbatch as usize].mtp.iter().flatten().count();
        let modules: Vec<bool> = self.model.mtp.iter().take(with_inputs).map(|m| is_moe(m.layer)).collect();
        let modules = is_last.then_some(&modules[..]);
        if cell.work == Work::F {
            let steps = forward_steps(&layers, modules);
            let (forward, scope) = Default::default();
            return Ok(Walk::Forward(ForwardWalk { steps, x: None, open: None, forward, scope }));
        }
        let forward = self.forwards.remove(&(cell.stage, cell.microbatch));
        let forward = forward.ok_or_else(|| format!("{cell}: microbatch {} did not go forward", cell.microbatch))?;
        let weights = cell.work == Work::B;
        let steps = backward_steps(&layers, modules, weights);
        let (deferred, scope) = Default::default();
        let walk = BackwardWalk { steps, weights, d: None, d_hidden: None, open: None, forward, deferred, scope };
        Ok(Walk::Backward(walk))
    }

    /// Emits a walk's next step; `false` if there is none.
    fn advance(&mut self, l: &mut Lowering, cell: Cell, walk: &mut Walk) -> Result<bool> {
        self.enter_cell(l, cell.stage, cell.microbatch);
        match walk {
            Walk::Forward(walk) => {
                let Some(step) = walk.steps.pop_front() else { return Ok(false) };
                l.swap_scope(&mut walk.scope);
                self.forward_step(l, cell, walk, step)?;
                l.swap_scope(&mut walk.scope);
            }
            Walk::Backward(walk) => {
                let Some(step) = walk.steps.pop_front() else { return Ok(false) };
                l.swap_scope(&mut walk.scope);
                self.backward_step(l, cell, walk, step)?;
                l.swap_scope(&mut walk.scope);
            }
        }
        Ok(true)
    }

    fn finish(&mut self, l: &mut Lowering, cell: Cell, walk: Walk) {
        let key = (cell.stage, cell.microbatch);
        match walk {
            Walk::Forward(mut walk) => {
                walk.forward.scope.extend(walk.scope);
                self.forwards.insert(key, walk.forward);
            }
            Walk::Backward(mut walk) if walk.weights => {
                for scope in [std::mem::take(&mut walk.forward.scope), walk.scope] {
                    l.release_scope(scope, None);
                }
            }
            Walk::Backward(mut walk) => {
                walk.deferred.push(Deferred::Scope(walk.forward.scope));
                walk.deferred.push(Deferred::Scope(walk.scope));
                self.deferred.insert(key, walk.deferred);
            }
        }
    }

    /// Ends the layer that is open, when its outputs are back.
    fn settle(&self, l: &mut Lowering, walk: &mut ForwardWalk) -> Result<()> {
        let Some(mut layer) = walk.open.take() else { return Ok(()) };
        let out = layer.settle(l)?;
        layer.scope = l.take_scope();
        if l.recomputes_layers() {
            l.release_scope(std::mem::take(&mut layer.scope), Some(out));
            layer.scope = l.take_scope();
        }
        walk.x = Some(out);
        match walk.forward.modules.last_mut() {
            Some(module) => module.layer = Some(layer),
            None => walk.forward.layers.push(layer),
        }
        Ok(())
    }

    fn forward_step(&mut self, l: &mut Lowering, cell: Cell, walk: &mut ForwardWalk, step: Step) -> Result<()> {
        let goes_on = matches!(step.chunk(), Some(Chunk::DispatchF | Chunk::MlpF | Chunk::CombineF));
        if !goes_on {
            self.settle(l, walk)?;
            l.layer = None;
        }
        let x_now = walk.x;
        let x = || x_now.ok_or_else(|| BevyError::from("a forward has no input"));
        match step {
            Step::Enter => {
                walk.x = Some(if cell.stage == 0 {
                    embedding::lower_forward(l, self.weight(self.model.embedding)?, l.inputs.tokens)?
                } else if let Some(peer) = self.neighbour(cell.stage - 1, cell.microbatch)? {
                    self.receive(l, Direction::Forward, peer, cell.stage)?
                } else {
                    let x = self.take_handed(Direction::Forward, cell)?;
                    l.adopt(x);
                    x
                });
                walk.forward.scope = l.take_scope();
            }
            Step::Layer(..) | Step::Module(..) => {
                let entity = match step {
                    Step::Layer(i, _) => self.model.layer(self.layers(cell.stage).start + i)?,
                    Step::Module(k, _) => self.model.mtp[k].layer,
                    _ => return Ok(()),
                };
                match (step.chunk(), &mut walk.open) {
                    (Some(Chunk::AttentionF), _) => {
                        walk.open = Some(LayerForward::attention(l, entity, self.router, x()?)?);
                    }
                    (Some(Chunk::DispatchF), Some(layer)) => layer.dispatch(l, self.router)?,
                    (Some(Chunk::MlpF), Some(layer)) => layer.mlp(l)?,
                    (Some(Chunk::CombineF), Some(layer)) => layer.give_back(l)?,
                    _ => return Err(format!("{cell}: a forward cannot do {step:?} here").into()),
                }
            }
            Step::Head => {
                let norm = head::lower_norm(l, self.weight(self.model.norm)?, x()?)?;
                let weight = self.weight(self.model.head)?;
                walk.forward.dh = head::lower_head(l, Loss::Main, weight, norm.out, l.inputs.targets)?;
                walk.forward.norm = Some(norm);
                walk.x = Some(norm.out);
                walk.forward.scope.extend(l.take_scope());
            }
            Step::Join(k) => {
                let Some((tokens, _)) = l.inputs.mtp[k] else { return Err("a module has no tokens".into()) };
                let embedded = embedding::lower_forward(l, self.weight(self.model.embedding)?, tokens)?;
                l.layer = Some((self.model.config.num_hidden_layers + k) as u32);
                let join = self.model.mtp[k].lower_forward(l, embedded, x()?)?;
                l.layer = None;
                let (scope, layer, norm, dh) = (l.take_scope(), None, None, None);
                walk.forward.modules.push(ModuleForward { join, tokens, layer, norm, dh, scope });
                walk.x = Some(join.out);
            }
            Step::ModuleHead(k) => {
                let Some((_, targets)) = l.inputs.mtp[k] else { return Err("a module has no targets".into()) };
                l.layer = walk.forward.modules[k].layer.as_ref().map(|layer| layer.index as u32);
                let norm = head::lower_norm(l, self.model.mtp[k].norm, x()?)?;
                let dh = head::lower_head(l, Loss::Mtp(k), self.weight(self.model.head)?, norm.out, targets)?;
                let module = &mut walk.forward.modules[k];
                (module.norm, module.dh) = (Some(norm), dh);
                module.scope.extend(l.take_scope());
            }
            Step::Leave if cell.stage + 1 == self.layout.num_stages() => {}
            Step::Leave => match self.neighbour(cell.stage + 1, cell.microbatch)? {
                Some(peer) => transfer::lower_send(l, Direction::Forward, x()?, peer, cell.stage + 1)?,
                None => {
                    // Weight gradients of the stage that takes it may come after all of this one's.
                    let x = x()?;
                    walk.forward.disown(x);
                    self.handed.insert((Direction::Forward, cell.stage + 1, cell.microbatch), x);
                }
            },
        }
        Ok(())
    }

    fn take_handed(&mut self, direction: Direction, cell: Cell) -> Result<Tensor> {
        let tensor = self.handed.remove(&(direction, cell.stage, cell.microbatch));
        tensor.ok_or_else(|| format!("{cell}: its input was not computed yet").into())
    }
}

impl Walk {
    fn chunks(&self) -> Vec<Option<Chunk>> {
        let steps = match self {
            Walk::Forward(walk) => &walk.steps,
            Walk::Backward(walk) => &walk.steps,
        };
        steps.iter().map(|step| step.chunk()).collect()
    }
}
