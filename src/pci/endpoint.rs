//! What every emulated function embeds: its registers behind a lock, and its interrupts.
//!
//! Lock order: [`Endpoint`]'s interrupt line, then its registers, then MSI or MSI-X. The device's own lock
//! comes before all of them.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::access::DwordWrite;
use super::bar::BarSpec;
use super::capability::{Msi, Msix, MsixLayout};
use super::config_space::ConfigSpace;
use super::function::{Command, ConfigEffect};
use super::tree::Pin;
use crate::platform::dma::Requester;
use crate::platform::irq::IrqLine;
use crate::platform::msi::MsiPort;

/// Interrupt Status: INTx is pending in the function.
const STATUS_INTERRUPT: u32 = 1 << 19;

/// How the guest wants to be interrupted.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum InterruptMode {
    /// By wire, as far as Interrupt Disable lets it.
    Intx,
    /// By MSI.
    Msi,
    /// By MSI-X.
    Msix,
}

/// The configuration space and interrupts of an emulated function.
pub struct Endpoint {
    config: Mutex<ConfigSpace>,
    bars: Vec<BarSpec>,
    requester: Arc<Requester>,
    intx: Option<Mutex<Intx>>,
    msi: Option<Arc<Msi>>,
    msix: Option<Arc<Msix>>,
}

struct Intx {
    line: IrqLine,
    pending: bool,
}

impl Endpoint {
    /// A function with the registers `config` that issues requests as `requester`.
    #[must_use]
    pub fn new(config: ConfigSpace, requester: Arc<Requester>) -> Self {
        Self {
            bars: config.bars().to_vec(),
            config: Mutex::new(config),
            requester,
            intx: None,
            msi: None,
            msix: None,
        }
    }

    /// Interrupts by wire as well: `pin` is what the guest reads, `line` what is driven.
    #[must_use]
    pub fn with_intx(mut self, pin: Pin, line: IrqLine) -> Self {
        let config = self.config.into_inner().unwrap_or_else(PoisonError::into_inner);
        self.config = Mutex::new(config.interrupt_pin(pin));
        self.intx = Some(Mutex::new(Intx { line, pending: false }));
        self
    }

    /// Interrupts by MSI as well, by `vectors` (1 to 32, a power of two) vectors that leave by `port`.
    #[must_use]
    pub fn with_msi(mut self, vectors: u8, port: MsiPort) -> Self {
        let msi = Msi::new(vectors, port);
        self.config().push_capability(msi.capability());
        self.msi = Some(msi);
        self
    }

    /// Interrupts by MSI-X as well; table and pending bits are where `layout` says, messages leave by `port`.
    ///
    /// # Panics
    ///
    /// When the BAR is absent or too small: the device's code is wrong then.
    #[must_use]
    pub fn with_msix(mut self, layout: MsixLayout, port: MsiPort) -> Self {
        let room = self
            .bars
            .iter()
            .find(|bar| bar.index == layout.bar())
            .map_or(0, |bar| bar.size);
        assert!(
            u64::from(layout.end()) <= room,
            "{layout:?} does not fit into {room:#x} bytes"
        );
        let msix = Msix::new(layout, port);
        self.config().push_capability(msix.capability());
        self.msix = Some(msix);
        self
    }

    /// As whom it issues requests.
    #[must_use]
    pub fn requester(&self) -> &Arc<Requester> {
        &self.requester
    }

    /// What it decodes.
    #[must_use]
    pub fn bars(&self) -> &[BarSpec] {
        &self.bars
    }

    /// What it answers and may issue at present.
    #[must_use]
    pub fn command(&self) -> Command {
        self.config().command()
    }

    /// Its registers, locked.
    pub fn config(&self) -> MutexGuard<'_, ConfigSpace> {
        self.config.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Read a dword of configuration space.
    #[must_use]
    pub fn config_read(&self, dword: u16) -> u32 {
        let value = self.config().read(dword);
        let pending = dword == 1 && self.intx().is_some_and(|intx| intx.pending);
        if pending { value | STATUS_INTERRUPT } else { value }
    }

    /// Write a dword of configuration space; interrupts follow at once. What is left of the effect concerns
    /// the topology, and the device: it looks at [`Endpoint::interrupt_mode`] anew if it cares.
    pub fn config_write(&self, dword: u16, write: DwordWrite) -> ConfigEffect {
        let effect = self.config().write(dword, write);
        if effect.contains(ConfigEffect::INTERRUPTS) {
            self.drive_intx(|_| {});
            if let Some(msi) = &self.msi {
                msi.refresh();
            }
            if let Some(msix) = &self.msix {
                msix.refresh();
            }
        }
        effect
    }

    /// A guest read in BAR `bar`; `false`, with `data` as it was, when it is not for the MSI-X structures.
    #[must_use = "what is not MSI-X is the device's"]
    pub fn bar_read(&self, bar: u8, offset: u64, data: &mut [u8]) -> bool {
        self.msix
            .as_ref()
            .is_some_and(|msix| msix.bar_read(bar, offset, data))
    }

    /// A guest write in BAR `bar`; `false` when it is not for the MSI-X structures.
    #[must_use = "what is not MSI-X is the device's"]
    pub fn bar_write(&self, bar: u8, offset: u64, data: &[u8]) -> bool {
        self.msix
            .as_ref()
            .is_some_and(|msix| msix.bar_write(bar, offset, data))
    }

    /// How the guest wants to be interrupted.
    #[must_use]
    pub fn interrupt_mode(&self) -> InterruptMode {
        if self.msix.as_ref().is_some_and(|msix| msix.enabled()) {
            InterruptMode::Msix
        } else if self.msi.as_ref().is_some_and(|msi| msi.enabled()) {
            InterruptMode::Msi
        } else {
            InterruptMode::Intx
        }
    }

    /// Whether it has a wire.
    #[must_use]
    pub fn has_intx(&self) -> bool {
        self.intx.is_some()
    }

    /// How many messages the guest tells apart at present: the MSI-X table's entries where it uses that, the MSI
    /// vectors it allocated where it uses that, else none.
    #[must_use]
    pub fn messages(&self) -> u16 {
        match (self.interrupt_mode(), &self.msi, &self.msix) {
            (InterruptMode::Msix, _, Some(msix)) => msix.layout().vectors(),
            (InterruptMode::Msi, Some(msi), _) => msi.allocated_vectors().into(),
            _ => 0,
        }
    }

    /// Interrupt by message `vector`: MSI-X where the guest uses it, else MSI where it does. INTx is a level
    /// and has a call of its own.
    pub fn signal(&self, vector: u16) {
        match (self.interrupt_mode(), &self.msi, &self.msix) {
            (InterruptMode::Msix, _, Some(msix)) => msix.signal(vector),
            (InterruptMode::Msi, Some(msi), _) => msi.signal(u8::try_from(vector).unwrap_or(u8::MAX)),
            _ => {}
        }
    }

    /// INTx is pending or no longer. The wire follows, unless the guest disabled it or uses messages.
    pub fn set_intx(&self, pending: bool) {
        self.drive_intx(|intx| intx.pending = pending);
    }

    /// Every register as after power-on; no interrupt pending.
    pub fn reset(&self) {
        self.config().reset();
        self.set_intx(false);
    }

    fn intx(&self) -> Option<MutexGuard<'_, Intx>> {
        self.intx
            .as_ref()
            .map(|intx| intx.lock().unwrap_or_else(PoisonError::into_inner))
    }

    fn drive_intx(&self, change: impl FnOnce(&mut Intx)) {
        if let Some(mut intx) = self.intx() {
            change(&mut intx);
            let silent = self.interrupt_mode() != InterruptMode::Intx
                || self.command().contains(Command::INTX_DISABLE);
            intx.line.set(intx.pending && !silent);
        }
    }
}

#[cfg(test)]
mod tests;
