//! Chrome trace files, for Perfetto, `chrome://tracing` and the editor: a lane per stream, a slice per task, and a slice per
//! bubble, so that idle time has a cause and not just a gap.
//!
//! The file is one JSON array that is written as the run goes; a run that is cut off leaves it without its closing bracket,
//! which viewers accept.

use std::{
    collections::BTreeMap,
    fs::File,
    io::{self, BufWriter, Write},
    path::Path,
    sync::Arc,
};

use serde_json::{Map, Value, json};

use crate::telemetry::{Snapshot, Span};

/// Why a stream was idle.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum BubbleCause {
    /// Before the stream's first task of the step, while others already worked: the pipeline fills.
    Start,
    /// Until the last task on another stream that the next one waits for had ended.
    Dependency,
    /// All that the next task waits for had ended, and it was not launched yet.
    Host,
    /// After the stream's last task of the step, while others still work: the pipeline drains.
    End,
}

impl BubbleCause {
    /// As in `args.cause`.
    pub const fn name(self) -> &'static str {
        match self {
            BubbleCause::Start => "start",
            BubbleCause::Dependency => "dependency",
            BubbleCause::Host => "host",
            BubbleCause::End => "end",
        }
    }
}

/// Idle time of a stream within a step.
#[derive(Clone, Debug, PartialEq)]
pub struct Bubble {
    /// Rank of the stream.
    pub rank: u32,
    /// Name of the stream.
    pub stream: Arc<str>,
    /// Begin.
    pub start_nanos: u64,
    /// End.
    pub end_nanos: u64,
    /// Why.
    pub cause: BubbleCause,
    /// For a dependency: the task that was waited for.
    pub waited_for: Option<Arc<str>>,
}

/// The idle times of a step's streams between its first start and its last end, by stream, then by time.
///
/// A gap between two tasks is split at the end of what the second waited for: before it the cause is that dependency, after
/// it the host. A step's streams are those that have a span in it.
pub fn bubbles(spans: &[Span]) -> Vec<Bubble> {
    let first = spans.iter().map(|span| span.start_nanos).min().unwrap_or(0);
    let last = spans.iter().map(|span| span.end_nanos).max().unwrap_or(0);
    let mut lanes: BTreeMap<(u32, &Arc<str>), Vec<&Span>> = BTreeMap::new();
    for span in spans {
        lanes.entry((span.rank, &span.stream)).or_default().push(span);
    }
    let mut bubbles = Vec::new();
    for ((rank, stream), lane) in lanes {
        let mut idle = |from: u64, to: u64, cause, waited_for: Option<&Span>| {
            if from < to {
                let waited_for = waited_for.map(|span| span.label.clone());
                let (start_nanos, end_nanos) = (from, to);
                bubbles.push(Bubble { rank, stream: stream.clone(), start_nanos, end_nanos, cause, waited_for });
            }
        };
        let mut free = first;
        for (i, span) in lane.iter().enumerate() {
            let dep = span.waited_for.map(|dep| &spans[dep as usize]);
            if i == 0 {
                idle(free, span.start_nanos, BubbleCause::Start, None);
            } else {
                let ready = dep.map_or(free, |dep| dep.end_nanos.clamp(free, span.start_nanos.max(free)));
                idle(free, ready, BubbleCause::Dependency, dep);
                idle(ready, span.start_nanos, BubbleCause::Host, None);
            }
            free = span.end_nanos;
        }
        idle(free, last, BubbleCause::End, None);
    }
    bubbles
}

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

    /// Adds a step.
    ///
    /// # Errors
    /// If it cannot be written.
    pub fn push(&mut self, snapshot: &Snapshot) -> io::Result<()> {
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
            let asked = span.cost.fields().into_iter().filter(|(_, value)| *value > 0);
            let asked: Map<String, Value> = asked.map(|(name, value)| (name.to_owned(), value.into())).collect();
            if !asked.is_empty() {
                args["cost"] = asked.into();
            }
            self.slice(&span.label, span.kind.0, span.rank, tid, (span.start_nanos, span.end_nanos), args)?;
        }
        for bubble in bubbles(&snapshot.spans) {
            let tid = self.lane(bubble.rank, &bubble.stream)?;
            let mut args = json!({ "step": snapshot.step, "cause": bubble.cause.name() });
            if let Some(label) = &bubble.waited_for {
                args["waited_for"] = json!(**label);
            }
            self.slice("bubble", "bubble", bubble.rank, tid, (bubble.start_nanos, bubble.end_nanos), args)?;
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
        // The format counts in microseconds; fractions keep the nanoseconds.
        let micros = |nanos: u64| nanos as f64 / 1000.0;
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

#[cfg(test)]
mod tests {
    #![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

    use super::*;
    use crate::{task::Pass, telemetry::tests::span};

    /// Two ranks: rank 0 works from 0 to 40 with gaps, rank 1 waits for `a` first, then for `c`.
    fn step() -> Vec<Span> {
        let mut spans = vec![
            span("a", 0, "compute", 0, 10),
            span("b", 1, "compute", 12, 15),
            span("c", 0, "compute", 14, 20),
            span("d", 1, "compute", 23, 30),
            span("e", 0, "compute", 20, 40),
        ];
        spans[1].waited_for = Some(0);
        spans[3].waited_for = Some(2);
        spans[4].waited_for = Some(1);
        (spans[1].pass, spans[1].microbatch, spans[1].layer, spans[1].stage) =
            (Some(Pass::InputGrad), Some(5), Some(7), 1);
        spans
    }

    #[test]
    fn a_gap_is_split_into_what_was_waited_for_and_the_host() {
        let found: Vec<_> = bubbles(&step())
            .into_iter()
            .map(|b| (b.rank, b.start_nanos, b.end_nanos, b.cause, b.waited_for.map(|label| label.to_string())))
            .collect();
        let c = || Some("c".to_owned());
        assert_eq!(
            found,
            [
                (0, 10, 14, BubbleCause::Host, None),
                (1, 0, 12, BubbleCause::Start, None),
                (1, 15, 20, BubbleCause::Dependency, c()),
                (1, 20, 23, BubbleCause::Host, None),
                (1, 30, 40, BubbleCause::End, None),
            ]
        );
        assert_eq!(bubbles(&[]), []);
    }

    #[test]
    fn the_file_parses_and_no_slices_of_a_lane_overlap() {
        let mut writer = TraceWriter::new(Vec::new()).unwrap();
        for step_index in 0..3 {
            let mut spans = step();
            for span in &mut spans {
                span.start_nanos += step_index * 1000;
                span.end_nanos += step_index * 1000;
            }
            writer.push(&Snapshot { step: step_index, spans: spans.into(), ..Snapshot::default() }).unwrap();
        }
        let bytes = writer.finish().unwrap();
        let events: Vec<Value> = serde_json::from_slice(&bytes).unwrap();

        let mut lanes: BTreeMap<(u64, u64), Vec<(u64, u64)>> = BTreeMap::new();
        let nanos = |value: &Value| (value.as_f64().unwrap() * 1000.0).round() as u64;
        for event in events.iter().filter(|event| event["ph"] == "X") {
            let lane = lanes.entry((event["pid"].as_u64().unwrap(), event["tid"].as_u64().unwrap())).or_default();
            lane.push((nanos(&event["ts"]), nanos(&event["ts"]) + nanos(&event["dur"])));
        }
        assert_eq!(lanes.len(), 2);
        for (lane, slices) in &mut lanes {
            slices.sort_unstable();
            assert!(slices.windows(2).all(|pair| pair[0].1 <= pair[1].0), "{lane:?}: {slices:?}");
            let filled: u64 = slices.iter().map(|(start, end)| end - start).sum();
            assert_eq!(filled, 3 * 40, "tasks and bubbles fill each lane of a step");
        }
        let names: Vec<&Value> = events.iter().filter(|e| e["name"] == "thread_name").map(|e| &e["pid"]).collect();
        assert_eq!(names, [0, 1]);
        let b = events.iter().find(|event| event["name"] == "b").unwrap();
        let args = json!({"step": 0, "microbatch": 5, "stage": 1, "layer": 7, "pass": "I", "kind": "k"});
        assert_eq!(b["args"], args);
    }
}
