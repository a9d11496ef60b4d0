//! Reading a journal: everything is checked before anything counts.

use std::collections::BTreeMap;
use std::fs::File;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::fs::FileExt;

use super::{
    JournalError, Kind, MAGIC, RECORD_HEADER, RECORDS_AT, SEAL_AT, SEAL_BYTES, VERSION, header, record_crc,
    seal,
};

/// Most heaps that a session has, files that a heap has, and bytes that such a file has: a file is as large as its largest region, a page
/// table.
const HEAPS_MAX: u32 = 2;
const FILES_MAX: u32 = 1 << 20;
const FILE_BYTES_MAX: u64 = 1 << 32;

/// What a journal says.
#[derive(Debug, Default)]
pub struct Found {
    /// The session's number.
    pub session: u64,
    /// Which of the two files it was in.
    pub current: usize,
    /// That file's number.
    pub number: u64,
    /// The last record of the session.
    pub record: Vec<u8>,
    /// The last record of how far it has come.
    pub state: Vec<u8>,
    /// The last record of an answer to a control message.
    pub answer: Vec<u8>,
    /// The last record of its memory.
    pub memory: Vec<u8>,
    /// The last record of each sequence, by slot. Those that were closed since are among them.
    pub sequences: BTreeMap<u32, Vec<u8>>,
    /// Bytes of each heap's files, as far as they were ever written: `[heap][file]`.
    pub heaps: [Vec<Vec<u8>>; 2],
}

fn damaged(at: u64, what: &str) -> JournalError {
    JournalError::Damaged { at, what: what.to_owned() }
}

fn word(bytes: &[u8], at: usize) -> u32 {
    bytes.get(at..at + 4).and_then(|bytes| bytes.try_into().ok()).map_or(0, u32::from_le_bytes)
}

fn long(bytes: &[u8], at: usize) -> u64 {
    bytes.get(at..at + 8).and_then(|bytes| bytes.try_into().ok()).map_or(0, u64::from_le_bytes)
}

/// Whether a file is a journal, and which session's; nothing else of it is looked at.
///
/// # Errors
/// What it is instead.
fn look(file: &File) -> Result<(u64, u64), JournalError> {
    if file.metadata()?.len() < RECORDS_AT {
        return Err(JournalError::Empty);
    }
    let mut bytes = [0; 64];
    file.read_exact_at(&mut bytes, 0)?;
    let found = long(&bytes, 0);
    if found != MAGIC {
        return Err(JournalError::NoJournal { found });
    }
    let (session, number, version) = (long(&bytes, 16), long(&bytes, 24), word(&bytes, 8));
    if bytes != header(session, number, version) {
        return Err(damaged(0, "the header's checksum is wrong"));
    }
    if version != VERSION {
        return Err(JournalError::OtherVersion { theirs: version });
    }
    Ok((session, number))
}

/// Reads a session's journal from its two files, in any order. The file that was begun last counts.
///
/// # Errors
/// [`JournalError::OtherVersion`] if another version wrote it, [`JournalError::Damaged`] if anything of it is not as it was written.
pub fn read(files: [BorrowedFd<'_>; 2]) -> Result<Found, JournalError> {
    let file = |fd: BorrowedFd<'_>| Ok::<_, JournalError>(File::from(fd.try_clone_to_owned()?));
    let files = [file(files[0].as_fd())?, file(files[1].as_fd())?];
    let mut best: Option<(u64, u64, usize)> = None;
    for (index, file) in files.iter().enumerate() {
        match look(file) {
            Ok((session, number)) => {
                // One that was begun and has no seal yet does not count.
                let mut words = [0; SEAL_BYTES];
                file.read_exact_at(&mut words, SEAL_AT)?;
                if words != [0; SEAL_BYTES] && best.is_none_or(|(_, known, _)| known < number) {
                    best = Some((session, number, index));
                }
            }
            Err(JournalError::Empty) => {}
            Err(error) => return Err(error),
        }
    }
    let Some((session, number, current)) = best else { return Err(JournalError::Empty) };
    let mut found = Found { session, current, number, ..Found::default() };
    read_records(&files[current], &mut found)?;
    Ok(found)
}

fn read_records(file: &File, found: &mut Found) -> Result<(), JournalError> {
    let mut words = [0; SEAL_BYTES];
    file.read_exact_at(&mut words, SEAL_AT)?;
    let (sealed, groups) = (long(&words, 0), long(&words, 8));
    if words != seal(sealed, groups) {
        return Err(damaged(SEAL_AT, "the seal's checksum is wrong"));
    }
    if sealed > file.metadata()?.len().saturating_sub(RECORDS_AT) {
        return Err(damaged(SEAL_AT, "it is shorter than its seal says"));
    }
    let mut at = 0;
    let mut payload = Vec::new();
    let mut ends = [Vec::new(), Vec::new()];
    while at < sealed {
        let here = RECORDS_AT + at;
        let mut head = [0; RECORD_HEADER];
        if sealed - at < RECORD_HEADER as u64 {
            return Err(damaged(here, "a record ends too early"));
        }
        file.read_exact_at(&mut head, here)?;
        let length = u64::from(word(&head, 4));
        let whole = (RECORD_HEADER as u64 + length).next_multiple_of(8);
        if whole > sealed - at {
            return Err(damaged(here, "a record is longer than the journal"));
        }
        payload.clear();
        payload.resize(whole as usize - RECORD_HEADER, 0);
        file.read_exact_at(&mut payload, here + RECORD_HEADER as u64)?;
        let padding = payload.split_off(length as usize);
        if record_crc(&head[..8], &payload) != word(&head, 8) {
            return Err(damaged(here, "a record's checksum is wrong"));
        }
        if word(&head, 12) != 0 || padding.iter().any(|byte| *byte != 0) {
            return Err(damaged(here, "a record has something where nothing is"));
        }
        let kind = Kind::of(word(&head, 0)).ok_or_else(|| damaged(here, "a record is of no known kind"))?;
        take(kind, &payload, here, found, &mut ends)?;
        at += whole;
    }
    if found.record.is_empty() {
        return Err(damaged(RECORDS_AT, "the session is missing"));
    }
    for (content, end) in found.heaps.iter_mut().flatten().zip(ends.iter().flatten()) {
        content.truncate(*end);
    }
    Ok(())
}

/// Makes room behind a file's bytes. What was never written takes address space, and memory only where it is moved.
fn grow(content: &mut Vec<u8>, end: usize) -> Result<(), JournalError> {
    if content.len() < end {
        // By half as much again at least, so that many records one behind the other are not moved each time.
        let len = end.max(content.len() + content.len() / 2);
        // Asked for first, because what is zeroed at once cannot be refused.
        let refused = |_| JournalError::Io(std::io::ErrorKind::OutOfMemory.into());
        let mut room = Vec::<u8>::new();
        room.try_reserve_exact(len).map_err(refused)?;
        drop(std::hint::black_box(room));
        let mut grown = vec![0; len];
        grown[..content.len()].copy_from_slice(content);
        *content = grown;
    }
    Ok(())
}

/// Takes a record in. `ends` is how far each file of a heap was written.
fn take(
    kind: Kind,
    payload: &[u8],
    at: u64,
    found: &mut Found,
    ends: &mut [Vec<usize>; 2],
) -> Result<(), JournalError> {
    match kind {
        Kind::Session => found.record = payload.to_vec(),
        Kind::State => found.state = payload.to_vec(),
        Kind::Answer => found.answer = payload.to_vec(),
        Kind::Memory => found.memory = payload.to_vec(),
        Kind::Sequence => {
            let Some((slot, rest)) = payload.split_at_checked(4) else {
                return Err(damaged(at, "a sequence's record is too short"));
            };
            found.sequences.insert(word(slot, 0), rest.to_vec());
        }
        Kind::Bytes => {
            let Some((head, bytes)) = payload.split_at_checked(16) else {
                return Err(damaged(at, "a heap's record is too short"));
            };
            let (heap, file, offset) = (word(head, 0), word(head, 4), long(head, 8));
            let end = offset.checked_add(bytes.len() as u64).filter(|end| *end <= FILE_BYTES_MAX);
            let (true, true, Some(end)) = (heap < HEAPS_MAX, file < FILES_MAX, end) else {
                return Err(damaged(at, "bytes of a heap lie outside any"));
            };
            let (files, ends) = (&mut found.heaps[heap as usize], &mut ends[heap as usize]);
            let (file, offset, end) = (file as usize, offset as usize, end as usize);
            if files.len() <= file {
                files.resize_with(file + 1, Vec::new);
                ends.resize(file + 1, 0);
            }
            grow(&mut files[file], end)?;
            files[file][offset..end].copy_from_slice(bytes);
            ends[file] = ends[file].max(end);
        }
    }
    Ok(())
}
