//! Interrupts that are not fixed ones to one processor, from the device to what the kernel is told.

use super::*;

const LOGICAL: u64 = 1 << 6;
const ARBITRATED: u64 = 1 << 2;
/// A message with delivery mode NMI.
const NMI: MsiMessage = MsiMessage {
    address: 0xfee0_3000,
    data: 4 << 8,
};
/// NMIPass, in the third quadword of the device's entry.
const NMI_PASS: u64 = 1 << 58;

/// A route of the device's, set to `message`.
fn route(rig: &Rig, message: MsiMessage) -> Box<dyn crate::platform::msi::MsiRoute> {
    let route = RemappingSink::new(rig.unit.clone()).route(&requester());
    let route = route.expect("a route");
    route.set(Some(message)).expect("the host takes it");
    route
}

#[test]
fn a_logical_destination_reaches_the_kernel_as_one() {
    for (bits, destination, mode) in [
        (LOGICAL, 0x3, 0),
        (LOGICAL | ARBITRATED, 0x12_0003, 1 << 8),
        (ARBITRATED, 0x0304_0506, 1 << 8),
        (LOGICAL, u32::MAX, 0),
    ] {
        let rig = Rig::running();
        rig.cover();
        rig.remap_as(5, bits, destination, 0x77);
        let expected = MsiMessage::remapped(destination, bits & LOGICAL != 0, 0x77 | mode);
        assert_eq!(expected.address >> 2 & 1 == 1, bits & LOGICAL != 0);
        let sink = RemappingSink::new(rig.unit.clone());
        sink.signal(&requester(), indexed(5));
        assert_eq!(rig.processors.take(), [expected]);
        let route = route(&rig, indexed(5));
        assert_eq!(rig.processors.routes()[0].history(), [Some(expected)]);
        assert!(route.carries());
        // The other mode from the next invalidation on.
        rig.remap_as(5, bits ^ LOGICAL, destination, 0x77);
        rig.invalidate_interrupts();
        let other = MsiMessage::remapped(destination, bits & LOGICAL == 0, 0x77 | mode);
        assert_eq!(rig.processors.routes()[0].history().last(), Some(&Some(other)));
    }
}

#[test]
fn an_nmi_reaches_the_kernel_as_it_is_where_the_entry_lets_it_pass() {
    let rig = Rig::running();
    rig.cover();
    let sink = RemappingSink::new(rig.unit.clone());
    let route = route(&rig, NMI);
    assert!(!route.carries());
    assert_eq!(rig.processors.routes()[0].history(), [None]);
    sink.signal(&requester(), NMI);
    assert_eq!((rig.processors.take().len(), rig.events()), (0, vec![2]));

    let entry = rig.interrupt_half();
    rig.set_interrupt_half(entry | NMI_PASS);
    assert_eq!(rig.processors.routes()[0].history().last(), Some(&Some(NMI)));
    assert!(route.carries());
    sink.signal(&requester(), NMI);
    assert_eq!(rig.processors.take(), [NMI]);

    rig.set_interrupt_half(entry);
    assert_eq!(rig.processors.routes()[0].history().last(), Some(&None));
    assert!(!route.carries());
    assert_eq!(rig.events(), [2], "a route that goes nowhere is no interrupt");
}
