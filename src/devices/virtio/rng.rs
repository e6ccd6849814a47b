//! Entropy from the host's random number generator.
//!
//! Virtual I/O Device 1.2, 5.4 (Entropy Device). There is no configuration and no feature of its own.

use std::io;

use rustix::rand::{GetRandomFlags, getrandom};

use super::queue::{Broken, Chain, MemoryViews};
use super::worker::{Notify, ServedQueue, Service, Turn, Unit, Woken};
use super::{Activation, Features, Kind, VirtioDevice};
use crate::guest_warn;
use crate::platform::dma::Dma;
use crate::platform::host::HostError;

/// Most bytes one request gets: it may ask for 4 GiB, and a device may give less than asked for.
const MOST_BYTES: usize = 64 << 10;

/// A virtio entropy device.
pub struct Rng {
    name: String,
    queue_sizes: [u16; 1],
}

impl Rng {
    /// One that messages call `name`.
    #[must_use]
    pub fn new(name: impl Into<String>) -> Self {
        Self {
            name: name.into(),
            queue_sizes: [64],
        }
    }
}

impl VirtioDevice for Rng {
    fn kind(&self) -> Kind {
        Kind::Rng
    }

    fn name(&self) -> &str {
        &self.name
    }

    fn features(&self) -> Features {
        Features::empty()
    }

    fn queue_sizes(&self) -> &[u16] {
        &self.queue_sizes
    }

    fn read_config(&self, _offset: u64, data: &mut [u8]) {
        data.fill(0);
    }

    fn activate(&self, activation: Activation) -> Result<Vec<Unit>, HostError> {
        let unit = |queue| Unit {
            name: self.name.clone(),
            service: Box::new(RngQueue),
            queues: vec![queue],
        };
        Ok(activation.queues.into_iter().flatten().map(unit).collect())
    }
}

/// Serves the queue of an entropy device.
pub struct RngQueue;

impl Service for RngQueue {
    fn turn(&mut self, _woken: Woken, dma: &Dma, queues: &mut [ServedQueue]) -> Result<Turn, Broken> {
        let mut turn = Turn::Idle;
        for queue in queues {
            turn = turn.or(Self::serve(dma, queue)?);
        }
        Ok(turn)
    }
}

impl RngQueue {
    /// Fill what the driver offers in `queue`, in memory as `mem` shows it.
    ///
    /// # Errors
    /// When the driver's ring is none.
    pub fn serve<V: MemoryViews>(mem: &V, queue: &mut ServedQueue) -> Result<Turn, Broken> {
        queue.drain(mem, Notify::Batch, |chain| {
            Ok(Some(Self::fill(chain).unwrap_or_else(|error| {
                guest_warn!("the host gave no entropy: {error}");
                0
            })))
        })
    }

    /// Fill the chain, as far as one request goes, and say how far.
    fn fill(chain: &Chain<'_>) -> io::Result<u32> {
        let mut bytes = vec![0; chain.writable.len().min(MOST_BYTES)];
        let mut done = 0;
        while done < bytes.len() {
            match getrandom(&mut bytes[done..], GetRandomFlags::empty()) {
                Ok(count) => done += count,
                Err(rustix::io::Errno::INTR) => {}
                Err(error) => return Err(error.into()),
            }
        }
        Ok(u32::try_from(chain.writable.copy_from(&bytes)).expect("at most MOST_BYTES"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::devices::virtio::driver::{Driver, Part};

    #[test]
    fn a_request_is_filled_with_bytes_that_differ_from_the_last() {
        let mut driver = Driver::new(8);
        let (first, second) = (driver.place(&[0; 64]), driver.place(&[0; 64]));
        driver.offer(&[Part::write(first, 64)]);
        driver.offer(&[Part::write(second, 64)]);
        let turn = RngQueue::serve(driver.ram().backend(), &mut driver.queue).expect("a good queue");
        assert_eq!(turn, Turn::Idle);
        assert_eq!(driver.used(), [(0, 64), (1, 64)]);
        assert_ne!(driver.bytes(first, 64), driver.bytes(second, 64));
        assert_eq!(driver.interrupts(), 1);
    }

    #[test]
    fn a_request_for_more_than_the_bound_gets_the_bound() {
        let mut driver = Driver::new(8);
        let at = driver.place(&[0; 0]);
        driver.offer(&[Part::write(at, 1 << 20)]);
        let turn = RngQueue::serve(driver.ram().backend(), &mut driver.queue).expect("a good queue");
        assert_eq!(turn, Turn::Idle);
        assert_eq!(driver.used(), [(0, 64 << 10)]);
    }

    #[test]
    fn a_request_without_room_gets_nothing() {
        let mut driver = Driver::new(8);
        let at = driver.place(&[7; 16]);
        driver.offer(&[Part::read(at, 16)]);
        let turn = RngQueue::serve(driver.ram().backend(), &mut driver.queue).expect("a good queue");
        assert_eq!(turn, Turn::Idle);
        assert_eq!(driver.used(), [(0, 0)]);
        assert_eq!(driver.bytes(at, 16), [7; 16]);
    }

    #[test]
    fn there_is_no_configuration() {
        let mut data = [0xff; 8];
        Rng::new("rng0").read_config(0, &mut data);
        assert_eq!(data, [0; 8]);
    }
}
