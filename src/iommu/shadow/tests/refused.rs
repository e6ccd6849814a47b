//! What the host refuses, and what functions reach then.

use super::*;

#[test]
fn what_the_host_does_not_map_is_not_there_and_comes_with_the_next_invalidation() {
    let rig = Rig::attached();
    rig.map(0, 0x5000);
    rig.map(2, 0x5000);
    rig.kernel.refuse_once(Call::Copy, 0, libc::ENOMEM);
    rig.commands(&[pages(PageRange::Everything)]);
    assert_eq!(rig.mapped(), [(BASE + 0x2000, 0x1000)]);
    rig.commands(&[pages(PageRange::Everything)]);
    assert_eq!(rig.mapped(), [(BASE, 0x1000), (BASE + 0x2000, 0x1000)]);
}

#[test]
fn what_lies_where_no_device_may_be_is_not_there() {
    let rig = Rig::reaching(&[0..=BASE + 0xfff, BASE + 0x2000..=u64::MAX]);
    rig.view(0, tables());
    (0..4).for_each(|page| rig.map(page, 0x5000 + (page << 12)));
    rig.commands(&[pages(PageRange::Everything)]);
    assert_eq!(rig.mapped(), [(BASE, 0x1000), (BASE + 0x2000, 0x2000)]);
    assert_eq!(rig.reaches(BASE + 0x2000), Some(0x7000));
}

#[test]
fn a_host_that_does_not_unmap_loses_the_space_and_confines_all_the_same() {
    let rig = Rig::attached();
    rig.map(0, 0x5000);
    rig.map(1, 0x9000);
    rig.commands(&[pages(PageRange::Everything)]);
    rig.view(1, tables());
    let before = rig.functions[0].place();
    rig.unmap(0);
    rig.kernel.refuse_once(Call::Unmap, 0, libc::EBUSY);
    rig.invalidate_page(0);
    assert_eq!(
        (rig.reaches(BASE), rig.reaches(BASE + 0x1000)),
        (None, Some(0x9000))
    );
    assert_ne!(rig.functions[0].place(), before);
    assert_eq!(rig.functions[1].place(), rig.functions[0].place());
    // Guest RAM, blocked, and the new one.
    assert_eq!(rig.kernel.spaces().len(), 3);
}

#[test]
fn a_function_that_cannot_be_attached_or_given_a_space_is_blocked() {
    let rig = Rig::new();
    rig.kernel.refuse_once(Call::Attach, 0, libc::EINVAL);
    rig.view(0, tables());
    assert!(rig.functions[0].place().is_some() && rig.mapped().is_empty());
    assert_ne!(rig.functions[0].place(), Some(rig.ram_space));
    rig.kernel.refuse(Call::Alloc, libc::ENOMEM);
    rig.view(1, tables());
    assert_eq!(rig.functions[1].place(), rig.functions[0].place());
    rig.kernel.relent();
    rig.map(0, 0x5000);
    rig.commands(&[Command::InvalidateAll]);
    assert_eq!(rig.reaches(BASE), Some(0x5000));
}

#[test]
fn a_function_that_is_not_even_blocked_is_detached() {
    let rig = Rig::new();
    rig.kernel.refuse(Call::Attach, libc::EIO);
    rig.view(0, tables());
    assert_eq!(rig.functions[0].place(), None);
    rig.kernel.relent();
    rig.view(0, View::Identity(Access::BOTH));
    assert_eq!(rig.functions[0].place(), Some(rig.ram_space));
}

#[test]
fn whatever_the_host_refuses_once_nothing_is_reached_that_should_not_be_and_all_comes_back() {
    let once = [Call::Alloc, Call::Copy, Call::Unmap, Call::Attach, Call::Destroy];
    let once = once.map(|call| [Some(call), None, None]);
    // Detached is only what is not even blocked, and silenced what is not even detached.
    let more = [
        [None, Some(Call::Attach), None],
        [None, Some(Call::Attach), Some(Call::Detach)],
        [Some(Call::Unmap), Some(Call::Attach), Some(Call::Detach)],
    ];
    let refusals = once.into_iter().chain(more);
    for (refused, before) in refusals.flat_map(|calls| (0..6).map(move |before| (calls, before))) {
        let rig = Rig::new();
        let [once, after, always] = refused;
        once.inspect(|call| rig.kernel.refuse_once(*call, before, libc::EIO));
        after.inspect(|call| rig.kernel.refuse_after(*call, before, libc::EIO));
        always.inspect(|call| rig.kernel.refuse(*call, libc::EIO));
        rig.map(0, 0x5000);
        rig.map(2, 0x9000);
        rig.view(0, tables());
        rig.unmap(0);
        rig.map(2, 0x7000);
        rig.map(3, 0x5000);
        rig.commands(&[pages(PageRange::Everything)]);
        let allowed = [None, Some(0x7000), Some(0x5000)];
        let reached = [0, 2, 3].map(|page| rig.reaches(BASE + (page << 12)));
        let right = reached
            .iter()
            .zip(allowed)
            .all(|(is, may)| is.is_none() || *is == may);
        assert!(right, "{refused:?} {before}: {reached:x?}");
        rig.view(0, View::Nothing);
        assert_eq!(
            (rig.reaches(BASE), rig.reaches(0x5000)),
            (None, None),
            "{refused:?} {before}"
        );
        rig.kernel.relent();
        rig.view(0, tables());
        let reached = [0, 2, 3].map(|page| rig.reaches(BASE + (page << 12)));
        assert_eq!(reached, allowed, "{refused:?} {before}");
    }
}

#[test]
fn a_function_that_is_neither_blocked_nor_detached_is_silenced_before_the_wait_is_answered() {
    let rig = Rig::attached();
    rig.map(0, 0x5000);
    rig.invalidate_page(0);
    let old = rig.functions[0].place();
    rig.kernel.refuse(Call::Attach, libc::EIO);
    rig.kernel.refuse(Call::Detach, libc::EIO);
    rig.view(0, View::Nothing);
    assert!(rig.functions[0].is_silent());
    assert_eq!((rig.functions[0].place(), rig.reaches(BASE)), (old, None));
    // What it is attached to stays, and is tried to be left with each settling.
    assert!(rig.kernel.spaces().contains(&old.expect("attached")));
    rig.kernel.relent();
    rig.commands(&[]);
    assert!(!rig.functions[0].is_silent() && rig.mapped().is_empty());
    assert_ne!(rig.functions[0].place(), old);
    // Guest RAM, and the empty one.
    assert_eq!(rig.kernel.spaces().len(), 2);
}

#[test]
fn a_silenced_function_that_is_to_stay_where_it_is_is_attached_there_again() {
    let rig = Rig::attached();
    rig.map(0, 0x5000);
    rig.invalidate_page(0);
    let place = rig.functions[0].place();
    rig.kernel.refuse(Call::Attach, libc::EIO);
    rig.kernel.refuse(Call::Detach, libc::EIO);
    rig.view(0, View::Nothing);
    assert!(rig.functions[0].is_silent());
    rig.kernel.relent();
    rig.view(0, tables());
    assert_eq!(
        (rig.functions[0].place(), rig.reaches(BASE)),
        (place, Some(0x5000))
    );
}

#[test]
fn while_nothing_keeps_a_function_from_what_it_reached_no_wait_is_answered_and_nobody_tries_for_ever() {
    let rig = Rig::attached();
    rig.map(0, 0x5000);
    rig.invalidate_page(0);
    let ways = [Call::Attach, Call::Detach, Call::Silence];
    ways.into_iter()
        .for_each(|call| rig.kernel.refuse(call, libc::EIO));
    rig.unit.views.lock().expect("a test's own")[0] = View::Nothing;
    let entry = Command::InvalidateDevice { device: device(0) };
    rig.shadow().follow(&[entry]).expect("it answers");
    let mut effort = Effort::of_a_call();
    assert!(!rig.shadow().settle(&mut effort) && !effort.goes_on());
    assert_eq!(rig.reaches(BASE), Some(0x5000), "or the test shows nothing");
    for call in ways {
        rig.kernel.relent();
        ways.into_iter()
            .filter(|other| *other != call)
            .for_each(|other| rig.kernel.refuse(other, libc::EIO));
        assert!(rig.settle(), "{call:?} is enough");
        assert_eq!(rig.reaches(BASE), None, "{call:?}");
    }
}

#[test]
fn a_function_that_left_and_is_not_blocked_is_silent() {
    let rig = Rig::attached();
    rig.map(0, 0x5000);
    rig.invalidate_page(0);
    rig.kernel.refuse(Call::Attach, libc::EIO);
    rig.kernel.refuse(Call::Detach, libc::EIO);
    rig.shadow().left(&rig.requesters[0]);
    assert!(rig.functions[0].is_silent() && rig.reaches(BASE).is_none());
}

#[test]
fn a_shadow_of_a_host_that_tells_no_windows_or_makes_no_space_is_none_and_leaves_nothing() {
    let kernel = Kernel::new();
    let ram = GuestRam::new(GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 1 << 20)]).expect("a MiB"));
    let space = Arc::new(Ioas::new(kernel.clone(), ram.clone()).expect("made"));
    let unit: Arc<Unit> = Arc::default();
    let error = |call| {
        kernel.refuse(call, libc::ENOMEM);
        let shadow = Shadow::new(ShadowParts {
            name: "iommu0".to_owned(),
            unit: Arc::downgrade(&unit) as Weak<dyn Views>,
            requests: kernel.clone(),
            space: space.clone(),
            ram: ram.clone(),
            last: LAST,
            limits: Limits::DEFAULT,
            functions: Vec::new(),
        });
        kernel.relent();
        shadow.err().expect("refused").to_string()
    };
    assert_eq!(
        error(Call::Windows),
        "cannot ask the host which addresses its devices can reach"
    );
    assert_eq!(
        error(Call::Alloc),
        "cannot make an I/O address space for what iommu0 translates"
    );
    assert_eq!(kernel.spaces(), [space.id()]);
}

#[test]
fn a_guest_is_told_of_a_function_that_the_host_blocks_each_time_its_entry_is_read() {
    let rig = Rig::new();
    rig.kernel.refuse_once(Call::Attach, 0, libc::EINVAL);
    rig.view(0, tables());
    assert_eq!(rig.blocked(), [0]);
    rig.commands(&[pages(PageRange::Everything)]);
    assert!(rig.blocked().is_empty());
    rig.kernel.refuse(Call::Alloc, libc::ENOMEM);
    rig.unit.views.lock().expect("a test's own")[1] = View::Identity(Access::READ);
    // Read several times before anybody is told.
    let entry = Command::InvalidateDevice { device: device(1) };
    (0..3).for_each(|_| rig.shadow().follow(&[entry]).expect("it answers"));
    rig.commands(&[]);
    // One entry's invalidation has all of them read.
    assert_eq!(rig.blocked(), [0, 1]);
    rig.kernel.relent();
    rig.commands(&[Command::InvalidateAll]);
    assert!(rig.blocked().is_empty());
    // One that is blocked by the guest's own will is no news, whatever the host says.
    rig.kernel.refuse(Call::Attach, libc::EIO);
    rig.view(0, View::Nothing);
    assert!(rig.blocked().is_empty());
}

#[test]
fn functions_of_a_space_that_is_given_up_and_not_made_anew_are_told_of() {
    let rig = Rig::attached();
    rig.view(1, tables());
    rig.map(0, 0x5000);
    rig.invalidate_page(0);
    rig.unmap(0);
    rig.kernel.refuse_once(Call::Unmap, 0, libc::EBUSY);
    rig.kernel.refuse(Call::Alloc, libc::ENOMEM);
    rig.invalidate_page(0);
    assert_eq!((rig.blocked(), rig.reaches(BASE)), (vec![0, 1], None));
}
