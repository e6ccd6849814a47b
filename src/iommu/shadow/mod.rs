//! Functions of the host behind a unit of the guest's: what the guest's tables say, for the host's IOMMU.
//!
//! Requests of such a function never pass the unit's model, so what it would say is put where they do pass: for each
//! domain with its tables there is an address space of the host's, filled from the one that holds guest RAM and kept in
//! step by the guest's own invalidations. The guest announces new mappings as well, since the unit says that it keeps
//! what is not present (NpCache). Where a function is not translated it is attached to guest RAM itself, and where it is
//! blocked, to an address space with nothing in it. It passes from one to another by one request.
//!
//! ```text
//! invalidation        ranges to be looked at; functions whose entry is to be read again    [Follower::follow]
//! before the wait     tables scanned, host's mappings changed, functions switched over     [Follower::settle]
//! ```
//!
//! The address space with guest RAM may have memory of devices beside it, and so tables may lead there. When that memory goes,
//! what leads there goes at once, before it; when it comes, what led nowhere is looked at again.
//!
//! Until the wait is answered a function reaches what it reached. Where a register of the unit said what it is to reach instead,
//! or the guest gave it another number, there is no wait: it reaches nothing until that is there.
//!
//! A settled shadow is what the tables said when they were last invalidated. The host's requests that fail leave less
//! mapped than the guest asked for, never more: where one to unmap fails, the address space is given up, its functions
//! blocked, and another made. A function that the host does not even block is detached, or else kept from issuing requests; where
//! nothing helps no wait is answered.
//!
//! What the host does not take, or is too much for it, is not there for the function; its requests fault at the host, which
//! tells nobody. So the guest is told when that becomes known: by an event of the unit, as if the function had tried.

mod record;
mod space;
#[cfg(test)]
mod tests;

use std::ops::RangeInclusive;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};

use super::amd::commands::Command;
use super::amd::effort::Effort;
use super::amd::pages::PageRange;
use super::amd::processor::{Follower, NoAnswer};
use super::amd::request::{Access, Pasid};
use super::amd::view::{Tables, View};
use super::iommufd::{Copies, Ioas, Requests, Silence};
use crate::guest_warn;
use crate::pci::topology::Observer;
use crate::platform::addr::{Bdf, GpaRange, Iova};
use crate::platform::dma::Requester;
use crate::platform::host::HostError;
use crate::platform::memory::GuestRam;

pub use space::Limits;
use space::{Absent, Broken, Space};

/// What a step costs: there are four to a call.
const STEP: usize = Effort::PER_CALL / 4;

/// Whoever knows what devices reach.
pub trait Views: Send + Sync {
    /// What requests of `device` without PASID reach by now.
    fn view(&self, device: Bdf) -> View;

    /// Tell the guest that there is nothing at `address` for requests of `device`, though its tables map that.
    fn absent(&self, device: Bdf, address: Iova, access: Access);

    /// Tell the guest that `device` reaches nothing, though its entry lets it.
    fn blocked(&self, device: Bdf);

    /// Have followers settle soon, though nobody waits for them.
    fn settle_soon(&self);
}

/// What a shadow is made of.
pub struct ShadowParts {
    /// What the operator calls the unit.
    pub name: String,
    /// The unit.
    pub unit: Weak<dyn Views>,
    /// The host.
    pub requests: Arc<dyn Requests>,
    /// The address space with guest RAM in it, to which all functions are attached.
    pub space: Arc<Ioas>,
    /// Guest RAM: what tables lie in, and lead to.
    pub ram: GuestRam,
    /// The last address that the guest's tables can map.
    pub last: u64,
    /// How far it goes.
    pub limits: Limits,
    /// The functions behind the unit: as whom the guest knows each at present, and its way to the host's IOMMU.
    pub functions: Vec<(Arc<Requester>, Arc<dyn Silence>)>,
}

/// What all address spaces of a shadow are made with.
struct Host {
    name: String,
    requests: Arc<dyn Requests>,
    /// The one with guest RAM in it.
    space: Arc<Ioas>,
    ram: GuestRam,
    /// Where devices may be, ascending.
    windows: Vec<RangeInclusive<u64>>,
    limits: Limits,
}

/// A function behind the unit.
struct Confined {
    requester: Arc<Requester>,
    function: Arc<dyn Silence>,
    /// By which number its entry was read.
    read_as: Bdf,
    /// What it is to reach.
    view: View,
    /// What it is attached to.
    place: Option<u32>,
    /// How it is kept from there.
    hold: Hold,
}

/// How a function is kept from what it is not to reach.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Hold {
    /// By what it is attached to.
    Place,
    /// The host does not take it away from where it is. It issues no requests.
    Silence,
    /// It does not even take that.
    Nothing,
}

struct State {
    functions: Vec<Confined>,
    /// Go after the functions.
    spaces: Vec<Space>,
    blocked: Space,
    /// Those that the host does not let reach what their entries say, which the guest has yet to be told.
    refused: Vec<Bdf>,
}

/// What a guest is told of a function.
enum News {
    /// A page is not there.
    Absent(Absent),
    /// Nothing is.
    Blocked,
}

/// The shadow of one unit.
pub struct Shadow {
    unit: Weak<dyn Views>,
    state: Mutex<State>,
    host: Arc<Host>,
}

impl Shadow {
    /// A shadow of `parts`, whose functions reach guest RAM as they do behind a unit that is off.
    ///
    /// # Errors
    /// When the host does not tell what its devices can reach, or makes no address space.
    pub fn new(parts: ShadowParts) -> Result<Self, HostError> {
        let windows = parts.space.windows()?;
        if let Some(short) = shortfall(&windows, parts.last) {
            tracing::warn!(iommu = parts.name, "{short}");
        }
        let ram = parts.space.id();
        let host = Arc::new(Host {
            name: parts.name,
            requests: parts.requests,
            space: parts.space,
            ram: parts.ram,
            windows,
            limits: parts.limits,
        });
        let confined = |(requester, function): (Arc<Requester>, _)| Confined {
            read_as: requester.sbdf().bdf,
            requester,
            function,
            view: View::Identity(Access::BOTH),
            place: Some(ram),
            hold: Hold::Place,
        };
        let state = State {
            functions: parts.functions.into_iter().map(confined).collect(),
            spaces: Vec::new(),
            blocked: Space::new(&host, View::Nothing)?,
            refused: Vec::new(),
        };
        Ok(Self {
            unit: parts.unit,
            state: Mutex::new(state),
            host,
        })
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Do a bounded part of what is left, and leave the rest to the unit.
    fn settle_at_once(&self, mut state: MutexGuard<'_, State>) {
        let settled = state.settle(&self.host, &mut Effort::of_a_call());
        self.tell(state);
        if !settled {
            self.unit.upgrade().inspect(|unit| unit.settle_soon());
        }
    }

    /// Tell the guest what its functions do not reach.
    fn tell(&self, mut state: MutexGuard<'_, State>) {
        let news = state.take_news();
        drop(state);
        let Some(unit) = self.unit.upgrade() else {
            return;
        };
        for (device, news) in news {
            match news {
                News::Absent(Absent { iova, access }) => unit.absent(device, Iova(iova), access),
                News::Blocked => unit.blocked(device),
            }
        }
    }

    /// Read again what those of `which` are to reach.
    fn look(&self, state: &mut State, which: impl Fn(&Confined) -> bool) {
        let unit = self.unit.upgrade();
        let view = |at| unit.as_ref().map_or(View::Nothing, |unit| unit.view(at));
        state.look(&self.host, view, which);
    }
}

/// What the operator is to know where `windows` end before `last`. A unit cannot offer tables of fewer levels, and what IVMD
/// tables say of memory Linux maps page by page, and gives devices that need it to no program: neither tells the guest.
fn shortfall(windows: &[RangeInclusive<u64>], last: u64) -> Option<String> {
    let end = windows.last().map_or(0, |window| *window.end());
    let bits = |last: u64| u64::BITS - last.leading_zeros();
    (end < last).then(|| {
        format!(
            "the guest's tables map addresses of {} bits for its devices, up to {last:#x}, and the host's IOMMU takes {} \
             bits, up to {end:#x}: what the guest maps above that is not there for devices of the host, and an event in its \
             log; Linux begins below 4 GiB, programs that choose addresses themselves may not",
            bits(last),
            bits(end)
        )
    })
}

/// Whether an invalidation of `domain` in `space`, `None` for every table of it, is about `view`; and where it then is.
fn concerns(view: &View, domain: u16, space: Option<Pasid>, pages: PageRange) -> Option<PageRange> {
    let View::Translated {
        domain: own, tables, ..
    } = view
    else {
        return None;
    };
    if *own != domain {
        return None;
    }
    match (tables, space) {
        (Tables::Host(_), None) => Some(pages),
        (Tables::Guest(table), Some(pasid)) => (pasid == table.pasid).then_some(pages),
        // Linux 6.1 to 6.7 announces changes of v2 tables so. Addresses of a host table below are not those of the device.
        (Tables::Guest(table), None) => Some(table.host.map_or(pages, |_| PageRange::Everything)),
        (Tables::Host(_), Some(_)) => None,
    }
}

impl Follower for Shadow {
    fn follow(&self, batch: &[Command]) -> Result<(), NoAnswer> {
        let mut state = self.state();
        let mut looks = false;
        for command in batch {
            match *command {
                Command::InvalidateDevice { device } => {
                    looks |= state.functions.iter().any(|function| function.at() == device);
                }
                Command::InvalidatePages {
                    domain, space, pages, ..
                } => {
                    for copy in &mut state.spaces {
                        if let Some(pages) = concerns(&copy.view(), domain, space, pages) {
                            copy.invalidate(pages);
                        }
                    }
                }
                Command::InvalidateAll => {
                    looks = true;
                    let spaces = &mut state.spaces;
                    spaces
                        .iter_mut()
                        .for_each(|space| space.invalidate(PageRange::Everything));
                }
                // Functions of the host keep no translations that the guest knows of, and their messages are followed
                // elsewhere.
                Command::CompletionWait { .. }
                | Command::InvalidateIotlb { .. }
                | Command::InvalidateInterrupts { .. }
                | Command::Prefetch { .. }
                | Command::CompletePageRequest { .. } => {}
            }
        }
        if looks {
            self.look(&mut state, |_| true);
        }
        Ok(())
    }

    fn forget(&self) -> Result<(), NoAnswer> {
        self.follow(&[Command::InvalidateAll])?;
        self.state().confine(&self.host);
        Ok(())
    }

    fn settle(&self, effort: &mut Effort) -> bool {
        let mut state = self.state();
        let settled = state.settle(&self.host, effort);
        self.tell(state);
        settled
    }
}

impl Observer for Shadow {
    fn renumbered(&self) {
        let mut state = self.state();
        self.look(&mut state, |function| function.read_as != function.at());
        state.confine(&self.host);
        self.settle_at_once(state);
    }

    /// Nothing is mapped for it any more. It is blocked, until whoever has it detaches it.
    fn left(&self, requester: &Arc<Requester>) {
        let mut state = self.state();
        let blocked = state.blocked.id();
        let leaves = |function: &Confined| Arc::ptr_eq(&function.requester, requester);
        for function in state.functions.iter_mut().filter(|function| leaves(function)) {
            function.view = View::Nothing;
            function.block(blocked, &self.host);
        }
        // What the host does not block stays in the books, and with it the address space that it reaches.
        let reaches = |function: &Confined| function.place.is_some_and(|place| place != blocked);
        state
            .functions
            .retain(|function| !leaves(function) || reaches(function));
        self.settle_at_once(state);
    }
}

/// The spaces are copies of the one with guest RAM in it.
impl Copies for Shadow {
    fn shared(&self, _range: GpaRange) {
        self.state().spaces.iter_mut().for_each(Space::memory_came);
        self.unit.upgrade().inspect(|unit| unit.settle_soon());
    }

    fn withdrawn(&self, range: GpaRange) {
        let mut state = self.state();
        let mut broken = false;
        for index in 0..state.spaces.len() {
            let gone = state.spaces[index].memory_goes(range.start().0, range.last().0);
            if let Err(Broken(error)) = gone {
                tracing::error!(iommu = self.host.name, %range, %error, "the host does not unmap memory of a device that goes; what reached it is blocked");
                state.replace(index, &self.host);
                broken = true;
            }
        }
        self.tell(state);
        if broken {
            self.unit.upgrade().inspect(|unit| unit.settle_soon());
        }
    }
}

impl State {
    /// Read again what the functions of `which` are to reach, and make the address spaces that are missing.
    fn look(&mut self, host: &Arc<Host>, view: impl Fn(Bdf) -> View, which: impl Fn(&Confined) -> bool) {
        for function in self.functions.iter_mut().filter(|function| which(function)) {
            function.read_as = function.at();
            function.view = view(function.read_as);
            let own = !matches!(function.view, View::Nothing | View::Identity(Access::BOTH));
            let there = self.spaces.iter().any(|space| space.view() == function.view);
            if own && !there {
                match Space::new(host, function.view) {
                    Ok(space) => self.spaces.push(space),
                    Err(error) => {
                        guest_warn!(iommu = host.name, function = %function.at(), %error, reason = %error.source, "a function of the host is blocked");
                        function.refuse(&mut self.refused);
                    }
                }
            }
        }
    }

    /// Do what is left, as far as `effort` goes; whether that was all.
    fn settle(&mut self, host: &Arc<Host>, effort: &mut Effort) -> bool {
        for index in 0..self.spaces.len() {
            // One that nobody wants any more goes as it is.
            let wanted = self.is_wanted(&self.spaces[index]);
            while wanted && !self.spaces[index].is_settled() {
                if !effort.spend(STEP) {
                    return false;
                }
                if let Err(Broken(error)) = self.spaces[index].step() {
                    tracing::error!(iommu = host.name, %error, "the host does not unmap what its devices should reach no more; they are blocked");
                    self.replace(index, host);
                }
            }
        }
        for index in 0..self.functions.len() {
            self.switch(index, host);
        }
        let attached: Vec<_> = self.functions.iter().map(|function| function.place).collect();
        let wanted: Vec<_> = self.spaces.iter().map(|space| self.is_wanted(space)).collect();
        let mut wanted = wanted.into_iter();
        self.spaces
            .retain(|space| wanted.next() == Some(true) || attached.contains(&Some(space.id())));
        let loose = |function: &Confined| function.hold == Hold::Nothing;
        if self.functions.iter().any(loose) {
            // The guest must not think that anything was taken away.
            effort.stick();
            return false;
        }
        true
    }

    /// What the guest is to be told, for every function that was to have it.
    fn take_news(&mut self) -> Vec<(Bdf, News)> {
        let refused = std::mem::take(&mut self.refused).into_iter();
        let mut all: Vec<_> = refused.map(|device| (device, News::Blocked)).collect();
        for space in &mut self.spaces {
            let (view, absent) = (space.view(), space.take_absent());
            let concerned = self.functions.iter().filter(|function| function.view == view);
            for function in concerned {
                let absent = absent.iter().copied().map(News::Absent);
                all.extend(absent.map(|news| (function.at(), news)));
            }
        }
        all
    }

    /// Take functions away from what they are no longer to reach. Those whose new space is not settled are blocked until it is;
    /// those that keep theirs keep what is in it, which is as old as the guest's last invalidation.
    fn confine(&mut self, host: &Host) {
        let blocked = self.blocked.id();
        for index in 0..self.functions.len() {
            let function = &mut self.functions[index];
            let copy = self.spaces.iter().find(|space| space.view() == function.view);
            match copy {
                Some(space) if function.place == Some(space.id()) => {}
                Some(space) if !space.is_settled() => function.block(blocked, host),
                _ => self.switch(index, host),
            }
        }
    }

    fn is_wanted(&self, space: &Space) -> bool {
        self.functions
            .iter()
            .any(|function| function.view == space.view())
    }

    /// Give the address space number `index` up: what is attached there is blocked until there is another.
    fn replace(&mut self, index: usize, host: &Arc<Host>) {
        let (old, view) = (self.spaces[index].id(), self.spaces[index].view());
        let blocked = self.blocked.id();
        for function in &mut self.functions {
            if function.place == Some(old) {
                function.block(blocked, host);
            }
        }
        match Space::new(host, view) {
            Ok(space) => self.spaces[index] = space,
            Err(error) => {
                guest_warn!(iommu = host.name, %error, reason = %error.source, "functions of the host stay blocked");
                for function in &mut self.functions {
                    if function.view == view {
                        function.refuse(&mut self.refused);
                    }
                }
            }
        }
    }

    /// Attach the function number `index` to what it is to reach.
    fn switch(&mut self, index: usize, host: &Host) {
        let function = &mut self.functions[index];
        let copy = self.spaces.iter().find(|space| space.view() == function.view);
        let place = match (function.view, copy) {
            (View::Identity(Access::BOTH), _) => host.space.id(),
            (_, Some(space)) => space.id(),
            (_, None) => self.blocked.id(),
        };
        if function.is_at(place) {
            return;
        }
        match function.function.attach(place) {
            Ok(()) => function.came_to(Some(place)),
            Err(error) => {
                guest_warn!(iommu = host.name, function = %function.at(), %error, "the host does not attach a function to what the guest has it reach; it is blocked");
                function.refuse(&mut self.refused);
                function.block(self.blocked.id(), host);
            }
        }
    }
}

impl Confined {
    /// As whom the guest knows it.
    fn at(&self) -> Bdf {
        self.requester.sbdf().bdf
    }

    /// Whether its requests reach the address space `place`.
    fn is_at(&self, place: u32) -> bool {
        self.place == Some(place) && self.hold == Hold::Place
    }

    /// It is to reach nothing until its entry is read again: the host does not do what that says. The guest is told, unless
    /// it is blocked by its own will.
    fn refuse(&mut self, refused: &mut Vec<Bdf>) {
        let device = self.at();
        if self.view != View::Nothing && !refused.contains(&device) {
            refused.push(device);
        }
        self.view = View::Nothing;
    }

    fn came_to(&mut self, place: Option<u32>) {
        (self.place, self.hold) = (place, Hold::Place);
    }

    /// It reaches nothing from here on, as far as there is a way to that.
    fn block(&mut self, blocked: u32, host: &Host) {
        if self.is_at(blocked) {
            return;
        }
        if self.function.attach(blocked).is_ok() {
            return self.came_to(Some(blocked));
        }
        let Err(refused) = self.function.detach() else {
            return self.came_to(None);
        };
        if self.hold == Hold::Silence {
            return;
        }
        match self.function.silence() {
            Ok(()) => {
                self.hold = Hold::Silence;
                tracing::error!(iommu = host.name, function = %self.at(), error = %refused, "the host neither blocks nor detaches a function: it issues no requests until the host does");
            }
            Err(error) => {
                if std::mem::replace(&mut self.hold, Hold::Nothing) != Hold::Nothing {
                    tracing::error!(iommu = host.name, function = %self.at(), %refused, %error, "the host neither blocks nor detaches a function, which does not take Bus Master Enable either: it reaches what it reached, and the guest's COMPLETION_WAIT is not answered");
                }
            }
        }
    }
}

impl Drop for State {
    fn drop(&mut self) {
        let blocked = self.blocked.id();
        for function in &mut self.functions {
            // Not for a moment does it reach anything: whoever else has it may not have let it go.
            let end = function.function.attach(blocked);
            if let Err(error) = end.and_then(|()| function.function.detach()) {
                tracing::warn!(function = %function.at(), %error, "the host does not detach a function; closing it does");
            }
        }
    }
}
