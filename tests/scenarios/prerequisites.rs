//! What a scenario needs of the place it runs in. Each is looked up where it is used, and its absence fails
//! the scenario with a sentence that says what to do.

use std::env;
use std::path::PathBuf;

/// The `ravelin` binary under test.
pub(crate) fn binary() -> PathBuf {
    existing(named("RAVELIN_BIN", "the ravelin binary"))
}

/// A guest's kernel and initramfs.
pub(crate) struct GuestImage {
    pub(crate) kernel: PathBuf,
    pub(crate) initramfs: PathBuf,
}

/// The guest called `name`.
pub(crate) fn guest(name: &str) -> GuestImage {
    let folder = named("RAVELIN_GUESTS", "the folder of guests, as scripts/lab makes it").join(name);
    GuestImage {
        kernel: existing(folder.join("kernel")),
        initramfs: existing(folder.join("initramfs")),
    }
}

/// Fails unless this host's KVM runs Linux.
pub(crate) fn kvm() {
    let loaded = ["kvm_amd", "kvm_intel"]
        .iter()
        .any(|module| PathBuf::from("/sys/module").join(module).exists());
    assert!(
        loaded && PathBuf::from("/dev/kvm").exists(),
        "no KVM that runs Linux here (kvm_amd or kvm_intel with /dev/kvm); run `scripts/test lab`"
    );
}

fn named(variable: &str, what: &str) -> PathBuf {
    let value = env::var_os(variable);
    PathBuf::from(
        value.unwrap_or_else(|| panic!("{variable} is not set; it names {what} (see scripts/test)")),
    )
}

fn existing(path: PathBuf) -> PathBuf {
    assert!(path.exists(), "{} does not exist", path.display());
    path
}
