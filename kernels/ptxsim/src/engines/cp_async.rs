//! `cp.async`: copies of 4 to 16 bytes by single threads. Data arrives no earlier than the wait demands.

use super::{bulk::Event, ops::CpAsyncOp};
use crate::{
    exec::Cx,
    state::{Warp, lanes},
};

/// A copy in flight.
#[derive(Clone, Debug)]
pub(crate) struct Pending {
    dst: (usize, usize),
    src: u64,
    bytes: usize,
    /// Bytes that are read; the rest is zero.
    take: usize,
}

impl Cx<'_, '_, '_> {
    pub(crate) fn cp_async(&mut self, w: &mut Warp, mask: u32, op: &CpAsyncOp) -> Result<(), String> {
        self.env.effects += 1;
        match op {
            CpAsyncOp::Copy { dst, src, bytes, src_bytes, ignore } => {
                let (dst, src) = (self.addresses(w, *dst), self.addresses(w, *src));
                let take = src_bytes.map(|s| self.values(w, s));
                let ignore = ignore.map(|s| self.values(w, s));
                let step = self.cluster.step;
                for l in lanes(mask) {
                    let to = self.cluster.resolve(self.cta, dst[l])?;
                    let mut n = take.map_or(*bytes, |t| t[l] as usize);
                    if ignore.is_some_and(|i| i[l] == 1) {
                        n = 0;
                    }
                    if n > *bytes {
                        return Err(format!("reads {n} bytes of {bytes}"));
                    }
                    if !to.1.is_multiple_of(*bytes) || n > 0 && !src[l].is_multiple_of(*bytes as u64) {
                        return Err(format!(
                            "copy {:#x} to {:#x} of lane {l} is misaligned for {bytes} bytes",
                            src[l], to.1
                        ));
                    }
                    if n > 0 {
                        self.env.global.view(src[l], n)?;
                    }
                    self.cluster.ctas[to.0].shared.begin_write(to.1, *bytes, w.agent(l, step))?;
                    let copy = Pending { dst: to, src: src[l], bytes: *bytes, take: n };
                    w.copies.entry(l as u8).or_default().open.push(copy);
                }
                Ok(())
            }
            CpAsyncOp::Commit => {
                for l in lanes(mask) {
                    let c = w.copies.entry(l as u8).or_default();
                    let open = std::mem::take(&mut c.open);
                    c.groups.push_back(open);
                }
                Ok(())
            }
            CpAsyncOp::Wait(n) => self.finish_copies(w, mask, *n, false),
            CpAsyncOp::WaitAll => self.finish_copies(w, mask, 0, true),
            CpAsyncOp::Arrive { addr, noinc } => {
                let a = self.addresses(w, *addr);
                for l in lanes(mask) {
                    let (cta, at) = self.mbar_at(a[l])?;
                    // All earlier copies of the thread are done when it arrives.
                    if !*noinc && let Some(m) = self.cluster.ctas[cta].mbars.get_mut(&at) {
                        m.pending += 1;
                    }
                    let due = self.cluster.now + self.env.rng.below(30);
                    let event = Event::CopyArrival { cta, at, warp: (self.cta, w.index), lane: l as u8, noinc: *noinc };
                    self.cluster.events.push((due, event).into());
                }
                Ok(())
            }
        }
    }

    /// Completes all but the last `left` groups of each lane, and what no group has if `open`.
    pub(crate) fn finish_copies(&mut self, w: &mut Warp, mask: u32, left: usize, open: bool) -> Result<(), String> {
        for l in lanes(mask) {
            let Some(c) = w.copies.get_mut(&(l as u8)) else { continue };
            let mut done = vec![];
            while c.groups.len() > left {
                done.extend(c.groups.pop_front().unwrap_or_default());
            }
            if open {
                done.append(&mut c.open);
            }
            for copy in done {
                let mut bytes = [0u8; 16];
                let grid = &self.cluster.ctas[self.cta].grid;
                if copy.take > 0 {
                    self.env.global.load(copy.src, &mut bytes[..copy.take], grid, false)?;
                }
                let step = self.cluster.step;
                let shared = &mut self.cluster.ctas[copy.dst.0].shared;
                shared.bytes[copy.dst.1..copy.dst.1 + copy.bytes].copy_from_slice(&bytes[..copy.bytes]);
                shared.end_write(copy.dst.1, copy.bytes, w.agent(l, step), Some(step));
            }
        }
        Ok(())
    }
}
