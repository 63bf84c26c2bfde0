//! A table by hand changes what is launched, where it has the product and nowhere else; and what it refuses.

#![expect(clippy::unwrap_used, reason = "tests")]

use super::*;
use crate::{
    device::Share,
    fp8::{Blocks, Tiles},
    memory::Memory,
    ptx::{Arch, gemm::Matrix},
};

const H200: Target<'static> = Target { arch: Arch::Sm90a, num_sms: 132, tuning: None };

fn plain(dtype: DType, [m, n, k]: [usize; 3]) -> gemm::Problem {
    let memory = Memory::new(Device::Cpu);
    let matrix = |rows: usize, cols: usize| Matrix::new(memory.alloc(dtype, &[rows, cols]), cols);
    gemm::Problem::new(Layout::Nt, [m, n, k], (matrix(m, k), matrix(n, k), matrix(m, n)))
}

fn fp8([m, n, k]: [usize; 3]) -> fp8_gemm::Problem {
    let memory = Memory::new(Device::Cpu);
    let tiles =
        Tiles { codes: memory.alloc(DType::U8, &[m, k]), scales: memory.alloc(DType::F32, &Tiles::scale_shape(m, k)) };
    fp8_gemm::Problem::product(tiles, Blocks::alloc(&memory, &[n, k]), memory.alloc(DType::Bf16, &[m, n]))
}

fn row(product: Key, tile: &str) -> Row {
    Row { product, tile: tile.into(), micros: 10.5, model_tile: "mma".into(), model_micros: 11.0 }
}

fn table(rows: Vec<Row>) -> Table {
    Table::new("NVIDIA H200", 132, rows).unwrap()
}

#[test]
fn a_measured_tile_is_launched_where_its_product_is_and_nowhere_else() {
    let sizes = [4096, 4096, 512];
    let problem = plain(DType::Bf16, sizes);
    let product = Product::Plain(problem);
    assert_eq!(product.by_model(H200), "wgmma_128x256_s4", "else the table below would change nothing");
    let table = table(vec![row(product.key(H200), "wgmma_128x64_s8")]);
    let on = Target { tuning: Some(&table), ..H200 };
    let launched = |on, problem: &gemm::Problem| gemm::launch(on, problem)[0].kernel.name.clone();
    assert_eq!(launched(on, &problem), "gemm_wgmma_bf16_nt_128x64_s8");
    assert_eq!(launched(H200, &problem), "gemm_wgmma_bf16_nt_128x256_s4");
    // Other sizes, another share of the device, and a sum are other products.
    assert_eq!(launched(on, &plain(DType::Bf16, [4096, 4096, 520])), "gemm_wgmma_bf16_nt_128x256_s4");
    assert_eq!(launched(Target { num_sms: 112, ..on }, &problem), "gemm_wgmma_bf16_nt_128x256_s4");
    let added = gemm::Problem { addend: Some(problem.c.tensor), ..problem };
    assert_eq!(launched(on, &added), "gemm_wgmma_bf16_nt_add_128x256_s4");
}

#[test]
fn the_same_holds_in_fp8() {
    let problem = fp8([4096, 4096, 512]);
    let product = Product::Fp8(problem);
    let by_model = product.by_model(H200);
    for (tile, launch) in product.candidates(H200) {
        let table = table(vec![row(product.key(H200), &tile)]);
        let on = Target { tuning: Some(&table), ..H200 };
        let launched = &fp8_gemm::launch(on, &problem)[0];
        assert_eq!((&launched.kernel.name, launched.grid), (&launch.kernel.name, launch.grid));
        assert_eq!(launched.kernel.name, format!("fp8_gemm_wgmma_blocks_u8_nt_bf16_{}", &tile["wgmma_".len()..]));
        let other = &fp8_gemm::launch(on, &fp8([4096, 4096, 640]))[0];
        assert!(other.kernel.name.ends_with(&by_model["wgmma_".len()..]), "{}", other.kernel.name);
    }
}

#[test]
fn a_tile_that_cannot_make_the_product_gives_way_to_the_model() {
    let problem = plain(DType::Bf16, [64, 64, 64]);
    let product = Product::Plain(problem);
    // By mma.sync a sum would have other bits.
    let table = table(vec![row(product.key(H200), "mma_128x128_s4")]);
    let on = Target { tuning: Some(&table), ..H200 };
    assert_eq!(gemm::choose(on, &problem), gemm::choose(H200, &problem));
}

#[test]
fn candidates_are_of_the_kernel_that_alignment_decides() {
    let names = |on, product: Product| product.candidates(on).into_iter().map(|(name, _)| name).collect::<Vec<_>>();
    let ampere = Target { arch: Arch::Sm80, ..H200 };
    let aligned = || Product::Plain(plain(DType::Bf16, [64, 64, 64]));
    assert_eq!(names(H200, aligned()), ["wgmma_128x256_s4", "wgmma_128x128_s6", "wgmma_128x64_s8"]);
    assert_eq!(names(ampere, aligned()), ["mma_128x128_s4", "mma_64x64_s4"]);
    assert_eq!(names(H200, Product::Plain(plain(DType::Bf16, [64, 64, 65]))), ["mma_128x128_s4", "mma_64x64_s4"]);
    assert_eq!(names(H200, Product::Plain(plain(DType::F32, [64, 64, 64]))), ["simt_128x64", "simt_64x64"]);
    assert_eq!(names(H200, Product::Fp8(fp8([64, 64, 128]))).len(), 7);
    assert_eq!(names(ampere, Product::Fp8(fp8([64, 64, 128]))), ["mma"]);
}

#[test]
fn a_table_is_read_as_it_was_written_a_row_a_line() {
    let keys = [Product::Plain(plain(DType::Bf16, [8, 16, 24])).key(H200), Product::Fp8(fp8([8, 16, 128])).key(H200)];
    let table = table(vec![row(keys[0], "wgmma_128x64_s8"), row(keys[1], "wgmma_64x32_s12")]);
    let text = table.to_ron().unwrap();
    assert_eq!(Table::from_ron(&text).unwrap(), table);
    let expected = "(\n    device: \"NVIDIA H200\",\n    num_sms: 132,\n    rows: [\n        (product: (kind: One, layout: Nt, \
                    input: Bf16, output: Bf16, scales: Unscaled, add: false, m: 8, n: 16, k: 24, groups: 1, sms: 132), \
                    tile: \"wgmma_128x64_s8\", micros: 10.5, model_tile: \"mma\", model_micros: 11.0),\n";
    assert!(text.starts_with(expected), "{text}");
    assert_eq!(text.lines().count(), 8, "{text}");
    assert_eq!(keys[1].to_string(), "fp8 NT into bf16, [8, 16, 128] on 132 SMs");
}

#[test]
fn what_is_no_table_is_refused_with_what_is_wrong() {
    let key = Product::Plain(plain(DType::Bf16, [8, 16, 24])).key(H200);
    let refused = |rows| Table::new("NVIDIA H200", 132, rows).unwrap_err().to_string();
    assert_eq!(
        refused(vec![row(key, "wgmma_128x64_s8"), row(Key { m: 9, ..key }, "wgmma_128x65")]),
        "row 2 (bf16 NT into bf16, [9, 16, 24] on 132 SMs): expected one of the tiles `simt_128x64`, `simt_64x64`, \
         `mma_128x128_s4`, `mma_64x64_s4`, `wgmma_128x256_s4`, `wgmma_128x128_s6`, `wgmma_128x64_s8`, found `wgmma_128x65`; \
         measure anew with `hadal bench kernels --tune`"
    );
    assert_eq!(
        refused(vec![row(key, "wgmma_128x64_s8"), row(key, "wgmma_128x128_s6")]),
        "rows 1 and 2 are of the same product (bf16 NT into bf16, [8, 16, 24] on 132 SMs); keep one of them"
    );
    let error = Table::from_ron("(device: \"x\", sms: 3)").unwrap_err().to_string();
    assert!(error.starts_with("a tuning table should be what `hadal bench kernels --tune` writes: 1:"), "{error}");
}

#[test]
fn a_table_of_another_device_is_refused() {
    let target =
        |num_sms| crate::device::Target { compute: (9, 0), num_sms, shared_bytes: 0, share: Share::All, tuning: None };
    let info = |name: &str, num_sms| GpuInfo {
        ordinal: 1,
        name: name.into(),
        target: target(num_sms),
        memory_bytes: 0,
        driver_version: 0,
        problem: None,
    };
    let table = table(vec![]);
    assert!(table.check(&info("NVIDIA H200", 132)).is_ok());
    for other in [info("NVIDIA H200", 114), info("NVIDIA H100", 132)] {
        let expected = format!(
            "cuda:1 cannot be used: expected a tuning table measured on {} with {} multiprocessors, found one of NVIDIA H200 \
             with 132; measure one there with `hadal bench kernels --tune FILE`, or go without",
            other.name, other.target.num_sms
        );
        assert_eq!(table.check(&other).unwrap_err().to_string(), expected);
    }
}
