//! Tables that lead to what is no RAM: registers of the unit's own or of a device, and addresses that nobody has.

use std::sync::atomic::Ordering;

use virtio_queue::{Queue, QueueT};
use vm_memory::{Bytes, GuestAddress, GuestMemory, Permissions};

use super::*;

/// The unit's own registers, a BAR, where the machine's RAM ends, and the last page that a table can name.
const NO_RAM: [u64; 4] = [0xfeb0_4000, 0xe000_0000, 0x60_0000, 0xf_ffff_ffff_f000];

/// A unit whose device's page 3 leads to `target`, and page 2 to RAM.
fn leading_to(target: u64) -> Rig {
    let rig = Rig::running();
    rig.cover();
    rig.map(2, 0x50_0000);
    rig.map(3, target);
    rig
}

#[test]
fn what_is_mapped_to_no_ram_is_neither_read_nor_written_nor_exchanged() {
    for target in NO_RAM {
        let rig = leading_to(target);
        let before = [0x18, 0x2000, 0x2008, 0x2020].map(|register| rig.read(register));
        let dma = dma(&rig);
        for offset in [0, 8, 0x2000 - 8] {
            let at = GuestAddress(0x3000 + offset);
            let view = dma.view();
            assert!(view.read_obj::<u64>(at).is_err(), "{target:#x}");
            assert!(view.write_obj(u64::MAX, at).is_err(), "{target:#x}");
            assert!(view.load::<u64>(at, Ordering::SeqCst).is_err(), "{target:#x}");
            assert!(view.store(u64::MAX, at, Ordering::SeqCst).is_err(), "{target:#x}");
            assert!(!view.check_range(at, 8, Permissions::ReadWrite), "{target:#x}");
        }
        // Over the end of a page of RAM: nothing of it is written.
        let view = dma.view();
        assert!(view.write_slice(&[0xaa; 32], GuestAddress(0x2ff0)).is_err());
        assert!(view.read_slice(&mut [0; 32], GuestAddress(0x2ff0)).is_err());
        drop(view);
        assert_eq!((rig.load(0x50_0ff0), rig.load(0x50_0ff8)), (0, 0));
        // The unit let the requests pass, and registers are none of theirs. What was no page was reported.
        let after = [0x18, 0x2000, 0x2008].map(|register| rig.read(register));
        assert_eq!(after, before[..3], "{target:#x}");
        assert!(rig.events().iter().all(|code| *code == 2), "{target:#x}");
        assert_eq!(
            rig.events().len(),
            5,
            "one for each request of the page that is not there"
        );
        dma.view()
            .write_obj(7_u64, GuestAddress(0x2008))
            .expect("what is RAM is reached as before");
        assert_eq!(rig.load(0x50_0008), 7);
    }
}

#[test]
fn a_queue_that_is_mapped_to_no_ram_is_empty_and_takes_nothing() {
    for target in NO_RAM {
        let rig = leading_to(target);
        let dma = dma(&rig);
        let queue = |descriptors, available, used| {
            let mut queue = Queue::new(16).expect("a size that queues have");
            queue.set_size(16);
            queue.set_desc_table_address(Some(descriptors), Some(0));
            queue.set_avail_ring_address(Some(available), Some(0));
            queue.set_used_ring_address(Some(used), Some(0));
            queue.set_ready(true);
            queue
        };
        // One chain, of one descriptor, is there for whom can read the rings.
        rig.store(0x50_0200, 1 << 16);
        // Available and used ring.
        let mut available = queue(0x2000, 0x3200, 0x2400);
        assert!(
            available.avail_idx(&dma.view(), Ordering::SeqCst).is_err(),
            "{target:#x}"
        );
        assert!(
            available.pop_descriptor_chain(&dma.view()).is_none(),
            "{target:#x}"
        );
        let mut used = queue(0x2000, 0x2200, 0x3400);
        assert!(used.add_used(&dma.view(), 0, 1).is_err(), "{target:#x}");
        // Descriptors: the chain is announced, and has none that can be read.
        let mut descriptors = queue(0x3000, 0x2200, 0x2400);
        let view = dma.view();
        let chain = descriptors.pop_descriptor_chain(&view).expect("announced");
        assert_eq!(chain.count(), 0, "{target:#x}");
        drop(view);
        assert!(rig.events().is_empty(), "{target:#x}");
    }
}

#[test]
fn a_message_that_is_mapped_to_no_ram_is_written_nowhere() {
    for target in NO_RAM {
        let rig = leading_to(target);
        let before = rig.read(0x18);
        let sink = RemappingSink::new(rig.unit.clone());
        for address in [0x3000, 0x3018, 0x3ffc, 0x2ffe] {
            let data = u32::MAX;
            sink.signal(&requester(), MsiMessage { address, data });
        }
        assert!(rig.processors.take().is_empty() && rig.events().is_empty());
        assert_eq!((rig.read(0x18), rig.load(0x50_0ff8)), (before, 0), "{target:#x}");
    }
}

#[test]
fn a_page_that_is_mapped_into_the_interrupt_window_sends_no_interrupt() {
    let rig = leading_to(0xfee0_0000);
    assert!(
        dma(&rig)
            .view()
            .write_obj(0x31_u32, GuestAddress(0x3000))
            .is_err()
    );
    let message = MsiMessage {
        address: 0x3000,
        data: 0x31,
    };
    RemappingSink::new(rig.unit.clone()).signal(&requester(), message);
    assert!(rig.processors.take().is_empty() && rig.events().is_empty());
}
