//! How much followers may do in one call of the processor.

/// What is left of it, in pieces of which each takes about as long as a request to the host's kernel.
#[derive(Debug)]
pub struct Effort {
    left: usize,
    /// Something was left for want of it.
    short: bool,
    /// Something was left though there was enough.
    stuck: bool,
}

impl Effort {
    /// Pieces per call: at some tens of microseconds each, a few milliseconds.
    pub const PER_CALL: usize = 128;

    /// That of one call.
    #[must_use]
    pub const fn of_a_call() -> Self {
        Self {
            left: Self::PER_CALL,
            short: false,
            stuck: false,
        }
    }

    /// Spend `cost`, if there is as much. No cost is more than [`Effort::PER_CALL`], so that each call comes further.
    #[must_use]
    pub const fn spend(&mut self, cost: usize) -> bool {
        match self.left.checked_sub(cost) {
            Some(left) => {
                self.left = left;
                true
            }
            None => {
                self.short = true;
                false
            }
        }
    }

    /// Something is left that takes no effort, but somebody else to change his mind.
    pub const fn stick(&mut self) {
        self.stuck = true;
    }

    /// Whether another call right after this one would do some of what is left, if anything is.
    #[must_use]
    pub const fn goes_on(&self) -> bool {
        self.short || !self.stuck
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

    #[test]
    fn what_is_stuck_is_no_reason_for_another_call_but_want_of_effort_is() {
        let mut effort = Effort::of_a_call();
        assert!(effort.goes_on());
        effort.stick();
        assert!(effort.spend(Effort::PER_CALL) && !effort.goes_on());
        assert!(!effort.spend(1));
        assert!(effort.goes_on());
    }
}
