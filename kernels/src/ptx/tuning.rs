//! Tiles of products that were measured on a device, in place of what the model of [`super::gemm`] takes to be the quickest.
//!
//! A [`Table`] is a file that `hadal bench kernels --tune` writes and people can read: a row has a product's kind and sizes, the tile that
//! was the quickest, and what the model would have chosen. It holds for one device, and for sizes that are exactly those of a row: the
//! same device, table and sizes always give the same launch. What it has no row for is the model's.
//!
//! Tiles sum in one order, so that a table changes how long a product takes and no bit of it.

use std::{collections::BTreeMap, fmt};

use serde::{Deserialize, Serialize};

use super::{
    Launch, fp8_gemm,
    gemm::{self, Layout, Target, problem::Kind},
};
use crate::{
    device::{Device, GpuInfo},
    dtype::DType,
    error::Error,
};

/// What scales of FP8 operands belong to; the other operand always has tiles.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub enum Scales {
    /// No FP8.
    Unscaled,
    /// 128 x 128 weights.
    Blocks,
    /// 128 numbers of a row.
    Tiles,
}

/// A product, as far as the choice of its tile may depend on it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Key {
    kind: Kind,
    layout: Layout,
    input: DType,
    output: DType,
    scales: Scales,
    /// Whether another matrix is added.
    add: bool,
    /// Sizes [m, n, k], of all groups where they are grouped.
    m: u32,
    n: u32,
    k: u32,
    groups: u32,
    /// Multiprocessors that it may occupy.
    sms: u32,
}

impl Key {
    fn new(on: Target, problem: &gemm::Problem, scales: Scales) -> Self {
        let gemm::problem::Spec { layout, kind, input, output, addend: add, .. } = problem.spec();
        let gemm::Problem { m, n, k, .. } = *problem;
        Key { kind, layout, input, output, scales, add, m, n, k, groups: problem.groups.num(), sms: on.num_sms }
    }

    fn of_fp8(on: Target, problem: &fp8_gemm::Problem) -> Self {
        let scales = match problem.scale_b {
            fp8_gemm::ScaleB::Tiles(_) => Scales::Tiles,
            fp8_gemm::ScaleB::Blocks(_) => Scales::Blocks,
        };
        Key::new(on, &problem.product, scales)
    }
}

impl fmt::Display for Key {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Key { kind, layout, input, output, m, n, k, groups, sms, .. } = self;
        let input = if *input == DType::U8 { "fp8" } else { input.name() };
        write!(f, "{input} {} into {}, [{m}, {n}, {k}]", format!("{layout:?}").to_uppercase(), output.name())?;
        match kind {
            Kind::One => {}
            Kind::Rows { .. } => write!(f, " by rows of {groups}")?,
            Kind::Inner { .. } | Kind::PaddedInner => write!(f, " by k of {groups}")?,
        }
        write!(f, "{} on {sms} SMs", if self.add { ", added," } else { "" })
    }
}

/// What was measured of one product.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Row {
    /// Which.
    pub product: Key,
    /// The quickest tile.
    pub tile: String,
    /// Its median, in microseconds.
    pub micros: f64,
    /// The model's tile.
    pub model_tile: String,
    /// Its median, in microseconds.
    pub model_micros: f64,
}

/// The file.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct File {
    device: String,
    num_sms: u32,
    rows: Vec<Row>,
}

/// Which tile.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Tile {
    Plain(gemm::Choice),
    Fp8(fp8_gemm::Choice),
}

/// The quickest tiles of one device's products.
#[derive(Clone, Debug, PartialEq)]
pub struct Table {
    file: File,
    tiles: BTreeMap<Key, Tile>,
}

/// Why a text is no table.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
pub enum TableError {
    /// It is not RON of the expected form.
    #[error("a tuning table should be what `hadal bench kernels --tune` writes: {0}")]
    Text(String),
    /// A name that no tile has.
    #[error(
        "row {row} ({product}): expected one of the tiles {known}, found `{tile}`; measure anew with `hadal bench kernels --tune`"
    )]
    Tile {
        /// Its number, from 1.
        row: usize,
        /// Its product.
        product: Box<Key>,
        /// The name.
        tile: String,
        /// Names that there are.
        known: String,
    },
    /// A product with two rows.
    #[error("rows {first} and {second} are of the same product ({product}); keep one of them")]
    Twice {
        /// Numbers, from 1.
        first: usize,
        /// The later one.
        second: usize,
        /// The product.
        product: Box<Key>,
    },
}

/// Tiles of products like this one, by name.
fn tiles_for(product: &Key) -> Vec<(String, Tile)> {
    match product.scales {
        Scales::Unscaled => gemm::Choice::all().map(|choice| (choice.name(), Tile::Plain(choice))).collect(),
        Scales::Blocks | Scales::Tiles => {
            let mut tiles: Vec<_> = fp8_gemm::Choice::all().map(|choice| (choice.name(), Tile::Fp8(choice))).collect();
            tiles.sort_by(|a, b| a.0.cmp(&b.0));
            tiles.dedup_by(|a, b| a.0 == b.0);
            tiles
        }
    }
}

impl Table {
    /// Of a device's name and multiprocessors, and what was measured there.
    ///
    /// # Errors
    /// [`TableError`], if a row's tile is not known or a product has two rows.
    pub fn new(device: &str, num_sms: u32, rows: Vec<Row>) -> Result<Self, TableError> {
        Self::from_file(File { device: device.to_owned(), num_sms, rows })
    }

    fn from_file(file: File) -> Result<Self, TableError> {
        let mut tiles = BTreeMap::new();
        for (i, Row { product, tile, .. }) in file.rows.iter().enumerate() {
            let known = tiles_for(product);
            let Some((_, found)) = known.iter().find(|(name, _)| name == tile) else {
                let known = known.iter().map(|(name, _)| format!("`{name}`")).collect::<Vec<_>>().join(", ");
                return Err(TableError::Tile { row: i + 1, product: Box::new(*product), tile: tile.clone(), known });
            };
            if tiles.insert(*product, *found).is_some() {
                let first = file.rows.iter().position(|row| row.product == *product).unwrap_or(0) + 1;
                return Err(TableError::Twice { first, second: i + 1, product: Box::new(*product) });
            }
        }
        Ok(Table { file, tiles })
    }

    /// Reads what [`Table::to_ron`] wrote.
    ///
    /// # Errors
    /// [`TableError`].
    pub fn from_ron(text: &str) -> Result<Self, TableError> {
        Self::from_file(ron::from_str(text).map_err(|e| TableError::Text(e.to_string()))?)
    }

    /// As a file: a row a line.
    ///
    /// # Errors
    /// [`TableError::Text`], if it cannot be written as text.
    pub fn to_ron(&self) -> Result<String, TableError> {
        let config = ron::ser::PrettyConfig::new().depth_limit(2);
        let text = ron::ser::to_string_pretty(&self.file, config).map_err(|e| TableError::Text(e.to_string()))?;
        Ok(text + "\n")
    }

    /// Its rows.
    pub fn rows(&self) -> &[Row] {
        &self.file.rows
    }

    /// Refuses a table of another device.
    ///
    /// # Errors
    /// [`Error::Device`].
    pub fn check(&self, info: &GpuInfo) -> Result<(), Error> {
        let File { device, num_sms, .. } = &self.file;
        if *device == info.name && *num_sms == info.target.num_sms {
            return Ok(());
        }
        Err(Error::Device {
            device: Device::Cuda(info.ordinal).to_string(),
            expected: format!("a tuning table measured on {} with {} multiprocessors", info.name, info.target.num_sms),
            found: format!("one of {device} with {num_sms}"),
            advice: "measure one there with `hadal bench kernels --tune FILE`, or go without".into(),
        })
    }

    /// The quickest tile of a product, if it was measured.
    pub(super) fn product(&self, on: Target, problem: &gemm::Problem) -> Option<gemm::Choice> {
        match self.tiles.get(&Key::new(on, problem, Scales::Unscaled)) {
            Some(Tile::Plain(choice)) => Some(*choice),
            Some(Tile::Fp8(_)) | None => None,
        }
    }

    /// The same in FP8.
    pub(super) fn fp8_product(&self, on: Target, problem: &fp8_gemm::Problem) -> Option<fp8_gemm::Choice> {
        match self.tiles.get(&Key::of_fp8(on, problem)) {
            Some(Tile::Fp8(choice)) => Some(*choice),
            Some(Tile::Plain(_)) | None => None,
        }
    }
}

/// A product whose tiles are to be measured.
#[derive(Clone, Copy, Debug)]
pub enum Product {
    /// In f32 or bf16.
    Plain(gemm::Problem),
    /// In FP8.
    Fp8(fp8_gemm::Problem),
}

impl Product {
    /// Where a table has it.
    pub fn key(&self, on: Target) -> Key {
        match self {
            Product::Plain(problem) => Key::new(on, problem, Scales::Unscaled),
            Product::Fp8(problem) => Key::of_fp8(on, problem),
        }
    }

    /// What the model chooses.
    pub fn by_model(&self, on: Target) -> String {
        match self {
            Product::Plain(problem) => gemm::by_model(on, problem).name(),
            Product::Fp8(problem) => fp8_gemm::by_model(on, problem).name(),
        }
    }

    /// The tiles that are to choose from, and the launch by each.
    pub fn candidates(&self, on: Target) -> Vec<(String, Launch)> {
        match self {
            Product::Plain(problem) => {
                let all = gemm::candidates(on, problem).into_iter();
                all.map(|choice| (choice.name(), choice.launch(on, problem))).collect()
            }
            Product::Fp8(problem) => {
                let all = fp8_gemm::candidates(on, problem).into_iter();
                all.map(|choice| (choice.name(), choice.launch(on, problem))).collect()
            }
        }
    }
}

#[cfg(test)]
mod tests;
