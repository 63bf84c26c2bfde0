//! A model as a composition of parts (attention, feed-forward, rope, prediction depth), so that a family is a
//! combination and not a class. Field names are those of the Hugging Face configs; `hf::config` reads and writes them.

/// The Hugging Face `model_type` a checkpoint is written as.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ModelType {
    /// DeepSeek-V3, R1, Moonlight, Kimi-K2.
    DeepseekV3,
    /// DeepSeek-V2 and V2-Lite.
    DeepseekV2,
    /// Dense Qwen2 (grouped-query attention with q/k/v bias).
    Qwen2,
}

/// Everything that fixes the shapes and formulas of a model.
#[derive(Clone, Debug, PartialEq)]
pub struct ModelConfig {
    /// Family, for reading and writing.
    pub model_type: ModelType,
    /// Rows of the embedding.
    pub vocab_size: usize,
    /// Width of the residual stream.
    pub hidden_size: usize,
    /// Width of a dense layer's SwiGLU.
    pub intermediate_size: usize,
    /// Decoder layers, MTP modules not counted.
    pub num_hidden_layers: usize,
    /// Query heads.
    pub num_attention_heads: usize,
    /// Longest context the positions are made for, in tokens.
    pub max_position_embeddings: usize,
    /// Attention kind.
    pub attention: Attention,
    /// Mixture-of-experts layers; `None` for a dense model.
    pub moe: Option<Moe>,
    /// Rotary embedding.
    pub rope: Rope,
    /// Epsilon of every RMSNorm.
    pub rms_norm_eps: f64,
    /// The head is the embedding.
    pub tie_word_embeddings: bool,
    /// MTP modules (0 or more).
    pub num_nextn_predict_layers: usize,
    /// Standard deviation of the initial weights.
    pub initializer_range: f64,
}

/// Attention kind and its sizes.
#[derive(Clone, Debug, PartialEq)]
pub enum Attention {
    /// Multi-head latent attention (DeepSeek-V2 report, section 2.1).
    Mla {
        /// Query latent width; `None` projects queries directly.
        q_lora_rank: Option<usize>,
        /// Key/value latent width.
        kv_lora_rank: usize,
        /// Per-head width without position.
        qk_nope_head_dim: usize,
        /// Per-head rotary width; its key is shared by all heads.
        qk_rope_head_dim: usize,
        /// Per-head value width.
        v_head_dim: usize,
    },
    /// Grouped-query attention.
    Gqa {
        /// Key/value heads; divides `num_attention_heads`.
        num_key_value_heads: usize,
        /// Per-head width.
        head_dim: usize,
        /// Biases on q, k and v.
        attention_bias: bool,
    },
}

/// How a router turns logits into scores.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ScoringFunc {
    /// DeepSeek-V3.
    Sigmoid,
    /// DeepSeek-V2.
    Softmax,
}

/// How a group of experts is scored before the groups are limited.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum GroupScore {
    /// Sum of the two best corrected scores (V3, `noaux_tc`).
    Top2Sum,
    /// Best score (V2, `group_limited_greedy`).
    Max,
}

/// Mixture-of-experts layers.
#[derive(Clone, Debug, PartialEq)]
pub struct Moe {
    /// Routed experts in a layer.
    pub n_routed_experts: usize,
    /// Shared experts; they form one SwiGLU of `n_shared_experts * moe_intermediate_size`.
    pub n_shared_experts: usize,
    /// Routed experts a token visits.
    pub num_experts_per_tok: usize,
    /// Width of one expert's SwiGLU.
    pub moe_intermediate_size: usize,
    /// Layers `0..first_k_dense_replace` are dense.
    pub first_k_dense_replace: usize,
    /// Logits to scores.
    pub scoring_func: ScoringFunc,
    /// The router adds `e_score_correction_bias` before it chooses.
    pub correction_bias: bool,
    /// Expert groups (nodes); 1 for no limit.
    pub n_group: usize,
    /// Groups a token may use.
    pub topk_group: usize,
    /// Score of a group.
    pub group_score: GroupScore,
    /// Normalize the chosen scores to sum 1.
    pub norm_topk_prob: bool,
    /// Factor on the routed weights.
    pub routed_scaling_factor: f64,
}

/// Rotary position embedding.
#[derive(Clone, Debug, PartialEq)]
pub struct Rope {
    /// Base frequency.
    pub theta: f64,
    /// Pairs are neighbours (2i, 2i+1), as DeepSeek stores them, and not halves (i, i + dim/2).
    pub interleave: bool,
    /// YaRN context extension.
    pub yarn: Option<Yarn>,
}

/// YaRN (arXiv 2309.00071) as the Hugging Face configs write it.
#[derive(Clone, Debug, PartialEq)]
pub struct Yarn {
    /// Context extension factor.
    pub factor: f64,
    /// Context length before the extension, in tokens.
    pub original_max_position_embeddings: usize,
    /// Rotations above which a dimension is left alone.
    pub beta_fast: f64,
    /// Rotations below which a dimension is interpolated.
    pub beta_slow: f64,
    /// Numerator of the cos/sin factor.
    pub mscale: Option<f64>,
    /// Denominator of the cos/sin factor, and squared in the softmax scale.
    pub mscale_all_dim: Option<f64>,
}

impl ModelConfig {
    /// The same without modules for multi-token prediction.
    #[must_use]
    pub fn without_mtp(&self) -> Self {
        ModelConfig { num_nextn_predict_layers: 0, ..self.clone() }
    }

    /// Whether decoder layer `layer` (MTP modules count on from `num_hidden_layers`) has routed experts.
    pub fn is_moe_layer(&self, layer: usize) -> bool {
        self.moe.as_ref().is_some_and(|moe| layer >= moe.first_k_dense_replace)
    }
}
