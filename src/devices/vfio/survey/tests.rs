//! What becomes of a NIC's configuration space, and of ones that lie.

use super::*;
use crate::devices::vfio::testing::{EXPRESS as EXPRESS_AT, MSI as MSI_AT, MSIX as MSIX_AT, PM, nic_config};
use crate::pci::access::DwordWrite;

const IDENTITY: Identity = Identity {
    vendor: 0x8086,
    device: 0x10d3,
    class: 0x02_0000,
    revision: 2,
    subsystem_vendor: 0x8086,
    subsystem: 0xa01f,
};

fn given() -> Given {
    Given {
        identity: IDENTITY,
        decodes: Command::MEMORY | Command::IO,
        pin: Some(Pin::A),
        on_root_bus: false,
        resets: true,
        msi: 1,
        msix: 5,
        bars: [0x2_0000, 0, 0x20, 0x4000, 0, 0],
    }
}

fn image(bytes: &[u8]) -> Image {
    let (dwords, _) = bytes.as_chunks::<4>();
    Image(dwords.iter().map(|dword| u32::from_le_bytes(*dword)).collect())
}

fn nic() -> Survey {
    survey(&image(&nic_config()), &given())
}

fn with(change: impl Fn(&mut Vec<u8>)) -> Survey {
    let mut bytes = nic_config();
    change(&mut bytes);
    survey(&image(&bytes), &given())
}

/// What the guest reads while the device answers all ones.
fn reads(survey: &Survey, byte: u16) -> u32 {
    survey.table.read(byte / 4, || u32::MAX)
}

/// The standard list as a guest walks it.
fn list(survey: &Survey) -> Vec<(u16, u8)> {
    let mut found = Vec::new();
    let mut at = u16::from(reads(survey, 0x34).to_le_bytes()[0]);
    while at != 0 {
        let [id, next, ..] = reads(survey, at).to_le_bytes();
        found.push((at, id));
        at = next.into();
    }
    found
}

/// The extended list as a guest walks it.
fn extended_list(survey: &Survey) -> Vec<(u16, u16)> {
    let mut found = Vec::new();
    let mut at = 0x100;
    while at != 0 && reads(survey, at) != 0 {
        let header = reads(survey, at);
        found.push((at, u16::try_from(header & 0xffff).expect("16 bits")));
        at = u16::try_from(header >> 20).expect("12 bits");
    }
    found
}

#[test]
fn the_header_is_ours_and_the_rom_is_hidden() {
    let nic = nic();
    assert_eq!(reads(&nic, 0), 0x10d3_8086);
    assert_eq!(reads(&nic, 4), STATUS_CAPABILITIES | STATUS_INTERRUPT);
    assert_eq!(reads(&nic, 8), 0x0200_0002);
    assert_eq!(
        (reads(&nic, 0x0c), reads(&nic, 0x28), reads(&nic, 0x30)),
        (0, 0, 0)
    );
    assert_eq!(reads(&nic, 0x2c), 0xa01f_8086);
    assert_eq!(reads(&nic, 0x3c), 0x0100);
}

#[test]
fn capabilities_keep_their_places() {
    assert_eq!(
        list(&nic()),
        [(EXPRESS_AT, 0x10), (MSIX_AT, 0x11), (PM, 0x01), (MSI_AT, 0x05)]
    );
}

#[test]
fn power_management_has_two_states_and_no_events() {
    let nic = nic();
    assert_eq!(nic.power, Some(PM / 4 + 1));
    assert_eq!(reads(&nic, PM) >> 16, 0x0023);
    assert_eq!(reads(&nic, PM + 4), NO_SOFT_RESET);
}

#[test]
fn express_is_an_endpoint_with_a_link_behind_a_port_and_none_on_a_root_bus() {
    let nic = nic();
    assert_eq!(reads(&nic, EXPRESS_AT) >> 16, 0x0002);
    assert_eq!(reads(&nic, EXPRESS_AT + 4), 0x1000_8001);
    assert_eq!(reads(&nic, EXPRESS_AT + 0xc), 0x0004_1c11);
    assert_eq!(reads(&nic, EXPRESS_AT + 0x10), LINK_STATUS_PASSED);
    assert_eq!(reads(&nic, EXPRESS_AT + 0x24), 0x0010_001f);
    let on_root = Given {
        on_root_bus: true,
        ..given()
    };
    let integrated = survey(&image(&nic_config()), &on_root);
    assert_eq!(reads(&integrated, EXPRESS_AT) >> 16, 0x0092);
    assert_eq!(
        (
            reads(&integrated, EXPRESS_AT + 0xc),
            reads(&integrated, EXPRESS_AT + 0x10)
        ),
        (0, 0)
    );
}

const LINK_STATUS_PASSED: u32 = 0xffff_0000;

#[test]
fn function_level_reset_is_offered_where_the_host_can_reset() {
    let cannot = Given {
        resets: false,
        ..given()
    };
    let nic = survey(&image(&nic_config()), &cannot);
    assert_eq!(reads(&nic, EXPRESS_AT + 4), 0x0000_8001);
}

#[test]
fn of_extended_capabilities_the_serial_number_is_left() {
    let nic = nic();
    assert_eq!(extended_list(&nic), [(0x100, 0), (0x140, SERIAL_NUMBER)]);
    assert_eq!(reads(&nic, 0x140), 0x0001_0003);
    assert_eq!(
        (reads(&nic, 0x144), reads(&nic, 0x148), reads(&nic, 0x14c)),
        (u32::MAX, u32::MAX, 0)
    );
    // Of SR-IOV nothing can be read or written.
    assert_eq!((reads(&nic, 0x180), reads(&nic, 0x184)), (0, 0));
    let mut table = nic.table;
    assert_eq!(
        table.write(0x184 / 4, crate::pci::access::DwordWrite::whole(u32::MAX)),
        None
    );
    assert_eq!(table.value(0x184 / 4), 0);
}

#[test]
fn msi_and_msix_are_where_the_device_has_them() {
    let nic = nic();
    let msi = nic.msi.expect("there");
    assert_eq!(
        (msi.dword * 4, msi.data() * 4, msi.end() * 4),
        (MSI_AT, MSI_AT + 12, MSI_AT + 16)
    );
    assert!(msi.wide && !msi.masks);
    let msix = nic.msix.expect("there");
    assert_eq!((msix.vectors, msix.table, msix.pending), (5, (3, 0), (3, 0x2000)));
    assert_eq!(reads(&nic, MSIX_AT) >> 16, 4);
    assert_eq!((reads(&nic, MSIX_AT + 4), reads(&nic, MSIX_AT + 8)), (3, 0x2003));
}

#[test]
fn msi_offers_as_many_vectors_as_the_host_has() {
    let sixteen = |host: u32| {
        let mut bytes = nic_config();
        bytes[usize::from(MSI_AT) + 2] = 0x88;
        let given = Given { msi: host, ..given() };
        let survey = survey(&image(&bytes), &given);
        survey.msi.map(|_| reads(&survey, MSI_AT) >> 17 & 7)
    };
    assert_eq!([16, 8, 3, 1].map(sixteen), [Some(4), Some(3), Some(1), Some(0)]);
    assert_eq!(sixteen(0), None);
}

#[test]
fn lists_that_loop_or_leave_configuration_space_end() {
    let looping = with(|bytes| {
        bytes[usize::from(MSIX_AT) + 1] = 0xc8;
        bytes[0x143] = 0x10;
        bytes[0x142] = 0x01;
    });
    assert_eq!(list(&looping).len(), 4);
    assert_eq!(extended_list(&looping), [(0x100, 0), (0x140, SERIAL_NUMBER)]);
    assert_eq!(list(&with(|bytes| bytes[0x34] = 0x3c)), []);
    assert_eq!(list(&with(|bytes| bytes[0x34] = 0xff)), []);
    assert_eq!(list(&with(|bytes| bytes[6] = 0)), []);
    let ones = with(|bytes| bytes[0x40..].fill(0xff));
    assert_eq!((list(&ones), extended_list(&ones)), (vec![], vec![]));
}

#[test]
fn a_capability_that_runs_into_the_next_is_cut_short_or_hidden() {
    // Power management 4 bytes before MSI.
    let short = with(|bytes| {
        bytes.copy_within(0xc8..0xd0, 0xcc);
        bytes[0x34] = 0xcc;
    });
    assert_eq!(list(&short).iter().filter(|(_, id)| *id == 1).count(), 0);
    // Express with less room than its second version takes.
    let first = with(|bytes| {
        bytes[0x61] = 0x90;
        bytes[0x90..0x93].copy_from_slice(&[0x09, 0xa0, 0x10]);
    });
    assert_eq!(reads(&first, EXPRESS_AT) >> 16, 0x0001);
    assert_eq!(reads(&first, EXPRESS_AT + 0x24), 0);
    assert_eq!(reads(&first, 0x90) & 0xffff, 0xa009);
}

#[test]
fn msix_structures_outside_their_bars_or_over_each_other_hide_msix() {
    let at = usize::from(MSIX_AT);
    let moved = |table: [u8; 4], pending: [u8; 4]| {
        with(|bytes| {
            bytes[at + 4..at + 8].copy_from_slice(&table);
            bytes[at + 8..at + 12].copy_from_slice(&pending);
        })
    };
    for (table, pending) in [
        ([3, 0x40, 0, 0], [3, 0x20, 0, 0]),
        ([7, 0, 0, 0], [3, 0x20, 0, 0]),
        ([1, 0, 0, 0], [3, 0x20, 0, 0]),
        ([3, 0, 0, 0], [3, 0, 0, 0]),
        ([3, 0, 0, 0], [0xfb, 0xff, 0xff, 0xff]),
    ] {
        let survey = moved(table, pending);
        assert_eq!(survey.msix, None, "{table:?} {pending:?}");
        assert!(list(&survey).iter().all(|(_, id)| *id != 0x11));
        assert_eq!(reads(&survey, MSIX_AT + 4), 0);
    }
    // Pending bits may come before the table.
    let before = moved([3, 0x20, 0, 0], [3, 0x10, 0, 0]);
    assert_eq!(before.msix.map(|place| place.pending), Some((3, 0x1000)));
}

#[test]
fn of_capabilities_that_are_there_twice_the_first_of_the_list_is_seen() {
    // A second MSI-X, whose table would do as well, and a second MSI, both behind the first ones; two of the vendor's.
    let twice = with(|bytes| {
        bytes[usize::from(MSIX_AT) + 1] = 0xb0;
        bytes[0xb0..0xb4].copy_from_slice(&[0x11, 0xe0, 0x04, 0x00]);
        bytes[0xb4..0xbc].copy_from_slice(&[0x00, 0x10, 0, 0, 0x00, 0x20, 0, 0]);
        bytes[0xe0..0xe4].copy_from_slice(&[0x05, 0x40, 0x80, 0x00]);
        bytes[0x40..0x43].copy_from_slice(&[0x09, 0x48, 0x08]);
        bytes[0x48..0x4b].copy_from_slice(&[0x09, 0x00, 0x08]);
    });
    let listed = [
        (0x40, 9),
        (0x48, 9),
        (EXPRESS_AT, 0x10),
        (MSIX_AT, 0x11),
        (PM, 1),
        (MSI_AT, 5),
    ];
    assert_eq!(list(&twice), listed);
    assert_eq!(twice.msix.map(|place| place.table), Some((3, 0)));
    assert_eq!(twice.msi.map(|place| place.dword * 4), Some(MSI_AT));
    assert_eq!((reads(&twice, 0xb0), reads(&twice, 0xe0)), (0, 0));
}

#[test]
fn a_function_without_capabilities_shows_its_own_registers_read_only() {
    let plain = survey(&image(&[0; 256]), &given());
    assert_eq!(list(&plain), []);
    assert_eq!(
        (reads(&plain, 4), reads(&plain, 0x40), reads(&plain, 0x100)),
        (STATUS_INTERRUPT, u32::MAX, 0)
    );
    let mut table = plain.table;
    assert_eq!(
        table.write(0x40 / 4, crate::pci::access::DwordWrite::whole(1)),
        None
    );
}

mod arbitrary {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn whatever_a_device_shows_its_lists_end_and_stay_inside(bytes in prop::collection::vec(any::<u8>(), 4096)) {
            let mut bytes = bytes;
            bytes[6] |= 0x10;
            let survey = survey(&image(&bytes), &given());
            prop_assert!(list(&survey).len() <= MOST_STANDARD);
            prop_assert!(extended_list(&survey).len() <= MOST_EXTENDED);
        }
    }
}

/// A virtual function of an 82576: its IDs are not in its header, it has neither wire, MSI, power management nor ports.
fn virtual_function() -> Survey {
    let mut bytes = vec![0; 0x1000];
    let mut put = |at: usize, dwords: &[u32]| {
        for (index, dword) in dwords.iter().enumerate() {
            bytes[at + index * 4..at + index * 4 + 4].copy_from_slice(&dword.to_le_bytes());
        }
    };
    put(0, &[u32::MAX, STATUS_CAPABILITIES, 0x0200_0001]);
    put(0x34, &[0x70]);
    put(0x70, &[0x0002_a011, 0x3, 0x2003]);
    let link = [0x0001_0c11, 0];
    put(0xa0, &[0x0002_0010, 0x1000_8cc0, 0, link[0], link[1]]);
    put(0x100, &[0x1501_0001]);
    put(0x150, &[0x0001_000e]);
    let given = Given {
        identity: Identity {
            device: 0x10ca,
            ..IDENTITY
        },
        decodes: Command::MEMORY,
        pin: None,
        msi: 0,
        msix: 3,
        bars: [0x4000, 0, 0, 0x4000, 0, 0],
        ..given()
    };
    survey(&image(&bytes), &given)
}

#[test]
fn a_virtual_function_is_known_by_the_ids_that_its_header_lacks() {
    let function = virtual_function();
    assert_eq!(reads(&function, 0), 0x10ca_8086);
    // Memory can be switched on and off as of any function; there are no ports, and there is no wire.
    let mut table = function.table;
    table.write(COMMAND, DwordWrite::whole(0x7));
    assert_eq!(table.value(COMMAND) & 0xffff, 0x6);
    assert_eq!(table.value(0x3c / 4), 0);
}

#[test]
fn a_virtual_function_interrupts_by_msix_and_resets_by_itself() {
    let function = virtual_function();
    assert_eq!(list(&function), [(0x70, 0x11), (0xa0, 0x10)]);
    assert_eq!(extended_list(&function), []);
    let place = function.msix.expect("it has three vectors");
    assert_eq!(
        (place.vectors, place.table, place.pending),
        (3, (3, 0), (3, 0x2000))
    );
    assert_eq!((function.msi, function.power), (None, None));
    assert_eq!(reads(&function, 0xa4) >> 28 & 1, 1);
    assert_eq!(function.device_control, Some(0xa8 / 4));
}
