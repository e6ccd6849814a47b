//! Resource descriptors: what a device uses, and the windows a host bridge forwards.
//!
//! ACPI specification 6.5, section 6.4.

use std::ops::RangeInclusive;

use acpi_tables::aml::{AddressSpace, AddressSpaceCacheable, IO, Interrupt};
use acpi_tables::{Aml, AmlSink};

use crate::pci::tree::PortRange;
use crate::platform::addr::GpaRange;

/// The bus numbers below a host bridge.
pub(super) fn buses(range: &RangeInclusive<u8>) -> AddressSpace<u16> {
    AddressSpace::new_bus_number(u16::from(*range.start()), u16::from(*range.end()))
}

/// Ports a host bridge forwards. In 32 bits, so that a window of all 65,536 ports has a length.
pub(super) fn port_window(range: PortRange) -> AddressSpace<u32> {
    AddressSpace::new_io(u32::from(range.start()), u32::from(range.last()), None)
}

/// Memory a host bridge forwards.
///
/// Not called prefetchable even where the tree puts prefetchable BARs: a root complex has no prefetch
/// buffers, and a guest that reassigns may then place any 64-bit BAR there.
pub(super) fn memory_window(range: GpaRange) -> AddressSpace<u64> {
    AddressSpace::new_memory(
        AddressSpaceCacheable::NotCacheable,
        true,
        range.start().0,
        range.last().0,
        None,
    )
}

/// Memory that a device itself uses: a QWord descriptor with the consumer bit, which the crate's lacks.
pub(super) struct UsedMemory(pub(super) GpaRange);

impl Aml for UsedMemory {
    fn to_aml_bytes(&self, sink: &mut dyn AmlSink) {
        const CONSUMER: u8 = 1;
        /// Tag and length (3 bytes) and the resource type come before the general flags.
        const GENERAL_FLAGS: usize = 4;
        let mut bytes = Vec::new();
        memory_window(self.0).to_aml_bytes(&mut bytes);
        bytes[GENERAL_FLAGS] |= CONSUMER;
        sink.vec(&bytes);
    }
}

/// `count` ports from `first` that a device itself uses.
pub(super) fn ports(first: u16, count: u8) -> IO {
    IO::new(first, first, 1, count)
}

/// An ISA interrupt: edge-triggered, active high, not shared.
pub(super) fn isa_interrupt(gsi: u8) -> Interrupt {
    Interrupt::new(true, true, false, false, u32::from(gsi))
}
