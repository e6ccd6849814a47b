//! Rules of the tree that no compiler checks: where unsafe may live, how long a file may grow, what a module
//! may be called, which crates may be there, and which tests the documents may name.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};

/// The only files that may open `unsafe_code`, each a boundary to the kernel.
const SYSTEM_FILES: [&str; 7] = [
    "src/devices/vfio/uapi.rs",
    "src/iommu/container/uapi.rs",
    "src/iommu/iommufd/uapi.rs",
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

/// Where `text` names a block device that a host may have: by any path of one, or, of virtio disks, which scenarios give to
/// guests, as Rust alone names files.
fn block_devices(text: &str) -> Vec<&str> {
    const KINDS: [&str; 9] = [
        "nvme", "sd", "hd", "xvd", "mmcblk", "md", "dm-", "disk/", "mapper/",
    ];
    let of_a_host = |rest: &str| KINDS.iter().any(|kind| rest.starts_with(kind));
    let paths = text.match_indices("/dev/").filter(|(at, path)| {
        let rest = &text[at + path.len()..];
        of_a_host(rest) || rest.starts_with("vd") && text[..*at].ends_with('"')
    });
    paths
        .map(|(at, _)| text[at..].lines().next().unwrap_or_default())
        .collect()
}

/// Scenarios write to disks, and run on hosts whose disks are in use.
#[test]
fn no_scenario_names_a_block_device_of_the_host_by_its_path() {
    for path in sources(&root().join("tests/scenarios")) {
        let text = fs::read_to_string(&path).expect("a source file");
        let named = block_devices(&text);
        assert!(
            named.is_empty(),
            "{}: a disk is found from its function: {named:?}",
            path.display()
        );
    }
}

#[test]
fn block_devices_are_told_from_other_files_and_from_a_guests_own() {
    let text =
        "Path::new(\"/dev/vda\"); dd of=/dev/nvme0n1\n dd of=/dev/sda1 if=/dev/vda; \"/dev/kvm\" /dev/hwrng";
    let named = block_devices(text);
    let starts: Vec<_> = named.iter().map(|path| &path[..8]).collect();
    assert_eq!(starts, ["/dev/vda", "/dev/nvm", "/dev/sda"]);
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

/// Memory that a guest changes meanwhile is no value: a type that is made out to be `VolatileMemory` by hand, or to be plain
/// bytes while it holds such memory, has the crate access what it must not.
#[test]
fn class_26_nothing_of_ours_is_made_out_to_be_guest_memory_or_plain_bytes() {
    let claims = |text: &str| {
        let mut lines = text.lines().map(str::trim_start);
        let implements = |line: &str| line.starts_with("impl") || line.starts_with("unsafe impl");
        lines.any(|line| {
            implements(line)
                && ["VolatileMemory for", "ByteValued for"]
                    .iter()
                    .any(|claim| line.contains(claim))
                || line.starts_with("#[derive") && line.contains("ByteValued")
        })
    };
    assert!(claims("unsafe impl ByteValued for Header {}"));
    assert!(claims("    impl<'a> VolatileMemory for Window<'a> {"));
    let found: Vec<_> = rust_sources()
        .into_iter()
        .filter(|(_, text)| claims(text))
        .map(|(name, _)| name)
        .collect();
    assert!(found.is_empty(), "{found:?}");
}

/// Names of the tests in `text`, those of macros for properties included.
fn tests_of(text: &str) -> impl Iterator<Item = &str> {
    let functions = text.split("#[test]").skip(1);
    functions.filter_map(|rest| {
        let (_, rest) = rest.split_once("fn ")?;
        rest.split(|c: char| !(c.is_ascii_alphanumeric() || c == '_'))
            .next()
    })
}

/// Every test of the project, and every fuzz target.
fn tests() -> BTreeSet<String> {
    let files = ["src", "tests"]
        .map(|folder| sources(&root().join(folder)))
        .concat();
    let tests = files.iter().flat_map(|path| {
        let text = fs::read_to_string(path).expect("a source file");
        tests_of(&text).map(str::to_owned).collect::<Vec<_>>()
    });
    let targets = fs::read_dir(root().join("fuzz/fuzz_targets")).expect("a folder");
    let targets = targets.filter_map(|entry| Some(entry.ok()?.path().file_stem()?.to_str()?.to_owned()));
    tests.chain(targets).collect()
}

/// What stands in backticks in `text` and is made like the name of a function.
fn quoted(text: &str) -> impl Iterator<Item = &str> {
    let is_name = |word: &&str| {
        !word.is_empty()
            && word
                .bytes()
                .all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'_')
    };
    text.split('`').skip(1).step_by(2).filter(is_name)
}

fn document(name: &str) -> String {
    fs::read_to_string(root().join(name)).unwrap_or_else(|error| panic!("{name}: {error}"))
}

#[test]
fn tests_that_documents_name_exist() {
    // So many words make a sentence, which nothing but a test is called by.
    const WORDS: usize = 4;
    let tests = tests();
    let folder = fs::read_dir(root().join("docs")).expect("a folder");
    let pages =
        folder.map(|entry| format!("docs/{}", entry.expect("readable").file_name().to_string_lossy()));
    let names = [
        "README.md",
        "ARCHITECTURE.md",
        "CONTRIBUTING.md",
        "fuzz/README.md",
    ];
    let absent: Vec<_> = names
        .map(str::to_owned)
        .into_iter()
        .chain(pages)
        .flat_map(|page| {
            let text = document(&page);
            let named = quoted(&text).filter(|word| word.split('_').count() >= WORDS);
            let absent = named.filter(|word| !tests.contains(*word));
            absent.map(|word| format!("{page}: {word}")).collect::<Vec<_>>()
        })
        .collect();
    assert!(
        absent.is_empty(),
        "documents name tests that do not exist: {absent:#?}"
    );
}

#[test]
fn the_page_on_hostile_guests_names_only_tests_and_knows_every_class() {
    let tests = tests();
    let page = document("docs/hostile-guests.md");
    let rows: Vec<Vec<&str>> = page
        .lines()
        .filter(|line| line.starts_with("| "))
        .map(|line| line.split('|').map(str::trim).collect())
        .collect();
    // The last column, between the line's last bar and the one before.
    let shown = rows
        .iter()
        .filter_map(|cells| cells.get(cells.len().checked_sub(2)?));
    let absent: Vec<_> = shown
        .flat_map(|cell| quoted(cell))
        .filter(|name| !tests.contains(*name))
        .collect();
    assert!(absent.is_empty(), "no test and no fuzz target: {absent:?}");

    let classes: BTreeSet<&str> = rows.iter().filter_map(|cells| cells.get(1).copied()).collect();
    let unknown: Vec<_> = tests
        .iter()
        .filter(|name| {
            let number = name
                .strip_prefix("class_")
                .and_then(|rest| rest.split('_').next());
            number.is_some_and(|number| !classes.contains(number))
        })
        .collect();
    assert!(
        unknown.is_empty(),
        "tests of classes that the page does not have: {unknown:?}"
    );
}

#[test]
fn names_of_tests_are_found_in_sources_and_documents() {
    let source =
        "#[test]\nfn one_thing() {}\n#[test]\n#[should_panic]\nfn another_thing() {}\nfn no_test() {}\n";
    assert_eq!(
        tests_of(source).collect::<Vec<_>>(),
        ["one_thing", "another_thing"]
    );
    let page = "`one_thing`, `src/file.rs`, `a_row_of_...` and `another_thing`";
    assert_eq!(quoted(page).collect::<Vec<_>>(), ["one_thing", "another_thing"]);
}
