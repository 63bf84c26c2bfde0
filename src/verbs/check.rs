//! `hadal check`: all that is wrong with a scene, or what its model comes to.

use std::{path::PathBuf, process::ExitCode};

use serde::Serialize;
use systems::{
    mesh::Mesh,
    model_config::{Attention, ModelConfig, ModelType},
    params::{ParamKind, num_activated_params, num_params, param_specs},
    scene::{
        Compute, Data, Optimizer, Scene, Validation,
        diloco::{Diloco, Nesterov, Outer},
    },
};

use crate::{
    cli::CheckArgs,
    failure::Failure,
    load::{self, Checked, Vocab},
    machine,
    report::{Output, Table},
    units,
};

/// A valid scene; what is absent is what the scene does not have.
#[derive(Serialize)]
struct Report {
    scene: PathBuf,
    name: String,
    model: Option<Model>,
    tokenizer_vocab_size: Option<usize>,
    training: Option<Training>,
}

/// Sizes of a model.
#[derive(Serialize)]
struct Model {
    /// All parameters, MTP modules included.
    num_params: u64,
    /// Without MTP modules, as sizes are published.
    num_params_without_mtp: u64,
    /// Those a token visits, without MTP modules.
    num_activated_params: u64,
    num_mtp_params: u64,
    vocab_size: usize,
    /// All weights as 32-bit floats, MTP modules included.
    weights_f32_bytes: u64,
    weights_bf16_bytes: u64,
}

/// What a run would do.
#[derive(Serialize)]
struct Training {
    num_steps: u64,
    /// Tokens of a step, in the first and in the last.
    first_step_tokens: u64,
    last_step_tokens: u64,
    total_tokens: u64,
    /// Weights, gradients and optimizer state, without activations.
    state_bytes: Option<u64>,
}

/// Checks.
///
/// # Errors
/// All that is wrong with the scene.
pub fn check(args: &CheckArgs, output: &Output) -> Result<ExitCode, Failure> {
    let checked = load::scene(&args.scene, &args.overrides.set, &[])?;
    let report = report(args, &checked);
    output.result(&report, &table(&checked, &report).render(&format!("{}: valid", args.scene.display())))?;
    let needed = report.training.and_then(|training| training.state_bytes).unwrap_or_default();
    if let Some((total, _)) = machine::memory_bytes().filter(|(total, _)| needed > *total) {
        eprintln!("note: this machine has {} of memory, less than training needs", units::bytes(total));
    }
    Ok(ExitCode::SUCCESS)
}

fn report(args: &CheckArgs, checked: &Checked) -> Report {
    let scene = &checked.loaded.scene;
    Report {
        scene: args.scene.clone(),
        name: scene.name.clone(),
        model: checked.model.as_ref().map(model),
        tokenizer_vocab_size: checked.vocab.as_ref().map(Vocab::size),
        training: training(scene, checked.model.as_ref()),
    }
}

fn model(config: &ModelConfig) -> Model {
    let main = config.without_mtp();
    let (all, without_mtp) = (num_params(config), num_params(&main));
    Model {
        num_params: all,
        num_params_without_mtp: without_mtp,
        num_activated_params: num_activated_params(&main),
        num_mtp_params: all - without_mtp,
        vocab_size: config.vocab_size,
        weights_f32_bytes: 4 * all,
        weights_bf16_bytes: 2 * all,
    }
}

fn training(scene: &Scene, model: Option<&ModelConfig>) -> Option<Training> {
    let (train, data) = (scene.train.as_ref()?, scene.data.as_ref()?);
    let step_tokens =
        |step| (data.seq_len * scene.batch.microbatch_sequences * scene.batch.num_microbatches_at(step)) as u64;
    Some(Training {
        num_steps: train.steps,
        first_step_tokens: step_tokens(0),
        last_step_tokens: step_tokens(train.steps.saturating_sub(1)),
        total_tokens: (0..train.steps).map(step_tokens).sum(),
        state_bytes: model.zip(scene.optimizer.as_ref()).map(|(model, optimizer)| state_bytes(scene, model, optimizer)),
    })
}

/// A weight and its gradient; for AdamW two moments, for Muon one. Correction biases have none of these, and are few.
fn state_bytes(scene: &Scene, model: &ModelConfig, optimizer: &Optimizer) -> u64 {
    let number_bytes = if scene.precision.compute == Compute::F64 { 8 } else { 4 };
    let numbers = |kind| match (optimizer, kind) {
        (Optimizer::Muon(_), ParamKind::Linear | ParamKind::ExpertLinear) => 3,
        _ => 4,
    };
    param_specs(model).iter().map(|spec| number_bytes * numbers(spec.kind) * spec.num_elements() as u64).sum()
}

fn table(checked: &Checked, report: &Report) -> Table {
    let mut table = Table::default();
    if let (Some(config), Some(model)) = (&checked.model, &report.model) {
        describe_model(&mut table, config, model);
    } else {
        table.row("model", "none");
    }
    let scene = &checked.loaded.scene;
    if scene.mesh.num_ranks() > 1 {
        let Mesh { pp, ep, dp, ranks_per_node } = scene.mesh;
        let schedule = scene.pipeline.clone().unwrap_or_default().schedule;
        let num = scene.mesh.num_ranks();
        let moe = checked.model.as_ref().and_then(|config| config.moe.as_ref());
        let uneven = moe.map(|moe| (moe.n_routed_experts / ep as usize, moe.n_routed_experts % ep as usize));
        let uneven = match uneven {
            Some((fewest, 1..)) => format!("; {fewest} or {} experts a layer each", fewest + 1),
            _ => String::new(),
        };
        let node = ranks_per_node.min(num);
        table.row("ranks", format!("{num}: pp {pp}, ep {ep}, dp {dp}, {node} a node; {schedule:?}{uneven}"));
    }
    table.maybe("replicas", scene.diloco.as_ref().map(describe_replicas));
    table.maybe("data", scene.data.as_ref().map(describe_data));
    table.maybe("tokenizer", checked.vocab.as_ref().map(describe_vocab));
    if let Some(training) = &report.training {
        let step = match (training.first_step_tokens, training.last_step_tokens) {
            (first, last) if first == last => units::grouped(first),
            (first, last) => format!("{} to {}", units::grouped(first), units::grouped(last)),
        };
        let [steps, total] = [training.num_steps, training.total_tokens].map(units::grouped);
        table.row("training", format!("{steps} steps of {step} tokens, {total} tokens in all"));
        let state =
            |bytes| format!("{} for weights, gradients and optimizer, activations not counted", units::bytes(bytes));
        table.maybe("memory", training.state_bytes.map(state));
    }
    table
}

fn describe_replicas(diloco: &Diloco) -> String {
    let Outer::Nesterov(Nesterov { lr, momentum }) = diloco.outer;
    let crossing =
        diloco.compress.map_or_else(|| "parameters in F32".into(), |how| format!("pseudo-gradients in {how:?}"));
    let away = match diloco.absent.len() {
        0 => String::new(),
        n => format!("; absences: {n}"),
    };
    format!(
        "{} of these ranks, that meet every {} steps: Nesterov with lr {lr} and momentum {momentum}; {crossing}{away}",
        diloco.replicas, diloco.inner_steps
    )
}

fn describe_model(table: &mut Table, config: &ModelConfig, model: &Model) {
    let family = match config.model_type {
        ModelType::DeepseekV3 => "deepseek_v3",
        ModelType::DeepseekV2 => "deepseek_v2",
        ModelType::Qwen2 => "qwen2",
    };
    let layers = config.num_hidden_layers;
    let dense = (0..layers).filter(|layer| !config.is_moe_layer(*layer)).count();
    let mtp = match config.num_nextn_predict_layers {
        0 => String::new(),
        1 => " and 1 MTP module".into(),
        modules => format!(" and {modules} MTP modules"),
    };
    table
        .row("model", format!("{family}, width {}, {layers} layers ({dense} dense){mtp}", config.hidden_size))
        .row("attention", describe_attention(config));
    let experts = config.moe.as_ref().map(|moe| {
        let groups = match moe.n_group {
            1 => String::new(),
            groups => format!(", from {} of {groups} groups", moe.topk_group),
        };
        format!(
            "{} routed and {} shared a layer; a token visits {} routed{groups}",
            moe.n_routed_experts, moe.n_shared_experts, moe.num_experts_per_tok
        )
    });
    let mtp = match model.num_mtp_params {
        0 => String::new(),
        params => format!("; MTP {} more", units::count(params)),
    };
    table
        .maybe("experts", experts)
        .row("vocabulary", format!("{} rows", units::grouped(config.vocab_size as u64)))
        .row(
            "parameters",
            format!(
                "{} total, {} activated per token{mtp}",
                units::count(model.num_params_without_mtp),
                units::count(model.num_activated_params)
            ),
        )
        .row(
            "weights",
            format!(
                "{} in F32, {} in BF16{}",
                units::bytes(model.weights_f32_bytes),
                units::bytes(model.weights_bf16_bytes),
                if model.num_mtp_params > 0 { ", MTP included" } else { "" },
            ),
        );
}

fn describe_attention(config: &ModelConfig) -> String {
    let heads = config.num_attention_heads;
    match config.attention {
        Attention::Mla { q_lora_rank, kv_lora_rank, qk_rope_head_dim, .. } => {
            let query = q_lora_rank.map_or_else(|| "direct queries".into(), |rank| format!("query latent {rank}"));
            let cached = kv_lora_rank + qk_rope_head_dim;
            format!(
                "MLA, {heads} heads, {query}, key/value latent {kv_lora_rank}; caches {cached} numbers a token and layer"
            )
        }
        Attention::Gqa { num_key_value_heads, head_dim, .. } => {
            format!("GQA, {heads} heads on {num_key_value_heads} key/value heads of {head_dim}")
        }
    }
}

fn describe_data(data: &Data) -> String {
    let size = |path: &PathBuf| std::fs::metadata(path).map_or(0, |file| file.len());
    let files = &data.train.0;
    let bytes = units::bytes(files.iter().map(|file| size(&file.0)).sum());
    let files = if files.len() == 1 { "1 file".into() } else { format!("{} files", files.len()) };
    match &data.validation {
        Validation::HeldOut { fraction } => format!("{bytes} in {files}, {:.1}% of it held out", 100.0 * fraction),
        Validation::File(file) => format!("{bytes} in {files}; validation on {}", units::bytes(size(&file.0))),
    }
}

fn describe_vocab(vocab: &Vocab) -> String {
    match vocab {
        Vocab::Bpe(size) => format!("byte-level BPE, trained on the data to {} tokens", units::grouped(*size as u64)),
        Vocab::File(size) => format!("{} tokens, from a file", units::grouped(*size as u64)),
    }
}
