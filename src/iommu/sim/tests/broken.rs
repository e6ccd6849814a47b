//! What serves the guest is lost, and who hears of it.

use super::super::kernel::{GUEST, OWN_FUNCTION};
use super::*;
use crate::iommu::amd::memory::SystemMemory;
use crate::iommu::amd::spec::viommu::command_dirty;
use crate::iommu::viommu::features::offer as viommu_offer;
use crate::iommu::viommu::testing::FakeProtection;
use crate::iommu::viommu::{ServedParts, ServedUnit};
use crate::platform::addr::GpaRange;

impl Rig {
    /// The entry by which the unit finds what serves guests.
    fn own_entry(&self) -> Dte {
        let at = OWN + u64::from(OWN_FUNCTION.requester_id()) * Dte::LEN;
        Dte::from_quadwords(
            [0, 8, 16, 24].map(|word| self.host.memory.load(Gpa(at + word)).expect("the host's own")),
        )
    }

    fn set_own_entry(&self, entry: &Dte) {
        let state = &mut *lock(&self.host.state);
        let effects = state
            .kernel
            .set_entry(&self.host.unit, &self.host.memory, OWN_FUNCTION, entry);
        assert!(!effects.guests);
    }

    /// What serves guests is no longer there; what leads to it, to have it back.
    fn lose_maps(&self) -> Dte {
        let before = self.own_entry();
        let nothing = lock(&self.host.state).kernel.blocked();
        self.set_own_entry(&nothing);
        before
    }
}

#[test]
fn what_goes_wrong_in_the_unit_is_told_to_whoever_serves_the_guest() {
    let rig = Rig::new();
    let (served, [commands, events]) = rig.running();
    let maps = rig.lose_maps();
    assert_eq!(rig.host.take_errors(), HardwareErrors::default());
    rig.submit(&served, &[forget(1)]);
    assert_eq!(served.read(STATUS) & 0x10, 0, "the ring stopped");
    assert_eq!(rig.event(0)[1], 0x6400_0000, "as the guest is told");
    assert!(rig.host.more.read().is_ok(), "the event loop looks");
    let broken = HardwareErrors {
        lost_records: 0,
        // The dirty bit of guest 1, which stands before commands are fetched.
        broken_at: Some(command_dirty(GUEST).0),
    };
    assert_eq!(rig.host.take_errors(), broken);
    assert_eq!(rig.host.take_errors(), HardwareErrors::default(), "once");
    // Mended, and switched off and on.
    rig.set_own_entry(&maps);
    rig.host.destroy(commands).expect("nothing uses a ring");
    rig.host.reset_page(served.id).expect("it has such a request");
    rig.host
        .queue_alloc(served.id, &queue(QueueKind::Command, RING))
        .expect("a ring");
    rig.flush(&served, &[forget(1)]);
    assert_eq!(rig.host.take_errors(), HardwareErrors::default());
    // A log that cannot be written.
    rig.host.destroy(events).expect("nothing uses a ring");
    rig.host
        .queue_alloc(served.id, &queue(QueueKind::Event, RAM))
        .expect("where it is, is the guest's affair");
    rig.nest(&served, 0, 1);
    rig.map(1, 0);
    for _ in 0..5 {
        assert!(!rig.dma(0, AT, 1));
    }
    let lost = HardwareErrors {
        lost_records: 5,
        broken_at: None,
    };
    assert_eq!(rig.host.take_errors(), lost);
    // Nobody is told after a reset, nor of a unit that was there before.
    assert!(!rig.dma(0, AT, 1));
    rig.host.reset();
    assert_eq!(rig.host.take_errors(), HardwareErrors::default());
}

/// The front end before the host: stopped, off, mended, on.
#[test]
fn a_guests_unit_stops_when_the_hosts_breaks_and_works_again_when_that_is_mended() {
    const TABLE: u64 = 0x50_0000;
    const ON: u64 = 1 << 16 | 1 << 12 | 1 << 2 | 1;
    let rig = Rig::new();
    let protection = FakeProtection::new(rig.ram.clone());
    let functions = [0, 1].map(|device| {
        let at = Sbdf {
            segment: 0,
            bdf: name(device),
        };
        (Arc::new(Requester::new(at)), HostDevice(device))
    });
    let unit = ServedUnit::new(ServedParts {
        name: "iommu0".to_owned(),
        at: Sbdf::default(),
        mmio: GpaRange::new(Gpa(0xfeb0_4000), 0x4000).expect("valid"),
        features: viommu_offer(&[features()], &Wanted::DEFAULT),
        ram: rig.ram.clone(),
        host: rig.host.clone(),
        protection: protection.clone(),
        functions: functions.to_vec(),
    });
    let unit = unit.expect("a host that refuses nothing");
    let write = |at: u64, value: u64| unit.write(at, &value.to_le_bytes());
    let status = || {
        let mut data = [0; 4];
        unit.read(0x2020, &mut data);
        u32::from_le_bytes(data)
    };
    let turn = || {
        rig.host.run_commands();
        unit.hear_errors();
    };
    // Tables of domain 1 for the first device.
    let base = tables(1);
    rig.store(base, (base + 0x1000) | 1);
    for level in 1..4 {
        let table = base + level * 0x1000;
        rig.store(table, (table + 0x1000) | 7);
    }
    rig.map(1, BUFFER);
    for (at, value) in [
        (0x00, TABLE | 2),
        (0x08, RING | 8 << 56),
        (0x10, LOG | 8 << 56),
        (0x18, ON),
    ] {
        write(at, value);
    }
    let at = TABLE + 32 * u64::from(NAMES[0]);
    for (word, value) in guest_dte(1).into_quadwords().into_iter().enumerate().rev() {
        protection.store(Gpa(at + 8 * word as u64), &value.to_le_bytes());
    }
    assert!(rig.dma(0, AT, 1));
    assert_eq!(status() & 0x18, 0x18, "both rings run");

    let maps = rig.lose_maps();
    rig.store(RING, 3 << 60 | 1 << 32);
    rig.store(RING + 8, 0x7fff_ffff_ffff_f007);
    write(0x2008, 0x10);
    turn();
    assert!(!rig.dma(0, AT, 2) && !rig.dma(1, BUFFER, 2), "blocked");
    assert_eq!(status() & 0x18, 0, "no ring runs");
    assert!(unit.state().contains("STOPPED"), "{}", unit.state());
    // Off and on without anything mended: giving devices their names finds out.
    write(0x18, ON & !1);
    write(0x18, ON);
    turn();
    assert_eq!(status() & 0x18, 0);
    assert_eq!(unit.counts().stops, 2);
    assert!(!rig.dma(0, AT, 2));
    // Mended.
    write(0x18, ON & !1);
    rig.set_own_entry(&maps);
    write(0x18, ON);
    write(0x2008, 0x10);
    turn();
    assert_eq!(status() & 0x18, 0x18);
    assert!(rig.dma(0, AT, 3));
    assert_eq!((rig.load(BUFFER), unit.counts().stops), (3, 2));
}
