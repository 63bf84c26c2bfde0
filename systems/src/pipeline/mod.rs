//! Pipelines: schedules as pure data, and their lowering to tasks.

pub mod action;
pub mod one_f_one_b;
pub mod stage;
