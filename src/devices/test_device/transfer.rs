//! Moving bytes between the device and memory, in pieces.
//!
//! A guest may ask for 4 GiB. Each piece takes a view of memory of its own, so that whatever stands between the
//! device and memory can change in between, a reset ends a transfer at the next piece, and a pause lets it wait there.

use std::sync::Arc;

use crc32fast::Hasher;
use vm_memory::{Bytes, GuestAddress};

use super::registers::Route;
use super::services::Services;
use crate::platform::addr::PAGE_SIZE;
use crate::platform::dma::Dma;

/// Bytes per piece.
const PIECE: u32 = 64 << 10;

/// Why a transfer ended early.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Stopped {
    /// Some of the source could not be read.
    Source,
    /// Some of the destination could not be written.
    Destination,
    /// The device is being reset.
    Cancelled,
}

/// Asked before each piece: returns once it may be moved, or says that none may be any more.
pub(super) type Pace<'a> = &'a dyn Fn() -> Result<(), Stopped>;

/// What transfers share.
pub(super) struct Transfers {
    way: Way,
    piece: Vec<u8>,
    noise: Noise,
}

/// The ways to memory.
struct Way {
    /// Of plain requests.
    dma: Dma,
    /// Of all others.
    services: Arc<Services>,
}

impl Transfers {
    /// Plain transfers by `dma`, all others by `services`.
    pub(super) fn new(dma: Dma, services: Arc<Services>) -> Self {
        Self {
            way: Way { dma, services },
            piece: vec![0; PIECE as usize],
            noise: Noise(0),
        }
    }

    /// Read `len` bytes and return their checksum.
    pub(super) fn read(&mut self, route: Route, from: u64, len: u32, pace: Pace<'_>) -> Result<u32, Stopped> {
        let mut hasher = Hasher::new();
        for (offset, len) in pieces(len) {
            pace()?;
            let piece = &mut self.piece[..len];
            self.way.fetch(route, from, offset, piece)?;
            hasher.update(piece);
        }
        Ok(checksum(hasher))
    }

    /// Write `len` bytes that differ each time and return their checksum.
    pub(super) fn write(&mut self, route: Route, to: u64, len: u32, pace: Pace<'_>) -> Result<u32, Stopped> {
        let mut hasher = Hasher::new();
        for (offset, len) in pieces(len) {
            pace()?;
            let piece = &mut self.piece[..len];
            self.noise.fill(piece);
            self.way.store(route, to, offset, piece)?;
            hasher.update(piece);
        }
        Ok(checksum(hasher))
    }

    /// Copy `len` bytes. Where source and destination overlap, a piece is read before it is written.
    pub(super) fn copy(
        &mut self,
        route: Route,
        (from, to): (u64, u64),
        len: u32,
        pace: Pace<'_>,
    ) -> Result<(), Stopped> {
        for (offset, len) in pieces(len) {
            pace()?;
            let piece = &mut self.piece[..len];
            self.way.fetch(route, from, offset, piece)?;
            self.way.store(route, to, offset, piece)?;
        }
        Ok(())
    }
}

impl Way {
    fn fetch(&self, route: Route, from: u64, offset: u32, piece: &mut [u8]) -> Result<(), Stopped> {
        let from = from.checked_add(offset.into()).ok_or(Stopped::Source)?;
        if route == Route::default() {
            let read = self.dma.view().read_slice(piece, GuestAddress(from));
            return read.map_err(|_| Stopped::Source);
        }
        let mut rest = piece;
        for (at, len) in pages(from, rest.len()) {
            let (page, behind) = rest.split_at_mut(len);
            let at = at.ok_or(Stopped::Source)?;
            self.services.read(route, at, page).map_err(|_| Stopped::Source)?;
            rest = behind;
        }
        Ok(())
    }

    fn store(&self, route: Route, to: u64, offset: u32, piece: &[u8]) -> Result<(), Stopped> {
        let to = to.checked_add(offset.into()).ok_or(Stopped::Destination)?;
        if route == Route::default() {
            let written = self.dma.view().write_slice(piece, GuestAddress(to));
            return written.map_err(|_| Stopped::Destination);
        }
        let mut rest = piece;
        for (at, len) in pages(to, rest.len()) {
            let (page, behind) = rest.split_at(len);
            let at = at.ok_or(Stopped::Destination)?;
            self.services
                .write(route, at, page)
                .map_err(|_| Stopped::Destination)?;
            rest = behind;
        }
        Ok(())
    }
}

/// `len` bytes from `at` on, cut at page borders: where each part begins, `None` behind the end of addresses, and
/// how long it is.
fn pages(at: u64, len: usize) -> impl Iterator<Item = (Option<u64>, usize)> {
    let mut offset = 0;
    std::iter::from_fn(move || {
        let left = len.checked_sub(offset).filter(|left| *left > 0)?;
        let start = at.checked_add(offset as u64);
        let room = PAGE_SIZE - start.unwrap_or(0) % PAGE_SIZE;
        let part = usize::try_from(room).expect("at most a page").min(left);
        offset += part;
        Some((start, part))
    })
}

/// Offset and length of each piece of `len` bytes.
fn pieces(len: u32) -> impl Iterator<Item = (u32, usize)> {
    (0..len.div_ceil(PIECE)).map(move |index| {
        let offset = index * PIECE;
        (offset, (len - offset).min(PIECE) as usize)
    })
}

/// Linux's `crc32_le` with all ones to start from: the usual CRC-32, before its last inversion.
fn checksum(hasher: Hasher) -> u32 {
    !hasher.finalize()
}

/// Bytes without a pattern (SplitMix64): what is missing, stale or misplaced does not go unseen.
struct Noise(u64);

impl Noise {
    fn fill(&mut self, bytes: &mut [u8]) {
        for chunk in bytes.chunks_mut(8) {
            self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
            let mut word = self.0;
            word = (word ^ word >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
            word = (word ^ word >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
            word ^= word >> 31;
            chunk.copy_from_slice(&word.to_le_bytes()[..chunk.len()]);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::devices::test_device::IDENTITY;
    use crate::pci::config_space::ConfigSpace;
    use crate::pci::endpoint::Endpoint;
    use crate::pci::testing::requester;
    use crate::platform::memory::GuestRam;
    use vm_memory::GuestMemoryMmap;

    /// 1 MiB, a hole of as much, and 64 KiB.
    fn memory() -> (Transfers, Dma) {
        let ranges = [(GuestAddress(0), 1 << 20), (GuestAddress(2 << 20), 64 << 10)];
        let ram = GuestMemoryMmap::from_ranges(&ranges).expect("two ranges");
        let dma = Dma::new(requester(), GuestRam::new(ram));
        let endpoint = Endpoint::new(ConfigSpace::endpoint(&IDENTITY), requester());
        let services = Arc::new(Services::new(Arc::new(endpoint), None));
        (Transfers::new(dma.clone(), services), dma)
    }

    const GO: fn() -> Result<(), Stopped> = || Ok(());
    const PLAIN: Route = Route {
        pasid: None,
        privileged: false,
        translated: false,
    };

    #[test]
    fn the_checksum_is_the_drivers() {
        let (mut transfers, dma) = memory();
        dma.view()
            .write_slice(b"123456789", GuestAddress(0x11))
            .expect("memory");
        // CRC-32/JAMCRC of the usual check string.
        assert_eq!(transfers.read(PLAIN, 0x11, 9, &GO), Ok(0x340b_c6d9));
        assert_eq!(transfers.read(PLAIN, 0x11, 0, &GO), Ok(u32::MAX));
    }

    #[test]
    fn what_is_written_is_read_over_several_pieces_and_differs_each_time() {
        let (mut transfers, _dma) = memory();
        let first = transfers.write(PLAIN, 1, 3 * PIECE + 5, &GO).expect("memory");
        assert_eq!(transfers.read(PLAIN, 1, 3 * PIECE + 5, &GO), Ok(first));
        let second = transfers.write(PLAIN, 1, 3 * PIECE + 5, &GO).expect("memory");
        assert_ne!(first, second);
        transfers
            .copy(PLAIN, (1, 5 * u64::from(PIECE)), 3 * PIECE + 5, &GO)
            .expect("memory");
        assert_eq!(
            transfers.read(PLAIN, 5 * u64::from(PIECE), 3 * PIECE + 5, &GO),
            Ok(second)
        );
    }

    #[test]
    fn what_is_no_memory_stops_a_transfer_and_says_which_side() {
        let (mut transfers, _dma) = memory();
        let end = 1 << 20;
        for bad in [end, end - 1, 0xfee0_0000, u64::MAX, u64::MAX - 1] {
            assert_eq!(
                transfers.read(PLAIN, bad, 2, &GO),
                Err(Stopped::Source),
                "{bad:#x}"
            );
            assert_eq!(transfers.write(PLAIN, bad, 2, &GO), Err(Stopped::Destination));
            assert_eq!(transfers.copy(PLAIN, (bad, 0), 2, &GO), Err(Stopped::Source));
            assert_eq!(transfers.copy(PLAIN, (0, bad), 2, &GO), Err(Stopped::Destination));
        }
        // The second piece is past the end of all addresses.
        assert_eq!(transfers.read(PLAIN, 0, u32::MAX, &GO), Err(Stopped::Source));
        assert_eq!(
            transfers.write(PLAIN, u64::MAX - 0x8000, u32::MAX, &GO),
            Err(Stopped::Destination)
        );
    }

    #[test]
    fn a_cancelled_transfer_touches_nothing() {
        let (mut transfers, dma) = memory();
        let cancelled = || Err(Stopped::Cancelled);
        assert_eq!(transfers.write(PLAIN, 0, 8, &cancelled), Err(Stopped::Cancelled));
        assert_eq!(transfers.read(PLAIN, 0, 8, &cancelled), Err(Stopped::Cancelled));
        assert_eq!(dma.view().read_obj::<u64>(GuestAddress(0)).expect("memory"), 0);
    }

    #[test]
    fn pieces_cover_everything_once() {
        for len in [0, 1, PIECE - 1, PIECE, PIECE + 1, u32::MAX] {
            let sum: u64 = pieces(len).map(|(_, len)| len as u64).sum();
            assert_eq!(sum, u64::from(len));
        }
        assert_eq!(pieces(PIECE + 1).last(), Some((PIECE, 1)));
    }

    #[test]
    fn pages_end_where_pages_do_and_addresses_where_there_are_no_more() {
        let cut = |at, len| pages(at, len).collect::<Vec<_>>();
        assert_eq!(cut(0xff0, 0x20), [(Some(0xff0), 0x10), (Some(0x1000), 0x10)]);
        assert_eq!(cut(0x1000, 0x1000), [(Some(0x1000), 0x1000)]);
        assert_eq!(cut(7, 0), []);
        let last = u64::MAX - 7;
        assert_eq!(cut(last, 16), [(Some(last), 8), (None, 8)]);
    }

    #[test]
    fn what_is_no_plain_request_needs_an_iommu() {
        let (mut transfers, _dma) = memory();
        let route = Route {
            translated: true,
            ..PLAIN
        };
        assert_eq!(transfers.read(route, 0, 8, &GO), Err(Stopped::Source));
        assert_eq!(transfers.write(route, 0, 8, &GO), Err(Stopped::Destination));
    }
}
