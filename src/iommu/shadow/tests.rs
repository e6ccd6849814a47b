//! Guests that map and unmap, and what their functions reach at the host then.

mod limits;
mod refused;
mod shared;

use std::collections::BTreeSet;
use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use proptest::prelude::*;
use vm_memory::{GuestAddress, GuestMemoryMmap};

use super::*;
use crate::iommu::amd::walk::{GuestTable, HostTable, Track};
use crate::iommu::iommufd::testing::{Call, Function, Host as Kernel};
use crate::iommu::iommufd::{Attach as _, Memlock};
use crate::platform::addr::{Gpa, Sbdf};
use crate::platform::dma::Requester;

const MIB: u64 = 1 << 20;
/// A table of level 2, of which entry 1 names one of level 1.
const UPPER: u64 = 0x1000;
const LOWER: u64 = 0x2000;
/// The first address that the lower table maps.
const BASE: u64 = 2 * MIB;
const LEAF: u64 = 1 << 62 | 1 << 61 | 1;
const DOMAIN: u16 = 7;
/// What four levels map.
const LAST: u64 = (1 << 48) - 1;

/// What the unit would say of each function.
#[derive(Default)]
struct Unit {
    views: Mutex<Vec<View>>,
    /// What it was to tell the guest: the device's number, the address, and whether it was to be written.
    told: Mutex<Vec<(u16, u64, bool)>>,
    /// Of which devices it was to say that they reach nothing.
    blocked: Mutex<Vec<u16>>,
    /// To have its followers settle.
    asked: AtomicBool,
}

impl Views for Unit {
    fn view(&self, device: Bdf) -> View {
        let views = self.views.lock().expect("a test's own");
        let at = usize::from(device.requester_id());
        views.get(at).copied().unwrap_or(View::Nothing)
    }

    fn absent(&self, device: Bdf, address: Iova, access: Access) {
        let mut told = self.told.lock().expect("a test's own");
        told.push((device.requester_id(), address.0, access.write));
    }

    fn blocked(&self, device: Bdf) {
        let mut blocked = self.blocked.lock().expect("a test's own");
        blocked.push(device.requester_id());
    }

    fn settle_soon(&self) {
        self.asked.store(true, Ordering::Relaxed);
    }
}

/// A shadow of two functions, whose numbers are 0 and 1.
struct Rig {
    kernel: Arc<Kernel>,
    functions: [Arc<Function>; 2],
    requesters: [Arc<Requester>; 2],
    unit: Arc<Unit>,
    ram: GuestRam,
    ram_space: u32,
    space: Weak<Ioas>,
    shadow: Option<Arc<Shadow>>,
}

fn tables() -> View {
    View::Translated {
        domain: DOMAIN,
        allowed: Access::BOTH,
        tables: Tables::Host(HostTable {
            root: Gpa(UPPER),
            levels: 2,
            track: Track::default(),
        }),
    }
}

const fn device(number: u16) -> Bdf {
    Bdf::from_requester_id(number)
}

fn at(number: u16) -> Sbdf {
    Sbdf {
        segment: 0,
        bdf: device(number),
    }
}

impl Rig {
    fn new() -> Self {
        Self::reaching(&[0..=u64::MAX])
    }

    /// On a host that lets devices be in `windows`.
    fn reaching(windows: &[RangeInclusive<u64>]) -> Self {
        Self::limited(windows, Limits::DEFAULT)
    }

    /// The same whose shadow goes as far as `limits` say.
    fn limited(windows: &[RangeInclusive<u64>], limits: Limits) -> Self {
        let kernel = Kernel::new();
        // Two regions side by side, and a hole.
        let ranges = [(GuestAddress(0), 6 << 20), (GuestAddress(6 << 20), 2 << 20)];
        let ram = GuestRam::new(GuestMemoryMmap::from_ranges(&ranges).expect("8 MiB"));
        let space = Arc::new(Ioas::new(kernel.clone(), ram.clone()).expect("made"));
        let functions = [kernel.function(), kernel.function()];
        for function in &functions {
            function.attach(space.id()).expect("attached");
        }
        space.map_ram(Memlock { limit: None }).expect("mapped");
        kernel.set_windows(windows);
        let ram_space = space.id();
        let identity = View::Identity(Access::BOTH);
        let unit = Arc::new(Unit {
            views: Mutex::new(vec![identity; 2]),
            ..Unit::default()
        });
        let views: Weak<dyn Views> = Arc::downgrade(&unit) as Weak<dyn Views>;
        let requesters = [0, 1].map(|number| Arc::new(Requester::new(at(number))));
        let behind = |number: usize| -> (Arc<Requester>, Arc<dyn Silence>) {
            (requesters[number].clone(), functions[number].clone())
        };
        let weak = Arc::downgrade(&space);
        let shadow = Shadow::new(ShadowParts {
            name: "iommu0".to_owned(),
            unit: views,
            requests: kernel.clone(),
            space,
            ram: ram.clone(),
            last: LAST,
            limits,
            functions: vec![behind(0), behind(1)],
        });
        let shadow = Arc::new(shadow.expect("made"));
        let space = weak.upgrade().expect("the shadow has it");
        space.tell(Arc::downgrade(&shadow) as Weak<dyn Copies>);
        let rig = Self {
            kernel,
            functions,
            requesters,
            unit,
            ram,
            ram_space,
            space: weak,
            shadow: Some(shadow),
        };
        rig.put(UPPER + 8, LEAF | 1 << 9 | LOWER);
        rig
    }

    /// One whose first function is in the domain.
    fn attached() -> Self {
        let rig = Self::new();
        rig.view(0, tables());
        rig
    }

    fn put(&self, at: u64, value: u64) {
        self.ram.write_obj(Gpa(at), &value).expect("RAM");
    }

    /// Page `page` from [`BASE`] on leads to `target`.
    fn map(&self, page: u64, target: u64) {
        self.put(LOWER + page * 8, LEAF | target);
    }

    fn unmap(&self, page: u64) {
        self.put(LOWER + page * 8, 0);
    }

    fn shadow(&self) -> &Shadow {
        self.shadow.as_ref().expect("not ended")
    }

    /// Obey, and wait as COMPLETION_WAIT does.
    fn commands(&self, batch: &[Command]) {
        self.shadow().follow(batch).expect("it answers");
        while !self.settle() {}
    }

    /// Settle as far as one call goes.
    fn settle(&self) -> bool {
        self.shadow().settle(&mut Effort::of_a_call())
    }

    fn invalidate(&self, first: u64, last: u64) {
        self.commands(&[pages(PageRange::Span { first, last })]);
    }

    /// Invalidate page `page` from [`BASE`] on.
    fn invalidate_page(&self, page: u64) {
        let first = BASE + (page << 12);
        self.invalidate(first, first | 0xfff);
    }

    /// The entry of function `number` changes.
    fn view(&self, number: u16, view: View) {
        self.unit.views.lock().expect("a test's own")[usize::from(number)] = view;
        self.commands(&[Command::InvalidateDevice {
            device: device(number),
        }]);
    }

    /// What the guest was told since the last call.
    fn told(&self) -> Vec<(u16, u64, bool)> {
        std::mem::take(&mut self.unit.told.lock().expect("a test's own"))
    }

    /// Which devices reach nothing, as the guest was told since the last call.
    fn blocked(&self) -> Vec<u16> {
        std::mem::take(&mut self.unit.blocked.lock().expect("a test's own"))
    }

    fn reaches(&self, iova: u64) -> Option<u64> {
        self.functions[0].reaches(iova).map(|(target, _)| target)
    }

    fn mapped(&self) -> Vec<(u64, u64)> {
        self.kernel.mapped(self.functions[0].place().expect("attached"))
    }
}

const fn pages(pages: PageRange) -> Command {
    Command::InvalidatePages {
        domain: DOMAIN,
        space: None,
        pages,
        tables: true,
    }
}

#[test]
fn an_unfollowed_function_reaches_guest_ram_and_a_blocked_one_nothing() {
    let rig = Rig::new();
    assert_eq!(rig.reaches(0x5000), Some(0x5000));
    rig.view(0, View::Nothing);
    assert_eq!(rig.reaches(0x5000), None);
    assert!(rig.mapped().is_empty());
    assert_eq!(rig.functions[1].place(), Some(rig.ram_space));
    rig.view(0, View::Identity(Access::BOTH));
    assert_eq!(rig.functions[0].place(), Some(rig.ram_space));
    assert_eq!(rig.kernel.count(Call::Detach), 0);
}

#[test]
fn a_function_whose_bus_was_renumbered_follows_the_entry_of_its_new_number() {
    let rig = Rig::new();
    rig.requesters[0].renumber(at(1));
    rig.requesters[1].renumber(at(0));
    rig.view(0, View::Nothing);
    assert_eq!(rig.reaches(0x5000), Some(0x5000));
    assert_ne!(rig.functions[1].place(), Some(rig.ram_space));
}

#[test]
fn a_function_that_is_renumbered_has_what_its_new_numbers_entry_said_before() {
    let rig = Rig::new();
    let elsewhere = |number: u16, view| {
        let mut views = rig.unit.views.lock().expect("a test's own");
        views.resize(6, View::Nothing);
        views[usize::from(number)] = view;
    };
    // Entries that the guest announced while nobody had those numbers.
    for (number, view) in [(4, tables()), (5, View::Nothing)] {
        elsewhere(number, view);
        rig.commands(&[Command::InvalidateDevice {
            device: device(number),
        }]);
    }
    rig.map(0, 0x40_0000);
    let identity = rig.functions[1].place();
    rig.requesters[0].renumber(at(4));
    rig.shadow().renumbered();
    while !rig.shadow().settle(&mut Effort::of_a_call()) {}
    assert_eq!((rig.reaches(BASE), rig.reaches(0x5000)), (Some(0x40_0000), None));
    assert_eq!(rig.functions[1].place(), identity);
    rig.requesters[0].renumber(at(5));
    rig.shadow().renumbered();
    assert_eq!((rig.reaches(BASE), rig.reaches(0x5000)), (None, None));
    // Nobody's number any more.
    elsewhere(0, tables());
    rig.commands(&[Command::InvalidateDevice { device: device(0) }]);
    assert_eq!(rig.reaches(BASE), None);
    rig.requesters[0].renumber(at(1));
    rig.shadow().renumbered();
    assert_eq!(rig.reaches(0x5000), Some(0x5000));
}

#[test]
fn a_function_that_is_renumbered_is_blocked_until_more_than_a_step_of_tables_was_read() {
    let rig = Rig::attached();
    rig.map(0, 0x40_0000);
    rig.invalidate_page(0);
    assert_eq!(rig.reaches(BASE), Some(0x40_0000));
    let place = rig.functions[0].place();
    // As many tables of the second level as there are entries, of which each wants to be looked at.
    (0..256).for_each(|entry| rig.put(0x5000 + 8 * entry, LEAF | 1 << 9 | LOWER));
    rig.put(0x4000, LEAF | 2 << 9 | 0x5000);
    let large = View::Translated {
        domain: DOMAIN + 1,
        allowed: Access::BOTH,
        tables: Tables::Host(HostTable {
            root: Gpa(0x4000),
            levels: 3,
            track: Track::default(),
        }),
    };
    rig.unit.views.lock().expect("a test's own").extend([large; 3]);
    rig.requesters[0].renumber(at(4));
    rig.shadow().renumbered();
    assert_ne!(rig.functions[0].place(), place, "not a moment longer");
    assert!(
        rig.unit.asked.load(Ordering::Relaxed),
        "no processor does all of it"
    );
    assert_eq!(rig.reaches(BASE), None);
    while !rig.shadow().settle(&mut Effort::of_a_call()) {}
    assert_eq!(rig.reaches(0), Some(0x40_0000));
}

#[test]
fn nothing_is_mapped_any_more_for_a_function_that_left() {
    let rig = Rig::attached();
    rig.map(0, 0x40_0000);
    rig.invalidate_page(0);
    let (spaces, other) = (rig.kernel.spaces().len(), rig.functions[1].place());
    rig.shadow().left(&rig.requesters[0]);
    assert_eq!((rig.reaches(BASE), rig.reaches(0x5000)), (None, None));
    assert_eq!(rig.kernel.spaces().len(), spaces - 1);
    // The host has it back.
    rig.functions[0].detach().expect("attached");
    let asked = (rig.kernel.count(Call::Attach), rig.kernel.count(Call::Copy));
    rig.map(1, 0x50_0000);
    rig.invalidate_page(1);
    rig.view(0, View::Identity(Access::BOTH));
    rig.view(0, tables());
    assert_eq!(
        (rig.kernel.count(Call::Attach), rig.kernel.count(Call::Copy)),
        asked
    );
    assert_eq!(
        (rig.kernel.spaces().len(), rig.functions[1].place()),
        (spaces - 1, other)
    );
    // The others are followed as before.
    rig.view(1, tables());
    assert_eq!(rig.functions[1].reaches(BASE), Some((0x40_0000, Access::BOTH)));
}

#[test]
fn identity_in_one_direction_is_a_space_of_its_own() {
    let rig = Rig::new();
    rig.view(0, View::Identity(Access::READ));
    assert_eq!(rig.functions[0].reaches(0x5000), Some((0x5000, Access::READ)));
    assert_eq!(rig.mapped(), [(0, 6 * MIB), (6 * MIB, 2 * MIB)]);
}

#[test]
fn a_contiguous_run_is_one_request_and_pages_of_one_invalidation_are_merged() {
    let rig = Rig::attached();
    (0..64).for_each(|page| rig.map(page, 4 * MIB + (page << 12)));
    let half = |first: u64, len: u64| {
        pages(PageRange::Span {
            first,
            last: first + (len - 1),
        })
    };
    rig.commands(&[half(BASE, 0x2_0000), half(BASE + 0x2_0000, 0x2_0000)]);
    assert_eq!(rig.kernel.count(Call::Copy), 1);
    assert_eq!(rig.mapped(), [(BASE, 0x4_0000)]);
    rig.commands(&[pages(PageRange::Everything), Command::InvalidateAll]);
    assert_eq!(
        (rig.kernel.count(Call::Copy), rig.kernel.count(Call::Unmap)),
        (1, 0)
    );
}

#[test]
fn functions_of_one_domain_share_a_space_that_goes_with_the_last() {
    let rig = Rig::attached();
    let before = rig.kernel.spaces().len();
    rig.view(1, tables());
    assert_eq!(rig.functions[0].place(), rig.functions[1].place());
    assert_eq!(rig.kernel.spaces().len(), before);
    rig.view(0, View::Nothing);
    assert_eq!(rig.kernel.spaces().len(), before);
    rig.view(1, View::Nothing);
    assert_eq!(rig.kernel.spaces().len(), before - 1);
}

#[test]
fn what_was_there_before_the_function_came_is_mapped_when_it_comes() {
    let rig = Rig::new();
    rig.map(3, 0x5000);
    rig.view(0, tables());
    assert_eq!(rig.mapped(), [(BASE + 0x3000, 0x1000)]);
    // One request from guest RAM to there, and never detached between.
    assert_eq!(rig.kernel.count(Call::Attach), 3);
    assert_eq!(rig.kernel.count(Call::Detach), 0);
}

#[test]
fn another_domains_invalidations_change_nothing() {
    let rig = Rig::attached();
    rig.map(0, 0x5000);
    rig.commands(&[Command::InvalidatePages {
        domain: DOMAIN + 1,
        space: None,
        pages: PageRange::Everything,
        tables: true,
    }]);
    assert_eq!(rig.reaches(BASE), None);
    rig.invalidate_page(0);
    assert_eq!(rig.reaches(BASE), Some(0x5000));
}

/// The processors' tables of four levels, of PASID 0: each level's entry 0 leads to the next, the last maps pages.
fn guest_tables(rig: &Rig) -> View {
    const PRESENT: u64 = 7;
    const TABLES: u64 = 0x1_0000;
    for level in 0..4 {
        let next = TABLES + (level + 1) * 0x1000;
        rig.put(TABLES + level * 0x1000, next | PRESENT);
    }
    View::Translated {
        domain: DOMAIN,
        allowed: Access::BOTH,
        tables: Tables::Guest(GuestTable {
            gcr3: TABLES,
            glx: 0,
            pasid: Pasid::ZERO,
            levels: 4,
            signed: false,
            user: false,
            track: Track::default(),
            host: None,
            root_is_guest: false,
        }),
    }
}

#[test]
fn pages_of_the_processors_tables_follow_invalidations_that_name_no_space() {
    // The last level, whose place `guest_tables` gives.
    const LAST: u64 = 0x1_4000;
    let rig = Rig::new();
    rig.view(0, guest_tables(&rig));
    let page = |page: u64| {
        let first = page << 12;
        pages(PageRange::Span {
            first,
            last: first | 0xfff,
        })
    };
    rig.put(LAST + 3 * 8, 0x5000 | 7);
    rig.put(LAST + 4 * 8, 0x9000 | 7);
    rig.commands(&[page(3)]);
    assert_eq!((rig.reaches(0x3008), rig.reaches(0x4008)), (Some(0x5008), None));
    rig.put(LAST + 3 * 8, 0);
    rig.commands(&[page(3)]);
    assert_eq!(rig.reaches(0x3008), None);
    rig.commands(&[pages(PageRange::Everything)]);
    assert_eq!(rig.reaches(0x4008), Some(0x9008));
    rig.put(LAST + 4 * 8, 0);
    rig.commands(&[pages(PageRange::Everything)]);
    assert_eq!(rig.reaches(0x4008), None);
}

#[test]
fn class_15_a_run_over_two_regions_of_ram_is_two_requests() {
    let rig = Rig::attached();
    (0..4).for_each(|page| rig.map(page, 6 * MIB - 0x2000 + (page << 12)));
    rig.commands(&[pages(PageRange::Everything)]);
    assert_eq!(rig.mapped(), [(BASE, 0x2000), (BASE + 0x2000, 0x2000)]);
}

#[test]
fn class_17_addresses_at_the_very_end_and_targets_outside_ram_are_survived() {
    let rig = Rig::attached();
    rig.map(0, 0xf_ffff_ffff_f000);
    rig.map(1, 8 * MIB - 0x1000);
    rig.map(2, 8 * MIB);
    rig.invalidate(u64::MAX - 0xfff, u64::MAX);
    rig.invalidate(0, u64::MAX);
    assert_eq!(rig.mapped(), [(BASE + 0x1000, 0x1000)]);
}

#[test]
fn class_18_pages_become_large_and_small_again_in_any_order() {
    let rig = Rig::attached();
    let large = |target: u64| rig.put(UPPER + 8, LEAF | target);
    (0..512).for_each(|page| rig.map(page, 4 * MIB + (page << 12)));
    rig.invalidate(BASE, BASE + 0x1f_ffff);
    // The same memory by one large page: nothing to do.
    large(4 * MIB);
    rig.invalidate(BASE, BASE + 0x1f_ffff);
    assert_eq!(rig.kernel.count(Call::Copy), 1);
    // Another one, of which only a page in the middle is announced.
    large(2 * MIB);
    rig.invalidate_page(100);
    assert_eq!(rig.mapped(), [(BASE, 2 * MIB)]);
    assert_eq!(rig.reaches(BASE + 0x1f_f123), Some(4 * MIB - 0xedd));
    // Small pages again, half of them gone.
    rig.put(UPPER + 8, LEAF | 1 << 9 | LOWER);
    (256..512).for_each(|page| rig.unmap(page));
    rig.invalidate_page(300);
    assert_eq!(rig.mapped(), [(BASE, MIB)]);
    assert_eq!(rig.reaches(BASE), Some(4 * MIB));
}

#[test]
fn class_19_after_the_wait_nothing_holds_the_old_value() {
    let rig = Rig::attached();
    rig.map(0, 0x5000);
    rig.invalidate_page(0);
    rig.map(0, 0x6000);
    assert_eq!(rig.reaches(BASE), Some(0x5000));
    rig.invalidate_page(0);
    assert_eq!(rig.reaches(BASE), Some(0x6000));
    rig.put(LOWER, 1 << 61 | 1 | 0x6000);
    rig.invalidate_page(0);
    assert_eq!(rig.functions[0].reaches(BASE), Some((0x6000, Access::READ)));
    rig.unmap(0);
    rig.commands(&[Command::InvalidateAll]);
    assert_eq!(rig.reaches(BASE), None);
}

#[test]
fn class_21_at_the_end_functions_are_attached_to_nothing_and_no_space_is_left() {
    let mut rig = Rig::attached();
    rig.map(0, 0x5000);
    rig.invalidate_page(0);
    rig.shadow = None;
    assert_eq!(
        rig.functions.each_ref().map(|function| function.place()),
        [None, None]
    );
    assert!(rig.kernel.spaces().is_empty());
}

#[test]
fn a_unit_that_is_gone_blocks() {
    let mut rig = Rig::attached();
    rig.unit = Arc::default();
    rig.commands(&[Command::InvalidateAll]);
    assert!(rig.mapped().is_empty());
}

#[test]
fn one_call_does_a_bounded_part_and_the_function_stays_where_it_was_until_all_is_done() {
    let rig = Rig::new();
    // Every other page, so that each is a run.
    (0..512).step_by(2).for_each(|page| rig.map(page, 0x5000));
    [0, 2, 3]
        .into_iter()
        .for_each(|entry| rig.put(UPPER + entry * 8, LEAF | 1 << 9 | LOWER));
    rig.unit.views.lock().expect("a test's own")[0] = tables();
    let entry = Command::InvalidateDevice { device: device(0) };
    rig.shadow().follow(&[entry]).expect("it answers");
    assert!(!rig.settle());
    assert!(rig.kernel.count(Call::Copy) <= 64 * 4);
    assert_eq!(rig.functions[0].place(), Some(rig.ram_space));
    rig.commands(&[]);
    assert_eq!(rig.mapped().len(), 4 * 256);
}

/// Rig whose domain takes many calls to be filled.
fn with_much_to_do() -> Rig {
    let rig = Rig::new();
    (0..512).step_by(2).for_each(|page| rig.map(page, 0x5000));
    [0, 2, 3]
        .into_iter()
        .for_each(|entry| rig.put(UPPER + entry * 8, LEAF | 1 << 9 | LOWER));
    rig
}

#[test]
fn a_function_that_a_register_gave_other_tables_reaches_nothing_until_they_are_followed() {
    let rig = with_much_to_do();
    *rig.unit.views.lock().expect("a test's own") = vec![tables(), View::Nothing];
    rig.shadow().forget().expect("it answers");
    assert_eq!(rig.reaches(0x5000), None, "neither guest RAM");
    assert_eq!(rig.reaches(BASE), None, "nor yet what the tables say");
    assert_eq!(rig.functions[1].reaches(0x5000), None, "blocked at once");
    assert!(!rig.settle());
    assert_eq!((rig.reaches(0x5000), rig.reaches(BASE)), (None, None));
    while !rig.settle() {}
    assert_eq!((rig.reaches(0x5000), rig.reaches(BASE)), (None, Some(0x5000)));
}

#[test]
fn a_function_whose_tables_a_register_left_alone_goes_on_by_them() {
    let rig = with_much_to_do();
    rig.view(0, tables());
    let before = (rig.functions[0].place(), rig.kernel.count(Call::Attach));
    // As when the guest switches its event log off and on.
    rig.shadow().forget().expect("it answers");
    assert_eq!(rig.reaches(BASE), Some(0x5000));
    while !rig.settle() {}
    let after = (rig.functions[0].place(), rig.kernel.count(Call::Attach));
    assert_eq!((after, rig.reaches(BASE)), (before, Some(0x5000)));
}

#[test]
fn a_unit_that_is_switched_off_leads_to_guest_ram_at_once() {
    let rig = with_much_to_do();
    rig.view(1, tables());
    let identity = View::Identity(Access::BOTH);
    *rig.unit.views.lock().expect("a test's own") = vec![tables(), identity];
    rig.shadow().forget().expect("it answers");
    assert_eq!(rig.functions[1].place(), Some(rig.ram_space));
    assert!(!rig.settle(), "the other's takes longer");
}

/// A change of the guest's tables, of the lower one's first pages.
#[derive(Debug, Clone)]
enum Change {
    Map(u64, u64),
    Unmap(u64),
    Large(u64),
    Small,
}

/// How the guest announces its changes.
#[derive(Debug, Clone, Copy)]
enum Announced {
    No,
    Pages,
    Block,
    Domain,
    All,
}

fn change() -> impl Strategy<Value = Change> {
    prop_oneof![
        4 => (0..16_u64, 0..24_u64).prop_map(|(page, target)| Change::Map(page, target)),
        3 => (0..16_u64).prop_map(Change::Unmap),
        1 => (1..3_u64).prop_map(Change::Large),
        1 => Just(Change::Small),
    ]
}

fn announced() -> impl Strategy<Value = Announced> {
    prop_oneof![
        Just(Announced::No),
        Just(Announced::Pages),
        Just(Announced::Block),
        Just(Announced::Domain),
        Just(Announced::All),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    /// Pages whose changes were announced are for the function as the tables have them, and what is not announced is
    /// as the tables had it once.
    #[test]
    fn the_host_has_what_the_tables_say(steps in prop::collection::vec((change(), announced()), 1..40)) {
        let rig = Rig::attached();
        let table = HostTable { root: Gpa(UPPER), levels: 2, track: Track::default() };
        // Pages with changes that were not announced.
        let mut stale = BTreeSet::new();
        for (change, announced) in steps {
            let (from, to) = match change {
                Change::Map(page, target) => {
                    rig.map(page, MIB + (target << 12));
                    (page, page)
                }
                Change::Unmap(page) => {
                    rig.unmap(page);
                    (page, page)
                }
                Change::Large(target) => {
                    rig.put(UPPER + 8, LEAF | (target * 2 * MIB));
                    (0, 511)
                }
                Change::Small => {
                    rig.put(UPPER + 8, LEAF | 1 << 9 | LOWER);
                    (0, 511)
                }
            };
            let covered = match announced {
                Announced::No => None,
                Announced::Pages => Some((from, to)),
                Announced::Block => Some((from & !7, to | 7)),
                Announced::Domain | Announced::All => Some((0, 511)),
            };
            stale.extend(from..=to);
            if let Some((from, to)) = covered {
                stale.retain(|page| !(from..=to).contains(page));
                let span = PageRange::Span { first: BASE + (from << 12), last: BASE + (to << 12 | 0xfff) };
                rig.commands(&[match announced {
                    Announced::All => Command::InvalidateAll,
                    Announced::Domain => pages(PageRange::Everything),
                    _ => pages(span),
                }]);
            }
            for page in (0..512_u64).filter(|page| !stale.contains(page)) {
                let at = BASE + (page << 12);
                let told = table.walk(&rig.ram, at, Access::NONE).ok().map(|leaf| leaf.target(at));
                prop_assert_eq!(rig.reaches(at), told, "page {}", page);
            }
        }
    }
}
