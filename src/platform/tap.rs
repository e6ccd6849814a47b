//! Tap interfaces: Ethernet frames of a host interface as reads and writes of a descriptor.
//!
//! Each frame is preceded by a 12-byte virtio-net header (`virtio_net_hdr_v1`), by which checksums and
//! segmentation are left to whoever can do them best. Linux `Documentation/networking/tuntap.rst` and
//! `include/uapi/linux/if_tun.h`.

#![expect(
    unsafe_code,
    reason = "the tun driver is configured by ioctl requests, which no crate wraps"
)]

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};

use bitflags::bitflags;
use rustix::fs::{Mode, OFlags};
use vmm_sys_util::ioctl::{ioctl_with_mut_ref, ioctl_with_ref, ioctl_with_val};

use super::host::HostError;

/// The tun driver's request numbers.
mod request {
    use vmm_sys_util::{ioctl_ior_nr, ioctl_iow_nr};

    const TUN: u32 = b'T' as u32;

    ioctl_iow_nr!(TUNSETIFF, TUN, 202, libc::c_int);
    ioctl_iow_nr!(TUNSETOFFLOAD, TUN, 208, libc::c_uint);
    ioctl_ior_nr!(TUNGETIFF, TUN, 210, libc::c_uint);
    ioctl_iow_nr!(TUNSETVNETHDRSZ, TUN, 216, libc::c_int);
    ioctl_iow_nr!(TUNSETQUEUE, TUN, 217, libc::c_int);
}

use request::{TUNGETIFF, TUNSETIFF, TUNSETOFFLOAD, TUNSETQUEUE, TUNSETVNETHDRSZ};

/// Bytes before each frame: `struct virtio_net_hdr_v1`.
pub const HEADER_LEN: usize = 12;

/// Longest name of a network interface, in bytes.
pub const LONGEST_NAME: usize = libc::IFNAMSIZ - 1;

bitflags! {
    /// Work that whoever reads from the tap can do itself, so that the host does not: `TUN_F_*`.
    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    pub struct Offloads: u32 {
        /// Frames without a checksum.
        const CSUM = 0x01;
        /// TCP over IPv4 larger than a frame.
        const TSO4 = 0x02;
        /// TCP over IPv6 larger than a frame.
        const TSO6 = 0x04;
        /// TCP larger than a frame with ECN bits.
        const TSO_ECN = 0x08;
        /// UDP fragments of a datagram larger than a frame.
        const UFO = 0x10;
        /// Several UDP datagrams over IPv4 in one.
        const USO4 = 0x20;
        /// Several UDP datagrams over IPv6 in one.
        const USO6 = 0x40;
    }
}

/// The kernel's `struct ifreq` as the tun driver uses it.
#[repr(C)]
#[derive(Clone, Copy)]
struct InterfaceRequest {
    name: [u8; libc::IFNAMSIZ],
    flags: u16,
    rest: [u8; 22],
}

const _: () = assert!(size_of::<InterfaceRequest>() == size_of::<libc::ifreq>());

impl InterfaceRequest {
    fn new(name: &str, flags: u16) -> Self {
        let mut request = Self {
            name: [0; libc::IFNAMSIZ],
            flags,
            rest: [0; 22],
        };
        let bytes = name.as_bytes();
        request.name[..bytes.len()].copy_from_slice(bytes);
        request
    }

    fn name(&self) -> String {
        let end = self.name.iter().position(|byte| *byte == 0);
        String::from_utf8_lossy(&self.name[..end.unwrap_or(self.name.len())]).into_owned()
    }
}

const IFF_TAP: u16 = 0x0002;
const IFF_MULTI_QUEUE: u16 = 0x0100;
const IFF_ATTACH_QUEUE: u16 = 0x0200;
const IFF_DETACH_QUEUE: u16 = 0x0400;
const IFF_NO_PI: u16 = 0x1000;
const IFF_VNET_HDR: u16 = 0x4000;

/// One queue of a tap interface. Reads and writes do not block.
#[derive(Debug)]
pub struct Tap {
    fd: OwnedFd,
    name: String,
    several_queues: bool,
}

impl Tap {
    /// Open `queues` queues of the tap interface `name`, made if it does not exist and the caller may.
    ///
    /// An interface that exists must have been made with as many queues in mind (`multi_queue`) as asked for.
    pub fn open(name: &str, queues: u16) -> Result<Vec<Self>, HostError> {
        if name.is_empty() || name.len() > LONGEST_NAME || name.contains(['/', '\0', ' ']) {
            return Err(HostError::new(
                format!(
                    "use `{name}` as the name of a tap interface; a name has 1 to {LONGEST_NAME} \
                     characters without `/` and space"
                ),
                io::Error::from(io::ErrorKind::InvalidInput),
            ));
        }
        (0..queues.max(1))
            .map(|_| Self::open_queue(name, queues > 1))
            .collect()
    }

    fn open_queue(name: &str, several_queues: bool) -> Result<Self, HostError> {
        let path = "/dev/net/tun";
        let flags = OFlags::RDWR | OFlags::NONBLOCK | OFlags::CLOEXEC;
        let fd = rustix::fs::open(path, flags, Mode::empty())
            .map_err(|error| HostError::new(format!("open {path} for tap interface {name}"), error))?;
        let several = if several_queues { IFF_MULTI_QUEUE } else { 0 };
        let request = InterfaceRequest::new(name, IFF_TAP | IFF_NO_PI | IFF_VNET_HDR | several);
        // SAFETY: `request` is the `struct ifreq` that TUNSETIFF reads; `fd` is open.
        if unsafe { ioctl_with_ref(&fd, TUNSETIFF(), &request) } < 0 {
            let source = io::Error::last_os_error();
            let hint = match source.raw_os_error() {
                Some(libc::EPERM) => "; make it before with `ip tuntap add` and give it to this user",
                Some(libc::EINVAL) if several_queues => "; was it made with `multi_queue`?",
                Some(libc::EINVAL) => "; was it made without `multi_queue`?",
                Some(libc::EBUSY) => "; does another process have it?",
                _ => "",
            };
            return Err(HostError::new(
                format!("attach to tap interface {name}{hint}"),
                source,
            ));
        }
        Self::prepare(fd, name.to_owned(), several_queues)
    }

    /// Use a descriptor that somebody else opened and attached to a tap interface.
    ///
    /// It must be a tap (not tun) without packet information and with virtio-net headers, the flags
    /// `IFF_TAP | IFF_NO_PI | IFF_VNET_HDR`.
    pub fn from_fd(fd: OwnedFd) -> Result<Self, HostError> {
        let number = fd.as_raw_fd();
        let mut request = InterfaceRequest::new("", 0);
        // SAFETY: `request` is the `struct ifreq` that TUNGETIFF fills; `fd` is open.
        if unsafe { ioctl_with_mut_ref(&fd, TUNGETIFF(), &mut request) } < 0 {
            return Err(HostError::new(
                format!("use descriptor {number} as a tap interface"),
                io::Error::last_os_error(),
            ));
        }
        let needed = IFF_TAP | IFF_NO_PI | IFF_VNET_HDR;
        if request.flags & needed != needed {
            return Err(HostError::new(
                format!(
                    "use descriptor {number} with tun flags {:#x}; it needs {needed:#x} (tap, no packet \
                     information, virtio-net header)",
                    request.flags
                ),
                io::Error::from(io::ErrorKind::InvalidInput),
            ));
        }
        let nonblocking = rustix::fs::fcntl_getfl(&fd)
            .and_then(|flags| rustix::fs::fcntl_setfl(&fd, flags | OFlags::NONBLOCK));
        nonblocking
            .map_err(|error| HostError::new(format!("make descriptor {number} non-blocking"), error))?;
        Self::prepare(fd, request.name(), request.flags & IFF_MULTI_QUEUE != 0)
    }

    fn prepare(fd: OwnedFd, name: String, several_queues: bool) -> Result<Self, HostError> {
        let len = libc::c_int::try_from(HEADER_LEN).expect("a small number");
        // SAFETY: TUNSETVNETHDRSZ reads an int; `fd` is open.
        if unsafe { ioctl_with_ref(&fd, TUNSETVNETHDRSZ(), &len) } < 0 {
            return Err(HostError::new(
                format!("set the header of tap interface {name} to {HEADER_LEN} bytes"),
                io::Error::last_os_error(),
            ));
        }
        Ok(Self {
            fd,
            name,
            several_queues,
        })
    }

    /// Say which work the reader takes over from the host.
    pub fn set_offloads(&self, offloads: Offloads) -> Result<(), HostError> {
        // SAFETY: TUNSETOFFLOAD takes its argument by value; `self.fd` is open.
        if unsafe { ioctl_with_val(&self.fd, TUNSETOFFLOAD(), offloads.bits().into()) } < 0 {
            return Err(HostError::new(
                format!("set offloads {offloads:?} of tap interface {}", self.name),
                io::Error::last_os_error(),
            ));
        }
        Ok(())
    }

    /// The best offloads of `wanted` that the host's kernel knows; older ones lack USO, some lack UFO.
    #[must_use]
    pub fn supported_offloads(&self) -> Offloads {
        let tcp = Offloads::CSUM | Offloads::TSO4 | Offloads::TSO6 | Offloads::TSO_ECN;
        let udp = Offloads::USO4 | Offloads::USO6;
        let choices = [
            tcp | udp | Offloads::UFO,
            tcp | udp,
            tcp | Offloads::UFO,
            tcp,
            Offloads::CSUM,
        ];
        let best = choices.into_iter().find(|some| self.set_offloads(*some).is_ok());
        if let Err(error) = self.set_offloads(Offloads::empty()) {
            tracing::warn!(%error, "offloads of the tap stay on until the guest chooses");
        }
        best.unwrap_or(Offloads::empty())
    }

    /// Let the host deliver frames to this queue, or to the interface's other queues only. Nothing to do
    /// for an interface with one queue.
    pub fn set_attached(&self, attached: bool) -> Result<(), HostError> {
        if !self.several_queues {
            return Ok(());
        }
        let flags = if attached {
            IFF_ATTACH_QUEUE
        } else {
            IFF_DETACH_QUEUE
        };
        let request = InterfaceRequest::new("", flags);
        // SAFETY: `request` is the `struct ifreq` that TUNSETQUEUE reads; `self.fd` is open.
        if unsafe { ioctl_with_ref(&self.fd, TUNSETQUEUE(), &request) } < 0 {
            let source = io::Error::last_os_error();
            // Already in the state asked for.
            if source.raw_os_error() != Some(libc::EINVAL) {
                let verb = if attached { "attach" } else { "detach" };
                return Err(HostError::new(
                    format!("{verb} a queue of tap interface {}", self.name),
                    source,
                ));
            }
        }
        Ok(())
    }
}

impl AsFd for Tap {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn requests_have_the_numbers_of_the_kernel() {
        assert_eq!(TUNSETIFF(), 0x4004_54ca);
        assert_eq!(TUNSETOFFLOAD(), 0x4004_54d0);
        assert_eq!(TUNGETIFF(), 0x8004_54d2);
        assert_eq!(TUNSETVNETHDRSZ(), 0x4004_54d8);
        assert_eq!(TUNSETQUEUE(), 0x4004_54d9);
    }

    #[test]
    fn a_name_that_no_interface_can_have_is_refused_with_the_limit() {
        for name in ["", "sixteen-letters-", "a/b", "a b"] {
            let error = Tap::open(name, 1).expect_err(name).to_string();
            assert!(
                error.contains(&format!("`{name}`")) && error.contains("1 to 15"),
                "{error}"
            );
        }
    }

    #[test]
    fn a_descriptor_that_is_no_tap_is_refused_by_number() {
        let (pipe, _other_end) = rustix::pipe::pipe().expect("a pipe");
        let number = pipe.as_raw_fd();
        let error = Tap::from_fd(pipe).expect_err("a pipe is no tap").to_string();
        assert_eq!(
            error,
            format!("cannot use descriptor {number} as a tap interface")
        );
    }

    #[test]
    fn a_request_keeps_its_name() {
        assert_eq!(
            InterfaceRequest::new("tap-of-15-chars", 0).name(),
            "tap-of-15-chars"
        );
    }
}
