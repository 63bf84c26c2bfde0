//! Executes one instruction for the lanes of a mask.

mod alu;
mod atomics;
mod cvt;
mod float;
mod memory;
pub(crate) mod step;

use crate::{
    inst::{Addr, Lanes, Op, Special, Src},
    state::{Cluster, Env, Warp, lanes},
};

static ZERO: Lanes = [0; 32];

/// Where values come from while a warp is out of its CTA.
pub(crate) struct Cx<'c, 'e, 'f> {
    pub env: &'c mut Env<'e>,
    pub cluster: &'c mut Cluster,
    /// CTA within the cluster.
    pub cta: usize,
    pub func: &'f crate::decode::Func,
}

impl Cx<'_, '_, '_> {
    /// Values of a source for each lane.
    pub(crate) fn value<'a>(&self, w: &'a Warp, s: Src, buffer: &'a mut Lanes) -> &'a Lanes {
        match s {
            Src::Reg(r) => &w.regs[r as usize],
            Src::Imm(0) => &ZERO,
            Src::Imm(x) => {
                *buffer = [x; 32];
                buffer
            }
            Src::Not(r) => {
                for (b, x) in buffer.iter_mut().zip(&w.regs[r as usize]) {
                    *b = x ^ 1;
                }
                buffer
            }
            Src::Special(sp) => {
                *buffer = self.special(w, sp);
                buffer
            }
        }
    }

    /// As [`Self::value`], a copy.
    pub(crate) fn values(&self, w: &Warp, s: Src) -> Lanes {
        let mut buffer = [0; 32];
        *self.value(w, s, &mut buffer)
    }

    /// The value of the first lane of a mask; an error if the lanes differ.
    pub(crate) fn uniform(&self, w: &Warp, s: Src, mask: u32) -> Result<u64, String> {
        let v = self.values(w, s);
        let first = v[mask.trailing_zeros().min(31) as usize];
        if lanes(mask).all(|l| v[l] == first) { Ok(first) } else { Err("lanes give different values".to_owned()) }
    }

    /// Addresses of each lane.
    pub(crate) fn addresses(&self, w: &Warp, a: Addr) -> Lanes {
        let mut v = self.values(w, a.base);
        for x in &mut v {
            *x = x.wrapping_add(a.offset as u64);
        }
        v
    }

    fn special(&self, w: &Warp, s: Special) -> Lanes {
        let cta = &self.cluster.ctas[self.cta];
        let (grid, block, shape) = (self.env.grid, self.env.block, self.func.cluster);
        let all = |x: u64| [x; 32];
        let each = |f: &dyn Fn(u32) -> u64| std::array::from_fn(|l| f(l as u32));
        let m32 = |x: u64| x & 0xffff_ffff;
        match s {
            Special::Tid(axis) => each(&|l| {
                let t = w.index as u32 * 32 + l;
                u64::from(match axis {
                    0 => t % block[0],
                    1 => t / block[0] % block[1],
                    _ => t / block[0] / block[1],
                })
            }),
            Special::Ntid(a) => all(block[a as usize].into()),
            Special::Ctaid(a) => all(cta.id[a as usize].into()),
            Special::Nctaid(a) => all(grid[a as usize].into()),
            Special::ClusterId(a) => all((cta.id[a as usize] / shape[a as usize]).into()),
            Special::Nclusterid(a) => all((grid[a as usize] / shape[a as usize]).into()),
            Special::ClusterCtaid(a) => all((cta.id[a as usize] % shape[a as usize]).into()),
            Special::ClusterNctaid(a) => all(shape[a as usize].into()),
            Special::ClusterCtarank => all(cta.rank as u64),
            Special::ClusterNctarank => all(self.cluster.ctas.len() as u64),
            Special::Laneid => each(&u64::from),
            Special::Warpid => all(w.index as u64),
            Special::Nwarpid => all(cta.warps.len() as u64),
            Special::Smid => all((cta.id[0] % 132).into()),
            Special::Nsmid => all(132),
            Special::LanemaskEq => each(&|l| 1 << l),
            Special::LanemaskLt => each(&|l| (1 << l) - 1),
            Special::LanemaskLe => each(&|l| (2 << l) - 1),
            Special::LanemaskGt => each(&|l| m32(!((2 << l) - 1))),
            Special::LanemaskGe => each(&|l| m32(!((1 << l) - 1))),
            Special::Clock | Special::Globaltimer => all(u64::from(self.cluster.step)),
            Special::DynamicSmemSize => all(self.env.dynamic_bytes.into()),
            Special::TotalSmemSize => all(cta.shared.bytes.len() as u64),
        }
    }

    /// An instruction that neither blocks nor jumps.
    pub(crate) fn exec(&mut self, w: &mut Warp, mask: u32, op: &Op) -> Result<(), String> {
        match op {
            Op::Nop => Ok(()),
            Op::Trap => Err("trap executed".to_owned()),
            Op::Alu { op, d, s } => self.alu(w, mask, *op, *d, s),
            Op::Setp(op) => {
                self.setp(w, mask, op);
                Ok(())
            }
            Op::Cvt(op) => {
                self.cvt(w, mask, op);
                Ok(())
            }
            Op::Pack { d, bits, s } => {
                let mut out = [0; 32];
                for (i, s) in s.iter().enumerate() {
                    let v = self.values(w, *s);
                    for l in 0..32 {
                        out[l] |= (v[l] & (u64::MAX >> (64 - bits))) << (*bits as usize * i);
                    }
                }
                w.set(*d, mask, &out);
                Ok(())
            }
            Op::Unpack { d, bits, a } => {
                let v = self.values(w, *a);
                for (i, d) in d.iter().enumerate() {
                    if let Some(d) = d {
                        let out = v.map(|x| x >> (*bits as usize * i) & (u64::MAX >> (64 - bits)));
                        w.set(*d, mask, &out);
                    }
                }
                Ok(())
            }
            Op::Pack128 { d, s } => {
                for (i, s) in s.iter().enumerate() {
                    let v = self.values(w, *s);
                    w.set(*d + i as u32, mask, &v);
                }
                Ok(())
            }
            Op::Unpack128 { d, a } => {
                let halves = [w.regs[*a as usize], w.regs[*a as usize + 1]];
                for (d, v) in d.iter().zip(halves) {
                    if let Some(d) = d {
                        w.set(*d, mask, &v);
                    }
                }
                Ok(())
            }
            Op::Ld(op) => self.load(w, mask, op),
            Op::St(op) => self.store(w, mask, op),
            Op::Atomic(op) => self.atomic(w, mask, op),
            Op::Cvta { space, to, d, a } => {
                let base = memory::window_of(*space);
                let v = self.values(w, *a);
                w.set(*d, mask, &v.map(|x| if *to { x.wrapping_sub(base) } else { x.wrapping_add(base) }));
                Ok(())
            }
            Op::Isspacep { space, d, a } => {
                let v = self.values(w, *a);
                w.set(*d, mask, &v.map(|x| u64::from(memory::space_of(x) == Some(*space))));
                Ok(())
            }
            Op::Mapa { d, a, rank, generic } => self.mapa(w, mask, *d, *a, *rank, *generic),
            Op::Fence { gpu } => {
                if *gpu {
                    self.fence_grid();
                }
                Ok(())
            }
            Op::FenceAsync => {
                let step = self.cluster.step;
                for l in lanes(mask) {
                    self.cluster.fenced[w.actor * 32 + l] = step;
                }
                self.fence_mbarriers(w, mask);
                Ok(())
            }
            Op::FenceMbarrierInit => {
                self.fence_mbarriers(w, mask);
                Ok(())
            }
            Op::CpAsync(op) => self.cp_async(w, mask, op),
            Op::Bulk(op) => self.bulk(w, mask, op),
            // The scheduler executes these.
            Op::Exit
            | Op::Bra(_)
            | Op::Collective(_)
            | Op::Bar(_)
            | Op::ClusterBar { .. }
            | Op::Mbar(_)
            | Op::Wgmma(_) => Err("instruction is out of place".to_owned()),
        }
    }
}

/// What an atomic or a reduction without `cas` makes of two values.
pub(crate) fn combine(op: crate::inst::AtomOp, ty: crate::inst::Ty, x: u64, y: u64) -> u64 {
    atomics::combine(op, ty, x, y, 0)
}
