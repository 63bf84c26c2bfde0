//! Linear layers in whatever format their weights are multiplied in.
//!
//! A [`Weight`] with copies in 8 bits multiplies those; activations and gradients are rounded to 8 bits in front of each product, by
//! the op that makes them where it can ([`Rows::Fp8`]), else into a [`Workspace`] that lives as long as the task. Weight gradients
//! sum over tokens, so their operands are rounded anew along tokens (DeepSeek-V3 report, section 3.3.2).
//!
//! Legend: t tokens, i inputs, o outputs, e experts, n rows sorted by expert.

use bevy_ecs::prelude::*;
use engine::prelude::*;
use kernels::{
    dtype::DType,
    error::Result as OpResult,
    fp8::{Blocks, Scaling, TILE, Tiles, padded},
    memory::Memory,
    ops::{e5m6, elementwise, fp8_gemm, fp8_grouped_gemm, gemm, grouped_gemm, permute, quantize, rms_norm, swiglu},
    stream::Stream,
    tensor::Tensor,
};

use crate::{
    lower::{Lowering, Saved},
    model::{Parameters, Weight},
    session::Session,
};

/// A weight's copies in 8 bits, made anew after each update.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Fp8Weight {
    /// As the weight lies: [o, i] or [e, o, i].
    pub blocks: Blocks,
    /// Transposed, for the gradient of the input; `None` where nothing is trained.
    pub transposed: Option<Blocks>,
    /// What numbers the scales are.
    pub scaling: Scaling,
}

impl Fp8Weight {
    /// Allocates the copies of a weight of shape `dims`.
    pub fn alloc(memory: &Memory, dims: &[usize], trainable: bool, scaling: Scaling) -> Self {
        let mut across = dims.to_vec();
        across[dims.len() - 2..].reverse();
        let transposed = trainable.then(|| Blocks::alloc(memory, &across));
        Fp8Weight { blocks: Blocks::alloc(memory, dims), transposed, scaling }
    }

    /// Bytes of the copies.
    pub fn num_bytes(&self) -> u64 {
        self.tensors().map(|tensor| tensor.size_bytes()).sum()
    }

    /// Codes and scales.
    pub fn tensors(&self) -> impl Iterator<Item = Tensor> {
        [Some(self.blocks), self.transposed].into_iter().flatten().flat_map(|blocks| blocks.tensors())
    }
}

/// Makes the copies in 8 bits of all weights that a rank holds, and waits for them: when values came from elsewhere.
///
/// # Errors
/// If the device fails.
pub fn quantize_weights(world: &mut World) -> OpResult<()> {
    let weights = world.resource::<Parameters>().weights.clone();
    let streams = world.resource::<Session>().streams;
    let Some(mut queue) = world.get_mut::<Queue>(streams.compute) else { return Ok(()) };
    for weight in weights {
        weight.quantize(&mut queue.stream)?;
    }
    queue.stream.synchronize()
}

/// Activations [t, i], as a linear layer's F and W read them.
#[derive(Clone, Copy, Debug)]
pub enum Rows {
    /// In the type of activations.
    High(Tensor),
    /// In 8 bits.
    Fp8(Tiles, Scaling),
}

impl Rows {
    fn tensors(self) -> [Option<Tensor>; 2] {
        match self {
            Rows::High(x) => [Some(x), None],
            Rows::Fp8(tiles, _) => tiles.tensors().map(Some),
        }
    }

    /// Assigns the RMSNorm of the first columns of `x`; `rstd` as in [`rms_norm::forward`].
    ///
    /// # Errors
    /// If shapes differ.
    pub fn norm(self, s: &mut Stream, x: Tensor, w: Tensor, rstd: Tensor, eps: f64) -> OpResult<()> {
        match self {
            Rows::High(y) => rms_norm::forward(s, x, w, y, rstd, eps),
            Rows::Fp8(q, scaling) => rms_norm::forward_tiles(s, x, w, q, rstd, eps, scaling),
        }
    }

    /// Assigns SwiGLU of `h` [t, 2 i].
    ///
    /// # Errors
    /// If shapes differ.
    pub fn swiglu(self, s: &mut Stream, h: Tensor) -> OpResult<()> {
        match self {
            Rows::High(a) => swiglu::forward(s, h, a),
            Rows::Fp8(q, scaling) => swiglu::forward_tiles(s, h, q, scaling),
        }
    }

    /// Assigns rows of `x` in the order of experts.
    ///
    /// # Errors
    /// If shapes differ.
    pub fn permute(self, s: &mut Stream, x: Tensor, order: permute::Order) -> OpResult<()> {
        match self {
            Rows::High(rows) => permute::permute(s, x, order, rows),
            Rows::Fp8(q, scaling) => permute::permute_tiles(s, x, order, q, scaling),
        }
    }

    /// Assigns `x`: nothing to do where that is the same tensor.
    ///
    /// # Errors
    /// If shapes differ.
    pub fn round(self, s: &mut Stream, x: Tensor) -> OpResult<()> {
        match self {
            Rows::High(y) if y == x => Ok(()),
            Rows::High(y) => elementwise::copy(s, x, y),
            Rows::Fp8(q, scaling) => quantize::tiles(s, x, q, scaling),
        }
    }
}

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
}

/// Shapes of the operands that a pass of a layer rounds to 8 bits.
type Operands = [[usize; 2]; 2];

/// Codes of the second operand begin at a multiple of this, as copies of tiles need it.
const ALIGN: usize = 128;

impl Workspace {
    /// Two operands beside each other.
    fn pair(self, [a, b]: Operands) -> [Tiles; 2] {
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
            Some(fp8) => Rows::Fp8(self.alloc_tiles(name, dims), fp8.scaling),
        }
    }

    /// Tiles [r, c] of 8 bits.
    pub fn alloc_tiles(&mut self, name: &'static str, dims: [usize; 2]) -> Tiles {
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
            Rows::Fp8(q, scaling) => {
                let [codes, scales] = q.tensors().map(|tensor| self.alloc_like(name, tensor));
                Rows::Fp8(Tiles { codes, scales }, scaling)
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
    pub fn alloc_narrow_swiglu(&mut self, gate_up: Weight, dims: [usize; 2]) -> Option<Tiles> {
        let narrow = self.fp8.as_ref().is_some_and(|fp8| fp8.narrow_swiglu_input);
        (self.training && narrow && gate_up.fp8.is_some()).then(|| self.alloc_tiles("gate_up in 8 bits", dims))
    }

    /// Gives back what of SwiGLU the backward pass computes again: the output `a`, and the input `h` if that is `kept` in 8 bits.
    pub fn drop_swiglu(&mut self, kept: Option<Tiles>, h: Tensor, a: Rows) {
        if kept.is_some() {
            self.release(h);
            self.release_rows(a);
        } else {
            self.drop_recomputable_rows(Saved::Swiglu, a);
        }
    }

    /// Room for what [`Lowering::drop_swiglu`] gave back.
    pub fn alloc_swiglu_again(&mut self, kept: Option<Tiles>, h: Tensor, a: Rows) -> (Tensor, Rows) {
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

impl Weight {
    /// [o, i], with one more extent in front where they are of several experts.
    fn sizes(&self) -> (usize, usize, usize) {
        let w = self.value;
        if w.shape.dims().len() == 3 { (w.dim(0), w.dim(1), w.dim(2)) } else { (1, w.dim(0), w.dim(1)) }
    }

    /// What a pass over `t` rows rounds to 8 bits at once.
    fn operands(&self, pass: Pass, t: usize) -> Operands {
        let (e, o, i) = self.sizes();
        let tokens = if self.value.shape.dims().len() == 3 { padded(t, e) } else { t };
        match pass {
            Pass::Forward => [[t, i], [0, 0]],
            Pass::InputGrad => [[t, o], [0, 0]],
            Pass::WeightGrad => [[o, tokens], [i, tokens]],
        }
    }

    /// Makes the copies in 8 bits from the value.
    ///
    /// # Errors
    /// If shapes differ.
    pub fn quantize(&self, s: &mut Stream) -> OpResult<()> {
        match self.fp8 {
            Some(Fp8Weight { blocks, transposed, scaling }) => {
                quantize::blocks(s, self.value, blocks, transposed, scaling)
            }
            None => Ok(()),
        }
    }

    /// F: assigns `y = x w^T + bias`, from x [t, i]. Weights with a bias have no copies in 8 bits.
    ///
    /// # Errors
    /// If shapes or formats do not fit.
    pub fn forward(&self, s: &mut Stream, x: Rows, room: Option<Workspace>, bias: Option<Tensor>, y: Tensor) -> Result {
        match (self.fp8, x) {
            (None, x) => gemm::forward(s, x.high()?, self.value, bias, y)?,
            (Some(fp8), x) => {
                let x = x.in_8_bits(s, room)?;
                fp8_gemm::product(s, x, fp8.blocks, y, false)?;
            }
        }
        Ok(())
    }

    /// F onto a residual: assigns `y = residual + x w^T`.
    ///
    /// # Errors
    /// If shapes or formats do not fit.
    pub fn forward_onto(
        &self,
        s: &mut Stream,
        x: Rows,
        room: Option<Workspace>,
        residual: Tensor,
        y: Tensor,
    ) -> Result {
        match (self.fp8, x) {
            (None, x) => gemm::forward_onto(s, x.high()?, self.value, residual, y)?,
            (Some(fp8), x) => {
                let x = x.in_8_bits(s, room)?;
                Rows::High(y).round(s, residual)?;
                fp8_gemm::product(s, x, fp8.blocks, y, true)?;
            }
        }
        Ok(())
    }

    /// I: `dx = dy w`, or `+=`, from dy [t, o].
    ///
    /// # Errors
    /// If shapes or formats do not fit.
    pub fn input_grad(
        &self,
        s: &mut Stream,
        dy: Tensor,
        room: Option<Workspace>,
        dx: Tensor,
        accumulate: bool,
    ) -> Result {
        match self.fp8 {
            None => gemm::input_grad(s, dy, self.value, dx, accumulate)?,
            Some(fp8) => {
                let dy = Rows::High(dy).in_8_bits(s, room)?;
                fp8_gemm::product(s, dy, fp8.across()?, dx, accumulate)?;
            }
        }
        Ok(())
    }

    /// W: `dw += dy^T x` and `dbias += sum_t dy`, from dy [t, o] and x [t, i]; nothing where nothing is trained.
    ///
    /// # Errors
    /// If shapes or formats do not fit.
    pub fn weight_grad(
        &self,
        s: &mut Stream,
        dy: Tensor,
        x: Rows,
        room: Option<Workspace>,
        dbias: Option<Tensor>,
    ) -> Result {
        match (self.grad, self.fp8) {
            (None, _) => {}
            (Some(dw), None) => gemm::weight_grad(s, dy, x.high()?, dw, dbias)?,
            (Some(dw), Some(_)) => {
                let [dy, x] = self.along_tokens(s, dy, x, None, room)?;
                fp8_gemm::weight_grad(s, dy, x, dw)?;
            }
        }
        Ok(())
    }

    /// F per expert, from rows x [n, i].
    ///
    /// # Errors
    /// If shapes or formats do not fit.
    pub fn forward_grouped(&self, s: &mut Stream, x: Rows, offsets: Tensor, y: Tensor) -> Result {
        match (self.fp8, x) {
            (None, x) => grouped_gemm::forward(s, x.high()?, offsets, self.value, y)?,
            (Some(fp8), x) => {
                let x = x.in_8_bits(s, None)?;
                fp8_grouped_gemm::product(s, x, offsets, fp8.blocks, y)?;
            }
        }
        Ok(())
    }

    /// I per expert, from dy [n, o].
    ///
    /// # Errors
    /// If shapes or formats do not fit.
    pub fn input_grad_grouped(
        &self,
        s: &mut Stream,
        dy: Tensor,
        offsets: Tensor,
        room: Option<Workspace>,
        dx: Tensor,
    ) -> Result {
        match self.fp8 {
            None => grouped_gemm::input_grad(s, dy, offsets, self.value, dx)?,
            Some(fp8) => {
                let dy = Rows::High(dy).in_8_bits(s, room)?;
                fp8_grouped_gemm::product(s, dy, offsets, fp8.across()?, dx)?;
            }
        }
        Ok(())
    }

    /// W per expert; nothing where nothing is trained.
    ///
    /// # Errors
    /// If shapes or formats do not fit.
    pub fn weight_grad_grouped(
        &self,
        s: &mut Stream,
        dy: Tensor,
        x: Rows,
        offsets: Tensor,
        room: Option<Workspace>,
    ) -> Result {
        match (self.grad, self.fp8) {
            (None, _) => {}
            (Some(dw), None) => grouped_gemm::weight_grad(s, dy, x.high()?, offsets, dw)?,
            (Some(dw), Some(_)) => {
                let [dy, x] = self.along_tokens(s, dy, x, Some(offsets), room)?;
                fp8_grouped_gemm::weight_grad(s, dy, x, offsets, dw)?;
            }
        }
        Ok(())
    }

    /// The operands of W with tiles along tokens: [o, t] and [i, t], each group's padded if there are groups.
    fn along_tokens(
        &self,
        s: &mut Stream,
        dy: Tensor,
        x: Rows,
        offsets: Option<Tensor>,
        room: Option<Workspace>,
    ) -> Result<[Tiles; 2]> {
        let (_, o, i) = self.sizes();
        let t = dy.len() / o.max(1);
        let [to_dy, to_x] = needed(room)?.pair(self.operands(Pass::WeightGrad, t));
        let scaling = needed(room)?.scaling;
        quantize::columns(s, dy.reshape(&[t, o]), offsets, to_dy, scaling)?;
        match x {
            Rows::High(x) => quantize::columns(s, x.reshape(&[t, i]), offsets, to_x, scaling)?,
            Rows::Fp8(x, _) => quantize::retile(s, x, offsets, to_x, scaling)?,
        }
        Ok([to_dy, to_x])
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

    /// As operand of a product over their columns.
    fn in_8_bits(self, s: &mut Stream, room: Option<Workspace>) -> Result<Tiles> {
        match self {
            Rows::Fp8(q, _) => Ok(q),
            Rows::High(x) => {
                let room = needed(room)?;
                let q = room.tiles((0, 0), [x.rows(), x.cols()]);
                quantize::tiles(s, x, q, room.scaling)?;
                Ok(q)
            }
        }
    }
}

impl Fp8Weight {
    fn across(&self) -> Result<Blocks> {
        self.transposed.ok_or_else(|| "a weight that is not trained has no gradients".into())
    }
}

fn needed(room: Option<Workspace>) -> Result<Workspace> {
    room.ok_or_else(|| "a product in 8 bits has no room for its operands".into())
}
