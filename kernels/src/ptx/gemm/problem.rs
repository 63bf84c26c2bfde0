//! What a product is, and what of it a kernel's text depends on: shared by all kernels of [`super`].

use serde::{Deserialize, Serialize};

use super::super::{Arg, Kernel, Launch};
use crate::{dtype::DType, tensor::Tensor};

/// How the operands of C_mn = A_mk B_kn lie.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub enum Layout {
    /// A [m, k], B [n, k].
    Nt,
    /// A [m, k], B [k, n].
    Nn,
    /// A [k, m], B [k, n].
    Tn,
}

impl Layout {
    /// Whether A is contiguous along k.
    pub(in crate::ptx) fn a_k_major(self) -> bool {
        self != Layout::Tn
    }

    /// Whether B is contiguous along k.
    pub(in crate::ptx) fn b_k_major(self) -> bool {
        self == Layout::Nt
    }
}

/// A matrix in a tensor: element (r, c) is at `r * stride + c` from its first.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Matrix {
    /// Where it begins.
    pub tensor: Tensor,
    /// Elements from row to row.
    pub stride: u32,
}

impl Matrix {
    /// With so many elements from row to row.
    pub fn new(tensor: Tensor, stride: usize) -> Self {
        Matrix { tensor, stride: stride as u32 }
    }

    /// Whether each row begins at 16 bytes (buffers do) and has whole pieces of 16 bytes.
    pub(in crate::ptx) fn is_wide(&self, cols: u32) -> bool {
        let size = self.tensor.dtype.size_bytes() as u64;
        [self.tensor.offset, self.stride.into(), cols.into()].iter().all(|x| (x * size).is_multiple_of(16))
    }
}

/// Which parts of a product belong to which expert.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Groups {
    /// One product.
    One,
    /// Rows `offsets[e]..offsets[e + 1]` of A and C are multiplied with the e-th B. Rows past the last offset are left alone.
    Rows {
        /// U32 \[groups + 1\], ascending from 0.
        offsets: Tensor,
        /// How many.
        num: u32,
    },
    /// The first `counts[e]` of the `capacity` rows from `e * capacity` on, of A and C, are multiplied with the e-th B.
    MaskedRows {
        /// U32 \[groups\].
        counts: Tensor,
        /// How many.
        num: u32,
        /// Rows of each.
        capacity: u32,
    },
    /// The e-th C is the product over the part `offsets[e]..offsets[e + 1]` of k.
    Inner {
        /// U32 \[groups + 1\], ascending from 0.
        offsets: Tensor,
        /// How many.
        num: u32,
    },
    /// The e-th C is the product over the first `counts[e]` of the `capacity` elements of k from `e * capacity` on.
    MaskedInner {
        /// U32 \[groups\].
        counts: Tensor,
        /// How many.
        num: u32,
        /// Elements of k of each.
        capacity: u32,
    },
    /// The e-th C is the product over `offsets[e + 1] - offsets[e]` elements of k from a multiple of 128 on, which all groups
    /// before it leave free for it; the rest up to the next multiple holds zeros.
    PaddedInner {
        /// U32 \[groups + 1\], ascending from 0.
        offsets: Tensor,
        /// How many.
        num: u32,
    },
}

impl Groups {
    /// How many; 1 of one product.
    pub(in crate::ptx) fn num(&self) -> u32 {
        match *self {
            Groups::One => 1,
            Groups::Rows { num, .. }
            | Groups::MaskedRows { num, .. }
            | Groups::Inner { num, .. }
            | Groups::MaskedInner { num, .. }
            | Groups::PaddedInner { num, .. } => num,
        }
    }

    fn kind(&self) -> Kind {
        match self {
            Groups::One => Kind::One,
            Groups::Rows { .. } => Kind::Rows { masked: false },
            Groups::MaskedRows { .. } => Kind::Rows { masked: true },
            Groups::Inner { .. } => Kind::Inner { masked: false },
            Groups::MaskedInner { .. } => Kind::Inner { masked: true },
            Groups::PaddedInner { .. } => Kind::PaddedInner,
        }
    }
}

/// [`Groups`] as far as a kernel's text depends on it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub(in crate::ptx) enum Kind {
    One,
    Rows {
        masked: bool,
    },
    Inner {
        masked: bool,
    },
    /// The parts of k are whole tiles of 128.
    PaddedInner,
}

impl Kind {
    /// Whether each group has a part of k and a C of its own.
    pub(in crate::ptx) fn is_inner(self) -> bool {
        matches!(self, Kind::Inner { .. } | Kind::PaddedInner)
    }
}

/// C_mn = A_mk B_kn (+ bias_n), or D_mn + A_mk B_kn.
#[derive(Clone, Copy, Debug)]
pub struct Problem {
    /// How A and B lie.
    pub layout: Layout,
    /// Rows of C; where rows are grouped, of all groups, room included.
    pub m: u32,
    /// Columns of C.
    pub n: u32,
    /// Inner size; where it is grouped, of all groups, room included.
    pub k: u32,
    /// f32 or bf16.
    pub a: Matrix,
    /// Of A's type; where rows are grouped, the matrices of all groups, one after another.
    pub b: Matrix,
    /// f32 or bf16; where k is grouped, the matrices of all groups, one after another.
    pub c: Matrix,
    /// Of C's type, \[n\]; not with `addend`.
    pub bias: Option<Tensor>,
    /// D, of C's type and with its rows: C's own tensor, to add to what is there, or one that shares no byte with C.
    pub addend: Option<Tensor>,
    /// Experts.
    pub groups: Groups,
}

impl Problem {
    /// Assigns one product of sizes [m, n, k] from (a, b) to c.
    pub fn new(layout: Layout, [m, n, k]: [usize; 3], (a, b, c): (Matrix, Matrix, Matrix)) -> Self {
        let [m, n, k] = [m, n, k].map(|x| x as u32);
        Problem { layout, m, n, k, a, b, c, bias: None, addend: None, groups: Groups::One }
    }

    /// F of a layer, without what is added to it: `y_to = x_ti w_oi^T`.
    pub fn forward(x: Tensor, w: Tensor, y: Tensor) -> Self {
        let (o, i) = (w.dim(0), w.dim(1));
        let operands = (Matrix::new(x, i), Matrix::new(w, i), Matrix::new(y, o));
        Problem::new(Layout::Nt, [x.len() / i.max(1), o, i], operands)
    }

    /// I of a layer, assigned: `dx_ti = dy_to w_oi`.
    pub fn input_grad(dy: Tensor, w: Tensor, dx: Tensor) -> Self {
        let (o, i) = (w.dim(0), w.dim(1));
        let operands = (Matrix::new(dy, o), Matrix::new(w, i), Matrix::new(dx, i));
        Problem::new(Layout::Nn, [dx.len() / i.max(1), i, o], operands)
    }

    /// W of a layer: `dw_oi += dy_to^T x_ti`.
    pub fn weight_grad(dy: Tensor, x: Tensor, dw: Tensor) -> Self {
        let (o, i) = (dw.dim(0), dw.dim(1));
        let operands = (Matrix::new(dy, o), Matrix::new(x, i), Matrix::new(dw, i));
        Problem { addend: Some(dw), ..Problem::new(Layout::Tn, [o, i, x.len() / i.max(1)], operands) }
    }

    /// Whether there is nothing to do.
    pub(in crate::ptx) fn is_empty(&self) -> bool {
        self.m == 0 || self.n == 0 || self.groups.num() == 0 || (self.k == 0 && self.adds_in_place())
    }

    /// Whether C is added to, so that what has no k can be left as it is.
    pub(in crate::ptx) fn adds_in_place(&self) -> bool {
        self.addend == Some(self.c.tensor)
    }

    /// What a kernel's text depends on.
    pub(in crate::ptx) fn spec(&self) -> Spec {
        let (a_cols, b_cols) = match self.layout {
            Layout::Nt => (self.k, self.k),
            Layout::Nn => (self.k, self.n),
            Layout::Tn => (self.m, self.n),
        };
        let b_wide = self.b.is_wide(b_cols)
            && (u64::from(self.group_stride()) * self.b.tensor.dtype.size_bytes() as u64).is_multiple_of(16);
        let bias_wide = self.bias.is_none_or(|bias| Matrix::new(bias, 0).is_wide(self.n));
        let addend_wide = self.addend.is_none_or(|tensor| Matrix { tensor, ..self.c }.is_wide(self.n));
        Spec {
            layout: self.layout,
            kind: self.groups.kind(),
            input: self.a.tensor.dtype,
            output: self.c.tensor.dtype,
            addend: self.addend.is_some(),
            bias: self.bias.is_some(),
            wide: [self.a.is_wide(a_cols), b_wide, self.c.is_wide(self.n) && bias_wide && addend_wide],
        }
    }

    /// Elements from one group's weight (B of grouped rows, C of grouped k) to the next.
    pub(in crate::ptx) fn group_stride(&self) -> u32 {
        let rows = match (self.groups.kind(), self.layout) {
            (Kind::One, _) => return 0,
            (Kind::Rows { .. }, Layout::Nt) => self.n,
            (Kind::Rows { .. }, _) => self.k,
            (Kind::Inner { .. } | Kind::PaddedInner, _) => return self.m * self.c.stride,
        };
        rows * self.b.stride
    }

    /// As many tiles of bm x bn as there could be.
    pub(in crate::ptx) fn max_tiles(&self, bm: u32, bn: u32) -> u32 {
        let num = self.groups.num();
        let down = match self.groups {
            Groups::One => self.m.div_ceil(bm),
            // Each group with rows has at most one tile that is not full.
            Groups::Rows { .. } => (u64::from(self.m) + u64::from(num.min(self.m)) * u64::from(bm - 1)) as u32 / bm,
            Groups::MaskedRows { capacity, .. } => num * capacity.div_ceil(bm),
            Groups::Inner { .. } | Groups::MaskedInner { .. } | Groups::PaddedInner { .. } => num * self.m.div_ceil(bm),
        };
        down * self.n.div_ceil(bn)
    }

    /// Whether tiles of bm x bn are so many that they occupy a device.
    pub(in crate::ptx) fn has_many(&self, bm: u32, bn: u32) -> bool {
        const MANY: u32 = 128;
        self.max_tiles(bm, bn) >= MANY
    }

    /// A kernel that has one block for a tile of bm x bn, and no tensor maps.
    pub(in crate::ptx) fn launch(&self, kernel: Kernel, bm: u32, bn: u32) -> Launch {
        let mut args = vec![Arg::Tensor(self.a.tensor), Arg::Tensor(self.b.tensor)];
        args.extend(self.args_after_operands());
        Launch { kernel, grid: [self.max_tiles(bm, bn), 1, 1], args }
    }

    /// Arguments in the order of [`Params::declare`], after a and b.
    pub(in crate::ptx) fn args_after_operands(&self) -> Vec<Arg> {
        let mut args = vec![Arg::Tensor(self.c.tensor)];
        args.extend([self.addend, self.bias].into_iter().flatten().map(Arg::Tensor));
        args.extend([self.m, self.n, self.k, self.a.stride, self.b.stride, self.c.stride].map(Arg::U32));
        let (table, num, capacity) = match self.groups {
            Groups::One => return args,
            Groups::Rows { offsets, num } | Groups::Inner { offsets, num } | Groups::PaddedInner { offsets, num } => {
                (offsets, num, 0)
            }
            Groups::MaskedRows { counts, num, capacity } | Groups::MaskedInner { counts, num, capacity } => {
                (counts, num, capacity)
            }
        };
        args.push(Arg::Tensor(table));
        args.extend([num, capacity, self.group_stride()].map(Arg::U32));
        args
    }
}

/// What a kernel's text depends on, besides its tile.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in crate::ptx) struct Spec {
    pub layout: Layout,
    pub kind: Kind,
    pub input: DType,
    pub output: DType,
    pub addend: bool,
    pub bias: bool,
    /// Whether a, b and c are moved in pieces of 16 bytes.
    pub wide: [bool; 3],
}

impl Spec {
    /// `bf16_nt_rows_f32_add_bias_w101`, say: input, layout, groups, output if it is another, how it is written, what is wide.
    pub fn name(&self) -> String {
        let mut name = format!("{}_{}", self.input.name(), format!("{:?}", self.layout).to_lowercase());
        name += match self.kind {
            Kind::One => "",
            Kind::Rows { masked: false } => "_rows",
            Kind::Rows { masked: true } => "_maskedrows",
            Kind::Inner { masked: false } => "_inner",
            Kind::Inner { masked: true } => "_maskedinner",
            Kind::PaddedInner => "_paddedinner",
        };
        if self.output != self.input {
            name += &format!("_{}", self.output.name());
        }
        name += if self.addend { "_add" } else { "" };
        name += if self.bias { "_bias" } else { "" };
        if self.wide != [true; 3] {
            name += "_w";
            name.extend(self.wide.map(|w| if w { '1' } else { '0' }));
        }
        name
    }
}
