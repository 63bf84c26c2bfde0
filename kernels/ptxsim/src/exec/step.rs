//! One step of a group of lanes: guards, branches, exits, convergence, and who may go on.

use super::Cx;
use crate::{
    engines::ops::MbarOp,
    inst::{Inst, Op},
    state::{ACCUMULATOR, DIRTY, Group, OPERAND, State, Warp, lanes},
};

/// What a step came to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Flow {
    /// Go on.
    Next,
    /// A wait that failed: let others run.
    Yield,
    /// The group blocks or is gone.
    Blocked,
}

/// Which thread an error is about.
fn located(cx: &Cx<'_, '_, '_>, w: &Warp, inst: &Inst, message: &str) -> String {
    let id = cx.cluster.ctas[cx.cta].id;
    format!(
        "{}:{} `{}`: {message} (CTA {},{},{} warp {})",
        cx.func.name, inst.line, inst.text, id[0], id[1], id[2], w.index
    )
}

impl Cx<'_, '_, '_> {
    /// Runs a warp until its slice is over or no group of it can go on.
    pub(crate) fn slice(&mut self, w: &mut Warp) -> Result<(), String> {
        let mut budget = 1 + self.env.rng.below(300);
        while budget > 0 && !w.groups.is_empty() {
            self.wake(w)?;
            let Some(g) = self.choose(w) else { break };
            // A single group needs no choice until it blocks or splits.
            loop {
                budget -= 1;
                match self.step(w, g)? {
                    Flow::Next => {}
                    Flow::Yield => return Ok(()),
                    Flow::Blocked => break,
                }
                if w.groups.len() > 1 {
                    merge(w);
                    break;
                }
                if budget == 0 {
                    break;
                }
            }
        }
        Ok(())
    }

    /// Mostly the group that is furthest behind, so that groups meet again.
    fn choose(&mut self, w: &Warp) -> Option<usize> {
        let ready = |g: &Group| g.state == State::Run;
        if w.groups.len() == 1 {
            return ready(&w.groups[0]).then_some(0);
        }
        let all: Vec<usize> = (0..w.groups.len()).filter(|i| ready(&w.groups[*i])).collect();
        if all.len() > 1 && self.env.rng.below(8) == 0 {
            return all.get(self.env.rng.below(all.len() as u64) as usize).copied();
        }
        all.into_iter().min_by_key(|i| w.groups[*i].pc)
    }

    fn step(&mut self, w: &mut Warp, g: usize) -> Result<Flow, String> {
        let func = self.func;
        let Group { pc, mask, .. } = w.groups[g];
        let inst = &func.code[pc];
        let mut active = mask;
        if let Some((p, negated)) = inst.guard {
            let values = &w.regs[p as usize];
            for l in lanes(mask) {
                if (values[l] != 0) == negated {
                    active &= !(1 << l);
                }
            }
            if active == 0 {
                w.groups[g].pc += 1;
                return Ok(Flow::Next);
            }
        }
        self.cluster.step += 1;
        self.env.thread_instructions += u64::from(active.count_ones());
        if func.uses_wgmma {
            check_flight(func, w, inst).map_err(|e| located(self, w, inst, &e))?;
        }
        match self.dispatch(w, g, active, inst) {
            Ok(flow) => {
                if func.uses_wgmma && !matches!(inst.op, Op::Wgmma(_)) {
                    for r in &inst.writes {
                        w.marks[*r as usize] |= DIRTY;
                    }
                }
                Ok(flow)
            }
            Err(e) => Err(located(self, w, inst, &e)),
        }
    }

    fn dispatch(&mut self, w: &mut Warp, g: usize, active: u32, inst: &Inst) -> Result<Flow, String> {
        let Group { pc, mask, .. } = w.groups[g];
        match &inst.op {
            Op::Bra(target) => {
                if active == mask {
                    w.groups[g].pc = *target;
                } else {
                    w.groups[g] = Group { pc: pc + 1, mask: mask & !active, state: State::Run };
                    w.groups.push(Group { pc: *target, mask: active, state: State::Run });
                }
                Ok(Flow::Next)
            }
            Op::Exit => {
                w.live &= !active;
                self.cluster.exited += active.count_ones();
                self.env.effects += 1;
                if active == mask {
                    w.groups.remove(g);
                    return Ok(Flow::Blocked);
                }
                w.groups[g] = Group { pc: pc + 1, mask: mask & !active, state: State::Run };
                Ok(Flow::Next)
            }
            Op::Collective(op) => {
                let g = self.split_off(w, g, active);
                self.collective_step(w, g, op)
            }
            Op::Bar(op) => {
                let g = self.split_off(w, g, active);
                self.bar_step(w, g, op)
            }
            Op::ClusterBar { arrive, release } => {
                let g = self.split_off(w, g, active);
                self.cluster_bar_step(w, g, *arrive, *release)
            }
            Op::Wgmma(_) => {
                let g = self.split_off(w, g, active);
                w.groups[g].state = State::Converging;
                merge(w);
                Ok(Flow::Blocked)
            }
            Op::Mbar(op) => {
                let done = self.mbar(w, active, op)?;
                w.groups[g].pc += 1;
                let waits = matches!(**op, MbarOp::Wait { .. });
                Ok(if waits && !done { Flow::Yield } else { Flow::Next })
            }
            op => {
                self.exec(w, active, op)?;
                w.groups[g].pc += 1;
                Ok(Flow::Next)
            }
        }
    }

    /// Lanes whose guard is false go past the instruction; the group of the others is returned.
    fn split_off(&mut self, w: &mut Warp, g: usize, active: u32) -> usize {
        let Group { pc, mask, state } = w.groups[g];
        if active != mask {
            w.groups[g].mask = active;
            w.groups.push(Group { pc: pc + 1, mask: mask & !active, state });
        }
        g
    }
}

/// Groups at the same place and in the same state are one.
pub(crate) fn merge(w: &mut Warp) {
    let mut i = 0;
    while i < w.groups.len() {
        let mut j = i + 1;
        while j < w.groups.len() {
            if w.groups[i].pc == w.groups[j].pc && w.groups[i].state == w.groups[j].state {
                w.groups[i].mask |= w.groups[j].mask;
                w.groups.remove(j);
            } else {
                j += 1;
            }
        }
        i += 1;
    }
}

/// Registers in flight must be left alone.
fn check_flight(func: &crate::decode::Func, w: &Warp, inst: &Inst) -> Result<(), String> {
    if w.in_flight == 0 || matches!(inst.op, Op::Wgmma(_)) {
        return Ok(());
    }
    let name = |r: &u32| &func.regs[*r as usize].name;
    if let Some(r) = inst.reads.iter().chain(&inst.writes).find(|r| w.marks[**r as usize] & ACCUMULATOR != 0) {
        return Err(format!("{} is an accumulator of a wgmma that is not waited for (in flight)", name(r)));
    }
    if let Some(r) = inst.writes.iter().find(|r| w.marks[**r as usize] & OPERAND != 0) {
        return Err(format!("{} is an operand of a wgmma that is not waited for (in flight)", name(r)));
    }
    Ok(())
}
