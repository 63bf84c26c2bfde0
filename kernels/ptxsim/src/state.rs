//! What a launch consists of while it runs: clusters of CTAs of warps of lanes.

use std::collections::{BTreeMap, HashMap, VecDeque};

use crate::{
    clock::Clock,
    engines::{bulk::StoreJob, bulk::Timed, cp_async::Pending, mbarrier::Mbar, wgmma::Warpgroup},
    global::{Global, GridClock},
    inst::Lanes,
    shared::{Agent, Shared},
    warp::barrier::NamedBarrier,
};

/// What a group of lanes is doing.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum State {
    Run,
    /// At an instruction that other lanes must reach too.
    Converging,
    /// At barrier `id` in its round `round`.
    Barrier {
        id: u8,
        round: u32,
    },
    /// Waits for the cluster's barrier after its round.
    Cluster {
        round: u32,
    },
}

/// Lanes of a warp at one place.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Group {
    pub pc: usize,
    pub mask: u32,
    pub state: State,
}

/// An accumulator of an instruction in flight.
pub(crate) const ACCUMULATOR: u8 = 1;
/// An operand of an instruction in flight.
pub(crate) const OPERAND: u8 = 2;
/// Written since the last `wgmma.fence`.
pub(crate) const DIRTY: u8 = 4;

/// Copies of one lane: `cp.async`, and stores in bulk.
#[derive(Default)]
pub(crate) struct LaneCopies {
    pub open: Vec<Pending>,
    pub groups: VecDeque<Vec<Pending>>,
    pub bulk_open: Vec<StoreJob>,
    pub bulk_groups: VecDeque<Vec<StoreJob>>,
}

/// One warp.
#[derive(Default)]
pub(crate) struct Warp {
    /// Number within the CTA.
    pub index: usize,
    /// Number within the cluster.
    pub actor: usize,
    pub regs: Vec<Lanes>,
    pub groups: Vec<Group>,
    /// Lanes that the block has.
    pub exist: u32,
    /// Lanes that have not exited.
    pub live: u32,
    pub frozen_until: u64,
    pub clock: Clock,
    /// Flags of each register.
    pub marks: Vec<u8>,
    /// How many registers are accumulators or operands in flight.
    pub in_flight: u32,
    pub local: Vec<u8>,
    pub copies: BTreeMap<u8, LaneCopies>,
    /// The round of the cluster's barrier at which it last arrived.
    pub cluster_round: Option<u32>,
}

impl Warp {
    pub(crate) fn agent(&self, lane: usize, step: u32) -> Agent<'_> {
        Agent { actor: self.actor, lane: lane as u8, clock: &self.clock, step }
    }
    /// Writes the lanes of `mask`.
    pub(crate) fn set(&mut self, d: u32, mask: u32, value: &Lanes) {
        let r = &mut self.regs[d as usize];
        if mask == u32::MAX {
            *r = *value;
        } else {
            for l in 0..32 {
                if mask >> l & 1 == 1 {
                    r[l] = value[l];
                }
            }
        }
    }
    /// Later accesses of other lanes come after earlier ones.
    pub(crate) fn tick(&mut self) {
        self.clock.tick(self.actor);
    }
}

/// The lanes of a mask.
pub(crate) fn lanes(mask: u32) -> impl Iterator<Item = usize> {
    (0..32).filter(move |l| mask >> l & 1 == 1)
}

/// One CTA.
pub(crate) struct Cta {
    pub id: [u32; 3],
    /// Number within the cluster.
    pub rank: usize,
    pub warps: Vec<Warp>,
    pub shared: Shared,
    pub mbars: BTreeMap<usize, Mbar>,
    pub barriers: Vec<NamedBarrier>,
    pub warpgroups: Vec<Warpgroup>,
    pub grid: GridClock,
}

/// CTAs that share a barrier and see each other's shared memory; one, unless the entry says more.
pub(crate) struct Cluster {
    pub ctas: Vec<Cta>,
    /// Instructions so far.
    pub step: u32,
    /// Rounds of scheduling so far.
    pub now: u64,
    pub events: Vec<Timed>,
    /// How many asynchronous writes have arrived.
    pub engine_time: u32,
    /// Step of the last `fence.proxy.async` of each thread.
    pub fenced: Vec<u32>,
    pub barrier_arrived: u32,
    pub barrier_round: u32,
    pub barrier_gather: Clock,
    pub barrier_done: Clock,
    pub threads: u32,
    pub exited: u32,
}

impl Cluster {
    /// The actor that asynchronous writes are made by.
    pub(crate) fn engine(&self) -> usize {
        self.fenced.len() / 32
    }
    /// CTA and offset of a shared address as a CTA sees it.
    pub(crate) fn resolve(&self, cta: usize, address: u64) -> Result<(usize, usize), String> {
        use crate::decode::window::SHARED;
        let a =
            if (SHARED..SHARED + crate::decode::window::SIZE).contains(&address) { address - SHARED } else { address };
        let (window, offset) = ((a >> 24) as usize, (a & 0xff_ffff) as usize);
        if window == 0 {
            return Ok((cta, offset));
        }
        if let Some(other) = self.ctas.get(window - 1) {
            if other.warps.iter().all(|w| w.live == 0 && w.exist != 0) {
                return Err(format!("shared address {address:#x} is of a CTA of the cluster that has ended"));
            }
            return Ok((window - 1, offset));
        }
        Err(format!("shared address {address:#x} is out of bounds"))
    }
}

/// Random numbers of the scheduler.
#[derive(Clone, Debug)]
pub(crate) struct Rng(u64);

impl Rng {
    pub(crate) fn new(seed: u64) -> Self {
        let mut x = seed.wrapping_add(0x9e37_79b9_7f4a_7c15);
        x = (x ^ x >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        x = (x ^ x >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
        Rng((x ^ x >> 31) | 1)
    }
    /// Below `n`.
    pub(crate) fn below(&mut self, n: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        (self.0 >> 11) % n.max(1)
    }
}

/// A launch as its instructions see it.
pub(crate) struct Env<'a> {
    pub global: &'a mut Global,
    pub rng: Rng,
    pub seed: u64,
    /// Which outcome approximations have.
    pub numerics: u64,
    /// Fraction bits that tensor cores keep of a sum of 8-bit floats.
    pub fp8_sum_bits: Option<u32>,
    pub grid: [u32; 3],
    pub block: [u32; 3],
    pub params: Vec<u8>,
    pub dynamic_bytes: u32,
    /// What releases have told, by address.
    pub told: HashMap<u64, BTreeMap<u16, u16>>,
    pub thread_instructions: u64,
    /// Grows with everything that another thread can see.
    pub effects: u64,
}
