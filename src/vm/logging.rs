//! Where diagnostics go: standard error, as text or as JSON, with levels per module.

use std::io::IsTerminal;

use tracing::level_filters::LevelFilter;
use tracing_subscriber::filter::Targets;
use tracing_subscriber::fmt::MakeWriter;
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
    let colours = std::io::stderr().is_terminal();
    log(levels_of(levels)?, format, colours, std::io::stderr).init();
    Ok(())
}

/// What writes lines of `format` to `to`.
fn log<W>(
    levels: Targets,
    format: LogFormat,
    colours: bool,
    to: W,
) -> Box<dyn tracing::Subscriber + Send + Sync>
where
    W: for<'w> MakeWriter<'w> + Send + Sync + 'static,
{
    let lines = tracing_subscriber::fmt::layer()
        .with_writer(to)
        .with_ansi(colours);
    let log = tracing_subscriber::registry().with(levels);
    match format {
        LogFormat::Text => Box::new(log.with(lines)),
        LogFormat::Json => Box::new(log.with(lines.json().flatten_event(true))),
    }
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
    use std::io::{self, Write};
    use std::sync::{Arc, Mutex};

    use super::*;

    #[derive(Clone, Default)]
    struct Kept(Arc<Mutex<Vec<u8>>>);

    impl Write for Kept {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            self.0.lock().expect("nobody panics").write(bytes)
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    #[test]
    fn each_line_of_the_json_log_is_an_object_with_its_fields_whatever_is_in_them() {
        let kept = Kept::default();
        let writer = kept.clone();
        let levels = levels_of("info").expect("a level");
        let log = log(levels, LogFormat::Json, false, move || writer.clone());
        tracing::subscriber::with_default(log, || {
            tracing::warn!(unit = 3, name = "a \"quoted\"\nname", "what happened");
            tracing::debug!("too quiet to be heard");
            tracing::info!(at = %format_args!("{:#x}", 16), "and then");
        });
        let bytes = kept.0.lock().expect("nobody panics").clone();
        let text = String::from_utf8(bytes).expect("text");
        let lines: Vec<serde_json::Value> = text
            .lines()
            .map(|line| serde_json::from_str(line).unwrap_or_else(|error| panic!("{error}: {line}")))
            .collect();
        let [first, second] = &lines[..] else {
            panic!("{text}");
        };
        assert_eq!(
            (&first["level"], &first["message"]),
            (&"WARN".into(), &"what happened".into())
        );
        assert_eq!(
            (&first["unit"], &first["name"]),
            (&3.into(), &"a \"quoted\"\nname".into())
        );
        assert_eq!(first["target"], module_path!());
        assert!(first["timestamp"].is_string(), "{first}");
        assert_eq!(
            (&second["level"], &second["at"]),
            (&"INFO".into(), &"0x10".into())
        );
    }

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
