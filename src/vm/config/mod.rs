//! What a machine file and the flags may say, as types; one definition of each key for both.
//!
//! Text becomes a tree of `said::Value`s that know where they were said (`file` reads TOML, `flag` reads
//! `key=value,...`), flags are laid over the file, and the tree is read into the sections of [`sections`].
//! Every section keeps its source, so that whoever finds later that a value cannot be meant (a port that does
//! not exist, a slot that is taken) still names the key, the line and the value.

mod file;
mod flag;
pub mod images;
pub mod near;
pub mod said;
pub mod section;
pub mod sections;
#[cfg(test)]
mod tests;
pub mod values;

use std::fs;
use std::path::Path;

use said::{ConfigError, Kind, Place, Table, Value};
use section::{Section, SectionInfo};
use sections::{
    Board, Cmdline, Console, Cpus, Disk, HostIommus, Initramfs, Kernel, Memory, Module, Net, Rng,
    RootComplex, RootPort, SerialPort, SwitchPorts, TestDevice, VfioDevice, Viommu,
};

/// The largest machine file that is read: far beyond any machine, so that a wrong path is noticed early.
const MAX_FILE: u64 = 16 << 20;

/// Every section, in the order help lists them.
pub const SECTIONS: [SectionInfo; 19] = [
    Cpus::INFO,
    Memory::INFO,
    Kernel::INFO,
    Initramfs::INFO,
    Module::INFO,
    Cmdline::INFO,
    Disk::INFO,
    Net::INFO,
    Console::INFO,
    SerialPort::INFO,
    Rng::INFO,
    TestDevice::INFO,
    RootComplex::INFO,
    RootPort::INFO,
    SwitchPorts::INFO,
    Viommu::INFO,
    VfioDevice::INFO,
    HostIommus::INFO,
    Board::INFO,
];

/// A machine as it was said.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Config {
    /// `cpus`.
    pub cpus: Option<Cpus>,
    /// `memory`.
    pub memory: Option<Memory>,
    /// `kernel`.
    pub kernel: Option<Kernel>,
    /// `initramfs`.
    pub initramfs: Option<Initramfs>,
    /// `module`.
    pub modules: Vec<Module>,
    /// `cmdline`.
    pub cmdline: Option<Cmdline>,
    /// `disk`.
    pub disks: Vec<Disk>,
    /// `net`.
    pub nets: Vec<Net>,
    /// `console`.
    pub consoles: Vec<Console>,
    /// `serial`.
    pub serial: Option<SerialPort>,
    /// `rng`.
    pub rngs: Vec<Rng>,
    /// `test-device`.
    pub test_devices: Vec<TestDevice>,
    /// `root-complex`.
    pub root_complexes: Vec<RootComplex>,
    /// `root-port`.
    pub root_ports: Vec<RootPort>,
    /// `switch`.
    pub switches: Vec<SwitchPorts>,
    /// `viommu`.
    pub viommus: Vec<Viommu>,
    /// `vfio-device`.
    pub vfio_devices: Vec<VfioDevice>,
    /// `iommufd`.
    pub iommufd: Option<HostIommus>,
    /// `board`.
    pub board: Option<Board>,
}

/// One flag: the section it names and its value as it was written.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Flag<'a> {
    /// The section, which is the flag's name without the hyphens.
    pub name: &'a str,
    /// Its value.
    pub text: &'a str,
}

impl Config {
    /// What `file` says, if one was named, with `flags` laid over it.
    pub fn load(file: Option<&Path>, flags: &[Flag<'_>]) -> Result<Self, ConfigError> {
        let mut said = match file {
            Some(path) => file::parse(path, &read_text(path)?)?,
            None => Table::default(),
        };
        for flag in flags {
            lay_over(&mut said, flag)?;
        }
        Self::read(&said)
    }

    /// What the text of a machine file says. `path` is what messages call it.
    pub fn parse(path: &Path, text: &str) -> Result<Self, ConfigError> {
        Self::read(&file::parse(path, text)?)
    }

    fn read(said: &Table) -> Result<Self, ConfigError> {
        let names = SECTIONS.map(|section| section.name);
        if let Some((key, value)) = said.iter().find(|(key, _)| !names.contains(key)) {
            let problem = format!("unknown section; {}", near::instead(key, "sections", &names));
            let mut error = ConfigError::at(&value.place, problem);
            error.key = Some(key.to_owned());
            return Err(error);
        }
        Ok(Self {
            cpus: one(said)?,
            memory: one(said)?,
            kernel: one(said)?,
            initramfs: one(said)?,
            modules: several(said)?,
            cmdline: one(said)?,
            disks: several(said)?,
            nets: several(said)?,
            consoles: several(said)?,
            serial: one(said)?,
            rngs: several(said)?,
            test_devices: several(said)?,
            root_complexes: several(said)?,
            root_ports: several(said)?,
            switches: several(said)?,
            viommus: several(said)?,
            vfio_devices: several(said)?,
            iommufd: one(said)?,
            board: one(said)?,
        })
    }
}

fn read_text(path: &Path) -> Result<String, ConfigError> {
    let refused = |problem: String| ConfigError {
        place: Place::Flag(path.display().to_string().into()),
        key: None,
        value: None,
        problem,
    };
    let unreadable = |error: std::io::Error| refused(format!("cannot read this machine file: {error}"));
    let about = fs::metadata(path).map_err(unreadable)?;
    if about.len() > MAX_FILE {
        return Err(refused(format!(
            "{} bytes are no machine file; the path is probably another file's",
            about.len()
        )));
    }
    fs::read_to_string(path).map_err(unreadable)
}

fn one<T: Section>(said: &Table) -> Result<Option<T>, ConfigError> {
    said.get(T::INFO.name).map(T::read).transpose()
}

fn several<T: Section>(said: &Table) -> Result<Vec<T>, ConfigError> {
    match said.get(T::INFO.name) {
        None => Ok(Vec::new()),
        Some(Value {
            kind: Kind::List(values),
            ..
        }) => values.iter().map(T::read).collect(),
        Some(value) => {
            let problem = format!(
                "there can be several of these; write {} above its keys",
                T::INFO.head()
            );
            let mut error = ConfigError::at(&value.place, problem);
            error.key = Some(T::INFO.name.to_owned());
            Err(error)
        }
    }
}

/// Say what a flag says: over the keys of a section that exists once, over those of the entry with the same
/// `id` where there can be several, or else as one more entry.
fn lay_over(said: &mut Table, flag: &Flag<'_>) -> Result<(), ConfigError> {
    let info = SECTIONS
        .iter()
        .find(|section| section.name == flag.name)
        .expect("there is a flag for each section and none else");
    let value = if info.name == Cmdline::INFO.name {
        flag::verbatim(flag.name, flag.text)
    } else {
        flag::parse(flag.name, flag.text, info.main)?
    };
    let old = said.get(info.name).cloned();
    let new = match (old, info.many) {
        (Some(old), false) => overridden(info, &old, value),
        (None, false) => value,
        (old, true) => Value {
            kind: Kind::List(extended(info, old, value.clone())),
            place: value.place,
        },
    };
    said.set(info.name, new);
    Ok(())
}

/// `old` with the keys of `new` said instead.
fn overridden(info: &SectionInfo, old: &Value, new: Value) -> Value {
    let (Some(mut table), Kind::Table(over)) = (keys_of(info, old), new.kind.clone()) else {
        return new;
    };
    table.override_with(over);
    Value {
        place: new.place,
        kind: Kind::Table(table),
    }
}

fn extended(info: &SectionInfo, old: Option<Value>, new: Value) -> Vec<Value> {
    let mut entries = match old.map(|value| value.kind) {
        Some(Kind::List(entries)) => entries,
        // Not a list where there can be several: kept, so that reading it says so.
        Some(kind) => vec![Value {
            place: new.place.clone(),
            kind,
        }],
        None => Vec::new(),
    };
    let id = |value: &Value| keys_of(info, value).and_then(|keys| keys.get("id").map(|id| id.kind.clone()));
    let same = id(&new).and_then(|wanted| {
        entries
            .iter()
            .position(|entry| id(entry).as_ref() == Some(&wanted))
    });
    match same {
        Some(at) => {
            let old = entries[at].clone();
            entries[at] = overridden(info, &old, new);
        }
        None => entries.push(new),
    }
    entries
}

/// The keys of a section, also when it was said as its main value alone.
fn keys_of(info: &SectionInfo, value: &Value) -> Option<Table> {
    match (&value.kind, info.main) {
        (Kind::Table(table), _) => Some(table.clone()),
        (Kind::Text(_), Some(main)) => {
            let mut table = Table::default();
            table.set(main, value.clone());
            Some(table)
        }
        _ => None,
    }
}
