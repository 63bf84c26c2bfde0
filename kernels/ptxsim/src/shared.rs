//! Shared memory of a CTA with what is known of each word: whether it was written, by whom, whether a barrier lies between, and
//! which copies and tensor instructions in flight use it.

use crate::clock::Clock;

/// Who makes an access, and what it knows to have happened.
#[derive(Clone, Copy)]
pub(crate) struct Agent<'a> {
    /// Warp within the cluster, or [`crate::state::Cluster::engine`].
    pub actor: usize,
    pub lane: u8,
    pub clock: &'a Clock,
    /// Number of this instruction.
    pub step: u32,
}

/// A lane that stands for asynchronous hardware.
pub(crate) const ENGINE_LANE: u8 = 0xfe;
const SEVERAL: u8 = 0xff;
const SYNC: u8 = 1;
const MBARRIER: u8 = 2;

/// A read that later writes must come after.
#[derive(Clone, Copy, Default)]
struct Reader {
    actor: u16,
    lane: u8,
    /// Which bytes.
    mask: u8,
    /// When; 0 is never.
    time: u32,
}

/// What is known of 4 bytes.
#[derive(Clone, Copy, Default)]
struct Cell {
    /// Bytes that were ever written.
    init: u8,
    /// Bytes of the last write.
    wmask: u8,
    flags: u8,
    wactor: u16,
    wlane: u8,
    /// Copies in flight that write here.
    pend_w: u16,
    /// Copies and tensor instructions in flight that read here.
    pend_r: u16,
    /// Time of the last write; 0 is none.
    wclk: u32,
    /// Step of the last write through the generic proxy; 0 if it came through the async proxy.
    wstep: u32,
    /// Two of the readers since the last write: with a barrier missing, all of them race.
    readers: [Reader; 2],
}

/// Shared memory of one CTA.
#[derive(Default)]
pub(crate) struct Shared {
    pub bytes: Vec<u8>,
    cells: Vec<Cell>,
}

/// The words of an access: index, and mask of the bytes within.
fn words(at: usize, n: usize) -> impl Iterator<Item = (usize, u8)> {
    (at / 4..(at + n).div_ceil(4)).map(move |w| {
        let from = at.saturating_sub(w * 4);
        let to = (at + n - w * 4).min(4);
        (w, ((1u8 << (to - from)) - 1) << from)
    })
}

impl Shared {
    pub(crate) fn new(bytes: usize) -> Self {
        Shared { bytes: vec![0; bytes], cells: vec![Cell::default(); bytes.div_ceil(4)] }
    }

    fn bounds(&self, at: usize, n: usize) -> Result<(), String> {
        if at.checked_add(n).is_some_and(|end| end <= self.bytes.len()) {
            Ok(())
        } else {
            Err(format!("shared address {at:#x} is out of bounds: {} bytes of {}", n, self.bytes.len()))
        }
    }

    /// Checks a read through the generic proxy and remembers it.
    pub(crate) fn check_read(&mut self, at: usize, n: usize, who: Agent<'_>, sync: bool) -> Result<(), String> {
        self.bounds(at, n)?;
        for (w, mask) in words(at, n) {
            let c = &self.cells[w];
            if c.pend_w > 0 {
                return Err(format!("read of shared address {at:#x} which a copy in flight writes"));
            }
            if c.init & mask != mask {
                return Err(format!("read of shared address {at:#x} which was never written (uninitialised)"));
            }
            if c.flags & MBARRIER != 0 {
                return Err(format!("read of shared address {at:#x} which is an mbarrier"));
            }
            let both_sync = sync && c.flags & SYNC != 0;
            if c.wclk > 0 && c.wmask & mask != 0 && !both_sync {
                ordered_write(c, at, who, "read")?;
            }
            if !sync {
                self.note_read(w, mask, who);
            }
        }
        Ok(())
    }

    fn note_read(&mut self, w: usize, mask: u8, who: Agent<'_>) {
        let now = who.clock.get(who.actor);
        let c = &mut self.cells[w];
        let replaces =
            |r: &Reader| r.time == 0 || r.actor as usize == who.actor || who.clock.get(r.actor as usize) >= r.time;
        let slot = usize::from(!replaces(&c.readers[0]));
        let r = &mut c.readers[slot];
        let same = r.actor as usize == who.actor && r.time == now;
        r.lane = if !same || r.lane == who.lane { who.lane } else { SEVERAL };
        r.mask = if same { r.mask | mask } else { mask };
        r.actor = who.actor as u16;
        r.time = now;
    }

    /// Whether nobody may still be reading.
    fn ordered_reads(c: &Cell, at: usize, mask: u8, who: Agent<'_>) -> Result<(), String> {
        for r in c.readers.iter().filter(|r| r.time > 0 && r.mask & mask != 0) {
            if r.actor as usize != who.actor {
                if who.clock.get(r.actor as usize) < r.time {
                    return Err(format!(
                        "write to shared address {at:#x} by warp {} races with a read by warp {}: no barrier between",
                        who.actor, r.actor
                    ));
                }
            } else if r.time == who.clock.get(who.actor)
                && r.lane != who.lane
                && r.lane != ENGINE_LANE
                && who.lane != ENGINE_LANE
            {
                return Err(format!(
                    "write to shared address {at:#x} by lane {} races with a read by another lane: no bar.warp.sync between",
                    who.lane
                ));
            }
        }
        Ok(())
    }

    /// Checks a write through the generic proxy, and remembers it unless it changes nothing.
    pub(crate) fn check_write(&mut self, at: usize, data: &[u8], who: Agent<'_>, sync: bool) -> Result<(), String> {
        self.bounds(at, data.len())?;
        let same_value = self.bytes[at..at + data.len()] == *data;
        for (w, mask) in words(at, data.len()) {
            let c = self.cells[w];
            if c.flags & MBARRIER != 0 {
                return Err(format!("write to shared address {at:#x} which is an mbarrier"));
            }
            if c.pend_w > 0 {
                return Err(format!("write to shared address {at:#x} which a copy in flight writes"));
            }
            if c.pend_r > 0 {
                return Err(format!("write to shared address {at:#x} which is still read by an instruction in flight"));
            }
            if same_value && c.init & mask == mask && !sync {
                continue;
            }
            let both_sync = sync && c.flags & SYNC != 0;
            if c.wclk > 0 && c.wmask & mask != 0 && !both_sync {
                ordered_write(&c, at, who, "write")?;
            }
            Self::ordered_reads(&c, at, mask, who)?;
            self.note_write(w, mask, who, sync, who.step);
        }
        Ok(())
    }

    fn note_write(&mut self, w: usize, mask: u8, who: Agent<'_>, sync: bool, step: u32) {
        let now = who.clock.get(who.actor);
        let c = &mut self.cells[w];
        let same = c.wactor as usize == who.actor && c.wclk == now && c.wlane == who.lane;
        c.wmask = if same { c.wmask | mask } else { mask };
        c.init |= mask;
        c.flags = c.flags & !SYNC | if sync { SYNC } else { 0 };
        (c.wactor, c.wlane, c.wclk, c.wstep) = (who.actor as u16, who.lane, now, step);
        for r in c.readers.iter_mut().filter(|r| r.mask & !mask == 0) {
            *r = Reader::default();
        }
    }

    pub(crate) fn load(&mut self, at: usize, n: usize, who: Agent<'_>, sync: bool) -> Result<u64, String> {
        self.check_read(at, n, who, sync)?;
        let mut x = [0; 8];
        x[..n].copy_from_slice(&self.bytes[at..at + n]);
        Ok(u64::from_le_bytes(x))
    }

    pub(crate) fn store(&mut self, at: usize, data: &[u8], who: Agent<'_>, sync: bool) -> Result<(), String> {
        self.check_write(at, data, who, sync)?;
        self.bytes[at..at + data.len()].copy_from_slice(data);
        Ok(())
    }

    /// The words become an mbarrier, or are one no more.
    pub(crate) fn set_mbarrier(&mut self, at: usize, on: bool) -> Result<(), String> {
        self.bounds(at, 8)?;
        for (w, _) in words(at, 8) {
            let c = &mut self.cells[w];
            if on && c.pend_r + c.pend_w > 0 {
                return Err(format!("an mbarrier at shared address {at:#x} which a copy in flight uses"));
            }
            *c = Cell { flags: if on { MBARRIER } else { 0 }, ..Cell::default() };
        }
        Ok(())
    }

    /// A copy that will write here is issued.
    pub(crate) fn begin_write(&mut self, at: usize, n: usize, who: Agent<'_>) -> Result<(), String> {
        self.bounds(at, n)?;
        for (w, mask) in words(at, n) {
            let c = self.cells[w];
            if c.flags & MBARRIER != 0 {
                return Err(format!("a copy to shared address {at:#x} overwrites an mbarrier"));
            }
            if c.pend_w > 0 {
                return Err(format!("a copy to shared address {:#x} which another copy in flight writes", w * 4));
            }
            if c.pend_r > 0 {
                return Err(format!(
                    "a copy overwrites shared address {:#x} which is still read by an instruction in flight",
                    w * 4
                ));
            }
            if c.wclk > 0 {
                ordered_write(&c, w * 4, who, "copy to")?;
            }
            Self::ordered_reads(&c, w * 4, mask, who)?;
            self.cells[w].pend_w += 1;
        }
        Ok(())
    }

    /// Its bytes arrive; `generic` is the step of a copy through the generic proxy.
    pub(crate) fn end_write(&mut self, at: usize, n: usize, who: Agent<'_>, generic: Option<u32>) {
        for (w, mask) in words(at, n) {
            self.cells[w].pend_w = self.cells[w].pend_w.saturating_sub(1);
            self.note_write(w, mask, who, false, generic.unwrap_or(0));
        }
    }

    /// An instruction of the async proxy that will read here is issued. `fenced` is, for each thread of the cluster, the step
    /// of its last `fence.proxy.async`.
    pub(crate) fn begin_read(&mut self, at: usize, n: usize, who: Agent<'_>, fenced: &[u32]) -> Result<(), String> {
        self.bounds(at, n)?;
        for (w, mask) in words(at, n) {
            let c = &mut self.cells[w];
            let at = w * 4;
            if c.pend_w > 0 {
                return Err(format!("the async proxy reads shared address {at:#x} which a copy in flight writes"));
            }
            if c.init & mask != mask {
                return Err(format!(
                    "the async proxy reads shared address {at:#x} which was never written (uninitialised)"
                ));
            }
            let thread = c.wactor as usize * 32 + c.wlane as usize;
            if c.wstep > 0 && fenced.get(thread).is_some_and(|f| *f < c.wstep) {
                return Err(format!(
                    "the async proxy reads shared address {at:#x}, stored by lane {} of warp {} without fence.proxy.async",
                    c.wlane, c.wactor
                ));
            }
            if c.wclk > 0 && c.wactor as usize != who.actor {
                ordered_write(c, at, who, "async read")?;
            }
            c.pend_r += 1;
        }
        Ok(())
    }

    /// It has read.
    pub(crate) fn end_read(&mut self, at: usize, n: usize, who: Agent<'_>) {
        for (w, mask) in words(at, n) {
            self.cells[w].pend_r = self.cells[w].pend_r.saturating_sub(1);
            self.note_read(w, mask, who);
        }
    }
}

fn ordered_write(c: &Cell, at: usize, who: Agent<'_>, what: &str) -> Result<(), String> {
    let writer = c.wactor as usize;
    if writer != who.actor {
        if who.clock.get(writer) < c.wclk {
            return Err(format!(
                "{what} of shared address {at:#x} by warp {} races with a write by warp {writer}: no barrier between",
                who.actor
            ));
        }
    } else if c.wclk == who.clock.get(writer)
        && c.wlane != who.lane
        && c.wlane != ENGINE_LANE
        && who.lane != ENGINE_LANE
    {
        return Err(format!(
            "{what} of shared address {at:#x} by lane {} races with a write by lane {}: no bar.warp.sync between",
            who.lane, c.wlane
        ));
    }
    Ok(())
}
