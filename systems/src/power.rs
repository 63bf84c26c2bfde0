//! What the GPUs of a run draw, as they measure it (NVML), step by step: in the telemetry, and on the bill in place of what hardware is
//! described to draw. Without NVML, or on processors, there is none of it.
//!
//! A rank reads its GPU's meter when a step begins and when all of it is done. Ranks that share a GPU read the same one, so that a
//! sum over ranks has each GPU once, as the first of its ranks saw it.

use bevy_app::prelude::*;
use bevy_ecs::prelude::*;
use engine::{prelude::*, telemetry::Telemetry};
use kernels::{cuda::PowerMeter, device::PowerReading};
use serde::{Deserialize, Serialize};

/// What energy was taken from, the most exact first.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum EnergySource {
    /// The GPUs' counters of energy.
    NvmlEnergyCounter,
    /// What GPUs drew at the end of each step, times its length.
    NvmlPower,
    /// The watts of the hardware's description, and how long devices were busy.
    HardwareWatts,
}

impl EnergySource {
    /// In words.
    pub fn words(self) -> &'static str {
        match self {
            EnergySource::NvmlEnergyCounter => "measured: the energy counters of NVML",
            EnergySource::NvmlPower => "measured: what NVML says is drawn at the end of each step",
            EnergySource::HardwareWatts => "modelled: the watts of `plan.hardware`",
        }
    }
}

/// The meter of this rank's GPU.
#[derive(Resource)]
pub(crate) struct Power {
    meter: PowerMeter,
    begin: Option<PowerReading>,
}

/// What a rank's GPU took in a step.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub(crate) struct Drawn {
    gpu: String,
    joules: f64,
    watts: f64,
    is_counted: bool,
}

/// What all GPUs of a run took in a step.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct Total {
    pub joules: f64,
    pub source: EnergySource,
}

/// Looks for the meter of this rank's GPU; says that there is one.
pub(crate) fn watch(app: &mut App) -> Option<String> {
    let meter = app.world().resource::<Tensors>().memory().gpu()?.power_meter().ok()?;
    let said = format!("power of {} is {}", meter.gpu(), source(meter.counts_energy()).words());
    app.insert_resource(Power { meter, begin: None });
    Some(said)
}

fn source(is_counted: bool) -> EnergySource {
    if is_counted { EnergySource::NvmlEnergyCounter } else { EnergySource::NvmlPower }
}

impl Power {
    /// A step begins.
    pub fn begin(&mut self) {
        self.begin = self.meter.read();
    }

    /// What was taken since then, in a step that is done.
    pub fn drawn(&self, step_secs: f64) -> Option<Drawn> {
        let (joules, watts) = taken(self.begin?, self.meter.read()?, step_secs)?;
        let (gpu, is_counted) = (self.meter.gpu().to_owned(), self.meter.counts_energy());
        Some(Drawn { gpu, joules, watts, is_counted })
    }
}

/// Joules and watts of `secs` between two readings of one meter; `None` if it began anew.
fn taken(begin: PowerReading, end: PowerReading, secs: f64) -> Option<(f64, f64)> {
    match (begin, end) {
        (PowerReading::Millijoules(begin), PowerReading::Millijoules(end)) => {
            let joules = end.checked_sub(begin)? as f64 * 1e-3;
            Some((joules, joules / secs.max(1e-9)))
        }
        (_, PowerReading::Milliwatts(now)) => Some((f64::from(now) * 1e-3 * secs, f64::from(now) * 1e-3)),
        _ => None,
    }
}

/// Tells of each rank's GPU, and of all together; what those took, if all ranks know.
pub(crate) fn tell(telemetry: &mut Telemetry, all: &[Option<&Drawn>]) -> Option<Total> {
    if all.len() > 1 {
        for (rank, drawn) in all.iter().enumerate() {
            drawn.iter().for_each(|drawn| telemetry.scalar(format!("power_watts/rank{rank}"), drawn.watts));
        }
    }
    let mut gpus: Vec<&Drawn> = Vec::new();
    for drawn in all {
        let drawn = (*drawn)?;
        if gpus.iter().all(|known| known.gpu != drawn.gpu) {
            gpus.push(drawn);
        }
    }
    telemetry.scalar("power_watts", gpus.iter().map(|drawn| drawn.watts).sum());
    let source = source(gpus.iter().all(|drawn| drawn.is_counted));
    Some(Total { joules: gpus.iter().map(|drawn| drawn.joules).sum(), source })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counters_are_differences_and_power_is_of_the_moment() {
        use PowerReading::{Millijoules, Milliwatts};
        assert_eq!(taken(Millijoules(5_000), Millijoules(8_000), 0.5), Some((3.0, 6.0)));
        assert_eq!(taken(Milliwatts(9), Milliwatts(250_000), 2.0), Some((500.0, 250.0)));
        assert_eq!(taken(Millijoules(5_000), Millijoules(8), 0.5), None, "the driver was loaded anew");
    }

    #[test]
    fn a_gpu_that_ranks_share_is_counted_once() {
        let drawn =
            |gpu: &str, joules: f64, is_counted| Drawn { gpu: gpu.into(), joules, watts: 2.0 * joules, is_counted };
        let (a, b, c) = (drawn("a", 10.0, true), drawn("b", 20.0, true), drawn("a", 11.0, true));
        let all = |all: &[Option<&Drawn>]| {
            let mut telemetry = Telemetry::default();
            tell(&mut telemetry, all)
        };
        let counted = EnergySource::NvmlEnergyCounter;
        assert_eq!(all(&[Some(&a), Some(&b), Some(&c)]), Some(Total { joules: 30.0, source: counted }));
        let power = drawn("c", 1.0, false);
        assert_eq!(all(&[Some(&a), Some(&power)]), Some(Total { joules: 11.0, source: EnergySource::NvmlPower }));
        assert_eq!(all(&[Some(&a), None]), None);
        assert_eq!(all(&[None]), None);
    }
}
