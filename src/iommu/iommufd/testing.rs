//! What tests use instead of /dev/iommu: it remembers what it is asked and refuses what it is told to.

use std::collections::BTreeMap;
use std::io;
use std::ops::RangeInclusive;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::Requests;
use crate::platform::memory::GuestRam;

/// A kind of request.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Call {
    /// [`Requests::alloc`].
    Alloc,
    /// [`Requests::destroy`].
    Destroy,
    /// [`Requests::map`].
    Map,
    /// [`Requests::windows`].
    Windows,
}

/// A /dev/iommu that is none.
#[derive(Default)]
pub struct Host(Mutex<State>);

#[derive(Default)]
struct State {
    next: u32,
    /// By number: start and length of each mapping.
    spaces: BTreeMap<u32, Vec<(u64, u64)>>,
    windows: Option<Vec<RangeInclusive<u64>>>,
    refused: BTreeMap<Call, i32>,
}

impl Host {
    /// One with nothing in it, which refuses nothing.
    pub fn new() -> Arc<Self> {
        Arc::default()
    }

    /// Answer every further `call` with the error number `errno`.
    pub fn refuse(&self, call: Call, errno: i32) {
        self.state().refused.insert(call, errno);
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
        self.state().spaces.get(&ioas).cloned().unwrap_or_default()
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn asked(&self, call: Call) -> io::Result<MutexGuard<'_, State>> {
        let state = self.state();
        match state.refused.get(&call) {
            Some(errno) => Err(io::Error::from_raw_os_error(*errno)),
            None => Ok(state),
        }
    }
}

impl Requests for Host {
    fn alloc(&self) -> io::Result<u32> {
        let mut state = self.asked(Call::Alloc)?;
        state.next += 1;
        let id = state.next;
        state.spaces.insert(id, Vec::new());
        Ok(id)
    }

    fn destroy(&self, id: u32) -> io::Result<()> {
        let found = self.asked(Call::Destroy)?.spaces.remove(&id);
        found.map(drop).ok_or_else(|| io::ErrorKind::NotFound.into())
    }

    fn map(&self, ioas: u32, ram: &GuestRam, region: usize) -> io::Result<()> {
        let mut state = self.asked(Call::Map)?;
        let range = ram.ranges().nth(region).ok_or(io::ErrorKind::NotFound)?;
        let space = state.spaces.get_mut(&ioas).ok_or(io::ErrorKind::NotFound)?;
        space.push((range.start().0, range.len()));
        Ok(())
    }

    fn windows(&self, _ioas: u32) -> io::Result<Vec<RangeInclusive<u64>>> {
        let state = self.asked(Call::Windows)?;
        Ok(state.windows.clone().unwrap_or_else(|| vec![0..=u64::MAX]))
    }
}
