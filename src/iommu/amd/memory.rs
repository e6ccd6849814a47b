//! What the unit regards as system memory: guest RAM when it is emulated for a guest, any other memory when
//! it models a physical unit.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use vm_memory::{GuestAddress, GuestMemoryBackend, VolatileMemory};

use crate::platform::addr::Gpa;
use crate::platform::memory::GuestRam;

/// An access that memory did not answer: a hole, a device, or a quadword across the end of a region.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Unreachable;

/// Memory as the unit's own accesses see it. Others write it at any time, so a value is read once and a
/// change made by comparing.
pub trait SystemMemory {
    /// Copy bytes out; on failure `data` holds anything.
    fn read(&self, at: Gpa, data: &mut [u8]) -> Result<(), Unreachable>;

    /// Copy bytes in, all or none.
    fn write(&self, at: Gpa, data: &[u8]) -> Result<(), Unreachable>;

    /// The quadword at `at`, a multiple of 8, read as a whole (acquire).
    fn load(&self, at: Gpa) -> Result<u64, Unreachable>;

    /// Write the quadword at `at`, a multiple of 8, as a whole and after all that was written before
    /// (release).
    fn store(&self, at: Gpa, value: u64) -> Result<(), Unreachable>;

    /// Replace `old` by `new` at `at`, a multiple of 8. `Ok(Err(found))` where something else stands there.
    fn compare_exchange(&self, at: Gpa, old: u64, new: u64) -> Result<Result<(), u64>, Unreachable>;
}

impl<M: SystemMemory + ?Sized> SystemMemory for Arc<M> {
    fn read(&self, at: Gpa, data: &mut [u8]) -> Result<(), Unreachable> {
        (**self).read(at, data)
    }

    fn write(&self, at: Gpa, data: &[u8]) -> Result<(), Unreachable> {
        (**self).write(at, data)
    }

    fn load(&self, at: Gpa) -> Result<u64, Unreachable> {
        (**self).load(at)
    }

    fn store(&self, at: Gpa, value: u64) -> Result<(), Unreachable> {
        (**self).store(at, value)
    }

    fn compare_exchange(&self, at: Gpa, old: u64, new: u64) -> Result<Result<(), u64>, Unreachable> {
        (**self).compare_exchange(at, old, new)
    }
}

/// Exchanges before a quadword that changes all the time counts as one that does not answer.
const ATTEMPTS: usize = 16;

/// Replace the quadword at `at`, a multiple of 8, by what `new` makes of it, whoever else changes it meanwhile.
pub fn change<M: SystemMemory + ?Sized>(
    memory: &M,
    at: Gpa,
    new: impl Fn(u64) -> u64,
) -> Result<(), Unreachable> {
    let mut old = memory.load(at)?;
    for _ in 0..ATTEMPTS {
        match memory.compare_exchange(at, old, new(old))? {
            Ok(()) => return Ok(()),
            Err(found) => old = found,
        }
    }
    Err(Unreachable)
}

/// Do `f` on the aligned quadword at `at`.
fn quadword<T>(ram: &GuestRam, at: Gpa, f: impl FnOnce(&AtomicU64) -> T) -> Result<T, Unreachable> {
    let slice = GuestMemoryBackend::get_slice(ram.backend(), GuestAddress(at.0), size_of::<u64>())
        .map_err(|_| Unreachable)?;
    slice
        .get_atomic_ref::<AtomicU64>(0)
        .map(f)
        .map_err(|_| Unreachable)
}

impl SystemMemory for GuestRam {
    fn read(&self, at: Gpa, data: &mut [u8]) -> Result<(), Unreachable> {
        Self::read(self, at, data).map_err(|_| Unreachable)
    }

    fn write(&self, at: Gpa, data: &[u8]) -> Result<(), Unreachable> {
        Self::write(self, at, data).map_err(|_| Unreachable)
    }

    fn load(&self, at: Gpa) -> Result<u64, Unreachable> {
        quadword(self, at, |word| word.load(Ordering::Acquire))
    }

    fn store(&self, at: Gpa, value: u64) -> Result<(), Unreachable> {
        quadword(self, at, |word| word.store(value, Ordering::Release))
    }

    fn compare_exchange(&self, at: Gpa, old: u64, new: u64) -> Result<Result<(), u64>, Unreachable> {
        quadword(self, at, |word| {
            word.compare_exchange(old, new, Ordering::AcqRel, Ordering::Acquire)
                .map(|_| ())
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use vm_memory::GuestMemoryMmap;

    fn ram() -> GuestRam {
        let ranges = [(GuestAddress(0), 0x1000), (GuestAddress(0x4000), 0x1000)];
        GuestRam::new(GuestMemoryMmap::from_ranges(&ranges).expect("small mappings"))
    }

    #[test]
    fn a_quadword_is_exchanged_only_for_what_stands_there() {
        let ram = ram();
        ram.store(Gpa(0x4ff8), 7).expect("the last quadword");
        assert_eq!(ram.compare_exchange(Gpa(0x4ff8), 8, 9), Ok(Err(7)));
        assert_eq!(ram.compare_exchange(Gpa(0x4ff8), 7, 9), Ok(Ok(())));
        assert_eq!(ram.load(Gpa(0x4ff8)), Ok(9));
    }

    /// Memory whose quadwords somebody else changes before every exchange.
    struct Restless(AtomicU64);

    impl SystemMemory for Restless {
        fn read(&self, _at: Gpa, _data: &mut [u8]) -> Result<(), Unreachable> {
            Err(Unreachable)
        }

        fn write(&self, _at: Gpa, _data: &[u8]) -> Result<(), Unreachable> {
            Err(Unreachable)
        }

        fn load(&self, _at: Gpa) -> Result<u64, Unreachable> {
            Ok(self.0.fetch_add(1, Ordering::Relaxed))
        }

        fn store(&self, _at: Gpa, _value: u64) -> Result<(), Unreachable> {
            Err(Unreachable)
        }

        fn compare_exchange(&self, at: Gpa, _old: u64, _new: u64) -> Result<Result<(), u64>, Unreachable> {
            self.load(at).map(Err)
        }
    }

    #[test]
    fn a_change_makes_of_a_quadword_what_is_asked_and_gives_up_where_it_never_rests() {
        let ram = ram();
        ram.store(Gpa(0x4000), 5).expect("RAM");
        change(&ram, Gpa(0x4000), |old| old | 2).expect("RAM");
        assert_eq!(ram.load(Gpa(0x4000)), Ok(7));
        assert_eq!(change(&ram, Gpa(0x1000), |old| old), Err(Unreachable));
        let restless = Restless(AtomicU64::new(0));
        assert_eq!(change(&restless, Gpa(0), |old| old), Err(Unreachable));
        assert_eq!(restless.0.into_inner(), 1 + ATTEMPTS as u64);
    }

    #[test]
    fn quadwords_in_holes_and_across_ends_are_unreachable() {
        let ram = ram();
        for at in [
            0x1000,
            0xffc,
            0x3ff8,
            0x5000,
            u64::MAX,
            u64::MAX - 7,
            u64::MAX - 3,
        ] {
            assert_eq!(ram.load(Gpa(at)), Err(Unreachable), "{at:#x}");
            assert_eq!(ram.store(Gpa(at), 1), Err(Unreachable), "{at:#x}");
        }
    }
}
