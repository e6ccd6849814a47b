//! The registers that change while the unit runs, shown where a guest can read them without asking the unit.
//!
//! Heads, tails and Status are alone in their page, reading them sets nothing off, and a driver that waits polls
//! them. What they read as is written to a [`RegisterWindow`] before the lock they are under is given back, so
//! whoever learns of a change by other means (an interrupt, the store of COMPLETION_WAIT) finds it there.

use std::ops::{Deref, DerefMut};
use std::sync::MutexGuard;

use super::registers::Registers;
use super::spec::registers::Reg;

/// Memory that a guest reads in place of [`Reg::RUNNING_LEN`] bytes of registers.
pub trait RegisterWindow: Send + Sync {
    /// The quadword at `offset` from [`Reg::RUNNING_AT`], a multiple of 8 below [`Reg::RUNNING_LEN`], now reads as
    /// `value`.
    fn show(&self, offset: u64, value: u64);
}

/// Registers about to change.
pub(super) struct Change<'a> {
    registers: MutexGuard<'a, Registers>,
    window: Option<&'a dyn RegisterWindow>,
}

impl<'a> Change<'a> {
    /// What changes in `registers` is shown in `window`, where there is one.
    pub(super) fn new(registers: MutexGuard<'a, Registers>, window: Option<&'a dyn RegisterWindow>) -> Self {
        Self { registers, window }
    }
}

impl Deref for Change<'_> {
    type Target = Registers;

    fn deref(&self) -> &Registers {
        &self.registers
    }
}

impl DerefMut for Change<'_> {
    fn deref_mut(&mut self) -> &mut Registers {
        &mut self.registers
    }
}

impl Drop for Change<'_> {
    fn drop(&mut self) {
        let Some(window) = self.window else { return };
        for offset in (0..Reg::RUNNING_LEN).step_by(8) {
            if let Some(reg) = Reg::at(Reg::RUNNING_AT + offset) {
                window.show(offset, self.registers.read(reg));
            }
        }
    }
}
