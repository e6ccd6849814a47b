//! The flags and their help, and nothing they do.

use std::io;
use std::path::PathBuf;

use clap::{Args, CommandFactory, Parser, Subcommand, ValueEnum};
use clap_complete::Shell;

use ravelin::vm::logging::LogFormat;

use super::machine::MachineArguments;

/// A virtual machine monitor for Linux guests on KVM with arbitrary PCI Express topologies.
#[derive(Debug, Parser)]
#[command(
    name = "ravelin",
    version,
    max_term_width = 100,
    after_help = "Exit status: 0 the guest shut down, 1 the host refused something, 2 what was said cannot be \
                  followed, 3 the guest crashed, 4 the guest was killed before it shut down."
)]
pub(super) struct Arguments {
    #[command(subcommand)]
    pub(super) command: Command,
    /// What is logged: error, warn, info, debug, trace or off, also per module, like info,ravelin::pci=debug
    #[arg(long, global = true, value_name = "LEVELS", default_value = "warn")]
    pub(super) log: String,
    /// How log lines are written to standard error
    #[arg(long, global = true, value_name = "FORMAT", default_value = "text")]
    pub(super) log_format: Format,
}

/// How log lines are written.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(super) enum Format {
    /// For people
    Text,
    /// One object per line
    Json,
}

impl From<Format> for LogFormat {
    fn from(format: Format) -> Self {
        match format {
            Format::Text => Self::Text,
            Format::Json => Self::Json,
        }
    }
}

#[derive(Debug, Subcommand)]
pub(super) enum Command {
    /// Run a machine until its guest shuts down
    Run(RunArguments),
    /// Decide and check a machine, touch nothing, and print what it would be
    Check {
        #[command(flatten)]
        machine: MachineArguments,
        /// Print the plan as JSON
        #[arg(long)]
        json: bool,
        /// Plan for the host whose sysfs and /dev are below this folder: a recorded host
        #[arg(long, value_name = "FOLDER", default_value = "/")]
        host_root: PathBuf,
    },
    /// Print the guest's PCI tree with bus numbers, windows, BARs and interrupts
    Topology {
        #[command(flatten)]
        machine: MachineArguments,
        /// Print it for Graphviz
        #[arg(long, conflicts_with = "json")]
        dot: bool,
        /// Print it as JSON
        #[arg(long)]
        json: bool,
        /// Plan for the host whose sysfs and /dev are below this folder: a recorded host
        #[arg(long, value_name = "FOLDER", default_value = "/")]
        host_root: PathBuf,
    },
    /// Print what this host offers: KVM, IOMMUs, groups, drivers, and what is missing for each mode
    ///
    /// Where a function is bound to vfio-pci, the running kernel is also asked for each step of AMD's vIOMMU with
    /// it. Nothing is left of that. It takes root, or a user who may open the function's node.
    Host {
        /// Print it as JSON
        #[arg(long)]
        json: bool,
        /// Ask for this version of AMD's interface only: v-a, v-c, v-d, v-e, or a TOML table over one of them
        #[arg(long, value_name = "NAME|FILE", conflicts_with = "host_root")]
        abi: Option<PathBuf>,
        /// Read sysfs, /proc and /dev below this folder: a recorded host, whose kernel is not asked
        #[arg(long, value_name = "FOLDER")]
        host_root: Option<PathBuf>,
    },
    /// Print completions for a shell
    Completions {
        /// The shell
        shell: Shell,
    },
    /// Print the manual page
    Man,
}

#[derive(Debug, Args)]
pub(super) struct RunArguments {
    #[command(flatten)]
    pub(super) machine: MachineArguments,
    /// Write exits by reason and device, boot milestones and peak memory to FILE at the end, as JSON
    #[arg(long, value_name = "FILE")]
    pub(super) stats: Option<PathBuf>,
    /// How long the guest may take to shut down after the first SIGTERM
    #[arg(long, value_name = "SECONDS", default_value_t = 60, value_parser = clap::value_parser!(u64).range(..=86_400))]
    pub(super) shutdown_timeout: u64,
}

/// The completion script of a shell.
pub(super) fn completions(shell: Shell) -> String {
    let mut script = Vec::new();
    clap_complete::generate(shell, &mut Arguments::command(), "ravelin", &mut script);
    String::from_utf8_lossy(&script).into_owned()
}

/// The manual page: the program's, followed by one section per subcommand.
pub(super) fn manual() -> io::Result<String> {
    let mut command = Arguments::command();
    command.build();
    let mut page = Vec::new();
    clap_mangen::Man::new(command.clone()).render(&mut page)?;
    for subcommand in command.get_subcommands().filter(|sub| sub.get_name() != "help") {
        let heading = format!(".SH \"RAVELIN {}\"\n", subcommand.get_name().to_uppercase());
        page.extend(heading.as_bytes());
        let man = clap_mangen::Man::new(subcommand.clone());
        man.render_description_section(&mut page)?;
        man.render_synopsis_section(&mut page)?;
        man.render_options_section(&mut page)?;
    }
    Ok(String::from_utf8_lossy(&page).into_owned())
}
