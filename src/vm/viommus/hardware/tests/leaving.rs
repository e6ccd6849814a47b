//! Functions that the host takes back while their guest runs.

use super::*;

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
