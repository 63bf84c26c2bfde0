//! Tiles of f32 in shared memory and the two products of attention over them.
//!
//! A block of 256 threads is 16 groups of 16 lanes. A group has 1, 2 or 4 rows of the block's row tile; its lanes share the columns:
//! lane l has columns l and l + 16 of a tile of 32 scores, and elements 64 c + 4 l .. + 4 of a row of output. Rows in shared memory
//! are padded with zeros to a multiple of 64 elements, and with 4 more, so that 8 rows at one column are in different banks. What a
//! group writes to its rows of the score tile only the group reads: a barrier of the warp is enough.

use crate::{
    dtype::DType,
    ptx,
    ptx::{
        Arch, Kernel, VERSION,
        asm::{Assembler, B32, B64, F32, Pred, Reg, f32_literal, vector},
        parts::{self, BLOCK, element, special, strided},
    },
    tensor::Tensor,
};

/// Threads that share a group of rows.
pub(super) const LANES: usize = 16;
/// Groups of rows in a block.
pub(super) const GROUPS: usize = BLOCK as usize / LANES;
/// Rows of the other side that meet a row tile at once.
pub(super) const COLS: usize = 32;
/// Bytes of a row of the score tile.
pub(super) const SCORE_STRIDE: usize = 4 * (COLS + 4);

/// Elements of a row as padded, without the last four.
fn padded(width: usize) -> usize {
    width.next_multiple_of(4 * LANES)
}

/// Bytes from row to row.
pub(super) fn stride(width: usize) -> usize {
    4 * (padded(width) + 4)
}

/// A kernel of 256 threads with that much dynamic shared memory, called `tiles`. One block a multiprocessor is enough: else ptxas
/// keeps some kernels to the registers of two, and spills.
pub(super) fn kernel(
    name: String,
    shared_bytes: usize,
    emit: impl Fn(&mut Assembler, Reg<B32>) + Send + 'static,
) -> Kernel {
    let text = {
        let name = name.clone();
        move || {
            let mut k = Assembler::new(&name);
            k.directive(format!(".maxntid {BLOCK}, 1, 1"));
            k.directive(".minnctapersm 1");
            let tiles = k.dynamic_shared(16, "tiles");
            let tiles = special(&mut k, &tiles);
            emit(&mut k, tiles);
            ptx!(k, "ret;");
            k.finish(VERSION, Arch::Sm80.target())
        }
    };
    Kernel {
        name,
        arch: Arch::Sm80,
        block: BLOCK,
        shared_bytes: shared_bytes as u32,
        any_grid: false,
        emit: Box::new(text),
    }
}

/// How a tensor's elements are read and written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in crate::ptx) struct Elements {
    pub dtype: DType,
    /// Neighbours of one access.
    pub lanes: usize,
}

impl Elements {
    pub(in crate::ptx) fn of(t: Tensor) -> Self {
        Elements { dtype: t.dtype, lanes: parts::lanes(&[t], t.cols()) }
    }

    pub(super) fn name(self) -> String {
        format!("{}x{}", self.dtype.name(), self.lanes)
    }
}

/// This thread's place: lane, and the first of the `rows` rows of its group.
#[derive(Clone, Copy)]
pub(super) struct Place {
    pub lane: Reg<B32>,
    pub first_row: Reg<B32>,
}

impl Place {
    pub(super) fn new(k: &mut Assembler, rows: usize) -> Self {
        let (tid, lane, first_row) = (special(k, "%tid.x"), k.reg::<B32>(), k.reg::<B32>());
        ptx!(k, "and.b32 {lane}, {tid}, {};", LANES - 1);
        ptx!(k, "shr.u32 {first_row}, {tid}, {};", LANES.ilog2());
        ptx!(k, "mul.lo.u32 {first_row}, {first_row}, {rows};");
        Place { lane, first_row }
    }

    /// Address of the group's first row in a tile.
    pub(super) fn row_at(&self, k: &mut Assembler, tile: Reg<B32>, stride: usize) -> Reg<B32> {
        let at = k.reg::<B32>();
        ptx!(k, "mad.lo.u32 {at}, {}, {stride}, {tile};", self.first_row);
        at
    }

    /// Address of row `lane` in a tile: the thread's first column of scores.
    pub(super) fn column_at(&self, k: &mut Assembler, tile: Reg<B32>, stride: usize) -> Reg<B32> {
        let at = k.reg::<B32>();
        ptx!(k, "mad.lo.u32 {at}, {}, {stride}, {tile};", self.lane);
        at
    }

    /// Address of the thread's first elements in row 0 of a tile.
    pub(super) fn chunk_at(&self, k: &mut Assembler, tile: Reg<B32>) -> Reg<B32> {
        let at = k.reg::<B32>();
        ptx!(k, "mad.lo.u32 {at}, {}, 16, {tile};", self.lane);
        at
    }
}

/// Address in shared memory after `bytes`.
pub(super) fn after(k: &mut Assembler, base: Reg<B32>, bytes: usize) -> Reg<B32> {
    let at = k.reg::<B32>();
    ptx!(k, "add.u32 {at}, {base}, {bytes};");
    at
}

/// Rows of a tensor that a block copies to a tile.
pub(super) struct Source {
    pub base: Reg<B64>,
    pub elements: Elements,
    pub width: usize,
    /// Factor on every element.
    pub scale: Option<Reg<F32>>,
}

/// Copies rows `first..first + num` to a tile, all threads together; rows from `end` on are zero. `index` makes of a row its place
/// in the tensor, counted in rows. Barriers are the caller's.
pub(super) fn load_rows(
    k: &mut Assembler,
    source: &Source,
    (first, num, end): (Reg<B32>, usize, Reg<B32>),
    tile: Reg<B32>,
    index: impl Fn(&mut Assembler, Reg<B32>) -> Reg<B32>,
) {
    let Source { base, elements: Elements { dtype, lanes }, width, scale } = *source;
    let per_row = padded(width) / lanes;
    let total = num * per_row;
    // Loads in flight at once.
    let batch = total.div_ceil(BLOCK as usize).min(4);
    let (tid, count) = (special(k, "%tid.x"), special(k, &total.to_string()));
    strided(k, tid, count, batch * BLOCK as usize, |k, i| {
        let loaded: Vec<_> = (0..batch)
            .map(|b| {
                let (i, inside) = (after(k, i, b * BLOCK as usize), k.reg::<Pred>());
                ptx!(k, "setp.lt.u32 {inside}, {i}, {total};");
                let (row, chunk) = parts::div_rem(k, i, per_row);
                let (to, valid, source_row) = (k.reg::<B32>(), k.reg::<Pred>(), k.reg::<B32>());
                ptx!(k, "mul.lo.u32 {to}, {row}, {};", stride(width));
                ptx!(k, "mad.lo.u32 {to}, {chunk}, {}, {to};", 4 * lanes);
                ptx!(k, "add.u32 {to}, {to}, {tile};");
                ptx!(k, "add.u32 {source_row}, {first}, {row};");
                ptx!(k, "setp.lt.and.u32 {valid}, {source_row}, {end}, {inside};");
                ptx!(k, "setp.lt.and.u32 {valid}, {chunk}, {}, {valid};", width.div_ceil(lanes));
                let row = index(k, source_row);
                let (from, at) = (k.reg::<B64>(), k.reg::<B64>());
                ptx!(k, "mul.wide.u32 {from}, {row}, {};", width * dtype.size_bytes());
                ptx!(k, "mad.wide.u32 {at}, {chunk}, {}, {base};", lanes * dtype.size_bytes());
                ptx!(k, "add.u64 {at}, {at}, {from};");
                (to, inside, load_words(k, at, valid, dtype, lanes))
            })
            .collect();
        for (to, inside, words) in loaded {
            let x = widen(k, &words, dtype, lanes);
            if let Some(scale) = scale {
                for x in &x {
                    ptx!(k, "mul.rn.f32 {x}, {x}, {scale};");
                }
            }
            for (part, x) in x.chunks(4).enumerate() {
                match x {
                    [one] => ptx!(k, "@{inside} st.shared.f32 [{to}], {one};"),
                    x => ptx!(k, "@{inside} st.shared.v4.f32 [{to}+{}], {};", 16 * part, vector(x)),
                }
            }
        }
    });
}

/// One access where `valid`, else zeros: words of 32 bits, the last one half for a single bf16.
fn load_words(k: &mut Assembler, at: Reg<B64>, valid: Reg<Pred>, dtype: DType, lanes: usize) -> Vec<Reg<B32>> {
    let bytes = lanes * dtype.size_bytes();
    let words: Vec<Reg<B32>> = (0..bytes.div_ceil(4)).map(|_| special(k, "0")).collect();
    match bytes {
        2 => ptx!(k, "@{valid} ld.global.u16 {}, [{at}];", words[0]),
        4 => ptx!(k, "@{valid} ld.global.b32 {}, [{at}];", words[0]),
        _ => ptx!(k, "@{valid} ld.global.v4.b32 {}, [{at}];", vector(&words)),
    }
    words
}

fn widen(k: &mut Assembler, words: &[Reg<B32>], dtype: DType, lanes: usize) -> Vec<Reg<F32>> {
    let mut x = vec![];
    for &word in words {
        if dtype == DType::Bf16 {
            let (low, high) = parts::unpack(k, word);
            x.extend([low, high]);
        } else {
            let y = k.reg::<F32>();
            ptx!(k, "mov.b32 {y}, {word};");
            x.push(y);
        }
    }
    x.truncate(lanes);
    x
}

/// `a_r . b_c` over `width` elements for the thread's rows r of the row tile at `a` and its columns c, the rows of the tile at `b`:
/// scores[2 r + j] is column lane + 16 j.
pub(super) fn scores(
    k: &mut Assembler,
    rows: usize,
    (a, b): (Reg<B32>, Reg<B32>),
    width: usize,
    b_stride: usize,
) -> Vec<Reg<F32>> {
    let per_thread = COLS / LANES;
    let sums: Vec<Reg<F32>> = (0..rows * per_thread).map(|_| parts::constant(k, 0.0)).collect();
    let steps = width.div_ceil(4);
    let unroll = [4, 3, 2].into_iter().find(|u| steps.is_multiple_of(*u)).unwrap_or(1);
    let (zero, end) = (special(k, "0"), special(k, &(steps / unroll).to_string()));
    let (a, b) = (after(k, a, 0), after(k, b, 0));
    strided(k, zero, end, 1, |k, _| {
        for u in 0..unroll {
            let load = |k: &mut Assembler, at: Reg<B32>, offset: usize| {
                let x = k.regs::<F32>(4);
                ptx!(k, "ld.shared.v4.f32 {}, [{at}+{}];", vector(&x), offset + 16 * u);
                x
            };
            let columns: Vec<_> = (0..per_thread).map(|j| load(k, b, j * LANES * b_stride)).collect();
            for r in 0..rows {
                let row = load(k, a, r * stride(width));
                for (j, column) in columns.iter().enumerate() {
                    let sum = sums[per_thread * r + j];
                    for (x, y) in row.iter().zip(column) {
                        ptx!(k, "fma.rn.f32 {sum}, {x}, {y}, {sum};");
                    }
                }
            }
        }
        ptx!(k, "add.u32 {a}, {a}, {};", 16 * unroll);
        ptx!(k, "add.u32 {b}, {b}, {};", 16 * unroll);
    });
    sums
}

/// Stores the thread's scores to the score tile, whose group rows begin at `at`, between two barriers of the warp.
pub(super) fn share_scores(k: &mut Assembler, place: Place, at: Reg<B32>, scores: &[Reg<F32>]) {
    let to = k.reg::<B32>();
    ptx!(k, "mad.lo.u32 {to}, {}, 4, {at};", place.lane);
    ptx!(k, "bar.warp.sync 0xffffffff;");
    for (i, x) in scores.iter().enumerate() {
        let (r, j) = (i / (COLS / LANES), i % (COLS / LANES));
        ptx!(k, "st.shared.f32 [{to}+{}], {x};", r * SCORE_STRIDE + 4 * LANES * j);
    }
    ptx!(k, "bar.warp.sync 0xffffffff;");
}

/// Sums over rows: the thread's elements of an output of `width` columns, [row][chunk][4] flat.
pub(super) struct Sums {
    pub x: Vec<Reg<F32>>,
    width: usize,
}

impl Sums {
    pub(super) fn zero(k: &mut Assembler, rows: usize, width: usize) -> Self {
        let n = rows * padded(width) / LANES;
        Sums { x: (0..n).map(|_| parts::constant(k, 0.0)).collect(), width }
    }

    fn per_row(&self) -> usize {
        padded(self.width) / LANES
    }

    /// Multiplies row r by `factors[r]`.
    pub(super) fn scale(&self, k: &mut Assembler, factors: &[Reg<F32>]) {
        for (row, factor) in self.x.chunks(self.per_row()).zip(factors) {
            for x in row {
                ptx!(k, "mul.rn.f32 {x}, {x}, {factor};");
            }
        }
    }

    /// Adds `sum_c p[r][c] b[c]` over the 32 columns of the score tile, whose group rows begin at `p`; `b` is the thread's chunk in
    /// row 0 of a tile.
    pub(super) fn accumulate(&self, k: &mut Assembler, p: Reg<B32>, b: Reg<B32>, b_stride: usize) {
        let rows = self.x.len() / self.per_row();
        let (zero, end) = (special(k, "0"), special(k, &(COLS / 4).to_string()));
        let (p, b) = (after(k, p, 0), after(k, b, 0));
        strided(k, zero, end, 1, |k, _| {
            let factors: Vec<Vec<Reg<F32>>> = (0..rows)
                .map(|r| {
                    let x = k.regs::<F32>(4);
                    ptx!(k, "ld.shared.v4.f32 {}, [{p}+{}];", vector(&x), r * SCORE_STRIDE);
                    x
                })
                .collect();
            for c in 0..4 {
                for chunk in 0..self.per_row() / 4 {
                    let x = k.regs::<F32>(4);
                    let offset = c * b_stride + 16 * LANES * chunk;
                    ptx!(k, "ld.shared.v4.f32 {}, [{b}+{offset}];", vector(&x));
                    for (r, factors) in factors.iter().enumerate() {
                        let sums = &self.x[r * self.per_row() + 4 * chunk..][..4];
                        for (sum, x) in sums.iter().zip(&x) {
                            ptx!(k, "fma.rn.f32 {sum}, {}, {x}, {sum};", factors[c]);
                        }
                    }
                }
            }
            ptx!(k, "add.u32 {p}, {p}, 16;");
            ptx!(k, "add.u32 {b}, {b}, {};", 4 * b_stride);
        });
    }

    /// Stores row r to the row of `base` that `index[r]` counts, where `live[r]`.
    pub(super) fn store(
        &self,
        k: &mut Assembler,
        place: Place,
        (base, elements): (Reg<B64>, Elements),
        index: &[Reg<B32>],
        live: &[Reg<Pred>],
    ) {
        for ((row, index), live) in self.x.chunks(self.per_row()).zip(index).zip(live) {
            let (at, first) = (k.reg::<B64>(), k.reg::<B32>());
            ptx!(k, "mul.wide.u32 {at}, {index}, {};", self.width * elements.dtype.size_bytes());
            ptx!(k, "add.u64 {at}, {at}, {base};");
            ptx!(k, "mul.lo.u32 {first}, {}, 4;", place.lane);
            let at = element(k, at, first, elements.dtype);
            for (chunk, x) in row.chunks(4).enumerate() {
                let (rest, skip) = (self.width - self.width.min(4 * LANES * chunk), k.label("skip"));
                let (inside, step) = (k.reg::<Pred>(), if elements.lanes > 1 { 4 } else { 1 });
                for (e, x) in x.chunks(step).enumerate() {
                    // Whole vectors are inside or outside: the width is a multiple of theirs.
                    ptx!(k, "setp.lt.and.u32 {inside}, {first}, {}, {live};", rest.saturating_sub(e));
                    ptx!(k, "@!{inside} bra {skip};");
                    let at = {
                        let to = k.reg::<B64>();
                        let offset = (4 * LANES * chunk + e) * elements.dtype.size_bytes();
                        ptx!(k, "add.u64 {to}, {at}, {offset};");
                        to
                    };
                    parts::store_vector(k, at, x, elements.dtype);
                }
                k.place(&skip);
            }
        }
    }
}

/// 2^x, 0 for minus infinity: within 2 ulp.
pub(super) fn exp2(k: &mut Assembler, x: Reg<F32>) -> Reg<F32> {
    let y = k.reg::<F32>();
    ptx!(k, "ex2.approx.ftz.f32 {y}, {x};");
    y
}

/// Folds over the 16 lanes of a group, all of which get the result; `op` is `add.rn` or `max`.
pub(super) fn fold_group(k: &mut Assembler, x: Reg<F32>, op: &str) {
    let y = k.reg::<F32>();
    for mask in [8, 4, 2, 1] {
        ptx!(k, "shfl.sync.bfly.b32 {y}, {x}, {mask}, 31, 0xffffffff;");
        ptx!(k, "{op}.f32 {x}, {x}, {y};");
    }
}

/// First token of `token`'s document and of the next one: `offsets` has `num + 1` of them, rising from 0 to more than `token`.
pub(super) fn document(k: &mut Assembler, offsets: Reg<B64>, num: Reg<B32>, token: Reg<B32>) -> (Reg<B32>, Reg<B32>) {
    let (low, high, middle, start, end) = (special(k, "0"), k.reg::<B32>(), k.reg::<B32>(), special(k, "0"), k.reg());
    ptx!(k, "mov.u32 {high}, {num};");
    let at = element(k, offsets, high, DType::U32);
    ptx!(k, "ld.global.u32 {end}, [{at}];");
    let (top, out, found, earlier) = (k.label("search"), k.label("found"), k.reg::<Pred>(), k.reg::<Pred>());
    k.place(&top);
    ptx!(k, "sub.u32 {middle}, {high}, {low};");
    ptx!(k, "setp.le.u32 {found}, {middle}, 1;");
    ptx!(k, "@{found} bra {out};");
    ptx!(k, "add.u32 {middle}, {low}, {high};");
    ptx!(k, "shr.u32 {middle}, {middle}, 1;");
    let x = parts::load_u32(k, offsets, middle);
    ptx!(k, "setp.le.u32 {earlier}, {x}, {token};");
    ptx!(k, "@{earlier} mov.u32 {low}, {middle};");
    ptx!(k, "@{earlier} mov.u32 {start}, {x};");
    ptx!(k, "@!{earlier} mov.u32 {high}, {middle};");
    ptx!(k, "@!{earlier} mov.u32 {end}, {x};");
    ptx!(k, "bra {top};");
    k.place(&out);
    (start, end)
}

/// A row of a kv head is a head of its group at a token, tokens outermost.
#[derive(Clone, Copy)]
pub(super) struct Heads {
    /// This block's.
    pub kv_head: Reg<B32>,
    /// All.
    pub num_kv_heads: Reg<B32>,
    /// Query heads of each, or none where that is one.
    pub group: Option<Reg<B32>>,
}

impl Heads {
    pub(super) fn token(&self, k: &mut Assembler, row: Reg<B32>) -> Reg<B32> {
        let token = k.reg::<B32>();
        match self.group {
            Some(group) => ptx!(k, "div.u32 {token}, {row}, {group};"),
            None => ptx!(k, "mov.u32 {token}, {row};"),
        }
        token
    }

    /// Row of keys or values of `token` in [t, g].
    pub(super) fn key_index(&self, k: &mut Assembler, token: Reg<B32>) -> Reg<B32> {
        let index = k.reg::<B32>();
        ptx!(k, "mad.lo.u32 {index}, {token}, {}, {};", self.num_kv_heads, self.kv_head);
        index
    }

    /// Place of query row `row` in [t, h].
    pub(super) fn query_index(&self, k: &mut Assembler, row: Reg<B32>) -> Reg<B32> {
        let Some(group) = self.group else { return self.key_index(k, row) };
        let (token, head) = parts::div_rem(k, row, group);
        let index = self.key_index(k, token);
        ptx!(k, "mad.lo.u32 {index}, {index}, {group}, {head};");
        index
    }
}

/// Minus infinity where the column's number among `first..` is not in `from..end`.
pub(super) fn mask_keys(k: &mut Assembler, s: Reg<F32>, key: Reg<B32>, (from, last): (Reg<B32>, Reg<B32>)) {
    let seen = k.reg::<Pred>();
    ptx!(k, "setp.ge.u32 {seen}, {key}, {from};");
    ptx!(k, "setp.le.and.u32 {seen}, {key}, {last}, {seen};");
    ptx!(k, "selp.f32 {s}, {s}, {}, {seen};", f32_literal(f32::NEG_INFINITY));
}
