//! What of AMD's interface the running kernel takes, step by step.

use std::fmt;
use std::io;
use std::os::fd::RawFd;
use std::sync::Arc;

use serde::Serialize;

use super::requests::{self, Made, Route, Whose};
use super::{Functions, HwDevice, canonical, map_page, rings, user_data};
use crate::iommu::amd::spec::dte::{Dte, Host};
use crate::iommu::iommufd::Kernel;
use crate::iommu::iommufd::abi::{Abi, Forwarding, Rings};
use crate::iommu::viommu::host::HostFeatures;
use crate::platform::addr::Bdf;

/// What is asked, and with what.
pub struct Trial<'a> {
    /// Who is asked.
    pub kernel: &'a Arc<dyn Kernel>,
    /// A function of the host's that is attached to nothing, and is so again afterwards.
    pub device: &'a HwDevice,
    /// The versions to try, each for itself.
    pub abis: &'a [Abi],
    /// For versions that ask.
    pub functions: Functions,
    /// A guest of KVM's without anything, for versions that ask.
    pub vm: Option<RawFd>,
}

/// What the kernel said.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct Tried {
    /// What the host's units have in common, where the kernel tells.
    #[serde(skip)]
    pub features: Option<HostFeatures>,
    /// What every version has.
    pub steps: Vec<Step>,
    /// By version, in the order in which they were to be tried.
    pub versions: Vec<Version>,
}

/// What the kernel said to one version.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct Version {
    /// Its name, or that of the one it is based on.
    pub name: &'static str,
    /// Whether it is the kernel's: there is a VF page, and the guest's rings are taken.
    pub answers: bool,
    /// From VIOMMU_ALLOC on.
    pub steps: Vec<Step>,
}

/// A step of a guest's life, by the request's name, and what the kernel said.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct Step {
    /// As the kernel's interface calls it.
    pub name: &'static str,
    /// What it said.
    pub answer: Answer,
}

/// What the kernel says to a request.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Answer {
    /// It did it.
    Ok,
    /// It said so, and left the field empty that would show it.
    NotWritten,
    /// There was nothing to ask it with.
    NotAsked,
    /// It did not do it.
    Refused {
        /// The errno's name, or what there is instead.
        errno: String,
        /// What that may be for; empty where nothing is known.
        hint: String,
    },
}

impl Answer {
    fn refused(error: &io::Error) -> Self {
        let (errno, hint) = requests::said(error);
        Self::Refused { errno, hint }
    }
}

impl fmt::Display for Answer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Ok => f.write_str("ok"),
            Self::NotWritten => f.write_str("not written"),
            Self::NotAsked => f.write_str("not asked"),
            Self::Refused { errno, hint } if hint.is_empty() => f.write_str(errno),
            Self::Refused { errno, hint } => write!(f, "{errno}: {hint}"),
        }
    }
}

impl Tried {
    /// The version that is the kernel's, if one is: the first that it answers to.
    #[must_use]
    pub fn version(&self) -> Option<&Version> {
        self.versions.iter().find(|version| version.answers)
    }
}

impl Version {
    /// What the kernel said to step `name`, if this version has it.
    #[must_use]
    pub fn answer(&self, name: &str) -> Option<&Answer> {
        let step = self.steps.iter().find(|step| step.name == name);
        step.map(|step| &step.answer)
    }

    /// The first step that the kernel did not do.
    #[must_use]
    pub fn first_refusal(&self) -> Option<&Step> {
        self.steps.iter().find(|step| step.answer != Answer::Ok)
    }
}

/// The step that makes a vIOMMU.
pub const VIOMMU_ALLOC: &str = "VIOMMU_ALLOC";
/// The step that shows whether it is one: where in /dev/iommu its VF page is.
pub const PAGE_OFFSET: &str = "offset of the VF page";
const PAGE_MAPPED: &str = "mmap of the VF page";

/// What EINVAL means where there is no nest parent.
const NO_PARENT: &str = "that is because there is no nest parent: the kernel makes vIOMMUs of this type, and whether it does \
                         anything about them cannot be asked";

/// Steps so far, and what they made.
struct Asked<'a> {
    kernel: &'a Arc<dyn Kernel>,
    steps: Vec<Step>,
    made: Vec<Made>,
}

impl<'a> Asked<'a> {
    fn new(kernel: &'a Arc<dyn Kernel>) -> Self {
        Self {
            kernel,
            steps: Vec::new(),
            made: Vec::new(),
        }
    }

    fn answered(&mut self, name: &'static str, answer: Answer) {
        self.steps.push(Step { name, answer });
    }

    /// Note what came of step `name`, which was not asked where there is no outcome.
    fn step<T>(&mut self, name: &'static str, outcome: Option<io::Result<T>>) -> Option<T> {
        match outcome {
            None => self.answered(name, Answer::NotAsked),
            Some(Err(error)) => self.answered(name, Answer::refused(&error)),
            Some(Ok(value)) => {
                self.answered(name, Answer::Ok);
                return Some(value);
            }
        }
        None
    }

    /// The same for a step that makes an object.
    fn object(&mut self, name: &'static str, outcome: Option<io::Result<u32>>) -> Option<u32> {
        let id = self.step(name, outcome)?;
        self.made.push(Made::new(self.kernel, id));
        Some(id)
    }

    /// Destroy what was made, the last first.
    fn end(mut self) -> Vec<Step> {
        while self.made.pop().is_some() {}
        self.steps
    }
}

impl Trial<'_> {
    /// Ask for each step of a guest's life, also where one before it failed, as far as there is something to ask with.
    /// Nothing is left of it.
    #[must_use]
    pub fn run(&self) -> Tried {
        let kernel = &**self.kernel;
        let device = self.device.id;
        let mut asked = Asked::new(self.kernel);
        let features = asked.step("GET_HW_INFO", Some(requests::hw_info(kernel, device)));
        let ioas = asked.object("IOAS_ALLOC", Some(requests::ioas_alloc(kernel)));
        let tables = |nest_parent| ioas.map(|ioas| requests::paging_alloc(kernel, device, ioas, nest_parent));
        let table = asked.object("HWPT_ALLOC", tables(false));
        let function = &self.device.function;
        let attached = asked.step("attach", table.map(|table| function.attach(table)));
        let parent = asked.object("HWPT_ALLOC of the nest parent", tables(true));
        let over = Over { table, parent };
        let versions = self.abis.iter().map(|abi| self.version(abi, over)).collect();
        if attached.is_some()
            && let Err(error) = function.detach()
        {
            tracing::warn!(%error, "the host keeps a function attached until its node is closed");
        }
        Tried {
            features,
            steps: asked.end(),
            versions,
        }
    }

    fn version(&self, abi: &Abi, over: Over) -> Version {
        let kernel = &**self.kernel;
        let device = self.device.id;
        let mut asked = Asked::new(self.kernel);
        let data = user_data(abi, &self.functions, self.vm).ok();
        let alloc = over.parent.or(over.table).zip(data).map(|(under, mut data)| {
            let id = requests::viommu_alloc(kernel, abi.viommu_type, device, under, &mut data)?;
            Ok((id, data))
        });
        let (viommu, data) = match alloc {
            Some(Ok((id, data))) => (asked.object(VIOMMU_ALLOC, Some(Ok(id))), Some(data)),
            Some(Err(error)) => {
                let mut answer = Answer::refused(&error);
                if let Answer::Refused { hint, .. } = &mut answer
                    && error.kind() == io::ErrorKind::InvalidInput
                    && over.parent.is_none()
                {
                    NO_PARENT.clone_into(hint);
                }
                asked.answered(VIOMMU_ALLOC, answer);
                (None, None)
            }
            None => (asked.object(VIOMMU_ALLOC, None), None),
        };
        let layout = abi.user_data;
        let offset = data
            .as_ref()
            .map(|data| data.get_u64(layout.mmap_offset as usize));
        asked.answered(
            PAGE_OFFSET,
            match offset {
                None => Answer::NotAsked,
                Some(0) => Answer::NotWritten,
                Some(_) => Answer::Ok,
            },
        );
        let offset = offset.filter(|offset| *offset != 0);
        let mapped = asked.step(
            PAGE_MAPPED,
            offset.map(|offset| map_page(kernel, offset).map(drop)),
        );
        // Any name and any table: no device ever goes by them.
        let name = Bdf::from_requester_id(8);
        let vdevice = viommu.map(|viommu| requests::vdevice_alloc(kernel, viommu, device, name));
        asked.object("VDEVICE_ALLOC", vdevice);
        let host = Host::new().with_v(true).with_gv(true);
        let dte = Dte {
            host,
            ..Dte::default()
        };
        let dte = canonical(&dte.with_gcr3_root(0x1000)).expect("guest tables with a root");
        let nested = viommu.map(|viommu| requests::nested_alloc(kernel, viommu, device, &dte));
        asked.object("HWPT_ALLOC of the guest's tables", nested);
        let guest_id = data.zip(layout.guest_id);
        let guest_id = guest_id.map_or(0, |(data, at)| data.get_u32(at as usize));
        let ring = asked.step(
            ring_step(&abi.rings),
            viommu.map(|viommu| self.ring(abi, viommu, guest_id)),
        );
        if let Some(layout) = &abi.interrupts {
            // Nowhere, which is where they go anyway.
            let route = viommu.zip(self.vm).map(|(viommu, vm)| {
                let route = Route {
                    viommu,
                    kind: layout.event,
                    vm,
                    vcpu: 0,
                    vector: 0,
                };
                requests::route(kernel, layout, &route)
            });
            asked.step("VIOMMU_EXT_INT_REMAP", route);
        }
        if let Some(events) = abi.events {
            let queue = viommu.map(|viommu| {
                let (id, fd) = requests::events_alloc(kernel, viommu, events.queue_type, 1)?;
                drop(fd);
                Ok(id)
            });
            asked.object("VEVENTQ_ALLOC", queue);
        }
        Version {
            name: abi.name,
            answers: mapped.is_some() && ring.is_some(),
            steps: asked.end(),
        }
    }

    /// Whether the kernel takes the guest's rings: a queue that cannot be, or a Control that says what it says at reset.
    fn ring(&self, abi: &Abi, viommu: u32, guest_id: u32) -> io::Result<()> {
        match &abi.rings {
            Rings::Queues(queues) => rings::probe(&**self.kernel, viommu, queues),
            Rings::Registers(by) => {
                let whose = Whose {
                    viommu,
                    host_iommu: self.functions.host_iommu,
                    guest_id,
                };
                requests::forward(&**self.kernel, *by, &whose, rings::CONTROL, 0)
            }
        }
    }
}

/// What vIOMMUs are made over.
#[derive(Clone, Copy)]
struct Over {
    table: Option<u32>,
    parent: Option<u32>,
}

fn ring_step(rings: &Rings) -> &'static str {
    match rings {
        Rings::Queues(_) => "HW_QUEUE_ALLOC",
        Rings::Registers(Forwarding::MmioAccess) => "VIOMMU_MMIO_ACCESS",
        Rings::Registers(Forwarding::Option(_)) => "OPTION",
        Rings::Registers(Forwarding::Command) => "VIOMMU_COMMAND",
    }
}

#[cfg(test)]
mod tests;
