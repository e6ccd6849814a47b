//! How much followers may do in one call of the processor.

/// What is left of it, in pieces of which each takes about as long as a request to the host's kernel.
#[derive(Debug)]
pub struct Effort(usize);

impl Effort {
    /// Pieces per call: at some tens of microseconds each, a few milliseconds.
    pub const PER_CALL: usize = 128;

    /// That of one call.
    #[must_use]
    pub const fn of_a_call() -> Self {
        Self(Self::PER_CALL)
    }

    /// Spend `cost`, if there is as much. No cost is more than [`Effort::PER_CALL`], so that each call comes further.
    #[must_use]
    pub const fn spend(&mut self, cost: usize) -> bool {
        match self.0.checked_sub(cost) {
            Some(left) => {
                self.0 = left;
                true
            }
            None => false,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nothing_is_spent_that_is_not_there() {
        let mut effort = Effort::of_a_call();
        assert!(effort.spend(Effort::PER_CALL - 1));
        assert!(!effort.spend(2));
        assert!(effort.spend(1));
        assert!(!effort.spend(1));
    }
}
