//! Files and flags: what they say together, and what they may not say.

use std::path::Path;

use proptest::prelude::*;

use super::*;
use crate::vm::plan::CharBackend;

fn file(text: &str) -> Config {
    Config::parse(Path::new("m.toml"), text).expect("a machine file")
}

fn refused(text: &str) -> String {
    Config::parse(Path::new("m.toml"), text)
        .expect_err(text)
        .to_string()
}

/// A machine file with flags over it.
fn with_flags(text: &str, flags: &[(&str, &str)]) -> Result<Config, ConfigError> {
    let mut said = file::parse(Path::new("m.toml"), text).expect("TOML");
    for (name, text) in flags {
        lay_over(&mut said, &Flag { name, text })?;
    }
    Config::read(&said)
}

#[test]
fn a_file_and_flags_say_the_same_thing() {
    let from_file =
        file("memory = \"4G\"\ncpus = { count = 8, threads = 2 }\n[[disk]]\npath = \"a\"\nreadonly = true\n");
    let flags = [
        ("memory", "4G"),
        ("cpus", "8,threads=2"),
        ("disk", "a,readonly=on"),
    ];
    let from_flags = with_flags("", &flags).expect("flags");
    let said = |config: &Config| {
        let disk = &config.disks[0];
        let cpus = config.cpus.clone().expect("said");
        (
            config.memory.clone().expect("said").size,
            (cpus.count, cpus.threads),
            (disk.path.clone(), disk.readonly),
        )
    };
    assert_eq!(said(&from_file), said(&from_flags));
}

#[test]
fn a_flag_overrides_single_keys_of_a_section() {
    let text = "[memory]\nsize = \"4G\"\nshared = true\n";
    let config = with_flags(text, &[("memory", "8G")]).expect("flags");
    let memory = config.memory.expect("said");
    assert_eq!(memory.size.expect("said").0, 8 << 30);
    assert!(memory.shared.expect("said").0);
}

#[test]
fn a_flag_overrides_a_section_that_was_one_value() {
    let config = with_flags("cpus = 4\n", &[("cpus", "threads=2")]).expect("flags");
    let cpus = config.cpus.expect("said");
    assert_eq!(
        (cpus.count.expect("said").get(), cpus.threads.expect("said").get()),
        (4, 2)
    );
}

#[test]
fn a_flag_with_a_known_id_changes_that_entry_and_any_other_adds_one() {
    let text = "[[disk]]\nid = \"root\"\npath = \"a\"\n";
    let flags = [
        ("disk", "id=root,readonly=on"),
        ("disk", "b"),
        ("disk", "c,id=data"),
    ];
    let config = with_flags(text, &flags).expect("flags");
    let paths: Vec<_> = config
        .disks
        .iter()
        .map(|disk| disk.path.0.0.display().to_string())
        .collect();
    assert_eq!(paths, ["a", "b", "c"]);
    assert!(config.disks[0].readonly.is_some());
}

#[test]
fn a_command_line_may_hold_anything() {
    let config = with_flags("", &[("cmdline", "console=ttyS0 a=\"b,c\" [x")]).expect("flags");
    assert_eq!(
        config.cmdline.expect("said").text.0.0,
        "console=ttyS0 a=\"b,c\" [x"
    );
}

#[test]
fn sections_can_be_said_by_their_main_value() {
    let config = file("serial = \"null\"\nkernel = \"k\"\ncmdline = \"quiet\"\n");
    assert_eq!(config.serial.expect("said").backend.0, CharBackend::Null);
    assert_eq!(config.kernel.expect("said").path.0.0, Path::new("k"));
}

#[test]
fn an_unknown_section_is_refused_with_the_nearest() {
    assert!(
        refused("cpus = 2\n[[dsik]]\npath = \"a\"\n")
            .starts_with("m.toml:2: dsik: unknown section; did you mean `disk`? sections are cpus, memory,")
    );
}

#[test]
fn an_unknown_key_is_refused_with_its_line_and_the_nearest() {
    assert!(
        refused("[[disk]]\npath = \"a\"\nreadnoly = true\n")
            .starts_with("m.toml:3: disk.readnoly: unknown key; did you mean `readonly`? keys are path, id,")
    );
    let flag = with_flags("", &[("disk", "a,redonly=on")]).expect_err("no such key");
    assert!(
        flag.to_string()
            .starts_with("--disk a,redonly=on: disk.redonly: unknown key; did you mean `readonly`?"),
        "{flag}"
    );
}

#[test]
fn a_bad_value_is_refused_with_key_line_and_value() {
    assert_eq!(
        refused("\nmemory = \"4Q\"\n"),
        "m.toml:2: memory.size = 4Q: not a size; write bytes, or a number with K, M, G or T, like 512M or 4G"
    );
    assert_eq!(
        refused("[[disk]]\npath = \"a\"\nqueues = 0\n"),
        "m.toml:3: disk.queues = 0: must be at least 1"
    );
}

#[test]
fn a_missing_key_is_refused_where_its_section_is() {
    assert_eq!(
        refused("\n[[disk]]\nid = \"a\"\n"),
        "m.toml:2: disk.path: must be given"
    );
}

#[test]
fn values_of_the_wrong_shape_are_refused() {
    assert_eq!(
        refused("[disk]\npath = \"a\"\n"),
        "m.toml:1: disk: there can be several of these; write [[disk]] above its keys"
    );
    assert_eq!(
        refused("board = \"hpet\"\n"),
        "m.toml:1: board: this is a table; write [board] and its keys below"
    );
    assert_eq!(
        refused("memory = [\"4G\"]\n"),
        "m.toml:1: memory: this is a table; write [memory] and its keys below"
    );
    assert_eq!(
        refused("[[disk]]\npath = [\"a\", \"b\"]\n"),
        "m.toml:2: disk.path = [a,b]: one value is meant here, not a list"
    );
    assert_eq!(
        refused("[[disk]]\npath = { x = 1 }\n"),
        "m.toml:2: disk.path = a table: one value is meant here, not a table"
    );
}

#[test]
fn a_file_that_is_not_there_is_refused_by_name() {
    let error = Config::load(Some(Path::new("/nonexistent/m.toml")), &[]).expect_err("no file");
    assert_eq!(
        error.to_string(),
        "/nonexistent/m.toml: cannot read this machine file: No such file or directory (os error 2)"
    );
}

#[test]
fn every_key_of_every_section_has_a_sentence_for_help() {
    for section in SECTIONS {
        assert!(section.doc.trim().ends_with('.'), "{}", section.name);
        assert!(
            section
                .main
                .is_none_or(|main| section.keys.iter().any(|key| key.name == main))
        );
        for key in section.keys {
            assert!(key.doc.trim().ends_with('.'), "{}.{}", section.name, key.name);
        }
    }
}

/// Text that looks like a machine file more often than chance would have it.
fn almost_a_file() -> impl Strategy<Value = String> {
    let names = SECTIONS.iter().map(|section| section.name);
    let keys = SECTIONS
        .iter()
        .flat_map(|section| section.keys.iter().map(|key| key.name));
    let words: Vec<&str> = names.chain(keys).collect();
    let values = prop_oneof![
        any::<i64>().prop_map(|number| number.to_string()),
        "[ -~]{0,12}".prop_map(|text| format!("{text:?}")),
        prop::sample::select(vec![
            "true",
            "\"4G\"",
            "\"0.0\"",
            "[1, \"a\"]",
            "{ id = \"x\" }",
            "\"0-3\"",
            "\"rc0\""
        ])
        .prop_map(str::to_owned),
    ];
    let line = prop_oneof![
        (prop::sample::select(words.clone()), values).prop_map(|(key, value)| format!("{key} = {value}")),
        prop::sample::select(words.clone()).prop_map(|name| format!("[[{name}]]")),
        prop::sample::select(words).prop_map(|name| format!("[{name}]")),
        "\\PC{0,20}",
    ];
    prop::collection::vec(line, 0..12).prop_map(|lines| lines.join("\n"))
}

proptest! {
    #[test]
    fn no_text_makes_the_reader_panic(text in almost_a_file()) {
        if let Err(error) = Config::parse(Path::new("m.toml"), &text) {
            prop_assert!(error.to_string().starts_with("m.toml:"), "{}", error);
        }
    }

    #[test]
    fn no_flag_makes_the_reader_panic(at in 0..SECTIONS.len(), text in "\\PC{0,40}") {
        let flag = (SECTIONS[at].name, text.as_str());
        if let Err(error) = with_flags("", &[flag]) {
            prop_assert!(error.to_string().starts_with("--"), "{}", error);
        }
    }
}
