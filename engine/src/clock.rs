//! Which time a run is in: the wall's, or a computed one under a device's specification.
//!
//! The graph is the same under both, so a schedule can be judged for hardware that is not here.

use bevy_ecs::prelude::*;

use crate::hardware::{DeviceSpec, Format};

/// The clock of a run.
#[derive(Resource, Clone, Debug, Default, PartialEq)]
pub enum Clock {
    /// Tasks are launched; spans are what was measured.
    #[default]
    Wall,
    /// Nothing is launched; spans are computed from costs.
    Virtual {
        /// What the tasks would run on.
        device: Box<DeviceSpec>,
        /// What products would be computed in.
        format: Format,
    },
}
