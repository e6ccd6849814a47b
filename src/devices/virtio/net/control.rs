//! The control queue: how many pairs are in use, which offloads the driver takes.
//!
//! Virtual I/O Device 1.2, 5.1.6.5 (Control Virtqueue).

use std::sync::Arc;

use virtio_bindings::virtio_net;

use super::super::Features;
use super::super::queue::{Broken, Chain, MemoryViews};
use super::super::worker::{Notify, ServedQueue, Service, Turn, Woken};
use super::{CONTROL_OFFLOADS, GUEST_OFFLOADS, MULTI_QUEUE, attach_first, offloads};
use crate::guest_warn;
use crate::platform::dma::Dma;
use crate::platform::tap::Tap;

/// Class and command as the driver writes them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Code(u8, u8);

impl Code {
    /// Use this many pairs.
    const SET_PAIRS: Self = Self(
        virtio_net::VIRTIO_NET_CTRL_MQ.to_le_bytes()[0],
        virtio_net::VIRTIO_NET_CTRL_MQ_VQ_PAIRS_SET.to_le_bytes()[0],
    );
    /// Take these offloads.
    const SET_OFFLOADS: Self = Self(
        virtio_net::VIRTIO_NET_CTRL_GUEST_OFFLOADS.to_le_bytes()[0],
        virtio_net::VIRTIO_NET_CTRL_GUEST_OFFLOADS_SET.to_le_bytes()[0],
    );
}

/// A command the card knows.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Command {
    SetPairs(u16),
    SetOffloads(Features),
}

const DONE: u8 = 0;
const REFUSED: u8 = 1;

/// Serves the control queue of a card.
pub(super) struct Control {
    taps: Arc<Vec<Arc<Tap>>>,
    negotiated: Features,
    /// Pairs the device has.
    pairs: u16,
}

impl Control {
    pub(super) fn new(taps: Arc<Vec<Arc<Tap>>>, pairs: u16, negotiated: Features) -> Self {
        Self {
            taps,
            negotiated,
            pairs,
        }
    }

    pub(super) fn serve<V: MemoryViews>(&self, mem: &V, queue: &mut ServedQueue) -> Result<Turn, Broken> {
        queue.drain(mem, Notify::Each, |chain| self.answer(chain).map(Some))
    }

    /// Carry one command out.
    fn answer(&self, chain: &Chain<'_>) -> Result<u32, Broken> {
        let mut bytes = [0; 10];
        let len = chain.readable.copy_to(&mut bytes);
        if len < 2 || chain.writable.is_empty() {
            return Err(Broken::Request {
                readable: chain.readable.len(),
                writable: chain.writable.len(),
                wanted: "a card's command has a class and a command to read and an acknowledgement to write",
            });
        }
        let done = self
            .parse(&bytes[..len])
            .is_some_and(|command| self.carry_out(command));
        chain.writable.copy_from(&[if done { DONE } else { REFUSED }]);
        Ok(1)
    }

    /// `None` for what is not offered, too short or out of range.
    fn parse(&self, bytes: &[u8]) -> Option<Command> {
        let [class, command, data @ ..] = bytes else {
            return None;
        };
        match Code(*class, *command) {
            Code::SET_PAIRS if self.negotiated.contains(MULTI_QUEUE) => {
                let pairs = u16::from_le_bytes(*data.first_chunk()?);
                (1..=self.pairs)
                    .contains(&pairs)
                    .then_some(Command::SetPairs(pairs))
            }
            Code::SET_OFFLOADS if self.negotiated.contains(CONTROL_OFFLOADS) => {
                let wanted = Features::from_bits_retain(u64::from_le_bytes(*data.first_chunk()?));
                let offered = GUEST_OFFLOADS
                    .iter()
                    .fold(Features::empty(), |all, (feature, _)| all | *feature);
                let allowed = offered & self.negotiated;
                allowed.contains(wanted).then_some(Command::SetOffloads(wanted))
            }
            _ => None,
        }
    }

    fn carry_out(&self, command: Command) -> bool {
        let done = match command {
            Command::SetPairs(pairs) => attach_first(&self.taps, usize::from(pairs)),
            Command::SetOffloads(wanted) => self
                .taps
                .iter()
                .try_for_each(|tap| tap.set_offloads(offloads(wanted))),
        };
        if let Err(error) = &done {
            guest_warn!("the host refused {command:?}: {error}: {}", error.source);
        }
        done.is_ok()
    }
}

impl Service for Control {
    fn turn(&mut self, _woken: Woken, dma: &Dma, queues: &mut [ServedQueue]) -> Result<Turn, Broken> {
        let mut turn = Turn::Idle;
        for queue in queues {
            turn = turn.or(self.serve(dma, queue)?);
        }
        Ok(turn)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::devices::virtio::driver::{Driver, Part};

    fn control(negotiated: Features) -> Control {
        Control::new(Arc::new(Vec::new()), 4, negotiated)
    }

    /// The acknowledgement of one command.
    fn acknowledged(control: &Control, command: &[u8]) -> u8 {
        let mut driver = Driver::new(8);
        let (at, ack) = (driver.place(command), driver.place(&[0xee]));
        let len = u32::try_from(command.len()).expect("short");
        driver.offer(&[Part::read(at, len), Part::write(ack, 1)]);
        let turn = control.serve(driver.ram().backend(), &mut driver.queue);
        assert_eq!(turn.expect("a good queue"), Turn::Idle);
        assert_eq!(driver.used(), [(0, 1)]);
        driver.bytes(ack, 1)[0]
    }

    #[test]
    fn pairs_that_the_card_has_are_taken() {
        let control = control(MULTI_QUEUE);
        assert_eq!(acknowledged(&control, &[4, 0, 1, 0]), DONE);
        assert_eq!(acknowledged(&control, &[4, 0, 4, 0]), DONE);
    }

    #[test]
    fn pairs_that_the_card_has_not_are_refused() {
        let control = control(MULTI_QUEUE);
        for pairs in [[0, 0], [5, 0], [0xff, 0xff]] {
            assert_eq!(acknowledged(&control, &[4, 0, pairs[0], pairs[1]]), REFUSED);
        }
    }

    #[test]
    fn commands_that_were_not_negotiated_are_refused() {
        let control = control(Features::empty());
        assert_eq!(acknowledged(&control, &[4, 0, 1, 0]), REFUSED);
        assert_eq!(acknowledged(&control, &[5, 0, 0, 0, 0, 0, 0, 0, 0, 0]), REFUSED);
    }

    #[test]
    fn unknown_and_cut_commands_are_refused() {
        let control = control(MULTI_QUEUE | CONTROL_OFFLOADS);
        let commands: [&[u8]; 5] = [&[0xff, 0xff], &[0, 0, 1], &[4, 0], &[4, 0, 1], &[5, 0, 0, 0]];
        for command in commands {
            assert_eq!(acknowledged(&control, command), REFUSED, "{command:?}");
        }
    }

    #[test]
    fn offloads_that_were_not_negotiated_are_refused() {
        let (checksum, _) = GUEST_OFFLOADS[0];
        let control = control(CONTROL_OFFLOADS | checksum);
        let set = |bits: u64| [vec![5, 0], bits.to_le_bytes().to_vec()].concat();
        assert_eq!(acknowledged(&control, &set(checksum.bits())), DONE);
        assert_eq!(acknowledged(&control, &set(1 << 7)), REFUSED);
        assert_eq!(acknowledged(&control, &set(u64::MAX)), REFUSED);
    }

    #[test]
    fn a_command_without_room_for_the_acknowledgement_breaks_the_queue() {
        let mut driver = Driver::new(8);
        let at = driver.place(&[4, 0, 1, 0]);
        driver.offer(&[Part::read(at, 4)]);
        let broken = control(MULTI_QUEUE).serve(driver.ram().backend(), &mut driver.queue);
        assert!(matches!(broken, Err(Broken::Request { writable: 0, .. })));
    }
}
