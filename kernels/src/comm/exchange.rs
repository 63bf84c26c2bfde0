//! Expert parallelism: rows to the ranks of their experts, and back.
//!
//! The e experts of a layer are spread over the n members of a group: member i has experts `i e/n..(i + 1) e/n`
//! ([`super::shares`]), so that some have one more than others where n does not divide e. On the source, t tokens of k slots make t k
//! rows in expert order ([`permute`](crate::ops::permute)). At the member, the rows of its experts lie by expert, within an expert by
//! source member, within a member in the source's order. That is the order that one rank with the tokens of all members, one after
//! the other, would give them, so that a product over them sums in the same order.
//!
//! - [`Exchange::dispatch`]: x to rows at the experts. A token goes once to a member, however many of its experts are there, and
//!   once to a node: a process that it arrives at passes it on to others of its node, in a meeting of their own.
//! - [`Exchange::return_rows`]: rows back to their places in the source's expert order: the forward pass of combine, and the
//!   backward pass of dispatch. The weighted sum of a token's rows stays with the source, in slot order: bits do not depend on n.
//!   So each row goes all the way, and directly: rows that met at a rank of their node would be no fewer, unless it added them up.
//! - [`Exchange::send_rows`]: rows from expert order to where dispatch put them: the backward pass of combine. Of a token's rows each
//!   is another, so they go directly too.
//!
//! A receiver's buffers have room for `cap` rows, known before the routing is; the number that came is `offsets.last()`, and rows
//! past it are unspecified. Counts are exchanged with the rows, so no host waits for them.
//!
//! Shape letters: t tokens of this rank, k slots of a token, d columns, e experts, n members.

mod brought;
mod place;

use std::{ops::Range, sync::Arc};

#[cfg(feature = "cuda")]
pub(super) use brought::once;
use brought::{Arrived, Passed, Returned, Sent, Tokens};
pub(super) use place::Place;

use super::{
    Comm, Hub, LinkBytes, Spread, Wire,
    local::Call,
    meter::Traffic,
    nccl,
    pack::{Brought, Met},
    wire::Rows,
};
use crate::{
    cost::Cost,
    dtype::{DType, Float},
    error::{Error, Result},
    memory::Memory,
    ops::{
        expect::{expect_tensor, expect_that},
        parallel::for_row_chunks,
        permute::Order,
    },
    stream::{Here, Rendezvous, Stream, Waited},
    tensor::Tensor,
    with_float,
};

/// The rows that came to this rank's experts.
#[derive(Clone, Copy, Debug)]
pub struct Received {
    /// Rows by expert; [cap, d].
    pub rows: Tensor,
    /// This rank's expert j has rows `offsets[j]..offsets[j + 1]`; U32 of one more than it has experts.
    pub offsets: Tensor,
    /// Source member of each row, and its row in that member's expert order; U32 [cap, 2].
    pub origin: Tensor,
}

/// The exchange of one layer's rows between the members of a group. All members call the same ops in the same order.
#[derive(Clone)]
pub struct Exchange {
    /// This rank's end.
    pub comm: Comm,
    /// Members, ascending; member i has experts `i e/n..(i + 1) e/n`.
    pub group: Arc<[u32]>,
    /// e: those of all members together, no fewer than members.
    pub num_experts: usize,
    /// Names the layer in errors and recordings.
    pub tag: u64,
    /// How rows are encoded.
    pub wire: Wire,
    /// Recordings take the rows of a token to be added up on the way, one sum for each node and rank that has some: so many
    /// tokens of this rank, spread so. Nothing that runs does this.
    pub reduced: Option<(u64, Spread)>,
}

impl Exchange {
    /// Assigns `to` the rows of this rank's experts, from every member's x [t, d], indices U32 [t, k] and order of all e experts.
    /// t may differ between members. More rows than `to` has room for is an error. `spread` is for recordings.
    pub fn dispatch(
        &self,
        s: &mut Stream,
        x: Tensor,
        indices: Tensor,
        order: Order,
        spread: Spread,
        to: Received,
    ) -> Result<()> {
        const OP: &str = "dispatch";
        let (t, d, k) = (x.rows(), x.cols(), indices.cols());
        let at = self.place(OP, Some(order.offsets), to)?;
        expect_tensor(OP, "indices", indices, DType::U32, &[t, k])?;
        expect_tensor(OP, "token_of_row", order.token_of_row, DType::U32, &[t * k])?;
        expect_tensor(OP, "rows", to.rows, x.dtype, &[at.cap, d])?;
        let row_bytes = self.wire.row_bytes(x.dtype, d);
        let plain = (t * d * x.dtype.size_bytes()) as u64;
        let cost = Cost::stream(0, plain, plain * k as u64) + self.dispatch_wire(&at, spread, t as u64 * row_bytes);
        let reads = [x, indices, order.offsets, order.token_of_row];
        self.launch(s, OP, &reads, &[to.rows, to.offsets, to.origin], cost, move |meeting, here| {
            if let Some(waited) = nccl::dispatch(&meeting, here, &at, (x, indices), order, to)? {
                return Ok(waited);
            }
            let m = here.host()?;
            with_float!(x.dtype, T => {
                let copies = at.copies(&m.read::<u32>(indices), k);
                let offsets = m.download(order.offsets);
                let mine = Sent {
                    parts: at.by_node(&offsets),
                    tokens: Arc::new(Tokens {
                        rows: Rows::encode(meeting.wire, &m.read::<T>(x), d),
                        token_of_row: m.download(order.token_of_row),
                        first_row: 0,
                        d,
                    }),
                    offsets,
                    tokens_to: copies.tokens_to,
                };
                let what = format!("{:?} rows of {d}, {} experts", x.dtype, at.num_experts);
                let met = meeting.meet(what.clone(), mine)?;
                let (tokens, passed) = meeting.pass_on(&at, what, &met)?;
                let tokens_to: Vec<&[u64]> = met.all.iter().map(|sent| &sent.tokens_to[..]).collect();
                let in_node = copies.to_node_members + at.passed_on(&tokens_to);
                let counted = LinkBytes { intra_node: in_node * row_bytes, inter_node: copies.to_nodes * row_bytes };
                let handed = meeting.handed(&met).map(|handed| handed + passed.bytes);
                meeting.comm.count(Traffic::Dispatch, counted, handed);
                let load = place_rows::<T>(&meeting, m, &at, &met.all, &tokens, to)?;
                Ok(Waited { nanos: met.nanos + passed.nanos, load: Some(load) })
            })
        })
    }

    /// Assigns out [cap, d] the members' rows [t k, d], in expert order, where dispatch put theirs.
    pub fn send_rows(&self, s: &mut Stream, rows: Tensor, order: Order, received: Received, out: Tensor) -> Result<()> {
        const OP: &str = "send_rows";
        let (n, d) = (rows.rows(), rows.cols());
        let at = self.place(OP, Some(order.offsets), received)?;
        expect_tensor(OP, "token_of_row", order.token_of_row, DType::U32, &[n])?;
        expect_tensor(OP, "out", out, rows.dtype, &[at.cap, d])?;
        let row_bytes = self.wire.row_bytes(rows.dtype, d);
        let plain = (n * d * rows.dtype.size_bytes()) as u64;
        let cost = Cost::stream(0, plain, plain) + self.send_wire(&at, n as u64 * row_bytes, row_bytes);
        let reads = [rows, order.offsets, received.offsets, received.origin];
        self.launch(s, OP, &reads, &[out], cost, move |meeting, here| {
            if let Some(waited) = nccl::send_rows(&meeting, here, &at, rows, order, received, out)? {
                return Ok(waited);
            }
            let m = here.host()?;
            with_float!(rows.dtype, T => {
                let offsets: Vec<u32> = m.download(order.offsets);
                let mine = Sent {
                    parts: at.direct(&offsets),
                    tokens: Arc::new(Tokens {
                        rows: Rows::encode(meeting.wire, &m.read::<T>(rows), d),
                        token_of_row: Vec::new(),
                        first_row: 0,
                        d,
                    }),
                    offsets,
                    tokens_to: Vec::new(),
                };
                let rows_to: Vec<u64> = mine.parts.iter().map(|rows| rows.len() as u64).collect();
                let met = meeting.meet(format!("{:?} rows of {d}, {} experts", rows.dtype, at.num_experts), mine)?;
                meeting.count(Traffic::Dispatch, row_bytes, &rows_to, &met);
                let sent = met.all;
                let num_rows = m.read::<u32>(received.offsets)[at.num_local()] as usize;
                let offsets: Vec<&[u32]> = sent.iter().map(|sent| &sent.offsets[..]).collect();
                let load = at.load(&offsets);
                meeting.expect_rows(load.0 as usize, num_rows)?;
                let origin = m.read::<u32>(received.origin);
                for_row_chunks(&mut m.write::<T>(out)[..num_rows * d], d, #[inline(always)] |first, chunk| {
                    for (out, from) in chunk.chunks_exact_mut(d).zip(origin[2 * first..].chunks_exact(2)) {
                        sent[from[0] as usize].tokens.decode(from[1], out);
                    }
                });
                Ok(Waited { nanos: met.nanos, load: Some(load) })
            })
        })
    }

    /// Assigns out [t k, d], in this rank's expert order, its rows from the members' rows [cap, d], that lie as dispatch put them.
    pub fn return_rows(&self, s: &mut Stream, rows: Tensor, received: Received, out: Tensor) -> Result<()> {
        const OP: &str = "return_rows";
        let (n, d) = (out.rows(), out.cols());
        let at = self.place(OP, None, received)?;
        expect_tensor(OP, "rows", rows, out.dtype, &[at.cap, d])?;
        let row_bytes = self.wire.row_bytes(rows.dtype, d);
        let plain = (n * d * rows.dtype.size_bytes()) as u64;
        let cost = Cost::stream(0, plain, plain) + self.return_wire(&at, n as u64 * row_bytes, row_bytes);
        self.launch(s, OP, &[rows, received.offsets, received.origin], &[out], cost, move |meeting, here| {
            if let Some(waited) = nccl::return_rows(&meeting, here, &at, rows, received, out)? {
                return Ok(waited);
            }
            let m = here.host()?;
            with_float!(rows.dtype, T => {
                let num_rows = m.read::<u32>(received.offsets).last().copied().unwrap_or(0) as usize;
                let mut places = vec![Vec::new(); meeting.group.len()];
                for (row, from) in m.read::<u32>(received.origin).chunks_exact(2).take(num_rows).enumerate() {
                    places[from[0] as usize].push((from[1], row as u32));
                }
                let mine = Returned {
                    rows: Rows::encode(meeting.wire, &m.read::<T>(rows)[..num_rows * d], d),
                    places,
                    num_rows: num_rows as u64,
                    d,
                };
                let rows_to: Vec<u64> = mine.places.iter().map(|places| places.len() as u64).collect();
                let met = meeting.meet(format!("{:?} rows of {d}", rows.dtype), mine)?;
                meeting.count(Traffic::Combine, row_bytes, &rows_to, &met);
                let back = met.all;
                const NOBODY: u32 = u32::MAX;
                let mut holder = vec![(NOBODY, 0); n];
                for (member, back) in back.iter().enumerate() {
                    for &(row, at) in &back.places[meeting.me] {
                        holder[row as usize] = (member as u32, at);
                    }
                }
                if let Some(row) = holder.iter().position(|(member, _)| *member == NOBODY) {
                    let what = format!("no member has row {row} of the {n} of rank {}", meeting.comm.rank);
                    return Err(meeting.error(&what));
                }
                for_row_chunks(&mut m.write::<T>(out), d, #[inline(always)] |first, chunk| {
                    for (out, &(member, at)) in chunk.chunks_exact_mut(d).zip(&holder[first..]) {
                        back[member as usize].rows.decode(at as usize, out);
                    }
                });
                let most = back.iter().map(|back| back.num_rows).max().unwrap_or(0);
                Ok(Waited { nanos: met.nanos, load: Some((num_rows as u64, most)) })
            })
        })
    }

    /// Checks what the ops have in common, and where this rank is.
    fn place(&self, op: &'static str, offsets: Option<Tensor>, received: Received) -> Result<Place> {
        let me = self.comm.place_in(op, &self.group)?;
        let n = self.group.len();
        let cap = received.origin.rows();
        expect_tensor(op, "origin", received.origin, DType::U32, &[cap, 2])?;
        let num_experts = self.num_experts;
        expect_that(op, "offsets", received.offsets, n <= num_experts, || {
            format!("of at least one expert for each of {n} ranks, of {num_experts} in all")
        })?;
        let nodes = self.group.iter().map(|&rank| self.comm.node_of(rank)).collect();
        let at = Place { me, num_experts, cap, nodes };
        expect_tensor(op, "received offsets", received.offsets, DType::U32, &[at.num_local() + 1])?;
        if let Some(offsets) = offsets {
            expect_tensor(op, "offsets", offsets, DType::U32, &[num_experts + 1])?;
        }
        Ok(at)
    }

    fn launch(
        &self,
        s: &mut Stream,
        op: &'static str,
        reads: &[Tensor],
        writes: &[Tensor],
        cost: Cost,
        job: impl FnOnce(Meeting, &mut Here) -> Result<Waited> + Send + 'static,
    ) -> Result<()> {
        let exchange = self.clone();
        let me = self.comm.place_in(op, &self.group)?;
        let rendezvous = || Rendezvous::Collective { group: self.comm.group_in_run(&self.group), tag: self.tag };
        self.comm.launch(s, op, (reads, writes), rendezvous, cost, move |comm, hub, here| {
            let Exchange { group, tag, wire, .. } = exchange;
            job(Meeting { comm, hub, group, me, op, tag, wire }, here)
        })
    }

    /// Expected bytes on links of dispatching tokens of `token_bytes` in all, every member having as many: a copy for each other node,
    /// and one for each other rank of this node that has an expert of a token that begins or arrives here.
    fn dispatch_wire(&self, at: &Place, spread: Spread, token_bytes: u64) -> Cost {
        let begin_here = (1 + at.arriving().count()) as f64;
        wire(token_bytes, spread.ranks_near * begin_here, spread.nodes_afar)
    }

    /// Expected bytes on links of sending rows of `bytes` in all, by row: a member gets as its share of the experts is.
    fn send_wire(&self, at: &Place, bytes: u64, row_bytes: u64) -> Cost {
        if let Some((num_tokens, spread)) = self.reduced {
            return self.dispatch_wire(at, spread, num_tokens * row_bytes);
        }
        let share = |members: Range<usize>| {
            (at.experts_of(members.end).start - at.experts_of(members.start).start) as f64 / at.num_experts as f64
        };
        let (node, mine) = (share(at.here()), share(at.me..at.me + 1));
        wire(bytes, node - mine, 1.0 - node)
    }

    /// Expected bytes on links of returning rows, of which this rank and every other gets `bytes` in all: this rank has its share of
    /// the experts' of them. One of a token's sums goes to where the token begins or arrived, and one from there to its node.
    fn return_wire(&self, at: &Place, bytes: u64, row_bytes: u64) -> Cost {
        let (n, m) = (at.nodes.len(), at.here().len());
        if let Some((num_tokens, spread)) = self.reduced {
            let arriving = at.arriving().count();
            let near = spread.this_rank * (n - 1 - arriving) as f64;
            return wire(num_tokens * row_bytes, near, spread.this_node * arriving as f64);
        }
        let share = at.num_local() as f64 / at.num_experts as f64;
        wire(bytes, share * (m - 1) as f64, share * (n - m) as f64)
    }
}

/// So many times `bytes` to ranks of this node, and to others.
fn wire(bytes: u64, near: f64, afar: f64) -> Cost {
    let times = |copies: f64| (bytes as f64 * copies).round() as u64;
    Cost::wire(times(near), times(afar))
}

/// A rank in one exchange while it runs.
pub(super) struct Meeting<'a> {
    pub comm: &'a Comm,
    pub hub: &'a Hub,
    pub group: Arc<[u32]>,
    pub me: usize,
    op: &'static str,
    tag: u64,
    pub wire: Wire,
}

/// What it took to pass on what arrived.
#[derive(Default)]
struct PassedOn {
    bytes: LinkBytes,
    nanos: u64,
}

impl Meeting<'_> {
    pub fn meet<T: Brought>(&self, what: String, mine: T) -> Result<Met<T>> {
        let call = Call { op: self.op, tag: self.tag, what: format!("{what} as {:?}", self.wire) };
        self.hub.meet((self.comm.lane, &self.comm.group_in_run(&self.group)), self.me, call, mine)
    }

    /// Tokens by source. Where members share no memory, those from other nodes are at the member that they arrived at, and are
    /// passed on to the others of the node.
    fn pass_on<T: Float>(
        &self,
        at: &Place,
        what: String,
        met: &Met<Sent<T>>,
    ) -> Result<(Vec<Arc<Tokens<T>>>, PassedOn)> {
        let mut tokens: Vec<_> = met.all.iter().map(|sent| sent.tokens.clone()).collect();
        let here = at.here();
        if met.handed_bytes.is_none() || here.len() == tokens.len() {
            return Ok((tokens, PassedOn::default()));
        }
        let arrived = at.arriving().map(|source| {
            let parts = here.clone().map(|to| at.rows_for(&met.all[source].offsets, to..to + 1)).collect();
            Arrived { source, tokens: tokens[source].clone(), parts }
        });
        let arrived = Passed(arrived.collect());
        let node = self.in_node(at);
        let passed = node.meet(format!("{what}, inside of a node,"), arrived)?;
        for arrived in passed.all.iter().flat_map(|passed| &passed.0) {
            let place = tokens.get_mut(arrived.source);
            *place.ok_or_else(|| self.error(&format!("tokens of source {} were passed on", arrived.source)))? =
                arrived.tokens.clone();
        }
        let bytes = node.handed(&passed).unwrap_or_default();
        Ok((tokens, PassedOn { bytes, nanos: passed.nanos }))
    }

    /// The same with those of this rank's node only.
    pub fn in_node(&self, at: &Place) -> Meeting<'_> {
        let here = at.here();
        Meeting { group: self.group[here.clone()].into(), me: at.me - here.start, ..*self }
    }

    /// Meters rows that went to each member, directly.
    fn count<T>(&self, traffic: Traffic, row_bytes: u64, rows_to: &[u64], met: &Met<T>) {
        let counted = self.comm.bytes_to(&self.group, rows_to.iter().map(|rows| rows * row_bytes));
        self.comm.count(traffic, counted, self.handed(met));
    }

    /// Refuses rows that are not those that were dispatched.
    pub fn expect_rows(&self, coming: usize, dispatched: usize) -> Result<()> {
        if coming == dispatched {
            return Ok(());
        }
        let rank = self.comm.rank;
        Err(self.error(&format!("{coming} rows come to rank {rank}, where {dispatched} were dispatched")))
    }

    /// Refuses more rows than there is room for.
    pub fn expect_room(&self, num_rows: usize, at: &Place) -> Result<()> {
        if num_rows <= at.cap {
            return Ok(());
        }
        Err(self.error(&format!(
            "{num_rows} rows come to rank {}, which has room for {}; the most that can come is n t min(k, its experts), for n ranks \
             of t tokens",
            self.comm.rank, at.cap
        )))
    }

    /// What this rank handed to the engine, if it did.
    fn handed<T>(&self, met: &Met<T>) -> Option<LinkBytes> {
        Some(self.comm.bytes_to(&self.group, met.handed_bytes.as_ref()?.iter().copied()))
    }

    pub fn error(&self, what: &str) -> Error {
        Error::Comm { op: self.op, message: format!("tag {}: {what}", self.tag) }
    }
}

/// Writes the received rows, their offsets and origins, of each source's counts and tokens; returns this rank's load and the largest.
fn place_rows<T: Float>(
    meeting: &Meeting,
    m: &Memory,
    at: &Place,
    sent: &[Arc<Sent<T>>],
    tokens: &[Arc<Tokens<T>>],
    to: Received,
) -> Result<(u64, u64)> {
    let all: Vec<&[u32]> = sent.iter().map(|sent| &sent.offsets[..]).collect();
    let load = at.load(&all);
    let num_rows = load.0 as usize;
    meeting.expect_room(num_rows, at)?;
    let (offsets, origin) = at.lay_out(&all);
    m.write::<u32>(to.offsets).copy_from_slice(&offsets);
    m.write::<u32>(to.origin)[..2 * num_rows].copy_from_slice(origin.as_flattened());
    let d = to.rows.cols();
    for_row_chunks(
        &mut m.write::<T>(to.rows)[..num_rows * d],
        d,
        #[inline(always)]
        |first, chunk| {
            for (out, &[member, row]) in chunk.chunks_exact_mut(d).zip(&origin[first..]) {
                tokens[member as usize].decode(row, out);
            }
        },
    );
    Ok(load)
}

#[cfg(test)]
mod tests;
