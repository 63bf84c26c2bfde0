//! Arguments of `bench`: a verb with verbs of its own.

use std::path::PathBuf;

use clap::{Args, Subcommand};

use super::{Json, Overrides, at_least};

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
    /// Steps under each pipeline schedule on local ranks, beside what a plan predicts that was calibrated on one of them
    Schedules(BenchSchedulesArgs),
}

/// Arguments of `bench kernels`.
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  hadal bench kernels --device cuda:0 --json -
  hadal bench kernels --device cuda:0 --tune h200.ron
  hadal bench kernels --device cuda:0 --tuning h200.ron")]
pub struct BenchKernelsArgs {
    /// Device: cpu, cuda:0
    #[arg(long, value_name = "DEVICE", default_value = "cuda:0")]
    pub device: kernels::device::Device,
    /// Runs whose median is taken, after two that are not counted
    #[arg(long, value_name = "N", default_value_t = 20, value_parser = at_least::<1>)]
    pub runs: usize,
    /// Divide all sizes by this: for interpreters, whose times mean nothing
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = at_least::<1>)]
    pub shrink: usize,
    /// Time every tile of every product instead, and write which is the quickest of each
    #[arg(long, value_name = "FILE", conflicts_with = "tuning")]
    pub tune: Option<PathBuf>,
    /// Give products the tiles of such a file
    #[arg(long, value_name = "FILE")]
    pub tuning: Option<PathBuf>,
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
    /// Device: cpu, cuda:0
    #[arg(long, value_name = "DEVICE", default_value = "cuda:0")]
    pub device: kernels::device::Device,
    /// Pairs whose median is taken, after two that are not counted
    #[arg(long, value_name = "N", default_value_t = 10, value_parser = at_least::<1>)]
    pub runs: usize,
    /// Divide all sizes by this: for interpreters, whose times mean nothing
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = at_least::<1>)]
    pub shrink: usize,
    /// Multiprocessors for communication; without it 20 of 132, in proportion
    #[arg(long, value_name = "N")]
    pub comm_sms: Option<u32>,
    /// Give products the tiles of a file that `bench kernels --tune` wrote
    #[arg(long, value_name = "FILE")]
    pub tuning: Option<PathBuf>,
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
