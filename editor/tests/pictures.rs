//! A picture of each view in both themes, compared with those in `pictures/`: drawn by hand from egui's triangles, so that neither
//! a display nor a GPU is needed. `UPDATE_GOLDEN=1` accepts what is drawn now.

#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

mod common;

use common::{FakeBench, FakeSource, editor_with, raster, settle};
use editor::{app::EditorApp, desk::Selected, source::SourceEvent};
use egui::{ColorImage, Theme};
use egui_kittest::{Harness, kittest::Queryable as _};

const SIZE: [f32; 2] = [480.0, 300.0];

/// An editor that shows one view of a recorded run, and its picture.
fn drawn(view: &str, theme: Theme, size: [f32; 2], scale: f32) -> (Harness<'static, EditorApp>, ColorImage) {
    let textures = raster::Textures::default();
    let mut h = editor_with(size, scale, theme, FakeBench::default(), textures.clone());
    let source = FakeSource::default();
    source.tell(SourceEvent::Connected("fake".into()));
    (1..=24).for_each(|step| if view == "Requests" { source.serves(step) } else { source.step(step) });
    h.state_mut().desk.attach(Box::new(source), false);
    h.state_mut().desk.open("small.ron", false);
    h.state_mut().desk.selected = Some(Selected { layer: 2, expert: 5 });
    settle(&mut h, |app| {
        let is_planned =
            app.desk.document.as_ref().is_some_and(|document| document.planned.is_some() && !document.is_busy());
        is_planned && app.desk.now().is_some_and(|now| now.step == 24)
    });
    if !view.is_empty() {
        h.state_mut().show_only(view);
    }
    h.run_steps(6);
    if view == "World" {
        for label in ["open rank 0", "open layer 1", "expert 7"] {
            h.get_by_label(label).click();
            h.run_steps(4);
        }
        h.remove_cursor();
        h.run_steps(4);
    }
    let picture = raster::picture(&h, &textures);
    (h, picture)
}

fn check(view: &str) {
    for (theme, name) in [(Theme::Dark, "dark"), (Theme::Light, "light")] {
        let (_, picture) = drawn(view, theme, SIZE, 1.0);
        raster::check(&format!("{}-{name}", view.to_lowercase()), &picture);
    }
}

#[test]
fn timeline() {
    check("Timeline");
}

#[test]
fn routing() {
    check("Routing");
}

#[test]
fn curves() {
    check("Curves");
}

#[test]
fn scene() {
    check("Scene");
}

#[test]
fn world() {
    check("World");
}

#[test]
fn requests() {
    check("Requests");
}

#[test]
fn memory() {
    check("Memory");
}

#[test]
fn twice_the_pixels_show_the_same_window() {
    let (small, _) = drawn("", Theme::Dark, [1280.0, 720.0], 1.0);
    let (large, picture) = drawn("", Theme::Dark, [1280.0, 720.0], 2.0);
    assert_eq!(picture.size, [2560, 1440]);
    let lane = |h: &Harness<'static, EditorApp>| h.get_by_label_contains("measured: rank 0 compute").rect();
    let (a, b) = (lane(&small), lane(&large));
    assert!((a.min - b.min).length() < 4.0 && (a.size() - b.size()).length() < 4.0, "{a:?} and {b:?}");
    if let Some(path) = std::env::var_os("HADAL_PICTURE") {
        editor::window::write_png(path.as_ref(), &picture).unwrap();
    }
}
