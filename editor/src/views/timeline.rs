//! The timeline: what each stream of each rank did in the step under the cursor, and why it did nothing. The measured step is above;
//! below it are the run that it is compared with, and the plan of the scene as it is written now.

use std::sync::Arc;

use egui::{Key, Modifiers, Rect, Role, ScrollArea, Sense, Ui, pos2, vec2};
use engine::telemetry::Snapshot;

use super::{
    elsewhere,
    lanes::{self, Lanes, Zoom},
    timeline_paint::{self as draw, Placed, Style},
};
use crate::{
    desk::{Desk, Track},
    help::{key, pressed},
    paint::{self, Hatch},
    source::chrome,
    theme::{ColorBy, Palette},
    units,
    view::View,
};

/// Factor of one press of a zoom key.
const ZOOM: f64 = 1.5;

/// The view.
#[derive(Default)]
pub struct Timeline {
    zoom: Zoom,
    /// Whether all blocks have one scale of time, instead of filling the width each.
    same_scale: bool,
    hatch: Hatch,
    /// Steps that were worked out, by block.
    known: [Option<Lanes>; 3],
    /// A task that stays outlined: block and index.
    pinned: Option<(usize, u32)>,
}

/// What is drawn as a block.
struct Block {
    title: &'static str,
    name: String,
    snapshot: Arc<Snapshot>,
}

impl View for Timeline {
    fn name(&self) -> &'static str {
        "Timeline"
    }

    fn ui(&mut self, ui: &mut Ui, desk: &mut Desk) {
        self.tools(ui, desk);
        let is_elsewhere = elsewhere::ui(ui, desk, "tasks", has_spans);
        let blocks = blocks(desk);
        if blocks.iter().all(Option::is_none) {
            if is_elsewhere {
                return;
            }
            let busy = desk.document.as_ref().is_some_and(crate::document::Document::is_busy);
            ui.label(if busy {
                "planning the scene"
            } else {
                "no step with tasks yet: run the scene, or open a trace"
            });
            return;
        }
        for (known, block) in self.known.iter_mut().zip(&blocks) {
            let is_known = match (&known, block) {
                (Some(known), Some(block)) => Arc::ptr_eq(&known.snapshot, &block.snapshot),
                (None, None) => true,
                _ => false,
            };
            if !is_known {
                *known = block.as_ref().map(|block| Lanes::new(block.snapshot.clone()));
                self.pinned = None;
            }
        }
        self.keys(ui);
        let longest = self.known.iter().flatten().map(|lanes| lanes.length_nanos).max().unwrap_or(1) as f64;
        let shows = |lanes: &Lanes| -> Vec<usize> {
            let is_shown = |at: &usize| desk.cursor.rank.is_none_or(|rank| lanes.lanes[*at].rank == rank);
            let shown: Vec<usize> = (0..lanes.lanes.len()).filter(is_shown).collect();
            // A plan may have other ranks than the run.
            if shown.is_empty() { (0..lanes.lanes.len()).collect() } else { shown }
        };
        let shown: Vec<Vec<usize>> =
            self.known.iter().map(|known| known.as_ref().map_or_else(Vec::new, shows)).collect();
        let num_blocks = shown.iter().filter(|shown| !shown.is_empty()).count();
        let num_lanes: usize = shown.iter().map(Vec::len).sum();
        // A head, a ruler and a space for each block; the rest is shared by the lanes.
        let free = ui.available_height() - num_blocks as f32 * (draw::RULER + 52.0);
        let lane_height = (free / num_lanes.max(1) as f32).clamp(13.0, 30.0);
        let palette = Palette::of(ui.ctx());
        ScrollArea::vertical().auto_shrink(false).show(ui, |ui| {
            let width = ui.available_width();
            for (i, (block, shown)) in blocks.iter().zip(&shown).enumerate() {
                let (Some(block), Some(lanes)) = (block, &self.known[i]) else { continue };
                head(ui, block, lanes, palette);
                let full_nanos = if self.same_scale { longest } else { lanes.length_nanos as f64 };
                let height = draw::RULER + shown.len() as f32 * lane_height;
                let (rect, response) = ui.allocate_exact_size(vec2(width, height), Sense::click_and_drag());
                let placed = Placed { rect, lane_height, full_nanos, zoom: self.zoom };
                response.widget_info(|| {
                    egui::WidgetInfo::labeled(
                        Role::Image,
                        true,
                        format!("{} step {}", block.title, block.snapshot.step),
                    )
                });
                let mut style = Style { palette, color_by: desk.color_by, hatch: &mut self.hatch };
                draw::block(ui, lanes, shown, placed, &mut style);
                draw::name_lanes(ui, block.title, lanes, shown, placed);
                self.zoom = zoomed(ui, &response, placed);
                let under = response.hover_pos().and_then(|pos| under(lanes, shown, placed, pos));
                if let (true, Some(pos)) = (response.clicked(), response.interact_pointer_pos()) {
                    let hit = self::under(lanes, shown, placed, pos);
                    self.pinned = if let Some(Under::Task(task)) = hit { Some((i, task)) } else { None };
                }
                if let Some((_, task)) = self.pinned.filter(|(block, _)| *block == i) {
                    draw::dependencies(ui, lanes, shown, placed, task, palette);
                }
                match under {
                    Some(Under::Task(task)) => {
                        draw::dependencies(ui, lanes, shown, placed, task, palette);
                        response.on_hover_text_at_pointer(draw::task_text(lanes, task));
                    }
                    Some(Under::Gap(text)) => {
                        response.on_hover_text_at_pointer(text);
                    }
                    None => {}
                }
                ui.add_space(6.0);
            }
            let pinned = self.pinned.and_then(|(block, task)| Some((self.known[block].as_ref()?, task)));
            if let Some((lanes, task)) = pinned {
                ui.label(draw::task_text(lanes, task).replace('\n', "   "));
            }
        });
    }
}

impl Timeline {
    fn tools(&mut self, ui: &mut Ui, desk: &mut Desk) {
        ui.horizontal_wrapped(|ui| {
            if ui.button("Zoom in").clicked() {
                self.zoom = self.zoom.by(ZOOM, 0.5);
            }
            if ui.button("Zoom out").clicked() {
                self.zoom = self.zoom.by(1.0 / ZOOM, 0.5);
            }
            if ui.button("Whole step").clicked() {
                self.zoom = Zoom::default();
            }
            ui.checkbox(&mut self.same_scale, "same scale");
            ui.separator();
            ui.selectable_value(&mut desk.color_by, ColorBy::Pass, "by pass");
            ui.selectable_value(&mut desk.color_by, ColorBy::Kind, "by kind");
            let width = 100.0 * (self.zoom.to - self.zoom.from);
            let rect = Rect::from_min_size(pos2(ui.max_rect().left(), ui.max_rect().top()), vec2(1.0, 1.0));
            paint::describe(ui, rect, "zoom", || {
                format!(
                    "timeline shows {} of the step from {}",
                    units::percent(width * 0.01),
                    units::percent(self.zoom.from)
                )
            });
        });
    }

    fn keys(&mut self, ui: &Ui) {
        let ctx = ui.ctx();
        if pressed(ctx, Modifiers::NONE, Key::Plus) || pressed(ctx, Modifiers::NONE, Key::Equals) {
            self.zoom = self.zoom.by(ZOOM, 0.5);
        }
        if pressed(ctx, Modifiers::NONE, Key::Minus) {
            self.zoom = self.zoom.by(1.0 / ZOOM, 0.5);
        }
        if pressed(ctx, Modifiers::NONE, Key::Num0) {
            self.zoom = Zoom::default();
        }
    }
}

fn has_spans(snapshot: &Snapshot) -> bool {
    !snapshot.spans.is_empty()
}

/// Measured, compared and predicted. What is looked at is the step under the cursor and no other, but for the newest one, which is
/// followed; what it is compared with has tasks of other steps.
fn blocks(desk: &Desk) -> [Option<Block>; 3] {
    let block = |titles: [&'static str; 2], track: &Track, snapshot: &Arc<Snapshot>| {
        let title = titles[usize::from(snapshot.scalar(chrome::PLANNED).is_some())];
        Block { title, name: track.source.name().to_owned(), snapshot: snapshot.clone() }
    };
    let main = desk.main().and_then(|track| {
        let now = if desk.cursor.step.is_none() { desk.now_with_spans() } else { desk.now() };
        Some(block(["measured", "planned"], track, now.filter(|now| has_spans(now))?))
    });
    let compared = desk.tracks.get(1).and_then(|track| {
        let before = track.history.latest(desk.cursor.step, has_spans);
        let found = before.or_else(|| track.history.steps().find(|snapshot| has_spans(snapshot)))?;
        Some(block(["compared", "compared plan"], track, found))
    });
    let planned = desk.document.as_ref().and_then(|document| {
        let planned = document.planned.as_ref()?;
        let name = document.title();
        (!planned.snapshot.spans.is_empty()).then(|| Block {
            title: "predicted",
            name,
            snapshot: planned.snapshot.clone(),
        })
    });
    [main, compared, planned]
}

/// A line over the block: what it is, and where its idle time went.
fn head(ui: &mut Ui, block: &Block, lanes: &Lanes, palette: Palette) {
    ui.horizontal_wrapped(|ui| {
        let name = block.name.rsplit('/').next().unwrap_or_default();
        let mut text = format!("{} {name}: ", block.title);
        // A plan is of no step by number.
        if matches!(block.title, "measured" | "compared") {
            text += &format!("step {}, ", block.snapshot.step);
        }
        text += &units::nanos(lanes.length_nanos as f64);
        ui.strong(text);
        if let Some(idle) = lanes.idle_share() {
            ui.label(format!("idle {}", units::percent(idle)));
        }
        if let Some(hidden) = lanes.overlap.share() {
            ui.label(format!("communication hidden {}", units::percent(hidden)));
        }
        for (cause, share) in lanes::by_cause(lanes.lanes.iter(), lanes.length_nanos).into_iter().take(4) {
            key(ui, palette.bubble(cause), format!("{} {}", cause.name().replace('_', " "), units::percent(share)));
        }
    });
}

/// The zoom after this frame's input.
fn zoomed(ui: &Ui, response: &egui::Response, placed: Placed) -> Zoom {
    let mut zoom = placed.zoom;
    let plot = placed.plot();
    if response.dragged() {
        zoom = zoom.moved(f64::from(-response.drag_delta().x / plot.width()));
    }
    if let Some(pos) = response.hover_pos() {
        let (factor, scroll) = ui.input(|input| (input.zoom_delta(), input.smooth_scroll_delta()));
        if factor != 1.0 {
            let around = f64::from((pos.x - plot.left()) / plot.width()).clamp(0.0, 1.0);
            zoom = zoom.by(f64::from(factor), around);
        }
        if scroll.x != 0.0 {
            zoom = zoom.moved(f64::from(-scroll.x / plot.width()));
        }
    }
    zoom
}

/// What the pointer is at.
enum Under {
    Task(u32),
    Gap(String),
}

fn under(lanes: &Lanes, shown: &[usize], placed: Placed, pos: egui::Pos2) -> Option<Under> {
    let lane = &lanes.lanes[*shown.get(placed.lane_at(pos)?)?];
    let nanos = placed.nanos_at(pos.x);
    // Half a point of room, for what is narrower than a pixel.
    let room = (placed.nanos_at(pos.x + 0.5) - nanos).max(0.0);
    let hit = [0.0, -room, room].into_iter().find_map(|by| lanes::at(&lane.bars, nanos + by));
    if let Some(bar) = hit {
        return Some(Under::Task(bar.span));
    }
    let gap = lanes::at(&lane.gaps, nanos)?;
    let cause = gap.cause.map_or_else(|| "the trace does not say why".into(), |cause| cause.name().replace('_', " "));
    let mut text = format!("idle {}: {cause}", units::nanos((gap.end - gap.start) as f64));
    if let Some(label) = &gap.waited_for {
        text += &format!("\nwaits for {label}");
    }
    Some(Under::Gap(text))
}
