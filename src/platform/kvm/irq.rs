//! Interrupt messages, routes and irqfds, and the kernel's side of the split interrupt controller.

use std::collections::BTreeMap;
use std::io;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use kvm_bindings::{KvmIrqRouting, kvm_irq_routing_entry, kvm_msi};
use vmm_sys_util::eventfd::EventFd;

use super::vm::Machine;
use super::{os, sys};
use crate::guest_warn;
use crate::platform::dma::Requester;
use crate::platform::host::HostError;
use crate::platform::irq::{IOAPIC_INPUTS, IoApicHost};
use crate::platform::msi::{MsiMessage, MsiRoute, MsiSink};

/// Routes the kernel keeps for one VM (KVM_MAX_IRQ_ROUTES); GSIs are given out below this number.
const MOST_ROUTES: u32 = 4096;

/// What the kernel is told of a message, in its x2APIC form.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
struct Delivery {
    /// Destination bits 31:8 in bits 31:8.
    address_hi: u32,
    address_lo: u32,
    data: u32,
}

impl Delivery {
    /// `message` as KVM takes it when APIC IDs have 32 bits, or `None` when no local APIC would take it: the
    /// address names memory, or the vector is one of the first 16 (Intel SDM volume 3, 12.5.2).
    ///
    /// Two places carry destination bits above 7:0. A remapped message has bits 31:8 in address bits 63:40.
    /// A guest without remapping that was offered KVM_FEATURE_MSI_EXT_DEST_ID has bits 14:8 in address bits
    /// 11:5 (Documentation/virt/kvm/x86/cpuid.rst).
    fn of(message: MsiMessage) -> Option<Self> {
        const WINDOW: u64 = 0xfee0_0000;
        /// Everything above the window's 20 bits, except where a remapped destination sits.
        const WINDOW_MASK: u64 = 0x0000_00ff_fff0_0000;
        /// Delivery mode 0 or 1, the two that have a vector, and the vector's upper half.
        const VECTORED: u32 = 0x6 << 8;
        const LEGAL: u32 = 0xf0;
        let illegal = message.data & VECTORED == 0 && message.data & LEGAL == 0;
        if message.address & WINDOW_MASK != WINDOW || illegal {
            return None;
        }
        let [low, high] = halves(message.address);
        let extended = (low >> 5 & 0x7f) << 8;
        Some(Self {
            address_hi: high & 0xffff_ff00 | extended,
            address_lo: low & !0xfe0,
            data: message.data,
        })
    }

    fn route(self, gsi: u32) -> kvm_irq_routing_entry {
        sys::msi_route(gsi, self.address_hi, self.address_lo, self.data)
    }
}

/// The low and the high half.
fn halves(value: u64) -> [u32; 2] {
    let [a, b, c, d, e, f, g, h] = value.to_le_bytes();
    [u32::from_le_bytes([a, b, c, d]), u32::from_le_bytes([e, f, g, h])]
}

/// The VM's GSI routing table and who owns which number.
///
/// The kernel takes the table only as a whole. GSIs 0 to 23 are the IOAPIC's inputs for good.
#[derive(Default)]
struct RouteTable {
    routes: BTreeMap<u32, Delivery>,
    /// GSIs above the IOAPIC's that a route handle owns.
    owned: std::collections::BTreeSet<u32>,
}

impl RouteTable {
    /// The lowest free GSI above the IOAPIC's.
    fn own(&mut self) -> Option<u32> {
        let gsi = (u32::from(IOAPIC_INPUTS)..MOST_ROUTES).find(|gsi| !self.owned.contains(gsi))?;
        self.owned.insert(gsi);
        Some(gsi)
    }

    fn disown(&mut self, gsi: u32) {
        self.owned.remove(&gsi);
    }

    /// The IOAPIC's inputs that send `vector`, a bit each.
    fn pins_of(&self, vector: u8) -> u32 {
        let pins = self.routes.range(..u32::from(IOAPIC_INPUTS));
        pins.filter(|(_, delivery)| delivery.data.to_le_bytes()[0] == vector)
            .fold(0, |found, (pin, _)| found | 1 << pin)
    }

    /// The table as it would be with `gsi` sending `delivery`; `None` when that is how it is already.
    fn with(&self, gsi: u32, delivery: Option<Delivery>) -> Option<BTreeMap<u32, Delivery>> {
        if self.routes.get(&gsi).copied() == delivery {
            return None;
        }
        let mut routes = self.routes.clone();
        match delivery {
            Some(delivery) => routes.insert(gsi, delivery),
            None => routes.remove(&gsi),
        };
        Some(routes)
    }
}

/// What is asked of the kernel about interrupts.
pub(super) trait InterruptHost: Send + Sync {
    /// Have these routes and no others.
    fn set_routes(&self, routes: &KvmIrqRouting) -> io::Result<()>;

    /// Signal `gsi` for `eventfd` from now on.
    fn attach(&self, eventfd: &EventFd, gsi: u32) -> io::Result<()>;

    /// Do so no more.
    fn detach(&self, eventfd: &EventFd, gsi: u32) -> io::Result<()>;

    /// Deliver a message now.
    fn signal(&self, message: kvm_msi) -> io::Result<()>;
}

impl InterruptHost for Machine {
    fn set_routes(&self, routes: &KvmIrqRouting) -> io::Result<()> {
        self.fd.set_gsi_routing(routes).map_err(os)
    }

    fn attach(&self, eventfd: &EventFd, gsi: u32) -> io::Result<()> {
        self.fd.register_irqfd(eventfd, gsi).map_err(os)
    }

    fn detach(&self, eventfd: &EventFd, gsi: u32) -> io::Result<()> {
        self.fd.unregister_irqfd(eventfd, gsi).map_err(os)
    }

    fn signal(&self, message: kvm_msi) -> io::Result<()> {
        self.fd.signal_msi(message).map(drop).map_err(os)
    }
}

/// Delivers messages through the kernel, untranslated: the way out where no IOMMU remaps.
#[derive(Clone)]
pub struct MsiDelivery {
    host: Arc<dyn InterruptHost>,
    table: Arc<Mutex<RouteTable>>,
}

impl MsiDelivery {
    pub(super) fn new(host: Arc<dyn InterruptHost>) -> Self {
        Self {
            host,
            table: Arc::default(),
        }
    }

    fn table(&self) -> MutexGuard<'_, RouteTable> {
        self.table.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Make `gsi` send `delivery`, in one request for the whole table, or none when nothing changes.
    fn set_gsi(&self, gsi: u32, delivery: Option<Delivery>) -> Result<(), HostError> {
        let mut table = self.table();
        let Some(routes) = table.with(gsi, delivery) else {
            return Ok(());
        };
        let refused = |source| HostError::new(format!("set the {} interrupt routes", routes.len()), source);
        let entries: Vec<_> = routes
            .iter()
            .map(|(gsi, delivery)| delivery.route(*gsi))
            .collect();
        let request = KvmIrqRouting::from_entries(&entries)
            .map_err(|_| refused(std::io::ErrorKind::OutOfMemory.into()))?;
        self.host.set_routes(&request).map_err(refused)?;
        table.routes = routes;
        Ok(())
    }

    fn send(&self, message: MsiMessage) {
        let Some(delivery) = Delivery::of(message) else {
            guest_warn!(
                address = %format_args!("{:#x}", message.address),
                data = %format_args!("{:#x}", message.data),
                "an interrupt message outside 0xfee00000-0xfeefffff, or with a vector below 16, vanishes"
            );
            return;
        };
        let request = kvm_msi {
            address_lo: delivery.address_lo,
            address_hi: delivery.address_hi,
            data: delivery.data,
            ..Default::default()
        };
        // The kernel answers 0 when no processor took the message (none has that ID, or its APIC is off) and
        // EINVAL for a reserved vector or mode: both vanish on hardware too.
        if let Err(error) = self.host.signal(request) {
            guest_warn!(?message, %error, "an interrupt message that cannot be delivered vanishes");
        }
    }
}

impl MsiSink for MsiDelivery {
    fn signal(&self, _requester: &Requester, message: MsiMessage) {
        self.send(message);
    }

    fn route(&self, requester: &Arc<Requester>) -> Result<Box<dyn MsiRoute>, HostError> {
        let refused = |source| {
            HostError::new(
                format!("make an interrupt route for {}", requester.sbdf()),
                source,
            )
        };
        let eventfd = EventFd::new(vmm_sys_util::eventfd::EFD_NONBLOCK).map_err(refused)?;
        let gsi = self.table().own().ok_or_else(|| {
            refused(std::io::Error::other(format!(
                "all {MOST_ROUTES} routes are in use"
            )))
        })?;
        Ok(Box::new(Irqfd {
            delivery: self.clone(),
            eventfd,
            gsi,
            attached: Mutex::new(false),
        }))
    }
}

impl IoApicHost for MsiDelivery {
    fn signal(&self, message: MsiMessage) {
        self.send(message);
    }

    fn set_route(&self, pin: u8, message: Option<MsiMessage>) -> Result<(), HostError> {
        assert!(pin < IOAPIC_INPUTS, "the IOAPIC has inputs 0 to 23, not {pin}");
        self.set_gsi(u32::from(pin), message.and_then(Delivery::of))
    }

    fn pins_of(&self, vector: u8) -> u32 {
        self.table().pins_of(vector)
    }
}

/// An eventfd wired to a GSI of its own.
struct Irqfd {
    delivery: MsiDelivery,
    eventfd: EventFd,
    gsi: u32,
    /// Whether the kernel listens to the eventfd; held across a change so that changes do not interleave.
    attached: Mutex<bool>,
}

impl MsiRoute for Irqfd {
    fn eventfd(&self) -> &EventFd {
        &self.eventfd
    }

    fn set(&self, message: Option<MsiMessage>) -> Result<(), HostError> {
        let mut attached = self.attached.lock().unwrap_or_else(PoisonError::into_inner);
        match message.and_then(Delivery::of) {
            Some(delivery) => {
                // The route first: some kernels fault on an irqfd whose GSI has none.
                self.delivery.set_gsi(self.gsi, Some(delivery))?;
                if !*attached {
                    self.delivery
                        .host
                        .attach(&self.eventfd, self.gsi)
                        .map_err(|error| self.refused("attach", error))?;
                    *attached = true;
                }
            }
            // The route stays in the table: a vector that is masked and unmasked costs no table update.
            None if *attached => {
                self.delivery
                    .host
                    .detach(&self.eventfd, self.gsi)
                    .map_err(|error| self.refused("detach", error))?;
                *attached = false;
            }
            None => {}
        }
        Ok(())
    }
}

impl Irqfd {
    fn refused(&self, what: &str, source: io::Error) -> HostError {
        HostError::new(
            format!("{what} the eventfd of interrupt route {}", self.gsi),
            source,
        )
    }
}

impl Drop for Irqfd {
    fn drop(&mut self) {
        // In reverse: the eventfd, then its route, then the number.
        let ended = self
            .set(None)
            .and_then(|()| self.delivery.set_gsi(self.gsi, None));
        match ended {
            Ok(()) => self.delivery.table().disown(self.gsi),
            Err(error) => {
                tracing::error!(%error, source = %error.source, "an interrupt route stays in use until the guest ends")
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::platform::addr::{Bdf, Sbdf};

    fn message(address: u64) -> MsiMessage {
        MsiMessage {
            address,
            data: 0x4031,
        }
    }

    /// What a kernel was asked, in order: which GSIs have routes, and whose eventfd is listened to. It refuses the request
    /// of the number in the second.
    #[derive(Default)]
    struct Asked(Mutex<Vec<String>>, Mutex<Option<usize>>);

    impl Asked {
        fn hear(&self, what: String) -> io::Result<()> {
            let mut asked = self.0.lock().expect("no test panics in here");
            asked.push(what);
            match *self.1.lock().expect("no test panics in here") {
                Some(refused) if refused == asked.len() => Err(io::ErrorKind::OutOfMemory.into()),
                _ => Ok(()),
            }
        }

        fn take(&self) -> Vec<String> {
            std::mem::take(&mut *self.0.lock().expect("no test panics in here"))
        }
    }

    impl InterruptHost for Asked {
        fn set_routes(&self, routes: &KvmIrqRouting) -> io::Result<()> {
            let gsis: Vec<_> = routes.as_slice().iter().map(|entry| entry.gsi).collect();
            self.hear(format!("routes {gsis:?}"))
        }

        fn attach(&self, _: &EventFd, gsi: u32) -> io::Result<()> {
            self.hear(format!("attach {gsi}"))
        }

        fn detach(&self, _: &EventFd, gsi: u32) -> io::Result<()> {
            self.hear(format!("detach {gsi}"))
        }

        fn signal(&self, _: kvm_msi) -> io::Result<()> {
            self.hear("signal".to_owned())
        }
    }

    fn route_of(host: &Arc<Asked>) -> Box<dyn MsiRoute> {
        let bdf = Bdf::from_requester_id(8);
        let requester = Requester::new(Sbdf { segment: 0, bdf });
        MsiDelivery::new(host.clone())
            .route(&Arc::new(requester))
            .expect("an eventfd")
    }

    #[test]
    fn class_23_a_route_is_there_before_its_eventfd_is_listened_to_and_after_it_no_longer_is() {
        let host = Arc::new(Asked::default());
        let route = route_of(&host);
        assert_eq!(host.take(), [] as [&str; 0]);
        route.set(Some(message(0xfee0_0000))).expect("taken");
        assert_eq!(host.take(), ["routes [24]", "attach 24"]);
        // Masked and unmasked, to another destination.
        route.set(None).expect("taken");
        route.set(Some(message(0xfee0_1000))).expect("taken");
        assert_eq!(host.take(), ["detach 24", "routes [24]", "attach 24"]);
        drop(route);
        assert_eq!(host.take(), ["detach 24", "routes []"]);
    }

    #[test]
    fn class_23_an_eventfd_whose_route_is_refused_is_not_listened_to() {
        let host = Arc::new(Asked::default());
        *host.1.lock().expect("not poisoned") = Some(1);
        let route = route_of(&host);
        route.set(Some(message(0xfee0_0000))).expect_err("no memory");
        assert_eq!(host.take(), ["routes [24]"]);
        drop(route);
        assert_eq!(host.take(), [] as [&str; 0]);
    }

    #[test]
    fn class_23_a_route_whose_eventfd_stays_listened_to_stays_as_well() {
        let host = Arc::new(Asked::default());
        let route = route_of(&host);
        route.set(Some(message(0xfee0_0000))).expect("taken");
        host.take();
        *host.1.lock().expect("not poisoned") = Some(1);
        drop(route);
        assert_eq!(host.take(), ["detach 24"]);
    }

    #[test]
    fn a_plain_message_keeps_its_address() {
        let delivery = Delivery::of(message(0xfee0_3008)).expect("an interrupt message");
        assert_eq!(
            delivery,
            Delivery {
                address_hi: 0,
                address_lo: 0xfee0_3008,
                data: 0x4031
            }
        );
    }

    #[test]
    fn extended_destination_bits_move_to_the_upper_half() {
        // Destination 0x7f12: bits 7:0 in 19:12, bits 14:8 in 11:5.
        let delivery = Delivery::of(message(0xfee1_2fe0)).expect("an interrupt message");
        assert_eq!((delivery.address_hi, delivery.address_lo), (0x7f00, 0xfee1_2000));
    }

    #[test]
    fn a_remapped_destination_of_32_bits_survives() {
        let delivery = Delivery::of(message(0x1234_5600_fee7_8000)).expect("an interrupt message");
        assert_eq!(
            (delivery.address_hi, delivery.address_lo),
            (0x1234_5600, 0xfee7_8000)
        );
    }

    #[test]
    fn a_logical_destination_stays_logical_and_an_nmi_keeps_its_mode() {
        // Destination mode is bit 2 of the lower half; a cluster and its members are all 32 bits.
        let logical =
            Delivery::of(MsiMessage::remapped(0x0012_0003, true, 0x177)).expect("an interrupt message");
        let expected = Delivery {
            address_hi: 0x0012_0000,
            address_lo: 0xfee0_3004,
            data: 0x177,
        };
        assert_eq!(logical, expected);
        let nmi = MsiMessage {
            address: 0xfee0_3000,
            data: 4 << 8,
        };
        let expected = Delivery {
            address_hi: 0,
            address_lo: 0xfee0_3000,
            data: 0x400,
        };
        assert_eq!(Delivery::of(nmi), Some(expected));
    }

    #[test]
    fn what_names_memory_is_no_interrupt() {
        for address in [
            0,
            0xfed0_0000,
            0xfef0_0000,
            0x1_fee0_0000,
            0xff_fee0_0000,
            0xfe00_0000,
        ] {
            assert_eq!(Delivery::of(message(address)), None, "{address:#x}");
        }
    }

    #[test]
    fn a_vector_that_processors_reserve_is_no_interrupt_and_an_nmi_needs_none() {
        let with = |data| {
            Delivery::of(MsiMessage {
                data,
                ..message(0xfee0_0000)
            })
        };
        for data in [0, 0xf, 0x10f, 0xc00f] {
            assert_eq!(with(data), None, "{data:#x}");
        }
        for data in [0x10, 0x110, 0x400, 0x200, 0x500] {
            assert!(with(data).is_some(), "{data:#x}");
        }
    }

    #[test]
    fn route_numbers_begin_above_the_ioapic_and_are_given_again() {
        let mut table = RouteTable::default();
        assert_eq!((table.own(), table.own()), (Some(24), Some(25)));
        table.disown(24);
        assert_eq!(table.own(), Some(24));
    }

    #[test]
    fn the_table_ends_where_the_kernels_does() {
        let mut table = RouteTable::default();
        let given = std::iter::from_fn(|| table.own()).count();
        assert_eq!(given, 4096 - 24);
    }

    #[test]
    fn an_ended_vector_is_that_of_every_input_that_sends_it() {
        let mut table = RouteTable::default();
        for gsi in [4, 9, 24] {
            table.routes = table
                .with(gsi, Delivery::of(message(0xfee0_0000)))
                .expect("a change");
        }
        assert_eq!(table.pins_of(0x31), 1 << 4 | 1 << 9);
        assert_eq!(table.pins_of(0x41), 0);
    }

    #[test]
    fn a_route_that_is_in_force_changes_nothing() {
        let mut table = RouteTable::default();
        let delivery = Delivery::of(message(0xfee0_0000));
        table.routes = table.with(30, delivery).expect("a change");
        assert!(table.with(30, delivery).is_none());
        assert!(table.with(31, None).is_none());
        assert_eq!(table.with(30, None), Some(BTreeMap::new()));
    }
}
