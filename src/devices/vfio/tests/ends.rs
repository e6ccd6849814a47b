//! Resets, errors, and functions that leave: by the guest, by the host, and at the end of the machine.

use super::super::hot_reset::HotResetSet;
use super::*;

#[test]
fn a_function_without_reset_is_silenced_and_offers_none() {
    let bench = bench_with(Device::with(&nic_config()).without_reset());
    assert_eq!(bench.write(EXPRESS + 9, &[0x80]), ConfigEffect::empty());
    bench.device.told();
    bench.function.reset();
    assert!(!bench.device.told().contains(&Told::Reset));
}

#[test]
fn the_end_silences_resets_and_detaches_before_the_address_space_goes() {
    let bench = bench();
    bench.function.bus_mastering(true);
    bench.function.bar_moved(0, Some(Gpa(0x20_0000)));
    bench.device.told();
    assert_eq!(bench.host.spaces().len(), 1);
    drop(bench.function);
    let quiet = Told::Config(4, vec![0x03, 0x04]);
    assert_eq!(
        bench.device.told(),
        [
            Told::Disabled(Interrupt::Intx),
            quiet,
            Told::Reset,
            Told::Detached
        ]
    );
    assert_eq!(bench.space.mapped(), []);
    assert!(bench.host.spaces().is_empty());
}

#[test]
fn an_end_that_the_host_refuses_in_every_step_is_no_panic() {
    let bench = bench();
    refuse_all(&bench.device);
    drop(bench.function);
    assert!(bench.host.spaces().is_empty());
}

/// A device that refuses everything that is asked when a function leaves.
fn refuse_all(device: &Device) {
    let asked = [
        Asked::Read,
        Asked::Write,
        Asked::DisableInterrupts,
        Asked::Reset,
        Asked::HotReset,
        Asked::Detach,
    ];
    for asked in asked {
        device.refuse(asked, libc::EIO);
    }
}

#[test]
fn a_function_that_left_answers_all_ones_and_hears_nothing() {
    let bench = bench();
    bench.enable_msix();
    bench.table(0, FIRST_MESSAGE);
    bench.function.bar_moved(0, Some(Gpa(0x20_0000)));
    bench.function.leave();
    bench.device.told();
    let mut bytes = [0; 4];
    bench.function.bar_read(3, 0, &mut bytes);
    assert_eq!(
        (bench.read(0), bench.read(0x10), bytes),
        (u32::MAX, u32::MAX, [0xff; 4])
    );
    assert_eq!(bench.write(4, &[7, 0]), ConfigEffect::empty());
    bench.function.bar_write(0, 0, &[1, 2, 3, 4]);
    assert!(bench.function.command().is_empty() && !bench.function.is_present());
    assert_eq!(bench.device.told(), []);
    bench.function.give_back();
    assert_eq!(bench.space.mapped(), []);
    assert!(!bench.device.interrupt(Interrupt::Msix, 0) && !bench.device.is_on(Interrupt::Msix));
    assert_eq!(Arc::strong_count(&bench.device), 1);
    bench.device.told();
    // Given back once; a reset of the machine does not find it either.
    bench.function.give_back();
    bench.function.reset();
    bench.function.bus_mastering(true);
    drop(bench.function);
    assert_eq!(bench.device.told(), []);
}

#[test]
fn a_function_is_given_back_whatever_the_host_refuses() {
    let bench = bench();
    refuse_all(&bench.device);
    bench.function.leave();
    bench.function.give_back();
    assert_eq!((Arc::strong_count(&bench.device), bench.read(0)), (1, u32::MAX));
}

#[test]
fn a_function_with_an_error_issues_nothing_until_a_reset_that_works() {
    let bench = bench();
    bench.function.bus_mastering(true);
    bench.function.contain();
    bench.device.told();
    let (quiet, busy) = (
        Told::Config(4, vec![0x03, 0x04]),
        Told::Config(4, vec![0x07, 0x04]),
    );
    // The second is a host that is about to take the function back.
    for errno in [libc::EIO, libc::EAGAIN] {
        bench.device.refuse(Asked::Reset, errno);
        bench.function.reset();
        bench.function.bus_mastering(true);
        assert!(!bench.device.told().contains(&busy));
    }
    bench.device.relent();
    bench.function.reset();
    bench.function.bus_mastering(true);
    let told = bench.device.told();
    assert!(told.contains(&quiet) && told.ends_with(&[busy]), "{told:?}");
}

/// The device was told that it may issue requests.
fn opened(bench: &Bench) -> bool {
    bench.device.told().contains(&Told::Config(4, vec![0x07, 0x04]))
}

#[test]
fn a_function_with_an_error_that_no_reset_reaches_issues_nothing_any_more() {
    let bench = bench_with(Device::with(&nic_config()).without_reset());
    bench.function.bus_mastering(true);
    bench.function.contain();
    bench.device.told();
    for _ in 0..2 {
        bench.function.reset();
        bench.function.bus_mastering(true);
        bench.function.bus_mastering(false);
    }
    assert!(!opened(&bench));
}

#[test]
fn a_function_of_a_card_with_an_error_issues_nothing_until_the_reset_of_all() {
    let [first, second] = card();
    first.function.bus_mastering(true);
    second.function.bus_mastering(true);
    assert!(opened(&first) && opened(&second));
    first.function.contain();
    // It only waits, and does so still when the guest lets it issue requests.
    first.function.reset();
    first.function.bus_mastering(true);
    assert!(!opened(&first));
    second.device.refuse(Asked::HotReset, libc::EBUSY);
    second.function.reset();
    first.function.bus_mastering(true);
    assert!(!opened(&first));
    second.device.relent();
    second.function.reset();
    assert!(second.device.told().contains(&Told::HotReset));
    first.function.bus_mastering(true);
    second.function.bus_mastering(true);
    assert!(opened(&first) && opened(&second));
    // An error of after the reset waits for the next.
    first.function.contain();
    first.function.bus_mastering(false);
    first.function.bus_mastering(true);
    assert!(!opened(&first));
}

/// Two functions of a card that the host resets together.
fn card() -> [Bench; 2] {
    let mut members = HotResetSet::of(2).into_iter();
    std::array::from_fn(|_| {
        let (messages, space, host) = (Messages::new(), GuestSpace::new(), Host::new());
        let wires = Arc::new(Wires::default());
        let device = Arc::new(Device::with(&nic_config()).without_reset());
        let parts = VfioParts {
            reset_with: members.next(),
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
    })
}

#[test]
fn functions_of_a_card_are_reset_together_once_all_are_silent() {
    let [first, second] = card();
    first.function.bus_mastering(true);
    first.function.reset();
    // Used again before the other was reset: not pulled from under its driver.
    first.function.bus_mastering(true);
    second.function.reset();
    assert!(
        !first.device.told().contains(&Told::HotReset) && !second.device.told().contains(&Told::HotReset)
    );
    first.function.reset();
    let told = first.device.told();
    let quiet = Told::Config(4, vec![0x03, 0x04]);
    let at = told
        .iter()
        .position(|told| *told == Told::HotReset)
        .expect("all are silent");
    assert!(
        told[..at].contains(&Told::Disabled(Interrupt::Intx)) && told[at - 1] == quiet,
        "{told:?}"
    );
    assert_eq!(second.device.told(), []);
}

#[test]
fn a_function_whose_companion_the_host_took_back_is_reset_where_the_host_does_that() {
    let [first, second] = card();
    first.function.contain();
    second.function.leave();
    second.function.give_back();
    // Somebody else has the other now.
    first.device.refuse(Asked::HotReset, libc::EINVAL);
    first.function.reset();
    first.function.bus_mastering(true);
    assert!(!opened(&first));
    // Or nobody has.
    first.device.relent();
    first.function.reset();
    assert!(first.device.told().contains(&Told::HotReset));
    first.function.bus_mastering(true);
    assert!(opened(&first));
}

#[test]
fn a_reset_of_a_card_that_is_refused_leaves_all_working() {
    let [first, second] = card();
    second.device.refuse(Asked::HotReset, libc::EBUSY);
    first.function.reset();
    second.function.reset();
    second.function.bus_mastering(true);
    let told = second.device.told();
    assert!(
        told.ends_with(&[Told::Config(4, vec![0x07, 0x04])]) && !told.contains(&Told::HotReset),
        "{told:?}"
    );
    // The kernel resets what is left when the last of them is closed.
    drop((first.function, second.function));
    assert!(!first.device.told().contains(&Told::HotReset));
}
