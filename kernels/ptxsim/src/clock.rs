//! Vector clocks: what has happened before what, as the barriers say.

/// For each actor, how much of its work is known to have happened.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Clock(Vec<u32>);

impl Clock {
    /// Knows nothing, but that the actor `me` has begun.
    pub(crate) fn new(actors: usize, me: Option<usize>) -> Self {
        let mut c = Clock(vec![0; actors]);
        if let Some(me) = me {
            c.tick(me);
        }
        c
    }
    /// Of one actor.
    pub(crate) fn get(&self, actor: usize) -> u32 {
        self.0.get(actor).copied().unwrap_or(0)
    }
    /// Later work of `actor` is told from earlier.
    pub(crate) fn tick(&mut self, actor: usize) {
        if self.0.len() <= actor {
            self.0.resize(actor + 1, 0);
        }
        self.0[actor] += 1;
    }
    /// Knows as well what `other` knows.
    pub(crate) fn join(&mut self, other: &Clock) {
        if self.0.len() < other.0.len() {
            self.0.resize(other.0.len(), 0);
        }
        for (a, b) in self.0.iter_mut().zip(&other.0) {
            *a = (*a).max(*b);
        }
    }
    /// Knows of `actor` up to `time`.
    pub(crate) fn raise(&mut self, actor: usize, time: u32) {
        if self.0.len() <= actor {
            self.0.resize(actor + 1, 0);
        }
        self.0[actor] = self.0[actor].max(time);
    }
    /// Knows only what `other` knows as well.
    pub(crate) fn meet(&mut self, other: &Clock) {
        for (i, a) in self.0.iter_mut().enumerate() {
            *a = (*a).min(other.get(i));
        }
    }
}
