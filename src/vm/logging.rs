//! Where diagnostics go: standard error, as text or as JSON, with levels per module.

use std::io::IsTerminal;

use tracing::level_filters::LevelFilter;
use tracing_subscriber::filter::Targets;
use tracing_subscriber::layer::SubscriberExt;
use tracing_subscriber::util::SubscriberInitExt;

/// The levels by name.
const LEVELS: [(&str, LevelFilter); 6] = [
    ("error", LevelFilter::ERROR),
    ("warn", LevelFilter::WARN),
    ("info", LevelFilter::INFO),
    ("debug", LevelFilter::DEBUG),
    ("trace", LevelFilter::TRACE),
    ("off", LevelFilter::OFF),
];

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
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error(
    "`{part}` in the log levels `{levels}` is none; write LEVEL or MODULE=LEVEL, separated by commas, like \
     info,ravelin::pci=debug; levels are error, warn, info, debug, trace and off"
)]
pub struct LevelsError {
    /// What was said.
    levels: String,
    /// The part that is not understood.
    part: String,
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
    let lines = tracing_subscriber::fmt::layer()
        .with_writer(std::io::stderr)
        .with_ansi(std::io::stderr().is_terminal());
    let log = tracing_subscriber::registry().with(filter);
    match format {
        LogFormat::Text => log.with(lines).init(),
        LogFormat::Json => log.with(lines.json().flatten_event(true)).init(),
    }
    Ok(())
}

/// A level for everything, and levels for modules. No patterns: nobody needs them here, and matching them
/// would bring a regular expression engine into a small program.
fn levels_of(levels: &str) -> Result<Targets, LevelsError> {
    levels.split(',').try_fold(Targets::new(), |targets, part| {
        let (module, level) = match part.split_once('=') {
            Some((module, level)) => (Some(module), level),
            None => (None, part),
        };
        let known = LEVELS.into_iter().find(|(name, _)| *name == level);
        match (module, known) {
            (None, Some((_, level))) => Ok(targets.with_default(level)),
            (Some(module), Some((_, level))) if is_module(module) => Ok(targets.with_target(module, level)),
            _ => Err(LevelsError {
                levels: levels.to_owned(),
                part: part.to_owned(),
            }),
        }
    })
}

/// Whether this is a path of Rust modules.
fn is_module(path: &str) -> bool {
    path.split("::")
        .all(|name| !name.is_empty() && name.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'_'))
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
    fn levels_that_are_none_are_refused_with_the_part() {
        for (levels, part) in [
            ("info,ravelin::pci=loud", "ravelin::pci=loud"),
            ("ravelin::pci", "ravelin::pci"),
            ("", ""),
            ("info,", ""),
            ("INFO", "INFO"),
            ("=debug", "=debug"),
            ("a b=debug", "a b=debug"),
        ] {
            let error = levels_of(levels).expect_err(levels).to_string();
            let wanted = format!("`{part}` in the log levels `{levels}` is none; write LEVEL");
            assert!(error.starts_with(&wanted), "{error}");
        }
    }

    #[test]
    fn a_module_may_be_louder_than_the_rest() {
        let targets = levels_of("warn,ravelin::pci=debug").expect("levels");
        assert!(targets.would_enable("ravelin::pci::topology", &tracing::Level::DEBUG));
        assert!(!targets.would_enable("ravelin::vm", &tracing::Level::INFO));
    }
}
