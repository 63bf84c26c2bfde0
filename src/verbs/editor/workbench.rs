//! What the editor asks about scenes: the same checks, plans and runs as on the command line.

use std::{
    path::{Path, PathBuf},
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicUsize, Ordering},
    },
    thread::JoinHandle,
};

use editor::{
    source::{Source, SourceEvent, Wake, file::FileSource, in_process::InProcess},
    workbench::{Diagnostic, FormField, FormSection, Opened, PlannedStep, SceneReport, WhatIf, Workbench},
};
use engine::{control, hardware::DeviceSpec};
use systems::{
    api::RunRequest,
    local::Silent,
    run as training,
    scene::{Loaded, Scene, SceneErrors, form},
};

use super::{super::run, planning};
use crate::load;

/// Signal that ends a run after the step at hand, as Ctrl-C does.
const INTERRUPT: usize = 2;

/// Values of enums that the form offers.
const CHOICES: [(&str, &[&str]); 6] = [
    (
        "pipeline.schedule",
        &["GPipe", "OneFOneB", "Interleaved(chunks: 2)", "ZbH1", "ZbH2", "Zbv", "DualPipe", "DualPipeV"],
    ),
    ("precision.compute", &["F32", "Bf16", "Fp8", "F64"]),
    ("precision.moments", &["F32", "Bf16"]),
    ("precision.scales", &["Real", "PowerOfTwo"]),
    ("precision.attention_output", &["High", "Narrow"]),
    ("precision.swiglu_input", &["High", "Narrow"]),
];

/// Scenes, plans and runs of this process.
pub struct Bench {
    token: Option<PathBuf>,
    /// This machine as hardware, once it was measured: for scenes that name none.
    machine: Mutex<Option<DeviceSpec>>,
    runs: Mutex<Vec<JoinHandle<()>>>,
}

impl Bench {
    /// One that follows runs elsewhere with the token in a file.
    pub fn new(token: Option<PathBuf>) -> Self {
        Bench { token, machine: Mutex::default(), runs: Mutex::default() }
    }

    /// Waits for runs that were started here and are being stopped.
    pub fn wait(&self) {
        let runs = std::mem::take(&mut *self.runs.lock().unwrap_or_else(PoisonError::into_inner));
        for run in runs {
            // One that panicked has said so on stderr.
            let _ = run.join();
        }
    }
}

/// The text as the scene at `path`.
pub fn read(path: Option<&Path>, text: &str, overrides: &[String]) -> Result<Loaded, SceneErrors> {
    match path {
        Some(path) => Scene::load_text(path, text, overrides),
        None => Scene::parse(text, overrides),
    }
}

/// Errors by place. What is in another file, which this one extends, is named.
pub fn diagnostics(path: Option<&Path>, errors: &SceneErrors) -> Vec<Diagnostic> {
    let own = path.map_or_else(|| "scene.ron".to_owned(), |path| path.display().to_string());
    let diagnostic = |error: &systems::scene::SceneError| {
        let (message, help) = (error.message.clone(), error.help.clone());
        match &error.place {
            Some(place) if place.file == own => {
                Diagnostic { line: place.line, column: place.column, length: place.width, message, help }
            }
            Some(place) => {
                let message = format!("{}:{}:{}: {message}", place.file, place.line, place.column);
                Diagnostic { message, help, ..Diagnostic::default() }
            }
            None => Diagnostic { message, help, ..Diagnostic::default() },
        }
    };
    errors.errors.iter().map(diagnostic).collect()
}

impl Workbench for Bench {
    fn check(&self, path: Option<&Path>, text: &str) -> SceneReport {
        let loaded = match read(path, text, &[]) {
            Ok(loaded) => loaded,
            Err(errors) => return SceneReport { diagnostics: diagnostics(path, &errors), form: Vec::new() },
        };
        let form = sections(&loaded, text);
        match load::judge(loaded, &[]) {
            Ok(_) => SceneReport { diagnostics: Vec::new(), form },
            Err(errors) => SceneReport { diagnostics: diagnostics(path, &errors), form },
        }
    }

    fn set(&self, text: &str, field: &str, value: &str) -> Result<String, String> {
        form::set(text, field, value)
    }

    fn plan(&self, path: Option<&Path>, text: &str, what_if: &WhatIf) -> Result<PlannedStep, Vec<Diagnostic>> {
        let mut overrides = Vec::new();
        if let Some(limit) = what_if.node_limit {
            // Experts of a token are taken from so many groups, and a node holds a group.
            overrides.push(format!("model.topk_group={limit}"));
        }
        let checked = read(path, text, &overrides).and_then(|loaded| load::judge(loaded, &["model"]));
        let checked = checked.map_err(|errors| diagnostics(path, &errors))?;
        planning::plan(&checked, what_if, &self.machine).map_err(|message| vec![Diagnostic::anywhere(message)])
    }

    fn run(&self, path: Option<&Path>, text: &str, resume: bool, wake: Wake) -> Result<Box<dyn Source>, String> {
        let checked = read(path, text, &[]).and_then(|loaded| load::judge(loaded, &["model", "data", "train"]));
        let loaded = checked.map_err(|errors| errors.to_string())?.loaded;
        if !resume {
            run::make_room(&load::run_dir(&loaded.scene), true).map_err(|failure| failure.message())?;
        }
        let stop = Arc::new(AtomicUsize::new(0));
        let (handle, inbox) = control::channel();
        let (stopper, asked) = (stop.clone(), handle.clone());
        let on_drop = Box::new(move || {
            stopper.store(INTERRUPT, Ordering::Relaxed);
            // A paused run waits for requests.
            drop(asked.call("run.stop", serde_json::Value::Null));
        });
        let name = loaded.scene.name.clone();
        let (source, last_words) = InProcess::new(name, handle.clone(), wake.clone(), on_drop);
        let request =
            RunRequest { loaded, resume, stop, progress: Arc::new(Silent), control: Some((handle, inbox)), comm: None };
        let thread = std::thread::Builder::new().name("run".into()).spawn(move || {
            let ended = match training::run(request) {
                Ok(report) => report.exit_reason,
                Err(error) => error.to_string(),
            };
            // The window may be gone.
            let _ = last_words.send(SourceEvent::Ended(ended));
            wake();
        });
        let thread = thread.map_err(|e| format!("the system gives no thread for a run: {e}"))?;
        self.runs.lock().unwrap_or_else(PoisonError::into_inner).push(thread);
        Ok(Box::new(source))
    }

    fn open(&self, target: &str, wake: Wake) -> Result<Opened, String> {
        let path = Path::new(target);
        if !path.exists() && is_address(target) {
            return self.attach(target, wake);
        }
        if path.is_file() && path.extension().is_some_and(|extension| extension == "ron") {
            let text = std::fs::read_to_string(path).map_err(|e| format!("cannot read {target}: {e}"))?;
            return Ok(Opened::Scene { path: path.to_owned(), text });
        }
        if !path.exists() {
            return Err(format!("{target}: expected a scene, a trace, a run's folder or an address; there is none"));
        }
        Ok(Opened::Source(Box::new(FileSource::open(path)?)))
    }
}

impl Bench {
    #[cfg(feature = "remote")]
    fn attach(&self, url: &str, wake: Wake) -> Result<Opened, String> {
        let source = editor::source::remote::RemoteSource::connect(url, self.token.as_deref(), wake)?;
        Ok(Opened::Source(Box::new(source)))
    }

    #[cfg(not(feature = "remote"))]
    fn attach(&self, url: &str, _: Wake) -> Result<Opened, String> {
        let _ = &self.token;
        Err(format!("cannot follow {url}: this program was built without the feature `remote`"))
    }
}

/// `http://host:port`, or the same without the protocol.
fn is_address(target: &str) -> bool {
    let has_port = |target: &str| {
        target.rsplit_once(':').is_some_and(|(host, port)| !host.contains('/') && port.parse::<u16>().is_ok())
    };
    target.contains("://") || has_port(target)
}

/// The scene as sections. Those that change a plan are there also if the scene lacks them.
fn sections(loaded: &Loaded, text: &str) -> Vec<FormSection> {
    let choices = |path: &str| {
        let known = CHOICES.iter().find(|(known, _)| *known == path);
        known.map_or_else(Vec::new, |(_, choices)| choices.iter().map(|choice| (*choice).to_owned()).collect())
    };
    let field = |value: form::FormValue| FormField {
        choices: choices(&value.path),
        path: value.path,
        value: value.value,
        written_at: value.written_at,
    };
    // A value without a RON form has no place in a form.
    let values = form::form(loaded, text).unwrap_or_default();
    let mut sections: Vec<FormSection> = values
        .into_iter()
        .map(|(name, values)| FormSection { name, fields: values.into_iter().map(field).collect() })
        .collect();
    for (section, fields) in [("pipeline", &["schedule"][..]), ("plan", &["hardware", "seq_len"])] {
        if loaded.scene.pipeline.is_none() && section == "pipeline" || loaded.scene.plan.is_none() && section == "plan"
        {
            let field = |name: &&str| {
                let path = format!("{section}.{name}");
                FormField { choices: choices(&path), path, value: String::new(), written_at: None }
            };
            sections.push(FormSection { name: section.into(), fields: fields.iter().map(field).collect() });
        }
    }
    sections
}
