//! A file as a source: all its steps come at once, and there is nobody to ask. A run's folder gives the figures of its log with
//! the tasks of its trace.

use std::{collections::BTreeMap, path::Path, sync::Arc};

use engine::{log, telemetry::Snapshot};
use serde_json::Value;

use super::{Source, SourceEvent, chrome};
use crate::overlap::overlap;

/// Name of the figure of how much communication is hidden under computation.
pub const HIDDEN_SHARE: &str = "communication_hidden_share";

/// Steps that were recorded.
pub struct FileSource {
    name: String,
    events: Vec<SourceEvent>,
    begins_at: Option<u64>,
}

impl FileSource {
    /// The trace at `path`, or the run in this folder.
    ///
    /// # Errors
    /// If it cannot be read, or is neither.
    pub fn open(path: &Path) -> Result<Self, String> {
        let name = path.display().to_string();
        let steps = if path.is_dir() { folder(path)? } else { trace(path)? };
        Ok(FileSource::of(name, steps))
    }

    /// Steps that somebody else read or made.
    pub fn of(name: String, mut steps: Vec<Snapshot>) -> Self {
        let mut events = vec![SourceEvent::Connected(name.clone())];
        for step in &mut steps {
            if step.scalar(HIDDEN_SHARE).is_none()
                && let Some(share) = overlap(&step.spans).share()
            {
                step.scalars.push((HIDDEN_SHARE.into(), share));
            }
        }
        let num_steps = steps.len();
        // A log goes on after the steps that were traced: there is most to see at the last of those.
        let traced = steps.iter().rfind(|step| !step.spans.is_empty()).map(|step| step.step);
        let begins_at = traced.filter(|traced| steps.last().is_some_and(|last| last.step != *traced));
        events.extend(steps.into_iter().map(|step| SourceEvent::Snapshot(Arc::new(step))));
        events.push(SourceEvent::Ended(format!("{num_steps} recorded step{}", if num_steps == 1 { "" } else { "s" })));
        FileSource { name, events, begins_at }
    }
}

impl Source for FileSource {
    fn name(&self) -> &str {
        &self.name
    }

    fn begins_at(&self) -> Option<u64> {
        self.begins_at
    }

    fn poll(&mut self) -> Vec<SourceEvent> {
        std::mem::take(&mut self.events)
    }

    fn call(&mut self, _: &str, _: Value) -> Option<u64> {
        None
    }
}

fn trace(path: &Path) -> Result<Vec<Snapshot>, String> {
    let text = std::fs::read_to_string(path).map_err(|e| format!("cannot read {}: {e}", path.display()))?;
    chrome::parse(&text).map_err(|e| format!("{}: {e}", path.display()))
}

/// The log's steps; those that the trace has get their tasks.
fn folder(path: &Path) -> Result<Vec<Snapshot>, String> {
    let (log_file, trace_file) = (path.join("log.jsonl"), path.join("trace.json"));
    if !log_file.exists() && !trace_file.exists() {
        return Err(format!(
            "expected a run's folder, with log.jsonl or trace.json, found neither in {}",
            path.display()
        ));
    }
    let mut steps: BTreeMap<u64, Snapshot> = BTreeMap::new();
    if trace_file.exists() {
        steps.extend(trace(&trace_file)?.into_iter().map(|snapshot| (snapshot.step, snapshot)));
    }
    if log_file.exists() {
        for line in log::read(&log_file).map_err(|e| e.to_string())? {
            let step = steps.entry(line.step).or_insert_with(|| Snapshot { step: line.step, ..Snapshot::default() });
            for (name, value) in line.fields.into_iter().filter(|(name, _)| name != "step") {
                match value {
                    Value::Number(number) => {
                        number.as_f64().into_iter().for_each(|value| put(&mut step.scalars, &name, value));
                    }
                    Value::Array(values) if !values.iter().any(Value::is_object) => {
                        put(&mut step.histograms, &name, values.iter().filter_map(Value::as_f64).collect());
                    }
                    _ => {}
                }
            }
        }
    }
    Ok(steps.into_values().collect())
}

/// A step that is told twice, as after a run went on from a checkpoint, has the figures of the last time.
fn put<T>(values: &mut Vec<(String, T)>, name: &str, value: T) {
    match values.iter_mut().find(|(known, _)| known == name) {
        Some((_, known)) => *known = value,
        None => values.push((name.to_owned(), value)),
    }
}
