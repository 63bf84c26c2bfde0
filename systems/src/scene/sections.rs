//! The sections of a scene: one struct each, with the units and the defaults that make a short scene work. Numbers that
//! change over a run (learning rate, microbatches, bias speed) are pure functions of the step, counted from 0.
//!
//! Defaults are those of the DeepSeek-V3 report (arXiv 2412.19437, sections 2 and 4.2) where it gives one.
use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use crate::placement::load::RoutingLoad;

/// A path. In a file it starts from that file's folder, also when another file extends it; in `--set`, from the working
/// directory. The loader makes it absolute.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ScenePath(pub PathBuf);

/// One or more paths; the brackets may be left out around a single one.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ScenePaths(pub Vec<ScenePath>);

/// Text to learn from.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Data {
    /// Files with training text.
    pub train: ScenePaths,
    /// Text that is only measured.
    #[serde(default)]
    pub validation: Validation,
    /// How text becomes tokens.
    pub tokenizer: Tokenizer,
    /// Length of a packed sequence, in tokens.
    #[serde(default = "default_seq_len")]
    pub seq_len: usize,
    /// Whether tokens see the documents packed before theirs.
    #[serde(default)]
    pub cross_document_attention: bool,
    /// Whether a document that is longer than a sequence is an error, instead of going on in the next one.
    #[serde(default)]
    pub refuse_long_documents: bool,
}

fn default_seq_len() -> usize {
    256
}

/// Where validation text comes from.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub enum Validation {
    /// The last part of the training text, kept out of training.
    HeldOut {
        /// Share of the text, between 0 and 1.
        fraction: f64,
    },
    /// A file of its own.
    File(ScenePath),
}

impl Default for Validation {
    fn default() -> Self {
        Validation::HeldOut { fraction: 0.1 }
    }
}

/// Where the tokenizer comes from.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub enum Tokenizer {
    /// Byte-level BPE, trained on the training text.
    Bpe {
        /// Tokens, special ones included.
        vocab_size: usize,
    },
    /// A Hugging Face `tokenizer.json`.
    File(ScenePath),
}

/// How many sequences make an optimizer step.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Batch {
    /// Sequences in a microbatch.
    pub microbatch_sequences: usize,
    /// Microbatches in a step, over all ranks.
    pub num_microbatches: usize,
    /// Changes of `num_microbatches`, each from its step on.
    pub ramp: Vec<Ramp>,
}

/// One change of the batch size.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Ramp {
    /// First step of the new size.
    pub step: u64,
    /// Microbatches in a step from there on.
    pub num_microbatches: usize,
}

impl Default for Batch {
    fn default() -> Self {
        Batch { microbatch_sequences: 8, num_microbatches: 1, ramp: Vec::new() }
    }
}

impl Batch {
    /// Most microbatches that a step has.
    pub fn max_microbatches(&self) -> usize {
        self.ramp.iter().map(|ramp| ramp.num_microbatches).fold(self.num_microbatches, usize::max)
    }

    /// Microbatches in step `step`.
    pub fn num_microbatches_at(&self, step: u64) -> usize {
        let ramp = self.ramp.iter().rev().find(|ramp| ramp.step <= step);
        ramp.map_or(self.num_microbatches, |ramp| ramp.num_microbatches)
    }
}

/// How tokens find experts, and how the load is balanced.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Routing {
    /// Who chooses.
    pub mode: RoutingMode,
    /// What a step adds to the bias of an underloaded expert and takes from an overloaded one (gamma).
    pub bias_update_speed: f64,
    /// Last steps of the run, over which the speed falls linearly to 0.
    pub bias_warm_down_steps: u64,
    /// Weight of the sequence-wise balance loss (alpha).
    pub sequence_aux_loss: f64,
    /// Weight of the router's z-loss.
    pub z_loss: f64,
}

/// Who chooses the experts of a token.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum RoutingMode {
    /// The router.
    #[default]
    Learned,
    /// Nobody: experts in turn, so that the load is balanced exactly. For measuring.
    Forced,
    /// Chance. For measuring.
    Random,
}

impl Default for Routing {
    fn default() -> Self {
        Routing {
            mode: RoutingMode::Learned,
            bias_update_speed: 1e-3,
            bias_warm_down_steps: 0,
            sequence_aux_loss: 1e-4,
            z_loss: 0.0,
        }
    }
}

impl Routing {
    /// Bias update speed in step `step` of `total_steps`; 0 in the last step if there is a warm-down.
    pub fn bias_speed_at(&self, step: u64, total_steps: u64) -> f64 {
        let left = total_steps.saturating_sub(step + 1);
        if left >= self.bias_warm_down_steps {
            return self.bias_update_speed;
        }
        self.bias_update_speed * left as f64 / self.bias_warm_down_steps as f64
    }
}

/// Multi-token prediction.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Mtp {
    /// Weight of the MTP loss (lambda), averaged over the modules.
    pub loss_weight: f64,
}

impl Default for Mtp {
    fn default() -> Self {
        Mtp { loss_weight: 0.3 }
    }
}

/// How gradients change weights.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub enum Optimizer {
    /// AdamW for all weights.
    AdamW(AdamW),
    /// Muon for matrices, AdamW for the rest.
    Muon(Muon),
}

/// AdamW (arXiv 1711.05101).
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct AdamW {
    /// Decay of the first moment.
    pub beta1: f64,
    /// Decay of the second moment.
    pub beta2: f64,
    /// Added to the root of the second moment.
    pub eps: f64,
    /// Decoupled weight decay, multiplied by the learning rate.
    pub weight_decay: f64,
}

impl Default for AdamW {
    fn default() -> Self {
        AdamW { beta1: 0.9, beta2: 0.95, eps: 1e-8, weight_decay: 0.1 }
    }
}

/// Muon: momentum, orthogonalized by Newton-Schulz iterations.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Muon {
    /// Decay of the momentum.
    pub momentum: f64,
    /// Look ahead by one momentum step.
    pub nesterov: bool,
    /// Newton-Schulz iterations.
    pub ns_steps: usize,
    /// Decoupled weight decay, multiplied by the learning rate.
    pub weight_decay: f64,
    /// Factor on the schedule's learning rate for the weights under Muon.
    pub lr_multiplier: f64,
    /// For embeddings, head, norms and router.
    pub adamw: AdamW,
}

impl Default for Muon {
    fn default() -> Self {
        Muon {
            momentum: 0.95,
            nesterov: true,
            ns_steps: 5,
            weight_decay: 0.1,
            lr_multiplier: 1.0,
            adamw: AdamW::default(),
        }
    }
}

/// Length and limits of training.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Train {
    /// Optimizer steps.
    pub steps: u64,
    /// Norm that gradients are clipped to; `None` does not clip.
    #[serde(default = "default_max_grad_norm")]
    pub max_grad_norm: Option<f64>,
    /// Budget in seconds; the run ends with a checkpoint and exit code 6.
    #[serde(default)]
    pub max_train_secs: Option<f64>,
}

fn default_max_grad_norm() -> Option<f64> {
    Some(1.0)
}

/// How the layers are laid on pipeline ranks, and in which order microbatches pass them.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Pipeline {
    /// Order of forward and backward passes.
    pub schedule: PipelineSchedule,
    /// Decoder layers of each stage; `None` balances them.
    pub stages: Option<Vec<usize>>,
    /// Order of a layer's chunks where a forward and a backward overlap; `None` takes that of DeepSeek's trace.
    pub overlap_order: Option<Vec<String>>,
}

/// Order of forward and backward passes.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum PipelineSchedule {
    /// All forwards, then all backwards (arXiv 1811.06965).
    GPipe,
    /// One forward, one backward (PipeDream-Flush, arXiv 2006.09503). On one rank: gradients add up microbatch by microbatch.
    #[default]
    OneFOneB,
    /// 1F1B over several stages a rank (arXiv 2104.04473).
    Interleaved {
        /// Stages that a rank holds.
        chunks: u32,
    },
    /// Weight gradients fill the bubbles, at 1F1B's memory (arXiv 2401.10241).
    ZbH1,
    /// The same at twice the memory.
    ZbH2,
    /// Two stages a rank, in a V (arXiv 2405.15362).
    Zbv,
    /// Two directions, with forward and backward overlapped (arXiv 2412.19437).
    DualPipe,
    /// Its half: two stages a rank, in a V.
    DualPipeV,
    /// A text file: a line a rank, actions as `hadal plan --schedule .. --print` writes them.
    File(ScenePath),
}

/// How rows travel to the ranks of their experts and back.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct ExpertParallel {
    /// Format of tokens, and of gradients of outputs, on their way to experts.
    pub dispatch: WireFormat,
    /// Format of outputs, and of gradients of tokens, on their way back.
    pub combine: WireFormat,
    /// Where the outputs of a token's experts are added up.
    pub reduce: Reduce,
}

/// Where the outputs of a token's experts are added up.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum Reduce {
    /// At the token's rank, in one order whatever the number of ranks: every output travels.
    #[default]
    Source,
    /// On the way, so that one sum of each node travels, as in DeepSeek's kernels. It can be planned, not run yet.
    Node,
}

/// Number format on a link.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum WireFormat {
    /// As they are computed.
    #[default]
    Exact,
    /// bfloat16.
    Bf16,
    /// E4M3 with a power-of-two scale for each 128 numbers (DeepSeek-V3 report, section 3.3).
    Fp8,
}

/// What `hadal plan` takes the scene to run on, and for how long.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PlanSection {
    /// File that describes the device; `--hardware` has the last word.
    #[serde(default)]
    pub hardware: Option<ScenePath>,
    /// Tokens of a sequence; those of `data` if it is not given.
    #[serde(default)]
    pub seq_len: Option<usize>,
    /// Tokens to train on; those of the steps of `train` if they are not given.
    #[serde(default)]
    pub num_tokens: Option<f64>,
    /// How tokens spread over experts.
    #[serde(default)]
    pub load: RoutingLoad,
}

/// Measuring the validation loss.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Eval {
    /// Steps between two measurements.
    pub every_steps: u64,
    /// Validation tokens at most; `None` takes all.
    pub max_tokens: Option<usize>,
}

impl Default for Eval {
    fn default() -> Self {
        Eval { every_steps: 100, max_tokens: None }
    }
}

/// Saving the run, beside training.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Checkpoint {
    /// Steps between two checkpoints.
    pub every_steps: u64,
    /// Checkpoints kept; older ones are deleted.
    pub keep_last: usize,
    /// Those of a multiple of so many steps are never deleted.
    pub keep_every_steps: Option<u64>,
}

impl Default for Checkpoint {
    fn default() -> Self {
        Checkpoint { every_steps: 200, keep_last: 2, keep_every_steps: None }
    }
}

/// What a run may take of its hardware, all sessions together. When a part is spent the run ends with a checkpoint, and exit code 6.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Budget {
    /// Dollars, by the price of `plan.hardware`.
    pub cost_usd: Option<f64>,
    /// Kilowatt-hours: as GPUs measure them where NVML tells it, else modelled from the watts of `plan.hardware` and the time that devices
    /// were busy.
    pub energy_kwh: Option<f64>,
    /// Hours of training.
    pub hours: Option<f64>,
}

impl Budget {
    /// What is said of a limit in something that the hardware's `what` would make known.
    pub(crate) fn needs_hardware(what: &str) -> String {
        format!("needs `plan.hardware` with {what}: what a step takes of it is not known otherwise")
    }
}

/// A continuation that is generated when the run ends.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Sample {
    /// Text to continue.
    pub prompt: String,
    /// Tokens to generate at most.
    pub max_new_tokens: usize,
    /// Divisor of the logits; 0 takes the likeliest token.
    pub temperature: f64,
    /// Choose among the likeliest tokens that together have this probability.
    pub top_p: f64,
}

impl Default for Sample {
    fn default() -> Self {
        Sample { prompt: String::new(), max_new_tokens: 80, temperature: 0.8, top_p: 0.95 }
    }
}

/// What a run writes about itself.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Telemetry {
    /// Folder of all run directories; relative to the working directory, not to the scene.
    pub dir: PathBuf,
    /// Write TensorBoard event files.
    pub tensorboard: bool,
    /// Steps to trace task by task.
    pub trace_steps: Option<TraceSteps>,
    /// Steps between two lines on the terminal.
    pub log_every_steps: u64,
}

/// Which steps are traced.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TraceSteps {
    /// First one.
    pub start: u64,
    /// How many.
    pub count: u64,
}

impl Default for Telemetry {
    fn default() -> Self {
        Telemetry { dir: PathBuf::from("runs"), tensorboard: true, trace_steps: None, log_every_steps: 10 }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_batch_grows_at_the_steps_of_the_ramp() {
        let ramp = |step, num_microbatches| Ramp { step, num_microbatches };
        let batch = Batch { microbatch_sequences: 1, num_microbatches: 2, ramp: vec![ramp(3, 4), ramp(5, 8)] };
        let found: Vec<_> = (0..7).map(|step| batch.num_microbatches_at(step)).collect();
        assert_eq!(found, [2, 2, 2, 4, 4, 8, 8]);
    }

    #[test]
    fn the_bias_speed_falls_to_zero_in_the_last_steps() {
        let routing = Routing { bias_update_speed: 1.0, bias_warm_down_steps: 4, ..Routing::default() };
        let found: Vec<_> = (0..8).map(|step| routing.bias_speed_at(step, 6)).collect();
        assert_eq!(found, [1.0, 1.0, 0.75, 0.5, 0.25, 0.0, 0.0, 0.0]);
        let steady = Routing { bias_warm_down_steps: 0, ..routing };
        assert_eq!(steady.bias_speed_at(5, 6), 1.0);
    }
}
