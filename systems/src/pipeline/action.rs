//! Schedules as data: what each rank does with which microbatch on which stage, and in which order; printed and parsed as
//! text, one line a rank.
//!
//! `2F0` is the forward of microbatch 0 on stage 2; I is the input gradient, W the weight gradient, B both. `2F7&5B3` is a
//! forward and a backward that run at the same time, each hiding the communication of the other. Nothing here knows tasks,
//! devices or time: [`verify`](super::verify) says whether a schedule can run, [`simulate`](super::simulate) how long it takes.

use std::{collections::BTreeSet, fmt, str::FromStr};

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

/// One cell of a schedule's table.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Cell {
    /// Pipeline stage.
    pub stage: u32,
    /// What to do.
    pub work: Work,
    /// Microbatch of the step.
    pub microbatch: u32,
}

impl Cell {
    /// `work` of `microbatch` on `stage`.
    pub const fn new(stage: u32, work: Work, microbatch: u32) -> Self {
        Cell { stage, work, microbatch }
    }
}

/// One entry of a rank's list.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Action {
    /// One cell by itself.
    Single(Cell),
    /// Two cells that overlap.
    Pair {
        /// A cell of work F.
        forward: Cell,
        /// A cell of work B, of another microbatch.
        backward: Cell,
    },
}

impl Action {
    /// The cells; of a pair, the forward comes first.
    pub fn cells(self) -> impl Iterator<Item = Cell> {
        let (first, second) = match self {
            Action::Single(cell) => (cell, None),
            Action::Pair { forward, backward } => (forward, Some(backward)),
        };
        std::iter::once(first).chain(second)
    }
}

impl From<Cell> for Action {
    fn from(cell: Cell) -> Self {
        Action::Single(cell)
    }
}

/// Who does what in which order. A rank holds the stages that occur in its list.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Schedule {
    /// Stages that each microbatch passes through, 0 first.
    pub num_stages: u32,
    /// Microbatches of a step.
    pub num_microbatches: u32,
    /// The list of each rank.
    pub ranks: Vec<Vec<Action>>,
}

impl Schedule {
    /// A schedule of these lists; stages and microbatches are counted up to the largest that occurs.
    pub fn from_ranks(ranks: Vec<Vec<Action>>) -> Self {
        let cells = || ranks.iter().flatten().flat_map(|action| action.cells());
        let num_stages = cells().map(|cell| cell.stage.saturating_add(1)).max().unwrap_or_default();
        let num_microbatches = cells().map(|cell| cell.microbatch.saturating_add(1)).max().unwrap_or_default();
        Schedule { num_stages, num_microbatches, ranks }
    }

    /// One line a rank.
    pub fn to_text(&self) -> String {
        let line = |actions: &Vec<Action>| actions.iter().map(Action::to_string).collect::<Vec<_>>().join(" ") + "\n";
        self.ranks.iter().map(line).collect()
    }

    /// Reads what [`to_text`](Self::to_text) prints; what follows a `#` is a comment, and lines without an action are skipped.
    ///
    /// # Errors
    /// All that is no action, with its line.
    pub fn from_text(text: &str) -> Result<Self, ParseScheduleError> {
        let (mut ranks, mut errors) = (Vec::new(), Vec::new());
        for (line, text) in text.lines().enumerate() {
            let mut actions = Vec::new();
            let code = text.split('#').next().unwrap_or_default();
            for word in code.split_whitespace() {
                match word.parse() {
                    Ok(action) => actions.push(action),
                    Err(error) => errors.push((line + 1, error)),
                }
            }
            if !actions.is_empty() {
                ranks.push(actions);
            }
        }
        match (errors.is_empty(), ranks.is_empty()) {
            (false, _) => Err(ParseScheduleError::Actions(errors)),
            (true, true) => Err(ParseScheduleError::Empty),
            (true, false) => Ok(Schedule::from_ranks(ranks)),
        }
    }

    /// Stages that occur in a rank's list, ascending.
    pub fn stages_of(&self, rank: usize) -> Vec<u32> {
        let actions = self.ranks.get(rank).into_iter().flatten();
        let stages: BTreeSet<u32> = actions.flat_map(|action| action.cells()).map(|cell| cell.stage).collect();
        stages.into_iter().collect()
    }

    /// The first rank that does anything of `microbatch` on `stage`; in a verified schedule, the only one. Looks through
    /// the lists.
    pub fn rank_of(&self, stage: u32, microbatch: u32) -> Option<u32> {
        let is_it = |cell: Cell| cell.stage == stage && cell.microbatch == microbatch;
        let has_it = |actions: &Vec<Action>| actions.iter().any(|action| action.cells().any(is_it));
        self.ranks.iter().position(has_it).map(|rank| rank as u32)
    }
}

impl fmt::Display for Cell {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}{:?}{}", self.stage, self.work, self.microbatch)
    }
}

impl fmt::Display for Action {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Action::Single(cell) => write!(f, "{cell}"),
            Action::Pair { forward, backward } => write!(f, "{forward}&{backward}"),
        }
    }
}

/// A text that is no action.
#[derive(Clone, Debug, thiserror::Error, PartialEq, Eq)]
pub enum ParseActionError {
    /// No cell either.
    #[error("expected an action such as `2F0` (stage, one of F I W B, microbatch) or `2F7&5B3`, found `{0}`")]
    Cell(String),
    /// Two cells that cannot overlap.
    #[error("expected a pair of a forward and a full backward such as `2F7&5B3`, found `{0}`")]
    Pair(String),
}

impl FromStr for Cell {
    type Err = ParseActionError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let error = || ParseActionError::Cell(text.to_owned());
        let at = text.find(|c: char| !c.is_ascii_digit()).ok_or_else(error)?;
        let (stage, rest) = text.split_at(at);
        let work = match rest.as_bytes()[0] {
            b'F' => Work::F,
            b'I' => Work::I,
            b'W' => Work::W,
            b'B' => Work::B,
            _ => return Err(error()),
        };
        // `parse` takes a sign as well.
        let is_number = |s: &&str| s.bytes().all(|b| b.is_ascii_digit());
        let number = |s: &str| Some(s).filter(is_number).and_then(|s| s.parse().ok()).ok_or_else(error);
        Ok(Cell { stage: number(stage)?, work, microbatch: number(&rest[1..])? })
    }
}

impl FromStr for Action {
    type Err = ParseActionError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let Some((forward, backward)) = text.split_once('&') else {
            return text.parse().map(Action::Single);
        };
        let error = |_| ParseActionError::Pair(text.to_owned());
        let forward: Cell = forward.parse().map_err(error)?;
        let backward: Cell = backward.parse().map_err(error)?;
        if (forward.work, backward.work) != (Work::F, Work::B) {
            return Err(ParseActionError::Pair(text.to_owned()));
        }
        Ok(Action::Pair { forward, backward })
    }
}

/// A text that is no schedule.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ParseScheduleError {
    /// No line has an action.
    Empty,
    /// What is no action, with its line, from 1.
    Actions(Vec<(usize, ParseActionError)>),
}

impl fmt::Display for ParseScheduleError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            ParseScheduleError::Empty => write!(f, "expected one line a rank, such as `0F0 0B0`, found no action"),
            ParseScheduleError::Actions(errors) => {
                for (i, (line, error)) in errors.iter().enumerate() {
                    write!(f, "{}line {line}: {error}", if i > 0 { "\n" } else { "" })?;
                }
                Ok(())
            }
        }
    }
}

impl std::error::Error for ParseScheduleError {}

#[cfg(test)]
mod tests {
    #![expect(clippy::unwrap_used, reason = "tests")]
    use super::*;

    #[test]
    fn text_round_trips() {
        let text = "0F0 0F1 0B0 0F2&0B1 0I1 0W1\n1F0 1B0\n";
        let schedule = Schedule::from_text(text).unwrap();
        assert_eq!(schedule.to_text(), text);
        assert_eq!((schedule.num_stages, schedule.num_microbatches), (2, 3));
    }

    #[test]
    fn comments_and_blank_lines_are_no_ranks() {
        let schedule = Schedule::from_text("# two ranks\n\n0F0 0B0 # the first\n   \n1F0 1B0\n").unwrap();
        assert_eq!(schedule.to_text(), "0F0 0B0\n1F0 1B0\n");
    }

    #[test]
    fn a_rank_holds_the_stages_of_its_list() {
        let schedule = Schedule::from_text("3F0 0F0 0F1&3B0\n1F0 2F0").unwrap();
        assert_eq!([0, 1, 2].map(|rank| schedule.stages_of(rank)), [vec![0, 3], vec![1, 2], vec![]]);
        assert_eq!([(3, 0), (2, 0), (2, 1)].map(|(s, m)| schedule.rank_of(s, m)), [Some(0), Some(1), None]);
    }

    #[test]
    fn what_is_no_action_is_quoted() {
        for bad in [
            "",
            "F0",
            "0X1",
            "0F",
            "1F-2",
            "1F+2",
            "1é2",
            "0F99999999999",
            "2B7&5F3",
            "2F7&5I3",
            "2F7&",
            "&",
            "0F0&0B1&0B2",
        ] {
            let error = bad.parse::<Action>().unwrap_err().to_string();
            assert!(error.ends_with(&format!("found `{bad}`")), "{error}");
        }
    }

    #[test]
    fn all_that_is_no_action_is_said_with_its_line() {
        let error = Schedule::from_text("0F0 0X0\n\n1F0 1B").unwrap_err().to_string();
        let starts: Vec<&str> = error.lines().map(|line| line.split_at(6).0).collect();
        assert_eq!(starts, ["line 1", "line 3"]);
        assert_eq!(Schedule::from_text("# nothing\n"), Err(ParseScheduleError::Empty));
    }
}
