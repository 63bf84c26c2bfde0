//! Bubbles as published: the table of DeepSeek's DualPipe repository and table 2 of the DeepSeek-V3 report (arXiv 2412.19437).
//!
//! They compare schedules at the same number of stages PP, so that DualPipeV has PP / 2 ranks. In them B is a full backward.
//! Where they hold was not published. Against [`simulate`](super::simulate), which the tests in `properties.rs` do:
//! - 1F1B: on every rank, at any costs.
//! - ZB1P: on every rank if W <= F and W <= I. Else it is too low; the bubble is (PP - 1) max(F, I).
//! - DualPipe, DualPipeV: on the worst rank if F = I, W <= F, and a pair takes no less than its longer half and no more than
//!   both. If I <= F it is too low by
//!   (PP/2 - 1)((F - I) + max(0, W - I)); if I > F and W <= F too high, by F at most.

use super::{ScheduleKind, simulate::CellCosts};

/// The published bubble of a rank, in the unit of the costs, or None where none was published. `ranks` as in
/// [`ScheduleKind::build`].
pub fn bubble(kind: ScheduleKind, ranks: u32, costs: &CellCosts) -> Option<f64> {
    let num_stages = ranks.checked_mul(kind.stages_per_rank())?;
    match kind {
        ScheduleKind::GPipe | ScheduleKind::OneFOneB => Some(one_f_one_b(num_stages, costs)),
        ScheduleKind::ZbH1 => Some(zb1p(num_stages, costs)),
        ScheduleKind::DualPipe | ScheduleKind::DualPipeV => Some(dualpipe(num_stages, costs)),
        _ => None,
    }
}

/// Whether the published bubble is that of the worst rank at these costs.
pub fn holds(kind: ScheduleKind, costs: &CellCosts) -> bool {
    let CellCosts { f, i, w, b, fb } = *costs;
    match kind {
        ScheduleKind::GPipe | ScheduleKind::OneFOneB => true,
        ScheduleKind::ZbH1 => w <= f.min(i),
        ScheduleKind::DualPipe | ScheduleKind::DualPipeV => f == i && w <= f && (f.max(b)..=f + b).contains(&fb),
        _ => false,
    }
}

/// (PP - 1)(F + B), of GPipe as well: the two differ in activations only.
pub fn one_f_one_b(num_stages: u32, costs: &CellCosts) -> f64 {
    (f64::from(num_stages) - 1.0) * (costs.f + costs.b)
}

/// (PP - 1)(F + B - 2W).
pub fn zb1p(num_stages: u32, costs: &CellCosts) -> f64 {
    (f64::from(num_stages) - 1.0) * (costs.f + costs.b - 2.0 * costs.w)
}

/// (PP / 2 - 1)(F&B + B - 3W), of DualPipe and of DualPipeV.
pub fn dualpipe(num_stages: u32, costs: &CellCosts) -> f64 {
    (f64::from(num_stages) / 2.0 - 1.0) * (costs.fb + costs.b - 3.0 * costs.w)
}
