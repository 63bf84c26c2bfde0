//! Curves: what a run's figures did over its steps, one plot for each group of figures with the same unit. A click moves the cursor.

use std::collections::BTreeSet;

use egui::{
    Align2, FontId, Label, Rect, RichText, Role, ScrollArea, Sense, Stroke, StrokeKind, Ui, UiBuilder, Vec2,
    WidgetInfo, pos2, vec2,
};
use egui_plot::{HoverPosition, LineStyle, Plot, PlotPoint, VLine};

use crate::{axes, desk::Desk, history::Curve, theme::Palette, units, view::View};

/// Figures that share a plot.
struct Group {
    title: &'static str,
    /// Names; one that ends in `/` stands for all that begin with it.
    names: &'static [&'static str],
    is_log: bool,
}

const GROUPS: [Group; 15] = [
    Group {
        title: "loss, nats a token",
        names: &["loss_nats_per_token", "val_loss_nats_per_token", "mtp_loss_nats_per_token/"],
        is_log: false,
    },
    Group { title: "bits per byte", names: &["bits_per_byte", "val_bits_per_byte"], is_log: false },
    Group { title: "gradient norm", names: &["grad_norm"], is_log: true },
    Group { title: "learning rate", names: &["lr"], is_log: false },
    Group { title: "tokens/s", names: &["tokens_per_sec", "generated_tokens_per_sec"], is_log: false },
    Group { title: "requests", names: &["num_running", "num_waiting"], is_log: false },
    Group { title: "cache in use, share", names: &["cache_usage"], is_log: false },
    Group { title: "MFU", names: &["mfu"], is_log: false },
    Group { title: "MaxVio", names: &["max_vio"], is_log: false },
    Group { title: "idle share", names: &["idle_fraction", "overhead_share"], is_log: false },
    Group { title: "communication hidden, share", names: &["communication_hidden_share"], is_log: false },
    Group { title: "idle by cause, s", names: &["bubble_secs/"], is_log: false },
    Group { title: "money, USD", names: &["cost_usd", "budget_usd"], is_log: false },
    Group { title: "power, W", names: &["power_watts", "power_watts/"], is_log: false },
    Group { title: "energy, kWh", names: &["energy_kwh", "budget_kwh"], is_log: false },
];

/// Least width and height of a plot with its title.
const LEAST: [f32; 2] = [172.0, 96.0];
/// More height makes no curve clearer.
const MAX_HEIGHT: f32 = 340.0;
/// Width over height that is aimed at.
const ASPECT: f32 = 1.8;
/// Follows the name of a curve of the compared source.
const COMPARED: &str = " (compared)";
/// Height of a line of the legend, and size of its text.
const LEGEND: [f32; 2] = [13.0, 10.0];

/// The view.
#[derive(Default)]
pub struct Curves {
    shows_all: bool,
    /// Curves that were clicked away: plot and curve, as title and legend call them.
    hidden: BTreeSet<(String, String)>,
}

impl View for Curves {
    fn name(&self) -> &'static str {
        "Curves"
    }

    fn ui(&mut self, ui: &mut Ui, desk: &mut Desk) {
        let plots = plots(desk, self.shows_all);
        ui.horizontal_wrapped(|ui| {
            ui.checkbox(&mut self.shows_all, "all figures");
            figures(ui, desk);
        });
        if plots.is_empty() {
            ui.label("no curves yet: they begin with the second step");
            return;
        }
        let palette = Palette::of(ui.ctx());
        let gap = ui.spacing().item_spacing;
        // The scroll bar has its own.
        let width = ui.available_width() - ui.spacing().scroll.allocated_width();
        let (columns, cell) = grid(plots.len(), vec2(width, ui.available_height()), gap);
        let cursor = desk.now().map(|snapshot| snapshot.step);
        let mut clicked = None;
        ScrollArea::vertical().auto_shrink(false).show(ui, |ui| {
            for row in plots.chunks(columns) {
                let (rect, _) = ui.allocate_exact_size(vec2(width, cell.y), Sense::hover());
                for (i, plot) in row.iter().enumerate() {
                    let left = rect.left() + i as f32 * (cell.x + gap.x);
                    let place = UiBuilder::new()
                        .id_salt(&plot.title)
                        .max_rect(Rect::from_min_size(pos2(left, rect.top()), cell))
                        .layout(egui::Layout::top_down(egui::Align::Min));
                    clicked = ui.scope_builder(place, |ui| self.one(ui, plot, cursor, palette)).inner.or(clicked);
                }
            }
        });
        if let Some(step) = clicked {
            desk.cursor.step = desk.main().and_then(|track| track.history.at(Some(step))).map(|snapshot| snapshot.step);
        }
    }
}

/// Columns and the size of a cell, for so many plots: all of them are seen if they fit, else whole rows.
fn grid(num_plots: usize, room: Vec2, gap: Vec2) -> (usize, Vec2) {
    let fit = |room: f32, least: f32, gap: f32| (((room + gap) / (least + gap)) as usize).max(1);
    let share = |room: f32, count: usize, gap: f32| (room - gap * (count - 1) as f32) / count as f32;
    let most_rows = fit(room.y, LEAST[1], gap.y);
    let most_columns = fit(room.x, LEAST[0], gap.x).min(num_plots);
    let cell = |columns: usize| {
        let rows = num_plots.div_ceil(columns).min(most_rows);
        vec2(share(room.x, columns, gap.x), share(room.y, rows, gap.y).clamp(LEAST[1], MAX_HEIGHT))
    };
    let fits = |columns: &usize| num_plots.div_ceil(*columns) <= most_rows;
    // How far from what is aimed at, in either direction.
    let off = |columns: &usize| (cell(*columns).x / cell(*columns).y / ASPECT).ln().abs();
    let best = (1..=most_columns).filter(fits).min_by(|a, b| off(a).total_cmp(&off(b)));
    let columns = best.unwrap_or(most_columns);
    (columns, cell(columns))
}

/// A plot's title, and its curves.
struct OnePlot {
    title: String,
    curves: Vec<OneCurve>,
    is_log: bool,
}

impl OnePlot {
    fn new(title: &str, mut curves: Vec<OneCurve>, is_log: bool) -> Self {
        // Of one figure, the title says the name.
        if let [shown, compared] = &mut curves[..]
            && compared.label == shown.label.clone() + COMPARED
        {
            (shown.label, compared.label) = ("shown".into(), "compared".into());
        }
        OnePlot { title: title.to_owned(), curves, is_log }
    }
}

struct OneCurve {
    label: String,
    points: Vec<[f64; 2]>,
    /// Of the compared source.
    is_compared: bool,
}

impl OneCurve {
    fn new(name: &str, curve: &Curve, is_compared: bool) -> Self {
        let label = short(name) + if is_compared { COMPARED } else { "" };
        OneCurve { label, points: curve.points.clone(), is_compared }
    }
}

fn plots(desk: &Desk, shows_all: bool) -> Vec<OnePlot> {
    let mut plots = Vec::new();
    let mut used: Vec<String> = Vec::new();
    for group in &GROUPS {
        let belongs = |name: &str| {
            group.names.iter().any(|known| if known.ends_with('/') { name.starts_with(known) } else { name == *known })
        };
        let mut curves = Vec::new();
        for (i, track) in desk.tracks.iter().enumerate() {
            for (name, curve) in track.history.curves().filter(|(name, curve)| belongs(name) && curve.points.len() > 1)
            {
                // Causes that never occurred only fill the legend.
                if name.starts_with("bubble_secs/") && curve.points.iter().all(|point| point[1] == 0.0) {
                    continue;
                }
                used.push(name.to_owned());
                curves.push(OneCurve::new(name, curve, i > 0));
            }
        }
        if !curves.is_empty() {
            plots.push(OnePlot::new(group.title, curves, group.is_log));
        }
    }
    if shows_all {
        let mut rest: Vec<&str> = desk
            .tracks
            .iter()
            .flat_map(|track| track.history.curves())
            .filter(|(name, curve)| curve.points.len() > 1 && !used.iter().any(|used| used == name))
            .map(|(name, _)| name)
            .collect();
        rest.sort_unstable();
        rest.dedup();
        for name in rest {
            let curve = |(i, track): (usize, &crate::desk::Track)| {
                track.history.curve(name).map(|curve| OneCurve::new(name, curve, i > 0))
            };
            let curves = desk.tracks.iter().enumerate().filter_map(curve).collect();
            plots.push(OnePlot::new(name, curves, false));
        }
    }
    plots
}

impl Curves {
    /// Draws a plot in the room that there is; gives the step that was clicked.
    fn one(&mut self, ui: &mut Ui, plot: &OnePlot, cursor: Option<u64>, palette: Palette) -> Option<u64> {
        let values = || plot.curves.iter().flat_map(|curve| &curve.points).map(|point| point[1]);
        let (least, most) = (values().fold(f64::INFINITY, f64::min), values().fold(f64::NEG_INFINITY, f64::max));
        // Exponents of values that are alike say little.
        let is_log = plot.is_log && least > 0.0 && most > 3.0 * least;
        let newest = plot.curves.first().and_then(|curve| {
            let at =
                cursor.map_or(curve.points.len(), |step| curve.points.partition_point(|point| point[0] <= step as f64));
            curve.points.get(at.saturating_sub(1)).map(|point| point[1])
        });
        let value = newest.map_or_else(String::new, |value| format!(": {}", units::three(value)));
        ui.add(Label::new(RichText::new(format!("{}{value}", plot.title)).strong()).truncate());
        if plot.curves.len() > 1 {
            self.legend(ui, plot, palette);
        }
        let mut widget = Plot::new(("curve", &plot.title))
            .height(ui.available_height().max(24.0))
            .allow_scroll(false)
            .allow_zoom([true, false])
            .allow_drag([true, false])
            .label_formatter(move |hover| match hover {
                HoverPosition::NearDataPoint { plot_name, position, .. } => {
                    let value = if is_log { 10f64.powf(position.y) } else { position.y };
                    Some(format!("{plot_name}\nstep {}\n{}", position.x, units::three(value)))
                }
                HoverPosition::Elsewhere { .. } => None,
            });
        if least == most {
            // Else the axis would be as high as the other one is wide.
            let around = if least == 0.0 { 1.0 } else { 0.1 * least.abs() };
            widget = widget.include_y(least - around).include_y(least + around);
        }
        let shown = axes::styled(widget, is_log, palette).show(ui, |ui| {
            for (i, curve) in plot.curves.iter().enumerate().filter(|(_, curve)| self.shows(plot, curve)) {
                let value = |[x, y]: &[f64; 2]| [*x, if is_log { y.log10() } else { *y }];
                let points: Vec<[f64; 2]> = curve.points.iter().map(value).collect();
                let style = if curve.is_compared { LineStyle::dashed_loose() } else { LineStyle::Solid };
                axes::curve(ui, &curve.label, &points, palette.curve(i), style);
            }
            if let Some(step) = cursor {
                let color = palette.cursor().gamma_multiply(0.6);
                ui.vline(VLine::new("", step as f64).color(color).width(1.0).allow_hover(false));
            }
            ui.pointer_coordinate()
        });
        let title = &plot.title;
        shown.response.widget_info(|| WidgetInfo::labeled(Role::Image, true, format!("curve {title}")));
        let at: Option<PlotPoint> = shown.inner.filter(|_| shown.response.clicked());
        at.map(|point| point.x.max(0.0).round() as u64)
    }

    fn shows(&self, plot: &OnePlot, curve: &OneCurve) -> bool {
        // Few are hidden, and looking them up needs no copies.
        !self.hidden.iter().any(|(title, label)| *title == plot.title && *label == curve.label)
    }

    /// Names of the curves over their plot, never on it; a click takes a curve away, or brings it back. What does not fit is counted.
    fn legend(&mut self, ui: &mut Ui, plot: &OnePlot, palette: Palette) {
        let width = ui.available_width();
        let lines = if ui.available_height() < 130.0 { 1 } else { 3 };
        let font = FontId::proportional(LEGEND[1]);
        let (mut at, mut line) = (0.0, 0);
        let mut placed = Vec::new();
        for curve in &plot.curves {
            let is_shown = self.shows(plot, curve);
            let color = if is_shown { ui.visuals().text_color() } else { ui.visuals().weak_text_color() };
            let galley = ui.painter().layout_no_wrap(curve.label.clone(), font.clone(), color);
            let needed = galley.size().x + 18.0;
            // On the last line, room for the count of the rest.
            let end = |line: usize| if line + 1 == lines { width - 20.0 } else { width };
            if at > 0.0 && at + needed > end(line) {
                (at, line) = (0.0, line + 1);
            }
            if line == lines {
                break;
            }
            placed.push((vec2(at, line as f32 * LEGEND[0]), galley));
            at += needed;
        }
        let height = (line.min(lines - 1) + 1) as f32 * LEGEND[0];
        let (rect, response) = ui.allocate_exact_size(vec2(width, height), Sense::hover());
        let painter = ui.painter().with_clip_rect(rect.intersect(ui.clip_rect()));
        let rest = plot.curves.len() - placed.len();
        for (i, ((offset, galley), curve)) in placed.into_iter().zip(&plot.curves).enumerate() {
            let is_shown = self.shows(plot, curve);
            let corner = rect.min + offset;
            let square = Rect::from_min_size(corner + vec2(0.0, 3.0), Vec2::splat(8.0));
            if is_shown {
                painter.rect_filled(square, 1.0, palette.curve(i));
            } else {
                painter.rect_stroke(square, 1.0, Stroke::new(1.0, palette.curve(i)), StrokeKind::Inside);
            }
            let area = Rect::from_min_size(corner, vec2(galley.size().x + 14.0, LEGEND[0])).intersect(rect);
            painter.galley(corner + vec2(11.0, 0.0), galley, palette.cursor());
            let entry = ui.interact(area, ui.scope_id().with(("legend", i)), Sense::click());
            entry.widget_info(|| WidgetInfo::selected(Role::CheckBox, true, is_shown, format!("show {}", curve.label)));
            let key = (plot.title.clone(), curve.label.clone());
            if entry.clicked() && !self.hidden.remove(&key) {
                self.hidden.insert(key);
            }
        }
        if rest > 0 {
            let color = ui.visuals().weak_text_color();
            painter.text(rect.right_bottom(), Align2::RIGHT_BOTTOM, format!("+{rest}"), font, color);
            let names: Vec<&str> = plot.curves.iter().map(|curve| &*curve.label).collect();
            response.on_hover_text(names.join("\n"));
        }
    }
}

/// The name of a figure without what the title says already.
fn short(name: &str) -> String {
    let name = name.strip_prefix("bubble_secs/").unwrap_or(name);
    name.replace("_nats_per_token", "").replace(['_', '/'], " ")
}

/// Figures of the plan as a whole.
fn figures(ui: &mut Ui, desk: &Desk) {
    let Some(planned) = desk.document.as_ref().and_then(|document| document.planned.as_ref()) else { return };
    let figure = |name: &str| planned.snapshot.scalar(name).filter(|value| value.is_finite());
    let texts = [
        figure("run_secs").map(units::secs),
        figure("cost_usd").map(|usd| format!("{} USD", units::count(usd))),
        figure("energy_kwh").map(|kwh| format!("{} kWh", units::count(kwh))),
        figure("mfu").map(|mfu| format!("MFU {}", units::percent(mfu))),
    ];
    let texts: Vec<String> = texts.into_iter().flatten().collect();
    if !texts.is_empty() {
        ui.separator();
        ui.label(format!("the plan's whole run: {}", texts.join(", ")));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn plots_are_seen_whole_at_every_size() {
        let gap = vec2(6.0, 4.0);
        for num_plots in 1..=60 {
            for room in
                [vec2(756.0, 210.0), vec2(1520.0, 560.0), vec2(1500.0, 1300.0), vec2(300.0, 90.0), vec2(470.0, 260.0)]
            {
                let (columns, cell) = grid(num_plots, room, gap);
                assert!(
                    columns as f32 * (cell.x + gap.x) - gap.x <= room.x + 0.1,
                    "{num_plots} in {room}: {columns} of {cell}"
                );
                // Of rows that are in sight, none is cut: so many as fit fill the height, or all are in it.
                let rows = num_plots.div_ceil(columns) as f32;
                let in_sight = ((room.y + gap.y + 0.1) / (cell.y + gap.y)).floor().clamp(1.0, rows);
                let left = room.y - in_sight * (cell.y + gap.y) + gap.y;
                assert!(in_sight == rows || left < 1.0, "{num_plots} in {room}: {columns} of {cell}, {left} left");
            }
        }
        // The lower left of 1280x720, with the eight plots of a run.
        assert_eq!(grid(8, vec2(756.0, 210.0), gap).0, 4);
    }

    #[test]
    fn names_leave_out_what_titles_say() {
        let shorts = ["loss_nats_per_token", "mtp_loss_nats_per_token/0", "bubble_secs/warm_up"].map(short);
        assert_eq!(shorts, ["loss", "mtp loss 0", "warm up"]);
    }
}
