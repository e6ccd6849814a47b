//! What of a host function's configuration space the guest sees: passed, emulated or hidden, by capability.
//!
//! The function may be faulty, or lie: its lists are walked within bounds, and a capability that overlaps another or
//! names what is not there is hidden. Of capabilities that there is one of, the first of the list counts, as it does to the
//! host's kernel and to a guest's.
//!
//! | what | to the guest |
//! | --- | --- |
//! | identification, BARs, Command, Status | ours; the device decodes as long as the guest has it |
//! | expansion ROM | hidden |
//! | power management | ours: D0 and D3hot, without PME; the device stays in D0 |
//! | MSI, MSI-X | ours |
//! | PCI Express | ours, of an endpoint where the guest has it; ordering, tags and request size reach the device |
//! | vital product data, vendor-specific (both kinds) | the device's |
//! | device serial number | the device's, read-only |
//! | ATS, page requests, PASID, SR-IOV, resizable BARs, ARI, AER, all others | hidden |
//! | between standard capabilities | the device's, read-only |

use super::config::{ConfigTable, Dword};
use crate::pci::CONFIG_DWORDS;
use crate::pci::Command;
use crate::pci::tree::{Identity, Pin};

/// Dword of Command and Status.
pub(super) const COMMAND: u16 = 1;
/// First dword of the BARs.
pub(super) const BARS: u16 = 4;
/// One past the last dword of the BARs.
pub(super) const BARS_END: u16 = 10;

const STATUS_INTERRUPT: u32 = 1 << 19;
const STATUS_CAPABILITIES: u32 = 1 << 20;
/// Bytes of a type 0 header.
const HEADER: u16 = 0x40;
/// First byte of extended configuration space.
const EXTENDED: u16 = 0x100;
/// Standard capabilities that fit: 4 bytes each at least.
const MOST_STANDARD: usize = 48;
/// Extended capabilities that fit.
const MOST_EXTENDED: usize = 960;

/// Configuration space of a function as it was read once.
pub(super) struct Image(pub(super) Vec<u32>);

impl Image {
    fn dword(&self, byte: u16) -> u32 {
        self.0.get(usize::from(byte / 4)).copied().unwrap_or(0)
    }

    fn byte(&self, at: u16) -> u8 {
        self.dword(at).to_le_bytes()[usize::from(at % 4)]
    }

    fn upper_half(&self, byte: u16) -> u32 {
        self.dword(byte) & 0xffff_0000
    }
}

/// What the survey goes by besides the registers themselves.
pub(super) struct Given {
    /// How the guest knows the function.
    pub(super) identity: Identity,
    /// What it decodes.
    pub(super) decodes: Command,
    /// The wire it has.
    pub(super) pin: Option<Pin>,
    /// On a root complex's first bus, not behind a port.
    pub(super) on_root_bus: bool,
    /// The host can reset it.
    pub(super) resets: bool,
    /// Interrupts of either kind that the host has to give.
    pub(super) msi: u32,
    pub(super) msix: u32,
    /// Bytes of each BAR of memory.
    pub(super) bars: [u64; 6],
}

/// MSI: where its registers are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct MsiPlace {
    /// Dword of the capability's start.
    pub(super) dword: u16,
    /// The address has 64 bits.
    pub(super) wide: bool,
    /// Vectors can be masked.
    pub(super) masks: bool,
}

impl MsiPlace {
    const ENABLE: u32 = 1 << 16;
    const ENABLED_VECTORS: u32 = 7 << 20;

    /// Dword of the data.
    pub(super) const fn data(self) -> u16 {
        self.dword + if self.wide { 3 } else { 2 }
    }

    /// Dword of the mask bits.
    pub(super) const fn mask(self) -> u16 {
        self.data() + 1
    }

    /// Dword of the pending bits, where vectors can be masked.
    pub(super) fn pending(self) -> Option<u16> {
        self.masks.then(|| self.mask() + 1)
    }

    /// One past its last dword.
    pub(super) const fn end(self) -> u16 {
        self.data() + if self.masks { 3 } else { 1 }
    }

    /// Whether the guest uses it, as its first dword says.
    pub(super) const fn enabled(control: u32) -> bool {
        control & Self::ENABLE != 0
    }

    /// Vectors the guest allocated, at most those there are: a power of two.
    pub(super) const fn vectors(control: u32) -> u32 {
        let (can, has) = (control >> 17 & 7, (control & Self::ENABLED_VECTORS) >> 20);
        1 << if has < can { has } else { can }
    }
}

/// MSI-X: where its registers, its table and its pending bits are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct MsixPlace {
    /// Dword of the capability's start.
    pub(super) dword: u16,
    /// Vectors, 1 to 2,048.
    pub(super) vectors: u16,
    /// BAR and first byte of the table.
    pub(super) table: (u8, u64),
    /// BAR and first byte of the pending bits.
    pub(super) pending: (u8, u64),
}

impl MsixPlace {
    /// Bytes of the table.
    pub(super) const fn table_len(self) -> u64 {
        self.vectors as u64 * 16
    }

    /// Bytes of the pending bits.
    pub(super) const fn pending_len(self) -> u64 {
        (self.vectors as u64).div_ceil(64) * 8
    }
}

/// What the guest gets to see.
pub(super) struct Survey {
    pub(super) table: ConfigTable,
    /// Dword of power management's control register.
    pub(super) power: Option<u16>,
    /// Dword of Device Control.
    pub(super) device_control: Option<u16>,
    pub(super) msi: Option<MsiPlace>,
    pub(super) msix: Option<MsixPlace>,
}

/// A capability that was found.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Found {
    offset: u16,
    id: u16,
    /// There was one before it in the list.
    again: bool,
}

/// Decide what the guest sees of the function that `image` shows.
pub(super) fn survey(image: &Image, given: &Given) -> Survey {
    let mut survey = Survey {
        table: ConfigTable::new(),
        power: None,
        device_control: None,
        msi: None,
        msix: None,
    };
    survey.header(given);
    let standard = standard_capabilities(image);
    for dword in HEADER / 4..EXTENDED / 4 {
        survey.table.set(dword, Dword::fixed(0).passing(u32::MAX));
    }
    let mut visible = Vec::new();
    for (at, found) in standard.iter().enumerate() {
        // Each ends where the next begins. Hidden ones are blank up to there, since their length is unknown.
        let next = standard.get(at + 1).map_or(EXTENDED, |next| next.offset);
        for dword in found.offset / 4..next / 4 {
            survey.table.set(dword, Dword::fixed(0));
        }
        let room = next - found.offset;
        let counts = !found.again || found.id == VENDOR_SPECIFIC;
        if counts && survey.standard(image, *found, room, given) {
            visible.push(*found);
        }
    }
    survey.link_standard(&visible);
    if survey.device_control.is_some() {
        survey.extended(image);
    }
    survey
}

/// The standard capabilities, ascending by offset, none twice.
fn standard_capabilities(image: &Image) -> Vec<Found> {
    let mut found: Vec<Found> = Vec::new();
    if image.dword(4) & STATUS_CAPABILITIES == 0 {
        return found;
    }
    let mut offset = u16::from(image.byte(0x34) & !3);
    while offset >= HEADER && found.len() < MOST_STANDARD && found.iter().all(|other| other.offset != offset)
    {
        let id = image.byte(offset).into();
        let again = found.iter().any(|other| other.id == id);
        found.push(Found { offset, id, again });
        offset = u16::from(image.byte(offset + 1) & !3);
    }
    found.sort_by_key(|found| found.offset);
    found
}

/// The extended capabilities, ascending by offset, none twice.
fn extended_capabilities(image: &Image) -> Vec<Found> {
    let mut found: Vec<Found> = Vec::new();
    let mut offset = EXTENDED;
    while offset >= EXTENDED
        && found.len() < MOST_EXTENDED
        && found.iter().all(|other| other.offset != offset)
        && !matches!(image.dword(offset), 0 | u32::MAX)
    {
        let header = image.dword(offset);
        let [low, high, ..] = header.to_le_bytes();
        let id = u16::from_le_bytes([low, high]);
        let again = found.iter().any(|other| other.id == id);
        found.push(Found { offset, id, again });
        offset = u16::try_from(header >> 20).expect("twelve bits") & !3;
    }
    found.sort_by_key(|found| found.offset);
    found
}

const POWER_MANAGEMENT: u16 = 0x01;
const VITAL_PRODUCT_DATA: u16 = 0x03;
const MSI: u16 = 0x05;
const VENDOR_SPECIFIC: u16 = 0x09;
const EXPRESS: u16 = 0x10;
const MSIX: u16 = 0x11;
const SERIAL_NUMBER: u16 = 0x03;
const EXTENDED_VENDOR_SPECIFIC: u16 = 0x0b;

impl Survey {
    fn header(&mut self, given: &Given) {
        let identity = &given.identity;
        let pair = |low: u16, high: u16| u32::from(low) | u32::from(high) << 16;
        let writable = Command::BUS_MASTER
            | Command::PARITY_ERROR_RESPONSE
            | Command::SERR
            | Command::INTX_DISABLE
            | given.decodes;
        let pin = given.pin.map_or(0, |pin| (pin as u32) << 8);
        let registers = [
            (0, Dword::fixed(pair(identity.vendor, identity.device))),
            (
                COMMAND,
                Dword::writable(0, writable.bits().into()).passing(STATUS_INTERRUPT),
            ),
            (
                2,
                Dword::fixed(u32::from(identity.revision) | identity.class << 8),
            ),
            (3, Dword::writable(0, 0xff)),
            (
                11,
                Dword::fixed(pair(identity.subsystem_vendor, identity.subsystem)),
            ),
            (15, Dword::writable(pin, 0xff)),
        ];
        for (dword, register) in registers {
            self.table.set(dword, register);
        }
    }

    /// Make the capability `found`, which has `room` bytes, what the guest sees of it; `false` to hide it.
    fn standard(&mut self, image: &Image, found: Found, room: u16, given: &Given) -> bool {
        let dword = found.offset / 4;
        let passed = |survey: &mut Self, len: u16| {
            for at in dword..dword + len.min(room) / 4 {
                let own = if at == dword { 0xffff_0000 } else { u32::MAX };
                let register = Dword::fixed(0).passing(own).forwarding(own);
                survey.table.set(at, register);
            }
            true
        };
        match found.id {
            POWER_MANAGEMENT if room >= 8 => {
                // Version, and whether the driver has to initialise it; no PME, neither D1 nor D2.
                self.table
                    .set(dword, Dword::fixed(image.dword(found.offset) & 0x0027_0000));
                self.table
                    .set(dword + 1, Dword::writable(NO_SOFT_RESET, POWER_STATE));
                self.power = Some(dword + 1);
                true
            }
            MSI => self.message_signalled(image, found, room, given),
            MSIX if room >= 12 => self.table_signalled(image, found, given),
            EXPRESS => self.express(image, found, room, given),
            VITAL_PRODUCT_DATA => passed(self, 8),
            VENDOR_SPECIFIC => passed(self, u16::from(image.byte(found.offset + 2)).max(4)),
            _ => false,
        }
    }

    fn message_signalled(&mut self, image: &Image, found: Found, room: u16, given: &Given) -> bool {
        const ADDRESS_64: u32 = 1 << 23;
        const MASKS: u32 = 1 << 24;
        let control = image.upper_half(found.offset);
        let place = MsiPlace {
            dword: found.offset / 4,
            wide: control & ADDRESS_64 != 0,
            masks: control & MASKS != 0,
        };
        let last = given.msi.checked_ilog2();
        let (Some(last), true) = (last, (place.end() - place.dword) * 4 <= room) else {
            return false;
        };
        let vectors = (control >> 17 & 7).min(last).min(5);
        let first = control & (ADDRESS_64 | MASKS) | vectors << 17;
        let changes = MsiPlace::ENABLE | MsiPlace::ENABLED_VECTORS;
        self.table.set(place.dword, Dword::writable(first, changes));
        self.table.set(place.dword + 1, Dword::writable(0, !3));
        if place.wide {
            self.table.set(place.dword + 2, Dword::writable(0, u32::MAX));
        }
        self.table.set(place.data(), Dword::writable(0, 0xffff));
        if place.masks {
            let bits = u32::MAX >> (32 - (1 << vectors));
            self.table.set(place.mask(), Dword::writable(0, bits));
        }
        if let Some(pending) = place.pending() {
            // What masked vectors owe is asked for at each read.
            self.table.set(pending, Dword::fixed(0));
        }
        self.msi = Some(place);
        true
    }

    fn table_signalled(&mut self, image: &Image, found: Found, given: &Given) -> bool {
        let control = image.upper_half(found.offset);
        let has = (control >> 16 & 0x7ff) + 1;
        let Ok(vectors @ 1..) = u16::try_from(has.min(given.msix)) else {
            return false;
        };
        let place_of = |byte: u16| {
            let register = image.dword(byte);
            let [low, ..] = register.to_le_bytes();
            (low & 7, u64::from(register & !7))
        };
        let place = MsixPlace {
            dword: found.offset / 4,
            vectors,
            table: place_of(found.offset + 4),
            pending: place_of(found.offset + 8),
        };
        let inside = |(bar, start): (u8, u64), len: u64| {
            given
                .bars
                .get(usize::from(bar))
                .is_some_and(|size| start + len <= *size)
        };
        let apart = place.table.0 != place.pending.0
            || place.table.1 + place.table_len() <= place.pending.1
            || place.pending.1 + place.pending_len() <= place.table.1;
        if !apart || !inside(place.table, place.table_len()) || !inside(place.pending, place.pending_len()) {
            tracing::warn!(
                ?place,
                "the function's MSI-X structures are not in its BARs; MSI-X is hidden"
            );
            return false;
        }
        let first = u32::from(vectors - 1) << 16;
        self.table.set(place.dword, Dword::writable(first, 0xc000_0000));
        for byte in [4, 8] {
            let register = Dword::fixed(image.dword(found.offset + byte));
            self.table.set(place.dword + byte / 4, register);
        }
        self.msix = Some(place);
        true
    }

    fn express(&mut self, image: &Image, found: Found, room: u16, given: &Given) -> bool {
        const SECOND_VERSION_LEN: u16 = 0x3c;
        const FIRST_VERSION_LEN: u16 = 0x14;
        const TYPE: u32 = 0xf << 20;
        const LEGACY: u32 = 1 << 20;
        const INTEGRATED: u32 = 9 << 20;
        const FLR: u32 = 1 << 28;
        const TRANSACTIONS_PENDING: u32 = 1 << 21;
        /// All of Device Control but the bit that resets.
        const CONTROL: u32 = 0x7fff;
        /// Relaxed ordering, extended tags, no snoop, read request size.
        const CONTROL_HEARD: u32 = 0x7910;
        /// Relaxed ordering and no snoop on, requests of 512 bytes (PCI Express Base Specification 7.5.3.4).
        const CONTROL_RESET: u32 = 0x2810;
        /// ASPM, read completion boundary, common clock, extended synch.
        const LINK_CONTROL: u32 = 0xcb;
        const LINK_STATUS: u32 = 0xffff_0000;
        /// Completion timeouts, and the format field's width: nothing that needs a root complex that takes part.
        const CAPABILITIES_2: u32 = 0x0010_001f;
        const COMPLETION_TIMEOUT: u32 = 0x1f;
        if room < FIRST_VERSION_LEN {
            return false;
        }
        let (at, dword) = (found.offset, found.offset / 4);
        let second = image.upper_half(at) >> 16 & 0xf >= 2 && room >= SECOND_VERSION_LEN;
        let version = if second { 2 << 16 } else { 1 << 16 };
        let legacy = image.dword(at) & TYPE == LEGACY;
        let kind = match (given.on_root_bus, legacy) {
            (true, _) => INTEGRATED,
            (false, true) => LEGACY,
            (false, false) => 0,
        };
        self.table.set(dword, Dword::fixed(version | kind));
        let capabilities = image.dword(at + 4) & !FLR | if given.resets { FLR } else { 0 };
        self.table.set(dword + 1, Dword::fixed(capabilities));
        let control = Dword::writable(CONTROL_RESET, CONTROL)
            .passing(TRANSACTIONS_PENDING)
            .forwarding(CONTROL_HEARD);
        self.table.set(dword + 2, control);
        self.device_control = Some(dword + 2);
        if !given.on_root_bus {
            self.table.set(dword + 3, Dword::fixed(image.dword(at + 0xc)));
            let link = Dword::writable(0, LINK_CONTROL).passing(LINK_STATUS);
            self.table.set(dword + 4, link);
        }
        if second {
            let capabilities = image.dword(at + 0x24) & CAPABILITIES_2;
            self.table.set(dword + 9, Dword::fixed(capabilities));
            self.table.set(dword + 10, Dword::writable(0, COMPLETION_TIMEOUT));
            if !given.on_root_bus {
                self.table.set(dword + 11, Dword::fixed(image.dword(at + 0x2c)));
                // Target link speed.
                self.table
                    .set(dword + 12, Dword::fixed(image.dword(at + 0x30) & 0xf));
            }
        }
        true
    }

    /// The list of those that are left, and whether there is one.
    fn link_standard(&mut self, visible: &[Found]) {
        let offset = |at: usize| visible.get(at).map_or(0, |found| u32::from(found.offset));
        for (at, found) in visible.iter().enumerate() {
            let header = u32::from(found.id) | offset(at + 1) << 8;
            self.table.head(found.offset / 4, 0xffff, header);
        }
        self.table.set(0x34 / 4, Dword::fixed(offset(0)));
        if !visible.is_empty() {
            self.table.head(COMMAND, STATUS_CAPABILITIES, STATUS_CAPABILITIES);
        }
    }

    /// What is seen of extended configuration space, linked.
    fn extended(&mut self, image: &Image) {
        const SERIAL_NUMBER_LEN: u16 = 12;
        let all = extended_capabilities(image);
        let mut visible = Vec::new();
        for (at, found) in all.iter().enumerate() {
            let next = all.get(at + 1).map_or(CONFIG_DWORDS * 4, |next| next.offset);
            let room = next - found.offset;
            let (len, heard) = match found.id {
                SERIAL_NUMBER => (SERIAL_NUMBER_LEN, 0),
                EXTENDED_VENDOR_SPECIFIC => {
                    let said = image.dword(found.offset.saturating_add(4)) >> 20;
                    (u16::try_from(said).expect("twelve bits"), u32::MAX)
                }
                _ => continue,
            };
            if !(8..=room).contains(&len) {
                continue;
            }
            for dword in found.offset / 4 + 1..(found.offset + len) / 4 {
                let register = Dword::fixed(0).passing(u32::MAX).forwarding(heard);
                self.table.set(dword, register);
            }
            visible.push((*found, image.dword(found.offset) & 0xf_0000));
        }
        let offset = |at: usize| {
            visible
                .get(at)
                .map_or(0, |(found, _)| u32::from(found.offset) << 20)
        };
        for (at, (found, version)) in visible.iter().enumerate() {
            let header = u32::from(found.id) | version | offset(at + 1);
            self.table.set(found.offset / 4, Dword::fixed(header));
        }
        // The list begins at 0x100, with a capability that says nothing where the first one is hidden.
        if visible.first().is_some_and(|(first, _)| first.offset != EXTENDED) {
            self.table.set(EXTENDED / 4, Dword::fixed(offset(0)));
        }
    }
}

/// PowerState of the power management control register: D0 is 0.
pub(super) const POWER_STATE: u32 = 0x3;
/// D3hot.
pub(super) const D3_HOT: u32 = 0x3;
/// Going from D3hot to D0 keeps every register: the device never left D0.
const NO_SOFT_RESET: u32 = 1 << 3;
/// Initiate Function Level Reset, of Device Control.
pub(super) const INITIATE_FLR: u32 = 1 << 15;

#[cfg(test)]
mod tests;
