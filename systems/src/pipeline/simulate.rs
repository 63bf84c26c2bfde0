//! How long a verified schedule takes if only cells cost time: every rank does its list in order, starts an action when
//! what it waits for has ended, and messages take no time. This is the model behind the published bubble formulas.

use super::{
    action::{Action, Schedule, Work},
    verify::Checked,
};

/// What the cells of one stage cost, in any unit of time.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct CellCosts {
    /// Forward.
    pub f: f64,
    /// Input gradient.
    pub i: f64,
    /// Weight gradient.
    pub w: f64,
    /// Full backward.
    pub b: f64,
    /// A forward and a full backward that overlap (F&B).
    pub fb: f64,
}

impl CellCosts {
    /// Costs in which nothing is gained by overlap: a full backward is I + W, a pair F + B.
    pub fn new(f: f64, i: f64, w: f64) -> Self {
        CellCosts { f, i, w, b: i + w, fb: f + i + w }
    }

    /// The same with pairs that cost `fb`.
    pub fn with_fb(self, fb: f64) -> Self {
        CellCosts { fb, ..self }
    }

    /// What an action costs.
    pub fn of(&self, action: Action) -> f64 {
        match action {
            Action::Pair { .. } => self.fb,
            Action::Single(cell) => match cell.work {
                Work::F => self.f,
                Work::I => self.i,
                Work::W => self.w,
                Work::B => self.b,
            },
        }
    }
}

/// Times of one rank, in the unit of the costs.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct RankTimes {
    /// Makespan less busy: the bubble. Never below 0.
    pub idle: f64,
    /// The part of it between the first and the last action: what is left if the next step starts while others drain.
    pub idle_inside: f64,
    /// Sum of the actions' costs.
    pub busy: f64,
    /// See [`Checked::peak_activations`].
    pub peak_activations: u32,
}

/// When what happens.
#[derive(Clone, Debug, PartialEq)]
pub struct Simulated {
    /// End of the last action, from 0.
    pub makespan: f64,
    /// Times of each rank.
    pub ranks: Vec<RankTimes>,
    /// Start and end of each action, by rank and index in its list.
    pub spans: Vec<Vec<(f64, f64)>>,
}

impl Simulated {
    /// The largest bubble of a rank.
    pub fn worst_idle(&self) -> f64 {
        self.ranks.iter().fold(0.0, |worst, rank| rank.idle.max(worst))
    }

    /// Mean bubble over makespan; 0 if nothing takes time.
    pub fn bubble_share(&self) -> f64 {
        let idle: f64 = self.ranks.iter().map(|rank| rank.idle).sum();
        let all = self.makespan * self.ranks.len() as f64;
        if all > 0.0 { idle / all } else { 0.0 }
    }
}

/// Runs `schedule`, of which `checked` is known, at these costs.
pub fn simulate(schedule: &Schedule, checked: &Checked, costs: CellCosts) -> Simulated {
    let num_microbatches = schedule.num_microbatches as usize;
    let place = |stage: u32, microbatch: u32| stage as usize * num_microbatches + microbatch as usize;
    // When the output of each stage is there, and its input gradient.
    let mut outputs = vec![0.0; schedule.num_stages as usize * num_microbatches];
    let mut gradients = outputs.clone();
    let mut spans: Vec<Vec<(f64, f64)>> = schedule.ranks.iter().map(|list| Vec::with_capacity(list.len())).collect();
    for &(rank, index) in &checked.order {
        let action = schedule.ranks[rank as usize][index as usize];
        let free = spans[rank as usize].last().map_or(0.0, |&(_, end)| end);
        // What the rank did itself has ended when it is free.
        let input = |work, stage: u32, microbatch| match work {
            Work::F if stage > 0 => outputs[place(stage - 1, microbatch)],
            Work::I | Work::B if stage + 1 < schedule.num_stages => gradients[place(stage + 1, microbatch)],
            _ => 0.0,
        };
        let inputs = action.cells().map(|cell| input(cell.work, cell.stage, cell.microbatch));
        let start = inputs.fold(free, f64::max);
        let end = start + costs.of(action);
        for cell in action.cells() {
            match cell.work {
                Work::F => outputs[place(cell.stage, cell.microbatch)] = end,
                Work::I | Work::B => gradients[place(cell.stage, cell.microbatch)] = end,
                Work::W => {}
            }
        }
        spans[rank as usize].push((start, end));
    }
    let makespan = spans.iter().filter_map(|spans| spans.last()).fold(0.0, |latest: f64, &(_, end)| latest.max(end));
    let times = |rank: usize, spans: &Vec<(f64, f64)>| {
        let busy = schedule.ranks[rank].iter().map(|action| costs.of(*action)).sum();
        // Gaps, not makespan less busy: where none waits, rounding makes none.
        let idle_inside: f64 = spans.windows(2).map(|pair| pair[1].0 - pair[0].1).sum();
        let (start, end) = (spans.first().map_or(0.0, |first| first.0), spans.last().map_or(0.0, |last| last.1));
        let peak_activations = checked.peak_activations[rank];
        RankTimes { idle: start + idle_inside + (makespan - end), idle_inside, busy, peak_activations }
    };
    let ranks = spans.iter().enumerate().map(|(rank, spans)| times(rank, spans)).collect();
    Simulated { makespan, ranks, spans }
}
