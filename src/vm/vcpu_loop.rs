//! The processors' threads: run, dispatch the exit, obey orders.
//!
//! One thread per processor. Each holds until ordered otherwise; the machine's owner gives an order to all of
//! them at once and waits until each has carried it out. A thread that cannot go on reports why and holds.

use std::collections::VecDeque;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::thread::JoinHandle;

use rustix::thread::sched_setaffinity;
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};
use vmm_sys_util::signal::Killable;

use super::boot::{Entry, cpuid, msr};
use super::plan::CpuSet;
use super::stats::{ExitCounts, ExitReason, Milestones};
use crate::guest_warn;
use crate::platform::bus::Bus;
use crate::platform::host::HostError;
use crate::platform::irq::EoiListener;
use crate::platform::kvm::{Exit, Kick, PowerOnState, Vcpu, WatchedPages, kick_signal};
use crate::platform::lock::lock;

/// What answers a processor's exits.
pub struct Surroundings {
    /// Who has which physical address.
    pub mmio: Arc<Bus>,
    /// Who has which port.
    pub ports: Arc<Bus>,
    /// Who hears of ended level-triggered interrupts.
    pub eoi: Arc<dyn EoiListener>,
    /// What carries out stores to RAM that are exits.
    pub watched: Arc<WatchedPages>,
    /// When the guest began.
    pub milestones: Arc<Milestones>,
}

/// What the threads are told to do.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Order {
    /// Do not run the guest.
    Hold,
    /// Run the guest.
    Run,
    /// Go back to the power-on state, the boot processor to this entry, and hold.
    Reset(Entry),
    /// End the thread.
    Leave,
}

/// Why a processor cannot go on.
#[derive(Debug)]
pub enum Notice {
    /// The guest's processor shut down by a triple fault.
    TripleFault {
        /// Which vCPU.
        vcpu: usize,
    },
    /// The guest's processor is in a state that cannot be run; the text tells all that is known.
    Broken {
        /// Which vCPU.
        vcpu: usize,
        /// What and where.
        what: String,
    },
    /// The host cannot run it.
    Host(HostError),
}

/// Notices that wait for the machine's owner, and a descriptor that is readable while there are any.
pub struct Notices {
    waiting: Mutex<VecDeque<Notice>>,
    readable: EventFd,
}

impl Notices {
    /// None yet.
    pub fn new() -> Result<Arc<Self>, HostError> {
        let readable = EventFd::new(EFD_NONBLOCK)
            .map_err(|source| HostError::new("create the eventfd of the processors' notices", source))?;
        Ok(Arc::new(Self {
            waiting: Mutex::default(),
            readable,
        }))
    }

    fn post(&self, notice: Notice) {
        let mut waiting = lock(&self.waiting);
        waiting.push_back(notice);
        self.readable
            .write(1)
            .expect("a thread holds after its notice, so the counter cannot fill");
    }

    /// The oldest, or `None`.
    pub fn take(&self) -> Option<Notice> {
        let mut waiting = lock(&self.waiting);
        let notice = waiting.pop_front();
        self.settle(&waiting);
        notice
    }

    /// The processors start anew: what became of the guest's until now is forgotten, what the host cannot do is not.
    pub fn forget_the_guests(&self) {
        let mut waiting = lock(&self.waiting);
        waiting.retain(|notice| matches!(notice, Notice::Host(_)));
        self.settle(&waiting);
    }

    /// Nothing to read is what an empty queue looks like.
    fn settle(&self, waiting: &VecDeque<Notice>) {
        if waiting.is_empty() {
            let _ = self.readable.read();
        }
    }
}

impl AsRawFd for Notices {
    fn as_raw_fd(&self) -> RawFd {
        self.readable.as_raw_fd()
    }
}

/// What the owner and the threads share.
#[derive(Default)]
struct Orders {
    state: Mutex<OrdersState>,
    changed: Condvar,
}

struct OrdersState {
    order: Order,
    /// Counts orders, so that giving the same one twice is seen.
    serial: u64,
    /// Threads that have carried the present order out.
    done: usize,
    /// What went wrong with it, the first of all.
    failed: Option<HostError>,
}

impl Default for OrdersState {
    fn default() -> Self {
        Self {
            order: Order::Hold,
            serial: 0,
            done: 0,
            failed: None,
        }
    }
}

impl Orders {
    /// Wait for an order after `seen`.
    fn next(&self, seen: u64) -> (Order, u64) {
        let waits = |state: &mut OrdersState| state.serial == seen;
        let state = self
            .changed
            .wait_while(lock(&self.state), waits)
            .unwrap_or_else(PoisonError::into_inner);
        (state.order, state.serial)
    }

    /// Whether there is an order after `seen`.
    fn waits(&self, seen: u64) -> bool {
        lock(&self.state).serial != seen
    }

    fn carried_out(&self, result: Result<(), HostError>) {
        let mut state = lock(&self.state);
        state.done += 1;
        if let Err(error) = result {
            state.failed.get_or_insert(error);
        }
        self.changed.notify_all();
    }
}

/// One processor before its thread starts.
pub struct Station {
    /// The processor.
    pub vcpu: Vcpu,
    /// The host CPUs its thread may run on.
    pub pinning: Option<CpuSet>,
}

/// All processors' threads.
pub struct Crew {
    orders: Arc<Orders>,
    threads: Vec<(Kick, JoinHandle<()>)>,
    counts: Vec<Arc<ExitCounts>>,
}

impl Crew {
    /// Start a thread for each of `stations`. Each gives its processor the leaves of `model`, puts it into its
    /// power-on state, the boot processor at `entry`, and holds.
    ///
    /// # Errors
    /// The first thing that failed on any of the threads; all of them have ended then.
    pub fn start(
        stations: Vec<Station>,
        model: &Arc<cpuid::Model>,
        msrs: &Arc<[u32]>,
        entry: Entry,
        surroundings: &Arc<Surroundings>,
        notices: &Arc<Notices>,
    ) -> Result<Self, HostError> {
        let mut crew = Self {
            orders: Arc::default(),
            threads: Vec::with_capacity(stations.len()),
            counts: Vec::with_capacity(stations.len()),
        };
        for (index, station) in stations.into_iter().enumerate() {
            let counts = Arc::new(ExitCounts::default());
            let kick = station.vcpu.kick();
            let worker = Worker {
                index,
                vcpu: station.vcpu,
                orders: crew.orders.clone(),
                surroundings: surroundings.clone(),
                notices: notices.clone(),
                counts: counts.clone(),
            };
            let (model, msrs, pinning) = (model.clone(), msrs.clone(), station.pinning);
            let name = format!("vcpu{index}");
            let thread = std::thread::Builder::new()
                .name(name.clone())
                .spawn(move || worker.work(&model, &msrs, pinning.as_ref(), entry))
                .map_err(|source| HostError::new(format!("start the thread {name}"), source))?;
            crew.threads.push((kick, thread));
            crew.counts.push(counts);
        }
        crew.wait()?;
        Ok(crew)
    }

    /// Run the guest on all processors.
    pub fn run(&self) -> Result<(), HostError> {
        self.give(Order::Run)
    }

    /// Stop running the guest; returns when no processor runs it any more.
    pub fn hold(&self) -> Result<(), HostError> {
        self.give(Order::Hold)
    }

    /// Put all processors, which hold, back into their power-on state, and the boot processor at `entry`.
    pub fn reset(&self, entry: Entry) -> Result<(), HostError> {
        self.give(Order::Reset(entry))
    }

    /// What each processor's exits were, in order of vCPUs.
    #[must_use]
    pub fn counts(&self) -> &[Arc<ExitCounts>] {
        &self.counts
    }

    /// Give an order and wait until all threads have carried it out.
    fn give(&self, order: Order) -> Result<(), HostError> {
        self.announce(order);
        self.wait()
    }

    fn announce(&self, order: Order) {
        {
            let mut state = lock(&self.orders.state);
            state.order = order;
            state.serial += 1;
            state.done = 0;
            self.orders.changed.notify_all();
        }
        for (kick, thread) in &self.threads {
            kick.request();
            // A thread that has ended needs no kick; no other failure is possible.
            if let Err(error) = thread.kill(kick_signal()) {
                tracing::debug!(%error, "a processor's thread has ended already");
            }
        }
    }

    fn wait(&self) -> Result<(), HostError> {
        let all = self.threads.len();
        let working = |state: &mut OrdersState| state.done < all;
        let mut state = self
            .orders
            .changed
            .wait_while(lock(&self.orders.state), working)
            .unwrap_or_else(PoisonError::into_inner);
        state.failed.take().map_or(Ok(()), Err)
    }
}

impl Drop for Crew {
    fn drop(&mut self) {
        self.announce(Order::Leave);
        for (_, thread) in self.threads.drain(..) {
            if thread.join().is_err() {
                tracing::error!("a processor's thread panicked");
            }
        }
    }
}

/// What one thread works with.
struct Worker {
    index: usize,
    vcpu: Vcpu,
    orders: Arc<Orders>,
    surroundings: Arc<Surroundings>,
    notices: Arc<Notices>,
    counts: Arc<ExitCounts>,
}

/// How a stretch of running ended.
enum Stopped {
    /// Another order waits.
    Ordered,
    /// The processor cannot go on.
    Unable(Notice),
}

impl Worker {
    /// The thread's life.
    fn work(mut self, model: &cpuid::Model, msrs: &[u32], pinning: Option<&CpuSet>, entry: Entry) {
        let prepared = pin(self.index, pinning).and_then(|()| self.prepare(model, msrs, entry));
        let (result, power_on) = match prepared {
            Ok(power_on) => (Ok(()), Some(power_on)),
            Err(error) => (Err(error), None),
        };
        self.orders.carried_out(result);
        let mut seen = 0;
        loop {
            let (order, serial) = self.orders.next(seen);
            seen = serial;
            self.vcpu.heard_kick();
            match (order, &power_on) {
                (Order::Leave, _) => return self.orders.carried_out(Ok(())),
                (Order::Reset(entry), Some(power_on)) => {
                    let reset = power_on.restore(&self.vcpu).and_then(|()| self.enter(entry));
                    self.orders.carried_out(reset);
                }
                (Order::Run, Some(_)) => {
                    self.orders.carried_out(Ok(()));
                    match self.run(seen) {
                        Stopped::Ordered => {}
                        Stopped::Unable(notice) => self.notices.post(notice),
                    }
                    self.vcpu.resumed();
                }
                // A processor that was never prepared holds whatever is ordered: the machine is being taken
                // down.
                (Order::Hold, _) | (_, None) => self.orders.carried_out(Ok(())),
            }
        }
    }

    /// From a new processor to one that waits at its entry.
    fn prepare(&self, model: &cpuid::Model, msrs: &[u32], entry: Entry) -> Result<PowerOnState, HostError> {
        let vcpu = &self.vcpu;
        vcpu.set_cpuid(&model.leaves(vcpu.apic_id())?)?;
        vcpu.set_msrs(&msr::AT_START)?;
        if model.starts_in_x2apic() {
            let mut sregs = vcpu.sregs()?;
            msr::start_in_x2apic(&mut sregs);
            vcpu.set_sregs(&sregs)?;
        }
        let mut lapic = vcpu.lapic()?;
        msr::wire_local_interrupts(&mut lapic);
        vcpu.set_lapic(&lapic)?;
        let power_on = PowerOnState::record(vcpu, msrs)?;
        self.enter(entry)?;
        Ok(power_on)
    }

    /// The boot processor goes to the entry; the others wait for a start-up message from it.
    fn enter(&self, entry: Entry) -> Result<(), HostError> {
        match self.index {
            0 => entry.apply(&self.vcpu),
            _ => Ok(()),
        }
    }

    /// Run the guest until there is an order after `seen` or the processor cannot go on.
    fn run(&mut self, seen: u64) -> Stopped {
        let around = &*self.surroundings;
        around.milestones.entered();
        loop {
            let exit = match self.vcpu.run() {
                Ok(exit) => exit,
                Err(error) => return Stopped::Unable(Notice::Host(error)),
            };
            let reason = ExitReason::of(&exit);
            self.counts.count(reason);
            if !matches!(reason, ExitReason::Interrupted) {
                around.milestones.exited();
            }
            match exit {
                Exit::PortRead { port, width, data } => {
                    for element in data.chunks_mut(width) {
                        around.ports.read(port.into(), element);
                    }
                }
                Exit::PortWrite { port, width, data } => {
                    for element in data.chunks(width) {
                        around.ports.write(port.into(), element);
                    }
                }
                Exit::MmioRead { at, data } => {
                    if !around.mmio.read(at, data) {
                        tracing::debug!(at = format_args!("{at:#x}"), len = data.len(), "read of nothing");
                    }
                }
                Exit::MmioWrite { at, data } => {
                    if !around.mmio.write(at, data) {
                        tracing::debug!(at = format_args!("{at:#x}"), ?data, "write to nothing");
                    }
                }
                Exit::RamWrite { at, data } => around.watched.store(at, data),
                Exit::Unemulated(instruction) => match self.vcpu.carry_out(&instruction) {
                    Ok(true) => {}
                    Ok(false) => return Stopped::Unable(self.broken(&instruction.to_string())),
                    Err(error) => return Stopped::Unable(Notice::Host(error)),
                },
                Exit::Eoi(vector) => around.eoi.end_of_interrupt(vector),
                Exit::Interrupted | Exit::Halt => {
                    // The kick that came with the present order may arrive after its thread took the order,
                    // and would end every further run at once. Heard before the question, so that the next
                    // order's is not lost.
                    self.vcpu.heard_kick();
                    if self.orders.waits(seen) {
                        return Stopped::Ordered;
                    }
                }
                Exit::SystemEvent(kind) => {
                    guest_warn!(
                        vcpu = self.index,
                        kind,
                        "the guest asked its hypervisor for what a PC has not"
                    );
                }
                Exit::TripleFault => return Stopped::Unable(Notice::TripleFault { vcpu: self.index }),
                Exit::Broken(what) => return Stopped::Unable(self.broken(&what)),
            }
        }
    }

    /// The processor cannot go on because of `what`.
    fn broken(&self, what: &str) -> Notice {
        Notice::Broken {
            vcpu: self.index,
            what: format!("{what}; {}", self.vcpu.registers()),
        }
    }
}

/// Keep this thread, of vCPU `index`, on the host CPUs `cpus`.
fn pin(index: usize, cpus: Option<&CpuSet>) -> Result<(), HostError> {
    let Some(cpus) = cpus else { return Ok(()) };
    let refused =
        |source: std::io::Error| HostError::new(format!("pin vCPU {index} to host CPUs {cpus}"), source);
    let mut mask = rustix::thread::CpuSet::new();
    for cpu in cpus.iter() {
        let cpu = usize::try_from(cpu)
            .ok()
            .filter(|cpu| *cpu < rustix::thread::CpuSet::MAX_CPU);
        let cpu = cpu.ok_or_else(|| {
            refused(std::io::Error::other(format!(
                "host CPU numbers end at {}",
                rustix::thread::CpuSet::MAX_CPU - 1
            )))
        })?;
        mask.set(cpu);
    }
    sched_setaffinity(None, &mask).map_err(|error| refused(error.into()))
}

#[cfg(test)]
mod tests {
    use std::io;

    use super::*;

    #[test]
    fn pinning_to_a_cpu_no_host_has_names_vcpu_and_cpus() {
        let cpus = CpuSet::new([1, 5000]).expect("not empty");
        let error = pin(3, Some(&cpus)).expect_err("beyond any host");
        assert_eq!(error.to_string(), "cannot pin vCPU 3 to host CPUs 1,5000");
    }

    #[test]
    fn a_notice_makes_the_descriptor_readable_until_it_is_taken() {
        let notices = Notices::new().expect("an eventfd");
        notices.post(Notice::TripleFault { vcpu: 1 });
        notices.post(Notice::TripleFault { vcpu: 2 });
        assert!(matches!(notices.take(), Some(Notice::TripleFault { vcpu: 1 })));
        assert!(matches!(notices.take(), Some(Notice::TripleFault { vcpu: 2 })));
        assert!(notices.readable.read().is_err());
        assert!(notices.take().is_none());
    }

    #[test]
    fn processors_that_start_anew_leave_the_hosts_troubles() {
        let notices = Notices::new().expect("an eventfd");
        let what = "cannot be run".to_owned();
        notices.post(Notice::Broken { vcpu: 0, what });
        notices.post(Notice::Host(HostError::new(
            "run a processor",
            io::Error::other("no"),
        )));
        notices.post(Notice::TripleFault { vcpu: 1 });
        notices.forget_the_guests();
        assert!(notices.readable.read().is_ok());
        assert!(matches!(notices.take(), Some(Notice::Host(_))));
        assert!(notices.take().is_none());
    }

    #[test]
    fn an_order_is_seen_once_even_when_it_repeats() {
        let orders = Orders::default();
        assert!(!orders.waits(0));
        lock(&orders.state).serial = 1;
        assert_eq!(orders.next(0), (Order::Hold, 1));
        assert!(!orders.waits(1));
        lock(&orders.state).serial = 2;
        assert!(orders.waits(1));
    }
}
