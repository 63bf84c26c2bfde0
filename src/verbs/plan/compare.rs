//! `hadal plan SCENE --compare`: what a schedule and what overlapping is worth, at the scene's layout and over numbers of
//! microbatches. Every line is a plan; nothing else differs between lines.

use std::process::ExitCode;

use serde::Serialize;
use systems::plan::{
    PlanRequest,
    compare::{Limit, Line, compare, limits},
};

use crate::{failure::Failure, report::Output, units};

#[derive(Serialize)]
struct Report {
    lines: Vec<Line>,
    limits: Vec<Limit>,
}

/// Compares.
///
/// # Errors
/// If a plan fails.
pub fn run(request: &PlanRequest, output: &Output) -> Result<ExitCode, Failure> {
    let lines = compare(request)?;
    let mut text = String::from(
        "idle: share of a step in which a device computes nothing, mean over the ranks\n\n\
         microbatches  schedule    overlap   step s     idle   of it waiting for transfers   tokens/s       peak\n",
    );
    for line in &lines {
        text += &format!(
            "{:>12}  {:<10} {:>8} {:>8.3} {:>7.1}% {:>29.1}% {:>10} {:>10}\n",
            line.num_microbatches_per_rank,
            line.schedule,
            if line.overlap { "yes" } else { "no" },
            line.step_secs,
            100.0 * line.idle_fraction,
            100.0 * line.transfer_fraction,
            units::grouped(line.tokens_per_sec as u64),
            units::bytes(line.peak_bytes),
        );
    }
    let limits = limits(&lines);
    for Limit { schedule, overlap, idle_fraction } in &limits {
        let overlap = if *overlap { "yes" } else { "no" };
        text +=
            &format!("{:>12}  {schedule:<10} {overlap:>8} {:>8} {:>7.1}%\n", "ever more", "", 100.0 * idle_fraction);
    }
    text += "\n";
    text += &named(&lines, "30% idle or more", |line| line.idle_fraction >= 0.30);
    text += &named(&lines, "less than 5% idle", |line| line.idle_fraction < 0.05);
    output.result(&Report { lines, limits }, &text)?;
    Ok(ExitCode::SUCCESS)
}

/// The plans for which something holds; where it holds for none, the nearest at both ends.
fn named(lines: &[Line], what: &str, holds: impl Fn(&Line) -> bool) -> String {
    let name = |line: &Line| {
        let overlap = if line.overlap { " overlapped" } else { "" };
        format!("{}{overlap} at {} ({:.1}%)", line.schedule, line.num_microbatches_per_rank, 100.0 * line.idle_fraction)
    };
    let found: Vec<String> = lines.iter().filter(|line| holds(line)).map(name).collect();
    if !found.is_empty() {
        return format!("{what}: {}\n", found.join(", "));
    }
    let by_idle = |a: &&Line, b: &&Line| a.idle_fraction.total_cmp(&b.idle_fraction);
    let least = lines.iter().min_by(by_idle).map(name).unwrap_or_default();
    let most = lines.iter().max_by(by_idle).map(name).unwrap_or_default();
    format!("{what}: none here; from {least} to {most}\n")
}
