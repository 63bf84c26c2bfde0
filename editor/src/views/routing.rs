//! Routing: which experts the tokens of the step under the cursor went to, how that changed over the steps, who is dead or hot by
//! name, what ranks and links had to carry, and what the step would be if it were otherwise.

use std::sync::Arc;

use egui::{Align2, ComboBox, DragValue, FontId, Rect, Role, ScrollArea, Sense, Stroke, StrokeKind, Ui, pos2, vec2};
use egui_plot::{LineStyle, Plot, VLine};
use engine::telemetry::Snapshot;

use super::{
    heat::{Cells, Heat},
    what_if::Strip,
};
use crate::{
    axes,
    desk::{Desk, Selected},
    loads::{self, LayerLoads, RankTraffic},
    paint,
    theme::{self, Palette},
    units,
    view::View,
};

/// The map ends at this many times the mean load.
const MAX_RELATIVE: f64 = 2.0;
/// Points for names of layers.
const GUTTER: f32 = 34.0;
/// Steps of the map over time.
const MAX_STEPS: usize = 256;

/// A step with the loads of a layer, and its biases.
type Past<'a> = (u64, &'a Vec<f64>, Option<&'a Vec<f64>>);

/// The view.
#[derive(Default)]
pub struct Routing {
    by_layer: Heat,
    over_time: Heat,
    bias: bool,
    strip: Strip,
    /// Loads of a step, and what its ranks carried, as they were worked out.
    known_loads: Option<(Arc<Snapshot>, Vec<LayerLoads>)>,
    known_traffic: Option<(Arc<Snapshot>, Vec<RankTraffic>)>,
}

impl View for Routing {
    fn name(&self) -> &'static str {
        "Routing"
    }

    fn ui(&mut self, ui: &mut Ui, desk: &mut Desk) {
        let found = desk.main().and_then(|track| track.history.latest(desk.cursor.step, loads::has_loads)).cloned();
        let Some(snapshot) = found else {
            ui.label("no loads of experts yet: run a scene with experts, or open a run's folder");
            return;
        };
        let layers = known(&mut self.known_loads, &snapshot, loads::layers);
        let width = layers.iter().map(|layer| layer.loads.len()).max().unwrap_or(1);
        let selected = *desk.selected.get_or_insert_with(|| hottest(&layers[0]));
        ScrollArea::vertical().auto_shrink(false).show(ui, |ui| {
            summary(ui, &snapshot, &layers);
            self.choice(ui, desk, &layers, selected);
            self.map(ui, desk, &snapshot, &layers, width);
            scale(ui, self.bias);
            if let Some(layer) = layers.iter().find(|layer| layer.layer == selected.layer) {
                self.history(ui, desk, layer, selected);
            }
            ui.separator();
            self.strip.ui(ui, desk, snapshot.step, &layers);
            if let Some(snapshot) = desk.now_with_spans() {
                let ranks = known(&mut self.known_traffic, snapshot, |snapshot| loads::traffic(&snapshot.spans));
                traffic(ui, desk, snapshot.step, ranks);
            }
        });
    }
}

impl Routing {
    /// What is selected, by name: for those who do not point.
    fn choice(&mut self, ui: &mut Ui, desk: &mut Desk, layers: &[LayerLoads], mut selected: Selected) {
        ui.horizontal_wrapped(|ui| {
            let text = |layer: u32| format!("layer {layer}");
            let combo = ComboBox::from_id_salt("layer").selected_text(text(selected.layer)).width(72.0);
            let combo = combo.show_ui(ui, |ui| {
                for layer in layers {
                    ui.selectable_value(&mut selected.layer, layer.layer, text(layer.layer));
                }
            });
            let shown = text(selected.layer);
            combo.response.widget_info(|| egui::WidgetInfo::labeled(Role::ComboBox, true, format!("selected {shown}")));
            let Some(layer) = layers.iter().find(|layer| layer.layer == selected.layer) else { return };
            let name = ui.label("expert");
            let last = layer.loads.len().saturating_sub(1);
            ui.add(DragValue::new(&mut selected.expert).range(0..=last)).labelled_by(name.id);
            selected.expert = selected.expert.min(last);
            ui.label(format!(
                "{:.2}x the mean, {} rows",
                layer.relative(selected.expert),
                layer.loads[selected.expert]
            ));
            if let Some(biases) = &layer.biases {
                ui.label(format!("bias {:+.4}", biases.get(selected.expert).copied().unwrap_or(0.0)));
                ui.separator();
                ui.selectable_value(&mut self.bias, false, "loads");
                ui.selectable_value(&mut self.bias, true, "biases");
            } else {
                self.bias = false;
            }
        });
        desk.selected = Some(selected);
    }

    fn map(&mut self, ui: &mut Ui, desk: &mut Desk, snapshot: &Arc<Snapshot>, layers: &[LayerLoads], width: usize) {
        let shows_bias = self.bias;
        let largest =
            layers.iter().flat_map(|layer| layer.biases.iter().flatten()).fold(1e-9f64, |a, b| a.max(b.abs()));
        let value = |x: usize, y: usize| {
            let layer = &layers[y.min(layers.len() - 1)];
            match layer.biases.as_ref().filter(|_| shows_bias) {
                Some(biases) => 0.5 + 0.5 * biases.get(x).copied().unwrap_or(0.0) / largest,
                None => layer.relative(x) / MAX_RELATIVE,
            }
        };
        let version = (Arc::as_ptr(snapshot) as u64) << 1 | u64::from(shows_bias);
        let cells = Cells { width, height: layers.len(), value: &value, version };
        let row = (150.0 / layers.len() as f32).clamp(3.0, 22.0);
        let height = row * layers.len() as f32;
        ui.horizontal(|ui| {
            ui.spacing_mut().item_spacing.x = 0.0;
            let (gutter, _) = ui.allocate_exact_size(vec2(GUTTER, height), Sense::hover());
            let drawn = self.by_layer.ui(ui, &cells, height, || {
                format!("loads of {} layers with {width} experts in step {}", layers.len(), snapshot.step)
            });
            let every = (11.0 / row).ceil() as usize;
            for (y, layer) in layers.iter().enumerate() {
                let rect = Rect::from_min_size(gutter.min + vec2(0.0, y as f32 * row), vec2(GUTTER - 4.0, row));
                if y % every == 0 {
                    let font = FontId::proportional(10.0);
                    let text = format!("L{}", layer.layer);
                    ui.painter().text(rect.right_center(), Align2::RIGHT_CENTER, text, font, ui.visuals().text_color());
                }
                let hot = hottest(layer);
                let response = paint::named(ui, rect, ("layer", y), Role::Button, || {
                    format!("layer {}, MaxVio {:.2}, hottest expert {}", layer.layer, layer.max_vio(), hot.expert)
                });
                if response.clicked() {
                    desk.selected = Some(hot);
                }
            }
            if let Some((x, y)) = drawn.clicked() {
                desk.selected = Some(Selected { layer: layers[y].layer, expert: x.min(layers[y].loads.len() - 1) });
            }
            let palette = Palette::of(ui.ctx());
            if let Some(selected) = desk.selected
                && let Some(y) = layers.iter().position(|layer| layer.layer == selected.layer)
            {
                let cell = drawn.cell(selected.expert, y).expand(1.0);
                ui.painter().rect_stroke(cell, 0.0, Stroke::new(1.5, palette.cursor()), StrokeKind::Outside);
                paint::describe(ui, cell, "selected", || {
                    format!("selected layer {} expert {}", selected.layer, selected.expert)
                });
            }
            if let Some((x, y)) = drawn.hovered() {
                let layer = &layers[y];
                let mut text = format!(
                    "layer {} expert {x}\n{} rows, {:.2}x the mean",
                    layer.layer,
                    layer.loads.get(x).copied().unwrap_or(0.0),
                    layer.relative(x)
                );
                if let Some(bias) = layer.biases.as_ref().and_then(|biases| biases.get(x)) {
                    text += &format!("\ncorrection bias {bias:+.4}");
                }
                drawn.response.on_hover_text_at_pointer(text);
            }
        });
    }

    /// The selected layer over the kept steps: a map of all its experts, and the selected one as a curve.
    fn history(&mut self, ui: &mut Ui, desk: &mut Desk, layer: &LayerLoads, selected: Selected) {
        let Some(track) = desk.main() else { return };
        let load_name = format!("{}{}", loads::LOAD, layer.layer);
        let bias_name = format!("{}{}", loads::BIAS, layer.layer);
        fn of<'a>(snapshot: &'a Snapshot, name: &str) -> Option<&'a Vec<f64>> {
            snapshot.histograms.iter().find(|(known, _)| known == name).map(|(_, values)| values)
        }
        let known: Vec<Past> = track
            .history
            .steps()
            .filter_map(|snapshot| Some((snapshot.step, of(snapshot, &load_name)?, of(snapshot, &bias_name))))
            .collect();
        if known.len() < 2 {
            return;
        }
        // As many steps as there are columns: with more, some are left out evenly.
        let stride = known.len().div_ceil(MAX_STEPS);
        let columns: Vec<_> = known.iter().step_by(stride).collect();
        let means: Vec<f64> =
            columns.iter().map(|(_, loads, _)| loads.iter().sum::<f64>() / loads.len().max(1) as f64).collect();
        let value = |x: usize, y: usize| {
            let load = columns[x].1.get(y).copied().unwrap_or(0.0);
            if means[x] > 0.0 { load / means[x] / MAX_RELATIVE } else { 0.0 }
        };
        let version = track.history.version() * 4096 + u64::from(layer.layer);
        let cells = Cells { width: columns.len(), height: layer.loads.len(), value: &value, version };
        let (first, last) = (known[0].0, known[known.len() - 1].0);
        ui.add_space(4.0);
        ui.label(format!("layer {} over steps {first} to {last}, an expert a row", layer.layer));
        let mut clicked = None;
        ui.horizontal(|ui| {
            ui.spacing_mut().item_spacing.x = 0.0;
            ui.add_space(GUTTER);
            let drawn = self
                .over_time
                .ui(ui, &cells, 72.0, || format!("loads of layer {} over {} steps", layer.layer, columns.len()));
            let palette = Palette::of(ui.ctx());
            let row = drawn.cell(0, selected.expert).union(drawn.cell(columns.len() - 1, selected.expert));
            ui.painter().rect_stroke(row.expand(1.0), 0.0, Stroke::new(1.0, palette.cursor()), StrokeKind::Outside);
            clicked = drawn.clicked().map(|(x, y)| (columns[x].0, y));
            if let Some((x, y)) = drawn.hovered() {
                let relative = value(x, y) * MAX_RELATIVE;
                drawn
                    .response
                    .on_hover_text_at_pointer(format!("step {}\nexpert {y}: {relative:.2}x the mean", columns[x].0));
            }
        });
        let relative = |(step, loads, _): &Past| {
            let mean = loads.iter().sum::<f64>() / loads.len().max(1) as f64;
            let load = loads.get(selected.expert).copied().unwrap_or(0.0);
            [*step as f64, if mean > 0.0 { load / mean } else { 0.0 }]
        };
        let load: Vec<[f64; 2]> = known.iter().map(relative).collect();
        let largest =
            known.iter().filter_map(|(.., bias)| bias.as_ref()?.get(selected.expert)).fold(0f64, |a, b| a.max(b.abs()));
        let bias: Vec<[f64; 2]> = known
            .iter()
            .filter_map(|(step, _, bias)| {
                Some([*step as f64, bias.as_ref()?.get(selected.expert)? / largest.max(1e-12)])
            })
            .collect();
        let palette = Palette::of(ui.ctx());
        let cursor = desk.cursor.step;
        ui.label(format!(
            "expert {}: load over the mean{}",
            selected.expert,
            if bias.is_empty() { String::new() } else { format!("; bias, 1 is {largest:.3}") }
        ));
        let plot = Plot::new("expert over time")
            .height(84.0)
            .allow_scroll(false)
            .allow_drag(false)
            .allow_zoom(false)
            .include_y(0.0);
        axes::styled(plot, false, palette).show(ui, |plot| {
            axes::curve(plot, "load", &load, palette.curve(0), LineStyle::Solid);
            axes::curve(plot, "bias", &bias, palette.curve(1), LineStyle::Solid);
            if let Some(step) = cursor {
                plot.vline(VLine::new("step", step as f64).color(palette.cursor()));
            }
        });
        if let Some((step, expert)) = clicked {
            desk.cursor.step = Some(step);
            desk.selected = Some(Selected { expert, ..selected });
        }
    }
}

fn hottest(layer: &LayerLoads) -> Selected {
    let expert = (0..layer.loads.len()).max_by(|a, b| layer.loads[*a].total_cmp(&layer.loads[*b])).unwrap_or(0);
    Selected { layer: layer.layer, expert }
}

/// What `of` makes of a step, worked out once for it.
fn known<T: Clone>(known: &mut Option<(Arc<Snapshot>, T)>, step: &Arc<Snapshot>, of: impl Fn(&Snapshot) -> T) -> T {
    match known {
        Some((known, value)) if Arc::ptr_eq(known, step) => value.clone(),
        _ => known.insert((step.clone(), of(step))).1.clone(),
    }
}

/// Who stands out.
fn summary(ui: &mut Ui, snapshot: &Snapshot, layers: &[LayerLoads]) {
    let palette = Palette::of(ui.ctx());
    let outliers = loads::outliers(layers);
    let worst = layers.iter().max_by(|a, b| a.max_vio().total_cmp(&b.max_vio()));
    ui.horizontal_wrapped(|ui| {
        ui.strong(format!("step {}", snapshot.step));
        if let Some(worst) = worst {
            ui.label(format!("MaxVio {:.2} in layer {}", worst.max_vio(), worst.layer));
        }
        if outliers.dead.is_empty() && outliers.hot.is_empty() {
            ui.colored_label(palette.good(), "no expert is dead or has twice the mean");
        }
    });
    if !outliers.dead.is_empty() {
        ui.colored_label(palette.error(), format!("{} dead: {}", outliers.dead.len(), outliers.dead_names()));
    }
    if !outliers.hot.is_empty() {
        ui.colored_label(palette.warning(), format!("{} hot: {}", outliers.hot.len(), outliers.hot_names()));
    }
}

/// What the colours of the map are.
fn scale(ui: &mut Ui, shows_bias: bool) {
    ui.horizontal(|ui| {
        ui.add_space(GUTTER - 6.0);
        let (low, high) = if shows_bias { ("lowest bias", "highest") } else { ("no row", "twice the mean or more") };
        ui.weak(low);
        let (rect, _) = ui.allocate_exact_size(vec2(120.0, 8.0), Sense::hover());
        let mut mesh = egui::Mesh::default();
        for i in 0..40 {
            let left = rect.left() + i as f32 * 3.0;
            let part = Rect::from_min_max(pos2(left, rect.top()), pos2(left + 3.0, rect.bottom()));
            paint::quad(&mut mesh, part, theme::load_color(f64::from(i) / 39.0));
        }
        paint::add(ui.painter(), mesh);
        ui.weak(high);
    });
}

/// Rows and bytes of each rank.
fn traffic(ui: &mut Ui, desk: &Desk, step: u64, ranks: Vec<RankTraffic>) {
    let most_rows = ranks.iter().map(|rank| rank.rows).max().unwrap_or(0);
    let most_bytes = ranks.iter().map(|rank| rank.intra_node_bytes + rank.inter_node_bytes).max().unwrap_or(0);
    if most_rows + most_bytes == 0 {
        return;
    }
    let palette = Palette::of(ui.ctx());
    ui.separator();
    ui.label(format!("ranks in step {}: rows of their experts, bytes on links in the node and between nodes", step));
    let is_shown = |rank: u32| desk.cursor.rank.is_none_or(|shown| shown == rank);
    for rank in ranks.into_iter().filter(|rank| is_shown(rank.rank)).take(64) {
        ui.horizontal(|ui| {
            ui.spacing_mut().item_spacing.x = 4.0;
            ui.add_sized(vec2(52.0, 14.0), egui::Label::new(format!("rank {}", rank.rank)));
            let parts = [
                (rank.rows, most_rows, palette.curve(0), units::count(rank.rows as f64), "rows"),
                (
                    rank.intra_node_bytes,
                    most_bytes,
                    palette.curve(2),
                    units::bytes(rank.intra_node_bytes as f64),
                    "in the node",
                ),
                (
                    rank.inter_node_bytes,
                    most_bytes,
                    palette.curve(1),
                    units::bytes(rank.inter_node_bytes as f64),
                    "between nodes",
                ),
            ];
            for (value, most, color, text, what) in parts.into_iter().filter(|(_, most, ..)| *most > 0) {
                let full = ((ui.available_width() - 90.0) / 3.0).clamp(20.0, 90.0);
                let (rect, response) = ui.allocate_exact_size(vec2(full, 10.0), Sense::hover());
                ui.painter().rect_filled(rect, 0.0, palette.lane());
                let part = Rect::from_min_size(rect.min, vec2(full * value as f32 / most as f32, 10.0));
                ui.painter().rect_filled(part, 0.0, color);
                response.on_hover_text(what);
                ui.label(text).on_hover_text(what);
            }
        });
    }
}
