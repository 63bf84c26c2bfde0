//! Sums and gathers on GPUs: who sends what to whom, and what a kernel adds.
//!
//! A sum is what it is on the other engines: each member gets the others' parts that are its own to add, adds them in the order of ranks
//! ([`crate::ptx::sum_parts`]), and sends the sum on. Parts wait in a staging buffer of the stream, which has a bound: larger ones come in
//! rounds. Nothing goes by the host, which puts all of it on the stream and waits for the end.

use std::ops::Range;

use super::{
    abi::{Handle, Piece},
    way::Way,
};
use crate::{
    comm::collectives::Member,
    dtype::DType,
    error::Result,
    ptx::{
        Arg, Launch, NCCL_SLOT,
        sum_parts::{slot_bytes, sum_parts},
    },
    stream::Here,
    tensor::Tensor,
};

/// An op under way.
struct Op<'a> {
    way: Way<'a>,
    member: &'a Member<'a>,
    x: Tensor,
    comm: Handle,
}

/// One meeting's transfers, and the sum after them.
struct Round {
    sends: Vec<Piece>,
    receives: Vec<Piece>,
    sum: Vec<Launch>,
}

/// What is sent and summed in a round: of each member's part, from element to element of x.
fn rounds(parts: &[Range<usize>], elem_bytes: usize, staging_bytes: usize) -> Vec<Vec<Range<usize>>> {
    // A multiple of 16 elements, so that parts stay as aligned as they are.
    let most = (staging_bytes / (parts.len().max(1) * elem_bytes) / 16 * 16).max(16);
    let longest = parts.iter().map(Range::len).max().unwrap_or(0);
    let cut =
        |at: usize| move |part: &Range<usize>| (part.start + at).min(part.end)..(part.start + at + most).min(part.end);
    (0..longest).step_by(most).map(|at| parts.iter().map(cut(at)).collect()).collect()
}

/// Runs `body` by NCCL, if it is there for this op; whether it was.
fn with_nccl(
    member: &Member<'_>,
    here: &mut Here<'_>,
    x: Tensor,
    body: impl FnOnce(Op<'_>) -> Result<()>,
) -> Result<bool> {
    if !matches!(x.dtype, DType::F32 | DType::Bf16 | DType::F64) {
        return Ok(false);
    }
    let Some(way) = Way::open(member.comm, member.hub, member.group.len(), here)? else { return Ok(false) };
    let comm = way.comm(member.group, member.me)?;
    body(Op { way, member, x, comm })?;
    Ok(true)
}

/// Assigns x the sum of all members' x, each of which is sent to all. Whether it was done.
pub fn all_reduce_at_once(member: &Member<'_>, here: &mut Here<'_>, x: Tensor, what: String) -> Result<bool> {
    with_nccl(member, here, x, |op| {
        let whole = 0..x.len();
        op.sum(&vec![whole; member.group.len()], &what)
    })
}

/// Assigns part `me` of x the sum of all members'. Whether it was done.
pub fn reduce_scatter(
    member: &Member<'_>,
    here: &mut Here<'_>,
    x: Tensor,
    parts: &[Range<usize>],
    what: String,
) -> Result<bool> {
    with_nccl(member, here, x, |op| op.sum(parts, &what))
}

/// Assigns each part of x what its member has there. Without a `what` members have just met. Whether it was done.
pub fn gather(
    member: &Member<'_>,
    here: &mut Here<'_>,
    x: Tensor,
    parts: &[Range<usize>],
    what: Option<String>,
) -> Result<bool> {
    with_nccl(member, here, x, |mut op| {
        let address = |part: &Range<usize>| op.at(part.start);
        let bytes = |part: &Range<usize>| part.len() * x.dtype.size_bytes();
        let mine = &parts[member.me];
        let (at_mine, mut sends, mut receives) = (address(mine)?, Vec::new(), Vec::new());
        for (i, part) in parts.iter().enumerate().filter(|(i, _)| *i != member.me) {
            sends.push(Piece { member: i, address: at_mine, bytes: bytes(mine) });
            receives.push(Piece { member: i, address: address(part)?, bytes: bytes(part) });
        }
        op.run(vec![Round { sends, receives, sum: vec![] }], what)
    })
}

impl Op<'_> {
    /// Address of an element of x.
    fn at(&self, element: usize) -> Result<u64> {
        Ok(self.way.memory.address(self.x)? + (element * self.x.dtype.size_bytes()) as u64)
    }

    /// In each round, sends every other its part and adds up the own.
    fn sum(mut self, parts: &[Range<usize>], what: &str) -> Result<()> {
        let staging_bytes = self.way.engine.staging_bytes;
        let rounds = rounds(parts, self.x.dtype.size_bytes(), staging_bytes);
        let (x, me, n) = (self.x, self.member.me, self.member.group.len());
        let slot = |parts: &[Range<usize>]| slot_bytes(x.dtype, parts[me].len());
        let most = rounds.iter().map(|parts| n * slot(parts)).max().unwrap_or(0);
        let staging = self.way.lane.scratch(NCCL_SLOT, most as u64)?;
        let mut all = Vec::with_capacity(rounds.len());
        for parts in &rounds {
            let (mut sends, mut receives) = (Vec::new(), Vec::new());
            for (i, part) in parts.iter().enumerate().filter(|(i, _)| *i != me) {
                let bytes = |part: &Range<usize>| part.len() * x.dtype.size_bytes();
                sends.push(Piece { member: i, address: self.at(part.start)?, bytes: bytes(part) });
                let address = staging + (i * slot(parts)) as u64;
                receives.push(Piece { member: i, address, bytes: bytes(&parts[me]) });
            }
            let mine = x.slice(parts[me].start, parts[me].len());
            let sum = self.way.lane.within_share(sum_parts(Arg::U64(staging), mine, n, me));
            all.push(Round { sends, receives, sum });
        }
        self.run(all, Some(format!("{what}, {staging_bytes} bytes at a time")))
    }

    /// Meets the others, unless that was just so, and puts it all on the stream; returns when it is done.
    fn run(&mut self, rounds: Vec<Round>, what: Option<String>) -> Result<()> {
        // Whatever the driver may wait for the device in comes before the others wait for this rank.
        let Way { memory, task, .. } = self.way;
        for round in &rounds {
            self.way.lane.prepare(memory, task, &round.sum)?;
        }
        if let Some(what) = what {
            self.member.meet(format!("{what} by NCCL"), Vec::<u8>::new())?;
        }
        self.member.comm.watch.strike("nccl");
        for Round { sends, receives, sum } in rounds {
            self.way.put(self.comm, &sends, &receives)?;
            let mut handed = vec![0; self.member.group.len()];
            sends.iter().for_each(|piece| handed[piece.member] += piece.bytes as u64);
            self.member.hand_over(handed.into_iter());
            self.way.lane.launch(memory, task, &sum)?;
        }
        self.way.finish(self.comm)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rounds_have_every_element_once_and_no_more_than_there_is_room_for() {
        for (parts, staging) in [
            (vec![0..1000, 1000..1001, 1001..1001, 1100..1500], 4 * 4 * 64),
            (vec![0..7, 7..20], 1),
            (vec![0..5000, 0..5000], 1 << 20),
            (vec![3..3, 3..3], 1 << 20),
        ] {
            let rounds = rounds(&parts, 4, staging);
            for (i, part) in parts.iter().enumerate() {
                let of_part: Vec<usize> = rounds.iter().flat_map(|round| round[i].clone()).collect();
                assert_eq!(of_part, part.clone().collect::<Vec<_>>(), "part {i} of {parts:?}");
            }
            let most = rounds.iter().flatten().map(|part| part.len()).max().unwrap_or(0);
            assert!(
                4 * parts.len() * most <= staging.max(4 * parts.len() * 16),
                "{most} elements at a time of {parts:?}"
            );
        }
    }
}
