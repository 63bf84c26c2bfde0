//! Asking for a file: the system's dialog, on a thread of its own, and a text field for where there is none. A dialog that is
//! cancelled and one that cannot be shown look alike, so the field is always there.

use std::{path::PathBuf, sync::Arc};

use crate::{background::Background, source::Wake};

/// What a file is asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Purpose {
    /// To look at, instead of what is open.
    Open,
    /// To compare with what is open.
    Compare,
    /// To write the scene to.
    SaveScene,
    /// To write the steps to.
    ExportTrace,
}

impl Purpose {
    /// For titles.
    pub const fn title(self) -> &'static str {
        match self {
            Purpose::Open => "Open",
            Purpose::Compare => "Compare with",
            Purpose::SaveScene => "Save scene as",
            Purpose::ExportTrace => "Export trace",
        }
    }

    /// What may be written in the text field.
    pub const fn hint(self) -> &'static str {
        match self {
            Purpose::Open | Purpose::Compare => "scene.ron, trace.json, a run's folder, or http://host:port",
            Purpose::SaveScene => "scene.ron",
            Purpose::ExportTrace => "trace.json",
        }
    }

    const fn saves(self) -> bool {
        matches!(self, Purpose::SaveScene | Purpose::ExportTrace)
    }
}

/// Shows the system's dialog and waits for it.
pub type Picker = Arc<dyn Fn(Purpose) -> Option<PathBuf> + Send + Sync>;

/// The system's.
pub fn system_picker() -> Picker {
    Arc::new(|purpose: Purpose| {
        let dialog = rfd::FileDialog::new().set_title(purpose.title());
        let dialog = match purpose {
            Purpose::Open | Purpose::Compare => {
                dialog.add_filter("scenes and traces", &["ron", "json"]).add_filter("all files", &["*"])
            }
            Purpose::SaveScene => dialog.add_filter("scenes", &["ron"]).set_file_name("scene.ron"),
            Purpose::ExportTrace => dialog.add_filter("traces", &["json"]).set_file_name("trace.json"),
        };
        if purpose.saves() { dialog.save_file() } else { dialog.pick_file() }
    })
}

/// The window that asks.
pub struct Dialog {
    /// Shows the system's dialog.
    pub picker: Picker,
    asked: Option<Purpose>,
    text: String,
    note: &'static str,
    picking: Background<Option<PathBuf>>,
    focus: bool,
}

impl Dialog {
    /// One that asks through `picker`.
    pub fn new(picker: Picker) -> Self {
        Dialog { picker, asked: None, text: String::new(), note: "", picking: Background::default(), focus: false }
    }

    /// Asks for a file, with `text` in the field.
    pub fn ask(&mut self, purpose: Purpose, text: String) {
        (self.asked, self.text, self.note, self.focus) = (Some(purpose), text, "", true);
    }

    /// Whether it is open.
    pub fn is_open(&self) -> bool {
        self.asked.is_some()
    }

    /// Draws it; gives what was chosen.
    pub fn ui(&mut self, ctx: &egui::Context, wake: &Wake, recent: &[String]) -> Option<(Purpose, String)> {
        let purpose = self.asked?;
        let mut chosen = None;
        if !self.picking.is_busy() {
            // Looked at below; nothing is under way.
        } else if let Some(picked) = self.picking.poll() {
            match picked {
                Some(path) => chosen = Some(path.display().to_string()),
                None => self.note = "no file was chosen, or this system has no file dialog: type a path",
            }
        }
        let mut closes = ctx.input(|input| input.key_pressed(egui::Key::Escape));
        egui::Window::new(purpose.title())
            .id(egui::Id::unique("dialog"))
            .collapsible(false)
            .resizable(false)
            .anchor(egui::Align2::CENTER_CENTER, egui::Vec2::ZERO)
            .show(ctx, |ui| {
                ui.set_width(460.0);
                let name = ui.label("File, folder or address");
                let field = egui::TextEdit::singleline(&mut self.text).hint_text(purpose.hint()).desired_width(450.0);
                let field = ui.add(field).labelled_by(name.id);
                if std::mem::take(&mut self.focus) {
                    field.request_focus();
                }
                let entered = field.lost_focus() && ui.input(|input| input.key_pressed(egui::Key::Enter));
                if !self.note.is_empty() {
                    ui.label(self.note);
                }
                ui.horizontal(|ui| {
                    let is_named = !self.text.trim().is_empty();
                    let accept = if purpose.saves() { "Save" } else { "Open it" };
                    if ui.add_enabled(is_named, egui::Button::new(accept)).clicked() || (entered && is_named) {
                        chosen = Some(self.text.trim().to_owned());
                    }
                    let browse = ui.add_enabled(!self.picking.is_busy(), egui::Button::new("Browse…"));
                    if browse.clicked() {
                        let picker = self.picker.clone();
                        if self.picking.start("file dialog", wake.clone(), move || picker(purpose)).is_err() {
                            self.note = "the system gives no thread for a dialog: type a path";
                        }
                    }
                    closes |= ui.button("Cancel").clicked();
                });
                if !purpose.saves() && !recent.is_empty() {
                    ui.separator();
                    ui.label("Opened before");
                    for target in recent {
                        if ui.link(target).clicked() {
                            chosen = Some(target.clone());
                        }
                    }
                }
            });
        if chosen.is_some() || closes {
            self.asked = None;
        }
        chosen.map(|text| (purpose, text))
    }
}
