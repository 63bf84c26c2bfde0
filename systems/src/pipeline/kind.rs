//! The schedules by name, and which numbers of ranks and microbatches each of them takes.

use std::{fmt, str::FromStr};

use super::{
    action::Schedule,
    dualpipe::dualpipe,
    dualpipev::dualpipev,
    gpipe::gpipe,
    interleaved::interleaved,
    one_f_one_b::one_f_one_b,
    places::MAX_PLACES,
    zbv::zbv,
    zero_bubble::{zb_h1, zb_h2},
};

/// A schedule that can be built for any number of ranks and microbatches that it takes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum ScheduleKind {
    /// [`gpipe`].
    GPipe,
    /// [`one_f_one_b`].
    OneFOneB,
    /// [`interleaved`].
    Interleaved {
        /// Stages that a rank holds, 2 or more.
        chunks: u32,
    },
    /// [`zb_h1`].
    ZbH1,
    /// [`zb_h2`].
    ZbH2,
    /// [`zbv`].
    Zbv,
    /// [`dualpipe`].
    DualPipe,
    /// [`dualpipev`].
    DualPipeV,
}

/// Those without a parameter, by name; `zb1p` is another name of `zb-h1`.
const NAMES: [(&str, ScheduleKind); 7] = [
    ("gpipe", ScheduleKind::GPipe),
    ("1f1b", ScheduleKind::OneFOneB),
    ("zb-h1", ScheduleKind::ZbH1),
    ("zb-h2", ScheduleKind::ZbH2),
    ("zbv", ScheduleKind::Zbv),
    ("dualpipe", ScheduleKind::DualPipe),
    ("dualpipev", ScheduleKind::DualPipeV),
];

impl ScheduleKind {
    /// What [`FromStr`] reads.
    pub fn name(self) -> String {
        match self {
            ScheduleKind::Interleaved { chunks } => format!("interleaved:{chunks}"),
            other => NAMES.iter().find(|(_, kind)| *kind == other).map_or_else(String::new, |(name, _)| (*name).into()),
        }
    }

    /// Stages that a rank holds of one copy of the model.
    pub fn stages_per_rank(self) -> u32 {
        match self {
            ScheduleKind::Interleaved { chunks } => chunks,
            ScheduleKind::Zbv | ScheduleKind::DualPipeV => 2,
            _ => 1,
        }
    }

    /// The schedule of `ranks` ranks for `microbatches` microbatches.
    ///
    /// # Errors
    /// All constraints that do not hold, each with the nearest values for which it does.
    pub fn build(self, ranks: u32, microbatches: u32) -> Result<Schedule, ScheduleError> {
        let unmet = self.unmet(ranks.into(), microbatches.into());
        if !unmet.is_empty() {
            let nearest = self.nearest(ranks.into(), microbatches.into());
            return Err(ScheduleError { kind: self, ranks, microbatches, unmet, nearest });
        }
        Ok(match self {
            ScheduleKind::GPipe => gpipe(ranks, microbatches),
            ScheduleKind::OneFOneB => one_f_one_b(ranks, microbatches),
            ScheduleKind::Interleaved { chunks } => interleaved(ranks, microbatches, chunks),
            ScheduleKind::ZbH1 => zb_h1(ranks, microbatches),
            ScheduleKind::ZbH2 => zb_h2(ranks, microbatches),
            ScheduleKind::Zbv => zbv(ranks, microbatches),
            ScheduleKind::DualPipe => dualpipe(ranks, microbatches),
            ScheduleKind::DualPipeV => dualpipev(ranks, microbatches),
        })
    }

    /// What keeps a schedule from being built; in u64, since twice the ranks may not fit 32 bits.
    fn unmet(self, ranks: u64, microbatches: u64) -> Vec<Unmet> {
        let mut unmet = Vec::new();
        let mut need = |holds: bool, what: String, found: u64, nearest: &[u64]| {
            if !holds {
                let mut nearest: Vec<u64> = nearest.iter().copied().filter(|value| *value > 0).collect();
                nearest.dedup();
                unmet.push(Unmet { what, found, nearest });
            }
        };
        let least = if self == ScheduleKind::DualPipe { 2 } else { 1 };
        need(ranks >= 1, format!("the number of ranks must be {least} or more"), ranks, &[least]);
        need(microbatches >= 1, "the number of microbatches must be 1 or more".into(), microbatches, &[1]);
        match self {
            ScheduleKind::Interleaved { chunks } => {
                let what = "the chunks of a rank must be 2 or more (with 1 it is `1f1b`)";
                need(chunks >= 2, what.into(), chunks.into(), &[2]);
                if ranks >= 1 && microbatches >= 1 {
                    let below = microbatches / ranks * ranks;
                    let what = format!("the number of microbatches must be a multiple of the ranks ({ranks})");
                    need(microbatches.is_multiple_of(ranks), what, microbatches, &[below, below + ranks]);
                }
            }
            ScheduleKind::DualPipe => {
                let what = "the number of ranks must be even".into();
                need(ranks.is_multiple_of(2), what, ranks, &[ranks.saturating_sub(1), ranks + 1]);
                let what = "the number of microbatches must be even".into();
                let around = [microbatches.saturating_sub(1), microbatches + 1].map(|m| m.max(2 * ranks));
                need(microbatches.is_multiple_of(2), what, microbatches, &around);
            }
            _ => {}
        }
        if matches!(self, ScheduleKind::DualPipe | ScheduleKind::DualPipeV) && microbatches >= 1 {
            let what = format!("the number of microbatches must be at least twice the ranks (2 * {ranks})");
            need(microbatches >= 2 * ranks, what, microbatches, &[2 * ranks]);
        }
        let stages = ranks.saturating_mul(self.stages_per_rank().into());
        // The list of a ZBV rank is written for as many as it is made for.
        let written = if self == ScheduleKind::Zbv { microbatches.max(2 * ranks) } else { microbatches };
        let most = MAX_PLACES / stages.max(1);
        let what = format!("stages times microbatches must be at most {MAX_PLACES} ({stages} stages)");
        need(stages.saturating_mul(written) <= MAX_PLACES, what, microbatches, &[most]);
        unmet
    }

    /// Valid pairs of ranks and microbatches next to those asked for; fewer and more ranks if the ranks are the fault.
    fn nearest(self, ranks: u64, microbatches: u64) -> Vec<(u64, u64)> {
        if matches!(self, ScheduleKind::Interleaved { chunks: ..2 }) {
            return Vec::new();
        }
        let microbatches_for = |ranks: u64| {
            let least = match self {
                ScheduleKind::DualPipe | ScheduleKind::DualPipeV => 2 * ranks,
                _ => 1,
            };
            let at_least = microbatches.max(least);
            match self {
                ScheduleKind::Interleaved { .. } => at_least.div_ceil(ranks) * ranks,
                ScheduleKind::DualPipe => at_least.next_multiple_of(2),
                _ => at_least,
            }
        };
        let valid = |ranks: u64| {
            let pair = (ranks, microbatches_for(ranks));
            self.unmet(pair.0, pair.1).is_empty().then_some(pair)
        };
        let is_valid_rank = |ranks: u64| ranks >= 1 && (self != ScheduleKind::DualPipe || ranks.is_multiple_of(2));
        let candidates = match ranks {
            0 => vec![1, 2],
            ranks if is_valid_rank(ranks) => vec![ranks],
            ranks => vec![ranks - 1, ranks + 1],
        };
        let pairs = candidates.into_iter().filter(|ranks| is_valid_rank(*ranks)).filter_map(valid);
        // Without ranks, the first that can be is near enough.
        pairs.take(if ranks == 0 { 1 } else { 2 }).collect()
    }
}

impl fmt::Display for ScheduleKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.name())
    }
}

/// A name that is no schedule.
#[derive(Clone, Debug, thiserror::Error, PartialEq, Eq)]
pub enum ParseKindError {
    /// No such name.
    #[error(
        "there is no schedule `{found}`; did you mean `{nearest}`? \
         There are gpipe, 1f1b, interleaved:2 (or more), zb-h1, zb-h2, zbv, dualpipe, dualpipev"
    )]
    Unknown {
        /// What was read.
        found: String,
        /// The name most like it.
        nearest: &'static str,
    },
    /// No number of chunks.
    #[error("`interleaved` needs the number of chunks of a rank, as in `interleaved:2`; found `{0}`")]
    Chunks(String),
}

impl FromStr for ScheduleKind {
    type Err = ParseKindError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        if let Some(chunks) = text.strip_prefix("interleaved") {
            let chunks = chunks.strip_prefix(':').and_then(|chunks| chunks.parse().ok());
            let chunks = chunks.ok_or_else(|| ParseKindError::Chunks(text.into()))?;
            return Ok(ScheduleKind::Interleaved { chunks });
        }
        let mut names = NAMES.iter().copied().chain([("zb1p", ScheduleKind::ZbH1)]);
        if let Some((_, kind)) = names.find(|(name, _)| *name == text) {
            return Ok(kind);
        }
        let similarity = |name: &str| strsim::jaro_winkler(name, &text.to_lowercase());
        let names = NAMES.iter().map(|(name, _)| *name).chain(["interleaved:2"]);
        let nearest = names.max_by(|a, b| similarity(a).total_cmp(&similarity(b))).unwrap_or_default();
        Err(ParseKindError::Unknown { found: text.into(), nearest })
    }
}

/// A constraint that does not hold.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Unmet {
    /// What must hold.
    pub what: String,
    /// What is the case.
    pub found: u64,
    /// Values next to it for which it would hold; none if there are none.
    pub nearest: Vec<u64>,
}

/// Ranks and microbatches that a schedule does not take.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ScheduleError {
    /// The schedule.
    pub kind: ScheduleKind,
    /// Ranks asked for.
    pub ranks: u32,
    /// Microbatches asked for.
    pub microbatches: u32,
    /// All that does not hold.
    pub unmet: Vec<Unmet>,
    /// Ranks and microbatches near to those asked for, with which all holds.
    pub nearest: Vec<(u64, u64)>,
}

impl fmt::Display for ScheduleError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let ScheduleError { kind, ranks, microbatches, unmet, nearest } = self;
        write!(f, "no {kind} schedule for ranks = {ranks} and microbatches = {microbatches}")?;
        for Unmet { what, found, nearest } in unmet {
            write!(f, "\n  {what}, but is {found}")?;
            for (i, value) in nearest.iter().enumerate() {
                write!(f, "{} {value}", if i == 0 { "; nearest:" } else { " or" })?;
            }
        }
        for (i, (ranks, microbatches)) in nearest.iter().enumerate() {
            write!(f, "{}", if i == 0 { "\n  valid:" } else { " or" })?;
            write!(f, " ranks = {ranks} with microbatches = {microbatches}")?;
        }
        Ok(())
    }
}

impl std::error::Error for ScheduleError {}

#[cfg(test)]
mod tests {
    #![expect(clippy::unwrap_used, reason = "tests")]
    use super::*;

    #[test]
    fn names_round_trip() {
        let names =
            ["gpipe", "1f1b", "interleaved:2", "interleaved:4", "zb-h1", "zb-h2", "zbv", "dualpipe", "dualpipev"];
        for name in names {
            assert_eq!(name.parse::<ScheduleKind>().unwrap().to_string(), name);
        }
        assert_eq!("zb1p".parse(), Ok(ScheduleKind::ZbH1));
    }

    #[test]
    fn wrong_names_get_the_nearest() {
        for (name, said) in [
            ("dualpip", "did you mean `dualpipe`?"),
            ("DualPipeV", "did you mean `dualpipev`?"),
            ("zbh1", "did you mean `zb-h1`?"),
            ("interleaved", "as in `interleaved:2`; found `interleaved`"),
            ("interleaved:x", "as in `interleaved:2`; found `interleaved:x`"),
        ] {
            let error = name.parse::<ScheduleKind>().unwrap_err().to_string();
            assert!(error.contains(said), "{error}");
        }
    }

    #[test]
    fn all_unmet_constraints_are_said_at_once_with_the_nearest_values() {
        let check = |name: &str, ranks, microbatches, said: &[&str]| {
            let error = name.parse::<ScheduleKind>().unwrap().build(ranks, microbatches).unwrap_err().to_string();
            for part in said {
                assert!(error.contains(part), "{name} {ranks} {microbatches}: no `{part}` in\n{error}");
            }
            assert_eq!(error.lines().count(), said.len(), "{error}");
        };
        check(
            "dualpipe",
            7,
            9,
            &[
                "no dualpipe schedule for ranks = 7 and microbatches = 9",
                "the number of ranks must be even, but is 7; nearest: 6 or 8",
                "the number of microbatches must be even, but is 9; nearest: 14",
                "the number of microbatches must be at least twice the ranks (2 * 7), but is 9; nearest: 14",
                "valid: ranks = 6 with microbatches = 12 or ranks = 8 with microbatches = 16",
            ],
        );
        check(
            "dualpipe",
            8,
            21,
            &["no", "even, but is 21; nearest: 20 or 22", "valid: ranks = 8 with microbatches = 22"],
        );
        check("dualpipe", 1, 2, &["no", "even, but is 1; nearest: 2", "valid: ranks = 2 with microbatches = 4"]);
        check("dualpipev", 4, 7, &["no", "nearest: 8", "valid: ranks = 4 with microbatches = 8"]);
        check(
            "interleaved:2",
            4,
            10,
            &["no", "multiple of the ranks (4), but is 10; nearest: 8 or 12", "with microbatches = 12"],
        );
        check(
            "interleaved:1",
            4,
            8,
            &["no", "the chunks of a rank must be 2 or more (with 1 it is `1f1b`), but is 1; nearest: 2"],
        );
        check("interleaved:0", 4, 8, &["no", "2 or more"]);
        check(
            "gpipe",
            0,
            0,
            &["no", "ranks must be 1 or more", "microbatches must be 1 or more", "ranks = 1 with microbatches = 1"],
        );
        check("1f1b", u32::MAX, u32::MAX, &["no", "stages times microbatches must be at most"]);
        check("dualpipe", u32::MAX, 1, &["no", "must be even", "must be even", "twice", "stages times"]);
    }

    #[test]
    fn the_nearest_values_are_valid() {
        for name in ["gpipe", "1f1b", "interleaved:3", "zb-h1", "zb-h2", "zbv", "dualpipe", "dualpipev"] {
            let kind: ScheduleKind = name.parse().unwrap();
            for (ranks, microbatches) in (0..10).flat_map(|r| (0..20).map(move |m| (r, m))) {
                let Err(error) = kind.build(ranks, microbatches) else { continue };
                assert!(!error.unmet.is_empty() && !error.nearest.is_empty(), "{error}");
                for (ranks, microbatches) in error.nearest {
                    assert!(kind.build(ranks as u32, microbatches as u32).is_ok(), "{name} {ranks} {microbatches}");
                }
            }
        }
    }
}
