//! What the stand-in pretends to be, from the environment.

use std::str::FromStr;

/// See the table in the crate's documentation.
pub(crate) struct Settings {
    pub(crate) seed: u64,
    pub(crate) num_devices: i32,
    pub(crate) driver: i32,
    pub(crate) compute: (i32, i32),
    pub(crate) num_sms: i32,
    pub(crate) memory_bytes: u64,
    pub(crate) refuse: Option<String>,
    pub(crate) stats: bool,
    pub(crate) uuid: u128,
}

/// The device's bus, by which other libraries know it too; never the first of a machine, nor 0.
pub(crate) const BUS: i32 = 0x3b;

/// What the energy counter grows by with each reading, if there is one.
pub(crate) fn millijoules() -> Option<u64> {
    std::env::var("PTXSIM_MILLIJOULES").ok()?.parse().ok()
}

/// What is drawn, if that can be told.
pub(crate) fn milliwatts() -> Option<u32> {
    std::env::var("PTXSIM_MILLIWATTS").ok()?.parse().ok()
}

fn number<T: FromStr>(name: &str, default: T) -> T {
    let Ok(text) = std::env::var(name) else { return default };
    text.parse().unwrap_or_else(|_| {
        eprintln!("ptxsim: {name} should be a number, found `{text}`");
        default
    })
}

impl Settings {
    pub(crate) fn read() -> Self {
        let compute = std::env::var("PTXSIM_COMPUTE").ok().and_then(|text| {
            let (major, minor) = text.split_once('.')?;
            Some((major.parse().ok()?, minor.parse().ok()?))
        });
        Settings {
            seed: number("PTXSIM_SEED", 1),
            num_devices: number("PTXSIM_DEVICES", 1).clamp(0, 1),
            driver: number("PTXSIM_DRIVER", 12040),
            compute: compute.unwrap_or((9, 0)),
            num_sms: number("PTXSIM_SMS", 4),
            memory_bytes: number("PTXSIM_MEMORY", 1 << 30),
            refuse: std::env::var("PTXSIM_REFUSE").ok(),
            uuid: number("PTXSIM_UUID", 0xADA1 << 64 | u128::from(std::process::id())),
            stats: std::env::var_os("PTXSIM_STATS").is_some(),
        }
    }
}
