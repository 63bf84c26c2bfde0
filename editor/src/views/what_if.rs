//! What if: the step under the cursor planned again with its measured loads, and then with one thing changed at a time. The plan is
//! the workbench's, so that the numbers are those of `hadal plan`.

use egui::{Button, DragValue, Grid, Ui};

use crate::{
    background::Background,
    desk::Desk,
    loads::{LayerLoads, shares},
    theme::Palette,
    units,
    workbench::WhatIf,
};

/// A question and what came of it.
type Answer = (String, Result<(f64, f64), String>);

/// The strip below the heat map.
pub struct Strip {
    node_limit: u32,
    num_comm_multiprocessors: u32,
    answers: Vec<Answer>,
    step: u64,
    asking: Background<Vec<Answer>>,
}

impl Default for Strip {
    fn default() -> Self {
        Strip {
            node_limit: 2,
            num_comm_multiprocessors: 8,
            answers: Vec::new(),
            step: 0,
            asking: Background::default(),
        }
    }
}

impl Strip {
    /// Draws it for the loads of a step.
    pub fn ui(&mut self, ui: &mut Ui, desk: &mut Desk, step: u64, layers: &[LayerLoads]) {
        if let Some(answers) = self.asking.poll() {
            self.answers = answers;
        }
        ui.horizontal_wrapped(|ui| {
            ui.strong("What if");
            let name = ui.label("nodes a token");
            ui.add(DragValue::new(&mut self.node_limit).range(1..=64)).labelled_by(name.id);
            let name = ui.label("SMs for communication");
            ui.add(DragValue::new(&mut self.num_comm_multiprocessors).range(0..=256)).labelled_by(name.id);
            let can = desk.document.is_some() && !self.asking.is_busy();
            let asked = ui.add_enabled(can, Button::new("Plan it")).on_hover_text(
                "plans the open scene on its hardware with the loads of this step, and with each change by itself",
            );
            if asked.clicked() {
                self.ask(desk, step, layers);
            }
            if self.asking.is_busy() {
                ui.spinner();
            }
            if desk.document.is_none() {
                ui.weak("open the scene to plan with");
            }
        });
        if self.answers.is_empty() {
            return;
        }
        let palette = Palette::of(ui.ctx());
        let base = self.answers.first().and_then(|(_, result)| result.as_ref().ok()).map(|(secs, _)| *secs);
        ui.weak(format!("planned with the loads of step {}", self.step));
        Grid::new("what if").num_columns(4).spacing([14.0, 3.0]).striped(true).show(ui, |ui| {
            for (name, result) in &self.answers {
                ui.label(name);
                match result {
                    Ok((secs, idle)) => {
                        ui.monospace(units::secs(*secs));
                        ui.label(format!("idle {}", units::percent(*idle)));
                        if let Some(base) = base {
                            let change = secs / base - 1.0;
                            let color = if change < -5e-4 {
                                palette.good()
                            } else if change > 5e-4 {
                                palette.error()
                            } else {
                                ui.visuals().text_color()
                            };
                            ui.colored_label(color, format!("{:+.1}%", 100.0 * change));
                        }
                    }
                    Err(error) => {
                        ui.colored_label(palette.error(), error);
                    }
                }
                ui.end_row();
            }
        });
    }

    fn ask(&mut self, desk: &mut Desk, step: u64, layers: &[LayerLoads]) {
        let Some(document) = &desk.document else { return };
        self.step = step;
        let loads = Some(shares(layers));
        let (limit, occupied) = (self.node_limit, self.num_comm_multiprocessors);
        let questions = [
            ("as measured".to_owned(), WhatIf { loads: loads.clone(), ..WhatIf::default() }),
            ("experts balanced".to_owned(), WhatIf { is_balanced: true, ..WhatIf::default() }),
            (
                format!("{limit} nodes a token"),
                WhatIf { loads: loads.clone(), node_limit: Some(limit), ..WhatIf::default() },
            ),
            (
                format!("{occupied} SMs for communication"),
                WhatIf { loads, num_comm_multiprocessors: Some(occupied), ..WhatIf::default() },
            ),
        ];
        let (workbench, path, text) = (desk.workbench.clone(), document.path.clone(), document.text.clone());
        let started = self.asking.start("what if", desk.wake.clone(), move || {
            let answer = |(name, what_if): (String, WhatIf)| {
                let planned = workbench.plan(path.as_deref(), &text, &what_if);
                let figures = planned.map(|planned| {
                    let figure = |name| planned.snapshot.scalar(name).unwrap_or(f64::NAN);
                    (figure("step_secs"), figure("idle_fraction"))
                });
                let first = |errors: Vec<crate::workbench::Diagnostic>| {
                    errors.into_iter().next().map_or_else(|| "no plan".into(), |error| error.message)
                };
                (name, figures.map_err(first))
            };
            questions.into_iter().map(answer).collect()
        });
        if let Err(error) = started {
            desk.complain(format!("the system gives no thread: {error}"));
        }
    }
}
