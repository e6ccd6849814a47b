//! Functions that the host can reset only together: all of a bus or slot.
//!
//! A function without a reset of its own is put back by a reset of its bus, which the host allows to whoever has all
//! functions there (VFIO_DEVICE_PCI_HOT_RESET): by their binding to one /dev/iommu, or by showing the groups they are in.
//! The guest resets them one by one, so each is silenced and waits; the reset comes with the last of them. One that is used
//! again in between has not been waiting: nothing is pulled from under a driver. One that left the guest is waited for no
//! more: whether the rest can be reset then is the host's to say.

use std::collections::BTreeMap;
use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use vfio_bindings::bindings::vfio as abi;

use super::group::{Group, Groups};
use super::host::{Companion, HostFunction};
use super::uapi::{self, Request};
use crate::platform::addr::{Bdf, Sbdf};

/// Words of the structure before its list: argsz, flags, count.
const HEAD: usize = 3;
/// Functions of a bus.
const MOST: usize = 256;

/// The functions that a reset of the bus or slot of `device` concerns, which is bound to /dev/iommu.
pub(super) fn companions(device: &File) -> io::Result<Vec<Companion>> {
    Ok(of_binding(&concerned(device)?))
}

/// The same of a device of a group, of a machine that has `groups`.
pub(super) fn companions_by_groups(device: &File, groups: &Groups) -> io::Result<Vec<Companion>> {
    Ok(of_groups(&concerned(device)?, groups))
}

/// Reset them. No group is named: whose they are, the kernel knows by the binding.
pub(super) fn reset(device: &File) -> io::Result<()> {
    uapi::issue(device, Request::HotReset, &mut [0; HEAD])
}

/// Reset those that a reset of `device` concerns, which are to be in `groups`.
///
/// # Errors
/// Which function is in none of them, before anything is reset; else the kernel's.
pub(super) fn reset_by_groups(device: &File, groups: &Groups) -> io::Result<()> {
    // Anew each time: functions come and go on a bus.
    let shown = shown(&concerned(device)?, groups)?;
    uapi::issue(device, Request::HotReset, &mut request(&shown)?)
}

/// A function as the kernel lists it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Listed {
    at: Sbdf,
    owner: Owner,
}

/// Whose a function is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Owner {
    /// By the binding of the device that was asked: its own, or not.
    Binding(bool),
    /// Who has this group.
    Group(u32),
}

fn concerned(device: &File) -> io::Result<Vec<Listed>> {
    let mut words = vec![0; HEAD + 2 * MOST];
    uapi::issue(device, Request::GetHotResetInfo, &mut words)?;
    Ok(listed(&words))
}

/// What a filled-in structure says: of each function what the binding calls it or which group it is in, then segment,
/// number and bus.
fn listed(words: &[u32]) -> Vec<Listed> {
    let [_, flags, count, rest @ ..] = words else {
        return Vec::new();
    };
    let bound = flags & abi::VFIO_PCI_HOT_RESET_FLAG_DEV_ID != 0;
    let count = usize::try_from(*count).unwrap_or(usize::MAX);
    let (entries, _) = rest.as_chunks::<2>();
    let entry = |[id, at]: &[u32; 2]| {
        let [low, high, bus, device_function] = at.to_le_bytes();
        Listed {
            at: Sbdf {
                segment: u16::from_le_bytes([low, high]),
                bdf: Bdf::from_requester_id(u16::from_be_bytes([bus, device_function])),
            },
            owner: if bound {
                Owner::Binding(*id != abi::VFIO_PCI_DEVID_NOT_OWNED.cast_unsigned())
            } else {
                Owner::Group(*id)
            },
        }
    };
    entries.iter().take(count).map(entry).collect()
}

/// Of a device that is bound, groups prove nothing.
fn of_binding(listed: &[Listed]) -> Vec<Companion> {
    let companion = |one: &Listed| Companion {
        at: one.at,
        ours: one.owner == Owner::Binding(true),
    };
    listed.iter().map(companion).collect()
}

/// Of a device of a group, bindings prove nothing.
fn of_groups(listed: &[Listed], groups: &Groups) -> Vec<Companion> {
    let companion = |one: &Listed| Companion {
        at: one.at,
        ours: matches!(one.owner, Owner::Group(number) if groups.group(number).is_some()),
    };
    listed.iter().map(companion).collect()
}

/// The groups that all of `listed` are in, each once.
fn shown(listed: &[Listed], groups: &Groups) -> io::Result<Vec<Arc<Group>>> {
    let mut shown: BTreeMap<u32, Arc<Group>> = BTreeMap::new();
    for Listed { at, owner } in listed {
        let Owner::Group(number) = *owner else {
            let reason = format!("the host does not tell which IOMMU group {at} is in");
            return Err(io::Error::other(reason));
        };
        let group = groups.group(number).ok_or_else(|| {
            io::Error::other(format!(
                "{at}, which would be reset as well, is in IOMMU group {number}, and this machine does not have that"
            ))
        })?;
        shown.insert(number, group);
    }
    Ok(shown.into_values().collect())
}

/// The structure of a reset that shows `groups`: argsz, flags, count, and their descriptors.
fn request(groups: &[Arc<Group>]) -> io::Result<Vec<u32>> {
    let mut words = vec![0, 0, u32::try_from(groups.len()).map_err(io::Error::other)?];
    let descriptor = |group: &Arc<Group>| group.descriptor().as_raw_fd().cast_unsigned();
    words.extend(groups.iter().map(descriptor));
    Ok(words)
}

/// Functions of one machine that are reset together.
pub struct HotResetSet {
    /// How each of them stands to the reset.
    states: Mutex<Vec<State>>,
    /// Of each, whether it has an error that only a reset ends.
    contained: Vec<Arc<AtomicBool>>,
}

/// How a function stands to the reset.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum State {
    /// It is used.
    Used,
    /// It waits for the reset.
    Waits,
    /// The reset has come, and it was not used since.
    Reset,
    /// The guest has it no more.
    Left,
}

/// One of them.
#[derive(Clone)]
pub struct HotResetMember {
    set: Arc<HotResetSet>,
    number: usize,
}

impl HotResetSet {
    /// A set of as many functions as there are members.
    #[must_use]
    pub fn of(functions: usize) -> Vec<HotResetMember> {
        let set = Arc::new(Self {
            states: Mutex::new(vec![State::Used; functions]),
            contained: std::iter::repeat_with(Arc::default).take(functions).collect(),
        });
        let member = |number| HotResetMember {
            set: set.clone(),
            number,
        };
        (0..functions).map(member).collect()
    }

    fn states(&self) -> MutexGuard<'_, Vec<State>> {
        self.states.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl HotResetMember {
    /// The function is silent and to be reset, which `host` does for all once all are. Whether it did.
    ///
    /// # Errors
    /// When the host refuses it; all go on waiting.
    pub(super) fn silenced(&self, host: &dyn HostFunction) -> io::Result<bool> {
        // Under the lock: none is used again while the reset is under way.
        let mut states = self.set.states();
        if let Some(state) = states.get_mut(self.number) {
            *state = State::Waits;
        }
        if !states
            .iter()
            .all(|state| matches!(state, State::Waits | State::Left))
        {
            return Ok(false);
        }
        host.hot_reset()?;
        for state in states.iter_mut().filter(|state| **state == State::Waits) {
            *state = State::Reset;
        }
        for contained in &self.set.contained {
            contained.store(false, Ordering::Release);
        }
        Ok(true)
    }

    /// Whether the function has an error that only a reset ends, which is over once the reset has come for all.
    pub(super) fn contained(&self) -> Arc<AtomicBool> {
        self.set.contained.get(self.number).cloned().unwrap_or_default()
    }

    /// The guest does not have the function any more.
    pub(super) fn left(&self) {
        if let Some(state) = self.set.states().get_mut(self.number) {
            *state = State::Left;
        }
    }

    /// The guest uses the function. Whether the reset came before that.
    pub(super) fn used(&self) -> bool {
        let mut states = self.set.states();
        let state = states.get_mut(self.number);
        state.is_some_and(|state| std::mem::replace(state, State::Used) == State::Reset)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::devices::vfio::group::tests::taken;
    use crate::devices::vfio::testing::{Asked, Device, Told};

    #[test]
    fn the_list_says_of_each_function_where_it_is_and_whose() {
        let bound = abi::VFIO_PCI_HOT_RESET_FLAG_DEV_ID;
        // Ours by binding, ours by group, somebody else's; the rest of the room is not theirs.
        let mut words = [
            0,
            bound,
            3,
            5,
            0x0041_0002,
            0,
            0x0141_0002,
            u32::MAX,
            0x0841_0002,
            9,
            9,
        ];
        let at = |text: &str| text.parse::<Sbdf>().expect("an address");
        let found = |words: &[u32]| -> Vec<_> {
            let companions = of_binding(&listed(words));
            companions.iter().map(|one| (one.at, one.ours)).collect()
        };
        let expected = [
            (at("0002:41:00.0"), true),
            (at("0002:41:00.1"), true),
            (at("0002:41:01.0"), false),
        ];
        assert_eq!(found(&words), expected);
        // Groups of the older interface prove nothing.
        words[1] = 0;
        assert!(of_binding(&listed(&words)).iter().all(|one| !one.ours));
        words[2] = u32::MAX;
        assert_eq!(listed(&words).len(), 4);
        assert_eq!(found(&[0, 0]), []);
    }

    /// Three functions of two groups, the first two of the same, as the kernel lists them.
    const IN_GROUPS: [u32; 9] = [0, 0, 3, 12, 0x0041_0000, 12, 0x0141_0000, 13, 0x0841_0000];

    #[test]
    fn functions_of_groups_are_ours_where_the_machine_has_all_of_their_groups() {
        let groups = Arc::new(Groups::default());
        let ours = |words: &[u32]| -> Vec<bool> {
            let companions = of_groups(&listed(words), &groups);
            companions.iter().map(|one| one.ours).collect()
        };
        let first = taken("/dev/vfio/12", &groups);
        assert_eq!(ours(&IN_GROUPS), [true, true, false]);
        let refused = |words: &[u32]| {
            let refused = shown(&listed(words), &groups).err().expect("refused");
            refused.to_string()
        };
        assert_eq!(
            refused(&IN_GROUPS),
            "0000:41:01.0, which would be reset as well, is in IOMMU group 13, and this machine does not have that"
        );
        let second = taken("/dev/vfio/13", &groups);
        assert_eq!(ours(&IN_GROUPS), [true; 3]);
        // Each group is shown once.
        let both = shown(&listed(&IN_GROUPS), &groups).expect("ours");
        let numbers = [&first, &second].map(|group| group.descriptor().as_raw_fd().cast_unsigned());
        assert_eq!(request(&both).expect("few"), [0, 0, 2, numbers[0], numbers[1]]);
        // What a binding is called is no group.
        let mut bound = IN_GROUPS;
        bound[1] = abi::VFIO_PCI_HOT_RESET_FLAG_DEV_ID;
        assert_eq!(ours(&bound), [false; 3]);
        assert!(refused(&bound).contains("does not tell which IOMMU group 0000:41:00.0 is in"));
        drop((both, first));
        assert_eq!(ours(&IN_GROUPS), [false, false, true]);
    }

    #[test]
    fn the_reset_comes_with_the_last_function_and_not_while_one_is_used() {
        let device = Device::nic();
        let members = HotResetSet::of(2);
        assert!(!members[0].silenced(&*device).expect("waits"));
        assert!(!members[0].used(), "it was not reset");
        assert!(!members[1].silenced(&*device).expect("waits"));
        assert_eq!(device.told(), []);
        assert!(members[0].silenced(&*device).expect("reset"));
        assert_eq!(device.told(), [Told::HotReset]);
        assert!(members[1].used() && !members[1].used());
        // Each has to be silenced anew.
        assert!(!members[0].silenced(&*device).expect("waits"));
    }

    #[test]
    fn a_reset_that_is_refused_is_asked_for_again() {
        let device = Device::nic();
        let members = HotResetSet::of(1);
        device.refuse(Asked::HotReset, libc::EBUSY);
        assert_eq!(
            members[0].silenced(&*device).expect_err("busy").raw_os_error(),
            Some(libc::EBUSY)
        );
        device.relent();
        assert!(members[0].silenced(&*device).expect("reset"));
    }

    #[test]
    fn a_function_that_left_is_waited_for_no_more_and_the_host_says_whether_the_rest_is_reset() {
        let device = Device::nic();
        let members = HotResetSet::of(3);
        members[2].left();
        assert!(!members[0].silenced(&*device).expect("waits"));
        device.refuse(Asked::HotReset, libc::EINVAL);
        assert!(members[1].silenced(&*device).is_err());
        device.relent();
        assert!(members[1].silenced(&*device).expect("reset"));
        assert!(members[0].used() && members[1].used());
        // The last that is left has nobody to wait for.
        members[0].left();
        assert!(members[1].silenced(&*device).expect("reset"));
        assert_eq!(device.told(), [Told::HotReset, Told::HotReset]);
    }

    #[test]
    fn a_file_that_is_no_device_has_no_companions() {
        let file = tempfile::tempfile().expect("a file");
        assert_eq!(
            companions(&file).expect_err("no device").raw_os_error(),
            Some(libc::ENOTTY)
        );
        assert_eq!(
            reset(&file).expect_err("no device").raw_os_error(),
            Some(libc::ENOTTY)
        );
        let groups = Groups::default();
        let enotty = Some(libc::ENOTTY);
        let refused = companions_by_groups(&file, &groups).expect_err("no device");
        assert_eq!(refused.raw_os_error(), enotty);
        let refused = reset_by_groups(&file, &groups).expect_err("no device");
        assert_eq!(refused.raw_os_error(), enotty);
    }
}
