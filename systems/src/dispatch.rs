//! Expert parallelism: tokens go to the ranks of their experts, and outputs come back, as tasks on the communication stream. With
//! all experts on one rank nothing is emitted.
//!
//! Four transfers a layer: tokens to experts and outputs back (F), gradients of the outputs to the experts and gradients of the
//! tokens back (I). Rows come back one by one and are summed where their token is, in slot order: so the bits of a step do not
//! depend on the number of ranks.
//!
//! Legend: t tokens, d model width, e routed experts on this rank, k experts a token, n rows that may arrive.

use bevy_ecs::prelude::*;
use engine::prelude::*;
use kernels::{
    comm::{Exchange, Received},
    dtype::DType,
    ops::permute,
    tensor::Tensor,
};

use crate::{linear::Rows, lower::Lowering, ranks::Ranks, routing::RouteActivations};

/// Tokens to experts.
pub const DISPATCH_F: TaskKind = TaskKind("dispatch_forward");
/// Outputs back to tokens.
pub const RETURN_F: TaskKind = TaskKind("return_forward");
/// Gradients of outputs to experts.
pub const SEND_I: TaskKind = TaskKind("send_output_grad");
/// Gradients of tokens back.
pub const RETURN_I: TaskKind = TaskKind("return_input_grad");

/// Rows at the rank of their experts.
#[derive(Clone, Copy, Debug)]
pub struct Arrived {
    /// Rows by expert, then by rank, then in that rank's order [n, d].
    pub rows: Rows,
    /// n and d.
    pub dims: [usize; 2],
    /// Expert i of this rank has rows `offsets[i]..offsets[i + 1]`; u32 \[e + 1\].
    pub offsets: Tensor,
    /// Where rows come from; `None` if all experts are here.
    from: Option<Received>,
    /// Experts of the layer, on all ranks.
    num_experts: usize,
}

impl Arrived {
    /// Whether all experts are on this rank.
    pub fn is_local(&self) -> bool {
        self.from.is_none()
    }
}

#[derive(Clone, Copy)]
enum Move {
    Dispatch { x: Tensor, indices: Tensor },
    Send { rows: Tensor, out: Tensor },
    Return { rows: Tensor, out: Tensor },
}

#[derive(Component, Clone, Copy)]
pub(crate) struct MoveTask {
    what: Move,
    order: Option<permute::Order>,
    received: Received,
    num_experts: usize,
    tag: u64,
    num_tokens: u64,
}

/// Emits dispatch; `num_experts` are those of the whole layer.
pub fn lower_dispatch(l: &mut Lowering, route: RouteActivations, num_experts: usize) -> Result<Arrived> {
    if let Some(rows) = route.rows {
        let dims = [route.num_rows(), route.x.dim(1)];
        return Ok(Arrived { rows, dims, offsets: route.order.offsets, from: None, num_experts });
    }
    let (k, d) = (route.chosen().dim(1), route.x.dim(1));
    let e = l.layout.my_experts(num_experts).len();
    let n = l.max_expert_rows(route.x.dim(0), k, e);
    let received = Received {
        rows: l.alloc_wire("arrived rows", n, d),
        offsets: l.alloc_as("arrived offsets", DType::U32, &[e + 1]),
        origin: l.alloc_as("origin of rows", DType::U32, &[n, 2]),
    };
    let what = Move::Dispatch { x: route.normed, indices: route.chosen() };
    let tag = l.tag(DISPATCH_F);
    l.transfer(
        DISPATCH_F,
        Pass::Forward,
        MoveTask { what, order: Some(route.order), received, num_experts, tag, num_tokens: num_tokens(l) },
    )?;
    let rows = Rows::High(received.rows);
    Ok(Arrived { rows, dims: [n, d], offsets: received.offsets, from: Some(received), num_experts })
}

/// Emits the way of `rows` [t k, d] to where dispatch put theirs, `out` [n, d].
pub fn lower_send(l: &mut Lowering, order: permute::Order, arrived: Arrived, rows: Tensor, out: Tensor) -> Result<()> {
    let Some(received) = arrived.from else { return Ok(()) };
    let tag = l.tag(SEND_I);
    let (what, num_experts) = (Move::Send { rows, out }, arrived.num_experts);
    let task = MoveTask { what, order: Some(order), received, num_experts, tag, num_tokens: num_tokens(l) };
    l.transfer(SEND_I, Pass::InputGrad, task)
}

/// Emits the way of `rows` [n, d] back to the ranks of their tokens, `out` [t k, d].
pub fn lower_return(
    l: &mut Lowering,
    kind: TaskKind,
    pass: Pass,
    arrived: Arrived,
    rows: Tensor,
    out: Tensor,
) -> Result<()> {
    let Some(received) = arrived.from else { return Ok(()) };
    let (tag, num_tokens) = (l.tag(kind), num_tokens(l));
    let (what, num_experts) = (Move::Return { rows, out }, arrived.num_experts);
    l.transfer(kind, pass, MoveTask { what, order: None, received, num_experts, tag, num_tokens })
}

fn num_tokens(l: &Lowering) -> u64 {
    l.inputs.num_tokens() as u64
}

pub(crate) fn move_rows(In(id): In<Entity>, mut launch: Launch<MoveTask>, ranks: Res<Ranks>) -> Result {
    let (_, &MoveTask { what, order, received, num_experts, tag, num_tokens }, s) = launch.get(id)?;
    let (comm, group) = (ranks.comm.clone(), ranks.expert_group.clone());
    let reduced = ranks.reduces_on_the_way.then_some((num_tokens, ranks.spread));
    let over = |wire| Exchange { comm, group, num_experts, tag, wire, reduced };
    match (what, order) {
        (Move::Dispatch { x, indices }, Some(order)) => {
            over(ranks.dispatch_wire).dispatch(s, x, indices, order, ranks.spread, received)?;
        }
        (Move::Send { rows, out }, Some(order)) => {
            over(ranks.dispatch_wire).send_rows(s, rows, order, received, out)?;
        }
        (Move::Return { rows, out }, _) => over(ranks.combine_wire).return_rows(s, rows, received, out)?,
        _ => return Err("a transfer to experts needs the order of its rows".into()),
    }
    Ok(())
}
