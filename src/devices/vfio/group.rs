//! An IOMMU group of the host by its own node, as kernels without iommufd give functions out.
//!
//! Documentation/driver-api/vfio.rst. A group is open once, for all of its functions, and belongs to one container. Whoever
//! resets functions together shows that they are theirs by the groups they are in.

use std::collections::BTreeMap;
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};

use vfio_bindings::bindings::vfio as abi;

use super::uapi::{self, Request};
use crate::iommu::container::Container;
use crate::platform::addr::Sbdf;
use crate::platform::host::HostError;

/// What is asked of a group's node.
trait Node: Send + Sync {
    /// VFIO_GROUP_GET_STATUS: its flags.
    fn status(&self) -> io::Result<u32>;

    /// VFIO_GROUP_SET_CONTAINER, and the container's driver with the first group of all.
    fn join(&self, container: &Container) -> io::Result<()>;

    /// VFIO_GROUP_GET_DEVICE_FD.
    fn device(&self, name: &str) -> io::Result<File>;

    /// The descriptor by which the kernel knows that it is ours.
    fn descriptor(&self) -> BorrowedFd<'_>;
}

impl Node for File {
    fn status(&self) -> io::Result<u32> {
        let mut status = [0, 0];
        uapi::issue(self, Request::GetGroupStatus, &mut status)?;
        let [_, flags] = status;
        Ok(flags)
    }

    fn join(&self, container: &Container) -> io::Result<()> {
        uapi::set_container(self, container.as_fd())?;
        container.translate()
    }

    fn device(&self, name: &str) -> io::Result<File> {
        uapi::group_device(self, name)
    }

    fn descriptor(&self) -> BorrowedFd<'_> {
        self.as_fd()
    }
}

/// The groups that one machine has, by the kernel's numbers.
#[derive(Default)]
pub struct Groups(Mutex<BTreeMap<u32, Weak<Group>>>);

impl Groups {
    fn open(&self) -> MutexGuard<'_, BTreeMap<u32, Weak<Group>>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The group with this number, if the machine has it.
    pub(super) fn group(&self, number: u32) -> Option<Arc<Group>> {
        self.open().get(&number)?.upgrade()
    }
}

/// An open group, in a container.
pub struct Group {
    file: Box<dyn Node>,
    /// As messages name it: its node.
    node: String,
    /// All that the machine has, this one among them.
    groups: Arc<Groups>,
    /// Closed after the group.
    _container: Arc<Container>,
}

impl Group {
    /// Open the group with this node and put it into `container`, which translates for it from here on; it is one of
    /// `groups` then. `in_the_way` tells which of its functions have drivers that keep them.
    ///
    /// # Errors
    /// What the host refused, and what to do about it. `InvalidInput` as the reason where some function of the group has a
    /// driver that keeps it from being given away: which, and what has it.
    pub fn open(
        node: &Path,
        container: &Arc<Container>,
        groups: &Arc<Groups>,
        in_the_way: impl FnOnce() -> Vec<String>,
    ) -> Result<Arc<Self>, HostError> {
        let file = File::options().read(true).write(true).open(node);
        let file = file.map_err(|source| {
            let what = match source.kind() {
                io::ErrorKind::NotFound => "; is any of its functions bound to vfio-pci?",
                io::ErrorKind::PermissionDenied => "; it belongs to root unless a udev rule says otherwise",
                io::ErrorKind::ResourceBusy => "; another process has a function of the group",
                _ => "",
            };
            HostError::new(format!("open {}{what}", node.display()), source)
        })?;
        Self::taken(Box::new(file), node, container, groups, in_the_way)
    }

    /// The same of an open node.
    fn taken(
        file: Box<dyn Node>,
        path: &Path,
        container: &Arc<Container>,
        groups: &Arc<Groups>,
        in_the_way: impl FnOnce() -> Vec<String>,
    ) -> Result<Arc<Self>, HostError> {
        let node = path.display().to_string();
        let flags = file
            .status()
            .map_err(|source| HostError::new(format!("ask {node} for its state"), source))?;
        if flags & abi::VFIO_GROUP_FLAGS_VIABLE == 0 {
            let mut names = in_the_way();
            if names.is_empty() {
                names.push("another process may have a function of it by /dev/iommu".to_owned());
            }
            let source = io::Error::new(io::ErrorKind::InvalidInput, names.join("; "));
            let action = format!("use {node}, whose functions can only be given away together");
            return Err(HostError::new(action, source));
        }
        file.join(container).map_err(|source| {
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
        let group = Arc::new(Self {
            file,
            node,
            groups: groups.clone(),
            _container: container.clone(),
        });
        // The kernel calls nodes by the numbers, which it says nowhere else.
        let name = path.file_name().and_then(|name| name.to_str());
        if let Some(number) = name.and_then(|name| name.parse().ok()) {
            groups.open().insert(number, Arc::downgrade(&group));
        }
        Ok(group)
    }

    /// Open the group's function at `at`.
    pub(super) fn device(&self, at: Sbdf) -> Result<File, HostError> {
        self.file.device(&at.to_string()).map_err(|source| {
            let what = match source.raw_os_error() {
                Some(libc::ENODEV) => "; is it bound to vfio-pci?",
                Some(libc::EBUSY) => "; another process may have it",
                _ => "",
            };
            HostError::new(format!("open {at} by {}{what}", self.node), source)
        })
    }

    /// All that its machine has.
    pub(super) const fn groups(&self) -> &Arc<Groups> {
        &self.groups
    }

    /// The descriptor by which the kernel knows that it is the machine's.
    pub(super) fn descriptor(&self) -> BorrowedFd<'_> {
        self.file.descriptor()
    }
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;

    /// A group's node that is none, and answers what the test chooses.
    struct Answers {
        file: File,
        flags: u32,
        /// Refused: the state, the container, a device.
        refused: [Option<i32>; 3],
    }

    impl Answers {
        fn viable() -> Self {
            Self {
                file: tempfile::tempfile().expect("a file"),
                flags: abi::VFIO_GROUP_FLAGS_VIABLE,
                refused: [None; 3],
            }
        }

        fn refusing(number: usize, errno: i32) -> Self {
            let mut answers = Self::viable();
            answers.refused[number] = Some(errno);
            answers
        }

        fn answer(&self, number: usize) -> io::Result<()> {
            self.refused[number].map_or(Ok(()), |errno| Err(io::Error::from_raw_os_error(errno)))
        }
    }

    impl Node for Answers {
        fn status(&self) -> io::Result<u32> {
            self.answer(0).map(|()| self.flags)
        }

        fn join(&self, _container: &Container) -> io::Result<()> {
            self.answer(1)
        }

        fn device(&self, _name: &str) -> io::Result<File> {
            self.answer(2)?;
            self.file.try_clone()
        }

        fn descriptor(&self) -> BorrowedFd<'_> {
            self.file.as_fd()
        }
    }

    fn container() -> Arc<Container> {
        Arc::new(Container::of(tempfile::tempfile().expect("a file")))
    }

    fn nobody() -> Vec<String> {
        Vec::new()
    }

    fn at() -> Sbdf {
        "41:00.0".parse().expect("valid")
    }

    fn take(answers: Answers, groups: &Arc<Groups>) -> Result<Arc<Group>, HostError> {
        let node = Path::new("/dev/vfio/12");
        Group::taken(Box::new(answers), node, &container(), groups, nobody)
    }

    /// A group that a machine has by this node, one of `groups`.
    pub(in super::super) fn taken(node: &str, groups: &Arc<Groups>) -> Arc<Group> {
        let answers = Box::new(Answers::viable());
        Group::taken(answers, Path::new(node), &container(), groups, nobody).expect("taken")
    }

    #[test]
    fn a_group_that_is_not_there_is_named_with_what_makes_it() {
        let error = Group::open(
            Path::new("/nonexistent/12"),
            &container(),
            &Arc::default(),
            nobody,
        );
        assert_eq!(
            error.err().expect("absent").to_string(),
            "cannot open /nonexistent/12; is any of its functions bound to vfio-pci?"
        );
    }

    #[test]
    fn a_file_that_is_no_group_is_refused_before_it_is_given_anything() {
        let file = tempfile::NamedTempFile::new().expect("a file");
        let error = Group::open(file.path(), &container(), &Arc::default(), nobody);
        let error = error.err().expect("no group");
        assert!(error.to_string().ends_with(" for its state"), "{error}");
        assert_eq!(error.source.raw_os_error(), Some(libc::ENOTTY));
        let file = tempfile::tempfile().expect("a file");
        let joined = Node::join(&file, &container()).expect_err("no group");
        assert_eq!(joined.raw_os_error(), Some(libc::ENOTTY));
    }

    #[test]
    fn a_group_that_is_not_viable_is_refused_with_the_functions_in_the_way_and_what_has_them() {
        let refused = |in_the_way: Vec<String>| {
            let answers = Answers {
                flags: 0,
                ..Answers::viable()
            };
            let (node, groups) = (Path::new("/dev/vfio/12"), Arc::new(Groups::default()));
            let error = Group::taken(Box::new(answers), node, &container(), &groups, || in_the_way)
                .err()
                .expect("not viable");
            assert!(groups.group(12).is_none());
            assert_eq!(
                error.to_string(),
                "cannot use /dev/vfio/12, whose functions can only be given away together"
            );
            error.source
        };
        let two = ["0000:41:00.1: the driver igb has it", "0000:41:00.2: another"];
        assert_eq!(
            refused(two.map(str::to_owned).to_vec()).to_string(),
            two.join("; ")
        );
        let unknown = refused(Vec::new());
        assert_eq!(unknown.kind(), io::ErrorKind::InvalidInput);
        assert!(
            unknown
                .to_string()
                .contains("another process may have a function"),
            "{unknown}"
        );
    }

    #[test]
    fn each_request_that_the_host_refuses_is_told_with_what_may_help() {
        let cases = [
            (0, libc::EIO, "ask /dev/vfio/12 for its state"),
            (1, libc::EPERM, "vfio_iommu_type1.allow_unsafe_interrupts=1"),
            (
                1,
                libc::EBUSY,
                "put /dev/vfio/12 into a container; another process may have it",
            ),
            (1, libc::ENOMEM, "put /dev/vfio/12 into a container"),
        ];
        for (number, errno, expected) in cases {
            let groups = Arc::default();
            let error = take(Answers::refusing(number, errno), &groups)
                .err()
                .expect("refused");
            assert!(error.to_string().contains(expected), "{error}");
            assert_eq!(error.source.raw_os_error(), Some(errno));
            assert!(groups.group(12).is_none());
        }
        let cases = [
            (
                libc::ENODEV,
                "cannot open 0000:41:00.0 by /dev/vfio/12; is it bound to vfio-pci?",
            ),
            (
                libc::EBUSY,
                "cannot open 0000:41:00.0 by /dev/vfio/12; another process may have it",
            ),
            (libc::EIO, "cannot open 0000:41:00.0 by /dev/vfio/12"),
        ];
        for (errno, expected) in cases {
            let group = take(Answers::refusing(2, errno), &Arc::default()).expect("taken");
            assert_eq!(group.device(at()).expect_err("refused").to_string(), expected);
        }
    }

    #[test]
    fn a_machine_has_a_group_by_its_number_while_it_is_open() {
        let groups = Arc::new(Groups::default());
        let group = taken("/dev/vfio/12", &groups);
        group.device(at()).expect("opened");
        assert!(groups.group(12).is_some_and(|found| Arc::ptr_eq(&found, &group)));
        assert!(groups.group(13).is_none());
        // One of a function that nothing confines has no such number.
        let _other = taken("/dev/vfio/noiommu-13", &groups);
        assert!(groups.group(13).is_none());
        drop(group);
        assert!(groups.group(12).is_none());
    }
}
