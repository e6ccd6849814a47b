//! The common configuration structure: negotiation, queue set-up and the device's status.
//!
//! Virtual I/O Device 1.2, 4.1.4.3 (Common configuration structure layout) and 3.1 (Device Initialization).
//! Plain state without threads or interrupts: a write returns what it sets off.

use virtio_bindings::virtio_config;

use super::Features;
use super::queue::QueueLayout;
use crate::guest_warn;
use crate::platform::addr::Iova;

/// Bytes of the structure, as far as the offered features define it.
pub const LEN: u64 = 0x38;

/// The vector number that means none.
pub const NO_VECTOR: u16 = 0xffff;

bitflags::bitflags! {
    /// The device status (2.1).
    #[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
    pub struct Status: u8 {
        /// The guest noticed the device.
        const ACKNOWLEDGE = virtio_config::VIRTIO_CONFIG_S_ACKNOWLEDGE.to_le_bytes()[0];
        /// It has a driver for it.
        const DRIVER = virtio_config::VIRTIO_CONFIG_S_DRIVER.to_le_bytes()[0];
        /// The driver runs; queues are live.
        const DRIVER_OK = virtio_config::VIRTIO_CONFIG_S_DRIVER_OK.to_le_bytes()[0];
        /// Both agree on the features.
        const FEATURES_OK = virtio_config::VIRTIO_CONFIG_S_FEATURES_OK.to_le_bytes()[0];
        /// The device is broken until it is reset.
        const NEEDS_RESET = virtio_config::VIRTIO_CONFIG_S_NEEDS_RESET.to_le_bytes()[0];
        /// The driver gave up.
        const FAILED = virtio_config::VIRTIO_CONFIG_S_FAILED.to_le_bytes()[0];
    }
}

/// What the driver may set.
const DRIVER_BITS: Status = Status::all().difference(Status::NEEDS_RESET);

/// What a write sets off, once no lock is held.
#[must_use]
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Effect {
    /// Nothing.
    None,
    /// Stop everything, then call [`Registers::finish_reset`]: the status reads as before until then.
    Reset,
    /// Start, if [`Registers::running`] still says so.
    Activate,
    /// The driver wants to know whether its features are acceptable: answer by
    /// [`Registers::accept_features`].
    CheckFeatures(Features),
    /// Configuration changes interrupt by this vector.
    ConfigVector(u16),
    /// A queue interrupts by this vector.
    QueueVector {
        /// Number of the queue.
        queue: u16,
        /// The vector, or [`NO_VECTOR`].
        vector: u16,
    },
}

/// What is outside these registers and shows in them.
#[derive(Debug, Clone, Copy, Default)]
pub struct Live {
    /// A queue broke.
    pub needs_reset: bool,
    /// Counts changes of the device's own configuration.
    pub generation: u8,
}

/// One queue as the driver sets it up.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct QueueRegisters {
    largest: u16,
    size: u16,
    vector: u16,
    enabled: bool,
    descriptors: u64,
    available: u64,
    used: u64,
}

impl QueueRegisters {
    fn new(largest: u16) -> Self {
        Self {
            largest,
            size: largest,
            vector: NO_VECTOR,
            enabled: false,
            descriptors: 0,
            available: 0,
            used: 0,
        }
    }
}

/// The common configuration structure of one device.
#[derive(Debug)]
pub struct Registers {
    offered: Features,
    vectors: u16,
    device_feature_select: u32,
    driver_feature_select: u32,
    driver_features: u64,
    config_vector: u16,
    status: Status,
    resetting: bool,
    queue_select: u16,
    queues: Vec<QueueRegisters>,
}

/// A field of the structure.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Field {
    DeviceFeatureSelect,
    DeviceFeature,
    DriverFeatureSelect,
    DriverFeature,
    ConfigVector,
    NumQueues,
    DeviceStatus,
    ConfigGeneration,
    QueueSelect,
    QueueSize,
    QueueVector,
    QueueEnable,
    QueueNotifyOff,
    QueueDescLow,
    QueueDescHigh,
    QueueDriverLow,
    QueueDriverHigh,
    QueueDeviceLow,
    QueueDeviceHigh,
}

/// Offset and length of each field in bytes, in order and without gaps; 64-bit ones are two (4.1.3.1).
const FIELDS: [(u64, usize, Field); 19] = [
    (0x00, 4, Field::DeviceFeatureSelect),
    (0x04, 4, Field::DeviceFeature),
    (0x08, 4, Field::DriverFeatureSelect),
    (0x0c, 4, Field::DriverFeature),
    (0x10, 2, Field::ConfigVector),
    (0x12, 2, Field::NumQueues),
    (0x14, 1, Field::DeviceStatus),
    (0x15, 1, Field::ConfigGeneration),
    (0x16, 2, Field::QueueSelect),
    (0x18, 2, Field::QueueSize),
    (0x1a, 2, Field::QueueVector),
    (0x1c, 2, Field::QueueEnable),
    (0x1e, 2, Field::QueueNotifyOff),
    (0x20, 4, Field::QueueDescLow),
    (0x24, 4, Field::QueueDescHigh),
    (0x28, 4, Field::QueueDriverLow),
    (0x2c, 4, Field::QueueDriverHigh),
    (0x30, 4, Field::QueueDeviceLow),
    (0x34, 4, Field::QueueDeviceHigh),
];

impl Registers {
    /// The structure of a device that offers `offered`, with queues of at most `queue_sizes` entries and
    /// `vectors` MSI-X vectors.
    #[must_use]
    pub fn new(offered: Features, queue_sizes: &[u16], vectors: u16) -> Self {
        Self {
            offered,
            vectors,
            device_feature_select: 0,
            driver_feature_select: 0,
            driver_features: 0,
            config_vector: NO_VECTOR,
            status: Status::empty(),
            resetting: false,
            queue_select: 0,
            queues: queue_sizes.iter().copied().map(QueueRegisters::new).collect(),
        }
    }

    /// Whether the driver wants its queues served.
    #[must_use]
    pub fn running(&self) -> bool {
        self.status.contains(Status::DRIVER_OK) && !self.resetting
    }

    /// Whether a reset was asked for and is not finished.
    #[must_use]
    pub fn resetting(&self) -> bool {
        self.resetting
    }

    /// What was negotiated.
    #[must_use]
    pub fn features(&self) -> Features {
        Features::from_bits_retain(self.driver_features)
    }

    /// Each queue the driver enabled, `None` for the others.
    #[must_use]
    pub fn layouts(&self) -> Vec<Option<QueueLayout>> {
        let layout = |queue: &QueueRegisters| {
            queue.enabled.then_some(QueueLayout {
                size: queue.size,
                descriptors: Iova(queue.descriptors),
                available: Iova(queue.available),
                used: Iova(queue.used),
            })
        };
        self.queues.iter().map(layout).collect()
    }

    /// Back to the state before the guest touched anything.
    pub fn finish_reset(&mut self) {
        let sizes: Vec<_> = self.queues.iter().map(|queue| queue.largest).collect();
        *self = Self::new(self.offered, &sizes, self.vectors);
    }

    /// The device type finds `chosen` of [`Effect::CheckFeatures`] acceptable. Another processor may have
    /// changed its mind since.
    pub fn accept_features(&mut self, chosen: Features) {
        if self.features() == chosen && !self.resetting {
            self.status |= Status::FEATURES_OK;
        }
    }

    /// Fill `data` from byte `offset`; zeros beyond the end.
    pub fn read(&self, offset: u64, data: &mut [u8], live: Live) {
        data.fill(0);
        for (at, len, field) in FIELDS {
            let value = self.field(field, live).to_le_bytes();
            for (byte, position) in value.into_iter().take(len).zip(at..) {
                let target = position
                    .checked_sub(offset)
                    .and_then(|within| usize::try_from(within).ok())
                    .and_then(|within| data.get_mut(within));
                if let Some(target) = target {
                    *target = byte;
                }
            }
        }
    }

    fn field(&self, field: Field, live: Live) -> u32 {
        let queue = self.queues.get(usize::from(self.queue_select));
        let of_queue = |value: fn(&QueueRegisters) -> u64| queue.map_or(0, value);
        let low = |value: u64| u32::try_from(value & 0xffff_ffff).expect("masked");
        let high = |value: u64| u32::try_from(value >> 32).expect("the upper half");
        let window = |bits: u64, select: u32| match select {
            0 => low(bits),
            1 => high(bits),
            _ => 0,
        };
        match field {
            Field::DeviceFeatureSelect => self.device_feature_select,
            Field::DeviceFeature => window(self.offered.bits(), self.device_feature_select),
            Field::DriverFeatureSelect => self.driver_feature_select,
            Field::DriverFeature => window(self.driver_features, self.driver_feature_select),
            Field::ConfigVector => u32::from(self.config_vector),
            Field::NumQueues => u32::try_from(self.queues.len()).expect("at most 255 queues"),
            Field::DeviceStatus => {
                let mut status = self.status;
                status.set(Status::NEEDS_RESET, live.needs_reset && !status.is_empty());
                u32::from(status.bits())
            }
            Field::ConfigGeneration => u32::from(live.generation),
            Field::QueueSelect => u32::from(self.queue_select),
            // Zero says that there is no such queue.
            Field::QueueSize => low(of_queue(|queue| u64::from(queue.size))),
            Field::QueueVector => u32::from(queue.map_or(NO_VECTOR, |queue| queue.vector)),
            Field::QueueEnable => low(of_queue(|queue| u64::from(queue.enabled))),
            Field::QueueNotifyOff => queue.map_or(0, |_| u32::from(self.queue_select)),
            Field::QueueDescLow => low(of_queue(|queue| queue.descriptors)),
            Field::QueueDescHigh => high(of_queue(|queue| queue.descriptors)),
            Field::QueueDriverLow => low(of_queue(|queue| queue.available)),
            Field::QueueDriverHigh => high(of_queue(|queue| queue.available)),
            Field::QueueDeviceLow => low(of_queue(|queue| queue.used)),
            Field::QueueDeviceHigh => high(of_queue(|queue| queue.used)),
        }
    }

    /// Take `data` at byte `offset`: one whole field, or both halves of a 64-bit one. Anything else is
    /// ignored (4.1.3.1 demands the field's width).
    pub fn write(&mut self, offset: u64, data: &[u8]) -> Effect {
        if let Some((low, high)) = data.split_at_checked(4).filter(|(_, high)| high.len() == 4) {
            let effect = self.write_whole(offset, low);
            return match offset.checked_add(4) {
                Some(offset) => self.write_whole(offset, high),
                None => effect,
            };
        }
        self.write_whole(offset, data)
    }

    fn write_whole(&mut self, offset: u64, data: &[u8]) -> Effect {
        let whole = FIELDS
            .iter()
            .find(|(at, len, _)| *at == offset && *len == data.len());
        let Some((_, _, field)) = whole.filter(|_| !self.resetting) else {
            guest_warn!(
                "a write of {} bytes at {offset:#x} of the virtio registers is ignored",
                data.len()
            );
            return Effect::None;
        };
        let mut value = [0; 4];
        value[..data.len()].copy_from_slice(data);
        self.write_field(*field, u32::from_le_bytes(value))
    }

    fn write_field(&mut self, field: Field, value: u32) -> Effect {
        let low_half = |old: u64| old & !0xffff_ffff | u64::from(value);
        let high_half = |old: u64| old & 0xffff_ffff | u64::from(value) << 32;
        let [b0, b1, ..] = value.to_le_bytes();
        let short = u16::from_le_bytes([b0, b1]);
        match field {
            Field::DeviceFeatureSelect => self.device_feature_select = value,
            Field::DriverFeatureSelect => self.driver_feature_select = value,
            Field::DriverFeature => self.write_features(value),
            Field::ConfigVector => {
                self.config_vector = self.possible_vector(short);
                return Effect::ConfigVector(self.config_vector);
            }
            Field::DeviceStatus => return self.write_status(b0),
            Field::QueueSelect => self.queue_select = short,
            Field::QueueSize => self.set_up_queue(|queue| {
                if short.is_power_of_two() && short <= queue.largest {
                    queue.size = short;
                } else {
                    guest_warn!(
                        "{short} is no size for a queue of at most {} entries",
                        queue.largest
                    );
                }
            }),
            Field::QueueVector => return self.write_queue_vector(short),
            Field::QueueEnable => self.set_up_queue(|queue| queue.enabled = short == 1),
            Field::QueueDescLow => self.set_up_queue(|queue| queue.descriptors = low_half(queue.descriptors)),
            Field::QueueDescHigh => {
                self.set_up_queue(|queue| queue.descriptors = high_half(queue.descriptors));
            }
            Field::QueueDriverLow => self.set_up_queue(|queue| queue.available = low_half(queue.available)),
            Field::QueueDriverHigh => {
                self.set_up_queue(|queue| queue.available = high_half(queue.available));
            }
            Field::QueueDeviceLow => self.set_up_queue(|queue| queue.used = low_half(queue.used)),
            Field::QueueDeviceHigh => self.set_up_queue(|queue| queue.used = high_half(queue.used)),
            Field::DeviceFeature | Field::NumQueues | Field::ConfigGeneration | Field::QueueNotifyOff => {}
        }
        Effect::None
    }

    /// Half of the driver's features; only until they are agreed on.
    fn write_features(&mut self, value: u32) {
        if self.status.contains(Status::FEATURES_OK) {
            guest_warn!("features are chosen already; a write of {value:#x} is ignored");
            return;
        }
        let (shift, keep) = match self.driver_feature_select {
            0 => (0, !0xffff_ffff_u64),
            1 => (32, 0xffff_ffff),
            _ => return,
        };
        self.driver_features = self.driver_features & keep | u64::from(value) << shift;
    }

    /// A change of the selected queue. Queues are frozen once they are enabled or the driver runs.
    fn set_up_queue(&mut self, change: impl FnOnce(&mut QueueRegisters)) {
        let frozen = self.status.contains(Status::DRIVER_OK);
        match self.queues.get_mut(usize::from(self.queue_select)) {
            Some(queue) if !queue.enabled && !frozen => change(queue),
            Some(_) => guest_warn!(
                "queue {} is set up already; a change is ignored",
                self.queue_select
            ),
            None => guest_warn!(
                "there is no queue {}; a write to it is ignored",
                self.queue_select
            ),
        }
    }

    fn write_queue_vector(&mut self, vector: u16) -> Effect {
        let vector = self.possible_vector(vector);
        let frozen = self.status.contains(Status::DRIVER_OK);
        let selected = self.queue_select;
        match self.queues.get_mut(usize::from(selected)).filter(|_| !frozen) {
            Some(queue) => {
                queue.vector = vector;
                Effect::QueueVector {
                    queue: selected,
                    vector,
                }
            }
            None => Effect::None,
        }
    }

    /// A vector that does not exist reads back as none, so that the driver learns of it (4.1.5.1.2).
    fn possible_vector(&self, vector: u16) -> u16 {
        if vector < self.vectors { vector } else { NO_VECTOR }
    }

    fn write_status(&mut self, value: u8) -> Effect {
        if value == 0 {
            self.resetting = true;
            return Effect::Reset;
        }
        let old = self.status;
        // Bits are cleared by a reset only (2.1.1).
        let mut new = old | Status::from_bits_truncate(value) & DRIVER_BITS;
        if !new.contains(Status::FEATURES_OK) {
            new.remove(Status::DRIVER_OK);
        }
        let asks_for_features = new.contains(Status::FEATURES_OK) && !old.contains(Status::FEATURES_OK);
        if asks_for_features {
            new.remove(Status::FEATURES_OK | Status::DRIVER_OK);
        }
        self.status = new;
        if asks_for_features && self.negotiable() {
            return Effect::CheckFeatures(self.features());
        }
        if new.contains(Status::DRIVER_OK) && !old.contains(Status::DRIVER_OK) {
            return Effect::Activate;
        }
        Effect::None
    }

    /// Whether the driver chose among what is offered, and what must be chosen (2.2, 6.1, 6.2).
    fn negotiable(&self) -> bool {
        let chosen = self.features();
        let unknown = chosen.difference(self.offered);
        let must = self.offered & (Features::VERSION_1 | Features::ACCESS_PLATFORM);
        let good = unknown.is_empty() && chosen.contains(must);
        if !good {
            guest_warn!(
                "features {:#x} are refused: offered are {:#x}, needed {:#x}",
                chosen.bits(),
                self.offered.bits(),
                must.bits()
            );
        }
        good
    }
}

#[cfg(test)]
mod tests;
