//! Token embedding: the first tasks of the first stage, and the last of its backward pass.

use bevy_ecs::prelude::*;
use engine::prelude::*;
use kernels::{ops::embedding, tensor::Tensor};

use crate::{lower::Lowering, model::Weight};

/// F of the embedding.
pub const EMBED_F: TaskKind = TaskKind("embed_forward");
/// W of the embedding.
pub const EMBED_W: TaskKind = TaskKind("embed_weight_grad");

#[derive(Component, Clone, Copy)]
pub(crate) struct EmbedTask {
    weight: Weight,
    tokens: Tensor,
    /// Output of F, its gradient for W.
    x: Tensor,
}

/// Emits F: `tokens` \[t\] -> [t, d].
pub fn lower_forward(l: &mut Lowering, weight: Weight, tokens: Tensor) -> Result<Tensor> {
    let x = l.alloc("embedding", &[tokens.len(), weight.value.dim(1)]);
    l.task(EMBED_F, Pass::Forward, EmbedTask { weight, tokens, x })?;
    Ok(x)
}

/// Emits W from the gradient `dx` [t, d].
pub fn lower_weight_grad(l: &mut Lowering, weight: Weight, tokens: Tensor, dx: Tensor) -> Result<()> {
    l.task(EMBED_W, Pass::WeightGrad, EmbedTask { weight, tokens, x: dx })
}

pub(crate) fn embed_forward(In(id): In<Entity>, mut launch: Launch<EmbedTask>) -> Result {
    let (_, &task, s) = launch.get(id)?;
    Ok(embedding::forward(s, task.tokens, task.weight.value, task.x)?)
}

pub(crate) fn embed_weight_grad(In(id): In<Entity>, mut launch: Launch<EmbedTask>) -> Result {
    let (_, &task, s) = launch.get(id)?;
    if let Some(dw) = task.weight.grad {
        embedding::weight_grad(s, task.tokens, task.x, dw)?;
    }
    Ok(())
}
