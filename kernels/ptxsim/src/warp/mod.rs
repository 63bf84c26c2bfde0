//! What lanes of a warp and warps of a CTA do together.

pub(crate) mod barrier;
mod collective;
mod matrix;
pub(crate) mod ops;
