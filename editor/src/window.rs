//! The window of the operating system, and a picture of it for those who write about it.

use std::{
    path::PathBuf,
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use eframe::{NativeOptions, Renderer};

use crate::{app::EditorApp, desk::Link, dialog, workbench::Workbench};

/// A picture waits for what is being opened, and looks this often.
const POLL: Duration = Duration::from_millis(50);

/// How a window is opened.
pub struct WindowOptions {
    /// Scenes, plans and runs.
    pub workbench: Arc<dyn Workbench>,
    /// What to open at once: the second is compared with the first.
    pub targets: Vec<String>,
    /// Run the scene at once.
    pub runs: bool,
    /// View to bring to the front.
    pub view: Option<String>,
    /// Theme, if it is not the remembered one.
    pub is_dark: Option<bool>,
    /// Width and height in points.
    pub size: [f32; 2],
    /// Take a picture and close.
    pub picture: Option<Picture>,
}

/// A picture of the window.
pub struct Picture {
    /// PNG file.
    pub path: PathBuf,
    /// Seconds that the window is left to work before it.
    pub after_secs: f64,
}

/// Why there was no window, or no picture of it.
#[derive(Debug)]
pub enum WindowError {
    /// There is no display or no OpenGL.
    Display(String),
    /// What was to be in the picture could not be opened or started.
    Target(String),
    /// Nobody answered at the address, or the picture cannot be written.
    Picture(String),
}

/// Opens the window and returns when it is closed.
///
/// # Errors
/// If there is no display or no OpenGL. If a picture is wanted, also if there is nothing to take one of, or it cannot be written.
pub fn open(options: WindowOptions) -> Result<(), WindowError> {
    let WindowOptions { workbench, targets, runs, view, is_dark, size, picture } = options;
    let is_picture = picture.is_some();
    let native = NativeOptions {
        viewport: egui::ViewportBuilder::default()
            .with_inner_size(size)
            .with_min_inner_size([480.0, 320.0])
            .with_app_id("hadal")
            .with_title("Hadal"),
        renderer: Renderer::Glow,
        // A picture is not of last time's window.
        persist_window: !is_picture,
        ..NativeOptions::default()
    };
    let failure: Arc<Mutex<Option<WindowError>>> = Arc::default();
    let shared = failure.clone();
    let run = eframe::run_native(
        "hadal",
        native,
        Box::new(move |cc| {
            let storage = cc.storage.filter(|_| !is_picture);
            let mut app = EditorApp::new(&cc.egui_ctx, storage, workbench, dialog::system_picker());
            app.desk.startup = targets.into();
            app.desk.runs_at_startup = runs;
            if let Some(view) = view {
                app.show(&view);
            }
            if let Some(is_dark) = is_dark {
                cc.egui_ctx.set_theme(if is_dark { egui::Theme::Dark } else { egui::Theme::Light });
            }
            let shot = picture.map(|picture| Shot { picture, begin_secs: None, is_taken: false, failure: shared });
            Ok(Box::new(Framed { app, shot }))
        }),
    );
    let no_display =
        |e| WindowError::Display(format!("cannot open a window: {e}; it needs X11 or Wayland, and OpenGL"));
    run.map_err(no_display)?;
    let failed = failure.lock().unwrap_or_else(PoisonError::into_inner).take();
    failed.map_or(Ok(()), Err)
}

/// The editor, and a picture if one is wanted.
struct Framed {
    app: EditorApp,
    shot: Option<Shot>,
}

struct Shot {
    picture: Picture,
    begin_secs: Option<f64>,
    is_taken: bool,
    failure: Arc<Mutex<Option<WindowError>>>,
}

impl Shot {
    fn fail(&self, why: WindowError) {
        *self.failure.lock().unwrap_or_else(PoisonError::into_inner) = Some(why);
    }
}

impl eframe::App for Framed {
    fn logic(&mut self, ctx: &egui::Context, frame: &mut eframe::Frame) {
        self.app.logic(ctx, frame);
    }

    fn ui(&mut self, ui: &mut egui::Ui, frame: &mut eframe::Frame) {
        self.app.ui(ui, frame);
        let Some(shot) = self.shot.as_mut().filter(|shot| !shot.is_taken) else { return };
        let ctx = ui.ctx().clone();
        let desk = &self.app.desk;
        if !desk.failures.is_empty() {
            shot.is_taken = true;
            shot.fail(WindowError::Target(desk.failures.join("\n")));
            ctx.send_viewport_cmd(egui::ViewportCommand::Close);
            return;
        }
        if desk.is_opening() {
            ctx.request_repaint_after(POLL);
            return;
        }
        let now_secs = ctx.input(|input| input.time);
        let begin_secs = *shot.begin_secs.get_or_insert(now_secs);
        let left_secs = shot.picture.after_secs - (now_secs - begin_secs);
        if left_secs > 0.0 {
            ctx.request_repaint_after(Duration::from_secs_f64(left_secs));
            return;
        }
        shot.is_taken = true;
        // The picture is taken all the same: it shows that there is no one.
        for track in desk.tracks.iter().filter(|track| track.history.range().is_none()) {
            if let Link::Lost(why) = &track.link {
                shot.fail(WindowError::Picture(format!("{}: {why}", track.source.name())));
            }
        }
        let (path, failure, closing) = (shot.picture.path.clone(), shot.failure.clone(), ctx.clone());
        ctx.request_screenshot(move |image| {
            if let Err(error) = write_png(&path, &image) {
                let message = format!("cannot write {}: {error}", path.display());
                *failure.lock().unwrap_or_else(PoisonError::into_inner) = Some(WindowError::Picture(message));
            }
            closing.send_viewport_cmd(egui::ViewportCommand::Close);
            closing.request_repaint();
        });
    }

    fn persist_egui_memory(&self) -> bool {
        self.shot.is_none()
    }

    fn save(&mut self, storage: &mut dyn eframe::Storage) {
        if self.shot.is_none() {
            self.app.save(storage);
        }
    }
}

/// Writes a picture as PNG.
///
/// # Errors
/// If the file cannot be written.
pub fn write_png(path: &std::path::Path, image: &egui::ColorImage) -> Result<(), String> {
    let file = std::fs::File::create(path).map_err(|e| e.to_string())?;
    let mut encoder = png::Encoder::new(std::io::BufWriter::new(file), image.width() as u32, image.height() as u32);
    encoder.set_color(png::ColorType::Rgba);
    encoder.set_depth(png::BitDepth::Eight);
    let bytes: Vec<u8> = image.pixels.iter().flat_map(|pixel| pixel.to_array()).collect();
    encoder.write_header().and_then(|mut writer| writer.write_image_data(&bytes)).map_err(|e| e.to_string())
}
