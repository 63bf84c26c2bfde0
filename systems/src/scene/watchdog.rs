//! The section on ranks that are processes and come to nothing: when the others take one for lost, and losing one on purpose.

use std::path::PathBuf;

use kernels::comm::watch::{Fault, Limits};
use serde::{Deserialize, Serialize};

/// When a rank counts as lost. Then all ranks end, with exit code 5 and its name.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Watchdog {
    /// Seconds that a process may be silent. Also the least that ranks wait for one that does not come.
    pub min_secs: f64,
    /// Seconds that ranks wait for one before the first step is done: reading the model is part of that.
    pub first_step_secs: f64,
    /// After it: so many times the slowest of the last 16 steps, if that is more than `min_secs`.
    pub steps: f64,
    /// Seconds that a signal which asks to stop waits for the end of the step at hand. Then the step is given up, and the checkpoint is
    /// of those before.
    pub finish_step_secs: f64,
    /// Steps between two comparisons of the weights that several ranks hold, by hash; a rank that differs is lost. An interval that
    /// divides that of checkpoints keeps what differs out of them. None never compares.
    pub compare_weights_every_steps: Option<u64>,
    /// Ranks that are to come to harm, to see what a cluster makes of it.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub faults: Vec<Fault>,
}

impl Default for Watchdog {
    fn default() -> Self {
        let Limits { min_secs, first_step_secs, steps, .. } = Limits::default();
        Watchdog {
            min_secs,
            first_step_secs,
            steps,
            finish_step_secs: 2.0,
            compare_weights_every_steps: None,
            faults: Vec::new(),
        }
    }
}

impl Watchdog {
    /// The same as limits, with where a rank's last ops are written.
    pub fn limits(&self, dump: PathBuf) -> Limits {
        let Watchdog { min_secs, first_step_secs, steps, .. } = *self;
        Limits { min_secs, first_step_secs, steps, dump: Some(dump) }
    }
}
