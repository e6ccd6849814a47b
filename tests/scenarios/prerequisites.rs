//! What a scenario needs of the place it runs in. Each is looked up where it is used, and its absence fails
//! the scenario with a sentence that says what to do.

use std::env;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

/// The `ravelin` binary under test.
pub(crate) fn binary() -> PathBuf {
    existing(named("RAVELIN_BIN", "the ravelin binary"))
}

/// The crate's own test program.
pub(crate) fn by_hand() -> PathBuf {
    existing(named(
        "RAVELIN_BY_HAND",
        "the program of `cargo test --lib --no-run`",
    ))
}

/// A guest's kernel and initramfs.
pub(crate) struct GuestImage {
    pub(crate) kernel: PathBuf,
    pub(crate) initramfs: PathBuf,
}

/// The guest called `name`.
pub(crate) fn guest(name: &str) -> GuestImage {
    let folder = guests().join(name);
    GuestImage {
        kernel: existing(folder.join("kernel")),
        initramfs: existing(folder.join("initramfs")),
    }
}

/// A test of the kernel's, which needs no library.
pub(crate) fn kernel_test(name: &str) -> Vec<u8> {
    let path = guests().join("kernel-tests").join(name);
    fs::read(&path).unwrap_or_else(|error| {
        panic!(
            "{}: {error}; `scripts/lab setup --kernel` builds it",
            path.display()
        )
    })
}

/// The Xen hypervisor, a multiboot image.
pub(crate) fn xen() -> PathBuf {
    let path = guests().join("xen/xen");
    assert!(
        path.exists(),
        "there is no {}; `scripts/lab setup --kernel` fetches it",
        path.display()
    );
    path
}

fn guests() -> PathBuf {
    named("RAVELIN_GUESTS", "the folder of guests, as scripts/lab makes it")
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

/// What loads programs, on every x86-64 Linux with glibc.
const LOADER: &str = "/lib64/ld-linux-x86-64.so.2";

/// A program of this host and the libraries it loads, each with its path in a guest.
pub(crate) fn program_files(program: &Path) -> Vec<(String, Vec<u8>)> {
    let program = existing(program.to_owned());
    let listed = Command::new(LOADER)
        .arg("--list")
        .arg(&program)
        .output()
        .expect("this host's loader");
    assert!(
        listed.status.success(),
        "{} cannot be loaded here",
        program.display()
    );
    let listed = String::from_utf8(listed.stdout).expect("paths as text");
    let libraries = libraries(&listed).map(|path| ("lib/x86_64-linux-gnu", path));
    let files = [("bin", program.as_path()), ("lib64", Path::new(LOADER))]
        .into_iter()
        .chain(libraries);
    files
        .map(|(folder, path)| {
            let name = path.file_name().expect("a file").to_string_lossy();
            let content = fs::read(path).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
            (format!("{folder}/{name}"), content)
        })
        .collect()
}

/// The libraries that a loader lists for a program.
fn libraries(listed: &str) -> impl Iterator<Item = &Path> {
    let paths = listed.lines().filter_map(|line| line.split(" => ").nth(1));
    let paths = paths.filter_map(|found| found.split(" (").next().map(Path::new));
    paths.filter(|path| *path != Path::new(LOADER))
}

#[test]
fn libraries_are_what_the_loader_found_but_itself() {
    let listed = "\tlinux-vdso.so.1 (0x7ffe)\n\tlibm.so.6 => /lib/x86_64-linux-gnu/libm.so.6 (0x7f00)\n\
        \t/lib64/ld-linux-x86-64.so.2 => /lib64/ld-linux-x86-64.so.2 (0x7f10)\n\t/lib64/ld-linux-x86-64.so.2 (0x7f20)\n";
    let found: Vec<_> = libraries(listed).collect();
    assert_eq!(found, [Path::new("/lib/x86_64-linux-gnu/libm.so.6")]);
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
