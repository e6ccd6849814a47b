//! Page requests of devices (PRI), and the log they go to (section 2.6).

use std::sync::atomic::Ordering;

use super::events::Event;
use super::log::Appended;
use super::memory::SystemMemory;
use super::request::{Access, Pasid};
use super::spec::ppr::Record;
use super::spec::registers::{Control, Status};
use super::{Effects, Unit};
use crate::platform::addr::{Bdf, Iova};

/// A device asks software to bring a page in.
///
/// PCI Express Base Specification 10.4.1.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct PageRequest {
    /// Who asks.
    pub device: Bdf,
    /// For which address space.
    pub pasid: Option<Pasid>,
    /// The page.
    pub at: Iova,
    /// What for.
    pub access: Access,
    /// To execute.
    pub execute: bool,
    /// With supervisor privilege.
    pub privileged: bool,
    /// Page request group index, 9 bits.
    pub group: u16,
    /// The last request of its group.
    pub last: bool,
}

/// What the device is told at once.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Answer {
    /// Nothing: software answers by COMPLETE_PPR_REQUEST.
    Later,
    /// The request failed: there is no way, or no room, to tell software.
    Failure,
    /// Invalid request: the device may send none.
    Invalid,
}

impl<M: SystemMemory> Unit<M> {
    /// Put a page request in the log.
    pub fn page_request(&self, request: &PageRequest) -> (Answer, Effects) {
        let control = Control::from_bits(self.control.load(Ordering::Acquire));
        if !control.iommu_en() || !control.ppr_en() {
            return (Answer::Failure, Effects::default());
        }
        let accepted = self.entry(request.device).ok().filter(|dte| {
            let space = request.pasid.is_none() || dte.host.gv() && control.gt_en();
            dte.host.v() && dte.host.tv() && dte.host.ppr() && space
        });
        let Some(dte) = accepted else {
            let event = Event::InvalidPageRequest {
                device: request.device,
                pasid: request.pasid,
                group: request.group,
                address: request.at.0,
            };
            return (Answer::Invalid, self.report_request(&event));
        };
        if let Some(answer) = self.page_request_of_guest(&dte, request) {
            return answer;
        }
        let mut registers = self.change();
        if !registers.ppr_log_runs() {
            return (Answer::Failure, Effects::default());
        }
        let answer = match registers.ppr.append(&self.memory, record(request)) {
            Appended::Logged => {
                registers.latch(Status::new().with_ppr_int(true));
                Answer::Later
            }
            Appended::Overflowed => {
                registers.latch(Status::new().with_ppr_overflow(true));
                Answer::Failure
            }
            Appended::Unreachable => Answer::Failure,
        };
        (answer, Effects::of(registers.take_interrupts()))
    }
}

/// The record of a page service request.
pub(super) fn record(request: &PageRequest) -> u128 {
    let [b0, b1, b2, _] = request.pasid.unwrap_or_default().value().to_le_bytes();
    Record::new()
        .with_device(request.device.requester_id())
        .with_pasid_15_0(u16::from_le_bytes([b0, b1]))
        .with_pasid_19_16(b2)
        .with_group(request.group & 0x1ff)
        .with_last(request.last)
        .with_execute(request.execute)
        .with_read(request.access.read)
        .with_write(request.access.write)
        .with_user(!request.privileged)
        .with_gn(request.pasid.is_some())
        .with_code(Record::PAGE_SERVICE_REQUEST)
        .with_page(request.at.0 >> 12)
        .into_bits()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_record_says_who_asks_for_which_page_and_what_for() {
        let request = PageRequest {
            device: Bdf::new(2, 3, 1).expect("valid"),
            pasid: Pasid::new(0xa_1234),
            at: Iova(0x7fff_1234_5678),
            access: Access::WRITE,
            execute: false,
            privileged: false,
            group: 5,
            last: true,
        };
        assert_eq!(record(&request), 0x0000_7fff_1234_5000_1160_2a05_1234_0219);
    }
}
