//! Rings that no driver would set up so, and doorbells that nobody saw.

use super::*;

#[test]
fn a_doorbell_that_nobody_saw_has_its_commands_carried_out_later() {
    let rig = Rig::new();
    let (served, _) = rig.running();
    rig.store(FLAG, 0);
    rig.store(RING, 1 << 60 | FLAG | 1);
    rig.store(RING + 8, 0x5a);
    let tail = 0x10_u32.to_le_bytes();
    for other in [0x00, 0x10, 0x20, 0x40, 0x1000, u64::MAX] {
        assert!(!rig.host.late_doorbell(other, &tail), "{other:#x}");
    }
    assert!(rig.host.late_doorbell(TAIL, &tail));
    assert_eq!((served.read(TAIL), rig.load(FLAG)), (0x10, 0));
    assert!(!rig.host.run_late_commands());
    assert_eq!(rig.load(FLAG), 0x5a);
    let counts = rig.host.counts();
    assert_eq!((counts.doorbells, counts.polled), (1, 1));
}

#[test]
fn rings_on_each_other_harm_nobody_but_their_guest() {
    let rig = Rig::new();
    let served = rig.served();
    for (kind, base) in [(QueueKind::Command, RING), (QueueKind::Event, RING)] {
        rig.host
            .queue_alloc(served.id, &queue(kind, base))
            .expect("the guest's affair");
    }
    rig.nest(&served, 0, 1);
    let other = rig.nest(&served, 1, 2);
    // What is wrong with the first command is written over it, and stops the ring there.
    rig.submit(&served, &[[0, 0], [0, 0]]);
    assert_eq!(rig.load(RING) >> 60, 5, "ILLEGAL_COMMAND_ERROR");
    assert_eq!((served.read(0x00), served.read(STATUS) & 0x10), (0, 0));
    // Faults of its devices follow, round and round.
    rig.map(1, 0);
    for _ in 0..1_000 {
        assert!(!rig.dma(0, AT, 1));
        let head = served.read(0x18);
        served.write(0x10, head);
    }
    assert!(rig.dma(1, AT, 5), "others work on");
    assert_eq!(rig.host.host_counts().events, [0; 16]);
    rig.host.attach(HostDevice(1), BLOCKED).expect("always there");
    rig.host.destroy(other).expect("unused");
}

#[test]
fn one_ring_of_two_units_means_to_each_what_is_its_own() {
    let rig = Rig::new();
    let (served, _) = rig.running();
    let second = SimHost::new(SimParts {
        name: "iommu1".to_owned(),
        at: Sbdf::default(),
        ram: rig.ram.clone(),
        devices: 1,
        ats: false,
        messages: rig.messages.clone(),
    });
    let second = second.expect("memory and an eventfd");
    let Viommu { id, page } = second.viommu_alloc().expect("the first");
    let VfPage::Trapped(page) = page else {
        panic!("the model's page is no memory");
    };
    second
        .queue_alloc(id, &queue(QueueKind::Command, RING))
        .expect("the guest's affair");
    rig.nest(&served, 0, 1);
    assert!(rig.dma(0, AT, 1));
    rig.map(1, OTHER_BUFFER);
    // The second has no domain 1, so that its doorbell does nothing to the first's.
    rig.store(RING, forget(1)[0]);
    rig.store(RING + 8, forget(1)[1]);
    page.write(TAIL, &0x10_u32.to_le_bytes());
    assert_eq!(second.counts().commands[2], 1);
    assert!(rig.dma(0, AT, 2));
    assert_eq!((rig.load(BUFFER), rig.load(OTHER_BUFFER)), (2, 0));
    served.write(TAIL, 0x10);
    assert!(rig.dma(0, AT, 3));
    assert_eq!(rig.load(OTHER_BUFFER), 3);
}
