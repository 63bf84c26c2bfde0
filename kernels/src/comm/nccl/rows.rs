//! Rows to experts and back between GPUs: the ragged all-to-alls of [`crate::comm::Exchange`], as grouped sends and receives.
//!
//! Ranks tell each other over MPI which rows there are, and rows never come to the host. Those of one expert and one source lie together
//! on both sides, so rows that go one by one are sent from where they are to where they belong. Tokens, which go once to each member and
//! once to each other node, are gathered into the stream's scratch, exchanged, passed on inside of nodes, and gathered from there into
//! the rows of experts. The scratch grows to the tokens that a layer sends and gets.
//!
//! Only rows that go as they are: those that are encoded for the way are encoded by the host.

use std::ops::Range;

use super::{
    abi::{Handle, Piece},
    way::Way,
};
use crate::{
    comm::{
        LinkBytes, Wire,
        exchange::{Meeting, Place, Received, once},
        meter::Traffic,
        pack::{Brought, Packed, take},
    },
    dtype::DType,
    error::Result,
    ops::permute::Order,
    ptx::{Arg, NCCL_SLOT, permute::gather_rows},
    stream::{Here, Waited},
    tensor::Tensor,
};

/// Numbers that a member tells the others.
struct Told(Vec<u32>);

impl Brought for Told {
    fn pack(&self, _: usize, _: usize) -> Packed {
        let mut packed = Packed::default();
        packed.put(&self.0);
        packed
    }

    fn unpack(mut bytes: &[u8]) -> Option<Self> {
        take(&mut bytes).map(Told)
    }
}

/// Rows of a source from `first_row` on.
#[derive(Clone, Default)]
struct Part {
    first_row: u32,
    /// The tokens that they are of, once each, by their numbers where they are gathered from; of another's part none.
    tokens: Vec<u32>,
    /// The place of each row's token among them.
    places: Vec<u32>,
}

impl Part {
    /// Those rows of a source of whose rows each is of such a token.
    fn of(token_of_row: &[u32], rows: Range<u32>, first_row: u32) -> Self {
        let here = (rows.start - first_row) as usize..(rows.end - first_row) as usize;
        let (tokens, places) = once(&token_of_row[here]);
        Part { first_row: rows.start, tokens, places }
    }

    fn num_tokens(&self) -> usize {
        self.places.iter().max().map_or(0, |&last| last as usize + 1)
    }

    fn put(&self, to: &mut Packed) {
        to.put(&[self.first_row]);
        to.put(&self.places);
    }

    fn take(bytes: &mut &[u8]) -> Option<Self> {
        let [first_row] = take(bytes)?.try_into().ok()?;
        Some(Part { first_row, tokens: Vec::new(), places: take(bytes)? })
    }
}

/// What a source tells of its tokens.
struct Source {
    offsets: Vec<u32>,
    /// Tokens that have an expert at each member.
    tokens_to: Vec<u64>,
    /// By member; of another only that for this one.
    parts: Vec<Part>,
}

impl Source {
    fn part_for(&self, me: usize) -> &Part {
        if self.parts.len() == 1 { &self.parts[0] } else { &self.parts[me] }
    }
}

impl Brought for Source {
    fn pack(&self, member: usize, _: usize) -> Packed {
        let mut packed = Packed::default();
        packed.put(&self.offsets);
        packed.put(&self.tokens_to);
        self.parts[member].put(&mut packed);
        packed
    }

    fn unpack(mut bytes: &[u8]) -> Option<Self> {
        let (offsets, tokens_to) = (take(&mut bytes)?, take(&mut bytes)?);
        Some(Source { offsets, tokens_to, parts: vec![Part::take(&mut bytes)?] })
    }
}

/// What a member passes on inside of its node: of each source its part for each of the node's; of another only those for this one.
struct Passed(Vec<(u32, Vec<Part>)>);

impl Brought for Passed {
    fn pack(&self, member: usize, _: usize) -> Packed {
        let mut packed = Packed::default();
        packed.put(&self.0.iter().map(|(source, _)| *source).collect::<Vec<_>>());
        self.0.iter().for_each(|(_, parts)| parts[member].put(&mut packed));
        packed
    }

    fn unpack(mut bytes: &[u8]) -> Option<Self> {
        let sources: Vec<u32> = take(&mut bytes)?;
        let parts = sources.into_iter().map(|source| Some((source, vec![Part::take(&mut bytes)?])));
        parts.collect::<Option<_>>().map(Passed)
    }
}

/// Rows one after the other.
#[derive(Default)]
struct Rows(usize);

impl Rows {
    /// The next ones.
    fn take(&mut self, num_rows: usize) -> Range<usize> {
        let start = self.0;
        self.0 += num_rows;
        start..self.0
    }
}

/// Rows that are to move.
struct Moves<'a> {
    way: Way<'a>,
    row_bytes: u64,
    sends: Vec<Piece>,
    receives: Vec<Piece>,
}

impl<'a> Moves<'a> {
    /// For rows like these, in a meeting; `None` where they go another way.
    fn open(meeting: &'a Meeting<'_>, here: &'a mut Here<'_>, like: Tensor) -> Result<Option<Self>> {
        let goes_as_it_is = match meeting.wire {
            Wire::Exact => true,
            Wire::Bf16 => like.dtype == DType::Bf16,
            Wire::Fp8 => false,
        };
        if !goes_as_it_is {
            return Ok(None);
        }
        let way = Way::open(meeting.comm, meeting.hub, meeting.group.len(), here)?;
        let row_bytes = (like.cols() * like.dtype.size_bytes()) as u64;
        Ok(way.map(|way| Moves { way, row_bytes, sends: Vec::new(), receives: Vec::new() }))
    }

    /// The meeting's communicator, which its members make when they first meet.
    fn comm(&self, meeting: &Meeting<'_>) -> Result<Handle> {
        self.way.comm(&meeting.comm.group_in_run(&meeting.group), meeting.me)
    }

    fn piece(&self, member: usize, from: u64, rows: Range<usize>) -> Piece {
        let bytes = rows.len() * self.row_bytes as usize;
        Piece { member, address: from + rows.start as u64 * self.row_bytes, bytes }
    }

    /// These rows after `from` go to `member`.
    fn send(&mut self, member: usize, from: u64, rows: Range<usize>) {
        self.sends.push(self.piece(member, from, rows));
    }

    /// These rows after `to` come from `member`, which sends it as many at a time, in the same order.
    fn receive(&mut self, member: usize, to: u64, rows: Range<usize>) {
        self.receives.push(self.piece(member, to, rows));
    }

    /// Moves them all between the members of a meeting, own ones too, and waits; what went to others.
    fn run(&mut self, meeting: &Meeting<'_>, comm: Handle) -> Result<LinkBytes> {
        let is_own = |piece: &Piece| piece.member == meeting.me;
        let (mine, sends): (Vec<_>, Vec<_>) = self.sends.drain(..).partition(is_own);
        let (own, receives): (Vec<_>, Vec<_>) = self.receives.drain(..).partition(is_own);
        for (from, to) in mine.iter().zip(&own).filter(|(from, _)| from.bytes > 0) {
            self.way.lane.copy(to.address, from.address, from.bytes)?;
        }
        meeting.comm.watch.strike("nccl");
        self.way.put(comm, &sends, &receives)?;
        self.way.finish(comm)?;
        let mut sent = vec![0; meeting.group.len()];
        sends.iter().for_each(|piece| sent[piece.member] += piece.bytes as u64);
        Ok(meeting.comm.bytes_to(&meeting.group, sent.into_iter()))
    }

    /// Puts row `index[i]` after `x` to row i after `rows`; the numbers are written at `numbers`, which nobody reads now.
    fn gather(&mut self, x: Arg, index: &[u32], numbers: u64, rows: Arg, like: &[Tensor]) -> Result<()> {
        if index.is_empty() {
            return Ok(());
        }
        self.way.lane.gpu().upload(numbers, bytemuck::cast_slice(index))?;
        let launches = gather_rows(x, Arg::U64(numbers), rows, index.len(), like);
        let launches = self.way.lane.within_share(launches);
        self.way.lane.launch(self.way.memory, self.way.task, &launches)
    }

    fn count(&self, meeting: &Meeting<'_>, traffic: Traffic, rows_to: &[usize], handed: LinkBytes) {
        let bytes = rows_to.iter().map(|&rows| rows as u64 * self.row_bytes);
        meeting.comm.count(traffic, meeting.comm.bytes_to(&meeting.group, bytes), Some(handed));
    }
}

/// What members say of rows like these.
fn what(of: Tensor, num_experts: usize) -> String {
    format!("{:?} rows of {}, {num_experts} experts, by NCCL,", of.dtype, of.cols())
}

/// [`crate::comm::Exchange::send_rows`], if NCCL is there for it.
pub fn send_rows(
    meeting: &Meeting<'_>,
    here: &mut Here<'_>,
    at: &Place,
    rows: Tensor,
    order: Order,
    received: Received,
    out: Tensor,
) -> Result<Option<Waited>> {
    let Some(mut moves) = Moves::open(meeting, here, rows)? else { return Ok(None) };
    let (memory, comm) = (moves.way.memory, moves.comm(meeting)?);
    let num_rows = memory.download::<u32>(received.offsets)[at.num_local()] as usize;
    let met = meeting.meet(what(rows, at.num_experts), Told(memory.download(order.offsets)))?;
    let all: Vec<&[u32]> = met.all.iter().map(|told| &told.0[..]).collect();
    let load = at.load(&all);
    meeting.expect_rows(load.0 as usize, num_rows)?;
    let (from, to) = (memory.address(rows)?, memory.address(out)?);
    let of_expert = |offsets: &[u32], expert: usize| offsets[expert] as usize..offsets[expert + 1] as usize;
    for member in 0..all.len() {
        at.experts_of(member).for_each(|expert| moves.send(member, from, of_expert(all[at.me], expert)));
    }
    let mut coming = Rows::default();
    for expert in at.experts_of(at.me) {
        for (member, offsets) in all.iter().enumerate() {
            moves.receive(member, to, coming.take(of_expert(offsets, expert).len()));
        }
    }
    let handed = moves.run(meeting, comm)?;
    let rows_to: Vec<usize> = (0..all.len()).map(|member| at.rows_to(all[at.me], member)).collect();
    moves.count(meeting, Traffic::Dispatch, &rows_to, handed);
    Ok(Some(Waited { nanos: met.nanos, load: Some(load) }))
}

/// [`crate::comm::Exchange::return_rows`], if NCCL is there for it.
pub fn return_rows(
    meeting: &Meeting<'_>,
    here: &mut Here<'_>,
    at: &Place,
    rows: Tensor,
    received: Received,
    out: Tensor,
) -> Result<Option<Waited>> {
    let Some(mut moves) = Moves::open(meeting, here, rows)? else { return Ok(None) };
    let (memory, comm) = (moves.way.memory, moves.comm(meeting)?);
    let (offsets, origin) = (memory.download::<u32>(received.offsets), memory.download::<u32>(received.origin));
    let n = meeting.group.len();
    // Of each expert here, the rows of each source.
    let mut counts = vec![0; at.num_local() * n];
    for (counts, rows) in counts.chunks_exact_mut(n).zip(offsets.windows(2)) {
        (rows[0]..rows[1]).for_each(|row| counts[origin[2 * row as usize] as usize] += 1);
    }
    let met = meeting.meet(what(rows, at.num_experts), Told(counts))?;
    let (from, to) = (memory.address(rows)?, memory.address(out)?);
    let (mut going, mut rows_to) = (Rows::default(), vec![0; n]);
    for counts in met.all[at.me].0.chunks_exact(n) {
        for (member, &count) in counts.iter().enumerate() {
            moves.send(member, from, going.take(count as usize));
            rows_to[member] += count as usize;
        }
    }
    let mut back = Rows::default();
    for (member, told) in met.all.iter().enumerate() {
        for counts in told.0.chunks_exact(n) {
            moves.receive(member, to, back.take(counts[at.me] as usize));
        }
    }
    if back.0 != out.rows() {
        let (back, rank) = (back.0, meeting.comm.rank);
        return Err(meeting.error(&format!("{back} rows come back to rank {rank}, which has {}", out.rows())));
    }
    let handed = moves.run(meeting, comm)?;
    moves.count(meeting, Traffic::Combine, &rows_to, handed);
    let all = met.all.iter().map(|told| told.0.iter().map(|&count| u64::from(count)).sum::<u64>());
    Ok(Some(Waited { nanos: met.nanos, load: Some((going.0 as u64, all.max().unwrap_or(0))) }))
}

/// [`crate::comm::Exchange::dispatch`], if NCCL is there for it.
pub fn dispatch(
    meeting: &Meeting<'_>,
    here: &mut Here<'_>,
    at: &Place,
    (x, indices): (Tensor, Tensor),
    order: Order,
    to: Received,
) -> Result<Option<Waited>> {
    let Some(mut moves) = Moves::open(meeting, here, x)? else { return Ok(None) };
    let (memory, comm) = (moves.way.memory, moves.comm(meeting)?);
    let (me, n) = (at.me, meeting.group.len());
    let copies = at.copies(&memory.download::<u32>(indices), indices.cols());
    let (offsets, token_of_row) = (memory.download::<u32>(order.offsets), memory.download::<u32>(order.token_of_row));
    let parts = at.by_node(&offsets).into_iter().map(|rows| Part::of(&token_of_row, rows, 0)).collect();
    let met = meeting.meet(what(x, at.num_experts), Source { offsets, tokens_to: copies.tokens_to, parts })?;
    let all: Vec<&[u32]> = met.all.iter().map(|source| &source.offsets[..]).collect();
    let load = at.load(&all);
    meeting.expect_room(load.0 as usize, at)?;

    // Where tokens lie in the scratch: those that go out, those that come, those that are passed on, those that come by that.
    let mut layout = Rows::default();
    let mine = &met.all[me].parts;
    let out: Vec<Range<usize>> = mine.iter().map(|part| layout.take(part.num_tokens())).collect();
    let coming = |source: usize| if source == me { 0 } else { met.all[source].part_for(me).num_tokens() };
    let came: Vec<Range<usize>> = (0..n).map(|source| layout.take(coming(source))).collect();
    let first_passed = layout.0;
    let node: Vec<usize> = at.here().collect();
    let passes = node.len() > 1 && node.len() < n;
    let pass_on = |source: usize| {
        let part = met.all[source].part_for(me);
        let parts = node.iter().map(|&member| match member {
            member if member == me => Part::default(),
            member => {
                let rows = at.rows_for(all[source], member..member + 1);
                let mut passed = Part::of(&part.places, rows, part.first_row);
                passed.tokens.iter_mut().for_each(|token| *token += came[source].start as u32);
                passed
            }
        });
        (source as u32, parts.collect::<Vec<_>>())
    };
    let passed: Vec<(u32, Vec<Part>)> = if passes { at.arriving().map(pass_on).collect() } else { Vec::new() };
    let pass: Vec<Vec<Range<usize>>> =
        passed.iter().map(|(_, parts)| parts.iter().map(|part| layout.take(part.num_tokens())).collect()).collect();
    let mut by_others = Rows(layout.0);
    for source in (0..n).filter(|source| !node.contains(source) && at.arriving().all(|other| other != *source)) {
        layout.take(met.all[source].tokens_to[me] as usize);
    }

    let index_of_out: Vec<u32> = mine.iter().flat_map(|part| &part.tokens).copied().collect();
    let index_of_passed: Vec<u32> =
        passed.iter().flat_map(|(_, parts)| parts).flat_map(|part| &part.tokens).copied().collect();
    let most = index_of_out.len().max(index_of_passed.len()).max(load.0 as usize);
    let rows_bytes = (layout.0 as u64 * moves.row_bytes).next_multiple_of(16);
    let scratch = moves.way.lane.scratch(NCCL_SLOT, rows_bytes + 4 * most as u64)?;
    let (numbers, row_bytes) = (scratch + rows_bytes, moves.row_bytes);
    let at_row = |row: usize| scratch + row as u64 * row_bytes;

    // To the members of this node, and to one in each other.
    moves.gather(Arg::Tensor(x), &index_of_out, numbers, Arg::U64(scratch), &[x])?;
    for member in (0..n).filter(|&member| member != me) {
        moves.send(member, scratch, out[member].clone());
        moves.receive(member, scratch, came[member].clone());
    }
    let mut handed = moves.run(meeting, comm)?;
    let mut nanos = met.nanos;

    // Where each source's tokens are, and which of its rows is of which.
    let own = |source: usize| if source == me { out[me].start } else { came[source].start };
    let mut found: Vec<(usize, Part)> =
        (0..n).map(|source| (own(source), met.all[source].part_for(me).clone())).collect();
    if passes {
        // Scratch rows are as aligned as those of a tensor that begins where it does.
        moves.gather(
            Arg::U64(scratch),
            &index_of_passed,
            numbers,
            Arg::U64(at_row(first_passed)),
            &[Tensor { offset: 0, ..x }],
        )?;
        let inside = meeting.in_node(at);
        let comm = moves.comm(&inside)?;
        let met = inside.meet(format!("{} inside of a node,", what(x, at.num_experts)), Passed(passed))?;
        for rows in &pass {
            for (member, rows) in rows.iter().enumerate().filter(|(member, _)| *member != inside.me) {
                moves.send(member, scratch, rows.clone());
            }
        }
        for (member, passed) in met.all.iter().enumerate().filter(|(member, _)| *member != inside.me) {
            for (source, parts) in &passed.0 {
                let rows = by_others.take(parts[0].num_tokens());
                let place = found.get_mut(*source as usize).filter(|_| by_others.0 <= layout.0);
                let place = place.ok_or_else(|| meeting.error(&format!("tokens of source {source} were passed on")))?;
                moves.receive(member, scratch, rows.clone());
                *place = (rows.start, parts[0].clone());
            }
        }
        handed += moves.run(&inside, comm)?;
        nanos += met.nanos;
    }

    let (begin, origin) = at.lay_out(&all);
    let index: Vec<u32> = origin
        .iter()
        .map(|&[source, row]| {
            let (start, part) = &found[source as usize];
            *start as u32 + part.places[(row - part.first_row) as usize]
        })
        .collect();
    moves.gather(Arg::U64(scratch), &index, numbers, Arg::Tensor(to.rows), &[to.rows])?;
    memory.upload(to.offsets, &begin);
    memory.upload(to.origin.slice(0, 2 * origin.len()), origin.as_flattened());
    let tokens_to: Vec<&[u64]> = met.all.iter().map(|source| &source.tokens_to[..]).collect();
    let in_node = copies.to_node_members + at.passed_on(&tokens_to);
    let counted = LinkBytes { intra_node: in_node * row_bytes, inter_node: copies.to_nodes * row_bytes };
    meeting.comm.count(Traffic::Dispatch, counted, Some(handed));
    Ok(Some(Waited { nanos, load: Some(load) }))
}
