//! A function that the host can have back while others still hold on to it.
//!
//! The kernel waits for the last descriptor of a function when its driver is unbound. What the guest's function, its unit
//! and the machine hold is this; once it is returned, requests fail as those to a device that is gone do.

use std::io;
use std::os::fd::OwnedFd;
use std::sync::{Arc, PoisonError, RwLock};

use vmm_sys_util::eventfd::EventFd;

use super::host::{Companion, HostFunction, Interrupt, InterruptInfo, Notice, Region, RegionInfo};
use crate::iommu::iommufd::Attach;
use crate::platform::assigned::{Assigned, AssignedDevices};
use crate::platform::device_memory::DeviceMemory;
use crate::platform::host::HostError;

/// A function of the host until it is returned.
pub struct Lent(RwLock<Option<Held>>);

struct Held {
    /// What the hypervisor holds open until it is dropped.
    assigned: Option<Box<dyn Assigned>>,
    function: Arc<dyn HostFunction>,
}

impl Lent {
    /// `function` from now on.
    #[must_use]
    pub fn new(function: Arc<dyn HostFunction>) -> Arc<Self> {
        Arc::new(Self(RwLock::new(Some(Held {
            assigned: None,
            function,
        }))))
    }

    /// Tell `hypervisor` of it until it is returned.
    ///
    /// # Errors
    /// What the hypervisor refused; the function works all the same.
    pub fn tell(&self, hypervisor: &dyn AssignedDevices) -> Result<(), HostError> {
        let mut held = self.0.write().unwrap_or_else(PoisonError::into_inner);
        if let Some(Held { assigned, function }) = &mut *held
            && let Some(file) = function.file()
        {
            *assigned = Some(hypervisor.add(file)?);
        }
        Ok(())
    }

    /// Let go of it. It is closed once requests under way have ended and memory of it that was mapped is gone.
    pub fn give_back(&self) {
        let held = self.0.write().unwrap_or_else(PoisonError::into_inner).take();
        if let Some(Held { assigned, function }) = held {
            drop(assigned);
            drop(function);
        }
    }

    /// Whether it was returned.
    #[must_use]
    pub fn is_returned(&self) -> bool {
        self.0.read().unwrap_or_else(PoisonError::into_inner).is_none()
    }

    fn host(&self) -> io::Result<Arc<dyn HostFunction>> {
        let held = self.0.read().unwrap_or_else(PoisonError::into_inner);
        let function = held.as_ref().map(|held| held.function.clone());
        function.ok_or_else(|| io::Error::from_raw_os_error(libc::ENODEV))
    }
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
        self.host()?.write(region, offset, data)
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
        self.host().map_or(Ok(()), |host| host.attach(ioas))
    }

    fn detach(&self) -> io::Result<()> {
        self.host().map_or(Ok(()), |host| host.detach())
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
