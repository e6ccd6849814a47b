//! A device of the host's, as the guest's function that it stands for: requests go by the host's number, and what the
//! unit has for the device comes by the guest's.

use std::sync::Arc;

use vm_memory::Permissions;

use super::SimHost;
use crate::iommu::agent::{AddressType, Refused, TranslationAgent};
use crate::iommu::amd::commands::Command;
use crate::iommu::amd::effort::Effort;
use crate::iommu::amd::passing::Passing;
use crate::iommu::amd::ppr::{Answer, PageRequest};
use crate::iommu::amd::processor::{Follower, NoAnswer};
use crate::iommu::amd::request::{AtsCompletion, Request};
use crate::platform::addr::{Bdf, Iova};
use crate::platform::dma::{Requester, Run, Translations, Translator};

/// The device.
pub(super) struct Function {
    pub(super) host: Arc<SimHost>,
    /// What the host calls it.
    pub(super) function: Bdf,
}

impl Function {
    fn renamed(&self, request: &Request) -> Request {
        Request {
            requester: self.function,
            ..*request
        }
    }
}

impl Translator for Function {
    fn begin(&self) -> Box<dyn Translations + '_> {
        Box::new(Renamed {
            function: self.function,
            passing: Passing::begin(&*self.host),
        })
    }
}

/// Requests on their way through the host's unit, by the host's number.
struct Renamed<'a> {
    function: Bdf,
    passing: Passing<'a, SimHost>,
}

impl Translations for Renamed<'_> {
    fn translate(&self, _requester: Bdf, at: Iova, access: Permissions) -> Option<Run> {
        self.passing.translate(self.function, at, access)
    }
}

impl TranslationAgent for Function {
    fn translate(&self, request: &Request) -> Result<AtsCompletion, Refused> {
        self.host.translate(&self.renamed(request))
    }

    fn read(&self, request: &Request, address: AddressType, data: &mut [u8]) -> Result<(), Refused> {
        self.host.read(&self.renamed(request), address, data)
    }

    fn write(&self, request: &Request, address: AddressType, data: &[u8]) -> Result<(), Refused> {
        self.host.write(&self.renamed(request), address, data)
    }

    fn page_request(&self, request: &PageRequest) -> Answer {
        self.host.page_request(&PageRequest {
            device: self.function,
            ..*request
        })
    }
}

/// What hears of commands that go to one device, by the number that the guest has for it when they come.
pub(super) struct Told {
    pub(super) function: Bdf,
    pub(super) requester: Arc<Requester>,
    pub(super) follower: Arc<dyn Follower>,
}

impl Told {
    /// What of `command` goes to the device, by the guest's number: invalidations of what it keeps, and responses to its page
    /// requests. All else the unit does by itself.
    fn meant(&self, command: Command) -> Option<Command> {
        let name = |device: Bdf| (device == self.function).then(|| self.requester.sbdf().bdf);
        Some(match command {
            Command::InvalidateIotlb { device, space, pages } => Command::InvalidateIotlb {
                device: name(device)?,
                space,
                pages,
            },
            Command::CompletePageRequest {
                device,
                pasid,
                group,
                response,
            } => Command::CompletePageRequest {
                device: name(device)?,
                pasid,
                group,
                response,
            },
            _ => return None,
        })
    }
}

impl Follower for Told {
    fn follow(&self, batch: &[Command]) -> Result<(), NoAnswer> {
        let mut outcome = Ok(());
        for (index, command) in batch.iter().enumerate() {
            if let Some(meant) = self.meant(*command)
                && self.follower.follow(&[meant]).is_err()
            {
                // The others are told all the same.
                outcome = outcome.and(Err(NoAnswer {
                    device: self.function,
                    index,
                }));
            }
        }
        outcome
    }

    fn settle(&self, effort: &mut Effort) -> bool {
        self.follower.settle(effort)
    }
}
