//! Interrupts of an embedded function: which way they go, and the wire.

use std::sync::atomic::{AtomicBool, Ordering};

use super::*;
use crate::pci::testing::Messages;
use crate::pci::tree::{BarKind, Identity};
use crate::platform::irq::InterruptController;

const IDENTITY: Identity = Identity {
    vendor: 1,
    device: 2,
    class: 0xff_0000,
    revision: 0,
    subsystem_vendor: 0,
    subsystem: 0,
};
/// Dwords of the capabilities, in the order they are added.
const MSI: u16 = 0x10;
const MSIX: u16 = 0x16;

#[derive(Default)]
struct Wire(Mutex<Vec<bool>>);

impl InterruptController for Wire {
    fn line_changed(&self, _gsi: u32, asserted: bool) {
        self.0.lock().expect("not poisoned").push(asserted);
    }
    fn pulse(&self, _gsi: u32) {}
}

impl Wire {
    fn changes(&self) -> Vec<bool> {
        std::mem::take(&mut self.0.lock().expect("not poisoned"))
    }
}

fn parts() -> (Endpoint, Arc<Wire>, Arc<Messages>) {
    let (wire, messages) = (Arc::new(Wire::default()), Messages::new());
    let bar = BarSpec {
        index: 0,
        kind: BarKind::Mem32 { prefetchable: false },
        size: 0x1000,
    };
    let endpoint = Endpoint::new(
        ConfigSpace::endpoint(&IDENTITY).bar(bar),
        messages.requester().clone(),
    )
    .with_intx(Pin::A, IrqLine::new(wire.clone(), 16))
    .with_msi(1, messages.port())
    .with_msix(MsixLayout::new(0, 0, 1), messages.port());
    (endpoint, wire, messages)
}

#[test]
fn the_wire_follows_and_status_shows_it() {
    let (endpoint, wire, _messages) = parts();
    endpoint.set_intx(true);
    assert_eq!(endpoint.config_read(1) & STATUS_INTERRUPT, STATUS_INTERRUPT);
    endpoint.set_intx(false);
    assert_eq!(endpoint.config_read(1) & STATUS_INTERRUPT, 0);
    assert_eq!(wire.changes(), [true, false]);
}

#[test]
fn interrupt_disable_silences_the_wire_but_not_the_status() {
    let (endpoint, wire, _messages) = parts();
    endpoint.set_intx(true);
    let _ = endpoint.config_write(1, DwordWrite::whole(0x400));
    assert_eq!(endpoint.config_read(1) & STATUS_INTERRUPT, STATUS_INTERRUPT);
    let _ = endpoint.config_write(1, DwordWrite::whole(0));
    assert_eq!(wire.changes(), [true, false, true]);
}

#[test]
fn a_function_that_uses_messages_leaves_the_wire_alone() {
    let (endpoint, wire, messages) = parts();
    endpoint.set_intx(true);
    let _ = endpoint.config_write(MSI, DwordWrite::whole(1 << 16));
    assert_eq!(
        (endpoint.interrupt_mode(), wire.changes()),
        (InterruptMode::Msi, vec![true, false])
    );
    endpoint.signal(0);
    assert_eq!(messages.take().len(), 1);
    let _ = endpoint.config_write(MSIX, DwordWrite::whole(1 << 31));
    assert_eq!(endpoint.interrupt_mode(), InterruptMode::Msix);
    assert!(endpoint.bar_write(0, 12, &[0; 4]));
    endpoint.signal(0);
    assert_eq!(messages.routes()[0].signals(), 1);
}

/// A device that interrupts without a pause, on a thread of its own, while its driver changes its mind.
#[test]
fn class_22_kinds_of_interrupts_change_places_a_thousand_times_under_interrupts() {
    const MSI_ON: DwordWrite = DwordWrite::whole(1 << 16);
    const MSIX_ON: DwordWrite = DwordWrite::whole(1 << 31);
    const OFF: DwordWrite = DwordWrite::whole(0);
    let (endpoint, wire, messages) = parts();
    assert!(endpoint.bar_write(0, 12, &[0; 4]));
    let done = AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            while !done.load(Ordering::Relaxed) {
                endpoint.set_intx(true);
                endpoint.signal(0);
                endpoint.set_intx(false);
            }
        });
        for _ in 0..1_000 {
            for (register, write) in [(MSI, MSI_ON), (MSI, OFF), (MSIX, MSIX_ON), (MSIX, OFF)] {
                let _ = endpoint.config_write(register, write);
            }
        }
        done.store(true, Ordering::Relaxed);
    });
    // Nothing is left asserted or on its way, and one route was enough.
    assert_ne!(wire.changes().last(), Some(&true));
    assert!(messages.routes().len() <= 1, "{} routes", messages.routes().len());
    let before = messages.count();
    endpoint.signal(0);
    assert_eq!(messages.count(), before);

    // Each kind works.
    endpoint.set_intx(true);
    endpoint.set_intx(false);
    assert_eq!(wire.changes(), [true, false]);
    let _ = endpoint.config_write(MSI, MSI_ON);
    endpoint.signal(0);
    let _ = endpoint.config_write(MSI, OFF);
    let _ = endpoint.config_write(MSIX, MSIX_ON);
    endpoint.signal(0);
    assert_eq!(messages.count(), before + 2);
}

#[test]
fn a_message_without_messages_enabled_goes_nowhere() {
    let (endpoint, wire, messages) = parts();
    endpoint.signal(0);
    endpoint.signal(0xffff);
    assert_eq!(
        (
            messages.take().len(),
            messages.routes().len(),
            wire.changes().len()
        ),
        (0, 0, 0)
    );
}

#[test]
fn reset_lets_the_wire_go_and_switches_messages_off() {
    let (endpoint, wire, _messages) = parts();
    endpoint.set_intx(true);
    endpoint.reset();
    assert_eq!(wire.changes(), [true, false]);
    let _ = endpoint.config_write(MSIX, DwordWrite::whole(1 << 31));
    endpoint.reset();
    assert_eq!(endpoint.interrupt_mode(), InterruptMode::Intx);
}

#[test]
#[should_panic(expected = "does not fit")]
fn an_msix_table_that_leaves_its_bar_is_refused() {
    let messages = Messages::new();
    let bar = BarSpec {
        index: 0,
        kind: BarKind::Mem32 { prefetchable: false },
        size: 0x800,
    };
    let config = ConfigSpace::endpoint(&IDENTITY).bar(bar);
    let _ = Endpoint::new(config, messages.requester().clone())
        .with_msix(MsixLayout::new(0, 0, 1), messages.port());
}
