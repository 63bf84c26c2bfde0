//! Corrections of the cost model from measured spans: what a launch costs, and by how much each kind of task is slower or
//! faster than the model says.
//!
//! Medians and slopes between pairs of samples are used and no means, since a span that was preempted is not twice but a
//! hundred times too long.

use std::{
    collections::BTreeMap,
    fs, io,
    path::{Path, PathBuf},
};

use kernels::cost::Cost;
use serde_json::Value;

use crate::{
    error::Result,
    hardware::{DeviceSpec, Format},
    trace::{ORIGIN, PLANNED},
};

/// What measured spans say about the model.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Corrections {
    /// By kind: measured over modelled seconds of work, without the launch. A kind that is not here is as modelled.
    pub kind_factors: BTreeMap<String, f64>,
    /// Seconds of a launch on the device, if the spans could tell.
    pub launch_secs: Option<f64>,
}

impl Corrections {
    /// The factor on the work of tasks of `kind`.
    pub fn factor(&self, kind: &str) -> f64 {
        self.kind_factors.get(kind).copied().unwrap_or(1.0)
    }
}

/// A measured task.
#[derive(Clone, Debug, PartialEq)]
pub struct Sample {
    /// What it did.
    pub kind: String,
    /// What it asked of the device.
    pub cost: Cost,
    /// Seconds it took.
    pub secs: f64,
}

/// Works of a kind tell the launch apart if the largest is this much the smallest.
const MIN_SPREAD: f64 = 2.0;

/// Corrections under which `device` agrees with `samples` that were computed in `format`. Corrections that `device`
/// already has are not built upon.
///
/// A kind whose tasks differ in size tells what a launch costs: the intercept of seconds over modelled work. The median of
/// those is taken for the launch, at least zero and at most the shortest span. What remains of each span over its
/// modelled work is a ratio, and the median of a kind's ratios is its factor. Kinds that ask for nothing have none.
///
/// # Errors
/// If the model needs a figure that `device` does not give.
pub fn fit(device: &DeviceSpec, format: Format, samples: &[Sample]) -> Result<Corrections> {
    let plain = DeviceSpec { corrections: Corrections::default(), ..device.clone() };
    let mut kinds: BTreeMap<&str, Vec<(f64, f64)>> = BTreeMap::new();
    for sample in samples {
        let work_secs = plain.task_secs(&sample.kind, &sample.cost, format)? - plain.launch_secs();
        kinds.entry(&sample.kind).or_default().push((work_secs.max(0.0), sample.secs));
    }
    let mut intercepts: Vec<f64> = kinds.values_mut().filter_map(|points| intercept(points)).collect();
    let shortest = samples.iter().map(|sample| sample.secs).fold(f64::INFINITY, f64::min);
    let launch_secs = median(&mut intercepts).map(|secs| secs.clamp(0.0, shortest.max(0.0)));
    let launch = launch_secs.unwrap_or(plain.launch_secs.value);
    let mut kind_factors = BTreeMap::new();
    for (kind, points) in kinds {
        let worked = points.iter().filter(|(work, _)| *work > 0.0);
        let mut ratios: Vec<f64> = worked.map(|(work, secs)| (secs - launch).max(0.0) / work).collect();
        if let Some(factor) = median(&mut ratios) {
            kind_factors.insert(kind.to_owned(), factor);
        }
    }
    Ok(Corrections { kind_factors, launch_secs })
}

/// Where the line through `points` (work, seconds) meets no work, by Theil's incomplete method: the slope is the median over
/// pairs of a smaller and a larger work. None if the works are too alike.
fn intercept(points: &mut [(f64, f64)]) -> Option<f64> {
    points.sort_by(|a, b| a.0.total_cmp(&b.0));
    let (first, last) = (points.first()?.0, points.last()?.0);
    if last <= 0.0 || last < MIN_SPREAD * first {
        return None;
    }
    let (smaller, larger) = points.split_at(points.len() / 2);
    // Of an odd number the middle one has no partner.
    let larger = &larger[larger.len() - smaller.len()..];
    let pairs = smaller.iter().zip(larger).filter(|(a, b)| b.0 > a.0);
    let slope = median(&mut pairs.map(|(a, b)| (b.1 - a.1) / (b.0 - a.0)).collect::<Vec<_>>())?;
    median(&mut points.iter().map(|(work, secs)| secs - slope * work).collect::<Vec<_>>())
}

/// The middle value, or the mean of the two.
fn median(values: &mut [f64]) -> Option<f64> {
    values.sort_by(f64::total_cmp);
    let middle = values.len() / 2;
    Some(match values.len() {
        0 => return None,
        len if len % 2 == 0 => 0.5 * (values[middle - 1] + values[middle]),
        _ => values[middle],
    })
}

/// A trace cannot be used for calibration.
#[derive(Debug, thiserror::Error)]
pub enum TraceError {
    /// The operating system refused.
    #[error("cannot read the trace {}: {source}", path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// A line is no event.
    #[error("{}:{line}: expected an event of a Chrome trace, one a line: {message}", path.display())]
    Syntax {
        /// The file.
        path: PathBuf,
        /// The line, from 1.
        line: usize,
        /// What is wrong.
        message: String,
    },
    /// Its times were computed.
    #[error(
        "{}: expected a trace of a run, found one of a plan, whose times were computed and not measured; \
         take `trace.json` of a run's folder", path.display()
    )]
    Planned {
        /// The file.
        path: PathBuf,
    },
    /// No task has a cost.
    #[error(
        "{} has {num_tasks} tasks and none says what it cost: `args.cost` is written by this version's traces of runs; \
         record one with `telemetry: (trace_steps: ..)`", path.display()
    )]
    NoCosts {
        /// The file.
        path: PathBuf,
        /// Tasks it has.
        num_tasks: usize,
    },
}

/// The tasks of a trace that [`crate::trace::TraceWriter`] wrote, also if the run was cut off while writing it.
///
/// # Errors
/// If the file cannot be read, a line that is not the last is no event, it is of a plan, or no task has a cost.
pub fn read_trace(path: &Path) -> Result<Vec<Sample>, TraceError> {
    let text = fs::read_to_string(path).map_err(|source| TraceError::Io { path: path.to_owned(), source })?;
    let (mut samples, mut num_tasks) = (Vec::new(), 0);
    let mut lines = text.lines().enumerate().peekable();
    while let Some((i, line)) = lines.next() {
        let event = line.trim().trim_start_matches('[').trim_end_matches([',', ']']);
        if event.is_empty() {
            continue;
        }
        let event: Value = match serde_json::from_str(event) {
            Ok(event) => event,
            // A run that was cut off.
            Err(_) if lines.peek().is_none() => break,
            Err(error) => {
                let message = error.to_string();
                return Err(TraceError::Syntax { path: path.to_owned(), line: i + 1, message });
            }
        };
        if event["ph"] == "M" && event["name"] == ORIGIN && event["args"]["name"] == PLANNED {
            return Err(TraceError::Planned { path: path.to_owned() });
        }
        if event["ph"] != "X" || event["cat"] == "bubble" {
            continue;
        }
        num_tasks += 1;
        samples.extend(sample(&event));
    }
    if samples.is_empty() { Err(TraceError::NoCosts { path: path.to_owned(), num_tasks }) } else { Ok(samples) }
}

fn sample(event: &Value) -> Option<Sample> {
    let mut cost = Cost::default();
    for (name, value) in event["args"]["cost"].as_object()? {
        *cost.field_mut(name)? = value.as_u64()?;
    }
    let kind = event["args"]["kind"].as_str()?.to_owned();
    // Waiting for another rank is not the task's own time.
    let micros = event["dur"].as_f64()? - event["args"]["wait_us"].as_f64().unwrap_or(0.0);
    Some(Sample { kind, cost, secs: micros.max(0.0) * 1e-6 })
}

#[cfg(test)]
#[path = "calibrate_tests.rs"]
mod tests;
