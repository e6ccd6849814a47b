//! A guest's access: any width at any offset that lies inside the device's range, as the bus promises.

use arbitrary::Arbitrary;
use ravelin::platform::bus::BusDevice;

/// One access.
#[derive(Arbitrary, Debug)]
pub struct Access {
    offset: u16,
    width: u8,
    write: Option<[u8; 8]>,
}

impl Access {
    /// Carry it out on a device of `len` bytes.
    pub fn run(&self, device: &dyn BusDevice, len: u64) {
        let width = 1_usize << (self.width % 4);
        let offset = u64::from(self.offset) % len;
        if offset + width as u64 > len {
            return;
        }
        match self.write {
            Some(data) => device.write(offset, &data[..width]),
            None => device.read(offset, &mut [0; 8][..width]),
        }
    }
}
