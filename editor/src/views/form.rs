//! The scene as a form: a field for each value of each section. A change goes into the text, which stays the one truth.

use egui::{CollapsingHeader, ComboBox, Grid, Role, ScrollArea, TextEdit, Ui, WidgetInfo};

use crate::workbench::{FormField, FormSection};

/// What is typed into a field until it is taken.
#[derive(Default)]
pub struct Form {
    typing: Option<(String, String)>,
}

impl Form {
    /// Draws the form; gives a path and its new value as RON, when one was chosen.
    pub fn ui(&mut self, ui: &mut Ui, sections: &[FormSection]) -> Option<(String, String)> {
        let mut changed = None;
        ScrollArea::vertical().id_salt("form").auto_shrink(false).show(ui, |ui| {
            for section in sections {
                let title = if section.name.is_empty() { "scene" } else { &section.name };
                let is_open = matches!(title, "scene" | "pipeline" | "mesh" | "batch" | "plan");
                CollapsingHeader::new(title).id_salt(("section", title)).default_open(is_open).show(ui, |ui| {
                    Grid::new(("fields", title)).num_columns(2).spacing([10.0, 3.0]).show(ui, |ui| {
                        for field in &section.fields {
                            let name =
                                field.path.strip_prefix(&section.name).unwrap_or(&field.path).trim_start_matches('.');
                            let label = ui.label(name);
                            if field.written_at.is_none() {
                                label
                                    .clone()
                                    .on_hover_text("not written in this file: a default, or of the scene it extends");
                            }
                            changed = self.field(ui, field, label.id).or(changed.take());
                            ui.end_row();
                        }
                    });
                });
            }
        });
        changed
    }

    fn field(&mut self, ui: &mut Ui, field: &FormField, label: egui::Id) -> Option<(String, String)> {
        let chosen = |value: &str| Some((field.path.clone(), value.to_owned()));
        if field.value == "true" || field.value == "false" {
            let mut is_on = field.value == "true";
            let response = ui.add(egui::Checkbox::without_text(&mut is_on));
            response.widget_info(|| WidgetInfo::selected(Role::CheckBox, true, is_on, &field.path));
            return response.changed().then(|| chosen(if is_on { "true" } else { "false" })).flatten();
        }
        if !field.choices.is_empty() {
            let mut value = field.value.clone();
            let combo = ComboBox::from_id_salt(&field.path).selected_text(short(&value)).width(150.0);
            let combo = combo.show_ui(ui, |ui| {
                for choice in &field.choices {
                    ui.selectable_value(&mut value, choice.clone(), choice);
                }
            });
            combo.response.widget_info(|| WidgetInfo::labeled(Role::ComboBox, true, &field.path));
            return if value == field.value { None } else { chosen(&value) };
        }
        let is_typed = self.typing.as_ref().is_some_and(|(path, _)| *path == field.path);
        let mut text = match &self.typing {
            Some((path, text)) if *path == field.path => text.clone(),
            _ => field.value.clone(),
        };
        let response = ui.add(TextEdit::singleline(&mut text).desired_width(150.0)).labelled_by(label);
        if response.changed() {
            self.typing = Some((field.path.clone(), text.clone()));
        }
        if response.lost_focus() && is_typed {
            self.typing = None;
            if text != field.value {
                return chosen(&text);
            }
        }
        None
    }
}

fn short(text: &str) -> &str {
    text.char_indices().nth(28).map_or(text, |(end, _)| &text[..end])
}
