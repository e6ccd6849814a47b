//! What tests use instead of /dev/iommu: it keeps what it is asked as the kernel does, to the byte, and refuses what it
//! is told to.

use std::collections::BTreeMap;
use std::io;
use std::ops::RangeInclusive;
use std::os::fd::BorrowedFd;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::{Attach, Copied, Requests, Silence};
use crate::iommu::amd::request::Access;
use crate::platform::addr::GpaRange;
use crate::platform::memory::GuestRam;

/// Mappings begin and end at multiples of this.
const PAGE: u64 = 0x1000;
/// Where the first byte of every file is in memory.
pub const DEVICE: u64 = 1 << 62;

/// A kind of request.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Call {
    /// [`Requests::alloc`].
    Alloc,
    /// [`Requests::destroy`].
    Destroy,
    /// [`Requests::map`].
    Map,
    /// [`Requests::map_file`].
    MapFile,
    /// [`Requests::windows`].
    Windows,
    /// [`Requests::copy`].
    Copy,
    /// [`Requests::unmap`].
    Unmap,
    /// [`Attach::attach`].
    Attach,
    /// [`Attach::detach`].
    Detach,
    /// [`Silence::silence`].
    Silence,
}

/// A mapping: bytes, where they are in memory, what devices may do there.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Area {
    len: u64,
    memory: u64,
    access: Access,
}

/// A /dev/iommu that is none.
#[derive(Default)]
pub struct Host(Mutex<State>);

#[derive(Default)]
struct State {
    next: u32,
    /// By number: mappings by their first byte.
    spaces: BTreeMap<u32, BTreeMap<u64, Area>>,
    windows: Option<Vec<RangeInclusive<u64>>>,
    /// Calls to go until all are refused.
    refused: BTreeMap<Call, (u64, i32)>,
    /// Calls to go until one is refused, once.
    refused_once: Option<(Call, u64, i32)>,
    counts: BTreeMap<Call, u64>,
    functions: Vec<Place>,
}

/// What becomes of a function's requests.
#[derive(Debug, Clone, Copy, Default)]
struct Place {
    /// The address space it is attached to.
    space: Option<u32>,
    /// It issues none.
    silent: bool,
}

impl Host {
    /// One with nothing in it, which refuses nothing.
    pub fn new() -> Arc<Self> {
        Arc::default()
    }

    /// Answer every further `call` with the error number `errno`.
    pub fn refuse(&self, call: Call, errno: i32) {
        self.refuse_after(call, 0, errno);
    }

    /// The same, after `before` others.
    pub fn refuse_after(&self, call: Call, before: u64, errno: i32) {
        self.state().refused.insert(call, (before, errno));
    }

    /// Answer one further `call` with `errno`, after `before` others.
    pub fn refuse_once(&self, call: Call, before: u64, errno: i32) {
        self.state().refused_once = Some((call, before, errno));
    }

    /// Refuse nothing any more.
    pub fn relent(&self) {
        let mut state = self.state();
        state.refused.clear();
        state.refused_once = None;
    }

    /// How often it was asked, also when it refused.
    pub fn count(&self, call: Call) -> u64 {
        self.state().counts.get(&call).copied().unwrap_or(0)
    }

    /// What may be mapped.
    pub fn set_windows(&self, windows: &[RangeInclusive<u64>]) {
        self.state().windows = Some(windows.to_vec());
    }

    /// The address spaces there are.
    pub fn spaces(&self) -> Vec<u32> {
        self.state().spaces.keys().copied().collect()
    }

    /// Start and length of what is mapped in address space `ioas`.
    pub fn mapped(&self, ioas: u32) -> Vec<(u64, u64)> {
        let state = self.state();
        let areas = state.spaces.get(&ioas).into_iter().flatten();
        areas.map(|(start, area)| (*start, area.len)).collect()
    }

    /// Where byte `iova` of address space `ioas` is in memory, and what devices may do there.
    pub fn reaches(&self, ioas: u32, iova: u64) -> Option<(u64, Access)> {
        let state = self.state();
        let (start, area) = state.spaces.get(&ioas)?.range(..=iova).next_back()?;
        let within = iova - start;
        (within < area.len).then(|| (area.memory + within, area.access))
    }

    /// A function that is attached to nothing.
    pub fn function(self: &Arc<Self>) -> Arc<Function> {
        let mut state = self.state();
        state.functions.push(Place::default());
        Arc::new(Function {
            host: self.clone(),
            number: state.functions.len() - 1,
        })
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn asked(&self, call: Call) -> io::Result<MutexGuard<'_, State>> {
        let mut state = self.state();
        *state.counts.entry(call).or_default() += 1;
        if let Some((once, before, errno)) = state.refused_once
            && once == call
        {
            state.refused_once = before.checked_sub(1).map(|left| (call, left, errno));
            if before == 0 {
                return Err(io::Error::from_raw_os_error(errno));
            }
        }
        match state.refused.get_mut(&call) {
            Some((0, errno)) => Err(io::Error::from_raw_os_error(*errno)),
            Some((before, _)) => {
                *before -= 1;
                Ok(state)
            }
            None => Ok(state),
        }
    }
}

/// The error of a kernel that answers `errno`.
fn kernel<T>(errno: i32) -> io::Result<T> {
    Err(io::Error::from_raw_os_error(errno))
}

/// Mappings of `areas` that share a byte with `first..=last`, with their starts.
fn overlapping(areas: &BTreeMap<u64, Area>, first: u64, last: u64) -> Vec<(u64, Area)> {
    let before = areas.range(..first).next_back();
    let before = before.filter(|(start, area)| *start + (area.len - 1) >= first);
    let inside = areas.range(first..=last);
    before
        .into_iter()
        .chain(inside)
        .map(|(start, area)| (*start, *area))
        .collect()
}

impl Requests for Host {
    fn alloc(&self) -> io::Result<u32> {
        let mut state = self.asked(Call::Alloc)?;
        state.next += 1;
        let id = state.next;
        state.spaces.insert(id, BTreeMap::new());
        Ok(id)
    }

    fn destroy(&self, id: u32) -> io::Result<()> {
        let mut state = self.asked(Call::Destroy)?;
        if state.functions.iter().any(|function| function.space == Some(id)) {
            return kernel(libc::EBUSY);
        }
        let found = state.spaces.remove(&id);
        found.map(drop).ok_or_else(|| io::ErrorKind::NotFound.into())
    }

    fn map(&self, ioas: u32, ram: &GuestRam, region: usize) -> io::Result<()> {
        let mut state = self.asked(Call::Map)?;
        let range = ram.ranges().nth(region).ok_or(io::ErrorKind::NotFound)?;
        let space = state.spaces.get_mut(&ioas).ok_or(io::ErrorKind::NotFound)?;
        let area = Area {
            len: range.len(),
            memory: range.start().0,
            access: Access::BOTH,
        };
        space.insert(range.start().0, area);
        Ok(())
    }

    fn map_file(&self, ioas: u32, _file: BorrowedFd<'_>, range: GpaRange) -> io::Result<()> {
        let mut state = self.asked(Call::MapFile)?;
        let (first, last) = (range.start().0, range.last().0);
        let windows = state.windows.clone().unwrap_or_else(|| vec![0..=u64::MAX]);
        let inside = |window: &RangeInclusive<u64>| window.contains(&first) && window.contains(&last);
        if !(first | range.len()).is_multiple_of(PAGE) || !windows.iter().any(inside) {
            return kernel(libc::EINVAL);
        }
        let Some(space) = state.spaces.get_mut(&ioas) else {
            return kernel(libc::ENOENT);
        };
        if !overlapping(space, first, last).is_empty() {
            return kernel(libc::EEXIST);
        }
        let area = Area {
            len: range.len(),
            memory: DEVICE,
            access: Access::BOTH,
        };
        space.insert(first, area);
        Ok(())
    }

    fn windows(&self, _ioas: u32) -> io::Result<Vec<RangeInclusive<u64>>> {
        let state = self.asked(Call::Windows)?;
        Ok(state.windows.clone().unwrap_or_else(|| vec![0..=u64::MAX]))
    }

    fn copy(&self, copy: &Copied) -> io::Result<()> {
        let mut state = self.asked(Call::Copy)?;
        let aligned = (copy.source | copy.iova | copy.len).is_multiple_of(PAGE);
        let more = copy.len.checked_sub(1);
        let ends = more.and_then(|more| Some((copy.iova.checked_add(more)?, copy.source.checked_add(more)?)));
        let Some((last, source_last)) = ends.filter(|_| aligned && copy.access != Access::NONE) else {
            return kernel(libc::EINVAL);
        };
        let windows = state.windows.clone().unwrap_or_else(|| vec![0..=u64::MAX]);
        let inside = |window: &RangeInclusive<u64>| window.contains(&copy.iova) && window.contains(&last);
        if !windows.iter().any(inside) {
            return kernel(libc::EINVAL);
        }
        let Some(source) = state.spaces.get(&copy.from) else {
            return kernel(libc::ENOENT);
        };
        // Sources follow each other without a hole.
        let mut next = copy.source;
        let mut areas = Vec::new();
        for (start, area) in overlapping(source, copy.source, source_last) {
            if start > next {
                return kernel(libc::ENOENT);
            }
            let len = (start + (area.len - 1)).min(source_last) - next + 1;
            areas.push((
                copy.iova + (next - copy.source),
                Area {
                    len,
                    memory: area.memory + (next - start),
                    access: copy.access,
                },
            ));
            next += len;
        }
        if next != source_last + 1 {
            return kernel(libc::ENOENT);
        }
        let Some(space) = state.spaces.get_mut(&copy.to) else {
            return kernel(libc::ENOENT);
        };
        if !overlapping(space, copy.iova, last).is_empty() {
            return kernel(libc::EEXIST);
        }
        space.extend(areas);
        Ok(())
    }

    fn unmap(&self, ioas: u32, range: RangeInclusive<u64>) -> io::Result<()> {
        let mut state = self.asked(Call::Unmap)?;
        let Some(space) = state.spaces.get_mut(&ioas) else {
            return kernel(libc::ENOENT);
        };
        let found = overlapping(space, *range.start(), *range.end());
        let whole =
            |(start, area): &(u64, Area)| range.contains(start) && range.contains(&(start + (area.len - 1)));
        if found.is_empty() || !found.iter().all(whole) {
            return kernel(libc::ENOENT);
        }
        space.retain(|start, _| !range.contains(start));
        Ok(())
    }
}

/// A function of a host that is none.
pub struct Function {
    host: Arc<Host>,
    number: usize,
}

impl Function {
    /// The address space it is attached to.
    pub fn place(&self) -> Option<u32> {
        self.host.state().functions[self.number].space
    }

    /// Whether it is kept from issuing requests.
    pub fn is_silent(&self) -> bool {
        self.host.state().functions[self.number].silent
    }

    /// Where byte `iova` is for its requests, and what they may do there.
    pub fn reaches(&self, iova: u64) -> Option<(u64, Access)> {
        let place = self.place().filter(|_| !self.is_silent())?;
        self.host.reaches(place, iova)
    }
}

impl Attach for Function {
    fn attach(&self, ioas: u32) -> io::Result<()> {
        let mut state = self.host.asked(Call::Attach)?;
        if !state.spaces.contains_key(&ioas) {
            return kernel(libc::ENOENT);
        }
        state.functions[self.number] = Place {
            space: Some(ioas),
            silent: false,
        };
        Ok(())
    }

    fn detach(&self) -> io::Result<()> {
        self.host.asked(Call::Detach)?.functions[self.number].space = None;
        Ok(())
    }
}

impl Silence for Function {
    fn silence(&self) -> io::Result<()> {
        self.host.asked(Call::Silence)?.functions[self.number].silent = true;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use vm_memory::{GuestAddress, GuestMemoryMmap};

    /// A host with 16 pages of RAM in one address space, and an empty one.
    fn host() -> (Arc<Host>, u32, u32) {
        let host = Host::new();
        let ram = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 0x1_0000)]).expect("small");
        let from = host.alloc().expect("made");
        host.map(from, &GuestRam::new(ram), 0).expect("mapped");
        let to = host.alloc().expect("made");
        (host, from, to)
    }

    fn errno(result: io::Result<()>) -> Option<i32> {
        result.expect_err("refused").raw_os_error()
    }

    #[test]
    fn mappings_may_not_overlap_nor_be_cut() {
        let (host, from, to) = host();
        let pages = |iova, len| Copied {
            from,
            source: 0x4000,
            to,
            iova,
            len,
            access: Access::READ,
        };
        host.copy(&pages(0x10_0000, 0x4000)).expect("free");
        assert_eq!(host.reaches(to, 0x10_1008), Some((0x5008, Access::READ)));
        assert_eq!(host.reaches(to, 0x10_4000), None);
        assert_eq!(errno(host.copy(&pages(0x10_3000, 0x1000))), Some(libc::EEXIST));
        assert_eq!(errno(host.unmap(to, 0x10_0000..=0x10_0fff)), Some(libc::ENOENT));
        assert_eq!(errno(host.unmap(to, 0x10_4000..=u64::MAX)), Some(libc::ENOENT));
        host.unmap(to, 0..=u64::MAX).expect("all of it");
        assert!(host.mapped(to).is_empty());
    }

    #[test]
    fn only_whole_pages_that_the_other_space_has_are_copied() {
        let (host, from, to) = host();
        let page = Copied {
            from,
            source: 0xf000,
            to,
            iova: 0x1000,
            len: 0x1000,
            access: Access::BOTH,
        };
        let refused = |copy: Copied| errno(host.copy(&copy));
        assert_eq!(refused(Copied { len: 0x2000, ..page }), Some(libc::ENOENT));
        assert_eq!(refused(Copied { len: 0x800, ..page }), Some(libc::EINVAL));
        assert_eq!(refused(Copied { len: 0, ..page }), Some(libc::EINVAL));
        let none = Access::NONE;
        assert_eq!(refused(Copied { access: none, ..page }), Some(libc::EINVAL));
        host.set_windows(&[0x2000..=u64::MAX]);
        assert_eq!(refused(page), Some(libc::EINVAL));
        assert!(host.mapped(to).is_empty());
    }

    #[test]
    fn a_space_with_a_function_in_it_is_not_destroyed() {
        let (host, _, to) = host();
        let function = host.function();
        function.attach(to).expect("attached");
        assert_eq!(errno(host.destroy(to)), Some(libc::EBUSY));
        function.detach().expect("detached");
        host.destroy(to).expect("nothing uses it");
    }

    #[test]
    fn one_call_among_many_is_refused() {
        let host = Host::new();
        host.refuse_once(Call::Alloc, 1, libc::ENOMEM);
        assert!(host.alloc().is_ok() && host.alloc().is_err() && host.alloc().is_ok());
        assert_eq!(host.count(Call::Alloc), 3);
    }
}
