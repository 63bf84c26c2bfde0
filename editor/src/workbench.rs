//! What the program gives to the editor: scenes and plans. The editor has texts and pictures, and asks here what they mean.

use std::{ops::Range, path::Path, path::PathBuf, sync::Arc};

use engine::telemetry::Snapshot;

use crate::source::{Source, Wake};

/// Something that is wrong with a scene, and where.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Diagnostic {
    /// Line from 1; 0 if it is of no line of this text.
    pub line: usize,
    /// Column in characters, from 1.
    pub column: usize,
    /// Characters that it is about.
    pub length: usize,
    /// What was expected and what was found.
    pub message: String,
    /// What to do.
    pub help: Option<String>,
}

impl Diagnostic {
    /// One that has no place in the text.
    pub fn anywhere(message: impl Into<String>) -> Self {
        Diagnostic { message: message.into(), ..Diagnostic::default() }
    }
}

/// A value of a scene, for the form.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FormField {
    /// Dotted path, as in `--set`.
    pub path: String,
    /// The value as RON: as written, or else the default, or what the extended scene says.
    pub value: String,
    /// Bytes of it in this text, if it is written there.
    pub written_at: Option<Range<usize>>,
    /// Values that there are, if they can be listed.
    pub choices: Vec<String>,
}

/// A section of a scene, for the form.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FormSection {
    /// Its key; empty for what stands outside of sections.
    pub name: String,
    /// Its values, in the order of the format.
    pub fields: Vec<FormField>,
}

/// What a text is as a scene.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct SceneReport {
    /// All that is wrong, in the order of the text.
    pub diagnostics: Vec<Diagnostic>,
    /// The scene as sections; empty if the text cannot be read.
    pub form: Vec<FormSection>,
}

/// What a plan is asked to take for granted, instead of what the scene says.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct WhatIf {
    /// `[layer][expert]`: shares of the tokens of each layer, as a step was measured to route them.
    pub loads: Option<Vec<Vec<f64>>>,
    /// All experts of a layer get the same; `loads` do not count.
    pub is_balanced: bool,
    /// Nodes that a token's experts may be on.
    pub node_limit: Option<u32>,
    /// Multiprocessors that communication occupies.
    pub num_comm_multiprocessors: Option<u32>,
}

/// A step as it was planned.
#[derive(Clone, Debug)]
pub struct PlannedStep {
    /// All ranks that were simulated, and figures with units in their names.
    pub snapshot: Arc<Snapshot>,
    /// What a person should know.
    pub notes: Vec<String>,
}

/// What `open` found.
pub enum Opened {
    /// A scene to edit.
    Scene {
        /// Its file.
        path: PathBuf,
        /// Its text.
        text: String,
    },
    /// Snapshots.
    Source(Box<dyn Source>),
}

/// Scenes, plans and runs. Each call may take seconds: the editor makes them on threads of their own.
pub trait Workbench: Send + Sync {
    /// What is wrong with a text, and its sections. `path` is where it is, or will be, saved: other files are named from there.
    fn check(&self, path: Option<&Path>, text: &str) -> SceneReport;

    /// The text with one value changed, or added if it is not written there.
    ///
    /// # Errors
    /// If the text cannot be read, or has no such place.
    fn set(&self, text: &str, field: &str, value: &str) -> Result<String, String>;

    /// A step of the scene on the hardware that it names.
    ///
    /// # Errors
    /// What is wrong with the scene, or what a plan lacks.
    fn plan(&self, path: Option<&Path>, text: &str, what_if: &WhatIf) -> Result<PlannedStep, Vec<Diagnostic>>;

    /// Starts a run of the scene in this process; `resume` goes on from its last checkpoint.
    ///
    /// # Errors
    /// If the scene cannot be run.
    fn run(&self, path: Option<&Path>, text: &str, resume: bool, wake: Wake) -> Result<Box<dyn Source>, String>;

    /// Opens a scene, a trace, a run's folder, or the address of a run.
    ///
    /// # Errors
    /// If it is none of these, or cannot be read.
    fn open(&self, target: &str, wake: Wake) -> Result<Opened, String>;
}
