//! A cache of latents in FP8: rows of bytes ([`crate::ops::mla::fp8_row`]), written and read.
//!
//! Eight lanes have a tile of 128 numbers, 16 neighbours each, and a warp the same tile of four rows, as in [`super::quantize`]. No shared
//! memory, no barrier.
//! - encode (latent, cache, rows, columns, tiles, pitch, scales_at: u32): a new token's latent to codes and scales, by the recipe of
//!   [`crate::fp8`] to the bit. Its rotated key is [`super::latent`]'s.
//! - decode (cache, y, pages, rows, c, r, tiles, all, pitch, scales_at, key_at, shift, mask: u32): the rows of a sequence, on whatever
//!   pages, as numbers one after the other. Every number is exact in bf16 too. `all` are the tiles of a row with those of its key part.
//!
//! Time: bytes over memory bandwidth. DeepSeek-V3's row is 656 bytes in and 1,152 out, where a copy of scattered bf16 rows moves
//! 1,152 both ways.

use super::{
    Arg, Kernel, Launch,
    asm::{B32, F32, Pred, vector},
    dequantize::{load_bytes, numbers},
    golden::Variant,
    paged::{page_table, row_of},
    parts::{count, element, row},
    quantize::{
        Recipe, aligned,
        rows::{COLUMNS, Slot, grid, place},
    },
};
use crate::{
    dtype::DType,
    fp8::TILE,
    ops::{
        mla::fp8_row::Fp8Row,
        paged::{Sequence, Sequences},
    },
    ptx,
    tensor::Tensor,
};

/// Writes codes and scales of the latents [m, c] to rows U8 [m, bytes].
pub(super) fn encode(latent: Tensor, rows: Tensor, layout: Fp8Row, recipe: Recipe) -> Vec<Launch> {
    let (m, c) = (latent.rows(), latent.cols());
    if m * c == 0 {
        return vec![];
    }
    let wide = aligned(&[latent], COLUMNS) && aligned(&[rows], 1);
    let num_tiles = c.div_ceil(TILE);
    let mut args = [latent, rows].map(Arg::Tensor).to_vec();
    args.extend([m, c, num_tiles, layout.bytes(), layout.scales_at()].map(|n| Arg::U32(count(n))));
    vec![Launch { kernel: encode_kernel(latent.dtype, wide, recipe), grid: grid(m, num_tiles), args }]
}

/// The rows of a sequence as numbers of `dtype` [len, c + r], in scratch `slot`, and what brings them there.
pub(super) fn rows(
    cache: (Tensor, Fp8Row, Recipe),
    dtype: DType,
    of: (&Sequences, &Sequence),
    slot: u8,
) -> (Arg, Vec<Launch>) {
    let (Fp8Row { c, r }, len) = (cache.1, of.1.len());
    let y = Arg::Scratch { slot, bytes: (len * (c + r) * dtype.size_bytes()) as u64 };
    (y.clone(), decode(cache, of, y, dtype))
}

fn decode(
    (cache, layout, recipe): (Tensor, Fp8Row, Recipe),
    (sequences, sequence): (&Sequences, &Sequence),
    y: Arg,
    dtype: DType,
) -> Vec<Launch> {
    let (Fp8Row { c, r }, len) = (layout, sequence.len());
    let (tiles, all) = (c.div_ceil(TILE), c.div_ceil(TILE) + r.div_ceil(TILE));
    if len * all == 0 {
        return vec![];
    }
    let wide = aligned(&[cache], 1) && [c, r, layout.key_at()].iter().all(|n| n.is_multiple_of(COLUMNS));
    let (pages, of_page) = page_table(sequences, sequence);
    let mut args = vec![Arg::Tensor(cache), y, pages];
    let offsets = [layout.bytes(), layout.scales_at(), layout.key_at()];
    args.extend([len, c, r, tiles, all].into_iter().chain(offsets).map(|n| Arg::U32(count(n))));
    args.extend(of_page);
    vec![Launch { kernel: decode_kernel(dtype, wide, recipe), grid: grid(len, all), args }]
}

fn columns(wide: bool) -> usize {
    if wide { COLUMNS } else { 1 }
}

fn encode_kernel(dtype: DType, wide: bool, recipe: Recipe) -> Kernel {
    let name = format!("latent_encode_{}_x{}", dtype.name(), columns(wide));
    recipe.kernel(&name, move |k| {
        let (x, cache) = (k.pointer("latent"), k.pointer("cache"));
        let [rows, columns, tiles] = ["rows", "columns", "tiles"].map(|name| k.u32(name));
        let (pitch, scales_at) = (k.u32("pitch"), k.u32("scales_at"));
        let (index, tile, there) = place(k, rows, tiles);
        let slot = Slot::new(k, wide, tile, columns, there);
        let x = row(k, x, index, columns, dtype);
        let values = slot.load(k, x, dtype);
        let to = row(k, cache, index, pitch, DType::U8);
        let scale = slot.quantize(k, recipe, &values, to);
        let to = element(k, to, scales_at, DType::U8);
        let to = element(k, to, tile, DType::F32);
        slot.store_scale(k, to, scale, "f32");
    })
}

fn decode_kernel(dtype: DType, wide: bool, recipe: Recipe) -> Kernel {
    let name = format!("latent_decode_{}_x{}", dtype.name(), columns(wide));
    recipe.kernel(&name, move |k| {
        let [cache, y, pages] = ["cache", "y", "pages"].map(|name| k.pointer(name));
        let [rows, c, r, tiles, all] = ["rows", "c", "r", "tiles", "all"].map(|name| k.u32(name));
        let [pitch, scales_at, key_at] = ["pitch", "scales_at", "key_at"].map(|name| k.u32(name));
        let (shift, mask) = (k.u32("shift"), k.u32("mask"));
        let (index, tile, there) = place(k, rows, all);
        let (end, key) = (k.label("end"), k.label("key"));
        // No lane waits for another.
        ptx!(k, "@!{there} bra {end};");
        k.note("row `index & mask` of its page");
        let from = row_of(k, pages, index, [shift, mask]);
        let (width, in_key) = (k.reg::<B32>(), k.reg::<Pred>());
        let from = row(k, cache, from, pitch, DType::U8);
        ptx!(k, "add.u32 {width}, {c}, {r};");
        let to = row(k, y, index, width, dtype);
        ptx!(k, "setp.ge.u32 {in_key}, {tile}, {tiles};");
        ptx!(k, "@{in_key} bra {key};");

        k.note("a tile of codes");
        let slot = Slot::neighbours(k, wide, tile, c, there);
        let (inside, scale) = (slot.there(k, 0), k.reg::<F32>());
        ptx!(k, "@!{inside} bra {end};");
        let at = element(k, from, scales_at, DType::U8);
        let at = element(k, at, tile, DType::F32);
        ptx!(k, "ld.global.f32 {scale}, [{at}];");
        let at = element(k, from, slot.first, DType::U8);
        let words = k.regs::<B32>(COLUMNS / 4);
        if wide {
            ptx!(k, "ld.global.v4.b32 {}, [{at}];", vector(&words));
        } else {
            load_bytes(k, at, &slot, &words);
        }
        let values = words.iter().flat_map(|word| numbers(k, *word, scale, recipe)).collect();
        slot.store(k, to, values, dtype);
        ptx!(k, "bra {end};");

        k.place(&key);
        k.note("128 numbers of the key part, as they are");
        ptx!(k, "sub.u32 {tile}, {tile}, {tiles};");
        let slot = Slot::neighbours(k, wide, tile, r, there);
        let inside = slot.there(k, 0);
        ptx!(k, "@!{inside} bra {end};");
        let from = element(k, from, key_at, DType::U8);
        let values = slot.load(k, from, DType::Bf16);
        let to = element(k, to, c, dtype);
        slot.store(k, to, values, dtype);
        k.place(&end);
    })
}

/// What is committed: DeepSeek-V3's latents.
pub fn variants() -> Vec<Variant> {
    let [_, pow2, _] = Recipe::committed();
    vec![
        Variant::new(encode_kernel(DType::Bf16, true, pow2), 40),
        Variant::new(decode_kernel(DType::Bf16, true, pow2), 40),
    ]
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        device::{Share, Target},
        fp8::Scaling,
        memory::Memory,
        ops::{
            mla::latent::{self as cpu, Prefill},
            rope::{Pairs, Rope, RopeTable},
            testing::random,
        },
        ptx::{
            case::{Case, Data},
            latent,
        },
    };
    use DType::{Bf16, F32, U8};

    /// DeepSeek-V3's, in whole pieces of 16 bytes; and element by element, with a last tile of 2.
    const LAYOUTS: [Fp8Row; 3] = [Fp8Row { c: 512, r: 64 }, Fp8Row { c: 130, r: 6 }, Fp8Row { c: 16, r: 4 }];

    /// By the instruction and by integers.
    fn recipes() -> [Recipe; 2] {
        [(9, 0), (8, 0)].map(|compute| {
            let on = Target { compute, num_sms: 2, shared_bytes: 0, share: Share::All, tuning: None };
            Recipe::new(&on, Scaling::PowerOfTwo)
        })
    }

    /// Two sequences on scattered pages of four rows, of eight.
    fn sequences() -> Sequences {
        let of = |num_new, context, pages: &[u32]| Sequence { num_new, context, pages: pages.into() };
        Sequences::new([of(6, 3, &[5, 0, 2]), of(1, 4, &[1, 3])], 4)
    }

    fn table(m: &Memory, layout: Fp8Row, pairs: Pairs) -> RopeTable {
        Rope { theta: 1e3, dim: layout.r, yarn: None }.table(m, F32, 20, pairs)
    }

    /// Rows that were written, of numbers of all sizes.
    fn cache(layout: Fp8Row) -> Data {
        let bytes: Vec<f64> = (0..32)
            .flat_map(|row| {
                let mut bytes = vec![0xa5; layout.bytes()];
                let size = 2f64.powi(row % 9 - 6);
                let numbers = |n, seed| random(n, seed).into_iter().map(|x| (x * size) as f32).collect::<Vec<_>>();
                layout.encode(&numbers(layout.c, row as u64), &numbers(layout.r, 50 + row as u64), &mut bytes);
                bytes.into_iter().map(f64::from)
            })
            .collect();
        Data(U8, vec![32, layout.bytes()], bytes)
    }

    #[test]
    fn rows_are_written_as_the_cpu_writes_them() {
        for (layout, pairs) in LAYOUTS.into_iter().zip([Pairs::Interleaved, Pairs::HalfSplit, Pairs::Interleaved]) {
            for (dtype, recipe) in [F32, Bf16].into_iter().flat_map(|dtype| recipes().map(|recipe| (dtype, recipe))) {
                let Fp8Row { c, r } = layout;
                let mut latent = Data::random(dtype, &[7, c], 1);
                // Zeros, and a tile with a number that is none.
                latent.2[..c].fill(0.0);
                latent.2[c + 3] = f64::NAN;
                let inputs = [latent, Data::random(dtype, &[7, c + r], 2), Data::poison(U8, &[32, layout.bytes()])];
                Case::new(&inputs)
                    .cpu(|s, x| {
                        let table = table(&s.memory().clone(), layout, pairs);
                        cpu::append(s, x[0], x[1], &table, x[2], &sequences())
                    })
                    .ptx_with(|m, x| latent::append(x[0], x[1], &table(m, layout, pairs), (x[2], recipe), &sequences()))
                    .equal();
            }
        }
    }

    #[test]
    fn rows_come_back_as_the_cpu_reads_them() {
        for (layout, dtype) in LAYOUTS.into_iter().flat_map(|layout| [F32, Bf16].map(|dtype| (layout, dtype))) {
            let (all, width) = (sequences(), layout.c + layout.r);
            for (recipe, (_, sequence)) in recipes().into_iter().zip(all.iter()) {
                let inputs = [cache(layout), Data::poison(dtype, &[sequence.len(), width])];
                let want = |x: &[Vec<f64>]| {
                    let bytes: Vec<u8> = x[0].iter().map(|x| *x as u8).collect();
                    let mut y = vec![0.0; sequence.len() * width];
                    for (position, y) in y.chunks_exact_mut(width).enumerate() {
                        let row = all.table(sequence).row(position);
                        layout.decode(&bytes[row * layout.bytes()..][..layout.bytes()], y);
                    }
                    vec![x[0].clone(), y]
                };
                Case::new(&inputs)
                    .want(want)
                    .ptx(|x| decode((x[0], layout, recipe), (&all, sequence), Arg::Tensor(x[1]), dtype))
                    .equal();
            }
        }
    }

    #[test]
    fn attention_over_rows_of_bytes_is_the_cpus() {
        let (h, n, v) = (2, 4, 6);
        for (layout, dtype) in LAYOUTS.into_iter().flat_map(|layout| [F32, Bf16].map(|dtype| (layout, dtype))) {
            let Fp8Row { c, r } = layout;
            let inputs = [
                Data::random(dtype, &[7, h, n + r], 1),
                Data::random(dtype, &[h * (n + v), c], 2),
                cache(layout),
                Data::poison(dtype, &[7, h, v]),
            ];
            let [recipe, _] = recipes();
            Case::new(&inputs)
                .cpu(|s, t| cpu::forward(s, t[0], t[1], t[2], &sequences(), (0.1, Prefill::Absorbed), t[3]))
                .ptx(|t| latent::forward(t[0], t[1], (t[2], recipe), &sequences(), 0.1, t[3]))
                .close(1e-5);
        }
    }
}
