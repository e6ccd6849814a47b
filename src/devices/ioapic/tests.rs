//! The controller as a guest, its devices and the kernel see it.

use super::input::MOST_IN_A_ROW;
use super::*;
use crate::devices::clock::manual::{ManualAlarm, ManualClock};
use crate::iommu::emulated::RemappingIoApic;
use crate::iommu::emulated::testing::{Rig, device};
use crate::platform::host::HostError;
use crate::platform::irq::IrqLine;
use std::io;
use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU32, Ordering};

const LEVEL: u32 = 1 << 15;
const MASKED: u32 = 1 << 16;
const REMOTE_IRR: u32 = 1 << 14;

/// What reached the kernel, in order.
#[derive(Debug, PartialEq, Eq, Clone, Copy)]
enum Told {
    Signal(u32),
    Route(u8, Option<u32>),
}

#[derive(Default)]
struct Kernel {
    told: Mutex<Vec<Told>>,
    refuses_routes: AtomicBool,
    /// The vector of each input's route.
    routes: Mutex<[Option<u8>; IOAPIC_INPUTS as usize]>,
    /// What remapping adds to the vectors that processors see.
    shift: AtomicU8,
}

impl Kernel {
    fn drain(&self) -> Vec<Told> {
        std::mem::take(&mut lock(&self.told))
    }

    fn signals(&self) -> Vec<u32> {
        let signal = |told| match told {
            Told::Signal(data) => Some(data),
            Told::Route(..) => None,
        };
        self.drain().into_iter().filter_map(signal).collect()
    }
}

impl IoApicHost for Kernel {
    fn signal(&self, message: MsiMessage) {
        lock(&self.told).push(Told::Signal(message.data));
    }

    fn set_route(&self, pin: u8, message: Option<MsiMessage>) -> Result<(), HostError> {
        if self.refuses_routes.load(Ordering::Relaxed) {
            return Err(HostError::new("set a route", io::ErrorKind::OutOfMemory));
        }
        lock(&self.told).push(Told::Route(pin, message.map(|message| message.data)));
        let vector = message.map(|message| message.data.to_le_bytes()[0]);
        lock(&self.routes)[usize::from(pin)] = vector;
        Ok(())
    }

    fn pins_of(&self, vector: u8) -> u32 {
        let sent = vector.wrapping_sub(self.shift.load(Ordering::Relaxed));
        let routes = lock(&self.routes);
        let pins = (0..routes.len()).filter(|pin| routes[*pin] == Some(sent));
        pins.fold(0, |found, pin| found | 1 << pin)
    }
}

struct Board {
    kernel: Arc<Kernel>,
    clock: Arc<ManualClock>,
    alarm: Arc<ManualAlarm>,
    ioapic: Arc<IoApic>,
}

impl Board {
    fn new() -> Self {
        Self::behind(|kernel| kernel)
    }

    /// A controller whose messages reach the kernel by what `between` puts before it.
    fn behind(between: impl FnOnce(Arc<Kernel>) -> Arc<dyn IoApicHost>) -> Self {
        let (kernel, alarm) = (Arc::new(Kernel::default()), Arc::new(ManualAlarm::default()));
        let clock = ManualClock::at(Duration::ZERO);
        let ioapic = IoApic::new(2, between(kernel.clone()), clock.clone(), alarm.clone());
        Self {
            kernel,
            clock,
            alarm,
            ioapic,
        }
    }

    fn write(&self, register: u8, value: u32) {
        self.ioapic.write(0, &[register]);
        self.ioapic.write(0x10, &value.to_le_bytes());
    }

    fn read(&self, register: u8) -> u32 {
        self.ioapic.write(0, &u32::from(register).to_le_bytes());
        let mut data = [0; 4];
        self.ioapic.read(0x10, &mut data);
        u32::from_le_bytes(data)
    }

    /// Program the low half of input `pin`, destination APIC 0.
    fn entry(&self, pin: u8, low: u32) {
        self.write(0x10 + 2 * pin, low);
    }

    fn low(&self, pin: u8) -> u32 {
        self.read(0x10 + 2 * pin)
    }

    fn line(&self, gsi: u32) -> IrqLine {
        IrqLine::new(self.ioapic.clone(), gsi)
    }
}

#[test]
fn after_power_on_every_input_is_masked() {
    let board = Board::new();
    assert_eq!(board.read(0), 2 << 24);
    assert_eq!(board.read(1), 0x0017_0020);
    assert_eq!(board.read(2), 2 << 24);
    for pin in 0..IOAPIC_INPUTS {
        assert_eq!((board.low(pin), board.read(0x11 + 2 * pin)), (MASKED, 0));
    }
}

#[test]
fn reserved_and_read_only_bits_do_not_stick() {
    let board = Board::new();
    board.write(0, u32::MAX);
    board.write(1, 0);
    board.write(2, 0);
    assert_eq!(board.read(0), 0x0f00_0000);
    assert_eq!(board.read(1), 0x0017_0020);
    assert_eq!(board.read(2), 0x0f00_0000);
    board.entry(23, u32::MAX);
    board.write(0x3f, u32::MAX);
    assert_eq!(board.low(23), 0x0001_afff);
    assert_eq!(board.read(0x3f), 0xfffe_0000);
}

#[test]
fn registers_that_do_not_exist_read_all_ones_and_ignore_writes() {
    let board = Board::new();
    for select in (3..0x10).chain(0x40..=0xff) {
        board.write(select, 0x1234_5678);
        assert_eq!(board.read(select), u32::MAX, "{select:#x}");
    }
    assert_eq!(board.kernel.drain(), []);
}

#[test]
fn every_width_at_every_offset_is_answered_within_its_bytes() {
    let board = Board::new();
    for width in [1, 2, 4, 8] {
        for offset in (0..spec::WINDOW_LEN).step_by(width) {
            let mut data = vec![0x5a; width];
            board.ioapic.write(offset, &data);
            board.ioapic.read(offset, &mut data);
            let expected = match offset {
                0x00 => 0x5a,
                0x40 => 0,
                _ => 0xff,
            };
            assert_eq!(data[0], expected, "{width} bytes at {offset:#x}");
        }
    }
    assert_eq!(board.kernel.drain(), []);
}

#[test]
fn reads_of_other_widths_are_cut_or_filled_with_zeros() {
    let board = Board::new();
    board.ioapic.write(0, &[1]);
    let (mut narrow, mut wide) = ([0; 2], [0xee; 8]);
    board.ioapic.read(0x10, &mut narrow);
    board.ioapic.read(0x10, &mut wide);
    assert_eq!(narrow, [0x20, 0]);
    assert_eq!(u64::from_le_bytes(wide), 0x0017_0020);
}

#[test]
fn a_write_that_does_not_cover_the_window_changes_nothing() {
    let board = Board::new();
    board.ioapic.write(0, &[0x10]);
    board.ioapic.write(0x10, &[0x30]);
    board.ioapic.write(0x10, &[0x30, 0]);
    board.ioapic.write(0x10, &[]);
    assert_eq!(board.low(0), MASKED);
}

#[test]
fn an_edge_is_sent_once_per_rise() {
    let board = Board::new();
    board.entry(4, 0x31);
    let line = board.line(4);
    line.set(true);
    line.set(false);
    line.set(true);
    line.pulse();
    assert_eq!(board.kernel.signals(), [0x31, 0x31, 0x31]);
}

#[test]
fn an_edge_while_masked_is_lost() {
    let board = Board::new();
    let line = board.line(4);
    line.set(true);
    line.pulse();
    board.entry(4, 0x31);
    assert_eq!(board.kernel.drain(), []);
}

#[test]
fn two_wires_on_an_edge_input_are_one_edge_until_both_let_go() {
    let board = Board::new();
    board.entry(4, 0x31);
    let (first, second) = (board.line(4), board.line(4));
    first.set(true);
    second.set(true);
    first.set(false);
    first.set(true);
    assert_eq!(board.kernel.signals(), [0x31]);
}

#[test]
fn the_kernel_knows_a_level_triggered_message_before_it_is_sent() {
    let board = Board::new();
    let line = board.line(16);
    line.set(true);
    board.entry(16, LEVEL | 0x41);
    assert_eq!(
        board.kernel.drain(),
        [Told::Route(16, Some(0xc041)), Told::Signal(0xc041)]
    );
    assert_eq!(board.low(16), LEVEL | REMOTE_IRR | 0x41);
}

#[test]
fn an_edge_triggered_input_needs_no_route() {
    let board = Board::new();
    board.entry(4, 0x31);
    assert_eq!(board.kernel.drain(), []);
}

#[test]
fn a_level_is_sent_once_until_it_ends_and_again_while_asserted() {
    let board = Board::new();
    board.entry(16, LEVEL | 0x41);
    let (line, shared) = (board.line(16), board.line(16));
    line.set(true);
    shared.set(true);
    assert_eq!(board.kernel.signals(), [0xc041]);
    line.set(false);
    board.ioapic.end_of_interrupt(0x41);
    assert_eq!(board.kernel.signals(), [0xc041]);
    shared.set(false);
    board.ioapic.end_of_interrupt(0x41);
    assert!(board.kernel.signals().is_empty());
    assert_eq!(board.low(16), LEVEL | 0x41);
}

#[test]
fn a_level_that_rises_while_masked_is_sent_when_unmasked() {
    let board = Board::new();
    board.entry(16, LEVEL | MASKED | 0x41);
    let line = board.line(16);
    line.set(true);
    assert!(board.kernel.signals().is_empty());
    board.entry(16, LEVEL | 0x41);
    assert_eq!(board.kernel.signals(), [0xc041]);
}

#[test]
fn masking_an_interrupt_in_service_keeps_its_end_reported() {
    let board = Board::new();
    board.entry(16, LEVEL | 0x41);
    let line = board.line(16);
    line.set(true);
    board.kernel.drain();
    board.entry(16, LEVEL | MASKED | 0x41);
    board.ioapic.end_of_interrupt(0x41);
    assert_eq!(board.kernel.drain(), []);
    board.entry(16, LEVEL | 0x41);
    assert_eq!(board.kernel.drain(), [Told::Signal(0xc041)]);
}

#[test]
fn an_entry_given_up_by_the_guest_is_no_longer_reported() {
    let board = Board::new();
    board.entry(16, LEVEL | 0x41);
    board.kernel.drain();
    board.entry(16, MASKED);
    assert_eq!(board.kernel.drain(), [Told::Route(16, None)]);
}

#[test]
fn the_end_of_another_vector_changes_nothing() {
    let board = Board::new();
    board.entry(16, LEVEL | 0x41);
    board.entry(4, 0x42);
    let line = board.line(16);
    line.set(true);
    board.kernel.drain();
    board.ioapic.end_of_interrupt(0x40);
    board.ioapic.end_of_interrupt(0x42);
    assert_eq!(board.kernel.drain(), []);
    assert_eq!(board.low(16) & REMOTE_IRR, REMOTE_IRR);
}

#[test]
fn under_remapping_the_end_of_what_processors_saw_counts_and_the_eoi_register_takes_the_entrys() {
    let board = Board::new();
    board.kernel.shift.store(0x20, Ordering::Relaxed);
    board.entry(16, LEVEL | 0x10);
    let line = board.line(16);
    line.set(true);
    board.kernel.drain();
    board.ioapic.end_of_interrupt(0x10);
    assert_eq!(board.kernel.drain(), []);
    board.ioapic.end_of_interrupt(0x30);
    assert_eq!(board.kernel.signals(), [0xc010]);
    board.ioapic.write(0x40, &[0x30]);
    assert_eq!(board.kernel.drain(), []);
    board.ioapic.write(0x40, &[0x10]);
    assert_eq!(board.kernel.signals(), [0xc010]);
}

#[test]
fn x15_behind_a_unit_the_eoi_register_takes_the_index_and_processors_end_what_they_saw() {
    let rig = Rig::running();
    rig.cover();
    rig.remap(9, Some((0, 0x61)));
    let unit = rig.unit.clone();
    let board = Board::behind(|kernel| Arc::new(RemappingIoApic::new(unit, device(), kernel)));
    board.entry(9, LEVEL | 9);
    let line = board.line(9);
    line.set(true);
    assert_eq!(board.kernel.signals(), [0xc061]);
    assert_eq!(board.low(9) & REMOTE_IRR, REMOTE_IRR);
    line.set(false);
    // What processors saw means nothing to the register, nor the index to them.
    board.ioapic.write(0x40, &[0x61]);
    board.ioapic.end_of_interrupt(9);
    assert_eq!(board.low(9) & REMOTE_IRR, REMOTE_IRR);
    board.ioapic.write(0x40, &[9]);
    assert_eq!(board.low(9) & REMOTE_IRR, 0);
    line.set(true);
    assert_eq!(board.kernel.signals(), [0xc061]);
    line.set(false);
    board.ioapic.end_of_interrupt(0x61);
    assert_eq!(board.low(9) & REMOTE_IRR, 0);
}

#[test]
fn inputs_that_share_a_vector_end_together() {
    let board = Board::new();
    board.entry(16, LEVEL | 0x41);
    board.entry(17, LEVEL | 0x41);
    let lines = [board.line(16), board.line(17)];
    lines.iter().for_each(|line| line.set(true));
    board.kernel.drain();
    board.ioapic.end_of_interrupt(0x41);
    assert_eq!(board.kernel.signals(), [0xc041, 0xc041]);
}

#[test]
fn the_eoi_register_ends_an_interrupt_whatever_the_width() {
    let board = Board::new();
    board.entry(16, LEVEL | 0x41);
    let line = board.line(16);
    line.set(true);
    board.kernel.drain();
    board.ioapic.write(0x40, &[0x41]);
    board.ioapic.write(0x40, &[0x41, 0]);
    board.ioapic.write(0x40, &[0x41, 0, 0, 0]);
    board.ioapic.write(0x40, &[0x41, 0, 0, 0, 0, 0, 0, 0]);
    assert_eq!(board.kernel.signals(), [0xc041; 4]);
}

#[test]
fn switching_to_edge_and_back_ends_an_interrupt_by_force() {
    let board = Board::new();
    board.entry(16, LEVEL | 0x41);
    let line = board.line(16);
    line.set(true);
    board.entry(16, MASKED | 0x41);
    board.entry(16, LEVEL | MASKED | 0x41);
    assert_eq!(board.low(16) & REMOTE_IRR, 0);
    board.kernel.drain();
    board.entry(16, LEVEL | 0x41);
    assert_eq!(board.kernel.signals(), [0xc041]);
}

#[test]
fn a_pulse_on_a_level_input_is_one_interrupt_even_while_another_is_in_service() {
    let board = Board::new();
    board.entry(16, LEVEL | 0x41);
    let line = board.line(16);
    line.pulse();
    line.pulse();
    line.pulse();
    assert_eq!(board.kernel.signals(), [0xc041]);
    board.ioapic.end_of_interrupt(0x41);
    assert_eq!(board.kernel.signals(), [0xc041]);
    board.ioapic.end_of_interrupt(0x41);
    assert!(board.kernel.signals().is_empty());
}

#[test]
fn an_affinity_change_is_routed_before_the_next_message() {
    let board = Board::new();
    board.entry(16, LEVEL | 0x41);
    let line = board.line(16);
    board.kernel.drain();
    board.write(0x31, 3 << 24);
    line.set(true);
    assert_eq!(
        board.kernel.drain(),
        [Told::Route(16, Some(0xc041)), Told::Signal(0xc041)]
    );
}

#[test]
fn a_refused_route_holds_the_interrupt_back_until_one_is_accepted() {
    let board = Board::new();
    board.kernel.refuses_routes.store(true, Ordering::Relaxed);
    board.entry(16, LEVEL | 0x41);
    let line = board.line(16);
    line.set(true);
    assert_eq!(board.kernel.drain(), []);
    board.kernel.refuses_routes.store(false, Ordering::Relaxed);
    board.entry(16, LEVEL | 0x41);
    assert_eq!(board.kernel.signals(), [0xc041]);
}

/// A device whose cause persists: it lets go when told of the end, and asserts anew.
struct Persistent {
    line: IrqLine,
    ends: AtomicU32,
}

impl Resample for Persistent {
    fn interrupt_ended(&self) {
        self.ends.fetch_add(1, Ordering::Relaxed);
        self.line.set(false);
        self.line.set(true);
    }
}

#[test]
fn a_resampling_device_may_drive_its_wire_from_the_end_of_its_interrupt() {
    let board = Board::new();
    board.entry(16, LEVEL | 0x41);
    let device = Arc::new(Persistent {
        line: board.line(16),
        ends: AtomicU32::new(0),
    });
    let listener: Weak<dyn Resample> = Arc::downgrade(&(device.clone() as Arc<dyn Resample>));
    board.ioapic.resample(16, listener);
    device.line.set(true);
    board.ioapic.end_of_interrupt(0x41);
    assert_eq!(device.ends.load(Ordering::Relaxed), 1);
    assert_eq!(board.kernel.signals(), [0xc041, 0xc041]);
}

#[test]
fn a_listener_that_is_gone_is_not_called() {
    let board = Board::new();
    board.entry(16, LEVEL | 0x41);
    let device: Arc<dyn Resample> = Arc::new(Persistent {
        line: board.line(16),
        ends: AtomicU32::new(0),
    });
    board.ioapic.resample(16, Arc::downgrade(&device));
    drop(device);
    let line = board.line(16);
    line.set(true);
    line.set(false);
    board.ioapic.end_of_interrupt(0x41);
    assert_eq!(board.kernel.signals(), [0xc041]);
}

#[test]
fn a_storm_that_nobody_serves_is_slowed_down_and_goes_on_later() {
    let board = Board::new();
    board.entry(16, LEVEL | 0x41);
    let line = board.line(16);
    line.set(true);
    (0..2 * MOST_IN_A_ROW).for_each(|_| board.ioapic.end_of_interrupt(0x41));
    assert_eq!(board.kernel.signals().len(), MOST_IN_A_ROW as usize);
    assert_eq!(board.alarm.at(), Some(board.clock.monotonic() + REST));
    board.ioapic.expired();
    assert_eq!(board.kernel.signals(), [0xc041]);
}

#[test]
fn a_busy_input_that_is_served_is_never_slowed_down() {
    let board = Board::new();
    board.entry(16, LEVEL | 0x41);
    let line = board.line(16);
    for _ in 0..2 * MOST_IN_A_ROW {
        line.set(true);
        line.set(false);
        board.ioapic.end_of_interrupt(0x41);
    }
    assert_eq!(board.kernel.signals().len(), 2 * MOST_IN_A_ROW as usize);
    assert_eq!(board.alarm.at(), None);
}

#[test]
fn a_reset_masks_everything_and_withdraws_every_route() {
    let board = Board::new();
    board.write(0, 5 << 24);
    board.entry(16, LEVEL | 0x41);
    board.write(0x31, 7 << 24);
    let line = board.line(16);
    line.set(true);
    board.kernel.drain();
    board.ioapic.reset();
    assert_eq!(board.kernel.drain(), [Told::Route(16, None)]);
    assert_eq!(
        (board.read(0), board.low(16), board.read(0x31)),
        (2 << 24, MASKED, 0)
    );
    board.entry(16, LEVEL | 0x41);
    assert_eq!(board.kernel.signals(), [0xc041]);
}

#[test]
#[should_panic(expected = "a GSI of the one IOAPIC")]
fn a_wire_to_an_input_that_does_not_exist_is_our_own_mistake() {
    Board::new().ioapic.pulse(24);
}

#[test]
fn wires_and_entries_changed_at_once_lose_no_interrupt() {
    let board = Board::new();
    board.entry(16, LEVEL | 0x41);
    std::thread::scope(|scope| {
        let spawn_wire = || {
            scope.spawn(|| {
                let line = board.line(16);
                (0..1_000).for_each(|round| line.set(round % 2 == 0));
            })
        };
        let wires = [spawn_wire(), spawn_wire()];
        (0..1_000).for_each(|round| {
            board.ioapic.end_of_interrupt(0x41);
            board.ioapic.write(0, &[0x30]);
            board
                .ioapic
                .write(0x10, &(LEVEL | 0x41 | (round % 2) << 16).to_le_bytes());
        });
        wires.into_iter().for_each(|wire| wire.join().expect("no panic"));
    });
    // All wires are released now: one end, and the input is quiet and ready for the next.
    board.entry(16, LEVEL | 0x41);
    board.ioapic.end_of_interrupt(0x41);
    board.kernel.drain();
    let line = board.line(16);
    line.set(true);
    assert_eq!(board.kernel.signals(), [0xc041]);
}
