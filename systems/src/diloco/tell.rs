//! What the end of a round tells: bytes between replicas, and how far each came, by kind of parameter and by expert. An expert that the
//! router rarely chose in a replica comes there nowhere near as far as the others, and draws the mean back to where it was: such are
//! counted.

use std::{collections::BTreeMap, ops::Range, sync::Arc};

use bevy_ecs::prelude::*;
use engine::prelude::*;
use serde::{Deserialize, Serialize};

use super::Diloco;
use crate::{
    params::{ParamKind, ParamSpec},
    ranks::Ranks,
    work::Work,
};

/// Histograms of experts' norms.
const HISTOGRAMS: &str = "pseudo_gradient/";

/// An expert stands still if it came less far than this share of the median of its layer.
const STILL: f64 = 0.1;

/// What a part of a parameter belongs to.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub(super) struct Subject {
    kind: u8,
    /// Layer and expert, of a routed expert's matrices.
    expert: Option<(usize, usize)>,
}

/// Kinds of parameters, as they are called in scalars.
const KINDS: [(ParamKind, &str); 7] = [
    (ParamKind::Embedding, "embedding"),
    (ParamKind::Head, "head"),
    (ParamKind::Norm, "norm"),
    (ParamKind::Linear, "linear"),
    (ParamKind::Bias, "bias"),
    (ParamKind::Gate, "gate"),
    (ParamKind::ExpertLinear, "expert"),
];

/// The pieces of the part `mine` of a parameter, counted from its begin, and what each is of.
pub(super) fn subjects(spec: &ParamSpec, mine: &Range<usize>) -> (Vec<Subject>, Arc<[Range<usize>]>) {
    let kind = KINDS.iter().position(|(kind, _)| *kind == spec.kind).unwrap_or(KINDS.len()) as u8;
    let whole = (Subject { kind, expert: None }, 0..mine.len());
    let (Some(layer), ParamKind::ExpertLinear) = (spec.layer, spec.kind) else {
        return (vec![whole.0], [whole.1].into());
    };
    let size = spec.num_elements() / spec.shape[0].max(1);
    let first = spec.start / size.max(1);
    let piece = |i: usize| {
        let range = (i * size).max(mine.start)..((i + 1) * size).min(mine.end);
        let subject = Subject { kind, expert: Some((layer, first + i)) };
        (!range.is_empty()).then(|| (subject, range.start - mine.start..range.end - mine.start))
    };
    let (subjects, ranges): (Vec<_>, Vec<_>) = (0..spec.shape[0]).filter_map(piece).unzip();
    (subjects, ranges.into())
}

type Squares = Vec<(Subject, f64)>;

/// What a rank tells the others of a round.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
struct RankRound {
    /// Bytes to other replicas since the round before: within the node, and to others.
    sent: (u64, u64),
    /// Bytes of figures as this, step by step, to all ranks.
    told: u64,
    /// Squared norms of this replica's pseudo-gradient; nothing of one that was away.
    mine: Squares,
    /// Of the mean, which all replicas have; the first tells it.
    mean: Squares,
}

/// Squared norms of one pseudo-gradient.
#[derive(Debug, Default)]
struct Norms {
    by_kind: BTreeMap<u8, f64>,
    /// By layer, then expert.
    experts: BTreeMap<usize, BTreeMap<usize, f64>>,
}

impl Norms {
    fn add(&mut self, squares: &Squares) {
        for (Subject { kind, expert }, square) in squares {
            *self.by_kind.entry(*kind).or_default() += square;
            if let Some((layer, expert)) = expert {
                *self.experts.entry(*layer).or_default().entry(*expert).or_default() += square;
            }
        }
    }

    fn whole(&self) -> f64 {
        self.by_kind.values().sum::<f64>().sqrt()
    }

    /// Norms of a layer's experts.
    fn layers(&self) -> impl Iterator<Item = (usize, Vec<f64>)> {
        self.experts.iter().map(|(layer, experts)| (*layer, experts.values().map(|square| square.sqrt()).collect()))
    }

    fn num_still(&self) -> usize {
        let still = |norms: &Vec<f64>| norms.iter().filter(|norm| **norm < STILL * median(norms)).count();
        self.layers().map(|(_, norms)| still(&norms)).sum()
    }
}

fn median(values: &[f64]) -> f64 {
    let mut sorted = values.to_vec();
    sorted.sort_unstable_by(f64::total_cmp);
    sorted.get(sorted.len() / 2).copied().unwrap_or(0.0)
}

/// At the end of a round: tells of it, and the next one begins.
pub(super) fn record(world: &mut World) -> Result {
    // A step that was not finite comes again, and ends the run.
    if *world.resource::<Work>() == Work::LocateNotFinite {
        return Ok(());
    }
    let diloco = world.resource::<Diloco>();
    let Some(ending) = diloco.ending.clone() else { return Ok(()) };
    let ranks = world.resource::<Ranks>();
    let memory = world.resource::<Tensors>().memory();
    let of = |which: usize| {
        let squares = memory.download::<f64>(diloco.squares[which]);
        diloco.subjects.iter().copied().zip(squares).collect::<Squares>()
    };
    let sent = diloco.comm.take_meter().total();
    let mine = RankRound {
        sent: (sent.intra_node, sent.inter_node),
        told: ranks.take_told_bytes(),
        mine: if ending.present.contains(&ranks.replica()) { of(0) } else { Vec::new() },
        mean: if ranks.replica() == 0 { of(1) } else { Vec::new() },
    };
    let all = ranks.exchange(&mine)?;
    let per_replica = ranks.layout.mesh.num_ranks() as usize;
    if ranks.is_first() {
        let Figures { scalars, histograms } = figures(&all, per_replica, &ending.present);
        let mut telemetry = world.resource_mut::<Telemetry>();
        scalars.into_iter().for_each(|(name, value)| telemetry.scalar(name, value));
        histograms.into_iter().for_each(|(name, values)| telemetry.histogram(name, values));
    }
    world.resource_mut::<Diloco>().present = ending.next;
    Ok(())
}

/// What is told, by name.
#[derive(Debug, Default)]
struct Figures {
    scalars: Vec<(String, f64)>,
    histograms: Vec<(String, Vec<f64>)>,
}

/// A round's figures from what its ranks told, `per_replica` of each replica, of which some were there.
fn figures(all: &[RankRound], per_replica: usize, present: &[u32]) -> Figures {
    let sum = |of: fn(&RankRound) -> u64| all.iter().map(of).sum::<u64>() as f64;
    let mut told = Figures::default();
    let mut scalar = |name: String, value: f64| told.scalars.push((name, value));
    scalar("outer/num_replicas".into(), present.len() as f64);
    scalar("outer/sent_intra_node_bytes".into(), sum(|rank| rank.sent.0));
    scalar("outer/sent_inter_node_bytes".into(), sum(|rank| rank.sent.1));
    scalar("outer/told_bytes".into(), sum(|rank| rank.told));
    let mut mean = Norms::default();
    all.iter().for_each(|rank| mean.add(&rank.mean));
    for (kind, square) in &mean.by_kind {
        let name = KINDS.get(usize::from(*kind)).map_or("other", |(_, name)| name);
        scalar(format!("outer/norm/{name}"), square.sqrt());
    }
    let replicas = all.chunks(per_replica).map(|ranks| {
        let mut norms = Norms::default();
        ranks.iter().for_each(|rank| norms.add(&rank.mine));
        norms
    });
    let replicas: Vec<Norms> = replicas.collect();
    let there = present.iter().map(|&replica| (format!("replica{replica}/"), &replicas[replica as usize]));
    for (of, norms) in std::iter::once((String::new(), &mean)).chain(there) {
        scalar(format!("outer/{of}norm"), norms.whole());
        scalar(format!("outer/{of}num_still_experts"), norms.num_still() as f64);
        told.histograms.extend(norms.layers().map(|(layer, norms)| (format!("{HISTOGRAMS}{of}layer {layer}"), norms)));
    }
    told
}

#[cfg(test)]
mod tests {
    #![expect(clippy::unwrap_used, reason = "tests")]
    use super::*;

    fn spec(kind: ParamKind, shape: &[usize], start: usize) -> ParamSpec {
        ParamSpec {
            name: "p".into(),
            shape: shape.to_vec(),
            views: Vec::new(),
            aliases: Vec::new(),
            kind,
            layer: Some(3),
            index: 0,
            start,
        }
    }

    #[test]
    fn a_part_is_cut_at_its_experts() {
        // Experts 4 to 6 of 6 elements each are here, and elements 4 to 15 of them are this rank's.
        let (subjects, ranges) = subjects(&spec(ParamKind::ExpertLinear, &[3, 2, 3], 24), &(4..15));
        let experts: Vec<_> = subjects.iter().map(|subject| subject.expert.unwrap()).collect();
        assert_eq!((experts, &*ranges), (vec![(3, 4), (3, 5), (3, 6)], &[0..2, 2..8, 8..11][..]));
        let (subjects, ranges) = super::subjects(&spec(ParamKind::Linear, &[3, 6], 0), &(4..15));
        assert_eq!((subjects[0].expert, &*ranges), (None, std::slice::from_ref(&(0..11))));
    }

    #[test]
    fn an_expert_that_came_nowhere_is_counted() {
        let square = |layer, expert, square| (Subject { kind: 6, expert: Some((layer, expert)) }, square);
        let rank =
            |squares: Vec<(Subject, f64)>| RankRound { mine: squares.clone(), mean: squares, sent: (1, 2), told: 3 };
        let first =
            vec![square(1, 0, 1.0), square(1, 1, 4.0), square(1, 2, 1e-4), (Subject { kind: 0, expert: None }, 9.0)];
        // The other part of the first expert, and another layer whose experts are alike.
        let second = vec![square(1, 0, 8.0), square(2, 0, 1e-6), square(2, 1, 1e-6)];
        let all = [rank(first), rank(second), RankRound::default(), RankRound::default()];
        let told = figures(&all, 2, &[0]);
        let scalar = |wanted: &str| told.scalars.iter().find(|(name, _)| name == wanted).unwrap().1;
        assert_eq!(scalar("outer/num_still_experts"), 1.0);
        assert_eq!(scalar("outer/replica0/num_still_experts"), 1.0);
        assert_eq!(scalar("outer/norm/embedding"), 3.0);
        assert!((scalar("outer/norm").powi(2) - 22.0001).abs() < 1e-3);
        assert_eq!((scalar("outer/sent_intra_node_bytes"), scalar("outer/sent_inter_node_bytes")), (2.0, 4.0));
        assert_eq!(scalar("outer/told_bytes"), 6.0);
        let layer = told.histograms.iter().find(|(name, _)| name == "pseudo_gradient/replica0/layer 1").unwrap();
        assert_eq!(layer.1, [3.0, 2.0, 0.01]);
    }
}
