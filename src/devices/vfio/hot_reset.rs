//! Functions that the host can reset only together: all of a bus or slot.
//!
//! A function without a reset of its own is put back by a reset of its bus, which the host allows to whoever has all
//! functions there (VFIO_DEVICE_PCI_HOT_RESET). The guest resets them one by one, so each is silenced and waits; the reset
//! comes with the last of them. One that is used again in between has not been waiting: nothing is pulled from under
//! a driver.

use std::fs::File;
use std::io;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use vfio_bindings::bindings::vfio as abi;

use super::host::{Companion, HostFunction};
use super::uapi::{self, Request};
use crate::platform::addr::{Bdf, Sbdf};

/// Words of the structure before its list: argsz, flags, count.
const HEAD: usize = 3;
/// Functions of a bus.
const MOST: usize = 256;

/// The functions that a reset of the bus or slot of `device` concerns.
pub(super) fn companions(device: &File) -> io::Result<Vec<Companion>> {
    let mut words = vec![0; HEAD + 2 * MOST];
    uapi::issue(device, Request::GetHotResetInfo, &mut words)?;
    Ok(listed(&words))
}

/// Reset them. No group is named: whose they are, the kernel knows by the binding.
pub(super) fn reset(device: &File) -> io::Result<()> {
    uapi::issue(device, Request::HotReset, &mut [0; HEAD])
}

/// What a filled-in structure says: of each function what the binding calls it, then segment, number and bus.
fn listed(words: &[u32]) -> Vec<Companion> {
    let [_, flags, count, rest @ ..] = words else {
        return Vec::new();
    };
    // Else the first word is a group, of the older interface.
    let bound = flags & abi::VFIO_PCI_HOT_RESET_FLAG_DEV_ID != 0;
    let count = usize::try_from(*count).unwrap_or(usize::MAX);
    let (entries, _) = rest.as_chunks::<2>();
    let entry = |[id, at]: &[u32; 2]| {
        let [low, high, bus, device_function] = at.to_le_bytes();
        Companion {
            at: Sbdf {
                segment: u16::from_le_bytes([low, high]),
                bdf: Bdf::from_requester_id(u16::from_be_bytes([bus, device_function])),
            },
            ours: bound && *id != abi::VFIO_PCI_DEVID_NOT_OWNED.cast_unsigned(),
        }
    };
    entries.iter().take(count).map(entry).collect()
}

/// Functions of one machine that are reset together.
pub struct HotResetSet {
    /// How each of them stands to the reset.
    states: Mutex<Vec<State>>,
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
        if !states.iter().all(|state| *state == State::Waits) {
            return Ok(false);
        }
        host.hot_reset()?;
        states.fill(State::Reset);
        Ok(true)
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
        let found =
            |words: &[u32]| -> Vec<_> { listed(words).iter().map(|one| (one.at, one.ours)).collect() };
        let expected = [
            (at("0002:41:00.0"), true),
            (at("0002:41:00.1"), true),
            (at("0002:41:01.0"), false),
        ];
        assert_eq!(found(&words), expected);
        // Groups of the older interface prove nothing.
        words[1] = 0;
        assert!(listed(&words).iter().all(|one| !one.ours));
        words[2] = u32::MAX;
        assert_eq!(listed(&words).len(), 4);
        assert_eq!(found(&[0, 0]), []);
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
    }
}
