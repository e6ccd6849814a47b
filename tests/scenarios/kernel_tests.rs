//! The kernel's own tests of VFIO and of PCI endpoints, in guests: what drivers of device assignment rely on, said by
//! those who wrote them.
//!
//! The programs are built by `scripts/lab setup --kernel`, from the source of the lab's kernel.

use std::time::Duration;

use crate::given::Given;
use crate::machine::{Ended, Machine};
use crate::nested_vfio::TO_VFIO;

/// `kernel_test NAME WORDS...`: run it, and leave what it says as a section of that name.
const KERNEL_TEST: &str = r#"
kernel_test() {
    "$@" >"/tmp/$1" 2>&1
    say "status_$1" $?
    section "$1" <"/tmp/$1"
}
"#;

/// What a test counted in its last line.
#[derive(Debug, PartialEq, Eq)]
struct Totals {
    pass: u32,
    fail: u32,
    skip: u32,
    error: u32,
}

impl Totals {
    /// Of `# Totals: pass:12 fail:0 xfail:0 xpass:0 skip:2 error:0`.
    fn of(text: &str) -> Option<Self> {
        let line = text
            .lines()
            .rev()
            .find_map(|line| line.trim().strip_prefix("# Totals: "))?;
        let count = |name: &str| {
            let mut counts = line.split(' ').filter_map(|word| word.split_once(':'));
            counts.find(|(key, _)| *key == name)?.1.parse().ok()
        };
        Some(Self {
            pass: count("pass")?,
            fail: count("fail")?,
            skip: count("skip")?,
            error: count("error")?,
        })
    }
}

#[test]
fn totals_are_read_from_the_last_line_that_has_them() {
    let text = "ok 1 a\n# Totals: pass:1 fail:0 xfail:0 xpass:0 skip:0 error:0\n\
                # 1 skipped\n# Totals: pass:12 fail:3 xfail:0 xpass:0 skip:2 error:4\r\n";
    let totals = Totals {
        pass: 12,
        fail: 3,
        skip: 2,
        error: 4,
    };
    assert_eq!(Totals::of(text), Some(totals));
    assert_eq!(Totals::of("ok 1 a\n"), None, "a test that died says no totals");
    assert_eq!(Totals::of("# Totals: pass:many fail:0"), None);
}

/// `test` ran in the guest to its end: nothing failed, and at least `least` of it passed.
fn passed(ended: &Ended, test: &str, least: u32) {
    let said = ended.console.section(test);
    let totals = Totals::of(&said).unwrap_or_else(|| panic!("{test} said no totals:\n{said}"));
    assert!(
        totals.fail == 0 && totals.error == 0 && totals.pass >= least,
        "{test}: {totals:?}, at least {least} were to pass:\n{said}"
    );
    assert_eq!(ended.console.said(&format!("status_{test}")), "0", "{said}");
}

/// Run `script` in a guest of the lab's kernel that has the tests, with huge pages for those that want some.
fn guest(arguments: &[&str], tests: &[&str], script: &str) -> Ended {
    let machine = Machine::new("lab")
        .deadline(Duration::from_secs(400))
        .arguments(["--cpus", "2", "--memory", "512M"])
        .arguments(arguments);
    tests
        .iter()
        .fold(machine, |machine, test| machine.kernel_test(test))
        .script(&format!(
            "{TO_VFIO}{KERNEL_TEST}\necho 16 >/proc/sys/vm/nr_hugepages\n{script}"
        ))
        .run()
        .well()
}

const OF_A_FUNCTION: [&str; 3] = [
    "vfio_dma_mapping_test",
    "vfio_iommufd_setup_test",
    "vfio_pci_device_test",
];

/// All tests of `OF_A_FUNCTION` on the function that the words in `find` print, which is behind an IOMMU of the guest.
fn pass_on_a_function(arguments: &[&str], find: &str) {
    let script = format!(
        "function=$({find})\ncheck binds to_vfio \"$function\"\n{}",
        OF_A_FUNCTION
            .map(|test| format!("kernel_test {test} \"$function\"\n"))
            .concat()
    );
    let ended = guest(arguments, &OF_A_FUNCTION, &script);
    // Five ways to an IOMMU: pages, huge pages, and three tests at the aperture's end. There are no pages of 1 GiB.
    passed(&ended, OF_A_FUNCTION[0], 20);
    passed(&ended, OF_A_FUNCTION[1], 6);
    passed(&ended, OF_A_FUNCTION[2], 3);
}

#[test]
fn the_kernels_vfio_tests_pass_on_a_device_behind_a_unit() {
    pass_on_a_function(
        &["--viommu", "emulated", "--root-port", "rp0", "--rng", "port=rp0"],
        r#"basename "$(dirname "$(readlink -f /sys/bus/virtio/drivers/virtio_rng/virtio*)")""#,
    );
}

#[test]
fn the_kernels_vfio_tests_pass_on_the_hosts_nic_behind_a_unit() {
    let nic = Given::nic();
    let function = format!("host={},port=rp0", nic.at);
    pass_on_a_function(
        &[
            "--viommu",
            "emulated",
            "--root-port",
            "rp0",
            "--vfio-device",
            &function,
        ],
        "basename \"$(ls -d /sys/bus/pci/drivers/e1000e/0*)\"",
    );
    nic.works_on_the_host();
}

#[test]
fn the_kernels_tests_of_endpoints_pass_on_the_test_device_behind_a_unit() {
    let test = "pci_endpoint_test";
    let arguments = [
        "--viommu",
        "emulated",
        "--root-port",
        "rp0",
        "--test-device",
        "port=rp0",
    ];
    let ended = guest(&arguments, &[test], &format!("kernel_test {test}"));
    passed(&ended, test, 19);
}
