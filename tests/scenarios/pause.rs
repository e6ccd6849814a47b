//! A guest that the operator pauses.

use std::time::Duration;

use crate::machine::Machine;

/// Longer than the guest's watchdog for stuck processors waits, as it is set below.
const PAUSE: Duration = Duration::from_secs(12);

/// Pause and resume, then the power button while it is paused.
#[test]
fn a_paused_guest_stands_still_and_goes_on_as_if_nothing_had_been() {
    let machine = Machine::new("debian-7.3").deadline(Duration::from_secs(240));
    let disk = format!("path={}", machine.disk("disk.img", 16).display());
    let mut running = machine
        .arguments(["--cpus", "2", "--disk", &disk, "--shutdown-timeout", "3600"])
        .arguments(["--log", "info"])
        .script(
            r#"
presses() { awk '{ print $1 }' /sys/firmware/acpi/interrupts/ff_pwr_btn; }
# Twice that is how long a processor may be stuck.
echo 3 >/proc/sys/kernel/watchdog_thresh
# A device that is busy when the pause comes.
while :; do dd if=/dev/zero of=/dev/vda bs=64k count=64 conv=fsync 2>/dev/null || echo write >>/tmp/failed; done &
ticks=0
until [ "$(presses)" -gt 0 ] || [ $ticks -gt 200 ]; do
    ticks=$((ticks + 1))
    echo "@@tick"
    sleep 1
done
kill $!
say presses "$(presses)"
check writes test ! -e /tmp/failed
dmesg | grep -i -e 'soft lockup' -e stall -e 'blocked for' >/tmp/stuck
section stuck </tmp/stuck
"#,
        )
        .start();
    running.wait_for("@@tick", 3);
    running.signal("USR2");
    running.wait_for_log("the guest is paused", 1);
    // What was on its way to the console then.
    std::thread::sleep(Duration::from_secs(1));
    let before = running.count("@@tick");
    std::thread::sleep(PAUSE);
    assert_eq!(running.count("@@tick"), before);
    running.signal("CONT");
    running.wait_for("@@tick", before + 3);

    running.signal("USR2");
    running.wait_for_log("the guest is paused", 2);
    running.signal("TERM");
    let ended = running.end().well();
    assert_eq!(ended.console.said("presses"), "1");
    assert_eq!(ended.console.section("stuck"), "");
}
