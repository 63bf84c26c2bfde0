//! The harness of tests between ranks: N threads with a memory and a stream each. They share memory; or they see of each other only
//! what they pack, as processes do, and need no launcher for it.

#![expect(clippy::unwrap_used, reason = "tests")]

use std::sync::Arc;

use super::{
    Comm, Hub, local,
    local::Call,
    pack::{Brought, Met, Packed},
};
use crate::{device::Device, error::Result, memory::Memory, stream::Stream};

/// What `f` returns on each rank, by rank.
pub fn on_ranks<R: Send>(n: u32, ranks_per_node: u32, f: impl Fn(Comm, &mut Stream) -> R + Sync) -> Vec<R> {
    on_ranks_that(false, n, ranks_per_node, f)
}

/// The same on ranks that share memory, or that pack.
pub fn on_ranks_that<R: Send>(
    pack: bool,
    n: u32,
    ranks_per_node: u32,
    f: impl Fn(Comm, &mut Stream) -> R + Sync,
) -> Vec<R> {
    let mut hub = local::Hub::new(n);
    hub.packs = pack;
    let hub = Hub::Local(Arc::new(hub));
    let ends = (0..n).map(|rank| Comm::end(rank, n, ranks_per_node, Some(hub.clone())));
    std::thread::scope(|scope| {
        let ranks = ends.map(|comm| {
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

/// A meeting at which each puts down a part for each.
pub(super) fn meet_packed<T: Brought>(
    hub: &local::Hub,
    on: (u32, &Arc<[u32]>),
    me: usize,
    call: Call,
    mine: T,
) -> Result<Met<T>> {
    let n = on.1.len();
    let parts: Vec<Packed> = (0..n).map(|to| if to == me { Packed::default() } else { mine.pack(to, n) }).collect();
    let handed_bytes = Some(parts.iter().map(|part| part.num_payload_bytes).collect());
    let (all, nanos) = hub.meet(on, me, call, parts)?;
    let mut mine = Some(mine);
    let take = |(i, parts): (usize, &Arc<Vec<Packed>>)| match i == me {
        true => mine.take().unwrap(),
        false => T::unpack(&parts[me].bytes).unwrap(),
    };
    Ok(Met { all: all.iter().enumerate().map(take).map(Arc::new).collect(), nanos, handed_bytes })
}
