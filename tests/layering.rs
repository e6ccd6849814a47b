//! A layer uses only those to its left: `platform <- pci <- iommu <- devices <- vm <- main`.

use std::fs;
use std::path::{Path, PathBuf};

const LAYERS: [&str; 5] = ["platform", "pci", "iommu", "devices", "vm"];

fn sources(folder: &Path) -> Vec<PathBuf> {
    let entries = fs::read_dir(folder)
        .expect("a source folder")
        .map(|entry| entry.expect("readable").path());
    let (folders, files): (Vec<_>, Vec<_>) = entries.partition(|path| path.is_dir());
    let nested = folders.iter().flat_map(|folder| sources(folder));
    files
        .into_iter()
        .filter(|path| path.extension().is_some_and(|e| e == "rs"))
        .chain(nested)
        .collect()
}

/// Every layer that `text` names after `crate::` (also in the braces of `use crate::{a, b::c}`).
fn named_layers(text: &str) -> Vec<&'static str> {
    let mut found = Vec::new();
    for (at, _) in text.match_indices("crate::") {
        let rest = &text[at + "crate::".len()..];
        let names: Vec<&str> = match rest.strip_prefix('{') {
            Some(list) => list
                .split('}')
                .next()
                .unwrap_or("")
                .split(',')
                .map(str::trim)
                .collect(),
            None => vec![rest],
        };
        let starts = |name: &&str, layer: &str| {
            name.strip_prefix(layer)
                .is_some_and(|after| !after.starts_with(|c: char| c.is_alphanumeric() || c == '_'))
        };
        found.extend(
            LAYERS
                .into_iter()
                .filter(|layer| names.iter().any(|name| starts(name, layer))),
        );
    }
    found
}

#[test]
fn each_layer_uses_only_those_to_its_left() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("src");
    let mut wrong = Vec::new();
    for (rank, layer) in LAYERS.iter().enumerate() {
        for file in sources(&root.join(layer)) {
            let text = fs::read_to_string(&file).expect("a source file");
            let above = named_layers(&text)
                .into_iter()
                .filter(|named| LAYERS[rank + 1..].contains(named));
            wrong.extend(above.map(|named| format!("{} uses {named}", file.display())));
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

#[test]
fn the_reader_of_use_lines_sees_every_form() {
    assert_eq!(named_layers("use crate::vm::plan;"), ["vm"]);
    assert_eq!(
        named_layers("use crate::{pci::Bar, devices};"),
        ["pci", "devices"]
    );
    assert_eq!(named_layers("let x = crate::iommu::f();"), ["iommu"]);
    assert!(named_layers("use crate::vmm; use super::pci;").is_empty());
}
