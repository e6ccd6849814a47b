//! Parse arguments, load, plan, build, run; map the result to an exit code.

mod cli;
mod report;

use std::process::ExitCode;
use std::time::Instant;

fn main() -> ExitCode {
    let started = Instant::now();
    match cli::run(started) {
        Ok(status) => ExitCode::from(status),
        Err(failure) => {
            report::print(&failure.cause);
            ExitCode::from(failure.status)
        }
    }
}
