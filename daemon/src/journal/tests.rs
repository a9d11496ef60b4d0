use std::os::fd::AsFd;

use proptest::prelude::*;

use super::*;

fn found(journal: &Journal) -> Result<Found, JournalError> {
    let fds = journal.fds().unwrap();
    read([fds[0].as_fd(), fds[1].as_fd()])
}

fn group(records: &[(Kind, &[u8])]) -> Group {
    let mut group = Group::default();
    records.iter().for_each(|(kind, bytes)| group.push(*kind, &[], bytes));
    group
}

/// A journal with two groups.
fn sample() -> Journal {
    let mut journal = Journal::create(7).unwrap();
    let mut first = group(&[(Kind::Session, b"one")]);
    first.push(Kind::Sequence, &3_u32.to_le_bytes(), b"third");
    first.push_bytes(1, 2, 4096, &[9; 100]);
    journal.begin(&first).unwrap();
    let mut second = group(&[(Kind::Session, b"two")]);
    second.push_bytes(1, 2, 4100, &[8; 4]);
    journal.add(&second).unwrap();
    journal
}

#[test]
fn the_last_record_of_everything_counts_wherever_the_files_come() {
    let journal = sample();
    let fds = journal.fds().unwrap();
    for files in [[fds[0].as_fd(), fds[1].as_fd()], [fds[1].as_fd(), fds[0].as_fd()]] {
        let found = read(files).unwrap();
        assert_eq!((found.session, found.record.as_slice()), (7, b"two".as_slice()));
        assert_eq!(found.sequences[&3], b"third");
        let file = &found.heaps[1][2];
        assert_eq!((file.len(), file[4095], file[4096], file[4100], file[4104]), (4196, 0, 9, 8, 9));
    }
}

#[test]
fn a_group_without_its_seal_does_not_count() {
    let mut journal = sample();
    journal.files[journal.current]
        .write_all_at(&group(&[(Kind::Session, b"torn")]).0, RECORDS_AT + journal.len)
        .unwrap();
    assert_eq!(found(&journal).unwrap().record, b"two");
    // Nor does a file that was begun anew.
    let other = 1 - journal.current;
    journal.files[other].write_all_at(&header(7, 2, VERSION), 0).unwrap();
    journal.files[other].write_all_at(&group(&[(Kind::Session, b"torn")]).0, RECORDS_AT).unwrap();
    assert_eq!(found(&journal).unwrap().record, b"two");
    journal.begin(&group(&[(Kind::Session, b"three")])).unwrap();
    let found = found(&journal).unwrap();
    assert_eq!((found.record.as_slice(), found.number), (b"three".as_slice(), 2));
    assert!(found.sequences.is_empty(), "a file that is begun has the whole state");
}

#[test]
fn a_journal_that_has_grown_asks_for_the_whole_state() {
    let mut journal = Journal::create(1).unwrap();
    assert!(journal.wants_all());
    journal.begin(&group(&[(Kind::Session, &[1; 100])])).unwrap();
    assert!(!journal.wants_all());
    journal.add(&group(&[(Kind::Session, &[1; 3 << 20])])).unwrap();
    assert!(journal.wants_all());
    journal.begin(&group(&[(Kind::Session, &[1; 100])])).unwrap();
    assert!(!journal.wants_all());
}

#[test]
fn a_journal_of_another_version_is_refused_with_a_sentence() {
    for (version, word) in [(VERSION + 1, "newer"), (0, "older")] {
        let journal = sample();
        journal.files[journal.current].write_all_at(&header(7, 1, version), 0).unwrap();
        let error = found(&journal).unwrap_err();
        assert!(matches!(error, JournalError::OtherVersion { theirs } if theirs == version));
        let text = error.to_string();
        assert!(text.contains(&format!("version {version}")) && text.contains(word), "{text}");
    }
}

#[test]
fn what_is_no_journal_or_empty_is_said_so() {
    let empty = Journal::create(1).unwrap();
    assert!(matches!(found(&empty), Err(JournalError::Empty)));
    empty.files[0].write_all_at(&[1; 200], 0).unwrap();
    assert!(matches!(found(&empty), Err(JournalError::NoJournal { .. })));
}

#[test]
fn no_bit_of_what_counts_can_change_unnoticed() {
    let journal = sample();
    let file = &journal.files[journal.current];
    for at in 0..RECORDS_AT + journal.len {
        let mut was = [0];
        file.read_exact_at(&mut was, at).unwrap();
        for bit in 0..8 {
            file.write_all_at(&[was[0] ^ 1 << bit], at).unwrap();
            let found = found(&journal).map(|found| found.record);
            assert!(found.is_err(), "byte {at} bit {bit}: {found:?}");
        }
        file.write_all_at(&was, at).unwrap();
    }
    assert_eq!(found(&journal).unwrap().record, b"two");
}

proptest! {
    /// Whatever a file holds, reading it ends in a sentence.
    #[test]
    fn any_bytes_are_read_or_refused(bytes in proptest::collection::vec(any::<u8>(), 0..600), sealed in any::<u64>()) {
        let journal = sample();
        let file = &journal.files[journal.current];
        file.write_all_at(&bytes, RECORDS_AT).unwrap();
        file.write_all_at(&seal(sealed % 1000, 1), SEAL_AT).unwrap();
        let _ = found(&journal);
    }
}
