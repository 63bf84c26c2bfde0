//! Barriers in shared memory that also count bytes.

use super::ops::MbarOp;
use crate::{
    clock::Clock,
    exec::Cx,
    inst::Addr,
    state::{Warp, lanes},
};

/// One mbarrier. A phase is complete when no arrivals and no bytes are pending.
#[derive(Clone, Debug)]
pub(crate) struct Mbar {
    pub count: i64,
    pub pending: i64,
    /// Bytes expected and not yet come.
    pub tx: i64,
    pub phase: u64,
    gather: Clock,
    done: Clock,
    /// Who initialised it, and when.
    by: (usize, u32, u32),
    /// Whether a fence has made it known to asynchronous copies.
    pub fenced: bool,
    dropped: i64,
}

const MAX_COUNT: i64 = (1 << 20) - 1;

impl Mbar {
    fn flip(&mut self) {
        if self.pending == 0 && self.tx == 0 {
            self.phase += 1;
            self.count -= std::mem::take(&mut self.dropped);
            self.pending = self.count;
            self.done = self.gather.clone();
        }
    }
}

impl Cx<'_, '_, '_> {
    /// CTA and offset of the mbarrier at an address.
    pub(crate) fn mbar_at(&self, address: u64) -> Result<(usize, usize), String> {
        let (c, at) = self.cluster.resolve(self.cta, address)?;
        if !at.is_multiple_of(8) {
            return Err(format!("mbarrier at {at:#x} is misaligned for 8 bytes"));
        }
        if !self.cluster.ctas[c].mbars.contains_key(&at) {
            return Err(format!("mbarrier at {at:#x} is not initialised"));
        }
        Ok((c, at))
    }

    fn mbar_mut(&mut self, address: u64) -> Result<&mut Mbar, String> {
        let (c, at) = self.mbar_at(address)?;
        self.cluster.ctas[c].mbars.get_mut(&at).ok_or_else(|| format!("mbarrier at {at:#x} is not initialised"))
    }

    /// An mbarrier that this warp may use: its initialisation is known to have happened.
    fn known(&mut self, w: &Warp, lane: usize, address: u64) -> Result<&mut Mbar, String> {
        let (actor, thread, time) = self.mbar_mut(address)?.by;
        let known = if actor == w.actor {
            thread as usize == lane || w.clock.get(actor) > time
        } else {
            w.clock.get(actor) >= time
        };
        if !known {
            return Err("the mbarrier's initialisation may not be visible: no barrier between".to_owned());
        }
        self.mbar_mut(address)
    }

    pub(crate) fn fence_mbarriers(&mut self, w: &Warp, mask: u32) {
        for m in self.cluster.ctas[self.cta].mbars.values_mut() {
            if m.by.0 == w.actor && mask >> m.by.1 & 1 == 1 {
                m.fenced = true;
            }
        }
    }

    /// Executes for each lane; false if a wait failed for one of them.
    pub(crate) fn mbar(&mut self, w: &mut Warp, mask: u32, op: &MbarOp) -> Result<bool, String> {
        match op {
            MbarOp::Init { addr, count } => {
                let (a, n) = (self.addresses(w, *addr), self.values(w, *count));
                for l in lanes(mask) {
                    let (c, at) = self.cluster.resolve(self.cta, a[l])?;
                    let n = n[l] as i64;
                    if !at.is_multiple_of(8) || !(1..=MAX_COUNT).contains(&n) {
                        return Err(format!(
                            "mbarrier at {at:#x} with a count of {n}: misaligned, or not from 1 to 2^20-1"
                        ));
                    }
                    if self.cluster.ctas[c].mbars.contains_key(&at) {
                        return Err(format!("mbarrier at {at:#x} is initialised already"));
                    }
                    self.cluster.ctas[c].shared.set_mbarrier(at, true)?;
                    let m = Mbar {
                        count: n,
                        pending: n,
                        tx: 0,
                        phase: 0,
                        gather: Clock::default(),
                        done: Clock::default(),
                        by: (w.actor, l as u32, w.clock.get(w.actor)),
                        fenced: false,
                        dropped: 0,
                    };
                    self.cluster.ctas[c].mbars.insert(at, m);
                }
                self.env.effects += 1;
                Ok(true)
            }
            MbarOp::Inval { addr } => {
                let a = self.addresses(w, *addr);
                for l in lanes(mask) {
                    let (c, at) = self.mbar_at(a[l])?;
                    self.cluster.ctas[c].mbars.remove(&at);
                    self.cluster.ctas[c].shared.set_mbarrier(at, false)?;
                }
                Ok(true)
            }
            MbarOp::Arrive { addr, d, count, expect, drop, no_complete } => {
                let (a, n) = (self.addresses(w, *addr), self.values(w, *count));
                let bytes = expect.map(|e| self.values(w, e));
                let mut tokens = [0; 32];
                for l in lanes(mask) {
                    let bytes = bytes.map_or(0, |b| b[l] as u32 as i64);
                    tokens[l] = self.arrive(w, l, a[l], n[l] as u32 as i64, bytes, *drop, *no_complete)?;
                }
                w.tick();
                if let Some(d) = d {
                    w.set(*d, mask, &tokens);
                }
                Ok(true)
            }
            MbarOp::ExpectTx { addr, bytes } => self.transact(w, mask, *addr, *bytes, 1),
            MbarOp::CompleteTx { addr, bytes } => self.transact(w, mask, *addr, *bytes, -1),
            MbarOp::Wait { d, addr, state, parity, may_fail } => {
                let (a, s) = (self.addresses(w, *addr), self.values(w, *state));
                let mut done = [0; 32];
                let mut all = true;
                // A wait may give up early although the phase is complete.
                let give_up = *may_fail && self.env.rng.below(16) == 0;
                for l in lanes(mask) {
                    let m = self.known(w, l, a[l])?;
                    let complete = if *parity { m.phase & 1 != s[l] & 1 } else { m.phase != s[l] };
                    if !*parity && s[l] + 1 < m.phase {
                        return Err(format!("waits for phase {} of an mbarrier in phase {}", s[l], m.phase));
                    }
                    let complete = complete && !give_up;
                    done[l] = complete.into();
                    all &= complete;
                    if complete {
                        let clock = m.done.clone();
                        w.clock.join(&clock);
                    }
                }
                if all {
                    w.tick();
                    self.env.effects += 1;
                }
                w.set(*d, mask, &done);
                Ok(all)
            }
            MbarOp::PendingCount { d, a } => {
                // Tokens are phase numbers here; the count is not in them.
                let _ = (d, a);
                Err("mbarrier.pending_count is not supported".to_owned())
            }
        }
    }

    #[expect(clippy::too_many_arguments, reason = "the operands of the instruction")]
    fn arrive(
        &mut self,
        w: &Warp,
        lane: usize,
        address: u64,
        n: i64,
        bytes: i64,
        drop: bool,
        no_complete: bool,
    ) -> Result<u64, String> {
        let m = self.known(w, lane, address)?;
        let phase = m.phase;
        m.tx += bytes;
        if m.tx.abs() > MAX_COUNT {
            return Err(format!("{} bytes expected at one mbarrier", m.tx));
        }
        m.pending -= n;
        if n < 1 || m.pending < 0 {
            return Err(format!("more arrivals at an mbarrier than its count of {} (over-arrival)", m.count));
        }
        if no_complete && m.pending == 0 {
            return Err("an arrival with .noComplete completes the phase".to_owned());
        }
        if drop {
            m.dropped += n;
        }
        m.gather.join(&w.clock);
        m.flip();
        self.env.effects += 1;
        Ok(phase)
    }

    fn transact(
        &mut self,
        w: &Warp,
        mask: u32,
        addr: Addr,
        bytes: crate::inst::Src,
        sign: i64,
    ) -> Result<bool, String> {
        let (a, n) = (self.addresses(w, addr), self.values(w, bytes));
        for l in lanes(mask) {
            let m = self.known(w, l, a[l])?;
            m.tx += sign * i64::from(n[l] as u32);
            if m.tx.abs() > MAX_COUNT {
                return Err(format!("{} bytes expected at one mbarrier", m.tx));
            }
            m.gather.join(&w.clock);
            m.flip();
        }
        self.env.effects += 1;
        Ok(true)
    }

    /// Bytes of an asynchronous copy have come.
    pub(crate) fn complete_tx(&mut self, cta: usize, at: usize, bytes: usize) -> Result<(), String> {
        let (engine, time) = (self.cluster.engine(), self.cluster.engine_time);
        let Some(m) = self.cluster.ctas[cta].mbars.get_mut(&at) else {
            return Err(format!("a copy completes on mbarrier {at:#x}, which is not initialised"));
        };
        m.tx -= bytes as i64;
        if m.tx.abs() > MAX_COUNT {
            return Err(format!("{} bytes expected at one mbarrier", m.tx));
        }
        m.gather.raise(engine, time);
        m.flip();
        self.env.effects += 1;
        Ok(())
    }

    /// An arrival that asynchronous copies make; `clock` is the issuing thread's.
    pub(crate) fn arrive_late(&mut self, cta: usize, at: usize, clock: &Clock, noinc: bool) -> Result<(), String> {
        let Some(m) = self.cluster.ctas[cta].mbars.get_mut(&at) else {
            return Err(format!("a copy arrives at mbarrier {at:#x}, which is not initialised"));
        };
        if noinc {
            m.pending -= 1;
            if m.pending < 0 {
                return Err(format!("more arrivals at an mbarrier than its count of {} (over-arrival)", m.count));
            }
        } else {
            // Its own increment of the pending count is taken back.
            m.pending -= 1;
        }
        m.gather.join(clock);
        m.flip();
        self.env.effects += 1;
        Ok(())
    }
}
