//! A few quadwords that many threads copy and one at a time replaces, without a lock for those who copy.
//!
//! A version counts the replacements and is odd during one. The first quadword is 0 in an empty slot.

use super::sync::{AtomicU64, Ordering, fence_after_exchange, pause};

/// `N` quadwords that are only ever seen together.
pub struct Slot<const N: usize> {
    version: AtomicU64,
    words: [AtomicU64; N],
}

impl<const N: usize> Default for Slot<N> {
    fn default() -> Self {
        Self {
            version: AtomicU64::new(0),
            words: std::array::from_fn(|_| AtomicU64::new(0)),
        }
    }
}

impl<const N: usize> Slot<N> {
    /// The quadwords if the first of them is `first`; `None` also while they are being replaced.
    #[inline]
    pub fn find(&self, first: u64) -> Option<[u64; N]> {
        if self.words[0].load(Ordering::Relaxed) != first {
            return None;
        }
        let (version, words) = self.copy();
        (words[0] == first && version.is_some()).then_some(words)
    }

    /// The quadwords, as they stand between two replacements.
    pub fn read(&self) -> [u64; N] {
        loop {
            match self.copy() {
                (Some(_), words) => return words,
                (None, _) => pause(),
            }
        }
    }

    /// The quadwords, and the version they all belong to if there is one.
    ///
    /// Loads acquire and stores release, word by word: who sees one word of a replacement sees the odd
    /// version that came before it.
    #[inline]
    fn copy(&self) -> (Option<u64>, [u64; N]) {
        let before = self.version.load(Ordering::Acquire);
        let words = std::array::from_fn(|at| self.words[at].load(Ordering::Acquire));
        let after = self.version.load(Ordering::Relaxed);
        (
            (before == after && before.is_multiple_of(2)).then_some(before),
            words,
        )
    }

    /// Begin a replacement at the given even version.
    fn begin(&self, version: u64) -> bool {
        let begun = self
            .version
            .compare_exchange(version, version + 1, Ordering::SeqCst, Ordering::Relaxed);
        begun.is_ok()
    }

    fn end(&self, version: u64) {
        self.version.store(version + 2, Ordering::Release);
    }

    /// Replace the quadwords unless somebody else is doing so, and unless `still_true` says, once nobody
    /// can miss the replacement, that they are out of date.
    pub fn fill(&self, words: [u64; N], still_true: impl FnOnce() -> bool) {
        let version = self.version.load(Ordering::Relaxed);
        if !version.is_multiple_of(2) || !self.begin(version) {
            return;
        }
        // Pairs with the fence in `invalidation`: either that one sees the odd version, or this one sees
        // what it announced.
        fence_after_exchange();
        if still_true() {
            for (word, value) in self.words.iter().zip(words) {
                word.store(value, Ordering::Release);
            }
        }
        self.end(version);
    }

    /// Replace the quadwords, after whoever is doing so now.
    pub fn replace(&self, words: [u64; N]) {
        loop {
            let version = self.version.load(Ordering::Relaxed);
            if version.is_multiple_of(2) && self.begin(version) {
                for (word, value) in self.words.iter().zip(words) {
                    word.store(value, Ordering::Release);
                }
                return self.end(version);
            }
            pause();
        }
    }

    /// Empty the slot if it holds something unwanted, waiting for a replacement that has begun.
    pub fn clear_if(&self, unwanted: impl Fn(&[u64; N]) -> bool) {
        loop {
            match self.copy() {
                (Some(_), words) if words[0] == 0 || !unwanted(&words) => return,
                (Some(version), _) if self.begin(version) => {
                    self.words[0].store(0, Ordering::Release);
                    return self.end(version);
                }
                _ => pause(),
            }
        }
    }
}

/// A count of invalidations, by which who fills a slot knows that its knowledge is out of date.
#[derive(Default)]
pub struct Announced(AtomicU64);

impl Announced {
    /// An invalidation begins; look at the slots after this.
    pub fn invalidation(&self) {
        self.0.fetch_add(1, Ordering::SeqCst);
        fence_after_exchange();
    }

    /// How many there were. Ask before reading what a slot will be filled with.
    #[inline]
    pub fn count(&self) -> u64 {
        self.0.load(Ordering::SeqCst)
    }
}
