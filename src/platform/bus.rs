//! Address to device, for MMIO and for ports.
//!
//! An access looks its range up, drops the bus's lock, and only then calls the device, so that a device may
//! claim and release ranges (a BAR that moves) from inside a call on another range. Once a [`Claim`] is
//! dropped no further call reaches its device: the drop waits for accesses in flight.

use std::fmt;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, PoisonError, RwLock, Weak};

/// Something that answers accesses to a range of addresses. Devices choose their own lock.
pub trait BusDevice: Send + Sync {
    /// Fill `data` (1, 2, 4 or 8 bytes) from `offset` bytes into the device's range.
    fn read(&self, offset: u64, data: &mut [u8]);

    /// Take `data` (1, 2, 4 or 8 bytes) at `offset` bytes into the device's range.
    fn write(&self, offset: u64, data: &[u8]);
}

/// One owner per address.
pub struct Bus {
    /// What kind of addresses these are, for messages: "MMIO" or "port".
    space: &'static str,
    /// Sorted by start; replaced as a whole so that look-ups hold the lock for a clone only.
    ranges: RwLock<Arc<Vec<Arc<Range>>>>,
}

/// One device's range and what happened there.
struct Range {
    start: u64,
    last: u64,
    name: String,
    device: Arc<dyn BusDevice>,
    /// Held shared during a call and exclusively once at removal; true from then on.
    removed: RwLock<bool>,
    reads: AtomicU64,
    writes: AtomicU64,
}

/// What went through one range since it was claimed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Traffic {
    /// Who claimed it.
    pub name: String,
    /// First address.
    pub start: u64,
    /// Last address.
    pub last: u64,
    /// Accesses by which the guest read.
    pub reads: u64,
    /// Accesses by which the guest wrote.
    pub writes: u64,
}

/// Two owners wanted the same address, or a range that is none.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ClaimError {
    /// Part of the range belongs to somebody else.
    #[error(
        "cannot place {name} at {space} {start:#x}-{last:#x}: {owner} has {owner_start:#x}-{owner_last:#x}"
    )]
    Taken {
        /// "MMIO" or "port".
        space: &'static str,
        /// Who asked.
        name: String,
        /// First address asked for.
        start: u64,
        /// Last address asked for.
        last: u64,
        /// Who has it.
        owner: String,
        /// First address the owner has.
        owner_start: u64,
        /// Last address the owner has.
        owner_last: u64,
    },
    /// No bytes, or beyond the end of the address space.
    #[error("cannot place {name} at {space} {start:#x}: {len:#x} bytes from there are no valid range")]
    Impossible {
        /// "MMIO" or "port".
        space: &'static str,
        /// Who asked.
        name: String,
        /// First address asked for.
        start: u64,
        /// Bytes asked for.
        len: u64,
    },
}

impl Bus {
    /// An empty bus of MMIO addresses.
    #[must_use]
    pub fn mmio() -> Arc<Self> {
        Self::empty("MMIO")
    }

    /// An empty bus of I/O ports.
    #[must_use]
    pub fn ports() -> Arc<Self> {
        Self::empty("port")
    }

    fn empty(space: &'static str) -> Arc<Self> {
        Arc::new(Self {
            space,
            ranges: RwLock::default(),
        })
    }

    /// Give `len` bytes from `start` to `device` until the claim is dropped.
    pub fn claim(
        self: &Arc<Self>,
        name: impl Into<String>,
        start: u64,
        len: u64,
        device: Arc<dyn BusDevice>,
    ) -> Result<Claim, ClaimError> {
        let (space, name) = (self.space, name.into());
        let Some(last) = len.checked_sub(1).and_then(|more| start.checked_add(more)) else {
            return Err(ClaimError::Impossible {
                space,
                name,
                start,
                len,
            });
        };
        let mut ranges = self.ranges.write().unwrap_or_else(PoisonError::into_inner);
        let at = ranges.partition_point(|range| range.last < start);
        if let Some(owner) = ranges.get(at).filter(|range| range.start <= last) {
            let (owner_start, owner_last, owner) = (owner.start, owner.last, owner.name.clone());
            return Err(ClaimError::Taken {
                space,
                name,
                start,
                last,
                owner,
                owner_start,
                owner_last,
            });
        }
        let range = Arc::new(Range {
            start,
            last,
            name,
            device,
            removed: RwLock::new(false),
            reads: AtomicU64::new(0),
            writes: AtomicU64::new(0),
        });
        Arc::make_mut(&mut ranges).insert(at, range.clone());
        Ok(Claim {
            bus: Arc::downgrade(self),
            range,
        })
    }

    /// A guest read of `data.len()` bytes. `false`, and all ones, where nothing answers.
    pub fn read(&self, at: u64, data: &mut [u8]) -> bool {
        let answered = self.with(at, data.len(), |range, offset| {
            range.reads.fetch_add(1, Ordering::Relaxed);
            range.device.read(offset, data);
            tracing::trace!(space = self.space, device = %range.name, offset, ?data, "read");
        });
        if !answered {
            data.fill(0xff);
        }
        answered
    }

    /// A guest write of `data.len()` bytes. `false` where nothing answers; the write is lost then.
    pub fn write(&self, at: u64, data: &[u8]) -> bool {
        self.with(at, data.len(), |range, offset| {
            range.writes.fetch_add(1, Ordering::Relaxed);
            tracing::trace!(space = self.space, device = %range.name, offset, ?data, "write");
            range.device.write(offset, data);
        })
    }

    /// Call `access` with the range that owns all of `len` bytes at `at`, no bus lock held.
    fn with(&self, at: u64, len: usize, access: impl FnOnce(&Range, u64)) -> bool {
        let ranges = self.ranges.read().unwrap_or_else(PoisonError::into_inner).clone();
        let index = ranges.partition_point(|range| range.last < at);
        let Some(range) = ranges.get(index).filter(|range| range.start <= at) else {
            return false;
        };
        let inside = (len as u64).checked_sub(1).and_then(|more| at.checked_add(more));
        if inside.is_none_or(|last| last > range.last) {
            return false;
        }
        let removed = range.removed.read().unwrap_or_else(PoisonError::into_inner);
        if *removed {
            return false;
        }
        access(range, at - range.start);
        true
    }

    /// Traffic of each range, in ascending order of addresses.
    #[must_use]
    pub fn traffic(&self) -> Vec<Traffic> {
        let ranges = self.ranges.read().unwrap_or_else(PoisonError::into_inner).clone();
        ranges
            .iter()
            .map(|range| Traffic {
                name: range.name.clone(),
                start: range.start,
                last: range.last,
                reads: range.reads.load(Ordering::Relaxed),
                writes: range.writes.load(Ordering::Relaxed),
            })
            .collect()
    }
}

/// Ownership of a range. Dropping it gives the range back and waits for accesses in flight; it must
/// therefore not be dropped from inside an access to the same range.
pub struct Claim {
    bus: Weak<Bus>,
    range: Arc<Range>,
}

impl fmt::Debug for Claim {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "{} {:#x}-{:#x}",
            self.range.name, self.range.start, self.range.last
        )
    }
}

impl Drop for Claim {
    fn drop(&mut self) {
        if let Some(bus) = self.bus.upgrade() {
            let mut ranges = bus.ranges.write().unwrap_or_else(PoisonError::into_inner);
            Arc::make_mut(&mut ranges).retain(|range| !Arc::ptr_eq(range, &self.range));
        }
        *self.range.removed.write().unwrap_or_else(PoisonError::into_inner) = true;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::Mutex;

    /// Answers reads with the low byte of the offset and records writes.
    #[derive(Default)]
    struct Echo(Mutex<Vec<(u64, Vec<u8>)>>);

    impl BusDevice for Echo {
        fn read(&self, offset: u64, data: &mut [u8]) {
            data.fill(offset.to_le_bytes()[0]);
        }
        fn write(&self, offset: u64, data: &[u8]) {
            self.0.lock().expect("not poisoned").push((offset, data.to_vec()));
        }
    }

    #[test]
    fn a_device_sees_offsets_into_its_range() {
        let (bus, echo) = (Bus::mmio(), Arc::new(Echo::default()));
        let _claim = bus.claim("echo", 0x1000, 0x100, echo.clone()).expect("free");
        let mut data = [0; 4];
        assert!(bus.read(0x1010, &mut data));
        assert_eq!(data, [0x10; 4]);
        assert!(bus.write(0x10fc, &[1, 2, 3, 4]));
        assert_eq!(*echo.0.lock().expect("not poisoned"), [(0xfc, vec![1, 2, 3, 4])]);
    }

    #[test]
    fn nobody_and_half_an_answer_are_all_ones() {
        let bus = Bus::mmio();
        let _claim = bus
            .claim("echo", 0x1000, 0x100, Arc::new(Echo::default()))
            .expect("free");
        for at in [0xfff, 0x10fd, 0x1100, u64::MAX] {
            let mut data = [0; 4];
            assert!(!bus.read(at, &mut data), "{at:#x}");
            assert_eq!(data, [0xff; 4]);
            assert!(!bus.write(at, &data));
        }
    }

    #[test]
    fn a_conflict_names_both_owners_and_both_ranges() {
        let bus = Bus::ports();
        let _first = bus
            .claim("serial0", 0x3f8, 8, Arc::new(Echo::default()))
            .expect("free");
        let error = bus
            .claim("other", 0x3ff, 2, Arc::new(Echo::default()))
            .expect_err("taken");
        assert_eq!(
            error.to_string(),
            "cannot place other at port 0x3ff-0x400: serial0 has 0x3f8-0x3ff"
        );
    }

    #[test]
    fn ranges_that_are_none_are_refused() {
        let bus = Bus::mmio();
        assert!(bus.claim("empty", 0, 0, Arc::new(Echo::default())).is_err());
        assert!(
            bus.claim("wraps", u64::MAX, 2, Arc::new(Echo::default()))
                .is_err()
        );
        assert!(
            bus.claim("last byte", u64::MAX, 1, Arc::new(Echo::default()))
                .is_ok()
        );
    }

    #[test]
    fn a_dropped_claim_gets_no_more_calls_and_frees_its_range() {
        let (bus, echo) = (Bus::mmio(), Arc::new(Echo::default()));
        drop(bus.claim("echo", 0x1000, 0x100, echo.clone()).expect("free"));
        assert!(!bus.write(0x1000, &[1]));
        assert!(echo.0.lock().expect("not poisoned").is_empty());
        bus.claim("next", 0x1000, 0x100, echo).expect("free again");
    }

    /// A device that moves another device's range from inside a write, as ECAM does with BARs.
    struct Mover(Arc<Bus>, Mutex<Option<Claim>>);

    impl BusDevice for Mover {
        fn read(&self, _offset: u64, _data: &mut [u8]) {}
        fn write(&self, _offset: u64, _data: &[u8]) {
            let mut claim = self.1.lock().expect("not poisoned");
            *claim = None;
            *claim = Some(
                self.0
                    .claim("bar", 0x9000, 0x1000, Arc::new(Echo::default()))
                    .expect("free"),
            );
        }
    }

    #[test]
    fn a_device_may_move_a_range_from_inside_an_access() {
        let bus = Bus::mmio();
        let bar = bus
            .claim("bar", 0x8000, 0x1000, Arc::new(Echo::default()))
            .expect("free");
        let mover = Arc::new(Mover(bus.clone(), Mutex::new(Some(bar))));
        let _ecam = bus.claim("ecam", 0, 0x1000, mover).expect("free");
        assert!(bus.write(0, &[0]));
        assert!(!bus.read(0x8000, &mut [0]));
        assert!(bus.read(0x9000, &mut [0]));
    }

    #[test]
    fn traffic_is_counted_per_range() {
        let bus = Bus::mmio();
        let _claim = bus
            .claim("echo", 0x1000, 0x100, Arc::new(Echo::default()))
            .expect("free");
        bus.read(0x1000, &mut [0; 4]);
        bus.write(0x1000, &[0; 4]);
        bus.write(0x1004, &[0; 4]);
        let traffic = bus.traffic();
        assert_eq!(
            (traffic[0].name.as_str(), traffic[0].reads, traffic[0].writes),
            ("echo", 1, 2)
        );
    }

    #[test]
    fn every_access_can_be_logged() {
        let bus = Bus::mmio();
        let _claim = bus
            .claim("echo", 0x1000, 0x100, Arc::new(Echo::default()))
            .expect("free");
        let (mut lines, writer) = std::io::pipe().expect("a pipe");
        let subscriber = tracing_subscriber::fmt()
            .with_max_level(tracing::Level::TRACE)
            .with_writer(move || writer.try_clone().expect("a descriptor"))
            .finish();
        tracing::subscriber::with_default(subscriber, || {
            bus.write(0x1004, &[7]);
            bus.read(0x1004, &mut [0; 1]);
        });
        let mut text = String::new();
        std::io::Read::read_to_string(&mut lines, &mut text).expect("both ends are ours");
        let told = |what: &str| {
            text.lines()
                .any(|line| line.contains(what) && line.contains("echo"))
        };
        assert!(told("write") && told("read"), "{text}");
    }
}
