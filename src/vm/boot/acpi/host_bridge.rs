//! One host bridge object per root complex: its buses and windows, its interrupt routes, and the two
//! methods by which the guest learns that PCI Express is its own to drive and the assignment is to be kept.
//!
//! PCI Firmware Specification 3.3, sections 4.5 and 4.6; ACPI specification 6.5, section 6.2.

use std::collections::BTreeSet;

use acpi_tables::Aml;
use acpi_tables::aml::{
    And, Arg, BufferData, CreateDWordField, Device, EISAName, Else, Equal, If, Local, Method, Name, NotEqual,
    ONE, Or, PackageBuilder, Path, ResourceTemplate, Return, Store, Uuid, ZERO,
};

use super::board;
use super::resource::{buses, memory_window, port_window, ports};
use crate::pci::tree::{Pin, RootComplex};

/// Host Bridge Device `_OSC` (PCI Firmware 4.5.1).
const OSC_UUID: &str = "33db4d5b-1ff7-401c-9657-7441c03dd766";
/// PCI `_DSM` (PCI Firmware 4.6.1).
const DSM_UUID: &str = "e5c937d0-3553-4d7a-9117-ea4d19c3434d";
/// Function index of "ignore PCI boot configurations" (PCI Firmware 4.6.5).
const DSM_BOOT_CONFIGURATION: u8 = 5;

/// Every control a guest can ask for up to DPC (PCI Firmware, table 4-6): native hot-plug, SHPC, PME, AER,
/// the capability structure, LTR and DPC. No firmware runs beside the guest that could keep one for itself.
const OSC_GRANTED: u8 = 0b1011_1111;
/// `_OSC` status: the UUID is not known.
const OSC_UNKNOWN_UUID: u8 = 1 << 2;
/// `_OSC` status: the revision is not known.
const OSC_UNKNOWN_REVISION: u8 = 1 << 3;
/// `_OSC` status: a capability was masked.
const OSC_MASKED: u8 = 1 << 4;

/// The object for `root`, the `index`th of the machine.
pub(super) fn to_aml_bytes(root: &RootComplex, index: usize) -> Vec<u8> {
    let hid = Name::new("_HID".into(), &EISAName::new("PNP0A08"));
    let cid = Name::new("_CID".into(), &EISAName::new("PNP0A03"));
    let uid = Name::new("_UID".into(), &root.uid);
    let segment = Name::new("_SEG".into(), &root.segment);
    let first_bus = Name::new("_BBN".into(), &root.first_bus());
    let resources = Name::new("_CRS".into(), &Resources(root));
    let routes = Name::new("_PRT".into(), &routes(root));
    let mut bytes = Vec::new();
    Device::new(
        path(index),
        vec![
            &hid,
            &cid,
            &uid,
            &segment,
            &first_bus,
            &resources,
            &routes,
            &OperatingSystemCapabilities,
            &DeviceSpecific,
        ],
    )
    .to_aml_bytes(&mut bytes);
    bytes
}

/// `P000`, `P001` and so on, in tree order.
fn path(index: usize) -> Path {
    assert!(index <= 0xfff, "the plan has at most 4,096 root complexes");
    Path::new(&format!("P{index:03X}"))
}

/// `_CRS`: the bus range and the windows.
struct Resources<'a>(&'a RootComplex);

impl Aml for Resources<'_> {
    fn to_aml_bytes(&self, sink: &mut dyn acpi_tables::AmlSink) {
        let Self(root) = self;
        let buses = buses(&root.buses);
        let windows = &root.windows;
        let mut children: Vec<Box<dyn Aml>> = vec![Box::new(buses)];
        if root.segment == 0 && root.first_bus() == 0 {
            let configuration = ports(board::CONFIG_PORTS, board::CONFIG_PORTS_LEN);
            children.push(Box::new(configuration));
        }
        children.extend(windows.io.map(|w| Box::new(port_window(w)) as Box<dyn Aml>));
        let memory = [windows.mem32, windows.mem64].into_iter().flatten();
        children.extend(memory.map(|w| Box::new(memory_window(w)) as Box<dyn Aml>));
        ResourceTemplate::new(children.iter().map(Box::as_ref).collect()).to_aml_bytes(sink);
    }
}

/// `_PRT`: the I/O APIC input of each pin of each device on the root bus. All four pins, whatever the
/// functions there use: those behind a port reach it swizzled.
fn routes(root: &RootComplex) -> PackageBuilder {
    let devices: BTreeSet<u8> = root.functions.iter().map(|node| node.bdf.device()).collect();
    let mut routes = PackageBuilder::new();
    for device in devices {
        for pin in Pin::ALL {
            let mut route = PackageBuilder::new();
            // Any function of the device.
            route.add_element(&(u32::from(device) << 16 | 0xffff));
            route.add_element(&(pin as u8 - 1));
            // No link device: the next element is the input itself.
            route.add_element(&ZERO);
            route.add_element(&root.intx_gsi(device, pin));
            routes.add_element(&route);
        }
    }
    routes
}

/// `_OSC`: grants every control there is, and says so when more was asked for.
struct OperatingSystemCapabilities;

impl Aml for OperatingSystemCapabilities {
    fn to_aml_bytes(&self, sink: &mut dyn acpi_tables::AmlSink) {
        let (uuid, revision, capabilities) = (Arg(0), Arg(1), Arg(3));
        let (status, control) = (Path::new("CDW1"), Path::new("CDW3"));
        let granted = Local(0);
        Method::new(
            "_OSC".into(),
            4,
            // Serialized: it creates named fields.
            true,
            vec![
                &CreateDWordField::new(&status, &capabilities, &ZERO),
                &If::new(
                    &Equal::new(&uuid, &Uuid::new(OSC_UUID)),
                    vec![
                        &CreateDWordField::new(&control, &capabilities, &8_u8),
                        &And::new(&granted, &control, &OSC_GRANTED),
                        &If::new(
                            &NotEqual::new(&revision, &ONE),
                            vec![&Or::new(&status, &status, &OSC_UNKNOWN_REVISION)],
                        ),
                        &If::new(
                            &NotEqual::new(&granted, &control),
                            vec![&Or::new(&status, &status, &OSC_MASKED)],
                        ),
                        &Store::new(&control, &granted),
                    ],
                ),
                &Else::new(vec![&Or::new(&status, &status, &OSC_UNKNOWN_UUID)]),
                &Return::new(&capabilities),
            ],
        )
        .to_aml_bytes(sink);
    }
}

/// `_DSM`: function 5 returns 0, "keep the boot configuration"; function 0 says that there is a function 5.
struct DeviceSpecific;

impl Aml for DeviceSpecific {
    fn to_aml_bytes(&self, sink: &mut dyn acpi_tables::AmlSink) {
        let (uuid, function) = (Arg(0), Arg(2));
        let functions = BufferData::new(vec![1 | 1 << DSM_BOOT_CONFIGURATION]);
        let none = BufferData::new(vec![0]);
        Method::new(
            "_DSM".into(),
            4,
            false,
            vec![
                &If::new(
                    &Equal::new(&uuid, &Uuid::new(DSM_UUID)),
                    vec![
                        &If::new(&Equal::new(&function, &ZERO), vec![&Return::new(&functions)]),
                        &If::new(
                            &Equal::new(&function, &DSM_BOOT_CONFIGURATION),
                            vec![&Return::new(&ZERO)],
                        ),
                    ],
                ),
                &Return::new(&none),
            ],
        )
        .to_aml_bytes(sink);
    }
}
