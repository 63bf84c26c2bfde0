//! `hadal plan SCENE`.

use std::{path::Path, process::ExitCode};

use crate::{cli::PlanArgs, failure::Failure, report::Output};

/// Plans the step of a scene.
///
/// # Errors
/// Always, for now.
pub fn run(scene: &Path, _args: &PlanArgs, _output: &Output) -> Result<ExitCode, Failure> {
    Err(Failure::usage(
        format!("{}: planning a scene is not built in yet", scene.display()),
        "hadal plan --schedule NAME --pp N --microbatches N plays a pipeline schedule without a scene",
    ))
}
