//! What goes over the wire.
//!
//! Requests and answers are JSON-RPC 2.0 as text. Snapshots are binary frames: a byte that says which version of this format
//! follows, then the frame in postcard. Texts that many spans share are in one table and named by their place in it, and times
//! count from the begin of the step. Nothing is copied before it is written: a step is encoded while the next one runs, on the
//! same processors.
//!
//! A frame comes from elsewhere: nothing in it is believed before it is checked.

use std::{borrow::Cow, sync::Arc};

use kernels::cost::Cost;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use crate::{
    control::{RpcError, RpcResult},
    task::{Pass, Role, TaskKind},
    telemetry::{Snapshot, Span},
};

/// Version of the frames; the first byte of each.
pub const VERSION: u8 = 1;

/// Longest message that either side takes, in bytes; frames may be longer.
pub const MAX_MESSAGE_BYTES: usize = 1 << 20;

/// Longest frame that a client takes, in bytes: a step of some million tasks.
pub const MAX_FRAME_BYTES: usize = 64 << 20;

/// A frame is not what it should be.
#[derive(Debug, thiserror::Error)]
pub enum FrameError {
    /// It is of another version.
    #[error("expected frames of version {VERSION}, found version {0}; use the same version of Hadal on both sides")]
    Version(u8),
    /// It cannot be read.
    #[error("the frame is damaged: {0}")]
    Damaged(String),
}

/// A snapshot on its way, with how many were dropped before it.
#[derive(Clone, Debug)]
pub struct Frame {
    /// Snapshots that this listener missed so far because it was slow.
    pub num_dropped: u64,
    /// The snapshot.
    pub snapshot: Arc<Snapshot>,
}

#[derive(Serialize, Deserialize)]
struct WireSnapshot<'a> {
    step: u64,
    begin_nanos: u64,
    step_nanos: u64,
    #[serde(borrow)]
    texts: Vec<&'a str>,
    #[serde(borrow)]
    spans: Vec<WireSpan<'a>>,
    #[serde(borrow)]
    scalars: Vec<(&'a str, f64)>,
    #[serde(borrow)]
    histograms: Vec<(&'a str, Cow<'a, [f64]>)>,
}

/// A span; its kind and stream are places in the table, times count from the begin of the step.
#[derive(Serialize, Deserialize)]
struct WireSpan<'a> {
    label: &'a str,
    kind: u32,
    stream: u32,
    /// Role in the low two bits, pass above it.
    role_and_pass: u8,
    rank: u32,
    stage: u32,
    layer: Option<u32>,
    microbatch: Option<u32>,
    start_nanos: i64,
    nanos: u64,
    waited_for: Option<u32>,
    wait_nanos: u64,
    load: Option<(u64, u64)>,
    /// As `Cost::fields` has them.
    cost: [u64; 10],
}

const PASSES: [Option<Pass>; 4] = [None, Some(Pass::Forward), Some(Pass::InputGrad), Some(Pass::WeightGrad)];
const ROLES: [Role; 4] = [Role::Compute, Role::Send, Role::Receive, Role::Collective];

/// Texts by place, each once: some dozens. Most are found by where they are in memory.
#[derive(Default)]
struct Table<'a>(Vec<&'a str>);

impl<'a> Table<'a> {
    fn place(&mut self, text: &'a str) -> u32 {
        let is_same = |known: &&str| std::ptr::eq(*known, text);
        let known = self.0.iter().position(is_same).or_else(|| self.0.iter().position(|known| *known == text));
        known.unwrap_or_else(|| {
            self.0.push(text);
            self.0.len() - 1
        }) as u32
    }
}

/// The part of a frame that is the same for all listeners; [`frame`] completes it.
///
/// # Errors
/// None that a snapshot can cause; the encoder's.
pub fn encode(snapshot: &Snapshot) -> Result<Vec<u8>, FrameError> {
    let mut table = Table::default();
    let (begin_nanos, end_nanos) = snapshot.interval_nanos;
    let mut spans = Vec::with_capacity(snapshot.spans.len());
    for span in &*snapshot.spans {
        let pass = PASSES.iter().position(|pass| *pass == span.pass).unwrap_or(0) as u8;
        let role = ROLES.iter().position(|role| *role == span.role).unwrap_or(0) as u8;
        spans.push(WireSpan {
            label: &span.label,
            kind: table.place(span.kind.0),
            stream: table.place(&span.stream),
            role_and_pass: role | pass << 2,
            rank: span.rank,
            stage: span.stage,
            layer: span.layer,
            microbatch: span.microbatch,
            start_nanos: span.start_nanos.wrapping_sub(begin_nanos) as i64,
            nanos: span.nanos(),
            waited_for: span.waited_for,
            wait_nanos: span.wait_nanos,
            load: span.load,
            cost: span.cost.fields().map(|(_, value)| value),
        });
    }
    let wire = WireSnapshot {
        step: snapshot.step,
        begin_nanos,
        step_nanos: end_nanos.saturating_sub(begin_nanos),
        spans,
        scalars: snapshot.scalars.iter().map(|(name, value)| (name.as_str(), *value)).collect(),
        histograms: snapshot
            .histograms
            .iter()
            .map(|(name, values)| (name.as_str(), values.as_slice().into()))
            .collect(),
        texts: table.0,
    };
    postcard::to_allocvec(&wire).map_err(damaged)
}

/// A whole frame: the version, how many snapshots this listener missed so far, and the part from [`encode`].
pub fn frame(num_dropped: u64, encoded: &[u8]) -> Vec<u8> {
    let mut frame = Vec::with_capacity(HEADER_BYTES + encoded.len());
    frame.push(VERSION);
    frame.extend(num_dropped.to_le_bytes());
    frame.extend(encoded);
    frame
}

/// Version and number of missed snapshots.
const HEADER_BYTES: usize = 9;

/// Reads a frame.
///
/// # Errors
/// If it is of another version or damaged.
pub fn decode(frame: &[u8]) -> Result<Frame, FrameError> {
    match frame.first() {
        None => return Err(FrameError::Damaged("it is empty".into())),
        Some(&VERSION) => {}
        Some(&other) => return Err(FrameError::Version(other)),
    }
    let Some((header, encoded)) = frame.split_at_checked(HEADER_BYTES) else {
        return Err(FrameError::Damaged(format!("it has {} bytes", frame.len())));
    };
    let num_dropped = u64::from_le_bytes(header[1..].try_into().unwrap_or_default());
    let wire: WireSnapshot = postcard::from_bytes(encoded).map_err(damaged)?;
    Ok(Frame { num_dropped, snapshot: Arc::new(snapshot(wire)?) })
}

fn snapshot(wire: WireSnapshot<'_>) -> Result<Snapshot, FrameError> {
    let texts: Vec<Arc<str>> = wire.texts.iter().map(|&text| text.into()).collect();
    let text = |place: u32| {
        let text = texts.get(place as usize);
        text.ok_or_else(|| FrameError::Damaged(format!("text {place} of {}", texts.len())))
    };
    let num_spans = wire.spans.len();
    let span = |span: &WireSpan<'_>| {
        if let Some(task) = span.waited_for.filter(|&task| task as usize >= num_spans) {
            return Err(FrameError::Damaged(format!("a task waited for task {task} of {num_spans}")));
        }
        let start_nanos = wire.begin_nanos.saturating_add_signed(span.start_nanos);
        let end_nanos = start_nanos.saturating_add(span.nanos);
        let mut cost = Cost::default();
        for ((name, _), value) in Cost::default().fields().into_iter().zip(span.cost) {
            if let Some(field) = cost.field_mut(name) {
                *field = value;
            }
        }
        Ok(Span {
            label: span.label.into(),
            kind: TaskKind::read(text(span.kind)?).ok_or_else(too_many_kinds)?,
            pass: PASSES[usize::from(span.role_and_pass >> 2 & 3)],
            stage: span.stage,
            layer: span.layer,
            microbatch: span.microbatch,
            cost,
            rank: span.rank,
            stream: text(span.stream)?.clone(),
            start_nanos,
            end_nanos,
            waited_for: span.waited_for,
            role: ROLES[usize::from(span.role_and_pass & 3)],
            wait_nanos: span.wait_nanos.min(end_nanos - start_nanos),
            load: span.load,
        })
    };
    let spans = wire.spans.iter().map(span).collect::<Result<Vec<_>, FrameError>>()?;
    Ok(Snapshot {
        step: wire.step,
        interval_nanos: (wire.begin_nanos, wire.begin_nanos.saturating_add(wire.step_nanos)),
        spans: spans.into(),
        scalars: wire.scalars.iter().map(|&(name, value)| (name.to_owned(), value)).collect(),
        histograms: wire.histograms.into_iter().map(|(name, values)| (name.to_owned(), values.into_owned())).collect(),
    })
}

fn too_many_kinds() -> FrameError {
    FrameError::Damaged("more kinds of tasks than there can be, or one with a name of a page".into())
}

fn damaged(error: postcard::Error) -> FrameError {
    FrameError::Damaged(error.to_string())
}

/// A request as text.
pub fn request(id: u64, method: &str, params: &Value) -> String {
    json!({ "jsonrpc": "2.0", "id": id, "method": method, "params": params }).to_string()
}

/// An answer as JSON.
pub fn response(id: &Value, result: RpcResult) -> Value {
    match result {
        Ok(result) => json!({ "jsonrpc": "2.0", "id": id, "result": result }),
        Err(error) => json!({ "jsonrpc": "2.0", "id": id, "error": error }),
    }
}

/// Reads an answer: which request it is to, and what it came to. `None` if it is none.
pub fn read_response(text: &str) -> Option<(u64, RpcResult)> {
    #[derive(Deserialize)]
    struct Response {
        id: u64,
        #[serde(default)]
        result: Value,
        error: Option<RpcError>,
    }
    let Response { id, result, error } = serde_json::from_str(text).ok()?;
    Some((id, error.map_or(Ok(result), Err)))
}

#[cfg(test)]
#[path = "protocol_tests.rs"]
mod tests;
