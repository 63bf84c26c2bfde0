//! Colours, light and dark. Categories take the palette of Okabe and Ito (2008), which people with any usual colour vision can tell
//! apart; loads take a map that grows evenly in lightness (viridis, in dark and light alike). Idle time is hatched, so that it is
//! told from work by its texture, too.

pub use egui::Color32;
use egui::{Context, Theme, Visuals};
use engine::{bubbles::BubbleCause, task::Pass, telemetry::Span};

use crate::overlap::is_communication;

/// Okabe and Ito's colours without black: orange, sky blue, bluish green, yellow, blue, vermillion, reddish purple.
pub const OKABE_ITO: [Color32; 7] = [
    Color32::from_rgb(0xE6, 0x9F, 0x00),
    Color32::from_rgb(0x56, 0xB4, 0xE9),
    Color32::from_rgb(0x00, 0x9E, 0x73),
    Color32::from_rgb(0xF0, 0xE4, 0x42),
    Color32::from_rgb(0x00, 0x72, 0xB2),
    Color32::from_rgb(0xD5, 0x5E, 0x00),
    Color32::from_rgb(0xCC, 0x79, 0xA7),
];

/// Points of viridis, evenly spaced.
const VIRIDIS: [[u8; 3]; 9] = [
    [68, 1, 84],
    [71, 44, 122],
    [59, 81, 139],
    [44, 113, 142],
    [33, 144, 141],
    [39, 173, 129],
    [92, 200, 99],
    [170, 220, 50],
    [253, 231, 37],
];

/// What a task's colour says.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub enum ColorBy {
    /// Its pass, with a shade by kind.
    #[default]
    Pass,
    /// Its kind.
    Kind,
}

/// Colours of a theme that are not egui's own.
#[derive(Clone, Copy, Debug)]
pub struct Palette {
    /// Whether the background is dark.
    pub is_dark: bool,
}

impl Palette {
    /// That of the context's theme.
    pub fn of(ctx: &Context) -> Self {
        Palette { is_dark: ctx.theme() == Theme::Dark }
    }

    /// Behind lanes.
    pub fn lane(self) -> Color32 {
        if self.is_dark { Color32::from_gray(0x16) } else { Color32::from_gray(0xF2) }
    }

    /// Between lanes, and marks of the ruler.
    pub fn rule(self) -> Color32 {
        if self.is_dark { Color32::from_gray(0x3C) } else { Color32::from_gray(0xC8) }
    }

    /// The step and rank under the cursor, and what is selected.
    pub fn cursor(self) -> Color32 {
        if self.is_dark { Color32::WHITE } else { Color32::BLACK }
    }

    /// Text on a task. All task colours are light enough for it.
    pub fn on_task(self) -> Color32 {
        Color32::BLACK
    }

    /// Something is wrong.
    pub fn error(self) -> Color32 {
        if self.is_dark { Color32::from_rgb(0xFF, 0x8A, 0x50) } else { Color32::from_rgb(0xB0, 0x40, 0x00) }
    }

    /// Something is worth a look.
    pub fn warning(self) -> Color32 {
        if self.is_dark { OKABE_ITO[0] } else { Color32::from_rgb(0x8F, 0x60, 0x00) }
    }

    /// All is as it should be.
    pub fn good(self) -> Color32 {
        if self.is_dark { Color32::from_rgb(0x2E, 0xC4, 0x96) } else { Color32::from_rgb(0x00, 0x6E, 0x50) }
    }

    /// The colour of a pass; none is that of what has no pass.
    pub fn pass(self, pass: Option<Pass>) -> Color32 {
        match pass {
            Some(Pass::Forward) => OKABE_ITO[1],
            Some(Pass::InputGrad) => OKABE_ITO[0],
            Some(Pass::WeightGrad) => Color32::from_rgb(0x1F, 0xB0, 0x86),
            None => OKABE_ITO[6],
        }
    }

    /// The colour of a task.
    pub fn task(self, span: &Span, by: ColorBy) -> Color32 {
        match by {
            ColorBy::Pass => {
                let color = self.pass(span.pass);
                // What moves bytes is paler, so that lanes of transfers stay behind those that compute.
                let shade = if is_communication(span) { 0.45 } else { 0.24 * (hash(span.kind.0) % 3) as f32 / 3.0 };
                color.lerp_to_gamma(Color32::WHITE, shade)
            }
            ColorBy::Kind => {
                let hash = hash(span.kind.0);
                let shade = (hash / 7 % 3) as f32 * 0.22;
                light(OKABE_ITO[hash % 7]).lerp_to_gamma(Color32::WHITE, shade)
            }
        }
    }

    /// The colour of idle time of a cause.
    pub fn bubble(self, cause: BubbleCause) -> Color32 {
        match cause {
            BubbleCause::WarmUp => Color32::from_gray(if self.is_dark { 0x90 } else { 0x78 }),
            BubbleCause::CoolDown => Color32::from_gray(if self.is_dark { 0x60 } else { 0xA8 }),
            BubbleCause::Dependency => OKABE_ITO[5],
            BubbleCause::CommunicationWait => self.readable(OKABE_ITO[4]),
            BubbleCause::CommunicationCopy => OKABE_ITO[1],
            BubbleCause::LoadImbalance => OKABE_ITO[6],
            BubbleCause::Straggler => OKABE_ITO[0],
            BubbleCause::Launch => self.readable(OKABE_ITO[3]),
        }
    }

    /// A colour of the palette that stands out from this background: yellow is darker on white, blue lighter on black.
    pub fn readable(self, color: Color32) -> Color32 {
        match (self.is_dark, color) {
            (false, c) if c == OKABE_ITO[3] => Color32::from_rgb(0xA8, 0x98, 0x00),
            (true, c) if c == OKABE_ITO[4] => Color32::from_rgb(0x4A, 0x9C, 0xE0),
            _ => color,
        }
    }

    /// The colour of curve number `i`.
    pub fn curve(self, i: usize) -> Color32 {
        const ORDER: [usize; 7] = [4, 5, 2, 6, 0, 1, 3];
        self.readable(OKABE_ITO[ORDER[i % ORDER.len()]])
    }
}

/// The colour of a share from 0 to 1 in the map of loads.
pub fn load_color(share: f64) -> Color32 {
    let place = share.clamp(0.0, 1.0) * (VIRIDIS.len() - 1) as f64;
    let at = (place as usize).min(VIRIDIS.len() - 2);
    let part = place - at as f64;
    let mix = |i: usize| {
        let (a, b) = (f64::from(VIRIDIS[at][i]), f64::from(VIRIDIS[at + 1][i]));
        (a + part * (b - a)).round() as u8
    };
    Color32::from_rgb(mix(0), mix(1), mix(2))
}

/// Light enough for black text.
fn light(color: Color32) -> Color32 {
    let dark = color == OKABE_ITO[4] || color == OKABE_ITO[5] || color == OKABE_ITO[2];
    if dark { color.lerp_to_gamma(Color32::WHITE, 0.3) } else { color }
}

/// The same for a name in every run of the program (FNV-1a).
fn hash(name: &str) -> usize {
    name.bytes().fold(0x811c_9dc5_u32, |hash, byte| (hash ^ u32::from(byte)).wrapping_mul(0x0100_0193)) as usize
}

/// Sets fonts' sizes and colours of both themes once.
pub fn install(ctx: &Context) {
    ctx.style_mut_of(Theme::Dark, |style| {
        style.visuals = Visuals::dark();
        style.visuals.panel_fill = Color32::from_gray(0x1E);
        style.visuals.override_text_color = Some(Color32::from_gray(0xD8));
    });
    ctx.style_mut_of(Theme::Light, |style| {
        style.visuals = Visuals::light();
        style.visuals.override_text_color = Some(Color32::from_gray(0x20));
    });
    ctx.all_styles_mut(|style| {
        style.spacing.item_spacing = egui::vec2(6.0, 4.0);
        style.animation_time = 0.0;
    });
}

#[cfg(test)]
mod tests {
    use super::*;

    fn luminance(color: Color32) -> f64 {
        let linear = |v: u8| (f64::from(v) / 255.0).powf(2.2);
        0.2126 * linear(color.r()) + 0.7152 * linear(color.g()) + 0.0722 * linear(color.b())
    }

    #[test]
    fn loads_grow_evenly_brighter() {
        let steps: Vec<f64> = (0..=100).map(|i| luminance(load_color(f64::from(i) / 100.0)).powf(1.0 / 2.2)).collect();
        assert!(steps.windows(2).all(|pair| pair[1] > pair[0]), "{steps:?}");
        assert_eq!(load_color(-1.0), load_color(0.0));
        assert_eq!(load_color(2.0), load_color(1.0));
    }

    #[test]
    fn text_on_tasks_can_be_read() {
        let palette = Palette { is_dark: true };
        for pass in [None, Some(Pass::Forward), Some(Pass::InputGrad), Some(Pass::WeightGrad)] {
            let contrast = (luminance(palette.pass(pass)) + 0.05) / 0.05;
            assert!(contrast > 4.5, "{pass:?}: {contrast}");
        }
    }
}
