//! A passed function over a device whose registers and failures the test chooses.

mod ends;
mod interrupts;
mod peers;

use std::sync::Mutex;

use super::host::RegionInfo;
use super::testing::{Asked, Device, EXPRESS, GuestSpace, MSI, MSIX, PM, Told, nic_config};
use super::*;
use crate::iommu::iommufd::testing::Host;
use crate::pci::testing::Messages;
use crate::pci::tree::BarKind;
use crate::platform::irq::InterruptController;
use crate::platform::memory::GuestRam;
use crate::platform::msi::MsiMessage;
use vm_memory::{GuestAddress, GuestMemoryMmap};

const IDENTITY: Identity = Identity {
    vendor: 0x8086,
    device: 0x10d3,
    class: 0x02_0000,
    revision: 2,
    subsystem_vendor: 0x8086,
    subsystem: 0xa01f,
};
const FIRST_MESSAGE: [u32; 4] = [0xfee0_1000, 0, 0x41, 0];

fn bars() -> Vec<BarSpec> {
    let memory = BarKind::Mem32 { prefetchable: false };
    [(0, memory, 0x2_0000), (2, BarKind::Io, 0x20), (3, memory, 0x4000)]
        .map(|(index, kind, size)| BarSpec { index, kind, size })
        .to_vec()
}

/// The levels of the wire, in order.
#[derive(Default)]
struct Wires(Mutex<Vec<bool>>);

impl Wires {
    fn levels(&self) -> Vec<bool> {
        std::mem::take(&mut self.0.lock().expect("not poisoned"))
    }
}

impl InterruptController for Wires {
    fn line_changed(&self, _gsi: u32, asserted: bool) {
        self.0.lock().expect("not poisoned").push(asserted);
    }
    fn pulse(&self, _gsi: u32) {}
}

/// A function, what is behind it and what is around it.
struct Bench {
    device: Arc<Device>,
    messages: Arc<Messages>,
    space: Arc<GuestSpace>,
    host: Arc<Host>,
    wires: Arc<Wires>,
    function: Arc<VfioFunction>,
}

fn parts(
    device: Arc<Device>,
    bench: (&Arc<Messages>, &Arc<GuestSpace>, &Arc<Host>, &Arc<Wires>),
) -> VfioParts {
    let (messages, space, host, wires) = bench;
    let ram = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 0x1000)]).expect("a page");
    VfioParts {
        name: "vfio0".to_owned(),
        host: Lent::new(device),
        reset_with: None,
        space: Arc::new(Ioas::new(host.clone(), GuestRam::new(ram)).expect("made")),
        has_peers: true,
        identity: IDENTITY,
        bars: bars(),
        memory: space.clone(),
        msi: messages.port(),
        intx: Some((Pin::A, IrqLine::new(wires.clone(), 17))),
        on_root_bus: false,
    }
}

fn try_bench(device: Device) -> Result<Bench, HostError> {
    let (messages, space, host) = (Messages::new(), GuestSpace::new(), Host::new());
    let (wires, device) = (Arc::new(Wires::default()), Arc::new(device));
    let parts = parts(device.clone(), (&messages, &space, &host, &wires));
    Ok(Bench {
        function: VfioFunction::new(parts)?,
        device,
        messages,
        space,
        host,
        wires,
    })
}

fn bench_with(device: Device) -> Bench {
    let bench = try_bench(device).unwrap_or_else(|error| panic!("{error}"));
    bench.device.told();
    bench
}

fn bench() -> Bench {
    bench_with(Device::with(&nic_config()))
}

impl Bench {
    fn write(&self, byte: u16, bytes: &[u8]) -> ConfigEffect {
        let write = DwordWrite::new(usize::from(byte % 4), bytes).expect("inside a dword");
        self.function.config_write(byte / 4, write)
    }

    fn write_dword(&self, byte: u16, value: u32) -> ConfigEffect {
        self.function.config_write(byte / 4, DwordWrite::whole(value))
    }

    fn read(&self, byte: u16) -> u32 {
        self.function.config_read(byte / 4)
    }

    fn table(&self, vector: u64, entry: [u32; 4]) {
        for (at, dword) in (0..).zip(entry) {
            let offset = vector * 16 + at * 4;
            self.function.bar_write(3, offset, &dword.to_le_bytes());
        }
    }

    fn pending(&self) -> u32 {
        let mut bytes = [0; 4];
        self.function.bar_read(3, 0x2000, &mut bytes);
        u32::from_le_bytes(bytes)
    }

    fn enable_msix(&self) {
        let _effect = self.write(MSIX + 2, &[0x04, 0x80]);
    }
}

fn set(kind: Interrupt, first: u32, listened: &[bool]) -> Told {
    Told::Interrupts(kind, first, listened.to_vec())
}

#[test]
fn the_device_decodes_from_the_start_and_issues_nothing() {
    let bench = try_bench(Device::with(&nic_config())).expect("made");
    let told = bench.device.told();
    // Memory, ports; interrupts and all else as the device had it; no Bus Master Enable.
    assert_eq!(told[0], Told::Config(4, vec![0x03, 0x04]));
    // What MSI there is to give is found out; then the wire.
    let (tried, off) = (set(Interrupt::Msi, 0, &[false]), Told::Disabled(Interrupt::Msi));
    assert_eq!(told[1..], [tried, off, set(Interrupt::Intx, 0, &[true])]);
    assert_eq!(bench.read(4) & 0xffff, 0);
}

#[test]
fn a_device_that_answers_all_ones_or_nothing_is_refused() {
    let text = |device| try_bench(device).err().expect("refused");
    let gone = text(Device::with(&[0xff; 4096]));
    assert_eq!(gone.to_string(), "cannot read the configuration space of vfio0");
    assert!(gone.source.to_string().contains("the device is gone or off"));
    let mute = Device::with(&nic_config());
    mute.refuse(Asked::Read, libc::EIO);
    assert_eq!(text(mute).source.raw_os_error(), Some(libc::EIO));
    assert!(
        text(Device::with(&[]))
            .source
            .to_string()
            .contains("it has 0 bytes")
    );
    let deaf = Device::with(&nic_config());
    deaf.refuse(Asked::Write, libc::EIO);
    assert_eq!(text(deaf).to_string(), "cannot switch the BARs of vfio0 on");
}

#[test]
fn a_bar_of_another_size_than_planned_is_refused_by_number() {
    let info = RegionInfo {
        size: 0x1000,
        mappable: Vec::new(),
    };
    let device = Device::with(&nic_config()).region(Region::Bar(3), info);
    let error = try_bench(device).err().expect("refused");
    assert_eq!(error.to_string(), "cannot pass BAR 3 of vfio0 through");
    assert_eq!(
        error.source.to_string(),
        "the host has 0x1000 bytes there, 0x4000 were planned"
    );
}

#[test]
fn memory_is_mapped_in_pages_around_the_table_and_follows_the_bar() {
    let bench = bench();
    bench.function.bar_moved(3, Some(Gpa(0x10_0000)));
    bench.function.bar_moved(0, Some(Gpa(0x20_0000)));
    assert_eq!(
        bench.space.mapped(),
        [(0x10_1000, 0x1000), (0x10_3000, 0x1000), (0x20_0000, 0x2_0000)]
    );
    bench.function.bar_moved(3, Some(Gpa(0x30_0000)));
    bench.function.bar_moved(0, None);
    assert_eq!(bench.space.mapped(), [(0x30_1000, 0x1000), (0x30_3000, 0x1000)]);
    drop(bench.function);
    assert_eq!(bench.space.mapped(), []);
}

#[test]
fn what_the_host_does_not_map_is_trapped_and_works() {
    let device = Device::with(&nic_config());
    device.refuse(Asked::Map, libc::ENOMEM);
    let bench = bench_with(device);
    bench.function.bar_moved(0, Some(Gpa(0x20_0000)));
    assert_eq!(bench.space.mapped(), []);
    let mut bytes = [0; 4];
    bench.function.bar_read(0, 0x100, &mut bytes);
    assert_eq!(bytes, [0x40; 4]);
    bench.function.bar_write(0, 0x104, &[1, 2, 3, 4]);
    assert_eq!(bench.device.told(), [Told::Bar(0, 0x104, vec![1, 2, 3, 4])]);
}

#[test]
fn memory_that_kvm_does_not_take_is_trapped() {
    let bench = bench();
    bench.space.refuse();
    bench.function.bar_moved(0, Some(Gpa(0x20_0000)));
    assert_eq!(bench.space.mapped(), []);
}

#[test]
fn clearing_memory_decode_takes_the_bars_from_the_guest_and_nothing_from_the_device() {
    let bench = bench();
    assert_eq!(bench.write(4, &[0x07, 0]), ConfigEffect::DECODING);
    assert_eq!(
        bench.function.command(),
        Command::IO | Command::MEMORY | Command::BUS_MASTER
    );
    assert_eq!(bench.write(4, &[0, 0]), ConfigEffect::DECODING);
    assert_eq!(bench.function.command(), Command::empty());
    assert_eq!(bench.device.told(), []);
}

#[test]
fn bus_mastering_reaches_the_device_once_per_change() {
    let bench = bench();
    bench.function.bus_mastering(true);
    bench.function.bus_mastering(true);
    bench.function.bus_mastering(false);
    let command = |low| Told::Config(4, vec![low, 0x04]);
    assert_eq!(bench.device.told(), [command(0x07), command(0x03)]);
}

#[test]
fn bars_are_sized_and_moved_without_the_device() {
    let bench = bench();
    assert_eq!(bench.write_dword(0x10, u32::MAX), ConfigEffect::empty());
    assert_eq!(bench.read(0x10), 0xfffe_0000);
    let _effect = bench.write_dword(0x18, u32::MAX);
    assert_eq!(
        (bench.read(0x18), bench.read(0x14), bench.read(0x30)),
        (0xffff_ffe1, 0, 0)
    );
    let _effect = bench.write(4, &[2, 0]);
    assert_eq!(bench.write_dword(0x10, 0xe000_0000), ConfigEffect::DECODING);
    assert_eq!(bench.device.told(), []);
}

#[test]
fn writes_of_any_width_over_msi_msix_pm_and_command_reach_no_device() {
    let bench = bench();
    for start in [0x04, PM, MSI, MSIX, 0x00, 0x0c, 0x2c, 0x30, 0x34, 0x3c] {
        for byte in start..(start + 16).min(0x100) {
            for len in 1..=usize::from(4 - byte % 4) {
                let _effect = bench.write(byte, &[0xff; 4][..len]);
            }
        }
    }
    let to_config = bench
        .device
        .told()
        .into_iter()
        .filter(|told| matches!(told, Told::Config(..)));
    assert_eq!(to_config.count(), 0);
    assert_eq!((bench.read(0), bench.read(8) >> 8), (0x10d3_8086, 0x02_0000));
    assert_eq!(
        (bench.read(MSIX) & 0xffff, bench.read(MSIX + 4)),
        (0x0011 | u32::from(PM) << 8, 3)
    );
}

#[test]
fn of_device_control_the_device_hears_what_concerns_its_requests() {
    let bench = bench();
    bench.device.set_config(EXPRESS + 8, &[0x1f, 0x20, 0, 0]);
    let effect = bench.write(EXPRESS + 8, &[0xff, 0x7f]);
    assert_eq!(effect, ConfigEffect::empty());
    assert_eq!(
        bench.device.told(),
        [Told::Config((EXPRESS + 8).into(), vec![0x1f, 0x79])]
    );
    assert_eq!(bench.read(EXPRESS + 8) & 0xffff, 0x7fff);
    assert_eq!(bench.write(EXPRESS + 9, &[0x80]), ConfigEffect::FUNCTION_RESET);
    // One byte at a time.
    assert_eq!(
        bench.device.told(),
        [Told::Config((EXPRESS + 9).into(), vec![0x00])]
    );
}

#[test]
fn a_function_that_sleeps_answers_configuration_only_and_its_device_stays_awake() {
    let bench = bench();
    let _effect = bench.write(4, &[0x07, 0]);
    assert_eq!(bench.write(PM + 4, &[3]), ConfigEffect::DECODING);
    assert_eq!(bench.function.command(), Command::empty());
    assert_eq!(bench.write(PM + 4, &[1]), ConfigEffect::empty());
    assert_eq!(bench.read(PM + 4) & 3, 3);
    assert_eq!(bench.write(PM + 4, &[0]), ConfigEffect::DECODING);
    assert_eq!(bench.device.told(), []);
}

#[test]
fn a_vector_gets_its_route_before_its_eventfd_and_each_once() {
    let bench = bench();
    bench.enable_msix();
    // The wire goes before messages come; one vector switches MSI-X on.
    assert_eq!(
        bench.device.told(),
        [Told::Disabled(Interrupt::Intx), set(Interrupt::Msix, 0, &[false])]
    );
    bench.table(2, FIRST_MESSAGE);
    assert_eq!(bench.device.told(), [set(Interrupt::Msix, 2, &[true])]);
    let routes = bench.messages.routes();
    let sent = routes[0].history();
    assert_eq!(
        sent.iter()
            .flatten()
            .map(|message| message.data)
            .collect::<Vec<_>>(),
        [0x41]
    );
    assert!(bench.device.interrupt(Interrupt::Msix, 2));
    assert_eq!(routes[0].signals(), 1);
    assert!(!bench.device.interrupt(Interrupt::Msix, 0));
    // Another message: the route changes, the device hears nothing.
    bench.table(2, [0xfee0_2000, 0, 0x42, 0]);
    assert_eq!(bench.device.told(), []);
}

#[test]
fn a_host_that_cannot_add_vectors_gets_all_of_them_at_once() {
    let device = Device::with(&nic_config()).interrupting(Interrupt::Msix, 5, false);
    let bench = bench_with(device);
    bench.enable_msix();
    assert_eq!(bench.device.told()[1], set(Interrupt::Msix, 0, &[false; 5]));
    bench.table(4, FIRST_MESSAGE);
    assert_eq!(bench.device.told(), [set(Interrupt::Msix, 4, &[true])]);
}

#[test]
fn a_masked_vector_shows_what_it_owes_and_delivers_it_later() {
    let bench = bench();
    bench.enable_msix();
    bench.table(1, FIRST_MESSAGE);
    bench.table(1, [0xfee0_1000, 0, 0x41, 1]);
    let route = &bench.messages.routes()[0];
    assert_eq!(route.history().last(), Some(&None));
    assert_eq!(bench.pending(), 0);
    assert!(bench.device.interrupt(Interrupt::Msix, 1));
    assert_eq!(bench.pending(), 2);
    bench.table(1, FIRST_MESSAGE);
    assert!(route.history().last().is_some_and(Option::is_some));
    // Left for the kernel, which looks when the route comes on.
    assert_eq!((bench.pending(), route.signals()), (0, 1));
}

#[test]
fn the_function_mask_masks_all_of_them() {
    let bench = bench();
    bench.enable_msix();
    bench.table(0, FIRST_MESSAGE);
    bench.table(3, FIRST_MESSAGE);
    let _effect = bench.write(MSIX + 3, &[0xc0]);
    assert!(bench.device.interrupt(Interrupt::Msix, 0) && bench.device.interrupt(Interrupt::Msix, 3));
    assert_eq!(bench.pending(), 0b1001);
    let _effect = bench.write(MSIX + 3, &[0x80]);
    assert_eq!(bench.pending(), 0);
}

#[test]
fn a_32_bit_write_to_message_control_switches_msix_on() {
    let bench = bench();
    assert_eq!(bench.write_dword(MSIX, 0x8000_0000), ConfigEffect::INTERRUPTS);
    assert_eq!(bench.device.told()[1], set(Interrupt::Msix, 0, &[false]));
}

#[test]
fn the_table_takes_every_width_at_every_offset_and_its_page_end_is_the_devices() {
    let bench = bench();
    for offset in (0..0x60).chain(0x1ff8..0x2010) {
        for len in 1..=8 {
            let mut bytes = [0; 8];
            bench.function.bar_write(3, offset, &[0xa5; 8][..len]);
            bench.function.bar_read(3, offset, &mut bytes[..len]);
        }
    }
    let mut bytes = [0; 4];
    bench.function.bar_read(3, 0x50, &mut bytes);
    assert_eq!(bytes, [0x43; 4]);
    // Table and pending bits are ours: the device hears of no write inside them.
    let inside =
        |told: &Told| matches!(told, Told::Bar(3, at, _) if *at < 0x50 || (0x2000..0x2008).contains(at));
    assert!(!bench.device.told().iter().any(inside));
    bench.function.bar_read(3, 0, &mut bytes);
    assert_eq!(bytes, [0xa4, 0xa5, 0xa5, 0xa5]);
}

#[test]
fn pending_bits_ignore_writes() {
    let bench = bench();
    bench.enable_msix();
    bench.function.bar_write(3, 0x2000, &[0xff; 8]);
    assert_eq!(bench.pending(), 0);
}

#[test]
fn msi_has_its_route_and_comes_and_goes_with_its_enable_bit() {
    let bench = bench();
    let _effect = bench.write_dword(MSI + 4, 0xfee0_3000);
    let _effect = bench.write(MSI + 12, &[0x51, 0]);
    assert_eq!(bench.device.told(), []);
    assert_eq!(bench.write(MSI + 2, &[0x81, 0]), ConfigEffect::INTERRUPTS);
    assert_eq!(
        bench.device.told(),
        [Told::Disabled(Interrupt::Intx), set(Interrupt::Msi, 0, &[true])]
    );
    let route = &bench.messages.routes()[0];
    assert!(bench.device.interrupt(Interrupt::Msi, 0));
    assert_eq!(route.signals(), 1);
    assert_eq!(
        route
            .history()
            .last()
            .and_then(|message| *message)
            .map(|message| message.data),
        Some(0x51)
    );
    let _effect = bench.write(MSI + 2, &[0x80, 0]);
    assert_eq!(
        bench.device.told(),
        [Told::Disabled(Interrupt::Msi), set(Interrupt::Intx, 0, &[true])]
    );
    assert_eq!(route.history().last(), Some(&None));
}

#[test]
fn the_wire_is_asserted_until_its_end_and_unmasked_then() {
    let bench = bench();
    assert!(bench.device.interrupt(Interrupt::Intx, 0));
    bench.function.signalled();
    assert_eq!(bench.wires.levels(), [true]);
    bench.function.signalled();
    assert_eq!((bench.wires.levels(), bench.device.told()), (vec![], vec![]));
    bench.function.interrupt_ended();
    assert_eq!(
        (bench.wires.levels(), bench.device.told()),
        (vec![false], vec![Told::Unmasked])
    );
    // Somebody else's interrupt of the same input.
    bench.function.interrupt_ended();
    assert_eq!((bench.wires.levels(), bench.device.told()), (vec![], vec![]));
}

#[test]
fn interrupt_disable_takes_the_wire_and_gives_it_back() {
    let bench = bench();
    assert!(bench.device.interrupt(Interrupt::Intx, 0));
    bench.function.signalled();
    assert_eq!(bench.write(5, &[0x04]), ConfigEffect::INTERRUPTS);
    assert_eq!(bench.wires.levels(), [true, false]);
    assert_eq!(bench.device.told(), [Told::Disabled(Interrupt::Intx)]);
    let _effect = bench.write(5, &[0]);
    assert_eq!(bench.device.told(), [set(Interrupt::Intx, 0, &[true])]);
}

#[test]
fn a_thousand_changes_between_wire_msi_and_msix_under_interrupts_lose_nothing() {
    let bench = bench();
    bench.table(0, FIRST_MESSAGE);
    for _ in 0..1000 {
        bench.device.interrupt(Interrupt::Intx, 0);
        bench.function.signalled();
        let _effect = bench.write(MSI + 2, &[0x81, 0]);
        assert!(bench.device.interrupt(Interrupt::Msi, 0) && !bench.device.interrupt(Interrupt::Intx, 0));
        bench.enable_msix();
        assert!(bench.device.interrupt(Interrupt::Msix, 0) && !bench.device.interrupt(Interrupt::Msi, 0));
        let _effect = bench.write(MSIX + 2, &[0x04, 0x00]);
        let _effect = bench.write(MSI + 2, &[0x80, 0]);
    }
    let levels = bench.wires.levels();
    assert_eq!((levels.len(), levels.last()), (2000, Some(&false)));
    assert!(bench.device.interrupt(Interrupt::Intx, 0));
}

#[test]
fn interrupts_the_host_refuses_leave_a_function_that_goes_on() {
    let bench = bench();
    bench.device.refuse(Asked::SetInterrupts, libc::ENOSPC);
    bench.enable_msix();
    bench.table(0, FIRST_MESSAGE);
    assert!(!bench.device.interrupt(Interrupt::Msix, 0));
    bench.device.relent();
    let _effect = bench.write(MSIX + 2, &[0x04, 0x00]);
    bench.enable_msix();
    assert!(bench.device.interrupt(Interrupt::Msix, 0));
    bench.device.refuse(Asked::Unmask, libc::EIO);
    let _effect = bench.write(MSIX + 2, &[0x04, 0x00]);
    assert!(bench.device.interrupt(Interrupt::Intx, 0));
    bench.function.signalled();
    bench.function.interrupt_ended();
    assert_eq!(bench.wires.levels(), [true, false]);
}

#[test]
fn interrupts_the_host_does_not_switch_off_are_off_before_others_come() {
    let bench = bench();
    bench.enable_msix();
    bench.table(0, FIRST_MESSAGE);
    bench.device.told();
    bench.device.refuse(Asked::DisableInterrupts, libc::EIO);
    let _effect = bench.write(MSIX + 2, &[0x04, 0x00]);
    assert_eq!(bench.messages.routes()[0].history().last(), Some(&None));
    bench.enable_msix();
    assert_eq!(
        bench.device.told(),
        [],
        "neither the wire nor messages of a new kind"
    );
    bench.device.relent();
    let _effect = bench.write(MSIX + 2, &[0x04, 0x00]);
    assert_eq!(
        bench.device.told(),
        [Told::Disabled(Interrupt::Msix), set(Interrupt::Intx, 0, &[true])]
    );
    bench.enable_msix();
    assert!(bench.device.interrupt(Interrupt::Msix, 0));
}

#[test]
fn fewer_messages_wait_for_the_host_to_switch_the_many_off() {
    let mut config = nic_config();
    // Four messages can be had.
    config[usize::from(MSI) + 2] |= 2 << 1;
    let bench = bench_with(Device::with(&config).interrupting(Interrupt::Msi, 4, false));
    let _effect = bench.write(MSI + 2, &[0xa5, 0]);
    let four = set(Interrupt::Msi, 0, &[true; 4]);
    assert_eq!(bench.device.told(), [Told::Disabled(Interrupt::Intx), four]);
    bench.device.refuse(Asked::DisableInterrupts, libc::EIO);
    let _effect = bench.write(MSI + 2, &[0x95, 0]);
    let _effect = bench.write(MSI + 2, &[0x85, 0]);
    assert_eq!(bench.device.told(), []);
    bench.device.relent();
    let _effect = bench.write(MSI + 2, &[0x95, 0]);
    let two = set(Interrupt::Msi, 0, &[true; 2]);
    assert_eq!(bench.device.told(), [Told::Disabled(Interrupt::Msi), two]);
    assert!(!bench.device.interrupt(Interrupt::Msi, 2));
}

#[test]
fn the_end_asks_again_for_what_the_host_did_not_switch_off() {
    let bench = bench();
    bench.enable_msix();
    bench.device.refuse(Asked::DisableInterrupts, libc::EIO);
    let _effect = bench.write(MSIX + 2, &[0x04, 0x00]);
    bench.function.reset();
    assert!(bench.device.is_on(Interrupt::Msix));
    bench.device.relent();
    bench.device.told();
    drop(bench.function);
    assert_eq!(bench.device.told()[0], Told::Disabled(Interrupt::Msix));
    assert!(!bench.device.is_on(Interrupt::Msix));
}

#[test]
fn routes_the_host_refuses_leave_the_vector_silent() {
    let bench = bench();
    bench.messages.refuse(true);
    bench.enable_msix();
    bench.table(0, FIRST_MESSAGE);
    assert!(!bench.device.interrupt(Interrupt::Msix, 0));
    bench.messages.refuse(false);
    bench.table(0, [0xfee0_1000, 0, 0x43, 0]);
    assert!(bench.device.interrupt(Interrupt::Msix, 0));
}

#[test]
fn a_device_that_vanishes_reads_all_ones_and_takes_nothing() {
    let bench = bench();
    bench.device.refuse(Asked::Read, libc::EIO);
    bench.device.refuse(Asked::Write, libc::EIO);
    let mut bytes = [0; 8];
    bench.function.bar_read(0, 0, &mut bytes);
    assert_eq!(bytes, [0xff; 8]);
    bench.function.bar_write(0, 0, &[1; 4]);
    let _effect = bench.write(EXPRESS + 8, &[0x10, 0x28]);
    bench.function.bus_mastering(true);
    assert_eq!(bench.read(EXPRESS + 8) & 0xffff_0000, 0x0020_0000);
    assert_eq!(bench.device.told(), []);
}

#[test]
fn a_reset_silences_the_device_resets_it_and_forgets_what_was_written() {
    let bench = bench();
    let _effect = bench.write(4, &[0x07, 0]);
    let _effect = bench.write_dword(0x10, 0xe000_0000);
    bench.function.bus_mastering(true);
    bench.enable_msix();
    bench.table(0, FIRST_MESSAGE);
    bench.device.told();
    bench.function.reset();
    let told = bench.device.told();
    assert_eq!(
        told,
        [
            Told::Disabled(Interrupt::Msix),
            Told::Config(4, vec![0x03, 0x04]),
            Told::Reset,
            Told::Config(4, vec![0x03, 0x04]),
            set(Interrupt::Intx, 0, &[true]),
        ]
    );
    assert_eq!(
        (bench.read(4) & 0xffff, bench.read(0x10), bench.read(MSIX) >> 16),
        (0, 0, 4)
    );
    let mut entry = [0; 4];
    bench.function.bar_read(3, 12, &mut entry);
    assert_eq!(entry, [1, 0, 0, 0]);
    assert!(!bench.device.interrupt(Interrupt::Msix, 0));
}

#[test]
fn a_reset_that_fails_is_no_end_and_still_silences_the_device() {
    let bench = bench();
    bench.function.bus_mastering(true);
    bench.device.refuse(Asked::Reset, libc::EIO);
    bench.device.told();
    bench.function.reset();
    assert_eq!(bench.device.told()[1], Told::Config(4, vec![0x03, 0x04]));
    assert_eq!(bench.read(4) & 0xffff, 0);
}

#[test]
fn a_device_without_interrupts_of_any_kind_works() {
    let device = Device::with(&nic_config())
        .interrupting(Interrupt::Intx, 0, false)
        .interrupting(Interrupt::Msi, 0, false)
        .interrupting(Interrupt::Msix, 0, false);
    let bench = bench_with(device);
    assert_eq!(
        (bench.read(0x3c) & 0xff00, bench.function.descriptors().len()),
        (0, 2)
    );
    bench.enable_msix();
    bench.function.signalled();
    assert_eq!(bench.device.told(), []);
}

#[test]
fn what_the_host_says_of_a_function_is_heard_once() {
    let bench = bench();
    assert_eq!(bench.function.descriptors().len(), 3);
    assert_eq!(bench.function.signalled(), []);
    assert!(bench.device.give(Notice::Wanted) && bench.device.give(Notice::Error));
    assert_eq!(bench.function.signalled(), [Notice::Error, Notice::Wanted]);
    assert_eq!(bench.function.signalled(), []);
}

#[test]
fn notices_that_the_host_does_not_give_are_done_without() {
    let device = Device::with(&nic_config());
    device.refuse(Asked::Notify, libc::EINVAL);
    let bench = bench_with(device);
    assert_eq!(bench.function.descriptors().len(), 1);
    assert!(!bench.device.give(Notice::Error));
}

mod arbitrary {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]
        #[test]
        fn no_guest_and_no_device_makes_a_function_panic(
            config in prop::collection::vec(any::<u8>(), 4096),
            writes in prop::collection::vec((0_u16..1024, any::<u32>(), 1_u32..16), 0..64),
            accesses in prop::collection::vec((0_u8..6, 0_u64..0x4000, any::<[u8; 8]>(), 1_usize..9), 0..32),
        ) {
            let mut config = config;
            config[6] |= 0x10;
            // Not all ones.
            config[8] = 0;
            let bench = bench_with(Device::with(&config));
            for (dword, value, lanes) in writes {
                let mask = (0..4).filter(|lane| lanes >> lane & 1 != 0).fold(0, |mask, lane| mask | 0xff << (lane * 8));
                if let Some(write) = DwordWrite::whole(value).restrict(mask) {
                    let _effect = bench.function.config_write(dword, write);
                    bench.function.config_read(dword);
                }
            }
            for (bar, offset, bytes, len) in accesses {
                let mut data = bytes;
                bench.function.bar_write(bar, offset, &bytes[..len]);
                bench.function.bar_read(bar, offset, &mut data[..len]);
            }
            bench.function.reset();
            prop_assert!(bench.function.command().is_empty());
        }
    }
}
