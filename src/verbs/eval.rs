//! `hadal eval`: the loss of a checkpoint on a text or on given tokens.

use std::{path::PathBuf, process::ExitCode, sync::Arc};

use systems::{
    api::{EvalInput, EvalRequest},
    probe,
};

use crate::{
    cli::EvalArgs,
    failure::Failure,
    progress::{self, TextProgress},
    report::{Output, Table},
    units,
};

/// Measures.
///
/// # Errors
/// If the checkpoint or the text cannot be used, or a file not be written.
pub fn eval(args: EvalArgs, output: &Output) -> Result<ExitCode, Failure> {
    let title = format!("{} on {}", args.checkpoint.display(), input(&args)?.1.display());
    let (logits, grads) = (args.logits.clone(), args.grads.clone());
    let report = probe::evaluate(EvalRequest {
        input: input(&args)?.0,
        checkpoint: args.checkpoint,
        logits: args.logits,
        grads: args.grads,
        seq_len: args.seq_len,
        compute: args.precision.precision.into(),
        device: args.precision.device,
        progress: Arc::new(TextProgress { to_stdout: false }),
    })?;
    let mut table = Table::default();
    table
        .row("loss", progress::loss(report.loss_nats_per_token, report.bits_per_byte))
        .row("perplexity", format!("{:.3} per token", report.perplexity))
        .row("tokens", units::grouped(report.num_tokens))
        .row("weights", units::bytes(report.weights.bytes))
        .maybe("logits", logits.map(|path| path.display().to_string()))
        .maybe("gradients", grads.map(|path| path.display().to_string()));
    output.result(&report, &table.render(&title))?;
    Ok(ExitCode::SUCCESS)
}

fn input(args: &EvalArgs) -> Result<(EvalInput, &PathBuf), Failure> {
    match (&args.data, &args.tokens) {
        (Some(path), _) => Ok((EvalInput::Data(path.clone()), path)),
        (None, Some(path)) => Ok((EvalInput::Tokens(path.clone()), path)),
        // The parser has seen to this.
        (None, None) => Err(Failure::usage("nothing to measure on", "give --data or --tokens")),
    }
}
