//! A disk as its driver sees it, on files of the host.

use std::io::{Read, Seek, SeekFrom, Write};
use std::os::unix::fs::MetadataExt;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};

use tempfile::NamedTempFile;
use vm_memory::Permissions;

use super::request::{MOST_DATA, MOST_SEGMENT_SECTORS, MOST_SEGMENTS, Operation, RawSegment};
use super::*;
use crate::devices::virtio::driver::{Driver, HIGH_END, LOW_END, Part};
use crate::platform::addr::{Bdf, Gpa, Iova};
use crate::platform::dma::{Requester, Run, Translations, Translator};

const SECTORS: u64 = 64;

fn image_file(sectors: u64) -> NamedTempFile {
    let mut file = NamedTempFile::new().expect("a file");
    let content: Vec<u8> = (0..sectors * 512)
        .map(|at| (at / 512).to_le_bytes()[0].wrapping_add(1))
        .collect();
    file.write_all(&content).expect("written");
    file
}

struct Disk {
    block: Block,
    driver: Driver,
    file: NamedTempFile,
    features: Features,
}

fn disk_as(change: impl FnOnce(&mut BlockConfig)) -> Disk {
    let file = image_file(SECTORS);
    let mut config = BlockConfig::new("disk0", file.path());
    change(&mut config);
    let block = Block::open(&config).expect("a good image");
    Disk {
        features: block.features(),
        block,
        driver: Driver::new(64),
        file,
    }
}

fn disk() -> Disk {
    disk_as(|_| {})
}

/// A disk of `mib` MiB, all of it a hole.
fn sparse_disk(mib: u64) -> Disk {
    let mut disk = disk();
    disk.file = NamedTempFile::new().expect("a file");
    disk.file.as_file().set_len(mib << 20).expect("a hole");
    disk.block = Block::open(&BlockConfig::new("disk0", disk.file.path())).expect("a good image");
    disk
}

/// A disk of 80 MiB, all of it a hole, whose host makes zeros without writing them or cannot.
fn disk_with_shortcuts(has: bool) -> Disk {
    let mut disk = sparse_disk(80);
    // The image has one user.
    disk.block = self::disk().block;
    let config = BlockConfig::new("disk0", disk.file.path());
    let options = ImageOptions {
        path: config.path.clone(),
        read_only: false,
        direct: false,
    };
    let image = Image::open(&options).expect("a good image");
    disk.block = Block::on(image.with_shortcuts(has), &config);
    disk.features = disk.block.features();
    disk
}

impl Disk {
    fn serve(&mut self) -> Result<Turn, Broken> {
        let ram = self.driver.ram();
        let queue = self.block.queue(self.features);
        queue.serve(ram.backend(), &mut self.driver.queue)
    }

    fn header(operation: Operation, sector: u64) -> Vec<u8> {
        let header = Header {
            operation: operation.0.to_le(),
            reserved: 0,
            sector: sector.to_le(),
        };
        header.as_bytes().to_vec()
    }

    /// One request with data in one descriptor; the status and what the used ring says.
    fn ask(&mut self, operation: Operation, sector: u64, data: Part) -> (u8, u32) {
        let header = self.driver.place(&Self::header(operation, sector));
        let status = self.driver.place(&[0xee]);
        self.driver
            .offer(&[Part::read(header, 16), data, Part::write(status, 1)]);
        assert_eq!(self.serve().expect("a good queue"), Turn::Idle);
        let used = self.driver.used();
        assert_eq!(used.len(), 1);
        (self.driver.bytes(status, 1)[0], used[0].1)
    }

    fn ask_without_data(&mut self, operation: Operation, sector: u64) -> u8 {
        let nothing = self.driver.place(&[]);
        self.ask(operation, sector, Part::read(nothing, 0)).0
    }

    fn segment(&mut self, operation: Operation, sector: u64, sectors: u32, flags: u32) -> u8 {
        let segment = RawSegment {
            sector: sector.to_le(),
            sectors: sectors.to_le(),
            flags: flags.to_le(),
        };
        let at = self.driver.place(segment.as_bytes());
        self.ask(operation, 0, Part::read(at, 16)).0
    }

    /// A transfer of so many MiB, all of them from or to the same one; its status.
    fn move_mib(&mut self, operation: Operation, mib: usize) -> u8 {
        let header = self.driver.place(&Self::header(operation, 0));
        let status = self.driver.place(&[0xee]);
        let at = self.driver.place(&[0xaa; 1 << 20]);
        let part = match operation {
            Operation::IN => Part::write(at, 1 << 20),
            _ => Part::read(at, 1 << 20),
        };
        let data = std::iter::repeat_n(part, mib);
        let parts = std::iter::once(Part::read(header, 16)).chain(data);
        let parts: Vec<_> = parts.chain([Part::write(status, 1)]).collect();
        self.driver.offer_indirect(&parts);
        assert_eq!(self.serve().expect("a good queue"), Turn::Idle);
        assert_eq!(self.driver.used().len(), 1);
        self.driver.bytes(status, 1)[0]
    }

    /// What of the image has a place on the host, in units of 512 bytes.
    fn blocks(&self) -> u64 {
        self.file.as_file().metadata().expect("there").blocks()
    }

    fn configuration(&self) -> Configuration {
        let mut data = [0; 64];
        self.block.read_config(0, &mut data);
        Configuration::read_from_bytes(&data).expect("as long")
    }

    fn content(&mut self, sector: u64, sectors: usize) -> Vec<u8> {
        let mut content = vec![0; sectors * 512];
        let file = self.file.as_file_mut();
        file.seek(SeekFrom::Start(sector * 512)).expect("inside");
        file.read_exact(&mut content).expect("inside");
        content
    }
}

const OK: u8 = Status::Ok as u8;
const IO_ERROR: u8 = Status::IoError as u8;
const UNSUPPORTED: u8 = Status::Unsupported as u8;

#[test]
fn sectors_are_read_into_the_drivers_buffer() {
    let mut disk = disk();
    let at = disk.driver.place(&[0; 1024]);
    assert_eq!(disk.ask(Operation::IN, 2, Part::write(at, 1024)), (OK, 1025));
    assert_eq!(disk.driver.bytes(at, 512), [3; 512]);
    assert_eq!(disk.driver.bytes(at + 512, 512), [4; 512]);
}

#[test]
fn sectors_are_written_from_the_drivers_buffer() {
    let mut disk = disk();
    let at = disk.driver.place(&[0xaa; 512]);
    assert_eq!(
        disk.ask(Operation::OUT, SECTORS - 1, Part::read(at, 512)),
        (OK, 1)
    );
    assert_eq!(disk.content(SECTORS - 1, 1), [0xaa; 512]);
    assert_eq!(
        disk.content(SECTORS - 2, 1),
        [63; 512],
        "its neighbour is as before"
    );
}

#[test]
fn a_request_may_be_cut_into_descriptors_anywhere() {
    let mut disk = disk();
    let header = disk.driver.place(&Disk::header(Operation::IN, 1));
    let at = disk.driver.place(&[0; 1024]);
    disk.driver.offer(&[
        Part::read(header, 5),
        Part::read(header + 5, 11),
        Part::write(at, 3),
        Part::write(at + 3, 500),
        Part::write(at + 503, 10),
    ]);
    assert_eq!(disk.serve().expect("a good queue"), Turn::Idle);
    assert_eq!(disk.driver.used(), [(0, 513)]);
    assert_eq!(disk.driver.bytes(at, 513), [vec![2; 512], vec![OK]].concat());
}

#[test]
fn requests_outside_the_disk_are_refused() {
    let mut disk = disk();
    let at = disk.driver.place(&[0x55; 1024]);
    for sector in [
        SECTORS - 1,
        SECTORS,
        1 << 55,
        (1 << 55) - 1,
        u64::MAX,
        u64::MAX / 512,
    ] {
        assert_eq!(
            disk.ask(Operation::IN, sector, Part::write(at, 1024)),
            (IO_ERROR, 1)
        );
        assert_eq!(
            disk.ask(Operation::OUT, sector, Part::read(at, 1024)),
            (IO_ERROR, 1)
        );
    }
    assert_eq!(
        disk.file.as_file().metadata().expect("there").len(),
        SECTORS * 512
    );
}

#[test]
fn requests_that_are_no_whole_sectors_are_refused() {
    let mut disk = disk();
    let at = disk.driver.place(&[0x55; 1024]);
    for len in [1, 511, 513] {
        assert_eq!(disk.ask(Operation::IN, 0, Part::write(at, len)).0, IO_ERROR);
        assert_eq!(disk.ask(Operation::OUT, 0, Part::read(at, len)).0, IO_ERROR);
    }
    assert_eq!(disk.content(0, 1), [1; 512]);
}

// QEMU CVE-2026-48914: the SCSI commands of the legacy interface.
#[test]
fn legacy_and_unknown_operations_are_unsupported() {
    let mut disk = disk();
    for operation in [2, 3, 5, 7, 9, 14, 15, 0x8000_0000, u32::MAX] {
        assert_eq!(
            disk.ask_without_data(Operation(operation), 0),
            UNSUPPORTED,
            "{operation}"
        );
    }
}

#[test]
fn a_request_without_header_or_status_breaks_the_queue() {
    let mut disk = disk();
    let at = disk.driver.place(&[0; 16]);
    disk.driver.offer(&[Part::read(at, 15), Part::write(at, 1)]);
    assert!(matches!(disk.serve(), Err(Broken::Request { readable: 15, .. })));
    let mut disk = self::disk();
    let at = disk.driver.place(&[0; 16]);
    disk.driver.offer(&[Part::read(at, 16)]);
    assert!(matches!(disk.serve(), Err(Broken::Request { writable: 0, .. })));
}

#[test]
fn buffers_in_the_hole_between_memories_break_the_queue() {
    for at in [LOW_END - 256, LOW_END, HIGH_END - 256, 0xfee0_0000] {
        let mut disk = disk();
        let header = disk.driver.place(&Disk::header(Operation::IN, 0));
        let status = disk.driver.place(&[0xee]);
        disk.driver.offer(&[
            Part::read(header, 16),
            Part::write(at, 512),
            Part::write(status, 1),
        ]);
        assert!(matches!(disk.serve(), Err(Broken::Buffer { .. })), "{at:#x}");
        assert_eq!(disk.driver.bytes(status, 1), [0xee]);
    }
}

#[test]
fn a_read_only_disk_says_so_and_refuses_writes() {
    let mut disk = disk_as(|config| config.read_only = true);
    assert!(disk.features.contains(READ_ONLY));
    assert!(!disk.features.intersects(DISCARD | WRITE_ZEROES));
    let at = disk.driver.place(&[0xaa; 512]);
    assert_eq!(disk.ask(Operation::OUT, 0, Part::read(at, 512)).0, IO_ERROR);
    assert_eq!(disk.segment(Operation::WRITE_ZEROES, 0, 1, 0), IO_ERROR);
    assert_ne!(disk.segment(Operation::DISCARD, 0, 1, 0), OK);
    assert_eq!(disk.content(0, 1), [1; 512]);
    assert_eq!(disk.ask(Operation::IN, 0, Part::write(at, 512)).0, OK);
}

#[test]
fn discarded_sectors_are_given_back_to_the_host() {
    let file = image_file(4096);
    let config = BlockConfig::new("disk0", file.path());
    let block = Block::open(&config).expect("a good image");
    file.as_file().sync_all().expect("written");
    let before = file.as_file().metadata().expect("there").blocks();
    let mut disk = Disk {
        features: block.features(),
        block,
        driver: Driver::new(64),
        file,
    };
    assert!(
        disk.features.contains(DISCARD),
        "the test's file system punches holes"
    );
    assert_eq!(disk.segment(Operation::DISCARD, 8, 2048, 0), OK);
    assert_eq!(disk.content(8, 2048), vec![0; 2048 * 512]);
    assert_eq!(disk.content(7, 1), [8; 512]);
    assert!(disk.file.as_file().metadata().expect("there").blocks() < before);
}

#[test]
fn zeroed_sectors_read_as_zeros() {
    for unmap in [0, 1] {
        let mut disk = disk();
        assert_eq!(disk.segment(Operation::WRITE_ZEROES, 3, 4, unmap), OK);
        assert_eq!(disk.content(3, 4), [0; 4 * 512]);
        assert_eq!(
            (disk.content(2, 1), disk.content(7, 1)),
            (vec![3; 512], vec![8; 512])
        );
    }
}

#[test]
fn ranges_that_are_wrong_are_refused_and_change_nothing() {
    let mut disk = disk();
    for (sector, sectors) in [
        (SECTORS, 1),
        (SECTORS - 1, 2),
        (0, u32::MAX),
        (u64::MAX, 1),
        (0, MOST_SEGMENT_SECTORS + 1),
    ] {
        assert_eq!(disk.segment(Operation::DISCARD, sector, sectors, 0), IO_ERROR);
        assert_eq!(
            disk.segment(Operation::WRITE_ZEROES, sector, sectors, 0),
            IO_ERROR
        );
    }
    assert_eq!(disk.segment(Operation::DISCARD, 0, 1, 1), UNSUPPORTED);
    assert_eq!(disk.segment(Operation::WRITE_ZEROES, 0, 1, 2), UNSUPPORTED);
    assert_eq!(disk.content(0, 1), [1; 512]);
}

#[test]
fn lists_of_ranges_that_are_wrong_are_refused() {
    let mut disk = disk();
    let at = disk.driver.place(&[0; 1024]);
    for len in [0, 8, 24, 16 * (MOST_SEGMENTS + 1)] {
        assert_eq!(disk.ask(Operation::DISCARD, 0, Part::read(at, len)).0, IO_ERROR);
        assert_eq!(
            disk.ask(Operation::WRITE_ZEROES, 0, Part::read(at, len)).0,
            IO_ERROR
        );
    }
    // Ranges of no sectors are whole requests that do nothing.
    let most = 16 * MOST_SEGMENTS;
    assert_eq!(disk.ask(Operation::DISCARD, 0, Part::read(at, most)).0, OK);
    let most = 16 * disk.configuration().max_write_zeroes_seg;
    assert_eq!(disk.ask(Operation::WRITE_ZEROES, 0, Part::read(at, most)).0, OK);
    assert_eq!(disk.content(0, 1), [1; 512]);
}

#[test]
fn flushes_are_carried_out() {
    assert_eq!(disk().ask_without_data(Operation::FLUSH, 0), OK);
}

/// Leaves addresses as they are, counts who is inside, and refuses one page when it is told to.
#[derive(Default)]
struct Counting {
    inside: AtomicUsize,
    refused: AtomicU64,
}

struct Inside<'a>(&'a Counting);

impl Translator for Counting {
    fn begin(&self) -> Box<dyn Translations + '_> {
        self.inside.fetch_add(1, Ordering::SeqCst);
        Box::new(Inside(self))
    }
}

impl Drop for Inside<'_> {
    fn drop(&mut self) {
        self.0.inside.fetch_sub(1, Ordering::SeqCst);
    }
}

impl Translations for Inside<'_> {
    fn translate(&self, _requester: Bdf, at: Iova, _access: Permissions) -> Option<Run> {
        let refused = at.0 >> 12 == self.0.refused.load(Ordering::SeqCst) >> 12;
        let len = 0x1000 - at.0 % 0x1000;
        (!refused).then_some(Run {
            target: Gpa(at.0),
            len,
        })
    }
}

/// A way to the driver's memory through a translator.
fn counted(driver: &Driver) -> (Arc<Counting>, Dma) {
    let translator = Arc::new(Counting {
        refused: AtomicU64::new(u64::MAX),
        ..Counting::default()
    });
    let requester = Arc::new(Requester::default());
    requester.set_bus_master(true);
    let dma = Dma::translated(requester, driver.ram(), translator.clone());
    (translator, dma)
}

// An unmap in the guest waits for everybody inside: of whatever device, behind the same IOMMU.
#[test]
fn what_moves_no_data_is_done_with_no_passage_through_an_iommu_open() {
    let range = |flags: u32| {
        let segment = RawSegment {
            sector: 0,
            sectors: 8_u32.to_le(),
            flags: flags.to_le(),
        };
        segment.as_bytes().to_vec()
    };
    for (operation, data, event_idx, flushes) in [
        (Operation::FLUSH, Vec::new(), false, true),
        (Operation::FLUSH, Vec::new(), true, true),
        (Operation::DISCARD, range(0), true, true),
        (Operation::WRITE_ZEROES, range(1), true, false),
        // The part of a write that makes it durable.
        (Operation::OUT, vec![0xaa; 512], true, false),
    ] {
        let mut disk = disk();
        disk.driver = Driver::on(crate::devices::virtio::driver::ram(), 0, 64, event_idx);
        let (translator, dma) = counted(&disk.driver);
        let queue = disk.block.queue(if flushes { FLUSH } else { Features::empty() });
        let header = disk.driver.place(&Disk::header(operation, 0));
        let at = disk.driver.place(&data);
        let len = u32::try_from(data.len()).expect("short");
        let mut seen = Vec::new();
        for count in 1..3 {
            let status = disk.driver.place(&[0xee; 3]);
            let parts = [
                Part::read(header, 16),
                Part::read(at, len),
                Part::write(status, 3),
            ];
            let head = disk.driver.offer(&parts);
            let turn = queue.serve_with(&dma, &mut disk.driver.queue, |upkeep| {
                seen.push(translator.inside.load(Ordering::SeqCst));
                queue.keep_up(&upkeep)
            });
            assert_eq!(turn.expect("a good queue"), Turn::Idle);
            assert_eq!(seen, vec![0; count], "{operation:?}");
            assert_eq!(disk.driver.used(), [(head.into(), 1)]);
            assert_eq!(disk.driver.bytes(status, 3), [0xee, 0xee, OK], "the last byte");
            assert_eq!(disk.driver.interrupts(), u32::try_from(count).expect("small"));
            disk.driver.set_used_event(u16::try_from(count).expect("small"));
        }
        assert_eq!(translator.inside.load(Ordering::SeqCst), 0);
    }
}

#[test]
fn a_status_byte_that_the_driver_took_away_meanwhile_breaks_the_queue() {
    let mut disk = disk();
    let (translator, dma) = counted(&disk.driver);
    let queue = disk.block.queue(FLUSH);
    let header = disk.driver.place(&Disk::header(Operation::FLUSH, 0));
    let status = disk.driver.place(&[0xee]);
    disk.driver
        .offer(&[Part::read(header, 16), Part::write(status, 1)]);
    let turn = queue.serve_with(&dma, &mut disk.driver.queue, |_| {
        translator.refused.store(status, Ordering::SeqCst);
        Status::Ok
    });
    let refused = Iova(status);
    assert!(matches!(turn, Err(Broken::Buffer { at, len: 1, .. }) if at == refused));
    assert_eq!(disk.driver.bytes(status, 1), [0xee]);
    assert!(disk.driver.used().is_empty());
    assert_eq!(translator.inside.load(Ordering::SeqCst), 0);
}

#[test]
fn the_identification_is_the_serial_number_and_never_more_than_the_room() {
    let mut disk = disk_as(|config| config.serial = Some("0123456789abcdefghijKLM".to_owned()));
    let at = disk.driver.place(&[0xee; 32]);
    assert_eq!(disk.ask(Operation::GET_ID, 0, Part::write(at, 20)), (OK, 21));
    assert_eq!(disk.driver.bytes(at, 21), b"0123456789abcdefghij\xee");
    let at = disk.driver.place(&[0xee; 32]);
    assert_eq!(disk.ask(Operation::GET_ID, 0, Part::write(at, 4)), (OK, 5));
    assert_eq!(disk.driver.bytes(at, 5), b"0123\xee");
}

#[test]
fn the_configuration_describes_the_image() {
    let disk = disk_as(|config| config.queues = 4);
    let configuration = disk.configuration();
    assert_eq!(configuration.capacity, SECTORS);
    assert_eq!(
        (configuration.blk_size, configuration.physical_block_exp),
        (512, 3)
    );
    assert_eq!((configuration.num_queues, configuration.seg_max), (4, 254));
    assert_eq!(disk.block.queue_sizes(), [256; 4]);
    assert!(disk.features.contains(MULTI_QUEUE | FLUSH));
}

// Whoever stops the disk waits for one request: its length is not the guest's to choose.
#[test]
fn a_request_for_more_data_than_the_bound_is_refused_before_any_is_moved() {
    let mut disk = sparse_disk(80);
    let before = disk.blocks();
    assert_eq!(disk.move_mib(Operation::OUT, 65), IO_ERROR);
    assert_eq!(disk.blocks(), before);
    assert_eq!(disk.move_mib(Operation::IN, 65), IO_ERROR);
    assert_eq!(disk.move_mib(Operation::IN, 64), OK);
}

#[test]
fn a_driver_that_keeps_to_the_configuration_never_meets_the_bound() {
    for (size, segment) in [(4, 32 << 20), (8, 8 << 20), (256, 256 << 10), (1024, 64 << 10)] {
        let disk = disk_as(|config| config.queue_size = size);
        assert!(disk.features.contains(SIZE_MAX | SEG_MAX));
        let configuration = disk.configuration();
        assert_eq!(configuration.seg_max, u32::from(size) - 2);
        assert_eq!(configuration.size_max, segment);
        let most = u64::from(configuration.seg_max) * u64::from(configuration.size_max);
        assert!(most <= MOST_DATA, "{size} entries: {most}");
    }
}

#[test]
fn where_zeros_are_written_a_request_is_one_short_range_and_the_driver_is_told() {
    let (mut written, noted) = (disk_with_shortcuts(false), disk_with_shortcuts(true));
    let limits = |disk: &Disk| {
        let configuration = disk.configuration();
        (
            configuration.max_write_zeroes_sectors,
            configuration.max_write_zeroes_seg,
        )
    };
    assert_eq!(limits(&written), (64 << 11, 1));
    let before = written.blocks();
    assert_eq!(limits(&noted), (MOST_SEGMENT_SECTORS, MOST_SEGMENTS));
    let most = 64 << 11;
    assert_eq!(written.segment(Operation::WRITE_ZEROES, 0, most + 1, 1), IO_ERROR);
    let at = written.driver.place(&[0; 32]);
    let two = written.ask(Operation::WRITE_ZEROES, 0, Part::read(at, 32));
    assert_eq!(two.0, IO_ERROR);
    assert_eq!(written.blocks(), before);
    assert_eq!(written.segment(Operation::WRITE_ZEROES, 0, most, 1), OK);
    assert_eq!(written.segment(Operation::WRITE_ZEROES, 1, 8, 0), OK);
}

#[test]
fn a_host_file_that_shrank_is_an_error_of_the_medium() {
    let mut disk = disk();
    disk.file.as_file().set_len(1024).expect("cut");
    let at = disk.driver.place(&[0; 1024]);
    assert_eq!(disk.ask(Operation::IN, 1, Part::write(at, 1024)), (IO_ERROR, 1));
    assert_eq!(disk.ask(Operation::IN, 1, Part::write(at, 512)), (OK, 513));
}

#[test]
fn a_driver_without_flush_gets_durable_writes() {
    let disk = disk();
    assert!(disk.block.queue(Features::empty()).write_through);
    assert!(!disk.block.queue(FLUSH).write_through);
}

#[test]
fn each_queue_has_a_thread_of_its_own() {
    let disk = disk_as(|config| config.queues = 2);
    let queues = (0..2).map(|index| Some(Driver::on(disk.driver.ram(), index, 8, false).queue));
    let units = disk.block.activate(Activation {
        features: disk.features,
        queues: queues.collect(),
        interrupts: std::sync::Arc::new(crate::devices::virtio::driver::Told::default()),
    });
    let names: Vec<_> = units
        .expect("nothing of the host is needed")
        .into_iter()
        .map(|unit| unit.name)
        .collect();
    assert_eq!(names, ["disk0-q0", "disk0-q1"]);
}
