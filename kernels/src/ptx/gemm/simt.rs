//! C_mn = A_mk B_kn (+ bias), or D_mn + A_mk B_kn, in f32 on ordinary cores; dense and grouped.
//!
//! Signature: as in [`super::schedule`], a and b addresses. Needs sm_80.
//!
//! A block makes a tile of `bm` x `bn`, a thread `tm` x `tn` of it, in pieces of 4 x 4 that lie `bm / (tm / 4)` rows and
//! `bn / (tn / 4)` columns apart, so that a warp's reads of shared memory (16 bytes a thread) meet no bank twice. Tiles of A and B lie
//! along k in shared memory, `[bk][bm]` and `[bk][bn]`; an operand that is contiguous along k is turned on its way, in rows four
//! floats longer.
//!
//! Two buffers: while a tile of k is multiplied, the next is on its way to registers; it is stored to the other buffer after
//! that. One barrier a tile: it separates the stores to a buffer from its reads, and the reads of a buffer from the stores two
//! barriers later.
//!
//! Bound by FFMA: 2 m n k FLOPs at 64 FFMA a clock and SM quarter; shared memory gives `tm tn / (tm + tn)` FFMA a float (4 at
//! 8 x 8), of 2 needed.

use super::{
    super::{
        Arch, Kernel, Launch, VERSION,
        asm::{Assembler, B32, B64, F32, Pred, Reg, vector},
    },
    problem::{Kind, Problem, Spec},
    schedule::{Finder, Params, Place},
};
use crate::ptx;

/// Sizes of a block's and of a thread's part.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Tile {
    bm: u32,
    bn: u32,
    tm: u32,
    tn: u32,
}

/// For many tiles.
pub(super) const LARGE: Tile = Tile { bm: 128, bn: 64, tm: 8, tn: 8 };
/// For few.
pub(super) const SMALL: Tile = Tile { bm: 64, bn: 64, tm: 8, tn: 4 };
/// Elements of k in a tile.
const BK: u32 = 16;

impl Tile {
    pub(super) fn name(self) -> String {
        format!("{}x{}", self.bm, self.bn)
    }

    fn threads(self) -> u32 {
        (self.bm / self.tm) * (self.bn / self.tn)
    }
}

/// Large tiles where they are many.
pub(super) fn choose(problem: &Problem) -> Tile {
    if problem.has_many(LARGE.bm, LARGE.bn) { LARGE } else { SMALL }
}

/// One block a tile.
pub(super) fn launch(problem: &Problem, tile: Tile) -> Launch {
    problem.launch(kernel(problem.spec(), tile), tile.bm, tile.bn)
}

/// The kernel of a spec.
pub(super) fn kernel(spec: Spec, tile: Tile) -> Kernel {
    let name = format!("gemm_{}_{}", spec.name(), tile.name());
    let emit = {
        let name = name.clone();
        move || emit(&name, &spec, tile)
    };
    Kernel { name, arch: Arch::Sm80, block: tile.threads(), shared_bytes: 0, any_grid: false, emit: Box::new(emit) }
}

/// Four elements on their way from global to shared memory.
struct Piece {
    /// Address of the first.
    from: Reg<B64>,
    /// Where it goes, in bytes from the operand's buffer.
    to: Reg<B32>,
    /// Its element of k in the tile.
    k: Reg<B32>,
    /// Whether it is within the matrix, along the other axis: one, or one for each element.
    inside: Vec<Reg<Pred>>,
    data: Vec<Reg<F32>>,
}

/// One operand's way.
struct Side {
    k_major: bool,
    wide: bool,
    /// Floats from one k to the next in shared memory.
    pitch: u32,
    pieces: Vec<Piece>,
    /// Bytes from one tile of k to the next.
    step: Reg<B64>,
}

impl Side {
    /// `base` is the group's matrix, `first` the tile's first row or column in it, `end` where it ends.
    #[expect(clippy::too_many_arguments, reason = "one operand in all its parts")]
    fn new(
        k: &mut Assembler,
        (k_major, wide): (bool, bool),
        (extent, threads): (u32, u32),
        tid: Reg<B32>,
        base: Reg<B64>,
        stride: Reg<B32>,
        (row_of_first, first, end): (Option<Reg<B32>>, Reg<B32>, Reg<B32>),
        first_k: Reg<B32>,
    ) -> Self {
        let per_row = if k_major { BK } else { extent } / 4;
        let pitch = if k_major { extent + 4 } else { extent };
        let step = k.reg::<B64>();
        if k_major {
            ptx!(k, "mov.u64 {step}, {};", BK * 4);
        } else {
            ptx!(k, "mul.wide.u32 {step}, {stride}, {};", BK * 4);
        }
        let mut pieces = Vec::new();
        for j in 0..extent * BK / 4 / threads {
            let [index, row, col, to, outer] = [(); 5].map(|()| k.reg::<B32>());
            let from = k.reg::<B64>();
            ptx!(k, "add.u32 {index}, {tid}, {};", j * threads);
            ptx!(k, "div.u32 {row}, {index}, {per_row};");
            ptx!(k, "rem.u32 {col}, {index}, {per_row};");
            ptx!(k, "shl.b32 {col}, {col}, 2;");
            let (outer_in_tile, inner) = if k_major { (row, col) } else { (col, row) };
            ptx!(k, "mad.lo.u32 {to}, {inner}, {pitch}, {outer_in_tile};");
            ptx!(k, "shl.b32 {to}, {to}, 2;");
            ptx!(k, "add.u32 {outer}, {first}, {outer_in_tile};");
            let inside = (0..if k_major || wide { 1 } else { 4 })
                .map(|e| {
                    let (inside, at) = (k.reg::<Pred>(), k.reg::<B32>());
                    ptx!(k, "add.u32 {at}, {outer}, {e};");
                    ptx!(k, "setp.lt.u32 {inside}, {at}, {end};");
                    inside
                })
                .collect();
            if let Some(row_of_first) = row_of_first {
                ptx!(k, "add.u32 {outer}, {outer}, {row_of_first};");
            }
            let (row, col, element) = (k.reg::<B32>(), k.reg::<B32>(), k.reg::<B64>());
            ptx!(k, "add.u32 {}, {first_k}, {inner};", if k_major { col } else { row });
            ptx!(k, "mov.u32 {}, {outer};", if k_major { row } else { col });
            ptx!(k, "mul.wide.u32 {element}, {row}, {stride};");
            ptx!(k, "shl.b64 {element}, {element}, 2;");
            ptx!(k, "mad.wide.u32 {from}, {col}, 4, {element};");
            ptx!(k, "add.u64 {from}, {from}, {base};");
            pieces.push(Piece { from, to, k: inner, inside, data: k.regs(4) });
        }
        Side { k_major, wide, pitch, pieces, step }
    }

    fn bytes(&self) -> u32 {
        BK * self.pitch * 4
    }

    /// Reads the pieces, of which `left` elements of k are in the group from here; zeros for those outside.
    fn load(&self, k: &mut Assembler, left: Reg<B32>) {
        for Piece { from, k: inner, inside, data, .. } in &self.pieces {
            for x in data {
                ptx!(k, "mov.f32 {x}, 0f00000000;");
            }
            let (q, at) = (k.reg::<Pred>(), k.reg::<B32>());
            ptx!(k, "setp.lt.u32 {q}, {inner}, {left};");
            if self.wide {
                ptx!(k, "and.pred {q}, {q}, {};", inside[0]);
                ptx!(k, "@{q} ld.global.v4.f32 {}, [{from}];", vector(data));
                continue;
            }
            for (e, x) in data.iter().enumerate() {
                let both = k.reg::<Pred>();
                if self.k_major && e > 0 {
                    ptx!(k, "add.u32 {at}, {inner}, {e};");
                    ptx!(k, "setp.lt.u32 {q}, {at}, {left};");
                }
                ptx!(k, "and.pred {both}, {q}, {};", inside[if self.k_major { 0 } else { e }]);
                ptx!(k, "@{both} ld.global.f32 {x}, [{from}+{}];", 4 * e);
            }
        }
    }

    fn advance(&self, k: &mut Assembler) {
        for piece in &self.pieces {
            ptx!(k, "add.u64 {0}, {0}, {1};", piece.from, self.step);
        }
    }

    /// Stores the pieces `offset` bytes into the buffer at `base`.
    fn store(&self, k: &mut Assembler, base: Reg<B32>, offset: u32) {
        for Piece { to, data, .. } in &self.pieces {
            let at = k.reg::<B32>();
            ptx!(k, "add.u32 {at}, {base}, {to};");
            if !self.k_major {
                ptx!(k, "st.shared.v4.f32 [{at}+{offset}], {};", vector(data));
                continue;
            }
            for (e, x) in data.iter().enumerate() {
                ptx!(k, "st.shared.f32 [{at}+{}], {x};", offset + e as u32 * self.pitch * 4);
            }
        }
    }
}

fn emit(name: &str, spec: &Spec, tile: Tile) -> String {
    let Tile { bm, bn, tm, tn } = tile;
    let threads = tile.threads();
    let mut kernel = Assembler::new(name);
    let k = &mut kernel;
    k.directive(format!(".maxntid {threads}, 1, 1"));
    let params = Params::declare(k, spec, Assembler::pointer);
    let (tid, number, end) = (k.reg::<B32>(), k.reg::<B32>(), k.label("END"));
    ptx!(k, "mov.u32 {tid}, %tid.x;");
    ptx!(k, "mov.u32 {number}, %ctaid.x;");
    let finder = Finder::new(k, spec, &params, bm, bn);
    let place = finder.find(k, &params, number, &end);

    let k_major = (spec.layout.a_k_major(), spec.layout.b_k_major());
    let is_rows = matches!(spec.kind, Kind::Rows { .. });
    let weight = if is_rows { params.to_group(k, params.b, place.group, 4) } else { params.b };
    // Rows of A begin at the group's first; k of A at the group's first; of B only where k is grouped, which leaves its weight whole.
    let a_rows = is_rows.then_some(place.first_row);
    let side_a = (k_major.0, spec.wide[0]);
    let a = (a_rows, place.m0, place.rows);
    let a = Side::new(k, side_a, (bm, threads), tid, params.a, params.lda, a, place.first_k);
    let side_b = (k_major.1, spec.wide[1]);
    let b = Side::new(k, side_b, (bn, threads), tid, weight, params.ldb, (None, place.n0, params.n), place.first_k);

    let buffer_bytes = a.bytes() + b.bytes();
    let shared = k.shared(16, "tiles", 2 * buffer_bytes as usize);
    let [buffer, left, tx, ty, at_a, at_b, other] = [(); 7].map(|()| k.reg::<B32>());
    ptx!(k, "mov.u32 {buffer}, {shared};");
    ptx!(k, "mov.u32 {other}, {shared};");
    ptx!(k, "add.u32 {other}, {other}, {buffer_bytes};");
    ptx!(k, "rem.u32 {tx}, {tid}, {};", bn / tn);
    ptx!(k, "div.u32 {ty}, {tid}, {};", bn / tn);
    let acc: Vec<Vec<Reg<F32>>> = (0..tm).map(|_| k.regs(tn as usize)).collect();
    for x in acc.iter().flatten() {
        ptx!(k, "mov.f32 {x}, 0f00000000;");
    }
    ptx!(k, "mov.u32 {left}, {};", place.inner);
    let (multiply, done, q) = (k.label("MULTIPLY"), k.label("DONE"), k.reg::<Pred>());
    ptx!(k, "setp.eq.u32 {q}, {left}, 0;");
    ptx!(k, "@{q} bra {done};");
    a.load(k, left);
    b.load(k, left);
    a.store(k, buffer, 0);
    b.store(k, buffer, a.bytes());
    ptx!(k, "bar.sync 0;");

    k.place(&multiply);
    let used = k.reg::<B32>();
    ptx!(k, "min.u32 {used}, {left}, {BK};");
    ptx!(k, "sub.u32 {left}, {left}, {used};");
    for side in [&a, &b] {
        side.advance(k);
        side.load(k, left);
    }
    ptx!(k, "mad.lo.u32 {at_a}, {ty}, 16, {buffer};");
    ptx!(k, "mad.lo.u32 {at_b}, {tx}, 16, {buffer};");
    let (xs, ys) = (k.regs::<F32>(tm as usize), k.regs::<F32>(tn as usize));
    for j in 0..BK {
        for (f, x) in xs.chunks_exact(4).enumerate() {
            let offset = (j * a.pitch + f as u32 * (bm * 4 / tm)) * 4;
            ptx!(k, "ld.shared.v4.f32 {}, [{at_a}+{offset}];", vector(x));
        }
        for (f, y) in ys.chunks_exact(4).enumerate() {
            let offset = a.bytes() + (j * b.pitch + f as u32 * (bn * 4 / tn)) * 4;
            ptx!(k, "ld.shared.v4.f32 {}, [{at_b}+{offset}];", vector(y));
        }
        for (row, x) in acc.iter().zip(&xs) {
            for (acc, y) in row.iter().zip(&ys) {
                ptx!(k, "fma.rn.f32 {acc}, {x}, {y}, {acc};");
            }
        }
    }
    a.store(k, other, 0);
    b.store(k, other, a.bytes());
    ptx!(k, "bar.sync 0;");
    ptx!(k, "mov.u32 {used}, {buffer};");
    ptx!(k, "mov.u32 {buffer}, {other};");
    ptx!(k, "mov.u32 {other}, {used};");
    ptx!(k, "setp.ne.u32 {q}, {left}, 0;");
    ptx!(k, "@{q} bra {multiply};");
    k.place(&done);
    write(k, spec, &params, &place, tile, (tx, ty), &acc);
    k.place(&end);
    ptx!(k, "ret;");
    kernel.finish(VERSION, Arch::Sm80.target())
}

/// Writes a thread's part.
fn write(
    k: &mut Assembler,
    spec: &Spec,
    params: &Params,
    place: &Place,
    tile: Tile,
    (tx, ty): (Reg<B32>, Reg<B32>),
    acc: &[Vec<Reg<F32>>],
) {
    let is_inner = matches!(spec.kind, Kind::Inner { .. });
    let c = if is_inner { params.to_group(k, params.c, place.group, 4) } else { params.c };
    let Tile { bm, bn, tm, tn } = tile;
    let col0 = k.reg::<B32>();
    ptx!(k, "mad.lo.u32 {col0}, {tx}, 4, {};", place.n0);
    let cols: Vec<Reg<B32>> = (0..tn)
        .map(|j| {
            let col = k.reg();
            ptx!(k, "add.u32 {col}, {col0}, {};", (j / 4) * (bn * 4 / tn) + j % 4);
            col
        })
        .collect();
    let bias: Vec<Reg<F32>> = match params.bias {
        None => vec![],
        Some(bias) => cols
            .iter()
            .map(|col| {
                let (x, at, q) = (k.reg(), k.reg::<B64>(), k.reg::<Pred>());
                ptx!(k, "mov.f32 {x}, 0f00000000;");
                ptx!(k, "setp.lt.u32 {q}, {col}, {};", params.n);
                ptx!(k, "mad.wide.u32 {at}, {col}, 4, {bias};");
                ptx!(k, "@{q} ld.global.f32 {x}, [{at}];");
                x
            })
            .collect(),
    };
    let [row0, row, row_of_c] = [(); 3].map(|()| k.reg::<B32>());
    ptx!(k, "mad.lo.u32 {row0}, {ty}, 4, {};", place.m0);
    let (inside, q, line, at) = (k.reg::<Pred>(), k.reg::<Pred>(), k.reg::<B64>(), k.reg::<B64>());
    let to_addend = params.to_addend(k);
    for (i, acc) in (0..tm).zip(acc) {
        ptx!(k, "add.u32 {row}, {row0}, {};", (i / 4) * (bm * 4 / tm) + i % 4);
        ptx!(k, "setp.lt.u32 {inside}, {row}, {};", place.rows);
        ptx!(k, "add.u32 {row_of_c}, {row}, {};", place.first_row);
        ptx!(k, "mul.wide.u32 {line}, {row_of_c}, {};", params.ldc);
        ptx!(k, "shl.b64 {line}, {line}, 2;");
        ptx!(k, "add.u64 {line}, {line}, {c};");
        for (x, bias) in acc.iter().zip(&bias) {
            ptx!(k, "add.f32 {x}, {x}, {bias};");
        }
        let wide = spec.wide[2];
        let num = if wide { 4 } else { 1 };
        for (xs, cols) in acc.chunks_exact(num).zip(cols.chunks_exact(num)) {
            let (ty, xs_text) = if wide { ("v4.f32", vector(xs)) } else { ("f32", xs[0].to_string()) };
            ptx!(k, "setp.lt.u32 {q}, {}, {};", cols[0], params.n);
            ptx!(k, "and.pred {q}, {q}, {inside};");
            ptx!(k, "mad.wide.u32 {at}, {}, 4, {line};", cols[0]);
            if let Some(to_addend) = to_addend {
                let (from, added) = (k.reg::<B64>(), k.regs::<F32>(num));
                let added_text = if wide { vector(&added) } else { added[0].to_string() };
                ptx!(k, "add.u64 {from}, {at}, {to_addend};");
                ptx!(k, "@{q} ld.global.{ty} {added_text}, [{from}];");
                for (x, added) in xs.iter().zip(&added) {
                    ptx!(k, "add.f32 {x}, {x}, {added};");
                }
            }
            ptx!(k, "@{q} st.global.{ty} [{at}], {xs_text};");
        }
    }
}
