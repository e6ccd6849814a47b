//! Whom the host's units send interrupts to.

use super::*;

fn processors(apic_ids: &[u32]) -> GuestProcessors {
    let vm = tempfile::tempfile().expect("a file");
    GuestProcessors::new(Arc::new(vm), apic_ids.to_vec())
}

fn target(destination: u32, logical: bool) -> InterruptTarget {
    InterruptTarget {
        destination,
        logical,
        vector: 0x41,
    }
}

#[test]
fn a_physical_destination_names_the_processor_with_that_apic_id() {
    let processors = processors(&[0, 1, 4, 5, 0x123]);
    for id in [0, 4, 0x123] {
        assert_eq!(processors.vcpu(target(id, false)), Some(id));
    }
    for absent in [2, 0xff, u32::MAX] {
        assert_eq!(processors.vcpu(target(absent, false)), None);
    }
}

#[test]
fn a_logical_destination_names_processors_of_a_cluster_and_the_first_of_them_is_told() {
    let processors = processors(&[0, 1, 4, 5, 0x12, 0x1f]);
    for (destination, named) in [
        (1, Some(0)),
        (1 << 5, Some(5)),
        (0x30, Some(4)),
        (1 << 16 | 1 << 2, Some(0x12)),
        (1 << 16 | 1 << 15, Some(0x1f)),
        // Nobody's bit, nobody's cluster, nobody at all.
        (1 << 2, None),
        (1 << 16 | 1, None),
        (2 << 16 | 1, None),
        (0, None),
    ] {
        assert_eq!(
            processors.vcpu(target(destination, true)),
            named,
            "{destination:#x}"
        );
    }
}
