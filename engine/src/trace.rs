//! Chrome trace files, for Perfetto, `chrome://tracing` and the editor: a lane per stream, a slice per task, and slices
//! for the bubbles of compute streams, so that idle time has a cause and is not just a gap.
//!
//! The file is one JSON array that is written as the run goes; a run that is cut off leaves it without its closing bracket,
//! which viewers accept. A trace of a plan says so in its first event; one that says nothing was measured.

use std::{
    collections::BTreeMap,
    fs::File,
    io::{self, BufWriter, Write},
    path::Path,
    sync::Arc,
};

use kernels::comm::ClockOffset;
use serde_json::{Map, Value, json};

use crate::{
    bubbles::{bubbles, is_compute},
    task::Role,
    telemetry::Snapshot,
};

/// Name of the metadata event that says where the times of a trace are from; its `args.name` is [`PLANNED`] or is not known.
pub const ORIGIN: &str = "origin";
/// What [`ORIGIN`] says where times were computed and not measured.
pub const PLANNED: &str = "planned";

/// Name of the metadata event that says what was added to another process' times, and how wrong that is at most.
pub const CLOCK: &str = "clock";

/// Writes a trace, step by step.
pub struct TraceWriter<W: Write> {
    out: W,
    /// Thread id of each lane, in order of first use.
    lanes: BTreeMap<(u32, Arc<str>), usize>,
    is_empty: bool,
}

impl TraceWriter<BufWriter<File>> {
    /// A trace in a new file at `path`.
    ///
    /// # Errors
    /// If the file cannot be created or written.
    pub fn create(path: &Path) -> io::Result<Self> {
        TraceWriter::new(BufWriter::new(File::create(path)?))
    }
}

impl<W: Write> TraceWriter<W> {
    /// A trace into `out`.
    ///
    /// # Errors
    /// If `out` cannot be written.
    pub fn new(mut out: W) -> io::Result<Self> {
        out.write_all(b"[")?;
        Ok(TraceWriter { out, lanes: BTreeMap::new(), is_empty: true })
    }

    /// The same for steps that were computed: whoever reads it is told that nothing in it was measured.
    ///
    /// # Errors
    /// If `out` cannot be written.
    pub fn planned(out: W) -> io::Result<Self> {
        let mut writer = TraceWriter::new(out)?;
        writer.metadata(ORIGIN, 0, 0, PLANNED)?;
        Ok(writer)
    }

    /// Adds a step.
    ///
    /// # Errors
    /// If it cannot be written.
    pub fn push(&mut self, snapshot: &Snapshot) -> io::Result<()> {
        // A task is named by its place among those of its rank: ranks may be written one after the other.
        let mut num_of_rank: BTreeMap<u32, u32> = BTreeMap::new();
        let mut place_in_rank = Vec::with_capacity(snapshot.spans.len());
        for span in &*snapshot.spans {
            let count = num_of_rank.entry(span.rank).or_default();
            place_in_rank.push(*count);
            *count += 1;
        }
        for span in &*snapshot.spans {
            let tid = self.lane(span.rank, &span.stream)?;
            let mut args = json!({
                "step": snapshot.step,
                "microbatch": span.microbatch,
                "stage": span.stage,
                "layer": span.layer,
                "pass": span.pass.map(|pass| pass.letter()),
                "kind": span.kind.0,
            });
            if span.wait_nanos > 0 {
                args["wait_us"] = json!(micros(span.wait_nanos));
            }
            if span.role != Role::Compute {
                args["role"] = json!(span.role.name());
            }
            if let Some((mine, most)) = span.load {
                args["load"] = json!([mine, most]);
            }
            if let Some(&place) = span.waited_for.and_then(|task| place_in_rank.get(task as usize)) {
                args["after"] = json!(place);
            }
            let asked = span.cost.fields().into_iter().filter(|(_, value)| *value > 0);
            let asked: Map<String, Value> = asked.map(|(name, value)| (name.to_owned(), value.into())).collect();
            if !asked.is_empty() {
                args["cost"] = asked.into();
            }
            self.slice(&span.label, span.kind.0, span.rank, tid, (span.start_nanos, span.end_nanos), args)?;
        }
        for bubble in bubbles(&snapshot.spans, is_compute, snapshot.interval_nanos) {
            let tid = self.lane(bubble.rank, &bubble.stream)?;
            let mut args = json!({ "step": snapshot.step, "cause": bubble.cause.name() });
            if let Some(label) = &bubble.waited_for {
                args["waited_for"] = json!(**label);
            }
            self.slice("bubble", "bubble", bubble.rank, tid, (bubble.start_nanos, bubble.end_nanos), args)?;
        }
        Ok(())
    }

    /// Adds what another process wrote of its rank: a whole trace, by a clock of its own.
    ///
    /// # Errors
    /// If it is none, or cannot be written.
    pub fn append(&mut self, rank: u32, document: &[u8], offset: ClockOffset) -> io::Result<()> {
        let (add_us, error_us) = (offset.add_nanos as f64 / 1000.0, micros(offset.error_nanos));
        let clock =
            json!({ "name": format!("{add_us:+} us, within {error_us}"), "add_us": add_us, "error_us": error_us });
        self.event(&json!({ "ph": "M", "name": CLOCK, "pid": rank, "tid": 0, "args": clock }))?;
        for mut event in serde_json::from_slice::<Vec<Value>>(document)? {
            if let Some(ts) = event.get("ts").and_then(Value::as_f64) {
                event["ts"] = json!(micros(offset.apply((ts * 1000.0).round() as u64)));
            }
            self.event(&event)?;
        }
        Ok(())
    }

    /// Closes the array and flushes.
    ///
    /// # Errors
    /// If it cannot be written.
    pub fn finish(mut self) -> io::Result<W> {
        self.out.write_all(b"\n]\n")?;
        self.out.flush()?;
        Ok(self.out)
    }

    fn lane(&mut self, rank: u32, stream: &Arc<str>) -> io::Result<usize> {
        if let Some(&tid) = self.lanes.get(&(rank, stream.clone())) {
            return Ok(tid);
        }
        if !self.lanes.keys().any(|(known, _)| *known == rank) {
            self.metadata("process_name", rank, 0, &format!("rank {rank}"))?;
        }
        let tid = self.lanes.len() + 1;
        self.lanes.insert((rank, stream.clone()), tid);
        self.metadata("thread_name", rank, tid, stream)?;
        Ok(tid)
    }

    fn metadata(&mut self, what: &str, rank: u32, tid: usize, name: &str) -> io::Result<()> {
        self.event(&json!({ "ph": "M", "name": what, "pid": rank, "tid": tid, "args": { "name": name } }))
    }

    fn slice(
        &mut self,
        name: &str,
        category: &str,
        rank: u32,
        tid: usize,
        (start_nanos, end_nanos): (u64, u64),
        args: Value,
    ) -> io::Result<()> {
        self.event(&json!({
            "ph": "X",
            "name": name,
            "cat": category,
            "pid": rank,
            "tid": tid,
            "ts": micros(start_nanos),
            "dur": micros(end_nanos - start_nanos),
            "args": args,
        }))
    }

    fn event(&mut self, event: &Value) -> io::Result<()> {
        self.out.write_all(if self.is_empty { b"\n" } else { b",\n" })?;
        self.is_empty = false;
        serde_json::to_writer(&mut self.out, event)?;
        Ok(())
    }
}

/// The format counts in microseconds; fractions keep the nanoseconds.
fn micros(nanos: u64) -> f64 {
    nanos as f64 / 1000.0
}

#[cfg(test)]
mod tests {
    #![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

    use super::*;
    use crate::{
        task::{Pass, Role},
        telemetry::{Span, tests::span},
    };

    const BEGIN: u64 = 5;
    const END: u64 = 60;

    /// Two ranks. `d` on rank 1 waits for a receive, `e` on rank 0 for nobody.
    fn step() -> Vec<Span> {
        let mut spans = vec![
            span("a", 0, "compute", 10, 20),
            span("b", 1, "compute", 12, 15),
            span("receive", 1, "comm", 15, 21),
            span("d", 1, "compute", 23, 30),
            span("e", 0, "compute", 20, 40),
        ];
        (spans[2].role, spans[2].wait_nanos) = (Role::Receive, 4);
        spans[3].waited_for = Some(2);
        (spans[1].pass, spans[1].microbatch, spans[1].layer, spans[1].stage) =
            (Some(Pass::InputGrad), Some(5), Some(7), 1);
        spans
    }

    #[test]
    fn the_file_parses_and_no_slices_of_a_lane_overlap() {
        let mut writer = TraceWriter::new(Vec::new()).unwrap();
        for step_index in 0..3 {
            let later = step_index * 1000;
            let mut spans = step();
            for span in &mut spans {
                span.start_nanos += later;
                span.end_nanos += later;
            }
            let interval_nanos = (BEGIN + later, END + later);
            let snapshot = Snapshot { step: step_index, interval_nanos, spans: spans.into(), ..Snapshot::default() };
            writer.push(&snapshot).unwrap();
        }
        let bytes = writer.finish().unwrap();
        let events: Vec<Value> = serde_json::from_slice(&bytes).unwrap();

        let mut lanes: BTreeMap<(u64, u64), Vec<(u64, u64)>> = BTreeMap::new();
        let nanos = |value: &Value| (value.as_f64().unwrap() * 1000.0).round() as u64;
        for event in events.iter().filter(|event| event["ph"] == "X") {
            let lane = lanes.entry((event["pid"].as_u64().unwrap(), event["tid"].as_u64().unwrap())).or_default();
            lane.push((nanos(&event["ts"]), nanos(&event["ts"]) + nanos(&event["dur"])));
        }
        for (lane, slices) in &mut lanes {
            slices.sort_unstable();
            assert!(slices.windows(2).all(|pair| pair[0].1 <= pair[1].0), "{lane:?}: {slices:?}");
        }
        let filled = |slices: &Vec<(u64, u64)>| slices.iter().map(|(start, end)| end - start).sum::<u64>();
        let filled: Vec<u64> = lanes.values().map(filled).collect();
        let whole = 3 * (END - BEGIN);
        assert_eq!(filled, [whole, whole, 3 * 6], "tasks and bubbles fill a compute lane; another lane has no bubbles");
        let names: Vec<&Value> = events.iter().filter(|e| e["name"] == "thread_name").map(|e| &e["pid"]).collect();
        assert_eq!(names, [0, 1, 1]);
    }

    #[test]
    fn a_trace_of_another_process_is_moved_to_the_clock_of_this_one() {
        let written = |rank: u32| {
            let mut writer = TraceWriter::new(Vec::new()).unwrap();
            let spans = [span("t", rank, "compute", 12, 15)].into();
            writer.push(&Snapshot { spans, interval_nanos: (BEGIN, END), ..Snapshot::default() }).unwrap();
            writer
        };
        let mut both = written(0);
        let offset = ClockOffset { add_nanos: -3, error_nanos: 2 };
        both.append(1, &written(1).finish().unwrap(), offset).unwrap();
        let both: Vec<Value> = serde_json::from_slice(&both.finish().unwrap()).unwrap();
        let tasks = both.iter().filter(|event| event["name"] == "t");
        let tasks: Vec<_> = tasks.map(|event| (&event["pid"], &event["ts"], &event["dur"])).collect();
        assert_eq!(
            tasks,
            [(&json!(0), &json!(0.012), &json!(0.003)), (&json!(1), &json!(0.009), &json!(0.003))],
            "the first rank's are where they were, the other's 3 ns earlier"
        );
        let clock = both.iter().find(|event| event["name"] == CLOCK).unwrap();
        assert_eq!((&clock["args"]["add_us"], &clock["args"]["error_us"]), (&json!(-0.003), &json!(0.002)));
    }

    #[test]
    fn a_plan_says_so_before_all_else() {
        let written = |writer: io::Result<TraceWriter<Vec<u8>>>| {
            let mut writer = writer.unwrap();
            writer.push(&Snapshot { spans: step().into(), ..Snapshot::default() }).unwrap();
            serde_json::from_slice::<Vec<Value>>(&writer.finish().unwrap()).unwrap()
        };
        let (planned, measured) = (written(TraceWriter::planned(Vec::new())), written(TraceWriter::new(Vec::new())));
        let mark = json!({"ph": "M", "name": "origin", "pid": 0, "tid": 0, "args": {"name": "planned"}});
        assert_eq!((&planned[0], &planned[1..]), (&mark, &measured[..]));
    }

    #[test]
    fn slices_say_what_they_are() {
        let mut writer = TraceWriter::new(Vec::new()).unwrap();
        let snapshot = Snapshot { interval_nanos: (BEGIN, END), spans: step().into(), ..Snapshot::default() };
        writer.push(&snapshot).unwrap();
        let events: Vec<Value> = serde_json::from_slice(&writer.finish().unwrap()).unwrap();
        let named =
            |name: &str| events.iter().filter(|e| e["name"] == name).map(|e| e["args"].clone()).collect::<Vec<_>>();
        assert_eq!(named("b"), [json!({"step": 0, "microbatch": 5, "stage": 1, "layer": 7, "pass": "I", "kind": "k"})]);
        assert_eq!((&named("receive")[0]["wait_us"], &named("receive")[0]["role"]), (&json!(0.004), &json!("receive")));
        assert_eq!(named("d")[0]["after"], 1, "the receive is the second task of its rank");
        let bubble = |cause: &str, waited_for: Option<&str>| {
            let mut args = json!({"step": 0, "cause": cause});
            waited_for.into_iter().for_each(|label| args["waited_for"] = json!(label));
            args
        };
        assert_eq!(
            named("bubble"),
            [
                bubble("warm_up", None),
                bubble("cool_down", None),
                bubble("warm_up", None),
                bubble("cool_down", Some("receive")),
                bubble("communication_copy", Some("receive")),
                bubble("launch", None),
                bubble("cool_down", None),
            ]
        );
    }
}
