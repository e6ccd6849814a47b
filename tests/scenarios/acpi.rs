//! The reference compiler's opinion of the ACPI tables: it reads each, writes it down, and makes the same
//! bytes of what it wrote. In the lab, where its present version is installed.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use ravelin::platform::addr::Gpa;
use ravelin::vm::boot::acpi::{Hardware, RSDP_LEN, describe};
use ravelin::vm::plan::Plan;

/// Where the tables say they are.
const AT: u64 = 0xe_0000;

/// Tables of a machine with the hierarchy and the IOMMUs of `plan`, each in a file of its own.
fn files(plan: &Plan, folder: &Path) -> Vec<PathBuf> {
    let apic_ids: Vec<u32> = (0..300).collect();
    let hardware = Hardware {
        apic_ids: &apic_ids,
        hpet: true,
        pvpanic: true,
        ..Hardware::from(plan)
    };
    let bytes = describe(&hardware, Gpa(AT)).bytes;
    let number = |at: usize, len: usize| {
        let bytes = &bytes[at..at + len];
        bytes
            .iter()
            .rev()
            .fold(0_usize, |value, byte| value << 8 | usize::from(*byte))
    };
    let offset = |address: usize| address - usize::try_from(AT).expect("small");
    let xsdt = offset(number(24, 8));
    let entries = (xsdt + 36..xsdt + number(xsdt + 4, 4)).step_by(8);
    let mut tables: Vec<usize> = entries.map(|entry| offset(number(entry, 8))).collect();
    let fadt = tables[0];
    tables.extend([offset(number(fadt + 132, 8)), offset(number(fadt + 140, 8)), xsdt]);
    assert!(tables.iter().all(|&table| table >= RSDP_LEN));
    tables
        .into_iter()
        .map(|table| {
            let content = &bytes[table..table + number(table + 4, 4)];
            let path = folder.join(format!("{}.dat", String::from_utf8_lossy(&content[..4])));
            fs::write(&path, content).expect("the folder takes a file");
            path
        })
        .collect()
}

fn iasl(arguments: &[&str], file: &Path) -> String {
    let output = Command::new("iasl")
        .args(arguments)
        .arg(file)
        .current_dir(file.parent().expect("in a folder"))
        .output()
        .expect("iasl (Debian's acpica-tools) is there");
    let said = [output.stdout, output.stderr].concat();
    let said = String::from_utf8_lossy(&said).into_owned();
    assert!(
        output.status.success(),
        "iasl {arguments:?} {}:\n{said}",
        file.display()
    );
    said
}

/// A table without what says who compiled it (bytes 28 to 35), and the checksum (byte 9) that covers that.
fn content(table: &[u8]) -> Vec<u8> {
    let mut content = table.to_vec();
    // The firmware control structure has neither.
    if content[..4] != b"FACS"[..] {
        content[9] = 0;
        content[28..36].fill(0);
    }
    content
}

#[test]
fn iasl_makes_the_same_bytes_of_every_table_without_a_warning() {
    for (name, plan) in crate::topologies::plans() {
        let folder = tempfile::tempdir().expect("a folder");
        for table in files(&plan, folder.path()) {
            iasl(&["-d"], &table);
            let said = iasl(&["-we"], &table.with_extension("dsl"));
            let made = fs::read(table.with_extension("aml")).expect("compiled");
            let ours = fs::read(&table).expect("written above");
            assert!(
                said.contains("0 Errors, 0 Warnings"),
                "{name}, {}:\n{said}",
                table.display()
            );
            assert_eq!(content(&made), content(&ours), "{name}, {}", table.display());
        }
    }
}
