//! Barriers of the CTA and of the cluster.

use super::ops::{BarOp, Vote};
use crate::{
    clock::Clock,
    exec::{
        Cx,
        step::{Flow, merge},
    },
    inst::Op,
    state::{Group, State, Warp, lanes},
};

/// One of the 16 barriers of a CTA.
#[derive(Clone, Debug, Default)]
pub(crate) struct NamedBarrier {
    /// Threads that have come in this round.
    pub arrived: u32,
    /// Threads that the round waits for.
    pub expected: u32,
    pub round: u32,
    gather: Clock,
    done: Clock,
    votes: (u32, u32),
    /// Yes votes and voters of even and odd rounds.
    results: [(u32, u32); 2],
}

impl Cx<'_, '_, '_> {
    /// Whether all lanes of the warp have come to an aligned barrier; if not, these wait for the others.
    fn together(&mut self, w: &mut Warp, g: usize) -> Result<bool, String> {
        if w.groups[g].mask == w.exist {
            return Ok(true);
        }
        if w.live != w.exist {
            return Err(format!("lanes {:#x} exited before a barrier of the whole warp", w.exist & !w.live));
        }
        w.groups[g].state = State::Converging;
        let pc = w.groups[g].pc;
        merge(w);
        if let [only] = &mut w.groups[..]
            && only.mask == w.exist
            && only.pc == pc
        {
            only.state = State::Run;
            return Ok(true);
        }
        Ok(false)
    }

    pub(crate) fn bar_step(&mut self, w: &mut Warp, g: usize, op: &BarOp) -> Result<Flow, String> {
        if op.aligned && !self.together(w, g)? {
            return Ok(Flow::Blocked);
        }
        let g = if op.aligned { 0 } else { g };
        let Group { pc, mask, .. } = w.groups[g];
        let id = self.uniform(w, op.id, mask)?;
        if id > 15 {
            return Err(format!("there is no barrier {id}"));
        }
        let threads = self.env.block.iter().product::<u32>();
        let expected = match op.count {
            Some(c) => self.uniform(w, c, mask)? as u32,
            None => threads,
        };
        if op.count.is_some() && (expected == 0 || !expected.is_multiple_of(32)) {
            return Err(format!("barrier {id} of {expected} threads: not a multiple of 32"));
        }
        if expected > threads.next_multiple_of(32) {
            return Err(format!("barrier {id} of {expected} threads in a block of {threads}"));
        }
        let yes = op.red.map(|(_, _, p)| self.values(w, p));
        let b = &mut self.cluster.ctas[self.cta].barriers[id as usize];
        if b.arrived > 0 && b.expected != expected {
            return Err(format!("barrier {id} of {expected} threads, but of {} for others", b.expected));
        }
        // With a count, a warp counts as 32 threads.
        b.arrived += if op.count.is_some() && op.aligned { 32 } else { mask.count_ones() };
        b.expected = expected;
        if b.arrived > expected {
            return Err(format!("barrier {id}: {} threads came, {expected} were expected", b.arrived));
        }
        if let Some(yes) = yes {
            b.votes.0 += lanes(mask).filter(|l| yes[*l] & 1 == 1).count() as u32;
            b.votes.1 += mask.count_ones();
        }
        b.gather.join(&w.clock);
        let round = b.round;
        w.groups[g].state = if op.wait { State::Barrier { id: id as u8, round } } else { State::Run };
        w.groups[g].pc = pc + usize::from(!op.wait);
        w.clock.tick(w.actor);
        if b.arrived == expected {
            b.results[(round & 1) as usize] = std::mem::take(&mut b.votes);
            b.done = b.gather.clone();
            b.arrived = 0;
            b.round += 1;
        }
        self.env.effects += 1;
        Ok(if op.wait { Flow::Blocked } else { Flow::Next })
    }

    pub(crate) fn cluster_bar_step(
        &mut self,
        w: &mut Warp,
        g: usize,
        arrive: bool,
        release: bool,
    ) -> Result<Flow, String> {
        if !self.together(w, g)? {
            return Ok(Flow::Blocked);
        }
        let c = &mut *self.cluster;
        if arrive {
            if w.cluster_round.is_some() {
                return Err("arrives at the cluster's barrier twice without waiting".to_owned());
            }
            w.cluster_round = Some(c.barrier_round);
            c.barrier_arrived += w.exist.count_ones();
            if release {
                c.barrier_gather.join(&w.clock);
            }
            w.clock.tick(w.actor);
            w.groups[0].pc += 1;
            self.env.effects += 1;
            return Ok(Flow::Next);
        }
        match w.cluster_round.take() {
            None => Err("waits at the cluster's barrier without having arrived".to_owned()),
            Some(round) => {
                w.groups[0].state = State::Cluster { round };
                Ok(Flow::Blocked)
            }
        }
    }

    /// Whether the cluster's barrier is complete; threads that have exited count as arrived.
    pub(crate) fn settle_cluster_barrier(&mut self) {
        let c = &mut *self.cluster;
        if c.barrier_arrived > 0 && c.barrier_arrived + c.exited >= c.threads {
            c.barrier_arrived = 0;
            c.barrier_round += 1;
            c.barrier_done = c.barrier_gather.clone();
        }
    }

    /// Groups whose barrier is complete go on.
    pub(crate) fn wake(&mut self, w: &mut Warp) -> Result<(), String> {
        if w.groups.iter().all(|g| matches!(g.state, State::Run | State::Converging)) {
            return Ok(());
        }
        self.settle_cluster_barrier();
        let mut changed = false;
        for g in 0..w.groups.len() {
            match w.groups[g].state {
                State::Barrier { id, round } => {
                    let b = &self.cluster.ctas[self.cta].barriers[id as usize];
                    if b.round == round {
                        continue;
                    }
                    w.clock.join(&b.done);
                    if let Op::Bar(op) = &self.func.code[w.groups[g].pc].op
                        && let Some((mode, d, _)) = op.red
                    {
                        let (yes, all) = b.results[(round & 1) as usize];
                        let value = match mode {
                            Vote::Popc => u64::from(yes),
                            Vote::All => u64::from(yes == all),
                            _ => u64::from(yes > 0),
                        };
                        w.set(d, w.groups[g].mask, &[value; 32]);
                    }
                }
                State::Cluster { round } => {
                    if self.cluster.barrier_round == round {
                        continue;
                    }
                    let done = self.cluster.barrier_done.clone();
                    w.clock.join(&done);
                }
                _ => continue,
            }
            w.groups[g].state = State::Run;
            w.groups[g].pc += 1;
            changed = true;
        }
        if changed {
            merge(w);
        }
        Ok(())
    }
}
