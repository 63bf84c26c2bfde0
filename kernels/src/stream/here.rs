//! What a job finds on its stream's thread: the memory, and where that is a GPU's, the stream to put more on.

use std::sync::Arc;

use crate::{cuda::Lane, error::Result, memory::Memory};

/// Where a job runs: between what was launched before it and after it.
pub struct Here<'a> {
    memory: &'a Memory,
    lane: Option<&'a mut Lane>,
    op: &'static str,
    task: &'a Arc<str>,
    is_ready: bool,
}

impl<'a> Here<'a> {
    pub(super) fn new(memory: &'a Memory, lane: Option<&'a mut Lane>, op: &'static str, task: &'a Arc<str>) -> Self {
        Here { memory, is_ready: lane.is_none(), lane, op, task }
    }

    /// Waits until the GPU, if there is one, is done with what was launched before.
    ///
    /// # Errors
    /// What it failed of, or a kernel found wrong.
    pub fn ready(&mut self) -> Result<()> {
        if let (Some(lane), false) = (&self.lane, self.is_ready) {
            lane.synchronize()?;
            self.is_ready = true;
        }
        Ok(())
    }

    /// The memory, for a host that does the op. On a GPU this is counted by the op's name.
    ///
    /// # Errors
    /// Those of [`Here::ready`].
    pub fn host(&mut self) -> Result<&Memory> {
        self.ready()?;
        if let Some(gpu) = self.memory.gpu() {
            gpu.count_host_op(self.op);
        }
        Ok(self.memory)
    }

    /// For a job that is done by the GPU, if there is one: its tensors, its stream, and the task for errors.
    #[cfg_attr(not(feature = "cuda"), expect(dead_code, reason = "no device"))]
    pub(crate) fn gpu(&mut self) -> Option<(&Memory, &mut Lane, &Arc<str>)> {
        let lane = self.lane.as_deref_mut()?;
        Some((self.memory, lane, self.task))
    }
}
