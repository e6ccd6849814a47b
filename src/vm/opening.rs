//! The ways to functions of the host: their own nodes with /dev/iommu, the nodes of their groups where the host has no
//! other, or descriptors that whoever started us has opened.

use std::collections::BTreeMap;
use std::collections::btree_map::Entry;
use std::fs::File;
use std::io;
use std::path::PathBuf;
use std::sync::Arc;

use super::functions::inherited;
use super::host_functions::{Handed, HostFunctions, Way};
use super::plan::{DeviceKind, Plan};
use crate::devices::vfio::cdev::Cdev;
use crate::devices::vfio::group::{Group, Groups};
use crate::iommu::container::{self, Container};
use crate::iommu::iommufd::{self, Iommufd, Kernel, Requests};
use crate::platform::addr::Sbdf;
use crate::platform::host::HostError;

/// What opens the functions of one machine, all of them in the same way.
pub(super) struct Opening {
    host: HostFunctions,
    /// The descriptors of device nodes that were handed over.
    descriptors: BTreeMap<Sbdf, i32>,
    means: Means,
}

enum Means {
    Iommufd(Arc<Iommufd>),
    Groups {
        container: Arc<Container>,
        /// By their nodes, those that are open.
        open: BTreeMap<PathBuf, Arc<Group>>,
        /// The same, for their functions.
        groups: Arc<Groups>,
    },
}

impl Opening {
    /// The way to the functions of `plan`, of this host.
    ///
    /// # Errors
    /// When what it begins with cannot be opened, or was handed over and is something else.
    pub(super) fn of(plan: &Plan) -> Result<Self, HostError> {
        let host = HostFunctions::here();
        let functions = functions(plan);
        let means = match host.way(functions.iter().copied()) {
            Way::Iommufd => {
                tracing::info!(
                    node = iommufd::NODE,
                    "functions of the host are opened by their own nodes"
                );
                Means::Iommufd(match plan.iommufd {
                    Some(number) => handed_iommufd(&host, number)?,
                    None => Iommufd::open()?,
                })
            }
            Way::Groups => {
                tracing::info!(
                    node = container::NODE,
                    "functions of the host are opened by their IOMMU groups: the host has no iommufd for them"
                );
                Means::Groups {
                    container: Container::open()?,
                    open: BTreeMap::new(),
                    groups: Arc::default(),
                }
            }
        };
        Ok(Self {
            host,
            descriptors: descriptors(plan).collect(),
            means,
        })
    }

    /// Where their address spaces are made.
    pub(super) fn requests(&self) -> Arc<dyn Requests> {
        match &self.means {
            Means::Iommufd(iommufd) => iommufd.clone(),
            Means::Groups { container, .. } => container.clone(),
        }
    }

    /// Whom units of the host's are asked of; `None` where the host has no iommufd for its functions.
    pub(super) fn kernel(&self) -> Option<Arc<dyn Kernel>> {
        match &self.means {
            Means::Iommufd(iommufd) => Some(iommufd.clone()),
            Means::Groups { .. } => None,
        }
    }

    /// Whose functions they are.
    pub(super) fn host(&self) -> &HostFunctions {
        &self.host
    }

    /// Open the function at `at`.
    ///
    /// # Errors
    /// What the host refused, or that what was handed over is not this function.
    pub(super) fn open(&mut self, at: Sbdf) -> Result<Cdev, HostError> {
        match &mut self.means {
            Means::Iommufd(iommufd) => match self.descriptors.get(&at) {
                Some(number) => Cdev::of_descriptor(at, handed_function(&self.host, at, *number)?, iommufd),
                None => open_node(&self.host, at, iommufd),
            },
            Means::Groups {
                container,
                open,
                groups,
            } => {
                let group = match open.entry(self.host.group_node(at).ok_or_else(|| no_node(at))?) {
                    Entry::Occupied(open) => open.into_mut(),
                    Entry::Vacant(new) => {
                        let in_the_way = || self.host.in_the_way(at);
                        let group = Group::open(new.key(), container, groups, in_the_way)?;
                        new.insert(group)
                    }
                };
                Cdev::of_group(at, group)
            }
        }
    }
}

/// The function at `at` of `host` by its own node, bound to `iommufd`.
///
/// # Errors
/// When it has no node, or for what the host refused.
pub(super) fn open_node(host: &HostFunctions, at: Sbdf, iommufd: &Arc<Iommufd>) -> Result<Cdev, HostError> {
    Cdev::open(at, &host.node(at).ok_or_else(|| no_node(at))?, iommufd)
}

fn no_node(at: Sbdf) -> HostError {
    let action = format!("find the VFIO node of {at}; is it bound to vfio-pci?");
    HostError::new(action, io::ErrorKind::NotFound)
}

/// The functions of the host in `plan`, and what of each was handed over.
fn functions(plan: &Plan) -> Vec<(Sbdf, Handed)> {
    let iommufd = plan.iommufd.is_some();
    let devices = plan.devices.iter();
    let functions = devices.filter_map(|device| match &device.kind {
        DeviceKind::Vfio(vfio) => {
            let node = vfio.fd.is_some();
            Some((vfio.host, Handed { iommufd, node }))
        }
        _ => None,
    });
    functions.collect()
}

fn descriptors(plan: &Plan) -> impl Iterator<Item = (Sbdf, i32)> {
    plan.devices.iter().filter_map(|device| match &device.kind {
        DeviceKind::Vfio(vfio) => Some((vfio.host, vfio.fd?)),
        _ => None,
    })
}

/// Descriptor `number` as the open /dev/iommu that it is.
fn handed_iommufd(host: &HostFunctions, number: i32) -> Result<Arc<Iommufd>, HostError> {
    let file = File::from(inherited(iommufd::NODE, number)?);
    let device = host.device_of(&file);
    if device.as_ref().is_some_and(|path| path.ends_with("misc/iommu")) {
        return Ok(Iommufd::of_descriptor(file));
    }
    let action = format!("use the descriptor {number} as {}", iommufd::NODE);
    Err(HostError::new(action, not_it(device)))
}

/// Descriptor `number` as the open VFIO device of the function at `at` that it is.
fn handed_function(host: &HostFunctions, at: Sbdf, number: i32) -> Result<File, HostError> {
    let file = File::from(inherited(&at.to_string(), number)?);
    let device = host.device_of(&file);
    if device.as_deref().and_then(function_of) == Some(at) {
        return Ok(file);
    }
    let action = format!("use the descriptor {number} as the VFIO device of {at}");
    Err(HostError::new(action, not_it(device)))
}

/// The function whose VFIO device this folder of sysfs is: FUNCTION/vfio-dev/NAME.
fn function_of(device: &std::path::Path) -> Option<Sbdf> {
    let mut parts = device.iter().rev().skip(1);
    if parts.next()? != "vfio-dev" {
        return None;
    }
    parts.next()?.to_str()?.parse().ok()
}

fn not_it(device: Option<PathBuf>) -> io::Error {
    io::Error::other(match device {
        Some(path) => format!("it is that of the device {}", path.display()),
        None => "it is that of no device".to_owned(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::fd::AsRawFd;
    use std::path::Path;

    #[test]
    fn a_vfio_device_is_its_functions_by_its_place_in_sysfs() {
        let of = |path| function_of(Path::new(path));
        let at = "0000:41:00.0".parse().ok();
        assert_eq!(
            of("../../devices/pci0000:40/0000:40:01.1/0000:41:00.0/vfio-dev/vfio3"),
            at
        );
        assert_eq!(of("../../devices/virtual/misc/iommu"), None);
        assert_eq!(of("../../devices/pci0000:40/0000:41:00.0/net/eth0"), None);
        assert_eq!(of("vfio-dev/vfio0"), None);
        assert_eq!(of(""), None);
    }

    #[test]
    fn a_descriptor_of_something_else_is_refused_with_what_it_is() {
        let host = HostFunctions::here();
        let at: Sbdf = "41:00.0".parse().expect("valid");
        let null = File::open("/dev/null").expect("there");
        let error = handed_function(&host, at, null.as_raw_fd()).expect_err("no function");
        let number = null.as_raw_fd();
        assert_eq!(
            error.to_string(),
            format!("cannot use the descriptor {number} as the VFIO device of 0000:41:00.0")
        );
        assert!(
            error.source.to_string().ends_with("/mem/null"),
            "{}",
            error.source
        );
        let error = handed_iommufd(&host, number).err().expect("no iommufd");
        assert_eq!(
            error.to_string(),
            format!("cannot use the descriptor {number} as /dev/iommu")
        );
        let file = tempfile::tempfile().expect("a file");
        let error = handed_iommufd(&host, file.as_raw_fd()).err().expect("no device");
        assert_eq!(error.source.to_string(), "it is that of no device");
    }

    #[test]
    fn a_descriptor_that_is_not_open_is_refused_by_number() {
        let at: Sbdf = "41:00.0".parse().expect("valid");
        let error = handed_function(&HostFunctions::here(), at, 9999).expect_err("not open");
        assert_eq!(
            error.to_string(),
            "cannot take the inherited descriptor 9999 for 0000:41:00.0"
        );
    }
}
