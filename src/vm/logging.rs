//! Where diagnostics go: standard error, as text or as JSON, with levels per module.

use std::io::IsTerminal;

use tracing_subscriber::EnvFilter;
use tracing_subscriber::filter::ParseError;

/// How log lines are written.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum LogFormat {
    /// For people.
    #[default]
    Text,
    /// One object per line.
    Json,
}

/// Levels that cannot be understood.
#[derive(Debug, thiserror::Error)]
#[error(
    "`{levels}` is no list of log levels; write LEVEL or MODULE=LEVEL, separated by commas, like info,ravelin::pci=debug; levels are error, warn, info, debug, trace and off"
)]
pub struct LevelsError {
    /// What was said.
    levels: String,
    /// Why it is not understood.
    #[source]
    source: ParseError,
}

/// Begin to log. `levels` is a list like `info,ravelin::pci=debug`.
///
/// # Errors
/// When `levels` is not understood.
///
/// # Panics
/// When the process logs already.
pub fn start(levels: &str, format: LogFormat) -> Result<(), LevelsError> {
    let filter = levels_of(levels)?;
    let log = tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr)
        .with_ansi(std::io::stderr().is_terminal());
    match format {
        LogFormat::Text => log.init(),
        LogFormat::Json => log.json().flatten_event(true).init(),
    }
    Ok(())
}

fn levels_of(levels: &str) -> Result<EnvFilter, LevelsError> {
    EnvFilter::builder().parse(levels).map_err(|source| LevelsError {
        levels: levels.to_owned(),
        source,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn levels_are_for_all_or_for_a_module() {
        for levels in [
            "info",
            "warn,ravelin::pci=debug",
            "off",
            "ravelin::vm::boot=trace",
        ] {
            assert!(levels_of(levels).is_ok(), "{levels}");
        }
    }

    #[test]
    fn levels_that_are_none_are_refused_with_the_text() {
        let error = levels_of("info,ravelin::pci=loud").expect_err("no such level");
        assert!(
            error
                .to_string()
                .starts_with("`info,ravelin::pci=loud` is no list"),
            "{error}"
        );
    }
}
