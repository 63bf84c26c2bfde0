//! What this machine is: processor, memory, disk. Linux tells it in files; where there are none, it stays unknown.

use std::{fs, path::Path};

/// Name of the processor.
pub fn cpu_model() -> Option<String> {
    value(&fs::read_to_string("/proc/cpuinfo").ok()?, "model name").map(str::to_owned)
}

/// Physical cores. Two threads of one core have the same pair of ids.
pub fn num_cores() -> Option<usize> {
    let text = fs::read_to_string("/proc/cpuinfo").ok()?;
    let processors =
        text.split("\n\n").filter_map(|block| Some((value(block, "physical id")?, value(block, "core id")?)));
    let cores = processors.collect::<std::collections::BTreeSet<_>>().len();
    (cores > 0).then_some(cores)
}

/// Hardware threads that this process may use.
pub fn num_threads() -> Option<usize> {
    std::thread::available_parallelism().ok().map(std::num::NonZero::get)
}

/// Vector instructions that the ops choose among at run time, widest first: which of them there are.
pub fn simd() -> Vec<(&'static str, bool)> {
    #[cfg(target_arch = "x86_64")]
    return vec![
        ("AVX-512_BF16", std::arch::is_x86_feature_detected!("avx512bf16")),
        ("AVX-512", std::arch::is_x86_feature_detected!("avx512f")),
        ("AVX2", std::arch::is_x86_feature_detected!("avx2")),
    ];
    #[cfg(target_arch = "aarch64")]
    return vec![("NEON", std::arch::is_aarch64_feature_detected!("neon"))];
    #[cfg(not(any(target_arch = "x86_64", target_arch = "aarch64")))]
    return Vec::new();
}

/// Memory, all of it and what is free to use, in bytes.
pub fn memory_bytes() -> Option<(u64, u64)> {
    let text = fs::read_to_string("/proc/meminfo").ok()?;
    let bytes = |key| value(&text, key)?.strip_suffix(" kB")?.parse::<u64>().ok().map(|kib| kib << 10);
    Some((bytes("MemTotal")?, bytes("MemAvailable")?))
}

/// Bytes that may still be written to the disk of `folder`.
///
/// # Errors
/// The system's.
pub fn disk_free_bytes(folder: &Path) -> std::io::Result<u64> {
    let stat = rustix::fs::statvfs(folder)?;
    Ok(stat.f_bavail * stat.f_frsize)
}

/// Version of the NVIDIA driver, if one is loaded.
pub fn nvidia_driver() -> Option<String> {
    let text = fs::read_to_string("/proc/driver/nvidia/version").ok()?;
    let is_version = |word: &&str| word.contains('.') && word.chars().all(|c| c.is_ascii_digit() || c == '.');
    text.split_whitespace().find(is_version).map(str::to_owned)
}

/// The value of the first line `key : value`.
fn value<'a>(text: &'a str, key: &str) -> Option<&'a str> {
    let fields = text.lines().filter_map(|line| line.split_once(':'));
    fields.into_iter().find(|(name, _)| name.trim() == key).map(|(_, value)| value.trim())
}
