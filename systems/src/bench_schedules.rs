//! `bench schedules`: prediction against reality. A scene is trained for some steps under one schedule on local ranks; what its
//! tasks took corrects a description of this machine; with that, steps under all schedules are planned, and then they are run.

use std::sync::{Arc, Mutex, PoisonError};

use engine::{
    bubbles::Accounting,
    calibrate::{self, Sample},
    hardware::DeviceSpec,
    prelude::*,
};
use kernels::comm::Comm;
use serde::Serialize;

use crate::{
    api::Progress,
    distribute::Distribution,
    generate::run_to_rest,
    local::{self, Silent},
    measure::{self, MeasurePlugin, RankSteps},
    pipeline::source::ScheduleSource,
    placement::load::RoutingLoad,
    plan::{
        PlanRequest,
        simulate::{Simulated, simulate},
        work_of,
    },
    scene::{Loaded, Pipeline, PipelineSchedule},
    session::{SessionError, format_of},
    setup::{Prepared, prepare, set_up_rank},
    train::Training,
    work::Work,
};

/// Steps before the measured ones.
const WARM_UP_STEPS: u64 = 2;

/// Schedules to compare; the first is calibrated on.
const SCHEDULES: [PipelineSchedule; 8] = PipelineSchedule::BUILT;

/// What to measure.
pub struct SchedulesRequest {
    /// The scene, checked.
    pub loaded: Loaded,
    /// This machine, before it is corrected.
    pub device: DeviceSpec,
    /// Steps of each schedule.
    pub num_steps: u64,
    /// Who is told.
    pub progress: Arc<dyn Progress>,
}

/// A schedule, predicted and measured.
#[derive(Clone, Debug, Serialize)]
pub struct Line {
    /// Its name.
    pub schedule: String,
    /// Whether the prediction was calibrated on it.
    pub is_calibrated_on: bool,
    /// A step as planned.
    pub predicted_step_secs: f64,
    /// The median step as run.
    pub measured_step_secs: f64,
    /// The shortest and the longest.
    pub measured_step_secs_range: (f64, f64),
    /// Idle share of compute streams as planned.
    pub predicted_idle_fraction: f64,
    /// The same as run, in the median step.
    pub measured_idle_fraction: f64,
}

impl Line {
    /// Predicted over measured time, minus 1.
    pub fn step_error(&self) -> f64 {
        self.predicted_step_secs / self.measured_step_secs - 1.0
    }

    /// Predicted minus measured idle share.
    pub fn idle_error(&self) -> f64 {
        self.predicted_idle_fraction - self.measured_idle_fraction
    }
}

/// What came of it.
#[derive(Clone, Debug, Serialize)]
pub struct SchedulesReport {
    /// Pipeline ranks.
    pub pp: u32,
    /// Threads of each for its ops.
    pub num_threads_per_rank: usize,
    /// Microbatches of a step on each rank.
    pub num_microbatches_per_rank: usize,
    /// Steps of each schedule.
    pub num_steps: u64,
    /// By schedule; the calibrated one comes a second time at the end, to show what time itself changes.
    pub lines: Vec<Line>,
}

/// Runs the benchmark. Schedules that do not take the scene's ranks and microbatches are left out, and told.
///
/// # Errors
/// If the scene cannot be set up, a figure of the device is missing, or a step fails.
pub fn bench(request: &SchedulesRequest) -> Result<SchedulesReport, SessionError> {
    let prepared = prepare(&request.loaded, true)?;
    let under = |schedule: &PipelineSchedule| -> Result<(Loaded, Distribution), SessionError> {
        let mut loaded = request.loaded.clone();
        loaded.scene = loaded.scene.of_one_replica();
        let pipeline = loaded.scene.pipeline.take().unwrap_or_default();
        loaded.scene.pipeline = Some(Pipeline { schedule: schedule.clone(), stages: None, ..pipeline });
        loaded.scene.batch.ramp.clear();
        let distribution = Distribution::new(&loaded.scene, &prepared.config)
            .map_err(|problems| SessionError::input(loaded.errors(&problems)))?;
        Ok((loaded, distribution))
    };
    let scene = &request.loaded.scene.of_one_replica();
    let per_rank = scene.batch.num_microbatches / scene.mesh.num_data_ranks() as usize;
    let (loaded, distribution) = under(&SCHEDULES[0])?;
    let calibration = train(request, &loaded, &prepared, &distribution)?;
    let format = format_of(scene.precision.compute);
    let mut device = request.device.clone();
    device.corrections = calibrate::fit(&device, format, &samples(&calibration)).map_err(SessionError::input)?;
    let plan = |loaded: &Loaded, distribution: &Distribution| -> Result<Simulated, SessionError> {
        let plan = PlanRequest {
            loaded,
            config: prepared.config.clone(),
            device: device.clone(),
            load: RoutingLoad::Balanced,
            with_spans: false,
        };
        simulate(&work_of(&plan, &loaded.scene)?, distribution, per_rank, false)
    };
    let mut lines = vec![line(&distribution.schedule, true, &plan(&loaded, &distribution)?, &calibration)];
    for schedule in SCHEDULES[1..].iter().chain(&SCHEDULES[..1]) {
        let (loaded, distribution) = match under(schedule) {
            Ok(found) => found,
            Err(error) => {
                request.progress.note(&format!("{schedule:?} is left out: {error}"));
                continue;
            }
        };
        let planned = plan(&loaded, &distribution)?;
        let measured = train(request, &loaded, &prepared, &distribution)?;
        lines.push(line(&distribution.schedule, *schedule == SCHEDULES[0], &planned, &measured));
    }
    Ok(SchedulesReport {
        pp: scene.mesh.pp,
        num_threads_per_rank: threads(&distribution).unwrap_or_else(rayon::current_num_threads),
        num_microbatches_per_rank: per_rank,
        num_steps: request.num_steps,
        lines,
    })
}

fn threads(distribution: &Distribution) -> Option<usize> {
    local::threads_per_rank(distribution.mesh.num_ranks() as usize)
}

/// Steps of all ranks.
fn train(
    request: &SchedulesRequest,
    loaded: &Loaded,
    prepared: &Prepared,
    distribution: &Distribution,
) -> Result<Vec<RankSteps>, SessionError> {
    let is_solo = distribution.mesh.num_ranks() == 1;
    let ranks = if is_solo { vec![distribution.ranks(Comm::solo())] } else { distribution.local() };
    let num_threads = threads(distribution);
    let progress: Arc<dyn Progress> = Arc::new(Silent);
    let kept = Mutex::new(Vec::new());
    let outcomes = local::run_ranks(ranks, |ranks| {
        let rank = ranks.layout.rank;
        let mut app = set_up_rank(loaded, prepared, ranks, num_threads, &progress)?;
        app.insert_resource(Work::Train).add_plugins(MeasurePlugin).add_systems(Step, rest.in_set(StepSystems::Keep));
        app.world_mut().resource_mut::<Training>().stop_at = Some(WARM_UP_STEPS + request.num_steps.max(1));
        run_to_rest(&mut app)?;
        let steps = RankSteps::of(app.world());
        kept.lock().unwrap_or_else(PoisonError::into_inner).extend(steps.map(|steps| (rank, steps)));
        Ok(((), ExitReason::Finished))
    });
    for outcome in outcomes {
        outcome.ok_or_else(|| SessionError::runtime("a rank panicked"))??;
    }
    let mut kept = kept.into_inner().unwrap_or_else(PoisonError::into_inner);
    kept.sort_by_key(|(rank, _)| *rank);
    let num_steps = request.num_steps as usize;
    Ok(kept.into_iter().map(|(_, steps)| steps.newest(num_steps)).collect())
}

fn rest(training: Res<Training>, mut work: ResMut<Work>) {
    if training.stop_at.is_some_and(|stop| training.step >= stop) {
        *work = Work::Rest;
    }
}

/// What each task took by itself.
fn samples(ranks: &[RankSteps]) -> Vec<Sample> {
    let spans = ranks.iter().flat_map(RankSteps::snapshots).flat_map(|snapshot| snapshot.spans.iter());
    let own = |span: &Span| span.nanos().saturating_sub(span.wait_nanos) as f64 * 1e-9;
    spans.map(|span| Sample { kind: span.kind.0.to_owned(), cost: span.cost, secs: own(span) }).collect()
}

fn line(schedule: &ScheduleSource, is_calibrated_on: bool, planned: &Simulated, measured: &[RankSteps]) -> Line {
    let mut steps = measure::steps(measured);
    steps.sort_by_key(|step| step.total_nanos);
    let (first, last) = (steps.first(), steps.last());
    let median = steps.get(steps.len() / 2);
    let secs = |step: Option<&Accounting>| step.map_or(0.0, |step| step.step_secs());
    let idle = |step: Option<&Accounting>| step.and_then(|step| step.idle_fraction()).unwrap_or(0.0);
    Line {
        schedule: schedule.name(),
        is_calibrated_on,
        predicted_step_secs: planned.step_secs,
        measured_step_secs: secs(median),
        measured_step_secs_range: (secs(first), secs(last)),
        predicted_idle_fraction: idle(Some(&planned.accounting)),
        measured_idle_fraction: idle(median),
    }
}
