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
