//! Interrupts that are masked, remapped or refused.

use super::*;
use crate::iommu::emulated::RemappingSink;
use crate::iommu::emulated::testing::{Rig, requester};

/// What a driver behind a unit gives a vector: entry 5 of the device's remapping table.
const INDEXED: [u32; 4] = [0xfee0_0000, 0, 5, 0];

/// A function whose messages pass the unit of `rig`.
fn behind(rig: &Rig) -> Bench {
    let (messages, space, host) = (rig.processors.clone(), GuestSpace::new(), Host::new());
    let (wires, device) = (Arc::new(Wires::default()), Device::nic());
    let parts = VfioParts {
        msi: MsiPort::new(requester(), Arc::new(RemappingSink::new(rig.unit.clone()))),
        ..parts(device.clone(), (&messages, &space, &host, &wires))
    };
    let function = VfioFunction::new(parts).unwrap_or_else(|error| panic!("{error}"));
    device.told();
    Bench {
        device,
        messages,
        space,
        host,
        wires,
        function,
    }
}

#[test]
fn a_masked_vector_behind_a_unit_delivers_later_what_it_owes() {
    let rig = Rig::running();
    rig.cover();
    rig.remap(5, Some((1, 0x31)));
    let bench = behind(&rig);
    bench.enable_msix();
    bench.table(1, INDEXED);
    let route = rig.processors.routes().remove(0);
    let sent = Some(MsiMessage::remapped(1, false, 0x31));
    bench.table(1, [0xfee0_0000, 0, 5, 1]);
    assert!(bench.device.interrupt(Interrupt::Msix, 1));
    assert_eq!(bench.pending(), 2);
    bench.table(1, INDEXED);
    assert_eq!((bench.pending(), route.signals()), (0, 1));
    assert_eq!(route.history(), [sent, None, sent]);
}

#[test]
fn a_message_that_the_unit_blocks_goes_nowhere_and_is_an_event() {
    let rig = Rig::running();
    rig.cover();
    rig.remap(5, Some((1, 0x31)));
    let bench = behind(&rig);
    bench.enable_msix();
    bench.table(1, INDEXED);
    rig.remap(5, None);
    rig.invalidate_interrupts();
    let route = rig.processors.routes().remove(0);
    let sent = Some(MsiMessage::remapped(1, false, 0x31));
    assert_eq!(route.history(), [sent, None]);
    // It is not masked, so that nothing is pending.
    assert!(bench.device.interrupt(Interrupt::Msix, 1));
    assert_eq!(
        (bench.pending(), rig.events().len(), rig.processors.take().len()),
        (0, 0, 0)
    );
    // The event loop is woken by it, as its descriptor is one of those that it hears.
    rig.unit.run_commands();
    assert_eq!((rig.events().len(), rig.processors.take().len()), (1, 0));
    rig.remap(5, Some((1, 0x31)));
    rig.invalidate_interrupts();
    assert_eq!((route.history(), route.signals()), (vec![sent, None, sent], 0));
    assert!(bench.device.interrupt(Interrupt::Msix, 1));
    assert_eq!(route.signals(), 1);
    // One to memory is a write, as one of a device of ours is.
    rig.map(1, 0x50_0000);
    bench.table(2, [0x1010, 0, 0xabcd, 0]);
    assert!(bench.device.interrupt(Interrupt::Msix, 2));
    assert_eq!(rig.processors.routes()[1].history(), [None]);
    rig.unit.run_commands();
    assert_eq!((rig.load(0x50_0010), rig.events().len()), (0xabcd, 1));
}

#[test]
fn a_message_whose_changed_route_the_host_refuses_is_owed_until_there_is_one() {
    let rig = Rig::running();
    rig.cover();
    rig.remap(5, Some((1, 0x31)));
    let bench = behind(&rig);
    bench.enable_msix();
    bench.table(1, INDEXED);
    rig.processors.refuse(true);
    rig.remap(5, Some((2, 0x32)));
    rig.invalidate_interrupts();
    let route = rig.processors.routes().remove(0);
    assert_eq!(route.history().last(), Some(&None));
    assert!(bench.device.interrupt(Interrupt::Msix, 1));
    rig.processors.refuse(false);
    bench.table(1, [0xfee0_0000, 0, 5, 1]);
    assert_eq!(bench.pending(), 2);
    bench.table(1, INDEXED);
    let sent = Some(MsiMessage::remapped(2, false, 0x32));
    assert_eq!((route.history().last(), route.signals()), (Some(&sent), 1));
}

/// A device with this many messages of MSI, each of which can be masked.
fn device_masking(messages: u32) -> Device {
    let mut config = nic_config();
    let [log, ..] = messages.ilog2().to_le_bytes();
    config[usize::from(MSI) + 2] |= log << 1;
    config[usize::from(MSI) + 3] |= 0x01;
    Device::with(&config).interrupting(Interrupt::Msi, messages, false)
}

/// A function of such a device.
fn masking(messages: u32) -> Bench {
    bench_with(device_masking(messages))
}

/// The registers of MSI with a 64-bit address.
const DATA: u16 = MSI + 12;
const MASK: u16 = MSI + 16;
const PENDING: u16 = MSI + 20;

#[test]
fn a_masked_message_stays_off_while_its_data_changes_and_shows_what_it_owes() {
    let bench = masking(1);
    let _effect = bench.write_dword(MSI + 4, 0xfee0_3000);
    let _effect = bench.write(DATA, &[0x51, 0]);
    let _effect = bench.write(MSI + 2, &[0x81, 0]);
    let _effect = bench.write_dword(MASK, 1);
    let route = bench.messages.routes().remove(0);
    assert_eq!(bench.read(PENDING), 0);
    assert!(bench.device.interrupt(Interrupt::Msi, 0));
    assert_eq!(bench.read(PENDING), 1);
    // As Linux moves an interrupt to another processor: masked, in pieces.
    let _effect = bench.write_dword(MSI + 4, 0xfee0_4000);
    let _effect = bench.write(DATA, &[0x61, 0]);
    let message = |address, data| Some(MsiMessage { address, data });
    assert_eq!(route.history(), [message(0xfee0_3000, 0x51), None]);
    assert_eq!(bench.read(PENDING), 1);
    let _effect = bench.write_dword(MASK, 0);
    let [first, last] = [message(0xfee0_3000, 0x51), message(0xfee0_4000, 0x61)];
    assert_eq!(route.history(), [first, None, last]);
    assert_eq!((bench.read(PENDING), route.signals()), (0, 1));
}

#[test]
fn a_message_that_is_masked_from_the_start_is_counted_and_never_on() {
    let bench = masking(4);
    let _effect = bench.write_dword(MASK, 0b1010);
    let _effect = bench.write(MSI + 2, &[0xa5, 0]);
    assert_eq!(
        bench.device.told(),
        [
            Told::Disabled(Interrupt::Intx),
            set(Interrupt::Msi, 0, &[true; 4])
        ]
    );
    let on: Vec<_> = bench
        .messages
        .routes()
        .iter()
        .map(|route| route.history().len())
        .collect();
    assert_eq!(on, [1, 0, 1, 0]);
    (0..4).for_each(|vector| assert!(bench.device.interrupt(Interrupt::Msi, vector)));
    assert_eq!(bench.read(PENDING), 0b1010);
    // The register is read-only, and owes nothing when MSI is off.
    let _effect = bench.write_dword(PENDING, 0);
    assert_eq!(bench.read(PENDING), 0b1010);
    let _effect = bench.write(MSI + 2, &[0xa4, 0]);
    assert_eq!(bench.read(PENDING), 0);
}

/// Which of the first `vectors` of `kind` somebody listens to.
fn heard(bench: &Bench, kind: Interrupt, vectors: u32) -> Vec<bool> {
    (0..vectors)
        .map(|vector| bench.device.interrupt(kind, vector))
        .collect()
}

#[test]
fn messages_that_the_host_refuses_are_asked_for_again_and_bar_no_other_kind() {
    let wire = set(Interrupt::Intx, 0, &[true]);
    for errno in [libc::ENOSPC, libc::ENOMEM] {
        let bench = bench();
        bench.device.refuse(Asked::SetInterrupts, errno);
        let _effect = bench.write(MSI + 2, &[0x81, 0]);
        assert!(!bench.device.interrupt(Interrupt::Msi, 0));
        bench.device.relent();
        let _effect = bench.write(MSI + 2, &[0x80, 0]);
        assert_eq!(
            bench.device.told(),
            [Told::Disabled(Interrupt::Intx), wire.clone()]
        );
        assert!(bench.device.interrupt(Interrupt::Intx, 0));

        bench.device.refuse(Asked::SetInterrupts, errno);
        let _effect = bench.write(MSI + 2, &[0x81, 0]);
        bench.device.relent();
        bench.enable_msix();
        bench.table(0, FIRST_MESSAGE);
        assert!(bench.device.interrupt(Interrupt::Msix, 0));
        let _effect = bench.write(MSIX + 2, &[0x04, 0x00]);
        assert!(bench.device.interrupt(Interrupt::Msi, 0));

        bench.function.reset();
        bench.device.refuse(Asked::SetInterrupts, errno);
        let _effect = bench.write(MSI + 2, &[0x81, 0]);
        bench.device.relent();
        // Any change of the guest's has the host asked again.
        let _effect = bench.write(DATA, &[0x51, 0]);
        assert!(bench.device.interrupt(Interrupt::Msi, 0));

        bench.function.reset();
        bench.device.refuse(Asked::SetInterrupts, errno);
        let _effect = bench.write(MSI + 2, &[0x81, 0]);
        bench.device.relent();
        bench.device.told();
        bench.function.reset();
        assert!(bench.device.told().ends_with(std::slice::from_ref(&wire)));
    }
}

#[test]
fn a_message_whose_route_came_late_is_signalled_then() {
    let bench = bench();
    bench.messages.refuse(true);
    let _effect = bench.write(MSI + 2, &[0x81, 0]);
    let silent = set(Interrupt::Msi, 0, &[false]);
    assert_eq!(bench.device.told(), [Told::Disabled(Interrupt::Intx), silent]);
    bench.messages.refuse(false);
    bench.device.refuse(Asked::SetInterrupts, libc::ENOMEM);
    let _effect = bench.write(DATA, &[0x51, 0]);
    bench.device.relent();
    let _effect = bench.write(DATA, &[0x52, 0]);
    assert_eq!(bench.device.told(), [set(Interrupt::Msi, 0, &[true])]);
    let _effect = bench.write(DATA, &[0x53, 0]);
    assert_eq!(bench.device.told(), []);
}

#[test]
fn a_host_with_fewer_messages_gives_the_first_and_they_are_switched_off_again() {
    for (has, first) in [(1, vec![true]), (2, vec![true; 2]), (3, vec![true; 2])] {
        let bench = masking(4);
        bench.device.give_at_most(Interrupt::Msi, has);
        let _effect = bench.write(MSI + 2, &[0xa5, 0]);
        let given = set(Interrupt::Msi, 0, &first);
        assert_eq!(bench.device.told(), [Told::Disabled(Interrupt::Intx), given]);
        let mut expected = first.clone();
        expected.resize(4, false);
        assert_eq!(heard(&bench, Interrupt::Msi, 4), expected);
        // Nothing is asked for again, nothing is left on.
        let _effect = bench.write(DATA, &[0x50, 0]);
        let _effect = bench.write_dword(MASK, 0xf);
        assert_eq!(bench.device.told(), []);
        let _effect = bench.write(MSI + 2, &[0xa4, 0]);
        let wire = set(Interrupt::Intx, 0, &[true]);
        assert_eq!(bench.device.told(), [Told::Disabled(Interrupt::Msi), wire]);
        // What there is again is given again.
        bench.device.give_at_most(Interrupt::Msi, 4);
        let _effect = bench.write(MSI + 2, &[0xa5, 0]);
        assert_eq!(heard(&bench, Interrupt::Msi, 4), [true; 4]);
    }
}

#[test]
fn a_host_with_fewer_vectors_of_msix_gives_the_first() {
    let bench = bench_with(Device::with(&nic_config()).interrupting(Interrupt::Msix, 5, false));
    bench.device.give_at_most(Interrupt::Msix, 3);
    bench.enable_msix();
    (0..5).for_each(|vector| bench.table(vector, FIRST_MESSAGE));
    assert_eq!(
        heard(&bench, Interrupt::Msix, 5),
        [true, true, true, false, false]
    );
    let _effect = bench.write(MSIX + 2, &[0x04, 0x00]);
    assert!(bench.device.interrupt(Interrupt::Intx, 0));
}

/// The first dword of the capability `id` that the guest finds.
fn capability(bench: &Bench, id: u8) -> Option<u32> {
    let [mut at, ..] = bench.read(0x34).to_le_bytes();
    while at != 0 {
        let header = bench.read(at.into());
        let [found, next, ..] = header.to_le_bytes();
        if found == id {
            return Some(header);
        }
        at = next;
    }
    None
}

/// How many messages of MSI the guest sees; `None` where it sees no MSI.
fn seen(bench: &Bench) -> Option<u32> {
    capability(bench, 5).map(|header| 1 << (header >> 17 & 7))
}

#[test]
fn a_table_of_msix_in_ports_hides_msix() {
    let hidden = |bar: u8| {
        let mut config = nic_config();
        let at = usize::from(MSIX);
        config[at + 2..at + 12].copy_from_slice(&[0, 0, bar, 0, 0, 0, 0x10 | bar, 0, 0, 0]);
        let bench = bench_with(Device::with(&config).interrupting(Interrupt::Msix, 1, true));
        capability(&bench, 0x11).is_none()
    };
    assert!(hidden(2) && !hidden(3));
}

#[test]
fn the_guest_sees_as_many_messages_as_the_host_has_to_give() {
    for (has, sees) in [(1, 1), (2, 2), (3, 2), (7, 4), (8, 8)] {
        let device = device_masking(8);
        device.give_at_most(Interrupt::Msi, has);
        let bench = bench_with(device);
        assert_eq!(seen(&bench), Some(sees));
        assert!(!bench.device.is_on(Interrupt::Msi));
        // It cannot allot more than it sees.
        let _effect = bench.write(MSI + 2, &[0xb1, 0]);
        let given = set(Interrupt::Msi, 0, &vec![true; sees as usize]);
        assert_eq!(bench.device.told(), [Told::Disabled(Interrupt::Intx), given]);
        // Nor mask more.
        let _effect = bench.write_dword(MASK, u32::MAX);
        assert_eq!(bench.read(MASK), u32::MAX >> (32 - sees));
    }
}

#[test]
fn messages_are_asked_for_once_and_are_off_again_before_anything_else() {
    let device = device_masking(4);
    device.give_at_most(Interrupt::Msi, 1);
    let bench = try_bench(device).unwrap_or_else(|error| panic!("{error}"));
    let told = bench.device.told();
    let asked = [set(Interrupt::Msi, 0, &[false]), Told::Disabled(Interrupt::Msi)];
    assert!(told[1..].starts_with(&asked), "{told:?}");
    let msi = |told: &&Told| matches!(told, Told::Interrupts(Interrupt::Msi, ..));
    assert_eq!(told.iter().filter(msi).count(), 1);
}

#[test]
fn msi_that_the_host_gives_none_of_is_hidden_and_the_wire_works() {
    let refused = |refuse: &dyn Fn(&Device)| {
        let device = device_masking(4);
        refuse(&device);
        let bench = try_bench(device).unwrap_or_else(|error| panic!("{error}"));
        bench.device.relent();
        assert_eq!(seen(&bench), None);
        // What is where it was is no register.
        let _effect = bench.write(MSI + 2, &[0xa5, 0]);
        assert_eq!(bench.read(MSI), 0);
        assert!(!bench.device.is_on(Interrupt::Msi));
        bench
    };
    // It says that there are none, or as many as were asked for and more, of which one is as many.
    for has in [0, 1, 4, 5, u32::MAX] {
        let bench = refused(&|device| device.answer(Interrupt::Msi, has));
        assert!(bench.device.interrupt(Interrupt::Intx, 0));
    }
    for errno in [libc::ENOSPC, libc::ENOMEM, libc::EINVAL] {
        let _bench = refused(&|device| device.refuse(Asked::SetInterrupts, errno));
    }
    // Nothing is asked of a host that says so by itself.
    let none = device_masking(4).interrupting(Interrupt::Msi, 0, false);
    assert_eq!(seen(&bench_with(none)), None);
}

#[test]
fn a_host_that_claims_more_messages_than_there_can_be_is_asked_for_those_there_can() {
    let bench = bench_with(device_masking(4).interrupting(Interrupt::Msi, 64, false));
    // The capability has room for four.
    assert_eq!(seen(&bench), Some(4));
    let odd = bench_with(device_masking(4).interrupting(Interrupt::Msi, 3, false));
    assert_eq!(seen(&odd), Some(2));
}

#[test]
fn messages_that_the_host_does_not_switch_off_again_end_the_start() {
    let device = device_masking(4);
    device.refuse(Asked::DisableInterrupts, libc::EIO);
    let error = try_bench(device).err().expect("refused");
    assert_eq!(
        error.to_string(),
        "cannot switch MSI of vfio0 off again, which was on to see how many vectors there are"
    );
}
