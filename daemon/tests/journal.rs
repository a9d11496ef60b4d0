//! Journals whose heaps have holes.

use std::os::fd::AsFd;

use kvoyant_daemon::journal::{Found, Group, Journal, JournalError, Kind, read};

/// What a journal says whose heap has bytes at this offset of a file.
fn found(offset: u64) -> Result<Found, JournalError> {
    let mut journal = Journal::create(7)?;
    let mut all = Group::default();
    all.push(Kind::Session, &[], b"one");
    all.push_bytes(0, 3, offset, &[9; 8]);
    all.push_bytes(0, 3, offset + 8, &[7; 8]);
    journal.begin(&all)?;
    let fds = journal.fds()?;
    read([fds[0].as_fd(), fds[1].as_fd()])
}

#[test]
fn bytes_far_behind_all_others_are_found_and_those_beyond_any_file_are_refused() {
    let far = 1_usize << 28;
    let found_far = found(far as u64).unwrap();
    assert_eq!(found_far.heaps[0].iter().map(Vec::len).collect::<Vec<_>>(), [0, 0, 0, far + 16]);
    assert_eq!(&found_far.heaps[0][3][far - 1..far + 9], [0, 9, 9, 9, 9, 9, 9, 9, 9, 7]);
    for beyond in [1 << 32, 1 << 40, u64::MAX - 16] {
        let error = found(beyond).unwrap_err();
        assert!(matches!(error, JournalError::Damaged { .. }), "{error}");
    }
}
