//! What a run makes of its hardware, what that has cost so far, and when its budget is spent: beside the loss, step by step. What the
//! scene's hardware (`plan.hardware`) gives no price or no watts for is not on the bill. Energy that GPUs measure ([`crate::power`]) takes
//! the place of what is modelled from watts.

use bevy_app::prelude::*;
use bevy_ecs::prelude::*;
use engine::prelude::*;

use crate::{
    api::Spent,
    model_config::ModelConfig,
    plan::model,
    power::{EnergySource, Power, Total},
    problem::Problem,
    ranks::Ranks,
    scene::{Budget, Loaded, SceneErrors, hardware},
    session::format_of,
    train::Training,
};

const JOULES_PER_KWH: f64 = 3.6e6;

/// The hardware of a run, and how its time was used.
#[derive(Resource)]
struct Bill {
    device: Option<DeviceSpec>,
    num_ranks: f64,
    flops_per_token: f64,
    /// Operations per second of a device in the format of products.
    peak: Option<f64>,
    max_train_secs: Option<f64>,
    budget: Budget,
    /// Of this session, a mean over ranks.
    busy_secs: f64,
    idle_secs: f64,
    measured: Measured,
    /// Of all sessions, and what it was taken from.
    energy: Option<(f64, EnergySource)>,
}

/// Energy of the steps of this session that was measured, of all GPUs.
#[derive(Default)]
struct Measured {
    joules: f64,
    secs: f64,
    /// The least exact of the steps.
    source: Option<EnergySource>,
}

/// Keeps the bill of a scene that names its hardware, has a budget, or whose GPUs measure what they draw.
///
/// # Errors
/// If the description of the hardware is wrong, or does not give what the budget is in.
pub(crate) fn keep(app: &mut App, loaded: &Loaded, config: &ModelConfig) -> Result<(), Box<SceneErrors>> {
    let scene = &loaded.scene;
    let path = scene.plan.as_ref().and_then(|plan| plan.hardware.as_ref());
    let is_measured = app.world().contains_resource::<Power>();
    if path.is_none() && scene.budget.is_none() && !is_measured {
        return Ok(());
    }
    let device = path.map(|path| hardware::load(&path.0, &[])).transpose().map_err(Box::new)?;
    let budget = scene.budget.clone().unwrap_or_default();
    let seq_len = scene.data.as_ref().map_or(0, |data| data.seq_len);
    let format = format_of(scene.precision.compute);
    let bill = Bill {
        num_ranks: f64::from(app.world().resource::<Ranks>().everyone.num_ranks()),
        flops_per_token: model::flops_per_token(config, seq_len),
        peak: device.as_ref().and_then(|device| device.peak_flops_per_sec.high(format)),
        max_train_secs: scene.train.as_ref().and_then(|train| train.max_train_secs),
        busy_secs: 0.0,
        idle_secs: 0.0,
        measured: Measured::default(),
        energy: None,
        budget,
        device,
    };
    let mut problems = Vec::new();
    let mut needs = |path: &str, limit: Option<f64>, is_known: bool, what: &str| {
        if limit.is_some() && !is_known {
            problems.push(Problem::new(path, Budget::needs_hardware(what)));
        }
    };
    needs("budget.cost_usd", bill.budget.cost_usd, bill.usd(1.0).is_some(), "`price_per_hour`");
    needs("budget.energy_kwh", bill.budget.energy_kwh, is_measured || bill.kwh(1.0, 0.0).is_some(), "its watts");
    if !problems.is_empty() {
        return Err(Box::new(loaded.errors(&problems)));
    }
    app.insert_resource(bill);
    Ok(())
}

impl Bill {
    /// Dollars of so many seconds of the whole run.
    fn usd(&self, secs: f64) -> Option<f64> {
        Some(self.device.as_ref()?.price(secs).ok()? * self.num_ranks)
    }

    fn energy_source(&self) -> EnergySource {
        self.measured.source.unwrap_or(EnergySource::HardwareWatts)
    }

    /// Kilowatt-hours of so many seconds of the whole run: as they were measured on average, or else by the watts of devices that were
    /// idle for a share.
    fn kwh(&self, secs: f64, idle_share: f64) -> Option<f64> {
        if self.measured.secs > 0.0 {
            return Some(self.measured.joules / self.measured.secs * secs / JOULES_PER_KWH);
        }
        let device = self.device.as_ref()?;
        Some(device.energy_kwh(secs * (1.0 - idle_share), secs * idle_share).ok()? * self.num_ranks)
    }
}

/// Energy of the run so far in kWh, and what it was taken from, if it is known.
pub(crate) fn energy(world: &World) -> Option<(f64, EnergySource)> {
    world.get_resource::<Bill>()?.energy
}

/// That energy is modelled, where it is.
pub(crate) fn says(world: &World) -> Option<String> {
    let is_modelled = !world.contains_resource::<Power>() && world.get_resource::<Bill>()?.kwh(1.0, 0.0).is_some();
    is_modelled.then(|| format!("energy is {}", EnergySource::HardwareWatts.words()))
}

/// A step, as all ranks were told of it.
pub(crate) struct Charge {
    pub step_secs: f64,
    /// A mean over ranks.
    pub idle_share: f64,
    pub tokens_per_sec: f64,
    /// Energy, if it was measured on all ranks.
    pub measured: Option<Total>,
}

/// Puts a step on the bill, which is after this `train_secs`; how much of the budget is spent, of the part that is nearest its end.
/// Ranks that are told the same come to the same.
pub(crate) fn charge(world: &mut World, step: Charge) -> Option<Spent> {
    let Charge { step_secs, idle_share, tokens_per_sec, measured } = step;
    let train_secs = world.resource::<Training>().train_secs;
    let mut bill = world.get_resource_mut::<Bill>()?;
    bill.busy_secs += step_secs * (1.0 - idle_share);
    bill.idle_secs += step_secs * idle_share;
    if let Some(Total { joules, source }) = measured {
        bill.measured.joules += joules;
        bill.measured.secs += step_secs;
        bill.measured.source = bill.measured.source.max(Some(source));
    }
    // Sessions before this one are taken to have been as busy.
    let idle_share = bill.idle_secs / (bill.busy_secs + bill.idle_secs).max(1e-9);
    let (usd, kwh) = (bill.usd(train_secs), bill.kwh(train_secs, idle_share));
    bill.energy = kwh.map(|kwh| (kwh, bill.energy_source()));
    let limit = |limit: Option<f64>, of_time: Option<f64>| match (limit, of_time) {
        (Some(limit), Some(of_time)) => Some(limit.min(of_time)),
        (limit, of_time) => limit.or(of_time),
    };
    let max_usd = limit(bill.budget.cost_usd, bill.max_train_secs.and_then(|secs| bill.usd(secs)));
    let max_kwh = limit(bill.budget.energy_kwh, bill.max_train_secs.and_then(|secs| bill.kwh(secs, idle_share)));
    let mfu = bill.peak.map(|peak| bill.flops_per_token * tokens_per_sec / (bill.num_ranks * peak));
    let hours = train_secs / 3600.0;
    let parts =
        [("$", usd, bill.budget.cost_usd), ("kWh", kwh, bill.budget.energy_kwh), ("h", Some(hours), bill.budget.hours)];
    let spent = parts.into_iter().filter_map(|(unit, spent, limit)| Some(Spent { unit, spent: spent?, limit: limit? }));
    let spent = spent.max_by(|a, b| a.share().total_cmp(&b.share()));
    let mut telemetry = world.resource_mut::<Telemetry>();
    for (name, value) in [
        ("mfu", mfu),
        ("cost_usd", usd),
        ("energy_kwh", kwh),
        ("budget_usd", max_usd),
        ("budget_kwh", max_kwh),
        ("budget_share", spent.as_ref().map(Spent::share)),
    ] {
        value.into_iter().for_each(|value| telemetry.scalar(name, value));
    }
    spent
}
