//! What the host refused: the error type for everything that is neither the guest's fault nor ours.

use std::io;

/// The host (kernel, file, device) refused an operation. The old state stays in force; the message says
/// what was being done and to what, the source says what the host answered.
#[derive(Debug, thiserror::Error)]
#[error("cannot {action}")]
pub struct HostError {
    /// What was being done, to what, with which value: "map 2 MiB of guest RAM at 0x100000".
    pub action: String,
    /// What the host answered.
    #[source]
    pub source: io::Error,
}

impl HostError {
    /// The host answered `source` to `action`.
    pub fn new(action: impl Into<String>, source: impl Into<io::Error>) -> Self {
        Self {
            action: action.into(),
            source: source.into(),
        }
    }
}

/// What the manual pages call error number `errno`; the number itself for one that is not met here.
#[must_use]
pub fn errno_name(errno: i32) -> String {
    let name = match errno {
        libc::EPERM => "EPERM",
        libc::ENOENT => "ENOENT",
        libc::EINTR => "EINTR",
        libc::EIO => "EIO",
        libc::ENXIO => "ENXIO",
        libc::E2BIG => "E2BIG",
        libc::EBADF => "EBADF",
        libc::EAGAIN => "EAGAIN",
        libc::ENOMEM => "ENOMEM",
        libc::EACCES => "EACCES",
        libc::EFAULT => "EFAULT",
        libc::EBUSY => "EBUSY",
        libc::EEXIST => "EEXIST",
        libc::EXDEV => "EXDEV",
        libc::ENODEV => "ENODEV",
        libc::EINVAL => "EINVAL",
        libc::ENFILE => "ENFILE",
        libc::EMFILE => "EMFILE",
        libc::ENOTTY => "ENOTTY",
        libc::ENOSPC => "ENOSPC",
        libc::ERANGE => "ERANGE",
        libc::ENOSYS => "ENOSYS",
        libc::EOVERFLOW => "EOVERFLOW",
        libc::EOPNOTSUPP => "EOPNOTSUPP",
        libc::EADDRINUSE => "EADDRINUSE",
        libc::ETIMEDOUT => "ETIMEDOUT",
        other => return format!("errno {other}"),
    };
    name.to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn errnos_have_names_or_are_numbers() {
        assert_eq!(errno_name(95), "EOPNOTSUPP");
        assert_eq!(errno_name(25), "ENOTTY");
        assert_eq!(errno_name(523), "errno 523");
    }
}
