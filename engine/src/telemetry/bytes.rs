//! A snapshot as bytes, for listeners and processes elsewhere: postcard. Texts that many spans share are in one table and named by
//! their place in it, and times count from the begin of the step. Nothing is copied before it is written: a step is encoded while
//! the next one runs, on the same processors.
//!
//! Bytes come from elsewhere: nothing in them is believed before it is checked.

use std::{borrow::Cow, sync::Arc};

use kernels::cost::Cost;
use serde::{Deserialize, Serialize};

use super::{Snapshot, Span};
use crate::task::{Pass, Role, TaskKind};

/// Bytes that are no snapshot, and why.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub struct Damaged(pub String);

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

/// A snapshot as bytes.
///
/// # Errors
/// None that a snapshot can cause; the encoder's.
pub fn to_bytes(snapshot: &Snapshot) -> Result<Vec<u8>, Damaged> {
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

/// The snapshot that these bytes are.
///
/// # Errors
/// If they are not what [`to_bytes`] makes.
pub fn from_bytes(bytes: &[u8]) -> Result<Snapshot, Damaged> {
    let wire: WireSnapshot = postcard::from_bytes(bytes).map_err(damaged)?;
    let texts: Vec<Arc<str>> = wire.texts.iter().map(|&text| text.into()).collect();
    let text = |place: u32| {
        let text = texts.get(place as usize);
        text.ok_or_else(|| Damaged(format!("text {place} of {}", texts.len())))
    };
    let num_spans = wire.spans.len();
    let span = |span: &WireSpan<'_>| {
        if let Some(task) = span.waited_for.filter(|&task| task as usize >= num_spans) {
            return Err(Damaged(format!("a task waited for task {task} of {num_spans}")));
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
    let spans = wire.spans.iter().map(span).collect::<Result<Vec<_>, Damaged>>()?;
    Ok(Snapshot {
        step: wire.step,
        interval_nanos: (wire.begin_nanos, wire.begin_nanos.saturating_add(wire.step_nanos)),
        spans: spans.into(),
        scalars: wire.scalars.iter().map(|&(name, value)| (name.to_owned(), value)).collect(),
        histograms: wire.histograms.into_iter().map(|(name, values)| (name.to_owned(), values.into_owned())).collect(),
    })
}

fn too_many_kinds() -> Damaged {
    Damaged("more kinds of tasks than there can be, or one with a name of a page".into())
}

fn damaged(error: postcard::Error) -> Damaged {
    Damaged(error.to_string())
}
