//! What tests read of the log.

use std::cell::Cell;
use std::io::{self, Write};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

thread_local! {
    static HEARD: Cell<bool> = const { Cell::new(false) };
}

/// Whether this thread's lines are read by a test, so that none may be swallowed for what other threads wrote.
pub(super) fn is_heard() -> bool {
    HEARD.get()
}

/// Lines, in memory.
#[derive(Clone, Default)]
struct Lines(Arc<Mutex<Vec<u8>>>);

impl Lines {
    fn bytes(&self) -> MutexGuard<'_, Vec<u8>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Write for Lines {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.bytes().write(bytes)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// The lines that this thread logs while `work` is done: those for the operator, from information on.
pub(crate) fn logged(work: impl FnOnce()) -> Vec<String> {
    let lines = Lines::default();
    let writer = lines.clone();
    let subscriber = tracing_subscriber::fmt()
        .with_ansi(false)
        .with_writer(move || writer.clone())
        .finish();
    let before = HEARD.replace(true);
    tracing::subscriber::with_default(subscriber, work);
    HEARD.set(before);
    let text = String::from_utf8(lines.bytes().clone()).expect("text");
    text.lines().map(str::to_owned).collect()
}
