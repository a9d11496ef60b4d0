//! Journals of sessions, as the next daemon finds them.

use std::os::fd::AsFd;

use kvoyant_daemon::journal::{Group, Journal, Kind, read};
use kvoyant_protocol::memory::Memfd;

use crate::input::Input;

const HEADER: usize = 64;
const RECORDS: usize = 96;
const RECORD_HEADER: usize = 16;

/// Most bytes of a file of a heap, holes and all.
const FILE_MAX: usize = 1 << 32;

/// Any two files are a session's journal or an error, without a checksum and with all of them right.
///
/// # Panics
/// If what was read is more than a journal of that length can say.
pub fn run(bytes: &[u8]) {
    let mut input = Input(bytes);
    let resealed = input.u8() & 1 == 1;
    let first = usize::from(input.u16());
    let mut files = [input.bytes(first).to_vec(), input.0.to_vec()];
    if resealed {
        files.iter_mut().for_each(|file| reseal(file));
    }
    let memfds = files.each_ref().map(|bytes| memfd(bytes));
    let fds = memfds.each_ref().map(|file| file.try_clone().expect("a descriptor"));
    if let Ok(found) = read([fds[0].as_fd(), fds[1].as_fd()]) {
        assert!(found.current < 2 && !found.record.is_empty());
        let records: usize = found.sequences.values().map(Vec::len).sum();
        assert!(records + found.record.len() <= bytes.len());
        assert!(found.heaps.iter().flatten().all(|file| file.len() <= FILE_MAX));
    }
}

fn memfd(bytes: &[u8]) -> Memfd {
    let file = Memfd::create("fuzz", bytes.len()).expect("a memfd");
    if !bytes.is_empty() {
        file.map(false).expect("a map").write(0, bytes).expect("its bytes");
    }
    file
}

fn put(bytes: &mut [u8], at: usize, crc: u32) {
    bytes[at..at + 4].copy_from_slice(&crc.to_le_bytes());
}

fn word(bytes: &[u8], at: usize) -> usize {
    bytes.get(at..at + 4).and_then(|word| word.try_into().ok()).map_or(0, u32::from_le_bytes) as usize
}

/// Makes every checksum right, so that what lies behind them is reached.
fn reseal(file: &mut [u8]) {
    if file.len() < RECORDS {
        return;
    }
    put(file, 12, 0);
    let crc = crc32c::crc32c(&file[..HEADER]);
    put(file, 12, crc);
    let crc = crc32c::crc32c(&file[HEADER..HEADER + 16]);
    put(file, HEADER + 16, crc);
    let mut at = RECORDS;
    while at + RECORD_HEADER <= file.len() {
        let end = (at + RECORD_HEADER).saturating_add(word(file, at + 4)).min(file.len());
        let crc = crc32c::crc32c(&file[at..at + 8]);
        let crc = crc32c::crc32c_append(crc, &file[at + RECORD_HEADER..end]);
        put(file, at + 8, crc);
        at = end.next_multiple_of(8);
    }
}

/// A journal of two groups, and one that has been written anew.
#[must_use]
pub fn seeds() -> Vec<Vec<u8>> {
    let mut journal = Journal::create(7).expect("a journal");
    let mut all = Group::default();
    all.push(Kind::Session, &[], b"the session");
    all.push(Kind::Sequence, &3_u32.to_le_bytes(), b"a sequence");
    all.push_bytes(1, 2, 64, &[9; 40]);
    journal.begin(&all).expect("a file");
    let once = input(&journal, 1);
    let mut more = Group::default();
    more.push(Kind::Sequence, &3_u32.to_le_bytes(), b"the same sequence");
    more.push_bytes(1, 2, 80, &[8; 4]);
    journal.add(&more).expect("a group");
    let twice = input(&journal, 1);
    journal.begin(&all).expect("the other file");
    vec![once, twice, input(&journal, 0), input(&journal, 1)]
}

fn input(journal: &Journal, flags: u8) -> Vec<u8> {
    let files = journal.fds().expect("descriptors").map(|fd| {
        use std::os::unix::fs::FileExt;
        let file = std::fs::File::from(fd);
        let mut bytes = vec![0; file.metadata().expect("a length").len() as usize];
        file.read_exact_at(&mut bytes, 0).expect("its bytes");
        bytes
    });
    let mut input = vec![flags];
    input.extend_from_slice(&(files[0].len() as u16).to_le_bytes());
    files.iter().for_each(|file| input.extend_from_slice(file));
    input
}
