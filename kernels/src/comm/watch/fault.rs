//! Faults on purpose: a rank ends, stops or is cut off at a place that is known beforehand, to see that the others notice, say whom
//! they lost, and end.

use serde::{Deserialize, Serialize};

/// One fault.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Fault {
    /// The rank that it strikes.
    pub rank: u32,
    /// The step, from 1 on.
    pub step: u64,
    /// Where: when this kind of task is launched (`attention_forward`), this op between ranks begins (`dispatch`,
    /// `reduce_scatter_sum`), all are there for an op by NCCL (`nccl`), or in this phase (`checkpoint_write`, `checkpoint_vote`). The
    /// first time in the step.
    pub at: String,
    /// What happens.
    pub how: How,
}

/// What a fault does.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum How {
    /// The process is killed, as by SIGKILL.
    Kill,
    /// The process is stopped, as by SIGSTOP, and stays.
    Stop,
    /// The thread panics.
    Panic,
    /// The process ends by itself, with code 3.
    Exit,
    /// The process is asked to end, as by SIGTERM, which is no loss: all save and end.
    Terminate,
    /// Nothing reaches the process any more, and nothing leaves it.
    Cut,
}

impl How {
    pub(super) fn strike(self, fault: &Fault) {
        let raise = |signal| {
            // SAFETY: it has no arguments in memory; what it does to this process is what is asked for.
            unsafe { libc::raise(signal) };
        };
        match self {
            How::Kill => raise(libc::SIGKILL),
            How::Stop => raise(libc::SIGSTOP),
            How::Terminate => {
                raise(libc::SIGTERM);
                // The thread that listens hears it before this one goes on.
                std::thread::sleep(std::time::Duration::from_millis(200));
            }
            How::Panic => panic!("a fault on purpose, at {} in step {}", fault.at, fault.step),
            How::Exit => std::process::exit(3),
            How::Cut => {}
        }
    }
}
