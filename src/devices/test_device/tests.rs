//! The whole way of a driver: registers, a command, memory, the interrupt, reset.

use std::sync::Mutex;
use std::sync::mpsc::{Receiver, Sender, channel};

use proptest::prelude::*;
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap, Permissions};

use super::*;
use crate::pci::testing::Messages;
use crate::platform::addr::{Bdf, Gpa, Iova};
use crate::platform::dma::{Requester, Run, Translations, Translator};
use crate::platform::irq::InterruptController;
use crate::platform::memory::GuestRam;

/// Remembers every change of the wire.
#[derive(Default)]
struct Wire(Mutex<Vec<bool>>);

impl InterruptController for Wire {
    fn line_changed(&self, _gsi: u32, asserted: bool) {
        self.0.lock().expect("not poisoned").push(asserted);
    }
    fn pulse(&self, _gsi: u32) {}
}

impl Wire {
    fn take(&self) -> Vec<bool> {
        std::mem::take(&mut self.0.lock().expect("not poisoned"))
    }
}

const RAM: u64 = 1 << 20;

/// A test device with 1 MiB of memory to work on.
struct Machine {
    device: Arc<TestDevice>,
    messages: Arc<Messages>,
    wire: Arc<Wire>,
    dma: Dma,
}

fn machine_of(msix_vectors: u16, wired: bool) -> Machine {
    machine_with(msix_vectors, wired, Dma::new)
}

fn machine_with(
    msix_vectors: u16,
    wired: bool,
    dma: impl FnOnce(Arc<Requester>, GuestRam) -> Dma,
) -> Machine {
    let messages = Messages::new();
    let wire = Arc::new(Wire::default());
    let ram = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 1 << 20)]).expect("memory");
    let dma = dma(messages.requester().clone(), GuestRam::new(ram));
    let device = TestDevice::new(TestDeviceParts {
        name: "test0".to_owned(),
        msix_vectors,
        dma: dma.clone(),
        msi: messages.port(),
        intx: wired.then(|| (Pin::A, IrqLine::new(wire.clone(), 16))),
        on_root_bus: false,
        agent: None,
    })
    .expect("a thread");
    Machine {
        device,
        messages,
        wire,
        dma,
    }
}

fn machine() -> Machine {
    machine_of(32, true)
}

const READ: u32 = 0x8;
const WRITE: u32 = 0x10;
const COPY: u32 = 0x20;

impl Machine {
    fn get(&self, register: Reg) -> u32 {
        let mut data = [0; 4];
        self.device.bar_read(0, register.offset(), &mut data);
        u32::from_le_bytes(data)
    }

    fn set(&self, register: Reg, value: u32) {
        self.device.bar_write(0, register.offset(), &value.to_le_bytes());
    }

    fn status(&self) -> Status {
        Status::from_bits_retain(self.get(Reg::Status))
    }

    fn aim(&self, from: u64, to: u64, len: u32) {
        self.device
            .bar_write(0, Reg::SourceLow.offset(), &from.to_le_bytes());
        self.device
            .bar_write(0, Reg::DestinationLow.offset(), &to.to_le_bytes());
        self.set(Reg::Size, len);
    }

    fn interrupt_by(&self, irq_type: IrqType, number: u32) {
        self.set(Reg::IrqType, irq_type.0);
        self.set(Reg::IrqNumber, number);
    }

    /// Have `command` carried out, without a look at the status.
    fn run(&self, command: u32) {
        self.set(Reg::Command, command);
        self.device.settle();
    }

    /// The offset of the capability with this identity, in dwords.
    fn capability(&self, id: u8) -> u16 {
        let start = self.device.config_read(13).to_le_bytes()[0];
        let mut chain = std::iter::successors(Some(start), |at| {
            Some(self.device.config_read(u16::from(*at) / 4).to_le_bytes()[1])
        });
        let found = chain.find(|at| self.device.config_read(u16::from(*at) / 4).to_le_bytes()[0] == id);
        u16::from(found.expect("a capability")) / 4
    }

    fn configure(&self, dword: u16, value: u32) {
        let _effect = self.device.config_write(dword, DwordWrite::whole(value));
    }

    /// MSI on, with 2 to the power of `exponent` vectors from data 0x4040 on.
    fn enable_msi(&self, exponent: u32) {
        let at = self.capability(0x05);
        self.configure(at + 1, 0xfee0_0000);
        self.configure(at + 3, 0x4040);
        self.configure(at, exponent << 20 | 1 << 16);
    }

    /// MSI-X on, with every vector unmasked and its number as its data.
    fn enable_msix(&self, vectors: u16) {
        for vector in 0..vectors {
            let entry = u64::from(MSIX_TABLE) + u64::from(vector) * 16;
            self.device.bar_write(0, entry, &0xfee0_0000_u64.to_le_bytes());
            let data = u64::from(vector);
            self.device.bar_write(0, entry + 8, &data.to_le_bytes());
        }
        self.configure(self.capability(0x11), 1 << 31);
    }

    fn fill(&self, at: u64, bytes: &[u8]) {
        self.dma
            .view()
            .write_slice(bytes, GuestAddress(at))
            .expect("memory");
    }

    fn bytes(&self, at: u64, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        self.dma
            .view()
            .read_slice(&mut bytes, GuestAddress(at))
            .expect("memory");
        bytes
    }
}

#[test]
fn linux_finds_a_function_it_knows() {
    let machine = machine();
    assert_eq!(machine.device.config_read(0), 0x002d_1912);
    assert_eq!(machine.device.config_read(2), 0xff00_0000);
    assert_eq!(machine.device.config_read(15) >> 8, 1);
    let sizes: Vec<_> = machine
        .device
        .bars()
        .iter()
        .map(|bar| (bar.index, bar.size))
        .collect();
    assert_eq!(
        sizes,
        [(0, 0x1_0000), (1, 0x100), (2, 0x4000), (4, 0x1000), (5, 0x400)]
    );
    let control = |id| machine.device.config_read(machine.capability(id)) >> 16;
    // 32 MSI vectors with 64-bit addresses and masks; 32 MSI-X vectors.
    assert_eq!((control(0x05), control(0x11)), (0x018a, 31));
}

#[test]
fn the_largest_msix_table_fits_beside_the_registers() {
    let machine = machine_of(MOST_MSIX_VECTORS, true);
    machine.enable_msix(MOST_MSIX_VECTORS);
    machine.interrupt_by(IrqType::MSIX, 2048);
    machine.run(0x4);
    assert_eq!(machine.status(), Status::IRQ_RAISED);
    let routes = machine.messages.routes();
    assert_eq!(routes.len(), 2048);
    assert_eq!(routes.last().expect("one each").signals(), 1);
}

#[test]
fn without_a_wire_there_is_no_pin_and_no_such_capability() {
    let machine = machine_of(1, false);
    assert_eq!(machine.device.config_read(15), 0);
    assert_eq!(machine.get(Reg::Caps), 0x37);
    machine.run(0x1);
    assert_eq!(machine.status(), Status::IRQ_RAISED | Status::UNSIGNALLED);
}

#[test]
fn a_read_is_good_when_its_checksum_is() {
    let machine = machine();
    machine.fill(0x1234, b"123456789");
    machine.aim(0x1234, 0, 9);
    machine.set(Reg::Checksum, 0x340b_c6d9);
    machine.run(READ);
    assert_eq!(machine.status(), Status::READ_SUCCESS | Status::IRQ_RAISED);
    machine.set(Reg::Checksum, 0x340b_c6d8);
    machine.run(READ);
    assert_eq!(machine.status(), Status::READ_FAIL | Status::IRQ_RAISED);
}

#[test]
fn a_write_fills_memory_and_says_with_which_checksum() {
    let machine = machine();
    machine.aim(0, 0x2001, 100_000);
    machine.run(WRITE);
    assert_eq!(machine.status(), Status::WRITE_SUCCESS | Status::IRQ_RAISED);
    let expected = !crc32fast::hash(&machine.bytes(0x2001, 100_000));
    assert_eq!(machine.get(Reg::Checksum), expected);
    assert_eq!(
        (machine.bytes(0x2000, 1), machine.bytes(0x2001 + 100_000, 1)),
        (vec![0], vec![0])
    );
}

#[test]
fn a_copy_moves_every_byte_and_none_beside() {
    let machine = machine();
    let bytes: Vec<u8> = (0..=255).cycle().take(70_000).collect();
    machine.fill(0x101, &bytes);
    machine.aim(0x101, 0x4_0003, 70_000);
    machine.run(COPY);
    assert_eq!(machine.status(), Status::COPY_SUCCESS | Status::IRQ_RAISED);
    assert_eq!(machine.bytes(0x4_0003, 70_000), bytes);
    assert_eq!(machine.bytes(0x4_0000, 3), [0; 3]);
}

#[test]
fn a_transfer_that_leaves_memory_fails_on_the_side_that_does() {
    let machine = machine();
    let raised = Status::IRQ_RAISED;
    let cases = [
        (READ, RAM - 4, 0, Status::READ_FAIL | Status::SOURCE_INVALID),
        (READ, u64::MAX, 0, Status::READ_FAIL | Status::SOURCE_INVALID),
        (
            WRITE,
            0,
            RAM - 4,
            Status::WRITE_FAIL | Status::DESTINATION_INVALID,
        ),
        (
            WRITE,
            0,
            0xfee0_0000,
            Status::WRITE_FAIL | Status::DESTINATION_INVALID,
        ),
        (COPY, RAM, 0, Status::COPY_FAIL | Status::SOURCE_INVALID),
        (
            COPY,
            0,
            u64::MAX - 2,
            Status::COPY_FAIL | Status::DESTINATION_INVALID,
        ),
    ];
    for (command, from, to, expected) in cases {
        machine.aim(from, to, 8);
        machine.run(command);
        assert_eq!(
            machine.status(),
            expected | raised,
            "{command:#x} {from:#x} {to:#x}"
        );
    }
    machine.set(Reg::Checksum, 0x5555);
    machine.aim(0, RAM, u32::MAX);
    machine.run(WRITE);
    assert_eq!(machine.get(Reg::Checksum), 0x5555);
}

#[test]
fn without_bus_master_nothing_leaves_the_device() {
    let machine = machine();
    machine.enable_msi(0);
    machine.messages.requester().set_bus_master(false);
    machine.aim(0, 0, 8);
    machine.interrupt_by(IrqType::MSI, 1);
    machine.run(WRITE);
    let failed = Status::WRITE_FAIL | Status::DESTINATION_INVALID | Status::IRQ_RAISED;
    assert_eq!(machine.status(), failed);
    assert_eq!(machine.messages.count(), 0);
    machine.messages.requester().set_bus_master(true);
    assert_eq!(machine.bytes(0, 8), [0; 8]);
}

#[test]
fn the_wire_is_held_until_the_status_is_read() {
    let machine = machine();
    machine.run(0x1);
    assert_eq!(machine.wire.take(), [true]);
    assert_eq!(machine.get(Reg::Magic), 0);
    assert_eq!(machine.wire.take(), Vec::<bool>::new());
    assert_eq!(machine.status(), Status::IRQ_RAISED);
    assert_eq!(machine.wire.take(), [false]);
    // It stays what it was: only the next command changes it.
    assert_eq!(machine.status(), Status::IRQ_RAISED);
    machine.run(0x1);
    machine.device.reset();
    assert_eq!(machine.wire.take(), [true, false]);
}

#[test]
fn msi_arrives_by_number_as_far_as_the_guest_allocated() {
    let machine = machine();
    machine.enable_msi(2);
    for number in 1..=4 {
        machine.interrupt_by(IrqType::MSI, number);
        machine.run(0x2);
        assert_eq!(machine.status(), Status::IRQ_RAISED);
    }
    let data: Vec<_> = machine.messages.take().iter().map(|sent| sent.data).collect();
    assert_eq!(data, [0x4040, 0x4041, 0x4042, 0x4043]);
}

#[test]
fn numbers_that_do_not_exist_interrupt_nobody() {
    let machine = machine();
    machine.enable_msi(2);
    let unsignalled = Status::IRQ_RAISED | Status::UNSIGNALLED;
    for number in [0, 5, 32, 33, 65_537, u32::MAX] {
        machine.interrupt_by(IrqType::MSI, number);
        machine.run(0x2);
        assert_eq!(machine.status(), unsignalled, "MSI {number}");
    }
    machine.enable_msix(32);
    for number in [0, 33, 2048, 65_537, u32::MAX] {
        machine.interrupt_by(IrqType::MSIX, number);
        machine.run(0x4);
        assert_eq!(machine.status(), unsignalled, "MSI-X {number}");
    }
    assert_eq!(machine.messages.count(), 0);
}

#[test]
fn kinds_that_the_guest_does_not_use_interrupt_nobody() {
    let machine = machine();
    let unsignalled = Status::IRQ_RAISED | Status::UNSIGNALLED;
    let refused = |irq_type| {
        machine.interrupt_by(irq_type, 1);
        machine.run(0x1);
        assert_eq!(machine.status(), unsignalled, "{irq_type:?}");
    };
    [IrqType::MSI, IrqType::MSIX, IrqType(3), IrqType(u32::MAX)]
        .into_iter()
        .for_each(refused);
    machine.enable_msi(0);
    [IrqType::INTX, IrqType::MSIX].into_iter().for_each(refused);
    machine.enable_msix(1);
    [IrqType::INTX, IrqType::MSI].into_iter().for_each(refused);
    assert_eq!((machine.messages.count(), machine.wire.take()), (0, vec![]));
}

#[test]
fn what_is_no_command_does_nothing_and_says_so() {
    let machine = machine();
    for code in [0x18, 0x400, u32::MAX] {
        machine.set(Reg::Status, 0);
        machine.run(code);
        assert_eq!(machine.status(), Status::COMMAND_INVALID, "{code:#x}");
    }
    assert_eq!(machine.wire.take(), Vec::<bool>::new());
}

#[test]
fn a_doorbell_rings_between_showing_and_hiding_it() {
    let machine = machine();
    machine.run(0x80);
    assert_eq!(
        machine.status(),
        Status::DOORBELL_DISABLE_FAIL | Status::IRQ_RAISED
    );
    machine.run(0x40);
    assert_eq!(
        machine.status(),
        Status::DOORBELL_ENABLE_SUCCESS | Status::IRQ_RAISED
    );
    machine.set(Reg::Status, 0);
    assert_eq!(machine.get(Reg::DoorbellBar), 0);
    let at = u64::from(machine.get(Reg::DoorbellOffset));
    let data = machine.get(Reg::DoorbellData);
    machine.device.bar_write(0, at, &data.to_le_bytes());
    machine.device.settle();
    assert_eq!(machine.status(), Status::DOORBELL_SUCCESS | Status::IRQ_RAISED);
    machine.run(0x40);
    assert_eq!(
        machine.status(),
        Status::DOORBELL_ENABLE_FAIL | Status::IRQ_RAISED
    );
    machine.run(0x80);
    assert_eq!(
        machine.status(),
        Status::DOORBELL_DISABLE_SUCCESS | Status::IRQ_RAISED
    );
    machine.set(Reg::Status, 0);
    machine.device.bar_write(0, at, &data.to_le_bytes());
    machine.device.settle();
    assert_eq!(machine.status(), Status::empty());
}

#[test]
fn halves_of_bars_change_places_and_back() {
    let machine = machine();
    let set_up = |bar| {
        machine.set(Reg::Size, bar);
        machine.run(0x100);
        machine.status()
    };
    let clear = |bar| {
        machine.set(Reg::Size, bar);
        machine.run(0x200);
        machine.status()
    };
    for bar in MEMORY_BARS.map(|spec| u32::from(spec.index)) {
        assert_eq!(clear(bar), Status::SUBRANGE_CLEAR_FAIL | Status::IRQ_RAISED);
        assert_eq!(set_up(bar), Status::SUBRANGE_SETUP_SUCCESS | Status::IRQ_RAISED);
        assert_eq!(clear(bar), Status::SUBRANGE_CLEAR_SUCCESS | Status::IRQ_RAISED);
    }
    for bar in [0, 3, 6, u32::MAX] {
        assert_eq!(
            set_up(bar),
            Status::SUBRANGE_SETUP_FAIL | Status::IRQ_RAISED,
            "{bar}"
        );
        assert_eq!(
            clear(bar),
            Status::SUBRANGE_CLEAR_FAIL | Status::IRQ_RAISED,
            "{bar}"
        );
    }
}

#[test]
fn memory_is_memory_and_what_is_neither_register_nor_memory_reads_zero() {
    let machine = machine();
    let mut data = [0xff; 8];
    for offset in [0x40, 0x80, 0x84, 0xf8, 0x120, 0xff8, 0xf000] {
        machine.device.bar_write(0, offset, &[0xff; 8]);
        machine.device.bar_read(0, offset, &mut data);
        assert_eq!(data, [0; 8], "{offset:#x}");
    }
    machine.device.bar_write(2, 0x3ff8, &[7; 8]);
    machine.device.bar_read(2, 0x3ff8, &mut data);
    assert_eq!(data, [7; 8]);
    machine.device.reset();
    machine.device.bar_read(2, 0x3ff8, &mut data);
    assert_eq!(data, [0; 8]);
}

#[test]
fn a_reset_ends_a_transfer_and_leaves_no_trace_of_it() {
    let machine = machine();
    machine.aim(0, 0x1000, 0x1000);
    machine.set(Reg::Command, WRITE);
    machine.device.reset();
    let before = machine.bytes(0x1000, 0x1000);
    assert_eq!(machine.status(), Status::empty());
    assert_eq!((machine.get(Reg::Command), machine.get(Reg::Size)), (0, 0));
    assert_ne!(machine.wire.take().last(), Some(&true));
    machine.aim(0x1000, 0x8000, 0x10);
    machine.run(COPY);
    assert_eq!(machine.status(), Status::COPY_SUCCESS | Status::IRQ_RAISED);
    assert_eq!(machine.bytes(0x1000, 0x1000), before);
}

/// Says when an access begins, and lets it when it may.
struct Slow {
    begun: Mutex<Sender<()>>,
    leave: Mutex<Receiver<()>>,
}

impl Translator for Slow {
    fn begin(&self) -> Box<dyn Translations + '_> {
        let begun = self.begun.lock().expect("not poisoned").send(());
        begun.expect("the test listens");
        let leave = self.leave.lock().expect("not poisoned").recv();
        leave.expect("the test says when");
        Box::new(AsItIs)
    }
}

struct AsItIs;

impl Translations for AsItIs {
    fn translate(&self, _requester: Bdf, at: Iova, _access: Permissions) -> Option<Run> {
        Some(Run {
            target: Gpa(at.0),
            len: RAM - at.0,
        })
    }
}

/// A machine whose device is in the first of the four accesses of a read.
fn in_the_midst() -> (Machine, Receiver<()>, Sender<()>) {
    let (sender, begun) = channel();
    let (leave, receiver) = channel();
    let slow = Slow {
        begun: Mutex::new(sender),
        leave: Mutex::new(receiver),
    };
    let machine = machine_with(32, true, |requester, ram| {
        Dma::translated(requester, ram, Arc::new(slow))
    });
    machine.aim(0, 0, 4 * (64 << 10));
    machine.set(Reg::Command, READ);
    begun.recv().expect("a device");
    (machine, begun, leave)
}

fn pause_with_leave(machine: &Machine, leave: &Sender<()>) {
    std::thread::scope(|scope| {
        scope.spawn(|| machine.device.pause());
        while !machine.device.engine.state().held {
            std::thread::yield_now();
        }
        (0..4).for_each(|_| leave.send(()).expect("a device"));
    });
}

#[test]
fn while_paused_no_memory_is_touched_and_afterwards_the_rest_is() {
    let (machine, begun, leave) = in_the_midst();
    pause_with_leave(&machine, &leave);
    assert!(begun.try_recv().is_err(), "no second access");
    machine.device.resume();
    machine.device.settle();
    assert_eq!(begun.try_iter().count(), 3);
    assert!(
        machine.status().contains(Status::READ_FAIL),
        "it ended: no checksum was set"
    );
}

#[test]
fn a_reset_in_a_pause_ends_what_was_begun_and_the_pause_goes_on() {
    let (machine, begun, leave) = in_the_midst();
    pause_with_leave(&machine, &leave);
    machine.device.reset();
    assert_eq!(machine.status(), Status::empty());
    machine.aim(0, 0, 8);
    machine.set(Reg::Command, READ);
    std::thread::sleep(std::time::Duration::from_millis(20));
    assert!(begun.try_recv().is_err(), "it waits");
    machine.device.resume();
    machine.device.settle();
    assert_eq!(begun.try_iter().count(), 1);
}

#[test]
fn resets_and_commands_on_two_processors_end_in_a_device_that_works() {
    let machine = machine();
    std::thread::scope(|scope| {
        scope.spawn(|| {
            for _ in 0..500 {
                machine.aim(0, 0x1000, 0x2_0000);
                machine.set(Reg::Command, WRITE);
            }
        });
        scope.spawn(|| (0..500).for_each(|_| machine.device.reset()));
    });
    machine.device.reset();
    machine.aim(0, 0x1000, 16);
    machine.run(WRITE);
    assert_eq!(machine.status(), Status::WRITE_SUCCESS | Status::IRQ_RAISED);
}

/// What a guest can do with the device.
#[derive(Debug, Clone)]
enum Step {
    Write(u8, u64, u64),
    Read(u8, u64),
    Command(u32),
    Configure(u16, u32),
    Reset,
}

fn step() -> impl Strategy<Value = Step> {
    let bar = prop::sample::select(vec![0_u8, 1, 2, 4, 5]);
    prop_oneof![
        (0..0x120_u64, any::<u64>()).prop_map(|(at, value)| Step::Write(0, at & !3, value)),
        (bar.clone(), 0..0x1_0000_u64, any::<u64>()).prop_map(|(bar, at, value)| Step::Write(bar, at, value)),
        (bar, 0..0x1_0000_u64).prop_map(|(bar, at)| Step::Read(bar, at)),
        (0..26_u32).prop_map(|bit| Step::Command(1 << bit)),
        (0..64_u16, any::<u32>()).prop_map(|(dword, value)| Step::Configure(dword, value)),
        Just(Step::Reset),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn whatever_a_guest_does_a_reset_leaves_a_device_that_works(steps in prop::collection::vec(step(), 1..60)) {
        let machine = machine_of(3, true);
        for step in steps {
            match step {
                Step::Write(bar, at, value) => machine.device.bar_write(bar, at, &value.to_le_bytes()),
                Step::Read(bar, at) => machine.device.bar_read(bar, at, &mut [0; 8]),
                Step::Command(command) => machine.set(Reg::Command, command),
                Step::Configure(dword, value) => machine.configure(dword, value),
                Step::Reset => machine.device.reset(),
            }
        }
        machine.device.reset();
        prop_assert_eq!(machine.wire.take().last().copied().unwrap_or(false), false);
        machine.aim(0, 0x1000, 16);
        machine.run(WRITE);
        prop_assert_eq!(machine.status(), Status::WRITE_SUCCESS | Status::IRQ_RAISED);
    }
}
