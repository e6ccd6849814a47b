//! FADT and FACS: the fixed hardware, which is little: two PM1a blocks, a reset register, no SMI, no
//! GPE block, no PM timer.
//!
//! ACPI specification 6.5, sections 5.2.9 and 5.2.10.

use acpi_tables::facs::FACS;
use acpi_tables::fadt::{FADTBuilder, Flags, PmProfile};
use acpi_tables::gas::{AccessSize, AddressSpace, GAS};

use super::board;
use super::{OEM_ID, OEM_REVISION, OEM_TABLE_ID, bytes_of};
use crate::platform::addr::Gpa;

/// IA-PC boot architecture flags (ACPI 6.5, table 5.11).
mod iapc {
    /// There are devices on an ISA bus that are not enumerable: the serial port and the clock.
    pub(super) const LEGACY_DEVICES: u16 = 1 << 0;
    /// Do not probe for VGA: there is none, and probing it costs exits.
    pub(super) const VGA_NOT_PRESENT: u16 = 1 << 2;
    /// Leave the power management of links alone: the links are not real.
    pub(super) const PCIE_ASPM_CONTROLS: u16 = 1 << 4;
}

/// The firmware control structure. Nothing wakes this machine, so its vectors stay zero.
pub(super) fn facs() -> Vec<u8> {
    bytes_of(&FACS::new())
}

/// The fixed description table for a DSDT and a FACS at these addresses.
///
/// There is no SMI command port, which says that the machine is always in ACPI mode.
pub(super) fn fadt(dsdt: Gpa, facs: Gpa) -> Vec<u8> {
    let mut fadt = FADTBuilder::new(OEM_ID, OEM_TABLE_ID, OEM_REVISION)
        .preferred_pm_profile(PmProfile::EnterpriseServer)
        .flag(Flags::Wbinvd)
        .flag(Flags::ProcC1)
        // Set means "not a fixed-hardware button"; the power button is one, hence its absence here.
        .flag(Flags::SlpButton)
        .flag(Flags::ResetRegSup);
    fadt.dsdt = u32::try_from(dsdt.0).unwrap_or(0).into();
    fadt.x_dsdt = dsdt.0.into();
    fadt.x_firmware_ctrl = facs.0.into();
    fadt.sci_int = u16::from(board::SCI_GSI).into();
    // Latencies above these limits say that there is neither C2 nor C3 (ACPI 6.5, table 5.9).
    fadt.p_lvl2_lat = 101.into();
    fadt.p_lvl3_lat = 1001.into();
    fadt.century = board::RTC_CENTURY;
    fadt.iapc_boot_arch = (iapc::LEGACY_DEVICES | iapc::VGA_NOT_PRESENT | iapc::PCIE_ASPM_CONTROLS).into();
    fadt.reset_reg = port(board::RESET_PORT, 8, AccessSize::ByteAccess);
    fadt.reset_value = board::RESET_VALUE;
    fadt.pm1a_evt_blk = u32::from(board::PM1A_EVENT_PORT).into();
    fadt.pm1_evt_len = 4;
    fadt.x_pm1a_evt_blk = port(board::PM1A_EVENT_PORT, 32, AccessSize::WordAccess);
    fadt.pm1a_cnt_blk = u32::from(board::PM1A_CONTROL_PORT).into();
    fadt.pm1_cnt_len = 2;
    fadt.x_pm1a_cnt_blk = port(board::PM1A_CONTROL_PORT, 16, AccessSize::WordAccess);
    fadt.hypervisor_vendor_identity = u64::from_le_bytes(OEM_TABLE_ID).into();
    bytes_of(&fadt.finalize())
}

fn port(at: u16, bits: u8, access: AccessSize) -> GAS {
    GAS::new(AddressSpace::SystemIo, bits, 0, access, u64::from(at))
}
