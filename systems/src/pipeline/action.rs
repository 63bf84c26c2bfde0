//! Actions of a pipeline schedule, as data: what a rank does with one microbatch on one stage, printed and parsed as text.
//!
//! `2F0` is the forward of microbatch 0 on stage 2; I is the input gradient, W the weight gradient, B both.

use std::{fmt, str::FromStr};

/// What is done with the microbatch.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Work {
    /// Forward.
    F,
    /// Input gradient.
    I,
    /// Weight gradient.
    W,
    /// Input and weight gradient.
    B,
}

/// One entry of a rank's list.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Action {
    /// Pipeline stage.
    pub stage: u32,
    /// What to do.
    pub work: Work,
    /// Microbatch of the step.
    pub microbatch: u32,
}

impl Action {
    /// `work` of `microbatch` on `stage`.
    pub fn new(stage: u32, work: Work, microbatch: u32) -> Self {
        Action { stage, work, microbatch }
    }
}

impl fmt::Display for Action {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}{:?}{}", self.stage, self.work, self.microbatch)
    }
}

/// A text that is no action.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
#[error("expected an action such as `2F0` (stage, one of F I W B, microbatch), found `{0}`")]
pub struct ParseActionError(String);

impl FromStr for Action {
    type Err = ParseActionError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let error = || ParseActionError(text.to_owned());
        let at = text.find(|c: char| !c.is_ascii_digit()).ok_or_else(error)?;
        let (stage, rest) = text.split_at(at);
        let work = match rest.as_bytes()[0] {
            b'F' => Work::F,
            b'I' => Work::I,
            b'W' => Work::W,
            b'B' => Work::B,
            _ => return Err(error()),
        };
        let number = |s: &str| s.parse().map_err(|_| error());
        Ok(Action { stage: number(stage)?, work, microbatch: number(&rest[1..])? })
    }
}

/// A schedule as text: one line a rank.
pub fn to_text(ranks: &[Vec<Action>]) -> String {
    let line = |actions: &Vec<Action>| actions.iter().map(Action::to_string).collect::<Vec<_>>().join(" ") + "\n";
    ranks.iter().map(line).collect()
}

/// Reads what [`to_text`] prints.
pub fn from_text(text: &str) -> Result<Vec<Vec<Action>>, ParseActionError> {
    text.lines().map(|line| line.split_whitespace().map(str::parse).collect()).collect()
}

#[cfg(test)]
mod tests {
    #![expect(clippy::unwrap_used, reason = "tests")]
    use super::*;

    #[test]
    fn text_round_trips() {
        let text = "0F0 0F1 0B0 0I1 0W1\n1F0 1B0\n";
        assert_eq!(to_text(&from_text(text).unwrap()), text);
    }

    #[test]
    fn what_is_no_action_is_quoted() {
        for bad in ["", "F0", "0X1", "0F", "1F-2"] {
            assert!(bad.parse::<Action>().unwrap_err().to_string().ends_with(&format!("found `{bad}`")));
        }
    }
}
