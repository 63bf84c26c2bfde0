//! Search: layouts of a scene's model on its number of ranks, ranked by time and by money; those that do not fit are said to.

use std::sync::atomic::{AtomicUsize, Ordering};

use rayon::prelude::*;
use serde::Serialize;

use super::{
    PlanRequest,
    simulate::{Simulated, Work, simulate},
    work_of,
};
use crate::{
    distribute::Distribution,
    mesh::Mesh,
    scene::{Pipeline, PipelineSchedule, Recompute, RecomputeOp, Scene},
    session::SessionError,
};

/// One layout.
#[derive(Clone, Debug, Serialize)]
pub struct Candidate {
    /// Pipeline-parallel ranks.
    pub pp: u32,
    /// Expert-parallel ranks.
    pub ep: u32,
    /// Data-parallel copies of the experts.
    pub dp: u32,
    /// Order of passes.
    pub schedule: String,
    /// Sequences in a microbatch.
    pub microbatch_sequences: usize,
    /// What is computed again.
    pub recompute: String,
    /// An optimizer step.
    pub step_secs: f64,
    /// Tokens over time.
    pub tokens_per_sec: f64,
    /// Idle share of a step.
    pub idle_fraction: f64,
    /// The fullest rank at its peak.
    pub peak_bytes: u64,
    /// Whether that fits the device.
    pub fits: bool,
    /// US dollars for 10^12 tokens.
    pub usd_per_trillion_tokens: Option<f64>,
    #[serde(skip)]
    scene: Scene,
}

/// What a search found.
#[derive(Clone, Debug, Serialize)]
pub struct SearchReport {
    /// Layouts that were planned.
    pub num_planned: usize,
    /// Layouts that cannot be, for their numbers.
    pub num_impossible: usize,
    /// Layouts that fit, the fastest first.
    pub candidates: Vec<Candidate>,
    /// Layouts that do not fit, those that need least first.
    pub too_large: Vec<Candidate>,
}

fn divisors(n: u32) -> Vec<u32> {
    (1..=n).filter(|d| n.is_multiple_of(*d)).collect()
}

/// Layouts of `num_ranks` ranks to look at: a coarse grid, powers of two where there is a choice. Experts are spread over as many
/// ranks as divide them: over others they can be, but those with fewer experts would wait for those with more.
fn layouts(scene: &Scene, num_ranks: u32, num_layers: usize, num_experts: usize) -> Vec<Scene> {
    let schedules = [
        PipelineSchedule::OneFOneB,
        PipelineSchedule::ZbH1,
        PipelineSchedule::Zbv,
        PipelineSchedule::DualPipe,
        PipelineSchedule::DualPipeV,
    ];
    let recomputes = [
        Recompute::Off,
        Recompute::Selective(vec![RecomputeOp::Norm, RecomputeOp::MlaUp, RecomputeOp::Swiglu]),
        Recompute::Layer,
    ];
    let sequences = scene.batch.microbatch_sequences * scene.batch.max_microbatches();
    let mut list = Vec::new();
    for pp in divisors(num_ranks).into_iter().filter(|pp| *pp as usize <= num_layers && *pp <= 64) {
        let rest = num_ranks / pp;
        for ep in divisors(rest).into_iter().filter(|ep| num_experts.is_multiple_of(*ep as usize)) {
            for schedule in &schedules {
                if pp == 1 && *schedule != PipelineSchedule::OneFOneB {
                    continue;
                }
                for recompute in &recomputes {
                    for microbatch_sequences in [1, 2, 4] {
                        let mut one = scene.clone();
                        one.mesh = Mesh { pp, ep, dp: rest / ep, ..scene.mesh };
                        one.pipeline = Some(Pipeline { schedule: schedule.clone(), ..Pipeline::default() });
                        one.recompute = recompute.clone();
                        one.batch.ramp.clear();
                        one.batch.microbatch_sequences = microbatch_sequences;
                        one.batch.num_microbatches = sequences / microbatch_sequences;
                        list.push(one);
                    }
                }
            }
        }
    }
    list
}

/// Fields of a scene's pipeline that were made for one layout.
fn of_one_layout(scene: &Scene) -> impl Iterator<Item = &'static str> {
    let pipeline = scene.pipeline.as_ref();
    let stages = pipeline.and_then(|pipeline| pipeline.stages.as_ref()).map(|_| "stages");
    let order = pipeline.and_then(|pipeline| pipeline.overlap_order.as_ref()).map(|_| "overlap_order");
    stages.into_iter().chain(order)
}

/// What a search does not keep of a scene, for the person who asks for one.
pub fn left_out(scene: &Scene) -> Option<String> {
    let names: Vec<String> = of_one_layout(scene).map(|name| format!("`pipeline.{name}`")).collect();
    let names = names.join(" and ");
    (!names.is_empty()).then(|| {
        format!("the search leaves out {names} of the scene, made for one layout: those it plans are balanced and overlap as usual")
    })
}

/// Plans up to `most` layouts, spread over all that there are; `progress` is told how many are done, of how many.
///
/// # Errors
/// If a figure of the device is missing.
pub fn search(
    request: &PlanRequest,
    most: usize,
    progress: impl Fn(usize, usize) + Sync,
) -> Result<SearchReport, SessionError> {
    let scene = &request.loaded.scene.of_one_replica();
    let num_experts = request.config.moe.as_ref().map_or(1, |moe| moe.n_routed_experts);
    let all = layouts(scene, scene.mesh.num_ranks(), request.config.num_hidden_layers, num_experts);
    let num_all = all.len();
    let possible: Vec<(Scene, Distribution)> = all
        .into_iter()
        .filter_map(|scene| Distribution::new(&scene, &request.config).ok().map(|distribution| (scene, distribution)))
        .collect();
    let num_impossible = num_all - possible.len();
    let step = possible.len().div_ceil(most.max(1)).max(1);
    let chosen: Vec<_> = possible.into_iter().step_by(step).collect();
    let num_planned = chosen.len();
    let done = AtomicUsize::new(0);
    progress(0, num_planned);
    let planned: Vec<Result<Candidate, SessionError>> = chosen
        .into_par_iter()
        .map(|(scene, distribution)| {
            let candidate = candidate(request, scene, &distribution);
            progress(done.fetch_add(1, Ordering::Relaxed) + 1, num_planned);
            candidate
        })
        .collect();
    let planned = planned.into_iter().collect::<Result<Vec<_>, _>>()?;
    let (mut candidates, mut too_large): (Vec<_>, Vec<_>) = planned.into_iter().partition(|candidate| candidate.fits);
    candidates.sort_by(|a, b| b.tokens_per_sec.total_cmp(&a.tokens_per_sec));
    too_large.sort_by_key(|candidate| candidate.peak_bytes);
    Ok(SearchReport { num_planned, num_impossible, candidates, too_large })
}

/// A step's time is affine in its microbatches once the pipeline is full, so that two short steps tell the time of a long one.
fn step(
    work: &Work,
    distribution: &Distribution,
    num_microbatches: usize,
) -> Result<(Simulated, f64, f64), SessionError> {
    let pp = distribution.mesh.pp as usize;
    let (few, more) = (2 * pp, 3 * pp + pp % 2);
    if num_microbatches <= more {
        let simulated = simulate(work, distribution, num_microbatches, false)?;
        let (secs, idle_secs) = (simulated.step_secs, simulated.accounting.mean_idle_secs());
        return Ok((simulated, secs, idle_secs));
    }
    let (short, long) = (simulate(work, distribution, few, false)?, simulate(work, distribution, more, false)?);
    let further = (num_microbatches - more) as f64 / (more - few) as f64;
    let on = |short: f64, long: f64| long + further * (long - short);
    let secs = on(short.step_secs, long.step_secs);
    let idle_secs = on(short.accounting.mean_idle_secs(), long.accounting.mean_idle_secs());
    Ok((long, secs, idle_secs))
}

fn candidate(request: &PlanRequest, scene: Scene, distribution: &Distribution) -> Result<Candidate, SessionError> {
    let work = work_of(request, &scene)?;
    let Mesh { pp, ep, dp, .. } = scene.mesh;
    let per_rank = scene.batch.num_microbatches / scene.mesh.num_data_ranks() as usize;
    let (simulated, step_secs, idle_secs) = step(&work, distribution, per_rank)?;
    let tokens = scene.batch.num_microbatches * scene.batch.microbatch_sequences * work.seq_len;
    let tokens_per_sec = tokens as f64 / step_secs;
    let usd = request.device.price(1e12 / tokens_per_sec).ok().map(|usd| usd * f64::from(scene.mesh.num_ranks()));
    let pipeline = scene.pipeline.clone().unwrap_or_default();
    let peak_bytes = simulated.bytes.iter().map(|bytes| bytes.total).max().unwrap_or(0);
    Ok(Candidate {
        pp,
        ep,
        dp,
        schedule: format!("{:?}", pipeline.schedule),
        microbatch_sequences: scene.batch.microbatch_sequences,
        recompute: match &scene.recompute {
            Recompute::Selective(ops) => ops.iter().map(|op| format!("{op:?}")).collect::<Vec<_>>().join("+"),
            other => format!("{other:?}"),
        },
        step_secs,
        tokens_per_sec,
        idle_fraction: idle_secs / step_secs,
        peak_bytes,
        fits: peak_bytes <= request.device.memory_bytes.value,
        usd_per_trillion_tokens: usd,
        scene,
    })
}

impl Candidate {
    /// What makes a scene `of` which the search was made this layout, as `--set` takes it.
    pub fn overrides(&self, of: &Scene) -> Vec<String> {
        let Mesh { pp, ep, dp, .. } = self.scene.mesh;
        let mut overrides = vec![
            format!("mesh.pp={pp}"),
            format!("mesh.ep={ep}"),
            format!("mesh.dp={dp}"),
            format!("pipeline.schedule={}", self.schedule),
            format!("recompute={:?}", self.scene.recompute),
            format!("batch.microbatch_sequences={}", self.scene.batch.microbatch_sequences),
            format!("batch.num_microbatches={}", self.scene.batch.num_microbatches),
            "batch.ramp=[]".to_owned(),
        ];
        overrides.extend(of_one_layout(of).map(|name| format!("pipeline.{name}=None")));
        overrides
    }
}

#[cfg(test)]
mod tests {
    #![expect(clippy::unwrap_used, reason = "tests")]

    use super::*;

    fn scene(pipeline: &str) -> Scene {
        Scene::parse(&format!("(pipeline: ({pipeline}))"), &[]).unwrap().scene
    }

    #[test]
    fn what_is_of_one_layout_is_said_to_be_left_out() {
        let check = |pipeline: &str, names: Option<&str>| {
            let said = left_out(&scene(pipeline));
            let begin = names.map(|names| format!("the search leaves out {names} of the scene"));
            assert!(said.is_some() == begin.is_some(), "{said:?}");
            assert!(said.zip(begin).is_none_or(|(said, begin)| said.starts_with(&begin)), "{pipeline}");
        };
        assert_eq!(left_out(&Scene::default()), None);
        check("schedule: DualPipe", None);
        check("stages: [3, 2]", Some("`pipeline.stages`"));
        check("stages: [3, 2], overlap_order: [\"a\"]", Some("`pipeline.stages` and `pipeline.overlap_order`"));
    }

    #[test]
    fn overrides_make_the_scene_the_layout() {
        let text =
            "(mesh: (pp: 4), batch: (num_microbatches: 8), pipeline: (schedule: DualPipe, stages: [1, 2, 2, 1]))";
        let of = Scene::parse(text, &[]).unwrap().scene;
        let all = layouts(&of, 4, 8, 8);
        assert!(all.len() > 50, "{}", all.len());
        for scene in all {
            let candidate = Candidate {
                pp: 0,
                ep: 0,
                dp: 0,
                schedule: format!("{:?}", scene.pipeline.clone().unwrap().schedule),
                microbatch_sequences: 0,
                recompute: String::new(),
                step_secs: 0.0,
                tokens_per_sec: 0.0,
                idle_fraction: 0.0,
                peak_bytes: 0,
                fits: true,
                usd_per_trillion_tokens: None,
                scene,
            };
            let overrides = candidate.overrides(&of);
            let made = Scene::parse(text, &overrides).unwrap_or_else(|errors| panic!("{overrides:?}: {errors}")).scene;
            assert_eq!(made, candidate.scene, "{overrides:?}");
        }
    }
}
