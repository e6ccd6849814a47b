//! CMPXCHG16B, which KVM does not emulate, from its bytes to the address it works on.
//!
//! Bytes and registers are the guest's: anything that is not this instruction, whole and in its memory form, is
//! nobody's business here. AMD64 Architecture Programmer's Manual, volume 3: 1.2 "Instruction Prefixes", 1.4 "ModRM
//! and SIB Bytes", CMPXCHG16B.

use kvm_bindings::{kvm_regs, kvm_sregs};

use super::sys::halves;

/// Bytes that the instruction compares and exchanges; its operand begins at a multiple of them.
pub(super) const OPERAND: u64 = 16;

/// RFLAGS.ZF: the operand was what was expected.
const ZERO: u64 = 1 << 6;
/// RFLAGS.RF, which every instruction that completes clears.
const RESUME: u64 = 1 << 16;

/// Registers by the number that ModRM, SIB and REX give them.
pub(super) type Registers = [u64; 16];

/// What an address is counted from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Base {
    /// Zero.
    Nothing,
    /// A register.
    Register(usize),
    /// The next instruction's address.
    NextInstruction,
}

/// The segments that have a base in 64-bit mode.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Segment {
    Fs,
    Gs,
}

/// What the instruction needs of a processor to know its operand's address.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Place<'a> {
    /// General registers.
    pub(super) registers: &'a Registers,
    /// Where the instruction is.
    pub(super) rip: u64,
    /// FS's base.
    pub(super) fs: u64,
    /// GS's base.
    pub(super) gs: u64,
}

/// One CMPXCHG16B of 64-bit mode.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Cmpxchg16b {
    base: Base,
    /// A register, and how far it is shifted left.
    index: Option<(usize, u32)>,
    displacement: i32,
    segment: Option<Segment>,
    /// Addresses are of 32 bits (prefix 0x67).
    short: bool,
    /// Bytes of the instruction, at most 15.
    len: u8,
}

/// The bytes that are left of an instruction.
struct Bytes<'a>(std::slice::Iter<'a, u8>);

impl Bytes<'_> {
    fn next(&mut self) -> Option<u8> {
        self.0.next().copied()
    }

    /// A displacement of one byte.
    fn disp8(&mut self) -> Option<i32> {
        self.next().map(|byte| i8::from_le_bytes([byte]).into())
    }

    /// A displacement of four bytes.
    fn disp32(&mut self) -> Option<i32> {
        let bytes = [self.next()?, self.next()?, self.next()?, self.next()?];
        Some(i32::from_le_bytes(bytes))
    }
}

/// Field `at` of ModRM and SIB, and of REX the one bit above it.
fn register(byte: u8, at: u32, rex: u8, extension: u32) -> usize {
    let low = (byte >> at) & 7;
    let high = (rex >> extension) & 1;
    usize::from(low | high << 3)
}

impl Cmpxchg16b {
    /// The instruction that `code`, of at most 15 bytes and fetched in 64-bit mode, begins with, if it is this one.
    pub(super) fn decode(code: &[u8]) -> Option<Self> {
        let code = code.get(..15).unwrap_or(code);
        let mut bytes = Bytes(code.iter());
        let (mut segment, mut short) = (None, false);
        // LOCK, REPNE, REP and the operand size change nothing here: REX.W is stronger than the last. Neither do the
        // other four segments, whose bases are zero, but the last override counts.
        let mut byte = loop {
            match bytes.next()? {
                0xf0 | 0xf2 | 0xf3 | 0x66 => {}
                0x26 | 0x2e | 0x36 | 0x3e => segment = None,
                0x64 => segment = Some(Segment::Fs),
                0x65 => segment = Some(Segment::Gs),
                0x67 => short = true,
                other => break other,
            }
        };
        // REX counts only right before the opcode.
        let rex = byte;
        if rex & 0xf8 != 0x48 {
            return None;
        }
        byte = bytes.next()?;
        if (byte, bytes.next()?) != (0x0f, 0xc7) {
            return None;
        }
        let modrm = bytes.next()?;
        let (mode, opcode, rm) = (modrm >> 6, (modrm >> 3) & 7, modrm & 7);
        if opcode != 1 || mode == 3 {
            return None;
        }
        let (mut base, mut index) = (Base::Register(register(modrm, 0, rex, 0)), None);
        let mut wide = mode == 2;
        if rm == 4 {
            let sib = bytes.next()?;
            let number = register(sib, 3, rex, 1);
            // RSP's number means no index; R12 is one.
            index = (number != 4).then_some((number, u32::from(sib >> 6)));
            base = Base::Register(register(sib, 0, rex, 0));
            if mode == 0 && sib & 7 == 5 {
                (base, wide) = (Base::Nothing, true);
            }
        } else if mode == 0 && rm == 5 {
            (base, wide) = (Base::NextInstruction, true);
        }
        let displacement = match (wide, mode) {
            (true, _) => bytes.disp32()?,
            (false, 1) => bytes.disp8()?,
            (false, _) => 0,
        };
        let used = code.len() - bytes.0.len();
        Some(Self {
            base,
            index,
            displacement,
            segment,
            short,
            len: u8::try_from(used).expect("an instruction has at most 15 bytes"),
        })
    }

    /// The linear address of its operand on a processor at `place`.
    pub(super) fn address(&self, place: &Place<'_>) -> u64 {
        let value = |number: usize| place.registers.get(number).copied().unwrap_or_default();
        let base = match self.base {
            Base::Nothing => 0,
            Base::Register(number) => value(number),
            Base::NextInstruction => place.rip.wrapping_add(self.len.into()),
        };
        let index = self.index.map_or(0, |(number, shift)| value(number) << shift);
        let effective = base
            .wrapping_add(index)
            .wrapping_add_signed(self.displacement.into());
        let effective = if self.short {
            effective & u64::from(u32::MAX)
        } else {
            effective
        };
        effective.wrapping_add(match self.segment {
            None => 0,
            Some(Segment::Fs) => place.fs,
            Some(Segment::Gs) => place.gs,
        })
    }

    /// What it expects to find, by `regs`: RDX:RAX.
    pub(super) fn expected(regs: &kvm_regs) -> u128 {
        u128::from(regs.rdx) << 64 | u128::from(regs.rax)
    }

    /// What it stores then, by `regs`: RCX:RBX.
    pub(super) fn replacement(regs: &kvm_regs) -> u128 {
        u128::from(regs.rcx) << 64 | u128::from(regs.rbx)
    }

    /// Complete it in `regs`: the operand was `found`, and not what was expected if that is so.
    pub(super) fn complete(&self, regs: &mut kvm_regs, found: u128) {
        let equal = found == Self::expected(regs);
        regs.rflags &= !(ZERO | RESUME);
        if equal {
            regs.rflags |= ZERO;
        } else {
            [regs.rax, regs.rdx] = halves(found);
        }
        regs.rip = regs.rip.wrapping_add(self.len.into());
    }
}

/// The general registers of `regs` by number.
pub(super) fn numbered(regs: &kvm_regs) -> Registers {
    [
        regs.rax, regs.rcx, regs.rdx, regs.rbx, regs.rsp, regs.rbp, regs.rsi, regs.rdi, regs.r8, regs.r9,
        regs.r10, regs.r11, regs.r12, regs.r13, regs.r14, regs.r15,
    ]
}

/// Whether a processor with `sregs` is in 64-bit mode: long mode is active and the code segment is long.
pub(super) fn in_64_bit_mode(sregs: &kvm_sregs) -> bool {
    const LONG_MODE_ACTIVE: u64 = 1 << 10;
    sregs.efer & LONG_MODE_ACTIVE != 0 && sregs.cs.l != 0
}

#[cfg(test)]
mod tests;
