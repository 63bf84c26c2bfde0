//! What the command line asks of this crate, as plain data: requests, reports, and the progress in between.
//!
//! Reports are serialized as they are for `--json`: units are in the names.

use std::{
    path::PathBuf,
    sync::{Arc, atomic::AtomicUsize},
};

use engine::control::{ControlHandle, Inbox};
use kernels::comm::Comm;
use serde::Serialize;

use crate::{
    evaluate::EvaluationResult, measure::Comparison, power::EnergySource, rounding::RoundingReport, scene::Loaded,
    traffic::Traffic, weights::WeightsReport,
};

/// Where a run tells what it does. All calls come from the run's thread, between steps.
pub trait Progress: Send + Sync {
    /// Something a person should know once: what was loaded, skipped or chosen.
    fn note(&self, text: &str);
    /// An optimizer step is done.
    fn step(&self, step: &StepReport);
    /// A validation is done.
    fn evaluated(&self, result: &EvaluationResult);
    /// Generated text, as it comes.
    fn text(&self, text: &str);
}

/// One optimizer step.
#[derive(Clone, Debug, Serialize)]
pub struct StepReport {
    /// Steps done, this one included.
    pub step: u64,
    /// Steps of the run.
    pub num_steps: u64,
    /// Next-token loss.
    pub loss_nats_per_token: f64,
    /// Loss of each MTP module.
    pub mtp_loss_nats_per_token: Vec<f64>,
    /// Norm of the gradient before clipping.
    pub grad_norm: f64,
    /// Learning rate.
    pub lr: f64,
    /// Targets in the step.
    pub num_tokens: u64,
    /// Targets since the start of training.
    pub total_tokens: u64,
    /// Duration of the step.
    pub step_secs: f64,
    /// Targets over duration.
    pub tokens_per_sec: f64,
    /// Max load over mean load, minus 1: the worst layer. 0 for a dense model.
    pub max_vio: f64,
    /// Experts without a token in this step, over all layers.
    pub num_idle_experts: u64,
    /// Step time that no stream was busy, over step time.
    pub overhead_share: f64,
    /// What of the budget is nearest its end.
    pub spent: Option<Spent>,
}

/// What was spent of a part of a budget.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Spent {
    /// `$`, `kWh` or `h`.
    pub unit: &'static str,
    /// So far.
    pub spent: f64,
    /// At most.
    pub limit: f64,
}

impl Spent {
    /// Of the limit.
    pub fn share(&self) -> f64 {
        self.spent / self.limit
    }
}

impl std::fmt::Display for Spent {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        // Of small budgets the first digits that are not 0.
        let digits = if self.limit < 0.1 { 5 } else { 2 };
        write!(f, "{:.digits$} of {} {}", self.spent, self.limit, self.unit)
    }
}

/// `hadal run SCENE`.
pub struct RunRequest {
    /// The scene, checked.
    pub loaded: Loaded,
    /// Go on from the newest valid checkpoint of the run directory, if there is one.
    pub resume: bool,
    /// Number of the signal that asked to stop; 0 for none.
    pub stop: Arc<AtomicUsize>,
    /// Who is told.
    pub progress: Arc<dyn Progress>,
    /// Both ends of the way to the run, if the caller wants to ask it and listen to it: from [`engine::control::channel`], and
    /// the caller keeps a clone of the handle.
    pub control: Option<(ControlHandle, Inbox)>,
    /// This process's rank among others, where ranks are processes; without, they are threads of this one.
    pub comm: Option<Comm>,
}

/// What a run came to.
#[derive(Clone, Debug, Serialize)]
pub struct RunReport {
    /// Parameters, MTP modules included.
    pub num_params: u64,
    /// Parameters a token passes through, with embedding and head, without MTP modules.
    pub num_activated_params: u64,
    /// Optimizer steps done, over all sessions of the run.
    pub num_steps: u64,
    /// Targets trained on, over all sessions of the run.
    pub num_tokens: u64,
    /// Time in optimizer steps, over all sessions of the run.
    pub train_secs: f64,
    /// Tokens over time.
    pub tokens_per_sec: f64,
    /// Loss of the last step.
    pub train_loss_nats_per_token: Option<f64>,
    /// Last validation loss.
    pub val_loss_nats_per_token: Option<f64>,
    /// Last validation loss over bytes of text.
    pub val_bits_per_byte: Option<f64>,
    /// Max load over mean load, minus 1, over the last step: the worst layer.
    pub max_vio: f64,
    /// Experts that no token of the last 10 steps chose, over all layers.
    pub num_dead_experts: u64,
    /// Mean share of step time in which no stream was busy.
    pub overhead_share: f64,
    /// Idle time of the last steps, by cause, beside what the tasks' times predict.
    pub idle: Option<Comparison>,
    /// Memory traffic of the last step, all ranks together.
    pub traffic: Option<Traffic>,
    /// What rounding to 8 bits lost in the last step that was watched.
    pub fp8_rounding: Option<RoundingReport>,
    /// Energy, over all sessions of the run, of all ranks.
    pub energy_kwh: Option<f64>,
    /// Whether it was measured, and how, or is modelled.
    pub energy_source: Option<EnergySource>,
    /// Most bytes of tensors live at once, on the rank of most.
    pub peak_tensor_bytes: u64,
    /// Text generated at the end.
    pub sample: Option<String>,
    /// Folder of the run.
    pub run_dir: PathBuf,
    /// Newest checkpoint.
    pub checkpoint_dir: Option<PathBuf>,
    /// `finished`, `stopped on request`, `signal`, `budget` or `diverged`, then details.
    pub exit_reason: String,
    /// Exit code of the process.
    pub exit_code: u8,
}

/// What `hadal eval` measures on.
#[derive(Clone, Debug)]
pub enum EvalInput {
    /// Text, tokenized with the checkpoint's tokenizer.
    Data(PathBuf),
    /// safetensors with an int64 tensor `input_ids` [batch, seq].
    Tokens(PathBuf),
}

/// `hadal eval CHECKPOINT`.
pub struct EvalRequest {
    /// Hugging Face folder.
    pub checkpoint: PathBuf,
    /// What to measure on.
    pub input: EvalInput,
    /// Where to write f32 `logits` [batch, seq, vocab]; needs tokens.
    pub logits: Option<PathBuf>,
    /// Where to write every parameter's gradient of the mean loss; needs tokens.
    pub grads: Option<PathBuf>,
    /// Tokens of a row, for text.
    pub seq_len: usize,
    /// Type to compute in.
    pub compute: crate::scene::Compute,
    /// What the model is on.
    pub device: kernels::device::Device,
    /// Who is told.
    pub progress: Arc<dyn Progress>,
}

/// What an evaluation came to.
#[derive(Clone, Debug, Serialize)]
pub struct EvalReport {
    /// Mean loss.
    pub loss_nats_per_token: f64,
    /// e to the loss.
    pub perplexity: f64,
    /// For text only.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub bits_per_byte: Option<f64>,
    /// Targets.
    pub num_tokens: u64,
    /// How the weights were read, and what they take.
    pub weights: WeightsReport,
}

/// `hadal generate CHECKPOINT`.
pub struct GenerateRequest {
    /// Hugging Face folder.
    pub checkpoint: PathBuf,
    /// Text to continue.
    pub prompt: String,
    /// Tokens to generate at most.
    pub max_new_tokens: usize,
    /// Divisor of the logits; 0 takes the likeliest token.
    pub temperature: f64,
    /// Choose among the likeliest tokens that together have this probability.
    pub top_p: f64,
    /// Choose among so many likeliest tokens; 0 for all.
    pub top_k: usize,
    /// Seed of the choice.
    pub seed: u64,
    /// Go on after the end-of-text token.
    pub ignore_eos: bool,
    /// Type to compute in.
    pub compute: crate::scene::Compute,
    /// What the model is on.
    pub device: kernels::device::Device,
    /// Who is told.
    pub progress: Arc<dyn Progress>,
}

/// What a generation came to.
#[derive(Clone, Debug, Serialize)]
pub struct GenerateReport {
    /// Generated text, without the prompt.
    pub text: String,
    /// Generated token ids.
    pub tokens: Vec<u32>,
    /// Tokens of the prompt.
    pub num_prompt_tokens: usize,
    /// Time to the first generated token.
    pub first_token_secs: f64,
    /// Generated tokens after the first over their time.
    pub tokens_per_sec: f64,
    /// Bytes of cache a token takes.
    pub cache_bytes_per_token: u64,
    /// `length` or `stop`.
    pub finish_reason: String,
    /// How the weights were read, and what they take.
    pub weights: WeightsReport,
}

/// `hadal bench train --scene SCENE`.
pub struct BenchRequest {
    /// The scene, checked.
    pub loaded: Loaded,
    /// Leave MTP modules out, for peers that have none.
    pub no_mtp: bool,
    /// Measured steps, after two that are not.
    pub num_steps: u64,
    /// Generated tokens.
    pub num_generated_tokens: usize,
    /// Who is told.
    pub progress: Arc<dyn Progress>,
}

/// Time of the tasks of one kind in a step.
#[derive(Clone, Debug, Serialize)]
pub struct KindReport {
    /// Kind.
    pub kind: String,
    /// Tasks in a step.
    pub num_tasks: u64,
    /// Their time in a step, median over the steps.
    pub secs: f64,
    /// Share of the step.
    pub share: f64,
    /// Floating-point operations per second reached.
    pub gflops_per_sec: f64,
}

/// What a benchmark came to.
#[derive(Clone, Debug, Serialize)]
pub struct BenchReport {
    /// The model as a Hugging Face config.json.
    pub config: serde_json::Value,
    /// Parameters.
    pub num_params: u64,
    /// Parameters a token passes through.
    pub num_activated_params: u64,
    /// Tokens of a step.
    pub tokens_per_step: u64,
    /// Tokens of a sequence.
    pub seq_len: u64,
    /// Threads of the op pool.
    pub num_threads: usize,
    /// Tokens over the median step time.
    pub train_tokens_per_sec: f64,
    /// Median step time.
    pub step_secs: f64,
    /// Step time that no stream was busy, over step time, median.
    pub overhead_share: f64,
    /// Time by kind of task, longest first.
    pub kinds: Vec<KindReport>,
    /// Products of the step over its time.
    pub train_gflops_per_sec: f64,
    /// Best measured rate of a large product on all threads.
    pub peak_gemm_gflops_per_sec: f64,
    /// Generated tokens over the median time of one, batch 1, in the faster of f32 and bf16.
    pub generate_tokens_per_sec: f64,
    /// The same in f32.
    pub generate_f32_tokens_per_sec: f64,
    /// The same with weights and activations in bf16.
    pub generate_bf16_tokens_per_sec: f64,
    /// Generated tokens.
    pub generate_num_tokens: usize,
    /// Most resident memory of the process.
    pub peak_rss_bytes: u64,
}
