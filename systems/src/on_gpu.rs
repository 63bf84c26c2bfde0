//! What a scene says of a GPU besides its number: the multiprocessors that communication has for itself, and the tiles of products.
//!
//! The rule for `comm_sms`, here and nowhere else: communication runs beside computation on a device where a run has more than one rank,
//! all of which share it; then it has [`default_comm_sms`] of the multiprocessors, 20 of 132, and computation the rest. With one rank
//! there is nothing to send, and computation has all. A scene's figure is taken in either case, and replaces `comm_sms` of the hardware
//! that it is planned for.

use std::{
    fs,
    path::{Path, PathBuf},
    sync::Arc,
};

use engine::hardware::DeviceSpec;
use kernels::{
    device::{Share, default_comm_sms},
    memory::Memory,
    ptx::tuning::Table,
};

use crate::{
    scene::{Scene, ScenePath},
    session::SessionError,
};

/// What a scene says.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct OnGpu {
    /// Multiprocessors for communication.
    pub comm_sms: Option<u32>,
    /// File with a tuning table.
    pub tuning: Option<PathBuf>,
}

/// What streams get; all of it on processors.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Shares {
    /// The compute stream's.
    pub compute: Share,
    /// The communication stream's.
    pub comm: Share,
    /// Tiles of products.
    pub tuning: Option<Arc<Table>>,
}

/// Multiprocessors for communication, of `num_sms`, where a run has so many ranks; or what is wrong with the `given` number.
fn comm_sms(given: Option<u32>, num_sms: u32, num_ranks: u32) -> Result<u32, String> {
    match given {
        None if num_ranks > 1 => Ok(default_comm_sms(num_sms)),
        None => Ok(0),
        Some(sms) if sms < num_sms => Ok(sms),
        Some(sms) => Err(format!(
            "`comm_sms` should leave multiprocessors for computation: expected less than the device's {num_sms}, found {sms}; set \
             it to {}, or leave it out",
            default_comm_sms(num_sms)
        )),
    }
}

impl OnGpu {
    /// Of a scene.
    pub fn of(scene: &Scene) -> Self {
        OnGpu { comm_sms: scene.comm_sms, tuning: scene.tuning.as_ref().map(|ScenePath(path)| path.clone()) }
    }

    /// What the streams of one of `num_ranks` ranks over `memory` get.
    ///
    /// # Errors
    /// If the device has no more multiprocessors than communication is to have, or the table cannot be read; that it is another device's,
    /// a stream says.
    pub fn shares(&self, memory: &Memory, num_ranks: u32) -> Result<Shares, SessionError> {
        let Some(gpu) = memory.gpu() else { return Ok(Shares::default()) };
        let num_sms = gpu.target().num_sms;
        let sms = comm_sms(self.comm_sms, num_sms, num_ranks).map_err(SessionError::input)?;
        let (compute, comm) = Share::split(sms);
        let tuning = self.tuning.as_ref().map(|path| read_table(path)).transpose().map_err(SessionError::input)?;
        Ok(Shares { compute, comm, tuning })
    }
}

/// Reads a table of measured tiles.
///
/// # Errors
/// If the file is none, with its name.
pub fn read_table(path: &Path) -> Result<Arc<Table>, String> {
    let text = fs::read_to_string(path).map_err(|e| e.to_string());
    let table = text.and_then(|text| Table::from_ron(&text).map_err(|e| e.to_string()));
    table.map(Arc::new).map_err(|e| format!("{}: {e}", path.display()))
}

/// Puts a scene's figure in place of the device's that it is planned for.
///
/// # Errors
/// If none would be left for computation.
pub fn plan_for(scene: &Scene, device: &mut DeviceSpec) -> Result<(), String> {
    if let Some(sms) = scene.comm_sms {
        device.comm_sms.value = comm_sms(Some(sms), device.num_sms.value, 1)?;
        device.comm_sms.source = "the scene's `comm_sms`".into();
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn communication_has_multiprocessors_where_it_runs_beside_computation() {
        assert_eq!(comm_sms(None, 132, 1), Ok(0));
        assert_eq!(comm_sms(None, 132, 4), Ok(20));
        assert_eq!(comm_sms(Some(24), 132, 4), Ok(24));
        assert_eq!(comm_sms(Some(24), 132, 1), Ok(24));
        assert_eq!(comm_sms(Some(0), 132, 4), Ok(0));
    }

    #[test]
    #[expect(clippy::unwrap_used, reason = "tests")]
    fn a_plan_takes_the_scenes_figure_before_the_hardwares() {
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../scenes/hardware/h800.ron");
        let planned = |text: &str| {
            let mut device = crate::scene::hardware::load(&path, &[]).unwrap();
            let scene = Scene::parse(text, &[]).unwrap().scene;
            plan_for(&scene, &mut device).map(|()| device.comm_sms.value)
        };
        assert_eq!(planned("()"), Ok(20));
        assert_eq!(planned("(comm_sms: 24)"), Ok(24));
        assert!(planned("(comm_sms: 132)").is_err());
    }

    #[test]
    fn what_leaves_none_for_computation_is_refused() {
        let refused = comm_sms(Some(132), 132, 4).err();
        let expected = "`comm_sms` should leave multiprocessors for computation: expected less than the device's 132, found 132; set \
                        it to 20, or leave it out";
        assert_eq!(refused.as_deref(), Some(expected));
    }
}
