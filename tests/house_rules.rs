//! Rules of the tree that no compiler checks: where unsafe may live, how long a file may grow, what a module
//! may be called, and which crates may be there.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

/// The only files that may open `unsafe_code`, each a boundary to the kernel.
const SYSTEM_FILES: [&str; 4] = [
    "src/platform/kvm/",
    "src/platform/mmap.rs",
    "src/platform/tap.rs",
    "src/platform/vectored.rs",
];

/// Lines a source file may have; past it, split by noun.
const MOST_LINES: usize = 800;

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

fn sources(folder: &Path) -> Vec<PathBuf> {
    let entries = fs::read_dir(folder)
        .expect("a folder")
        .map(|entry| entry.expect("readable").path());
    let (folders, files): (Vec<_>, Vec<_>) = entries.partition(|path| path.is_dir());
    let nested: Vec<_> = folders.iter().flat_map(|folder| sources(folder)).collect();
    files
        .into_iter()
        .chain(nested)
        .filter(|path| path.extension().is_some_and(|e| e == "rs"))
        .collect()
}

fn rust_sources() -> Vec<(String, String)> {
    let named = |path: PathBuf| {
        let text = fs::read_to_string(&path).expect("a source file");
        (
            path.strip_prefix(root())
                .expect("below the root")
                .display()
                .to_string(),
            text,
        )
    };
    sources(&root().join("src")).into_iter().map(named).collect()
}

#[test]
fn unsafe_is_opened_in_system_files_only() {
    let opens = |text: &str| text.contains("expect(unsafe_code") || text.contains("allow(unsafe_code");
    let strangers: Vec<_> = rust_sources()
        .into_iter()
        .filter(|(name, text)| opens(text) && !SYSTEM_FILES.iter().any(|system| name.starts_with(system)))
        .map(|(name, _)| name)
        .collect();
    assert!(
        strangers.is_empty(),
        "unsafe outside the system files: {strangers:?}"
    );
}

#[test]
fn no_source_file_is_longer_than_its_limit() {
    let long: Vec<_> = rust_sources()
        .into_iter()
        .map(|(name, text)| (name, text.lines().count()))
        .filter(|(_, lines)| *lines > MOST_LINES)
        .collect();
    assert!(long.is_empty(), "split by noun: {long:?}");
}

#[test]
fn every_source_file_says_what_it_is_for() {
    let silent: Vec<_> = rust_sources()
        .into_iter()
        .filter(|(_, text)| !text.starts_with("//!"))
        .map(|(name, _)| name)
        .collect();
    assert!(silent.is_empty(), "no module documentation: {silent:?}");
}

#[test]
fn modules_are_named_for_what_they_give() {
    let vague = ["util", "utils", "common", "manager", "helper", "helpers", "misc"];
    let named: Vec<_> = rust_sources()
        .into_iter()
        .map(|(name, _)| name)
        .filter(|name| {
            name.trim_end_matches(".rs")
                .split('/')
                .any(|part| vague.contains(&part))
        })
        .collect();
    assert!(named.is_empty(), "vague names: {named:?}");
}

/// Name, versions and sources of every package in Cargo.lock.
fn locked() -> BTreeMap<String, Vec<(String, Option<String>)>> {
    let text = fs::read_to_string(root().join("Cargo.lock")).expect("Cargo.lock");
    let lock: toml::Table = text.parse().expect("Cargo.lock is TOML");
    let mut packages: BTreeMap<String, Vec<_>> = BTreeMap::new();
    for package in lock["package"].as_array().expect("a list of packages") {
        let field = |key: &str| {
            package
                .get(key)
                .and_then(|value| value.as_str())
                .map(str::to_owned)
        };
        let name = field("name").expect("a package has a name");
        packages
            .entry(name)
            .or_default()
            .push((field("version").expect("and a version"), field("source")));
    }
    packages
}

#[test]
fn guest_memory_comes_from_one_version_of_one_crate() {
    let packages = locked();
    for name in [
        "vm-memory",
        "kvm-ioctls",
        "kvm-bindings",
        "vmm-sys-util",
        "virtio-queue",
    ] {
        assert_eq!(packages[name].len(), 1, "{name}: {:?}", packages[name]);
    }
}

#[test]
fn every_dependency_comes_from_the_registry() {
    let elsewhere: Vec<_> = locked()
        .into_iter()
        .filter(|(name, versions)| {
            let foreign = |source: &Option<String>| !source.as_deref().unwrap_or("").starts_with("registry+");
            name != "ravelin" && versions.iter().any(|(_, source)| foreign(source))
        })
        .collect();
    assert!(elsewhere.is_empty(), "{elsewhere:?}");
}

#[test]
fn crates_with_known_defects_are_past_the_repaired_version() {
    // Crate, first version without the defect, the defect.
    let repaired = [
        (
            "vm-memory",
            (0, 12, 2),
            "out-of-bounds access through a default method (CVE-2023-41051)",
        ),
        (
            "vmm-sys-util",
            (0, 12, 0),
            "unchecked length in FamStructWrapper (CVE-2023-50711)",
        ),
        (
            "vm-superio",
            (0, 8, 2),
            "lost input while the interrupt was masked",
        ),
        ("vm-allocator", (0, 1, 4), "the same range given out twice"),
    ];
    let packages = locked();
    for (name, minimum, defect) in repaired {
        for (version, _) in &packages[name] {
            let mut parts = version
                .split('.')
                .map(|part| part.parse::<u32>().expect("a number"));
            let mut next = || parts.next().expect("three parts");
            assert!((next(), next(), next()) >= minimum, "{name} {version}: {defect}");
        }
    }
}
