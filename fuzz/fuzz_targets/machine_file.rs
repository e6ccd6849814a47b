//! The machine file: no text makes the reader or the planner panic, hang or take memory without bound, and
//! whatever is refused is refused with its line.

#![no_main]

use std::path::Path;

use libfuzzer_sys::fuzz_target;
use ravelin::vm::config::Config;
use ravelin::vm::plan::Plan;

fuzz_target!(|text: &str| {
    let planned = Config::parse(Path::new("m.toml"), text).and_then(|config| Plan::resolve(&config));
    match planned {
        // A plan is written as JSON whatever is in it.
        Ok(plan) => assert!(serde_json::to_string(&plan).is_ok()),
        Err(error) => {
            let text = error.to_string();
            assert!(
                text.starts_with("m.toml:") || text.starts_with("the default machine:"),
                "{text}"
            );
        }
    }
});
