//! The I/O APIC's registers, bit by bit.
//!
//! Intel 82093AA data sheet, section 3; the EOI register is that of version 0x20, as chipsets since the ICH2
//! have it (Intel 7 Series PCH data sheet 13.5).

use bitfield_struct::bitfield;

use crate::platform::irq::IOAPIC_INPUTS;
use crate::platform::msi::MsiMessage;

/// Bytes of guest physical space the controller owns.
pub const WINDOW_LEN: u64 = 0x1000;

/// Registers that the processor reaches directly, by their offset in the window.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Direct {
    /// IOREGSEL: which register IOWIN shows.
    Select,
    /// IOWIN: the selected register.
    Window,
    /// EOI: the vector whose level-triggered interrupts ended.
    EndOfInterrupt,
}

impl Direct {
    /// The register at `offset`, if one begins there.
    #[must_use]
    pub const fn at(offset: u64) -> Option<Self> {
        match offset {
            0x00 => Some(Self::Select),
            0x10 => Some(Self::Window),
            0x40 => Some(Self::EndOfInterrupt),
            _ => None,
        }
    }
}

/// Registers behind IOREGSEL and IOWIN.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Indirect {
    /// IOAPICID: the identification the MADT names the controller by, bits 27:24.
    Id,
    /// IOAPICVER: version, and the number of the last redirection entry.
    Version,
    /// IOAPICARB: the identification again, read-only.
    Arbitration,
    /// Bits 31:0 of the redirection entry of this input.
    EntryLow(u8),
    /// Bits 63:32 of the redirection entry of this input.
    EntryHigh(u8),
}

impl Indirect {
    /// The register that `select` names, if there is one.
    #[must_use]
    pub const fn at(select: u8) -> Option<Self> {
        match select {
            0x00 => Some(Self::Id),
            0x01 => Some(Self::Version),
            0x02 => Some(Self::Arbitration),
            0x10.. => {
                let (pin, high) = ((select - 0x10) / 2, select % 2 == 1);
                match (pin < IOAPIC_INPUTS, high) {
                    (false, _) => None,
                    (true, false) => Some(Self::EntryLow(pin)),
                    (true, true) => Some(Self::EntryHigh(pin)),
                }
            }
            _ => None,
        }
    }
}

/// IOAPICVER: version 0x20, which has the EOI register, and the last entry's number in bits 23:16.
pub const VERSION: u32 = 0x20 | (IOAPIC_INPUTS as u32 - 1) << 16;

/// How a processor takes an interrupt (bits 10:8 of a redirection entry and of an MSI's data).
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct DeliveryMode(pub u8);

impl DeliveryMode {
    /// To every processor the destination names.
    pub const FIXED: Self = Self(0);
    /// To the one of them that runs at the lowest priority.
    pub const LOWEST_PRIORITY: Self = Self(1);
    /// System management interrupt; no vector.
    pub const SMI: Self = Self(2);
    /// Non-maskable interrupt; no vector.
    pub const NMI: Self = Self(4);
    /// INIT; no vector.
    pub const INIT: Self = Self(5);
}

/// One redirection table entry.
#[bitfield(u64)]
#[derive(PartialEq, Eq)]
pub struct Redirection {
    /// The vector raised at the destination, 16 to 255.
    pub vector: u8,
    /// See [`DeliveryMode`].
    #[bits(3)]
    pub delivery_mode: u8,
    /// Destination mode: the destination is a logical, not a physical, APIC ID.
    pub logical: bool,
    /// Delivery status: always idle here, as a message is sent the moment it is due.
    pub send_pending: bool,
    /// Input polarity. Stored only: the board's wires carry assertions, not voltages.
    pub active_low: bool,
    /// A level-triggered interrupt was accepted and not yet ended.
    pub remote_irr: bool,
    /// Level-triggered rather than edge-triggered.
    pub level: bool,
    /// Interrupts of this input go nowhere.
    pub masked: bool,
    #[bits(32)]
    __: u32,
    /// The destination as it goes into bits 19:5 of the message's address: the APIC ID's bits 7:0 at the top,
    /// and bits 14:8 below for a guest that was offered extended destinations (KVM_FEATURE_MSI_EXT_DEST_ID).
    #[bits(15)]
    pub destination: u16,
}

impl Redirection {
    /// Masked, nothing else: the state after power-on.
    pub const RESET: Self = Self::new().with_masked(true);

    /// What the guest may write.
    pub const WRITABLE: Self = Self::new()
        .with_vector(0xff)
        .with_delivery_mode(0b111)
        .with_logical(true)
        .with_active_low(true)
        .with_level(true)
        .with_masked(true)
        .with_destination(0x7fff);

    /// Whether an interrupt of this entry stays in service until its vector is ended. Modes without a vector
    /// are never ended, so they are edge-triggered whatever the trigger mode says.
    #[must_use]
    pub const fn is_level(self) -> bool {
        self.level() && self.has_vector()
    }

    const fn has_vector(self) -> bool {
        matches!(
            DeliveryMode(self.delivery_mode()),
            DeliveryMode::FIXED | DeliveryMode::LOWEST_PRIORITY
        )
    }

    /// The message this entry sends, in compatibility format (Intel SDM volume 3, 12.11), or `None` in a mode
    /// that is reserved or an 8259's. Whether a processor takes the vector is not known here: under remapping
    /// it is an index, mostly a small one.
    #[must_use]
    pub fn message(self) -> Option<MsiMessage> {
        let mode = DeliveryMode(self.delivery_mode());
        let deliverable = matches!(
            mode,
            DeliveryMode::FIXED
                | DeliveryMode::LOWEST_PRIORITY
                | DeliveryMode::SMI
                | DeliveryMode::NMI
                | DeliveryMode::INIT
        );
        let address = 0xfee0_0000 | u64::from(self.destination()) << 5 | u64::from(self.logical()) << 2;
        // Bit 15 is the trigger mode, bit 14 says that a level-triggered line is asserted.
        let trigger = if self.is_level() { 0b11 << 14 } else { 0 };
        let data = trigger | u32::from(mode.0) << 8 | u32::from(self.vector());
        deliverable.then_some(MsiMessage { address, data })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bits_are_where_the_data_sheet_puts_them() {
        let at = |entry: Redirection| entry.into_bits();
        assert_eq!(at(Redirection::new().with_vector(0xff)), 0xff);
        assert_eq!(at(Redirection::new().with_delivery_mode(7)), 7 << 8);
        assert_eq!(at(Redirection::new().with_logical(true)), 1 << 11);
        assert_eq!(at(Redirection::new().with_send_pending(true)), 1 << 12);
        assert_eq!(at(Redirection::new().with_active_low(true)), 1 << 13);
        assert_eq!(at(Redirection::new().with_remote_irr(true)), 1 << 14);
        assert_eq!(at(Redirection::new().with_level(true)), 1 << 15);
        assert_eq!(at(Redirection::RESET), 1 << 16);
        assert_eq!(at(Redirection::new().with_destination(0x7fff)), 0x7fff << 49);
    }

    #[test]
    fn the_destination_lands_in_the_address_the_mode_and_vector_in_the_data() {
        let entry = Redirection::from_bits(0xab00_0000_0000_0000 | 1 << 11 | 1 << 8 | 0x51);
        let message = entry.message().expect("deliverable");
        assert_eq!(message.address, 0xfee0_0000 | 0xab << 12 | 1 << 2);
        assert_eq!(message.data, 1 << 8 | 0x51);
    }

    #[test]
    fn extended_destination_bits_become_address_bits_11_to_5() {
        let entry = Redirection::from_bits(0x01fe_0000_0000_0000 | 0x51);
        assert_eq!(
            entry.message().expect("deliverable").address,
            0xfee0_0000 | 1 << 12 | 0x7f << 5
        );
    }

    #[test]
    fn a_level_triggered_entry_says_so_in_its_message() {
        let entry = Redirection::new().with_vector(0x20).with_level(true);
        assert_eq!(entry.message().expect("deliverable").data, 0xc020);
    }

    #[test]
    fn modes_without_a_meaning_are_not_sent_and_indices_below_16_are() {
        let with = |mode: DeliveryMode, vector| {
            Redirection::new()
                .with_delivery_mode(mode.0)
                .with_vector(vector)
                .message()
        };
        assert_eq!(with(DeliveryMode(3), 0x30), None);
        assert_eq!(with(DeliveryMode(6), 0x30), None);
        // The vector would come from an 8259, of which there is none.
        assert_eq!(with(DeliveryMode(7), 0x30), None);
        assert!(with(DeliveryMode::NMI, 0).is_some());
        assert!(with(DeliveryMode::FIXED, 4).is_some());
        assert!(with(DeliveryMode::LOWEST_PRIORITY, 0).is_some());
    }

    #[test]
    fn a_level_triggered_nmi_is_an_edge() {
        let entry = Redirection::new()
            .with_level(true)
            .with_delivery_mode(DeliveryMode::NMI.0);
        assert!(!entry.is_level());
        assert_eq!(entry.message().expect("deliverable").data, 0x400);
    }

    #[test]
    fn registers_exist_where_the_data_sheet_has_them_and_nowhere_else() {
        let named: Vec<u8> = (0..=u8::MAX).filter(|s| Indirect::at(*s).is_some()).collect();
        let expected: Vec<u8> = (0..3).chain(0x10..0x40).collect();
        assert_eq!(named, expected);
        assert_eq!(Indirect::at(0x3e), Some(Indirect::EntryLow(23)));
        assert_eq!(Indirect::at(0x3f), Some(Indirect::EntryHigh(23)));
        let direct: Vec<u64> = (0..WINDOW_LEN).filter(|o| Direct::at(*o).is_some()).collect();
        assert_eq!(direct, [0, 0x10, 0x40]);
    }
}
