//! `hadal run`: trains as a scene says, and sums up what came of it.

use std::{
    fs, io,
    path::{Path, PathBuf},
    process::ExitCode,
    sync::Arc,
};

use kernels::comm::Comm;
use systems::{
    api::{RunReport, RunRequest},
    measure::Links,
    rounding::{Lost, RoundingReport},
    run as training,
    scene::Watchdog,
    traffic::Traffic,
};

use super::peers::{agree, give_up, join, meet_on_gpus};
use crate::{
    cli::RunArgs,
    failure::Failure,
    load,
    progress::{self, TrainingProgress},
    report::{Output, Table},
    signals, units,
};

/// Runs.
///
/// # Errors
/// If the scene is not valid, an earlier run is in the way, or the run fails.
pub fn run(args: &RunArgs, output: &Output) -> Result<ExitCode, Failure> {
    let checked = load::scene(&args.scene, &args.overrides.set, &["model", "data", "train"]).map_err(Failure::from);
    // Others wait for a process whether or not it can run.
    let (ranks_per_node, max_secs) = match &checked {
        Ok(checked) => (checked.loaded.scene.mesh.ranks_per_node, checked.loaded.scene.watchdog.first_step_secs),
        Err(_) => (1, Watchdog::default().first_step_secs),
    };
    let comm = join(args, ranks_per_node, max_secs)?;
    if let Some(comm) = &comm {
        agree(comm, args, checked.as_ref())?;
    }
    let checked = checked?;
    let loaded = checked.loaded;
    if let Some(comm) = &comm {
        meet_on_gpus(comm, loaded.scene.device.into())?;
    }
    let has_experts = checked.model.is_some_and(|model| model.moe.is_some());
    let rank = comm.as_ref().map(Comm::rank);
    let leads = rank.is_none_or(|rank| rank == 0);
    if !args.resume && leads {
        make_room(&load::run_dir(&loaded.scene), args.fresh)
            .inspect_err(|_| give_up(comm.as_ref(), "it cannot begin"))?;
    }
    if let Some(comm) = &comm {
        let dump = load::run_dir(&loaded.scene).join(format!("lost-rank-{}.json", comm.rank()));
        comm.watch_over(loaded.scene.watchdog.limits(dump)).map_err(|e| Failure::from_peer(&e))?;
        comm.barrier().map_err(|lost| Failure::from_peer(&lost))?;
    }
    // After MPI has begun, which may take signals for its own.
    let stop = signals::listen().map_err(|e| Failure::runtime(format!("cannot listen to signals: {e}")))?;
    let log_every_steps = loaded.scene.telemetry.clone().unwrap_or_default().log_every_steps;
    let progress = Arc::new(TrainingProgress::new(log_every_steps, Arc::clone(&stop)));
    let name = loaded.scene.name.clone();
    let request = RunRequest {
        loaded,
        resume: args.resume,
        stop,
        progress: Arc::clone(&progress) as _,
        control: None,
        comm: comm.clone(),
    };
    let report = training::run(request);
    progress.finish();
    let report = report.inspect_err(|error| give_up(comm.as_ref(), &error.message))?;
    if !leads {
        if report.exit_code != 0 && report.exit_code < 128 {
            eprintln!("rank {}: {}", rank.unwrap_or_default(), report.exit_reason);
        }
        return Ok(ExitCode::from(report.exit_code));
    }
    let idle = report.idle.as_ref().map(|idle| format!("\n{}{}", idle.table(), links(&idle.links))).unwrap_or_default();
    let rounding = report.fp8_rounding.as_ref().map(rounding).unwrap_or_default();
    output.result(&report, &format!("{}{idle}{rounding}", summary(&name, has_experts, &report)))?;
    if (1..=5).contains(&report.exit_code) {
        eprintln!("error: {}", report.exit_reason);
    }
    if report.exit_code == 0 && report.checkpoint_dir.is_some() {
        // As it was called: it need not be on the path.
        let program = std::env::args().next().unwrap_or_else(|| "hadal".into());
        eprintln!("try: {program} generate {} --prompt 'Once'", report.run_dir.join("latest").display());
    }
    Ok(ExitCode::from(report.exit_code))
}

/// What a rank sends in a step, if it sends anything.
fn links(links: &Links) -> String {
    let line = |name: &str, predicted: u64, measured: u64| match predicted + measured {
        0 => String::new(),
        _ => format!("  {name:18}  {:>12}  {:11}  {:>12}\n", units::bytes(predicted), "", units::bytes(measured)),
    };
    line("sent in its node", links.predicted_intra_node_bytes, links.measured_intra_node_bytes)
        + &line("sent to others", links.predicted_inter_node_bytes, links.measured_inter_node_bytes)
}

/// Rows of the table of what rounding lost; all of them are in the log.
const WORST: usize = 5;

/// What rounding to 8 bits lost, where it was most.
fn rounding(report: &RoundingReport) -> String {
    if report.lost.is_empty() {
        return String::new();
    }
    let mut table = format!(
        "\nlost by rounding to 8 bits in step {}, the worst {} of {}, of numbers that are not 0\n  layer  {:20}  {:>10}  {:>11}  {:>7}  scales\n",
        report.step,
        report.lost.len().min(WORST),
        report.lost.len(),
        "tensor",
        "amax",
        "become zero",
        "cut off",
    );
    for lost in report.worst(WORST) {
        let Lost { layer, tensor, amax, underflow_share, overflow_share, min_scale, max_scale } = lost;
        let (zero, cut) = (100.0 * underflow_share, 100.0 * overflow_share);
        table += &format!(
            "  {layer:5}  {:20}  {amax:10.2e}  {zero:10.3}%  {cut:6.3}%  {min_scale:.1e} to {max_scale:.1e}\n",
            tensor.name()
        );
    }
    table
}

/// An earlier run with checkpoints is worth something: it is neither continued nor given up unasked, and never deleted.
pub(super) fn make_room(run_dir: &Path, fresh: bool) -> Result<(), Failure> {
    let has_checkpoints = fs::read_dir(run_dir.join("checkpoints")).is_ok_and(|mut entries| entries.next().is_some());
    if !has_checkpoints {
        return Ok(());
    }
    let shown = run_dir.display();
    if !fresh {
        return Err(Failure::usage(
            format!("{shown} holds the checkpoints of an earlier run"),
            "--resume goes on from the newest, --fresh moves that run aside and begins anew, \
             --set name='\"other\"' keeps both",
        ));
    }
    let _is_over = training::claim(run_dir)?;
    let aside = (1..).map(|n| PathBuf::from(format!("{shown}.{n}"))).find(|path| !path.exists());
    let moved = aside.ok_or(io::ErrorKind::AlreadyExists.into()).and_then(|aside| {
        fs::rename(run_dir, &aside)?;
        Ok(aside)
    });
    let aside = moved.map_err(|e: io::Error| Failure::runtime(format!("cannot move {shown} aside: {e}")))?;
    eprintln!("moved the earlier run to {}", aside.display());
    Ok(())
}

/// Energy in watt-hours; what is next to none, in joules.
fn energy(kwh: f64) -> String {
    if kwh < 1e-3 { format!("{:.1} J", kwh * 3.6e6) } else { units::metric(kwh * 1e3, "Wh") }
}

fn summary(name: &str, has_experts: bool, report: &RunReport) -> String {
    let mut table = Table::default();
    let val_loss = report.val_loss_nats_per_token;
    table
        .row(
            "parameters",
            format!("{}, {} activated", units::count(report.num_params), units::count(report.num_activated_params)),
        )
        .row(
            "trained",
            format!(
                "{} steps, {} tokens in {}, {} tokens/s",
                units::grouped(report.num_steps),
                units::grouped(report.num_tokens),
                units::duration(report.train_secs),
                units::grouped(report.tokens_per_sec as u64),
            ),
        )
        .maybe("training loss", report.train_loss_nats_per_token.map(|nats| progress::loss(nats, None)))
        .maybe("validation loss", val_loss.map(|nats| progress::loss(nats, report.val_bits_per_byte)))
        .maybe(
            "experts",
            has_experts
                .then(|| format!("MaxVio {:.2} in the worst layer, {} dead", report.max_vio, report.num_dead_experts)),
        )
        .row("idle", format!("{:.1}% of step time had no stream busy", 100.0 * report.overhead_share))
        .row("memory", format!("{} of tensors at most", units::bytes(report.peak_tensor_bytes)))
        .maybe(
            "energy",
            report
                .energy_kwh
                .zip(report.energy_source)
                .map(|(kwh, source)| format!("{}, {}", energy(kwh), source.words())),
        )
        .maybe("traffic", report.traffic.as_ref().map(traffic))
        .row("run folder", report.run_dir.display().to_string())
        .maybe("checkpoint", report.checkpoint_dir.as_ref().map(|dir| dir.display().to_string()))
        .maybe("sample", report.sample.clone());
    table.render(&format!("{name}: {}", report.exit_reason))
}

/// `1.2 GB of tensors read and written a step: 60% bf16, 40% in 8 bits`, without what comes to nothing.
fn traffic(traffic: &Traffic) -> String {
    let (all, by_format) = traffic.by_format();
    let percent = |bytes: u64| 100.0 * bytes as f64 / all.max(1) as f64;
    let share = |(format, bytes): (&str, u64)| {
        format!("{:.0}% {}", percent(bytes), if format == "u8" { "in 8 bits" } else { format })
    };
    let shares: Vec<String> = by_format.into_iter().filter(|(_, bytes)| percent(*bytes) >= 0.5).map(share).collect();
    format!("{} of tensors read and written a step: {}", units::bytes(all), shares.join(", "))
}

#[cfg(test)]
mod tests {
    #![expect(clippy::unwrap_used, reason = "tests")]
    use super::*;
    use systems::rounding::Operand;

    #[test]
    fn the_worst_roundings_come_first() {
        let lost = |layer, tensor, underflow_share, overflow_share| Lost {
            layer,
            tensor,
            amax: 0.25,
            underflow_share,
            overflow_share,
            min_scale: 1e-6,
            max_scale: 0.5,
        };
        let mut all: Vec<Lost> = (0..5).map(|layer| lost(layer, Operand::Weights, 1e-4, 0.0)).collect();
        all.push(lost(7, Operand::Gradients, 0.125, 0.0));
        all.push(lost(8, Operand::Activations, 0.0, 0.5));
        let table = rounding(&RoundingReport { step: 30, lost: all });
        let lines: Vec<Vec<&str>> = table.lines().skip(3).map(|line| line.split_whitespace().collect()).collect();
        assert!(table.contains("in step 30, the worst 5 of 7"), "{table}");
        assert_eq!(lines.len(), 5, "{table}");
        assert_eq!(lines[0], ["8", "activations", "2.50e-1", "0.000%", "50.000%", "1.0e-6", "to", "5.0e-1"]);
        assert_eq!(lines[1][..5], ["7", "gradients", "2.50e-1", "12.500%", "0.000%"]);
        assert_eq!(rounding(&RoundingReport { step: 1, lost: vec![] }), "");
    }

    #[test]
    fn an_earlier_run_is_never_lost() {
        let parent = tempfile::tempdir().unwrap();
        let dir = parent.path().join("a");
        let earlier = dir.join("checkpoints/step-0000001");
        make_room(&dir, false).unwrap();
        fs::create_dir_all(&dir).unwrap();
        make_room(&dir, false).unwrap();
        for aside in ["a.1", "a.2"] {
            fs::create_dir_all(&earlier).unwrap();
            assert!(make_room(&dir, false).is_err());
            assert!(earlier.exists());
            make_room(&dir, true).unwrap();
            assert!(!dir.exists() && parent.path().join(aside).join("checkpoints/step-0000001").exists());
        }
    }
}
