//! What the unit reports to software, and the records it writes for it (section 2.5).

use super::request::{Pasid, Request};
use super::spec::event::{Code, InvalidPpr, Record};
use crate::platform::addr::{Bdf, Gpa};

/// Whose address a record names.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Tag {
    /// A domain's: GN=0.
    Domain(u16),
    /// A process address space's: GN=1.
    Space(Pasid),
}

/// The request that went wrong.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Source {
    /// Who sent it.
    pub device: Bdf,
    /// Where to.
    pub address: u64,
    /// Whose address that is.
    pub tag: Tag,
    /// Memory was to be written.
    pub write: bool,
    /// What kind of request it was.
    pub kind: Kind,
}

/// What kind of request went wrong.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Kind {
    /// Memory access.
    Memory,
    /// Translation request (ATS).
    Translation,
    /// Interrupt.
    Interrupt,
}

impl Source {
    /// A memory request, or a translation request, in its own address space.
    #[must_use]
    pub fn of(request: &Request, kind: Kind, domain: u16) -> Self {
        Self {
            device: request.requester,
            address: request.at.0,
            tag: request.pasid.map_or(Tag::Domain(domain), Tag::Space),
            write: request.access.write,
            kind,
        }
    }

    /// The same by other names.
    const fn renamed(self, device: Bdf, domain: u16) -> Self {
        let tag = match self.tag {
            Tag::Domain(_) => Tag::Domain(domain),
            space @ Tag::Space(_) => space,
        };
        Self { device, tag, ..self }
    }

    /// What every record about a request holds.
    fn record(&self, code: Code) -> Record {
        let record = Record::new()
            .with_device(self.device.requester_id())
            .with_code(code.0)
            .with_i(self.kind == Kind::Interrupt)
            .with_tr(self.kind == Kind::Translation)
            .with_rw(self.write)
            .with_address(self.address);
        self.tagged(record)
    }

    fn tagged(&self, record: Record) -> Record {
        match self.tag {
            Tag::Domain(domain) => record.with_domain(domain),
            Tag::Space(pasid) => {
                let [b0, b1, b2, _] = pasid.value().to_le_bytes();
                record
                    .with_gn(true)
                    .with_domain(u16::from_le_bytes([b0, b1]))
                    .with_pasid_19_16(b2)
            }
        }
    }
}

/// Why a page was refused (section 2.5.3).
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum PageFault {
    /// Nothing is there: PR=0.
    NotPresent,
    /// The permissions do not suffice: PR=1, PE=1.
    Denied,
    /// A supervisor page met a user request: PR=1, PE=1, US=1.
    Supervisor,
    /// An impossible level or size: PR=1.
    Malformed,
    /// A reserved bit: PR=1, RZ=1.
    Reserved,
}

/// Something software is told by the event log.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Event {
    /// The device's entry is malformed.
    IllegalDeviceTableEntry {
        /// By which request it came to light.
        source: Source,
        /// By reserved bits, rather than by a field's value.
        reserved: bool,
    },
    /// A request met no page, or one it may not use.
    PageFault {
        /// Which.
        source: Source,
        /// How.
        fault: PageFault,
    },
    /// Memory did not answer for a device table entry.
    DeviceTableHardwareError {
        /// By which request it came to light.
        source: Source,
        /// The entry.
        at: Gpa,
    },
    /// Memory did not answer for an entry of a table that the device's entry leads to.
    PageTableHardwareError {
        /// By which request it came to light.
        source: Source,
        /// The entry.
        at: Gpa,
    },
    /// A command means nothing.
    IllegalCommand {
        /// Where it stands.
        at: Gpa,
    },
    /// Memory did not answer for a command, or took no completion store.
    CommandHardwareError {
        /// Where.
        at: Gpa,
    },
    /// A device did not acknowledge an invalidation in time.
    IotlbInvalidationTimeout {
        /// The device.
        device: Bdf,
        /// The command.
        at: Gpa,
    },
    /// A request of a kind the device may not send, or in a place for none of the kind (section 2.5.9).
    InvalidDeviceRequest {
        /// Which.
        source: Source,
        /// The `type` of the manual's table, 0 to 7.
        kind: u8,
    },
    /// A record was lost because a guest's log could not be written.
    GuestEventFault {
        /// The guest.
        guest: u16,
        /// Where in its memory.
        at: Gpa,
    },
    /// What serves a guest could not be read or written.
    ViommuHardwareError {
        /// The guest.
        guest: u16,
        /// Where in the private address space, or by which device number the guest's buffers could not be reached.
        at: u64,
    },
    /// A page request from a device that may send none.
    InvalidPageRequest {
        /// The device.
        device: Bdf,
        /// Whose address.
        pasid: Option<Pasid>,
        /// Page request group.
        group: u16,
        /// The page.
        address: u64,
    },
}

impl Event {
    /// Kinds of page faults, for counters: of memory, and of interrupts.
    pub const FAULTS: [&'static str; 10] = [
        "not_present",
        "denied",
        "supervisor",
        "malformed",
        "reserved",
        "interrupt_not_present",
        "interrupt_denied",
        "interrupt_supervisor",
        "interrupt_malformed",
        "interrupt_reserved",
    ];

    /// The place in [`Self::FAULTS`] of what a record reports; `None` where that is no page fault.
    #[must_use]
    pub const fn fault_in(record: u128) -> Option<usize> {
        let record = Record::from_bits(record);
        if record.code() != Code::IO_PAGE_FAULT.0 {
            return None;
        }
        let kind = match (record.pr(), record.rz(), record.us(), record.pe()) {
            (false, ..) => 0,
            (true, true, ..) => 4,
            (true, false, true, _) => 2,
            (true, false, false, true) => 1,
            (true, false, false, false) => 3,
        };
        Some(if record.i() {
            kind + Self::FAULTS.len() / 2
        } else {
            kind
        })
    }

    /// The record's code.
    #[must_use]
    pub const fn code(&self) -> Code {
        match self {
            Self::IllegalDeviceTableEntry { .. } => Code::ILLEGAL_DEV_TABLE_ENTRY,
            Self::PageFault { .. } => Code::IO_PAGE_FAULT,
            Self::DeviceTableHardwareError { .. } => Code::DEV_TAB_HARDWARE_ERROR,
            Self::PageTableHardwareError { .. } => Code::PAGE_TAB_HARDWARE_ERROR,
            Self::IllegalCommand { .. } => Code::ILLEGAL_COMMAND_ERROR,
            Self::CommandHardwareError { .. } => Code::COMMAND_HARDWARE_ERROR,
            Self::IotlbInvalidationTimeout { .. } => Code::IOTLB_INV_TIMEOUT,
            Self::InvalidDeviceRequest { .. } => Code::INVALID_DEVICE_REQUEST,
            Self::InvalidPageRequest { .. } => Code::INVALID_PPR_REQUEST,
            Self::GuestEventFault { .. } => Code::GUEST_EVENT_FAULT,
            Self::ViommuHardwareError { .. } => Code::VIOMMU_HARDWARE_ERROR,
        }
    }

    /// The device whose request went wrong by what its software did, rather than by what the host's did.
    #[must_use]
    pub const fn requester(&self) -> Option<Bdf> {
        match self {
            Self::PageFault { source, .. } | Self::InvalidDeviceRequest { source, .. } => match source.kind {
                Kind::Memory | Kind::Translation => Some(source.device),
                Kind::Interrupt => None,
            },
            Self::InvalidPageRequest { device, .. } => Some(*device),
            _ => None,
        }
    }

    /// The domain it names, if it names one.
    #[must_use]
    pub const fn domain(&self) -> Option<u16> {
        match self {
            Self::PageFault { source, .. } => match source.tag {
                Tag::Domain(domain) => Some(domain),
                Tag::Space(_) => None,
            },
            _ => None,
        }
    }

    /// The same as its software knows it, which calls device and domain so.
    #[must_use]
    pub const fn renamed(self, to: Bdf, domain: u16) -> Self {
        match self {
            Self::PageFault { source, fault } => Self::PageFault {
                source: source.renamed(to, domain),
                fault,
            },
            Self::InvalidDeviceRequest { source, kind } => Self::InvalidDeviceRequest {
                source: source.renamed(to, domain),
                kind,
            },
            Self::InvalidPageRequest {
                pasid,
                group,
                address,
                ..
            } => Self::InvalidPageRequest {
                device: to,
                pasid,
                group,
                address,
            },
            Self::IotlbInvalidationTimeout { at, .. } => Self::IotlbInvalidationTimeout { device: to, at },
            other => other,
        }
    }

    /// The record. Bits that its code does not define stay 0.
    #[must_use]
    pub fn record(&self) -> u128 {
        let code = self.code();
        let record = match *self {
            Self::IllegalDeviceTableEntry { source, reserved } => {
                let record = source.record(code).with_rz(reserved);
                // The record has no room for a domain; a PASID stays.
                let record = if record.gn() {
                    record
                } else {
                    record.with_domain(0)
                };
                record.with_address(record.address() & !3)
            }
            Self::PageFault { source, fault } => source
                .record(code)
                .with_pr(fault != PageFault::NotPresent)
                .with_pe(matches!(fault, PageFault::Denied | PageFault::Supervisor))
                .with_us(fault == PageFault::Supervisor)
                .with_rz(fault == PageFault::Reserved),
            Self::DeviceTableHardwareError { source, at } => source
                .record(code)
                .with_gn(false)
                .with_domain(0)
                .with_pasid_19_16(0)
                .with_kind(Record::TARGET_ABORT)
                .with_address(at.0),
            Self::PageTableHardwareError { source, at } => source
                .record(code)
                .with_kind(Record::TARGET_ABORT)
                .with_address(at.0),
            Self::IllegalCommand { at } => Record::new().with_code(code.0).with_address(at.0),
            Self::CommandHardwareError { at } => Record::new()
                .with_code(code.0)
                .with_kind(Record::TARGET_ABORT)
                .with_address(at.0),
            Self::IotlbInvalidationTimeout { device, at } => Record::new()
                .with_device(device.requester_id())
                .with_code(code.0)
                .with_address(at.0),
            // Where AMD's driver finds the guest's number in each.
            Self::GuestEventFault { guest, at } => Record::new()
                .with_code(code.0)
                .with_domain(guest)
                .with_address(at.0),
            Self::ViommuHardwareError { guest, at } => Record::new()
                .with_code(code.0)
                .with_device(guest)
                .with_kind(Record::TARGET_ABORT)
                .with_address(at),
            Self::InvalidDeviceRequest { source, kind } => {
                let record = source.record(code).with_rw(false).with_i(false).with_kind(kind);
                if record.gn() {
                    record
                } else {
                    record.with_domain(0)
                }
            }
            Self::InvalidPageRequest {
                device,
                pasid,
                group,
                address,
            } => {
                let [b0, b1, b2, _] = pasid.unwrap_or_default().value().to_le_bytes();
                return InvalidPpr::new()
                    .with_device(device.requester_id())
                    .with_pasid_15_0(u16::from_le_bytes([b0, b1]))
                    .with_pasid_19_16(b2)
                    .with_tag(group & 0x1ff)
                    .with_rx(true)
                    .with_gn(pasid.is_some())
                    .with_code(code.0)
                    .with_address(address)
                    .into_bits();
            }
        };
        record.into_bits()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::iommu::amd::request::Access;
    use crate::platform::addr::Iova;

    fn write() -> Request {
        let device = Bdf::new(2, 3, 1).expect("valid");
        Request::plain(device, Iova(0x1_2345_6789), Access::WRITE)
    }

    fn dwords(event: &Event) -> [u32; 4] {
        let bytes = event.record().to_le_bytes();
        std::array::from_fn(|at| {
            u32::from_le_bytes(bytes[4 * at..4 * at + 4].try_into().expect("four bytes"))
        })
    }

    #[test]
    fn a_page_fault_says_who_where_and_why() {
        let source = Source::of(&write(), Kind::Memory, 7);
        let flags = [
            (PageFault::NotPresent, 0x020),
            (PageFault::Denied, 0x070),
            (PageFault::Supervisor, 0x074),
            (PageFault::Malformed, 0x030),
            (PageFault::Reserved, 0x0b0),
        ];
        for (fault, flags) in flags {
            let record = dwords(&Event::PageFault { source, fault });
            assert_eq!(
                record,
                [0x0219, 0x2000_0007 | flags << 16, 0x2345_6789, 1],
                "{fault:?}"
            );
        }
    }

    #[test]
    fn a_record_of_a_page_fault_is_counted_by_its_kind() {
        let memory = [
            (PageFault::NotPresent, "not_present"),
            (PageFault::Denied, "denied"),
            (PageFault::Supervisor, "supervisor"),
            (PageFault::Malformed, "malformed"),
            (PageFault::Reserved, "reserved"),
        ];
        for (fault, name) in memory {
            for (kind, prefix) in [(Kind::Memory, ""), (Kind::Interrupt, "interrupt_")] {
                let source = Source::of(&write(), kind, 7);
                let record = Event::PageFault { source, fault }.record();
                let counted = Event::fault_in(record).map(|place| Event::FAULTS[place]);
                assert_eq!(counted, Some(format!("{prefix}{name}").as_str()));
            }
        }
        assert_eq!(
            Event::fault_in(Event::IllegalCommand { at: Gpa(0) }.record()),
            None
        );
    }

    #[test]
    fn a_fault_in_a_process_names_the_process_instead_of_the_domain() {
        let request = write().in_space(Pasid::new(0xa_1234).expect("20 bits"));
        let source = Source::of(&request, Kind::Memory, 7);
        let fault = PageFault::NotPresent;
        let record = dwords(&Event::PageFault { source, fault });
        assert_eq!(record[..2], [0x000a_0219, 0x2021_1234]);
    }

    #[test]
    fn records_hold_nothing_that_their_code_does_not_define() {
        let source = Source::of(&write(), Kind::Memory, 7);
        let at = Gpa(0x10_0020);
        let illegal = Event::IllegalDeviceTableEntry {
            source,
            reserved: true,
        };
        assert_eq!(dwords(&illegal), [0x0219, 0x10a0_0000, 0x2345_6788, 1]);
        let table = Event::DeviceTableHardwareError { source, at };
        assert_eq!(dwords(&table), [0x0219, 0x3420_0000, 0x10_0020, 0]);
        let page = Event::PageTableHardwareError { source, at };
        assert_eq!(dwords(&page), [0x0219, 0x4420_0007, 0x10_0020, 0]);
        assert_eq!(
            dwords(&Event::IllegalCommand { at }),
            [0, 0x5000_0000, 0x10_0020, 0]
        );
        assert_eq!(
            dwords(&Event::CommandHardwareError { at }),
            [0, 0x6400_0000, 0x10_0020, 0]
        );
        let request = Event::InvalidDeviceRequest { source, kind: 5 };
        assert_eq!(dwords(&request), [0x0219, 0x8a00_0000, 0x2345_6789, 1]);
    }

    #[test]
    fn records_about_guests_name_them_where_drivers_look() {
        let fault = Event::GuestEventFault {
            guest: 0x4005,
            at: Gpa(0x10_0020),
        };
        assert_eq!(dwords(&fault), [0, 0xb000_4005, 0x10_0020, 0]);
        let error = Event::ViommuHardwareError {
            guest: 0x4005,
            at: 0x10_0040_0050,
        };
        assert_eq!(dwords(&error), [0x4005, 0xc400_0000, 0x0040_0050, 0x10]);
    }

    #[test]
    fn translation_requests_and_interrupts_are_told_apart() {
        let of = |kind| Source::of(&write(), kind, 7);
        let fault = PageFault::NotPresent;
        let record = |source| dwords(&Event::PageFault { source, fault })[1];
        assert_eq!(record(of(Kind::Translation)), 0x2120_0007);
        assert_eq!(record(of(Kind::Interrupt)), 0x2028_0007);
    }
}
