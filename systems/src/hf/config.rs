//! A model configuration with the keys of Hugging Face's config.json; a scene's `model` section has the same keys.
//!
//! Every key is optional, so that a check can name all that are missing. A scene refuses keys it does not know. A file
//! from the hub is full of keys that mean nothing here, so [`ConfigDocument`] leaves those out, lists them, and keeps the
//! text: what was read can be written back byte for byte. `resolve` (next file) gives the keys their meaning.

use crate::problem::Problem;
use serde::{Deserialize, Deserializer, Serialize, Serializer};
use serde_json::{Map, Value};

/// Defines [`HfConfig`] and the list of its keys from one list of fields.
macro_rules! config_keys {
    ($($(#[$attribute:meta])* $key:ident: $kind:ty,)*) => {
        /// Flat configuration. An absent key and a `null` (in RON: `None`) are the same, except for `q_lora_rank`.
        #[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
        #[serde(default, deny_unknown_fields)]
        pub struct HfConfig {
            $($(#[$attribute])* #[serde(skip_serializing_if = "Option::is_none")] pub $key: Option<$kind>,)*
        }

        impl HfConfig {
            /// Every key that means something here.
            pub const KEYS: &[&str] = &[$(stringify!($key)),*];
        }
    };
}

config_keys! {
    /// `deepseek_v3`, `deepseek_v2` or `qwen2`.
    model_type: String,
    /// Rows of the embedding.
    vocab_size: usize,
    /// Width of the residual stream.
    hidden_size: usize,
    /// Width of a dense layer's SwiGLU.
    intermediate_size: usize,
    /// Width of one expert's SwiGLU.
    moe_intermediate_size: usize,
    /// Decoder layers, MTP modules not counted.
    num_hidden_layers: usize,
    /// MTP modules; 0 where absent.
    num_nextn_predict_layers: usize,
    /// Query heads.
    num_attention_heads: usize,
    /// Key/value heads; as many as query heads where absent.
    num_key_value_heads: usize,
    /// Width of a head (`qwen2`); `hidden_size / num_attention_heads` where absent.
    head_dim: usize,
    /// Biases in attention: `deepseek_*` has none, `qwen2` has them on q, k and v.
    attention_bias: bool,
    /// Only 0.
    attention_dropout: f64,
    /// Only false.
    mlp_bias: bool,
    /// Query latent width, or `null` for direct queries. Required for `deepseek_*`: a file without the key would mean
    /// 1536 to transformers and direct queries to a reader who takes absent for `null`.
    #[serde(serialize_with = "write_present", deserialize_with = "read_present")]
    q_lora_rank: Option<usize>,
    /// Key/value latent width.
    kv_lora_rank: usize,
    /// Per-head width without position.
    qk_nope_head_dim: usize,
    /// Per-head rotary width.
    qk_rope_head_dim: usize,
    /// Per-head value width.
    v_head_dim: usize,
    /// Routed experts in a layer.
    n_routed_experts: usize,
    /// Shared experts; 0 for none.
    n_shared_experts: usize,
    /// Routed experts a token visits.
    num_experts_per_tok: usize,
    /// Layers below this one are dense.
    first_k_dense_replace: usize,
    /// Only 1: every layer from `first_k_dense_replace` on has experts.
    moe_layer_freq: usize,
    /// Expert groups.
    n_group: usize,
    /// Groups a token may use.
    topk_group: usize,
    /// `noaux_tc` (correction bias), `group_limited_greedy` or `greedy` (no groups).
    topk_method: String,
    /// `sigmoid` or `softmax`.
    scoring_func: String,
    /// Normalize the chosen scores to sum 1.
    norm_topk_prob: bool,
    /// Factor on the routed weights.
    routed_scaling_factor: f64,
    /// Weight of the sequence-wise balance loss; a training setting, kept for writing back.
    aux_loss_alpha: f64,
    /// Whether that loss is per sequence.
    seq_aux: bool,
    /// Expert-parallel size of the author's run; kept for writing back.
    ep_size: usize,
    /// Only `silu`.
    hidden_act: String,
    /// Longest context, in tokens.
    max_position_embeddings: usize,
    /// Base frequency of the rotary embedding.
    rope_theta: f64,
    /// Context extension, as on the hub.
    rope_scaling: RopeParameters,
    /// Base frequency and context extension, as transformers 5 writes them.
    rope_parameters: RopeParameters,
    /// Rotary pairs are neighbours (`deepseek_v3`).
    rope_interleave: bool,
    /// Only false.
    use_sliding_window: bool,
    /// Without meaning while `use_sliding_window` is false.
    sliding_window: usize,
    /// Without meaning while `use_sliding_window` is false.
    max_window_layers: usize,
    /// Only `full_attention` for every layer.
    layer_types: Vec<String>,
    /// Epsilon of every RMSNorm.
    rms_norm_eps: f64,
    /// Standard deviation of the initial weights.
    initializer_range: f64,
    /// The head is the embedding.
    tie_word_embeddings: bool,
    /// Token that begins a text.
    bos_token_id: TokenIds,
    /// Tokens that end a text.
    eos_token_id: TokenIds,
    /// Filler token.
    pad_token_id: TokenIds,
    /// Type of the stored weights; a note for readers, the files themselves say what they hold.
    torch_dtype: String,
    /// The same, as transformers 5 writes it.
    dtype: String,
    /// How FP8 weights are stored.
    quantization_config: QuantizationConfig,
}

/// The keys of `rope_scaling` and `rope_parameters`.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct RopeParameters {
    /// `default` or `yarn`, as the hub's older files say it.
    #[serde(rename = "type", skip_serializing_if = "Option::is_none")]
    pub kind: Option<String>,
    /// The same, as newer files say it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub rope_type: Option<String>,
    /// Base frequency.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub rope_theta: Option<f64>,
    /// Context extension factor.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub factor: Option<f64>,
    /// Context before the extension, in tokens.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub original_max_position_embeddings: Option<usize>,
    /// Rotations above which a dimension is left alone; 32 where absent.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub beta_fast: Option<f64>,
    /// Rotations below which a dimension is interpolated; 1 where absent.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub beta_slow: Option<f64>,
    /// Numerator of the cos/sin factor.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub mscale: Option<f64>,
    /// Denominator of the cos/sin factor.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub mscale_all_dim: Option<f64>,
    /// A cos/sin factor instead of the mscales: not supported.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub attention_factor: Option<f64>,
    /// Only true: the ramp's ends are whole dimensions.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub truncate: Option<bool>,
    /// Only 1.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub partial_rotary_factor: Option<f64>,
}

/// One token, or several.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(untagged)]
pub enum TokenIds {
    /// One token.
    One(u32),
    /// Several.
    Many(Vec<u32>),
}

impl TokenIds {
    /// The tokens.
    pub fn as_slice(&self) -> &[u32] {
        match self {
            TokenIds::One(id) => std::slice::from_ref(id),
            TokenIds::Many(ids) => ids,
        }
    }
}

/// How FP8 weights are stored; `weight_block_size` is the part a reader needs.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct QuantizationConfig {
    /// Only `fp8`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub quant_method: Option<String>,
    /// Only `e4m3`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub fmt: Option<String>,
    /// Rows and columns that share a factor; 128 x 128 where absent.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub weight_block_size: Option<[usize; 2]>,
    /// How activations were quantized; of no use to a reader of weights.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub activation_scheme: Option<String>,
}

fn read_present<'de, D: Deserializer<'de>>(d: D) -> Result<Option<Option<usize>>, D::Error> {
    Option::deserialize(d).map(Some)
}

fn write_present<S: Serializer>(value: &Option<Option<usize>>, s: S) -> Result<S::Ok, S::Error> {
    value.flatten().serialize(s)
}

/// A config.json: the keys that mean something here, and the whole document.
#[derive(Clone, Debug, PartialEq)]
pub struct ConfigDocument {
    config: HfConfig,
    document: Map<String, Value>,
    text: String,
}

impl ConfigDocument {
    /// Reads a config.json.
    ///
    /// # Errors
    /// One problem per key with a value of the wrong type; a single one if the text is not a JSON object.
    pub fn parse(text: &str) -> Result<Self, Vec<Problem>> {
        let document: Map<String, Value> =
            serde_json::from_str(text).map_err(|e| vec![Problem::new("", format!("expected a JSON object: {e}"))])?;
        // Key by key, so that every wrong one is named.
        let is_known = |key: &str| HfConfig::KEYS.contains(&key);
        let known = document.iter().filter(|(key, _)| is_known(key));
        let read = |fields: Map<String, Value>| serde_json::from_value::<HfConfig>(fields.into());
        let problems: Vec<Problem> = known
            .clone()
            .filter_map(|(key, value)| {
                let one = Map::from_iter([(key.clone(), value.clone())]);
                read(one).err().map(|e| Problem::new(key, e.to_string()))
            })
            .collect();
        if !problems.is_empty() {
            return Err(problems);
        }
        let config = read(known.map(|(k, v)| (k.clone(), v.clone())).collect())
            .map_err(|e| vec![Problem::new("", e.to_string())])?;
        Ok(ConfigDocument { config, document, text: text.to_string() })
    }

    /// The config.json of a model made here: its keys, the `architectures` and `use_cache` that transformers looks
    /// for, and nothing for keys that are absent.
    ///
    /// # Errors
    /// If a number is not finite, which JSON cannot say.
    pub fn from_config(config: HfConfig) -> Result<Self, serde_json::Error> {
        let architecture = match config.model_type.as_deref() {
            Some("deepseek_v3") => Some("DeepseekV3ForCausalLM"),
            Some("deepseek_v2") => Some("DeepseekV2ForCausalLM"),
            Some("qwen2") => Some("Qwen2ForCausalLM"),
            _ => None,
        };
        let mut document = Map::new();
        if let Some(name) = architecture {
            document.insert("architectures".into(), vec![name].into());
        }
        if let Value::Object(fields) = serde_json::to_value(&config)? {
            document.extend(fields);
        }
        document.insert("use_cache".into(), true.into());
        let mut this = ConfigDocument { config, document, text: String::new() };
        this.render()?;
        Ok(this)
    }

    /// The keys that mean something here.
    pub fn config(&self) -> &HfConfig {
        &self.config
    }

    /// The file's text; as it was read, unless [`ConfigDocument::storing`] changed a key.
    pub fn text(&self) -> &str {
        &self.text
    }

    /// Keys of the document that were left out, in its order.
    pub fn ignored_keys(&self) -> impl Iterator<Item = &str> {
        self.document.keys().map(String::as_str).filter(|key| !HfConfig::KEYS.contains(key))
    }

    /// The document for weights stored otherwise than before: in `dtype` (`float32`, ...) if given, and not quantized.
    /// Where nothing changes, the text stays as it is.
    ///
    /// # Errors
    /// As [`ConfigDocument::from_config`].
    pub fn storing(&self, dtype: Option<&str>) -> Result<Self, serde_json::Error> {
        let mut this = self.clone();
        let (document, config) = (&mut this.document, &mut this.config);
        // Not `Map::remove`, which would move the last key to the hole.
        document.shift_remove("quantization_config");
        config.quantization_config = None;
        if let Some(dtype) = dtype {
            if document.contains_key("dtype") {
                document.insert("dtype".into(), dtype.into());
                config.dtype = Some(dtype.into());
            }
            if document.contains_key("torch_dtype") || !document.contains_key("dtype") {
                document.insert("torch_dtype".into(), dtype.into());
                config.torch_dtype = Some(dtype.into());
            }
        }
        if this.document != self.document {
            this.render()?;
        }
        Ok(this)
    }

    /// The document for linear layers in FP8 with factors for 128 x 128 blocks.
    ///
    /// # Errors
    /// As [`ConfigDocument::from_config`].
    pub fn quantized(&self) -> Result<Self, serde_json::Error> {
        let mut this = self.clone();
        let quantization = QuantizationConfig {
            quant_method: Some("fp8".into()),
            fmt: Some("e4m3".into()),
            weight_block_size: Some(super::fp8::BLOCK),
            activation_scheme: Some("dynamic".into()),
        };
        this.document.insert("quantization_config".into(), serde_json::to_value(&quantization)?);
        this.config.quantization_config = Some(quantization);
        this.render()?;
        Ok(this)
    }

    fn render(&mut self) -> Result<(), serde_json::Error> {
        self.text = serde_json::to_string_pretty(&self.document)? + "\n";
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    #![expect(clippy::unwrap_used, reason = "tests")]
    use super::*;

    #[test]
    fn keys_of_no_meaning_are_listed_and_the_text_is_kept() {
        let text = r#"{ "model_type":"qwen2", "rms_norm_eps": 1e-06, "auto_map": {"a": [1]}, "vocab_size": 7 }"#;
        let document = ConfigDocument::parse(text).unwrap();
        assert_eq!(document.config().vocab_size, Some(7));
        assert_eq!(document.ignored_keys().collect::<Vec<_>>(), ["auto_map"]);
        assert_eq!(document.text(), text);
        assert_eq!(document.storing(None).unwrap().text(), text);
    }

    #[test]
    fn other_storage_changes_only_its_keys() {
        let text = r#"{"quantization_config": {"fmt": "e4m3"}, "z": 1, "torch_dtype": "bfloat16", "a": 2}"#;
        let stored = ConfigDocument::parse(text).unwrap().storing(Some("float32")).unwrap();
        assert_eq!(stored.text(), "{\n  \"z\": 1,\n  \"torch_dtype\": \"float32\",\n  \"a\": 2\n}\n");
        assert_eq!(ConfigDocument::parse(stored.text()).unwrap(), stored);
    }

    #[test]
    fn every_key_of_a_wrong_type_is_named() {
        let text = r#"{"hidden_size": "wide", "rope_scaling": {"typo": 1}, "vocab_size": -3, "n_group": 2}"#;
        let problems = ConfigDocument::parse(text).unwrap_err();
        let paths: Vec<&str> = problems.iter().map(|p| p.path.as_str()).collect();
        assert_eq!(paths, ["hidden_size", "rope_scaling", "vocab_size"]);
        assert!(problems[1].message.contains("typo"), "{}", problems[1].message);
        assert!(ConfigDocument::parse("[1").unwrap_err()[0].message.contains("JSON object"));
    }

    #[test]
    fn an_absent_query_rank_differs_from_null() {
        for (text, expected) in
            [("{}", None), (r#"{"q_lora_rank": null}"#, Some(None)), (r#"{"q_lora_rank": 20}"#, Some(Some(20)))]
        {
            let config = ConfigDocument::parse(text).unwrap().config().clone();
            assert_eq!(config.q_lora_rank, expected, "{text}");
            let again = ConfigDocument::from_config(config.clone()).unwrap();
            assert_eq!(*ConfigDocument::parse(again.text()).unwrap().config(), config, "{text}");
        }
    }

    /// Scenes are read with `implicit_some`.
    fn read_ron(text: &str) -> Result<HfConfig, String> {
        ron::Options::default()
            .with_default_extension(ron::extensions::Extensions::IMPLICIT_SOME)
            .from_str(text)
            .map_err(|e| e.to_string())
    }

    #[test]
    fn a_scene_section_has_the_same_keys_and_refuses_others() {
        let config = read_ron(
            r#"(model_type: "deepseek_v3", q_lora_rank: None, eos_token_id: [1, 2], bos_token_id: 0,
                rope_scaling: (type: "yarn", factor: 40, mscale: 1))"#,
        )
        .unwrap();
        assert_eq!(config.q_lora_rank, Some(None));
        assert_eq!(config.eos_token_id.as_ref().unwrap().as_slice(), [1, 2]);
        assert_eq!(config.bos_token_id.as_ref().unwrap().as_slice(), [0]);
        assert_eq!(config.rope_scaling.as_ref().unwrap().factor, Some(40.0));
        assert_eq!(read_ron("(q_lora_rank: 20)").unwrap().q_lora_rank, Some(Some(20)));
        assert_eq!(read_ron(&ron::to_string(&config).unwrap()).unwrap(), config);
        assert!(read_ron("(hiden_size: 8)").unwrap_err().contains("hiden_size"));
    }
}
