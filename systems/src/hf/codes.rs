//! Weights that are stored in 8 bits, as they are stored: codes and factors of a packed parameter, for products that take them so.
//!
//! Products want a factor for each 128 x 128 block of the packed matrix ([`kernels::fp8::Blocks`]). Stored matrices have blocks of their
//! own, so those that are packed below each other fit only if the upper ones end with a block.

use super::fp8::{self, BLOCK};
use super::read::{HfFolder, ReadError};
use crate::params::{ParamSpec, View};
use kernels::fp8::{E4M3, MAX};

/// Codes and factors of a parameter.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Codes {
    /// E4M3, [o, i] or [e, o, i].
    pub codes: Vec<u8>,
    /// [ceil(o / 128), ceil(i / 128)], or [e, ..] of that.
    pub scales: Vec<f32>,
}

/// Why products cannot take a parameter as it is stored.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Unfit {
    /// Not in 8 bits, or not all of it.
    #[error("{name} is stored in {dtype}")]
    Stored {
        /// The tensor.
        name: String,
        /// Its type.
        dtype: String,
    },
    /// Other blocks.
    #[error("its factors are for blocks of {} x {}, and products take 128 x 128", .0[0], .0[1])]
    Block([usize; 2]),
    /// Blocks of the packed matrix would have rows of two stored ones.
    #[error("it packs matrices of {rows} rows below each other, which is no multiple of 128")]
    Rows {
        /// Of the stored matrix.
        rows: usize,
    },
}

impl Codes {
    /// The numbers that they are, of a parameter as [`HfFolder::read_param`] reads it.
    pub fn values(&self, spec: &ParamSpec) -> Vec<f32> {
        let mut values = vec![0.0; self.codes.len()];
        let mut scales = &self.scales[..];
        for view in &spec.views {
            let (part, matrix) = (view.offset..view.offset + view.num_elements(), fp8::as_matrix(&view.shape));
            let (of_view, rest) = scales.split_at(num_scales(view));
            fp8::dequantize_rows(&self.codes[part.clone()], matrix[1], 0, of_view, BLOCK, &mut values[part]);
            scales = rest;
        }
        values
    }
}

fn num_scales(view: &View) -> usize {
    fp8::scale_shape(fp8::as_matrix(&view.shape), BLOCK).iter().product()
}

impl HfFolder {
    /// Whether products can take a parameter as it is stored.
    ///
    /// # Errors
    /// Why not.
    pub fn fits_products(&self, spec: &ParamSpec) -> Result<(), Unfit> {
        for view in &spec.views {
            self.is_in_blocks(view)?;
            let [rows, columns] = fp8::as_matrix(&view.shape);
            let matrix = spec.shape[spec.shape.len().saturating_sub(2)];
            if !(view.offset / columns.max(1) % matrix.max(1)).is_multiple_of(BLOCK[0]) {
                return Err(Unfit::Rows { rows });
            }
        }
        Ok(())
    }

    /// Whether a tensor is stored as [`BLOCK`] says.
    fn is_in_blocks(&self, view: &View) -> Result<(), Unfit> {
        match self.stored_dtype(&view.hf_name) {
            Some(safetensors::Dtype::F8_E4M3) if self.block() == BLOCK => Ok(()),
            Some(safetensors::Dtype::F8_E4M3) => Err(Unfit::Block(self.block())),
            other => {
                let dtype = other.map_or("nothing".into(), |dtype| format!("{dtype:?}"));
                Err(Unfit::Stored { name: view.hf_name.clone(), dtype })
            }
        }
    }

    /// Codes and factors of a parameter that [`HfFolder::fits_products`].
    ///
    /// # Errors
    /// As [`HfFolder::read_view`].
    pub fn read_codes(&self, spec: &ParamSpec) -> Result<Codes, ReadError> {
        let mut all = Codes { codes: Vec::with_capacity(spec.num_elements()), scales: Vec::new() };
        for view in &spec.views {
            self.append_codes(view, &mut all)?;
        }
        Ok(all)
    }

    /// Codes and factors of one tensor, if it is stored in 8 bits with blocks of 128 x 128.
    ///
    /// # Errors
    /// As [`HfFolder::read_view`].
    pub fn read_view_codes(&self, view: &View) -> Result<Option<Codes>, ReadError> {
        let mut codes = Codes::default();
        let is_stored = self.is_in_blocks(view).is_ok();
        if is_stored {
            self.append_codes(view, &mut codes)?;
        }
        Ok(is_stored.then_some(codes))
    }

    fn append_codes(&self, view: &View, to: &mut Codes) -> Result<(), ReadError> {
        let not_finite = |name: String, index, value| ReadError::NotFinite { name, index, value };
        let start = to.codes.len();
        to.codes.resize(start + view.num_elements(), 0);
        self.read_bytes(&view.hf_name, &view.shape, &mut to.codes[start..])?;
        if let Some(at) = to.codes[start..].iter().position(|code| code & 0x7f == 0x7f) {
            return Err(not_finite(view.hf_name.clone(), at, E4M3[usize::from(to.codes[start + at])]));
        }
        let scales = self.read_scales(&view.hf_name, &view.shape)?;
        if let Some(at) = scales.iter().position(|scale| !(scale * MAX).is_finite()) {
            return Err(not_finite(fp8::scale_name(&view.hf_name), at, scales[at] * MAX));
        }
        to.scales.extend(scales);
        Ok(())
    }
}
