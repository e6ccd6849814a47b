//! The thread's steps, taken by hand beside a hypervisor that puts writes aside when told to.

use std::collections::VecDeque;
use std::sync::atomic::{AtomicBool, Ordering};

use super::*;
use crate::iommu::emulated::testing::Rig;
use crate::iommu::viommu::ServedUnit;
use crate::iommu::viommu::testing::Rig as ServedRig;
use crate::platform::bus::BusDevice;

/// KVM in miniature: a ring with some room, and ranges whose writes go there.
#[derive(Default)]
struct Hypervisor {
    ring: Mutex<VecDeque<CoalescedWrite>>,
    aside: Mutex<Vec<GpaRange>>,
    refuses: AtomicBool,
}

/// Writes the ring has room for.
const ROOM: usize = 8;

impl Hypervisor {
    fn answer(&self) -> Result<(), HostError> {
        if self.refuses.load(Ordering::Relaxed) {
            return Err(HostError::new("do it", std::io::Error::other("no")));
        }
        Ok(())
    }

    /// A guest's write: whether it was put aside.
    fn takes(&self, write: CoalescedWrite) -> bool {
        let aside = self.aside.lock().expect("not poisoned");
        let mut ring = self.ring.lock().expect("not poisoned");
        let takes = aside.iter().any(|range| range.contains(write.at)) && ring.len() < ROOM;
        if takes {
            ring.push_back(write);
        }
        takes
    }

    fn waiting(&self) -> usize {
        self.ring.lock().expect("not poisoned").len()
    }
}

impl CoalescedWrites for Hypervisor {
    fn put_aside(&self, range: GpaRange) -> Result<(), HostError> {
        self.answer()?;
        self.aside.lock().expect("not poisoned").push(range);
        Ok(())
    }

    fn let_through(&self, range: GpaRange) -> Result<(), HostError> {
        self.answer()?;
        self.aside
            .lock()
            .expect("not poisoned")
            .retain(|other| *other != range);
        Ok(())
    }

    fn take(&self) -> Option<CoalescedWrite> {
        self.ring.lock().expect("not poisoned").pop_front()
    }
}

/// Control: commands are carried out.
const COMMAND_BUFFER_ON: u64 = 1 << 12;

/// A running unit whose doorbell can be polled, by hand.
struct Bench {
    rig: Rig,
    hypervisor: Arc<Hypervisor>,
}

fn bench() -> Bench {
    let (rig, hypervisor) = (Rig::running(), Arc::new(Hypervisor::default()));
    let writes = LateWrites::new(hypervisor.clone());
    let range = polling_by(&*rig.unit, &writes).line.range;
    let unit: Weak<dyn Polled> = Arc::downgrade(&rig.unit) as Weak<dyn Polled>;
    writes.units().push((range, unit));
    Bench { rig, hypervisor }
}

impl Bench {
    fn polling(&self) -> &Polling {
        self.rig.unit.polling().get().expect("made with it")
    }

    /// The guest writes a register of the unit; whether that was an exit.
    fn writes(&self, offset: u64, value: u64) -> bool {
        let at = Gpa(self.rig.unit.registers().start().0 + offset);
        let exits = !self
            .hypervisor
            .takes(CoalescedWrite::new(at, value.to_le_bytes(), 8));
        if exits {
            self.rig.write(offset, value);
        }
        exits
    }

    /// The guest rings for all that is in its ring; whether that was an exit.
    fn rings(&self) -> bool {
        self.writes(0x2008, self.rig.tail())
    }

    /// The guest's next command is a COMPLETION_WAIT that stores `value`.
    fn puts_wait(&self, value: u64) {
        self.rig.put_wait(value);
    }

    /// As the thread begins, once the guest is busy.
    fn begin(&self) {
        self.polling().state().wanted = true;
        assert!(self.polling().begin());
    }

    fn look(&self) -> bool {
        self.polling().look(&*self.rig.unit)
    }

    fn heads(&self) -> (u64, u64) {
        (self.rig.read(0x2000), self.rig.tail())
    }
}

#[test]
fn an_idle_guests_doorbell_is_an_exit_and_its_commands_run_there() {
    let bench = bench();
    bench.puts_wait(7);
    assert!(bench.rings());
    assert_eq!(bench.rig.flag(), 7);
    assert!(!bench.polling().state().wanted);
}

#[test]
fn many_doorbells_in_a_short_time_make_a_guest_busy_and_few_or_slow_ones_do_not() {
    let (mut state, start) = (State::default(), Instant::now());
    assert!((1..BUSY).all(|_| !state.rang(start)));
    assert!(state.rang(start + BURST));
    let mut state = State::default();
    let slow = |ring| start + BURST / (BUSY - 2) * ring;
    assert!((0..1000).all(|ring| !state.rang(slow(ring))));
}

#[test]
fn only_the_doorbell_makes_a_guest_busy() {
    let bench = bench();
    let now = Instant::now();
    (0..100).for_each(|_| bench.polling().written(0x2000, now));
    (0..100).for_each(|_| bench.polling().written(0x2010, now));
    assert!(!bench.polling().state().wanted);
    (0..BUSY).for_each(|_| bench.polling().written(0x2008, now));
    assert!(bench.polling().state().wanted);
}

#[test]
fn a_busy_guests_doorbell_is_no_exit_and_its_commands_run_at_the_next_look() {
    let bench = bench();
    bench.begin();
    bench.puts_wait(7);
    assert!(!bench.rings());
    assert_eq!(bench.rig.flag(), 0);
    assert!(bench.look());
    assert_eq!(bench.rig.flag(), 7);
    assert!(!bench.look());
    let counts = bench.rig.unit.counts();
    assert_eq!((counts.doorbells, counts.polled), (1, 1));
}

#[test]
fn what_the_guest_does_after_a_late_doorbell_takes_effect_after_it() {
    let bench = bench();
    bench.begin();
    bench.puts_wait(7);
    assert!(!bench.rings());
    // A read that is an exit finds the tail written before it; the commands come in their time.
    assert_eq!(bench.rig.read(0x2008), bench.rig.tail());
    // Switched off and put elsewhere, the command buffer is empty, whatever was rung before.
    let (control, base) = (bench.rig.read(0x18), bench.rig.read(0x08));
    for (register, value) in [
        (0x18, control & !COMMAND_BUFFER_ON),
        (0x08, base),
        (0x18, control),
    ] {
        assert!(bench.writes(register, value));
    }
    assert_eq!((bench.rig.read(0x2000), bench.rig.read(0x2008)), (0, 0));
    assert!(bench.look());
    assert_eq!(bench.rig.flag(), 0);
}

#[test]
fn a_doorbell_that_finds_the_ring_full_takes_effect_behind_those_in_it() {
    let bench = bench();
    bench.begin();
    for value in 1..=ROOM as u64 {
        bench.puts_wait(value);
        assert!(!bench.rings());
    }
    bench.puts_wait(99);
    assert!(bench.rings());
    assert_eq!((bench.hypervisor.waiting(), bench.rig.flag()), (0, 99));
    let (head, tail) = bench.heads();
    assert_eq!(head, tail);
}

#[test]
fn the_write_before_the_thread_sleeps_is_heard() {
    let bench = bench();
    bench.begin();
    bench.puts_wait(7);
    assert!(!bench.rings());
    bench.polling().end();
    assert!(!bench.polling().goes_on());
    assert!(bench.polling().hearing.take_rung());
    bench.rig.unit.run_commands();
    assert_eq!(bench.rig.flag(), 7);
    bench.puts_wait(8);
    assert!(bench.rings());
    assert_eq!(bench.rig.flag(), 8);
}

#[test]
fn a_host_that_refuses_to_put_writes_aside_leaves_them_exits() {
    let bench = bench();
    bench.hypervisor.refuses.store(true, Ordering::Relaxed);
    bench.begin();
    assert!(!bench.polling().goes_on());
    bench.puts_wait(7);
    assert!(bench.rings());
    assert_eq!(bench.rig.flag(), 7);
}

#[test]
fn a_host_that_refuses_to_let_writes_through_has_them_polled_on() {
    let bench = bench();
    bench.begin();
    bench.hypervisor.refuses.store(true, Ordering::Relaxed);
    bench.puts_wait(7);
    assert!(!bench.rings());
    bench.polling().end();
    assert!(bench.polling().goes_on());
    bench.puts_wait(8);
    assert!(!bench.rings());
    assert!(bench.look());
    assert_eq!(bench.rig.flag(), 8);
}

#[test]
fn a_reset_forgets_what_was_rung_and_nothing_comes_after_it() {
    let bench = bench();
    bench.begin();
    bench.puts_wait(7);
    assert!(!bench.rings());
    bench.rig.unit.reset();
    assert_eq!((bench.hypervisor.waiting(), bench.rig.read(0x2008)), (0, 0));
    assert!(!bench.look());
    assert_eq!(bench.rig.flag(), 0);
    assert!(!bench.polling().goes_on());
}

#[test]
fn late_writes_to_nobody_and_to_other_registers_are_dropped() {
    let bench = bench();
    bench.begin();
    let start = bench.rig.unit.registers().start().0;
    let mut ring = bench.hypervisor.ring.lock().expect("not poisoned");
    for at in [0, start - 1, start + 0x18, start + 0x2010, u64::MAX] {
        ring.push_back(CoalescedWrite::new(Gpa(at), [0; 8], 8));
    }
    drop(ring);
    let control = bench.rig.read(0x18);
    assert!(!bench.look());
    assert_eq!((bench.rig.read(0x18), bench.hypervisor.waiting()), (control, 0));
}

#[test]
fn a_long_ring_is_worked_off_look_by_look() {
    let bench = bench();
    bench.begin();
    for _ in 0..255 {
        bench.rig.put(6 << 60 | 0xff << 24, 0);
    }
    assert!(!bench.rings());
    let looks = (0..100).take_while(|_| bench.look());
    assert!((2..100).contains(&looks.count()));
    let (head, tail) = bench.heads();
    assert_eq!(head, tail);
}

/// A guest that waits for each of its commands, with the thread at work: every one is answered, whichever way its
/// doorbell went, through bursts that wake the thread and pauses in which it falls asleep.
#[test]
fn every_command_is_answered_whether_the_thread_sleeps_or_polls() {
    let (rig, hypervisor) = (Rig::running(), Arc::new(Hypervisor::default()));
    let writes = LateWrites::new(hypervisor.clone());
    let thread = DoorbellThread::start(rig.unit.clone(), &writes).expect("a thread");
    let bench = Bench { rig, hypervisor };
    let start = Instant::now();
    let in_time = || assert!(start.elapsed() < Duration::from_secs(60), "the thread is stuck");
    let until = |what: &dyn Fn() -> bool| {
        while !what() {
            in_time();
            std::thread::yield_now();
        }
    };
    let (mut exits, mut value) = (0, 0);
    let mut command = || {
        value += 1;
        bench.puts_wait(value);
        exits += u64::from(bench.rings());
        until(&|| bench.rig.flag() == value);
    };
    while bench.rig.unit.counts().polled < 300 {
        until(&|| !bench.polling().goes_on());
        // As often as it takes to be thought busy, however slow this machine is.
        bench.polling().state().burst = None;
        while !bench.polling().state().wanted && !bench.polling().goes_on() {
            in_time();
            command();
        }
        until(&|| bench.polling().goes_on() || !bench.polling().state().wanted);
        (0..100).for_each(|_| command());
    }
    let counts = bench.rig.unit.counts();
    assert_eq!((counts.doorbells, counts.polled + exits), (value, value));
    drop(thread);
    assert!(!bench.polling().goes_on());
}

/// A served unit before a host that only remembers what was rung late.
struct Served {
    unit: Arc<ServedUnit>,
    late: Mutex<Vec<(u64, u8)>>,
}

impl Polled for Served {
    fn name(&self) -> &str {
        self.unit.name()
    }

    fn registers(&self) -> GpaRange {
        self.unit.mmio()
    }

    fn polling(&self) -> &OnceLock<Polling> {
        self.unit.polling()
    }

    fn late_doorbell(&self, offset: u64, data: &[u8]) -> bool {
        self.late.lock().expect("not poisoned").push((offset, data[0]));
        true
    }

    fn run_late_commands(&self) -> bool {
        false
    }

    fn run_commands(&self) {}
}

#[test]
fn a_served_unit_hears_late_doorbells_before_any_access_and_when_the_machine_pauses() {
    let (rig, hypervisor) = (ServedRig::running(), Arc::new(Hypervisor::default()));
    let served = Arc::new(Served {
        unit: rig.unit.clone(),
        late: Mutex::default(),
    });
    let writes = LateWrites::new(hypervisor.clone());
    let range = polling_by(&*served, &writes).line.range;
    let weak: Weak<dyn Polled> = Arc::downgrade(&served) as Weak<dyn Polled>;
    writes.units().push((range, weak));
    let polling = rig.unit.polling().get().expect("made above");
    let tail = Gpa(rig.unit.mmio().start().0 + 0x2008);
    let rings = |value: u8| hypervisor.takes(CoalescedWrite::new(tail, u64::from(value).to_le_bytes(), 8));
    let heard = || std::mem::take(&mut *served.late.lock().expect("not poisoned"));
    assert!(!rings(1), "not yet");
    // Sixteen by exits make the guest busy.
    let now = Instant::now();
    (0..BUSY).for_each(|_| polling.written(0x2008, now));
    assert!(polling.begin());
    let accesses: [&dyn Fn(); 5] = [
        &|| rig.unit.read(0x18, &mut [0; 8]),
        &|| rig.write(0x170, 8, 0x31 << 32),
        &|| rig.unit.read(0x2020, &mut [0; 4]),
        &|| drop(rig.unit.state()),
        &|| rig.unit.catch_up(),
    ];
    for (value, access) in (2..).zip(accesses) {
        assert!(rings(value));
        assert_eq!(heard(), []);
        access();
        assert_eq!(heard(), [(0x2008, value)]);
        assert!(polling.look(&*served), "its commands run then");
    }
    // A reset forgets.
    assert!(rings(9));
    rig.unit.reset();
    assert!(!polling.hearing.take_rung() && !polling.goes_on());
    assert!(!rings(9), "an exit again");
}
