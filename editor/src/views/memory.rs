//! Memory: bytes of each class on a rank over the tasks of the step, with the peak marked. What lives for the whole step is below
//! what comes and goes. A log tells peaks only: those have no time, and are drawn without.

use egui::{Align2, FontId, Grid, Mesh, Rect, Role, ScrollArea, Sense, Stroke, Ui, WidgetInfo, pos2, vec2};
use engine::telemetry::Snapshot;

use super::elsewhere;
use crate::{desk::Desk, help::key, paint, theme::Palette, units, view::View};

/// Prefix of figures: then the rank, if there are several, and the class.
const BYTES: &str = "bytes/";
/// For each task of the first rank, what lives for a part of the step only.
const LIVE_BYTES: &str = "live_bytes/task";
/// Classes of which `live_bytes/task` is the sum.
const PASSING: [&str; 2] = ["activations", "communication"];

/// The view.
#[derive(Default)]
pub struct MemoryView;

/// A class of bytes on a rank.
#[derive(Clone, Debug, PartialEq)]
pub struct Class {
    /// What it is of.
    pub name: String,
    /// Bytes after each task; one value for what does not change.
    pub bytes: Vec<f64>,
}

/// Bytes of a rank over a step.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct RankMemory {
    /// The rank.
    pub rank: u32,
    /// Those that stay first.
    pub classes: Vec<Class>,
}

impl RankMemory {
    /// Tasks over which bytes are told.
    pub fn num_tasks(&self) -> usize {
        self.classes.iter().map(|class| class.bytes.len()).max().unwrap_or(0)
    }

    /// Bytes of a class at a task.
    pub fn at(class: &Class, task: usize) -> f64 {
        class.bytes.get(task).or(class.bytes.last()).copied().unwrap_or(0.0)
    }

    /// The task of most bytes, and how many they are.
    pub fn peak(&self) -> (usize, f64) {
        let total = |task: usize| self.classes.iter().map(|class| Self::at(class, task)).sum::<f64>();
        let larger = |best: (usize, f64), task: usize| if total(task) > best.1 { (task, total(task)) } else { best };
        (0..self.num_tasks()).fold((0, 0.0), larger)
    }
}

/// Bytes of all ranks that a step tells of.
pub fn memory(snapshot: &Snapshot) -> Vec<RankMemory> {
    let mut ranks: Vec<RankMemory> = Vec::new();
    let mut add = |name: &str, bytes: Vec<f64>| {
        let Some(rest) = name.strip_prefix(BYTES) else { return };
        let of_rank = rest.strip_prefix("rank").and_then(|rest| rest.split_once('/'));
        let (rank, class) = of_rank.and_then(|(rank, class)| Some((rank.parse().ok()?, class))).unwrap_or((0, rest));
        let at = ranks.iter().position(|known| known.rank == rank).unwrap_or_else(|| {
            ranks.push(RankMemory { rank, classes: Vec::new() });
            ranks.len() - 1
        });
        let classes = &mut ranks[at].classes;
        // What is told over the tasks says more than the peak of the same class.
        match classes.iter_mut().find(|known| known.name == class) {
            Some(known) => known.bytes = bytes,
            None if bytes.iter().any(|bytes| *bytes > 0.0) => classes.push(Class { name: class.to_owned(), bytes }),
            None => {}
        }
    };
    snapshot.scalars.iter().for_each(|(name, value)| add(name, vec![*value]));
    snapshot.histograms.iter().for_each(|(name, values)| add(name, values.clone()));
    ranks.sort_by_key(|rank| rank.rank);
    let live = snapshot.histograms.iter().find(|(name, _)| name == LIVE_BYTES);
    if let (Some((_, live)), Some(first)) = (live, ranks.first_mut()) {
        let passes = |class: &Class| PASSING.contains(&class.name.as_str());
        let names: Vec<String> = first.classes.iter().filter(|class| passes(class)).map(|c| c.name.clone()).collect();
        first.classes.retain(|class| !passes(class));
        first.classes.push(Class { name: names.join(" and "), bytes: live.clone() });
    }
    ranks
}

impl View for MemoryView {
    fn name(&self) -> &'static str {
        "Memory"
    }

    fn ui(&mut self, ui: &mut Ui, desk: &mut Desk) {
        let tells = |snapshot: &Snapshot| {
            snapshot
                .scalars
                .iter()
                .map(|(name, _)| name)
                .chain(snapshot.histograms.iter().map(|(name, _)| name))
                .any(|name| name.starts_with(BYTES))
        };
        let measured = desk.main().and_then(|track| track.history.latest(desk.cursor.step, tells)).cloned();
        let planned = desk
            .document
            .as_ref()
            .and_then(|document| document.planned.as_ref())
            .map(|planned| planned.snapshot.clone());
        let changes = |snapshot: &Snapshot| {
            snapshot.histograms.iter().any(|(name, _)| name == LIVE_BYTES || name.starts_with(BYTES))
        };
        elsewhere::ui(ui, desk, "bytes over its tasks", changes);
        let blocks = [("measured", measured), ("predicted", planned.filter(|snapshot| tells(snapshot)))];
        if blocks.iter().all(|(_, snapshot)| snapshot.is_none()) {
            ui.label("no step or plan tells its bytes yet");
            return;
        }
        ScrollArea::vertical().auto_shrink(false).show(ui, |ui| {
            for (title, snapshot) in blocks {
                let Some(snapshot) = snapshot else { continue };
                let limit = snapshot.scalar("device_memory_bytes");
                let ranks = memory(&snapshot);
                let fullest = ranks.iter().max_by(|a, b| a.peak().1.total_cmp(&b.peak().1)).map(|rank| rank.rank);
                let rank = desk.cursor.rank.filter(|shown| ranks.iter().any(|rank| rank.rank == *shown)).or(fullest);
                if let Some(rank) = ranks.iter().find(|known| Some(known.rank) == rank) {
                    if rank.num_tasks() > 1 {
                        chart(ui, title, rank, limit);
                    } else {
                        peaks(ui, title, rank, limit, snapshot.step);
                    }
                }
                if ranks.len() > 1 {
                    ui.label("peaks of all ranks");
                    Grid::new(("peaks", title)).num_columns(2).spacing([12.0, 2.0]).show(ui, |ui| {
                        for rank in &ranks {
                            ui.label(format!("rank {}", rank.rank));
                            ui.label(units::bytes(rank.peak().1));
                            ui.end_row();
                        }
                    });
                }
                ui.separator();
            }
        });
    }
}

/// What a step without tasks tells: the peak of each class, beside each other and not over time.
fn peaks(ui: &mut Ui, title: &str, rank: &RankMemory, limit: Option<f64>, step: u64) {
    let palette = Palette::of(ui.ctx());
    let (_, sum) = rank.peak();
    let whole = limit.unwrap_or(sum).max(sum).max(1.0);
    ui.horizontal_wrapped(|ui| {
        let of = limit.map_or_else(String::new, |limit| format!(" of {}", units::bytes(limit)));
        ui.strong(format!("{title}, step {step}, rank {}: peaks of {}{of} together", rank.rank, units::bytes(sum)));
    });
    let (rect, response) = ui.allocate_exact_size(vec2(ui.available_width(), 24.0), Sense::hover());
    let label = || format!("{title} peaks of rank {}, {} together", rank.rank, units::bytes(sum));
    response.widget_info(|| WidgetInfo::labeled(Role::Image, true, label()));
    let mut mesh = Mesh::default();
    paint::quad(&mut mesh, rect, palette.lane());
    let mut left = rect.left();
    for (i, class) in rank.classes.iter().enumerate() {
        let width = (RankMemory::at(class, 0) / whole) as f32 * rect.width();
        let part = Rect::from_min_size(pos2(left, rect.top()), vec2(width, rect.height()));
        paint::quad(&mut mesh, part, palette.curve(i));
        left += width;
    }
    paint::add(ui.painter(), mesh);
    ui.horizontal_wrapped(|ui| {
        for (i, class) in rank.classes.iter().enumerate() {
            key(ui, palette.curve(i), format!("{} {}", class.name, units::bytes(RankMemory::at(class, 0))));
        }
    });
}

fn chart(ui: &mut Ui, title: &str, rank: &RankMemory, limit: Option<f64>) {
    let palette = Palette::of(ui.ctx());
    let (peak_task, peak) = rank.peak();
    ui.horizontal_wrapped(|ui| {
        let of = limit.map_or_else(String::new, |limit| format!(" of {}", units::bytes(limit)));
        ui.strong(format!("{title}, rank {}: peak {}{of} at task {peak_task}", rank.rank, units::bytes(peak)));
        for (i, class) in rank.classes.iter().enumerate() {
            key(ui, palette.curve(i), format!("{} {}", class.name, units::bytes(RankMemory::at(class, peak_task))));
        }
    });
    let height = 120.0;
    let (rect, response) = ui.allocate_exact_size(vec2(ui.available_width(), height), Sense::hover());
    response.widget_info(|| {
        WidgetInfo::labeled(
            Role::Image,
            true,
            format!("{title} memory of rank {}, peak {}", rank.rank, units::bytes(peak)),
        )
    });
    let num_tasks = rank.num_tasks().max(1);
    let columns = (rect.width() as usize).clamp(1, num_tasks.max(64));
    let top = peak.max(1.0) * 1.12;
    let y = |bytes: f64| rect.bottom() - (bytes / top) as f32 * rect.height();
    let mut mesh = Mesh::default();
    paint::quad(&mut mesh, rect, palette.lane());
    for column in 0..columns {
        // Of the tasks in a column, the fullest: no peak is left out.
        let (from, to) =
            (column * num_tasks / columns, ((column + 1) * num_tasks / columns).max(column * num_tasks / columns + 1));
        let total = |task: &usize| rank.classes.iter().map(|class| RankMemory::at(class, *task)).sum::<f64>();
        let task = (from..to.min(num_tasks)).max_by(|a, b| total(a).total_cmp(&total(b))).unwrap_or(from);
        let x = |column: usize| rect.left() + rect.width() * column as f32 / columns as f32;
        let mut below = 0.0;
        for (i, class) in rank.classes.iter().enumerate() {
            let bytes = RankMemory::at(class, task);
            let part = Rect::from_min_max(pos2(x(column), y(below + bytes)), pos2(x(column + 1), y(below)));
            paint::quad(&mut mesh, part, palette.curve(i));
            below += bytes;
        }
    }
    paint::add(ui.painter(), mesh);
    let x = rect.left() + rect.width() * (peak_task as f32 + 0.5) / num_tasks as f32;
    ui.painter().vline(x, rect.y_range(), Stroke::new(1.0, palette.cursor()));
    ui.painter().hline(rect.x_range(), y(peak), Stroke::new(1.0, palette.cursor()));
    let align = if x > rect.center().x { Align2::RIGHT_BOTTOM } else { Align2::LEFT_BOTTOM };
    let text = format!(" peak {} ", units::bytes(peak));
    ui.painter().text(pos2(x, y(peak)), align, text, FontId::proportional(11.0), ui.visuals().text_color());
    if let Some(pos) = response.hover_pos() {
        let task = (((pos.x - rect.left()) / rect.width() * num_tasks as f32) as usize).min(num_tasks - 1);
        let lines =
            rank.classes.iter().map(|class| format!("\n{}: {}", class.name, units::bytes(RankMemory::at(class, task))));
        response.on_hover_text_at_pointer(format!("task {task}{}", lines.collect::<String>()));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_peak_is_the_fullest_task_of_a_rank() {
        let snapshot = Snapshot {
            scalars: vec![("bytes/rank1/weights".into(), 100.0), ("lr".into(), 1.0)],
            histograms: vec![
                ("bytes/rank1/activations".into(), vec![1.0, 9.0, 5.0]),
                ("bytes/rank1/communication".into(), vec![0.0, 1.0, 6.0]),
            ],
            ..Snapshot::default()
        };
        let memory = memory(&snapshot);
        assert_eq!(memory.len(), 1);
        assert_eq!((memory[0].num_tasks(), memory[0].peak()), (3, (2, 111.0)));
        assert_eq!(memory[0].classes[0].name, "weights");
    }

    #[test]
    fn a_run_of_one_rank_tells_its_peaks_and_one_sum_over_the_tasks() {
        let names = ["weights", "activations", "communication"];
        let snapshot = Snapshot {
            scalars: names.map(|name| (format!("bytes/{name}"), 10.0)).into(),
            histograms: vec![("live_bytes/task".into(), vec![3.0, 15.0])],
            ..Snapshot::default()
        };
        let [rank] = &memory(&snapshot)[..] else { panic!("one rank") };
        let classes: Vec<(&str, usize)> = rank.classes.iter().map(|class| (&*class.name, class.bytes.len())).collect();
        assert_eq!((rank.rank, classes), (0, vec![("weights", 1), ("activations and communication", 2)]));
        assert_eq!(rank.peak(), (1, 25.0));
    }
}
