//! The instruction in all its forms, as an assembler writes it, and what only looks like it.

use super::*;
use proptest::prelude::*;

const RIP: u64 = 0x40_0000;
const FS: u64 = 0x7f00_0000_0000;
const GS: u64 = 0xffff_8880_0000_0000;

/// What register `number` holds: a number above and one below bit 32.
const fn reg(number: u64) -> u64 {
    (number + 1) << 40 | (number + 1) << 12
}

fn registers() -> Registers {
    std::array::from_fn(|number| reg(number as u64))
}

fn place(registers: &Registers) -> Place<'_> {
    Place {
        registers,
        rip: RIP,
        fs: FS,
        gs: GS,
    }
}

/// Length and operand address of the instruction that `code` begins with.
fn decoded(code: &[u8]) -> Option<(u64, u64)> {
    let instruction = Cmpxchg16b::decode(code)?;
    Some((instruction.len.into(), instruction.address(&place(&registers()))))
}

#[test]
fn every_form_of_address_is_understood() {
    let low = |value: u64| value & 0xffff_ffff;
    // As GNU as encodes the instruction in the first column.
    let table: [(&str, &[u8], u64); 22] = [
        ("(%rsi)", &[0x48, 0x0f, 0xc7, 0x0e], reg(6)),
        ("lock (%rdi)", &[0xf0, 0x48, 0x0f, 0xc7, 0x0f], reg(7)),
        ("(%r8)", &[0x49, 0x0f, 0xc7, 0x08], reg(8)),
        ("(%rsp)", &[0x48, 0x0f, 0xc7, 0x0c, 0x24], reg(4)),
        ("(%r12)", &[0x49, 0x0f, 0xc7, 0x0c, 0x24], reg(12)),
        ("0(%rbp)", &[0x48, 0x0f, 0xc7, 0x4d, 0], reg(5)),
        ("0(%r13)", &[0x49, 0x0f, 0xc7, 0x4d, 0], reg(13)),
        ("-16(%rax)", &[0x48, 0x0f, 0xc7, 0x48, 0xf0], reg(0) - 16),
        (
            "0x12345670(%r15)",
            &[0x49, 0x0f, 0xc7, 0x8f, 0x70, 0x56, 0x34, 0x12],
            reg(15) + 0x1234_5670,
        ),
        (
            "-0x20(%rsp)",
            &[0x48, 0x0f, 0xc7, 0x4c, 0x24, 0xe0],
            reg(4) - 0x20,
        ),
        (
            "(%rax,%rcx,8)",
            &[0x48, 0x0f, 0xc7, 0x0c, 0xc8],
            reg(0) + 8 * reg(1),
        ),
        (
            "16(%rax,%r12,4)",
            &[0x4a, 0x0f, 0xc7, 0x4c, 0xa0, 0x10],
            reg(0) + 4 * reg(12) + 16,
        ),
        (
            "0x100(%r13,%r14,2)",
            &[0x4b, 0x0f, 0xc7, 0x8c, 0x75, 0, 1, 0, 0],
            reg(13) + 2 * reg(14) + 0x100,
        ),
        (
            "0x1230(,%rbx,4)",
            &[0x48, 0x0f, 0xc7, 0x0c, 0x9d, 0x30, 0x12, 0, 0],
            4 * reg(3) + 0x1230,
        ),
        (
            "0x7ffffff0",
            &[0x48, 0x0f, 0xc7, 0x0c, 0x25, 0xf0, 0xff, 0xff, 0x7f],
            0x7fff_fff0,
        ),
        (
            "0x20(%rip)",
            &[0x48, 0x0f, 0xc7, 0x0d, 0x20, 0, 0, 0],
            RIP + 8 + 0x20,
        ),
        (
            "%gs:0x20(%rip)",
            &[0x65, 0x48, 0x0f, 0xc7, 0x0d, 0x20, 0, 0, 0],
            GS + RIP + 9 + 0x20,
        ),
        (
            "lock %gs:(%rsi)",
            &[0x65, 0xf0, 0x48, 0x0f, 0xc7, 0x0e],
            GS + reg(6),
        ),
        (
            "%fs:0x40",
            &[0x64, 0x48, 0x0f, 0xc7, 0x0c, 0x25, 0x40, 0, 0, 0],
            FS + 0x40,
        ),
        ("(%eax)", &[0x67, 0x48, 0x0f, 0xc7, 0x08], low(reg(0))),
        (
            "0x10(%eip)",
            &[0x67, 0x48, 0x0f, 0xc7, 0x0d, 0x10, 0, 0, 0],
            RIP + 9 + 0x10,
        ),
        (
            "%fs:-16(%r9d,%r10d,2)",
            &[0x64, 0x67, 0x4b, 0x0f, 0xc7, 0x4c, 0x51, 0xf0],
            FS + low(reg(9) + 2 * reg(10) - 16),
        ),
    ];
    for (text, code, address) in table {
        assert_eq!(decoded(code), Some((code.len() as u64, address)), "{text}");
        let mut followed = code.to_vec();
        followed.extend([0x90; 3]);
        assert_eq!(decoded(&followed), decoded(code), "{text} and what comes after");
        let short = &code[..code.len() - 1];
        assert_eq!(decoded(short), None, "{text} without its last byte");
    }
}

#[test]
fn other_instructions_are_not_ours() {
    let table: [(&str, &[u8]); 10] = [
        ("nothing", &[]),
        ("cmpxchg8b (%rsi)", &[0x0f, 0xc7, 0x0e]),
        ("cmpxchg8b (%r8), a REX without W", &[0x41, 0x0f, 0xc7, 0x08]),
        ("a REX that a prefix follows", &[0x48, 0xf0, 0x0f, 0xc7, 0x0e]),
        ("two of REX", &[0x48, 0x48, 0x0f, 0xc7, 0x0e]),
        ("a register as the operand", &[0x48, 0x0f, 0xc7, 0xce]),
        ("rdrand %rax", &[0x48, 0x0f, 0xc7, 0xf0]),
        ("xsavec64 (%rsi)", &[0x48, 0x0f, 0xc7, 0x26]),
        ("cmpxchg %rcx,(%rsi)", &[0x48, 0x0f, 0xb1, 0x0e]),
        ("prefixes alone", &[0x66; 15]),
    ];
    for (text, code) in table {
        assert_eq!(Cmpxchg16b::decode(code), None, "{text}");
    }
}

#[test]
fn an_instruction_of_more_than_15_bytes_is_none() {
    let mut code = vec![0x66; 11];
    code.extend([0x48, 0x0f, 0xc7, 0x0e]);
    assert_eq!(decoded(&code), Some((15, reg(6))));
    code.insert(0, 0x66);
    assert_eq!(decoded(&code), None);
}

#[test]
fn the_last_segment_override_counts_and_flat_ones_take_it_back() {
    let with = |prefixes: &[u8]| {
        let code: Vec<u8> = prefixes
            .iter()
            .chain(&[0x48, 0x0f, 0xc7, 0x0e])
            .copied()
            .collect();
        decoded(&code).map(|(_, address)| address)
    };
    assert_eq!(with(&[0x64, 0x65]), Some(GS + reg(6)));
    assert_eq!(with(&[0x65, 0x64]), Some(FS + reg(6)));
    assert_eq!(with(&[0x65, 0x3e]), Some(reg(6)));
}

#[test]
fn what_was_expected_sets_zf_and_leaves_the_registers() {
    let code = Cmpxchg16b::decode(&[0x48, 0x0f, 0xc7, 0x0e]).expect("valid");
    let mut regs = kvm_regs {
        rax: 1,
        rdx: 2,
        rip: RIP,
        rflags: 0x1_0283,
        ..Default::default()
    };
    code.complete(&mut regs, 2 << 64 | 1);
    assert_eq!((regs.rdx, regs.rax, regs.rip), (2, 1, RIP + 4));
    assert_eq!(regs.rflags, 0x2c3, "ZF set, RF cleared, the rest kept");
}

#[test]
fn what_was_not_expected_clears_zf_and_is_handed_over() {
    let code = Cmpxchg16b::decode(&[0xf0, 0x48, 0x0f, 0xc7, 0x0e]).expect("valid");
    let mut regs = kvm_regs {
        rax: 1,
        rdx: 2,
        rip: u64::MAX,
        rflags: 0x46,
        ..Default::default()
    };
    code.complete(&mut regs, u128::from(u64::MAX) << 64 | 7);
    assert_eq!((regs.rdx, regs.rax, regs.rip), (u64::MAX, 7, 4));
    assert_eq!(regs.rflags, 0x6);
}

#[test]
fn both_halves_come_from_the_right_registers() {
    let regs = kvm_regs {
        rax: 1,
        rdx: 2,
        rbx: 3,
        rcx: 4,
        ..Default::default()
    };
    assert_eq!(Cmpxchg16b::expected(&regs), 2 << 64 | 1);
    assert_eq!(Cmpxchg16b::replacement(&regs), 4 << 64 | 3);
    assert_eq!(numbered(&regs)[..4], [1, 4, 2, 3]);
}

#[test]
fn only_long_code_in_long_mode_is_of_64_bits() {
    let mut sregs = kvm_sregs::default();
    assert!(!in_64_bit_mode(&sregs));
    sregs.efer = 1 << 10;
    assert!(!in_64_bit_mode(&sregs), "compatibility mode");
    sregs.cs.l = 1;
    assert!(in_64_bit_mode(&sregs));
}

/// An operand as a programmer writes it.
#[derive(Debug, Clone, Copy)]
struct Operand {
    base: Option<u8>,
    index: Option<(u8, u8)>,
    displacement: i32,
    relative: bool,
}

fn operands() -> impl Strategy<Value = Operand> {
    let index = (0_u8..16, 0_u8..4).prop_filter("RSP is no index", |(number, _)| *number != 4);
    (
        proptest::option::of(0_u8..16),
        proptest::option::of(index),
        prop_oneof![Just(0), -128..128_i32, any::<i32>()],
        any::<bool>(),
    )
        .prop_map(|(base, index, displacement, relative)| Operand {
            base,
            index,
            displacement,
            relative,
        })
}

impl Operand {
    /// Its bytes from REX on, always with the widest displacement and a SIB byte where there can be one.
    fn longest(self) -> Vec<u8> {
        let displacement = self.displacement.to_le_bytes();
        let (number, scale) = self.index.unwrap_or((4, 0));
        let base = self.base.unwrap_or(5);
        let mut code = vec![0x48 | (number >> 3) << 1 | base >> 3, 0x0f, 0xc7];
        match self {
            Self { relative: true, .. } => code.push(0x0d),
            Self { base: None, .. } => code.extend([0x0c, scale << 6 | (number & 7) << 3 | 5]),
            Self { .. } => code.extend([0x8c, scale << 6 | (number & 7) << 3 | base & 7]),
        }
        code.extend(displacement);
        code
    }

    /// Its address on a processor at [`place`], by the rules for each part alone. The instruction has `len` bytes.
    fn address(self, len: u64) -> u64 {
        let displacement = i64::from(self.displacement).cast_unsigned();
        if self.relative {
            return (RIP + len).wrapping_add(displacement);
        }
        let base = self.base.map_or(0, |number| reg(number.into()));
        let index = self
            .index
            .map_or(0, |(number, scale)| reg(number.into()) * (1 << scale));
        base.wrapping_add(index).wrapping_add(displacement)
    }
}

proptest! {
    #[test]
    fn what_an_assembler_writes_is_read_back(
        operand in operands(),
        prefixes in proptest::collection::vec(prop_oneof![Just(0xf0_u8), Just(0x66), Just(0x65), Just(0x67)], 0..4),
    ) {
        let mut code = prefixes.clone();
        code.extend(operand.longest());
        let mut address = operand.address(code.len() as u64);
        if prefixes.contains(&0x67) {
            address &= 0xffff_ffff;
        }
        if prefixes.contains(&0x65) {
            address = address.wrapping_add(GS);
        }
        prop_assert_eq!(decoded(&code), Some((code.len() as u64, address)));
    }

    #[test]
    fn any_bytes_are_harmless_and_never_used_beyond_their_end(code in proptest::collection::vec(any::<u8>(), 0..20)) {
        if let Some((len, _)) = decoded(&code) {
            prop_assert!(len <= 15 && len <= code.len() as u64);
            let end = usize::try_from(len).expect("at most 15");
            prop_assert_eq!(decoded(&code[..end]), decoded(&code));
        }
    }

    #[test]
    fn bytes_that_look_like_it_are_harmless(
        rex in 0x48_u8..0x50,
        rest in proptest::collection::vec(any::<u8>(), 0..7),
        values in any::<Registers>(),
    ) {
        let mut code = vec![rex, 0x0f, 0xc7];
        code.extend(rest);
        if let Some(instruction) = Cmpxchg16b::decode(&code) {
            let mut regs = kvm_regs { rip: u64::MAX, ..Default::default() };
            instruction.address(&Place { registers: &values, rip: u64::MAX, fs: u64::MAX, gs: u64::MAX });
            instruction.complete(&mut regs, u128::MAX);
            prop_assert_eq!(regs.rip, u64::from(instruction.len) - 1);
        }
    }
}
