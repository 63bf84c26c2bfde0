//! `hadal bench kernels --tune`: the quickest tile of each product, as a file that scenes and other measurements take.

use std::{fs, path::Path, process::ExitCode, sync::Arc};

use kernels::{
    cuda,
    device::Device,
    ptx::tuning::{Row, Table},
    speed::{self, Request},
};
use serde::Serialize;
use systems::on_gpu::read_table;

use crate::{
    cli::BenchKernelsArgs,
    failure::Failure,
    report::{self, Output},
};

/// Reads a table.
///
/// # Errors
/// If the file is none.
pub fn table(path: &Path) -> Result<Arc<Table>, Failure> {
    read_table(path).map_err(|e| Failure::usage(e, "`hadal bench kernels --tune FILE` writes one"))
}

#[derive(Serialize)]
struct Report {
    version: &'static str,
    date: String,
    device: String,
    name: String,
    num_sms: u32,
    runs: usize,
    shrink: usize,
    rows: Vec<Line>,
}

#[derive(Serialize)]
struct Line {
    product: String,
    tile: String,
    secs: f64,
    model_tile: String,
    model_secs: f64,
}

fn line(row: &Row) -> Line {
    Line {
        product: row.product.to_string(),
        tile: row.tile.clone(),
        secs: row.micros * 1e-6,
        model_tile: row.model_tile.clone(),
        model_secs: row.model_micros * 1e-6,
    }
}

/// Measures the tiles of products, and writes the table.
///
/// # Errors
/// If the device is no GPU or fails, or a file cannot be written.
pub fn tune(args: &BenchKernelsArgs, to: &Path, output: &Output) -> Result<ExitCode, Failure> {
    let mut head = Some(format!(
        "{}, medians of {}\n  {:66}  {:>20}  {:>12}  {:>20}  {:>12}\n",
        args.on.device, args.runs, "product", "quickest", "time", "by the model", "time"
    ));
    let tell = |row: &Row| {
        if output.is_text() {
            let times = [row.micros, row.model_micros].map(|micros| format!("{micros:.1} us"));
            report::stream(&format!(
                "{}  {:66}  {:>20}  {:>12}  {:>20}  {:>12}\n",
                head.take().unwrap_or_default(),
                row.product.to_string(),
                row.tile,
                times[0],
                row.model_tile,
                times[1]
            ));
        }
    };
    let request = Request { device: args.on.device, runs: args.runs, shrink: args.on.shrink, tuning: None };
    let rows = speed::tune(request, tell).map_err(Failure::runtime)?;
    let Device::Cuda(ordinal) = args.on.device else { return Err(Failure::runtime("only GPUs have tiles")) };
    let gpu = cuda::open(ordinal).map_err(Failure::runtime)?;
    let (name, num_sms) = (gpu.info().name.clone(), gpu.target().num_sms);
    let table = Table::new(&name, num_sms, rows).map_err(Failure::runtime)?;
    let text = table.to_ron().map_err(Failure::runtime)?;
    fs::write(to, text).map_err(|e| Failure::runtime(format!("cannot write {}: {e}", to.display())))?;
    let rows: Vec<Line> = table.rows().iter().map(line).collect();
    let others = rows.iter().filter(|line| line.tile != line.model_tile).count();
    let gain = |line: &Line| line.model_secs / line.secs.max(1e-12);
    let most = rows.iter().map(gain).fold(1.0, f64::max);
    let summary = format!(
        "wrote {}: {} products, of which {others} have another tile than by the model, which is up to {most:.2} times as fast",
        to.display(),
        rows.len()
    );
    let report = Report {
        version: env!("CARGO_PKG_VERSION"),
        date: engine::log::today(),
        device: args.on.device.to_string(),
        name,
        num_sms,
        runs: args.runs,
        shrink: args.on.shrink,
        rows,
    };
    output.result(&report, &summary)?;
    Ok(ExitCode::SUCCESS)
}
