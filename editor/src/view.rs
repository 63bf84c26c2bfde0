//! A view is a tab of the window, and a file in `views/`. To add one: write the file, and add a line to [`registry`].

use std::collections::BTreeMap;

use egui::Ui;

use crate::{desk::Desk, views};

/// A tab of the window.
pub trait View {
    /// Its title; also what the saved layout calls it.
    fn name(&self) -> &'static str;

    /// Draws it and takes input.
    fn ui(&mut self, ui: &mut Ui, desk: &mut Desk);
}

/// All views, in the order of the number keys.
pub fn registry() -> Vec<Box<dyn View>> {
    vec![
        Box::<views::timeline::Timeline>::default(),
        Box::<views::routing::Routing>::default(),
        Box::<views::curves::Curves>::default(),
        Box::<views::scene::SceneView>::default(),
        Box::<views::world::World>::default(),
        Box::<views::requests::Requests>::default(),
        Box::<views::memory::MemoryView>::default(),
    ]
}

/// Views by name.
pub type Views = BTreeMap<&'static str, Box<dyn View>>;
