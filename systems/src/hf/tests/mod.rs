//! Tests of configurations and of whole folders.
#![expect(clippy::unwrap_used, reason = "tests")]

mod folders;
mod hostile;
mod resolve;

use super::config::ConfigDocument;
use safetensors::tensor::{Dtype, TensorView, serialize};
use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

/// A tensor as stored: type, shape, bytes.
type Stored = (Dtype, Vec<usize>, Vec<u8>);
/// Tensors by name.
type Tensors = BTreeMap<String, Stored>;

/// A small DeepSeek-V3 with one dense layer, one MoE layer, and an MTP module; its odd width makes alignment matter.
const TINY: &str = r#"{
  "auto_map": {"AutoConfig": "configuration_deepseek.DeepseekV3Config"},
  "model_type": "deepseek_v3", "vocab_size": 11, "hidden_size": 7, "intermediate_size": 5, "moe_intermediate_size": 3,
  "num_hidden_layers": 2, "num_attention_heads": 2, "q_lora_rank": null, "kv_lora_rank": 4, "qk_nope_head_dim": 3,
  "qk_rope_head_dim": 2, "v_head_dim": 3, "n_routed_experts": 4, "n_shared_experts": 2, "num_experts_per_tok": 2,
  "first_k_dense_replace": 1, "n_group": 2, "topk_group": 1, "num_nextn_predict_layers": 1, "rms_norm_eps": 1e-06,
  "torch_dtype": "bfloat16"
}"#;

/// A config with some keys replaced.
fn changed(text: &str, changes: &serde_json::Value) -> String {
    let mut document: serde_json::Map<String, serde_json::Value> = serde_json::from_str(text).unwrap();
    document.extend(changes.as_object().unwrap().clone());
    serde_json::to_string(&document).unwrap()
}

/// Writes tensors with the safetensors library.
fn save(path: &Path, tensors: &Tensors) {
    let views: BTreeMap<&String, TensorView> = tensors
        .iter()
        .map(|(name, (dtype, shape, bytes))| (name, TensorView::new(*dtype, shape.clone(), bytes).unwrap()))
        .collect();
    fs::write(path, serialize(views, None).unwrap()).unwrap();
}

/// Reads tensors with the safetensors library.
fn load(path: &Path) -> Tensors {
    let bytes = fs::read(path).unwrap();
    let file = safetensors::SafeTensors::deserialize(&bytes).unwrap();
    let stored = |view: TensorView| (view.dtype(), view.shape().to_vec(), view.data().to_vec());
    file.tensors().into_iter().map(|(name, view)| (name, stored(view))).collect()
}

/// Random finite values of a type, as bytes.
fn random_bytes(dtype: Dtype, num: usize, rng: &mut impl rand::Rng) -> Vec<u8> {
    let mut bytes = Vec::new();
    while bytes.len() < num * dtype.bitsize() / 8 {
        let bits = rng.next_u32();
        match dtype {
            Dtype::F32 if f32::from_bits(bits).is_finite() => bytes.extend(bits.to_le_bytes()),
            Dtype::BF16 if half::bf16::from_bits(bits as u16).is_finite() => bytes.extend((bits as u16).to_le_bytes()),
            Dtype::F16 if half::f16::from_bits(bits as u16).is_finite() => bytes.extend((bits as u16).to_le_bytes()),
            Dtype::F8_E4M3 if bits & 0x7f != 0x7f => bytes.push(bits as u8),
            _ => {}
        }
    }
    bytes
}

/// All tensors of a model with random weights: matrices in `dtype`, correction biases in f32, aliases not included.
fn random_tensors(config: &str, dtype: Dtype) -> Tensors {
    use rand::SeedableRng;
    let mut rng = rand_chacha::ChaCha8Rng::seed_from_u64(7);
    let model = ConfigDocument::parse(config).unwrap().config().resolve().unwrap();
    let mut tensors = Tensors::new();
    for view in crate::params::param_specs(&model).into_iter().flat_map(|spec| spec.views) {
        let is_bias = view.hf_name.ends_with("e_score_correction_bias");
        let dtype = if is_bias { Dtype::F32 } else { dtype };
        let bytes = random_bytes(dtype, view.num_elements(), &mut rng);
        tensors.insert(view.hf_name, (dtype, view.shape, bytes));
    }
    tensors
}

/// A folder with a config and one weight file.
fn folder(config: &str, tensors: &Tensors) -> tempfile::TempDir {
    let dir = tempfile::tempdir().unwrap();
    fs::write(dir.path().join("config.json"), config).unwrap();
    save(&dir.path().join("model.safetensors"), tensors);
    dir
}
