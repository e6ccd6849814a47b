//! Page requests of a function: PRI (PCI Express Base Specification 10.4 and 10.5.2). The function may ask for
//! pages, as many at a time as software allows, and hears by group what became of them.

use super::{Capability, CapabilityId};
use crate::pci::access::{DwordWrite, Register};
use crate::pci::function::ConfigEffect;

/// Control: page requests may be issued.
const ENABLE: u32 = 1 << 0;
/// Control: forget what is outstanding; reads 0.
const RESET: u32 = 1 << 1;
/// Status: a response said that there was a failure, and the function stopped asking.
const RESPONSE_FAILURE: u32 = 1 << 16;
/// Status: a response was for a group that nobody asked for.
const UNEXPECTED_GROUP: u32 = 1 << 17;
/// Status: nothing is outstanding, and nothing will be.
const STOPPED: u32 = 1 << 24;
/// Status: responses to requests with a PASID must have it too.
const RESPONSE_PASID_REQUIRED: u32 = 1 << 31;

/// PRI of one function.
pub struct PageRequests {
    /// Control in the lower half, status in the upper.
    control: Register,
    /// Requests that the function can have outstanding.
    capacity: u32,
    /// Requests that software lets it have.
    allocation: Register,
    /// Requests of groups that were not answered yet, by group.
    outstanding: Vec<(u16, u32)>,
}

impl PageRequests {
    /// Of a function that can have `capacity` requests outstanding, at least 1.
    #[must_use]
    pub fn new(capacity: u32) -> Self {
        let control =
            Register::writable(RESPONSE_PASID_REQUIRED, ENABLE).clears(RESPONSE_FAILURE | UNEXPECTED_GROUP);
        Self {
            control,
            capacity,
            allocation: Register::writable(0, u32::MAX),
            outstanding: Vec::new(),
        }
    }

    /// Whether the function may issue page requests.
    #[must_use]
    pub const fn enabled(&self) -> bool {
        self.control.get() & ENABLE != 0
    }

    /// Issue a request of `group`: `false` when none may be issued, or no more before some are answered.
    #[must_use]
    pub fn issue(&mut self, group: u16) -> bool {
        if !self.enabled() || self.outstanding() >= self.capacity.min(self.allocation.get()) {
            return false;
        }
        match self.outstanding.iter_mut().find(|(index, _)| *index == group) {
            Some((_, count)) => *count += 1,
            None => self.outstanding.push((group, 1)),
        }
        true
    }

    /// A response to `group` came; `failure` when it says that the function shall not ask again: then it is off,
    /// and ignores all further responses (10.4.2.1).
    pub fn answered(&mut self, group: u16, failure: bool) {
        if self.control.get() & RESPONSE_FAILURE != 0 {
            return;
        }
        let before = self.outstanding.len();
        self.outstanding.retain(|(index, _)| *index != group);
        if self.outstanding.len() == before {
            self.control.update(UNEXPECTED_GROUP, u32::MAX);
        }
        if failure {
            self.control.update(RESPONSE_FAILURE, u32::MAX);
            self.control.update(ENABLE, 0);
            self.outstanding.clear();
        }
    }

    /// How many requests were not answered yet.
    fn outstanding(&self) -> u32 {
        self.outstanding.iter().map(|(_, count)| count).sum()
    }

    fn stopped(&self) -> u32 {
        if self.enabled() || !self.outstanding.is_empty() {
            0
        } else {
            STOPPED
        }
    }
}

impl Capability for PageRequests {
    fn id(&self) -> CapabilityId {
        CapabilityId::Extended {
            id: 0x0013,
            version: 1,
        }
    }

    fn len(&self) -> u16 {
        16
    }

    fn read(&self, dword: u16) -> u32 {
        match dword {
            1 => self.control.get() | self.stopped(),
            2 => self.capacity,
            3 => self.allocation.get(),
            _ => 0,
        }
    }

    fn write(&mut self, dword: u16, write: DwordWrite) -> ConfigEffect {
        match dword {
            1 => {
                // Asking to forget counts only while no request may be issued (10.5.2.2).
                if write.ones(RESET) != 0 && !self.enabled() {
                    self.outstanding.clear();
                }
                self.control.write(write);
            }
            3 => self.allocation.write(write),
            _ => {}
        }
        ConfigEffect::empty()
    }

    fn reset(&mut self) {
        self.control.reset();
        self.allocation.reset();
        self.outstanding.clear();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn enabled(allocation: u32) -> PageRequests {
        let mut pri = PageRequests::new(4);
        let _ = pri.write(3, DwordWrite::whole(allocation));
        let _ = pri.write(1, DwordWrite::whole(ENABLE));
        pri
    }

    fn status(pri: &PageRequests) -> u32 {
        pri.read(1) & !RESPONSE_PASID_REQUIRED
    }

    #[test]
    fn only_the_switch_and_the_allocation_can_be_written() {
        let mut pri = PageRequests::new(4);
        assert_eq!([1, 2, 3, 4].map(|dword| pri.read(dword)), [0x8100_0000, 4, 0, 0]);
        (0..5).for_each(|dword| {
            let _ = pri.write(dword, DwordWrite::whole(u32::MAX));
        });
        assert_eq!([1, 2, 3].map(|dword| pri.read(dword)), [0x8000_0001, 4, u32::MAX]);
        pri.reset();
        assert_eq!([1, 2, 3].map(|dword| pri.read(dword)), [0x8100_0000, 4, 0]);
    }

    #[test]
    fn requests_are_issued_while_on_and_as_many_as_both_sides_allow() {
        assert!(!PageRequests::new(4).issue(0));
        let mut few = enabled(2);
        assert_eq!([1, 1, 2].map(|group| few.issue(group)), [true, true, false]);
        few.answered(1, false);
        assert!(few.issue(2));
        let mut many = enabled(u32::MAX);
        assert_eq!((0..5).filter(|group| many.issue(*group)).count(), 4);
        assert!(!enabled(0).issue(0));
    }

    #[test]
    fn a_failure_switches_off_and_a_strange_group_is_said() {
        let mut pri = enabled(4);
        assert!(pri.issue(3) && pri.issue(7));
        pri.answered(4, false);
        assert_eq!((status(&pri), pri.outstanding()), (ENABLE | UNEXPECTED_GROUP, 2));
        let _ = pri.write(1, DwordWrite::whole(ENABLE | UNEXPECTED_GROUP));
        pri.answered(3, true);
        pri.answered(7, false);
        let stopped = STOPPED | RESPONSE_FAILURE;
        assert_eq!((status(&pri), pri.outstanding()), (stopped, 0));
        let _ = pri.write(1, DwordWrite::new(2, &[0x01]).expect("inside"));
        assert_eq!(status(&pri), STOPPED);
    }

    #[test]
    fn what_is_outstanding_is_forgotten_on_request_while_off() {
        let mut pri = enabled(4);
        assert!(pri.issue(0));
        let _ = pri.write(1, DwordWrite::whole(ENABLE | RESET));
        assert_eq!(pri.outstanding(), 1);
        let _ = pri.write(1, DwordWrite::whole(0));
        assert_eq!(status(&pri), 0);
        let _ = pri.write(1, DwordWrite::whole(RESET));
        assert_eq!((status(&pri), pri.outstanding()), (STOPPED, 0));
    }
}
