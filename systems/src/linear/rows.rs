//! What products in 8 bits read: activations as they are kept, and room for operands that live within a task.
//!
//! Legend: t tokens, i inputs, o outputs, r rows, c columns.

use engine::prelude::*;
use kernels::{
    dtype::DType,
    error::Result as OpResult,
    fp8::{Scaling, TILE, Tiles},
    ops::{
        dequantize, e5m6, permute, quantize, rms_norm,
        rounding::{self, Numbers},
        swiglu,
    },
    stream::Stream,
    tensor::Tensor,
};

use crate::{
    lower::{Lowering, Saved},
    model::Weight,
    rounding::{Counter, Operand},
};

/// Activations [t, i], as a linear layer's F and W read them.
#[derive(Clone, Copy, Debug)]
pub enum Rows {
    /// In the type of activations.
    High(Tensor),
    /// In 8 bits; and in a step that is watched, where what is lost by that is counted.
    Fp8(Tiles, Scaling, Option<Watch>),
}

/// How what rounding loses is counted where an op rounds what it makes.
#[derive(Clone, Copy, Debug)]
pub struct Watch {
    counter: Counter,
    /// Room for the numbers before they are rounded, in the type of activations.
    high: Tensor,
    /// Groups that the rows lie in; what is past them is not counted. `None` if all are.
    groups: Option<Tensor>,
}

impl Watch {
    /// Counts what was lost when the numbers in the room became `q`.
    fn count(self, s: &mut Stream, q: Tiles) -> OpResult<()> {
        let counts = self.counter.of(Operand::Activations);
        rounding::tiles(s, Numbers::Float(self.high), q, self.groups, counts)
    }
}

impl Rows {
    fn tensors(self) -> [Option<Tensor>; 2] {
        match self {
            Rows::High(x) => [Some(x), None],
            Rows::Fp8(tiles, ..) => tiles.tensors().map(Some),
        }
    }

    /// The same rows, of which only those in groups by `offsets` are any.
    #[must_use]
    pub fn in_groups(self, offsets: Tensor) -> Self {
        match self {
            Rows::Fp8(q, scaling, Some(watch)) => Rows::Fp8(q, scaling, Some(Watch { groups: Some(offsets), ..watch })),
            rows => rows,
        }
    }

    /// Assigns the RMSNorm of the first columns of `x`; `rstd` as in [`rms_norm::forward`].
    ///
    /// # Errors
    /// If shapes differ.
    pub fn norm(self, s: &mut Stream, x: Tensor, w: Tensor, rstd: Tensor, eps: f64) -> OpResult<()> {
        match self {
            Rows::High(y) => rms_norm::forward(s, x, w, y, rstd, eps),
            Rows::Fp8(q, scaling, watch) => {
                // In this order: the last one's `rstd` stays.
                watch.map_or(Ok(()), |watch| rms_norm::forward(s, x, w, watch.high, rstd, eps))?;
                rms_norm::forward_tiles(s, x, w, q, rstd, eps, scaling)?;
                watch.map_or(Ok(()), |watch| watch.count(s, q))
            }
        }
    }

    /// Assigns SwiGLU of `h` [t, 2 i], and `kept` what h waits as for the backward pass, if it is that.
    ///
    /// # Errors
    /// If shapes differ.
    pub fn swiglu(self, s: &mut Stream, h: Tensor, kept: Option<NarrowInput>) -> OpResult<()> {
        match self {
            Rows::High(a) => swiglu::forward(s, h, a)?,
            Rows::Fp8(q, scaling, watch) => {
                swiglu::forward_tiles(s, h, q, scaling)?;
                if let Some(watch) = watch {
                    swiglu::forward(s, h, watch.high)?;
                    watch.count(s, q)?;
                }
            }
        }
        kept.map_or(Ok(()), |NarrowInput(q, scaling)| quantize::tiles(s, h, q, scaling))
    }

    /// For the backward pass: assigns `h` from what it waited as, and SwiGLU of it again if that was not kept.
    ///
    /// # Errors
    /// If shapes differ.
    pub fn swiglu_again(self, s: &mut Stream, h: Tensor, kept: Option<NarrowInput>, recompute: bool) -> OpResult<()> {
        if let Some(NarrowInput(q, _)) = kept {
            dequantize::tiles(s, q, h)?;
        }
        if recompute || kept.is_some() { self.swiglu(s, h, None) } else { Ok(()) }
    }

    /// Assigns rows of `x` in the order of experts.
    ///
    /// # Errors
    /// If shapes differ.
    pub fn permute(self, s: &mut Stream, x: Tensor, order: permute::Order) -> OpResult<()> {
        match self {
            Rows::High(rows) => permute::permute(s, x, order, rows),
            Rows::Fp8(q, scaling, watch) => {
                permute::permute_tiles(s, x, order, q, scaling)?;
                if let Some(watch) = watch {
                    permute::permute(s, x, order, watch.high)?;
                    watch.count(s, q)?;
                }
                Ok(())
            }
        }
    }

    /// Assigns `x`, unless that is what these rows are.
    ///
    /// # Errors
    /// If shapes differ.
    pub fn round(self, s: &mut Stream, x: Tensor) -> OpResult<()> {
        match self {
            Rows::High(_) => Ok(()),
            Rows::Fp8(q, scaling, watch) => {
                quantize::tiles(s, x, q, scaling)?;
                watch.map_or(Ok(()), |watch| Watch { high: x, ..watch }.count(s, q))
            }
        }
    }
}

/// SwiGLU's input in E4M3 (DeepSeek-V3 report, section 3.3.3).
#[derive(Clone, Copy, Debug)]
pub struct NarrowInput(Tiles, Scaling);

/// Attention's output in E5M6 with powers of two as scales (DeepSeek-V3 report, section 3.3.3).
#[derive(Clone, Copy, Debug)]
pub struct NarrowOutput {
    packed: Tensor,
    scales: Tensor,
}

impl NarrowOutput {
    /// Rounds `o` [t, c] to it.
    ///
    /// # Errors
    /// If shapes differ.
    pub fn encode(self, s: &mut Stream, o: Tensor) -> Result {
        Ok(e5m6::encode(s, o, self.packed, self.scales)?)
    }

    /// Assigns `o` [t, c].
    ///
    /// # Errors
    /// If shapes differ.
    pub fn decode(self, s: &mut Stream, o: Tensor) -> Result {
        Ok(e5m6::decode(s, self.packed, self.scales, o)?)
    }
}

/// Room for operands in 8 bits that are made and multiplied within a task.
#[derive(Clone, Copy, Debug)]
pub struct Workspace {
    codes: Tensor,
    scales: Tensor,
    scaling: Scaling,
    /// In a step that is watched.
    counter: Option<Counter>,
}

/// Shapes of the operands that a pass of a layer rounds to 8 bits.
pub(super) type Operands = [[usize; 2]; 2];

/// Codes of the second operand begin at a multiple of this, as copies of tiles need it.
const ALIGN: usize = 128;

impl Workspace {
    /// Two operands beside each other.
    pub(super) fn pair(self, [a, b]: Operands) -> [Tiles; 2] {
        let first = self.tiles((0, 0), a);
        let codes = (a[0] * a[1]).next_multiple_of(ALIGN);
        [first, self.tiles((codes, first.scales.len().next_multiple_of(ALIGN)), b)]
    }

    fn tiles(self, (codes, scales): (usize, usize), [rows, columns]: [usize; 2]) -> Tiles {
        let scale_dims = Tiles::scale_shape(rows, columns);
        Tiles {
            codes: self.codes.slice(codes, rows * columns).reshape(&[rows, columns]),
            scales: self.scales.slice(scales, scale_dims[0] * scale_dims[1]).reshape(&scale_dims),
        }
    }

    /// Rounds rows [t, c] with tiles along tokens, into `q` [c, t]; with offsets, each group's tokens padded.
    pub(super) fn along_tokens(
        self,
        s: &mut Stream,
        (what, rows): (Operand, Rows),
        offsets: Option<Tensor>,
        q: Tiles,
    ) -> OpResult<()> {
        let numbers = match rows {
            Rows::High(x) => Numbers::Float(x),
            Rows::Fp8(x, ..) => Numbers::Tiles(x),
        };
        match numbers {
            Numbers::Float(x) => quantize::columns(s, x, offsets, q, self.scaling)?,
            Numbers::Tiles(x) => quantize::retile(s, x, offsets, q, self.scaling)?,
        }
        self.counter.map_or(Ok(()), |counter| rounding::columns(s, numbers, offsets, q, counter.of(what)))
    }

    /// Elements of codes and of scales.
    fn len([a, b]: Operands) -> (usize, usize) {
        let scales = |[rows, columns]: [usize; 2]| Tiles::scale_shape(rows, columns).iter().product::<usize>();
        let room = |a: usize, b: usize| a.next_multiple_of(ALIGN) + b;
        (room(a[0] * a[1], b[0] * b[1]), room(scales(a), scales(b)))
    }
}

impl Lowering<'_> {
    /// Activations [t, i] for products with `weight`.
    pub fn alloc_rows(&mut self, name: &'static str, weight: Weight, dims: [usize; 2]) -> Rows {
        match weight.fp8 {
            None => Rows::High(self.alloc(name, &dims)),
            Some(fp8) => Rows::Fp8(self.alloc_tiles(name, dims), fp8.scaling, self.watch(dims)),
        }
    }

    /// How what rounding to rows [t, i] loses is counted, if the step is watched.
    fn watch(&mut self, dims: [usize; 2]) -> Option<Watch> {
        let counter = self.counter()?;
        Some(Watch { counter, high: self.watched_room(dims), groups: None })
    }

    /// Tiles [r, c] of 8 bits.
    fn alloc_tiles(&mut self, name: &'static str, dims: [usize; 2]) -> Tiles {
        Tiles {
            codes: self.alloc_as(name, DType::U8, &dims),
            scales: self.alloc_as("scales", DType::F32, &Tiles::scale_shape(dims[0], dims[1])),
        }
    }

    /// Gives activations back before the scope ends.
    pub fn release_rows(&mut self, rows: Rows) {
        rows.tensors().into_iter().flatten().for_each(|tensor| self.release(tensor));
    }

    /// [`Lowering::drop_recomputable`] for rows.
    pub fn drop_recomputable_rows(&mut self, what: Saved, rows: Rows) {
        if self.recomputes(what) {
            self.release_rows(rows);
        }
    }

    /// [`Lowering::alloc_again`] for rows.
    pub fn alloc_rows_again(&mut self, what: Saved, rows: Rows) -> Rows {
        if self.recomputes(what) { self.alloc_rows_like("recomputed", rows) } else { rows }
    }

    fn alloc_rows_like(&mut self, name: &'static str, rows: Rows) -> Rows {
        match rows {
            Rows::High(x) => Rows::High(self.alloc_like(name, x)),
            // What is computed again was counted.
            Rows::Fp8(q, scaling, _) => {
                let [codes, scales] = q.tensors().map(|tensor| self.alloc_like(name, tensor));
                Rows::Fp8(Tiles { codes, scales }, scaling, None)
            }
        }
    }

    /// Room for attention's output [t, c] in fewer bits, if it is to wait as that for the backward pass; `out` is the weight that
    /// multiplies it.
    pub fn alloc_narrow_output(&mut self, out: Weight, dims: [usize; 2]) -> Option<NarrowOutput> {
        let narrow = self.fp8.as_ref().is_some_and(|fp8| fp8.narrow_attention_output);
        (self.training && narrow && out.fp8.is_some()).then(|| {
            let [t, c] = dims;
            NarrowOutput {
                packed: self.alloc_as("attention heads in 12 bits", DType::U8, &[t, e5m6::packed(c)]),
                scales: self.alloc_as("scales", DType::U8, &[t, c.div_ceil(TILE)]),
            }
        })
    }

    /// Room for SwiGLU's input in 8 bits, if it is to wait as that for the backward pass; `gate_up` is the weight that makes it.
    pub fn alloc_narrow_swiglu(&mut self, gate_up: Weight, dims: [usize; 2]) -> Option<NarrowInput> {
        let narrow = self.training && self.fp8.as_ref().is_some_and(|fp8| fp8.narrow_swiglu_input);
        let fp8 = gate_up.fp8.filter(|_| narrow)?;
        Some(NarrowInput(self.alloc_tiles("gate_up in 8 bits", dims), fp8.scaling))
    }

    /// Gives back what of SwiGLU the backward pass computes again: the output `a`, and the input `h` if that is `kept` in 8 bits.
    pub fn drop_swiglu(&mut self, kept: Option<NarrowInput>, h: Tensor, a: Rows) {
        if kept.is_some() {
            self.release(h);
            self.release_rows(a);
        } else {
            self.drop_recomputable_rows(Saved::Swiglu, a);
        }
    }

    /// Room for what [`Lowering::drop_swiglu`] gave back.
    pub fn alloc_swiglu_again(&mut self, kept: Option<NarrowInput>, h: Tensor, a: Rows) -> (Tensor, Rows) {
        match kept {
            Some(_) => (self.alloc_like("recomputed", h), self.alloc_rows_like("recomputed", a)),
            None => (h, self.alloc_rows_again(Saved::Swiglu, a)),
        }
    }

    /// Room for what a task of `pass` makes of so many rows in front of the product with each weight; of activations only those that
    /// are [`Rows::High`]. `None` if no weight needs it. To be released when the task is emitted.
    pub fn alloc_workspace(&mut self, pass: Pass, products: &[(Weight, usize)]) -> Option<Workspace> {
        let scaling = products.iter().find_map(|(weight, _)| weight.fp8)?.scaling;
        let needed = products.iter().filter(|(weight, _)| weight.fp8.is_some());
        let needed = needed.map(|(weight, t)| Workspace::len(weight.operands(pass, *t)));
        let (codes, scales) = needed.fold((0, 0), |a, b| (a.0.max(b.0), a.1.max(b.1)));
        Some(Workspace {
            scaling,
            counter: self.counter(),
            codes: self.alloc_as("operands in 8 bits", DType::U8, &[codes]),
            scales: self.alloc_as("scales", DType::F32, &[scales]),
        })
    }

    /// Gives a workspace back.
    pub fn release_workspace(&mut self, workspace: Option<Workspace>) {
        for tensor in workspace.into_iter().flat_map(|w| [w.codes, w.scales]) {
            self.release(tensor);
        }
    }
}

impl Rows {
    /// The tensor in the type of activations.
    ///
    /// # Errors
    /// If it is in 8 bits.
    pub fn high(self) -> Result<Tensor> {
        match self {
            Rows::High(x) => Ok(x),
            Rows::Fp8(..) => Err("a weight that is not in 8 bits was given activations that are".into()),
        }
    }

    /// As operand of a product over their columns; only rows in groups by `offsets`, if there are any, are counted.
    pub(super) fn in_8_bits(
        self,
        s: &mut Stream,
        (what, offsets): (Operand, Option<Tensor>),
        room: Option<Workspace>,
    ) -> Result<Tiles> {
        match self {
            Rows::Fp8(q, ..) => Ok(q),
            Rows::High(x) => {
                let room = needed(room)?;
                let q = room.tiles((0, 0), [x.rows(), x.cols()]);
                quantize::tiles(s, x, q, room.scaling)?;
                if let Some(counter) = room.counter {
                    rounding::tiles(s, Numbers::Float(x), q, offsets, counter.of(what))?;
                }
                Ok(q)
            }
        }
    }
}

/// The room, or what is missing.
pub(super) fn needed(room: Option<Workspace>) -> Result<Workspace> {
    room.ok_or_else(|| "a product in 8 bits has no room for its operands".into())
}
