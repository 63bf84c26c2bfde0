//! `hadal doctor`: what this machine has for Hadal, and what is in the way.

use std::{
    env, fs,
    path::{Path, PathBuf},
    process::ExitCode,
};

use serde::Serialize;

use crate::{
    failure::{self, Failure},
    machine,
    report::{Output, Table},
    units,
};

/// Where runs go if the scene does not say otherwise.
const RUNS_DIR: &str = "runs";

/// What was found; `None` is what the system does not tell.
#[derive(Serialize)]
struct Report {
    version: &'static str,
    os: &'static str,
    arch: &'static str,
    cpu_model: Option<String>,
    num_cores: Option<usize>,
    num_threads: Option<usize>,
    simd: Vec<Simd>,
    memory_total_bytes: Option<u64>,
    memory_available_bytes: Option<u64>,
    gpu_supported: bool,
    nvidia_driver: Option<String>,
    runs_dir: PathBuf,
    runs_dir_writable: bool,
    disk_free_bytes: Option<u64>,
    problems: Vec<String>,
}

#[derive(Serialize)]
struct Simd {
    name: &'static str,
    found: bool,
}

/// Looks around. Exit code 1 if something is in the way of a run.
///
/// # Errors
/// If the report cannot be written.
pub fn doctor(output: &Output) -> Result<ExitCode, Failure> {
    let report = look();
    output.result(&report, &table(&report))?;
    Ok(if report.problems.is_empty() { ExitCode::SUCCESS } else { ExitCode::from(failure::RUNTIME) })
}

fn look() -> Report {
    let memory = machine::memory_bytes();
    let here = env::current_dir().unwrap_or_default();
    let runs_dir = here.join(RUNS_DIR);
    // Before the first run there is no such folder, and it will be made here.
    let folder = if runs_dir.is_dir() { &runs_dir } else { &here };
    let mut problems = Vec::new();
    let writable = try_writing(folder);
    if let Err(e) = &writable {
        problems.push(format!("runs go to {}, but nothing can be written there: {e}", runs_dir.display()));
    }
    Report {
        version: env!("CARGO_PKG_VERSION"),
        os: env::consts::OS,
        arch: env::consts::ARCH,
        cpu_model: machine::cpu_model(),
        num_cores: machine::num_cores(),
        num_threads: machine::num_threads(),
        simd: machine::simd().into_iter().map(|(name, found)| Simd { name, found }).collect(),
        memory_total_bytes: memory.map(|(total, _)| total),
        memory_available_bytes: memory.map(|(_, available)| available),
        gpu_supported: false,
        nvidia_driver: machine::nvidia_driver(),
        disk_free_bytes: machine::disk_free_bytes(folder).ok(),
        runs_dir_writable: writable.is_ok(),
        runs_dir,
        problems,
    }
}

/// Permissions do not tell it all (read-only mounts, full disks), so this makes a file and removes it.
fn try_writing(folder: &Path) -> std::io::Result<()> {
    let probe = folder.join(format!(".hadal-doctor-{}", std::process::id()));
    fs::write(&probe, "hadal")?;
    fs::remove_file(&probe)
}

fn table(report: &Report) -> String {
    let unknown = || "unknown".to_owned();
    let cores = match (report.num_cores, report.num_threads) {
        (Some(cores), Some(threads)) => format!("{cores} cores, {threads} threads to use"),
        (None, Some(threads)) => format!("{threads} threads to use"),
        _ => unknown(),
    };
    let simd: Vec<String> =
        report.simd.iter().map(|simd| format!("{} {}", simd.name, if simd.found { "yes" } else { "no" })).collect();
    let memory = match (report.memory_total_bytes, report.memory_available_bytes) {
        (Some(total), Some(available)) => format!("{}, {} available", units::bytes(total), units::bytes(available)),
        _ => unknown(),
    };
    let gpu = match &report.nvidia_driver {
        Some(version) => format!("not supported in this build (NVIDIA driver {version} found, and not used)"),
        None => "not supported in this build".into(),
    };
    let writable = if report.runs_dir_writable { "can be written" } else { "cannot be written" };
    let mut table = Table::default();
    table
        .row("system", format!("{} {}", report.os, report.arch))
        .row("processor", report.cpu_model.clone().unwrap_or_else(unknown))
        .row("cores", cores)
        .row("vectors", if simd.is_empty() { unknown() } else { simd.join(", ") })
        .row("memory", memory)
        .row("GPU", gpu)
        .row("runs", format!("{}, {writable}", report.runs_dir.display()))
        .row("disk", report.disk_free_bytes.map_or_else(unknown, |free| format!("{} free", units::bytes(free))));
    for problem in &report.problems {
        table.row("problem", problem.clone());
    }
    table.render(&format!("hadal {}", report.version))
}
