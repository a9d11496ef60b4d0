//! A session's journal: what the next daemon needs to go on with it.
//!
//! Two files of one session in memory, of which one is current. It begins with a header (magic, version, number of the file among the
//! session's, checksum), then a *seal* (how many bytes of records count, checksum), then records one behind the other: kind, length, CRC-32C
//! and bytes. A group of records counts once the seal covers it, so that a daemon that is killed in the middle of a group leaves the state
//! before it. Records replace earlier ones of the same thing; when the file has grown to twice what it began with, the whole state
//! goes to the other one.
//!
//! Every byte up to where the seal ends is under a checksum, or has to be zero. What lies behind is not looked at. In every version the first 64
//! bytes are as here, so that each can say of any other which it is.
//!
//! ```text
//! 0        8        12       16       24        32            64
//! magic    version  crc      session  file no.  (zero)        seal: bytes (8) groups (8) crc (4) (zero)
//! 96: kind (4) length (4) crc (4) (zero) bytes, padded to 8 by zeros; …
//! ```

mod frames;
mod read;

use std::fs::File;
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::fs::FileExt;

use kvoyant_protocol::memory::{Memfd, MemoryError};
use thiserror::Error;

pub use frames::{FrameLog, TakenFrames};
pub use read::{Found, read};

/// What a journal begins with: `KVJOURNL`.
const MAGIC: u64 = u64::from_le_bytes(*b"KVJOURNL");

/// Version of the format and of everything that is in it: heaps are kept byte by byte, so that a change of what methods or tables keep
/// there is a new version too.
pub const VERSION: u32 = 3;

const SEAL_AT: u64 = 64;
const SEAL_BYTES: usize = 32;
const RECORDS_AT: u64 = 96;
const RECORD_HEADER: usize = 16;

/// A file that has grown by this much is never too large.
const SLACK: u64 = 1 << 20;

/// What a record is about.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// The session and its model.
    Session = 1,
    /// One sequence: its slot (4 bytes, little-endian), then what is known of it.
    Sequence = 2,
    /// Bytes of a heap's file: heap, file (4 bytes each), offset (8 bytes), then they.
    Bytes = 3,
    /// How far the session has come.
    State = 4,
    /// The last answer to a control message.
    Answer = 5,
    /// Which memory it has.
    Memory = 6,
}

impl Kind {
    fn of(word: u32) -> Option<Self> {
        const ALL: [Kind; 6] =
            [Kind::Session, Kind::Sequence, Kind::Bytes, Kind::State, Kind::Answer, Kind::Memory];
        ALL.into_iter().find(|kind| *kind as u32 == word)
    }
}

/// Why a journal cannot be used.
#[derive(Debug, Error)]
pub enum JournalError {
    /// It could not be read or written.
    #[error("its journal cannot be used: {0}")]
    Io(#[from] io::Error),
    /// There could be none.
    #[error(transparent)]
    Memory(#[from] MemoryError),
    /// Something else.
    #[error("its journal is none: it begins with {found:#018x}")]
    NoJournal {
        /// How it begins.
        found: u64,
    },
    /// A daemon of another version wrote it.
    #[error(
        "its journal has version {theirs} and this daemon reads version {VERSION}; {}",
        if *theirs > VERSION {
            "a newer daemon wrote it: start that one again, or let engines begin anew"
        } else {
            "an older daemon wrote it: engines begin anew"
        }
    )]
    OtherVersion {
        /// Its version.
        theirs: u32,
    },
    /// Nothing was ever written to it.
    #[error("its journal is empty")]
    Empty,
    /// It is not as it was written.
    #[error("its journal is damaged at byte {at}: {what}")]
    Damaged {
        /// Where.
        at: u64,
        /// What is wrong.
        what: String,
    },
}

/// Records that are to count together.
#[derive(Debug, Default)]
pub struct Group(Vec<u8>);

impl Group {
    /// Adds a record made of two parts.
    pub fn push(&mut self, kind: Kind, head: &[u8], body: &[u8]) {
        let header = self.0.len();
        let length = (head.len() + body.len()) as u32;
        self.0.extend_from_slice(&(kind as u32).to_le_bytes());
        self.0.extend_from_slice(&length.to_le_bytes());
        self.0.extend_from_slice(&[0; 8]);
        self.0.extend_from_slice(head);
        self.0.extend_from_slice(body);
        let crc = record_crc(&self.0[header..header + 8], &self.0[header + RECORD_HEADER..]);
        self.0[header + 8..header + 12].copy_from_slice(&crc.to_le_bytes());
        self.0.resize(self.0.len().next_multiple_of(8), 0);
    }

    /// Adds bytes of a heap's file. They may be so many that they take several records.
    pub fn push_bytes(&mut self, heap: u32, file: u32, offset: u64, bytes: &[u8]) {
        const MOST: usize = 1 << 26;
        for (part, bytes) in bytes.chunks(MOST).enumerate() {
            let mut head = [0; 16];
            head[..4].copy_from_slice(&heap.to_le_bytes());
            head[4..8].copy_from_slice(&file.to_le_bytes());
            head[8..].copy_from_slice(&(offset + (part * MOST) as u64).to_le_bytes());
            self.push(Kind::Bytes, &head, bytes);
        }
    }

    /// Forgets all records, and keeps their room.
    pub fn clear(&mut self) {
        self.0.clear();
    }

    /// Bytes of all records.
    #[must_use]
    pub fn len(&self) -> u64 {
        self.0.len() as u64
    }

    /// Whether there are none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }
}

fn record_crc(header: &[u8], payload: &[u8]) -> u32 {
    crc32c::crc32c_append(crc32c::crc32c(header), payload)
}

fn header(session: u64, number: u64, version: u32) -> [u8; 64] {
    let mut bytes = [0; 64];
    bytes[..8].copy_from_slice(&MAGIC.to_le_bytes());
    bytes[8..12].copy_from_slice(&version.to_le_bytes());
    bytes[16..24].copy_from_slice(&session.to_le_bytes());
    bytes[24..32].copy_from_slice(&number.to_le_bytes());
    let crc = crc32c::crc32c(&bytes);
    bytes[12..16].copy_from_slice(&crc.to_le_bytes());
    bytes
}

fn seal(bytes: u64, groups: u64) -> [u8; SEAL_BYTES] {
    let mut words = [0; SEAL_BYTES];
    words[..8].copy_from_slice(&bytes.to_le_bytes());
    words[8..16].copy_from_slice(&groups.to_le_bytes());
    let crc = crc32c::crc32c(&words[..16]);
    words[16..20].copy_from_slice(&crc.to_le_bytes());
    words
}

/// The end that writes.
#[derive(Debug)]
pub struct Journal {
    session: u64,
    files: [File; 2],
    current: usize,
    /// Number of the current file; 0: nothing was written yet.
    number: u64,
    /// Bytes of records in it.
    len: u64,
    /// Of those, in its first group.
    first: u64,
    groups: u64,
}

impl Journal {
    /// Makes the two files of a session's journal.
    ///
    /// # Errors
    /// If the system has no memory for them.
    pub fn create(session: u64) -> Result<Self, JournalError> {
        let file = || Memfd::create("kvoyant-journal", 0)?.try_clone();
        Ok(Self::over(session, [file()?, file()?], 0, 0))
    }

    /// Goes on in the files of one that was [read](fn@read), once everything has been written anew.
    #[must_use]
    pub fn over(session: u64, files: [OwnedFd; 2], current: usize, number: u64) -> Self {
        Self { session, files: files.map(File::from), current, number, len: 0, first: 0, groups: 0 }
    }

    /// Descriptors of its files.
    ///
    /// # Errors
    /// The system's.
    pub fn fds(&self) -> io::Result<[OwnedFd; 2]> {
        Ok([self.files[0].try_clone()?.into(), self.files[1].try_clone()?.into()])
    }

    /// Whether the next group is to have the whole state, and to be [written anew](Self::begin).
    #[must_use]
    pub fn wants_all(&self) -> bool {
        self.groups == 0 || self.len > 2 * self.first + SLACK
    }

    /// Nobody is to find anything in it any more.
    pub fn erase(&self) {
        for file in &self.files {
            if let Err(error) = file.set_len(0) {
                tracing::warn!("a journal cannot be erased: {error}");
            }
        }
    }

    /// Bytes of its files.
    #[must_use]
    pub fn bytes(&self) -> u64 {
        self.len
    }

    /// Adds a group. It counts once this returns.
    ///
    /// # Errors
    /// The system's: then it does not count.
    pub fn add(&mut self, group: &Group) -> Result<(), JournalError> {
        let file = &self.files[self.current];
        file.write_all_at(&group.0, RECORDS_AT + self.len)?;
        file.write_all_at(&seal(self.len + group.len(), self.groups + 1), SEAL_AT)?;
        (self.len, self.groups) = (self.len + group.len(), self.groups + 1);
        Ok(())
    }

    /// Writes a group that has the whole state, to the other file. What the current one has counts until then.
    ///
    /// # Errors
    /// The system's: then it does not count.
    pub fn begin(&mut self, group: &Group) -> Result<(), JournalError> {
        let other = 1 - self.current;
        let file = &self.files[other];
        file.set_len(0)?;
        file.write_all_at(&header(self.session, self.number + 1, VERSION), 0)?;
        file.write_all_at(&group.0, RECORDS_AT)?;
        file.write_all_at(&seal(group.len(), 1), SEAL_AT)?;
        let old = &self.files[self.current];
        (self.current, self.number) = (other, self.number + 1);
        (self.len, self.first, self.groups) = (group.len(), group.len(), 1);
        // Its memory is not needed any more; that it cannot be had back would be no harm.
        let _ = old.set_len(0);
        Ok(())
    }
}

#[cfg(test)]
mod tests;
