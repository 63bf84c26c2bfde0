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

/// A mark of an axis whose marks are `step` apart: short whatever its size, and told apart from its neighbors.
pub fn tick(value: f64, step: f64) -> String {
    let (size, power) = (value.abs(), |value: f64| value.log10().floor());
    if size < step * 1e-6 {
        return "0".into();
    }
    let decimals = (-power(step * 1.000_001)).max(0.0);
    if size < 1e6 && decimals <= 4.0 {
        return format!("{value:.0$}", decimals as usize);
    }
    let digits = (power(size * 1.000_001) - power(step * 1.000_001)).clamp(0.0, 4.0);
    format!("{value:.0$e}", digits as usize)
}

/// A mark of an axis of powers of ten, which has few digits.
pub fn log_tick(value: f64) -> String {
    if !(1e-2..1e4).contains(&value.abs()) {
        return format!("{value:.1e}").replace(".0e", "e");
    }
    let text = three(value);
    if text.contains('.') { text.trim_end_matches('0').trim_end_matches('.').to_owned() } else { text }
}

/// With three digits, whole numbers without a point; very large and very small ones as powers of ten.
pub fn three(value: f64) -> String {
    let size = value.abs();
    let decimals = match size {
        _ if !value.is_finite() => return value.to_string(),
        _ if size >= 1e9 => return format!("{value:.2e}"),
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
    fn numbers_are_short_whatever_their_size() {
        assert_eq!(
            [three(1e30), three(-2.5e12), three(f64::INFINITY), three(f64::NAN)],
            ["1.00e30", "-2.50e12", "inf", "NaN"]
        );
        assert_eq!([count(1e30), secs(f64::NAN)], ["1.00e18 T", "NaN days"]);
        assert_eq!([0.5, 20.0, 1e8, 1.5e-7].map(log_tick), ["0.5", "20", "1e8", "1.5e-7"]);
        let ticks = |values: [f64; 3], step| values.map(|value| tick(value, step));
        assert_eq!(ticks([0.0, 0.003, -0.001], 0.001), ["0", "0.003", "-0.001"]);
        assert_eq!(ticks([4.64, 4.6402, 4.6404], 0.0002), ["4.6400", "4.6402", "4.6404"]);
        assert_eq!(ticks([0.0, 20_000.0, 150_000.0], 10_000.0), ["0", "20000", "150000"]);
        assert_eq!(ticks([-5e29, 5e29, 1e30], 5e29), ["-5e29", "5e29", "1.0e30"]);
        assert_eq!(ticks([2e-6, 4e-6, 1e300], 2e-6), ["2e-6", "4e-6", "1.0000e300"]);
    }

    #[test]
    fn numbers_have_three_digits_and_a_unit() {
        assert_eq!([nanos(999.0), nanos(1500.0), nanos(2.5e9)], ["999 ns", "1.50 us", "2.50 s"]);
        assert_eq!([secs(0.0), secs(600.0), secs(7200.0)], ["0 s", "10 min", "2 h"]);
        assert_eq!([bytes(512.0), bytes(1536.0), bytes(80.0 * 1073741824.0)], ["512 B", "1.50 KiB", "80 GiB"]);
        assert_eq!([count(7.0), count(15616.0), count(671e9)], ["7", "15.6 K", "671 B"]);
        assert_eq!([percent(0.1234), three(0.003)], ["12.3%", "3.00e-3"]);
    }
}
