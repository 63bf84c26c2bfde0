//! The window: a tool bar, docked views, a status bar. Views are told of nothing but the desk.

use std::{path::PathBuf, sync::Arc};

use egui::{CentralPanel, Color32, Context, Key, Modifiers, Panel, RichText, Ui};
use egui_tiles::{Behavior, SimplificationOptions, TileId, Tiles, Tree, UiResponse};
use engine::trace::TraceWriter;
use serde::{Deserialize, Serialize};

use crate::{
    desk::{Desk, Link},
    dialog::{Dialog, Picker, Purpose},
    help::{self, pressed},
    source::chrome,
    theme::{self, ColorBy, Palette},
    units,
    view::{Views, registry},
    workbench::Workbench,
};

/// Where the layout and the settings are kept, in eframe's storage.
const STORAGE_KEY: &str = "editor";

/// What is remembered from one start to the next.
#[derive(Default, Serialize, Deserialize)]
struct Remembered {
    layout: Option<Tree<String>>,
    is_dark: Option<bool>,
    color_by: ColorBy,
    recent: Vec<String>,
}

/// The window's contents.
pub struct EditorApp {
    /// What the views look at.
    pub desk: Desk,
    views: Views,
    order: Vec<&'static str>,
    tree: Tree<String>,
    /// Asks for files.
    pub dialog: Dialog,
    shows_help: bool,
    /// As of the last frame, for the storage.
    is_dark: bool,
}

impl EditorApp {
    /// An editor with nothing open; `storage` holds the layout of last time.
    pub fn new(
        ctx: &Context,
        storage: Option<&dyn eframe::Storage>,
        workbench: Arc<dyn Workbench>,
        picker: Picker,
    ) -> Self {
        theme::install(ctx);
        let waker = ctx.clone();
        let mut desk = Desk::new(workbench, Arc::new(move || waker.request_repaint()));
        let remembered: Remembered =
            storage.and_then(|storage| eframe::get_value(storage, STORAGE_KEY)).unwrap_or_default();
        if let Some(is_dark) = remembered.is_dark {
            set_theme(ctx, is_dark);
        }
        (desk.color_by, desk.recent) = (remembered.color_by, remembered.recent);
        let views: Vec<_> = registry();
        let order: Vec<&'static str> = views.iter().map(|view| view.name()).collect();
        let tree = remembered.layout.filter(|tree| is_whole(tree, &order)).unwrap_or_else(|| layout(&order));
        let views = views.into_iter().map(|view| (view.name(), view)).collect();
        EditorApp { desk, views, order, tree, dialog: Dialog::new(picker), shows_help: false, is_dark: true }
    }

    /// Brings a view to the front.
    pub fn show(&mut self, name: &str) {
        self.tree.make_active(|_, tile| matches!(tile, egui_tiles::Tile::Pane(pane) if pane == name));
    }

    /// Shows one view only, for pictures.
    pub fn show_only(&mut self, name: &str) {
        self.tree = Tree::new_tabs(egui::Id::unique("views"), vec![name.to_owned()]);
    }

    fn shortcuts(&mut self, ctx: &Context) {
        if self.dialog.is_open() {
            return;
        }
        let none = Modifiers::NONE;
        if pressed(ctx, Modifiers::COMMAND, Key::O) {
            self.dialog.ask(Purpose::Open, String::new());
        }
        if pressed(ctx, Modifiers::COMMAND, Key::S) {
            self.save();
        }
        if pressed(ctx, Modifiers::COMMAND, Key::R) {
            self.desk.run(false);
        }
        if pressed(ctx, none, Key::Questionmark) || pressed(ctx, Modifiers::SHIFT, Key::Questionmark) {
            self.shows_help = !self.shows_help;
        }
        // What has the focus takes the space bar and the arrows.
        let is_focused = ctx.memory(|memory| memory.focused().is_some());
        if !is_focused && pressed(ctx, none, Key::Space) && self.desk.is_live() {
            self.desk.command(if self.desk.is_paused() { "run.resume" } else { "run.pause" });
        }
        if pressed(ctx, none, Key::Period) && self.desk.is_live() {
            self.desk.command("run.step");
        }
        for (modifiers, far) in [(Modifiers::SHIFT, 10), (none, 1)] {
            if !is_focused && pressed(ctx, modifiers, Key::ArrowLeft) {
                self.desk.move_step(-far);
            }
            if !is_focused && pressed(ctx, modifiers, Key::ArrowRight) {
                self.desk.move_step(far);
            }
        }
        if pressed(ctx, none, Key::End) {
            self.desk.cursor.step = None;
        }
        if !is_focused && pressed(ctx, none, Key::ArrowUp) {
            self.move_rank(-1);
        }
        if !is_focused && pressed(ctx, none, Key::ArrowDown) {
            self.move_rank(1);
        }
        if pressed(ctx, none, Key::C) {
            self.desk.color_by = if self.desk.color_by == ColorBy::Pass { ColorBy::Kind } else { ColorBy::Pass };
        }
        if pressed(ctx, none, Key::T) {
            set_theme(ctx, !Palette::of(ctx).is_dark);
        }
        let keys = [Key::Num1, Key::Num2, Key::Num3, Key::Num4, Key::Num5, Key::Num6, Key::Num7, Key::Num8, Key::Num9];
        for (key, name) in keys.into_iter().zip(self.order.clone()) {
            if pressed(ctx, none, key) {
                self.show(name);
            }
        }
    }

    /// From all ranks to the first, and from the last to all.
    fn move_rank(&mut self, by: i64) {
        let ranks = self.desk.ranks();
        let at = self.desk.cursor.rank.and_then(|rank| ranks.iter().position(|known| *known == rank));
        let place = at.map_or(0, |at| at as i64 + 1);
        let to = (place + by).rem_euclid(ranks.len() as i64 + 1);
        self.desk.cursor.rank = (to > 0).then(|| ranks[to as usize - 1]);
    }

    fn save(&mut self) {
        let Some(document) = &mut self.desk.document else {
            self.desk.complain("there is no scene to save");
            return;
        };
        match document.path.clone() {
            None => self.dialog.ask(Purpose::SaveScene, String::new()),
            Some(path) => self.save_as(path),
        }
    }

    fn save_as(&mut self, path: PathBuf) {
        let Some(document) = &mut self.desk.document else { return };
        match document.save(path) {
            Ok(()) => {
                let title = document.title();
                self.desk.say(format!("saved {title}"));
            }
            Err(error) => self.desk.complain(error),
        }
    }

    fn tool_bar(&mut self, ui: &mut Ui) {
        ui.horizontal_wrapped(|ui| {
            ui.menu_button("File", |ui| {
                for purpose in [Purpose::Open, Purpose::Compare] {
                    if ui.button(format!("{}…", purpose.title())).clicked() {
                        self.dialog.ask(purpose, String::new());
                    }
                }
                ui.separator();
                if ui.button("Save scene").clicked() {
                    self.save();
                }
                for purpose in [Purpose::SaveScene, Purpose::ExportTrace] {
                    if ui.button(format!("{}…", purpose.title())).clicked() {
                        self.dialog.ask(purpose, String::new());
                    }
                }
            });
            ui.menu_button("View", |ui| {
                for name in self.order.clone() {
                    if ui.button(name).clicked() {
                        self.show(name);
                    }
                }
                ui.separator();
                if ui.button("Arrange anew").clicked() {
                    self.tree = layout(&self.order);
                }
                let is_dark = Palette::of(ui.ctx()).is_dark;
                if ui.button(if is_dark { "Light theme" } else { "Dark theme" }).clicked() {
                    set_theme(ui.ctx(), !is_dark);
                }
                if ui.button("Keys and colours").clicked() {
                    self.shows_help = true;
                }
            });
            ui.separator();
            let has_scene = self.desk.document.is_some();
            if ui.add_enabled(has_scene, egui::Button::new("Run")).clicked() {
                self.desk.run(false);
            }
            if ui.add_enabled(has_scene, egui::Button::new("Run from checkpoint")).clicked() {
                self.desk.run(true);
            }
            ui.separator();
            let is_live = self.desk.is_live();
            let pause = if self.desk.is_paused() { ("Resume", "run.resume") } else { ("Pause", "run.pause") };
            for (label, method) in [pause, ("Step", "run.step"), ("Checkpoint", "run.checkpoint"), ("Stop", "run.stop")]
            {
                if ui.add_enabled(is_live, egui::Button::new(label)).clicked() {
                    self.desk.command(method);
                }
            }
            ui.separator();
            self.cursor_bar(ui);
        });
    }

    fn cursor_bar(&mut self, ui: &mut Ui) {
        let desk = &mut self.desk;
        let range = desk.main().and_then(|track| track.history.range());
        let at = desk.now().map(|snapshot| snapshot.step);
        let (Some((first, last)), Some(mut at)) = (range, at) else {
            ui.label("no steps yet");
            return;
        };
        let before = at;
        let name = ui.label("step");
        let slider = egui::Slider::new(&mut at, first..=last.max(first + 1)).show_value(true);
        ui.add_enabled(last > first, slider).labelled_by(name.id);
        if at != before {
            desk.cursor.step = Some(at.min(last));
        }
        let mut follows = desk.cursor.step.is_none();
        if ui.toggle_value(&mut follows, "follow").clicked() {
            desk.cursor.step = if follows { None } else { Some(before) };
        }
        let ranks = desk.ranks();
        let text = |rank: Option<u32>| rank.map_or("all ranks".into(), |rank| format!("rank {rank}"));
        let combo = egui::ComboBox::from_id_salt("rank").selected_text(text(desk.cursor.rank)).width(76.0);
        let combo = combo.show_ui(ui, |ui| {
            for rank in std::iter::once(None).chain(ranks.into_iter().map(Some)) {
                ui.selectable_value(&mut desk.cursor.rank, rank, text(rank));
            }
        });
        let shown = text(desk.cursor.rank);
        combo.response.widget_info(|| egui::WidgetInfo::labeled(egui::Role::ComboBox, true, format!("rank: {shown}")));
    }

    fn status_bar(&self, ui: &mut Ui) {
        let palette = Palette::of(ui.ctx());
        ui.horizontal(|ui| {
            for (i, track) in self.desk.tracks.iter().enumerate() {
                let (color, text) = match &track.link {
                    Link::Connecting => (palette.warning(), "connecting".to_owned()),
                    Link::Connected => {
                        (palette.good(), self.desk.run_state.clone().filter(|_| i == 0).unwrap_or("connected".into()))
                    }
                    Link::Lost(why) => (palette.error(), format!("lost: {why}; trying again")),
                    Link::Ended(why) => (ui.visuals().text_color(), why.clone()),
                };
                help::swatch(ui, color);
                ui.label(format!("{}: {text}", short(track.source.name())));
                if track.num_dropped > 0 {
                    ui.colored_label(palette.warning(), format!("{} steps left out", track.num_dropped));
                }
                ui.separator();
            }
            if let Some(snapshot) = self.desk.now() {
                let secs = snapshot
                    .scalar("step_secs")
                    .unwrap_or_else(|| (snapshot.interval_nanos.1 - snapshot.interval_nanos.0) as f64 * 1e-9);
                ui.label(format!("step {}, {}, {} tasks", snapshot.step, units::secs(secs), snapshot.spans.len()));
                ui.separator();
            }
            let color = if self.desk.message_is_error { palette.error() } else { ui.visuals().text_color() };
            ui.add(egui::Label::new(RichText::new(&self.desk.message).color(color)).truncate());
        });
    }

    fn dialogs(&mut self, ctx: &Context) {
        let chosen = self.dialog.ui(ctx, &self.desk.wake.clone(), &self.desk.recent);
        match chosen {
            Some((Purpose::Open, target)) => self.desk.open(&target, false),
            Some((Purpose::Compare, target)) => self.desk.open(&target, true),
            Some((Purpose::SaveScene, path)) => self.save_as(PathBuf::from(path)),
            Some((Purpose::ExportTrace, path)) => match export(&self.desk, &path) {
                Ok(num_steps) => self.desk.say(format!("wrote {num_steps} steps to {path}")),
                Err(error) => self.desk.complain(error),
            },
            None => {}
        }
        help::ui(ctx, &mut self.shows_help, Palette::of(ctx));
    }
}

impl eframe::App for EditorApp {
    fn logic(&mut self, ctx: &Context, _: &mut eframe::Frame) {
        if self.desk.work() {
            ctx.request_repaint();
        }
    }

    fn ui(&mut self, ui: &mut Ui, _: &mut eframe::Frame) {
        let ctx = ui.ctx().clone();
        self.is_dark = Palette::of(&ctx).is_dark;
        self.shortcuts(&ctx);
        Panel::top("tools").show(ui, |ui| self.tool_bar(ui));
        Panel::bottom("status").show(ui, |ui| self.status_bar(ui));
        let frame = egui::Frame::NONE.fill(ui.visuals().panel_fill);
        CentralPanel::default().frame(frame).show(ui, |ui| {
            let mut docked = Docked { views: &mut self.views, desk: &mut self.desk };
            self.tree.ui(&mut docked, ui);
        });
        self.dialogs(&ctx);
    }

    fn save(&mut self, storage: &mut dyn eframe::Storage) {
        let remembered = Remembered {
            layout: Some(self.tree.clone()),
            is_dark: Some(self.is_dark),
            color_by: self.desk.color_by,
            recent: self.desk.recent.clone(),
        };
        eframe::set_value(storage, STORAGE_KEY, &remembered);
    }
}

/// Draws tiles.
struct Docked<'a> {
    views: &'a mut Views,
    desk: &'a mut Desk,
}

impl Behavior<String> for Docked<'_> {
    fn pane_ui(&mut self, ui: &mut Ui, _: TileId, pane: &mut String) -> UiResponse {
        egui::Frame::NONE.inner_margin(6.0).show(ui, |ui| {
            if let Some(view) = self.views.get_mut(pane.as_str()) {
                ui.push_id(pane.as_str(), |ui| view.ui(ui, self.desk));
            }
        });
        UiResponse::None
    }

    fn tab_title_for_pane(&mut self, pane: &String) -> egui::WidgetText {
        pane.as_str().into()
    }

    fn simplification_options(&self) -> SimplificationOptions {
        SimplificationOptions { all_panes_must_have_tabs: true, ..SimplificationOptions::default() }
    }

    fn tab_bar_color(&self, visuals: &egui::Visuals) -> Color32 {
        visuals.faint_bg_color
    }
}

fn set_theme(ctx: &Context, is_dark: bool) {
    ctx.set_theme(if is_dark { egui::Theme::Dark } else { egui::Theme::Light });
}

/// The layout of a first start: the step at the left with curves below, the rest in tabs at the right.
fn layout(order: &[&'static str]) -> Tree<String> {
    let mut tiles = Tiles::default();
    let mut panes = order.iter().map(|name| tiles.insert_pane((*name).to_owned())).collect::<Vec<_>>().into_iter();
    let (timeline, routing, curves) = (panes.next(), panes.next(), panes.next());
    let rest: Vec<TileId> = panes.collect();
    let memory = rest.last().copied();
    let right = tiles
        .insert_tab_tile(routing.into_iter().chain(rest.iter().copied().take(rest.len().saturating_sub(1))).collect());
    let upper = tiles.insert_tab_tile(timeline.into_iter().collect());
    let lower = tiles.insert_tab_tile(curves.into_iter().chain(memory).collect());
    let mut left = egui_tiles::Linear::new(egui_tiles::LinearDir::Vertical, vec![upper, lower]);
    left.shares.set_share(upper, 1.5);
    let left = tiles.insert_container(left);
    let mut root = egui_tiles::Linear::new(egui_tiles::LinearDir::Horizontal, vec![left, right]);
    root.shares.set_share(left, 1.5);
    let root = tiles.insert_container(root);
    Tree::new(egui::Id::unique("views"), root, tiles)
}

/// Whether a remembered layout has each view once: a version with other views begins anew.
fn is_whole(tree: &Tree<String>, order: &[&'static str]) -> bool {
    let mut found: Vec<&str> = tree
        .tiles
        .tiles()
        .filter_map(|tile| match tile {
            egui_tiles::Tile::Pane(pane) => Some(pane.as_str()),
            egui_tiles::Tile::Container(_) => None,
        })
        .collect();
    found.sort_unstable();
    let mut wanted = order.to_vec();
    wanted.sort_unstable();
    found == wanted
}

/// The end of a path or address.
fn short(name: &str) -> &str {
    const SHOWN: usize = 36;
    let cut = name.char_indices().rev().nth(SHOWN - 1).map_or(0, |(at, _)| at);
    &name[cut..]
}

/// Writes the kept steps that have tasks as a Chrome trace; without any, the plan.
fn export(desk: &Desk, path: &str) -> Result<usize, String> {
    let failed = |e: std::io::Error| format!("cannot write {path}: {e}");
    let kept = desk.main().into_iter().flat_map(|track| track.history.steps());
    let mut is_planned = false;
    let mut steps: Vec<_> = kept.filter(|snapshot| !snapshot.spans.is_empty()).cloned().collect();
    if steps.is_empty() {
        let planned = desk.document.as_ref().and_then(|document| document.planned.as_ref());
        steps.extend(planned.map(|planned| planned.snapshot.clone()));
        is_planned = true;
    }
    if steps.is_empty() {
        return Err("there are no tasks to export: neither steps nor a plan".into());
    }
    is_planned |= steps.iter().any(|step| step.scalar(chrome::PLANNED).is_some());
    let file = std::io::BufWriter::new(std::fs::File::create(path).map_err(failed)?);
    let writer = if is_planned { TraceWriter::planned(file) } else { TraceWriter::new(file) };
    let mut writer = writer.map_err(failed)?;
    for step in &steps {
        writer.push(step).map_err(failed)?;
    }
    writer.finish().map_err(failed)?;
    Ok(steps.len())
}
