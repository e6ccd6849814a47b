//! The translation cache by itself: tags, invalidation, replacement.

use super::*;

const HOST: Key = Key {
    domain: 1,
    space: Space::Host,
};

fn leaf(base: u64, shift: u32) -> Leaf {
    Leaf {
        base,
        shift,
        allowed: Access::BOTH,
        user: true,
        settled: true,
        untranslated_only: false,
    }
}

fn guest(pasid: u32, nested: bool) -> Key {
    let pasid = Pasid::new(pasid).expect("20 bits");
    Key {
        domain: 1,
        space: Space::Guest { pasid, nested },
    }
}

fn keep(cache: &Iotlb, key: Key, at: u64, leaf: Leaf) {
    cache.keep(cache.ticket(), key, at, &leaf);
}

fn target(cache: &Iotlb, key: Key, at: u64) -> Option<u64> {
    cache
        .find(cache.seen(key), at, Access::BOTH, true)
        .map(|hit| hit.target)
}

fn page(at: u64) -> PageRange {
    PageRange::decode(at >> 12, false)
}

#[test]
fn a_kept_page_is_found_up_to_its_end() {
    let cache = Iotlb::new(SETS);
    for (shift, granule) in [
        (12, 12),
        (14, 12),
        (16, 16),
        (20, 16),
        (21, 21),
        (25, 21),
        (30, 30),
        (38, 30),
    ] {
        let key = Key {
            domain: u16::try_from(shift).expect("small"),
            space: Space::Host,
        };
        let at = (7 << shift) + 0x123;
        keep(&cache, key, at, leaf(1 << 40, shift));
        let hit = cache.find(cache.seen(key), at, Access::READ, true).expect("kept");
        assert_eq!(
            (hit.target, hit.run),
            ((1 << 40) + 0x123, (1 << granule) - 0x123),
            "{shift}"
        );
        assert_eq!(target(&cache, key, at + (1 << shift)), None, "{shift}");
    }
}

#[test]
fn translations_belong_to_one_domain_and_one_space() {
    let cache = Iotlb::new(SETS);
    keep(&cache, HOST, 0x1000, leaf(0x5000, 12));
    keep(&cache, guest(1, false), 0x1000, leaf(0x6000, 12));
    let other = Key { domain: 2, ..HOST };
    assert_eq!(target(&cache, HOST, 0x1000), Some(0x5000));
    assert_eq!(target(&cache, guest(1, false), 0x1000), Some(0x6000));
    for key in [other, guest(0, false), guest(2, false), guest(1, true)] {
        assert_eq!(target(&cache, key, 0x1000), None, "{key:?}");
    }
}

#[test]
fn what_a_page_does_not_allow_is_walked_again() {
    let cache = Iotlb::new(SETS);
    let read_only = Leaf {
        allowed: Access::READ,
        ..leaf(0x5000, 12)
    };
    keep(&cache, HOST, 0x1000, read_only);
    assert!(cache.find(cache.seen(HOST), 0x1000, Access::READ, true).is_some());
    assert!(
        cache
            .find(cache.seen(HOST), 0x1000, Access::WRITE, true)
            .is_none()
    );
    let unmarked = Leaf {
        settled: false,
        ..leaf(0x5000, 12)
    };
    keep(&cache, HOST, 0x1000, unmarked);
    assert!(cache.find(cache.seen(HOST), 0x1000, Access::READ, true).is_some());
    assert!(
        cache
            .find(cache.seen(HOST), 0x1000, Access::WRITE, true)
            .is_none()
    );
    let supervisor = Leaf {
        user: false,
        ..leaf(0x5000, 12)
    };
    keep(&cache, HOST, 0x1000, supervisor);
    assert!(
        cache
            .find(cache.seen(HOST), 0x1000, Access::WRITE, false)
            .is_some()
    );
    assert!(
        cache
            .find(cache.seen(HOST), 0x1000, Access::WRITE, true)
            .is_none()
    );
}

#[test]
fn an_invalidated_page_is_gone_and_its_neighbours_stay() {
    let cache = Iotlb::new(SETS);
    (0..8).for_each(|n| keep(&cache, HOST, n << 12, leaf(0x10_0000 + (n << 12), 12)));
    cache.invalidate_pages(1, None, page(0x3000));
    let left: Vec<_> = (0..8)
        .filter(|n| target(&cache, HOST, n << 12).is_some())
        .collect();
    assert_eq!(left, [0, 1, 2, 4, 5, 6, 7]);
}

#[test]
fn invalidating_a_part_of_a_page_drops_all_of_it() {
    for shift in [13, 15, 16, 20, 21, 24, 30] {
        let cache = Iotlb::new(SETS);
        let pages = [0, (1 << shift) - 0x1000];
        pages
            .iter()
            .for_each(|at| keep(&cache, HOST, *at, leaf(1 << 40, shift)));
        keep(&cache, HOST, 1 << shift, leaf(1 << 41, shift));
        cache.invalidate_pages(1, None, page(0x1000));
        assert_eq!(pages.map(|at| target(&cache, HOST, at)), [None, None], "{shift}");
        assert_eq!(target(&cache, HOST, 1 << shift), Some(1 << 41), "{shift}");
    }
}

#[test]
fn an_invalidation_of_one_space_leaves_the_other() {
    let cache = Iotlb::new(SETS);
    let keys = [HOST, guest(0, false), guest(5, false)];
    keys.iter()
        .for_each(|key| keep(&cache, *key, 0x1000, leaf(0x5000, 12)));
    cache.invalidate_pages(1, Pasid::new(5), page(0x1000));
    assert_eq!(
        keys.map(|key| target(&cache, key, 0x1000).is_some()),
        [true, true, false]
    );
}

#[test]
fn an_invalidation_that_names_no_space_is_about_all_of_them() {
    let spaces = [vec![0], vec![5], vec![0, 5]];
    for pasids in spaces {
        let cache = Iotlb::new(SETS);
        let guests = pasids.iter().map(|pasid| guest(*pasid, false));
        let keys: Vec<_> = guests.chain([HOST]).collect();
        keys.iter()
            .for_each(|key| keep(&cache, *key, 0x1000, leaf(0x5000, 12)));
        cache.invalidate_pages(1, None, page(0x1000));
        for key in keys {
            assert_eq!(target(&cache, key, 0x1000), None, "{key:?} of {pasids:?}");
        }
    }
}

#[test]
fn pages_beside_those_invalidated_stay_in_host_tables_and_in_pasid_0() {
    let cache = Iotlb::new(SETS);
    let other = Key {
        domain: 2,
        ..guest(5, false)
    };
    for key in [HOST, guest(0, false), other] {
        keep(&cache, key, 0x1000, leaf(0x5000, 12));
        keep(&cache, key, 0x2000, leaf(0x6000, 12));
    }
    cache.invalidate_pages(1, None, page(0x1000));
    let left = |key| [0x1000, 0x2000].map(|at| target(&cache, key, at).is_some());
    assert_eq!([HOST, guest(0, false)].map(left), [[false, true]; 2]);
    assert_eq!(left(other), [true, true], "of another domain");
}

#[test]
fn invalidating_the_host_table_drops_what_is_nested_over_it() {
    let cache = Iotlb::new(SETS);
    keep(&cache, guest(5, true), 0x7_0000, leaf(0x5000, 12));
    cache.invalidate_pages(1, None, page(0x1000));
    assert_eq!(target(&cache, guest(5, true), 0x7_0000), None);
}

#[test]
fn a_long_range_and_everything_drop_the_domain_in_every_space() {
    let ranges = [
        PageRange::Everything,
        PageRange::Span {
            first: 0,
            last: u64::MAX >> 13,
        },
    ];
    for range in ranges {
        let cache = Iotlb::new(SETS);
        keep(&cache, HOST, 0x1000, leaf(0x5000, 12));
        keep(&cache, guest(0, false), 0x1000, leaf(0x5000, 12));
        cache.invalidate_pages(1, None, range);
        assert_eq!(target(&cache, HOST, 0x1000), None, "{range:?}");
        assert_eq!(target(&cache, guest(0, false), 0x1000), None, "{range:?}");
    }
}

#[test]
fn the_last_page_of_the_address_space_can_be_kept_and_dropped() {
    let cache = Iotlb::new(SETS);
    let last = 0xffff_ffff_ffff_f000;
    keep(&cache, HOST, last, leaf(0x5000, 12));
    assert_eq!(target(&cache, HOST, last + 0xfff), Some(0x5fff));
    cache.invalidate_pages(1, None, page(last));
    assert_eq!(target(&cache, HOST, last), None);
}

#[test]
fn a_walk_that_an_invalidation_overtook_is_not_kept() {
    let invalidations: [fn(&Iotlb); 3] = [
        |cache| cache.invalidate_pages(1, None, page(0x9000)),
        |cache| cache.invalidate_domain(1),
        |cache| cache.invalidate_all(),
    ];
    for invalidate in invalidations {
        let cache = Iotlb::new(SETS);
        let ticket = cache.ticket();
        invalidate(&cache);
        cache.keep(ticket, HOST, 0x1000, &leaf(0x5000, 12));
        assert_eq!(target(&cache, HOST, 0x1000), None);
    }
}

#[test]
fn the_cache_holds_no_more_than_it_was_made_for() {
    let cache = Iotlb::new(4);
    (0..1000).for_each(|n| keep(&cache, HOST, n << 12, leaf(n << 12, 12)));
    let found = (0..1000)
        .filter(|n| target(&cache, HOST, n << 12).is_some())
        .count();
    assert!((1..=8).contains(&found), "{found}");
}

#[test]
fn who_saw_a_space_before_its_domain_went_finds_it_and_who_looks_anew_does_not() {
    let cache = Iotlb::new(SETS);
    keep(&cache, HOST, 0x1000, leaf(0x5000, 12));
    keep(&cache, HOST, 0x2000, leaf(0x6000, 12));
    let before = cache.seen(HOST);
    cache.invalidate_pages(HOST.domain, None, page(0x1000));
    cache.invalidate_domain(HOST.domain);
    let found = |seen, at| cache.find(seen, at, Access::BOTH, true).map(|hit| hit.target);
    assert_eq!(found(before, 0x1000), None, "pages are gone for everybody");
    assert_eq!(found(before, 0x2000), Some(0x6000));
    assert_eq!(found(cache.seen(HOST), 0x2000), None);
    // What is kept from here on is not of that moment.
    keep(&cache, HOST, 0x2000, leaf(0x7000, 12));
    assert_eq!(found(before, 0x2000), None);
    assert_eq!(found(cache.seen(HOST), 0x2000), Some(0x7000));
}
