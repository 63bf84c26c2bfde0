//! A simulated schedule as lines of letters, one line a rank, as long as it fits the width.

use systems::pipeline::{
    action::{Action, Cell, Schedule},
    simulate::Simulated,
};

/// What the letters mean.
pub const LEGEND: &str = "F forward, I input gradient, W weight gradient, B both, . idle,
& a forward and a backward that overlap; small letters: a later stage of the rank
";
/// More columns for a unit of time make it no clearer.
const MAX_COLUMNS_PER_TICK: usize = 4;
/// The shortest action is cut into this many ticks at most, to make all times whole.
const MAX_CUTS: u32 = 8;

/// One line a rank, at most `width` columns; None if times have no common measure or there are too many.
pub fn draw(schedule: &Schedule, simulated: &Simulated, width: usize) -> Option<Vec<String>> {
    let tick = tick(simulated)?;
    let ticks = |time: f64| (time / tick).round() as usize;
    let digits = schedule.ranks.len().saturating_sub(1).to_string().len();
    let columns_per_tick = width.checked_sub(digits + 1)?.checked_div(ticks(simulated.makespan))?;
    if columns_per_tick == 0 {
        return None;
    }
    let columns = |time: f64| ticks(time) * columns_per_tick.min(MAX_COLUMNS_PER_TICK);
    // All with their microbatch, or none.
    let fits = |(action, &(start, end)): (&Action, &(f64, f64))| {
        matches!(action, Action::Pair { .. }) || name(*action, None).len() <= columns(end) - columns(start)
    };
    let lists = || schedule.ranks.iter().zip(&simulated.spans);
    let has_names = lists().all(|(list, spans)| list.iter().zip(spans).all(fits));
    let line = |(rank, list): (usize, &Vec<Action>)| {
        let mut line = vec!['.'; columns(simulated.makespan)];
        let first_stage = schedule.stages_of(rank).first().copied();
        for (action, &(start, end)) in list.iter().zip(&simulated.spans[rank]) {
            let cells = &mut line[columns(start)..columns(end)];
            let name = name(*action, first_stage);
            let text = match action {
                _ if has_names && name.len() <= cells.len() => format!("{name:-<0$}", cells.len()),
                Action::Single(_) => name[..1].repeat(cells.len()),
                Action::Pair { .. } => "&".repeat(cells.len()),
            };
            cells.iter_mut().zip(text.chars()).for_each(|(cell, letter)| *cell = letter);
        }
        format!("{rank:digits$} {}", line.into_iter().collect::<String>())
    };
    Some(schedule.ranks.iter().enumerate().map(line).collect())
}

/// The longest time of which all actions' times are multiples, if there is one that is not far too short.
fn tick(simulated: &Simulated) -> Option<f64> {
    let times = || simulated.spans.iter().flatten().map(|(start, end)| end - start);
    let shortest = times().filter(|time| *time > 0.0).reduce(f64::min)?;
    // Starts are sums of many times: what is not whole in one must not add up to a tick.
    let is_whole = |tick: f64| times().all(|time| (time / tick - (time / tick).round()).abs() < 1e-6);
    (1..=MAX_CUTS).map(|cuts| shortest / f64::from(cuts)).find(|tick| is_whole(*tick))
}

/// The letter and the microbatch of each cell of an action.
fn name(action: Action, first_stage: Option<u32>) -> String {
    let cell = |cell: Cell| {
        let letter = format!("{:?}", cell.work);
        let letter = if Some(cell.stage) == first_stage { letter } else { letter.to_lowercase() };
        format!("{letter}{}", cell.microbatch)
    };
    action.cells().map(cell).collect::<Vec<_>>().join("&")
}

#[cfg(test)]
mod tests {
    #![expect(clippy::unwrap_used, reason = "tests")]
    use super::*;
    use systems::pipeline::{
        simulate::{CellCosts, simulate},
        verify::verify,
    };

    fn lines(text: &str, costs: CellCosts, width: usize) -> Option<Vec<String>> {
        let schedule = Schedule::from_text(text).unwrap();
        draw(&schedule, &simulate(&schedule, &verify(&schedule).unwrap(), costs), width)
    }

    #[test]
    fn letters_or_microbatches_as_there_is_room() {
        let text = "0F0 0F1 0B0 0B1\n1F0 1B0 1F1 1B1\n";
        let unit = CellCosts::new(1.0, 1.0, 1.0);
        assert_eq!(lines(text, unit, 11).unwrap(), ["0 FF..BB.BB", "1 .FBBFBB.."]);
        assert_eq!(lines(text, unit, 20).unwrap(), ["0 F0F1....B0--..B1--", "1 ..F0B0--F1B1--...."]);
        assert_eq!(lines(text, unit, 10), None);
        // Halves are whole after a cut; what has no common measure is not drawn.
        assert_eq!(lines(text, CellCosts::new(1.0, 1.0, 0.5), 18).unwrap()[1], "1 ..F0B0-F1B1-...");
        assert_eq!(lines(text, CellCosts::new(1.0, std::f64::consts::PI, 1.0), 100), None);
    }

    #[test]
    fn other_stages_are_in_small_letters_and_pairs_are_one() {
        let text = "0F0 1F0 0F1&1B0 1F1 1B1 0B0 0B1";
        let drawn = lines(text, CellCosts::new(1.0, 1.0, 1.0), 14).unwrap();
        assert_eq!(drawn, ["0 Ff&&&fbbBBBB"]);
        let drawn = lines(text, CellCosts::new(1.0, 1.0, 1.0), 26).unwrap();
        assert_eq!(drawn, ["0 F0f0F1&b0-f1b1--B0--B1--"]);
    }
}
