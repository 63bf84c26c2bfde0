//! Expert parallelism: rows to the ranks of their experts, and back.
//!
//! The e experts of a layer are spread over the n members of a group: member i has experts `i e/n..(i + 1) e/n`. On the source, t
//! tokens of k slots make t k rows in expert order ([`permute`](crate::ops::permute)). At the member, the rows of its experts lie by
//! expert, within an expert by source member, within a member in the source's order. That is the order that one rank with
//! the tokens of all members, one after the other, would give them, so that a product over them sums in the same order.
//!
//! - [`Exchange::dispatch`]: x to rows at the experts. A token goes once to a member, however many of its experts are there.
//! - [`Exchange::return_rows`]: rows back to their places in the source's expert order: the forward pass of combine, and the
//!   backward pass of dispatch. The weighted sum of a token's rows stays with the source, in slot order: bits do not depend on n.
//! - [`Exchange::send_rows`]: rows from expert order to where dispatch put them: the backward pass of combine.
//!
//! A receiver's buffers have room for `cap` rows, known before the routing is; the number that came is `offsets.last()`, and rows
//! past it are unspecified. Counts are exchanged with the rows, so no host waits for them.
//!
//! Shape letters: t tokens of this rank, k slots of a token, d columns, e experts, n members.

use std::{ops::Range, sync::Arc};

use super::{
    Comm, Hub, LinkBytes, Spread, Wire,
    local::Call,
    meter::Traffic,
    pack::{Brought, put, take},
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
    stream::{Rendezvous, Stream, Waited},
    tensor::Tensor,
    with_float,
};

/// The rows that came to this rank's experts.
#[derive(Clone, Copy, Debug)]
pub struct Received {
    /// Rows by expert; [cap, d].
    pub rows: Tensor,
    /// This rank's expert j has rows `offsets[j]..offsets[j + 1]`; U32 \[e/n + 1\].
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
        let at = self.place(OP, order.offsets, to)?;
        expect_tensor(OP, "indices", indices, DType::U32, &[t, k])?;
        expect_tensor(OP, "token_of_row", order.token_of_row, DType::U32, &[t * k])?;
        expect_tensor(OP, "rows", to.rows, x.dtype, &[at.cap, d])?;
        let row_bytes = self.wire.row_bytes(x.dtype, d);
        let plain = (t * d * x.dtype.size_bytes()) as u64;
        let cost = Cost::stream(0, plain, plain * k as u64) + self.dispatch_wire(&at, spread, t as u64 * row_bytes);
        let reads = [x, indices, order.offsets, order.token_of_row];
        self.launch(s, OP, &reads, &[to.rows, to.offsets, to.origin], cost, move |meeting, m| {
            with_float!(x.dtype, T => {
                let tokens_to = tokens_to(&m.read::<u32>(indices), k, &at, |to_nodes, to_members| {
                    meeting.comm.count(Traffic::Dispatch, LinkBytes {
                        intra_node: to_members * row_bytes,
                        inter_node: to_nodes * row_bytes,
                    });
                });
                let mine = Sent {
                    rows: Rows::encode(meeting.wire, &m.read::<T>(x), d),
                    offsets: m.download(order.offsets),
                    token_of_row: m.download(order.token_of_row),
                    tokens_to,
                    first_row: 0,
                    d,
                };
                let (sent, nanos) = meeting.meet(format!("{:?} rows of {d}, {} experts", x.dtype, at.num_experts), mine)?;
                meeting.comm.count(Traffic::Dispatch, LinkBytes {
                    intra_node: at.passed_on(&sent) * row_bytes,
                    inter_node: 0,
                });
                let load = place_rows::<T>(&meeting, m, &at, &sent, to)?;
                Ok(Waited { nanos, load: Some(load) })
            })
        })
    }

    /// Assigns out [cap, d] the members' rows [t k, d], in expert order, where dispatch put theirs.
    pub fn send_rows(&self, s: &mut Stream, rows: Tensor, order: Order, received: Received, out: Tensor) -> Result<()> {
        const OP: &str = "send_rows";
        let (n, d) = (rows.rows(), rows.cols());
        let at = self.place(OP, order.offsets, received)?;
        expect_tensor(OP, "token_of_row", order.token_of_row, DType::U32, &[n])?;
        expect_tensor(OP, "out", out, rows.dtype, &[at.cap, d])?;
        let row_bytes = self.wire.row_bytes(rows.dtype, d);
        let cost = self.rows_cost(&at, n, rows, row_bytes);
        let reads = [rows, order.offsets, received.offsets, received.origin];
        self.launch(s, OP, &reads, &[out], cost, move |meeting, m| {
            with_float!(rows.dtype, T => {
                let mine = Sent {
                    rows: Rows::encode(meeting.wire, &m.read::<T>(rows), d),
                    offsets: m.download(order.offsets),
                    token_of_row: Vec::new(),
                    tokens_to: Vec::new(),
                    first_row: 0,
                    d,
                };
                meeting.count(Traffic::Dispatch, row_bytes, |member| at.rows_to(&mine.offsets, member) as u64);
                let (sent, nanos) = meeting.meet(format!("{:?} rows of {d}, {} experts", rows.dtype, at.num_experts), mine)?;
                let num_rows = m.read::<u32>(received.offsets)[at.num_local()] as usize;
                let coming: usize = sent.iter().map(|sent| at.rows_to(&sent.offsets, at.me)).sum();
                if coming != num_rows {
                    let what = format!("{coming} rows come to rank {}, where {num_rows} were dispatched", meeting.comm.rank);
                    return Err(meeting.error(&what));
                }
                let origin = m.read::<u32>(received.origin);
                for_row_chunks(&mut m.write::<T>(out)[..num_rows * d], d, #[inline(always)] |first, chunk| {
                    for (out, from) in chunk.chunks_exact_mut(d).zip(origin[2 * first..].chunks_exact(2)) {
                        let sent = &sent[from[0] as usize];
                        sent.rows.decode((from[1] - sent.first_row) as usize, out);
                    }
                });
                Ok(Waited { nanos, load: Some(at.load(&sent)) })
            })
        })
    }

    /// Assigns out [t k, d], in this rank's expert order, its rows from the members' rows [cap, d], that lie as dispatch put them.
    pub fn return_rows(&self, s: &mut Stream, rows: Tensor, received: Received, out: Tensor) -> Result<()> {
        const OP: &str = "return_rows";
        let (n, d) = (out.rows(), out.cols());
        let at = self.place(OP, received.offsets, received)?;
        expect_tensor(OP, "rows", rows, out.dtype, &[at.cap, d])?;
        let row_bytes = self.wire.row_bytes(rows.dtype, d);
        let cost = self.rows_cost(&at, n, out, row_bytes);
        self.launch(s, OP, &[rows, received.offsets, received.origin], &[out], cost, move |meeting, m| {
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
                meeting.count(Traffic::Combine, row_bytes, |member| mine.places[member].len() as u64);
                let (back, nanos) = meeting.meet(format!("{:?} rows of {d}", rows.dtype), mine)?;
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
                Ok(Waited { nanos, load: Some((num_rows as u64, most)) })
            })
        })
    }

    /// Checks what the ops have in common, and where this rank is.
    fn place(&self, op: &'static str, offsets: Tensor, received: Received) -> Result<Place> {
        let me = self.comm.place_in(op, &self.group)?;
        let n = self.group.len();
        let cap = received.origin.rows();
        expect_tensor(op, "origin", received.origin, DType::U32, &[cap, 2])?;
        let num_local = received.offsets.len().saturating_sub(1);
        expect_tensor(op, "received offsets", received.offsets, DType::U32, &[num_local + 1])?;
        let num_experts = num_local * n;
        let fits = offsets == received.offsets
            || (offsets.dtype == DType::U32 && offsets.shape == *[num_experts + 1].as_slice());
        expect_that(op, "offsets", offsets, fits, || {
            format!("U32 of [{}], for {num_local} experts on each of {n} ranks", num_experts + 1)
        })?;
        let nodes = self.group.iter().map(|&rank| self.comm.node_of(rank)).collect();
        Ok(Place { me, num_experts, cap, nodes })
    }

    fn launch(
        &self,
        s: &mut Stream,
        op: &'static str,
        reads: &[Tensor],
        writes: &[Tensor],
        cost: Cost,
        job: impl FnOnce(Meeting, &Memory) -> Result<Waited> + Send + 'static,
    ) -> Result<()> {
        let exchange = self.clone();
        let me = self.comm.place_in(op, &self.group)?;
        let rendezvous = || Rendezvous::Collective { group: self.comm.group_in_run(&self.group), tag: self.tag };
        self.comm.launch(s, op, (reads, writes), rendezvous, cost, move |comm, hub, m| {
            let Exchange { group, tag, wire, .. } = exchange;
            job(Meeting { comm, hub, group, me, op, tag, wire }, m)
        })
    }

    /// Expected bytes on links of dispatching tokens of `token_bytes` in all: a copy per other node, and from the ranks of
    /// arrival one per other rank of the node. All other members being alike, each is hit with probability ranks / (n - 1),
    /// and one in m of a remote node's is the rank of arrival.
    fn dispatch_wire(&self, at: &Place, spread: Spread, token_bytes: u64) -> Cost {
        let (n, m) = (at.nodes.len() as f64, at.node_members(at.nodes[at.me]).count() as f64);
        let hit = if n > 1.0 { spread.ranks_per_token / (n - 1.0) } else { 0.0 };
        let copies = hit * ((m - 1.0) + (n - m) * (1.0 - 1.0 / m));
        let bytes = |copies: f64| (token_bytes as f64 * copies).round() as u64;
        Cost::wire(bytes(copies), bytes(spread.nodes_per_token))
    }

    /// Expected cost of `num_rows` rows like those of `like`, to all members alike.
    fn rows_cost(&self, at: &Place, num_rows: usize, like: Tensor, row_bytes: u64) -> Cost {
        let (n, m) = (at.nodes.len(), at.node_members(at.nodes[at.me]).count());
        let plain = (num_rows * like.cols() * like.dtype.size_bytes()) as u64;
        if let Some((num_tokens, spread)) = self.reduced {
            return Cost::stream(0, plain, plain) + self.dispatch_wire(at, spread, num_tokens * row_bytes);
        }
        let bytes = |members: usize| num_rows as u64 * row_bytes * members as u64 / n as u64;
        Cost::stream(0, plain, plain) + Cost::wire(bytes(m - 1), bytes(n - m))
    }
}

/// What a source puts down: its rows or tokens, and which expert's they are.
struct Sent<T> {
    rows: Rows<T>,
    offsets: Vec<u32>,
    /// Empty where there is a row for each.
    token_of_row: Vec<u32>,
    /// Tokens that have an expert at each member.
    tokens_to: Vec<u64>,
    /// The first row that is here.
    first_row: u32,
    d: usize,
}

/// A process gets the rows of its experts, and of each token that goes to it one row.
impl<T: Float> Brought for Sent<T> {
    fn pack(&self, member: usize, num_members: usize) -> Vec<u8> {
        let num_local = (self.offsets.len() - 1) / num_members;
        let [first, end] = [member, member + 1].map(|member| self.offsets[member * num_local]);
        let (rows, token_of_row) = match self.token_of_row.get(first as usize..end as usize) {
            None => ((first..end).collect(), Vec::new()),
            Some(tokens) => {
                let mut rows = tokens.to_vec();
                rows.sort_unstable();
                rows.dedup();
                let place = |token| rows.partition_point(|&row| row < token) as u32;
                let places: Vec<u32> = tokens.iter().map(|&token| place(token)).collect();
                (rows, places)
            }
        };
        let mut bytes = Vec::new();
        put(&mut bytes, &[first, self.d as u32, self.rows.wire() as u32]);
        put(&mut bytes, &self.offsets);
        put(&mut bytes, &token_of_row);
        put(&mut bytes, &self.tokens_to);
        bytes.extend(self.rows.pack(&rows, self.d));
        bytes
    }

    fn unpack(mut bytes: &[u8]) -> Option<Self> {
        let [first_row, d, wire] = take::<u32>(&mut bytes)?.try_into().ok()?;
        Some(Sent {
            first_row,
            d: d as usize,
            offsets: take(&mut bytes)?,
            token_of_row: take(&mut bytes)?,
            tokens_to: take(&mut bytes)?,
            rows: Rows::take(Wire::of(wire)?, &mut bytes)?,
        })
    }
}

/// What a rank with experts puts down.
struct Returned<T> {
    rows: Rows<T>,
    /// By source member: row in its expert order, and row here.
    places: Vec<Vec<(u32, u32)>>,
    num_rows: u64,
    d: usize,
}

/// A process gets its own rows back.
impl<T: Float> Brought for Returned<T> {
    fn pack(&self, member: usize, num_members: usize) -> Vec<u8> {
        let (places, rows): (Vec<u32>, Vec<u32>) = self.places[member].iter().copied().unzip();
        let mut bytes = Vec::new();
        put(&mut bytes, &[member as u64, num_members as u64, self.num_rows, self.d as u64, self.rows.wire() as u64]);
        put(&mut bytes, &places);
        bytes.extend(self.rows.pack(&rows, self.d));
        bytes
    }

    fn unpack(mut bytes: &[u8]) -> Option<Self> {
        let [member, num_members, num_rows, d, wire] = take::<u64>(&mut bytes)?.try_into().ok()?;
        let mut places = vec![Vec::new(); num_members as usize];
        *places.get_mut(member as usize)? = take(&mut bytes)?.into_iter().zip(0..).collect();
        Some(Returned { places, num_rows, d: d as usize, rows: Rows::take(Wire::of(wire as u32)?, &mut bytes)? })
    }
}

/// A rank in one exchange while it runs.
struct Meeting<'a> {
    comm: &'a Comm,
    hub: &'a Hub,
    group: Arc<[u32]>,
    me: usize,
    op: &'static str,
    tag: u64,
    wire: Wire,
}

impl Meeting<'_> {
    fn meet<T: Brought>(&self, what: String, mine: T) -> Result<(Vec<Arc<T>>, u64)> {
        let call = Call { op: self.op, tag: self.tag, what: format!("{what} as {:?}", self.wire) };
        self.hub.meet((self.comm.lane, &self.comm.group_in_run(&self.group)), self.me, call, mine)
    }

    /// Meters `rows(member)` rows to each member.
    fn count(&self, traffic: Traffic, row_bytes: u64, rows: impl Fn(usize) -> u64) {
        let to_each = self.group.iter().enumerate();
        self.comm.count(traffic, to_each.map(|(i, &rank)| self.comm.link_bytes(rank, rows(i) * row_bytes)).sum());
    }

    fn error(&self, what: &str) -> Error {
        Error::Comm { op: self.op, message: format!("tag {}: {what}", self.tag) }
    }
}

/// Where this rank and its experts are.
struct Place {
    me: usize,
    /// Of all members.
    num_experts: usize,
    cap: usize,
    /// Of each member.
    nodes: Vec<u32>,
}

impl Place {
    fn num_local(&self) -> usize {
        self.num_experts / self.nodes.len()
    }

    fn experts_of(&self, member: usize) -> Range<usize> {
        member * self.num_local()..(member + 1) * self.num_local()
    }

    /// Rows of a source with these offsets that are for `member`.
    fn rows_to(&self, offsets: &[u32], member: usize) -> usize {
        let experts = self.experts_of(member);
        (offsets[experts.end] - offsets[experts.start]) as usize
    }

    /// Rows for this rank's experts, and the most for any member's.
    fn load<T>(&self, sent: &[Arc<Sent<T>>]) -> (u64, u64) {
        let rows = |member| sent.iter().map(|sent| self.rows_to(&sent.offsets, member) as u64).sum::<u64>();
        (rows(self.me), (0..sent.len()).map(rows).max().unwrap_or(0))
    }

    fn node_members(&self, node: u32) -> impl Iterator<Item = usize> + '_ {
        (0..self.nodes.len()).filter(move |&i| self.nodes[i] == node)
    }

    /// The member of `node` that `source`'s tokens arrive at: the one with the same place in its node.
    fn arrival(&self, source: usize, node: u32) -> usize {
        let place = self.node_members(self.nodes[source]).position(|i| i == source).unwrap_or(0);
        let members: Vec<usize> = self.node_members(node).collect();
        members[place % members.len()]
    }

    /// Copies that this rank makes of tokens that arrived at it from other nodes, for other ranks of its node.
    fn passed_on<T>(&self, sent: &[Arc<Sent<T>>]) -> u64 {
        let node = self.nodes[self.me];
        let arriving = (0..sent.len()).filter(|&i| self.nodes[i] != node && self.arrival(i, node) == self.me);
        let others = |i: usize| self.node_members(node).filter(|&j| j != self.me).map(move |j| sent[i].tokens_to[j]);
        arriving.flat_map(others).sum()
    }
}

/// Tokens with an expert at each member; tells `count` the copies to other nodes, and to other members of this rank's node.
fn tokens_to(indices: &[u32], k: usize, at: &Place, count: impl FnOnce(u64, u64)) -> Vec<u64> {
    let (mut tokens_to, mut to_nodes) = (vec![0; at.nodes.len()], 0);
    let num_local = at.num_local();
    let (mut members, mut nodes) = (Vec::with_capacity(k), Vec::with_capacity(k));
    for token in indices.chunks_exact(k.max(1)) {
        members.clear();
        nodes.clear();
        for &expert in token {
            let member = expert as usize / num_local;
            if !members.contains(&member) {
                members.push(member);
                tokens_to[member] += 1;
                let node = at.nodes[member];
                if node != at.nodes[at.me] && !nodes.contains(&node) {
                    nodes.push(node);
                    to_nodes += 1;
                }
            }
        }
    }
    let beside = at.node_members(at.nodes[at.me]).filter(|&i| i != at.me).map(|i| tokens_to[i]).sum();
    count(to_nodes, beside);
    tokens_to
}

/// Writes the received rows, their offsets and origins; returns this rank's load and the largest.
fn place_rows<T: Float>(
    meeting: &Meeting,
    m: &Memory,
    at: &Place,
    sent: &[Arc<Sent<T>>],
    to: Received,
) -> Result<(u64, u64)> {
    let load = at.load(sent);
    let num_rows = load.0 as usize;
    if num_rows > at.cap {
        return Err(meeting.error(&format!(
            "{num_rows} rows come to rank {}, which has room for {}; the most that can come is n t min(k, e/n), for n ranks of t \
             tokens",
            meeting.comm.rank, at.cap
        )));
    }
    let (mut offsets, mut origin) = (m.write::<u32>(to.offsets), m.write::<u32>(to.origin));
    let mut next = 0;
    offsets[0] = 0;
    for (j, expert) in at.experts_of(at.me).enumerate() {
        for (member, sent) in sent.iter().enumerate() {
            for row in sent.offsets[expert]..sent.offsets[expert + 1] {
                origin[2 * next..][..2].copy_from_slice(&[member as u32, row]);
                next += 1;
            }
        }
        offsets[j + 1] = next as u32;
    }
    let d = to.rows.cols();
    for_row_chunks(
        &mut m.write::<T>(to.rows)[..num_rows * d],
        d,
        #[inline(always)]
        |first, chunk| {
            for (out, from) in chunk.chunks_exact_mut(d).zip(origin[2 * first..].chunks_exact(2)) {
                let sent = &sent[from[0] as usize];
                sent.rows.decode(sent.token_of_row[(from[1] - sent.first_row) as usize] as usize, out);
            }
        },
    );
    Ok(load)
}

#[cfg(test)]
mod tests;
