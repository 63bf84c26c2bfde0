//! Numbers that nobody had before, from the operating system: seeds of those who gave none, and names of answers. No result that a
//! caller fixed with a seed depends on them.

use std::sync::atomic::{AtomicU64, Ordering};

/// 53 bits, so that a client in any language can write it down.
pub(super) fn number() -> u64 {
    static COUNT: AtomicU64 = AtomicU64::new(1);
    let mut bytes = [0; 8];
    match getrandom::fill(&mut bytes) {
        Ok(()) => u64::from_le_bytes(bytes) >> 11,
        // An early boot, or a jail without the call: still a different one each time.
        Err(_) => COUNT.fetch_add(1, Ordering::Relaxed),
    }
}

/// A name: `prefix-` and digits.
pub(super) fn name(prefix: &str) -> String {
    format!("{prefix}-{:014x}{:014x}", number(), number())
}
