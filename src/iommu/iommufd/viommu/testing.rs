//! Hosts over a kernel that is none, and a unit of a guest's over one of them: from the guest's registers down to the bytes
//! that the kernel is asked with.

use std::cell::Cell;
use std::fs::File;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;

use vm_memory::{GuestAddress, GuestMemoryMmap};

use super::{Functions, HwDevice, HwHost, HwParts, NestParent, Processors, requests};
use crate::iommu::amd::features::Wanted;
use crate::iommu::amd::spec::dte::Dte;
use crate::iommu::amd::spec::event::{Code, Record};
use crate::iommu::amd::spec::registers::Control;
use crate::iommu::iommufd::abi::Rings;
use crate::iommu::iommufd::fake::{EXT_INT, Fake, Object, Version};
use crate::iommu::iommufd::{Abi, Kernel};
use crate::iommu::viommu::features::offer;
use crate::iommu::viommu::host::{HostDevice, InterruptTarget, QueueKind, ViommuHost};
use crate::iommu::viommu::testing::{Deed, FakeHost, FakeProtection, Reached, Rig};
use crate::iommu::viommu::{ServedParts, ServedUnit};
use crate::pci::Function as _;
use crate::pci::access::DwordWrite;
use crate::pci::topology::Observer as _;
use crate::platform::addr::{Bdf, Gpa, GpaRange, Sbdf};
use crate::platform::dma::Requester;
use crate::platform::host::HostError;
use crate::platform::memory::GuestRam;

/// What the fake kernel expects to be told.
pub const FUNCTIONS: Functions = Functions {
    host_iommu: Bdf::from_requester_id(0x4002),
    guest_iommu: Bdf::from_requester_id(0x2008),
    translate_device: Bdf::from_requester_id(0x4800),
};

/// An EFR with everything that makes sense at once: tables of five levels are the most.
const EVERYTHING: u64 = !(3 << 12) | 1 << 12;

/// A VM.
pub struct Vm {
    file: File,
    /// There is a vCPU for every APIC ID, and not for 0, 2 and 4 alone.
    crowded: bool,
}

impl Processors for Vm {
    fn vm(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }

    fn vcpu(&self, target: InterruptTarget) -> Option<u32> {
        let even = !target.logical && target.destination <= 4 && target.destination.is_multiple_of(2);
        (even || self.crowded).then_some(target.destination / 2)
    }
}

/// A kernel with devices behind one unit, and an address space.
pub struct Bench {
    /// The kernel.
    pub fake: Arc<Fake>,
    /// The same.
    pub kernel: Arc<dyn Kernel>,
    /// By the numbers of their bindings.
    pub devices: Vec<u32>,
    /// The address space.
    pub ioas: u32,
    /// Whose interrupts are sent.
    pub vm: Arc<Vm>,
}

impl Bench {
    /// Two devices before a kernel of `version`.
    #[must_use]
    pub fn new(version: Version) -> Self {
        Self::with(version, 2, false)
    }

    fn with(version: Version, devices: usize, crowded: bool) -> Self {
        let fake = Fake::new(version);
        let kernel: Arc<dyn Kernel> = fake.clone();
        let file = rustix::fs::memfd_create("vm", rustix::fs::MemfdFlags::CLOEXEC).expect("a file");
        Self {
            devices: (0..devices).map(|_| fake.bind(0)).collect(),
            ioas: requests::ioas_alloc(&*kernel).expect("made"),
            fake,
            kernel,
            vm: Arc::new(Vm {
                file: file.into(),
                crowded,
            }),
        }
    }

    /// A host made of all of it, by one of `abis`.
    ///
    /// # Errors
    /// What the kernel refused.
    pub fn host(&self, abis: Vec<Abi>) -> Result<Arc<HwHost>, HostError> {
        let device = |id: &u32| HwDevice {
            id: *id,
            function: self.fake.function(*id),
        };
        HwHost::new(HwParts {
            name: "viommu0".to_owned(),
            kernel: self.kernel.clone(),
            parent: NestParent::new(&self.kernel, self.devices[0], self.ioas)?,
            devices: self.devices.iter().map(device).collect(),
            abis,
            functions: FUNCTIONS,
            processors: Some(self.vm.clone()),
        })
    }

    /// A host by the version that this kernel has.
    #[must_use]
    pub fn made(&self, name: &str) -> Arc<HwHost> {
        self.host(vec![named(name)]).expect("made")
    }

    /// Only what the bench made is left.
    ///
    /// # Panics
    /// When something else is.
    pub fn assert_empty(&self, when: &str) {
        assert_eq!(self.fake.objects(), [Object::Ioas], "{when}");
        let attached = self.devices.iter().map(|device| self.fake.attached(*device));
        assert!(attached.flatten().next().is_none(), "{when}");
    }
}

/// The built-in version `name`.
#[must_use]
pub fn named(name: &str) -> Abi {
    Abi::named(name).expect("built in")
}

/// V-E with a request for interrupts, and an event queue.
#[must_use]
pub fn routing() -> Abi {
    let text = format!(
        "base = 'v-e'\n[ext-int]\nrequest = {EXT_INT}\nlen = 32\nviommu = 4\nkind = 8\nkvm = 12\nvcpu = 16\n\
         vector = 20\nevent = 0\nppr = 1\n[events]\ntype = 9"
    );
    Abi::from_toml(&text).expect("a table")
}

/// A unit of a guest's with three functions, over a host over a kernel that is none; and a guest without manners.
pub struct Served {
    bench: Bench,
    abi: Abi,
    /// The unit with its driver. Its host does not serve it.
    rig: Rig,
    parent: u32,
    blocked: u32,
    /// With which the kernel fails what it is to fail.
    errno: i32,
    watchable: Cell<bool>,
    /// Of the kernel's next event.
    event: Cell<u32>,
}

impl Served {
    /// A unit whose driver is through with its start, before a kernel of `version`, which fails requests with `errno`.
    ///
    /// # Panics
    /// For [`Version::Stock`], which serves none.
    #[must_use]
    pub fn new(version: Version, errno: i32) -> Self {
        let abi = match version {
            Version::E => routing(),
            Version::D => named("v-d"),
            Version::C => named("v-c"),
            Version::A => named("v-a"),
            Version::Stock => panic!("a stock kernel serves no unit"),
        };
        let bench = Bench::with(version, 3, true);
        bench.fake.set_efr(EVERYTHING);
        let host = bench.host(vec![abi.clone()]).expect("nothing is refused");
        let (parent, blocked) = (host.parent().0, host.blocked().0);
        let ram = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 0x60_0000)]).expect("a mapping");
        let ram = GuestRam::new(ram);
        let protection = FakeProtection::new(ram.clone());
        let at = |id| Sbdf {
            segment: 0,
            bdf: Bdf::from_requester_id(id),
        };
        let requesters = [0x0100, 0x0108, 0x0200].map(|id| Arc::new(Requester::new(at(id))));
        let unit = ServedUnit::new(ServedParts {
            name: "iommu0".to_owned(),
            at: at(0x10),
            mmio: GpaRange::new(Gpa(0xfeb0_4000), 0x4000).expect("valid"),
            features: offer(&[host.features().expect("known")], &Wanted::EVERYTHING),
            ram: ram.clone(),
            host,
            protection: protection.clone(),
            functions: requesters.iter().cloned().zip((0..).map(HostDevice)).collect(),
        });
        let rig = Rig {
            ram,
            host: FakeHost::new(),
            protection,
            unit: unit.expect("nothing is refused"),
            requesters: requesters.into(),
        };
        rig.start();
        Self {
            bench,
            abi,
            rig,
            parent,
            blocked,
            errno,
            watchable: Cell::new(true),
            event: Cell::new(0),
        }
    }

    fn perform(&self, deed: &Deed) {
        let rig = &self.rig;
        match *deed {
            Deed::Register { at, len, value } => rig.write(at, len, value),
            Deed::Control { bit, on } => rig.control(bit, on),
            Deed::Table { base, size } => rig.write(0x00, 8, base | size),
            Deed::Word { index, word, value } => rig.word(rig.id(index), word, value),
            Deed::Entry { index, entry } => rig.entry(index, entry),
            Deed::Renumber { index, id } => {
                let bdf = Bdf::from_requester_id(id);
                if rig.requesters.iter().all(|other| other.sbdf().bdf != bdf) {
                    rig.requesters[index].renumber(Sbdf { segment: 0, bdf });
                    rig.unit.renumbered();
                }
            }
            Deed::Configuration { dword, value } => {
                // Nothing that it sets off concerns a topology.
                let _ = rig.unit.config_write(dword, DwordWrite::whole(value));
            }
            Deed::Reset => rig.unit.reset(),
            Deed::Refuse { after } => self.bench.fake.fail(after as u64, self.errno),
            Deed::Watchable(watchable) => {
                self.watchable.set(watchable);
                rig.protection.refuse(!watchable);
            }
            Deed::Break => self.tell_of_an_error(),
        }
    }

    /// The kernel tells that the unit cannot read what serves the guest, where it has a way to.
    fn tell_of_an_error(&self) {
        if self.abi.events.is_none() {
            return;
        }
        let number = self.event.replace(self.event.get() + 1);
        let record = Record::new().with_code(Code::VIOMMU_HARDWARE_ERROR.0);
        let record = record.with_address(0x10_0000_0000).into_bits().to_le_bytes();
        let header = [0_u32.to_le_bytes(), number.to_le_bytes()].concat();
        assert!(
            self.bench.fake.tell(&[&*header, &record].concat()),
            "somebody reads"
        );
        assert!(self.rig.unit.host_told(false), "what came is understood");
    }

    /// Do `deed`. Functions are attached by the kernel to what registers and memory say, and rings are on that are to be;
    /// after a refusal less, until a register is written that makes the unit ask again. Nothing is refused that the kernel
    /// was not told to refuse. Whether nothing is left to be asked again; `settled` is what the deed before returned.
    ///
    /// # Panics
    /// When that does not hold.
    #[must_use]
    pub fn perform_and_check(&self, deed: &Deed, settled: bool) -> bool {
        let refusals = || self.rig.unit.counts().refusals;
        let may_fail = |served: &Self| served.bench.fake.fails() || !served.watchable.get();
        let (before, could_fail) = (refusals(), may_fail(self));
        self.perform(deed);
        let refused = refusals() != before;
        assert!(
            !refused || could_fail || !settled || may_fail(self),
            "refused, as no kernel would refuse it: {deed:x?}, {}",
            self.rig.unit.state()
        );
        if settled && !refused {
            self.check(true);
            return true;
        }
        self.check(false);
        // As long as pages cannot be watched, each time is a refusal.
        let before = refusals();
        self.rig.write(0x18, 8, self.rig.read(0x18));
        let settled = refusals() == before;
        self.check(settled);
        settled
    }

    /// Everything is as the guest says; or, not `exactly`, less.
    fn check(&self, exactly: bool) {
        let told = !exactly && self.rig.unit.state().contains("NOT as its guest wants");
        for index in 0..self.rig.requesters.len() {
            let (place, expected) = (self.place(index), self.rig.expected(index));
            let less = !exactly && place == Reached::Nothing;
            assert!(
                place == expected || less || told,
                "function {index} reaches {place:x?} and not {expected:x?}: {}",
                self.rig.unit.state()
            );
            // Events and commands are about functions by name.
            let named = self.name(index) == Some(self.rig.id(index).into());
            assert!(
                named || !matches!(place, Reached::Tables(_)) || told,
                "function {index}"
            );
        }
        if exactly {
            self.check_rings();
        }
    }

    /// What function `index` is attached to, by the kernel.
    fn place(&self, index: usize) -> Reached {
        let table = self.bench.fake.attached(self.bench.devices[index]);
        let table = table.expect("it is attached to something at all times");
        if table == self.parent {
            return Reached::Memory;
        }
        if table == self.blocked {
            return Reached::Nothing;
        }
        match self.bench.fake.object(table) {
            Some(Object::Nested { dte, .. }) => Reached::Tables(Dte::from_quadwords(dte)),
            other => panic!("attached to {other:?}"),
        }
    }

    /// The name that the kernel has for function `index`.
    fn name(&self, index: usize) -> Option<u64> {
        let device = self.bench.devices[index];
        self.bench.fake.objects().iter().find_map(|object| match *object {
            Object::Vdevice { device: of, name, .. } if of == device => Some(name),
            _ => None,
        })
    }

    /// Base, length code and whether it interrupts, of a ring that the kernel works on.
    fn ring(&self, kind: QueueKind) -> Option<(u64, u64, bool)> {
        let Rings::Queues(queues) = self.abi.rings else {
            return self.forwarded(kind);
        };
        let (of, interrupts) = match kind {
            QueueKind::Command => (queues.command, queues.command_interrupts),
            QueueKind::Event => (queues.event, queues.event_interrupts),
            QueueKind::Ppr => (queues.ppr, queues.ppr_interrupts),
        };
        self.bench.fake.objects().iter().find_map(|object| match *object {
            Object::Queue {
                queue_type,
                flags,
                base,
                length,
                ..
            } if queue_type == of => Some((base, length, flags & interrupts != 0)),
            _ => None,
        })
    }

    /// The same by what the kernel was last told that the guest has in its registers.
    fn forwarded(&self, kind: QueueKind) -> Option<(u64, u64, bool)> {
        let registers = self.bench.fake.registers();
        let last = |wanted: u16| {
            let mut told = registers.iter().rev();
            told.find(|(_, register, _)| *register == wanted)
                .map(|(.., value)| *value)
        };
        let control = Control::from_bits(last(0x18)?);
        let (on, register, interrupts) = match kind {
            QueueKind::Command => (control.cmd_buf_en(), 0x08, control.com_wait_int_en()),
            QueueKind::Event => (control.event_log_en(), 0x10, control.event_int_en()),
            QueueKind::Ppr => (
                control.ppr_log_en() && control.ppr_en(),
                0x38,
                control.ppr_int_en(),
            ),
        };
        let base = last(register).filter(|_| on && control.iommu_en())?;
        Some((base & 0x000f_ffff_ffff_f000, base >> 56 & 0xf, interrupts))
    }

    /// Rings are on exactly while the registers say so.
    fn check_rings(&self) {
        let control = self.rig.read(0x18);
        let runs = !self.rig.is_stopped() && control & 1 == 1;
        let bit = |bit: u32| runs && control >> bit & 1 == 1;
        for (kind, register, on, interrupts) in [
            (QueueKind::Command, 0x08, bit(12), bit(4)),
            (QueueKind::Event, 0x10, bit(2), bit(3)),
            (QueueKind::Ppr, 0x38, bit(13) && bit(15), bit(14)),
        ] {
            let base = self.rig.read(register);
            let (start, length) = (base & 0x000f_ffff_ffff_f000, base >> 56 & 0xf);
            let wanted = (on && length >= 8).then_some((start, length, interrupts));
            assert_eq!(self.ring(kind), wanted, "{kind:?}");
        }
    }

    /// Nothing is refused any more: all is as the guest says once it writes a register, and then it ends. Nothing of it is
    /// left.
    ///
    /// # Panics
    /// When that does not hold.
    pub fn end(self) {
        self.bench.fake.relent();
        self.rig.protection.refuse(false);
        self.rig.write(0x18, 8, self.rig.read(0x18));
        self.check(true);
        drop(self.rig);
        self.bench.assert_empty("the guest ended");
    }
}
