//! The sheet of keys and colours.

use egui::{Context, Key, Modifiers, RichText};
use engine::{bubbles::BubbleCause, task::Pass};

use crate::theme::Palette;

/// A key and what it does.
pub struct Shortcut {
    /// How it is written.
    pub keys: &'static str,
    /// What it does.
    pub does: &'static str,
}

/// All keys.
pub const SHORTCUTS: [Shortcut; 15] = [
    Shortcut { keys: "?", does: "this sheet" },
    Shortcut { keys: "Ctrl O", does: "open a scene, a trace, a run's folder or an address" },
    Shortcut { keys: "Ctrl S", does: "save the scene" },
    Shortcut { keys: "Ctrl R", does: "run the scene" },
    Shortcut { keys: "Space", does: "pause the run, or let it go on" },
    Shortcut { keys: ".", does: "one step, then pause" },
    Shortcut { keys: "Left, Right", does: "the step before or after" },
    Shortcut { keys: "Shift Left, Right", does: "ten steps" },
    Shortcut { keys: "End", does: "follow the newest step" },
    Shortcut { keys: "Up, Down", does: "the rank before or after; all" },
    Shortcut { keys: "+, -", does: "zoom the timeline in or out" },
    Shortcut { keys: "0", does: "the whole step in the timeline" },
    Shortcut { keys: "C", does: "colour tasks by pass or by kind" },
    Shortcut { keys: "1 to 9", does: "show a view" },
    Shortcut { keys: "T", does: "light or dark" },
];

/// Draws the sheet while it is open.
pub fn ui(ctx: &Context, is_open: &mut bool, palette: Palette) {
    egui::Window::new("Keys and colours")
        .open(is_open)
        .collapsible(false)
        .resizable(false)
        .anchor(egui::Align2::CENTER_CENTER, egui::Vec2::ZERO)
        .show(ctx, |ui| {
            egui::Grid::new("keys").num_columns(2).spacing([18.0, 3.0]).show(ui, |ui| {
                for shortcut in &SHORTCUTS {
                    ui.label(RichText::new(shortcut.keys).monospace().strong());
                    ui.label(shortcut.does);
                    ui.end_row();
                }
            });
            ui.separator();
            ui.label(
                "Over the timeline: the wheel with Ctrl zooms at the pointer, with Shift it moves, and so does dragging; a click \
                 keeps a task outlined. Over a heat map: a click selects an expert.",
            );
            ui.separator();
            ui.horizontal_wrapped(|ui| {
                for (pass, name) in [
                    (Some(Pass::Forward), "forward"),
                    (Some(Pass::InputGrad), "input gradient"),
                    (Some(Pass::WeightGrad), "weight gradient"),
                    (None, "other tasks"),
                ] {
                    key(ui, palette.pass(pass), name.to_owned());
                }
            });
            ui.horizontal_wrapped(|ui| {
                ui.label("idle, hatched:");
                for cause in BubbleCause::ALL {
                    key(ui, palette.bubble(cause), cause.name().replace('_', " "));
                }
            });
        });
}

/// A small square of a colour with a text: both in one line, also where lines wrap.
pub fn key(ui: &mut egui::Ui, color: egui::Color32, text: String) {
    let font = egui::TextStyle::Body.resolve(ui.style());
    let text_width = ui.painter().layout_no_wrap(text.clone(), font, color).size().x;
    if ui.available_size_before_wrap().x < text_width + 10.0 + 2.0 * ui.spacing().item_spacing.x {
        ui.end_row();
    }
    swatch(ui, color);
    ui.label(text);
}

/// A small square of a colour.
pub fn swatch(ui: &mut egui::Ui, color: egui::Color32) {
    let (rect, _) = ui.allocate_exact_size(egui::vec2(10.0, 10.0), egui::Sense::hover());
    ui.painter().rect_filled(rect, 2.0, color);
}

/// Whether this key was pressed with these modifiers, and not meant for a text field.
pub fn pressed(ctx: &Context, modifiers: Modifiers, key: Key) -> bool {
    let is_typing = ctx.text_edit_focused() && modifiers.is_none();
    !is_typing && ctx.input_mut(|input| input.consume_key(modifiers, key))
}
