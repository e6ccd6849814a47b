//! The queue by which the kernel tells of a guest's unit: records behind headers, read from a descriptor.
//!
//! include/uapi/linux/iommufd.h: a header is flags and a sequence number; a record follows unless the flags say that
//! records were lost there. Numbers go up to the largest `i32` and begin again at 0, so that a gap is what was lost.

use std::fs::File;
use std::io::{self, Read};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::{Mutex, PoisonError};

use crate::iommu::amd::spec::event::Record;
use crate::iommu::viommu::host::{HostEvent, HostEvents};

/// Bytes of a header.
const HEADER: usize = 8;
/// IOMMU_VEVENTQ_FLAG_LOST_EVENTS: the newest records were lost, and this is the number of the last.
const LOST_EVENTS: u32 = 1;
/// Sequence numbers have 31 bits.
const SEQUENCE: u32 = 0x7fff_ffff;
/// Records that the kernel keeps: a log of the default size of a driver of Linux's.
pub(super) const DEPTH: u32 = 512;
/// The most that is taken at once: all there can be, and that further ones were lost.
const AT_ONCE: usize = DEPTH as usize + 1;

/// The reading end of a queue.
pub(super) struct EventQueue {
    file: File,
    /// Bytes of a record; those of AMD's manual come first, and what is not there counts as 0.
    record: usize,
    last: Mutex<u32>,
}

impl EventQueue {
    /// The queue that is read from `fd`, with records of `record` bytes.
    pub(super) fn new(fd: OwnedFd, record: u32) -> Self {
        Self {
            file: fd.into(),
            record: record as usize,
            // The one before the first, which is 0.
            last: Mutex::new(SEQUENCE),
        }
    }

    /// What `bytes` hold, after the record with the number `last`; up to what is no event.
    fn events(&self, bytes: &[u8], last: &mut u32) -> Vec<HostEvent> {
        let mut events = Vec::new();
        if let Err(problem) = self.push_events(&mut events, bytes, last) {
            events.push(HostEvent::Garbage(problem));
        }
        events
    }

    fn push_events(&self, events: &mut Vec<HostEvent>, bytes: &[u8], last: &mut u32) -> Result<(), String> {
        let mut rest = bytes;
        while !rest.is_empty() {
            let (header, behind) = rest.split_at_checked(HEADER).ok_or_else(|| cut(rest.len()))?;
            let (flags, number) = (word(header, 0), word(header, 4));
            if flags & !LOST_EVENTS != 0 || number > SEQUENCE {
                return Err(format!(
                    "an event with flags {flags:#x} and number {number:#x}; flags are 0 or 1, numbers up to {SEQUENCE:#x}"
                ));
            }
            let further = number.wrapping_sub(*last) & SEQUENCE;
            let lost = if flags == LOST_EVENTS {
                further
            } else {
                further.wrapping_sub(1) & SEQUENCE
            };
            if lost > 0 {
                events.push(HostEvent::Lost(lost));
            }
            *last = number;
            rest = behind;
            if flags != LOST_EVENTS {
                let (record, behind) = rest
                    .split_at_checked(self.record)
                    .ok_or_else(|| cut(rest.len()))?;
                events.push(HostEvent::Record(decode(record)));
                rest = behind;
            }
        }
        Ok(())
    }
}

fn cut(left: usize) -> String {
    format!("an event of which there are only {left} bytes")
}

/// The little-endian word at `at`, as far as there are bytes.
fn word(bytes: &[u8], at: usize) -> u32 {
    let bytes = bytes.iter().skip(at).take(4);
    (0..)
        .zip(bytes)
        .fold(0, |word, (at, byte)| word | u32::from(*byte) << (8 * at))
}

fn decode(bytes: &[u8]) -> Record {
    let bytes = bytes.iter().take(size_of::<Record>());
    let bits = (0..)
        .zip(bytes)
        .fold(0, |bits, (at, byte)| bits | u128::from(*byte) << (8 * at));
    Record::from_bits(bits)
}

impl AsFd for EventQueue {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }
}

impl HostEvents for EventQueue {
    fn take(&self) -> io::Result<Vec<HostEvent>> {
        let mut last = self.last.lock().unwrap_or_else(PoisonError::into_inner);
        let mut bytes = vec![0; AT_ONCE * (HEADER + self.record)];
        // The kernel does not wait, and gives whole events.
        let len = match (&self.file).read(&mut bytes) {
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => 0,
            other => other?,
        };
        Ok(self.events(bytes.get(..len).unwrap_or(&[]), &mut last))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn queue(record: u32) -> EventQueue {
        EventQueue::new(tempfile::tempfile().expect("a file").into(), record)
    }

    fn header(flags: u32, number: u32) -> Vec<u8> {
        [flags.to_le_bytes(), number.to_le_bytes()].concat()
    }

    fn record(bits: u128) -> Vec<u8> {
        bits.to_le_bytes().to_vec()
    }

    #[test]
    fn records_are_amds_and_gaps_are_what_was_lost() {
        let fault = Record::new()
            .with_code(2)
            .with_device(0x2100)
            .with_address(0x5000);
        let bytes = [
            header(0, 0),
            record(fault.into_bits()),
            header(0, 3),
            record(0xb << 60),
            header(LOST_EVENTS, 5),
        ]
        .concat();
        let mut last = SEQUENCE;
        let events = queue(16).events(&bytes, &mut last);
        assert_eq!(
            events,
            [
                HostEvent::Record(fault),
                HostEvent::Lost(2),
                HostEvent::Record(Record::new().with_code(11)),
                HostEvent::Lost(2),
            ]
        );
        // More were lost after that was read, and then there was room again.
        let bytes = [header(LOST_EVENTS, 9), header(0, 10), record(0)].concat();
        let events = queue(16).events(&bytes, &mut last);
        assert_eq!(events, [HostEvent::Lost(4), HostEvent::Record(Record::new())]);
    }

    #[test]
    fn numbers_begin_again_at_zero() {
        let mut last = SEQUENCE - 1;
        let bytes = [header(0, SEQUENCE), record(1), header(0, 1), record(2)].concat();
        let events = queue(16).events(&bytes, &mut last);
        assert_eq!(
            events,
            [
                HostEvent::Record(Record::from_bits(1)),
                HostEvent::Lost(1),
                HostEvent::Record(Record::from_bits(2))
            ]
        );
    }

    #[test]
    fn records_may_be_longer_or_shorter_than_amds() {
        let bytes = [header(0, 0), vec![0x34, 0x12, 0, 0]].concat();
        let events = queue(4).events(&bytes, &mut SEQUENCE.clone());
        assert_eq!(events, [HostEvent::Record(Record::new().with_device(0x1234))]);
        let bytes = [header(0, 0), record(7), vec![0xff; 8]].concat();
        let events = queue(24).events(&bytes, &mut SEQUENCE.clone());
        assert_eq!(events, [HostEvent::Record(Record::from_bits(7))]);
    }

    #[test]
    fn what_is_no_event_ends_what_is_understood() {
        for (bytes, problem) in [
            (vec![0; 7], "an event of which there are only 7 bytes"),
            (
                [header(0, 1), vec![0; 15]].concat(),
                "an event of which there are only 15 bytes",
            ),
            (
                header(2, 1),
                "an event with flags 0x2 and number 0x1; flags are 0 or 1, numbers up to 0x7fffffff",
            ),
            (
                header(1, 1 << 31),
                "an event with flags 0x1 and number 0x80000000; flags are 0 or 1, numbers up to 0x7fffffff",
            ),
        ] {
            // What came before it counts.
            let bytes = [header(0, 0), record(7), bytes].concat();
            assert_eq!(
                queue(16).events(&bytes, &mut SEQUENCE.clone()),
                [
                    HostEvent::Record(Record::from_bits(7)),
                    HostEvent::Garbage(problem.to_owned())
                ]
            );
        }
    }

    #[test]
    fn all_that_the_kernel_keeps_is_taken_at_once() {
        let (queue, ours) = {
            let (theirs, ours) = std::os::unix::net::UnixStream::pair().expect("sockets");
            theirs.set_nonblocking(true).expect("a socket");
            (EventQueue::new(theirs.into(), 16), ours)
        };
        assert_eq!(queue.take().expect("open"), []);
        let mut bytes: Vec<u8> = (0..DEPTH)
            .flat_map(|number| [header(0, number), record(1)].concat())
            .collect();
        bytes.extend(header(LOST_EVENTS, DEPTH + 2));
        std::io::Write::write_all(&mut &ours, &bytes).expect("room");
        let events = queue.take().expect("open");
        assert_eq!(events.len(), AT_ONCE);
        assert_eq!(events.last(), Some(&HostEvent::Lost(3)));
        assert_eq!(queue.take().expect("open"), []);
    }
}
