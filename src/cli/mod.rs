//! The subcommands: what each is told and what it prints.

mod arguments;
mod host_text;
mod machine;
mod plan_text;
mod topology;

use std::io::{self, Write};
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::Context;
use clap::Parser;

use ravelin::iommu::iommufd::Abi;
use ravelin::vm::config::images;
use ravelin::vm::config::said::{ConfigError, Place};
use ravelin::vm::host_functions::{self, HostFunctions};
use ravelin::vm::host_report::{HostReport, Probed};
use ravelin::vm::plan::Plan;
use ravelin::vm::{self, RunError, RunOptions, logging};

use arguments::{Arguments, Command, RunArguments};
use machine::MachineArguments;

/// The host refused something.
const HOST_ERROR: u8 = 1;
/// What was said cannot be followed.
const USAGE_ERROR: u8 = 2;

/// Why a subcommand ended without having done what it was asked for.
pub(crate) struct Failure {
    /// What the process exits with.
    pub(crate) status: u8,
    /// What to print.
    pub(crate) cause: anyhow::Error,
}

/// What was said is wrong.
impl From<ConfigError> for Failure {
    fn from(error: ConfigError) -> Self {
        Self {
            status: USAGE_ERROR,
            cause: error.into(),
        }
    }
}

/// Anything else is the host's doing.
impl From<anyhow::Error> for Failure {
    fn from(cause: anyhow::Error) -> Self {
        Self {
            status: HOST_ERROR,
            cause,
        }
    }
}

/// Do what the command line says. The process started at `started`.
pub(crate) fn run(started: Instant) -> Result<u8, Failure> {
    let arguments = Arguments::parse();
    logging::start(&arguments.log, arguments.log_format.into()).map_err(|error| Failure {
        status: USAGE_ERROR,
        cause: error.into(),
    })?;
    match &arguments.command {
        Command::Run(run) => run_machine(run, started),
        Command::Check {
            machine,
            json,
            host_root,
        } => {
            let plan = checked(machine, &HostFunctions::below(host_root))?;
            print(&if *json {
                pretty(&plan)?
            } else {
                plan_text::text(&plan)
            })
        }
        Command::Topology {
            machine,
            dot,
            json,
            host_root,
        } => {
            let plan = Plan::resolve_on(&machine.load()?, &HostFunctions::below(host_root))?;
            print(&match (dot, json) {
                (true, _) => topology::dot(&plan),
                (false, true) => pretty(&plan.pci)?,
                (false, false) => topology::tree(&plan),
            })
        }
        Command::Host { json, abi, host_root } => {
            let report = match host_root {
                Some(root) => HostReport::read(root, &Probed::here()),
                None => HostReport::here(&abis(abi.as_deref())?),
            };
            print(&if *json {
                pretty(&report)?
            } else {
                host_text::text(&report)
            })
        }
        Command::Completions { shell } => print(&arguments::completions(*shell)),
        Command::Man => print(&arguments::manual().context("cannot write the manual page")?),
    }
}

/// The versions of AMD's interface to ask a kernel for: the one that was said by name or by a file, or all there are.
fn abis(said: Option<&Path>) -> Result<Vec<Abi>, ConfigError> {
    let Some(said) = said else {
        return Ok(Abi::built_in().into());
    };
    let abi = Abi::said(&said.to_string_lossy(), said).map_err(|problem| {
        let flag = Place::Flag(format!("--abi {}", said.display()).into());
        ConfigError::at(&flag, problem)
    })?;
    Ok(vec![abi])
}

/// The plan of a machine whose files, and whose functions of `host`, can be used.
fn checked(machine: &MachineArguments, host: &HostFunctions) -> Result<Plan, Failure> {
    let config = machine.load()?;
    let plan = Plan::resolve_on(&config, host)?;
    images::check(&config)?;
    host_functions::check(&config, &plan, host)?;
    Ok(plan)
}

fn run_machine(run: &RunArguments, started: Instant) -> Result<u8, Failure> {
    let plan = checked(&run.machine, &HostFunctions::here().asking())?;
    if plan.boot.is_none() {
        let problem = "no kernel was named; say --kernel FILE, or `kernel` in the machine file";
        return Err(ConfigError::at(&Place::Flag("run".into()), problem).into());
    }
    let options = RunOptions {
        started,
        stats: run.stats.clone(),
        shutdown_timeout: Duration::from_secs(run.shutdown_timeout),
    };
    let ended = vm::run(&plan, &options).map_err(|error| Failure {
        status: match error {
            // A file or a command line that the operator named.
            RunError::Boot(_) | RunError::NoKernel => USAGE_ERROR,
            _ => HOST_ERROR,
        },
        cause: error.into(),
    })?;
    Ok(ended.exit_status())
}

fn pretty(value: &impl serde::Serialize) -> Result<String, anyhow::Error> {
    let mut text = serde_json::to_string_pretty(value).context("cannot write it as JSON")?;
    text.push('\n');
    Ok(text)
}

/// Print to standard output. A reader that has seen enough (`head`) is no error.
fn print(text: &str) -> Result<u8, Failure> {
    let mut out = io::stdout().lock();
    match out.write_all(text.as_bytes()).and_then(|()| out.flush()) {
        Err(error) if error.kind() == io::ErrorKind::BrokenPipe => Ok(0),
        Err(error) => Err(anyhow::Error::new(error)
            .context("cannot write to standard output")
            .into()),
        Ok(()) => Ok(0),
    }
}
