//! The way of one op: the stream that transfers are put on, and the waits for them.

use std::sync::Arc;

use super::{
    Engine,
    abi::{Handle, Piece},
};
use crate::{
    comm::{Comm, Hub, mpi},
    cuda::Lane,
    error::Result,
    memory::Memory,
    stream::Here,
};

/// What an op of NCCL is done with.
pub(super) struct Way<'a> {
    pub engine: &'a Engine,
    pub hub: &'a mpi::Hub,
    pub memory: &'a Memory,
    pub lane: &'a mut Lane,
    pub task: &'a Arc<str>,
}

impl<'a> Way<'a> {
    /// For an op among so many members, when the GPU is done with what was launched before; `None` where NCCL is not there for it.
    pub fn open(comm: &Comm, hub: &'a Hub, num_members: usize, here: &'a mut Here<'_>) -> Result<Option<Self>> {
        let Hub::Mpi(hub) = hub else { return Ok(None) };
        let Some(engine) = hub.nccl().filter(|_| comm.lane == 0 && num_members > 1) else { return Ok(None) };
        here.ready()?;
        let Some((memory, lane, task)) = here.gpu() else { return Ok(None) };
        Ok(Some(Way { engine, hub, memory, lane, task }))
    }

    /// The communicator of a group, by the numbers of the run, in which this rank is `me`.
    pub fn comm(&self, group: &Arc<[u32]>, me: usize) -> Result<Handle> {
        self.engine.comm(self.hub, group, me, self.lane.most_blocks())
    }

    /// Puts what has bytes on the stream, as a group. All members have met for it.
    pub fn put(&self, comm: Handle, sends: &[Piece], receives: &[Piece]) -> Result<()> {
        let some = |pieces: &[Piece]| pieces.iter().filter(|piece| piece.bytes > 0).copied().collect::<Vec<_>>();
        let (sends, receives) = (some(sends), some(receives));
        if sends.is_empty() && receives.is_empty() {
            return Ok(());
        }
        let functions = &self.engine.functions;
        // SAFETY: the pieces are of the op's tensors and of the stream's scratch, which stay until the stream is done; what follows
        // waits for that.
        let put = unsafe { functions.exchange(comm, &sends, &receives, self.lane.handle()) };
        put.inspect_err(|_| self.engine.abort())?;
        // Nothing may be put on the stream before the library has: until then it does so from a thread of its own.
        self.engine.until(self.hub, || functions.is_settled(comm))
    }

    /// Waits for all that was put on the stream.
    pub fn finish(&self, comm: Handle) -> Result<()> {
        let (functions, lane) = (&self.engine.functions, &*self.lane);
        self.engine.until(self.hub, || Ok(functions.is_settled(comm)? && lane.is_done()?))
    }
}
