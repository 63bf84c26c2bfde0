//! A heat map: a texture with a pixel for each cell, drawn large and sharp. Whatever its size, it is two triangles.

use egui::{
    Color32, ColorImage, Mesh, Pos2, Rect, Response, Role, Sense, TextureHandle, TextureOptions, Ui, WidgetInfo, pos2,
    vec2,
};

use crate::{paint, theme};

/// Keeps the texture, and what it shows.
#[derive(Default)]
pub struct Heat {
    texture: Option<TextureHandle>,
    shown: Option<u64>,
}

/// Rows of values from 0 to 1.
pub struct Cells<'a> {
    /// Columns.
    pub width: usize,
    /// Rows.
    pub height: usize,
    /// The value in column x of row y.
    pub value: &'a dyn Fn(usize, usize) -> f64,
    /// Changes with the values: only then is the texture made anew.
    pub version: u64,
}

/// A drawn map.
pub struct Drawn {
    /// The widget.
    pub response: Response,
    cells: (usize, usize),
}

impl Heat {
    /// Draws `cells` in a space of this height, over the whole width.
    pub fn ui(&mut self, ui: &mut Ui, cells: &Cells, height: f32, label: impl Fn() -> String) -> Drawn {
        let (width, rows) = (cells.width.max(1), cells.height.max(1));
        if self.shown != Some(cells.version) || self.texture.is_none() {
            let color = |i: usize| theme::load_color((cells.value)(i % width, i / width));
            let image = ColorImage::new([width, rows], (0..width * rows).map(color).collect());
            match &mut self.texture {
                Some(texture) => texture.set(image, TextureOptions::NEAREST),
                None => self.texture = Some(ui.ctx().load_texture("heat map", image, TextureOptions::NEAREST)),
            }
            self.shown = Some(cells.version);
        }
        let (rect, response) = ui.allocate_exact_size(vec2(ui.available_width(), height), Sense::click());
        response.widget_info(|| WidgetInfo::labeled(Role::Image, true, label()));
        if let Some(texture) = &self.texture {
            let mut mesh = Mesh::with_texture(texture.id());
            let whole = Rect::from_min_max(Pos2::ZERO, pos2(1.0, 1.0));
            paint::quad_uv(&mut mesh, rect, whole, Color32::WHITE);
            paint::add(ui.painter(), mesh);
        }
        Drawn { response, cells: (width, rows) }
    }
}

impl Drawn {
    /// The rectangle of a cell.
    pub fn cell(&self, x: usize, y: usize) -> Rect {
        let rect = self.response.rect;
        let size = vec2(rect.width() / self.cells.0 as f32, rect.height() / self.cells.1 as f32);
        Rect::from_min_size(rect.min + vec2(x as f32 * size.x, y as f32 * size.y), size)
    }

    /// Column and row at a point.
    pub fn at(&self, pos: Pos2) -> Option<(usize, usize)> {
        let rect = self.response.rect;
        if !rect.contains(pos) {
            return None;
        }
        let place = (pos - rect.min) / rect.size();
        let index = |share: f32, count: usize| ((share * count as f32) as usize).min(count - 1);
        Some((index(place.x, self.cells.0), index(place.y, self.cells.1)))
    }

    /// The cell that was clicked.
    pub fn clicked(&self) -> Option<(usize, usize)> {
        self.response.clicked().then(|| self.response.interact_pointer_pos()).flatten().and_then(|pos| self.at(pos))
    }

    /// The cell under the pointer.
    pub fn hovered(&self) -> Option<(usize, usize)> {
        self.response.hover_pos().and_then(|pos| self.at(pos))
    }
}
