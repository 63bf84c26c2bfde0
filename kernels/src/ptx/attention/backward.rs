//! Attention's gradient: three kernels, the first of which leaves delta [t, h] in scratch.
//!
//! With P = 2^(S - lse log2(e)), dP = dO V^T and delta = rowsum(dO * O), dS = P * (dP - delta); dV = P^T dO, dQ = scale dS K,
//! dK = scale dS^T Q.
//! - delta (do, o, delta, n, g): a warp a row of o, its g groups of neighbours.
//! - dq (q, k, v, do, lse, delta, doc_offsets, dq, scale log2(e), scale: f32, rows, t, g, group, num_docs: u32): a block has 64 query
//!   rows and walks over tiles of 32 keys. Shared memory: q, dO [64], k, v [32], scores.
//! - dkv (q, k, v, do, lse, delta, doc_offsets, dk, dv, scale log2(e): f32, rows, t, g, group, num_docs): a block has 64 keys and walks
//!   over tiles of 32 query rows of all heads of the group, in order. Shared memory: k, v [64], q, dO [32], scores, transposed.
//!
//! Barriers: before a walked tile is overwritten and after it is written; the score tile belongs to the groups of 16 lanes.

use super::{
    MAX_SHARED_BYTES, Sizes, log2_scale,
    tile::{
        self, COLS, Elements, GROUPS, Heads, LANES, Place, SCORE_STRIDE, Source, Sums, after, document, exp2,
        load_rows, scores, share_scores, stride,
    },
};
use crate::{
    dtype::DType,
    ops::attention::{Grads, Inputs},
    ptx,
    ptx::{
        Arg, Kernel, Launch,
        asm::{Assembler, B32, B64, F32, Pred, Reg, f32_literal},
        fold::{Fold, Team},
        golden::Variant,
        parts::{self, count, element, load_vector, special, strided},
    },
    tensor::Tensor,
};

/// What the texts depend on: all tensors of one type, and rows a thread shares.
#[derive(Clone, Copy, Debug)]
struct Config {
    qk: Elements,
    v: Elements,
    d: usize,
    width: usize,
    grouped: bool,
    rows: usize,
}

pub(super) fn input_grad(n: Sizes, x: Inputs, o: Tensor, lse: Tensor, d_o: Tensor, grads: Grads) -> Vec<Launch> {
    let lanes = |tensors: &[Tensor], width| parts::lanes(tensors, width);
    let dtype = x.q.dtype;
    let qk = Elements { dtype, lanes: lanes(&[x.q, x.k, grads.dq, grads.dk], n.d) };
    let v = Elements { dtype, lanes: lanes(&[x.v, d_o, o, grads.dv], n.v) };
    let config = Config { qk, v, d: n.d, width: n.v, grouped: n.group > 1, rows: 4 }.fitted();
    let num_rows = n.t * n.group;
    let delta = Arg::Scratch { slot: 0, bytes: 4 * (num_rows * n.g) as u64 };
    let mut delta_args: Vec<Arg> = [d_o, o].map(Arg::Tensor).into();
    delta_args.push(delta.clone());
    delta_args.extend([num_rows * n.g, n.v / v.lanes].map(|n| Arg::U32(count(n))));
    let inputs = |outputs: &[Tensor], factors: &[Arg]| -> Vec<Arg> {
        let mut args: Vec<Arg> = [x.q, x.k, x.v, d_o, lse].map(Arg::Tensor).into();
        args.extend([delta.clone(), Arg::Tensor(x.doc_offsets)]);
        args.extend(outputs.iter().copied().map(Arg::Tensor));
        args.extend_from_slice(factors);
        args.extend([num_rows, n.t, n.g, n.group, x.doc_offsets.len() - 1].map(|n| Arg::U32(count(n))));
        args
    };
    let grid = |rows: usize| [count(rows.div_ceil(GROUPS * config.rows)), count(n.g), 1];
    let scale = log2_scale(x.scale);
    vec![
        Launch { kernel: delta_kernel(v), grid: Team::Warp.grid(num_rows * n.g), args: delta_args },
        Launch {
            kernel: config.dq_kernel(),
            grid: grid(num_rows),
            args: inputs(&[grads.dq], &[scale.clone(), Arg::F32(x.scale as f32)]),
        },
        Launch { kernel: config.dkv_kernel(), grid: grid(n.t), args: inputs(&[grads.dk, grads.dv], &[scale]) },
    ]
}

fn delta_kernel(elements: Elements) -> Kernel {
    let Elements { dtype, lanes } = elements;
    parts::kernel(format!("attention_delta_{}_x{lanes}", dtype.name()), move |k| {
        let (d_o, o, delta) = (k.pointer("do"), k.pointer("o"), k.pointer("delta"));
        let (n, groups) = (k.u32("n"), k.u32("g"));
        let (row, lane) = Team::Warp.place(k, n);
        let cols = k.reg::<B32>();
        ptx!(k, "mul.lo.u32 {cols}, {groups}, {lanes};");
        let (a, b) = (parts::row(k, d_o, row, cols, dtype), parts::row(k, o, row, cols, dtype));
        let sum = parts::constant(k, 0.0);
        strided(k, lane, groups, 32, |k, i| {
            let at = |k: &mut Assembler, row: Reg<B64>| {
                let at = k.reg::<B64>();
                ptx!(k, "mad.wide.u32 {at}, {i}, {}, {row};", lanes * dtype.size_bytes());
                at
            };
            let (a, b) = (at(k, a), at(k, b));
            let (a, b) = (load_vector(k, a, dtype, lanes), load_vector(k, b, dtype, lanes));
            for (a, b) in a.iter().zip(b) {
                ptx!(k, "fma.rn.f32 {sum}, {a}, {b}, {sum};");
            }
        });
        Team::Warp.fold(k, sum, Fold::Sum);
        let (leads, at) = (k.reg::<Pred>(), element(k, delta, row, DType::F32));
        ptx!(k, "setp.eq.u32 {leads}, {lane}, 0;");
        ptx!(k, "@{leads} st.global.f32 [{at}], {sum};");
    })
}

/// Parameters that both kernels begin with.
struct Params {
    q: Reg<B64>,
    k: Reg<B64>,
    v: Reg<B64>,
    d_o: Reg<B64>,
    lse: Reg<B64>,
    delta: Reg<B64>,
    offsets: Reg<B64>,
}

impl Params {
    fn new(k: &mut Assembler) -> Self {
        Params {
            q: k.pointer("q"),
            k: k.pointer("k"),
            v: k.pointer("v"),
            d_o: k.pointer("do"),
            lse: k.pointer("lse"),
            delta: k.pointer("delta"),
            offsets: k.pointer("doc_offsets"),
        }
    }
}

/// Numbers that both end with.
struct Counts {
    rows: Reg<B32>,
    t: Reg<B32>,
    num_docs: Reg<B32>,
    heads: Heads,
}

impl Counts {
    fn new(k: &mut Assembler, grouped: bool) -> Self {
        let (rows, t, num_kv_heads, group, num_docs) =
            (k.u32("rows"), k.u32("t"), k.u32("g"), k.u32("group"), k.u32("num_docs"));
        let heads = Heads { kv_head: special(k, "%ctaid.y"), num_kv_heads, group: grouped.then_some(group) };
        Counts { rows, t, num_docs, heads }
    }
}

/// lse in powers of 2, and delta, of a row of [t, h].
fn saved(k: &mut Assembler, p: &Params, index: Reg<B32>) -> (Reg<F32>, Reg<F32>) {
    let (lse, delta) = (k.reg::<F32>(), k.reg::<F32>());
    let at = element(k, p.lse, index, DType::F32);
    ptx!(k, "ld.global.f32 {lse}, [{at}];");
    ptx!(k, "mul.rn.f32 {lse}, {lse}, {};", f32_literal(std::f32::consts::LOG2_E));
    let at = element(k, p.delta, index, DType::F32);
    ptx!(k, "ld.global.f32 {delta}, [{at}];");
    (lse, delta)
}

/// Makes P of a score and dS of dP; both 0 where not `seen`.
fn softmax_grad(k: &mut Assembler, (s, dp): (Reg<F32>, Reg<F32>), (lse, delta): (Reg<F32>, Reg<F32>), seen: Reg<Pred>) {
    ptx!(k, "sub.rn.f32 {s}, {s}, {lse};");
    let p = exp2(k, s);
    ptx!(k, "selp.f32 {s}, {p}, {}, {seen};", f32_literal(0.0));
    ptx!(k, "sub.rn.f32 {dp}, {dp}, {delta};");
    ptx!(k, "mul.rn.f32 {dp}, {dp}, {s};");
    ptx!(k, "selp.f32 {dp}, {dp}, {}, {seen};", f32_literal(0.0));
}

impl Config {
    fn fitted(mut self) -> Self {
        let fits = |rows: usize| Config { rows, ..self }.shared_bytes() <= MAX_SHARED_BYTES;
        let rows = [4, 2, 1].into_iter().find(|&rows| fits(rows));
        self.rows = rows.unwrap_or_else(|| panic!("attention: heads of {} and {} are too wide", self.d, self.width));
        self
    }

    fn tile_rows(&self) -> usize {
        GROUPS * self.rows
    }

    /// Where tiles begin: the resident one over d is at 0, then over v, the walked ones, and the scores.
    fn tiles(&self) -> [usize; 4] {
        let resident_v = self.tile_rows() * stride(self.d);
        let walked_d = resident_v + self.tile_rows() * stride(self.width);
        let walked_v = walked_d + COLS * stride(self.d);
        [resident_v, walked_d, walked_v, walked_v + COLS * stride(self.width)]
    }

    fn shared_bytes(&self) -> usize {
        self.tiles()[3] + self.tile_rows() * SCORE_STRIDE
    }

    fn name(&self, output: &str) -> String {
        let grouped = if self.grouped { "_grouped" } else { "" };
        let (qk, v) = (self.qk.name(), self.v.name());
        format!("attention_{output}_qk{qk}_v{v}_d{}_v{}_r{}{grouped}", self.d, self.width, self.rows)
    }

    fn source(&self, base: Reg<B64>, of_v: bool, scale: Option<Reg<F32>>) -> Source {
        let (elements, width) = if of_v { (self.v, self.width) } else { (self.qk, self.d) };
        Source { base, elements, width, scale }
    }

    fn dq_kernel(self) -> Kernel {
        tile::kernel(self.name("dq"), self.shared_bytes(), move |k, tiles| self.emit_dq(k, tiles))
    }

    fn dkv_kernel(self) -> Kernel {
        tile::kernel(self.name("dkv"), self.shared_bytes(), move |k, tiles| self.emit_dkv(k, tiles))
    }

    fn emit_dq(&self, k: &mut Assembler, tiles: Reg<B32>) {
        let (p, dq) = (Params::new(k), k.pointer("dq"));
        let (log2_scale, scale) = (k.f32("log2_scale"), k.f32("scale"));
        let n = Counts::new(k, self.grouped);
        let place = Place::new(k, self.rows);
        let (first_row, last_row, block) = (special(k, "%nctaid.x"), k.reg::<B32>(), special(k, "%ctaid.x"));
        ptx!(k, "sub.u32 {first_row}, {first_row}, {block};");
        ptx!(k, "sub.u32 {first_row}, {first_row}, 1;");
        ptx!(k, "mul.lo.u32 {first_row}, {first_row}, {};", self.tile_rows());
        ptx!(k, "add.u32 {last_row}, {first_row}, {};", self.tile_rows());
        ptx!(k, "min.u32 {last_row}, {last_row}, {};", n.rows);
        ptx!(k, "sub.u32 {last_row}, {last_row}, 1;");
        let (first_token, key_end) = (n.heads.token(k, first_row), n.heads.token(k, last_row));
        ptx!(k, "add.u32 {key_end}, {key_end}, 1;");
        let (key_first, _) = document(k, p.offsets, n.num_docs, first_token);

        let (mut index, mut live, mut rows) = (vec![], vec![], vec![]);
        for r in 0..self.rows {
            let (row, is_live) = (after(k, first_row, r), k.reg::<Pred>());
            ptx!(k, "add.u32 {row}, {row}, {};", place.first_row);
            ptx!(k, "setp.lt.u32 {is_live}, {row}, {};", n.rows);
            ptx!(k, "min.u32 {row}, {row}, {last_row};");
            let place_of_row = n.heads.query_index(k, row);
            let last = n.heads.token(k, row);
            let (start, _) = document(k, p.offsets, n.num_docs, last);
            rows.push((start, last, saved(k, &p, place_of_row)));
            index.push(place_of_row);
            live.push(is_live);
        }

        let [do_tile, k_tile, v_tile, score_tile] = self.tiles().map(|at| after(k, tiles, at));
        let span = (first_row, self.tile_rows(), n.rows);
        load_rows(k, &self.source(p.q, false, Some(log2_scale)), span, tiles, |k, r| n.heads.query_index(k, r));
        load_rows(k, &self.source(p.d_o, true, None), span, do_tile, |k, r| n.heads.query_index(k, r));
        let (d_stride, v_stride) = (stride(self.d), stride(self.width));
        let (q_at, do_at) = (place.row_at(k, tiles, d_stride), place.row_at(k, do_tile, v_stride));
        let (k_at, v_at) = (place.column_at(k, k_tile, d_stride), place.column_at(k, v_tile, v_stride));
        let (p_at, k_chunk) = (place.row_at(k, score_tile, SCORE_STRIDE), place.chunk_at(k, k_tile));
        let sums = Sums::zero(k, self.rows, self.d);
        strided(k, key_first, key_end, COLS, |k, first| {
            ptx!(k, "bar.sync 0;");
            let span = (first, COLS, key_end);
            load_rows(k, &self.source(p.k, false, None), span, k_tile, |k, key| n.heads.key_index(k, key));
            load_rows(k, &self.source(p.v, true, None), span, v_tile, |k, key| n.heads.key_index(k, key));
            ptx!(k, "bar.sync 0;");
            let s = scores(k, self.rows, (q_at, k_at), self.d, d_stride);
            let dp = scores(k, self.rows, (do_at, v_at), self.width, v_stride);
            let per_thread = s.len() / self.rows;
            for (i, (&s, &dp)) in s.iter().zip(&dp).enumerate() {
                let (start, last, saved) = rows[i / per_thread];
                let (key, seen) = (after(k, first, i % per_thread * LANES), k.reg::<Pred>());
                ptx!(k, "add.u32 {key}, {key}, {};", place.lane);
                ptx!(k, "setp.ge.u32 {seen}, {key}, {start};");
                ptx!(k, "setp.le.and.u32 {seen}, {key}, {last}, {seen};");
                softmax_grad(k, (s, dp), saved, seen);
            }
            share_scores(k, place, p_at, &dp);
            sums.accumulate(k, p_at, k_chunk, d_stride);
        });
        sums.scale(k, &vec![scale; self.rows]);
        sums.store(k, place, (dq, self.qk), &index, &live);
    }

    fn emit_dkv(&self, k: &mut Assembler, tiles: Reg<B32>) {
        let (p, dk, dv) = (Params::new(k), k.pointer("dk"), k.pointer("dv"));
        let log2_scale = k.f32("log2_scale");
        let n = Counts::new(k, self.grouped);
        let place = Place::new(k, self.rows);
        let (first_key, last_key, block) = (k.reg::<B32>(), k.reg::<B32>(), special(k, "%ctaid.x"));
        ptx!(k, "mul.lo.u32 {first_key}, {block}, {};", self.tile_rows());
        ptx!(k, "add.u32 {last_key}, {first_key}, {};", self.tile_rows());
        ptx!(k, "min.u32 {last_key}, {last_key}, {};", n.t);
        ptx!(k, "sub.u32 {last_key}, {last_key}, 1;");
        let (_, end_token) = document(k, p.offsets, n.num_docs, last_key);
        let (first_row, end_row) = (k.reg::<B32>(), k.reg::<B32>());
        match n.heads.group {
            Some(group) => {
                ptx!(k, "mul.lo.u32 {first_row}, {first_key}, {group};");
                ptx!(k, "mul.lo.u32 {end_row}, {end_token}, {group};");
            }
            None => {
                ptx!(k, "mov.u32 {first_row}, {first_key};");
                ptx!(k, "mov.u32 {end_row}, {end_token};");
            }
        }

        k.note("this thread's keys: number, end of the document; keys past the last one are seen by none");
        let (mut index, mut live, mut keys) = (vec![], vec![], vec![]);
        for r in 0..self.rows {
            let (key, is_live, safe) = (after(k, first_key, r), k.reg::<Pred>(), k.reg::<B32>());
            ptx!(k, "add.u32 {key}, {key}, {};", place.first_row);
            ptx!(k, "setp.lt.u32 {is_live}, {key}, {};", n.t);
            ptx!(k, "min.u32 {safe}, {key}, {last_key};");
            index.push(n.heads.key_index(k, safe));
            let (_, end) = document(k, p.offsets, n.num_docs, safe);
            ptx!(k, "selp.u32 {end}, {end}, 0, {is_live};");
            keys.push((key, end));
            live.push(is_live);
        }

        let [v_tile, q_tile, do_tile, score_tile] = self.tiles().map(|at| after(k, tiles, at));
        let span = (first_key, self.tile_rows(), n.t);
        load_rows(k, &self.source(p.k, false, None), span, tiles, |k, key| n.heads.key_index(k, key));
        load_rows(k, &self.source(p.v, true, None), span, v_tile, |k, key| n.heads.key_index(k, key));
        let (d_stride, v_stride) = (stride(self.d), stride(self.width));
        let (k_at, v_at) = (place.row_at(k, tiles, d_stride), place.row_at(k, v_tile, v_stride));
        let (q_at, do_at) = (place.column_at(k, q_tile, d_stride), place.column_at(k, do_tile, v_stride));
        let p_at = place.row_at(k, score_tile, SCORE_STRIDE);
        let (q_chunk, do_chunk) = (place.chunk_at(k, q_tile), place.chunk_at(k, do_tile));
        let (dk_sums, dv_sums) = (Sums::zero(k, self.rows, self.d), Sums::zero(k, self.rows, self.width));
        strided(k, first_row, end_row, COLS, |k, first| {
            ptx!(k, "bar.sync 0;");
            let span = (first, COLS, end_row);
            let query = |k: &mut Assembler, row| n.heads.query_index(k, row);
            load_rows(k, &self.source(p.q, false, Some(log2_scale)), span, q_tile, query);
            load_rows(k, &self.source(p.d_o, true, None), span, do_tile, query);
            ptx!(k, "bar.sync 0;");
            let s = scores(k, self.rows, (k_at, q_at), self.d, d_stride);
            let dp = scores(k, self.rows, (v_at, do_at), self.width, v_stride);
            let per_thread = s.len() / self.rows;
            for j in 0..per_thread {
                let (row, inside) = (after(k, first, j * LANES), k.reg::<Pred>());
                ptx!(k, "add.u32 {row}, {row}, {};", place.lane);
                ptx!(k, "setp.lt.u32 {inside}, {row}, {end_row};");
                // Past the end, the first row of the tile: it is read and not used.
                ptx!(k, "selp.u32 {row}, {row}, {first}, {inside};");
                let (place_of_row, token) = (n.heads.query_index(k, row), n.heads.token(k, row));
                let saved = saved(k, &p, place_of_row);
                for (r, (key, end)) in keys.iter().enumerate() {
                    let seen = k.reg::<Pred>();
                    ptx!(k, "setp.ge.and.u32 {seen}, {token}, {key}, {inside};");
                    ptx!(k, "setp.lt.and.u32 {seen}, {token}, {end}, {seen};");
                    let i = r * per_thread + j;
                    softmax_grad(k, (s[i], dp[i]), saved, seen);
                }
            }
            share_scores(k, place, p_at, &s);
            dv_sums.accumulate(k, p_at, do_chunk, v_stride);
            share_scores(k, place, p_at, &dp);
            dk_sums.accumulate(k, p_at, q_chunk, d_stride);
        });
        // q has the factor log2(e) that dK has not.
        let factor = parts::constant(k, std::f32::consts::LN_2);
        dk_sums.scale(k, &vec![factor; self.rows]);
        dk_sums.store(k, place, (dk, self.qk), &index, &live);
        dv_sums.store(k, place, (dv, self.v), &index, &live);
    }
}

pub(super) fn variants() -> Vec<Variant> {
    let bf16 = Elements { dtype: DType::Bf16, lanes: 8 };
    let mla = Config { qk: bf16, v: bf16, d: 192, width: 128, grouped: false, rows: 4 };
    let grouped = Config { d: 128, grouped: true, ..mla };
    let mut all = vec![Variant::new(delta_kernel(bf16), 40)];
    for config in [mla, grouped] {
        all.extend([config.dq_kernel(), config.dkv_kernel()].map(|kernel| Variant::new(kernel, 255)));
    }
    all
}
