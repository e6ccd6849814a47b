//! The register file of the test device: plain state. A write says what it starts; whoever embeds the file
//! starts it.

use super::spec::{
    Caps, Command, Flags, IrqType, Reg, Rights, Space, Status, TranslationInfo, UnknownCommand,
};
use crate::pci::access::DwordWrite;

/// Where the doorbell is in BAR 0 while there is one.
pub const DOORBELL: u64 = 0x80;
/// What rings it.
pub const DOORBELL_DATA: u32 = 0x0000_db01;
/// What the doorbell's BAR reads as while there is none.
const NO_BAR: u32 = u32::MAX;

/// How requests are made.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub(super) struct Route {
    /// In which process address space, if any.
    pub(super) pasid: Option<u32>,
    /// As a supervisor there.
    pub(super) privileged: bool,
    /// By addresses that the device asked for.
    pub(super) translated: bool,
}

/// What a translation request was answered.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub(super) struct Answered {
    pub(super) target: u64,
    pub(super) info: TranslationInfo,
}

/// What a command does, with all it needs: registers that change while it runs do not matter to it.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Work {
    RaiseIrq,
    Read {
        from: u64,
        len: u32,
        checksum: u32,
        route: Route,
    },
    Write {
        to: u64,
        len: u32,
        route: Route,
    },
    Copy {
        from: u64,
        to: u64,
        len: u32,
        route: Route,
    },
    EnableDoorbell,
    DisableDoorbell,
    SetupSubranges {
        bar: u32,
    },
    ClearSubranges {
        bar: u32,
    },
    Translate {
        at: u64,
        rights: Rights,
        route: Route,
    },
    RequestPage {
        at: u64,
        rights: Rights,
        route: Route,
    },
    /// The doorbell was rung.
    Ring,
}

/// Something to do, and how to say that it is done.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct Job {
    pub(super) work: Work,
    pub(super) irq_type: IrqType,
    pub(super) irq_number: u32,
}

/// How a job ended.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub(super) struct Ended {
    pub(super) status: Status,
    /// What the checksum register reads from now on, where that changed.
    pub(super) checksum: Option<u32>,
    /// Whether there is a doorbell from now on, where that changed.
    pub(super) doorbell: Option<bool>,
    /// What a translation request was answered, where there was one.
    pub(super) answered: Option<Answered>,
}

/// Every register of BAR 0 but the MSI-X structures.
#[derive(Debug)]
pub(super) struct Registers {
    magic: u32,
    status: Status,
    source: u64,
    destination: u64,
    size: u32,
    checksum: u32,
    irq_type: IrqType,
    irq_number: u32,
    flags: Flags,
    caps: Caps,
    doorbell: bool,
    space: Space,
    rights: Rights,
    answered: Answered,
    /// What the command register reads while something runs.
    running: Option<u32>,
}

impl Registers {
    /// As after power-on, of a device that can do `caps`.
    pub(super) const fn new(caps: Caps) -> Self {
        Self {
            magic: 0,
            status: Status::empty(),
            source: 0,
            destination: 0,
            size: 0,
            checksum: 0,
            irq_type: IrqType(0),
            irq_number: 0,
            flags: Flags::empty(),
            caps,
            doorbell: false,
            space: Space::new(),
            rights: Rights::new(),
            answered: Answered {
                target: 0,
                info: TranslationInfo::new(),
            },
            running: None,
        }
    }

    /// As after power-on. Nothing runs.
    pub(super) const fn reset(&mut self) {
        *self = Self::new(self.caps);
    }

    /// Whether there is a doorbell.
    pub(super) const fn has_doorbell(&self) -> bool {
        self.doorbell
    }

    /// What `register` reads.
    pub(super) fn read(&self, register: Reg) -> u32 {
        let shown = |value: u32, hidden: u32| if self.doorbell { value } else { hidden };
        match register {
            Reg::Magic => self.magic,
            Reg::Command => self.running.unwrap_or(0),
            Reg::Status => self.status.bits(),
            Reg::SourceLow => low(self.source),
            Reg::SourceHigh => high(self.source),
            Reg::DestinationLow => low(self.destination),
            Reg::DestinationHigh => high(self.destination),
            Reg::Size => self.size,
            Reg::Checksum => self.checksum,
            Reg::IrqType => self.irq_type.0,
            Reg::IrqNumber => self.irq_number,
            Reg::Flags => self.flags.bits(),
            Reg::Caps => self.caps.bits(),
            Reg::DoorbellBar => shown(0, NO_BAR),
            Reg::DoorbellOffset => shown(low(DOORBELL), 0),
            Reg::DoorbellData => shown(DOORBELL_DATA, 0),
            Reg::Space => self.space.into_bits(),
            Reg::Rights => self.rights.into_bits(),
            Reg::TranslationLow => low(self.answered.target),
            Reg::TranslationHigh => high(self.answered.target),
            Reg::TranslationInfo => self.answered.info.into_bits(),
            // Not the register file's to know.
            Reg::Response | Reg::Kept | Reg::Invalidations => 0,
        }
    }

    /// A guest's write; what it starts.
    pub(super) fn write(&mut self, register: Reg, write: DwordWrite) -> Option<Job> {
        let stored = write.store(self.read(register), u32::MAX);
        match register {
            Reg::Magic => self.magic = stored,
            Reg::Command => return self.command(write.value()),
            Reg::Status => self.status = Status::from_bits_retain(stored),
            Reg::SourceLow => self.source = joined(stored, high(self.source)),
            Reg::SourceHigh => self.source = joined(low(self.source), stored),
            Reg::DestinationLow => self.destination = joined(stored, high(self.destination)),
            Reg::DestinationHigh => self.destination = joined(low(self.destination), stored),
            Reg::Size => self.size = stored,
            Reg::Checksum => self.checksum = stored,
            Reg::IrqType => self.irq_type = IrqType(stored),
            Reg::IrqNumber => self.irq_number = stored,
            Reg::Flags => self.flags = Flags::from_bits_retain(stored),
            Reg::Space => self.space = Space::from_bits(stored),
            Reg::Rights => self.rights = Rights::from_bits(stored),
            Reg::Caps
            | Reg::DoorbellBar
            | Reg::DoorbellOffset
            | Reg::DoorbellData
            | Reg::TranslationLow
            | Reg::TranslationHigh
            | Reg::TranslationInfo
            | Reg::Response
            | Reg::Kept
            | Reg::Invalidations => {}
        }
        None
    }

    /// The doorbell was written; what that starts.
    pub(super) fn ring(&mut self, write: DwordWrite) -> Option<Job> {
        let rung = self.doorbell && write == DwordWrite::whole(DOORBELL_DATA);
        if rung { self.start(Work::Ring, 0) } else { None }
    }

    /// What ran is over.
    pub(super) fn finish(&mut self, ended: Ended) {
        self.running = None;
        self.status |= ended.status;
        self.checksum = ended.checksum.unwrap_or(self.checksum);
        self.doorbell = ended.doorbell.unwrap_or(self.doorbell);
        self.answered = ended.answered.unwrap_or(self.answered);
    }

    fn command(&mut self, code: u32) -> Option<Job> {
        if code == 0 {
            return None;
        }
        let route = self.route();
        let work = match Command::try_from(code) {
            Ok(Command::RaiseIrq) => Work::RaiseIrq,
            Ok(Command::Read) => Work::Read {
                from: self.source,
                len: self.size,
                checksum: self.checksum,
                route,
            },
            Ok(Command::Write) => Work::Write {
                to: self.destination,
                len: self.size,
                route,
            },
            Ok(Command::Copy) => Work::Copy {
                from: self.source,
                to: self.destination,
                len: self.size,
                route,
            },
            Ok(Command::EnableDoorbell) => Work::EnableDoorbell,
            Ok(Command::DisableDoorbell) => Work::DisableDoorbell,
            Ok(Command::SetupSubranges) => Work::SetupSubranges { bar: self.size },
            Ok(Command::ClearSubranges) => Work::ClearSubranges { bar: self.size },
            Ok(Command::Translate) => Work::Translate {
                at: self.source,
                rights: self.rights,
                route,
            },
            Ok(Command::RequestPage) => Work::RequestPage {
                at: self.source,
                rights: self.rights,
                route,
            },
            Err(UnknownCommand(_)) => {
                self.status |= Status::COMMAND_INVALID;
                return None;
            }
        };
        let job = self.start(work, code)?;
        self.status = Status::empty();
        Some(job)
    }

    fn route(&self) -> Route {
        let pasid = self.flags.contains(Flags::PASID);
        Route {
            pasid: pasid.then(|| self.space.pasid()),
            privileged: pasid && self.space.privileged(),
            translated: self.flags.contains(Flags::TRANSLATED),
        }
    }

    fn start(&mut self, work: Work, code: u32) -> Option<Job> {
        if self.running.is_some() {
            self.status |= Status::BUSY;
            return None;
        }
        self.running = Some(code);
        Some(Job {
            work,
            irq_type: self.irq_type,
            irq_number: self.irq_number,
        })
    }
}

const fn low(value: u64) -> u32 {
    let [a, b, c, d, ..] = value.to_le_bytes();
    u32::from_le_bytes([a, b, c, d])
}

const fn high(value: u64) -> u32 {
    low(value >> 32)
}

const fn joined(low: u32, high: u32) -> u64 {
    (high as u64) << 32 | low as u64
}

#[cfg(test)]
mod tests {
    use super::*;

    fn registers() -> Registers {
        Registers::new(Caps::from_bits_retain(0x3f))
    }

    fn set(registers: &mut Registers, register: Reg, value: u32) -> Option<Job> {
        registers.write(register, DwordWrite::whole(value))
    }

    const STORAGE: [Reg; 11] = [
        Reg::Magic,
        Reg::Status,
        Reg::SourceLow,
        Reg::SourceHigh,
        Reg::DestinationLow,
        Reg::DestinationHigh,
        Reg::Size,
        Reg::Checksum,
        Reg::IrqType,
        Reg::IrqNumber,
        Reg::Flags,
    ];

    #[test]
    fn storage_keeps_every_lane_apart_until_a_reset() {
        let mut registers = registers();
        for (register, value) in STORAGE.into_iter().zip(0x1111_1110_u32..) {
            assert_eq!(set(&mut registers, register, value), None);
        }
        for (register, value) in STORAGE.into_iter().zip(0x1111_1110_u32..) {
            let byte = DwordWrite::new(2, &[0xee]).expect("inside");
            assert_eq!(registers.write(register, byte), None);
            assert_eq!(
                registers.read(register),
                value & 0xff00_ffff | 0x00ee_0000,
                "{register:?}"
            );
        }
        registers.reset();
        assert!(STORAGE.iter().all(|register| registers.read(*register) == 0));
    }

    #[test]
    fn what_the_device_can_do_and_its_doorbell_cannot_be_written() {
        let mut registers = registers();
        let fixed = [
            Reg::Caps,
            Reg::DoorbellBar,
            Reg::DoorbellOffset,
            Reg::DoorbellData,
        ];
        let before = fixed.map(|register| registers.read(register));
        for register in fixed {
            assert_eq!(set(&mut registers, register, 0x1234_5678), None);
        }
        assert_eq!(fixed.map(|register| registers.read(register)), before);
        assert_eq!(before, [0x3f, u32::MAX, 0, 0]);
    }

    #[test]
    fn a_command_takes_what_the_registers_say_when_it_comes() {
        let mut registers = registers();
        let values = [
            (Reg::SourceLow, 0x1000),
            (Reg::SourceHigh, 0x1),
            (Reg::DestinationLow, 0x2000),
            (Reg::DestinationHigh, 0x2),
            (Reg::Size, 3),
            (Reg::Checksum, 0xcafe),
            (Reg::IrqType, 2),
            (Reg::IrqNumber, 7),
            (Reg::Status, u32::MAX),
            (Reg::Flags, 0xc000_0001),
            (Reg::Space, 0x8001_2345),
            (Reg::Rights, 0x0005_000b),
        ];
        let started = |code| {
            let mut registers = super::tests::registers();
            for (register, value) in values {
                set(&mut registers, register, value);
            }
            let job = set(&mut registers, Reg::Command, code).expect("a command");
            assert_eq!(
                (registers.read(Reg::Command), registers.read(Reg::Status)),
                (code, 0)
            );
            assert_eq!((job.irq_type, job.irq_number), (IrqType::MSIX, 7));
            job.work
        };
        let (from, to, len) = (0x1_0000_1000, 0x2_0000_2000, 3);
        let route = Route {
            pasid: Some(0x1_2345),
            privileged: true,
            translated: true,
        };
        let rights = Rights::new()
            .with_read(true)
            .with_write(true)
            .with_last(true)
            .with_group(5);
        let ours = [0x0100_0000, 0x0200_0000].map(started);
        assert_eq!(
            ours,
            [
                Work::Translate {
                    at: from,
                    rights,
                    route
                },
                Work::RequestPage {
                    at: from,
                    rights,
                    route
                },
            ]
        );
        assert_eq!(
            [0x1, 0x8, 0x10, 0x20, 0x40, 0x80, 0x100, 0x200].map(started),
            [
                Work::RaiseIrq,
                Work::Read {
                    from,
                    len,
                    checksum: 0xcafe,
                    route,
                },
                Work::Write { to, len, route },
                Work::Copy { from, to, len, route },
                Work::EnableDoorbell,
                Work::DisableDoorbell,
                Work::SetupSubranges { bar: 3 },
                Work::ClearSubranges { bar: 3 },
            ]
        );
        assert_eq!(set(&mut registers, Reg::Command, 0), None);
        assert_eq!(registers.read(Reg::Status), 0);
    }

    #[test]
    fn what_is_no_command_says_so_and_starts_nothing() {
        let mut registers = registers();
        for code in [0x3, 0x400, u32::MAX] {
            set(&mut registers, Reg::Status, 0);
            assert_eq!(set(&mut registers, Reg::Command, code), None);
            assert_eq!(registers.read(Reg::Status), Status::COMMAND_INVALID.bits());
            assert_eq!(registers.read(Reg::Command), 0);
        }
    }

    #[test]
    fn one_command_runs_at_a_time() {
        let mut registers = registers();
        assert!(set(&mut registers, Reg::Command, 0x8).is_some());
        assert_eq!(set(&mut registers, Reg::Command, 0x20), None);
        assert_eq!(registers.read(Reg::Command), 0x8);
        registers.finish(Ended {
            status: Status::READ_SUCCESS,
            ..Ended::default()
        });
        let both = Status::BUSY | Status::READ_SUCCESS;
        assert_eq!(
            (registers.read(Reg::Command), registers.read(Reg::Status)),
            (0, both.bits())
        );
        assert!(set(&mut registers, Reg::Command, 0x20).is_some());
        assert_eq!(registers.read(Reg::Status), 0);
    }

    #[test]
    fn the_doorbell_rings_while_there_is_one_by_its_very_data() {
        let mut registers = registers();
        assert_eq!(registers.ring(DwordWrite::whole(DOORBELL_DATA)), None);
        registers.finish(Ended {
            doorbell: Some(true),
            ..Ended::default()
        });
        let shown = [Reg::DoorbellBar, Reg::DoorbellOffset, Reg::DoorbellData];
        assert_eq!(
            shown.map(|register| registers.read(register)),
            [0, 0x80, DOORBELL_DATA]
        );
        assert_eq!(registers.ring(DwordWrite::whole(1)), None);
        let half = DwordWrite::new(0, &[0x01, 0xdb]).expect("inside");
        assert_eq!(registers.ring(half), None);
        let job = registers.ring(DwordWrite::whole(DOORBELL_DATA)).expect("rung");
        assert_eq!(job.work, Work::Ring);
        assert_eq!(registers.ring(DwordWrite::whole(DOORBELL_DATA)), None);
        assert_eq!(registers.read(Reg::Status), Status::BUSY.bits());
    }
}
