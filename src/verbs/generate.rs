//! `hadal generate`: a text goes on, as it comes; or the texts of a file do, together.

use std::{
    fs::{self, File},
    io::{BufWriter, Write},
    path::Path,
    process::ExitCode,
    sync::Arc,
};

use serde::Serialize;
use systems::{
    api::GenerateRequest,
    generate,
    serve::{FinishReason, Host, HostOptions, HostRequest, Params, batch},
    session::SessionError,
};

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
    if let Some(prompts) = &args.prompts {
        return generate_all(&args, prompts, output);
    }
    let report = generate::generate(GenerateRequest {
        checkpoint: args.checkpoint,
        prompt: args.prompt.unwrap_or_default(),
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

/// A line of answers.
#[derive(Serialize)]
struct Answered<'a> {
    prompt: &'a str,
    text: &'a str,
    num_prompt_tokens: usize,
    num_cached_tokens: usize,
    num_generated_tokens: usize,
    finish_reason: FinishReason,
}

/// What answers to the prompts of a file came to.
#[derive(Serialize)]
struct Summary {
    num_prompts: usize,
    num_prompt_tokens: usize,
    num_generated_tokens: usize,
    secs: f64,
    generated_tokens_per_sec: f64,
}

fn generate_all(args: &GenerateArgs, file: &Path, output: &Output) -> Result<ExitCode, Failure> {
    let prompts = read_prompts(file)?;
    let mut out: Box<dyn Write> = match &args.out {
        Some(path) => {
            let file = File::create(path);
            Box::new(BufWriter::new(
                file.map_err(|e| Failure::runtime(format!("cannot write {}: {e}", path.display())))?,
            ))
        }
        None if output.is_text() => Box::new(std::io::stdout()),
        None => return Err(Failure::usage("--json takes stdout, and so do the answers", "name a file with --out")),
    };
    let host = Host::start(HostRequest {
        checkpoint: args.checkpoint.clone(),
        compute: args.precision.precision.into(),
        device: args.precision.device,
        options: HostOptions::from(&args.capacity),
        watch: None,
        progress: Arc::new(TextProgress { to_stdout: false }),
    })?;
    let params = Params {
        max_tokens: args.max_new_tokens,
        temperature: args.temperature,
        top_p: args.top_p,
        top_k: args.top_k,
        seed: args.seed,
        ignore_eos: args.ignore_eos,
        ..Params::default()
    };
    let begin = kernels::clock::now_nanos();
    let (mut num_prompt_tokens, mut num_generated_tokens) = (0, 0);
    batch::run(&host, &prompts, &params, |i, answer| {
        let Some(finish) = &answer.finish else { return Ok(()) };
        num_prompt_tokens += finish.num_prompt_tokens;
        num_generated_tokens += finish.num_generated_tokens;
        let line = Answered {
            prompt: &prompts[i],
            text: &answer.text,
            num_prompt_tokens: finish.num_prompt_tokens,
            num_cached_tokens: finish.num_cached_tokens,
            num_generated_tokens: finish.num_generated_tokens,
            finish_reason: finish.reason,
        };
        let line = serde_json::to_string(&line).map_err(SessionError::runtime)?;
        writeln!(out, "{line}").map_err(SessionError::runtime)
    })?;
    out.flush().map_err(|e| Failure::runtime(format!("cannot write the answers: {e}")))?;
    host.finish()?;
    let secs = (kernels::clock::now_nanos() - begin) as f64 * 1e-9;
    let generated_tokens_per_sec = num_generated_tokens as f64 / secs.max(1e-9);
    eprintln!(
        "{} prompts of {} tokens, {} generated in {}, {generated_tokens_per_sec:.1} tokens/s",
        prompts.len(),
        units::grouped(num_prompt_tokens as u64),
        units::grouped(num_generated_tokens as u64),
        units::duration(secs),
    );
    let num_prompts = prompts.len();
    output.write_json(&Summary {
        num_prompts,
        num_prompt_tokens,
        num_generated_tokens,
        secs,
        generated_tokens_per_sec,
    })?;
    Ok(ExitCode::SUCCESS)
}

/// JSONL with `prompt`, or a prompt a line.
fn read_prompts(file: &Path) -> Result<Vec<String>, Failure> {
    let text = fs::read_to_string(file)
        .map_err(|e| Failure::usage(format!("cannot read {}: {e}", file.display()), "name a file of prompts"))?;
    let is_jsonl = file.extension().is_some_and(|extension| extension == "jsonl" || extension == "json");
    let prompts = text.lines().enumerate().filter(|(_, line)| !line.trim().is_empty()).map(|(i, line)| {
        if !is_jsonl {
            return Ok(line.to_owned());
        }
        let prompt = serde_json::from_str::<serde_json::Value>(line).ok();
        let prompt = prompt.and_then(|value| Some(value.get("prompt")?.as_str()?.to_owned()));
        let found = format!("{}:{}: expected an object with a text `prompt`; found {line}", file.display(), i + 1);
        prompt.ok_or_else(|| Failure::usage(found, "a line is {\"prompt\": \"Call me\"}"))
    });
    prompts.collect()
}
