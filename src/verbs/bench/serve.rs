//! `hadal bench serve`: what a load of requests gets from a model.

use std::{process::ExitCode, sync::Arc};

use systems::serve::{
    Host, HostOptions, HostRequest,
    load::{self, Load, LoadReport, Percentiles},
};

use crate::{
    cli::BenchServeArgs,
    failure::Failure,
    load::checkpoint,
    progress::TextProgress,
    report::{Output, Table},
    units,
};

/// Puts a load on a model.
///
/// # Errors
/// If the checkpoint cannot be used, or the model fails.
pub fn serve(args: &BenchServeArgs, output: &Output) -> Result<ExitCode, Failure> {
    let host = Host::start(HostRequest {
        checkpoint: checkpoint(&args.source, &args.overrides.set)?,
        compute: args.precision.precision.into(),
        device: args.precision.device,
        options: HostOptions::from(&args.capacity),
        progress: Arc::new(TextProgress { to_stdout: false }),
        watch: None,
    })?;
    let load = Load {
        num_requests: args.requests,
        rate: args.rate,
        concurrency: args.concurrency,
        prompt_tokens: args.prompt_tokens,
        new_tokens: args.new_tokens,
        shared_tokens: args.shared_tokens,
        seed: args.seed,
    };
    let report = load::run(&host, &load)?;
    host.finish()?;
    output.result(&report, &table(&report).render(&format!("bench serve {}", args.source.display())))?;
    Ok(ExitCode::SUCCESS)
}

fn table(report: &LoadReport) -> Table {
    let percentiles = |p: &Percentiles| {
        let [p50, p90, p99] = [p.p50, p.p90, p.p99].map(units::duration);
        format!("median {p50}, 90% below {p90}, 99% below {p99}")
    };
    let (latent, plain) = (report.cache_bytes_per_token, report.mha_cache_bytes_per_token);
    let mut table = Table::default();
    table
        .row(
            "answered",
            format!(
                "{} requests in {}, {} prompt and {} generated tokens, {} steps",
                units::grouped(report.num_requests as u64),
                units::duration(report.secs),
                units::grouped(report.num_prompt_tokens as u64),
                units::grouped(report.num_generated_tokens as u64),
                units::grouped(report.num_steps),
            ),
        )
        .row(
            "throughput",
            format!(
                "{} generated tokens/s, {} with prompts",
                units::grouped(report.generated_tokens_per_sec as u64),
                units::grouped(report.total_tokens_per_sec as u64)
            ),
        )
        .row("first token", percentiles(&report.first_token_secs))
        .row("between tokens", percentiles(&report.inter_token_secs))
        .row("prefix cache", format!("{:.1}% of prompt tokens were there", 100.0 * report.cache_hit_share))
        .maybe(
            "speculation",
            report.acceptance_share.map(|share| format!("{:.1}% of drafts were right", 100.0 * share)),
        )
        .row(
            "cache",
            format!(
                "{} a token; plain multi-head attention would take {}, {:.1} times as much; {} requests preempted",
                units::bytes(latent),
                units::bytes(plain),
                plain as f64 / latent.max(1) as f64,
                report.num_preemptions,
            ),
        );
    table
}
