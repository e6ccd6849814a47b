//! The guest's IOMMUs: what each covers, what all of them offer, and whose the IOAPIC's interrupts are.

use crate::iommu::emulated::{self, GuestRegisters};
use crate::iommu::sim;
use crate::iommu::viommu::features::common;
use crate::iommu::viommu::host::HostFeatures;
use crate::pci::tree::{NodeKind, PciTree, RootComplex};
use crate::platform::addr::{Bdf, Gpa, GpaRange};
use crate::vm::config::Config;
use crate::vm::config::said::ConfigError;
use crate::vm::config::section::{Section, Source};
use crate::vm::config::sections::Viommu;
use crate::vm::config::values::{Switch, ViommuMode as Said};
use crate::vm::host_functions::HostFunctions;
use crate::vm::layout::Mapped;
use crate::vm::plan::{
    CpuPlan, DevicePlan, Doorbell, HardwarePlan, PageTable, ViommuMode, ViommuOffer, ViommuPlan,
};

use super::hardware::{self, Behind};
use super::names::Names;

/// The widest process address space IDs: Linux stops at more.
const MOST_PASID_BITS: u16 = 16;
/// The first APIC ID that a message without x2APIC cannot name.
const FIRST_X2APIC_ID: u32 = 255;

/// What the IOMMUs of a machine are among.
pub(super) struct Around<'a> {
    pub(super) mapped: &'a Mapped,
    pub(super) devices: &'a [DevicePlan],
    pub(super) names: &'a Names<'a>,
    pub(super) host: &'a HostFunctions,
}

/// What works an IOMMU.
struct Decided {
    mode: ViommuMode,
    /// Why where that was left to us, or what is against it.
    because: Option<String>,
    hardware: Option<HardwarePlan>,
}

/// Every IOMMU, in the order they were said.
pub(super) fn resolve(
    config: &Config,
    around: &Around<'_>,
    cpus: &CpuPlan,
) -> Result<Vec<ViommuPlan>, ConfigError> {
    let decided: Vec<Decided> = (0..config.viommus.len())
        .map(|index| decide(config, index, around))
        .collect::<Result<_, _>>()?;
    let Some(offer) = offer(&config.viommus, &decided)? else {
        return Ok(Vec::new());
    };
    let last_id = cpus.apic_ids.last().copied().unwrap_or_default();
    if offer.intremap && !offer.xt && last_id >= FIRST_X2APIC_ID {
        let source = blamed(&config.viommus, |viommu| viommu.xt);
        let problem = format!(
            "remapped interrupts then reach APIC IDs up to 254 only, and this machine has {last_id}; say xt=on, or \
             fewer cpus"
        );
        return Err(source.wrong("xt", problem));
    }
    let mut plans = Vec::with_capacity(config.viommus.len());
    for (index, (viommu, decided)) in config.viommus.iter().zip(decided).enumerate() {
        let doorbell = viommu.doorbell.unwrap_or(Doorbell::Exit);
        plans.push(plan(index, decided, offer, doorbell, around.mapped));
    }
    if offer.intremap {
        let index = ioapic_unit(&plans).ok_or_else(|| {
            let problem = "none of the IOMMUs is in PCI segment 0, where the IOAPIC is; say intremap=off, or \
                           add one on a root complex of segment 0";
            let last = config.viommus.last().expect("an offer is somebody's");
            last.source().wrong("on", problem)
        })?;
        plans[index].remaps_ioapic = true;
    }
    Ok(plans)
}

fn on(switch: Option<Switch>, default: bool) -> bool {
    switch.map_or(default, |switch| switch.0)
}

/// Whether all IOMMUs are to serve guests of the guest's. What one does not offer, none does.
pub(super) fn serve_guests(viommus: &[Viommu]) -> bool {
    !viommus.is_empty() && viommus.iter().all(|viommu| on(viommu.virtualizable, false))
}

/// What works IOMMU number `index` of `config`.
fn decide(config: &Config, index: usize, around: &Around<'_>) -> Result<Decided, ConfigError> {
    let viommu = &config.viommus[index];
    let decided = |mode, because, hardware| Decided {
        mode,
        because,
        hardware,
    };
    if let Some(mode @ (Said::Emulated | Said::Simulated)) = viommu.mode {
        if viommu.abi.is_some() {
            let problem = "only an IOMMU that a unit of the host's serves is made by the kernel; leave it out, or say \
                           mode=hw";
            return Err(viommu.source().wrong("abi", problem));
        }
        let mode = match mode {
            Said::Simulated => ViommuMode::Simulated,
            _ => ViommuMode::Emulated,
        };
        return Ok(decided(mode, None, None));
    }
    let (root, name, _) = find(&around.mapped.pci, index);
    let behind = Behind::new(root, around.devices);
    if viommu.mode == Some(Said::Hardware) {
        let (found, against) = hardware::said(viommu, name, &behind, around.names, around.host)?;
        return Ok(decided(ViommuMode::Hardware, against, Some(found)));
    }
    let auto = |why: String| Some(format!("auto: {why}"));
    Ok(match hardware::automatic(config, viommu, &behind, around.host)? {
        Ok((found, why)) => decided(ViommuMode::Hardware, auto(why), Some(found)),
        Err(why) => decided(ViommuMode::Emulated, auto(why), None),
    })
}

/// What all units that serve those of `decided` have; `None` where none serves.
fn served(decided: &[Decided]) -> Option<HostFeatures> {
    let each = decided.iter().filter_map(|decided| match &decided.hardware {
        Some(hardware) => Some(hardware.features),
        None => (decided.mode == ViommuMode::Simulated).then(sim::features),
    });
    each.reduce(common)
}

/// What all of `viommus` offer, worked as was `decided`: Linux uses only what each of them has, and expects that to be
/// told alike. `None` when there are none.
fn offer(viommus: &[Viommu], decided: &[Decided]) -> Result<Option<ViommuOffer>, ConfigError> {
    let served = served(decided);
    // Of the two modes that are served, the one that has less.
    let mode = [ViommuMode::Hardware, ViommuMode::Simulated]
        .into_iter()
        .find(|mode| decided.iter().any(|decided| decided.mode == *mode));
    let mut all: Option<ViommuOffer> = None;
    for (viommu, of) in viommus.iter().zip(decided) {
        let one = match mode {
            Some(mode) => asked_beside_served(viommu, of.mode, mode)?,
            None => asked(viommu)?,
        };
        let one = ViommuOffer { served, ..one };
        all = Some(match all {
            None => one,
            Some(all) => ViommuOffer {
                xt: all.xt && one.xt,
                page_table: both(all.page_table, one.page_table).ok_or_else(|| {
                    let problem = "another IOMMU has the other format, and a guest uses one for all of them";
                    viommu.source().wrong("page-table", problem)
                })?,
                intremap: all.intremap && one.intremap,
                pasid_bits: all.pasid_bits.min(one.pasid_bits),
                ats: all.ats && one.ats,
                np_cache: all.np_cache || one.np_cache,
                five_levels: false,
                virtualizable: all.virtualizable && one.virtualizable,
                large_irt: all.large_irt && one.large_irt,
                served,
            },
        });
    }
    Ok(all)
}

/// What one of them was asked to offer.
fn asked(viommu: &Viommu) -> Result<ViommuOffer, ConfigError> {
    let bits = viommu.pasid_bits.unwrap_or(0);
    let page_table = viommu.page_table.unwrap_or(PageTable::Any);
    let pasid_bits = u8::try_from(bits)
        .ok()
        .filter(|_| bits <= MOST_PASID_BITS)
        .ok_or_else(|| {
            let problem = format!("must be 0 to {MOST_PASID_BITS}");
            viommu.source().wrong("pasid-bits", problem)
        })?;
    if pasid_bits > 0 && page_table == PageTable::V1 {
        let problem = "process address spaces have v2 tables; say page-table=any or v2, or pasid-bits=0";
        return Err(viommu.source().wrong("pasid-bits", problem));
    }
    let virtualizable = on(viommu.virtualizable, false);
    if virtualizable && page_table == PageTable::V1 {
        let problem = "guests of the guest's have v2 tables; say page-table=any or v2, or leave this out";
        return Err(viommu.source().wrong("virtualizable", problem));
    }
    let intremap = on(viommu.intremap, true);
    let large_irt = on(viommu.large_irt, false);
    if large_irt && !intremap {
        let problem =
            "a guest that is not told of remapping makes no tables; leave this out, or say intremap=on";
        return Err(viommu.source().wrong("large-irt", problem));
    }
    Ok(ViommuOffer {
        xt: on(viommu.xt, true),
        page_table,
        intremap,
        pasid_bits,
        ats: on(viommu.ats, false),
        np_cache: on(viommu.np_cache, false),
        five_levels: false,
        virtualizable,
        large_irt,
        served: None,
    })
}

/// What `viommu` asks for that no unit that is served by `mode` has, what it would have to be, and why: such a unit has its
/// tables of the IOMMU's own format for guest physical memory, and no remapping of a guest's interrupts. In mode `hw`, what
/// is before it has no translation services either.
pub(super) fn against_served(
    viommu: &Viommu,
    mode: ViommuMode,
) -> Option<(&'static str, &'static str, &'static str)> {
    const NONE_DOES: &str = "no unit offers what one does not";
    const NO_SERVICES: &str = "functions of the host show a guest no ATS, PRI or PASID";
    let hardware = mode == ViommuMode::Hardware;
    let asked = [
        (
            viommu.page_table == Some(PageTable::V1),
            "page-table",
            "must be v2",
            NONE_DOES,
        ),
        (on(viommu.intremap, false), "intremap", "must be off", NONE_DOES),
        (
            hardware && on(viommu.ats, false),
            "ats",
            "must be off",
            NO_SERVICES,
        ),
        (
            on(viommu.virtualizable, false),
            "virtualizable",
            "must be off",
            NONE_DOES,
        ),
        (on(viommu.large_irt, false), "large-irt", "must be off", NONE_DOES),
        (
            hardware && viommu.pasid_bits.is_some_and(|bits| bits > 0),
            "pasid-bits",
            "must be 0",
            NO_SERVICES,
        ),
    ];
    let against = asked.into_iter().find(|(asked, ..)| *asked);
    against.map(|(_, key, must, why)| (key, must, why))
}

/// What one of them, of `mode`, was asked to offer in a machine in which one of mode `served` is.
fn asked_beside_served(
    viommu: &Viommu,
    mode: ViommuMode,
    served: ViommuMode,
) -> Result<ViommuOffer, ConfigError> {
    if let Some((key, must, why)) = against_served(viommu, served) {
        let problem = format!(
            "{must} with an IOMMU of mode {} in the machine: {why}",
            served.name()
        );
        return Err(viommu.source().wrong(key, problem));
    }
    if mode == ViommuMode::Hardware && viommu.doorbell == Some(Doorbell::Poll) {
        let problem =
            "the doorbell of an IOMMU of mode hw is the hardware's own; say exit, or leave this out";
        return Err(viommu.source().wrong("doorbell", problem));
    }
    Ok(ViommuOffer {
        page_table: PageTable::V2,
        intremap: false,
        ..asked(viommu)?
    })
}

/// The format that suits both; `None` when they exclude each other.
fn both(one: PageTable, other: PageTable) -> Option<PageTable> {
    match (one, other) {
        (PageTable::Any, said) | (said, PageTable::Any) => Some(said),
        (one, other) => (one == other).then_some(one),
    }
}

/// Who switched something off.
fn blamed(viommus: &[Viommu], switch: impl Fn(&Viommu) -> Option<Switch>) -> &Source {
    viommus
        .iter()
        .find(|viommu| !on(switch(viommu), true))
        .expect("it is off because somebody said so")
        .source()
}

fn plan(
    index: usize,
    decided: Decided,
    offer: ViommuOffer,
    doorbell: Doorbell,
    mapped: &Mapped,
) -> ViommuPlan {
    let (root, name, bdf) = find(&mapped.pci, index);
    let own = |kind: NodeKind| matches!(kind, NodeKind::HostBridge | NodeKind::Iommu(_));
    ViommuPlan {
        name: name.to_owned(),
        mode: decided.mode,
        because: decided.because,
        hardware: decided.hardware,
        root_complex: root.name.clone(),
        segment: root.segment,
        bdf,
        mmio: registers(mapped, index),
        guests: guest_registers(mapped, index),
        buses: root.buses.clone(),
        covers: root
            .nodes()
            .filter(|node| !own(node.kind))
            .map(|node| node.name.clone())
            .collect(),
        stands_for: Vec::new(),
        offer,
        remaps_ioapic: false,
        doorbell,
    }
}

/// The function of unit `index`, and its root complex.
fn find(pci: &PciTree, index: usize) -> (&RootComplex, &str, Bdf) {
    pci.roots()
        .find_map(|root| {
            let node = root
                .functions
                .iter()
                .find(|node| node.kind == NodeKind::Iommu(index))?;
            Some((root, node.name.as_str(), node.bdf))
        })
        .expect("the tree has a function for each IOMMU")
}

fn registers(mapped: &Mapped, index: usize) -> GpaRange {
    let all = mapped.layout.viommus.expect("there is room for each IOMMU");
    let start = all.start().0 + index as u64 * emulated::MMIO_LEN;
    GpaRange::new(Gpa(start), emulated::MMIO_LEN)
        .filter(|range| all.contains_range(*range))
        .expect("there is room for each IOMMU")
}

fn guest_registers(mapped: &Mapped, index: usize) -> Option<GuestRegisters> {
    let all = mapped.layout.guest_registers?;
    let start = Gpa(all.start().0 + index as u64 * GuestRegisters::LEN);
    let own = GuestRegisters::at(start).filter(|own| all.contains_range(own.control));
    Some(own.expect("there is room for each IOMMU"))
}

/// Whose the IOAPIC's interrupts are: the unit's that covers bus 0 of segment 0, where the function is as
/// which the IOAPIC sends; or else the first in that segment. The IVRS may name any unit of the segment,
/// and Linux takes the one that it names.
fn ioapic_unit(plans: &[ViommuPlan]) -> Option<usize> {
    let in_segment = |plan: &&ViommuPlan| plan.segment == 0;
    let nearest = plans
        .iter()
        .filter(in_segment)
        .min_by_key(|plan| *plan.buses.start())?;
    plans.iter().position(|plan| plan.name == nearest.name)
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;
    use crate::vm::plan::Plan;

    fn resolved(text: &str) -> Result<Plan, ConfigError> {
        let config = Config::parse(Path::new("m.toml"), text).expect("a machine file");
        Plan::resolve(&config)
    }

    fn plans(text: &str) -> Vec<ViommuPlan> {
        let plan = resolved(text).unwrap_or_else(|error| panic!("{error}"));
        plan.viommus
    }

    fn refused(text: &str) -> String {
        resolved(text).expect_err(text).to_string()
    }

    #[test]
    fn nothing_said_covers_the_first_root_complex_with_everything_linux_uses() {
        let unit = plans("[[viommu]]\n[[root-port]]\n[[rng]]\nport = \"rp0\"\n").remove(0);
        assert_eq!(
            (unit.name.as_str(), unit.root_complex.as_str()),
            ("iommu0", "rc0")
        );
        assert_eq!((unit.bdf.to_string(), unit.buses), ("00:00.2".to_owned(), 0..=7));
        assert_eq!(unit.mmio.to_string(), "feb00000-feb03fff");
        assert_eq!(unit.covers, ["rp0", "rng0", "isa-bridge"]);
        assert!(unit.remaps_ioapic && unit.because.is_some());
        let offer = ViommuOffer {
            xt: true,
            page_table: PageTable::Any,
            intremap: true,
            pasid_bits: 0,
            ats: false,
            np_cache: false,
            five_levels: false,
            virtualizable: false,
            large_irt: false,
            served: None,
        };
        assert_eq!(unit.offer, offer);
    }

    #[test]
    fn every_root_complex_may_have_one_and_each_has_registers_of_its_own() {
        let roots = "[[root-complex]]\n".repeat(3);
        let units = plans(&format!(
            "{roots}[[viommu]]\non = \"rc2\"\n[[viommu]]\n[[viommu]]\non = \"rc1\"\n"
        ));
        let starts: Vec<u64> = units.iter().map(|unit| unit.mmio.start().0).collect();
        assert_eq!(starts, [0xfeb0_0000, 0xfeb0_4000, 0xfeb0_8000]);
        let ioapic: Vec<bool> = units.iter().map(|unit| unit.remaps_ioapic).collect();
        assert_eq!(ioapic, [false, true, false]);
        assert_eq!(
            refused("[[viommu]]\n[[viommu]]\non = \"rc0\"\n"),
            "m.toml:3: viommu.on = rc0: rc0 is covered by iommu0 already, and a root complex has one IOMMU at most"
        );
    }

    #[test]
    fn the_place_of_a_unit_is_its_own() {
        let text = refused("[[viommu]]\n[[rng]]\nslot = \"0.2\"\n");
        assert!(text.contains("iommu0 is there"), "{text}");
        assert!(refused("[[viommu]]\non = \"rc9\"\n").contains("no root complex has this name"));
    }

    #[test]
    fn a_second_unit_on_a_root_complex_is_refused() {
        let text = refused("[[viommu]]\n[[viommu]]\n");
        assert!(text.starts_with("m.toml:2: viommu"), "{text}");
        assert!(text.contains("iommu0"), "{text}");
        let text = refused("[[root-complex]]\nid = \"a\"\n[[viommu]]\non = \"a\"\n[[viommu]]\non = \"a\"\n");
        assert!(text.starts_with("m.toml:6: viommu.on = a"), "{text}");
    }

    #[test]
    fn what_one_unit_does_not_offer_none_does() {
        let two = "[[root-complex]]\n[[root-complex]]\n[[viommu]]\nxt = false\npasid-bits = 8\nats = true\n\
            page-table = \"v2\"\n[[viommu]]\non = \"rc1\"\npasid-bits = 16\nnpcache = true\n";
        let units = plans(two);
        let offer = ViommuOffer {
            xt: false,
            page_table: PageTable::V2,
            intremap: true,
            pasid_bits: 8,
            ats: false,
            np_cache: true,
            five_levels: false,
            virtualizable: false,
            large_irt: false,
            served: None,
        };
        assert!(units.iter().all(|unit| unit.offer == offer));
        let efr = offer.features().efr;
        assert!(!efr.xt() && efr.gt() && efr.gio() && efr.pas_max() == 7);
        let formats = "[[root-complex]]\n[[root-complex]]\n[[viommu]]\npage-table = \"v1\"\n[[viommu]]\n\
            on = \"rc1\"\npage-table = \"v2\"\n";
        assert_eq!(
            refused(formats),
            "m.toml:7: viommu.page-table = v2: another IOMMU has the other format, and a guest uses one for all of \
             them"
        );
    }

    #[test]
    fn process_tables_have_five_levels_where_processors_do_and_there_are_pasids() {
        let gats = |line: &str, processors| {
            let mut plan =
                resolved(&format!("[[viommu]]\n{line}\n")).unwrap_or_else(|error| panic!("{error}"));
            plan.match_processors(processors);
            plan.viommus[0].offer.features().efr.gats()
        };
        assert_eq!(gats("pasid-bits = 16", true), 1);
        assert_eq!(gats("pasid-bits = 16", false), 0);
        assert_eq!(gats("", true), 0);
        assert_eq!(
            gats("pasid-bits = 16\nnpcache = true", true),
            0,
            "the host's have four"
        );
        let plan = resolved("[[viommu]]\npasid-bits = 16\n").unwrap_or_else(|error| panic!("{error}"));
        assert_eq!(
            plan.viommus[0].offer.features().efr.gats(),
            0,
            "nobody has asked the host yet"
        );
    }

    #[test]
    fn large_remapping_tables_are_offered_where_all_units_are_asked_for_them() {
        let two = |first: &str, second: &str| {
            let units = plans(&format!(
                "[[root-complex]]\n[[root-complex]]\n[[viommu]]\n{first}\n[[viommu]]\non = \"rc1\"\n{second}\n"
            ));
            let offered = |unit: &ViommuPlan| unit.offer.features().efr2.num_int_remap();
            [offered(&units[0]), offered(&units[1])]
        };
        assert_eq!(two("large-irt = true", "large-irt = true"), [1, 1]);
        assert_eq!(two("large-irt = true", ""), [0, 0]);
        assert_eq!(two("", "large-irt = true"), [0, 0]);
        assert_eq!(
            refused("[[viommu]]\nlarge-irt = true\nintremap = false\n"),
            "m.toml:2: viommu.large-irt = on: a guest that is not told of remapping makes no tables; leave this out, or \
             say intremap=on"
        );
    }

    #[test]
    fn v1_tables_alone_offer_no_guest_tables() {
        let unit = plans("[[viommu]]\npage-table = \"v1\"\n").remove(0);
        let efr = unit.offer.features().efr;
        assert!(!efr.gt() && !efr.gio());
    }

    #[test]
    fn the_ioapics_interrupts_are_those_of_a_unit_in_segment_0() {
        let beside = plans("[[root-complex]]\n[[root-complex]]\n[[viommu]]\non = \"rc1\"\n");
        assert!(beside[0].remaps_ioapic);
        let elsewhere = "[[root-complex]]\n[[root-complex]]\nsegment = 1\n[[viommu]]\non = \"rc1\"\n";
        assert!(
            refused(elsewhere)
                .starts_with("m.toml:5: viommu.on = rc1: none of the IOMMUs is in PCI segment 0")
        );
        let without = plans(&format!("{elsewhere}intremap = false\n"));
        assert!(!without[0].remaps_ioapic);
    }

    #[test]
    fn beside_a_served_unit_none_offers_what_it_cannot() {
        let roots = "[[root-complex]]\n".repeat(2);
        let both = format!("{roots}[[viommu]]\nmode = \"sim\"\n[[viommu]]\non = \"rc1\"\n");
        let units = plans(&both);
        let modes: Vec<_> = units.iter().map(|unit| unit.mode).collect();
        assert_eq!(modes, [ViommuMode::Simulated, ViommuMode::Emulated]);
        let offer = units[0].offer;
        assert_eq!((offer.page_table, offer.intremap), (PageTable::V2, false));
        assert!(
            offer.served.is_some() && units[1].offer == offer && !units.iter().any(|unit| unit.remaps_ioapic)
        );
        for (line, problem) in [
            (
                "page-table = \"v1\"",
                "viommu.page-table = v1: must be v2 with an IOMMU of mode sim",
            ),
            ("intremap = true", "viommu.intremap = on: must be off with"),
            (
                "virtualizable = true",
                "viommu.virtualizable = on: must be off with",
            ),
            ("large-irt = true", "viommu.large-irt = on: must be off with"),
        ] {
            let text = refused(&format!("{both}{line}\n"));
            assert!(text.contains(problem), "{line}: {text}");
        }
        // The model has translation services, for as many as all of them want.
        let services = "ats = true\npasid-bits = 8\n";
        let offer = |text: &str| plans(text).remove(0).offer;
        let one = offer(&format!("[[viommu]]\nmode = \"sim\"\n{services}"));
        assert!(one.ats && one.pasid_bits == 8);
        let features = one.features();
        assert!(features.header.iotlb() && features.efr.ppr() && features.efr.eph());
        assert_eq!(features.efr.pas_max(), 7);
        let one = offer(&format!("{both}{services}"));
        assert!(!one.ats && one.pasid_bits == 0, "the other wants none");
        let units = plans(&format!("{both}doorbell = \"poll\"\n"));
        assert_eq!(units[1].doorbell, Doorbell::Poll);
        let units = plans("[[viommu]]\nmode = \"sim\"\ndoorbell = \"poll\"\n");
        assert_eq!(units[0].doorbell, Doorbell::Poll, "the model's own");
    }

    #[test]
    fn units_that_serve_guests_say_so_alike_and_have_room_for_their_registers() {
        let two = |first: &str, second: &str| {
            plans(&format!(
                "[[root-complex]]\n[[root-complex]]\n[[viommu]]\n{first}\n[[viommu]]\non = \"rc1\"\n{second}\n"
            ))
        };
        let units = two("virtualizable = true", "virtualizable = true");
        for (unit, pages) in units.iter().zip([0x1_0000_0000, 0x1_2000_0000]) {
            let features = unit.offer.features();
            assert!(features.efr.viommu() && features.efr2.gcr3_trp_mode());
            let guests = unit.guests.expect("it serves guests");
            assert_eq!(
                (guests.pages.start(), guests.pages.len()),
                (Gpa(pages), 256 << 20)
            );
            assert_eq!(guests.control.start(), Gpa(pages + (256 << 20)));
            assert_eq!(guests.control.len(), 4 << 20);
        }
        for unit in two("virtualizable = true", "").iter().chain(&two("", "")) {
            assert!(!unit.offer.virtualizable && unit.guests.is_none());
        }
        assert_eq!(
            refused("[[viommu]]\nvirtualizable = true\npage-table = \"v1\"\n"),
            "m.toml:2: viommu.virtualizable = on: guests of the guest's have v2 tables; say page-table=any or v2, or \
             leave this out"
        );
    }

    #[test]
    fn each_units_doorbell_is_its_own() {
        let roots = "[[root-complex]]\n".repeat(2);
        let units = plans(&format!(
            "{roots}[[viommu]]\n[[viommu]]\non = \"rc1\"\ndoorbell = \"poll\"\n"
        ));
        let doorbells: Vec<_> = units.iter().map(|unit| unit.doorbell).collect();
        assert_eq!(doorbells, [Doorbell::Exit, Doorbell::Poll]);
    }

    #[test]
    fn values_out_of_range_are_refused_by_their_key() {
        let with = |line: &str| refused(&format!("[[viommu]]\n{line}\n"));
        assert_eq!(
            with("pasid-bits = 17"),
            "m.toml:2: viommu.pasid-bits = 17: must be 0 to 16"
        );
        assert!(
            with("pasid-bits = 1\npage-table = \"v1\"").contains("process address spaces have v2 tables")
        );
        assert!(with("mode = \"hw\"").contains("no function of the host is behind it"));
        let text = refused("cpus = 256\n[[viommu]]\nxt = false\n");
        assert!(
            text.starts_with("m.toml:3: viommu.xt = off: remapped interrupts"),
            "{text}"
        );
        assert_eq!(plans("cpus = 256\n[[viommu]]\n").len(), 1);
    }
}
