//! The MSI-X table and pending bits as state: no route, no device, no lock.
//!
//! PCI Express Base Specification 7.7.2.

use crate::pci::access::DwordWrite;
use crate::platform::msi::MsiMessage;

/// Dwords of a table entry: address, upper address, data, vector control.
const ENTRY_DWORDS: usize = 4;
/// Vector Control: the vector is masked.
const MASK_BIT: u32 = 1;
/// Message Control, in the upper half of the capability's first dword.
const FUNCTION_MASK: u32 = 1 << 30;
const ENABLE: u32 = 1 << 31;

/// What delivery of a vector depends on changed; whoever delivers looks at it anew.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct VectorChanged {
    /// Which one.
    pub vector: u16,
}

/// What became of an interrupt.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Raised {
    /// Send this now.
    Deliver(MsiMessage),
    /// Masked: the pending bit is set and [`MsixTable::take_pending`] gives it once it may go.
    Latched,
    /// MSI-X is off, or there is no such vector.
    Dropped,
}

#[derive(Clone, Copy)]
struct Vector {
    message: MsiMessage,
    masked: bool,
    pending: bool,
}

impl Vector {
    /// Born masked (7.7.2.9).
    const RESET: Self = Self {
        message: MsiMessage { address: 0, data: 0 },
        masked: true,
        pending: false,
    };
}

/// The state of one function's MSI-X: enable, masks, messages and pending bits.
pub struct MsixTable {
    enabled: bool,
    function_masked: bool,
    vectors: Vec<Vector>,
}

impl MsixTable {
    /// A table of `vectors` (1 to 2,048) entries, all masked, off.
    ///
    /// # Panics
    ///
    /// When `vectors` is out of range.
    #[must_use]
    pub fn new(vectors: u16) -> Self {
        assert!(
            (1..=2048).contains(&vectors),
            "{vectors} MSI-X vectors: 1 to 2048 are possible"
        );
        Self {
            enabled: false,
            function_masked: false,
            vectors: vec![Vector::RESET; usize::from(vectors)],
        }
    }

    /// How many vectors there are, 1 to 2,048.
    #[must_use]
    pub fn vectors(&self) -> u16 {
        u16::try_from(self.vectors.len()).expect("at most 2048")
    }

    /// Whether the guest uses MSI-X.
    #[must_use]
    pub const fn enabled(&self) -> bool {
        self.enabled
    }

    /// The first dword of the capability, Message Control in its upper half.
    #[must_use]
    pub fn read_control(&self) -> u32 {
        let flags = [(self.enabled, ENABLE), (self.function_masked, FUNCTION_MASK)];
        let set = flags
            .iter()
            .filter(|(on, _)| *on)
            .fold(0, |all, (_, bit)| all | bit);
        set | u32::from(self.vectors() - 1) << 16
    }

    /// Write that dword; whether delivery of any vector may have changed.
    pub fn write_control(&mut self, write: DwordWrite) -> bool {
        let old = self.read_control();
        let new = write.store(old, ENABLE | FUNCTION_MASK);
        self.enabled = new & ENABLE != 0;
        self.function_masked = new & FUNCTION_MASK != 0;
        old != new
    }

    /// Dword `index` of the table; 0 behind its end.
    #[must_use]
    pub fn read_table(&self, index: usize) -> u32 {
        let Some(vector) = self.vectors.get(index / ENTRY_DWORDS) else {
            return 0;
        };
        let [low, high] = halves(vector.message.address);
        match index % ENTRY_DWORDS {
            0 => low,
            1 => high,
            2 => vector.message.data,
            _ => u32::from(vector.masked),
        }
    }

    /// Write dword `index` of the table; behind its end nothing happens.
    ///
    /// A vector that was masked and stays masked has not changed: programming it disturbs no route.
    pub fn write_table(&mut self, index: usize, write: DwordWrite) -> Option<VectorChanged> {
        let number = u16::try_from(index / ENTRY_DWORDS).ok()?;
        let vector = self.vectors.get_mut(usize::from(number))?;
        let before = (vector.masked, vector.message);
        let [low, high] = halves(vector.message.address);
        match index % ENTRY_DWORDS {
            0 => vector.message.address = join(write.store(low, !3), high),
            1 => vector.message.address = join(low, write.store(high, u32::MAX)),
            2 => vector.message.data = write.store(vector.message.data, u32::MAX),
            _ => vector.masked = write.store(u32::from(vector.masked), MASK_BIT) != 0,
        }
        let was_live = !before.0;
        let changed = before != (vector.masked, vector.message);
        (changed && (was_live || !vector.masked)).then_some(VectorChanged { vector: number })
    }

    /// Dword `index` of the pending bit array; 0 behind its end. There is no writing it (7.7.2.10).
    #[must_use]
    pub fn read_pending(&self, index: usize) -> u32 {
        let from = index.saturating_mul(32).min(self.vectors.len());
        let vectors = self.vectors[from..].iter().take(32).enumerate();
        vectors.fold(0, |bits, (bit, vector)| bits | u32::from(vector.pending) << bit)
    }

    /// What `vector` sends, if it may send at all at present.
    #[must_use]
    pub fn message(&self, vector: u16) -> Option<MsiMessage> {
        let entry = self.vectors.get(usize::from(vector))?;
        (self.enabled && !self.function_masked && !entry.masked).then_some(entry.message)
    }

    /// The function wants to interrupt.
    pub fn raise(&mut self, vector: u16) -> Raised {
        if let Some(message) = self.message(vector) {
            return Raised::Deliver(message);
        }
        match self.vectors.get_mut(usize::from(vector)) {
            Some(entry) if self.enabled => {
                entry.pending = true;
                Raised::Latched
            }
            _ => Raised::Dropped,
        }
    }

    /// What `vector` owes since it was masked, if it may send now. It owes nothing afterwards.
    pub fn take_pending(&mut self, vector: u16) -> Option<MsiMessage> {
        let message = self.message(vector)?;
        let entry = self.vectors.get_mut(usize::from(vector))?;
        std::mem::take(&mut entry.pending).then_some(message)
    }

    /// Off, everything masked, nothing pending.
    pub fn reset(&mut self) {
        self.enabled = false;
        self.function_masked = false;
        self.vectors.fill(Vector::RESET);
    }
}

const fn halves(address: u64) -> [u32; 2] {
    let [a, b, c, d, e, f, g, h] = address.to_le_bytes();
    [u32::from_le_bytes([a, b, c, d]), u32::from_le_bytes([e, f, g, h])]
}

const fn join(low: u32, high: u32) -> u64 {
    (high as u64) << 32 | low as u64
}

#[cfg(test)]
mod tests {
    use super::*;

    const ON: DwordWrite = DwordWrite::whole(ENABLE);

    fn live(vectors: u16) -> MsixTable {
        let mut table = MsixTable::new(vectors);
        table.write_control(ON);
        (0..usize::from(vectors)).for_each(|vector| {
            table.write_table(vector * 4 + 3, DwordWrite::whole(0));
        });
        table
    }

    #[test]
    fn vectors_are_born_masked_and_programming_them_changes_nothing_live() {
        let mut table = MsixTable::new(2);
        table.write_control(ON);
        assert_eq!(table.read_table(3), 1);
        for dword in 0..3 {
            assert_eq!(table.write_table(dword, DwordWrite::whole(0xfee0_1000)), None);
        }
        let unmasked = table.write_table(3, DwordWrite::whole(0));
        assert_eq!(unmasked, Some(VectorChanged { vector: 0 }));
        let message = MsiMessage {
            address: 0xfee0_1000_fee0_1000,
            data: 0xfee0_1000,
        };
        assert_eq!(table.message(0), Some(message));
    }

    #[test]
    fn a_write_that_changes_nothing_is_no_change() {
        let mut table = live(1);
        assert_eq!(table.write_table(2, DwordWrite::whole(0)), None);
        assert_eq!(
            table.write_table(2, DwordWrite::whole(1)),
            Some(VectorChanged { vector: 0 })
        );
        assert_eq!(table.write_table(3, DwordWrite::whole(0xffff_fffe)), None);
        assert_eq!(table.read_table(3), 0);
    }

    #[test]
    fn the_low_address_bits_do_not_stick() {
        let mut table = live(1);
        table.write_table(0, DwordWrite::whole(u32::MAX));
        assert_eq!(table.read_table(0), 0xffff_fffc);
    }

    #[test]
    fn a_masked_vector_latches_and_pays_once() {
        let mut table = live(33);
        table.write_table(32 * 4 + 3, DwordWrite::whole(1));
        assert_eq!(table.raise(32), Raised::Latched);
        assert_eq!((table.read_pending(0), table.read_pending(1)), (0, 1));
        assert_eq!(table.take_pending(32), None);
        table.write_table(32 * 4 + 3, DwordWrite::whole(0));
        assert_eq!(table.take_pending(32), Some(MsiMessage::default()));
        assert_eq!(table.take_pending(32), None);
        assert_eq!(table.read_pending(1), 0);
    }

    #[test]
    fn the_function_mask_latches_every_vector() {
        let mut table = live(3);
        assert!(table.write_control(DwordWrite::whole(ENABLE | FUNCTION_MASK)));
        (0..3).for_each(|vector| assert_eq!(table.raise(vector), Raised::Latched));
        assert_eq!(table.read_pending(0), 0b111);
        assert!(table.write_control(ON));
        (0..3).for_each(|vector| assert!(table.take_pending(vector).is_some()));
    }

    #[test]
    fn with_msi_x_off_nothing_is_latched() {
        let mut table = MsixTable::new(1);
        assert_eq!(table.raise(0), Raised::Dropped);
        assert_eq!(table.read_pending(0), 0);
    }

    #[test]
    fn class_4_vectors_and_dwords_behind_the_end_are_nobodys() {
        let mut table = live(3);
        for vector in [3, 0xfffe, 0xffff] {
            assert_eq!(table.raise(vector), Raised::Dropped);
            assert_eq!((table.message(vector), table.take_pending(vector)), (None, None));
        }
        for index in [12, 13, 8192, 1 << 40, usize::MAX] {
            assert_eq!(table.write_table(index, DwordWrite::whole(0)), None);
            assert_eq!((table.read_table(index), table.read_pending(index)), (0, 0));
        }
    }

    #[test]
    fn message_control_shows_the_size_and_takes_two_bits() {
        let mut table = MsixTable::new(2048);
        assert_eq!(table.read_control(), 0x07ff_0000);
        table.write_control(DwordWrite::whole(u32::MAX));
        assert_eq!(table.read_control(), 0xc7ff_0000);
        table.write_control(DwordWrite::new(3, &[0]).expect("inside"));
        assert_eq!(table.read_control(), 0x07ff_0000);
    }

    #[test]
    fn class_14_every_width_of_a_write_to_message_control_counts() {
        let mut table = MsixTable::new(1);
        table.write_control(DwordWrite::new(2, &[0, 0x80]).expect("inside"));
        assert!(table.enabled());
        table.write_control(DwordWrite::new(3, &[0]).expect("inside"));
        assert!(!table.enabled());
        table.write_control(DwordWrite::whole(0x8000_0000));
        assert!(table.enabled());
    }

    #[test]
    fn reset_masks_and_forgets() {
        let mut table = live(2);
        table.write_control(DwordWrite::whole(ENABLE | FUNCTION_MASK));
        table.raise(1);
        table.reset();
        assert_eq!(
            (table.read_control(), table.read_pending(0), table.read_table(3)),
            (0x1_0000, 0, 1)
        );
    }
}
