//! What a host says of itself, asked for with a NIC that it can spare.

use std::process::Command;

use serde_json::Value;

use crate::given::Given;
use crate::prerequisites::binary;

/// What `ravelin host ARGUMENTS` prints.
fn host(arguments: &[&str]) -> String {
    let output = Command::new(binary())
        .arg("host")
        .args(arguments)
        .output()
        .expect("the binary runs");
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{errors}");
    assert_eq!(
        errors, "",
        "nothing is left of it, and nothing is to be warned of"
    );
    String::from_utf8(output.stdout).expect("text")
}

fn json(arguments: &[&str]) -> Value {
    serde_json::from_str(&host(&[&["--json"], arguments].concat())).expect("JSON")
}

/// Steps with what the kernel said to each, in one word.
fn told(steps: &Value) -> Vec<(String, String)> {
    let steps = steps.as_array().expect("steps").iter();
    let word = |answer: &Value| match &answer["refused"]["errno"] {
        Value::String(errno) => errno.clone(),
        _ => answer.as_str().expect("a word").to_owned(),
    };
    let pairs = steps.map(|step| {
        let name = step["name"].as_str().expect("a name");
        (name.to_owned(), word(&step["answer"]))
    });
    pairs.collect()
}

fn says(steps: &Value, expected: &[(&str, &str)]) {
    let told = told(steps);
    let told: Vec<_> = told
        .iter()
        .map(|(name, said)| (name.as_str(), said.as_str()))
        .collect();
    assert_eq!(told, expected);
}

/// The lab's kernel is a stock one, and its IOMMU has no GIOSup.
#[test]
fn a_stock_kernel_is_told_step_by_step_what_it_answers() {
    let nic = Given::nic();
    let report = json(&[]);
    let unit = &report["trials"]["Ok"][0];
    assert_eq!(unit["function"], nic.at, "{unit}");
    let answers = &unit["answers"]["Ok"];
    says(
        &answers["steps"],
        &[
            ("GET_HW_INFO", "ok"),
            ("IOAS_ALLOC", "ok"),
            ("HWPT_ALLOC", "ok"),
            ("attach", "ok"),
            ("HWPT_ALLOC of the nest parent", "EOPNOTSUPP"),
        ],
    );
    // It hands out memory of functions for others.
    assert_eq!(unit["exports"], serde_json::json!({"Ok": null}), "{unit}");
    let rings = ["HW_QUEUE_ALLOC", "VIOMMU_COMMAND", "OPTION", "VIOMMU_MMIO_ACCESS"];
    for (at, ring) in rings.into_iter().enumerate() {
        let version = &answers["versions"][at];
        assert_eq!(version["answers"], false);
        // It makes a vIOMMU of any type over any nest parent, and there is none.
        says(
            &version["steps"],
            &[
                ("VIOMMU_ALLOC", "EINVAL"),
                ("offset of the VF page", "not-asked"),
                ("mmap of the VF page", "not-asked"),
                ("VDEVICE_ALLOC", "not-asked"),
                ("HWPT_ALLOC of the guest's tables", "not-asked"),
                (ring, "not-asked"),
            ],
        );
    }
    let text = host(&["--abi", "v-c"]);
    assert!(
        text.contains("by version v-c:\n") && !text.contains("v-e"),
        "{text}"
    );
    assert!(text.contains("version it answers to: none\n"), "{text}");
    for needs in [
        "- GIOSup (EFR bit 48): v2 tables for requests without PASID; ivhd0 has it not\n",
        "- GCR3TRPMode (EFR2 bit 3): v2 tables over the host's; ivhd0 has it not\n",
        "- vIOMMUSup (EFR bit 55): a guest's own rings; ivhd0 has it not\n",
        "- a kernel with AMD's vIOMMU: the version it answers to is none\n",
    ] {
        assert!(text.contains(needs), "{needs}{text}");
    }
    assert!(
        text.contains("the kernel hands out its memory for other functions of a guest\n"),
        "{text}"
    );
    nic.works_on_the_host();
    let text = host(&[]);
    assert!(
        text.contains("AMD's vIOMMU not asked for: no function is bound to vfio-pci; "),
        "{text}"
    );
    assert!(
        text.contains("peer-to-peer not asked for: no function is bound to vfio-pci; "),
        "{text}"
    );
}
