//! A guest that is paused, and goes on.

use super::*;

#[test]
fn a_pause_and_what_ends_it_ask_the_kernel_for_nothing_and_change_nothing() {
    let bench = Bench::new(Version::E, "mode = \"hw\"\nabi = \"v-e\"\n");
    let mut made = bench.build().expect("a kernel of AMD's");
    made.start(0);
    bench.entry(made.id(0, 0), dte(0x30_0000, 1));
    bench.entry(made.id(0, 1), [3, 0, 0, 0]);
    let id = made.id(0, 0);
    let (viommus, machine) = bench.machine(&mut made, 0);
    let state = || viommus.iter().map(Unit::state).collect::<Vec<_>>();
    let seen = || {
        (
            bench.fake.asked(),
            bench.fake.objects(),
            bench.space.mapped(),
            state(),
        )
    };
    let before = seen();
    assert!(before.3[0].contains("has guest tables"), "{:?}", before.3);
    for _ in 0..3 {
        // As the machine does with its devices and units, once the processors are held.
        machine.topology.pause();
        viommus.catch_up();
        assert_eq!(seen(), before, "paused");
        machine.topology.resume();
        assert_eq!(seen(), before, "it goes on");
    }
    // And it works on.
    bench.entry(id, dte(0x31_0000, 1));
    assert_eq!(count(&bench.fake, is_nested), 1);
    assert!(bench.fake.asked() > before.0);
    drop((viommus, machine, made));
    bench.assert_empty("paused and resumed");
}

#[test]
fn a_guest_that_ends_while_it_is_paused_leaves_nothing() {
    let bench = Bench::new(Version::E, "mode = \"hw\"\nabi = \"v-e\"\n");
    let mut made = bench.build().expect("a kernel of AMD's");
    made.start(0);
    bench.entry(made.id(0, 0), dte(0x30_0000, 1));
    let (viommus, machine) = bench.machine(&mut made, 0);
    machine.topology.pause();
    viommus.catch_up();
    drop((viommus, machine, made));
    bench.assert_empty("paused");
}
