//! The harness of tests between ranks: N threads with a memory and a stream each.

#![expect(clippy::unwrap_used, reason = "tests")]

use std::sync::Arc;

use super::Comm;
use crate::{device::Device, memory::Memory, stream::Stream};

/// What `f` returns on each rank, by rank.
pub fn on_ranks<R: Send>(n: u32, ranks_per_node: u32, f: impl Fn(Comm, &mut Stream) -> R + Sync) -> Vec<R> {
    std::thread::scope(|scope| {
        let ranks = Comm::local(n, ranks_per_node).into_iter().map(|comm| {
            let f = &f;
            let run = move || {
                let name = format!("rank {}", comm.rank());
                let mut s = Stream::new(&name, &Memory::new(Device::Cpu), &Arc::default()).unwrap();
                f(comm, &mut s)
            };
            std::thread::Builder::new().name("rank".into()).spawn_scoped(scope, run).unwrap()
        });
        let ranks: Vec<_> = ranks.collect();
        ranks.into_iter().map(|rank| rank.join().unwrap()).collect()
    })
}
