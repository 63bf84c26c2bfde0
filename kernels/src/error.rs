//! What can go wrong on a device, with the operation and its subject.

use crate::tensor::Tensor;

/// Error of an op, a stream or a memory.
#[derive(Debug, Clone, thiserror::Error)]
pub enum Error {
    /// A tensor does not fit its role.
    #[error("{op}: `{role}` should be {expected}, found {:?} of {:?}", found.dtype, found.shape)]
    Shape {
        /// Operation.
        op: &'static str,
        /// The tensor's role in it.
        role: &'static str,
        /// What the contract says.
        expected: String,
        /// What came.
        found: Tensor,
    },
    /// A value that poisons everything after it.
    #[error("{task}: found {value} in `{tensor}`; lower the learning rate, or look at the step before")]
    NotFinite {
        /// Task that found it.
        task: String,
        /// Name of the tensor.
        tensor: String,
        /// NaN or an infinity.
        value: f64,
    },
    /// A task panicked on its stream.
    #[error("task `{task}` failed on stream `{stream}`: {message}")]
    Task {
        /// Stream.
        stream: String,
        /// Task.
        task: String,
        /// The panic's message.
        message: String,
    },
    /// Ranks do not fit together in an op between them, or one cannot do its part.
    #[error("{op}: {message}")]
    Comm {
        /// Operation.
        op: &'static str,
        /// What was expected and found, with the ranks.
        message: String,
    },
    /// Another rank is gone, or this one gave up; nobody waits for it any more.
    #[error("rank {rank} is lost: {message}")]
    PeerLost {
        /// Who.
        rank: u32,
        /// Why.
        message: String,
    },
    /// The op was not run, or not to its end: what it is for was given up.
    #[error("given up")]
    Halted,
    /// A device that cannot be used.
    #[error("{device} cannot be used: expected {expected}, found {found}; {advice}")]
    Device {
        /// As a scene says it.
        device: String,
        /// What is needed.
        expected: String,
        /// What there is.
        found: String,
        /// What to do.
        advice: String,
    },
    /// A device's memory is full.
    #[error(
        "{device} is out of memory: asked for {asked_bytes} bytes, found {free_bytes} of {total_bytes} free; take fewer or \
         shorter sequences in a microbatch, recompute more, or spread the model over more ranks"
    )]
    OutOfMemory {
        /// Device.
        device: String,
        /// Bytes of the tensor.
        asked_bytes: u64,
        /// Bytes that nobody holds.
        free_bytes: u64,
        /// Bytes of the device.
        total_bytes: u64,
    },
    /// A kernel that the driver does not take.
    #[error("kernel `{kernel}` cannot be loaded on {device}: {message}")]
    Kernel {
        /// Name of its entry.
        kernel: String,
        /// Device.
        device: String,
        /// The driver's words, and its compiler's.
        message: String,
    },
    /// A call of the driver that failed.
    #[error("{device}: {call} failed: {message}")]
    Driver {
        /// Device.
        device: String,
        /// What was asked of the driver.
        call: &'static str,
        /// The driver's words.
        message: String,
    },
    /// The stream's thread is gone.
    #[error("stream `{stream}` has stopped")]
    StreamStopped {
        /// Stream.
        stream: String,
    },
}

impl Error {
    /// Ends the op that finds it, as a panic would, and its stream fails with it; but nothing is printed, since whoever
    /// synchronizes gets the error.
    pub fn raise(self) -> ! {
        std::panic::resume_unwind(Box::new(self))
    }
}

/// Result of this crate.
pub type Result<T, E = Error> = std::result::Result<T, E>;
