//! What the tests on softcuda stand on: a test that runs itself again on a machine of its own.

use kvoyant_cuda::{ErrorKind, EventKind, Priority, driver};
use kvoyant_tests::softcuda::{Machine, in_child, is_child, on_softcuda};
use kvoyant_tests::this_test;

#[test]
fn a_test_runs_on_a_machine_with_softcuda() {
    let machine = Machine::new().with("SOFTCUDA_DEVICES", "2").with("SOFTCUDA_MEMORY", "1GiB");
    if !on_softcuda(this_test!(), &machine) {
        assert_eq!(machine.not_implemented(), "");
        return;
    }
    let devices = driver().expect("a driver").devices().expect("devices");
    assert_eq!(devices.len(), 2);
    assert_eq!((devices[1].name.as_str(), devices[1].total_bytes), ("softcuda", 1 << 30));
    assert_ne!(devices[0].uuid, devices[1].uuid);
    let context = driver().expect("a driver").context(1).expect("a context");
    let stream = context.stream(Priority::High).expect("a stream");
    let event = context.event(EventKind::Interprocess).expect("an event");
    event.record(&stream).expect("a recording");
    event.synchronize().expect("its end");
    let before = context.memory().expect("memory").0;
    let slab = context.alloc(3 << 20).expect("a slab");
    assert_eq!(before - context.memory().expect("memory").0, slab.len() as u64);
    slab.ipc_handle().expect("a handle");
}

#[test]
fn faults_strike_processes_that_run_already() {
    let machine = Machine::new();
    if !is_child() {
        machine.set_faults("oom after=1 count=1");
    }
    if !on_softcuda(this_test!(), &machine) {
        return;
    }
    let context = driver().expect("a driver").context(0).expect("a context");
    let alloc = || context.alloc(2 << 20).map(drop).map_err(|error| error.kind());
    assert_eq!([alloc(), alloc(), alloc()], [Ok(()), Err(ErrorKind::OutOfMemory), Ok(())]);
}

#[test]
fn a_child_that_fails_is_told_from_one_that_does_not() {
    let test = this_test!();
    if is_child() {
        assert!(std::env::var_os("SHALL_FAIL").is_none(), "as it was told");
        return;
    }
    let machine = Machine::new();
    assert!(in_child(test, &machine, &[]).status.success());
    let failed = in_child(test, &machine, &[("SHALL_FAIL", "1")]);
    assert!(!failed.status.success() && failed.words.contains("as it was told"), "{}", failed.words);
}
