//! The one place that reads the wall clock: nanoseconds since the process first asked.

use std::{sync::OnceLock, time::Instant};

/// Monotonic nanoseconds since the first call in this process.
#[expect(clippy::disallowed_methods, reason = "this is the clock that everything else must use")]
pub fn now_nanos() -> u64 {
    static START: OnceLock<Instant> = OnceLock::new();
    START.get_or_init(Instant::now).elapsed().as_nanos() as u64
}
