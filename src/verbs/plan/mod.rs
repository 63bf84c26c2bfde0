//! `hadal plan`: what a step would be like, without doing it. Of a scene, of a pipeline schedule by itself, or of experts on ranks.

mod compare;
mod playground;
mod scene;
mod search;
mod timeline;

use std::process::ExitCode;

use crate::{cli::PlanArgs, failure::Failure, report::Output};

/// Plans a scene, or plays a schedule.
///
/// # Errors
/// If what is asked for is not clear, not valid, or cannot be written.
pub fn plan(args: &PlanArgs, output: &Output) -> Result<ExitCode, Failure> {
    if args.placement.experts.is_some() {
        return super::plan_experts::run(&args.placement, output);
    }
    match (&args.schedule, &args.scene) {
        (Some(schedule), _) => playground::run(schedule, args, output),
        (None, Some(scene)) => scene::run(scene, args, output),
        (None, None) => Err(Failure::usage(
            "nothing to plan: expected a scene file, --schedule or --experts, found none",
            "hadal plan SCENE, or hadal plan --schedule dualpipe --pp 8 --microbatches 20",
        )),
    }
}
