//! Who is called what: names are unique in a machine, and those who got none are given one.

use std::collections::BTreeMap;
use std::fmt;

use crate::vm::config::said::ConfigError;
use crate::vm::config::section::Source;
use crate::vm::config::values::Name;

/// What a name can belong to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum What {
    BoardBridge,
    RootComplex,
    RootPort,
    Switch,
    DownstreamPort,
    Viommu,
    Disk,
    Nic,
    Console,
    EntropySource,
    TestDevice,
    HostFunction,
}

/// With its article, as messages need it.
impl fmt::Display for What {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::BoardBridge => "a bridge of the board",
            Self::RootComplex => "a root complex",
            Self::RootPort => "a root port",
            Self::Switch => "a switch",
            Self::DownstreamPort => "a downstream port",
            Self::Viommu => "an IOMMU",
            Self::Disk => "a disk",
            Self::Nic => "a NIC",
            Self::Console => "a console",
            Self::EntropySource => "an entropy source",
            Self::TestDevice => "a test device",
            Self::HostFunction => "a function of the host",
        })
    }
}

/// Every name with whoever it belongs to.
#[derive(Debug, Default)]
pub(super) struct Names<'a> {
    taken: BTreeMap<String, Owner<'a>>,
}

#[derive(Debug)]
struct Owner<'a> {
    what: What,
    /// `None` for what the machine has without anybody saying so.
    source: Option<&'a Source>,
}

impl<'a> Names<'a> {
    /// Reserve the name of something that nobody said.
    pub(super) fn reserve(&mut self, name: &str, what: What) {
        self.taken.insert(name.to_owned(), Owner { what, source: None });
    }

    /// Take `name` for the `what` that `source` said.
    pub(super) fn take(&mut self, name: &str, what: What, source: &'a Source) -> Result<(), ConfigError> {
        if let Some(owner) = self.taken.get(name) {
            let place = owner
                .source
                .map_or(String::new(), |source| format!(" ({})", source.place_of("id")));
            let problem = format!(
                "`{name}` is the name of {}{place} already; names are unique",
                owner.what
            );
            return Err(source.wrong("id", problem));
        }
        let source = Some(source);
        self.taken.insert(name.to_owned(), Owner { what, source });
        Ok(())
    }

    /// Take the first free of `prefix`0, `prefix`1, ... from `from` on; returns the name and its number.
    pub(super) fn give(
        &mut self,
        prefix: &str,
        from: usize,
        what: What,
        source: &'a Source,
    ) -> (String, usize) {
        let mut number = from;
        loop {
            let name = format!("{prefix}{number}");
            if !self.taken.contains_key(&name) {
                let source = Some(source);
                self.taken.insert(name.clone(), Owner { what, source });
                return (name, number);
            }
            number += 1;
        }
    }

    /// Who said the thing of that name.
    pub(super) fn source(&self, name: &str) -> Option<&'a Source> {
        self.taken.get(name).and_then(|owner| owner.source)
    }

    /// What the thing of that name is.
    pub(super) fn what(&self, name: &str) -> Option<What> {
        self.taken.get(name).map(|owner| owner.what)
    }

    /// Name a whole kind: those who said one first get it, then the others in order.
    pub(super) fn name_kind<'b>(
        &mut self,
        what: What,
        prefix: &str,
        entries: impl Iterator<Item = (Option<&'b Name>, &'a Source)> + Clone,
    ) -> Result<Vec<String>, ConfigError> {
        for (id, source) in entries.clone() {
            if let Some(id) = id {
                self.take(&id.0, what, source)?;
            }
        }
        let mut next = 0;
        let named = entries.map(|(id, source)| match id {
            Some(id) => id.0.clone(),
            None => {
                let (name, number) = self.give(prefix, next, what, source);
                next = number + 1;
                name
            }
        });
        Ok(named.collect())
    }
}
