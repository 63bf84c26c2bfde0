//! One file for each verb: arguments to a request, the report to a table.

mod bench;
mod check;
mod convert;
mod doctor;
#[cfg(feature = "editor")]
mod editor;
mod eval;
mod generate;
mod launch;
mod peers;
mod plan;
mod plan_experts;
mod run;
#[cfg(feature = "remote")]
mod serve;
#[cfg(feature = "remote")]
mod status;

pub use plan_experts::ExpertsArgs;

use std::process::ExitCode;

use crate::{
    cli::{Bench, BenchArgs, Verb},
    failure::Failure,
    report::Output,
};

/// Does what was asked; gives the exit code of what was done.
///
/// # Errors
/// Why it was not done.
pub fn perform(verb: Verb, output: &Output) -> Result<ExitCode, Failure> {
    match verb {
        Verb::Run(args) => run::run(&args, output),
        Verb::Launch(args) => launch::launch(&args),
        Verb::Check(args) => check::check(&args, output),
        Verb::Plan(args) => plan::plan(&args, output),
        Verb::Eval(args) => eval::eval(args, output),
        Verb::Generate(args) => generate::generate(args, output),
        #[cfg(feature = "remote")]
        Verb::Serve(args) => serve::serve(&args),
        #[cfg(feature = "remote")]
        Verb::Status(args) => status::status(&args, output),
        Verb::Convert(args) => convert::convert(&args, output),
        #[cfg(feature = "editor")]
        Verb::Editor(args) => editor::editor(args),
        Verb::Doctor(args) => doctor::doctor(&args, output),
        Verb::Bench(BenchArgs { what: Bench::Train(args) }) => bench::train(args, output),
        Verb::Bench(BenchArgs { what: Bench::Hardware(args) }) => bench::hardware(args, output),
        Verb::Bench(BenchArgs { what: Bench::Kernels(args) }) => bench::kernels(&args, output),
        Verb::Bench(BenchArgs { what: Bench::Overlap(args) }) => bench::overlap(&args, output),
        Verb::Bench(BenchArgs { what: Bench::Serve(args) }) => bench::serve(&args, output),
        Verb::Bench(BenchArgs { what: Bench::Schedules(args) }) => bench::schedules(&args, output),
    }
}
