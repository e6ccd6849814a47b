//! One virtual processor: run until an exit, and exits as data.

use std::fmt::{self, Write as _};
use std::io;
use std::sync::atomic::AtomicBool;
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

use kvm_bindings::nested::KvmNestedStateBuffer;
use kvm_bindings::{
    CpuId, KVM_MP_STATE_RUNNABLE, KVM_MP_STATE_UNINITIALIZED, KVM_STATE_NESTED_GUEST_MODE, Msrs,
    kvm_debugregs, kvm_fpu, kvm_lapic_state, kvm_mp_state, kvm_msr_entry, kvm_regs, kvm_sregs,
    kvm_vcpu_events, kvm_xcrs,
};
use kvm_ioctls::{VcpuExit, VcpuFd};

use super::cmpxchg16b::{Cmpxchg16b, OPERAND, Place, in_64_bit_mode, numbered};
use super::gate::{Passage, Stop};
use super::os;
use super::sys::{self, CoalescedRing, InternalError, RunArea};
use super::vm::Machine;
use crate::platform::addr::Gpa;
use crate::platform::host::HostError;

/// The time stamp counter. It keeps running over a reset: processors reset one after the other and would
/// otherwise no longer agree.
const IA32_TSC: u32 = 0x10;

/// Why the guest stopped running. What the guest reads is written through the borrow before the next run.
#[derive(Debug)]
pub enum Exit<'a> {
    /// `IN`, or `INS` with several elements.
    PortRead {
        /// First port.
        port: u16,
        /// Bytes per element: 1, 2 or 4.
        width: usize,
        /// To be filled, a whole number of elements.
        data: &'a mut [u8],
    },
    /// `OUT`, or `OUTS` with several elements.
    PortWrite {
        /// First port.
        port: u16,
        /// Bytes per element: 1, 2 or 4.
        width: usize,
        /// A whole number of elements.
        data: &'a [u8],
    },
    /// A read where there is no RAM.
    MmioRead {
        /// Guest physical address.
        at: u64,
        /// To be filled, 1 to 8 bytes.
        data: &'a mut [u8],
    },
    /// A write where there is no RAM.
    MmioWrite {
        /// Guest physical address.
        at: u64,
        /// 1 to 8 bytes.
        data: &'a [u8],
    },
    /// A write where there is RAM, which the guest could only read when it wrote: for
    /// [`WatchedPages::store`](super::WatchedPages::store).
    RamWrite {
        /// Guest physical address.
        at: Gpa,
        /// 1 to 8 bytes.
        data: &'a [u8],
    },
    /// An instruction that KVM does not emulate: for [`Vcpu::carry_out`].
    Unemulated(Unemulated),
    /// A level-triggered interrupt of this vector ended.
    Eoi(u8),
    /// The processor halted outside the kernel's local APIC.
    Halt,
    /// A kick, a signal, or nothing to do yet: look for requests and run again.
    Interrupted,
    /// A triple fault: on a PC, a reset.
    TripleFault,
    /// The guest asked its hypervisor for something: KVM_SYSTEM_EVENT_*.
    SystemEvent(u32),
    /// The processor's state cannot be entered, or KVM met what it cannot handle. Says what the kernel says;
    /// [`Vcpu::registers`] tells the rest.
    Broken(String),
}

/// An instruction that KVM handed over because it does not emulate it. Displayed, it is what KVM says.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Unemulated {
    /// As many bytes as KVM had fetched: none, or up to 15, the next instruction's among them.
    code: Vec<u8>,
    what: String,
}

impl fmt::Display for Unemulated {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.what)
    }
}

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

/// KVM_INTERNAL_ERROR_EMULATION: an instruction that KVM does not emulate.
const EMULATION: u32 = 1;

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

impl Vcpu {
    pub(super) fn new(machine: &Arc<Machine>, apic_id: u32, run_area: usize) -> Result<Self, HostError> {
        let refused = |source| HostError::new(format!("create the processor with APIC ID {apic_id}"), source);
        let fd = machine
            .fd
            .create_vcpu(u64::from(apic_id))
            .map_err(|error| refused(os(error)))?;
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
                    return Ok(Exit::Unemulated(Unemulated {
                        code: code(&error),
                        what: describe(&error),
                    }));
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
        let Some(decoded) = Cmpxchg16b::decode(&instruction.code) else {
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

/// The bytes that KVM_INTERNAL_ERROR_EMULATION carries when its flag bit 0 is set (Documentation/virt/kvm/api.rst, 5
/// "The `kvm_run` structure"): a length, and as many of 15. None otherwise.
fn code(error: &InternalError) -> Vec<u8> {
    match error.data.get(..error.valid).unwrap_or_default() {
        [flags, rest @ ..] if error.suberror == EMULATION && flags & 1 != 0 => {
            let mut bytes = rest.iter().flat_map(|word| word.to_le_bytes());
            let len = bytes.next().map_or(0, usize::from);
            bytes.take(len.min(15)).collect()
        }
        _ => Vec::new(),
    }
}

/// What KVM_EXIT_INTERNAL_ERROR says, for the log.
fn describe(error: &InternalError) -> String {
    let words = error.data.get(..error.valid).unwrap_or_default();
    let kind = match error.suberror {
        EMULATION => "KVM cannot emulate an instruction".to_owned(),
        2 => "KVM met a fault while it delivered an event".to_owned(),
        3 => "an event could not be delivered because of an unexpected exit".to_owned(),
        4 => "the processor gave an exit KVM does not know".to_owned(),
        other => format!("KVM gave internal error {other}"),
    };
    let code = code(error);
    if code.is_empty() {
        return format!("{kind}, details {words:x?}");
    }
    let mut text = format!("{kind}:");
    for byte in code {
        write!(text, " {byte:02x}").expect("a string takes all text");
    }
    text
}

/// Everything of a processor that a reset puts back, as it was when the processor was made.
///
/// Recording what the kernel itself made of a new processor, instead of a table of reset values, covers
/// every register the kernel knows, those of later kernels included.
pub struct PowerOnState {
    boot_processor: bool,
    regs: kvm_regs,
    sregs: kvm_sregs,
    fpu: kvm_fpu,
    xcrs: kvm_xcrs,
    debug: kvm_debugregs,
    events: kvm_vcpu_events,
    lapic: Box<kvm_lapic_state>,
    msrs: Vec<kvm_msr_entry>,
}

impl PowerOnState {
    /// The state of `vcpu`, which has its CPUID leaves and has not run, with the model-specific registers
    /// among `msrs` that it has.
    pub fn record(vcpu: &Vcpu, msrs: &[u32]) -> Result<Self, HostError> {
        let fd = &vcpu.fd;
        let read = |error| vcpu.refused("record the power-on state", error);
        let mut recorded = Vec::with_capacity(msrs.len());
        let mut rest: Vec<u32> = msrs.iter().copied().filter(|msr| *msr != IA32_TSC).collect();
        while !rest.is_empty() {
            let entries: Vec<_> = rest.iter().map(|&index| msr_entry(index, 0)).collect();
            let mut list = Msrs::from_entries(&entries).expect("an MSR list holds more than there are MSRs");
            let done = fd.get_msrs(&mut list).map_err(read)?;
            recorded.extend(list.as_slice().iter().take(done));
            // The kernel stops at the first it does not have for this processor; go on behind that one.
            rest.drain(..rest.len().min(done + 1));
        }
        Ok(Self {
            boot_processor: vcpu.apic_id == 0,
            regs: fd.get_regs().map_err(read)?,
            sregs: fd.get_sregs().map_err(read)?,
            fpu: fd.get_fpu().map_err(read)?,
            xcrs: fd.get_xcrs().map_err(read)?,
            debug: fd.get_debug_regs().map_err(read)?,
            events: fd.get_vcpu_events().map_err(read)?,
            lapic: Box::new(fd.get_lapic().map_err(read)?),
            msrs: recorded,
        })
    }

    /// Put `vcpu`, which must be the one recorded and not be running, back into that state.
    pub fn restore(&self, vcpu: &Vcpu) -> Result<(), HostError> {
        let fd = &vcpu.fd;
        let write = |error| vcpu.refused("reset", error);
        let state = match self.boot_processor {
            true => KVM_MP_STATE_RUNNABLE,
            false => KVM_MP_STATE_UNINITIALIZED,
        };
        // System registers first: clearing EFER.SVME takes the processor out of a guest of its own, and the
        // APIC base must be back before the APIC's registers. Events last: they depend on all else.
        fd.set_sregs(&self.sregs).map_err(write)?;
        fd.set_regs(&self.regs).map_err(write)?;
        fd.set_fpu(&self.fpu).map_err(write)?;
        fd.set_xcrs(&self.xcrs).map_err(write)?;
        fd.set_debug_regs(&self.debug).map_err(write)?;
        let mut rest = self.msrs.as_slice();
        while !rest.is_empty() {
            let done = vcpu.write_msrs(rest)?;
            // Some that can be read cannot be written, by the host either.
            if let Some(refused) = rest.get(done) {
                tracing::debug!(
                    msr = format_args!("{:#x}", refused.index),
                    "a model-specific register keeps its value over a reset"
                );
            }
            rest = rest.get(done + 1..).unwrap_or_default();
        }
        fd.set_lapic(&self.lapic).map_err(write)?;
        fd.set_mp_state(kvm_mp_state { mp_state: state }).map_err(write)?;
        fd.set_vcpu_events(&self.events).map_err(write)
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

    #[test]
    fn an_instruction_that_cannot_be_emulated_is_shown_in_bytes() {
        let mut data = [0; 16];
        data[0] = 1;
        data[1] = u64::from_le_bytes([5, 0xf0, 0x48, 0x0f, 0xc7, 0x0f, 0x90, 0x90]);
        let text = describe(&InternalError {
            suberror: 1,
            data,
            valid: 4,
        });
        assert_eq!(text, "KVM cannot emulate an instruction: f0 48 0f c7 0f");
    }

    #[test]
    fn an_internal_error_without_bytes_shows_its_words() {
        let mut data = [0; 16];
        data[..2].copy_from_slice(&[0x80, 0xff]);
        let text = describe(&InternalError {
            suberror: 9,
            data,
            valid: 2,
        });
        assert_eq!(text, "KVM gave internal error 9, details [80, ff]");
    }

    #[test]
    fn a_length_byte_larger_than_the_bytes_is_harmless() {
        let mut data = [0; 16];
        data[..2].copy_from_slice(&[1, 0xff]);
        let text = describe(&InternalError {
            suberror: 1,
            data,
            valid: 2,
        });
        assert_eq!(text, "KVM cannot emulate an instruction: 00 00 00 00 00 00 00");
    }
}
