//! What is found where an area is to be, and what is left there.

use super::*;

#[test]
fn what_a_session_leaves_is_erased_before_anybody_else_gets_it() {
    for engine in engines() {
        let folder = tempfile::tempdir().unwrap();
        let spill = Spill::start(&settings(folder.path(), 1, engine)).unwrap();
        let mut lane = Lane::new(&spill, MIB);
        lane.spill_pages(16);
        lane.wait(16);
        let path = spill.report()[0].path.clone();
        let read = || {
            let mut bytes = vec![0; 16 * PAGE];
            let file = std::fs::File::open(&path).unwrap();
            std::os::unix::fs::FileExt::read_exact_at(&file, &mut bytes, device::HEAD_BYTES).unwrap();
            bytes
        };
        assert!(read().iter().any(|byte| *byte != 0));
        let before = std::fs::metadata(&path).unwrap().blocks();
        drop(lane);
        let until = std::time::Instant::now() + Duration::from_secs(60);
        while spill.report()[0].used_bytes > 0 {
            assert!(std::time::Instant::now() < until, "the chunk does not come back");
            std::thread::sleep(Duration::from_millis(1));
        }
        assert!(read().iter().all(|byte| *byte == 0), "{engine:?}");
        assert_eq!(std::fs::metadata(&path).unwrap().blocks(), before, "its space stays set aside");
    }
}

#[test]
fn an_area_belongs_to_one_daemon_and_only_its_owner_may_read_it() {
    let folder = tempfile::tempdir().unwrap();
    let settings = settings(folder.path(), 1, EngineChoice::Psync);
    let first = Spill::start(&settings).unwrap();
    let path = first.report()[0].path.clone();
    assert_eq!(std::fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
    match Spill::start(&settings) {
        Err(SpillError::Busy { path: busy }) => assert_eq!(busy, path),
        other => panic!("{other:?}"),
    }
    assert!(path.exists(), "the loser leaves the winner's area alone");
    drop(first);
    drop(Spill::start(&settings).unwrap());
}

#[test]
fn what_is_not_ours_is_refused_and_left_as_it_is() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("letters");
    std::fs::write(&file, "Dear Sir").unwrap();
    let refused = Spill::start(&settings(&file, 1, EngineChoice::Psync)).unwrap_err();
    assert!(matches!(refused, SpillError::Foreign { .. }), "{refused:?}");
    assert!(refused.to_string().contains("rm"), "{refused}");
    assert_eq!(std::fs::read(&file).unwrap(), b"Dear Sir");
    std::fs::write(&file, [0; 9000]).unwrap();
    assert!(matches!(
        Spill::start(&settings(&file, 1, EngineChoice::Psync)),
        Err(SpillError::Foreign { .. })
    ));
    let link = folder.path().join("kvoyant-spill-0");
    std::os::unix::fs::symlink(&file, &link).unwrap();
    assert!(matches!(
        Spill::start(&settings(folder.path(), 1, EngineChoice::Psync)),
        Err(SpillError::Io { what: "open", .. })
    ));
    assert!(matches!(
        Spill::start(&settings(Path::new("/dev/null"), 1, EngineChoice::Psync)),
        Err(SpillError::Unusable { .. } | SpillError::Io { .. })
    ));
    let small = SpillSettings { bytes: 100, ..settings(&folder.path().join("new"), 1, EngineChoice::Psync) };
    assert!(matches!(Spill::start(&small), Err(SpillError::TooSmall { bytes: 100, .. })));
    assert!(matches!(Spill::start(&SpillSettings::default()), Err(SpillError::NoPaths)));
}

#[test]
fn an_area_that_a_killed_daemon_left_is_taken_over_empty() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("kvoyant-spill-0");
    let mut left = superblock::encode(1 << 30, superblock::AreaId::fresh().unwrap());
    left.resize(3 * MIB, 0x55);
    std::fs::write(&path, left).unwrap();
    let spill = Spill::start(&settings(folder.path(), 2, EngineChoice::Auto)).unwrap();
    assert_eq!(spill.report()[0].used_bytes, 0);
    let bytes = std::fs::read(&path).unwrap();
    assert_eq!(bytes.len(), MIB + 2 * CHUNK_BYTES as usize);
    assert!(bytes[4096..].iter().all(|byte| *byte == 0), "nothing of the old text is there");
}

#[test]
fn an_area_that_does_not_fit_is_refused_with_what_there_is() {
    let Some(tiny) = Tiny::mount(24 * MIB) else { return };
    match Spill::start(&settings(tiny.0.path(), 4, EngineChoice::Psync)) {
        Err(SpillError::NoSpace { wanted, free, .. }) => {
            assert_eq!(wanted, MIB as u64 + 4 * CHUNK_BYTES);
            assert!(free <= 24 * MIB as u64, "{free}");
        }
        other => panic!("{other:?}"),
    }
    assert_eq!(std::fs::read_dir(tiny.0.path()).unwrap().count(), 0, "nothing is left behind");
    drop(Spill::start(&settings(tiny.0.path(), 1, EngineChoice::Auto)).unwrap());
}

#[test]
fn without_io_uring_threads_take_over_or_the_reason_is_said() {
    let folder = tempfile::tempdir().unwrap();
    let refused: Make = Arc::new(|_| Err(io::Error::from_raw_os_error(libc::EPERM)));
    let settings = settings(folder.path(), 1, EngineChoice::Uring);
    let error = Spill::start_with(&settings, false, "io_uring", &refused).unwrap_err();
    assert!(error.to_string().contains("psync works everywhere"), "{error}");
    assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 0);
    let spill = Spill::start_with(&settings, false, "psync", &or_threads(refused)).unwrap();
    assert_eq!(spill.report()[0].engine, "psync");
}

/// A block device over a file, detached at the end; `None` where we may not make one.
struct Loop(String, #[expect(dead_code, reason = "it holds the file")] TempDir);

impl Loop {
    fn attach(bytes: usize) -> Option<Self> {
        let folder = tempfile::tempdir().unwrap();
        let image = folder.path().join("image");
        std::fs::File::create(&image).unwrap().set_len(bytes as u64).unwrap();
        match std::process::Command::new("losetup").args(["--find", "--show"]).arg(&image).output() {
            Ok(output) if output.status.success() => {
                Some(Self(String::from_utf8(output.stdout).unwrap().trim().to_owned(), folder))
            }
            other => {
                eprintln!("SKIPPED: no block device could be made: {other:?}");
                None
            }
        }
    }
}

impl Drop for Loop {
    fn drop(&mut self) {
        let _ = std::process::Command::new("losetup").args(["--detach", &self.0]).status();
    }
}

#[test]
fn a_block_device_is_used_whole_and_left_without_a_trace() {
    for engine in engines() {
        let Some(device) = Loop::attach(40 * MIB) else { return };
        let settings = SpillSettings { bytes: 0, ..settings(Path::new(&device.0), 1, engine) };
        let spill = Spill::start(&settings).unwrap();
        assert_eq!(spill.report()[0].total_bytes, 2 * CHUNK_BYTES);
        assert!(matches!(Spill::start(&settings), Err(SpillError::Busy { .. })));
        let mut lane = Lane::new(&spill, MIB);
        let slots = lane.spill_pages(32);
        assert!(lane.wait(32).iter().all(|ended| ended.result == Ok(())));
        for (at, slot) in slots.iter().enumerate() {
            lane.add(Direction::Read, *slot, 64 + at, at as u64, 0);
        }
        lane.submit();
        assert!(lane.wait(32).iter().all(|ended| ended.result == Ok(())));
        assert!((0..32).all(|at| lane.holds(64 + at, at as u64)), "{engine:?}");
        drop(lane);
        drop(spill);
        let left = std::fs::read(&device.0).unwrap();
        assert_eq!(left.len(), 40 * MIB);
        assert!(left.iter().all(|byte| *byte == 0), "{engine:?}");
        drop(Spill::start(&settings).unwrap());
    }
}

#[test]
fn a_block_device_with_a_signature_anywhere_in_its_ends_is_refused() {
    for at in [0, 64 << 10, 40 * MIB as u64 - 512] {
        let Some(device) = Loop::attach(40 * MIB) else { return };
        let file = OpenOptions::new().write(true).open(&device.0).unwrap();
        std::os::unix::fs::FileExt::write_all_at(&file, b"somebody's", at).unwrap();
        file.sync_all().unwrap();
        drop(file);
        let settings = SpillSettings { bytes: 0, ..settings(Path::new(&device.0), 1, EngineChoice::Psync) };
        let refused = Spill::start(&settings).unwrap_err();
        assert!(matches!(refused, SpillError::Foreign { .. }), "{at}: {refused:?}");
        assert!(refused.to_string().contains("wipefs"), "{refused}");
        let bytes = std::fs::read(&device.0).unwrap();
        assert_eq!(&bytes[at as usize..at as usize + 10], b"somebody's");
    }
}
