//! Functions of the host that scenarios have, and the host as it was before.
//!
//! In the lab they are found by their drivers, as nobody else uses them. On any other host the operator names each by its
//! PCI address in a variable of the environment, and a scenario whose function nobody named fails before it touches anything.

use std::fs;
use std::io::Write;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

const BIND: &str = include_str!(concat!(env!("CARGO_MANIFEST_DIR"), "/scripts/bind-vfio"));
/// How long a host's driver may take to be there again.
const PATIENCE: Duration = Duration::from_secs(60);
/// Who answers on the networks of the lab's NICs.
pub(crate) const GATEWAY: &str = "10.0.2.2";
/// O_EXCL: of a block device that is mounted, or that something is made of, an open with it fails.
const EXCLUSIVE: i32 = 0o200;

/// A kind of function that scenarios have, one of them at a time.
pub(crate) struct Kind {
    /// What names it outside of the lab.
    variable: &'static str,
    what: &'static str,
    /// Who has it on the host.
    driver: &'static str,
    alone: Mutex<()>,
}

static NIC: Kind = Kind::new("RAVELIN_NIC", "a NIC that the host can do without", "e1000e");
static DISK: Kind = Kind::new("RAVELIN_DISK", "an NVMe disk whose content is lost", "nvme");
static SRIOV: Kind = Kind::new(
    "RAVELIN_SRIOV_NIC",
    "a NIC of which two virtual functions are on",
    "igb",
);
/// One at the end of a wire.
pub(crate) static WIRED: Kind = Kind::new(
    "RAVELIN_WIRED_NIC",
    "a NIC that is wired to another of this host",
    "e1000e",
);

/// Whether this is the lab, where every function is there to be tried.
pub(crate) fn in_the_lab() -> bool {
    std::env::var_os("RAVELIN_LAB").is_some()
}

/// What the operator set `variable` to.
pub(crate) fn said(variable: &str) -> Option<String> {
    std::env::var(variable).ok()
}

/// What was `said` by `variable`, which names `what`; nothing in the lab, where that may be found. An error is for the operator.
pub(crate) fn named(
    variable: &str,
    what: &str,
    said: Option<String>,
    in_the_lab: bool,
) -> Result<Option<String>, String> {
    match said {
        None if !in_the_lab => Err(format!("{variable} is not set; outside the lab it names {what}")),
        said => Ok(said),
    }
}

impl Kind {
    const fn new(variable: &'static str, what: &'static str, driver: &'static str) -> Self {
        Self {
            variable,
            what,
            driver,
            alone: Mutex::new(()),
        }
    }

    /// Have one alone: the one that was named, or in the lab what `found` tells.
    pub(crate) fn alone(&'static self, found: impl FnOnce() -> String) -> AtHost {
        let what = format!("{}, by its PCI address, like 0000:41:00.0", self.what);
        let named = named(self.variable, &what, said(self.variable), in_the_lab());
        let alone = self.alone.lock().unwrap_or_else(PoisonError::into_inner);
        let at = named
            .unwrap_or_else(|error| panic!("{error}"))
            .unwrap_or_else(found);
        let folder = PathBuf::from("/sys/bus/pci/devices").join(&at);
        assert!(
            at.matches(':').count() == 2 && folder.exists(),
            "{} is `{at}`, which is no function of this host; it names {what}",
            self.variable
        );
        let driver = fs::read_link(folder.join("driver")).unwrap_or_default();
        assert!(
            driver.ends_with(self.driver),
            "{} is {at}, which the driver `{}` has; scenarios know functions that {} has",
            self.variable,
            driver.file_name().unwrap_or_default().display(),
            self.driver
        );
        AtHost {
            at,
            driver: self.driver,
            share: None,
            alone: Some(alone),
        }
    }
}

#[test]
fn outside_the_lab_a_function_that_nobody_named_is_refused_by_its_variable() {
    let named = |said: Option<&str>, lab| named("RAVELIN_DISK", "a disk", said.map(str::to_owned), lab);
    let error = named(None, false).expect_err("it was not named");
    assert_eq!(error, "RAVELIN_DISK is not set; outside the lab it names a disk");
    assert_eq!(named(None, true), Ok(None));
    for lab in [false, true] {
        assert_eq!(
            named(Some("0000:41:00.0"), lab),
            Ok(Some("0000:41:00.0".to_owned()))
        );
    }
}

/// Runs `scripts/bind-vfio` with these arguments.
pub(crate) fn bind_vfio(arguments: &[&str]) {
    let mut bash = Command::new("bash")
        .args(["-s", "--"])
        .args(arguments)
        .stdin(Stdio::piped())
        .spawn()
        .expect("bash is there");
    let mut input = bash.stdin.take().expect("piped");
    input.write_all(BIND.as_bytes()).expect("bash reads its script");
    drop(input);
    let status = bash.wait().expect("our child");
    assert!(status.success(), "bind-vfio {arguments:?} (it needs root)");
}

/// The host's functions with this driver, ascending: one at least.
pub(crate) fn all_driven_by(driver: &str) -> Vec<String> {
    let folder = PathBuf::from("/sys/bus/pci/drivers").join(driver);
    let entries = fs::read_dir(&folder).unwrap_or_else(|error| panic!("{}: {error}", folder.display()));
    let names = entries.filter_map(|entry| entry.ok()?.file_name().into_string().ok());
    let mut found: Vec<String> = names.filter(|name| name.contains(':')).collect();
    found.sort();
    assert!(
        !found.is_empty(),
        "no function of this host has the driver {driver}; the lab has one"
    );
    found
}

/// Wait until `found` finds what `what` says.
fn wait_for<T>(what: &str, found: impl Fn() -> Option<T>) -> T {
    let until = Instant::now() + PATIENCE;
    loop {
        if let Some(found) = found() {
            return found;
        }
        assert!(Instant::now() < until, "{what} did not come");
        thread::sleep(Duration::from_millis(50));
    }
}

/// Names in a folder; none where there is no folder.
fn names(folder: &Path) -> Vec<String> {
    let entries = fs::read_dir(folder).into_iter().flatten().flatten();
    entries
        .filter_map(|entry| entry.file_name().into_string().ok())
        .collect()
}

/// What scenarios have of the host at the moment.
struct Shares {
    functions: usize,
    /// Pages that were pinned when there were none.
    pinned: u64,
}

static SHARES: Mutex<Shares> = Mutex::new(Shares {
    functions: 0,
    pinned: 0,
});

/// What the host's kernel counts as `name` in `file`.
fn counted(file: &str, name: &str) -> u64 {
    let text = fs::read_to_string(file).unwrap_or_else(|error| panic!("{file}: {error}"));
    let mut lines = text.lines().map(str::split_whitespace);
    let found =
        lines.find_map(|mut words| (words.next()?.trim_end_matches(':') == name).then(|| words.next())?);
    let found = found.unwrap_or_else(|| panic!("{file} has no {name}"));
    found.parse().unwrap_or_else(|error| panic!("{name}: {error}"))
}

/// Pages of the host that are pinned for devices.
fn pinned() -> u64 {
    let pins = |name| counted("/proc/vmstat", name);
    // Released first: what is pinned in between counts as pinned.
    let released = pins("nr_foll_pin_released");
    pins("nr_foll_pin_acquired").saturating_sub(released)
}

/// That a scenario has a function of the host.
struct Share;

impl Share {
    fn new() -> Self {
        let mut shares = SHARES.lock().unwrap_or_else(PoisonError::into_inner);
        if shares.functions == 0 {
            shares.pinned = pinned();
        }
        shares.functions += 1;
        Self
    }

    /// The function is the host's again, and its machine has ended: if it was the last, nothing is pinned that was not before.
    /// Beside another scenario's function nothing can be said; who gives that back looks. Nobody takes one meanwhile.
    fn end(self) {
        std::mem::forget(self);
        let mut shares = SHARES.lock().unwrap_or_else(PoisonError::into_inner);
        shares.functions -= 1;
        if shares.functions > 0 {
            return;
        }
        let before = shares.pinned;
        let until = Instant::now() + PATIENCE;
        while pinned() > before {
            assert!(
                Instant::now() < until,
                "{} pages are still pinned, {before} were before",
                pinned()
            );
            thread::sleep(Duration::from_millis(50));
        }
    }
}

impl Drop for Share {
    fn drop(&mut self) {
        SHARES.lock().unwrap_or_else(PoisonError::into_inner).functions -= 1;
    }
}

/// How the host's IOMMU treats a function.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Attached {
    /// The kind of domain of its group.
    group: String,
    /// Of its device table entry the flags that say that it and its tables are valid, and the domain; where the kernel shows it.
    entry: Option<(u64, u64)>,
}

impl Attached {
    fn of(at: &str) -> Self {
        let group = fs::read_to_string(format!("/sys/bus/pci/devices/{at}/iommu_group/type"));
        Self {
            group: group.expect("a group of its IOMMU").trim().to_owned(),
            entry: entry_of(at),
        }
    }
}

/// What the host's kernel shows of the device table entry of the function at `at`, if it is one that does.
fn entry_of(at: &str) -> Option<(u64, u64)> {
    /// The file that says whose entry is shown is one for all.
    static ASKED: Mutex<()> = Mutex::new(());
    let folder = Path::new("/sys/kernel/debug/iommu/amd");
    let _alone = ASKED.lock().unwrap_or_else(PoisonError::into_inner);
    if !folder.join("devtbl").exists() {
        return None;
    }
    fs::write(folder.join("devid"), at).unwrap_or_else(|error| panic!("devid of {at}: {error}"));
    let table = fs::read_to_string(folder.join("devtbl")).expect("a device table");
    Some(valid_and_domain(&table))
}

/// V, TV and the domain, of the table with one entry that the kernel prints: its words, the highest first.
fn valid_and_domain(table: &str) -> (u64, u64) {
    let row = table
        .lines()
        .nth(1)
        .unwrap_or_else(|| panic!("no entry in:\n{table}"));
    let words = row.split_whitespace().skip(1).take(4);
    let words: Vec<_> = words
        .map(|word| u64::from_str_radix(word, 16).expect("a word of the entry"))
        .collect();
    (words[3] & 3, words[2] & 0xffff)
}

#[test]
fn of_a_device_table_entry_the_validity_and_the_domain_are_read() {
    let table = "DeviceId             DTE[3]           DTE[2]           DTE[1]           DTE[0] iommu\n\
        0000:01:00.0 0000000000000000 1800000102a10001 0000000000000005 6000000102a9ae03 iommu00\n";
    assert_eq!(valid_and_domain(table), (3, 5));
}

/// A function that scenarios may have alone, and that its own driver has.
pub(crate) struct AtHost {
    pub(crate) at: String,
    driver: &'static str,
    /// Until its machine has ended.
    share: Option<Share>,
    alone: Option<MutexGuard<'static, ()>>,
}

impl AtHost {
    /// The host's NIC, once nobody else has it.
    pub(crate) fn nic() -> Self {
        NIC.alone(|| all_driven_by(NIC.driver).swap_remove(0))
    }

    /// The host's NVMe disk, once nobody else has it: not mounted, and nothing made of it.
    pub(crate) fn disk() -> Self {
        let disk = DISK.alone(|| all_driven_by(DISK.driver).swap_remove(0));
        let block = disk.block();
        let opened = fs::OpenOptions::new()
            .read(true)
            .custom_flags(EXCLUSIVE)
            .open(&block);
        opened.unwrap_or_else(|error| panic!("{} of {} is in use: {error}", block.display(), disk.at));
        disk
    }

    /// The host's NIC with virtual functions, once nobody else has it. Guests get those.
    pub(crate) fn sriov_nic() -> Self {
        SRIOV.alone(|| all_driven_by(SRIOV.driver).swap_remove(0))
    }

    /// Its virtual functions, in their order, all with this driver. One scenario has them together with this function.
    pub(crate) fn virtual_functions(&self, driver: &'static str) -> Vec<Self> {
        let folder = PathBuf::from("/sys/bus/pci/devices").join(&self.at);
        let links = (0..).map_while(|number| fs::read_link(folder.join(format!("virtfn{number}"))).ok());
        let functions: Vec<_> = links
            .map(|link| Self {
                at: link
                    .file_name()
                    .expect("an address")
                    .to_string_lossy()
                    .into_owned(),
                driver,
                share: None,
                alone: None,
            })
            .collect();
        functions.iter().for_each(Self::has_its_driver);
        functions
    }

    fn has_its_driver(&self) {
        let Self { at, driver, .. } = self;
        let bound = fs::read_link(format!("/sys/bus/pci/devices/{at}/driver")).unwrap_or_default();
        assert!(bound.ends_with(driver), "{at} has the driver {}", bound.display());
    }

    /// Have guests have it.
    pub(crate) fn give(self) -> Given {
        let share = Share::new();
        let before = Attached::of(&self.at);
        bind_vfio(&["bind", &self.at]);
        Given {
            at: self.at,
            driver: self.driver,
            before,
            held: Some((share, self.alone)),
        }
    }

    /// Its machine has ended: the host holds nothing for a guest.
    pub(crate) fn after_its_machine(mut self) -> Self {
        self.share.take().expect("it was a guest's").end();
        self
    }

    /// The NIC works: its link comes up, and where it is known who answers on its network, that one does.
    pub(crate) fn works(self) {
        let interface = Interface::of(&self.at);
        interface.up();
        if in_the_lab() {
            interface.address("add");
            interface.asks(GATEWAY);
            interface.address("del");
        }
        interface.down();
    }

    /// The NIC's link comes up; nobody is asked.
    pub(crate) fn has_a_link(&self) {
        let interface = Interface::of(&self.at);
        interface.up();
        interface.down();
    }

    /// The block device of the NVMe disk, found from the function, once it is there: the only one that it has.
    pub(crate) fn block(&self) -> PathBuf {
        let folder = PathBuf::from("/sys/bus/pci/devices").join(&self.at).join("nvme");
        let name = wait_for(&format!("the disk of {}", self.at), || {
            let controller = names(&folder).pop()?;
            let mut found = names(&folder.join(&controller));
            found.retain(|name| name.starts_with("nvme"));
            assert!(
                found.len() <= 1,
                "{} has several disks: {found:?}; scenarios want one with one",
                self.at
            );
            Some(disk_of_path(&found.pop()?))
        });
        let block = Path::new("/dev").join(name);
        wait_for(&block.display().to_string(), || block.exists().then_some(()));
        block
    }
}

/// The name of the disk that is reached by `path`: of a disk with several ways to it, each has the number of its controller.
fn disk_of_path(path: &str) -> String {
    let (subsystem, rest) = path.split_once('c').unwrap_or((path, ""));
    let namespace = rest.find('n').map_or("", |at| &rest[at..]);
    format!("{subsystem}{namespace}")
}

#[test]
fn a_disk_is_named_without_the_way_to_it() {
    assert_eq!(disk_of_path("nvme0n1"), "nvme0n1");
    assert_eq!(disk_of_path("nvme0c3n2"), "nvme0n2");
}

/// A function that guests can have; with its own driver again when it is dropped.
///
/// A scenario gives it back itself, by which the host is looked at: [`Given::back`], or [`Given::taken_back`] from a machine
/// that goes on.
pub(crate) struct Given {
    /// Its address on the host.
    pub(crate) at: String,
    driver: &'static str,
    before: Attached,
    /// Until it is given back; then the host's own driver is tried before anybody else has it.
    held: Option<(Share, Option<MutexGuard<'static, ()>>)>,
}

impl Given {
    /// The host's NIC, once nobody else has it.
    pub(crate) fn nic() -> Self {
        AtHost::nic().give()
    }

    /// The host's NVMe disk, once nobody else has it.
    pub(crate) fn disk() -> Self {
        AtHost::disk().give()
    }

    /// Give the NIC back and see that it works with its own driver.
    pub(crate) fn works_on_the_host(self) {
        self.back().works();
    }

    /// Give it back once its machine has ended; its own driver has it again, and the host holds nothing for a guest.
    pub(crate) fn back(self) -> AtHost {
        self.taken_back().after_its_machine()
    }

    /// Give it back, whatever its machine does; its own driver has it again, and the host's IOMMU treats it as before.
    pub(crate) fn taken_back(mut self) -> AtHost {
        let (share, alone) = self.held.take().expect("given back once");
        bind_vfio(&["unbind", &self.at]);
        let returned = AtHost {
            at: self.at.clone(),
            driver: self.driver,
            share: Some(share),
            alone,
        };
        returned.has_its_driver();
        let at = &self.at;
        assert_eq!(Attached::of(at), self.before, "{at}");
        let folder = PathBuf::from("/sys/bus/pci/devices").join(at);
        assert!(!folder.join("vfio-dev").exists(), "{at} is VFIO's still");
        let interrupts = fs::read_to_string("/proc/interrupts").expect("readable");
        let left = interrupts
            .lines()
            .find(|line| line.contains("vfio-") && line.contains(&format!("({at})")));
        assert_eq!(left, None, "an interrupt of {at} is a guest's still");
        returned
    }
}

impl Drop for Given {
    fn drop(&mut self) {
        if self.held.is_some() {
            bind_vfio(&["unbind", &self.at]);
            // What failed has said so; what succeeded is to have looked.
            assert!(
                thread::panicking(),
                "a scenario ended without giving {} back",
                self.at
            );
        }
    }
}

/// An interface of the host's.
pub(crate) struct Interface(String);

impl Interface {
    /// That of the function at `at`, once its driver has made it.
    pub(crate) fn of(at: &str) -> Self {
        let folder = PathBuf::from("/sys/bus/pci/devices").join(at).join("net");
        Self(wait_for(&format!("the interface of {at}"), || {
            names(&folder).pop()
        }))
    }

    /// What the host calls it.
    pub(crate) fn name(&self) -> &str {
        &self.0
    }

    /// Switch it on; it then says that its link is up.
    pub(crate) fn up(&self) {
        self.set(&["up"]);
        let carrier = format!("/sys/class/net/{}/carrier", self.0);
        wait_for(&format!("the link of {}", self.0), || {
            (fs::read_to_string(&carrier).ok()?.trim() == "1").then_some(())
        });
    }

    /// Switch it off.
    pub(crate) fn down(&self) {
        self.set(&["down"]);
    }

    /// Change something about it, in the words of `ip link set`.
    pub(crate) fn set(&self, words: &[&str]) {
        let mut ip = Command::new("ip");
        let status = ip.args(["link", "set", &self.0]).args(words).status();
        assert!(status.expect("ip is there").success(), "{} {words:?}", self.0);
    }

    /// Have it have an address of the network that the lab's NICs are on, or not: `add` or `del`.
    pub(crate) fn address(&self, action: &str) {
        let mut ip = Command::new("ip");
        let status = ip
            .args(["address", action, "10.0.2.15/24", "dev", &self.0])
            .status();
        assert!(status.expect("ip is there").success(), "{} {action}", self.0);
    }

    /// Somebody on its network answers.
    pub(crate) fn asks(&self, whom: &str) {
        let ping = ["-q", "-c", "3", "-i", "0.2", "-W", "10", "-I", &self.0, whom];
        let output = Command::new("ping").args(ping).output().expect("ping is there");
        assert!(
            output.status.success(),
            "{whom} does not answer {}: {}",
            self.0,
            String::from_utf8_lossy(&output.stdout)
        );
    }
}
