//! Guests that map what the host does not take, or more than is followed, and what they are told.

use super::*;
use crate::iommu::amd::scan::Bound;

const ANYWHERE: [RangeInclusive<u64>; 1] = [0..=u64::MAX];

fn limited(limits: Limits) -> Rig {
    let rig = Rig::limited(&ANYWHERE, limits);
    rig.view(0, tables());
    rig.told();
    rig
}

#[test]
fn what_the_host_refuses_to_map_every_function_that_was_to_have_it_is_told_of_once() {
    for errno in [libc::ENOMEM, libc::ENOSPC, libc::EINVAL] {
        let rig = Rig::attached();
        rig.view(1, tables());
        rig.map(0, 0x5000);
        // Only to be read.
        rig.put(LOWER + 2 * 8, 1 << 61 | 1 | 0x9000);
        rig.put(LOWER + 4 * 8, 1 << 62 | 1 | 0x9000);
        rig.kernel.refuse(Call::Copy, errno);
        rig.commands(&[pages(PageRange::Everything)]);
        let (read, write) = ([BASE, BASE + 0x2000], BASE + 0x4000);
        let of = |device| {
            [
                (device, read[0], false),
                (device, read[1], false),
                (device, write, true),
            ]
        };
        assert_eq!(rig.told(), [of(0), of(1)].concat(), "{errno}");
        // Nothing is due any more.
        rig.commands(&[]);
        assert_eq!(rig.told(), []);
        // One that it takes at last.
        rig.kernel.relent();
        rig.commands(&[pages(PageRange::Everything)]);
        assert_eq!((rig.told(), rig.mapped().len()), (vec![], 3));
    }
}

#[test]
fn a_function_of_another_domain_is_told_nothing() {
    let rig = Rig::attached();
    rig.view(1, View::Identity(Access::READ));
    rig.map(0, 0x5000);
    rig.kernel.refuse(Call::Copy, libc::ENOMEM);
    rig.invalidate_page(0);
    assert_eq!(rig.told(), [(0, BASE, false)]);
}

#[test]
fn what_lies_where_no_device_may_be_is_told_by_its_first_address_and_what_leads_nowhere_is_not() {
    let rig = Rig::reaching(&[
        0..=BASE + 0xfff,
        BASE + 0x3000..=BASE + 0x7fff,
        BASE + 0x9000..=u64::MAX,
    ]);
    rig.view(0, tables());
    (0..12).for_each(|page| rig.map(page, 0x5000 + (page << 12)));
    // Past RAM.
    rig.map(13, 8 * MIB);
    rig.commands(&[pages(PageRange::Everything)]);
    assert_eq!(
        rig.mapped(),
        [(BASE, 0x1000), (BASE + 0x3000, 0x5000), (BASE + 0x9000, 0x3000)]
    );
    assert_eq!(rig.told(), [(0, BASE + 0x1000, false)]);
    rig.invalidate_page(8);
    assert_eq!(rig.told(), [(0, BASE + 0x8000, false)]);
}

#[test]
fn ram_beside_memory_that_went_is_told_of_when_the_host_does_not_map_it_again() {
    let rig = Rig::attached();
    rig.map(0, 0x5000);
    rig.map(1, 0x6000);
    rig.invalidate(BASE, BASE + 0x1fff);
    rig.kernel.refuse(Call::Copy, libc::ENOMEM);
    let page = GpaRange::new(Gpa(0x6000), 0x1000).expect("valid");
    rig.shadow().withdrawn(page);
    assert_eq!((rig.told(), rig.mapped()), (vec![(0, BASE, false)], vec![]));
}

#[test]
fn more_ranges_than_are_followed_are_told_of_and_come_when_others_went() {
    let rig = limited(Limits {
        runs: 2,
        ..Limits::DEFAULT
    });
    [0, 2, 4].into_iter().for_each(|page| rig.map(page, 0x5000));
    rig.commands(&[pages(PageRange::Everything)]);
    assert_eq!(rig.mapped(), [(BASE, 0x1000), (BASE + 0x2000, 0x1000)]);
    assert_eq!(rig.told(), [(0, BASE + 0x4000, false)]);
    rig.unmap(0);
    rig.invalidate_page(0);
    rig.invalidate_page(4);
    assert_eq!(rig.mapped(), [(BASE + 0x2000, 0x1000), (BASE + 0x4000, 0x1000)]);
    assert_eq!(rig.told(), []);
}

#[test]
fn tables_with_more_entries_than_are_looked_at_are_followed_up_to_there_and_that_is_told() {
    let rig = limited(Limits {
        step: Bound { entries: 8, runs: 64 },
        entries: 16,
        ..Limits::DEFAULT
    });
    rig.map(0, 0x5000);
    rig.map(100, 0x9000);
    rig.commands(&[pages(PageRange::Everything)]);
    assert_eq!(rig.mapped(), [(BASE, 0x1000)]);
    let told = rig.told();
    assert!(
        matches!(told[..], [(0, at, false)] if (BASE..BASE + 0x1_0000).contains(&at)),
        "{told:x?}"
    );
    // One page is few entries, wherever it is.
    rig.invalidate_page(100);
    assert_eq!((rig.mapped().len(), rig.told()), (2, vec![]));
}

#[test]
fn what_was_mapped_behind_the_last_entry_that_is_looked_at_goes() {
    let rig = limited(Limits {
        step: Bound { entries: 8, runs: 64 },
        entries: 16,
        ..Limits::DEFAULT
    });
    rig.map(100, 0x9000);
    rig.invalidate_page(100);
    assert_eq!(rig.reaches(BASE + (100 << 12)), Some(0x9000));
    rig.commands(&[pages(PageRange::Everything)]);
    assert!(rig.mapped().is_empty());
}

#[test]
fn a_flood_of_invalidations_is_one_of_everything() {
    let rig = limited(Limits {
        pending: 4,
        ..Limits::DEFAULT
    });
    let flood = |count: u64| -> Vec<_> {
        (0..count)
            .map(|page| {
                let first = BASE + (page << 14);
                let last = first | 0xfff;
                pages(PageRange::Span { first, last })
            })
            .collect()
    };
    // Mapped and never announced.
    rig.map(300, 0x9000);
    rig.commands(&flood(4));
    assert_eq!(rig.reaches(BASE + (300 << 12)), None);
    rig.map(12, 0x5000);
    rig.commands(&flood(5));
    assert_eq!(
        (rig.reaches(BASE + (12 << 12)), rig.reaches(BASE + (300 << 12))),
        (Some(0x5000), Some(0x9000))
    );
}

#[test]
fn a_guest_is_told_so_much_at_once_and_the_rest_is_for_the_hosts_log() {
    let rig = limited(Limits {
        told: 3,
        ..Limits::DEFAULT
    });
    (0..64).step_by(2).for_each(|page| rig.map(page, 0x5000));
    rig.kernel.refuse(Call::Copy, libc::ENOMEM);
    rig.commands(&[pages(PageRange::Everything)]);
    let told: Vec<u64> = rig.told().into_iter().map(|(_, at, _)| at).collect();
    assert_eq!(told, [BASE, BASE + 0x2000, BASE + 0x4000]);
    rig.invalidate_page(40);
    assert_eq!(rig.told(), [(0, BASE + 0x2_8000, false)]);
}

#[test]
fn an_operator_hears_of_a_host_whose_devices_reach_less_than_the_guest_can_map() {
    let hole = 0xfedf_ffff;
    assert_eq!(shortfall(&[0..=hole, 0xfef0_0000..=LAST], LAST), None);
    assert_eq!(shortfall(&ANYWHERE, LAST), None);
    let text = shortfall(&[0..=hole, 0xfef0_0000..=(1 << 39) - 1], LAST).expect("39 bits");
    assert!(
        text.starts_with(
            "the guest's tables map addresses of 48 bits for its devices, up to 0xffffffffffff, and the host's IOMMU \
             takes 39 bits, up to 0x7fffffffff: "
        ),
        "{text}"
    );
    let none = shortfall(&[], LAST).expect("nothing at all");
    assert!(none.contains("takes 0 bits"), "{none}");
}

#[test]
fn what_is_mapped_past_the_last_address_that_the_host_takes_is_told() {
    let rig = Rig::reaching(&[0..=BASE + 0xfff]);
    rig.view(0, tables());
    (0..2).for_each(|page| rig.map(page, 0x5000 + (page << 12)));
    rig.commands(&[pages(PageRange::Everything)]);
    assert_eq!(rig.mapped(), [(BASE, 0x1000)]);
    assert_eq!(rig.told(), [(0, BASE + 0x1000, false)]);
}
