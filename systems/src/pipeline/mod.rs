//! Pipelines: schedules as pure data, and their lowering to tasks.
//!
//! A schedule is built by [`ScheduleKind`] or read from text, [verified](verify), [simulated](simulate) and compared with the
//! [published formulas](formula), all without a device; [`stage`] turns its cells into tasks.

pub mod action;
pub mod dualpipe;
pub mod dualpipev;
pub mod formula;
pub mod gpipe;
pub mod interleaved;
mod kind;
pub mod one_f_one_b;
mod places;
pub mod simulate;
pub mod stage;
pub mod stages;
pub mod verify;
pub mod zbv;
pub mod zero_bubble;

#[cfg(test)]
mod golden;
#[cfg(test)]
mod properties;

pub use kind::{ParseKindError, ScheduleError, ScheduleKind, Unmet};
