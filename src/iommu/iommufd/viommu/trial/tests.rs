//! Trials of kernels that are none: what each version of the interface makes of a stock kernel and of AMD's.

use std::os::fd::AsRawFd;

use super::*;
use crate::iommu::iommufd::fake::Version as Is;
use crate::iommu::iommufd::viommu::Processors;
use crate::iommu::iommufd::viommu::testing::{Bench, FUNCTIONS, named, routing};

fn trial(bench: &Bench, abis: &[Abi]) -> Tried {
    let nic = bench.devices[0];
    let device = HwDevice {
        id: nic,
        function: bench.fake.function(nic),
    };
    let trial = Trial {
        kernel: &bench.kernel,
        device: &device,
        abis,
        functions: FUNCTIONS,
        vm: Some(bench.vm.vm().as_raw_fd()),
    };
    let tried = trial.run();
    bench.assert_empty("trial");
    tried
}

/// Names and answers, for people.
fn told(steps: &[Step]) -> Vec<String> {
    let answer = |step: &Step| match &step.answer {
        Answer::Ok => "ok".to_owned(),
        Answer::NotWritten => "not written".to_owned(),
        Answer::NotAsked => "not asked".to_owned(),
        Answer::Refused { errno, .. } => errno.clone(),
    };
    let lines = steps
        .iter()
        .map(|step| format!("{}: {}", step.name, answer(step)));
    lines.collect()
}

#[test]
fn a_stock_kernel_with_a_nest_parent_makes_viommus_that_are_none() {
    let tried = trial(&Bench::new(Is::Stock), &Abi::built_in());
    assert_eq!(
        told(&tried.steps),
        [
            "GET_HW_INFO: ok",
            "IOAS_ALLOC: ok",
            "HWPT_ALLOC: ok",
            "attach: ok",
            "HWPT_ALLOC of the nest parent: ok"
        ]
    );
    assert!(tried.version().is_none() && tried.features.is_some());
    let names: Vec<_> = tried.versions.iter().map(|version| version.name).collect();
    assert_eq!(names, ["v-e", "v-d", "v-c", "v-a"]);
    for (version, ring) in tried.versions.iter().zip([
        "HW_QUEUE_ALLOC: EOPNOTSUPP",
        "VIOMMU_COMMAND: ENOTTY",
        "OPTION: EOPNOTSUPP",
        "VIOMMU_MMIO_ACCESS: ENOTTY",
    ]) {
        let expected = [
            "VIOMMU_ALLOC: ok",
            "offset of the VF page: not written",
            "mmap of the VF page: not asked",
            "VDEVICE_ALLOC: ok",
            "HWPT_ALLOC of the guest's tables: EOPNOTSUPP",
            ring,
        ];
        assert_eq!(told(&version.steps), expected, "{}", version.name);
        assert_eq!(version.first_refusal().map(|step| step.name), Some(PAGE_OFFSET));
        assert_eq!(version.answer(VIOMMU_ALLOC), Some(&Answer::Ok));
    }
}

#[test]
fn a_kernel_without_a_nest_parent_tells_whether_it_has_viommus_at_all() {
    let bench = Bench::new(Is::Stock);
    // The unit, the address space and its tables come before.
    bench.fake.fail(4, libc::EOPNOTSUPP);
    let tried = trial(&bench, &[named("v-e")]);
    assert_eq!(told(&tried.steps)[4], "HWPT_ALLOC of the nest parent: EOPNOTSUPP");
    let [version] = &tried.versions[..] else {
        panic!("one")
    };
    let refused = Answer::Refused {
        errno: "EINVAL".to_owned(),
        hint: NO_PARENT.to_owned(),
    };
    assert_eq!(version.answer(VIOMMU_ALLOC), Some(&refused));
    assert_eq!(
        told(&version.steps)[1..],
        [
            "offset of the VF page: not asked",
            "mmap of the VF page: not asked",
            "VDEVICE_ALLOC: not asked",
            "HWPT_ALLOC of the guest's tables: not asked",
            "HW_QUEUE_ALLOC: not asked",
        ]
    );
}

#[test]
fn each_of_amds_kernels_answers_to_its_own_version_first() {
    for (is, name) in [(Is::E, "v-e"), (Is::D, "v-d"), (Is::C, "v-c"), (Is::A, "v-a")] {
        let tried = trial(&Bench::new(is), &Abi::built_in());
        let version = tried.version().expect("one of them");
        assert_eq!(version.name, name);
        assert_eq!(version.first_refusal(), None, "{name}");
    }
}

#[test]
fn a_version_that_needs_a_guest_is_not_asked_without_one() {
    let bench = Bench::new(Is::D);
    let nic = bench.devices[0];
    let device = HwDevice {
        id: nic,
        function: bench.fake.function(nic),
    };
    let trial = Trial {
        kernel: &bench.kernel,
        device: &device,
        abis: &[named("v-d")],
        functions: FUNCTIONS,
        vm: None,
    };
    let tried = trial.run();
    assert_eq!(tried.versions[0].answer(VIOMMU_ALLOC), Some(&Answer::NotAsked));
    assert!(tried.version().is_none());
    bench.assert_empty("trial");
}

#[test]
fn a_page_that_nobody_answers_from_is_told_of_as_such() {
    let bench = Bench::new(Is::E);
    bench.fake.switch_pages_off(true);
    let tried = trial(&bench, &[named("v-e")]);
    let refused = tried.versions[0].first_refusal().expect("refused");
    assert_eq!(refused.name, PAGE_MAPPED);
    let told = refused.answer.to_string();
    assert!(
        told.starts_with("all ones where Status is: the unit's BAR of VF pages is off"),
        "{told}"
    );
    assert!(tried.version().is_none());
}

#[test]
fn a_request_for_interrupts_is_tried_where_its_layout_is_known() {
    let bench = Bench::new(Is::E);
    let tried = trial(&bench, &[routing()]);
    assert_eq!(
        tried.versions[0].answer("VIOMMU_EXT_INT_REMAP"),
        Some(&Answer::Ok)
    );
    let [[0, _, 0, 0]] = bench.fake.routes()[..] else {
        panic!("nowhere")
    };
    let other = trial(&Bench::new(Is::D), &[routing()]);
    assert!(other.version().is_none());
}

#[test]
fn another_type_number_is_refused_with_what_that_may_be_for() {
    let abi = Abi::from_toml("base = 'v-e'\nviommu-type = 4").expect("a table");
    let tried = trial(&Bench::new(Is::E), &[abi]);
    let Some(Answer::Refused { errno, hint }) = tried.versions[0].answer(VIOMMU_ALLOC) else {
        panic!("refused");
    };
    assert_eq!(errno, "EOPNOTSUPP");
    assert!(
        hint.starts_with("the host's kernel has no AMD vIOMMU, has another type number"),
        "{hint}"
    );
}

#[test]
fn whatever_fails_is_told_and_nothing_is_left_behind() {
    let abi = [routing()];
    let bench = Bench::new(Is::E);
    let before = bench.fake.asked();
    trial(&bench, &abi);
    let requests = bench.fake.asked() - before;
    // Twelve requests and mappings, a detachment, and the end of eight objects.
    assert_eq!(requests, 21);
    let mut told_of = 0;
    for errno in [
        libc::ENOMEM,
        libc::EINVAL,
        libc::EOPNOTSUPP,
        libc::EBUSY,
        libc::ENOTTY,
        libc::E2BIG,
    ] {
        for request in 0..requests {
            let bench = Bench::new(Is::E);
            bench.fake.fail(request, errno);
            let nic = bench.devices[0];
            let device = HwDevice {
                id: nic,
                function: bench.fake.function(nic),
            };
            let tried = Trial {
                kernel: &bench.kernel,
                device: &device,
                abis: &abi,
                functions: FUNCTIONS,
                vm: Some(bench.vm.vm().as_raw_fd()),
            }
            .run();
            let all = tried.steps.iter().chain(&tried.versions[0].steps);
            let name = crate::platform::host::errno_name(errno);
            told_of += all
                .filter(|step| matches!(&step.answer, Answer::Refused { errno, .. } if *errno == name))
                .count();
        }
    }
    assert!(told_of >= 60, "{told_of}");
}
