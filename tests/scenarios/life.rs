//! Reboots, buttons, panics: how machines end and what is left of them.

use std::time::Duration;

use crate::devices::DISK_TOOLS;
use crate::machine::{Held, INIT, Machine, REBOOT};
use crate::network::Bridge;

/// The exit status for a guest that was ended before it shut down.
const KILLED: i32 = 4;
/// The exit status for a guest that crashed or said that it panicked.
const GUEST_PANIC: i32 = 3;
/// How often the power button was pressed, as the guest's kernel counts.
const PRESSES: &str = r"presses() { awk '{ print $1 }' /sys/firmware/acpi/interrupts/ff_pwr_btn; }";
/// Nothing but the guest or a signal ends the machine.
const PATIENT: [&str; 2] = ["--shutdown-timeout", "3600"];
/// How often the machine below reboots.
const REBOOTS: usize = 20;

#[test]
fn twenty_reboots_leak_no_memory_descriptor_or_thread() {
    let machine = Machine::new("lab").deadline(Duration::from_secs(900));
    let disk = machine.disk("count.img", 4);
    // The count is on the disk, which thereby is proven to survive as well.
    let mut running = machine
        .arguments(["--disk".to_owned(), format!("path={}", disk.display())])
        .script(&format!(
            r#"
count=$(dd if=/dev/vda bs=512 count=1 2>/dev/null | tr -d '\0')
count=$((${{count:-0}} + 1))
printf %s "$count" >/tmp/count
truncate -s 512 /tmp/count
dd if=/tmp/count of=/dev/vda bs=512 conv=fsync 2>/dev/null
say boot "$count"
[ "$count" -gt {REBOOTS} ] || exit {REBOOT}
"#
        ))
        .start();
    let mut held: Vec<Held> = Vec::new();
    for boot in 1..=REBOOTS + 1 {
        running.wait_for(INIT, boot);
        held.push(running.held());
    }
    let ended = running.end().well();
    let counts: Vec<usize> = ended
        .console
        .said_each("boot")
        .iter()
        .map(|n| n.parse().expect("a number"))
        .collect();
    assert_eq!(counts, (1..=REBOOTS + 1).collect::<Vec<_>>());

    // The second boot is the measure: whatever is set up lazily has been by then.
    let (early, late) = (held[1], held[REBOOTS]);
    assert_eq!(
        (late.descriptors, late.threads),
        (early.descriptors, early.threads),
        "{held:?}"
    );
    let growth = late.anonymous.saturating_sub(early.anonymous);
    // Allocators round; 20 lost queues, device models or page tables would be more.
    assert!(
        growth < 512,
        "{growth} KiB more after {REBOOTS} reboots: {held:?}"
    );
}

/// Suspend to idle, with a disk, a NIC, an entropy source and a console, until the alarm of the board's clock.
///
/// Linux leaves the queues as they are and takes bus mastering away; frames that come in the sleep have to wait.
#[test]
fn a_guest_sleeps_until_its_clock_rings_and_goes_on_with_all_its_devices() {
    let bridge = Bridge::new("rvtest5", 1);
    bridge.address("10.9.5.1/24");
    let machine = Machine::new("debian-7.3").deadline(Duration::from_secs(300));
    let disk = format!("path={}", machine.disk("disk.img", 16).display());
    let ended = machine
        .arguments([
            "--cpus", "2", "--memory", "384M", "--disk", &disk, "--rng", "rng0",
        ])
        .arguments(["--console", "null", "--net", &format!("tap={}", bridge.tap(0))])
        .script(&format!(
            r#"{DISK_TOOLS}
nic=$(ls /sys/bus/virtio/drivers/virtio_net/virtio*/net | grep -v : | head -n 1)
ip addr add 10.9.5.2/24 dev "$nic"
ip link set "$nic" up
# works WHEN
works() {{
    check "disk_$1" round_trip "$1"
    check "host_answers_$1" ping -c 3 -w 60 10.9.5.1
    check "entropy_$1" test "$(dd if=/dev/hwrng bs=64 count=1 2>/dev/null | wc -c)" = 64
}}
works before
for turn in 1 2; do
    echo 0 >/sys/class/rtc/rtc0/wakealarm
    slept=$(cat /sys/power/suspend_stats/success)
    # Far enough away that it rings in the sleep, not on the way there, which would call that off.
    echo +15 >/sys/class/rtc/rtc0/wakealarm
    check "sleeps_$turn" sh -c 'echo freeze >/sys/power/state'
    check "slept_$turn" test "$(cat /sys/power/suspend_stats/success)" -gt "$slept"
    works "after_$turn"
done
check both_processors test "$(cat /sys/devices/system/cpu/online)" = 0-1
say failures "$(cat /sys/power/suspend_stats/fail)"
section wakeups </sys/kernel/debug/wakeup_sources
"#
        ))
        .run()
        .well();
    assert_eq!(ended.console.said("failures"), "0");
}

#[test]
fn sigterm_presses_the_power_button_and_the_guest_obeys() {
    let mut running = Machine::new("debian-7.3")
        .arguments(PATIENT)
        .script(&format!(
            r#"
{PRESSES}
say presses_before "$(presses)"
echo @@ready
waited=0
until [ "$(presses)" -gt 0 ] || [ $waited -gt 60 ]; do sleep 1; waited=$((waited + 1)); done
check pressed_once test "$(presses)" = 1
check sci_came grep -q '^ *9:.*acpi' /proc/interrupts
"#
        ))
        .start();
    running.wait_for("@@ready", 1);
    running.signal("TERM");
    let ended = running.end().well();
    assert_eq!(ended.console.said("presses_before"), "0");
}

#[test]
fn a_second_sigterm_ends_a_guest_that_does_not_obey() {
    let mut running = Machine::new("lab")
        .arguments(PATIENT)
        .script(&format!("{PRESSES}\necho @@ready; until [ $(presses) -gt 0 ]; do sleep 1; done; echo @@ignored; sleep 1000"))
        .start();
    running.wait_for("@@ready", 1);
    running.signal("TERM");
    running.wait_for("@@ignored", 1);
    running.signal("TERM");
    running.end().with(KILLED);
}

#[test]
fn a_panic_is_reported_by_the_exit_status() {
    let ended = Machine::new("lab")
        .cmdline("panic=0")
        .script("echo 1 >/proc/sys/kernel/sysrq; echo c >/proc/sysrq-trigger")
        .run();
    ended.with(GUEST_PANIC);
}
