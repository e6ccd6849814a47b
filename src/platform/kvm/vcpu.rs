//! One virtual processor: run until an exit.

mod exit;
mod power_on;

pub use exit::{Exit, Unemulated};
pub use power_on::PowerOnState;

use std::io;
use std::sync::atomic::AtomicBool;
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

use kvm_bindings::nested::KvmNestedStateBuffer;
use kvm_bindings::{
    CpuId, KVM_STATE_NESTED_GUEST_MODE, Msrs, kvm_lapic_state, kvm_msr_entry, kvm_regs, kvm_sregs,
};
use kvm_ioctls::{VcpuExit, VcpuFd};

use super::cmpxchg16b::{Cmpxchg16b, OPERAND, Place, in_64_bit_mode, numbered};
use super::gate::{Passage, Stop};
use super::os;
use super::sys::{self, CoalescedRing, RunArea};
use super::vm::Machine;
use crate::platform::addr::Gpa;
use crate::platform::host::HostError;
use exit::{EMULATION, describe};

/// A virtual processor. Its requests must come from the thread that runs it.
pub struct Vcpu {
    fd: VcpuFd,
    area: Arc<RunArea>,
    apic_id: u32,
    reentries: Reentries,
    passage: Arc<Passage>,
    /// The thread that runs it, once one does.
    thread: Arc<OnceLock<i32>>,
    /// Keeps the machine, and with it the guest's RAM, while this processor can run.
    machine: Arc<Machine>,
}

/// Stops a processor while memory slots change.
struct Interruption {
    area: Arc<RunArea>,
    thread: Arc<OnceLock<i32>>,
}

impl Stop for Interruption {
    fn stop(&self) {
        self.area.set_immediate_exit(true);
        if let Some(thread) = self.thread.get() {
            sys::signal_thread(*thread, kick_signal());
        }
    }
}

/// KVM_INTERNAL_ERROR_DELIVERY_EV: an access that KVM must emulate, while the processor says that it delivers
/// an event.
const DELIVERY_EVENT: u32 = 3;

/// Entries per second that [`DELIVERY_EVENT`] may cost.
const MOST_REENTRIES: u32 = 100;

/// Limits how often a processor is entered again after [`DELIVERY_EVENT`].
///
/// KVM keeps the event and delivers it at the next entry, after which the access is made again. A processor
/// that is itself a software model reports events as not delivered that were; the guest takes one interrupt
/// too many then. Only a guest whose interrupt table or stack is no memory comes back for ever.
#[derive(Debug, Default)]
struct Reentries {
    since: Option<Instant>,
    count: u32,
}

impl Reentries {
    /// Whether one more at `now` is within the limit.
    fn admit(&mut self, now: Instant) -> bool {
        let second = Duration::from_secs(1);
        match self.since {
            Some(since) if now.saturating_duration_since(since) < second => {
                self.count = self.count.saturating_add(1);
            }
            _ => {
                *self = Self {
                    since: Some(now),
                    count: 1,
                }
            }
        }
        self.count <= MOST_REENTRIES
    }
}

/// Makes a processor return from its run, from any thread.
#[derive(Clone)]
pub struct Kick(Arc<RunArea>);

impl Kick {
    /// The processor's next run returns [`Exit::Interrupted`] without entering the guest. One that is in the
    /// guest now must also be sent [`kick_signal`]; whichever comes first, none is lost.
    pub fn request(&self) {
        self.0.set_immediate_exit(true);
    }
}

/// The signal that interrupts a run.
#[must_use]
pub fn kick_signal() -> i32 {
    vmm_sys_util::signal::SIGRTMIN()
}

/// Let [`kick_signal`] interrupt system calls of this process instead of ending it.
pub fn allow_kicks() -> Result<(), HostError> {
    let seen = Arc::new(AtomicBool::new(false));
    signal_hook::flag::register(kick_signal(), seen)
        .map(drop)
        .map_err(|source| HostError::new(format!("handle signal {}", kick_signal()), source))
}

/// Have the TSC of a new processor, whose file is `fd`, run as fast as the host's.
///
/// KVM makes processors with the frequency that it met when it was loaded. Where the host has measured its TSC better since, by more
/// than 250 in a million, and the processor scales none, KVM refuses its own number and is left with a scale of zero: it takes
/// the guest's TSC to stand still at zero, and each TSC deadline comes as much later as the host has been up. 0 stands for
/// what the host goes by now.
fn run_at_the_hosts_tsc_frequency(fd: &VcpuFd, apic_id: u32) {
    if let Err(error) = fd.set_tsc_khz(0) {
        tracing::warn!(apic_id, %error, "the host does not set a processor's TSC to its own frequency; the guest's timers may come late");
    }
}

impl Vcpu {
    pub(super) fn new(machine: &Arc<Machine>, apic_id: u32, run_area: usize) -> Result<Self, HostError> {
        let refused = |source| HostError::new(format!("create the processor with APIC ID {apic_id}"), source);
        let fd = machine
            .fd
            .create_vcpu(u64::from(apic_id))
            .map_err(|error| refused(os(error)))?;
        run_at_the_hosts_tsc_frequency(&fd, apic_id);
        let area = Arc::new(RunArea::map(&fd, run_area).map_err(refused)?);
        let thread = Arc::new(OnceLock::new());
        let passage = machine.watched.gate().passage(Box::new(Interruption {
            area: area.clone(),
            thread: thread.clone(),
        }));
        Ok(Self {
            fd,
            area,
            apic_id,
            reentries: Reentries::default(),
            passage,
            thread,
            machine: machine.clone(),
        })
    }

    /// Its APIC ID.
    #[must_use]
    pub fn apic_id(&self) -> u32 {
        self.apic_id
    }

    /// The ring of guest writes that its machine's kernel part puts aside.
    pub(super) fn coalesced_ring(&self) -> io::Result<CoalescedRing> {
        CoalescedRing::map(&self.fd)
    }

    /// The means to stop it from other threads.
    #[must_use]
    pub fn kick(&self) -> Kick {
        Kick(self.area.clone())
    }

    /// Kicks up to now have been heard: run again.
    pub fn heard_kick(&self) {
        self.area.set_immediate_exit(false);
    }

    /// Go where memory slots do not change until [`super::gate::Gate::leave`].
    fn enter(&self) -> Result<(), HostError> {
        self.thread.get_or_init(sys::this_thread);
        self.machine
            .watched
            .gate()
            .enter(&self.passage)
            .map_err(|jammed| {
                let what = format!("run the processor with APIC ID {}", self.apic_id);
                HostError::new(what, io::Error::other(&*jammed.0))
            })
    }

    /// Run the guest until it needs us. Waits while memory slots change.
    ///
    /// # Errors
    /// When the host cannot run it, RAM that cannot be backed included.
    pub fn run(&mut self) -> Result<Exit<'_>, HostError> {
        self.enter()?;
        let (area, apic_id, watched) = (&self.area, self.apic_id, &self.machine.watched);
        let result = self.fd.run();
        watched.gate().leave(&self.passage);
        let exit = match result {
            Ok(exit) => exit,
            Err(error) => {
                let error = os(error);
                return match error.kind() {
                    io::ErrorKind::Interrupted | io::ErrorKind::WouldBlock => Ok(Exit::Interrupted),
                    _ => Err(HostError::new(
                        format!("run the processor with APIC ID {apic_id}"),
                        error,
                    )),
                };
            }
        };
        let broken = match exit {
            VcpuExit::IoIn(port, data) => {
                let width = area.io_width();
                return Ok(Exit::PortRead { port, width, data });
            }
            VcpuExit::IoOut(port, data) => {
                let width = area.io_width();
                return Ok(Exit::PortWrite { port, width, data });
            }
            VcpuExit::MmioRead(at, data) => return Ok(Exit::MmioRead { at, data }),
            VcpuExit::MmioWrite(at, data) if watched.has(Gpa(at), data.len()) => {
                return Ok(Exit::RamWrite { at: Gpa(at), data });
            }
            VcpuExit::MmioWrite(at, data) => return Ok(Exit::MmioWrite { at, data }),
            VcpuExit::IoapicEoi(vector) => return Ok(Exit::Eoi(vector)),
            VcpuExit::Hlt => return Ok(Exit::Halt),
            VcpuExit::Intr => return Ok(Exit::Interrupted),
            VcpuExit::Shutdown => return Ok(Exit::TripleFault),
            VcpuExit::SystemEvent(kind, _) => return Ok(Exit::SystemEvent(kind)),
            VcpuExit::FailEntry(reason, cpu) => {
                format!("the processor refused to enter the guest, reason {reason:#x} on host CPU {cpu}")
            }
            VcpuExit::InternalError => {
                let error = area.internal_error();
                if error.suberror == DELIVERY_EVENT && self.reentries.admit(Instant::now()) {
                    tracing::debug!(apic_id, "an event waits for an access: entering again");
                    return Ok(Exit::Interrupted);
                }
                if error.suberror == EMULATION {
                    return Ok(Exit::Unemulated(Unemulated::new(&error)));
                }
                describe(&error)
            }
            VcpuExit::MemoryFault { gpa, size, .. } => {
                format!("{size} bytes of guest memory at {gpa:#x} cannot be reached")
            }
            other => format!("KVM gave an exit this program did not ask for: {other:?}"),
        };
        Ok(Exit::Broken(broken))
    }

    /// Do what `instruction`, which the last exit handed over, would have done. `false` when nothing here can, and the
    /// processor cannot go on.
    ///
    /// That is CMPXCHG16B on RAM, whether the page is still watched or not. Whether the guest may write there needs no
    /// look: its own tables are checked before the host's, and only the host's refused. What an instruction leaves
    /// besides its result, a single-step trap, is left out. Everything else becomes #UD, as it does without this,
    /// unless the guest's kernel executed it.
    ///
    /// # Errors
    /// When the host hands out no registers or takes none.
    pub fn carry_out(&self, instruction: &Unemulated) -> Result<bool, HostError> {
        if !self.machine.watched.enabled() {
            return Ok(false);
        }
        let (sregs, nested) = (self.sregs()?, self.runs_nested_guest());
        if !nested && in_64_bit_mode(&sregs) && self.compare_exchange(instruction, &sregs)? {
            return Ok(true);
        }
        // SS holds the privilege level.
        if !nested && sregs.ss.dpl == 0 {
            return Ok(false);
        }
        tracing::debug!(apic_id = self.apic_id, %instruction, "the guest gets #UD");
        self.raise_undefined_opcode()?;
        Ok(true)
    }

    /// Carry `instruction` out if it is a CMPXCHG16B on RAM.
    fn compare_exchange(&self, instruction: &Unemulated, sregs: &kvm_sregs) -> Result<bool, HostError> {
        let Some(decoded) = Cmpxchg16b::decode(instruction.code()) else {
            return Ok(false);
        };
        let read = |error| self.refused("read the registers", error);
        let mut regs = self.fd.get_regs().map_err(read)?;
        let address = decoded.address(&Place {
            registers: &numbered(&regs),
            rip: regs.rip,
            fs: sregs.fs.base,
            gs: sregs.gs.base,
        });
        // The guest's tables are read through memory slots.
        self.enter()?;
        let translated = self.fd.translate_gva(address);
        self.machine.watched.gate().leave(&self.passage);
        let translated = translated.map_err(|error| self.refused("translate an address", error))?;
        // One that is not aligned is #GP on a processor, before any other fault.
        if translated.valid == 0 || !address.is_multiple_of(OPERAND) {
            return Ok(false);
        }
        let (expected, replacement) = (Cmpxchg16b::expected(&regs), Cmpxchg16b::replacement(&regs));
        let at = Gpa(translated.physical_address);
        let found = self.machine.watched.compare_exchange(at, expected, replacement);
        let Some(found) = found else { return Ok(false) };
        decoded.complete(&mut regs, found);
        self.set_regs(&regs)?;
        Ok(true)
    }

    /// Whether the guest runs a guest of its own at the moment.
    fn runs_nested_guest(&self) -> bool {
        let mut state = KvmNestedStateBuffer::empty();
        // A host that cannot tell has none.
        let told = self.fd.nested_state(&mut state).is_ok();
        told && u32::from(state.flags) & KVM_STATE_NESTED_GUEST_MODE != 0
    }

    /// The guest finds #UD where it is.
    fn raise_undefined_opcode(&self) -> Result<(), HostError> {
        const INVALID_OPCODE: u8 = 6;
        let refused = |error| self.refused("raise #UD", error);
        let mut events = self.fd.get_vcpu_events().map_err(refused)?;
        events.exception.injected = 1;
        events.exception.nr = INVALID_OPCODE;
        events.exception.has_error_code = 0;
        self.fd.set_vcpu_events(&events).map_err(refused)
    }

    /// The registers that matter for a post-mortem, in one line.
    #[must_use]
    pub fn registers(&self) -> String {
        let (Ok(r), Ok(s)) = (self.fd.get_regs(), self.fd.get_sregs()) else {
            return "its registers cannot be read".to_owned();
        };
        format!(
            "rip={:#x} rsp={:#x} rflags={:#x} rax={:#x} rbx={:#x} rcx={:#x} rdx={:#x} rsi={:#x} rdi={:#x} \
             cs={:#x}/{:#x} cr0={:#x} cr2={:#x} cr3={:#x} cr4={:#x} efer={:#x}",
            r.rip,
            r.rsp,
            r.rflags,
            r.rax,
            r.rbx,
            r.rcx,
            r.rdx,
            r.rsi,
            r.rdi,
            s.cs.selector,
            s.cs.base,
            s.cr0,
            s.cr2,
            s.cr3,
            s.cr4,
            s.efer,
        )
    }

    /// Show the guest these CPUID leaves.
    pub fn set_cpuid(&self, leaves: &CpuId) -> Result<(), HostError> {
        self.fd
            .set_cpuid2(leaves)
            .map_err(|error| self.refused("set the CPUID leaves", error))
    }

    /// The TSC's frequency in kHz.
    pub fn tsc_khz(&self) -> Result<u32, HostError> {
        self.fd
            .get_tsc_khz()
            .map_err(|error| self.refused("read the TSC frequency", error))
    }

    /// General registers.
    pub fn set_regs(&self, regs: &kvm_regs) -> Result<(), HostError> {
        self.fd
            .set_regs(regs)
            .map_err(|error| self.refused("set the registers", error))
    }

    /// Segments, control registers and tables.
    pub fn sregs(&self) -> Result<kvm_sregs, HostError> {
        self.fd
            .get_sregs()
            .map_err(|error| self.refused("read the system registers", error))
    }

    /// Segments, control registers and tables.
    pub fn set_sregs(&self, sregs: &kvm_sregs) -> Result<(), HostError> {
        self.fd
            .set_sregs(sregs)
            .map_err(|error| self.refused("set the system registers", error))
    }

    /// The local APIC's register page.
    pub fn lapic(&self) -> Result<kvm_lapic_state, HostError> {
        self.fd
            .get_lapic()
            .map_err(|error| self.refused("read the local APIC", error))
    }

    /// The local APIC's register page.
    pub fn set_lapic(&self, lapic: &kvm_lapic_state) -> Result<(), HostError> {
        self.fd
            .set_lapic(lapic)
            .map_err(|error| self.refused("set the local APIC", error))
    }

    /// Write model-specific registers; one that the kernel does not take is an error.
    pub fn set_msrs(&self, msrs: &[(u32, u64)]) -> Result<(), HostError> {
        let entries: Vec<_> = msrs.iter().map(|&(index, data)| msr_entry(index, data)).collect();
        let written = self.write_msrs(&entries)?;
        let Some((index, data)) = msrs.get(written) else {
            return Ok(());
        };
        Err(HostError::new(
            format!(
                "set MSR {index:#x} to {data:#x} on the processor with APIC ID {}",
                self.apic_id
            ),
            io::Error::from(io::ErrorKind::InvalidInput),
        ))
    }

    /// How many of `entries`, from the first, the kernel took.
    fn write_msrs(&self, entries: &[kvm_msr_entry]) -> Result<usize, HostError> {
        let list = Msrs::from_entries(entries).expect("an MSR list holds more than there are MSRs");
        self.fd
            .set_msrs(&list)
            .map_err(|error| self.refused("set model-specific registers", error))
    }

    /// Tell the guest that it was stopped for a while, so that its watchdogs do not bark. A guest without
    /// kvmclock is not told.
    pub fn resumed(&self) {
        if let Err(error) = self.fd.kvmclock_ctrl() {
            tracing::debug!(apic_id = self.apic_id, error = %os(error), "the guest has no kvmclock to be told of a pause");
        }
    }

    fn refused(&self, action: &str, error: kvm_ioctls::Error) -> HostError {
        HostError::new(
            format!("{action} of the processor with APIC ID {}", self.apic_id),
            os(error),
        )
    }
}

fn msr_entry(index: u32, data: u64) -> kvm_msr_entry {
    kvm_msr_entry {
        index,
        data,
        ..Default::default()
    }
}

impl Drop for Vcpu {
    fn drop(&mut self) {
        self.machine.watched.gate().forget(&self.passage);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_event_that_never_arrives_is_given_up_and_rare_ones_are_not() {
        let (mut reentries, start) = (Reentries::default(), Instant::now());
        let at = |milliseconds| start + Duration::from_millis(milliseconds);
        assert!((0..100).all(|_| reentries.admit(at(5))));
        assert!(!reentries.admit(at(6)));
        assert!((1..1000).all(|second| reentries.admit(at(second * 1000 + 5))));
    }
}
