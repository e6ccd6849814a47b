//! Virtual functions of the host's NIC in a guest, and with the host's own driver again afterwards.
//!
//! What they need of the host: an igb with two virtual functions, which igbvf has; the lab has that. Elsewhere
//! RAVELIN_SRIOV_NIC names it.

use crate::given::{AtHost, Given, Interface};
use crate::machine::Machine;
use crate::vfio::{BEHIND_AN_IOMMU, DEADLINE};

/// Two virtual functions that a guest can have, of a physical one that stays the host's and is up.
pub(crate) struct Pair {
    pub(crate) functions: Vec<Given>,
    physical: Interface,
    _alone: AtHost,
}

impl Pair {
    pub(crate) fn new() -> Self {
        let alone = AtHost::sriov_nic();
        let physical = Interface::of(&alone.at);
        // A virtual function's driver asks the physical one's, which answers when its interface is up.
        physical.up();
        let functions = alone.virtual_functions("igbvf");
        assert_eq!(functions.len(), 2, "virtual functions of {}", alone.at);
        for number in 0..2 {
            let mac = format!("52:54:00:00:01:0{number}");
            physical.set(&["vf", &number.to_string(), "mac", &mac]);
        }
        Self {
            functions: functions.into_iter().map(AtHost::give).collect(),
            physical,
            _alone: alone,
        }
    }

    /// A guest with each of them behind a port of its own.
    fn machine(&self) -> Machine {
        let machine = Machine::new("lab").deadline(2 * DEADLINE);
        let [first, second] = [0, 1].map(|at| format!("host={},port=rp{at}", self.functions[at].at));
        machine
            .arguments(["--root-port", "id=rp0", "--root-port", "id=rp1"])
            .arguments(["--vfio-device", &first, "--vfio-device", &second])
    }

    /// The host's driver has them again, the host holds nothing for a guest, and each works there.
    pub(crate) fn works_on_the_host(mut self) {
        for function in std::mem::take(&mut self.functions) {
            function.works_on_the_host();
        }
    }
}

impl Drop for Pair {
    fn drop(&mut self) {
        // Their driver lets go of them before the one that it asks.
        self.functions.clear();
        self.physical.down();
    }
}

/// What the guest sends from one to the other and back, in MiB.
const AMOUNT: usize = 8;

/// Gives the second function's interface to a process with a network of its own, so that what one sends the other has to
/// pass the NIC; `away` runs a command there.
pub(crate) const TWO_NETWORKS: &str = r#"
set -- $(ls -d /sys/bus/pci/drivers/igbvf/0000:*)
first=$(ls "$1/net")
second=$(ls "$2/net")
mkfifo /tmp/silence
exec 9<>/tmp/silence
unshare -n sleep 100000 &
other=$!
away() {
    nsenter -t "$other" -n "$@"
}
connect() {
    while [ "$(readlink /proc/$other/ns/net)" = "$(readlink /proc/self/ns/net)" ]; do sleep 0.1; done
    ip link set "$second" netns "$other"
    ip addr add 10.0.2.30/24 dev "$first"
    ip link set "$first" up
    away ip addr add 10.0.2.31/24 dev "$second"
    away ip link set "$second" up
    check first_has_a_link linked "$first"
    check second_has_a_link away_linked "$second"
}
linked() {
    waited=0
    until [ "$(cat /sys/class/net/$1/carrier)" = 1 ] || [ $waited -gt 300 ]; do sleep 0.2; waited=$((waited + 1)); done
    [ "$(cat /sys/class/net/$1/carrier)" = 1 ]
}
away_linked() {
    waited=0
    until away ip link show "$1" | grep -q LOWER_UP || [ $waited -gt 300 ]; do sleep 0.2; waited=$((waited + 1)); done
    away ip link show "$1" | grep -q LOWER_UP
}
"#;

/// Answers of the outside and of each other, and data there and back. A listener whose input ends says so to the sender,
/// who then stops: theirs, the ninth descriptor, does not end.
pub(crate) fn traffic() -> String {
    format!(
        r#"
check gateway_answers_the_first ping -c 5 -i 0.2 -s 1400 10.0.2.2
check gateway_answers_the_second away ping -c 5 -i 0.2 -s 1400 10.0.2.2
check the_second_answers_the_first ping -c 5 -i 0.2 -s 1400 10.0.2.31
dd if=/dev/urandom of=/tmp/data bs=1M count={AMOUNT} 2>/dev/null
away nc -l -p 5000 <&9 >/tmp/there &
receiver=$!
until nc 10.0.2.31 5000 </tmp/data; do sleep 0.2; done
wait "$receiver"
nc -l -p 5001 <&9 >/tmp/back &
receiver=$!
until away nc 10.0.2.30 5001 </tmp/there; do sleep 0.2; done
wait "$receiver"
check all_came test "$(wc -c </tmp/back)" = $(({AMOUNT} << 20))
check as_it_was_sent cmp /tmp/data /tmp/back
"#
    )
}

#[test]
fn two_virtual_functions_talk_to_each_other_and_the_outside_also_after_a_reset() {
    let functions = Pair::new();
    let traffic = traffic();
    functions
        .machine()
        .script(&format!(
            r#"{TWO_NETWORKS}
check by_msix test -n "$(ls "$1/msi_irqs" 2>/dev/null)"
check no_wire test "$(cat "$1/irq")" = 0 -o -n "$(ls "$1/msi_irqs")"
check memory_is_on sh -c "setpci -s $(basename "$1") COMMAND.w | grep -q '[2367abef]$'"
check resets_by_itself grep -q flr "$1/reset_method"
connect
{traffic}
address=$(basename "$1")
ip link set "$first" down
echo "$address" >/sys/bus/pci/drivers/igbvf/unbind
check resets sh -c "echo 1 >/sys/bus/pci/devices/$address/reset"
echo "$address" >/sys/bus/pci/drivers/igbvf/bind
first=$(ls "/sys/bus/pci/devices/$address/net")
ip addr add 10.0.2.30/24 dev "$first"
ip link set "$first" up
check first_has_a_link_again linked "$first"
{traffic}
lspci -vv | section lspci
"#
        ))
        .run()
        .well();
    functions.works_on_the_host();
}

#[test]
fn two_virtual_functions_in_domains_of_their_own_talk_to_each_other_and_the_outside() {
    let functions = Pair::new();
    let traffic = traffic();
    let ended = functions
        .machine()
        .arguments(BEHIND_AN_IOMMU)
        .script(&format!(
            r#"{TWO_NETWORKS}
for at; do
    say domain "$(cat "$at/iommu_group/type") $(ls "$at/iommu_group/devices" | wc -l)"
done
connect
{traffic}
check no_fault sh -c '! dmesg | grep -q IO_PAGE_FAULT'
"#
        ))
        .run()
        .well();
    assert_eq!(ended.console.said_each("domain"), ["DMA 1"; 2]);
    functions.works_on_the_host();
}
