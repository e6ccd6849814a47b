//! Tables that lead to memory of devices, which comes, goes and moves while they do.

use std::fs::File;
use std::os::fd::AsFd;

use super::*;
use crate::iommu::iommufd::Shared;
use crate::iommu::iommufd::testing::DEVICE;

/// Past guest RAM.
const BAR: u64 = 0xe000_0000;
/// The end of guest RAM.
const END: u64 = 8 * MIB;

impl Rig {
    fn share_some(&self, at: u64, len: u64) -> io::Result<Shared> {
        let file = File::open("/dev/null").expect("every host has it");
        let range = GpaRange::new(Gpa(at), len).expect("valid");
        self.space
            .upgrade()
            .expect("not ended")
            .share(range, file.as_fd())
    }

    fn share(&self, at: u64, len: u64) -> Shared {
        self.share_some(at, len).expect("mapped")
    }

    /// Settle without a command, as the event loop does when it is asked to.
    fn settled(&self) {
        assert!(self.unit.asked.swap(false, Ordering::Relaxed));
        while !self.settle() {}
    }
}

#[test]
fn tables_lead_to_memory_of_a_device_and_no_invalidation_is_needed_when_it_goes() {
    let rig = Rig::attached();
    let bar = rig.share(BAR, 0x4000);
    rig.map(0, BAR + 0x3000);
    rig.map(1, BAR + 0x4000);
    rig.map(2, 0x5000);
    rig.commands(&[pages(PageRange::Everything)]);
    assert_eq!(rig.mapped(), [(BASE, 0x1000), (BASE + 0x2000, 0x1000)]);
    assert_eq!(rig.reaches(BASE + 8), Some(DEVICE + 0x3008));
    // Nobody invalidates and nobody settles.
    drop(bar);
    assert_eq!(
        (rig.reaches(BASE), rig.reaches(BASE + 0x2000)),
        (None, Some(0x5000))
    );
    rig.commands(&[pages(PageRange::Everything)]);
    assert_eq!(rig.reaches(BASE), None);
}

#[test]
fn memory_that_comes_is_reached_by_tables_that_led_there_before() {
    let rig = Rig::attached();
    rig.map(0, BAR);
    rig.commands(&[pages(PageRange::Everything)]);
    assert_eq!(rig.reaches(BASE), None);
    let bar = rig.share(BAR, 0x1000);
    rig.settled();
    assert_eq!(rig.reaches(BASE), Some(DEVICE));
    // Elsewhere, and back.
    drop(bar);
    let bar = rig.share(BAR + 0x1000, 0x1000);
    rig.settled();
    assert_eq!(rig.reaches(BASE), None);
    drop(bar);
    let _bar = rig.share(BAR, 0x1000);
    rig.settled();
    assert_eq!(rig.reaches(BASE), Some(DEVICE));
}

#[test]
fn tables_that_lead_to_ram_are_not_looked_at_again_when_memory_comes() {
    let rig = Rig::attached();
    rig.map(0, 0x5000);
    rig.invalidate_page(0);
    // Changed, and not announced.
    rig.map(0, 0x6000);
    let _bar = rig.share(BAR, 0x1000);
    rig.settled();
    assert_eq!(rig.reaches(BASE), Some(0x5000));
}

#[test]
fn of_a_run_over_ram_and_a_device_the_ram_stays() {
    let rig = Rig::attached();
    let bar = rig.share(END, 0x2000);
    (0..3).for_each(|page| rig.map(page, END - 0x1000 + (page << 12)));
    rig.commands(&[pages(PageRange::Everything)]);
    assert_eq!(rig.reaches(BASE + 0x2000), Some(DEVICE + 0x1000));
    drop(bar);
    assert_eq!(
        (rig.reaches(BASE), rig.reaches(BASE + 0x1000)),
        (Some(END - 0x1000), None)
    );
    assert_eq!(rig.mapped(), [(BASE, 0x1000)]);
}

#[test]
fn functions_that_are_not_translated_reach_it_with_what_they_may() {
    let rig = Rig::new();
    rig.view(1, View::Identity(Access::READ));
    let bar = rig.share(BAR, 0x1000);
    rig.settled();
    let reached = |number: usize| rig.functions[number].reaches(BAR);
    assert_eq!(reached(0), Some((DEVICE, Access::BOTH)));
    assert_eq!(reached(1), Some((DEVICE, Access::READ)));
    rig.view(1, View::Nothing);
    assert_eq!(reached(1), None);
    drop(bar);
    assert_eq!(reached(0), None);
}

#[test]
fn memory_that_the_host_does_not_copy_is_not_there() {
    let rig = Rig::attached();
    let _bar = rig.share(BAR, 0x1000);
    rig.map(0, BAR);
    rig.map(1, 0x5000);
    rig.kernel.refuse_once(Call::Copy, 0, libc::EINVAL);
    rig.commands(&[pages(PageRange::Everything)]);
    assert_eq!(
        (rig.reaches(BASE), rig.reaches(BASE + 0x1000)),
        (None, Some(0x5000))
    );
}

#[test]
fn where_memory_that_goes_is_not_unmapped_functions_are_blocked_until_there_is_another_space() {
    let rig = Rig::attached();
    let bar = rig.share(BAR, 0x1000);
    rig.map(0, BAR);
    rig.map(1, 0x5000);
    rig.commands(&[pages(PageRange::Everything)]);
    rig.unit.asked.store(false, Ordering::Relaxed);
    rig.kernel.refuse_once(Call::Unmap, 0, libc::EIO);
    drop(bar);
    assert_eq!((rig.reaches(BASE), rig.reaches(BASE + 0x1000)), (None, None));
    rig.settled();
    assert_eq!(
        (rig.reaches(BASE), rig.reaches(BASE + 0x1000)),
        (None, Some(0x5000))
    );
}

#[test]
fn ram_beside_memory_that_went_comes_back_with_the_next_invalidation_where_the_host_refused_it() {
    let rig = Rig::attached();
    let bar = rig.share(END, 0x1000);
    (0..2).for_each(|page| rig.map(page, END - 0x1000 + (page << 12)));
    rig.commands(&[pages(PageRange::Everything)]);
    rig.kernel.refuse_once(Call::Copy, 0, libc::ENOMEM);
    drop(bar);
    assert!(rig.mapped().is_empty());
    rig.commands(&[pages(PageRange::Everything)]);
    assert_eq!(rig.mapped(), [(BASE, 0x1000)]);
}

#[test]
fn memory_that_the_host_does_not_map_is_no_matter_for_the_shadow() {
    let rig = Rig::attached();
    rig.map(0, BAR);
    rig.commands(&[pages(PageRange::Everything)]);
    rig.kernel.refuse(Call::MapFile, libc::EOPNOTSUPP);
    assert!(rig.share_some(BAR, 0x1000).is_err());
    rig.commands(&[pages(PageRange::Everything)]);
    assert!(rig.mapped().is_empty() && !rig.unit.asked.load(Ordering::Relaxed));
}
