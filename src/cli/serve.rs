//! Arguments of `serve`, and what of them other verbs that serve share.

#[cfg(feature = "remote")]
use std::{
    net::{IpAddr, SocketAddr},
    path::PathBuf,
};

use clap::{Args, ValueEnum};
use systems::serve::{CacheFormat, HostOptions, Prefill};

use super::at_least;
#[cfg(feature = "remote")]
use super::{Overrides, PrecisionArg};

/// Arguments of `serve`.
#[cfg(feature = "remote")]
#[derive(Debug, Args)]
#[command(after_help = "\
It listens on this machine only unless --host says otherwise; then set a key. SIGTERM or Ctrl-C lets running answers end, for
--drain-secs at most; a second one ends at once.

Examples:
  hadal serve runs/quickstart/latest
  hadal serve scenes/quickstart.ron --port 0
  HADAL_API_KEY=secret hadal serve CHECKPOINT --host 0.0.0.0
  hadal serve runs/quickstart/latest --remote 127.0.0.1:0
  curl http://127.0.0.1:8000/v1/completions -H 'Content-Type: application/json' -d '{\"prompt\": \"Call me\"}'")]
pub struct ServeArgs {
    /// Hugging Face folder; or a scene, whose run's newest checkpoint is served
    pub source: PathBuf,
    #[command(flatten)]
    pub overrides: Overrides,
    /// Address to listen on
    #[arg(long, value_name = "ADDRESS", default_value = "127.0.0.1")]
    pub host: IpAddr,
    /// Port to listen on; 0 takes one that is free, and says which
    #[arg(long, value_name = "PORT", default_value_t = 8000)]
    pub port: u16,
    /// What clients must show as `Authorization: Bearer KEY`; better in the environment, where other users do not see it
    #[arg(long, value_name = "KEY", env = "HADAL_API_KEY", hide_env_values = true)]
    pub api_key: Option<String>,
    /// What the model is called; without it, the name of its folder
    #[arg(long, value_name = "NAME")]
    pub served_model_name: Option<String>,
    /// Jinja template of chats, in place of the checkpoint's
    #[arg(long, value_name = "FILE")]
    pub chat_template: Option<PathBuf>,
    /// Let pages from ORIGIN (https://host:port, or * for all) use the server; may be given again
    #[arg(long, value_name = "ORIGIN")]
    pub cors_origin: Vec<String>,
    /// Longest body of a request, in bytes
    #[arg(long, value_name = "BYTES", default_value_t = 4 << 20, value_parser = at_least::<1024>)]
    pub max_body_bytes: usize,
    /// Longest time of a request, in seconds
    #[arg(long, value_name = "SECS", default_value_t = 600, value_parser = at_least::<1>)]
    pub request_timeout_secs: usize,
    /// How long running answers may go on after SIGTERM, in seconds
    #[arg(long, value_name = "SECS", default_value_t = 30, value_parser = at_least::<0>)]
    pub drain_secs: usize,
    /// Before the names in /metrics; `vllm` makes them those of vLLM
    #[arg(long, value_name = "PREFIX", default_value = "hadal")]
    pub metrics_prefix: String,
    /// Let it be watched at ADDRESS (127.0.0.1:0 takes a free port), as by `hadal editor --attach`: its steps, and the numbers of each
    /// request, never a text. Who has the token may pause and stop it
    #[arg(long, value_name = "ADDRESS")]
    pub remote: Option<SocketAddr>,
    /// Where remote.json and remote.token (mode 0600) are while it is watched; runs/serve/PORT, the port being that of --port, if not
    /// given
    #[arg(long, value_name = "DIR", requires = "remote")]
    pub remote_dir: Option<PathBuf>,
    #[command(flatten)]
    pub capacity: CapacityArgs,
    #[command(flatten)]
    pub precision: PrecisionArg,
}

/// How much a model serves at a time.
#[derive(Clone, Debug, Args)]
#[command(next_help_heading = "Capacity")]
pub struct CapacityArgs {
    /// Tokens of a prompt and its answer at most; the model's context, 8192 at most, if not given
    #[arg(long, value_name = "N", value_parser = at_least::<2>)]
    pub max_context: Option<usize>,
    /// Memory for the cache, in MiB; 1024 if not given
    #[arg(long, value_name = "MIB", value_parser = at_least::<1>)]
    pub cache_mib: Option<usize>,
    /// Tokens of a step at most, prompts and answers together
    #[arg(long, value_name = "N", value_parser = at_least::<1>, default_value_t = 512)]
    pub step_tokens: usize,
    /// Requests that are computed at a time at most
    #[arg(long, value_name = "N", value_parser = at_least::<1>, default_value_t = 64)]
    pub max_running: usize,
    /// Requests that wait at most; more are told to come again
    #[arg(long, value_name = "N", value_parser = at_least::<1>, default_value_t = 256)]
    pub max_queued: usize,
    /// Let the model's first MTP module propose tokens, which the next step tries: the same answers in fewer steps
    #[arg(long)]
    pub speculate: bool,
    /// What the cache is made of
    #[arg(long, value_name = "FORMAT", default_value = "compute")]
    pub cache: CacheArg,
    /// How latent attention computes prompts, on processors; GPUs go in latent space
    #[arg(long, value_name = "WAY", default_value = "absorbed")]
    pub prefill: PrefillArg,
}

/// What a cache is made of.
#[derive(Clone, Copy, Debug, ValueEnum)]
pub enum CacheArg {
    /// What the model computes in
    Compute,
    /// Latents in E4M3 with a scale for each 128 numbers, rotated keys in bfloat16; for latent attention only
    Fp8,
}

/// How prompts are computed.
#[derive(Clone, Copy, Debug, ValueEnum)]
pub enum PrefillArg {
    /// In latent space: an answer does not depend on the requests beside it
    Absorbed,
    /// With keys and values where that is less work: quicker for long prompts, whose last bits then depend on where steps cut them
    ByCost,
}

impl From<&CapacityArgs> for HostOptions {
    fn from(args: &CapacityArgs) -> Self {
        HostOptions {
            max_context: args.max_context,
            cache_bytes: args.cache_mib.map(|mib| (mib as u64) << 20),
            step_tokens: Some(args.step_tokens),
            max_running: Some(args.max_running),
            max_queued: Some(args.max_queued),
            speculate: args.speculate,
            cache: match args.cache {
                CacheArg::Compute => CacheFormat::Compute,
                CacheArg::Fp8 => CacheFormat::Fp8,
            },
            prefill: match args.prefill {
                PrefillArg::Absorbed => Prefill::Absorbed,
                PrefillArg::ByCost => Prefill::ByCost,
            },
        }
    }
}
