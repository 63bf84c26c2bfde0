//! Atomics: lanes one after the other, in an order that the seed decides.

use super::{Cx, memory::space_of};
use crate::{
    decode::window::SHARED,
    inst::{AtomOp, AtomicOp, Round, Space, Ty},
    num::{decode, encode, format, round_to},
    state::{Warp, lanes},
};

/// The new value at an address.
pub(crate) fn combine(op: AtomOp, ty: Ty, old: u64, x: u64, swap: u64) -> u64 {
    let m = ty.mask();
    let up = 64 - ty.bits().min(64);
    let sx = |x: u64| ((x << up) as i64) >> up;
    match ty {
        Ty::F32 if op == AtomOp::Add => {
            return u64::from((f32::from_bits(old as u32) + f32::from_bits(x as u32)).to_bits());
        }
        Ty::F64 if op == AtomOp::Add => return (f64::from_bits(old) + f64::from_bits(x)).to_bits(),
        Ty::F16x2 | Ty::Bf16x2 => {
            let one = if ty == Ty::F16x2 { Ty::F16 } else { Ty::Bf16 };
            return combine(op, one, old & 0xffff, x & 0xffff, 0) | combine(op, one, old >> 16, x >> 16, 0) << 16;
        }
        Ty::F16 | Ty::Bf16 if matches!(op, AtomOp::Add | AtomOp::Min | AtomOp::Max) => {
            let (a, b) = (decode(old, ty), decode(x, ty));
            let r = match op {
                AtomOp::Add => a + b,
                AtomOp::Min => a.min(b),
                _ => a.max(b),
            };
            return encode(round_to(r, format(ty), Round::Nearest), ty);
        }
        _ => {}
    }
    match op {
        AtomOp::Add => old.wrapping_add(x) & m,
        AtomOp::Min if ty.signed() => sx(old).min(sx(x)) as u64 & m,
        AtomOp::Max if ty.signed() => sx(old).max(sx(x)) as u64 & m,
        AtomOp::Min => old.min(x),
        AtomOp::Max => old.max(x),
        AtomOp::And => old & x,
        AtomOp::Or => old | x,
        AtomOp::Xor => old ^ x,
        AtomOp::Exch => x,
        AtomOp::Cas => {
            if old == x {
                swap
            } else {
                old
            }
        }
        AtomOp::Inc => {
            if old >= x {
                0
            } else {
                old + 1
            }
        }
        AtomOp::Dec => {
            if old == 0 || old > x {
                x
            } else {
                old - 1
            }
        }
    }
}

impl Cx<'_, '_, '_> {
    pub(super) fn atomic(&mut self, w: &mut Warp, mask: u32, op: &AtomicOp) -> Result<(), String> {
        let addresses = self.addresses(w, op.addr);
        let size = op.ty.bits() as usize / 8;
        let swap = op.swap.map_or([0; 32], |s| self.values(w, s));
        let start = self.env.rng.below(32) as usize;
        let mut olds = vec![[0u64; 32]; op.s.len()];
        let values: Vec<_> = op.s.iter().map(|s| self.values(w, *s)).collect();
        self.env.effects += 1;
        for l in lanes(mask.rotate_right(start as u32)).map(|l| (l + start) % 32) {
            let (mut space, mut at) = (op.space, addresses[l]);
            if space == Space::Generic {
                space = space_of(at).unwrap_or(Space::Generic);
                at = if space == Space::Shared { at - SHARED } else { at };
            }
            if !at.is_multiple_of((size * op.s.len()) as u64) {
                return Err(format!("address {at:#x} of lane {l} is misaligned for {} bytes", size * op.s.len()));
            }
            if space == Space::Global {
                self.acquire(at, op.order.acquires());
                self.release(at, op.order.releases());
            }
            for (i, v) in values.iter().enumerate() {
                let here = at + (i * size) as u64;
                let mut bytes = [0; 8];
                match space {
                    Space::Global => {
                        let grid = &self.cluster.ctas[self.cta].grid;
                        self.env.global.load(here, &mut bytes[..size], grid, true)?;
                        let old = u64::from_le_bytes(bytes);
                        let new = combine(op.op, op.ty, old, v[l], swap[l]);
                        self.env.global.store(here, &new.to_le_bytes()[..size], grid, true)?;
                        olds[i][l] = old;
                    }
                    Space::Shared => {
                        let (c, o) = self.cluster.resolve(self.cta, here)?;
                        let who = w.agent(l, self.cluster.step);
                        let shared = &mut self.cluster.ctas[c].shared;
                        let old = shared.load(o, size, who, true)?;
                        let new = combine(op.op, op.ty, old, v[l], swap[l]);
                        shared.store(o, &new.to_le_bytes()[..size], who, true)?;
                        olds[i][l] = old;
                    }
                    _ => return Err(format!("atomic at address {at:#x}, which is neither global nor shared")),
                }
            }
        }
        for (d, old) in op.d.iter().zip(&olds) {
            if let Some(d) = d {
                w.set(*d, mask, old);
            }
        }
        Ok(())
    }
}
