//! `hadal`, the command line: arguments to requests, reports to text or JSON, failures to exit codes. Everything that
//! computes is in the crates below.

mod cli;
mod failure;
mod load;
mod machine;
mod progress;
mod report;
mod signals;
mod terminal;
mod units;
mod verbs;

use std::process::ExitCode;

use clap::Parser;

use cli::Cli;
use report::Output;

fn main() -> ExitCode {
    // Wrong usage ends here, with exit code 2; so do --help and --version, with 0.
    let cli = Cli::parse();
    let output = match Output::open(cli.verb.json()) {
        Ok(output) => output,
        Err(failure) => return failure.tell(),
    };
    match verbs::perform(cli.verb, &output) {
        Ok(code) => code,
        Err(failure) => {
            let code = failure.tell();
            match output.write_json(&failure.document()) {
                Ok(()) => code,
                Err(second) => second.tell(),
            }
        }
    }
}
