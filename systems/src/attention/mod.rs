//! Attention kinds: latent ([`Mla`]) and grouped-query ([`Gqa`]), and the rotary embedding they share.

pub mod gqa;
pub mod mla;

use bevy_ecs::prelude::*;
use kernels::{
    cost::Cost,
    dtype::DType,
    memory::Memory,
    ops::{
        attention,
        rope::{Pairs, Rope, RopeTable, Yarn},
    },
};

pub use gqa::Gqa;
pub use mla::{Mla, MlaQuery};

use crate::{
    microbatch::Inputs,
    model_config::{Attention, ModelConfig},
};

/// Sizes of a layer's attention.
#[derive(Clone, Copy, Debug)]
pub struct AttentionSizes {
    /// Query heads.
    pub heads: usize,
    /// Key and value heads.
    pub kv_heads: usize,
    /// Width of a query or key head.
    pub qk: usize,
    /// Columns of a query or key head before its rotary part.
    pub nope: usize,
    /// Width of a value head.
    pub v: usize,
    /// Factor on the scores.
    pub scale: f64,
}

impl AttentionSizes {
    /// Sizes of `config`'s attention.
    pub fn new(config: &ModelConfig) -> Self {
        let heads = config.num_attention_heads;
        match config.attention {
            Attention::Mla { qk_nope_head_dim: nope, qk_rope_head_dim, v_head_dim: v, .. } => {
                let qk = nope + qk_rope_head_dim;
                AttentionSizes { heads, kv_heads: heads, qk, nope, v, scale: rope(config).softmax_scale(qk) }
            }
            Attention::Gqa { num_key_value_heads, head_dim, .. } => AttentionSizes {
                heads,
                kv_heads: num_key_value_heads,
                qk: head_dim,
                nope: 0,
                v: head_dim,
                scale: (head_dim as f64).powf(-0.5),
            },
        }
    }
}

impl AttentionSizes {
    /// Cost of the core (scores, softmax, values), if each sequence were one document: what packing makes less.
    pub fn core_cost(&self, inputs: &Inputs, dtype: DType) -> Cost {
        attention::cost(inputs.num_tokens(), pairs(inputs), self.dims(), dtype.size_bytes())
    }

    /// The same for the input gradient.
    pub fn core_input_grad_cost(&self, inputs: &Inputs, dtype: DType) -> Cost {
        attention::input_grad_cost(inputs.num_tokens(), pairs(inputs), self.dims(), dtype.size_bytes())
    }

    fn dims(&self) -> [usize; 4] {
        [self.heads, self.kv_heads, self.qk, self.v]
    }
}

/// Pairs of query and key.
fn pairs(inputs: &Inputs) -> u64 {
    (inputs.num_tokens() / inputs.seq_len) as u64 * attention::causal_pairs(inputs.seq_len as u64)
}

/// Cosines and sines of a model's positions.
#[derive(Resource, Clone, Copy, Debug)]
pub struct Rotary(pub RopeTable);

impl Rotary {
    /// Tables for `max_positions` positions of `config`'s rotary part.
    pub fn new(config: &ModelConfig, memory: &Memory, compute: DType, max_positions: usize) -> Self {
        let pairs = if config.rope.interleave { Pairs::Interleaved } else { Pairs::HalfSplit };
        Rotary(rope(config).table(memory, compute, max_positions, pairs))
    }
}

fn rope(config: &ModelConfig) -> Rope {
    let yarn = config.rope.yarn.as_ref().map(|y| Yarn {
        factor: y.factor,
        original_max_position_embeddings: y.original_max_position_embeddings,
        beta_fast: y.beta_fast,
        beta_slow: y.beta_slow,
        mscale: y.mscale,
        mscale_all_dim: y.mscale_all_dim,
    });
    let dim = match config.attention {
        Attention::Mla { qk_rope_head_dim, .. } => qk_rope_head_dim,
        Attention::Gqa { head_dim, .. } => head_dim,
    };
    Rope { theta: config.rope.theta, dim, yarn }
}
