//! Tensor cores of a warpgroup. An instruction is checked when it is issued and computed when it is waited for.

use std::collections::VecDeque;

use super::{
    ops::{OperandA, WgmmaMma, WgmmaOp},
    tensor_map::swizzle,
};
use crate::{
    exec::Cx,
    inst::{Op, Ty},
    num::{bits32, decode, table8},
    shared::{Agent, ENGINE_LANE},
    state::{ACCUMULATOR, DIRTY, OPERAND, State},
};

/// An instruction in flight.
#[derive(Clone, Debug)]
struct Job {
    pc: usize,
    /// Chunks of 16 bytes of A in shared memory, or its registers.
    a: Operand,
    b: Vec<usize>,
    scale_d: bool,
}

#[derive(Clone, Debug)]
enum Operand {
    Shared(Vec<usize>),
    Regs(Vec<[u32; 4]>),
}

/// What four warps have in flight.
#[derive(Clone, Debug, Default)]
pub(crate) struct Warpgroup {
    open: Vec<Job>,
    groups: VecDeque<Vec<Job>>,
}

impl Warpgroup {
    fn jobs(&self) -> impl Iterator<Item = &Job> {
        self.open.iter().chain(self.groups.iter().flatten())
    }
    /// Whether nothing is in flight.
    pub(crate) fn idle(&self) -> bool {
        self.jobs().next().is_none()
    }
}

/// Addresses of the 16-byte chunks of an operand of `rows` x `k` elements, in the order that [`matrix`] reads them.
fn chunks(desc: u64, rows: usize, k: usize, size: usize, mn_major: bool) -> Result<Vec<usize>, String> {
    let field = |shift: u32| ((desc >> shift & 0x3fff) << 4) as usize;
    let (start, lbo, sbo) = (field(0), field(16), field(32));
    if desc >> 49 & 7 != 0 {
        return Err(format!("descriptor {desc:#x} with a base offset, which is not supported"));
    }
    let span = [0, 128, 64, 32][(desc >> 62) as usize];
    let pitch = if span == 0 { 16 } else { span };
    let mut all = vec![];
    if mn_major {
        let (across, down) = if span == 0 { (sbo, lbo) } else { (lbo, sbo) };
        for r in (0..rows).step_by(16 / size) {
            for kk in 0..k {
                let byte = r * size;
                let a = start + byte / pitch * across + kk / 8 * down + kk % 8 * pitch + byte % pitch;
                all.push(swizzle(a, span));
            }
        }
    } else {
        for r in 0..rows {
            for c in 0..k * size / 16 {
                let along = if span == 0 { c * lbo } else { 16 * c };
                all.push(swizzle(start + r / 8 * sbo + r % 8 * pitch + along, span));
            }
        }
    }
    Ok(all)
}

/// The row of a chunk's first element.
fn row_of(i: usize, k: usize, size: usize, mn_major: bool) -> usize {
    if mn_major { i / k * (16 / size) } else { i / (k * size / 16) }
}

/// Elements by row and k.
fn matrix(bytes: &[u8], chunks: &[usize], rows: usize, k: usize, ty: Ty, mn_major: bool) -> Vec<f32> {
    let size = ty.bits() as usize / 8;
    let per = 16 / size;
    let table = (size == 1).then(|| table8(ty));
    let mut out = vec![0.0; rows * k];
    for (i, at) in chunks.iter().enumerate() {
        for e in 0..per {
            let mut x = [0; 8];
            x[..size].copy_from_slice(&bytes[at + e * size..at + (e + 1) * size]);
            let x = u64::from_le_bytes(x);
            let v = match &table {
                Some(t) => t[x as usize],
                None if ty == Ty::Bf16 => f32::from_bits((x as u32) << 16),
                None => decode(x, ty) as f32,
            };
            let (r, kk) = if mn_major { (i / k * per + e, i % k) } else { (i / (k / per), i % (k / per) * per + e) };
            out[r * k + kk] = v;
        }
    }
    out
}

/// A sum whose addends lose what is below so many bits of the largest one's fraction.
fn short_sum(addends: impl Iterator<Item = f32> + Clone, bits: u32) -> f32 {
    let largest = addends.clone().fold(0f32, |m, x| m.max(x.abs()));
    if largest == 0.0 || !largest.is_finite() {
        return addends.sum();
    }
    let least = 2f64.powi(largest.log2().floor() as i32 - bits as i32);
    let sum: f64 = addends.map(|x| (f64::from(x) / least).trunc()).sum();
    (sum * least) as f32
}

impl Cx<'_, '_, '_> {
    /// Executes a `wgmma` instruction if its four warps have come.
    pub(crate) fn warpgroup(&mut self, group: usize) -> Result<(), String> {
        let warps = &self.cluster.ctas[self.cta].warps;
        let mut pc = None;
        let Some(four) = warps.get(4 * group..4 * group + 4) else {
            let waits = warps
                .iter()
                .skip(4 * group)
                .flat_map(|w| &w.groups)
                .find(|g| g.state == State::Converging && matches!(self.func.code[g.pc].op, Op::Wgmma(_)));
            return match waits {
                Some(g) => Err(self.here(g.pc, "a warpgroup is 4 warps; the block has fewer")),
                None => Ok(()),
            };
        };
        for w in four {
            let waiting = w
                .groups
                .iter()
                .find(|g| g.state == State::Converging && matches!(self.func.code[g.pc].op, Op::Wgmma(_)));
            match (waiting, pc) {
                (Some(g), _) if w.live != u32::MAX => {
                    return Err(self.here(g.pc, "a thread of the warpgroup has exited"));
                }
                (Some(g), None) if g.mask == u32::MAX => pc = Some(g.pc),
                (Some(g), Some(pc)) if g.mask == u32::MAX && g.pc == pc => {}
                (None, Some(pc)) if w.live == 0 => {
                    return Err(self.here(pc, "a thread of the warpgroup has exited"));
                }
                _ => return Ok(()),
            }
        }
        let Some(pc) = pc else { return Ok(()) };
        if let Op::Wgmma(op) = &self.func.code[pc].op {
            self.wgmma(group, pc, op).map_err(|e| self.here(pc, &e))?;
        }
        for w in &mut self.cluster.ctas[self.cta].warps[4 * group..4 * group + 4] {
            w.groups[0].pc += 1;
            w.groups[0].state = State::Run;
        }
        self.env.effects += 1;
        Ok(())
    }

    fn here(&self, pc: usize, message: &str) -> String {
        let inst = &self.func.code[pc];
        let id = self.cluster.ctas[self.cta].id;
        format!("{}:{} `{}`: {message} (CTA {},{},{})", self.func.name, inst.line, inst.text, id[0], id[1], id[2])
    }

    fn wgmma(&mut self, group: usize, pc: usize, op: &WgmmaOp) -> Result<(), String> {
        let cta = self.cta;
        match op {
            WgmmaOp::Fence => {
                for w in &mut self.cluster.ctas[cta].warps[4 * group..4 * group + 4] {
                    w.marks.iter_mut().for_each(|m| *m &= !DIRTY);
                }
                Ok(())
            }
            WgmmaOp::Commit => {
                let wg = &mut self.cluster.ctas[cta].warpgroups[group];
                let open = std::mem::take(&mut wg.open);
                wg.groups.push_back(open);
                Ok(())
            }
            WgmmaOp::Wait(left) => {
                while self.cluster.ctas[cta].warpgroups[group].groups.len() > *left {
                    let jobs = self.cluster.ctas[cta].warpgroups[group].groups.pop_front().unwrap_or_default();
                    for job in jobs {
                        self.compute(group, &job);
                    }
                }
                self.remark(group);
                Ok(())
            }
            WgmmaOp::Mma(mma) => self.issue(group, pc, mma),
        }
    }

    fn issue(&mut self, group: usize, pc: usize, m: &WgmmaMma) -> Result<(), String> {
        let cta = self.cta;
        let name = |r: u32| &self.func.regs[r as usize].name;
        let warps = &self.cluster.ctas[cta].warps[4 * group..4 * group + 4];
        let common = |s| -> Result<u64, String> {
            let first = self.uniform(&warps[0], s, u32::MAX)?;
            for w in &warps[1..] {
                if self.uniform(w, s, u32::MAX)? != first {
                    return Err("warps give different descriptors".to_owned());
                }
            }
            Ok(first)
        };
        for w in warps {
            for r in &m.d {
                let mark = w.marks[*r as usize];
                if mark & DIRTY != 0 && mark & ACCUMULATOR == 0 {
                    return Err(format!("accumulator {} was accessed and no wgmma.fence followed", name(*r)));
                }
            }
        }
        let b = chunks(common(m.b)?, m.n, m.k, m.tb.bits() as usize / 8, m.trans_b)?;
        let a = match &m.a {
            OperandA::Shared(s) => Operand::Shared(chunks(common(*s)?, 64, m.k, m.ta.bits() as usize / 8, m.trans_a)?),
            OperandA::Regs(regs) => {
                let mut all = vec![];
                for w in warps {
                    for r in regs {
                        let mark = w.marks[*r as usize];
                        if mark & ACCUMULATOR != 0 {
                            return Err(format!("{} is an accumulator of a wgmma in flight", name(*r)));
                        }
                        if mark & DIRTY != 0 {
                            return Err(format!("A register {} was written and no wgmma.fence followed", name(*r)));
                        }
                    }
                    for l in 0..32 {
                        all.push(std::array::from_fn(|j| w.regs[regs[j] as usize][l] as u32));
                    }
                }
                Operand::Regs(all)
            }
        };
        let scale_d = common(m.scale_d)? != 0;
        // All four warps read B; each reads its 16 rows of A.
        let mut clock = warps[0].clock.clone();
        warps[1..].iter().for_each(|w| clock.meet(&w.clock));
        let clocks: Vec<_> = warps.iter().map(|w| (w.actor, w.clock.clone())).collect();
        let step = self.cluster.step;
        let engine = self.cluster.engine();
        let fenced = &self.cluster.fenced;
        let shared = &mut self.cluster.ctas[cta].shared;
        for at in &b {
            let who = Agent { actor: engine + 1, lane: ENGINE_LANE, clock: &clock, step };
            shared.begin_read(*at, 16, who, fenced)?;
        }
        if let Operand::Shared(a) = &a {
            for (i, at) in a.iter().enumerate() {
                let (actor, clock) = &clocks[row_of(i, m.k, m.ta.bits() as usize / 8, m.trans_a) / 16];
                let who = Agent { actor: *actor, lane: ENGINE_LANE, clock, step };
                shared.begin_read(*at, 16, who, fenced)?;
            }
        }
        self.cluster.ctas[cta].warpgroups[group].open.push(Job { pc, a, b, scale_d });
        self.env.thread_instructions += 128;
        self.remark(group);
        Ok(())
    }

    /// Marks exactly the registers that are in flight.
    fn remark(&mut self, group: usize) {
        let func = self.func;
        let c = &mut self.cluster.ctas[self.cta];
        for w in &mut c.warps[4 * group..4 * group + 4] {
            w.marks.iter_mut().for_each(|m| *m &= !(ACCUMULATOR | OPERAND));
            w.in_flight = 0;
            for job in c.warpgroups[group].jobs() {
                let Op::Wgmma(op) = &func.code[job.pc].op else { continue };
                let WgmmaOp::Mma(m) = &**op else { continue };
                for r in &m.d {
                    w.marks[*r as usize] |= ACCUMULATOR;
                }
                if let OperandA::Regs(regs) = &m.a {
                    for r in regs {
                        w.marks[*r as usize] |= OPERAND;
                    }
                }
                w.in_flight += 1;
            }
        }
    }

    fn compute(&mut self, group: usize, job: &Job) {
        let Op::Wgmma(op) = &self.func.code[job.pc].op else { return };
        let WgmmaOp::Mma(m) = &**op else { return };
        let step = self.cluster.step;
        let cta = &mut self.cluster.ctas[self.cta];
        let (n, k) = (m.n, m.k);
        let warps = &mut cta.warps[4 * group..4 * group + 4];
        let by = |w: &crate::state::Warp| (w.actor, w.clock.clone());
        let clocks: Vec<_> = warps.iter().map(by).collect();
        let agent = |w: usize| Agent { actor: clocks[w].0, lane: ENGINE_LANE, clock: &clocks[w].1, step };
        for (i, at) in job.b.iter().enumerate() {
            // Parts of B stand for different warps, so that the release of each of them is needed.
            cta.shared.end_read(*at, 16, agent(i % 4));
        }
        let size = m.ta.bits() as usize / 8;
        let a = match &job.a {
            Operand::Shared(a) => {
                for (i, at) in a.iter().enumerate() {
                    cta.shared.end_read(*at, 16, agent(row_of(i, k, size, m.trans_a) / 16));
                }
                matrix(&cta.shared.bytes, a, 64, k, m.ta, m.trans_a)
            }
            Operand::Regs(all) => {
                let per = 4 / size;
                let mut out = vec![0.0; 64 * k];
                for (t, regs) in all.iter().enumerate() {
                    for (j, x) in regs.iter().enumerate() {
                        for e in 0..per {
                            let row = 16 * (t / 32) + t % 32 / 4 + 8 * (j % 2);
                            let col = per * (t % 4) + 4 * per * (j / 2) + e;
                            let bits = u64::from(*x) >> (8 * size * e) & (u64::MAX >> (64 - 8 * size));
                            out[row * k + col] = decode(bits, m.ta) as f32;
                        }
                    }
                }
                out
            }
        };
        let b = matrix(&cta.shared.bytes, &job.b, n, k, m.tb, m.trans_b);
        let sign = m.sign_a * m.sign_b;
        let mut bt = vec![0.0; k * n];
        for (i, x) in b.iter().enumerate() {
            bt[i % k * n + i / k] = x * sign;
        }
        let mut row_sum = vec![0f32; n];
        for row in 0..64 {
            let w = &mut warps[row / 16];
            let (lane, high) = (row % 8 * 4, row % 16 / 8);
            // Registers of this row: 4 i + 2 high + {0, 1}, in lanes of 4.
            let place = |col: usize| (m.d[4 * (col / 8) + 2 * high + col % 2] as usize, lane + col % 8 / 2);
            for (col, s) in row_sum.iter_mut().enumerate() {
                let (r, l) = place(col);
                *s = if job.scale_d { f32::from_bits(w.regs[r][l] as u32) } else { 0.0 };
            }
            let short = self.env.fp8_sum_bits.filter(|_| m.ta.bits() == 8);
            if let Some(bits) = short {
                for (col, s) in row_sum.iter_mut().enumerate() {
                    let products = (0..k).map(|kk| a[row * k + kk] * bt[kk * n + col]);
                    *s = short_sum(std::iter::once(*s).chain(products), bits);
                }
            }
            for kk in 0..if short.is_some() { 0 } else { k } {
                let x = a[row * k + kk];
                for (s, y) in row_sum.iter_mut().zip(&bt[kk * n..(kk + 1) * n]) {
                    *s += x * y;
                }
            }
            for (col, s) in row_sum.iter().enumerate() {
                let (r, l) = place(col);
                w.regs[r][l] = bits32(*s);
            }
        }
        for w in warps {
            for r in &m.d {
                w.marks[*r as usize] |= DIRTY;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::short_sum;

    #[test]
    fn a_short_sum_loses_what_is_below_the_largest_ones_bits() {
        let bit = |n: i32| 2f32.powi(-n);
        let sum = |addends: &[f32]| short_sum(addends.iter().copied(), 13);
        assert_eq!(sum(&[1.0, bit(13), bit(14)]), 1.0 + bit(13));
        // Each addend is truncated towards zero before the sum.
        assert_eq!(sum(&[1.0, bit(14), bit(14), bit(14)]), 1.0);
        assert_eq!(sum(&[-1.5, -bit(13) - bit(14)]), -1.5 - bit(13));
        // Whose bits count is the largest, not the first.
        assert_eq!(sum(&[bit(13), 2.0]), 2.0);
        assert_eq!(sum(&[0.0, 0.0]), 0.0);
        assert!(sum(&[f32::NAN, 1.0]).is_nan() && sum(&[f32::INFINITY, 1.0]).is_infinite());
    }
}
