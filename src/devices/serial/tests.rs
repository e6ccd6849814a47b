//! The port as a driver, the operator and the interrupt controller see it.

use super::*;
use crate::devices::character::Backend;
use crate::devices::request::RequestQueue;
use crate::platform::irq::InterruptController;
use event_manager::{EventManager, SubscriberOps};
use std::io::Read;
use std::os::unix::net::UnixStream;
use std::sync::atomic::AtomicU32;
use std::time::Duration;

const LOOP: u8 = 1 << 4;

#[derive(Default)]
struct Pulses(AtomicU32);

impl InterruptController for Pulses {
    fn line_changed(&self, _gsi: u32, _asserted: bool) {}
    fn pulse(&self, gsi: u32) {
        assert_eq!(gsi, COM1_GSI);
        self.0.fetch_add(1, Ordering::Relaxed);
    }
}

/// A port on a socket, with the operator connected to it.
struct Desk {
    pulses: Arc<Pulses>,
    serial: Arc<Serial>,
    operator: UnixStream,
    events: EventManager<Arc<HostEnd>>,
    _folder: tempfile::TempDir,
}

impl Desk {
    fn new() -> Self {
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().join("console");
        let requests = RequestQueue::new().expect("a descriptor");
        let host = Backend::Socket(path.clone()).open(&requests).expect("a socket");
        let pulses = Arc::new(Pulses::default());
        let serial = Serial::new(host.clone(), IrqLine::new(pulses.clone(), COM1_GSI));
        let mut events = EventManager::new().expect("an epoll descriptor");
        events.add_subscriber(host);
        let operator = UnixStream::connect(path).expect("somebody listens");
        operator
            .set_read_timeout(Some(Duration::from_secs(5)))
            .expect("a socket");
        let mut desk = Self {
            pulses,
            serial,
            operator,
            events,
            _folder: folder,
        };
        desk.settle();
        desk
    }

    /// Let the event loop do what there is to do.
    fn settle(&mut self) {
        while self.events.run_with_timeout(20).expect("a live epoll") > 0 {}
    }

    fn read(&self, register: u64) -> u8 {
        let mut data = [0];
        self.serial.read(register, &mut data);
        data[0]
    }

    fn write(&self, register: u64, value: u8) {
        self.serial.write(register, &[value]);
    }

    fn pulses(&self) -> u32 {
        self.pulses.0.swap(0, Ordering::Relaxed)
    }

    fn types(&mut self, keys: &[u8]) {
        self.operator.write_all(keys).expect("connected");
        self.settle();
    }

    /// What a driver takes out of the receiver until it is empty.
    fn received(&self) -> Vec<u8> {
        std::iter::from_fn(|| (self.read(5) & 1 != 0).then(|| self.read(0))).collect()
    }
}

#[test]
fn registers_have_their_reset_values() {
    let desk = Desk::new();
    let values: Vec<u8> = (1..8).map(|register| desk.read(register)).collect();
    assert_eq!(values, [0x00, 0xc1, 0x03, 0x08, 0x60, 0xb0, 0x00]);
}

#[test]
fn scratch_and_divisor_keep_what_is_written() {
    let desk = Desk::new();
    desk.write(7, 0x5a);
    desk.write(3, 0x83);
    desk.write(0, 0x01);
    desk.write(1, 0x02);
    assert_eq!((desk.read(0), desk.read(1)), (0x01, 0x02));
    desk.write(3, 0x03);
    assert_eq!((desk.read(7), desk.read(1)), (0x5a, 0x00));
}

#[test]
fn interrupt_enables_of_newer_uarts_do_not_stick() {
    let desk = Desk::new();
    desk.write(1, 0xff);
    assert_eq!(desk.read(1), 0x0f);
}

#[test]
fn what_the_driver_writes_reaches_the_operator() {
    let mut desk = Desk::new();
    b"hello\n".iter().for_each(|byte| desk.write(0, *byte));
    let mut seen = [0; 6];
    desk.operator.read_exact(&mut seen).expect("six bytes");
    assert_eq!(&seen, b"hello\n");
}

#[test]
fn an_enabled_transmitter_interrupt_comes_with_each_byte_once_acknowledged() {
    let desk = Desk::new();
    desk.write(1, 0x02);
    assert_eq!(desk.pulses(), 1);
    assert_eq!(desk.read(2), 0xc2);
    desk.write(0, b'a');
    desk.write(0, b'b');
    assert_eq!(desk.pulses(), 1);
}

#[test]
fn input_waits_until_a_driver_listens_and_then_interrupts() {
    let mut desk = Desk::new();
    desk.types(b"root\n");
    assert_eq!(desk.read(5) & 1, 0);
    assert_eq!(desk.read(0), 0);
    desk.write(1, 0x01);
    desk.settle();
    assert_eq!(desk.pulses(), 1);
    assert_eq!(desk.read(2) & 0x0f, 0x04);
    assert_eq!(desk.received(), b"root\n");
}

#[test]
fn a_driver_that_polls_gets_input_without_interrupts() {
    let mut desk = Desk::new();
    desk.types(b"x");
    (0..IDLE_LOOKS).for_each(|_| assert_eq!(desk.read(5) & 1, 0));
    desk.settle();
    assert_eq!(desk.received(), b"x");
    assert_eq!(desk.pulses(), 0);
}

#[test]
fn looking_before_each_byte_sent_is_not_listening() {
    let mut desk = Desk::new();
    desk.types(b"x");
    for _ in 0..10 * IDLE_LOOKS {
        desk.read(5);
        desk.write(0, b'.');
    }
    desk.settle();
    assert_eq!(desk.received(), b"");
}

#[test]
fn input_larger_than_the_fifo_arrives_whole_and_in_order() {
    let mut desk = Desk::new();
    desk.write(1, 0x01);
    let typed: Vec<u8> = (0..10_000_u32).map(|n| n.to_le_bytes()[0]).collect();
    let mut seen = Vec::new();
    desk.types(&typed);
    for _ in 0..typed.len() / 32 {
        seen.extend(desk.received());
        desk.settle_quickly();
    }
    seen.extend(desk.received());
    assert_eq!(seen, typed);
}

impl Desk {
    fn settle_quickly(&mut self) {
        while self.events.run_with_timeout(0).expect("a live epoll") > 0 {}
    }
}

#[test]
fn loop_back_returns_what_is_sent_and_the_operator_sees_none_of_it() {
    let mut desk = Desk::new();
    desk.write(1, 0x01);
    desk.write(4, LOOP | 0x0f);
    assert_eq!(desk.read(6), 0xf0);
    desk.write(0, b'l');
    assert_eq!(desk.received(), b"l");
    desk.write(4, 0x0b);
    desk.write(0, b'o');
    let mut seen = [0];
    desk.operator.read_exact(&mut seen).expect("one byte");
    assert_eq!(&seen, b"o");
}

#[test]
fn input_during_loop_back_is_kept_for_afterwards() {
    let mut desk = Desk::new();
    desk.write(1, 0x01);
    desk.write(4, LOOP);
    desk.types(b"kept");
    assert_eq!(desk.received(), b"");
    desk.write(4, 0x0b);
    desk.settle();
    assert_eq!(desk.received(), b"kept");
}

#[test]
fn a_loop_back_that_overruns_the_receiver_fills_nothing() {
    let desk = Desk::new();
    desk.write(4, LOOP);
    (0..100_000).for_each(|_| desk.write(0, b'x'));
    assert_eq!(desk.received().len(), 64);
}

#[test]
fn every_width_at_every_offset_is_a_row_of_byte_registers() {
    let desk = Desk::new();
    desk.write(3, 0x03);
    for width in [1, 2, 4, 8] {
        for offset in 0..=8 - width {
            let mut wide = vec![0; width];
            desk.serial.read(offset as u64, &mut wide);
            let narrow: Vec<u8> = (offset..offset + width)
                .map(|register| desk.read(register as u64))
                .collect();
            assert_eq!(wide, narrow, "{width} bytes at {offset}");
            desk.serial.write(offset as u64, &vec![0; width]);
            desk.serial.write(offset as u64, &vec![0xff; width]);
            desk.serial.reset();
        }
    }
}

#[test]
fn a_reset_forgets_registers_and_asks_drivers_to_listen_anew() {
    let mut desk = Desk::new();
    desk.write(1, 0x01);
    desk.write(7, 0x5a);
    desk.serial.reset();
    assert_eq!((desk.read(1), desk.read(7)), (0, 0));
    desk.types(b"early");
    assert_eq!(desk.received(), b"");
    desk.write(1, 0x01);
    desk.settle();
    assert_eq!(desk.received(), b"early");
}

/// A port whose output goes into a pipe that nobody empties for now.
#[test]
fn a_reader_that_is_behind_makes_the_driver_wait_and_nothing_is_lost() {
    let folder = tempfile::tempdir().expect("a folder");
    let path = folder.path().join("pipe");
    let made = std::process::Command::new("mkfifo").arg(&path).status();
    assert!(made.expect("mkfifo is everywhere").success());
    let both = rustix::fs::OFlags::RDWR | rustix::fs::OFlags::NONBLOCK;
    let reader = rustix::fs::open(&path, both, rustix::fs::Mode::empty()).expect("a pipe");
    let host = Backend::File(path)
        .open(&RequestQueue::new().expect("a descriptor"))
        .expect("somebody reads");
    let pulses = Arc::new(Pulses::default());
    let serial = Serial::new(host.clone(), IrqLine::new(pulses.clone(), COM1_GSI));
    let mut events = EventManager::new().expect("an epoll descriptor");
    events.add_subscriber(host);
    let ready = || {
        let mut status = [0];
        serial.read(5, &mut status);
        status[0] & 0x20 != 0
    };
    serial.write(1, &[0x02]);
    let sent = (0_u32..)
        .take_while(|n| {
            let send = ready();
            serial.write(0, &n.to_le_bytes()[..usize::from(send)]);
            send
        })
        .count();
    assert!(sent > 64 << 10, "{sent}");
    // The driver takes the last interrupt, sees that it cannot send, and waits for the next.
    serial.read(2, &mut [0]);
    pulses.0.store(0, Ordering::Relaxed);
    let mut seen = Vec::new();
    let mut chunk = [0; 4096];
    while let Ok(count @ 1..) = rustix::io::read(&reader, &mut chunk) {
        seen.extend_from_slice(&chunk[..count]);
        while events.run_with_timeout(0).expect("a live epoll") > 0 {}
    }
    assert_eq!(seen.len(), sent);
    let expected: Vec<u8> = (0_u32..).take(sent).map(|n| n.to_le_bytes()[0]).collect();
    assert!(seen == expected, "the bytes differ");
    assert!(ready());
    assert!(pulses.0.load(Ordering::Relaxed) > 0, "the driver is not woken up");
}
