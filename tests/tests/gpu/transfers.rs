//! The three transfer engines on softcuda: every byte arrives, nothing beside it changes, buffers are not used twice at once, and
//! nothing is done that a card would not forgive.

use std::cell::RefCell;

use kvoyant_cuda::{Context, KernelCache, Module};
use kvoyant_daemon::device::cuda::calibrate::{CalibrateError, calibrate};
use kvoyant_daemon::device::cuda::cost::{Table, Usable};
use kvoyant_daemon::device::cuda::engines::{EngineError, EngineKind, Shape};
use kvoyant_daemon::device::cuda::measure::Effort;
use kvoyant_daemon::device::cuda::rig::{Rig, RigError, RigSizes, Stretch};
use kvoyant_daemon::device::cuda::store::{Calibration, costs};
use kvoyant_tests::softcuda::{Machine, on_softcuda};
use kvoyant_tests::this_test;
use proptest::prelude::*;
use proptest::test_runner::{Config, TestRunner};

/// What the destination holds where nothing was written to.
const UNTOUCHED: u8 = 0xa5;

const MIB: usize = 1 << 20;

fn context() -> Context {
    kvoyant_cuda::driver().unwrap().context(0).unwrap()
}

fn gather(context: &Context) -> Module {
    let folder = tempfile::tempdir().unwrap();
    KernelCache::new(folder.path()).module(context, kvoyant_kernels::cuda::source("gather").unwrap()).unwrap()
}

/// A rig and the bytes of its source, which do not repeat within any range that a test could mix up.
fn rig(gather: Option<&Module>, sizes: RigSizes) -> (Rig, Vec<u8>) {
    let rig = Rig::new(&context(), gather, Table::estimate(), sizes).unwrap();
    let mut state = 0x1234_5678_9abc_def1_u64;
    let mut words = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state.to_le_bytes()
    };
    let source: Vec<u8> = (0..sizes.source_bytes / 8).flat_map(|_| words()).collect();
    rig.write(0, &source).unwrap();
    rig.fill(UNTOUCHED).unwrap();
    (rig, source)
}

/// What a destination holds afterwards.
fn expected(before: &[u8], source: &[u8], stretches: &[Stretch]) -> Vec<u8> {
    let mut after = before.to_vec();
    for stretch in stretches {
        after[stretch.destination..][..stretch.bytes]
            .copy_from_slice(&source[stretch.source..][..stretch.bytes]);
    }
    after
}

/// Says where two buffers differ instead of printing both.
fn same(found: &[u8], expected: &[u8]) -> Result<(), String> {
    assert_eq!(found.len(), expected.len());
    match found.iter().zip(expected).position(|(a, b)| a != b) {
        None => Ok(()),
        Some(at) => Err(format!("byte {at} is {:#x} and not {:#x}", found[at], expected[at])),
    }
}

/// Runs of all lengths from overlapping sources to destinations in any order, some adjacent on one side or on both.
fn stretches(source_bytes: usize) -> impl Strategy<Value = Vec<Stretch>> {
    let bytes = prop_oneof![
        Just(1_usize),
        1_usize..40,
        Just(512),
        (1_usize..64).prop_map(|n| n * 16),
        1_usize..5_000,
        60_000_usize..200_000,
    ];
    let gap = prop_oneof![Just(0_usize), 1_usize..64, Just(512)];
    let run = (bytes, gap, 0_usize..usize::MAX, any::<bool>());
    let runs = proptest::collection::vec(run, 0..120);
    runs.prop_map(move |runs| {
        let (mut destination, mut follows) = (0, 0);
        let mut all = Vec::new();
        for (bytes, gap, place, follow) in runs {
            let source = if follow && follows + bytes <= source_bytes {
                follows
            } else {
                place % (source_bytes - bytes)
            };
            destination += gap;
            all.push(Stretch { source, destination, bytes });
            destination += bytes;
            follows = source + bytes;
        }
        all
    })
    .prop_shuffle()
}

#[test]
fn every_engine_brings_random_runs_byte_by_byte_and_touches_nothing_else() {
    if !on_softcuda(this_test!(), &Machine::new()) {
        return;
    }
    const SOURCE: usize = MIB;
    let gather = gather(&context());
    let sizes = RigSizes { source_bytes: SOURCE, destination_bytes: 26 * MIB, registrations: 1 };
    let (rig, source) = rig(Some(&gather), sizes);
    let rig = RefCell::new(rig);
    let config = Config { cases: 24, failure_persistence: None, ..Config::default() };
    TestRunner::new(config)
        .run(&stretches(SOURCE), |stretches| {
            let end = stretches.iter().map(|run| run.destination + run.bytes).max().unwrap_or(0);
            let before = vec![UNTOUCHED; end + 64];
            let expected = expected(&before, &source, &stretches);
            let mut rig = rig.borrow_mut();
            for engine in [None, Some(EngineKind::Dma), Some(EngineKind::Staged), Some(EngineKind::Zerocopy)]
            {
                rig.fill(UNTOUCHED).unwrap();
                rig.queue(engine, &stretches).unwrap();
                let found = rig.read(0, before.len()).unwrap();
                prop_assert_eq!(same(&found, &expected), Ok(()), "{:?}", engine);
            }
            Ok(())
        })
        .unwrap();
}

#[test]
fn more_runs_than_a_batch_and_more_bytes_than_all_buffers_arrive_too() {
    if !on_softcuda(this_test!(), &Machine::new()) {
        return;
    }
    let gather = gather(&context());
    let sizes = RigSizes { source_bytes: 8 * MIB, destination_bytes: 8 * MIB, registrations: 1 };
    let (mut rig, source) = rig(Some(&gather), sizes);
    let before = vec![UNTOUCHED; 8 * MIB];
    // Every run's neighbour in the destination comes from elsewhere, so that none coalesce.
    let scattered = |runs: usize, bytes: usize, apart: usize| -> Vec<Stretch> {
        let source = |run: usize| run * 7919 % runs * bytes;
        (0..runs).map(|run| Stretch { source: source(run), destination: run * apart, bytes }).collect()
    };
    let requests = [
        ("many short rows side by side", scattered(10_000, 700, 700)),
        ("many single bytes with gaps", scattered(9_000, 1, 2)),
        ("a few long pages", scattered(60, 100_003, 131_072)),
        ("one run over all", vec![Stretch { source: 3, destination: 5, bytes: 8 * MIB - 8 }]),
    ];
    for (what, stretches) in requests {
        let expected = expected(&before, &source, &stretches);
        for engine in EngineKind::ALL {
            rig.fill(UNTOUCHED).unwrap();
            rig.queue(Some(engine), &stretches).unwrap();
            let found = rig.read(0, before.len()).unwrap();
            same(&found, &expected).unwrap_or_else(|error| panic!("{what}, {engine}: {error}"));
        }
    }
}

/// The link is slow, so that copies pile up: an engine that filled a buffer before it was read would bring wrong bytes.
#[test]
fn requests_that_are_queued_behind_one_another_keep_their_bytes_and_their_order() {
    let machine = Machine::new().with("SOFTCUDA_GBPS", "0.5");
    if !on_softcuda(this_test!(), &machine) {
        return;
    }
    const REQUEST: usize = 3 * MIB / 2;
    let gather = gather(&context());
    let sizes = RigSizes { source_bytes: 16 * MIB, destination_bytes: 16 * MIB, registrations: 1 };
    let (mut rig, source) = rig(Some(&gather), sizes);
    for engine in EngineKind::ALL {
        rig.fill(UNTOUCHED).unwrap();
        let mut expected_now = vec![UNTOUCHED; 16 * MIB];
        for turn in 0..12 {
            // Runs of 4 KiB; each request overwrites the second half of the one before.
            let stretches: Vec<_> = (0..REQUEST / 4096)
                .map(|run| Stretch {
                    source: (run * 37 + turn * 911) % 4096 * 4096,
                    destination: turn * REQUEST / 2 + run * 4096,
                    bytes: 4096,
                })
                .collect();
            rig.queue(Some(engine), &stretches).unwrap();
            expected_now = expected(&expected_now, &source, &stretches);
        }
        let found = rig.read(0, expected_now.len()).unwrap();
        same(&found, &expected_now).unwrap_or_else(|error| panic!("{engine}: {error}"));
    }
}

/// A copy across two registrations is an error to the driver even where their memory is adjacent; softcuda says so.
#[test]
fn runs_that_meet_where_registrations_do_are_copied_apart() {
    if !on_softcuda(this_test!(), &Machine::new()) {
        return;
    }
    let gather = gather(&context());
    let sizes = RigSizes { source_bytes: MIB, destination_bytes: MIB, registrations: 4 };
    let (mut rig, source) = rig(Some(&gather), sizes);
    let stretches: Vec<_> = (0..64)
        .map(|run| Stretch { source: run * 16_384, destination: run * 16_384, bytes: 16_384 })
        .collect();
    for engine in EngineKind::ALL {
        rig.fill(UNTOUCHED).unwrap();
        rig.queue(Some(engine), &stretches).unwrap();
        same(&rig.read(0, MIB).unwrap(), &source).unwrap_or_else(|error| panic!("{engine}: {error}"));
    }
    let across = [Stretch { source: MIB / 4 - 100, destination: 0, bytes: 200 }];
    assert_eq!(rig.queue(None, &across).unwrap(), EngineKind::Staged, "only the processor may read across");
    same(&rig.read(0, 200).unwrap(), &source[MIB / 4 - 100..][..200]).unwrap();
}

#[test]
fn memory_that_is_not_registered_goes_by_way_of_the_processor() {
    if !on_softcuda(this_test!(), &Machine::new()) {
        return;
    }
    let gather = gather(&context());
    let sizes = RigSizes { source_bytes: MIB, destination_bytes: 2 * MIB, registrations: 0 };
    let (mut rig, source) = rig(Some(&gather), sizes);
    let stretches = [Stretch { source: 0, destination: 100, bytes: MIB }];
    for engine in [EngineKind::Dma, EngineKind::Zerocopy] {
        let refused = rig.queue(Some(engine), &stretches).unwrap_err();
        let unregistered = |error: &RigError| matches!(error, RigError::Engine(EngineError::Unregistered { engine: named, bytes: MIB, .. }) if *named == engine);
        assert!(unregistered(&refused), "{refused}");
    }
    assert_eq!(rig.queue(None, &stretches).unwrap(), EngineKind::Staged);
    same(&rig.read(100, MIB).unwrap(), &source).unwrap();
}

#[test]
fn without_kernels_there_is_no_zerocopy_and_nothing_is_given_to_it() {
    if !on_softcuda(this_test!(), &Machine::new()) {
        return;
    }
    let sizes = RigSizes { source_bytes: MIB, destination_bytes: 2 * MIB, registrations: 1 };
    let (mut rig, source) = rig(None, sizes);
    // What the estimate would give to the kernel if there were one.
    let rows: Vec<_> = (0..1000)
        .map(|row| Stretch { source: row * 7 % 1000 * 512, destination: row * 1024, bytes: 512 })
        .collect();
    let shape = Shape { runs: 1000, bytes: 512_000, ranges: 1000, registered: true };
    let with_kernel = Usable { registered: true, kernel: true };
    assert_eq!(Table::estimate().pick(&shape, with_kernel), EngineKind::Zerocopy);
    assert_ne!(rig.queue(None, &rows).unwrap(), EngineKind::Zerocopy);
    let expected = expected(&vec![UNTOUCHED; MIB], &source, &rows);
    same(&rig.read(0, MIB).unwrap(), &expected).unwrap();
    assert!(!rig.engines().has(EngineKind::Zerocopy));
    let refused = rig.queue(Some(EngineKind::Zerocopy), &rows).unwrap_err();
    assert!(matches!(refused, RigError::Engine(EngineError::Missing(EngineKind::Zerocopy))), "{refused}");
}

#[test]
fn ranges_outside_of_a_rig_and_destinations_that_overlap_are_refused() {
    if !on_softcuda(this_test!(), &Machine::new()) {
        return;
    }
    let sizes = RigSizes { source_bytes: MIB, destination_bytes: 2 * MIB, registrations: 1 };
    let (mut rig, _) = rig(None, sizes);
    let run = |source, destination, bytes| Stretch { source, destination, bytes };
    for bad in [run(0, 2 * MIB - 1, 2), run(0, usize::MAX, 2), run(0, 0, usize::MAX), run(MIB - 1, 0, 2)] {
        assert!(rig.queue(None, &[bad]).is_err(), "{bad:?}");
    }
    let overlap = [run(0, 0, 100), run(0, 200, 1), run(0, 99, 100)];
    assert!(matches!(rig.queue(None, &overlap), Err(RigError::Destination { offset: 99, .. })));
    assert!(rig.read(2 * MIB - 1, 2).is_err());
    assert_eq!(rig.read(0, 300).unwrap(), vec![UNTOUCHED; 300], "nothing of what was refused was copied");
}

/// The link is shaped: no measurement can be faster than it.
#[test]
fn a_calibration_measures_every_engine_and_is_read_back_for_this_card_and_driver() {
    let machine = Machine::new().with("SOFTCUDA_GBPS", "2");
    if !on_softcuda(this_test!(), &machine) {
        return;
    }
    let state = tempfile::tempdir().unwrap();
    let state = state.path();
    let absent = calibrate(77, state, &Effort::quick()).unwrap_err();
    assert!(matches!(absent, CalibrateError::Device { ordinal: 77, .. }), "{absent}");

    let found = calibrate(0, state, &Effort::quick()).unwrap();
    assert!(found.without_kernel.is_none(), "{:?}", found.without_kernel);
    let calibration = found.calibration;
    calibration.costs.check().unwrap();
    assert!(calibration.quick);
    assert!(calibration.costs.h2d_gbps <= 2.01 && calibration.costs.d2h_gbps <= 2.01, "{calibration:?}");
    for engine in [EngineKind::Dma, EngineKind::Staged] {
        let shape = Shape { runs: 16, bytes: 16 << 20, ranges: 1, registered: true };
        let us = calibration.costs.us(engine, &shape);
        assert!(us >= (16 << 20) as f64 / 2010.0, "{engine} is faster than the link: {us} µs");
    }
    assert!(calibration.costs.of(EngineKind::Zerocopy).is_some());

    calibration.save(state).unwrap();
    let of = calibration.of.clone();
    assert_eq!(Calibration::load(state, &of).unwrap().as_ref(), Some(&calibration));
    assert_eq!(costs(state, &of), calibration.costs);
    let mut newer = of;
    newer.driver += 10;
    assert_eq!(costs(state, &newer), Table::estimate(), "another driver's costs are not these");
}
