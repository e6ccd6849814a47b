//! A ring in memory: base, head and tail, whatever the guest wrote into them.
//!
//! Head and tail lie inside the ring at all times, so nobody above masks a pointer.

use super::spec::registers::{RingBase, RingPointer};
use crate::platform::addr::Gpa;

/// Bytes of an entry, in every ring of the unit.
pub const ENTRY: usize = 16;

/// Command buffer, event log or PPR log.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Ring {
    base: RingBase,
    head: u16,
    tail: u16,
}

impl Ring {
    /// After reset.
    pub const RESET: Self = Self {
        base: RingBase::RESET,
        head: 0,
        tail: 0,
    };

    /// The base register.
    #[must_use]
    pub const fn base(&self) -> RingBase {
        self.base
    }

    /// The guest wrote the base register, which empties the ring (section 2.4).
    pub const fn set_base(&mut self, base: RingBase) {
        *self = Self {
            base,
            head: 0,
            tail: 0,
        };
    }

    /// The ring lies elsewhere from now on, and head and tail stay what they are as far as it has such entries.
    pub const fn move_to(&mut self, base: RingBase) {
        let (head, tail) = (self.head, self.tail);
        self.base = base;
        self.set_head(head);
        self.set_tail(tail);
    }

    /// Whether the length is one the manual allows.
    #[must_use]
    pub const fn is_valid(&self) -> bool {
        self.base.length() >= 8
    }

    /// Highest entry number.
    const fn last(&self) -> u16 {
        !(u16::MAX << self.base.length())
    }

    /// Entry that is read next.
    #[must_use]
    pub const fn head(&self) -> u16 {
        self.head
    }

    /// Entry that is written next.
    #[must_use]
    pub const fn tail(&self) -> u16 {
        self.tail
    }

    /// The head register.
    #[must_use]
    pub const fn head_register(&self) -> RingPointer {
        RingPointer::new().with_entry(self.head)
    }

    /// The tail register.
    #[must_use]
    pub const fn tail_register(&self) -> RingPointer {
        RingPointer::new().with_entry(self.tail)
    }

    /// Move the head; a number past the end wraps.
    pub const fn set_head(&mut self, entry: u16) {
        self.head = entry & self.last();
    }

    /// Move the tail; a number past the end wraps.
    pub const fn set_tail(&mut self, entry: u16) {
        self.tail = entry & self.last();
    }

    /// The entry after `entry`.
    #[must_use]
    pub const fn after(&self, entry: u16) -> u16 {
        entry.wrapping_add(1) & self.last()
    }

    /// Where `entry` lies.
    #[must_use]
    pub const fn slot(&self, entry: u16) -> Gpa {
        Gpa((self.base.frame() << 12) + (entry & self.last()) as u64 * ENTRY as u64)
    }

    /// Entries waiting between head and tail.
    #[must_use]
    pub const fn waiting(&self) -> u16 {
        self.tail.wrapping_sub(self.head) & self.last()
    }

    /// Waiting entries that follow the head without wrapping.
    #[must_use]
    pub const fn waiting_in_a_row(&self) -> u16 {
        if self.tail >= self.head {
            self.tail - self.head
        } else {
            self.last() - self.head + 1
        }
    }

    /// Whether a further entry would make the ring look empty: one slot always stays free.
    #[must_use]
    pub const fn is_full(&self) -> bool {
        self.after(self.tail) == self.head
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ring(length: u8) -> Ring {
        let mut ring = Ring::RESET;
        ring.set_base(RingBase::new().with_frame(0x10).with_length(length));
        ring
    }

    #[test]
    fn pointers_stay_inside_at_every_length() {
        for length in 0..16 {
            let mut ring = ring(length);
            ring.set_head(0x7fff);
            ring.set_tail(0x7fff);
            assert_eq!(u32::from(ring.head()) + 1, 1 << length);
            assert_eq!(ring.slot(u16::MAX).0, 0x1_0000 + ((1_u64 << length) - 1) * 16);
            assert_eq!(ring.after(ring.head()), 0);
            assert_eq!(ring.is_valid(), length >= 8);
        }
    }

    #[test]
    fn a_ring_holds_one_entry_less_than_it_has_slots() {
        let mut ring = ring(8);
        ring.set_tail(254);
        assert!(!ring.is_full());
        ring.set_tail(255);
        assert!(ring.is_full());
        assert_eq!(ring.waiting(), 255);
    }

    #[test]
    fn waiting_entries_are_counted_across_the_end() {
        let mut ring = ring(8);
        ring.set_head(250);
        ring.set_tail(4);
        assert_eq!((ring.waiting(), ring.waiting_in_a_row()), (10, 6));
        ring.set_head(4);
        assert_eq!((ring.waiting(), ring.waiting_in_a_row()), (0, 0));
    }

    #[test]
    fn a_new_base_empties_the_ring() {
        let mut ring = ring(9);
        ring.set_tail(8);
        ring.set_base(RingBase::new().with_frame(0x20).with_length(9));
        assert_eq!((ring.head(), ring.tail()), (0, 0));
    }

    #[test]
    fn a_ring_that_moves_keeps_its_pointers_inside_the_new_one() {
        let mut ring = ring(15);
        ring.set_head(3);
        ring.set_tail(0x207);
        ring.move_to(RingBase::new().with_frame(0x20).with_length(9));
        assert_eq!((ring.head(), ring.tail(), ring.slot(3).0), (3, 7, 0x2_0030));
    }

    #[test]
    fn a_ring_at_the_highest_address_does_not_wrap() {
        let mut ring = Ring::RESET;
        ring.set_base(RingBase::from_bits(u64::MAX));
        assert_eq!(ring.slot(0x7fff).0, 0x000f_ffff_ffff_f000 + 0x7_fff0);
    }
}
