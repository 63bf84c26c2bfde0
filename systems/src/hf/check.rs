//! Checks of single values, which report what they find and go on.

use crate::problem::Problem;

/// Collects problems. A getter that reports one returns `None`, and the checks that need its value are left out.
#[derive(Default)]
pub(super) struct Check {
    /// What was found so far.
    pub(super) problems: Vec<Problem>,
}

impl Check {
    /// Adds a problem with advice.
    pub(super) fn report(&mut self, path: &str, message: impl Into<String>, help: impl Into<String>) {
        self.problems.push(Problem::new(path, message).help(help));
    }

    /// A required number from 1 to `max`.
    pub(super) fn size(&mut self, path: &str, value: Option<usize>, max: usize) -> Option<usize> {
        match value {
            None => self.report(path, "required, but absent", format!("a number from 1 to {max}")),
            Some(n) if n == 0 || n > max => {
                let nearest = n.clamp(1, max);
                self.report(path, format!("expected 1 to {max}, found {n}"), format!("the nearest is {nearest}"));
            }
            Some(n) => return Some(n),
        }
        None
    }

    /// A required number from 0 to `max`.
    pub(super) fn count(&mut self, path: &str, value: Option<usize>, max: usize) -> Option<usize> {
        match value {
            None => self.report(path, "required, but absent", format!("a number from 0 to {max}")),
            Some(n) if n > max => {
                self.report(path, format!("expected at most {max}, found {n}"), format!("the nearest is {max}"));
            }
            Some(n) => return Some(n),
        }
        None
    }

    /// A finite number above `low` (or equal to it, if `or_equal`).
    pub(super) fn number(&mut self, path: &str, value: f64, low: f64, or_equal: bool) -> f64 {
        if !(value.is_finite() && (value > low || or_equal && value == low)) {
            let relation = if or_equal { "at least" } else { "above" };
            self.report(path, format!("expected a number {relation} {low}, found {value}"), "check the value");
        }
        value
    }

    /// One of some names.
    pub(super) fn choice<T: Copy>(&mut self, path: &str, value: Option<&str>, names: &[(&str, T)]) -> Option<T> {
        let list = names.iter().map(|(name, _)| format!("`{name}`")).collect::<Vec<_>>().join(", ");
        let Some(value) = value else {
            self.report(path, "required, but absent", format!("one of {list}"));
            return None;
        };
        if let Some((_, found)) = names.iter().find(|(name, _)| *name == value) {
            return Some(*found);
        }
        let similarity = |name: &str| strsim::jaro_winkler(name, value);
        let nearest = names.iter().map(|(name, _)| *name).max_by(|a, b| similarity(a).total_cmp(&similarity(b)));
        let help = match nearest {
            Some(name) if similarity(name) > 0.8 => format!("did you mean `{name}`? Known are {list}"),
            _ => format!("one of {list}"),
        };
        self.report(path, format!("unsupported value `{value}`"), help);
        None
    }

    /// A key that may only be absent or have one value.
    pub(super) fn only<T: PartialEq + std::fmt::Debug>(
        &mut self,
        path: &str,
        value: &Option<T>,
        supported: T,
        why: &str,
    ) {
        if let Some(value) = value.as_ref().filter(|value| **value != supported) {
            self.report(
                path,
                format!("unsupported value {value:?}: {why}"),
                format!("only {supported:?} is supported"),
            );
        }
    }

    /// Rotary widths are pairs.
    pub(super) fn even(&mut self, path: &str, value: Option<usize>) {
        if let Some(odd) = value.filter(|n| n % 2 == 1) {
            let help = format!("the nearest are {} and {}", odd - 1, odd + 1);
            self.report(path, format!("rotary pairs need an even width, found {odd}"), help);
        }
    }
}

/// The divisors of `n` on both sides of `near`.
pub(super) fn nearest_divisors(n: usize, near: usize) -> String {
    let below = (1..=near.min(n)).rev().find(|k| n.is_multiple_of(*k));
    let above = (near..=n).find(|k| n.is_multiple_of(*k));
    match (below, above) {
        (Some(below), Some(above)) => format!("the nearest are {below} and {above}"),
        (Some(only), None) | (None, Some(only)) => format!("the nearest is {only}"),
        (None, None) => "1".into(),
    }
}
