//! `hadal generate`: a text goes on, as it comes.

use std::{process::ExitCode, sync::Arc};

use systems::{api::GenerateRequest, generate};

use crate::{
    cli::GenerateArgs,
    failure::Failure,
    progress::TextProgress,
    report::{self, Output},
    units,
};

/// Generates.
///
/// # Errors
/// If the checkpoint cannot be used.
pub fn generate(args: GenerateArgs, output: &Output) -> Result<ExitCode, Failure> {
    let report = generate::generate(GenerateRequest {
        checkpoint: args.checkpoint,
        prompt: args.prompt,
        max_new_tokens: args.max_new_tokens,
        temperature: args.temperature,
        top_p: args.top_p,
        top_k: args.top_k,
        seed: args.seed,
        ignore_eos: args.ignore_eos,
        compute: args.precision.precision.into(),
        device: args.precision.device,
        progress: Arc::new(TextProgress { to_stdout: output.is_text() }),
    })?;
    if output.is_text() && !report.text.ends_with('\n') {
        report::to_stdout("\n")?;
    }
    eprintln!(
        "{} prompt tokens, {} generated ({}); first after {}, then {:.1} tokens/s; weights {}, cache {} per token",
        report.num_prompt_tokens,
        report.tokens.len(),
        report.finish_reason,
        units::duration(report.first_token_secs),
        report.tokens_per_sec,
        units::bytes(report.weights.bytes),
        units::bytes(report.cache_bytes_per_token),
    );
    output.write_json(&report)?;
    Ok(ExitCode::SUCCESS)
}
