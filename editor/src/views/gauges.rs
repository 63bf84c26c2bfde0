//! Gauges of a model that serves: how many requests run and wait, how full the cache is, how fast it goes; each a value with what it
//! was over the last steps below it. They are small, and tell the same at any width.

use egui::{Align2, FontId, Label, RichText, Sense, Shape, Stroke, Ui, vec2};
use engine::telemetry::Snapshot;

use crate::{desk::Desk, history::History, paint, theme::Palette, units};

/// What every serving step tells, and no other.
pub const RUNNING: &str = "num_running";
/// Steps of a curve.
const MAX_STEPS: usize = 240;
/// Least width of a gauge, and its height.
const SIZE: [f32; 2] = [104.0, 62.0];

/// A figure over the last steps.
struct Gauge {
    title: &'static str,
    value: String,
    /// Behind the value.
    more: String,
    /// Curves, the first in front.
    names: &'static [&'static str],
    /// The top of the curves, if it is known.
    most: Option<f64>,
}

impl Gauge {
    /// What its value is of.
    fn words(&self) -> String {
        let joint = if self.more.is_empty() { "" } else { ", " };
        format!("{}{joint}{}", self.title, self.more)
    }
}

/// The gauges of a step.
fn gauges_of(step: &Snapshot) -> [Gauge; 4] {
    let scalar = |name: &str| step.scalar(name).filter(|value| value.is_finite()).unwrap_or(0.0);
    let (used, blocks) = (scalar("num_used_blocks"), scalar("num_blocks"));
    [
        Gauge {
            title: "running",
            value: units::count(scalar(RUNNING)),
            more: String::new(),
            names: &[RUNNING],
            most: None,
        },
        Gauge {
            title: "waiting",
            value: units::count(scalar("num_waiting")),
            more: format!("{} preempted", units::count(scalar("num_preemptions"))),
            names: &["num_waiting"],
            most: None,
        },
        Gauge {
            title: "blocks used",
            value: units::count(used),
            more: format!("of {}", units::count(blocks)),
            names: &["num_used_blocks"],
            most: Some(blocks),
        },
        Gauge {
            title: "tokens/s",
            value: units::count(scalar("tokens_per_sec")),
            more: format!("{} new", units::count(scalar("generated_tokens_per_sec"))),
            names: &["tokens_per_sec", "generated_tokens_per_sec"],
            most: None,
        },
    ]
}

/// Draws the gauges of the newest serving step up to the cursor.
pub fn ui(ui: &mut Ui, desk: &Desk) {
    let Some(track) = desk.main() else { return };
    let holds = |step: &Snapshot| step.scalar(RUNNING).is_some();
    let Some(step) = track.history.latest(desk.cursor.step, holds) else {
        ui.label("no serving step up to the cursor");
        return;
    };
    let gap = ui.spacing().item_spacing;
    let room = ui.available_width();
    let columns = (((room + gap.x) / (SIZE[0] + gap.x)) as usize).clamp(1, 4);
    let width = (room - gap.x * (columns - 1) as f32) / columns as f32;
    let gauges = gauges_of(step);
    for line in gauges.chunks(columns) {
        ui.horizontal(|ui| {
            for gauge in line {
                ui.allocate_ui(vec2(width, SIZE[1]), |ui| {
                    ui.vertical(|ui| {
                        ui.set_width(width);
                        one(ui, gauge, &track.history, step.step);
                    });
                });
            }
        });
    }
}

/// A gauge: its value, and below it what it was over the last steps.
fn one(ui: &mut Ui, gauge: &Gauge, history: &History, step: u64) {
    let palette = Palette::of(ui.ctx());
    ui.spacing_mut().item_spacing.y = 1.0;
    ui.horizontal(|ui| {
        ui.spacing_mut().item_spacing.x = 4.0;
        ui.label(RichText::new(&gauge.value).size(16.0).strong());
        ui.add(Label::new(RichText::new(gauge.words()).size(11.0)).truncate());
    });
    let (rect, _) = ui.allocate_exact_size(vec2(ui.available_width(), SIZE[1] - 22.0), Sense::hover());
    let painter = ui.painter().with_clip_rect(rect.intersect(ui.clip_rect()));
    painter.rect_filled(rect, 2.0, palette.lane());
    let curves: Vec<&[[f64; 2]]> = gauge.names.iter().map(|name| last(history, name, step)).collect();
    let values = || curves.iter().copied().flatten();
    let top = gauge.most.unwrap_or_else(|| values().fold(0.0, |most, point| point[1].max(most))).max(1.0);
    let from = values().fold(f64::INFINITY, |from, point| point[0].min(from));
    let span = (step as f64 - from).max(1.0);
    // Above the curve, its top as a number.
    let mut inner = rect.shrink(3.0);
    inner.min.y += 8.0;
    for (i, points) in curves.iter().enumerate().rev() {
        let place = |point: &[f64; 2]| {
            let (x, y) = ((point[0] - from) / span, (point[1] / top).clamp(0.0, 1.0));
            inner.left_bottom() + vec2(x as f32 * inner.width(), -(y as f32) * inner.height())
        };
        let line: Vec<_> = points.iter().map(place).collect();
        let color = palette.curve(i);
        match &line[..] {
            [only] => {
                painter.circle_filled(*only, 1.5, color);
            }
            _ => {
                painter.add(Shape::line(line, Stroke::new(1.5, color)));
            }
        }
    }
    let font = FontId::proportional(9.0);
    painter.text(
        rect.right_top() - vec2(2.0, 0.0),
        Align2::RIGHT_TOP,
        units::count(top),
        font,
        ui.visuals().weak_text_color(),
    );
    paint::describe(ui, rect, gauge.title, || {
        let num_steps = curves.first().map_or(0, |points| points.len());
        format!("{} {}; over {num_steps} steps up to step {step}", gauge.value, gauge.words())
    });
}

/// The values of a figure in the last steps up to one.
fn last<'a>(history: &'a History, name: &str, step: u64) -> &'a [[f64; 2]] {
    let points = history.curve(name).map_or(&[][..], |curve| &curve.points);
    let end = points.partition_point(|point| point[0] <= step as f64);
    &points[end.saturating_sub(MAX_STEPS)..end]
}
