//! How a block finds its tile of a product, and the parameters it does so by: shared by all kernels of [`super`].
//!
//! Tiles are numbered through all groups; within a group, [`BAND`] tiles down, then to the right, so that blocks which run
//! at one time share operands in L2. Where rows are grouped, the number of tiles of a group follows from its count on the device:
//! a warp reads 32 counts at a time, sums the tiles before each by shuffles, and finds the group that the block's number lies in.
//! The host launches as many blocks as there could be; those past the end leave.
//!
//! Parameters of every kernel: a, b (addresses or tensor maps), c, [addend, with c's rows,] [bias], m, n, k, lda, ldb, ldc (in elements), and of grouped
//! ones also the table of u32, number of groups, capacity, and elements from one group's weight to the next.

use super::{
    super::asm::{Assembler, B32, B64, Label, Pred, Reg},
    problem::{Kind, Spec},
};
use crate::ptx;

/// The parameters, loaded.
pub(in crate::ptx) struct Params {
    /// Addresses, or of tensor maps.
    pub a: Reg<B64>,
    pub b: Reg<B64>,
    pub c: Reg<B64>,
    pub addend: Option<Reg<B64>>,
    pub bias: Option<Reg<B64>>,
    pub m: Reg<B32>,
    pub n: Reg<B32>,
    pub k: Reg<B32>,
    pub lda: Reg<B32>,
    pub ldb: Reg<B32>,
    pub ldc: Reg<B32>,
    table: Option<Table>,
}

struct Table {
    at: Reg<B64>,
    num: Reg<B32>,
    capacity: Reg<B32>,
    stride: Reg<B32>,
}

impl Params {
    /// Declares and loads them; a and b are `operand`s.
    pub fn declare(k: &mut Assembler, spec: &Spec, operand: fn(&mut Assembler, &str) -> Reg<B64>) -> Self {
        let (a, b, c) = (operand(k, "a"), operand(k, "b"), k.pointer("c"));
        let addend = spec.addend.then(|| k.pointer("addend"));
        let bias = spec.bias.then(|| k.pointer("bias"));
        let [m, n, inner, lda, ldb, ldc] = ["m", "n", "k", "lda", "ldb", "ldc"].map(|name| k.u32(name));
        let table = (spec.kind != Kind::One).then(|| Table {
            at: k.pointer("groups"),
            num: k.u32("num_groups"),
            capacity: k.u32("capacity"),
            stride: k.u32("group_stride"),
        });
        Params { a, b, c, addend, bias, m, n, k: inner, lda, ldb, ldc, table }
    }

    /// Bytes from an element of C to the addend's, if there is one: the same for all, since their rows are alike.
    pub fn to_addend(&self, k: &mut Assembler) -> Option<Reg<B64>> {
        self.addend.map(|addend| {
            let bytes = k.reg::<B64>();
            ptx!(k, "sub.u64 {bytes}, {addend}, {};", self.c);
            bytes
        })
    }

    /// Moves `base`, of elements of so many bytes, to the weight of `group`.
    pub fn to_group(&self, k: &mut Assembler, base: Reg<B64>, group: Reg<B32>, size: usize) -> Reg<B64> {
        let Some(table) = &self.table else { return base };
        let at = k.reg::<B64>();
        ptx!(k, "mul.wide.u32 {at}, {group}, {};", table.stride);
        ptx!(k, "mad.lo.u64 {at}, {at}, {size}, {base};");
        at
    }
}

/// Tiles down a band.
const BAND: u32 = 8;

/// Where a tile is: registers that [`Finder::find`] sets.
#[derive(Clone, Copy)]
pub(in crate::ptx) struct Place {
    /// Which group.
    pub group: Reg<B32>,
    /// The group's first row in A and C, and how many it has.
    pub first_row: Reg<B32>,
    pub rows: Reg<B32>,
    /// The group's first element of k, and how many it has.
    pub first_k: Reg<B32>,
    pub inner: Reg<B32>,
    /// The tile's first row in its group, and first column.
    pub m0: Reg<B32>,
    pub n0: Reg<B32>,
}

/// Finds tiles by number; numbers ascend from call to call.
pub(in crate::ptx) struct Finder {
    kind: Kind,
    bm: u32,
    bn: u32,
    tiles_right: Reg<B32>,
    lane: Reg<B32>,
    /// The first group of the 32 last looked at, and tiles before it.
    base: Reg<B32>,
    before: Reg<B32>,
    place: Place,
}

impl Finder {
    /// For tiles of bm x bn; emits what is done once.
    pub fn new(k: &mut Assembler, spec: &Spec, params: &Params, bm: u32, bn: u32) -> Self {
        let [tiles_right, lane, base, before] = [(); 4].map(|()| k.reg::<B32>());
        ptx!(k, "add.u32 {tiles_right}, {}, {};", params.n, bn - 1);
        ptx!(k, "div.u32 {tiles_right}, {tiles_right}, {bn};");
        ptx!(k, "mov.u32 {lane}, %tid.x;");
        ptx!(k, "and.b32 {lane}, {lane}, 31;");
        ptx!(k, "mov.u32 {base}, 0;");
        ptx!(k, "mov.u32 {before}, 0;");
        let [group, first_row, first_k, m0, n0] = [(); 5].map(|()| k.reg::<B32>());
        ptx!(k, "mov.u32 {group}, 0;");
        ptx!(k, "mov.u32 {first_row}, 0;");
        ptx!(k, "mov.u32 {first_k}, 0;");
        let (mut rows, mut inner) = (params.m, params.k);
        match spec.kind {
            Kind::One => {}
            Kind::Rows { .. } => rows = k.reg(),
            Kind::Inner { .. } | Kind::PaddedInner => inner = k.reg(),
        }
        let place = Place { group, first_row, rows, first_k, inner, m0, n0 };
        Finder { kind: spec.kind, bm, bn, tiles_right, lane, base, before, place }
    }

    /// Sets the place of tile `number`, or goes to `past_end`. All threads of a warp together.
    pub fn find(&self, k: &mut Assembler, params: &Params, number: Reg<B32>, past_end: &Label) -> Place {
        let (local, tiles_down) = (k.reg::<B32>(), k.reg::<B32>());
        match (self.kind, &params.table) {
            (Kind::Rows { masked }, Some(table)) => {
                self.find_rows(k, table, masked, number, local, past_end);
                ptx!(k, "add.u32 {tiles_down}, {}, {};", self.place.rows, self.bm - 1);
                ptx!(k, "div.u32 {tiles_down}, {tiles_down}, {};", self.bm);
            }
            (kind, table) => {
                let (past, per_group) = (k.reg::<Pred>(), k.reg::<B32>());
                ptx!(k, "add.u32 {tiles_down}, {}, {};", params.m, self.bm - 1);
                ptx!(k, "div.u32 {tiles_down}, {tiles_down}, {};", self.bm);
                ptx!(k, "mul.lo.u32 {per_group}, {tiles_down}, {};", self.tiles_right);
                if let Some(table) = table {
                    let Place { group, first_k, inner, .. } = self.place;
                    ptx!(k, "div.u32 {group}, {number}, {per_group};");
                    ptx!(k, "rem.u32 {local}, {number}, {per_group};");
                    ptx!(k, "setp.ge.u32 {past}, {group}, {};", table.num);
                    ptx!(k, "@{past} bra {past_end};");
                    match kind {
                        Kind::Inner { masked } => read_group(k, table, masked, group, first_k, inner, None),
                        _ => self.find_padded(k, table),
                    }
                } else {
                    ptx!(k, "mov.u32 {local}, {number};");
                    ptx!(k, "setp.ge.u32 {past}, {number}, {per_group};");
                    ptx!(k, "@{past} bra {past_end};");
                }
            }
        }
        self.place_in_group(k, local, tiles_down);
        self.place
    }

    /// Tile `local` of a group: down a band, then to the right, then the next band.
    fn place_in_group(&self, k: &mut Assembler, local: Reg<B32>, tiles_down: Reg<B32>) {
        let Place { m0, n0, .. } = self.place;
        let [per_band, band, height] = [(); 3].map(|()| k.reg::<B32>());
        ptx!(k, "mul.lo.u32 {per_band}, {}, {BAND};", self.tiles_right);
        ptx!(k, "div.u32 {band}, {local}, {per_band};");
        ptx!(k, "rem.u32 {local}, {local}, {per_band};");
        ptx!(k, "mul.lo.u32 {band}, {band}, {BAND};");
        ptx!(k, "sub.u32 {height}, {tiles_down}, {band};");
        ptx!(k, "min.u32 {height}, {height}, {BAND};");
        ptx!(k, "rem.u32 {m0}, {local}, {height};");
        ptx!(k, "add.u32 {m0}, {m0}, {band};");
        ptx!(k, "mul.lo.u32 {m0}, {m0}, {};", self.bm);
        ptx!(k, "div.u32 {n0}, {local}, {height};");
        ptx!(k, "mul.lo.u32 {n0}, {n0}, {};", self.bn);
    }

    /// Reads the count of `group`, and sums the tiles of k of groups from the last one found to it: a warp 32 of them at a time.
    fn find_padded(&self, k: &mut Assembler, table: &Table) {
        let Finder { lane, base, before, .. } = *self;
        let Place { group, first_k, inner, .. } = self.place;
        let (again, q) = (k.label("GROUPS"), k.reg::<Pred>());
        let [e, start, tiles] = [(); 3].map(|()| k.reg::<B32>());
        k.place(&again);
        ptx!(k, "add.u32 {e}, {base}, {lane};");
        ptx!(k, "setp.lt.u32 {q}, {e}, {group};");
        read_group(k, table, false, e, start, tiles, Some(q));
        ptx!(k, "add.u32 {tiles}, {tiles}, 127;");
        ptx!(k, "shr.u32 {tiles}, {tiles}, 7;");
        ptx!(k, "redux.sync.add.u32 {tiles}, {tiles}, 0xffffffff;");
        ptx!(k, "add.u32 {before}, {before}, {tiles};");
        ptx!(k, "add.u32 {base}, {base}, 32;");
        ptx!(k, "setp.lt.u32 {q}, {base}, {group};");
        ptx!(k, "@{q} bra {again};");
        ptx!(k, "mov.u32 {base}, {group};");
        read_group(k, table, false, group, start, inner, None);
        ptx!(k, "shl.b32 {first_k}, {before}, 7;");
    }

    fn find_rows(
        &self,
        k: &mut Assembler,
        table: &Table,
        masked: bool,
        number: Reg<B32>,
        local: Reg<B32>,
        past_end: &Label,
    ) {
        let Finder { lane, base, before, .. } = *self;
        let Place { group, first_row, rows, .. } = self.place;
        let (again, found) = (k.label("GROUPS"), k.label("FOUND"));
        let [e, start, count, tiles, through, other, which] = [(); 7].map(|()| k.reg::<B32>());
        let q = k.reg::<Pred>();
        k.place(&again);
        ptx!(k, "add.u32 {e}, {base}, {lane};");
        ptx!(k, "setp.lt.u32 {q}, {e}, {};", table.num);
        read_group(k, table, masked, e, start, count, Some(q));
        ptx!(k, "add.u32 {tiles}, {count}, {};", self.bm - 1);
        ptx!(k, "div.u32 {tiles}, {tiles}, {};", self.bm);
        ptx!(k, "mul.lo.u32 {tiles}, {tiles}, {};", self.tiles_right);
        ptx!(k, "mov.u32 {through}, {tiles};");
        for distance in [1, 2, 4, 8, 16] {
            ptx!(k, "shfl.sync.up.b32 {other}, {through}, {distance}, 0, 0xffffffff;");
            ptx!(k, "setp.ge.u32 {q}, {lane}, {distance};");
            ptx!(k, "@{q} add.u32 {through}, {through}, {other};");
        }
        ptx!(k, "add.u32 {through}, {through}, {before};");
        ptx!(k, "setp.le.u32 {q}, {through}, {number};");
        ptx!(k, "selp.u32 {which}, 1, 0, {q};");
        ptx!(k, "redux.sync.add.u32 {which}, {which}, 0xffffffff;");
        ptx!(k, "setp.lt.u32 {q}, {which}, 32;");
        ptx!(k, "@{q} bra {found};");
        ptx!(k, "shfl.sync.idx.b32 {before}, {through}, 31, 31, 0xffffffff;");
        ptx!(k, "add.u32 {base}, {base}, 32;");
        ptx!(k, "setp.lt.u32 {q}, {base}, {};", table.num);
        ptx!(k, "@{q} bra {again};");
        ptx!(k, "bra {past_end};");
        k.place(&found);
        ptx!(k, "sub.u32 {through}, {through}, {tiles};");
        for (to, from) in [(local, through), (first_row, start), (rows, count)] {
            ptx!(k, "shfl.sync.idx.b32 {to}, {from}, {which}, 31, 0xffffffff;");
        }
        ptx!(k, "sub.u32 {local}, {number}, {local};");
        ptx!(k, "add.u32 {group}, {base}, {which};");
    }
}

/// Reads a group's first element and count; where `only` is false, both are 0.
fn read_group(
    k: &mut Assembler,
    table: &Table,
    masked: bool,
    group: Reg<B32>,
    first: Reg<B32>,
    count: Reg<B32>,
    only: Option<Reg<Pred>>,
) {
    let at = k.reg::<B64>();
    let guard = only.map_or(String::new(), |q| format!("@{q} "));
    ptx!(k, "mad.wide.u32 {at}, {group}, 4, {};", table.at);
    ptx!(k, "mov.u32 {count}, 0;");
    if masked {
        ptx!(k, "{guard}ld.global.u32 {count}, [{at}];");
        ptx!(k, "mul.lo.u32 {first}, {group}, {};", table.capacity);
    } else {
        ptx!(k, "mov.u32 {first}, 0;");
        ptx!(k, "{guard}ld.global.u32 {first}, [{at}];");
        ptx!(k, "{guard}ld.global.u32 {count}, [{at}+4];");
        ptx!(k, "sub.u32 {count}, {count}, {first};");
    }
}
