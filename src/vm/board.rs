//! The board: buses, the devices at fixed places, and what must be reset with the machine.

use std::sync::Arc;
use std::time::Duration;

use super::RunError;
use super::boot::acpi;
use super::events::EventLoop;
use super::layout;
use super::plan::{CharBackend, Plan};
use crate::devices::Device;
use crate::devices::character::HostEnd;
use crate::devices::clock::{Clock, Expire, HostAlarm, HostClock};
use crate::devices::exit_port::{self, EXIT_PORT, ExitPort};
use crate::devices::hpet::Hpet;
use crate::devices::ioapic::IoApic;
use crate::devices::milestone::{MILESTONE_PORT, Milestone};
use crate::devices::power::{PM1A_PORT, PM1A_PORTS, Power, SCI_GSI};
use crate::devices::pvpanic::{PVPANIC_PORT, Pvpanic};
use crate::devices::request::RequestQueue;
use crate::devices::reset::{CONFIG_PORTS, CONFIG_PORTS_LEN, ConfigPortsWithReset, ResetRegister};
use crate::devices::rtc::wire::ClockWire;
use crate::devices::rtc::{RTC_GSI, RTC_PORT, RTC_PORTS, Rtc};
use crate::devices::serial::{self, COM1_GSI, COM1_PORT, Serial};
use crate::pci::config_ports::ConfigPorts;
use crate::pci::ecam::Ecam;
use crate::pci::topology::Topology;
use crate::platform::addr::GpaRange;
use crate::platform::bus::{Bus, BusDevice, Claim, ClaimError};
use crate::platform::host::HostError;
use crate::platform::irq::{InterruptController, IoApicHost, IrqLine};

/// The buses and the devices at fixed addresses.
pub(super) struct Board {
    /// Who has which port.
    pub(super) ports: Arc<Bus>,
    /// Who has which physical address.
    pub(super) mmio: Arc<Bus>,
    /// The interrupt controller.
    pub(super) ioapic: Arc<IoApic>,
    clock: Arc<dyn Clock>,
    requests: Arc<RequestQueue>,
    devices: Vec<Arc<dyn Device>>,
    config_ports: Option<Arc<ConfigPorts>>,
    power: Option<Arc<Power>>,
    milestone: Option<Arc<Milestone>>,
    claims: Vec<Claim>,
}

impl Board {
    /// A board with empty buses and an IOAPIC, whose messages `host` delivers. Devices ask `requests`.
    pub(super) fn new(
        host: Arc<dyn IoApicHost>,
        requests: Arc<RequestQueue>,
        events: &mut EventLoop,
    ) -> Result<Self, RunError> {
        let clock: Arc<dyn Clock> = Arc::new(HostClock);
        let alarm = HostAlarm::new()?;
        let ioapic = IoApic::new(acpi::IOAPIC_ID, host, clock.clone(), alarm.clone());
        let expires: Arc<dyn Expire> = ioapic.clone();
        events.add(alarm.calls(expires));
        let mut board = Self {
            ports: Bus::ports(),
            mmio: Bus::mmio(),
            ioapic: ioapic.clone(),
            clock,
            requests,
            devices: Vec::new(),
            config_ports: None,
            power: None,
            milestone: None,
            claims: Vec::new(),
        };
        let mmio = board.mmio.clone();
        board.place(&mmio, layout::IOAPIC.start().0, layout::IOAPIC.len(), ioapic)?;
        Ok(board)
    }

    /// A wire to input `gsi` of the IOAPIC.
    pub(super) fn wire(&self, gsi: u32) -> IrqLine {
        let controller: Arc<dyn InterruptController> = self.ioapic.clone();
        IrqLine::new(controller, gsi)
    }

    /// Open what a stream of characters of `device` is connected to.
    pub(super) fn connect(
        &self,
        device: &str,
        to: &CharBackend,
        events: &mut EventLoop,
    ) -> Result<Arc<HostEnd>, HostError> {
        let end = to.open(&self.requests)?;
        tracing::info!(device, at = end.place(), "a console is connected");
        events.add(end.clone());
        Ok(end)
    }

    /// Add the devices that `plan` has on the board itself.
    pub(super) fn populate(&mut self, plan: &Plan, events: &mut EventLoop) -> Result<(), RunError> {
        let ports = self.ports.clone();

        let console = self.connect("the serial port", &plan.serial, events)?;
        let serial = Serial::new(console, self.wire(COM1_GSI));
        self.place(&ports, COM1_PORT, serial::PORTS, serial)?;

        let power = Power::new(self.wire(SCI_GSI), self.requests.clone());
        self.place(&ports, PM1A_PORT, PM1A_PORTS, power.clone())?;
        self.power = Some(power.clone());

        let clock_wire = ClockWire::new(self.ioapic.clone(), power);
        let alarm = HostAlarm::new()?;
        let line = IrqLine::new(clock_wire.clone(), RTC_GSI);
        let rtc = Rtc::new(line, self.clock.clone(), alarm.clone());
        let expires: Arc<dyn Expire> = rtc.clone();
        events.add(alarm.calls(expires));
        self.place(&ports, RTC_PORT, RTC_PORTS, rtc)?;

        let milestone = Milestone::new(self.clock.clone());
        self.place(&ports, MILESTONE_PORT, 1, milestone.clone())?;
        self.milestone = Some(milestone);

        if plan.board.hpet {
            let alarm = HostAlarm::new()?;
            let hpet = Hpet::new(self.ioapic.clone(), clock_wire, self.clock.clone(), alarm.clone());
            let expires: Arc<dyn Expire> = hpet.clone();
            events.add(alarm.calls(expires));
            let mmio = self.mmio.clone();
            self.place(&mmio, layout::HPET.start().0, layout::HPET.len(), hpet)?;
        }
        if plan.board.pvpanic {
            self.place(&ports, PVPANIC_PORT, 1, Pvpanic::new(self.requests.clone()))?;
        }
        if plan.board.exit_port {
            let exit = ExitPort::new(self.requests.clone());
            self.place(&ports, EXIT_PORT, exit_port::PORTS, exit)?;
        }
        Ok(())
    }

    /// Make configuration space reachable: each segment's ECAM, and the configuration ports with the reset
    /// register between them.
    pub(super) fn open_config_space(
        &mut self,
        plan: &Plan,
        topology: &Arc<Topology>,
    ) -> Result<(), RunError> {
        for segment in &plan.pci.segments {
            let ecam = Arc::new(Ecam::new(topology.clone(), segment.number));
            let name = format!("ecam{}", segment.number);
            let at = segment.ecam;
            self.claims
                .push(self.mmio.claim(name, at.start().0, at.len(), ecam)?);
        }
        let reset = ResetRegister::new(self.requests.clone());
        let config = Arc::new(ConfigPorts::new(topology.clone()));
        let both = Arc::new(ConfigPortsWithReset {
            config: config.clone(),
            reset: reset.clone(),
        });
        let claim = self
            .ports
            .claim("pci-config", CONFIG_PORTS, CONFIG_PORTS_LEN, both)?;
        self.claims.push(claim);
        self.config_ports = Some(config);
        self.devices.push(reset);
        Ok(())
    }

    /// All devices as after power-on. No processor runs.
    pub(super) fn reset(&self) {
        for device in &self.devices {
            device.reset();
        }
        if let Some(config) = &self.config_ports {
            config.reset();
        }
    }

    /// Ask the guest to shut down. `false` when it does not listen.
    pub(super) fn press_power_button(&self) -> bool {
        self.power.as_ref().is_some_and(|power| power.press_button())
    }

    /// How long ago the guest's init reached its first instruction, if it has.
    pub(super) fn since_init(&self) -> Option<Duration> {
        let reached = self.milestone.as_ref()?.init_reached()?;
        Some(self.clock.monotonic().saturating_sub(reached))
    }

    /// Give `range` to `device`, which is reset by whoever owns it.
    pub(super) fn claim_mmio(
        &mut self,
        name: &str,
        range: GpaRange,
        device: Arc<dyn BusDevice>,
    ) -> Result<(), ClaimError> {
        let claim = self.mmio.claim(name, range.start().0, range.len(), device)?;
        self.claims.push(claim);
        Ok(())
    }

    fn place<D: BusDevice + Device + 'static>(
        &mut self,
        bus: &Arc<Bus>,
        start: u64,
        len: u64,
        device: Arc<D>,
    ) -> Result<(), ClaimError> {
        self.claims
            .push(bus.claim(device.name(), start, len, device.clone())?);
        self.devices.push(device);
        Ok(())
    }
}
