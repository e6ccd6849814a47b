//! A host function's interrupts on their way to the guest.
//!
//! A message goes from the device by an eventfd straight to the kernel's route: nothing here runs then. What runs here
//! is the guest's programming. A vector that the guest masks keeps its eventfd, which counts what it owes; its route
//! is off, and the kernel delivers what was counted when it is on again.
//!
//! A route comes first, then its eventfd, then the device signals it; back in reverse.
//!
//! A wire is a level. The host masks it when it interrupts; the event loop asserts our wire then, and once the guest
//! has ended the interrupt, the wire is released and the host's unmasked, which interrupts again if it still asserts.

use std::ops::Range;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::config::ConfigTable;
use super::host::{Fewer, HostFunction, Interrupt};
use super::survey::{COMMAND, MsiPlace, MsixPlace};
use crate::guest_warn;
use crate::pci::Command;
use crate::pci::access::DwordWrite;
use crate::pci::capability::MsixTable;
use crate::platform::host::HostError;
use crate::platform::irq::IrqLine;
use crate::platform::msi::{MsiMessage, MsiPort, MsiRoute};

/// Interrupts of one function.
pub(super) struct Interrupts {
    name: String,
    host: Arc<dyn HostFunction>,
    port: MsiPort,
    msi: Option<MsiPlace>,
    msix: Option<MsixPlace>,
    /// What the host signals for its wire.
    wire: Option<EventFd>,
    state: Mutex<State>,
}

struct State {
    /// What the device uses now, which the host has set up; `None` when it may not interrupt.
    on: Option<Interrupt>,
    /// What the device is still set up for, because the host refused to switch it off. Nothing is `on` as long.
    left: Option<Interrupt>,
    /// Of the kind in use, as many as the host has.
    vectors: Vec<Vector>,
    /// Of MSI in use, how many vectors the guest allotted.
    allotted: u32,
    msix: Option<MsixTable>,
    line: Option<IrqLine>,
}

/// One message of the kind in use.
#[derive(Default)]
struct Vector {
    route: Option<Box<dyn MsiRoute>>,
    /// What the route sends now.
    sends: Option<MsiMessage>,
    /// The device signals the route's eventfd.
    signalled: bool,
}

/// How many messages of MSI `host` has to give for the function called `name`: a power of two, or 0 for none.
///
/// The host repeats what the capability says when it is asked how many there are (VFIO_DEVICE_GET_IRQ_INFO). What it has shows
/// when they are asked for: without interrupt remapping that is one. A guest that saw more would wait for vectors that
/// never come. Nothing of the function may be on yet, and nothing is afterwards.
///
/// # Errors
/// When the host does not switch off again what it gave.
pub(super) fn messages(name: &str, host: &dyn HostFunction) -> Result<u32, HostError> {
    let claims = host.interrupt(Interrupt::Msi).count.min(MOST_MESSAGES);
    let Some(claims) = claims.checked_ilog2().map(|log| 1 << log) else {
        return Ok(0);
    };
    let mut count: u32 = claims;
    while let Err(error) = host.set_interrupts(Interrupt::Msi, 0, &none(count)) {
        // Less each time. An answer that is none leaves the least there is to ask for.
        count = match Fewer::of(&error) {
            Some(Fewer { has, .. }) if (1..count).contains(&has) => 1 << has.ilog2(),
            _ if count > 1 => 1,
            _ => {
                tracing::warn!(name, %error, "the host gives no MSI of the function; the guest does not see that it has any");
                return Ok(0);
            }
        };
    }
    host.disable_interrupts(Interrupt::Msi).map_err(|source| {
        let action =
            format!("switch MSI of {name} off again, which was on to see how many vectors there are");
        HostError::new(action, source)
    })?;
    if count < claims {
        tracing::info!(
            name,
            claims,
            count,
            "the host has fewer vectors of MSI than the function; the guest sees what there is"
        );
    }
    Ok(count)
}

/// Vectors of MSI at most (PCI Express Base Specification 7.7.1.2).
const MOST_MESSAGES: u32 = 32;

/// `count` vectors that nobody listens to.
fn none(count: u32) -> Vec<Option<&'static EventFd>> {
    (0..count).map(|_| None).collect()
}

impl Interrupts {
    /// All off. Messages leave by `port`, the wire is `line`.
    pub(super) fn new(
        name: &str,
        host: Arc<dyn HostFunction>,
        port: MsiPort,
        (msi, msix): (Option<MsiPlace>, Option<MsixPlace>),
        line: Option<IrqLine>,
    ) -> Result<Self, HostError> {
        let line = line.filter(|_| host.interrupt(Interrupt::Intx).count > 0);
        let wire = line.as_ref().map(|_| EventFd::new(EFD_NONBLOCK)).transpose();
        let wire = wire.map_err(|source| HostError::new(format!("make an eventfd for {name}"), source))?;
        Ok(Self {
            name: name.to_owned(),
            host,
            port,
            msi,
            msix,
            wire,
            state: Mutex::new(State {
                on: None,
                left: None,
                vectors: Vec::new(),
                allotted: 0,
                msix: msix.map(|place| MsixTable::new(place.vectors)),
                line,
            }),
        })
    }

    /// What the host signals for its wire, to be watched by the event loop.
    pub(super) fn wire(&self) -> Option<RawFd> {
        self.wire.as_ref().map(AsRawFd::as_raw_fd)
    }

    /// The host's wire interrupted.
    pub(super) fn wire_interrupted(&self) {
        let Some(wire) = &self.wire else { return };
        let state = self.state();
        // Read under the lock: a signal of before the wire was switched off is gone with it.
        let signalled = wire.read().is_ok();
        if let (true, Some(Interrupt::Intx), Some(line)) = (signalled, state.on, &state.line) {
            line.set(true);
        }
    }

    /// The guest ended an interrupt of the wire's input.
    pub(super) fn wire_ended(&self) {
        let state = self.state();
        let asserted = |line: &&IrqLine| line.is_asserted();
        let Some(line) = state.line.as_ref().filter(asserted) else {
            return;
        };
        line.set(false);
        if state.on == Some(Interrupt::Intx)
            && let Err(error) = self.host.unmask_intx()
        {
            guest_warn!(name = self.name, %error, "the function's wire stays masked");
        }
    }

    /// The guest changed `config`: bring everything to what it says now.
    pub(super) fn follow(&self, config: &ConfigTable) {
        let mut state = self.state();
        if let (Some(place), Some(table)) = (self.msix, &mut state.msix) {
            table.write_control(DwordWrite::whole(config.value(place.dword)));
        }
        let wanted = self.wanted(&state, config);
        if state.on != wanted || state.left.is_some() {
            self.switch(&mut state, wanted);
        }
        match state.on {
            Some(Interrupt::Msi) => self.follow_msi(&mut state, config),
            Some(Interrupt::Msix) => {
                (0..state.vectors.len()).for_each(|vector| self.follow_msix(&mut state, vector));
            }
            Some(Interrupt::Intx) | None => {}
        }
    }

    /// Off, and as after reset: the device signals nothing any more.
    pub(super) fn off(&self) {
        let mut state = self.state();
        self.switch(&mut state, None);
        if let Some(table) = &mut state.msix {
            table.reset();
        }
    }

    /// Dword `index` of the MSI-X table.
    pub(super) fn read_table(&self, index: usize) -> u32 {
        self.state()
            .msix
            .as_ref()
            .map_or(0, |table| table.read_table(index))
    }

    /// The guest writes dword `index` of the MSI-X table.
    pub(super) fn write_table(&self, index: usize, write: DwordWrite) {
        let mut state = self.state();
        let changed = state
            .msix
            .as_mut()
            .and_then(|table| table.write_table(index, write));
        if let (Some(changed), Some(Interrupt::Msix)) = (changed, state.on) {
            self.follow_msix(&mut state, usize::from(changed.vector));
        }
    }

    /// Dword `index` of the MSI-X pending bits: what vectors owe that may not be sent now.
    pub(super) fn read_pending(&self, index: usize) -> u32 {
        self.owed(Interrupt::Msix, index.saturating_mul(32))
    }

    /// The pending bits of MSI, which are the same.
    pub(super) fn read_msi_pending(&self) -> u32 {
        self.owed(Interrupt::Msi, 0)
    }

    /// Which of the 32 vectors of `kind` from `first` on owe something, a bit each.
    fn owed(&self, kind: Interrupt, first: usize) -> u32 {
        let state = self.state();
        let vectors = state.vectors.iter().skip(first).take(32).enumerate();
        let on = state.on == Some(kind);
        vectors
            .filter(|(_, vector)| on && vector.owes())
            .fold(0, |bits, (bit, _)| bits | 1 << bit)
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What the guest wants to be interrupted by.
    fn wanted(&self, state: &State, config: &ConfigTable) -> Option<Interrupt> {
        let command = Command::of_dword(config.value(COMMAND));
        let msi = |place: MsiPlace| MsiPlace::enabled(config.value(place.dword));
        if state.msix.as_ref().is_some_and(MsixTable::enabled) {
            Some(Interrupt::Msix)
        } else if self.msi.is_some_and(msi) {
            Some(Interrupt::Msi)
        } else if state.line.is_some() && !command.contains(Command::INTX_DISABLE) {
            Some(Interrupt::Intx)
        } else {
            None
        }
    }

    /// From the kind in use to `wanted`. What the host refuses to switch on stays off. What it refuses to switch off is
    /// asked for again before anything else: a device has one kind at a time.
    fn switch(&self, state: &mut State, wanted: Option<Interrupt>) {
        if let Some(kind) = state.on.take().or(state.left) {
            // The device first, then what it signalled.
            let off = self.host.disable_interrupts(kind);
            state.left = off.is_err().then_some(kind);
            if let Err(error) = off {
                guest_warn!(name = self.name, ?kind, %error, "the host does not switch interrupts off");
            }
            state.vectors.clear();
            if let (Interrupt::Intx, Some(wire), Some(line)) = (kind, &self.wire, &state.line) {
                // Nothing to read is as good: it is gone either way.
                let _gone = wire.read();
                line.set(false);
            }
        }
        if state.left.is_some() {
            return;
        }
        let Some(kind) = wanted else { return };
        match self.switch_on(state, kind) {
            Ok(()) => state.on = Some(kind),
            Err(error) => guest_warn!(
                name = self.name, ?kind, %error,
                "the host does not switch these interrupts on; the function does not interrupt"
            ),
        }
    }

    fn switch_on(&self, state: &mut State, kind: Interrupt) -> std::io::Result<()> {
        match kind {
            Interrupt::Intx => self.host.set_interrupts(kind, 0, &[self.wire.as_ref()]),
            // Its vectors come with the first of them.
            Interrupt::Msi => Ok(()),
            Interrupt::Msix => {
                let count = state.msix.as_ref().map_or(0, MsixTable::vectors).into();
                let mut vectors: Vec<_> = std::iter::repeat_with(Vector::default).take(count).collect();
                // Where the host adds vectors later, one is enough to switch it on; else all there are.
                if self.host.interrupt(kind).grows {
                    self.host.set_interrupts(kind, 0, &[None])?;
                } else {
                    self.set_up(kind, &mut vectors)?;
                }
                state.vectors = vectors;
                Ok(())
            }
        }
    }

    /// Have the host set `vectors` of `kind` up, or the first of them where it has fewer: the others go. A device that is
    /// given less than it asked for has to interrupt by that, and its driver can see that only by the device.
    fn set_up(&self, kind: Interrupt, vectors: &mut Vec<Vector>) -> std::io::Result<()> {
        let ask = |vectors: &[Vector]| {
            let eventfds: Vec<_> = vectors.iter().map(Vector::eventfd).collect();
            self.host.set_interrupts(kind, 0, &eventfds)
        };
        if let Err(error) = ask(vectors) {
            let Some(Fewer { has, asked }) = Fewer::of(&error).filter(|fewer| fewer.has > 0) else {
                return Err(error);
            };
            // The device is told of powers of two only.
            let first = if kind == Interrupt::Msi {
                1 << has.ilog2()
            } else {
                has
            };
            guest_warn!(
                name = self.name,
                ?kind,
                asked,
                has,
                "the host has fewer vectors than the guest uses; the function interrupts by the first {first}"
            );
            vectors.truncate(usize::try_from(first).unwrap_or(usize::MAX));
            ask(vectors)?;
        }
        for vector in vectors {
            vector.signalled = vector.route.is_some();
        }
        Ok(())
    }

    /// Have the device signal the route of `vector`, number `number` of the kind that is on, if it has one and does not yet.
    fn listen(&self, kind: Interrupt, number: u32, vector: &mut Vector) -> Result<(), HostError> {
        let Some(eventfd) = vector.eventfd().filter(|_| !vector.signalled) else {
            return Ok(());
        };
        self.host
            .set_interrupts(kind, number, &[Some(eventfd)])
            .map_err(|source| {
                HostError::new(format!("have vector {number} of {kind:?} signalled"), source)
            })?;
        vector.signalled = true;
        Ok(())
    }

    /// Bring MSI-X vector number `index` to what the table says.
    fn follow_msix(&self, state: &mut State, index: usize) {
        let Ok(number) = u16::try_from(index) else { return };
        let message = state.msix.as_ref().and_then(|table| table.message(number));
        let Some(vector) = state.vectors.get_mut(index) else {
            return;
        };
        let followed = vector
            .route_to(&self.port, message)
            .and_then(|()| self.listen(Interrupt::Msix, number.into(), vector));
        self.tell(followed);
    }

    /// Bring all MSI vectors to what the capability says.
    fn follow_msi(&self, state: &mut State, config: &ConfigTable) {
        let Some(place) = self.msi else { return };
        let count = MsiPlace::vectors(config.value(place.dword));
        let high = if place.wide {
            config.value(place.dword + 2)
        } else {
            0
        };
        let address = u64::from(high) << 32 | u64::from(config.value(place.dword + 1));
        let data = config.value(place.data()) & !(count - 1);
        let masked = if place.masks {
            config.value(place.mask())
        } else {
            0
        };
        if !state.vectors.is_empty() && state.allotted != count {
            self.switch(state, Some(Interrupt::Msi));
            if state.on.is_none() {
                return;
            }
        }
        let fresh = state.vectors.is_empty();
        if fresh {
            let vectors = usize::try_from(count).expect("32 at most");
            state.vectors.resize_with(vectors, Vector::default);
            state.allotted = count;
        }
        for (number, vector) in (0..count).zip(&mut state.vectors) {
            let open = masked & 1 << number == 0;
            let message = open.then_some(MsiMessage {
                address,
                data: data | number,
            });
            // Its route exists while it is masked, too: the device's vectors are set all at once.
            let routed = vector.route(&self.port).map(drop);
            self.tell(routed.and_then(|()| vector.route_to(&self.port, message)));
        }
        if !fresh {
            // Those that had no route before.
            for (number, vector) in (0..count).zip(&mut state.vectors) {
                self.tell(self.listen(Interrupt::Msi, number, vector));
            }
        } else if let Err(source) = self.set_up(Interrupt::Msi, &mut state.vectors) {
            // The host has none of it on: there is nothing to switch off, and the guest's next change asks again.
            state.on = None;
            state.vectors.clear();
            self.tell(Err(HostError::new(
                format!("have {count} vectors of MSI signalled"),
                source,
            )));
        }
    }

    fn tell(&self, result: Result<(), HostError>) {
        if let Err(error) = result {
            let error: &(dyn std::error::Error + 'static) = &error;
            guest_warn!(
                name = self.name,
                error,
                "an interrupt of the function does not reach the guest"
            );
        }
    }
}

impl Vector {
    /// Its route, off at first.
    fn route(&mut self, port: &MsiPort) -> Result<&dyn MsiRoute, HostError> {
        let route = match self.route.take() {
            Some(route) => route,
            None => port.route()?,
        };
        Ok(&**self.route.insert(route))
    }

    /// What the device signals for it.
    fn eventfd(&self) -> Option<&EventFd> {
        self.route.as_ref().map(|route| route.eventfd())
    }

    /// Send `message` from here on, or count what is owed. Changes the route once, if at all: one that came on for a moment
    /// would deliver what is owed.
    fn route_to(&mut self, port: &MsiPort, message: Option<MsiMessage>) -> Result<(), HostError> {
        if self.sends == message {
            return Ok(());
        }
        let route = self.route(port)?;
        if message.is_none() && route.carries() {
            // What the kernel delivered when the route came on is still counted; what comes from here on is owed. Of one
            // that carries nothing at present what is counted waits for it, or it forgets that by itself.
            let _delivered = route.eventfd().read();
        }
        route.set(message)?;
        self.sends = message;
        Ok(())
    }

    /// Whether it is masked and has been signalled since.
    fn owes(&self) -> bool {
        let Some(route) = self.route.as_ref().filter(|_| self.sends.is_none()) else {
            return false;
        };
        // Nobody else reads it while the route is off, and what was counted stays so.
        route
            .eventfd()
            .read()
            .is_ok_and(|count| route.eventfd().write(count).is_ok())
    }
}

/// The bytes of one BAR that are the MSI-X table or its pending bits.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Structure {
    Table,
    Pending,
}

/// What of the dword at `offset` of BAR `bar` belongs to MSI-X, and which dword of that it is.
pub(super) fn structure_at(place: MsixPlace, bar: u8, offset: u64) -> Option<(Structure, usize)> {
    let within = |(in_bar, start): (u8, u64), len: u64| {
        let inside = bar == in_bar && (start..start + len).contains(&offset);
        inside
            .then(|| usize::try_from((offset - start) / 4).ok())
            .flatten()
    };
    let table = within(place.table, place.table_len()).map(|index| (Structure::Table, index));
    table.or_else(|| within(place.pending, place.pending_len()).map(|index| (Structure::Pending, index)))
}

/// The bytes of BAR `bar` that are MSI-X's.
pub(super) fn trapped(place: Option<MsixPlace>, bar: u8) -> Vec<Range<u64>> {
    let Some(place) = place else { return Vec::new() };
    let both = [
        (place.table, place.table_len()),
        (place.pending, place.pending_len()),
    ];
    both.into_iter()
        .filter(|((in_bar, _), _)| *in_bar == bar)
        .map(|((_, start), len)| start..start + len)
        .collect()
}
