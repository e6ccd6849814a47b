//! What of AMD's interface the running kernel takes, step by step.

use std::io;

use super::requests::{self, Made, refusal};
use super::{HwHost, NO_PAGE, Object, rings};
use crate::iommu::amd::spec::dte::{Dte, Host};
use crate::iommu::iommufd::abi::Rings;
use crate::platform::addr::{Bdf, PAGE_SIZE};

/// A step of a guest's life, by the request's name, and what the kernel said.
#[derive(Debug)]
pub struct Step {
    /// As the kernel's interface calls it.
    pub name: &'static str,
    /// An error names the step, too, and what it may be for.
    pub outcome: io::Result<()>,
}

impl HwHost {
    /// Try what comes after the requests that made this host, each step also where one before it failed, as far as there
    /// is something to ask with. Nothing is left of it, and no device is attached to anything else.
    ///
    /// # Errors
    /// `EBUSY` while the guest's unit exists.
    pub fn trial(&self) -> io::Result<Vec<Step>> {
        let state = self.state();
        if state.has(Object::Viommu) {
            return Err(io::Error::from_raw_os_error(libc::EBUSY));
        }
        let mut steps = Vec::new();
        // The last made goes first.
        let mut made = Vec::new();
        let kernel = &*self.kernel;
        let mut step = |name, outcome: io::Result<Option<u32>>| {
            let id = outcome.as_ref().ok().copied().flatten();
            made.extend(id.map(|id| Made::new(&self.kernel, id)));
            steps.push(Step {
                name,
                outcome: outcome.map(drop),
            });
            id
        };
        let viommu_type = self.abi.viommu_type;
        let alloc = self.user_data().and_then(|mut data| {
            let id = requests::viommu_alloc(kernel, viommu_type, self.first(), self.parent.id(), &mut data)?;
            Ok((id, data))
        });
        let (alloc, offset) = match alloc {
            Ok((id, data)) => (
                Ok(Some(id)),
                data.get_u64(self.abi.user_data.mmap_offset as usize),
            ),
            Err(error) => (Err(error), 0),
        };
        if let Some(viommu) = step("VIOMMU_ALLOC", alloc) {
            let page = match offset {
                0 => Err(refusal(
                    "VIOMMU_ALLOC",
                    io::ErrorKind::Unsupported.into(),
                    NO_PAGE,
                )),
                offset => self.kernel.map(offset, PAGE_SIZE).map(drop),
            };
            step("mmap of the VF page", page.map(|()| None));
            // Any name and any table: no device ever goes by them.
            let name = Bdf::from_requester_id(8);
            let vdevice = requests::vdevice_alloc(kernel, viommu, self.first(), name);
            step("VDEVICE_ALLOC", vdevice.map(Some));
            let host = Host::new().with_v(true).with_gv(true);
            let dte = Dte {
                host,
                ..Dte::default()
            };
            let nested = super::canonical(&dte.with_gcr3_root(0x1000));
            let nested = nested.and_then(|dte| requests::nested_alloc(kernel, viommu, self.first(), &dte));
            step("HWPT_ALLOC of the guest's tables", nested.map(Some));
            if let Rings::Queues(queues) = &self.abi.rings {
                step(
                    "HW_QUEUE_ALLOC",
                    rings::probe(kernel, viommu, queues).map(|()| None),
                );
            }
        }
        while made.pop().is_some() {}
        drop(state);
        Ok(steps)
    }
}
