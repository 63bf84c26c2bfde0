//! Many rectangles as one mesh: a shape for each would cost ten times as much to tessellate.

use std::sync::Arc;

use egui::{
    Color32, ColorImage, Context, Mesh, Painter, Pos2, Rect, Response, Role, Sense, Shape, TextureHandle, TextureId,
    TextureOptions, TextureWrapMode, Ui, Vec2, WidgetInfo, epaint, pos2,
};

/// Points of a period of the hatching.
const HATCH: usize = 8;

/// Adds a rectangle of one colour.
pub fn quad(mesh: &mut Mesh, rect: Rect, color: Color32) {
    quad_uv(mesh, rect, Rect::from_min_max(epaint::WHITE_UV, epaint::WHITE_UV), color);
}

/// Adds a rectangle with a part of the mesh's texture.
pub fn quad_uv(mesh: &mut Mesh, rect: Rect, uv: Rect, color: Color32) {
    let first = mesh.vertices.len() as u32;
    let vertex = |pos: Pos2, uv: Pos2| epaint::Vertex { pos, uv, color };
    mesh.vertices.extend_from_slice(&[
        vertex(rect.left_top(), uv.left_top()),
        vertex(rect.right_top(), uv.right_top()),
        vertex(rect.right_bottom(), uv.right_bottom()),
        vertex(rect.left_bottom(), uv.left_bottom()),
    ]);
    mesh.indices.extend_from_slice(&[first, first + 1, first + 2, first, first + 2, first + 3]);
}

/// Adds a mesh that is done.
pub fn add(painter: &Painter, mesh: Mesh) {
    if !mesh.is_empty() {
        painter.add(Shape::Mesh(Arc::new(mesh)));
    }
}

/// Diagonal stripes, as a texture that repeats: rectangles of any size are hatched by two triangles.
#[derive(Default)]
pub struct Hatch(Option<TextureHandle>);

impl Hatch {
    /// The texture.
    pub fn texture(&mut self, ctx: &Context) -> TextureId {
        let texture = self.0.get_or_insert_with(|| {
            let pixel = |i: usize| match (i % HATCH + i / HATCH) % HATCH {
                0 | 1 => Color32::WHITE,
                2 | 7 => Color32::from_white_alpha(0x90),
                _ => Color32::from_white_alpha(0x38),
            };
            let pixels = (0..HATCH * HATCH).map(pixel).collect();
            let options = TextureOptions { wrap_mode: TextureWrapMode::Repeat, ..TextureOptions::LINEAR };
            ctx.load_texture("hatching", ColorImage::new([HATCH, HATCH], pixels), options)
        });
        texture.id()
    }

    /// Adds a hatched rectangle to a mesh of this texture. Stripes hang on the screen, so that neighbors fit together.
    pub fn quad(mesh: &mut Mesh, rect: Rect, color: Color32) {
        let uv = Rect::from_min_max(
            (rect.min.to_vec2() / HATCH as f32).to_pos2(),
            (rect.max.to_vec2() / HATCH as f32).to_pos2(),
        );
        quad_uv(mesh, rect, uv, color);
    }
}

/// Gives a painted thing a name that screen readers and tests find it by, and that can be focused and clicked.
pub fn named(ui: &Ui, rect: Rect, id: impl egui::AsIdSalt, role: Role, label: impl Fn() -> String) -> Response {
    let rect = Rect::from_min_size(rect.min, rect.size().max(Vec2::splat(1.0)));
    let response = ui.interact(rect, ui.scope_id().with(id), Sense::click());
    response.widget_info(|| WidgetInfo::labeled(role, true, label()));
    response
}

/// Says something about a picture that stands at `rect`: read out, not drawn, not in the way of the pointer.
pub fn describe(ui: &Ui, rect: Rect, id: impl egui::AsIdSalt, label: impl Fn() -> String) {
    let response = ui.interact(rect, ui.scope_id().with(id), Sense::hover());
    response.widget_info(|| WidgetInfo::labeled(Role::Label, true, label()));
}

/// The rectangle snapped to whole pixels in height, so that lanes are sharp.
pub fn lane_rect(left: f32, right: f32, top: f32, height: f32) -> Rect {
    Rect::from_min_max(pos2(left, top.round()), pos2(right, (top + height).round()))
}
