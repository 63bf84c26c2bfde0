//! A scene: the one RON file that says what a run is. A section is a plugin's settings, and a missing section means
//! that the plugin is absent; only `batch`, `mesh`, `device`, `graphs`, `precision`, `recompute` and `watchdog`, which are no plugins, always have a value.
//!
//! A file may extend another (`extends: "base.ron"`), and `--set path.to.key=RON` has the last word. The texts are
//! merged as written, then read as types, then checked; each stage reports everything it finds, by file, line and
//! column of the value that won.
mod access;
mod check;
mod compute;
mod de;
mod diagnostic;
pub mod diloco;
mod fault;
pub mod form;
pub mod hardware;
mod remote;
mod schedule;
mod sections;
mod source;
mod syntax;
mod tree;
mod watchdog;

use std::path::Path;

use ron::extensions::Extensions;
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

pub use check::prefix;
pub use compute::{Compute, Device, Kept, Moments, Part, Precision, Recompute, RecomputeOp, Scales};
pub use diagnostic::{Place, SceneError, SceneErrors};
pub use remote::Remote;
pub use schedule::{Constant, Cosine, Schedule, WarmupStableDecay};
pub use sections::{
    AdamW, Batch, Budget, Checkpoint, Data, Eval, ExpertParallel, Mtp, Muon, Optimizer, Pipeline, PipelineSchedule,
    PlanSection, Ramp, Reduce, Routing, RoutingMode, Sample, ScenePath, ScenePaths, Telemetry, Tokenizer, TraceSteps,
    Train, Validation, WireFormat,
};

use check::Checks;
pub use watchdog::Watchdog;

use crate::hf::config::HfConfig;
use crate::mesh::Mesh;
use crate::problem::Problem;
use diagnostic::Finding;
use source::{Read, Sources};
use tree::{At, Node};

/// The sections of a scene.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Scene {
    /// Names the run's folder; the stem of the scene's file if it is not given.
    #[serde(default)]
    pub name: String,
    /// Seed of everything that is random.
    #[serde(default = "default_seed")]
    pub seed: u64,
    /// Hugging Face folder whose weights the run starts from.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub init: Option<ScenePath>,
    /// Shapes and formulas of the model, with the keys of Hugging Face's config.json.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub model: Option<HfConfig>,
    /// Text to learn from.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub data: Option<Data>,
    /// How many sequences make a step.
    #[serde(default)]
    pub batch: Batch,
    /// How tokens find experts.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub routing: Option<Routing>,
    /// Multi-token prediction.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub mtp: Option<Mtp>,
    /// How gradients change weights.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub optimizer: Option<Optimizer>,
    /// Learning rate by step.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub schedule: Option<Schedule>,
    /// Length and limits of training.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub train: Option<Train>,
    /// Ranks along each axis.
    #[serde(default)]
    pub mesh: Mesh,
    /// Replicas of the mesh that train apart, and meet once in many steps.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub diloco: Option<diloco::Diloco>,
    /// How layers are laid on pipeline ranks.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub pipeline: Option<Pipeline>,
    /// How rows travel to the ranks of their experts.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub expert_parallel: Option<ExpertParallel>,
    /// What `hadal plan` takes the scene to run on.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub plan: Option<PlanSection>,
    /// What the run's tensors and ops are on.
    #[serde(default)]
    pub device: Device,
    /// Whether launches that are the same each step go to the GPU as CUDA graphs: a launch then costs the host less. Off by default, as
    /// long as it has not been measured.
    #[serde(default)]
    pub graphs: bool,
    /// Multiprocessors of the GPU that communication has for itself while it runs beside computation; without a figure, what
    /// [`crate::on_gpu`] says. Of hardware that is planned for, in place of its own `comm_sms`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub comm_sms: Option<u32>,
    /// Tiles of products, as `hadal bench kernels --tune` found them on this GPU. They change no bit of a result.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub tuning: Option<ScenePath>,
    /// Number formats.
    #[serde(default)]
    pub precision: Precision,
    /// What the backward pass computes again.
    #[serde(default)]
    pub recompute: Recompute,
    /// Measuring the validation loss.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub eval: Option<Eval>,
    /// Saving the run.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub checkpoint: Option<Checkpoint>,
    /// What the run may cost.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub budget: Option<Budget>,
    /// A continuation at the end.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub sample: Option<Sample>,
    /// What the run writes about itself.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub telemetry: Option<Telemetry>,
    /// When a rank that is a process counts as lost.
    #[serde(default)]
    pub watchdog: Watchdog,
    /// Watching and steering the run from elsewhere.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub remote: Option<Remote>,
}

fn default_seed() -> u64 {
    1
}

/// A scene with the texts it came from.
#[derive(Clone, Debug)]
pub struct Loaded {
    /// The merged scene; its paths are absolute if they were named in files.
    pub scene: Scene,
    sources: Sources,
    root: Node,
}

impl Scene {
    /// Reads the scene file at `path`, the files it extends, and `overrides` (each `path.to.key=RON`).
    ///
    /// # Errors
    /// Everything that keeps the texts from being a scene. Values are not judged yet; see [`Scene::check`].
    pub fn load(path: &Path, overrides: &[String]) -> Result<Loaded, SceneErrors> {
        let mut sources = Sources::default();
        let read = source::read_file(path, overrides, &mut sources);
        let stem = path.file_stem().unwrap_or_default();
        Loaded::new(read, sources, &stem.to_string_lossy())
    }

    /// The same for `text` as if it were the file at `path`: for an editor, which has not saved it yet.
    ///
    /// # Errors
    /// As [`Scene::load`].
    pub fn load_text(path: &Path, text: &str, overrides: &[String]) -> Result<Loaded, SceneErrors> {
        let mut sources = Sources::default();
        let read = source::read_text_of(path, text, overrides, &mut sources);
        let stem = path.file_stem().unwrap_or_default();
        Loaded::new(read, sources, &stem.to_string_lossy())
    }

    /// The same for a text that is in no file: it is called `scene.ron`, and relative paths in it stay as they are.
    ///
    /// # Errors
    /// As [`Scene::load`].
    pub fn parse(text: &str, overrides: &[String]) -> Result<Loaded, SceneErrors> {
        let mut sources = Sources::default();
        let read = source::read_str(text, overrides, &mut sources);
        Loaded::new(read, sources, "scene")
    }
}

impl Loaded {
    fn new(read: Result<Read, Vec<Finding>>, sources: Sources, stem: &str) -> Result<Self, SceneErrors> {
        let Read { root, mut findings } = match read {
            Ok(read) => read,
            Err(findings) => return Err(SceneErrors::new(findings, &sources)),
        };
        let mut scene = match de::read::<Scene>(&root, &sources) {
            Ok(scene) if findings.is_empty() => scene,
            Ok(_) => return Err(SceneErrors::new(findings, &sources)),
            Err(found) => {
                findings.extend(found);
                return Err(SceneErrors::new(findings, &sources));
            }
        };
        if !root.find(&tree::segments("name")).complete {
            stem.clone_into(&mut scene.name);
        }
        Ok(Loaded { scene, sources, root })
    }

    /// The whole scene as RON, defaults written out, under a comment with Hadal's version and the sha256 of what
    /// follows it. Loading this text gives an equal scene.
    ///
    /// # Errors
    /// RON's, if a value has no RON form.
    pub fn to_ron(&self) -> Result<String, ron::Error> {
        let extensions = Extensions::IMPLICIT_SOME | Extensions::UNWRAP_NEWTYPES | Extensions::UNWRAP_VARIANT_NEWTYPES;
        let options = ron::Options::default().with_default_extension(extensions);
        let config = ron::ser::PrettyConfig::new().new_line("\n").compact_arrays(true);
        let body = options.to_string_pretty(&self.scene, config)? + "\n";
        let hash: String = Sha256::digest(body.as_bytes()).iter().map(|byte| format!("{byte:02x}")).collect();
        Ok(format!("// Hadal {}, sha256 {hash}\n{body}", env!("CARGO_PKG_VERSION")))
    }

    /// Names of the texts, the scene's own file first, then what it extends, then one `--set` for each override.
    pub fn sources(&self) -> impl Iterator<Item = &str> {
        self.sources.0.iter().map(|source| source.name.as_str())
    }

    /// Later findings about the scene, pointed at the values that won. A path to what is not written points at the
    /// section that it would stand in.
    pub fn errors(&self, problems: &[Problem]) -> SceneErrors {
        SceneErrors::new(problems.iter().map(|problem| self.finding(problem)).collect(), &self.sources)
    }

    fn finding(&self, problem: &Problem) -> Finding {
        let Problem { path, message, help } = problem;
        let found = self.root.find(&tree::segments(path));
        let at = found.node.at;
        let spans_lines = self.sources.get(at).text[at.start..at.end].contains('\n');
        let at = match found.key_at {
            Some(key_at) if !found.complete || spans_lines => key_at,
            // Not in the file at all: its first bracket stands for all of it.
            None if !found.complete => At { end: at.start + 1, ..at },
            _ => at,
        };
        let label = if found.complete { "this value".to_owned() } else { format!("`{path}` is not given here") };
        let message = if path.is_empty() { message.clone() } else { format!("`{path}` {message}") };
        Finding { path: path.clone(), help: help.clone(), ..Finding::new(at, message, label) }
    }
}

#[cfg(test)]
mod tests;
