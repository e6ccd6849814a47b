//! The list: links, walks that end, and who sees which dword.

use super::*;

/// A capability of any size that records nothing but remembers its second dword.
struct Plain {
    id: CapabilityId,
    len: u16,
    value: u32,
}

impl Capability for Plain {
    fn id(&self) -> CapabilityId {
        self.id
    }
    fn len(&self) -> u16 {
        self.len
    }
    fn read(&self, dword: u16) -> u32 {
        if dword == 0 { 0xabcd_ffff } else { self.value }
    }
    fn write(&mut self, _dword: u16, write: DwordWrite) -> ConfigEffect {
        self.value = write.store(self.value, u32::MAX);
        ConfigEffect::empty()
    }
    fn reset(&mut self) {
        self.value = 0;
    }
}

fn standard(id: u8, len: u16) -> Box<Plain> {
    Box::new(Plain {
        id: CapabilityId::Standard(id),
        len,
        value: 0,
    })
}

fn extended(id: u16, len: u16) -> Box<Plain> {
    Box::new(Plain {
        id: CapabilityId::Extended { id, version: 1 },
        len,
        value: 0,
    })
}

fn byte(list: &CapabilityList, at: u16) -> u8 {
    list.read(at / 4).to_le_bytes()[usize::from(at % 4)]
}

#[test]
fn each_list_links_itself_whatever_the_order_of_pushes() {
    let mut list = CapabilityList::default();
    assert_eq!(list.push(extended(1, 0x48)), 0x100);
    assert_eq!(list.push(standard(0x11, 12)), 0x40);
    assert_eq!(list.push(extended(0xd, 8)), 0x148);
    assert_eq!(list.push(standard(0x09, 13)), 0x4c);
    assert_eq!(list.push(standard(0x01, 8)), 0x5c);
    assert_eq!(list.first(), 0x40);
    assert_eq!(list.read(0x10), 0xabcd_4c11);
    assert_eq!(list.read(0x13), 0xabcd_5c09);
    assert_eq!(list.read(0x17), 0xabcd_0001);
    assert_eq!(list.read(0x40), 0x1481_0001);
    assert_eq!(list.read(0x52), 0x0001_000d);
}

#[test]
fn class_11_every_walk_ends_within_the_space_it_walks() {
    let mut list = CapabilityList::default();
    (0..48).for_each(|_| {
        list.push(standard(9, 4));
    });
    (0..960).for_each(|_| {
        list.push(extended(0xb, 4));
    });
    let standard = std::iter::successors(Some(u16::from(list.first())), |at| {
        Some(u16::from(byte(&list, at + 1)))
    });
    assert_eq!(standard.take_while(|at| *at != 0).count(), 48);
    let extended = std::iter::successors(Some(0x100_u16), |at| u16::try_from(list.read(at / 4) >> 20).ok());
    assert_eq!(extended.take_while(|at| *at != 0).count(), 960);
}

#[test]
#[should_panic(expected = "does not fit")]
fn a_capability_too_many_is_refused() {
    let mut list = CapabilityList::default();
    list.push(standard(9, 190));
    list.push(standard(9, 4));
}

#[test]
fn an_empty_list_points_nowhere_and_reads_zero() {
    let mut list = CapabilityList::default();
    assert_eq!(list.first(), 0);
    assert_eq!((list.read(0x10), list.read(0x40), list.read(0x3ff)), (0, 0, 0));
    assert_eq!(
        list.write(0x40, DwordWrite::whole(u32::MAX)),
        ConfigEffect::empty()
    );
    list.push(extended(3, 12));
    assert_eq!(list.first(), 0);
}

#[test]
fn writes_to_the_header_never_arrive() {
    let mut list = CapabilityList::default();
    list.push(standard(9, 8));
    list.push(extended(3, 8));
    let _ = list.write(0x10, DwordWrite::new(0, &[1, 2]).expect("inside"));
    let _ = list.write(0x40, DwordWrite::whole(u32::MAX));
    assert_eq!((list.read(0x11), list.read(0x41)), (0, 0));
    let _ = list.write(0x10, DwordWrite::whole(0x1234_ffff));
    assert_eq!(list.read(0x11), 0x1234_0000);
}

#[test]
fn a_gap_behind_the_last_capability_is_nobodys() {
    let mut list = CapabilityList::default();
    list.push(standard(9, 8));
    let _ = list.write(0x12, DwordWrite::whole(7));
    assert_eq!((list.read(0x11), list.read(0x12), list.read(0xffff)), (0, 0, 0));
}

#[test]
fn a_capability_is_found_by_its_type() {
    let mut list = CapabilityList::default();
    list.push(Box::new(PowerManagement::new()));
    assert!(list.get::<PowerManagement>().is_some());
    assert!(list.get::<Express>().is_none());
    let _ = list.write(0x11, DwordWrite::whole(3));
    assert!(list.get_mut::<PowerManagement>().expect("pushed").is_asleep());
    list.reset();
    assert!(!list.get::<PowerManagement>().expect("pushed").is_asleep());
}
