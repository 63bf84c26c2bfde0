//! Hardware as data: what a device, its links and its owner's bill are, each figure with its source, and how long a task
//! takes there.
//!
//! The model is a roofline. It knows no kernel by name: what a kernel reaches is a share of the peak, which somebody
//! measured and the file says who. Where spans of a real run are at hand, [`crate::calibrate`] corrects it.

use std::fmt;

use kernels::cost::Cost;
use serde::{Deserialize, Serialize};

use crate::{
    calibrate::Corrections,
    error::{Error, Result},
};

const JOULES_PER_KWH: f64 = 3.6e6;

/// A figure and where it is from.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Sourced<T> {
    /// The figure, in the unit that the field's name ends in.
    pub value: T,
    /// Datasheet, paper or measurement; never empty in a file.
    pub source: String,
}

impl<T> Sourced<T> {
    /// `value`, as `source` has it.
    pub fn new(value: T, source: impl Into<String>) -> Self {
        Sourced { value, source: source.into() }
    }
}

/// A number format that products are computed in.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub enum Format {
    /// 8-bit floats with a scale per block, converted from bf16 before each product.
    Fp8,
    /// bfloat16.
    Bf16,
    /// 32-bit floats.
    F32,
    /// 64-bit floats.
    F64,
}

impl Format {
    /// The format of what is kept in high precision beside products in this one.
    pub const fn high(self) -> Format {
        match self {
            Format::Fp8 => Format::Bf16,
            other => other,
        }
    }

    /// The format of vector units: at least 32 bits.
    pub const fn vector(self) -> Format {
        match self {
            Format::F64 => Format::F64,
            _ => Format::F32,
        }
    }

    /// As in files.
    pub const fn name(self) -> &'static str {
        match self {
            Format::Fp8 => "fp8",
            Format::Bf16 => "bf16",
            Format::F32 => "f32",
            Format::F64 => "f64",
        }
    }
}

/// A figure for each format that the device has.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PerFormat {
    /// For [`Format::Fp8`].
    #[serde(skip_serializing_if = "Option::is_none")]
    pub fp8: Option<Sourced<f64>>,
    /// For [`Format::Bf16`].
    #[serde(skip_serializing_if = "Option::is_none")]
    pub bf16: Option<Sourced<f64>>,
    /// For [`Format::F32`].
    #[serde(skip_serializing_if = "Option::is_none")]
    pub f32: Option<Sourced<f64>>,
    /// For [`Format::F64`].
    #[serde(skip_serializing_if = "Option::is_none")]
    pub f64: Option<Sourced<f64>>,
}

impl PerFormat {
    /// The figure for `format`.
    pub fn get(&self, format: Format) -> Option<f64> {
        let figure = match format {
            Format::Fp8 => &self.fp8,
            Format::Bf16 => &self.bf16,
            Format::F32 => &self.f32,
            Format::F64 => &self.f64,
        };
        figure.as_ref().map(|figure| figure.value)
    }

    /// The figure for what is kept in high precision beside products in `format`, or else for `format` itself: what the use
    /// of a device is measured against.
    pub fn high(&self, format: Format) -> Option<f64> {
        self.get(format.high()).or(self.get(format))
    }

    fn figures_mut(&mut self) -> impl Iterator<Item = &mut Sourced<f64>> {
        [&mut self.fp8, &mut self.bf16, &mut self.f32, &mut self.f64].into_iter().flatten()
    }
}

/// What connects a rank to others.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Link {
    /// Bytes per second and direction that communication reaches, not what the cable could.
    pub bytes_per_sec: Sourced<f64>,
    /// Seconds until the first byte arrives.
    pub latency_secs: Sourced<f64>,
}

/// What a device can do, what surrounds it, and what it costs.
///
/// Figures that only some plans need may be left out; needing one that is not there is an error that names it.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DeviceSpec {
    /// What it is called.
    pub name: String,
    /// File it was read from; errors name it.
    #[serde(skip)]
    pub file: String,
    /// Multiprocessors; cores of a CPU.
    pub num_sms: Sourced<u32>,
    /// Multiprocessors that communication occupies while it runs beside computation.
    pub comm_sms: Sourced<u32>,
    /// Peak floating-point operations per second, dense: products' for fp8 and bf16, vector units' for f32 and f64.
    pub peak_flops_per_sec: PerFormat,
    /// Share of the peak that large products reach.
    pub product_efficiency: PerFormat,
    /// Share of the high-precision peak that the fused kernel behind [`Cost::core_flops`] reaches.
    pub core_efficiency: Sourced<f64>,
    /// The same for [`Cost::core_grad_flops`].
    pub core_grad_efficiency: Sourced<f64>,
    /// Device memory in bytes.
    pub memory_bytes: Sourced<u64>,
    /// Peak bytes per second to and from device memory.
    pub memory_bytes_per_sec: Sourced<f64>,
    /// Share of it that streaming kernels reach.
    pub memory_efficiency: Sourced<f64>,
    /// Share of it that conversion to fp8 reaches, its transposes included.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub cast_efficiency: Option<Sourced<f64>>,
    /// To ranks of the same node.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub intra_node: Option<Link>,
    /// To ranks of other nodes.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub inter_node: Option<Link>,
    /// Ranks that share a node.
    pub ranks_per_node: Sourced<u32>,
    /// Seconds that a task takes on the device before it does anything.
    pub launch_secs: Sourced<f64>,
    /// Seconds that the host takes to launch a task.
    pub host_launch_secs: Sourced<f64>,
    /// Watts of a device that waits, with its share of the node.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub idle_watts: Option<Sourced<f64>>,
    /// Watts of a device that works, with its share of the node.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub busy_watts: Option<Sourced<f64>>,
    /// Power usage effectiveness: the building's power over the machines'.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub pue: Option<Sourced<f64>>,
    /// US dollars for an hour of one device.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub price_per_hour: Option<Sourced<f64>>,
    /// What measured spans say about the model.
    #[serde(skip)]
    pub corrections: Corrections,
}

/// A figure that is needed and not given.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Missing {
    /// Path of the figure in the file.
    pub figure: String,
    /// The file.
    pub file: String,
}

impl fmt::Display for Missing {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Missing { figure, file } = self;
        let file = if file.is_empty() { "the description of the hardware" } else { file };
        write!(f, "{file} does not give `{figure}`, which is needed here; add `{}`", example(figure))
    }
}

/// A line that gives the figure at `path`, with a value to be replaced.
pub fn example(path: &str) -> String {
    let leaf = r#"(value: .., source: "where the figure is from")"#.to_owned();
    let (groups, name) = path.rsplit_once('.').unwrap_or(("", path));
    let link = matches!(name, "intra_node" | "inter_node");
    let value = if link { format!("(bytes_per_sec: {leaf}, latency_secs: {leaf})") } else { leaf };
    let line = format!("{name}: {value}");
    groups.rsplit('.').filter(|group| !group.is_empty()).fold(line, |inner, group| format!("{group}: ({inner})"))
}

/// Collects what is missing, so that all of it is told at once.
struct Lookup<'a> {
    file: &'a str,
    missing: Vec<Missing>,
}

impl<'a> Lookup<'a> {
    fn new(spec: &'a DeviceSpec) -> Self {
        Lookup { file: &spec.file, missing: Vec::new() }
    }

    /// The figure, or 1 in the place of a missing one.
    fn figure(&mut self, figure: Option<f64>, path: impl FnOnce() -> String) -> f64 {
        figure.unwrap_or_else(|| {
            self.missing.push(Missing { figure: path(), file: self.file.to_owned() });
            1.0
        })
    }

    fn finish(self, value: f64) -> Result<f64> {
        if self.missing.is_empty() { Ok(value) } else { Err(Error::MissingFigures(self.missing)) }
    }
}

impl DeviceSpec {
    /// Seconds that a task of `kind` and `cost` takes alone, with products in `format`:
    ///
    /// `launch + factor(kind) * (max(compute, memory, intra-node link, inter-node link) + streamed + casts)`
    ///
    /// - compute: each class of operations over its peak and efficiency, one after the other
    /// - memory: bytes that products and transfers read and write, over bandwidth and efficiency; computing hides them
    /// - streamed: bytes of ops without products, likewise; nothing hides them
    /// - a link that is used: its latency, and bytes over its bandwidth
    /// - casts, in fp8 only: 2 bytes read and 1 written per element, by kernels of their own before the products
    ///
    /// Memory traffic is that of the format which tensors are stored in, also where products read a narrower copy.
    ///
    /// # Errors
    /// If the cost needs figures that are not given: all of them.
    pub fn task_secs(&self, kind: &str, cost: &Cost, format: Format) -> Result<f64> {
        let mut lookup = Lookup::new(self);
        let compute_secs = self.compute_secs(cost, format, &mut lookup);
        let memory = self.memory_bytes_per_sec.value;
        let bandwidth = memory * self.memory_efficiency.value;
        let streamed_secs = cost.streamed_bytes as f64 / bandwidth;
        let memory_secs = cost.memory_bytes().saturating_sub(cost.streamed_bytes) as f64 / bandwidth;
        let mut link_secs = |bytes: u64, link: &Option<Link>, name: &str| {
            if bytes == 0 {
                return 0.0;
            }
            let rate = lookup.figure(link.as_ref().map(|link| link.bytes_per_sec.value), || name.to_owned());
            link.as_ref().map_or(0.0, |link| link.latency_secs.value) + bytes as f64 / rate
        };
        let intra_secs = link_secs(cost.intra_node_bytes, &self.intra_node, "intra_node");
        let inter_secs = link_secs(cost.inter_node_bytes, &self.inter_node, "inter_node");
        let mut cast_secs = 0.0;
        if format == Format::Fp8 && cost.cast_elements > 0 {
            const BYTES_PER_ELEMENT: f64 = 2.0 + 1.0;
            let share = self.cast_efficiency.as_ref().map(|share| share.value);
            let share = lookup.figure(share, || "cast_efficiency".to_owned());
            cast_secs = cost.cast_elements as f64 * BYTES_PER_ELEMENT / (memory * share);
        }
        let work_secs = compute_secs.max(memory_secs).max(intra_secs).max(inter_secs) + streamed_secs + cast_secs;
        lookup.finish(self.launch_secs() + self.corrections.factor(kind) * work_secs)
    }

    fn compute_secs(&self, cost: &Cost, format: Format, lookup: &mut Lookup) -> f64 {
        let mut secs = |flops: u64, format: Format, share: Option<f64>| {
            if flops == 0 {
                return 0.0;
            }
            let name = format.name();
            let peak = lookup.figure(self.peak_flops_per_sec.get(format), || format!("peak_flops_per_sec.{name}"));
            let share = lookup.figure(share, || format!("product_efficiency.{name}"));
            flops as f64 / (peak * share)
        };
        secs(cost.product_flops, format, self.product_efficiency.get(format))
            + secs(cost.core_flops, format.high(), Some(self.core_efficiency.value))
            + secs(cost.core_grad_flops, format.high(), Some(self.core_grad_efficiency.value))
            // Elementwise work is bound by memory, so that the peak will do.
            + secs(cost.vector_flops, format.vector(), Some(1.0))
    }

    /// [`DeviceSpec::task_secs`] in whole nanoseconds, rounded to nearest.
    ///
    /// # Errors
    /// As there.
    pub fn task_nanos(&self, kind: &str, cost: &Cost, format: Format) -> Result<u64> {
        Ok((self.task_secs(kind, cost, format)? * 1e9).round() as u64)
    }

    /// Seconds that a task takes on the device before it does anything, corrected.
    pub fn launch_secs(&self) -> f64 {
        self.corrections.launch_secs.unwrap_or(self.launch_secs.value)
    }

    /// What is left for computation while communication occupies its multiprocessors. Links and memory stay as they are.
    #[must_use]
    pub fn beside_communication(&self) -> DeviceSpec {
        let mut left = self.clone();
        let num_sms = self.num_sms.value.saturating_sub(self.comm_sms.value).max(1);
        let share = f64::from(num_sms) / f64::from(self.num_sms.value.max(1));
        left.peak_flops_per_sec.figures_mut().for_each(|peak| peak.value *= share);
        (left.num_sms.value, left.comm_sms.value) = (num_sms, 0);
        left
    }

    /// Kilowatt-hours of one device over `busy_secs` of work and `idle_secs` of waiting, its share of the building included.
    ///
    /// # Errors
    /// If watts or the PUE are not given.
    pub fn energy_kwh(&self, busy_secs: f64, idle_secs: f64) -> Result<f64> {
        let mut lookup = Lookup::new(self);
        let mut value = |figure: &Option<Sourced<f64>>, name: &str| {
            lookup.figure(figure.as_ref().map(|figure| figure.value), || name.to_owned())
        };
        let (busy, idle) = (value(&self.busy_watts, "busy_watts"), value(&self.idle_watts, "idle_watts"));
        let pue = value(&self.pue, "pue");
        lookup.finish(pue * (busy * busy_secs + idle * idle_secs) / JOULES_PER_KWH)
    }

    /// US dollars of one device for `secs`.
    ///
    /// # Errors
    /// If the price is not given.
    pub fn price(&self, secs: f64) -> Result<f64> {
        let mut lookup = Lookup::new(self);
        let price = self.price_per_hour.as_ref().map(|price| price.value);
        let price = lookup.figure(price, || "price_per_hour".to_owned());
        lookup.finish(price * secs / 3600.0)
    }
}

#[cfg(test)]
#[path = "hardware_tests.rs"]
pub(crate) mod tests;
