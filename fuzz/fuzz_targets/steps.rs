//! Bytes to what somebody does, step after step.

use arbitrary::{Arbitrary, Unstructured};

/// Steps are taken from an input until this many were or it is used up, so that no input runs for long.
const MOST: usize = 128;

/// The steps `input` stands for. As a `Vec` it would ask for a bit before every step whether there is another,
/// and random bytes would stop after two.
pub fn steps<'a, T: Arbitrary<'a>>(input: &'a [u8]) -> impl Iterator<Item = T> {
    let mut input = Unstructured::new(input);
    std::iter::from_fn(move || {
        if input.is_empty() {
            None
        } else {
            input.arbitrary().ok()
        }
    })
    .take(MOST)
}
