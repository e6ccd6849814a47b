//! The legal states of a machine, and how its end is told.

use std::fmt;

/// What state a machine is in.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum State {
    /// Built, loaded, never run.
    Ready,
    /// The processors run the guest.
    Running,
    /// The processors hold, and so do the devices' threads; everything is as the guest left it.
    Paused,
    /// The processors hold and everything is being put back to its state after power-on.
    Resetting,
    /// Nothing runs and nothing will.
    Ended,
}

/// A step from one state to another.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Step {
    /// Begin.
    Start,
    /// Stop processors and devices for a while.
    Pause,
    /// Let them go on.
    Resume,
    /// Begin a reset, which needs the processors to hold.
    Reset,
    /// A reset is complete.
    Restart,
    /// End, from any state.
    End,
}

/// Where a machine is in its life. Every change goes through [`Life::step`].
#[derive(Debug)]
pub struct Life {
    state: State,
}

impl Default for Life {
    fn default() -> Self {
        Self { state: State::Ready }
    }
}

/// A step that the present state does not allow.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("cannot {step} a machine that is {state}")]
pub struct IllegalStep {
    /// What was wanted.
    pub step: Step,
    /// What it is.
    pub state: State,
}

impl Life {
    /// The present state.
    #[must_use]
    pub fn state(&self) -> State {
        self.state
    }

    /// Take `step`.
    ///
    /// # Errors
    /// When the present state does not allow it; the state stays.
    pub fn step(&mut self, step: Step) -> Result<State, IllegalStep> {
        let state = self.state;
        self.state = match (state, step) {
            (State::Ready, Step::Start)
            | (State::Paused, Step::Resume)
            | (State::Resetting, Step::Restart) => State::Running,
            (State::Running, Step::Pause) => State::Paused,
            (State::Paused, Step::Reset) => State::Resetting,
            (State::Ready | State::Running | State::Paused | State::Resetting, Step::End) => State::Ended,
            _ => return Err(IllegalStep { step, state }),
        };
        tracing::debug!(from = %state, to = %self.state, "the machine's state changed");
        Ok(self.state)
    }
}

impl fmt::Display for State {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Ready => "ready",
            Self::Running => "running",
            Self::Paused => "paused",
            Self::Resetting => "resetting",
            Self::Ended => "ended",
        })
    }
}

impl fmt::Display for Step {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Start => "start",
            Self::Pause => "pause",
            Self::Resume => "resume",
            Self::Reset => "reset",
            Self::Restart => "restart",
            Self::End => "end",
        })
    }
}

/// How a machine's life ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Ended {
    /// The guest powered off.
    PoweredOff,
    /// The guest asked for a reset, and a reset was to end it.
    Reset,
    /// The guest panicked, or one of its processors cannot go on.
    Crashed(String),
    /// A test image ended with this status.
    Exit(u8),
    /// The operator ended it at the console.
    Quit,
    /// The operator ended it by signals, and the guest did not shut down in time.
    Killed,
}

impl Ended {
    /// The exit status of the process: 0 after a shutdown or at the operator's wish at the console, 3 after a
    /// crash, 4 when the guest had to be stopped, a test image's own after its end. 1 and 2 are for errors of
    /// the host and of usage, which are no end of a guest.
    #[must_use]
    pub fn exit_status(&self) -> u8 {
        match self {
            Self::PoweredOff | Self::Reset | Self::Quit => 0,
            Self::Crashed(_) => 3,
            Self::Killed => 4,
            Self::Exit(status) => *status,
        }
    }
}

impl fmt::Display for Ended {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::PoweredOff => f.write_str("the guest powered off"),
            Self::Reset => f.write_str("the guest asked for a reset"),
            Self::Crashed(why) => write!(f, "the guest crashed: {why}"),
            Self::Exit(status) => write!(f, "the guest ended with status {status}"),
            Self::Quit => f.write_str("ended at the console"),
            Self::Killed => f.write_str("ended by signal before the guest shut down"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const STATES: [State; 5] = [
        State::Ready,
        State::Running,
        State::Paused,
        State::Resetting,
        State::Ended,
    ];
    const STEPS: [Step; 6] = [
        Step::Start,
        Step::Pause,
        Step::Resume,
        Step::Reset,
        Step::Restart,
        Step::End,
    ];

    #[test]
    fn only_these_steps_are_legal() {
        let legal: Vec<_> = STATES
            .into_iter()
            .flat_map(|state| STEPS.map(|step| (state, step)))
            .filter_map(|(state, step)| {
                let to = Life { state }.step(step).ok()?;
                Some((state, step, to))
            })
            .collect();
        assert_eq!(
            legal,
            [
                (State::Ready, Step::Start, State::Running),
                (State::Ready, Step::End, State::Ended),
                (State::Running, Step::Pause, State::Paused),
                (State::Running, Step::End, State::Ended),
                (State::Paused, Step::Resume, State::Running),
                (State::Paused, Step::Reset, State::Resetting),
                (State::Paused, Step::End, State::Ended),
                (State::Resetting, Step::Restart, State::Running),
                (State::Resetting, Step::End, State::Ended),
            ]
        );
    }

    #[test]
    fn an_illegal_step_says_what_and_leaves_the_state() {
        let mut life = Life::default();
        let error = life.step(Step::Resume).expect_err("never started");
        assert_eq!(error.to_string(), "cannot resume a machine that is ready");
        assert_eq!(life.state(), State::Ready);
    }

    #[test]
    fn the_exit_status_tells_how_it_ended() {
        assert_eq!(Ended::PoweredOff.exit_status(), 0);
        assert_eq!(Ended::Crashed("panic".to_owned()).exit_status(), 3);
        assert_eq!(Ended::Killed.exit_status(), 4);
        assert_eq!(Ended::Exit(35).exit_status(), 35);
    }
}
