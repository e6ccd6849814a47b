//! The unit against the second translator of `model`, over random tables and requests.

use proptest::prelude::*;
use ravelin::platform::addr::{Bdf, Gpa};
use ravelin::platform::memory::GuestRam;

use crate::driver::{DEVICE_TABLE, Driver, LOG, PPR_LOG, host_dte, pte, reg, ring_base};
use crate::model::{Outcome, Question, answer};
use crate::orderly::{Ram, first_difference, in_terms_of_the_model, registers, request, run};

/// What the unit makes of it, in the model's terms.
fn outcome(driver: &Driver, q: &Question) -> Outcome {
    in_terms_of_the_model(driver.on_bus(|bus| bus.translate(&request(q))))
}

/// Tables lie in these pages, so that random pointers often meet.
const ARENA: u64 = 0x40_0000;
const ARENA_PAGES: u64 = 12;

fn arena_page() -> impl Strategy<Value = u64> {
    (0..ARENA_PAGES).prop_map(|page| ARENA + (page << 12))
}

/// An address that a table entry may hold: mostly a table, sometimes anything.
fn pointer() -> impl Strategy<Value = u64> {
    prop_oneof![
        8 => arena_page(),
        1 => any::<u64>().prop_map(|any| any & 0x000f_ffff_ffff_f000),
        1 => Just(0x000f_ffff_ffff_f000),
        1 => (12..52_u32).prop_map(|ones| (1 << ones) - 0x1000),
    ]
}

/// A table entry in either format, mostly sensible.
fn entry() -> impl Strategy<Value = u64> {
    let host = (pointer(), 0..8_u64, any::<u64>()).prop_map(|(at, next, noise)| {
        at | next << 9 | 1 | 3 << 61 & !(noise & noise >> 1 & noise >> 2) | noise & 0x60
    });
    let guest = (pointer(), any::<u64>())
        .prop_map(|(at, noise)| at | 0x7 & !(noise & noise >> 4 & noise >> 8) | 1 | noise & 0x60);
    let large = pointer().prop_map(|at| at | 0x87);
    prop_oneof![6 => host, 5 => guest, 1 => large, 1 => any::<u64>()]
}

/// Indices that the requests below use.
fn index() -> impl Strategy<Value = u64> {
    prop_oneof![Just(0), Just(1), Just(0x1ff), Just(0x80), 0..512_u64]
}

fn composed() -> impl Strategy<Value = u64> {
    proptest::collection::vec(index(), 6).prop_map(|indices| {
        let shift = |level: u32| 12 + 9 * level;
        (0..)
            .zip(indices)
            .fold(0x123, |at, (level, index)| at | index.wrapping_shl(shift(level)))
    })
}

fn address() -> impl Strategy<Value = u64> {
    prop_oneof![
        4 => index().prop_map(|index| index << 12 | 0x123),
        4 => composed().prop_map(|at| at & 0xffff_ffff_ffff),
        2 => composed(),
        1 => any::<u64>(),
        1 => 0xfedf_f000..0xfef0_1000_u64,
        1 => Just(u64::MAX),
    ]
}

fn question() -> impl Strategy<Value = Question> {
    let pasid = prop_oneof![3 => Just(None), 2 => index().prop_map(|p| u32::try_from(p).ok()), 1 => (0..0x10_0000_u32).prop_map(Some)];
    let device = prop_oneof![9 => Just(5_u16), 1 => any::<u16>()];
    (device, pasid, any::<bool>(), address(), 0..4_u8).prop_map(|(device, pasid, privileged, at, access)| {
        Question {
            device,
            pasid,
            privileged,
            at,
            read: access & 1 == 1,
            write: access & 2 == 2,
        }
    })
}

fn dte() -> impl Strategy<Value = [u64; 4]> {
    let q0 = (pointer(), 0..8_u64, any::<u64>(), 0..4_u64, arena_page()).prop_map(
        |(root, mode, noise, glx, gcr3)| {
            let rights = 3 << 61 & !(noise & noise >> 1 & noise >> 2);
            let guest = (noise >> 8 & 3) << 54;
            let had = (noise >> 16 & 3) << 7;
            root | mode << 9 | 3 | rights | guest | had | glx << 56 | (gcr3 >> 12 & 7) << 58
        },
    );
    let q1 = (arena_page(), any::<u64>()).prop_map(|(gcr3, noise)| {
        noise & 0xffff | (gcr3 >> 15 & 0xffff) << 16 | (gcr3 >> 31) << 43 | noise & 1 << 39
    });
    let q2 = (0..8_u64).prop_map(|mode| {
        if mode < 6 {
            (mode & 1) << 54
        } else {
            (mode & 3) << 54
        }
    });
    let sensible = (q0, q1, q2).prop_map(|(q0, q1, q2)| [q0, q1, q2, 0]);
    prop_oneof![20 => sensible, 1 => any::<[u64; 4]>()]
}

/// One place in the arena and what stands there.
fn placed() -> impl Strategy<Value = (u64, u64)> {
    (arena_page(), index(), entry()).prop_map(|(page, index, entry)| (page + index * 8, entry))
}

fn image(ram: &GuestRam) -> Vec<u8> {
    let mut bytes = vec![0; usize::try_from(ARENA_PAGES << 12).expect("small")];
    ram.read(Gpa(ARENA), &mut bytes).expect("RAM");
    bytes
}

fn set_up(placed: &[(u64, u64)], dte: [u64; 4], control: u64, exclusion: [u64; 2]) -> Driver {
    let driver = Driver::at_reset();
    driver.write(reg::DEVICE_TABLE, DEVICE_TABLE | 0x1ff);
    // All segments share the one table, so that any number of them finds the device's entry.
    placed.iter().for_each(|(at, entry)| driver.put(*at, *entry));
    (0..)
        .zip(dte)
        .for_each(|(index, word)| driver.put(DEVICE_TABLE + 5 * 32 + index * 8, word));
    // Records go where no entry is: at reset the logs and the tables of segments begin at the same address, 0.
    driver.write(reg::EVENT_BASE, ring_base(LOG, 8));
    driver.write(reg::PPR_BASE, ring_base(PPR_LOG, 8));
    driver.write(reg::EXCLUSION_BASE, exclusion[0]);
    driver.write(reg::EXCLUSION_LIMIT, exclusion[1]);
    driver.write(reg::CONTROL, control & !(1 << 12) | 1);
    driver
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 400, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn one_request_ends_as_the_model_says_and_leaves_the_same_marks(
        placed in proptest::collection::vec(placed(), 0..64),
        dte in dte(),
        q in question(),
        control in any::<u64>(),
        exclusion in prop_oneof![4 => Just([0, 0]), 1 => any::<[u64; 2]>().prop_map(|[a, b]| [a & 0xf_f003, b & 0xf_f000])],
    ) {
        let expecting = set_up(&placed, dte, control, exclusion);
        let expected = answer(&mut Ram(expecting.ram.clone()), &registers(&expecting), &q);
        let driver = set_up(&placed, dte, control, exclusion);
        prop_assert_eq!(outcome(&driver, &q), expected);
        prop_assert!(image(&driver.ram) == image(&expecting.ram), "accessed and dirty marks");
    }

    #[test]
    fn many_requests_through_one_cache_end_as_the_model_says(
        placed in proptest::collection::vec(placed().prop_filter("coded sizes come in copies", |(_, entry)| entry >> 9 & 7 != 7), 0..64),
        dte in dte(),
        questions in proptest::collection::vec(question(), 1..24),
        control in any::<u64>(),
    ) {
        let driver = set_up(&placed, dte, control, [0, 0]);
        for q in &questions {
            let expected = answer(&mut Ram(driver.ram.clone()), &registers(&driver), q);
            prop_assert_eq!(outcome(&driver, q), expected);
            prop_assert_eq!(outcome(&driver, q), expected, "from the cache");
        }
    }

    #[test]
    fn many_requests_in_flight_together_end_as_the_model_says(
        placed in proptest::collection::vec(placed().prop_filter("coded sizes come in copies", |(_, entry)| entry >> 9 & 7 != 7), 0..64),
        dte in dte(),
        questions in proptest::collection::vec(question(), 1..24),
        control in any::<u64>(),
        exclusion in prop_oneof![4 => Just([0, 0]), 1 => any::<[u64; 2]>().prop_map(|[a, b]| [a & 0xf_f003, b & 0xf_f000])],
    ) {
        let driver = set_up(&placed, dte, control, exclusion);
        let bus = driver.unit.begin();
        for q in questions.iter().chain(&questions) {
            let expected = answer(&mut Ram(driver.ram.clone()), &registers(&driver), q);
            prop_assert_eq!(in_terms_of_the_model(bus.translate(&request(q))), expected);
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 100, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn after_invalidations_of_any_form_nothing_stale_is_used(steps in proptest::collection::vec(any::<u8>(), 0..600)) {
        run(&steps);
    }
}

#[test]
fn a_guest_that_forgets_to_invalidate_is_noticed() {
    // One after the other, as the test above makes them up.
    let noise = (0_u32..).map(|seed| seed.wrapping_mul(2_654_435_761).to_be_bytes()[0]);
    let inputs = (0..40).map(|from| noise.clone().skip(from * 600).take(600).collect::<Vec<_>>());
    let (mut noticed, mut orderly) = (0, 0);
    for input in inputs {
        noticed += u32::from(first_difference(&input, true).is_some());
        orderly += u32::from(first_difference(&input, false).is_none());
    }
    assert!(noticed > 10, "{noticed} of 40");
    assert_eq!(orderly, 40);
}

#[test]
fn the_model_finds_a_planted_mistake() {
    let mut driver = Driver::running();
    let device = Bdf::from_requester_id(5);
    let root = driver.table();
    driver.set_dte(device, host_dte(root, 4, 9));
    driver.map(root, 4, 0x1000, 1, pte(0x5000));
    let q = Question {
        device: 5,
        pasid: None,
        privileged: false,
        at: 0x1000,
        read: true,
        write: false,
    };
    let before = outcome(&driver, &q);
    driver.map(root, 4, 0x1000, 1, pte(0x6000));
    let expected = answer(&mut Ram(driver.ram.clone()), &registers(&driver), &q);
    assert_ne!(before, expected, "a stale translation differs from the model");
}
