//! `hadal editor`: opens the window, and waits for what runs in it to end well.

mod planning;
mod workbench;

use std::{process::ExitCode, sync::Arc};

use editor::window::{self, Picture, WindowError, WindowOptions};

use crate::{
    cli::{EditorArgs, EditorTheme},
    failure::Failure,
};
use workbench::Bench;

/// Opens the window.
///
/// # Errors
/// If there is no display; with a picture, also if there is nothing to take one of, or it cannot be written.
pub fn editor(args: EditorArgs) -> Result<ExitCode, Failure> {
    let mut targets = args.targets;
    targets.extend(args.attach);
    let bench = Arc::new(Bench::new(args.token));
    let opened = window::open(WindowOptions {
        workbench: bench.clone(),
        targets,
        runs: args.run,
        view: args.view,
        is_dark: args.theme.map(|theme| theme == EditorTheme::Dark),
        size: [args.size.0, args.size.1],
        picture: args.screenshot.map(|path| Picture { path, after_secs: args.after }),
    });
    // A run that was started in the window ends with a checkpoint.
    bench.wait();
    opened.map_err(|why| match why {
        WindowError::Display(message) => Failure::Other {
            exit_code: crate::failure::RUNTIME,
            message,
            help: Some("without a display: hadal run SCENE, and hadal editor --attach URL where there is one".into()),
        },
        WindowError::Target(message) => {
            Failure::usage(message, "no picture was taken; without --screenshot the window opens all the same")
        }
        WindowError::Picture(message) => Failure::runtime(message),
    })?;
    Ok(ExitCode::SUCCESS)
}
