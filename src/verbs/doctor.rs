//! `hadal doctor`: what this machine has for Hadal, and what is in the way.

mod device;

use std::{
    env, fs,
    path::{Path, PathBuf},
    process::ExitCode,
};

use kernels::{
    comm::launch::{Nccl, find_mpi},
    cuda,
};
use serde::Serialize;

use crate::{
    cli::DoctorArgs,
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
    gpus: Vec<Gpu>,
    /// Why there are none, if there are none.
    gpu_problem: Option<String>,
    nvidia_driver: Option<String>,
    /// Version and file of the library that several processes meet through.
    mpi: Option<String>,
    /// Why there is none, if there is none.
    mpi_problem: Option<String>,
    /// Version and file of the library that moves tensors between GPUs of several processes.
    nccl: Option<String>,
    /// Why there is none, if there is none.
    nccl_problem: Option<String>,
    /// Version of the library that tells what GPUs draw.
    nvml: Option<String>,
    /// Why it is not there, if it is not.
    nvml_problem: Option<String>,
    runs_dir: PathBuf,
    runs_dir_writable: bool,
    disk_free_bytes: Option<u64>,
    problems: Vec<String>,
}

/// A GPU that the driver shows.
#[derive(Serialize)]
struct Gpu {
    device: String,
    name: String,
    compute_capability: String,
    num_sms: u32,
    memory_bytes: u64,
    /// CUDA version that the driver serves.
    driver_cuda: String,
    /// Why runs cannot use it, if they cannot.
    problem: Option<String>,
}

#[derive(Serialize)]
struct Simd {
    name: &'static str,
    found: bool,
}

/// Looks around, or checks the ops of one device. Exit code 1 if something is in the way of a run, or an op computes what it should not.
///
/// # Errors
/// If the device cannot be used, or the report cannot be written.
pub fn doctor(args: &DoctorArgs, output: &Output) -> Result<ExitCode, Failure> {
    if let Some(device) = args.device {
        return device::check(device, args.quick, output);
    }
    let report = look();
    output.result(&report, &table(&report))?;
    Ok(if report.problems.is_empty() { ExitCode::SUCCESS } else { ExitCode::from(failure::RUNTIME) })
}

fn gpu(info: &cuda::GpuInfo) -> Gpu {
    let (major, minor) = info.target.compute;
    Gpu {
        device: kernels::device::Device::Cuda(info.ordinal).to_string(),
        name: info.name.clone(),
        compute_capability: format!("{major}.{minor}"),
        num_sms: info.target.num_sms,
        memory_bytes: info.memory_bytes,
        driver_cuda: format!("{}.{}", info.driver_version / 1000, info.driver_version % 1000 / 10),
        problem: info.problem.as_ref().map(ToString::to_string),
    }
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
    let (gpus, gpu_problem) = match cuda::devices() {
        Ok(gpus) => (gpus.iter().map(gpu).collect(), None),
        Err(e) => (Vec::new(), Some(e.to_string())),
    };
    let variable = |name: &str| env::var(name).ok();
    let (mpi, nccl) = (find_mpi(&variable), Nccl::said(&variable).find());
    let nvml = cuda::nvml_version();
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
        gpus,
        gpu_problem,
        nvidia_driver: machine::nvidia_driver(),
        mpi_problem: mpi.as_ref().err().cloned(),
        mpi: mpi.ok(),
        nccl_problem: nccl.as_ref().err().cloned(),
        nccl: nccl.ok(),
        nvml: nvml.as_ref().ok().cloned(),
        nvml_problem: nvml.err(),
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
    let shown = |gpu: &Gpu| {
        let line = format!(
            "{}: {}, compute capability {}, {}, driver for CUDA {}",
            gpu.device,
            gpu.name,
            gpu.compute_capability,
            units::bytes(gpu.memory_bytes),
            gpu.driver_cuda
        );
        gpu.problem.iter().fold(line, |line, problem| format!("{line}\n{problem}"))
    };
    let none = report.gpu_problem.iter().map(|problem| format!("none: {problem}"));
    let gpus: Vec<String> = report.gpus.iter().map(shown).chain(none).collect();
    let none = || format!("none, HADAL_MPI names one:\n{}", report.mpi_problem.as_deref().unwrap_or_default());
    let mpi = report.mpi.clone().unwrap_or_else(none);
    let none = || format!("MPI, by the host: {}", report.nccl_problem.as_deref().unwrap_or_default());
    let nccl = report.nccl.clone().unwrap_or_else(none);
    let power = match (&report.nvml, &report.nvml_problem) {
        (Some(version), _) => format!("of GPUs is measured, by NVML {version}"),
        (None, problem) => format!("not measured: {}", problem.as_deref().unwrap_or("no NVML")),
    };
    let writable = if report.runs_dir_writable { "can be written" } else { "cannot be written" };
    let mut table = Table::default();
    table
        .row("system", format!("{} {}", report.os, report.arch))
        .row("processor", report.cpu_model.clone().unwrap_or_else(unknown))
        .row("cores", cores)
        .row("vectors", if simd.is_empty() { unknown() } else { simd.join(", ") })
        .row("memory", memory)
        .row("GPU", gpus.join("\n"))
        .row("processes", mpi)
        .row("between GPUs", nccl)
        .row("power", power)
        .row("runs", format!("{}, {writable}", report.runs_dir.display()))
        .row("disk", report.disk_free_bytes.map_or_else(unknown, |free| format!("{} free", units::bytes(free))));
    for problem in &report.problems {
        table.row("problem", problem.clone());
    }
    table.render(&format!("hadal {}", report.version))
}
