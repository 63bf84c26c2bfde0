//! A scene from its file, with everything that is wrong with it found at once: values, model, and what only both
//! together can say. Every verb that takes a scene takes it through here.

use std::path::{Path, PathBuf};

use systems::{
    data::tokenizer::Tokenizer,
    distribute::Distribution,
    hf::config::{ConfigDocument, HfConfig},
    model_config::ModelConfig,
    problem::Problem,
    scene::{self, Data, Loaded, Reduce, Scene, SceneErrors, ScenePath},
};

use crate::failure::Failure;

/// A scene that is valid.
pub struct Checked {
    /// The scene.
    pub loaded: Loaded,
    /// Its model, if it has one: from the scene, or from the checkpoint it starts from.
    pub model: Option<ModelConfig>,
    /// Tokens of its tokenizer, if it has one.
    pub vocab: Option<Vocab>,
}

/// Tokens of a tokenizer.
pub enum Vocab {
    /// Trained when the run begins, to this many at most.
    Bpe(usize),
    /// Those of a file.
    File(usize),
}

impl Vocab {
    /// Tokens, at most.
    pub fn size(&self) -> usize {
        match self {
            Vocab::Bpe(size) | Vocab::File(size) => *size,
        }
    }
}

/// Reads and checks the scene at `path`, under `overrides`. `needs` are sections that the verb cannot do without.
///
/// # Errors
/// All findings, with their places.
pub fn scene(path: &Path, overrides: &[String], needs: &[&str]) -> Result<Checked, SceneErrors> {
    judge(Scene::load(path, overrides)?, needs)
}

/// The folder of a scene's run.
pub fn run_dir(scene: &Scene) -> PathBuf {
    scene.telemetry.clone().unwrap_or_default().dir.join(&scene.name)
}

/// A checkpoint's folder: what was named, or what the run that was named, or the scene's, saved last.
///
/// # Errors
/// If the scene is not valid, or its run has saved nothing.
pub fn checkpoint(source: &Path, overrides: &[String]) -> Result<PathBuf, Failure> {
    if source.is_dir() {
        // A run's folder means its newest checkpoint.
        let latest = source.join("latest");
        return Ok(if latest.exists() && !source.join("config.json").exists() { latest } else { source.into() });
    }
    let scene = scene(source, overrides, &[])?.loaded.scene;
    let latest = run_dir(&scene).join("latest");
    if latest.exists() {
        return Ok(latest);
    }
    let help = format!("hadal run {} makes one", source.display());
    Err(Failure::usage(format!("expected a checkpoint at {}; found none", latest.display()), help))
}

/// Checks a scene that was read.
///
/// # Errors
/// All findings, with their places.
pub fn judge(loaded: Loaded, needs: &[&str]) -> Result<Checked, SceneErrors> {
    let scene = &loaded.scene;
    let mut problems = scene.check(Path::new(""));
    problems.extend(missing_sections(scene, needs));
    if needs.contains(&"train") {
        problems.extend(not_run_yet(scene));
    }
    let model = match model(scene) {
        Ok(model) => model,
        Err(found) => {
            problems.extend(found);
            None
        }
    };
    // What has a problem of its own is not judged together with others.
    let is_sound = |path: &str, problems: &[Problem]| !problems.iter().any(|problem| problem.path.starts_with(path));
    let data = scene.data.as_ref().filter(|_| is_sound("data.tokenizer", &problems));
    let vocab = match data.map(vocab).transpose() {
        Ok(vocab) => vocab,
        Err(problem) => {
            problems.push(problem);
            None
        }
    };
    let limits = Limits::of(scene, model.as_ref());
    problems.extend(vocab.as_ref().and_then(|vocab| limits.vocab_problem(vocab)));
    problems.extend(scene.data.as_ref().and_then(|data| limits.length_problem("data.seq_len", data.seq_len)));
    let planned_len = scene.plan.as_ref().and_then(|plan| plan.seq_len);
    problems.extend(planned_len.and_then(|seq_len| limits.length_problem("plan.seq_len", seq_len)));
    if let Some(model) = model.as_ref().filter(|_| is_sound("batch", &problems)) {
        problems.extend(Distribution::new(scene, model).err().into_iter().flatten());
    }
    if problems.is_empty() { Ok(Checked { model, vocab, loaded }) } else { Err(loaded.errors(&problems)) }
}

fn missing_sections(scene: &Scene, needs: &[&str]) -> Vec<Problem> {
    let is_missing = |section: &&str| match *section {
        "train" => scene.train.is_none(),
        // Without these, a `train` that is there is a finding of the scene's own check.
        "model" => scene.train.is_none() && scene.model.is_none() && scene.init.is_none(),
        "data" => scene.train.is_none() && scene.data.is_none(),
        _ => false,
    };
    let missing = needs.iter().copied().filter(is_missing);
    let problem = |section| {
        Problem::new(section, "is needed here, but the scene has no such section")
            .help(format!("add a section `{section}`"))
    };
    missing.map(problem).collect()
}

/// What can be planned only.
fn not_run_yet(scene: &Scene) -> Vec<Problem> {
    let mut problems = Vec::new();
    if scene.expert_parallel.as_ref().is_some_and(|experts| experts.reduce == Reduce::Node) {
        let problem = Problem::new("expert_parallel.reduce", "is Node, which can be planned but not run yet");
        problems.push(problem.help("expert_parallel.reduce: Source"));
    }
    problems
}

fn model(scene: &Scene) -> Result<Option<ModelConfig>, Vec<Problem>> {
    if let Some(config) = &scene.model {
        return config.resolve().map(Some).map_err(|problems| scene::prefix(problems, "model"));
    }
    let Some(ScenePath(folder)) = &scene.init else { return Ok(None) };
    // That there is such a file is the scene's check.
    let Ok(text) = std::fs::read_to_string(folder.join("config.json")) else { return Ok(None) };
    let resolved = ConfigDocument::parse(&text).and_then(|document| HfConfig::resolve(document.config()));
    let at_init = |problem: Problem| Problem {
        path: "init".into(),
        message: format!("has a config.json with `{}`: {}", problem.path, problem.message),
        help: problem.help,
    };
    resolved.map(Some).map_err(|problems| problems.into_iter().map(at_init).collect())
}

fn vocab(data: &Data) -> Result<Vocab, Problem> {
    match &data.tokenizer {
        scene::Tokenizer::Bpe { vocab_size } => Ok(Vocab::Bpe(*vocab_size)),
        scene::Tokenizer::File(ScenePath(path)) => match Tokenizer::load(path) {
            Ok(tokenizer) => Ok(Vocab::File(tokenizer.vocab_size())),
            Err(e) => Err(Problem::new("data.tokenizer", format!("cannot be used: {e}"))),
        },
    }
}

/// What a model sets a limit to. A section says so by itself, even if the rest of it is wrong.
struct Limits {
    vocab_size: Option<usize>,
    max_position_embeddings: Option<usize>,
}

impl Limits {
    fn of(scene: &Scene, model: Option<&ModelConfig>) -> Self {
        let section = scene.model.as_ref();
        Limits {
            vocab_size: model.map(|model| model.vocab_size).or(section.and_then(|section| section.vocab_size)),
            max_position_embeddings: model
                .map(|model| model.max_position_embeddings)
                .or(section.and_then(|section| section.max_position_embeddings)),
        }
    }

    fn vocab_problem(&self, vocab: &Vocab) -> Option<Problem> {
        let rows = self.vocab_size.filter(|rows| vocab.size() > *rows)?;
        let path = match vocab {
            Vocab::Bpe(_) => "data.tokenizer.vocab_size",
            Vocab::File(_) => "data.tokenizer",
        };
        let message = format!("makes {} tokens, but the model has vocab_size = {rows}", vocab.size());
        Some(Problem::new(path, message).help(format!("model.vocab_size: {} or more", vocab.size())))
    }

    fn length_problem(&self, path: &str, seq_len: usize) -> Option<Problem> {
        let most = self.max_position_embeddings.filter(|most| seq_len > *most)?;
        let message = format!("is {seq_len}, but the model has max_position_embeddings = {most}");
        Some(Problem::new(path, message).help(format!("{most} or fewer")))
    }
}
