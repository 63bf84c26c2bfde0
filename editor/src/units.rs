//! Numbers for people: three digits and a unit.

/// Nanoseconds as `1.23 ms`.
pub fn nanos(nanos: f64) -> String {
    secs(nanos * 1e-9)
}

/// Seconds as `1.23 ms`.
pub fn secs(secs: f64) -> String {
    let size = secs.abs();
    let (scale, unit) = match size {
        _ if size == 0.0 => return "0 s".into(),
        _ if size < 1e-6 => (1e9, "ns"),
        _ if size < 1e-3 => (1e6, "us"),
        _ if size < 1.0 => (1e3, "ms"),
        _ if size < 120.0 => (1.0, "s"),
        _ if size < 7200.0 => (1.0 / 60.0, "min"),
        _ if size < 172_800.0 => (1.0 / 3600.0, "h"),
        _ => (1.0 / 86_400.0, "days"),
    };
    format!("{} {unit}", three(secs * scale))
}

/// Bytes as `1.23 GiB`.
pub fn bytes(bytes: f64) -> String {
    let units = ["B", "KiB", "MiB", "GiB", "TiB", "PiB"];
    let mut value = bytes;
    let mut unit = 0;
    while value.abs() >= 1024.0 && unit + 1 < units.len() {
        value /= 1024.0;
        unit += 1;
    }
    format!("{} {}", three(value), units[unit])
}

/// A count as `1.23 M`.
pub fn count(count: f64) -> String {
    let (scale, unit) = match count.abs() {
        size if size < 1e3 => (1.0, ""),
        size if size < 1e6 => (1e-3, " K"),
        size if size < 1e9 => (1e-6, " M"),
        size if size < 1e12 => (1e-9, " B"),
        _ => (1e-12, " T"),
    };
    format!("{}{unit}", three(count * scale))
}

/// A share as `12.3%`.
pub fn percent(share: f64) -> String {
    format!("{:.1}%", 100.0 * share)
}

/// With three digits, whole numbers without a point.
pub fn three(value: f64) -> String {
    let size = value.abs();
    let decimals = match size {
        _ if size >= 100.0 || value.fract() == 0.0 => 0,
        _ if size >= 10.0 => 1,
        _ if size >= 0.01 => 2,
        _ => return format!("{value:.2e}"),
    };
    format!("{value:.decimals$}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_have_three_digits_and_a_unit() {
        assert_eq!([nanos(999.0), nanos(1500.0), nanos(2.5e9)], ["999 ns", "1.50 us", "2.50 s"]);
        assert_eq!([secs(0.0), secs(600.0), secs(7200.0)], ["0 s", "10 min", "2 h"]);
        assert_eq!([bytes(512.0), bytes(1536.0), bytes(80.0 * 1073741824.0)], ["512 B", "1.50 KiB", "80 GiB"]);
        assert_eq!([count(7.0), count(15616.0), count(671e9)], ["7", "15.6 K", "671 B"]);
        assert_eq!([percent(0.1234), three(0.003)], ["12.3%", "3.00e-3"]);
    }
}
