//! What can be wrong with a folder, in words that name the file or tensor, what was expected and what was found.

use crate::problem::Problem;
use std::fmt::{self, Display, Formatter};
use std::io;
use std::path::PathBuf;

/// Why a folder cannot be read.
#[derive(Debug, thiserror::Error)]
pub enum ReadError {
    /// A file cannot be opened or read.
    #[error("cannot read {path}: {source}")]
    Io {
        /// The file.
        path: PathBuf,
        /// The system's reason.
        source: io::Error,
    },
    /// config.json is wrong.
    #[error("{path}: this model cannot be read:{}", Lines(&sentences(problems)))]
    Config {
        /// The file.
        path: PathBuf,
        /// What is wrong, by key.
        problems: Vec<Problem>,
    },
    /// Another JSON file, or a safetensors header, is wrong.
    #[error("{path}: {reason}")]
    File {
        /// The file.
        path: PathBuf,
        /// What was expected and what was found.
        reason: String,
    },
    /// The tensors are not those of the model.
    #[error("the weights in {dir} are not those of its config.json:{}", Lines(findings))]
    Weights {
        /// The folder.
        dir: PathBuf,
        /// One finding per tensor; none is left out.
        findings: Vec<Finding>,
    },
    /// A copy of a tensor differs from the tensor.
    #[error(
        "{alias} must be a copy of {name}, but differs at element {index}: {found} is not {expected}; the model has one \
         tensor for both"
    )]
    AliasDiffers {
        /// The copy.
        alias: String,
        /// The tensor.
        name: String,
        /// First element that differs.
        index: usize,
        /// The tensor's value.
        expected: f32,
        /// The copy's value.
        found: f32,
    },
    /// A weight is NaN or infinite.
    #[error("{name} holds {value} at element {index}: the checkpoint is damaged or its training diverged")]
    NotFinite {
        /// The tensor.
        name: String,
        /// First such element.
        index: usize,
        /// NaN or an infinity.
        value: f32,
    },
}

/// What is wrong with one tensor of a folder.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Finding {
    /// The model needs it, the folder lacks it.
    Missing {
        /// Its name.
        name: String,
        /// The shape the model needs.
        shape: Vec<usize>,
    },
    /// It has another shape.
    Shape {
        /// Its name.
        name: String,
        /// The shape the model needs.
        expected: Vec<usize>,
        /// The shape in the folder.
        found: Vec<usize>,
    },
    /// It is of a type that holds no weights.
    Dtype {
        /// Its name.
        name: String,
        /// The type in the folder.
        found: String,
    },
    /// The folder has it, the model does not.
    Unused {
        /// Its name.
        name: String,
        /// Why, where that is known.
        hint: Option<String>,
    },
}

impl Display for Finding {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        match self {
            Finding::Missing { name, shape } => write!(f, "missing: {name} {shape:?}"),
            Finding::Shape { name, expected, found } => {
                write!(f, "wrong shape: {name}: expected {expected:?}, found {found:?}")
            }
            Finding::Dtype { name, found } => {
                write!(f, "wrong type: {name}: expected F32, BF16, F16 or F8_E4M3, found {found}")
            }
            Finding::Unused { name, hint: None } => write!(f, "not used: {name}"),
            Finding::Unused { name, hint: Some(hint) } => write!(f, "not used: {name} ({hint})"),
        }
    }
}

/// Problems as sentences, with their help.
fn sentences(problems: &[Problem]) -> Vec<String> {
    let sentence = |p: &Problem| match &p.help {
        Some(help) => format!("{}: {} ({help})", p.path, p.message),
        None => format!("{}: {}", p.path, p.message),
    };
    problems.iter().map(sentence).collect()
}

/// A list, one indented line each.
struct Lines<'a, T>(&'a [T]);

impl<T: Display> Display for Lines<'_, T> {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|line| write!(f, "\n  {line}"))
    }
}
