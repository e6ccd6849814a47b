//! What the unit keeps for its guests beside their maps: the command-buffer dirty status (V1 to V3), and where their
//! interrupts go (V4 to V7).

use ravelin::iommu::amd::remap::Delivery;
use ravelin::iommu::amd::spec::dte::{Dte, Interrupt};
use ravelin::iommu::amd::spec::viommu::{COMMAND_DIRTY, command_dirty};
use ravelin::iommu::amd::viommu::{GuestInterrupt, GuestLog, Posted};

use crate::driver::{HOLE, INVALIDATE_ALL, command, host_dte, invalidate_device, own, reg, wait};
use crate::guest::{DIRTY_AT, FLAG, Guest, Machine, RING, control, page};
use crate::guests::host_errors;

/// First level of the extended interrupt remapping table, its second levels for event and PPR logs, neither of which need
/// be at a page, and a virtual APIC.
const INTERRUPTS: u64 = 0x190_0000;
const EVENT_ENTRIES: u64 = 0x190_2040;
const PPR_ENTRIES: u64 = 0x190_3000;
const APIC: u64 = 0x190_4000;

/// RemapEn, a destination and a vector.
const MESSAGE: [u64; 2] = [0x0000_0000_0203_0401, 0x0100_0000_0000_0051];
/// The same for a virtual APIC: tag 77h, running.
const POSTED: [u64; 2] = [0x0000_0077_0203_04c1, 0x0100_0000_0000_0051 | APIC];

/// Machines whose guests' interrupts have a table.
fn with_interrupts() -> Machine {
    let machine = Machine::running();
    // With a length, as drivers have it.
    machine.host.put(INTERRUPTS, EVENT_ENTRIES | 0xa << 2 | 1);
    machine.host.put(INTERRUPTS + 0x100 * 8, PPR_ENTRIES | 1);
    own_entry(&machine, |interrupt| interrupt);
    machine
}

/// Give the unit's own function an entry with the table, as `change` has it.
fn own_entry(machine: &Machine, change: impl FnOnce(Interrupt) -> Interrupt) {
    let interrupt = Interrupt::new()
        .with_iv(true)
        .with_int_ctl(2)
        .with_root(INTERRUPTS >> 6);
    let dte = Dte {
        interrupt: change(interrupt),
        ..host_dte(machine.private, 4, 1)
    };
    machine.host.set_dte(own(), dte);
    machine.host.submit(&[invalidate_device(own())]);
}

/// Write the entry of `guest` in a second level.
fn set_entry(machine: &Machine, table: u64, guest: &Guest, entry: [u64; 2]) {
    for (at, word) in (0..).step_by(8).zip(entry) {
        machine.host.put(table + u64::from(guest.id) * 16 + at, word);
    }
}

/// Send an interrupt of `guest`.
fn send(machine: &Machine, guest: &Guest, log: GuestLog) -> Option<GuestInterrupt> {
    let (sent, effects) = machine.host.unit.remap_guest_interrupt(guest.id, log);
    machine.host.carry_out(effects);
    sent
}

/// Whose dirty bits stand, of both guests.
fn dirty(machine: &Machine) -> [bool; 2] {
    [&machine.a, &machine.b].map(|guest| {
        let (at, bit) = command_dirty(guest.id);
        machine.host.get(DIRTY_AT + (at - COMMAND_DIRTY)) & bit != 0
    })
}

#[test]
fn v1_the_bit_of_a_guest_stands_while_its_commands_wait() {
    let machine = Machine::running();
    assert_eq!(dirty(&machine), [false, false]);
    // One is carried out at a time.
    machine.submit(&machine.a, &[INVALIDATE_ALL; 3]);
    assert_eq!(dirty(&machine), [true, false]);
    machine.flush(&machine.b, &[]);
    assert_eq!(dirty(&machine), [true, false], "not the other's");
    machine.submit(&machine.b, &[INVALIDATE_ALL; 3]);
    assert_eq!(dirty(&machine), [true, true]);
    machine.flush(&machine.a, &[]);
    assert_eq!(dirty(&machine), [false, true]);
    // A command that means nothing waits until the ring is on again.
    machine.submit(&machine.a, &[0]);
    assert_eq!(dirty(&machine), [true, true]);
}

#[test]
fn v2_a_dirty_status_that_does_not_answer_stops_the_guest_and_is_told_to_the_host() {
    let mut machine = Machine::running();
    machine.host.map(machine.private, 4, COMMAND_DIRTY, 1, 0);
    machine.submit(&machine.a, &[wait(FLAG, 7)]);
    let errors = host_errors(&machine);
    assert!(!errors.is_empty(), "the host was told");
    assert!(errors.iter().all(|error| *error == (0xc, 4)), "{errors:?}");
    assert_eq!(machine.read(&machine.a, page::STATUS) & 0x10, 0, "stopped");
    assert_eq!(machine.get(&machine.a, FLAG), 0);
    assert_eq!(machine.events(&machine.a)[0][1], 0x6400_0000);
    // Without a doorbell nobody looks.
    assert_eq!(machine.read(&machine.b, page::STATUS) & 0x10, 0x10);
}

#[test]
fn v3_the_bit_goes_with_the_ring_and_with_a_reset_of_the_page() {
    let machine = Machine::running();
    for guest in [&machine.a, &machine.b] {
        machine.submit(guest, &[0]);
    }
    assert_eq!(dirty(&machine), [true, true]);
    machine.control(&machine.a, control::COMMAND, 0);
    assert_eq!(dirty(&machine), [false, true]);
    machine
        .host
        .submit(&[command(10, u32::from(machine.b.id), 0, 0, 0)]);
    assert_eq!(dirty(&machine), [false, false]);
    // On again, the command of before stops the ring once more.
    machine.control(&machine.a, control::COMMAND, RING | control::ON);
    assert_eq!(dirty(&machine), [true, false]);
}

#[test]
fn v4_an_interrupt_of_a_guest_goes_where_the_entry_of_guest_and_log_says() {
    let machine = with_interrupts();
    set_entry(&machine, EVENT_ENTRIES, &machine.a, MESSAGE);
    set_entry(&machine, PPR_ENTRIES, &machine.b, [0x0000_0000_0000_0245, 0x61]);
    let message = |destination, logical, arbitrated, vector| {
        Some(GuestInterrupt::Message(Delivery {
            destination,
            logical,
            arbitrated,
            vector,
            level: false,
            asserted: false,
        }))
    };
    let sent = send(&machine, &machine.a, GuestLog::Event);
    assert_eq!(sent, message(0x0102_0304, false, false, 0x51));
    let sent = send(&machine, &machine.b, GuestLog::Ppr);
    assert_eq!(sent, message(2, true, true, 0x61));
    assert_eq!(send(&machine, &machine.a, GuestLog::Ppr), None);
    assert_eq!(send(&machine, &machine.b, GuestLog::Event), None);
    assert_eq!(host_errors(&machine), []);
}

#[test]
fn v5_an_interrupt_is_posted_to_the_virtual_apic_that_the_entry_names() {
    let machine = with_interrupts();
    set_entry(&machine, EVENT_ENTRIES, &machine.a, POSTED);
    // Another one waits there.
    machine.host.put(APIC + 0x220, 1);
    let posted = GuestInterrupt::Posted(Posted {
        tag: 0x77,
        running: true,
        destination: 0x0102_0304,
        vector: 0x51,
    });
    assert_eq!(send(&machine, &machine.a, GuestLog::Event), Some(posted));
    assert_eq!(machine.host.get(APIC + 0x220), 1 | 1 << 0x11);
    let around = [APIC + 0x210, APIC + 0x230, APIC + 0x228, APIC];
    assert_eq!(around.map(|at| machine.host.get(at)), [0; 4]);
    // A processor that does not run is interrupted once it does.
    set_entry(
        &machine,
        EVENT_ENTRIES,
        &machine.a,
        [POSTED[0] & !0x40, POSTED[1]],
    );
    assert!(matches!(
        send(&machine, &machine.a, GuestLog::Event),
        Some(GuestInterrupt::Posted(Posted { running: false, .. }))
    ));
}

#[test]
fn v6_an_interrupt_without_an_entry_is_held_back() {
    let machine = with_interrupts();
    let send = || send(&machine, &machine.a, GuestLog::Event);
    // Off; vectors that no local APIC has; a type that is none.
    for entry in [
        [MESSAGE[0] & !1, MESSAGE[1]],
        [MESSAGE[0], 0x0f],
        [POSTED[0], APIC | 0x0f],
        [0x09, 0x51],
    ] {
        set_entry(&machine, EVENT_ENTRIES, &machine.a, entry);
        assert_eq!(send(), None, "{entry:x?}");
    }
    set_entry(&machine, EVENT_ENTRIES, &machine.a, MESSAGE);
    assert!(send().is_some());
    machine.host.put(INTERRUPTS, EVENT_ENTRIES);
    assert_eq!(send(), None, "there is no second level");
    machine.host.put(INTERRUPTS, EVENT_ENTRIES | 1);
    let entries: [fn(Interrupt) -> Interrupt; 3] = [
        |interrupt| interrupt.with_iv(false),
        |interrupt| interrupt.with_int_ctl(1),
        |interrupt| Interrupt::from_bits(interrupt.into_bits() | 1 << 52),
    ];
    for change in entries {
        own_entry(&machine, change);
        assert_eq!(send(), None);
    }
    assert_eq!(host_errors(&machine), []);
}

#[test]
fn v7_interrupt_tables_that_do_not_answer_are_told_to_the_host() {
    let machine = with_interrupts();
    let send = || send(&machine, &machine.a, GuestLog::Event);
    set_entry(&machine, EVENT_ENTRIES, &machine.a, [POSTED[0], HOLE | 0x51]);
    assert_eq!(send(), None);
    assert_eq!(host_errors(&machine), [(0xc, 4)], "the virtual APIC");
    machine.host.put(INTERRUPTS, HOLE | 1);
    assert_eq!(send(), None);
    assert_eq!(host_errors(&machine), [(0xc, 4)], "the second level");
    own_entry(&machine, |interrupt| interrupt.with_root(HOLE >> 6));
    assert_eq!(send(), None);
    assert_eq!(host_errors(&machine), [(0xc, 4)], "the first");
}

#[test]
fn resets_of_everybodys_page_count_for_every_guest() {
    let machine = Machine::running();
    for guest in 0x100..0x600 {
        let effects = machine
            .host
            .unit
            .vf_write(guest, page::EVENT_HEAD, &[0x10, 0, 0, 0]);
        machine.host.carry_out(effects);
    }
    let reset = command(10, 1 << 28, 0, 0, 0);
    let tail = machine.host.read(reg::COMMAND_TAIL);
    for (index, half) in (0..4).map(|index| (index, reset)) {
        let half = u64::try_from(half).expect("its upper half is 0");
        machine.host.put(crate::driver::RING + tail + index * 16, half);
        machine.host.put(crate::driver::RING + tail + index * 16 + 8, 0);
    }
    let rung = (tail + 4 * 16).to_le_bytes();
    let effects = machine.host.unit.mmio_write(reg::COMMAND_TAIL, &rung);
    assert!(effects.more_commands);
    assert_eq!(machine.host.read(reg::COMMAND_HEAD), tail + 16, "one at a time");
    machine.host.carry_out(effects);
    assert_eq!(machine.host.read(reg::COMMAND_HEAD), tail + 64);
}
