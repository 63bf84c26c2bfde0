//! Products in bf16 and f32: dense at the shapes that DeepGEMM is measured at, and by experts; and of one row.

use super::{Bench, Bf16, DType, F32, Given, PRODUCTS, U32, offsets};
use crate::{
    error::Result,
    ops::{gemm, gemv, grouped_gemm},
    ptx::{
        gemm::{Matrix, Problem},
        grouped_gemm::{Rows, forward_problem, input_grad_problem, weight_grad_problem},
        tuning::Product::Plain,
    },
};

fn m(dtype: DType, dims: &[usize]) -> Given {
    (dtype, dims.to_vec(), None)
}

impl Bench<'_> {
    pub(super) fn products(&mut self) -> Result<()> {
        for t in [4096, 128] {
            for (n, k) in PRODUCTS {
                let [t, n, k] = [t, n, k].map(|size| self.size(size));
                self.forward(Bf16, [t, n, k])?;
            }
        }
        for (n, k) in [(4096, 7168), (7168, 2048)] {
            let [t, n, k] = [4096, n, k].map(|size| self.size(size));
            let shape = || format!("[{t}, {n}] x [{n}, {k}]");
            let tensors = [m(Bf16, &[t, n]), m(Bf16, &[n, k]), m(Bf16, &[t, k])];
            let product = &|x: &[_]| Plain(Problem::input_grad(x[0], x[1], x[2]));
            self.measure_product(("gemm::input_grad", Bf16), shape(), &tensors, None, product, &|s, x| {
                gemm::input_grad(s, x[0], x[1], x[2], false)
            })?;
            let tensors = [m(Bf16, &[t, n]), m(Bf16, &[t, k]), m(F32, &[n, k])];
            let (shape, product) =
                (format!("{} into F32", shape()), &|x: &[_]| Plain(Problem::weight_grad(x[0], x[1], x[2])));
            self.measure_product(("gemm::weight_grad", Bf16), shape, &tensors, None, product, &|s, x| {
                gemm::weight_grad(s, x[0], x[1], x[2], None)
            })?;
            let tensors = [m(Bf16, &[t, k]), m(Bf16, &[n, k]), m(Bf16, &[t, n]), m(Bf16, &[t, n])];
            let shape = format!("[{t}, {k}] x [{n}, {k}]");
            let product = &|x: &[_]| Plain(Problem { addend: Some(x[2]), ..Problem::forward(x[0], x[1], x[3]) });
            self.measure_product(("gemm::forward_onto", Bf16), shape, &tensors, None, product, &|s, x| {
                gemm::forward_onto(s, x[0], x[1], x[2], x[3])
            })?;
            self.forward(F32, [t, n, k])?;
            let tensors = [m(Bf16, &[1, k]), m(Bf16, &[n, k]), m(Bf16, &[1, n])];
            self.measure_on(("gemv::forward", Bf16), format!("[1, {k}] x [{n}, {k}]"), &tensors, &|s, x| {
                gemv::forward(s, x[0], x[1], None, x[2])
            })?;
        }
        Ok(())
    }

    fn forward(&mut self, dtype: DType, [t, n, k]: [usize; 3]) -> Result<()> {
        let tensors = [m(dtype, &[t, k]), m(dtype, &[n, k]), m(dtype, &[t, n])];
        let shape = format!("[{t}, {k}] x [{n}, {k}]");
        let product = &|x: &[_]| Plain(Problem::forward(x[0], x[1], x[2]));
        self.measure_product(("gemm::forward", dtype), shape, &tensors, None, product, &|s, x| {
            gemm::forward(s, x[0], x[1], None, x[2])
        })
    }

    pub(super) fn experts(&mut self) -> Result<()> {
        for (e, rows) in [(4, 8192), (8, 4096)] {
            for (o, i) in [(4096, 7168), (7168, 2048)] {
                let [rows, o, i] = [rows, o, i].map(|size| self.size(size));
                let offsets = offsets(e, rows);
                let n = offsets[e] as usize;
                let shape = || format!("{e} x about [{rows}, {i}] x [{o}, {i}]");
                let table = || (U32, vec![e + 1], Some(offsets.clone()));
                let tensors = [m(Bf16, &[n, i]), table(), m(Bf16, &[e, o, i]), m(Bf16, &[n, o])];
                let product = &|x: &[_]| Plain(forward_problem(x[0], Rows::Offsets(x[1]), x[2], x[3]));
                self.measure_product(("grouped_gemm::forward", Bf16), shape(), &tensors, None, product, &|s, x| {
                    grouped_gemm::forward(s, x[0], x[1], x[2], x[3])
                })?;
                let tensors = [m(Bf16, &[n, o]), table(), m(Bf16, &[e, o, i]), m(Bf16, &[n, i])];
                let product =
                    &|x: &[_]| Plain(input_grad_problem(x[0], Rows::Offsets(x[1]), x[2], Matrix::new(x[3], i)));
                self.measure_product(("grouped_gemm::input_grad", Bf16), shape(), &tensors, None, product, &|s, x| {
                    grouped_gemm::input_grad(s, x[0], x[1], x[2], x[3])
                })?;
                let tensors = [m(Bf16, &[n, o]), m(Bf16, &[n, i]), table(), m(Bf16, &[e, o, i])];
                let product = &|x: &[_]| Plain(weight_grad_problem(x[0], x[1], Rows::Offsets(x[2]), x[3]));
                self.measure_product(
                    ("grouped_gemm::weight_grad", Bf16),
                    shape(),
                    &tensors,
                    None,
                    product,
                    &|s, x| grouped_gemm::weight_grad(s, x[0], x[1], x[2], x[3]),
                )?;
            }
        }
        Ok(())
    }
}
