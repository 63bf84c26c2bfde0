//! Curves: what a run's figures did over its steps, one plot for each group of figures with the same unit. A click moves the cursor.

use egui::{ScrollArea, Ui, vec2};
use egui_plot::{Legend, Line, LineStyle, Plot, PlotPoint, PlotPoints, VLine};

use crate::{desk::Desk, theme::Palette, units, view::View};

/// Figures that share a plot.
struct Group {
    title: &'static str,
    /// Names; one that ends in `/` stands for all that begin with it.
    names: &'static [&'static str],
    is_log: bool,
}

const GROUPS: [Group; 12] = [
    Group {
        title: "loss, nats a token",
        names: &["loss_nats_per_token", "val_loss_nats_per_token", "mtp_loss_nats_per_token/"],
        is_log: false,
    },
    Group { title: "bits per byte", names: &["bits_per_byte", "val_bits_per_byte"], is_log: false },
    Group { title: "gradient norm", names: &["grad_norm"], is_log: true },
    Group { title: "learning rate", names: &["lr"], is_log: false },
    Group { title: "tokens/s", names: &["tokens_per_sec"], is_log: false },
    Group { title: "MFU", names: &["mfu"], is_log: false },
    Group { title: "MaxVio", names: &["max_vio"], is_log: false },
    Group { title: "idle share", names: &["idle_fraction", "overhead_share"], is_log: false },
    Group { title: "communication hidden, share", names: &["communication_hidden_share"], is_log: false },
    Group { title: "idle by cause, s", names: &["bubble_secs/"], is_log: false },
    Group { title: "money, USD", names: &["cost_usd", "budget_usd"], is_log: false },
    Group { title: "energy, kWh", names: &["energy_kwh", "budget_kwh"], is_log: false },
];

/// The view.
#[derive(Default)]
pub struct Curves {
    shows_all: bool,
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
        let columns = ((ui.available_width() / 240.0) as usize).clamp(1, plots.len());
        let width = ui.available_width() / columns as f32 - 8.0;
        let rows = plots.len().div_ceil(columns);
        let height = (ui.available_height() / rows.min(3) as f32 - 26.0).clamp(84.0, 220.0);
        let cursor = desk.now().map(|snapshot| snapshot.step);
        let mut clicked = None;
        ScrollArea::vertical().auto_shrink(false).show(ui, |ui| {
            for row in plots.chunks(columns) {
                ui.horizontal(|ui| {
                    for plot in row {
                        ui.allocate_ui_with_layout(
                            vec2(width, height + 20.0),
                            egui::Layout::top_down(egui::Align::Min),
                            |ui| {
                                ui.set_width(width);
                                clicked = one(ui, plot, height, cursor, palette).or(clicked);
                            },
                        );
                    }
                });
            }
        });
        if let Some(step) = clicked {
            desk.cursor.step = desk.main().and_then(|track| track.history.at(Some(step))).map(|snapshot| snapshot.step);
        }
    }
}

/// A plot's title, and its curves: name, points, whether it is of the compared source.
struct OnePlot {
    title: String,
    curves: Vec<(String, Vec<[f64; 2]>, bool)>,
    is_log: bool,
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
                curves.push((name.to_owned(), curve.points.clone(), i > 0));
            }
        }
        if !curves.is_empty() {
            plots.push(OnePlot { title: group.title.into(), curves, is_log: group.is_log });
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
                track.history.curve(name).map(|curve| (name.to_owned(), curve.points.clone(), i > 0))
            };
            let curves = desk.tracks.iter().enumerate().filter_map(curve).collect();
            plots.push(OnePlot { title: name.to_owned(), curves, is_log: false });
        }
    }
    plots
}

/// Draws a plot; gives the step that was clicked.
fn one(ui: &mut Ui, plot: &OnePlot, height: f32, cursor: Option<u64>, palette: Palette) -> Option<u64> {
    let is_log = plot.is_log && plot.curves.iter().all(|(_, points, _)| points.iter().all(|point| point[1] > 0.0));
    let newest = plot.curves.first().and_then(|(_, points, _)| {
        let at = cursor.map_or(points.len(), |step| points.partition_point(|point| point[0] <= step as f64));
        points.get(at.saturating_sub(1)).map(|point| point[1])
    });
    let value = newest.map_or_else(String::new, |value| format!(": {}", units::three(value)));
    ui.strong(format!("{}{value}", plot.title));
    let mut widget = Plot::new(("curve", &plot.title))
        .height(height)
        .allow_scroll(false)
        .allow_zoom([true, false])
        .allow_drag([true, false])
        .y_axis_min_width(30.0)
        .grid_color(palette.rule())
        .grid_spacing(16.0..=240.0)
        .set_margin_fraction(vec2(0.01, 0.08))
        .label_formatter(move |hover| match hover {
            egui_plot::HoverPosition::NearDataPoint { plot_name, position, .. } => {
                let value = if is_log { 10f64.powf(position.y) } else { position.y };
                Some(format!("{plot_name}\nstep {}\n{}", position.x, units::three(value)))
            }
            egui_plot::HoverPosition::Elsewhere { .. } => None,
        })
        .y_axis_formatter(move |mark, _| units::three(if is_log { 10f64.powf(mark.value) } else { mark.value }));
    if plot.curves.len() > 1 {
        widget = widget.legend(Legend::default().background_alpha(0.6).text_style(egui::TextStyle::Small));
    }
    let title = plot.title.clone();
    let shown = widget.show(ui, |ui| {
        for (i, (name, points, is_compared)) in plot.curves.iter().enumerate() {
            let points: Vec<[f64; 2]> = points.iter().map(|[x, y]| [*x, if is_log { y.log10() } else { *y }]).collect();
            let label = if *is_compared { format!("{name} (compared)") } else { name.clone() };
            let style = if *is_compared { LineStyle::dashed_loose() } else { LineStyle::Solid };
            ui.line(Line::new(label, PlotPoints::from(points)).color(palette.curve(i)).style(style));
        }
        if let Some(step) = cursor {
            ui.vline(
                VLine::new("", step as f64).color(palette.cursor().gamma_multiply(0.6)).width(1.0).allow_hover(false),
            );
        }
        ui.pointer_coordinate()
    });
    shown.response.widget_info(|| egui::WidgetInfo::labeled(egui::Role::Image, true, format!("curve {title}")));
    let at: Option<PlotPoint> = shown.inner.filter(|_| shown.response.clicked());
    at.map(|point| point.x.max(0.0).round() as u64)
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
