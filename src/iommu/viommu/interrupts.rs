//! Where the unit's own interrupts go: by x2APIC registers, or by the MSI capability of its function.

use super::asking::{Answer, Asking};
use super::counters::Count;
use super::host::{InterruptTarget, UnitInterrupt};
use crate::iommu::amd::registers::{MsiMirror, Registers};
use crate::iommu::amd::spec::registers::{Reg, XtInterrupt};

/// Local APICs take no lower one (Intel SDM volume 3, 12.5.2).
const LOWEST_VECTOR: u8 = 16;

/// What the MSI capability says.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub(super) struct MsiState {
    pub(super) message: MsiMirror,
    pub(super) masked: bool,
}

/// Targets, of [`UnitInterrupt::Event`] and [`UnitInterrupt::Ppr`].
pub(super) type Wanted = [Option<InterruptTarget>; 2];

const KINDS: [UnitInterrupt; 2] = [UnitInterrupt::Event, UnitInterrupt::Ppr];

/// Where `registers`, or while they leave it to that, `msi` sends interrupts. Both kinds are message 0 of the latter.
pub(super) fn wanted(registers: &Registers, msi: &MsiState) -> Wanted {
    if registers.control().int_cap_xt_en() {
        [Reg::XtEvent, Reg::XtPpr].map(|reg| by_register(XtInterrupt::from_bits(registers.read(reg))))
    } else {
        [by_message(msi); 2]
    }
}

/// The register's delivery mode, fixed or lowest priority, is not for hosts to keep: it goes as fixed.
fn by_register(register: XtInterrupt) -> Option<InterruptTarget> {
    (register.vector() >= LOWEST_VECTOR).then(|| InterruptTarget {
        destination: register.destination(),
        logical: register.logical(),
        vector: register.vector(),
    })
}

/// The processors a message goes to; `None` while it is off or masked, or where it is none that has a vector.
///
/// Destination bits 14:8 are in address bits 11:5 for a guest that was told so (KVM_FEATURE_MSI_EXT_DEST_ID), and bits
/// 31:8 in address bits 63:40.
fn by_message(msi: &MsiState) -> Option<InterruptTarget> {
    const ENABLE: u32 = 1 << 16;
    const WINDOW: u64 = 0xfee0_0000;
    const WINDOW_MASK: u64 = 0x0000_00ff_fff0_0000;
    /// Delivery modes 0 and 1 have a vector.
    const VECTORLESS: u32 = 0x6 << 8;
    let MsiMirror {
        header,
        address,
        data,
    } = msi.message;
    let [vector, ..] = data.to_le_bytes();
    let deliverable = header & ENABLE != 0
        && !msi.masked
        && address & WINDOW_MASK == WINDOW
        && data & VECTORLESS == 0
        && vector >= LOWEST_VECTOR;
    let [low, high] = [address & 0xffff_ffff, address >> 32];
    let destination = low >> 12 & 0xff | (low >> 5 & 0x7f) << 8 | high & 0xffff_ff00;
    deliverable.then(|| InterruptTarget {
        destination: u32::try_from(destination).expect("bits of a half"),
        logical: low & 4 != 0,
        vector,
    })
}

/// Where the host sends interrupts.
#[derive(Default)]
pub(super) struct Routes {
    set: Wanted,
    /// The operator knows that this host sends none.
    told: bool,
}

impl Routes {
    /// Have the host send interrupts where it is `wanted`. What it refuses, as a destination that no processor has, goes
    /// nowhere until this is called again: where it went before it is not wanted.
    pub(super) fn bring(&mut self, wanted: &Wanted, asking: &Asking) {
        for ((kind, wanted), set) in KINDS.into_iter().zip(wanted).zip(&mut self.set) {
            if set == wanted {
                continue;
            }
            let answer = asking.ask_if_supported("send the unit's interrupts elsewhere", |host| {
                host.route(asking.viommu, kind, *wanted)
            });
            match answer {
                Answer::Done => asking.counters.add(Count::Routes),
                Answer::Refused => {
                    let nowhere = "send the unit's interrupts nowhere; they go where they went";
                    if wanted.is_some()
                        && set.is_some()
                        && asking
                            .ask(nowhere, |host| host.route(asking.viommu, kind, None))
                            .is_ok()
                    {
                        asking.counters.add(Count::Routes);
                        *set = None;
                    }
                    continue;
                }
                Answer::Unsupported => {
                    // Once is enough.
                    if !std::mem::replace(&mut self.told, true) {
                        tracing::warn!(
                            iommu = asking.name,
                            "the host sends no interrupts of its units to guests: this one hears of events only when it looks"
                        );
                    }
                }
            }
            *set = *wanted;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn msi(address: u64, data: u32) -> MsiState {
        MsiState {
            message: MsiMirror {
                header: 1 << 16,
                address,
                data,
            },
            masked: false,
        }
    }

    fn target(destination: u32, logical: bool, vector: u8) -> Option<InterruptTarget> {
        Some(InterruptTarget {
            destination,
            logical,
            vector,
        })
    }

    #[test]
    fn a_message_names_its_processor_as_every_message_does() {
        assert_eq!(by_message(&msi(0xfee0_3000, 0x4041)), target(3, false, 0x41));
        assert_eq!(by_message(&msi(0xfeef_f004, 0x31)), target(0xff, true, 0x31));
        assert_eq!(by_message(&msi(0xfee0_3fe0, 0x31)), target(0x7f03, false, 0x31));
        assert_eq!(
            by_message(&msi(0xabcd_ef00_fee0_3000, 0x31)),
            target(0xabcd_ef03, false, 0x31)
        );
        // Lowest priority.
        assert_eq!(by_message(&msi(0xfee0_3000, 0x131)), target(3, false, 0x31));
    }

    #[test]
    fn a_message_that_reaches_no_local_apic_goes_nowhere() {
        for (address, data) in [
            (0xfee0_0000, 0x0f),
            (0xfee0_0000, 0x0),
            // SMI, NMI, INIT, ExtINT.
            (0xfee0_0000, 0x231),
            (0xfee0_0000, 0x431),
            (0xfee0_0000, 0x531),
            (0xfee0_0000, 0x731),
            (0xfed0_0000, 0x31),
            (0x1_fee0_0000, 0x31),
            (0, 0x31),
            (u64::MAX, u32::MAX),
        ] {
            assert_eq!(by_message(&msi(address, data)), None, "{address:#x} {data:#x}");
        }
        let mut off = msi(0xfee0_3000, 0x31);
        off.message.header = 0;
        assert_eq!(by_message(&off), None);
        let masked = MsiState {
            masked: true,
            ..msi(0xfee0_3000, 0x31)
        };
        assert_eq!(by_message(&masked), None);
    }

    #[test]
    fn a_register_without_a_vector_masks() {
        let register = XtInterrupt::new()
            .with_destination_23_0(0x12_3456)
            .with_destination_31_24(0x7f)
            .with_logical(true)
            .with_arbitrated(true);
        assert_eq!(by_register(register), None);
        assert_eq!(by_register(register.with_vector(15)), None);
        assert_eq!(
            by_register(register.with_vector(0x41)),
            target(0x7f12_3456, true, 0x41)
        );
    }
}
