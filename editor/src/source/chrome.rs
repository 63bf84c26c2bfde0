//! Chrome traces to snapshots: those that Hadal writes, and those of PyTorch's profiler, as DeepSeek published them, where
//! `user_annotation` slices name what the kernels on a device's stream lanes belong to.

use std::{
    borrow::Cow,
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
};

use engine::{
    task::{Pass, Role, TaskKind},
    telemetry::{Snapshot, Span},
    trace,
};
use serde::Deserialize;
use serde_json::Value;

/// A scalar of steps from another program's trace, which does not say what waited for what: idle time has no cause in them.
pub const FOREIGN: &str = "is_foreign_trace";

/// A scalar of steps from a plan's trace: nothing in them was measured.
pub const PLANNED: &str = "is_planned";

/// Categories of slices that a device ran, in PyTorch's traces.
const DEVICE_CATEGORIES: [&str; 3] = ["kernel", "gpu_memcpy", "gpu_memset"];
/// Categories of slices that name a stretch of others.
const ANNOTATIONS: [&str; 2] = ["gpu_user_annotation", "user_annotation"];
/// What a kernel's name has in it if it moves bytes between devices.
const COMMUNICATION: [&str; 14] = [
    "nccl",
    "deep_ep",
    "deepep",
    "nvshmem",
    "dispatch",
    "combine",
    "all_to_all",
    "alltoall",
    "all_gather",
    "allgather",
    "all_reduce",
    "allreduce",
    "reduce_scatter",
    "sendrecv",
];

#[derive(Deserialize)]
struct Event<'a> {
    #[serde(borrow, default)]
    ph: Cow<'a, str>,
    #[serde(borrow, default)]
    name: Cow<'a, str>,
    #[serde(borrow, default)]
    cat: Cow<'a, str>,
    #[serde(default)]
    pid: Value,
    #[serde(default)]
    tid: Value,
    #[serde(default)]
    ts: f64,
    #[serde(default)]
    dur: f64,
    #[serde(default)]
    args: Value,
}

#[derive(Deserialize)]
struct Document<'a> {
    #[serde(borrow, rename = "traceEvents")]
    trace_events: Vec<Event<'a>>,
}

/// Begin, end and name of a stretch.
type Annotation<'a> = (u64, u64, &'a str);

/// The steps of a trace.
///
/// # Errors
/// If the text is no trace, or has no slices on streams.
pub fn parse(text: &str) -> Result<Vec<Snapshot>, String> {
    let events = events(text)?;
    let mut snapshots =
        if events.iter().any(|event| event.args.get("step").is_some()) { own(&events) } else { profiled(&events) };
    let says_planned = |event: &Event| {
        event.ph == "M"
            && event.name == trace::ORIGIN
            && event.args.get("name").is_some_and(|name| name == trace::PLANNED)
    };
    if events.iter().any(says_planned) {
        snapshots.iter_mut().for_each(|snapshot| snapshot.scalars.push((PLANNED.to_owned(), 1.0)));
    }
    if snapshots.iter().all(|snapshot| snapshot.spans.is_empty()) {
        let slices = events.iter().filter(|event| event.ph == "X").count();
        return Err(format!(
            "expected tasks, or kernels on streams, found {} events of which {slices} are slices of another sort",
            events.len()
        ));
    }
    Ok(snapshots)
}

/// An array of events, or an object that has one; an array that was cut off is read as far as it goes.
fn events(text: &str) -> Result<Vec<Event<'_>>, String> {
    let whole = text.trim();
    if whole.starts_with('{') {
        let document: Result<Document, _> = serde_json::from_str(whole);
        return document.map(|document| document.trace_events).map_err(|e| format!("expected a Chrome trace: {e}"));
    }
    let first: serde_json::Error = match serde_json::from_str(whole) {
        Ok(events) => return Ok(events),
        Err(error) => error,
    };
    // Events stand in lines of their own; the last one may be broken off.
    let cut = whole.strip_prefix('[').filter(|_| first.is_eof()).and_then(|rest| {
        let parse = |text: &'_ str| serde_json::from_str::<Event<'_>>(text.trim().trim_end_matches(',')).is_ok();
        let last = rest.rfind('\n')?;
        let end = if parse(&rest[last..]) { rest.len() } else { last };
        Some(rest[..end].trim().trim_end_matches(','))
    });
    let Some(cut) = cut else { return Err(format!("expected a Chrome trace, an array of events: {first}")) };
    let lines = cut.lines().map(|line| line.trim().trim_end_matches(',')).filter(|line| !line.is_empty());
    lines
        .map(|line| serde_json::from_str(line).map_err(|e| format!("expected an event, found `{}`: {e}", short(line))))
        .collect()
}

fn short(text: &str) -> &str {
    text.char_indices().nth(60).map_or(text, |(end, _)| &text[..end])
}

fn nanos(micros: f64) -> u64 {
    (micros * 1000.0).round().max(0.0) as u64
}

/// The kind of this name; a file with too many has names that are no kinds.
pub fn kind(name: &str) -> TaskKind {
    TaskKind::read(name).unwrap_or(TaskKind("other"))
}

/// Names of streams by process and thread, from the metadata.
fn thread_names<'a>(events: &'a [Event<'_>]) -> BTreeMap<(String, String), &'a str> {
    let named = events.iter().filter(|event| event.ph == "M" && event.name == "thread_name");
    named.filter_map(|e| Some(((e.pid.to_string(), e.tid.to_string()), e.args.get("name")?.as_str()?))).collect()
}

/// Those that Hadal wrote.
fn own(events: &[Event<'_>]) -> Vec<Snapshot> {
    let names = thread_names(events);
    let mut streams: BTreeMap<(String, String), Arc<str>> = BTreeMap::new();
    let mut steps: BTreeMap<u64, Vec<Span>> = BTreeMap::new();
    let mut intervals: BTreeMap<u64, (u64, u64)> = BTreeMap::new();
    // For each step, the places in it of a rank's tasks, in launch order.
    let mut of_rank: BTreeMap<(u64, u32), Vec<u32>> = BTreeMap::new();
    for event in events.iter().filter(|event| event.ph == "X") {
        let Some(step) = event.args.get("step").and_then(Value::as_u64) else { continue };
        let (start, end) = (nanos(event.ts), nanos(event.ts + event.dur).max(nanos(event.ts)));
        let interval = intervals.entry(step).or_insert((start, end));
        *interval = (interval.0.min(start), interval.1.max(end));
        if event.cat == "bubble" {
            continue;
        }
        let key = (event.pid.to_string(), event.tid.to_string());
        let stream = streams.entry(key.clone()).or_insert_with(|| names.get(&key).copied().unwrap_or(&key.1).into());
        let rank = event.pid.as_u64().unwrap_or(0) as u32;
        let number = |name: &str| event.args.get(name).and_then(Value::as_u64).map(|value| value as u32);
        let text = |name: &str| event.args.get(name).and_then(Value::as_str);
        let spans = steps.entry(step).or_default();
        of_rank.entry((step, rank)).or_default().push(spans.len() as u32);
        let mut span = Span {
            label: (&*event.name).into(),
            kind: kind(text("kind").unwrap_or(&event.cat)),
            pass: text("pass").and_then(pass),
            stage: number("stage").unwrap_or(0),
            layer: number("layer"),
            microbatch: number("microbatch"),
            cost: Default::default(),
            rank,
            stream: stream.clone(),
            start_nanos: start,
            end_nanos: end,
            waited_for: number("after"),
            role: text("role")
                .and_then(|name| Role::ALL.into_iter().find(|role| role.name() == name))
                .unwrap_or_default(),
            wait_nanos: event.args.get("wait_us").and_then(Value::as_f64).map_or(0, nanos),
            load: event.args.get("load").and_then(|pair| Some((pair.get(0)?.as_u64()?, pair.get(1)?.as_u64()?))),
        };
        for (name, value) in event.args.get("cost").and_then(Value::as_object).into_iter().flatten() {
            if let (Some(field), Some(value)) = (span.cost.field_mut(name), value.as_u64()) {
                *field = value;
            }
        }
        spans.push(span);
    }
    let snapshot = |(step, mut spans): (u64, Vec<Span>)| {
        for span in &mut spans {
            let places = of_rank.get(&(step, span.rank));
            span.waited_for = span.waited_for.and_then(|place| places?.get(place as usize).copied());
        }
        let interval_nanos = intervals.get(&step).copied().unwrap_or_default();
        Snapshot { step, interval_nanos, spans: spans.into(), ..Snapshot::default() }
    };
    steps.into_iter().map(snapshot).collect()
}

fn pass(letter: &str) -> Option<Pass> {
    [Pass::Forward, Pass::InputGrad, Pass::WeightGrad].into_iter().find(|pass| pass.letter() == letter)
}

/// Those of PyTorch's profiler: one step, a lane for each device and stream.
fn profiled(events: &[Event<'_>]) -> Vec<Snapshot> {
    let names = thread_names(events);
    let slices = || events.iter().filter(|event| event.ph == "X" && event.dur > 0.0);
    let has_kernels = slices().any(|event| DEVICE_CATEGORIES.contains(&&*event.cat));
    let is_shown = |event: &&Event| {
        if has_kernels { DEVICE_CATEGORIES.contains(&&*event.cat) } else { ANNOTATIONS.contains(&&*event.cat) }
    };
    // Annotations by lane and begin, to find the innermost one around a kernel.
    let mut annotations: BTreeMap<(String, String), Vec<Annotation>> = BTreeMap::new();
    for event in slices().filter(|event| has_kernels && ANNOTATIONS.contains(&&*event.cat)) {
        let lane = annotations.entry((event.pid.to_string(), event.tid.to_string())).or_default();
        lane.push((nanos(event.ts), nanos(event.ts + event.dur), &event.name));
    }
    annotations.values_mut().for_each(|lane| lane.sort_unstable());
    let origin = slices().filter(is_shown).map(|event| nanos(event.ts)).min().unwrap_or(0);
    let mut streams: BTreeMap<(String, String), (Arc<str>, bool)> = BTreeMap::new();
    let mut found: Vec<(u64, u64, bool, &Event, Option<&str>)> = Vec::new();
    for event in slices().filter(is_shown) {
        let key = (event.pid.to_string(), event.tid.to_string());
        let (start, end) = (nanos(event.ts), nanos(event.ts + event.dur));
        let around = annotations.get(&key).and_then(|lane| {
            let begun = lane.partition_point(|(from, ..)| *from <= start);
            lane[..begun].iter().rev().take(64).find(|(_, to, _)| *to >= end).map(|(.., name)| *name)
        });
        found.push((start - origin, end - origin, is_communication(&event.name, around), event, around));
    }
    found.sort_by_key(|(start, ..)| *start);
    // A stream of communication only is called so: what waits for it is then seen as waiting for a transfer.
    let mut communicates: BTreeMap<(String, String), bool> = BTreeMap::new();
    for (_, _, is_communication, event, _) in &found {
        let all = communicates.entry((event.pid.to_string(), event.tid.to_string())).or_insert(true);
        *all &= is_communication;
    }
    for (key, all) in &communicates {
        let name = names.get(key).map_or_else(|| key.1.trim_matches('"').to_owned(), |name| (*name).to_owned());
        let purpose = if *all { "comm" } else { "compute" };
        let name = name.strip_prefix("stream ").unwrap_or(&name);
        streams.insert(key.clone(), (format!("{purpose} {name}").into(), *all));
    }
    let devices: BTreeSet<String> = found.iter().map(|(.., event, _)| event.pid.to_string()).collect();
    let rank_of = |pid: &Value| {
        let text = pid.to_string();
        pid.as_u64()
            .filter(|pid| *pid < 1 << 20)
            .map_or_else(|| devices.iter().position(|device| *device == text).unwrap_or(0) as u32, |pid| pid as u32)
    };
    let span = |(start_nanos, end_nanos, is_communication, event, around): (u64, u64, bool, &Event, Option<&str>)| {
        let named = around.unwrap_or(&event.name);
        let key = (event.pid.to_string(), event.tid.to_string());
        let (stream, _) = streams.get(&key).cloned().unwrap_or_else(|| ("stream".into(), false));
        Span {
            label: match around {
                Some(around) => format!("{around}: {}", event.name).into(),
                None => (&*event.name).into(),
            },
            kind: kind(kind_of(&event.name)),
            pass: pass_of(named),
            stage: 0,
            layer: None,
            microbatch: None,
            cost: Default::default(),
            rank: rank_of(&event.pid),
            stream,
            start_nanos,
            end_nanos,
            waited_for: None,
            role: if is_communication { Role::Collective } else { Role::Compute },
            wait_nanos: 0,
            load: None,
        }
    };
    let spans: Vec<Span> = found.into_iter().map(span).collect();
    let end = spans.iter().map(|span| span.end_nanos).max().unwrap_or(0);
    let scalars = vec![(FOREIGN.to_owned(), 1.0)];
    vec![Snapshot { interval_nanos: (0, end), spans: spans.into(), scalars, ..Snapshot::default() }]
}

fn is_communication(name: &str, around: Option<&str>) -> bool {
    let moves = |name: &str| {
        let name = name.to_ascii_lowercase();
        COMMUNICATION.iter().any(|word| name.contains(word)) || words(&name).any(|word| word == "comm")
    };
    moves(name) || around.is_some_and(moves)
}

/// The name of a kernel without its template arguments and parameters.
fn kind_of(name: &str) -> &str {
    let end = name.find(['<', '(', ',']).unwrap_or(name.len());
    let name = name[..end].trim();
    name.strip_prefix("void ").unwrap_or(name)
}

fn words(name: &str) -> impl Iterator<Item = &str> {
    name.split(|c: char| !c.is_ascii_alphanumeric())
}

/// The pass that an annotation names.
fn pass_of(name: &str) -> Option<Pass> {
    let name = name.to_ascii_lowercase();
    let has = |text: &str| name.contains(text);
    if has("wgrad") || has("weight_grad") || has("backward_w") || words(&name).any(|word| word == "w") {
        Some(Pass::WeightGrad)
    } else if has("backward") || has("bwd") || has("dgrad") || words(&name).any(|word| word == "b") {
        Some(Pass::InputGrad)
    } else if has("forward") || has("fwd") || words(&name).any(|word| word == "f") {
        Some(Pass::Forward)
    } else {
        None
    }
}
