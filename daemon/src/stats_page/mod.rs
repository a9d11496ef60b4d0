//! The stats page: the daemon's status twice a second, in memory that others may read without asking it.
//!
//! `kvoyant top` redraws for as long as somebody watches, and a daemon that is busy should not notice. So the status lies in a POSIX shared
//! memory object whose name follows from the admin socket's path ([`name_of`]), written whether or not anybody looks. It has two slots,
//! written in turns: a reader takes the newer one whose checksum is right, so that it never waits for the writer, nor the writer for it.
//!
//! ```text
//! 0: slot 0    SLOT_BYTES: slot 1
//! slot: magic (8) version (4) bytes (4) number (8) written, s since 1970 (8) boot id (8) crc32c of head and body (4) (zero) (4)
//!       then the body: a StatusReport in JSON
//! ```
//!
//! The daemon that writes a page has it locked (flock), so that another one can tell pages that dead ones have left and remove them ([`sweep`]).
//! Readers copy the object's bytes out of its file and never map it, so nobody can make them fault by cutting it short. Whoever may
//! connect to the admin socket by its folder's group may read it; where allow-lists say who may, the daemon's user and root alone.
//!
//! | room | what lives there |
//! |---|---|
//! | `write` | the daemon's end |
//! | `read` | the other one |

mod read;
#[cfg(test)]
mod tests;
mod write;

use std::path::{Path, PathBuf};

pub use read::{PageError, read};
pub use write::{StatsPage, keep, sweep};

/// What a slot begins with: `KVSTATS1`.
const MAGIC: u64 = u64::from_le_bytes(*b"KVSTATS1");

/// Of the format.
const VERSION: u32 = 1;

/// Of a slot. Memory that was never written to is none, so that a page takes what its status does.
const SLOT_BYTES: u64 = 4 << 20;

/// What stands before a slot's body.
const HEAD_BYTES: usize = 48;

/// How the names of all pages begin; the rest is a hash of the admin socket's path.
const PREFIX: &str = "kvoyant-stats-";

/// A page that is older was left behind by a daemon that stands still or is dead: readers ask the socket which, and what sweeps old pages
/// asks for the lock on it.
const OLD_S: u64 = 5;

/// Where POSIX shared memory is, on Linux.
const FOLDER: &str = "/dev/shm";

/// What a slot says of its body.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Head {
    /// Bytes of the body.
    bytes: u32,
    /// Of all that were written.
    number: u64,
    /// When, in seconds since 1970.
    written: u64,
    /// Of the daemon that wrote it.
    boot_id: u64,
}

impl Head {
    /// As it is written, before that body.
    fn encode(self, body: &[u8]) -> [u8; HEAD_BYTES] {
        let mut head = [0; HEAD_BYTES];
        let words = [
            MAGIC,
            u64::from(VERSION) | u64::from(self.bytes) << 32,
            self.number,
            self.written,
            self.boot_id,
        ];
        for (place, word) in head.chunks_exact_mut(8).zip(words) {
            place.copy_from_slice(&word.to_le_bytes());
        }
        let crc = crc32c::crc32c_append(crc32c::crc32c(&head[..40]), body);
        head[40..44].copy_from_slice(&crc.to_le_bytes());
        head
    }

    /// What it says, and its checksum.
    fn decode(head: &[u8; HEAD_BYTES]) -> Option<(Self, u32)> {
        let mut words = head.chunks_exact(8).map(|word| word.try_into().map_or(0, u64::from_le_bytes));
        let mut next = || words.next().unwrap_or(0);
        let (magic, sizes) = (next(), next());
        if magic != MAGIC || sizes as u32 != VERSION {
            return None;
        }
        let found = Self { bytes: (sizes >> 32) as u32, number: next(), written: next(), boot_id: next() };
        Some((found, next() as u32))
    }
}

/// The name of the page that belongs to an admin socket. Both sides find it from the socket's path.
#[must_use]
pub fn name_of(admin_socket: &Path) -> String {
    let path = std::path::absolute(admin_socket).unwrap_or_else(|_| admin_socket.to_path_buf());
    let hash = blake3::hash(path.as_os_str().as_encoded_bytes()).to_hex();
    format!("{PREFIX}{}", &hash[..16])
}

/// Where it is.
fn file_of(admin_socket: &Path) -> PathBuf {
    Path::new(FOLDER).join(name_of(admin_socket))
}
