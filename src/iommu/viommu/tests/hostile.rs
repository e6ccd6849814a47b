//! A guest without manners.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use proptest::prelude::*;

use super::super::host::QueueKind;
use super::super::testing::{DEVICE_TABLE, Deed, Reached, Rig, dte};
use crate::pci::Function;
use crate::pci::access::DwordWrite;
use crate::pci::topology::Observer;
use crate::platform::addr::Gpa;
use crate::platform::bus::BusDevice;

#[test]
fn an_entry_that_no_host_can_keep_is_reported_once() {
    let rig = Rig::running();
    let [host_tables, one_direction, reserved] = [
        [3 << 61 | 3 | 4 << 9 | 0x5000, 7, 0, 0],
        [1 << 61 | 3, 7, 0, 0],
        [3 << 61 | 7, 7, 0, 0],
    ];
    for entry in [host_tables, host_tables, one_direction, reserved] {
        rig.entry(0, entry);
        assert_eq!(rig.host.place(0), Reached::Nothing);
        rig.check();
    }
    let record = |flags: u32| [0x100, 1 << 28 | flags, 0, 0];
    assert_eq!(
        rig.host.events(),
        [record(0), record(0), record(1 << 23)],
        "one for each reason"
    );
    rig.entry(0, [0; 4]);
    rig.entry(0, host_tables);
    assert_eq!(rig.host.events().len(), 4);
    // Without a log there is nowhere to put one, until there is.
    rig.control(2, false);
    rig.entry(0, [0; 4]);
    rig.entry(0, host_tables);
    assert_eq!(rig.host.events().len(), 4);
    for _ in 0..3 {
        rig.control(2, true);
        assert_eq!(rig.host.events()[4..], [record(0)]);
        rig.control(2, false);
    }
    rig.check();
}

#[test]
fn a_table_where_no_memory_is_blocks() {
    let rig = Rig::running();
    rig.entry(0, dte(0x5000, 7));
    for base in [0x60_0000, 0xfee0_0000, 0xfeb0_4000, 0x000f_ffff_ffff_f000] {
        rig.write(0x00, 8, base | 0x1ff);
        assert!(
            (0..3).all(|index| rig.host.place(index) == Reached::Nothing),
            "{base:#x}"
        );
        rig.check();
        let at = base + 32 * u64::from(rig.id(0));
        let [low, high] = [at & 0xffff_ffff, at >> 32].map(|half| u32::try_from(half).expect("a half"));
        let record = [0x100, 3 << 28 | 2 << 25, low, high];
        assert!(rig.host.events().contains(&record), "{:x?}", rig.host.events());
    }
    assert!(rig.protection.watched().is_empty());
    // The page before the end holds entries of bus 1 and none of bus 2.
    rig.write(0x00, 8, 0x5f_d000 | 0x1ff);
    rig.check();
    assert_eq!(rig.protection.watched(), [Gpa(0x5f_f000)].into());
}

#[test]
fn a_half_entry_is_what_it_says() {
    let rig = Rig::running();
    // Guest tables without a root: a host would take that for none.
    rig.word(rig.id(0), 0, 3 << 61 | 1 << 55 | 3);
    rig.check();
    assert_eq!(rig.host.place(0), Reached::Nothing);
    // Single bytes.
    let at = DEVICE_TABLE + 32 * u64::from(rig.id(0));
    for (offset, byte) in [(10, 1), (7, 0), (0, 0), (7, 0xe0), (0, 3)] {
        rig.protection.store(Gpa(at + offset), &[byte]);
        rig.check();
    }
    // Two entries with one store.
    rig.protection.store(Gpa(at + 28), &[0xff; 8]);
    rig.check();
}

#[test]
fn domains_are_as_many_as_there_are_numbers() {
    let rig = Rig::running();
    for domain in 0..=u16::MAX {
        rig.half(0, 0, dte(0x5000, domain));
    }
    assert_eq!(rig.host.place(0), rig.expected(0));
    assert_eq!((rig.host.tables(), rig.unit.counts().nested), (1, 65_536));
    rig.check();
}

#[test]
fn rings_may_be_aimed_anywhere() {
    let rig = Rig::running();
    for base in [0xfee0_0000, DEVICE_TABLE, 0xfeb0_6000, 0x000f_ffff_ffff_f000] {
        for (register, bit) in [(0x08, 12), (0x10, 2), (0x38, 13)] {
            rig.control(bit, false);
            rig.write(register, 8, base | 15 << 56);
            rig.control(bit, true);
        }
        rig.check();
        assert_eq!(rig.host.queue(QueueKind::Ppr).expect("on").base, Gpa(base));
    }
}

#[test]
fn enables_that_are_toggled_in_loops_leave_nothing_behind() {
    let rig = Rig::running();
    rig.entry(0, dte(0x5000, 7));
    let left = rig.host.left();
    for round in 0..300_u64 {
        for bit in [0, 2, 12, 13, 15, 51, 3, 4, 14] {
            rig.control(bit, false);
            rig.control(bit, true);
        }
        // Several at a time, in an order of no driver's.
        let control = rig.read(0x18);
        rig.write(0x18, 8, control ^ (round << 12 & 0xf000) ^ (round & 5));
        rig.write(0x18, 8, control);
    }
    let counts = rig.unit.counts();
    assert_eq!(rig.host.left(), left);
    assert_eq!(counts.queues_made, counts.queues_destroyed + 3);
    assert_eq!((rig.host.tables(), counts.refusals, counts.events), (1, 0, 0));
    rig.check();
}

#[test]
fn half_an_entry_that_waits_holds_up_nobody() {
    let rig = Rig::running();
    rig.entry(1, dte(0x6000, 8));
    // The lower half of an entry with tables of five levels, whose upper half does not come.
    let five = [dte(0x5000, 7)[0], dte(0x5000, 7)[1], 1 << 54, 0];
    rig.half(0, 0, five);
    assert_eq!(rig.host.place(0), rig.expected(0), "as it stands, four levels");
    // All others go on, and what is read later is the same.
    rig.entry(2, dte(0x7000, 9));
    rig.entry(1, [1, 0, 0, 0]);
    rig.write(0x178, 8, 0x44 << 32);
    rig.unit.renumbered();
    rig.check();
    rig.half(0, 1, five);
    assert!(matches!(rig.host.place(0), Reached::Tables(dte) if dte.interrupt.guest_paging_mode() == 1));
    rig.check();
}

#[test]
fn two_functions_with_one_number_are_told_apart_by_neither() {
    let rig = Rig::running();
    rig.entry(0, dte(0x5000, 7));
    let number = rig.requesters[0].sbdf();
    rig.requesters[1].renumber(number);
    rig.unit.renumbered();
    // The host knows the first by it, and lets the second have no tables.
    assert!(matches!(rig.host.place(0), Reached::Tables(_)));
    assert_eq!((rig.host.place(1), rig.host.name(1)), (Reached::Nothing, None));
    rig.check_refused();
}

#[test]
fn another_processor_finishes_its_exit_while_pages_change() {
    let rig = Rig::running();
    rig.entry(0, dte(0x5000, 7));
    let (unit, protection) = (rig.unit.clone(), rig.protection.clone());
    let (table, moved) = (0x30_0000_u64, 0x40_0000_u64);
    let at = Gpa(DEVICE_TABLE + 32 * u64::from(rig.id(0)));
    let entries = [(table, dte(0x6000, 1)), (moved, dte(0x7000, 2))];
    for (table, entry) in entries {
        let at = Gpa(table + 32 * u64::from(rig.id(0)));
        rig.ram.write_obj(at, &entry).expect("RAM");
    }
    rig.protection.meanwhile(Box::new(move || {
        // Everything an exit may be about: a register read and written, a store, configuration, page 3; and the table
        // moved once more.
        unit.read(0x18, &mut [0; 8]);
        unit.write(0x170, &(0x77_u64 << 32).to_le_bytes());
        protection.store(at, &[0; 8]);
        let _ = unit.config_write(0x17, DwordWrite::whole(0xfee0_0000));
        unit.write(0x2008, &[0; 4]);
        let _ = unit.state();
        unit.write(0x00, &(moved | 0x3f).to_le_bytes());
    }));
    rig.write(0x00, 8, table | 0x3f);
    rig.check();
    assert_eq!(rig.expected(0), rig.host.place(0));
    assert_eq!(
        rig.protection.watched(),
        [moved + 0x2000, moved + 0x4000].map(Gpa).into()
    );
}

#[test]
fn processors_that_do_everything_at_once_leave_what_the_last_one_said() {
    let rig = Rig::running();
    let done = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let toggler = scope.spawn(|| {
            for round in 0..200_u64 {
                rig.control(0, round % 3 != 0);
                rig.write(0x00, 8, (DEVICE_TABLE + 0x1000 * (round % 2)) | 0x3f);
            }
        });
        for index in 0..3 {
            let (rig, done) = (&rig, &done);
            scope.spawn(move || {
                let mut round = 0;
                while !done.load(Ordering::Relaxed) {
                    round += 1;
                    let root = 0x1000 * (1 + round % 7);
                    rig.entry(index, dte(root, 1));
                    rig.write(0x178, 8, (16 + round % 100) << 32);
                    rig.entry(index, [round % 2, 0, 0, 0]);
                }
            });
        }
        toggler.join().expect("it ends");
        done.store(true, Ordering::Relaxed);
    });
    rig.check();
    rig.control(0, true);
    rig.check();
    let host = rig.host.clone();
    assert_eq!(Arc::strong_count(&rig.unit), 1);
    drop(rig.unit);
    host.check();
    assert_eq!(host.left(), 0);
}

fn entry() -> impl Strategy<Value = [u64; 4]> {
    let root = prop_oneof![Just(0_u64), 0..0x10_0000_0000_u64].prop_map(|page| page << 12);
    let flags = prop_oneof![
        4 => Just(0),
        1 => (0..64_u32).prop_map(|bit| 1 << bit),
        1 => any::<u64>(),
    ];
    (root, any::<u16>(), flags, 0..5_u64).prop_map(|(root, domain, flags, kind)| match kind {
        0 => [0; 4],
        1 => [3, 0, 0, 0],
        2 => [3 << 61 | 3, 0, 0, 0],
        _ => {
            let [host, guest, interrupt, attribute] = dte(root, domain);
            [host ^ flags, guest, interrupt ^ flags, attribute]
        }
    })
}

fn deed() -> impl Strategy<Value = Deed> {
    let lengths = prop_oneof![Just(1_usize), Just(2), Just(4), Just(8)];
    let registers = prop_oneof![
        Just(0x00_u64),
        Just(0x08),
        Just(0x10),
        Just(0x18),
        Just(0x38),
        Just(0x100),
        Just(0x108),
        Just(0x170),
        Just(0x178),
        0..0x4000_u64
    ];
    let bases = prop_oneof![0x1f0..0x220_u64, Just(0x5fe), Just(0x600), Just(0xf_ffff)];
    let ids = prop_oneof![0x100..0x110_u16, 0x200..0x204_u16, any::<u16>()];
    prop_oneof![
        3 => (registers, 0..8_u64, lengths, any::<u64>()).prop_map(|(at, more, len, value)| {
            Deed::Register { at: at + more, len, value }
        }),
        3 => (prop_oneof![Just(0_u32), Just(2), Just(12), Just(13), Just(15), Just(16), Just(34), Just(51), 0..64_u32], any::<bool>())
            .prop_map(|(bit, on)| Deed::Control { bit, on }),
        2 => (bases, prop_oneof![Just(0x3f_u64), 0..6_u64]).prop_map(|(page, size)| Deed::Table { base: page << 12, size }),
        3 => (0..3_usize, 0..4_u64, any::<u64>()).prop_map(|(index, word, value)| Deed::Word { index, word, value }),
        5 => (0..3_usize, entry()).prop_map(|(index, entry)| Deed::Entry { index, entry }),
        1 => (0..3_usize, ids).prop_map(|(index, id)| Deed::Renumber { index, id }),
        1 => (0x14..0x1d_u16, any::<u32>()).prop_map(|(dword, value)| Deed::Configuration { dword, value }),
        1 => Just(Deed::Reset),
        1 => (0..4_usize).prop_map(|after| Deed::Refuse { after }),
        1 => any::<bool>().prop_map(Deed::Watchable),
        1 => Just(Deed::Break),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(128))]

    #[test]
    fn whatever_a_guest_does_its_functions_reach_what_it_says(
        starts in any::<bool>(),
        deeds in prop::collection::vec(deed(), 1..40),
    ) {
        let rig = Rig::at_reset();
        if starts {
            rig.start();
        }
        deeds.iter().fold(true, |settled, deed| deed.perform_and_check(&rig, settled));
        rig.host.refuse_at(None);
        let host = rig.host.clone();
        drop(rig.unit);
        host.check();
        prop_assert_eq!(host.left(), 0);
    }
}
