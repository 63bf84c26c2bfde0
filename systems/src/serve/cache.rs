//! What a model remembers of the tokens so far: of each layer rows of one tensor, shared by all requests, in pages.
//!
//! With latent attention a row is a latent and a rotated key (arXiv 2405.04434, section 2.1), in the type of activations or with the latent
//! in FP8 ([`kernels::ops::mla::fp8_row`]); else keys and values of the heads that have some.

use bevy_ecs::prelude::*;
use kernels::{
    dtype::DType,
    memory::Memory,
    ops::{
        attention::cached::KvCache,
        mla::{fp8_row::Fp8Row, latent::Prefill},
        paged::Sequences,
    },
    tensor::Tensor,
};

use crate::model_config::{Attention, ModelConfig};

/// What a cache is made of.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum CacheFormat {
    /// What the model computes in.
    #[default]
    Compute,
    /// Latents in 8 bits with a scale for each 128, and rotated keys in bf16: answers differ a little.
    Fp8,
}

impl CacheFormat {
    /// `Err` with a sentence if a model's cache cannot be made of this.
    ///
    /// # Errors
    /// If it is FP8, and the model has no latents.
    pub fn check(self, config: &ModelConfig) -> Result<(), String> {
        match (self, &config.attention) {
            (CacheFormat::Fp8, Attention::Gqa { num_key_value_heads, .. }) => Err(format!(
                "an FP8 cache is for models with latent attention; this one caches keys and values of {num_key_value_heads} heads: leave \
                 the cache in the format that the model computes in"
            )),
            _ => Ok(()),
        }
    }

    /// Type and elements of a row of latents.
    fn latent_row(self, compute: DType, c: usize, r: usize) -> (DType, usize) {
        match self {
            CacheFormat::Compute => (compute, c + r),
            CacheFormat::Fp8 => (DType::U8, Fp8Row { c, r }.bytes()),
        }
    }
}

/// What one layer remembers.
#[derive(Clone, Copy, Debug)]
pub enum LayerCache {
    /// Normed latents and rotated keys [rows, c + r], or the bytes of an [`Fp8Row`] each.
    Latent(Tensor),
    /// Keys and values of each head.
    Heads(KvCache),
}

/// Caches of all layers, those of MTP modules last.
#[derive(Resource, Clone, Debug)]
pub struct Caches(pub Vec<LayerCache>);

/// The sequences of the step at hand, and where they are in the caches; read at launch.
#[derive(Resource, Clone, Debug, Default)]
pub struct StepSequences {
    /// Each with its new tokens.
    pub all: Sequences,
    /// Which way latent attention takes through prompts.
    pub prefill: Prefill,
}

impl Caches {
    /// Room for `num_rows` tokens, in MTP modules too if there is something to predict.
    pub fn allocate(
        config: &ModelConfig,
        memory: &Memory,
        (compute, format): (DType, CacheFormat),
        num_rows: usize,
        mtp: bool,
    ) -> Self {
        let cache = |_| match config.attention {
            Attention::Mla { kv_lora_rank, qk_rope_head_dim, .. } => {
                let (dtype, width) = format.latent_row(compute, kv_lora_rank, qk_rope_head_dim);
                LayerCache::Latent(memory.alloc(dtype, &[num_rows, width]))
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
pub fn bytes_per_token(config: &ModelConfig, num_layers: usize, compute: DType, format: CacheFormat) -> u64 {
    let (dtype, width) = match config.attention {
        Attention::Mla { kv_lora_rank, qk_rope_head_dim, .. } => {
            format.latent_row(compute, kv_lora_rank, qk_rope_head_dim)
        }
        Attention::Gqa { num_key_value_heads, head_dim, .. } => (compute, 2 * num_key_value_heads * head_dim),
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

#[cfg(test)]
mod tests {
    #![expect(clippy::unwrap_used, reason = "tests")]
    use super::*;
    use crate::hf::config::HfConfig;

    fn config(json: &str) -> ModelConfig {
        serde_json::from_str::<HfConfig>(json).unwrap().resolve().unwrap()
    }

    /// DeepSeek-V3's shape: 512 + 64 numbers of 2 bytes in each of 61 layers.
    #[test]
    fn a_token_of_deepseek_v3_takes_70_272_bytes() {
        let v3 = config(
            r#"{"model_type": "deepseek_v3", "vocab_size": 129280, "hidden_size": 7168, "num_hidden_layers": 61,
            "num_attention_heads": 128, "q_lora_rank": 1536, "kv_lora_rank": 512, "qk_nope_head_dim": 128,
            "qk_rope_head_dim": 64, "v_head_dim": 128, "intermediate_size": 18432, "moe_intermediate_size": 2048,
            "n_routed_experts": 256, "n_shared_experts": 1, "num_experts_per_tok": 8, "first_k_dense_replace": 3,
            "n_group": 8, "topk_group": 4, "norm_topk_prob": true, "scoring_func": "sigmoid", "topk_method": "noaux_tc",
            "routed_scaling_factor": 2.5, "max_position_embeddings": 163840, "rms_norm_eps": 1e-6, "rope_theta": 10000.0}"#,
        );
        assert_eq!(bytes_per_token(&v3, 61, DType::Bf16, CacheFormat::Compute), 70_272);
        assert_eq!(bytes_per_token(&v3, 61, DType::Bf16, CacheFormat::Fp8), 61 * 656);
        assert_eq!(mha_bytes_per_token(&v3, 61, DType::Bf16), 61 * 128 * (128 + 64 + 128) * 2);
    }

    #[test]
    fn grouped_queries_keep_their_key_heads() {
        let qwen = config(
            r#"{"model_type": "qwen2", "vocab_size": 100, "hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 8,
            "num_key_value_heads": 2, "intermediate_size": 96, "max_position_embeddings": 128, "rms_norm_eps": 1e-6,
            "rope_theta": 1e4, "tie_word_embeddings": true}"#,
        );
        assert_eq!(bytes_per_token(&qwen, 3, DType::F32, CacheFormat::Compute), 3 * 2 * 2 * 8 * 4);
        assert_eq!(
            mha_bytes_per_token(&qwen, 3, DType::F32),
            4 * bytes_per_token(&qwen, 3, DType::F32, CacheFormat::Compute)
        );
    }
}
