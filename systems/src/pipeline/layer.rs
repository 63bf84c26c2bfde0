//! One decoder layer, chunk by chunk: what each chunk of a forward and of a backward emits, and what it leaves for the next.
//!
//! A layer allocates in the scope of the walk it is part of; the scope is given back after the layer's last pass, so the order of
//! actions decides how much memory a step needs.

use bevy_ecs::prelude::*;
use kernels::tensor::Tensor;

use crate::{
    attention::{
        Gqa, Mla,
        gqa::{GqaActivations, GqaGradients},
        mla::{MlaActivations, MlaGradients},
    },
    dense::{Dense, DenseActivations, DenseGradients},
    dispatch::{self, Arrived},
    expert::{ExpertActivations, ExpertGradients, Moe},
    lower::Lowering,
    model::Layer,
    routing::{RouteActivations, RouteGradients, Router},
    serve::cache::LayerCache,
};

#[expect(clippy::large_enum_variant, reason = "both are handles, which are copied")]
#[derive(Clone, Copy)]
enum Attention {
    Mla(Mla, MlaActivations),
    Gqa(Gqa, GqaActivations),
}

#[derive(Clone, Copy)]
enum AttentionGrads {
    Mla(MlaGradients),
    Gqa(GqaGradients),
}

/// How far the feed-forward half of a forward is.
#[expect(clippy::large_enum_variant, reason = "a few are made per plan, and handles are copied freely")]
#[derive(Clone, Copy)]
enum Mlp {
    /// Attention is done.
    Dense(Dense, Tensor),
    Routed(Moe, RouteActivations),
    Dispatched(Moe, RouteActivations, Arrived),
    DenseDone(Dense, DenseActivations),
    MoeDone(Moe, ExpertActivations),
}

#[expect(clippy::large_enum_variant, reason = "a few are made per plan, and handles are copied freely")]
#[derive(Clone, Copy)]
enum MlpGrads {
    Dense(DenseGradients),
    Experts(ExpertGradients),
    Moe(ExpertGradients, RouteGradients),
}

/// A layer whose forward has begun.
pub(super) struct LayerForward {
    entity: Entity,
    pub index: usize,
    x: Tensor,
    attention: Attention,
    mlp: Mlp,
    pub scope: Vec<Tensor>,
}

/// A layer whose backward has begun.
pub(super) struct LayerBackward {
    forward: LayerForward,
    attention_grads: Option<AttentionGrads>,
    mlp_grads: Option<MlpGrads>,
    /// Of the backward, and of the repeated forward.
    scopes: Vec<Vec<Tensor>>,
}

fn out_of_order(what: &str) -> BevyError {
    format!("the chunks of a layer are out of order: {what}").into()
}

impl LayerForward {
    /// attn(F): attention and, before experts, the router's choice.
    pub fn attention(l: &mut Lowering, entity: Entity, router: Option<Router>, x: Tensor) -> Result<Self> {
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
                (Attention::Mla(mla, acts), acts.out)
            }
            (_, Some(gqa)) => {
                let acts = match l.cache(index) {
                    Some(LayerCache::Heads(cache)) => gqa.lower_cached(l, x, cache)?,
                    _ => gqa.lower_forward(l, x)?,
                };
                (Attention::Gqa(gqa, acts), acts.out)
            }
            _ => return Err(format!("layer {index} has no attention").into()),
        };
        let mlp = match (dense, moe, router) {
            (Some(dense), ..) => Mlp::Dense(dense, h),
            (_, Some(moe), Some(router)) => Mlp::Routed(moe, moe.lower_route(l, index, router, h)?),
            _ => return Err(format!("layer {index} has no feed-forward half").into()),
        };
        Ok(LayerForward { entity, index, x, attention, mlp, scope: Vec::new() })
    }

    /// dispatch(F).
    pub fn dispatch(&mut self, l: &mut Lowering, router: Option<Router>) -> Result<()> {
        l.layer = Some(self.index as u32);
        if let (Mlp::Routed(moe, route), Some(router)) = (self.mlp, router) {
            self.mlp = Mlp::Dispatched(moe, route, dispatch::lower_dispatch(l, route, router.num_experts())?);
        }
        Ok(())
    }

    /// mlp(F).
    pub fn mlp(&mut self, l: &mut Lowering) -> Result<()> {
        l.layer = Some(self.index as u32);
        self.mlp = match self.mlp {
            Mlp::Dense(dense, h) => Mlp::DenseDone(dense, dense.lower_forward(l, h)?),
            Mlp::Dispatched(moe, route, arrived) => Mlp::MoeDone(moe, moe.lower_experts(l, route, arrived)?),
            _ => return Err(out_of_order("mlp(F) before dispatch(F)")),
        };
        Ok(())
    }

    /// combine(F), as far as it is a transfer.
    pub fn give_back(&mut self, l: &mut Lowering) -> Result<()> {
        l.layer = Some(self.index as u32);
        if let Mlp::MoeDone(moe, acts) = self.mlp {
            moe.lower_return(l, acts)?;
        }
        Ok(())
    }

    /// The end of combine(F): the sum over a token's experts, when they are back. Returns the layer's output.
    pub fn settle(&mut self, l: &mut Lowering) -> Result<Tensor> {
        l.layer = Some(self.index as u32);
        match self.mlp {
            Mlp::DenseDone(_, acts) => Ok(acts.out),
            Mlp::MoeDone(moe, acts) => {
                moe.lower_combine(l, acts)?;
                Ok(acts.out)
            }
            _ => Err(out_of_order("the end of a layer before mlp(F)")),
        }
    }

    /// The whole forward at once, with its scope.
    pub fn whole(l: &mut Lowering, entity: Entity, router: Option<Router>, x: Tensor) -> Result<(Self, Tensor)> {
        let mut layer = LayerForward::attention(l, entity, router, x)?;
        layer.dispatch(l, router)?;
        layer.mlp(l)?;
        layer.give_back(l)?;
        let out = layer.settle(l)?;
        layer.scope = l.take_scope();
        Ok((layer, out))
    }

    /// Whether its feed-forward half is spread over experts.
    pub fn is_moe(world: &World, entity: Entity) -> bool {
        world.entity(entity).contains::<Moe>()
    }
}

impl LayerBackward {
    /// Before the first chunk: the forward once more, if it is not kept.
    pub fn begin(l: &mut Lowering, forward: LayerForward, router: Option<Router>) -> Result<Self> {
        let mut layer = LayerBackward { forward, attention_grads: None, mlp_grads: None, scopes: Vec::new() };
        if l.recomputes_layers() {
            // Only what the walk holds so far is in its scope; the repeated forward gets one of its own.
            let before = l.take_scope();
            l.repeating = true;
            let (again, _) = LayerForward::whole(l, layer.forward.entity, router, layer.forward.x)?;
            l.repeating = false;
            layer.scopes.push(std::mem::replace(&mut layer.forward, again).scope);
            before.into_iter().for_each(|tensor| l.adopt(tensor));
        }
        Ok(layer)
    }

    /// combine(B): gradients of the experts' outputs, on their way to them.
    pub fn combine(&mut self, l: &mut Lowering, d_out: Tensor) -> Result<()> {
        l.layer = Some(self.forward.index as u32);
        if let Mlp::MoeDone(moe, acts) = self.forward.mlp {
            let (acts, grads) = moe.lower_combine_input_grad(l, acts, d_out)?;
            (self.forward.mlp, self.mlp_grads) = (Mlp::MoeDone(moe, acts), Some(MlpGrads::Experts(grads)));
        }
        Ok(())
    }

    /// mlp(B).
    pub fn mlp(&mut self, l: &mut Lowering, d_out: Tensor) -> Result<()> {
        l.layer = Some(self.forward.index as u32);
        match (self.forward.mlp, self.mlp_grads) {
            (Mlp::DenseDone(dense, acts), _) => {
                let (acts, grads) = dense.lower_input_grad(l, acts, d_out)?;
                (self.forward.mlp, self.mlp_grads) = (Mlp::DenseDone(dense, acts), Some(MlpGrads::Dense(grads)));
                Ok(())
            }
            (Mlp::MoeDone(moe, acts), Some(MlpGrads::Experts(grads))) => moe.lower_experts_input_grad(l, acts, grads),
            _ => Err(out_of_order("mlp(B) before combine(B)")),
        }
    }

    /// dispatch(B): gradients of the tokens, on their way back.
    pub fn dispatch(&mut self, l: &mut Lowering) -> Result<()> {
        l.layer = Some(self.forward.index as u32);
        if let (Mlp::MoeDone(moe, acts), Some(MlpGrads::Experts(grads))) = (self.forward.mlp, self.mlp_grads) {
            moe.lower_return_grad(l, acts, grads)?;
        }
        Ok(())
    }

    /// attn(B): router and attention. Returns the gradient of the layer's input.
    pub fn attention(&mut self, l: &mut Lowering, router: Option<Router>) -> Result<Tensor> {
        l.layer = Some(self.forward.index as u32);
        let dh = match (self.forward.mlp, self.mlp_grads, router) {
            (_, Some(MlpGrads::Dense(grads)), _) => grads.dx,
            (Mlp::MoeDone(moe, acts), Some(MlpGrads::Experts(grads)), Some(router)) => {
                let route = moe.lower_route_input_grad(l, router, acts.route, grads.for_route())?;
                self.mlp_grads = Some(MlpGrads::Moe(grads, route));
                route.dx
            }
            _ => return Err(out_of_order("attn(B) before mlp(B)")),
        };
        let (attention, grads, dx) = match self.forward.attention {
            Attention::Mla(mla, acts) => {
                let (acts, grads) = mla.lower_input_grad(l, acts, dh)?;
                (Attention::Mla(mla, acts), AttentionGrads::Mla(grads), grads.dx)
            }
            Attention::Gqa(gqa, acts) => {
                let (acts, grads) = gqa.lower_input_grad(l, acts, dh)?;
                (Attention::Gqa(gqa, acts), AttentionGrads::Gqa(grads), grads.dx)
            }
        };
        (self.forward.attention, self.attention_grads) = (attention, Some(grads));
        Ok(dx)
    }

    /// mlp(W).
    pub fn mlp_weights(&self, l: &mut Lowering) -> Result<()> {
        l.layer = Some(self.forward.index as u32);
        match (self.forward.mlp, self.mlp_grads) {
            (Mlp::DenseDone(dense, acts), Some(MlpGrads::Dense(grads))) => dense.lower_weight_grad(l, acts, grads),
            (Mlp::MoeDone(moe, acts), Some(MlpGrads::Experts(grads) | MlpGrads::Moe(grads, _))) => {
                moe.lower_experts_weight_grad(l, acts, grads)
            }
            _ => Err(out_of_order("mlp(W) before mlp(B)")),
        }
    }

    /// attn(W): router and attention. The layer's last chunk.
    pub fn attention_weights(&self, l: &mut Lowering, router: Option<Router>) -> Result<()> {
        l.layer = Some(self.forward.index as u32);
        if let (Mlp::MoeDone(moe, acts), Some(MlpGrads::Moe(_, route)), Some(router)) =
            (self.forward.mlp, self.mlp_grads, router)
        {
            moe.lower_route_weight_grad(l, router, acts.route, route)?;
        }
        match (self.forward.attention, self.attention_grads) {
            (Attention::Mla(mla, acts), Some(AttentionGrads::Mla(grads))) => mla.lower_weight_grad(l, acts, grads),
            (Attention::Gqa(gqa, acts), Some(AttentionGrads::Gqa(grads))) => gqa.lower_weight_grad(l, acts, grads),
            _ => Err(out_of_order("attn(W) before attn(B)")),
        }
    }

    /// Takes over what the walk allocated since the layer before.
    pub fn own(&mut self, scope: Vec<Tensor>) {
        self.scopes.push(scope);
    }

    /// Gives all of the layer's memory back, except `keep`.
    pub fn release(self, l: &mut Lowering, keep: Option<Tensor>) {
        l.release_scope(self.into_scope(), keep);
    }

    /// All of the layer's memory.
    pub fn into_scope(self) -> Vec<Tensor> {
        std::iter::once(self.forward.scope).chain(self.scopes).flatten().collect()
    }
}
