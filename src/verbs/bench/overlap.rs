//! `hadal bench overlap`: how much of a layer's communication its computation hides on one device, beside DeepSeek's own trace.

use std::process::ExitCode;

use kernels::overlap::{self, Overlap, PUBLISHED_HIDDEN_SHARE, Request};
use serde::Serialize;

use super::tune::table;
use crate::{
    cli::BenchOverlapArgs,
    failure::Failure,
    report::{Output, Table},
    units,
};

#[derive(Serialize)]
struct Report {
    version: &'static str,
    date: String,
    device: String,
    runs: usize,
    shrink: usize,
    num_sms: u32,
    comm_sms: u32,
    compute_on_all_secs: f64,
    compute_secs: f64,
    comm_secs: f64,
    both_secs: f64,
    hidden_share: f64,
    /// DeepSeek's trace on an H800, not measured here.
    deepseek_h800_hidden_share: f64,
    compute_tflops_per_sec: f64,
    comm_bytes: u64,
    comm_gbytes_per_sec: f64,
    ops_on_host: u64,
    notes: Vec<String>,
}

fn notes(args: &BenchOverlapArgs, found: &Overlap) -> Vec<String> {
    let mut notes = vec![];
    let mut note = |holds: bool, text: &str| {
        if holds {
            notes.push(text.to_owned());
        }
    };
    note(args.on.shrink > 1, "sizes are divided: times say nothing of a layer of DeepSeek-V3");
    note(found.num_sms == 0, "processors: threads stand for streams, and no cores are set apart for the copies");
    note(found.num_sms > 0 && found.comm_sms == 0, "no multiprocessors are set apart for the copies");
    note(found.host_ops > 0, "some ops ran on the host, for want of a kernel");
    notes
}

/// Measures.
///
/// # Errors
/// If the device cannot be used, an op fails, or the report cannot be written.
pub fn overlap(args: &BenchOverlapArgs, output: &Output) -> Result<ExitCode, Failure> {
    let tuning = args.on.tuning.as_deref().map(table).transpose()?;
    let request =
        Request { device: args.on.device, runs: args.runs, shrink: args.on.shrink, comm_sms: args.comm_sms, tuning };
    let found = overlap::run(&request).map_err(Failure::runtime)?;
    let report = Report {
        version: env!("CARGO_PKG_VERSION"),
        date: engine::log::today(),
        device: args.on.device.to_string(),
        runs: args.runs,
        shrink: args.on.shrink,
        num_sms: found.num_sms,
        comm_sms: found.comm_sms,
        compute_on_all_secs: found.whole_secs,
        compute_secs: found.compute_secs,
        comm_secs: found.comm_secs,
        both_secs: found.both_secs,
        hidden_share: found.hidden_share(),
        deepseek_h800_hidden_share: PUBLISHED_HIDDEN_SHARE,
        compute_tflops_per_sec: found.flops as f64 / found.compute_secs.max(1e-12) * 1e-12,
        comm_bytes: found.comm_bytes,
        comm_gbytes_per_sec: found.comm_bytes as f64 / found.comm_secs.max(1e-12) * 1e-9,
        ops_on_host: found.host_ops,
        notes: notes(args, &found),
    };
    output.result(&report, &text(&report))?;
    Ok(ExitCode::SUCCESS)
}

fn text(report: &Report) -> String {
    let of = |sms: u32| {
        if report.num_sms == 0 { "threads".to_owned() } else { format!("{sms} of {} multiprocessors", report.num_sms) }
    };
    let rest = of(report.num_sms - report.comm_sms);
    let mut table = Table::default();
    table
        .row("computation", format!("{} on {}", units::duration(report.compute_on_all_secs), of(report.num_sms)))
        .row(
            "",
            format!("{} on {rest}, {:.1} TFLOP/s", units::duration(report.compute_secs), report.compute_tflops_per_sec),
        )
        .row(
            "copies",
            format!(
                "{} on {}, {} at {:.1} GB/s",
                units::duration(report.comm_secs),
                of(if report.comm_sms == 0 { report.num_sms } else { report.comm_sms }),
                units::bytes(report.comm_bytes),
                report.comm_gbytes_per_sec
            ),
        )
        .row("both", units::duration(report.both_secs))
        .row(
            "hidden",
            format!(
                "{:.1}% of the copies' time; {:.1}% of communication in DeepSeek's trace on H800",
                100.0 * report.hidden_share,
                100.0 * report.deepseek_h800_hidden_share
            ),
        );
    for note in &report.notes {
        table.row("note", note.clone());
    }
    table.render(&format!(
        "bench overlap, {}: a layer's F beside another microbatch's I and W, median of {}",
        report.device, report.runs
    ))
}
