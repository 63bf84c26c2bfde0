//! A plan as a step that the timeline can show: the spans of all positions as one snapshot, with the report's figures.

use std::sync::{Mutex, PoisonError};

use editor::workbench::{PlannedStep, WhatIf};
use engine::{
    hardware::DeviceSpec,
    telemetry::{Snapshot, join},
};
use systems::{
    hardware::{HardwareRequest, measure},
    on_gpu,
    placement::load::RoutingLoad,
    plan::{PlanReport, PlanRequest, Planned, plan as plan_scene},
    scene::{self, ScenePath},
};

use crate::{load::Checked, machine, units};

/// Plans a scene on the hardware that it names, or on this machine.
///
/// # Errors
/// Why there is no plan.
pub fn plan(checked: &Checked, what_if: &WhatIf, machine: &Mutex<Option<DeviceSpec>>) -> Result<PlannedStep, String> {
    let scene = &checked.loaded.scene;
    let mut config = checked.model.clone().ok_or("the scene has no model: add a section `model`")?;
    if scene.mtp.is_none() {
        config = config.without_mtp();
    }
    let section = scene.plan.clone();
    let mut notes = Vec::new();
    let mut device = match section.as_ref().and_then(|plan| plan.hardware.as_ref()) {
        Some(ScenePath(path)) => scene::hardware::load(path, &[]).map_err(|errors| errors.to_string())?,
        None => {
            notes.push("planned for this machine, as measured: the scene names no hardware".to_owned());
            this_machine(machine)?
        }
    };
    on_gpu::plan_for(scene, &mut device)?;
    if let Some(occupied) = what_if.num_comm_multiprocessors {
        if occupied >= device.num_sms.value {
            return Err(format!("{} has {} multiprocessors: none would be left", device.name, device.num_sms.value));
        }
        device.comm_sms.value = occupied;
    }
    let load = match (&what_if.loads, what_if.is_balanced) {
        (_, true) => RoutingLoad::Balanced,
        (Some(shares), false) => RoutingLoad::Shares(shares.clone()),
        (None, false) => section.map(|plan| plan.load).unwrap_or_default(),
    };
    let request = PlanRequest { loaded: &checked.loaded, config, device, load, with_spans: true };
    let planned = plan_scene(&request).map_err(|error| error.to_string())?;
    // This machine has no price: that needs no saying.
    let is_named = scene.plan.as_ref().is_some_and(|plan| plan.hardware.is_some());
    let is_of_use = |note: &&String| is_named || !(note.starts_with("no price") || note.starts_with("no energy"));
    notes.extend(planned.report.notes.iter().filter(is_of_use).cloned());
    if !scene.batch.ramp.is_empty() {
        let most = planned.report.num_microbatches_per_rank;
        notes.push(format!("planned at the largest batch of the ramp: {most} microbatches a rank"));
    }
    if !planned.report.fits {
        let most = planned.report.peak_bytes_per_rank.iter().map(|bytes| bytes.total).max().unwrap_or(0);
        let room = planned.report.device_memory_bytes;
        notes.push(format!("does not fit: {} of {} a device", units::bytes(most), units::bytes(room)));
    }
    Ok(PlannedStep { snapshot: snapshot(planned).into(), notes })
}

/// This machine as hardware. Measured once: it takes seconds, and all threads.
fn this_machine(known: &Mutex<Option<DeviceSpec>>) -> Result<DeviceSpec, String> {
    let mut known = known.lock().unwrap_or_else(PoisonError::into_inner);
    if let Some(device) = &*known {
        return Ok(device.clone());
    }
    let device = measure(&HardwareRequest {
        name: "this machine".into(),
        num_threads: None,
        num_machine_threads: machine::num_threads().unwrap_or(1),
        memory_bytes: machine::memory_bytes().map_or(0, |(total, _)| total),
        measured_by: "measured by the editor".into(),
    });
    Ok(known.insert(device.map_err(|error| error.to_string())?).clone())
}

fn snapshot(planned: Planned) -> Snapshot {
    let Planned { report, spans, bytes_by_task, .. } = planned;
    let all = join(spans.iter().map(Vec::as_slice));
    let end = all.iter().map(|span| span.end_nanos).max().unwrap_or(0);
    let mut histograms = Vec::new();
    for (bytes, by_task) in report.peak_bytes_per_rank.iter().zip(bytes_by_task) {
        let name = |class: &str| format!("bytes/rank{}/{class}", bytes.rank);
        histograms.push((name("activations"), by_task.iter().map(|b| b.activations as f64).collect()));
        if bytes.communication > 0 {
            histograms.push((name("communication"), by_task.iter().map(|b| b.communication as f64).collect()));
        }
    }
    Snapshot {
        interval_nanos: (0, end),
        spans: all.into(),
        scalars: scalars(&report),
        histograms,
        ..Snapshot::default()
    }
}

fn scalars(report: &PlanReport) -> Vec<(String, f64)> {
    let mut scalars: Vec<(String, f64)> = [
        ("step_secs", report.step_secs),
        ("tokens_per_sec", report.tokens_per_sec),
        ("mfu", report.mfu),
        ("idle_fraction", report.idle_fraction),
        ("device_memory_bytes", report.device_memory_bytes as f64),
        ("load_max_over_mean", report.load_max_over_mean),
    ]
    .map(|(name, value)| (name.to_owned(), value))
    .into();
    let maybe = [("run_secs", report.run_secs), ("cost_usd", report.cost_usd), ("energy_kwh", report.energy_kwh)];
    scalars.extend(maybe.into_iter().filter_map(|(name, value)| Some((name.to_owned(), value?))));
    for bytes in &report.peak_bytes_per_rank {
        for (class, value) in
            [("weights", bytes.weights), ("gradients", bytes.gradients), ("optimizer", bytes.optimizer)]
        {
            scalars.push((format!("bytes/rank{}/{class}", bytes.rank), value as f64));
        }
    }
    scalars
}
