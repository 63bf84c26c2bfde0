//! Stage to stage: activations go to the next stage and gradients to the one before, as tasks on the communication stream.
//! Between two stages of one rank the tensor is handed over as it is.

use bevy_ecs::prelude::*;
use engine::prelude::*;
use kernels::tensor::Tensor;

use crate::{lower::Lowering, ranks::Ranks};

/// Sends activations.
pub const SEND_F: TaskKind = TaskKind("send_activations");
/// Receives activations.
pub const RECEIVE_F: TaskKind = TaskKind("receive_activations");
/// Sends gradients.
pub const SEND_B: TaskKind = TaskKind("send_gradients");
/// Receives gradients.
pub const RECEIVE_B: TaskKind = TaskKind("receive_gradients");

#[derive(Component, Clone, Copy)]
pub(crate) struct TransferTask {
    x: Tensor,
    peer: u32,
    tag: u64,
    is_send: bool,
}

/// Which way a tensor goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Direction {
    /// Activations, to the next stage.
    Forward,
    /// Gradients, to the stage before.
    Backward,
}

/// Emits the way of `x` to rank `peer`, where stage `to` takes it.
pub fn lower_send(l: &mut Lowering, direction: Direction, x: Tensor, peer: u32, to: u32) -> Result<()> {
    let (kind, pass) = match direction {
        Direction::Forward => (SEND_F, Pass::Forward),
        Direction::Backward => (SEND_B, Pass::InputGrad),
    };
    let tag = tag(l, direction, to);
    l.transfer(kind, pass, TransferTask { x, peer, tag, is_send: true })
}

/// Emits the arrival at stage `to` of a tensor [t, d] from rank `peer`.
pub fn lower_receive(
    l: &mut Lowering,
    direction: Direction,
    (t, d): (usize, usize),
    peer: u32,
    to: u32,
) -> Result<Tensor> {
    let (kind, pass) = match direction {
        Direction::Forward => (RECEIVE_F, Pass::Forward),
        Direction::Backward => (RECEIVE_B, Pass::InputGrad),
    };
    let x = l.alloc_wire("received", t, d);
    let tag = tag(l, direction, to);
    l.transfer(kind, pass, TransferTask { x, peer, tag, is_send: false })?;
    Ok(x)
}

/// Both sides name a message by its direction, the stage that takes it, and the microbatch.
fn tag(l: &Lowering, direction: Direction, to: u32) -> u64 {
    let direction = u64::from(direction == Direction::Backward);
    1 << 63 | direction << 62 | u64::from(to) << 32 | u64::from(l.microbatch.unwrap_or(0))
}

pub(crate) fn transfer(In(id): In<Entity>, mut launch: Launch<TransferTask>, ranks: Res<Ranks>) -> Result {
    let (_, &TransferTask { x, peer, tag, is_send }, s) = launch.get(id)?;
    if is_send {
        ranks.comm.send(s, x, peer, tag)?
    } else {
        ranks.comm.receive(s, x, peer, tag)?
    }
    Ok(())
}
