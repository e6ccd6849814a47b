//! The host's own NIC in a guest, and at the other end of its wire another of this host: streams between the two.
//!
//! What they need of the host: an IOMMU, iommufd, vfio-pci, and two NICs wired to each other whose addresses begin as those of
//! the lab's (`scripts/lab run --wire`).

use std::fs;
use std::path::Path;
use std::time::Duration;

use crate::given::{Given, WIRED, in_the_lab, named, said};
use crate::machine::Machine;
use crate::network::{Echo, ip};
use crate::vfio::BEHIND;

/// How the address of the NIC begins that a guest can have.
const NEAR: &str = "52:54:00:00:01:";
/// And of the one at the other end, which stays the host's.
const FAR: &str = "52:54:00:00:02:";
/// What is sent in each direction, in MiB.
const AMOUNT: usize = 100;
/// What names the interface there outside the lab.
const PEER: &str = "RAVELIN_WIRED_PEER";

/// The interface whose address begins so.
fn interface(beginning: &str) -> String {
    let names = fs::read_dir("/sys/class/net")
        .expect("there are interfaces")
        .flatten();
    let mut names = names.map(|entry| entry.file_name().into_string().expect("plain"));
    let found = names.find(|name| {
        let address = fs::read_to_string(format!("/sys/class/net/{name}/address"));
        address.unwrap_or_default().starts_with(beginning)
    });
    found.unwrap_or_else(|| panic!("no interface has an address {beginning}*; the lab has one with --wire"))
}

/// A NIC that a guest can have, wired to one of this host.
struct Wire {
    near: Option<Given>,
    far: String,
}

impl Wire {
    /// The host's end has this address, with the length of its prefix.
    fn new(address: &str) -> Self {
        let what = "the interface of this host at the other end of RAVELIN_WIRED_NIC's wire";
        let far = named(PEER, what, said(PEER), in_the_lab());
        let far = far.unwrap_or_else(|error| panic!("{error}"));
        let near = WIRED.alone(|| {
            let device = Path::new("/sys/class/net").join(interface(NEAR)).join("device");
            let device = fs::canonicalize(device).expect("a function of the host");
            let at = device.file_name().expect("an address");
            at.to_string_lossy().into_owned()
        });
        let far = far.unwrap_or_else(|| interface(FAR));
        let near = Some(near.give());
        ip(&["addr", "add", address, "dev", &far]);
        ip(&["link", "set", &far, "up"]);
        Self { near, far }
    }

    /// The NIC's address on the host.
    fn at(&self) -> &str {
        &self.near.as_ref().expect("until it is given back").at
    }

    /// The host has it again, with a link to the other end, and holds nothing for a guest.
    fn works_on_the_host(mut self) {
        let near = self.near.take().expect("given back once");
        near.back().has_a_link();
    }
}

impl Drop for Wire {
    fn drop(&mut self) {
        self.near = None;
        ip(&["link", "set", &self.far, "down"]);
        ip(&["addr", "flush", "dev", &self.far]);
    }
}

fn arrives_whole_behind_a_unit_with(tables: &str) {
    let wire = Wire::new("10.9.8.1/24");
    let echo = Echo::at("10.9.8.1:5000");
    Machine::new("lab")
        .deadline(Duration::from_secs(900))
        .arguments(["--cpus", "2", "--memory", "768M"])
        .arguments(["--viommu", &format!("emulated,page-table={tables}")])
        .arguments(["--root-port", "id=rp0"])
        .arguments(["--vfio-device", &format!("host={},port=rp0", wire.at())])
        .script(&format!(
            r#"
at=$(ls -d /sys/bus/pci/drivers/e1000e/0000:* | head -n 1)
nic=$(ls "$at/net")
ip addr add 10.9.8.2/24 dev "$nic"
ip link set "$nic" up
waited=0
until ping -q -c 1 -W 1 10.9.8.1 >/dev/null || [ $waited -gt 60 ]; do waited=$((waited + 1)); done
dd if=/dev/urandom of=/tmp/data bs=1M count={AMOUNT} 2>/dev/null
nc 10.9.8.1 5000 </tmp/data
nc 10.9.8.1 5000 </dev/null >/tmp/back
check it_came_back_whole cmp /tmp/data /tmp/back
{BEHIND}"#
        ))
        .run()
        .well();
    assert_eq!(echo.received(), AMOUNT << 20);
    wire.works_on_the_host();
}

#[test]
fn traffic_of_200_mib_by_the_hosts_nic_arrives_whole_behind_a_unit_with_v1_tables() {
    arrives_whole_behind_a_unit_with("v1");
}

#[test]
fn traffic_of_200_mib_by_the_hosts_nic_arrives_whole_behind_a_unit_with_v2_tables() {
    arrives_whole_behind_a_unit_with("v2");
}
