//! What goes wrong, and what it costs.

use super::*;

#[test]
fn each_fault_at_each_operation_fails_that_page_only_or_is_healed() {
    const COUNT: usize = 6;
    const OTHER: u64 = 1000;
    let io = |errno: i32| move |error: PageError| matches!(error, PageError::Io { errno: found, .. } if found == errno);
    type Expected = Option<Box<dyn Fn(PageError) -> bool>>;
    let checksum =
        |error: PageError| matches!(error, PageError::Checksum { expected, found, .. } if expected != found);
    let short = |error: PageError| matches!(error, PageError::Short { done: 0, wanted: PAGE, .. });
    let never = |error: PageError| matches!(error, PageError::NeverWritten { .. });
    let cases = || -> Vec<(Kind, Fault, Expected, Expected)> {
        let some = |check: Box<dyn Fn(PageError) -> bool>| Some(check);
        vec![
            (Kind::Write, Fault::Error(libc::EIO), some(Box::new(io(libc::EIO))), some(Box::new(never))),
            (
                Kind::Write,
                Fault::Error(libc::ENOSPC),
                some(Box::new(io(libc::ENOSPC))),
                some(Box::new(never)),
            ),
            (Kind::Write, Fault::Error(libc::EINTR), None, None),
            (Kind::Write, Fault::Error(libc::EAGAIN), None, None),
            (Kind::Write, Fault::Short(4096), None, None),
            (Kind::Write, Fault::Nothing, some(Box::new(short)), some(Box::new(never))),
            (Kind::Write, Fault::Torn(4096), None, some(Box::new(checksum))),
            (Kind::Read, Fault::Error(libc::EIO), None, some(Box::new(io(libc::EIO)))),
            (Kind::Read, Fault::Error(libc::EINTR), None, None),
            (Kind::Read, Fault::Short(4096), None, None),
            (Kind::Read, Fault::Nothing, None, some(Box::new(short))),
            (Kind::Read, Fault::Torn(4096), None, some(Box::new(checksum))),
            (Kind::Read, Fault::Flip, None, some(Box::new(checksum))),
        ]
    };
    for engine in engines() {
        for nth in 0..COUNT {
            for (kind, fault, written, read) in cases() {
                let folder = tempfile::tempdir().unwrap();
                let plan = Plan { faults: vec![(kind, nth as u64, fault)], ..Plan::default() };
                let spill = with_faults(&settings(folder.path(), 1, engine), &plan);
                let mut lane = Lane::new(&spill, MIB);
                let slots = apart(&mut lane, COUNT);
                let check = |ended: &[Ended], expected: &Expected, what: &str| {
                    for (token, result) in results(ended) {
                        let right = match (expected, result) {
                            (Some(expected), Err(error)) => token == nth as u64 && expected(error),
                            (Some(_), Ok(())) => token != nth as u64,
                            (None, result) => result == Ok(()),
                        };
                        assert!(
                            right,
                            "{engine:?}, {what} of {kind:?} {fault:?} at {nth}: page {token} {result:?}"
                        );
                    }
                };
                check(&lane.wait(COUNT), &written, "write");
                for (at, slot) in slots.iter().enumerate() {
                    lane.add(Direction::Read, *slot, 32 + at, at as u64, 1 + at as u64);
                }
                // What was there before is no page, either.
                (0..COUNT).for_each(|at| lane.fill(32 + at, OTHER));
                lane.submit();
                let ended = lane.wait(COUNT);
                check(&ended, &read, "read");
                for (token, result) in results(&ended) {
                    let frame = 32 + token as usize;
                    let right = match &result {
                        Ok(()) => lane.holds(frame, token),
                        // Nothing was read.
                        Err(PageError::NeverWritten { .. }) => lane.holds(frame, OTHER),
                        Err(_) => lane.is_blank(frame),
                    };
                    assert!(right, "{engine:?}, {kind:?} {fault:?}: wrong bytes of page {token}, {result:?}");
                }
            }
        }
    }
}

#[test]
fn one_bad_page_of_an_operation_of_many_does_not_spoil_the_others() {
    for engine in engines() {
        let folder = tempfile::tempdir().unwrap();
        // The first read is that of all pages; its third page alone is the fourth.
        let faults = vec![(Kind::Read, 0, Fault::Error(libc::EIO)), (Kind::Read, 3, Fault::Error(libc::EIO))];
        let spill = with_faults(&settings(folder.path(), 1, engine), &Plan { faults, ..Plan::default() });
        let mut lane = Lane::new(&spill, MIB);
        let slots = lane.spill_pages(16);
        lane.wait(16);
        for (at, slot) in slots.iter().enumerate() {
            lane.add(Direction::Read, *slot, 32 + at, at as u64, 0);
        }
        lane.submit();
        let results = results(&lane.wait(16));
        assert_eq!(results.values().filter(|result| result.is_err()).count(), 1, "{results:?}");
        for (token, result) in results {
            assert!(result.is_err() || lane.holds(32 + token as usize, token));
        }
    }
}

#[test]
fn a_device_that_keeps_failing_gets_no_more_writes_and_is_still_read() {
    for engine in engines() {
        let folder = tempfile::tempdir().unwrap();
        // The first 20 go well.
        let faults = (20..60).map(|nth| (Kind::Write, nth, Fault::Error(libc::EIO))).collect();
        let spill = with_faults(&settings(folder.path(), 1, engine), &Plan { faults, ..Plan::default() });
        let mut lane = Lane::new(&spill, MIB);
        let good = apart(&mut lane, 20);
        assert!(lane.wait(20).iter().all(|ended| ended.result == Ok(())));
        apart(&mut lane, 20);
        assert!(lane.wait(20).iter().all(|ended| ended.result.is_err()));
        assert!(spill.is_failed());
        let bad = lane.slots.slot(good[0]);
        assert!(lane.slots.assign(0, None, 0).is_err(), "no slots for what cannot be written");
        lane.jobs.push(Job {
            direction: Direction::Write,
            slot: bad,
            memory: Arc::clone(&lane.memory),
            offset: 0,
            deadline_ns: 0,
            session: 7,
            token: 1,
            report: Arc::clone(&lane.report),
        });
        lane.submit();
        assert_eq!(lane.wait(1)[0].result, Err(PageError::Failed));
        let DeviceState::Failed(reason) = &spill.report()[0].state else { panic!("it has failed") };
        assert!(reason.contains("8 writes in a row"), "{reason}");
        lane.add(Direction::Read, good[3], 50, 3, 0);
        lane.submit();
        assert_eq!(lane.wait(1)[0].result, Ok(()));
        assert!(lane.holds(50, 3));
    }
}

#[test]
fn a_file_that_somebody_cuts_short_costs_its_pages_and_no_others() {
    for engine in engines() {
        let folder = tempfile::tempdir().unwrap();
        let spill = Spill::start(&settings(folder.path(), 1, engine)).unwrap();
        let mut lane = Lane::new(&spill, MIB);
        let slots = lane.spill_pages(16);
        lane.wait(16);
        let path = &spill.report()[0].path;
        let end = device::HEAD_BYTES + 5 * PAGE as u64 + 4096;
        OpenOptions::new().write(true).open(path).unwrap().set_len(end).unwrap();
        for (at, slot) in slots.iter().enumerate() {
            lane.add(Direction::Read, *slot, 32 + at, at as u64, 0);
        }
        lane.submit();
        for (token, result) in results(&lane.wait(16)) {
            match (token, result) {
                (0..5, result) => assert!(result == Ok(()) && lane.holds(32 + token as usize, token)),
                (5, Err(PageError::Short { done: 4096, .. }))
                | (6.., Err(PageError::Short { done: 0, .. })) => {}
                other => panic!("{engine:?}: {other:?}"),
            }
        }
        // A page that is written again is there again.
        lane.fill(0, 99);
        lane.add(Direction::Write, slots[9], 0, 9, 0);
        lane.add(Direction::Read, slots[9], 1, 10, 0);
        lane.submit();
        assert!(lane.wait(2).iter().all(|ended| ended.result == Ok(())), "the read waits for the write");
        assert!(lane.holds(1, 99));
    }
}

#[test]
fn bytes_that_somebody_changes_on_disk_are_never_reported_as_read() {
    let folder = tempfile::tempdir().unwrap();
    let spill = Spill::start(&settings(folder.path(), 1, EngineChoice::Auto)).unwrap();
    let mut lane = Lane::new(&spill, MIB);
    let slots = lane.spill_pages(2);
    lane.wait(2);
    let file = OpenOptions::new().write(true).open(&spill.report()[0].path).unwrap();
    // A stale block: page 0 where page 1 is to be.
    std::os::unix::fs::FileExt::write_all_at(&file, &noise(0), device::HEAD_BYTES + PAGE as u64).unwrap();
    file.sync_all().unwrap();
    for (at, slot) in slots.iter().enumerate() {
        lane.add(Direction::Read, *slot, 32 + at, at as u64, 0);
    }
    lane.submit();
    let results = results(&lane.wait(2));
    assert_eq!(results[&0], Ok(()));
    assert!(matches!(results[&1], Err(PageError::Checksum { .. })));
    let error = results[&1].unwrap_err().to_string();
    assert!(error.contains("checksum"), "{error}");
}

#[test]
fn slots_that_were_never_written_and_frames_outside_their_memory_are_errors() {
    for engine in engines() {
        let folder = tempfile::tempdir().unwrap();
        let spill = Spill::start(&settings(folder.path(), 1, engine)).unwrap();
        let mut lane = Lane::new(&spill, MIB);
        let slot = lane.slots.assign(0, None, 0).unwrap();
        lane.add(Direction::Read, slot, 0, 0, 0);
        lane.add(Direction::Write, slot, MIB / PAGE, 1, 0);
        lane.submit();
        let results = results(&lane.wait(2));
        assert!(matches!(results[&1], Err(PageError::Io { errno: libc::EFAULT, .. })));
        assert!(matches!(results[&0], Err(PageError::NeverWritten { .. })));
    }
}

#[test]
fn a_file_system_that_fills_up_fails_the_pages_that_do_not_fit() {
    for engine in engines() {
        let Some(tiny) = Tiny::mount(20 * MIB) else { return };
        let spill = Spill::start(&settings(tiny.0.path(), 1, engine)).unwrap();
        // Somebody takes the space away, and somebody else uses it.
        let path = &spill.report()[0].path;
        let file = OpenOptions::new().write(true).open(path).unwrap();
        file.set_len(4096).unwrap();
        file.set_len(MIB as u64 + CHUNK_BYTES).unwrap();
        std::fs::write(tiny.0.path().join("other"), vec![1; 18 * MIB]).unwrap();
        let mut lane = Lane::new(&spill, 8 * MIB);
        let pages = 512;
        let slots = lane.spill_pages(pages);
        let written = results(&lane.wait(pages));
        let failed = written.values().filter(|result| result.is_err()).count();
        assert!(failed > 0 && failed < pages, "{engine:?}: {failed}");
        assert!(written.values().all(|result| {
            matches!(result, Ok(()) | Err(PageError::Io { errno: libc::ENOSPC, .. } | PageError::Failed))
        }));
        assert!(spill.is_failed());
        for (at, slot) in slots.iter().enumerate() {
            lane.add(Direction::Read, *slot, 512 + at, at as u64, 0);
        }
        lane.submit();
        for (token, result) in results(&lane.wait(pages)) {
            assert_eq!(result.is_ok(), written[&token].is_ok(), "page {token}");
            assert!(result.is_err() || lane.holds(512 + token as usize, token));
        }
    }
}
