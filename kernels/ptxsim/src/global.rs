//! Global memory: allocations with bounds, and who of a launch's CTAs touched which bytes.

use std::collections::BTreeMap;

use crate::decode::window::GLOBAL;

/// What one CTA knows to have happened in others, through atomics and flags.
#[derive(Clone, Debug, Default)]
pub(crate) struct GridClock {
    /// Number of the CTA, from 1.
    pub cta: u16,
    pub now: u16,
    pub seen: BTreeMap<u16, u16>,
    /// What a fence has made ready to be told by a relaxed write.
    pub fenced: Option<BTreeMap<u16, u16>>,
    /// What relaxed reads have seen, and a fence will make known.
    pub pending: BTreeMap<u16, u16>,
}

/// Knows as well what `from` says.
pub(crate) fn learn(into: &mut BTreeMap<u16, u16>, from: &BTreeMap<u16, u16>) {
    for (k, v) in from {
        let e = into.entry(*k).or_default();
        *e = (*e).max(*v);
    }
}

impl GridClock {
    fn knows(&self, cta: u16, time: u16) -> bool {
        cta == 0 || cta == self.cta || self.seen.get(&cta).is_some_and(|t| *t >= time)
    }
    /// What it tells when it releases.
    pub(crate) fn told(&self) -> BTreeMap<u16, u16> {
        let mut all = self.seen.clone();
        all.insert(self.cta, self.now);
        all
    }
}

#[derive(Clone, Copy, Default)]
struct Cell {
    launch: u32,
    writer: (u16, u16),
    /// The last reader with its bytes, and the one before it of another CTA.
    readers: [(u16, u16, u8); 2],
    wmask: u8,
}

struct Allocation {
    base: u64,
    bytes: Vec<u8>,
    cells: Vec<Cell>,
}

/// All allocations of a device.
#[derive(Default)]
pub(crate) struct Global {
    all: Vec<Allocation>,
    freed: Vec<(u64, u64)>,
    next: u64,
    last: usize,
    /// Number of the launch.
    pub launch: u32,
    /// Whether CTAs are told apart.
    pub watch: bool,
}

impl Global {
    /// Address of so many new bytes, all ones. Addresses are never used twice.
    pub(crate) fn alloc(&mut self, bytes: u64) -> u64 {
        let base = GLOBAL + 256 + self.next;
        self.next += bytes.max(1).next_multiple_of(256) + 256;
        self.all.push(Allocation { base, bytes: vec![0xff; bytes as usize], cells: vec![] });
        base
    }

    pub(crate) fn free(&mut self, base: u64) -> Result<(), String> {
        match self.all.iter().position(|a| a.base == base) {
            Some(i) => {
                self.freed.push((base, self.all.remove(i).bytes.len() as u64));
                self.last = 0;
                Ok(())
            }
            None => Err(format!("global address {base:#x} was not allocated")),
        }
    }

    /// Allocation and offset of an access.
    fn find(&mut self, at: u64, n: usize) -> Result<(usize, usize), String> {
        let fits = |a: &Allocation| at >= a.base && at - a.base + n as u64 <= a.bytes.len() as u64;
        if let Some(a) = self.all.get(self.last)
            && fits(a)
        {
            return Ok((self.last, (at - a.base) as usize));
        }
        let i = self.all.partition_point(|a| a.base <= at);
        if let Some(a) = i.checked_sub(1).and_then(|i| self.all.get(i)) {
            if fits(a) {
                self.last = i - 1;
                return Ok((i - 1, (at - a.base) as usize));
            }
            if at < a.base + a.bytes.len() as u64 + 256 {
                return Err(format!(
                    "global address {at:#x} is out of bounds: byte {} of an allocation of {}",
                    at - a.base,
                    a.bytes.len()
                ));
            }
        }
        if self.freed.iter().any(|(b, len)| at >= *b && at < b + len) {
            return Err(format!("global address {at:#x} was freed"));
        }
        Err(format!("global address {at:#x} was not allocated (out of bounds)"))
    }

    /// Bytes, seen from outside a launch.
    pub(crate) fn slice(&mut self, at: u64, n: usize) -> Result<&mut [u8], String> {
        let (a, o) = self.find(at, n)?;
        Ok(&mut self.all[a].bytes[o..o + n])
    }

    /// Bytes to read from outside a launch.
    pub(crate) fn view(&self, at: u64, n: usize) -> Result<&[u8], String> {
        let i = self.all.partition_point(|a| a.base <= at);
        match i.checked_sub(1).and_then(|i| self.all.get(i)) {
            Some(a) if at - a.base + n as u64 <= a.bytes.len() as u64 => {
                let o = (at - a.base) as usize;
                Ok(&a.bytes[o..o + n])
            }
            _ => Err(format!("global address {at:#x} is out of bounds")),
        }
    }

    fn cells(&mut self, a: usize) {
        if self.all[a].cells.is_empty() {
            let n = self.all[a].bytes.len().div_ceil(4);
            self.all[a].cells = vec![Cell::default(); n];
        }
    }

    /// Reads; `sync` accesses do not race.
    pub(crate) fn load(&mut self, at: u64, into: &mut [u8], who: &GridClock, sync: bool) -> Result<(), String> {
        let (a, o) = self.find(at, into.len())?;
        into.copy_from_slice(&self.all[a].bytes[o..o + into.len()]);
        if self.watch && !sync {
            self.cells(a);
            let launch = self.launch;
            for w in o / 4..(o + into.len()).div_ceil(4) {
                let mask = byte_mask(o, into.len(), w);
                let c = &mut self.all[a].cells[w];
                if c.launch != launch {
                    *c = Cell { launch, ..Cell::default() };
                }
                if c.wmask & mask != 0 && !who.knows(c.writer.0, c.writer.1) {
                    return Err(race("read", at, who.cta, "write", c.writer.0));
                }
                let [last, before] = &mut c.readers;
                if last.0 != who.cta {
                    *before = *last;
                    last.2 = 0;
                }
                *last = (who.cta, who.now, last.2 | mask);
            }
        }
        Ok(())
    }

    /// Writes; `sync` accesses do not race, nor do writes that change nothing.
    pub(crate) fn store(&mut self, at: u64, data: &[u8], who: &GridClock, sync: bool) -> Result<(), String> {
        let (a, o) = self.find(at, data.len())?;
        if self.watch && !sync {
            self.cells(a);
            let launch = self.launch;
            let Allocation { bytes, cells, .. } = &mut self.all[a];
            let same = bytes[o..o + data.len()] == *data;
            let first = o / 4;
            for (i, c) in cells[first..(o + data.len()).div_ceil(4)].iter_mut().enumerate() {
                let mask = byte_mask(o, data.len(), first + i);
                if c.launch != launch {
                    *c = Cell { launch, ..Cell::default() };
                }
                if !same {
                    if c.wmask & mask != 0 && !who.knows(c.writer.0, c.writer.1) {
                        return Err(race("write", at, who.cta, "write", c.writer.0));
                    }
                    if let Some(r) = c.readers.iter().find(|r| r.2 & mask != 0 && !who.knows(r.0, r.1)) {
                        return Err(race("write", at, who.cta, "read", r.0));
                    }
                }
                c.wmask = if c.writer == (who.cta, who.now) { c.wmask | mask } else { mask };
                c.writer = (who.cta, who.now);
            }
        }
        self.all[a].bytes[o..o + data.len()].copy_from_slice(data);
        Ok(())
    }
}

fn byte_mask(o: usize, n: usize, w: usize) -> u8 {
    let from = o.saturating_sub(w * 4);
    let to = (o + n - w * 4).min(4);
    ((1u8 << (to - from)) - 1) << from
}

fn race(what: &str, at: u64, cta: u16, other: &str, by: u16) -> String {
    format!(
        "{what} of global address {at:#x} by CTA {} races with a {other} by CTA {} of the same launch",
        cta - 1,
        by.saturating_sub(1)
    )
}
