//! A PCI function of the host, passed through to the guest.
//!
//! The guest's view of configuration space, BARs and interrupts is ours (`survey`, `bar`, `interrupts`); its
//! accesses to the device's memory and the device's requests and messages are the hardware's own. The device reaches
//! guest RAM, memory of other functions of the host that the guest has, and nothing else: its requests pass the host's
//! IOMMU, and it is attached to an address space before it is part of a machine.
//!
//! The device decodes its BARs from the beginning to the end, so that no access of the guest's can meet a device that
//! does not answer; whether the guest reaches them is decided by what is mapped for it. It may issue requests while
//! the guest's Bus Master Enable, and that of every port above, says so.

mod bar;
pub mod cdev;
mod config;
pub mod group;
pub mod host;
pub mod hot_reset;
mod interrupts;
pub mod lent;
mod notices;
mod peers;
mod survey;
#[cfg(any(test, fuzzing))]
pub mod testing;
#[cfg(test)]
mod tests;
mod uapi;

use std::io;
use std::os::fd::RawFd;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use crate::devices::ioapic::Resample;
use crate::iommu::iommufd::{Attach, Ioas};
use crate::pci::access::{DwordWrite, read_dwords, write_dwords};
use crate::pci::bar::{BarSpec, Bars};
use crate::pci::tree::{BarKind, Identity, Pin};
use crate::pci::{CONFIG_DWORDS, Command, ConfigEffect, Function};
use crate::platform::addr::Gpa;
use crate::platform::device_memory::DeviceMemoryHost;
use crate::platform::dma::Requester;
use crate::platform::host::HostError;
use crate::platform::irq::IrqLine;
use crate::platform::msi::MsiPort;
use crate::{guest_info, guest_warn};

use bar::MappedBar;
use config::{ConfigTable, Forward};
use host::{HostFunction, Interrupt, Notice, Region};
use hot_reset::HotResetMember;
use interrupts::{Interrupts, Structure, structure_at, trapped};
use lent::Lent;
use notices::Notices;
use peers::Peers;
use survey::{BARS, BARS_END, COMMAND, D3_HOT, Given, INITIATE_FLR, Image, MsiPlace, MsixPlace, POWER_STATE};

/// What a passed function is made of.
pub struct VfioParts {
    /// What messages call it.
    pub name: String,
    /// The function, attached to the guest's RAM.
    pub host: Arc<Lent>,
    /// Others that the host can reset only with it, or it only with them.
    pub reset_with: Option<HotResetMember>,
    /// The address space it is attached to.
    pub space: Arc<Ioas>,
    /// Others are attached to that, too, which are to reach the function's memory.
    pub has_peers: bool,
    /// How the guest knows it.
    pub identity: Identity,
    /// Its BARs as planned.
    pub bars: Vec<BarSpec>,
    /// What puts its memory where the guest has it.
    pub memory: Arc<dyn DeviceMemoryHost>,
    /// The way out for messages, and whose they are.
    pub msi: MsiPort,
    /// The wire, if there is one.
    pub intx: Option<(Pin, IrqLine)>,
    /// On a root complex's first bus, not behind a port.
    pub on_root_bus: bool,
}

/// A passed function.
pub struct VfioFunction {
    name: String,
    host: Arc<Lent>,
    reset_with: Option<HotResetMember>,
    memory: Arc<dyn DeviceMemoryHost>,
    requester: Arc<Requester>,
    bars: Vec<BarSpec>,
    mapped: Vec<MappedBar>,
    /// Other functions of the host, if there are any.
    peers: Option<Peers>,
    interrupts: Interrupts,
    notices: Notices,
    power: Option<u16>,
    device_control: Option<u16>,
    msi: Option<MsiPlace>,
    msix: Option<MsixPlace>,
    registers: Mutex<Registers>,
    /// The device may issue requests.
    open: AtomicBool,
    /// It has an error, and issues none until it is reset, whatever the guest lets it. Known to those it is reset with.
    contained: Arc<AtomicBool>,
    /// It left, and answers nothing any more.
    gone: AtomicBool,
    /// What it is attached to; goes after the function.
    _space: Arc<Ioas>,
}

struct Registers {
    table: ConfigTable,
    bars: Bars,
}

impl VfioFunction {
    /// The function that `parts` say, not decoding and silent.
    ///
    /// # Errors
    /// When the device does not answer, is not what was planned, or the host refuses something.
    pub fn new(parts: VfioParts) -> Result<Arc<Self>, HostError> {
        let VfioParts { name, host, .. } = parts;
        let image = read_image(&name, &*host)?;
        let mut sizes = [0; 6];
        let mut decodes = Command::empty();
        let mut bars = Bars::default();
        for spec in &parts.bars {
            let size = host.region(Region::Bar(spec.index)).size;
            if size != spec.size {
                let reason = format!(
                    "the host has {size:#x} bytes there, {:#x} were planned",
                    spec.size
                );
                let action = format!("pass BAR {} of {name} through", spec.index);
                return Err(HostError::new(action, io::Error::other(reason)));
            }
            if let (Some(slot), false) = (sizes.get_mut(usize::from(spec.index)), spec.kind == BarKind::Io) {
                *slot = size;
            }
            decodes |= spec.address_space();
            bars.add(*spec);
        }
        // Silent before anything is tried with it, whoever opened it.
        write_command(&*host, &parts.bars, false)
            .map_err(|source| HostError::new(format!("switch the BARs of {name} on"), source))?;
        let (pin, line) = parts.intx.unzip();
        let given = Given {
            identity: parts.identity,
            decodes,
            pin: pin.filter(|_| host.interrupt(Interrupt::Intx).count > 0),
            on_root_bus: parts.on_root_bus,
            resets: host.resets(),
            msi: interrupts::messages(&name, &*host)?,
            msix: host.interrupt(Interrupt::Msix).count,
            bars: sizes,
        };
        let survey = survey::survey(&image, &given);
        let peers = parts
            .has_peers
            .then(|| Peers::new(name.clone(), parts.space.clone()));
        let mapped = parts
            .bars
            .iter()
            .map(|spec| {
                let trapped = trapped(survey.msix, spec.index);
                MappedBar::new(&name, &*host, spec, &trapped, peers.as_ref())
            })
            .collect();
        let places = (survey.msi, survey.msix);
        let interrupts = Interrupts::new(&name, host.clone(), parts.msi.clone(), places, line)?;
        let notices = Notices::new(&name, &*host)?;
        if !host.resets() && parts.reset_with.is_none() {
            tracing::warn!(
                name,
                "the host cannot reset this function: what one guest leaves in it the next finds"
            );
        }
        let contained = parts.reset_with.as_ref().map(HotResetMember::contained);
        let function = Self {
            name,
            host,
            reset_with: parts.reset_with,
            memory: parts.memory,
            requester: parts.msi.requester().clone(),
            bars: parts.bars,
            mapped,
            peers,
            interrupts,
            notices,
            power: survey.power,
            device_control: survey.device_control,
            msi: survey.msi,
            msix: survey.msix,
            registers: Mutex::new(Registers {
                table: survey.table,
                bars,
            }),
            open: AtomicBool::new(false),
            contained: contained.unwrap_or_default(),
            gone: AtomicBool::new(false),
            _space: parts.space,
        };
        function.interrupts.follow(&function.registers().table);
        Ok(Arc::new(function))
    }

    /// What the host signals of this function: [`VfioFunction::signalled`] is to be called when one of them is
    /// readable.
    #[must_use]
    pub fn descriptors(&self) -> Vec<RawFd> {
        let wire = self.interrupts.wire().into_iter();
        wire.chain(self.notices.descriptors()).collect()
    }

    /// The host's wire may have interrupted, or the host has something to say.
    pub fn signalled(&self) -> Vec<Notice> {
        self.interrupts.wire_interrupted();
        self.notices.take()
    }

    /// The device has an error: it issues no request any more until it is reset, whatever the guest lets it.
    pub fn contain(&self) {
        self.contained.store(true, Ordering::Release);
        self.open.store(false, Ordering::Release);
        if let Err(error) = self.write_command(false) {
            guest_warn!(name = self.name, %error, "the function does not take Bus Master Enable");
        }
        if !self.host.resets() && self.reset_with.is_none() {
            guest_warn!(
                name = self.name,
                "the host cannot reset this function: its requests stay stopped as long as the guest has it"
            );
        }
    }

    /// The guest finds nothing here from now on: all ones.
    pub fn leave(&self) {
        self.gone.store(true, Ordering::Release);
    }

    /// Silence, reset and detach the device, and let the host have it. Nobody reaches its BARs any more.
    pub fn give_back(&self) {
        if self.host.is_returned() {
            return;
        }
        // What is left of mappings goes first: the guest's, then ours, which would keep the function open.
        self.mapped.iter().for_each(MappedBar::unmap);
        self.interrupts.off();
        let silenced = self.write_command(false);
        // Functions that are reset together the kernel resets when the last of them is closed.
        let reset = if self.host.resets() {
            self.host.reset()
        } else {
            Ok(())
        };
        match silenced.and(reset) {
            Ok(()) => (),
            Err(error) if self.is_locked(&error) => (),
            Err(error) => {
                tracing::warn!(name = self.name, %error, "the host does not reset the function; closing it does");
            }
        }
        if let Some(member) = &self.reset_with {
            member.left();
        }
        if let Err(error) = self.host.detach() {
            tracing::warn!(name = self.name, %error, "the host does not detach the function; closing it does");
        }
        self.host.give_back();
    }

    /// Whether `error` of a reset means that somebody on the host holds the device's lock, as the kernel does while it takes
    /// the function back, and then resets it for nobody. Said in the log; a silent device is all there is to be had.
    fn is_locked(&self, error: &io::Error) -> bool {
        let is = error.kind() == io::ErrorKind::WouldBlock;
        if is {
            guest_info!(
                name = self.name,
                "the function is locked, as while the host takes it back, and not reset: it is silenced only"
            );
        }
        is
    }

    /// The device as after power-on, as far as the host can do that now. Whether a reset came: one that waits for others,
    /// or that the host cannot reset, is silent only.
    fn reset_device(&self) -> io::Result<bool> {
        // The host ends what others have mapped of it by itself; here it goes in order, copies first.
        self.mapped.iter().for_each(MappedBar::withdraw);
        // No request of before the reset is under way after it.
        self.open.store(false, Ordering::Release);
        let silenced = self.write_command(false);
        let reset = if self.host.resets() {
            self.host.reset()
        } else {
            Ok(())
        };
        let together = self
            .reset_with
            .as_ref()
            .map_or(Ok(false), |member| member.silenced(&*self.host));
        match &together {
            Ok(true) => guest_info!(
                name = self.name,
                "the host has reset the functions that it can only reset together"
            ),
            Ok(false) if self.reset_with.is_some() => guest_info!(
                name = self.name,
                "the function is silent until those that the host can only reset with it are reset, too"
            ),
            Ok(false) | Err(_) => (),
        }
        // The host puts registers back as they were; whether it does that with every reset, nobody has to know.
        let decoding = self.write_command(false);
        self.share();
        let together = silenced.and(reset).and(together)?;
        decoding.map(|()| together || self.host.resets())
    }

    /// Have other functions reach the memory of this one where the guest has it.
    fn share(&self) {
        if let Some(peers) = &self.peers {
            self.mapped.iter().for_each(|bar| bar.share(peers));
        }
    }

    fn registers(&self) -> MutexGuard<'_, Registers> {
        self.registers.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Dword number `dword` of the device; all ones when it does not answer.
    fn device_dword(&self, dword: u16) -> u32 {
        let mut bytes = [0xff; 4];
        self.device_read(Region::Config, u64::from(dword) * 4, &mut bytes);
        u32::from_le_bytes(bytes)
    }

    fn device_read(&self, region: Region, offset: u64, data: &mut [u8]) {
        if let Err(error) = self.host.read(region, offset, data) {
            data.fill(0xff);
            guest_warn!(name = self.name, ?region, offset, %error, "the function does not answer a read");
        }
    }

    fn device_write(&self, region: Region, offset: u64, data: &[u8]) {
        if let Err(error) = self.host.write(region, offset, data) {
            guest_warn!(name = self.name, ?region, offset, %error, "the function does not take a write");
        }
    }

    /// Let the device hear of a write to its configuration space.
    fn forward(&self, dword: u16, forward: Forward) {
        let old = self.device_dword(dword);
        for (lane, bytes) in forward.pieces(old) {
            self.device_write(Region::Config, u64::from(dword) * 4 + lane as u64, &bytes);
        }
    }

    /// The device decodes, and issues requests or not.
    fn write_command(&self, bus_master: bool) -> io::Result<()> {
        write_command(&*self.host, &self.bars, bus_master)
    }

    /// What a write to `dword`, which our bits followed from `old`, sets off.
    fn effect(&self, registers: &mut Registers, dword: u16, old: u32, write: DwordWrite) -> ConfigEffect {
        let new = registers.table.value(dword);
        let mut effect = ConfigEffect::empty();
        if dword == COMMAND {
            let changed = Command::of_dword(old ^ new);
            let decoding = Command::IO | Command::MEMORY | Command::BUS_MASTER;
            effect.set(ConfigEffect::DECODING, changed.intersects(decoding));
            effect.set(ConfigEffect::INTERRUPTS, changed.contains(Command::INTX_DISABLE));
        }
        if self.power == Some(dword) && old != new {
            if matches!(new & POWER_STATE, 0 | D3_HOT) {
                effect |= ConfigEffect::DECODING;
            } else {
                // A write of a state that is not supported is discarded (PCI Express Base Specification 7.5.2.2).
                registers.table.restore(dword, old);
            }
        }
        if self.device_control == Some(dword) && self.host.resets() && write.ones(INITIATE_FLR) != 0 {
            effect |= ConfigEffect::FUNCTION_RESET;
        }
        let in_msi = self
            .msi
            .is_some_and(|place| (place.dword..place.end()).contains(&dword));
        let in_msix = self.msix.is_some_and(|place| place.dword == dword);
        effect.set(
            ConfigEffect::INTERRUPTS,
            effect.contains(ConfigEffect::INTERRUPTS) || (in_msi || in_msix) && old != new,
        );
        effect
    }

    fn command_of(&self, registers: &Registers) -> Command {
        let command = Command::of_dword(registers.table.value(COMMAND));
        let asleep = self
            .power
            .is_some_and(|dword| registers.table.value(dword) & POWER_STATE == D3_HOT);
        if asleep {
            command - (Command::IO | Command::MEMORY | Command::BUS_MASTER)
        } else {
            command
        }
    }

    /// Whether any of `len` bytes at `offset` of BAR `bar` are the MSI-X table or its pending bits.
    fn is_trapped(&self, bar: u8, offset: u64, len: usize) -> Option<MsixPlace> {
        let end = offset.saturating_add(len as u64);
        let overlaps = trapped(self.msix, bar)
            .iter()
            .any(|range| range.start < end && offset < range.end);
        self.msix.filter(|_| overlaps)
    }
}

/// Have `host` decode `bars`, and issue requests or not.
fn write_command(host: &dyn HostFunction, bars: &[BarSpec], bus_master: bool) -> io::Result<()> {
    const AT: u64 = COMMAND as u64 * 4;
    let mut bytes = [0; 2];
    host.read(Region::Config, AT, &mut bytes)?;
    let mut command = Command::from_bits_retain(u16::from_le_bytes(bytes));
    for bar in bars {
        command |= bar.address_space();
    }
    command.set(Command::BUS_MASTER, bus_master);
    host.write(Region::Config, AT, &command.bits().to_le_bytes())
}

/// Read configuration space once: 4 KiB, or what there is of it.
fn read_image(name: &str, host: &dyn HostFunction) -> Result<Image, HostError> {
    let whole = u64::from(CONFIG_DWORDS) * 4;
    let len = host.region(Region::Config).size.min(whole);
    let mut bytes = vec![0; usize::try_from(len).expect("4096 at most")];
    let refused = |source| HostError::new(format!("read the configuration space of {name}"), source);
    host.read(Region::Config, 0, &mut bytes).map_err(refused)?;
    let (dwords, _) = bytes.as_chunks::<4>();
    let image: Vec<u32> = dwords.iter().map(|dword| u32::from_le_bytes(*dword)).collect();
    // The IDs of a virtual function read all ones, its class does not.
    match image.get(2) {
        None => Err(refused(io::Error::other(format!(
            "it has {len} bytes; a header has 64"
        )))),
        Some(&u32::MAX) => Err(refused(io::Error::other(
            "it answers all ones: the device is gone or off",
        ))),
        Some(_) => Ok(Image(image)),
    }
}

impl Function for VfioFunction {
    fn name(&self) -> &str {
        &self.name
    }

    fn config_read(&self, dword: u16) -> u32 {
        if !self.is_present() {
            return u32::MAX;
        }
        if (BARS..BARS_END).contains(&dword) {
            let [index, _] = (dword - BARS).to_le_bytes();
            return self.registers().bars.read(index);
        }
        if self.msi.and_then(MsiPlace::pending) == Some(dword) {
            return self.interrupts.read_msi_pending();
        }
        self.registers().table.read(dword, || self.device_dword(dword))
    }

    fn config_write(&self, dword: u16, write: DwordWrite) -> ConfigEffect {
        let mut registers = self.registers();
        if !self.is_present() {
            return ConfigEffect::empty();
        }
        if (BARS..BARS_END).contains(&dword) {
            let [index, _] = (dword - BARS).to_le_bytes();
            let changed = registers.bars.write(index, write);
            let decodes = self
                .command_of(&registers)
                .intersects(Command::IO | Command::MEMORY);
            return if changed && decodes {
                ConfigEffect::DECODING
            } else {
                ConfigEffect::empty()
            };
        }
        let old = registers.table.value(dword);
        let forward = registers.table.write(dword, write);
        let effect = self.effect(&mut registers, dword, old, write);
        if let Some(forward) = forward {
            self.forward(dword, forward);
        }
        if effect.contains(ConfigEffect::INTERRUPTS) {
            self.interrupts.follow(&registers.table);
        }
        effect
    }

    fn requester(&self) -> &Arc<Requester> {
        &self.requester
    }

    fn bars(&self) -> &[BarSpec] {
        &self.bars
    }

    fn command(&self) -> Command {
        if !self.is_present() {
            return Command::empty();
        }
        self.command_of(&self.registers())
    }

    fn is_present(&self) -> bool {
        !self.gone.load(Ordering::Acquire)
    }

    fn bus_mastering(&self, allowed: bool) {
        let contained = || self.contained.load(Ordering::Acquire);
        // One with an error is not used, whatever the guest lets it: if it waits for a reset, it goes on waiting.
        let open = allowed && !contained();
        if self.open.swap(open, Ordering::AcqRel) == open {
            return;
        }
        if let (true, Some(member)) = (open, &self.reset_with)
            && member.used()
        {
            // It was reset with the last of the others, which ended what these had mapped of it.
            self.share();
        }
        let mut written = self.write_command(open);
        if open && contained() {
            // The error came in between.
            self.open.store(false, Ordering::Release);
            written = self.write_command(false);
        }
        if let Err(error) = written {
            guest_warn!(name = self.name, allowed, %error, "the function does not take Bus Master Enable");
        }
    }

    fn bar_read(&self, bar: u8, offset: u64, data: &mut [u8]) {
        if !self.is_present() {
            return data.fill(0xff);
        }
        let Some(place) = self.is_trapped(bar, offset, data.len()) else {
            return self.device_read(Region::Bar(bar), offset, data);
        };
        read_dwords(offset, data, |dword| match structure_at(place, bar, dword * 4) {
            Some((Structure::Table, index)) => self.interrupts.read_table(index),
            Some((Structure::Pending, index)) => self.interrupts.read_pending(index),
            None => {
                let mut bytes = [0xff; 4];
                self.device_read(Region::Bar(bar), dword * 4, &mut bytes);
                u32::from_le_bytes(bytes)
            }
        });
    }

    fn bar_write(&self, bar: u8, offset: u64, data: &[u8]) {
        if !self.is_present() {
            return;
        }
        let Some(place) = self.is_trapped(bar, offset, data.len()) else {
            return self.device_write(Region::Bar(bar), offset, data);
        };
        // Beside the structures, in the same access, nothing is written: no driver means to.
        write_dwords(offset, data, |dword, write| {
            if let Some((Structure::Table, index)) = structure_at(place, bar, dword * 4) {
                self.interrupts.write_table(index, write);
            }
        });
    }

    fn bar_moved(&self, bar: u8, at: Option<Gpa>) {
        if let Some(mapped) = self.mapped.iter().find(|mapped| mapped.index == bar) {
            mapped.moved(&self.name, &*self.memory, self.peers.as_ref(), at);
        }
    }

    fn reset(&self) {
        let mut registers = self.registers();
        self.interrupts.off();
        if self.is_present() {
            match self.reset_device() {
                Ok(true) => self.contained.store(false, Ordering::Release),
                Ok(false) => (),
                Err(error) if self.is_locked(&error) => (),
                Err(error) => {
                    guest_warn!(name = self.name, %error, "the host does not reset the function");
                }
            }
        }
        registers.table.reset();
        registers.bars.reset();
        if self.is_present() {
            self.interrupts.follow(&registers.table);
        }
    }
}

impl Resample for VfioFunction {
    fn interrupt_ended(&self) {
        self.interrupts.wire_ended();
    }
}

impl Drop for VfioFunction {
    fn drop(&mut self) {
        self.give_back();
    }
}
