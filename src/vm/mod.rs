//! The machine: what was said, what was planned from it, and the machine built and run.

mod board;
pub mod boot;
pub mod build;
pub mod config;
pub mod events;
mod functions;
mod hardware;
pub mod host_functions;
pub mod host_report;
mod host_signals;
pub mod layout;
pub mod lifecycle;
pub mod logging;
mod opening;
mod passed;
pub mod plan;
pub mod stats;
pub mod unit_signals;
pub mod vcpu_loop;
mod viommus;

use std::path::PathBuf;
use std::time::{Duration, Instant};

use crate::devices::request::Request;
use crate::pci::topology::AttachError;
use crate::platform::bus::ClaimError;
use crate::platform::host::HostError;
use crate::platform::kvm::{Kvm, KvmError};
use crate::{guest_info, guest_warn};

use boot::{BootError, cpuid};
use build::Machine;
use lifecycle::{Ended, IllegalStep, State, Step};
use plan::{OnReboot, Plan};
use stats::Stats;
use vcpu_loop::Notice;

/// What a run needs to know that is not the machine's.
#[derive(Debug, Clone)]
pub struct RunOptions {
    /// When the process started: what milestones count from.
    pub started: Instant,
    /// Where the statistics go at the end.
    pub stats: Option<PathBuf>,
    /// How long a guest may take to shut down after the first stop signal.
    pub shutdown_timeout: Duration,
}

/// Why a machine could not be run, or not any further. The host or the operator can mend it; what a guest
/// does ends in an [`Ended`] instead.
#[derive(Debug, thiserror::Error)]
pub enum RunError {
    /// KVM cannot be used, or not for this machine.
    #[error(transparent)]
    Kvm(#[from] KvmError),
    /// The host refused something.
    #[error(transparent)]
    Host(#[from] HostError),
    /// There is nothing that can be started.
    #[error(transparent)]
    Boot(#[from] BootError),
    /// A device does not fit where the plan has it.
    #[error(transparent)]
    Attach(#[from] AttachError),
    /// Two units want the same address.
    #[error(transparent)]
    Claim(#[from] ClaimError),
    /// The plan has no kernel.
    #[error("no kernel was named; use --kernel FILE or `kernel` in the machine file")]
    NoKernel,
    /// The guest's addresses are wider than the host's processors can map.
    #[error(
        "the machine's addresses go up to {highest:#x}; this host's processors map {bits} bits, up to {reach:#x}"
    )]
    AddressBits {
        /// The highest address in the plan.
        highest: u64,
        /// What the host has.
        bits: u32,
        /// The highest address that gives.
        reach: u64,
    },
    /// A state change out of order.
    #[error(transparent)]
    Illegal(#[from] IllegalStep),
}

/// Build the machine that `plan` describes, run it to its end, and say how it ended.
///
/// # Errors
/// What the host or the operator must mend; the guest may have run by then.
pub fn run(plan: &Plan, options: &RunOptions) -> Result<Ended, RunError> {
    let plan = &on_this_host(plan)?;
    let mut machine = Machine::build(plan, options.started)?;
    let mut operator = Operator::new(options.shutdown_timeout);
    machine.start()?;
    let ended = machine.serve(plan, &mut operator);
    machine.stop()?;
    if let Some(path) = &options.stats {
        machine.stats().write(path)?;
    }
    let ended = ended?;
    tracing::info!(%ended, status = ended.exit_status(), "the machine ended");
    Ok(ended)
}

/// `plan` with what only the host's processors decide. Where nothing depends on them they are not asked.
fn on_this_host(plan: &Plan) -> Result<Plan, RunError> {
    let mut plan = plan.clone();
    if plan.boot.is_some() && plan.viommus.iter().any(|unit| unit.offer.pasid_bits > 0) {
        let supported = Kvm::open()?.supported_cpuid()?;
        plan.match_processors(cpuid::has_five_levels(&supported));
    }
    Ok(plan)
}

/// What the operator's stop signals have led to so far.
#[derive(Debug)]
struct Operator {
    shutdown_timeout: Duration,
    /// When the guest's time to shut down is up.
    deadline: Option<Instant>,
}

/// What to do about stop signals.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Stop {
    /// Press the power button.
    Ask,
    /// End the machine.
    Kill,
    /// Nothing yet.
    Wait,
}

impl Operator {
    fn new(shutdown_timeout: Duration) -> Self {
        Self {
            shutdown_timeout,
            deadline: None,
        }
    }

    /// `signals` more came by `now`.
    fn stop(&mut self, signals: usize, now: Instant) -> Stop {
        match (self.deadline, signals) {
            (Some(deadline), 0) if now < deadline => Stop::Wait,
            (None, 0) => Stop::Wait,
            (None, 1) => {
                self.deadline = now.checked_add(self.shutdown_timeout);
                Stop::Ask
            }
            _ => Stop::Kill,
        }
    }
}

/// What to do when `pauses` more signals to pause and `resumes` to go on came, in whatever order: who wants it to go on
/// is not left with a guest that stands still.
fn wished(state: State, pauses: usize, resumes: usize) -> Option<Step> {
    match (state, pauses, resumes) {
        (State::Running, 1.., 0) => Some(Step::Pause),
        (State::Paused, _, 1..) => Some(Step::Resume),
        _ => None,
    }
}

impl Machine<'_> {
    /// Let the guest run for the first time.
    fn start(&mut self) -> Result<(), RunError> {
        self.life.step(Step::Start)?;
        Ok(self.crew.run()?)
    }

    /// Serve events until the machine is to end.
    fn serve(&mut self, plan: &Plan, operator: &mut Operator) -> Result<Ended, RunError> {
        loop {
            self.events.turn(operator.deadline)?;
            while let Some(request) = self.requests.take() {
                if let Some(ended) = self.obey(request, plan)? {
                    return Ok(ended);
                }
            }
            while let Some(notice) = self.notices.take() {
                if let Some(ended) = self.heed(notice, plan)? {
                    return Ok(ended);
                }
            }
            if self.reports.count() > 0 {
                self.viommus
                    .iter()
                    .for_each(|unit| tracing::info!(unit = unit.name(), "{}", unit.state()));
            }
            match wished(self.life.state(), self.pauses.count(), self.resumes.count()) {
                Some(Step::Pause) => {
                    self.pause()?;
                    tracing::info!("the guest is paused; SIGCONT lets it go on");
                }
                Some(_) => {
                    self.resume()?;
                    tracing::info!("the guest goes on");
                }
                None => {}
            }
            let signals = self.signals.count();
            match operator.stop(signals, Instant::now()) {
                Stop::Wait => {}
                Stop::Ask => {
                    if self.life.state() == State::Paused {
                        tracing::info!("the guest goes on, so that it can shut down");
                        self.resume()?;
                    }
                    let heard = self.board.press_power_button();
                    let seconds = operator.shutdown_timeout.as_secs();
                    tracing::info!(
                        heard,
                        seconds,
                        "pressed the guest's power button; another signal, or that time, ends it"
                    );
                }
                Stop::Kill => return Ok(Ended::Killed),
            }
        }
    }

    /// Do what a device asks for.
    fn obey(&mut self, request: Request, plan: &Plan) -> Result<Option<Ended>, RunError> {
        Ok(match request {
            Request::PowerOff => Some(Ended::PoweredOff),
            Request::Reset => self.reset_or_end(plan)?,
            Request::GuestPanicked => Some(Ended::Crashed("its kernel panicked".to_owned())),
            Request::CrashLoaded => {
                tracing::warn!("the guest's kernel panicked; its crash kernel goes on");
                None
            }
            Request::Exit(status) => Some(Ended::Exit(status)),
            Request::Quit => Some(Ended::Quit),
        })
    }

    /// A processor cannot go on.
    fn heed(&mut self, notice: Notice, plan: &Plan) -> Result<Option<Ended>, RunError> {
        match notice {
            Notice::Host(error) => Err(error.into()),
            Notice::Broken { vcpu, what } => {
                tracing::error!(vcpu, what, "a processor cannot go on");
                Ok(Some(Ended::Crashed(format!("vCPU {vcpu}: {what}"))))
            }
            Notice::TripleFault { vcpu } => {
                guest_warn!(vcpu, "triple fault");
                match plan.board.on_reboot {
                    OnReboot::Restart => self.reset_or_end(plan),
                    OnReboot::Exit => Ok(Some(Ended::Crashed(format!("triple fault on vCPU {vcpu}")))),
                }
            }
        }
    }

    fn reset_or_end(&mut self, plan: &Plan) -> Result<Option<Ended>, RunError> {
        match plan.board.on_reboot {
            OnReboot::Exit => Ok(Some(Ended::Reset)),
            OnReboot::Restart => {
                self.reset()?;
                Ok(None)
            }
        }
    }

    /// Stop the processors, then the devices, so that nothing of the guest runs: no thread of a device touches its memory
    /// until it goes on. Functions of the host have no thread here, and work on. Clocks go on as well; the guest's
    /// watchdogs are told of the pause.
    fn pause(&mut self) -> Result<(), RunError> {
        self.crew.hold()?;
        self.pause_devices();
        self.viommus.catch_up();
        self.life.step(Step::Pause)?;
        Ok(())
    }

    /// Let a paused guest go on.
    fn resume(&mut self) -> Result<(), RunError> {
        self.life.step(Step::Resume)?;
        self.go_on()
    }

    /// Devices first: they are ready when the processors are.
    fn go_on(&self) -> Result<(), RunError> {
        self.resume_devices();
        Ok(self.crew.run()?)
    }

    /// Start the machine again: processors, devices and what is loaded as they were at power-on. A paused one stays
    /// paused: the guest may have asked for this just before.
    fn reset(&mut self) -> Result<(), RunError> {
        guest_info!("reset");
        let paused = self.life.state() == State::Paused;
        if !paused {
            self.pause()?;
        }
        self.life.step(Step::Reset)?;
        self.reset_devices();
        // What asked for a reset before this one was heard asked for this one.
        self.requests.forget_the_guests();
        self.notices.forget_the_guests();
        let entry = self.load()?;
        self.crew.reset(entry)?;
        self.life.step(Step::Restart)?;
        if paused {
            self.life.step(Step::Pause)?;
            return Ok(());
        }
        self.go_on()
    }

    /// End: nothing runs from here on.
    fn stop(&mut self) -> Result<(), RunError> {
        self.crew.hold()?;
        self.life.step(Step::End)?;
        debug_assert_eq!(self.life.state(), State::Ended);
        Ok(())
    }

    fn stats(&self) -> Stats {
        let counts = self.crew.counts().iter().map(AsRef::as_ref);
        let around = &self.surroundings;
        let buses = [&*around.ports, &*around.mmio];
        Stats::take(
            &around.milestones,
            self.viommus.iter().map(|unit| (unit.name(), unit.counts())),
            self.board.since_init(),
            counts,
            buses,
            &self.host_ram,
            around.watched.counts(),
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const TIMEOUT: Duration = Duration::from_secs(10);

    #[test]
    fn the_first_stop_signal_asks_and_the_second_kills() {
        let (mut operator, now) = (Operator::new(TIMEOUT), Instant::now());
        assert_eq!(operator.stop(0, now), Stop::Wait);
        assert_eq!(operator.stop(1, now), Stop::Ask);
        assert_eq!(operator.stop(0, now), Stop::Wait);
        assert_eq!(operator.stop(1, now), Stop::Kill);
    }

    #[test]
    fn two_stop_signals_at_once_kill() {
        let mut operator = Operator::new(TIMEOUT);
        assert_eq!(operator.stop(2, Instant::now()), Stop::Kill);
    }

    #[test]
    fn a_running_guest_pauses_and_a_paused_one_goes_on() {
        assert_eq!(wished(State::Running, 1, 0), Some(Step::Pause));
        assert_eq!(wished(State::Running, 3, 0), Some(Step::Pause));
        assert_eq!(wished(State::Paused, 0, 1), Some(Step::Resume));
        // As after each SIGSTOP.
        assert_eq!(wished(State::Running, 0, 1), None);
        assert_eq!(wished(State::Paused, 1, 0), None);
        assert_eq!(wished(State::Running, 0, 0), None);
    }

    #[test]
    fn of_both_wishes_at_once_the_guest_goes_on() {
        assert_eq!(wished(State::Running, 1, 1), None);
        assert_eq!(wished(State::Paused, 1, 1), Some(Step::Resume));
    }

    #[test]
    fn a_guest_that_does_not_shut_down_in_time_is_killed() {
        let (mut operator, now) = (Operator::new(TIMEOUT), Instant::now());
        assert_eq!(operator.stop(1, now), Stop::Ask);
        assert_eq!(operator.stop(0, now + TIMEOUT / 2), Stop::Wait);
        assert_eq!(operator.stop(0, now + TIMEOUT), Stop::Kill);
    }
}
