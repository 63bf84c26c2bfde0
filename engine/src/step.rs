//! The `Step` schedule: what happens once per step, in which order.
//!
//! It is single-threaded on purpose: two dozen small systems take half a microsecond that way and forty times that across
//! threads, and the order of launches is then the order that the plan says. Parallelism is the streams' and the ops'.

use bevy_app::{MainScheduleOrder, prelude::*};
use bevy_ecs::{
    prelude::*,
    schedule::{LogLevel, ScheduleBuildSettings, ScheduleLabel, SingleThreadedExecutor},
};

use crate::{
    app::{has_failed, running},
    clock::Clock,
    dispatch,
    telemetry::Telemetry,
};

/// One run of this schedule is one step. It follows `Update` in `Main`.
#[derive(ScheduleLabel, Clone, Debug, PartialEq, Eq, Hash)]
pub struct Step;

/// Runs once after the last step, unless the run failed: the place for a last checkpoint.
#[derive(ScheduleLabel, Clone, Debug, PartialEq, Eq, Hash)]
pub struct Finish;

/// Parts of a step, in order. Once there is a reason to stop, nothing more is launched: parts up to Dispatch that have not
/// begun are skipped. Record and Keep follow whatever was dispatched, unless something failed.
#[derive(SystemSet, Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum StepSystems {
    /// Brings in work: spawns or fills what the step is about.
    Admit,
    /// Builds the task graph, or picks one that was built before.
    Plan,
    /// Launches it. The only part that touches devices.
    Dispatch,
    /// Sees the finished step's spans and adds scalars and histograms. The streams are idle.
    Record,
    /// Sees the published snapshot: logs, checkpoints, tests whether to stop.
    Keep,
}

/// Number of the running step; the first is 1. Between steps, how many were dispatched.
#[derive(Resource, Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct StepIndex(pub u64);

pub(crate) fn install(app: &mut App) {
    let mut step = Schedule::new(Step);
    step.set_executor(SingleThreadedExecutor::new());
    step.configure_sets(
        (StepSystems::Admit, StepSystems::Plan, StepSystems::Dispatch, StepSystems::Record, StepSystems::Keep).chain(),
    );
    step.configure_sets((StepSystems::Admit, StepSystems::Plan, StepSystems::Dispatch).distributive_run_if(running));
    step.configure_sets((StepSystems::Record, StepSystems::Keep).distributive_run_if(recording));
    step.add_systems((
        begin.before(StepSystems::Admit),
        dispatch::dispatch.in_set(StepSystems::Dispatch),
        dispatch::collect.after(StepSystems::Dispatch).before(StepSystems::Record).run_if(recording),
        publish.after(StepSystems::Record).before(StepSystems::Keep).run_if(recording),
        end.after(StepSystems::Keep),
    ));
    let mut finish = Schedule::new(Finish);
    finish.set_executor(SingleThreadedExecutor::new());
    app.add_schedule(step).add_schedule(finish);
    app.world_mut().resource_mut::<MainScheduleOrder>().insert_after(Update, Step);
    app.init_resource::<StepIndex>();
}

fn begin(mut index: ResMut<StepIndex>, mut timeline: ResMut<dispatch::Timeline>, clock: Res<Clock>) {
    index.0 += 1;
    timeline.begin(&clock);
}

/// A step that was not dispatched is not counted: Admit may find that there is no more work.
fn end(mut index: ResMut<StepIndex>, timeline: Res<dispatch::Timeline>) {
    index.0 -= u64::from(!timeline.dispatched());
}

fn recording(timeline: Res<dispatch::Timeline>) -> bool {
    timeline.dispatched() && !has_failed()
}

fn publish(index: Res<StepIndex>, mut telemetry: ResMut<Telemetry>) {
    telemetry.publish(index.0);
}

/// Pairs of systems of `Step` that use the same data with no order between them, as text; for tests of whole apps.
///
/// # Errors
/// Names the systems and what they share.
pub fn check_ambiguities(app: &mut App) -> Result<(), String> {
    app.world_mut().schedule_scope(Step, |world, schedule| {
        let settings = schedule.get_build_settings();
        schedule.set_build_settings(ScheduleBuildSettings { ambiguity_detection: LogLevel::Error, ..settings.clone() });
        let result = schedule.initialize(world).map(|_| ()).map_err(|e| e.to_string(schedule.graph(), world));
        schedule.set_build_settings(settings);
        result
    })
}
