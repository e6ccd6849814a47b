//! The page in which a guest reads the registers that change while the unit runs.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use ravelin::iommu::amd::Unit;
use ravelin::iommu::amd::memory::SystemMemory;
use ravelin::iommu::amd::spec::registers::Reg;
use ravelin::iommu::amd::window::RegisterWindow;

/// One such page.
#[derive(Clone, Default)]
pub(crate) struct Page(Arc<[AtomicU64; 8]>);

impl RegisterWindow for Page {
    fn show(&self, offset: u64, value: u64) {
        self.at(offset).store(value, Ordering::Release);
    }
}

impl Page {
    fn at(&self, offset: u64) -> &AtomicU64 {
        &self.0[usize::try_from(offset / 8).expect("an offset of the page")]
    }

    /// What it shows at `offset`.
    pub(crate) fn shown(&self, offset: u64) -> u64 {
        self.at(offset).load(Ordering::Acquire)
    }

    /// What it shows is what `unit` answers. Whoever else uses the unit may change a register between two looks,
    /// not between each of a hundred.
    pub(crate) fn agrees_with<M: SystemMemory>(&self, unit: &Unit<M>) {
        for offset in (0..Reg::RUNNING_LEN).step_by(8) {
            let answer = || {
                let mut data = [0; 8];
                unit.mmio_read(Reg::RUNNING_AT + offset, &mut data);
                u64::from_le_bytes(data)
            };
            let shown = || self.shown(offset);
            assert!(
                (0..100).any(|_| shown() == answer()),
                "at {offset:#x} the page shows {:#x}, and the unit answers {:#x}",
                shown(),
                answer()
            );
        }
    }
}
