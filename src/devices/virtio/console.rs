//! A terminal: port 0 of a virtio console, between a queue pair and a stream of characters.
//!
//! Offers `SIZE` when a size is known. Virtual I/O Device 1.2, 5.3 (Console Device).

use std::collections::VecDeque;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use rustix::event::{EventfdFlags, eventfd};
use zerocopy::{FromBytes, Immutable, IntoBytes};

use super::queue::{Broken, MemoryViews};
use super::worker::{Notify, ServedQueue, Service, Source, Turn, Unit, Woken};
use super::{Activation, Features, Interrupts, Kind, VirtioDevice, read_structure};
use crate::devices::character::{GuestEnd, HostEnd};
use crate::guest_warn;
use crate::platform::dma::Dma;
use crate::platform::host::HostError;

const SIZE: Features = Features::bit(0);

const RECEIVE: u16 = 0;
const TRANSMIT: u16 = 1;

/// Input kept until the driver offers buffers; more waits at the host's end.
const MOST_INPUT: usize = 4096;

/// Output of one chain; what exceeds it is lost. Linux sends a page at once.
const MOST_OUTPUT: usize = 1 << 20;

/// `struct virtio_console_config`, little endian.
#[derive(Debug, Clone, Copy, Default, FromBytes, IntoBytes, Immutable)]
#[repr(C)]
struct Configuration {
    cols: u16,
    rows: u16,
    max_nr_ports: u32,
    emerg_wr: u32,
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

/// A virtio console.
pub struct Console {
    name: String,
    port: Arc<Port>,
    queue_sizes: [u16; 2],
}

struct State {
    configuration: Configuration,
    /// The driver to tell of a new size.
    driver: Option<Arc<dyn Interrupts>>,
}

/// What the stream and the thread share.
struct Port {
    host: Arc<HostEnd>,
    /// A size was known at first, so the driver was offered to hear of others.
    has_size: bool,
    state: Mutex<State>,
    /// Typed, and not given to the driver yet.
    input: Mutex<VecDeque<u8>>,
    /// Wakes the thread: there is input, or room for output.
    wake: std::os::fd::OwnedFd,
}

impl Console {
    /// A console called `name` at the end of `host`, as large as that is if it has a size.
    pub fn new(name: impl Into<String>, host: Arc<HostEnd>) -> Result<Self, HostError> {
        let size = host.size();
        Self::sized(name.into(), host, size)
    }

    fn sized(name: String, host: Arc<HostEnd>, size: Option<(u16, u16)>) -> Result<Self, HostError> {
        let wake = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)
            .map_err(|error| HostError::new(format!("create an eventfd for console {name}"), error))?;
        let port = Arc::new(Port {
            host,
            has_size: size.is_some(),
            state: Mutex::new(State {
                configuration: size.map(Configuration::sized).unwrap_or_default(),
                driver: None,
            }),
            input: Mutex::default(),
            wake,
        });
        let console = Self {
            name,
            port,
            queue_sizes: [64, 64],
        };
        let guest = console.guest_end();
        console.port.host.connect(Arc::downgrade(&guest));
        Ok(console)
    }

    /// Its end of the stream, which takes what is typed.
    #[must_use]
    pub fn guest_end(&self) -> Arc<dyn GuestEnd> {
        self.port.clone()
    }

    /// What serves its queues.
    #[must_use]
    pub fn queues(&self) -> ConsoleQueues {
        ConsoleQueues {
            name: self.name.clone(),
            port: self.port.clone(),
            pending: VecDeque::new(),
        }
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
        if self.port.has_size {
            SIZE
        } else {
            Features::empty()
        }
    }

    fn queue_sizes(&self) -> &[u16] {
        &self.queue_sizes
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        read_structure(self.port.state().configuration.as_bytes(), offset, data);
    }

    fn activate(&self, activation: Activation) -> Result<Vec<Unit>, HostError> {
        self.port.state().driver = Some(activation.interrupts);
        Ok(vec![Unit {
            name: self.name.clone(),
            service: Box::new(self.queues()),
            queues: activation.queues.into_iter().flatten().collect(),
        }])
    }

    fn reset(&self) {
        self.port.state().driver = None;
    }
}

impl Port {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn input(&self) -> MutexGuard<'_, VecDeque<u8>> {
        self.input.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn wake(&self) {
        // Only a full counter refuses, and that wakes too.
        let _ = rustix::io::write(&self.wake, &1_u64.to_ne_bytes());
    }
}

impl GuestEnd for Port {
    fn receive(&self, bytes: &[u8]) -> usize {
        let taken = {
            let mut input = self.input();
            let taken = bytes.len().min(MOST_INPUT - input.len());
            input.extend(&bytes[..taken]);
            taken
        };
        if taken > 0 {
            self.wake();
        }
        taken
    }

    fn may_send(&self) {
        self.wake();
    }

    fn resized(&self, size: (u16, u16)) {
        if !self.has_size {
            return;
        }
        let driver = {
            let mut state = self.state();
            state.configuration = Configuration::sized(size);
            state.driver.clone()
        };
        if let Some(driver) = driver {
            driver.configuration_changed();
        }
    }
}

/// Serves both queues of a console.
pub struct ConsoleQueues {
    name: String,
    port: Arc<Port>,
    /// Output the host's end has no room for yet.
    pending: VecDeque<u8>,
}

impl Service for ConsoleQueues {
    fn sources(&self) -> Vec<Source<'_>> {
        let fd: BorrowedFd<'_> = self.port.wake.as_fd();
        vec![Source { fd, output: false }]
    }

    fn turn(&mut self, _woken: Woken, dma: &Dma, queues: &mut [ServedQueue]) -> Result<Turn, Broken> {
        // An empty counter means that a turn before has seen to it.
        let _ = rustix::io::read(&self.port.wake, &mut [0_u8; 8]);
        let mut turn = Turn::Idle;
        for queue in queues {
            turn = turn.or(match queue.index() {
                RECEIVE => self.receive(dma, queue)?,
                TRANSMIT => self.transmit(dma, queue)?,
                _ => Turn::Idle,
            });
        }
        Ok(turn)
    }
}

impl ConsoleQueues {
    /// What is typed goes to the driver, into what it offers in `queue`.
    ///
    /// # Errors
    /// When the driver's ring is none.
    pub fn receive<V: MemoryViews>(&mut self, mem: &V, queue: &mut ServedQueue) -> Result<Turn, Broken> {
        let turn = queue.drain(mem, Notify::Batch, |chain| {
            let mut input = self.port.input();
            if input.is_empty() {
                return Ok(None);
            }
            let count = chain.writable.copy_from(input.make_contiguous());
            input.drain(..count);
            Ok(Some(u32::try_from(count).expect("at most MOST_INPUT")))
        });
        self.port.host.room_made();
        turn
    }

    /// What the driver says in `queue` is shown.
    ///
    /// # Errors
    /// When the driver's ring is none.
    pub fn transmit<V: MemoryViews>(&mut self, mem: &V, queue: &mut ServedQueue) -> Result<Turn, Broken> {
        if !self.show() {
            return Ok(Turn::Idle);
        }
        queue.drain(mem, Notify::Batch, |chain| {
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

    /// Give the host's end what is pending; `false` when it has no room for now.
    fn show(&mut self) -> bool {
        while !self.pending.is_empty() {
            let room = self.port.host.room();
            if room == 0 {
                return false;
            }
            let (front, _) = self.pending.as_slices();
            let count = front.len().min(room);
            self.port.host.send(&front[..count]);
            self.pending.drain(..count);
        }
        true
    }
}

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::io::Read;
    use std::path::Path;

    use event_manager::{EventManager, SubscriberOps};
    use rustix::fs::{CWD, FileType, Mode};

    use super::*;
    use crate::devices::character::Backend;
    use crate::devices::request::RequestQueue;
    use crate::devices::virtio::driver::{Driver, Part, Told};

    fn console(backend: &Backend) -> (Console, ConsoleQueues) {
        of_size(backend, Some((80, 25)))
    }

    fn of_size(backend: &Backend, size: Option<(u16, u16)>) -> (Console, ConsoleQueues) {
        let requests = RequestQueue::new().expect("a descriptor");
        let host = backend.open(&requests).expect("the host has room for it");
        let console = Console::sized("console0".to_owned(), host, size).expect("a descriptor");
        let queues = ConsoleQueues {
            name: "console0".to_owned(),
            port: console.port.clone(),
            pending: VecDeque::new(),
        };
        (console, queues)
    }

    fn transmit(queues: &mut ConsoleQueues, driver: &mut Driver) -> Turn {
        let turn = queues.transmit(driver.ram().backend(), &mut driver.queue);
        turn.expect("a good queue")
    }

    fn receive(queues: &mut ConsoleQueues, driver: &mut Driver) -> Turn {
        let turn = queues.receive(driver.ram().backend(), &mut driver.queue);
        turn.expect("a good queue")
    }

    #[test]
    fn what_the_driver_says_is_shown() {
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().join("console");
        let (_console, mut queues) = console(&Backend::File(path.clone()));
        let mut driver = Driver::new(8);
        let at = driver.place(b"hello");
        driver.offer(&[Part::read(at, 3), Part::read(at + 3, 2)]);
        assert_eq!(transmit(&mut queues, &mut driver), Turn::Idle);
        assert_eq!(std::fs::read(path).expect("made"), b"hello");
        assert_eq!(driver.used(), [(0, 0)]);
        assert_eq!(driver.interrupts(), 1);
    }

    #[test]
    fn what_is_typed_reaches_the_driver() {
        let (console, mut queues) = console(&Backend::Null);
        let mut driver = Driver::new(8);
        let at = driver.place(&[0; 16]);
        assert_eq!(console.port.receive(b"ls\nmore"), 7);
        assert_eq!(receive(&mut queues, &mut driver), Turn::Idle);
        driver.offer(&[Part::write(at, 3)]);
        driver.offer(&[Part::write(at + 8, 8)]);
        assert_eq!(receive(&mut queues, &mut driver), Turn::Idle);
        assert_eq!(driver.used(), [(0, 3), (1, 4)]);
        assert_eq!(driver.bytes(at, 12), b"ls\n\0\0\0\0\0more");
    }

    #[test]
    fn without_input_the_buffer_waits() {
        let (console, mut queues) = console(&Backend::Null);
        let mut driver = Driver::new(8);
        let at = driver.place(&[0; 16]);
        driver.offer(&[Part::write(at, 16)]);
        assert_eq!(receive(&mut queues, &mut driver), Turn::Idle);
        assert!(driver.used().is_empty());
        assert_eq!(console.port.receive(b"x"), 1);
        assert_eq!(receive(&mut queues, &mut driver), Turn::Idle);
        assert_eq!(driver.used(), [(0, 1)]);
    }

    #[test]
    fn input_that_the_driver_does_not_take_stays_at_the_hosts_end() {
        let (console, mut queues) = console(&Backend::Null);
        assert_eq!(console.port.receive(&[1; MOST_INPUT + 1]), MOST_INPUT);
        assert_eq!(console.port.receive(&[2]), 0);
        let mut driver = Driver::new(8);
        let at = driver.place(&[0; 16]);
        driver.offer(&[Part::write(at, 16)]);
        assert_eq!(receive(&mut queues, &mut driver), Turn::Idle);
        assert_eq!(console.port.receive(&[2; 100]), 16);
    }

    fn pipe(folder: &Path) -> (std::path::PathBuf, File) {
        let path = folder.join("pipe");
        rustix::fs::mknodat(CWD, &path, FileType::Fifo, Mode::RUSR | Mode::WUSR, 0).expect("a named pipe");
        let reader = rustix::fs::open(
            &path,
            rustix::fs::OFlags::RDONLY | rustix::fs::OFlags::NONBLOCK,
            Mode::empty(),
        );
        (path, File::from(reader.expect("opened")))
    }

    #[test]
    fn a_terminal_that_takes_nothing_holds_the_driver_up_and_loses_nothing() {
        let folder = tempfile::tempdir().expect("a folder");
        let (path, mut terminal) = pipe(folder.path());
        let (_console, mut queues) = console(&Backend::File(path));
        let mut events = EventManager::new().expect("an epoll descriptor");
        events.add_subscriber(queues.port.host.clone());
        let mut driver = Driver::new(8);
        let text: Vec<u8> = (0..MOST_OUTPUT).map(|at| (at / 7).to_le_bytes()[0]).collect();
        let at = driver.place(&text);
        let len = u32::try_from(text.len()).expect("small");
        driver.offer(&[Part::read(at, len)]);
        driver.offer(&[Part::read(at, len)]);
        assert_eq!(transmit(&mut queues, &mut driver), Turn::Idle);
        assert_eq!(driver.used(), [(0, 0)], "the second waits");

        let mut shown = Vec::new();
        let mut piece = vec![0; 1 << 16];
        while shown.len() < 2 * text.len() {
            let count = terminal.read(&mut piece).unwrap_or(0);
            shown.extend_from_slice(&piece[..count]);
            events.run_with_timeout(0).expect("events");
            assert_eq!(transmit(&mut queues, &mut driver), Turn::Idle);
        }
        assert!(shown[..text.len()] == text && shown[text.len()..] == text);
        assert_eq!(driver.used().len(), 1);
    }

    #[test]
    fn a_chain_of_more_than_the_bound_is_cut() {
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().join("console");
        let (_console, mut queues) = console(&Backend::File(path.clone()));
        let mut driver = Driver::new(8);
        let at = driver.place(b"x");
        let len = u32::try_from(MOST_OUTPUT + 1).expect("small");
        driver.offer(&[Part::read(at, len)]);
        assert_eq!(transmit(&mut queues, &mut driver), Turn::Idle);
        let shown = std::fs::metadata(path).expect("made").len();
        assert_eq!(shown, MOST_OUTPUT as u64);
    }

    #[test]
    fn a_new_size_is_told_to_the_driver() {
        let (console, _queues) = console(&Backend::Null);
        let told = Arc::new(Told::default());
        let units = console.activate(Activation {
            features: SIZE,
            queues: Vec::new(),
            interrupts: told.clone(),
        });
        assert_eq!(units.expect("nothing of the host is needed").len(), 1);
        console.port.resized((132, 43));
        let mut data = [0; 4];
        console.read_config(0, &mut data);
        assert_eq!(data, [132, 0, 43, 0]);
        assert_eq!(told.configuration.load(std::sync::atomic::Ordering::SeqCst), 1);
        console.reset();
        console.port.resized((80, 25));
        assert_eq!(told.configuration.load(std::sync::atomic::Ordering::SeqCst), 1);
    }
    #[test]
    fn a_console_of_no_size_offers_none_and_tells_of_none() {
        let (console, _queues) = of_size(&Backend::Null, None);
        assert_eq!(console.features(), Features::empty());
        let told = Arc::new(Told::default());
        console.port.state().driver = Some(told.clone());
        console.port.resized((132, 43));
        let mut data = [0xee; 4];
        console.read_config(0, &mut data);
        assert_eq!(data, [0; 4]);
        assert_eq!(told.configuration.load(std::sync::atomic::Ordering::SeqCst), 0);
    }
}
