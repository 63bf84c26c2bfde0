//! The log of a run: `log.jsonl`, one JSON object per step, and the same as TensorBoard events.
//!
//! Keys are the scalars' names, units in them. A value that is not finite is `null`, as JSON has no other way.

use std::{
    fs::{self, File, OpenOptions},
    io::{self, Write},
    path::{Path, PathBuf},
    time::{SystemTime, UNIX_EPOCH},
};

use serde_json::{Map, Value};

use crate::{telemetry::Snapshot, tensorboard::EventFile};

/// The log cannot be written or read.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The operating system refused.
    #[error("cannot {operation} {}: {source}", path.display())]
    Io {
        /// Open, write, read.
        operation: &'static str,
        /// What.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// A line is no JSON object with a step.
    #[error("{}:{line}: expected an object with a `step`, found {found}", path.display())]
    Line {
        /// File.
        path: PathBuf,
        /// Line, from 1.
        line: usize,
        /// The parser's message, or the text.
        found: String,
    },
}

fn io_error<'a>(operation: &'static str, path: &'a Path) -> impl FnOnce(io::Error) -> Error + use<'a> {
    move |source| Error::Io { operation, path: path.to_owned(), source }
}

/// Writer of a run directory's log.
pub struct RunLog {
    path: PathBuf,
    file: File,
    events: EventFile,
}

impl RunLog {
    /// Opens the log in run directory `dir`, which is made if needed. A resumed run continues it: lines of steps after
    /// `last_step` belong to what is done again, and are dropped. A new run gives 0 and starts an empty log.
    ///
    /// # Errors
    /// If a file cannot be made, read or written.
    pub fn open(dir: &Path, last_step: u64) -> Result<Self, Error> {
        fs::create_dir_all(dir).map_err(io_error("make", dir))?;
        let path = dir.join("log.jsonl");
        let mut kept = String::new();
        if last_step > 0 && path.exists() {
            for line in read(&path)?.into_iter().filter(|line| line.step <= last_step) {
                kept += &Value::Object(line.fields).to_string();
                kept.push('\n');
            }
        }
        // Beside it, then renamed: a crash here leaves the old log or the new one.
        let fresh = dir.join(".log.jsonl.tmp");
        fs::write(&fresh, kept).map_err(io_error("write", &fresh))?;
        fs::rename(&fresh, &path).map_err(io_error("replace", &path))?;
        let file = OpenOptions::new().append(true).open(&path).map_err(io_error("open", &path))?;
        let tensorboard = dir.join("tensorboard");
        let events = EventFile::create(&tensorboard, unix_secs()).map_err(io_error("write to", &tensorboard))?;
        Ok(RunLog { path, file, events })
    }

    /// Adds a step: `step`, `time_unix_secs`, its scalars, and its histograms as lists.
    ///
    /// # Errors
    /// If a file cannot be written.
    pub fn write(&mut self, snapshot: &Snapshot) -> Result<(), Error> {
        self.write_with(snapshot, Map::new())
    }

    /// The same with further fields in the line, for what is neither a number nor a list of them; TensorBoard has no place for these.
    ///
    /// # Errors
    /// If a file cannot be written.
    pub fn write_with(&mut self, snapshot: &Snapshot, further: Map<String, Value>) -> Result<(), Error> {
        let unix_secs = unix_secs();
        let mut fields = Map::new();
        fields.insert("step".into(), snapshot.step.into());
        fields.insert("time_unix_secs".into(), unix_secs.into());
        for (name, value) in &snapshot.scalars {
            fields.insert(name.clone(), (*value).into());
        }
        for (name, values) in &snapshot.histograms {
            fields.insert(name.clone(), values.clone().into());
        }
        fields.extend(further);
        // One write per line: a run that is killed leaves at most one line cut off.
        let line = format!("{}\n", Value::Object(fields));
        self.file.write_all(line.as_bytes()).map_err(io_error("write", &self.path))?;
        self.events.write(snapshot, unix_secs).map_err(io_error("write", self.events.path()))
    }
}

#[expect(clippy::disallowed_methods, reason = "dates in logs are for people; no result depends on them")]
fn unix_secs() -> f64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0.0, |since| since.as_secs_f64())
}

/// The date in UTC, as 2026-03-17; for what people read.
pub fn today() -> String {
    date((unix_secs() / 86_400.0) as i64)
}

/// Date of a day counted from 1970-01-01. Years are counted from March on, so that the leap day is their last.
fn date(days: i64) -> String {
    const DAYS_OF_400_YEARS: i64 = 146_097;
    const DAYS_TO_1970: i64 = 719_468;
    let days = days + DAYS_TO_1970;
    let (era, day) = (days.div_euclid(DAYS_OF_400_YEARS), days.rem_euclid(DAYS_OF_400_YEARS));
    let year = (day - day / 1460 + day / 36_524 - day / 146_096) / 365;
    let day_of_year = day - (365 * year + year / 4 - year / 100);
    let month = (5 * day_of_year + 2) / 153;
    let day_of_month = day_of_year - (153 * month + 2) / 5 + 1;
    let (month, next) = if month < 10 { (month + 3, 0) } else { (month - 9, 1) };
    format!("{:04}-{month:02}-{day_of_month:02}", era * 400 + year + next)
}

/// A step of a log.
#[derive(Clone, Debug, PartialEq)]
pub struct Line {
    /// Its number.
    pub step: u64,
    /// All fields in the order they were written, `step` included.
    pub fields: Map<String, Value>,
}

impl Line {
    /// The scalar called `name`, if it is there and finite.
    pub fn scalar(&self, name: &str) -> Option<f64> {
        self.fields.get(name)?.as_f64()
    }
}

/// Reads a `log.jsonl`. A last line that was cut off is left out.
///
/// # Errors
/// If the file cannot be read, or another line is not what a log has.
pub fn read(path: &Path) -> Result<Vec<Line>, Error> {
    let text = fs::read_to_string(path).map_err(io_error("read", path))?;
    let whole = text.rfind('\n').map_or("", |end| &text[..end]);
    let line = |(i, text): (usize, &str)| {
        let broken = |found: String| Error::Line { path: path.to_owned(), line: i + 1, found };
        let fields: Map<String, Value> = serde_json::from_str(text).map_err(|error| broken(error.to_string()))?;
        let step = fields.get("step").and_then(Value::as_u64).ok_or_else(|| broken(text.to_owned()))?;
        Ok(Line { step, fields })
    };
    whole.lines().enumerate().map(line).collect()
}

#[cfg(test)]
mod tests {
    #![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

    use super::*;

    fn snapshot(step: u64) -> Snapshot {
        let scalars = vec![("step_secs".to_owned(), step as f64 * 0.5), ("bad".to_owned(), f64::NAN)];
        Snapshot { step, scalars, histograms: vec![("h".into(), vec![1.0, 2.0])], ..Snapshot::default() }
    }

    fn steps(path: &Path) -> Vec<u64> {
        read(path).unwrap().iter().map(|line| line.step).collect()
    }

    #[test]
    fn a_log_reads_back() {
        let dir = tempfile::tempdir().unwrap();
        let run = dir.path().join("runs/one");
        let mut log = RunLog::open(&run, 0).unwrap();
        log.write(&snapshot(1)).unwrap();
        log.write(&snapshot(2)).unwrap();
        let lines = read(&run.join("log.jsonl")).unwrap();
        let keys: Vec<_> = lines[1].fields.keys().map(String::as_str).collect();
        assert_eq!(keys, ["step", "time_unix_secs", "step_secs", "bad", "h"]);
        assert_eq!((lines[1].scalar("step_secs"), lines[1].scalar("bad")), (Some(1.0), None));
        assert_eq!(fs::read_dir(run.join("tensorboard")).unwrap().count(), 1);
        let rows = serde_json::json!([{ "of": "a", "share": 0.5 }]);
        log.write_with(&snapshot(3), Map::from_iter([("rows".to_owned(), rows.clone())])).unwrap();
        assert_eq!(read(&run.join("log.jsonl")).unwrap()[2].fields["rows"], rows);
    }

    #[test]
    fn a_resumed_log_has_each_step_once() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("log.jsonl");
        let mut log = RunLog::open(dir.path(), 0).unwrap();
        (1..=5).for_each(|step| log.write(&snapshot(step)).unwrap());
        drop(log);
        let cut = fs::read_to_string(&path).unwrap();
        fs::write(&path, &cut[..cut.len() - 10]).unwrap();
        assert_eq!(steps(&path), [1, 2, 3, 4], "the line that was cut off is left out");

        let mut log = RunLog::open(dir.path(), 3).unwrap();
        log.write(&snapshot(4)).unwrap();
        assert_eq!(steps(&path), [1, 2, 3, 4]);
        RunLog::open(dir.path(), 0).unwrap();
        assert_eq!(steps(&path), [0; 0], "a new run starts an empty log");
    }

    #[test]
    fn days_have_their_dates() {
        for (days, want) in [
            (0, "1970-01-01"),
            (-1, "1969-12-31"),
            (11_016, "2000-02-29"),
            (11_017, "2000-03-01"),
            (19_782, "2024-02-29"),
            (20_454, "2026-01-01"),
            (47_541, "2100-03-01"),
        ] {
            assert_eq!(date(days), want, "day {days}");
        }
    }

    #[test]
    fn a_broken_line_is_named() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("log.jsonl");
        for (text, message) in [
            ("{\"step\": 1}\nnonsense\n", "log.jsonl:2: expected an object with a `step`, found expected"),
            ("{\"x\": 1}\n", "log.jsonl:1: expected an object with a `step`, found {\"x\": 1}"),
        ] {
            fs::write(&path, text).unwrap();
            let error = read(&path).unwrap_err().to_string();
            assert!(error.contains(message), "{error}");
        }
        let error = read(&dir.path().join("none")).unwrap_err().to_string();
        assert!(error.starts_with("cannot read ") && error.contains("none: No such file"), "{error}");
    }
}
