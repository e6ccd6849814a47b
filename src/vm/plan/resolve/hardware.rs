//! Mode `hw` in a plan: which unit of the host's serves one of the guest's, and whether it can.

use crate::iommu::iommufd::Abi;
use crate::iommu::viommu::features::missing;
use crate::pci::tree::{NodeKind, RootComplex};
use crate::platform::addr::Sbdf;
use crate::vm::config::Config;
use crate::vm::config::said::ConfigError;
use crate::vm::config::section::Section;
use crate::vm::config::sections::Viommu;
use crate::vm::host_functions::{HostFunctions, UNCONFINED};
use crate::vm::plan::{DeviceKind, DevicePlan, HardwarePlan, ViommuMode};

use super::names::Names;
use super::viommus::against_served;

/// Where the host tells what its IOMMUs have.
const TOLD: &str = "/sys/class/iommu";

/// What a unit of the guest's covers: functions of the host by name and address, and what is none.
pub(super) struct Behind<'a> {
    functions: Vec<(&'a str, Sbdf)>,
    emulated: Vec<&'a str>,
}

impl<'a> Behind<'a> {
    pub(super) fn new(root: &RootComplex, devices: &'a [DevicePlan]) -> Self {
        let mut behind = Self {
            functions: Vec::new(),
            emulated: Vec::new(),
        };
        for node in root.nodes() {
            let NodeKind::Endpoint(index) = node.kind else {
                continue;
            };
            let DevicePlan { name, kind } = devices.get(index).expect("an endpoint is a device of the plan");
            match kind {
                DeviceKind::Vfio(vfio) => behind.functions.push((name, vfio.host)),
                _ => behind.emulated.push(name),
            }
        }
        behind
    }

    /// The one IOMMU of the host that serves all of it, and the first function; else why there is none.
    fn host_iommu(&self, host: &HostFunctions) -> Result<(String, Sbdf), String> {
        let Some(&(first_name, first)) = self.functions.first() else {
            let problem = "no function of the host is behind it, by which the host's IOMMU would be known; say a \
                           vfio-device there, or another mode";
            return Err(problem.to_owned());
        };
        let iommu_of = |name: &str, at| {
            host.iommu(at)
                .ok_or_else(|| format!("{name} cannot be behind it: {UNCONFINED}"))
        };
        let iommu = iommu_of(first_name, first)?;
        for &(name, at) in &self.functions {
            let other = iommu_of(name, at)?;
            if other != iommu {
                return Err(format!(
                    "{first_name}, which {iommu} of the host serves, and {name}, which {other} serves, are both behind \
                     it, and it stands for one; put them on different root complexes with an IOMMU each, or say per-host"
                ));
            }
        }
        Ok((iommu, first))
    }
}

/// The unit of the host's that `viommu`, which is to be served by one, and before which is what is `behind`, stands for;
/// and what the host says is against it, which the kernel may know better.
pub(super) fn said(
    viommu: &Viommu,
    name: &str,
    behind: &Behind<'_>,
    names: &Names<'_>,
    host: &HostFunctions,
) -> Result<(HardwarePlan, Option<String>), ConfigError> {
    if let Some(emulated) = behind.emulated.first() {
        let problem = format!(
            "it would be behind {name}, which a unit of the host's serves, and that sees no device that Ravelin emulates; \
             put it on another root complex, without an IOMMU or with one of mode emulated"
        );
        let source = names.source(emulated).expect("a device was said");
        return Err(match ["port", "on"].into_iter().find(|key| source.says(key)) {
            Some(key) => source.wrong(key, problem),
            None => source.wrong_altogether(problem),
        });
    }
    let wrong = |problem| viommu.source().wrong("mode", problem);
    let (iommu, _) = behind.host_iommu(host).map_err(wrong)?;
    let found = found(&iommu, host, abi(viommu)?).map_err(wrong)?;
    let against = lacking(&found);
    Ok((found, against))
}

/// The unit of the host's that can serve `viommu`, which leaves that to us; else what is in the way.
pub(super) fn automatic(
    config: &Config,
    viommu: &Viommu,
    behind: &Behind<'_>,
    host: &HostFunctions,
) -> Result<Result<(HardwarePlan, String), String>, ConfigError> {
    if behind.functions.is_empty() {
        return Ok(Err("no function of the host is behind it".to_owned()));
    }
    let possible = match behind.host_iommu(host) {
        Ok((iommu, first)) => possible(config, viommu, &iommu, first, host)?,
        Err(problem) => Err(problem),
    };
    Ok(match behind.emulated.first() {
        Some(emulated) => possible.and_then(|_| Err(format!("{emulated}, which is emulated, is behind it"))),
        None => possible,
    })
}

/// Whether `iommu` of the host, which serves `function` among others, can serve `viommu`: why, or what is in the way.
pub(super) fn possible(
    config: &Config,
    viommu: &Viommu,
    iommu: &str,
    function: Sbdf,
    host: &HostFunctions,
) -> Result<Result<(HardwarePlan, String), String>, ConfigError> {
    let abi = abi(viommu)?;
    for other in &config.viommus {
        if let Some((key, ..)) = against_served(other, ViommuMode::Hardware) {
            return Ok(Err(format!("{key} was said, which no unit of a host's has")));
        }
    }
    if viommu.doorbell == Some(crate::vm::plan::Doorbell::Poll) {
        return Ok(Err(
            "doorbell=poll was said, and a unit of the host's has its own".to_owned(),
        ));
    }
    let found = match found(iommu, host, abi) {
        Ok(found) => found,
        Err(problem) => return Ok(Err(problem)),
    };
    if let Some(lacking) = lacking(&found) {
        return Ok(Err(lacking));
    }
    Ok(match host.answers(function, &found.abis()) {
        Some(Ok(())) => {
            let why = format!("{iommu} has what it takes, and so has the kernel");
            Ok((found, why))
        }
        Some(Err(problem)) => Err(format!("{iommu} has what it takes, but {problem}")),
        None => {
            let why = format!("{iommu} has what it takes; the kernel is asked when the machine is run");
            Ok((found, why))
        }
    })
}

fn found(iommu: &str, host: &HostFunctions, abi: Option<Abi>) -> Result<HardwarePlan, String> {
    let features = host.iommu_features(iommu).ok_or_else(|| {
        format!("{iommu} of the host is none of AMD's: there is no {TOLD}/{iommu}/amd-iommu/features")
    })?;
    Ok(HardwarePlan {
        iommu: iommu.to_owned(),
        function: host.iommu_function(iommu),
        features,
        abi,
    })
}

/// What a unit of the host's lacks to serve a guest's, as half a sentence.
fn lacking(found: &HardwarePlan) -> Option<String> {
    let missing: Vec<_> = missing(found.features).iter().map(ToString::to_string).collect();
    (!missing.is_empty()).then(|| format!("{} lacks {}", found.iommu, missing.join(", ")))
}

/// The version of the kernel's interface that was said: by its name, or in a file.
fn abi(viommu: &Viommu) -> Result<Option<Abi>, ConfigError> {
    let Some(said) = &viommu.abi else {
        return Ok(None);
    };
    let path = viommu.source().place_of("abi").resolve(said.0.as_ref());
    let abi = Abi::said(&said.0, &path);
    abi.map(Some)
        .map_err(|problem| viommu.source().wrong("abi", problem))
}
