//! Which time a run is in: the wall's, or a computed one under a device's specification.
//!
//! The graph is the same under both, so a schedule can be judged for hardware that is not here.

use bevy_ecs::prelude::*;
use kernels::cost::Cost;
use serde::{Deserialize, Serialize};

/// The clock of a run.
#[derive(Resource, Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub enum Clock {
    /// Tasks are launched; spans are what was measured.
    #[default]
    Wall,
    /// Nothing is launched; spans are computed from costs.
    Virtual(DeviceSpec),
}

/// What a device can do, as far as costs need it.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DeviceSpec {
    /// Floating-point operations per second that large products reach.
    pub peak_flops_per_sec: f64,
    /// Bytes per second to and from device memory.
    pub memory_bytes_per_sec: f64,
    /// Bytes per second to another rank.
    pub wire_bytes_per_sec: f64,
    /// Seconds that a task takes before it does anything.
    pub launch_overhead_secs: f64,
}

impl DeviceSpec {
    /// Seconds a task of `cost` takes alone: the slowest of computing, memory and wire, which overlap, plus the launch.
    pub fn task_secs(&self, cost: &Cost) -> f64 {
        let rate = |amount: u64, per_sec: f64| if amount == 0 { 0.0 } else { amount as f64 / per_sec };
        let compute_secs = rate(cost.flops, self.peak_flops_per_sec);
        let memory_secs = rate(cost.read_bytes + cost.written_bytes, self.memory_bytes_per_sec);
        let wire_secs = rate(cost.intra_node_bytes + cost.inter_node_bytes, self.wire_bytes_per_sec);
        self.launch_overhead_secs + compute_secs.max(memory_secs).max(wire_secs)
    }

    /// The same in whole nanoseconds, rounded to nearest.
    pub fn task_nanos(&self, cost: &Cost) -> u64 {
        (self.task_secs(cost) * 1e9).round() as u64
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_task_takes_its_slowest_resource_plus_the_launch() {
        let spec = DeviceSpec {
            peak_flops_per_sec: 1e12,
            memory_bytes_per_sec: 1e11,
            wire_bytes_per_sec: 1e10,
            launch_overhead_secs: 2e-6,
        };
        let cost = |flops, read_bytes, written_bytes, wire_bytes: u64| {
            Cost::stream(flops, read_bytes, written_bytes) + Cost::wire(wire_bytes / 3, wire_bytes - wire_bytes / 3)
        };
        for (name, cost, nanos) in [
            ("nothing", cost(0, 0, 0, 0), 2_000),
            ("compute bound", cost(5_000_000, 1, 1, 1), 7_000),
            ("memory bound", cost(1, 300_000, 100_000, 0), 6_000),
            ("wire bound", cost(1, 1, 0, 90_000), 11_000),
        ] {
            assert_eq!(spec.task_nanos(&cost), nanos, "{name}");
        }
    }
}
