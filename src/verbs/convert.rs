//! `hadal convert`: a Hugging Face folder, written anew.

use std::{path::Path, process::ExitCode};

use serde::Serialize;
use systems::hf::{self, write::SaveDtype};

use crate::{
    cli::ConvertArgs,
    failure::Failure,
    report::{Output, Table},
    units,
};

/// What was written.
#[derive(Serialize)]
struct Report<'a> {
    destination: &'a Path,
    num_tensors: usize,
    weights_bytes: u64,
    files: &'a [String],
    notes: &'a [String],
}

/// Converts.
///
/// # Errors
/// If the source is no complete model, or the destination cannot be written.
pub fn convert(args: &ConvertArgs, output: &Output) -> Result<ExitCode, Failure> {
    let dtype = args.dtype.map(SaveDtype::from);
    let (written, notes) =
        hf::convert(&args.source, &args.destination, dtype, args.shard_size).map_err(Failure::runtime)?;
    for note in &notes {
        eprintln!("note: {note}");
    }
    let mut table = Table::default();
    table
        .row("tensors", units::grouped(written.num_tensors as u64))
        .row("weights", units::bytes(written.num_bytes))
        .row("files", written.files.len().to_string());
    let report = Report {
        destination: &args.destination,
        num_tensors: written.num_tensors,
        weights_bytes: written.num_bytes,
        files: &written.files,
        notes: &notes,
    };
    let title = format!("{} -> {}", args.source.display(), args.destination.display());
    output.result(&report, &table.render(&title))?;
    Ok(ExitCode::SUCCESS)
}
