//! What a model asks for by itself, before any layout: operations and cache bytes of a token.

use crate::{
    model_config::{Attention, ModelConfig},
    params::{ParamKind, num_activated_params, param_specs},
};

/// Bytes of a cached number: bf16, as engines keep it.
const CACHE_BYTES: u64 = 2;

/// Operations of forward and backward for each trained token: 6 for each parameter that a token is multiplied by (the embedding is
/// looked up), and 3 times the forward's core attention, causal, over whole sequences. The convention of the tables in
/// arXiv 2505.09343; MTP modules and recomputation are not in it.
pub fn flops_per_token(config: &ModelConfig, seq_len: usize) -> f64 {
    let main = config.without_mtp();
    let looked_up: usize = param_specs(&main)
        .iter()
        .filter(|spec| spec.kind == ParamKind::Embedding && !config.tie_word_embeddings)
        .map(|spec| spec.num_elements())
        .sum();
    let multiplied = num_activated_params(&main) as f64 - looked_up as f64;
    let (heads, widths) = match config.attention {
        Attention::Mla { qk_nope_head_dim, qk_rope_head_dim, v_head_dim, .. } => {
            (config.num_attention_heads, qk_nope_head_dim + qk_rope_head_dim + v_head_dim)
        }
        Attention::Gqa { head_dim, .. } => (config.num_attention_heads, 2 * head_dim),
    };
    let core = (2 * heads * widths * seq_len / 2 * config.num_hidden_layers) as f64;
    6.0 * multiplied + 3.0 * core
}

/// Bytes that a token leaves in the cache over all layers, in bf16.
pub fn kv_bytes_per_token(config: &ModelConfig) -> u64 {
    let numbers = match config.attention {
        Attention::Mla { kv_lora_rank, qk_rope_head_dim, .. } => kv_lora_rank + qk_rope_head_dim,
        Attention::Gqa { num_key_value_heads, head_dim, .. } => 2 * num_key_value_heads * head_dim,
    };
    (numbers * config.num_hidden_layers) as u64 * CACHE_BYTES
}
