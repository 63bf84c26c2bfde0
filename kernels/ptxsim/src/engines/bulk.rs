//! TMA and other bulk copies. Loads land after a random delay; stores read shared memory as late as the wait for them allows,
//! and write global memory later still.

use super::{
    ops::{BulkOp, Far},
    tensor_map::{TensorMap, replace, swizzle},
};
use crate::{
    decode::window::{GLOBAL, PARAM},
    exec::{Cx, combine},
    inst::{AtomOp, Ty},
    shared::{Agent, ENGINE_LANE},
    state::{Warp, lanes},
};

/// Something that happens by itself, at a time.
#[derive(Clone, Debug)]
pub(crate) struct Timed {
    pub due: u64,
    pub event: Event,
}

impl From<(u64, Event)> for Timed {
    fn from((due, event): (u64, Event)) -> Self {
        Timed { due, event }
    }
}

/// What happens.
#[derive(Clone, Debug)]
pub(crate) enum Event {
    /// A load lands.
    Load(Box<Load>),
    /// Values arrive in another CTA's shared memory.
    Values { to: (usize, usize), data: Vec<u8>, bar: (usize, usize), add: Option<(AtomOp, Ty)> },
    /// The `cp.async` of a thread are done, and it arrives.
    CopyArrival { cta: usize, at: usize, warp: (usize, usize), lane: u8, noinc: bool },
}

/// A bulk load in flight.
#[derive(Clone, Debug)]
pub(crate) struct Load {
    /// CTA whose thread issued it.
    pub issuer: usize,
    pub far: Source,
    /// Each destination and its mbarrier.
    pub to: Vec<((usize, usize), (usize, usize))>,
    pub bytes: usize,
}

/// Where bytes come from or go to.
#[derive(Clone, Debug)]
pub(crate) enum Source {
    Box(TensorMap, Vec<i32>),
    Flat(u64),
    Shared((usize, usize)),
}

/// A bulk store that has not read shared memory yet.
#[derive(Clone, Debug)]
pub(crate) struct StoreJob {
    far: Source,
    src: usize,
    bytes: usize,
    reduce: Option<(AtomOp, Ty)>,
    /// Bytes already read, which are yet to be written.
    ready: Option<Vec<GlobalWrite>>,
}

/// Bytes for global memory.
#[derive(Clone, Debug)]
pub(crate) struct GlobalWrite {
    at: u64,
    data: Vec<u8>,
    reduce: Option<(AtomOp, Ty)>,
}

/// The element type that a reduction through a map works on.
fn map_type(elem: usize) -> Ty {
    match elem {
        2 => Ty::Bf16,
        8 => Ty::F64,
        _ => Ty::F32,
    }
}

impl Cx<'_, '_, '_> {
    fn map(&mut self, address: u64) -> Result<TensorMap, String> {
        if !address.is_multiple_of(64) {
            return Err(format!("tensor map at {address:#x} is misaligned for 64 bytes"));
        }
        let bytes = if address >= GLOBAL {
            self.env.global.view(address, 128)?
        } else if address >= PARAM {
            let at = (address - PARAM) as usize;
            self.env.params.get(at..at + 128).ok_or("no tensor map at this address")?
        } else {
            return Err(format!("tensor map at {address:#x}, which is neither a parameter nor global"));
        };
        TensorMap::read(bytes)
    }

    /// The far side for a lane, and how many bytes there are.
    fn far(&mut self, w: &Warp, l: usize, far: &Far, near: usize) -> Result<(Source, usize), String> {
        match far {
            Far::Tensor { map, coords } => {
                let at = self.addresses(w, *map)[l];
                let map = self.map(at)?;
                if map.dims.len() != coords.len() {
                    return Err(format!("tensor map of rank {}, {} coordinates", map.dims.len(), coords.len()));
                }
                let coords = coords.iter().map(|c| self.values(w, *c)[l] as u32 as i32).collect();
                let align = if map.swizzle == 128 { 1024 } else { 128 };
                if !near.is_multiple_of(align) {
                    return Err(format!(
                        "shared address {near:#x} is misaligned for a box with swizzle {}: {align} bytes",
                        map.swizzle
                    ));
                }
                let n = map.box_bytes();
                Ok((Source::Box(map, coords), n))
            }
            Far::Flat { at, bytes } => {
                let (at, n) = (self.addresses(w, *at)[l], self.values(w, *bytes)[l] as u32 as usize);
                if n == 0 || !n.is_multiple_of(16) || !at.is_multiple_of(16) || !near.is_multiple_of(16) {
                    return Err(format!("bulk copy of {n} bytes, {at:#x} and {near:#x}: misaligned for 16 bytes"));
                }
                self.env.global.view(at, n)?;
                Ok((Source::Flat(at), n))
            }
        }
    }

    fn fenced_bar(&self, address: u64) -> Result<(usize, usize), String> {
        let (c, at) = self.mbar_at(address)?;
        if self.cluster.ctas[c].mbars.get(&at).is_some_and(|m| !m.fenced) {
            return Err(format!("mbarrier {at:#x} was initialised without a fence.mbarrier_init or fence.proxy.async"));
        }
        Ok((c, at))
    }

    fn delay(&mut self) -> u64 {
        let late = self.env.rng.below(2) * (1 + self.env.rng.below(40));
        self.cluster.now + late
    }

    pub(crate) fn bulk(&mut self, w: &mut Warp, mask: u32, op: &BulkOp) -> Result<(), String> {
        self.env.effects += 1;
        for l in lanes(mask) {
            match op {
                BulkOp::Load { far, dst, bar, multicast } => {
                    let dst = self.addresses(w, *dst)[l];
                    let (cta, at) = self.cluster.resolve(self.cta, dst)?;
                    let bar = self.fenced_bar(self.addresses(w, *bar)[l])?;
                    let (far, bytes) = self.far(w, l, far, at)?;
                    let targets: Vec<usize> = match multicast {
                        Some(m) => {
                            let m = self.values(w, *m)[l];
                            (0..16).filter(|r| m >> r & 1 == 1).collect()
                        }
                        None => vec![cta],
                    };
                    let step = self.cluster.step;
                    let mut to = vec![];
                    for c in targets {
                        if c >= self.cluster.ctas.len() {
                            return Err(format!("multicast to rank {c} of a cluster of {}", self.cluster.ctas.len()));
                        }
                        let bar_cta = if multicast.is_some() { c } else { bar.0 };
                        if !self.cluster.ctas[bar_cta].mbars.contains_key(&bar.1) {
                            return Err(format!("mbarrier at {:#x} is not initialised", bar.1));
                        }
                        self.cluster.ctas[c].shared.begin_write(at, bytes, w.agent(l, step))?;
                        to.push(((c, at), (bar_cta, bar.1)));
                    }
                    let load = Load { issuer: self.cta, far, to, bytes };
                    let due = self.delay();
                    self.cluster.events.push((due, Event::Load(Box::new(load))).into());
                }
                BulkOp::Send { dst, src, bytes, bar } => {
                    let n = self.values(w, *bytes)[l] as u32 as usize;
                    let to = self.cluster.resolve(self.cta, self.addresses(w, *dst)[l])?;
                    let from = self.cluster.resolve(self.cta, self.addresses(w, *src)[l])?;
                    let bar = self.mbar_at(self.addresses(w, *bar)[l])?;
                    if n == 0 || !n.is_multiple_of(16) || !to.1.is_multiple_of(16) || !from.1.is_multiple_of(16) {
                        return Err(format!("bulk copy of {n} bytes is misaligned for 16 bytes"));
                    }
                    let step = self.cluster.step;
                    let fenced = &self.cluster.fenced;
                    self.cluster.ctas[from.0].shared.begin_read(from.1, n, w.agent(l, step), fenced)?;
                    self.cluster.ctas[to.0].shared.begin_write(to.1, n, w.agent(l, step))?;
                    let load = Load { issuer: self.cta, far: Source::Shared(from), to: vec![(to, bar)], bytes: n };
                    let due = self.delay();
                    self.cluster.events.push((due, Event::Load(Box::new(load))).into());
                }
                BulkOp::Store { far, src, reduce } => {
                    let (cta, at) = self.cluster.resolve(self.cta, self.addresses(w, *src)[l])?;
                    if cta != self.cta {
                        return Err("stores from another CTA's shared memory".to_owned());
                    }
                    let (far, bytes) = self.far(w, l, far, at)?;
                    let reduce = match (reduce, &far) {
                        (Some((op, ty)), Source::Box(map, _)) => Some((*op, ty.unwrap_or(map_type(map.elem)))),
                        (Some((op, ty)), _) => Some((*op, ty.unwrap_or(Ty::F32))),
                        (None, _) => None,
                    };
                    let step = self.cluster.step;
                    let fenced = &self.cluster.fenced;
                    self.cluster.ctas[cta].shared.begin_read(at, bytes, w.agent(l, step), fenced)?;
                    let job = StoreJob { far, src: at, bytes, reduce, ready: None };
                    w.copies.entry(l as u8).or_default().bulk_open.push(job);
                }
                BulkOp::StAsync { dst, s, ty, bar, add } => {
                    let to = self.cluster.resolve(self.cta, self.addresses(w, *dst)[l])?;
                    let bar = self.mbar_at(self.addresses(w, *bar)[l])?;
                    let size = ty.bits() as usize / 8;
                    let data: Vec<u8> =
                        s.iter().flat_map(|s| self.values(w, *s)[l].to_le_bytes()[..size].to_vec()).collect();
                    if !to.1.is_multiple_of(data.len()) {
                        return Err(format!("shared address {:#x} is misaligned for {} bytes", to.1, data.len()));
                    }
                    let step = self.cluster.step;
                    if add.is_none() {
                        self.cluster.ctas[to.0].shared.begin_write(to.1, data.len(), w.agent(l, step))?;
                    }
                    let due = self.delay();
                    let event = Event::Values { to, data, bar, add: add.map(|a| (a, *ty)) };
                    self.cluster.events.push((due, event).into());
                }
                BulkOp::Commit => {
                    let c = w.copies.entry(l as u8).or_default();
                    let open = std::mem::take(&mut c.bulk_open);
                    c.bulk_groups.push_back(open);
                }
                BulkOp::Wait { groups, read } => self.wait_bulk(w, l, *groups, *read)?,
                BulkOp::ReplaceMap { addr, field, value } => {
                    let at = self.addresses(w, *addr)[l];
                    let value = self.values(w, *value)[l];
                    if at >= GLOBAL {
                        replace(self.env.global.slice(at, 128)?, *field, value)?;
                    } else {
                        let (c, o) = self.cluster.resolve(self.cta, at)?;
                        let bytes = &mut self.cluster.ctas[c].shared.bytes;
                        let map = bytes.get_mut(o..o + 128).ok_or("tensor map is out of bounds")?;
                        replace(map, *field, value)?;
                    }
                }
            }
        }
        Ok(())
    }

    fn wait_bulk(&mut self, w: &mut Warp, l: usize, left: usize, read: bool) -> Result<(), String> {
        let Some(mut c) = w.copies.remove(&(l as u8)) else { return Ok(()) };
        let done = c.bulk_groups.len().saturating_sub(left);
        for group in c.bulk_groups.iter_mut().take(done) {
            for job in group.iter_mut() {
                self.read_store(w, job)?;
            }
        }
        if !read {
            for job in c.bulk_groups.drain(..done).flatten() {
                for write in job.ready.unwrap_or_default() {
                    self.write_global(self.cta, &write)?;
                }
            }
        }
        w.copies.insert(l as u8, c);
        Ok(())
    }

    /// What a warp's threads have left when they exit. Shared memory must have been read by then; global memory need not have
    /// been written.
    pub(crate) fn drain_copies(&mut self, w: &mut Warp) -> Result<(), String> {
        self.finish_copies(w, u32::MAX, 0, true)?;
        for (l, c) in &w.copies {
            let unread = c.bulk_groups.iter().flatten().any(|j| j.ready.is_none());
            if unread || !c.bulk_open.is_empty() {
                return Err(format!(
                    "lane {l} of warp {} exits while a bulk store may still read shared memory: no cp.async.bulk.wait_group",
                    w.index
                ));
            }
        }
        let all: Vec<u8> = w.copies.keys().copied().collect();
        for l in all {
            self.wait_bulk(w, usize::from(l), 0, false)?;
        }
        w.copies.clear();
        Ok(())
    }

    /// The first half of a store: shared memory is read.
    fn read_store(&mut self, w: &Warp, job: &mut StoreJob) -> Result<(), String> {
        if job.ready.is_some() {
            return Ok(());
        }
        let step = self.cluster.step;
        let shared = &mut self.cluster.ctas[self.cta].shared;
        shared.end_read(job.src, job.bytes, Agent { lane: ENGINE_LANE, ..w.agent(0, step) });
        let mut writes = vec![];
        match &job.far {
            Source::Box(map, coords) => {
                for (offset, row) in map.rows(coords) {
                    if row.len > 0 {
                        let at = |k: usize| shared.bytes[swizzle(job.src + offset + row.skip + k, map.swizzle)];
                        let data = (0..row.len).map(at).collect();
                        writes.push(GlobalWrite { at: row.from, data, reduce: job.reduce });
                    }
                }
            }
            Source::Flat(at) => {
                let data = shared.bytes[job.src..job.src + job.bytes].to_vec();
                writes.push(GlobalWrite { at: *at, data, reduce: job.reduce });
            }
            Source::Shared(_) => {}
        }
        job.ready = Some(writes);
        Ok(())
    }

    fn write_global(&mut self, cta: usize, write: &GlobalWrite) -> Result<(), String> {
        let grid = &self.cluster.ctas[cta].grid;
        self.env.effects += 1;
        let Some((op, ty)) = write.reduce else {
            return self.env.global.store(write.at, &write.data, grid, false);
        };
        let size = ty.bits() as usize / 8;
        let mut old = vec![0; write.data.len()];
        self.env.global.load(write.at, &mut old, grid, true)?;
        let word = |b: &[u8]| {
            let mut x = [0; 8];
            x[..b.len()].copy_from_slice(b);
            u64::from_le_bytes(x)
        };
        let new: Vec<u8> = old
            .chunks(size)
            .zip(write.data.chunks(size))
            .flat_map(|(a, b)| combine(op, ty, word(a), word(b)).to_le_bytes()[..size].to_vec())
            .collect();
        self.env.global.store(write.at, &new, grid, true)
    }

    /// An event's time has come.
    pub(crate) fn happen(&mut self, event: Event) -> Result<(), String> {
        match event {
            Event::Load(load) => self.land(&load),
            Event::Values { to, data, bar, add } => {
                let engine = self.cluster.engine();
                self.cluster.engine_time += 1;
                let mut clock = crate::clock::Clock::default();
                clock.raise(engine, self.cluster.engine_time);
                let shared = &mut self.cluster.ctas[to.0].shared;
                if let Some((op, ty)) = add {
                    let mut x = [0; 8];
                    x[..data.len()].copy_from_slice(&data);
                    let old = shared.bytes.get(to.1..to.1 + data.len()).ok_or("shared address is out of bounds")?;
                    let mut y = [0; 8];
                    y[..data.len()].copy_from_slice(old);
                    let new = combine(op, ty, u64::from_le_bytes(y), u64::from_le_bytes(x)).to_le_bytes();
                    shared.bytes[to.1..to.1 + data.len()].copy_from_slice(&new[..data.len()]);
                } else {
                    shared.bytes[to.1..to.1 + data.len()].copy_from_slice(&data);
                    let who = Agent { actor: engine, lane: ENGINE_LANE, clock: &clock, step: 0 };
                    shared.end_write(to.1, data.len(), who, None);
                }
                self.complete_tx(bar.0, bar.1, data.len())
            }
            Event::CopyArrival { cta, at, warp, lane, noinc } => {
                let mut w = std::mem::take(&mut self.cluster.ctas[warp.0].warps[warp.1]);
                let issuer = std::mem::replace(&mut self.cta, warp.0);
                let done = self.finish_copies(&mut w, 1 << lane, 0, true);
                self.cta = issuer;
                let clock = w.clock.clone();
                w.tick();
                self.cluster.ctas[warp.0].warps[warp.1] = w;
                done?;
                self.arrive_late(cta, at, &clock, noinc)
            }
        }
    }

    fn land(&mut self, load: &Load) -> Result<(), String> {
        let mut data = vec![0u8; load.bytes];
        let mut span = 0;
        let grid = self.cluster.ctas[load.issuer].grid.clone();
        match &load.far {
            Source::Box(map, coords) => {
                span = map.swizzle;
                for (offset, row) in map.rows(coords) {
                    let into = &mut data[offset + row.skip..offset + row.skip + row.len];
                    if row.len > 0 {
                        self.env.global.load(row.from, into, &grid, false)?;
                    }
                }
            }
            Source::Flat(at) => self.env.global.load(*at, &mut data, &grid, false)?,
            Source::Shared((c, at)) => {
                data.copy_from_slice(&self.cluster.ctas[*c].shared.bytes[*at..*at + load.bytes]);
                let engine = self.cluster.engine();
                let clock = crate::clock::Clock::new(engine + 1, Some(engine));
                let who = Agent { actor: engine, lane: ENGINE_LANE, clock: &clock, step: 0 };
                self.cluster.ctas[*c].shared.end_read(*at, load.bytes, who);
            }
        }
        let engine = self.cluster.engine();
        self.cluster.engine_time += 1;
        let mut clock = crate::clock::Clock::default();
        clock.raise(engine, self.cluster.engine_time);
        for ((c, at), bar) in &load.to {
            let shared = &mut self.cluster.ctas[*c].shared;
            for chunk in (0..load.bytes).step_by(16) {
                let to = swizzle(at + chunk, span);
                let n = 16.min(load.bytes - chunk);
                shared.bytes[to..to + n].copy_from_slice(&data[chunk..chunk + n]);
            }
            let who = Agent { actor: engine, lane: ENGINE_LANE, clock: &clock, step: 0 };
            shared.end_write(*at, load.bytes, who, None);
            self.complete_tx(bar.0, bar.1, load.bytes)?;
        }
        Ok(())
    }
}
