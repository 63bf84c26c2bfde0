//! A thing that is wrong with a scene or a config, said by path. Checks collect these instead of stopping at the
//! first, and the scene loader turns the path into file, line and column.

/// One finding of a check.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Problem {
    /// Dotted path of the field, e.g. `model.n_group`.
    pub path: String,
    /// What was expected and what was found, in one sentence without a period.
    pub message: String,
    /// What to do: the nearest valid name or value.
    pub help: Option<String>,
}

impl Problem {
    /// A problem at `path`.
    pub fn new(path: impl Into<String>, message: impl Into<String>) -> Self {
        Problem { path: path.into(), message: message.into(), help: None }
    }

    /// The same problem with advice.
    #[must_use]
    pub fn help(mut self, help: impl Into<String>) -> Self {
        self.help = Some(help.into());
        self
    }
}
