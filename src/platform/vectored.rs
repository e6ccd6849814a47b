//! Vectored I/O between host descriptors and guest memory, without a copy in between.
//!
//! The safe wrappers of `readv` and its kin take Rust slices, which guest memory must never become: the
//! guest writes it meanwhile. These take volatile slices, whose addresses the kernel alone follows.

#![expect(
    unsafe_code,
    reason = "the system calls take lists of addresses, and no safe wrapper takes volatile slices"
)]

use std::io;
use std::os::fd::{AsFd, AsRawFd};

use vm_memory::VolatileSlice;

/// Slices one system call takes; UIO_MAXIOV of the kernel.
pub const MOST_SLICES: usize = 1024;

/// What the kernel calls an iovec, for as long as the slices live.
fn vectors(slices: &[VolatileSlice<'_>]) -> Vec<libc::iovec> {
    slices
        .iter()
        .take(MOST_SLICES)
        .map(|slice| libc::iovec {
            iov_base: slice.ptr_guard_mut().as_ptr().cast(),
            iov_len: slice.len(),
        })
        .collect()
}

/// Repeat `call` while a signal interrupts it.
fn retried(mut call: impl FnMut() -> libc::ssize_t) -> io::Result<usize> {
    loop {
        match usize::try_from(call()) {
            Ok(bytes) => return Ok(bytes),
            Err(_) => {
                let error = io::Error::last_os_error();
                if error.kind() != io::ErrorKind::Interrupted {
                    return Err(error);
                }
            }
        }
    }
}

/// A count of vectors as the system calls take it.
fn count(vectors: &[libc::iovec]) -> libc::c_int {
    libc::c_int::try_from(vectors.len()).expect("at most MOST_SLICES vectors")
}

/// A file position as the system calls take it; EINVAL beyond 2^63 - 1.
fn position(at: u64) -> io::Result<libc::off_t> {
    libc::off_t::try_from(at).map_err(|_| io::Error::from_raw_os_error(libc::EINVAL))
}

/// One `readv`: what is read lands in the slices in order. Slices beyond [`MOST_SLICES`] stay untouched.
pub fn read(from: impl AsFd, into: &[VolatileSlice<'_>]) -> io::Result<usize> {
    let (fd, vectors) = (from.as_fd().as_raw_fd(), vectors(into));
    // SAFETY: each vector is a volatile slice's own address and length, valid for writes while `into` is
    // borrowed; `fd` is open while `from` is.
    retried(|| unsafe { libc::readv(fd, vectors.as_ptr(), count(&vectors)) })
}

/// One `writev` of the slices in order. Slices beyond [`MOST_SLICES`] are not written.
pub fn write(to: impl AsFd, from: &[VolatileSlice<'_>]) -> io::Result<usize> {
    let (fd, vectors) = (to.as_fd().as_raw_fd(), vectors(from));
    // SAFETY: each vector is a volatile slice's own address and length, valid for reads while `from` is
    // borrowed; `fd` is open while `to` is.
    retried(|| unsafe { libc::writev(fd, vectors.as_ptr(), count(&vectors)) })
}

/// One `preadv` at byte `at` of the file.
fn read_at(from: impl AsFd, into: &[VolatileSlice<'_>], at: u64) -> io::Result<usize> {
    let (fd, vectors, at) = (from.as_fd().as_raw_fd(), vectors(into), position(at)?);
    // SAFETY: each vector is a volatile slice's own address and length, valid for writes while `into` is
    // borrowed; `fd` is open while `from` is.
    retried(|| unsafe { libc::preadv(fd, vectors.as_ptr(), count(&vectors), at) })
}

/// One `pwritev` at byte `at` of the file.
fn write_at(to: impl AsFd, from: &[VolatileSlice<'_>], at: u64) -> io::Result<usize> {
    let (fd, vectors, at) = (to.as_fd().as_raw_fd(), vectors(from), position(at)?);
    // SAFETY: each vector is a volatile slice's own address and length, valid for reads while `from` is
    // borrowed; `fd` is open while `to` is.
    retried(|| unsafe { libc::pwritev(fd, vectors.as_ptr(), count(&vectors), at) })
}

/// Fill all slices from byte `at` of the file on. UnexpectedEof when the file ends before.
pub fn read_exact_at(from: impl AsFd, into: &[VolatileSlice<'_>], at: u64) -> io::Result<()> {
    transfer(into, at, io::ErrorKind::UnexpectedEof, |slices, at| {
        read_at(&from, slices, at)
    })
}

/// Write all slices to the file from byte `at` on.
pub fn write_all_at(to: impl AsFd, from: &[VolatileSlice<'_>], at: u64) -> io::Result<()> {
    transfer(from, at, io::ErrorKind::WriteZero, |slices, at| {
        write_at(&to, slices, at)
    })
}

/// Call `step` on what is left until nothing is; `end` is the error when it makes no progress.
fn transfer(
    slices: &[VolatileSlice<'_>],
    mut at: u64,
    end: io::ErrorKind,
    mut step: impl FnMut(&[VolatileSlice<'_>], u64) -> io::Result<usize>,
) -> io::Result<()> {
    let mut rest: Vec<_> = slices.iter().filter(|slice| !slice.is_empty()).cloned().collect();
    let mut first = 0;
    while first < rest.len() {
        let mut done = step(&rest[first..], at)?;
        if done == 0 {
            return Err(end.into());
        }
        at = at
            .checked_add(done as u64)
            .expect("the kernel does not pass the end of a file");
        while let Some(slice) = rest.get(first).filter(|slice| slice.len() <= done) {
            done -= slice.len();
            first += 1;
        }
        if let Some(slice) = rest.get_mut(first) {
            *slice = slice.offset(done).expect("shorter than the slice");
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::{Read, Seek, Write};

    fn file(content: &[u8]) -> std::fs::File {
        let mut file = tempfile::tempfile().expect("a file");
        file.write_all(content).expect("written");
        file
    }

    #[test]
    fn slices_are_filled_in_order() {
        let (mut a, mut b) = ([0; 3], [0; 2]);
        let slices = [VolatileSlice::from(&mut a[..]), VolatileSlice::from(&mut b[..])];
        read_exact_at(file(b"0123456789"), &slices, 4).expect("enough bytes");
        assert_eq!((a, b), (*b"456", *b"78"));
    }

    #[test]
    fn a_file_that_ends_early_is_an_error() {
        let mut a = [0; 8];
        let error =
            read_exact_at(file(b"0123"), &[VolatileSlice::from(&mut a[..])], 0).expect_err("too short");
        assert_eq!(error.kind(), io::ErrorKind::UnexpectedEof);
    }

    #[test]
    fn a_position_beyond_the_largest_is_an_error() {
        let mut a = [0; 8];
        let slices = [VolatileSlice::from(&mut a[..])];
        assert!(read_exact_at(file(b"0123"), &slices, u64::MAX).is_err());
        assert!(write_all_at(file(b"0123"), &slices, 1 << 63).is_err());
    }

    #[test]
    fn more_slices_than_one_call_takes_are_all_transferred() {
        let mut bytes: Vec<[u8; 1]> = (0..3000_u32).map(|i| [i.to_le_bytes()[0]]).collect();
        let expected: Vec<u8> = bytes.iter().map(|[byte]| *byte).collect();
        let slices: Vec<_> = bytes
            .iter_mut()
            .map(|byte| VolatileSlice::from(&mut byte[..]))
            .collect();
        let mut file = file(b"");
        write_all_at(&file, &slices, 0).expect("written");
        file.rewind().expect("rewound");
        let mut written = Vec::new();
        file.read_to_end(&mut written).expect("read");
        assert_eq!(written, expected);
    }

    #[test]
    fn a_short_transfer_goes_on_in_the_middle_of_a_slice() {
        let (mut a, mut b) = (*b"abcd", *b"efgh");
        let slices = [VolatileSlice::from(&mut a[..]), VolatileSlice::from(&mut b[..])];
        let mut seen = Vec::new();
        transfer(&slices, 10, io::ErrorKind::WriteZero, |slices, at| {
            let mut piece = vec![0; 3.min(slices[0].len())];
            slices[0].copy_to(&mut piece[..]);
            seen.push((at, piece.clone()));
            Ok(piece.len())
        })
        .expect("progress each time");
        let seen: Vec<_> = seen
            .iter()
            .map(|(at, piece)| (*at, String::from_utf8_lossy(piece).into_owned()))
            .collect();
        let expected = [(10, "abc"), (13, "d"), (14, "efg"), (17, "h")];
        assert_eq!(seen, expected.map(|(at, piece)| (at, piece.to_owned())));
    }
}
