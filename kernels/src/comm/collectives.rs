//! Sums and gathers over a group of ranks.
//!
//! Each sum is taken in the order of ranks, in the type that sums are kept in (f32 for bf16), and rounded once: every rank gets
//! the same bits, whichever member added them. A large all-reduce is a reduce-scatter of even parts and a gather, so that
//! each member adds 1/n of it; a small one is sent to all and added by all, which saves a meeting.
//!
//! Where ranks are processes and x is on a GPU, NCCL moves the parts and a kernel adds them, in the same order.

use std::{cell::Cell, ops::Range, sync::Arc};

use super::{
    Call, Comm, Hub, LinkBytes, Traffic, nccl,
    pack::{Addends, Brought},
    with_element,
};
use crate::{
    cost::Cost,
    dtype::{Element, Float},
    error::{Error, Result},
    memory::Memory,
    ops::parallel::for_row_chunks,
    stream::{Here, Rendezvous, Stream, Waited},
    tensor::Tensor,
};

/// Elements below which every member adds all of an all-reduce.
const MIN_SCATTERED: usize = 16 * 1024;

/// Parts of a flat tensor, by member: ascending and apart, but not necessarily all of it.
type Parts = Arc<[Range<usize>]>;

impl Comm {
    /// Assigns x the sum of all members' x, in the order of ranks.
    pub fn all_reduce_sum(&self, s: &mut Stream, group: &Arc<[u32]>, x: Tensor, tag: u64) -> Result<()> {
        const OP: &str = "all_reduce_sum";
        let (me, n) = (self.place_in(OP, group)?, group.len());
        let parts: Parts = (0..n).map(|i| x.len() * i / n..x.len() * (i + 1) / n).collect();
        let bytes = if x.len() < MIN_SCATTERED {
            self.gather_bytes(group, x, &(0..x.len()))
        } else {
            self.scatter_bytes(group, x, &parts) + self.gather_bytes(group, x, &parts[me])
        };
        let cost = sum_cost(n, x.len(), x);
        self.collective(s, (OP, tag), group, x, cost + bytes.cost(), move |member, here| {
            let what = what_of(x);
            let done = if x.len() < MIN_SCATTERED {
                nccl::all_reduce_at_once(&member, here, x, what)?
            } else {
                nccl::reduce_scatter(&member, here, x, &parts, what)? && nccl::gather(&member, here, x, &parts, None)?
            };
            if !done {
                let m = here.host()?;
                with_element!(x.dtype, T => all_reduce::<T>(&member, m, x, &parts))?;
            }
            member.finish(bytes)
        })
    }

    /// Assigns x's part `parts[i]` the sum of all members' in the order of ranks, at member i. The rest of x stays.
    /// Parts are of flat x, one for each member, ascending and apart.
    pub fn reduce_scatter_sum(
        &self,
        s: &mut Stream,
        group: &Arc<[u32]>,
        x: Tensor,
        parts: Arc<[Range<usize>]>,
        tag: u64,
    ) -> Result<()> {
        const OP: &str = "reduce_scatter_sum";
        let me = self.place_in(OP, group)?;
        check_parts(OP, group.len(), x, &parts)?;
        let bytes = self.scatter_bytes(group, x, &parts);
        let cost = sum_cost(group.len(), parts[me].len(), x);
        self.collective(s, (OP, tag), group, x, cost + bytes.cost(), move |member, here| {
            if !nccl::reduce_scatter(&member, here, x, &parts, what_of_parts(x, &parts))? {
                let m = here.host()?;
                with_element!(x.dtype, T => reduce_scatter::<T>(&member, m, x, &parts))?;
            }
            member.finish(bytes)
        })
    }

    /// Assigns each part `parts[i]` of x what member i has there. Parts as in [`Comm::reduce_scatter_sum`].
    pub fn all_gather(
        &self,
        s: &mut Stream,
        group: &Arc<[u32]>,
        x: Tensor,
        parts: Arc<[Range<usize>]>,
        tag: u64,
    ) -> Result<()> {
        const OP: &str = "all_gather";
        let me = self.place_in(OP, group)?;
        check_parts(OP, group.len(), x, &parts)?;
        let bytes = self.gather_bytes(group, x, &parts[me]);
        let written: usize = parts.iter().map(Range::len).sum();
        let cost = Cost::stream(0, bytes_of(x, parts[me].len()), bytes_of(x, written - parts[me].len()));
        self.collective(s, (OP, tag), group, x, cost + bytes.cost(), move |member, here| {
            if !nccl::gather(&member, here, x, &parts, Some(what_of_parts(x, &parts)))? {
                let m = here.host()?;
                with_element!(x.dtype, T => gather::<T>(&member, m, x, &parts))?;
            }
            member.finish(bytes)
        })
    }

    /// The common part: `job` gets this rank's membership.
    pub(super) fn collective(
        &self,
        s: &mut Stream,
        (op, tag): (&'static str, u64),
        group: &Arc<[u32]>,
        x: Tensor,
        cost: Cost,
        job: impl FnOnce(Member, &mut Here) -> Result<Waited> + Send + 'static,
    ) -> Result<()> {
        let me = self.place_in(op, group)?;
        let group = self.group_in_run(group);
        let rendezvous = || Rendezvous::Collective { group: group.clone(), tag };
        self.launch(s, op, (&[x], &[x]), rendezvous, cost, {
            let group = group.clone();
            move |comm, hub, here| {
                job(
                    Member { comm, hub, group: &group, me, op, tag, nanos: Cell::new(0), handed: Cell::new(None) },
                    here,
                )
            }
        })
    }

    /// What goes to the others so that each has the members' parts for it.
    fn scatter_bytes(&self, group: &[u32], x: Tensor, parts: &[Range<usize>]) -> LinkBytes {
        group.iter().zip(parts).map(|(&to, part)| self.link_bytes(to, bytes_of(x, part.len()))).sum()
    }

    /// What goes to the others so that each has this part.
    fn gather_bytes(&self, group: &[u32], x: Tensor, part: &Range<usize>) -> LinkBytes {
        group.iter().map(|&to| self.link_bytes(to, bytes_of(x, part.len()))).sum()
    }
}

/// What members say of x, which must be the same on all.
fn what_of(x: Tensor) -> String {
    format!("{:?} of [{}]", x.dtype, x.len())
}

fn what_of_parts(x: Tensor, parts: &[Range<usize>]) -> String {
    format!("{} in parts {parts:?}", what_of(x))
}

fn bytes_of(x: Tensor, len: usize) -> u64 {
    (len * x.dtype.size_bytes()) as u64
}

fn sum_cost(n: usize, len: usize, x: Tensor) -> Cost {
    Cost::stream(((n - 1) * len) as u64, bytes_of(x, n * len), bytes_of(x, len))
}

fn check_parts(op: &'static str, n: usize, x: Tensor, parts: &[Range<usize>]) -> Result<()> {
    let ends = parts.iter().flat_map(|part| [part.start, part.end]);
    if parts.len() == n && ends.clone().is_sorted() && ends.last().is_none_or(|end| end <= x.len()) {
        return Ok(());
    }
    let message = format!("a group of {n} has {n} parts of {} elements, ascending and apart; found {parts:?}", x.len());
    Err(Error::Comm { op, message })
}

/// A rank in one collective while it runs.
pub(super) struct Member<'a> {
    pub comm: &'a Comm,
    pub hub: &'a Hub,
    /// By the numbers of the run.
    pub group: &'a Arc<[u32]>,
    /// Place in the group.
    pub me: usize,
    pub op: &'static str,
    pub tag: u64,
    /// Waited so far.
    pub nanos: Cell<u64>,
    /// Handed to the engine so far, if anything was.
    pub handed: Cell<Option<LinkBytes>>,
}

impl Member<'_> {
    /// What all brought; `what` is said of types and sizes, and must be the same everywhere.
    pub fn meet<T: Brought>(&self, what: String, mine: T) -> Result<Vec<Arc<T>>> {
        let call = Call { op: self.op, tag: self.tag, what };
        let met = self.hub.meet((self.comm.lane, self.group), self.me, call, mine)?;
        self.nanos.set(self.nanos.get() + met.nanos);
        if let Some(bytes) = met.handed_bytes {
            self.hand_over(bytes.into_iter());
        }
        Ok(met.all)
    }

    /// So many bytes were handed to an engine for each member.
    pub fn hand_over(&self, bytes: impl Iterator<Item = u64>) {
        let group: Vec<u32> = self.group.iter().map(|rank| rank - self.comm.first).collect();
        let bytes = self.comm.bytes_to(&group, bytes);
        self.handed.set(Some(self.handed.get().unwrap_or_default() + bytes));
    }

    pub fn finish(&self, bytes: LinkBytes) -> Result<Waited> {
        self.comm.count(Traffic::Reduce, bytes, self.handed.get());
        Ok(Waited { nanos: self.nanos.get(), load: None })
    }
}

/// An element that can be summed over ranks.
trait Summand: Element {
    /// `out[i] = sum over the parts, in order, of part[first + i]`.
    fn sum(parts: &[&[Self]], first: usize, out: &mut [Self]);
    /// `Err` with the element whose sum no value has.
    fn check(_parts: &[&[Self]]) -> std::result::Result<(), usize> {
        Ok(())
    }
}

/// Elements summed at a time, in registers.
const BLOCK: usize = 64;

macro_rules! float_summand {
    ($($type:ty),*) => {$(
        impl Summand for $type {
            #[inline(always)]
            fn sum(parts: &[&[Self]], first: usize, out: &mut [Self]) {
                for (b, out) in out.chunks_mut(BLOCK).enumerate() {
                    let place = first + b * BLOCK..first + b * BLOCK + out.len();
                    let mut sums = [<Self as Float>::Acc::default(); BLOCK];
                    sums.iter_mut().zip(&parts[0][place.clone()]).for_each(|(sum, x)| *sum = x.to_acc());
                    for part in &parts[1..] {
                        sums.iter_mut().zip(&part[place.clone()]).for_each(|(sum, x)| *sum += x.to_acc());
                    }
                    out.iter_mut().zip(sums).for_each(|(out, sum)| *out = Self::from_acc(sum));
                }
            }
        }
    )*};
}
float_summand!(f32, f64, half::bf16);

impl Summand for u32 {
    #[inline(always)]
    fn sum(parts: &[&[u32]], first: usize, out: &mut [u32]) {
        for (i, out) in (first..).zip(out) {
            *out = parts.iter().map(|part| part[i]).sum();
        }
    }

    fn check(parts: &[&[u32]]) -> std::result::Result<(), usize> {
        let sum = |i: usize| parts.iter().map(|part| u64::from(part[i])).sum::<u64>();
        (0..parts[0].len()).find(|&i| sum(i) > u64::from(u32::MAX)).map_or(Ok(()), Err)
    }
}

/// `out = sum over the members of what[range]`; out is as long as the range.
fn sum_into<T: Summand>(member: &Member, all: &[Arc<Addends<T>>], range: Range<usize>, out: &mut [T]) -> Result<()> {
    let parts: Vec<&[T]> = all.iter().map(|one| &one.data[range.start - one.first..range.end - one.first]).collect();
    T::check(&parts).map_err(|i| Error::Comm {
        op: member.op,
        message: format!("tag {}: the sum of element {} is more than U32 holds", member.tag, range.start + i),
    })?;
    for_row_chunks(
        out,
        1,
        #[inline(always)]
        |first, chunk| T::sum(&parts, first, chunk),
    );
    Ok(())
}

fn all_reduce<T: Summand>(member: &Member, m: &Memory, x: Tensor, parts: &Parts) -> Result<()> {
    if parts.len() == 1 {
        return Ok(());
    }
    let what = what_of(x);
    let scattered = (x.len() >= MIN_SCATTERED).then(|| parts.clone());
    let all = member.meet(what.clone(), Addends { first: 0, data: m.download::<T>(x), parts: scattered })?;
    let mut out = m.write::<T>(x);
    if out.len() < MIN_SCATTERED {
        return sum_into(member, &all, 0..x.len(), &mut out);
    }
    let mut sum = vec![T::default(); parts[member.me].len()];
    sum_into(member, &all, parts[member.me].clone(), &mut sum)?;
    // Gives the memory back as early as the slowest member allows.
    drop(all);
    let sums = member.meet(what, sum)?;
    for (part, sum) in parts.iter().zip(&sums) {
        out[part.clone()].copy_from_slice(sum);
    }
    Ok(())
}

fn reduce_scatter<T: Summand>(member: &Member, m: &Memory, x: Tensor, parts: &Parts) -> Result<()> {
    let what = what_of_parts(x, parts);
    let all = member.meet(what, Addends { first: 0, data: m.download::<T>(x), parts: Some(parts.clone()) })?;
    let part = parts[member.me].clone();
    sum_into(member, &all, part.clone(), &mut m.write::<T>(x)[part])
}

fn gather<T: Element>(member: &Member, m: &Memory, x: Tensor, parts: &[Range<usize>]) -> Result<()> {
    let what = what_of_parts(x, parts);
    let mine = parts[member.me].clone();
    let all = member.meet(what, m.read::<T>(x)[mine].to_vec())?;
    let mut x = m.write::<T>(x);
    for (i, (part, data)) in parts.iter().zip(&all).enumerate() {
        if i != member.me {
            x[part.clone()].copy_from_slice(data);
        }
    }
    Ok(())
}
