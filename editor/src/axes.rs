//! What plots have in common: lines that end where there is nothing to join, and axes with few marks that are round and can be read.
//! Pure functions; egui's plots draw what they give.

use egui::{FontId, Vec2};
use egui_plot::{AxisHints, GridInput, GridMark, Line, LineStyle, Plot, PlotPoints, PlotUi, Points};

use crate::{theme::Palette, units};

/// Larger values are drawn as if there were none: their differences would not be finite.
const MAX_SIZE: f64 = 1e300;
/// Points of a line are apart when they are so many times farther from each other than points mostly are.
const APART: f64 = 1.5;
/// Points of the screen for a mark, on each axis.
const ROOM: [f32; 2] = [30.0, 14.0];
/// Points for the text beside the upright axis, so that plots in a column stand in line.
const GUTTER: f32 = 44.0;
/// Size of the text at the axes.
const TEXT: f32 = 10.0;

/// The parts of a curve that are joined by lines. A part ends at a value that is no number, where a step does not follow the one
/// before it, and where steps are missing.
pub fn unbroken(points: &[[f64; 2]]) -> Vec<Vec<[f64; 2]>> {
    let mut apart: Vec<f64> = points.windows(2).map(|pair| pair[1][0] - pair[0][0]).filter(|by| *by > 0.0).collect();
    apart.sort_by(f64::total_cmp);
    let far = apart.get(apart.len() / 2).map_or(f64::INFINITY, |median| APART * median);
    let mut parts: Vec<Vec<[f64; 2]>> = Vec::new();
    let mut before: Option<f64> = None;
    for &point in points {
        if !point[0].is_finite() || point[1].is_nan() || point[1].abs() > MAX_SIZE {
            before = None;
            continue;
        }
        let joins = before.is_some_and(|before| point[0] > before && point[0] - before <= far);
        match parts.last_mut().filter(|_| joins) {
            Some(part) => part.push(point),
            None => parts.push(vec![point]),
        }
        before = Some(point[0]);
    }
    parts
}

/// Draws a curve; what stands alone is a dot.
pub fn curve(plot: &mut PlotUi<'_>, name: &str, points: &[[f64; 2]], color: egui::Color32, style: LineStyle) {
    for (i, part) in unbroken(points).into_iter().enumerate() {
        if part.len() > 1 {
            plot.line(Line::new(name, PlotPoints::from(part)).id((name, i)).color(color).style(style));
        } else {
            plot.points(Points::new(name, PlotPoints::from(part)).id((name, i)).color(color).radius(1.5));
        }
    }
}

/// Multiples of 1, 2 or 5 times a power of ten between two values, at most `most`, and how far they are apart. None between values
/// that are too near each other, or too far.
pub fn marks((from, to): (f64, f64), most: usize) -> (Vec<f64>, f64) {
    let rough = (to - from) / most.max(1) as f64;
    if !(rough.is_finite() && rough > 0.0) || from.abs().max(to.abs()) / rough > 1e12 {
        return (Vec::new(), 1.0);
    }
    let power = 10f64.powf(rough.log10().floor());
    let step = [1.0, 2.0, 5.0, 10.0]
        .into_iter()
        .map(|times| times * power)
        .find(|step| *step >= rough * (1.0 - 1e-9))
        .unwrap_or(rough);
    let (first, last) = ((from / step).ceil() as i64, (to / step).floor() as i64);
    let marks: Vec<f64> = (first..=last).map(|i| i as f64 * step).collect();
    (marks, step)
}

/// The same for powers of ten between `10^from` and `10^to`, as exponents: all powers, or each so many-th, with 2 and 5 in between
/// if there is room.
pub fn log_marks((from, to): (f64, f64), most: usize) -> Vec<f64> {
    if !(from.is_finite() && to.is_finite() && from < to) {
        return Vec::new();
    }
    let between = |times: &[f64], each: usize| -> Vec<f64> {
        let powers = ((from.floor() as i64)..=(to.ceil() as i64)).filter(|power| power.rem_euclid(each as i64) == 0);
        let all = powers.flat_map(|power| times.iter().map(move |times| power as f64 + times.log10()));
        all.filter(|mark| (from..=to).contains(mark)).collect()
    };
    let dense = between(&[1.0, 2.0, 5.0], 1);
    if (2..=most).contains(&dense.len()) {
        return dense;
    }
    if dense.len() < 2 {
        let (marks, _) = marks((10f64.powf(from), 10f64.powf(to)), most);
        return marks.into_iter().filter(|mark| *mark > 0.0).map(f64::log10).collect();
    }
    let num_powers = (to - from).ceil() as usize;
    between(&[1.0], num_powers.div_ceil(most.max(1)).max(1))
}

fn most(input: &GridInput) -> usize {
    // The base step is of one point, see `styled`.
    let points = (input.bounds.1 - input.bounds.0) / input.base_step_size.max(f64::MIN_POSITIVE);
    points.clamp(1.0, 1e4) as usize
}

fn grid((marks, step): (Vec<f64>, f64)) -> Vec<GridMark> {
    marks.into_iter().map(|value| GridMark { value, step_size: step }).collect()
}

/// A plot over steps with marks that can be read at any size. With `is_log`, values are exponents of ten.
pub fn styled<'a>(plot: Plot<'a>, is_log: bool, palette: Palette) -> Plot<'a> {
    let font = || FontId::proportional(TEXT);
    let of_steps = |mark: GridMark, _: &std::ops::RangeInclusive<f64>| units::count(mark.value);
    let of_values = move |mark: GridMark, _: &std::ops::RangeInclusive<f64>| {
        if is_log { units::log_tick(10f64.powf(mark.value)) } else { units::tick(mark.value, mark.step_size) }
    };
    let steps = |input: GridInput| {
        let (marks, step) = marks(input.bounds, (most(&input) as f32 / ROOM[0]) as usize);
        // Steps are whole.
        grid((marks.into_iter().filter(|mark| mark.fract() == 0.0 && *mark >= 0.0).collect(), step))
    };
    let values = move |input: GridInput| {
        let most = ((most(&input) as f32 / ROOM[1]) as usize).max(2);
        let whole = input.bounds.1 - input.bounds.0;
        if is_log { grid((log_marks(input.bounds, most), whole)) } else { grid(marks(input.bounds, most)) }
    };
    // All marks are of one strength: there are few.
    plot.grid_spacing(1.0..=2.0)
        .grid_color(palette.rule())
        .set_margin_fraction(Vec2::new(0.02, 0.08))
        .x_grid_spacer(steps)
        .y_grid_spacer(values)
        .custom_x_axes(vec![AxisHints::new_x().formatter(of_steps).label_spacing(1.0..=2.0).tick_label_font(font())])
        .custom_y_axes(vec![
            AxisHints::new_y()
                .formatter(of_values)
                .label_spacing(1.0..=2.0)
                .min_thickness(GUTTER)
                .tick_label_font(font()),
        ])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_end_at_gaps_and_at_what_is_no_number() {
        let check = |points: &[[f64; 2]], parts: &[&[f64]]| {
            let found: Vec<Vec<f64>> =
                unbroken(points).iter().map(|part| part.iter().map(|point| point[0]).collect()).collect();
            assert_eq!(found, parts);
        };
        let over = |steps: &[u32]| steps.iter().map(|step| [f64::from(*step), 1.0]).collect::<Vec<_>>();
        check(&[], &[]);
        check(&over(&[1, 2, 3]), &[&[1.0, 2.0, 3.0]]);
        // An evaluation took some steps, which have no training loss.
        check(&over(&[1, 2, 3, 20, 21]), &[&[1.0, 2.0, 3.0], &[20.0, 21.0]]);
        // What is measured each tenth step has no gaps.
        check(&over(&[10, 20, 30, 35]), &[&[10.0, 20.0, 30.0, 35.0]]);
        // A run that went back, and a step that was told twice.
        check(&over(&[1, 2, 3, 2, 3, 3]), &[&[1.0, 2.0, 3.0], &[2.0, 3.0], &[3.0]]);
        let mut wrong = over(&[1, 2, 3, 4, 5, 6, 7]);
        (wrong[1][1], wrong[3][1], wrong[5][1]) = (f64::NAN, f64::INFINITY, 1e305);
        check(&wrong, &[&[1.0], &[3.0], &[5.0], &[7.0]]);
    }

    #[test]
    fn marks_are_round_and_few() {
        assert_eq!(marks((0.0, 10.0), 5), (vec![0.0, 2.0, 4.0, 6.0, 8.0, 10.0], 2.0));
        assert_eq!(marks((0.97, 3.2), 3), (vec![1.0, 2.0, 3.0], 1.0));
        assert_eq!(
            marks((-1.1e30, 1.1e30), 5).0.into_iter().map(units::three).collect::<Vec<_>>().join(" "),
            "-1.00e30 -5.00e29 0 5.00e29 1.00e30"
        );
        for (from, to) in [(1.0, 1.0), (2.0, 1.0), (0.0, f64::INFINITY), (f64::NAN, 1.0), (1e30, 1e30 + 1e15)] {
            assert_eq!(marks((from, to), 4).0, [0.0; 0], "{from} to {to}");
        }
        let powers = |from: f64, to: f64, most| -> Vec<String> {
            log_marks((from.log10(), to.log10()), most)
                .into_iter()
                .map(|mark| units::log_tick(10f64.powf(mark)))
                .collect()
        };
        assert_eq!(powers(0.9, 12.0, 5), ["1", "2", "5", "10"]);
        assert_eq!(powers(0.9, 120.0, 3), ["1", "10", "100"]);
        assert_eq!(powers(1e-3, 1e30, 4).len(), 4);
        assert_eq!(powers(1.1, 1.9, 4), ["1.2", "1.4", "1.6", "1.8"]);
    }
}
