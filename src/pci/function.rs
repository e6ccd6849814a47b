//! What a PCI function is to everything around it, and what its configuration writes set off.

use std::sync::Arc;

use bitflags::bitflags;

use super::access::DwordWrite;
use super::bar::BarSpec;
use crate::platform::addr::Gpa;
use crate::platform::dma::Requester;

/// Dwords of a function's configuration space (PCI Express Base Specification 7.2.2).
pub const CONFIG_DWORDS: u16 = 1024;

bitflags! {
    /// The Command register (PCI Express Base Specification 7.5.1.1.3).
    #[derive(Clone, Copy, PartialEq, Eq, Debug, Default, Hash)]
    pub struct Command: u16 {
        /// Answers in I/O space; of a bridge: forwards its I/O window.
        const IO = 1 << 0;
        /// Answers in memory space; of a bridge: forwards its memory windows.
        const MEMORY = 1 << 1;
        /// May issue memory requests and messages; of a bridge: forwards those from below.
        const BUS_MASTER = 1 << 2;
        /// Parity errors are reported.
        const PARITY_ERROR_RESPONSE = 1 << 6;
        /// Errors are reported to the root complex.
        const SERR = 1 << 8;
        /// INTx is not asserted, whatever is pending.
        const INTX_DISABLE = 1 << 10;
    }
}

impl Command {
    /// What dword 1 of a configuration header says.
    #[must_use]
    pub const fn of_dword(dword: u32) -> Self {
        let [low, high, ..] = dword.to_le_bytes();
        Self::from_bits_truncate(u16::from_le_bytes([low, high]))
    }
}

bitflags! {
    /// What a configuration write sets off, once no lock is held.
    ///
    /// A function does what concerns itself alone ([`ConfigEffect::INTERRUPTS`]) before it returns the rest
    /// to the topology.
    #[must_use = "an effect nobody performs is a register that lies"]
    #[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
    pub struct ConfigEffect: u8 {
        /// What the function decodes, forwards or may issue changed: a BAR, a window, the Command register,
        /// the power state.
        const DECODING = 1 << 0;
        /// A bridge's bus numbers, or what it lets through of them, changed.
        const ROUTING = 1 << 1;
        /// Interrupt delivery changed: MSI, MSI-X or INTx were switched, masked or moved.
        const INTERRUPTS = 1 << 2;
        /// The guest asked for a function-level reset (PCI Express Base Specification 6.6.2).
        const FUNCTION_RESET = 1 << 3;
        /// The guest asked a bridge to reset everything behind it (7.5.1.3.13).
        const SECONDARY_RESET = 1 << 4;
    }
}

/// A PCI function: an emulated device, a port, or a host's function.
///
/// All methods take `&self` and may be called by several processors at once; the function chooses its own
/// locks. No method is called with a lock of the topology's routing held, so that configuration reads of
/// other functions go on meanwhile.
pub trait Function: Send + Sync {
    /// What the operator calls it.
    fn name(&self) -> &str;

    /// Read `dword` (below [`CONFIG_DWORDS`]) of configuration space. Registers that do not exist are zero.
    fn config_read(&self, dword: u16) -> u32;

    /// Write `dword` (below [`CONFIG_DWORDS`]) of configuration space, and say what the caller must do now.
    fn config_write(&self, dword: u16, write: DwordWrite) -> ConfigEffect;

    /// As whom it issues requests. The topology renumbers it and sets its Bus Master Enable.
    fn requester(&self) -> &Arc<Requester>;

    /// What it decodes, in ascending order of register. Never changes.
    fn bars(&self) -> &[BarSpec];

    /// What it answers and may issue at present.
    ///
    /// The Command register, less what the power state takes away: [`super::endpoint::Endpoint::command`]
    /// knows both.
    fn command(&self) -> Command {
        Command::of_dword(self.config_read(1))
    }

    /// Whether the function is still there. One that left answers all ones and never comes back.
    fn is_present(&self) -> bool {
        true
    }

    /// Whether the function may issue requests and messages: its own Bus Master Enable, and that of every port above.
    ///
    /// For functions that work by themselves: before the requester may no longer issue requests, and after it may
    /// again. Called as [`Function::bar_moved`] is, whenever it may have changed.
    fn bus_mastering(&self, allowed: bool) {
        let _ = allowed;
    }

    /// A guest read of `data.len()` bytes, `offset` bytes into the BAR of register `bar`. The access lies
    /// inside the BAR.
    fn bar_read(&self, bar: u8, offset: u64, data: &mut [u8]) {
        let _ = (bar, offset);
        data.fill(0xff);
    }

    /// A guest write of `data`, `offset` bytes into the BAR of register `bar`. The access lies inside the BAR.
    fn bar_write(&self, bar: u8, offset: u64, data: &[u8]) {
        let _ = (bar, offset, data);
    }

    /// The memory BAR of register `bar` is reachable at `at` from now on, or nowhere: doorbells follow.
    ///
    /// Called in order, while the topology's mapping is locked: neither configuration accesses nor waiting
    /// for another processor are allowed inside.
    fn bar_moved(&self, bar: u8, at: Option<Gpa>) {
        let _ = (bar, at);
    }

    /// The machine is paused: return once no thread of the function touches guest memory any more; what it has to do waits.
    /// For functions that work by themselves. No processor runs, and none will before [`Function::resume`].
    fn pause(&self) {}

    /// The machine goes on after [`Function::pause`], perhaps after a [`Function::reset`] in between.
    fn resume(&self) {}

    /// Back to the state after power-on. Returns once nothing of the function runs any more: no request,
    /// no interrupt. BARs read zero afterwards; the topology stops decoding them itself.
    fn reset(&self);
}
