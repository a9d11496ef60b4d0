//! Faults on purpose: whatever call of the daemon's fails, no byte is wrong, nothing hangs, nothing leaks, and what comes next works.
//!
//! Here a seeded slice; `scripts/faults` has every call of every kind fail in turn.

use std::time::Duration;

use kvoyant_protocol::faults::Point;
use kvoyant_tests::PATIENCE;
use kvoyant_tests::faults::{CODES, Found, LOOKS, Sweep};
use kvoyant_tests::softcuda::{Machine, on_softcuda};
use kvoyant_tests::this_test;

const DAEMON: &str = env!("CARGO_BIN_EXE_kvoyantd-under-test");

#[test]
fn a_call_that_fails_harms_what_it_was_made_for_and_nothing_else() {
    let sweep = Sweep::new(DAEMON, PATIENCE, &[]).unwrap();
    let mut state = 0x5eed_u64;
    let mut next = || {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        state >> 33
    };
    let mut hits = 0;
    for point in Point::ALL {
        // The first call of a kind is mostly the start's.
        let nth = 1 + next() % 12;
        let seen = sweep.run(point, nth).unwrap_or_else(|found| panic!("{point:?} {nth}: {found:?}"));
        hits += u64::from(seen.hit);
    }
    assert!(hits >= 12, "only {hits} calls were hit");
}

#[test]
fn a_call_of_the_driver_that_fails_ends_no_daemon_but_in_words() {
    if !on_softcuda(this_test!(), &Machine::new()) {
        return;
    }
    let sweep = Sweep::on_gpu(DAEMON, PATIENCE).unwrap();
    let mut hits = 0;
    // At the start, at a registration, at answers, and at a session's end.
    for nth in [7, 120, 130, 150, 190] {
        for code in CODES {
            let seen = sweep
                .run_driver(None, nth, code)
                .unwrap_or_else(|found| panic!("call {nth} code {code}: {found:?}"));
            hits += u64::from(seen.hit);
        }
    }
    for look in LOOKS {
        let seen =
            sweep.run_driver(Some(look), 20, 999).unwrap_or_else(|found| panic!("{look} 20: {found:?}"));
        hits += u64::from(seen.hit);
    }
    assert!(hits >= 9, "only {hits} calls were hit");
    for nth in [60, 240, 400] {
        let seen = sweep.run_lost(nth).unwrap_or_else(|found| panic!("lost at call {nth}: {found:?}"));
        assert!(seen.hit && seen.error.is_some(), "lost at call {nth}: {seen:?}");
    }
}

#[test]
fn a_sweep_finds_a_wrong_byte_a_leak_and_a_hang() {
    let sweep = Sweep::new(DAEMON, PATIENCE, &[]).unwrap();
    let found = sweep.run(Point::WrongByte, 1).unwrap_err();
    assert!(matches!(found, Found::Wrong(_)), "{found:?}");
    let hasty = Sweep::new(DAEMON, Duration::from_secs(3), &[]).unwrap();
    let found = hasty.run(Point::Leak, 1).unwrap_err();
    assert!(matches!(found, Found::Leak(_)), "{found:?}");
    let found = hasty.run(Point::Hang, 1).unwrap_err();
    assert!(matches!(found, Found::Hang(_)), "{found:?}");
}
