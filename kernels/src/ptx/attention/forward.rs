//! Attention's forward kernel: over documents, over a cache, or over a part of a cache whose parts are merged later.
//!
//! Signature (q, k, [v,] o, [lse,] [doc_offsets,] scale: f32, rows, num_keys, g, group: u32, then num_docs, or at and keys a part: u32).
//! Without v, values are the first columns of the keys (latent attention). Grid (row tiles, kv heads, parts).
//!
//! Shared memory: q rows [16 R, d], k [32, d], v [32, v], scores [16 R, 32], all f32. Barriers: before a key tile is overwritten and
//! after it is written; q is written before the first of them. R, the rows a thread shares, is 4 unless there are few rows or little
//! room.
//!
//! A part of a cache assigns normalized sums and the log2 of their denominators, minus infinity where it has no key.

use super::{
    MAX_SHARED_BYTES,
    tile::{
        self, COLS, Elements, GROUPS, Heads, Place, SCORE_STRIDE, Source, Sums, after, document, exp2, fold_group,
        load_rows, mask_keys, scores, share_scores, stride,
    },
};
use crate::{
    dtype::DType,
    ptx,
    ptx::{
        Kernel,
        asm::{Assembler, B32, F32, Pred, Reg, f32_literal},
        golden::Variant,
        parts::{self, element, special},
    },
};

/// Which keys a row sees.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Keys {
    /// Those of its document up to itself.
    Documents,
    /// All of a cache up to its own position, in one part or in many.
    Cache {
        /// Whether there are several parts.
        parts: bool,
    },
}

/// What the text depends on.
#[derive(Clone, Copy, Debug)]
pub(super) struct Config {
    keys: Keys,
    q: Elements,
    k: Elements,
    /// None: the first columns of the keys.
    v: Option<Elements>,
    o: Elements,
    d: usize,
    width: usize,
    grouped: bool,
    /// Rows a thread shares.
    rows: usize,
}

impl Config {
    /// For q, k, v (none: the first columns of k) and o, and widths of q and o; `num_rows` of each kv head.
    pub(super) fn new(
        keys: Keys,
        (q, k, v, o): (Elements, Elements, Option<Elements>, Elements),
        (d, width): (usize, usize),
        group: usize,
        num_rows: usize,
    ) -> Self {
        let config = Config { keys, q, k, v, o, d, width, grouped: group > 1, rows: 1 };
        config.with_rows(num_rows)
    }

    fn with_rows(mut self, num_rows: usize) -> Self {
        let fits = |rows: usize| Config { rows, ..self }.shared_bytes() <= MAX_SHARED_BYTES;
        let enough = |rows: usize| rows == 1 || num_rows > GROUPS * rows / 2;
        let rows = [4, 2, 1].into_iter().find(|&rows| fits(rows) && enough(rows));
        self.rows = rows.unwrap_or_else(|| panic!("attention: heads of {} and {} are too wide", self.d, self.width));
        self
    }

    /// Rows of a block.
    pub(super) fn tile_rows(&self) -> usize {
        GROUPS * self.rows
    }

    fn k_at(&self) -> usize {
        self.tile_rows() * stride(self.d)
    }

    fn v_at(&self) -> usize {
        if self.v.is_some() { self.k_at() + COLS * stride(self.d) } else { self.k_at() }
    }

    fn v_stride(&self) -> usize {
        stride(if self.v.is_some() { self.width } else { self.d })
    }

    fn scores_at(&self) -> usize {
        self.v_at() + COLS * self.v_stride()
    }

    fn shared_bytes(&self) -> usize {
        self.scores_at() + self.tile_rows() * SCORE_STRIDE
    }

    fn name(&self) -> String {
        let keys = match self.keys {
            Keys::Documents => "docs",
            Keys::Cache { parts: false } => "cache",
            Keys::Cache { parts: true } => "parts",
        };
        let v = self.v.map_or("keys".into(), Elements::name);
        let (q, k, o) = (self.q.name(), self.k.name(), self.o.name());
        let grouped = if self.grouped { "_grouped" } else { "" };
        format!("attention_{keys}_q{q}_k{k}_v{v}_o{o}_d{}_v{}_r{}{grouped}", self.d, self.width, self.rows)
    }

    pub(super) fn kernel(self) -> Kernel {
        tile::kernel(self.name(), self.shared_bytes(), move |k, tiles| self.emit(k, tiles))
    }

    fn emit(&self, k: &mut Assembler, tiles: Reg<B32>) {
        let (q, keys) = (k.pointer("q"), k.pointer("k"));
        let values = self.v.map(|v| (k.pointer("v"), v));
        let o = k.pointer("o");
        let documents = self.keys == Keys::Documents;
        let lse = (self.keys != Keys::Cache { parts: false }).then(|| k.pointer("lse"));
        let offsets = documents.then(|| k.pointer("doc_offsets"));
        let (scale, num_rows, num_keys) = (k.f32("scale"), k.u32("rows"), k.u32("num_keys"));
        let (num_kv_heads, group) = (k.u32("g"), k.u32("group"));
        let heads = Heads { kv_head: special(k, "%ctaid.y"), num_kv_heads, group: self.grouped.then_some(group) };
        let place = Place::new(k, self.rows);

        k.note("the row tile; tiles with the most keys first");
        let (first_row, last_row) = (special(k, "%nctaid.x"), k.reg::<B32>());
        let block = special(k, "%ctaid.x");
        ptx!(k, "sub.u32 {first_row}, {first_row}, {block};");
        ptx!(k, "sub.u32 {first_row}, {first_row}, 1;");
        ptx!(k, "mul.lo.u32 {first_row}, {first_row}, {};", self.tile_rows());
        ptx!(k, "add.u32 {last_row}, {first_row}, {};", self.tile_rows());
        ptx!(k, "min.u32 {last_row}, {last_row}, {num_rows};");
        ptx!(k, "sub.u32 {last_row}, {last_row}, 1;");
        let (first_token, key_end) = (heads.token(k, first_row), heads.token(k, last_row));
        ptx!(k, "add.u32 {key_end}, {key_end}, 1;");
        let key_first = special(k, "0");
        let (context, num_docs) = if documents {
            let num_docs = k.u32("num_docs");
            if let Some(offsets) = offsets {
                let (start, _) = document(k, offsets, num_docs, first_token);
                ptx!(k, "mov.u32 {key_first}, {start};");
            }
            (special(k, "0"), Some(num_docs))
        } else {
            let (at, per_part, part) = (k.u32("at"), k.u32("keys_per_part"), special(k, "%ctaid.z"));
            ptx!(k, "add.u32 {key_end}, {key_end}, {at};");
            ptx!(k, "mul.lo.u32 {key_first}, {part}, {per_part};");
            ptx!(k, "add.u32 {per_part}, {key_first}, {per_part};");
            ptx!(k, "min.u32 {key_end}, {key_end}, {per_part};");
            (at, None)
        };
        ptx!(k, "min.u32 {key_end}, {key_end}, {num_keys};");

        k.note("this thread's rows: place in [t, h], first and last visible key; rows past the end see none");
        let (mut index, mut live, mut visible) = (vec![], vec![], vec![]);
        for r in 0..self.rows {
            let (row, is_live) = (after(k, first_row, r), k.reg::<Pred>());
            ptx!(k, "add.u32 {row}, {row}, {};", place.first_row);
            ptx!(k, "setp.lt.u32 {is_live}, {row}, {num_rows};");
            let safe = k.reg::<B32>();
            ptx!(k, "min.u32 {safe}, {row}, {last_row};");
            index.push(heads.query_index(k, safe));
            let last = heads.token(k, safe);
            let start = match (offsets, num_docs) {
                (Some(offsets), Some(num_docs)) => document(k, offsets, num_docs, last).0,
                _ => special(k, "0"),
            };
            ptx!(k, "add.u32 {last}, {last}, {context};");
            ptx!(k, "selp.u32 {start}, {start}, 0xffffffff, {is_live};");
            visible.push((start, last));
            live.push(is_live);
        }

        let source = Source { base: q, elements: self.q, width: self.d, scale: Some(scale) };
        load_rows(k, &source, (first_row, self.tile_rows(), num_rows), tiles, |k, row| heads.query_index(k, row));
        let k_tile = after(k, tiles, self.k_at());
        let v_tile = after(k, tiles, self.v_at());
        let score_tile = after(k, tiles, self.scores_at());
        let (q_at, k_at) = (place.row_at(k, tiles, stride(self.d)), place.column_at(k, k_tile, stride(self.d)));
        let (p_at, v_at) = (place.row_at(k, score_tile, SCORE_STRIDE), place.chunk_at(k, v_tile));
        let sums = Sums::zero(k, self.rows, self.width);
        let softmax = Softmax::new(k, self.rows);
        let step = special(k, &COLS.to_string());
        parts::strided(k, key_first, key_end, step, |k, first| {
            ptx!(k, "bar.sync 0;");
            let source = Source { base: keys, elements: self.k, width: self.d, scale: None };
            load_rows(k, &source, (first, COLS, key_end), k_tile, |k, key| heads.key_index(k, key));
            if let Some((base, elements)) = values {
                let source = Source { base, elements, width: self.width, scale: None };
                load_rows(k, &source, (first, COLS, key_end), v_tile, |k, key| heads.key_index(k, key));
            }
            ptx!(k, "bar.sync 0;");
            let s = scores(k, self.rows, (q_at, k_at), self.d, stride(self.d));
            let per_thread = s.len() / self.rows;
            for j in 0..per_thread {
                let key = after(k, first, j * tile::LANES);
                ptx!(k, "add.u32 {key}, {key}, {};", place.lane);
                // Rows past the end begin past every key; keys of the next part are none of this one.
                let inside = k.reg::<Pred>();
                ptx!(k, "setp.lt.u32 {inside}, {key}, {key_end};");
                ptx!(k, "selp.u32 {key}, {key}, 0xfffffffe, {inside};");
                for (row, bounds) in s.chunks(per_thread).zip(&visible) {
                    mask_keys(k, row[j], key, *bounds);
                }
            }
            let fade = softmax.step(k, &s);
            sums.scale(k, &fade);
            share_scores(k, place, p_at, &s);
            sums.accumulate(k, p_at, v_at, self.v_stride());
        });
        softmax.finish(k, &sums);
        let o_base = if self.keys == (Keys::Cache { parts: true }) {
            // A part's rows follow those of the parts before it.
            let (all, part, base) = (k.reg::<B32>(), special(k, "%ctaid.z"), k.reg());
            ptx!(k, "mul.lo.u32 {all}, {num_rows}, {num_kv_heads};");
            ptx!(k, "mul.lo.u32 {all}, {all}, {part};");
            for index in &index {
                ptx!(k, "add.u32 {index}, {index}, {all};");
            }
            ptx!(k, "mov.u64 {base}, {o};");
            base
        } else {
            o
        };
        sums.store(k, place, (o_base, self.o), &index, &live);
        if let Some(lse) = lse {
            let leads = k.reg::<Pred>();
            for ((index, live), value) in index.iter().zip(&live).zip(softmax.log2_sums(k)) {
                if documents {
                    ptx!(k, "mul.rn.f32 {value}, {value}, {};", f32_literal(std::f32::consts::LN_2));
                }
                ptx!(k, "setp.eq.and.u32 {leads}, {}, 0, {live};", place.lane);
                let at = element(k, lse, *index, DType::F32);
                ptx!(k, "@{leads} st.global.f32 [{at}], {value};");
            }
        }
    }
}

/// The running maxima, the same in all lanes of a group, and sums, each lane's own until the end.
struct Softmax {
    max: Vec<Reg<F32>>,
    sum: Vec<Reg<F32>>,
}

impl Softmax {
    fn new(k: &mut Assembler, rows: usize) -> Self {
        let max = (0..rows).map(|_| parts::constant(k, f32::NEG_INFINITY)).collect();
        Softmax { max, sum: (0..rows).map(|_| parts::constant(k, 0.0)).collect() }
    }

    /// Makes probabilities of scores; returns what earlier sums are multiplied by.
    fn step(&self, k: &mut Assembler, s: &[Reg<F32>]) -> Vec<Reg<F32>> {
        let per_row = s.len() / self.max.len();
        let rows = s.chunks(per_row).zip(self.max.iter().zip(&self.sum));
        rows.map(|(s, (&max, &sum))| {
            let top = parts::constant(k, f32::NEG_INFINITY);
            for x in s {
                ptx!(k, "max.f32 {top}, {top}, {x};");
            }
            fold_group(k, top, "max");
            ptx!(k, "max.f32 {top}, {top}, {max};");
            // Where no key was visible yet, any finite number does.
            let (none, base) = (k.reg::<Pred>(), k.reg::<F32>());
            ptx!(k, "setp.eq.f32 {none}, {top}, {};", f32_literal(f32::NEG_INFINITY));
            ptx!(k, "selp.f32 {base}, {}, {top}, {none};", f32_literal(0.0));
            let fade = parts::f32_op(k, "sub", max, base);
            let fade = exp2(k, fade);
            ptx!(k, "mov.f32 {max}, {top};");
            ptx!(k, "mul.rn.f32 {sum}, {sum}, {fade};");
            for x in s {
                ptx!(k, "sub.rn.f32 {x}, {x}, {base};");
                let p = exp2(k, *x);
                ptx!(k, "mov.f32 {x}, {p};");
                ptx!(k, "add.rn.f32 {sum}, {sum}, {p};");
            }
            fade
        })
        .collect()
    }

    /// Divides by the sums; rows without a key become 0.
    fn finish(&self, k: &mut Assembler, sums: &Sums) {
        let inverse: Vec<Reg<F32>> = self
            .sum
            .iter()
            .map(|&sum| {
                fold_group(k, sum, "add.rn");
                let (inverse, none) = (k.reg::<F32>(), k.reg::<Pred>());
                ptx!(k, "rcp.rn.f32 {inverse}, {sum};");
                ptx!(k, "setp.eq.f32 {none}, {sum}, {};", f32_literal(0.0));
                ptx!(k, "selp.f32 {inverse}, {}, {inverse}, {none};", f32_literal(0.0));
                inverse
            })
            .collect();
        sums.scale(k, &inverse);
    }

    /// log2 of the denominators.
    fn log2_sums(&self, k: &mut Assembler) -> Vec<Reg<F32>> {
        let rows = self.max.iter().zip(&self.sum);
        rows.map(|(max, sum)| {
            let y = k.reg::<F32>();
            ptx!(k, "lg2.approx.f32 {y}, {sum};");
            ptx!(k, "add.rn.f32 {y}, {y}, {max};");
            y
        })
        .collect()
    }
}

const BF16: Elements = Elements { dtype: DType::Bf16, lanes: 8 };
const F32X4: Elements = Elements { dtype: DType::F32, lanes: 4 };

pub(super) fn variants() -> Vec<Variant> {
    let mla = Config {
        keys: Keys::Documents,
        q: BF16,
        k: BF16,
        v: Some(BF16),
        o: BF16,
        d: 192,
        width: 128,
        grouped: false,
        rows: 4,
    };
    let grouped = Config { d: 128, grouped: true, ..mla };
    let cached = Config { keys: Keys::Cache { parts: true }, o: F32X4, rows: 1, ..grouped };
    let latent = Config { q: F32X4, v: None, d: 576, width: 512, ..cached };
    [mla, grouped, cached, latent.with_rows(128)].map(|c| Variant::new(c.kernel(), 255)).into()
}
