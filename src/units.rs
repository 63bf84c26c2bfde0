//! Numbers with units, for people.

/// `1234567` as `1,234,567`.
pub fn grouped(value: u64) -> String {
    let digits = value.to_string();
    let mut text = String::with_capacity(digits.len() + digits.len() / 3);
    for (i, digit) in digits.chars().enumerate() {
        if i > 0 && (digits.len() - i).is_multiple_of(3) {
            text.push(',');
        }
        text.push(digit);
    }
    text
}

/// A count in thousands, millions or billions, with two decimals: `671.03B`. Below a thousand as it is.
pub fn count(value: u64) -> String {
    match scaled(value as f64, &["", "K", "M", "B", "T"], 1000.0) {
        (_, "") => value.to_string(),
        (value, unit) => format!("{value:.2}{unit}"),
    }
}

/// A value of a unit with a decimal prefix, with one decimal: `250.5 GFLOP`.
pub fn metric(value: f64, unit: &str) -> String {
    let (value, prefix) = scaled(value, &["", "k", "M", "G", "T", "P"], 1000.0);
    format!("{value:.1} {prefix}{unit}")
}

/// Bytes in powers of 1024, with one decimal: `1.5 GiB`.
pub fn bytes(value: u64) -> String {
    match scaled(value as f64, &["B", "KiB", "MiB", "GiB", "TiB"], 1024.0) {
        (_, "B") => format!("{value} B"),
        (value, unit) => format!("{value:.1} {unit}"),
    }
}

/// The largest unit in which the value is at least 1. What would be printed as 1000.00 is 1.00 of the next.
fn scaled<'a>(mut value: f64, units: &[&'a str], step: f64) -> (f64, &'a str) {
    let mut unit = 0;
    while value >= step - 0.005 && unit + 1 < units.len() {
        value /= step;
        unit += 1;
    }
    (value, units[unit])
}

/// A duration in seconds, as its two largest units: `1h 2m`, `2m 31s`, `4.2 s`, `35 ms`.
pub fn duration(secs: f64) -> String {
    if !secs.is_finite() || secs < 0.0 {
        return "unknown".into();
    }
    if secs < 0.9995 {
        return format!("{:.0} ms", secs * 1e3);
    }
    if secs < 59.95 {
        return format!("{secs:.1} s");
    }
    let secs = secs.round() as u64;
    let (days, hours, minutes) = (secs / 86_400, secs / 3600 % 24, secs / 60 % 60);
    match (days, hours) {
        (0, 0) => format!("{minutes}m {:02}s", secs % 60),
        (0, _) => format!("{hours}h {minutes:02}m"),
        _ => format!("{days}d {hours:02}h"),
    }
}

/// A size with a unit: `5GB`, `200 MiB`.
///
/// # Errors
/// What is wrong with the text.
pub fn parse_bytes(text: &str) -> Result<u64, String> {
    const UNITS: [(&str, u64); 7] = [
        ("b", 1),
        ("kb", 1_000),
        ("mb", 1_000_000),
        ("gb", 1_000_000_000),
        ("kib", 1 << 10),
        ("mib", 1 << 20),
        ("gib", 1 << 30),
    ];
    let at = text.find(|c: char| !c.is_ascii_digit() && c != '.').unwrap_or(text.len());
    let (number, unit) = text.split_at(at);
    let number: f64 = number.parse().map_err(|_| "expected a number with a unit, such as 5GB".to_owned())?;
    let unit = unit.trim();
    if unit.is_empty() {
        return Err(format!("has no unit; {text}GB, {text}MB?"));
    }
    let known = UNITS.iter().find(|(name, _)| unit.eq_ignore_ascii_case(name));
    let (_, factor) = known.ok_or_else(|| format!("unknown unit `{unit}`; kB, MB, GB, KiB, MiB, GiB"))?;
    match (number * *factor as f64) as u64 {
        0 => Err("must be more than nothing".into()),
        bytes => Ok(bytes),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counts_and_sizes() {
        let counts =
            [(0, "0"), (999, "999"), (1_000, "1.00K"), (15_706_484_224, "15.71B"), (671_026_419_200, "671.03B")];
        for (value, text) in counts {
            assert_eq!(count(value), text);
        }
        assert_eq!(count(999_996), "1.00M");
        for (value, text) in
            [(0, "0 B"), (1023, "1023 B"), (1536, "1.5 KiB"), (5 << 30, "5.0 GiB"), (1 << 40, "1.0 TiB")]
        {
            assert_eq!(bytes(value), text);
        }
        for (value, text) in [(0, "0"), (999, "999"), (1000, "1,000"), (1_234_567, "1,234,567")] {
            assert_eq!(grouped(value), text);
        }
    }

    #[test]
    fn durations() {
        let cases = [
            (0.0, "0 ms"),
            (0.035, "35 ms"),
            (0.9996, "1.0 s"),
            (59.94, "59.9 s"),
            (59.96, "1m 00s"),
            (151.0, "2m 31s"),
            (3720.0, "1h 02m"),
            (90_000.0, "1d 01h"),
            (f64::NAN, "unknown"),
        ];
        for (secs, text) in cases {
            assert_eq!(duration(secs), text);
        }
    }

    #[test]
    fn sizes_are_read_with_their_unit() {
        for (text, expected) in [("5GB", 5_000_000_000), ("200 MiB", 200 << 20), ("1.5kb", 1500), ("7b", 7)] {
            assert_eq!(parse_bytes(text), Ok(expected), "{text}");
        }
        for text in ["", "GB", "5", "5 apples", "-1GB", "0GB", "1.2.3GB"] {
            assert!(parse_bytes(text).is_err(), "{text}");
        }
    }
}
