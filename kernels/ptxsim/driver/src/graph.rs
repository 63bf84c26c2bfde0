//! Captures, and what is made of them. A graph here is the captured stream's work in its order.

use std::sync::Arc;

use crate::{
    errors::{INVALID_HANDLE, INVALID_VALUE, Outcome, STREAM_CAPTURE_UNSUPPORTED},
    queue::Op,
    state::{CAPTURES, Gpu},
};

/// `CU_STREAM_CAPTURE_MODE_RELAXED`: calls that may wait are the caller's affair.
const RELAXED: u32 = 2;

impl Gpu {
    /// `Err` for calls that may wait, on a thread that captures.
    pub(crate) fn may_wait(&self) -> Outcome {
        if CAPTURES.get() > 0 { Err(STREAM_CAPTURE_UNSUPPORTED) } else { Ok(()) }
    }

    pub(crate) fn begin_capture(&mut self, stream: u64, mode: u32) -> Outcome {
        let queue = self.queue(stream)?;
        if stream == 0 || mode > RELAXED || queue.capture.is_some() {
            return Err(INVALID_VALUE);
        }
        queue.capture = Some(Vec::new());
        if mode != RELAXED {
            CAPTURES.set(CAPTURES.get() + 1);
        }
        Ok(())
    }

    pub(crate) fn end_capture(&mut self, stream: u64) -> Outcome<u64> {
        let ops = self.queue(stream)?.capture.take().ok_or(INVALID_VALUE)?;
        CAPTURES.set(CAPTURES.get().saturating_sub(1));
        // Events between streams would join their captures, which the stand-in does not follow.
        if ops.iter().any(|op| matches!(op, Op::Record(_) | Op::Wait(_))) {
            return Err(STREAM_CAPTURE_UNSUPPORTED);
        }
        let id = self.handle();
        self.graphs.insert(id, Arc::new(ops));
        Ok(id)
    }

    pub(crate) fn instantiate(&mut self, graph: u64) -> Outcome<u64> {
        let ops = self.graphs.get(&graph).ok_or(INVALID_HANDLE)?.clone();
        let id = self.handle();
        self.graph_execs.insert(id, ops);
        Ok(id)
    }

    pub(crate) fn launch_graph(&mut self, exec: u64, stream: u64) -> Outcome {
        let ops = self.graph_execs.get(&exec).ok_or(INVALID_HANDLE)?.clone();
        self.stats.graphs += 1;
        self.stats.in_graphs += ops.iter().filter(|op| matches!(op, Op::Launch(_))).count() as u64;
        for op in ops.iter() {
            self.enqueue(stream, op.clone())?;
        }
        Ok(())
    }
}
