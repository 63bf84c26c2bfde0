//! Arguments of `hadal status`.

use clap::Args;

use super::Json;

/// Arguments of `status`.
#[derive(Debug, Args)]
pub struct StatusArgs {
    /// Where the run listens, as it says when it starts: http://HOST:PORT
    #[arg(value_name = "URL")]
    pub url: String,
    /// The run's token, which an address that other machines reach wants; in remote.token in its folder
    #[arg(long, env = "HADAL_TOKEN", hide_env_values = true)]
    pub token: Option<String>,
    /// Seconds to wait: an answer waits for the step at hand
    #[arg(long, value_name = "SECS", default_value_t = 30)]
    pub timeout_secs: u32,
    #[command(flatten)]
    pub json: Json,
}
