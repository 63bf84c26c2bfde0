//! The one ordered list of a model's parameters: how they lie in memory, and under which Hugging Face names on disk.
//!
//! Kernels want one tensor for all experts of a layer and one for gate and up together; checkpoints want one tensor
//! each. A [`ParamSpec`] is the packed tensor; its [`View`]s are contiguous pieces with names on disk. Optimizer,
//! checkpoint, reader, writer and parameter count all walk this list, so that none can forget a parameter.
//!
//! Legend: V vocabulary, d model width, f feed-forward width, E routed experts, h heads, r latent ranks.

use std::ops::Range;

use crate::model_config::{Attention, ModelConfig};

/// What a parameter is, for initialization, weight decay, precision and placement.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum ParamKind {
    /// Token embedding `[V, d]`.
    Embedding,
    /// Output head `[V, d]`.
    Head,
    /// RMSNorm weight.
    Norm,
    /// Matrix `[out, in]`.
    Linear,
    /// Bias of a linear layer.
    Bias,
    /// Router matrix `[E, d]`.
    Gate,
    /// Matrices of all routed experts of a layer, `[E, out, in]`.
    ExpertLinear,
    /// `e_score_correction_bias` `[E]`: an f32 buffer that the load moves, and no gradient.
    ExpertBias,
}

/// A contiguous piece of a packed parameter that has a name of its own on disk.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct View {
    /// Tensor name in a Hugging Face checkpoint.
    pub hf_name: String,
    /// Where the piece begins in the packed tensor, in elements.
    pub offset: usize,
    /// Shape on disk.
    pub shape: Vec<usize>,
}

impl View {
    /// Elements in the piece.
    pub fn num_elements(&self) -> usize {
        self.shape.iter().product()
    }
}

/// One packed parameter.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ParamSpec {
    /// Name: the Hugging Face name where there is one view, else its stem (`model.layers.3.mlp.experts.gate_up_proj`).
    pub name: String,
    /// Packed shape, row-major.
    pub shape: Vec<usize>,
    /// The pieces on disk; in order, they cover the packed tensor exactly.
    pub views: Vec<View>,
    /// Further names under which a checkpoint may hold the same tensor: tied heads, and the copies of embedding and
    /// head that released MTP modules carry. Only parameters with one view have any.
    pub aliases: Vec<String>,
    /// What it is.
    pub kind: ParamKind,
    /// Decoder layer, MTP modules counting on from `num_hidden_layers`; `None` for embedding, final norm and head.
    pub layer: Option<usize>,
    /// Place in the list of the whole model, whatever part of it a rank holds.
    pub index: usize,
    /// Where this part begins in the whole parameter, in elements; experts are cut between ranks.
    pub start: usize,
}

impl ParamSpec {
    /// Elements in the packed tensor.
    pub fn num_elements(&self) -> usize {
        self.shape.iter().product()
    }
}

/// All parameters of a model, in the order data flows: embedding, layers, norm, head, MTP modules.
pub fn param_specs(config: &ModelConfig) -> Vec<ParamSpec> {
    let experts = config.moe.as_ref().map_or(0..0, |moe| 0..moe.n_routed_experts);
    param_specs_where(config, experts, |_, _| true)
}

/// The parameters that `holds` says, by kind and layer, with only some of the routed experts; the order and the numbers are
/// those of the whole list.
pub fn param_specs_where(
    config: &ModelConfig,
    experts: Range<usize>,
    holds: impl Fn(ParamKind, Option<usize>) -> bool,
) -> Vec<ParamSpec> {
    let (v, d) = (config.vocab_size, config.hidden_size);
    let num_layers = config.num_hidden_layers;
    let mtp_layers = num_layers..num_layers + config.num_nextn_predict_layers;
    let mut list = List {
        specs: Vec::new(),
        layer: None,
        prefix: String::new(),
        index: 0,
        last_held: false,
        experts,
        holds: &holds,
    };

    list.one(ParamKind::Embedding, "model.embed_tokens.weight", &[v, d]);
    let mtp_embeddings = mtp_layers.clone().map(|layer| format!("model.layers.{layer}.embed_tokens.weight"));
    let mtp_heads = mtp_layers.clone().map(|layer| format!("model.layers.{layer}.shared_head.head.weight"));
    let mut aliases: Vec<String> = mtp_embeddings.collect();
    if config.tie_word_embeddings {
        aliases.push("lm_head.weight".into());
        aliases.extend(mtp_heads.clone());
    }
    list.also_named(aliases);

    for layer in 0..num_layers {
        list.enter_layer(layer);
        decoder_layer(&mut list, config, layer);
    }

    list.leave_layers();
    list.one(ParamKind::Norm, "model.norm.weight", &[d]);
    if !config.tie_word_embeddings {
        list.one(ParamKind::Head, "lm_head.weight", &[v, d]);
        list.also_named(mtp_heads.collect());
    }

    for layer in mtp_layers {
        list.enter_layer(layer);
        list.one(ParamKind::Norm, "enorm.weight", &[d]);
        list.one(ParamKind::Norm, "hnorm.weight", &[d]);
        // Columns 0..d take the embedding, d..2d the hidden state: the order of the released weights.
        list.one(ParamKind::Linear, "eh_proj.weight", &[d, 2 * d]);
        decoder_layer(&mut list, config, layer);
        list.one(ParamKind::Norm, "shared_head.norm.weight", &[d]);
    }
    list.specs
}

/// Parameters of a model, correction biases included, aliases not.
pub fn num_params(config: &ModelConfig) -> u64 {
    param_specs(config).iter().map(|spec| spec.num_elements() as u64).sum()
}

/// Parameters that one token visits: as [`num_params`] (embedding and head included), but with only the chosen
/// experts of each layer.
pub fn num_activated_params(config: &ModelConfig) -> u64 {
    let activated = |spec: &ParamSpec| match (spec.kind, &config.moe) {
        (ParamKind::ExpertLinear, Some(moe)) => spec.num_elements() / moe.n_routed_experts * moe.num_experts_per_tok,
        _ => spec.num_elements(),
    };
    param_specs(config).iter().map(|spec| activated(spec) as u64).sum()
}

fn decoder_layer(list: &mut List<'_>, config: &ModelConfig, layer: usize) {
    let d = config.hidden_size;
    list.one(ParamKind::Norm, "input_layernorm.weight", &[d]);
    attention(list, config);
    list.one(ParamKind::Norm, "post_attention_layernorm.weight", &[d]);
    match &config.moe {
        Some(moe) if config.is_moe_layer(layer) => {
            let (e, f) = (moe.n_routed_experts, moe.moe_intermediate_size);
            list.one(ParamKind::Gate, "mlp.gate.weight", &[e, d]);
            if moe.correction_bias {
                list.one(ParamKind::ExpertBias, "mlp.gate.e_score_correction_bias", &[e]);
            }
            let held = list.experts.clone();
            let gate_up = |i| ["gate", "up"].map(|part| format!("mlp.experts.{i}.{part}_proj.weight"));
            let (n, start) = (held.len(), held.start);
            let shape = [n, 2 * f, d];
            list.packed(
                ParamKind::ExpertLinear,
                "mlp.experts.gate_up_proj",
                &shape,
                held.clone().flat_map(gate_up),
                &[f, d],
            );
            list.starting_at(start * 2 * f * d);
            let down = held.map(|i| format!("mlp.experts.{i}.down_proj.weight"));
            list.packed(ParamKind::ExpertLinear, "mlp.experts.down_proj", &[n, d, f], down, &[d, f]);
            list.starting_at(start * d * f);
            if moe.n_shared_experts > 0 {
                swiglu(list, "mlp.shared_experts", moe.n_shared_experts * f, d);
            }
        }
        _ => swiglu(list, "mlp", config.intermediate_size, d),
    }
}

fn attention(list: &mut List, config: &ModelConfig) {
    let (d, h) = (config.hidden_size, config.num_attention_heads);
    match config.attention {
        Attention::Mla { q_lora_rank, kv_lora_rank, qk_nope_head_dim, qk_rope_head_dim, v_head_dim } => {
            let q_width = h * (qk_nope_head_dim + qk_rope_head_dim);
            if let Some(r) = q_lora_rank {
                list.one(ParamKind::Linear, "self_attn.q_a_proj.weight", &[r, d]);
                list.one(ParamKind::Norm, "self_attn.q_a_layernorm.weight", &[r]);
                list.one(ParamKind::Linear, "self_attn.q_b_proj.weight", &[q_width, r]);
            } else {
                list.one(ParamKind::Linear, "self_attn.q_proj.weight", &[q_width, d]);
            }
            let r = kv_lora_rank;
            let kv_width = h * (qk_nope_head_dim + v_head_dim);
            list.one(ParamKind::Linear, "self_attn.kv_a_proj_with_mqa.weight", &[r + qk_rope_head_dim, d]);
            list.one(ParamKind::Norm, "self_attn.kv_a_layernorm.weight", &[r]);
            list.one(ParamKind::Linear, "self_attn.kv_b_proj.weight", &[kv_width, r]);
            list.one(ParamKind::Linear, "self_attn.o_proj.weight", &[d, h * v_head_dim]);
        }
        Attention::Gqa { num_key_value_heads, head_dim, attention_bias } => {
            for (part, heads) in [("q", h), ("k", num_key_value_heads), ("v", num_key_value_heads)] {
                let width = heads * head_dim;
                list.one(ParamKind::Linear, &format!("self_attn.{part}_proj.weight"), &[width, d]);
                if attention_bias {
                    list.one(ParamKind::Bias, &format!("self_attn.{part}_proj.bias"), &[width]);
                }
            }
            list.one(ParamKind::Linear, "self_attn.o_proj.weight", &[d, h * head_dim]);
        }
    }
}

/// A SwiGLU of width `f`: gate and up rows in one matrix `[2f, d]`, and down `[d, f]`.
fn swiglu(list: &mut List, stem: &str, f: usize, d: usize) {
    let gate_up = ["gate", "up"].map(|part| format!("{stem}.{part}_proj.weight"));
    list.packed(ParamKind::Linear, &format!("{stem}.gate_up_proj"), &[2 * f, d], gate_up, &[f, d]);
    list.one(ParamKind::Linear, &format!("{stem}.down_proj.weight"), &[d, f]);
}

/// The list under construction, and the layer it is in.
struct List<'a> {
    specs: Vec<ParamSpec>,
    layer: Option<usize>,
    prefix: String,
    /// Number of the next parameter of the whole model.
    index: usize,
    /// Whether the parameter before is in the list.
    last_held: bool,
    experts: Range<usize>,
    holds: &'a dyn Fn(ParamKind, Option<usize>) -> bool,
}

impl List<'_> {
    fn enter_layer(&mut self, layer: usize) {
        self.layer = Some(layer);
        self.prefix = format!("model.layers.{layer}.");
    }

    fn leave_layers(&mut self) {
        self.layer = None;
        self.prefix.clear();
    }

    /// A parameter that is one tensor on disk.
    fn one(&mut self, kind: ParamKind, name: &str, shape: &[usize]) {
        self.packed(kind, name, shape, [name.to_string()], shape);
    }

    /// A parameter made of equal pieces, in the order of `names`.
    fn packed(
        &mut self,
        kind: ParamKind,
        name: &str,
        shape: &[usize],
        names: impl IntoIterator<Item = String>,
        view_shape: &[usize],
    ) {
        let index = self.index;
        self.index += 1;
        self.last_held = (self.holds)(kind, self.layer);
        if !self.last_held {
            return;
        }
        let size: usize = view_shape.iter().product();
        let view = |(i, name): (usize, String)| View {
            hf_name: format!("{}{name}", self.prefix),
            offset: i * size,
            shape: view_shape.to_vec(),
        };
        self.specs.push(ParamSpec {
            name: format!("{}{name}", self.prefix),
            shape: shape.to_vec(),
            views: names.into_iter().enumerate().map(view).collect(),
            aliases: Vec::new(),
            kind,
            layer: self.layer,
            index,
            start: 0,
        });
    }

    /// The parameter added last is a part that begins there.
    fn starting_at(&mut self, start: usize) {
        if let Some(spec) = self.specs.last_mut().filter(|_| self.last_held) {
            spec.start = start;
        }
    }

    /// Further names of the parameter added last.
    fn also_named(&mut self, aliases: Vec<String>) {
        if let Some(spec) = self.specs.last_mut().filter(|_| self.last_held) {
            spec.aliases = aliases;
        }
    }
}

#[cfg(test)]
mod tests {
    #![expect(clippy::unwrap_used, reason = "tests")]
    use super::*;
    use crate::hf::config::ConfigDocument;

    fn model(json: &str) -> ModelConfig {
        ConfigDocument::parse(json).unwrap().config().resolve().unwrap()
    }

    fn deepseek_v3(num_nextn_predict_layers: usize) -> ModelConfig {
        let config = r#"{"model_type": "deepseek_v3", "vocab_size": 129280, "hidden_size": 7168,
            "intermediate_size": 18432, "moe_intermediate_size": 2048, "num_hidden_layers": 61,
            "num_attention_heads": 128, "q_lora_rank": 1536, "kv_lora_rank": 512, "qk_nope_head_dim": 128,
            "qk_rope_head_dim": 64, "v_head_dim": 128, "n_routed_experts": 256, "n_shared_experts": 1,
            "num_experts_per_tok": 8, "first_k_dense_replace": 3}"#;
        ModelConfig { num_nextn_predict_layers, ..model(config) }
    }

    fn tiny(num_nextn_predict_layers: usize, tie_word_embeddings: bool) -> ModelConfig {
        let config = r#"{"model_type": "deepseek_v3", "vocab_size": 11, "hidden_size": 6, "intermediate_size": 5,
            "moe_intermediate_size": 3, "num_hidden_layers": 2, "num_attention_heads": 2, "q_lora_rank": null,
            "kv_lora_rank": 4, "qk_nope_head_dim": 3, "qk_rope_head_dim": 2, "v_head_dim": 3, "n_routed_experts": 4,
            "n_shared_experts": 2, "num_experts_per_tok": 2, "first_k_dense_replace": 1, "n_group": 2, "topk_group": 1}"#;
        ModelConfig { num_nextn_predict_layers, tie_word_embeddings, ..model(config) }
    }

    fn size_of(config: &ModelConfig, of: impl Fn(&ParamSpec) -> bool) -> usize {
        param_specs(config).iter().filter(|spec| of(spec)).map(ParamSpec::num_elements).sum()
    }

    /// Published: 671B parameters, 37B activated, an MTP module of 11.5B without its projection and norms. In full:
    #[test]
    fn deepseek_v3_has_its_published_size() {
        let v3 = deepseek_v3(0);
        assert_eq!(num_params(&v3), 671_026_419_200);
        assert_eq!(num_activated_params(&v3), 37_552_297_472);
        assert_eq!(num_params(&deepseek_v3(1)) - num_params(&v3), 11_610_068_224);
        let in_layer =
            |part: &'static str| size_of(&v3, move |spec| spec.layer == Some(10) && spec.name.contains(part));
        assert_eq!(in_layer("self_attn"), 187_107_328);
        assert_eq!(in_layer("mlp.experts") / 256, 44_040_192);
        assert_eq!(in_layer("mlp.shared_experts"), 44_040_192);
        assert_eq!(in_layer("e_score_correction_bias"), 256);
        assert_eq!(in_layer(""), 11_507_286_272);
    }

    #[test]
    fn views_cover_each_packed_tensor_exactly_and_names_are_unique() {
        for config in [tiny(2, false), tiny(1, true), deepseek_v3(1)] {
            let specs = param_specs(&config);
            let mut names = std::collections::BTreeSet::new();
            for spec in &specs {
                let mut end = 0;
                for view in &spec.views {
                    assert_eq!(view.offset, end, "{}", view.hf_name);
                    end += view.num_elements();
                    assert!(names.insert(view.hf_name.clone()), "{} occurs twice", view.hf_name);
                }
                assert_eq!(end, spec.num_elements(), "{}", spec.name);
                assert!(spec.aliases.iter().all(|alias| names.insert(alias.clone())), "{:?}", spec.aliases);
                assert!(spec.aliases.is_empty() || spec.views.len() == 1, "{}", spec.name);
            }
        }
    }

    #[test]
    fn a_small_model_in_full() {
        let list: Vec<String> =
            param_specs(&tiny(1, false)).iter().map(|s| format!("{:?} {} {:?}", s.kind, s.name, s.shape)).collect();
        let expected = "
            Embedding model.embed_tokens.weight [11, 6]
            Norm model.layers.0.input_layernorm.weight [6]
            Linear model.layers.0.self_attn.q_proj.weight [10, 6]
            Linear model.layers.0.self_attn.kv_a_proj_with_mqa.weight [6, 6]
            Norm model.layers.0.self_attn.kv_a_layernorm.weight [4]
            Linear model.layers.0.self_attn.kv_b_proj.weight [12, 4]
            Linear model.layers.0.self_attn.o_proj.weight [6, 6]
            Norm model.layers.0.post_attention_layernorm.weight [6]
            Linear model.layers.0.mlp.gate_up_proj [10, 6]
            Linear model.layers.0.mlp.down_proj.weight [6, 5]
            Norm model.layers.1.input_layernorm.weight [6]
            Linear model.layers.1.self_attn.q_proj.weight [10, 6]
            Linear model.layers.1.self_attn.kv_a_proj_with_mqa.weight [6, 6]
            Norm model.layers.1.self_attn.kv_a_layernorm.weight [4]
            Linear model.layers.1.self_attn.kv_b_proj.weight [12, 4]
            Linear model.layers.1.self_attn.o_proj.weight [6, 6]
            Norm model.layers.1.post_attention_layernorm.weight [6]
            Gate model.layers.1.mlp.gate.weight [4, 6]
            ExpertBias model.layers.1.mlp.gate.e_score_correction_bias [4]
            ExpertLinear model.layers.1.mlp.experts.gate_up_proj [4, 6, 6]
            ExpertLinear model.layers.1.mlp.experts.down_proj [4, 6, 3]
            Linear model.layers.1.mlp.shared_experts.gate_up_proj [12, 6]
            Linear model.layers.1.mlp.shared_experts.down_proj.weight [6, 6]
            Norm model.norm.weight [6]
            Head lm_head.weight [11, 6]
            Norm model.layers.2.enorm.weight [6]
            Norm model.layers.2.hnorm.weight [6]
            Linear model.layers.2.eh_proj.weight [6, 12]
            Norm model.layers.2.input_layernorm.weight [6]
            Linear model.layers.2.self_attn.q_proj.weight [10, 6]
            Linear model.layers.2.self_attn.kv_a_proj_with_mqa.weight [6, 6]
            Norm model.layers.2.self_attn.kv_a_layernorm.weight [4]
            Linear model.layers.2.self_attn.kv_b_proj.weight [12, 4]
            Linear model.layers.2.self_attn.o_proj.weight [6, 6]
            Norm model.layers.2.post_attention_layernorm.weight [6]
            Gate model.layers.2.mlp.gate.weight [4, 6]
            ExpertBias model.layers.2.mlp.gate.e_score_correction_bias [4]
            ExpertLinear model.layers.2.mlp.experts.gate_up_proj [4, 6, 6]
            ExpertLinear model.layers.2.mlp.experts.down_proj [4, 6, 3]
            Linear model.layers.2.mlp.shared_experts.gate_up_proj [12, 6]
            Linear model.layers.2.mlp.shared_experts.down_proj.weight [6, 6]
            Norm model.layers.2.shared_head.norm.weight [6]";
        let expected: Vec<&str> = expected.trim().lines().map(str::trim).collect();
        assert_eq!(list, expected);
    }

    #[test]
    fn gate_lies_before_up_and_experts_one_after_the_other() {
        let (d, f, dense, shared) = (6, 3, 5, 6);
        let specs = param_specs(&tiny(0, false));
        let places: Vec<(&str, &View)> =
            specs.iter().flat_map(|spec| spec.views.iter().map(|view| (spec.name.as_str(), view))).collect();
        let check = |spec: &str, name: &str, offset: usize, shape: [usize; 2]| {
            let (owner, view) = places.iter().find(|(_, view)| view.hf_name == name).unwrap();
            assert_eq!((*owner, view.offset, &view.shape[..]), (spec, offset, &shape[..]), "{name}");
        };
        for (stem, f) in [("model.layers.0.mlp", dense), ("model.layers.1.mlp.shared_experts", shared)] {
            let packed = format!("{stem}.gate_up_proj");
            check(&packed, &format!("{stem}.gate_proj.weight"), 0, [f, d]);
            check(&packed, &format!("{stem}.up_proj.weight"), f * d, [f, d]);
            let down = format!("{stem}.down_proj.weight");
            check(&down, &down, 0, [d, f]);
        }
        let stem = "model.layers.1.mlp.experts";
        for e in 0..4 {
            let packed = format!("{stem}.gate_up_proj");
            check(&packed, &format!("{stem}.{e}.gate_proj.weight"), e * 2 * f * d, [f, d]);
            check(&packed, &format!("{stem}.{e}.up_proj.weight"), e * 2 * f * d + f * d, [f, d]);
            check(&format!("{stem}.down_proj"), &format!("{stem}.{e}.down_proj.weight"), e * d * f, [d, f]);
        }
    }

    #[test]
    fn a_tied_head_and_the_copies_of_mtp_modules_are_aliases() {
        let aliases = |config: &ModelConfig, name: &str| {
            param_specs(config).into_iter().find(|spec| spec.name == name).map(|spec| spec.aliases)
        };
        let (embed, head) = ("model.embed_tokens.weight", "lm_head.weight");
        let (embed_copy, head_copy) = ("model.layers.2.embed_tokens.weight", "model.layers.2.shared_head.head.weight");
        assert_eq!(aliases(&tiny(1, false), embed).unwrap(), [embed_copy]);
        assert_eq!(aliases(&tiny(1, false), head).unwrap(), [head_copy]);
        assert_eq!(aliases(&tiny(1, true), embed).unwrap(), [embed_copy, head, head_copy]);
        assert_eq!(aliases(&tiny(1, true), head), None);
        assert_eq!(aliases(&tiny(0, false), embed).unwrap(), [""; 0]);
    }

    #[test]
    fn grouped_queries_have_biases_on_q_k_and_v_only() {
        let qwen = model(
            r#"{"model_type": "qwen2", "vocab_size": 11, "hidden_size": 8, "intermediate_size": 5,
                "num_hidden_layers": 1, "num_attention_heads": 4, "num_key_value_heads": 2}"#,
        );
        let attention: Vec<(String, Vec<usize>)> = param_specs(&qwen)
            .into_iter()
            .filter_map(|s| Some((s.name.strip_prefix("model.layers.0.self_attn.")?.to_string(), s.shape)))
            .collect();
        let expected = [
            ("q_proj.weight", vec![8, 8]),
            ("q_proj.bias", vec![8]),
            ("k_proj.weight", vec![4, 8]),
            ("k_proj.bias", vec![4]),
            ("v_proj.weight", vec![4, 8]),
            ("v_proj.bias", vec![4]),
            ("o_proj.weight", vec![8, 8]),
        ];
        assert_eq!(attention, expected.map(|(name, shape)| (name.to_string(), shape)));
        assert_eq!(num_activated_params(&qwen), num_params(&qwen));
    }
}
