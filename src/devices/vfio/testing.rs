//! What tests pass through instead of hardware: a function whose registers, sizes and failures they choose.

use std::collections::BTreeMap;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use vmm_sys_util::eventfd::EventFd;

use super::host::{Companion, Fewer, HostFunction, Interrupt, InterruptInfo, Notice, Region, RegionInfo};
use crate::iommu::iommufd::Attach;
use crate::platform::addr::Gpa;
use crate::platform::device_memory::{DeviceMemory, DeviceMemoryHost, MappedDeviceMemory};
use crate::platform::host::HostError;

/// A kind of request.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Asked {
    /// [`HostFunction::read`].
    Read,
    /// [`HostFunction::write`].
    Write,
    /// [`HostFunction::map`].
    Map,
    /// [`HostFunction::export`].
    Export,
    /// [`HostFunction::set_interrupts`].
    SetInterrupts,
    /// [`HostFunction::disable_interrupts`].
    DisableInterrupts,
    /// [`HostFunction::unmask_intx`].
    Unmask,
    /// [`HostFunction::notify`].
    Notify,
    /// [`HostFunction::reset`].
    Reset,
    /// [`HostFunction::companions`].
    Companions,
    /// [`HostFunction::hot_reset`].
    HotReset,
    /// [`Attach::attach`].
    Attach,
    /// [`Attach::detach`].
    Detach,
}

/// What a device was told, in order.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Told {
    /// Bytes of configuration space: where, what.
    Config(u64, Vec<u8>),
    /// Bytes of a BAR: which, where, what.
    Bar(u8, u64, Vec<u8>),
    /// Interrupts: kind, first vector, and which of those have an eventfd.
    Interrupts(Interrupt, u32, Vec<bool>),
    /// Interrupts are off.
    Disabled(Interrupt),
    /// The wire may interrupt again.
    Unmasked,
    /// It was reset.
    Reset,
    /// It was reset with all of its bus.
    HotReset,
    /// It was detached.
    Detached,
}

/// A function of a host that is none.
pub struct Device {
    regions: BTreeMap<Region, RegionInfo>,
    interrupts: BTreeMap<Interrupt, InterruptInfo>,
    resets: bool,
    companions: Vec<Companion>,
    /// What stands for its node.
    file: std::fs::File,
    /// What its binding calls it, and who else is to know what it is attached to.
    bound: Option<(u32, Arc<dyn Attach>)>,
    /// Called when it is about to be reset.
    before_reset: Option<Box<dyn Fn() + Send + Sync>>,
    state: Mutex<State>,
}

struct State {
    config: Vec<u8>,
    /// What reads of a BAR give: the BAR's number in every byte.
    told: Vec<Told>,
    attached: Vec<u32>,
    exported: usize,
    refused: BTreeMap<Asked, i32>,
    /// The kind of interrupts that is on, and how many vectors of it were set up at first.
    on: Option<(Interrupt, u32)>,
    /// How many vectors there are to give where those are fewer than the function has.
    gives: BTreeMap<Interrupt, u32>,
    /// What is answered instead of giving any.
    answers: BTreeMap<Interrupt, u32>,
    /// The eventfds that interrupts signal.
    eventfds: BTreeMap<(Interrupt, u32), EventFd>,
    notices: BTreeMap<Notice, EventFd>,
}

/// The first byte of each capability of [`Device::nic`].
pub const PM: u16 = 0xc8;
/// MSI with a 64-bit address.
pub const MSI: u16 = 0xd0;
/// PCI Express, version 2.
pub const EXPRESS: u16 = 0x60;
/// MSI-X of five vectors: table at the start of BAR 3, pending bits 0x2000 into it.
pub const MSIX: u16 = 0xa0;

impl Device {
    /// A NIC: 128 KiB of registers in BAR 0, 32 ports in BAR 2, MSI-X in BAR 3; configuration space of 4 KiB.
    #[must_use]
    pub fn nic() -> Arc<Self> {
        Arc::new(Self::with(&nic_config()))
    }

    /// The same with other contents of configuration space.
    #[must_use]
    pub fn with(config: &[u8]) -> Self {
        let mapped = |size| RegionInfo {
            size,
            mappable: vec![(0, size)],
        };
        let trapped = |size| RegionInfo {
            size,
            mappable: Vec::new(),
        };
        let regions = [
            (Region::Bar(0), mapped(0x2_0000)),
            (Region::Bar(2), trapped(0x20)),
            (Region::Bar(3), mapped(0x4000)),
            (Region::Config, trapped(config.len() as u64)),
        ];
        let info = |count, grows| InterruptInfo { count, grows };
        let interrupts = [
            (Interrupt::Intx, info(1, false)),
            (Interrupt::Msi, info(1, false)),
            (Interrupt::Msix, info(5, true)),
        ];
        Self {
            regions: regions.into(),
            interrupts: interrupts.into(),
            resets: true,
            companions: Vec::new(),
            file: std::fs::File::open("/dev/null").expect("every host has it"),
            bound: None,
            before_reset: None,
            state: Mutex::new(State {
                config: config.to_vec(),
                told: Vec::new(),
                attached: Vec::new(),
                exported: 0,
                refused: BTreeMap::new(),
                on: None,
                gives: BTreeMap::new(),
                answers: BTreeMap::new(),
                eventfds: BTreeMap::new(),
                notices: BTreeMap::new(),
            }),
        }
    }

    /// The same whose interrupts of `kind` are these.
    #[must_use]
    pub fn interrupting(mut self, kind: Interrupt, count: u32, grows: bool) -> Self {
        self.interrupts.insert(kind, InterruptInfo { count, grows });
        self
    }

    /// The same whose `region` is this.
    #[must_use]
    pub fn region(mut self, region: Region, info: RegionInfo) -> Self {
        self.regions.insert(region, info);
        self
    }

    /// The same that its binding calls `id`, and that is attached where `kernel` lets it.
    #[must_use]
    pub fn bound(mut self, id: u32, kernel: Arc<dyn Attach>) -> Self {
        self.bound = Some((id, kernel));
        self
    }

    /// The same that calls `look` before each of its resets.
    #[must_use]
    pub fn before_reset(mut self, look: impl Fn() + Send + Sync + 'static) -> Self {
        self.before_reset = Some(Box::new(look));
        self
    }

    /// The same that the host cannot reset.
    #[must_use]
    pub fn without_reset(mut self) -> Self {
        self.resets = false;
        self
    }

    /// The same whose bus has these functions on it.
    #[must_use]
    pub fn beside(mut self, companions: &[Companion]) -> Self {
        self.companions = companions.to_vec();
        self
    }

    /// Answer every further request of this kind with the error number `errno`.
    pub fn refuse(&self, asked: Asked, errno: i32) {
        self.state().refused.insert(asked, errno);
    }

    /// Refuse nothing any more.
    pub fn relent(&self) {
        self.state().refused.clear();
    }

    /// Set up no more than `most` vectors of `kind` from here on.
    pub fn give_at_most(&self, kind: Interrupt, most: u32) {
        self.state().gives.insert(kind, most);
    }

    /// Answer every request for vectors of `kind` by saying that there are this many, whatever was asked for, and give none.
    pub fn answer(&self, kind: Interrupt, has: u32) {
        self.state().answers.insert(kind, has);
    }

    /// What it was told since the last call.
    pub fn told(&self) -> Vec<Told> {
        std::mem::take(&mut self.state().told)
    }

    /// The address spaces it was attached to, in order.
    pub fn attached(&self) -> Vec<u32> {
        self.state().attached.clone()
    }

    /// How many stretches of its memory it exported.
    pub fn exported(&self) -> usize {
        self.state().exported
    }

    /// The device's own bytes of configuration space become these.
    pub fn set_config(&self, at: u16, bytes: &[u8]) {
        let at = usize::from(at);
        self.state().config[at..at + bytes.len()].copy_from_slice(bytes);
    }

    /// Interrupt by this vector of `kind`; `false` when nobody listens.
    pub fn interrupt(&self, kind: Interrupt, vector: u32) -> bool {
        let state = self.state();
        let eventfd = state.eventfds.get(&(kind, vector));
        eventfd.is_some_and(|eventfd| eventfd.write(1).is_ok())
    }

    /// Give this notice; `false` when nobody listens.
    pub fn give(&self, notice: Notice) -> bool {
        let state = self.state();
        let eventfd = state.notices.get(&notice);
        eventfd.is_some_and(|eventfd| eventfd.write(1).is_ok())
    }

    /// Interrupts of this kind are set up, whether anybody listens or not.
    pub fn is_on(&self, kind: Interrupt) -> bool {
        self.state().on.is_some_and(|(on, _)| on == kind)
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn asked(&self, asked: Asked) -> io::Result<MutexGuard<'_, State>> {
        let state = self.state();
        match state.refused.get(&asked) {
            Some(errno) => Err(io::Error::from_raw_os_error(*errno)),
            None => Ok(state),
        }
    }
}

/// Configuration space of [`Device::nic`].
#[must_use]
pub fn nic_config() -> Vec<u8> {
    let mut config = vec![0; 4096];
    let mut put = |at: u16, bytes: &[u8]| {
        let at = usize::from(at);
        config[at..at + bytes.len()].copy_from_slice(bytes);
    };
    put(0, &[0x86, 0x80, 0xd3, 0x10, 0x07, 0x04, 0x10, 0x00, 0, 0, 0, 2]);
    put(0x34, &[PM.to_le_bytes()[0]]);
    put(0x3d, &[1]);
    put(PM, &[0x01, 0xd0, 0x23, 0xc8, 0x08, 0x20, 0, 0]);
    // One vector, 64-bit address.
    put(MSI, &[0x05, 0x60, 0x80, 0x00]);
    // Version 2, an endpoint; can be reset by itself; 256-byte payloads.
    put(EXPRESS, &[0x10, 0xa0, 0x02, 0x00, 0x01, 0x80, 0x00, 0x10]);
    put(EXPRESS + 0xc, &[0x11, 0x1c, 0x04, 0x00]);
    put(EXPRESS + 0x12, &[0x11, 0x10]);
    put(EXPRESS + 0x24, &[0xff; 4]);
    // Five vectors, BAR 3.
    put(MSIX, &[0x11, 0x00, 0x04, 0x00, 0x03, 0, 0, 0, 0x03, 0x20, 0, 0]);
    // AER, then a serial number, then SR-IOV.
    put(0x100, &[0x01, 0x00, 0x02, 0x14]);
    put(0x140, &[0x03, 0x00, 0x01, 0x18, 1, 2, 3, 4, 5, 6, 7, 8]);
    put(0x180, &[0x10, 0x00, 0x01, 0x00, 0xff, 0xff, 0xff, 0xff]);
    config
}

impl HostFunction for Device {
    fn id(&self) -> u32 {
        self.bound.as_ref().map_or(0, |(id, _)| *id)
    }

    fn region(&self, region: Region) -> RegionInfo {
        self.regions.get(&region).cloned().unwrap_or_default()
    }

    fn interrupt(&self, kind: Interrupt) -> InterruptInfo {
        self.interrupts.get(&kind).copied().unwrap_or_default()
    }

    fn resets(&self) -> bool {
        self.resets
    }

    fn read(&self, region: Region, offset: u64, data: &mut [u8]) -> io::Result<()> {
        let state = self.asked(Asked::Read)?;
        let at = usize::try_from(offset).map_err(io::Error::other)?;
        match region {
            Region::Config => {
                let bytes = state.config.get(at..at + data.len());
                data.copy_from_slice(bytes.ok_or(io::ErrorKind::InvalidInput)?);
            }
            Region::Bar(bar) => data.fill(0x40 + bar),
        }
        Ok(())
    }

    fn write(&self, region: Region, offset: u64, data: &[u8]) -> io::Result<()> {
        let mut state = self.asked(Asked::Write)?;
        state.told.push(match region {
            Region::Config => Told::Config(offset, data.to_vec()),
            Region::Bar(bar) => Told::Bar(bar, offset, data.to_vec()),
        });
        if region == Region::Config {
            let at = usize::try_from(offset).map_err(io::Error::other)?;
            let bytes = state.config.get_mut(at..at + data.len());
            bytes.ok_or(io::ErrorKind::InvalidInput)?.copy_from_slice(data);
        }
        Ok(())
    }

    fn map(&self, _region: Region, _offset: u64, len: u64) -> io::Result<Arc<DeviceMemory>> {
        let _state = self.asked(Asked::Map)?;
        let file = std::fs::File::from(rustix::fs::memfd_create("bar", rustix::fs::MemfdFlags::CLOEXEC)?);
        file.set_len(len)?;
        DeviceMemory::map(&file, 0, len).map(Arc::new)
    }

    fn export(&self, _region: Region, _offset: u64, len: u64) -> io::Result<OwnedFd> {
        let mut state = self.asked(Asked::Export)?;
        let file = std::fs::File::from(rustix::fs::memfd_create("bar", rustix::fs::MemfdFlags::CLOEXEC)?);
        file.set_len(len)?;
        state.exported += 1;
        Ok(file.into())
    }

    fn set_interrupts(&self, kind: Interrupt, first: u32, eventfds: &[Option<&EventFd>]) -> io::Result<()> {
        let mut state = self.asked(Asked::SetInterrupts)?;
        let InterruptInfo { count, grows } = HostFunction::interrupt(self, kind);
        let asked = u32::try_from(eventfds.len()).map_err(io::Error::other)?;
        let asked = first.saturating_add(asked);
        match state.on {
            Some((on, at_first)) => {
                if on != kind || asked > if grows { count } else { at_first } {
                    return Err(io::Error::from_raw_os_error(libc::EINVAL));
                }
            }
            // The host's kernel knows no vectors beyond those of the capability.
            None if asked > count => return Err(io::Error::from_raw_os_error(libc::EINVAL)),
            None => {
                if let Some(&has) = state.answers.get(&kind) {
                    return Err(Fewer { has, asked }.into());
                }
                let gives = state.gives.get(&kind).copied();
                if let Some(has) = gives.filter(|has| *has < asked) {
                    return Err(Fewer { has, asked }.into());
                }
                state.on = Some((kind, asked));
            }
        }
        let listened = eventfds.iter().map(Option::is_some).collect();
        state.told.push(Told::Interrupts(kind, first, listened));
        for (vector, eventfd) in (first..).zip(eventfds) {
            state.eventfds.remove(&(kind, vector));
            if let Some(eventfd) = eventfd {
                state.eventfds.insert((kind, vector), eventfd.try_clone()?);
            }
        }
        Ok(())
    }

    fn disable_interrupts(&self, kind: Interrupt) -> io::Result<()> {
        let mut state = self.asked(Asked::DisableInterrupts)?;
        if state.on.is_none_or(|(on, _)| on != kind) {
            return Err(io::Error::from_raw_os_error(libc::EINVAL));
        }
        state.on = None;
        state.told.push(Told::Disabled(kind));
        state.eventfds.retain(|(other, _), _| *other != kind);
        Ok(())
    }

    fn unmask_intx(&self) -> io::Result<()> {
        self.asked(Asked::Unmask)?.told.push(Told::Unmasked);
        Ok(())
    }

    fn notify(&self, notice: Notice, eventfd: &EventFd) -> io::Result<()> {
        let eventfd = eventfd.try_clone()?;
        self.asked(Asked::Notify)?.notices.insert(notice, eventfd);
        Ok(())
    }

    fn file(&self) -> Option<BorrowedFd<'_>> {
        Some(self.file.as_fd())
    }

    fn reset(&self) -> io::Result<()> {
        self.before_reset.iter().for_each(|look| look());
        self.asked(Asked::Reset)?.told.push(Told::Reset);
        Ok(())
    }

    fn companions(&self) -> io::Result<Vec<Companion>> {
        let _state = self.asked(Asked::Companions)?;
        if self.companions.is_empty() {
            return Err(io::Error::from_raw_os_error(libc::ENODEV));
        }
        Ok(self.companions.clone())
    }

    fn hot_reset(&self) -> io::Result<()> {
        self.before_reset.iter().for_each(|look| look());
        self.asked(Asked::HotReset)?.told.push(Told::HotReset);
        Ok(())
    }
}

impl Attach for Device {
    fn attach(&self, ioas: u32) -> io::Result<()> {
        if let Some((_, kernel)) = &self.bound {
            kernel.attach(ioas)?;
        }
        self.asked(Asked::Attach)?.attached.push(ioas);
        Ok(())
    }

    fn detach(&self) -> io::Result<()> {
        if let Some((_, kernel)) = &self.bound {
            kernel.detach()?;
        }
        self.asked(Asked::Detach)?.told.push(Told::Detached);
        Ok(())
    }
}

/// Where a guest has memory of devices: start and length of each stretch, now.
#[derive(Default)]
pub struct GuestSpace {
    mapped: Arc<Mutex<Vec<(Gpa, u64)>>>,
    refuses: Mutex<bool>,
}

impl GuestSpace {
    /// Nothing mapped.
    #[must_use]
    pub fn new() -> Arc<Self> {
        Arc::default()
    }

    /// What is mapped, ascending.
    pub fn mapped(&self) -> Vec<(u64, u64)> {
        let mapped = self.mapped.lock().unwrap_or_else(PoisonError::into_inner);
        let mut mapped: Vec<_> = mapped.iter().map(|(at, len)| (at.0, *len)).collect();
        mapped.sort_unstable();
        mapped
    }

    /// Refuse to map anything from here on.
    pub fn refuse(&self) {
        *self.refuses.lock().unwrap_or_else(PoisonError::into_inner) = true;
    }
}

/// As a memory slot, it has the memory for as long as it lives.
struct Mapped {
    list: Arc<Mutex<Vec<(Gpa, u64)>>>,
    entry: (Gpa, u64),
    _memory: Arc<DeviceMemory>,
}

impl MappedDeviceMemory for Mapped {}

impl Drop for Mapped {
    fn drop(&mut self) {
        let mut list = self.list.lock().unwrap_or_else(PoisonError::into_inner);
        list.retain(|entry| *entry != self.entry);
    }
}

impl DeviceMemoryHost for GuestSpace {
    fn map(&self, at: Gpa, memory: &Arc<DeviceMemory>) -> Result<Box<dyn MappedDeviceMemory>, HostError> {
        if *self.refuses.lock().unwrap_or_else(PoisonError::into_inner) {
            let full = io::Error::from_raw_os_error(libc::ENOSPC);
            return Err(HostError::new("map a device's memory", full));
        }
        let entry = (at, memory.len());
        let mut mapped = self.mapped.lock().unwrap_or_else(PoisonError::into_inner);
        mapped.push(entry);
        Ok(Box::new(Mapped {
            list: self.mapped.clone(),
            entry,
            _memory: memory.clone(),
        }))
    }
}
