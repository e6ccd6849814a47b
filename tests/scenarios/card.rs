//! Cards whose functions the host can reset only together.
//!
//! What they need of the host: an igb and an e1000e of two functions each, on networks whose gateway answers, those of the igb
//! in IOMMU groups of their own and those of the e1000e in one; the lab has that. QEMU's functions are left with a reset by
//! power management, which the operator switches off here: the kernel then knows as little as of a card that has none. It
//! then resets their bus no more, either, so that what comes of a reset of all of them is not to be seen so.

use std::fs;
use std::sync::{Mutex, MutexGuard, PoisonError};

use crate::given::{GATEWAY, Interface, all_driven_by, bind_vfio, in_the_lab};
use crate::machine::Machine;
use crate::vfio::DEADLINE;

/// Each card is one scenario's at a time.
static IGB: Mutex<()> = Mutex::new(());
static E1000E: Mutex<()> = Mutex::new(());

/// A card of two functions, each without a reset of its own.
pub(crate) struct Card {
    at: [String; 2],
    driver: &'static str,
    /// Those that guests can have.
    given: Vec<usize>,
    _alone: MutexGuard<'static, ()>,
}

impl Card {
    fn of(driver: &'static str, alone: &'static Mutex<()>) -> Self {
        assert!(in_the_lab(), "the lab's cards, which nobody else uses");
        let alone = alone.lock().unwrap_or_else(PoisonError::into_inner);
        let card = Self {
            at: all_driven_by(driver).try_into().expect("two functions"),
            driver,
            given: Vec::new(),
            _alone: alone,
        };
        card.resets("");
        card
    }

    /// Each function in an IOMMU group of its own.
    pub(crate) fn apart() -> Self {
        Self::of("igb", &IGB)
    }

    /// Both in one group.
    fn in_one_group() -> Self {
        Self::of("e1000e", &E1000E)
    }

    /// How the host may reset each function by itself.
    fn resets(&self, methods: &str) {
        for at in &self.at {
            let file = format!("/sys/bus/pci/devices/{at}/reset_method");
            fs::write(&file, format!("{methods}\n")).unwrap_or_else(|error| panic!("{file}: {error}"));
        }
    }

    /// Have guests have these functions.
    pub(crate) fn give(mut self, functions: &[usize]) -> Self {
        for function in functions {
            bind_vfio(&["bind", &self.at[*function]]);
            self.given.push(*function);
        }
        self
    }

    /// A guest with those that it can have, each behind a port of its own.
    fn machine(&self) -> Machine {
        let passed = self.given.iter().flat_map(|function| {
            let at = &self.at[*function];
            [
                "--root-port".to_owned(),
                format!("id=rp{function}"),
                "--vfio-device".to_owned(),
                format!("host={at},port=rp{function}"),
            ]
        });
        Machine::new("lab")
            .deadline(4 * DEADLINE)
            .arguments(["--cpus", "2", "--log", "info"])
            .arguments(passed)
    }

    /// What the guest's script begins with.
    fn script(&self) -> String {
        TALKING.replace("DRIVER", self.driver)
    }

    /// The host's driver has both again, and each has a link there.
    pub(crate) fn works_on_the_host(self) {
        let (at, driver) = (self.at.clone(), self.driver);
        drop(self);
        assert_eq!(all_driven_by(driver), at);
        for at in &at {
            let interface = Interface::of(at);
            interface.up();
            interface.down();
        }
    }
}

impl Drop for Card {
    fn drop(&mut self) {
        for function in &self.given {
            bind_vfio(&["unbind", &self.at[*function]]);
        }
        self.resets("default");
    }
}

/// Finds the functions, `$one` and, where there is one, `$two`; has them talk to their networks and let go of their driver.
const TALKING: &str = r#"
set -- $(ls -d /sys/bus/pci/drivers/DRIVER/0000:*)
one=$(basename "$1")
two=$(basename "${2:-}")
# nic FUNCTION: its interface, which each bind makes anew.
nic() {
    ls "/sys/bus/pci/devices/$1/net"
}
# connect FUNCTION ADDRESS
connect() {
    ip link set "$(nic "$1")" up
    waited=0
    until [ "$(cat "/sys/class/net/$(nic "$1")/carrier")" = 1 ] || [ $waited -gt 300 ]; do sleep 0.2; waited=$((waited + 1)); done
    ip addr add "$2/24" dev "$(nic "$1")"
}
# asks FUNCTION [OPTIONS]: each function's network has a gateway of its own.
asks() {
    asked=$1
    shift
    ping "$@" -i 0.2 -s 1400 -I "$(nic "$asked")" 10.0.2.2
}
let_go() {
    ip link set "$(nic "$1")" down
    echo "$1" >/sys/bus/pci/drivers/DRIVER/unbind
}
take() {
    echo "$1" >/sys/bus/pci/drivers/DRIVER/bind
    connect "$1" "$2"
}
reset() {
    echo 1 >"/sys/bus/pci/devices/$1/reset"
}
"#;

/// What the log says when the host resets the functions, and when one waits for the other.
const TOGETHER: &str = "the host has reset the functions that it can only reset together";
const WAITS: &str = "the function is silent until those that the host can only reset with it are reset, too";

/// The host has the second function: the first is silenced by the guest's resets, and nothing is pulled from under the host.
fn is_not_reset_with_one_of_the_hosts(card: Card) {
    let card = card.give(&[0]);
    let hosts = Interface::of(&card.at[1]);
    hosts.up();
    hosts.address("add");
    hosts.asks(GATEWAY);
    let talking = card.script();
    let ended = card
        .machine()
        .script(&format!(
            r#"{talking}
connect "$one" 10.0.2.30
check works asks "$one" -c 5
let_go "$one"
check resets reset "$one"
take "$one" 10.0.2.30
check works_after_its_reset asks "$one" -c 5
"#
        ))
        .run()
        .well();
    hosts.asks(GATEWAY);
    hosts.address("del");
    hosts.down();
    let line = |text: &str| {
        let mut lines = ended.log.lines();
        lines.any(|line| line.contains(text) && line.contains(&card.at[1]))
    };
    assert!(
        line("only together with another, which is not this machine's"),
        "{}",
        ended.log
    );
    assert!(
        !ended.log.contains(TOGETHER) && !ended.log.contains(WAITS),
        "{}",
        ended.log
    );
    card.works_on_the_host();
}

#[test]
fn a_function_of_a_card_that_the_host_uses_too_is_silenced_and_the_log_names_the_other() {
    is_not_reset_with_one_of_the_hosts(Card::apart());
}

#[test]
fn a_function_whose_group_the_host_uses_too_is_refused_by_the_name_of_the_other() {
    let card = Card::in_one_group().give(&[0]);
    let ended = card.machine().run().with(2);
    let expected = format!("{} is in the same IOMMU group", card.at[1]);
    assert!(ended.log.contains(&expected), "{}", ended.log);
    let command = format!("`scripts/bind-vfio bind {}`", card.at[1]);
    assert!(ended.log.contains(&command), "{}", ended.log);
    card.works_on_the_host();
}
