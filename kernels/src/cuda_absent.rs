//! The place of [`crate::cuda`] in builds without the feature `cuda`: no GPU can be opened, and all that needs one cannot be reached.

use std::{collections::BTreeMap, sync::Arc};

use crate::{
    device::{Device, PowerReading, Share, Target},
    error::{Error, Result},
    memory::Memory,
    ptx::{Item, Launch},
};

pub use crate::device::GpuInfo;

/// A GPU in use: there is none.
pub enum Gpu {}

/// A stream of a GPU: there is none.
pub enum Lane {}

/// A moment in a lane: there is none.
pub enum Mark {}

/// What reads what a GPU draws: there is none.
pub enum PowerMeter {}

/// Recorded launches: there are none.
pub enum Graph {}

fn absent(ordinal: u32) -> Error {
    Error::Device {
        device: Device::Cuda(ordinal).to_string(),
        expected: "a build with the feature `cuda`".into(),
        found: "one without it".into(),
        advice: "build with default features, or use the device `cpu`".into(),
    }
}

/// Version of NVML.
///
/// # Errors
/// Always: the build has no support for it.
pub fn nvml_version() -> Result<String, String> {
    Err("a build without the feature `cuda`".into())
}

/// The GPUs of this machine.
///
/// # Errors
/// Always: the build has no support for them.
pub fn devices() -> Result<Vec<GpuInfo>> {
    Err(absent(0))
}

/// The GPU of that number.
///
/// # Errors
/// Always: the build has no support for it.
pub fn open(ordinal: u32) -> Result<Arc<Gpu>> {
    Err(absent(ordinal))
}

#[expect(missing_docs, reason = "none of it can be called")]
impl Gpu {
    pub fn info(&self) -> &GpuInfo {
        match *self {}
    }
    pub fn target(&self) -> Target {
        match *self {}
    }
    pub fn host_ops(&self) -> BTreeMap<&'static str, u64> {
        match *self {}
    }
    pub fn loaded_kernels(&self) -> Vec<String> {
        match *self {}
    }
    pub fn memory_bytes(&self) -> Result<(u64, u64)> {
        match *self {}
    }
    pub fn power_meter(&self) -> Result<PowerMeter, String> {
        match *self {}
    }
    pub(crate) fn count_host_op(&self, _op: &'static str) {
        match *self {}
    }
    pub(crate) fn alloc(&self, _bytes: u64) -> Result<u64> {
        match *self {}
    }
    pub(crate) fn free(&self, _address: u64) {
        match *self {}
    }
    pub(crate) fn upload(&self, _address: u64, _bytes: &[u8]) -> Result<()> {
        match *self {}
    }
    pub(crate) fn download(&self, _address: u64, _bytes: &mut [u8]) -> Result<()> {
        match *self {}
    }
}

#[expect(missing_docs, reason = "none of it can be called")]
impl PowerMeter {
    pub fn gpu(&self) -> &str {
        match *self {}
    }
    pub fn counts_energy(&self) -> bool {
        match *self {}
    }
    pub fn read(&self) -> Option<PowerReading> {
        match *self {}
    }
}

impl Lane {
    pub(crate) fn new(gpu: &Arc<Gpu>, _name: &str, _share: Share) -> Result<Self> {
        match **gpu {}
    }
    pub(crate) fn has_fault(&self) -> bool {
        match *self {}
    }
    pub(crate) fn synchronize(&self) -> Result<()> {
        match *self {}
    }
    pub(crate) fn launch(&mut self, _memory: &Memory, _task: &Arc<str>, _launches: &[Launch]) -> Result<()> {
        match *self {}
    }
    pub(crate) fn record(&self) -> Result<Mark> {
        match *self {}
    }
    pub(crate) fn capture(&mut self, _memory: &Memory, _items: &[Item<'_>]) -> Result<Graph> {
        match *self {}
    }
    pub(crate) fn replay(&self, _graph: &Graph) -> Result<Vec<Arc<Mark>>> {
        match *self {}
    }
    pub(crate) fn wait(&self, _mark: &Mark) -> Result<()> {
        match *self {}
    }
}

impl Graph {
    pub(crate) fn is_of(&self, _lane: &Lane) -> bool {
        match *self {}
    }
    pub(crate) fn is_watched(&self) -> bool {
        match *self {}
    }
}

impl Mark {
    pub(crate) fn synchronize(&self) -> Result<u64> {
        match *self {}
    }
    pub(crate) fn is_reached(&self) -> bool {
        match *self {}
    }
}
