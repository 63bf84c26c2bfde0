//! The window on a display that is only memory: `hadal editor` opens with nothing but X11 and OpenGL, and draws lanes and cells.
//! What the views do is tested in the editor's own crate, without a display.

#![cfg(feature = "editor")]
#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::{
    io::{BufRead, BufReader},
    path::Path,
    process::{Child, Command, Stdio},
};

use editor::theme::{Color32, Palette, load_color};

/// A display that ends with the test.
struct Display {
    server: Child,
    name: String,
}

impl Display {
    /// None, with a word about it, where there is no Xvfb.
    fn start() -> Option<Display> {
        let command = Command::new("Xvfb")
            .args(["-displayfd", "1", "-screen", "0", "1400x900x24", "-nolisten", "tcp"])
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn();
        let Ok(mut server) = command else {
            eprintln!(
                "SKIPPED: Xvfb is not installed (Debian: apt-get install xvfb libgl1-mesa-dri libegl1 libxkbcommon-x11-0)"
            );
            return None;
        };
        let mut number = String::new();
        BufReader::new(server.stdout.take().unwrap()).read_line(&mut number).unwrap();
        Some(Display { server, name: format!(":{}", number.trim()) })
    }

    fn hadal(&self, dir: &Path, arguments: &[&str]) -> String {
        let (code, stderr) = self.exit(dir, arguments);
        assert_eq!(code, Some(0), "{arguments:?}: {stderr}");
        stderr
    }

    /// Exit code, and what was said on stderr.
    fn exit(&self, dir: &Path, arguments: &[&str]) -> (Option<i32>, String) {
        let output = Command::new(env!("CARGO_BIN_EXE_hadal"))
            .args(arguments)
            .current_dir(dir)
            .env("DISPLAY", &self.name)
            .env_remove("WAYLAND_DISPLAY")
            .env("LIBGL_ALWAYS_SOFTWARE", "1")
            // Neither settings of the person who runs the tests are used, nor are theirs written.
            .env("HOME", dir)
            .env("XDG_DATA_HOME", dir)
            .output()
            .unwrap();
        let stderr = String::from_utf8_lossy(&output.stderr).into_owned();
        (output.status.code(), stderr)
    }
}

impl Drop for Display {
    fn drop(&mut self) {
        // A display that is gone already is no failure.
        let _ = self.server.kill();
        let _ = self.server.wait();
    }
}

struct Image {
    width: usize,
    pixels: Vec<[u8; 3]>,
}

fn read(path: &Path) -> Image {
    let mut reader = png::Decoder::new(BufReader::new(std::fs::File::open(path).unwrap())).read_info().unwrap();
    let mut bytes = vec![0; reader.output_buffer_size().unwrap()];
    let info = reader.next_frame(&mut bytes).unwrap();
    let pixels = bytes[..info.buffer_size()].chunks_exact(4).map(|p| [p[0], p[1], p[2]]).collect();
    Image { width: info.width as usize, pixels }
}

impl Image {
    /// Pixels of one of these colours in a range of columns.
    fn count(&self, columns: std::ops::Range<usize>, colors: &[Color32]) -> usize {
        let is = |pixel: &[u8; 3]| {
            let near = |color: &Color32| pixel.iter().zip(color.to_array()).all(|(a, b)| a.abs_diff(b) <= 3);
            colors.iter().any(near)
        };
        let in_columns = |(i, _): &(usize, &[u8; 3])| columns.contains(&(i % self.width));
        self.pixels.iter().enumerate().filter(in_columns).filter(|(_, pixel)| is(pixel)).count()
    }
}

#[test]
fn the_window_draws_lanes_and_cells() {
    let Some(display) = Display::start() else { return };
    let dir = tempfile::tempdir().unwrap();
    let scenes = Path::new(env!("CARGO_MANIFEST_DIR")).join("scenes");
    let scene = |name: &str| scenes.join(name).display().to_string();
    let tiny = scene("tiny.ron");
    let steps = ["--set", "train.steps=16", "--set", "eval=None", "--set", "sample=None"];
    let traced = ["--set", "telemetry.trace_steps=(start: 2, count: 3)"];
    display.hadal(dir.path(), &[&["run", &tiny], &steps[..], &traced[..]].concat());
    let (quickstart, shot) = (scene("quickstart.ron"), dir.path().join("shot.png"));
    let to = shot.display().to_string();
    let picture = ["--theme", "dark", "--size", "1280x720", "--after", "5", "--screenshot", &to];
    display.hadal(dir.path(), &[&["editor", &quickstart, "runs/tiny"], &picture[..]].concat());

    check(&shot);
}

#[test]
fn a_picture_of_what_is_not_there_is_an_error() {
    let Some(display) = Display::start() else { return };
    let dir = tempfile::tempdir().unwrap();
    std::fs::write(dir.path().join("damaged.json"), "[{\"ph\": \"X\", ]").unwrap();
    std::fs::create_dir(dir.path().join("empty")).unwrap();
    std::fs::write(dir.path().join("wrong.ron"), "(trian: ())").unwrap();
    let check = |arguments: &[&str], code, why: &str| {
        let (found, stderr) = display
            .exit(dir.path(), &[&["editor"], arguments, &["--screenshot", "shot.png", "--after", "0.5"]].concat());
        assert!(found == Some(code) && stderr.contains(why), "{arguments:?}: {found:?} {stderr}");
    };
    check(&["none.json"], 2, "none.json: expected a scene, a trace, a run's folder or an address");
    check(&["damaged.json"], 2, "damaged.json: expected a Chrome trace");
    check(&["empty"], 2, "expected a run's folder, with log.jsonl or trace.json");
    check(&["wrong.ron", "none.json"], 2, "none.json");
    check(&["wrong.ron", "--run"], 2, "trian");
    assert!(!dir.path().join("shot.png").exists());
    #[cfg(feature = "remote")]
    check(&["--attach", "http://127.0.0.1:1"], 1, "http://127.0.0.1:1");
    // A scene with errors can be looked at: the picture shows them.
    check(&["wrong.ron"], 0, "");
}

#[cfg(feature = "remote")]
#[test]
fn the_window_follows_a_run_elsewhere() {
    let Some(display) = Display::start() else { return };
    let dir = tempfile::tempdir().unwrap();
    let tiny = Path::new(env!("CARGO_MANIFEST_DIR")).join("scenes/tiny.ron").display().to_string();
    let mut run = Command::new(env!("CARGO_BIN_EXE_hadal"))
        .args(["run", &tiny, "--set", "remote=(bind: \"127.0.0.1:0\")"])
        .args(["--set", "train.steps=1000000", "--set", "eval=None", "--set", "checkpoint=None"])
        .current_dir(dir.path())
        .stderr(Stdio::piped())
        .stdout(Stdio::null())
        .spawn()
        .unwrap();
    let mut lines = BufReader::new(run.stderr.take().unwrap()).lines().map_while(Result::ok);
    let url = lines.find_map(|line| Some(line.split_once("listening at ")?.1.split(';').next()?.to_owned()));
    // The rest is read away, or the run would wait for somebody who does.
    let drain = std::thread::Builder::new().name("stderr".into()).spawn(move || lines.for_each(drop)).unwrap();
    let shot = dir.path().join("shot.png");
    let to = shot.display().to_string();
    let url = url.expect("an address on stderr");
    display.hadal(
        dir.path(),
        &["editor", "--attach", &url, "--theme", "dark", "--size", "1280x720", "--after", "5", "--screenshot", &to],
    );
    run.kill().unwrap();
    run.wait().unwrap();
    drain.join().unwrap();
    check(&shot);
}

/// Lanes at the left, cells at the right.
fn check(shot: &Path) {
    let image = read(shot);
    assert_eq!((image.width, image.pixels.len()), (1280, 1280 * 720));
    let palette = Palette { is_dark: true };
    // The timeline is at the left. Kinds are shades of a pass: what is counted is at least one kind of each.
    let lanes = [engine::task::Pass::Forward, engine::task::Pass::InputGrad].map(|pass| {
        let shades: Vec<Color32> =
            (0..3).map(|i| palette.pass(Some(pass)).lerp_to_gamma(Color32::WHITE, 0.24 * i as f32 / 3.0)).collect();
        image.count(0..768, &shades)
    });
    assert!(lanes.iter().all(|count| *count > 500), "too little of forward and backward passes is drawn: {lanes:?}");
    let map: Vec<Color32> = (0..=200).map(|i| load_color(f64::from(i) / 200.0)).collect();
    let cells = image.count(800..1280, &map);
    assert!(cells > 20_000, "only {cells} pixels are of the heat map");
}
