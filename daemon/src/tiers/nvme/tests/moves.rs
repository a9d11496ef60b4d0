//! What goes well, and in which order.

use super::*;

#[test]
fn pages_come_back_as_they_were_in_any_order_and_into_any_frame() {
    for engine in engines() {
        for registered in [false, true] {
            let folder = tempfile::tempdir().unwrap();
            let spill = Spill::start(&settings(folder.path(), 4, engine)).unwrap();
            let mut lane = Lane::new(&spill, 16 * MIB);
            if registered {
                spill.register(&lane.memory);
            }
            let pages = 1000;
            let slots = lane.spill_pages(pages);
            assert!(lane.wait(pages).iter().all(|ended| ended.result == Ok(())), "{engine:?}");
            // 613 and 1000 have no common divisor: every page, far from its neighbours.
            for step in 0..pages {
                let page = step * 613 % pages;
                lane.add(Direction::Read, slots[page], 1000 + step, page as u64, step as u64);
            }
            lane.submit();
            let ended = lane.wait(pages);
            assert!(ended.iter().all(|ended| ended.result == Ok(()) && ended.session == 7), "{engine:?}");
            for step in 0..pages {
                assert!(lane.holds(1000 + step, (step * 613 % pages) as u64), "{engine:?}, step {step}");
            }
            let report = &spill.report()[0];
            assert_eq!((report.reads, report.writes), (1000, 1000));
            assert_eq!(report.read_latency.iter().sum::<u64>(), 1000);
            assert_eq!(report.state, DeviceState::Serving);
            spill.forget(&lane.memory);
        }
    }
}

#[test]
fn adjacent_pages_go_in_one_operation_whether_their_frames_are_adjacent_or_not() {
    for engine in engines() {
        let folder = tempfile::tempdir().unwrap();
        let spill = Spill::start(&settings(folder.path(), 1, engine)).unwrap();
        let mut lane = Lane::new(&spill, 8 * MIB);
        spill.register(&lane.memory);
        let slots = lane.spill_pages(64);
        lane.wait(64);
        assert_eq!(spill.report()[0].write_operations, 2, "64 pages of 8 KiB are two operations of 256 KiB");
        for (at, slot) in slots.iter().enumerate().rev() {
            lane.add(Direction::Read, *slot, 100 + (at * 37) % 64, at as u64, 0);
        }
        lane.submit();
        assert!(lane.wait(64).iter().all(|ended| ended.result == Ok(())));
        assert_eq!(spill.report()[0].read_operations, 2);
        assert!((0..64).all(|at| lane.holds(100 + (at * 37) % 64, at as u64)), "{engine:?}");
    }
}

#[test]
fn reads_come_in_the_order_of_their_deadlines_and_before_writes() {
    for engine in engines() {
        let folder = tempfile::tempdir().unwrap();
        let plan = Plan { latency: Duration::from_millis(2), ..Plan::default() };
        let shallow = SpillSettings { depth: 2, write_depth: 1, ..settings(folder.path(), 1, engine) };
        let spill = with_faults(&shallow, &plan);
        let mut lane = Lane::new(&spill, 2 * MIB);
        let slots = apart(&mut lane, 80);
        lane.wait(80);
        // Sixty rewrites wait; then reads with deadlines that fall, and one that is wanted now.
        for (at, slot) in slots.iter().enumerate().skip(20) {
            lane.add(Direction::Write, *slot, at, 100 + at as u64, 0);
        }
        for (at, slot) in slots.iter().enumerate().take(19) {
            lane.add(Direction::Read, *slot, 100 + at, at as u64, 1000 - at as u64);
        }
        lane.add(Direction::Read, slots[19], 119, 19, 0);
        lane.submit();
        let ended = lane.wait(80);
        assert!(ended.iter().all(|ended| ended.result == Ok(())));
        let reads: Vec<u64> = ended.iter().map(|ended| ended.token).filter(|token| *token < 100).collect();
        let expected: Vec<u64> = std::iter::once(19).chain((0..19).rev()).collect();
        assert_eq!(reads, expected, "{engine:?}");
        let last_read = ended.iter().rposition(|ended| ended.token < 100).unwrap();
        let writes_before = ended[..last_read].iter().filter(|ended| ended.token >= 100).count();
        assert!(writes_before > 0, "writes do not starve");
        assert!(last_read < 79, "reads do not wait for all writes");
    }
}

#[test]
fn dropping_the_tier_ends_every_job_and_removes_the_area() {
    for engine in engines() {
        let folder = tempfile::tempdir().unwrap();
        let plan = Plan { latency: Duration::from_millis(5), ..Plan::default() };
        let shallow = SpillSettings { depth: 4, ..settings(folder.path(), 1, engine) };
        let spill = with_faults(&shallow, &plan);
        let path = spill.report()[0].path.clone();
        let mut lane = Lane::new(&spill, MIB);
        apart(&mut lane, 40);
        let Lane { spill: other, slots, report, bell, .. } = lane;
        drop(other);
        assert!(path.exists());
        drop(spill);
        let ended = wait_for(&report, &bell, 40);
        assert_eq!(ended.len(), 40);
        assert!(ended.iter().all(|ended| matches!(ended.result, Ok(()) | Err(PageError::Failed))));
        assert!(!path.exists());
        drop(slots);
    }
}

#[test]
fn the_twin_that_moves_nothing_ends_every_job() {
    let folder = tempfile::tempdir().unwrap();
    let make: Make = Arc::new(|_| Ok(Box::new(Noop::new()) as _));
    let spill =
        Spill::start_with(&settings(folder.path(), 1, EngineChoice::Auto), false, "noop", &make).unwrap();
    let mut lane = Lane::new(&spill, MIB);
    let slots = lane.spill_pages(64);
    assert!(lane.wait(64).iter().all(|ended| ended.result == Ok(())));
    // The frame still holds what was written.
    lane.add(Direction::Read, slots[5], 5, 5, 0);
    lane.submit();
    assert_eq!(lane.wait(1)[0].result, Ok(()));
}

#[test]
fn lanes_share_several_devices() {
    let folders = [tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap()];
    let settings = SpillSettings {
        paths: folders.iter().map(|folder| folder.path().to_owned()).collect(),
        // Enough that what is being erased is not missed.
        bytes: 12 * CHUNK_BYTES,
        ..SpillSettings::default()
    };
    let spill = Spill::start(&settings).unwrap();
    std::thread::scope(|scope| {
        for _ in 0..2 {
            scope.spawn(|| {
                let mut lane = Lane::new(&spill, 4 * MIB);
                for _ in 0..5 {
                    let slots = lane.spill_pages(200);
                    assert!(lane.wait(200).iter().all(|ended| ended.result == Ok(())));
                    for (at, slot) in slots.iter().enumerate() {
                        lane.add(Direction::Read, *slot, 256 + at, at as u64, 1);
                    }
                    lane.submit();
                    // Released while its reads are under way: they get what was written nevertheless.
                    for slot in slots {
                        lane.slots.release(slot);
                    }
                    assert!(lane.wait(200).iter().all(|ended| ended.result == Ok(())));
                    assert!((0..200).all(|at| lane.holds(256 + at, at as u64)));
                }
            });
        }
    });
    assert!(spill.report().iter().all(|report| report.writes > 0 && report.reads > 0));
}

#[test]
fn jobs_of_one_slot_keep_their_order_and_all_of_them_end() {
    for engine in engines() {
        let folder = tempfile::tempdir().unwrap();
        let spill = Spill::start(&settings(folder.path(), 1, engine)).unwrap();
        let mut lane = Lane::new(&spill, MIB);
        let slot = lane.slots.assign(0, None, 0).unwrap();
        for round in 0..200u64 {
            lane.fill(0, round);
            lane.add(Direction::Write, slot, 0, 0, 0);
            lane.add(Direction::Read, slot, 1, 1, 0);
            lane.add(Direction::Write, slot, 0, 2, 0);
            lane.add(Direction::Read, slot, 2, 3, 5);
            lane.submit();
            assert!(lane.wait(4).iter().all(|ended| ended.result == Ok(())), "{engine:?}, round {round}");
            assert!(lane.holds(1, round) && lane.holds(2, round));
        }
    }
}

#[test]
fn rings_that_poll_do_the_same() {
    for (sq_poll, io_poll) in [(true, false), (false, true), (true, true)] {
        let folder = tempfile::tempdir().unwrap();
        let polling = SpillSettings { sq_poll, io_poll, ..settings(folder.path(), 2, EngineChoice::Auto) };
        let spill = Spill::start(&polling).unwrap();
        let mut lane = Lane::new(&spill, 4 * MIB);
        spill.register(&lane.memory);
        for _ in 0..3 {
            let slots = lane.spill_pages(200);
            assert!(lane.wait(200).iter().all(|ended| ended.result == Ok(())));
            for (at, slot) in slots.iter().enumerate() {
                lane.add(Direction::Read, *slot, 256 + at, at as u64, 1);
            }
            lane.submit();
            assert!(lane.wait(200).iter().all(|ended| ended.result == Ok(())));
            assert!((0..200).all(|at| lane.holds(256 + at, at as u64)));
            for slot in slots {
                lane.slots.release(slot);
            }
            // Asleep by now.
            std::thread::sleep(Duration::from_millis(5));
        }
    }
}
