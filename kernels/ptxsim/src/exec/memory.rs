//! Loads, stores and fences of all state spaces.

use super::Cx;
use crate::{
    decode::window::{GLOBAL, LOCAL, PARAM, SHARED, SIZE},
    global::learn,
    inst::{MemOp, Order, Reg, Space, Src},
    state::{Warp, lanes},
};

/// Where a space's window begins.
pub(super) fn window_of(space: Space) -> u64 {
    match space {
        Space::Shared => SHARED,
        Space::Param => PARAM,
        Space::Local => LOCAL,
        // Global addresses are generic ones.
        Space::Global | Space::Generic => 0,
    }
}

/// The space of a generic address.
pub(super) fn space_of(address: u64) -> Option<Space> {
    [(GLOBAL, Space::Global), (SHARED, Space::Shared), (PARAM, Space::Param), (LOCAL, Space::Local)]
        .into_iter()
        .find_map(|(base, space)| (base..base + SIZE).contains(&address).then_some(space))
}

impl Cx<'_, '_, '_> {
    /// The space of an access and the address within it; global addresses stay as they are.
    fn place(&self, space: Space, address: u64) -> Result<(Space, u64), String> {
        match space {
            Space::Generic => match space_of(address) {
                Some(Space::Global) => Ok((Space::Global, address)),
                Some(s) => Ok((s, address - window_of(s))),
                None => Err(format!("address {address:#x} is in no space")),
            },
            Space::Param if address >= PARAM => Ok((space, address - PARAM)),
            s => Ok((s, address)),
        }
    }

    pub(super) fn load(&mut self, w: &mut Warp, mask: u32, op: &MemOp) -> Result<(), String> {
        let (n, size) = (op.d.len(), op.ty.bits() as usize / 8);
        let addresses = self.addresses(w, op.addr);
        let sync = op.order != Order::Weak;
        let up = 64 - op.ty.bits().min(64);
        let mut all = [[0u64; 32]; 4];
        for l in lanes(mask) {
            let (space, at) = self.place(op.space, addresses[l])?;
            if !at.is_multiple_of((n * size) as u64) {
                return Err(format!("address {at:#x} of lane {l} is misaligned for {} bytes", n * size));
            }
            let mut bytes = [0u8; 32];
            self.read(w, l, space, at, &mut bytes[..n * size], sync)?;
            for (i, v) in all.iter_mut().enumerate().take(n) {
                let mut x = [0; 8];
                x[..size].copy_from_slice(&bytes[i * size..][..size]);
                v[l] = u64::from_le_bytes(x);
            }
            if sync && space == Space::Global {
                self.acquire(at, op.order.acquires());
            }
        }
        for (d, v) in op.d.iter().zip(&mut all) {
            if let Some((d, bits)) = d {
                if op.ty.signed() {
                    for x in v.iter_mut() {
                        *x = (((*x << up) as i64) >> up) as u64 & (u64::MAX >> (64 - bits));
                    }
                }
                w.set(*d, mask, v);
            }
        }
        Ok(())
    }

    /// Bytes of one lane's access.
    fn read(&mut self, w: &Warp, l: usize, space: Space, at: u64, into: &mut [u8], sync: bool) -> Result<(), String> {
        match space {
            Space::Global => {
                let grid = &self.cluster.ctas[self.cta].grid;
                self.env.global.load(at, into, grid, sync)
            }
            Space::Shared => {
                let (c, o) = self.cluster.resolve(self.cta, at)?;
                let who = w.agent(l, self.cluster.step);
                let shared = &mut self.cluster.ctas[c].shared;
                shared.check_read(o, into.len(), who, sync)?;
                into.copy_from_slice(&shared.bytes[o..o + into.len()]);
                Ok(())
            }
            Space::Param => match self.env.params.get(at as usize..(at as usize).saturating_add(into.len())) {
                Some(p) => {
                    into.copy_from_slice(p);
                    Ok(())
                }
                None => Err(format!("parameter address {at:#x} is out of bounds")),
            },
            _ => {
                let bytes = self.func.local_bytes;
                if (at as usize).saturating_add(into.len()) > bytes {
                    return Err(format!("local address {at:#x} is out of bounds"));
                }
                into.copy_from_slice(&w.local[l * bytes + at as usize..][..into.len()]);
                Ok(())
            }
        }
    }

    pub(super) fn store(&mut self, w: &mut Warp, mask: u32, op: &MemOp) -> Result<(), String> {
        let (n, size) = (op.s.len(), op.ty.bits() as usize / 8);
        let addresses = self.addresses(w, op.addr);
        let sync = op.order != Order::Weak;
        let mut all = [[0u64; 32]; 4];
        for (v, s) in all.iter_mut().zip(&op.s) {
            *v = self.values(w, *s);
        }
        self.env.effects += 1;
        for l in lanes(mask) {
            let (space, at) = self.place(op.space, addresses[l])?;
            if !at.is_multiple_of((n * size) as u64) {
                return Err(format!("address {at:#x} of lane {l} is misaligned for {} bytes", n * size));
            }
            let mut bytes = [0u8; 32];
            for (i, v) in all.iter().enumerate().take(n) {
                bytes[i * size..][..size].copy_from_slice(&v[l].to_le_bytes()[..size]);
            }
            let data = &bytes[..n * size];
            match space {
                Space::Global => {
                    if sync {
                        self.release(at, op.order.releases());
                    }
                    let grid = &self.cluster.ctas[self.cta].grid;
                    self.env.global.store(at, data, grid, sync)?;
                }
                Space::Shared => {
                    let (c, o) = self.cluster.resolve(self.cta, at)?;
                    let who = w.agent(l, self.cluster.step);
                    self.cluster.ctas[c].shared.store(o, data, who, sync)?;
                }
                Space::Local => {
                    let all = self.func.local_bytes;
                    if (at as usize).saturating_add(data.len()) > all {
                        return Err(format!("local address {at:#x} is out of bounds"));
                    }
                    w.local[l * all + at as usize..][..data.len()].copy_from_slice(data);
                }
                _ => return Err(format!("store to parameter address {at:#x}")),
            }
        }
        Ok(())
    }

    pub(super) fn mapa(
        &mut self,
        w: &mut Warp,
        mask: u32,
        d: Reg,
        a: Src,
        rank: Src,
        generic: bool,
    ) -> Result<(), String> {
        let (a, rank) = (self.values(w, a), self.values(w, rank));
        let mut out = [0; 32];
        for l in lanes(mask) {
            if rank[l] as usize >= self.cluster.ctas.len() {
                return Err(format!("rank {} in a cluster of {}", rank[l], self.cluster.ctas.len()));
            }
            let (_, o) = self.cluster.resolve(self.cta, a[l])?;
            out[l] = (rank[l] + 1) << 24 | o as u64 | if generic { SHARED } else { 0 };
        }
        w.set(d, mask, &out);
        Ok(())
    }

    /// What a fence makes known, and ready to be told.
    pub(super) fn fence_grid(&mut self) {
        let grid = &mut self.cluster.ctas[self.cta].grid;
        let pending = std::mem::take(&mut grid.pending);
        learn(&mut grid.seen, &pending);
        grid.fenced = Some(grid.told());
        grid.now = grid.now.saturating_add(1);
    }

    /// A read that synchronises has seen what was told at this address.
    pub(super) fn acquire(&mut self, at: u64, acquires: bool) {
        let grid = &mut self.cluster.ctas[self.cta].grid;
        if let Some(told) = self.env.told.get(&at) {
            learn(if acquires { &mut grid.seen } else { &mut grid.pending }, told);
        }
    }

    /// A write that synchronises tells at this address.
    pub(super) fn release(&mut self, at: u64, releases: bool) {
        if !self.env.global.watch {
            return;
        }
        let grid = &mut self.cluster.ctas[self.cta].grid;
        let told = if releases {
            let told = grid.told();
            grid.now = grid.now.saturating_add(1);
            Some(told)
        } else {
            grid.fenced.clone()
        };
        if let Some(told) = told {
            learn(self.env.told.entry(at).or_default(), &told);
        }
    }
}
