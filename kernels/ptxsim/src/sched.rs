//! Runs a grid: clusters come and go, warps take turns in an order that the seed decides, freeze for a while, and asynchronous
//! work is late.

use std::collections::{BTreeMap, HashMap};

use crate::{
    clock::Clock,
    decode::Func,
    exec::Cx,
    global::{Global, GridClock},
    shared::Shared,
    state::{Cluster, Cta, DIRTY, Env, Group, Rng, State, Warp},
};

/// Shared memory that a block can have on the device.
const MAX_SHARED: usize = 232_448;
/// CTAs that a device holds at once.
const RESIDENT: usize = 132;
/// Rounds without an effect on others after which nothing can happen any more, if threads do no more than spin. It is more than
/// a warp freezes.
const PATIENCE: u64 = 1500;
/// Instructions of a thread in a round that are still spinning.
const SPIN: u64 = 24;
/// Instructions of each thread without an effect on others after which it is a livelock.
const LIVELOCK: u64 = 100_000;
/// Instructions of all threads of a launch, at most: no test needs more, and a loop that never ends must.
const BUDGET: u64 = 2_000_000_000;
/// What registers hold before they are written.
const GARBAGE: u64 = 0x7fba_dbad_7fba_dbad;

/// A launch.
pub(crate) struct Grid<'a> {
    pub func: &'a Func,
    pub grid: [u32; 3],
    pub block: [u32; 3],
    pub dynamic_bytes: u32,
    pub params: Vec<u8>,
    pub seed: u64,
    pub numerics: u64,
    pub fp8_sum_bits: Option<u32>,
}

impl Grid<'_> {
    fn check(&self) -> Result<usize, String> {
        let threads: u64 = self.block.iter().map(|x| u64::from(*x)).product();
        if threads == 0 || threads > self.func.max_threads.min(1024).into() {
            return Err(format!("{}: a block of {threads} threads, at most {}", self.func.name, self.func.max_threads));
        }
        let [x, y, z] = self.grid;
        if self.grid.contains(&0) || x >= 1 << 31 || y > 65_535 || z > 65_535 {
            return Err(format!("{}: grid {:?}", self.func.name, self.grid));
        }
        for (g, c) in self.grid.iter().zip(self.func.cluster) {
            if c == 0 || g % c != 0 {
                return Err(format!("{}: grid {:?} in clusters of {:?}", self.func.name, self.grid, self.func.cluster));
            }
        }
        if self.func.cluster.iter().product::<u32>() > 16 {
            return Err(format!("{}: clusters of {:?}", self.func.name, self.func.cluster));
        }
        let shared = self.func.dynamic_at + self.dynamic_bytes as usize;
        if shared > MAX_SHARED {
            return Err(format!("{}: {shared} bytes of shared memory, at most {MAX_SHARED}", self.func.name));
        }
        Ok(shared)
    }

    /// The cluster of a number.
    fn cluster(&self, number: u64, shared_bytes: usize) -> Cluster {
        let (func, shape) = (self.func, self.func.cluster);
        let threads = self.block.iter().product::<u32>();
        let num_warps = threads.div_ceil(32) as usize;
        let size = shape.iter().product::<u32>() as usize;
        let actors = size * num_warps + 1;
        let across: [u64; 3] = std::array::from_fn(|i| u64::from(self.grid[i] / shape[i]));
        let origin = [number % across[0], number / across[0] % across[1], number / across[0] / across[1]];
        let ctas = (0..size)
            .map(|rank| {
                let r = rank as u32;
                let within = [r % shape[0], r / shape[0] % shape[1], r / shape[0] / shape[1]];
                let id: [u32; 3] = std::array::from_fn(|i| origin[i] as u32 * shape[i] + within[i]);
                let linear = u64::from(id[0])
                    + u64::from(self.grid[0]) * (u64::from(id[1]) + u64::from(self.grid[1]) * u64::from(id[2]));
                let warps = (0..num_warps)
                    .map(|index| {
                        let actor = rank * num_warps + index;
                        let n = (threads - 32 * index as u32).min(32);
                        let exist = u32::MAX >> (32 - n);
                        Warp {
                            index,
                            actor,
                            regs: func.regs.iter().map(|r| [GARBAGE & r.ty.mask(); 32]).collect(),
                            groups: vec![Group { pc: 0, mask: exist, state: State::Run }],
                            exist,
                            live: exist,
                            frozen_until: 0,
                            clock: Clock::new(actors, Some(actor)),
                            marks: if func.uses_wgmma { vec![DIRTY; func.regs.len()] } else { vec![] },
                            in_flight: 0,
                            local: vec![0xff; 32 * func.local_bytes],
                            copies: BTreeMap::new(),
                            cluster_round: None,
                        }
                    })
                    .collect();
                Cta {
                    id,
                    rank,
                    warps,
                    shared: Shared::new(shared_bytes),
                    mbars: BTreeMap::new(),
                    barriers: vec![Default::default(); 16],
                    warpgroups: vec![Default::default(); if func.uses_wgmma { num_warps.div_ceil(4) } else { 0 }],
                    grid: GridClock { cta: (linear % 65_535) as u16 + 1, now: 1, ..GridClock::default() },
                }
            })
            .collect();
        Cluster {
            ctas,
            step: 0,
            now: 0,
            events: vec![],
            engine_time: 0,
            fenced: vec![0; size * num_warps * 32],
            barrier_arrived: 0,
            barrier_round: 0,
            barrier_gather: Clock::default(),
            barrier_done: Clock::default(),
            threads: threads * size as u32,
            exited: 0,
        }
    }

    /// Runs to the end; returns the number of thread instructions.
    pub(crate) fn run(self, global: &mut Global) -> Result<u64, String> {
        let shared_bytes = self.check()?;
        let per_cluster = self.func.cluster.iter().product::<u32>();
        let total = self.grid.iter().map(|x| u64::from(*x)).product::<u64>() / u64::from(per_cluster);
        global.launch += 1;
        global.watch = total * u64::from(per_cluster) > 1;
        let mut env = Env {
            global,
            rng: Rng::new(self.seed),
            seed: self.seed,
            numerics: self.numerics,
            fp8_sum_bits: self.fp8_sum_bits,
            grid: self.grid,
            block: self.block,
            params: self.params.clone(),
            dynamic_bytes: self.dynamic_bytes,
            told: HashMap::new(),
            thread_instructions: 0,
            effects: 0,
        };
        // CTAs that cannot talk to each other need not be there together.
        let most = if self.func.communicates { RESIDENT } else { 2 + env.rng.below(6) as usize };
        let most = (most / per_cluster as usize).max(1);
        let mut resident: Vec<Cluster> = vec![];
        let mut next = 0;
        // Effects, instructions and rounds when something last happened.
        let (mut effects, mut instructions, mut rounds) = (0, 0, 0);
        loop {
            while resident.len() < most && next < total {
                resident.push(self.cluster(next, shared_bytes));
                next += 1;
            }
            if resident.is_empty() {
                return Ok(env.thread_instructions);
            }
            let start = env.rng.below(resident.len() as u64) as usize;
            for i in 0..resident.len() {
                let i = (i + start) % resident.len();
                for _ in 0..1 + env.rng.below(4) {
                    round(&mut env, self.func, &mut resident[i])?;
                }
            }
            rounds += 1;
            resident.retain(|c| !finished(c));
            if env.thread_instructions > BUDGET {
                return Err(dump(self.func, &resident, "budget of instructions used up"));
            }
            if env.effects != effects {
                (effects, instructions, rounds) = (env.effects, env.thread_instructions, 0);
                continue;
            }
            let threads: u64 = resident.iter().map(|c| u64::from(c.threads)).sum();
            let done = env.thread_instructions - instructions;
            if rounds > PATIENCE && done < rounds * threads * SPIN {
                return Err(dump(self.func, &resident, "deadlock"));
            }
            if done > threads * LIVELOCK {
                return Err(dump(self.func, &resident, "livelock"));
            }
        }
    }
}

fn finished(c: &Cluster) -> bool {
    c.events.is_empty() && c.ctas.iter().all(|c| c.warps.iter().all(|w| w.groups.is_empty()))
}

/// Every warp of a cluster has a turn.
fn round(env: &mut Env<'_>, func: &Func, cluster: &mut Cluster) -> Result<(), String> {
    if finished(cluster) {
        return Ok(());
    }
    cluster.now += 1;
    let now = cluster.now;
    let mut cx = Cx { env, cluster, cta: 0, func };
    let mut i = 0;
    while i < cx.cluster.events.len() {
        if cx.cluster.events[i].due <= now {
            let event = cx.cluster.events.swap_remove(i).event;
            cx.happen(event).map_err(|e| format!("{}: {e}", func.name))?;
        } else {
            i += 1;
        }
    }
    for cta in 0..cx.cluster.ctas.len() {
        cx.cta = cta;
        let n = cx.cluster.ctas[cta].warps.len();
        if cx.env.rng.below(64) == 0 {
            let warp = cx.env.rng.below(n as u64) as usize;
            cx.cluster.ctas[cta].warps[warp].frozen_until = now + 20 + cx.env.rng.below(150);
        }
        let start = cx.env.rng.below(n as u64) as usize;
        for i in 0..n {
            let i = (i + start) % n;
            if cx.cluster.ctas[cta].warps[i].groups.is_empty() {
                continue;
            }
            if cx.cluster.ctas[cta].warps[i].frozen_until > now {
                continue;
            }
            let mut w = std::mem::take(&mut cx.cluster.ctas[cta].warps[i]);
            let before = w.groups.len();
            let result = cx.slice(&mut w);
            if before > 0 && w.groups.is_empty() {
                cx.drain_copies(&mut w).map_err(|e| format!("{}: {e}", func.name))?;
            }
            cx.cluster.ctas[cta].warps[i] = w;
            result?;
        }
        for g in 0..cx.cluster.ctas[cta].warpgroups.len() {
            cx.warpgroup(g)?;
        }
        let c = &cx.cluster.ctas[cta];
        if c.warps.iter().all(|w| w.groups.is_empty()) && c.warpgroups.iter().any(|w| !w.idle()) {
            return Err(format!("{}: CTA {:?} exits with a wgmma in flight", func.name, c.id));
        }
    }
    if finished_but_events(cx.cluster) {
        return Err(format!("{}: exits with a copy to shared memory in flight", func.name));
    }
    Ok(())
}

/// All threads are gone while copies still write shared memory.
fn finished_but_events(c: &Cluster) -> bool {
    !c.events.is_empty() && c.ctas.iter().all(|c| c.warps.iter().all(|w| w.groups.is_empty()))
}

/// Where everything stands.
fn dump(func: &Func, resident: &[Cluster], what: &str) -> String {
    let mut s = format!("{}: {what}:\n", func.name);
    for cta in resident.iter().flat_map(|c| &c.ctas).take(8) {
        for w in &cta.warps {
            for g in &w.groups {
                let inst = &func.code[g.pc];
                s += &format!(
                    "  CTA {:?} warp {} lanes {:#010x} line {} `{}`: {:?}\n",
                    cta.id, w.index, g.mask, inst.line, inst.text, g.state
                );
            }
        }
        for (at, m) in &cta.mbars {
            s += &format!(
                "  CTA {:?} mbarrier {at:#x}: phase {}, {} of {} arrivals pending, {} bytes pending\n",
                cta.id, m.phase, m.pending, m.count, m.tx
            );
        }
        for (i, b) in cta.barriers.iter().enumerate().filter(|(_, b)| b.arrived > 0) {
            s += &format!("  CTA {:?} barrier {i}: {} of {} threads\n", cta.id, b.arrived, b.expected);
        }
    }
    s
}
