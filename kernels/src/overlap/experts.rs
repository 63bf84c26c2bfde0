//! The experts of a rank and the shared one in FP8, with DeepSeek-V3's sizes: F, I and W of one layer, from rows that have arrived to rows
//! that are to be sent.
//!
//! Legend: t tokens, d model width, k experts a token, n = t k rows, e experts of the rank, f expert width.

use super::{
    Sizes, filled,
    linear::{Linear, Room, SCALING, tiles},
};
use crate::{
    dtype::DType::{Bf16, F32},
    error::Result,
    fp8::Tiles,
    memory::Memory,
    ops::{
        permute::{self, Order},
        swiglu,
    },
    stream::Stream,
    tensor::Tensor,
};

/// Gate and up, SwiGLU, and down, over some rows.
struct Mlp {
    gate_up: Linear,
    down: Linear,
    h: Tensor,
    a: Tiles,
    da: Tensor,
    dh: Tensor,
    room: Room,
}

impl Mlp {
    fn new(memory: &Memory, [gate_up, down]: [Linear; 2], rows: usize, f: usize, room: Room) -> Self {
        Mlp {
            h: gate_up.out(memory, rows),
            gate_up,
            down,
            a: tiles(memory, rows, f),
            da: memory.alloc(Bf16, &[rows, f]),
            dh: memory.alloc(Bf16, &[rows, 2 * f]),
            room,
        }
    }

    fn forward(&self, s: &mut Stream, x: Tiles, residual: Option<Tensor>, y: Tensor) -> Result<()> {
        self.gate_up.forward(s, x, None, self.h)?;
        swiglu::forward_tiles(s, self.h, self.a, SCALING)?;
        self.down.forward(s, self.a, residual, y)
    }

    fn input_grad(&self, s: &mut Stream, dy: Tensor, dx: Tensor) -> Result<()> {
        self.down.input_grad(s, dy, self.room, self.da, false)?;
        swiglu::input_grad(s, self.h, self.da, self.dh)?;
        self.gate_up.input_grad(s, self.dh, self.room, dx, false)
    }

    fn weight_grad(&self, s: &mut Stream, dy: Tensor, x: Tiles) -> Result<()> {
        self.down.weight_grad(s, dy, self.a, self.room)?;
        self.gate_up.weight_grad(s, self.dh, x, self.room)
    }
}

/// Weights, activations and gradients of a layer's experts.
pub(super) struct Experts {
    routed: Mlp,
    shared: Mlp,
    arrived: Tiles,
    normed: Tiles,
    order: Order,
    weights: Tensor,
    d_weights: Tensor,
    /// Outputs of the routed experts [n, d], and the same as their tokens' rank has them.
    y: Tensor,
    returned: Tensor,
    /// Gradients of these.
    dy: Tensor,
    d_returned: Tensor,
    /// Gradients of what arrived, here and at its tokens' rank.
    d_arrived: Tensor,
    d_rows: Tensor,
    /// Gradient of the normed tokens [t, d].
    pub d_normed: Tensor,
}

impl Experts {
    pub fn new(memory: &Memory, z: &Sizes, room: Room) -> Self {
        let &Sizes { t, d, k, experts: e, width: f, .. } = z;
        let n = t * k;
        // All experts have as many rows, as in DeepSeek's profile.
        let offsets: Vec<u32> = (0..=e).map(|i| (i * n / e) as u32).collect();
        let offsets = memory.from_slice(&[e + 1], &offsets);
        // Rows of a token lie t apart: each of its k experts has one.
        let row_of_slot: Vec<u32> = (0..n).map(|slot| (slot % k * t + slot / k) as u32).collect();
        let token_of_row: Vec<u32> = (0..n).map(|row| (row % t) as u32).collect();
        let order = Order {
            offsets,
            row_of_slot: memory.from_slice(&[n], &row_of_slot),
            token_of_row: memory.from_slice(&[n], &token_of_row),
        };
        let by_experts = [(2 * f, d), (d, f)].map(|(o, i)| Linear::by_experts(memory, (e, offsets), o, i));
        let (rows, empty) = (|| filled(memory, Bf16, &[n, d]), || memory.alloc(Bf16, &[n, d]));
        Experts {
            routed: Mlp::new(memory, by_experts, n, f, room),
            shared: Mlp::new(memory, [Linear::new(memory, 2 * f, d), Linear::new(memory, d, f)], t, f, room),
            arrived: tiles(memory, n, d),
            normed: tiles(memory, t, d),
            order,
            weights: filled(memory, F32, &[t, k]),
            d_weights: memory.alloc(F32, &[t, k]),
            y: empty(),
            returned: rows(),
            dy: rows(),
            d_returned: empty(),
            d_arrived: empty(),
            d_rows: rows(),
            d_normed: memory.alloc(Bf16, &[t, d]),
        }
    }

    /// F of what has arrived; the shared expert's goes onto the residual `x` [t, d].
    pub fn forward(&self, s: &mut Stream, x: Tensor, y: Tensor) -> Result<()> {
        self.routed.forward(s, self.arrived, None, self.y)?;
        self.shared.forward(s, self.normed, Some(x), y)
    }

    /// The weighted sum of what came back, onto `y` [t, d].
    pub fn combine(&self, s: &mut Stream, y: Tensor) -> Result<()> {
        permute::combine(s, self.returned, self.weights, self.order, Some(y), y)
    }

    /// I of [`Experts::combine`]: the gradients that are to be sent.
    pub fn combine_grad(&self, s: &mut Stream, dy: Tensor) -> Result<()> {
        permute::combine_grad(s, dy, self.returned, self.weights, self.order, self.d_returned, self.d_weights)
    }

    /// I of the experts.
    pub fn input_grad(&self, s: &mut Stream, dy: Tensor) -> Result<()> {
        self.routed.input_grad(s, self.dy, self.d_arrived)?;
        self.shared.input_grad(s, dy, self.d_normed)
    }

    /// W of the experts.
    pub fn weight_grad(&self, s: &mut Stream, dy: Tensor) -> Result<()> {
        self.routed.weight_grad(s, self.dy, self.arrived)?;
        self.shared.weight_grad(s, dy, self.normed)
    }

    /// The sum of a token's gradients that came back, onto the shared expert's.
    pub fn dispatch_grad(&self, s: &mut Stream) -> Result<()> {
        permute::permute_grad(s, self.d_rows, self.order, self.d_normed, true)
    }
}
