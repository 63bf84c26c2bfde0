//! The last steps of a run as they were on each rank, and beside them the step that their tasks would make by themselves: each
//! task takes its median time, ranks meet as the schedule says, and nothing else happens. What differs is what the plan does
//! not know: noise, and ranks that are in each other's way. Ranks that are
//! processes send theirs to the first.

mod bytes;

use std::{collections::VecDeque, sync::Arc};

use bevy_app::prelude::*;
use bevy_ecs::prelude::*;
use engine::{
    bubbles::{Accounting, account, is_compute},
    bubbles_table::{self, IdleReport},
    durations::median_durations,
    graph::spans_at,
    joint::{RankTasks, simulate_ranks},
    prelude::*,
};
use kernels::{comm::meter::LinkBytes, cost::Cost, stream::Rendezvous};
use serde::Serialize;

use crate::{
    diloco::Diloco,
    observe::Sent,
    ranks::Ranks,
    rounding::Rounding,
    session::SessionError,
    traffic::Traffic,
    work::{Work, turn_of},
};

/// Steps that are kept.
const MAX_STEPS: usize = 10;

/// Keeps training steps.
pub struct MeasurePlugin;

impl Plugin for MeasurePlugin {
    fn build(&self, app: &mut App) {
        app.init_resource::<Kept>().add_systems(Step, keep.in_set(StepSystems::Keep).run_if(turn_of(Work::Train)));
    }
}

#[derive(Resource, Default)]
struct Kept {
    graph: Option<Arc<Graph>>,
    steps: VecDeque<StepOfRank>,
}

/// A step of a rank.
#[derive(Clone)]
struct StepOfRank {
    snapshot: Arc<Snapshot>,
    sent: LinkBytes,
}

fn keep(
    mut kept: ResMut<Kept>,
    telemetry: Res<Telemetry>,
    plans: Res<Plans>,
    (sent, rounding, diloco): (Res<Sent>, Option<Res<Rounding>>, Option<Res<Diloco>>),
) -> Result {
    // A step that is watched does more than train, and so does the last one of a round.
    let ends_round = diloco.is_some_and(|diloco| diloco.ends_round());
    if ends_round || rounding.is_some_and(|rounding| rounding.is_watching) {
        return Ok(());
    }
    let (Some(graph), Some(snapshot)) = (plans.active_graph()?, telemetry.last()) else { return Ok(()) };
    if !kept.graph.as_ref().is_some_and(|known| Arc::ptr_eq(known, graph)) {
        (kept.graph, kept.steps) = (Some(graph.clone()), VecDeque::new());
    }
    if kept.steps.len() == MAX_STEPS {
        kept.steps.pop_front();
    }
    let sent = sent.0.total();
    kept.steps.push_back(StepOfRank { snapshot: snapshot.clone(), sent });
    Ok(())
}

/// The last steps of one rank, all of one graph.
pub struct RankSteps {
    rank: u32,
    outline: Outline,
    steps: Vec<StepOfRank>,
    traffic: Traffic,
}

/// What of a graph can be simulated where its tasks are not.
struct Outline {
    /// Without times.
    spans: Vec<Span>,
    stream_of: Vec<u32>,
    deps: Vec<Vec<u32>>,
    /// By task, ascending.
    rendezvous: Vec<(u32, Rendezvous)>,
}

impl Outline {
    fn of(graph: &Graph) -> Self {
        let Graph { spans, stream_of, deps, rendezvous, .. } = graph;
        let (spans, stream_of, deps) = (spans.clone(), stream_of.clone(), deps.clone());
        Outline { spans, stream_of, deps, rendezvous: rendezvous.clone() }
    }

    fn tasks(&self, rank: u32, durations_nanos: &[u64]) -> RankTasks {
        let mut tasks = RankTasks::new(rank);
        let mut meetings = self.rendezvous.iter().peekable();
        for (i, (span, &nanos)) in self.spans.iter().zip(durations_nanos).enumerate() {
            tasks.push(self.stream_of[i], &self.deps[i], nanos, span.label.clone());
            while let Some((_, met)) = meetings.next_if(|(task, _)| *task as usize == i) {
                tasks.meet(met.clone());
            }
        }
        tasks
    }
}

impl RankSteps {
    /// Those of an app with [`MeasurePlugin`]; none if it made no step.
    pub fn of(world: &World) -> Option<Self> {
        let kept = world.get_resource::<Kept>().filter(|kept| !kept.steps.is_empty())?;
        let rank = world.resource::<Ranks>().number();
        let graph = kept.graph.as_ref()?;
        let (outline, traffic) = (Outline::of(graph), Traffic::of(world, graph));
        Some(RankSteps { rank, outline, steps: kept.steps.iter().cloned().collect(), traffic })
    }

    /// Memory traffic of each of these steps.
    pub fn traffic(&self) -> &Traffic {
        &self.traffic
    }

    /// The newest `num_steps` of them.
    pub fn newest(mut self, num_steps: usize) -> Self {
        self.steps.drain(..self.steps.len().saturating_sub(num_steps));
        self
    }

    /// What each kept step's tasks were, and when.
    pub fn snapshots(&self) -> impl Iterator<Item = &Snapshot> {
        self.steps.iter().map(|step| &*step.snapshot)
    }
}

/// Each kept step over all ranks, oldest first; only those that all ranks kept. A step is from the first rank's begin to the last
/// one's end.
pub fn steps(ranks: &[RankSteps]) -> Vec<Accounting> {
    let num_steps = ranks.iter().map(|rank| rank.steps.len()).min().unwrap_or(0);
    let step = |back: usize| {
        let all: Vec<&Snapshot> = ranks.iter().map(|rank| &*rank.steps[rank.steps.len() - back].snapshot).collect();
        let begin = all.iter().map(|snapshot| snapshot.interval_nanos.0).min().unwrap_or(0);
        let end = all.iter().map(|snapshot| snapshot.interval_nanos.1).max().unwrap_or(begin);
        let mut accounting = Accounting { num_steps: 1, total_nanos: end - begin, ranks: Vec::new() };
        all.iter().for_each(|snapshot| accounting.beside(account(&snapshot.spans, is_compute, (begin, end)).ranks));
        accounting
    };
    (1..=num_steps).rev().map(step).collect()
}

/// Idle time of compute streams, predicted and measured.
#[derive(Clone, Debug, Serialize)]
#[serde(into = "ComparisonReport")]
pub struct Comparison {
    /// From the tasks' median times.
    pub predicted: Accounting,
    /// As it was.
    pub measured: Accounting,
    /// Bytes on links in a step, the mean over ranks: as the tasks were planned, with experts chosen uniformly under the node
    /// limit, and as they were sent.
    pub links: Links,
}

/// Bytes on links, predicted and measured.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Links {
    /// To ranks of the same node, predicted.
    pub predicted_intra_node_bytes: u64,
    /// To ranks of the same node.
    pub measured_intra_node_bytes: u64,
    /// To ranks of other nodes, predicted.
    pub predicted_inter_node_bytes: u64,
    /// To ranks of other nodes.
    pub measured_inter_node_bytes: u64,
}

impl Links {
    fn of(ranks: &[RankSteps]) -> Self {
        let num_steps: usize = ranks.iter().map(|rank| rank.steps.len()).sum();
        let sent: LinkBytes = ranks.iter().flat_map(|rank| &rank.steps).map(|step| step.sent).sum();
        let planned: Cost = ranks.iter().flat_map(|rank| &rank.outline.spans).map(|span| span.cost).sum();
        let mean = |sum: u64, count: usize| sum / count.max(1) as u64;
        Links {
            predicted_intra_node_bytes: mean(planned.intra_node_bytes, ranks.len()),
            measured_intra_node_bytes: mean(sent.intra_node, num_steps),
            predicted_inter_node_bytes: mean(planned.inter_node_bytes, ranks.len()),
            measured_inter_node_bytes: mean(sent.inter_node, num_steps),
        }
    }
}

/// The same as a document.
#[derive(Clone, Debug, Serialize)]
pub struct ComparisonReport {
    /// Steps that were measured.
    pub num_steps: u64,
    /// From the tasks' median times.
    pub predicted: Option<IdleReport>,
    /// As it was.
    pub measured: Option<IdleReport>,
    /// Bytes on links in a step, the mean over ranks.
    pub links: Links,
}

impl Comparison {
    /// Simulates the step that the ranks' tasks make; none without steps.
    ///
    /// # Errors
    /// If the ranks' graphs do not belong together.
    pub fn of(ranks: &[RankSteps]) -> Result<Option<Self>, SessionError> {
        let steps = steps(ranks);
        let Some((first, rest)) = steps.split_first() else { return Ok(None) };
        let mut measured = first.clone();
        rest.iter().for_each(|step| measured.then(step));
        let tasks: Vec<RankTasks> = ranks
            .iter()
            .map(|rank| {
                let spans: Vec<&[Span]> = rank.snapshots().map(|snapshot| &*snapshot.spans).collect();
                rank.outline.tasks(rank.rank, &median_durations(&spans))
            })
            .collect();
        let times = simulate_ranks(&tasks).map_err(SessionError::runtime)?;
        let end = times.iter().flatten().map(|time| time.end_nanos).max().unwrap_or(0);
        let mut predicted = Accounting { num_steps: 1, total_nanos: end, ranks: Vec::new() };
        for (rank, times) in ranks.iter().zip(&times) {
            let spans = spans_at(&rank.outline.spans, &rank.outline.deps, times);
            predicted.beside(account(&spans, is_compute, (0, end)).ranks);
        }
        Ok(Some(Comparison { predicted, measured, links: Links::of(ranks) }))
    }

    /// For a person: causes by line.
    pub fn table(&self) -> String {
        bubbles_table::table(&[("predicted", &self.predicted), ("measured", &self.measured)])
    }
}

impl From<Comparison> for ComparisonReport {
    fn from(Comparison { predicted, measured, links }: Comparison) -> Self {
        ComparisonReport {
            num_steps: measured.num_steps,
            predicted: IdleReport::of(&predicted),
            measured: IdleReport::of(&measured),
            links,
        }
    }
}
