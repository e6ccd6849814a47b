//! The device-ID and domain-ID maps of guests. They lie in memory, in the unit's private address space, and are read at
//! every use: nothing of them is kept.

use super::{Guest, Guests};
use crate::iommu::amd::events::Event;
use crate::iommu::amd::memory::{SystemMemory, Unreachable};
use crate::iommu::amd::spec::viommu::{
    DEVICE_ENTRY, DEVICE_MAP_LEN, DEVICE_MAPS, DOMAIN_ENTRY, DOMAIN_MAP_LEN, DOMAIN_MAPS, MapControl,
    MapEntry,
};
use crate::iommu::amd::{Effects, Unit};
use crate::platform::addr::{Bdf, Gpa};

/// Bytes of a map that are read at once.
const PIECE: usize = 0x1000;

/// A part of the private address space does not answer.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct Broken {
    /// Where.
    pub(super) at: u64,
}

/// Where the device-ID map of `guest` has the entry of `device`.
fn device_at(guest: u16, device: u16) -> u64 {
    DEVICE_MAPS + u64::from(guest) * DEVICE_MAP_LEN + u64::from(device) * DEVICE_ENTRY
}

/// Where the domain-ID map of `guest` has the entry of `domain`.
fn domain_at(guest: u16, domain: u16) -> u64 {
    DOMAIN_MAPS + u64::from(guest) * DOMAIN_MAP_LEN + u64::from(domain) * DOMAIN_ENTRY
}

/// The two halves of an entry: from the guest's number to the host's, and from the host's to the guest's.
fn halves(entry: u64) -> [MapEntry; 2] {
    let [b0, b1, b2, b3, b4, b5, b6, b7] = entry.to_le_bytes();
    [[b0, b1, b2, b3], [b4, b5, b6, b7]].map(|half| MapEntry::from_bits(u32::from_le_bytes(half)))
}

fn entry([forward, back]: [MapEntry; 2]) -> u64 {
    u64::from(forward.into_bits()) | u64::from(back.into_bits()) << 32
}

/// The number on the other side, if there is one.
fn number(entry: MapEntry) -> Option<u16> {
    entry.valid().then_some(entry.number())
}

impl<M: SystemMemory> Unit<M> {
    /// The quadword at `at` of the private address space.
    fn private(&self, guests: &Guests, at: u64) -> Result<u64, Broken> {
        let private = self.reach(guests.own).ok_or(Broken { at })?;
        private.load(Gpa(at)).map_err(|Unreachable| Broken { at })
    }

    fn change_private(
        &self,
        guests: &Guests,
        at: u64,
        change: impl FnOnce([MapEntry; 2]) -> [MapEntry; 2],
    ) -> Result<(), Broken> {
        let private = self.reach(guests.own).ok_or(Broken { at })?;
        let changed = private
            .load(Gpa(at))
            .and_then(|old| private.store(Gpa(at), entry(change(halves(old)))));
        changed.map_err(|Unreachable| Broken { at })
    }

    /// What the host calls the device that `guest` calls `device`.
    pub(super) fn host_device(
        &self,
        guests: &Guests,
        guest: &Guest,
        device: Bdf,
    ) -> Result<Option<Bdf>, Broken> {
        let at = device_at(guest.id, device.requester_id());
        let [forward, _] = halves(self.private(guests, at)?);
        Ok(number(forward).map(Bdf::from_requester_id))
    }

    /// What the host calls the domain that `guest` calls `domain`.
    pub(super) fn host_domain(
        &self,
        guests: &Guests,
        guest: &Guest,
        domain: u16,
    ) -> Result<Option<u16>, Broken> {
        let [forward, _] = halves(self.private(guests, domain_at(guest.id, domain))?);
        Ok(number(forward))
    }

    /// What `guest` calls the domain that the host calls `domain`.
    pub(super) fn guest_domain(
        &self,
        guests: &Guests,
        guest: &Guest,
        domain: u16,
    ) -> Result<Option<u16>, Broken> {
        let [_, back] = halves(self.private(guests, domain_at(guest.id, domain))?);
        Ok(number(back))
    }

    /// Write an entry of the device-ID map of `guest`.
    pub(super) fn map_device(&self, guests: &Guests, guest: &Guest, map: MapControl) -> Effects {
        let at = device_at(guest.id, map.guest());
        let written = self.change_private(guests, at, |[_, back]| {
            [
                MapEntry::new().with_number(map.host()).with_valid(map.valid()),
                back,
            ]
        });
        self.unbroken(guest, written)
    }

    /// Write an entry of the domain-ID map of `guest`, and the way back.
    pub(super) fn map_domain(&self, guests: &Guests, guest: &Guest, map: MapControl) -> Effects {
        let towards = |number| MapEntry::new().with_number(number).with_valid(map.valid());
        let at = domain_at(guest.id, map.guest());
        let mut before = None;
        let written = self.change_private(guests, at, |[forward, back]| {
            before = number(forward);
            [towards(map.host()), back]
        });
        // The way back from where it led before ends, unless another domain has it by now.
        let taken_back = written.and_then(|()| {
            before.map_or(Ok(()), |before| {
                self.change_private(guests, domain_at(guest.id, before), |[forward, back]| {
                    let ours = number(back) == Some(map.guest());
                    [forward, if ours { MapEntry::new() } else { back }]
                })
            })
        });
        let led_back = taken_back.and_then(|()| {
            if !map.valid() {
                return Ok(());
            }
            self.change_private(guests, domain_at(guest.id, map.host()), |[forward, _]| {
                [forward, towards(map.guest())]
            })
        });
        self.unbroken(guest, led_back)
    }

    /// Tell the host what is broken.
    pub(super) fn unbroken(&self, guest: &Guest, outcome: Result<(), Broken>) -> Effects {
        outcome.map_or_else(
            |Broken { at }| self.report(&Event::ViommuHardwareError { guest: guest.id, at }),
            |()| Effects::default(),
        )
    }

    /// Call `each` with every device of `guest`, as the host calls it.
    pub(super) fn devices_of(
        &self,
        guests: &Guests,
        guest: &Guest,
        each: impl FnMut(Bdf),
    ) -> Result<(), Broken> {
        let mut each = each;
        self.mapped(
            guests,
            device_at(guest.id, 0),
            DEVICE_MAP_LEN,
            DEVICE_ENTRY,
            |device| {
                each(Bdf::from_requester_id(device));
            },
        )
    }

    /// Call `each` with every domain of `guest`, as the host calls it.
    pub(super) fn domains_of(
        &self,
        guests: &Guests,
        guest: &Guest,
        each: impl FnMut(u16),
    ) -> Result<(), Broken> {
        self.mapped(guests, domain_at(guest.id, 0), DOMAIN_MAP_LEN, DOMAIN_ENTRY, each)
    }

    /// Call `each` with whatever the map at `first` leads to.
    fn mapped(
        &self,
        guests: &Guests,
        first: u64,
        len: u64,
        stride: u64,
        mut each: impl FnMut(u16),
    ) -> Result<(), Broken> {
        let private = self.reach(guests.own).ok_or(Broken { at: first })?;
        let mut page = [0; PIECE];
        let stride = usize::try_from(stride).expect("an entry is small");
        for at in (first..first + len).step_by(page.len()) {
            private
                .read(Gpa(at), &mut page)
                .map_err(|Unreachable| Broken { at })?;
            for bytes in page.as_chunks::<8>().0.iter().step_by(stride / 8) {
                let [forward, _] = halves(u64::from_le_bytes(*bytes));
                number(forward).into_iter().for_each(&mut each);
            }
        }
        Ok(())
    }
}
