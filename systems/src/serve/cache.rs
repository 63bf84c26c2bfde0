//! What a model remembers of the tokens so far: of each layer rows of one tensor, shared by all requests, in pages.
//!
//! With latent attention a row is a latent and a rotated key (arXiv 2405.04434, section 2.1); else keys and values of the heads
//! that have some.

use bevy_ecs::prelude::*;
use kernels::{
    dtype::DType,
    memory::Memory,
    ops::{attention::cached::KvCache, paged::Sequences},
    tensor::Tensor,
};

use crate::model_config::{Attention, ModelConfig};

/// What one layer remembers.
#[derive(Clone, Copy, Debug)]
pub enum LayerCache {
    /// Normed latents and rotated keys [rows, c + r].
    Latent(Tensor),
    /// Keys and values of each head.
    Heads(KvCache),
}

/// Caches of all layers, those of MTP modules last.
#[derive(Resource, Clone, Debug)]
pub struct Caches(pub Vec<LayerCache>);

/// The sequences of the step at hand, and where they are in the caches; read at launch.
#[derive(Resource, Clone, Debug, Default)]
pub struct StepSequences(pub Sequences);

impl Caches {
    /// Room for `num_rows` tokens, in MTP modules too if there is something to predict.
    pub fn allocate(config: &ModelConfig, memory: &Memory, compute: DType, num_rows: usize, mtp: bool) -> Self {
        let cache = |_| match config.attention {
            Attention::Mla { kv_lora_rank, qk_rope_head_dim, .. } => {
                LayerCache::Latent(memory.alloc(compute, &[num_rows, kv_lora_rank + qk_rope_head_dim]))
            }
            Attention::Gqa { num_key_value_heads: g, head_dim, .. } => LayerCache::Heads(KvCache {
                k: memory.alloc(compute, &[num_rows, g, head_dim]),
                v: memory.alloc(compute, &[num_rows, g, head_dim]),
            }),
        };
        let num_layers = config.num_hidden_layers + if mtp { config.num_nextn_predict_layers.min(1) } else { 0 };
        Caches((0..num_layers).map(cache).collect())
    }
}

/// Bytes of cache that a token takes in `num_layers` layers.
pub fn bytes_per_token(config: &ModelConfig, num_layers: usize, dtype: DType) -> u64 {
    let width = match config.attention {
        Attention::Mla { kv_lora_rank, qk_rope_head_dim, .. } => kv_lora_rank + qk_rope_head_dim,
        Attention::Gqa { num_key_value_heads, head_dim, .. } => 2 * num_key_value_heads * head_dim,
    };
    (width * num_layers * dtype.size_bytes()) as u64
}

/// The same if each head kept keys and values of its own, as plain multi-head attention does.
pub fn mha_bytes_per_token(config: &ModelConfig, num_layers: usize, dtype: DType) -> u64 {
    let heads = config.num_attention_heads;
    let width = match config.attention {
        Attention::Mla { qk_nope_head_dim, qk_rope_head_dim, v_head_dim, .. } => {
            heads * (qk_nope_head_dim + qk_rope_head_dim + v_head_dim)
        }
        Attention::Gqa { head_dim, .. } => 2 * heads * head_dim,
    };
    (width * num_layers * dtype.size_bytes()) as u64
}
