//! What can be typed: verbs and their arguments. The texts here are the `--help` pages.

mod bench;
#[cfg(feature = "editor")]
mod editor;
mod launch;
mod serve;
#[cfg(feature = "remote")]
mod status;

use std::path::{Path, PathBuf};

use clap::{ArgGroup, Args, Parser, Subcommand, ValueEnum};
use systems::{hf::write::SaveDtype, scene::Compute};

#[cfg(feature = "remote")]
pub use self::{serve::ServeArgs, status::StatusArgs};
pub use bench::{
    Bench, BenchArgs, BenchHardwareArgs, BenchKernelsArgs, BenchOverlapArgs, BenchSchedulesArgs, BenchServeArgs,
    BenchTrainArgs,
};
#[cfg(feature = "editor")]
pub use editor::{EditorArgs, EditorTheme};
pub use launch::{K8sArgs, LaunchArgs, Launcher, Mpi, Placed, SlurmArgs, slurm_secs};
pub use serve::CapacityArgs;

use crate::{units, verbs::ExpertsArgs};

const EXAMPLES: &str = "\
Examples:
  hadal run scenes/quickstart.ron
  hadal run scenes/quickstart.ron --set train.steps=50 --set name='\"short\"'
  hadal check scenes/deepseek_v3.ron
  hadal generate runs/quickstart/latest --prompt 'Call me'

Exit codes:
  0 ok, 1 error at run time, 2 wrong usage or scene, 3 does not fit, 4 diverged, 5 peer lost, 6 budget reached,
  130 or 143 stopped by SIGINT, or by SIGTERM, SIGUSR1 or SIGUSR2, after a checkpoint";

/// Trains and runs DeepSeek-style mixture-of-experts language models from one file, a scene.
#[derive(Debug, Parser)]
#[command(name = "hadal", version, after_help = EXAMPLES, max_term_width = 100)]
pub struct Cli {
    /// What to do.
    #[command(subcommand)]
    pub verb: Verb,
}

/// What to do.
#[derive(Debug, Subcommand)]
pub enum Verb {
    /// Train as a scene says: log, checkpoints and a sample go to runs/NAME
    Run(RunArgs),
    /// Write the file with which a cluster runs a scene: for Slurm, or for Kubernetes
    Launch(LaunchArgs),
    /// Say all that is wrong with a scene, or how large its model is; trains nothing
    Check(CheckArgs),
    /// Say how long a step would take on hardware that is not there, or how a pipeline schedule plays out
    Plan(PlanArgs),
    /// Measure the loss of a checkpoint on a text
    Eval(EvalArgs),
    /// Continue a text with a checkpoint
    Generate(GenerateArgs),
    /// Answer requests with a checkpoint over HTTP, as OpenAI's clients ask
    #[cfg(feature = "remote")]
    Serve(ServeArgs),
    /// Say how a run that listens stands, on one screen
    #[cfg(feature = "remote")]
    Status(StatusArgs),
    /// Write a checkpoint anew: in another number format, in other shards, out of FP8
    Convert(ConvertArgs),
    /// Open the window: routing and timeline of a run, a trace or a plan, live
    #[cfg(feature = "editor")]
    Editor(EditorArgs),
    /// Say what this machine has for Hadal
    Doctor(DoctorArgs),
    /// Measure speed
    Bench(BenchArgs),
}

impl Verb {
    /// Where the JSON document goes, if one is wanted.
    pub fn json(&self) -> Option<&Path> {
        let json = match self {
            Verb::Run(args) => &args.json,
            Verb::Launch(_) => return None,
            Verb::Check(args) => &args.json,
            Verb::Plan(args) => &args.json,
            Verb::Eval(args) => &args.json,
            Verb::Generate(args) => &args.json,
            #[cfg(feature = "remote")]
            Verb::Serve(_) => return None,
            #[cfg(feature = "remote")]
            Verb::Status(args) => &args.json,
            Verb::Convert(args) => &args.json,
            #[cfg(feature = "editor")]
            Verb::Editor(_) => return None,
            Verb::Doctor(args) => &args.json,
            Verb::Bench(BenchArgs { what: Bench::Train(args) }) => &args.json,
            Verb::Bench(BenchArgs { what: Bench::Hardware(args) }) => &args.json,
            Verb::Bench(BenchArgs { what: Bench::Kernels(args) }) => &args.json,
            Verb::Bench(BenchArgs { what: Bench::Overlap(args) }) => &args.json,
            Verb::Bench(BenchArgs { what: Bench::Serve(args) }) => &args.json,
            Verb::Bench(BenchArgs { what: Bench::Schedules(args) }) => &args.json,
        };
        json.json.as_deref()
    }
}

/// `--json`, the same for every verb.
#[derive(Debug, Args)]
pub struct Json {
    /// Write the result as one JSON document to FILE; `-`, or no FILE, is stdout, and then nothing else goes there
    #[arg(long, value_name = "FILE", num_args = 0..=1, default_missing_value = "-")]
    pub json: Option<PathBuf>,
}

/// `--set`, the same for every verb that takes a scene.
#[derive(Debug, Args)]
pub struct Overrides {
    /// Change a value of the scene, as in `--set train.steps=50`; may be given again
    #[arg(long, value_name = "PATH=RON")]
    pub set: Vec<String>,
}

/// Arguments of `run`.
#[derive(Debug, Args)]
#[command(after_help = "\
Ctrl-C stops with a checkpoint; so do SIGTERM, SIGUSR1 and SIGUSR2, by which schedulers ask a job to give way. The step at hand is
given up if it takes watchdog.finish_step_secs more (2 s). A second Ctrl-C or SIGTERM, half a second later or more, stops at once.

Ranks of the scene's mesh are threads of one process, or one process each where a launcher starts as many as there are ranks:
mpiexec or srun, known by RANK and WORLD_SIZE, or by the variables of Slurm, PMI or Open MPI, first come first. They meet
through the first MPI library that loads; HADAL_MPI names another. Between GPUs, one for each process, NCCL moves gradients and tokens
if all find it; HADAL_NCCL names one, or is none. Two processes on one GPU need NCCL 2.30 and NCCL_MULTI_RANK_GPU_ENABLE=1.

Examples:
  hadal run scenes/quickstart.ron
  hadal run scenes/quickstart.ron --resume
  hadal run scenes/quickstart.ron --fresh --set schedule.peak_lr=1e-3 --json result.json
  mpiexec -n 4 hadal run scenes/cluster.ron")]
pub struct RunArgs {
    /// Scene file
    pub scene: PathBuf,
    #[command(flatten)]
    pub overrides: Overrides,
    /// Go on from the newest checkpoint of the run, if there is one
    #[arg(long, conflicts_with = "fresh")]
    pub resume: bool,
    /// Begin anew; an earlier run of this name is moved aside, not deleted
    #[arg(long)]
    pub fresh: bool,
    /// Which rank this process is, where no launcher's variables say so
    #[arg(long, value_name = "N", requires = "num_ranks")]
    pub rank: Option<u32>,
    /// How many processes there are
    #[arg(long, value_name = "N", requires = "rank")]
    pub num_ranks: Option<u32>,
    #[command(flatten)]
    pub json: Json,
}

/// Arguments of `check`.
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  hadal check scenes/deepseek_v3.ron
  hadal check scenes/quickstart.ron --set model.n_routed_experts=64 --json")]
pub struct CheckArgs {
    /// Scene file
    pub scene: PathBuf,
    #[command(flatten)]
    pub overrides: Overrides,
    #[command(flatten)]
    pub json: Json,
}

/// Arguments of `plan`.
#[derive(Debug, Args)]
#[command(after_help = "\
Schedules:
  gpipe, 1f1b, interleaved:CHUNKS, zb-h1 (or zb1p), zb-h2, zbv, dualpipe, dualpipev
  or a text file: one line a rank, actions such as 2F0 (forward of microbatch 0 on stage 2), 2I0, 2W0, 2B0 (input
  gradient, weight gradient, both), and 2F7&5B3 for a forward and a backward that overlap

Examples:
  hadal plan --schedule dualpipe --pp 8 --microbatches 20
  hadal plan --schedule zbv --pp 4 --microbatches 12 --costs f=1,i=1.2,w=0.8 --json
  hadal plan --schedule 1f1b --pp 4 --microbatches 8 --print > mine.txt
  hadal plan --schedule mine.txt")]
pub struct PlanArgs {
    /// Scene file; not with --schedule
    #[arg(conflicts_with_all = ["schedule", "experts"])]
    pub scene: Option<PathBuf>,
    #[command(flatten)]
    pub overrides: Overrides,
    /// Play a pipeline schedule without a scene: its name, or a text file
    #[arg(long, value_name = "NAME|FILE", conflicts_with = "experts")]
    pub schedule: Option<String>,
    /// Ranks of the pipeline
    #[arg(long, value_name = "N", requires = "schedule", conflicts_with = "scene")]
    pub pp: Option<u32>,
    /// Microbatches of a step
    #[arg(long, value_name = "N", requires = "schedule", conflicts_with = "scene")]
    pub microbatches: Option<u32>,
    /// What the passes of one stage cost, in any unit; not given are f=1,i=1,w=1, b=i+w, and fb=f+b for a pair
    #[arg(long, value_name = "f=T,i=T,w=T", requires = "schedule", conflicts_with = "scene")]
    pub costs: Option<String>,
    /// Write the schedule as text to stdout, and no table
    #[arg(long, requires = "schedule", conflicts_with = "scene")]
    pub print: bool,
    /// Device to plan for, as in scenes/hardware/; without it the scene's `plan.hardware`
    #[arg(long, value_name = "FILE", requires = "scene", conflicts_with_all = ["schedule", "experts"])]
    pub hardware: Option<PathBuf>,
    /// Correct the device's model by a trace of a run on it
    #[arg(long, value_name = "TRACE", requires = "scene", conflicts_with_all = ["schedule", "experts"])]
    pub calibrate: Option<PathBuf>,
    /// How tokens spread over experts: balanced, zipf:EXPONENT, or a run's log or folder
    #[arg(long, value_name = "LOAD", requires = "scene", conflicts_with_all = ["schedule", "experts"])]
    pub load: Option<String>,
    /// Write the step's timeline as a Chrome trace
    #[arg(long, value_name = "FILE", requires = "scene", conflicts_with_all = ["schedule", "experts", "search", "compare"])]
    pub trace: Option<PathBuf>,
    /// Rank layouts of as many ranks, at most N of them
    #[arg(long, value_name = "N", num_args = 0..=1, default_missing_value = "200", value_parser = at_least::<1>, requires = "scene", conflicts_with_all = ["schedule", "experts"])]
    pub search: Option<usize>,
    /// Compare schedules: without and with overlap, at the scene's layout and over numbers of microbatches
    #[arg(long, requires = "scene", conflicts_with_all = ["search", "schedule", "experts"])]
    pub compare: bool,
    #[command(flatten)]
    pub placement: ExpertsArgs,
    #[command(flatten)]
    pub json: Json,
}

/// Arguments of `eval`.
#[derive(Debug, Args)]
#[command(group = ArgGroup::new("input").required(true))]
#[command(after_help = "\
Examples:
  hadal eval runs/quickstart/latest --data scenes/data/moby-dick.txt
  hadal eval CHECKPOINT --tokens tokens.safetensors --logits logits.safetensors")]
pub struct EvalArgs {
    /// Hugging Face folder
    pub checkpoint: PathBuf,
    /// Text, tokenized with the checkpoint's tokenizer
    #[arg(long, value_name = "FILE", group = "input")]
    pub data: Option<PathBuf>,
    /// safetensors with an int64 tensor `input_ids` [batch, seq]
    #[arg(long, value_name = "FILE", group = "input")]
    pub tokens: Option<PathBuf>,
    /// Write f32 `logits` [batch, seq, vocab] to OUT; needs --tokens
    #[arg(long, value_name = "OUT", conflicts_with = "data")]
    pub logits: Option<PathBuf>,
    /// Write every parameter's gradient of the mean loss to OUT; needs --tokens
    #[arg(long, value_name = "OUT", conflicts_with = "data")]
    pub grads: Option<PathBuf>,
    /// Tokens of a sequence that --data is cut into
    #[arg(long, value_name = "N", default_value_t = 256, value_parser = at_least::<2>, conflicts_with = "tokens")]
    pub seq_len: usize,
    #[command(flatten)]
    pub precision: PrecisionArg,
    #[command(flatten)]
    pub json: Json,
}

/// Arguments of `generate`.
#[derive(Debug, Args)]
#[command(group = ArgGroup::new("what").required(true))]
#[command(after_help = "\
The text goes to stdout as it comes, the figures to stderr. Prompts of a file are computed together, and their answers are JSONL.

Examples:
  hadal generate runs/quickstart/latest --prompt 'Call me'
  hadal generate runs/quickstart/latest --prompt 'The whale' --temperature 0 --max-new-tokens 20
  hadal generate runs/quickstart/latest --prompts prompts.jsonl --out answers.jsonl")]
pub struct GenerateArgs {
    /// Hugging Face folder
    pub checkpoint: PathBuf,
    /// Text to continue
    #[arg(long, value_name = "TEXT", group = "what")]
    pub prompt: Option<String>,
    /// File with texts to continue: JSONL with `prompt` in each line, or, if its name does not end so, a text a line
    #[arg(long, value_name = "FILE", group = "what")]
    pub prompts: Option<PathBuf>,
    /// File for the answers of --prompts, a line of JSON each; without it, stdout
    #[arg(long, value_name = "FILE", requires = "prompts")]
    pub out: Option<PathBuf>,
    /// Tokens to generate at most
    #[arg(long, value_name = "N", default_value_t = 100, value_parser = at_least::<1>)]
    pub max_new_tokens: usize,
    /// How daring the choice is; 0 always takes the likeliest token
    #[arg(long, value_name = "T", default_value_t = 0.8, value_parser = temperature)]
    pub temperature: f64,
    /// Choose among the likeliest tokens that together have this probability
    #[arg(long, value_name = "P", default_value_t = 0.95, value_parser = probability)]
    pub top_p: f64,
    /// Choose among so many likeliest tokens; 0 for all
    #[arg(long, value_name = "N", default_value_t = 0)]
    pub top_k: usize,
    /// The same seed chooses the same tokens
    #[arg(long, value_name = "N", default_value_t = 1)]
    pub seed: u64,
    /// Go on after the end-of-text token
    #[arg(long)]
    pub ignore_eos: bool,
    #[command(flatten)]
    pub capacity: CapacityArgs,
    #[command(flatten)]
    pub precision: PrecisionArg,
    #[command(flatten)]
    pub json: Json,
}

/// Arguments of `convert`.
#[derive(Debug, Args)]
#[command(after_help = "\
Without --dtype every tensor keeps its format, except that FP8 becomes bf16. With --dtype fp8, what is FP8 in blocks of
128 x 128 keeps its codes.

Examples:
  hadal convert runs/quickstart/latest quickstart-bf16 --dtype bf16
  hadal convert runs/quickstart/latest quickstart-fp8 --dtype fp8
  hadal convert DeepSeek-V3 DeepSeek-V3-bf16 --shard-size 5GB")]
pub struct ConvertArgs {
    /// Hugging Face folder to read
    pub source: PathBuf,
    /// Folder to write; must hold no checkpoint yet
    pub destination: PathBuf,
    /// Number format of all weights
    #[arg(long, value_name = "FORMAT")]
    pub dtype: Option<Dtype>,
    /// Largest weight file, with a unit: kB, MB, GB (thousands) or KiB, MiB, GiB
    #[arg(long, value_name = "SIZE", default_value = "5GB", value_parser = units::parse_bytes)]
    pub shard_size: u64,
    #[command(flatten)]
    pub json: Json,
}

/// Arguments of `doctor`.
#[derive(Debug, Args)]
#[command(after_help = "\
With --device, each op runs on that device and on the CPU from the same inputs; exit code 1 if one is wrong.

Examples:
  hadal doctor
  hadal doctor --device cuda:0 --json -")]
pub struct DoctorArgs {
    /// Check what this device computes: cpu, cuda:0
    #[arg(long, value_name = "DEVICE")]
    pub device: Option<kernels::device::Device>,
    /// Small sizes only
    #[arg(long, requires = "device")]
    pub quick: bool,
    #[command(flatten)]
    pub json: Json,
}

/// `--precision` and `--device`.
#[derive(Debug, Args)]
pub struct PrecisionArg {
    /// Number format to compute in
    #[arg(long, value_name = "FORMAT", default_value = "f32")]
    pub precision: Precision,
    /// What to compute on: cpu, cuda:0
    #[arg(long, value_name = "DEVICE", default_value = "cpu")]
    pub device: kernels::device::Device,
}

/// A number format to compute in.
#[derive(Clone, Copy, Debug, ValueEnum)]
pub enum Precision {
    /// 32-bit floating point
    F32,
    /// bfloat16 with 32-bit accumulation
    Bf16,
    /// Products in 8 bits with a scale for each 128 numbers, other work in bfloat16
    Fp8,
    /// 64-bit floating point
    F64,
}

impl From<Precision> for Compute {
    fn from(precision: Precision) -> Self {
        match precision {
            Precision::F32 => Compute::F32,
            Precision::Bf16 => Compute::Bf16,
            Precision::Fp8 => Compute::Fp8,
            Precision::F64 => Compute::F64,
        }
    }
}

/// A number format to store weights in.
#[derive(Clone, Copy, Debug, ValueEnum)]
pub enum Dtype {
    /// 32-bit floating point
    F32,
    /// bfloat16
    Bf16,
    /// IEEE half precision
    F16,
    /// Linear layers in E4M3 with a factor for each 128 x 128 block, all else in bfloat16
    Fp8,
}

impl From<Dtype> for SaveDtype {
    fn from(dtype: Dtype) -> Self {
        match dtype {
            Dtype::F32 => SaveDtype::F32,
            Dtype::Bf16 => SaveDtype::Bf16,
            Dtype::F16 => SaveDtype::F16,
            Dtype::Fp8 => SaveDtype::Fp8,
        }
    }
}

fn at_least<const MIN: usize>(text: &str) -> Result<usize, String> {
    let value: usize = text.parse().map_err(|_| "expected a whole number".to_owned())?;
    if value < MIN { Err(format!("must be {MIN} or more")) } else { Ok(value) }
}

fn temperature(text: &str) -> Result<f64, String> {
    number(text, |value| value >= 0.0, "must be 0 or more")
}

fn probability(text: &str) -> Result<f64, String> {
    number(text, |value| value > 0.0 && value <= 1.0, "must be above 0 and at most 1")
}

fn number(text: &str, holds: impl Fn(f64) -> bool, message: &str) -> Result<f64, String> {
    let value: f64 = text.parse().map_err(|_| "expected a number".to_owned())?;
    if value.is_finite() && holds(value) { Ok(value) } else { Err(message.to_owned()) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory;

    #[test]
    fn the_command_line_is_consistent() {
        Cli::command().debug_assert();
    }

    #[test]
    fn what_parses_and_what_does_not() {
        let check = |parses: bool, line: &str| {
            let words = line.split(' ');
            assert_eq!(Cli::try_parse_from(words).is_ok(), parses, "{line}");
        };
        check(true, "hadal run s.ron --set a=1 --set b=2 --resume --json -");
        check(true, "hadal check s.ron --json");
        check(true, "hadal plan s.ron --set a=1");
        check(true, "hadal plan --schedule dualpipe --pp 8 --microbatches 20 --costs f=1,i=1,w=1,fb=3 --json -");
        check(true, "hadal eval c --data d --seq-len 128 --precision f64");
        check(true, "hadal eval c --tokens t --logits l --grads g");
        check(true, "hadal bench hardware --threads 2 --save this_cpu.ron");
        check(false, "hadal bench hardware --threads 0");
        check(true, "hadal bench train --scene s.ron --no-mtp --steps 3");
        // The scene must not be taken for the file that JSON goes to.
        check(false, "hadal check --json s.ron");
        check(false, "hadal run s.ron --resume --fresh");
        check(false, "hadal plan s.ron --schedule dualpipe");
        check(false, "hadal plan s.ron --pp 8");
        check(false, "hadal plan --schedule dualpipe --pp 8 --microbatches 16 --search 5");
        check(false, "hadal plan --schedule dualpipe --pp 8 --microbatches 16 --trace t.json");
        check(false, "hadal plan --experts l.json --load zipf:1");
        check(false, "hadal plan s.ron --search --trace t.json");
        check(false, "hadal plan s.ron --search 0");
        check(false, "hadal eval c");
        check(false, "hadal eval c --data d --tokens t");
        check(false, "hadal eval c --data d --logits l");
        check(false, "hadal eval c --data d --seq-len 1");
        check(false, "hadal generate c");
        check(false, "hadal generate c --prompt p --temperature -1");
        check(false, "hadal generate c --prompt p --top-p 0");
        #[cfg(feature = "editor")]
        for (parses, line) in [
            (true, "hadal editor"),
            (true, "hadal editor s.ron runs/a --run --view Routing --theme light"),
            (true, "hadal editor --attach http://127.0.0.1:1 --token t"),
            (true, "hadal editor s.ron --screenshot a.png --size 1280x720 --after 3"),
            (false, "hadal editor --run"),
            (false, "hadal editor --size 12"),
            (false, "hadal editor --after 3"),
        ] {
            check(parses, line);
        }
        check(false, "hadal convert a b --dtype f8");
        check(false, "hadal convert a b --shard-size 5");
        check(false, "hadal bench");
        check(false, "hadal rnu s.ron");
        check(true, "hadal launch slurm s.ron --nodes 2 --time 1-00:00:00 --partition gpu --spare-nodes 1 --out f");
        check(true, "hadal launch k8s s.ron --image i --claim c --set a=1");
        check(false, "hadal launch slurm s.ron --nodes 2 --ranks-per-node 2");
        check(false, "hadal launch slurm s.ron --signal-secs 0");
        check(false, "hadal launch k8s s.ron");
    }
}
