//! The vIOMMU extension: guests on one unit, each with rings of its own, that try to touch each other.

use std::sync::Arc;

use ravelin::iommu::amd::Effects;
use ravelin::iommu::amd::commands::Command;
use ravelin::iommu::amd::ppr::{Answer, PageRequest};
use ravelin::iommu::amd::request::Access;
use ravelin::iommu::amd::spec::dte::Dte;
use ravelin::iommu::amd::spec::registers::Control;
use ravelin::iommu::amd::spec::viommu::{DEVICE_MAPS, DOMAIN_MAPS};
use ravelin::platform::addr::{Bdf, Gpa, Iova};

use crate::driver::{
    Driver, EVERYTHING, FLAG as HOST_FLAG, GN, INVALIDATE_ALL, PDE, Recorder, S, WAIT_INTERRUPT, command,
    host_dte, invalidate_device, invalidate_pages, read, wait, write,
};
use crate::guest::{
    DEVICE_MAP_AT, DOMAIN, DOMAIN_MAP_AT, END, FLAG, Guest, LOG, Machine, NAME, PPR_LOG, RING, control, page,
};
use crate::page::Page;

fn name() -> Bdf {
    Bdf::from_requester_id(NAME)
}

/// INVALIDATE_IOMMU_PAGES as Linux sends it for v2 tables of requests without PASID.
fn invalidate_domain(domain: u16) -> u128 {
    invalidate_pages(domain, 0, EVERYTHING | S | PDE | GN)
}

/// Both devices use their page, and both guests lead it elsewhere and tell nobody.
fn stale() -> Machine {
    let machine = Machine::running();
    for guest in [&machine.a, &machine.b] {
        assert_eq!(machine.target(guest), Some(0x1_0000));
        machine.map(guest, 0x2_0000);
        assert_eq!(machine.target(guest), Some(0x1_0000), "as it is cached");
    }
    machine
}

/// Records of the host's log, by code and guest.
pub(crate) fn host_errors(machine: &Machine) -> Vec<(u32, u32)> {
    let records = machine.host.events().into_iter();
    // Each has the guest's number in a place of its own.
    let guest = |record: [u32; 4]| record[if record[1] >> 28 == 0xb { 1 } else { 0 }] & 0xffff;
    records.map(|record| (record[1] >> 28, guest(record))).collect()
}

#[test]
fn an_invalidation_of_pages_reaches_the_domain_of_the_guest_that_sends_it() {
    let machine = stale();
    machine.flush(&machine.b, &[invalidate_domain(DOMAIN)]);
    assert_eq!(machine.target(&machine.a), Some(0x1_0000), "not the other's");
    assert_eq!(machine.target(&machine.b), Some(0x2_0000));
    machine.flush(&machine.a, &[invalidate_pages(DOMAIN, 0, 0x1000 | GN)]);
    assert_eq!(machine.target(&machine.a), Some(0x2_0000));
}

#[test]
fn the_hosts_numbers_mean_nothing_in_a_guests_ring() {
    let machine = stale();
    let domain = machine.a.domain;
    let device = machine.a.device;
    machine.host.set_dte(device, host_dte(0, 0, 1));
    machine.flush(
        &machine.b,
        &[
            invalidate_domain(domain),
            invalidate_device(device),
            INVALIDATE_ALL,
        ],
    );
    assert_eq!(machine.target(&machine.a), Some(0x1_0000));
    assert_eq!(machine.target(&machine.b), Some(0x2_0000));
    assert_eq!(machine.events(&machine.b), [[0; 4]; 0]);
}

#[test]
fn an_invalidation_of_an_entry_reaches_the_device_of_the_guest_that_sends_it() {
    let machine = stale();
    for guest in [&machine.a, &machine.b] {
        machine.host.set_dte(guest.device, Dte::default());
    }
    machine.flush(&machine.b, &[invalidate_device(name())]);
    assert_eq!(machine.target(&machine.a), Some(0x1_0000), "not the other's");
    // No entry at all: untranslated.
    let plain = read(machine.b.device, 0x1000);
    assert_eq!(machine.host.target(&plain), Some(0x1000));
    machine.flush(&machine.a, &[INVALIDATE_ALL]);
    assert_eq!(machine.host.target(&read(machine.a.device, 0x1000)), Some(0x1000));
}

#[test]
fn every_command_is_passed_on_by_the_hosts_numbers_or_not_at_all() {
    let machine = Machine::running();
    let heard = Arc::new(Recorder::default());
    machine.host.unit.add_follower(heard.clone());
    let about = |device: u16, domain: u16| {
        let device = u32::from(device);
        [
            command(2, device, 0, 0, 0),
            invalidate_pages(domain, 0, 0x1000),
            command(4, device, 0, 0x1000, 0),
            command(5, device, 0, 0, 0),
            command(6, device | 1 << 24, 0, 0x1000 | 4, 0),
            command(7, device, 0, 0, 5),
        ]
    };
    machine.flush(&machine.b, &about(0x0219, 0x51));
    assert_eq!(*heard.heard.lock().expect("not poisoned"), []);
    machine.flush(&machine.b, &about(NAME, DOMAIN));
    let heard = std::mem::take(&mut *heard.heard.lock().expect("not poisoned"));
    assert_eq!(heard.len(), 6);
    for command in heard {
        match command {
            Command::InvalidateDevice { device }
            | Command::InvalidateIotlb { device, .. }
            | Command::InvalidateInterrupts { device }
            | Command::Prefetch { device, .. }
            | Command::CompletePageRequest { device, .. } => assert_eq!(device, machine.b.device),
            Command::InvalidatePages { domain, .. } => assert_eq!(domain, machine.b.domain),
            other => panic!("{other:?} was not asked for"),
        }
    }
    assert_eq!(
        machine.host.unit.guests_counts().commands,
        [2, 2, 2, 2, 2, 2, 2, 0]
    );
}

#[test]
fn invalidating_all_is_all_of_the_guests_own() {
    let machine = stale();
    let heard = Arc::new(Recorder::default());
    machine.host.unit.add_follower(heard.clone());
    machine.flush(&machine.b, &[INVALIDATE_ALL]);
    assert_eq!(machine.target(&machine.a), Some(0x1_0000));
    assert_eq!(machine.target(&machine.b), Some(0x2_0000));
    let heard = heard.heard.lock().expect("not poisoned");
    assert!(!heard.contains(&Command::InvalidateAll), "{heard:?}");
    assert!(heard.iter().all(|command| match command {
        Command::InvalidateDevice { device } | Command::InvalidateInterrupts { device } =>
            *device == machine.b.device,
        Command::InvalidatePages { domain, .. } => *domain == machine.b.domain,
        _ => false,
    }));
}

#[test]
fn many_invalidations_of_all_do_not_hold_up_whoever_rings() {
    let machine = Machine::running();
    machine.submit(&machine.a, &[INVALIDATE_ALL; 10]);
    assert_eq!(
        machine.read(&machine.a, page::COMMAND_HEAD),
        0x10,
        "one at a time"
    );
    assert!(machine.owed(&machine.a).more_commands);
    machine.flush(&machine.a, &[]);
    assert_eq!(machine.read(&machine.a, page::COMMAND_HEAD), 0xb0);
}

#[test]
fn a_wait_stores_in_the_guests_memory_and_interrupts_the_guest_alone() {
    let machine = Machine::running();
    let before = machine.host.get(FLAG);
    machine.submit(&machine.a, &[wait(FLAG, 0x1234), WAIT_INTERRUPT]);
    assert_eq!(machine.get(&machine.a, FLAG), 0x1234);
    assert_eq!(
        machine.host.get(FLAG),
        before,
        "not at that address of the system's"
    );
    assert_eq!(machine.read(&machine.a, page::STATUS) & 4, 4);
    assert_eq!(machine.read(&machine.b, page::STATUS) & 4, 0);
    assert_eq!(machine.host.status() & 4, 0);
    let owed = machine.host.unit.take_owed();
    assert_eq!(owed.keys().collect::<Vec<_>>(), [&machine.a.id]);
    assert!(owed[&machine.a.id].event);
    assert_eq!(machine.host.take_interrupts(), []);
    machine.submit(&machine.a, &[WAIT_INTERRUPT]);
    assert!(!machine.owed(&machine.a).event, "the bit was not cleared");
    machine.write(&machine.a, page::STATUS, 4);
    machine.submit(&machine.a, &[WAIT_INTERRUPT]);
    assert!(machine.owed(&machine.a).event);
}

#[test]
fn a_wait_of_a_guest_waits_for_accesses_in_flight() {
    let machine = Machine::running();
    let bus = machine.host.unit.begin();
    let request = read(machine.a.device, 0x1000);
    bus.translate(&request).expect("mapped");
    std::thread::scope(|scope| {
        let waits = scope.spawn(|| machine.flush(&machine.a, &[invalidate_domain(DOMAIN)]));
        std::thread::sleep(std::time::Duration::from_millis(20));
        assert_eq!(machine.get(&machine.a, FLAG), 0, "somebody is in flight");
        drop(bus);
        waits.join().expect("answered");
    });
}

#[test]
fn what_means_nothing_stops_the_ring_of_the_guest_and_is_told_to_the_guest() {
    // An opcode that is none, and the two that only the host has.
    for opcode in [0, 9, 10, 15] {
        let machine = Machine::running();
        let bad = command(opcode, u32::from(machine.b.id), u32::from(machine.b.id), 0, 0);
        machine.submit(&machine.a, &[invalidate_device(name()), bad, wait(FLAG, 7)]);
        assert_eq!(machine.read(&machine.a, page::STATUS) & 0x10, 0, "{opcode}");
        assert_eq!(machine.read(&machine.a, page::COMMAND_HEAD), 0x10);
        let at = u32::try_from(RING + 0x10).expect("small");
        assert_eq!(machine.events(&machine.a), [[0, 0x5000_0000, at, 0]]);
        assert_eq!(machine.host.events(), [[0; 4]; 0]);
        assert_eq!(machine.get(&machine.a, FLAG), 0);
        machine.flush(&machine.b, &[]);
        assert_eq!(machine.host.unit.guests_counts().stops, 1);
        // On again, past it.
        machine.control(&machine.a, control::COMMAND, 0);
        machine.write(&machine.a, page::COMMAND_HEAD, 0x20);
        machine.control(&machine.a, control::COMMAND, RING | control::ON);
        assert_eq!(machine.get(&machine.a, FLAG), 7);
    }
}

#[test]
fn memory_that_is_not_the_guests_is_no_place_for_rings_and_stores() {
    let machine = Machine::running();
    // In the system's memory there would be something.
    machine.submit(&machine.a, &[wait(END, 7)]);
    let at = u32::try_from(END).expect("small");
    assert_eq!(machine.events(&machine.a), [[0, 0x6400_0000, at, 0]]);
    machine.control(&machine.a, control::COMMAND, END | control::ON);
    machine.control(&machine.a, control::COMMAND, 0);
    machine.control(&machine.a, control::COMMAND, END | control::ON);
    assert_eq!(machine.events(&machine.a), [[0, 0x6400_0000, at, 0]]);
    assert_eq!(machine.read(&machine.a, page::STATUS) & 0x10, 0);
    machine.flush(&machine.b, &[]);
}

#[test]
fn a_fault_is_told_to_the_guest_by_its_own_names() {
    let machine = Machine::running();
    machine.map(&machine.b, 0);
    assert_eq!(machine.target(&machine.b), None);
    // Not present, of the address space of PASID 0.
    assert_eq!(
        machine.events(&machine.b),
        [[u32::from(NAME), 0x2021_0000, 0x1000, 0]]
    );
    assert_eq!(machine.read(&machine.b, page::STATUS) & 2, 2);
    assert!(machine.owed(&machine.b).event);
    // By the domain, where no address space is concerned.
    let mut dte = machine.nested(&machine.b);
    dte.host.set_iw(false);
    machine.host.set_dte(machine.b.device, dte);
    machine.flush(&machine.b, &[invalidate_device(name())]);
    assert_eq!(machine.target(&machine.b), None);
    let denied = 0x2070_0000 | u32::from(DOMAIN);
    assert_eq!(machine.events(&machine.b), [[u32::from(NAME), denied, 0x1000, 0]]);
    // Requests of other kinds.
    assert!(
        machine
            .host
            .target(&write(machine.b.device, 0xfee0_0000))
            .is_none()
    );
    assert_eq!(machine.events(&machine.b)[0][..2], [u32::from(NAME), 0x8c00_0000]);
    assert_eq!(machine.events(&machine.a), [[0; 4]; 0]);
    assert_eq!(machine.host.events(), [[0; 4]; 0]);
}

#[test]
fn a_fault_in_the_hosts_table_is_the_hosts_affair() {
    let machine = Machine::running();
    machine.map(&machine.a, END);
    assert_eq!(machine.target(&machine.a), None);
    assert_eq!(machine.events(&machine.a), [[0; 4]; 0]);
    let device = u32::from(machine.a.device.requester_id());
    let end = u32::try_from(END).expect("small");
    assert_eq!(
        machine.host.events(),
        [[device, 0x2020_0000 | u32::from(machine.a.domain), end, 0]]
    );
}

#[test]
fn devices_of_no_guest_are_the_hosts_affair() {
    let machine = Machine::running();
    let mut dte = machine.nested(&machine.a);
    dte.attribute.set_vimu_en(false);
    machine.host.set_dte(machine.a.device, dte);
    machine.host.submit(&[invalidate_device(machine.a.device)]);
    machine.map(&machine.a, 0);
    assert_eq!(machine.target(&machine.a), None);
    assert_eq!(machine.events(&machine.a), [[0; 4]; 0]);
    assert_eq!(machine.host.events().len(), 1);
}

#[test]
fn a_full_log_of_a_guest_overflows_and_runs_again_once_it_was_off() {
    let machine = Machine::running();
    machine.map(&machine.a, 0);
    for _ in 0..255 {
        assert_eq!(machine.target(&machine.a), None);
    }
    assert_eq!(machine.read(&machine.a, page::STATUS) & 0xb, 0xa);
    assert_eq!(machine.target(&machine.a), None);
    assert_eq!(
        machine.read(&machine.a, page::STATUS) & 0xb,
        3,
        "overflow, and it has stopped"
    );
    assert_eq!(machine.read(&machine.b, page::STATUS) & 0xb, 8);
    assert_eq!(machine.events(&machine.a).len(), 255);
    assert_eq!(machine.target(&machine.a), None);
    assert_eq!(machine.events(&machine.a).len(), 0);
    machine.control(&machine.a, control::EVENT, 0);
    machine.control(&machine.a, control::EVENT, LOG | control::ON);
    assert_eq!(machine.read(&machine.a, page::STATUS) & 9, 8);
    assert_eq!(machine.target(&machine.a), None);
    assert_eq!(machine.events(&machine.a).len(), 1);
}

#[test]
fn a_log_where_no_memory_is_loses_records_and_the_host_is_told() {
    let machine = Machine::running();
    machine.control(&machine.a, control::EVENT, 0);
    machine.control(&machine.a, control::EVENT, END | control::ON);
    machine.map(&machine.a, 0);
    assert_eq!(machine.target(&machine.a), None);
    let end = u32::try_from(END).expect("small");
    assert_eq!(
        machine.host.events(),
        [[0, 0xb000_0000 | u32::from(machine.a.id), end, 0]]
    );
    assert_eq!(machine.read(&machine.a, page::EVENT_TAIL), 0);
    assert_eq!(machine.read(&machine.a, page::STATUS) & 2, 0);
}

#[test]
fn maps_lie_in_memory_and_are_read_at_every_use() {
    let machine = stale();
    let device = DEVICE_MAP_AT + u64::from(NAME) * 16;
    assert_eq!(machine.host.get(device), 0x8000_0219);
    let domain = DOMAIN_MAP_AT + (1 << 19) + u64::from(DOMAIN) * 8;
    assert_eq!(
        machine.host.get(domain),
        0x8000_0000 | u64::from(machine.b.domain)
    );
    machine.host.put(domain, 0);
    machine.flush(&machine.b, &[invalidate_domain(DOMAIN)]);
    assert_eq!(
        machine.target(&machine.b),
        Some(0x1_0000),
        "it has no such domain"
    );
    machine
        .host
        .put(domain, 0x8000_0000 | u64::from(machine.b.domain));
    machine.flush(&machine.b, &[invalidate_domain(DOMAIN)]);
    assert_eq!(machine.target(&machine.b), Some(0x2_0000));
}

#[test]
fn an_entry_that_is_taken_back_takes_its_way_back_with_it() {
    let machine = Machine::running();
    let back = |host: u16| machine.host.get(DOMAIN_MAP_AT + u64::from(host) * 8) >> 32;
    let host = machine.a.domain;
    assert_eq!(back(host), 0x8000_0003);
    machine.map_domain(&machine.a, DOMAIN, 0x99, true);
    assert_eq!((back(host), back(0x99)), (0, 0x8000_0003));
    machine.map_domain(&machine.a, 4, 0x99, true);
    machine.map_domain(&machine.a, DOMAIN, 0, false);
    assert_eq!(back(0x99), 0x8000_0004, "another one's by now");
}

#[test]
fn broken_maps_stop_the_guest_and_are_told_to_the_host() {
    let mut machine = Machine::running();
    for maps in [DEVICE_MAPS + (4 << 20), DOMAIN_MAPS + (4 << 19)] {
        machine.host.map(machine.private, 4, maps, 2, 0);
    }
    machine.map_device(&machine.a, 1, 1, true);
    assert_eq!(host_errors(&machine), [(0xc, 4)]);
    machine.submit(&machine.a, &[invalidate_device(name()), wait(FLAG, 7)]);
    assert_eq!(host_errors(&machine), [(0xc, 4)]);
    assert_eq!(machine.read(&machine.a, page::STATUS) & 0x10, 0);
    assert_eq!(machine.read(&machine.a, page::COMMAND_HEAD), 0);
    assert_eq!(machine.events(&machine.a)[0][1], 0x6400_0000);
    machine.submit(&machine.b, &[INVALIDATE_ALL]);
    assert_eq!(host_errors(&machine), [(0xc, 5)]);
    assert_eq!(machine.get(&machine.a, FLAG), 0);
}

#[test]
fn a_translate_device_without_a_table_is_told_to_the_host() {
    let machine = Machine::running();
    machine.host.set_dte(machine.a.translate, Dte::default());
    machine.host.submit(&[invalidate_device(machine.a.translate)]);
    machine.submit(&machine.a, &[wait(FLAG, 7)]);
    assert_eq!(machine.read(&machine.a, page::STATUS) & 0x10, 0, "stopped");
    let errors = host_errors(&machine);
    assert!(
        !errors.is_empty() && errors.iter().all(|error| *error == (0xc, 4)),
        "{errors:?}"
    );
    assert_eq!(machine.get(&machine.a, FLAG), 0);
}

#[test]
fn the_host_puts_a_record_into_a_guests_log() {
    let machine = Machine::running();
    let guest = u32::from(machine.b.id);
    machine
        .host
        .submit(&[command(9, 0x1000_0008, 0x0a0_0000 | guest, 0x2345_6788, 1)]);
    assert_eq!(
        machine.events(&machine.b),
        [[0x0008, 0x10a0_0000, 0x2345_6788, 1]]
    );
    assert!(machine.owed(&machine.b).event);
    assert_eq!(machine.events(&machine.a), [[0; 4]; 0]);
    assert_eq!(machine.host.status() & 0x10, 0x10);
}

#[test]
fn the_host_resets_the_page_of_one_guest_or_of_all() {
    let machine = Machine::running();
    for guest in [&machine.a, &machine.b] {
        machine.map(guest, 0);
        assert_eq!(machine.target(guest), None);
        machine.submit(guest, &[WAIT_INTERRUPT, 0]);
    }
    let state = |guest: &Guest| {
        [
            page::COMMAND_HEAD,
            page::COMMAND_TAIL,
            page::EVENT_TAIL,
            page::STATUS,
        ]
        .map(|at| machine.read(guest, at))
    };
    let stopped = [0x10, 0x20, 0x20, 0xe];
    assert_eq!(state(&machine.a), stopped);
    machine.host.submit(&[command(10, 4, 0, 0, 0)]);
    assert_eq!(state(&machine.a), [0, 0, 0, 0x18]);
    assert_eq!(state(&machine.b), stopped);
    machine.host.submit(&[command(10, 1 << 28, 0, 0, 0)]);
    assert_eq!(state(&machine.b), [0, 0, 0, 0x18]);
    machine.flush(&machine.a, &[]);
}

#[test]
fn guests_are_served_while_control_says_so() {
    let machine = Machine::running();
    let all = [
        Control::new().with_iommu_en(true),
        Control::new().with_viommu_en(true),
        Control::new().with_vcmd_en(true),
        Control::new().with_gst_buffer_trp_mode(true),
    ];
    for bit in all {
        machine.put(&machine.a, FLAG, 0);
        machine.host.disable(bit);
        machine.submit(&machine.a, &[wait(FLAG, 7)]);
        assert_eq!(machine.get(&machine.a, FLAG), 0, "{bit:?}");
        assert_eq!(machine.read(&machine.a, page::STATUS) & 0x10, 0);
        machine.host.enable(bit);
        assert!(machine.owed(&machine.a).more_commands, "{bit:?}");
        let effects = machine.host.unit.run_guest_commands(machine.a.id);
        assert_eq!(effects, Effects::default());
        assert_eq!(machine.get(&machine.a, FLAG), 7);
    }
}

#[test]
fn a_ring_that_is_switched_off_and_moved_goes_on_from_head_and_tail() {
    let machine = Machine::running();
    machine.flush(&machine.a, &[WAIT_INTERRUPT; 4]);
    machine.control(&machine.a, control::COMMAND, 0);
    let moved = 0x1_1000;
    for at in (0..0x1000).step_by(8) {
        machine.put(&machine.a, moved + at, machine.get(&machine.a, RING + at));
    }
    machine.write(&machine.a, page::COMMAND_TAIL, 0x60);
    machine.put(&machine.a, moved + 0x50, 1 << 60 | FLAG | 1);
    machine.put(&machine.a, moved + 0x58, 0x55);
    assert_eq!(machine.get(&machine.a, FLAG), 7, "it is off");
    machine.control(&machine.a, control::COMMAND, moved | control::ON);
    assert_eq!(machine.get(&machine.a, FLAG), 0x55);
}

#[test]
fn page_requests_go_to_the_guests_log() {
    let machine = Machine::running();
    let request = PageRequest {
        device: machine.b.device,
        pasid: None,
        at: Iova(0x1234_5000),
        access: Access::WRITE,
        execute: false,
        privileged: false,
        group: 5,
        last: true,
    };
    let ask = || {
        let (answer, effects) = machine.host.unit.page_request(&request);
        machine.host.carry_out(effects);
        answer
    };
    assert_eq!(ask(), Answer::Failure, "it has no log");
    machine.control(&machine.b, control::PPR, PPR_LOG << 4 | control::PPR_ON);
    assert_eq!(ask(), Answer::Later);
    assert_eq!(machine.read(&machine.b, page::PPR_TAIL), 0x10);
    assert_eq!(machine.page_request(&machine.b)[0], u32::from(NAME));
    assert_eq!(machine.page_request(&machine.b)[2], 0x1234_5000);
    assert_eq!(machine.read(&machine.b, page::STATUS) & 0x40, 0x40);
    assert!(machine.owed(&machine.b).ppr);
    assert_eq!(machine.read(&machine.a, page::PPR_TAIL), 0);
    // A device that may send none.
    let mut dte = machine.nested(&machine.b);
    dte.host.set_ppr(false);
    machine.host.set_dte(machine.b.device, dte);
    machine.flush(&machine.b, &[invalidate_device(name())]);
    assert_eq!(ask(), Answer::Invalid);
    assert_eq!(machine.events(&machine.b)[0][0], u32::from(NAME));
}

#[test]
fn a_page_has_the_registers_of_the_units_page_and_their_rules() {
    let machine = Machine::at_reset();
    let a = &machine.a;
    // While no ring is there, pointers keep every bit.
    machine.write(a, page::COMMAND_TAIL, 0xffff_ffff);
    assert_eq!(machine.read(a, page::COMMAND_TAIL), 0x7_fff0);
    machine.write(a, page::COMMAND_TAIL, 0);
    machine.write(a, page::STATUS, 0xffff_ffff);
    assert_eq!(machine.read(a, page::STATUS), 0);
    machine.control(a, control::COMMAND, RING | control::ON);
    machine.write(a, page::COMMAND_HEAD, 0x20);
    assert_eq!(machine.read(a, page::COMMAND_HEAD), 0, "the ring runs");
    assert_eq!(machine.read(a, page::STATUS), 0x10);
    let window = Page::default();
    machine
        .host
        .unit
        .show_guest_registers(a.id, Box::new(window.clone()));
    machine.flush(a, &[]);
    assert_eq!(window.shown(page::COMMAND_HEAD), 0x10);
    assert_eq!(window.shown(page::COMMAND_TAIL), 0x10);
    for at in [0x28, 0x40, 0x80, 0xff8, 0x1000, !7] {
        machine.write(a, at, 0xffff_ffff);
        assert_eq!(machine.read(a, at), 0, "{at:#x}");
    }
    let mut odd = [0xee; 3];
    machine.host.unit.vf_read(a.id, page::STATUS, &mut odd);
    assert_eq!(odd, [0; 3]);
}

#[test]
fn control_of_a_guest_keeps_what_it_has_and_takes_halves() {
    let machine = Machine::at_reset();
    let unit = &machine.host.unit;
    let read = |at| {
        let mut data = [0; 8];
        unit.vf_control_read(9, at, &mut data);
        u64::from_le_bytes(data)
    };
    for (at, kept) in [
        (control::DEVICE_MAP, 0x3fff_c000_3fff_c001),
        (control::DOMAIN_MAP, 0x3fff_c000_3fff_c001),
        (control::MISC, 0xffff_0000),
        (0x18, 0),
        (control::COMMAND, 0x000f_ffff_ffff_f30f),
        (control::EVENT, 0x000f_ffff_ffff_f30f),
        (control::PPR, 0x00ff_ffff_ffff_070f),
        (0x38, 0),
        (0x40, 0),
    ] {
        let _ = unit.vf_control_write(9, at, &[0xff; 4]);
        assert_eq!(read(at), kept & 0xffff_ffff, "{at:#x}");
        let _ = unit.vf_control_write(9, at + 4, &[0xff; 4]);
        assert_eq!(read(at), kept, "{at:#x}");
    }
}

#[test]
fn a_reset_of_the_unit_leaves_no_guest_behind() {
    let machine = Machine::running();
    machine.submit(&machine.a, &[WAIT_INTERRUPT]);
    machine.host.unit.reset();
    assert_eq!(machine.host.unit.take_owed().len(), 0);
    for at in (0..0x40).step_by(8) {
        assert_eq!(machine.read(&machine.a, at), 0, "{at:#x}");
        let mut data = [0; 8];
        machine.host.unit.vf_control_read(machine.a.id, at, &mut data);
        assert_eq!(data, [0; 8], "{at:#x}");
    }
    machine.submit(&machine.a, &[wait(FLAG, 7)]);
    assert_eq!(machine.get(&machine.a, FLAG), 0);
}

#[test]
fn a_unit_without_the_extension_has_none_of_it() {
    let mut driver = Driver::running();
    driver.enable(Control::new().with_viommu_en(true).with_vcmd_en(true));
    assert!(!driver.control().viommu_en() && !driver.control().vcmd_en());
    let effects = driver.unit.vf_control_write(4, control::COMMAND, &[0xff; 8]);
    assert_eq!(effects, Effects::default());
    let mut data = [0xee; 8];
    driver.unit.vf_control_read(4, control::COMMAND, &mut data);
    assert_eq!(data, [0; 8]);
    driver.flush(&[]);
    driver.submit(&[command(10, 4, 0, 0, 0)]);
    assert_eq!(driver.events()[0][1] >> 28, 5);
}

/// A guest that writes anything anywhere it can reach harms nobody but itself.
#[test]
fn a_guest_that_writes_anything_leaves_the_other_alone() {
    let machine = Machine::running();
    let (a, b) = (&machine.a, &machine.b);
    let mut state = 0x9e37_79b9_7f4a_7c15_u64;
    let mut next = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state
    };
    assert_eq!(machine.target(b), Some(0x1_0000));
    machine.map(b, 0x2_0000);
    for round in 0..2_000 {
        let [low, high, at] = [next(), next(), next()];
        // Mostly commands that exist.
        let opcode = if round % 7 == 0 { low >> 60 } else { 1 + at % 8 };
        let command = u128::from(low << 4 >> 4 | opcode << 60) | u128::from(high) << 64;
        let entry = (u64::from(machine.read(a, page::COMMAND_TAIL)) & 0xff0) + RING;
        for (index, half) in [command & u128::from(u64::MAX), command >> 64]
            .into_iter()
            .enumerate()
        {
            let half = u64::try_from(half).expect("a half");
            machine.put(a, entry + 8 * index as u64, half);
        }
        machine.submit(a, &[command]);
        machine.write(
            a,
            (at % 0x48) & !3,
            u32::try_from(high & 0x0fff_ffff).expect("28 bits"),
        );
        while machine.owed(a).more_commands {
            let _ = machine.host.unit.run_guest_commands(a.id);
        }
        if machine.read(a, page::STATUS) & 0x10 == 0 {
            machine.control(a, control::COMMAND, 0);
            machine.write(a, page::COMMAND_HEAD, 0);
            machine.write(a, page::COMMAND_TAIL, 0);
            machine.control(a, control::COMMAND, RING | control::ON);
        }
    }
    assert_eq!(machine.target(b), Some(0x1_0000), "nobody invalidated it");
    assert_eq!(machine.events(b), [[0; 4]; 0]);
    machine.flush(b, &[invalidate_domain(DOMAIN)]);
    assert_eq!(machine.target(b), Some(0x2_0000));
    let mut flag = [0; 8];
    machine.host.ram.read(Gpa(HOST_FLAG), &mut flag).expect("RAM");
    assert_eq!(flag, [0; 8], "and no store left the guest's memory");
}
