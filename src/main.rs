//! Parse arguments, load, plan, build, run; map the result to an exit code.

fn main() {}
