//! Wired interrupts: a line that a device raises and lowers, the controller input it drives, and the seam
//! between a controller in user space and the processors' local APICs.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use super::host::HostError;
use super::msi::MsiMessage;

/// An interrupt controller's inputs, numbered by global system interrupt (GSI; ACPI 5.2.12).
///
/// Several lines may share an input. The controller sees each change of each line, in any order between
/// lines, and treats the input as asserted while at least one line holds it.
pub trait InterruptController: Send + Sync {
    /// One line on input `gsi` was asserted (`true`) or released. Called only on changes.
    fn line_changed(&self, gsi: u32, asserted: bool);

    /// A message-like pulse on input `gsi`, for edge-triggered sources.
    fn pulse(&self, gsi: u32);
}

/// Inputs of the IOAPIC, and of the kernel's table of what they send.
pub const IOAPIC_INPUTS: u8 = 24;

/// How an IOAPIC in user space reaches the processors: the kernel's side of a split interrupt controller.
pub trait IoApicHost: Send + Sync {
    /// Deliver `message` now. One that names no processor vanishes, as on hardware.
    fn signal(&self, message: MsiMessage);

    /// Tell the kernel that input `pin` sends `message` while unmasked, or nothing (`None`).
    ///
    /// The kernel reports the end of an interrupt only for vectors of level-triggered messages it knows, so
    /// this comes before the first [`Self::signal`] of an entry. On failure the previous message stays
    /// in force. Setting what is in force already costs nothing.
    ///
    /// # Panics
    /// When `pin` is not below [`IOAPIC_INPUTS`]; it is the controller's own number, never the guest's.
    fn set_route(&self, pin: u8, message: Option<MsiMessage>) -> Result<(), HostError>;

    /// The inputs, a bit each, whose messages processors see as `vector`: whose interrupt it may be that a
    /// processor ended. It is the message's own vector unless something remaps messages on their way.
    fn pins_of(&self, vector: u8) -> u32;
}

/// Who hears that a processor ended a level-triggered interrupt: the IOAPIC.
pub trait EoiListener: Send + Sync {
    /// Some processor wrote its end-of-interrupt register for `vector`. Called on that processor's thread
    /// with no lock held.
    fn end_of_interrupt(&self, vector: u8);
}

/// One device's wire to one controller input.
///
/// Dropping it releases the input, so that a removed device cannot hold a shared interrupt for ever.
pub struct IrqLine {
    controller: Arc<dyn InterruptController>,
    gsi: u32,
    asserted: AtomicBool,
}

impl IrqLine {
    /// A released wire to input `gsi`.
    #[must_use]
    pub fn new(controller: Arc<dyn InterruptController>, gsi: u32) -> Self {
        Self {
            controller,
            gsi,
            asserted: AtomicBool::new(false),
        }
    }

    /// The controller input this wire drives.
    #[must_use]
    pub fn gsi(&self) -> u32 {
        self.gsi
    }

    /// Drive the wire; the controller hears of changes only.
    pub fn set(&self, asserted: bool) {
        if self.asserted.swap(asserted, Ordering::AcqRel) != asserted {
            self.controller.line_changed(self.gsi, asserted);
        }
    }

    /// Whether this wire asserts now.
    #[must_use]
    pub fn is_asserted(&self) -> bool {
        self.asserted.load(Ordering::Acquire)
    }

    /// Signal an edge without holding the wire.
    pub fn pulse(&self) {
        self.controller.pulse(self.gsi);
    }
}

impl Drop for IrqLine {
    fn drop(&mut self) {
        self.set(false);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::Mutex;

    #[derive(Default)]
    struct Recorder(Mutex<Vec<(u32, bool)>>);

    impl InterruptController for Recorder {
        fn line_changed(&self, gsi: u32, asserted: bool) {
            self.0.lock().expect("not poisoned").push((gsi, asserted));
        }
        fn pulse(&self, _gsi: u32) {}
    }

    #[test]
    fn the_controller_hears_of_changes_only() {
        let recorder = Arc::new(Recorder::default());
        let line = IrqLine::new(recorder.clone(), 5);
        line.set(false);
        line.set(true);
        line.set(true);
        line.set(false);
        assert_eq!(*recorder.0.lock().expect("not poisoned"), [(5, true), (5, false)]);
    }

    #[test]
    fn a_dropped_line_lets_go() {
        let recorder = Arc::new(Recorder::default());
        let line = IrqLine::new(recorder.clone(), 7);
        line.set(true);
        drop(line);
        assert_eq!(*recorder.0.lock().expect("not poisoned"), [(7, true), (7, false)]);
    }
}
