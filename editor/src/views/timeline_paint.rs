//! How a step's lanes are drawn: a name and an idle share at the left, tasks and hatched bubbles at the right, a ruler above.

use egui::{Align2, Color32, FontId, Mesh, Painter, Pos2, Rect, Role, Stroke, StrokeKind, Ui, pos2, vec2};

use super::lanes::{self, Bar, Gap, Lane, Lanes, Zoom};
use crate::{
    overlap::is_communication,
    paint::{self, Hatch},
    theme::{ColorBy, Palette},
    units,
};

/// Points for names of lanes.
pub const GUTTER: f32 = 132.0;
/// Points of the ruler.
pub const RULER: f32 = 18.0;
/// Points that a task must be wide to be labelled.
const LABELLED: f32 = 22.0;

/// Where a block of lanes stands, and how its time is laid out.
#[derive(Clone, Copy)]
pub struct Placed {
    /// All of it, ruler and names included.
    pub rect: Rect,
    /// Height of a lane.
    pub lane_height: f32,
    /// Nanoseconds of the whole width when nothing is zoomed.
    pub full_nanos: f64,
    /// What is seen.
    pub zoom: Zoom,
}

impl Placed {
    /// Where tasks are drawn.
    pub fn plot(&self) -> Rect {
        Rect::from_min_max(pos2(self.rect.left() + GUTTER, self.rect.top() + RULER), self.rect.max)
    }

    /// First and last nanosecond that is seen.
    pub fn window(&self) -> (f64, f64) {
        (self.zoom.from * self.full_nanos, self.zoom.to * self.full_nanos)
    }

    fn points_per_nano(&self) -> f64 {
        let (from, to) = self.window();
        f64::from(self.plot().width()) / (to - from).max(1e-9)
    }

    /// The nanosecond at a point.
    pub fn nanos_at(&self, x: f32) -> f64 {
        self.window().0 + f64::from(x - self.plot().left()) / self.points_per_nano()
    }

    fn x(&self, nanos: f64) -> f32 {
        self.plot().left() + ((nanos - self.window().0) * self.points_per_nano()) as f32
    }

    /// Rectangle of lane number `i`, without the gutter.
    pub fn lane(&self, i: usize) -> Rect {
        let plot = self.plot();
        paint::lane_rect(
            plot.left(),
            plot.right(),
            plot.top() + i as f32 * self.lane_height + 1.0,
            self.lane_height - 2.0,
        )
    }

    /// The lane at a point, by number.
    pub fn lane_at(&self, pos: Pos2) -> Option<usize> {
        let plot = self.plot();
        plot.contains(pos).then(|| ((pos.y - plot.top()) / self.lane_height) as usize)
    }
}

/// What is needed to draw beside the place.
pub struct Style<'a> {
    /// Colours.
    pub palette: Palette,
    /// What colours say.
    pub color_by: ColorBy,
    /// The hatching of bubbles.
    pub hatch: &'a mut Hatch,
}

/// Draws ruler, lanes, tasks and bubbles of the lanes that are shown.
pub fn block(ui: &Ui, lanes: &Lanes, shown: &[usize], placed: Placed, style: &mut Style) {
    let painter = ui.painter().with_clip_rect(placed.rect.intersect(ui.clip_rect()));
    ruler(&painter, placed, style.palette, ui);
    let plot = placed.plot();
    let inner = painter.with_clip_rect(plot.intersect(ui.clip_rect()));
    let mut background = Mesh::default();
    let mut tasks = Mesh::default();
    let mut hatched = Mesh::with_texture(style.hatch.texture(ui.ctx()));
    let mut labels = Vec::new();
    let pixel = 1.0 / ui.ctx().pixels_per_point();
    for (row, &at) in shown.iter().enumerate() {
        let (lane, rect) = (&lanes.lanes[at], placed.lane(row));
        if !rect.intersects(ui.clip_rect()) {
            continue;
        }
        paint::quad(&mut background, rect, style.palette.lane());
        lanes::visible(&lane.gaps, placed.window(), placed.points_per_nano(), pixel, |left, right, gap: &Gap| {
            let rect = cut(rect, plot.left() + left, plot.left() + right);
            let color = gap.cause.map_or(style.palette.rule(), |cause| style.palette.bubble(cause));
            Hatch::quad(&mut hatched, rect, color);
        });
        lanes::visible(&lane.bars, placed.window(), placed.points_per_nano(), pixel, |left, right, bar: &Bar| {
            let span = &lanes.snapshot.spans[bar.span as usize];
            let rect = cut(rect, plot.left() + left, plot.left() + right);
            let color = style.palette.task(span, style.color_by);
            paint::quad(&mut tasks, rect, color);
            if rect.width() > 3.0 {
                // An edge, so that tasks of one colour are told apart.
                let edge = Rect::from_min_max(pos2(rect.right() - pixel, rect.top()), rect.max);
                paint::quad(&mut tasks, edge, color.lerp_to_gamma(Color32::BLACK, 0.45));
            }
            if rect.width() > LABELLED && rect.height() > 9.0 {
                labels.push((rect, bar.span));
            }
        });
    }
    paint::add(&inner, background);
    paint::add(&inner, hatched);
    paint::add(&inner, tasks);
    let font = FontId::proportional((placed.lane_height - 5.0).clamp(8.0, 11.0));
    for (rect, span) in labels {
        let span = &lanes.snapshot.spans[span as usize];
        let text = label(span, rect.width(), font.size);
        if !text.is_empty() {
            let clipped = inner.with_clip_rect(rect.intersect(inner.clip_rect()));
            clipped.text(rect.center(), Align2::CENTER_CENTER, text, font.clone(), style.palette.on_task());
        }
    }
    names(&painter, lanes, shown, placed, ui);
}

fn cut(lane: Rect, left: f32, right: f32) -> Rect {
    Rect::from_min_max(
        pos2(left.max(lane.left() - 2.0), lane.top()),
        pos2(right.min(lane.right() + 2.0), lane.bottom()),
    )
}

/// As much as fits: the microbatch and the pass, then the kind.
fn label(span: &engine::telemetry::Span, width: f32, size: f32) -> String {
    let short = match (span.microbatch, span.pass) {
        (Some(microbatch), Some(pass)) => format!("{microbatch}{pass}"),
        (Some(microbatch), None) => microbatch.to_string(),
        (None, Some(pass)) => pass.to_string(),
        (None, None) => String::new(),
    };
    let letters = (width / (size * 0.52)) as usize;
    let layer = span.layer.map_or_else(String::new, |layer| format!(" L{layer}"));
    let long = format!("{short} {}{layer}", span.kind.0);
    let long = long.trim();
    if long.len() <= letters {
        long.to_owned()
    } else if short.len() <= letters {
        short
    } else {
        String::new()
    }
}

fn names(painter: &Painter, lanes: &Lanes, shown: &[usize], placed: Placed, ui: &Ui) {
    let text = ui.visuals().text_color();
    let size = (placed.lane_height - 4.0).clamp(8.0, 12.0);
    for (row, &at) in shown.iter().enumerate() {
        let (lane, rect) = (&lanes.lanes[at], placed.lane(row));
        let left = placed.rect.left();
        let idle = units::percent(lane.idle_share(lanes.length_nanos));
        let font = FontId::proportional(size);
        painter.text(pos2(placed.plot().left() - 6.0, rect.center().y), Align2::RIGHT_CENTER, idle, font.clone(), text);
        let clip = Rect::from_min_max(pos2(left, rect.top()), pos2(placed.plot().left() - 46.0, rect.bottom()));
        let clipped = painter.with_clip_rect(clip.intersect(painter.clip_rect()));
        let name = format!("{} {}", lane.rank, lane.stream);
        clipped.text(pos2(left + 2.0, rect.center().y), Align2::LEFT_CENTER, name, font, text);
    }
}

fn ruler(painter: &Painter, placed: Placed, palette: Palette, ui: &Ui) {
    let (from, to) = placed.window();
    let plot = placed.plot();
    let text = ui.visuals().weak_text_color();
    let step = nice((to - from) / f64::from(plot.width() / 90.0).max(1.0));
    let mut mark = (from / step).ceil() * step;
    let font = FontId::proportional(10.0);
    painter.text(pos2(plot.left() - 6.0, placed.rect.top() + 8.0), Align2::RIGHT_CENTER, "idle", font.clone(), text);
    while mark <= to {
        let x = placed.x(mark);
        painter.vline(x, egui::Rangef::new(placed.rect.top() + 12.0, plot.bottom()), Stroke::new(1.0, palette.rule()));
        if x < plot.right() - 30.0 {
            painter.text(
                pos2(x + 2.0, placed.rect.top() + 8.0),
                Align2::LEFT_CENTER,
                units::nanos(mark),
                font.clone(),
                text,
            );
        }
        mark += step;
    }
}

/// 1, 2 or 5 times a power of ten, at least `size`.
fn nice(size: f64) -> f64 {
    let size = size.max(1.0);
    let power = 10f64.powf(size.log10().floor());
    [1.0, 2.0, 5.0, 10.0].into_iter().map(|times| times * power).find(|step| *step >= size).unwrap_or(size)
}

/// Outlines a task and what it waited for, with lines between them.
pub fn dependencies(ui: &Ui, lanes: &Lanes, shown: &[usize], placed: Placed, span: u32, palette: Palette) {
    let painter = ui.painter().with_clip_rect(placed.plot().intersect(ui.clip_rect()));
    let mut after: Option<Pos2> = None;
    for task in lanes.chain(span) {
        let Some((lane, bar)) = lanes.find(task) else { continue };
        let Some(row) = shown.iter().position(|at| *at == lane) else { continue };
        let (left, right) = (placed.x(bar.start as f64), placed.x(bar.end as f64));
        let rect = cut(placed.lane(row), left, right.max(left + 2.0));
        painter.rect_stroke(rect, 0.0, Stroke::new(2.0, palette.cursor()), StrokeKind::Inside);
        if let Some(after) = after {
            painter.line_segment([rect.right_center(), after], Stroke::new(1.5, palette.cursor()));
        }
        after = Some(rect.left_center());
    }
}

/// Names lanes for screen readers and tests: what a lane is, how much of it is idle and why.
pub fn name_lanes(ui: &Ui, title: &str, lanes: &Lanes, shown: &[usize], placed: Placed) {
    for (row, &at) in shown.iter().enumerate() {
        let lane = &lanes.lanes[at];
        let rect = placed.lane(row);
        let rect = Rect::from_min_size(pos2(placed.rect.left(), rect.top()), vec2(GUTTER, rect.height()));
        if !rect.intersects(ui.clip_rect()) {
            continue;
        }
        let response = paint::named(ui, rect, ("lane", title, at), Role::Label, || lane_text(title, lanes, lane));
        response.on_hover_text(lane_text(title, lanes, lane));
    }
}

fn lane_text(title: &str, lanes: &Lanes, lane: &Lane) -> String {
    let mut text = format!(
        "{title}: rank {} {}, {} tasks, idle {}",
        lane.rank,
        lane.stream,
        lane.bars.len(),
        units::percent(lane.idle_share(lanes.length_nanos))
    );
    for (cause, share) in lane.idle_by_cause(lanes.length_nanos) {
        text += &format!("\n{}: {}", cause.name().replace('_', " "), units::percent(share));
    }
    text
}

/// What a person may want to know of a task.
pub fn task_text(lanes: &Lanes, span: u32) -> String {
    let Some(task) = lanes.snapshot.spans.get(span as usize) else { return String::new() };
    let mut text = format!("{}\n{}, {}", task.label, task.kind, units::nanos(task.nanos() as f64));
    let mut add = |name: &str, value: String| text += &format!("\n{name}: {value}");
    if let Some(pass) = task.pass {
        add("pass", pass.to_string());
    }
    add("rank", format!("{}, {}, stage {}", task.rank, task.stream, task.stage));
    if let Some(layer) = task.layer {
        add("layer", layer.to_string());
    }
    if let Some(microbatch) = task.microbatch {
        add("microbatch", microbatch.to_string());
    }
    if task.wait_nanos > 0 {
        add("waited for other ranks", units::nanos(task.wait_nanos as f64));
    }
    if let Some((mine, most)) = task.load {
        add("rows", format!("{mine}; busiest rank {most}"));
    }
    let cost = &task.cost;
    if cost.flops() > 0 {
        let rate = cost.flops() as f64 / (task.nanos().max(1) as f64 * 1e-9);
        add("operations", format!("{}FLOP, {}FLOP/s", units::count(cost.flops() as f64), units::count(rate)));
    }
    if cost.memory_bytes() > 0 {
        add("memory traffic", units::bytes(cost.memory_bytes() as f64));
    }
    if is_communication(task) && cost.intra_node_bytes + cost.inter_node_bytes > 0 {
        let inside = units::bytes(cost.intra_node_bytes as f64);
        add("on links", format!("{inside} in the node, {} between nodes", units::bytes(cost.inter_node_bytes as f64)));
    }
    if let Some(before) = task.waited_for.and_then(|before| lanes.snapshot.spans.get(before as usize)) {
        add("waited for", before.label.to_string());
    }
    text
}
