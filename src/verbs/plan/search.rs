//! `hadal plan SCENE --search`: which layouts of as many ranks are fast, which are cheap, and which do not fit.

use std::{
    process::ExitCode,
    sync::atomic::{AtomicUsize, Ordering},
};

use indicatif::ProgressBar;
use systems::plan::{
    PlanRequest,
    search::{Candidate, search},
};

use crate::{failure::Failure, report::Output, units};

/// Lines of the table.
const MOST_LINES: usize = 12;

/// Searches.
///
/// # Errors
/// If a figure of the device is missing.
pub fn run(request: &PlanRequest, most: usize, output: &Output) -> Result<ExitCode, Failure> {
    let bar = ProgressBar::new(most as u64);
    // Where no bar can be drawn, a line for each tenth.
    let tenths = AtomicUsize::new(0);
    let report = search(request, most, |done, all| {
        bar.set_length(all as u64);
        bar.set_position(done as u64);
        let tenth = 10 * done / all.max(1);
        if bar.is_hidden() && tenths.fetch_max(tenth, Ordering::Relaxed) < tenth {
            eprintln!("{done} of {all} layouts planned");
        }
    })?;
    bar.finish_and_clear();
    let mut text = format!(
        "{} layouts planned, {} fit; {} more cannot be, for their numbers\n\n{}\n",
        report.num_planned,
        report.candidates.len(),
        report.num_impossible,
        HEAD
    );
    for candidate in report.candidates.iter().take(MOST_LINES) {
        text += &line(candidate);
    }
    let cheapest = report.candidates.iter().filter(|candidate| candidate.usd_per_trillion_tokens.is_some());
    let price = |candidate: &&Candidate| candidate.usd_per_trillion_tokens.unwrap_or(f64::INFINITY);
    if let Some(cheapest) = cheapest.min_by(|a, b| price(a).total_cmp(&price(b))) {
        text += &format!("\ncheapest: {}\n", describe(cheapest));
    }
    if let Some(best) = report.candidates.first() {
        let sets = best.overrides(&request.loaded.scene).into_iter().map(|set| {
            // A shell takes brackets for its own.
            if set.contains(['(', '[']) { format!(" --set '{set}'") } else { format!(" --set {set}") }
        });
        text += &format!("fastest, as overrides:{}\n", sets.collect::<String>());
    } else if let Some(nearest) = report.too_large.first() {
        text += &format!("\nnone fits; the nearest: {}\n", describe(nearest));
    }
    output.result(&report, &text)?;
    Ok(ExitCode::from(if report.candidates.is_empty() { 3 } else { 0 }))
}

const HEAD: &str = "   pp   ep   dp  schedule             seqs  recompute             step s   tokens/s    idle       peak   $/T tokens";

fn line(c: &Candidate) -> String {
    format!(
        "{:>5}{:>5}{:>5}  {:<20} {:>4}  {:<20} {:>7.3} {:>10} {:>6.1}% {:>10} {:>12}\n",
        c.pp,
        c.ep,
        c.dp,
        c.schedule,
        c.microbatch_sequences,
        c.recompute,
        c.step_secs,
        units::grouped(c.tokens_per_sec as u64),
        100.0 * c.idle_fraction,
        units::bytes(c.peak_bytes),
        c.usd_per_trillion_tokens.map_or("-".into(), |usd| units::grouped(usd as u64)),
    )
}

/// In a line of text.
pub fn describe(c: &Candidate) -> String {
    format!(
        "pp {} ep {} dp {}, {}, {} sequences a microbatch, recompute {}: {:.3} s a step, {} at the peak",
        c.pp,
        c.ep,
        c.dp,
        c.schedule,
        c.microbatch_sequences,
        c.recompute,
        c.step_secs,
        units::bytes(c.peak_bytes)
    )
}
