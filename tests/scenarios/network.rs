//! A bridge with taps on the host, for guests that talk to each other.

use std::process::Command;

/// A bridge and its taps; they go away with it.
pub(crate) struct Bridge {
    name: String,
    taps: Vec<String>,
}

impl Bridge {
    /// A bridge called `name`, at most 12 characters, with `taps` tap interfaces. Needs root.
    pub(crate) fn new(name: &str, taps: usize) -> Self {
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
            ip(&["tuntap", "add", &tap, "mode", "tap", "vnet_hdr"]);
            ip(&["link", "set", &tap, "master", name, "up"]);
            bridge.taps.push(tap);
        }
        bridge
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

fn ip(arguments: &[&str]) {
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
