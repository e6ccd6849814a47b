//! Walks of single tables, entry by entry; random tables are in `tests/iommu`.

use super::*;
use crate::platform::memory::GuestRam;
use vm_memory::{GuestAddress, GuestMemoryMmap};

const ROOT: u64 = 0x1_0000;

fn ram() -> GuestRam {
    let ranges = [(GuestAddress(0), 0x10_0000)];
    GuestRam::new(GuestMemoryMmap::from_ranges(&ranges).expect("a small mapping"))
}

fn host(levels: u8) -> HostTable {
    HostTable {
        root: Gpa(ROOT),
        levels,
        track: Track::default(),
    }
}

fn entry(address: u64, next_level: u8) -> HostPte {
    HostPte::new()
        .with_pr(true)
        .with_ir(true)
        .with_iw(true)
        .with_next_level(next_level)
        .with_frame(address >> 12)
}

fn put(ram: &GuestRam, table: u64, index: u64, entry: HostPte) {
    SystemMemory::store(ram, Gpa(table + index * 8), entry.into_bits()).expect("inside");
}

fn why(outcome: Result<Leaf, Stopped>) -> Why {
    outcome.expect_err("no page").why
}

#[test]
fn a_page_entry_at_every_level_but_the_sixth_has_the_size_of_its_level() {
    for level in 1..=5_u8 {
        let ram = ram();
        put(&ram, ROOT, 1, entry(0, 0));
        let at = (1 << span(level)) + 0x123;
        let leaf = host(level).walk(&ram, at, Access::READ).expect("mapped");
        assert_eq!(
            (leaf.shift, leaf.target(at)),
            (12 + 9 * (u32::from(level) - 1), 0x123),
            "{level}"
        );
    }
    let ram = ram();
    put(&ram, ROOT, 1, entry(0, 0));
    assert_eq!(why(host(6).walk(&ram, 1 << 57, Access::READ)), Why::Malformed);
}

#[test]
fn the_lowest_clear_address_bit_gives_the_size() {
    // 64 KiB in level 1, 4 MiB in level 2: bits 15:12 are 0111, bits 21:12 are 01_1111_1111.
    for (levels, code, shift) in [(1, 0x4_7000, 16), (2, 0x41f_f000, 22), (1, 0x7_f000, 20)] {
        let ram = ram();
        put(&ram, ROOT, 0, entry(code, 7));
        let leaf = host(levels).walk(&ram, 0xabc, Access::READ).expect("mapped");
        assert_eq!(leaf.shift, shift, "{code:#x}");
        assert_eq!(leaf.base, code & !((1 << shift) - 1), "{code:#x}");
    }
}

#[test]
fn a_size_that_belongs_to_another_level_is_malformed() {
    // 2 MiB by code in level 1, 2 MiB by code in level 2, and all ones.
    for (levels, code) in [
        (1, 0xf_f000),
        (2, 0xf_f000),
        (1, 0x000f_ffff_ffff_f000),
        (5, 0x000f_ffff_ffff_f000),
    ] {
        let ram = ram();
        put(&ram, ROOT, 0, entry(code, 7));
        assert_eq!(
            why(host(levels).walk(&ram, 0, Access::READ)),
            Why::Malformed,
            "{code:#x}"
        );
    }
}

#[test]
fn skipped_levels_need_a_zero_index() {
    let ram = ram();
    put(&ram, ROOT, 0, entry(0x2_0000, 1));
    put(&ram, 0x2_0000, 3, entry(0x5000, 0));
    let leaf = host(4).walk(&ram, 0x3abc, Access::BOTH).expect("mapped");
    assert_eq!(leaf.target(0x3abc), 0x5abc);
    for bit in 21..=38 {
        assert_eq!(
            why(host(4).walk(&ram, 0x3000 | 1 << bit, Access::READ)),
            Why::Malformed,
            "{bit}"
        );
    }
}

#[test]
fn a_table_that_points_at_its_own_level_or_above_is_malformed() {
    for next in [2, 3, 6] {
        let ram = ram();
        put(&ram, ROOT, 0, entry(ROOT, next));
        assert_eq!(why(host(2).walk(&ram, 0, Access::READ)), Why::Malformed, "{next}");
    }
}

#[test]
fn an_address_wider_than_the_table_is_not_mapped() {
    for levels in 1..=5 {
        let ram = ram();
        put(&ram, ROOT, 0, entry(0x5000, 0));
        let beyond = 1 << span(levels + 1);
        assert_eq!(
            why(host(levels).walk(&ram, beyond, Access::READ)),
            Why::NotPresent,
            "{levels}"
        );
        assert_eq!(
            why(host(levels).walk(&ram, 1 << 63, Access::READ)),
            Why::NotPresent,
            "{levels}"
        );
    }
}

#[test]
fn the_sixth_level_has_seven_index_bits() {
    let ram = ram();
    put(&ram, ROOT, 127, entry(0x2_0000, 5));
    put(&ram, 0x2_0000, 0, entry(0, 0));
    let leaf = host(6).walk(&ram, 127 << 57 | 5, Access::READ).expect("mapped");
    assert_eq!(leaf.target(127 << 57 | 5), 5);
}

#[test]
fn permissions_are_those_of_every_entry_on_the_way() {
    let ram = ram();
    put(&ram, ROOT, 0, entry(0x2_0000, 1).with_iw(false));
    put(&ram, 0x2_0000, 0, entry(0x5000, 0));
    assert_eq!(
        host(2).walk(&ram, 0, Access::READ).map(|leaf| leaf.allowed),
        Ok(Access::READ)
    );
    assert_eq!(why(host(2).walk(&ram, 0, Access::WRITE)), Why::Denied);
    put(&ram, 0x2_0000, 0, entry(0x5000, 0).with_ir(false));
    assert_eq!(
        host(2).walk(&ram, 0, Access::NONE).map(|leaf| leaf.allowed),
        Ok(Access::NONE)
    );
}

#[test]
fn reserved_bits_of_a_present_entry_are_found_before_its_permissions() {
    for bit in 52..=56 {
        let ram = ram();
        put(&ram, ROOT, 0, HostPte::from_bits(1 << bit | 1));
        assert_eq!(why(host(1).walk(&ram, 0, Access::READ)), Why::Reserved, "{bit}");
        put(&ram, ROOT, 0, HostPte::from_bits(1 << bit));
        assert_eq!(why(host(1).walk(&ram, 0, Access::READ)), Why::NotPresent, "{bit}");
    }
    let ram = ram();
    put(&ram, ROOT, 0, entry(0x2_0000, 1).with_fc(true));
    assert_eq!(why(host(2).walk(&ram, 0, Access::READ)), Why::Reserved);
}

#[test]
fn an_entry_outside_memory_is_reported_with_its_address() {
    let ram = ram();
    put(&ram, ROOT, 0, entry(0x000f_ffff_ffff_f000, 1));
    let slot = Gpa(0x000f_ffff_ffff_f000 + 8);
    assert_eq!(
        why(host(2).walk(&ram, 0x1000, Access::READ)),
        Why::Unreadable(slot)
    );
}

#[test]
fn host_marks_are_left_only_when_asked_for_and_only_by_success() {
    let ram = ram();
    let track = Track {
        accessed: true,
        dirty: true,
    };
    let tracked = HostTable { track, ..host(2) };
    put(&ram, ROOT, 0, entry(0x2_0000, 1));
    put(&ram, 0x2_0000, 0, entry(0x5000, 0));
    let bits = |at| SystemMemory::load(&ram, Gpa(at)).expect("inside") & 0x60;
    let _ = host(2).walk(&ram, 0, Access::WRITE);
    let _ = tracked.walk(&ram, 0x1000, Access::READ);
    assert_eq!((bits(ROOT), bits(0x2_0000)), (0, 0));
    let leaf = tracked.walk(&ram, 0, Access::READ).expect("mapped");
    assert_eq!((bits(ROOT), bits(0x2_0000), leaf.settled), (0x20, 0x20, false));
    let leaf = tracked.walk(&ram, 0, Access::WRITE).expect("mapped");
    assert_eq!((bits(ROOT), bits(0x2_0000), leaf.settled), (0x20, 0x60, true));
}

fn guest(levels: u8) -> GuestTable {
    GuestTable {
        gcr3: ROOT,
        glx: 0,
        pasid: Pasid::ZERO,
        levels,
        signed: true,
        user: true,
        track: Track::default(),
        host: None,
        root_is_guest: false,
    }
}

fn link(ram: &GuestRam, at: u64, value: u64) {
    SystemMemory::store(ram, Gpa(at), value).expect("inside");
}

#[test]
fn addresses_are_canonical_with_a_pasid_and_unsigned_without() {
    for (levels, width) in [(4, 48), (5, 57)] {
        let signed = guest(levels);
        assert!(signed.holds((1 << (width - 1)) - 1), "{levels}");
        assert!(!signed.holds(1 << (width - 1)), "{levels}");
        assert!(signed.holds(u64::MAX << (width - 1)), "{levels}");
        let unsigned = GuestTable {
            signed: false,
            ..signed
        };
        assert!(unsigned.holds((1 << width) - 1), "{levels}");
        assert!(!unsigned.holds(1 << width), "{levels}");
        assert!(!unsigned.holds(u64::MAX), "{levels}");
    }
}

#[test]
fn each_gcr3_level_takes_nine_pasid_bits() {
    for (glx, pasid) in [(0, 0x1ff), (1, 0x3_ffff), (2, 0xf_ffff)] {
        let ram = ram();
        let pasid = Pasid::new(pasid).expect("20 bits");
        let table = GuestTable {
            glx,
            pasid,
            ..guest(4)
        };
        let index = |level| u64::from(pasid.value()) >> (9 * level) & 0x1ff;
        let last = (0..glx).rev().fold(ROOT, |at, level| {
            link(&ram, at + index(level + 1) * 8, (at + 0x1000) | 1);
            at + 0x1000
        });
        link(&ram, last + index(0) * 8, 0x8_0001);
        assert_eq!(table.root(&ram), Ok(0x8_0000), "{glx}");
    }
}

#[test]
fn a_pasid_beyond_the_gcr3_table_is_not_mapped() {
    for (glx, pasid) in [(0, 0x200), (1, 0x4_0000)] {
        let pasid = Pasid::new(pasid).expect("20 bits");
        let table = GuestTable {
            glx,
            pasid,
            ..guest(4)
        };
        assert_eq!(table.root(&ram()), Err(Stopped::guest(Why::NotPresent)), "{glx}");
    }
}

/// A GCR3 table and four levels that map address 0 to 0x5000 through tables from 0x2_0000 on.
fn four_levels(ram: &GuestRam, leaf: u64) {
    link(ram, ROOT, 0x2_0001);
    for level in 0..3 {
        link(ram, 0x2_0000 + level * 0x1000, (0x2_1000 + level * 0x1000) | 7);
    }
    link(ram, 0x2_3000, leaf);
}

#[test]
fn a_guest_page_is_readable_when_present_and_writable_when_every_level_says_so() {
    let ram = ram();
    four_levels(&ram, 0x5007);
    let leaf = guest(4).walk(&ram, 0x123, Access::BOTH).expect("mapped");
    assert_eq!(
        (leaf.target(0x123), leaf.shift, leaf.allowed),
        (0x5123, 12, Access::BOTH)
    );
    link(&ram, 0x2_1000, 0x2_2005);
    assert_eq!(
        guest(4).walk(&ram, 0, Access::READ).map(|leaf| leaf.allowed),
        Ok(Access::READ)
    );
    assert_eq!(why(guest(4).walk(&ram, 0, Access::WRITE)), Why::Denied);
}

#[test]
fn a_user_request_needs_every_level_to_be_the_users() {
    let ram = ram();
    four_levels(&ram, 0x5003);
    assert_eq!(why(guest(4).walk(&ram, 0, Access::READ)), Why::Supervisor);
    let privileged = GuestTable {
        user: false,
        ..guest(4)
    };
    assert_eq!(
        privileged.walk(&ram, 0, Access::READ).map(|leaf| leaf.user),
        Ok(false)
    );
}

#[test]
fn large_guest_pages_exist_at_levels_two_and_three_only() {
    let ram = ram();
    four_levels(&ram, 0x5007);
    link(&ram, 0x2_2000, 0x0060_0087);
    assert_eq!(
        guest(4)
            .walk(&ram, 0, Access::READ)
            .map(|leaf| (leaf.base, leaf.shift)),
        Ok((0x60_0000, 21))
    );
    link(&ram, 0x2_1000, 0x4000_0087);
    assert_eq!(
        guest(4)
            .walk(&ram, 0, Access::READ)
            .map(|leaf| (leaf.base, leaf.shift)),
        Ok((1 << 30, 30))
    );
    link(&ram, 0x2_0000, 0x87);
    assert_eq!(why(guest(4).walk(&ram, 0, Access::READ)), Why::Reserved);
}

#[test]
fn guest_marks_are_left_unless_suppressed() {
    let ram = ram();
    four_levels(&ram, 0x5007);
    let track = Track {
        accessed: true,
        dirty: true,
    };
    let bits = |at| SystemMemory::load(&ram, Gpa(at)).expect("inside") & 0x60;
    let _ = guest(4).walk(&ram, 0, Access::WRITE);
    assert_eq!((bits(0x2_0000), bits(0x2_3000)), (0, 0));
    let leaf = GuestTable { track, ..guest(4) }.walk(&ram, 0, Access::WRITE);
    assert_eq!((bits(0x2_0000), bits(0x2_3000)), (0x20, 0x60));
    assert_eq!(leaf.map(|leaf| leaf.settled), Ok(true));
}

#[test]
fn a_guest_table_over_a_host_table_meets_the_hosts_limits() {
    let ram = ram();
    four_levels(&ram, 0x5007);
    link(&ram, 0x2_2000, 0x0000_0087);
    // The host maps the first 2 MiB to themselves in 4 KiB pages, and page 5 read-only elsewhere.
    put(&ram, 0x4_0000, 0, entry(0x4_1000, 1));
    (0..256).for_each(|page| put(&ram, 0x4_1000, page, entry(page << 12, 0)));
    put(&ram, 0x4_1000, 5, entry(0x9000, 0).with_iw(false));
    let nested = GuestTable {
        host: Some(HostTable {
            root: Gpa(0x4_0000),
            levels: 2,
            track: Track::default(),
        }),
        ..guest(4)
    };
    let leaf = nested.walk(&ram, 0x5123, Access::READ).expect("mapped");
    assert_eq!(
        (leaf.target(0x5123), leaf.shift, leaf.allowed),
        (0x9123, 12, Access::READ)
    );
    let stopped = nested
        .walk(&ram, 0x5123, Access::WRITE)
        .expect_err("read-only below");
    assert_eq!(
        stopped,
        Stopped {
            why: Why::Denied,
            host: Some(0x5123)
        }
    );
    put(&ram, 0x4_1000, 0x22, HostPte::new());
    let stopped = nested
        .walk(&ram, 0x6000, Access::READ)
        .expect_err("the table is gone");
    assert_eq!(
        stopped,
        Stopped {
            why: Why::NotPresent,
            host: Some(0x2_2000)
        }
    );
}
