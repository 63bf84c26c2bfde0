//! Texts of the usual variants, committed as `kernels/ptx/<arch>_<name>.ptx` so that a change of a kernel is seen as a change
//! of PTX. A device looks here before it has a kernel emitted.
//!
//! To add kernels, list them in their module's `variants` and the module in [`variants`]; then
//! `UPDATE_GOLDEN=1 cargo test -p kernels --lib ptx::golden` writes the files. The build script makes the table of them.

use super::{
    Arch, Kernel, adamw, attention, balance, cross_entropy, dequantize, e5m6, elementwise, embedding, fp8_gemm, gate,
    gemm, gemv, latent, latent_fp8, mla, norm, paged, permute, quantize, rms_norm, rope, sampling, sum_parts, swiglu,
};

include!(concat!(env!("OUT_DIR"), "/golden.rs"));

/// A kernel whose text is committed.
pub struct Variant {
    /// The kernel.
    pub kernel: Kernel,
    /// Registers a thread that it may use: assembled for sm_80 and for sm_90a, by ptxas 12.4 and 13.0.
    pub max_registers: u32,
}

impl Variant {
    /// One of a list.
    pub fn new(kernel: Kernel, max_registers: u32) -> Self {
        Variant { kernel, max_registers }
    }
}

/// All of them.
pub fn variants() -> Vec<Variant> {
    [
        adamw::variants(),
        attention::variants(),
        balance::variants(),
        cross_entropy::variants(),
        dequantize::variants(),
        e5m6::variants(),
        elementwise::variants(),
        embedding::variants(),
        fp8_gemm::variants(),
        gate::variants(),
        gemm::variants(),
        gemv::variants(),
        latent::variants(),
        latent_fp8::variants(),
        mla::variants(),
        norm::variants(),
        paged::variants(),
        permute::variants(),
        quantize::variants(),
        rms_norm::variants(),
        rope::variants(),
        sampling::variants(),
        sum_parts::variants(),
        swiglu::variants(),
    ]
    .into_iter()
    .flatten()
    .collect()
}

/// A committed file's stem.
pub fn stem(arch: Arch, name: &str) -> String {
    format!("{}_{name}", arch.target())
}

/// The committed text of a kernel.
pub fn text(arch: Arch, name: &str) -> Option<&'static str> {
    let stem = stem(arch, name);
    FILES.binary_search_by(|(file, _)| (*file).cmp(&stem)).ok().map(|i| FILES[i].1)
}

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "tests")]
mod tests {
    use std::{collections::BTreeMap, fs, path::Path};

    use super::*;

    #[test]
    fn committed_texts_are_what_kernels_emit() {
        let mut want = BTreeMap::new();
        for Variant { kernel, .. } in variants() {
            let file = stem(kernel.arch, &kernel.name);
            assert!(want.insert(file.clone(), (kernel.emit)()).is_none(), "two variants are called {file}");
        }
        let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("ptx");
        if std::env::var_os("UPDATE_GOLDEN").is_some() {
            let _ = fs::remove_dir_all(&folder);
            fs::create_dir_all(&folder).unwrap();
            for (file, text) in &want {
                fs::write(folder.join(format!("{file}.ptx")), text).unwrap();
            }
            return;
        }
        let hint = "bless with UPDATE_GOLDEN=1 if that is meant";
        let got: BTreeMap<String, &str> = FILES.iter().map(|(file, text)| ((*file).to_owned(), *text)).collect();
        for (file, text) in &want {
            let got = got.get(file).unwrap_or_else(|| panic!("kernels/ptx/{file}.ptx is missing; {hint}"));
            let line = got.lines().zip(text.lines()).position(|(a, b)| a != b).map_or(0, |line| line + 1);
            assert!(got == text, "kernels/ptx/{file}.ptx, line {line}: the kernel emits another text; {hint}");
        }
        for file in got.keys() {
            assert!(want.contains_key(file), "kernels/ptx/{file}.ptx is no variant's; {hint}");
        }
    }

    #[test]
    fn texts_are_found_by_name() {
        for (file, text) in FILES {
            let name = [Arch::Sm90a, Arch::Sm90, Arch::Sm80].iter().find_map(|arch| {
                let name = file.strip_prefix(arch.target())?.strip_prefix('_')?;
                super::text(*arch, name)
            });
            assert_eq!(name, Some(*text), "{file}");
        }
        assert_eq!(text(Arch::Sm80, "no_such_kernel"), None);
    }
}
