//! The IOAPIC's messages on their way through a unit.
//!
//! The IVRS says as whom the IOAPIC sends. Its entries then hold an index, not a vector: the processors see, and
//! end, what the remapping entry says, while the IOAPIC's EOI register takes what its own entry says.

use std::array;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::EmulatedUnit;
use super::messages::concerned;
use crate::guest_warn;
use crate::iommu::amd::commands::Command;
use crate::iommu::amd::effort::Effort;
use crate::iommu::amd::processor::{Follower, NoAnswer};
use crate::platform::addr::Bdf;
use crate::platform::host::HostError;
use crate::platform::irq::{IOAPIC_INPUTS, IoApicHost};
use crate::platform::msi::MsiMessage;

/// What stands between the IOAPIC and the processors: a unit.
pub struct RemappingIoApic {
    unit: Arc<EmulatedUnit>,
    pins: Arc<Pins>,
}

/// What is known of each input.
struct Pins {
    /// As whom the IOAPIC sends.
    device: Bdf,
    host: Arc<dyn IoApicHost>,
    state: Mutex<[Pin; IOAPIC_INPUTS as usize]>,
}

#[derive(Clone, Copy, Default)]
struct Pin {
    /// What the entry sends.
    asked: Option<MsiMessage>,
    /// The vector the processors see, and the one before: an interrupt may be in service while the guest
    /// moves it to another.
    vectors: [Option<u8>; 2],
    /// What the kernel has may be out of date.
    stale: bool,
}

impl Pin {
    fn delivers(&mut self, vector: Option<u8>) {
        let [now, _] = self.vectors;
        if now != vector {
            self.vectors = [vector, now];
        }
    }
}

impl RemappingIoApic {
    /// Messages pass `unit` as those of `device`, and reach the processors by `host`.
    #[must_use]
    pub fn new(unit: Arc<EmulatedUnit>, device: Bdf, host: Arc<dyn IoApicHost>) -> Self {
        let pins = Arc::new(Pins {
            device,
            host,
            state: Mutex::new(array::from_fn(|_| Pin::default())),
        });
        unit.unit.add_follower(Arc::new(Refresh {
            unit: Arc::downgrade(&unit),
            pins: pins.clone(),
        }));
        Self { unit, pins }
    }
}

impl Pins {
    fn state(&self) -> MutexGuard<'_, [Pin; IOAPIC_INPUTS as usize]> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Tell the kernel what `asked` of input `number` becomes at present.
    fn bring(
        &self,
        unit: &EmulatedUnit,
        number: u8,
        pin: &mut Pin,
        asked: Option<MsiMessage>,
    ) -> Result<(), HostError> {
        let message = asked.and_then(|asked| unit.routed(self.device, asked));
        self.host.set_route(number, message)?;
        pin.asked = asked;
        pin.delivers(message.map(|message| message.data.to_le_bytes()[0]));
        Ok(())
    }
}

impl IoApicHost for RemappingIoApic {
    fn signal(&self, message: MsiMessage) {
        let Pins { device, host, .. } = &*self.pins;
        self.unit.send(*device, message, |message| host.signal(message));
    }

    fn set_route(&self, pin: u8, message: Option<MsiMessage>) -> Result<(), HostError> {
        let mut state = self.pins.state();
        let known = state
            .get_mut(usize::from(pin))
            .expect("a number of the controller's own");
        self.pins.bring(&self.unit, pin, known, message)
    }

    fn pins_of(&self, vector: u8) -> u32 {
        let state = self.pins.state();
        let sees = |pin: &Pin| pin.vectors.contains(&Some(vector));
        (0..)
            .zip(state.iter())
            .filter(|(_, pin)| sees(pin))
            .fold(0, |found, (number, _)| found | 1_u32 << number)
    }
}

/// Keeps the kernel's routes at what the unit says.
struct Refresh {
    unit: std::sync::Weak<EmulatedUnit>,
    pins: Arc<Pins>,
}

impl Follower for Refresh {
    fn follow(&self, batch: &[Command]) -> Result<(), NoAnswer> {
        if concerned(batch).is_some_and(|concerns| concerns(self.pins.device)) {
            let mut state = self.pins.state();
            state.iter_mut().for_each(|pin| pin.stale = pin.asked.is_some());
        }
        Ok(())
    }

    fn settle(&self, effort: &mut Effort) -> bool {
        let Some(unit) = self.unit.upgrade() else {
            return true;
        };
        let mut state = self.pins.state();
        for (number, pin) in (0..).zip(state.iter_mut()).filter(|(_, pin)| pin.stale) {
            if !effort.spend(1) {
                return false;
            }
            pin.stale = false;
            let asked = pin.asked;
            if let Err(error) = self.pins.bring(&unit, number, pin, asked) {
                let error: &(dyn std::error::Error + 'static) = &error;
                guest_warn!(
                    pin = number,
                    error,
                    "the kernel does not know an input's remapped interrupt"
                );
            }
        }
        true
    }
}
