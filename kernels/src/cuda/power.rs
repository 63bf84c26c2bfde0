//! What a GPU draws, as NVML tells it: `libnvidia-ml.so.1`, which comes with the driver and is looked for when it is first asked for.
//! Where it is not, nothing is measured, and nothing else is different.
//!
//! A GPU is found by its place on the PCI bus: NVML counts GPUs in another order than CUDA may, and also those that a process is not
//! shown. GPUs since Volta count the energy that they took, which is exact however short a time is, but for how often they count; of
//! others there is what they draw at the moment. A part of a GPU (MIG) is told its whole GPU's.

use std::sync::OnceLock;

use cudarc::driver::{
    result,
    sys::CUdevice_attribute_enum::{
        CU_DEVICE_ATTRIBUTE_PCI_BUS_ID, CU_DEVICE_ATTRIBUTE_PCI_DEVICE_ID, CU_DEVICE_ATTRIBUTE_PCI_DOMAIN_ID,
    },
};
use nvml_wrapper::{Nvml, error::NvmlError};

use super::{Gpu, words};
use crate::device::PowerReading;

/// Reads what a GPU draws.
pub struct PowerMeter {
    device: nvml_wrapper::Device<'static>,
    gpu: String,
    counts_energy: bool,
}

/// The library, started once a process, or why it is not there.
fn nvml() -> Result<&'static Nvml, String> {
    static NVML: OnceLock<Result<Nvml, String>> = OnceLock::new();
    let start = || Nvml::init().map_err(said);
    NVML.get_or_init(start).as_ref().map_err(Clone::clone)
}

fn said(error: NvmlError) -> String {
    match error {
        NvmlError::LibloadingError(error) => error.to_string(),
        error => error.to_string(),
    }
}

/// Version of NVML.
///
/// # Errors
/// If it cannot be loaded or started, with its words.
pub fn nvml_version() -> Result<String, String> {
    nvml()?.sys_nvml_version().map_err(|e| e.to_string())
}

impl Gpu {
    /// What reads what this GPU draws.
    ///
    /// # Errors
    /// If there is no NVML, it does not know this GPU, or it can tell neither energy nor power; with its words.
    pub fn power_meter(&self) -> Result<PowerMeter, String> {
        let nvml = nvml()?;
        let device = result::device::get(self.info.ordinal as i32).map_err(words)?;
        let number = |attribute| {
            // SAFETY: the handle was just given by the driver.
            unsafe { result::device::get_attribute(device, attribute) }.map_err(words)
        };
        let (domain, bus, place) = (
            number(CU_DEVICE_ATTRIBUTE_PCI_DOMAIN_ID)?,
            number(CU_DEVICE_ATTRIBUTE_PCI_BUS_ID)?,
            number(CU_DEVICE_ATTRIBUTE_PCI_DEVICE_ID)?,
        );
        let id = format!("{domain:08x}:{bus:02x}:{place:02x}.0");
        let device = nvml.device_by_pci_bus_id(id.clone()).map_err(|e| format!("no GPU at {id}: {e}"))?;
        let gpu = device.uuid().map_err(|e| format!("no name of the GPU at {id}: {e}"))?;
        let counts_energy = device.total_energy_consumption().is_ok();
        if !counts_energy {
            device.power_usage().map_err(|e| format!("neither energy nor power of {gpu}: {e}"))?;
        }
        Ok(PowerMeter { device, gpu, counts_energy })
    }
}

impl PowerMeter {
    /// The GPU's UUID: no other has it, on whatever machine.
    pub fn gpu(&self) -> &str {
        &self.gpu
    }

    /// Whether the GPU counts energy; else readings are of the moment.
    pub fn counts_energy(&self) -> bool {
        self.counts_energy
    }

    /// A reading; always of one kind. `None` if NVML cannot give it now.
    pub fn read(&self) -> Option<PowerReading> {
        if self.counts_energy {
            return self.device.total_energy_consumption().ok().map(PowerReading::Millijoules);
        }
        self.device.power_usage().ok().map(PowerReading::Milliwatts)
    }
}
