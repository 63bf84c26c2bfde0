//! Launches as a CUDA graph: recorded once with their arguments, launched as one.
//!
//! A run of launches that comes again and again costs the host one call instead of one for each. Addresses and numbers are the graph's
//! own: what changes from step to step (a learning rate, another tensor, scratch that grew) makes another graph. Steps of training do
//! not go through graphs yet: each of their tasks has events of its own, which its times come from, between a few launches. What they
//! would save is measured by `hadal bench kernels`.

use std::sync::Arc;

use cudarc::driver::{CudaGraph, sys};

use super::{Gpu, Lane};
use crate::{error::Result, memory::Memory, ptx::Launch};

/// Launches that were recorded on one lane, for that lane.
pub struct Graph {
    gpu: Arc<Gpu>,
    graph: CudaGraph,
}

// SAFETY: the driver wants calls on one graph one at a time; a graph is used by the thread that drives its lane.
unsafe impl Send for Graph {}

impl Lane {
    /// Records the launches; none of them runs.
    pub(crate) fn capture(&mut self, memory: &Memory, task: &Arc<str>, launches: &[Launch]) -> Result<Graph> {
        // What allocates or loads may not happen in a capture, so it happens before.
        self.prepare(memory, task, launches)?;
        let gpu = self.gpu().clone();
        let failed = gpu.failed("recording a graph");
        let mode = sys::CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL;
        self.shared_stream().begin_capture(mode).map_err(&failed)?;
        let launched = self.launch(memory, task, launches);
        // Also after a failure: the stream is of no use while it records.
        let graph = self.shared_stream().end_capture(sys::CUgraphInstantiate_flags(0));
        launched?;
        let nothing = || crate::error::Error::Driver {
            device: crate::device::Device::Cuda(gpu.info().ordinal).to_string(),
            call: "recording a graph",
            message: "nothing was launched".into(),
        };
        let graph = graph.map_err(&failed)?.ok_or_else(nothing)?;
        Ok(Graph { gpu: gpu.clone(), graph })
    }

    /// Enqueues all of a graph.
    pub(crate) fn replay(&self, graph: &Graph) -> Result<()> {
        graph.graph.launch().map_err(graph.gpu.failed("launching a graph"))
    }
}
