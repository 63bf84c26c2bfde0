//! Shuffles, votes, matches and reductions: executed when every lane of the member mask has come.

use super::ops::{Collective, Shfl, Vote};
use crate::{
    exec::{
        Cx,
        step::{Flow, merge},
    },
    inst::{AtomOp, Lanes, Reg, Src, Ty},
    state::{Group, State, Warp, lanes},
};

/// The member mask; none for instructions of the whole warp.
fn members(op: &Collective) -> Option<Src> {
    match op {
        Collective::Shfl { mask, .. }
        | Collective::Vote { mask, .. }
        | Collective::Match { mask, .. }
        | Collective::Redux { mask, .. }
        | Collective::Elect { mask, .. }
        | Collective::BarWarp { mask } => Some(*mask),
        _ => None,
    }
}

impl Cx<'_, '_, '_> {
    /// A group has come to a collective: executes it for every set of members that is complete.
    pub(crate) fn collective_step(&mut self, w: &mut Warp, g: usize, op: &Collective) -> Result<Flow, String> {
        let Group { pc, mask, .. } = w.groups[g];
        if let Collective::ActiveMask { d } = op {
            w.set(*d, mask, &[u64::from(mask); 32]);
            w.groups[g].pc += 1;
            return Ok(Flow::Next);
        }
        let masks: Lanes = match members(op) {
            Some(m) => self.values(w, m),
            None => [u64::from(w.exist); 32],
        };
        let first = masks[mask.trailing_zeros() as usize] as u32 & w.exist;
        if first == mask && lanes(mask).all(|l| masks[l] as u32 & w.exist == first) {
            self.collective(w, mask, op)?;
            w.groups[g].pc += 1;
            return Ok(Flow::Next);
        }
        w.groups[g].state = State::Converging;
        merge(w);
        let waiting = w.groups.iter().filter(|g| g.pc == pc && g.state == State::Converging);
        let here: u32 = waiting.fold(0, |m, g| m | g.mask);
        for l in lanes(here) {
            let need = masks[l] as u32 & w.exist;
            if need >> l & 1 == 0 {
                return Err(format!("lane {l} is not in its own member mask {need:#x}"));
            }
            if need & !w.live != 0 {
                return Err(format!("lanes {:#x} of the member mask have exited", need & !w.live));
            }
            let same = lanes(here).filter(|k| masks[*k] as u32 & w.exist == need).fold(0u32, |m, k| m | 1 << k);
            if same == need && l == need.trailing_zeros() as usize {
                self.collective(w, need, op)?;
                for group in w.groups.iter_mut().filter(|g| g.pc == pc && g.state == State::Converging) {
                    group.mask &= !need;
                }
                w.groups.retain(|g| g.mask != 0);
                w.groups.push(Group { pc: pc + 1, mask: need, state: State::Run });
            }
        }
        Ok(Flow::Blocked)
    }

    fn collective(&mut self, w: &mut Warp, mask: u32, op: &Collective) -> Result<(), String> {
        let put = |w: &mut Warp, d: Option<Reg>, v: Lanes| {
            if let Some(d) = d {
                w.set(d, mask, &v);
            }
        };
        match op {
            Collective::Shfl { mode, d, p, a, b, c, .. } => {
                let (a, b, c) = (self.values(w, *a), self.values(w, *b), self.values(w, *c));
                let (mut out, mut inside) = ([0; 32], [0; 32]);
                for l in lanes(mask) {
                    let (from, ok) = source_lane(*mode, l as i64, b[l] & 31, c[l]);
                    if mask >> from & 1 == 0 {
                        return Err(format!("lane {l} reads lane {from}, which is not in the member mask {mask:#x}"));
                    }
                    (out[l], inside[l]) = (a[from], u64::from(ok));
                }
                put(w, *d, out);
                put(w, *p, inside);
                w.tick();
            }
            Collective::Vote { mode, d, a, .. } => {
                let a = self.values(w, *a);
                let yes = lanes(mask).filter(|l| a[*l] & 1 == 1).fold(0u32, |m, l| m | 1 << l);
                w.set(*d, mask, &[vote(*mode, yes, mask); 32]);
                w.tick();
            }
            Collective::Match { all, d, p, a, .. } => {
                let a = self.values(w, *a);
                let like = |l: usize| lanes(mask).filter(|k| a[*k] == a[l]).fold(0u64, |m, k| m | 1 << k);
                let mut out = [0; 32];
                let mut every = [0; 32];
                for l in lanes(mask) {
                    let m = like(l);
                    every[l] = u64::from(m == u64::from(mask));
                    out[l] = if !*all || every[l] == 1 { m } else { 0 };
                }
                put(w, *d, out);
                put(w, *p, every);
                w.tick();
            }
            Collective::Redux { op, ty, d, a, .. } => {
                let a = self.values(w, *a);
                let total = lanes(mask).map(|l| a[l]).reduce(|x, y| reduce(*op, *ty, x, y)).unwrap_or(0);
                w.set(*d, mask, &[total; 32]);
                w.tick();
            }
            Collective::Elect { d, p, .. } => {
                // Which one is not said, but for a mask it is always the same.
                let nth = self.env.seed.wrapping_add(u64::from(mask) * 7) % u64::from(mask.count_ones());
                let leader = lanes(mask).nth(nth as usize).unwrap_or(0);
                put(w, *d, [leader as u64; 32]);
                put(w, *p, std::array::from_fn(|l| u64::from(l == leader)));
            }
            Collective::BarWarp { .. } => w.tick(),
            Collective::LdMatrix { trans, d, addr } => self.ldmatrix(w, *trans, d, *addr)?,
            Collective::StMatrix { trans, s, addr } => self.stmatrix(w, *trans, s, *addr)?,
            Collective::Mma { k, ta, tb, d, a, b, c } => self.mma_sync(w, *k, (*ta, *tb), d, a, b, c),
            Collective::SetMaxNReg | Collective::ActiveMask { .. } => {}
        }
        Ok(())
    }
}

fn reduce(op: AtomOp, ty: Ty, x: u64, y: u64) -> u64 {
    crate::exec::combine(op, ty, x, y)
}

/// The outcome of a vote of the lanes `mask`, of which `yes` say yes.
fn vote(mode: Vote, yes: u32, mask: u32) -> u64 {
    match mode {
        Vote::All => u64::from(yes == mask),
        Vote::Any => u64::from(yes != 0),
        Vote::Uni => u64::from(yes == mask || yes == 0),
        Vote::Ballot => yes.into(),
        Vote::Popc => yes.count_ones().into(),
    }
}

/// The lane that a lane reads, and whether it is within bounds.
fn source_lane(mode: Shfl, lane: i64, b: u64, c: u64) -> (usize, bool) {
    let (clamp, segment) = ((c & 31) as i64, (c >> 8 & 31) as i64);
    let low = lane & segment;
    let high = low | (clamp & !segment & 31);
    let b = b as i64;
    let (j, ok) = match mode {
        Shfl::Up => (lane - b, lane - b >= high),
        Shfl::Down => (lane + b, lane + b <= high),
        Shfl::Bfly => (lane ^ b, (lane ^ b) <= high),
        Shfl::Idx => {
            let j = low | (b & !segment & 31);
            (j, j <= high)
        }
    };
    if ok { (j as usize & 31, true) } else { (lane as usize, false) }
}
