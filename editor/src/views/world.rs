//! The world of a rank: its entities as a tree, the components of the one that is looked at, and the values that can be changed while
//! it runs. All of it is asked for, and only when something is shown: a run does not tell its world by itself.

use std::collections::{BTreeMap, BTreeSet};

use egui::{CollapsingHeader, DragValue, Role, ScrollArea, TextEdit, Ui, WidgetInfo, vec2};
use serde_json::{Value, json};

use crate::{desk::Desk, view::View};

/// The view.
#[derive(Default)]
pub struct World {
    entities: Vec<Entity>,
    children: BTreeMap<Option<u64>, Vec<usize>>,
    open: BTreeSet<u64>,
    selected: Option<u64>,
    components: Option<Value>,
    values: Vec<(String, f64)>,
    filter: String,
    listing: Option<u64>,
    getting: Option<u64>,
    asking_values: Option<u64>,
    setting: Option<u64>,
    was_live: bool,
    shown_rank: u32,
    seen_version: u64,
    error: Option<String>,
}

#[derive(Clone, Debug)]
struct Entity {
    id: u64,
    name: String,
    parent: Option<u64>,
    components: Vec<String>,
}

impl View for World {
    fn name(&self) -> &'static str {
        "World"
    }

    fn ui(&mut self, ui: &mut Ui, desk: &mut Desk) {
        self.take(desk);
        let is_live = desk.is_live();
        let is_other_rank = self.shown_rank != Self::rank(desk);
        if is_other_rank {
            // Entities of another world have other numbers.
            (self.selected, self.components) = (None, None);
        }
        if is_live && (!self.was_live || is_other_rank) {
            self.refresh(desk);
        }
        self.was_live = is_live;
        // Components follow the run, as fast as it answers.
        let version = desk.main().map_or(0, |track| track.history.version());
        if let Some(entity) = self.selected
            && is_live
            && self.getting.is_none()
            && std::mem::replace(&mut self.seen_version, version) != version
        {
            self.look_at(desk, entity);
        }
        ui.horizontal_wrapped(|ui| {
            if ui.add_enabled(is_live, egui::Button::new("Refresh")).clicked() {
                self.refresh(desk);
            }
            let name = ui.label("filter");
            ui.add(TextEdit::singleline(&mut self.filter).desired_width(120.0).hint_text("name or component"))
                .labelled_by(name.id);
            ui.label(format!("{} entities", self.entities.len()));
        });
        if let Some(error) = &self.error {
            ui.colored_label(crate::theme::Palette::of(ui.ctx()).error(), error);
        }
        if self.entities.is_empty() && !is_live {
            ui.label("no run to ask: a trace or a plan has no world");
            return;
        }
        self.live_values(ui, desk);
        let rows = self.rows();
        let height = ui.available_height() * if self.selected.is_some() { 0.5 } else { 1.0 };
        let row_height = ui.text_style_height(&egui::TextStyle::Body);
        let mut asked = None;
        ScrollArea::vertical().id_salt("entities").max_height(height).auto_shrink([false, false]).show_rows(
            ui,
            row_height,
            rows.len(),
            |ui, range| {
                for &(depth, at) in &rows[range] {
                    asked = self.row(ui, depth, at).or(asked);
                }
            },
        );
        if let Some(entity) = asked {
            self.selected = Some(entity);
            self.components = None;
            self.look_at(desk, entity);
        }
        self.inspector(ui);
    }
}

impl World {
    /// The rank whose world is shown.
    fn rank(desk: &Desk) -> u32 {
        desk.cursor.rank.unwrap_or(0)
    }

    fn look_at(&mut self, desk: &mut Desk, entity: u64) {
        self.getting = desk.call("world.get", json!({ "entity": entity, "rank": Self::rank(desk) }));
    }

    fn refresh(&mut self, desk: &mut Desk) {
        self.shown_rank = Self::rank(desk);
        self.listing = desk.call("world.list", json!({ "rank": self.shown_rank }));
        self.asking_values = desk.call("run.values", json!({}));
        if let Some(entity) = self.selected {
            self.look_at(desk, entity);
        }
    }

    /// Takes replies.
    fn take(&mut self, desk: &mut Desk) {
        let mut reply = |waiting: &mut Option<u64>| {
            let reply = waiting.and_then(|id| desk.take_reply(id))?;
            *waiting = None;
            Some(reply)
        };
        if let Some(listed) = reply(&mut self.listing) {
            match listed {
                Ok(list) => {
                    self.entities = entities(&list);
                    self.children.clear();
                    let known: BTreeSet<u64> = self.entities.iter().map(|entity| entity.id).collect();
                    for (i, entity) in self.entities.iter().enumerate() {
                        let parent = entity.parent.filter(|parent| known.contains(parent));
                        self.children.entry(parent).or_default().push(i);
                    }
                    self.error = None;
                }
                Err(error) => self.error = Some(error),
            }
        }
        if let Some(got) = reply(&mut self.getting) {
            match got {
                Ok(got) => self.components = Some(got.get("components").cloned().unwrap_or(got)),
                Err(error) => self.error = Some(error),
            }
        }
        if let Some(Ok(values)) = reply(&mut self.asking_values) {
            self.values = live_values(&values);
        }
        if let Some(set) = reply(&mut self.setting) {
            self.error = set.err();
            self.asking_values = desk.call("run.values", json!({}));
        }
    }

    /// What is seen: the children of what is open; with a filter, all that it holds for.
    fn rows(&self) -> Vec<(usize, usize)> {
        if !self.filter.is_empty() {
            let filter = self.filter.to_lowercase();
            let holds = |entity: &Entity| {
                entity.name.to_lowercase().contains(&filter)
                    || entity.components.iter().any(|component| component.to_lowercase().contains(&filter))
            };
            return (0..self.entities.len()).filter(|at| holds(&self.entities[*at])).map(|at| (0, at)).collect();
        }
        let mut rows = Vec::new();
        let mut stack: Vec<(usize, usize)> =
            self.children.get(&None).into_iter().flatten().rev().map(|at| (0, *at)).collect();
        while let Some((depth, at)) = stack.pop() {
            rows.push((depth, at));
            let id = self.entities[at].id;
            // A tree has no circle; one that does is cut.
            if self.open.contains(&id) && depth < 32 {
                stack.extend(self.children.get(&Some(id)).into_iter().flatten().rev().map(|at| (depth + 1, *at)));
            }
        }
        rows
    }

    /// A line of the tree; gives the entity that was clicked.
    fn row(&mut self, ui: &mut Ui, depth: usize, at: usize) -> Option<u64> {
        let entity = &self.entities[at];
        let num_children = self.children.get(&Some(entity.id)).map_or(0, Vec::len);
        let (id, name) = (entity.id, entity.name.clone());
        let components = entity.components.join(", ");
        let mut clicked = None;
        ui.horizontal(|ui| {
            ui.add_space(depth as f32 * 14.0);
            let is_open = self.open.contains(&id);
            if num_children > 0 {
                let sign = if is_open { "-" } else { "+" };
                let button =
                    ui.add_sized(vec2(16.0, ui.spacing().interact_size.y), egui::Button::new(sign).frame(false));
                let what = if is_open { "close" } else { "open" };
                button.widget_info(|| WidgetInfo::labeled(Role::Button, true, format!("{what} {name}")));
                if button.clicked() {
                    if is_open {
                        self.open.remove(&id)
                    } else {
                        self.open.insert(id)
                    };
                }
            } else {
                ui.add_space(22.0);
            }
            let text = if num_children > 0 { format!("{name} ({num_children})") } else { name };
            if ui.selectable_label(self.selected == Some(id), text).on_hover_text(components).clicked() {
                clicked = Some(id);
            }
        });
        clicked
    }

    fn inspector(&self, ui: &mut Ui) {
        let Some(selected) = self.selected else { return };
        ui.separator();
        let name = self.entities.iter().find(|entity| entity.id == selected).map_or("", |entity| &entity.name);
        ui.strong(format!("{name} (entity {selected})"));
        let Some(components) = &self.components else {
            ui.label("asking");
            return;
        };
        ScrollArea::vertical().id_salt("components").auto_shrink(false).show(ui, |ui| match components {
            Value::Object(components) => {
                for (name, value) in components {
                    tree(ui, name, value, 0);
                }
            }
            other => {
                ui.monospace(other.to_string());
            }
        });
    }

    fn live_values(&mut self, ui: &mut Ui, desk: &mut Desk) {
        if self.values.is_empty() {
            return;
        }
        let mut set = None;
        ui.horizontal_wrapped(|ui| {
            ui.strong("live values");
            for (name, value) in &mut self.values {
                let label = ui.label(name.as_str());
                let speed = (value.abs() * 0.01).max(1e-6);
                let response =
                    ui.add(DragValue::new(value).speed(speed).min_decimals(1).max_decimals(8)).labelled_by(label.id);
                if response.drag_stopped() || response.lost_focus() {
                    set = Some((name.clone(), *value));
                }
            }
        });
        if let Some((name, value)) = set {
            self.setting = desk.call("run.set", json!({ "path": name, "value": value }));
        }
    }
}

/// A value, and what is in it.
fn tree(ui: &mut Ui, name: &str, value: &Value, depth: usize) {
    let children: Vec<(String, &Value)> = match value {
        Value::Object(map) => map.iter().map(|(key, value)| (key.clone(), value)).collect(),
        Value::Array(list) if list.iter().any(|item| item.is_object() || item.is_array()) => {
            list.iter().enumerate().map(|(i, value)| (i.to_string(), value)).collect()
        }
        _ => Vec::new(),
    };
    if children.is_empty() || depth > 8 {
        let mut text = value.to_string();
        if let Some((end, _)) = text.char_indices().nth(400) {
            text.truncate(end);
            text += "…";
        }
        ui.horizontal_wrapped(|ui| {
            ui.label(format!("{name}:"));
            ui.monospace(text);
        });
        return;
    }
    CollapsingHeader::new(name).id_salt((name, depth)).default_open(depth < 1).show(ui, |ui| {
        for (key, value) in children.into_iter().take(1000) {
            tree(ui, &key, value, depth + 1);
        }
    });
}

/// Reads the reply to `world.list`.
fn entities(list: &Value) -> Vec<Entity> {
    let list = list.get("entities").unwrap_or(list);
    let entity = |value: &Value| {
        let id = value.get("entity").and_then(Value::as_u64)?;
        let name = value.get("name").and_then(Value::as_str).map_or_else(|| format!("entity {id}"), str::to_owned);
        let components = value.get("components").and_then(Value::as_array);
        let components = components.into_iter().flatten().filter_map(Value::as_str).map(str::to_owned).collect();
        Some(Entity { id, name, parent: value.get("parent").and_then(Value::as_u64), components })
    };
    list.as_array().into_iter().flatten().filter_map(entity).collect()
}

/// Reads the reply to `run.values`: a list of names with values, or an object.
fn live_values(values: &Value) -> Vec<(String, f64)> {
    let values = values.get("values").unwrap_or(values);
    match values {
        Value::Array(list) => list
            .iter()
            .filter_map(|value| {
                let name = value.get("path").or(value.get("name"))?.as_str()?;
                Some((name.to_owned(), value.get("value")?.as_f64()?))
            })
            .collect(),
        Value::Object(map) => map
            .iter()
            .filter_map(|(name, value)| {
                let value = value.get("value").unwrap_or(value);
                Some((name.clone(), value.as_f64()?))
            })
            .collect(),
        _ => Vec::new(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn replies_are_read_in_either_form() {
        let list = json!([{ "entity": 3, "name": "layer 0", "components": ["Layer"] }, { "entity": 4, "parent": 3 }]);
        let entities = entities(&list);
        assert_eq!((entities.len(), entities[1].parent, &*entities[1].name), (2, Some(3), "entity 4"));
        let want = vec![("lr".to_owned(), 0.5)];
        assert_eq!(live_values(&json!({ "values": [{ "path": "lr", "value": 0.5 }] })), want);
        assert_eq!(live_values(&json!({ "lr": 0.5 })), want);
    }
}
