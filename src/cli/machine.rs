//! The flags that describe a machine: one per section of the machine file, made from the sections themselves.

use std::path::PathBuf;

use clap::{Arg, ArgAction, ArgMatches, Args, Command, FromArgMatches, value_parser};

use ravelin::vm::config::said::ConfigError;
use ravelin::vm::config::section::SectionInfo;
use ravelin::vm::config::{Config, Flag, SECTIONS};

/// The identifier of the positional argument.
const FILE: &str = "machine-file";

/// A machine file, and what flags say instead or as well.
#[derive(Debug, Clone, Default)]
pub(super) struct MachineArguments {
    file: Option<PathBuf>,
    /// Section and text of each flag.
    flags: Vec<(&'static str, String)>,
}

impl MachineArguments {
    /// What was said.
    pub(super) fn load(&self) -> Result<Config, ConfigError> {
        let flags: Vec<Flag<'_>> = self
            .flags
            .iter()
            .map(|(name, text)| Flag { name, text })
            .collect();
        Config::load(self.file.as_deref(), &flags)
    }
}

impl FromArgMatches for MachineArguments {
    fn from_arg_matches(matches: &ArgMatches) -> Result<Self, clap::Error> {
        let mut said = Self::default();
        said.update_from_arg_matches(matches)?;
        Ok(said)
    }

    fn update_from_arg_matches(&mut self, matches: &ArgMatches) -> Result<(), clap::Error> {
        self.file = matches.get_one::<PathBuf>(FILE).cloned();
        self.flags = SECTIONS
            .iter()
            .flat_map(|section| {
                let texts = matches.get_many::<String>(section.name).into_iter().flatten();
                texts.map(|text| (section.name, text.clone()))
            })
            .collect();
        Ok(())
    }
}

impl Args for MachineArguments {
    fn augment_args(command: Command) -> Command {
        let file = Arg::new(FILE)
            .value_name("FILE.toml")
            .value_parser(value_parser!(PathBuf))
            .help("The machine file; flags override what it says, or extend it");
        command.arg(file).args(SECTIONS.iter().map(flag))
    }

    fn augment_args_for_update(command: Command) -> Command {
        Self::augment_args(command)
    }
}

fn flag(section: &SectionInfo) -> Arg {
    let about = section.doc.trim();
    let mut long = format!("{about} Keys:\n");
    for key in section.keys {
        let main = if section.main == Some(key.name) {
            " (the key may be left out)"
        } else {
            ""
        };
        long.push_str(&format!("\n{}{main}: {}", key.name, key.doc.trim()));
    }
    let value = match section.main {
        // One value that is never split.
        Some("text") => "TEXT".to_owned(),
        Some(main) => format!("{}[,KEY=VALUE...]", main.to_uppercase()),
        None => "KEY=VALUE[,...]".to_owned(),
    };
    Arg::new(section.name)
        .long(section.name)
        .value_name(value)
        .action(ArgAction::Append)
        .allow_hyphen_values(section.main == Some("text"))
        .help_heading("Machine")
        .help(about.trim_end_matches('.').to_owned())
        .long_help(long)
}
