//! The requests that mode `hw` makes, each with its structure (include/uapi/linux/iommufd.h, and AMD's by the table).

use std::io;
use std::os::fd::{OwnedFd, RawFd};
use std::sync::Arc;

use crate::iommu::amd::spec::dte::Dte;
use crate::iommu::iommufd::Kernel;
use crate::iommu::iommufd::abi::{ExtInterrupt, Forwarding};
use crate::iommu::iommufd::kernel::Fields;
use crate::iommu::viommu::host::HostFeatures;
use crate::platform::addr::{Bdf, Gpa};
use crate::platform::host::{HostError, errno_name};

const DESTROY: u32 = 0x80;
const IOAS_ALLOC: u32 = 0x81;
const OPTION: u32 = 0x87;
const HWPT_ALLOC: u32 = 0x89;
const GET_HW_INFO: u32 = 0x8a;
const VIOMMU_ALLOC: u32 = 0x90;
const VDEVICE_ALLOC: u32 = 0x91;
const HW_QUEUE_ALLOC: u32 = 0x94;
const VIOMMU_COMMAND: u32 = 0x95;
const VIOMMU_MMIO_ACCESS: u32 = 0x60;

/// IOMMU_HWPT_ALLOC_NEST_PARENT.
const NEST_PARENT: u32 = 1;
/// IOMMU_HWPT_DATA_AMD_GUEST.
const AMD_GUEST: u32 = 3;
/// IOMMU_HW_INFO_TYPE_AMD.
const AMD_INFO: u32 = 4;

/// What the kernel refused, and why that may be.
#[derive(Debug, thiserror::Error)]
#[error("{step}: {reason}{hint}")]
struct Refusal {
    /// The request, by its name in the kernel's interface.
    step: &'static str,
    reason: io::Error,
    hint: &'static str,
}

/// The error for a refused `step`, of the same kind as `reason`. ENOTTY is what a kernel says that has no such request.
pub(super) fn refusal(step: &'static str, reason: io::Error, hint: &'static str) -> io::Error {
    let unknown = reason.raw_os_error() == Some(libc::ENOTTY);
    let kind = if unknown {
        io::ErrorKind::Unsupported
    } else {
        reason.kind()
    };
    io::Error::new(kind, Refusal { step, reason, hint })
}

/// What the kernel answered, by the errno's name, and what that may be for.
pub(super) fn said(error: &io::Error) -> (String, String) {
    let refusal = error.get_ref().and_then(|inner| inner.downcast_ref::<Refusal>());
    let (reason, hint) = refusal.map_or((error, ""), |refusal| (&refusal.reason, refusal.hint));
    let name = reason.raw_os_error().map(errno_name);
    let errno = name.unwrap_or_else(|| reason.to_string());
    (errno, hint.trim_start_matches("; ").to_owned())
}

/// [`refusal`] with a hint for what the kernel does not support.
fn refused(step: &'static str, unsupported: &'static str) -> impl Fn(io::Error) -> io::Error {
    move |reason| {
        let absent = matches!(reason.raw_os_error(), Some(libc::EOPNOTSUPP | libc::ENOTTY));
        refusal(step, reason, if absent { unsupported } else { "" })
    }
}

/// What a device's unit has.
pub(super) fn hw_info(kernel: &dyn Kernel, device: u32) -> io::Result<HostFeatures> {
    const STEP: &str = "GET_HW_INFO";
    let mut argument = Fields::structure(40).u32(8, device);
    let mut data = Fields::data(16);
    kernel
        .request(GET_HW_INFO, argument.bytes(), data.bytes())
        .map_err(refused(
            STEP,
            "; the host's IOMMU driver tells nothing of its unit",
        ))?;
    if argument.get_u32(24) != AMD_INFO || argument.get_u32(12) < 16 {
        let reason = io::ErrorKind::Unsupported.into();
        return Err(refusal(
            STEP,
            reason,
            "; the function is behind no AMD IOMMU, or the host's kernel was built without CONFIG_AMD_IOMMU_IOMMUFD",
        ));
    }
    Ok(HostFeatures {
        efr: data.get_u64(0),
        efr2: data.get_u64(8),
    })
}

/// An address space with nothing in it.
pub(super) fn ioas_alloc(kernel: &dyn Kernel) -> io::Result<u32> {
    let mut argument = Fields::structure(12);
    kernel
        .request(IOAS_ALLOC, argument.bytes(), &mut [])
        .map_err(refused("IOAS_ALLOC", ""))?;
    Ok(argument.get_u32(8))
}

/// Host tables of `device` over the address space `ioas`, under which tables of a guest's may be if `nest_parent`.
pub(super) fn paging_alloc(
    kernel: &dyn Kernel,
    device: u32,
    ioas: u32,
    nest_parent: bool,
) -> io::Result<u32> {
    let flags = if nest_parent { NEST_PARENT } else { 0 };
    let mut argument = Fields::structure(48).u32(4, flags).u32(8, device).u32(12, ioas);
    let (step, hint) = if nest_parent {
        (
            "HWPT_ALLOC of the nest parent",
            "; the host's IOMMU lacks GTSup, GIOSup or GCR3TRPMode, or its driver has translation off",
        )
    } else {
        ("HWPT_ALLOC", "")
    };
    kernel
        .request(HWPT_ALLOC, argument.bytes(), &mut [])
        .map_err(refused(step, hint))?;
    Ok(argument.get_u32(16))
}

/// A vIOMMU of the type `viommu_type` on the unit of `device`; `data` goes with it and is written to.
pub(super) fn viommu_alloc(
    kernel: &dyn Kernel,
    viommu_type: u32,
    device: u32,
    parent: u32,
    data: &mut Fields,
) -> io::Result<u32> {
    let argument = Fields::structure(40).u32(8, viommu_type);
    let mut argument = argument.u32(12, device).u32(16, parent);
    kernel
        .request(VIOMMU_ALLOC, argument.bytes(), data.bytes())
        .map_err(refused(
            "VIOMMU_ALLOC",
            "; the host's kernel has no AMD vIOMMU, has another type number for it, or its IOMMU lacks vIOMMUSup",
        ))?;
    Ok(argument.get_u32(20))
}

/// The guest's name of `device`.
pub(super) fn vdevice_alloc(kernel: &dyn Kernel, viommu: u32, device: u32, guest: Bdf) -> io::Result<u32> {
    let argument = Fields::structure(24).u32(4, viommu).u32(8, device);
    let mut argument = argument.u64(16, guest.requester_id().into());
    kernel
        .request(VDEVICE_ALLOC, argument.bytes(), &mut [])
        .map_err(refused("VDEVICE_ALLOC", ""))?;
    Ok(argument.get_u32(12))
}

/// The guest's tables by `dte`, which holds only what counts.
pub(super) fn nested_alloc(kernel: &dyn Kernel, viommu: u32, device: u32, dte: &Dte) -> io::Result<u32> {
    let quadwords = dte.into_quadwords();
    let mut data = (0..)
        .zip(quadwords)
        .fold(Fields::data(32), |data, (at, quadword)| {
            data.u64(8 * at, quadword)
        });
    let argument = Fields::structure(48).u32(8, device).u32(12, viommu);
    let mut argument = argument.u32(24, AMD_GUEST);
    kernel
        .request(HWPT_ALLOC, argument.bytes(), data.bytes())
        .map_err(refused(
            "HWPT_ALLOC of the guest's tables",
            "; the host's kernel has no nested tables for AMD's vIOMMU",
        ))?;
    Ok(argument.get_u32(16))
}

/// A HW queue as the kernel takes it.
pub(super) struct HwQueue {
    /// By the table.
    pub(super) queue_type: u32,
    /// By the table.
    pub(super) flags: u32,
    /// Guest physical.
    pub(super) base: Gpa,
    /// The length code of the base register, 8 to 15.
    pub(super) length: u64,
}

/// Have the unit work on a ring of the guest's.
pub(super) fn queue_alloc(kernel: &dyn Kernel, viommu: u32, queue: &HwQueue) -> io::Result<u32> {
    let argument = Fields::structure(40).u32(4, queue.flags).u32(8, viommu);
    let argument = argument.u32(12, queue.queue_type).u64(24, queue.base.0);
    let mut argument = argument.u64(32, queue.length);
    kernel
        .request(HW_QUEUE_ALLOC, argument.bytes(), &mut [])
        .map_err(refused(
            "HW_QUEUE_ALLOC",
            "; the host's kernel has no AMD vIOMMU of the version with HW queues: a stock kernel takes VIOMMU_ALLOC of \
             any type, and nothing of AMD's after it",
        ))?;
    Ok(argument.get_u32(20))
}

/// Whose register is forwarded.
pub(super) struct Whose {
    pub(super) viommu: u32,
    /// The host's IOMMU, and the number that it has for the guest.
    pub(super) host_iommu: Bdf,
    pub(super) guest_id: u32,
}

/// Tell the kernel that the guest wrote `value` to its 64-bit register at `register`, as `by` has it.
pub(super) fn forward(
    kernel: &dyn Kernel,
    by: Forwarding,
    whose: &Whose,
    register: u16,
    value: u64,
) -> io::Result<()> {
    const HINT: &str = "; the host's kernel has another version of AMD's vIOMMU";
    let (number, step, fields) = match by {
        Forwarding::MmioAccess => {
            let fields = Fields::structure(32).u32(4, whose.host_iommu.requester_id().into());
            let fields = fields.u32(8, whose.guest_id).u32(12, register.into());
            let fields = fields.u64(16, value).u32(24, 8).u8(28, 1);
            (VIOMMU_MMIO_ACCESS, "VIOMMU_MMIO_ACCESS", fields)
        }
        Forwarding::Option(option) => {
            let fields = Fields::structure(24).u32(4, option).u16(10, register);
            (OPTION, "OPTION", fields.u32(12, whose.viommu).u64(16, value))
        }
        Forwarding::Command => {
            let fields = Fields::structure(24).u32(4, whose.viommu).u16(10, register);
            (VIOMMU_COMMAND, "VIOMMU_COMMAND", fields.u64(16, value))
        }
    };
    let mut fields = fields;
    kernel
        .request(number, fields.bytes(), &mut [])
        .map_err(refused(step, HINT))
}

/// Where an interrupt of the unit's goes, as the kernel takes it: vector 0 is nowhere.
pub(super) struct Route {
    pub(super) viommu: u32,
    /// By the table.
    pub(super) kind: u32,
    pub(super) vm: RawFd,
    pub(super) vcpu: u32,
    pub(super) vector: u8,
}

/// Send an interrupt of the unit's to a vCPU.
pub(super) fn route(kernel: &dyn Kernel, layout: &ExtInterrupt, route: &Route) -> io::Result<()> {
    let vm = u32::try_from(route.vm).map_err(io::Error::other)?;
    let fields = Fields::structure(layout.len)
        .u32(layout.viommu as usize, route.viommu)
        .u32(layout.kind as usize, route.kind);
    let mut fields = fields
        .u32(layout.kvm as usize, vm)
        .u32(layout.vcpu as usize, route.vcpu)
        .u32(layout.vector as usize, route.vector.into());
    kernel
        .request(layout.request, fields.bytes(), &mut [])
        .map_err(refused("VIOMMU_EXT_INT_REMAP", "; it needs kvm_amd with avic=1"))
}

/// A queue for what the kernel tells of a vIOMMU, `depth` records deep; its number and its descriptor.
pub(super) fn events_alloc(
    kernel: &dyn Kernel,
    viommu: u32,
    queue_type: u32,
    depth: u32,
) -> io::Result<(u32, OwnedFd)> {
    let argument = Fields::structure(32).u32(8, viommu);
    let mut argument = argument.u32(12, queue_type).u32(16, depth);
    let fd = kernel.event_queue(argument.bytes()).map_err(refused(
        "VEVENTQ_ALLOC",
        "; the host's kernel has no event queues, or not of this type",
    ))?;
    Ok((argument.get_u32(20), fd))
}

/// Destroy the object `id`.
pub(super) fn destroy(kernel: &dyn Kernel, id: u32) -> io::Result<()> {
    let mut argument = Fields::structure(8).u32(4, id);
    kernel
        .request(DESTROY, argument.bytes(), &mut [])
        .map_err(refused("DESTROY", ""))
}

/// An object that is destroyed with its handle.
pub(super) struct Made {
    /// `None` once somebody else sees to it.
    kernel: Option<Arc<dyn Kernel>>,
    pub(super) id: u32,
}

impl Made {
    pub(super) fn new(kernel: &Arc<dyn Kernel>, id: u32) -> Self {
        Self {
            kernel: Some(kernel.clone()),
            id,
        }
    }

    /// From now on the caller sees to it; its number.
    pub(super) fn keep(mut self) -> u32 {
        self.kernel = None;
        self.id
    }
}

impl Drop for Made {
    fn drop(&mut self) {
        if let Some(kernel) = &self.kernel
            && let Err(error) = destroy(&**kernel, self.id)
        {
            tracing::warn!(%error, object = self.id, "the host keeps an object of an IOMMU until the end");
        }
    }
}

/// Guest physical memory as the parent of all nested tables of a guest, whichever host unit they are of.
///
/// The address space it is made of stays until after this.
pub struct NestParent(Made);

impl NestParent {
    /// The address space `ioas` as `device`, a function bound to `kernel`, by the number of the binding, can have it.
    ///
    /// # Errors
    /// What the host refused, and what that may be for.
    pub fn new(kernel: &Arc<dyn Kernel>, device: u32, ioas: u32) -> Result<Arc<Self>, HostError> {
        let id = paging_alloc(&**kernel, device, ioas, true);
        let id = id.map_err(|source| {
            HostError::new("make guest memory the parent of a guest's own tables", source)
        })?;
        Ok(Arc::new(Self(Made::new(kernel, id))))
    }

    pub(super) fn id(&self) -> u32 {
        self.0.id
    }
}
