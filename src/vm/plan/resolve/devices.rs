//! The devices: their defaults, and what each looks like on its bus.

use std::collections::{BTreeMap, BTreeSet};
use std::num::NonZeroU16;

use crate::devices::test_device;
use crate::devices::virtio;
use crate::devices::virtio::queue::LARGEST_QUEUE;
use crate::pci::assign::{FunctionSpec, Parent, Slot};
use crate::pci::tree::NodeKind;
use crate::platform::addr::Sbdf;
use crate::vm::config::Config;
use crate::vm::config::said::ConfigError;
use crate::vm::config::section::{Section, Source};
use crate::vm::config::sections::{Console, Disk, Net, TestDevice};
use crate::vm::config::values::{Name, NetBackendName, Switch};
use crate::vm::plan::{
    BlockPlan, CharBackend, ConsolePlan, CpuPlan, DeviceKind, DevicePlan, MacAddress, NetBackend, NetPlan,
    RngPlan, TestPlan, VfioPlan,
};

use crate::vm::host_functions::{Face, HostFunctions};

use super::resolved;
use super::topology::NamesOf;

/// Entries per queue when nobody says.
const QUEUE_SIZE: u16 = 256;
/// The most request queues of a disk and queue pairs of a NIC: beyond that no guest gains anything.
const MAX_QUEUES: u16 = 64;
/// Two queues per pair and one for control must fit the transport.
const _: () = assert!(2 * (MAX_QUEUES as usize) < virtio::pci::MOST_QUEUES);
/// The most request queues a disk gets by itself: beyond that they cost memory and gain nothing on one image.
const MAX_DEFAULT_QUEUES: u32 = 8;
/// The smallest MTU (RFC 791: every IPv4 module forwards 68 bytes).
const MIN_MTU: u16 = 68;
/// The longest serial number of a disk.
const SERIAL_LENGTH: usize = 20;
/// MSI-X vectors of a test device when nobody says: as many as MSI has.
const MSIX_VECTORS: u16 = 32;

/// A device's function and where it wants to be.
#[derive(Debug)]
pub(super) struct Endpoint<'a> {
    /// Complete but for its parent.
    pub(super) function: FunctionSpec,
    pub(super) port: Option<&'a Name>,
    pub(super) on: Option<&'a Name>,
    pub(super) source: &'a Source,
}

/// Every device in the order of the plan, and its function.
pub(super) fn resolve<'a>(
    config: &'a Config,
    names_of: &NamesOf,
    cpus: &CpuPlan,
    host: &HostFunctions,
) -> Result<(Vec<DevicePlan>, Vec<Endpoint<'a>>), ConfigError> {
    let (mut devices, mut endpoints) = (Vec::new(), Vec::new());
    macro_rules! add {
        ($said:expr, $name:expr, $kind:expr) => {
            let kind = $kind;
            let place = (&$said.port, &$said.on, $said.slot);
            let face = face(&kind);
            endpoints.push(endpoint(devices.len(), $name, face, place, $said.source()));
            devices.push(DevicePlan {
                name: $name.clone(),
                kind,
            });
        };
    }
    refuse_shared_images(config, names_of)?;
    for (disk, name) in config.disks.iter().zip(&names_of.disks) {
        add!(disk, name, DeviceKind::Block(block(disk, name, cpus)?));
    }
    let mut macs = Macs::new(config, names_of)?;
    for (net, name) in config.nets.iter().zip(&names_of.nets) {
        add!(net, name, DeviceKind::Net(self::net(net, name, &mut macs)?));
    }
    let mut terminal = None;
    for (console, name) in config.consoles.iter().zip(&names_of.consoles) {
        add!(
            console,
            name,
            DeviceKind::Console(self::console(console, name, &mut terminal)?)
        );
    }
    for (rng, name) in config.rngs.iter().zip(&names_of.rngs) {
        add!(rng, name, DeviceKind::Rng(RngPlan {}));
    }
    for (test, name) in config.test_devices.iter().zip(&names_of.test_devices) {
        add!(test, name, DeviceKind::Test(self::test(test)?));
    }
    refuse_shared_functions(config, names_of)?;
    for (said, name) in config.vfio_devices.iter().zip(&names_of.vfio_devices) {
        let (at, fd) = (said.host.0.0, said.fd.map(|fd| fd.0));
        let face = host
            .face(at)
            .map_err(|problem| said.source().wrong("host", problem))?;
        let place = (&said.port, &said.on, said.slot);
        let mut endpoint = endpoint(devices.len(), name, face, place, said.source());
        // The host may want it back.
        endpoint.function.removable = true;
        endpoints.push(endpoint);
        devices.push(DevicePlan {
            name: name.clone(),
            kind: DeviceKind::Vfio(VfioPlan { host: at, fd }),
        });
    }
    Ok((devices, endpoints))
}

/// Refuse a function of the host that is passed twice, and a descriptor that is said for two things.
fn refuse_shared_functions(config: &Config, names_of: &NamesOf) -> Result<(), ConfigError> {
    let mut passed: BTreeMap<Sbdf, &String> = BTreeMap::new();
    let mut taken: BTreeMap<i32, String> = BTreeMap::new();
    let iommufd = config.iommufd.as_ref().map(|said| said.fd.0.0);
    taken.extend(iommufd.map(|fd| (fd, "that of /dev/iommu".to_owned())));
    for (said, name) in config.vfio_devices.iter().zip(&names_of.vfio_devices) {
        if let Some(other) = passed.insert(said.host.0.0, name) {
            let problem = format!("{other} is this function too, and it can be passed once");
            return Err(said.source().wrong("host", problem));
        }
        if let Some(other) = said.fd.and_then(|fd| taken.insert(fd.0, format!("{name}'s"))) {
            let problem = format!("this descriptor is {other}; each function has one of its own");
            return Err(said.source().wrong("fd", problem));
        }
    }
    Ok(())
}

/// The descriptor of /dev/iommu that was handed over.
pub(super) fn iommufd(config: &Config) -> Result<Option<i32>, ConfigError> {
    let Some(said) = &config.iommufd else {
        return Ok(None);
    };
    if config.vfio_devices.is_empty() {
        let problem = "no function of the host is passed through, and nothing else uses it; leave it out";
        return Err(said.source().wrong("fd", problem));
    }
    Ok(Some(said.fd.0.0))
}

fn endpoint<'a>(
    index: usize,
    name: &str,
    face: Face,
    (port, on, slot): (&'a Option<Name>, &'a Option<Name>, Option<Slot>),
    source: &'a Source,
) -> Endpoint<'a> {
    Endpoint {
        function: FunctionSpec {
            name: name.to_owned(),
            kind: NodeKind::Endpoint(index),
            identity: face.identity,
            parent: Parent::Root(0),
            slot,
            bars: face.bars,
            intx: face.intx,
            removable: false,
        },
        port: port.as_ref(),
        on: on.as_ref(),
        source,
    }
}

/// How a guest knows a device of ours, and what it decodes.
fn face(kind: &DeviceKind) -> Face {
    let of = |identity, bars| Face {
        identity,
        bars,
        intx: true,
    };
    let virtio = |kind| of(virtio::pci::identity(kind), vec![virtio::pci::BAR]);
    match kind {
        DeviceKind::Block(_) => virtio(virtio::Kind::Block),
        DeviceKind::Net(_) => virtio(virtio::Kind::Net),
        DeviceKind::Console(_) => virtio(virtio::Kind::Console),
        DeviceKind::Rng(_) => virtio(virtio::Kind::Rng),
        DeviceKind::Test(_) => of(test_device::IDENTITY, test_device::bars()),
        DeviceKind::Vfio(vfio) => unreachable!("{} shows what it is by itself", vfio.host),
    }
}

fn on(switch: Option<Switch>, default: bool) -> bool {
    switch.map_or(default, |switch| switch.0)
}

fn queue_size(said: Option<NonZeroU16>, source: &Source) -> Result<u16, ConfigError> {
    let size = said.map_or(QUEUE_SIZE, NonZeroU16::get);
    if !(4..=LARGEST_QUEUE).contains(&size) || !size.is_power_of_two() {
        let problem = format!("a queue has a power of two of entries, 4 to {LARGEST_QUEUE}");
        return Err(source.wrong("queue-size", problem));
    }
    Ok(size)
}

fn queues(said: Option<NonZeroU16>, default: u16, source: &Source) -> Result<u16, ConfigError> {
    let queues = said.map_or(default, NonZeroU16::get);
    if queues > MAX_QUEUES {
        return Err(source.wrong("queues", format!("must be 1 to {MAX_QUEUES}")));
    }
    Ok(queues)
}

fn block(disk: &Disk, name: &str, cpus: &CpuPlan) -> Result<BlockPlan, ConfigError> {
    let source = disk.source();
    let default = u16::try_from(cpus.count.min(MAX_DEFAULT_QUEUES)).expect("eight at most");
    let serial = disk.serial.as_ref().map_or(name, |serial| &serial.0);
    Ok(BlockPlan {
        path: source.place_of("path").resolve(&disk.path.0.0),
        readonly: on(disk.readonly, false),
        direct: on(disk.direct, false),
        queues: queues(disk.queues, default, source)?,
        queue_size: queue_size(disk.queue_size, source)?,
        serial: serial.chars().take(SERIAL_LENGTH).collect(),
    })
}

/// Two disks on one image are an image that is lost, unless neither writes.
fn refuse_shared_images(config: &Config, names_of: &NamesOf) -> Result<(), ConfigError> {
    let mut images: BTreeMap<_, (&String, bool)> = BTreeMap::new();
    for (disk, name) in config.disks.iter().zip(&names_of.disks) {
        let path = disk.source().place_of("path").resolve(&disk.path.0.0);
        let readonly = on(disk.readonly, false);
        match images.insert(path, (name, readonly)) {
            Some((other, others)) if !(readonly && others) => {
                let problem = format!("{other} has this image too; say readonly=on for both, or copy it");
                return Err(disk.source().wrong("path", problem));
            }
            _ => {}
        }
    }
    Ok(())
}

fn net(net: &Net, name: &str, macs: &mut Macs) -> Result<NetPlan, ConfigError> {
    let source = net.source();
    let backend = match (&net.tap, &net.fd[..], net.backend) {
        (Some(tap), [], None | Some(NetBackendName::Tap)) => NetBackend::Tap(tap.0.clone()),
        (None, [_, ..], None | Some(NetBackendName::Tap)) => {
            NetBackend::Fds(net.fd.iter().map(|fd| fd.0).collect())
        }
        (None, [], Some(NetBackendName::None)) => NetBackend::None,
        (None, [], None | Some(NetBackendName::Tap)) => {
            let problem = "a NIC needs tap=NAME, fd=NUMBER or backend=none";
            return Err(source.wrong_altogether(problem));
        }
        (Some(_), [_, ..], _) => {
            let problem = "a NIC has a tap or descriptors of one, not both";
            return Err(source.wrong("fd", problem));
        }
        (_, _, Some(NetBackendName::None)) => {
            let problem = "this NIC is connected to a tap; say backend=tap, or leave the tap out";
            return Err(source.wrong("backend", problem));
        }
    };
    let inherited = u16::try_from(net.fd.len()).unwrap_or(u16::MAX);
    let queue_pairs = queues(net.queues, inherited.max(1), source)?;
    if matches!(backend, NetBackend::Fds(_)) && inherited != queue_pairs {
        let problem = format!("{inherited} descriptors for {queue_pairs} queue pairs; give one for each");
        return Err(source.wrong("fd", problem));
    }
    if net.mtu.is_some_and(|mtu| mtu < MIN_MTU) {
        return Err(source.wrong("mtu", format!("must be {MIN_MTU} to 65535")));
    }
    Ok(NetPlan {
        mac: net.mac.unwrap_or_else(|| macs.derive(&backend, name)),
        backend,
        mtu: net.mtu,
        queue_pairs,
        queue_size: queue_size(net.queue_size, source)?,
        offload: on(net.offload, true),
    })
}

/// The Ethernet addresses that are taken.
struct Macs(BTreeSet<MacAddress>);

impl Macs {
    /// Those that were said. Twice the same, or the same tap or descriptor twice, is refused.
    fn new(config: &Config, names_of: &NamesOf) -> Result<Self, ConfigError> {
        let mut said: BTreeMap<MacAddress, &String> = BTreeMap::new();
        let mut backends: BTreeMap<String, &String> = BTreeMap::new();
        for (net, name) in config.nets.iter().zip(&names_of.nets) {
            let twice = |key: &str, other: &String| {
                let problem = format!("{other} has it already");
                Err(net.source().wrong(key, problem))
            };
            if let Some(other) = net.mac.and_then(|mac| said.insert(mac, name)) {
                return twice("mac", other);
            }
            let tap = net.tap.iter().map(|tap| ("tap", format!("tap {}", tap.0)));
            let fds = net.fd.iter().map(|fd| ("fd", format!("fd {}", fd.0)));
            for (key, backend) in tap.chain(fds) {
                if let Some(other) = backends.insert(backend, name) {
                    return twice(key, other);
                }
            }
        }
        Ok(Self(said.into_keys().collect()))
    }

    /// An address for a NIC that got none: the same in every run, and from the tap's name where there is one,
    /// because that differs between the guests of one host.
    fn derive(&mut self, backend: &NetBackend, name: &str) -> MacAddress {
        let seed = match backend {
            NetBackend::Tap(tap) => tap.as_str(),
            NetBackend::None | NetBackend::Fds(_) => name,
        };
        let mut hash = fnv1a(seed.as_bytes());
        loop {
            let [a, b, c, ..] = hash.to_le_bytes();
            // The prefix that virtual machines' NICs are known by; locally administered.
            let mac = MacAddress([0x52, 0x54, 0x00, a, b, c]);
            if self.0.insert(mac) {
                return mac;
            }
            hash = fnv1a(&hash.to_le_bytes());
        }
    }
}

/// FNV-1a with 64 bits: a hash that is the same on every host and in every version.
fn fnv1a(bytes: &[u8]) -> u64 {
    bytes.iter().fold(0xcbf2_9ce4_8422_2325, |hash, byte| {
        (hash ^ u64::from(*byte)).wrapping_mul(0x100_0000_01b3)
    })
}

fn console(console: &Console, name: &str, terminal: &mut Option<String>) -> Result<ConsolePlan, ConfigError> {
    let backend = resolved(console.source(), &console.backend.0);
    if backend == CharBackend::Stdio {
        if let Some(other) = terminal {
            let problem = format!("{other} is on the terminal already; only one thing can be");
            return Err(console.source().wrong("backend", problem));
        }
        *terminal = Some(name.to_owned());
    }
    Ok(ConsolePlan { backend })
}

fn test(test: &TestDevice) -> Result<TestPlan, ConfigError> {
    let most = test_device::MOST_MSIX_VECTORS;
    let msix_vectors = test.msix_vectors.map_or(MSIX_VECTORS, NonZeroU16::get);
    if msix_vectors > most {
        return Err(test
            .source()
            .wrong("msix-vectors", format!("must be 1 to {most}")));
    }
    Ok(TestPlan { msix_vectors })
}
