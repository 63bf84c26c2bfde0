//! Weights into memory when a session begins: values, and for products in 8 bits codes and scales.
//!
//! A folder's codes are used as they are stored, where products can take them: to decode them and round them again would give other
//! numbers wherever a block's scale is not the one that this program would choose. Where products are all that needs a weight, its codes
//! are all that is kept.

use bevy_ecs::prelude::*;
use kernels::{
    dtype::{DType, Float},
    fp8::{Blocks, Scaling, TILE},
    memory::Memory,
    ops::quantize::{encode_blocks, transpose},
    tensor::Tensor,
};
use serde::Serialize;

use crate::{
    hf::{codes::Codes, read::HfFolder},
    linear::Fp8Weight,
    model::{self, Parameters},
    params::ParamSpec,
    session::SessionError,
};

/// Where a model's weights come from.
pub enum Weights<'a> {
    /// A folder.
    Folder(&'a HfFolder),
    /// Values of each parameter.
    Values(Values<'a>),
}

/// Gives the values of a parameter.
type Values<'a> = Box<dyn FnMut(&ParamSpec) -> Result<Vec<f32>, SessionError> + 'a>;

impl<'a> Weights<'a> {
    /// Values of each parameter.
    pub fn of(values: impl FnMut(&ParamSpec) -> Result<Vec<f32>, SessionError> + 'a) -> Self {
        Weights::Values(Box::new(values))
    }

    fn values(&mut self, spec: &ParamSpec) -> Result<Vec<f32>, SessionError> {
        match self {
            Weights::Folder(folder) => folder.read_param(spec).map_err(SessionError::input),
            Weights::Values(values) => values(spec),
        }
    }
}

/// Where the codes of the parameters that are multiplied in 8 bits came from, and what all parameters take.
#[derive(Resource, Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct WeightsReport {
    /// Parameters multiplied in 8 bits whose codes and scales are those of the checkpoint.
    pub num_fp8_as_stored: usize,
    /// Parameters multiplied in 8 bits that were rounded when they were read.
    pub num_fp8_rounded: usize,
    /// Of these, why the first of a checkpoint was.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub first_fp8_rounded: Option<String>,
    /// Bytes of all weights in memory, codes and scales included, gradients not.
    pub bytes: u64,
}

impl WeightsReport {
    /// For a person, if anything is multiplied in 8 bits.
    pub fn sentence(&self) -> Option<String> {
        let (stored, all) = (self.num_fp8_as_stored, self.num_fp8_as_stored + self.num_fp8_rounded);
        let rounded = match &self.first_fp8_rounded {
            None => String::new(),
            Some(first) => format!("; {} rounded when they were read, the first {first}", self.num_fp8_rounded),
        };
        (all > 0)
            .then(|| format!("weights in 8 bits: {stored} of {all} with the checkpoint's codes and scales{rounded}"))
    }
}

/// Fills the parameters that a rank holds, and says how.
///
/// # Errors
/// Those of the source.
pub fn fill(memory: &Memory, parameters: &Parameters, mut from: Weights) -> Result<WeightsReport, SessionError> {
    let mut report = WeightsReport::default();
    for (spec, weight) in parameters.iter() {
        let Some(fp8) = weight.fp8 else {
            model::upload(memory, weight.value, &from.values(spec)?);
            report.bytes += weight.value.size_bytes();
            continue;
        };
        let stored = match &from {
            Weights::Values(_) => None,
            Weights::Folder(folder) => match folder.fits_products(spec) {
                Ok(()) => Some(folder.read_codes(spec).map_err(SessionError::input)?),
                Err(why) => {
                    report.first_fp8_rounded.get_or_insert_with(|| format!("{}: {why}", spec.name));
                    None
                }
            },
        };
        let counted = if stored.is_some() { &mut report.num_fp8_as_stored } else { &mut report.num_fp8_rounded };
        *counted += 1;
        let values = if stored.is_some() && fp8.is_all { None } else { Some(from_codes(&stored, spec, &mut from)?) };
        let codes = match (stored, &values) {
            (Some(codes), _) => codes,
            (None, Some(values)) => round(values, weight.value, fp8.scaling),
            (None, None) => Codes::default(),
        };
        put(memory, fp8, &spec.shape, &codes);
        report.bytes += fp8.num_bytes();
        if let Some(values) = values.filter(|_| !fp8.is_all) {
            model::upload(memory, weight.value, &values);
            report.bytes += weight.value.size_bytes();
        }
    }
    Ok(report)
}

/// Values of a parameter, from its codes where they were read.
fn from_codes(stored: &Option<Codes>, spec: &ParamSpec, from: &mut Weights) -> Result<Vec<f32>, SessionError> {
    match stored {
        Some(codes) => Ok(codes.values(spec)),
        None => from.values(spec),
    }
}

/// Codes and scales of values in a weight's type: what [`kernels::ops::quantize::blocks`] makes of the weight.
fn round(values: &[f32], weight: Tensor, scaling: Scaling) -> Codes {
    let dims: Vec<usize> = weight.shape.dims().collect();
    let num_scales = Blocks::scale_shape(&dims).iter().product();
    let mut to = Codes { codes: vec![0; values.len()], scales: vec![0.0; num_scales] };
    if !values.is_empty() {
        let narrow = |x: &f32| kernels::with_float!(weight.dtype, T => T::of_f64(f64::from(*x)).as_f64() as f32);
        let narrow: Vec<f32> = values.iter().map(narrow).collect();
        let [o, i] = matrix(&dims);
        encode_blocks(&narrow, o, i, scaling, (&mut to.codes, &mut to.scales));
    }
    to
}

/// Rows and columns of a matrix, or of each of several.
fn matrix(dims: &[usize]) -> [usize; 2] {
    [dims[dims.len() - 2], dims[dims.len() - 1]]
}

fn put(memory: &Memory, fp8: Fp8Weight, dims: &[usize], Codes { codes, scales }: &Codes) {
    memory.upload(fp8.blocks.codes, codes);
    memory.upload(fp8.blocks.scales, scales);
    if let Some(across) = fp8.transposed.filter(|_| !codes.is_empty()) {
        let [o, i] = matrix(dims);
        let (mut turned, mut turned_scales) = (vec![0; codes.len()], vec![0.0; scales.len()]);
        transpose(codes, o, i, &mut turned);
        transpose(scales, o.div_ceil(TILE), i.div_ceil(TILE), &mut turned_scales);
        memory.upload(across.codes, &turned);
        memory.upload(across.scales, &turned_scales);
    }
}

/// Room for a weight of type `dtype`: none, where its codes are all that is needed.
pub(crate) fn alloc_value(memory: &Memory, dtype: DType, dims: &[usize], fp8: Option<Fp8Weight>) -> Tensor {
    match fp8 {
        Some(Fp8Weight { is_all: true, .. }) => memory.shape_only(dtype, dims),
        _ => memory.alloc(dtype, dims),
    }
}
