//! A terminal: port 0 of a virtio console, between a queue pair and two descriptors of the host.
//!
//! Offers `SIZE` when a size is known. Virtual I/O Device 1.2, 5.3 (Console Device).

use std::collections::VecDeque;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::{Arc, Mutex, PoisonError};

use rustix::event::{PollFd, PollFlags, poll};
use vm_memory::VolatileSlice;
use zerocopy::{FromBytes, Immutable, IntoBytes};

use super::queue::{Broken, QueueMemory};
use super::worker::{Notify, ServedQueue, Service, Source, Turn, Unit, Woken};
use super::{Activation, Features, Interrupts, Kind, VirtioDevice, read_structure};
use crate::guest_warn;
use crate::platform::dma::Dma;
use crate::platform::host::HostError;
use crate::platform::vectored;

const SIZE: Features = Features::bit(0);

const RECEIVE: u16 = 0;
const TRANSMIT: u16 = 1;

/// Output of one chain that is kept while the terminal takes no more; what exceeds it is lost.
const MOST_OUTPUT: usize = 1 << 20;

/// Bytes written to the terminal at once: what a descriptor that polls writable takes without blocking.
const PIECE: usize = 256;

/// Where a console's characters come from and go to.
pub struct ConsoleConfig {
    /// What messages and threads call it.
    pub name: String,
    /// What is typed; `None`: nothing ever is.
    pub input: Option<OwnedFd>,
    /// What is shown; `None`: nobody looks.
    pub output: Option<OwnedFd>,
    /// Columns and rows, if known.
    pub size: Option<(u16, u16)>,
}

/// `struct virtio_console_config`, little endian.
#[derive(Debug, Clone, Copy, Default, FromBytes, IntoBytes, Immutable)]
#[repr(C)]
struct Configuration {
    cols: u16,
    rows: u16,
    max_nr_ports: u32,
    emerg_wr: u32,
}

/// A virtio console.
pub struct Console {
    name: String,
    input: Option<Arc<OwnedFd>>,
    output: Option<Arc<OwnedFd>>,
    has_size: bool,
    queue_sizes: [u16; 2],
    state: Mutex<State>,
}

struct State {
    configuration: Configuration,
    /// The driver to tell of a new size.
    driver: Option<Arc<dyn Interrupts>>,
}

impl Configuration {
    fn sized((cols, rows): (u16, u16)) -> Self {
        Self {
            cols: cols.to_le(),
            rows: rows.to_le(),
            ..Self::default()
        }
    }
}

impl Console {
    /// A console as configured.
    #[must_use]
    pub fn new(config: ConsoleConfig) -> Self {
        Self {
            name: config.name,
            input: config.input.map(Arc::new),
            output: config.output.map(Arc::new),
            has_size: config.size.is_some(),
            queue_sizes: [64, 64],
            state: Mutex::new(State {
                configuration: config.size.map(Configuration::sized).unwrap_or_default(),
                driver: None,
            }),
        }
    }

    /// The terminal has another size now. Heard by the driver if a size was known at first.
    pub fn resize(&self, columns: u16, rows: u16) {
        let driver = {
            let mut state = self.state();
            state.configuration = Configuration::sized((columns, rows));
            state.driver.clone()
        };
        if let Some(driver) = driver.filter(|_| self.has_size) {
            driver.configuration_changed();
        }
    }

    fn state(&self) -> std::sync::MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl VirtioDevice for Console {
    fn kind(&self) -> Kind {
        Kind::Console
    }

    fn name(&self) -> &str {
        &self.name
    }

    fn features(&self) -> Features {
        if self.has_size { SIZE } else { Features::empty() }
    }

    fn queue_sizes(&self) -> &[u16] {
        &self.queue_sizes
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        read_structure(self.state().configuration.as_bytes(), offset, data);
    }

    fn activate(&self, activation: Activation) -> Result<Vec<Unit>, HostError> {
        self.state().driver = Some(activation.interrupts);
        Ok(vec![Unit {
            name: self.name.clone(),
            service: Box::new(ConsolePort {
                name: self.name.clone(),
                input: self.input.clone(),
                output: self.output.clone(),
                pending: VecDeque::new(),
            }),
            queues: activation.queues.into_iter().flatten().collect(),
        }])
    }

    fn reset(&self) {
        self.state().driver = None;
    }
}

/// Serves both queues of a console.
struct ConsolePort {
    name: String,
    input: Option<Arc<OwnedFd>>,
    output: Option<Arc<OwnedFd>>,
    /// Output the terminal has not taken yet.
    pending: VecDeque<u8>,
}

impl Service for ConsolePort {
    fn sources(&self) -> Vec<Source<'_>> {
        let input = self.input.iter().map(|fd| (fd, false));
        let output = self.output.iter().map(|fd| (fd, true));
        input
            .chain(output)
            .map(|(fd, output)| Source {
                fd: fd.as_fd(),
                output,
            })
            .collect()
    }

    fn turn(&mut self, _woken: Woken, dma: &Dma, queues: &mut [ServedQueue]) -> Result<Turn, Broken> {
        let mut turn = Turn::Idle;
        for queue in queues {
            let view = dma.view();
            turn = turn.or(match queue.index() {
                RECEIVE => self.receive(&view, queue)?,
                TRANSMIT => self.transmit(&view, queue)?,
                _ => Turn::Idle,
            });
        }
        Ok(turn)
    }
}

/// Whether `fd` can be read (or written) without waiting.
fn ready(fd: &OwnedFd, flags: PollFlags) -> bool {
    let mut set = [PollFd::new(fd, flags)];
    let now = rustix::event::Timespec {
        tv_sec: 0,
        tv_nsec: 0,
    };
    matches!(poll(&mut set, Some(&now)), Ok(count) if count > 0)
}

impl ConsolePort {
    /// What is typed goes to the driver.
    fn receive<M: QueueMemory>(&mut self, mem: &M, queue: &mut ServedQueue) -> Result<Turn, Broken> {
        queue.drain(mem, Notify::Each, |chain| {
            let Some(input) = &self.input else { return Ok(None) };
            if chain.writable.is_empty() {
                return Ok(Some(0));
            }
            if !ready(input, PollFlags::IN) {
                return Ok(None);
            }
            match vectored::read(input.as_fd(), chain.writable.slices()) {
                Ok(0) => {
                    tracing::debug!(console = %self.name, "the input ended");
                    self.input = None;
                    Ok(None)
                }
                Ok(count) => Ok(Some(u32::try_from(count).unwrap_or(u32::MAX))),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => Ok(None),
                Err(error) => {
                    tracing::warn!(console = %self.name, %error, "the input is closed: it cannot be read");
                    self.input = None;
                    Ok(None)
                }
            }
        })
    }

    /// What the driver says is shown.
    fn transmit<M: QueueMemory>(&mut self, mem: &M, queue: &mut ServedQueue) -> Result<Turn, Broken> {
        if !self.show() {
            return Ok(Turn::Idle);
        }
        queue.drain(mem, Notify::Each, |chain| {
            if !self.show() {
                return Ok(None);
            }
            let len = chain.readable.len();
            if len > MOST_OUTPUT {
                guest_warn!(console = %self.name, "{len} bytes of output at once are cut to {MOST_OUTPUT}");
            }
            let mut bytes = vec![0; len.min(MOST_OUTPUT)];
            chain.readable.copy_to(&mut bytes);
            self.pending.extend(bytes);
            self.show();
            Ok(Some(0))
        })
    }

    /// Give the terminal what is pending; `false` when it takes no more for now.
    fn show(&mut self) -> bool {
        while !self.pending.is_empty() {
            let Some(output) = &self.output else {
                self.pending.clear();
                break;
            };
            if !ready(output, PollFlags::OUT) {
                return false;
            }
            let (front, _) = self.pending.as_slices();
            let mut piece = front[..front.len().min(PIECE)].to_vec();
            match vectored::write(output.as_fd(), &[VolatileSlice::from(&mut piece[..])]) {
                Ok(count) => drop(self.pending.drain(..count)),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return false,
                Err(error) => {
                    tracing::warn!(console = %self.name, %error, "the output is closed: it cannot be written");
                    self.output = None;
                }
            }
        }
        true
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::devices::virtio::driver::{Driver, Part};
    use std::io::{Read, Write};
    use std::os::unix::net::UnixStream;

    fn port() -> (ConsolePort, UnixStream) {
        let (ours, theirs) = UnixStream::pair().expect("a pair of sockets");
        let port = ConsolePort {
            name: "console0".to_owned(),
            input: Some(Arc::new(ours.try_clone().expect("a copy").into())),
            output: Some(Arc::new(ours.into())),
            pending: VecDeque::new(),
        };
        (port, theirs)
    }

    #[test]
    fn what_the_driver_says_is_shown() {
        let (mut port, mut terminal) = port();
        let mut driver = Driver::new(8);
        let at = driver.place(b"hello");
        driver.offer(&[Part::read(at, 3), Part::read(at + 3, 2)]);
        let turn = port
            .transmit(driver.ram().backend(), &mut driver.queue)
            .expect("a good queue");
        assert_eq!(turn, Turn::Idle);
        let mut shown = [0; 5];
        terminal.read_exact(&mut shown).expect("shown");
        assert_eq!(&shown, b"hello");
        assert_eq!(driver.used(), [(0, 0)]);
    }

    #[test]
    fn what_is_typed_reaches_the_driver() {
        let (mut port, mut terminal) = port();
        let mut driver = Driver::new(8);
        let at = driver.place(&[0; 16]);
        driver.offer(&[Part::write(at, 16)]);
        terminal.write_all(b"ls\n").expect("typed");
        let turn = port
            .receive(driver.ram().backend(), &mut driver.queue)
            .expect("a good queue");
        assert_eq!(turn, Turn::Idle);
        assert_eq!(driver.used(), [(0, 3)]);
        assert_eq!(driver.bytes(at, 4), b"ls\n\0");
    }

    #[test]
    fn without_input_the_buffer_waits() {
        let (mut port, mut terminal) = port();
        let mut driver = Driver::new(8);
        let at = driver.place(&[0; 16]);
        driver.offer(&[Part::write(at, 16)]);
        for expected in [vec![], vec![(0, 1)]] {
            let turn = port
                .receive(driver.ram().backend(), &mut driver.queue)
                .expect("a good queue");
            assert_eq!(turn, Turn::Idle);
            assert_eq!(driver.used(), expected);
            terminal.write_all(b"x").expect("typed");
        }
    }

    #[test]
    fn a_terminal_that_takes_nothing_holds_the_driver_up_and_loses_nothing() {
        let (mut port, mut terminal) = port();
        let mut driver = Driver::new(8);
        let text = vec![b'x'; 1 << 20];
        let at = driver.place(&text);
        let len = u32::try_from(text.len()).expect("small");
        driver.offer(&[Part::read(at, len)]);
        driver.offer(&[Part::read(at, len)]);
        let turn = port
            .transmit(driver.ram().backend(), &mut driver.queue)
            .expect("a good queue");
        assert_eq!(turn, Turn::Idle);
        assert_eq!(driver.used(), [(0, 0)], "the second waits");
        let mut shown = vec![0; text.len() * 2];
        std::thread::scope(|scope| {
            let reader = scope.spawn(|| terminal.read_exact(&mut shown));
            while port.pending.len() > 0 || driver.used().is_empty() {
                let turn = port.transmit(driver.ram().backend(), &mut driver.queue);
                assert_eq!(turn.expect("a good queue"), Turn::Idle);
                std::thread::yield_now();
            }
            while !port.show() {
                std::thread::yield_now();
            }
            reader.join().expect("no panic").expect("all of it");
        });
        assert!(shown.iter().all(|byte| *byte == b'x'));
    }

    #[test]
    fn a_terminal_that_is_gone_swallows_output() {
        let (mut port, terminal) = port();
        drop(terminal);
        let mut driver = Driver::new(8);
        let at = driver.place(b"hello");
        for _ in 0..3 {
            driver.offer(&[Part::read(at, 5)]);
            let turn = port
                .transmit(driver.ram().backend(), &mut driver.queue)
                .expect("a good queue");
            assert_eq!(turn, Turn::Idle);
            assert_eq!(driver.used().len(), 1);
        }
    }

    #[test]
    fn a_new_size_is_told_to_the_driver() {
        let console = Console::new(ConsoleConfig {
            name: "console0".to_owned(),
            input: None,
            output: None,
            size: Some((80, 25)),
        });
        let told = Arc::new(crate::devices::virtio::driver::Told::default());
        let units = console.activate(Activation {
            features: SIZE,
            queues: Vec::new(),
            interrupts: told.clone(),
        });
        assert_eq!(units.expect("nothing of the host is needed").len(), 1);
        console.resize(132, 43);
        let mut data = [0; 4];
        console.read_config(0, &mut data);
        assert_eq!(data, [132, 0, 43, 0]);
        assert_eq!(told.configuration.load(std::sync::atomic::Ordering::SeqCst), 1);
    }
}
