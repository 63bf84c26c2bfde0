//! How much of the communication is hidden under computation: the figure by which overlapping schedules are judged.

use std::collections::BTreeMap;

use engine::{task::Role, telemetry::Span};

/// Communication of a step, and what of it ran beside computation of the same rank.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Overlap {
    /// Time in which a transfer ran, over all ranks; two at a time count once.
    pub communication_nanos: u64,
    /// Of that, time in which the rank computed as well.
    pub hidden_nanos: u64,
}

impl Overlap {
    /// The hidden share, from 0 to 1; none without communication.
    pub fn share(self) -> Option<f64> {
        (self.communication_nanos > 0).then(|| self.hidden_nanos as f64 / self.communication_nanos as f64)
    }
}

/// Whether a span moves bytes between ranks: because of what it meets, or because of its stream.
pub fn is_communication(span: &Span) -> bool {
    span.role != Role::Compute || span.stream.starts_with("comm")
}

/// Share of communication hidden under compute. Ranks are looked at one by one, since a rank's transfer is not hidden under what
/// another one computes.
pub fn overlap(spans: &[Span]) -> Overlap {
    let mut ranks: BTreeMap<u32, [Vec<(u64, u64)>; 2]> = BTreeMap::new();
    for span in spans.iter().filter(|span| span.end_nanos > span.start_nanos) {
        let [communication, computation] = ranks.entry(span.rank).or_default();
        let of = if is_communication(span) { communication } else { computation };
        of.push((span.start_nanos, span.end_nanos));
    }
    let mut sum = Overlap::default();
    for [communication, computation] in ranks.into_values() {
        let (communication, computation) = (union(communication), union(computation));
        sum.communication_nanos += communication.iter().map(|(from, to)| to - from).sum::<u64>();
        sum.hidden_nanos += common(&communication, &computation);
    }
    sum
}

/// The same times as intervals that do not touch, in order.
fn union(mut intervals: Vec<(u64, u64)>) -> Vec<(u64, u64)> {
    intervals.sort_unstable();
    let mut merged: Vec<(u64, u64)> = Vec::with_capacity(intervals.len());
    for (from, to) in intervals {
        match merged.last_mut() {
            Some((_, end)) if from <= *end => *end = (*end).max(to),
            _ => merged.push((from, to)),
        }
    }
    merged
}

/// Time that is in both.
fn common(a: &[(u64, u64)], b: &[(u64, u64)]) -> u64 {
    let (mut i, mut j, mut sum) = (0, 0, 0);
    while let (Some(&(a_from, a_to)), Some(&(b_from, b_to))) = (a.get(i), b.get(j)) {
        sum += a_to.min(b_to).saturating_sub(a_from.max(b_from));
        if a_to <= b_to { i += 1 } else { j += 1 }
    }
    sum
}
