//! MSI-X of an emulated function: capability, table and pending bits in a BAR, and delivery.
//!
//! A busy interrupt must not cost a request to KVM per message: a vector that may send gets a route, whose
//! eventfd [`Msix::signal`] writes. Everything that is not so at the moment of the signal (no route yet, a
//! route that still has the previous message, a host that refused one) goes out as a message by itself, so
//! that no interrupt is lost while the guest reprograms.

mod table;

pub use table::{MsixTable, Raised, VectorChanged};

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::{Capability, CapabilityId};
use crate::guest_warn;
use crate::pci::access::{DwordWrite, read_dwords, write_dwords};
use crate::pci::function::ConfigEffect;
use crate::platform::host::HostError;
use crate::platform::msi::{MsiMessage, MsiPort, MsiRoute};

/// Bytes of a table entry.
const ENTRY_LEN: u32 = 16;
/// The pending bits start at a multiple of this behind the table.
const PENDING_ALIGN: u32 = 0x800;

/// Where a function keeps its MSI-X table and pending bits: both in one BAR.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct MsixLayout {
    bar: u8,
    vectors: u16,
    table: u32,
    pending: u32,
}

impl MsixLayout {
    /// `vectors` (1 to 2,048) entries `table` bytes into BAR `bar`, and their pending bits behind them.
    ///
    /// # Panics
    ///
    /// When a value is out of range or `table` is no multiple of 8: the device's code is wrong then.
    #[must_use]
    pub const fn new(bar: u8, table: u32, vectors: u16) -> Self {
        assert!(
            bar < 6 && table.is_multiple_of(8) && table < 1 << 30,
            "an MSI-X table lies 8-aligned in a BAR"
        );
        assert!(
            vectors > 0 && vectors <= 2048,
            "1 to 2048 MSI-X vectors are possible"
        );
        Self {
            bar,
            vectors,
            table,
            pending: (table + vectors as u32 * ENTRY_LEN).next_multiple_of(PENDING_ALIGN),
        }
    }

    /// The BAR both are in.
    #[must_use]
    pub const fn bar(self) -> u8 {
        self.bar
    }

    /// How many vectors, 1 to 2,048.
    #[must_use]
    pub const fn vectors(self) -> u16 {
        self.vectors
    }

    /// One past the last byte used of the BAR.
    #[must_use]
    pub const fn end(self) -> u32 {
        self.pending + (self.vectors as u32).div_ceil(64) * 8
    }

    const fn table_end(self) -> u32 {
        self.table + self.vectors as u32 * ENTRY_LEN
    }

    /// Whether any of `len` bytes at `offset` of the BAR belongs to the table or the pending bits.
    fn touches(self, offset: u64, len: usize) -> bool {
        let end = offset.saturating_add(len as u64);
        let overlaps = |from: u32, to: u32| offset < u64::from(to) && u64::from(from) < end;
        overlaps(self.table, self.table_end()) || overlaps(self.pending, self.end())
    }

    fn place(self, dword: u64) -> Place {
        let within = |from: u32, to: u32| {
            let first = u64::from(from / 4);
            (first..u64::from(to / 4)).contains(&dword).then(|| dword - first)
        };
        let index = |within: u64| usize::try_from(within).expect("a BAR's table has few dwords");
        if let Some(dword) = within(self.table, self.table_end()) {
            return Place::Table(index(dword));
        }
        within(self.pending, self.end()).map_or(Place::Nowhere, |dword| Place::Pending(index(dword)))
    }
}

/// What a dword of the BAR is.
enum Place {
    Table(usize),
    Pending(usize),
    Nowhere,
}

/// MSI-X of one emulated function. Shared by its configuration space, its BAR and its workers.
pub struct Msix {
    layout: MsixLayout,
    port: MsiPort,
    /// Taken before `state`; held while a route is changed, so that changes of one vector stay in order.
    routes: Mutex<Vec<Option<Arc<dyn MsiRoute>>>>,
    state: Mutex<State>,
}

struct State {
    table: MsixTable,
    /// Per vector: the route that is in force, and what it sends.
    live: Vec<Option<(Arc<dyn MsiRoute>, MsiMessage)>>,
}

impl State {
    /// Send `message` of `vector` by its route when that has the very message, else by itself.
    fn deliver(&self, port: &MsiPort, vector: u16, message: MsiMessage) {
        let live = self.live.get(usize::from(vector)).and_then(Option::as_ref);
        match live.filter(|(route, routed)| *routed == message && route.carries()) {
            Some((route, _)) if port.requester().bus_master() => {
                if let Err(error) = route.eventfd().write(1) {
                    // The counter is full: the kernel is a whole 2^64 signals behind and will interrupt.
                    tracing::debug!(vector, %error, "interrupt already pending");
                }
            }
            Some(_) => {}
            None => port.signal(message),
        }
    }
}

impl Msix {
    /// MSI-X as `layout` says, off; messages leave by `port`.
    #[must_use]
    pub fn new(layout: MsixLayout, port: MsiPort) -> Arc<Self> {
        let vectors = usize::from(layout.vectors);
        Arc::new(Self {
            layout,
            port,
            routes: Mutex::new(vec![None; vectors]),
            state: Mutex::new(State {
                table: MsixTable::new(layout.vectors),
                live: vec![None; vectors],
            }),
        })
    }

    /// What goes into the capability list. Its effect [`ConfigEffect::INTERRUPTS`] is performed by
    /// [`Msix::refresh`].
    #[must_use]
    pub fn capability(self: &Arc<Self>) -> Box<dyn Capability> {
        Box::new(MsixCapability(self.clone()))
    }

    /// Where table and pending bits are.
    #[must_use]
    pub fn layout(&self) -> MsixLayout {
        self.layout
    }

    /// Whether the guest uses MSI-X.
    #[must_use]
    pub fn enabled(&self) -> bool {
        self.state().table.enabled()
    }

    /// Interrupt by `vector`: at once, or once it is unmasked. Nothing happens while MSI-X is off, where
    /// there is no such vector, or without Bus Master Enable.
    pub fn signal(&self, vector: u16) {
        let mut state = self.state();
        if let Raised::Deliver(message) = state.table.raise(vector) {
            state.deliver(&self.port, vector, message);
        }
    }

    /// A guest read in BAR `bar`; `false`, with `data` as it was, when neither table nor pending bits are
    /// concerned. Bytes beside them are zero.
    pub fn bar_read(&self, bar: u8, offset: u64, data: &mut [u8]) -> bool {
        if bar != self.layout.bar || !self.layout.touches(offset, data.len()) {
            return false;
        }
        let state = self.state();
        read_dwords(offset, data, |dword| match self.layout.place(dword) {
            Place::Table(index) => state.table.read_table(index),
            Place::Pending(index) => state.table.read_pending(index),
            Place::Nowhere => 0,
        });
        true
    }

    /// A guest write in BAR `bar`; `false` when neither table nor pending bits are concerned. The pending
    /// bits and bytes beside both ignore it.
    pub fn bar_write(&self, bar: u8, offset: u64, data: &[u8]) -> bool {
        if bar != self.layout.bar || !self.layout.touches(offset, data.len()) {
            return false;
        }
        // Eight bytes touch three dwords at most, and so as many vectors.
        let mut changed = [None; 3];
        let mut state = self.state();
        let mut slots = changed.iter_mut();
        write_dwords(offset, data, |dword, write| {
            if let (Place::Table(index), Some(slot)) = (self.layout.place(dword), slots.next()) {
                *slot = state.table.write_table(index, write);
            }
        });
        drop(state);
        for change in changed.into_iter().flatten() {
            self.refresh_vector(change.vector);
        }
        true
    }

    /// The capability changed: bring every vector's route up to date and send what is owed.
    pub fn refresh(&self) {
        (0..self.layout.vectors).for_each(|vector| self.refresh_vector(vector));
    }

    /// Off, everything masked, nothing pending, every route given back.
    pub fn reset(&self) {
        let mut routes = self.routes.lock().unwrap_or_else(PoisonError::into_inner);
        let mut state = self.state();
        state.table.reset();
        state.live.fill(None);
        drop(state);
        routes.fill(None);
    }

    fn refresh_vector(&self, vector: u16) {
        let index = usize::from(vector);
        let mut routes = self.routes.lock().unwrap_or_else(PoisonError::into_inner);
        let Some(slot) = routes.get_mut(index) else {
            return;
        };
        // A vector that may not send keeps its route: nothing but `signal` writes the eventfd, and it looks
        // at the table first. Guests mask and unmask around every change of affinity.
        if let Some(message) = self.stale(index, vector) {
            match self.reroute(slot, message) {
                Ok(route) => self.state().live[index] = Some((route, message)),
                Err(error) => {
                    let error: &(dyn std::error::Error + 'static) = &error;
                    guest_warn!(
                        vector,
                        error,
                        "no kernel route for an interrupt: it is sent one by one"
                    );
                }
            }
        }
        let mut state = self.state();
        if let Some(message) = state.table.take_pending(vector) {
            state.deliver(&self.port, vector, message);
        }
    }

    /// The message `vector` should be routed to, when its route has another or there is none. From here on
    /// the old route is not used.
    fn stale(&self, index: usize, vector: u16) -> Option<MsiMessage> {
        let mut state = self.state();
        let message = state.table.message(vector)?;
        let live = state.live.get_mut(index)?;
        if live.as_ref().is_some_and(|(_, routed)| *routed == message) {
            return None;
        }
        *live = None;
        Some(message)
    }

    fn reroute(
        &self,
        slot: &mut Option<Arc<dyn MsiRoute>>,
        message: MsiMessage,
    ) -> Result<Arc<dyn MsiRoute>, HostError> {
        let route = match slot {
            Some(route) => route.clone(),
            None => slot.insert(self.port.route()?.into()).clone(),
        };
        route.set(Some(message))?;
        Ok(route)
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

struct MsixCapability(Arc<Msix>);

impl Capability for MsixCapability {
    fn id(&self) -> CapabilityId {
        CapabilityId::Standard(0x11)
    }

    fn len(&self) -> u16 {
        12
    }

    fn read(&self, dword: u16) -> u32 {
        let layout = self.0.layout;
        match dword {
            0 => self.0.state().table.read_control(),
            1 => layout.table | u32::from(layout.bar),
            2 => layout.pending | u32::from(layout.bar),
            _ => 0,
        }
    }

    fn write(&mut self, dword: u16, write: DwordWrite) -> ConfigEffect {
        if dword == 0 && self.0.state().table.write_control(write) {
            ConfigEffect::INTERRUPTS
        } else {
            ConfigEffect::empty()
        }
    }

    fn reset(&mut self) {
        self.0.reset();
    }
}

#[cfg(test)]
mod tests;
