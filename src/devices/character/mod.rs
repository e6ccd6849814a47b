//! A stream of characters between a device of the guest (a serial port, a virtio console) and something on the
//! host: the terminal, a file, a pseudo-terminal, a socket.
//!
//! Input is never lost: bytes are read from the host only when the guest's device has room for them. Output
//! never blocks a processor: what the host does not take at once waits in a bounded backlog. When that is
//! full, a backend that can make the guest wait does ([`HostEnd::is_full`]); one that nobody may be reading
//! (a pseudo-terminal, a socket) forgets its oldest bytes instead.

mod backend;
pub mod escape;
mod output;
pub mod terminal;
#[cfg(test)]
mod tests;

use std::collections::VecDeque;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::net::UnixListener;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, OnceLock, PoisonError, Weak};

use event_manager::{EventOps, EventSet, EventSubscriber, Events};
use rustix::event::{EventfdFlags, PollFd, PollFlags, Timespec, eventfd, poll};
use rustix::io::Errno;

use self::escape::{Command, Escape, HELP};
use self::output::Output;
use self::terminal::RawTerminal;
use super::request::{Request, RequestQueue};
use crate::guest_warn;
use crate::platform::host::HostError;

pub use self::backend::Backend;

/// The device of the guest at the other end.
pub trait GuestEnd: Send + Sync {
    /// Take the first of `bytes`, and say how many. After less than all of them, the device calls
    /// [`HostEnd::room_made`] once it can take more.
    fn receive(&self, bytes: &[u8]) -> usize;

    /// The backlog of output is no longer full.
    fn may_send(&self);

    /// The terminal at the host's end has so many columns and rows now. A serial port has no word for it.
    fn resized(&self, _size: (u16, u16)) {}
}

/// The host's end.
///
/// Locks: the input's before the device's, the device's before the output's.
pub struct HostEnd {
    /// Where the other side is, for the operator: "/dev/pts/4".
    place: String,
    guest: OnceLock<Weak<dyn GuestEnd>>,
    input: Mutex<Input>,
    output: Mutex<Output>,
    /// Input waits for room in the guest's device.
    starved: AtomicBool,
    /// Signalled when a starved input may go on.
    room: OwnedFd,
    listener: Option<Listener>,
    /// Where the escape keys' requests go; without it there are no escape keys.
    requests: Option<Arc<RequestQueue>>,
    /// Raw for as long as this end lives.
    terminal: Option<RawTerminal>,
}

/// What the host sends us.
struct Input {
    fd: Option<OwnedFd>,
    /// The descriptor is of a kind that is always ready and cannot be watched: a regular file.
    always_ready: bool,
    escape: Escape,
    /// Read, and not taken by the guest's device yet.
    held: VecDeque<u8>,
}

/// A socket whose file goes with it.
struct Listener {
    socket: UnixListener,
    path: PathBuf,
}

impl Drop for Listener {
    fn drop(&mut self) {
        if let Err(error) = std::fs::remove_file(&self.path) {
            tracing::warn!(%error, path = %self.path.display(), "cannot remove the console's socket");
        }
    }
}

/// What an event is about.
mod token {
    pub(super) const ROOM: u32 = 0;
    pub(super) const INPUT: u32 = 1;
    pub(super) const OUTPUT: u32 = 2;
    pub(super) const LISTENER: u32 = 3;
    pub(super) const TERMINAL: u32 = 4;
}

/// How reading from the host went.
enum Pumped {
    /// Nothing more for now: an event will tell.
    Dry,
    /// There may be more, and others shall have their turn first.
    More,
    /// The other side is gone.
    Ended,
}

/// Bytes read from the host at once.
const CHUNK: usize = 256;
/// Chunks read before the event loop's other work has its turn.
const READS_AT_ONCE: usize = 64;
/// Keys kept for a guest that does not take them, while more are read to find the escape keys.
const TYPED_AHEAD: usize = 64 << 10;

impl HostEnd {
    fn new(place: String, input: Option<OwnedFd>, output: Output) -> Result<Self, HostError> {
        let room = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)
            .map_err(|source| HostError::new("create an eventfd for a console", source))?;
        Ok(Self {
            place,
            guest: OnceLock::new(),
            input: Mutex::new(Input {
                fd: input,
                always_ready: false,
                escape: Escape::default(),
                held: VecDeque::new(),
            }),
            output: Mutex::new(output),
            starved: AtomicBool::new(false),
            room,
            listener: None,
            requests: None,
            terminal: None,
        })
    }

    /// Where the other side is, for the operator: "/dev/pts/4".
    #[must_use]
    pub fn place(&self) -> &str {
        &self.place
    }

    /// Columns and rows, where the other side is a terminal that knows them.
    #[must_use]
    pub fn size(&self) -> Option<(u16, u16)> {
        self.terminal.as_ref().and_then(RawTerminal::size)
    }

    /// Deliver input to `guest`, and tell it when it may send again. Once only.
    ///
    /// # Panics
    /// When a device is connected already.
    pub fn connect(&self, guest: Weak<dyn GuestEnd>) {
        assert!(self.guest.set(guest).is_ok(), "one device per stream");
        // Input may have been looked at, and left where it was, before there was anybody to take it.
        self.wake();
    }

    /// Send what the guest wrote. Never blocks.
    pub fn send(&self, bytes: &[u8]) {
        self.output
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .write(bytes);
    }

    /// Whether the guest should wait before it sends more; [`GuestEnd::may_send`] ends that.
    #[must_use]
    pub fn is_full(&self) -> bool {
        self.output
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .is_full()
    }

    /// How many bytes the guest may send now without losing any. Only sending makes it less.
    #[must_use]
    pub fn room(&self) -> usize {
        self.output.lock().unwrap_or_else(PoisonError::into_inner).room()
    }

    /// The guest's device has room again. Cheap when nobody waits for it.
    pub fn room_made(&self) {
        if self.starved.swap(false, Ordering::SeqCst) {
            self.wake();
        }
    }

    /// Have the event loop look at the input again.
    fn wake(&self) {
        // Only a full counter refuses, and that is a signal too.
        let _ = rustix::io::write(&self.room, &1_u64.to_ne_bytes());
    }

    fn guest(&self) -> Option<Arc<dyn GuestEnd>> {
        self.guest.get().and_then(Weak::upgrade)
    }

    /// Move input to the guest's device until one of the two has had enough.
    fn pump(&self, input: &mut Input) -> Pumped {
        let Some(guest) = self.guest() else {
            return Pumped::Dry;
        };
        for _ in 0..READS_AT_ONCE {
            let taken = self.deliver(&*guest, &mut input.held);
            // At a terminal one more key may be a command, which must work however busy the guest is.
            if !taken && self.requests.is_none() {
                return Pumped::Dry;
            }
            match self.read(input) {
                Ok(true) | Err(Errno::INTR) => {}
                Ok(false) => return Pumped::Dry,
                // A pseudo-terminal that nobody has open answers so; somebody may come.
                Err(Errno::IO) if input.fd.as_ref().is_some_and(rustix::termios::isatty) => {
                    return Pumped::Dry;
                }
                Err(Errno::PIPE) => return Pumped::Ended,
                Err(error) => {
                    tracing::warn!(%error, place = self.place, "cannot read the console's input; it ends here");
                    return Pumped::Ended;
                }
            }
        }
        Pumped::More
    }

    /// Give the guest's device what it takes; `true` when that was all of it. When not, the device's
    /// [`Self::room_made`] comes back here.
    fn deliver(&self, guest: &dyn GuestEnd, held: &mut VecDeque<u8>) -> bool {
        while !held.is_empty() {
            let mut taken = guest.receive(held.make_contiguous());
            if taken == 0 {
                // The guest may have made room just before it could see that somebody waits for it.
                self.starved.store(true, Ordering::SeqCst);
                taken = guest.receive(held.make_contiguous());
                if taken == 0 {
                    return false;
                }
                self.starved.store(false, Ordering::SeqCst);
            }
            held.drain(..taken);
        }
        true
    }

    /// Read what is there without waiting: `Ok(false)` when there is nothing, EPIPE at the end of the input.
    ///
    /// The descriptor may be shared with the shell that started us, so it is asked whether it is ready rather
    /// than made non-blocking for everybody.
    fn read(&self, input: &mut Input) -> Result<bool, Errno> {
        let Some(fd) = &input.fd else {
            return Ok(false);
        };
        // A job in the background that reads its terminal is stopped.
        if self.terminal.is_some() && !terminal::is_ours(fd) {
            return Ok(false);
        }
        let mut ready = [PollFd::new(fd, PollFlags::IN)];
        if poll(&mut ready, Some(&Timespec::default()))? == 0 {
            return Ok(false);
        }
        let mut chunk = [0; CHUNK];
        let count = match rustix::io::read(fd, &mut chunk) {
            Ok(0) => return Err(Errno::PIPE),
            Err(Errno::AGAIN) => return Ok(false),
            other => other?,
        };
        let Some(requests) = &self.requests else {
            input.held.extend(&chunk[..count]);
            return Ok(true);
        };
        for byte in &chunk[..count] {
            match input.escape.feed(*byte, &mut input.held) {
                Some(Command::Quit) => requests.raise(Request::Quit),
                Some(Command::Help) => self.send(HELP),
                None => {}
            }
        }
        if input.held.len() > TYPED_AHEAD {
            input.held.truncate(TYPED_AHEAD);
            guest_warn!("lost keys: the guest is {TYPED_AHEAD} of them behind");
        }
        Ok(true)
    }

    fn pump_and_watch(&self, ops: &mut EventOps) {
        let mut input = self.input.lock().unwrap_or_else(PoisonError::into_inner);
        match self.pump(&mut input) {
            Pumped::Dry => {}
            Pumped::More => self.wake(),
            Pumped::Ended => {
                let Some(fd) = input.fd.take() else {
                    return;
                };
                if !input.always_ready {
                    // Fails only for what is not watched.
                    let _ = ops.remove(Events::empty(&fd));
                }
                // A client that stopped sending has left; others may still read what we write.
                if self.listener.is_some() {
                    self.output
                        .lock()
                        .unwrap_or_else(PoisonError::into_inner)
                        .disconnect();
                }
                tracing::debug!(place = self.place, "the console's input ended");
            }
        }
    }

    /// Somebody connected to the socket.
    fn accept(&self, listener: &Listener, ops: &mut EventOps) {
        let Ok((client, _)) = listener.socket.accept() else {
            // It left again before we looked.
            return;
        };
        let mut input = self.input.lock().unwrap_or_else(PoisonError::into_inner);
        if input.fd.is_some() {
            tracing::warn!(
                place = self.place,
                "refused a second client of the console's socket"
            );
            return;
        }
        let watched = client
            .set_nonblocking(true)
            .and_then(|()| client.try_clone())
            .map(|twin| (OwnedFd::from(client), OwnedFd::from(twin)));
        match watched {
            Ok((reads, writes)) => {
                watch(ops, &reads, token::INPUT, EventSet::IN | EventSet::OUT);
                input.fd = Some(reads);
                self.output
                    .lock()
                    .unwrap_or_else(PoisonError::into_inner)
                    .connect(writes);
            }
            Err(error) => tracing::warn!(%error, place = self.place, "cannot talk to the console's client"),
        }
    }

    /// There was a signal about the terminal.
    fn heed_signals(&self, ops: &mut EventOps) {
        let changed = self.terminal.as_ref().is_some_and(RawTerminal::heed_signals);
        if !changed {
            return;
        }
        if let Some((guest, size)) = self.guest().zip(self.size()) {
            guest.resized(size);
        }
        // Typed while it was not ours to read.
        self.pump_and_watch(ops);
    }

    /// Output may flow again.
    fn flush(&self) {
        let freed = self.output.lock().unwrap_or_else(PoisonError::into_inner).flush();
        if let Some(guest) = self.guest().filter(|_| freed) {
            guest.may_send();
        }
    }
}

/// Watch `fd` for changes of `events`; `false` when it is of a kind that is always ready.
fn watch(ops: &mut EventOps, fd: &impl AsRawFd, about: u32, events: EventSet) -> bool {
    let events = events | EventSet::EDGE_TRIGGERED;
    match ops.add(Events::with_data(fd, about, events)) {
        Ok(()) => true,
        Err(event_manager::Error::Epoll(error)) if error.errno() == Errno::PERM.raw_os_error() => false,
        Err(error) => {
            tracing::error!(%error, "cannot watch a console's descriptor");
            true
        }
    }
}

impl EventSubscriber for HostEnd {
    fn process(&self, events: Events, ops: &mut EventOps) {
        match events.data() {
            token::ROOM => {
                // An empty counter means that another event has already seen to it.
                let _ = rustix::io::read(&self.room, &mut [0_u8; 8]);
                self.pump_and_watch(ops);
            }
            token::INPUT => {
                self.pump_and_watch(ops);
                self.flush();
            }
            token::OUTPUT => self.flush(),
            token::TERMINAL => self.heed_signals(ops),
            _ => {
                if let Some(listener) = &self.listener {
                    self.accept(listener, ops);
                }
            }
        }
    }

    fn init(&self, ops: &mut EventOps) {
        watch(ops, &self.room, token::ROOM, EventSet::IN);
        for signals in self.terminal.iter().flat_map(RawTerminal::signals) {
            watch(ops, signals, token::TERMINAL, EventSet::IN);
        }
        if let Some(listener) = &self.listener {
            let events = Events::with_data(&listener.socket, token::LISTENER, EventSet::IN);
            if let Err(error) = ops.add(events) {
                tracing::error!(%error, place = self.place, "cannot watch a console's socket");
            }
        }
        {
            let mut input = self.input.lock().unwrap_or_else(PoisonError::into_inner);
            let output = self.output.lock().unwrap_or_else(PoisonError::into_inner);
            // Where both directions share a descriptor, the output's twin is watched like any other.
            if let Some(fd) = output.watched() {
                watch(ops, &fd, token::OUTPUT, EventSet::OUT);
            }
            let watched = input
                .fd
                .as_ref()
                .map(|fd| watch(ops, fd, token::INPUT, EventSet::IN));
            input.always_ready = watched == Some(false);
        }
        self.pump_and_watch(ops);
    }
}

/// A descriptor of our own for what `fd` names, so that its mode is nobody else's business.
fn duplicate(fd: impl AsFd, what: &str) -> Result<OwnedFd, HostError> {
    fd.as_fd()
        .try_clone_to_owned()
        .map_err(|source| HostError::new(format!("duplicate the descriptor of {what}"), source))
}
