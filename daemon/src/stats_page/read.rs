//! The reader's end of the page: it trusts what its checksum, its owner and its age say, and nothing else.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt};
use std::path::Path;
use std::time::{SystemTime, UNIX_EPOCH};

use thiserror::Error;

use super::{HEAD_BYTES, Head, OLD_S, SLOT_BYTES, file_of};
use crate::status::StatusReport;

/// Why there is nothing on a page. The admin socket is to be asked then.
#[derive(Debug, Error)]
pub enum PageError {
    /// There is none, or it cannot be read.
    #[error("there is no stats page: {0}")]
    None(#[from] io::Error),
    /// Somebody else made it.
    #[error("the stats page belongs to user {owner}, and the admin socket to user {daemon}")]
    Foreign {
        /// Whose the page is.
        owner: u32,
        /// Whose the socket is.
        daemon: u32,
    },
    /// It is no page, or not of this version, or it was written to all the time.
    #[error("the stats page has no slot that is whole")]
    Torn,
    /// Nobody writes to it any more.
    #[error("the stats page was written {age} s ago")]
    Old {
        /// Seconds since.
        age: u64,
    },
    /// Its bytes are those that were written, and no status: a daemon of another version.
    #[error("the stats page has no status that this version knows: {0}")]
    Status(#[from] serde_json::Error),
}

/// The status on the page of the daemon with this admin socket, at most some seconds old. The daemon has no part in it.
///
/// # Errors
/// See [`PageError`].
pub fn read(admin_socket: &Path) -> Result<StatusReport, PageError> {
    let daemon = std::fs::symlink_metadata(admin_socket)?.uid();
    let file = OpenOptions::new().read(true).custom_flags(libc::O_NOFOLLOW).open(file_of(admin_socket))?;
    let owner = file.metadata()?.uid();
    // Anybody may make an object of any name that is free.
    if owner != daemon {
        return Err(PageError::Foreign { owner, daemon });
    }
    // A slot that is being written is the older one: a second look, and it has changed.
    let newest = newest(&file).or_else(|| newest(&file)).ok_or(PageError::Torn)?;
    let (head, body) = newest;
    let now = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs());
    let age = now.saturating_sub(head.written);
    if age > OLD_S {
        return Err(PageError::Old { age });
    }
    Ok(serde_json::from_slice(&body)?)
}

fn newest(file: &File) -> Option<(Head, Vec<u8>)> {
    let mut slots: Vec<_> = [0, SLOT_BYTES].into_iter().filter_map(|slot| self::slot(file, slot)).collect();
    slots.sort_by_key(|(head, _)| head.number);
    slots.pop()
}

/// A slot, if what it says of itself holds.
fn slot(file: &File, at: u64) -> Option<(Head, Vec<u8>)> {
    let mut head = [0; HEAD_BYTES];
    file.read_exact_at(&mut head, at).ok()?;
    let (found, crc) = Head::decode(&head)?;
    if u64::from(found.bytes) > SLOT_BYTES - HEAD_BYTES as u64 {
        return None;
    }
    let mut body = vec![0; found.bytes as usize];
    file.read_exact_at(&mut body, at + HEAD_BYTES as u64).ok()?;
    let same = crc32c::crc32c_append(crc32c::crc32c(&head[..40]), &body) == crc;
    same.then_some((found, body))
}
