//! A worker's thread: woken by kicks and descriptors, bounded, paused, stopped, and left alone when broken.

use std::os::fd::{AsFd, OwnedFd};
use std::sync::atomic::AtomicU32;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::time::Duration;

use super::*;
use crate::devices::virtio::driver::{Driver, Part, Told};

const SOON: Duration = Duration::from_secs(20);
const NEVER: Duration = Duration::from_millis(50);

/// Reports each turn and answers as it is told.
struct Recorder {
    turns: Sender<Woken>,
    answers: Vec<Result<Turn, Broken>>,
    source: Option<OwnedFd>,
}

impl Service for Recorder {
    fn sources(&self) -> Vec<Source<'_>> {
        let source = self.source.iter();
        source
            .map(|fd| Source {
                fd: fd.as_fd(),
                output: false,
            })
            .collect()
    }

    fn turn(&mut self, woken: Woken, _dma: &Dma, _queues: &mut [ServedQueue]) -> Result<Turn, Broken> {
        self.turns.send(woken).expect("the test listens");
        self.answers.pop().unwrap_or(Ok(Turn::Idle))
    }
}

struct Running {
    workers: Workers,
    turns: Receiver<Woken>,
    kick: Arc<EventFd>,
    told: Arc<Told>,
}

fn run(answers: Vec<Result<Turn, Broken>>, source: Option<OwnedFd>) -> Running {
    let driver = Driver::new(8);
    let (sender, turns) = channel();
    let (dma, kick, told) = (driver.dma(), driver.kick.clone(), driver.told.clone());
    let unit = Unit {
        name: "test".to_owned(),
        service: Box::new(Recorder {
            turns: sender,
            answers,
            source,
        }),
        queues: vec![driver.queue],
    };
    let interrupts: Arc<dyn Interrupts> = told.clone();
    let workers = Workers::start(vec![unit], &dma, &interrupts).expect("a thread");
    workers.resume();
    Running {
        workers,
        turns,
        kick,
        told,
    }
}

#[test]
fn the_first_turn_names_everything_and_each_kick_one_queue() {
    let running = run(Vec::new(), None);
    assert_eq!(running.turns.recv_timeout(SOON), Ok(Woken::ALL));
    running.kick.write(1).expect("a kick");
    assert_eq!(running.turns.recv_timeout(SOON), Ok(Woken::by_queue(0)));
    assert!(running.turns.recv_timeout(NEVER).is_err());
}

#[test]
fn a_descriptor_wakes_its_service_once_per_change() {
    let (reader, writer) = rustix::pipe::pipe().expect("a pipe");
    let running = run(Vec::new(), Some(reader));
    assert_eq!(running.turns.recv_timeout(SOON), Ok(Woken::ALL));
    rustix::io::write(&writer, b"x").expect("written");
    assert_eq!(running.turns.recv_timeout(SOON), Ok(Woken::by_source(0)));
    assert!(running.turns.recv_timeout(NEVER).is_err());
}

#[test]
fn a_file_that_cannot_be_waited_for_is_no_error() {
    let file = tempfile::tempfile().expect("a file");
    let running = run(Vec::new(), Some(file.into()));
    assert_eq!(running.turns.recv_timeout(SOON), Ok(Woken::ALL));
}

#[test]
fn work_left_over_is_continued_without_a_kick() {
    let running = run(vec![Ok(Turn::Idle), Ok(Turn::Again)], None);
    assert_eq!(running.turns.recv_timeout(SOON), Ok(Woken::ALL));
    assert_eq!(running.turns.recv_timeout(SOON), Ok(Woken::ALL));
    assert!(running.turns.recv_timeout(NEVER).is_err());
}

#[test]
fn after_a_pause_everything_is_looked_at_as_kicks_may_have_been_lost() {
    let running = run(Vec::new(), None);
    assert_eq!(running.turns.recv_timeout(SOON), Ok(Woken::ALL));
    running.workers.pause();
    while running.turns.try_recv().is_ok() {}
    running.kick.write(1).expect("a kick");
    assert!(running.turns.recv_timeout(NEVER).is_err());
    running.workers.resume();
    assert_eq!(running.turns.recv_timeout(SOON), Ok(Woken::ALL));
    // The kick of before is still there.
    let mut kicked = running.turns.recv_timeout(SOON).expect("a turn");
    while !kicked.queue(0) {
        kicked = running.turns.recv_timeout(SOON).expect("another turn");
    }
}

#[test]
fn dropping_the_workers_ends_their_threads() {
    let running = run(Vec::new(), None);
    drop(running.workers);
    // The sender lives in the service, which lives in the thread.
    while running.turns.try_recv().is_ok() {}
    assert_eq!(
        running.turns.try_recv(),
        Err(std::sync::mpsc::TryRecvError::Disconnected)
    );
}

#[test]
fn a_paused_worker_can_be_stopped() {
    let running = run(Vec::new(), None);
    assert_eq!(running.turns.recv_timeout(SOON), Ok(Woken::ALL));
    running.workers.pause();
    running.kick.write(1).expect("a kick");
    drop(running.workers);
    assert_eq!(running.turns.try_iter().count(), 0);
}

#[test]
fn a_broken_queue_asks_for_a_reset_and_is_left_alone() {
    let running = run(vec![Err(Broken::Duplicate(3))], None);
    assert_eq!(running.turns.recv_timeout(SOON), Ok(Woken::ALL));
    running.kick.write(1).expect("a kick");
    assert!(running.turns.recv_timeout(NEVER).is_err());
    assert_eq!(running.told.resets.load(Ordering::SeqCst), 1);
    running.workers.pause();
    running.workers.resume();
    drop(running.workers);
}

// The avail index follows the device while it works: it must come up for air.
#[test]
fn a_turn_serves_at_most_one_ring_of_chains() {
    let mut driver = Driver::new(4);
    let at = driver.place(b"x");
    for _ in 0..4 {
        driver.offer(&[Part::read(at, 1)]);
    }
    let served = AtomicU32::new(0);
    let ram = driver.ram();
    let turn = driver.queue.drain(ram.backend(), Notify::Batch, |_| {
        served.fetch_add(1, Ordering::SeqCst);
        Ok(Some(0))
    });
    assert_eq!(turn.expect("a good queue"), Turn::Again);
    assert_eq!(served.load(Ordering::SeqCst), 4);
    assert_eq!(driver.used().len(), 4);
    assert_eq!(driver.interrupts(), 1, "one for all");
}

#[test]
fn each_completion_is_told_where_the_next_takes_time() {
    let mut driver = Driver::new(4);
    let at = driver.place(b"x");
    driver.offer(&[Part::read(at, 1)]);
    driver.offer(&[Part::read(at, 1)]);
    let turn = driver
        .queue
        .drain(driver.ram().backend(), Notify::Each, |_| Ok(Some(0)));
    assert_eq!(turn.expect("a good queue"), Turn::Idle);
    assert_eq!(driver.interrupts(), 2);
}

#[test]
fn a_chain_left_for_later_comes_again() {
    let mut driver = Driver::new(4);
    let at = driver.place(b"x");
    driver.offer(&[Part::read(at, 1)]);
    for answer in [None, Some(0)] {
        let turn = driver
            .queue
            .drain(driver.ram().backend(), Notify::Each, |_| Ok(answer));
        assert_eq!(turn.expect("a good queue"), Turn::Idle);
    }
    assert_eq!(driver.used(), [(0, 0)]);
}

/// Says that a chain is begun, and ends it when it may.
struct Slow {
    begun: Sender<u16>,
    leave: Receiver<()>,
}

impl Service for Slow {
    fn turn(&mut self, _woken: Woken, dma: &Dma, queues: &mut [ServedQueue]) -> Result<Turn, Broken> {
        queues[0].drain(dma, Notify::Each, |chain| {
            self.begun.send(chain.head).expect("the test listens");
            self.leave.recv().expect("the test says when");
            Ok(Some(0))
        })
    }
}

/// Four chains before a service that is in the midst of the first.
struct InTheMidst {
    driver: Driver,
    workers: Workers,
    begun: Receiver<u16>,
    leave: Sender<()>,
}

fn in_the_midst(event_idx: bool) -> InTheMidst {
    let mut driver = Driver::on(crate::devices::virtio::driver::ram(), 0, 8, event_idx);
    let at = driver.place(b"x");
    for _ in 0..4 {
        driver.offer(&[Part::read(at, 1)]);
    }
    let spare = Driver::on(driver.ram(), 1, 8, event_idx).queue;
    let (sender, begun) = channel();
    let (leave, receiver) = channel();
    let unit = Unit {
        name: "test".to_owned(),
        service: Box::new(Slow {
            begun: sender,
            leave: receiver,
        }),
        queues: vec![std::mem::replace(&mut driver.queue, spare)],
    };
    let interrupts: Arc<dyn Interrupts> = driver.told.clone();
    let workers = Workers::start(vec![unit], &driver.dma(), &interrupts).expect("a thread");
    workers.resume();
    assert_eq!(begun.recv_timeout(SOON), Ok(0));
    InTheMidst {
        driver,
        workers,
        begun,
        leave,
    }
}

/// Let the chain at hand, and all others, end once the gate of `workers` is closed.
fn leave_once_closed(gate: &Gate, leave: &Sender<()>) {
    while !gate.closed.load(Ordering::SeqCst) {
        thread::yield_now();
    }
    leave.send(()).expect("the service is in the midst of a chain");
    // Nobody may listen any more, which is as it should be.
    for _ in 0..3 {
        leave.send(()).ok();
    }
}

#[test]
fn a_pause_waits_for_one_chain_and_the_others_are_served_after_it() {
    for event_idx in [false, true] {
        let mut midst = in_the_midst(event_idx);
        let (workers, leave) = (&midst.workers, &midst.leave);
        thread::scope(|scope| {
            scope.spawn(|| workers.pause());
            leave_once_closed(&workers.workers[0].gate, leave);
        });
        assert_eq!(midst.driver.used(), [(0, 0)]);
        assert!(midst.begun.try_recv().is_err(), "no other is begun");
        midst.workers.resume();
        for head in 1..4 {
            assert_eq!(midst.begun.recv_timeout(SOON), Ok(head));
        }
        midst.workers.pause();
        assert_eq!(midst.driver.used(), [(1, 0), (2, 0), (3, 0)]);
    }
}

#[test]
fn the_end_waits_for_one_chain() {
    let mut midst = in_the_midst(false);
    let gate = midst.workers.workers[0].gate.clone();
    let (workers, leave) = (midst.workers, &midst.leave);
    thread::scope(|scope| {
        scope.spawn(|| drop(workers));
        leave_once_closed(&gate, leave);
    });
    assert_eq!(midst.driver.used(), [(0, 0)]);
    assert!(midst.begun.try_recv().is_err(), "no other is begun");
}

// The thread is in the midst of a chain when both orders come, or has parked between them.
#[test]
fn a_pause_that_ends_at_once_loses_nothing() {
    for parks in [false, true] {
        let mut midst = in_the_midst(false);
        let gate = midst.workers.workers[0].gate.clone();
        gate.order(Order::Pause);
        if parks {
            midst
                .leave
                .send(())
                .expect("the service is in the midst of a chain");
            gate.await_parked();
        }
        gate.order(Order::Run);
        if !parks {
            midst
                .leave
                .send(())
                .expect("the service is in the midst of a chain");
        }
        for head in 1..4 {
            assert_eq!(midst.begun.recv_timeout(SOON), Ok(head));
            midst.leave.send(()).expect("the service listens");
        }
        midst.workers.pause();
        assert_eq!(midst.driver.used().len(), 4);
    }
}
