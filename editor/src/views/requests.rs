//! Requests of a model that serves: how many run and wait, how full the cache is and how fast it goes, as curves over the last steps;
//! and a table of the requests that there are, asked for after each step while it is shown. A run that trains has none, and says so.

use std::cmp::Ordering;

use egui::{Align2, Color32, FontId, Rect, Role, ScrollArea, Sense, Shape, Stroke, Ui, WidgetInfo, pos2, vec2};
use serde_json::{Value, json};

use super::gauges::{self, RUNNING};
use crate::{
    desk::{Desk, Link},
    paint,
    theme::Palette,
    units,
    view::View,
};

/// Height of a row of the table, and size of its text.
const ROW: [f32; 2] = [18.0, 12.0];
/// Least width of the bar of tokens.
const BAR: f32 = 72.0;

/// The view.
#[derive(Default)]
pub struct Requests {
    requests: Vec<Request>,
    sort: Sort,
    asking: Option<u64>,
    /// History that the table was last asked for.
    seen_version: Option<u64>,
    was_live: bool,
    error: Option<String>,
}

/// A request, as the run tells of it.
#[derive(Clone, Debug, Default, PartialEq)]
struct Request {
    id: u64,
    priority: i64,
    state: String,
    num_prompt: u64,
    num_computed: u64,
    num_generated: u64,
    max_new: u64,
    num_blocks: u64,
    age_secs: f64,
}

/// A column of the table.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
enum Column {
    #[default]
    Id,
    State,
    Computed,
    Prompt,
    Generated,
    Blocks,
    Priority,
    Age,
}

/// Column, title, width (none takes what is left), and what it means.
const COLUMNS: [(Column, &str, Option<f32>, &str); 8] = [
    (Column::Id, "id", Some(34.0), "number of the request: lower ones came first"),
    (
        Column::State,
        "state",
        Some(80.0),
        "running: it holds blocks; preempted: they were taken for others, and it waits",
    ),
    (
        Column::Computed,
        "computed",
        None,
        "tokens in the cache, of those that it will have at most; a mark where its prompt ends",
    ),
    (Column::Prompt, "prompt", Some(48.0), "tokens of its prompt"),
    (Column::Generated, "new", Some(40.0), "tokens that were generated"),
    (Column::Blocks, "blocks", Some(46.0), "blocks of the cache that it holds"),
    (Column::Priority, "priority", Some(52.0), "higher goes first"),
    (Column::Age, "age", Some(56.0), "time since it came"),
];

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Sort {
    by: Column,
    descends: bool,
}

impl View for Requests {
    fn name(&self) -> &'static str {
        "Requests"
    }

    fn ui(&mut self, ui: &mut Ui, desk: &mut Desk) {
        self.take(desk);
        let Some(track) = desk.main() else {
            ui.label(
                "no requests: attach to a model that serves, as `hadal serve CHECKPOINT --remote 127.0.0.1:0` does",
            );
            return;
        };
        let is_live = desk.is_live();
        let serves = track.history.curve(RUNNING).is_some();
        let version = track.history.version();
        let is_new = is_live && !self.was_live;
        self.was_live = is_live;
        // Of a run that has told steps, they say whether it serves; before the first, it is asked.
        let may_ask = serves || (is_new && track.history.range().is_none());
        if is_live && may_ask && self.asking.is_none() && (is_new || self.seen_version != Some(version)) {
            self.seen_version = Some(version);
            self.asking = desk.call("world.query", json!({ "components": ["Request"] }));
        }
        if !serves && self.requests.is_empty() {
            idle(ui, desk, self.error.as_deref());
            return;
        }
        gauges::ui(ui, desk);
        ui.add_space(2.0);
        self.summary(ui, desk);
        self.table(ui);
    }
}

/// Nobody asks, and why.
fn idle(ui: &mut Ui, desk: &Desk, error: Option<&str>) {
    let has_steps = desk.main().is_some_and(|track| track.history.range().is_some());
    match (has_steps, error) {
        (false, None) => {
            ui.label("no serving step was seen yet: they come with requests");
        }
        (true, _) => {
            ui.label("nobody asks this run: its steps are not those of a model that serves");
            ui.weak("hadal serve CHECKPOINT --remote 127.0.0.1:0 serves, and can be attached to");
        }
        (false, Some(error)) => {
            ui.label("nobody asks this run: it does not serve");
            ui.weak(error);
        }
    }
}

impl Requests {
    /// Takes the reply.
    fn take(&mut self, desk: &mut Desk) {
        let Some(reply) = self.asking.and_then(|id| desk.take_reply(id)) else { return };
        self.asking = None;
        match reply {
            Ok(list) => (self.requests, self.error) = (requests(&list), None),
            Err(error) => (self.requests, self.error) = (Vec::new(), Some(error)),
        }
        sort(&mut self.requests, self.sort);
    }

    /// What the table is of, and when.
    fn summary(&self, ui: &mut Ui, desk: &Desk) {
        let palette = Palette::of(ui.ctx());
        ui.horizontal_wrapped(|ui| {
            for state in ["running", "waiting", "preempted"] {
                let count = self.requests.iter().filter(|request| request.state == state).count();
                crate::help::key(ui, color_of(state, palette), format!("{count} {state}"));
            }
            match desk.main().map(|track| &track.link) {
                Some(Link::Connected) if desk.cursor.step.is_some() => {
                    ui.weak("gauges are of the step under the cursor, the table is of now");
                }
                Some(Link::Lost(_) | Link::Ended(_)) if !self.requests.is_empty() => {
                    ui.colored_label(palette.warning(), "as it was when the run was last heard of");
                }
                _ => {}
            }
            if let Some(error) = &self.error {
                ui.colored_label(palette.error(), error);
            }
        });
    }

    fn table(&mut self, ui: &mut Ui) {
        let fixed: f32 = COLUMNS.iter().filter_map(|(_, _, width, _)| *width).sum();
        let bar = (ui.available_width() - ui.spacing().scroll.allocated_width() - fixed).max(BAR);
        let widths = COLUMNS.map(|(_, _, width, _)| width.unwrap_or(bar));
        ScrollArea::horizontal().id_salt("table").auto_shrink(false).show(ui, |ui| {
            self.head(ui, widths);
            if self.requests.is_empty() {
                ui.label("no request waits or runs now");
                return;
            }
            let rows = ScrollArea::vertical().id_salt("rows").auto_shrink(false);
            ui.spacing_mut().item_spacing.y = 0.0;
            rows.show_rows(ui, ROW[0], self.requests.len(), |ui, range| {
                for (at, request) in range.clone().zip(&self.requests[range]) {
                    row(ui, request, at, widths);
                }
            });
        });
    }

    /// Titles: a click sorts by one, a second one the other way round.
    fn head(&mut self, ui: &mut Ui, widths: [f32; COLUMNS.len()]) {
        let (rect, _) = ui.allocate_exact_size(vec2(widths.iter().sum(), ROW[0]), Sense::hover());
        let (font, color) = (FontId::proportional(ROW[1]), ui.visuals().strong_text_color());
        for ((column, title, _, about), cell) in COLUMNS.into_iter().zip(cells(rect, widths)) {
            let is_sorted = self.sort.by == column;
            let response = paint::named(ui, cell, title, Role::Button, || match (is_sorted, self.sort.descends) {
                (false, _) => format!("sort by {title}"),
                (true, descends) => format!("sorted by {title}, {}", if descends { "descending" } else { "ascending" }),
            });
            let painter = ui.painter().with_clip_rect(cell.intersect(ui.clip_rect()));
            let text = painter.layout_no_wrap(title.to_owned(), font.clone(), color);
            let width = text.size().x;
            let left = if is_text(column) { cell.left() } else { cell.right() - 6.0 - width };
            painter.galley(pos2(left, cell.center().y - text.size().y / 2.0), text, color);
            if is_sorted {
                // Up for ascending; beside the text, where there is room.
                let tip = if self.sort.descends { 3.0 } else { -3.0 };
                let middle = pos2(if is_text(column) { left + width + 7.0 } else { left - 7.0 }, cell.center().y);
                let corner = |x: f32, y: f32| middle + vec2(x, y);
                let points = vec![corner(-3.5, -tip), corner(3.5, -tip), corner(0.0, tip)];
                painter.add(Shape::convex_polygon(points, color, Stroke::NONE));
            }
            if response.on_hover_text(about).clicked() {
                let descends = is_sorted && !self.sort.descends;
                self.sort = Sort { by: column, descends };
                sort(&mut self.requests, self.sort);
            }
        }
        ui.painter().hline(rect.x_range(), rect.bottom(), Stroke::new(1.0, Palette::of(ui.ctx()).rule()));
    }
}

/// Whether a column is set from its left.
fn is_text(column: Column) -> bool {
    matches!(column, Column::State | Column::Computed)
}

/// The cells of a row.
fn cells(row: Rect, widths: [f32; COLUMNS.len()]) -> [Rect; COLUMNS.len()] {
    let mut left = row.left();
    widths.map(|width| {
        let cell = Rect::from_min_size(pos2(left, row.top()), vec2(width, row.height()));
        left += width;
        cell
    })
}

/// A line of the table.
fn row(ui: &mut Ui, request: &Request, at: usize, widths: [f32; COLUMNS.len()]) {
    let (rect, response) = ui.allocate_exact_size(vec2(widths.iter().sum(), ROW[0]), Sense::hover());
    let palette = Palette::of(ui.ctx());
    if at % 2 == 1 {
        ui.painter().rect_filled(rect, 0.0, ui.visuals().faint_bg_color);
    }
    let font = FontId::proportional(ROW[1]);
    let text_color = ui.visuals().text_color();
    for ((column, ..), cell) in COLUMNS.into_iter().zip(cells(rect, widths)) {
        let painter = ui.painter().with_clip_rect(cell.intersect(ui.clip_rect()));
        let number = |text: String| {
            let right = cell.right_center() - vec2(6.0, 0.0);
            painter.text(right, Align2::RIGHT_CENTER, text, font.clone(), text_color);
        };
        match column {
            Column::Id => number(request.id.to_string()),
            Column::State => {
                let color = color_of(&request.state, palette);
                painter.circle_filled(cell.left_center() + vec2(5.0, 0.0), 4.0, color);
                let left = cell.left_center() + vec2(14.0, 0.0);
                painter.text(left, Align2::LEFT_CENTER, &request.state, font.clone(), text_color);
            }
            Column::Computed => bar(&painter, cell, request, palette, text_color),
            Column::Prompt => number(request.num_prompt.to_string()),
            Column::Generated => number(request.num_generated.to_string()),
            Column::Blocks => number(request.num_blocks.to_string()),
            Column::Priority => number(request.priority.to_string()),
            Column::Age => number(units::secs(request.age_secs)),
        }
    }
    response.widget_info(|| WidgetInfo::labeled(Role::Label, true, request.describe()));
    response.on_hover_text(request.describe());
}

/// What is computed of all tokens, with a mark where the prompt ends.
fn bar(painter: &egui::Painter, cell: Rect, request: &Request, palette: Palette, text_color: Color32) {
    let all = request.num_most().max(1) as f32;
    let track = cell.shrink2(vec2(2.0, 3.0));
    let at = |tokens: u64| track.left() + track.width() * (tokens as f32 / all).min(1.0);
    painter.rect_filled(track, 2.0, palette.rule().gamma_multiply(0.6));
    let done = Rect::from_min_max(track.min, pos2(at(request.num_computed), track.bottom()));
    painter.rect_filled(done, 2.0, color_of(&request.state, palette).gamma_multiply(0.55));
    if request.max_new > 0 {
        painter.vline(
            at(request.num_prompt),
            track.bottom() - 4.0..=track.bottom(),
            Stroke::new(1.5, palette.cursor().gamma_multiply(0.6)),
        );
    }
    let text = format!("{} of {}", request.num_computed, request.num_most());
    painter.text(track.center(), Align2::CENTER_CENTER, text, FontId::proportional(10.0), text_color);
}

/// The colour of a state.
fn color_of(state: &str, palette: Palette) -> Color32 {
    match state {
        "running" => palette.good(),
        "waiting" => palette.warning(),
        _ => palette.error(),
    }
}

impl Request {
    /// Tokens that it will have at most.
    fn num_most(&self) -> u64 {
        self.num_prompt + self.max_new.max(self.num_generated)
    }

    fn describe(&self) -> String {
        format!(
            "request {}, {}: {} of {} tokens computed, prompt {}, new {} of {}, {} blocks, priority {}, {}",
            self.id,
            self.state,
            self.num_computed,
            self.num_most(),
            self.num_prompt,
            self.num_generated,
            self.max_new,
            self.num_blocks,
            self.priority,
            units::secs(self.age_secs)
        )
    }
}

/// Sorts by a column; those that are alike in it by their number.
fn sort(requests: &mut [Request], Sort { by, descends }: Sort) {
    let share = |request: &Request| request.num_computed as f64 / request.num_most().max(1) as f64;
    let compare = |a: &Request, b: &Request| match by {
        Column::Id => a.id.cmp(&b.id),
        // As they are served.
        Column::State => place(&a.state).cmp(&place(&b.state)),
        Column::Computed => share(a).total_cmp(&share(b)),
        Column::Prompt => a.num_prompt.cmp(&b.num_prompt),
        Column::Generated => a.num_generated.cmp(&b.num_generated),
        Column::Blocks => a.num_blocks.cmp(&b.num_blocks),
        Column::Priority => a.priority.cmp(&b.priority),
        Column::Age => a.age_secs.total_cmp(&b.age_secs),
    };
    let directed = |order: Ordering| if descends { order.reverse() } else { order };
    requests.sort_by(|a, b| directed(compare(a, b)).then(a.id.cmp(&b.id)));
}

fn place(state: &str) -> usize {
    ["running", "preempted", "waiting"].iter().position(|known| *known == state).unwrap_or(usize::MAX)
}

/// Reads the reply to `world.query`; what is not as expected is left out.
fn requests(list: &Value) -> Vec<Request> {
    let request = |entity: &Value| {
        let view = entity.get("components")?.get("Request")?;
        let number = |name: &str| view.get(name).and_then(Value::as_u64);
        Some(Request {
            id: number("id")?,
            priority: view.get("priority").and_then(Value::as_i64).unwrap_or(0),
            state: view.get("state")?.as_str()?.to_owned(),
            num_prompt: number("num_prompt_tokens")?,
            num_computed: number("num_computed_tokens")?,
            num_generated: number("num_generated_tokens")?,
            max_new: number("max_new_tokens").unwrap_or(0),
            num_blocks: number("num_blocks").unwrap_or(0),
            age_secs: view.get("age_secs").and_then(Value::as_f64).unwrap_or(0.0),
        })
    };
    list.get("entities").and_then(Value::as_array).into_iter().flatten().filter_map(request).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn listed() -> Value {
        let request = |id: u64, state: &str, computed: u64| {
            json!({ "entity": 100 + id, "components": { "Request": {
                "id": id, "priority": 0, "state": state, "num_prompt_tokens": 10, "num_computed_tokens": computed,
                "num_generated_tokens": 2, "max_new_tokens": 10, "num_blocks": 1, "age_secs": 0.5,
            } } })
        };
        json!({ "entities": [request(2, "waiting", 0), request(1, "running", 11), request(3, "preempted", 0), {}] })
    }

    #[test]
    fn a_reply_is_read_and_sorted_both_ways() {
        let mut list = requests(&listed());
        let ids = |list: &[Request]| list.iter().map(|request| request.id).collect::<Vec<_>>();
        assert_eq!(ids(&list), [2, 1, 3]);
        for (by, descends, want) in [
            (Column::Id, false, [1, 2, 3]),
            (Column::Id, true, [3, 2, 1]),
            (Column::State, false, [1, 3, 2]),
            (Column::State, true, [2, 3, 1]),
            (Column::Computed, true, [1, 2, 3]),
            (Column::Prompt, true, [1, 2, 3]),
        ] {
            sort(&mut list, Sort { by, descends });
            assert_eq!(ids(&list), want, "{by:?}, {descends}");
        }
    }
}
