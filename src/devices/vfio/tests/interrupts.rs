//! Interrupts that are masked, remapped or refused.

use super::*;
use crate::iommu::emulated::RemappingSink;
use crate::iommu::emulated::testing::{Rig, requester};

/// What a driver behind a unit gives a vector: entry 5 of the device's remapping table.
const INDEXED: [u32; 4] = [0xfee0_0000, 0, 5, 0];

/// A function whose messages pass the unit of `rig`.
fn behind(rig: &Rig) -> Bench {
    let (messages, space, host) = (rig.processors.clone(), GuestSpace::new(), Host::new());
    let (wires, device) = (Arc::new(Wires::default()), Device::nic());
    let parts = VfioParts {
        msi: MsiPort::new(requester(), Arc::new(RemappingSink::new(rig.unit.clone()))),
        ..parts(device.clone(), (&messages, &space, &host, &wires))
    };
    let function = VfioFunction::new(parts).unwrap_or_else(|error| panic!("{error}"));
    device.told();
    Bench {
        device,
        messages,
        space,
        host,
        wires,
        function,
    }
}

#[test]
fn a_masked_vector_behind_a_unit_delivers_later_what_it_owes() {
    let rig = Rig::running();
    rig.cover();
    rig.remap(5, Some((1, 0x31)));
    let bench = behind(&rig);
    bench.enable_msix();
    bench.table(1, INDEXED);
    let route = rig.processors.routes().remove(0);
    let sent = Some(MsiMessage::remapped(1, false, 0x31));
    bench.table(1, [0xfee0_0000, 0, 5, 1]);
    assert!(bench.device.interrupt(Interrupt::Msix, 1));
    assert_eq!(bench.pending(), 2);
    bench.table(1, INDEXED);
    assert_eq!((bench.pending(), route.signals()), (0, 1));
    assert_eq!(route.history(), [sent, None, sent]);
}
