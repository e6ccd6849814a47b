//! AMD's part of the interface of /dev/iommu, as data: it is not upstream, and differs between kernels.
//!
//! Four versions are built in, by the order in which they were published:
//!
//! | name | what it is | how the guest's rings reach the kernel |
//! |---|---|---|
//! | `v-a` | second posting, October 2025 | registers by a request of its own, 60h |
//! | `v-c` | a tree of AMD's after that | registers by OPTION |
//! | `v-d` | the tree that takes the VM's descriptor | registers by VIOMMU_COMMAND, 95h |
//! | `v-e` | third posting, June 2026, and two series of July 2026 | a HW queue object each |
//!
//! Between the first two a commit of AMD's tree handed out no VF page (V-B of some lists). A guest has no heads, tails and
//! doorbells then, and the kernel is told from a stock one by nothing: it is no version here.
//!
//! What no published text settles can be set in a TOML table over one of them ([`Abi::from_toml`]): the type number of the
//! vIOMMU, the user data, the types and flags of HW queues, the request that routes interrupts, and the type of event queues.

use std::fs;
use std::ops::Range;
use std::path::Path;

use serde::Deserialize;

use super::uapi;

/// How one kernel has it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Abi {
    /// The built-in version that it is, or is based on.
    pub name: &'static str,
    /// What VIOMMU_ALLOC calls AMD's vIOMMU; not 0.
    pub viommu_type: u32,
    /// What goes with VIOMMU_ALLOC.
    pub user_data: UserData,
    /// How the guest's rings reach the kernel.
    pub rings: Rings,
    /// VIOMMU_EXT_INT_REMAP, where its number and layout are known.
    pub interrupts: Option<ExtInterrupt>,
    /// Event queues, where the kernel has any for AMD's vIOMMU; no published version has.
    pub events: Option<EventQueues>,
}

/// The user data of VIOMMU_ALLOC: bytes, and offsets of its fields. All but one are `u32`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub struct UserData {
    /// Bytes, 8 to 256.
    pub len: u32,
    /// Out, `u64`: at which offset of /dev/iommu the VF page is mapped.
    pub mmap_offset: u32,
    /// In: where the host has its IOMMU's function.
    pub host_iommu: Option<u32>,
    /// In: where the guest has its IOMMU's function.
    pub guest_iommu: Option<u32>,
    /// In: the function in whose device table entry the tables for the guest's rings are.
    pub translate_device: Option<u32>,
    /// In: the VM's descriptor.
    pub kvm: Option<u32>,
    /// Out: the number the unit has for the guest.
    pub guest_id: Option<u32>,
}

/// How the guest's rings reach the kernel.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Rings {
    /// Each is a HW queue object.
    Queues(Queues),
    /// By what the guest wrote to its registers.
    Registers(Forwarding),
}

/// Which request takes a register of the guest's.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Forwarding {
    /// VIOMMU_MMIO_ACCESS, 60h.
    MmioAccess,
    /// OPTION with the number that it has for the vIOMMU's registers.
    Option(u32),
    /// VIOMMU_COMMAND, 95h.
    Command,
}

/// HW queues: their types, none 0 and no two the same, and bits of their flags. Bits that no kernel told are those of the
/// register of the unit that the flags end up in.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case", default)]
pub struct Queues {
    /// Type of the command buffer's.
    pub command: u32,
    /// Type of the event log's.
    pub event: u32,
    /// Type of the log's of page requests.
    pub ppr: u32,
    /// CMDBUF_EN.
    pub command_enable: u32,
    /// COMWAIT_EN.
    pub command_interrupts: u32,
    /// EVT_LOG_EN.
    pub event_enable: u32,
    /// EVT_INT_EN.
    pub event_interrupts: u32,
    /// PPRLOG_EN and PPR_EN.
    pub ppr_enable: u32,
    /// PPRINT_EN.
    pub ppr_interrupts: u32,
}

impl Default for Queues {
    fn default() -> Self {
        Self {
            command: 2,
            event: 3,
            ppr: 4,
            command_enable: 1 << 8,
            command_interrupts: 1 << 9,
            event_enable: 1 << 8,
            event_interrupts: 1 << 9,
            ppr_enable: 1 << 8 | 1 << 10,
            ppr_interrupts: 1 << 9,
        }
    }
}

/// VIOMMU_EXT_INT_REMAP: number, bytes, offsets of its `u32` fields, and how it calls the two interrupts.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub struct ExtInterrupt {
    /// The request's number.
    pub request: u32,
    /// Bytes, 8 to 256.
    pub len: u32,
    /// Where the vIOMMU's number goes.
    pub viommu: u32,
    /// Where it goes which interrupt it is.
    pub kind: u32,
    /// Where the VM's descriptor goes.
    pub kvm: u32,
    /// Where the vCPU's number goes.
    pub vcpu: u32,
    /// Where the vector goes.
    pub vector: u32,
    /// The event log's.
    pub event: u32,
    /// That of the log of page requests.
    pub ppr: u32,
}

/// Event queues: their type, not 0, and bytes of a record, 4 to 256 in whole words.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub struct EventQueues {
    /// What VEVENTQ_ALLOC calls them.
    #[serde(rename = "type")]
    pub queue_type: u32,
    /// Without the header; the record of AMD's manual is at the beginning.
    #[serde(default = "amds_record")]
    pub record: u32,
}

/// Bytes of a record by the manual.
const fn amds_record() -> u32 {
    16
}

/// Why a table is refused.
#[derive(Debug, thiserror::Error)]
pub enum AbiError {
    /// It is no TOML, or not of this form.
    #[error("not a table of a kernel's interface: {}", .0.message())]
    Toml(#[source] toml::de::Error),
    /// A value cannot be.
    #[error("{key} = {value}: {problem}")]
    Value {
        /// With the name of the table it is in.
        key: String,
        /// As it was said.
        value: String,
        /// What is wrong with it.
        problem: &'static str,
    },
}

impl AbiError {
    /// The line of `text`, counted from 1, that it is about, if it is about one.
    #[must_use]
    pub fn line(&self, text: &str) -> Option<usize> {
        let of_byte = |at: usize| text.bytes().take(at).filter(|byte| *byte == b'\n').count() + 1;
        match self {
            Self::Toml(error) => error.span().map(|span| of_byte(span.start)),
            Self::Value { key, .. } => {
                let (table, key) = key.rsplit_once('.').unwrap_or(("", key));
                let mut within = "";
                let is_key = |line: &str| line.split_once('=').is_some_and(|(name, _)| name.trim() == key);
                let at = text.lines().map(str::trim).position(|line| {
                    if let Some(head) = line.strip_prefix('[') {
                        within = head.split(']').next().unwrap_or(head).trim();
                    }
                    within == table && is_key(line)
                });
                at.map(|line| line + 1)
            }
        }
    }
}

fn wrong(key: impl Into<String>, value: &impl ToString, problem: &'static str) -> AbiError {
    AbiError::Value {
        key: key.into(),
        value: value.to_string(),
        problem,
    }
}

const V_A: Abi = Abi {
    name: "v-a",
    viommu_type: 3,
    user_data: UserData {
        len: 32,
        mmap_offset: 16,
        host_iommu: Some(0),
        guest_iommu: Some(4),
        translate_device: Some(8),
        kvm: None,
        guest_id: Some(12),
    },
    rings: Rings::Registers(Forwarding::MmioAccess),
    interrupts: None,
    events: None,
};

const V_C: Abi = Abi {
    name: "v-c",
    viommu_type: 3,
    user_data: UserData {
        len: 16,
        mmap_offset: 0,
        host_iommu: None,
        guest_iommu: None,
        translate_device: None,
        kvm: None,
        guest_id: None,
    },
    rings: Rings::Registers(Forwarding::Option(2)),
    interrupts: None,
    events: None,
};

const V_D: Abi = Abi {
    name: "v-d",
    viommu_type: 3,
    user_data: UserData {
        len: 24,
        mmap_offset: 8,
        host_iommu: None,
        guest_iommu: Some(4),
        translate_device: None,
        kvm: Some(16),
        guest_id: None,
    },
    rings: Rings::Registers(Forwarding::Command),
    interrupts: None,
    events: None,
};

/// What is said over a built-in version.
#[derive(Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
struct Said {
    base: String,
    viommu_type: Option<u32>,
    user_data: Option<UserData>,
    queues: Option<Queues>,
    option: Option<u32>,
    ext_int: Option<ExtInterrupt>,
    events: Option<EventQueues>,
}

impl Abi {
    /// The built-in versions, newest first.
    #[must_use]
    pub fn built_in() -> [Self; 4] {
        let newest = Self {
            name: "v-e",
            viommu_type: 3,
            user_data: UserData {
                len: 8,
                mmap_offset: 0,
                ..V_C.user_data
            },
            rings: Rings::Queues(Queues::default()),
            interrupts: None,
            events: None,
        };
        [newest, V_D, V_C, V_A]
    }

    /// The built-in version `name`, if there is one.
    #[must_use]
    pub fn named(name: &str) -> Option<Self> {
        Self::built_in().into_iter().find(|abi| abi.name == name)
    }

    /// The version that `said` names, or else that the file at `path` is about.
    ///
    /// # Errors
    /// What is wrong, with the line where it is one's.
    pub fn said(said: &str, path: &Path) -> Result<Self, String> {
        if let Some(abi) = Self::named(said) {
            return Ok(abi);
        }
        let text = fs::read_to_string(path).map_err(|error| {
            let versions = Self::built_in().map(|abi| abi.name).join(", ");
            format!("no such version, there are {versions}; and as a file it cannot be read: {error}")
        })?;
        Self::from_toml(&text).map_err(|error| match error.line(&text) {
            Some(line) => format!("line {line}: {error}"),
            None => error.to_string(),
        })
    }

    /// What the TOML table `text` says over the built-in version that its key `base` names.
    ///
    /// Further keys: `viommu-type`, `option` (`v-c` only), and the tables `user-data`, `queues` (`v-e` only), `ext-int` and
    /// `events` (`type` and `record`), with the fields of [`UserData`], [`Queues`], [`ExtInterrupt`] and [`EventQueues`].
    /// What is absent stays as built in.
    ///
    /// # Errors
    /// Names the key and the value that cannot be.
    pub fn from_toml(text: &str) -> Result<Self, AbiError> {
        let said: Said = toml::from_str(text).map_err(AbiError::Toml)?;
        let base = Self::named(&said.base);
        let mut abi = base.ok_or_else(|| {
            wrong(
                "base",
                &said.base,
                "no such version; there are v-a, v-c, v-d and v-e",
            )
        })?;
        if let Some(viommu_type) = said.viommu_type {
            if viommu_type == 0 {
                return Err(wrong("viommu-type", &viommu_type, "the kernel keeps 0 for none"));
            }
            abi.viommu_type = viommu_type;
        }
        if let Some(user_data) = said.user_data {
            user_data.check()?;
            abi.user_data = user_data;
        }
        if let Some(queues) = said.queues {
            let Rings::Queues(of) = &mut abi.rings else {
                return Err(wrong(
                    "base",
                    &said.base,
                    "this version has no HW queues to say anything of",
                ));
            };
            queues.check()?;
            *of = queues;
        }
        if let Some(option) = said.option {
            let Rings::Registers(Forwarding::Option(of)) = &mut abi.rings else {
                return Err(wrong(
                    "option",
                    &option,
                    "this version does not pass registers by OPTION",
                ));
            };
            *of = option;
        }
        if let Some(interrupts) = said.ext_int {
            interrupts.check()?;
            abi.interrupts = Some(interrupts);
        }
        if let Some(events) = said.events {
            events.check()?;
            abi.events = Some(events);
        }
        Ok(abi)
    }
}

/// Whether every field, by key, offset and bytes, is inside `len` bytes, where it is aligned, and beside the others.
fn check_layout(
    table: &str,
    len: u32,
    taken: Range<u32>,
    fields: &[(&str, u32, u32)],
) -> Result<(), AbiError> {
    let key = |key: &str| format!("{table}.{key}");
    if !(8..=256).contains(&len) {
        return Err(wrong(key("len"), &len, "a structure has 8 to 256 bytes"));
    }
    let mut taken = vec![taken];
    for &(name, at, bytes) in fields {
        let end = at.checked_add(bytes).filter(|end| *end <= len);
        let Some(end) = end.filter(|_| at.is_multiple_of(bytes)) else {
            return Err(wrong(
                key(name),
                &at,
                "the field is not inside, or at no multiple of its size",
            ));
        };
        if taken.iter().any(|other| at < other.end && other.start < end) {
            return Err(wrong(key(name), &at, "another field is there"));
        }
        taken.push(at..end);
    }
    Ok(())
}

impl UserData {
    fn check(&self) -> Result<(), AbiError> {
        let words = [
            ("host-iommu", self.host_iommu),
            ("guest-iommu", self.guest_iommu),
            ("translate-device", self.translate_device),
            ("kvm", self.kvm),
            ("guest-id", self.guest_id),
        ];
        let mut fields = vec![("mmap-offset", self.mmap_offset, 8)];
        fields.extend(words.iter().filter_map(|(name, at)| Some((*name, (*at)?, 4))));
        check_layout("user-data", self.len, 0..0, &fields)
    }
}

impl Queues {
    fn check(&self) -> Result<(), AbiError> {
        let Self {
            command, event, ppr, ..
        } = *self;
        for (key, value, others) in [
            ("queues.command", command, [event, ppr]),
            ("queues.event", event, [command, ppr]),
            ("queues.ppr", ppr, [command, event]),
        ] {
            if value == 0 || others.contains(&value) {
                return Err(wrong(key, &value, "a type is not 0, and no other queue's"));
            }
        }
        for (key, interrupts, enable) in [
            (
                "queues.command-interrupts",
                self.command_interrupts,
                self.command_enable,
            ),
            (
                "queues.event-interrupts",
                self.event_interrupts,
                self.event_enable,
            ),
            ("queues.ppr-interrupts", self.ppr_interrupts, self.ppr_enable),
        ] {
            if interrupts & enable != 0 {
                return Err(wrong(
                    key,
                    &format!("{interrupts:#x}"),
                    "the bit also enables the queue",
                ));
            }
        }
        Ok(())
    }
}

impl ExtInterrupt {
    fn check(&self) -> Result<(), AbiError> {
        if !uapi::is_amds(self.request) || matches!(self.request, 0x60 | 0x95) {
            let problem = "the number of another request, or none of /dev/iommu's";
            return Err(wrong("ext-int.request", &format!("{:#x}", self.request), problem));
        }
        let fields = [
            ("viommu", self.viommu, 4),
            ("kind", self.kind, 4),
            ("kvm", self.kvm, 4),
            ("vcpu", self.vcpu, 4),
            ("vector", self.vector, 4),
        ];
        // The structure begins with its size.
        check_layout("ext-int", self.len, 0..4, &fields)?;
        if self.event == self.ppr {
            return Err(wrong("ext-int.ppr", &self.ppr, "it is that of the event log's"));
        }
        Ok(())
    }
}

impl EventQueues {
    fn check(self) -> Result<(), AbiError> {
        if self.queue_type == 0 {
            return Err(wrong("events.type", &0, "the kernel keeps 0 for none"));
        }
        if !(4..=256).contains(&self.record) || !self.record.is_multiple_of(4) {
            let problem = "a record has 4 to 256 bytes, in whole words";
            return Err(wrong("events.record", &self.record, problem));
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const EXT_INT: &str = "[ext-int]\nrequest = 0x98\nlen = 32\nviommu = 4\nkind = 8\nkvm = 12\nvcpu = 16\n\
                           vector = 20\nevent = 0\nppr = 1\n";

    fn refused(text: &str) -> String {
        Abi::from_toml(text).expect_err("refused").to_string()
    }

    #[test]
    fn built_in_versions_pass_their_own_checks_and_are_found_by_name() {
        for abi in Abi::built_in() {
            abi.user_data.check().expect("a layout");
            assert_eq!(Abi::named(abi.name), Some(abi));
        }
        Queues::default().check().expect("flags");
        assert_eq!(Abi::named("v-b"), None);
    }

    #[test]
    fn a_table_changes_what_it_names_and_nothing_else() {
        let built_in = Abi::named("v-e").expect("built in");
        assert_eq!(Abi::from_toml("base = 'v-e'").expect("nothing said"), built_in);
        let text = format!(
            "base = 'v-e'\nviommu-type = 4\n[queues]\nevent-enable = 1\n[user-data]\nlen = 16\nmmap-offset = 8\n{EXT_INT}"
        );
        let abi = Abi::from_toml(&text).expect("all in order");
        let queues = Queues {
            event_enable: 1,
            ..Queues::default()
        };
        assert_eq!((abi.viommu_type, abi.rings), (4, Rings::Queues(queues)));
        assert_eq!((abi.user_data.len, abi.user_data.mmap_offset), (16, 8));
        assert_eq!(abi.interrupts.map(|interrupts| interrupts.request), Some(0x98));
        let abi = Abi::from_toml("base = 'v-d'\n[events]\ntype = 3").expect("of any version");
        let events = EventQueues {
            queue_type: 3,
            record: 16,
        };
        assert_eq!(abi.events, Some(events));
        let abi = Abi::from_toml("base = 'v-c'\noption = 7").expect("of this version");
        assert_eq!(abi.rings, Rings::Registers(Forwarding::Option(7)));
    }

    #[test]
    fn what_cannot_be_is_refused_by_key_and_value() {
        assert_eq!(
            refused("base = 'v-b'"),
            "base = v-b: no such version; there are v-a, v-c, v-d and v-e"
        );
        let begins = |text: &str, start: &str| {
            let error = refused(text);
            assert!(error.starts_with(start), "{error}");
        };
        begins("base = 'v-e'\nviommu-type = 0", "viommu-type = 0: ");
        begins("base = 'v-e'\noption = 2", "option = 2: ");
        begins("base = 'v-d'\n[queues]\ncommand = 5", "base = v-d: ");
        begins("base = 'v-e'\n[queues]\ncommand = 3", "queues.command = 3: ");
        begins("base = 'v-e'\n[queues]\nppr = 0", "queues.ppr = 0: ");
        begins(
            "base = 'v-e'\n[queues]\nevent-interrupts = 0x100",
            "queues.event-interrupts = 0x100: ",
        );
        begins(
            "base = 'v-e'\n[user-data]\nlen = 4\nmmap-offset = 0",
            "user-data.len = 4: ",
        );
        begins(
            "base = 'v-e'\n[user-data]\nlen = 8\nmmap-offset = 4",
            "user-data.mmap-offset = 4: ",
        );
        begins(
            "base = 'v-e'\n[user-data]\nlen = 16\nmmap-offset = 0\nkvm = 4",
            "user-data.kvm = 4: ",
        );
        begins("base = 'v-e'\n[events]\ntype = 0", "events.type = 0: ");
        begins(
            "base = 'v-e'\n[events]\ntype = 3\nrecord = 6",
            "events.record = 6: ",
        );
        let base = "base = 'v-e'\n";
        begins(
            &format!("{base}{}", EXT_INT.replace("0x98", "0x85")),
            "ext-int.request = 0x85: ",
        );
        begins(
            &format!("{base}{}", EXT_INT.replace("viommu = 4", "viommu = 0")),
            "ext-int.viommu = 0: ",
        );
        begins(
            &format!("{base}{}", EXT_INT.replace("ppr = 1", "ppr = 0")),
            "ext-int.ppr = 0: ",
        );
    }

    #[test]
    fn an_error_knows_its_line() {
        let line = |text: &str| Abi::from_toml(text).expect_err("refused").line(text);
        assert_eq!(
            line("base = 'v-e'\n\n[queues]\ncommand = 2\nevent = 2\n"),
            Some(4)
        );
        assert_eq!(line("# of mine\nbase = 'v-z'\n"), Some(2));
        assert_eq!(line("base = 'v-e'\nviommu-typ = 4\n"), Some(2));
        assert_eq!(line("base = 'v-e'\nviommu-type = 4\n]"), Some(3));
        // What is built in clashes with what was said elsewhere.
        assert_eq!(line("base = 'v-e'\nqueues.command = 3"), None);
    }

    #[test]
    fn an_unknown_key_is_refused_by_name() {
        let error = refused("base = 'v-e'\nviommu-typ = 4");
        assert!(error.contains("viommu-typ"), "{error}");
        let error = refused("base = 'v-e'\n[queues]\ncomand = 4");
        assert!(error.contains("comand"), "{error}");
        let text = "base = 'v-e'\nviommu-type = -1";
        let error = Abi::from_toml(text).expect_err("refused");
        assert!(error.to_string().contains("-1"), "{error}");
        assert_eq!(error.line(text), Some(2));
        assert_eq!(
            Abi::from_toml("base = 'v-b'").expect_err("refused").line(""),
            None
        );
    }
}
