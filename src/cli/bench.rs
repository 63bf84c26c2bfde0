//! Arguments of `bench`: a verb with verbs of its own.

use std::path::PathBuf;

use clap::{Args, Subcommand};

use super::{CapacityArgs, Json, Overrides, PrecisionArg, at_least};

/// Arguments of `bench`.
#[derive(Debug, Args)]
pub struct BenchArgs {
    /// What to measure.
    #[command(subcommand)]
    pub what: Bench,
}

/// What to measure.
#[derive(Debug, Subcommand)]
pub enum Bench {
    /// Steps of training, and generation, of a scene's model with fresh weights
    Train(BenchTrainArgs),
    /// What this machine's processors do, as a description of hardware
    Hardware(BenchHardwareArgs),
    /// Ops on one device at DeepSeek's shapes, beside the fastest copy and the fastest product there
    Kernels(BenchKernelsArgs),
    /// How much of its communication a layer hides behind its computation on one device, with copies in place of sending
    Overlap(BenchOverlapArgs),
    /// A load of requests on a checkpoint: waiting times, throughput, use of the cache
    Serve(BenchServeArgs),
    /// Steps under each pipeline schedule on local ranks, beside what a plan predicts that was calibrated on one of them
    Schedules(BenchSchedulesArgs),
}

/// What kernels are measured on, and how.
#[derive(Debug, Args)]
pub struct OnDevice {
    /// Device: cpu, cuda:0
    #[arg(long, value_name = "DEVICE", default_value = "cuda:0")]
    pub device: kernels::device::Device,
    /// Divide all sizes by this: for interpreters, whose times mean nothing
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = at_least::<1>)]
    pub shrink: usize,
    /// Give products the tiles of a file that `hadal bench kernels --tune` wrote
    #[arg(long, value_name = "FILE")]
    pub tuning: Option<PathBuf>,
}

/// Arguments of `bench kernels`.
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  hadal bench kernels --device cuda:0 --json -
  hadal bench kernels --device cuda:0 --tune h200.ron
  hadal bench kernels --device cuda:0 --tuning h200.ron")]
pub struct BenchKernelsArgs {
    #[command(flatten)]
    pub on: OnDevice,
    /// Runs whose median is taken, after two that are not counted
    #[arg(long, value_name = "N", default_value_t = 20, value_parser = at_least::<1>)]
    pub runs: usize,
    /// Time every tile of every product instead, and write which is the quickest of each
    #[arg(long, value_name = "FILE", conflicts_with = "tuning")]
    pub tune: Option<PathBuf>,
    #[command(flatten)]
    pub json: Json,
}

/// Arguments of `bench overlap`.
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  hadal bench overlap --device cuda:0 --json overlap.json
  hadal bench overlap --device cuda:0 --comm-sms 24")]
pub struct BenchOverlapArgs {
    #[command(flatten)]
    pub on: OnDevice,
    /// Pairs whose median is taken, after two that are not counted
    #[arg(long, value_name = "N", default_value_t = 10, value_parser = at_least::<1>)]
    pub runs: usize,
    /// Multiprocessors for communication; without it 20 of 132, in proportion
    #[arg(long, value_name = "N")]
    pub comm_sms: Option<u32>,
    #[command(flatten)]
    pub json: Json,
}

/// Arguments of `bench schedules`.
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  hadal bench hardware --threads 1 --save this_core.ron
  hadal bench schedules --scene scenes/pipeline.ron --set mesh.pp=2 --hardware this_core.ron")]
pub struct BenchSchedulesArgs {
    /// Scene file
    #[arg(long)]
    pub scene: PathBuf,
    #[command(flatten)]
    pub overrides: Overrides,
    /// This machine, as `hadal bench hardware` with the threads of one rank describes it; calibration corrects it
    #[arg(long, value_name = "FILE")]
    pub hardware: PathBuf,
    /// Steps to measure of each schedule, after two that are not; the last 10 are kept
    #[arg(long, value_name = "N", default_value_t = 10, value_parser = at_least::<1>)]
    pub steps: usize,
    #[command(flatten)]
    pub json: Json,
}

/// Arguments of `bench hardware`.
#[derive(Debug, Args)]
pub struct BenchHardwareArgs {
    /// Name of the description
    #[arg(long, default_value = "this_cpu")]
    pub name: String,
    /// Threads of a rank; without it, as many as there are
    #[arg(long, value_name = "N", value_parser = at_least::<1>)]
    pub threads: Option<usize>,
    /// File to write the description to, such as scenes/hardware/this_cpu.ron; without it, stdout
    #[arg(long, value_name = "FILE")]
    pub save: Option<PathBuf>,
    #[command(flatten)]
    pub json: Json,
}

/// Arguments of `bench train`.
#[derive(Debug, Args)]
pub struct BenchTrainArgs {
    /// Scene file
    #[arg(long)]
    pub scene: PathBuf,
    #[command(flatten)]
    pub overrides: Overrides,
    /// Leave MTP modules out, to compare with programs that have none
    #[arg(long)]
    pub no_mtp: bool,
    /// Steps to measure, after two that are not
    #[arg(long, value_name = "N", default_value_t = 10, value_parser = at_least::<1>)]
    pub steps: usize,
    /// Tokens to generate
    #[arg(long, value_name = "N", default_value_t = 64, value_parser = at_least::<1>)]
    pub generated_tokens: usize,
    #[command(flatten)]
    pub json: Json,
}

/// Arguments of `bench serve`.
#[derive(Debug, Args)]
#[command(after_help = "\
Without --rate requests come as fast as --concurrency allows; with it at random times, whatever was answered.

Examples:
  hadal bench serve runs/quickstart/latest --concurrency 32
  hadal bench serve runs/quickstart/latest --rate 4 --prompt-tokens 16:256 --new-tokens 32:128 --shared-tokens 64")]
pub struct BenchServeArgs {
    /// Hugging Face folder; or a scene, whose run's newest checkpoint is served
    pub source: PathBuf,
    #[command(flatten)]
    pub overrides: Overrides,
    /// Requests
    #[arg(long, value_name = "N", default_value_t = 64, value_parser = at_least::<1>)]
    pub requests: usize,
    /// Requests a second on average, a Poisson process
    #[arg(long, value_name = "PER_SEC", value_parser = rate)]
    pub rate: Option<f64>,
    /// Requests at a time at most
    #[arg(long, value_name = "N", default_value_t = 32, value_parser = at_least::<1>)]
    pub concurrency: usize,
    /// Tokens of a prompt: as many, or from the first to the second, all as likely
    #[arg(long, value_name = "N or A:B", default_value = "64", value_parser = span)]
    pub prompt_tokens: (usize, usize),
    /// Tokens of an answer: likewise
    #[arg(long, value_name = "N or A:B", default_value = "64", value_parser = span)]
    pub new_tokens: (usize, usize),
    /// Tokens that all prompts begin with, besides
    #[arg(long, value_name = "N", default_value_t = 0)]
    pub shared_tokens: usize,
    /// Seed of the load
    #[arg(long, value_name = "N", default_value_t = 1)]
    pub seed: u64,
    #[command(flatten)]
    pub capacity: CapacityArgs,
    #[command(flatten)]
    pub precision: PrecisionArg,
    #[command(flatten)]
    pub json: Json,
}

fn span(text: &str) -> Result<(usize, usize), String> {
    let number = |text: &str| text.trim().parse::<usize>().ok().filter(|n| *n > 0);
    let pair = match text.split_once(':') {
        Some((low, high)) => number(low).zip(number(high)).filter(|(low, high)| low <= high),
        None => number(text).map(|n| (n, n)),
    };
    pair.ok_or_else(|| "expected a number of tokens as in 64, or a span as in 16:256".into())
}

fn rate(text: &str) -> Result<f64, String> {
    let rate = text.parse().ok().filter(|rate: &f64| *rate > 0.0 && rate.is_finite());
    rate.ok_or_else(|| "expected requests a second, above 0".into())
}
