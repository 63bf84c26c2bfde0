//! Columns to codes: a scale for each 128 rows of a column, and rows and columns exchanged. It is what weight gradients read, whose sums are
//! over tokens; of numbers, or of codes whose scales are for 128 columns (retile), as the forward pass kept them.
//!
//! Signature: (x, \[its scales, their pitch: u32,\] codes, scales: addresses, n rows, columns, columns of the codes, pitch of the scales: u32,
//! \[offsets: address, e: u32\]). A block has a [panel](super::panel) of 128 rows and 64 columns (128 of codes). With offsets, the rows of
//! a group begin at a multiple of 128 in the output, and zeros follow its last: a block finds its rows by a sum over
//! the groups' tiles, 256 groups at a time. What no group has is zeros with scales of 1.
//!
//! Barriers: between the columns' amax of each warp and their maximum; between scales and codes; in the panel's exchange. With offsets, in
//! the sum over groups, and after the rows are found.
//!
//! Time: bytes over memory bandwidth: an element of bf16 is 2 bytes in and 1 out, one of codes 1 and 1, and 1/32 for each scale. 128 bytes of
//! each row or more, and 128 of each column. A block has 16 KiB on their way (32 of f32).

use super::{
    code::{Recipe, amax, load_one, load_words, share_max, transpose},
    panel::{Place, ROWS},
};
use crate::{
    dtype::DType,
    ptx,
    ptx::{
        Kernel,
        asm::{Assembler, B32, B64, F32, Pred, Reg, vector},
        fold::exclusive_scan,
        parts::{BLOCK, element, f32_op, row, special},
    },
};

/// What is quantized, and how it can be accessed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Form {
    /// Type of the numbers; U8 for codes.
    pub dtype: DType,
    /// Whether rows come in groups.
    pub grouped: bool,
    /// Whether rows of the input are aligned.
    pub wide_in: bool,
    /// Whether rows of the output are.
    pub wide_out: bool,
}

impl Form {
    /// Columns of a thread.
    pub fn width(self) -> usize {
        if self.dtype == DType::U8 { 16 } else { 8 }
    }

    /// Columns of a block.
    pub fn panel(self) -> usize {
        8 * self.width()
    }
}

/// What a thread has of a panel.
enum Values {
    /// Numbers, row by row.
    Floats([Vec<Reg<F32>>; 4]),
    /// Words of the four rows of each column, and the rows' scales.
    Codes(Vec<Reg<B32>>, [Reg<F32>; 4]),
}

impl Values {
    /// The four numbers of a column (of codes, the magnitudes), and what says their signs.
    fn column(&self, k: &mut Assembler, recipe: Recipe, j: usize) -> ([Reg<F32>; 4], Option<Reg<B32>>) {
        match self {
            Values::Floats(rows) => ([0, 1, 2, 3].map(|r| rows[r][j]), None),
            Values::Codes(columns, scales) => {
                let x = recipe.magnitudes(k, columns[j]);
                ([0, 1, 2, 3].map(|r| f32_op(k, "mul", x[r], scales[r])), Some(columns[j]))
            }
        }
    }
}

pub(super) fn kernel(form: Form, recipe: Recipe) -> Kernel {
    let Form { dtype, grouped, wide_in, wide_out } = form;
    let groups = if grouped { "_grouped" } else { "" };
    let [from, to] = [(wide_in, form.width()), (wide_out, 16)].map(|(wide, n)| if wide { n } else { 1 });
    let name = format!("quantize_columns{groups}_{}_x{from}_x{to}", dtype.name());
    recipe.kernel(&name, move |k| {
        let x = k.pointer("x");
        let from_scales = (dtype == DType::U8).then(|| (k.pointer("x_scales"), k.u32("x_pitch")));
        let (codes, scales) = (k.pointer("codes"), k.pointer("scales"));
        let [n, columns, out_columns, pitch] = ["n", "columns", "out_columns", "pitch"].map(|name| k.u32(name));
        let (panel, block) = (special(k, "%ctaid.x"), special(k, "%ctaid.y"));
        let place = Place::new(k, form.width(), panel);
        let start = k.reg::<B32>();
        ptx!(k, "mul.lo.u32 {start}, {block}, {ROWS};");
        let (first, rows) = if grouped {
            let (offsets, e) = (k.pointer("offsets"), k.u32("e"));
            find(k, block, offsets, e)
        } else {
            let rows = k.reg::<B32>();
            ptx!(k, "sub.u32 {rows}, {n}, {start};");
            ptx!(k, "min.u32 {rows}, {rows}, {ROWS};");
            (start, rows)
        };
        let there = place.rows(k, rows);
        let values = match from_scales {
            None => {
                let at = place.addresses(k, x, first, columns, dtype);
                Values::Floats(place.load(k, at, there, columns, (dtype, wide_in)))
            }
            Some(from) => load_codes(k, &place, (x, from), (first, there), columns, wide_in),
        };
        let inverses = scale(k, &place, recipe, &values, (scales, pitch, block), (columns, rows));
        let words: Vec<Reg<B32>> = inverses
            .into_iter()
            .enumerate()
            .map(|(j, inverse)| {
                let (x, signs) = values.column(k, recipe, j);
                recipe.encode(k, x, signs, inverse)
            })
            .collect();
        let tile = k.shared(16, "tile", Place::shared_bytes(form.width()));
        let tile = special(k, &tile);
        place.put(k, tile, &words);
        ptx!(k, "bar.sync 0;");
        place.store(k, tile, (codes, out_columns, start), columns, wide_out);
    })
}

/// The first row of this block and how many it has; of no group, none.
fn find(k: &mut Assembler, block: Reg<B32>, offsets: Reg<B64>, e: Reg<B32>) -> (Reg<B32>, Reg<B32>) {
    let (found, sums) = (k.shared(8, "found", 8), k.shared(4, "sums", 4 * (BLOCK as usize / 32)));
    let (found, sums, tid) = (special(k, &found), special(k, &sums), special(k, "%tid.x"));
    let (earlier, group, zero) = (special(k, "0"), special(k, "%tid.x"), special(k, "0"));
    let (leader, more, there) = (k.reg::<Pred>(), k.reg::<Pred>(), k.reg::<Pred>());
    let [begin, end, rows, tiles, inside] = [(); 5].map(|()| k.reg::<B32>());
    ptx!(k, "setp.eq.u32 {leader}, {tid}, 0;");
    ptx!(k, "@{leader} st.shared.v2.u32 [{found}], {{{zero}, {zero}}};");
    let top = k.label("groups");
    k.place(&top);
    ptx!(k, "setp.lt.u32 {there}, {group}, {e};");
    ptx!(k, "mov.u32 {begin}, 0;");
    ptx!(k, "mov.u32 {end}, 0;");
    let at = element(k, offsets, group, DType::U32);
    ptx!(k, "@{there} ld.global.u32 {begin}, [{at}];");
    ptx!(k, "@{there} ld.global.u32 {end}, [{at}+4];");
    ptx!(k, "sub.u32 {rows}, {end}, {begin};");
    ptx!(k, "add.u32 {tiles}, {rows}, {};", ROWS - 1);
    ptx!(k, "div.u32 {tiles}, {tiles}, {ROWS};");
    let (before, all) = exclusive_scan(k, tiles, sums);
    // This block's number among the group's, if it is one of them.
    ptx!(k, "sub.u32 {inside}, {block}, {earlier};");
    ptx!(k, "sub.u32 {inside}, {inside}, {before};");
    ptx!(k, "setp.lt.u32 {there}, {inside}, {tiles};");
    ptx!(k, "mul.lo.u32 {inside}, {inside}, {ROWS};");
    ptx!(k, "add.u32 {begin}, {begin}, {inside};");
    ptx!(k, "sub.u32 {rows}, {rows}, {inside};");
    ptx!(k, "min.u32 {rows}, {rows}, {ROWS};");
    ptx!(k, "@{there} st.shared.v2.u32 [{found}], {{{begin}, {rows}}};");
    ptx!(k, "add.u32 {earlier}, {earlier}, {all};");
    ptx!(k, "add.u32 {group}, {group}, {BLOCK};");
    // The same for all threads: the first of them.
    let next = k.reg::<B32>();
    ptx!(k, "sub.u32 {next}, {group}, {tid};");
    ptx!(k, "setp.lt.u32 {more}, {next}, {e};");
    ptx!(k, "bar.sync 0;");
    ptx!(k, "@{more} bra {top};");
    let (first, count) = (k.reg::<B32>(), k.reg::<B32>());
    ptx!(k, "ld.shared.v2.u32 {{{first}, {count}}}, [{found}];");
    (first, count)
}

/// Codes of this thread, whose row r begins at `first` + r, with columns together, and the rows' scales.
fn load_codes(
    k: &mut Assembler,
    place: &Place,
    (x, (scales, pitch)): (Reg<B64>, (Reg<B64>, Reg<B32>)),
    (first, rows): (Reg<B32>, [Reg<Pred>; 4]),
    columns: Reg<B32>,
    wide: bool,
) -> Values {
    let at = place.addresses(k, x, first, columns, DType::U8);
    let words = [0, 1, 2, 3].map(|r| {
        if wide {
            let there = place.column(k, 0, columns, rows[r]);
            return load_words(k, at[r], place.width / 4, there);
        }
        (0..place.width / 4)
            .map(|word| {
                let all = special(k, "0");
                for byte in 0..4 {
                    let (there, code) = (place.column(k, 4 * word + byte, columns, rows[r]), special(k, "0"));
                    ptx!(k, "@{there} ld.global.u8 {code}, [{}+{}];", at[r], 4 * word + byte);
                    ptx!(k, "bfi.b32 {all}, {code}, {all}, {}, 8;", 8 * byte);
                }
                all
            })
            .collect()
    });
    let by_column = (0..place.width / 4).flat_map(|word| transpose(k, [0, 1, 2, 3].map(|r| words[r][word]))).collect();
    // All columns of the block are of one tile of each row.
    let (tile, index) = (k.reg::<B32>(), k.reg::<B32>());
    ptx!(k, "div.u32 {tile}, {}, {ROWS};", place.first_column);
    ptx!(k, "mad.lo.u32 {index}, {}, 4, {first};", place.q);
    let at = row(k, scales, tile, pitch, DType::F32);
    let at = element(k, at, index, DType::F32);
    let scales = [0, 1, 2, 3].map(|r| load_one(k, at, 4 * r, DType::F32, rows[r]));
    Values::Codes(by_column, scales)
}

/// Stores the scales of the panel's columns, and returns one over those of the thread's.
fn scale(
    k: &mut Assembler,
    place: &Place,
    recipe: Recipe,
    values: &Values,
    (scales, pitch, block): (Reg<B64>, Reg<B32>, Reg<B32>),
    (columns, rows): (Reg<B32>, Reg<B32>),
) -> Vec<Reg<F32>> {
    let (num_columns, num_warps) = (8 * place.width, BLOCK as usize / 32);
    let maxima = k.shared(16, "maxima", 4 * num_columns * num_warps);
    let inverses = k.shared(16, "inverses", 4 * num_columns);
    let (maxima, inverses, tid) = (special(k, &maxima), special(k, &inverses), special(k, "%tid.x"));
    let (at, lane, low, skip) = (k.reg::<B32>(), k.reg::<B32>(), k.reg::<Pred>(), k.label("scaled"));
    let most: Vec<Reg<F32>> = (0..place.width)
        .map(|j| {
            let (x, _) = values.column(k, recipe, j);
            let most = amax(k, &x);
            share_max(k, most, &[8, 16]);
            most
        })
        .collect();
    // The first eight lanes write the warp's.
    ptx!(k, "and.b32 {lane}, {tid}, 31;");
    ptx!(k, "setp.lt.u32 {low}, {lane}, 8;");
    ptx!(k, "shr.u32 {at}, {tid}, 5;");
    ptx!(k, "mad.lo.u32 {at}, {at}, {}, {maxima};", 4 * num_columns);
    ptx!(k, "mad.lo.u32 {at}, {}, {}, {at};", place.c, 4 * place.width);
    for (part, most) in most.chunks(4).enumerate() {
        ptx!(k, "@{low} st.shared.v4.f32 [{at}+{}], {};", 16 * part, vector(most));
    }
    ptx!(k, "bar.sync 0;");
    let (mine, out) = (k.reg::<Pred>(), k.reg::<B32>());
    ptx!(k, "setp.ge.u32 {mine}, {tid}, {num_columns};");
    ptx!(k, "@{mine} bra {skip};");
    ptx!(k, "mad.lo.u32 {out}, {tid}, 4, {maxima};");
    let all = k.regs::<F32>(num_warps);
    for (w, x) in all.iter().enumerate() {
        ptx!(k, "ld.shared.f32 {x}, [{out}+{}];", 4 * num_columns * w);
    }
    let all = amax(k, &all);
    let (scale, inverse) = recipe.scale(k, all);
    ptx!(k, "mad.lo.u32 {out}, {tid}, 4, {inverses};");
    ptx!(k, "st.shared.f32 [{out}], {inverse};");
    let (column, there, none) = (k.reg::<B32>(), k.reg::<Pred>(), k.reg::<Pred>());
    ptx!(k, "setp.eq.u32 {none}, {rows}, 0;");
    ptx!(k, "selp.f32 {scale}, 0f3F800000, {scale}, {none};");
    ptx!(k, "add.u32 {column}, {}, {tid};", place.first_column);
    ptx!(k, "setp.lt.u32 {there}, {column}, {columns};");
    let to = row(k, scales, block, pitch, DType::F32);
    let to = element(k, to, column, DType::F32);
    ptx!(k, "@{there} st.global.f32 [{to}], {scale};");
    k.place(&skip);
    ptx!(k, "bar.sync 0;");
    ptx!(k, "mad.lo.u32 {at}, {}, {}, {inverses};", place.c, 4 * place.width);
    let mine = k.regs::<F32>(place.width);
    for (part, x) in mine.chunks(4).enumerate() {
        ptx!(k, "ld.shared.v4.f32 {}, [{at}+{}];", vector(x), 16 * part);
    }
    mine
}
