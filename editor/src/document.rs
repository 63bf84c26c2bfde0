//! The scene that is edited: its text, what is wrong with it, and its plan. Each change is checked and planned on threads beside
//! the window; while one is at work, only the newest text waits.

use std::{
    path::{Path, PathBuf},
    sync::Arc,
};

use crate::{
    background::Background,
    source::Wake,
    workbench::{Diagnostic, PlannedStep, SceneReport, WhatIf, Workbench},
};

/// A scene in the editor.
#[derive(Default)]
pub struct Document {
    /// Its file; none if it was never saved.
    pub path: Option<PathBuf>,
    /// Its text.
    pub text: String,
    /// The text as it is in the file.
    saved: String,
    /// What is wrong with it, and its form.
    pub report: SceneReport,
    /// The plan of the newest text that has one.
    pub planned: Option<PlannedStep>,
    /// Why the newest text has no plan.
    pub plan_errors: Vec<Diagnostic>,
    /// The text that `report` and plan are of.
    judged: Option<String>,
    check: Background<SceneReport>,
    plan: Background<Planning>,
    checked: Option<String>,
    planned_text: Option<String>,
}

/// A text and what came of planning it.
type Planning = (String, Result<PlannedStep, Vec<Diagnostic>>);

impl Document {
    /// The scene of a file.
    pub fn new(path: Option<PathBuf>, text: String) -> Self {
        Document { path, saved: text.clone(), text, ..Document::default() }
    }

    /// Whether the text differs from the file.
    pub fn is_modified(&self) -> bool {
        self.text != self.saved
    }

    /// Whether a check or a plan is at work or to come.
    pub fn is_busy(&self) -> bool {
        self.check.is_busy() || self.plan.is_busy() || self.planned_text.as_ref() != Some(&self.text)
    }

    /// How it is called.
    pub fn title(&self) -> String {
        let name = self.path.as_deref().and_then(Path::file_name);
        name.map_or_else(|| "untitled scene".into(), |name| name.to_string_lossy().into_owned())
    }

    /// Writes the text to `path`, which is the scene's file from then on.
    ///
    /// # Errors
    /// If it cannot be written.
    pub fn save(&mut self, path: PathBuf) -> Result<(), String> {
        // Beside and renamed, so that a full disk leaves the old text.
        let temporary = path.with_extension("ron.tmp");
        let written = std::fs::write(&temporary, &self.text).and_then(|()| std::fs::rename(&temporary, &path));
        written.map_err(|e| format!("cannot write {}: {e}", path.display()))?;
        self.saved.clone_from(&self.text);
        self.path = Some(path);
        Ok(())
    }

    /// Takes what is done, and starts what is due; called in each frame. A plan is only made of a text without faults.
    pub fn work(&mut self, workbench: &Arc<dyn Workbench>, wake: &Wake) {
        if let Some(report) = self.check.poll() {
            self.report = report;
            self.judged.clone_from(&self.checked);
        }
        if !self.check.is_busy() && self.checked.as_ref() != Some(&self.text) {
            self.checked = Some(self.text.clone());
            let (workbench, path, text) = (workbench.clone(), self.path.clone(), self.text.clone());
            let started =
                self.check.start("scene check", wake.clone(), move || workbench.check(path.as_deref(), &text));
            self.note_thread(started);
        }
        if let Some((text, result)) = self.plan.poll() {
            match result {
                Ok(planned) => {
                    self.planned = Some(planned);
                    self.plan_errors.clear();
                }
                Err(errors) => self.plan_errors = errors,
            }
            self.planned_text = Some(text);
        }
        let is_judged = self.judged.as_ref() == Some(&self.text);
        if is_judged && !self.plan.is_busy() && self.planned_text.as_ref() != Some(&self.text) {
            if self.report.diagnostics.is_empty() {
                let (workbench, path, text) = (workbench.clone(), self.path.clone(), self.text.clone());
                let started = self.plan.start("plan", wake.clone(), move || {
                    let result = workbench.plan(path.as_deref(), &text, &WhatIf::default());
                    (text, result)
                });
                self.note_thread(started);
            } else {
                self.planned_text = Some(self.text.clone());
            }
        }
    }

    fn note_thread(&mut self, started: std::io::Result<()>) {
        if let Err(error) = started {
            self.plan_errors = vec![Diagnostic::anywhere(format!("the system gives no thread: {error}"))];
        }
    }
}
