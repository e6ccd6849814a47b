//! The thread that carries out commands, and what it shares with the processors.
//!
//! Lock order: the state, then what the endpoint and the memories have. Neither is held while memory is
//! accessed, nor while a message is sent: whatever stands between the device and the processors may take its
//! time, or call back.

use std::io;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle};

use super::memory::Memories;
use super::registers::{Ended, Job, Registers, Work};
use super::services::Services;
use super::spec::{Caps, IrqType, Status};
use super::transfer::{Stopped, Transfers};
use crate::iommu::agent::Refused;
use crate::pci::endpoint::{Endpoint, InterruptMode};
use crate::platform::dma::Dma;
use crate::platform::host::HostError;

/// The thread. Dropping it ends it.
pub(super) struct Engine {
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
}

struct Shared {
    endpoint: Arc<Endpoint>,
    services: Arc<Services>,
    memories: Mutex<Memories>,
    state: Mutex<State>,
    changed: Condvar,
    /// What runs ends at its next piece.
    cancelled: AtomicBool,
    /// [`State::held`]: a look at this spares the lock.
    held: AtomicBool,
}

/// What processors and the thread share.
pub(super) struct State {
    pub(super) registers: Registers,
    /// To be done next.
    job: Option<Job>,
    /// The thread is at work, until nothing of it is to be seen or heard any more.
    busy: bool,
    /// The machine is paused.
    pub(super) held: bool,
    /// The thread waits for the end of that, with a job begun.
    resting: bool,
    ending: bool,
}

impl Engine {
    /// Start the thread of the device that messages call `name`.
    pub(super) fn start(
        name: &str,
        caps: Caps,
        endpoint: Arc<Endpoint>,
        dma: Dma,
        services: Arc<Services>,
    ) -> Result<Self, HostError> {
        let transfers = Transfers::new(dma, services.clone());
        let shared = Arc::new(Shared {
            endpoint,
            services,
            memories: Mutex::new(Memories::new()),
            state: Mutex::new(State {
                registers: Registers::new(caps),
                job: None,
                busy: false,
                held: false,
                resting: false,
                ending: false,
            }),
            changed: Condvar::new(),
            cancelled: AtomicBool::new(false),
            held: AtomicBool::new(false),
        });
        let on_thread = shared.clone();
        let thread = thread::Builder::new()
            .name(name.to_owned())
            .spawn(move || on_thread.serve(transfers))
            .map_err(|error: io::Error| HostError::new(format!("start the thread of {name}"), error))?;
        Ok(Self {
            shared,
            thread: Some(thread),
        })
    }

    /// The registers, locked.
    pub(super) fn state(&self) -> MutexGuard<'_, State> {
        self.shared.state()
    }

    /// What the BARs of memory hold, locked.
    pub(super) fn memories(&self) -> MutexGuard<'_, Memories> {
        self.shared.memories()
    }

    /// Have `job`, which the registers started, done.
    pub(super) fn submit(&self, mut state: MutexGuard<'_, State>, job: Job) {
        state.job = Some(job);
        drop(state);
        self.shared.changed.notify_all();
    }

    /// Return once nothing runs any more.
    pub(super) fn settle(&self) {
        let _idle = self.shared.idle(self.state());
    }

    /// Return once the thread does nothing; what it has begun and what comes waits for [`Self::resume`].
    pub(super) fn pause(&self) {
        let shared = &self.shared;
        let mut state = self.state();
        state.held = true;
        shared.held.store(true, Ordering::Release);
        while state.busy && !state.resting {
            state = shared.wait(state);
        }
    }

    /// Go on after [`Self::pause`].
    pub(super) fn resume(&self) {
        self.state().held = false;
        self.shared.held.store(false, Ordering::Release);
        self.shared.changed.notify_all();
    }

    /// End what runs, and put registers, memories and the endpoint back as after power-on.
    pub(super) fn reset(&self) {
        let shared = &self.shared;
        let mut state = self.state();
        state.job = None;
        shared.cancelled.store(true, Ordering::Release);
        shared.changed.notify_all();
        let mut state = shared.idle(state);
        shared.cancelled.store(false, Ordering::Release);
        state.registers.reset();
        shared.memories().reset();
        shared.services.reset();
        shared.endpoint.reset();
    }
}

impl Drop for Engine {
    fn drop(&mut self) {
        let mut state = self.state();
        state.job = None;
        state.ending = true;
        self.shared.cancelled.store(true, Ordering::Release);
        drop(state);
        self.shared.changed.notify_all();
        if self.thread.take().is_some_and(|thread| thread.join().is_err()) {
            tracing::error!("the thread of a test device ended by a panic");
        }
    }
}

impl Shared {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn memories(&self) -> MutexGuard<'_, Memories> {
        self.memories.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn wait<'a>(&self, state: MutexGuard<'a, State>) -> MutexGuard<'a, State> {
        self.changed.wait(state).unwrap_or_else(PoisonError::into_inner)
    }

    /// The state, once nothing is to be done and nothing is being done.
    fn idle<'a>(&self, mut state: MutexGuard<'a, State>) -> MutexGuard<'a, State> {
        while state.busy || state.job.is_some() {
            state = self.wait(state);
        }
        state
    }

    /// The thread.
    fn serve(&self, mut transfers: Transfers) {
        let mut state = self.state();
        while !state.ending {
            let held = state.held;
            let Some(job) = state.job.take_if(|_| !held) else {
                state = self.wait(state);
                continue;
            };
            state.busy = true;
            drop(state);
            let ended = self.carry_out(&mut transfers, job.work);
            self.finish(&job, ended);
            state = self.state();
            state.busy = false;
            self.changed.notify_all();
        }
    }

    /// Before each piece of a transfer: wait while the machine is paused.
    fn next_piece(&self) -> Result<(), Stopped> {
        if self.held.load(Ordering::Acquire) {
            let mut state = self.state();
            while state.held && !self.cancelled.load(Ordering::Acquire) {
                state.resting = true;
                self.changed.notify_all();
                state = self.wait(state);
            }
            state.resting = false;
        }
        if self.cancelled.load(Ordering::Acquire) {
            return Err(Stopped::Cancelled);
        }
        Ok(())
    }

    fn carry_out(&self, transfers: &mut Transfers, work: Work) -> Ended {
        let pace = &|| self.next_piece();
        let status = |status| Ended {
            status,
            ..Ended::default()
        };
        let either = |good: bool, success, failure| status(if good { success } else { failure });
        match work {
            Work::RaiseIrq => Ended::default(),
            Work::Read {
                from,
                len,
                checksum,
                route,
            } => match transfers.read(route, from, len, pace) {
                Ok(found) => either(found == checksum, Status::READ_SUCCESS, Status::READ_FAIL),
                Err(stopped) => status(Status::READ_FAIL | at_fault(stopped)),
            },
            Work::Write { to, len, route } => match transfers.write(route, to, len, pace) {
                Ok(checksum) => Ended {
                    checksum: Some(checksum),
                    ..status(Status::WRITE_SUCCESS)
                },
                Err(stopped) => status(Status::WRITE_FAIL | at_fault(stopped)),
            },
            Work::Copy { from, to, len, route } => match transfers.copy(route, (from, to), len, pace) {
                Ok(()) => status(Status::COPY_SUCCESS),
                Err(stopped) => status(Status::COPY_FAIL | at_fault(stopped)),
            },
            Work::EnableDoorbell => self.show_doorbell(true),
            Work::DisableDoorbell => self.show_doorbell(false),
            Work::SetupSubranges { bar } => either(
                self.memories().swap(bar).is_ok(),
                Status::SUBRANGE_SETUP_SUCCESS,
                Status::SUBRANGE_SETUP_FAIL,
            ),
            Work::ClearSubranges { bar } => either(
                self.memories().unswap(bar).is_ok(),
                Status::SUBRANGE_CLEAR_SUCCESS,
                Status::SUBRANGE_CLEAR_FAIL,
            ),
            Work::Translate { at, rights, route } => match self.services.translate(route, at, rights) {
                Ok(answered) => Ended {
                    answered: Some(answered),
                    ..status(Status::TRANSLATE_SUCCESS)
                },
                Err(Refused) => status(Status::TRANSLATE_FAIL),
            },
            Work::RequestPage { at, rights, route } => either(
                self.services.request_page(route, at, rights).is_ok(),
                Status::PAGE_REQUEST_SUCCESS,
                Status::PAGE_REQUEST_FAIL,
            ),
            Work::Ring => status(Status::DOORBELL_SUCCESS),
        }
    }

    fn show_doorbell(&self, shown: bool) -> Ended {
        let changes = self.state().registers.has_doorbell() != shown;
        let status = match (shown, changes) {
            (true, true) => Status::DOORBELL_ENABLE_SUCCESS,
            (true, false) => Status::DOORBELL_ENABLE_FAIL,
            (false, true) => Status::DOORBELL_DISABLE_SUCCESS,
            (false, false) => Status::DOORBELL_DISABLE_FAIL,
        };
        Ended {
            status,
            doorbell: Some(shown),
            ..Ended::default()
        }
    }

    /// Show how `job` ended, and interrupt.
    fn finish(&self, job: &Job, mut ended: Ended) {
        let mut state = self.state();
        if self.cancelled.load(Ordering::Acquire) {
            return;
        }
        ended.status |= Status::IRQ_RAISED;
        let interrupt = self.interrupt(job);
        if interrupt.is_none() {
            ended.status |= Status::UNSIGNALLED;
        }
        state.registers.finish(ended);
        match interrupt {
            // With the state locked, so that whoever reads the status finds the wire as it says.
            Some(Interrupt::Wire) => self.endpoint.set_intx(true),
            Some(Interrupt::Message(vector)) => {
                drop(state);
                self.endpoint.signal(vector);
            }
            None => {}
        }
    }

    /// How `job` wants to interrupt, if the guest receives that.
    fn interrupt(&self, job: &Job) -> Option<Interrupt> {
        let mode = self.endpoint.interrupt_mode();
        let wanted = match job.irq_type {
            IrqType::INTX => InterruptMode::Intx,
            IrqType::MSI => InterruptMode::Msi,
            IrqType::MSIX => InterruptMode::Msix,
            _ => return None,
        };
        if wanted != mode {
            return None;
        }
        if mode == InterruptMode::Intx {
            return self.endpoint.has_intx().then_some(Interrupt::Wire);
        }
        // Messages are numbered from 1 on.
        let vector = u16::try_from(job.irq_number.checked_sub(1)?).ok()?;
        (vector < self.endpoint.messages()).then_some(Interrupt::Message(vector))
    }
}

enum Interrupt {
    Wire,
    Message(u16),
}

/// What the status says about a transfer that ended early. One that was cancelled is never shown.
const fn at_fault(stopped: Stopped) -> Status {
    match stopped {
        Stopped::Source => Status::SOURCE_INVALID,
        Stopped::Destination => Status::DESTINATION_INVALID,
        Stopped::Cancelled => Status::empty(),
    }
}
