//! The meaning of a configuration: flat keys to a composed [`ModelConfig`] and back.
//!
//! Keys that are absent take the defaults of transformers' class for the family, except sizes, which must be said, and
//! values that other readers would understand differently, which are refused. All findings come at once.

use super::check::{Check, nearest_divisors};
use super::config::{HfConfig, RopeParameters};
use crate::model_config::{Attention, GroupScore, ModelConfig, ModelType, Moe, Rope, ScoringFunc, Yarn};
use crate::problem::Problem;

/// Bounds of sizes, far above any model: with them no product of sizes overflows 64 bits.
const MAX_WIDTH: usize = 1 << 18;
const MAX_TOKENS: usize = 1 << 31;
const MAX_LAYERS: usize = 1 << 12;
const MAX_EXPERTS: usize = 1 << 14;
const MAX_HEADS: usize = 1 << 12;

const FAMILIES: [(&str, ModelType); 3] =
    [("deepseek_v3", ModelType::DeepseekV3), ("deepseek_v2", ModelType::DeepseekV2), ("qwen2", ModelType::Qwen2)];
const SCORING: [(&str, ScoringFunc); 2] = [("sigmoid", ScoringFunc::Sigmoid), ("softmax", ScoringFunc::Softmax)];

/// How experts are chosen: `topk_method`.
#[derive(Clone, Copy, PartialEq)]
enum TopkMethod {
    NoauxTc,
    GroupLimitedGreedy,
    Greedy,
}

const TOPK_METHODS: [(&str, TopkMethod); 3] = [
    ("noaux_tc", TopkMethod::NoauxTc),
    ("group_limited_greedy", TopkMethod::GroupLimitedGreedy),
    ("greedy", TopkMethod::Greedy),
];

impl HfConfig {
    /// The model these keys describe.
    ///
    /// # Errors
    /// Everything that is missing, impossible or unsupported; paths are keys of this struct.
    pub fn resolve(&self) -> Result<ModelConfig, Vec<Problem>> {
        let mut check = Check::default();
        let model = check.model(self);
        match model {
            Some(model) if check.problems.is_empty() => Ok(model),
            _ => Err(check.problems),
        }
    }

    /// The keys of a model, as the family's files on the hub have them.
    pub fn from_model(model: &ModelConfig) -> HfConfig {
        let heads = model.num_attention_heads;
        let mut config = HfConfig {
            model_type: Some(name_of(&FAMILIES, model.model_type)),
            vocab_size: Some(model.vocab_size),
            hidden_size: Some(model.hidden_size),
            intermediate_size: Some(model.intermediate_size),
            num_hidden_layers: Some(model.num_hidden_layers),
            num_attention_heads: Some(heads),
            num_key_value_heads: Some(heads),
            hidden_act: Some("silu".into()),
            max_position_embeddings: Some(model.max_position_embeddings),
            rope_theta: Some(model.rope.theta),
            rope_scaling: model.rope.yarn.as_ref().map(yarn_keys),
            rms_norm_eps: Some(model.rms_norm_eps),
            initializer_range: Some(model.initializer_range),
            tie_word_embeddings: Some(model.tie_word_embeddings),
            attention_dropout: Some(0.0),
            ..HfConfig::default()
        };
        match model.attention {
            Attention::Mla { q_lora_rank, kv_lora_rank, qk_nope_head_dim, qk_rope_head_dim, v_head_dim } => {
                config.q_lora_rank = Some(q_lora_rank);
                config.kv_lora_rank = Some(kv_lora_rank);
                config.qk_nope_head_dim = Some(qk_nope_head_dim);
                config.qk_rope_head_dim = Some(qk_rope_head_dim);
                config.v_head_dim = Some(v_head_dim);
                config.attention_bias = Some(false);
                config.first_k_dense_replace = Some(model.num_hidden_layers);
                config.num_nextn_predict_layers = Some(model.num_nextn_predict_layers);
            }
            Attention::Gqa { num_key_value_heads, head_dim, .. } => {
                config.num_key_value_heads = Some(num_key_value_heads);
                config.head_dim = Some(head_dim);
                config.use_sliding_window = Some(false);
            }
        }
        if model.model_type == ModelType::DeepseekV3 {
            config.rope_interleave = Some(model.rope.interleave);
        }
        if let Some(moe) = &model.moe {
            let method = match (moe.correction_bias, moe.n_group) {
                (true, _) => TopkMethod::NoauxTc,
                (false, 1) => TopkMethod::Greedy,
                (false, _) => TopkMethod::GroupLimitedGreedy,
            };
            config.moe_intermediate_size = Some(moe.moe_intermediate_size);
            config.n_routed_experts = Some(moe.n_routed_experts);
            config.n_shared_experts = Some(moe.n_shared_experts);
            config.num_experts_per_tok = Some(moe.num_experts_per_tok);
            config.first_k_dense_replace = Some(moe.first_k_dense_replace);
            config.moe_layer_freq = Some(1);
            config.n_group = Some(moe.n_group);
            config.topk_group = Some(moe.topk_group);
            config.topk_method = Some(name_of(&TOPK_METHODS, method));
            config.scoring_func = Some(name_of(&SCORING, moe.scoring_func));
            config.norm_topk_prob = Some(moe.norm_topk_prob);
            config.routed_scaling_factor = Some(moe.routed_scaling_factor);
        }
        config
    }
}

fn yarn_keys(yarn: &Yarn) -> RopeParameters {
    RopeParameters {
        kind: Some("yarn".into()),
        factor: Some(yarn.factor),
        original_max_position_embeddings: Some(yarn.original_max_position_embeddings),
        beta_fast: Some(yarn.beta_fast),
        beta_slow: Some(yarn.beta_slow),
        mscale: yarn.mscale,
        mscale_all_dim: yarn.mscale_all_dim,
        ..RopeParameters::default()
    }
}

fn name_of<T: Copy + PartialEq>(names: &[(&str, T)], value: T) -> String {
    let found = names.iter().find(|(_, v)| *v == value);
    found.map(|(name, _)| (*name).to_string()).unwrap_or_default()
}

impl Check {
    fn model(&mut self, c: &HfConfig) -> Option<ModelConfig> {
        let family = self.choice("model_type", c.model_type.as_deref(), &FAMILIES);
        let vocab_size = self.size("vocab_size", c.vocab_size, MAX_TOKENS);
        let hidden_size = self.size("hidden_size", c.hidden_size, MAX_WIDTH);
        let intermediate_size = self.size("intermediate_size", c.intermediate_size, MAX_WIDTH);
        let num_hidden_layers = self.size("num_hidden_layers", c.num_hidden_layers, MAX_LAYERS);
        let num_attention_heads = self.size("num_attention_heads", c.num_attention_heads, MAX_HEADS);
        self.only("hidden_act", &c.hidden_act, "silu".into(), "feed-forward layers are SwiGLU");
        self.only("attention_dropout", &c.attention_dropout, 0.0, "there is no dropout");
        self.only("mlp_bias", &c.mlp_bias, false, "feed-forward layers have no bias");
        self.only("use_sliding_window", &c.use_sliding_window, false, "attention is full");
        for kind in c.layer_types.iter().flatten().filter(|kind| *kind != "full_attention") {
            self.report("layer_types", format!("unsupported value `{kind}`"), "only `full_attention` is supported");
        }
        self.quantization(c);
        let rms_norm_eps = self.number("rms_norm_eps", c.rms_norm_eps.unwrap_or(1e-6), 0.0, true);
        let initializer_range = self.number("initializer_range", c.initializer_range.unwrap_or(0.02), 0.0, true);

        let family = family?;
        let default_positions = match family {
            ModelType::DeepseekV3 => 4096,
            ModelType::DeepseekV2 => 2048,
            ModelType::Qwen2 => 32768,
        };
        let positions = Some(c.max_position_embeddings.unwrap_or(default_positions));
        let max_position_embeddings = self.size("max_position_embeddings", positions, MAX_TOKENS);
        let rope = self.rope(c, family);
        let (attention, moe, num_nextn_predict_layers) = if family == ModelType::Qwen2 {
            self.refuse_deepseek_keys(c);
            (self.gqa(c, hidden_size, num_attention_heads), None, 0)
        } else {
            let mtp = self.count("num_nextn_predict_layers", Some(c.num_nextn_predict_layers.unwrap_or(0)), 64);
            let mtp = mtp.unwrap_or_default();
            (self.mla(c, num_attention_heads), self.moe(c, family, num_hidden_layers, mtp), mtp)
        };
        Some(ModelConfig {
            model_type: family,
            vocab_size: vocab_size?,
            hidden_size: hidden_size?,
            intermediate_size: intermediate_size?,
            num_hidden_layers: num_hidden_layers?,
            num_attention_heads: num_attention_heads?,
            max_position_embeddings: max_position_embeddings?,
            attention: attention?,
            moe,
            rope: rope?,
            rms_norm_eps,
            tie_word_embeddings: c.tie_word_embeddings.unwrap_or(false),
            num_nextn_predict_layers,
            initializer_range,
        })
    }

    fn mla(&mut self, c: &HfConfig, heads: Option<usize>) -> Option<Attention> {
        let q_lora_rank = match c.q_lora_rank {
            None => {
                let help = "the width of the query latent, or null (in a scene: None) for direct queries";
                self.report("q_lora_rank", "required, but absent", help);
                None
            }
            Some(None) => Some(None),
            Some(rank) => self.size("q_lora_rank", rank, MAX_WIDTH).map(Some),
        };
        let kv_lora_rank = self.size("kv_lora_rank", c.kv_lora_rank, MAX_WIDTH);
        let nope = self.size("qk_nope_head_dim", c.qk_nope_head_dim, MAX_WIDTH);
        let rope = self.size("qk_rope_head_dim", c.qk_rope_head_dim, MAX_WIDTH);
        let v_head_dim = self.size("v_head_dim", c.v_head_dim, MAX_WIDTH);
        self.even("qk_rope_head_dim", rope);
        self.only("attention_bias", &c.attention_bias, false, "latent attention has no bias here");
        if let Some(heads) = heads {
            let why = "latent attention has a key and a value per query head";
            self.only("num_key_value_heads", &c.num_key_value_heads, heads, why);
        }
        // transformers writes the rotary width here and ignores what it reads; others write the whole width.
        if let (Some(head_dim), Some(nope), Some(rope)) = (c.head_dim, nope, rope)
            && head_dim != rope
            && head_dim != nope + rope
        {
            let help = "leave it out; qk_nope_head_dim, qk_rope_head_dim and v_head_dim say it all";
            self.report("head_dim", format!("{head_dim} is not a width of these heads"), help);
        }
        Some(Attention::Mla {
            q_lora_rank: q_lora_rank?,
            kv_lora_rank: kv_lora_rank?,
            qk_nope_head_dim: nope?,
            qk_rope_head_dim: rope?,
            v_head_dim: v_head_dim?,
        })
    }

    fn gqa(&mut self, c: &HfConfig, hidden: Option<usize>, heads: Option<usize>) -> Option<Attention> {
        self.only("attention_bias", &c.attention_bias, true, "qwen2 always has biases on q, k and v");
        let (hidden, heads) = (hidden?, heads?);
        let kv_heads = self.size("num_key_value_heads", c.num_key_value_heads.or(Some(heads)), MAX_HEADS);
        if let Some(kv_heads) = kv_heads.filter(|kv_heads| !heads.is_multiple_of(*kv_heads)) {
            let message = format!("{kv_heads} does not divide num_attention_heads = {heads}");
            self.report("num_key_value_heads", message, nearest_divisors(heads, kv_heads));
        }
        let head_dim = match c.head_dim {
            None if hidden.is_multiple_of(heads) => Some(hidden / heads),
            None => {
                let message = format!("num_attention_heads = {heads} does not divide hidden_size = {hidden}");
                self.report("head_dim", message, "say head_dim, or change one of the two");
                None
            }
            head_dim => self.size("head_dim", head_dim, MAX_WIDTH),
        };
        self.even("head_dim", head_dim);
        Some(Attention::Gqa { num_key_value_heads: kv_heads?, head_dim: head_dim?, attention_bias: true })
    }

    fn moe(&mut self, c: &HfConfig, family: ModelType, layers: Option<usize>, mtp: usize) -> Option<Moe> {
        let is_v3 = family == ModelType::DeepseekV3;
        let first_k = self.count("first_k_dense_replace", c.first_k_dense_replace, layers.unwrap_or(MAX_LAYERS));
        if first_k.is_some() && first_k == layers && mtp == 0 {
            return None; // Every layer is dense: nothing of the rest is needed.
        }
        self.only("moe_layer_freq", &c.moe_layer_freq, 1, "every layer from first_k_dense_replace on has experts");
        let width = self.size("moe_intermediate_size", c.moe_intermediate_size, MAX_WIDTH);
        let experts = self.size("n_routed_experts", c.n_routed_experts, MAX_EXPERTS);
        let shared = self.count("n_shared_experts", c.n_shared_experts, MAX_EXPERTS);
        if let (Some(width), Some(shared)) = (width, shared)
            && width * shared > MAX_WIDTH
        {
            let message = format!("{shared} shared experts of width {width} are wider than {MAX_WIDTH}");
            self.report("n_shared_experts", message, format!("at most {}", MAX_WIDTH / width));
        }
        let per_token = self.size("num_experts_per_tok", c.num_experts_per_tok, MAX_EXPERTS);
        let method = c.topk_method.as_deref().unwrap_or(if is_v3 { "noaux_tc" } else { "greedy" });
        let method = self.choice("topk_method", Some(method), &TOPK_METHODS);
        let scoring = c.scoring_func.as_deref().unwrap_or(if is_v3 { "sigmoid" } else { "softmax" });
        let scoring_func = self.choice("scoring_func", Some(scoring), &SCORING);
        let (groups, allowed) = self.groups(c, is_v3, method, experts);
        if let (Some(experts), Some(per_token), Some(groups), Some(allowed)) = (experts, per_token, groups, allowed) {
            let available = experts / groups * allowed;
            if per_token > available {
                let message = format!("{per_token} is more than the {available} experts a token may use");
                let mut help = format!("at most {available}");
                if allowed < groups {
                    help += &format!(", or topk_group = {}", per_token.div_ceil(experts / groups).min(groups));
                }
                self.report("num_experts_per_tok", message, help);
            }
        }
        let factor = c.routed_scaling_factor.unwrap_or(if is_v3 { 2.5 } else { 1.0 });
        let routed_scaling_factor = self.number("routed_scaling_factor", factor, 0.0, false);
        let norm_topk_prob = c.norm_topk_prob.unwrap_or(is_v3);
        if !is_v3 && norm_topk_prob && factor != 1.0 {
            let message = "deepseek_v2 readers disagree on normalized weights with a routed_scaling_factor: \
                           DeepSeek's code drops the factor, transformers the normalization";
            self.report("norm_topk_prob", message, "false, or routed_scaling_factor = 1, or model_type `deepseek_v3`");
        }
        Some(Moe {
            n_routed_experts: experts?,
            n_shared_experts: shared?,
            num_experts_per_tok: per_token?,
            moe_intermediate_size: width?,
            first_k_dense_replace: first_k?,
            scoring_func: scoring_func?,
            correction_bias: method? == TopkMethod::NoauxTc,
            n_group: groups?,
            topk_group: allowed?,
            group_score: if method? == TopkMethod::NoauxTc { GroupScore::Top2Sum } else { GroupScore::Max },
            norm_topk_prob,
            routed_scaling_factor,
        })
    }

    /// `n_group` and `topk_group`; 1 and 1 where groups do not limit anything by method.
    fn groups(
        &mut self,
        c: &HfConfig,
        is_v3: bool,
        method: Option<TopkMethod>,
        experts: Option<usize>,
    ) -> (Option<usize>, Option<usize>) {
        let (default_groups, default_allowed) = if is_v3 { (8, 4) } else { (1, 1) };
        if method == Some(TopkMethod::Greedy) {
            if let (Some(groups), Some(allowed)) = (c.n_group, c.topk_group)
                && allowed < groups
            {
                let message =
                    format!("`greedy` does not limit groups, but topk_group {allowed} is below n_group {groups}");
                self.report("topk_method", message, "`group_limited_greedy`, or equal n_group and topk_group");
            }
            return (Some(1), Some(1));
        }
        let groups = self.size("n_group", Some(c.n_group.unwrap_or(default_groups)), MAX_EXPERTS);
        let allowed = self.size("topk_group", Some(c.topk_group.unwrap_or(default_allowed)), MAX_EXPERTS);
        if let (Some(groups), Some(allowed)) = (groups, allowed)
            && allowed > groups
        {
            let message = format!("{allowed} is more than n_group = {groups}");
            self.report("topk_group", message, format!("at most {groups}"));
        }
        let (Some(groups), Some(experts)) = (groups, experts) else { return (groups, allowed) };
        if !experts.is_multiple_of(groups) {
            let message = format!("{groups} does not divide n_routed_experts = {experts}");
            self.report("n_group", message, nearest_divisors(experts, groups));
            return (None, allowed);
        }
        if method == Some(TopkMethod::NoauxTc) && groups > 1 && experts / groups < 2 {
            let message = "a group is scored by its two best experts, but has only one";
            self.report("n_group", message, format!("at most {}", experts / 2));
        }
        (Some(groups), allowed)
    }

    fn rope(&mut self, c: &HfConfig, family: ModelType) -> Option<Rope> {
        let interleave = match family {
            ModelType::DeepseekV3 => c.rope_interleave.unwrap_or(true),
            ModelType::DeepseekV2 => {
                self.only("rope_interleave", &c.rope_interleave, true, "files of deepseek_v2 cannot say so");
                true
            }
            ModelType::Qwen2 => {
                self.only("rope_interleave", &c.rope_interleave, false, "files of qwen2 cannot say so");
                false
            }
        };
        let sections = [("rope_scaling", &c.rope_scaling), ("rope_parameters", &c.rope_parameters)];
        let sections = sections.map(|(path, section)| section.as_ref().map(|s| (path, s)));
        let mut theta = c.rope_theta;
        let mut yarn: Option<Option<Yarn>> = None;
        for (path, section) in sections.into_iter().flatten() {
            if let Some(other) = section.rope_theta {
                if theta.is_some_and(|theta| theta != other) {
                    self.report(&format!("{path}.rope_theta"), format!("{other} contradicts rope_theta"), "keep one");
                }
                theta = Some(other);
            }
            let said = self.yarn(path, section)?;
            if yarn.as_ref().is_some_and(|earlier| *earlier != said) {
                self.report(path, "rope_scaling and rope_parameters differ", "keep one of them");
            }
            yarn = Some(said);
        }
        let theta = self.number("rope_theta", theta.unwrap_or(10000.0), 1.0, false);
        Some(Rope { theta, interleave, yarn: yarn.flatten() })
    }

    /// What a section says: no extension, or YaRN. The outer `None` is a reported problem.
    fn yarn(&mut self, path: &str, s: &RopeParameters) -> Option<Option<Yarn>> {
        let at = |key: &str| format!("{path}.{key}");
        let kind = s.rope_type.as_deref().or(s.kind.as_deref());
        if s.kind.is_some() && s.rope_type.is_some() && s.kind != s.rope_type {
            self.report(&at("type"), "type and rope_type differ", "keep one of them");
        }
        self.only(&at("partial_rotary_factor"), &s.partial_rotary_factor, 1.0, "the whole rotary width turns");
        self.only(&at("truncate"), &s.truncate, true, "the ramp's ends are whole dimensions");
        if let Some(factor) = s.attention_factor {
            let help = "leave it out, and say mscale and mscale_all_dim";
            self.report(&at("attention_factor"), format!("unsupported value {factor}"), help);
        }
        let kind = if path == "rope_parameters" { kind.or(Some("default")) } else { kind };
        if !self.choice(&at("rope_type"), kind, &[("yarn", true), ("default", false)])? {
            if s.factor.is_some_and(|factor| factor != 1.0) {
                self.report(&at("factor"), "has no effect with rope_type `default`", "`yarn`, or no factor");
            }
            return Some(None);
        }
        let Some(factor) = s.factor else {
            self.report(&at("factor"), "required, but absent", "the new context divided by the original one");
            return None;
        };
        let original = s.original_max_position_embeddings;
        let original = self.size(&at("original_max_position_embeddings"), original, MAX_TOKENS)?;
        let factor = self.number(&at("factor"), factor, 1.0, true);
        let beta_slow = self.number(&at("beta_slow"), s.beta_slow.unwrap_or(1.0), 0.0, false);
        let beta_fast = s.beta_fast.unwrap_or(32.0);
        if !(beta_fast > beta_slow && beta_fast.is_finite()) {
            let message = format!("expected a number above beta_slow = {beta_slow}, found {beta_fast}");
            self.report(&at("beta_fast"), message, "32 and 1 are usual");
        }
        for (key, value) in [("mscale", s.mscale), ("mscale_all_dim", s.mscale_all_dim)] {
            self.number(&at(key), value.unwrap_or(0.0), 0.0, true);
        }
        // As in transformers, 0 is as good as absent.
        let (mscale, mscale_all_dim) = (s.mscale.filter(|m| *m != 0.0), s.mscale_all_dim.filter(|m| *m != 0.0));
        Some(Some(Yarn {
            factor,
            original_max_position_embeddings: original,
            beta_fast,
            beta_slow,
            mscale,
            mscale_all_dim,
        }))
    }

    fn quantization(&mut self, c: &HfConfig) {
        let Some(q) = &c.quantization_config else { return };
        let help = "weights in FP8 with one factor per block, or not quantized";
        let expected = [("quant_method", q.quant_method.as_deref(), "fp8"), ("fmt", q.fmt.as_deref(), "e4m3")];
        for (key, value, supported) in expected {
            let fmt_is_implied = key == "fmt" && value.is_none();
            if value != Some(supported) && !fmt_is_implied {
                let found = value.unwrap_or("nothing");
                let message = format!("expected `{supported}`, found {found}");
                self.report(&format!("quantization_config.{key}"), message, help);
            }
        }
        if q.weight_block_size.is_some_and(|block| block.contains(&0)) {
            self.report("quantization_config.weight_block_size", "a block of no rows or columns", "[128, 128]");
        }
    }

    /// Keys of latent attention and experts say nothing in a dense model, and are no accident.
    fn refuse_deepseek_keys(&mut self, c: &HfConfig) {
        let sizes = [
            ("q_lora_rank", c.q_lora_rank.flatten()),
            ("kv_lora_rank", c.kv_lora_rank),
            ("qk_nope_head_dim", c.qk_nope_head_dim),
            ("qk_rope_head_dim", c.qk_rope_head_dim),
            ("v_head_dim", c.v_head_dim),
            ("n_routed_experts", c.n_routed_experts),
            ("n_shared_experts", c.n_shared_experts),
            ("num_experts_per_tok", c.num_experts_per_tok),
            ("moe_intermediate_size", c.moe_intermediate_size),
            ("first_k_dense_replace", c.first_k_dense_replace),
            ("n_group", c.n_group),
            ("topk_group", c.topk_group),
            ("num_nextn_predict_layers", c.num_nextn_predict_layers),
        ];
        for (key, _) in sizes.iter().filter(|(_, value)| value.is_some_and(|n| n != 0)) {
            self.report(key, "has no meaning in qwen2", "leave it out, or model_type `deepseek_v3`");
        }
    }
}
