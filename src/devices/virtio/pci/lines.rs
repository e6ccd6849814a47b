//! A function's interrupts.

use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU16, Ordering};
use std::sync::{Arc, Mutex};

use crate::devices::virtio::Interrupts;
use crate::devices::virtio::registers::{Live, NO_VECTOR};
use crate::pci::endpoint::{Endpoint, InterruptMode};
use crate::platform::lock::lock;

/// Bits of the ISR status (4.1.4.5).
pub(super) const ISR_QUEUE: u8 = 1;
pub(super) const ISR_CONFIGURATION: u8 = 2;

/// A device's interrupts: by MSI-X to the vectors the driver chose, else by wire and ISR status.
pub(super) struct Lines {
    endpoint: Arc<Endpoint>,
    pub(super) config_vector: AtomicU16,
    pub(super) queue_vectors: Vec<AtomicU16>,
    /// Held while the wire is driven, so that status and wire agree.
    isr: Mutex<u8>,
    needs_reset: AtomicBool,
    generation: AtomicU8,
}

impl Lines {
    pub(super) fn new(endpoint: Arc<Endpoint>, queues: u16) -> Self {
        Self {
            endpoint,
            config_vector: AtomicU16::new(NO_VECTOR),
            queue_vectors: (0..queues).map(|_| AtomicU16::new(NO_VECTOR)).collect(),
            isr: Mutex::new(0),
            needs_reset: AtomicBool::new(false),
            generation: AtomicU8::new(0),
        }
    }

    pub(super) fn live(&self) -> Live {
        Live {
            needs_reset: self.needs_reset.load(Ordering::Acquire),
            generation: self.generation.load(Ordering::Acquire),
        }
    }

    fn interrupt(&self, vector: u16, status: u8) {
        if self.endpoint.interrupt_mode() == InterruptMode::Msix {
            if vector != NO_VECTOR {
                self.endpoint.signal(vector);
            }
            return;
        }
        let mut isr = lock(&self.isr);
        *isr |= status;
        self.endpoint.set_intx(true);
    }

    /// Reading the status clears it and releases the wire.
    pub(super) fn take_isr(&self) -> u8 {
        let mut isr = lock(&self.isr);
        self.endpoint.set_intx(false);
        std::mem::take(&mut isr)
    }

    pub(super) fn reset(&self) {
        self.config_vector.store(NO_VECTOR, Ordering::Release);
        for vector in &self.queue_vectors {
            vector.store(NO_VECTOR, Ordering::Release);
        }
        self.needs_reset.store(false, Ordering::Release);
        self.take_isr();
    }
}

impl Interrupts for Lines {
    fn queue(&self, queue: u16) {
        if let Some(vector) = self.queue_vectors.get(usize::from(queue)) {
            self.interrupt(vector.load(Ordering::Acquire), ISR_QUEUE);
        }
    }

    fn configuration_changed(&self) {
        self.generation.fetch_add(1, Ordering::AcqRel);
        self.interrupt(self.config_vector.load(Ordering::Acquire), ISR_CONFIGURATION);
    }

    fn needs_reset(&self) {
        self.needs_reset.store(true, Ordering::Release);
        self.configuration_changed();
    }
}
