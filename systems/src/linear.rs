//! Linear layers in whatever format their weights are multiplied in.
//!
//! A [`Weight`] with copies in 8 bits multiplies those; activations and gradients are rounded to 8 bits in front of each product, by
//! the op that makes them where it can ([`Rows::Fp8`]), else into a [`Workspace`] that lives as long as the task. Weight gradients
//! sum over tokens, so their operands are rounded anew along tokens (DeepSeek-V3 report, section 3.3.2).
//!
//! Legend: t tokens, i inputs, o outputs, e experts, n rows sorted by expert.

mod rows;

pub use rows::{NarrowInput, NarrowOutput, Rows, Workspace};
use rows::{Operands, needed};

use bevy_ecs::prelude::*;
use engine::prelude::*;
use kernels::{
    error::Result as OpResult,
    fp8::{Blocks, Scaling, padded},
    memory::Memory,
    ops::{fp8_gemm, fp8_grouped_gemm, gemm, grouped_gemm, quantize},
    stream::Stream,
    tensor::Tensor,
};

use crate::{
    model::{Parameters, Weight},
    rounding::Operand,
    session::Session,
};

/// A weight's copies in 8 bits: a checkpoint's, or made of the weight; made anew after each update.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Fp8Weight {
    /// As the weight lies: [o, i] or [e, o, i].
    pub blocks: Blocks,
    /// Transposed, for the gradient of the input; `None` where nothing is trained.
    pub transposed: Option<Blocks>,
    /// What numbers scales are that are made here.
    pub scaling: Scaling,
    /// These are the weight: its value is a shape without bytes.
    pub is_all: bool,
}

impl Fp8Weight {
    /// Allocates the copies of a weight of shape `dims`, which are all of it if neither training nor anything else `needs_value`.
    pub fn alloc(memory: &Memory, dims: &[usize], (trainable, needs_value): (bool, bool), scaling: Scaling) -> Self {
        let mut across = dims.to_vec();
        across[dims.len() - 2..].reverse();
        let transposed = trainable.then(|| Blocks::alloc(memory, &across));
        Fp8Weight { blocks: Blocks::alloc(memory, dims), transposed, scaling, is_all: !trainable && !needs_value }
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
            Pass::WeightGrad => [[i, tokens], [o, tokens]],
        }
    }

    /// Makes the copies in 8 bits from the value.
    ///
    /// # Errors
    /// If shapes differ.
    pub fn quantize(&self, s: &mut Stream) -> OpResult<()> {
        match self.fp8 {
            Some(Fp8Weight { blocks, transposed, scaling, .. }) => {
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
                let x = x.in_8_bits(s, (Operand::Activations, None), room)?;
                fp8_gemm::product(s, x, fp8.blocks, None, y)?;
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
                let x = x.in_8_bits(s, (Operand::Activations, None), room)?;
                fp8_gemm::product(s, x, fp8.blocks, Some(residual), y)?;
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
                let dy = Rows::High(dy).in_8_bits(s, (Operand::Gradients, None), room)?;
                fp8_gemm::product(s, dy, fp8.across()?, accumulate.then_some(dx), dx)?;
            }
        }
        Ok(())
    }

    /// W: `dw += dy^T x`, from dy [t, o] and x [t, i]; nothing where nothing is trained.
    ///
    /// # Errors
    /// If shapes or formats do not fit.
    pub fn weight_grad(&self, s: &mut Stream, dy: Tensor, x: Rows, room: Option<Workspace>) -> Result {
        weight_grads(s, x, room, &[(*self, dy, None)])
    }

    /// F per expert, from rows x [n, i].
    ///
    /// # Errors
    /// If shapes or formats do not fit.
    pub fn forward_grouped(&self, s: &mut Stream, x: Rows, offsets: Tensor, y: Tensor) -> Result {
        match (self.fp8, x) {
            (None, x) => grouped_gemm::forward(s, x.high()?, offsets, self.value, y)?,
            (Some(fp8), x) => {
                let x = x.in_8_bits(s, (Operand::Activations, Some(offsets)), None)?;
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
                let dy = Rows::High(dy).in_8_bits(s, (Operand::Gradients, Some(offsets)), room)?;
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
                let room = needed(room)?;
                let [to_x, to_dy] = room.pair(self.operands(Pass::WeightGrad, dy.rows()));
                room.along_tokens(s, (Operand::ActivationsByToken, x), Some(offsets), to_x)?;
                room.along_tokens(s, (Operand::GradientsByToken, Rows::High(dy)), Some(offsets), to_dy)?;
                fp8_grouped_gemm::weight_grad(s, to_dy, to_x, offsets, dw)?;
            }
        }
        Ok(())
    }
}

/// W of layers that read the same x [t, i], which is rounded once for all: `dw += dy^T x` and `dbias += sum_t dy` for each weight, dy
/// [t, o] and dbias; nothing where nothing is trained.
///
/// # Errors
/// If shapes or formats do not fit.
pub fn weight_grads(
    s: &mut Stream,
    x: Rows,
    room: Option<Workspace>,
    layers: &[(Weight, Tensor, Option<Tensor>)],
) -> Result {
    let mut rounded = None;
    for &(weight, dy, dbias) in layers {
        match (weight.grad, weight.fp8) {
            (None, _) => {}
            (Some(dw), None) => gemm::weight_grad(s, dy, x.high()?, dw, dbias)?,
            (Some(dw), Some(_)) => {
                let room = needed(room)?;
                // x is first, and so in the same place for all.
                let [to_x, to_dy] = room.pair(weight.operands(Pass::WeightGrad, dy.rows()));
                if rounded.replace(to_x).is_none() {
                    room.along_tokens(s, (Operand::ActivationsByToken, x), None, to_x)?;
                }
                room.along_tokens(s, (Operand::GradientsByToken, Rows::High(dy)), None, to_dy)?;
                fp8_gemm::weight_grad(s, to_dy, to_x, dw)?;
            }
        }
    }
    Ok(())
}

impl Fp8Weight {
    fn across(&self) -> Result<Blocks> {
        self.transposed.ok_or_else(|| "a weight that is not trained has no gradients".into())
    }
}
