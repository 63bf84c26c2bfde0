//! Arguments of `editor`; apart, since they are there with its feature only.

use std::path::PathBuf;

use clap::{Args, ValueEnum};

/// Arguments of `editor`.
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  hadal editor scenes/quickstart.ron
  hadal editor scenes/pipeline.ron runs/pipeline
  hadal editor --attach http://127.0.0.1:8421 --token runs/quickstart/remote.token
  hadal editor scenes/quickstart.ron --run --screenshot editor.png --size 1280x720 --after 60")]
pub struct EditorArgs {
    /// Scene to edit and run, trace, run folder or address; of several sources, the second is compared with the first
    #[arg(value_name = "SCENE|TRACE|FOLDER|URL")]
    pub targets: Vec<String>,
    /// Follow a run that listens, as `remote` in its scene lets it
    #[arg(long, value_name = "URL")]
    pub attach: Option<String>,
    /// File with the token that lets the run be changed: remote.token in its folder
    #[arg(long, value_name = "FILE")]
    pub token: Option<PathBuf>,
    /// Run the scene at once; an earlier run of this name is moved aside, not deleted
    #[arg(long, requires = "targets")]
    pub run: bool,
    /// Bring a view to the front: Timeline, Routing, Curves, Scene, World or Memory
    #[arg(long, value_name = "NAME")]
    pub view: Option<String>,
    /// Theme, instead of the one of last time
    #[arg(long, value_name = "THEME")]
    pub theme: Option<EditorTheme>,
    /// Write a picture of the window to FILE, and close it
    #[arg(long, value_name = "FILE")]
    pub screenshot: Option<PathBuf>,
    /// Size of the window in points
    #[arg(long, value_name = "WxH", default_value = "1280x720", value_parser = size)]
    pub size: (f32, f32),
    /// Seconds that the window works before the picture
    #[arg(long, value_name = "SECS", default_value_t = 3.0, requires = "screenshot")]
    pub after: f64,
}

/// Light or dark.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum EditorTheme {
    /// Dark on white
    Light,
    /// Light on black
    Dark,
}

fn size(text: &str) -> Result<(f32, f32), String> {
    let parse = |text: &str| text.trim().parse().ok().filter(|size| (100.0..=16384.0).contains(size));
    let pair = text.split_once('x').and_then(|(width, height)| Some((parse(width)?, parse(height)?)));
    pair.ok_or_else(|| "expected width and height as in 1280x720, each from 100 to 16384".into())
}
