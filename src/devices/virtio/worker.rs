//! Threads that serve queues: each sleeps until a kick or a host descriptor wakes it, works a bounded turn,
//! and obeys pause and stop between turns. An order ends the turn before its next chain, so that whoever gives one
//! waits for a single request.

use std::convert::Infallible;
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle};

use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use super::Interrupts;
use super::queue::{Broken, Chain, MemoryViews, QueueMemory, VirtQueue};
use crate::guest_warn;
use crate::platform::addr::Iova;
use crate::platform::dma::Dma;
use crate::platform::host::HostError;

/// What a device does with some of its queues, on a thread of its own.
pub trait Service: Send {
    /// Host descriptors that wake the thread, once per change from not ready to ready.
    fn sources(&self) -> Vec<Source<'_>> {
        Vec::new()
    }

    /// Work for a bounded time on what `woken` names. The first turn, and the first after a pause, names everything.
    fn turn(&mut self, woken: Woken, dma: &Dma, queues: &mut [ServedQueue]) -> Result<Turn, Broken>;
}

/// A host descriptor to wait for.
pub struct Source<'a> {
    /// The descriptor. One that cannot be waited for, as a regular file, counts as always ready.
    pub fd: BorrowedFd<'a>,
    /// Wait until it takes output, not until it has input.
    pub output: bool,
}

/// How a turn ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[must_use]
pub enum Turn {
    /// Nothing is left to do; what comes next wakes the thread.
    Idle,
    /// The turn's bound was reached with work left.
    Again,
}

impl Turn {
    /// Work is left if either says so.
    pub fn or(self, other: Self) -> Self {
        if self == Self::Idle { other } else { self }
    }
}

/// What woke a service: its queues by position, its sources by position.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Woken {
    queues: u64,
    sources: u64,
}

impl Woken {
    /// Everything, as in the first turn.
    pub const ALL: Self = Self {
        queues: u64::MAX,
        sources: u64::MAX,
    };
    const NOTHING: Self = Self {
        queues: 0,
        sources: 0,
    };

    /// Only the queue at `position` of the service's queues, 0 to 63.
    #[cfg(test)]
    pub(super) fn by_queue(position: usize) -> Self {
        Self {
            queues: 1 << (position & 63),
            ..Self::NOTHING
        }
    }

    /// Only the source at `position` of the service's sources, 0 to 63.
    #[cfg(test)]
    pub(super) fn by_source(position: usize) -> Self {
        Self {
            sources: 1 << (position & 63),
            ..Self::NOTHING
        }
    }

    /// Whether the queue at `position` was kicked.
    #[must_use]
    pub fn queue(self, position: usize) -> bool {
        self.queues >> (position & 63) & 1 != 0
    }

    /// Whether the source at `position` became ready.
    #[must_use]
    pub fn source(self, position: usize) -> bool {
        self.sources >> (position & 63) & 1 != 0
    }

    fn and(self, other: Self) -> Self {
        Self {
            queues: self.queues | other.queues,
            sources: self.sources | other.sources,
        }
    }
}

/// When the driver hears of completions.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Notify {
    /// After each, because the next takes time.
    Each,
    /// Once after all that were there.
    Batch,
}

/// What became of a chain.
#[derive(Debug, PartialEq, Eq)]
pub enum Served<W> {
    /// It is done, with so many bytes written.
    Done(u32),
    /// It is left for later, and the turn ends.
    Later,
    /// This is to be done for it without a look at guest memory. How it went is the one byte written, at this address.
    Apart(W, Iova),
}

/// A queue with its doorbell and its interrupt.
pub struct ServedQueue {
    index: u16,
    queue: VirtQueue,
    kick: Arc<EventFd>,
    interrupts: Arc<dyn Interrupts>,
    /// Completed since the driver was last considered for an interrupt.
    completed: bool,
    /// Set while who serves the queue shall take no more of it: its gate is closed.
    closed: Arc<AtomicBool>,
}

impl ServedQueue {
    /// Queue number `index` of a device, kicked by `kick`.
    #[must_use]
    pub fn new(index: u16, queue: VirtQueue, kick: Arc<EventFd>, interrupts: Arc<dyn Interrupts>) -> Self {
        Self {
            index,
            queue,
            kick,
            interrupts,
            completed: false,
            closed: Arc::default(),
        }
    }

    /// Take no more chains in a turn once `closed` is set.
    pub(super) fn obey(&mut self, closed: Arc<AtomicBool>) {
        self.closed = closed;
    }

    /// Whether the turn is to end before the next chain, as one with work left.
    #[must_use]
    pub fn waits(&self) -> bool {
        self.closed.load(Ordering::Acquire)
    }

    /// The queue's number in the device.
    #[must_use]
    pub fn index(&self) -> u16 {
        self.index
    }

    /// Entries.
    #[must_use]
    pub fn size(&self) -> u16 {
        self.queue.size()
    }

    /// Take the next chain, if there is one.
    pub fn pop<'m, M: QueueMemory>(&mut self, mem: &'m M) -> Result<Option<Chain<'m>>, Broken> {
        self.queue.pop(mem)
    }

    /// Give the chain taken last back untouched.
    pub fn put_back(&mut self, head: u16) {
        self.queue.put_back(head);
    }

    /// Hand a chain back with `written` bytes in its writable part; the driver hears of it by
    /// [`Self::notify`].
    pub fn complete<M: QueueMemory>(&mut self, mem: &M, head: u16, written: u32) -> Result<(), Broken> {
        self.completed = true;
        self.queue.complete(mem, head, written)
    }

    /// Interrupt the driver, if something was completed and it wants to know.
    pub fn notify<M: QueueMemory>(&mut self, mem: &M) -> Result<(), Broken> {
        if std::mem::take(&mut self.completed) && self.queue.should_interrupt(mem)? {
            self.interrupts.queue(self.index);
        }
        Ok(())
    }

    /// Ask for a kick with the next chain. `true` when chains are there already.
    pub fn rearm<M: QueueMemory>(&mut self, mem: &M) -> Result<bool, Broken> {
        self.queue.rearm(mem)
    }

    /// Kicks are not needed for now.
    pub fn disarm<M: QueueMemory>(&mut self, mem: &M) -> Result<(), Broken> {
        self.queue.disarm(mem)
    }

    /// Serve what is available, at most one ring's worth, and nothing more once the queue [waits](Self::waits): `each` says
    /// how many bytes it wrote, or `None` to leave the chain for later and end the turn.
    ///
    /// Each chain has a view of memory of its own: who changes translations waits for one request, not for
    /// a ring of them.
    pub fn drain<V: MemoryViews>(
        &mut self,
        mem: &V,
        notify: Notify,
        mut each: impl FnMut(&mut Chain<'_>) -> Result<Option<u32>, Broken>,
    ) -> Result<Turn, Broken> {
        let served = |chain: &mut Chain<'_>| Ok(each(chain)?.map_or(Served::Later, Served::Done));
        self.drain_apart(mem, notify, served, |never: Infallible| match never {})
    }

    /// As [`Self::drain`], with work that needs no guest memory done `apart`, while no view of it is held: who changes
    /// translations does not wait for that work. What `apart` returns is the byte that the driver finds.
    pub fn drain_apart<V: MemoryViews, W>(
        &mut self,
        mem: &V,
        notify: Notify,
        mut each: impl FnMut(&mut Chain<'_>) -> Result<Served<W>, Broken>,
        mut apart: impl FnMut(W) -> u8,
    ) -> Result<Turn, Broken> {
        self.queue.disarm(&mem.view())?;
        let mut turn = Turn::Again;
        for _ in 0..self.queue.size() {
            if self.waits() {
                break;
            }
            let mut view = mem.view();
            let Some(mut chain) = self.pop(&view)? else {
                if self.rearm(&view)? {
                    continue;
                }
                turn = Turn::Idle;
                break;
            };
            let head = chain.head;
            let written = match each(&mut chain)? {
                Served::Done(written) => written,
                Served::Later => {
                    self.put_back(head);
                    turn = Turn::Idle;
                    break;
                }
                Served::Apart(work, answer_at) => {
                    drop(view);
                    let answer = apart(work);
                    view = mem.view();
                    self.queue.answer(&view, head, answer_at, answer)?;
                    1
                }
            };
            self.complete(&view, head, written)?;
            if notify == Notify::Each {
                self.notify(&view)?;
            }
        }
        self.notify(&mem.view())?;
        Ok(turn)
    }
}

/// One thread's work.
pub struct Unit {
    /// The thread's name; the kernel shows 15 bytes of it.
    pub name: String,
    /// What it does.
    pub service: Box<dyn Service>,
    /// With which queues; at most 64.
    pub queues: Vec<ServedQueue>,
}

/// A device's running threads. Dropping it stops them and waits until they are quiet: from then on the
/// device touches no guest memory.
pub struct Workers {
    workers: Vec<Worker>,
}

struct Worker {
    gate: Arc<Gate>,
    thread: Option<JoinHandle<()>>,
}

impl Workers {
    /// Start a thread for each of `units`; they wait for [`Self::resume`]. On an error none is left running.
    pub fn start(units: Vec<Unit>, dma: &Dma, interrupts: &Arc<dyn Interrupts>) -> Result<Self, HostError> {
        let mut all = Self {
            workers: Vec::with_capacity(units.len()),
        };
        for mut unit in units {
            let failed = |name: &str| {
                let action = format!("start the virtio worker {name}");
                move |error: io::Error| HostError::new(action, error)
            };
            let name = unit.name.clone();
            let gate = Arc::new(Gate::new().map_err(failed(&name))?);
            let epoll = watch(&unit, &gate).map_err(failed(&name))?;
            for queue in &mut unit.queues {
                queue.obey(gate.closed.clone());
            }
            let (dma, interrupts, at_gate) = (dma.clone(), interrupts.clone(), gate.clone());
            let thread = thread::Builder::new()
                .name(name.clone())
                .spawn(move || serve(unit, &at_gate, &epoll, &dma, interrupts.as_ref()))
                .map_err(failed(&name))?;
            all.workers.push(Worker {
                gate,
                thread: Some(thread),
            });
        }
        Ok(all)
    }

    /// No thread at all: of a device that is to be reset before it works again.
    #[must_use]
    pub fn none() -> Self {
        Self { workers: Vec::new() }
    }

    /// Return once no thread works any more; kicks are kept.
    pub fn pause(&self) {
        for worker in &self.workers {
            worker.gate.order(Order::Pause);
        }
        for worker in &self.workers {
            worker.gate.await_parked();
        }
    }

    /// Go on after [`Self::pause`].
    pub fn resume(&self) {
        for worker in &self.workers {
            worker.gate.order(Order::Run);
        }
    }
}

impl Drop for Workers {
    fn drop(&mut self) {
        for worker in &self.workers {
            worker.gate.order(Order::Stop);
        }
        for worker in &mut self.workers {
            if worker.thread.take().is_some_and(|thread| thread.join().is_err()) {
                tracing::error!("a virtio worker ended by a panic");
            }
        }
    }
}

const STOP_TOKEN: u64 = u64::MAX;
const SOURCE_TOKEN: u64 = 1 << 32;

/// An epoll set of a unit's kicks and sources, and its gate.
fn watch(unit: &Unit, gate: &Gate) -> io::Result<Epoll> {
    let epoll = Epoll::new()?;
    let add = |fd, events, token| epoll.ctl(ControlOperation::Add, fd, EpollEvent::new(events, token));
    add(gate.wake.as_raw_fd(), EventSet::IN, STOP_TOKEN)?;
    for (position, queue) in unit.queues.iter().enumerate() {
        add(queue.kick.as_raw_fd(), EventSet::IN, position as u64)?;
    }
    for (position, source) in unit.service.sources().into_iter().enumerate() {
        let direction = if source.output {
            EventSet::OUT
        } else {
            EventSet::IN
        };
        let added = add(
            source.fd.as_raw_fd(),
            direction | EventSet::EDGE_TRIGGERED,
            SOURCE_TOKEN + position as u64,
        );
        match added {
            // A file that cannot be waited for is always ready.
            Err(error) if error.raw_os_error() == Some(libc::EPERM) => {}
            other => other?,
        }
    }
    Ok(epoll)
}

/// The thread.
fn serve(mut unit: Unit, gate: &Gate, epoll: &Epoll, dma: &Dma, interrupts: &dyn Interrupts) {
    let mut woken = Woken::ALL;
    loop {
        match gate.pass() {
            Passage::Open => {}
            // A driver that rang while the function was asleep rang in vain, and may never ring again.
            Passage::Waited => woken = Woken::ALL,
            Passage::Stop => return,
        }
        let turn = match unit.service.turn(woken, dma, &mut unit.queues) {
            Ok(turn) => turn,
            Err(broken) => {
                guest_warn!(device = %unit.name, "the driver broke a queue; the device asks for a reset: {broken}");
                interrupts.needs_reset();
                gate.await_stop();
                return;
            }
        };
        let timeout = if turn == Turn::Again { 0 } else { -1 };
        let news = wait(epoll, timeout, &unit.queues, gate);
        woken = if turn == Turn::Again {
            woken.and(news)
        } else {
            news
        };
    }
}

/// Sleep at most `timeout` milliseconds (-1: until woken) and say what happened.
fn wait(epoll: &Epoll, timeout: i32, queues: &[ServedQueue], gate: &Gate) -> Woken {
    let mut events = [EpollEvent::default(); 16];
    let count = match epoll.wait(timeout, &mut events) {
        Ok(count) => count,
        Err(error) if error.kind() == io::ErrorKind::Interrupted => 0,
        Err(error) => panic!("epoll_wait on a set of our own: {error}"),
    };
    let mut woken = Woken::NOTHING;
    for event in &events[..count] {
        match event.data() {
            STOP_TOKEN => clear(&gate.wake),
            token if token >= SOURCE_TOKEN => {
                woken.sources |= 1_u64 << ((token - SOURCE_TOKEN) & 63);
            }
            token => {
                woken.queues |= 1_u64 << (token & 63);
                if let Some(queue) = usize::try_from(token).ok().and_then(|at| queues.get(at)) {
                    clear(&queue.kick);
                }
            }
        }
    }
    woken
}

/// Set an eventfd's count to zero. Somebody else may have been faster.
fn clear(eventfd: &EventFd) {
    match eventfd.read() {
        Ok(_) => {}
        Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
        Err(error) => tracing::error!(%error, "an eventfd cannot be read"),
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Order {
    Run,
    Pause,
    Stop,
}

/// How a thread came through its gate.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Passage {
    /// At once.
    Open,
    /// After a pause, the one that threads begin with included.
    Waited,
    /// It shall end.
    Stop,
}

/// Where a thread stops between turns.
struct Gate {
    /// The order is not `Run`. A look at this spares the lock; the unit's queues share it and end the turn by it.
    closed: Arc<AtomicBool>,
    state: Mutex<State>,
    changed: Condvar,
    wake: EventFd,
}

struct State {
    order: Order,
    parked: bool,
}

impl Gate {
    fn new() -> io::Result<Self> {
        Ok(Self {
            closed: Arc::new(AtomicBool::new(true)),
            state: Mutex::new(State {
                order: Order::Pause,
                parked: false,
            }),
            changed: Condvar::new(),
            wake: EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC)?,
        })
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn order(&self, order: Order) {
        self.state().order = order;
        self.closed.store(order != Order::Run, Ordering::Release);
        self.changed.notify_all();
        // A thread that may work on need not leave its sleep for that.
        if order != Order::Run {
            self.wake
                .write(1)
                .expect("one more on an eventfd that is read long before it overflows");
        }
    }

    fn await_parked(&self) {
        let mut state = self.state();
        while !state.parked && state.order == Order::Pause {
            state = self.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
    }

    /// The thread's side: wait while paused.
    fn pass(&self) -> Passage {
        if !self.closed.load(Ordering::Acquire) {
            Passage::Open
        } else if self.park(|order| order == Order::Pause) {
            Passage::Waited
        } else {
            Passage::Stop
        }
    }

    /// The thread's side, after its queues broke: wait for the end.
    fn await_stop(&self) {
        self.park(|order| order != Order::Stop);
    }

    /// Be parked for as long as the order is one to `stay` for; `false` when it is to stop in the end.
    fn park(&self, stay: impl Fn(Order) -> bool) -> bool {
        let mut state = self.state();
        state.parked = true;
        self.changed.notify_all();
        while stay(state.order) {
            state = self.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
        state.parked = false;
        state.order != Order::Stop
    }
}

#[cfg(test)]
mod tests;
