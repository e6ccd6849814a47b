//! What a run cost: exits by reason and device, boot milestones, memory beyond guest RAM.

use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::ops::RangeInclusive;
use std::path::Path;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use serde::Serialize;

use crate::iommu::amd::commands::Command;
use crate::iommu::amd::counters::Counts;
use crate::iommu::amd::events::Event;
use crate::iommu::amd::spec::event::Code;
use crate::iommu::viommu::Counts as Asked;
use crate::platform::bus::{Bus, Traffic};
use crate::platform::host::HostError;
use crate::platform::kvm::{Exit, WatchCounts};

/// Why a processor returned to user space.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(usize)]
pub enum ExitReason {
    /// The guest read a port.
    PortRead,
    /// The guest wrote a port.
    PortWrite,
    /// The guest read where there is no RAM.
    MmioRead,
    /// The guest wrote where there is no RAM.
    MmioWrite,
    /// The guest wrote to RAM that it can only read, because somebody watches it.
    RamWrite,
    /// The guest executed what KVM does not emulate.
    Unemulated,
    /// A level-triggered interrupt ended.
    EndOfInterrupt,
    /// A kick or a signal.
    Interrupted,
    /// Anything else.
    Other,
}

impl ExitReason {
    const ALL: [Self; 9] = [
        Self::PortRead,
        Self::PortWrite,
        Self::MmioRead,
        Self::MmioWrite,
        Self::RamWrite,
        Self::Unemulated,
        Self::EndOfInterrupt,
        Self::Interrupted,
        Self::Other,
    ];

    /// The reason of `exit`.
    #[must_use]
    pub fn of(exit: &Exit<'_>) -> Self {
        match exit {
            Exit::PortRead { .. } => Self::PortRead,
            Exit::PortWrite { .. } => Self::PortWrite,
            Exit::MmioRead { .. } => Self::MmioRead,
            Exit::MmioWrite { .. } => Self::MmioWrite,
            Exit::RamWrite { .. } => Self::RamWrite,
            Exit::Unemulated(_) => Self::Unemulated,
            Exit::Eoi(_) => Self::EndOfInterrupt,
            Exit::Interrupted => Self::Interrupted,
            Exit::Halt | Exit::TripleFault | Exit::SystemEvent(_) | Exit::Broken(_) => Self::Other,
        }
    }
}

/// One processor's exits. Only its thread counts; anybody may look.
#[derive(Debug, Default)]
pub struct ExitCounts([AtomicU64; ExitReason::ALL.len()]);

impl ExitCounts {
    /// One more.
    pub fn count(&self, reason: ExitReason) {
        self.0[reason as usize].fetch_add(1, Ordering::Relaxed);
    }

    fn get(&self, reason: ExitReason) -> u64 {
        self.0[reason as usize].load(Ordering::Relaxed)
    }
}

/// When the guest got where, for the first time since the VMM started.
#[derive(Debug)]
pub struct Milestones {
    started: Instant,
    entered: OnceLock<Instant>,
    exited: OnceLock<Instant>,
}

impl Milestones {
    /// The VMM started at `started`.
    #[must_use]
    pub fn new(started: Instant) -> Self {
        Self {
            started,
            entered: OnceLock::new(),
            exited: OnceLock::new(),
        }
    }

    /// A processor is about to enter the guest.
    pub fn entered(&self) {
        self.entered.get_or_init(Instant::now);
    }

    /// The guest did something that needed us.
    pub fn exited(&self) {
        self.exited.get_or_init(Instant::now);
    }

    fn since_start(&self, at: &OnceLock<Instant>) -> Option<f64> {
        at.get().map(|at| milliseconds(at.duration_since(self.started)))
    }
}

fn milliseconds(time: Duration) -> f64 {
    time.as_secs_f64() * 1000.0
}

/// The statistics as they are written: `--stats FILE`.
#[derive(Debug, Serialize)]
pub struct Stats {
    /// Milliseconds from the start of the VMM.
    milestones_ms: MilestonesReport,
    /// Exits to user space.
    exits: Exits,
    /// Memory of the VMM without guest RAM.
    memory: Option<Memory>,
    /// What each IOMMU did.
    viommus: Vec<ViommuReport>,
    /// What it took to follow tables in guest RAM.
    watched_pages: WatchedReport,
}

/// What it took to follow tables in guest RAM.
#[derive(Debug, Serialize, PartialEq, Eq)]
struct WatchedReport {
    /// Pages that are watched now.
    pages: u64,
    /// Plain stores to pages that were watched, an exit each.
    stores: u64,
    /// Compare-exchanges of 16 bytes carried out for the guest, equal or not.
    compare_exchanges: u64,
    /// Times a processor had to leave the guest because memory slots changed.
    processors_stopped: u64,
}

/// What one IOMMU did.
#[derive(Debug, Serialize, PartialEq, Eq)]
struct ViommuReport {
    name: String,
    /// Writes to the command buffer's tail.
    doorbells: u64,
    /// Those among them that were polled and cost no exit.
    polled: u64,
    /// Commands carried out, by kind; kinds without any left out.
    commands: BTreeMap<&'static str, u64>,
    /// How often commands were carried out, any number at once.
    batches: u64,
    /// Errors that stopped the command processor.
    stops: u64,
    /// Translations from the cache.
    hits: u64,
    /// Translations by a walk.
    walks: u64,
    /// Events by code, logged or lost; codes without any left out.
    events: BTreeMap<String, u64>,
    /// Page faults among them, by kind; kinds without any left out.
    faults: BTreeMap<&'static str, u64>,
    /// What was asked of the host, for a unit that one serves.
    #[serde(skip_serializing_if = "Option::is_none")]
    host: Option<Asked>,
}

#[derive(Debug, Serialize)]
struct MilestonesReport {
    /// The first processor was about to enter the guest.
    first_vcpu_entry: Option<f64>,
    /// The guest first did something that left the kernel: it runs.
    kernel_start: Option<f64>,
    /// The guest's init wrote its mark to port 0x80.
    init: Option<f64>,
    /// The statistics were taken.
    end: f64,
}

#[derive(Debug, Serialize)]
struct Exits {
    total: u64,
    by_reason: ByReason,
    /// One per vCPU.
    by_vcpu: Vec<u64>,
    /// One per claimed range, those without traffic left out.
    by_device: Vec<DeviceExits>,
    /// Accesses that no device answered.
    unanswered: u64,
}

#[derive(Debug, Serialize)]
struct ByReason {
    port_read: u64,
    port_write: u64,
    mmio_read: u64,
    mmio_write: u64,
    ram_write: u64,
    unemulated: u64,
    end_of_interrupt: u64,
    interrupted: u64,
    other: u64,
}

#[derive(Debug, Serialize, PartialEq, Eq)]
struct DeviceExits {
    name: String,
    space: &'static str,
    start: u64,
    last: u64,
    reads: u64,
    writes: u64,
}

/// Resident memory in bytes.
#[derive(Debug, Serialize, PartialEq, Eq, Clone, Copy)]
struct Memory {
    /// The most the process ever had (VmHWM), guest RAM included.
    peak: u64,
    /// Guest RAM that is resident now (Rss of its mappings in smaps). RAM only ever becomes resident, so this
    /// is also what it was at the peak, or more.
    guest_ram: u64,
    /// The difference.
    peak_without_guest_ram: u64,
}

impl Stats {
    /// Take them now. The guest's init began `since_init` ago.
    #[must_use]
    pub fn take<'a>(
        milestones: &Milestones,
        viommus: impl Iterator<Item = (&'a str, (Counts, Option<Asked>))>,
        since_init: Option<Duration>,
        counts: impl Iterator<Item = &'a ExitCounts> + Clone,
        [ports, mmio]: [&Bus; 2],
        guest_ram: &[RangeInclusive<u64>],
        watched: WatchCounts,
    ) -> Self {
        let elapsed = milestones.started.elapsed();
        let sum = |reason| counts.clone().map(|counts| counts.get(reason)).sum::<u64>();
        let devices = |space, bus: &Bus| -> Vec<DeviceExits> {
            let busy = bus
                .traffic()
                .into_iter()
                .filter(|range| range.reads + range.writes > 0);
            busy.map(|range| DeviceExits::new(space, range)).collect()
        };
        let mut by_device = devices("port", ports);
        by_device.extend(devices("mmio", mmio));
        by_device.sort_by_key(|device| std::cmp::Reverse(device.reads + device.writes));
        let answered: u64 = by_device.iter().map(|device| device.reads + device.writes).sum();
        let accesses = [
            ExitReason::PortRead,
            ExitReason::PortWrite,
            ExitReason::MmioRead,
            ExitReason::MmioWrite,
        ];
        let accesses: u64 = accesses.into_iter().map(sum).sum();
        Self {
            milestones_ms: MilestonesReport {
                first_vcpu_entry: milestones.since_start(&milestones.entered),
                kernel_start: milestones.since_start(&milestones.exited),
                init: since_init.map(|ago| milliseconds(elapsed.saturating_sub(ago))),
                end: milliseconds(elapsed),
            },
            exits: Exits {
                total: ExitReason::ALL.into_iter().map(sum).sum(),
                by_reason: ByReason {
                    port_read: sum(ExitReason::PortRead),
                    port_write: sum(ExitReason::PortWrite),
                    mmio_read: sum(ExitReason::MmioRead),
                    mmio_write: sum(ExitReason::MmioWrite),
                    ram_write: sum(ExitReason::RamWrite),
                    unemulated: sum(ExitReason::Unemulated),
                    end_of_interrupt: sum(ExitReason::EndOfInterrupt),
                    interrupted: sum(ExitReason::Interrupted),
                    other: sum(ExitReason::Other),
                },
                by_vcpu: counts
                    .map(|counts| ExitReason::ALL.into_iter().map(|reason| counts.get(reason)).sum())
                    .collect(),
                by_device,
                unanswered: accesses.saturating_sub(answered),
            },
            memory: Memory::now(guest_ram),
            viommus: viommus
                .map(|(name, (counts, asked))| ViommuReport::new(name, &counts, asked))
                .collect(),
            watched_pages: WatchedReport::new(watched),
        }
    }

    /// Write them to `path` as JSON.
    pub fn write(&self, path: &Path) -> Result<(), HostError> {
        let text = serde_json::to_string_pretty(self).expect("numbers and strings are JSON");
        fs::write(path, text + "\n")
            .map_err(|source| HostError::new(format!("write the statistics to {}", path.display()), source))
    }
}

impl ViommuReport {
    fn new(name: &str, counts: &Counts, host: Option<Asked>) -> Self {
        let commands = Command::KINDS.into_iter().zip(counts.commands);
        let events = (0_u8..).zip(counts.events);
        let faults = Event::FAULTS.into_iter().zip(counts.faults);
        Self {
            name: name.to_owned(),
            doorbells: counts.doorbells,
            polled: counts.polled,
            commands: commands.filter(|(_, count)| *count > 0).collect(),
            batches: counts.batches,
            stops: counts.stops,
            hits: counts.hits,
            walks: counts.walks,
            events: events
                .filter(|(_, count)| *count > 0)
                .map(|(code, count)| (Code(code).to_string(), count))
                .collect(),
            faults: faults.filter(|(_, count)| *count > 0).collect(),
            host,
        }
    }
}

impl WatchedReport {
    fn new(counts: WatchCounts) -> Self {
        Self {
            pages: counts.pages,
            stores: counts.stores,
            compare_exchanges: counts.compare_exchanges,
            processors_stopped: counts.processors_stopped,
        }
    }
}

impl DeviceExits {
    fn new(space: &'static str, range: Traffic) -> Self {
        Self {
            name: range.name,
            space,
            start: range.start,
            last: range.last,
            reads: range.reads,
            writes: range.writes,
        }
    }
}

impl Memory {
    /// `None` where /proc does not tell.
    fn now(guest_ram: &[RangeInclusive<u64>]) -> Option<Self> {
        let read =
            |path| fs::read_to_string(path).inspect_err(|error: &io::Error| tracing::debug!(path, %error));
        let status = read("/proc/self/status").ok()?;
        let smaps = read("/proc/self/smaps").ok()?;
        Self::parse(&status, &smaps, guest_ram)
    }

    fn parse(status: &str, smaps: &str, guest_ram: &[RangeInclusive<u64>]) -> Option<Self> {
        let peak = status.lines().find_map(|line| kib(line, "VmHWM:"))?;
        let mut resident = 0;
        let mut is_ram = false;
        for line in smaps.lines() {
            if let Some(start) = mapping_start(line) {
                is_ram = guest_ram.iter().any(|ram| ram.contains(&start));
            } else if let Some(bytes) = kib(line, "Rss:").filter(|_| is_ram) {
                resident += bytes;
            }
        }
        Some(Self {
            peak,
            guest_ram: resident,
            peak_without_guest_ram: peak.saturating_sub(resident),
        })
    }
}

/// The value of a line `name   123 kB`, in bytes.
fn kib(line: &str, name: &str) -> Option<u64> {
    let value = line.strip_prefix(name)?.trim().strip_suffix(" kB")?;
    value.parse::<u64>().ok()?.checked_mul(1024)
}

/// The first address when `line` begins a mapping: `7f0000000000-7f0010000000 rw-p ...`.
fn mapping_start(line: &str) -> Option<u64> {
    let (range, _) = line.split_once(' ')?;
    let (start, end) = range.split_once('-')?;
    u64::from_str_radix(end, 16).ok()?;
    u64::from_str_radix(start, 16).ok()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::platform::bus::BusDevice;
    use std::sync::Arc;

    struct Zero;

    impl BusDevice for Zero {
        fn read(&self, _offset: u64, data: &mut [u8]) {
            data.fill(0);
        }
        fn write(&self, _offset: u64, _data: &[u8]) {}
    }

    #[test]
    fn exits_are_summed_over_processors_and_split_by_device() {
        let (ports, mmio) = (Bus::ports(), Bus::mmio());
        let _claim = ports.claim("serial", 0x3f8, 8, Arc::new(Zero)).expect("free");
        ports.write(0x3f8, &[1]);
        let counts = [ExitCounts::default(), ExitCounts::default()];
        counts[0].count(ExitReason::PortWrite);
        counts[1].count(ExitReason::PortRead);
        counts[1].count(ExitReason::EndOfInterrupt);
        let milestones = Milestones::new(Instant::now());
        let stats = Stats::take(
            &milestones,
            [].into_iter(),
            None,
            counts.iter(),
            [&ports, &mmio],
            &[],
            WatchCounts {
                pages: 1,
                stores: 2,
                compare_exchanges: 3,
                processors_stopped: 4,
            },
        );
        let json = serde_json::to_value(&stats).expect("JSON");
        assert_eq!(json["exits"]["total"], 3);
        assert_eq!(json["exits"]["by_vcpu"], serde_json::json!([1, 2]));
        assert_eq!(json["exits"]["by_reason"]["end_of_interrupt"], 1);
        assert_eq!(json["exits"]["unanswered"], 1);
        assert_eq!(json["exits"]["by_device"][0]["name"], "serial");
        assert_eq!(json["exits"]["by_device"][0]["writes"], 1);
        assert_eq!(json["milestones_ms"]["init"], serde_json::Value::Null);
        let watched =
            serde_json::json!({ "pages": 1, "stores": 2, "compare_exchanges": 3, "processors_stopped": 4 });
        assert_eq!(json["watched_pages"], watched);
    }

    #[test]
    fn a_milestone_keeps_its_first_time() {
        let milestones = Milestones::new(Instant::now());
        milestones.entered();
        let first = milestones.since_start(&milestones.entered);
        milestones.entered();
        assert_eq!(milestones.since_start(&milestones.entered), first);
    }

    #[test]
    fn guest_ram_is_told_apart_from_the_rest_of_the_process() {
        let status = "Name:\travelin\nVmHWM:\t    5000 kB\nVmRSS:\t    4000 kB\n";
        let smaps = "\
00400000-00500000 r-xp 00000000 00:00 0    /usr/bin/ravelin
Size:                 10 kB
Rss:                 100 kB
7f0000000000-7f0010000000 rw-p 00000000 00:00 0
Rss:                3000 kB
";
        let memory = Memory::parse(status, smaps, &[0x7f00_0000_0000..=0x7f00_0fff_ffff]);
        let expected = Memory {
            peak: 5000 << 10,
            guest_ram: 3000 << 10,
            peak_without_guest_ram: 2000 << 10,
        };
        assert_eq!(memory, Some(expected));
    }

    #[test]
    fn what_an_iommu_did_is_counted_by_name() {
        let mut counts = Counts {
            doorbells: 2,
            polled: 1,
            hits: 9,
            ..Counts::default()
        };
        counts.commands[0] = 3;
        counts.events[2] = 1;
        counts.events[15] = 1;
        counts.batches = 2;
        counts.faults[5] = 1;
        let report = ViommuReport::new("iommu0", &counts, None);
        let json = serde_json::to_value(&report).expect("JSON");
        let expected = serde_json::json!({
            "name": "iommu0",
            "doorbells": 2,
            "polled": 1,
            "commands": { "completion_wait": 3 },
            "batches": 2,
            "stops": 0,
            "hits": 9,
            "walks": 0,
            "events": { "io_page_fault": 1, "code 15": 1 },
            "faults": { "interrupt_not_present": 1 },
        });
        assert_eq!(json, expected);

        let asked = Asked {
            stores: 7,
            ..Asked::default()
        };
        let served = ViommuReport::new("iommu0", &counts, Some(asked));
        let json = serde_json::to_value(&served).expect("JSON");
        assert_eq!(json["host"]["stores"], 7);
    }

    #[test]
    fn an_unwritable_file_is_named() {
        let milestones = Milestones::new(Instant::now());
        let stats = Stats::take(
            &milestones,
            [].into_iter(),
            None,
            [].iter(),
            [&Bus::ports(), &Bus::mmio()],
            &[],
            WatchCounts::default(),
        );
        let error = stats
            .write(Path::new("/nowhere/stats.json"))
            .expect_err("no such folder");
        assert_eq!(
            error.to_string(),
            "cannot write the statistics to /nowhere/stats.json"
        );
    }
}
