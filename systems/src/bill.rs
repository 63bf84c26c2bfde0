//! What a run makes of its hardware, and what that has cost so far: beside the loss, step by step. Where the scene names no
//! hardware (`plan.hardware`), or the hardware no price and no watts, there is no bill.

use bevy_app::prelude::*;
use bevy_ecs::prelude::*;
use engine::prelude::*;

use crate::{
    model_config::ModelConfig,
    plan::model,
    ranks::Ranks,
    scene::{Scene, SceneErrors, hardware},
    session::format_of,
    train::{self, Training},
    work::{Work, turn_of},
};

/// The hardware of a run, and how its time was used.
#[derive(Resource)]
struct Bill {
    device: DeviceSpec,
    num_ranks: f64,
    flops_per_token: f64,
    /// Operations per second of a device in the format of products.
    peak: Option<f64>,
    max_train_secs: Option<f64>,
    /// Of this session.
    busy_secs: f64,
    idle_secs: f64,
}

/// Keeps the bill of `scene`, if it names its hardware.
///
/// # Errors
/// If the description of the hardware is wrong.
pub(crate) fn keep(app: &mut App, scene: &Scene, config: &ModelConfig) -> Result<(), Box<SceneErrors>> {
    let Some(path) = scene.plan.as_ref().and_then(|plan| plan.hardware.as_ref()) else { return Ok(()) };
    let device = hardware::load(&path.0, &[]).map_err(Box::new)?;
    let seq_len = scene.data.as_ref().map_or(0, |data| data.seq_len);
    let format = format_of(scene.precision.compute);
    app.insert_resource(Bill {
        num_ranks: f64::from(app.world().resource::<Ranks>().layout.mesh.num_ranks()),
        flops_per_token: model::flops_per_token(config, seq_len),
        peak: device.peak_flops_per_sec.high(format),
        max_train_secs: scene.train.as_ref().and_then(|train| train.max_train_secs),
        busy_secs: 0.0,
        idle_secs: 0.0,
        device,
    })
    .add_systems(Step, tell.in_set(StepSystems::Record).after(train::record).run_if(turn_of(Work::Train)));
    Ok(())
}

fn tell(mut bill: ResMut<Bill>, training: Res<Training>, mut telemetry: ResMut<Telemetry>) {
    let Some(last) = &training.last else { return };
    let idle = telemetry.bubbles().idle_fraction().unwrap_or(0.0);
    bill.busy_secs += last.step_secs * (1.0 - idle);
    bill.idle_secs += last.step_secs * idle;
    if let Some(peak) = bill.peak {
        telemetry.scalar("mfu", bill.flops_per_token * last.tokens_per_sec / (bill.num_ranks * peak));
    }
    // Sessions before this one are taken to have been as busy.
    let idle_share = bill.idle_secs / (bill.busy_secs + bill.idle_secs).max(1e-9);
    let usd = |secs: f64| bill.device.price(secs).ok().map(|usd| usd * bill.num_ranks);
    let kwh = |secs: f64| {
        let kwh = bill.device.energy_kwh(secs * (1.0 - idle_share), secs * idle_share).ok();
        kwh.map(|kwh| kwh * bill.num_ranks)
    };
    let mut put = |name: &str, value: Option<f64>| value.into_iter().for_each(|value| telemetry.scalar(name, value));
    put("cost_usd", usd(training.train_secs));
    put("energy_kwh", kwh(training.train_secs));
    put("budget_usd", bill.max_train_secs.and_then(usd));
    put("budget_kwh", bill.max_train_secs.and_then(kwh));
}
