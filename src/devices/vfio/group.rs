//! An IOMMU group of the host by its own node, as kernels without iommufd give functions out.
//!
//! Documentation/driver-api/vfio.rst. A group is open once, for all of its functions, and belongs to one container.

use std::fs::File;
use std::io;
use std::os::fd::AsFd;
use std::path::Path;
use std::sync::Arc;

use vfio_bindings::bindings::vfio as abi;

use super::uapi::{self, Request};
use crate::iommu::container::Container;
use crate::platform::addr::Sbdf;
use crate::platform::host::HostError;

/// An open group, in a container.
pub struct Group {
    file: File,
    /// As messages name it: its node.
    node: String,
    /// Closed after the group.
    _container: Arc<Container>,
}

impl Group {
    /// Open the group with this node and put it into `container`, which translates for it from here on.
    ///
    /// # Errors
    /// What the host refused, and what to do about it. `InvalidInput` as the reason where some function of the group has a
    /// driver that keeps it from being given away.
    pub fn open(node: &Path, container: &Arc<Container>) -> Result<Arc<Self>, HostError> {
        let file = File::options().read(true).write(true).open(node);
        let node = node.display().to_string();
        let file = file.map_err(|source| {
            let what = match source.kind() {
                io::ErrorKind::NotFound => "; is any of its functions bound to vfio-pci?",
                io::ErrorKind::PermissionDenied => "; it belongs to root unless a udev rule says otherwise",
                io::ErrorKind::ResourceBusy => "; another process has a function of the group",
                _ => "",
            };
            HostError::new(format!("open {node}{what}"), source)
        })?;
        let mut status = [0, 0];
        uapi::issue(&file, Request::GetGroupStatus, &mut status)
            .map_err(|source| HostError::new(format!("ask {node} for its state"), source))?;
        let [_, flags] = status;
        if flags & abi::VFIO_GROUP_FLAGS_VIABLE == 0 {
            let source = io::Error::new(
                io::ErrorKind::InvalidInput,
                "a function of it is neither bound to vfio-pci nor without a driver",
            );
            return Err(HostError::new(format!("use {node}"), source));
        }
        let taken = uapi::set_container(&file, container.as_fd()).and_then(|()| container.translate());
        taken.map_err(|source| {
            let what = match source.raw_os_error() {
                Some(libc::EPERM) => {
                    "; does the host remap interrupts? Where it cannot, and whoever uses the guest is trusted, \
                     vfio_iommu_type1.allow_unsafe_interrupts=1 lets it"
                }
                Some(libc::EBUSY | libc::EINVAL) => "; another process may have it",
                _ => "",
            };
            HostError::new(format!("put {node} into a container{what}"), source)
        })?;
        Ok(Arc::new(Self {
            file,
            node,
            _container: container.clone(),
        }))
    }

    /// Open the group's function at `at`.
    pub(super) fn device(&self, at: Sbdf) -> Result<File, HostError> {
        uapi::group_device(&self.file, &at.to_string()).map_err(|source| {
            let what = match source.raw_os_error() {
                Some(libc::ENODEV) => "; is it bound to vfio-pci?",
                Some(libc::EBUSY) => "; another process may have it",
                _ => "",
            };
            HostError::new(format!("open {at} by {}{what}", self.node), source)
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn container() -> Arc<Container> {
        Arc::new(Container::of(tempfile::tempfile().expect("a file")))
    }

    #[test]
    fn a_group_that_is_not_there_is_named_with_what_makes_it() {
        let error = Group::open(Path::new("/nonexistent/12"), &container()).err();
        assert_eq!(
            error.expect("absent").to_string(),
            "cannot open /nonexistent/12; is any of its functions bound to vfio-pci?"
        );
    }

    #[test]
    fn a_file_that_is_no_group_is_refused_before_it_is_given_anything() {
        let file = tempfile::NamedTempFile::new().expect("a file");
        let error = Group::open(file.path(), &container()).err().expect("no group");
        assert!(error.to_string().ends_with(" for its state"), "{error}");
        assert_eq!(error.source.raw_os_error(), Some(libc::ENOTTY));
    }

    #[test]
    fn a_function_that_its_group_does_not_give_out_is_named() {
        let group = Group {
            file: tempfile::tempfile().expect("a file"),
            node: "/dev/vfio/12".to_owned(),
            _container: container(),
        };
        let error = group
            .device("41:00.0".parse().expect("valid"))
            .expect_err("no group");
        assert_eq!(error.to_string(), "cannot open 0000:41:00.0 by /dev/vfio/12");
    }
}
