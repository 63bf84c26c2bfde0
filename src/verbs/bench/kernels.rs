//! `hadal bench kernels`: ops on one device, beside the fastest copy and the fastest product that were measured there in the same run.

use std::process::ExitCode;

use kernels::{
    cuda,
    device::Device,
    dtype::DType,
    speed::{self, LaunchCost, Request, Speed},
};
use serde::Serialize;

use super::tune::{table, tune};
use crate::{
    cli::BenchKernelsArgs,
    failure::Failure,
    report::{self, Output},
};

#[derive(Serialize)]
struct Report {
    version: &'static str,
    date: String,
    device: String,
    name: Option<String>,
    driver_cuda: Option<u32>,
    runs: usize,
    shrink: usize,
    /// The fastest copy, read and written.
    ceiling_bytes_per_sec: f64,
    /// The fastest product in bf16.
    ceiling_flops_per_sec: f64,
    /// Of the host for one launch, and for one in a graph.
    launch: LaunchReport,
    rows: Vec<Line>,
}

#[derive(Serialize)]
struct LaunchReport {
    enqueue_secs_per_op: f64,
    host_secs_per_launch: f64,
    host_secs_per_launch_in_graph: Option<f64>,
    graph_problem: Option<String>,
}

#[derive(Serialize)]
struct Line {
    op: &'static str,
    dtype: String,
    shape: String,
    ran_on: &'static str,
    secs: f64,
    tflops_per_sec: f64,
    gbytes_per_sec: f64,
    /// Published for DeepGEMM on an H800, not measured here.
    deepgemm_h800_tflops_per_sec: Option<f64>,
}

impl Line {
    fn of(speed: &Speed) -> Self {
        Line {
            op: speed.op,
            dtype: format!("{:?}", speed.dtype),
            shape: speed.shape.clone(),
            ran_on: if speed.on_host { "host" } else { "device" },
            secs: speed.secs,
            tflops_per_sec: speed.flops_per_sec() * 1e-12,
            gbytes_per_sec: speed.bytes_per_sec() * 1e-9,
            deepgemm_h800_tflops_per_sec: speed.published_flops_per_sec.map(|x| x * 1e-12),
        }
    }

    fn text(&self) -> String {
        format!(
            "  {:29}  {:5}  {:40}  {:6}  {:>12}  {:>9.2}  {:>9.1}  {:>13}",
            self.op,
            self.dtype,
            self.shape,
            self.ran_on,
            format!("{:.1} us", 1e6 * self.secs),
            self.tflops_per_sec,
            self.gbytes_per_sec,
            self.deepgemm_h800_tflops_per_sec.map_or(String::new(), |x| format!("{x:.0}"))
        )
    }
}

/// Measures.
///
/// # Errors
/// If the device cannot be used, an op fails, or the report cannot be written.
pub fn kernels(args: &BenchKernelsArgs, output: &Output) -> Result<ExitCode, Failure> {
    if let Some(to) = &args.tune {
        return tune(args, to, output);
    }
    let device = args.on.device;
    let mut head = Some(format!(
        "{device}, median of {}\n  {:29}  {:5}  {:40}  {:6}  {:>12}  {:>9}  {:>9}  {:>13}\n",
        args.runs, "op", "type", "shape", "ran on", "time", "TFLOP/s", "GB/s", "DeepGEMM H800"
    ));
    let tell = |speed: &Speed| {
        if output.is_text() {
            report::stream(&format!("{}{}\n", head.take().unwrap_or_default(), Line::of(speed).text()));
        }
    };
    let tuning = args.on.tuning.as_deref().map(table).transpose()?;
    let request = Request { device, runs: args.runs, shrink: args.on.shrink, tuning };
    let speeds = speed::run(request, tell).map_err(Failure::runtime)?;
    let launch = speed::launch_cost(device).map_err(Failure::runtime)?;
    let most = |of: &dyn Fn(&Speed) -> Option<f64>| speeds.iter().filter_map(of).fold(0.0, f64::max);
    let ceiling_bytes = most(&|speed| (speed.op == "elementwise::copy").then(|| speed.bytes_per_sec()));
    let ceiling_flops =
        most(&|speed| (speed.op == "gemm::forward" && speed.dtype == DType::Bf16).then(|| speed.flops_per_sec()));
    let info = match device {
        Device::Cuda(ordinal) => cuda::open(ordinal).ok().map(|gpu| gpu.info().clone()),
        Device::Cpu | Device::Meta => None,
    };
    let summary = format!(
        "fastest copy {:.1} GB/s, fastest product in bf16 {:.2} TFLOP/s; {}",
        ceiling_bytes * 1e-9,
        ceiling_flops * 1e-12,
        said(&launch)
    );
    let report = Report {
        version: env!("CARGO_PKG_VERSION"),
        date: engine::log::today(),
        device: device.to_string(),
        name: info.as_ref().map(|info| info.name.clone()),
        driver_cuda: info.as_ref().map(|info| info.driver_version),
        runs: args.runs,
        shrink: args.on.shrink,
        ceiling_bytes_per_sec: ceiling_bytes,
        ceiling_flops_per_sec: ceiling_flops,
        launch: LaunchReport {
            enqueue_secs_per_op: launch.enqueue_secs,
            host_secs_per_launch: launch.host_secs,
            host_secs_per_launch_in_graph: launch.in_graph.as_ref().ok().copied(),
            graph_problem: launch.in_graph.as_ref().err().cloned(),
        },
        rows: speeds.iter().map(Line::of).collect(),
    };
    output.result(&report, &summary)?;
    Ok(ExitCode::SUCCESS)
}

fn said(launch: &LaunchCost) -> String {
    let (enqueue, alone) = (launch.enqueue_secs * 1e6, launch.host_secs * 1e6);
    let begin =
        format!("the host takes {enqueue:.2} us to enqueue an op, a stream's thread {alone:.2} us for a kernel");
    match &launch.in_graph {
        Ok(secs) => format!("{begin}, {:.2} us for one in a graph", secs * 1e6),
        Err(why) => format!("{begin}; no graph: {why}"),
    }
}
