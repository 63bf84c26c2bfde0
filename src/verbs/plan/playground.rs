//! `hadal plan --schedule`: a pipeline schedule by itself, with costs that a person makes up. What comes out is what the
//! published tables are about: bubble and activations.

use std::{fs::File, io::Read, process::ExitCode, str::FromStr};

use serde::Serialize;
use systems::pipeline::{
    ScheduleKind,
    action::Schedule,
    formula,
    simulate::{CellCosts, RankTimes, Simulated, simulate},
    verify::verify,
};

use super::timeline;
use crate::{
    cli::PlanArgs,
    failure::Failure,
    report::{Output, Table, to_stdout},
    terminal, units,
};

/// Faults that are said; one cause often has hundreds.
const MAX_FAULTS: usize = 20;
/// A schedule file of more is none.
const MAX_FILE_BYTES: u64 = 64 << 20;
/// Columns before a value of the table.
const INDENT: usize = 12;
/// A cost of more is a mistake, and sums stay exact enough.
const MAX_COST: f64 = 1e9;

/// What a schedule comes to; times in the unit of the costs.
#[derive(Serialize)]
struct Report {
    schedule: String,
    /// Ranks.
    pp: usize,
    num_stages: u32,
    num_microbatches: u32,
    costs: Costs,
    makespan: f64,
    /// Idle over all time of all ranks.
    bubble_share: f64,
    /// The bubble by the published formula, where there is one.
    published_idle: Option<f64>,
    /// Whether it is that of the worst rank at these costs.
    published_idle_holds: Option<bool>,
    ranks: Vec<Rank>,
    /// Of each rank, as in `ranks`.
    idle: Vec<f64>,
    peak_activations: Vec<u32>,
}

#[derive(Serialize)]
struct Costs {
    f: f64,
    i: f64,
    w: f64,
    b: f64,
    fb: f64,
}

#[derive(Serialize)]
struct Rank {
    rank: usize,
    stages: Vec<u32>,
    idle: f64,
    /// The part of it between the rank's first and last action.
    idle_inside: f64,
    busy: f64,
    peak_activations: u32,
}

/// Builds or reads the schedule, and plays it.
///
/// # Errors
/// All that is wrong with the request or the schedule; or if the result cannot be written.
pub fn run(schedule: &str, args: &PlanArgs, output: &Output) -> Result<ExitCode, Failure> {
    let mut errors = Vec::new();
    if args.print && !output.is_text() {
        errors.push("--print and --json both write to stdout; give --json a file".into());
    }
    if !args.overrides.set.is_empty() {
        errors.push("--set changes a scene, and with --schedule there is none".into());
    }
    let costs = keep(args.costs.as_deref().map_or(Ok(CellCosts::new(1.0, 1.0, 1.0)), parse_costs), &mut errors);
    let built = keep(build(schedule, args), &mut errors);
    let (Some(costs), Some((schedule_name, kind, schedule)), true) = (costs, built, errors.is_empty()) else {
        return Err(Failure::usage(errors.join("\n"), "hadal plan --help has the schedules, and examples"));
    };
    let checked = verify(&schedule).map_err(|faults| {
        let said = faults.iter().take(MAX_FAULTS).map(|fault| format!("\n  {fault}")).collect::<String>();
        let more = faults.len().saturating_sub(MAX_FAULTS);
        let more = if more > 0 { format!("\n  and {more} more") } else { String::new() };
        let help = "each microbatch needs F, and B or both of I and W, once on each stage";
        Failure::usage(format!("{schedule_name} cannot run:{said}{more}"), help)
    })?;
    let simulated = simulate(&schedule, &checked, costs);
    let rank = |(rank, times): (usize, &RankTimes)| Rank {
        rank,
        stages: schedule.stages_of(rank),
        idle: times.idle,
        idle_inside: times.idle_inside,
        busy: times.busy,
        peak_activations: times.peak_activations,
    };
    let ranks: Vec<Rank> = simulated.ranks.iter().enumerate().map(rank).collect();
    let report = Report {
        pp: ranks.len(),
        num_stages: schedule.num_stages,
        num_microbatches: schedule.num_microbatches,
        costs: Costs { f: costs.f, i: costs.i, w: costs.w, b: costs.b, fb: costs.fb },
        makespan: simulated.makespan,
        bubble_share: simulated.bubble_share(),
        published_idle: kind.and_then(|kind| formula::bubble(kind, ranks.len() as u32, &costs)),
        published_idle_holds: kind.map(|kind| formula::holds(kind, &costs)),
        idle: ranks.iter().map(|rank| rank.idle).collect(),
        peak_activations: ranks.iter().map(|rank| rank.peak_activations).collect(),
        schedule: schedule_name,
        ranks,
    };
    if args.print {
        to_stdout(&schedule.to_text())?;
        output.write_json(&report)?;
    } else {
        output.result(&report, &text(&report, &schedule, &simulated))?;
    }
    Ok(ExitCode::SUCCESS)
}

/// Moves an error to the others.
fn keep<T>(result: Result<T, String>, errors: &mut Vec<String>) -> Option<T> {
    result.map_err(|error| errors.push(error)).ok()
}

/// The schedule with its name, and its kind if it is not read from a file.
fn build(name: &str, args: &PlanArgs) -> Result<(String, Option<ScheduleKind>, Schedule), String> {
    let is_file = name.contains(['/', '\\']) || name.ends_with(".txt") || std::path::Path::new(name).is_file();
    if is_file && ScheduleKind::from_str(name).is_err() {
        return Ok((name.to_owned(), None, read(name, args)?));
    }
    let missing = [("--pp N", "ranks", args.pp), ("--microbatches N", "microbatches", args.microbatches)];
    let missing = missing.iter().filter(|(.., value)| value.is_none());
    let mut errors: Vec<String> =
        missing.map(|(flag, what, _)| format!("{flag} is missing: the number of {what}")).collect();
    let kind = keep(name.parse::<ScheduleKind>().map_err(|e| e.to_string()), &mut errors);
    match (kind, args.pp, args.microbatches) {
        (Some(kind), Some(pp), Some(microbatches)) => {
            let schedule = kind.build(pp, microbatches).map_err(|e| e.to_string())?;
            Ok((kind.name(), Some(kind), schedule))
        }
        _ => Err(errors.join("\n")),
    }
}

fn read(path: &str, args: &PlanArgs) -> Result<Schedule, String> {
    let mut text = String::new();
    let read = File::open(path).and_then(|file| file.take(MAX_FILE_BYTES + 1).read_to_string(&mut text));
    read.map_err(|e| format!("cannot read the schedule {path}: {e}"))?;
    if text.len() as u64 > MAX_FILE_BYTES {
        return Err(format!("{path} is larger than {}: no schedule", units::bytes(MAX_FILE_BYTES)));
    }
    let schedule = Schedule::from_text(&text).map_err(|errors| {
        let mut said: Vec<String> =
            errors.to_string().lines().take(MAX_FAULTS).map(|line| format!("{path}: {line}")).collect();
        let more = errors.to_string().lines().count().saturating_sub(MAX_FAULTS);
        if more > 0 {
            said.push(format!("{path}: and {more} more"));
        }
        said.join("\n")
    })?;
    let found = [
        ("--pp", "ranks", args.pp, schedule.ranks.len() as u32),
        ("--microbatches", "microbatches", args.microbatches, schedule.num_microbatches),
    ];
    let differs = |(flag, what, asked, found): (&str, &str, Option<u32>, u32)| {
        let asked = asked.filter(|asked| *asked != found)?;
        Some(format!("{flag} {asked} is asked for, but {path} has {found} {what}"))
    };
    let errors: Vec<String> = found.into_iter().filter_map(differs).collect();
    if errors.is_empty() { Ok(schedule) } else { Err(errors.join("\n")) }
}

fn parse_costs(text: &str) -> Result<CellCosts, String> {
    const KEYS: [&str; 5] = ["f", "i", "w", "b", "fb"];
    let mut given = [None; KEYS.len()];
    let mut errors = Vec::new();
    for part in text.split(',').map(str::trim).filter(|part| !part.is_empty()) {
        let (key, value) = part.split_once('=').unwrap_or((part, ""));
        let Some(at) = KEYS.iter().position(|known| *known == key.trim()) else {
            errors.push(format!("--costs: there is no cost `{key}`; there are f, i, w, b and fb, as in f=1,i=1,w=1"));
            continue;
        };
        match value.trim().parse::<f64>() {
            Ok(cost) if (0.0..=MAX_COST).contains(&cost) && given[at].is_none() => given[at] = Some(cost),
            Ok(cost) if (0.0..=MAX_COST).contains(&cost) => errors.push(format!("--costs: `{key}` is given twice")),
            _ => errors.push(format!("--costs: `{key}` must be a number from 0 to {MAX_COST}, but is `{value}`")),
        }
    }
    if !errors.is_empty() {
        return Err(errors.join("\n"));
    }
    let [f, i, w] = [0, 1, 2].map(|at| given[at].unwrap_or(1.0));
    let b = given[3].unwrap_or(i + w);
    Ok(CellCosts { f, i, w, b, fb: given[4].unwrap_or(f + b) })
}

fn text(report: &Report, schedule: &Schedule, simulated: &Simulated) -> String {
    let Costs { f, i, w, b, fb } = report.costs;
    let worst = number(simulated.worst_idle());
    let does_not_hold =
        if report.published_idle_holds == Some(true) { "" } else { ", which does not hold at these costs" };
    let published = report
        .published_idle
        .map_or_else(String::new, |idle| format!("; {} by the formula{does_not_hold}", number(idle)));
    let share = 100.0 * report.bubble_share;
    let mut table = Table::default();
    let costs = [f, i, w, b, fb].map(number);
    table
        .row("costs", format!("F {}, I {}, W {}, B {}, F&B {}", costs[0], costs[1], costs[2], costs[3], costs[4]))
        .row("makespan", number(report.makespan))
        .row("bubble", format!("{share:.1}% of all time, {worst} on the worst rank{published}"))
        .row("ranks", ranks(&report.ranks));
    match timeline::draw(schedule, simulated, terminal::width().saturating_sub(INDENT)) {
        Some(lines) => table.row("timeline", format!("{}{}", timeline::LEGEND, lines.join("\n"))),
        None => table.row("timeline", "too long for this width"),
    };
    let title = format!(
        "{}: {} ranks, {} stages, {} microbatches",
        report.schedule, report.pp, report.num_stages, report.num_microbatches
    );
    table.render(&title)
}

/// A line a rank, in columns.
fn ranks(ranks: &[Rank]) -> String {
    let heads = ["rank", "idle", "busy", "peak activations", "stages"].map(str::to_owned);
    let row = |rank: &Rank| {
        let stages: Vec<String> = rank.stages.iter().map(u32::to_string).collect();
        let numbers = [rank.idle, rank.busy].map(number);
        let [idle, busy] = numbers;
        [rank.rank.to_string(), idle, busy, rank.peak_activations.to_string(), stages.join(" ")]
    };
    let rows: Vec<[String; 5]> = std::iter::once(heads).chain(ranks.iter().map(row)).collect();
    let widths = [0, 1, 2, 3].map(|column| rows.iter().map(|row| row[column].len()).max().unwrap_or_default());
    let line = |row: &[String; 5]| {
        let cells = widths.iter().zip(row).map(|(width, cell)| format!("{cell:>width$}  "));
        cells.chain([row[4].clone()]).collect::<String>()
    };
    rows.iter().map(line).collect::<Vec<_>>().join("\n")
}

/// With three decimals at most.
fn number(value: f64) -> String {
    let text = format!("{value:.3}");
    let text = text.trim_end_matches('0').trim_end_matches('.');
    // What rounds to nothing has no sign.
    if text == "-0" { "0".into() } else { text.into() }
}
