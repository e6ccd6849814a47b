//! Every request of every version fails once, with whatever errno.

use super::*;
use crate::iommu::iommufd::fake::ERRNOS;
use crate::iommu::iommufd::viommu::testing::Served;
use crate::iommu::viommu::testing::{DEVICE_TABLE, Deed, dte};

#[test]
fn every_request_may_fail_once_and_be_made_again_and_nothing_is_left_behind() {
    for (version, abi) in versions() {
        let bench = Bench::new(version);
        let before = bench.fake.asked();
        let host = live(&bench, &abi);
        let requests = bench.fake.asked() - before;
        drop(host);
        assert!(requests > 20, "{requests}");
        for errno in ERRNOS {
            for request in 0..requests {
                let bench = Bench::new(version);
                bench.fake.fail(request, errno);
                drop(live(&bench, &abi));
                assert!(!bench.fake.fails());
                bench.assert_empty(&format!("{} request {request}, errno {errno}", abi.name));
            }
        }
    }
}

#[test]
fn a_host_that_fails_half_made_leaves_nothing_behind() {
    for errno in ERRNOS {
        for request in 0..7 {
            let bench = Bench::new(Version::E);
            bench.fake.fail(request, errno);
            let error = bench.host(vec![named("v-e")]).err();
            let error = error.expect("nest parent, twice the unit, address space, tables, attachment");
            assert!(
                error.action.contains("viommu0") || error.action.contains("guest memory"),
                "{error}"
            );
            bench.assert_empty(&format!("request {request}, errno {errno}"));
        }
    }
}

#[test]
fn a_version_is_not_given_up_for_an_error_that_says_nothing_of_it() {
    for (version, abi) in versions() {
        let bench = Bench::new(version);
        let before = bench.fake.asked();
        let host = bench.host(Abi::built_in().into()).expect("one of them");
        let requests = bench.fake.asked() - before;
        drop(host);
        for errno in ERRNOS {
            for request in 0..requests {
                bench.fake.fail(request, errno);
                match bench.host(Abi::built_in().into()) {
                    Ok(host) => assert_eq!(host.abi().name, abi.name, "request {request}, errno {errno}"),
                    Err(error) => {
                        let reason = error.source.to_string();
                        let named = reason.contains(&format!("os error {errno})"));
                        assert!(named, "request {request}, errno {errno}: {reason}");
                    }
                }
                bench.fake.relent();
                bench.assert_empty(&format!("{} request {request}, errno {errno}", abi.name));
            }
        }
    }
}

/// What a guest without manners does, a bit of everything, with the kernel's `after`th request failing meanwhile.
fn deeds(after: usize) -> Vec<Deed> {
    let entry = |index, root| Deed::Entry {
        index,
        entry: dte(root, 7),
    };
    let control = |bit, on| Deed::Control { bit, on };
    let renumber = |index, id| Deed::Renumber { index, id };
    let table = |size| Deed::Table {
        base: DEVICE_TABLE,
        size,
    };
    vec![
        entry(0, 0x5000),
        Deed::Refuse { after },
        entry(1, 0x6000),
        entry(0, 0x7000),
        renumber(0, 0x0150),
        entry(0, 0x8000),
        Deed::Register {
            at: 0x170,
            len: 8,
            value: 0x41 << 32 | 3 << 8,
        },
        control(12, false),
        control(12, true),
        Deed::Break,
        control(0, false),
        control(0, true),
        table(0),
        table(0x3f),
        renumber(0, 0x0100),
        Deed::Watchable(false),
        entry(2, 0x9000),
        Deed::Watchable(true),
        control(13, false),
        Deed::Reset,
        entry(2, 0xa000),
    ]
}

#[test]
fn whatever_a_guest_does_the_kernel_takes_it_and_what_it_fails_loses_nothing() {
    for (version, _) in versions() {
        for errno in ERRNOS {
            for after in 0..24 {
                let served = Served::new(version, errno);
                deeds(after)
                    .iter()
                    .fold(true, |settled, deed| served.perform_and_check(deed, settled));
                served.end();
            }
        }
    }
}

#[test]
fn a_name_that_the_kernel_denies_is_gone_only_with_its_device() {
    let bench = Bench::new(Version::E);
    let host = bench.made("v-e");
    let Viommu { id: viommu, .. } = host.viommu_alloc().expect("made");
    let vdevice = host.vdevice_alloc(viommu, NIC, name(0x2100)).expect("made");
    bench.fake.fail(0, libc::ENOENT);
    assert_eq!(said(host.destroy(vdevice)).0, io::ErrorKind::NotFound);
    host.destroy(vdevice).expect("it was there all the time");
    let vdevice = host.vdevice_alloc(viommu, NIC, name(0x2100)).expect("made");
    bench.fake.unbind(bench.devices[0]);
    host.destroy(vdevice).expect("it went with its device");
}
