//! Delivery: routes, what is sent while they change, and accesses of every width.

use super::*;
use crate::pci::testing::Messages;

const ENABLE: DwordWrite = DwordWrite::whole(1 << 31);
const TABLE: u32 = 0x1000;

fn message(vector: u64) -> MsiMessage {
    MsiMessage {
        address: 0xfee0_0000 | vector << 12,
        data: 0x40,
    }
}

/// Three vectors at 1000h, pending bits at 1800h, in BAR 2.
fn parts() -> (Arc<Msix>, Box<dyn Capability>, Arc<Messages>) {
    let messages = Messages::new();
    let msix = Msix::new(MsixLayout::new(2, TABLE, 3), messages.port());
    let capability = msix.capability();
    (msix, capability, messages)
}

fn switch(msix: &Msix, capability: &mut Box<dyn Capability>, control: DwordWrite) {
    assert_eq!(capability.write(0, control), ConfigEffect::INTERRUPTS);
    msix.refresh();
}

fn program(msix: &Msix, vector: u64, message: MsiMessage) {
    let at = u64::from(TABLE) + vector * 16;
    assert!(msix.bar_write(2, at, &message.address.to_le_bytes()));
    assert!(msix.bar_write(2, at + 8, &message.data.to_le_bytes()));
}

fn mask(msix: &Msix, vector: u64, masked: bool) {
    assert!(msix.bar_write(
        2,
        u64::from(TABLE) + vector * 16 + 12,
        &u32::from(masked).to_le_bytes()
    ));
}

#[test]
fn a_vector_that_may_send_goes_by_its_route() {
    let (msix, mut capability, messages) = parts();
    switch(&msix, &mut capability, ENABLE);
    program(&msix, 1, message(1));
    assert!(messages.routes().is_empty());
    mask(&msix, 1, false);
    msix.signal(1);
    let routes = messages.routes();
    assert_eq!(
        (routes.len(), routes[0].signals(), routes[0].history()),
        (1, 1, vec![Some(message(1))])
    );
    assert_eq!(messages.take(), []);
}

#[test]
fn masking_and_unmasking_without_a_change_costs_no_request() {
    let (msix, mut capability, messages) = parts();
    switch(&msix, &mut capability, ENABLE);
    program(&msix, 0, message(1));
    mask(&msix, 0, false);
    mask(&msix, 0, true);
    mask(&msix, 0, false);
    assert_eq!(messages.routes()[0].history().len(), 1);
    mask(&msix, 0, true);
    program(&msix, 0, message(2));
    mask(&msix, 0, false);
    assert_eq!(
        messages.routes()[0].history(),
        [Some(message(1)), Some(message(2))]
    );
}

#[test]
fn what_was_raised_while_masked_is_sent_once_to_the_new_address() {
    let (msix, mut capability, messages) = parts();
    switch(&msix, &mut capability, ENABLE);
    program(&msix, 0, message(1));
    msix.signal(0);
    msix.signal(0);
    let mut pending = [0; 8];
    assert!(msix.bar_read(2, 0x1800, &mut pending));
    assert_eq!(u64::from_le_bytes(pending), 1);
    mask(&msix, 0, false);
    assert_eq!(messages.routes()[0].signals(), 1);
    assert!(msix.bar_read(2, 0x1800, &mut pending));
    assert_eq!(u64::from_le_bytes(pending), 0);
}

#[test]
fn the_function_mask_holds_everything_back() {
    let (msix, mut capability, messages) = parts();
    switch(&msix, &mut capability, DwordWrite::whole(3 << 30));
    (0..3).for_each(|vector| {
        program(&msix, vector, message(vector));
        mask(&msix, vector, false);
    });
    (0..3).for_each(|vector| msix.signal(vector));
    assert!(messages.routes().is_empty());
    switch(&msix, &mut capability, ENABLE);
    assert_eq!(
        messages.routes().iter().map(|route| route.signals()).sum::<u64>(),
        3
    );
}

#[test]
fn a_host_without_routes_gets_messages_one_by_one() {
    let (msix, mut capability, messages) = parts();
    messages.refuse(true);
    switch(&msix, &mut capability, ENABLE);
    program(&msix, 0, message(1));
    mask(&msix, 0, false);
    msix.signal(0);
    assert_eq!(messages.take(), [message(1)]);
}

#[test]
fn a_route_that_could_not_be_changed_is_not_used_with_the_old_message() {
    let (msix, mut capability, messages) = parts();
    switch(&msix, &mut capability, ENABLE);
    program(&msix, 0, message(1));
    mask(&msix, 0, false);
    messages.refuse(true);
    program(&msix, 0, message(2));
    msix.signal(0);
    assert_eq!(
        (messages.routes()[0].signals(), messages.take()),
        (0, vec![message(2)])
    );
    messages.refuse(false);
    msix.refresh();
    msix.signal(0);
    assert_eq!(messages.routes()[0].signals(), 1);
}

#[test]
fn without_bus_master_neither_way_carries_anything() {
    let (msix, mut capability, messages) = parts();
    switch(&msix, &mut capability, ENABLE);
    mask(&msix, 0, false);
    messages.requester().set_bus_master(false);
    msix.signal(0);
    assert_eq!((messages.routes()[0].signals(), messages.take()), (0, vec![]));
}

#[test]
fn reset_gives_routes_back_and_masks() {
    let (msix, mut capability, messages) = parts();
    switch(&msix, &mut capability, ENABLE);
    program(&msix, 0, message(1));
    mask(&msix, 0, false);
    capability.reset();
    assert_eq!(messages.routes()[0].history(), [Some(message(1)), None]);
    msix.signal(0);
    assert_eq!((messages.routes()[0].signals(), messages.take()), (0, vec![]));
    assert_eq!(capability.read(0), 0x2_0000);
}

#[test]
fn class_4_every_width_at_every_offset_reads_the_same_bytes() {
    let (msix, _capability, _messages) = parts();
    (0..3).for_each(|vector| {
        program(
            &msix,
            vector,
            MsiMessage {
                address: u64::MAX,
                data: 0x1122_3344,
            },
        )
    });
    let byte = |at: u64| {
        let mut data = [0];
        msix.bar_read(2, at, &mut data);
        data[0]
    };
    let offsets = (0xff0..0x1040).chain(0x17f0..0x1820).chain(0x1ff0..0x2000);
    for (at, len) in offsets.flat_map(|at| (1..=8).map(move |len| (at, len))) {
        let mut data = vec![0; len];
        msix.bar_read(2, at, &mut data);
        let expected: Vec<u8> = (at..at + len as u64).map(byte).collect();
        assert_eq!(data, expected, "{at:#x} {len}");
    }
}

#[test]
fn class_4_every_width_at_every_offset_may_be_written() {
    let (msix, mut capability, _messages) = parts();
    switch(&msix, &mut capability, ENABLE);
    let offsets = (0xff0..0x1040)
        .chain(0x17f0..0x1820)
        .chain([0x1fff, u64::MAX - 8, u64::MAX]);
    for (at, len) in offsets.flat_map(|at| (1..=8).map(move |len| (at, len))) {
        msix.bar_write(2, at, &vec![0xff; len]);
    }
    let mut entry = [0; 16];
    assert!(msix.bar_read(2, 0x1020, &mut entry));
    let expected = [
        0xfc, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 1, 0, 0, 0,
    ];
    assert_eq!(entry, expected);
}

#[test]
fn class_5_writes_to_the_pending_bits_are_ignored() {
    let (msix, mut capability, _messages) = parts();
    switch(&msix, &mut capability, ENABLE);
    assert!(msix.bar_write(2, 0x1800, &[0xff; 8]));
    let mut pending = [0xee; 8];
    assert!(msix.bar_read(2, 0x1800, &mut pending));
    assert_eq!(pending, [0; 8]);
}

#[test]
fn what_is_beside_both_belongs_to_the_device() {
    let (msix, _capability, _messages) = parts();
    let mut data = [0xee; 4];
    for (bar, at) in [
        (2, 0xffc),
        (2, 0x1030),
        (2, 0x17fc),
        (2, 0x1808),
        (2, u64::MAX - 3),
        (1, 0x1000),
    ] {
        assert!(!msix.bar_read(bar, at, &mut data), "{bar} {at:#x}");
        assert!(!msix.bar_write(bar, at, &data), "{bar} {at:#x}");
    }
    assert_eq!(data, [0xee; 4]);
}

#[test]
fn class_4_a_signal_of_a_vector_that_is_not_there_is_dropped() {
    let (msix, mut capability, messages) = parts();
    switch(&msix, &mut capability, ENABLE);
    [3, 0xfffe, 0xffff]
        .into_iter()
        .for_each(|vector| msix.signal(vector));
    assert_eq!((messages.take(), messages.routes().len()), (vec![], 0));
}

#[test]
fn the_capability_points_at_table_and_pending_bits() {
    let (_msix, mut capability, _messages) = parts();
    (1..4).for_each(|dword| {
        let _ = capability.write(dword, DwordWrite::whole(u32::MAX));
    });
    let values: Vec<u32> = (0..4).map(|dword| capability.read(dword)).collect();
    assert_eq!(values, [0x2_0000, 0x1002, 0x1802, 0]);
}

#[test]
fn layouts_hold_the_largest_table() {
    let layout = MsixLayout::new(0, 0, 2048);
    assert_eq!(layout.end(), 0x8000 + 2048 / 8);
}
