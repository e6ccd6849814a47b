//! A card whose tap is the other end of a socket pair.

use std::os::unix::net::UnixDatagram;
use std::sync::atomic::{AtomicBool, Ordering};

use super::*;
use crate::devices::virtio::driver::{Driver, HIGH_END, LOW_END, Part, Told};
use crate::devices::virtio::queue::Broken;
use crate::devices::virtio::worker::{Service, Turn, Woken};
use crate::platform::tap::HEADER_LEN;

/// A pair, and the host's side of it.
fn pair(mergeable: bool) -> (Pair, UnixDatagram) {
    let (ours, theirs) = UnixDatagram::pair().expect("a pair of sockets");
    for socket in [&ours, &theirs] {
        socket.set_nonblocking(true).expect("possible");
    }
    let tap: Arc<dyn FrameDescriptor> = Arc::new(ours);
    (Pair::new("net0".to_owned(), Some(tap), mergeable), theirs)
}

fn receive(pair: &mut Pair, driver: &mut Driver) -> Result<Turn, Broken> {
    pair.receive(driver.ram().backend(), &mut driver.queue)
}

fn transmit(pair: &mut Pair, driver: &mut Driver) -> Result<Turn, Broken> {
    pair.transmit(driver.ram().backend(), &mut driver.queue)
}

/// A frame of `len` bytes behind a header of zeros.
fn frame(len: usize) -> Vec<u8> {
    let body = (0..len).map(|at| at.to_le_bytes()[0]);
    std::iter::repeat_n(0, HEADER_LEN).chain(body).collect()
}

/// What the guest finds: the frame with `num_buffers` in its header.
fn received(len: usize, buffers: u8) -> Vec<u8> {
    let mut frame = frame(len);
    frame[10] = buffers;
    frame
}

#[test]
fn a_frame_reaches_the_driver_with_a_header_that_says_one_buffer() {
    for mergeable in [false, true] {
        let (mut pair, host) = pair(mergeable);
        let mut driver = Driver::new(8);
        let at = driver.place(&[0xee; 2048]);
        driver.offer(&[Part::write(at, 2048)]);
        host.send(&frame(100)).expect("sent");
        assert_eq!(receive(&mut pair, &mut driver).expect("good"), Turn::Idle);
        assert_eq!(driver.used(), [(0, 112)]);
        assert_eq!(driver.bytes(at, 113), [received(100, 1), vec![0xee]].concat());
        assert_eq!(driver.interrupts(), 1);
    }
}

#[test]
fn a_large_frame_takes_several_buffers_if_the_driver_merges_them() {
    let (mut pair, host) = pair(true);
    let mut driver = Driver::new(8);
    let places = [100, 50, 300].map(|len| {
        let at = driver.place(&[0xee; 512]);
        driver.offer(&[Part::write(at, len)]);
        (at, usize::try_from(len).expect("small"))
    });
    host.send(&frame(200)).expect("sent");
    assert_eq!(receive(&mut pair, &mut driver).expect("good"), Turn::Idle);
    assert_eq!(driver.used(), [(0, 100), (1, 50), (2, 62)]);
    let whole: Vec<u8> = places
        .into_iter()
        .flat_map(|(at, len)| driver.bytes(at, len))
        .take(212)
        .collect();
    assert_eq!(whole, received(200, 3));
}

#[test]
fn a_frame_larger_than_the_buffer_of_a_driver_that_does_not_merge_is_dropped() {
    let (mut pair, host) = pair(false);
    let mut driver = Driver::new(8);
    let places = [0; 2].map(|_| {
        let at = driver.place(&[0xee; 128]);
        driver.offer(&[Part::write(at, 128)]);
        at
    });
    host.send(&frame(200)).expect("sent");
    host.send(&frame(100)).expect("sent");
    assert_eq!(receive(&mut pair, &mut driver).expect("good"), Turn::Idle);
    assert_eq!(driver.used(), [(0, 112)], "the next frame has the buffer");
    assert_eq!(driver.bytes(places[0], 112), received(100, 1));
}

#[test]
fn a_frame_larger_than_all_buffers_is_dropped_and_they_are_used_again() {
    let (mut pair, host) = pair(true);
    let mut driver = Driver::new(8);
    for _ in 0..3 {
        let at = driver.place(&[0xee; 64]);
        driver.offer(&[Part::write(at, 64)]);
    }
    host.send(&frame(500)).expect("sent");
    host.send(&frame(100)).expect("sent");
    assert_eq!(receive(&mut pair, &mut driver).expect("good"), Turn::Idle);
    assert_eq!(driver.used(), [(0, 64), (1, 48)]);
}

// Firecracker CVE-2020-16843: a full receive ring froze the card for ever.
#[test]
fn a_driver_without_buffers_stalls_the_card_until_it_has_some() {
    let (mut pair, host) = pair(true);
    let mut driver = Driver::new(4);
    for round in 0..20_u8 {
        host.send(&frame(64)).expect("sent");
        host.send(&frame(65)).expect("sent");
        let dma = driver.dma();
        // The first wake-up finds no buffer, the kick after the buffers are there finds the frames.
        let tap = Woken::by_source(0);
        let queue = std::slice::from_mut(&mut driver.queue);
        assert_eq!(turn_of(&mut pair, tap, &dma, queue), Turn::Idle);
        assert!(driver.used().is_empty(), "{round}");
        for _ in 0..2 {
            let at = driver.place(&[0; 128]);
            driver.offer(&[Part::write(at, 128)]);
        }
        let queue = std::slice::from_mut(&mut driver.queue);
        assert_eq!(turn_of(&mut pair, Woken::by_queue(0), &dma, queue), Turn::Idle);
        assert_eq!(driver.used().len(), 2, "{round}");
    }
}

fn turn_of(
    pair: &mut Pair,
    woken: Woken,
    dma: &crate::platform::dma::Dma,
    queues: &mut [ServedQueue],
) -> Turn {
    pair.turn(woken, dma, queues).expect("a good queue")
}

#[test]
fn a_flood_of_frames_ends_the_turn_after_one_ring() {
    let (mut pair, host) = pair(true);
    let mut driver = Driver::new(4);
    let at = driver.place(&[0; 128]);
    for _ in 0..4 {
        driver.offer(&[Part::write(at, 128)]);
        host.send(&frame(64)).expect("sent");
    }
    assert_eq!(receive(&mut pair, &mut driver).expect("good"), Turn::Again);
    assert_eq!(driver.used().len(), 4);
}

// The descriptor has told of these frames, and of a full tap it tells no more.
#[test]
fn frames_left_by_a_turn_that_a_kick_began_come_in_the_next() {
    let (mut pair, host) = pair(true);
    let mut driver = Driver::new(4);
    let dma = driver.dma();
    let at = driver.place(&[0; 128]);
    for _ in 0..6 {
        host.send(&frame(64)).expect("sent");
    }
    for (count, turn) in [(4, Turn::Again), (2, Turn::Idle)] {
        for _ in 0..count {
            driver.offer(&[Part::write(at, 128)]);
        }
        let queue = std::slice::from_mut(&mut driver.queue);
        assert_eq!(turn_of(&mut pair, Woken::by_queue(0), &dma, queue), turn);
        assert_eq!(driver.used().len(), count);
    }
}

#[test]
fn a_card_that_is_to_wait_leaves_its_frames_until_it_may_go_on() {
    let (mut pair, host) = pair(true);
    let waits = Arc::new(AtomicBool::new(true));
    let (mut receiving, mut sending) = (Driver::new(8), Driver::new(8));
    for driver in [&mut receiving, &mut sending] {
        driver.queue.obey(waits.clone());
    }
    let dma = receiving.dma();
    let at = receiving.place(&[0; 128]);
    receiving.offer(&[Part::write(at, 128)]);
    let at = sending.place(&frame(100));
    sending.offer(&[Part::read(at, 112)]);
    host.send(&frame(64)).expect("sent");
    for (wait, turn, count) in [(true, Turn::Again, 0), (false, Turn::Idle, 1)] {
        waits.store(wait, Ordering::SeqCst);
        let queue = std::slice::from_mut(&mut receiving.queue);
        assert_eq!(turn_of(&mut pair, Woken::by_queue(0), &dma, queue), turn);
        assert_eq!(receiving.used().len(), count);
        assert_eq!(transmit(&mut pair, &mut sending).expect("good"), turn);
        assert_eq!(sending.used().len(), count);
        assert_eq!(host.recv(&mut [0; 128]).is_ok(), count == 1);
    }
}

#[test]
fn a_receive_buffer_without_room_for_the_header_breaks_the_queue() {
    let (mut pair, host) = pair(true);
    let mut driver = Driver::new(4);
    let at = driver.place(&[0; 128]);
    driver.offer(&[Part::write(at, 11)]);
    host.send(&frame(64)).expect("sent");
    assert!(matches!(
        receive(&mut pair, &mut driver),
        Err(Broken::Request { writable: 11, .. })
    ));
}

#[test]
fn a_further_buffer_that_is_empty_only_costs_a_chain() {
    let (mut pair, host) = pair(true);
    let mut driver = Driver::new(8);
    let at = driver.place(&[0; 128]);
    driver.offer(&[Part::write(at, 64)]);
    driver.offer(&[Part::read(at, 64)]);
    driver.offer(&[Part::write(at + 64, 64)]);
    host.send(&frame(100)).expect("sent");
    assert_eq!(receive(&mut pair, &mut driver).expect("good"), Turn::Idle);
    assert_eq!(driver.used(), [(0, 64), (1, 0), (2, 48)]);
    assert_eq!(driver.bytes(at, 112), received(100, 3));
}

#[test]
fn the_drivers_frames_reach_the_host() {
    let (mut pair, host) = pair(true);
    let mut driver = Driver::new(8);
    let at = driver.place(&frame(100));
    driver.offer(&[Part::read(at, 5), Part::read(at + 5, 7), Part::read(at + 12, 100)]);
    driver.offer(&[Part::read(at, 80)]);
    assert_eq!(transmit(&mut pair, &mut driver).expect("good"), Turn::Idle);
    let mut bytes = [0; 200];
    assert_eq!(host.recv(&mut bytes).expect("sent"), 112);
    assert_eq!(bytes[..112], frame(100));
    assert_eq!(host.recv(&mut bytes).expect("sent"), 80);
    assert_eq!(driver.used(), [(0, 0), (3, 0)]);
    assert_eq!(driver.interrupts(), 1, "one for both");
}

fn header(flags: u8, gso_type: u8, values: [u16; 4]) -> Vec<u8> {
    let values = values.into_iter().flat_map(u16::to_le_bytes);
    [flags, gso_type]
        .into_iter()
        .chain(values)
        .chain([0xee, 0xee])
        .collect()
}

/// What the host gets of one frame of 100 bytes with this header.
fn sent(header: &[u8]) -> Option<Vec<u8>> {
    let (mut pair, host) = pair(true);
    let mut driver = Driver::new(8);
    let at = driver.place(&[header, &[0x55; 100]].concat());
    driver.offer(&[Part::read(at, 112)]);
    assert_eq!(transmit(&mut pair, &mut driver).expect("good"), Turn::Idle);
    assert_eq!(driver.used(), [(0, 0)]);
    let mut bytes = vec![0; 200];
    let len = host.recv(&mut bytes).ok()?;
    bytes.truncate(len);
    Some(bytes)
}

#[test]
fn headers_that_stay_in_the_frame_pass() {
    // Flags, segmentation; header length, segment size, checksum start and offset.
    for (flags, gso, values) in [
        (0, 0, [0, 0, 0xffff, 0xffff]),
        (1, 0, [0, 0, 34, 16]),
        (1, 0, [0, 0, 90, 8]),
        (1, 1, [54, 40, 34, 16]),
        (1, 0x84, [74, 40, 54, 16]),
        (1, 5, [42, 20, 34, 6]),
    ] {
        let bytes = sent(&header(flags, gso, values)).expect("passes");
        assert_eq!(bytes[..10], header(flags, gso, values)[..10]);
        assert_eq!(bytes[10..12], [0, 0], "the last field is the device's");
        assert_eq!(bytes[12..], [0x55; 100]);
    }
}

// Firecracker 563303b50 and its kind: offsets in the header were not checked.
#[test]
fn headers_that_leave_the_frame_are_dropped() {
    for (flags, gso, values) in [
        (1, 0, [0, 0, 91, 8]),
        (1, 0, [0, 0, 0xffff, 0xffff]),
        (1, 0, [0, 0, 99, 0]),
        (0, 1, [101, 40, 0, 0]),
        (0, 1, [54, 0, 0, 0]),
        (0, 2, [54, 40, 0, 0]),
        (0, 0x7f, [54, 40, 0, 0]),
    ] {
        assert_eq!(
            sent(&header(flags, gso, values)),
            None,
            "{flags} {gso} {values:?}"
        );
    }
}

#[test]
fn bits_that_mean_nothing_are_dropped() {
    let bytes = sent(&header(0xfe, 0, [0; 4])).expect("passes");
    assert_eq!(bytes[0], 0);
}

#[test]
fn a_frame_without_header_breaks_the_queue() {
    let (mut pair, _host) = pair(true);
    let mut driver = Driver::new(8);
    let at = driver.place(&frame(0));
    driver.offer(&[Part::read(at, 11)]);
    assert!(matches!(
        transmit(&mut pair, &mut driver),
        Err(Broken::Request { readable: 11, .. })
    ));
}

#[test]
fn frames_in_the_hole_between_memories_break_the_queue() {
    for at in [LOW_END - 20, LOW_END, HIGH_END - 20, 0xfee0_0000] {
        let (mut pair, host) = pair(true);
        let mut driver = Driver::new(8);
        driver.offer(&[Part::read(at, 100)]);
        assert!(matches!(
            transmit(&mut pair, &mut driver),
            Err(Broken::Buffer { .. })
        ));
        assert!(host.recv(&mut [0; 8]).is_err());
    }
}

#[test]
fn a_frame_larger_than_any_is_dropped() {
    let (mut pair, host) = pair(true);
    let mut driver = Driver::new(8);
    let at = driver.place(&frame(70_000));
    driver.offer(&[Part::read(at, 70_000)]);
    assert_eq!(transmit(&mut pair, &mut driver).expect("good"), Turn::Idle);
    assert!(host.recv(&mut [0; 8]).is_err());
}

#[test]
fn a_host_that_takes_no_frames_costs_frames_and_nothing_else() {
    let (mut pair, host) = pair(true);
    drop(host);
    let mut driver = Driver::new(8);
    let at = driver.place(&frame(100));
    driver.offer(&[Part::read(at, 112)]);
    assert_eq!(transmit(&mut pair, &mut driver).expect("good"), Turn::Idle);
    assert_eq!(driver.used(), [(0, 0)]);
}

fn card(pairs: u16, offloads: bool) -> Net {
    Net::open(NetConfig {
        name: "net0".to_owned(),
        backend: NetBackend::None,
        mac: [2, 0, 0, 1, 2, 3],
        mtu: Some(1400),
        queue_pairs: pairs,
        queue_size: 256,
        offloads,
    })
    .expect("nothing of the host is needed")
}

#[test]
fn a_card_without_a_tap_swallows_frames_and_has_no_link() {
    let mut driver = Driver::new(8);
    let at = driver.place(&frame(100));
    driver.offer(&[Part::read(at, 112)]);
    let mut pair = Pair::new("net0".to_owned(), None, true);
    assert_eq!(transmit(&mut pair, &mut driver).expect("good"), Turn::Idle);
    assert_eq!(driver.used(), [(0, 0)]);
    let card = card(2, true);
    let mut data = [0xff; 16];
    card.read_config(0, &mut data);
    assert_eq!(data, [2, 0, 0, 1, 2, 3, 0, 0, 2, 0, 0x78, 5, 0, 0, 0, 0]);
}

#[test]
fn features_follow_the_configuration() {
    assert!(
        card(1, false)
            .features()
            .contains(MAC | STATUS | MERGEABLE | CONTROL | MTU)
    );
    assert!(
        !card(1, false)
            .features()
            .intersects(MULTI_QUEUE | CSUM | HOST_SEGMENTS | GUEST_CSUM)
    );
    assert!(
        card(2, true)
            .features()
            .contains(MULTI_QUEUE | CSUM | HOST_SEGMENTS)
    );
    assert_eq!(card(2, true).queue_sizes(), [256, 256, 256, 256, 64]);
}

#[test]
fn features_without_what_they_need_are_not_accepted() {
    let card = card(2, true);
    let (tso, guest_tso) = (Features::bit(11), Features::bit(7));
    assert!(card.accepts(MAC | CSUM | tso | GUEST_CSUM | guest_tso | CONTROL | MULTI_QUEUE));
    for wrong in [MULTI_QUEUE, CONTROL_OFFLOADS, tso, HOST_USO, guest_tso] {
        assert!(!card.accepts(MAC | wrong), "{wrong:?}");
    }
}

#[test]
fn the_tun_driver_is_told_only_what_it_has_words_for() {
    let bit = Features::bit;
    for (features, expected) in [
        (Features::empty(), Offloads::empty()),
        (GUEST_CSUM, Offloads::CSUM),
        (GUEST_CSUM | bit(7), Offloads::CSUM | Offloads::TSO4),
        (bit(7) | bit(8), Offloads::empty()),
        (GUEST_CSUM | bit(9), Offloads::CSUM),
        (
            GUEST_CSUM | bit(8) | bit(9),
            Offloads::CSUM | Offloads::TSO6 | Offloads::TSO_ECN,
        ),
        (GUEST_CSUM | bit(54), Offloads::CSUM),
        (
            GUEST_CSUM | bit(54) | bit(55),
            Offloads::CSUM | Offloads::USO4 | Offloads::USO6,
        ),
    ] {
        assert_eq!(offloads(features), expected, "{features:?}");
    }
}

fn units(card: &Net, features: Features) -> Vec<(String, Vec<u16>)> {
    let ram = crate::devices::virtio::driver::ram();
    let queues = (0..).zip(card.queue_sizes());
    let queues = queues.map(|(index, _)| Some(Driver::on(ram.clone(), index, 8, false).queue));
    let units = card.activate(Activation {
        features,
        queues: queues.collect(),
        interrupts: Arc::new(Told::default()),
    });
    let described = units.expect("nothing of the host is needed").into_iter();
    described
        .map(|unit| {
            let queues = unit.queues.iter().map(ServedQueue::index).collect();
            (unit.name, queues)
        })
        .collect()
}

#[test]
fn the_control_queue_is_behind_the_pairs_that_were_negotiated() {
    let name = |text: &str| text.to_owned();
    assert_eq!(
        units(&card(2, false), CONTROL | MULTI_QUEUE),
        [
            (name("net0-q0"), vec![0, 1]),
            (name("net0-q1"), vec![2, 3]),
            (name("net0-ctrl"), vec![4])
        ]
    );
    assert_eq!(
        units(&card(2, false), CONTROL),
        [(name("net0-q0"), vec![0, 1]), (name("net0-ctrl"), vec![2])]
    );
    assert_eq!(units(&card(1, false), MAC), [(name("net0-q0"), vec![0, 1])]);
}

#[test]
fn a_tap_that_cannot_be_is_refused_by_name() {
    let error = Net::open(NetConfig {
        backend: NetBackend::TapName("no/name".to_owned()),
        name: "net0".to_owned(),
        mac: [2; 6],
        mtu: None,
        queue_pairs: 1,
        queue_size: 256,
        offloads: true,
    });
    let text = error.err().expect("refused").to_string();
    assert!(text.contains("`no/name`"), "{text}");
}
