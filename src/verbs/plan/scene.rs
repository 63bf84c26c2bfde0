//! `hadal plan SCENE`: a step of a scene on a device that need not be here.

use std::{fs::File, io::BufWriter, path::Path, process::ExitCode};

use engine::{bubbles_table, calibrate, hardware::DeviceSpec, telemetry::Snapshot, trace::TraceWriter};
use systems::{
    on_gpu,
    placement::load::RoutingLoad,
    plan::{PlanReport, PlanRequest, Planned, plan, search},
    scene::{self, ScenePath},
    session::format_of,
};

use super::{compare, search as search_verb};
use crate::{
    cli::PlanArgs,
    failure::Failure,
    load,
    report::{Output, Table},
    units,
};

/// Exit code of a plan that does not fit.
const INFEASIBLE: u8 = 3;
/// Layouts looked at for one that fits.
const LAYOUTS_FOR_ADVICE: usize = 48;

/// Plans the step of a scene.
///
/// # Errors
/// If scene or hardware are not valid, or a figure is missing.
pub fn run(path: &Path, args: &PlanArgs, output: &Output) -> Result<ExitCode, Failure> {
    let checked = load::scene(path, &args.overrides.set, &["model"])?;
    let config = checked.model.clone();
    let mut config = config.ok_or_else(|| Failure::usage("the scene has no model", "add a section `model`"))?;
    if checked.loaded.scene.mtp.is_none() {
        config = config.without_mtp();
    }
    let section = checked.loaded.scene.plan.clone();
    let device = device(args, section.as_ref().and_then(|plan| plan.hardware.as_ref()), &checked.loaded.scene)?;
    let routing = match &args.load {
        Some(text) => routing_load(text)?,
        None => section.map(|plan| plan.load).unwrap_or_default(),
    };
    let request =
        PlanRequest { loaded: &checked.loaded, config, device, load: routing, with_spans: args.trace.is_some() };
    if let Some(most) = args.search {
        if let Some(note) = search::left_out(&checked.loaded.scene) {
            eprintln!("note: {note}");
        }
        return search_verb::run(&request, most, output);
    }
    if args.compare {
        return compare::run(&request, output);
    }
    let planned = plan(&request)?;
    if let Some(trace) = &args.trace {
        write_trace(trace, &planned)?;
    }
    output.result(&planned.report, &text(path, &planned))?;
    if planned.report.fits {
        return Ok(ExitCode::SUCCESS);
    }
    eprintln!("error: {}", too_large(&planned.report));
    let found = search::search(&request, LAYOUTS_FOR_ADVICE, |_, _| {})?;
    for candidate in found.candidates.iter().take(3) {
        eprintln!("  fits: {}", search_verb::describe(candidate));
    }
    if found.candidates.is_empty() {
        let nearest = found.too_large.first().map(search_verb::describe).unwrap_or_default();
        eprintln!("  no layout of {} was found that fits; the nearest: {nearest}", planned.report.num_ranks);
    }
    Ok(ExitCode::from(INFEASIBLE))
}

fn too_large(report: &PlanReport) -> String {
    let fullest = report.peak_bytes_per_rank.iter().max_by_key(|bytes| bytes.total);
    let (rank, total) = fullest.map_or((0, 0), |bytes| (bytes.rank, bytes.total));
    format!(
        "the plan does not fit: rank {rank} needs {} at its peak, a {} has {}",
        units::bytes(total),
        report.device,
        units::bytes(report.device_memory_bytes)
    )
}

fn device(args: &PlanArgs, named: Option<&ScenePath>, scene: &scene::Scene) -> Result<DeviceSpec, Failure> {
    let path = args.hardware.as_deref().or(named.map(|path| path.0.as_path()));
    let path = path.ok_or_else(|| {
        Failure::usage(
            "there is nothing to plan for: the scene names no hardware",
            "--hardware scenes/hardware/h800.ron, or `hadal bench hardware --save this_cpu.ron` for this machine",
        )
    })?;
    let mut device = scene::hardware::load(path, &[])?;
    on_gpu::plan_for(scene, &mut device)
        .map_err(|e| Failure::usage(e, "the hardware's own figure is used without `comm_sms`"))?;
    if let Some(trace) = &args.calibrate {
        let samples =
            calibrate::read_trace(trace).map_err(|e| Failure::usage(e, "trace_steps in a scene writes one"))?;
        let format = format_of(scene.precision.compute);
        device.corrections = calibrate::fit(&device, format, &samples).map_err(Failure::runtime)?;
    }
    Ok(device)
}

fn routing_load(text: &str) -> Result<RoutingLoad, Failure> {
    if text == "balanced" {
        return Ok(RoutingLoad::Balanced);
    }
    let Some(exponent) = text.strip_prefix("zipf:") else {
        return Ok(RoutingLoad::Replay { path: text.into(), steps: None });
    };
    let exponent = exponent.parse().map_err(|_| {
        Failure::usage(format!("expected an exponent after `zipf:`, found `{exponent}`"), "--load zipf:1.0")
    })?;
    Ok(RoutingLoad::Zipf { exponent, seed: 1 })
}

fn write_trace(path: &Path, planned: &Planned) -> Result<(), Failure> {
    let failed = |e: std::io::Error| Failure::runtime(format!("write {}: {e}", path.display()));
    let file = BufWriter::new(File::create(path).map_err(failed)?);
    let mut writer = TraceWriter::planned(file).map_err(failed)?;
    let end = planned.spans.iter().flatten().map(|span| span.end_nanos).max().unwrap_or(0);
    for spans in &planned.spans {
        let snapshot = Snapshot { spans: spans.clone().into(), interval_nanos: (0, end), ..Snapshot::default() };
        writer.push(&snapshot).map_err(failed)?;
    }
    writer.finish().map(drop).map_err(failed)
}

/// Seconds or milliseconds, with three decimals.
fn secs(secs: f64) -> String {
    if secs >= 1.0 { format!("{secs:.3} s") } else { format!("{:.3} ms", 1e3 * secs) }
}

/// For a person.
fn text(path: &Path, planned: &Planned) -> String {
    let report = &planned.report;
    let mut table = Table::default();
    let per_rank = report.num_microbatches_per_rank;
    table
        .row("device", format!("{} x {}", units::grouped(u64::from(report.num_ranks)), report.device))
        .row(
            "parameters",
            format!(
                "{} total, {} activated per token",
                units::count(report.num_params),
                units::count(report.num_activated_params)
            ),
        )
        .row(
            "a token",
            format!(
                "{} to train on, {} bytes of cache",
                units::metric(report.flops_per_token, "FLOP"),
                units::grouped(report.kv_bytes_per_token)
            ),
        )
        .row(
            "step",
            format!(
                "{} for {} tokens ({per_rank} microbatches a rank), {} tokens/s, MFU {:.1}%",
                secs(report.step_secs),
                units::grouped(report.tokens_per_step as u64),
                units::grouped(report.tokens_per_sec as u64),
                100.0 * report.mfu
            ),
        )
        .row(
            "a day",
            format!(
                "{} tokens; {:.1} K device hours for a trillion",
                units::count(report.tokens_per_day as u64),
                report.gpu_hours_per_trillion_tokens * 1e-3
            ),
        )
        .row(
            "idle",
            format!(
                "{} of a step ({:.1}%), mean over the ranks; from {:.1}% to {:.1}% of a rank",
                secs(report.bubble_secs),
                100.0 * report.idle_fraction,
                100.0 * report.idle_fraction_per_rank.iter().copied().fold(f64::INFINITY, f64::min),
                100.0 * report.idle_fraction_per_rank.iter().copied().fold(0.0, f64::max)
            ),
        )
        .row("memory", memory(report))
        .row(
            "links",
            format!(
                "{} a step and rank inside nodes, {} between them",
                units::bytes(report.link_bytes_per_step.intra_node),
                units::bytes(report.link_bytes_per_step.inter_node)
            ),
        );
    if report.load_max_over_mean > 1.0 {
        table.row("load", format!("the busiest rank has {:.2} times the mean", report.load_max_over_mean));
    }
    if let (Some(tokens), Some(run_secs)) = (report.num_tokens, report.run_secs) {
        let cost = report.cost_usd.map_or("no price".into(), |usd| format!("${}", units::count(usd as u64)));
        let energy = report.energy_kwh.map_or("no watts".into(), |kwh| units::metric(kwh * 1e3, "Wh"));
        let time =
            if run_secs < 86_400.0 { units::duration(run_secs) } else { format!("{:.1} days", run_secs / 86_400.0) };
        table.row("the run", format!("{} tokens: {time}, {cost}, {energy}", units::count(tokens as u64)));
    }
    for note in &report.notes {
        table.row("note", note.clone());
    }
    let mut text = table.render(&format!("plan of {}", path.display()));
    text.push('\n');
    text += &bubbles_table::table(&[("planned", &planned.accounting)]);
    text
}

fn memory(report: &PlanReport) -> String {
    let mut lines = vec![format!(
        "{:>6}  {:>10} {:>10} {:>10} {:>11} {:>13} {:>10}",
        "rank", "weights", "gradients", "optimizer", "activations", "communication", "peak"
    )];
    for bytes in &report.peak_bytes_per_rank {
        lines.push(format!(
            "{:>6}  {:>10} {:>10} {:>10} {:>11} {:>13} {:>10}",
            bytes.rank,
            units::bytes(bytes.weights),
            units::bytes(bytes.gradients),
            units::bytes(bytes.optimizer),
            units::bytes(bytes.activations),
            units::bytes(bytes.communication),
            units::bytes(bytes.total)
        ));
    }
    lines.join("\n")
}
