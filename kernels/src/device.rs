//! Devices a run can be placed on.

/// Where tensors live and ops run.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Device {
    /// This machine's processors.
    Cpu,
    /// Shapes and byte counts only: ops check their contracts and do nothing.
    Meta,
}
