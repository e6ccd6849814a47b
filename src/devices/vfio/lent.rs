//! A function that the host can have back while others still hold on to it.
//!
//! The kernel waits for the last descriptor of a function when its driver is unbound. What the guest's function, its unit
//! and the machine hold is this; once it is returned, requests fail as those to a device that is gone do.

use std::io;
use std::os::fd::OwnedFd;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock};

use vmm_sys_util::eventfd::EventFd;

use super::host::{Companion, HostFunction, Interrupt, InterruptInfo, Notice, Region, RegionInfo};
use super::survey::COMMAND;
use crate::guest_warn;
use crate::iommu::iommufd::{Attach, Silence};
use crate::pci::Command;
use crate::platform::assigned::{Assigned, AssignedDevices};
use crate::platform::device_memory::DeviceMemory;
use crate::platform::host::HostError;

/// A function of the host until it is returned.
pub struct Lent {
    held: RwLock<Option<Held>>,
    /// Held while the device hears of it.
    mastering: Mutex<Mastering>,
}

/// Bus Master Enable of the device.
#[derive(Default)]
struct Mastering {
    /// What was last written.
    wanted: bool,
    /// It is off all the same.
    withheld: bool,
}

/// Where the Command register is in configuration space.
const COMMAND_AT: u64 = COMMAND as u64 * 4;

struct Held {
    /// What the hypervisor holds open until it is dropped.
    assigned: Option<Box<dyn Assigned>>,
    function: Arc<dyn HostFunction>,
}

impl Lent {
    /// `function` from now on.
    #[must_use]
    pub fn new(function: Arc<dyn HostFunction>) -> Arc<Self> {
        let held = Held {
            assigned: None,
            function,
        };
        Arc::new(Self {
            held: RwLock::new(Some(held)),
            mastering: Mutex::default(),
        })
    }

    /// Tell `hypervisor` of it until it is returned.
    ///
    /// # Errors
    /// What the hypervisor refused; the function works all the same.
    pub fn tell(&self, hypervisor: &dyn AssignedDevices) -> Result<(), HostError> {
        let mut held = self.held.write().unwrap_or_else(PoisonError::into_inner);
        if let Some(Held { assigned, function }) = &mut *held
            && let Some(file) = function.file()
        {
            *assigned = Some(hypervisor.add(file)?);
        }
        Ok(())
    }

    /// Let go of it. It is closed once requests under way have ended and memory of it that was mapped is gone.
    pub fn give_back(&self) {
        let held = self.held.write().unwrap_or_else(PoisonError::into_inner).take();
        if let Some(Held { assigned, function }) = held {
            drop(assigned);
            drop(function);
        }
    }

    /// Whether it was returned.
    #[must_use]
    pub fn is_returned(&self) -> bool {
        self.held.read().unwrap_or_else(PoisonError::into_inner).is_none()
    }

    fn host(&self) -> io::Result<Arc<dyn HostFunction>> {
        let held = self.held.read().unwrap_or_else(PoisonError::into_inner);
        let function = held.as_ref().map(|held| held.function.clone());
        function.ok_or_else(|| io::Error::from_raw_os_error(libc::ENODEV))
    }

    fn mastering(&self) -> MutexGuard<'_, Mastering> {
        self.mastering.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The device issues requests from here on, or none.
fn set_bus_master(function: &dyn HostFunction, on: bool) -> io::Result<()> {
    let mut bytes = [0; 2];
    function.read(Region::Config, COMMAND_AT, &mut bytes)?;
    let mut command = Command::from_bits_retain(u16::from_le_bytes(bytes));
    command.set(Command::BUS_MASTER, on);
    function.write(Region::Config, COMMAND_AT, &command.bits().to_le_bytes())
}

/// Which of `len` bytes from `offset` of `region` on has Bus Master Enable, if one does.
fn bus_master_byte(region: Region, offset: u64, len: usize) -> Option<usize> {
    let byte = usize::try_from(COMMAND_AT.checked_sub(offset)?).ok()?;
    (region == Region::Config && byte < len).then_some(byte)
}

impl HostFunction for Lent {
    fn id(&self) -> u32 {
        self.host().map_or(0, |host| host.id())
    }

    fn region(&self, region: Region) -> RegionInfo {
        self.host().map(|host| host.region(region)).unwrap_or_default()
    }

    fn interrupt(&self, kind: Interrupt) -> InterruptInfo {
        self.host().map(|host| host.interrupt(kind)).unwrap_or_default()
    }

    fn resets(&self) -> bool {
        self.host().is_ok_and(|host| host.resets())
    }

    fn read(&self, region: Region, offset: u64, data: &mut [u8]) -> io::Result<()> {
        self.host()?.read(region, offset, data)
    }

    fn write(&self, region: Region, offset: u64, data: &[u8]) -> io::Result<()> {
        const BUS_MASTER: u8 = Command::BUS_MASTER.bits().to_le_bytes()[0];
        let host = self.host()?;
        let Some(byte) = bus_master_byte(region, offset, data.len()) else {
            return host.write(region, offset, data);
        };
        let mut mastering = self.mastering();
        let mut data = data.to_vec();
        if let Some(byte) = data.get_mut(byte) {
            mastering.wanted = *byte & BUS_MASTER != 0;
            if mastering.withheld {
                *byte &= !BUS_MASTER;
            }
        }
        host.write(region, offset, &data)
    }

    fn map(&self, region: Region, offset: u64, len: u64) -> io::Result<Arc<DeviceMemory>> {
        self.host()?.map(region, offset, len)
    }

    fn export(&self, region: Region, offset: u64, len: u64) -> io::Result<OwnedFd> {
        self.host()?.export(region, offset, len)
    }

    fn set_interrupts(&self, kind: Interrupt, first: u32, eventfds: &[Option<&EventFd>]) -> io::Result<()> {
        self.host()?.set_interrupts(kind, first, eventfds)
    }

    fn disable_interrupts(&self, kind: Interrupt) -> io::Result<()> {
        self.host()?.disable_interrupts(kind)
    }

    fn unmask_intx(&self) -> io::Result<()> {
        self.host()?.unmask_intx()
    }

    fn notify(&self, notice: Notice, eventfd: &EventFd) -> io::Result<()> {
        self.host()?.notify(notice, eventfd)
    }

    fn reset(&self) -> io::Result<()> {
        self.host()?.reset()
    }

    fn companions(&self) -> io::Result<Vec<Companion>> {
        self.host()?.companions()
    }

    fn hot_reset(&self) -> io::Result<()> {
        self.host()?.hot_reset()
    }
}

/// A function that was returned reaches nothing, whatever it is attached to.
impl Attach for Lent {
    fn attach(&self, ioas: u32) -> io::Result<()> {
        let Ok(host) = self.host() else {
            return Ok(());
        };
        host.attach(ioas)?;
        let mut mastering = self.mastering();
        if std::mem::take(&mut mastering.withheld)
            && mastering.wanted
            && let Err(error) = set_bus_master(&*host, true)
        {
            guest_warn!(%error, "a function that may issue requests again does not take Bus Master Enable");
        }
        Ok(())
    }

    fn detach(&self) -> io::Result<()> {
        self.host().map_or(Ok(()), |host| host.detach())
    }
}

impl Silence for Lent {
    fn silence(&self) -> io::Result<()> {
        let Ok(host) = self.host() else {
            return Ok(());
        };
        let mut mastering = self.mastering();
        mastering.withheld = true;
        set_bus_master(&*host, false)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::devices::vfio::testing::{Asked, Device, Told};
    use std::os::fd::BorrowedFd;
    use std::sync::atomic::{AtomicUsize, Ordering};

    #[test]
    fn a_function_that_was_returned_is_closed_and_answers_nothing() {
        let device = Device::nic();
        let lent = Lent::new(device.clone());
        lent.attach(7).expect("attached");
        assert!(lent.resets() && lent.region(Region::Config).size == 4096 && !lent.is_returned());
        lent.give_back();
        assert_eq!(Arc::strong_count(&device), 1);
        let gone = |result: io::Result<()>| result.expect_err("gone").raw_os_error() == Some(libc::ENODEV);
        assert!(
            gone(lent.read(Region::Config, 0, &mut [0; 4])) && gone(lent.write(Region::Config, 4, &[0; 2]))
        );
        assert!(
            gone(lent.reset()) && gone(lent.hot_reset()) && gone(lent.disable_interrupts(Interrupt::Msi))
        );
        assert!(lent.map(Region::Bar(0), 0, 0x1000).is_err() && lent.companions().is_err());
        assert!(lent.export(Region::Bar(0), 0, 0x1000).is_err());
        assert!(lent.is_returned() && !lent.resets());
        // Nothing of it reaches anything.
        lent.attach(8).expect("as good as attached");
        lent.detach().expect("as good as detached");
        assert_eq!((device.attached(), device.told()), (vec![7], Vec::<Told>::new()));
    }

    #[test]
    fn a_silenced_function_masters_no_bus_whatever_is_written_until_it_is_attached_again() {
        let device = Device::nic();
        let masters = || {
            let mut command = [0; 2];
            device.read(Region::Config, 4, &mut command).expect("it answers");
            command[0] & 4 != 0
        };
        let lent = Lent::new(device.clone());
        let write = |at: u64, data: &[u8]| lent.write(Region::Config, at, data).expect("taken");
        write(4, &[6, 1]);
        assert!(masters());
        lent.silence().expect("taken");
        assert!(!masters());
        // Alone, with the register, and with the one before.
        write(4, &[6]);
        write(4, &[6, 0, 0, 0]);
        write(2, &[0, 0, 6, 0]);
        assert!(!masters());
        // What is no part of the register is written as it is.
        device.told();
        write(5, &[4]);
        lent.write(Region::Bar(0), 4, &[6]).expect("taken");
        let told = [Told::Config(5, vec![4]), Told::Bar(0, 4, vec![6])];
        assert_eq!(device.told(), told);
        lent.attach(7).expect("attached");
        assert!(masters(), "as was written last");
        lent.silence().expect("taken");
        write(4, &[2]);
        lent.attach(8).expect("attached");
        assert!(!masters(), "nobody lets it");
        write(4, &[6]);
        assert!(masters());
    }

    #[test]
    fn a_function_that_is_not_attached_again_or_does_not_answer_stays_silent() {
        let device = Device::nic();
        let lent = Lent::new(device.clone());
        lent.write(Region::Config, 4, &[6]).expect("taken");
        device.refuse(Asked::Write, libc::EIO);
        assert!(lent.silence().is_err());
        device.relent();
        device.refuse(Asked::Attach, libc::EBUSY);
        assert!(lent.attach(7).is_err());
        device.told();
        // What it did not take then it is told with the next write.
        lent.write(Region::Config, 4, &[6]).expect("taken");
        assert_eq!(device.told(), [Told::Config(4, vec![2])]);
        lent.give_back();
        lent.silence().expect("nothing of it reaches anything");
    }

    /// A hypervisor that counts what it knows, or refuses.
    #[derive(Default)]
    struct Hypervisor {
        known: Arc<AtomicUsize>,
        refuses: bool,
    }

    struct Known(Arc<AtomicUsize>);

    impl Assigned for Known {}

    impl Drop for Known {
        fn drop(&mut self) {
            self.0.fetch_sub(1, Ordering::Relaxed);
        }
    }

    impl AssignedDevices for Hypervisor {
        fn add(&self, _file: BorrowedFd<'_>) -> Result<Box<dyn Assigned>, HostError> {
            if self.refuses {
                return Err(HostError::new("tell of a file", io::ErrorKind::Unsupported));
            }
            self.known.fetch_add(1, Ordering::Relaxed);
            Ok(Box::new(Known(self.known.clone())))
        }
    }

    #[test]
    fn the_hypervisor_knows_of_a_function_until_it_is_returned() {
        let (device, hypervisor) = (Device::nic(), Hypervisor::default());
        let lent = Lent::new(device.clone());
        lent.tell(&hypervisor).expect("told");
        assert_eq!(hypervisor.known.load(Ordering::Relaxed), 1);
        lent.give_back();
        assert_eq!(
            (
                hypervisor.known.load(Ordering::Relaxed),
                Arc::strong_count(&device)
            ),
            (0, 1)
        );
        // Nothing is left to tell of.
        lent.tell(&hypervisor).expect("nothing");
        assert_eq!(hypervisor.known.load(Ordering::Relaxed), 0);
    }

    #[test]
    fn a_function_that_the_hypervisor_does_not_want_to_know_works() {
        let lent = Lent::new(Device::nic());
        let hypervisor = Hypervisor {
            refuses: true,
            ..Hypervisor::default()
        };
        assert_eq!(
            lent.tell(&hypervisor).expect_err("refused").to_string(),
            "cannot tell of a file"
        );
        lent.reset().expect("it works");
    }

    #[test]
    fn what_the_host_refuses_of_a_lent_function_is_refused() {
        let device = Device::nic();
        let lent = Lent::new(device.clone());
        device.refuse(Asked::Attach, libc::EINVAL);
        assert!(lent.attach(7).is_err());
    }
}
