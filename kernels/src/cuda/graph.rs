//! Launches as a CUDA graph: recorded once with their arguments, launched as one.
//!
//! A run of launches that comes again and again costs the host one call instead of one for each. Addresses and numbers are the graph's
//! own: what changes from step to step (a learning rate, another tensor, scratch that grew) makes another graph, and
//! [`crate::stream`] sees to it that a graph stands only for launches that are those it was recorded from.
//!
//! Times of tasks inside of a graph come from events that are nodes of it. When such a record counts for other streams, or for the host,
//! the driver's manual leaves open while the graph is on its way; so nobody waits for these events: a moment in a graph is waited for
//! by way of one that is recorded behind the graph, and only then its time is read.

use std::sync::Arc;

use cudarc::driver::{CudaEvent, CudaGraph, CudaStream, DriverError, sys};

use super::{Gpu, Lane, Mark, clock::TIMED};
use crate::{
    device::Device,
    error::{Error, Result},
    memory::Memory,
    ptx::Item,
};

/// Launches that were recorded on one lane, for that lane.
pub struct Graph {
    gpu: Arc<Gpu>,
    stream: Arc<CudaStream>,
    graph: CudaGraph,
    moments: Vec<Arc<CudaEvent>>,
    /// Of the lane's scratch, whose addresses are in it.
    scratch_version: u64,
}

// SAFETY: the driver wants calls on one graph one at a time; a graph is used by the thread that drives its lane.
unsafe impl Send for Graph {}

impl Lane {
    /// Records the items; none of them runs.
    pub(crate) fn capture(&mut self, memory: &Memory, items: &[Item<'_>]) -> Result<Graph> {
        let gpu = self.gpu().clone();
        let failed = gpu.failed("recording a graph");
        // What allocates or loads may not happen in a capture, so it happens before.
        let mut moments = Vec::new();
        for item in items {
            match item {
                Item::Launch(task, launches) => self.prepare(memory, task, launches)?,
                Item::Moment => moments.push(Arc::new(gpu.context.new_event(TIMED).map_err(&failed)?)),
            }
        }
        let scratch_version = self.scratch_version();
        let mode = sys::CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL;
        self.shared_stream().begin_capture(mode).map_err(&failed)?;
        let mut next = moments.iter();
        let recorded = items.iter().try_for_each(|item| match item {
            Item::Launch(task, launches) => self.launch(memory, task, launches),
            Item::Moment => next.next().map_or(Ok(()), |event| self.record_inside(event).map_err(&failed)),
        });
        // Also after a failure: the stream is of no use while it records.
        let graph = self.shared_stream().end_capture(sys::CUgraphInstantiate_flags(0));
        recorded?;
        let nothing = || Error::Driver {
            device: Device::Cuda(gpu.info().ordinal).to_string(),
            call: "recording a graph",
            message: "nothing was launched".into(),
        };
        let graph = graph.map_err(&failed)?.ok_or_else(nothing)?;
        Ok(Graph { gpu: gpu.clone(), stream: self.shared_stream().clone(), graph, moments, scratch_version })
    }

    /// A record of the event as a node of the graph that is recorded.
    fn record_inside(&self, event: &CudaEvent) -> std::result::Result<(), DriverError> {
        let external = sys::CUevent_record_flags::CU_EVENT_RECORD_EXTERNAL as u32;
        // SAFETY: event and stream are of this device, and live.
        unsafe { sys::cuEventRecordWithFlags(event.cu_event(), self.stream().cu_stream(), external) }.result()
    }

    /// Enqueues all of a graph; its moments, in order.
    pub(crate) fn replay(&self, graph: &Graph) -> Result<Vec<Arc<Mark>>> {
        graph.graph.launch().map_err(graph.gpu.failed("launching a graph"))?;
        if graph.moments.is_empty() {
            return Ok(vec![]);
        }
        let behind = Arc::new(self.record()?);
        Ok(graph.moments.iter().map(|event| Arc::new(Mark::inside(event, &behind))).collect())
    }
}

impl Drop for Graph {
    fn drop(&mut self) {
        // It may be on its way; a failure is one that others meet.
        let _ = self.stream.synchronize();
    }
}

impl Graph {
    /// Whether it stands for what the lane would launch now: what it has scratch in is where it was.
    pub(crate) fn is_of(&self, lane: &Lane) -> bool {
        self.scratch_version == lane.scratch_version()
    }

    /// Whether somebody still has to learn when a moment of its last replay was, which another would overwrite.
    pub(crate) fn is_watched(&self) -> bool {
        self.moments.iter().any(|event| Arc::strong_count(event) > 1)
    }
}
