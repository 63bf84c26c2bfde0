//! `hadal bench`: how fast this machine trains and generates, where the time goes, and what its processors could do.

mod kernels;
mod overlap;
mod serve;
mod tune;

use std::{
    fs,
    process::ExitCode,
    sync::{Arc, atomic::AtomicUsize},
};

pub use kernels::kernels;
pub use overlap::overlap;
pub use serve::serve;
use systems::{
    api::{BenchReport, BenchRequest},
    bench::bench,
    bench_schedules::{self, SchedulesReport, SchedulesRequest},
    hardware::{HardwareRequest, measure},
    scene::{self, hardware::to_ron},
};

use crate::{
    cli::{BenchHardwareArgs, BenchSchedulesArgs, BenchTrainArgs},
    failure::Failure,
    load, machine,
    progress::TrainingProgress,
    report::{Output, Table},
    units,
};

/// Measures training and generation of a scene's model.
///
/// # Errors
/// If the scene is not valid, or the run fails.
pub fn train(args: BenchTrainArgs, output: &Output) -> Result<ExitCode, Failure> {
    let checked = load::scene(&args.scene, &args.overrides.set, &["model", "data", "train"])?;
    let progress = Arc::new(TrainingProgress::new(1, Arc::new(AtomicUsize::new(0))));
    let report = bench(BenchRequest {
        loaded: checked.loaded,
        no_mtp: args.no_mtp,
        num_steps: args.steps as u64,
        num_generated_tokens: args.generated_tokens,
        progress: Arc::clone(&progress) as _,
    });
    progress.finish();
    let report = report?;
    output.result(&report, &table(&report).render(&format!("bench train {}", args.scene.display())))?;
    Ok(ExitCode::SUCCESS)
}

/// Measures this machine's processors, and describes them as hardware.
///
/// # Errors
/// If a measurement fails, or the description cannot be written.
pub fn hardware(args: BenchHardwareArgs, output: &Output) -> Result<ExitCode, Failure> {
    let cpu = machine::cpu_model().unwrap_or_else(|| "an unknown CPU".into());
    let num_machine_threads = machine::num_threads().unwrap_or(1);
    let spec = measure(&HardwareRequest {
        name: args.name,
        num_threads: args.threads,
        num_machine_threads,
        memory_bytes: machine::memory_bytes().map_or(0, |(total, _)| total),
        measured_by: format!("measured by `hadal bench hardware` on {cpu}, {}", engine::log::today()),
    })?;
    let comment = format!(
        "{cpu}, {} of {num_machine_threads} threads, as measured. Prices, watts and other nodes are not known here: add them\n\
         for plans that need them.",
        spec.num_sms.value
    );
    let text = to_ron(&spec, &comment).map_err(Failure::runtime)?;
    match &args.save {
        Some(path) => {
            fs::write(path, &text).map_err(|e| Failure::runtime(format!("cannot write {}: {e}", path.display())))?;
            output.result(&spec, &format!("wrote {}", path.display()))?;
        }
        None => output.result(&spec, &text)?,
    }
    Ok(ExitCode::SUCCESS)
}

/// Compares predicted with measured steps of all schedules.
///
/// # Errors
/// If scene or hardware are not valid, or a step fails.
pub fn schedules(args: &BenchSchedulesArgs, output: &Output) -> Result<ExitCode, Failure> {
    let checked = load::scene(&args.scene, &args.overrides.set, &["model", "data", "train"])?;
    let device = scene::hardware::load(&args.hardware, &[])?;
    let progress = Arc::new(TrainingProgress::new(1, Arc::new(AtomicUsize::new(0))));
    let report = bench_schedules::bench(&SchedulesRequest {
        loaded: checked.loaded,
        device,
        num_steps: args.steps as u64,
        progress: Arc::clone(&progress) as _,
    });
    progress.finish();
    let report = report?;
    output.result(&report, &schedules_text(&report))?;
    Ok(ExitCode::SUCCESS)
}

fn schedules_text(report: &SchedulesReport) -> String {
    let mut text = format!(
        "{} ranks of {} threads, {} microbatches each; median of {} steps\n\n\
         schedule        predicted s   measured s  (from    to)    error   predicted idle   measured idle   difference\n",
        report.pp, report.num_threads_per_rank, report.num_microbatches_per_rank, report.num_steps
    );
    for line in &report.lines {
        let (from, to) = line.measured_step_secs_range;
        text += &format!(
            "{:<14} {:>12.4} {:>12.4}  ({from:.4} {to:.4}) {:>+6.1}% {:>15.1}% {:>14.1}% {:>+10.1} points{}\n",
            line.schedule,
            line.predicted_step_secs,
            line.measured_step_secs,
            100.0 * line.step_error(),
            100.0 * line.predicted_idle_fraction,
            100.0 * line.measured_idle_fraction,
            100.0 * line.idle_error(),
            if line.is_calibrated_on { "  calibrated on" } else { "" },
        );
    }
    text
}

fn table(report: &BenchReport) -> Table {
    let mut table = Table::default();
    let of_peak = 100.0 * report.train_gflops_per_sec / report.peak_gemm_gflops_per_sec;
    table
        .row(
            "parameters",
            format!("{}, {} activated", units::count(report.num_params), units::count(report.num_activated_params)),
        )
        .row("training", format!("{:.0} tokens/s on {} threads", report.train_tokens_per_sec, report.num_threads))
        .row(
            "step",
            format!(
                "{} for {} tokens in sequences of {}",
                units::duration(report.step_secs),
                units::grouped(report.tokens_per_step),
                units::grouped(report.seq_len),
            ),
        )
        .row(
            "products",
            format!(
                "{:.1} GFLOP/s, {of_peak:.0}% of the {:.1} of one large product",
                report.train_gflops_per_sec, report.peak_gemm_gflops_per_sec,
            ),
        )
        .row("idle", format!("{:.1}% of a step had no stream busy", 100.0 * report.overhead_share))
        .row(
            "generation",
            format!("{:.1} tokens/s over {} tokens", report.generate_tokens_per_sec, report.generate_num_tokens),
        )
        .row("memory", format!("{} at most", units::bytes(report.peak_rss_bytes)));
    let width = report.kinds.iter().map(|kind| kind.kind.len()).max().unwrap_or_default();
    for (i, kind) in report.kinds.iter().enumerate() {
        let line = format!(
            "{:width$}  {:>5.1}%  {:>8}  {:>4} tasks  {:>7.1} GFLOP/s",
            kind.kind,
            100.0 * kind.share,
            units::duration(kind.secs),
            kind.num_tasks,
            kind.gflops_per_sec,
        );
        table.row(if i == 0 { "time" } else { "" }, line);
    }
    table
}
