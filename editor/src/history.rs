//! The newest steps of a source, and the curves of all of them. Steps with their spans are large, so that only some are kept;
//! curves are small, and thinned out when they grow long.

use std::{
    collections::{BTreeMap, VecDeque},
    sync::Arc,
};

use engine::telemetry::Snapshot;

/// Steps that are kept.
const MAX_STEPS: usize = 2048;
/// Spans that are kept, over all steps: about 200 bytes each.
const MAX_SPANS: usize = 1_000_000;
/// Points of a curve before every second one is left out.
const MAX_POINTS: usize = 8192;

/// What is shown: a step and a rank, the same in all views.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Cursor {
    /// The step; none follows the newest.
    pub step: Option<u64>,
    /// The rank; none shows all.
    pub rank: Option<u32>,
}

/// A scalar over steps.
#[derive(Clone, Debug, Default)]
pub struct Curve {
    /// Step and value.
    pub points: Vec<[f64; 2]>,
    /// Each how many-th value is kept.
    stride: u64,
    seen: u64,
}

/// A ring of snapshots, and curves.
#[derive(Default)]
pub struct History {
    steps: VecDeque<Arc<Snapshot>>,
    num_spans: usize,
    curves: BTreeMap<String, Curve>,
    /// Counts what came, so that whoever keeps something made of it can tell that it is old.
    version: u64,
}

impl History {
    /// Adds a step. Of the newest step, what has no tasks is more of its figures, as validation; else one of the same number
    /// replaces the old one. A number below the newest begins anew, as after a run was continued from an earlier checkpoint.
    pub fn push(&mut self, snapshot: Arc<Snapshot>) {
        self.version += 1;
        if let Some(last) = self.steps.back_mut().filter(|last| last.step == snapshot.step && snapshot.spans.is_empty())
        {
            let whole = Arc::make_mut(last);
            replace(&mut whole.scalars, &snapshot.scalars);
            replace(&mut whole.histograms, &snapshot.histograms);
            return self.draw(&snapshot);
        }
        while self.steps.back().is_some_and(|last| last.step >= snapshot.step) {
            if let Some(old) = self.steps.pop_back() {
                self.num_spans -= old.spans.len();
            }
        }
        for curve in self.curves.values_mut() {
            curve.cut(snapshot.step);
        }
        self.draw(&snapshot);
        self.num_spans += snapshot.spans.len();
        self.steps.push_back(snapshot);
        while self.num_spans > MAX_SPANS && self.steps.len() > 1 {
            self.forget(0);
        }
        if self.steps.len() > MAX_STEPS {
            // Few steps of a log have their tasks, and those are what is looked for.
            self.forget(self.steps.iter().position(|old| old.spans.is_empty()).unwrap_or(0));
        }
    }

    fn forget(&mut self, at: usize) {
        if let Some(old) = self.steps.remove(at) {
            self.num_spans -= old.spans.len();
        }
    }

    /// Puts the scalars of a step on their curves.
    fn draw(&mut self, snapshot: &Snapshot) {
        for (name, value) in snapshot.scalars.iter().filter(|(_, value)| value.is_finite()) {
            let curve = self.curves.entry(name.clone()).or_insert_with(|| Curve { stride: 1, ..Curve::default() });
            curve.cut(snapshot.step);
            curve.push([snapshot.step as f64, *value]);
        }
    }

    /// Forgets all.
    pub fn clear(&mut self) {
        *self = History { version: self.version + 1, ..History::default() };
    }

    /// The kept steps, oldest first.
    pub fn steps(&self) -> impl DoubleEndedIterator<Item = &Arc<Snapshot>> + ExactSizeIterator {
        self.steps.iter()
    }

    /// The step under the cursor: that one, or the nearest before it that is kept, or the oldest.
    pub fn at(&self, step: Option<u64>) -> Option<&Arc<Snapshot>> {
        let Some(step) = step else { return self.steps.back() };
        let after = self.steps.partition_point(|snapshot| snapshot.step <= step);
        self.steps.get(after.saturating_sub(1))
    }

    /// The newest kept step at or before the cursor of which `holds`.
    pub fn latest(&self, step: Option<u64>, holds: impl Fn(&Snapshot) -> bool) -> Option<&Arc<Snapshot>> {
        let limit = step.unwrap_or(u64::MAX);
        self.steps.iter().rev().filter(|snapshot| snapshot.step <= limit).find(|snapshot| holds(snapshot))
    }

    /// First and last kept step.
    pub fn range(&self) -> Option<(u64, u64)> {
        Some((self.steps.front()?.step, self.steps.back()?.step))
    }

    /// The kept step `by` places from `step`, at the ends the first or last.
    pub fn neighbor(&self, step: u64, by: i64) -> Option<u64> {
        let at = self.steps.partition_point(|snapshot| snapshot.step < step) as i64;
        let at = (at + by).clamp(0, (self.steps.len() as i64 - 1).max(0));
        self.steps.get(at as usize).map(|snapshot| snapshot.step)
    }

    /// The values of a scalar.
    pub fn curve(&self, name: &str) -> Option<&Curve> {
        self.curves.get(name)
    }

    /// Names of all scalars.
    pub fn curves(&self) -> impl Iterator<Item = (&str, &Curve)> {
        self.curves.iter().map(|(name, curve)| (name.as_str(), curve))
    }

    /// Grows with each change.
    pub fn version(&self) -> u64 {
        self.version
    }
}

/// Puts `new` into `list`, in place of what has the same name.
fn replace<T: Clone>(list: &mut Vec<(String, T)>, new: &[(String, T)]) {
    list.retain(|(name, _)| new.iter().all(|(other, _)| other != name));
    list.extend_from_slice(new);
}

impl Curve {
    fn push(&mut self, point: [f64; 2]) {
        if self.seen.is_multiple_of(self.stride) {
            self.points.push(point);
        }
        self.seen += 1;
        if self.points.len() > MAX_POINTS {
            let mut keep = false;
            self.points.retain(|_| {
                keep = !keep;
                keep
            });
            self.stride *= 2;
        }
    }

    /// Leaves out what is of `step` or later.
    fn cut(&mut self, step: u64) {
        let keep = self.points.partition_point(|point| point[0] < step as f64);
        self.points.truncate(keep);
    }
}

#[cfg(test)]
mod tests {
    #![expect(clippy::unwrap_used, reason = "a test fails by panicking")]
    use super::*;

    fn step(step: u64, loss: f64) -> Arc<Snapshot> {
        Arc::new(Snapshot { step, scalars: vec![("x".into(), loss)], ..Snapshot::default() })
    }

    fn with_a_task(n: u64) -> Arc<Snapshot> {
        let task = r#"{"traceEvents": [{"ph": "X", "name": "a", "pid": 0, "tid": 1, "ts": 0, "dur": 1, "args": {"step": 2}}]}"#;
        let spans = crate::source::chrome::parse(task).unwrap()[0].spans.clone();
        Arc::new(Snapshot { spans, ..(*step(n, n as f64)).clone() })
    }

    #[test]
    fn the_cursor_finds_steps_and_neighbors() {
        let mut history = History::default();
        [2, 4, 6].into_iter().for_each(|n| history.push(step(n, n as f64)));
        let at = |step| history.at(step).unwrap().step;
        assert_eq!([at(None), at(Some(1)), at(Some(5)), at(Some(9))], [6, 2, 4, 6]);
        assert_eq!(
            [history.neighbor(4, -1), history.neighbor(4, 1), history.neighbor(6, 1)],
            [Some(2), Some(6), Some(6)]
        );
        assert_eq!(history.range(), Some((2, 6)));
    }

    #[test]
    fn a_run_that_goes_back_begins_anew_from_there() {
        let mut history = History::default();
        [1, 2, 3, 4, 2].into_iter().for_each(|n| history.push(step(n, n as f64)));
        assert_eq!(history.range(), Some((1, 2)));
        assert_eq!(history.curve("x").unwrap().points, [[1.0, 1.0], [2.0, 2.0]]);
    }

    #[test]
    fn figures_that_come_later_join_their_step() {
        let task = with_a_task(2);
        let later = Snapshot { step: 2, scalars: vec![("val".into(), 7.0)], ..Snapshot::default() };
        let mut history = History::default();
        [step(1, 1.0), task, Arc::new(later)].into_iter().for_each(|snapshot| history.push(snapshot));
        let last = history.at(None).unwrap();
        assert_eq!((last.spans.len(), last.scalar("x"), last.scalar("val")), (1, Some(2.0), Some(7.0)));
        assert_eq!(history.steps().len(), 2);
        assert_eq!(history.curve("val").unwrap().points, [[2.0, 7.0]]);
        assert_eq!(history.curve("x").unwrap().points, [[1.0, 1.0], [2.0, 2.0]]);
    }

    #[test]
    fn long_histories_stay_small() {
        let mut history = History::default();
        (0..3).for_each(|n| history.push(step(n, n as f64)));
        history.push(with_a_task(3));
        (4..50_000).for_each(|n| history.push(step(n, n as f64)));
        assert_eq!(history.steps().len(), MAX_STEPS);
        assert_eq!(history.steps().next().unwrap().step, 3, "the one with tasks is kept");
        let points = &history.curve("x").unwrap().points;
        assert!(points.len() <= MAX_POINTS && points.len() > MAX_POINTS / 4, "{}", points.len());
        assert!(points.windows(2).all(|pair| pair[0][0] < pair[1][0]));
    }
}
