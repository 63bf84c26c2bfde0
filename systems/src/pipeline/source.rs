//! Where a run's schedule comes from: a kind that is built for each number of microbatches, or a text that is for one.

use std::sync::Arc;

use super::{ScheduleKind, action::Schedule, verify};
use crate::scene::PipelineSchedule;

impl PipelineSchedule {
    /// Those that are built, interleaving with two stages a rank.
    pub const BUILT: [PipelineSchedule; 8] = [
        PipelineSchedule::OneFOneB,
        PipelineSchedule::GPipe,
        PipelineSchedule::Interleaved { chunks: 2 },
        PipelineSchedule::ZbH1,
        PipelineSchedule::ZbH2,
        PipelineSchedule::Zbv,
        PipelineSchedule::DualPipe,
        PipelineSchedule::DualPipeV,
    ];
}

/// A schedule, or the way to one.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ScheduleSource {
    /// Built for the microbatches of a step.
    Kind(ScheduleKind),
    /// Read from a file.
    Text(Arc<Schedule>),
}

impl ScheduleSource {
    /// As on the command line.
    pub fn name(&self) -> String {
        match self {
            ScheduleSource::Kind(kind) => kind.name(),
            ScheduleSource::Text(_) => "from a file".into(),
        }
    }

    /// The schedule of `ranks` ranks for `microbatches` microbatches, verified.
    ///
    /// # Errors
    /// What keeps it from being built or from running, all at once.
    pub fn build(&self, ranks: u32, microbatches: u32) -> Result<Arc<Schedule>, String> {
        let schedule = match self {
            ScheduleSource::Kind(kind) => Arc::new(kind.build(ranks, microbatches).map_err(|e| e.to_string())?),
            ScheduleSource::Text(schedule) => {
                let found = (schedule.ranks.len() as u32, schedule.num_microbatches);
                if found != (ranks, microbatches) {
                    return Err(format!(
                        "expected a schedule of {ranks} ranks and {microbatches} microbatches, found one of {} and {}: \
                         set mesh.pp and batch.num_microbatches to what the file is for",
                        found.0, found.1
                    ));
                }
                schedule.clone()
            }
        };
        verify::verify(&schedule)
            .map_err(|faults| faults.iter().map(ToString::to_string).collect::<Vec<_>>().join("\n"))?;
        Ok(schedule)
    }

    /// Stages of each of `ranks` pipeline positions; they do not depend on the microbatches.
    ///
    /// # Errors
    /// If the schedule is not for so many ranks.
    pub fn stages_of(&self, ranks: u32) -> Result<Vec<Vec<u32>>, String> {
        let schedule = match self {
            // Twice the ranks is enough microbatches for every kind.
            ScheduleSource::Kind(kind) => Arc::new(kind.build(ranks, 2 * ranks).map_err(|e| e.to_string())?),
            ScheduleSource::Text(schedule) => schedule.clone(),
        };
        if schedule.ranks.len() != ranks as usize {
            return Err(format!("expected a schedule of {ranks} ranks, found one of {}", schedule.ranks.len()));
        }
        Ok((0..schedule.ranks.len()).map(|rank| schedule.stages_of(rank)).collect())
    }
}
