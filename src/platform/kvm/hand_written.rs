//! Instructions written by hand, on this host's KVM: what stores to watched pages come to, and in which order routes and
//! irqfds are made.
//!
//! They need `/dev/kvm`, which not every machine that builds this has, so plain `cargo test` counts them as ignored.
//! `scripts/test unit` runs them where KVM can be opened and says so where not; `scripts/test lab` runs them always.

use std::collections::BTreeSet;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, Weak};

use kvm_bindings::{kvm_regs, kvm_segment};
use vm_memory::{GuestAddress, GuestMemoryMmap};

use super::{Exit, Kvm, KvmVm, Vcpu, allow_kicks};
use crate::platform::addr::{Gpa, GpaRange};
use crate::platform::memory::GuestRam;
use crate::platform::protection::Watcher;

const CODE: u64 = 0x1_0000;
const STACK: u64 = 0x1_8000;
const WATCHED: u64 = 0x2_0000;
const PLAIN: u64 = 0x2_1000;
/// Where the guest says that it is done.
const DONE: u16 = 0xf4;

/// A machine of 2 MiB whose processor is in 64-bit mode with addresses as they are.
fn machine() -> (KvmVm, GuestRam) {
    let kvm = Kvm::open().unwrap_or_else(|error| {
        panic!(
            "{error}: these tests need KVM; `scripts/test lab by_hand` runs them where this machine has none"
        )
    });
    let ram = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 2 << 20)]).expect("2 MiB");
    let ram = GuestRam::new(ram);
    // One page of 2 MiB, present, writable and the user's.
    for (at, entry) in [(0x1000, 0x2007_u64), (0x2000, 0x3007), (0x3000, 0x87)] {
        ram.write_obj(Gpa(at), &entry).expect("RAM");
    }
    let vm = KvmVm::new(&kvm, &ram).expect("a machine");
    allow_kicks().expect("a handler");
    (vm, ram)
}

/// A processor of `vm` in 64-bit mode at `code`.
fn processor(vm: &KvmVm, ram: &GuestRam, code: &[u8], regs: kvm_regs) -> Vcpu {
    ram.write(Gpa(CODE), code).expect("RAM");
    let vcpu = vm.vcpu(0).expect("a processor");
    // KVM takes 64-bit mode only of a processor that has it.
    let kvm = Kvm::open().expect("it was opened for the machine");
    let leaves = kvm.supported_cpuid().expect("a list");
    vcpu.set_cpuid(&leaves).expect("taken");
    let mut sregs = vcpu.sregs().expect("registers");
    let flat = |type_, selector| kvm_segment {
        base: 0,
        limit: u32::MAX,
        selector,
        type_,
        present: 1,
        s: 1,
        g: 1,
        db: u8::from(type_ == 3),
        l: u8::from(type_ == 11),
        ..Default::default()
    };
    sregs.cs = flat(11, 8);
    for segment in [
        &mut sregs.ds,
        &mut sregs.es,
        &mut sregs.ss,
        &mut sregs.fs,
        &mut sregs.gs,
    ] {
        *segment = flat(3, 16);
    }
    (sregs.cr0, sregs.cr3, sregs.cr4, sregs.efer) = (0x8000_0033, 0x1000, 0x20, 0x500);
    vcpu.set_sregs(&sregs).expect("taken");
    let regs = kvm_regs {
        rip: CODE,
        rsp: STACK,
        rflags: 2,
        ..regs
    };
    vcpu.set_regs(&regs).expect("taken");
    vcpu
}

/// Run until the guest is done.
fn run(vm: &KvmVm, vcpu: &mut Vcpu) {
    for _ in 0..1000 {
        match vcpu.run().expect("the host runs it") {
            Exit::RamWrite { at, data } => vm.watched_pages().store(at, data),
            Exit::Unemulated(instruction) => {
                let carried = vcpu.carry_out(&instruction).expect("registers");
                assert!(carried, "{instruction}; {}", vcpu.registers());
            }
            Exit::PortWrite { port: DONE, .. } => return,
            Exit::Interrupted => vcpu.heard_kick(),
            other => panic!("{other:?}"),
        }
    }
    panic!("too many exits");
}

/// Keeps what it hears and what was in memory then.
struct Ear(GuestRam, Mutex<Vec<(u64, u64, u128)>>);

impl Watcher for Ear {
    fn written(&self, range: GpaRange) {
        let there = self.0.read_obj(Gpa(WATCHED)).expect("RAM");
        let mut heard = self.1.lock().expect("not poisoned");
        heard.push((range.start().0, range.len(), there));
    }
}

#[test]
#[ignore = "needs /dev/kvm"]
fn stores_of_every_width_and_compare_exchanges_are_heard_in_order() {
    // movb $0x11,(%rdi); movw $0x2222,2(%rdi); movl $0x33333333,4(%rdi); mov %r8,8(%rdi);
    // lock cmpxchg16b (%rdi); setz (%rsi); cmpxchg16b (%rdi); setz 1(%rsi); mov (%rdi),%rax; mov %rax,8(%rsi);
    // out %al,$0xf4
    const CODE_BYTES: &[u8] = &[
        0xc6, 0x07, 0x11, 0x66, 0xc7, 0x47, 0x02, 0x22, 0x22, 0xc7, 0x47, 0x04, 0x33, 0x33, 0x33, 0x33, 0x4c,
        0x89, 0x47, 0x08, 0xf0, 0x48, 0x0f, 0xc7, 0x0f, 0x0f, 0x94, 0x06, 0x48, 0x0f, 0xc7, 0x0f, 0x0f, 0x94,
        0x46, 0x01, 0x48, 0x8b, 0x07, 0x48, 0x89, 0x46, 0x08, 0xe6, 0xf4,
    ];
    let (vm, ram) = machine();
    let regs = kvm_regs {
        rdi: WATCHED,
        rsi: PLAIN,
        r8: 0x4444_4444_4444_4444,
        rbx: 5,
        rcx: 6,
        ..Default::default()
    };
    ram.write(Gpa(PLAIN), &[0xff; 2]).expect("RAM");
    let mut vcpu = processor(&vm, &ram, CODE_BYTES, regs);
    let ear = Arc::new(Ear(ram.clone(), Mutex::default()));
    let protection = vm
        .write_protection()
        .expect("a kernel that hands instructions over");
    let watcher: Arc<dyn Watcher> = ear.clone();
    let watcher: Weak<dyn Watcher> = Arc::downgrade(&watcher);
    protection
        .watch(&watcher, &BTreeSet::from([Gpa(WATCHED)]))
        .expect("RAM");
    run(&vm, &mut vcpu);
    let heard = std::mem::take(&mut *ear.1.lock().expect("not poisoned"));
    let low = 0x3333_3333_2222_0011_u128;
    let full = 0x4444_4444_4444_4444_u128 << 64 | low;
    let expected = [
        (WATCHED, 1, 0x11),
        (WATCHED + 2, 2, 0x2222_0011),
        (WATCHED + 4, 4, low),
        (WATCHED + 8, 8, full),
        (WATCHED, 16, 6 << 64 | 5),
    ];
    assert_eq!(heard, expected);
    assert_eq!(ram.read_obj::<u16>(Gpa(PLAIN)), Ok(0x0100), "ZF of each");
    assert_eq!(ram.read_obj::<u64>(Gpa(PLAIN + 8)), Ok(5), "read without an exit");
    let counts = vm.watched_pages().counts();
    assert_eq!((counts.pages, counts.stores, counts.compare_exchanges), (1, 4, 2));

    // Once nobody watches, the same instructions are no exits.
    protection.watch(&watcher, &BTreeSet::new()).expect("nothing");
    vcpu.set_regs(&kvm_regs {
        rip: CODE,
        rsp: STACK,
        rflags: 2,
        ..regs
    })
    .expect("taken");
    run(&vm, &mut vcpu);
    assert_eq!(ear.1.lock().expect("not poisoned").len(), 0);
    assert_eq!(vm.watched_pages().counts().stores, 4);
}

#[test]
#[ignore = "needs /dev/kvm"]
fn a_processor_that_stores_without_end_is_stopped_for_every_change_and_no_store_is_lost() {
    // inc %rax; mov %rax,(%rdi); jmp back
    const CODE_BYTES: &[u8] = &[0x48, 0xff, 0xc0, 0x48, 0x89, 0x07, 0xeb, 0xf8];
    const CHANGES: u64 = 40;
    let (vm, ram) = machine();
    let regs = kvm_regs {
        rdi: WATCHED,
        ..Default::default()
    };
    let mut vcpu = processor(&vm, &ram, CODE_BYTES, regs);
    let kick = vcpu.kick();
    let protection = vm
        .write_protection()
        .expect("a kernel that hands instructions over");
    let ear = Arc::new(Ear(ram.clone(), Mutex::default()));
    let watcher: Arc<dyn Watcher> = ear.clone();
    let watcher: Weak<dyn Watcher> = Arc::downgrade(&watcher);
    let over = AtomicBool::new(false);
    let stored = || ram.read_obj::<u64>(Gpa(WATCHED)).expect("RAM");
    std::thread::scope(|scope| {
        let runner = scope.spawn(|| {
            while !over.load(Ordering::SeqCst) {
                match vcpu.run().expect("the host runs it") {
                    Exit::RamWrite { at, data } => vm.watched_pages().store(at, data),
                    Exit::Interrupted => vcpu.heard_kick(),
                    other => panic!("{other:?}"),
                }
            }
        });
        while stored() == 0 {
            std::thread::yield_now();
        }
        for change in 0..=CHANGES {
            let pages = BTreeSet::from_iter((change % 2 == 0).then_some(Gpa(WATCHED)));
            protection.watch(&watcher, &pages).expect("not refused");
            // It goes on after each.
            let before = stored();
            while stored() == before {
                std::thread::yield_now();
            }
        }
        over.store(true, Ordering::SeqCst);
        kick.request();
        runner.join().expect("no panic");
    });
    let heard = ear.1.lock().expect("not poisoned");
    assert_eq!(heard.last().map(|(.., there)| *there), Some(stored().into()));
    assert!(heard.iter().all(|(at, len, _)| (*at, *len) == (WATCHED, 8)));
    let consecutive = heard.windows(2).filter(|pair| pair[0].2 + 1 == pair[1].2).count();
    let periods = usize::try_from(CHANGES / 2).expect("small");
    assert!(
        consecutive + periods + 1 >= heard.len(),
        "every store of a period was heard"
    );
    assert!(vm.watched_pages().counts().processors_stopped >= CHANGES / 2);
}

#[test]
#[ignore = "needs /dev/kvm"]
fn a_compare_exchange_finds_its_page_whatever_slots_change_meanwhile() {
    // lock cmpxchg16b (%rdi); jmp back
    const CODE_BYTES: &[u8] = &[0xf0, 0x48, 0x0f, 0xc7, 0x0f, 0xeb, 0xf9];
    let (vm, ram) = machine();
    let regs = kvm_regs {
        rdi: WATCHED,
        ..Default::default()
    };
    let mut vcpu = processor(&vm, &ram, CODE_BYTES, regs);
    let kick = vcpu.kick();
    let protection = vm
        .write_protection()
        .expect("a kernel that hands instructions over");
    let ears: [Arc<dyn Watcher>; 2] = [0, 1].map(|_| Arc::new(Ear(ram.clone(), Mutex::default())) as _);
    let [table, other] = ears.each_ref().map(Arc::downgrade);
    protection
        .watch(&table, &BTreeSet::from([Gpa(WATCHED)]))
        .expect("RAM");
    let over = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let runner = scope.spawn(|| {
            while !over.load(Ordering::SeqCst) {
                match vcpu.run().expect("the host runs it") {
                    Exit::Unemulated(instruction) => {
                        let carried = vcpu.carry_out(&instruction).expect("registers");
                        assert!(carried, "{instruction}; {}", vcpu.registers());
                    }
                    Exit::Interrupted => vcpu.heard_kick(),
                    other => panic!("{other:?}"),
                }
            }
        });
        for change in 0..100 {
            let pages = BTreeSet::from_iter((change % 2 == 0).then_some(Gpa(PLAIN + 0x4000)));
            protection.watch(&other, &pages).expect("not refused");
            std::thread::yield_now();
        }
        over.store(true, Ordering::SeqCst);
        kick.request();
        runner.join().expect("no panic");
    });
    assert!(vm.watched_pages().counts().compare_exchanges > 0);
}

/// Run CMPXCHG16B on an address without RAM at privilege level `level` up to where KVM gives up; whether it was taken.
fn outside_ram(vm: &KvmVm, ram: &GuestRam, level: u8) -> (bool, Vcpu) {
    let regs = kvm_regs {
        rdi: 2 << 20,
        ..Default::default()
    };
    // A second page of 2 MiB, beyond RAM.
    ram.write_obj(Gpa(0x3008), &0x20_0087_u64).expect("RAM");
    let mut vcpu = processor(vm, ram, &[0x48, 0x0f, 0xc7, 0x0f], regs);
    let mut sregs = vcpu.sregs().expect("registers");
    for segment in [&mut sregs.cs, &mut sregs.ss] {
        (segment.dpl, segment.selector) = (level, segment.selector | u16::from(level));
    }
    vcpu.set_sregs(&sregs).expect("taken");
    for _ in 0..10 {
        match vcpu.run().expect("the host runs it") {
            Exit::MmioRead { data, .. } => data.fill(0),
            Exit::Unemulated(instruction) => {
                let taken = vcpu.carry_out(&instruction).expect("registers");
                return (taken, vcpu);
            }
            other => panic!("{other:?}"),
        }
    }
    panic!("too many exits");
}

#[test]
#[ignore = "needs /dev/kvm"]
fn where_there_is_no_ram_a_process_gets_ud_and_a_kernel_cannot_go_on() {
    let (vm, ram) = machine();
    vm.write_protection()
        .expect("a kernel that hands instructions over");
    assert!(!outside_ram(&vm, &ram, 0).0);
    drop(vm);
    let (vm, ram) = machine();
    vm.write_protection()
        .expect("a kernel that hands instructions over");
    let (taken, mut vcpu) = outside_ram(&vm, &ram, 3);
    assert!(taken);
    // There is no table of handlers.
    assert!(matches!(vcpu.run(), Ok(Exit::TripleFault)));
    assert_eq!(vm.watched_pages().counts().compare_exchanges, 0);
}
