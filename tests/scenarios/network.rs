//! A bridge with taps on the host, and guests that talk to each other over it.

use std::io::{Read, Write};
use std::net::TcpListener;
use std::process::Command;
use std::thread::{self, JoinHandle};
use std::time::Duration;

use crate::machine::Machine;

/// A bridge and its taps; they go away with it.
pub(crate) struct Bridge {
    name: String,
    taps: Vec<String>,
}

impl Bridge {
    /// A bridge called `name`, at most 12 characters, with `taps` tap interfaces. Needs root.
    pub(crate) fn new(name: &str, taps: usize) -> Self {
        Self::with(name, taps, &[])
    }

    /// One with a tap that may have several queues.
    pub(crate) fn of_several_queues(name: &str) -> Self {
        Self::with(name, 1, &["multi_queue"])
    }

    fn with(name: &str, taps: usize, words: &[&str]) -> Self {
        let mut bridge = Self {
            name: name.to_owned(),
            taps: Vec::new(),
        };
        // Left over by a run that was killed.
        let _ = Command::new("ip").args(["link", "delete", name]).output();
        // A port forwards at once, not after the time in which loops would show.
        ip(&["link", "add", name, "type", "bridge", "forward_delay", "0"]);
        ip(&["link", "set", name, "up"]);
        for at in 0..taps {
            let tap = format!("{name}t{at}");
            let _ = Command::new("ip").args(["link", "delete", &tap]).output();
            // As a VMM opens it: with a header per frame.
            ip(&[&["tuntap", "add", &tap, "mode", "tap", "vnet_hdr"][..], words].concat());
            ip(&["link", "set", &tap, "master", name, "up"]);
            bridge.taps.push(tap);
        }
        bridge
    }

    /// Give this host an address on the bridge, like 10.9.0.1/24.
    pub(crate) fn address(&self, address: &str) {
        ip(&["addr", "add", address, "dev", &self.name]);
    }

    /// The name of a tap.
    pub(crate) fn tap(&self, at: usize) -> &str {
        &self.taps[at]
    }
}

impl Drop for Bridge {
    fn drop(&mut self) {
        for name in self.taps.iter().chain([&self.name]) {
            // Best effort: a name that is still there is deleted by the next run.
            let _ = Command::new("ip").args(["link", "delete", name]).output();
        }
    }
}

/// Two guests, each with these arguments and `words` for its kernel, send `mebibytes` there and back over the bridge `name`;
/// what arrives is what was sent, by its hash.
pub(crate) fn exchange(name: &str, mebibytes: usize, arguments: &[&str], words: &str) {
    let bridge = Bridge::new(name, 2);
    let side = |at: usize, script: &str| {
        Machine::new("lab")
            .deadline(Duration::from_secs(900))
            .cmdline(words)
            .arguments(["--memory", "512M", "--net", &format!("tap={}", bridge.tap(at))])
            .arguments(arguments)
            .script(&format!(
                r#"
nic=$(ls /sys/bus/virtio/drivers/virtio_net/virtio*/net | grep -v : | head -n 1)
ip addr add 10.9.0.{host}/24 dev "$nic"
ip link set "$nic" up
{script}
"#,
                host = at + 1
            ))
    };
    let mut receiver = side(
        0,
        r#"
echo @@listening
nc -l -p 5000 >/tmp/data
say size "$(wc -c </tmp/data)"
say received "$(sha256sum </tmp/data)"
# Refused until the other side listens.
until nc 10.9.0.2 5001 </tmp/data; do sleep 1; done
"#,
    )
    .start();
    receiver.wait_for("@@listening", 1);
    let sender = side(
        1,
        &format!(
            r#"
dd if=/dev/urandom of=/tmp/data bs=1M count={mebibytes} 2>/dev/null
say sent "$(sha256sum </tmp/data)"
nc 10.9.0.1 5000 </tmp/data
nc -l -p 5001 >/tmp/back
say back_size "$(wc -c </tmp/back)"
say back "$(sha256sum </tmp/back)"
"#
        ),
    )
    .start();
    let (sender, receiver) = (sender.end().well().console, receiver.end().well().console);
    assert_eq!(receiver.said("size"), (mebibytes << 20).to_string());
    assert_eq!(receiver.said("received"), sender.said("sent"));
    assert_eq!(sender.said("back_size"), (mebibytes << 20).to_string());
    assert_eq!(sender.said("back"), sender.said("sent"));
}

/// A listener on this host that sends its second caller what the first one sent.
pub(crate) struct Echo(JoinHandle<usize>);

impl Echo {
    /// One at an address of this host, with its port.
    pub(crate) fn at(address: &str) -> Self {
        let listener = TcpListener::bind(address).expect("the address is this host's");
        Self(thread::spawn(move || {
            let mut data = Vec::new();
            let (mut first, _) = listener.accept().expect("the guest calls");
            first.read_to_end(&mut data).expect("the guest sends");
            drop(first);
            let (mut second, _) = listener.accept().expect("the guest calls again");
            second.write_all(&data).expect("the guest receives");
            data.len()
        }))
    }

    /// How many bytes came, once they have been sent back.
    pub(crate) fn received(self) -> usize {
        self.0.join().expect("no panic")
    }
}

pub(crate) fn ip(arguments: &[&str]) {
    let output = Command::new("ip")
        .args(arguments)
        .output()
        .expect("the ip command (iproute2) is there");
    assert!(
        output.status.success(),
        "cannot `ip {}` (it needs root): {}",
        arguments.join(" "),
        String::from_utf8_lossy(&output.stderr)
    );
}
