//! TensorBoard event files: scalars and histograms by step.
//!
//! `tensorboard-rs` frames and checksums the records. Its own writer starts a nameless thread behind an unbounded channel and
//! panics when a disk is full, so the events are encoded here (five protobuf fields) and written by the caller's thread,
//! with errors that name the file.

use std::{
    fs::{self, File, OpenOptions},
    io::{self, BufWriter},
    path::{Path, PathBuf},
};

use tensorboard_rs::record_writer::RecordWriter;

use crate::telemetry::Snapshot;

/// An event file.
pub struct EventFile {
    records: RecordWriter<BufWriter<File>>,
    path: PathBuf,
}

/// Number of bins that a histogram's values are sorted into.
const NUM_BINS: usize = 30;

impl EventFile {
    /// A new event file in folder `dir`, begun at `unix_secs`.
    ///
    /// # Errors
    /// If the folder or the file cannot be made or written.
    pub fn create(dir: &Path, unix_secs: f64) -> io::Result<Self> {
        fs::create_dir_all(dir)?;
        let time = unix_secs as u64;
        // TensorBoard reads every file of the folder, so a run that is resumed adds one.
        let mut number = 0;
        let (file, path) = loop {
            let path = dir.join(format!("events.out.tfevents.{time:010}.hadal.{number}"));
            match OpenOptions::new().write(true).create_new(true).open(&path) {
                Err(error) if error.kind() == io::ErrorKind::AlreadyExists => number += 1,
                opened => break (opened?, path),
            }
        };
        let mut events = EventFile { records: RecordWriter::new(BufWriter::new(file)), path };
        let mut event = Vec::new();
        put_f64(&mut event, 1, unix_secs);
        put_bytes(&mut event, 3, b"brain.Event:2");
        events.records.write(&event)?;
        events.records.flush()?;
        Ok(events)
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Adds the scalars and histograms of a step, taken at `unix_secs`, and flushes.
    ///
    /// # Errors
    /// If the file cannot be written.
    pub fn write(&mut self, snapshot: &Snapshot, unix_secs: f64) -> io::Result<()> {
        for (name, value) in &snapshot.scalars {
            self.records.write(&event(unix_secs, snapshot.step, &scalar(name, *value as f32)))?;
        }
        for (name, values) in &snapshot.histograms {
            let finite: Vec<f64> = values.iter().copied().filter(|value| value.is_finite()).collect();
            if !finite.is_empty() {
                self.records.write(&event(unix_secs, snapshot.step, &histogram(name, &finite)))?;
            }
        }
        self.records.flush()
    }
}

/// `Event { wall_time, step, summary: { value: [..] } }`.
fn event(unix_secs: f64, step: u64, value: &[u8]) -> Vec<u8> {
    let mut event = Vec::new();
    put_f64(&mut event, 1, unix_secs);
    if step > 0 {
        put_key(&mut event, 2, 0);
        put_varint(&mut event, step);
    }
    let mut summary = Vec::new();
    put_bytes(&mut summary, 1, value);
    put_bytes(&mut event, 5, &summary);
    event
}

/// `Summary.Value { tag, simple_value }`.
fn scalar(tag: &str, value: f32) -> Vec<u8> {
    let mut out = Vec::new();
    put_bytes(&mut out, 1, tag.as_bytes());
    put_key(&mut out, 2, 5);
    out.extend(value.to_le_bytes());
    out
}

/// `Summary.Value { tag, histo: { min, max, num, sum, sum_squares, bucket_limit, bucket } }`.
fn histogram(tag: &str, values: &[f64]) -> Vec<u8> {
    let (limits, counts) = bin(values);
    let (min, max) = range(values);
    let mut histo = Vec::new();
    let sum_squares = values.iter().map(|value| value * value).sum();
    let totals = [min, max, values.len() as f64, values.iter().sum(), sum_squares];
    for (field, value) in (1..).zip(totals) {
        if value != 0.0 {
            put_f64(&mut histo, field, value);
        }
    }
    for (field, list) in [(6, limits), (7, counts)] {
        put_bytes(&mut histo, field, &list.iter().flat_map(|value| value.to_le_bytes()).collect::<Vec<u8>>());
    }
    let mut out = Vec::new();
    put_bytes(&mut out, 1, tag.as_bytes());
    put_bytes(&mut out, 5, &histo);
    out
}

fn range(values: &[f64]) -> (f64, f64) {
    values.iter().fold((f64::INFINITY, f64::NEG_INFINITY), |(min, max), &value| (min.min(value), max.max(value)))
}

/// Upper limits and counts of equal bins from the least value to the greatest; one bin if they are the same.
fn bin(values: &[f64]) -> (Vec<f64>, Vec<f64>) {
    let (min, max) = range(values);
    let width = (max - min) / NUM_BINS as f64;
    if width <= 0.0 || !width.is_finite() {
        return (vec![max], vec![values.len() as f64]);
    }
    let mut counts = vec![0.0; NUM_BINS];
    for value in values {
        counts[(((value - min) / width) as usize).min(NUM_BINS - 1)] += 1.0;
    }
    let limits = (1..NUM_BINS).map(|i| min + width * i as f64).chain([max]);
    (limits.collect(), counts)
}

fn put_key(out: &mut Vec<u8>, field: u64, wire_type: u64) {
    put_varint(out, field << 3 | wire_type);
}

fn put_varint(out: &mut Vec<u8>, mut value: u64) {
    while value >= 0x80 {
        out.push(value as u8 | 0x80);
        value >>= 7;
    }
    out.push(value as u8);
}

fn put_f64(out: &mut Vec<u8>, field: u64, value: f64) {
    put_key(out, field, 1);
    out.extend(value.to_le_bytes());
}

fn put_bytes(out: &mut Vec<u8>, field: u64, bytes: &[u8]) {
    put_key(out, field, 2);
    put_varint(out, bytes.len() as u64);
    out.extend(bytes);
}

#[cfg(test)]
mod tests {
    #![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

    use tensorboard_rs::{masked_crc32c::masked_crc32c, summary_writer::SummaryWriter};

    use super::*;

    /// The records of an event file, checksums verified.
    fn records(path: &Path) -> Vec<Vec<u8>> {
        let bytes = fs::read(path).unwrap();
        let mut rest = &bytes[..];
        let mut records = Vec::new();
        while !rest.is_empty() {
            let len = u64::from_le_bytes(rest[..8].try_into().unwrap()) as usize;
            assert_eq!(rest[8..12], masked_crc32c(&rest[..8]).to_le_bytes());
            let data = &rest[12..12 + len];
            assert_eq!(rest[12 + len..16 + len], masked_crc32c(data).to_le_bytes());
            records.push(data.to_vec());
            rest = &rest[16 + len..];
        }
        records
    }

    /// The record without its wall time, which is its first field.
    fn timeless(record: &[u8]) -> &[u8] {
        assert_eq!(record[0], 0x09);
        &record[9..]
    }

    #[test]
    fn the_file_is_byte_for_byte_what_the_protobuf_encoder_writes() {
        let values = vec![-1.0, 0.5, 0.5, 2.0];
        let dir = tempfile::tempdir().unwrap();
        let (ours, theirs) = (dir.path().join("ours"), dir.path().join("theirs"));
        let snapshot = Snapshot {
            step: 300,
            scalars: vec![("step_secs".into(), 0.25), ("nothing".into(), 0.0)],
            histograms: vec![("load".into(), values.clone()), ("all the same".into(), vec![3.0; 4])],
            ..Snapshot::default()
        };
        let mut file = EventFile::create(&ours, 1.5e9).unwrap();
        file.write(&snapshot, 1.5e9 + 1.0).unwrap();

        let mut writer = SummaryWriter::new(&theirs);
        writer.add_scalar("step_secs", 0.25, 300);
        writer.add_scalar("nothing", 0.0, 300);
        for (name, values) in &snapshot.histograms {
            let (limits, counts) = bin(values);
            let (min, max) = range(values);
            let (sum, squares) = (values.iter().sum(), values.iter().map(|v| v * v).sum());
            writer.add_histogram_raw(name, min, max, 4.0, sum, squares, &limits, &counts, 300);
        }
        drop(writer);

        let theirs = fs::read_dir(&theirs).unwrap().next().unwrap().unwrap().path();
        let (ours, theirs) = (records(file.path()), records(&theirs));
        assert_eq!(ours.len(), 5);
        for (a, b) in ours.iter().zip(&theirs) {
            assert_eq!(timeless(a), timeless(b));
        }
        assert_eq!(ours[1][1..9], (1.5e9f64 + 1.0).to_le_bytes(), "the wall time is the caller's");
    }

    #[test]
    fn bins_hold_every_value_once() {
        let values: Vec<f64> = (0..100).map(|i| f64::from(i) * 0.37 - 5.0).collect();
        let (limits, counts) = bin(&values);
        assert_eq!((limits.len(), counts.iter().sum::<f64>()), (NUM_BINS, 100.0));
        assert_eq!(limits.last(), values.last());
        assert_eq!(bin(&[2.0, 2.0]), (vec![2.0], vec![2.0]));
    }

    #[test]
    fn a_resumed_run_adds_a_file() {
        let dir = tempfile::tempdir().unwrap();
        let paths = [0, 1].map(|_| EventFile::create(dir.path(), 7.0).unwrap().path().to_owned());
        assert_ne!(paths[0], paths[1]);
    }
}
