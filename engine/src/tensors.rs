//! Tensors of a run by name and category, so that memory can be accounted for in the words of the model.

use std::{collections::BTreeMap, sync::Arc};

use bevy_ecs::prelude::*;
use kernels::{dtype::DType, memory::Memory, stream::Hazards, tensor::Tensor};

/// The device memory of this world, and who holds how much of it.
#[derive(Resource)]
pub struct Tensors {
    memory: Memory,
    hazards: Arc<Hazards>,
    named: BTreeMap<String, Tensor>,
    usage: BTreeMap<String, Usage>,
    live_bytes: u64,
    at_peak: BTreeMap<String, u64>,
    peak_bytes: u64,
}

/// Bytes of one category.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Usage {
    /// Allocated and not released now.
    pub live_bytes: u64,
    /// Most that was live at once.
    pub peak_bytes: u64,
}

impl Tensors {
    /// No tensors in `memory`.
    pub fn new(memory: Memory) -> Self {
        Tensors {
            memory,
            hazards: Arc::default(),
            named: BTreeMap::new(),
            usage: BTreeMap::new(),
            live_bytes: 0,
            at_peak: BTreeMap::new(),
            peak_bytes: 0,
        }
    }

    /// The memory.
    pub fn memory(&self) -> &Memory {
        &self.memory
    }

    /// Shared by the streams over this memory.
    pub fn hazards(&self) -> &Arc<Hazards> {
        &self.hazards
    }

    /// A tensor of `dims`, counted under `category` (`weights`, `gradients`, ...). Its contents are unspecified.
    pub fn alloc(&mut self, category: &str, dtype: DType, dims: &[usize]) -> Tensor {
        let tensor = self.memory.alloc(dtype, dims);
        let bytes = tensor.size_bytes();
        let usage = match self.usage.get_mut(category) {
            Some(usage) => usage,
            None => self.usage.entry(category.to_owned()).or_default(),
        };
        usage.live_bytes += bytes;
        usage.peak_bytes = usage.peak_bytes.max(usage.live_bytes);
        self.live_bytes += bytes;
        if self.live_bytes > self.peak_bytes {
            self.peak_bytes = self.live_bytes;
            self.at_peak.clear();
        }
        tensor
    }

    /// The same, and findable by `name`.
    ///
    /// # Panics
    /// If the name is taken: two layers would share a tensor without knowing.
    pub fn alloc_named(&mut self, name: &str, category: &str, dtype: DType, dims: &[usize]) -> Tensor {
        assert!(!self.named.contains_key(name), "there is a tensor `{name}` already");
        let tensor = self.alloc(category, dtype, dims);
        self.named.insert(name.to_owned(), tensor);
        tensor
    }

    /// The tensor called `name`.
    pub fn get(&self, name: &str) -> Option<Tensor> {
        self.named.get(name).copied()
    }

    /// All named tensors, by name.
    pub fn named(&self) -> impl Iterator<Item = (&str, Tensor)> {
        self.named.iter().map(|(name, tensor)| (name.as_str(), *tensor))
    }

    /// Gives a tensor of [`Tensors::alloc`] back; nothing launched later may use it.
    ///
    /// # Panics
    /// If `category` does not hold that much: it is not the one the tensor was counted under.
    pub fn release(&mut self, category: &str, tensor: Tensor) {
        let bytes = tensor.size_bytes();
        self.note_peak();
        let usage = self.usage.get_mut(category).filter(|usage| usage.live_bytes >= bytes);
        let usage = usage.unwrap_or_else(|| panic!("{tensor:?} is released from `{category}`, which does not hold it"));
        usage.live_bytes -= bytes;
        self.live_bytes -= bytes;
        self.memory.release(tensor);
    }

    /// Live bytes and own peak of each category.
    pub fn usage(&self) -> &BTreeMap<String, Usage> {
        &self.usage
    }

    /// Bytes of each category at the moment when the sum was at its peak: they add up to the peak.
    pub fn peak_by_category(&mut self) -> &BTreeMap<String, u64> {
        self.note_peak();
        &self.at_peak
    }

    /// Most bytes that were live at once.
    pub fn peak_bytes(&self) -> u64 {
        self.peak_bytes
    }

    /// Live bytes fall only through `release`, so a peak's make-up is taken at the first release after it (or when asked).
    fn note_peak(&mut self) {
        if self.live_bytes == self.peak_bytes && self.at_peak.is_empty() {
            self.at_peak = self.usage.iter().map(|(name, usage)| (name.clone(), usage.live_bytes)).collect();
        }
    }
}

#[cfg(test)]
mod tests {
    use kernels::device::Device;

    use super::*;

    #[test]
    fn the_peak_is_told_by_category() {
        let mut tensors = Tensors::new(Memory::new(Device::Meta));
        tensors.alloc_named("w", "weights", DType::F32, &[100]);
        let a = tensors.alloc("activations", DType::Bf16, &[300]);
        let b = tensors.alloc("activations", DType::Bf16, &[50]);
        tensors.release("activations", a);
        tensors.release("activations", b);
        tensors.alloc("gradients", DType::F32, &[100]);
        let peak: Vec<_> = tensors.peak_by_category().clone().into_iter().collect();
        assert_eq!(peak, [("activations".to_owned(), 700), ("weights".to_owned(), 400)]);
        assert_eq!((tensors.peak_bytes(), tensors.memory().peak_bytes()), (1100, 1100));
        assert_eq!(tensors.usage()["gradients"], Usage { live_bytes: 400, peak_bytes: 400 });
        assert_eq!(tensors.get("w").map(|t| t.len()), Some(100));
        assert!(tensors.get("v").is_none());
    }

    #[test]
    #[should_panic(expected = "there is a tensor `w` already")]
    fn a_name_is_given_once() {
        let mut tensors = Tensors::new(Memory::new(Device::Meta));
        tensors.alloc_named("w", "weights", DType::F32, &[1]);
        tensors.alloc_named("w", "weights", DType::F32, &[1]);
    }
}
