//! Streams against files, pseudo-terminals and sockets of the machine the tests run on.

use super::output::{BACKLOG, Mode, WhenFull};
use super::*;
use event_manager::{EventManager, SubscriberOps};
use std::fs::File;
use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::time::Duration;

/// A device that takes as much as it is told to.
#[derive(Default)]
struct Device {
    taken: Mutex<Vec<u8>>,
    room: Mutex<usize>,
}

impl Device {
    fn with_room(room: usize) -> Arc<Self> {
        Arc::new(Self {
            taken: Mutex::default(),
            room: Mutex::new(room),
        })
    }

    fn taken(&self) -> Vec<u8> {
        self.taken.lock().expect("not poisoned").clone()
    }
}

impl GuestEnd for Device {
    fn receive(&self, bytes: &[u8]) -> usize {
        let mut room = self.room.lock().expect("not poisoned");
        let now = bytes.len().min(*room);
        *room -= now;
        self.taken
            .lock()
            .expect("not poisoned")
            .extend_from_slice(&bytes[..now]);
        now
    }

    fn may_send(&self) {}
}

struct Rig {
    end: Arc<HostEnd>,
    device: Arc<Device>,
    requests: Arc<RequestQueue>,
    events: EventManager<Arc<HostEnd>>,
}

impl Rig {
    fn around(end: HostEnd, room: usize) -> Self {
        let (end, device) = (Arc::new(end), Device::with_room(room));
        let requests = RequestQueue::new().expect("a descriptor");
        Self::assemble(end, device, requests)
    }

    fn open(backend: &Backend, room: usize) -> Self {
        let requests = RequestQueue::new().expect("a descriptor");
        let end = backend.open(&requests).expect("the host has room for it");
        Self::assemble(end, Device::with_room(room), requests)
    }

    fn assemble(end: Arc<HostEnd>, device: Arc<Device>, requests: Arc<RequestQueue>) -> Self {
        let guest: Arc<dyn GuestEnd> = device.clone();
        end.connect(Arc::downgrade(&guest));
        let mut events = EventManager::new().expect("an epoll descriptor");
        events.add_subscriber(end.clone());
        let mut rig = Self {
            end,
            device,
            requests,
            events,
        };
        rig.settle();
        rig
    }

    fn settle(&mut self) {
        while self.events.run_with_timeout(20).expect("a live epoll") > 0 {}
    }

    fn make_room(&mut self, room: usize) {
        *self.device.room.lock().expect("not poisoned") = room;
        self.end.room_made();
        self.settle();
    }
}

fn client(path: &std::path::Path) -> UnixStream {
    let client = UnixStream::connect(path).expect("somebody listens");
    client
        .set_read_timeout(Some(Duration::from_secs(5)))
        .expect("a socket");
    client
}

#[test]
fn output_is_appended_to_its_file() {
    let folder = tempfile::tempdir().expect("a folder");
    let path = folder.path().join("log");
    std::fs::write(&path, "before ").expect("writable");
    let rig = Rig::open(&Backend::File(path.clone()), 0);
    rig.end.send(b"after");
    assert_eq!(std::fs::read(path).expect("readable"), b"before after");
}

#[test]
fn a_file_that_cannot_be_opened_is_named() {
    let requests = RequestQueue::new().expect("a descriptor");
    let path = PathBuf::from("/nonexistent/console.log");
    let error = Backend::File(path).open(&requests).err().expect("no such folder");
    assert_eq!(
        error.to_string(),
        "cannot open /nonexistent/console.log to append the console's output"
    );
}

#[test]
fn a_full_file_system_loses_output_and_nothing_else() {
    let rig = Rig::open(&Backend::File(PathBuf::from("/dev/full")), 0);
    (0..100_000).for_each(|_| rig.end.send(b"x"));
    assert!(!rig.end.is_full());
}

#[test]
fn a_named_pipe_that_nobody_reads_is_refused_rather_than_waited_for() {
    let folder = tempfile::tempdir().expect("a folder");
    let path = folder.path().join("pipe");
    let made = std::process::Command::new("mkfifo").arg(&path).status();
    assert!(made.expect("mkfifo is everywhere").success());
    let requests = RequestQueue::new().expect("a descriptor");
    assert!(Backend::File(path).open(&requests).is_err());
}

#[test]
fn output_to_nowhere_fills_nothing() {
    let rig = Rig::open(&Backend::Null, 0);
    (0..10_000).for_each(|_| rig.end.send(&[0; 100]));
    assert!(!rig.end.is_full());
    assert_eq!(rig.end.place(), "nowhere");
}

#[test]
fn a_pseudo_terminal_carries_both_directions() {
    let mut rig = Rig::open(&Backend::Pty, 100);
    let mut operator = File::options()
        .read(true)
        .write(true)
        .open(rig.end.place())
        .expect("the path is told");
    operator.write_all(b"in\r").expect("open");
    rig.settle();
    assert_eq!(rig.device.taken(), b"in\r");
    rig.end.send(b"out\n");
    let mut seen = [0; 4];
    operator.read_exact(&mut seen).expect("four bytes");
    assert_eq!(&seen, b"out\n");
}

#[test]
fn a_pseudo_terminal_that_nobody_has_open_keeps_nothing() {
    let rig = Rig::open(&Backend::Pty, 0);
    (0..1_000).for_each(|_| rig.end.send(b"unseen\n"));
    let mut operator = File::options()
        .read(true)
        .write(true)
        .open(rig.end.place())
        .expect("the path is told");
    rig.end.send(b"seen\n");
    let mut seen = [0; 5];
    operator.read_exact(&mut seen).expect("five bytes");
    assert_eq!(&seen, b"seen\n");
}

#[test]
fn a_pseudo_terminal_outlives_its_users() {
    let mut rig = Rig::open(&Backend::Pty, 100);
    for word in [b"one", b"two"] {
        let mut operator = File::options()
            .write(true)
            .open(rig.end.place())
            .expect("the path is told");
        operator.write_all(word).expect("open");
        rig.settle();
        drop(operator);
        rig.settle();
    }
    assert_eq!(rig.device.taken(), b"onetwo");
}

#[test]
fn a_socket_serves_one_client_after_the_other() {
    let folder = tempfile::tempdir().expect("a folder");
    let path = folder.path().join("console");
    let mut rig = Rig::open(&Backend::Socket(path.clone()), 100);
    rig.end.send(b"unseen");
    for word in ["one", "two"] {
        let mut operator = client(&path);
        rig.settle();
        operator.write_all(word.as_bytes()).expect("connected");
        rig.settle();
        rig.end.send(word.as_bytes());
        let mut seen = [0; 3];
        operator.read_exact(&mut seen).expect("three bytes");
        assert_eq!(seen, word.as_bytes());
        drop(operator);
        rig.settle();
    }
    assert_eq!(rig.device.taken(), b"onetwo");
}

#[test]
fn a_second_client_of_a_socket_is_turned_away() {
    let folder = tempfile::tempdir().expect("a folder");
    let path = folder.path().join("console");
    let mut rig = Rig::open(&Backend::Socket(path.clone()), 100);
    let mut first = client(&path);
    rig.settle();
    let mut second = client(&path);
    rig.settle();
    assert_eq!(second.read(&mut [0]).expect("closed"), 0);
    first.write_all(b"first").expect("connected");
    rig.settle();
    assert_eq!(rig.device.taken(), b"first");
}

#[test]
fn a_client_that_never_reads_stops_nobody() {
    let folder = tempfile::tempdir().expect("a folder");
    let path = folder.path().join("console");
    let mut rig = Rig::open(&Backend::Socket(path.clone()), 0);
    let mut operator = client(&path);
    rig.settle();
    (0..100).for_each(|_| rig.end.send(&[b'x'; BACKLOG]));
    rig.end.send(b"the end");
    assert!(!rig.end.is_full());
    let mut seen = Vec::new();
    let mut chunk = [0; 4096];
    while !seen.ends_with(b"the end") {
        let count = operator.read(&mut chunk).expect("more to come");
        seen.extend_from_slice(&chunk[..count]);
        rig.events.run_with_timeout(0).expect("a live epoll");
    }
    assert!(seen.len() >= BACKLOG);
}

#[test]
fn a_stale_socket_is_replaced_a_live_one_and_a_file_are_not() {
    let folder = tempfile::tempdir().expect("a folder");
    let requests = RequestQueue::new().expect("a descriptor");
    let (stale, live, file) = (
        folder.path().join("stale"),
        folder.path().join("live"),
        folder.path().join("file"),
    );
    drop(UnixListener::bind(&stale).expect("free"));
    let _alive = UnixListener::bind(&live).expect("free");
    std::fs::write(&file, "precious").expect("writable");
    assert!(Backend::Socket(stale.clone()).open(&requests).is_ok());
    assert!(!stale.exists(), "the socket goes with its owner");
    assert!(Backend::Socket(live).open(&requests).is_err());
    assert!(Backend::Socket(file.clone()).open(&requests).is_err());
    assert_eq!(std::fs::read(file).expect("readable"), b"precious");
}

/// An end whose input is a regular file, which epoll refuses to watch.
#[test]
fn input_from_a_file_is_read_as_the_device_takes_it() {
    let folder = tempfile::tempdir().expect("a folder");
    let path = folder.path().join("script");
    let text: Vec<u8> = (0..2_000_u32).map(|n| n.to_le_bytes()[0]).collect();
    std::fs::write(&path, &text).expect("writable");
    let input = OwnedFd::from(File::open(path).expect("readable"));
    let end = HostEnd::new("a file".to_owned(), Some(input), Output::nowhere()).expect("a descriptor");
    let mut rig = Rig::around(end, 10);
    assert_eq!(rig.device.taken(), &text[..10]);
    (0..text.len() / 64 + 1).for_each(|_| rig.make_room(64));
    assert_eq!(rig.device.taken(), text);
}

#[test]
fn a_device_that_is_connected_after_the_events_gets_its_input_all_the_same() {
    let folder = tempfile::tempdir().expect("a folder");
    let path = folder.path().join("script");
    std::fs::write(&path, "early").expect("writable");
    let input = OwnedFd::from(File::open(path).expect("readable"));
    let end = HostEnd::new("a file".to_owned(), Some(input), Output::nowhere()).expect("a descriptor");
    let (end, device) = (Arc::new(end), Device::with_room(10));
    let mut events = EventManager::new().expect("an epoll descriptor");
    events.add_subscriber(end.clone());
    while events.run_with_timeout(20).expect("a live epoll") > 0 {}
    let guest: Arc<dyn GuestEnd> = device.clone();
    end.connect(Arc::downgrade(&guest));
    while events.run_with_timeout(20).expect("a live epoll") > 0 {}
    assert_eq!(device.taken(), b"early");
}

#[test]
fn input_that_ends_leaves_the_output_working() {
    let (input, sender) = rustix::pipe::pipe().expect("a pipe");
    let (reader, output) = rustix::pipe::pipe().expect("a pipe");
    let output = Output::to(output, Mode::AskFirst, WhenFull::GuestWaits);
    let end = HostEnd::new("a pipe".to_owned(), Some(input), output).expect("a descriptor");
    let mut rig = Rig::around(end, 10);
    drop(sender);
    rig.settle();
    rig.end.send(b"still here");
    let mut seen = [0; 10];
    assert_eq!(rustix::io::read(&reader, &mut seen), Ok(10));
    assert_eq!(&seen, b"still here");
}

#[test]
fn a_reader_that_left_costs_the_output_and_nothing_else() {
    let (reader, output) = rustix::pipe::pipe().expect("a pipe");
    let output = Output::to(output, Mode::AskFirst, WhenFull::GuestWaits);
    let rig = Rig::around(
        HostEnd::new("a pipe".to_owned(), None, output).expect("a descriptor"),
        0,
    );
    drop(reader);
    (0..2 * BACKLOG).for_each(|_| rig.end.send(b"x"));
    assert!(!rig.end.is_full());
}

#[test]
fn a_blocking_pipe_never_blocks_us_and_keeps_the_order() {
    let (reader, output) = rustix::pipe::pipe().expect("a pipe");
    let output = Output::to(output, Mode::AskFirst, WhenFull::GuestWaits);
    let mut rig = Rig::around(
        HostEnd::new("a pipe".to_owned(), None, output).expect("a descriptor"),
        0,
    );
    let sent: Vec<u8> = (0_u32..)
        .map(|n| n.to_le_bytes()[0])
        .inspect(|byte| rig.end.send(&[*byte]))
        .take_while(|_| !rig.end.is_full())
        .collect();
    rig.end.send(b"lost");
    let mut seen = Vec::new();
    let mut chunk = [0; 4096];
    while seen.len() <= sent.len() {
        let count = rustix::io::read(&reader, &mut chunk).expect("more to come");
        seen.extend_from_slice(&chunk[..count]);
        rig.settle();
    }
    assert!(seen.starts_with(&sent));
    assert_eq!(seen.len(), sent.len() + 1);
}

/// An end with escape keys, as the terminal has them.
fn desk(room: usize) -> (Rig, OwnedFd, OwnedFd) {
    let (input, keys) = rustix::pipe::pipe().expect("a pipe");
    let (screen, output) = rustix::pipe::pipe().expect("a pipe");
    let output = Output::to(output, Mode::AskFirst, WhenFull::GuestWaits);
    let mut end = HostEnd::new("the terminal".to_owned(), Some(input), output).expect("a descriptor");
    let requests = RequestQueue::new().expect("a descriptor");
    end.requests = Some(requests.clone());
    let rig = Rig::assemble(Arc::new(end), Device::with_room(room), requests);
    (rig, keys, screen)
}

#[test]
fn the_escape_key_quits_even_a_guest_that_takes_no_input() {
    let (mut rig, keys, _screen) = desk(0);
    rustix::io::write(&keys, &[b'z'; 5_000]).expect("room in the pipe");
    rig.settle();
    rustix::io::write(&keys, b"\x01x").expect("room in the pipe");
    rig.settle();
    assert_eq!(rig.requests.take(), Some(Request::Quit));
    rig.make_room(10_000);
    assert_eq!(rig.device.taken(), [b'z'; 5_000]);
}

#[test]
fn help_appears_at_the_terminal_and_not_in_the_guest() {
    let (mut rig, keys, screen) = desk(100);
    rustix::io::write(&keys, b"\x01h").expect("room in the pipe");
    rig.settle();
    let mut seen = vec![0; HELP.len()];
    assert_eq!(rustix::io::read(&screen, &mut seen), Ok(HELP.len()));
    assert_eq!(seen, HELP);
    assert!(rig.device.taken().is_empty());
}

#[test]
fn keys_that_nobody_takes_are_kept_up_to_a_bound() {
    let (mut rig, keys, _screen) = desk(0);
    for _ in 0..2 * TYPED_AHEAD / 4096 {
        rustix::io::write(&keys, &[b'k'; 4096]).expect("room in the pipe");
        rig.settle();
    }
    rig.make_room(usize::MAX);
    assert_eq!(rig.device.taken().len(), TYPED_AHEAD);
}
