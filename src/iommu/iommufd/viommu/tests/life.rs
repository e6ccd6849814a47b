//! What a guest's life costs in requests to the kernel, from behind the front end.

use vm_memory::{GuestAddress, GuestMemoryMmap};

use super::*;
use crate::iommu::amd::features::Wanted;
use crate::iommu::viommu::features::offer;
use crate::iommu::viommu::testing::{FakeProtection, dte};
use crate::iommu::viommu::{ServedParts, ServedUnit};
use crate::platform::addr::{GpaRange, Sbdf};
use crate::platform::bus::BusDevice;
use crate::platform::dma::Requester;
use crate::platform::memory::GuestRam;

/// Where the guest has its device table: three pages.
const TABLE: u64 = 0x20_0000;
/// As whom the guest knows its functions.
const IDS: [u16; 2] = [0x0100, 0x0108];

/// A unit over a kernel.
struct Guest {
    unit: Arc<ServedUnit>,
    pages: Arc<FakeProtection>,
}

impl Guest {
    fn new(host: Arc<HwHost>) -> Self {
        let ram = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 0x40_0000)]).expect("a mapping");
        let ram = GuestRam::new(ram);
        let pages = FakeProtection::new(ram.clone());
        let functions = IDS.map(|id| {
            Arc::new(Requester::new(Sbdf {
                segment: 0,
                bdf: name(id),
            }))
        });
        let features = host.features().expect("known");
        let unit = ServedUnit::new(ServedParts {
            name: "iommu0".to_owned(),
            at: Sbdf::default(),
            mmio: GpaRange::new(Gpa(0xfeb0_4000), 0x4000).expect("valid"),
            features: offer(&[features], &Wanted::DEFAULT),
            ram,
            host,
            protection: pages.clone(),
            functions: functions.into_iter().zip([NIC, DISK]).collect(),
        });
        Self {
            unit: unit.expect("nothing is refused"),
            pages,
        }
    }

    fn write(&self, at: u64, value: u64) {
        self.unit.write(at, &value.to_le_bytes());
    }

    fn control(&self, bit: u32, on: bool) {
        let mut data = [0; 8];
        self.unit.read(0x18, &mut data);
        let control = u64::from_le_bytes(data) & !(1 << bit) | u64::from(on) << bit;
        self.write(0x18, control);
    }

    /// What Linux does, in its order, entries blocked at its end.
    fn start(&self) {
        for id in IDS {
            self.word(id, 0, 0);
        }
        self.write(0x00, TABLE | 2);
        self.write(0x08, 0x1_0000 | 9 << 56);
        for bit in [12, 16, 17, 50, 0] {
            self.control(bit, true);
        }
        self.write(0x10, 0x2_0000 | 9 << 56);
        self.control(2, true);
        for id in IDS {
            self.word(id, 0, 1);
            self.word(id, 0, 3);
        }
        self.write(0x170, 0x31 << 32 | 2 << 8);
        self.control(51, true);
        self.control(3, true);
    }

    fn word(&self, id: u16, word: u64, value: u64) {
        let at = Gpa(TABLE + 32 * u64::from(id) + 8 * word);
        self.pages.store(at, &value.to_le_bytes());
    }

    /// As Linux 7.3 attaches: the upper half, and then the lower.
    fn entry(&self, entry: [u64; 4]) {
        let [a, b, c, d] = entry;
        for (at, words) in [(16, [c, d]), (0, [a, b])] {
            let bytes: Vec<_> = words.into_iter().flat_map(u64::to_le_bytes).collect();
            self.pages.store(Gpa(TABLE + 32 * u64::from(IDS[0]) + at), &bytes);
        }
    }
}

/// Requests of each step of a life.
fn requests(version: Version, abi: &Abi) -> Vec<(&'static str, u64)> {
    let bench = Bench::new(version);
    // Destinations of interrupts in registers.
    bench.fake.set_efr(EFR | 1 << 2);
    let mut counts = Vec::new();
    let mut seen = bench.fake.asked();
    let mut count = |step| {
        let asked = bench.fake.asked();
        counts.push((step, asked - std::mem::replace(&mut seen, asked)));
    };
    let host = bench.host(vec![abi.clone()]).expect("made");
    count("host");
    let guest = Guest::new(host);
    count("unit");
    guest.start();
    count("driver starts");
    guest.entry(dte(0x5000, 7));
    count("attach");
    guest.entry(dte(0x6000, 8));
    count("attach elsewhere");
    guest.entry([1, 0, 0, 0]);
    count("detach");
    guest.entry([3 << 61 | 3, 9, 0, 0]);
    count("identity");
    guest.entry(dte(0x5000, 7));
    count("attach again");
    guest.write(0x170, 0x31 << 32 | 4 << 8);
    count("interrupt moved");
    guest.control(2, false);
    guest.write(0x10, 0x3_0000 | 8 << 56);
    guest.control(2, true);
    count("event log moved");
    for bit in [12, 3, 2, 0] {
        guest.control(bit, false);
    }
    count("driver stops");
    guest.unit.reset();
    count("reset");
    guest.start();
    count("second driver starts");
    drop(guest);
    count("end");
    bench.assert_empty(abi.name);
    counts
}

/// The counts of `docs/performance.md`.
#[test]
fn each_step_of_a_life_costs_so_many_requests() {
    assert_eq!(
        requests(Version::E, &routing()),
        [
            ("host", 7),
            ("unit", 7),
            ("driver starts", 11),
            ("attach", 2),
            ("attach elsewhere", 3),
            ("detach", 2),
            ("identity", 1),
            ("attach again", 2),
            ("interrupt moved", 1),
            ("event log moved", 4),
            ("driver stops", 13),
            ("reset", 1),
            ("second driver starts", 9),
            ("end", 15),
        ]
    );
    // Rings are registers there, written one by one, and nothing sends interrupts.
    let counts: Vec<_> = requests(Version::D, &named("v-d"))
        .into_iter()
        .map(|(_, count)| count)
        .collect();
    assert_eq!(counts, [7, 4, 11, 2, 3, 2, 1, 2, 0, 3, 8, 0, 9, 10]);
}
