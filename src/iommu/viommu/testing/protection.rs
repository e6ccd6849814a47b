//! Pages whose stores are noticed, and processors that store to them.

use std::collections::BTreeSet;
use std::io;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, Weak};

use crate::platform::addr::{Gpa, GpaRange, PAGE_SIZE};
use crate::platform::host::HostError;
use crate::platform::memory::GuestRam;
use crate::platform::protection::{Watcher, WriteProtection};

/// What a processor does while another one has all stopped.
type Exit = Box<dyn FnOnce() + Send>;

/// Who watches what.
type Watched = (Weak<dyn Watcher>, BTreeSet<Gpa>);

/// The pages.
pub struct FakeProtection {
    ram: GuestRam,
    watchers: Mutex<Vec<Watched>>,
    refuse: AtomicBool,
    /// All processors but one are being stopped.
    stopping: AtomicBool,
    exit: Mutex<Option<Exit>>,
}

impl FakeProtection {
    /// Nothing of `ram` is watched.
    pub fn new(ram: GuestRam) -> Arc<Self> {
        Arc::new(Self {
            ram,
            watchers: Mutex::default(),
            refuse: AtomicBool::new(false),
            stopping: AtomicBool::new(false),
            exit: Mutex::default(),
        })
    }

    /// Refuse to watch anything new from now on, or not.
    pub fn refuse(&self, refuse: bool) {
        self.refuse.store(refuse, Ordering::Relaxed);
    }

    /// The next change of what is watched finds another processor in the middle of `exit`, and waits for its end.
    pub fn meanwhile(&self, exit: Exit) {
        *self.exit.lock().expect("not poisoned") = Some(exit);
    }

    /// Pages that anybody watches.
    pub fn watched(&self) -> BTreeSet<Gpa> {
        let watchers = self.watchers.lock().expect("not poisoned");
        watchers
            .iter()
            .flat_map(|(_, pages)| pages.iter().copied())
            .collect()
    }

    /// A processor stores `data`.
    pub fn store(&self, at: Gpa, data: &[u8]) {
        self.ram.write(at, data).expect("RAM");
        let range = GpaRange::new(at, data.len() as u64).expect("something is stored");
        let page = Gpa(at.0 & !(PAGE_SIZE - 1));
        let watchers: Vec<_> = {
            let watchers = self.watchers.lock().expect("not poisoned");
            let concerned = watchers.iter().filter(|(_, pages)| pages.contains(&page));
            concerned.map(|(watcher, _)| watcher.clone()).collect()
        };
        for watcher in watchers.iter().filter_map(Weak::upgrade) {
            watcher.written(range);
        }
    }
}

impl WriteProtection for FakeProtection {
    fn watch(&self, watcher: &Weak<dyn Watcher>, pages: &BTreeSet<Gpa>) -> Result<(), HostError> {
        // Another one would wait for this one's exit, and this one for the other's.
        let stopping = self.stopping.swap(true, Ordering::Relaxed);
        assert!(!stopping, "two processors stop each other");
        let exit = self.exit.lock().expect("not poisoned").take();
        if let Some(exit) = exit {
            std::thread::spawn(exit).join().expect("the exit ends well");
        }
        let absent = |page: &&Gpa| self.ram.read_obj::<[u8; 4096]>(**page).is_err();
        assert_eq!(pages.iter().find(absent), None, "watched, and no RAM");
        self.stopping.store(false, Ordering::Relaxed);
        if self.refuse.load(Ordering::Relaxed) && !pages.is_empty() {
            let none = io::Error::from_raw_os_error(28);
            return Err(HostError::new("make a memory slot read-only", none));
        }
        let mut watchers = self.watchers.lock().expect("not poisoned");
        watchers.retain(|(other, _)| !other.ptr_eq(watcher));
        if !pages.is_empty() {
            watchers.push((watcher.clone(), pages.clone()));
        }
        Ok(())
    }
}
