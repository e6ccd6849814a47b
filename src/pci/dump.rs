//! Configuration spaces as text, in the form that `lspci -xxxx` prints and `lspci -F` reads.

use std::fmt;

use super::function::CONFIG_DWORDS;
use super::topology::Topology;
use crate::platform::addr::Sbdf;

/// Dwords on a line.
const LINE: u16 = 4;
/// Dwords of conventional configuration space, which is always shown whole.
const CONVENTIONAL: u16 = 64;

/// Every function that a configuration access reaches at present, in the order of their addresses.
pub struct Dump<'a>(pub &'a Topology);

/// One function's configuration space; the extended part only where there is something in it.
pub struct FunctionDump<'a> {
    /// The hierarchy it is in.
    pub topology: &'a Topology,
    /// Where it is at present.
    pub at: Sbdf,
}

impl fmt::Display for Dump<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut places: Vec<Sbdf> = self.0.functions().filter_map(|(_, at)| at).collect();
        places.sort_unstable();
        places
            .into_iter()
            .try_for_each(|at| writeln!(f, "{}", FunctionDump { topology: self.0, at }))
    }
}

impl fmt::Display for FunctionDump<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Some(function) = self.topology.function(self.at.segment, self.at.bdf) else {
            return writeln!(f, "{} is absent", self.at);
        };
        writeln!(f, "{} {}", self.at, function.name())?;
        let read = |dword| self.topology.config_read(self.at.segment, self.at.bdf, dword);
        let extended = read(CONVENTIONAL) != 0;
        for first in (0..CONFIG_DWORDS).step_by(usize::from(LINE)) {
            let shown = first < CONVENTIONAL || extended;
            if shown {
                write!(f, "{:02x}:", first * 4)?;
                for byte in [0, 1, 2, 3]
                    .map(|dword| read(first + dword))
                    .into_iter()
                    .flat_map(u32::to_le_bytes)
                {
                    write!(f, " {byte:02x}")?;
                }
                writeln!(f)?;
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::pci::testing::{Machine, two_ports};

    #[test]
    fn a_dump_names_every_function_and_shows_its_header() {
        let machine = Machine::new(two_ports());
        let text = Dump(&machine.topology).to_string();
        let heads: Vec<&str> = text.lines().filter(|line| line.starts_with("0000:")).collect();
        assert_eq!(
            heads,
            [
                "0000:00:01.0 rp0",
                "0000:00:02.0 rp1",
                "0000:01:00.0 left",
                "0000:02:00.0 right"
            ]
        );
        let left = text.split("left\n").nth(1).expect("left is there");
        assert_eq!(
            left.lines().next(),
            Some("00: 34 12 78 56 00 00 10 00 00 00 00 02 00 00 00 00")
        );
    }

    #[test]
    fn extended_space_is_shown_only_where_there_is_some() {
        let machine = Machine::new(two_ports());
        let lines = |name: &str| {
            let at = Sbdf {
                segment: 0,
                bdf: machine.node(name).bdf,
            };
            FunctionDump {
                topology: &machine.topology,
                at,
            }
            .to_string()
        };
        assert_eq!(lines("left").lines().count(), 1 + 16);
        assert!(lines("rp0").contains("\n100: 01 00 82 14"));
        assert_eq!(lines("rp0").lines().count(), 1 + 256);
    }

    #[test]
    fn a_function_that_is_out_of_reach_is_left_out() {
        let machine = Machine::new(two_ports());
        machine.write(machine.node("rp0").bdf, 6, 0);
        let text = Dump(&machine.topology).to_string();
        assert!(!text.contains("left") && text.contains("right"));
        let at = Sbdf {
            segment: 0,
            bdf: machine.node("left").bdf,
        };
        let absent = FunctionDump {
            topology: &machine.topology,
            at,
        }
        .to_string();
        assert_eq!(absent, "0000:01:00.0 is absent\n");
    }
}
