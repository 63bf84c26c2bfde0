//! C_mn = A_mk B_nk^T of E4M3 codes with scales on the tensor cores of Ampere and later, as bf16; dense and grouped.
//!
//! Signature: as in [`crate::ptx::gemm::schedule`], a and b addresses; then scale_a, its pitch, scale_b, and its pitch if B has tiles. Needs sm_80
//! (mma.sync, ldmatrix).
//!
//! For devices without wgmma and operands that are not aligned: made to be right. A block makes a tile of [`BM`] x [`BN`] and each
//! of its four warps 32 x 32. Codes of 128 of k go through registers, where a thread turns them to bf16, which has all of E4M3, into
//! shared memory; those of the next 128 are read before the products of this. Sums of 128 products are made by mma.sync from zero,
//! then sum += product * (scale_a * scale_b).
//!
//! Shared memory: A, 64 rows of 256 bytes, then B the same; piece c of 16 bytes of row r at place `c ^ (r % 8)`, so that eight rows
//! of an ldmatrix meet no bank twice. After the last it becomes the tile of sums of [`crate::ptx::gemm::output`].

use super::{Problem, ScaleB, Spec, pitch};
use crate::{
    fp8::TILE,
    ptx,
    ptx::{
        Arch, Arg, Kernel, Launch, VERSION,
        asm::{Assembler, B32, B64, F32, Pred, Reg, vector},
        gemm::{
            output,
            problem::Kind,
            schedule::{Finder, Params, Place},
        },
    },
};

/// Rows and columns of a block's tile.
const BM: u32 = 64;
const BN: u32 = 64;
/// Codes of k at a time.
const BK: u32 = TILE as u32;
/// Threads of a block: four warps, two by two.
const THREADS: u32 = 128;
/// Bytes of an operand's rows in shared memory, and of a row.
const OPERAND_BYTES: u32 = 64 * ROW_BYTES;
const ROW_BYTES: u32 = BK * 2;

/// One block a tile.
pub(super) fn launch(problem: &Problem) -> Launch {
    let mut launch = problem.product.launch(kernel(problem.spec()), BM, BN);
    launch.args.extend([Arg::Tensor(problem.scale_a), Arg::U32(pitch(problem.product.m))]);
    match problem.scale_b {
        ScaleB::Blocks(scales) => launch.args.push(Arg::Tensor(scales)),
        ScaleB::Tiles(scales) => launch.args.extend([Arg::Tensor(scales), Arg::U32(pitch(problem.product.n))]),
    }
    launch
}

/// The kernel of a spec.
pub(super) fn kernel(spec: Spec) -> Kernel {
    let name = format!("fp8_gemm_mma_{}", spec.name());
    let emit = {
        let name = name.clone();
        move || emit(&name, &spec)
    };
    let shared_bytes = (2 * OPERAND_BYTES).max(output::tile_bytes(BM, BN));
    Kernel { name, arch: Arch::Sm80, block: THREADS, shared_bytes, any_grid: false, emit: Box::new(emit) }
}

/// Sixteen codes that a thread carries to shared memory.
struct Piece {
    from: Reg<B64>,
    /// Where the first eight and the second go, from the operand's first byte.
    to: [Reg<B32>; 2],
    /// Its first code of k in the tile.
    k: Reg<B32>,
    inside: Reg<Pred>,
    words: Vec<Reg<B32>>,
}

/// An operand of codes.
struct Operand {
    wide: bool,
    pieces: Vec<Piece>,
}

/// Rows of an operand: where the first is, from one to the next, the tile's first, and the end.
struct Rows {
    base: Reg<B64>,
    stride: Reg<B32>,
    origin: Option<Reg<B32>>,
    first: Reg<B32>,
    end: Reg<B32>,
}

impl Operand {
    fn new(k: &mut Assembler, rows: &Rows, wide: bool, first_k: Reg<B32>, tid: Reg<B32>) -> Self {
        let per_row = BK / 16;
        let piece = |j: u32, k: &mut Assembler| {
            let [index, row, col, twist, at] = [(); 5].map(|()| k.reg::<B32>());
            let (from, inside) = (k.reg::<B64>(), k.reg::<Pred>());
            ptx!(k, "add.u32 {index}, {tid}, {};", j * THREADS);
            ptx!(k, "div.u32 {row}, {index}, {per_row};");
            ptx!(k, "rem.u32 {col}, {index}, {per_row};");
            ptx!(k, "and.b32 {twist}, {row}, 7;");
            let to = [0, 1].map(|half| {
                let to = k.reg::<B32>();
                ptx!(k, "mad.lo.u32 {to}, {col}, 2, {half};");
                ptx!(k, "xor.b32 {to}, {to}, {twist};");
                ptx!(k, "shl.b32 {to}, {to}, 4;");
                ptx!(k, "mad.lo.u32 {to}, {row}, {ROW_BYTES}, {to};");
                to
            });
            ptx!(k, "shl.b32 {col}, {col}, 4;");
            ptx!(k, "add.u32 {at}, {row}, {};", rows.first);
            ptx!(k, "setp.lt.u32 {inside}, {at}, {};", rows.end);
            if let Some(origin) = rows.origin {
                ptx!(k, "add.u32 {at}, {at}, {origin};");
            }
            ptx!(k, "mul.wide.u32 {from}, {at}, {};", rows.stride);
            ptx!(k, "add.u32 {at}, {col}, {first_k};");
            ptx!(k, "mad.wide.u32 {from}, {at}, 1, {from};");
            ptx!(k, "add.u64 {from}, {from}, {};", rows.base);
            Piece { from, to, k: col, inside, words: k.regs(4) }
        };
        Operand { wide, pieces: (0..64 * per_row / THREADS).map(|j| piece(j, k)).collect() }
    }

    /// Starts reading the pieces, of which `left` codes are in the group (zeros are the rest), and goes on to the next.
    fn read(&self, k: &mut Assembler, left: Reg<B32>) {
        for Piece { from, k: col, inside, words, .. } in &self.pieces {
            let q = k.reg::<Pred>();
            for word in words {
                ptx!(k, "mov.b32 {word}, 0;");
            }
            if self.wide {
                ptx!(k, "setp.lt.u32 {q}, {col}, {left};");
                ptx!(k, "and.pred {q}, {q}, {inside};");
                ptx!(k, "@{q} ld.global.v4.b32 {}, [{from}];", vector(words));
            } else {
                let [at, code] = [(); 2].map(|()| k.reg::<B32>());
                for e in 0..16u32 {
                    ptx!(k, "add.u32 {at}, {col}, {e};");
                    ptx!(k, "setp.lt.u32 {q}, {at}, {left};");
                    ptx!(k, "and.pred {q}, {q}, {inside};");
                    ptx!(k, "mov.b32 {code}, 0;");
                    ptx!(k, "@{q} ld.global.u8 {code}, [{from}+{e}];");
                    ptx!(k, "shl.b32 {code}, {code}, {};", e % 4 * 8);
                    ptx!(k, "or.b32 {0}, {0}, {code};", words[(e / 4) as usize]);
                }
            }
            ptx!(k, "add.u64 {from}, {from}, {BK};");
        }
    }

    /// Writes the pieces as bf16 into shared memory from `base` on.
    fn write(&self, k: &mut Assembler, base: Reg<B32>, offset: u32) {
        for Piece { to, words, .. } in &self.pieces {
            for (to, words) in to.iter().zip(words.chunks_exact(2)) {
                let (at, pairs): (Reg<B32>, Vec<_>) =
                    (k.reg(), words.iter().flat_map(|word| bf16_of_e4m3(k, *word)).collect());
                ptx!(k, "add.u32 {at}, {base}, {to};");
                ptx!(k, "st.shared.v4.b32 [{at}+{offset}], {};", vector(&pairs));
            }
        }
    }
}

/// Four codes as two pairs of bf16.
///
/// Exponent and mantissa of a code, moved to where bf16 has its own, are those of the value times 2^-120: subnormal codes become
/// subnormals. NaN has all seven bits, and one added to them overflows.
fn bf16_of_e4m3(k: &mut Assembler, codes: Reg<B32>) -> [Reg<B32>; 2] {
    ["0x1404", "0x3424"].map(|selector| {
        let [pair, sign, nan, low] = [(); 4].map(|()| k.reg::<B32>());
        ptx!(k, "prmt.b32 {pair}, {codes}, 0, {selector};");
        ptx!(k, "and.b32 {sign}, {pair}, 0x80008000;");
        ptx!(k, "and.b32 {pair}, {pair}, 0x7f007f00;");
        ptx!(k, "shr.u32 {pair}, {pair}, 4;");
        ptx!(k, "add.u32 {nan}, {pair}, 0x00100010;");
        ptx!(k, "and.b32 {nan}, {nan}, 0x08000800;");
        ptx!(k, "shr.u32 {low}, {nan}, 5;");
        ptx!(k, "shl.b32 {nan}, {nan}, 4;");
        ptx!(k, "sub.u32 {nan}, {nan}, {low};");
        ptx!(k, "or.b32 {pair}, {pair}, {sign};");
        let scale = k.reg::<B32>();
        ptx!(k, "mov.b32 {scale}, 0x7b807b80;");
        let zero = k.reg::<B32>();
        ptx!(k, "mov.b32 {zero}, 0x80008000;");
        ptx!(k, "fma.rn.bf16x2 {pair}, {pair}, {scale}, {zero};");
        ptx!(k, "or.b32 {pair}, {pair}, {nan};");
        pair
    })
}

/// Scales as a thread needs them: of rows or columns that are one tile's or each its own.
struct Scales {
    /// Address of each, and whether it is inside.
    each: Vec<(Reg<B64>, Reg<Pred>)>,
    /// Bytes from one 128 of k to the next.
    step: Reg<B64>,
}

impl Scales {
    /// Of tiles: rows `first + offsets` before `end`, of which the first lies `origin` rows from the matrix's.
    fn of_tiles(
        k: &mut Assembler,
        (base, pitch): (Reg<B64>, Reg<B32>),
        rows: &Rows,
        first: Reg<B32>,
        offsets: impl Iterator<Item = u32>,
        first_k: Reg<B32>,
    ) -> Self {
        let (start, step, at_k) = (k.reg::<B64>(), k.reg::<B64>(), k.reg::<B32>());
        ptx!(k, "shr.u32 {at_k}, {first_k}, {};", BK.trailing_zeros());
        ptx!(k, "mul.wide.u32 {start}, {at_k}, {pitch};");
        ptx!(k, "shl.b64 {start}, {start}, 2;");
        ptx!(k, "add.u64 {start}, {start}, {base};");
        ptx!(k, "mul.wide.u32 {step}, {pitch}, 4;");
        let each = offsets
            .map(|offset| {
                let (row, q, at) = (k.reg::<B32>(), k.reg::<Pred>(), k.reg::<B64>());
                ptx!(k, "add.u32 {row}, {first}, {offset};");
                ptx!(k, "setp.lt.u32 {q}, {row}, {};", rows.end);
                if let Some(origin) = rows.origin {
                    ptx!(k, "add.u32 {row}, {row}, {origin};");
                }
                ptx!(k, "mad.wide.u32 {at}, {row}, 4, {start};");
                (at, q)
            })
            .collect();
        Scales { each, step }
    }

    /// Of the one block that the tile's columns lie in.
    fn of_block(k: &mut Assembler, base: Reg<B64>, params: &Params, place: &Place) -> Self {
        let [row, rows, per_row] = [(); 3].map(|()| k.reg::<B32>());
        let (at, step, q) = (k.reg::<B64>(), k.reg::<B64>(), k.reg::<Pred>());
        for (blocks, size) in [(rows, params.n), (per_row, params.k)] {
            ptx!(k, "add.u32 {blocks}, {size}, 127;");
            ptx!(k, "shr.u32 {blocks}, {blocks}, 7;");
        }
        ptx!(k, "shr.u32 {row}, {}, 7;", place.n0);
        ptx!(k, "mad.lo.u32 {row}, {}, {rows}, {row};", place.group);
        ptx!(k, "mul.wide.u32 {at}, {row}, {per_row};");
        ptx!(k, "shl.b64 {at}, {at}, 2;");
        ptx!(k, "add.u64 {at}, {at}, {base};");
        ptx!(k, "mov.u64 {step}, 4;");
        ptx!(k, "setp.lt.u32 {q}, {}, {};", place.n0, params.n);
        Scales { each: vec![(at, q)], step }
    }

    /// Starts reading them, and goes on to the next; zeros are those outside.
    fn read(&self, k: &mut Assembler) -> Vec<Reg<F32>> {
        self.each
            .iter()
            .map(|(at, q)| {
                let x = k.reg::<F32>();
                ptx!(k, "mov.f32 {x}, 0f00000000;");
                ptx!(k, "@{q} ld.global.f32 {x}, [{at}];");
                ptx!(k, "add.u64 {at}, {at}, {};", self.step);
                x
            })
            .collect()
    }
}

/// Where a lane reads its row of an ldmatrix of 16 rows from `origin` on: the row's first byte, and what its place in the row is
/// twisted by. In A the second matrix is 8 rows further, in B 8 of k.
fn lane_of_matrices(k: &mut Assembler, lane: Reg<B32>, base: Reg<B32>, origin: Reg<B32>, is_a: bool) -> [Reg<B32>; 2] {
    let [row, line, high, twist] = [(); 4].map(|()| k.reg::<B32>());
    let (rows_bit, k_bit) = if is_a { (3, 4) } else { (4, 3) };
    ptx!(k, "and.b32 {row}, {lane}, 7;");
    ptx!(k, "shr.u32 {high}, {lane}, {k_bit};");
    ptx!(k, "and.b32 {high}, {high}, 1;");
    ptx!(k, "xor.b32 {twist}, {high}, {row};");
    ptx!(k, "shr.u32 {line}, {lane}, {rows_bit};");
    ptx!(k, "and.b32 {line}, {line}, 1;");
    ptx!(k, "mad.lo.u32 {line}, {line}, 8, {row};");
    ptx!(k, "add.u32 {line}, {line}, {origin};");
    ptx!(k, "mad.lo.u32 {line}, {line}, {ROW_BYTES}, {base};");
    [line, twist]
}

/// Fragments of 32 rows and the `step`-th 16 of k.
fn fragments(k: &mut Assembler, [line, twist]: [Reg<B32>; 2], step: u32, offset: u32) -> Vec<Vec<Reg<B32>>> {
    let at = k.reg::<B32>();
    ptx!(k, "xor.b32 {at}, {twist}, {};", 2 * step);
    ptx!(k, "mad.lo.u32 {at}, {at}, 16, {line};");
    (0..2)
        .map(|half| {
            let (words, offset) = (k.regs::<B32>(4), offset + half * 16 * ROW_BYTES);
            ptx!(k, "ldmatrix.sync.aligned.m8n8.x4.shared.b16 {}, [{at}+{offset}];", vector(&words));
            words
        })
        .collect()
}

fn emit(name: &str, spec: &Spec) -> String {
    let mut kernel = Assembler::new(name);
    let k = &mut kernel;
    k.directive(format!(".maxntid {THREADS}, 1, 1"));
    let shared = k.dynamic_shared(128, "shared");
    let params = Params::declare(k, &spec.product, Assembler::pointer);
    let scale_a = (k.pointer("scale_a"), k.u32("pitch_a"));
    let (scale_b, pitch_b) = (k.pointer("scale_b"), spec.tiled.then(|| k.u32("pitch_b")));
    let (tid, number, end) = (k.reg::<B32>(), k.reg::<B32>(), k.label("END"));
    ptx!(k, "mov.u32 {tid}, %tid.x;");
    ptx!(k, "mov.u32 {number}, %ctaid.x;");
    let place = Finder::new(k, &spec.product, &params, BM, BN).find(k, &params, number, &end);

    let is_rows = matches!(spec.product.kind, Kind::Rows { .. });
    let origin = is_rows.then_some(place.first_row);
    let a_rows = Rows { base: params.a, stride: params.lda, origin, first: place.m0, end: place.rows };
    let base = if is_rows { params.to_group(k, params.b, place.group, 1) } else { params.b };
    let b_rows = Rows { base, stride: params.ldb, origin: None, first: place.n0, end: params.n };
    let a = Operand::new(k, &a_rows, spec.product.wide[0], place.first_k, tid);
    let b = Operand::new(k, &b_rows, spec.product.wide[1], place.first_k, tid);

    let [base, lane, warp_m, warp_n, row, pair, left] = [(); 7].map(|()| k.reg::<B32>());
    ptx!(k, "mov.u32 {base}, {shared};");
    ptx!(k, "and.b32 {lane}, {tid}, 31;");
    ptx!(k, "and.b32 {warp_m}, {tid}, 32;");
    ptx!(k, "shr.u32 {warp_n}, {tid}, 1;");
    ptx!(k, "and.b32 {warp_n}, {warp_n}, 32;");
    let a_matrices = lane_of_matrices(k, lane, base, warp_m, true);
    let b_matrices = lane_of_matrices(k, lane, base, warp_n, false);
    // A thread has rows lane / 4 and 8 further of each 16, and two columns of each 8.
    let [first_row, first_col] = [(); 2].map(|()| k.reg::<B32>());
    ptx!(k, "shr.u32 {row}, {lane}, 2;");
    ptx!(k, "add.u32 {row}, {row}, {warp_m};");
    ptx!(k, "add.u32 {first_row}, {row}, {};", place.m0);
    ptx!(k, "and.b32 {pair}, {lane}, 3;");
    ptx!(k, "mad.lo.u32 {first_col}, {pair}, 2, {warp_n};");
    ptx!(k, "add.u32 {first_col}, {first_col}, {};", place.n0);
    let rows = Scales::of_tiles(k, scale_a, &a_rows, first_row, (0..4).map(|i| 8 * i), place.first_k);
    let columns = match pitch_b {
        None => Scales::of_block(k, scale_b, &params, &place),
        Some(pitch) => {
            let offsets = (0..8).map(|j| j / 2 * 8 + j % 2);
            Scales::of_tiles(k, (scale_b, pitch), &b_rows, first_col, offsets, place.first_k)
        }
    };
    let acc: Vec<Reg<F32>> = k.regs(32);
    let sums: Vec<Reg<F32>> = k.regs(32);
    for sum in &sums {
        ptx!(k, "mov.f32 {sum}, 0f00000000;");
    }
    let (turn, multiplied, q) = (k.label("TURN"), k.label("MULTIPLIED"), k.reg::<Pred>());
    ptx!(k, "mov.u32 {left}, {};", place.inner);
    ptx!(k, "setp.eq.u32 {q}, {left}, 0;");
    ptx!(k, "@{q} bra {multiplied};");
    a.read(k, left);
    b.read(k, left);

    k.place(&turn);
    ptx!(k, "bar.sync 0;");
    a.write(k, base, 0);
    b.write(k, base, OPERAND_BYTES);
    ptx!(k, "bar.sync 0;");
    let (row_scales, column_scales) = (rows.read(k), columns.read(k));
    let used = k.reg::<B32>();
    ptx!(k, "min.u32 {used}, {left}, {BK};");
    ptx!(k, "sub.u32 {left}, {left}, {used};");
    a.read(k, left);
    b.read(k, left);
    for x in &acc {
        ptx!(k, "mov.f32 {x}, 0f00000000;");
    }
    for step in 0..BK / 16 {
        let (a, b) = (fragments(k, a_matrices, step, 0), fragments(k, b_matrices, step, OPERAND_BYTES));
        for (acc, a) in acc.chunks_exact(16).zip(&a) {
            for (acc, b) in acc.chunks_exact(4).zip(b.iter().flat_map(|b| b.chunks_exact(2))) {
                let (a, b, acc) = (vector(a), vector(b), vector(acc));
                ptx!(k, "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {acc}, {a}, {b}, {acc};");
            }
        }
    }
    for (i, (acc, sum)) in acc.iter().zip(&sums).enumerate() {
        let row = row_scales[i / 16 * 2 + i / 2 % 2];
        let column = column_scales.get(i % 16 / 4 * 2 + i % 2).unwrap_or(&column_scales[0]);
        let both = k.reg::<F32>();
        ptx!(k, "mul.rn.f32 {both}, {row}, {column};");
        ptx!(k, "fma.rn.f32 {sum}, {acc}, {both}, {sum};");
    }
    ptx!(k, "setp.ne.u32 {q}, {left}, 0;");
    ptx!(k, "@{q} bra {turn};");

    k.place(&multiplied);
    ptx!(k, "bar.sync 0;");
    let granule = k.reg::<B32>();
    for j in 0..4 {
        ptx!(k, "shr.u32 {granule}, {warp_n}, 3;");
        ptx!(k, "add.u32 {granule}, {granule}, {j};");
        let at = output::pair_place(k, base, BN, row, granule, pair);
        for (i, sums) in (0..).zip(sums.chunks_exact(16)) {
            for (half, pair) in (0..).zip(sums[j as usize * 4..][..4].chunks_exact(2)) {
                ptx!(k, "st.shared.v2.f32 [{at}+{}], {};", (i * 16 + half * 8) * BN * 4, vector(pair));
            }
        }
    }
    ptx!(k, "bar.sync 0;");
    output::write(k, &spec.product, &params, &place, (BM, BN), base, tid, THREADS);
    k.place(&end);
    ptx!(k, "ret;");
    kernel.finish(VERSION, Arch::Sm80.target())
}
