//! From what was said to the [`Plan`]: every default filled in, every name looked up, everything placed.
//!
//! Nothing is opened but a table that `abi` names, and nothing of the host is asked but what functions to be passed
//! through look like, and where it is left to us whether its IOMMU serves the guest's, whether it does: the same
//! configuration gives the same plan. Whatever cannot be is an error that names the key, where it was said, and what
//! could be.

mod confine;
mod cpus;
mod devices;
mod hardware;
mod memory;
mod mirror;
mod names;
#[cfg(test)]
mod tests;
mod topology;
mod viommus;

use crate::vm::config::Config;
use crate::vm::config::said::ConfigError;
use crate::vm::config::section::{Section, Source};
use crate::vm::config::sections::{Memory, RootComplex};
use crate::vm::host_functions::HostFunctions;
use crate::vm::layout::{self, LayoutError};

use super::{BoardPlan, BootModule, BootPlan, BootProtocol, CharBackend, DeviceKind, OnReboot, Plan};

use names::Names;

impl Plan {
    /// Decide the machine that `config` asks for, on this host.
    pub fn resolve(config: &Config) -> Result<Self, ConfigError> {
        Self::resolve_on(config, &HostFunctions::here())
    }

    /// Decide the machine that `config` asks for; functions to be passed through are those of `host`.
    pub fn resolve_on(config: &Config, host: &HostFunctions) -> Result<Self, ConfigError> {
        let config = mirror::mirrored(config, host)?;
        decide(&config, host)
    }
}

/// The machine that `config` says in full.
fn decide(config: &Config, host: &HostFunctions) -> Result<Plan, ConfigError> {
    let cpus = cpus::resolve(config.cpus.as_ref())?;
    let mut names = Names::default();
    let names_of = topology::name_all(config, &mut names)?;
    let (devices, endpoints) = devices::resolve(config, &names_of, &cpus, host)?;
    let spec = topology::specify(config, &names_of, &names, endpoints)?;
    let ram = memory::ram(config.memory.as_ref())?;
    let mapped = layout::map(ram, &spec, viommus::serve_guests(&config.viommus))
        .map_err(|error| blame(&error, config, &names))?;
    let around = viommus::Around {
        mapped: &mapped,
        devices: &devices,
        names: &names,
        host,
    };
    let mut viommus = viommus::resolve(config, &around, &cpus)?;
    confine::have_maps_announced(config, &devices, &mut viommus)?;
    confine::refuse_split_groups(config, &mapped.pci, &devices, &viommus, host)?;
    confine::name_host_iommus(&mut viommus, &devices, host);
    let serial = serial(config, &devices)?;
    Ok(Plan {
        cpus,
        memory: memory::resolve(config.memory.as_ref(), ram.size, mapped.ram)?,
        layout: mapped.layout,
        pci: mapped.pci,
        devices,
        viommus,
        iommufd: devices::iommufd(config)?,
        boot: boot(config)?,
        serial,
        board: board(config),
    })
}

/// A hierarchy or a map that cannot be: whose key is to blame.
fn blame(error: &LayoutError, config: &Config, names: &Names<'_>) -> ConfigError {
    use crate::pci::assign::AssignError as Assign;
    let problem = error.to_string();
    let unsaid = Source::unsaid(RootComplex::INFO.name);
    let LayoutError::Pci(assign) = error else {
        let last = config.root_complexes.last().map_or(&unsaid, Section::source);
        return last.wrong("segment", problem);
    };
    let source = assign
        .culprit()
        .and_then(|name| names.source(name))
        .unwrap_or(&unsaid);
    let keys: &[&str] = match assign {
        Assign::SlotTaken { .. } | Assign::NotDeviceZero { .. } | Assign::NoFunctionZero { .. } => &["slot"],
        Assign::BusFull { .. } | Assign::WrongParent { .. } | Assign::Cycle { .. } => &["port", "on"],
        Assign::BusesOverlap { .. }
        | Assign::BusesMissing { .. }
        | Assign::BusesExhausted { .. }
        | Assign::TooManyRoots { .. } => &["bus"],
        Assign::NoFirstRoot => {
            let first = config.root_complexes.first().map_or(&unsaid, Section::source);
            return first.wrong("bus", problem);
        }
        // A function's BARs are the host's doing; else what fills a bus is what was put there.
        Assign::WindowsDoNotFit { .. } | Assign::BadBar { .. } => &["host", "port", "on", "slot"],
        Assign::TooManySlots { .. } => &[],
    };
    match keys
        .iter()
        .find(|key| source.says(key))
        .or(keys.last().filter(|_| keys.len() == 1))
    {
        Some(key) => source.wrong(key, problem),
        None => source.wrong_altogether(problem),
    }
}

fn boot(config: &Config) -> Result<Option<BootPlan>, ConfigError> {
    let Some(kernel) = &config.kernel else {
        return Ok(None);
    };
    let protocol = kernel.protocol.unwrap_or(BootProtocol::Auto);
    // Of a kernel that is to be recognised, the loader sees whether it takes modules.
    if let (BootProtocol::Linux, Some(module)) = (protocol, config.modules.first()) {
        let problem = "only multiboot and PVH kernels take modules; say kernel.protocol = multiboot or pvh, or use initramfs";
        return Err(module.source().wrong("path", problem));
    }
    let modules = config.modules.iter().map(|module| BootModule {
        path: module.source().place_of("path").resolve(&module.path.0.0),
        cmdline: module
            .cmdline
            .as_ref()
            .map_or_else(String::new, |text| text.0.clone()),
    });
    Ok(Some(BootPlan {
        kernel: kernel.source().place_of("path").resolve(&kernel.path.0.0),
        protocol,
        initramfs: config
            .initramfs
            .as_ref()
            .map(|initramfs| initramfs.source().place_of("path").resolve(&initramfs.path.0.0)),
        modules: modules.collect(),
        cmdline: config.cmdline.as_ref().map(|cmdline| cmdline.text.0.0.clone()),
    }))
}

/// What the serial port is connected to: the terminal, unless a console has it.
fn serial(config: &Config, devices: &[super::DevicePlan]) -> Result<CharBackend, ConfigError> {
    let on_terminal = |device: &&super::DevicePlan| matches!(&device.kind, DeviceKind::Console(console) if console.backend == CharBackend::Stdio);
    let mut consoles = devices.iter().filter(on_terminal);
    let console = consoles.next();
    let Some(serial) = &config.serial else {
        return Ok(match console {
            Some(_) => CharBackend::Null,
            None => CharBackend::Stdio,
        });
    };
    let backend = resolved(serial.source(), &serial.backend.0);
    match (&backend, console) {
        (CharBackend::Stdio, Some(console)) => Err(serial.source().wrong(
            "backend",
            format!(
                "{} is on the terminal already; only one thing can be",
                console.name
            ),
        )),
        _ => Ok(backend),
    }
}

/// A stream with its path as whoever said it meant it.
fn resolved(source: &Source, backend: &CharBackend) -> CharBackend {
    let place = source.place_of("backend");
    match backend {
        CharBackend::File(path) => CharBackend::File(place.resolve(path)),
        CharBackend::Socket(path) => CharBackend::Socket(place.resolve(path)),
        other => other.clone(),
    }
}

fn board(config: &Config) -> BoardPlan {
    let board = config.board.as_ref();
    let on = |switch: Option<crate::vm::config::values::Switch>, default| switch.map_or(default, |s| s.0);
    BoardPlan {
        hpet: on(board.and_then(|board| board.hpet), false),
        exit_port: on(board.and_then(|board| board.exit_port), false),
        pvpanic: on(board.and_then(|board| board.pvpanic), true),
        on_reboot: board
            .and_then(|board| board.on_reboot)
            .unwrap_or(OnReboot::Restart),
    }
}

/// The source of the memory section, said or not.
fn memory_source(said: Option<&Memory>) -> Source {
    said.map_or_else(
        || Source::unsaid(Memory::INFO.name),
        |memory| memory.source().clone(),
    )
}
