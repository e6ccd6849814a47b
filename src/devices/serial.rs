//! The serial port: a 16550A at port 0x3f8, GSI 4.
//!
//! The registers are vm-superio's. This file adds what a port on a board has besides: its wire, accesses of
//! every width, back-pressure in both directions, and input that waits until a driver listens.
//!
//! A byte costs a guest what hardware would cost it: one write, or one read, and whatever its driver asks of
//! the line status before.

#[cfg(test)]
mod tests;

use std::convert::Infallible;
use std::io::{self, Write};
use std::mem;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use vm_superio::Trigger;
use vm_superio::serial::{Error, Serial as Uart, SerialEvents};

use super::Device;
use super::character::{GuestEnd, HostEnd};
use super::register::{read_bytes, write_bytes};
use crate::platform::bus::BusDevice;
use crate::platform::irq::IrqLine;

/// The port's first I/O port.
pub const COM1_PORT: u64 = 0x3f8;
/// I/O ports it owns.
pub const PORTS: u64 = 8;
/// The IOAPIC input its wire goes to.
pub const COM1_GSI: u32 = 4;

/// Registers this file looks at on their way (National Semiconductor PC16550D data sheet, table II).
mod offset {
    pub(super) const DATA: u8 = 0;
    pub(super) const INTERRUPT_ENABLE: u8 = 1;
    pub(super) const LINE_CONTROL: u8 = 3;
    pub(super) const MODEM_CONTROL: u8 = 4;
    pub(super) const LINE_STATUS: u8 = 5;
}

/// Interrupt Enable Register: received data available.
const IER_RECEIVED_DATA: u8 = 1 << 0;
/// Line Control Register: the divisor latch hides the data and interrupt enable registers.
const LCR_DIVISOR_LATCH: u8 = 1 << 7;
/// Modem Control Register: the transmitter feeds the receiver.
const MCR_LOOP: u8 = 1 << 4;
/// Line Status Register: the transmitter holding register is empty (bit 5) and the transmitter idle (bit 6).
const LSR_TRANSMITTER_EMPTY: u8 = 0b11 << 5;

/// Looks at the line status in a row, with nothing sent in between, that show a driver without interrupts
/// to be waiting for input.
const IDLE_LOOKS: u32 = 16;

/// What the registers asked for while they were locked.
#[derive(Debug, Default)]
struct Asked {
    interrupt: AtomicBool,
    room: AtomicBool,
}

/// The registers' interrupt output: noted, and carried out once they are not locked any more.
struct Interrupt(Arc<Asked>);

impl Trigger for Interrupt {
    type E = Infallible;

    fn trigger(&self) -> Result<(), Infallible> {
        self.0.interrupt.store(true, Ordering::Relaxed);
        Ok(())
    }
}

/// What the registers report besides.
struct Events(Arc<Asked>);

impl SerialEvents for Events {
    fn buffer_read(&self) {}
    fn out_byte(&self) {}
    fn tx_lost_byte(&self) {}
    fn in_buffer_empty(&self) {
        self.0.room.store(true, Ordering::Relaxed);
    }
}

/// The transmitter.
struct Transmitter(Arc<HostEnd>);

impl Write for Transmitter {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.send(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

struct Port {
    uart: Uart<Interrupt, Events, Transmitter>,
    asked: Arc<Asked>,
    /// A driver listens. Until then input waits on the host's side: drivers empty the receiver when they
    /// start, which would lose what was sent to the machine's standard input beforehand.
    listening: bool,
    idle_looks: u32,
}

impl Port {
    fn new(host: &Arc<HostEnd>) -> Self {
        let asked = Arc::new(Asked::default());
        let (interrupt, events) = (Interrupt(asked.clone()), Events(asked.clone()));
        Self {
            uart: Uart::with_events(interrupt, events, Transmitter(host.clone())),
            asked,
            listening: false,
            idle_looks: 0,
        }
    }

    fn divisor_latch_open(&mut self) -> bool {
        self.uart.read(offset::LINE_CONTROL) & LCR_DIVISOR_LATCH != 0
    }

    fn loops_back(&mut self) -> bool {
        self.uart.read(offset::MODEM_CONTROL) & MCR_LOOP != 0
    }

    /// How many of `bytes` from the other side fit into the receiver now. In loop-back mode the receiver is
    /// not connected to the other side.
    fn receive(&mut self, bytes: &[u8]) -> usize {
        if !self.listening || self.loops_back() {
            return 0;
        }
        match self.uart.enqueue_raw_bytes(bytes) {
            Ok(taken) => taken,
            Err(Error::FullFifo | Error::IOError(_)) => 0,
            Err(Error::Trigger(never)) => match never {},
        }
    }

    fn read(&mut self, register: u8, host: &HostEnd) -> u8 {
        let value = self.uart.read(register);
        if register != offset::LINE_STATUS {
            return value;
        }
        self.idle_looks = self.idle_looks.saturating_add(1);
        if self.idle_looks >= IDLE_LOOKS {
            self.listen();
        }
        if host.is_full() {
            return value & !LSR_TRANSMITTER_EMPTY;
        }
        value
    }

    fn write(&mut self, register: u8, value: u8) {
        if register == offset::DATA {
            self.idle_looks = 0;
        }
        if register == offset::MODEM_CONTROL && value & MCR_LOOP == 0 {
            self.asked.room.store(true, Ordering::Relaxed);
        }
        if register == offset::INTERRUPT_ENABLE
            && value & IER_RECEIVED_DATA != 0
            && !self.divisor_latch_open()
        {
            self.listen();
        }
        match self.uart.write(register, value) {
            Ok(()) => {}
            Err(Error::Trigger(never)) => match never {},
            Err(Error::IOError(_) | Error::FullFifo) => {
                unreachable!("the transmitter takes everything, and only input fills the FIFO")
            }
        }
    }

    fn listen(&mut self) {
        if !mem::replace(&mut self.listening, true) {
            self.asked.room.store(true, Ordering::Relaxed);
        }
    }
}

/// The port.
pub struct Serial {
    port: Mutex<Port>,
    host: Arc<HostEnd>,
    line: IrqLine,
}

impl Serial {
    /// A port that speaks with `host` and interrupts by `line`. Connects itself; subscribe `host` to the event
    /// loop afterwards.
    #[must_use]
    pub fn new(host: Arc<HostEnd>, line: IrqLine) -> Arc<Self> {
        let serial = Arc::new(Self {
            port: Mutex::new(Port::new(&host)),
            host,
            line,
        });
        let end: Arc<dyn GuestEnd> = serial.clone();
        serial.host.connect(Arc::downgrade(&end));
        serial
    }

    fn port(&self) -> MutexGuard<'_, Port> {
        self.port.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Do what the registers asked for while they were locked.
    fn carry_out(&self, port: MutexGuard<'_, Port>) {
        let interrupt = port.asked.interrupt.swap(false, Ordering::Relaxed);
        let room = port.asked.room.swap(false, Ordering::Relaxed);
        drop(port);
        if interrupt {
            self.line.pulse();
        }
        if room {
            self.host.room_made();
        }
    }
}

impl BusDevice for Serial {
    fn read(&self, offset: u64, data: &mut [u8]) {
        let mut port = self.port();
        read_bytes(offset, data, |at| match register(at) {
            Some(register) => port.read(register, &self.host),
            None => 0xff,
        });
        self.carry_out(port);
    }

    fn write(&self, offset: u64, data: &[u8]) {
        let mut port = self.port();
        write_bytes(offset, data, |at, byte| {
            if let Some(register) = register(at) {
                port.write(register, byte);
            }
        });
        self.carry_out(port);
    }
}

fn register(at: u64) -> Option<u8> {
    u8::try_from(at).ok().filter(|at| u64::from(*at) < PORTS)
}

impl GuestEnd for Serial {
    fn receive(&self, bytes: &[u8]) -> usize {
        let mut port = self.port();
        let taken = port.receive(bytes);
        self.carry_out(port);
        taken
    }

    fn may_send(&self) {
        let mut port = self.port();
        // The holding register has emptied, which interrupts a driver that enabled it. Writing the enables
        // again is how these registers are asked to look.
        if !port.divisor_latch_open() {
            let enabled = port.uart.read(offset::INTERRUPT_ENABLE);
            port.write(offset::INTERRUPT_ENABLE, enabled);
        }
        self.carry_out(port);
    }
}

impl Device for Serial {
    fn name(&self) -> &'static str {
        "serial0"
    }

    fn reset(&self) {
        *self.port() = Port::new(&self.host);
    }
}
