//! The scene: its text in colours with what is wrong below it, and the same as a form. What is typed is checked and planned at
//! once; the timeline shows the plan as predicted.

use egui::{FontId, Role, ScrollArea, TextEdit, Ui, WidgetInfo};

use super::{form::Form, highlight};
use crate::{desk::Desk, document::Document, theme::Palette, units, view::View, workbench::Diagnostic};

/// The view.
#[derive(Default)]
pub struct SceneView {
    shows_form: bool,
    form: Form,
}

impl View for SceneView {
    fn name(&self) -> &'static str {
        "Scene"
    }

    fn ui(&mut self, ui: &mut Ui, desk: &mut Desk) {
        if desk.document.is_none() {
            ui.label("no scene is open");
            if ui.button("New scene").clicked() {
                desk.open_scene(None, "(\n)\n".into());
            }
            return;
        }
        let mut error = None;
        if let Some(document) = &mut desk.document {
            ui.horizontal_wrapped(|ui| {
                let mark = if document.is_modified() { " (not saved)" } else { "" };
                ui.strong(format!("{}{mark}", document.title()));
                ui.separator();
                ui.selectable_value(&mut self.shows_form, false, "Text");
                ui.selectable_value(&mut self.shows_form, true, "Form");
                if document.is_busy() {
                    ui.spinner();
                    ui.label("planning");
                }
            });
            summary(ui, document);
            faults(ui, document);
            if self.shows_form {
                if document.report.form.is_empty() {
                    ui.label("the text cannot be read as a scene; correct it first");
                }
                let changed = self.form.ui(ui, &document.report.form);
                if let Some((path, value)) = changed {
                    match desk.workbench.set(&document.text, &path, &value) {
                        Ok(text) => document.text = text,
                        Err(why) => error = Some(why),
                    }
                }
            } else {
                text(ui, document);
            }
        }
        if let Some(why) = error {
            desk.complain(why);
        }
    }
}

fn text(ui: &mut Ui, document: &mut Document) {
    let palette = Palette::of(ui.ctx());
    let plain = ui.visuals().text_color();
    let font = FontId::monospace(12.0);
    let diagnostics = document.report.diagnostics.clone();
    // Lines are as long as they are written: the field scrolls.
    let mut layouter = |ui: &Ui, buffer: &dyn egui::TextBuffer, _: f32| {
        let mut job = highlight::layout(buffer.as_str(), &diagnostics, font.clone(), palette, plain);
        job.wrap.max_width = f32::INFINITY;
        ui.fonts_mut(|fonts| fonts.layout_job(job))
    };
    ScrollArea::both().id_salt("text").auto_shrink(false).show(ui, |ui| {
        let field = TextEdit::multiline(&mut document.text)
            .code_editor()
            .desired_width(f32::INFINITY)
            .desired_rows(20)
            .layouter(&mut layouter);
        let response = ui.add(field);
        ui.ctx().accesskit_node_builder(response.id, |node| node.set_label("scene text"));
    });
}

/// What the plan comes to, in a line.
fn summary(ui: &mut Ui, document: &Document) {
    let Some(planned) = &document.planned else { return };
    let figure = |name: &str| planned.snapshot.scalar(name).filter(|value| value.is_finite());
    let mut parts = Vec::new();
    if let Some(secs) = figure("step_secs") {
        parts.push(format!("step {}", units::secs(secs)));
    }
    if let Some(rate) = figure("tokens_per_sec") {
        parts.push(format!("{} tokens/s", units::count(rate)));
    }
    if let Some(idle) = figure("idle_fraction") {
        parts.push(format!("idle {}", units::percent(idle)));
    }
    if let Some(usd) = figure("cost_usd") {
        parts.push(format!("{} USD", units::count(usd)));
    }
    let text = format!("plan: {}", parts.join(", "));
    let response = ui.label(&text);
    response.widget_info(|| WidgetInfo::labeled(Role::Label, true, &text));
    for note in &planned.notes {
        ui.weak(note);
    }
}

/// What is wrong, by place; a click goes there.
fn faults(ui: &mut Ui, document: &Document) {
    let palette = Palette::of(ui.ctx());
    let found: Vec<&Diagnostic> = document.report.diagnostics.iter().chain(&document.plan_errors).collect();
    if found.is_empty() {
        return;
    }
    ScrollArea::vertical().id_salt("faults").max_height(96.0).show(ui, |ui| {
        for fault in found {
            let place = if fault.line > 0 { format!("{}:{}: ", fault.line, fault.column) } else { String::new() };
            ui.colored_label(palette.error(), format!("{place}{}", fault.message));
            if let Some(help) = &fault.help {
                ui.weak(format!("    {help}"));
            }
        }
    });
}
