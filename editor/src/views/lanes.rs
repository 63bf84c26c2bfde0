//! A step as lanes: what the timeline draws, worked out once for a step. Nothing here knows of pixels but the merging of spans that
//! would be narrower than one.

use std::sync::Arc;

use engine::{
    bubbles::{BubbleCause, bubbles, is_compute},
    telemetry::Snapshot,
};

use crate::{
    overlap::{Overlap, overlap},
    source::chrome::FOREIGN,
};

/// A task on a lane, in nanoseconds from the begin of the step.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Bar {
    /// Begin.
    pub start: u64,
    /// End.
    pub end: u64,
    /// Index in the snapshot.
    pub span: u32,
}

/// Idle time on a lane, in nanoseconds from the begin of the step.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Gap {
    /// Begin.
    pub start: u64,
    /// End.
    pub end: u64,
    /// Why; none if what the step was read from does not say what waited for what.
    pub cause: Option<BubbleCause>,
    /// The task that is to blame.
    pub waited_for: Option<Arc<str>>,
}

/// A stream of a rank.
#[derive(Clone, Debug)]
pub struct Lane {
    /// Its rank.
    pub rank: u32,
    /// Its name.
    pub stream: Arc<str>,
    /// Its tasks, by time.
    pub bars: Vec<Bar>,
    /// Its idle time, if it computes.
    pub gaps: Vec<Gap>,
    /// Whether idle time is a bubble on it.
    pub is_compute: bool,
    /// Time in tasks.
    busy_nanos: u64,
    /// Idle time by cause, as in [`BubbleCause::ALL`].
    nanos_by_cause: [u64; BubbleCause::ALL.len()],
}

impl Lane {
    /// Share of the step that it ran nothing.
    pub fn idle_share(&self, length_nanos: u64) -> f64 {
        (1.0 - self.busy_nanos as f64 / length_nanos.max(1) as f64).max(0.0)
    }

    /// Idle shares of the step by cause, largest first.
    pub fn idle_by_cause(&self, length_nanos: u64) -> Vec<(BubbleCause, f64)> {
        by_cause(std::iter::once(self), length_nanos)
    }
}

/// Mean idle shares of lanes by cause, largest first.
pub fn by_cause<'a>(lanes: impl Iterator<Item = &'a Lane>, length_nanos: u64) -> Vec<(BubbleCause, f64)> {
    let (mut nanos, mut num_lanes) = ([0u64; BubbleCause::ALL.len()], 0);
    for lane in lanes.filter(|lane| lane.is_compute) {
        num_lanes += 1;
        nanos.iter_mut().zip(lane.nanos_by_cause).for_each(|(sum, of_lane)| *sum += of_lane);
    }
    let all = (length_nanos.max(1) * num_lanes.max(1)) as f64;
    let mut shares: Vec<(BubbleCause, f64)> = BubbleCause::ALL
        .into_iter()
        .zip(nanos)
        .filter(|(_, n)| *n > 0)
        .map(|(cause, n)| (cause, n as f64 / all))
        .collect();
    shares.sort_by(|a, b| b.1.total_cmp(&a.1));
    shares
}

/// A step, worked out.
pub struct Lanes {
    /// What it is of.
    pub snapshot: Arc<Snapshot>,
    /// By rank, in order of first use.
    pub lanes: Vec<Lane>,
    /// From the begin to the end of the step.
    pub length_nanos: u64,
    /// Communication, and what of it is hidden.
    pub overlap: Overlap,
}

impl Lanes {
    /// Works a step out.
    pub fn new(snapshot: Arc<Snapshot>) -> Self {
        let spans = &snapshot.spans;
        let first = spans.iter().map(|span| span.start_nanos).min().unwrap_or(0);
        let last = spans.iter().map(|span| span.end_nanos).max().unwrap_or(0);
        let (mut begin, mut end) = snapshot.interval_nanos;
        if begin >= end {
            (begin, end) = (first, last);
        }
        let (begin, end) = (begin.min(first), end.max(last));
        let mut lanes: Vec<Lane> = Vec::new();
        let mut last_lane = 0;
        for (i, span) in spans.iter().enumerate() {
            let is_its = |lane: &Lane| {
                lane.rank == span.rank && (Arc::ptr_eq(&lane.stream, &span.stream) || lane.stream == span.stream)
            };
            let at = if lanes.get(last_lane).is_some_and(is_its) {
                last_lane
            } else {
                lanes.iter().position(is_its).unwrap_or_else(|| {
                    let (rank, stream) = (span.rank, span.stream.clone());
                    let is_compute = is_compute(&stream);
                    lanes.push(Lane {
                        rank,
                        stream,
                        bars: Vec::new(),
                        gaps: Vec::new(),
                        is_compute,
                        busy_nanos: 0,
                        nanos_by_cause: [0; BubbleCause::ALL.len()],
                    });
                    lanes.len() - 1
                })
            };
            last_lane = at;
            let (start, stop) = (span.start_nanos - begin, span.end_nanos.max(span.start_nanos) - begin);
            lanes[at].bars.push(Bar { start, end: stop, span: i as u32 });
        }
        let knows_causes = snapshot.scalar(FOREIGN).is_none();
        for bubble in bubbles(spans, is_compute, (begin, end)) {
            let lane = lanes.iter_mut().find(|lane| lane.rank == bubble.rank && lane.stream == bubble.stream);
            if let Some(lane) = lane {
                let (start, end) = (bubble.start_nanos - begin, bubble.end_nanos - begin);
                lane.gaps.push(Gap {
                    start,
                    end,
                    cause: Some(bubble.cause).filter(|_| knows_causes),
                    waited_for: bubble.waited_for,
                });
            }
        }
        for lane in &mut lanes {
            lane.busy_nanos = lane.bars.iter().map(|bar| bar.end - bar.start).sum();
            for gap in &lane.gaps {
                if let Some(cause) = gap.cause {
                    lane.nanos_by_cause[cause as usize] += gap.end - gap.start;
                }
            }
            lane.bars.sort_by_key(|bar| (bar.start, bar.end));
            lane.gaps.sort_by_key(|gap| gap.start);
        }
        // Ranks in order; on each, lanes that compute before those that transfer.
        lanes.sort_by(|a, b| (a.rank, !a.is_compute, &a.stream).cmp(&(b.rank, !b.is_compute, &b.stream)));
        let overlap = overlap(spans);
        Lanes { lanes, length_nanos: (end - begin).max(1), overlap, snapshot }
    }

    /// Mean idle share of the lanes that compute.
    pub fn idle_share(&self) -> Option<f64> {
        let compute: Vec<f64> =
            self.lanes.iter().filter(|lane| lane.is_compute).map(|lane| lane.idle_share(self.length_nanos)).collect();
        (!compute.is_empty()).then(|| compute.iter().sum::<f64>() / compute.len() as f64)
    }

    /// What a task waited for, what that waited for, and so on.
    pub fn chain(&self, span: u32) -> Vec<u32> {
        let mut chain = vec![span];
        while let Some(before) = chain.last().and_then(|at| self.snapshot.spans.get(*at as usize)?.waited_for) {
            if chain.contains(&before) || chain.len() > 64 {
                break;
            }
            chain.push(before);
        }
        chain
    }

    /// Lane and bar of a task.
    pub fn find(&self, span: u32) -> Option<(usize, Bar)> {
        let found = self.snapshot.spans.get(span as usize)?;
        let (at, lane) =
            self.lanes.iter().enumerate().find(|(_, lane)| lane.rank == found.rank && lane.stream == found.stream)?;
        lane.bars.iter().find(|bar| bar.span == span).map(|bar| (at, *bar))
    }
}

/// The part of a step that is seen, as shares of what a whole width shows.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Zoom {
    /// Left edge.
    pub from: f64,
    /// Right edge.
    pub to: f64,
}

impl Default for Zoom {
    fn default() -> Self {
        Zoom { from: 0.0, to: 1.0 }
    }
}

impl Zoom {
    /// Closest look: a millionth of the step.
    const MIN_WIDTH: f64 = 1e-6;

    /// Shared out by `factor` around a place from 0 (left edge) to 1.
    #[must_use]
    pub fn by(self, factor: f64, around: f64) -> Self {
        let width = self.to - self.from;
        let new_width = (width / factor).clamp(Self::MIN_WIDTH, 1.0);
        let place = self.from + around * width;
        Zoom { from: place - around * new_width, to: place + (1.0 - around) * new_width }.inside()
    }

    /// Moved by a share of what is seen.
    #[must_use]
    pub fn moved(self, by: f64) -> Self {
        let by = by * (self.to - self.from);
        Zoom { from: self.from + by, to: self.to + by }.inside()
    }

    fn inside(self) -> Self {
        let width = (self.to - self.from).clamp(Self::MIN_WIDTH, 1.0);
        let from = self.from.clamp(0.0, 1.0 - width);
        Zoom { from, to: from + width }
    }
}

/// Something with a begin and an end.
pub trait Timed {
    /// Begin and end.
    fn times(&self) -> (u64, u64);
}

impl Timed for Bar {
    fn times(&self) -> (u64, u64) {
        (self.start, self.end)
    }
}

impl Timed for Gap {
    fn times(&self) -> (u64, u64) {
        (self.start, self.end)
    }
}

/// Gives what is seen of `items` (in order, not overlapping) as left and right edge in points from the left, and the item. Of
/// those that are narrower than a pixel together, one stands for all: the longest.
pub fn visible<'a, T: Timed>(
    items: &'a [T],
    (from, to): (f64, f64),
    points_per_nano: f64,
    pixel: f32,
    mut give: impl FnMut(f32, f32, &'a T),
) {
    let first = items.partition_point(|item| (item.times().1 as f64) < from);
    let mut waiting: Option<(f32, f32, &T, u64)> = None;
    for item in &items[first..] {
        let (start, end) = item.times();
        if start as f64 > to {
            break;
        }
        let left = ((start as f64 - from) * points_per_nano) as f32;
        let right = ((end as f64 - from) * points_per_nano) as f32;
        match &mut waiting {
            Some((begun, reached, shown, longest)) if right - *begun < pixel => {
                *reached = right;
                if end - start > *longest {
                    (*shown, *longest) = (item, end - start);
                }
            }
            _ => {
                if let Some((begun, reached, shown, _)) = waiting.replace((left, right, item, end - start)) {
                    give(begun, reached.max(begun + pixel.min(left - begun).max(0.0)), shown);
                }
            }
        }
    }
    if let Some((begun, reached, shown, _)) = waiting {
        give(begun, reached.max(begun + pixel), shown);
    }
}

/// The item at a time, if there is one.
pub fn at<T: Timed>(items: &[T], nanos: f64) -> Option<&T> {
    let after = items.partition_point(|item| item.times().0 as f64 <= nanos);
    items.get(after.checked_sub(1)?).filter(|item| item.times().1 as f64 >= nanos)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn bars(times: &[(u64, u64)]) -> Vec<Bar> {
        times.iter().enumerate().map(|(i, &(start, end))| Bar { start, end, span: i as u32 }).collect()
    }

    #[test]
    fn what_is_outside_is_not_drawn_and_what_is_narrow_is_merged() {
        let bars = bars(&[(0, 10), (20, 30), (30, 31), (31, 39), (90, 100)]);
        let seen = |window, scale| {
            let mut seen = Vec::new();
            visible(&bars, window, scale, 1.0, |left, right, bar: &Bar| seen.push((left, right, bar.span)));
            seen
        };
        assert_eq!(seen((15.0, 50.0), 1.0), [(5.0, 15.0, 1), (15.0, 16.0, 2), (16.0, 24.0, 3)]);
        // A nanosecond is 0.04 points: the second to the fourth are 0.8 together.
        let merged = seen((0.0, 100.0), 0.04);
        assert_eq!(merged.iter().map(|(.., span)| *span).collect::<Vec<_>>(), [0, 1, 4]);
    }

    #[test]
    fn zooming_keeps_the_place_under_the_pointer() {
        let zoom = Zoom::default().by(4.0, 0.75);
        assert_eq!(zoom, Zoom { from: 0.5625, to: 0.8125 });
        assert_eq!(zoom.from + 0.75 * (zoom.to - zoom.from), 0.75);
        assert_eq!(zoom.by(0.01, 0.2), Zoom::default());
        assert_eq!(zoom.moved(10.0).to, 1.0);
    }

    #[test]
    fn the_bar_at_a_time_is_found() {
        let bars = bars(&[(0, 10), (20, 30)]);
        let found = |nanos| at(&bars, nanos).map(|bar| bar.span);
        assert_eq!([found(5.0), found(15.0), found(30.0), found(31.0)], [Some(0), None, Some(1), None]);
    }
}
