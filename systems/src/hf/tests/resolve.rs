//! What configurations mean, and what is said about those that mean nothing.
use super::{TINY, changed};
use crate::hf::config::{ConfigDocument, HfConfig};
use crate::model_config::{Attention, GroupScore, ModelConfig, ModelType, Moe, Rope, ScoringFunc, Yarn};
use crate::problem::Problem;
use serde_json::json;

/// config.json of DeepSeek-V3, in the order and with the values of the hub.
const DEEPSEEK_V3: &str = r#"{
  "architectures": ["DeepseekV3ForCausalLM"], "attention_bias": false, "attention_dropout": 0.0,
  "auto_map": {"AutoConfig": "configuration_deepseek.DeepseekV3Config"}, "aux_loss_alpha": 0.001, "bos_token_id": 0,
  "eos_token_id": 1, "ep_size": 1, "first_k_dense_replace": 3, "hidden_act": "silu", "hidden_size": 7168,
  "initializer_range": 0.02, "intermediate_size": 18432, "kv_lora_rank": 512, "max_position_embeddings": 163840,
  "model_type": "deepseek_v3", "moe_intermediate_size": 2048, "moe_layer_freq": 1, "n_group": 8,
  "n_routed_experts": 256, "n_shared_experts": 1, "norm_topk_prob": true, "num_attention_heads": 128,
  "num_experts_per_tok": 8, "num_hidden_layers": 61, "num_key_value_heads": 128, "num_nextn_predict_layers": 1,
  "pretraining_tp": 1, "q_lora_rank": 1536, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64,
  "quantization_config": {"activation_scheme": "dynamic", "fmt": "e4m3", "quant_method": "fp8",
                          "weight_block_size": [128, 128]},
  "rms_norm_eps": 1e-06,
  "rope_scaling": {"beta_fast": 32, "beta_slow": 1, "factor": 40, "mscale": 1.0, "mscale_all_dim": 1.0,
                   "original_max_position_embeddings": 4096, "type": "yarn"},
  "rope_theta": 10000, "routed_scaling_factor": 2.5, "scoring_func": "sigmoid", "seq_aux": true,
  "tie_word_embeddings": false, "topk_group": 4, "topk_method": "noaux_tc", "torch_dtype": "bfloat16",
  "transformers_version": "4.33.1", "use_cache": true, "v_head_dim": 128, "vocab_size": 129280
}"#;

const QWEN2: &str = r#"{"model_type": "qwen2", "vocab_size": 11, "hidden_size": 40, "intermediate_size": 48,
  "num_hidden_layers": 2, "num_attention_heads": 5, "num_key_value_heads": 1}"#;

fn resolve(text: &str) -> Result<ModelConfig, Vec<Problem>> {
    ConfigDocument::parse(text)?.config().resolve()
}

#[test]
fn deepseek_v3() {
    let expected = ModelConfig {
        model_type: ModelType::DeepseekV3,
        vocab_size: 129280,
        hidden_size: 7168,
        intermediate_size: 18432,
        num_hidden_layers: 61,
        num_attention_heads: 128,
        max_position_embeddings: 163840,
        attention: Attention::Mla {
            q_lora_rank: Some(1536),
            kv_lora_rank: 512,
            qk_nope_head_dim: 128,
            qk_rope_head_dim: 64,
            v_head_dim: 128,
        },
        moe: Some(Moe {
            n_routed_experts: 256,
            n_shared_experts: 1,
            num_experts_per_tok: 8,
            moe_intermediate_size: 2048,
            first_k_dense_replace: 3,
            scoring_func: ScoringFunc::Sigmoid,
            correction_bias: true,
            n_group: 8,
            topk_group: 4,
            group_score: GroupScore::Top2Sum,
            norm_topk_prob: true,
            routed_scaling_factor: 2.5,
        }),
        rope: Rope {
            theta: 10000.0,
            interleave: true,
            yarn: Some(Yarn {
                factor: 40.0,
                original_max_position_embeddings: 4096,
                beta_fast: 32.0,
                beta_slow: 1.0,
                mscale: Some(1.0),
                mscale_all_dim: Some(1.0),
            }),
        },
        rms_norm_eps: 1e-6,
        tie_word_embeddings: false,
        num_nextn_predict_layers: 1,
        initializer_range: 0.02,
    };
    assert_eq!(resolve(DEEPSEEK_V3).unwrap(), expected);
}

#[test]
fn families_have_the_defaults_of_transformers() {
    let v3 = changed(TINY, &json!({"n_routed_experts": 16, "n_group": null, "topk_group": null}));
    let v2 = changed(&v3, &json!({"model_type": "deepseek_v2"}));
    let moe = |text: &str| resolve(text).unwrap().moe.unwrap();

    let found = moe(&v3);
    assert_eq!((found.scoring_func, found.correction_bias), (ScoringFunc::Sigmoid, true));
    assert_eq!((found.n_group, found.topk_group, found.group_score), (8, 4, GroupScore::Top2Sum));
    assert_eq!((found.norm_topk_prob, found.routed_scaling_factor), (true, 2.5));

    let found = moe(&v2);
    assert_eq!((found.scoring_func, found.correction_bias), (ScoringFunc::Softmax, false));
    assert_eq!((found.n_group, found.topk_group, found.group_score), (1, 1, GroupScore::Max));
    assert_eq!((found.norm_topk_prob, found.routed_scaling_factor), (false, 1.0));

    let found = resolve(QWEN2).unwrap();
    assert_eq!(found.attention, Attention::Gqa { num_key_value_heads: 1, head_dim: 8, attention_bias: true });
    assert_eq!(found.rope, Rope { theta: 10000.0, interleave: false, yarn: None });
    assert_eq!((found.max_position_embeddings, found.rms_norm_eps, found.moe), (32768, 1e-6, None));
    assert_eq!(resolve(&v3).unwrap().max_position_embeddings, 4096);
    assert_eq!(resolve(&v2).unwrap().max_position_embeddings, 2048);
    assert!(resolve(&v2).unwrap().rope.interleave && resolve(&v3).unwrap().rope.interleave);
}

#[test]
fn both_ways_to_write_rope_mean_the_same() {
    let yarn = json!({"factor": 40, "original_max_position_embeddings": 64, "beta_fast": 32, "mscale": 0.707});
    let mut hub = yarn.clone();
    hub["type"] = "yarn".into();
    let mut new = yarn;
    new["rope_type"] = "yarn".into();
    new["rope_theta"] = 50000.0.into();
    let hub = resolve(&changed(TINY, &json!({"rope_theta": 50000, "rope_scaling": hub}))).unwrap();
    let both = resolve(&changed(TINY, &json!({"rope_theta": 50000, "rope_parameters": new}))).unwrap();
    let new = resolve(&changed(TINY, &json!({"rope_parameters": new}))).unwrap();
    assert_eq!((&hub.rope, &hub.rope), (&new.rope, &both.rope));
    assert_eq!(hub.rope.theta, 50000.0);
    let yarn = hub.rope.yarn.unwrap();
    assert_eq!((yarn.beta_slow, yarn.mscale, yarn.mscale_all_dim), (1.0, Some(0.707), None));
}

#[test]
fn keys_of_a_model_mean_that_model() {
    let v2 = json!({"model_type": "deepseek_v2", "topk_method": "group_limited_greedy"});
    let yarn = json!({"type": "yarn", "factor": 4, "original_max_position_embeddings": 64});
    for text in [
        DEEPSEEK_V3.to_string(),
        TINY.to_string(),
        QWEN2.to_string(),
        changed(TINY, &v2),
        changed(TINY, &json!({"topk_method": "greedy", "n_group": 1, "scoring_func": "softmax"})),
        changed(TINY, &json!({"first_k_dense_replace": 2, "num_nextn_predict_layers": 0})),
        changed(TINY, &json!({"q_lora_rank": 3, "rope_interleave": false, "tie_word_embeddings": true})),
        changed(QWEN2, &json!({"head_dim": 16, "rope_scaling": yarn})),
    ] {
        let model = resolve(&text).unwrap();
        let keys = HfConfig::from_model(&model);
        assert_eq!(keys.resolve().unwrap(), model, "{text}");
        let document = ConfigDocument::from_config(keys).unwrap();
        assert_eq!(resolve(document.text()).unwrap(), model, "{}", document.text());
    }
}

/// A change to a good config, and words of the one problem it causes.
#[test]
fn each_mistake_is_named_with_what_to_do() {
    #[rustfmt::skip]
    let v3 = [
        (json!({"model_type": "deepseek_v33"}), "model_type", "deepseek_v33", "did you mean `deepseek_v3`"),
        (json!({"model_type": null}), "model_type", "required", "deepseek_v2"),
        (json!({"vocab_size": null}), "vocab_size", "required", "from 1"),
        (json!({"hidden_size": 0}), "hidden_size", "found 0", "nearest is 1"),
        (json!({"kv_lora_rank": 1_000_000_000_000_u64}), "kv_lora_rank", "found 1000000000000", "nearest is 262144"),
        (json!({"qk_rope_head_dim": 3}), "qk_rope_head_dim", "even", "2 and 4"),
        (json!({"num_key_value_heads": 1}), "num_key_value_heads", "per query head", "only 2"),
        (json!({"head_dim": 7}), "head_dim", "not a width", "leave it out"),
        (json!({"attention_bias": true}), "attention_bias", "no bias", "only false"),
        (json!({"attention_dropout": 0.1}), "attention_dropout", "0.1", "only 0.0"),
        (json!({"hidden_act": "gelu"}), "hidden_act", "gelu", "silu"),
        (json!({"n_group": 3}), "n_group", "3 does not divide n_routed_experts = 4", "2 and 4"),
        (json!({"n_group": 4, "topk_group": 2}), "n_group", "two best", "at most 2"),
        (json!({"topk_group": 3}), "topk_group", "more than n_group = 2", "at most 2"),
        (json!({"num_experts_per_tok": 3}), "num_experts_per_tok", "more than the 2 experts", "topk_group = 2"),
        (json!({"num_experts_per_tok": 5}), "num_experts_per_tok", "more than the 2 experts", "at most 2"),
        (json!({"first_k_dense_replace": 3}), "first_k_dense_replace", "found 3", "nearest is 2"),
        (json!({"moe_layer_freq": 2}), "moe_layer_freq", "2", "only 1"),
        (json!({"topk_method": "noaux"}), "topk_method", "noaux", "did you mean `noaux_tc`"),
        (json!({"topk_method": "greedy"}), "topk_method", "does not limit groups", "group_limited_greedy"),
        (json!({"scoring_func": "tanh"}), "scoring_func", "tanh", "`sigmoid`, `softmax`"),
        (json!({"n_shared_experts": null}), "n_shared_experts", "required", "from 0"),
        (json!({"routed_scaling_factor": 0}), "routed_scaling_factor", "above 0", ""),
        (json!({"rms_norm_eps": -1e-6}), "rms_norm_eps", "at least 0", ""),
        (json!({"rope_theta": 0}), "rope_theta", "above 1", ""),
        (json!({"rope_scaling": {"type": "linear", "factor": 2}}), "rope_scaling.rope_type", "linear", "`yarn`"),
        (json!({"rope_scaling": {"type": "yarn", "factor": 2}}), "rope_scaling.original_max_position_embeddings", "required", ""),
        (json!({"rope_scaling": {"type": "yarn", "factor": 2, "original_max_position_embeddings": 64, "attention_factor": 1}}),
            "rope_scaling.attention_factor", "unsupported", "mscale"),
        (json!({"rope_theta": 2, "rope_parameters": {"rope_theta": 3}}), "rope_parameters.rope_theta", "contradicts", "keep one"),
        (json!({"rope_parameters": {"factor": 2}}), "rope_parameters.factor", "no effect", "yarn"),
        (json!({"quantization_config": {"quant_method": "awq"}}), "quantization_config.quant_method", "awq", "FP8"),
        (json!({"model_type": "deepseek_v2", "norm_topk_prob": true, "routed_scaling_factor": 16, "topk_group": 2}),
            "norm_topk_prob", "disagree", "deepseek_v3"),
        (json!({"model_type": "deepseek_v2", "rope_interleave": false, "topk_group": 2}), "rope_interleave", "deepseek_v2", "only true"),
    ];
    #[rustfmt::skip]
    let qwen2 = [
        (json!({"num_attention_heads": 4, "num_key_value_heads": 3}), "num_key_value_heads", "3 does not divide", "2 and 4"),
        (json!({"num_attention_heads": 3}), "head_dim", "3 does not divide hidden_size = 40", "say head_dim"),
        (json!({"hidden_size": 35}), "head_dim", "even", "6 and 8"),
        (json!({"use_sliding_window": true}), "use_sliding_window", "full", "only false"),
        (json!({"layer_types": ["full_attention", "sliding_attention"]}), "layer_types", "sliding_attention", "full_attention"),
        (json!({"n_routed_experts": 8}), "n_routed_experts", "no meaning", "deepseek_v3"),
        (json!({"attention_bias": false}), "attention_bias", "always", "only true"),
    ];
    let cases = v3.into_iter().map(|case| (TINY, case)).chain(qwen2.into_iter().map(|case| (QWEN2, case)));
    for (base, (change, path, message, help)) in cases {
        let problems = resolve(&changed(base, &change)).expect_err(&change.to_string());
        let [problem] = &problems[..] else { panic!("{change}: {problems:#?}") };
        assert_eq!(problem.path, path, "{change}");
        assert!(problem.message.contains(message), "{change}: {}", problem.message);
        let found = problem.help.as_deref().unwrap();
        assert!(found.contains(help) && !found.is_empty(), "{change}: {found}");
    }
}

#[test]
fn an_absent_query_rank_is_not_guessed() {
    let text = TINY.replace(r#""q_lora_rank": null, "#, "");
    let problems = resolve(&text).unwrap_err();
    assert_eq!(problems.len(), 1);
    assert_eq!((problems[0].path.as_str(), problems[0].help.as_ref().unwrap().contains("null")), ("q_lora_rank", true));
}

#[test]
fn all_problems_come_at_once() {
    let problems = HfConfig { model_type: Some("deepseek_v3".into()), ..HfConfig::default() }.resolve().unwrap_err();
    let paths: Vec<&str> = problems.iter().map(|p| p.path.as_str()).collect();
    let expected = [
        "vocab_size",
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "q_lora_rank",
        "kv_lora_rank",
        "qk_nope_head_dim",
        "qk_rope_head_dim",
        "v_head_dim",
        "first_k_dense_replace",
        "moe_intermediate_size",
        "n_routed_experts",
        "n_shared_experts",
        "num_experts_per_tok",
    ];
    assert_eq!(paths, expected);
}
