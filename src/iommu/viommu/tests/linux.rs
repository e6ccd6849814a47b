//! What drivers do.

use std::sync::Arc;

use super::super::host::{InterruptTarget, Queue, QueueKind, UnitInterrupt};
use super::super::testing::{DEVICE_TABLE, FakeHost, LOG, RING, Reached, Rig, dte};
use crate::iommu::amd::features::Wanted;
use crate::iommu::amd::spec::dte::Dte;
use crate::pci::Function;
use crate::pci::access::DwordWrite;
use crate::pci::topology::Observer;
use crate::platform::addr::{Bdf, Gpa, Sbdf};
use crate::platform::bus::BusDevice;
use crate::platform::device_memory::DeviceMemory;

/// What a store to an entry set off.
fn tables(entry: [u64; 4]) -> Reached {
    Reached::Tables(Dte::from_quadwords(entry))
}

#[test]
fn a_unit_that_is_off_lets_everything_pass() {
    let rig = Rig::at_reset();
    rig.check();
    assert_eq!(
        rig.host.granted(),
        ["viommu", "pass 0", "pass 1", "pass 2"],
        "and no more is asked"
    );
    rig.write(0x00, 8, DEVICE_TABLE | 0x3f);
    rig.entry(0, dte(0x5000, 1));
    rig.check();
    assert!(rig.host.granted().is_empty() && rig.protection.watched().is_empty());
}

#[test]
fn linux_starts_and_every_function_is_blocked() {
    let rig = Rig::running();
    rig.check();
    assert!((0..3).all(|index| rig.host.place(index) == Reached::Nothing));
    assert_eq!(
        rig.host.queue(QueueKind::Command),
        Some(Queue {
            kind: QueueKind::Command,
            base: Gpa(RING),
            length: 9,
            interrupts: false
        })
    );
    let target = |destination, vector| {
        Some(InterruptTarget {
            destination,
            logical: false,
            vector,
        })
    };
    assert_eq!(rig.host.target(UnitInterrupt::Event), target(2, 0x31));
    assert_eq!(rig.host.target(UnitInterrupt::Ppr), target(2, 0x32));
    assert_eq!(rig.host.name(2), Bdf::new(2, 0, 0));
    // Two pages hold entries of functions, and nothing else is watched.
    let watched = [DEVICE_TABLE + 0x2000, DEVICE_TABLE + 0x4000].map(Gpa);
    assert_eq!(rig.protection.watched(), watched.into());
}

#[test]
fn the_command_ring_is_live_when_both_bits_are_set() {
    for order in [[12, 0], [0, 12]] {
        let rig = Rig::at_reset();
        rig.write(0x08, 8, RING | 8 << 56);
        rig.control(order[0], true);
        assert_eq!(rig.host.queue(QueueKind::Command), None);
        rig.control(order[1], true);
        assert!(rig.host.queue(QueueKind::Command).is_some(), "{order:?}");
        rig.control(order[0], false);
        assert_eq!(rig.host.queue(QueueKind::Command), None);
        rig.check();
    }
}

#[test]
fn a_ring_with_a_reserved_length_stays_off() {
    let rig = Rig::at_reset();
    rig.write(0x08, 8, RING | 7 << 56);
    rig.control(12, true);
    rig.control(0, true);
    assert_eq!(rig.host.queue(QueueKind::Command), None);
    rig.check();
}

#[test]
fn rings_are_made_anew_when_they_move_or_interrupt() {
    let rig = Rig::running();
    rig.host.granted();
    rig.control(4, true);
    assert_eq!(rig.host.granted(), ["destroy queue", "queue Command"]);
    assert!(rig.host.queue(QueueKind::Command).expect("on").interrupts);
    rig.control(2, false);
    assert_eq!(rig.host.granted(), ["destroy queue"]);
    rig.write(0x10, 8, (LOG + 0x1000) | 8 << 56);
    assert!(rig.host.granted().is_empty());
    rig.control(2, true);
    assert_eq!(rig.host.granted(), ["queue Event"]);
    rig.check();
    // A bit that concerns none of them asks for nothing.
    rig.control(8, true);
    assert!(rig.host.granted().is_empty());
}

#[test]
fn linux_7_3_attaches_by_two_exchanges() {
    let rig = Rig::running();
    rig.host.granted();
    let entry = dte(0x1234_5000, 7);
    rig.entry(0, entry);
    assert_eq!(rig.host.place(0), tables(entry));
    assert_eq!(rig.host.granted(), ["nested 0x12345000", "attach 0"]);
    // From tables to others: lower half only. New tables first, the old ones last.
    let next = dte(0x2234_5000, 8);
    rig.half(0, 0, next);
    assert_eq!(rig.host.place(0), tables(next));
    assert_eq!(
        rig.host.granted(),
        ["nested 0x22345000", "attach 0", "destroy nested"]
    );
    // Back to blocked: lower half, then upper.
    rig.half(0, 0, [1, 0, 0, 0]);
    rig.half(0, 1, [1, 0, 0, 0]);
    assert_eq!(rig.host.place(0), Reached::Nothing);
    assert_eq!(rig.host.granted(), ["block 0", "destroy nested"]);
    // An identity domain.
    rig.entry(0, [3 << 61 | 3, 9, 0, 0]);
    assert_eq!(rig.host.granted(), ["pass 0"]);
    rig.check();
    assert_eq!(rig.host.tables(), 0);
}

#[test]
fn every_transition_of_linux_7_3_passes_no_wrong_place() {
    let blocked = [1, 0, 0, 0];
    let identity = [3 << 61 | 3, 9, 0, 0];
    let [four, other] = [dte(0x5000, 7), dte(0x6000, 8)];
    let five = [four[0], four[1], 1 << 54, 0];
    let clear = [0; 4];
    // Before, what is stored half by half, after; and what it may reach on the way.
    let steps = |before: [u64; 4], halves: &[(usize, [u64; 4])], between: &[Reached]| {
        let rig = Rig::running();
        rig.entry(0, before);
        let (&(half, last), way) = halves.split_last().expect("one at least");
        for ((half, entry), reached) in way.iter().zip(between) {
            rig.half(0, *half, *entry);
            assert_eq!(rig.host.place(0), *reached, "{halves:x?}");
        }
        rig.half(0, half, last);
        rig.check();
        rig.host.place(0)
    };
    let nothing = Reached::Nothing;
    // Invalid before: upper, lower.
    assert_eq!(
        steps(clear, &[(1, five), (0, five)], &[Reached::Memory]),
        tables(five)
    );
    // To invalid: lower, upper.
    assert_eq!(
        steps(four, &[(0, clear), (1, clear)], &[Reached::Memory]),
        Reached::Memory
    );
    // No guest tables before: upper, lower.
    assert_eq!(steps(blocked, &[(1, five), (0, five)], &[nothing]), tables(five));
    assert_eq!(
        steps(identity, &[(1, four), (0, four)], &[Reached::Memory]),
        tables(four)
    );
    // Guest tables no longer: lower, upper.
    assert_eq!(steps(five, &[(0, blocked), (1, blocked)], &[nothing]), nothing);
    // Another format: out of use, upper, lower.
    assert_eq!(
        steps(
            four,
            &[(0, clear), (1, five), (0, five)],
            &[Reached::Memory, Reached::Memory]
        ),
        tables(five)
    );
    // The same format: lower.
    assert_eq!(steps(four, &[(0, other)], &[]), tables(other));
}

#[test]
fn a_driver_that_is_unloaded_leaves_the_unit_off() {
    let rig = Rig::running();
    rig.entry(0, dte(0x5000, 7));
    for bit in [12, 3, 2, 28, 29, 13, 14, 0, 59] {
        rig.control(bit, false);
        rig.check();
    }
    assert_eq!(rig.host.place(0), Reached::Memory);
    assert_eq!(rig.host.tables(), 0);
    assert!(rig.protection.watched().is_empty());
    // Its memory is somebody else's now.
    rig.entry(0, dte(0x6000, 7));
    assert_eq!(rig.host.place(0), Reached::Memory);
}

#[test]
fn older_kernels_attach_by_words_in_any_order() {
    for order in [[1, 0, 2, 3], [0, 1, 2, 3], [3, 2, 1, 0], [2, 0, 3, 1]] {
        let rig = Rig::running();
        let entry = dte(0x0009_8765_4321_0000 & !0xfff, 0xffff);
        for word in order {
            rig.word(rig.id(1), word, entry[usize::try_from(word).expect("small")]);
            rig.check();
        }
        assert_eq!(rig.host.place(1), tables(entry), "{order:?}");
        // None of the root's bits is in the first quadword: with that alone, the entry has no root.
        assert!(rig.host.events().is_empty(), "{order:?}");
    }
}

#[test]
fn stores_that_change_nothing_ask_for_nothing() {
    let rig = Rig::running();
    let entry = dte(0x5000, 7);
    rig.entry(0, entry);
    rig.host.granted();
    rig.entry(0, entry);
    // Interrupt remapping, ATS, access marks: none of the host's business.
    rig.half(0, 1, [0, 0, 0x8000_0000_1234_5601, 0]);
    rig.half(0, 0, [entry[0] | 3 << 7, entry[1] | 1 << 32, 0, 0]);
    assert!(rig.host.granted().is_empty());
    let before = rig.unit.counts();
    // The entry of nobody, in a watched page.
    rig.word(0x105, 0, 3);
    assert!(rig.host.granted().is_empty());
    let after = rig.unit.counts();
    assert_eq!(after.strange_stores, before.strange_stores + 1);
    assert_eq!(after.stores, before.stores);
}

#[test]
fn an_identity_domain_with_pasids_keeps_its_tables() {
    let rig = Rig::running();
    let entry = dte(0x5000, 7);
    let without_giov = [entry[0] & !(1 << 54), entry[1], 0, 0];
    rig.entry(0, without_giov);
    assert_eq!(rig.host.place(0), tables(without_giov));
}

#[test]
fn what_stood_in_the_table_before_is_taken_over() {
    let rig = Rig::at_reset();
    let entry = dte(0x5000, 7);
    rig.write(0x00, 8, DEVICE_TABLE | 0x3f);
    for index in 0..2 {
        rig.entry(index, entry);
    }
    rig.control(16, true);
    rig.control(0, true);
    assert_eq!(rig.host.place(0), tables(entry));
    assert_eq!(rig.host.place(1), tables(entry));
    assert_eq!(rig.host.place(2), Reached::Memory, "V=0");
    rig.check();
}

#[test]
fn a_second_kernel_finds_the_unit_on_and_brings_its_own_table() {
    let rig = Rig::running();
    rig.entry(0, dte(0x5000, 7));
    rig.entry(2, dte(0x5000, 7));
    // Its table: function 0 as before, function 1 nested, function 2 passing.
    let table = 0x30_0000;
    for (index, entry) in [(0, dte(0x5000, 7)), (1, dte(0x6000, 8))] {
        let at = Gpa(table + 32 * u64::from(rig.id(index)));
        rig.ram.write_obj(at, &entry).expect("RAM");
    }
    rig.host.granted();
    rig.write(0x00, 8, table | 0x3f);
    assert_eq!(
        rig.host.granted(),
        ["nested 0x6000", "attach 1", "pass 2", "destroy nested"]
    );
    rig.check();
    assert_eq!(
        rig.protection.watched(),
        [table + 0x2000, table + 0x4000].map(Gpa).into()
    );
    // The old table is memory like any other.
    rig.entry(0, [3, 0, 0, 0]);
    rig.check();
}

#[test]
fn a_second_kernel_moves_rings_that_it_finds_on() {
    let rig = Rig::running();
    rig.host.granted();
    for (register, kind) in [
        (0x08, QueueKind::Command),
        (0x10, QueueKind::Event),
        (0x38, QueueKind::Ppr),
    ] {
        rig.write(register, 8, 0x50_0000 | 10 << 56);
        let queue = rig.host.queue(kind).expect("on");
        assert_eq!((queue.base, queue.length), (Gpa(0x50_0000), 10));
        let made = format!("queue {kind:?}");
        assert_eq!(rig.host.granted(), ["destroy queue", &made]);
        // The same once more.
        rig.write(register, 8, 0x50_0000 | 10 << 56);
        assert!(rig.host.granted().is_empty());
        rig.write(register + 4, 4, 0);
        assert_eq!(rig.host.queue(kind), None, "of no length");
        rig.check();
        rig.host.granted();
    }
}

#[test]
fn a_table_that_shrinks_leaves_blocked_what_it_leaves_out() {
    let rig = Rig::running();
    rig.entry(2, dte(0x5000, 7));
    // Bus 1 and no more.
    rig.write(0x00, 8, DEVICE_TABLE | 3);
    assert_eq!(rig.host.place(2), Reached::Nothing);
    rig.check();
    assert_eq!(rig.protection.watched(), [Gpa(DEVICE_TABLE + 0x2000)].into());
    rig.write(0x00, 8, DEVICE_TABLE | 0x3f);
    assert!(matches!(rig.host.place(2), Reached::Tables(_)));
    rig.check();
}

#[test]
fn segments_of_the_table_are_followed_each() {
    let rig = Rig::running();
    let high = Bdf::new(0x80, 0, 0).expect("valid");
    rig.requesters[1].renumber(Sbdf {
        segment: 0,
        bdf: high,
    });
    rig.unit.renumbered();
    assert_eq!(rig.host.place(1), Reached::Nothing, "past the end of the table");
    // Two segments: bus 80h begins the second.
    rig.ram.write_obj(Gpa(0x40_0000), &dte(0x7000, 3)).expect("RAM");
    rig.write(0x100, 8, 0x40_0000);
    rig.control(34, true);
    assert_eq!(rig.host.place(1), tables(dte(0x7000, 3)));
    rig.check();
    rig.protection.store(Gpa(0x40_0000), &[0; 8]);
    assert_eq!(rig.host.place(1), Reached::Memory);
    rig.check();
}

#[test]
fn two_units_share_a_page_of_the_table() {
    let (one, other) = (Rig::running(), FakeHost::new());
    let second = Rig::sharing(&one, other);
    second.start();
    let entry = dte(0x5000, 7);
    one.entry(0, entry);
    second.entry(0, dte(0x6000, 8));
    assert_eq!(one.host.place(0), tables(entry));
    assert_eq!(second.host.place(0), tables(dte(0x6000, 8)));
    one.check();
    second.check();
    // The one going leaves the other watched.
    drop(one.unit);
    second.entry(0, [1, 0, 0, 0]);
    second.check();
}

#[test]
fn functions_that_are_renumbered_are_named_anew() {
    let rig = Rig::running();
    rig.entry(0, dte(0x5000, 7));
    rig.entry(2, dte(0x6000, 8));
    rig.host.granted();
    // They change places.
    let [first, last] = [0, 2].map(|index| rig.requesters[index].sbdf());
    rig.requesters[0].renumber(last);
    rig.requesters[2].renumber(first);
    rig.unit.renumbered();
    assert_eq!(rig.host.place(0), tables(dte(0x6000, 8)));
    assert_eq!(rig.host.place(2), tables(dte(0x5000, 7)));
    assert_eq!(
        (rig.host.name(0), rig.host.name(2)),
        (Some(last.bdf), Some(first.bdf))
    );
    rig.check();
    let granted = rig.host.granted();
    assert!(
        !granted.iter().any(|request| request.starts_with("pass")),
        "{granted:?}"
    );
}

#[test]
fn the_msi_capability_routes_while_registers_do_not() {
    let rig = Rig::at_reset();
    let msi_at = 0x58 / 4;
    let program = |values: [(u16, u32); 4]| {
        for (dword, value) in values {
            let _ = rig.unit.config_write(msi_at + dword, DwordWrite::whole(value));
        }
    };
    program([(1, 0xfee0_3000), (2, 0), (3, 0x41), (0, 1 << 16)]);
    let target = InterruptTarget {
        destination: 3,
        logical: false,
        vector: 0x41,
    };
    assert_eq!(rig.host.target(UnitInterrupt::Event), Some(target));
    assert_eq!(rig.host.target(UnitInterrupt::Ppr), Some(target));
    // A mask, and back.
    let _ = rig.unit.config_write(msi_at + 4, DwordWrite::whole(1));
    assert_eq!(rig.host.target(UnitInterrupt::Event), None);
    let _ = rig.unit.config_write(msi_at + 4, DwordWrite::whole(0));
    assert_eq!(rig.host.target(UnitInterrupt::Event), Some(target));
    // Registers take over, without a vector at first.
    rig.control(50, true);
    rig.control(51, true);
    assert_eq!(rig.host.target(UnitInterrupt::Event), None);
    rig.write(0x170, 8, 0x52 << 32 | 5 << 8 | 4);
    let moved = InterruptTarget {
        destination: 5,
        logical: true,
        vector: 0x52,
    };
    assert_eq!(rig.host.target(UnitInterrupt::Event), Some(moved));
    rig.write(0x174, 4, 0);
    assert_eq!(rig.host.target(UnitInterrupt::Event), None);
    rig.control(51, false);
    assert_eq!(rig.host.target(UnitInterrupt::Event), Some(target));
    Function::reset(&*rig.unit);
    assert_eq!(rig.host.target(UnitInterrupt::Event), None);
    rig.host.check();
}

#[test]
fn a_reset_leaves_what_power_on_left() {
    let rig = Rig::running();
    rig.entry(0, dte(0x5000, 7));
    rig.unit.reset();
    rig.check();
    assert!((0..3).all(|index| rig.host.place(index) == Reached::Memory));
    assert_eq!((rig.host.tables(), rig.host.resets()), (0, 1));
    assert!(rig.protection.watched().is_empty());
    assert_eq!(rig.read(0x18), 0x400);
    // And it starts again.
    rig.start();
    rig.check();
    assert!((0..3).all(|index| rig.host.place(index) == Reached::Nothing));
}

#[test]
fn a_host_without_the_rarer_requests_serves_as_well() {
    let host = FakeHost::new();
    host.support_little();
    let rig = Rig::over(host, &Wanted::EVERYTHING);
    rig.start();
    rig.entry(0, [3 << 61 | 3 | 1 << 9, 0, 0, 0]);
    assert_eq!(rig.host.place(0), Reached::Nothing);
    // What it cannot do it is asked once.
    let asked = rig.host.asked();
    rig.control(8, true);
    assert_eq!(rig.host.asked(), asked);
    assert_eq!(rig.host.target(UnitInterrupt::Event), None);
    rig.unit.reset();
    rig.check();
    assert_eq!((rig.host.events().len(), rig.unit.counts().refusals), (0, 0));
}

#[test]
fn a_unit_that_goes_gives_everything_back_in_order() {
    let rig = Rig::running();
    rig.entry(0, dte(0x5000, 7));
    rig.host.granted();
    drop(rig.unit);
    rig.host.check();
    assert_eq!(rig.host.left(), 0);
    assert!((0..3).all(|index| rig.host.place(index) == Reached::Nothing));
    assert!(rig.protection.watched().is_empty());
    let queue = "destroy queue";
    let name = "destroy vdevice";
    assert_eq!(
        rig.host.granted(),
        [
            queue,
            queue,
            queue,
            "block 0",
            "destroy nested",
            name,
            name,
            name,
            "destroy viommu"
        ]
    );
}

#[test]
fn registers_have_their_bits_and_no_others() {
    let rig = Rig::at_reset();
    rig.write(0x18, 8, !(1 | 4 << 34));
    assert_eq!(rig.read(0x18), 0x000c_200c_0003_fffe);
    // More segments than there are: the write is as good as none.
    rig.write(0x18, 8, 4 << 34);
    assert_eq!(rig.read(0x18), 0x000c_200c_0003_fffe);
    rig.write(0x18, 8, 0x400);
    for at in [0x20, 0x28, 0x30, 0xe0, 0xf0, 0x138, 0x158, 0x1a0, 0x200] {
        let before = rig.read(at);
        rig.write(at, 8, u64::MAX);
        assert_eq!(rig.read(at), before, "{at:#x}");
    }
    assert_eq!(rig.read(0x30), rig.unit.features.efr.into_bits());
    assert_eq!(rig.read(0x1a0), 0);
}

#[test]
fn registers_are_written_by_halves_and_bytes() {
    let rig = Rig::at_reset();
    rig.write(0x00, 4, 0x2_2000 | 2);
    rig.write(0x04, 4, 3);
    assert_eq!(rig.read(0x00), 0x3_0002_2002);
    rig.write(0x04, 1, 5);
    assert_eq!(rig.read(0x00), 0x5_0002_2002);
    rig.write(0x0f, 1, 9);
    assert_eq!(rig.read(0x08) >> 56, 9);
    // The upper half of Control, and one byte of the lower.
    rig.write(0x1c, 4, 1 << (50 - 32));
    rig.write(0x19, 1, 1 << (12 - 8));
    assert_eq!(rig.read(0x18), 1 << 50 | 1 << 12);
    rig.write(0x1a, 2, 1);
    assert_eq!(rig.read(0x18), 1 << 50 | 1 << 16 | 1 << 12);
}

#[test]
fn a_table_base_that_is_written_again_asks_for_nothing() {
    let rig = Rig::running();
    rig.entry(0, dte(0x5000, 7));
    let (base, watched) = (rig.read(0x00), rig.protection.watched());
    rig.host.granted();
    for _ in 0..3 {
        rig.write(0x00, 8, base);
        rig.write(0x00, 4, base);
        rig.write(0x04, 4, base >> 32);
    }
    assert_eq!(rig.host.granted(), Vec::<String>::new());
    assert_eq!(rig.protection.watched(), watched);
    assert_eq!(rig.host.place(0), tables(dte(0x5000, 7)));
    // Elsewhere there is nothing of it, and here it is as it was.
    rig.write(0x00, 8, (DEVICE_TABLE + 0x10_0000) | 0x3f);
    assert_eq!(rig.host.place(0), Reached::Memory);
    rig.write(0x00, 8, base);
    assert_eq!(rig.host.place(0), tables(dte(0x5000, 7)));
    rig.check();
}

#[test]
fn page_3_is_the_hosts_and_pages_2_and_4_are_nobodys() {
    let rig = Rig::at_reset();
    rig.write(0x2008, 4, 0x10);
    rig.write(0x2020, 8, 0x67);
    rig.write(0x2ffc, 4, 1);
    let written: Vec<_> = rig
        .host
        .page
        .0
        .lock()
        .expect("not poisoned")
        .iter()
        .map(|(at, _)| *at)
        .collect();
    assert_eq!(written, [0x8, 0x20, 0xffc]);
    assert_eq!(rig.read(0x2018), 0x1919_1919_1919_1919);
    for at in [0x1000, 0x1008, 0x1ff8, 0x3000, 0x3ff8, 0x4000, u64::MAX - 7] {
        rig.write(at, 8, u64::MAX);
        assert_eq!(rig.read(at), 0, "{at:#x}");
    }
}

#[test]
fn a_page_3_that_is_mapped_is_handed_out_and_let_go_first() {
    let file = tempfile::tempfile().expect("a file");
    file.set_len(0x1000).expect("room");
    let page = Arc::new(DeviceMemory::map(&file, 0, 0x1000).expect("mapped"));
    let host = FakeHost::new();
    host.map_page(page.clone());
    drop(page);
    let rig = Rig::over(host.clone(), &Wanted::DEFAULT);
    assert_eq!(rig.unit.page().expect("mapped").len(), 0x1000);
    // What still arrives here.
    rig.write(0x2008, 4, 0x10);
    assert_eq!(rig.read(0x2020), 0);
    assert!(rig.host.page.0.lock().expect("not poisoned").is_empty());
    drop(rig.unit);
    host.check();
    assert_eq!(host.left(), 0);
    assert!(Rig::at_reset().unit.page().is_none());
}

#[test]
fn accesses_that_no_register_takes_do_nothing() {
    let rig = Rig::running();
    let before = rig.unit.state();
    rig.host.page.0.lock().expect("not poisoned").clear();
    // Across quadwords, across pages, of odd sizes.
    for (at, len) in [
        (4, 8),
        (0x1c, 8),
        (0x19, 2),
        (0xffc, 8),
        (0x1ffc, 8),
        (0x2ffe, 4),
        (0x2001, 2),
    ] {
        rig.write(at, len, 0);
        let mut data = vec![0xff; len];
        rig.unit.read(at, &mut data);
        assert!(data.iter().all(|byte| *byte == 0), "{at:#x} {len}");
    }
    for len in [0, 3, 5, 6, 7] {
        rig.write(0x18, len, 0);
        rig.write(0x2000, len, 0);
        let mut data = vec![0xff; len];
        rig.unit.read(0x2000, &mut data);
        assert!(data.iter().all(|byte| *byte == 0), "{len}");
    }
    rig.unit.write(0x18, &[0; 16]);
    assert_eq!(rig.unit.state(), before);
    assert!(rig.host.page.0.lock().expect("not poisoned").is_empty());
}

#[test]
fn the_operator_is_shown_what_functions_reach() {
    let rig = Rig::running();
    rig.entry(0, dte(0x5000, 7));
    rig.entry(1, [3 << 61 | 3 | 1 << 9, 0, 0, 0]);
    rig.entry(2, [0; 4]);
    let state = rig.unit.state();
    for part in [
        "rings on: commands, events, page requests",
        "01:00.0 has guest tables at 0x5000 in domain 7",
        "01:01.0 is blocked: v1 tables",
        "02:00.0 passes through",
        "2 pages of the device table watched",
        "1 events put in, 0 refusals",
    ] {
        assert!(state.contains(part), "{part}: {state}");
    }
}
