//! Every section of the machine file with every key: the one place where they are defined.
//!
//! The comments are what `--help` and the manual page print, so they are written for whoever types them.

use std::num::{NonZeroU16, NonZeroU32};

use crate::pci::assign::Slot;
use crate::vm::plan::{BootProtocol, CharBackend, CpuSet, Doorbell, MacAddress, OnReboot, PageTable};

use super::section::{Required, section};
use super::values::{
    BusRange, Descriptor, HostFunction, HostPath, HugePages, Interface, Name, NetBackendName, Serial, Size,
    Switch, Text, ViommuMode,
};

section! {
    /// Processors: how many, and how they are arranged.
    pub struct Cpus is one "cpus", main "count" {
        /// How many vCPUs, 1 to 1024; sockets x cores x threads when not given.
        count = "count": Option<NonZeroU32>,
        /// Packages (default 1).
        sockets = "sockets": Option<NonZeroU32>,
        /// Cores per package (default: whatever makes up the count).
        cores = "cores": Option<NonZeroU32>,
        /// Hardware threads per core (default 1).
        threads = "threads": Option<NonZeroU32>,
        /// Host CPUs to pin to: a list like 0-3 gives each vCPU one of them in turn; several like [0-1,2-3] give
        /// each vCPU a set.
        pin = "pin": Vec<CpuSet>,
    }
}

section! {
    /// Guest RAM: how much, and what it is made of.
    pub struct Memory is one "memory", main "size" {
        /// How much, like 512M or 4G (default 512M).
        size = "size": Option<Size>,
        /// Whether other processes can map it (default off).
        shared = "shared": Option<Switch>,
        /// Huge pages from the host's pool: off, 2M or 1G (default off).
        hugepages = "hugepages": Option<HugePages>,
        /// Whether the kernel is asked for transparent huge pages (default on).
        thp = "thp": Option<Switch>,
        /// Whether all of it is populated before the guest starts (default off).
        prefault = "prefault": Option<Switch>,
        /// The host NUMA node it comes from (default: any).
        host_node = "host-node": Option<u32>,
    }
}

section! {
    /// The kernel to start.
    pub struct Kernel is one "kernel", main "path" {
        /// A bzImage, an ELF vmlinux or a multiboot image.
        path = "path": Required<HostPath>,
        /// How it is started: auto, linux, pvh or multiboot (default auto).
        protocol = "protocol": Option<BootProtocol>,
    }
}

section! {
    /// The initial RAM file system.
    pub struct Initramfs is one "initramfs", main "path" {
        /// A cpio archive, compressed in any way the kernel knows.
        path = "path": Required<HostPath>,
    }
}

section! {
    /// A file that a multiboot or PVH kernel finds in memory; an initramfs counts as one.
    pub struct Module is several "module", main "path" {
        /// The file.
        path = "path": Required<HostPath>,
        /// The string that goes with it (default empty).
        cmdline = "cmdline": Option<Text>,
    }
}

section! {
    /// The kernel's command line; replaces the default one.
    pub struct Cmdline is one "cmdline", main "text" {
        /// The command line.
        text = "text": Required<Text>,
    }
}

section! {
    /// A virtio disk on a raw image or a block device.
    pub struct Disk is several "disk", main "path" {
        /// The image or block device; always raw, its format is never probed.
        path = "path": Required<HostPath>,
        /// What it is called (default disk0, disk1, ...).
        id = "id": Option<Name>,
        /// Whether the guest may only read (default off).
        readonly = "readonly": Option<Switch>,
        /// Whether the host's page cache is bypassed (default off).
        direct = "direct": Option<Switch>,
        /// Request queues, 1 to 64 (default: one per vCPU, at most 8).
        queues = "queues": Option<NonZeroU16>,
        /// Entries per queue, a power of two from 4 to 1024 (default 256).
        queue_size = "queue-size": Option<NonZeroU16>,
        /// The serial number the guest reads, at most 20 characters (default: the name).
        serial = "serial": Option<Serial>,
        /// The port it is behind; without port and on, the first root complex.
        port = "port": Option<Name>,
        /// The root complex it is integrated into.
        on = "on": Option<Name>,
        /// DEVICE.FUNCTION on its bus (default: the next free device).
        slot = "slot": Option<Slot>,
    }
}

section! {
    /// A virtio NIC.
    pub struct Net is several "net", main "tap" {
        /// The tap interface its frames go to.
        tap = "tap": Option<Interface>,
        /// Open descriptors of a tap interface instead, one per queue pair.
        fd = "fd": Vec<Descriptor>,
        /// none for a NIC whose link is down; tap when tap or fd is given (which need not be said).
        backend = "backend": Option<NetBackendName>,
        /// What it is called (default net0, net1, ...).
        id = "id": Option<Name>,
        /// Its Ethernet address (default: made from the tap's or its own name).
        mac = "mac": Option<MacAddress>,
        /// The MTU the guest is told, 68 to 65535 (default: none).
        mtu = "mtu": Option<u16>,
        /// Queue pairs, 1 to 64 (default 1).
        queues = "queues": Option<NonZeroU16>,
        /// Entries per queue, a power of two from 4 to 1024 (default 256).
        queue_size = "queue-size": Option<NonZeroU16>,
        /// Whether checksum and segmentation offloads are offered (default on).
        offload = "offload": Option<Switch>,
        /// The port it is behind; without port and on, the first root complex.
        port = "port": Option<Name>,
        /// The root complex it is integrated into.
        on = "on": Option<Name>,
        /// DEVICE.FUNCTION on its bus (default: the next free device).
        slot = "slot": Option<Slot>,
    }
}

section! {
    /// A virtio console.
    pub struct Console is several "console", main "backend" {
        /// null, stdio, pty, file:PATH or socket:PATH.
        backend = "backend": Required<CharBackend>,
        /// What it is called (default console0, console1, ...).
        id = "id": Option<Name>,
        /// The port it is behind; without port and on, the first root complex.
        port = "port": Option<Name>,
        /// The root complex it is integrated into.
        on = "on": Option<Name>,
        /// DEVICE.FUNCTION on its bus (default: the next free device).
        slot = "slot": Option<Slot>,
    }
}

section! {
    /// A virtio entropy source.
    pub struct Rng is several "rng", main "id" {
        /// What it is called (default rng0, rng1, ...).
        id = "id": Option<Name>,
        /// The port it is behind; without port and on, the first root complex.
        port = "port": Option<Name>,
        /// The root complex it is integrated into.
        on = "on": Option<Name>,
        /// DEVICE.FUNCTION on its bus (default: the next free device).
        slot = "slot": Option<Slot>,
    }
}

section! {
    /// A PCI function for testing, which Linux's pci_endpoint_test driver knows.
    pub struct TestDevice is several "test-device", main "id" {
        /// What it is called (default test0, test1, ...).
        id = "id": Option<Name>,
        /// MSI-X vectors, 1 to 2048 (default 32).
        msix_vectors = "msix-vectors": Option<NonZeroU16>,
        /// The port it is behind; without port and on, the first root complex.
        port = "port": Option<Name>,
        /// The root complex it is integrated into.
        on = "on": Option<Name>,
        /// DEVICE.FUNCTION on its bus (default: the next free device).
        slot = "slot": Option<Slot>,
    }
}

section! {
    /// What the first serial port is connected to.
    pub struct SerialPort is one "serial", main "backend" {
        /// null, stdio, pty, file:PATH or socket:PATH (default stdio).
        backend = "backend": Required<CharBackend>,
    }
}

section! {
    /// A PCI root complex: a host bridge with bus numbers of its own.
    pub struct RootComplex is several "root-complex", main "id" {
        /// What it is called (default rc0, rc1, ...).
        id = "id": Option<Name>,
        /// Its PCI segment (default 0).
        segment = "segment": Option<u16>,
        /// Its bus numbers, like 0x00-0x3f (default: what it needs, in eights, of an even share of the segment's).
        bus = "bus": Option<BusRange>,
    }
}

section! {
    /// A PCI Express root port.
    pub struct RootPort is several "root-port", main "id" {
        /// What it is called (default rp0, rp1, ...).
        id = "id": Option<Name>,
        /// The root complex it belongs to (default: the first).
        on = "on": Option<Name>,
        /// DEVICE.FUNCTION on the root bus (default: the next free device).
        slot = "slot": Option<Slot>,
    }
}

section! {
    /// A PCI Express switch. Its downstream ports are called ID.0, ID.1, ...
    pub struct SwitchPorts is several "switch", main "id" {
        /// What it is called (default sw0, sw1, ...).
        id = "id": Option<Name>,
        /// The port it is behind: a root port or another switch's downstream port.
        on = "on": Required<Name>,
        /// DEVICE.FUNCTION of the upstream port behind that port (default 0.0).
        slot = "slot": Option<Slot>,
        /// Downstream ports, 1 to 32.
        downstream = "downstream": Required<NonZeroU16>,
    }
}

section! {
    /// An AMD IOMMU for the guest, which covers a root complex and all behind it. What one of several does not
    /// offer, none does.
    pub struct Viommu is several "viommu", main "mode" {
        /// emulated; hw, by the host's own unit, for functions of the host; sim, by a model of such a unit; auto, hw where
        /// host and kernel have what it takes and emulated else; per-host, one as auto for each IOMMU of the host that
        /// serves functions of the host without a place (default auto).
        mode = "mode": Option<ViommuMode>,
        /// What it is called (default iommu0, iommu1, ...).
        id = "id": Option<Name>,
        /// The root complex it covers, which has no other (default: the first; with auto or hw, and functions of the
        /// host that say no place, one for each IOMMU of the host that serves them).
        on = "on": Option<Name>,
        /// Whether interrupts reach APIC IDs above 255 (default on).
        xt = "xt": Option<Switch>,
        /// The page tables a guest uses: v1, v2, or any to leave it the choice (default any).
        page_table = "page-table": Option<PageTable>,
        /// Whether the guest is told that the IOAPIC's interrupts can be remapped, without which Linux remaps
        /// none (default on).
        intremap = "intremap": Option<Switch>,
        /// Width of process address space IDs, 0 for none to 16 (default 0).
        pasid_bits = "pasid-bits": Option<u16>,
        /// Whether devices may ask for translations and keep them (default off).
        ats = "ats": Option<Switch>,
        /// Whether the guest is to announce new mappings as well, as shadowed tables need (default off).
        np_cache = "npcache": Option<Switch>,
        /// Whether it serves guests of the guest's in turn, as AMD's vIOMMU hardware does, for kernels with a driver for
        /// that (default off; all IOMMUs of a machine alike, and all emulated).
        virtualizable = "virtualizable": Option<Switch>,
        /// Whether a function's interrupt remapping table may have 2,048 entries rather than 512, for functions with more
        /// messages than that (default off).
        large_irt = "large-irt": Option<Switch>,
        /// How it hears of commands: by an exit each time, or by poll, with a host thread that polls while the guest
        /// is busy (default exit).
        doorbell = "doorbell": Option<Doorbell>,
        /// Mode hw: the version of the kernel's interface, v-a, v-c, v-d or v-e, or a TOML file with changes to one
        /// (default: the version that the kernel answers to).
        abi = "abi": Option<Text>,
    }
}

section! {
    /// A PCI function of the host, passed through.
    pub struct VfioDevice is several "vfio-device", main "host" {
        /// The function, like 0000:41:00.0, or its folder in sysfs; bound to vfio-pci.
        host = "host": Required<HostFunction>,
        /// The open descriptor of its node in /dev/vfio/devices, inherited from whoever starts Ravelin (default: the node
        /// is opened).
        fd = "fd": Option<Descriptor>,
        /// What it is called (default vfio0, vfio1, ...).
        id = "id": Option<Name>,
        /// The vIOMMU it must be behind: that of its root complex.
        viommu = "viommu": Option<Name>,
        /// The port it is behind; without port, on and slot, the first root complex, or a port of its own where a viommu
        /// with auto mirrors the host.
        port = "port": Option<Name>,
        /// The root complex it is integrated into.
        on = "on": Option<Name>,
        /// DEVICE.FUNCTION on its bus (default: the next free device).
        slot = "slot": Option<Slot>,
    }
}

section! {
    /// The host's IOMMUs, for its functions.
    pub struct HostIommus is one "iommufd", main "fd" {
        /// An open descriptor of /dev/iommu, inherited from whoever starts Ravelin (default: it is opened).
        fd = "fd": Required<Descriptor>,
    }
}

section! {
    /// What else sits on the board.
    pub struct Board is one "board" {
        /// An HPET with legacy replacement (default off).
        hpet = "hpet": Option<Switch>,
        /// The port at 0x501 by which a test image ends the machine (default off).
        exit_port = "exit-port": Option<Switch>,
        /// The port at 0x505 by which a guest says that it panicked (default on).
        pvpanic = "pvpanic": Option<Switch>,
        /// What a reset by the guest does: restart or exit (default restart).
        on_reboot = "on-reboot": Option<OnReboot>,
    }
}
