//! `hadal doctor --device cuda:0`: each op on that device and on the CPU, and how far apart they are.

use std::process::ExitCode;

use kernels::{
    check::{self, Row, Scale},
    device::Device,
};
use serde::Serialize;

use crate::{
    failure::{self, Failure},
    report::{self, Output},
};

#[derive(Serialize)]
struct Report {
    device: String,
    num_failed: usize,
    num_on_host: usize,
    rows: Vec<Line>,
}

/// A [`Row`]; what is not finite is told by `failure`, since JSON has no word for it.
#[derive(Serialize)]
struct Line {
    op: &'static str,
    dtype: String,
    shape: String,
    max_error: Option<f64>,
    calc_diff: Option<f64>,
    allowed_max_error: f64,
    allowed_calc_diff: f64,
    ok: bool,
    ran_on: &'static str,
    secs: Option<f64>,
    failure: Option<String>,
}

impl Line {
    fn of(row: &Row) -> Self {
        let known = |x: f64| Some(x).filter(|x| x.is_finite());
        let differs = "a value is not finite, or a number differs, where the CPU's is and does not".to_owned();
        Line {
            op: row.op,
            dtype: format!("{:?}", row.dtype),
            shape: row.shape.clone(),
            max_error: known(row.max_error),
            calc_diff: known(row.calc_diff),
            allowed_max_error: row.tolerance.element,
            allowed_calc_diff: row.tolerance.calc_diff,
            ok: row.is_ok(),
            ran_on: if row.on_host { "host" } else { "device" },
            secs: row.secs,
            failure: row.failure.clone().or((!row.max_error.is_finite()).then_some(differs)),
        }
    }

    fn text(&self) -> String {
        let number = |x: Option<f64>| x.map_or_else(|| "-".into(), |x| format!("{x:.1e}"));
        let secs = self.secs.map_or_else(|| "-".into(), |secs| format!("{:.1} us", secs * 1e6));
        let ok = if self.ok { "ok" } else { "WRONG" };
        let mut text = format!(
            "  {:30}  {:5}  {:36}  {:>9}  {:>9}  {ok:5}  {:6}  {secs:>12}",
            self.op,
            self.dtype,
            self.shape,
            number(self.max_error),
            number(self.calc_diff),
            self.ran_on,
        );
        text.extend(self.failure.iter().map(|failure| format!("\n    {failure}")));
        text
    }
}

/// Checks all ops; small sizes only if `quick`.
///
/// # Errors
/// If the device cannot be used, or the report cannot be written.
pub fn check(device: Device, quick: bool, output: &Output) -> Result<ExitCode, Failure> {
    let scale = if quick { Scale::Small } else { Scale::Full };
    let mut head = Some(format!(
        "{device} against the CPU\n  {:30}  {:5}  {:36}  {:>9}  {:>9}  {:5}  {:6}  {:>12}\n",
        "op", "type", "shape", "max error", "calc_diff", "", "ran on", "time"
    ));
    let tell = |row: &Row| {
        if output.is_text() {
            report::stream(&format!("{}{}\n", head.take().unwrap_or_default(), Line::of(row).text()));
        }
    };
    let rows = check::run(device, scale, true, tell).map_err(Failure::runtime)?;
    let lines: Vec<Line> = rows.iter().map(Line::of).collect();
    let num_failed = lines.iter().filter(|line| !line.ok).count();
    let num_on_host = lines.iter().filter(|line| line.ran_on == "host").count();
    let summary =
        format!("{} checked, {num_failed} wrong, {num_on_host} on the host for want of a kernel", lines.len());
    output.result(&Report { device: device.to_string(), num_failed, num_on_host, rows: lines }, &summary)?;
    Ok(if num_failed == 0 { ExitCode::SUCCESS } else { ExitCode::from(failure::RUNTIME) })
}
