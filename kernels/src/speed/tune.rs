//! Each tile of each product that is measured, timed on the device: what a [`Table`](crate::ptx::tuning::Table) is made from.
//!
//! A product is measured for each share of the device that its stream may have: all of it, and what communication leaves
//! ([`default_comm_sms`]). Times are taken as those of ops are.

use std::sync::Arc;

use super::{Bench, Found, Given, ProductOf, Request, Setting, median};
use crate::{
    device::{Share, Target, default_comm_sms},
    error::{Error, Result},
    memory::Memory,
    ptx::{gemm, tuning::Row},
    stream::{Part, Stream},
};

/// Measures the tiles of products; `tell` sees each product when it is there.
///
/// # Errors
/// [`Error::Device`] if the device is no GPU; those of the device.
pub fn tune(request: Request, mut tell: impl FnMut(&Row)) -> Result<Vec<Row>> {
    if Memory::open(request.device)?.gpu().is_none() {
        return Err(Error::Device {
            device: request.device.to_string(),
            expected: "a GPU, whose products have tiles to choose from".into(),
            found: "processors".into(),
            advice: "use `--device cuda:0`".into(),
        });
    }
    let mut bench = Bench { request, found: Found::Tiles(Vec::new(), &mut tell) };
    bench.all_products()?;
    match bench.found {
        Found::Tiles(rows, _) => Ok(rows),
        Found::Speeds(..) => Ok(Vec::new()),
    }
}

impl Bench<'_> {
    pub(super) fn measure_tiles(&mut self, tensors: &[Given], product: ProductOf<'_>) -> Result<()> {
        let Found::Tiles(rows, tell) = &mut self.found else { return Ok(()) };
        let Setting { memory, tensors, flush } = Setting::new(&self.request, tensors)?;
        let Some(gpu) = memory.gpu() else { return Ok(()) };
        let product = product(&tensors);
        let comm_sms = default_comm_sms(gpu.target().num_sms);
        for share in [Share::All, Share::AllBut(comm_sms)] {
            let target = Target { share, ..gpu.target() };
            let on = gemm::Target::from(&target);
            let key = product.key(on);
            if rows.iter().any(|row| row.product == key) {
                continue;
            }
            let part = Part { share, ..Part::default() };
            let mut stream = Stream::with_part("bench", &memory, &Arc::default(), part)?;
            let mut timed = Vec::new();
            for (place, (name, launch)) in product.candidates(on).into_iter().enumerate() {
                if !target.fits(&launch.kernel) {
                    continue;
                }
                let secs = median(&mut stream, self.request.runs, flush, &mut |s| {
                    let launch = product.candidates(on).into_iter().nth(place).map(|(_, launch)| vec![launch]);
                    s.launch_kernel(&tensors, &[], |_| launch, |_| ());
                    Ok(())
                })?;
                timed.push((name, secs * 1e6));
            }
            let model_tile = product.by_model(on);
            let of_model = timed.iter().find(|(name, _)| *name == model_tile);
            let quickest = timed.iter().min_by(|a, b| a.1.total_cmp(&b.1));
            let (Some((tile, micros)), Some((_, model_micros))) = (quickest, of_model) else { continue };
            let (tile, micros, model_micros) = (tile.clone(), *micros, *model_micros);
            let row = Row { product: key, tile, micros, model_tile, model_micros };
            tell(&row);
            rows.push(row);
        }
        Ok(())
    }
}
