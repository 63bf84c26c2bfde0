//! Asynchronous hardware: barriers in memory, copies, tensor cores. All of it is as late as the seed and the rules allow.

pub(crate) mod bulk;
pub(crate) mod cp_async;
pub(crate) mod mbarrier;
pub(crate) mod ops;
pub(crate) mod tensor_map;
pub(crate) mod wgmma;
