//! `ldmatrix`, `stmatrix` and `mma.sync`.

use crate::{
    exec::Cx,
    inst::{Addr, Lanes, Reg, Src, Ty},
    num::decode,
    state::Warp,
};

/// Lane and half of a register that hold element (row, column) of an 8 x 8 matrix.
fn element(lane: usize, half: usize, trans: bool) -> (usize, usize) {
    let (outer, inner) = (lane / 4, 2 * (lane % 4) + half);
    if trans { (inner, outer) } else { (outer, inner) }
}

impl Cx<'_, '_, '_> {
    /// Shared addresses of the 8 rows of each matrix.
    fn rows(&self, w: &Warp, addr: Addr, n: usize) -> Result<Vec<(usize, usize)>, String> {
        let a = self.addresses(w, addr);
        (0..8 * n)
            .map(|l| {
                if !a[l].is_multiple_of(16) {
                    return Err(format!("row address {:#x} of lane {l} is misaligned for 16 bytes", a[l]));
                }
                self.cluster.resolve(self.cta, a[l])
            })
            .collect()
    }

    pub(super) fn ldmatrix(&mut self, w: &mut Warp, trans: bool, d: &[Reg], addr: Addr) -> Result<(), String> {
        let rows = self.rows(w, addr, d.len())?;
        let step = self.cluster.step;
        for (j, d) in d.iter().enumerate() {
            let mut matrix = [[0u64; 8]; 8];
            for (row, out) in rows[8 * j..8 * j + 8].iter().zip(&mut matrix) {
                let shared = &mut self.cluster.ctas[row.0].shared;
                shared.check_read(row.1, 16, w.agent(usize::from(u8::MAX), step), false)?;
                for (k, x) in out.iter_mut().enumerate() {
                    let at = row.1 + 2 * k;
                    *x = u64::from(u16::from_le_bytes([shared.bytes[at], shared.bytes[at + 1]]));
                }
            }
            let mut out: Lanes = [0; 32];
            for (l, x) in out.iter_mut().enumerate() {
                for half in 0..2 {
                    let (r, c) = element(l, half, trans);
                    *x |= matrix[r][c] << (16 * half);
                }
            }
            w.set(*d, w.exist, &out);
        }
        Ok(())
    }

    pub(super) fn stmatrix(&mut self, w: &mut Warp, trans: bool, s: &[Src], addr: Addr) -> Result<(), String> {
        let rows = self.rows(w, addr, s.len())?;
        let step = self.cluster.step;
        self.env.effects += 1;
        for (j, s) in s.iter().enumerate() {
            let v = self.values(w, *s);
            for (l, x) in v.iter().enumerate() {
                for half in 0..2 {
                    let (r, c) = element(l, half, trans);
                    let (cta, at) = rows[8 * j + r];
                    let data = ((x >> (16 * half)) as u16).to_le_bytes();
                    self.cluster.ctas[cta].shared.store(at + 2 * c, &data, w.agent(l, step), false)?;
                }
            }
        }
        Ok(())
    }

    /// D = A B + C with A 16 x k by rows and B k x 8 by columns, accumulated in f32.
    #[expect(clippy::too_many_arguments, reason = "the operands of the instruction")]
    pub(super) fn mma_sync(
        &mut self,
        w: &mut Warp,
        k: usize,
        (ta, tb): (Ty, Ty),
        d: &[Reg],
        a: &[Src],
        b: &[Src],
        c: &[Src],
    ) {
        let bits = ta.bits() as usize;
        let per = 32 / bits;
        let mut am = vec![[0f32; 32]; 16];
        let mut bm = vec![[0f32; 32]; 8];
        let low = |x: u64, i: usize| x >> (bits * i) & (u64::MAX >> (64 - bits));
        for (j, s) in a.iter().enumerate() {
            let v = self.values(w, *s);
            for (l, x) in v.iter().enumerate() {
                for i in 0..per {
                    // Registers alternate between rows r and r + 8, then between halves of k.
                    let (row, col) = (l / 4 + 8 * (j % 2), per * (l % 4) + i + 4 * per * (j / 2));
                    am[row][col] = decode(low(*x, i), ta) as f32;
                }
            }
        }
        for (j, s) in b.iter().enumerate() {
            let v = self.values(w, *s);
            for (l, x) in v.iter().enumerate() {
                for i in 0..per {
                    bm[l / 4][per * (l % 4) + i + 4 * per * j] = decode(low(*x, i), tb) as f32;
                }
            }
        }
        let outs: Vec<Lanes> = c
            .iter()
            .enumerate()
            .map(|(j, s)| {
                let old = self.values(w, *s);
                std::array::from_fn(|l| {
                    let (row, col) = (l / 4 + 8 * (j / 2), 2 * (l % 4) + j % 2);
                    let sum = (0..k).fold(f32::from_bits(old[l] as u32), |s, i| s + am[row][i] * bm[col][i]);
                    crate::num::bits32(sum)
                })
            })
            .collect();
        for (d, out) in d.iter().zip(&outs) {
            w.set(*d, w.exist, out);
        }
    }
}
