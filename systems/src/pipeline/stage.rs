//! What a pipeline action is made of: the walk over a stage's layers for each pass, and which activations live until when.
//!
//! A unit (embedding, layer, head) allocates in a scope of its own; the scope is given back after the unit's last pass, so the
//! order of actions decides how much memory a step needs.

use std::collections::BTreeMap;

use bevy_ecs::prelude::*;
use engine::prelude::*;
use kernels::{ops::elementwise, tensor::Tensor};

use super::action::{Action, Work};
use crate::{
    attention::{
        Gqa, Mla,
        gqa::{GqaActivations, GqaGradients},
        mla::{MlaActivations, MlaGradients},
    },
    dense::{Dense, DenseActivations, DenseGradients},
    embedding,
    expert::{ExpertActivations, ExpertGradients, Moe},
    generate::LayerCache,
    head::{self, Loss, NormActivations},
    lower::Lowering,
    microbatch::Inputs,
    model::{Layer, Model},
    mtp::{JoinActivations, JoinGradients},
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

#[derive(Clone, Copy)]
#[expect(clippy::large_enum_variant, reason = "both are handles, which are copied")]
enum AttentionForward {
    Mla(Mla, MlaActivations),
    Gqa(Gqa, GqaActivations),
}

#[derive(Clone, Copy)]
enum AttentionBackward {
    Mla(MlaGradients),
    Gqa(GqaGradients),
}

#[expect(clippy::large_enum_variant, reason = "a few are made per plan, and handles are copied freely")]
#[derive(Clone, Copy)]
enum MlpForward {
    Dense(Dense, DenseActivations),
    Moe(Moe, ExpertActivations),
}

#[expect(clippy::large_enum_variant, reason = "a few are made per plan, and handles are copied freely")]
#[derive(Clone, Copy)]
enum MlpBackward {
    Dense(DenseGradients),
    Moe(ExpertGradients),
}

struct LayerForward {
    entity: Entity,
    index: usize,
    x: Tensor,
    parts: (AttentionForward, MlpForward),
    scope: Vec<Tensor>,
}

/// A layer whose input gradient is done, with what its weight gradient needs.
struct LayerBackward {
    index: usize,
    parts: (AttentionForward, MlpForward),
    grads: (AttentionBackward, MlpBackward),
    scopes: Vec<Vec<Tensor>>,
}

struct MtpForward {
    join: JoinActivations,
    tokens: Tensor,
    layer: LayerForward,
    norm: NormActivations,
    dh: Option<Tensor>,
    scope: Vec<Tensor>,
}

struct Forward {
    layers: Vec<LayerForward>,
    norm: NormActivations,
    dh: Option<Tensor>,
    mtp: Vec<MtpForward>,
    scope: Vec<Tensor>,
}

#[expect(clippy::large_enum_variant, reason = "a few are made per plan, and handles are copied freely")]
enum Deferred {
    Layer(LayerBackward),
    Join(usize, JoinActivations, JoinGradients),
    Embedding(Tensor, Tensor),
    Scope(Vec<Tensor>),
}

/// Lowers the actions of one rank that holds the whole model.
pub struct Stage {
    model: Model,
    router: Option<Router>,
    inputs: Vec<Inputs>,
    forwards: BTreeMap<u32, Forward>,
    deferred: BTreeMap<u32, Vec<Deferred>>,
}

impl Stage {
    /// A stage over `model`, with the tensors of each microbatch.
    pub fn new(model: Model, inputs: Vec<Inputs>) -> Self {
        let router = model.config.moe.as_ref().map(Router::new);
        Stage { model, router, inputs, forwards: BTreeMap::new(), deferred: BTreeMap::new() }
    }

    /// Emits the tasks of one action.
    pub fn lower(&mut self, l: &mut Lowering, action: Action) -> Result<()> {
        l.microbatch = Some(action.microbatch);
        l.inputs = self.inputs[action.microbatch as usize];
        match action.work {
            Work::F => self.forward(l, action.microbatch)?,
            Work::I => self.input_grad(l, action.microbatch, false)?,
            Work::W => self.weight_grad(l, action.microbatch)?,
            Work::B => self.input_grad(l, action.microbatch, true)?,
        }
        l.layer = None;
        l.microbatch = None;
        Ok(())
    }

    /// Emits the forward up to the final norm and returns its output; activations are given back as they are used up.
    pub fn lower_inference(&self, l: &mut Lowering, inputs: Inputs) -> Result<Tensor> {
        l.inputs = inputs;
        let mut x = embedding::lower_forward(l, self.model.embedding, inputs.tokens)?;
        let mut before = l.take_scope();
        for &entity in &self.model.layers {
            let layer = self.layer_forward(l, entity, x)?;
            x = layer.out();
            l.release_scope(std::mem::replace(&mut before, layer.scope), None);
        }
        l.layer = None;
        let norm = head::lower_norm(l, self.model.norm, x)?;
        l.release_scope(before, None);
        Ok(norm.out)
    }

    fn forward(&mut self, l: &mut Lowering, microbatch: u32) -> Result<()> {
        let (model, inputs) = (self.model.clone(), l.inputs);
        let mut x = embedding::lower_forward(l, model.embedding, inputs.tokens)?;
        let mut scope = l.take_scope();
        let mut layers = Vec::with_capacity(model.layers.len());
        for &entity in &model.layers {
            let layer = self.kept_layer(l, entity, x)?;
            x = layer.out();
            layers.push(layer);
        }
        l.layer = None;
        let norm = head::lower_norm(l, model.norm, x)?;
        let dh = head::lower_head(l, Loss::Main, model.head, norm.out, inputs.targets)?;
        scope.extend(l.take_scope());

        let mut mtp = Vec::new();
        let mut hidden = norm.out;
        for (k, (module, tensors)) in model.mtp.iter().zip(inputs.mtp).enumerate() {
            let Some((tokens, targets)) = tensors else { break };
            let embedded = embedding::lower_forward(l, model.embedding, tokens)?;
            let join = module.lower_forward(l, embedded, hidden)?;
            let mut scope = l.take_scope();
            let layer = self.kept_layer(l, module.layer, join.out)?;
            hidden = layer.out();
            let norm = head::lower_norm(l, module.norm, hidden)?;
            let dh = head::lower_head(l, Loss::Mtp(k), model.head, norm.out, targets)?;
            scope.extend(l.take_scope());
            mtp.push(MtpForward { join, tokens, layer, norm, dh, scope });
        }
        self.forwards.insert(microbatch, Forward { layers, norm, dh, mtp, scope });
        Ok(())
    }

    /// A layer whose activations wait for the backward pass, unless they are computed again then.
    fn kept_layer(&self, l: &mut Lowering, entity: Entity, x: Tensor) -> Result<LayerForward> {
        let mut layer = self.layer_forward(l, entity, x)?;
        if l.recomputes_layers() {
            let out = layer.out();
            l.release_scope(std::mem::take(&mut layer.scope), Some(out));
            layer.scope = l.take_scope();
        }
        Ok(layer)
    }

    fn layer_forward(&self, l: &mut Lowering, entity: Entity, x: Tensor) -> Result<LayerForward> {
        let part = l.world.entity(entity);
        let index = part.get::<Layer>().map_or(0, |layer| layer.index);
        let (mla, gqa) = (part.get::<Mla>().copied(), part.get::<Gqa>().copied());
        let (dense, moe) = (part.get::<Dense>().copied(), part.get::<Moe>().copied());
        l.layer = Some(index as u32);
        let (attention, h) = match (mla, gqa) {
            (Some(mla), _) => {
                let acts = match l.cache(index) {
                    Some(LayerCache::Latent(cache)) => mla.lower_cached(l, x, cache)?,
                    _ => mla.lower_forward(l, x)?,
                };
                (AttentionForward::Mla(mla, acts), acts.out)
            }
            (_, Some(gqa)) => {
                let acts = match l.cache(index) {
                    Some(LayerCache::Heads(cache)) => gqa.lower_cached(l, x, cache)?,
                    _ => gqa.lower_forward(l, x)?,
                };
                (AttentionForward::Gqa(gqa, acts), acts.out)
            }
            _ => return Err(format!("layer {index} has no attention").into()),
        };
        let mlp = match (dense, moe, self.router) {
            (Some(dense), ..) => MlpForward::Dense(dense, dense.lower_forward(l, h)?),
            (_, Some(moe), Some(router)) => MlpForward::Moe(moe, moe.lower_forward(l, index, router, h)?),
            _ => return Err(format!("layer {index} has no feed-forward half").into()),
        };
        Ok(LayerForward { entity, index, x, parts: (attention, mlp), scope: l.take_scope() })
    }

    fn layer_input_grad(
        &self,
        l: &mut Lowering,
        layer: LayerForward,
        d_out: Tensor,
    ) -> Result<(LayerBackward, Tensor)> {
        let mut scopes = vec![layer.scope];
        let (mut attention, mut mlp) = layer.parts;
        if l.recomputes_layers() {
            l.repeating = true;
            let again = self.layer_forward(l, layer.entity, layer.x)?;
            l.repeating = false;
            (attention, mlp) = again.parts;
            scopes.push(again.scope);
        }
        l.layer = Some(layer.index as u32);
        let (mlp_grads, dh) = match &mut mlp {
            MlpForward::Dense(dense, acts) => {
                let (new, g) = dense.lower_input_grad(l, *acts, d_out)?;
                *acts = new;
                (MlpBackward::Dense(g), g.dx)
            }
            MlpForward::Moe(moe, acts) => {
                let Some(router) = self.router else { return Err("experts without a router".into()) };
                let (new, g) = moe.lower_input_grad(l, router, *acts, d_out)?;
                *acts = new;
                (MlpBackward::Moe(g), g.route.dx)
            }
        };
        let (attention_grads, dx) = match &mut attention {
            AttentionForward::Mla(mla, acts) => {
                let (new, g) = mla.lower_input_grad(l, *acts, dh)?;
                *acts = new;
                (AttentionBackward::Mla(g), g.dx)
            }
            AttentionForward::Gqa(gqa, acts) => {
                let (new, g) = gqa.lower_input_grad(l, *acts, dh)?;
                *acts = new;
                (AttentionBackward::Gqa(g), g.dx)
            }
        };
        scopes.push(l.take_scope());
        let backward =
            LayerBackward { index: layer.index, parts: (attention, mlp), grads: (attention_grads, mlp_grads), scopes };
        Ok((backward, dx))
    }

    fn layer_weight_grad(&self, l: &mut Lowering, layer: LayerBackward, keep: Option<Tensor>) -> Result<()> {
        l.layer = Some(layer.index as u32);
        match (layer.parts.1, layer.grads.1) {
            (MlpForward::Dense(dense, acts), MlpBackward::Dense(grads)) => dense.lower_weight_grad(l, acts, grads)?,
            (MlpForward::Moe(moe, acts), MlpBackward::Moe(grads)) => {
                let Some(router) = self.router else { return Err("experts without a router".into()) };
                moe.lower_weight_grad(l, router, acts, grads)?;
            }
            _ => {}
        }
        match (layer.parts.0, layer.grads.0) {
            (AttentionForward::Mla(mla, acts), AttentionBackward::Mla(grads)) => {
                mla.lower_weight_grad(l, acts, grads)?
            }
            (AttentionForward::Gqa(gqa, acts), AttentionBackward::Gqa(grads)) => {
                gqa.lower_weight_grad(l, acts, grads)?
            }
            _ => {}
        }
        for scope in layer.scopes {
            l.release_scope(scope, keep);
        }
        Ok(())
    }

    /// I of a microbatch; with `weights`, each unit's W follows its I at once, so that its memory is free for the next.
    fn input_grad(&mut self, l: &mut Lowering, microbatch: u32, weights: bool) -> Result<()> {
        let Some(forward) = self.forwards.remove(&microbatch) else {
            return Err(format!("microbatch {microbatch} goes backward before it went forward").into());
        };
        let model = self.model.clone();
        let mut deferred = Vec::new();
        let no_gradient = || -> BevyError { "the head made no gradient: the forward was not for training".into() };
        let defer = |stage: &Self, l: &mut Lowering, item: Deferred, keep: Option<Tensor>, list: &mut Vec<Deferred>| {
            if weights {
                stage.finish(l, item, keep)
            } else {
                list.push(item);
                Ok(())
            }
        };

        let mut d_next: Option<Tensor> = None;
        for (k, mtp) in forward.mtp.into_iter().enumerate().rev() {
            let dh = mtp.dh.ok_or_else(no_gradient)?;
            l.layer = Some(mtp.layer.index as u32);
            let d_out = head::lower_norm_backward(l, model.mtp[k].norm, mtp.norm, dh)?;
            if let Some(from) = d_next {
                l.task(ADD_GRAD, Pass::InputGrad, AddTask { from, into: d_out })?;
            }
            let (layer, d_join) = self.layer_input_grad(l, mtp.layer, d_out)?;
            defer(self, l, Deferred::Layer(layer), Some(d_join), &mut deferred)?;
            let join = model.mtp[k].lower_input_grad(l, mtp.join, d_join)?;
            d_next = Some(join.d_hidden);
            let rest = l.take_scope();
            defer(self, l, Deferred::Join(k, mtp.join, join), None, &mut deferred)?;
            defer(self, l, Deferred::Embedding(mtp.tokens, join.d_embedded), None, &mut deferred)?;
            defer(self, l, Deferred::Scope(mtp.scope), None, &mut deferred)?;
            defer(self, l, Deferred::Scope(rest), d_next, &mut deferred)?;
        }

        l.layer = None;
        let dh = forward.dh.ok_or_else(no_gradient)?;
        if let Some(from) = d_next {
            l.task(ADD_GRAD, Pass::InputGrad, AddTask { from, into: dh })?;
        }
        let mut dx = head::lower_norm_backward(l, model.norm, forward.norm, dh)?;
        for layer in forward.layers.into_iter().rev() {
            let (layer, d_in) = self.layer_input_grad(l, layer, dx)?;
            defer(self, l, Deferred::Layer(layer), Some(d_in), &mut deferred)?;
            dx = d_in;
        }
        l.layer = None;
        let rest = l.take_scope();
        defer(self, l, Deferred::Embedding(l.inputs.tokens, dx), None, &mut deferred)?;
        defer(self, l, Deferred::Scope(forward.scope), None, &mut deferred)?;
        defer(self, l, Deferred::Scope(rest), None, &mut deferred)?;
        if !weights {
            self.deferred.insert(microbatch, deferred);
        }
        Ok(())
    }

    fn weight_grad(&mut self, l: &mut Lowering, microbatch: u32) -> Result<()> {
        let Some(deferred) = self.deferred.remove(&microbatch) else {
            return Err(format!("weight gradient of microbatch {microbatch} before its input gradient").into());
        };
        for item in deferred {
            self.finish(l, item, None)?;
        }
        Ok(())
    }

    fn finish(&self, l: &mut Lowering, item: Deferred, keep: Option<Tensor>) -> Result<()> {
        match item {
            Deferred::Layer(layer) => self.layer_weight_grad(l, layer, keep),
            Deferred::Join(k, acts, grads) => self.model.mtp[k].lower_weight_grad(l, acts, grads),
            Deferred::Embedding(tokens, dx) => embedding::lower_weight_grad(l, self.model.embedding, tokens, dx),
            Deferred::Scope(scope) => {
                l.release_scope(scope, keep);
                Ok(())
            }
        }
    }
}

impl LayerForward {
    fn out(&self) -> Tensor {
        match self.parts.1 {
            MlpForward::Dense(_, acts) => acts.out,
            MlpForward::Moe(_, acts) => acts.out,
        }
    }
}
