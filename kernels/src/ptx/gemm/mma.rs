//! C_mn = A_mk B_kn (+ bias), or D_mn + A_mk B_kn, in bf16 with f32 sums on the tensor cores of Ampere and later; dense and grouped.
//!
//! Signature: as in [`super::schedule`], a and b addresses. Needs sm_80 (mma.sync, ldmatrix, cp.async).
//!
//! A block makes a tile of `bm` x `bn`, a warp one of `wm` x `wn`, from `stages` buffers of [`BK`] elements of k. Tiles lie in
//! shared memory as in global memory, in pieces of 16 bytes:
//! - contiguous along k: a row of 64 bytes for each m or n; piece c of row r at place `c ^ (r / 2 % 4)`
//! - contiguous along m or n: a row for each k; piece c of row r at place `c ^ (r % 8)`; `ldmatrix.trans` turns it
//!
//! so that eight rows of an ldmatrix meet no bank twice. A thread copies by cp.async of 16 bytes (zeros for pieces outside); an
//! operand whose rows are not whole pieces goes through registers, element by element.
//!
//! Pipeline: a thread commits one group of copies a tile, so that `wait_group stages - 2` says that its part of the next tile has
//! come; the barrier after it says so of all threads, and that all have read the tile before, whose buffer the copies issued
//! next fill. After the last tile the buffers become the tile of sums of [`super::output`].
//!
//! Bound by tensor cores: 2 m n k FLOPs (A100: 312 TFLOP/s); a block reads `bm + bn` elements for `bm bn` products.

use super::{
    super::{
        Arch, Kernel, Launch, VERSION,
        asm::{Assembler, B32, B64, F32, Pred, Reg, vector},
    },
    output,
    problem::{Kind, Problem, Spec},
    schedule::{Finder, Params},
};
use crate::ptx;

/// Sizes of a block's and of a warp's part.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Tile {
    bm: u32,
    bn: u32,
    wm: u32,
    wn: u32,
    stages: u32,
}

/// For many tiles.
pub(super) const LARGE: Tile = Tile { bm: 128, bn: 128, wm: 64, wn: 32, stages: 4 };
/// For few.
pub(super) const SMALL: Tile = Tile { bm: 64, bn: 64, wm: 32, wn: 32, stages: 4 };
/// Elements of k in a tile.
const BK: u32 = 32;

impl Tile {
    pub(super) fn name(self) -> String {
        format!("{}x{}_s{}", self.bm, self.bn, self.stages)
    }

    fn threads(self) -> u32 {
        (self.bm / self.wm) * (self.bn / self.wn) * 32
    }

    fn stage_bytes(self) -> u32 {
        (self.bm + self.bn) * BK * 2
    }

    fn shared_bytes(self) -> u32 {
        (self.stage_bytes() * self.stages).max(output::tile_bytes(self.bm, self.bn))
    }
}

/// Large tiles where they are many.
pub(super) fn choose(problem: &Problem) -> Tile {
    if problem.has_many(LARGE.bm, LARGE.bn) { LARGE } else { SMALL }
}

/// One block a tile. The grid is not persistent, as wgmma's is: what a communication stream launches has priority, and its blocks are
/// the next wherever one of these ends, so that it waits for one tile (0.2 ms at k = 7168 of an A100's peak), not for the product.
pub(super) fn launch(problem: &Problem, tile: Tile) -> Launch {
    problem.launch(kernel(problem.spec(), tile), tile.bm, tile.bn)
}

/// The kernel of a spec.
pub(super) fn kernel(spec: Spec, tile: Tile) -> Kernel {
    let name = format!("gemm_mma_{}_{}", spec.name(), tile.name());
    let emit = {
        let name = name.clone();
        move || emit(&name, &spec, tile)
    };
    Kernel {
        name,
        arch: Arch::Sm80,
        block: tile.threads(),
        shared_bytes: tile.shared_bytes(),
        any_grid: false,
        emit: Box::new(emit),
    }
}

/// Eight elements that a thread copies to each stage.
struct Piece {
    from: Reg<B64>,
    /// Bytes from the operand's part of a stage.
    to: Reg<B32>,
    /// Its element of k in the tile.
    k: Reg<B32>,
    /// Whether it is within the matrix, along the other axis: one, or one for each element.
    inside: Vec<Reg<Pred>>,
}

/// One operand's way to shared memory and to fragments.
struct Side {
    k_major: bool,
    wide: bool,
    /// Rows or columns of the tile.
    extent: u32,
    pieces: Vec<Piece>,
    /// Bytes from one tile of k to the next.
    step: Reg<B64>,
}

/// Bytes of a row in shared memory.
fn pitch(k_major: bool, extent: u32) -> u32 {
    if k_major { BK * 2 } else { extent * 2 }
}

/// An operand in global memory as a block sees it.
struct Operand {
    k_major: bool,
    wide: bool,
    base: Reg<B64>,
    stride: Reg<B32>,
    /// The group's first row or column, where it is not 0.
    origin: Option<Reg<B32>>,
    /// The tile's first in the group, and where the group ends.
    first: Reg<B32>,
    end: Reg<B32>,
}

impl Side {
    fn new(
        k: &mut Assembler,
        operand: &Operand,
        first_k: Reg<B32>,
        (extent, threads): (u32, u32),
        tid: Reg<B32>,
    ) -> Self {
        let Operand { k_major, wide, base, stride, origin, first, end } = *operand;
        let per_row = pitch(k_major, extent) / 16;
        let step = k.reg::<B64>();
        if k_major {
            ptx!(k, "mov.u64 {step}, {};", BK * 2);
        } else {
            ptx!(k, "mul.wide.u32 {step}, {stride}, {};", BK * 2);
        }
        let mut pieces = Vec::new();
        for j in 0..extent * BK / 8 / threads {
            let [index, row, col, to, outer] = [(); 5].map(|()| k.reg::<B32>());
            let from = k.reg::<B64>();
            ptx!(k, "add.u32 {index}, {tid}, {};", j * threads);
            ptx!(k, "div.u32 {row}, {index}, {per_row};");
            ptx!(k, "rem.u32 {col}, {index}, {per_row};");
            if k_major {
                ptx!(k, "shr.u32 {to}, {row}, 1;");
                ptx!(k, "and.b32 {to}, {to}, 3;");
            } else {
                ptx!(k, "and.b32 {to}, {row}, 7;");
            }
            ptx!(k, "xor.b32 {to}, {to}, {col};");
            ptx!(k, "shl.b32 {to}, {to}, 4;");
            ptx!(k, "mad.lo.u32 {to}, {row}, {}, {to};", pitch(k_major, extent));
            ptx!(k, "shl.b32 {col}, {col}, 3;");
            let (outer_in_tile, inner) = if k_major { (row, col) } else { (col, row) };
            ptx!(k, "add.u32 {outer}, {first}, {outer_in_tile};");
            let inside = (0..if k_major || wide { 1 } else { 8 })
                .map(|e| {
                    let (inside, at) = (k.reg::<Pred>(), k.reg::<B32>());
                    ptx!(k, "add.u32 {at}, {outer}, {e};");
                    ptx!(k, "setp.lt.u32 {inside}, {at}, {end};");
                    inside
                })
                .collect();
            if let Some(origin) = origin {
                ptx!(k, "add.u32 {outer}, {outer}, {origin};");
            }
            let at_k = k.reg::<B32>();
            ptx!(k, "add.u32 {at_k}, {first_k}, {inner};");
            let (row, col) = if k_major { (outer, at_k) } else { (at_k, outer) };
            ptx!(k, "mul.wide.u32 {from}, {row}, {stride};");
            ptx!(k, "shl.b64 {from}, {from}, 1;");
            ptx!(k, "mad.wide.u32 {from}, {col}, 2, {from};");
            ptx!(k, "add.u64 {from}, {from}, {base};");
            pieces.push(Piece { from, to, k: inner, inside });
        }
        Side { k_major, wide, extent, pieces, step }
    }

    /// Starts the copies to the stage's part at `base`, of which `left` elements of k are in the group, and goes on to the next.
    fn copy(&self, k: &mut Assembler, base: Reg<B32>, offset: u32, left: Reg<B32>) {
        for Piece { from, to, k: inner, inside } in &self.pieces {
            let (q, at) = (k.reg::<Pred>(), k.reg::<B32>());
            ptx!(k, "add.u32 {at}, {base}, {to};");
            ptx!(k, "setp.lt.u32 {q}, {inner}, {left};");
            if self.wide {
                let bytes = k.reg::<B32>();
                ptx!(k, "and.pred {q}, {q}, {};", inside[0]);
                ptx!(k, "selp.u32 {bytes}, 16, 0, {q};");
                ptx!(k, "cp.async.cg.shared.global [{at}+{offset}], [{from}], 16, {bytes};");
            } else {
                self.copy_elements(k, (*from, at, offset), *inner, inside, left);
            }
            ptx!(k, "add.u64 {from}, {from}, {};", self.step);
        }
    }

    /// By registers, element by element.
    fn copy_elements(
        &self,
        k: &mut Assembler,
        (from, to, offset): (Reg<B64>, Reg<B32>, u32),
        inner: Reg<B32>,
        inside: &[Reg<Pred>],
        left: Reg<B32>,
    ) {
        let (xs, words) = (k.regs::<B32>(8), k.regs::<B32>(4));
        for (e, x) in xs.iter().enumerate() {
            let (q, at) = (k.reg::<Pred>(), k.reg::<B32>());
            ptx!(k, "mov.b32 {x}, 0;");
            ptx!(k, "add.u32 {at}, {inner}, {};", if self.k_major { e } else { 0 });
            ptx!(k, "setp.lt.u32 {q}, {at}, {left};");
            ptx!(k, "and.pred {q}, {q}, {};", inside[if self.k_major { 0 } else { e }]);
            ptx!(k, "@{q} ld.global.u16 {x}, [{from}+{}];", 2 * e);
        }
        for (word, pair) in words.iter().zip(xs.chunks_exact(2)) {
            ptx!(k, "shl.b32 {word}, {}, 16;", pair[1]);
            ptx!(k, "or.b32 {word}, {word}, {};", pair[0]);
        }
        ptx!(k, "st.shared.v4.b32 [{to}+{offset}], {};", vector(&words));
    }

    /// Where a lane reads its row of four 8 x 8 matrices, for each 16 of the `width` rows or columns from `origin` on and each 16
    /// of k: a register, and bytes after it. `second_is_k` says which of the two axes the second matrix is along.
    fn rows_of_matrices(
        &self,
        k: &mut Assembler,
        lane: Reg<B32>,
        origin: Reg<B32>,
        width: u32,
        second_is_k: bool,
    ) -> Vec<Vec<(Reg<B32>, u32)>> {
        let pitch = pitch(self.k_major, self.extent);
        let [row, second, third] = [(); 3].map(|()| k.reg::<B32>());
        ptx!(k, "and.b32 {row}, {lane}, 7;");
        ptx!(k, "shr.u32 {second}, {lane}, 3;");
        ptx!(k, "and.b32 {second}, {second}, 1;");
        ptx!(k, "shr.u32 {third}, {lane}, 4;");
        let (along_k, across) = if second_is_k { (second, third) } else { (third, second) };
        let mut places: Vec<Vec<(Reg<B32>, u32)>> = vec![vec![]; (width / 16) as usize];
        if self.k_major {
            let (first, twist) = (k.reg::<B32>(), k.reg::<B32>());
            ptx!(k, "mad.lo.u32 {first}, {across}, 8, {row};");
            ptx!(k, "add.u32 {first}, {first}, {origin};");
            ptx!(k, "shr.u32 {twist}, {row}, 1;");
            for step in 0..BK / 16 {
                let at = k.reg::<B32>();
                ptx!(k, "add.u32 {at}, {along_k}, {};", step * 2);
                ptx!(k, "xor.b32 {at}, {at}, {twist};");
                ptx!(k, "shl.b32 {at}, {at}, 4;");
                ptx!(k, "mad.lo.u32 {at}, {first}, {pitch}, {at};");
                places.iter_mut().zip(0..).for_each(|(places, i)| places.push((at, i * 16 * pitch)));
            }
        } else {
            let (first, line) = (k.reg::<B32>(), k.reg::<B32>());
            ptx!(k, "shr.u32 {first}, {origin}, 3;");
            ptx!(k, "add.u32 {first}, {first}, {across};");
            ptx!(k, "mad.lo.u32 {line}, {along_k}, 8, {row};");
            for (i, places) in (0..).zip(&mut places) {
                let at = k.reg::<B32>();
                ptx!(k, "add.u32 {at}, {first}, {};", i * 2);
                ptx!(k, "xor.b32 {at}, {at}, {row};");
                ptx!(k, "shl.b32 {at}, {at}, 4;");
                ptx!(k, "mad.lo.u32 {at}, {line}, {pitch}, {at};");
                places.extend((0..BK / 16).map(|step| (at, step * 16 * pitch)));
            }
        }
        places
    }

    /// Reads the fragments of 16 of k.
    fn load(
        &self,
        k: &mut Assembler,
        stage: Reg<B32>,
        places: &[Vec<(Reg<B32>, u32)>],
        step: usize,
        offset: u32,
    ) -> Vec<Vec<Reg<B32>>> {
        let trans = if self.k_major { "" } else { ".trans" };
        places
            .iter()
            .map(|places| {
                let (place, bytes) = places[step];
                let (at, words) = (k.reg::<B32>(), k.regs::<B32>(4));
                ptx!(k, "add.u32 {at}, {stage}, {place};");
                let to = vector(&words);
                ptx!(k, "ldmatrix.sync.aligned.m8n8.x4{trans}.shared.b16 {to}, [{at}+{}];", bytes + offset);
                words
            })
            .collect()
    }
}

fn emit(name: &str, spec: &Spec, tile: Tile) -> String {
    let Tile { bm, bn, wm, wn, stages } = tile;
    let threads = tile.threads();
    let mut kernel = Assembler::new(name);
    let k = &mut kernel;
    k.directive(format!(".maxntid {threads}, 1, 1"));
    let shared = k.dynamic_shared(128, "shared");
    let params = Params::declare(k, spec, Assembler::pointer);
    let (tid, number, end) = (k.reg::<B32>(), k.reg::<B32>(), k.label("END"));
    ptx!(k, "mov.u32 {tid}, %tid.x;");
    ptx!(k, "mov.u32 {number}, %ctaid.x;");
    let place = Finder::new(k, spec, &params, bm, bn).find(k, &params, number, &end);

    let is_rows = matches!(spec.kind, Kind::Rows { .. });
    let a = Operand {
        k_major: spec.layout.a_k_major(),
        wide: spec.wide[0],
        base: params.a,
        stride: params.lda,
        origin: is_rows.then_some(place.first_row),
        first: place.m0,
        end: place.rows,
    };
    let b = Operand {
        k_major: spec.layout.b_k_major(),
        wide: spec.wide[1],
        base: if is_rows { params.to_group(k, params.b, place.group, 2) } else { params.b },
        stride: params.ldb,
        origin: None,
        first: place.n0,
        end: params.n,
    };
    let a = Side::new(k, &a, place.first_k, (bm, threads), tid);
    let b = Side::new(k, &b, place.first_k, (bn, threads), tid);

    let [base, lane, warp, warp_m, warp_n, left, to_copy, read, filled] = [(); 9].map(|()| k.reg::<B32>());
    ptx!(k, "mov.u32 {base}, {shared};");
    ptx!(k, "and.b32 {lane}, {tid}, 31;");
    ptx!(k, "shr.u32 {warp}, {tid}, 5;");
    ptx!(k, "div.u32 {warp_m}, {warp}, {};", bn / wn);
    ptx!(k, "rem.u32 {warp_n}, {warp}, {};", bn / wn);
    ptx!(k, "mul.lo.u32 {warp_m}, {warp_m}, {wm};");
    ptx!(k, "mul.lo.u32 {warp_n}, {warp_n}, {wn};");
    // Fragments of A: rows first, then k; of B: k first, then columns.
    let places_a = a.rows_of_matrices(k, lane, warp_m, wm, false);
    let places_b = b.rows_of_matrices(k, lane, warp_n, wn, true);
    let acc: Vec<Vec<Vec<Reg<F32>>>> =
        (0..wm / 16).map(|_| (0..wn / 8).map(|_| k.regs(4)).collect::<Vec<_>>()).collect();
    for x in acc.iter().flatten().flatten() {
        ptx!(k, "mov.f32 {x}, 0f00000000;");
    }

    let (part_b, stage_bytes) = (bm * BK * 2, tile.stage_bytes());
    let used = k.reg::<B32>();
    let copy = |k: &mut Assembler| {
        a.copy(k, filled, 0, to_copy);
        b.copy(k, filled, part_b, to_copy);
        ptx!(k, "cp.async.commit_group;");
        ptx!(k, "min.u32 {used}, {to_copy}, {BK};");
        ptx!(k, "sub.u32 {to_copy}, {to_copy}, {used};");
    };
    let (turn, multiplied, q) = (k.label("TURN"), k.label("MULTIPLIED"), k.reg::<Pred>());
    ptx!(k, "mov.u32 {left}, {};", place.inner);
    ptx!(k, "mov.u32 {to_copy}, {};", place.inner);
    ptx!(k, "mov.u32 {read}, {base};");
    ptx!(k, "mov.u32 {filled}, {base};");
    for _ in 1..stages {
        copy(k);
        ptx!(k, "add.u32 {filled}, {filled}, {stage_bytes};");
    }
    k.place(&turn);
    ptx!(k, "setp.eq.u32 {q}, {left}, 0;");
    ptx!(k, "@{q} bra {multiplied};");
    ptx!(k, "cp.async.wait_group {};", stages - 2);
    ptx!(k, "bar.sync 0;");
    copy(k);
    for step in 0..(BK / 16) as usize {
        let xs = a.load(k, read, &places_a, step, 0);
        let ys = b.load(k, read, &places_b, step, part_b);
        for (acc, x) in acc.iter().zip(&xs) {
            for (acc, y) in acc.iter().zip(ys.iter().flat_map(|y| y.chunks_exact(2))) {
                let d = vector(acc);
                let (x, y) = (vector(x), vector(y));
                ptx!(k, "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {d}, {x}, {y}, {d};");
            }
        }
    }
    for at in [read, filled] {
        let last = k.reg::<B32>();
        ptx!(k, "add.u32 {last}, {base}, {};", (stages - 1) * stage_bytes);
        ptx!(k, "setp.eq.u32 {q}, {at}, {last};");
        ptx!(k, "add.u32 {at}, {at}, {stage_bytes};");
        ptx!(k, "selp.u32 {at}, {base}, {at}, {q};");
    }
    ptx!(k, "min.u32 {used}, {left}, {BK};");
    ptx!(k, "sub.u32 {left}, {left}, {used};");
    ptx!(k, "bra {turn};");

    k.place(&multiplied);
    ptx!(k, "cp.async.wait_group 0;");
    ptx!(k, "bar.sync 0;");
    let [row, pair, granule] = [(); 3].map(|()| k.reg::<B32>());
    ptx!(k, "shr.u32 {row}, {lane}, 2;");
    ptx!(k, "add.u32 {row}, {row}, {warp_m};");
    ptx!(k, "and.b32 {pair}, {lane}, 3;");
    for j in 0..wn / 8 {
        ptx!(k, "shr.u32 {granule}, {warp_n}, 3;");
        ptx!(k, "add.u32 {granule}, {granule}, {j};");
        let at = output::pair_place(k, base, bn, row, granule, pair);
        for (i, acc) in (0..).zip(&acc) {
            for (half, pair) in (0..).zip(acc[j as usize].chunks_exact(2)) {
                ptx!(k, "st.shared.v2.f32 [{at}+{}], {};", (i * 16 + half * 8) * bn * 4, vector(pair));
            }
        }
    }
    ptx!(k, "bar.sync 0;");
    output::write(k, spec, &params, &place, (bm, bn), base, tid, threads);
    k.place(&end);
    ptx!(k, "ret;");
    kernel.finish(VERSION, Arch::Sm80.target())
}
