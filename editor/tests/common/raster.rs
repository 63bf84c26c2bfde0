//! Pictures without a GPU: the triangles that egui made, filled by hand. Slow, exact, and the same on every machine.

use std::{
    cell::RefCell,
    collections::BTreeMap,
    path::{Path, PathBuf},
    rc::Rc,
};

use editor::{app::EditorApp, window::write_png};
use egui::{
    Color32, ColorImage, Pos2, Rect, TextureFilter, TextureId, TextureOptions, TextureWrapMode, TexturesDelta,
    epaint::Primitive,
};
use egui_kittest::Harness;

/// Differences of a channel that are none: rounding in another build.
const TOLERANCE: u8 = 6;
/// Pixels that may differ by more, of a thousand.
const MAX_DIFFERENT: usize = 2;

type Known = BTreeMap<TextureId, (ColorImage, TextureOptions)>;

/// The textures that egui has made so far.
#[derive(Clone, Default)]
pub struct Textures(Rc<RefCell<Known>>);

impl egui_kittest::TestRenderer for Textures {
    fn handle_delta(&mut self, delta: &mut TexturesDelta) {
        let mut known = self.0.borrow_mut();
        let ids: Vec<TextureId> = delta.set.keys().copied().collect();
        for id in ids {
            for change in delta.set.remove(&id).into_iter().flatten() {
                let egui::ImageData::Color(image) = &change.image;
                match change.pos {
                    None => {
                        known.insert(id, ((**image).clone(), change.options));
                    }
                    Some([left, top]) => {
                        let (whole, _) = known.get_mut(&id).expect("a texture that is patched is there");
                        for y in 0..image.height() {
                            for x in 0..image.width() {
                                whole[(left + x, top + y)] = image[(x, y)];
                            }
                        }
                    }
                }
            }
        }
        known.retain(|id, _| !delta.free.contains(id));
        delta.free.clear();
    }
}

/// The last frame as an image.
pub fn picture(harness: &Harness<'static, EditorApp>, textures: &Textures) -> ColorImage {
    let scale = harness.ctx.pixels_per_point();
    let rect = harness.ctx.content_rect();
    let [width, height] = [rect.width(), rect.height()].map(|points| (points * scale).round() as usize);
    let mut image = ColorImage::filled([width, height], Color32::BLACK);
    let known = textures.0.borrow();
    for primitive in harness.ctx.tessellate(harness.output().shapes.clone(), scale) {
        let Primitive::Mesh(mesh) = primitive.primitive else { continue };
        let Some((texture, options)) = known.get(&mesh.texture_id) else { continue };
        let clip = Rect::from_min_max(primitive.clip_rect.min * scale, primitive.clip_rect.max * scale);
        for corners in mesh.indices.chunks_exact(3) {
            let corners = [0, 1, 2].map(|i| mesh.vertices[corners[i] as usize]);
            triangle(&mut image, corners, scale, clip, (texture, *options));
        }
    }
    image
}

fn triangle(
    image: &mut ColorImage,
    corners: [egui::epaint::Vertex; 3],
    scale: f32,
    clip: Rect,
    texture: (&ColorImage, TextureOptions),
) {
    let [a, b, c] = corners.map(|corner| corner.pos * scale);
    let area = cross(a, b, c);
    if area == 0.0 {
        return;
    }
    let bounds = Rect::from_points(&[a, b, c]).intersect(clip);
    let range =
        |from: f32, to: f32, most: usize| (from.floor().max(0.0) as usize)..(to.ceil().max(0.0) as usize).min(most);
    for y in range(bounds.top(), bounds.bottom(), image.height()) {
        for x in range(bounds.left(), bounds.right(), image.width()) {
            let p = Pos2::new(x as f32 + 0.5, y as f32 + 0.5);
            if !clip.contains(p) {
                continue;
            }
            let weights = [cross(b, c, p) / area, cross(c, a, p) / area, cross(a, b, p) / area];
            // A pixel on the edge of two triangles is of one: of that whose edge is at its upper left.
            let edges = [(b, c), (c, a), (a, b)];
            let is_inside = weights.iter().zip(edges).all(|(w, (from, to))| {
                let edge = if area > 0.0 { to - from } else { from - to };
                *w > 0.0 || (*w == 0.0 && (edge.y < 0.0 || (edge.y == 0.0 && edge.x > 0.0)))
            });
            if !is_inside {
                continue;
            }
            let mix = |of: fn(&egui::epaint::Vertex) -> f32| -> f32 {
                weights.iter().zip(&corners).map(|(w, corner)| w * of(corner)).sum()
            };
            let color = [
                mix(|v| f32::from(v.color.r())),
                mix(|v| f32::from(v.color.g())),
                mix(|v| f32::from(v.color.b())),
                mix(|v| f32::from(v.color.a())),
            ];
            let texel = sample(texture, mix(|v| v.uv.x), mix(|v| v.uv.y));
            let source = [0, 1, 2, 3].map(|i| color[i] * texel[i] / 255.0);
            // Colours are premultiplied.
            let under = image[(x, y)].to_array();
            let over = |i: usize| {
                (source[i] + f32::from(under[i]) * (1.0 - source[3] / 255.0)).round().clamp(0.0, 255.0) as u8
            };
            image[(x, y)] = Color32::from_rgba_premultiplied(over(0), over(1), over(2), 255);
        }
    }
}

fn cross(a: Pos2, b: Pos2, c: Pos2) -> f32 {
    (b.x - a.x) * (c.y - a.y) - (b.y - a.y) * (c.x - a.x)
}

fn sample((image, options): (&ColorImage, TextureOptions), u: f32, v: f32) -> [f32; 4] {
    let (width, height) = (image.width() as i64, image.height() as i64);
    let wrap = |at: i64, size: i64| match options.wrap_mode {
        TextureWrapMode::Repeat => at.rem_euclid(size),
        _ => at.clamp(0, size - 1),
    };
    let texel = |x: i64, y: i64| image[(wrap(x, width) as usize, wrap(y, height) as usize)].to_array().map(f32::from);
    let (x, y) = (u * width as f32, v * height as f32);
    if options.magnification == TextureFilter::Nearest {
        return texel(x.floor() as i64, y.floor() as i64);
    }
    let (x, y) = (x - 0.5, y - 0.5);
    let (fx, fy) = (x - x.floor(), y - y.floor());
    let (x, y) = (x.floor() as i64, y.floor() as i64);
    let corners = [texel(x, y), texel(x + 1, y), texel(x, y + 1), texel(x + 1, y + 1)];
    [0, 1, 2, 3].map(|i| {
        let [a, b, c, d] = corners.map(|corner| corner[i]);
        (a * (1.0 - fx) + b * fx) * (1.0 - fy) + (c * (1.0 - fx) + d * fx) * fy
    })
}

/// Compares with the committed picture of this name; `UPDATE_GOLDEN=1` writes it.
pub fn check(name: &str, image: &ColorImage) {
    let path = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/pictures").join(format!("{name}.png"));
    if std::env::var_os("UPDATE_GOLDEN").is_some() {
        write_png(&path, image).expect("a picture that can be written");
        return;
    }
    let golden = read_png(&path);
    assert_eq!(golden.size, image.size, "{name}: another size");
    let differs =
        |(a, b): &(&Color32, &Color32)| a.to_array().iter().zip(b.to_array()).any(|(a, b)| a.abs_diff(b) > TOLERANCE);
    let num_different = golden.pixels.iter().zip(&image.pixels).filter(differs).count();
    if num_different * 1000 > MAX_DIFFERENT * image.pixels.len() {
        let seen = std::env::temp_dir().join(format!("hadal-{name}.png"));
        write_png(&seen, image).expect("a picture that can be written");
        panic!(
            "{name}: {num_different} of {} pixels differ; what is drawn now is in {}, and UPDATE_GOLDEN=1 accepts it",
            image.pixels.len(),
            seen.display()
        );
    }
}

fn read_png(path: &Path) -> ColorImage {
    let file =
        std::fs::File::open(path).unwrap_or_else(|e| panic!("{}: {e}; UPDATE_GOLDEN=1 writes it", path.display()));
    let mut reader = png::Decoder::new(std::io::BufReader::new(file)).read_info().expect("a PNG");
    let mut bytes = vec![0; reader.output_buffer_size().expect("a size")];
    let info = reader.next_frame(&mut bytes).expect("an image");
    ColorImage::from_rgba_unmultiplied([info.width as usize, info.height as usize], &bytes[..info.buffer_size()])
}
