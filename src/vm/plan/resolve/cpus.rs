//! Sockets, cores, threads, APIC IDs and pinning.

use std::num::NonZeroU32;

use crate::vm::config::said::ConfigError;
use crate::vm::config::section::Section;
use crate::vm::config::sections::Cpus;
use crate::vm::plan::{CpuPlan, CpuSet, MAX_CPUS};

pub(super) fn resolve(said: Option<&Cpus>) -> Result<CpuPlan, ConfigError> {
    let Some(said) = said else {
        return Ok(plan(1, 1, 1, vec![None]));
    };
    let wrong = |key: &str, problem: String| Err(said.source().wrong(key, problem));
    let or_one = |value: Option<NonZeroU32>| value.map_or(1, NonZeroU32::get);
    let (sockets, threads) = (or_one(said.sockets), or_one(said.threads));
    let Some(outer) = sockets.checked_mul(threads).filter(|outer| *outer <= MAX_CPUS) else {
        let key = if sockets > threads { "sockets" } else { "threads" };
        return wrong(
            key,
            format!("{sockets} sockets x {threads} threads are more than {MAX_CPUS} vCPUs"),
        );
    };
    let cores = match (said.count, said.cores) {
        (_, Some(cores)) => cores.get(),
        (None, None) => 1,
        (Some(count), None) if count.get() % outer == 0 => count.get() / outer,
        (Some(count), None) => {
            let (below, above) = (
                count.get() / outer * outer,
                (count.get() / outer + 1).saturating_mul(outer),
            );
            let near = if below == 0 {
                above.to_string()
            } else {
                format!("{below} or {above}")
            };
            return wrong(
                "count",
                format!("not a multiple of sockets x threads = {outer}; {near} would be"),
            );
        }
    };
    let product = outer.saturating_mul(cores);
    if let Some(count) = said.count.filter(|count| count.get() != product) {
        return wrong(
            "count",
            format!(
                "{sockets} sockets x {cores} cores x {threads} threads are {product} vCPUs, not {count}; leave \
                 one of the four out"
            ),
        );
    }
    if product > MAX_CPUS {
        let key = if said.count.is_some() { "count" } else { "cores" };
        return wrong(key, format!("a machine has at most {MAX_CPUS} vCPUs"));
    }
    let pinning = pinning(said, product)?;
    Ok(plan(sockets, cores, threads, pinning))
}

/// The plan, with an APIC ID for each vCPU: thread, core and package number in fields of their own, each as
/// wide as its largest number needs (AMD64 Architecture Programmer's Manual Volume 3, CPUID Fn0000_000B).
fn plan(sockets: u32, cores: u32, threads: u32, pinning: Vec<Option<CpuSet>>) -> CpuPlan {
    let mut plan = CpuPlan {
        count: sockets * cores * threads,
        sockets,
        cores,
        threads,
        apic_ids: Vec::new(),
        pinning,
    };
    let (core_shift, package_shift) = (plan.thread_bits(), plan.package_shift());
    plan.apic_ids = (0..plan.count)
        .map(|cpu| {
            let (core, thread) = (cpu / threads, cpu % threads);
            let (package, core) = (core / cores, core % cores);
            package << package_shift | core << core_shift | thread
        })
        .collect();
    plan
}

/// One set per vCPU, or one list that gives each vCPU a host CPU.
fn pinning(said: &Cpus, count: u32) -> Result<Vec<Option<CpuSet>>, ConfigError> {
    let count = count as usize;
    let pins = match &said.pin[..] {
        [] => return Ok(vec![None; count]),
        [list] if count > 1 => list.iter().filter_map(|cpu| CpuSet::new([cpu])).collect(),
        sets => sets.to_vec(),
    };
    if pins.len() != count {
        let problem = format!(
            "names {} for {count} vCPUs; name one host CPU (0-3) or one set ([0-1,2-3]) for each",
            pins.len()
        );
        return Err(said.source().wrong("pin", problem));
    }
    Ok(pins.into_iter().map(Some).collect())
}
