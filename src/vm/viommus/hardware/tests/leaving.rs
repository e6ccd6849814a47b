//! Functions that the host takes back while their guest runs.

use super::*;
use crate::platform::addr::Bdf;

impl Made {
    /// The host has NIC number `nic` back: nobody holds on to it, and its binding goes with its last descriptor.
    fn give_back(&self, bench: &Bench, nic: usize) {
        self.lent[nic].give_back();
        let at: Sbdf = NICS[nic].0.parse().expect("an address");
        bench.fake.unbind(bench.devices[&at].0);
    }
}

#[test]
fn a_function_that_leaves_takes_nothing_from_the_others_and_nothing_stays() {
    let bench = Bench::new(Version::E, "mode = \"hw\"\nabi = \"v-e\"\n");
    let made = bench.build().expect("a kernel of AMD's");
    made.start(0);
    bench.entry(made.id(0, 0), dte(0x30_0000, 1));
    let parent = bench.attached(1);
    // The first, by which the unit was found.
    made.give_back(&bench, 0);
    bench.entry(made.id(0, 1), dte(0x31_0000, 2));
    let table = bench.attached(1).expect("attached");
    assert_ne!(Some(table), parent);
    assert_eq!(
        count(&bench.fake, is_nested),
        2,
        "one of them is of the function that left"
    );
    bench.entry(made.id(0, 0), [3, 0, 0, 0]);
    assert_eq!(count(&bench.fake, is_nested), 1);
    drop(made);
    bench.assert_empty("one left");
}

#[test]
fn a_unit_asks_nothing_about_a_function_that_left_the_hierarchy() {
    let bench = Bench::new(Version::E, "mode = \"hw\"\nabi = \"v-e\"\n");
    let mut made = bench.build().expect("a kernel of AMD's");
    made.start(0);
    let ids = [0, 1].map(|index| made.id(0, index));
    bench.entry(ids[0], dte(0x30_0000, 1));
    let machine = bench.hierarchy(&made.units[0]);
    let unit = Unit::Hardware(Arc::new(made.units.remove(0)));
    machine.topology.tell(unit.observer());
    let nic = machine.topology.function(0, Bdf::from_requester_id(ids[0]));
    let before = bench.fake.destroyed().len();
    machine.topology.removed(nic.expect("there"));
    let gone = bench.fake.destroyed().split_off(before);
    assert_eq!(gone.len(), 2, "{gone:?}");
    assert!(
        is_nested(&gone[0]) && is_vdevice(&gone[1]),
        "while its device is there"
    );
    made.give_back(&bench, 0);
    let asked = bench.fake.asked();
    bench.entry(ids[0], dte(0x31_0000, 1));
    let hardware = match &unit {
        Unit::Hardware(hardware) => hardware.unit().clone(),
        _ => unreachable!("it is one"),
    };
    assert_eq!((bench.fake.asked(), hardware.counts().refusals), (asked, 0));
    // The unit goes off and on, with all of its names made anew for who is there.
    hardware.reset();
    assert!(
        !hardware
            .state()
            .contains(&Bdf::from_requester_id(ids[0]).to_string())
    );
    drop((hardware, unit, machine, made));
    bench.assert_empty("one left");
}
