//! A model configuration with the keys of Hugging Face's config.json; a scene's `model` section has the same keys.
use serde::{Deserialize, Serialize};

/// Flat configuration; every key optional so that checks can name what is missing.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct HfConfig {
    /// `deepseek_v3`, `deepseek_v2` or `qwen2`.
    pub model_type: Option<String>,
    /// Rows of the embedding.
    pub vocab_size: Option<usize>,
}
