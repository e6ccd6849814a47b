//! The machine file: no text makes the reader or the planner panic, hang or take memory without bound, and
//! whatever is refused is refused with its line. A machine that is planned has a PCI hierarchy that works: once
//! enabled, everything answers where the plan says, inside its root complex.

#![no_main]

use std::path::Path;

use libfuzzer_sys::fuzz_target;
use ravelin::pci::testing::Machine;
use ravelin::vm::config::Config;
use ravelin::vm::host_functions::HostFunctions;
use ravelin::vm::plan::Plan;

fuzz_target!(|text: &str| {
    // The same text gives the same plan on every host: this one has no functions.
    let nobody = HostFunctions::below(Path::new("/nonexistent"));
    let planned = Config::parse(Path::new("m.toml"), text).and_then(|config| Plan::resolve_on(&config, &nobody));
    match planned {
        Ok(plan) => {
            // A plan is written as JSON whatever is in it.
            assert!(serde_json::to_string(&plan).is_ok());
            let machine = Machine::new(plan.pci);
            machine.enable();
            machine.check();
            machine.check_as_planned();
        }
        Err(error) => {
            let text = error.to_string();
            assert!(
                text.starts_with("m.toml:") || text.starts_with("the default machine:"),
                "{text}"
            );
        }
    }
});
