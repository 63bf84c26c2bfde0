//! Schedules side by side on one layout: without overlap and with it, over numbers of microbatches.

use engine::bubbles::BubbleCause;
use serde::Serialize;

use super::{PlanRequest, simulate::simulate, work_of};
use crate::{
    distribute::Distribution,
    pipeline::{
        ScheduleKind,
        action::{Action, Schedule},
        source::ScheduleSource,
    },
    session::SessionError,
};

/// One plan.
#[derive(Clone, Debug, Serialize)]
pub struct Line {
    /// Schedule.
    pub schedule: String,
    /// Whether forward and backward of pairs overlap, or follow each other.
    pub overlap: bool,
    /// Microbatches of a rank.
    pub num_microbatches_per_rank: usize,
    /// A step.
    pub step_secs: f64,
    /// Idle share of it, mean over the ranks.
    pub idle_fraction: f64,
    /// Share of the step in which transfers are what is waited for.
    pub transfer_fraction: f64,
    /// Tokens over time.
    pub tokens_per_sec: f64,
    /// The fullest rank.
    pub peak_bytes: u64,
}

/// Where the idle share of a schedule goes with ever more microbatches: what one more adds to idle time, over what it adds to
/// the step.
#[derive(Clone, Debug, Serialize)]
pub struct Limit {
    /// Schedule.
    pub schedule: String,
    /// Whether forward and backward of pairs overlap.
    pub overlap: bool,
    /// Idle share of all further time.
    pub idle_fraction: f64,
}

/// The limit of each schedule in `lines`, from the two plans of most microbatches.
pub fn limits(lines: &[Line]) -> Vec<Limit> {
    let mut limits: Vec<Limit> = Vec::new();
    let is_same = |line: &&Line, of: &Line| line.schedule == of.schedule && line.overlap == of.overlap;
    for more in lines.iter().rev() {
        let known = limits.iter().any(|limit| limit.schedule == more.schedule && limit.overlap == more.overlap);
        let fewer = lines.iter().rev().filter(|line| is_same(line, more)).nth(1);
        if let (false, Some(fewer)) = (known, fewer) {
            let idle = |line: &Line| line.idle_fraction * line.step_secs;
            let idle_fraction = (idle(more) - idle(fewer)) / (more.step_secs - fewer.step_secs);
            limits.push(Limit { schedule: more.schedule.clone(), overlap: more.overlap, idle_fraction });
        }
    }
    limits.reverse();
    limits
}

/// 1F1B and ZB1P, which have no pairs, then DualPipe without and with overlap; at the scene's microbatches and at 2, 4 and 16
/// for each pipeline rank.
///
/// # Errors
/// If a plan fails.
pub fn compare(request: &PlanRequest) -> Result<Vec<Line>, SessionError> {
    let scene = &request.loaded.scene.of_one_replica();
    let mesh = scene.mesh;
    let own = scene.batch.max_microbatches() / mesh.num_data_ranks() as usize;
    let mut counts: Vec<usize> = [2, 4, 16].map(|times| times * mesh.pp as usize).to_vec();
    counts.push(own);
    counts.sort_unstable();
    counts.dedup();
    let mut lines = Vec::new();
    for &count in &counts {
        for (kind, overlap) in [
            (ScheduleKind::OneFOneB, false),
            (ScheduleKind::ZbH1, false),
            (ScheduleKind::DualPipe, false),
            (ScheduleKind::DualPipe, true),
        ] {
            let Ok(schedule) = kind.build(mesh.pp, count as u32) else { continue };
            let schedule = if overlap { schedule } else { one_by_one(&schedule) };
            lines.push(line(request, kind, overlap, schedule, count)?);
        }
    }
    Ok(lines)
}

/// The same schedule with pairs taken apart: forward, then backward.
fn one_by_one(schedule: &Schedule) -> Schedule {
    let apart = |actions: &Vec<Action>| actions.iter().flat_map(|action| action.cells()).map(Action::Single).collect();
    Schedule { ranks: schedule.ranks.iter().map(apart).collect(), ..schedule.clone() }
}

fn line(
    request: &PlanRequest,
    kind: ScheduleKind,
    overlap: bool,
    schedule: Schedule,
    count: usize,
) -> Result<Line, SessionError> {
    let mut scene = request.loaded.scene.of_one_replica();
    let num_data_ranks = scene.mesh.num_data_ranks() as usize;
    scene.batch.num_microbatches = count * num_data_ranks;
    scene.batch.ramp.clear();
    scene.pipeline = scene.pipeline.map(|pipeline| crate::scene::Pipeline { stages: None, ..pipeline });
    let error = |problems: Vec<crate::problem::Problem>| SessionError::input(request.loaded.errors(&problems));
    let distribution = Distribution::new(&scene, &request.config).map_err(error)?;
    let distribution = distribution.with_schedule(ScheduleSource::Text(schedule.into()))?;
    let work = work_of(request, &scene)?;
    let simulated = simulate(&work, &distribution, count, false)?;
    let accounting = &simulated.accounting;
    let transfers = [BubbleCause::CommunicationWait, BubbleCause::CommunicationCopy];
    let transfer_secs: f64 = transfers.into_iter().map(|cause| accounting.mean_secs(cause)).sum();
    let tokens = scene.batch.num_microbatches * scene.batch.microbatch_sequences * work.seq_len;
    Ok(Line {
        schedule: kind.name(),
        overlap,
        num_microbatches_per_rank: count,
        step_secs: simulated.step_secs,
        idle_fraction: accounting.mean_idle_secs() / simulated.step_secs,
        transfer_fraction: transfer_secs / simulated.step_secs,
        tokens_per_sec: tokens as f64 / simulated.step_secs,
        peak_bytes: simulated.bytes.iter().map(|bytes| bytes.total).max().unwrap_or(0),
    })
}
