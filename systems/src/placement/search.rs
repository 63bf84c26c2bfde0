//! Making one layer's placement more even, a step at a time. Greedy packing ends with one rank above the others; a step takes
//! load off that rank, and raises none to where it was. So the greatest load never rises, and the search ends.

/// One layer's experts on slots, with what follows from them.
#[derive(Clone, Debug)]
pub(super) struct Layer<'a> {
    /// `[expert]`
    load: &'a [f64],
    /// `[slot]`: its expert.
    pub slots: Vec<usize>,
    /// `[expert]`: its slots.
    counts: Vec<usize>,
    /// `[rank]`
    rank_loads: Vec<f64>,
    /// `[expert][rank]`: slots of the expert on the rank.
    held: Vec<Vec<u16>>,
    slots_per_rank: usize,
    /// Experts move among so many consecutive ranks only.
    ranks_per_domain: usize,
}

/// A step.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) enum Action {
    /// The experts of two slots change places: two copies of weights.
    Swap(usize, usize),
    /// A slot of an expert that has others gets another expert: one copy.
    Replace(usize, usize),
}

impl Action {
    /// Copies of an expert's weights.
    fn num_copies(self) -> f64 {
        match self {
            Action::Swap(..) => 2.0,
            Action::Replace(..) => 1.0,
        }
    }
}

impl<'a> Layer<'a> {
    /// A layer with `load` `[expert]`, placed as `slots`, in domains of `ranks_per_domain`.
    pub fn new(load: &'a [f64], slots: Vec<usize>, num_ranks: usize, ranks_per_domain: usize) -> Self {
        let slots_per_rank = slots.len() / num_ranks;
        let (mut counts, mut held) = (vec![0; load.len()], vec![vec![0; num_ranks]; load.len()]);
        for (slot, &expert) in slots.iter().enumerate() {
            counts[expert] += 1;
            held[expert][slot / slots_per_rank] += 1;
        }
        let rank_loads = vec![0.0; num_ranks];
        let mut layer = Layer { load, slots, counts, rank_loads, held, slots_per_rank, ranks_per_domain };
        layer.add_up();
        layer
    }

    /// Sums anew instead of adding differences, so that the result does not depend on the way that led here.
    fn add_up(&mut self) {
        for (rank, experts) in self.slots.chunks(self.slots_per_rank).enumerate() {
            self.rank_loads[rank] = experts.iter().map(|&expert| self.load[expert] / self.counts[expert] as f64).sum();
        }
    }

    /// Mean load of a rank.
    pub fn mean(&self) -> f64 {
        self.load.iter().sum::<f64>() / self.rank_loads.len() as f64
    }

    /// Greatest load of a rank.
    pub fn max(&self) -> f64 {
        self.rank_loads.iter().copied().fold(0.0, f64::max)
    }

    /// Load of a slot.
    fn share(&self, slot: usize) -> f64 {
        let expert = self.slots[slot];
        self.load[expert] / self.counts[expert] as f64
    }

    fn rank(&self, slot: usize) -> usize {
        slot / self.slots_per_rank
    }

    fn slots_on(&self, rank: usize) -> std::ops::Range<usize> {
        rank * self.slots_per_rank..(rank + 1) * self.slots_per_rank
    }

    /// Slots of the other ranks of `rank`'s domain.
    fn slots_beside(&self, rank: usize) -> impl Iterator<Item = usize> + use<'a> {
        let first = rank / self.ranks_per_domain * self.ranks_per_domain;
        let (room, ranks) = (self.slots_per_rank, first..first + self.ranks_per_domain);
        ranks.filter(move |other| *other != rank).flat_map(move |other| other * room..(other + 1) * room)
    }

    /// Takes a step.
    pub fn apply(&mut self, action: Action) {
        match action {
            Action::Swap(a, b) => {
                let (x, y) = (self.slots[a], self.slots[b]);
                self.put(a, y);
                self.put(b, x);
            }
            Action::Replace(slot, expert) => self.put(slot, expert),
        }
        self.add_up();
    }

    fn put(&mut self, slot: usize, expert: usize) {
        let (rank, before) = (self.rank(slot), self.slots[slot]);
        self.held[before][rank] -= 1;
        self.counts[before] -= 1;
        self.held[expert][rank] += 1;
        self.counts[expert] += 1;
        self.slots[slot] = expert;
    }

    /// Swaps until no rank holds an expert twice, each time with what leaves the lesser of loads behind. That always ends: if
    /// rank A holds expert x twice and B does not hold x, then B has something that A lacks or that B has twice, and the
    /// swap leaves fewer duplicates. Such a B there is, if x has no more slots than its domain has ranks.
    pub fn remove_duplicates(&mut self) {
        while let Some(slot) = (0..self.slots.len()).find(|&slot| self.held[self.slots[slot]][self.rank(slot)] > 1) {
            let (rank, expert) = (self.rank(slot), self.slots[slot]);
            let mut best: Option<(f64, usize)> = None;
            for other in self.slots_beside(rank) {
                let (beside, theirs) = (self.rank(other), self.slots[other]);
                let is_fewer = self.held[theirs][rank] == 0 || self.held[theirs][beside] > 1;
                if self.held[expert][beside] > 0 || !is_fewer {
                    continue;
                }
                let less = self.share(slot) - self.share(other);
                let after = (self.rank_loads[rank] - less).max(self.rank_loads[beside] + less);
                if best.is_none_or(|(least, _)| after < least) {
                    best = Some((after, other));
                }
            }
            let Some((_, other)) = best else { break };
            self.apply(Action::Swap(slot, other));
        }
    }

    /// Swaps until the greatest load is at most `enough` times the mean, or nothing lowers it; where no swap does, replicas go
    /// to other experts.
    pub fn level(&mut self, enough: f64) {
        let mean = self.mean();
        // Far more steps than any load took; each lowers some rank, but that may be by little.
        for _ in 0..8 * self.slots.len() {
            if self.max() <= enough * mean {
                break;
            }
            // Less is rounding.
            let mut best = self.best(1e-9 * mean);
            self.swaps(&mut best);
            if best.action.is_none() {
                self.replaces(&mut best);
            }
            let Some(action) = best.action else { break };
            self.apply(action);
        }
    }

    /// The step that takes most load off the most loaded rank per copy of weights, and more than `least` per copy.
    pub fn step(&self, least: f64) -> Option<Action> {
        let mut best = self.best(least);
        self.swaps(&mut best);
        self.replaces(&mut best);
        best.action
    }

    /// No step yet, for the first most loaded rank.
    fn best(&self, least: f64) -> Best {
        let ranks = (0..self.rank_loads.len()).rev();
        let hot = ranks.max_by(|&a, &b| self.rank_loads[a].total_cmp(&self.rank_loads[b])).unwrap_or(0);
        Best { hot, before: self.rank_loads[hot], mean: self.mean(), gain: least, action: None }
    }

    /// Offers swaps of the hot rank's experts for lighter ones of others.
    fn swaps(&self, best: &mut Best) {
        for slot in self.slots_on(best.hot) {
            for other in self.slots_beside(best.hot) {
                let less = self.share(slot) - self.share(other);
                let beside = self.rank(other);
                let after = (best.before - less).max(self.rank_loads[beside] + less);
                let is_twice = || self.held[self.slots[other]][best.hot] > 0 || self.held[self.slots[slot]][beside] > 0;
                let swap = Action::Swap(slot, other);
                if best.is_better(after, swap) && !is_twice() {
                    best.take(after, swap);
                }
            }
        }
    }

    /// Offers other experts in the hot rank's slots, and the hot rank's experts in other slots.
    fn replaces(&self, best: &mut Best) {
        let first = best.hot / self.ranks_per_domain * self.ranks_per_domain;
        let domain = first..first + self.ranks_per_domain;
        let is_here = |expert: &usize| self.held[*expert][domain.clone()].iter().any(|&num| num > 0);
        let here: Vec<usize> = (0..self.load.len()).filter(is_here).collect();
        for slot in self.slots_on(best.hot).filter(|&slot| self.counts[self.slots[slot]] > 1) {
            here.iter().for_each(|&expert| self.replace(slot, expert, best));
        }
        for slot in self.slots_beside(best.hot).filter(|&slot| self.counts[self.slots[slot]] > 1) {
            self.slots_on(best.hot).for_each(|own| self.replace(slot, self.slots[own], best));
        }
    }

    /// Offers `expert` in `slot`. Both experts' other replicas have another share then, so many ranks' loads change.
    fn replace(&self, slot: usize, expert: usize, best: &mut Best) {
        let (at, gone) = (self.rank(slot), self.slots[slot]);
        let replace = Action::Replace(slot, expert);
        if expert == gone || self.held[expert][at] > 0 {
            return;
        }
        let shares = |of: usize, after: usize| (self.load[of] / self.counts[of] as f64, self.load[of] / after as f64);
        let (gone_before, gone_after) = shares(gone, self.counts[gone] - 1);
        let (new_before, new_after) = shares(expert, self.counts[expert] + 1);
        // What is cheap to see comes first, since most offers fail by it.
        let still_gone = f64::from(self.held[gone][at] - 1) * (gone_after - gone_before);
        let mut after = self.rank_loads[at] - gone_before + still_gone + new_after;
        if !best.is_better(after, replace) {
            return;
        }
        for (rank, (gone, new)) in self.held[gone].iter().zip(&self.held[expert]).enumerate() {
            if rank != at && gone + new > 0 {
                let change = f64::from(*gone) * (gone_after - gone_before) + f64::from(*new) * (new_after - new_before);
                after = after.max(self.rank_loads[rank] + change);
            }
        }
        if best.is_better(after, replace) {
            best.take(after, replace);
        }
    }
}

/// The best step so far.
struct Best {
    hot: usize,
    /// Load of the hot rank before.
    before: f64,
    mean: f64,
    /// What the hot rank loses per copy.
    gain: f64,
    action: Option<Action>,
}

impl Best {
    /// Load taken off per copy, if the greatest of the ranks concerned is `after`. Below the mean nothing is won.
    fn gain(&self, after: f64, action: Action) -> f64 {
        (self.before - after.max(self.mean)) / action.num_copies()
    }

    fn is_better(&self, after: f64, action: Action) -> bool {
        self.gain(after, action) > self.gain
    }

    fn take(&mut self, after: f64, action: Action) {
        (self.gain, self.action) = (self.gain(after, action), Some(action));
    }
}
